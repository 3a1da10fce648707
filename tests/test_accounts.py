"""Usage, charged once: which ping has which tokens, and what of the ledger it tells."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shlex
import shutil
import signal
from typing import TYPE_CHECKING, Any, Callable, Iterator

import pytest

from support import SCRIPT, Home, Receiver, script_command
from transcripts import (
    DAY_S,
    END,
    HAIKU,
    OPUS,
    START,
    Session,
    cost_of,
    interrupted,
    ledger,
    message,
    prompt,
    result,
    session,
    size_of,
    summed,
    turn,
    used,
)

if TYPE_CHECKING:
    import pathlib

__all__ = ["session"]  # fixtures

Step = Callable[[Session], None]
LATER = DAY_S + 600  # a sender looks for lost sessions again


def pings_of(session: Session) -> list[dict[str, Any]]:
    """The session's pings, one for each event_id; a repeat must be the same bytes."""
    bodies: dict[str, bytes] = {}
    for request in session.receiver.requests:
        if request.ping.get("session_id") == session.id:
            event_id = request.ping["event_id"]
            assert bodies.setdefault(event_id, request.body) == request.body
    return [json.loads(body) for body in bodies.values()]


def told(session: Session) -> tuple[Any, float]:
    """The size and the cost of all the session's pings."""
    pings = pings_of(session)
    return sum(size_of(p) or 0 for p in pings), summed(pings, "cost_usd")[0]


def complete(*pings: dict[str, Any]) -> list[bool]:
    """What each says of its being complete."""
    return [ping.get("usage_complete", True) for ping in pings]


# -- A sheet of sessions: rows, events, and what each event's ping tells ---------------


def tells(
    name: str,
    at: float,
    size: int | None = None,
    cost: dict[str, int] | None = None,
    complete: bool = True,
    **env: Any,
) -> Step:
    """An event that a session is charged for, and what its ping tells: a size, the cost
    of which sizes (None: none), whether that is all."""
    wanted = size, None if cost is None else cost_of(cost), complete

    def check(session: Session) -> None:
        ping = session.charge(name, at, **env)
        found = size_of(ping), ping.get("cost_usd"), ping.get("usage_complete", True)
        assert found == wanted, (name, at)

    return check


stop, end = functools.partial(tells, "Stop"), functools.partial(tells, END)
start = functools.partial(tells, START)
resumed = functools.partial(tells, "SessionStart-resume")


def agents(row: dict[str, Any]) -> Step:
    """A row of an agent."""
    return lambda session: session.add(row, to=session.agent())


