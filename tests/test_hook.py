"""The black box: the hook as Claude Code runs it, under every Python there is."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, Callable, Iterable, Iterator, cast

import pytest

from support import (
    SCRIPT,
    TOKEN,
    Home,
    Receiver,
    Wire,
    as_script,
    dead_url,
    event,
    hook_command,
    need_cpython,
    patched,
    place,
    pythons,
    run_sender,
    script_command,
    sender_command,
    wait_until,
)

SILENT = (0, b"", b"")
STOP = json.dumps(event("Stop")).encode()
NOWHERE = "http://127.0.0.1:9/ping/" + TOKEN  # nothing is sent in these tests
LINUX = sys.platform.startswith("linux")
linux_only = pytest.mark.skipif(not LINUX, reason="reads /proc")


if TYPE_CHECKING:
    Outcome = tuple[int, bytes, bytes]

    class Piped(subprocess.Popen[bytes]):
        """A process all whose three streams are pipes."""

        stdin: IO[bytes]
        stdout: IO[bytes]
        stderr: IO[bytes]


def outcome(done: subprocess.CompletedProcess[bytes]) -> Outcome:
    """What Claude Code sees of a hook: exit status, stdout, stderr."""
    return done.returncode, done.stdout, done.stderr


def start(
    home: Home,
    url: str | None,
    flags: str = "-I -S",
    script: object = SCRIPT,
    **more: object,
) -> Piped:
    """Start the hook with pipes, in a session of its own; gives the Popen."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {sys.executable} {flags} {script}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=home.env(url, **more),
        cwd=str(home.project),
        start_new_session=True,
    )
    return cast("Piped", process)


def finish(process: Piped) -> int:
    """Wait for a hook's end and close its pipes; its exit status."""
    status = process.wait(30)
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    return status


