"""Usage, charged once: which ping has which tokens, and what of the ledger it tells."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any, Callable

import pytest

import trackers
from support import SCRIPT, Receiver, event, script_command
from transcripts import (
    DAY_S,
    END,
    HAIKU,
    MULTIPLES,
    OPUS,
    START,
    Session,
    cost_of,
    interrupted,
    iso,
    ledger,
    message,
    prompt,
    result,
    session,
    size_of,
    sizes,
    summed,
    turn,
    used,
)

if TYPE_CHECKING:
    import pathlib

    from support import Home, Request

__all__ = ["session"]  # fixtures

LATER = DAY_S + 600  # a sender looks for lost sessions again
NO_USAGE = {"usage_complete": False}
USAGE_FIELDS = {*MULTIPLES, "models", "tools", "tool_calls", "tool_failures"}
USAGE_FIELDS |= {"cost_usd", "lines_added", "lines_removed", "usage_complete"}


def usage_in(ping: dict[str, Any]) -> dict[str, Any]:
    """All that a ping tells of usage."""
    return {name: ping[name] for name in USAGE_FIELDS & set(ping)}


def told(session: Session) -> tuple[Any, float]:
    """The size and the cost of all the session's pings, repeats once."""
    pings = {p["event_id"]: p for p in session.receiver.pings}
    mine = [p for p in pings.values() if p.get("session_id") == session.id]
    return sum(size_of(p) or 0 for p in mine), summed(mine, "cost_usd")[0]


def complete(*pings: dict[str, Any]) -> list[bool]:
    """What each says of its being complete."""
    return [ping.get("usage_complete", True) for ping in pings]


# -- A sheet of sessions: rows, events, and what each event's ping tells ---------------


class Told:
    """An event that a session is charged for, and what its ping tells: a size, whether
    that is all, the cost of which sizes (None: none)."""

    def __init__(
        self,
        name: str,
        at: float,
        size: int | None = None,
        cost: dict[str, int] | None = None,
        complete: bool = True,
        **env: Any,
    ) -> None:
        self.name, self.at, self.env = name, at, env
        self.wanted = size, complete, None if cost is None else cost_of(cost)

    def check(self, session: Session) -> None:
        ping = session.charge(self.name, self.at, **self.env)
        found = size_of(ping), ping.get("usage_complete", True), ping.get("cost_usd")
        assert found == self.wanted, (self.name, self.at)


def stop(at: float, size: int | None, **env: Any) -> Told:
    """A Stop."""
    return Told("Stop", at, size, **env)


def end(at: float, size: int, cost: dict[str, int] | None, whole: bool = True) -> Told:
    """A SessionEnd."""
    return Told(END, at, size, cost, whole)


def met(how: str, at: float) -> Told:
    """A SessionStart."""
    return Told(f"SessionStart-{how}", at)


BROKEN_OFF = message(2, 0, stop=None), interrupted(2.1)
SHEET: dict[str, list[Any]] = {
    "new, from its start, however old its rows are": [
        *[turn(-2 * DAY_S, 4), met("clear", 1), turn(2, 1), stop(4, 5)],
        *[ledger({OPUS: 5}), end(9, 0, {OPUS: 5})],
    ],
    "met in its middle, from a day before": [
        *[turn(0, 1), turn(DAY_S, 2), stop(DAY_S + 60, 2), turn(DAY_S + 70, 4)],
        *[ledger({OPUS: 7}), end(DAY_S + 90, 4, None)],
    ],
    "Esc and a denied permission fire no hook": [
        *[turn(0, 1, stop="tool_use", tools=["Bash"]), interrupted(1.5)],
        *[turn(3, 2, stop="tool_use"), result(4.2, error=True), interrupted(4.5)],
        *[turn(10, 4), stop(12, 7), ledger({OPUS: 7, HAIKU: 8})],
        *[end(13, 8, {OPUS: 7, HAIKU: 8})],
    ],
    "what was used with TELEMHQ_USAGE=0 is history": [
        *[met("startup", -1), turn(0, 1), stop(2, None, TELEMHQ_USAGE=0), turn(10, 2)],
        *[stop(12, None, TELEMHQ_USAGE=0), turn(20, 4), stop(22, 4)],
        *[ledger({OPUS: 7}), end(23, 0, None)],
    ],
    "no later SessionStart begins it anew": [
        *[met("startup", -1), turn(0, 1), stop(2, 1), turn(10, 2), ledger({OPUS: 3})],
        *[end(20, 2, {OPUS: 3}), turn(30, 4), met("resume", 40), met("fork", 41)],
        *[met("startup", 42), met("clear", 43), met("compact", 44), stop(45, 4)],
        *[turn(50, 8), ledger({OPUS: 15}), end(60, 8, {OPUS: 12})],
    ],
    "resumed: the ledger that ends its history is the baseline": [
        *[turn(0, 1), message(3, 2), ledger({OPUS: 3, HAIKU: 4}), met("resume", 100)],
        *[turn(102, 8), stop(104, 8), ledger({OPUS: 11 + 16, HAIKU: 4 + 32})],
        *[end(110, 16 + 32, {OPUS: 24, HAIKU: 32})],
    ],
    "resumed after a kill: nobody knows what its ledger has of before": [
        *[turn(0, 1), ledger({OPUS: 1}), turn(3, 2), met("resume", 100)],
        *[turn(102, 8), stop(104, 8), ledger({OPUS: 64}), end(110, 0, None)],
    ],
    "an earlier run was told elsewhere": [
        *[turn(0, 1), ledger({OPUS: 3, HAIKU: 4}), turn(10, 8), turn(20, 16)],
        *[ledger({OPUS: 27, HAIKU: 4 + 64}), end(30, 24 + 64, {OPUS: 24, HAIKU: 64})],
    ],
    "SIGINT: a broken-off answer behind the ledger, which stays the last word": [
        *[prompt(0), message(1, 1, stop="tool_use"), ledger({OPUS: 3}), *BROKEN_OFF],
        *[end(3, 3, {OPUS: 3}), turn(10, 4), ledger({OPUS: 7}), end(13, 4, {OPUS: 4})],
    ],
    "a ledger that answers follow is no last word": [
        *[met("startup", -1), turn(0, 1), ledger({OPUS: 9}), turn(10, 2)],
        *[end(12, 3, None, False), turn(20, 4), ledger({OPUS: 19})],
        *[end(30, 16, {OPUS: 19})],
    ],
}
LEDGERS: list[tuple[dict[str, int], int]] = [  # after 3 of OPUS; what is told on top
    *[({OPUS: 3}, 0), ({OPUS + "[1m]": 3}, 0), ({OPUS + "[1m]": 7}, 4), ({}, 0)],
    *[({OPUS: 1, OPUS + "[1m]": 2}, 0), ({OPUS: 3, HAIKU: 4}, 4), ({OPUS: 2}, 0)],
    *[({OPUS: 4, HAIKU: 4}, 5), ({OPUS: 0, HAIKU: 5}, 2)],
]
for sums, more in LEDGERS:
    SHEET[f"3 told, then {sums}: sums are compared, nothing is told twice"] = [
        *[turn(0, 1), message(2, 2), stop(3, 3), ledger(sums), end(5, more, sums)]
    ]