HOWS = "resume", "fork", "startup", "clear", "compact"
BROKEN_OFF = message(2, 0, stop=None), interrupted(2.1)
SHEET: dict[str, list[Any]] = {
    "new, from its start, however old its rows are": [
        *[turn(-2 * DAY_S, 4), tells("SessionStart-clear", 1), turn(2, 1), stop(4, 5)],
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
        *[start(-1), turn(0, 1), stop(2, None, TELEMHQ_USAGE=0), turn(10, 2)],
        *[stop(12, None, TELEMHQ_USAGE=0), turn(20, 4), stop(22, 4)],
        *[ledger({OPUS: 7}), end(23, 0, None)],
    ],
    "no later SessionStart begins it anew": [
        *[start(-1), turn(0, 1), stop(2, 1), turn(10, 2), ledger({OPUS: 3})],
        *[end(20, 2, {OPUS: 3}), turn(30, 4)],
        *[tells(f"SessionStart-{how}", 40) for how in HOWS],
        *[stop(45, 4), turn(50, 8), ledger({OPUS: 15}), end(60, 8, {OPUS: 12})],
    ],
    "resumed: the ledger that ends its history is the baseline": [
        *[turn(0, 1), message(3, 2), ledger({OPUS: 3, HAIKU: 4}), resumed(100)],
        *[turn(102, 8), stop(104, 8), ledger({OPUS: 11 + 16, HAIKU: 4 + 32})],
        *[end(110, 16 + 32, {OPUS: 24, HAIKU: 32})],
    ],
    "resumed after a kill: nobody knows what its ledger has of before": [
        *[turn(0, 1), ledger({OPUS: 1}), turn(3, 2), resumed(100)],
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
    "rows after an event are the next ping's, an agent's if 2 s later": [
        *[start(-1), turn(0, 1), message(2, 2), message(2.005, 4)],
        *[turn(3, 8), agents(message(3.9, 16)), agents(message(4.1, 32))],
        *[stop(2, 19), stop(10, 44)],
    ],
    "SessionEnd takes what is stamped up to 2 s after it, not a later run's": [
        *[start(-1), turn(0, 1), message(3.5, 2), ledger({OPUS: 3})],
        *[turn(30, 4), end(2, 3, {OPUS: 3}), stop(40, 4)],
    ],
    "neither tokens nor cost are ever negative": [
        *[turn(0, 1), message(2, 2), stop(3, 3), ledger({OPUS: 3})],
        *[end(5, 0, {OPUS: 3}), turn(10, 4), ledger({OPUS: 1}), end(13, 4, {})],
    ],
    "a ledger that answers follow is no last word": [
        *[start(-1), turn(0, 1), ledger({OPUS: 9}), turn(10, 2)],
        *[end(12, 3, None, False), turn(20, 4), ledger({OPUS: 19})],
        *[end(30, 16, {OPUS: 19})],
    ],
}
LEDGERS: list[tuple[dict[str, int], int]] = [  # after 3 of OPUS; what is told on top
    *[({OPUS: 3}, 0), ({OPUS + "[1m]": 3}, 0), ({OPUS + "[1m]": 7}, 4), ({}, 0)],
    *[({OPUS: 1, OPUS + "[1m]": 2}, 0), ({OPUS: 4, HAIKU: 4}, 5), ({OPUS: 2}, 0)],
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
        if callable(step):
            step(session)
        else:
            session.add(*(step if isinstance(step, tuple) else (step,)))


@pytest.mark.fault(51)
def test_session_older_than_the_installation(
    session: Session, tmp_path: pathlib.Path
) -> None:
    """What was before the script was there is history."""
    session.script = tmp_path / "hooks"
    session.script.mkdir()
    shutil.copy(SCRIPT, session.script)
    session.begun = (session.script / SCRIPT.name).stat().st_ctime - 10.0
    assert size_of(session.charge("Stop", 22, *turn(8, 1), *turn(20, 2))) == 2
    ping = session.charge(END, 30, ledger({OPUS: 3}))
    assert (size_of(ping), "cost_usd" in ping) == (0, False)


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
    branch.charge("Stop", 132, *turn(110, 16), *turn(120, 16), *turn(130, 16))
    second = branch.fork("/branch")
    second.hook("SessionStart-fork", 200)
    second.charge("Stop", 202, *turn(200, 32))
    second.charge(END, 210, ledger({OPUS: 32 + 1}))
    branch.charge(END, 310, *turn(300, 64), ledger({OPUS: 48 + 64}))
    session.charge(END, 320, *turn(315, 4), ledger({OPUS: 7}))
    assert told(session) == (7, cost_of({OPUS: 7}))
    assert told(branch) == (112, cost_of({OPUS: 112}))
    assert told(second) == (33, cost_of({OPUS: 33}))


def test_fork_whose_parents_file_is_gone(session: Session) -> None:
    """Nobody knows what its ledger has of before: no cost, nothing settled."""
    fork = parent_of(session).fork()
    session.path.unlink()
    fork.hook("SessionStart-fork", 100)
    assert ends_of(fork, {OPUS: 7, HAIKU: 8}) == (16, 0)
    assert "usage_complete" not in fork.receiver.pings[-1]


@pytest.mark.fault(90)
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "running"])
@pytest.mark.parametrize("runs", [1, 2])
def test_parent_that_goes_on_after_the_fork(
    session: Session, runs: int, ended: bool
) -> None:
    """A fork's ledger goes on from the last one that its parent's file had then; that
    of a parent in its first run begins anew. What the parent says later is its own."""
    before = {OPUS: 7, HAIKU: 8} if ended or runs == 2 else {}
    parent_of(session, ledgers=ended or runs == 2)
    if runs == 2:
        session.charge("Stop", 22, *turn(20, 1024))
        if ended:
            before[OPUS] += 1024
            session.add(ledger(before))
    fork = session.fork()
    fork.hook("SessionStart-fork", 100)
    session.add(*turn(90, 4096), ledger({OPUS: 4096 + 1024 * runs, HAIKU: 8}))
    assert ends_of(fork, before) == OWN


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


