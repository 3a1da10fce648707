"""The script as the settings' command imports it, whatever lies in its directory."""

from __future__ import annotations

import json
import marshal
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import threading
from typing import Any, Callable

import pytest

from support import ROOT, SCRIPT, Home, Receiver, event

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs sh")

EXAMPLE = json.loads((ROOT / "settings.example.json").read_text("utf-8"))["hooks"]
COMMANDS = {name: EXAMPLE[name][0]["hooks"][0]["command"] for name in EXAMPLE}
FORMS = {
    "imported": COMMANDS["Stop"],
    "as a script": "python3 ~/.claude/hooks/telemhq_ping.py",  # TelemHQ's own block
}
STOP = json.dumps(event("Stop")).encode()
HIT = """
import os
with open(os.environ["HIT"], "a") as file:
    file.write(__name__ + chr(10))
"""
each_form = pytest.mark.parametrize("form", FORMS)


class Installed:
    """The script in ~/.claude/hooks of a HOME of its own, and its receiver."""

    def __init__(self, home: Home, receiver: Receiver) -> None:
        self.home, self.receiver = home, receiver
        self.hooks = home.path / ".claude" / "hooks"
        self.script = self.hooks / SCRIPT.name
        self.cache = self.hooks / "__pycache__"
        tag = sys.implementation.cache_tag
        self.bytecode = self.cache / f"{SCRIPT.stem}.{tag}.pyc"
        self.hit = home.path / "hit"
        self.hooks.mkdir(parents=True)
        shutil.copy(str(SCRIPT), str(self.script))

    def start(
        self, form: str = "imported", umask: int = 0o022, **more: object
    ) -> subprocess.Popen[bytes]:
        """Start a hook by one of FORMS through sh; its stdin is open."""
        return subprocess.Popen(
            ["/bin/sh", "-c", f"umask {umask:o}; {FORMS.get(form, form)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.home.env(self.receiver.url, **{"HIT": self.hit, **more}),
            cwd=str(self.home.project),
            start_new_session=True,
        )

    def delivers(self, form: str, **more: Any) -> bytes:
        """One ping is made and delivered, once; the hook's stderr."""
        before = len(self.receiver.requests)
        process = self.start(form, **more)
        out, err = process.communicate(STOP, 30)
        assert (process.returncode, out) == (0, b"")
        self.receiver.wait_for(before + 1)
        self.home.quiet()
        assert len(self.receiver.requests) == before + 1
        assert self.home.waiting() == []
        return err


@pytest.fixture
def installed(home: Home, receiver: Receiver) -> Installed:
    """The script, installed, and not yet run."""
    return Installed(home, receiver)


# -- What Python caches ----------------------------------------------------------------


@pytest.mark.parametrize("linked", [False, True])
def test_bytecode_is_kept_once_for_all_runs(installed: Installed, linked: bool) -> None:
    """The first run leaves a .pyc beside the script, and nothing else; the others, by
    each documented command, use it as it is. So it is where the script is a link. (A
    failing `claude -p` sends a SIGTERM to its StopFailure hooks: a trap.)"""
    assert COMMANDS["StopFailure"] == "trap '' TERM; " + COMMANDS["Stop"]
    if linked:
        installed.script.unlink()
        installed.script.symlink_to(SCRIPT)
    assert installed.delivers("imported") == b""
    before = installed.bytecode.stat()
    for form in (*FORMS, *COMMANDS.values()):
        assert installed.delivers(form) == b""
    assert list(installed.cache.iterdir()) == [installed.bytecode]
    assert {*installed.hooks.iterdir()} == {installed.script, installed.cache}
    after = installed.bytecode.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


@pytest.mark.fault(75)
@each_form
def test_a_read_only_directory_is_no_obstacle(installed: Installed, form: str) -> None:
    """Where Python can keep no bytecode, each ping arrives. (The file is for root, who
    writes everywhere, but in no directory that is none.)"""
    installed.cache.write_text("")
    installed.hooks.chmod(0o555)
    for _ in range(2):
        assert installed.delivers(form) == b""
    installed.hooks.chmod(0o755)
    assert installed.cache.read_text() == ""


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: content[:0],
    "in the header": lambda content: content[:10],
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: content[:16].ljust(len(content), b"\0"),
    "another's": lambda content: b"\x17\x0d\x0d\x0a" + content[4:],
    "a text": lambda _: b"not bytecode\n" * 100,
}


@pytest.mark.fault(75)
@each_form
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bytecode_is_mended(
    installed: Installed, form: str, damage: str
) -> None:
    """A .pyc that a full disk or a power cut has damaged costs at most one traceback,
    and no ping: the next run is silent, and has good bytecode."""
    installed.delivers(form)
    installed.bytecode.write_bytes(DAMAGE[damage](installed.bytecode.read_bytes()))
    told = installed.delivers(form)
    assert told.count(b"Traceback") <= (form == "imported")
    assert installed.delivers(form) == b""
    marshal.loads(installed.bytecode.read_bytes()[16:])


@pytest.mark.fault(75)
@each_form
def test_eight_first_runs_at_once(installed: Installed, form: str) -> None:
    """Each of them may write the bytecode: all eight pings arrive, once, in silence."""
    processes = [installed.start(form) for _ in range(8)]
    for process in processes:  # all wait for their event
        assert process.communicate(STOP, 60) == (b"", b"")
        assert process.returncode == 0
    installed.receiver.wait_for(8)
    installed.home.quiet()
    assert len({ping["event_id"] for ping in installed.receiver.pings}) == 8
    assert len(installed.receiver.requests) == 8
    assert installed.delivers(form) == b""


