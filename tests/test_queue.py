"""Whose fault a failure is: no ping stands in the way of others, no bad day of the
tracker empties an outbox."""

from __future__ import annotations

import json
import time
from typing import Any, Callable, NamedTuple

import pytest

from scenes import (
    DRIP,
    RESET,
    Answers,
    Scene,
    aside,
    at,
    charges,
    every,
    let_time_pass,
    lone,
    put,
    until,
    waiting,
)
from support import ONE_LIFE, Home, Receiver, run_sender
from transcripts import OPUS, Session, cost_of, ledger, session, size_of, turn

__all__ = ["session"]  # fixtures

pytest.importorskip("fcntl", reason="locks of POSIX")

# -- The scenario sheet ----------------------------------------------------------------

TOOL, HOUR_S = "PostToolUse-Bash", 3600.0


class Row(NamedTuple):
    """A scene: 40 pings wait (of 3 tool events and Stops one is a Stop), then comes an
    event a minute, for 20 minutes. And what becomes of it."""

    answer: Answers
    aside: int = 0  # pings set aside
    charged: int = 0  # pings that wait with a charge in the end
    failures: int = 0  # failed requests, at most
    wait_s: float = 3  # of a ping that never failed, at most; of any, after over_s
    over_s: float = 0  # when the tracker is well again
    pings: int = 40
    later: list[tuple[float, Any]] = every(60, 1200, (TOOL, "Stop"))
    sessions: Callable[[int], str] = lambda _: "one"


EARLY, LONG = every(60, 3600, (TOOL, "Stop") * 20 + ("Stop",) * 20), every(60, 4500)
SHEET = {
    # Some fail. A charged one costs a request each five minutes, for an hour.
    "one 422": Row(at(422, 20), aside=1, failures=1),
    "one 500": Row(at(500, 20), charged=1, failures=5),
    "one 500, an hour": Row(at(500, 20), aside=1, failures=14, later=LONG),
    "one 403": Row(at(403, 20), charged=1, failures=5),
    "one 403, an hour": Row(at(403, 20), aside=1, failures=14, later=LONG),
    "one 409, at first": Row(
        lambda p: 409 if p.number == 9 and p.at < 9 else 200, failures=1
    ),
    "one drip": Row(at(DRIP, 20), charged=1, failures=6, wait_s=65),
    "one drip, an hour": Row(at(DRIP, 20), aside=1, failures=16, wait_s=65, later=LONG),
    "two adjacent 500": Row(at(500, 20, 21), charged=2, failures=10),
    "oldest and newest 500": Row(at(500, 0, 39), charged=2, failures=10),
    "and the newest of another event": Row(at(500, 0, 38, 39), charged=3, failures=15),
    # The third failure is the newest Stop's, which is theirs, too: a back-off.
    "ten 403 of one session": Row(
        lambda ping: 403 if ping.session == "bad" else 200,
        charged=10,
        failures=33,
        wait_s=965,
        sessions=lambda n: "bad" if n < 5 or n >= 35 else "good",
    ),
    # A new tool event alone is refused: nobody tells whose fault it is, a back-off.
    "each tool event 422": Row(
        lambda ping: 422 if ping.kind == "PostToolUse" else 200,
        aside=27 + 20,
        failures=2 * 47,
        wait_s=1025,
        later=EARLY,
    ),
    "a hundred 422": Row(
        at(422, *range(100)), aside=100, failures=100, wait_s=10, pings=140
    ),
    "a lone 500, then good ones": Row(
        at(500, 0), 0, 1, 12, 725, pings=0, later=lone(1, 180, 900)
    ),
    "two lone 500, then good ones": Row(
        at(500, 0, 1), 0, 2, 30, 905, pings=0, later=lone(1, 180, 600, 1500)
    ),
    # All fail for a while: nobody is blamed, and what is sent meanwhile is little.
    "400 for a minute": Row(until(400, 60), failures=3, wait_s=965, over_s=60),
    "400 from the middle of a pass": Row(
        until(400, 61, 1), failures=30, wait_s=965, over_s=61, pings=80
    ),
    "500 for an hour": Row(until(500, HOUR_S), 0, 0, 90, 965, HOUR_S, later=LONG),
    "resets for an hour": Row(until(RESET, HOUR_S), 0, 0, 90, 965, HOUR_S, later=LONG),
    "302 for an hour": Row(
        until(302, HOUR_S), 0, 0, 15, 7400, HOUR_S, later=every(120, 11_400)
    ),
    "500 for a day": Row(
        until(500, 24 * HOUR_S),
        0,
        0,
        435,
        1505,
        24 * HOUR_S,
        5,
        every(600, 25 * HOUR_S),
    ),
    "503, then a ping a second": Row(
        until(503, 90), 0, 0, 40, 260, 90, later=every(1, 420, (TOOL,))
    ),
    # The tracker says when.
    "429 on one, at first": Row(
        lambda p: (429, 120) if p.number == 20 and p.at < 60 else 200, 0, 0, 1, 245
    ),
    "429 on all, ten minutes": Row(until((429, 120), 600), 0, 0, 6, 245, 600),
    "503 with Retry-After on one": Row(at((503, 120), 20), 0, 0, 10, 245),
    "503 with Retry-After on all": Row(until((503, 120), 600), 0, 0, 6, 245, 600),
    "422 with Retry-After on all": Row(until((422, 120), 600), 0, 0, 6, 245, 600),
}
MARKS = {
    "one 500, an hour": pytest.mark.fault(20),
    "500 for a day": pytest.mark.fault(21),
    "a hundred 422": pytest.mark.fault(22),
    "two adjacent 500": pytest.mark.fault(54),
    "one 403, an hour": pytest.mark.fault(54),
    "one drip, an hour": pytest.mark.fault(55),
    "400 for a minute": pytest.mark.fault(57),
    "each tool event 422": pytest.mark.fault(57),
    "one 409, at first": pytest.mark.fault(58),
    "503, then a ping a second": pytest.mark.fault(59),
}


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=n, marks=MARKS.get(n, ())) for n, row in SHEET.items()],
)
def test_what_becomes_of_each(home: Home, row: Row) -> None:
    """What fails is set aside or charged, or nobody is; all else is delivered, once,
    and soon; and a tracker in trouble is left in peace."""
    scene = Scene(home, row.answer)
    kinds = ["PostToolUse", "PostToolUse", "Stop"]
    scene.play([(kinds[n % 3], row.sessions(n)) for n in range(row.pings)], row.later)
    delivered = scene.delivered()
    failed = [ping.number for ping, answer in scene.answers if answer != 200]
    state = home.state_json()
    assert len(delivered) + len(aside(home)) + len(waiting(home)) == len(scene.made) - 1
    assert len(aside(home)) == sum(state["losses"].values()) == row.aside
    assert sum(1 for count in charges(home).values() if count) == row.charged
    for path in home.waiting():
        number = int(json.loads(path.read_text())["ping"]["prompt_id"][2:])
        assert number in failed or scene.made[number] + row.wait_s > scene.made[-1]
    assert len(failed) <= row.failures
    waits = [
        then - max(scene.made[number], row.over_s)
        for number, then in delivered.items()
        if row.over_s or number not in failed
    ]
    assert max(waits) <= row.wait_s
    if row.over_s:
        assert not waiting(home)


