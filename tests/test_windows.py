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
from typing import Iterator

import pytest

from support import SCRIPT, Receiver, event, wait_until

EMULATED = shlex.split(os.environ.get("TELEMHQ_TEST_WINDOWS_PYTHON", ""))
PYTHON = EMULATED or [sys.executable]
pytestmark = pytest.mark.skipif(
    os.name != "nt" and not EMULATED,
    reason="needs Windows, or TELEMHQ_TEST_WINDOWS_PYTHON",
)
HOOK = ("-ESc", "import telemhq_ping as t; t.hook()")
STOP = json.dumps(event("Stop")).encode()
TIMEOUT_S = 90  # an emulator's first start takes its time


def windows_path(path: pathlib.Path) -> str:
    """The path as Windows' Python has it; an emulator shows the root as drive Z:."""
    return "Z:" + str(path).replace("/", "\\") if EMULATED else str(path)


class Desk:
    """A user's directory with the script in its hooks, and a receiver."""

    def __init__(self, path: pathlib.Path, receiver: Receiver) -> None:
        self.receiver, self.temporary = receiver, path / "temporary"
        self.hooks = path / ".claude" / "hooks"
        self.state = path / ".claude" / "telemhq"
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

    def run(self, *arguments: str) -> tuple[int, bytes, bytes]:
        """The same to its end: exit status, stdout, stderr."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, out, err

    def settle(self) -> None:
        """Wait until every ping is delivered, and its sender has let go of the lock."""
        wait_until(lambda: not list(self.state.glob("*/outbox/*")), TIMEOUT_S)
        free = "import os, telemhq_ping as t\nsettings = t.Settings(os.environ)\n"
        free += "assert all(o.take_lock() for o in t.outboxes(settings.state_dir))"
        wait_until(lambda: self.run("-ESc", free)[0] == 0, TIMEOUT_S)


@pytest.fixture
def desk(tmp_path: pathlib.Path) -> Iterator[Desk]:
    """A fresh one; its senders have ended afterwards."""
    with Receiver() as receiver:
        found = Desk(tmp_path, receiver)
        yield found
        found.settle()


def test_hooks_at_once(desk: Desk) -> None:
    """Silent and successful; each ping arrives once, and never two at a time: the lock
    holds."""
    begun = [desk.start(*HOOK) for _ in range(4)]
    for process in begun:
        assert process.stdin
        process.stdin.write(STOP)
        process.stdin.close()
    assert [process.wait(TIMEOUT_S) for process in begun] == [0] * 4
    desk.settle()
    assert len({ping["event_id"] for ping in desk.receiver.pings}) == 4
    assert len(desk.receiver.requests) == 4
    assert desk.receiver.most_at_once == 1
    assert {ping["project"] for ping in desk.receiver.pings} == {"api"}


def test_a_file_that_someone_reads_is_replaced_a_moment_later(desk: Desk) -> None:
    """Windows refuses to replace an open file; who reads ours has soon done so."""
    source = """
import threading, telemhq_ping as t
t.write_file("kept", b"old")
reader = open("kept")
threading.Timer(0.15, reader.close).start()
t.write_file("kept", b"new")
print(open("kept").read(), end="")
"""
    assert desk.run("-ESc", source) == (0, b"new", b"")


def test_install_doctor_and_demo_end_well(desk: Desk) -> None:
    """What install writes works, and doctor says so in characters that show; demo's
    directory goes with it."""
    url = desk.receiver.url
    status, _, err = desk.run("telemhq_ping.py", "install", "--yes", "--url", url)
    assert (status, err) == (0, b"")
    status, out, err = desk.run("telemhq_ping.py", "doctor")
    assert (status, err) == (0, b""), out.decode("utf-8", "replace")
    assert b"?" not in out
    status, out, err = desk.run("telemhq_ping.py", "demo")
    assert (status, err) == (0, b"")
    assert b"PostToolUseFailure" in out
    assert list(desk.temporary.iterdir()) == []
