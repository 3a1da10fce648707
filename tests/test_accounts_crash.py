"""Usage, when its sender dies: killed, or refused by the disk, at every single step.

The steps are those of the real script in a process of its own; only `os` is wrapped,
from outside. A fresh sender then finishes.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import signal
from typing import Any, Callable, Iterator

import pytest

from support import Home, Receiver
from transcripts import (
    DAY_S,
    END,
    HAIKU,
    OPUS,
    START,
    Session,
    cost_of,
    ledger,
    message,
    session,
    size_of,
    turn,
)

__all__ = ["session"]  # fixtures

KILLED, FULL = "killed", "no space"

# Lets the nth step that changes a file fail; `report` gets a byte for each there is.
STEPS = """
import errno, signal
nth, how, report = {!r}, {!r}, {!r}
steps, real_write = [], os.write
told = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

def step(name, real):
    def wrapped(*arguments, **keywords):
        if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
            return real(*arguments, **keywords)
        steps.append(real_write(told, b"."))
        if len(steps) == nth and how == "killed":
            if name == "write":  # half-way
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        full = name not in ("unlink", "utime")  # a full disk has these
        if full and len(steps) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **keywords)
    return wrapped

for name in ("open", "write", "replace", "rename", "unlink", "utime", "mkdir"):
    setattr(os, name, step(name, getattr(os, name)))
"""


def at_every_step(
    receiver: Receiver,
    path: pathlib.Path,
    how: str,
    prepare: Callable[[Session], float | None],
) -> Iterator[Session]:
    """For n = 1, 2, …: a session in a HOME of its own, made by `prepare(session)` (it
    gives the sender's time), whose sender's nth step fails; until all steps have."""
    for nth in itertools.count(1):
        one = Session(Home(path / f"home{nth}"), receiver)
        at, report = prepare(one), path / "steps"
        patch = STEPS.format(nth, how, str(report))
        one.send(at=at, patch=patch, status=(0, signal.SIGKILL if how == KILLED else 0))
        if report.stat().st_size < nth:
            break
        yield one
    assert nth > 12  # opened, written, renamed: an account, a ping, the state


def told(one: Session) -> list[dict[str, Any]]:
    """The session's pings, one for each event_id; a repeat must be the same bytes."""
    bodies: dict[str, set[bytes]] = {}
    for request in one.receiver.requests:
        if request.ping.get("session_id") == one.id:
            bodies.setdefault(request.ping["event_id"], set()).add(request.body)
    assert [found for found in bodies.values() if len(found) > 1] == []
    return [json.loads(min(found)) for found in bodies.values()]


def prepare_session(one: Session) -> None:
    """A whole session, its pings waiting."""
    one.hook("Notification", -1)
    one.add(*turn(0, 1), ledger({OPUS: 1, HAIKU: 8}))
    one.hook("Stop", 1.5)
    one.hook(END, 3)


@pytest.mark.fault(38, 80)
@pytest.mark.parametrize("how", [KILLED, FULL])
def test_sender_that_fails_at_any_step_charges_once(
    receiver: Receiver, tmp_path: pathlib.Path, how: str
) -> None:
    """Whatever step of charging a sender dies at, or the disk refuses: what was used is
    told exactly once over all pings, cost included, and a ping that is repeated is the
    same bytes."""
    for one in at_every_step(receiver, tmp_path, how, prepare_session):
        # Meanwhile the session goes on, with a row that belongs to the pings before.
        one.add(message(1.7, 2), *turn(10, 4), ledger({OPUS: 7, HAIKU: 8}))
        one.hook(END, 20)
        one.send(at=1000)
        pings = told(one)
        names = sorted(ping["event"] for ping in pings)
        assert names == ["Notification", "SessionEnd", "SessionEnd", "Stop"]
        assert sum(size_of(ping) or 0 for ping in pings) == 15
        cost = sum(ping.get("cost_usd", 0) for ping in pings)
        assert cost == cost_of({OPUS: 7, HAIKU: 8})
        assert not one.home.waiting()


@pytest.mark.fault(80)
def test_disk_that_is_full_for_hours(session: Session) -> None:
    """A ping waits an hour at most for its account, then it goes without usage and says
    so; the rest, cost and ledger included, is told by the sweep."""
    session.hook(START, -1)
    session.charge("Stop", 2, *turn(0, 1))
    (account,) = session.accounts()
    session.add(*turn(10, 2), ledger({OPUS: 3, HAIKU: 4}))
    session.hook(END, 12)
    patch = f"""
import errno
real = os.open
def full(path, *arguments, **keywords):
    if str(path).startswith({str(account.parent)!r}) and arguments[0] & os.O_WRONLY:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(path, *arguments, **keywords)
os.open = full
"""
    assert session.send(at=60, patch=patch) == []
    assert len(session.home.waiting()) == 1
    (ping,) = session.send(at=4000, patch=patch)
    assert (size_of(ping), ping["usage_complete"]) == (None, False)
    (lost,) = session.send(at=DAY_S * 2)
    assert (lost["event"], size_of(lost)) == ("SessionLost", 6)
    assert lost["cost_usd"] == cost_of({OPUS: 3, HAIKU: 4})


def prepare_lost_session(one: Session) -> float:
    """A session with an account, then killed, a day ago."""
    one.charge(START, -1)
    one.add(*turn(0, 1), *turn(10, 2))
    return DAY_S + 600


@pytest.mark.fault(38)
@pytest.mark.parametrize("how", [KILLED, FULL])
def test_lost_session_is_told_once(
    receiver: Receiver, tmp_path: pathlib.Path, how: str
) -> None:
    """A crash while a SessionLost is made cannot make two: what is repeated has the
    same id and the same bytes. Should the session go on, nothing is told twice."""
    for one in at_every_step(receiver, tmp_path, how, prepare_lost_session):
        for day in (4, 6):
            one.send(at=day * DAY_S)
        assert [ping["event"] for ping in told(one)] == ["SessionStart", "SessionLost"]
        one.charge("Stop", 7 * DAY_S, *turn(7 * DAY_S - 2, 4))
        assert [size_of(ping) for ping in told(one)] == [None, 3, 4]
        assert not one.home.waiting()