@pytest.mark.fault(50, 51)
@pytest.mark.parametrize("session_of", SHEET)
def test_sheet(session: Session, session_of: str) -> None:
    """Each ping tells what the sheet says."""
    for step in SHEET[session_of]:
        if isinstance(step, Told):
            step.check(session)
        else:
            session.add(*(step if isinstance(step, tuple) else (step,)))


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.fault(51)
def test_session_older_than_the_installation(
    session: Session, tmp_path: pathlib.Path, updated: bool
) -> None:
    """What was before the script was there is history; an update, which gives it a new
    time, changes nothing where the destination is older."""
    session.script = tmp_path / "hooks"
    session.script.mkdir()
    shutil.copy(SCRIPT, session.script)
    installed = (session.script / SCRIPT.name).stat().st_ctime
    if updated:
        Session(session.home, session.receiver).charge("Notification", 0)
        while time.time() < installed + 0.2:
            time.sleep(0.02)
        os.utime(session.script / SCRIPT.name)
        installed = (session.script / SCRIPT.name).stat().st_ctime
    session.begun = installed - 10.0
    session.add(prompt(0), message(9.95 if updated else 9, 1), *turn(20, 2))
    assert size_of(session.charge("Stop", 22)) == (3 if updated else 2)
    ping = session.charge(END, 30, ledger({OPUS: 3}))
    assert ("cost_usd" in ping, size_of(ping)) == (updated, 0)


# -- Forks -----------------------------------------------------------------------------


def parent_of(session: Session, ledgers: bool = True) -> Session:
    """A session of two turns, charged, with a call that no row has."""
    session.hook(START, -1)
    session.charge("Stop", 2, *turn(0, 1))
    session.add(*turn(10, 2), *([ledger({OPUS: 3 + 4, HAIKU: 8}, (5, 4))] * ledgers))
    session.charge(END if ledgers else "Stop", 12)
    return session


def ends_of(fork: Session, before: dict[str, int]) -> tuple[Any, Any]:
    """A fork's turns, in which it uses 16 in rows and 32 in none (a compaction), and
    HAIKU 64; the size told and the cost told."""
    fork.charge("Stop", 112, *turn(110, 16))
    own = {OPUS: before.get(OPUS, 0) + 48, HAIKU: before.get(HAIKU, 0) + 64}
    fork.charge(END, 120, ledger(own, (7, 6)))
    return told(fork)


OWN = (16 + 32 + 64, cost_of({OPUS: 48, HAIKU: 64}))


@pytest.mark.fault(90)
@pytest.mark.parametrize("met", ["SessionStart-fork", "its copy late", "Stop"])
@pytest.mark.parametrize("how", ["--fork-session", "/branch"])
def test_fork_tells_what_is_its_own(session: Session, how: str, met: str) -> None:
    """Tokens and cost to the cent, a compaction's too: a fork's ledger begins with its
    parent's, a branch's anew. Also where no SessionStart is registered, or the copy is
    not there yet when that fires."""
    fork = parent_of(session).fork(how)
    copies = fork.path.read_bytes()
    if met != "Stop":
        fork.path.write_bytes(b"" if met == "its copy late" else copies)
        fork.charge("SessionStart-fork", 100)
        fork.path.write_bytes(copies)
    before = {OPUS: 7, HAIKU: 8} if how == "--fork-session" else {}
    assert ends_of(fork, before) == OWN
    assert told(session) == (15, cost_of({OPUS: 7, HAIKU: 8}))