class Held(Receiver):
    """A receiver that answers nobody before `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        super().__init__(lambda _: self.release.wait(60) and 200)

    def __enter__(self) -> Held:  # noqa: PYI034 - Python 3.8 has no Self
        return self

    def close(self) -> None:
        self.release.set()
        super().close()


# -- What takes its time: started first, looked at last --------------------------------


def slow_one(
    home: Home, pieces: Iterable[bytes], close: bool = False, **more: Any
) -> tuple[Outcome, float]:
    """Run a hook whose stdin gets `pieces` and stays open; (outcome, seconds)."""
    process, begun = start(home, **more), time.monotonic()
    for piece in pieces:
        process.stdin.write(piece)
        process.stdin.flush()
    if close:
        process.stdin.close()
    process.wait(60)
    took = time.monotonic() - begun
    found = process.returncode, process.stdout.read(), process.stderr.read()
    finish(process)
    return found, took


class Slow:
    """The runs that wait for 5 or 8 seconds, all at once and beside the other tests."""

    def __init__(self, new_home: Callable[[str], pathlib.Path]) -> None:
        self.found: dict[str, tuple[Outcome, float]] = {}
        self.threads: dict[str, threading.Thread] = {}
        self.homes: list[Home] = []
        self.new_home, self.server, self.held = new_home, Receiver(), Held()
        self.silent = Wire(lambda _: self.silent.over.wait(60))
        self.busy = self.home()
        self.busy.hook(STOP, self.held.url)  # its sender has the lock until the end
        self.held.wait_for(1)

    def home(self) -> Home:
        self.homes.append(Home(self.new_home("slow") / "home"))
        return self.homes[-1]

    def begin(
        self,
        name: str,
        home: Home,
        url: str | None,
        pieces: Iterable[bytes],
        **more: Any,
    ) -> None:
        def run() -> None:
            self.found[name] = slow_one(home, pieces, url=url, **more)

        self.threads[name] = threading.Thread(target=run)
        self.threads[name].start()

    def __call__(self, name: str) -> tuple[Outcome, float]:
        """(outcome, seconds) of the run `name`, as soon as it is over."""
        self.threads[name].join(60)
        return self.found[name]

    def end(self) -> None:
        for thread in self.threads.values():
            thread.join(60)
        self.held.close()
        for home in self.homes:
            home.end()
        self.server.close()
        self.silent.__exit__()


@pytest.fixture(scope="module", autouse=True)
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    """The slow runs: started before the first test, looked at by the last ones."""
    found = Slow(tmp_path_factory.mktemp)
    found.begin("nothing", found.home(), found.server.url, [])
    found.begin("half", found.home(), found.server.url, [STOP[: len(STOP) // 2]])
    found.begin("whole", found.home(), found.server.url, [STOP])
    found.begin("no url", found.home(), None, [STOP])
    more = {"TELEMHQ_FOREGROUND": "1", "TELEMHQ_TIMEOUT": "30"}
    found.begin("silent", found.home(), found.silent.url, [STOP], close=True, **more)
    found.begin("silent and open", found.home(), found.silent.url, [STOP], **more)
    for name, variable in (
        ("busy", "TELEMHQ_FOREGROUND"),
        ("told", "TELEMHQ_HOOK_DEBUG"),
    ):
        more = {variable: "1"}
        found.begin(name, found.busy, found.held.url, [STOP], close=True, **more)
    yield found
    found.end()


# -- Every Python ----------------------------------------------------------------------


def short(value: object) -> str:
    """A test's id: of a path, the part that tells the Python's version."""
    return str(value).split("/versions/")[-1].split("/")[0] or "empty"


every_python = pytest.mark.parametrize("python", pythons(), ids=short)


def test_some_pythons_were_found() -> None:
    """The running Python is among those that the black-box tests use."""
    assert os.path.realpath(sys.executable) in map(os.path.realpath, pythons())


@every_python
def test_an_event_is_delivered_in_the_background(
    home: Home, receiver: Receiver, python: str
) -> None:
    """Exit 0, silence; a moment later the ping arrives, once; the outbox is empty."""
    for name in ("Stop", "PostToolUseFailure-Bash"):
        assert outcome(home.hook(event(name), receiver.url, python=python)) == SILENT
    receiver.wait_for(2)
    home.quiet()
    assert home.waiting() == []
    assert len(receiver.requests) == 2
    first, second = sorted(receiver.pings, key=lambda ping: ping["timestamp"])
    assert (first["event"], first["status"], first["project"]) == (
        "Stop",
        "success",
        "api",
    )
    assert (second["error"], second["exit_code"]) == ("tool_error", 3)
    request = receiver.requests[0]
    assert (request.method, request.path) == ("POST", "/ping/" + TOKEN)
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Idempotency-Key"] == request.ping["event_id"]


@every_python
def test_an_event_waits_on_disk_while_the_tracker_is_away(
    home: Home, python: str
) -> None:
    """It is on disk before the hook exits, and arrives when the tracker is back."""
    url = dead_url()
    for _ in range(2):
        assert outcome(home.hook(STOP, url, python=python)) == SILENT
    assert len(home.waiting()) == 2
    wait_until(lambda: home.state_json().get("failures"))
    home.end()
    home.set_state()
    with Receiver(port=int(url.split(":")[2].split("/")[0])) as receiver:
        assert outcome(home.hook(STOP, url, python=python)) == SILENT
        assert len({ping["event_id"] for ping in receiver.wait_for(3)}) == 3
        home.quiet()
    assert home.waiting() == []


@every_python
def test_foreground_and_debug_deliver_before_they_exit(
    home: Home, receiver: Receiver, python: str
) -> None:
    """TELEMHQ_FOREGROUND=1, TELEMHQ_HOOK_DEBUG=1: delivered, no process left."""
    env: dict[str, Any] = {"TELEMHQ_FOREGROUND": "1"}
    assert outcome(home.hook(STOP, receiver.url, python=python, **env)) == SILENT
    assert len(receiver.pings) == 1
    assert home.processes() == []
    env = {"TELEMHQ_HOOK_DEBUG": "1"}
    done = home.hook(STOP, receiver.url, python=python, **env)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"HTTP 200" in done.stderr
    assert len(receiver.pings) == 2
    assert home.processes() == []


NASTY = {  # stdin: whether a ping can be made of it
    "empty": (b"", False),
    "blank": (b" \n\t ", False),
    "text": (b"hello", False),
    "half": (b'{"hook_event_name": "Stop", "pro', False),
    "open string": (b'{"prompt": "', False),
    "bad escape": (b'{"prompt": "\\x"}', False),
    "colon": (b'{"hook_event_name": "Stop",, }', False),
    "list": (b'[{"hook_event_name": "Stop"}]', False),
    "string": (b'"Stop"', False),
    "number": (b"5", False),
    "null": (b"null", False),
    "NULs": (b"\0" * 5000, False),
    "binary": (bytes(range(256)) * 20, False),
    "deep": (b'{"a":' + b"[" * 200000, False),
    "deep and whole": (b"[" * 200000 + b"]" * 200000, False),
    "empty object": (b"{}", True),
    "BOM": (b"\xef\xbb\xbf" + STOP, True),
    "newlines": (b"\r\n" + STOP + b"\r\n", True),
    "lone surrogates": (
        STOP[:-1] + b', "prompt": "\\ud800", "cwd": "/x/\\udfff"}',
        True,
    ),
    "not UTF-8": (STOP[:-1] + b', "prompt": "\xff\xfe\x80", "cwd": "/x/\xff"}', True),
    "NaN": (STOP[:-1] + b', "duration_ms": NaN, "a": Infinity}', True),
    "huge integer": (STOP[:-1] + b', "duration_ms": ' + b"9" * 100000 + b"}", True),
    "wrong types": (b'{"hook_event_name": [], "cwd": 5, "session_id": {}}', True),
    "control characters": (STOP[:-1] + b', "prompt": "a\x01\nb\0"}', True),
    "twice": (STOP[:-1] + b', "cwd": "/a", "cwd": "/b"}', True),
}


@every_python
def test_nothing_on_stdin_makes_the_hook_fail_or_talk(home: Home, python: str) -> None:
    """Empty, torn, binary, deep, not UTF-8: exit 0, silence; a ping if possible."""
    home.hook(STOP, NOWHERE)
    home.set_state(set_at=time.time() - 1, not_before=time.time() + 900)
    others = ("open string", "deep", "binary", "BOM", "lone surrogates", "huge integer")
    for name in NASTY if python == sys.executable else others:
        raw, good = NASTY[name]
        before = len(home.waiting())
        assert outcome(home.hook(raw, NOWHERE, python=python)) == SILENT, name
        assert len(home.waiting()) - before == good, name
    for path in home.waiting():
        ping = json.loads(path.read_text("ascii"))["ping"]
        assert ping["status"] == "success"
        assert None not in ping.values()
    assert home.processes() == []


def test_only_a_sender_looks_for_garbage(home: Home, receiver: Receiver) -> None:
    """A hook ends before there is any worth it; a sender may live for a minute."""
    tell = "lambda *_, **__: os.write(2, str(__import__('gc').isenabled()).encode())"
    done = patched(home, f"os.posix_spawn = {tell}", sent=STOP, url=receiver.url)
    assert done.stderr == b"False"
    done = patched(home, f"os.nice = {tell}", "detached", "-1", url=receiver.url)
    assert done.stderr == b"True"
    assert len(receiver.requests) == 1


@every_python
def test_no_expensive_module_is_imported_in_the_hook(home: Home, python: str) -> None:
    """The hook itself imports neither urllib, json, hashlib, re nor subprocess."""
    need_cpython(python)
    home.hook(STOP, NOWHERE)
    home.set_state(set_at=time.time() - 1, not_before=time.time() + 900)
    for waits in (True, False):  # without and with the start of a sender
        if not waits:
            home.set_state()
        done = home.hook(STOP, NOWHERE, python=python + " -X importtime")
        assert done.returncode == 0
        assert done.stdout == b""
        lines = done.stderr.decode().splitlines()
        assert all(line.startswith("import time:") for line in lines)
        names = {line.split("|")[2].strip().split(".")[0] for line in lines}
        assert "os" in names
        costly = {
            "select",
            "urllib",
            "json",
            "hashlib",
            "re",
            "subprocess",
            "ssl",
            "socket",
            "http",
            "threading",
            "tempfile",
            "pathlib",
            "typing",
            "dataclasses",
            "argparse",
            "datetime",
            "random",
            "email",
            "shutil",
            "logging",
            "_hashlib",
            "hmac",
        }
        assert names & costly == set()
    home.end()


@pytest.mark.parametrize("python", pythons(7, 8) or [None], ids=short)
@pytest.mark.parametrize("imported", [True, False], ids=("imported", "script"))
def test_python_3_7_does_nothing_and_is_silent(
    home: Home, python: str | None, imported: bool
) -> None:
    """Where `python3` is 3.7, Claude Code does not notice that either."""
    if python is None:
        pytest.skip("no CPython 3.7 here")
    done = home.hook(STOP, NOWHERE, python=python, imported=imported)
    assert outcome(done) == SILENT
    assert not home.state.exists()


@pytest.mark.parametrize("python", pythons(6, 7) or [None], ids=short)
def test_with_python_3_6_the_whole_command_exits_0(
    home: Home, python: str | None
) -> None:
    """3.6 cannot compile the script, and says so; but nothing is blocked."""
    if python is None:
        pytest.skip("no CPython 3.6 here")
    start = "import telemhq_ping as t; t.hook()"
    imported = f"cd '{SCRIPT.parent}' && {python} -ESc '{start}'"
    done = subprocess.run(
        ["/bin/sh", "-c", f"{imported} || {python} -I -S '{SCRIPT}' || true"],
        input=STOP,
        capture_output=True,
        env=home.env(NOWHERE),
        cwd=str(home.project),
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, b"")
    assert not home.state.exists()


@pytest.mark.parametrize(
    "lacking",
    ["os.posix_spawn", "gc.set_threshold", "time.tzset", "signal.alarm"],
)
def test_what_other_pythons_lack_is_done_without(
    home: Home, receiver: Receiver, lacking: str
) -> None:
    """PyPy and Termux have no posix_spawn, PyPy no gc.set_threshold: both the hook and
    the sender do their work."""
    module, name = lacking.split(".")
    patch = f"import {module}\nif hasattr({module}, {name!r}): del {lacking}"
    done = patched(home, patch, url=receiver.url, sent=STOP)
    assert outcome(done) == SILENT
    receiver.wait_for(1)
    home.quiet()
    place(home, receiver.url)
    done = run_sender(home, receiver.url, patch)
    assert outcome(done) == SILENT
    assert len(receiver.requests) == 2
    assert home.waiting() == []


# -- stdin -----------------------------------------------------------------------------


def test_an_event_of_100_mb_is_a_ping(home: Home) -> None:
    """A huge event is read to its end; its ping is as small as any."""
    raw = STOP[:-1] + b', "tool_response": "' + b"x" * (100 << 20) + b'"}'
    assert outcome(home.hook(raw, NOWHERE, timeout=60)) == SILENT
    (path,) = home.waiting()
    assert path.stat().st_size < 4096
    assert json.loads(path.read_text("ascii"))["ping"]["event_bytes"] == len(raw)


@pytest.mark.parametrize("url", [None, "", "telemhq.com/ping/x", NOWHERE])
def test_stdin_is_read_to_its_end(home: Home, url: str | None) -> None:
    """An early close would show the user an EPIPE error, whatever there is to do."""
    process = start(home, url)
    for _ in range(40):
        process.stdin.write(b" " * 100000)
        time.sleep(0.001)
    process.stdin.close()  # BrokenPipeError, were the hook gone
    assert process.stdout.read() + process.stderr.read() == b""
    assert finish(process) == 0


def test_an_event_in_small_pieces_is_one_event(home: Home) -> None:
    """A parent that writes slowly is waited for."""
    process = start(home, NOWHERE)
    for byte in range(0, len(STOP), 40):
        process.stdin.write(STOP[byte : byte + 40])
        process.stdin.flush()
        time.sleep(0.01)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 0
    assert len(home.waiting()) == 1


# -- Closed descriptors ----------------------------------------------------------------


@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize(
    "closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- 2>&-", "<&- >&-", "<&- >&- 2>&-"]
)
def test_closed_descriptors_are_survived(
    home: Home, receiver: Receiver, closed: str, debug: str
) -> None:
    """stdin, stdout or stderr closed by the parent: exit 0, and the ping arrives."""
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} -I -S {SCRIPT} {closed}"],
        input=STOP,
        capture_output=True,
        timeout=30,
        env=home.env(receiver.url, TELEMHQ_HOOK_DEBUG=debug),
        cwd=str(home.project),
    )
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"" or (debug and "2>&-" not in closed)
    if "<&-" not in closed:
        assert len(receiver.wait_for(1)) == 1
        home.quiet()
    for path in home.state.rglob("*"):
        assert path.is_dir() or b"TelemHQ hook" not in path.read_bytes()


def test_a_stderr_that_nobody_reads_loses_no_ping(
    home: Home, receiver: Receiver
) -> None:
    """In debug mode a broken stderr is no reason to fail, and not to drop the ping."""
    process = start(home, receiver.url, TELEMHQ_HOOK_DEBUG="1", TELEMHQ_MACHINE="a b")
    process.stderr.close()
    process.stdout.close()
    process.stdin.write(STOP)
    process.stdin.close()
    assert process.wait(30) == 0
    assert len(home.waiting()) + len(receiver.pings) == 1


def test_a_full_stderr_pipe_does_not_matter_in_hook_mode(
    home: Home, receiver: Receiver
) -> None:
    """Claude Code's pipes may be unread: the hook has nothing to say."""
    process = start(home, receiver.url)
    process.stdin.write(STOP)
    process.stdin.close()
    assert process.wait(30) == 0
    assert receiver.wait_for(1)
    assert process.stdout.read() + process.stderr.read() == b""
    assert finish(process) == 0