# -- What a sender remembers of it -----------------------------------------------------


def test_poison_needs_eight_charges_and_an_hour(home: Home, receiver: Receiver) -> None:
    """A young ping is charged on and on; an old one has eight charges before it goes:
    neither a burst nor an outage blames."""
    (old,) = put(home, receiver.url, ["Stop"], time.time() - HOUR_S - 60)
    (young,) = put(home, receiver.url, ["Stop"], time.time() - HOUR_S + 600)
    receiver.answer = lambda r: 500 if r.ping["event_id"] in (old, young) else 200
    for number in range(1, 10):
        put(home, receiver.url, ["Stop"])
        run_sender(home, receiver.url)
        assert charges(home) == {young: number, **({old: number} if number < 8 else {})}
        let_time_pass(home)
    assert aside(home) == [old]
    assert home.state_json()["losses"] == {"always fails": 1}


def test_who_is_remembered_is_bounded(home: Home, receiver: Receiver) -> None:
    """State.json, which each hook reads, stays small; who was charged most is kept."""
    put(home, receiver.url, ["Stop"] * 500)
    suspects = {path.name: n % 8 for n, path in enumerate(home.waiting())}
    home.set_state(suspects=suspects)
    receiver.answer = 429
    run_sender(home, receiver.url)
    assert len(charges(home)) == 200
    assert min(charges(home).values()) == 4
    assert (home.destination() / "state.json").stat().st_size < 30_000


@pytest.mark.parametrize("error", ["BrokenPipeError(32, 'x')", "RuntimeError('odd')"])
def test_one_ping_at_which_the_sender_fails(
    home: Home, receiver: Receiver, error: str
) -> None:
    """A firewall that cuts off whoever sends it, or an error that nobody foresaw: the
    others flow, in the next pass at the latest."""
    found = put(home, receiver.url, ["Stop"] * 5)
    cut = f"""
import socket
def cut(_, sent, *__):
    if b"{found[1]}" in bytes(sent):
        raise {error}
wrap(socket.socket, "sendall", before=cut)
"""
    for _ in range(2):
        run_sender(home, receiver.url, cut + ONE_LIFE)
        let_time_pass(home)
    assert waiting(home) == [found[1]]


def test_the_newest_hundred_of_the_refused_are_kept(home: Home) -> None:
    """refused/ is for a person to look at; all are counted."""
    with Receiver() as receiver:
        found = put(home, receiver.url, ["PostToolUse"] * 120)
        receiver.answer = lambda r: 422 if r.ping["event_id"] in found else 200
        put(home, receiver.url, ["Stop"] * 10)
        run_sender(home, receiver.url)
    assert aside(home) == found[20:]
    assert home.state_json()["losses"] == {"refused: HTTP 422": 120}


# -- Each turn's tokens are its own, whatever order pings are sent in ------------------

SCENES = {"well": (200, []), "one is at work": (409, [1]), "two": (403, [1, 2])}
SCENES["all but the newest"] = 503, list(range(6))


@pytest.mark.parametrize("status, bad", SCENES.values(), ids=SCENES)
def test_each_turns_tokens_stay_its_own(
    session: Session, status: int, bad: list[int]
) -> None:
    """Of a session that an outage kept in the outbox: retried, overtaken, or sent last,
    a Stop tells its own turn, and the session's end its cost."""
    session.hook("SessionStart-startup", -1)
    for n in range(5):
        session.add(*turn(60 * n, 1 << n))
        session.hook("Stop", 60 * n + 1.5)
    session.add(ledger({OPUS: 40}))
    session.hook("SessionEnd-other", 400)
    failing = [found for n, found in enumerate(waiting(session.home)) if n in bad]
    session.receiver.answer = lambda r: status if r.ping["event_id"] in failing else 200
    session.send()
    session.receiver.answer = 200
    session.send(session.now + 7200)
    assert waiting(session.home) == []
    pings = {p["event_id"]: p for p in session.receiver.pings}.values()
    told = sorted(pings, key=lambda p: str(p["timestamp"]))
    assert [size_of(ping) for ping in told[1:]] == [1, 2, 4, 8, 16, 9]
    assert told[-1]["cost_usd"] == cost_of({OPUS: 40})