@pytest.mark.fault(90)
def test_branch_with_more_turns_than_its_parent(session: Session) -> None:
    """A branch of a branch, longer than what it began with; the parents go on."""
    branch = parent_of(session, ledgers=False).fork("/branch")
    branch.hook("SessionStart-fork", 100)
    for i in range(3):
        branch.charge("Stop", 102 + 10 * i, *turn(100 + 10 * i, 16))
    second = branch.fork("/branch")
    second.hook("SessionStart-fork", 200)
    second.charge("Stop", 202, *turn(200, 32))
    second.charge(END, 210, ledger({OPUS: 32 + 1}))
    branch.charge(END, 310, *turn(300, 64), ledger({OPUS: 48 + 64}))
    session.charge(END, 320, *turn(315, 4), ledger({OPUS: 7}))
    assert told(session) == (7, cost_of({OPUS: 7}))
    assert told(branch) == (112, cost_of({OPUS: 112}))
    assert told(second) == (33, cost_of({OPUS: 33}))


@pytest.mark.fault(90)
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "running"])
@pytest.mark.parametrize("says_more", [True, False])
@pytest.mark.parametrize("runs", [1, 2])
def test_parent_that_goes_on_after_the_fork(
    session: Session, runs: int, ended: bool, says_more: bool
) -> None:
    """A fork's ledger goes on from the last one that its parent's file had then; that
    of a parent in its first run begins anew. What the parent says later is its own."""
    known = {OPUS: 7, HAIKU: 8}
    parent_of(session, ledgers=ended or runs == 2)
    if runs == 2:
        rows = [ledger({OPUS: 1024 + 7, HAIKU: 8})] * ended
        known[OPUS] += 1024 * ended
        session.charge("Stop", 22, *turn(20, 1024), *rows)
    fork = session.fork()
    fork.hook("SessionStart-fork", 100)
    if says_more:
        session.add(*turn(90, 4096), ledger({OPUS: 4096 + 1024 * runs, HAIKU: 8}))
    fork.charge("Stop", 102, message(101, 0))
    session.add(ledger({OPUS: 4096 + 1024 * runs, HAIKU: 8}))
    assert ends_of(fork, known if ended or runs == 2 else {}) == OWN


def test_fork_whose_parents_file_is_gone(session: Session) -> None:
    """Nobody knows what its ledger has of before: no cost, nothing settled."""
    fork = parent_of(session).fork()
    session.path.unlink()
    fork.hook("SessionStart-fork", 100)
    assert ends_of(fork, {OPUS: 7, HAIKU: 8}) == (16, 0)
    assert "usage_complete" not in fork.receiver.pings[-1]


def test_marked_copies_never_count(session: Session) -> None:
    """Also of a parent that this destination was never told of, however young."""
    session.add(*turn(0, 1, key="c", tools=["Bash"]), *turn(10, 2))
    fork = session.fork()
    ping = fork.charge("Stop", 22, *turn(20, 4), result(20.5, "toolu_c_0", error=True))
    assert (size_of(ping), ping["tool_calls"], ping["tool_failures"]) == (4, 0, 0)


@pytest.mark.fault(79)
@pytest.mark.parametrize("start", [None, "its own id", "its parent's id"])
def test_fork_whose_rows_are_not_marked(session: Session, start: str | None) -> None:
    """Clients 2.1.156 to 2.1.288: what the account of another session at this
    destination has seen is history. Before 2.1.219 the SessionStart is the parent's."""
    parent_of(session)
    session.add(message(3, 512), to=session.agent())
    session.charge("SubagentStop", 20, agent_transcript_path=str(session.agent()))
    fork = session.fork("unmarked")
    fork.add(session.agent().read_bytes(), message(105, 256), to=fork.agent())
    if start:
        (fork if start == "its own id" else session).hook("SessionStart-fork", 100)
    fork.charge("Stop", 112, *turn(110, 16))
    fork.charge(END, 120, ledger({OPUS: 7 + 16, HAIKU: 8}))
    assert told(fork) == (16 + 256, 0)


# -- Settling --------------------------------------------------------------------------


@pytest.mark.parametrize("delivered", ["each", "after the end"])
def test_ledger_settles_what_is_in_no_row(session: Session, delivered: str) -> None:
    """Compaction and titles are calls of no row: SessionEnd has them, the cost of each
    model and the lines; also when all is delivered after the session's end."""
    session.hook(START, -1)
    session.add(*turn(0, 1))
    session.hook("Stop", 2)
    if delivered == "each":
        session.send()
    session.add(*turn(10, 2), ledger({OPUS: 7, HAIKU: 8}, (31, 12)))
    session.hook("Stop", 12)
    session.hook(END, 13)
    session.send()
    first, second, end = session.receiver.pings[1:]
    assert sizes([first, second, end]) == [("Stop", 1), ("Stop", 2), ("SessionEnd", 12)]
    assert end["models"] == {
        OPUS: {**used(4), "cost_usd": cost_of({OPUS: 7})},
        HAIKU: {**used(8), "cost_usd": cost_of({HAIKU: 8})},
    }
    lines = [end[name] for name in ("cost_usd", "lines_added", "lines_removed")]
    assert lines == [cost_of({OPUS: 7, HAIKU: 8}), 31, 12]
    assert (end["model"], complete(end)) == (OPUS, [True])
    assert not any({"cost_usd", "lines_added"} & set(p) for p in (first, second))


