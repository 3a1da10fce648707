"""The script as the settings' command imports it, whatever lies in its directory."""

from __future__ import annotations

import json
import marshal
import os
import pathlib
import py_compile
import shutil
import stat
import subprocess
import sys
import threading
import time
import types
from typing import TYPE_CHECKING, Any, Callable, Iterator

import pytest

from support import ROOT, SCRIPT, Home, Receiver, event, pythons

if TYPE_CHECKING:
    Outcome = tuple[int, bytes, bytes]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs sh")

EXAMPLE = json.loads((ROOT / "settings.example.json").read_text("utf-8"))["hooks"]
FORMS = {
    "imported": EXAMPLE["Stop"][0]["hooks"][0]["command"],
    "as a script": "python3 ~/.claude/hooks/telemhq_ping.py",  # TelemHQ's own block
}
SILENT = (0, b"", b"")
STOP = json.dumps(event("Stop")).encode()
HIT = """
import os
with open(os.environ["HIT"], "a") as file:
    file.write(__name__ + chr(10))
"""
LINUX = sys.platform.startswith("linux")
each_form = pytest.mark.parametrize("form", FORMS)


def outcome(done: subprocess.CompletedProcess[bytes]) -> Outcome:
    """What Claude Code sees of a hook: exit status, stdout, stderr."""
    return done.returncode, done.stdout, done.stderr


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
        self.readonly = False
        self.hooks.mkdir(parents=True)

    def put(self, version: str = "1.1.0", *flags: str) -> None:
        """Copy a version of the script into place with cp. All versions have the same
        size, and under -p the same time."""
        text = SCRIPT.read_text("utf-8")
        line = '\n__version__ = "{}"\n'
        assert text.count(line.format("1.1.0")) == 1
        assert len(version) == 5
        self.home.path.joinpath("download").mkdir(exist_ok=True)
        source = self.home.path / "download" / SCRIPT.name
        source.write_text(text.replace(line.format("1.1.0"), line.format(version)))
        os.utime(source, (1700000000, 1700000000))
        subprocess.run(["cp", *flags, str(source), str(self.script)], check=True)

    def start(
        self, form: str = "imported", umask: int = 0o022, **more: object
    ) -> subprocess.Popen[bytes]:
        """Start a hook by one of FORMS through sh; its stdin is open."""
        env = self.home.env(self.receiver.url, HIT=self.hit)
        env["PATH"] = os.path.dirname(sys.executable) + ":" + env["PATH"]
        env.update({name: str(value) for name, value in more.items()})
        return subprocess.Popen(
            [*self.prefix(), "/bin/sh", "-c", f"umask {umask:o}; {FORMS[form]}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=str(self.home.project),
            start_new_session=True,
        )

    def prefix(self) -> list[str]:
        """The command that makes the hooks directory read-only for another one. (Where
        root runs the tests, who writes everywhere, by a mount of its own.)"""
        if not self.readonly or os.geteuid() != 0:
            return []
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        return ["unshare", "-m", "/bin/sh", "-c", mount, str(self.hooks)]

    def run(
        self, form: str = "imported", umask: int = 0o022, **more: object
    ) -> subprocess.CompletedProcess[bytes]:
        """A Stop event through one of FORMS, to the hook's end."""
        process = self.start(form, umask, **more)
        out, err = process.communicate(STOP, 30)
        return subprocess.CompletedProcess(FORMS[form], process.returncode, out, err)

    def delivers(self, form: str, version: str = "1.1.0", **more: Any) -> bytes:
        """One ping is made and delivered, once, by this version; the hook's stderr."""
        before = len(self.receiver.requests)
        done = self.run(form, **more)
        assert (done.returncode, done.stdout) == (0, b"")
        self.receiver.wait_for(before + 1)
        self.home.quiet()
        (request,) = self.receiver.requests[before:]
        assert request.ping["hook_version"] == version
        assert request.headers["User-Agent"] == f"telemhq-ping/{version}"
        assert self.home.waiting() == []
        return done.stderr


@pytest.fixture
def installed(home: Home, receiver: Receiver) -> Iterator[Installed]:
    """The script, installed, and not yet run."""
    found = Installed(home, receiver)
    found.put()
    yield found
    for path in (found.hooks, found.cache):
        if path.is_dir():
            path.chmod(0o755)


def make_readonly(installed: Installed) -> None:
    """From now on no hook can write into the hooks directory."""
    installed.readonly = True
    for path in (installed.cache, installed.hooks):
        if path.is_dir():
            path.chmod(0o555)
    if os.geteuid() == 0:
        command = [*installed.prefix(), "true"]
        if not shutil.which("unshare") or subprocess.run(command).returncode:
            pytest.skip("no mount namespace here, and root writes everywhere")


def is_whole(path: pathlib.Path) -> bool:
    """Whether a file is bytecode that this Python can load."""
    return isinstance(marshal.loads(path.read_bytes()[16:]), types.CodeType)


# -- What Python caches ----------------------------------------------------------------


@each_form
def test_bytecode_is_kept_once_for_all_runs(installed: Installed, form: str) -> None:
    """The first run leaves a .pyc beside the script, the others use it as it is."""
    assert installed.delivers(form) == b""
    assert [path.name for path in installed.cache.iterdir()] == [
        installed.bytecode.name
    ]
    before = installed.bytecode.stat()
    for _ in range(2):
        assert installed.delivers(form) == b""
    after = installed.bytecode.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


@each_form
@pytest.mark.parametrize("there", [False, True], ids=("none", "cached"))
def test_a_read_only_directory_is_no_obstacle(
    installed: Installed, form: str, there: bool
) -> None:
    """Where Python can keep no bytecode, or use what is there, each ping arrives."""
    if there:
        installed.delivers(form)
    make_readonly(installed)
    for _ in range(2):
        assert installed.delivers(form) == b""
    assert installed.bytecode.exists() == there


@pytest.mark.parametrize("flags", [(), ("-p",), ("--remove-destination", "-p")])
@each_form
def test_the_version_that_the_file_holds_runs(
    installed: Installed, form: str, flags: tuple[str, ...]
) -> None:
    """A new version runs from its first event on, hook and sender, though it has the
    old one's size, and by cp -p its time."""
    if flags[:1] == ("--remove-destination",) and not LINUX:
        pytest.skip("GNU cp")
    installed.put("1.1.0", *flags)
    assert installed.delivers(form) == b""
    installed.put("1.2.0", *flags)
    for _ in range(2):
        assert installed.delivers(form, "1.2.0") == b""
    assert is_whole(installed.bytecode)


@each_form
def test_the_version_that_a_link_names_runs(installed: Installed, form: str) -> None:
    """The same where the script is a link, as dotfiles have it, that is set to another
    file; that one may be older than the bytecode."""
    for version in ("1.1.0", "1.2.0"):
        installed.put(version, "-p")
        installed.script.rename(installed.home.path / version)
    for version in ("1.1.0", "1.2.0", "1.1.0"):
        time.sleep(0.02)  # a file system's clock may tick every 10 ms
        link = installed.hooks / "new"
        link.symlink_to(installed.home.path / version)
        link.rename(installed.script)
        assert installed.delivers(form, version) == b""


@each_form
def test_old_bytecode_that_cannot_be_removed_is_not_used(
    installed: Installed, form: str
) -> None:
    """A read-only directory with the bytecode of another version of the same size and
    time: what the file holds runs, the sender too."""
    installed.put("1.1.0", "-p")
    installed.delivers(form)
    installed.put("1.2.0", "-p")
    make_readonly(installed)
    for _ in range(2):
        assert installed.delivers(form, "1.2.0") == b""
    assert installed.bytecode.exists()


def another_pythons(installed: Installed) -> None:
    """Bytecode whose magic number is another Python's."""
    content = installed.bytecode.read_bytes()
    installed.bytecode.write_bytes(b"\x17\x0d\x0d\x0a" + content[4:])


def another_files(installed: Installed) -> None:
    """Bytecode of another file, under our name."""
    other = installed.home.path / "other.py"
    other.write_text(HIT)
    py_compile.compile(str(other), str(installed.bytecode), doraise=True)


def unchecked(installed: Installed) -> None:
    """Bytecode of an older version that says that nobody need look at the source."""
    installed.put("1.0.9")
    py_compile.compile(
        str(installed.script),
        str(installed.bytecode),
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    installed.put()


def a_text(installed: Installed) -> None:
    """No bytecode at all."""
    installed.bytecode.write_bytes(b"not bytecode\n" * 100)


def a_directory(installed: Installed) -> None:
    """A directory where the bytecode should be."""
    installed.bytecode.unlink()
    installed.bytecode.mkdir()


@each_form
@pytest.mark.parametrize(
    "make",
    [another_pythons, another_files, unchecked, a_text, a_directory],
    ids=lambda make: make.__name__,
)
def test_foreign_bytecode_is_not_run(
    installed: Installed, form: str, make: Callable[[Installed], None]
) -> None:
    """Whatever lies where our bytecode should be, the code of the file runs."""
    installed.delivers(form)
    time.sleep(0.02)
    make(installed)
    for _ in range(2):
        assert installed.delivers(form) == b""
    assert not installed.hit.exists()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: content[:0],
    "in the header": lambda content: content[:10],
    "behind the header": lambda content: content[:16],
    "early": lambda content: content[:40],
    "half": lambda content: content[: len(content) // 2],
    "late": lambda content: content[:-1],
    "zeros": lambda content: b"\0" * len(content),
    "zeros behind the header": lambda content: content[:16].ljust(len(content), b"\0"),
    "zeros in its second half": lambda content: content[: len(content) // 2].ljust(
        len(content), b"\0"
    ),
    "no code": lambda content: content[:16] + marshal.dumps([1, 2]),
    "unknown types": lambda content: content[:16] + b"?" * 1000,
}


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
    assert told == b"" or told.startswith(b"Traceback")
    assert installed.delivers(form) == b""
    assert is_whole(installed.bytecode)


@each_form
def test_damaged_bytecode_that_cannot_be_removed_loses_no_ping(
    installed: Installed, form: str
) -> None:
    """In a read-only directory it stays; hook and sender go on without it."""
    installed.delivers(form)
    content = installed.bytecode.read_bytes()
    installed.bytecode.write_bytes(content[: len(content) // 2])
    make_readonly(installed)
    for _ in range(2):
        told = installed.delivers(form)
        assert told.count(b"Traceback") == (form == "imported")


# -- At once ---------------------------------------------------------------------------


@each_form
def test_eight_first_runs_at_once(installed: Installed, form: str) -> None:
    """Each of them may write the bytecode: all eight pings arrive, once, in silence."""
    processes = [installed.start(form) for _ in range(8)]
    found: list[tuple[bytes, bytes]] = []
    threads = [
        threading.Thread(target=lambda p=p: found.append(p.communicate(STOP, 60)))
        for p in processes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(b"", b"")] * 8
    assert [process.returncode for process in processes] == [0] * 8
    installed.receiver.wait_for(8)
    installed.home.quiet()
    assert len({ping["event_id"] for ping in installed.receiver.pings}) == 8
    assert len(installed.receiver.requests) == 8
    assert is_whole(installed.bytecode)
    assert installed.delivers(form) == b""


@each_form
def test_the_script_is_replaced_while_hooks_and_senders_run(
    installed: Installed, form: str
) -> None:
    """What runs goes on, what starts is the new version; each ping arrives once."""
    release, receiver = threading.Event(), installed.receiver
    receiver.answer = lambda _: release.wait(30) and 200
    try:
        assert outcome(installed.run(form)) == SILENT  # its sender waits for the answer
        receiver.wait_for(1)
        waiting = [installed.start(form) for _ in range(3)]  # for their events
        time.sleep(1)
        installed.put("1.2.0")
        for process in waiting:
            assert process.communicate(STOP, 30) == (b"", b"")
            assert process.returncode == 0
        assert outcome(installed.run(form)) == SILENT
    finally:
        release.set()
    receiver.wait_for(5)
    installed.home.quiet()
    assert len({ping["event_id"] for ping in receiver.pings}) == 5
    versions = [ping["hook_version"] for ping in receiver.pings]
    assert versions == ["1.1.0"] * 4 + ["1.2.0"]
    assert installed.delivers(form, "1.2.0") == b""


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@each_form
def test_ps_shows_what_the_sender_is(installed: Installed, form: str) -> None:
    """Its command line names the script, by directory and module."""
    release = threading.Event()
    installed.receiver.answer = lambda _: release.wait(30) and 200
    try:
        assert outcome(installed.run(form)) == SILENT
        installed.receiver.wait_for(1)
        (pid,) = installed.home.processes()
        line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    finally:
        release.set()
    assert os.fsencode(str(installed.hooks)) in line
    assert b"telemhq_ping" in line


# -- Other people's files --------------------------------------------------------------

HOSTILE = (
    "_json",
    "_sha2",
    "_sha256",
    "_signal",
    "calendar",
    "datetime",
    "email",
    "encodings",
    "errno",
    "fcntl",
    "genericpath",
    "hashlib",
    "hmac",
    "http",
    "importlib",
    "io",
    "json",
    "marshal",
    "os",
    "posixpath",
    "random",
    "select",
    "signal",
    "site",
    "sitecustomize",
    "socket",
    "ssl",
    "stat",
    "subprocess",
    "threading",
    "time",
    "urllib",
)


def make_hostile(directory: pathlib.Path, *more: str) -> None:
    """Modules that report that they were imported."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*HOSTILE, *more):
        (directory / (name + ".py")).write_text(HIT)


@each_form
def test_modules_of_the_project_or_beside_the_script_are_not_ours(
    installed: Installed, form: str
) -> None:
    """A json.py, os.py or telemhq_ping.py in the project, which is the cwd, and others
    beside the script: neither hook nor sender imports one."""
    make_hostile(installed.home.project, "telemhq_ping")
    make_hostile(installed.hooks)
    for _ in range(2):
        assert installed.delivers(form) == b""
    installed.script.touch()  # the way of a version that has changed
    assert installed.delivers(form) == b""
    assert not installed.hit.exists()


def test_modules_in_pythonpath_are_not_ours(installed: Installed) -> None:
    """PYTHONPATH, which may name the project, too, is ignored by hook and sender."""
    evil = installed.home.path / "evil"
    make_hostile(evil, "telemhq_ping")
    make_hostile(installed.home.project, "telemhq_ping")
    for _ in range(2):
        told = installed.delivers("imported", PYTHONPATH=f"{evil}::.")
        assert told == b""
    assert not installed.hit.exists()


def test_a_hostile_module_would_be_noticed(installed: Installed) -> None:
    """The counter-example: a plain Python run in the project imports its json."""
    make_hostile(installed.home.project)
    subprocess.run(
        [sys.executable, "-c", "import json"],
        cwd=str(installed.home.project),
        env=installed.home.env(HIT=installed.hit),
        timeout=30,
    )
    assert "json\n" in installed.hit.read_text()


# -- Where it is -----------------------------------------------------------------------


def open_to_others(path: pathlib.Path) -> bool:
    """Whether somebody else may write there."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o022)


@each_form
def test_under_a_umask_of_0_nobody_else_may_put_bytecode(
    installed: Installed, form: str
) -> None:
    """Python would make a __pycache__ that everybody may write."""
    installed.hooks.chmod(0o755)
    for _ in range(2):
        assert installed.delivers(form, umask=0) == b""
        assert not open_to_others(installed.cache)
        assert not open_to_others(installed.bytecode)


def test_a_directory_that_others_share_may_stay_so(installed: Installed) -> None:
    """Where a group may write the script itself, it may write the bytecode."""
    for path in (installed.hooks, installed.cache):
        path.mkdir(exist_ok=True)
        path.chmod(0o775)
    for _ in range(2):
        assert installed.delivers("imported") == b""
    assert stat.S_IMODE(installed.cache.stat().st_mode) == 0o775


@each_form
def test_a_home_with_spaces(
    tmp_path: pathlib.Path, receiver: Receiver, form: str
) -> None:
    """Blanks, quotes and a dollar in the path of HOME are a part of it."""
    home = Home(tmp_path / "J. O'Hara's $HOME  (new)")
    installed = Installed(home, receiver)
    installed.put()
    try:
        for _ in range(2):
            assert installed.delivers(form) == b""
    finally:
        home.end()
    assert installed.bytecode.exists()


@pytest.mark.parametrize("kind", ["nothing", "a file", "an empty directory"])
@each_form
def test_without_the_script_nothing_of_the_project_runs(
    installed: Installed, form: str, kind: str
) -> None:
    """Where the hooks directory or the script is gone, the command ends without a
    veto, and the project's own telemhq_ping.py is not taken for it."""
    make_hostile(installed.home.project, "telemhq_ping")
    shutil.rmtree(installed.hooks)
    if kind == "a file":
        installed.hooks.write_text("mine")
    elif kind == "an empty directory":
        installed.hooks.mkdir()
    done = installed.run(form)
    assert done.stdout == b""
    assert (done.returncode == 0) == (form == "imported")
    assert not installed.hit.exists()
    assert not installed.receiver.requests


def test_without_python_nothing_is_blocked(installed: Installed) -> None:
    """A PATH without python3, as a desktop application may have: exit 0."""
    done = installed.run("imported", PATH=str(installed.home.path))
    assert (done.returncode, done.stdout) == (0, b"")


@each_form
def test_without_a_url_only_bytecode_is_written(
    installed: Installed, form: str
) -> None:
    """The hook that does nothing writes nothing but what Python caches."""
    before = set(installed.home.path.rglob("*"))
    assert outcome(installed.run(form, TELEMHQ_PING_URL="")) == SILENT
    new = set(installed.home.path.rglob("*")) - before
    assert new <= {installed.cache, installed.bytecode}


@pytest.mark.parametrize("python", pythons())
def test_a_script_named_by_a_relative_path_is_found_by_its_senders(
    home: Home, receiver: Receiver, python: str
) -> None:
    """`cd hooks && python3 telemhq_ping.py`: the hook leaves its directory before it
    starts a sender, and 3.8 tells a script by the path that it was given."""
    hooks = home.path / "hooks"
    hooks.mkdir()
    shutil.copy(str(SCRIPT), str(hooks))
    done = subprocess.run(
        [python, "-I", "-S", SCRIPT.name],
        input=STOP,
        capture_output=True,
        env=home.env(receiver.url),
        cwd=str(hooks),
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert len(receiver.wait_for(1)) == 1
    home.quiet()
