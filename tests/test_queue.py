"""The queue never jams: witnesses and suspects, pacing, holds, and what else could keep
a ping from its tracker."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import ModuleType
from typing import Any, Callable, Iterable

import pytest

from support import (
    NO_THREAD,
    ONE_LIFE,
    ROOT,
    SCRIPT,
    Home,
    Receiver,
    Request,
    Wire,
    as_script,
    command,
    event,
    hook_command,
    only_enqueue,
    patched,
    place,
    pythons,
    read_request,
    run_sender,
    sender_command,
    wait_lock_free,
    wait_until,
)

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")

Answer = Callable[[Request], Any]
HOUR_S = 3600.0


def ids(requests: Iterable[Request]) -> list[str]:
    """The event_ids of requests, in the order of their arrival."""
    return [request.ping["event_id"] for request in list(requests)]


def put(home: Home, url: str, events: list[str], age_s: float = 0.0) -> list[str]:
    """Pings of these events into the outbox, oldest first; their event_ids."""
    found = place(home, url, len(events), age_s)
    paths = {path.name[21:53]: path for path in home.waiting()}
    for event_id, name in zip(found, events):
        record = json.loads(paths[event_id].read_text())
        record["ping"]["event"] = name
        paths[event_id].write_text(json.dumps(record))
    return found


def answers(found: dict[str, Any]) -> Answer:
    """An answer by event_id; 200 to the others."""
    return lambda request: found.get(request.ping["event_id"], 200)


def waiting(home: Home) -> list[str]:
    """The event_ids of what waits, oldest first."""
    return [path.name[21:53] for path in home.waiting()]


def refused(home: Home) -> list[str]:
    """The event_ids of what was set aside, oldest first."""
    return sorted(path.name[21:53] for path in home.state.glob("*/refused/*"))


def charges(home: Home) -> dict[str, int]:
    """event_id -> charges of each suspect."""
    found = home.state_json()["suspects"].items()
    return {name[21:53]: pair[0] for name, pair in found}


def let_time_pass(home: Home) -> None:
    """Back-off, pacing and the pauses of suspects end, as time would have it."""
    state = home.state_json()
    suspects = {name: [pair[0], 0] for name, pair in state["suspects"].items()}
    ended = {"not_before": 0, "paced_until": 0, "suspects": suspects}
    home.set_state(**{**state, **ended})


# -- Witnesses and suspects ------------------------------------------------------------

PLACES = {
    "oldest": [0],
    "newest": [19],
    "adjacent": [3, 4],
    "two oldest": [0, 1],
    "apart": [2, 15],
    "oldest and newest": [0, 19],
    "two oldest and newest": [0, 1, 19],
    "five adjacent": [5, 6, 7, 8, 9],
    "every third": list(range(0, 20, 3)),
}


@pytest.mark.parametrize("status", [500, 409, 403, 302])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_pings_that_always_fail_stand_in_no_others_way(
    home: Home, places: list[int], status: int
) -> None:
    """Wherever pings are that the tracker never takes: within three passes all others
    are delivered, none is set aside, and each has its charges."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 20)
        bad = [found[n] for n in places]
        receiver.answer = answers(dict.fromkeys(bad, status))
        for _ in range(3):
            run_sender(home, receiver.url)
            let_time_pass(home)
        assert waiting(home) == bad
        assert ids(receiver.requests).count(bad[0]) <= 3
        place(home, receiver.url)
        run_sender(home, receiver.url)
        assert waiting(home) == bad
        assert set(charges(home)) == set(bad)
        assert min(charges(home).values()) >= 1
        assert home.state_json()["failures"] == 0


@pytest.mark.parametrize("status", [500, 409, 403])
def test_what_always_fails_is_set_aside_in_the_end(home: Home, status: int) -> None:
    """With 8 charges and an hour of age each such ping is set aside, counted once."""
    with Receiver() as receiver:
        bad = place(home, receiver.url, 2, age_s=HOUR_S + 60)
        receiver.answer = answers(dict.fromkeys(bad, status))
        for number in range(1, 9):
            assert waiting(home) == bad
            place(home, receiver.url)
            run_sender(home, receiver.url)
            let_time_pass(home)
            assert charges(home) == (dict.fromkeys(bad, number) if number < 8 else {})
        assert refused(home) == sorted(bad)
        assert home.state_json()["losses"] == {"always fails": 2}


@pytest.mark.parametrize("status", [500, 409, 403, 400])
def test_a_lone_ping_that_fails_keeps_back_nothing_new(home: Home, status: int) -> None:
    """Where there is no witness nobody is charged; what comes later goes first."""
    with Receiver() as receiver:
        (bad,) = place(home, receiver.url)
        receiver.answer = answers({bad: status})
        for failures in (1, 2):
            run_sender(home, receiver.url)
            assert charges(home) == {bad: 0}
            assert home.state_json()["failures"] == failures
            let_time_pass(home)
        (good,) = place(home, receiver.url)
        run_sender(home, receiver.url)
        assert ids(receiver.requests) == [bad, bad, good, bad]
        assert charges(home) == ({} if status == 400 else {bad: 1})
        assert refused(home) == ([bad] if status == 400 else [])