def test_ledger_settles_what_is_in_no_row(session: Session) -> None:
    """Compaction and titles are calls of no row: SessionEnd has them, the lines, and
    the cost of each model, with new tokens or without; where one model is all, the
    ping's own fields say it."""
    session.charge("Stop", 3, *turn(0, 1), message(2, 2, model=HAIKU))
    end = session.charge(END, 13, *turn(10, 2), ledger({OPUS: 7, HAIKU: 2}, (31, 12)))
    assert end["models"] == {
        OPUS: {**used(6), "cost_usd": cost_of({OPUS: 7})},
        HAIKU: {**used(0), "cost_usd": cost_of({HAIKU: 2})},
    }
    found = [end[name] for name in ("model", "lines_added", "lines_removed")]
    assert found == [OPUS, 31, 12]
    end = session.charge(END, 23, *turn(20, 4), ledger({OPUS: 11, HAIKU: 2}))
    assert (end["cost_usd"], "models" in end) == (cost_of({OPUS: 4}), False)


@pytest.mark.fault(91)
def test_two_runs_in_one_outage(session: Session) -> None:
    """Each run's tokens and cost are on its own SessionEnd, each turn's on its own
    Stop, though nothing could be delivered for a day."""
    session.hook(START, -1)
    runs = (0, 1, {OPUS: 7, HAIKU: 64}), (60, 8, {OPUS: 63, HAIKU: 192})
    for at, size, sums in runs:
        for n in range(3):
            session.add(*turn(at + 10 * n, size << n, tools=[f"Tool{at}"]))
            session.hook("Stop", at + 10 * n + 1.5)
        session.add(ledger(sums, (at, 1)))
        session.hook(END, at + 40)
        session.hook("SessionStart-resume", at + 50)
    pings = [p for p in session.send() if p["event"] != "SessionStart"]
    assert [size_of(p) for p in pings] == [1, 2, 4, 64, 8, 16, 32, 128]
    assert (pings[2]["duration_ms"], pings[4]["tools"]) == (1500, {"Tool60": 1})
    costs = [cost_of({OPUS: 7, HAIKU: 64}), cost_of({OPUS: 56, HAIKU: 128})]
    assert [pings[n]["cost_usd"] for n in (3, 7)] == costs
    assert [pings[n]["lines_added"] for n in (3, 7)] == [0, 60]
    assert complete(*pings) == [True] * 8


# -- Waiting ---------------------------------------------------------------------------

LATE = {  # event: what is there, what the client writes 0.25 s later
    "Stop": ([prompt(0)], message(1, 4)),
    "Stop, max_tokens": ([prompt(0)], message(1, 4, stop="max_tokens")),
    "Stop, a block": ([prompt(0), message(1, 4, "a", None)], message(1, 4, "a")),
    "SubagentStop": ([prompt(0)], message(1, 4)),
    END: ([prompt(0), message(1, 4)], ledger({OPUS: 5})),
}


@pytest.mark.fault(92)
@pytest.mark.parametrize("late", [True, False], ids=["late", "never"])
@pytest.mark.parametrize("case", LATE)
def test_sender_waits_for_what_the_client_writes_late(
    session: Session, case: str, late: bool
) -> None:
    """Stop fires before the turn's last row is in the file, SubagentStop before the
    agent's, SessionEnd before the ledger; a row that ended a turn before, in a
    StopFailure, is not the one. What has not come when the event is 2 s old is told,
    and rides on the session's next ping."""
    rows, row = LATE[case]
    name, path = case.partition(",")[0], session.path
    session.hook(START, -11)
    session.charge("StopFailure", -8, *turn(-10, 1, stop="max_tokens"))
    if name == "SubagentStop":
        path = session.agent()
    session.add(*rows, to=path)
    session.hook(name, 2, agent_transcript_path=str(path))
    (ping,) = session.send(2.05, later=[(2.25 if late else 4.5, path, [row])])
    there = 4 if late or len(rows) > 1 else 0
    assert (size_of(ping), complete(ping)) == (there, [late])
    if name == END:
        assert ping.get("cost_usd") == (cost_of({OPUS: 5}) if late else None)
    elif not late:
        session.add(row, to=path)
        assert size_of(session.charge("StopFailure", 9)) == 4 - there


NOT_AWAITED: list[tuple[str, Any, Any]] = [  # event, rows, size
    ("StopFailure", turn(0, 1, stop="tool_use"), 1),
    ("SubagentStop", turn(0, 1), 1),  # of an agent without a file
    *[("Stop", (), None), (END, (), None)],
]


