"""SIGKILL at named points and at random: nothing is lost, nothing torn, and what is
repeated is repeated under the same id."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
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

from scenes import aside, id_of, put, waiting
from support import (
    Home,
    Receiver,
    event,
    hook_command,
    patched,
    run_sender,
    wait_until,
)

pytest.importorskip("fcntl", reason="locks and signals of POSIX")
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
KILLED = -signal.SIGKILL


def at(call: str, when: str, where: str, nth: int = 1, extra: str = "pass") -> str:
    """A patch that kills the process before or after its nth such call.

    where: what the call's path (or the flock's operation) must contain.
    """
    module = "fcntl" if call == "flock" else "os"
    return f"""
calls = []
def point(*args, **_):
    what = str(args[1] if {call!r} in ("replace", "flock") else args[0])
    if {where!r} in what:
        calls.append(what)
        if len(calls) == {nth}:
            {extra}
            die()
wrap({module}, {call!r}, {when}=point)
"""


def at_step(step: int) -> str:
    """A patch that kills the process at its n-th step that others can see."""
    return f"""
steps = []
def count(*_, **__):
    steps.append(1)
    if len(steps) == {step}:
        die()
names = "open write replace unlink close stat lstat listdir posix_spawn"
for name in names.split():
    wrap(os, name, before=count)
wrap(fcntl, "flock", before=count)
"""


HALF_WRITTEN = """
def half(fd, *_):
    os.write(fd, b'{"ping": {"event_id": "0123')
    die()
import builtins
builtins.open = half
"""


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
    assert (aside(home), home.state_json().get("losses", {})) == ([], {})


# -- The hook --------------------------------------------------------------------------


@pytest.mark.fault(1, 2, 42)
def test_a_hook_killed_at_each_of_its_steps(home: Home, receiver: Receiver) -> None:
    """Wherever a hook is killed, its ping is whole in the outbox or not there, and the
    lock is free: the next hook delivers; a day later what it left is swept."""
    step, whole, survived = 0, set(), False
    patches = [HALF_WRITTEN]
    while not survived:
        step += 1
        sent = event("Stop", prompt_id=f"step-{step}")
        patch = patches.pop() if patches else at_step(step - 1)
        run = patched(home, patch, url=receiver.url, sent=sent)
        assert run.returncode in (0, KILLED)
        survived = run.returncode == 0
        for path in home.waiting():
            whole.add(json.loads(path.read_text("utf-8"))["ping"]["event_id"])
    assert step > 5
    receiver.wait_for(1)
    assert_all_delivered(home, receiver, whole, 0)
    prompts = [ping["prompt_id"] for ping in receiver.pings]
    assert f"step-{step}" in prompts
    assert not {"step-1", "step-2"} & set(prompts)
    leftovers = list(home.state.glob("*/outbox/.*"))
    assert leftovers
    (home.destination() / "saved").symlink_to(home.project)  # a person's
    for name in ("accounts", "outbox", ".", "saved"):
        leftovers.append(home.destination() / name / ".state.json.0123abcd")
        leftovers[-1].write_text("{")
    for path in leftovers:
        os.utime(path, (time.time() - 3700,) * 2)
    home.set_state(**{**home.state_json(), "swept_at": 0})
    home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND="1")
    assert [path for path in leftovers if path.exists()] == leftovers[-1:]


# -- The sender ------------------------------------------------------------------------


@needs_proc
@pytest.mark.fault(3)
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
        wanted = waiting(home)
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(3)
        assert_all_delivered(home, receiver, wanted, 1)


@pytest.mark.fault(4)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_sender_killed_after_the_2xx(
    home: Home, receiver: Receiver, when: str
) -> None:
    """Before the file is deleted: exactly one repeat, the same event_id; after that
    none. What was sent stands in sent.jsonl."""
    wanted = put(home, receiver.url, ["Stop"] * 3)
    killed = run_sender(home, receiver.url, at("unlink", when, "/outbox/", nth=2))
    assert killed.returncode == KILLED
    assert len(receiver.requests) == 2
    lines = (home.destination() / "sent.jsonl").read_text().splitlines()
    assert [json.loads(line)["ping"]["event_id"] for line in lines] == wanted[:2]
    run_sender(home, receiver.url)
    assert_all_delivered(home, receiver, wanted, int(when == "before"))


@pytest.mark.fault(5)
def test_a_sender_killed_between_unlock_and_the_second_look(
    home: Home, receiver: Receiver
) -> None:
    """A ping that came with the unlock is delivered by the next hook."""
    put(home, receiver.url, ["Stop"])
    (found,) = home.waiting()
    staged = home.path / found.name.replace("-Stop-", "-Notification-")
    staged.write_bytes(found.read_bytes())
    late = found.with_name(staged.name)
    extra = f"os.rename({str(staged)!r}, {str(late)!r})"
    patch = at("flock", "after", "8", extra=extra)  # LOCK_UN
    assert run_sender(home, receiver.url, patch).returncode == KILLED
    assert home.waiting() == [late]
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(3)
    wait_until(lambda: not home.waiting())


# -- At random -------------------------------------------------------------------------


def kill_senders(home: Home, over: threading.Event, rng: random.Random) -> int:
    """Until it is over, kill whatever sender runs, every now and then."""
    killed = 0
    while not over.wait(rng.uniform(0.05, 0.4)):
        for pid in home.processes():
            with contextlib.suppress(OSError):
                words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"detached" in words:
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
    return killed


@needs_proc
@pytest.mark.fault(6)
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
                hook_command(), stdin=subprocess.PIPE, env=env, start_new_session=True
            )
            assert hook.stdin
            sent = event("Stop", prompt_id=f"storm-{number}")
            hook.stdin.write(json.dumps(sent).encode())
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
        seen = {id_of(path.name) for path in home.waiting()}
        home.hook(event("Stop", prompt_id="last"), receiver.url)
        wait_until(lambda: not home.waiting(), 40)
        home.quiet()
        by_id, by_prompt = collections.defaultdict(set), collections.defaultdict(set)
        for request in list(receiver.requests):
            by_id[request.headers["Idempotency-Key"]].add(request.body)
            by_prompt[request.ping["prompt_id"]].add(request.ping["event_id"])
    assert returned.count(False) > 20
    kept = {f"storm-{number}" for number in range(hooks) if returned[number]}
    assert kept | {"last"} <= set(by_prompt)
    assert seen <= set(by_id)
    assert all(len(bodies) == 1 for bodies in by_id.values())
    assert all(len(event_ids) == 1 for event_ids in by_prompt.values())
    assert (aside(home), home.state_json().get("losses", {})) == ([], {})