@pytest.mark.parametrize("status", [403, 400])
def test_the_last_ping_alone_starts_no_long_backoff(home: Home, status: int) -> None:
    """Behind others that were delivered a refusal has no witness: it waits for the next
    pass, and the next hook need not wait for hours."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 3)
        receiver.answer = answers({found[2]: status})
        run_sender(home, receiver.url)
        assert waiting(home) == found[2:]
        state = home.state_json()
        assert (state["failures"], state["not_before"]) == (0, 0)
        place(home, receiver.url)
        run_sender(home, receiver.url)
        assert charges(home) == ({} if status == 400 else {found[2]: 1})
        assert refused(home) == (found[2:] if status == 400 else [])


def test_a_suspect_is_tried_every_five_minutes(home: Home, receiver: Receiver) -> None:
    """A charged ping costs a request every 5 minutes, not one at each event."""
    bad, _ = place(home, receiver.url, 2)
    receiver.answer = answers({bad: 500})
    for _ in range(6):
        place(home, receiver.url)
        run_sender(home, receiver.url)
    assert ids(receiver.requests).count(bad) == 1
    ((name, pair),) = home.state_json()["suspects"].items()
    for ago_s, tried in ((290, 1), (310, 2)):
        suspects = {name: [pair[0], time.time() - ago_s]}
        home.set_state(**{**home.state_json(), "suspects": suspects})
        place(home, receiver.url)
        run_sender(home, receiver.url)
        assert ids(receiver.requests).count(bad) == tried


def test_a_suspect_is_no_witness(home: Home) -> None:
    """Who has failed before says nothing about another: it is tried after the rest."""
    with Receiver(500) as receiver:
        found = place(home, receiver.url, 6)
        run_sender(home, receiver.url)
        assert ids(receiver.requests) == [found[0], found[1], found[5]]
        assert set(charges(home)) == {found[0], found[1], found[5]}
        let_time_pass(home)
        receiver.requests.clear()
        receiver.answer = answers({found[2]: 500})
        run_sender(home, receiver.url)
        assert ids(receiver.requests)[:3] == found[2:5]
        assert sorted(ids(receiver.requests)[3:]) == sorted([*found[:2], found[5]])
        assert waiting(home) == [found[2]]


def test_known_bad_pings_cost_a_tracker_that_is_down_one_request(home: Home) -> None:
    """Where nothing else waits, what was charged before is tried one a pass; that says
    nothing of the tracker, and starts no back-off."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 12)
        receiver.answer = answers(dict.fromkeys(found[:6], 500))
        run_sender(home, receiver.url)
        assert waiting(home) == found[:6]
        assert set(charges(home).values()) == {1}
        receiver.answer = 500
        for number in range(3):
            let_time_pass(home)
            receiver.requests.clear()
            run_sender(home, receiver.url)
            assert len(receiver.requests) == 1, number
        assert set(charges(home).values()) == {1}
        assert home.state_json()["failures"] == 0


def test_a_ping_on_which_the_server_drips(home: Home) -> None:
    """The sender that was ended over it leaves its name: the next one delivers all
    others first, and nobody after that is kept waiting for it."""
    bad: list[str] = []

    def talk(connection: socket.socket) -> None:
        raw = read_request(connection)
        seen.append(json.loads(raw.split(b"\r\n\r\n", 1)[1])["event_id"])
        connection.sendall(b"HTTP/1.1 ")
        while seen[-1] in bad:
            connection.sendall(b"2")
            time.sleep(0.1)
        connection.sendall(b"200 OK\r\nContent-Length: 0\r\n\r\n")

    seen: list[str] = []
    with Wire(talk) as wire:
        found = place(home, wire.url, 6)
        bad.append(found[1])
        run_sender(home, wire.url, TELEMHQ_TIMEOUT=1)
        assert seen == found[:2]
        assert charges(home) == {found[1]: 0}
        for number in (1, 2):
            let_time_pass(home)
            place(home, wire.url)
            run_sender(home, wire.url, TELEMHQ_TIMEOUT=1)
            assert waiting(home) == bad
            assert charges(home) == {found[1]: number}
            assert home.state_json()["failures"] == 0


def test_a_500_that_asks_for_silence_is_obeyed(home: Home) -> None:
    """A 5xx with a Retry-After ends the pass at once; but should it be about one ping
    only, that one stands in nobody's way afterwards."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 5)
        receiver.answer = answers({found[1]: (503, {"Retry-After": "120"}, b"")})
        run_sender(home, receiver.url)
        assert ids(receiver.requests) == found[:2]
        state = home.state_json()
        assert 120 <= state["not_before"] - state["set_at"] <= 133
        let_time_pass(home)
        run_sender(home, receiver.url)
        assert waiting(home) == [found[1]]


def test_one_bad_deploy_empties_no_outbox(home: Home) -> None:
    """400 to everything: three requests a pass, none set aside, all delivered later."""
    with Receiver(400) as receiver:
        found = place(home, receiver.url, 60)
        for number in range(1, 5):
            run_sender(home, receiver.url)
            assert len(receiver.requests) <= 3 * number
            assert not refused(home)
            state = home.state_json()
            assert state["failures"] == number
            assert state["not_before"] - state["set_at"] >= 450
            let_time_pass(home)
        assert waiting(home) == found
        receiver.requests.clear()
        receiver.answer = 200
        for _ in range(2):
            run_sender(home, receiver.url)
            let_time_pass(home)
        assert sorted(ids(receiver.requests)) == sorted(found)
    assert not home.state_json()["losses"]


def test_a_kind_that_is_refused_and_others_that_are_not(home: Home) -> None:
    """422 to every PostToolUse: they are set aside, the rest is delivered, in one
    pass; what is delivered on the way is a witness, too."""
    kinds = (["PostToolUse"] * 20 + ["Stop"]) * 4
    with Receiver() as receiver:
        receiver.answer = lambda r: 422 if r.ping["event"] == "PostToolUse" else 200
        found = put(home, receiver.url, kinds)
        run_sender(home, receiver.url)
        assert waiting(home) == []
        wanted = [i for i, kind in zip(found, kinds) if kind == "PostToolUse"]
        assert refused(home) == sorted(wanted)
        assert home.state_json()["losses"] == {"refused: HTTP 422": 80}


def test_a_witness_of_another_kind(home: Home) -> None:
    """It is looked for: the newest ping may be of the kind that is refused."""
    kinds = ["PostToolUse"] * 5 + ["Stop"] + ["PostToolUse"] * 9
    with Receiver() as receiver:
        receiver.answer = lambda r: 422 if r.ping["event"] == "PostToolUse" else 200
        found = put(home, receiver.url, kinds)
        run_sender(home, receiver.url)
        assert ids(receiver.requests)[:3] == [found[0], found[1], found[5]]
        assert waiting(home) == []
        assert len(refused(home)) == 14


def test_a_connection_that_breaks_at_one_ping(home: Home) -> None:
    """A firewall that cuts off whoever sends a certain ping: the others flow."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 5)
        cut = f"""
import socket
def cut(_, sent, *__):
    if b"{found[1]}" in bytes(sent):
        raise BrokenPipeError(32, "Broken pipe")
wrap(socket.socket, "sendall", before=cut)
"""
        run_sender(home, receiver.url, cut + ONE_LIFE)
        assert waiting(home) == [found[1]]
        assert charges(home) == {found[1]: 1}


