"""One sender for a burst of events; and a busy lock that always means: it will be
delivered."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from typing import Any, Iterable

import pytest

from support import (
    SCRIPT,
    Home,
    Receiver,
    Request,
    command,
    event,
    hook_command,
    only_enqueue,
    place,
    run_sender,
    script_command,
    wait_lock_free,
    wait_until,
)

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
TOOL = event("PostToolUse-Bash")
LINGER_S = 5.0


def ids(requests: Iterable[Request]) -> list[str]:
    """The event_ids of requests, in the order of their arrival."""
    return [request.ping["event_id"] for request in list(requests)]


def delivered(home: Home, receiver: Receiver, count: int) -> bool:
    """Whether so many pings have arrived, once each, and none waits."""
    found = ids(receiver.requests)
    return len(set(found)) == len(found) == count and not home.waiting()


# -- One sender ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["PreToolUse-Bash", "PostToolUse-Bash", "PostToolUseFailure-Bash", "PostToolBatch"],
)
def test_one_sender_serves_a_burst(home: Home, receiver: Receiver, name: str) -> None:
    """After a tool's event the sender stays, and takes what comes: the next hooks start
    no process."""
    home.hook(event(name), receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    (sender,) = home.processes()
    for number in range(2, 6):
        time.sleep(0.4)
        home.hook(event(name), receiver.url)
        assert home.processes() == [sender]
        wait_until(lambda number=number: delivered(home, receiver, number), 2)  # type: ignore[misc]
    assert home.processes() == [sender]


@pytest.mark.parametrize("name", ["Stop", "SessionEnd-other", "StopFailure"])
def test_after_the_last_event_it_ends_at_once(
    home: Home, receiver: Receiver, name: str
) -> None:
    """Whether alone or behind a burst: with a turn or a session a sender ends."""
    env: dict[str, Any] = {"TELEMHQ_USAGE": "0"}
    home.hook(event(name), receiver.url, **env)
    wait_until(lambda: delivered(home, receiver, 1))
    home.quiet(2)
    home.hook(TOOL, receiver.url, **env)
    wait_until(lambda: delivered(home, receiver, 2))
    home.hook(event(name), receiver.url, **env)
    wait_until(lambda: delivered(home, receiver, 3))
    home.quiet(2)


def test_no_daemon(home: Home, receiver: Receiver) -> None:
    """Some seconds after the last of a burst the sender is gone."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    begun = time.monotonic()
    assert home.processes()
    home.quiet(LINGER_S + 5)
    assert time.monotonic() - begun > LINGER_S - 2
    wait_lock_free(home.destination() / "lock", 0)


def test_lingering_costs_next_to_nothing(home: Home, receiver: Receiver) -> None:
    """It looks at times of files; the outbox is listed only when they changed."""
    place(home, receiver.url)
    (only,) = home.waiting()
    record = json.loads(only.read_text())
    record["ping"]["event"] = "PostToolUse"
    only.write_text(json.dumps(record))
    traced = home.path / "traced"
    note = f"""
def note(path=".", *_):
    if str(path).endswith("/outbox"):
        with open({str(traced)!r}, "a") as file:
            file.write("listed\\n")
wrap(os, "listdir", before=note)
"""
    run_sender(home, receiver.url, note)
    assert len(receiver.requests) == 1
    assert len(traced.read_text().split()) <= 8


# -- It ends early ---------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with a copy of the script, to be replaced."""
    directory = tmp_path / "hooks"
    directory.mkdir()
    shutil.copy(SCRIPT, directory)
    return directory


def run_copy(home: Home, copy: pathlib.Path, url: str) -> None:
    """Run a hook by a script in `copy`."""
    subprocess.run(
        ["/bin/sh", "-c", command(directory=copy)],
        input=json.dumps(TOOL).encode(),
        env=home.env(url),
        check=True,
    )


def agents(receiver: Receiver) -> list[str]:
    """Which version of the script sent each request."""
    return [request.headers["User-Agent"] for request in list(receiver.requests)]