@pytest.mark.parametrize("name, rows, size", NOT_AWAITED)
def test_nothing_else_is_waited_for(
    session: Session, name: str, rows: Any, size: int | None
) -> None:
    """Nor for a transcript that is not there (--no-session-persistence): its pings say
    that they have no counts."""
    if rows:
        session.add(*rows)
    session.hook(name, 2, agent_transcript_path=str(session.agent("compact")))
    (ping,) = session.send(2.05, later=[(3, session.path, [message(1.5, 1024)])])
    assert size_of(ping) == size
    assert complete(ping) == [bool(rows)]


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
        for place in (session.receiver, second):
            session.hook(END, 30, url=place.url)
            session.send(at=DAY_S, url=place.url)
            found = {p["event_id"]: p for p in place.pings}.values()
            assert sorted(map(size_of, found)) == [1, 2, 12]
            assert summed(found, "cost_usd") == [cost_of({OPUS: 7, HAIKU: 8})]


@pytest.mark.fault(48)
@pytest.mark.parametrize("charged", [True, False], ids=["charged", "not charged"])
def test_adopted_pings_tell_no_token_twice(session: Session, charged: bool) -> None:
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
        session.send(url=second.url)
        flush = shlex.join(script_command("flush", "--adopt", "--yes"))
        done = session.home.shell(flush, url=second.url)
        assert done.returncode == 0, done.stderr
        session.add(*turn(30, 8), ledger({OPUS: 15}))
        session.hook(END, 32, url=second.url)
        session.send(url=second.url)
        assert not session.home.waiting()
        found = {p["event_id"]: size_of(p) or 0 for p in second.pings}
        assert sum(found.values()) == 15  # the former one was told 1


@pytest.mark.fault(41)
def test_each_ping_keeps_the_settings_of_its_hook(session: Session) -> None:
    """The sender is another session's child: nothing that shapes a ping is its own."""
    sender: dict[str, Any] = {"TELEMHQ_USAGE": 0, "TELEMHQ_PROJECT": "sender"}
    sender.update(TELEMHQ_GIT=0, TELEMHQ_MACHINE="sender", TELEMHQ_TOOL_NAMES=0)
    session.add(*turn(0, 1, tools=["mcp__acme__drop"]))
    session.hook("Stop", 2, TELEMHQ_GIT=1, TELEMHQ_MACHINE="full")
    session.hook("Stop", 3, TELEMHQ_USAGE=0, TELEMHQ_PROJECT="quiet")
    pings, names = session.send(**sender), ("project", "machine", "git_branch", "tools")
    assert [[ping.get(name) for name in names] for ping in pings] == [
        ["api", "full", "main", {"mcp__acme__drop": 1}],
        ["quiet", None, None, None],
    ]
    assert list(map(size_of, pings)) == [1, None]


# A sender that opens a transcript dies.
DEADLY = """
real = os.open
os.open = lambda path, *a: os._exit(7) if "/projects/" in str(path) else real(path, *a)
"""


@pytest.mark.fault(41, 52)
def test_usage_0_opens_no_transcript(session: Session) -> None:
    """For pings of a hook with TELEMHQ_USAGE=0 none is opened, by whatever session's
    sender; nor by a sweep of today with it."""
    session.add(*turn(0, 1), ledger({OPUS: 3}))
    session.add(message(1, 2), to=session.agent())
    for name in (START, "Stop", "SessionEnd-clear"):
        session.hook(name, 2, TELEMHQ_USAGE=0)
    pings = session.send(patch=DEADLY)
    names = {"total_tokens", "models", "tools", "tool_calls", "usage_complete"}
    assert [names & set(ping) for ping in pings] == [set()] * 3
    (log,) = session.home.state.glob("*/sender.log")
    other = Session(session.home, session.receiver)
    other.charge(START, 0)
    other.add(*turn(1, 1))
    assert other.send(at=LATER, patch=DEADLY, TELEMHQ_USAGE="0") == []
    other.hook("Stop", LATER + 2)
    assert [size_of(ping) for ping in other.send(TELEMHQ_USAGE="0")] == [1]
    assert other.send(at=3 * LATER) == []  # a sweep
    assert "lost session" not in log.read_text()


# -- Sessions that ended without a word ------------------------------------------------