def test_a_ping_that_makes_the_sender_fail(home: Home) -> None:
    """An error that nobody foresaw, at one ping: the next pass begins with others."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 5)
        odd = f"""
import socket
def odd(_, sent, *__):
    if b"{found[1]}" in bytes(sent):
        raise RuntimeError("odd")
wrap(socket.socket, "sendall", before=odd)
"""
        for _ in range(2):
            run_sender(home, receiver.url, odd + ONE_LIFE)
            let_time_pass(home)
        assert waiting(home) == [found[1]]


def test_a_witness_holds_for_25_refusals(home: Home) -> None:
    """Then another one is heard: a tracker that begins to refuse everything while an
    outbox is emptied costs it no more than that."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 80)
        receiver.answer = lambda r: 200 if r.ping["event_id"] == found[-1] else 400
        run_sender(home, receiver.url)
        assert len(refused(home)) == 2 + 25
        assert len(waiting(home)) == 80 - 1 - 27
        assert home.state_json()["failures"] == 1


def test_the_suspects_that_are_remembered_are_bounded(
    home: Home, receiver: Receiver
) -> None:
    """State.json, which each hook reads, stays small; who was charged most is kept."""
    found = place(home, receiver.url, 500)
    names = {path.name[21:53]: path.name for path in home.waiting()}
    suspects = {names[event_id]: [n % 8, 0] for n, event_id in enumerate(found)}
    home.set_state(suspects=suspects)
    receiver.answer = 429
    run_sender(home, receiver.url)
    kept = charges(home)
    assert len(kept) == 200
    assert min(kept.values()) == 4
    assert (home.destination() / "state.json").stat().st_size < 20_000


@pytest.mark.parametrize("late", [408, 425, 429])
def test_a_witness_that_says_later_speaks_for_the_tracker(
    home: Home, late: int
) -> None:
    """A 429 to the witness: the tracker's own word, the pass ends with its back-off."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 5)
        soon = late, {"Retry-After": "300"}, b""
        receiver.answer = answers({found[0]: 500, found[1]: soon})
        run_sender(home, receiver.url)
        assert ids(receiver.requests) == found[:2]
        state = home.state_json()
        assert state["problem"]["verdict"] == "not now"
        assert state["not_before"] - state["set_at"] >= 300
        assert charges(home) == {found[0]: 0}


def test_failures_in_a_row_may_differ(home: Home) -> None:
    """The back-off of a tracker that is down in several ways grows all the same."""
    with Receiver() as receiver:
        place(home, receiver.url)
        for number, status in enumerate([503, 429, 500, 408], 1):
            receiver.answer = status
            run_sender(home, receiver.url)
            assert home.state_json()["failures"] == number
            let_time_pass(home)


# -- Answers before the answer ---------------------------------------------------------


def say(interim: bytes, answer: bytes) -> Callable[[socket.socket], None]:
    """Take the request, say what comes before the answer, then the answer."""

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(interim)
        time.sleep(0.05)
        connection.sendall(answer + b"\r\nContent-Length: 0\r\n\r\n")

    return talk


INTERIM = {
    "100": b"HTTP/1.1 100 Continue\r\n\r\n",
    "102": b"HTTP/1.1 102 Processing\r\n\r\n",
    "103": b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n",
    "unknown": b"HTTP/1.1 199 Whatever\r\nRetry-After: 900\r\n\r\n",
    "several": b"HTTP/1.1 102 A\r\n\r\nHTTP/1.1 100 B\r\n\r\nHTTP/1.1 103 C\r\n\r\n",
}


@pytest.mark.parametrize("interim", INTERIM.values(), ids=INTERIM)
@pytest.mark.parametrize("status", [b"200 OK", b"503 Down"])
def test_an_interim_answer_is_no_answer(
    home: Home, interim: bytes, status: bytes
) -> None:
    """What follows a 1xx is the answer; it takes one request."""
    with Wire(say(interim, b"HTTP/1.1 " + status)) as wire:
        place(home, wire.url)
        run_sender(home, wire.url)
        assert wire.connections == 1
        assert len(waiting(home)) == (status != b"200 OK")
        if status != b"200 OK":
            assert home.state_json()["problem"]["what"] == "HTTP 503"


@pytest.mark.parametrize("python", pythons())
def test_every_python_skips_interim_answers(home: Home, python: str) -> None:
    """http.client, whose insides this uses, is the same everywhere."""
    with Wire(say(INTERIM["several"], b"HTTP/1.1 204 OK")) as wire:
        place(home, wire.url, 2)
        subprocess.run(
            sender_command(python=python), env=home.env(wire.url), timeout=30
        )
        assert wire.connections == 2
        assert waiting(home) == []


def test_a_flood_of_interim_answers(home: Home) -> None:
    """It counts as no answer, soon."""

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        while True:
            connection.sendall(INTERIM["103"] * 50)

    with Wire(talk) as wire:
        place(home, wire.url)
        begun = time.monotonic()
        run_sender(home, wire.url, TELEMHQ_TIMEOUT=2)
        assert time.monotonic() - begun < 10
        assert wire.connections == 1
    assert len(waiting(home)) == 1
    assert home.state_json()["failures"] == 1


# -- Each turn's tokens are its own, whatever order pings are sent in ------------------

TURNS = 5


def row(kind: str, at: float, **fields: Any) -> str:
    """A transcript's row, stamped `at`."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(at))
    return json.dumps({"type": kind, "timestamp": stamp, "sessionId": "s", **fields})