def next_version(copy: pathlib.Path, keep_time: bool = True) -> None:
    """Replace the script by another version of its size, as `cp` does, or `cp -p`."""
    kept, text = (copy / SCRIPT.name).stat(), (copy / SCRIPT.name).read_text()
    assert '\n__version__ = "' in text
    head, _, rest = text.partition('\n__version__ = "')
    rest = rest.partition('"')[2]
    (copy / SCRIPT.name).write_text(f'{head}\n__version__ = "9.9.9"{rest}')
    if keep_time:
        os.utime(copy / SCRIPT.name, ns=(kept.st_atime_ns, kept.st_mtime_ns))


@pytest.mark.parametrize("keep_time", [False, True], ids=["cp", "cp -p"])
def test_a_script_that_was_replaced_takes_over(
    home: Home, receiver: Receiver, copy: pathlib.Path, keep_time: bool
) -> None:
    """Also a ping whose hook found the lock busy is sent by the code that the file
    holds."""
    path = only_enqueue(home, receiver.url, TOOL)
    staged = home.path / path.name
    path.rename(staged)
    run_copy(home, copy, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    (old,) = home.processes()
    next_version(copy, keep_time)
    staged.rename(path)  # as by a hook just before, that started nothing
    wait_until(lambda: delivered(home, receiver, 2))
    assert agents(receiver)[1] == "telemhq-ping/9.9.9"
    assert old not in home.processes()


def test_a_script_that_was_replaced_ends_the_sender(
    home: Home, receiver: Receiver, copy: pathlib.Path
) -> None:
    """With nothing to deliver it just ends, soon."""
    run_copy(home, copy, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    next_version(copy)
    home.quiet(2)
    run_copy(home, copy, receiver.url)
    wait_until(lambda: delivered(home, receiver, 2))
    assert agents(receiver)[1] == "telemhq-ping/9.9.9"


def test_a_script_that_was_removed_ends_the_sender(
    home: Home, receiver: Receiver, copy: pathlib.Path
) -> None:
    """No code, no sender; the state tells of no failure."""
    run_copy(home, copy, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    (copy / SCRIPT.name).unlink()
    home.quiet(2)
    assert home.state_json()["failures"] == 0


def test_an_outbox_that_was_removed_ends_the_sender(
    home: Home, receiver: Receiver
) -> None:
    """Uninstalled in the middle of a burst: it ends, and nothing appears again."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    shutil.rmtree(home.state)
    home.quiet(2)
    assert not home.state.exists()


def test_an_outbox_that_was_made_anew(home: Home, receiver: Receiver) -> None:
    """Removed and made again by the next hook: that hook's own sender delivers."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    shutil.rmtree(home.state)
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 2))


# -- Who else wants the lock -----------------------------------------------------------


def test_a_foreground_hook_during_a_burst(home: Home, receiver: Receiver) -> None:
    """It waits until its own ping is delivered, by whomever, and not for the lock."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    begun = time.monotonic()
    home.hook(TOOL, receiver.url, TELEMHQ_FOREGROUND="1")
    assert time.monotonic() - begun < 3
    assert delivered(home, receiver, 2)


def test_a_debug_hook_during_a_burst(home: Home, receiver: Receiver) -> None:
    """The same; and it does not say that the ping waits."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    run = home.hook(TOOL, receiver.url, TELEMHQ_HOOK_DEBUG="1")
    assert delivered(home, receiver, 2)
    assert b"waits" not in run.stderr


def test_flush_during_a_burst(home: Home, receiver: Receiver) -> None:
    """It waits for the lock, not longer than the sender lingers."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    only_enqueue(home, receiver.url)
    begun = time.monotonic()
    run = subprocess.run(
        script_command("flush"),
        env=home.env(receiver.url),
        stdout=subprocess.PIPE,
    )
    assert time.monotonic() - begun < LINGER_S + 5
    assert run.returncode == 0
    assert delivered(home, receiver, 2)


def test_a_lingering_sender_that_is_killed(home: Home, receiver: Receiver) -> None:
    """The kernel frees its lock: the next hook starts another."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    (sender,) = home.processes()
    os.kill(sender, signal.SIGKILL)
    wait_lock_free(home.destination() / "lock", 5)
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 2))