# -- The sender is nobody's child ------------------------------------------------------


@pytest.mark.parametrize("pipe", ["stdout", "stderr"])
def test_the_hooks_pipes_end_while_the_sender_still_works(
    home: Home, pipe: str
) -> None:
    """Claude Code waits for the end of the hook's pipes: the sender holds none."""
    with Held() as held:
        process = start(home, held.url)
        process.stdin.write(STOP)
        process.stdin.close()
        held.wait_for(1)  # the sender is at work, and will be until we release it
        end = getattr(process, pipe)
        assert select.select([end], [], [], 20)[0]
        assert end.read() == b""
        assert finish(process) == 0
        if LINUX:
            assert len(home.processes()) == 1


def test_an_inherited_descriptor_is_not_handed_on(home: Home) -> None:
    """Whatever descriptors the hook was born with, the sender has none of them."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    with Held() as held:
        process = subprocess.Popen(
            hook_command(),
            stdin=subprocess.PIPE,
            env=home.env(held.url),
            cwd=str(home.project),
            pass_fds=[write],
        )
        os.close(write)
        process.communicate(STOP, 30)
        held.wait_for(1)
        assert select.select([read], [], [], 20)[0]
        assert os.read(read, 1) == b""
        os.close(read)


@linux_only
def test_the_sender_has_left_the_hooks_family_and_place(home: Home) -> None:
    """Own session and parent, cwd outside the project, devnull on 0-2, the lock."""
    with Held() as held:
        process = start(home, held.url)
        process.communicate(STOP, 30)
        held.wait_for(1)
        (pid,) = home.processes()
        assert os.getsid(pid) == pid != os.getsid(0)
        with open(f"/proc/{pid}/stat") as file:
            parent = int(file.read().rsplit(") ", 1)[1].split()[1])
        assert parent not in (process.pid, os.getpid())
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        found = {}
        for fd in os.listdir(f"/proc/{pid}/fd"):
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
        assert [found.pop(fd) for fd in (0, 1, 2)] == ["/dev/null"] * 3
        files = [path for path in found.values() if not path.startswith("socket:")]
        files = [path for path in files if ".so" not in path]  # PyPy opens one
        assert files == [str(home.destination() / "lock")]
        line = pathlib.Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
        assert os.fsencode(str(SCRIPT.parent)) in line
        assert os.fsencode(SCRIPT.stem) in line  # so that `ps` shows what it is
        assert b"-I" in line
        assert b"-S" in line


def test_a_killed_process_group_does_not_take_the_sender_along(home: Home) -> None:
    """killpg of the hook's group, as on a timeout: that very sender delivers."""
    with Held() as held:
        process = start(home, held.url)
        process.stdin.write(STOP)
        process.stdin.close()
        held.wait_for(1)
        with contextlib.suppress(ProcessLookupError):  # it had ended: an empty group
            os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        held.release.set()
        wait_until(lambda: home.waiting() == [])
        home.quiet()
        assert len(held.requests) == 1