def session_of_turns(home: Home, url: str) -> list[str]:
    """A session of TURNS turns, a minute each, that an outage kept in the outbox: after
    the n-th turn, of n * 100 output tokens, its Stop; behind two pings of another
    session. Their event_ids, and those of the Stops and the SessionEnd."""
    transcript = home.path / "session.jsonl"
    begun, rows = time.time() - 60 * TURNS - 180, []
    others = place(home, url, 2, age_s=60 * TURNS + 300)
    outbox, stops = home.waiting()[0].parent, others
    for turn in range(TURNS + 2):
        at = begun + 60 * turn
        name = "Stop" if turn else "SessionStart-startup"
        if turn > TURNS:
            name = "SessionEnd-other"
            used = {"inputTokens": TURNS, "outputTokens": 1500}
            ledger = {"modelUsage": {"claude-x": used}, "totalCostUSD": 0.5}
            rows.append(row("cost-state", at - 1, **ledger))
        elif turn:
            usage = {"input_tokens": 1, "output_tokens": 100 * turn}
            message = {"id": f"m{turn}", "model": "claude-x", "usage": usage}
            message.update(role="assistant", content=[], stop_reason="end_turn")
            prompt = {"role": "user", "content": f"turn {turn}"}
            rows.append(row("user", at - 30, promptId=f"p{turn}", message=prompt))
            rows.append(row("assistant", at - 5, message=message))
        sent = event(name, session_id="s", transcript_path=str(transcript))
        sent["prompt_id"] = f"p{turn}"
        path = only_enqueue(home, url, sent)
        path.rename(outbox / f"{int(at * 1e9):020d}{path.name[20:]}")
        if turn:
            stops.append(path.name[21:53])
    transcript.write_text("\n".join(rows) + "\n")
    return stops


SCENES: dict[str, Callable[[list[str]], dict[str, int]]] = {
    "all well": lambda _: {},
    "another session's fail": lambda stops: dict.fromkeys(stops[:2], 500),
    "the first is still at work": lambda stops: {stops[2]: 409},
    "a middle one fails": lambda stops: {stops[4]: 500},
    "all but the newest fail": lambda stops: dict.fromkeys(stops[:-1], 503),
    "two of them fail": lambda stops: dict.fromkeys(stops[2:4], 403),
}


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES)
def test_each_turns_tokens_stay_its_own(
    home: Home, scene: Callable[[list[str]], dict[str, int]]
) -> None:
    """Retried, overtaken by a witness, or sent last: a Stop tells its own turn, and the
    session's end its cost."""
    with Receiver() as receiver:
        stops = session_of_turns(home, receiver.url)
        receiver.answer = answers(dict(scene(stops)))
        run_sender(home, receiver.url)
        receiver.answer = 200
        for _ in range(2):
            let_time_pass(home)
            run_sender(home, receiver.url)
        assert waiting(home) == []
        told = {ping["event_id"]: ping for ping in receiver.pings}
        tokens = [told[stop].get("output_tokens") for stop in stops[2:]]
        assert tokens == [100, 200, 300, 400, 500, 0]
        assert told[stops[-1]]["cost_usd"] == 0.5
    (account,) = home.state.glob("*/accounts/*.json")
    assert json.loads(account.read_text())["first"] == "SessionStart"


def test_a_409_is_no_loss(home: Home) -> None:
    """A retry while the first is still at work: it is sent again, under the same id."""
    with Receiver() as receiver:
        found = place(home, receiver.url, 3)
        receiver.answer = answers({found[0]: 409})
        run_sender(home, receiver.url)
        assert waiting(home) == found[:1]
        receiver.answer = 200
        run_sender(home, receiver.url)
        let_time_pass(home)
        run_sender(home, receiver.url)
        assert waiting(home) == []
        assert not home.state_json()["losses"]
        assert ids(receiver.requests).count(found[0]) == 2