def test_models_have_their_cost_without_new_tokens(session: Session) -> None:
    """A model whose tokens were told at Stop has its cost at the end all the same;
    where one model is all, the ping's own fields say it."""
    session.hook(START, -1)
    session.charge("Stop", 3, *turn(0, 1), message(2, 2, model=HAIKU))
    end = session.charge(END, 5, ledger({OPUS: 1, HAIKU: 2}))
    costs = {name: counts.get("cost_usd") for name, counts in end["models"].items()}
    assert costs == {OPUS: cost_of({OPUS: 1}), HAIKU: cost_of({HAIKU: 2})}
    end = session.charge(END, 13, *turn(10, 4), ledger({OPUS: 5, HAIKU: 2}))
    assert (end["cost_usd"], "models" in end) == (cost_of({OPUS: 4}), False)


def test_difference_is_never_negative(session: Session) -> None:
    """A count of which the ledger has less than was told is left; others are settled.
    Nor is the cost, when it says less than the one before."""
    row = ledger({OPUS: 8}, (5, 5))
    row["modelUsage"][OPUS].update(inputTokens=1, thinkingTokens=0)
    session.charge("Stop", 3, *turn(0, 2))
    end = session.charge(END, 5, row)
    counts = [end[name] for name in MULTIPLES]
    assert counts == [0, *[6 * n for n in (3, 5, 7)], 0, 6 * 15]
    end = session.charge(END, 13, *turn(10, 1), ledger({OPUS: 4}))
    found = [end[name] for name in ("cost_usd", "lines_added", "lines_removed")]
    assert found == [0, 0, 0]


@pytest.mark.fault(91)
def test_two_runs_in_one_outage(session: Session) -> None:
    """Each run's tokens and cost are on its own SessionEnd, each turn's on its own
    Stop, though nothing could be delivered for a day."""
    session.hook(START, -1)
    for run in range(2):
        at = run * 3600
        for n in range(3):
            tools = [f"Tool{run}{n}"]
            session.add(*turn(at + 100 * n, 1 << (3 * run + n), tools=tools))
            session.hook("Stop", at + 100 * n + 1.5)
        session.add(ledger({OPUS: (7, 63)[run], HAIKU: (64, 192)[run]}, (run, 1)))
        session.hook(END, at + 400)
        if not run:
            session.hook("SessionStart-resume", 3590)
    pings = [p for p in session.send() if p["event"] != "SessionStart"]
    assert [size_of(p) for p in pings] == [1, 2, 4, 64, 8, 16, 32, 128]
    assert pings[5]["tools"] == {"Tool11": 1}
    assert [p.get("duration_ms") for p in pings[:3]] == [1500] * 3
    ends = [p for p in pings if p["event"] == "SessionEnd"]
    costs = [cost_of({OPUS: 7, HAIKU: 64}), cost_of({OPUS: 56, HAIKU: 128})]
    assert [p["cost_usd"] for p in ends] == costs
    assert [p["lines_added"] for p in ends] == [0, 1]
    assert complete(*pings) == [True] * 8


# -- Until when ------------------------------------------------------------------------


def test_rows_after_an_event_are_the_next_pings(session: Session) -> None:
    """The main chain's from the event on, an agent's 2 s later: it is written late. A
    row of the event's very millisecond is its own."""
    session.hook(START, -1)
    session.add(*turn(0, 1), message(2, 2), message(2.005, 4), *turn(3, 8))
    session.add(message(3.9, 16), message(4.1, 32), to=session.agent())
    session.hook("Stop", 2)
    session.hook("Stop", 10)
    assert sizes(session.send())[1:] == [("Stop", 19), ("Stop", 44)]


def test_session_end_takes_what_is_stamped_up_to_2_s_after_it(session: Session) -> None:
    """And not what a later run says."""
    session.hook(START, -1)
    session.add(*turn(0, 1), message(3.5, 2), ledger({OPUS: 3}), *turn(30, 4))
    session.hook(END, 2)
    session.hook("Stop", 40)
    _, end, stop = session.send()
    assert (size_of(end), end["cost_usd"], size_of(stop)) == (3, cost_of({OPUS: 3}), 4)


# -- Waiting ---------------------------------------------------------------------------

LATE = {  # event: what is there, what the client writes 0.25 s later
    "Stop": ([prompt(0)], message(1, 4)),
    "Stop, max_tokens": ([prompt(0)], message(1, 4, stop="max_tokens")),
    "Stop, a block": ([prompt(0), message(1, 4, "a", None)], message(1, 4, "a")),
    "SubagentStop": ([prompt(0)], message(1, 4)),
    END: ([prompt(0), message(1, 4)], ledger({OPUS: 4})),
    "SessionEnd-clear": ([prompt(0), message(1, 4)], ledger({OPUS: 4})),
}


