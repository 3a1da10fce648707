"""The black box: the hook as Claude Code runs it, under every Python there is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from support import (
    SCRIPT,
    TOKEN,
    Home,
    Receiver,
    Wire,
    dead_url,
    event,
    hook_command,
    need_cpython,
    pythons,
    wait_until,
)

SILENT = (0, b"", b"")
STOP = json.dumps(event("Stop")).encode()
NOWHERE = "http://127.0.0.1:9/ping/" + TOKEN  # nothing is sent in these tests
LINUX = sys.platform.startswith("linux")
linux_only = pytest.mark.skipif(not LINUX, reason="reads /proc")


def outcome(done: subprocess.CompletedProcess[bytes]) -> tuple[int, bytes, bytes]:
    """What Claude Code sees of a hook: exit status, stdout, stderr."""
    return done.returncode, done.stdout, done.stderr


# -- Every Python ----------------------------------------------------------------------


every_python = pytest.mark.parametrize("python", pythons())


@every_python
def test_events_wait_on_disk_and_are_delivered_in_the_background(
    home: Home, python: str
) -> None:
    """Exit 0, silence. While the tracker is away, an event is on disk before the hook
    exits; when it is back all arrive, once, in the background; the outbox is empty."""
    url = dead_url()
    for name in ("Stop", "PostToolUseFailure-Bash"):
        assert outcome(home.hook(event(name), url, python=python)) == SILENT
    assert len(home.waiting()) == 2
    wait_until(lambda: home.state_json().get("failures"))
    home.end()
    home.set_state()
    with Receiver(port=int(url.split(":")[2].split("/")[0])) as receiver:
        assert outcome(home.hook(STOP, url, python=python)) == SILENT
        assert len({ping["event_id"] for ping in receiver.wait_for(3)}) == 3
        home.quiet()
    assert (len(receiver.requests), home.waiting()) == (3, [])


FINE = {  # stdin of which a ping can be made
    "wrong types": b'{"hook_event_name": "X", "cwd": 5, "session_id": {}}',
    "BOM": b"\xef\xbb\xbf" + STOP + b"\r\n",
    "surrogates": STOP[:-1] + b', "prompt": "\\ud800", "cwd": "/x/\\udfff"}',
    "not UTF-8": STOP[:-1] + b', "prompt": "\xff\xfe\x80", "cwd": "/x/\xff"}',
    "NaN": STOP[:-1] + b', "duration_ms": NaN, "a": Infinity}',
    "control characters": STOP[:-1] + b', "prompt": "a\x01\nb\0"}',
    "twice": STOP[:-1] + b', "cwd": "/a", "cwd": "/b"}',
}
NASTY = {  # and of which none can
    **{str(raw): raw for raw in (b"", b"hello", b"5", b"null", b"{}", b'["Stop"]')},
    "half": STOP[:99],
    "binary": bytes(range(256)) * 20,
    "deep": b'{"a":' + b"[" * 200000,
    "deep and whole": b"[" * 200000 + b"]" * 200000,
    **FINE,
}


@pytest.mark.fault(9)
@every_python
def test_nothing_on_stdin_makes_the_hook_fail_or_talk(home: Home, python: str) -> None:
    """Empty, torn, binary, deep, not UTF-8: exit 0, silence; a ping if possible."""
    home.hook(STOP, NOWHERE)
    home.set_state(set_at=time.time() - 1, not_before=time.time() + 900)
    others = ("half", "deep", "binary", "BOM", "surrogates")
    for name in NASTY if python == sys.executable else others:
        before = len(home.waiting())
        assert outcome(home.hook(NASTY[name], NOWHERE, python=python)) == SILENT, name
        assert len(home.waiting()) - before == (name in FINE), name
    for path in home.waiting():
        ping = json.loads(path.read_text("ascii"))["ping"]
        assert None not in ping.values()


COSTLY = {
    *("select", "urllib", "json", "hashlib", "re", "subprocess", "ssl", "socket"),
    *("http", "threading", "tempfile", "pathlib", "typing", "dataclasses", "argparse"),
    *("datetime", "random", "email", "shutil", "logging", "_hashlib", "hmac", "signal"),
}


@every_python
def test_no_expensive_module_is_imported_in_the_hook(home: Home, python: str) -> None:
    """Neither with nor without the start of a sender."""
    need_cpython(python)
    home.hook(STOP, NOWHERE)
    for backoff_s in (900, 0):
        now = time.time()
        home.set_state(failures=1, set_at=now - 1, not_before=now + backoff_s)
        done = home.hook(STOP, NOWHERE, python=python + " -X importtime")
        assert (done.returncode, done.stdout) == (0, b"")
        lines = done.stderr.decode().splitlines()
        names = {line.split("|")[2].strip().split(".")[0] for line in lines}
        assert "os" in names
        assert names & COSTLY == set()


@pytest.mark.parametrize("python", pythons(6, 8))
def test_an_old_python_does_nothing_and_blocks_nothing(home: Home, python: str) -> None:
    """3.7 is silent; 3.6 cannot compile the script, and says so on stderr only."""
    done = home.shell(f"{python} -I -S '{SCRIPT}' || true", STOP, NOWHERE)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"" or python == pythons(6, 8)[0]
    assert not home.state.exists()


# -- stdin, stdout, stderr -------------------------------------------------------------


@pytest.mark.fault(9, 64)
@pytest.mark.parametrize("size_mb, good", [(100, True), (300, False)])
def test_how_large_an_event_may_be(home: Home, size_mb: int, good: bool) -> None:
    """One of 100 MB is read to its end, and its ping is as small as any; beyond 256 MB
    it is none, and no more is kept."""
    head, tail = STOP[:-1] + b', "tool_response": "', b'"}'
    done = home.hook(head + b"x" * (size_mb << 20) + tail, NOWHERE, timeout=60)
    assert outcome(done) == SILENT
    assert len(home.waiting()) == good
    for path in home.waiting():
        assert path.stat().st_size < 4096
        size = json.loads(path.read_text("ascii"))["ping"]["event_bytes"]
        assert size == len(head + tail) + (size_mb << 20)


@pytest.mark.parametrize("url", [None, NOWHERE])
def test_stdin_is_read_to_its_end(home: Home, url: str | None) -> None:
    """An early close would show the user an EPIPE error, whatever there is to do; a
    parent that writes slowly is waited for."""
    process = home.start(url, bufsize=0)
    assert process.stdin
    for piece in (STOP[:40], STOP[40:], *[b" " * 100000] * 20):
        process.stdin.write(piece)  # BrokenPipeError, were the hook gone
        time.sleep(0.005)
    process.stdin.close()
    assert process.wait(30) == 0
    assert len(home.waiting()) == (url == NOWHERE)


@pytest.mark.fault(10)
@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_survived(
    home: Home, receiver: Receiver, closed: str, debug: str
) -> None:
    """stdin, stdout or stderr closed by the parent: exit 0, and the ping arrives; no
    file of ours is taken for one of them."""
    line = f"{hook_command()[2]} {closed}"
    done = home.shell(line, STOP, receiver.url, TELEMHQ_HOOK_DEBUG=debug)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"" or (debug and "2>&-" not in closed)
    if "<&-" not in closed:
        receiver.wait_for(1)
    home.quiet()
    for path in home.state.rglob("*"):
        assert path.is_dir() or b"TelemHQ hook" not in path.read_bytes()


# -- The sender is nobody's child ------------------------------------------------------


@pytest.mark.fault(11)
def test_the_hooks_pipes_end_while_the_sender_still_works(home: Home) -> None:
    """Claude Code waits for the end of the hook's pipes: the sender holds none, nor any
    other descriptor that the hook was born with."""
    with Wire(lambda _: wire.over.wait(60)) as wire:
        read, write = os.pipe()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = home.start(wire.url, pass_fds=[write], **pipes)
        os.close(write)
        assert process.communicate(STOP, 20) == (b"", b"")
        assert os.read(read, 1) == b""
        os.close(read)
        wait_until(lambda: wire.connections)  # the sender is at work, to the test's end
        assert process.returncode == 0
        assert not LINUX or len(home.processes()) == 1


@pytest.mark.fault(2, 12, 42)
@linux_only
def test_a_hook_killed_with_all_its_descendants_loses_nothing(
    home: Home, receiver: Receiver
) -> None:
    """Claude Code kills the group and all children, at any time: what was committed is
    delivered by the next hook."""
    committed: set[str] = set()
    for delay_ms in (5, 15, 20, 25, 30, 35, 40, 50, 60, 80, None, None):
        process = home.start(receiver.url)
        assert process.stdin
        process.stdin.write(STOP)
        process.stdin.close()
        if delay_ms:
            time.sleep(delay_ms / 1000)
        while not delay_ms and process.poll() is None and not home.waiting():
            pass  # at the first sight of the file, sender or not
        victims = home.processes()
        with contextlib.suppress(ProcessLookupError):  # as on a timeout
            os.killpg(process.pid, signal.SIGKILL)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(30)
        names = [path.stem for path in home.waiting()]
        committed.update(name.rpartition("-")[2] for name in names)
    assert outcome(home.hook(STOP, receiver.url)) == SILENT
    wait_until(lambda: not home.waiting(), 30)
    assert committed < {ping["event_id"] for ping in receiver.pings}


# -- Debug mode, foreground ------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 500, 429, 401, 302, 400])
def test_debug_mode_tells_where_the_ping_went_and_what_came_of_it(
    home: Home, receiver: Receiver, status: int
) -> None:
    """Event and id, scheme and host, status and time, and no more of the URL."""
    receiver.answer = status
    done = home.hook(STOP, receiver.url, TELEMHQ_HOOK_DEBUG=1)
    assert (done.returncode, done.stdout) == (0, b"")
    text = done.stderr.decode()
    assert not re.search("/ping|CANARY|" + TOKEN, text)
    assert all(line.startswith("TelemHQ hook") for line in text.splitlines())
    (ping,) = receiver.pings
    (line,) = [line for line in text.splitlines() if f"HTTP {status}" in line]
    for part in ("Stop", ping["event_id"], "http://127.0.0.1"):
        assert part in line, part
    assert re.search(r"\b\d+ ms\b", line)
    assert len(home.waiting()) == (status != 200)


NO_EVENT = b"held no event of Claude Code's"
NO_NAMES: tuple[Any, ...] = ("stop", "Évent", "", None, ["S"])


@pytest.mark.fault(84)
@pytest.mark.parametrize(
    "sent, why",
    [
        *((raw, b"is not JSON") for raw in (b"", b"[" * 200000)),
        *((event("Stop"), None), (event("Stop", hook_event_name="QuantumLeap"), None)),
        *((event("Stop", cursor_version=v), NO_EVENT) for v in ("2.1.0", None)),
        *((dict(event("Stop"), hook_event_name=n), NO_EVENT) for n in NO_NAMES),
        (b'["CANARY"]', NO_EVENT),
    ],
)
def test_debug_mode_says_why_an_event_is_none(
    home: Home, receiver: Receiver, sent: Any, why: bytes | None
) -> None:
    """`TelemHQ hook skipped: <reason, and what to do about it>`, a line, exit 0. Cursor
    runs the hooks of ~/.claude/settings.json, with events of its own: nothing is told
    of them."""
    done = home.hook(sent, receiver.url, TELEMHQ_HOOK_DEBUG=1)
    assert (done.returncode, done.stdout) == (0, b"")
    assert (b"hook skipped" in done.stderr) == (why is not None)
    if why:
        assert done.stderr == b"TelemHQ hook skipped: stdin " + why + b"\n"
    assert len(receiver.requests) == (why is None)


def test_foreground_ends_after_8_seconds_in_all(home: Home) -> None:
    """A silent server, and another's sender that has the lock: 8 s are the most. (The
    sender that was started goes on behind it.)"""
    with Wire(lambda _: wire.over.wait(60)) as wire:
        home.hook(STOP, wire.url)
        wait_until(lambda: wire.connections)
        begun = time.monotonic()
        done = home.hook(STOP, wire.url, TELEMHQ_FOREGROUND=1, TELEMHQ_TIMEOUT=30)
        assert outcome(done) == SILENT
        assert 2 < time.monotonic() - begun < 12
        assert len(home.waiting()) == 2