# -- After an outage: time that is simulated -------------------------------------------


class Clock:
    """Stands for the module `time` in the script. Processes are threads, of which one
    runs at a time, and time passes only while all of them sleep."""

    def __init__(self) -> None:
        self.now = float(int(time.time()))
        self.sleepers: list[tuple[float, int, threading.Event]] = []
        self.numbers = itertools.count()
        self.processes = {threading.get_ident()}
        self.errors: list[BaseException] = []
        self.strftime, self.gmtime = time.strftime, time.gmtime

    def time(self) -> float:
        """Seconds since 1970."""
        return self.now

    def monotonic(self) -> float:
        """The same: this clock is never set."""
        return self.now

    def time_ns(self) -> int:
        """Nanoseconds since 1970, never the same twice."""
        return int(self.now * 1e9) + next(self.numbers)

    def sleep(self, seconds: float) -> None:
        """Let the others run, and this process again when its time has come."""
        if threading.get_ident() not in self.processes:
            raise SystemExit  # a watchdog: no request takes any time here
        mine = threading.Event()
        heapq.heappush(self.sleepers, (self.now + seconds, next(self.numbers), mine))
        self.hand_on()
        mine.wait()

    def hand_on(self) -> None:
        """Wake whoever is next."""
        self.now, _, sleeper = heapq.heappop(self.sleepers)
        sleeper.set()

    def start(self, work: Callable[[], None]) -> None:
        """Start a process."""
        mine = threading.Event()

        def run() -> None:
            self.processes.add(threading.get_ident())
            mine.wait()
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - told by the test
                self.errors.append(error)
            self.processes.discard(threading.get_ident())
            self.hand_on()

        heapq.heappush(self.sleepers, (self.now, next(self.numbers), mine))
        threading.Thread(target=run, daemon=True).start()


class Machine:
    """Hooks and senders of the script under a simulated clock."""

    def __init__(self, script: ModuleType, home: Home, url: str, clock: Clock) -> None:
        self.script, self.clock = script, clock
        settings = script.Settings(home.env(url))
        settings.state_dir = str(home.state)
        self.settings, self.tracker = settings, script.find_tracker(settings)
        self.outbox = script.outbox_of(settings, self.tracker)
        self.made: dict[str, float] = {}  # event_id -> when

    def hook(self, name: str) -> None:
        """What a hook does with its ping."""
        ping = {"event_id": os.urandom(16).hex(), "event": name}
        self.made[ping["event_id"]] = self.clock.now
        self.outbox.put(self.clock.time_ns(), ping, {})
        if self.outbox.state().backoff_left_s(self.clock.now):
            return
        lock = self.outbox.take_lock()
        if lock is not None:
            work = self.script.deliver_in_background
            self.clock.start(
                lambda: work(self.outbox, self.tracker, self.settings, lock)
            )


