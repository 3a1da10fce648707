"""Other Pythons and systems, as far as they can be had by taking things away. What was
run under them for real stands in the README."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

import pytest

from support import (
    FIXTURES,
    NO_THREAD,
    ONE_LIFE,
    ROOT,
    SCRIPT,
    Home,
    Receiver,
    dead_url,
    event,
    need_cpython,
    patched,
    place,
    run_sender,
    start_patched,
    wait_until,
)

SILENT = (0, b"", b"")
linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")

# -- stdin, which is read in time -----------------------------------------------------

NO_ALARM = """
import _signal
for module in (_signal, signal):
    if hasattr(module, "setitimer"):
        del module.setitimer
"""
ALONE = "os.posix_spawn = lambda *_, **__: 0\n"


@pytest.mark.parametrize("patch", ["", NO_ALARM, NO_ALARM + NO_THREAD])
def test_without_an_alarm_stdin_is_read_to_its_end(home: Home, patch: str) -> None:
    """Windows has none: a thread reads, or where there is none to be had, nobody
    else."""
    raw = event("Stop", last_assistant_message="x" * (1 << 20))
    done = patched(home, ALONE + patch, url=dead_url(), sent=raw)
    assert (done.returncode, done.stdout, done.stderr) == SILENT
    assert json.loads(home.waiting()[0].read_text())["ping"]["event"] == "Stop"


@pytest.mark.parametrize("patch", ["", NO_ALARM])
def test_without_an_alarm_an_open_stdin_is_left(home: Home, patch: str) -> None:
    """What arrived within the time counts, also where a thread reads it."""
    process = start_patched(home, ALONE + patch, url=dead_url())
    assert process.stdin
    begun = time.monotonic()
    process.stdin.write(json.dumps(event("Stop")).encode())
    process.stdin.flush()
    assert process.wait(30) == 0
    assert 4.5 < time.monotonic() - begun < 9.5
    assert process.communicate() == (b"", b"")
    assert len(home.waiting()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no alarm")
@pytest.mark.parametrize("what", ["an event", "nothing", "write-only"])
def test_alarm_is_called_off(tmp_path: pathlib.Path, what: str) -> None:
    """Whatever stdin was: no TimeoutError comes later, while a ping is delivered."""
    path = tmp_path / "event"
    path.write_text("" if what == "nothing" else json.dumps(event("Stop")))
    fd = os.open(str(path), os.O_WRONLY if what == "write-only" else os.O_RDONLY)
    look = (
        "import sys; sys.path.insert(0, sys.argv[1]); import telemhq_ping, signal; "
        "telemhq_ping.read_stdin(); "
        "print(signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL))"
    )
    command = [sys.executable, "-I", "-c", look, str(ROOT)]
    done = subprocess.run(command, stdin=fd, capture_output=True, check=True)
    os.close(fd)
    assert b"give_up" in done.stdout
    assert done.stdout.rstrip().endswith(b"(0.0, 0.0)")


# -- The start of a sender ------------------------------------------------------------

NO_SPAWN = {
    "PyPy, Termux": "del os.posix_spawn\n",
    "musl": """
def posix_spawn(*_, setsid, **__):
    raise NotImplementedError("setsid")
os.posix_spawn = posix_spawn
""",
    "macOS before 10.15": """
def posix_spawn(*_, setsid, **__):
    raise OSError(22, "Invalid argument")