def descendants(pid: int) -> list[int]:
    """The ids of a process's children, and theirs, by parent id (Linux)."""
    parents: dict[int, list[str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    text = file.read()
            except OSError:
                continue
            parents.setdefault(int(text.rsplit(") ", 1)[1].split()[1]), []).append(
                entry
            )
    found: list[int] = []
    todo = [pid]
    while todo:
        children = [int(child) for child in parents.get(todo.pop(), [])]
        found, todo = found + children, todo + children
    return found


@linux_only
def test_a_hook_killed_with_all_its_descendants_loses_nothing(
    home: Home, receiver: Receiver
) -> None:
    """Claude Code kills the group and all children: what was committed is delivered."""
    committed: set[str] = set()
    for delay_ms in (5, 15, 20, 25, 30, 35, 40, 50, 60, 80):
        process = start(home, receiver.url)
        process.stdin.write(STOP)
        process.stdin.close()
        time.sleep(delay_ms / 1000)
        victims = descendants(process.pid)
        for pid in [process.pid, *victims]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        finish(process)
        if home.state.exists():
            committed |= {path.stem[21:] for path in home.waiting()}
    assert outcome(home.hook(STOP, receiver.url)) == SILENT
    wait_until(lambda: not home.waiting(), 30)
    assert committed < {ping["event_id"] for ping in receiver.pings}


@linux_only
def test_a_hook_stopped_as_soon_as_its_ping_is_on_disk_loses_nothing(
    home: Home, receiver: Receiver
) -> None:
    """SIGKILL at the first sight of the file, sender or not: the next hook delivers."""
    committed: set[str] = set()
    for _ in range(4):
        process = start(home, receiver.url)
        process.stdin.write(STOP)
        process.stdin.close()
        seen = len(committed)
        while process.poll() is None and len(committed) == seen:
            if home.state.exists():
                committed |= {path.stem[21:] for path in home.waiting()}
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        finish(process)
    assert committed
    assert outcome(home.hook(STOP, receiver.url)) == SILENT
    wait_until(lambda: not home.waiting(), 30)
    assert committed < {ping["event_id"] for ping in receiver.pings}


# -- A hostile project -----------------------------------------------------------------

HOSTILE = """
import os
with open(os.environ["HIT"], "a") as file:
    file.write(__name__ + chr(10))
"""
MODULES = (
    "json",
    "_json",
    "hashlib",
    "_sha2",
    "_sha256",
    "hmac",
    "select",
    "fcntl",
    "stat",
    "time",
    "threading",
    "random",
    "ssl",
    "socket",
    "urllib",
    "http",
    "email",
    "datetime",
    "subprocess",
    "typing",
    "re",
    "queue",
    "contextlib",
    "string",
    "tempfile",
    "base64",
)


def make_hostile(directory: pathlib.Path, names: Iterable[str]) -> None:
    """Modules that report that they were imported, then go on as if they were empty."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / (name + ".py")).write_text(HOSTILE)


@pytest.mark.parametrize("variable", ["", "TELEMHQ_FOREGROUND", "TELEMHQ_HOOK_DEBUG"])
def test_the_projects_modules_and_pythons_variables_are_ignored(
    home: Home, receiver: Receiver, variable: str
) -> None:
    """json.py in the project, hostile PYTHONPATH and PYTHONSTARTUP: not imported."""
    more = ("os", "sitecustomize", "usercustomize", "encodings", "startup")
    make_hostile(home.project, MODULES + more)
    make_hostile(home.path / "evil", MODULES + more)
    env: dict[str, Any] = {
        "PYTHONPATH": "{}:.:{}".format(home.path / "evil", home.project),
        "PYTHONSTARTUP": str(home.path / "evil" / "startup.py"),
        "PYTHONHOME": str(home.path / "evil"),
        "PYTHONINSPECT": "1",
        "PYTHONUSERBASE": str(home.path / "evil"),
        "PYTHONWARNINGS": "always",
        "PYTHONVERBOSE": "1",
        "PYTHONDEBUG": "1",
        "HIT": str(home.path / "hit"),
    }
    if variable:
        env[variable] = "1"
    done = home.hook(STOP, receiver.url, **env)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"" or variable == "TELEMHQ_HOOK_DEBUG"
    assert len(receiver.wait_for(1)) == 1
    home.quiet()
    assert not (home.path / "hit").exists()
    assert not list(home.project.rglob("*.pyc"))


@pytest.mark.parametrize(
    "python, foreground",
    [(path, "1") for path in pythons()] + [(sys.executable, "0")],
    ids=short,
)
def test_telemhqs_own_command_ignores_what_lies_beside_the_script(
    home: Home, receiver: Receiver, python: str, foreground: str
) -> None:
    """Run without -I, a json.py beside the script or in the project is not json."""
    hooks = home.path / "hooks"
    make_hostile(hooks, MODULES)
    make_hostile(home.project, MODULES)
    shutil.copy(str(SCRIPT), str(hooks))
    done = subprocess.run(
        [python, str(hooks / SCRIPT.name)],
        input=STOP,
        capture_output=True,
        cwd=str(home.project),
        timeout=30,
        env=home.env(
            receiver.url, TELEMHQ_FOREGROUND=foreground, HIT=home.path / "hit"
        ),
    )
    assert outcome(done) == SILENT
    receiver.wait_for(1)
    home.quiet()
    assert not (home.path / "hit").exists()


def test_a_hostile_module_would_be_noticed(home: Home) -> None:
    """The counter-example: a plain Python run there imports the project's json."""
    make_hostile(home.project, ["json"])
    subprocess.run(
        [sys.executable, "-c", "import json"],
        cwd=str(home.project),
        check=True,
        env=home.env(HIT=home.path / "hit"),
        timeout=30,
    )
    assert (home.path / "hit").read_text() == "json\n"


def test_a_project_that_was_deleted_is_no_error(home: Home, receiver: Receiver) -> None:
    """A hook whose cwd is gone delivers all the same."""
    gone = home.path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["/bin/sh", "-c", f'rmdir "$PWD"; exec {sys.executable} -I -S {SCRIPT}'],
        input=STOP,
        capture_output=True,
        cwd=str(gone),
        env=home.env(receiver.url),
        timeout=30,
    )
    assert outcome(done) == SILENT
    assert receiver.wait_for(1)


# -- No URL ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, python",
    [(None, path) for path in pythons()]
    + [("", sys.executable), ("x y", sys.executable)],
    ids=short,
)
def test_without_a_url_the_hook_does_nothing(
    home: Home, url: str | None, python: str
) -> None:
    """TELEMHQ_PING_URL unset, empty or invalid: exit 0, silence, nothing written."""
    before = set(home.path.rglob("*"))
    assert outcome(home.hook(STOP, url, python=python)) == SILENT
    assert set(home.path.rglob("*")) == before
    assert home.processes() == []