@pytest.fixture
def clock(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock by which the script goes."""
    found = Clock()
    random.seed(7)  # of the back-offs: a run is as any other
    monkeypatch.setattr(script, "time", found)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # SystemExit is none
    return found


@pytest.mark.parametrize(
    "name, per_minute, status, outage_s, after_s",
    [
        ("Stop", 20, 503, 300, 600),
        ("PostToolUse", 60, 503, 180, 480),
        ("Stop", 150, 429, 60, 400),
    ],
)
def test_a_backlog_drains_in_minutes(
    script: ModuleType,
    clock: Clock,
    home: Home,
    name: str,
    per_minute: int,
    status: int,
    outage_s: int,
    after_s: int,
) -> None:
    """After minutes of outage events go on as before: what comes after the recovery
    goes at once, the backlog bit by bit, and all of it within minutes."""
    recovered = clock.now + outage_s
    arrived: list[tuple[float, str]] = []

    def answer(request: Request) -> int:
        arrived.append((clock.now, request.ping["event_id"]))
        return 200 if clock.now >= recovered else status

    with Receiver(answer) as receiver:
        machine = Machine(script, home, receiver.url, clock)
        while clock.now < recovered + after_s:
            machine.hook(name)
            clock.sleep(60 / per_minute)
        assert clock.errors == []
        assert {event_id for _, event_id in arrived} | set(waiting(home)) == set(
            machine.made
        )
        assert len(home.waiting()) <= 2
        first = min(at for at, _ in arrived if at >= recovered)
        for at, event_id in arrived:  # the recovery is noticed at `first`
            if machine.made[event_id] > first:
                assert at - machine.made[event_id] < 2
        backlog = [at for at, event_id in arrived if machine.made[event_id] <= first]
        assert 25 <= sum(1 for at in backlog if first <= at < first + 25) <= 26
        assert sum(1 for at, _ in arrived if at < recovered) < 3 * 20
    assert not home.state_json()["losses"]


def test_a_ping_a_second_for_long(script: ModuleType, clock: Clock, home: Home) -> None:
    """After the backlog is gone nothing gathers again, and nothing is paced."""
    recovered = clock.now + 60

    def answer(_: Request) -> int:
        return 200 if clock.now >= recovered else 503

    with Receiver(answer) as receiver:
        machine = Machine(script, home, receiver.url, clock)
        most = 0
        for second in range(1000):
            machine.hook("PostToolUse")
            clock.sleep(1)
            if second > 600:
                most = max(most, len(machine.outbox.waiting()))
        assert clock.errors == []
        assert most <= 2
    assert not home.state_json()["losses"]


FLEET, EVERY_S = (
    10_000,
    60.0,
)  # machines; seconds from one ping of a machine to its next


def returns_after(script: ModuleType, verdict: str, outage_s: float) -> float:
    """When a machine that failed all through an outage first comes after its end."""
    at, failures = random.uniform(0, EVERY_S), 0
    while at < outage_s:
        failures += 1
        at += script.backoff_s(verdict, failures, None, at)
        at += random.uniform(0, EVERY_S)  # the next event's hook
    return at


@pytest.mark.parametrize(
    "verdict, outage_s",
    [("hold", 1800.0), ("hold", HOUR_S), ("hold", 2 * HOUR_S), ("not now", 900.0)],
)
def test_a_fleet_does_not_come_back_in_a_wave(
    script: ModuleType, verdict: str, outage_s: float
) -> None:
    """10,000 machines after an hour of 302: no minute has more than 4 times the steady
    rate of requests."""
    random.seed(20)
    minutes, back = [0] * 24 * 60, [0] * 24 * 60
    for _ in range(FLEET):
        at = returns_after(script, verdict, outage_s)
        back[int(at // 60) + 1] += 1
        backlog, share = int(at / EVERY_S), script.PACE_PINGS
        while backlog > 0:
            sent = min(share, backlog)
            minutes[int(at // 60)] += sent
            backlog, share = backlog - sent, 2 * share
            at += random.uniform(*script.PACE_S)
    live = itertools.accumulate(back)  # what is made since goes at once
    found = [old + new for old, new in zip(minutes, live)]
    assert found[-1] == FLEET  # the steady rate
    assert max(found) <= 4 * FLEET


# -- A state that cannot be written ----------------------------------------------------


@pytest.mark.parametrize("retry_after", [{}, {"Retry-After": "600"}], ids=["", "600 s"])
@pytest.mark.parametrize("foreground", ["0", "1"])
def test_a_backoff_that_cannot_be_written_holds_in_memory(
    home: Home, retry_after: dict[str, str], foreground: str
) -> None:
    """state.json cannot be written, the server says 429, hooks come as fast as they
    can: at most one request a second."""
    with Receiver(lambda _: (429, retry_after, b"")) as receiver:
        place(home, receiver.url)
        (home.destination() / "state.json").mkdir()
        (home.destination() / "state.json" / "kept").touch()
        begun = time.monotonic()
        while time.monotonic() < begun + 4:
            home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND=foreground)
        took = time.monotonic() - begun
        assert 1 <= len(receiver.requests) <= took + 1
    assert len(home.waiting()) >= 3


# -- The foreground --------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 503])
def test_fifty_thousand_in_the_foreground(home: Home, status: int) -> None:
    """However much waits, a hook that delivers ends within its 8 s; the newest 5,000
    are kept, the loss is counted."""
    with Receiver(status) as receiver:
        place(home, receiver.url)
        (first,) = home.waiting()
        ns = int(first.name[:20])
        for n in range(1, 50_000):
            os.link(first, first.parent / f"{ns - n:020d}{first.name[20:]}")
        begun = time.monotonic()
        run = home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND="1")
        assert time.monotonic() - begun < 9
        assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
        left = len(home.waiting())
        lost = home.state_json().get("losses", {}).get("outbox full", 0)
        assert lost > 1000
        accepted = len(receiver.requests) if status == 200 else 0
        # A slow machine has it killed; some were counted then, and not yet removed.
        assert 50_001 <= left + lost + accepted <= 50_001 + 101


def test_four_hundred_lost_sessions_in_the_foreground(
    home: Home, receiver: Receiver
) -> None:
    """The daily sweep of a slow disk ends with the hook's time, too."""
    path = only_enqueue(home, receiver.url)
    accounts = home.destination() / "accounts"
    accounts.mkdir()
    for n in range(400):
        account = accounts / f"{n:016x}.json"
        account.write_text("{}")
        os.utime(account, (time.time() - 2 * 86400,) * 2)
    slow = """
real_lstat = os.lstat
def lstat(path, **kwargs):
    if "/accounts/" in str(path):
        time.sleep(0.1)
    return real_lstat(path, **kwargs)
os.lstat = lstat
"""
    begun = time.monotonic()
    patched(home, slow, "foreground", "3", path.name, url=receiver.url)
    assert time.monotonic() - begun < 5
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("variable", ["TELEMHQ_FOREGROUND", "TELEMHQ_HOOK_DEBUG"])
def test_a_foreground_hook_lists_again_after_it_unlocked(
    home: Home, receiver: Receiver, variable: str, moment: str
) -> None:
    """A background hook that comes around the unlock leaves nothing behind."""
    path = only_enqueue(home, receiver.url)
    beside = f"""
import subprocess
seen = []
def beside(fd, how):
    if how & fcntl.LOCK_UN and not seen:
        seen.append(1)
        hook = {hook_command()!r}
        subprocess.run(hook, input={json.dumps(event("Stop")).encode()!r},
            env={home.env(receiver.url)!r})
wrap(fcntl, "flock", {moment}=beside)
"""
    env: dict[str, Any] = {variable: "1"}
    patched(home, beside, "foreground", "8", path.name, url=receiver.url, **env)
    home.quiet()
    assert len(set(ids(receiver.requests))) == 2
    assert waiting(home) == []


def test_a_foreground_hook_obeys_a_backoff_to_the_letter(
    home: Home, receiver: Receiver
) -> None:
    """Where a back-off stands it does not wait for the lock of a sender at work."""
    place(home, receiver.url)
    now = time.time()
    home.set_state(failures=3, set_at=now - 5, not_before=now + 500)
    with open(home.destination() / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begun = time.monotonic()
        home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND="1")
        assert time.monotonic() - begun < 3
    assert receiver.requests == []


# -- What else could go wrong ----------------------------------------------------------


@pytest.mark.parametrize("source", ["endless", "1 GB"])
def test_a_stdin_without_bounds(
    home: Home, receiver: Receiver, tmp_path: pathlib.Path, source: str
) -> None:
    """At most 5 s and 256 MB are read of stdin, however fast it comes; beyond that the
    event is none."""
    path = pathlib.Path("/dev/zero")
    if source == "1 GB":
        path = tmp_path / "large"
        with open(path, "wb") as file:
            file.truncate(1 << 30)
    begun = time.monotonic()
    with open(path, "rb") as file:
        hook = subprocess.Popen(
            ["/bin/sh", "-c", command()],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=home.env(receiver.url),
        )
        assert hook.stdout
        with hook.stdout:
            assert hook.stdout.read() == b""
        _, status, used = os.wait4(hook.pid, 0)
        hook.returncode = status
    assert status == 0
    assert time.monotonic() - begun < 8
    # PyPy, and Pythons with free threads, give back late what they have freed.
    has_gil: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
    most_mb = 400 if has_gil and sys.implementation.name == "cpython" else 900
    assert used.ru_maxrss < most_mb << 10  # KB
    assert home.waiting() == []


def put_full_fifo(path: pathlib.Path) -> int:
    """A FIFO whose reader never reads, and which can take no more."""
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    return reader


LOGS: dict[str, Callable[[pathlib.Path], object]] = {
    "FIFO": os.mkfifo,
    "full FIFO": put_full_fifo,
    "directory": pathlib.Path.mkdir,
    "link": lambda path: path.symlink_to("/dev/full"),
}


@pytest.mark.parametrize("make", LOGS.values(), ids=LOGS)
def test_a_log_that_cannot_be_written(
    home: Home, receiver: Receiver, make: Callable[[pathlib.Path], object]
) -> None:
    """Whatever sender.log is, the sender goes on, and gives the lock back."""
    place(home, receiver.url, 2)
    make(home.destination() / "sender.log")
    run_sender(home, receiver.url)
    assert len(receiver.requests) == 2
    wait_lock_free(home.destination() / "lock", 1)
    receiver.answer = 503
    place(home, receiver.url)
    run_sender(home, receiver.url)
    assert home.state_json()["failures"] == 1


def test_without_a_thread_pings_are_delivered(home: Home, receiver: Receiver) -> None:
    """No thread to be had for the watchdog: delivery goes on; the log says so, once."""
    place(home, receiver.url, 3)
    run = run_sender(home, receiver.url, NO_THREAD + ONE_LIFE)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert len(receiver.requests) == 3
    assert waiting(home) == []
    assert (home.destination() / "sender.log").read_text().count("no thread") == 1


def drip(connection: socket.socket) -> None:
    """An answer that never ends, a byte at a time."""
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"y")
        time.sleep(0.1)