os.posix_spawn = posix_spawn
""",
}


@linux
@pytest.mark.parametrize("system", NO_SPAWN)
def test_without_posix_spawn_the_sender_is_as_detached(home: Home, system: str) -> None:
    """A session of its own, a parent that is gone, /dev/null on 0 to 2, of all other
    descriptors the lock, SIGTERM as ever; and it delivers."""
    kept, given = os.pipe()
    proc: list[pathlib.Path] = []

    def look(_: object) -> int:
        proc[:] = [pathlib.Path("/proc", str(pid)) for pid in home.processes()]
        fields = (proc[0] / "stat").read_text().rsplit(")", 1)[1].split()
        seen.update(parent=int(fields[1]), group=int(fields[2]), own=int(fields[3]))
        seen["cwd"] = os.readlink(str(proc[0] / "cwd"))
        for fd in (proc[0] / "fd").iterdir():
            files[int(fd.name)] = os.readlink(str(fd))
        for line in (proc[0] / "status").read_text().splitlines():
            if line.startswith("SigIgn"):
                seen["ignored"] = int(line.split()[1], 16)
        return 200

    seen: dict[str, object] = {}
    files: dict[int, str] = {}
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    with Receiver(look) as receiver:
        done = patched_with(home, NO_SPAWN[system] + ignore, receiver.url, given)
        assert (done.returncode, done.stdout, done.stderr) == SILENT
        receiver.wait_for(1)
        wait_until(lambda: not home.waiting())
    os.close(given)
    own = int(proc[0].name)
    assert (seen["group"], seen["own"]) == (own, own)
    assert seen["parent"] != os.getpid()
    assert seen["cwd"] == "/"
    assert not int(str(seen["ignored"])) >> (signal.SIGTERM - 1) & 1
    assert [files.pop(fd) for fd in (0, 1, 2)] == ["/dev/null"] * 3
    others = [path for path in files.values() if ".so" not in path]  # PyPy's own
    kinds = sorted(path.split(":")[0] for path in others)
    assert kinds == sorted([str(home.destination() / "lock"), "socket"])
    assert os.read(kept, 1) == b""  # nobody holds its other end
    os.close(kept)


def patched_with(
    home: Home, patch: str, url: str, fd: int
) -> subprocess.CompletedProcess[bytes]:
    """A hook behind a patch, which inherits one descriptor more."""
    from support import PRELUDE, RUNNER

    isolated = [sys.executable, "-I", "-S", "-c"]
    return subprocess.run(
        [*isolated, RUNNER, str(ROOT), PRELUDE + patch, "hook"],
        input=json.dumps(event("Stop")).encode(),
        capture_output=True,
        env=home.env(url),
        cwd=str(home.project),
        start_new_session=True,
        pass_fds=[fd],
        timeout=60,
    )


# -- A Python that lacks parts of its library ------------------------------------------

MINIMAL = """
class Missing:
    names = {0}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for name in list(sys.modules):
    if name.split(".")[0] in Missing.names:
        del sys.modules[name]
"""
DEBIANS = MINIMAL.format(
    {"json", "http", "email", "urllib", "html", "ctypes", "multiprocessing", "pydoc"}
)


def test_a_minimal_python_keeps_the_ping(home: Home, receiver: Receiver) -> None:
    """Its hook is silent and exits with 0; the ping waits for a whole Python."""
    need_cpython(sys.executable)
    patch = "os.posix_spawn = lambda *a, **k: 0\n" + DEBIANS
    done = patched(home, patch, url=receiver.url, sent=event("Stop"))
    assert (done.returncode, done.stdout, done.stderr) == SILENT
    assert len(home.waiting()) == 1
    run_sender(home, receiver.url)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("debug", [False, True], ids=["detached", "debug"])
def test_a_minimal_pythons_sender_says_what_is_missing(
    home: Home, receiver: Receiver, debug: bool
) -> None:
    """It holds the pings, blames none; state.json and debug mode name the cause."""
    need_cpython(sys.executable)
    place(home, receiver.url, 3)
    how = ["foreground", "8", home.waiting()[0].name] if debug else ["detached", "-1"]
    env: dict[str, Any] = {"TELEMHQ_HOOK_DEBUG": "1"} if debug else {}
    done = patched(home, DEBIANS + ONE_LIFE, *how, url=receiver.url, **env)
    assert (done.returncode, done.stdout) == (0, b"")
    assert (b"this Python lacks the module" in done.stderr) == debug
    state = home.state_json()
    assert state["problem"]["verdict"] == "hold"
    assert state["problem"]["what"].startswith("this Python lacks the module ")
    assert not state["suspects"]
    assert len(home.waiting()) == 3


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
AUTHORITY = str(TLS / "ca.pem")


@pytest.mark.parametrize("bundle, verdict", [(True, ""), (False, "hold")])
def test_a_python_without_certificates_takes_the_systems(
    home: Home, bundle: bool, verdict: str
) -> None:
    """python.org's for macOS has none at first; where the system has none, either, the
    ping is held, and never sent unverified."""
    patch = NO_STORE.format(AUTHORITY if bundle else "/nowhere.pem") + ONE_LIFE
    with Receiver(tls=SERVED) as receiver:
        place(home, receiver.url)
        run_sender(home, receiver.url, patch)
        assert len(receiver.requests) == bundle
    assert home.state_json()["problem"].get("verdict", "") == verdict


def test_certificates_that_the_user_chose_are_not_added_to(home: Home) -> None:
    """Where SSL_CERT_FILE names some, the system's are not trusted beside them."""
    patch = NO_STORE.format(AUTHORITY) + ONE_LIFE
    with Receiver(tls=SERVED) as receiver:
        place(home, receiver.url)
        run_sender(home, receiver.url, patch, SSL_CERT_FILE="/nowhere.pem")
        assert receiver.requests == []
    assert home.state_json()["problem"]["verdict"] == "hold"


