"""SIGKILL at named points and at random: nothing is lost, nothing torn, and what is
repeated is repeated under the same id."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import pathlib
import random
import signal
import subprocess
import threading
import time
from typing import Iterable

import pytest

from support import (
    ONE_LIFE,
    Home,
    Receiver,
    Request,
    event,
    hook_command,
    patched,
    place,
    run_sender,
    wait_lock_free,
    wait_until,
)

pytest.importorskip("fcntl", reason="locks and signals of POSIX")

KILLED = -signal.SIGKILL


def at(call: str, when: str, where: str = "", nth: int = 1, extra: str = "pass") -> str:
    """A patch that kills the process before or after its nth such call.

    where: what the call's path (or the flock's operation) must contain.
    """
    module = "fcntl" if call == "flock" else "os"
    return f"""
import fcntl
calls = []
def point(*args, **kwargs):
    what = str(args[1] if {call!r} in ("replace", "flock") else args[0])
    if {where!r} in what:
        calls.append(what)
        if len(calls) == {nth}:
            {extra}
            die()
wrap({module}, {call!r}, {when}=point)
"""


HALF_WRITTEN = """
whole = os.write
def half(fd, content):
    whole(fd, bytes(content)[: len(content) // 2])
    die()
os.write = half
"""
LOCK, UNLOCK = str(2 | 4), "8"  # LOCK_EX | LOCK_NB, LOCK_UN: what flock is given


def dots(home: Home) -> list[pathlib.Path]:
    """Unfinished files in every outbox."""
    return list(home.state.glob("*/outbox/.*"))


def assert_all_delivered(
    home: Home, receiver: Receiver, wanted: Iterable[str], repeats: int
) -> None:
    """Each of the event_ids arrived, `repeats` of the requests repeat an earlier one
    byte for byte, and nothing waits, was refused or got lost."""
    wait_until(lambda: not home.waiting())
    home.quiet()
    bodies = collections.defaultdict(list)
    for request in list(receiver.requests):
        assert request.headers["Idempotency-Key"] == request.ping["event_id"]
        bodies[request.ping["event_id"]].append(request.body)
    assert set(wanted) <= set(bodies)
    assert all(len(set(found)) == 1 for found in bodies.values())
    assert len(receiver.requests) - len(bodies) == repeats
    assert not list(home.state.glob("*/refused/*"))
    assert not home.state_json().get("losses")


# -- The hook -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch",
    [
        at("open", "after", "/outbox/."),
        HALF_WRITTEN,
        at("replace", "before", "/outbox/"),
    ],
    ids=["opened", "half-written", "before the rename"],
)
def test_a_hook_killed_before_the_rename(
    home: Home, receiver: Receiver, patch: str
) -> None:
    """Nothing is visible in the outbox; an hour later the leftover is swept."""
    place(home, receiver.url)
    run_sender(home, receiver.url)
    killed = patched(home, patch, url=receiver.url, sent=event("Stop"))
    assert killed.returncode == KILLED
    assert home.waiting() == []
    (leftover,) = dots(home)
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(2)
    home.quiet()
    assert dots(home) == [leftover]
    os.utime(str(leftover), (time.time() - 3700,) * 2)
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(3)
    assert_all_delivered(home, receiver, [], 0)
    assert dots(home) == []


@pytest.mark.parametrize(
    "patch",
    [
        at("replace", "after", "/outbox/"),
        at("flock", "before", LOCK),
        at("flock", "after", LOCK),
        "os.posix_spawn = die",
    ],
    ids=["after the rename", "before the lock", "after the lock", "before the sender"],
)
def test_a_hook_killed_after_the_rename(
    home: Home, receiver: Receiver, patch: str
) -> None:
    """The ping is on disk and the lock is free: the next hook's sender delivers it."""
    killed = patched(home, patch, url=receiver.url, sent=event("Stop"))
    assert killed.returncode == KILLED
    (waiting,) = home.waiting()
    assert receiver.requests == []
    wait_lock_free(str(home.destination() / "lock"), 5)
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(2)
    assert_all_delivered(home, receiver, [waiting.name[21:53]], 0)


def test_a_hook_killed_just_after_it_started_the_sender(
    home: Home, receiver: Receiver
) -> None:
    """The sender has the lock and the ping by then: it needs the hook no more."""
    patch = "wrap(os, 'posix_spawn', after=die)"
    killed = patched(home, patch, url=receiver.url, sent=event("Stop"))
    assert killed.returncode == KILLED
    receiver.wait_for(1)
    assert_all_delivered(home, receiver, [], 0)


COUNTED = """
seen = []
def count(*_, **__):
    seen.append(1)
    if len(seen) == %d:
        die()
for name in ("open", "write", "replace", "unlink", "close", "listdir", "posix_spawn"):
    wrap(os, name, before=count)
wrap(fcntl, "flock", before=count)
"""


def test_a_hook_killed_at_each_of_its_steps(home: Home, receiver: Receiver) -> None:
    """Wherever a hook is killed, its ping is whole in the outbox or not there."""
    step, survived, whole = 0, False, set()
    while not survived:
        step += 1
        sent = event("Stop", prompt_id=f"step-{step}")
        run = patched(home, COUNTED % step, url=receiver.url, sent=sent)
        assert run.returncode in (0, KILLED)
        survived = run.returncode == 0
        for path in home.waiting():
            whole.add(json.loads(path.read_text("utf-8"))["ping"]["event_id"])
    assert step > 5
    receiver.wait_for(1)
    assert_all_delivered(home, receiver, whole, 0)
    prompts = [ping["prompt_id"] for ping in receiver.pings]
    assert f"step-{step}" in prompts
    assert "step-1" not in prompts


# -- The sender -----------------------------------------------------------------------


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_sender_killed_while_it_waits_for_the_answer(home: Home) -> None:
    """Killed after the request was sent: it is sent again, under the same event_id."""
    killed: list[int] = []

    def answer(_: object) -> int:
        if not killed:
            killed.extend(home.processes())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return 200

    with Receiver(answer) as receiver:
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(1)
        home.quiet()
        assert len(killed) == 1
        (waiting,) = home.waiting()
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(3)
        assert_all_delivered(home, receiver, [waiting.name[21:53]], 1)


def test_a_sender_killed_after_the_2xx(home: Home, receiver: Receiver) -> None:
    """Killed before the file is deleted: exactly one repeat, the same event_id."""
    wanted = place(home, receiver.url, 3)
    killed = run_sender(home, receiver.url, at("unlink", "before", "/outbox/", nth=2))
    assert killed.returncode == KILLED
    assert len(receiver.requests) == 2
    assert len(home.waiting()) == 2
    run_sender(home, receiver.url)
    assert_all_delivered(home, receiver, wanted, 1)


def test_a_sender_killed_after_the_file_was_deleted(
    home: Home, receiver: Receiver
) -> None:
    """What is delivered and deleted is never repeated, whatever state.json missed."""
    wanted = place(home, receiver.url, 3)
    killed = run_sender(home, receiver.url, at("unlink", "after", "/outbox/", nth=2))
    assert killed.returncode == KILLED
    run_sender(home, receiver.url)
    assert_all_delivered(home, receiver, wanted, 0)


def test_a_sender_killed_between_unlock_and_the_second_look(
    home: Home, receiver: Receiver
) -> None:
    """A ping that came with the unlock is delivered by the next hook."""
    place(home, receiver.url)
    staged = home.path / "staged.json"
    (found,) = home.waiting()
    staged.write_bytes(found.read_bytes())
    late = found.with_name(f"{time.time_ns():020d}-{'a' * 32}.json")
    extra = f"os.rename({str(staged)!r}, {str(late)!r})"
    killed = run_sender(home, receiver.url, at("flock", "after", UNLOCK, extra=extra))
    assert killed.returncode == KILLED
    assert home.waiting() == [late]
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(3)
    wait_until(lambda: not home.waiting())


@pytest.mark.parametrize("status", [400, 503])
def test_a_sender_killed_while_it_sets_aside_or_backs_off(
    home: Home, status: int
) -> None:
    """Killed at any rename: the ping waits or is set aside, and state.json is whole."""
    bad: list[str] = []

    def answer(request: Request) -> int:
        return status if request.ping["event_id"] in bad else 200

    with Receiver(answer) as receiver:
        for nth in (1, 2, 3):
            event_id, _ = place(home, receiver.url, 2)
            bad.append(event_id)
            for when in ("before", "after"):
                run_sender(home, receiver.url, ONE_LIFE + at("replace", when, nth=nth))
                state = home.destination() / "state.json"
                if state.exists():
                    assert isinstance(json.loads(state.read_text()), dict)
                    state.unlink()
                names = [path.name for path in home.waiting()]
                names += [path.name for path in home.state.glob("*/refused/*")]
                assert [name for name in names if event_id in name]
        bad.clear()
        run_sender(home, receiver.url)
    assert home.waiting() == []


def sender_steps(home: Home, url: str) -> int:
    """How many of the counted calls a sender makes with two pings waiting."""
    path = home.path / "steps"
    note = f"""
real_exit = os._exit
def leave(status):
    with open({str(path)!r}, "w") as file:
        file.write(str(len(seen)))
    real_exit(status)
os._exit = leave
"""
    for _ in range(2):  # the first has more to do: it makes files
        place(home, url, 2)
        run_sender(home, url, COUNTED % -1 + note)
    return int(path.read_text())


def test_a_sender_killed_at_any_of_its_steps(home: Home) -> None:
    """Wherever a sender is killed, the next delivers all, at most one ping twice."""
    with Receiver() as receiver:
        steps = sender_steps(home, receiver.url)
        assert steps > 10
        chosen = random.Random(20).sample(range(1, steps + 1), min(steps, 14))
        for step in sorted(chosen):
            receiver.requests.clear()
            wanted = place(home, receiver.url, 2)
            run = run_sender(home, receiver.url, COUNTED % step)
            assert run.returncode == KILLED
            run_sender(home, receiver.url)
            repeats = len(receiver.requests) - len(set(wanted))
            assert 0 <= repeats <= 1, step
            assert_all_delivered(home, receiver, wanted, repeats)


# -- At random ------------------------------------------------------------------------


def kill_senders(home: Home, over: threading.Event, rng: random.Random) -> int:
    """Until it is over, kill whatever sender runs, every now and then."""
    killed = 0
    while not over.wait(rng.uniform(0.05, 0.4)):
        for pid in home.processes():
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    if b"detached" not in file.read():
                        continue
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except OSError:
                continue
    return killed


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_random_kills_over_five_hundred_events(home: Home) -> None:
    """500 hooks and senders under random SIGKILLs: every ping whose hook returned, or
    whose file was seen, is delivered; no body is torn; an event has one event_id."""
    hooks, rng = 500, random.Random(6)
    delays = [
        rng.uniform(0, 0.06) if rng.random() < 0.4 else None for _ in range(hooks)
    ]

    def answer(_: object) -> int:
        time.sleep(0.01)  # so that a kill may fall between request and answer
        return 200

    with Receiver(answer) as receiver:
        env, over = home.env(receiver.url), threading.Event()

        def run(number: int) -> bool:
            """Run one hook, killed after its delay; whether it returned by itself."""
            hook = subprocess.Popen(
                hook_command(),
                stdin=subprocess.PIPE,
                env=env,
                cwd=str(home.project),
                start_new_session=True,
            )
            sent = json.dumps(event("Stop", prompt_id=f"storm-{number}")).encode()
            assert hook.stdin
            hook.stdin.write(sent)
            hook.stdin.close()
            delay = delays[number]
            if delay is not None:
                time.sleep(delay)
                hook.kill()
            return hook.wait(30) == 0

        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            killer = pool.submit(kill_senders, home, over, random.Random(7))
            returned = list(pool.map(run, range(hooks)))
            over.set()
            assert killer.result() > 5
        seen = {path.name[21:53] for path in home.waiting()}
        home.hook(event("Stop", prompt_id="last"), receiver.url)
        wait_until(lambda: not home.waiting(), 40)
        home.quiet()
        by_id, by_prompt = collections.defaultdict(set), collections.defaultdict(set)
        for request in list(receiver.requests):
            if len(request.body) < int(request.headers["Content-Length"]):
                continue  # its sender was killed while sending: no server accepts it
            by_id[request.headers["Idempotency-Key"]].add(request.body)
            by_prompt[request.ping["prompt_id"]].add(request.ping["event_id"])
    assert 50 < returned.count(False) < 250
    kept = {f"storm-{number}" for number in range(hooks) if returned[number]}
    assert kept - set(by_prompt) == set()
    assert seen - set(by_id) == set()
    assert "last" in by_prompt
    assert all(len(bodies) == 1 for bodies in by_id.values())
    assert all(len(event_ids) == 1 for event_ids in by_prompt.values())
    assert not list(home.state.glob("*/refused/*"))
    assert not home.state_json().get("losses")