def test_lost_session_makes_one_ping(session: Session) -> None:
    """A session that was killed makes one SessionLost a day later: its usage, project,
    ids and hashes; the next days nothing more. Lost again, it makes another."""
    session.hook(START, -1)
    stop = session.charge("Stop", 2, *turn(0, 1))
    session.add(prompt(10), message(11, 2, "c", "tool_use", tools=["Bash"]))
    session.add(message(3000, 4, stop=None), to=session.agent())
    (own,) = session.accounts()
    own.with_name("0123456789abcdef.json").write_bytes(b"a damaged account")
    assert session.send(at=DAY_S * 0.9) == []
    (lost,) = session.send(at=DAY_S + 4000, TELEMHQ_MACHINE="midi")
    names = ("event", "status", "machine", "usage_complete", "tools")
    wanted = ["SessionLost", "success", "midi", False, {"Bash": 1}]
    assert ([lost[name] for name in names], size_of(lost)) == (wanted, 6)
    names = ("project", "session_id", "cwd_hash", "transcript_path_hash", "model")
    assert [lost[name] for name in names] == [stop[name] for name in names]
    for day in (2, 3, 40):
        assert session.send(at=DAY_S * day + 9000) == []
    session.charge("Stop", 41 * DAY_S + 2, *turn(41 * DAY_S, 8))
    session.add(*turn(41 * DAY_S + 10, 16))
    (again,) = session.send(at=43 * DAY_S)
    assert (size_of(again), again["event_id"] != lost["event_id"]) == (16, True)


@pytest.mark.fault(52)
@pytest.mark.parametrize("key", ["", "old", "new"])
def test_sweep_follows_todays_settings(session: Session, key: str) -> None:
    """What is told has no machine that is unset now, no name of a server, no hash under
    another key than today's."""
    old = {"TELEMHQ_HASH_KEY": key} if key else {}
    session.charge(START, -1, TELEMHQ_MACHINE="mini", **old)
    session.add(*turn(0, 1, tools=["mcp__acme__drop", "mcp__other__look"]))
    today: dict[str, Any] = {"TELEMHQ_HASH_KEY": "new", "TELEMHQ_TOOL_NAMES": 0}
    (lost,) = session.send(at=LATER, **today)
    other = Session(session.home, session.receiver)
    other.path = session.path
    wanted = other.charge("Notification", 0, **today)
    assert lost["tools"] == {"mcp": 2}
    assert "machine" not in lost
    assert lost["transcript_path_hash"] == wanted["transcript_path_hash"]
    assert lost.get("cwd_hash") == (wanted["cwd_hash"] if key == "new" else None)


UPDATED = """
class Newer:
    st_ctime = {}
real, os.stat = os.stat, lambda path: Newer if path.endswith("ping.py") else real(path)
"""


def test_an_update_does_not_begin_sessions_anew(session: Session) -> None:
    """What counts is when the outbox was made; not when this version came."""
    session.charge("Notification", -5)
    session.add(*turn(0, 1), *turn(10, 2))
    session.hook("Stop", 12)
    (ping,) = session.send(patch=UPDATED.format(session.begun + 5))
    assert size_of(ping) == 3


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
    accounts = session.accounts()
    assert (len(accounts) in (500, 501), own in accounts) == (True, True)
    session.charge("Stop", 100 * DAY_S + 12, *turn(100 * DAY_S + 10, 2))
    assert told(session) == (3, 0)


# -- What the disk does ----------------------------------------------------------------

FAILING = """
import errno
def failing(part, code, times=-1, writes=False):
    real, left = os.open, [times]
    def wrapped(path, flags, *args, **kwargs):
        if part in str(path) and left[0] and (flags & os.O_WRONLY or not writes):
            left[0] -= 1
            raise OSError(getattr(errno, code), os.strerror(1), path)
        return real(path, flags, *args, **kwargs)
    os.open = wrapped
"""