def test_a_project_can_switch_it_off(home: Home, receiver: Receiver) -> None:
    """An empty TELEMHQ_PING_URL, as a project may set it, is the off switch."""
    assert outcome(home.hook(STOP, receiver.url)) == SILENT
    receiver.wait_for(1)
    home.quiet()
    assert outcome(home.hook(STOP, "")) == SILENT
    assert home.waiting() == []
    assert len(receiver.requests) == 1


# -- Debug mode ------------------------------------------------------------------------


def debug(home: Home, url: str | None, sent: bytes = STOP, **more: Any) -> list[str]:
    """The lines that debug mode prints."""
    done = home.hook(sent, url, TELEMHQ_HOOK_DEBUG="1", **more)
    assert (done.returncode, done.stdout) == (0, b"")
    text = done.stderr.decode()
    assert TOKEN not in text
    assert "/ping" not in text
    assert "CANARY" not in text
    assert text.endswith("\n")
    return text.splitlines()


def test_debug_mode_tells_where_the_ping_went_and_what_came_of_it(
    home: Home, receiver: Receiver
) -> None:
    """Event and id, scheme and host, status and time, and no more of the URL."""
    lines = debug(home, receiver.url)
    (ping,) = receiver.pings
    assert all(line.startswith("TelemHQ hook") for line in lines)
    (line,) = [line for line in lines if "HTTP 200" in line]
    for part in ("Stop", ping["event_id"], "http://127.0.0.1", " ms"):
        assert part in line, part
    assert re.search(r"\b\d+ ms\b", line)