# -- Paths -----------------------------------------------------------------------------

CASELESS = """
lower = {{name.lower(): name for name in {names!r}}}
def caseless(call):
    def found(path, *rest, **named):
        return call(lower.get(str(path).lower(), path), *rest, **named)
    return found
os.stat, os.lstat = caseless(os.stat), caseless(os.lstat)
"""


def project_seen(home: Home, url: str, top: object, cwd: object, patch: str) -> str:
    """The project of a Stop in `cwd`, of a session that began in `top`."""
    patch = "os.posix_spawn = lambda *a, **k: 0\n" + patch
    sent = event("Stop", cwd=str(cwd))
    patched(home, patch, url=url, sent=sent, CLAUDE_PROJECT_DIR=top)
    (path,) = home.waiting()
    return str(json.loads(path.read_text("utf-8"))["ping"]["project"])


def test_a_file_system_that_knows_no_case(home: Home, receiver: Receiver) -> None:
    """/Users/Dev/API/src lies in /users/dev/api where these are one directory."""
    top = home.path / "Acme" / "API"
    (top / "src").mkdir(parents=True)
    names = [str(top.parent), str(top), str(top / "src")]
    shouted = str(top / "src").upper()
    patch = CASELESS.format(names=names)
    assert project_seen(home, receiver.url, top, shouted, patch) == "API"


def test_a_file_system_that_knows_case(home: Home, receiver: Receiver) -> None:
    """There they are two."""
    top = home.path / "Acme" / "API"
    (top / "src").mkdir(parents=True)
    shouted = str(top / "src").upper()
    assert project_seen(home, receiver.url, top, shouted, "") == "SRC"


@pytest.mark.parametrize("linked", ["the session's", "the event's"])
def test_a_link_on_the_way(home: Home, receiver: Receiver, linked: str) -> None:
    """/tmp and /var are links on macOS: either path may be the one without them."""
    real, link = home.path / "private" / "work", home.path / "work"
    (real / "api" / "src").mkdir(parents=True)
    link.symlink_to(real)
    top, below = (link, real) if linked == "the session's" else (real, link)
    cwd = below / "api" / "src"
    assert project_seen(home, receiver.url, top / "api", cwd, "") == "api"


def test_a_link_into_the_project(home: Home, receiver: Receiver) -> None:
    """A cwd on the other side of a link lies where the link leads."""
    top, link = home.path / "Acme" / "API", home.path / "elsewhere"
    (top / "src" / "deep").mkdir(parents=True)
    link.symlink_to(top / "src")
    assert project_seen(home, receiver.url, top, link / "deep", "") == "API"


def test_a_directory_that_is_gone(home: Home, receiver: Receiver) -> None:
    """A cwd that was removed meanwhile still lies where it lay."""
    real, link = home.path / "private", home.path / "link"
    real.mkdir()
    link.symlink_to(real)
    cwd = real / "was" / "here"
    assert project_seen(home, receiver.url, link, cwd, "") == "link"


# -- What we say of them ---------------------------------------------------------------


def test_the_versions_are_the_same_wherever_they_are_named(script: ModuleType) -> None:
    """The matrix, the README's table and the script's first lines name the same."""
    matrix = (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8")
    (line,) = [
        line for line in matrix.splitlines() if line.strip().startswith("python:")
    ]
    versions = re.findall(r'"3\.(\d+)"', line)
    first, last = int(versions[0]), int(versions[-1])
    assert [int(minor) for minor in versions] == list(range(first, last + 1))
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"| CPython 3.{first} to 3.{last} |" in readme
    assert f"You need Python 3.{first} or newer" in readme
    assert f"Python 3.{first} to 3.{last}." in (script.__doc__ or "")
    assert f"sys.version_info < (3, {first})" in SCRIPT.read_text("utf-8")