@pytest.mark.fault(45)
def test_unreadable_account_is_never_replaced(session: Session) -> None:
    """The ping goes without usage and says so; the next has it all, nothing twice."""
    session.charge("Stop", 2, *turn(0, 1))
    (path,) = session.accounts()
    before = path.read_bytes()
    session.add(*turn(10, 2))
    session.hook("Stop", 12)
    patch = FAILING + f"failing({str(path)!r}, 'EIO')"
    (ping,) = session.send(patch=patch)
    assert (size_of(ping), complete(ping)) == (None, [False])
    assert path.read_bytes() == before
    session.charge(END, 30, *turn(20, 4), ledger({OPUS: 7}))
    assert told(session) == (7, cost_of({OPUS: 7}))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "binary": lambda raw: bytes(255 - byte for byte in raw),
    "cut off": lambda raw: raw[: len(raw) // 2],
    "a list": lambda _: b"[]",
    "lists for objects": lambda raw: raw.replace(b"{}", b"[]"),
    "a list too long": lambda raw: raw.replace(b'"baseline":[', b'"baseline":[1,2,'),
    "inside": lambda raw: raw.replace(b'"offset":', b'"offset":"x","o":'),
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


def test_what_nobody_foresaw_is_told_as_missing(session: Session) -> None:
    """Whatever goes wrong as a transcript is read: the ping goes, and says so."""
    session.add(*turn(0, 1))
    session.hook("Stop", 2)
    patch = "os.fstat = lambda fd, real=os.fstat: real(fd) if fd < 3 else 1 / 0"
    assert complete(*session.send(patch=patch)) == [False]
    assert size_of(session.charge("Stop", 12, *turn(10, 2))) == 3


@pytest.mark.fault(47)
@pytest.mark.parametrize("what", ["session", "agent", "agent, with a ledger"])
def test_what_cannot_be_read_is_never_told_as_zero(session: Session, what: str) -> None:
    """An open that fails once is tried again, however old the event is. Where each one
    fails, the ping says so; the tokens are on the session's next ping or, after its
    end, on a SessionLost; once, where the ledger has them, too."""
    path = session.path if what == "session" else session.agent()
    session.charge(START, -1)
    session.add(message(1, 16), to=session.agent())
    session.add(*turn(0, 1))
    session.hook("Stop", 2)
    patch = FAILING + f"failing({path.name!r}, 'EMFILE', 1)"
    assert complete(*session.send(patch=patch)) == [True]
    session.add(*turn(10, 2), *([ledger({OPUS: 23})] * ("ledger" in what)))
    session.add(message(11, 4), to=session.agent())
    for at, name in (12, "Stop"), (20, END):
        session.hook(name, at)
        patch = FAILING + f"failing({path.name!r}, 'EIO')"
        assert complete(*session.send(patch=patch)) == [False]
    assert [ping["event"] for ping in session.send(at=LATER)] == ["SessionLost"]
    session.charge("Stop", LATER + 2, *turn(LATER, 8))
    assert told(session)[0] == 31


def test_transcript_that_is_longer_than_a_senders_life(session: Session) -> None:
    """What is read by then is told, and that some is missing; the next ping has it."""
    session.hook(START, -1)
    session.add(message(1, 1), message(2, 2))
    session.hook("Stop", 3)
    over = """
real, fstat, opened = time.monotonic, os.fstat, []
time.monotonic = lambda: real() + 100 * len(opened)
os.fstat = lambda fd: opened.append(fd) or fstat(fd)
"""
    session.send(patch=over)  # of the start only
    assert complete(*session.send()) == [False]
    session.charge("Stop", 10, *turn(9, 4))
    assert told(session)[0] == 7


# -- A sender that dies, or is refused by the disk, at every single step ---------------

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
        names = sorted(ping["event"] for ping in pings_of(one))
        assert names == ["Notification", "SessionEnd", "SessionEnd", "Stop"]
        assert told(one) == (15, cost_of({OPUS: 7, HAIKU: 8}))
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
    patch = FAILING + f"failing({str(account.parent)!r}, 'ENOSPC', writes=True)"
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
        names = [ping["event"] for ping in pings_of(one)]
        assert names == ["SessionStart", "SessionLost"]
        one.charge("Stop", 7 * DAY_S, *turn(7 * DAY_S - 2, 4))
        assert [size_of(ping) for ping in pings_of(one)] == [None, 3, 4]
        assert not one.home.waiting()


# -- What is lost is counted -----------------------------------------------------------


def test_tokens_of_a_refused_ping_are_counted_as_lost(session: Session) -> None:
    """Delivered pings and what is counted as lost are the ledger together."""
    session.receiver.answer = lambda r: 400 if r.ping.get("input_tokens") == 2 else 200
    for i in range(3):
        session.add(*turn(10 * i, 1 << i))
        session.hook("Stop", 10 * i + 2)
    session.send()
    losses = session.home.state_json()["losses"]
    assert losses["tokens"] == used(2)["total_tokens"]
    assert sum(losses.values()) - losses["tokens"] == 1