@pytest.mark.parametrize("status", [500, 429, 401, 302, 400])
def test_debug_mode_tells_what_a_server_answered(
    home: Home, receiver: Receiver, status: int
) -> None:
    """A failed attempt is told with its status. The ping is kept: nothing else was
    delivered that would put the blame on it."""
    receiver.answer = status
    lines = debug(home, receiver.url)
    assert [line for line in lines if f"HTTP {status}" in line]
    assert len(home.waiting()) == 1
    assert len(receiver.requests) == 1
    assert home.processes() == []


def test_debug_mode_tells_that_nobody_answered(home: Home) -> None:
    """A dead tracker: exit 0, a line that says so, and the ping waits."""
    lines = debug(home, dead_url())
    assert [line for line in lines if "refused" in line.lower()]
    assert len(home.waiting()) == 1
    assert home.processes() == []


def test_debug_mode_ignores_a_back_off_once_and_says_so(
    home: Home, receiver: Receiver
) -> None:
    """One attempt in spite of a standing back-off, and a line about it."""
    receiver.answer = 500
    debug(home, receiver.url)
    receiver.answer = 200
    home.set_state(failures=3, set_at=time.time() - 1, not_before=time.time() + 900)
    lines = debug(home, receiver.url)
    assert [line for line in lines if "back-off" in line]
    assert len(receiver.requests) == 3
    assert home.waiting() == []


