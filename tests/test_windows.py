"""The script under Windows' own Python: on Windows, or where the variable
TELEMHQ_TEST_WINDOWS_PYTHON is a command that runs one (`wine /path/of/python.exe`)."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from typing import Iterator

import pytest

from support import SCRIPT, Receiver, event, wait_until

EMULATED = shlex.split(os.environ.get("TELEMHQ_TEST_WINDOWS_PYTHON", ""))
PYTHON = EMULATED or [sys.executable]
pytestmark = pytest.mark.skipif(
    os.name != "nt" and not EMULATED,
    reason="needs Windows, or TELEMHQ_TEST_WINDOWS_PYTHON",
)
HOOK = [*PYTHON, "-ESc", "import telemhq_ping as t; t.hook()"]
SILENT = (0, b"", b"")
STOP = json.dumps(event("Stop")).encode()
TIMEOUT_S = 90  # an emulator's first start takes its time


def windows_path(path: pathlib.Path) -> str:
    """The path as Windows' Python has it; an emulator shows the root as drive Z:."""
    return "Z:" + str(path).replace("/", "\\") if EMULATED else str(path)


class Desk:
    """A user's directory with the script in its hooks, and a receiver."""

    def __init__(self, path: pathlib.Path, receiver: Receiver) -> None:
        self.path, self.receiver = path, receiver
        self.hooks, self.state = (
            path / ".claude" / "hooks",
            path / ".claude" / "telemhq",
        )
        self.temporary = path / "temporary"
        self.hooks.mkdir(parents=True)
        self.temporary.mkdir()
        shutil.copy(str(SCRIPT), str(self.hooks))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TELEMHQ_")}
        self.env.update(
            USERPROFILE=windows_path(path),
            CLAUDE_CONFIG_DIR=windows_path(path / ".claude"),
            TEMP=windows_path(self.temporary),
            TMP=windows_path(self.temporary),
            TELEMHQ_PING_URL=receiver.url,
        )

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Windows' Python, in the hooks' directory."""
        return subprocess.Popen(
            [*PYTHON, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.env,
            cwd=str(self.hooks),
        )

    def run(self, *arguments: str, sent: bytes = b"") -> tuple[int, bytes, bytes]:
        """The same to its end: exit status, stdout, stderr."""
        process = self.start(*arguments)
        out, err = process.communicate(sent, TIMEOUT_S)
        return process.returncode, out, err

    def hook(self) -> tuple[int, bytes, bytes]:
        """Run the Python part of the settings' command, on a Stop."""
        return self.run(*HOOK[len(PYTHON) :], sent=STOP)

    def files(self, pattern: str) -> list[pathlib.Path]:
        """What the one destination's directory has of that pattern."""
        return list(self.state.glob("*/" + pattern))

    def ask(self, source: str) -> str:
        """What a program prints that has the script as `t`."""
        status, out, err = self.run("-ESc", "import os, telemhq_ping as t\n" + source)
        assert (status, err) == (0, b"")
        return out.decode().strip()

    def settle(self) -> None:
        """Wait until every ping is delivered, and its sender has let go of the lock."""
        wait_until(lambda: not self.files("outbox/*"), TIMEOUT_S)
        free = "print(all(o.take_lock() for o in t.outboxes(t.Settings(os.environ)"
        free += ".state_dir)))"
        wait_until(lambda: self.ask(free) == "True", TIMEOUT_S)


@pytest.fixture
def desk(tmp_path: pathlib.Path) -> Iterator[Desk]:
    """A fresh one; its senders have ended afterwards."""
    with Receiver() as receiver:
        found = Desk(tmp_path, receiver)
        yield found
        found.settle()


def test_a_hook_delivers(desk: Desk) -> None:
    """Silent and successful; the ping arrives once, and its file is gone."""
    assert desk.hook() == SILENT
    (ping,) = desk.receiver.wait_for(1, TIMEOUT_S)
    assert (ping["event"], ping["project"]) == ("Stop", "api")
    desk.settle()
    assert len(desk.receiver.requests) == 1
    (log,) = desk.files("sender.log")
    assert b"1 of 1" in log.read_bytes()


def test_hooks_at_once(desk: Desk) -> None:
    """Each ping arrives once, and never two at a time: the lock holds."""
    begun = [desk.start(*HOOK[len(PYTHON) :]) for _ in range(4)]
    for process in begun:
        assert process.stdin
        process.stdin.write(STOP)
        process.stdin.close()
    assert [process.wait(TIMEOUT_S) for process in begun] == [0] * 4
    desk.settle()
    assert len({ping["event_id"] for ping in desk.receiver.pings}) == 4
    assert len(desk.receiver.requests) == 4
    assert desk.receiver.most_at_once == 1


def test_the_senders_log_is_rotated(desk: Desk) -> None:
    """A full sender.log is renamed, which Windows does to none that is open."""
    assert desk.hook() == SILENT
    desk.settle()
    (log,) = desk.files("sender.log")
    log.write_bytes(b"x" * (256 << 10) + b"\n")
    assert desk.hook() == SILENT
    desk.settle()
    (old,) = desk.files("sender.log.1")
    assert old.stat().st_size > 256 << 10


def test_a_stdin_that_is_never_closed(desk: Desk) -> None:
    """After 5 s what has arrived counts."""
    desk.hook()  # the first start of all
    desk.settle()
    begun = time.monotonic()
    desk.hook()
    usual = time.monotonic() - begun  # an emulator on a busy machine is slow
    begun = time.monotonic()
    process = desk.start(*HOOK[len(PYTHON) :])
    assert process.stdin
    process.stdin.write(STOP)
    process.stdin.flush()
    assert process.wait(TIMEOUT_S) == 0
    assert 4.5 < time.monotonic() - begun < 9.5 + usual
    process.communicate()
    assert len(desk.receiver.wait_for(3, TIMEOUT_S)) == 3


def test_a_file_that_someone_reads_is_replaced_a_moment_later(desk: Desk) -> None:
    """Windows refuses to replace an open file; who reads ours has soon done so."""
    source = """
import threading
t.write_file("kept", b"old")
reader = open("kept")
threading.Timer(0.15, reader.close).start()
t.write_file("kept", b"new")
print(open("kept").read())
"""
    assert desk.ask(source) == "new"


def test_a_lock_is_busy_or_free(desk: Desk) -> None:
    """Held by another it is busy; an error that says nothing of that counts as free."""
    source = """
first, second = [os.open("lock", os.O_RDWR | os.O_CREAT) for _ in range(2)]
print(t.try_lock(first), t.try_lock(second), end=" ")
t.Lock(first).release()
print(t.try_lock(second), end=" ")
import msvcrt
def locking(*_):
    raise OSError(22, "Invalid argument")
msvcrt.locking = locking
print(t.try_lock(first))
"""
    assert desk.ask(source) == "True False True True"


def test_demo_ends_well_and_leaves_nothing(desk: Desk) -> None:
    """It exits with 0, and its directory goes with it."""
    status, out, err = desk.run("telemhq_ping.py", "demo")
    assert (status, err) == (0, b"")
    assert b"StopFailure" in out
    assert list(desk.temporary.iterdir()) == []


def test_doctor_finds_all_well_after_install(desk: Desk) -> None:
    """What install writes works, and doctor says so in characters that show."""
    url = desk.receiver.url
    status, out, err = desk.run("telemhq_ping.py", "install", "--url", url)
    assert (status, err) == (0, b"")
    status, out, err = desk.run("telemhq_ping.py", "doctor")
    assert (status, err) == (0, b""), out.decode("utf-8", "replace")
    assert b"?" not in out
