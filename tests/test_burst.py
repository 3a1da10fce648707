"""One sender for a burst of events; a busy lock that always means: it will be
delivered; and what ends a sender early."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import time

import pytest

from scenes import ids, put
from support import (
    Home,
    Receiver,
    Wire,
    event,
    hook_command,
    only_enqueue,
    read_request,
    run_sender,
    wait_until,
)

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
TOOL = event("PostToolUse-Bash")


def delivered(home: Home, receiver: Receiver, count: int) -> bool:
    """Whether so many pings have arrived, once each, and none waits."""
    found = ids(receiver)
    return len(set(found)) == len(found) == count and not home.waiting()


@pytest.mark.parametrize("last", ["Stop", "SessionEnd-other"])
def test_one_sender_serves_a_burst(home: Home, receiver: Receiver, last: str) -> None:
    """After a tool's event the sender stays, and takes what comes: the next hooks start
    no process. With a turn or a session it ends. A foreground hook in the middle does
    not wait for the lock once its ping is gone."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    (sender,) = home.processes()
    for number, name in enumerate(["PreToolUse-Bash", "PostToolUseFailure-Bash"], 2):
        home.hook(event(name), receiver.url)
        assert home.processes() == [sender]
        wait_until(lambda number=number: delivered(home, receiver, number))  # type: ignore[misc]
    begun = time.monotonic()
    home.hook(TOOL, receiver.url, TELEMHQ_FOREGROUND="1")
    assert delivered(home, receiver, 4)
    assert home.processes() == [sender]
    home.hook(event(last), receiver.url, TELEMHQ_USAGE="0")
    home.quiet()
    assert time.monotonic() - begun < 4
    assert delivered(home, receiver, 5)


# Time goes so much faster in the sender that lingering takes a moment.
FAST = """
import _thread
main_thread, real_sleep, real_clock = _thread.get_ident(), time.sleep, time.monotonic
begun = real_clock()
time.monotonic = lambda: begun + 10 * (real_clock() - begun)
time.sleep = lambda seconds: real_sleep(seconds / 10)
"""
COUNT = """
calls = []
def step(*_, **__):
    if _thread.get_ident() == main_thread:
        calls.append(1)
        if len(calls) == STEP:
            beside()
for name in ("stat", "lstat", "listdir", "unlink", "replace", "open", "close"):
    wrap(os, name, before=step)
wrap(fcntl, "flock", before=step)
wrap(time, "sleep", before=step)
real_exit = os._exit
def leave(status):
    with open(TOLD, "w") as file:
        file.write(str(len(calls)))
    real_exit(status)
os._exit = leave
"""


@pytest.mark.parametrize("part", range(3))
def test_a_hook_at_any_step_of_a_burst(
    home: Home, receiver: Receiver, part: int
) -> None:
    """Whenever a hook comes, while a sender works, lingers or ends: if it finds the
    lock busy, that sender delivers, else the hook's own; it needs no other hook."""
    told, ran, checked = home.path / "steps", home.path / "ran", 0
    count = COUNT.replace("TOLD", repr(str(told)))
    put(home, receiver.url, ["PostToolUse"])
    run_sender(home, receiver.url, FAST + count.replace("STEP", "-1"))
    steps = int(told.read_text())
    assert steps > 50
    chosen = random.Random(part).sample(range(1, steps + 1), 5)
    late = [steps - 3 * n - part for n in range(6)]  # around the unlock
    beside = f"""
import subprocess
def beside():
    subprocess.run({hook_command()!r}, env={home.env(receiver.url)!r},
        input={json.dumps(event("Stop")).encode()!r})
    os.mkdir({str(ran)!r})
"""
    for step in sorted({*chosen, *late}):
        receiver.requests.clear()
        put(home, receiver.url, ["PostToolUse"])
        patch = FAST + beside + count.replace("STEP", str(step))
        run_sender(home, receiver.url, patch)
        home.quiet()
        if ran.exists():  # how often it looks depends on the machine
            assert delivered(home, receiver, 2), step
            ran.rmdir()
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("look", [1, 2, 3, 30])
@pytest.mark.parametrize("over", [False, True], ids=["", "a life is over"])
def test_directory_times_that_do_not_change(
    home: Home, receiver: Receiver, look: int, over: bool
) -> None:
    """A file that comes within the same tick of a coarse clock, or just as a life
    ends, is seen all the same."""
    path = only_enqueue(home, receiver.url)
    aside = home.path / path.name
    path.rename(aside)
    put(home, receiver.url, ["PostToolUse"])
    patch = f"""
looks, real = [], time.monotonic
time.monotonic = lambda: real() + 100 * (len(looks) >= {look} and {over})
def look(seconds):
    if _thread.get_ident() != main_thread or seconds < 0.09:
        return
    looks.append(1)
    if len(looks) == {look}:
        kept = os.stat({str(path.parent)!r})
        os.rename({str(aside)!r}, {str(path)!r})
        os.utime({str(path.parent)!r}, ns=(kept.st_atime_ns, kept.st_mtime_ns))
wrap(time, "sleep", before=look)
"""
    run_sender(home, receiver.url, FAST + patch)
    home.quiet()
    assert delivered(home, receiver, 2)


# -- It ends early ---------------------------------------------------------------------


@pytest.mark.fault(67)
def test_an_outbox_that_was_removed_ends_the_sender(
    home: Home, receiver: Receiver
) -> None:
    """Uninstalled in the middle of a burst: it ends, and nothing appears again."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    shutil.rmtree(home.state)
    home.quiet(4)
    assert not home.state.exists()


@pytest.mark.fault(67)
@pytest.mark.parametrize("answer", [b"200", b"503", b"400", b"302", b""])
def test_what_was_removed_during_a_request_stays_away(
    home: Home, answer: bytes
) -> None:
    """Uninstalled while a request is on its way: no file of it appears again."""

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        shutil.rmtree(home.state)
        connection.sendall(b"HTTP/1.1 " + answer)
        while not answer:
            connection.sendall(b"2")  # until the watchdog ends the sender
            time.sleep(0.1)
        connection.sendall(b" X\r\nContent-Length: 0\r\n\r\n")

    with Wire(talk) as wire:
        only_enqueue(home, wire.url)
        home.hook(TOOL, wire.url, TELEMHQ_TIMEOUT=1)
        wait_until(lambda: wire.connections == 1)
        home.quiet()
        assert wire.connections == 1
    assert not home.state.exists()
