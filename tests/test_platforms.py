"""Other Pythons and systems, as far as they can be had by taking things away. What was
run under them for real stands in the README."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType
from typing import Any

import pytest

from support import (
    FIXTURES,
    ROOT,
    SCRIPT,
    Home,
    Receiver,
    event,
    need_cpython,
    patched,
    place,
    run_sender,
)

# -- A Python that lacks parts of its library ------------------------------------------

MINIMAL = """
class Missing:
    names = {"json", "http", "email", "urllib", "html", "ctypes", "pydoc"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
for name in list(sys.modules):
    if name.split(".")[0] in Missing.names:
        del sys.modules[name]
"""


@pytest.mark.fault(74)
def test_a_minimal_python_keeps_the_ping(home: Home, receiver: Receiver) -> None:
    """A distribution's minimal package: the hook is silent; the sender holds the ping,
    and does not blame it; state.json and debug mode name the cause. A whole Python
    delivers."""
    need_cpython(sys.executable)
    patch = "os.posix_spawn = lambda *a, **k: 0\n" + MINIMAL
    done = patched(home, patch, url=receiver.url, sent=event("Stop"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for how, debug in (("once", "0"), ("debug", "1")):
        asked = (how, "-1", home.destination().name)
        env: dict[str, Any] = {"TELEMHQ_HOOK_DEBUG": debug}
        done = patched(home, MINIMAL, *asked, url=receiver.url, **env)
        assert (done.returncode, done.stdout) == (0, b"")
        assert (b"urllib" in done.stderr) == (how == "debug")
    state = home.state_json()
    assert "urllib" in json.dumps(state["problem"])
    assert list(state["suspects"].values()) == [0]  # none blamed
    assert len(home.waiting()) == 1
    home.set_state()
    run_sender(home, receiver.url)
    assert len(receiver.requests) == 1


# -- Certificates ----------------------------------------------------------------------

NO_STORE = """
import ssl
ssl.SSLContext.set_default_verify_paths = lambda self: None
ssl.SSLContext.load_default_certs = lambda self, purpose=None: None
none = ssl.get_default_verify_paths()._replace(cafile=None, capath=None)
ssl.get_default_verify_paths = lambda: none
real = ssl.SSLContext.load_verify_locations
def load(self, cafile=None, *rest, **named):
    real(self, {!r} if cafile == "/etc/ssl/cert.pem" else cafile, *rest, **named)
ssl.SSLContext.load_verify_locations = load
"""
TLS = FIXTURES / "tls"
SERVED = str(TLS / "loopback.pem"), str(TLS / "loopback.key")


@pytest.mark.parametrize(
    "system, chosen, delivered",
    [(str(TLS / "ca.pem"), "", 1), ("/no.pem", "", 0), (str(TLS / "ca.pem"), "/no", 0)],
    ids=("the system's", "none", "the user's own"),
)
def test_a_python_without_certificates_takes_the_systems(
    home: Home, system: str, chosen: str, delivered: int
) -> None:
    """python.org's for macOS has none at first. Where the system has none, either, or
    SSL_CERT_FILE names others, the ping is held, and never sent unverified."""
    env: dict[str, Any] = {"SSL_CERT_FILE": chosen} if chosen else {}
    with Receiver(tls=SERVED) as receiver:
        place(home, receiver.url)
        name = home.destination().name
        patch = NO_STORE.format(system)
        patched(home, patch, "once", "-1", name, url=receiver.url, **env)
        assert len(receiver.requests) == delivered
    assert len(home.waiting()) == 1 - delivered


# -- What we say of them ---------------------------------------------------------------


def test_the_versions_are_the_same_wherever_they_are_named(script: ModuleType) -> None:
    """The matrix, the README and the script's first lines name the same."""
    matrix = (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8")
    (line,) = re.findall(r"(?m)^ *python: (.*)", matrix)
    versions = [int(minor) for minor in re.findall(r'"3\.(\d+)"', line)]
    first, last = versions[0], versions[-1]
    assert versions == list(range(first, last + 1))
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"CPython 3.{first} to 3.{last}" in readme
    assert f"Python 3.{first}, or newer" in readme
    assert f"Python 3.{first} to 3.{last}." in (script.__doc__ or "")
    assert f"sys.version_info < (3, {first})" in SCRIPT.read_text("utf-8")