# -- A busy lock means: a running sender will see the file -----------------------------

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
"""


def staged(home: Home, url: str) -> tuple[pathlib.Path, pathlib.Path]:
    """A ping beside the outbox, and its place there."""
    path = only_enqueue(home, url)
    aside = home.path / path.name
    path.rename(aside)
    return aside, path


def steps_of_a_burst(home: Home, receiver: Receiver) -> int:
    """How many of the counted calls a sender makes after a tool's event."""
    told = home.path / "steps"
    tell = f"""
real_exit = os._exit
def leave(status):
    with open({str(told)!r}, "w") as file:
        file.write(str(len(calls)))
    real_exit(status)
os._exit = leave
"""
    only_enqueue(home, receiver.url, TOOL)
    patch = FAST + COUNT.replace("STEP", "-1") + tell
    run_sender(home, receiver.url, patch)
    return int(told.read_text())


@pytest.mark.parametrize("part", range(4))
def test_a_hook_at_any_step_of_a_burst(
    home: Home, receiver: Receiver, part: int
) -> None:
    """Whenever a hook comes, while a sender works, lingers or ends: if it finds the
    lock busy, that sender delivers, else the hook's own; it needs no other hook."""
    steps = steps_of_a_burst(home, receiver)
    assert steps > 100
    chosen = random.Random(part).sample(range(1, steps + 1), 5)
    late = [steps - 4 * n - part for n in range(5)]  # around the unlock
    ran, checked = home.path / "ran", 0
    for step in sorted({*chosen, *late}):
        receiver.requests.clear()
        only_enqueue(home, receiver.url, TOOL)
        beside = f"""
import subprocess
def beside():
    hook = {hook_command()!r}
    subprocess.run(hook, input={json.dumps(event("Stop")).encode()!r},
        env={home.env(receiver.url)!r})
    os.mkdir({str(ran)!r})
"""
        run_sender(home, receiver.url, FAST + beside + COUNT.replace("STEP", str(step)))
        home.quiet()
        if ran.exists():  # how often it looks depends on the machine
            assert delivered(home, receiver, 2), step
            ran.rmdir()
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("look", [1, 2, 3, 10, 30])
def test_directory_times_that_do_not_change(
    home: Home, receiver: Receiver, look: int
) -> None:
    """A file that comes within the same tick of a coarse clock changes no time: it is
    seen all the same; at once, where it comes just behind another."""
    told = home.path / "looks"
    only_enqueue(home, receiver.url, TOOL)
    (path,) = home.waiting()
    aside, there = staged(home, receiver.url)
    outbox = str(path.parent)
    patch = f"""
looks = []
def look(seconds):
    if _thread.get_ident() != main_thread or seconds < 0.09:
        return
    looks.append(1)
    if len(looks) == {look}:
        kept = os.stat({outbox!r})
        os.rename({str(aside)!r}, {str(there)!r})
        os.utime({outbox!r}, ns=(kept.st_atime_ns, kept.st_mtime_ns))
wrap(time, "sleep", before=look)
real_exit = os._exit
def leave(status):
    with open({str(told)!r}, "w") as file:
        file.write(str(len(looks)))
    real_exit(status)
os._exit = leave
"""
    run_sender(home, receiver.url, FAST + patch)
    assert delivered(home, receiver, 2)
    assert int(told.read_text()) == look or look > 2


def test_a_burst_longer_than_a_life(home: Home, receiver: Receiver) -> None:
    """Events for more than a minute, the last of them just as a life ends: no gap."""
    only_enqueue(home, receiver.url, TOOL)
    aside, there = staged(home, receiver.url)
    patch = f"""
real, over = time.monotonic, []
time.monotonic = lambda: real() + 100 * len(over)
def look(seconds):
    if _thread.get_ident() == main_thread and not over:
        over.append(1)
        os.rename({str(aside)!r}, {str(there)!r})
wrap(time, "sleep", before=look)
"""
    run_sender(home, receiver.url, FAST + patch)
    assert delivered(home, receiver, 2)