def test_without_a_thread_an_endless_answer_is_cut_off(home: Home) -> None:
    """It ends by an alarm, counts as a failure, and a back-off stands."""
    with Wire(drip) as wire:
        place(home, wire.url, 2)
        begun = time.monotonic()
        run_sender(home, wire.url, NO_THREAD + ONE_LIFE, TELEMHQ_TIMEOUT=1)
        assert time.monotonic() - begun < 10
        assert wire.connections == 2
    state = home.state_json()
    assert (state["failures"], len(waiting(home))) == (1, 2)
    assert state["not_before"] > state["set_at"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
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
        home.hook(event("PostToolUse-Bash"), wire.url, TELEMHQ_TIMEOUT=1)
        wait_until(lambda: wire.connections == 1)
        home.quiet()
        assert wire.connections == 1
    assert not home.state.exists()


def signalled(
    home: Home, url: str, *arguments: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a hook or sender that gets a SIGINT at each line of the script that is run
    while it is imported, and at the first of each of its functions."""
    patch = """
lines = [0]
def trace(frame, kind, _):
    if not frame.f_code.co_filename.endswith("telemhq_ping.py"):
        return None
    if frame.f_lineno > FIRST:
        lines[0] += 1
        os.kill(os.getpid(), signal.SIGINT)
    return trace if frame.f_code.co_name == "<module>" else None
sys.settrace(trace)
"""
    source = SCRIPT.read_text().split("\n")
    first = next(n for n, line in enumerate(source, 1) if "SIG_IGN)" in line)
    patch = patch.replace("FIRST", str(first))
    sent = b"" if arguments else event("Stop")
    return patched(home, patch, *arguments, url=url, sent=sent)


def test_a_sigint_is_not_meant_for_the_hook(home: Home, receiver: Receiver) -> None:
    """Ctrl-C in Claude Code's terminal, at any line from our first on: no traceback,
    and the event is reported."""
    run = signalled(home, receiver.url)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    receiver.wait_for(1)
    home.quiet()


def test_a_sigint_is_not_meant_for_the_sender(home: Home, receiver: Receiver) -> None:
    """Nor does it end a sender, which a foreground hook has in its process group."""
    path = only_enqueue(home, receiver.url)
    run = signalled(home, receiver.url, "foreground", "8", path.name)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("line", [command(), as_script()], ids=["imported", "script"])
def test_a_sigint_to_the_group_while_it_waits(home: Home, line: str) -> None:
    """A Ctrl-C reaches hook and foreground sender together: both finish their work."""

    def answer(_: Request) -> int:
        os.killpg(hook.pid, signal.SIGINT)
        time.sleep(0.3)
        return 200

    with Receiver(answer) as receiver:
        hook = subprocess.Popen(
            ["/bin/sh", "-c", line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=home.env(receiver.url, TELEMHQ_FOREGROUND="1"),
            start_new_session=True,
        )
        out, _ = hook.communicate(json.dumps(event("Stop")).encode(), 30)
        assert (hook.returncode, out) == (0, b"")
        assert len(receiver.requests) == 1
    assert waiting(home) == []


def test_a_command_can_be_interrupted() -> None:
    """Who runs a command gets what Ctrl-C means."""
    code = "import signal, sys; sys.path.insert(0, sys.argv.pop()); import telemhq_ping"
    code += "; print(signal.getsignal(2) is signal.default_int_handler)"
    for words in (["doctor"], ["--help"]):
        python = [sys.executable, "-I", "-c", code, *words, str(ROOT)]
        assert subprocess.check_output(python) == b"True\n"


@pytest.mark.parametrize("python", pythons())
def test_ignoring_a_signal_costs_the_hook_no_module(python: str) -> None:
    """The public `signal` imports enum, some milliseconds: it is not imported."""
    look = "import sys, telemhq_ping; print('signal' in sys.modules)"
    done = subprocess.run([python, "-ESc", look], cwd=str(ROOT), stdout=subprocess.PIPE)
    assert done.stdout == b"False\n"


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_python_whose_private_signal_module_has_changed(
    home: Home, receiver: Receiver, change: str
) -> None:
    """Then the public one is asked; the hook reports all the same."""
    patch = {
        "gone": 'sys.modules["_signal"] = None\n',
        "changed": 'import types; sys.modules["_signal"] = types.ModuleType("x")\n',
    }[change]
    ignored = home.path / "ignored"
    patch += f"""
def spawn(*_, **__):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        os.mkdir({str(ignored)!r})
os.posix_spawn = spawn
"""
    run = patched(home, patch, url=receiver.url, sent=event("Stop"))
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert len(home.waiting()) == 1
    assert ignored.exists()


@pytest.mark.parametrize("line", [command(), as_script()], ids=["imported", "script"])
def test_an_empty_home_is_no_home(
    home: Home, receiver: Receiver, tmp_path: pathlib.Path, line: str
) -> None:
    """HOME="" and no place named: nothing is written anywhere, and nothing fails."""
    before = sorted(os.listdir("/"))
    run = subprocess.run(
        ["/bin/sh", "-c", line],
        input=json.dumps(event("Stop")).encode(),
        capture_output=True,
        env={**home.env(receiver.url, TELEMHQ_FOREGROUND="1"), "HOME": ""},
        cwd=tmp_path,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert receiver.requests == []
    assert sorted(os.listdir("/")) == before
    assert not list(home.path.rglob("telemhq*"))
    assert os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("chars", [5_000, 70_000])
@pytest.mark.parametrize("key", ["transcript_path", "agent_transcript_path", "cwd"])
def test_a_path_that_no_system_could_open(
    home: Home, receiver: Receiver, key: str, chars: int
) -> None:
    """A ping with a path of any length goes, without usage if it must."""
    sent = event("SubagentStop", **{key: "/" + "x" * chars + ".jsonl"})
    home.hook(sent, receiver.url, TELEMHQ_FOREGROUND="1")
    (ping,) = receiver.pings
    assert ping["event"] == "SubagentStop"
    assert waiting(home) == []
    assert refused(home) == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_ping_in_the_last_moment_of_a_life(
    home: Home, receiver: Receiver, moment: str
) -> None:
    """A sender whose life is over gives the lock back; the hook that found it busy has
    counted on it: so it begins another life."""
    place(home, receiver.url)
    late = f"""
import subprocess
real, gone, seen = time.monotonic, [], []
time.monotonic = lambda: real() + 100 * len(gone)
wrap(os, "unlink", after=lambda path, *_: gone or gone.append(path))
def beside(fd, how):
    if how & fcntl.LOCK_UN and not seen:
        seen.append(1)
        hook = {hook_command()!r}
        subprocess.run(hook, input={json.dumps(event("Stop")).encode()!r},
            env={home.env(receiver.url)!r})
wrap(fcntl, "flock", {moment}=beside)
"""
    run_sender(home, receiver.url, late)
    home.quiet()
    assert len(set(ids(receiver.requests))) == 2
    assert waiting(home) == []


def test_a_ping_in_the_last_moment_of_a_paced_pass(
    home: Home, receiver: Receiver
) -> None:
    """While a backlog is paced, what came around the unlock goes at once."""
    found = place(home, receiver.url, 40, age_s=60)
    home.set_state(failures=1, set_at=1, not_before=2)
    beside = f"""
import subprocess
seen = []
def beside(fd, how):
    if how & fcntl.LOCK_UN and not seen:
        seen.append(1)
        hook = {hook_command()!r}
        subprocess.run(hook, input={json.dumps(event("Stop")).encode()!r},
            env={home.env(receiver.url)!r})
wrap(fcntl, "flock", before=beside)
"""
    run_sender(home, receiver.url, beside + ONE_LIFE)
    assert ids(receiver.requests)[:25] == found[:25]
    assert len(receiver.requests) == 26
    assert len(waiting(home)) == 15