@pytest.mark.parametrize("late", [True, False], ids=["late", "never"])
@pytest.mark.parametrize("case", LATE)
def test_sender_waits_for_what_the_client_writes_late(
    session: Session, case: str, late: bool
) -> None:
    """Stop fires before the turn's last row is in the file, SubagentStop before the
    agent's, /clear before the ledger. What has not come when the event is 2 s old is
    told, and rides on the session's next ping."""
    rows, row = LATE[case]
    name, path = case.partition(",")[0], session.path
    session.hook(START, -1)
    if name == "SubagentStop":
        session.add(*turn(0, 1))
        path = session.agent()
    session.add(*rows, to=path)
    session.hook(name, 2, agent_transcript_path=str(session.agent()))
    when = 2.25 if late else 4.5
    ping = session.send(2.05, later=[(when, path, [row])])[-1]
    own = 1 if name == "SubagentStop" else 0
    there = 4 if late or len(rows) > 1 else 0
    assert (size_of(ping), complete(ping)) == (own + there, [late])
    if "SessionEnd" in case:
        assert ping.get("cost_usd") == (cost_of({OPUS: 4}) if late else None)
    elif not late:
        session.add(row, to=path)
        assert size_of(session.charge("StopFailure", 9)) == 4 - there


@pytest.mark.fault(92)
def test_stop_waits_for_a_row_of_its_own(session: Session) -> None:
    """A row that ended a turn before is not the one, also where that turn ended in a
    StopFailure (max_tokens)."""
    session.hook(START, -1)
    session.charge("StopFailure", 2, *turn(0, 1, stop="max_tokens"))
    session.add(prompt(10))
    session.hook("Stop", 12)
    late = [(12.3, session.path, [message(11.9, 2)])]
    ping = session.send(12.05, later=late)[-1]
    assert (size_of(ping), complete(ping)) == (2, [True])


NOT_AWAITED: dict[str, tuple[str, list[Any], Any]] = {
    "StopFailure": ("StopFailure", [*turn(0, 1, stop="tool_use")], 1),
    "an agent without a file": ("SubagentStop", [*turn(0, 1)], 1),
    "no transcript": ("Stop", [], None),
    "no transcript, an end": (END, [], None),
}


@pytest.mark.parametrize("case", NOT_AWAITED)
def test_nothing_else_is_waited_for(session: Session, case: str) -> None:
    """Nor for a transcript that is not there (--no-session-persistence): its pings say
    that they have no counts."""
    name, rows, size = NOT_AWAITED[case]
    if rows:
        session.add(*rows)
    session.hook(name, 2, agent_transcript_path=str(session.agent("compact")))
    late = message(1.5, 1024)
    (ping,) = session.send(2.05, later=[(3, session.path, [late])])
    assert size_of(ping) == size
    if not rows:
        assert usage_in(ping) == NO_USAGE
    else:
        assert complete(ping) == [True]


# -- Destinations, trackers, settings --------------------------------------------------


@pytest.mark.fault(89, 35)
def test_two_hooks_that_report_one_session(session: Session) -> None:
    """A plugin and a settings file with two URLs: each tracker gets the whole, also
    when one was away for a while."""
    with Receiver(503) as second:
        for at, n in (0, 1), (10, 2):
            session.add(*turn(at, n))
            for url in (session.receiver.url, second.url):
                session.hook("Stop", at + 2, url=url)
            session.send()
        session.send(url=second.url)
        second.answer, second.requests = 200, []
        session.add(*turn(20, 4), ledger({OPUS: 7, HAIKU: 8}))
        for url in (session.receiver.url, second.url):
            session.hook(END, 30, url=url)
            session.send(at=DAY_S, url=url)
        for place in (session.receiver, second):
            found = {p["event_id"]: p for p in place.pings}
            assert sorted(size_of(p) for p in found.values()) == [1, 2, 12]
            costs = summed(found.values(), "cost_usd")
            assert costs == [cost_of({OPUS: 7, HAIKU: 8})]


