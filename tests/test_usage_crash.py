"""Usage, when its sender dies: killed, or refused by the disk, at every single step.

The steps are those of the real script in a process of its own; only `os` is wrapped,
from outside. A fresh sender then finishes.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any, Callable, Iterator

import pytest

from support import ROOT, Home, Receiver
from test_usage import DAY_S, HAIKU, OPUS, Session, ledger, message, size_of, turn

NURSERY = r"""
# For each line on stdin, runs the script as a sender in a forked child (which saves the
# start of an interpreter), lets its nth step fail, and says how it ended: its status as
# of os.wait, the steps it came to, the name of the nth.
import errno, json, mmap, os, signal, struct, sys

import datetime, email.utils, http.client, random, ssl, threading  # noqa: E401, F401
import urllib.request  # noqa: F401

directory, shared = sys.argv[1], mmap.mmap(-1, 64)


def wrap(nth, how):
    steps = [0]

    def step(name, real):
        def wrapped(*arguments, **keywords):
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*arguments, **keywords)
            steps[0] += 1
            shared[:4] = struct.pack("I", steps[0])
            if steps[0] == nth:
                shared[4:] = name.encode().ljust(60)
            if steps[0] == nth and how == "killed":
                if name == "write":  # half-way
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            full = steps[0] == nth or steps[0] >= nth > 0 and "from then on" in how
            if full and name not in ("unlink", "utime"):  # these work on a full disk
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **keywords)

        return wrapped

    for name in ("open", "write", "replace", "rename", "unlink", "utime", "makedirs"):
        setattr(os, name, step(name, getattr(os, name)))


for line in sys.stdin:
    job, shared[:] = json.loads(line), bytes(64)
    child = os.fork()
    if not child:
        signal.alarm(60)
        os.environ.clear()
        os.environ.update(job["env"])
        sys.argv[:] = ["-c", directory, "telemhq_ping", "detached", "-1"]
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0), os.dup2(null, 1)
        wrap(job["nth"], job["how"])
        sys.path.insert(0, directory)
        import telemhq_ping
        telemhq_ping.sender()
        os._exit(9)
    status, steps = os.waitpid(child, 0)[1], struct.unpack("I", shared[:4])[0]
    print(json.dumps([status, steps, shared[4:].rstrip(b"\0 ").decode()]), flush=True)
"""


class Nursery:
    """Runs senders, of which one step fails."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", NURSERY, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.limit = threading.Timer(240, self.process.kill)
        self.limit.start()

    def run(self, home: Home, url: str, nth: int = 0, how: str = "") -> Any:
        """One sender; its status, its steps, the name of the nth."""
        job = {"env": home.env(url), "nth": nth, "how": how}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.limit.cancel()
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """A nursery; it ends with the module's tests."""
    if not hasattr(os, "fork"):
        pytest.skip("it forks")
    found = Nursery()
    yield found
    found.close()


def at_every_step(
    nursery: Nursery,
    receiver: Receiver,
    path: pathlib.Path,
    how: str,
    prepare: Callable[[Session], object],
) -> Iterator[tuple[str, Session]]:
    """For n = 1, 2, …: a session in a HOME of its own, made by `prepare(session)`,
    whose sender's nth step fails; gives (what failed, session), until all steps have
    been.
    """
    nth, steps = 0, 0
    while nth == steps or (how != "killed" and nth < steps):
        nth += 1
        session = Session(Home(path / f"home{nth}"), receiver)
        prepare(session)
        status, steps, name = nursery.run(session.home, receiver.url, nth, how)
        assert status == (9 if how == "killed" and nth <= steps else 0), (status, name)
        if nth <= steps:
            yield f"{how} at step {nth}, {name}", session
    assert nth > 15  # opened, written, renamed: an account, a ping, the state


def told(session: Session) -> list[dict[str, Any]]:
    """The session's pings with usage, one for each event_id, in order; a repeat must be
    the same bytes.
    """
    bodies: dict[str, set[bytes]] = {}
    for request in session.receiver.requests:
        if session.id.encode() in request.body:
            bodies.setdefault(request.headers["Idempotency-Key"], set()).add(
                request.body
            )
    for event_id, found in bodies.items():
        assert len(found) == 1, found
        assert json.loads(min(found))["event_id"] == event_id
    return [json.loads(min(found)) for found in bodies.values()]


def prepare_session(session: Session) -> None:
    """A whole session, its pings waiting."""
    session.add(*turn(0, 1), ledger({OPUS: 1, HAIKU: 8}, 0.5))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 1.5)
    session.hold("SessionEnd", 3)


@pytest.mark.parametrize("how", ["killed", "no space, once", "no space, from then on"])
def test_sender_that_fails_at_any_step_charges_once(
    nursery: Nursery, receiver: Receiver, tmp_path: pathlib.Path, how: str
) -> None:
    """Whatever step of charging a sender dies at, or the disk refuses: what was used is
    told exactly once over all pings, and a ping that is repeated is the same bytes.
    Only a disk that refuses even to open the account may make history of the first
    turn.
    """
    for case, session in at_every_step(
        nursery, receiver, tmp_path, how, prepare_session
    ):
        # Meanwhile the session goes on, with a row that belongs to the pings before.
        session.add(message(1.7, 2), *turn(10, 4), ledger({OPUS: 7, HAIKU: 8}, 1.25))
        session.hold("SessionEnd", 20)
        opened = session.accounts()
        session.home.set_state()  # no back-off
        nursery.run(session.home, receiver.url)
        pings = told(session)
        names = sorted(ping["event"] for ping in pings)
        assert names == ["SessionEnd", "SessionEnd", "SessionStart", "Stop"], case
        size = sum(size_of(ping) or 0 for ping in pings)
        cost = sum(ping.get("cost_usd", 0) for ping in pings)
        assert not session.home.waiting(), case
        if opened or how != "no space, from then on":
            assert (size, cost) == (15, pytest.approx(1.25, abs=1e-9)), case
        assert size <= 15, case


def prepare_lost_session(nursery: Nursery) -> Callable[[Session], None]:
    """A session with an account, then killed, a day ago."""

    def prepare(session: Session) -> None:
        session.hold("SessionStart", -1, source="startup")
        nursery.run(session.home, session.receiver.url)
        session.add(*turn(0, 1), *turn(10, 2))
        session.later_by(DAY_S + 60)

    return prepare


@pytest.mark.parametrize(
    "how, goes_on", [("killed", False), ("killed", True), ("no space, once", False)]
)
def test_lost_session_is_told_once(
    nursery: Nursery,
    receiver: Receiver,
    tmp_path: pathlib.Path,
    how: str,
    goes_on: bool,
) -> None:
    """A crash while a SessionLost ping is made cannot make two: what is repeated has
    the same id and the same bytes. The session may even go on: nothing is told twice.
    """
    prepare = prepare_lost_session(nursery)
    for case, session in at_every_step(nursery, receiver, tmp_path, how, prepare):
        if goes_on:
            session.add(*turn(20, 4))
            session.hold("Stop", 22)
            nursery.run(session.home, receiver.url)
        for _ in range(2):
            session.later_by(DAY_S + 60)
            nursery.run(session.home, receiver.url)
        pings = told(session)
        assert sum(size_of(ping) or 0 for ping in pings) == (7 if goes_on else 3), case
        lost = [ping for ping in pings if ping["event"] == "SessionLost"]
        assert len(lost) <= 1, case
        assert lost or goes_on, case
        assert not session.home.waiting(), case