@pytest.mark.parametrize(
    "url, sent, words",
    [
        (None, STOP, "TELEMHQ_PING_URL"),
        ("", STOP, "TELEMHQ_PING_URL"),
        ("telemhq.com/ping/" + TOKEN, STOP, "https://"),
        ("http://telemhq.com/ping/" + TOKEN, STOP, "TELEMHQ_ALLOW_HTTP"),
        (NOWHERE, b"", "JSON"),
        (NOWHERE, b"hello CANARY", "JSON"),
        (NOWHERE, b'{"prompt": "CANARY', "JSON"),
        (NOWHERE, b'["CANARY"]', "JSON"),
        (NOWHERE, b"[" * 200000, "JSON"),
    ],
)
def test_debug_mode_says_why_it_was_skipped(
    home: Home, url: str | None, sent: bytes, words: str
) -> None:
    """`TelemHQ hook skipped: <reason, and what to do about it>`, a line, exit 0."""
    (line,) = debug(home, url, sent)
    assert line.startswith("TelemHQ hook skipped: ")
    assert words in line


def test_debug_mode_names_what_it_ignores(home: Home, receiver: Receiver) -> None:
    """A variable that makes no sense is named on a line of its own."""
    lines = debug(home, receiver.url, TELEMHQ_TIMEOUT="soon", TELEMHQ_MACHINE="a b")
    for name in ("TELEMHQ_TIMEOUT", "TELEMHQ_MACHINE"):
        assert len([line for line in lines if name in line and "ignored" in line]) == 1
    assert len(receiver.pings) == 1


# -- As a plugin -----------------------------------------------------------------------

EXAMPLE = json.loads((SCRIPT.parent / "settings.example.json").read_text("utf-8"))
TELEMHQS = {
    "hooks": {
        "Stop": [
            {
                "hooks": [
                    {
                        "type": "command",
                        "command": "python3 ~/.claude/hooks/telemhq_ping.py",
                    }
                ]
            }
        ]
    }
}
OTHERS = json.loads(
    json.dumps(TELEMHQS).replace("telemhq_ping.py", "my_telemhq_ping.py")
)


def settings_of(home: Home, name: str) -> pathlib.Path:
    """The path of a settings file: the user's, or one of the project's."""
    top = home.path if name == "user" else home.project
    file = "settings.local.json" if name == "local" else "settings.json"
    (top / ".claude").mkdir(parents=True, exist_ok=True)
    return top / ".claude" / file


def as_plugin(home: Home, url: str, name: str = "Stop", **more: Any) -> None:
    """Run the hook as the plugin does, with the variable set for everybody."""
    env: dict[str, Any] = {
        "CLAUDE_PLUGIN_ROOT": SCRIPT.parent,
        "CLAUDE_PROJECT_DIR": home.project,
        "TELEMHQ_FOREGROUND": "1",
        **more,
    }
    assert outcome(home.hook(event(name), url, **env)) == SILENT


IMPORTED = json.loads(
    json.dumps(TELEMHQS).replace(
        "python3 ~/.claude/hooks/telemhq_ping.py",
        "cd ~/.claude/hooks && python3 -c 'import telemhq_ping as t; t.hook()'",
    )
)


@pytest.mark.parametrize(
    "content",
    [EXAMPLE, TELEMHQS, IMPORTED],
    ids=("the example", "TelemHQ's", "imported only"),
)
@pytest.mark.parametrize("link", [False, True], ids=("file", "link"))
@pytest.mark.parametrize("name", ["user", "project", "local"])
def test_a_plugin_leaves_the_event_to_the_settings(
    home: Home, receiver: Receiver, name: str, link: bool, content: object
) -> None:
    """Where a settings file, be it a link into somebody's dotfiles, runs the script for
    the same event, the plugin makes no second ping of it; of others it does."""
    path = settings_of(home, name)
    if link:
        (home.path / "dotfiles").mkdir()
        path.symlink_to(home.path / "dotfiles" / "claude.json")
    path.write_text(json.dumps(content))
    as_plugin(home, receiver.url, "Stop")
    assert receiver.requests == []
    as_plugin(home, receiver.url, "SessionStart-startup")
    assert [ping["event"] for ping in receiver.pings] == ["SessionStart"]


@pytest.mark.parametrize(
    "content",
    [
        OTHERS,
        {},
        [],
        {"hooks": []},
        {"hooks": {"Stop": None}},
        {"hooks": {"Stop": [None, {"hooks": [{"command": 5}]}]}},
        "dangling",
        "binary",
        "directory",
    ],
    ids=str,
)
def test_a_plugin_reports_what_no_settings_file_does(
    home: Home, receiver: Receiver, content: object
) -> None:
    """Somebody else's hook, or a file that makes no sense, is no reason for silence."""
    path = settings_of(home, "user")
    if content == "dangling":
        path.symlink_to(home.path / "nowhere")
    elif content == "binary":
        path.write_bytes(bytes(range(256)))
    elif content == "directory":
        path.mkdir()
    else:
        path.write_text(json.dumps(content))
    as_plugin(home, receiver.url)
    assert len(receiver.requests) == 1


def test_a_plugin_with_its_own_url_is_alone(home: Home, receiver: Receiver) -> None:
    """Without TELEMHQ_PING_URL the settings' hook sends nothing: the plugin does."""
    settings_of(home, "user").write_text(json.dumps(EXAMPLE))
    env = {"CLAUDE_PLUGIN_OPTION_PING_URL": receiver.url}
    done = subprocess.run(
        ["/bin/sh", "-c", as_script()],
        input=STOP,
        capture_output=True,
        cwd=str(home.project),
        timeout=30,
        env=home.env(CLAUDE_PLUGIN_ROOT=SCRIPT.parent, TELEMHQ_FOREGROUND="1", **env),
    )
    assert outcome(done) == SILENT
    assert len(receiver.requests) == 1