@pytest.mark.fault(48)
@pytest.mark.parametrize("before", [True, False], ids=["at once", "after a turn"])
@pytest.mark.parametrize("charged", [True, False], ids=["charged", "not charged"])
def test_adopted_pings_tell_no_token_twice(
    session: Session, charged: bool, before: bool
) -> None:
    """`flush --adopt` moves what waits for a former URL while the session goes on under
    the new one, charged or not: none is lost, and none told twice to one URL."""
    session.hook(START, -1)
    session.charge("Stop", 2, *turn(0, 1))
    session.receiver.answer = 503
    session.add(*turn(10, 2))
    session.hook("Stop", 12)
    if charged:
        session.send()
    with Receiver() as second:
        session.add(*turn(20, 4))
        session.hook("Stop", 22, url=second.url)
        if not before:
            session.send(url=second.url)
        done = subprocess.run(
            script_command("flush", "--adopt", "--yes"),
            env=session.home.env(second.url),
            cwd=session.home.project,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        session.add(*turn(30, 8), ledger({OPUS: 15}))
        session.hook(END, 32, url=second.url)
        session.send(url=second.url)
        assert not session.home.waiting()
        found = {p["event_id"]: p for p in second.pings}
        sent = sum(size_of(p) or 0 for p in found.values())
        assert sent == (14 if charged and before else 15)  # the former one was told 1


def test_rows_for_wigtoken_have_ids_of_their_own(session: Session) -> None:
    """The answer's real id; with the API's request where a router repeats it; with its
    output for what it gained later: the first row of an id wins there."""
    with trackers.Wigtoken() as place:
        env: dict[str, Any] = {**place.env(), "TELEMHQ_DESTINATIONS": "wigtoken"}
        session.add(*turn(0, 1, key="a"), message(1.2, 2, "r", requestId="req_1"))
        session.add(message(1.5, 4, "r", requestId="req_2"))
        session.hook("Stop", 2, **env)
        (directory,) = session.home.state.glob("wigtoken-*")
        session.send(name=directory.name, **env)
        session.add(message(11, 9, "a"), message(12, 16, "b"))
        session.hook("Stop", 13, **env)
        session.send(name=directory.name, **env)
        rows = [row for _, body in place.accepted for row in body["messages"]]
        found = {row["message_id"]: row["input_tokens"] for row in rows}
        wanted = {"msg_a": 1, "msg_r": 2, "msg_r.req_2": 4, "msg_a.27": 8, "msg_b": 16}
        assert (found, place.faults, place.duplicates) == (wanted, [], 0)


@pytest.mark.fault(41)
def test_each_ping_keeps_the_settings_of_its_hook(session: Session) -> None:
    """The sender is another session's child: nothing that shapes a ping is its own."""
    sender: dict[str, Any] = {
        "TELEMHQ_USAGE": 0,
        "TELEMHQ_PROJECT": "sender",
        "TELEMHQ_GIT": 0,
    }
    sender.update(TELEMHQ_MACHINE="sender", TELEMHQ_TOOL_NAMES=0)
    session.add(*turn(0, 1, tools=["mcp__acme__drop"]))
    session.hook("Stop", 2, TELEMHQ_GIT=1, TELEMHQ_MACHINE="full")
    quiet = Session(session.home, session.receiver)
    quiet.add(*turn(0, 2))
    quiet.hook("Stop", 2, TELEMHQ_USAGE=0, TELEMHQ_PROJECT="quiet")
    (ping,) = session.send(**sender)
    (other,) = quiet.new()
    names = ("project", "machine", "git_branch", "tools")
    found = [ping.get(name) for name in names]
    assert found == ["api", "full", "main", {"mcp__acme__drop": 1}]
    assert [other.get(name) for name in names] == ["quiet", None, None, None]
    assert (size_of(ping), size_of(other)) == (1, None)


# A sender that opens a transcript dies.
DEADLY = """
real = os.open
def deadly(path, *arguments):
    return os._exit(7) if "/projects/" in str(path) else real(path, *arguments)
os.open = deadly
"""


@pytest.mark.fault(41, 52)
@pytest.mark.parametrize("hook", ["0", "no!"])
def test_usage_0_opens_no_transcript(session: Session, hook: str) -> None:
    """For pings of a hook with TELEMHQ_USAGE=0 (or not understood) none is opened, by
    whatever session's sender; nor by a sweep of today with it."""
    session.add(*turn(0, 1), ledger({OPUS: 3}))
    session.add(message(1, 2), to=session.agent())
    for name in (START, "Stop", "SessionEnd-clear"):
        session.hook(name, 2, TELEMHQ_USAGE=hook)
    pings = session.send(patch=DEADLY)
    assert [usage_in(ping) for ping in pings] == [{}, {}, {}]
    other = Session(session.home, session.receiver)
    other.charge(START, 0)
    other.add(*turn(1, 1))
    assert other.send(at=LATER, patch=DEADLY, TELEMHQ_USAGE="0") == []
    other.hook("Stop", LATER + 2)
    assert sizes(other.send(TELEMHQ_USAGE="0")) == [("Stop", 1)]


# -- Sessions that ended without a word ------------------------------------------------


def test_lost_session_makes_one_ping(session: Session) -> None:
    """A session that was killed makes one SessionLost a day later: its usage, project,
    ids and hashes; the next days nothing more."""
    session.hook(START, -1)
    stop = session.charge("Stop", 2, *turn(0, 1))
    session.add(prompt(10), message(11, 2, "c", "tool_use", tools=["Bash"]))
    session.add(message(3000, 4, stop=None), to=session.agent())
    assert session.send(at=DAY_S * 0.9) == []
    (lost,) = session.send(at=DAY_S + 4000, TELEMHQ_MACHINE="midi")
    assert (lost["event"], size_of(lost), lost["status"]) == (
        "SessionLost",
        6,
        "success",
    )
    assert (lost["usage_complete"], lost["tools"]) == (False, {"Bash": 1})
    names = ("project", "session_id", "cwd_hash", "transcript_path_hash", "model")
    assert [lost[name] for name in names] == [stop[name] for name in names]
    assert lost["machine"] == "midi"
    for day in (2, 3, 40):
        assert session.send(at=DAY_S * day + 9000) == []


@pytest.mark.parametrize("name", [START, "Notification", "PreToolUse-Bash"])
def test_lost_session_may_have_had_any_event(session: Session, name: str) -> None:
    """And is settled by the ledger where there is one."""
    session.charge(name, 0.5)
    session.add(*turn(1, 1), ledger({OPUS: 1, HAIKU: 2}))
    (lost,) = session.send(at=LATER)
    assert (size_of(lost), lost["cost_usd"]) == (3, cost_of({OPUS: 1, HAIKU: 2}))
    assert lost["timestamp"] >= iso(session.begun)


@pytest.mark.parametrize("ended", [True, False])
def test_session_that_is_not_lost(session: Session, ended: bool) -> None:
    """One with nothing unreported; nor one whose end waits in the outbox."""
    session.charge(START, -1)
    session.add(*turn(0, 1), *([ledger({OPUS: 1})] * ended))
    session.hook(END if ended else "Stop", 2)
    assert [p["event"] for p in session.send(at=2 * DAY_S)] != ["SessionLost"]
    assert session.send(at=4 * DAY_S) == []


def test_lost_session_that_goes_on_after_all_is_exact(session: Session) -> None:
    """It goes on where it was; lost again, it makes another ping."""
    session.charge(START, -1)
    session.add(*turn(0, 1))
    ids = {session.send(at=LATER)[0]["event_id"]}
    assert size_of(session.charge("Stop", LATER + 200, *turn(LATER + 100, 2))) == 2
    session.add(*turn(LATER + 300, 4))
    ids.add(session.send(at=2 * LATER)[0]["event_id"])
    session.charge(
        END, 2 * LATER + 600, *turn(2 * LATER + 500, 8), ledger({OPUS: 15, HAIKU: 16})
    )
    assert told(session) == (31, cost_of({OPUS: 15, HAIKU: 16}))
    assert len(ids) == 2


@pytest.mark.fault(52)
@pytest.mark.parametrize("key", ["", "old", "new"])
def test_sweep_follows_todays_settings(session: Session, key: str) -> None:
    """What is told has no machine that is unset now, no name of a server, no hash under
    another key than today's."""
    old = {"TELEMHQ_HASH_KEY": key} if key else {}
    session.charge(START, -1, TELEMHQ_MACHINE="mini", **old)
    session.add(*turn(0, 1, tools=["mcp__acme__drop"]))
    today: dict[str, Any] = {"TELEMHQ_HASH_KEY": "new", "TELEMHQ_TOOL_NAMES": 0}
    (lost,) = session.send(at=LATER, **today)
    other = Session(session.home, session.receiver)
    other.path = session.path
    wanted = other.charge("Notification", 0, **today)
    assert lost["tools"] == {"mcp": 1}
    assert "machine" not in lost
    assert lost["transcript_path_hash"] == wanted["transcript_path_hash"]
    assert lost.get("cwd_hash") == (wanted["cwd_hash"] if key == "new" else None)


@pytest.mark.fault(81)
def test_clock_40_days_ahead_for_one_event(session: Session) -> None:
    """A running session's account is not dropped, and nothing is billed twice."""
    session.hook(START, -1)
    session.charge("Stop", 2, *turn(0, 1), *turn(10, 2))
    other = Session(session.home, session.receiver, session.begun)
    other.charge("Stop", 40 * DAY_S, *turn(5, 1024))
    other.charge("Stop", 30)
    session.charge("Stop", 32, *turn(20, 4))
    session.charge(END, 50, *turn(40, 8), ledger({OPUS: 15, HAIKU: 16}))
    assert told(session) == (31, cost_of({OPUS: 15, HAIKU: 16}))


def test_newest_500_accounts_are_kept(session: Session) -> None:
    """By number: a session of months ago goes on where it was while no 500 came after
    it. The oldest are dropped at a sweep."""
    session.hook(START, -1)
    session.charge("Stop", 2, *turn(0, 1))
    (own,) = session.accounts()
    raw, now = own.read_bytes(), own.stat().st_mtime
    for i in range(600):
        path = own.with_name(f"{i:016x}.json")
        path.write_bytes(raw)
        os.utime(path, (now - 1000 + i, now - 1000 + i))
    other = Session(session.home, session.receiver, session.begun)
    other.charge("Notification", 100 * DAY_S)
    names = {path.name for path in session.accounts()}
    assert own.name in names
    assert 500 <= len(names) <= 501
    assert f"{0:016x}.json" not in names
    session.charge("Stop", 100 * DAY_S + 12, *turn(100 * DAY_S + 10, 2))
    assert told(session) == (3, 0)


# -- What the disk does ----------------------------------------------------------------

FAILING = """
import errno
def failing(name, part, code, nth=1):
    real, calls = getattr(os, name), [0]
    def wrapped(*args, **kwargs):
        if args and part in str(args[0]):
            calls[0] += 1
            if calls[0] == nth or not nth:
                raise OSError(getattr(errno, code), os.strerror(1), args[0])
        return real(*args, **kwargs)
    setattr(os, name, wrapped)
"""


@pytest.mark.fault(45)
@pytest.mark.parametrize("code", ["EIO", "EACCES", "EMFILE"])
def test_unreadable_account_is_never_replaced(session: Session, code: str) -> None:
    """The ping goes without usage and says so; the next has it all, nothing twice."""
    session.charge("Stop", 2, *turn(0, 1))
    (path,) = session.accounts()
    before = path.read_bytes()
    session.add(*turn(10, 2))
    session.hook("Stop", 12)
    patch = FAILING + f"failing('open', {str(path)!r}, {code!r}, 0)"
    (ping,) = session.send(patch=patch)
    assert usage_in(ping) == NO_USAGE
    assert path.read_bytes() == before
    session.charge(END, 30, *turn(20, 4), ledger({OPUS: 7}))
    assert told(session) == (7, cost_of({OPUS: 7}))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "binary": lambda raw: bytes(255 - byte for byte in raw),
    "cut off": lambda raw: raw[: len(raw) // 2],
    "NULs": lambda raw: b"\0" * len(raw),
    "an empty object": lambda _: b"{}",
    "a list": lambda _: b"[]",
    "numbers for all": lambda raw: json.dumps(
        dict.fromkeys(json.loads(raw), 7)
    ).encode(),
    "texts for all": lambda raw: json.dumps(
        dict.fromkeys(json.loads(raw), "7")
    ).encode(),
    "lists for all": lambda raw: json.dumps(
        {key: [7] for key in json.loads(raw)}
    ).encode(),
    "40 MB": lambda raw: raw[:-1] + b" " * (40 << 20) + b"}",
}


@pytest.mark.fault(45)
@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_account_opens_anew_at_now(session: Session, case: str) -> None:
    """Nobody knows what was charged: what is in the files is not charged again, nor are
    copies of it later; what comes is. That ping says that counts are missing; no cost
    is told."""
    rows = [*turn(0, 1), message(2, 2, "b")]
    session.add(message(1, 4), to=session.agent())
    session.charge("Stop", 3, *rows)
    (path,) = session.accounts()
    path.write_bytes(DAMAGES[case](path.read_bytes()))
    ping = session.charge("StopFailure", 12, *turn(10, 8))
    assert (size_of(ping) or 0, complete(ping)) == (0, [False])
    session.add(*rows, message(101, 32), to=session.agent("copies"))
    ping = session.charge("Stop", 102, *turn(100, 16))
    assert (size_of(ping), complete(ping)) == (48, [True])
    end = session.charge(END, 110, ledger({OPUS: 99}))
    assert (size_of(end), "cost_usd" in end) == (0, False)
    assert not session.home.waiting()


def test_damaged_accounts_hide_no_lost_session(session: Session) -> None:
    """Lost sessions are found among accounts that cannot be read."""
    session.charge(START, -1)
    session.add(*turn(0, 1))
    (own,) = session.accounts()
    for i, make in enumerate([*DAMAGES.values()][:-1] * 4):
        own.with_name(f"{i:016x}.json").write_bytes(make(own.read_bytes()))
    assert sizes(session.send(at=LATER)) == [("SessionLost", 1)]


@pytest.mark.fault(47)
@pytest.mark.parametrize("code", ["EIO", "EMFILE"])
@pytest.mark.parametrize("name", ["Stop", END])
def test_failed_open_of_a_transcript_is_tried_again(
    session: Session, name: str, code: str
) -> None:
    """However old the event is, before anything is told."""
    session.charge("Stop", 2, *turn(0, 1))
    session.add(*turn(10, 2), ledger({OPUS: 3}))
    session.hook(name, 12)
    patch = FAILING + f"failing('open', {session.path.name!r}, {code!r})"
    (ping,) = session.send(patch=patch)
    assert (size_of(ping), complete(ping)) == (2, [True])


@pytest.mark.fault(47)
@pytest.mark.parametrize("what", ["session", "agent", "agent, with a ledger"])
def test_what_cannot_be_read_is_never_told_as_zero(session: Session, what: str) -> None:
    """Where every open fails, the ping says so; the tokens are on the session's next
    ping or, after its end, on a SessionLost; once, where the ledger has them, too."""
    session.hook(START, -1)
    session.charge("Stop", 2, *turn(0, 1))
    session.add(*turn(10, 2), *([ledger({OPUS: 7})] * ("ledger" in what)))
    session.add(message(11, 4), to=session.agent())
    path = session.path if what == "session" else session.agent()
    for at, name in (12, "Stop"), (20, END):
        session.hook(name, at)
        patch = FAILING + f"failing('open', {path.name!r}, 'EIO', 0)"
        assert complete(*session.send(patch=patch)) == [False]
    assert [ping["event"] for ping in session.send(at=LATER)] == ["SessionLost"]
    session.charge("Stop", LATER + 2, *turn(LATER, 8))
    assert told(session)[0] == 15


# -- What is lost is counted; the whole way --------------------------------------------


def test_tokens_of_a_refused_ping_are_counted_as_lost(session: Session) -> None:
    """Delivered pings and what is counted as lost are the ledger together."""

    def refuse(request: Request) -> int:
        return 400 if request.ping.get("input_tokens") == 2 else 200

    session.receiver.answer = refuse
    for i in range(3):
        session.add(*turn(10 * i, 1 << i))
        session.hook("Stop", 10 * i + 2)
    session.send()
    losses = session.home.state_json()["losses"]
    assert losses["tokens"] == used(2)["total_tokens"]
    assert sum(losses.values()) - losses["tokens"] == 1


def test_whole_way_of_a_session(home: Home, receiver: Receiver) -> None:
    """Real hooks, detached senders, a client that writes late, in real time: the sums
    are the ledger's."""
    live = Session(home, receiver, time.time())

    def fire(name: str, *late: Any, to: pathlib.Path | None = None) -> None:
        known = {"session_id": live.id, "transcript_path": str(live.path)}
        known["agent_transcript_path"] = str(live.agent())
        done = home.hook(event(name, **known), receiver.url)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        sent = len(receiver.requests)
        time.sleep(0.2)
        live.add(*late, to=to)
        receiver.wait_for(sent + 1, 30)

    live.add(prompt(0), message(0, 1, stop="tool_use", tools=["Agent"]))
    live.add(message(0, 2, stop="tool_use"), to=live.agent())
    fire("Stop", message(0, 4))
    late = message(time.time() - live.begun, 8)
    fire("SubagentStop", late, to=live.agent())
    fire("SessionEnd-clear", ledger({OPUS: 15, HAIKU: 16}))
    assert [size_of(ping) for ping in receiver.pings] == [7, 8, 16]
    assert told(live) == (31, cost_of({OPUS: 15, HAIKU: 16}))
    assert complete(*receiver.pings) == [True] * 3