@pytest.mark.fault(75)
@each_form
def test_the_script_is_replaced_while_hooks_and_senders_run(
    installed: Installed, form: str
) -> None:
    """What runs goes on, what starts is the new version; each ping arrives once."""
    release, receiver = threading.Event(), installed.receiver
    receiver.answer = lambda _: release.wait(30) and 200
    try:
        assert installed.start(form).communicate(STOP, 30) == (b"", b"")
        receiver.wait_for(1)  # its sender waits for the answer
        hook = installed.start(form)  # for its event
        while not installed.bytecode.exists():
            pass
        text = SCRIPT.read_text("utf-8")
        line = next(x for x in text.splitlines() if x.startswith("__version__ ="))
        new = installed.home.path / "new.py"
        new.write_text(text.replace(line, '__version__ = "99.9"'))
        new.rename(installed.script)
        assert hook.communicate(STOP, 30) == (b"", b"")
        assert installed.start(form).communicate(STOP, 30) == (b"", b"")
    finally:
        release.set()
    receiver.wait_for(3)
    installed.home.quiet()
    assert len({ping["event_id"] for ping in receiver.pings}) == 3
    assert receiver.pings[2]["hook_version"] == "99.9"
    assert installed.delivers(form) == b""


@pytest.mark.fault(28)
@each_form
def test_under_a_umask_of_0_nobody_else_may_put_bytecode(
    installed: Installed, form: str
) -> None:
    """Python would make a __pycache__ that everybody may write. Where a group may write
    the script itself, it may write the bytecode."""
    installed.hooks.chmod(0o755)
    for shared in (0, 0o020):
        for _ in range(2):
            assert installed.delivers(form, umask=0) == b""
        for path in (installed.cache, installed.bytecode):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o022 & ~shared
        for path in (installed.hooks, installed.cache):
            path.chmod(0o775)


# -- Other people's files --------------------------------------------------------------

HOSTILE = (
    "_json _sha2 _sha256 _signal datetime email encodings fcntl hashlib hmac http "
    "importlib json marshal os posixpath random select signal site sitecustomize "
    "usercustomize socket ssl stat subprocess threading time typing urllib startup"
)


def make_hostile(directory: pathlib.Path, *more: str) -> None:
    """Modules that report that they were imported."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*HOSTILE.split(), *more):
        (directory / (name + ".py")).write_text(HIT)


@pytest.mark.fault(33)
@each_form
@pytest.mark.parametrize("variable", ["", "TELEMHQ_FOREGROUND", "TELEMHQ_HOOK_DEBUG"])
def test_modules_of_the_project_or_beside_the_script_are_not_ours(
    installed: Installed, form: str, variable: str
) -> None:
    """A json.py, os.py or telemhq_ping.py in the project, which is the cwd, and others
    beside the script: neither hook nor sender imports one. Nor, by our own command,
    what PYTHONPATH, PYTHONSTARTUP and their like name."""
    evil = installed.home.path / "evil"
    make_hostile(installed.home.project, "telemhq_ping")
    make_hostile(installed.hooks)
    make_hostile(evil, "telemhq_ping")
    env: dict[str, object] = {variable or "NONE": "1"}
    if form == "imported":
        env.update(PYTHONPATH=f"{evil}::.", PYTHONHOME=evil, PYTHONUSERBASE=evil)
        env.update(PYTHONSTARTUP=evil / "startup.py", PYTHONINSPECT="1")
    told = installed.delivers(form, **env)
    assert told == b"" or variable == "TELEMHQ_HOOK_DEBUG"
    assert not installed.hit.exists()


@pytest.mark.fault(40)
@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty directory"])
def test_without_the_script_nothing_of_the_project_runs(
    installed: Installed, kind: str
) -> None:
    """Where the hooks directory or the script is gone, each command ends without a
    veto: Python's exit status 2 for a missing script would block. And the project's own
    telemhq_ping.py is not taken for it."""
    make_hostile(installed.home.project, "telemhq_ping")
    shutil.rmtree(installed.hooks)
    if kind == "a file":
        installed.hooks.write_text("mine")
    elif kind == "an empty directory":
        installed.hooks.mkdir()
    for command in COMMANDS.values():
        for line, status in ((command, 0), (command.replace(" || true", ""), 2)):
            process = installed.start(line)
            assert process.communicate(STOP, 30)[0] == b""
            assert process.returncode == status
    assert not installed.hit.exists()
    assert not installed.receiver.requests


def test_a_prefix_that_is_a_link_hides_no_module(
    home: Home, tmp_path: pathlib.Path
) -> None:
    """Homebrew's Python calls a link to its directory its prefix, and finds its library
    in the directory: commands have all of it. A name that only begins so is another."""
    (tmp_path / "opt").symlink_to(sys.base_prefix)
    (tmp_path / "py-app").mkdir()
    (tmp_path / "py-app" / "argparse.py").write_text("raise SystemExit(9)")
    code = (
        "import runpy, sys; sys.base_prefix = sys.argv.pop()\n"
        "sys.base_exec_prefix = sys.base_prefix[:-3] + 'py'\n"
        "sys.path.insert(0, sys.base_exec_prefix + '-app')\n"
        "sys.argv[1] = '--version'; runpy.run_path(sys.argv.pop(2), None, '__main__')"
    )
    command = [sys.executable, "-c", code, "", str(SCRIPT), str(tmp_path / "opt")]
    assert subprocess.check_output(command, env=home.env()) == b"1.1.0\n"