# -- Foreground ------------------------------------------------------------------------


def test_foreground_obeys_the_back_off(home: Home, receiver: Receiver) -> None:
    """While a back-off stands the ping waits: an outage does not slow a CI job."""
    receiver.answer = 503
    env: dict[str, Any] = {"TELEMHQ_FOREGROUND": "1"}
    assert outcome(home.hook(STOP, receiver.url, **env)) == SILENT
    assert outcome(home.hook(STOP, receiver.url, **env)) == SILENT
    assert len(receiver.requests) == 1
    assert len(home.waiting()) == 2
    home.set_state(failures=1, set_at=time.time() - 9, not_before=time.time() - 1)
    receiver.answer = 200
    assert outcome(home.hook(STOP, receiver.url, **env)) == SILENT
    assert len(receiver.requests) == 4
    assert home.waiting() == []
    assert home.processes() == []


# -- Started by a person ---------------------------------------------------------------


@pytest.mark.parametrize("piped", [False, True], ids=("terminal", "piped"))
def test_on_a_terminal_it_says_what_it_is(home: Home, piped: bool) -> None:
    """Started with no arguments by a person it tells its use, instead of waiting."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SCRIPT)],
        stdin=slave,
        stdout=subprocess.PIPE if piped else slave,
        stderr=subprocess.STDOUT,
        env=home.env(NOWHERE),
        cwd=str(home.project),
        start_new_session=True,
    )
    os.close(slave)
    text, source = b"", process.stdout.fileno() if process.stdout else master
    # Less than a hook would wait for stdin.
    while select.select([source], [], [], 4)[0]:
        try:
            part = os.read(source, 65536)
        except OSError:  # Linux: the terminal's other end is gone
            break
        if not part:
            break
        text += part
    status = process.poll() if text else "it waits"
    assert process.wait(30) == 0
    assert status in (0, None)
    os.close(master)
    if process.stdout:
        process.stdout.close()
    assert b"TelemHQ" in text
    assert b"TELEMHQ_PING_URL" in text
    assert not home.state.exists()


@every_python
def test_help_and_version(home: Home, script: ModuleType, python: str) -> None:
    """--version and --help answer on stdout, exit 0, and do nothing else."""
    for argument, words in (
        ("--version", script.__version__),
        ("--help", "TELEMHQ_PING_URL"),
    ):
        done = subprocess.run(
            script_command(argument, python=python),
            cwd=str(home.project),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=home.env(NOWHERE),
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert words in done.stdout.decode()
        assert done.stdout.count(b"\n") == 1 or argument == "--help"
    assert not home.state.exists()


def test_an_unknown_argument_is_an_error_of_the_commands(home: Home) -> None:
    """Bad usage exits 2 and says so on stderr, and makes no ping."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--no-such-thing"],
        input=STOP,
        capture_output=True,
        env=home.env(NOWHERE),
        cwd=str(home.project),
        timeout=30,
    )
    assert done.returncode == 2
    assert b"--no-such-thing" in done.stderr
    assert not home.state.exists()


@pytest.mark.parametrize(
    "arguments",
    [["detached"], ["detached", "x"], ["detached", "99"], ["detached", "-1"]],
)
def test_a_sender_started_by_hand_is_silent_and_exits_0(
    home: Home, receiver: Receiver, arguments: list[str]
) -> None:
    """A sender whose descriptor is nonsense takes the lock itself, or ends."""
    home.hook(STOP, dead_url(), TELEMHQ_FOREGROUND="1")
    done = subprocess.run(
        sender_command(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=home.env(receiver.url),
        cwd=str(home.project),
        timeout=30,
    )
    assert outcome(done) == SILENT


# -- What took its time ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing", "half", "whole", "no url"])
def test_a_stdin_that_is_never_closed_is_left_after_5_seconds(
    slow: Slow, name: str
) -> None:
    """Claude Code would kill the hook at 10 s: it ends before, silent, with exit 0."""
    found, took = slow(name)
    assert found == SILENT
    assert 4.5 < took < 9.5


def test_what_has_arrived_on_an_open_stdin_counts(slow: Slow) -> None:
    """Of the three, the event that was whole is a ping; the torn one is none."""
    slow("whole")
    slow.server.wait_for(1)
    assert [ping["event"] for ping in slow.server.pings] == ["Stop"]


@pytest.mark.parametrize("name", ["silent", "silent and open", "busy"])
def test_foreground_ends_after_8_seconds_in_all(slow: Slow, name: str) -> None:
    """A silent server, a busy lock, an open stdin: 8 s are the most, together."""
    found, took = slow(name)
    assert found == SILENT
    assert 2 < took < 12


def test_a_busy_lock_is_named_in_debug_mode(slow: Slow) -> None:
    """Debug mode waits for the sender at work, then says that it has the ping."""
    (status, stdout, stderr), took = slow("told")
    assert (status, stdout) == (0, b"")
    assert 2 < took < 12
    assert b"TelemHQ hook skipped: " in stderr
    assert b"sender" in stderr
    assert len(slow.busy.waiting()) == 3
