"""Usage at every tracker: each shows what the client itself says, to the token."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
import uuid
from typing import TYPE_CHECKING, Any, Iterator

import pytest

import trackers
from support import FIXTURES, Home, Receiver, Request, sender_command, start_patched
from test_usage import OPUS, Replay, Session, ledger, message, prompt, turn

if TYPE_CHECKING:
    import pathlib
    from types import ModuleType

EXACT = ("parallel", "resume", "subagent", "tools")


class Fleet:
    """All five trackers, and one HOME whose pings go to them."""

    def __init__(
        self, home: Home, script: ModuleType, kinds: Any = trackers.ALL
    ) -> None:
        self.home, self.script = home, script
        self.places: dict[str, Any] = {cls.kind: cls() for cls in kinds}
        self.environ = {"TELEMHQ_DESTINATIONS": ",".join(self.places)}
        for place in self.places.values():
            self.environ.update(place.env())
        settings = script.Settings({**self.environ, "HOME": str(home.path)})
        found, problems = script.find_trackers(settings, script.read_secret)
        assert problems == []
        self.trackers = {tracker.kind: tracker for tracker in found}

    def base(self, kind: str) -> pathlib.Path:
        """A destination's directory."""
        return self.home.state / str(self.trackers[kind].directory_name())

    def env(self, **more: object) -> dict[str, str]:
        """The environment of hooks and senders."""
        return self.home.env(**{**self.environ, **more})  # type: ignore[arg-type]

    def hold(self, session: Session, name: str, at: float, **fields: object) -> str:
        """Put the ping of an event into every outbox whose tracker wants it, as a hook
        would have; its event_id."""
        ns = int((session.begun + at) * 1e9)
        ping: dict[str, Any] = {
            **self.script.ORIGIN,
            "event_id": uuid.uuid4().hex,
            "event": name,
            "timestamp": self.script.iso_time(ns),
            "status": "success",
            "project": "api",
            "session_id": session.id,
            **fields,
        }
        local = {"transcript": str(session.path), "git": False}
        for kind, tracker in self.trackers.items():
            if tracker.wants(ping):
                beside = {"own": tracker.frozen(ping)}
                outbox = self.script.Outbox(str(self.base(kind)), tracker.needs)
                old = os.umask(0o077)
                outbox.put(
                    ns, ping, local, self.script.gate_beside(beside, outbox.needs)
                )
                os.umask(old)
        return str(ping["event_id"])

    def send(self, *kinds: str, **more: object) -> None:
        """Run a sender for each destination, all at once, to their ends."""
        senders = [
            subprocess.Popen(
                sender_command("detached", "-1", self.base(kind).name),
                env=self.env(**more),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for kind in kinds or self.places
            if self.base(kind).is_dir()
        ]
        for process in senders:
            out, _ = process.communicate(timeout=90)
            assert (process.returncode, out) == (0, b"")

    def totals(self) -> dict[str, dict[str, int]]:
        """What each tracker shows."""
        return {kind: place.totals() for kind, place in self.places.items()}

    def check(self, *counts: int) -> None:
        """Each shows these counts; none was told anything that it may not be told."""
        expected = dict(zip(trackers.COUNTS, counts))
        assert self.totals() == dict.fromkeys(self.places, expected)
        assert [place.faults for place in self.places.values() if place.faults] == []
        assert self.home.waiting() == []

    def close(self) -> None:
        """End all receivers."""
        for place in self.places.values():
            place.close()


@pytest.fixture
def fleet(
    request: pytest.FixtureRequest, home: Home, script: ModuleType
) -> Iterator[Fleet]:
    """All five trackers, or those that `only` names."""
    found = Fleet(home, script, getattr(request, "param", trackers.ALL))
    yield found
    found.close()


def only(*kinds: type[trackers.Strict]) -> pytest.MarkDecorator:
    """A test with these trackers alone."""
    return pytest.mark.parametrize("fleet", [kinds], indirect=True, ids=[""])


@pytest.fixture
def session(home: Home, receiver: Receiver) -> Session:
    """A session that began an hour ago, still without rows."""
    return Session(home, receiver)


def counts(n: int) -> tuple[int, int, int, int]:
    """What a tracker shows of messages of size n in all (see test_usage)."""
    return n, 3 * n, 5 * n, 7 * n


def of_kind(fleet: Fleet, kind: str) -> Any:
    """One of the receivers."""
    return fleet.places[kind]


# -- Real transcripts ------------------------------------------------------------------


def play(
    fleet: Fleet, replay: Replay, registered: str, seed: int, by_row: bool
) -> None:
    """Event by event, with a cut of the transcripts on disk at each of them."""
    chance = random.Random(f"{registered} {seed}")
    names = replay.REGISTERED[registered]
    events = [found for found in replay.events if found[1] in names]
    begin, last = replay.prompted() + 0.001, events[-1][0]
    if registered != "SessionEnd alone":
        times = [at for _, _, _, at in replay.rows() if begin < at < last]
        if not by_row:
            times = [chance.uniform(begin, last) for _ in range(3)]
        events.extend((at, "Stop", {}) for at in times)
    events.sort(key=lambda found: found[:2])
    cuts = {path: replay.cuts(path, events, chance, by_row) for path in replay.files}
    for i, (at, name, fields) in enumerate(events):
        replay.show({path: cuts[path][i] for path in cuts})
        fleet.hold(replay.session, name, at, **fields)
        fleet.send()


@pytest.mark.parametrize("registered", sorted(Replay.REGISTERED))
@pytest.mark.parametrize("name", EXACT)
def test_every_tracker_shows_the_clients_own_sums(
    fleet: Fleet, receiver: Receiver, name: str, registered: str
) -> None:
    """However much of a transcript is there at each event, and whatever events are
    registered: the five show the same, and it is what the client says."""
    replay = Replay(name, fleet.home, receiver)
    play(fleet, replay, registered, 1, by_row=False)
    wanted = replay.expected["unique_messages_total"]
    fleet.check(
        wanted["input_tokens"],
        wanted["output_tokens"],
        wanted["cache_read_input_tokens"],
        wanted["cache_creation_input_tokens"],
    )
    (found,) = of_kind(fleet, "claude-metrics").sessions.values()
    total = sum(n for key, n in wanted.items() if key != "output_tokens")
    assert found["tokens_in_total"] == total
    assert found["tokens_out_total"] == wanted["output_tokens"]
    # Nothing that a person said or did reached any of them.
    for kind, place in fleet.places.items():
        everything = place.everything()
        assert b"CANARY" not in everything, kind
        assert b"/home/dev" not in everything, kind


def test_real_messages_keep_their_own_ids(fleet: Fleet, receiver: Receiver) -> None:
    """wigtoken's rows are the API's messages, by id, model and time."""
    replay = Replay("tools", fleet.home, receiver)
    play(fleet, replay, "Stop and SessionEnd", 1, by_row=False)
    rows = of_kind(fleet, "wigtoken").rows
    real = {
        row["message"]["id"]: row
        for _, row, _, _ in replay.rows()
        if row["type"] == "assistant"
    }
    plain = {key: row for key, row in rows.items() if "." not in key}
    assert set(plain) <= set(real)
    assert len(plain) >= len(real) - 1
    for key, row in plain.items():
        assert row["model"] == real[key]["message"]["model"]
        assert row["machine"] == "laptop"


# -- Messages that grow, the ledger's rest, sessions that end --------------------------


def test_growth_after_a_charge_is_a_row_of_its_own(
    fleet: Fleet, session: Session
) -> None:
    """The server keeps the first row of an id: what comes later goes as the difference,
    under an id that tells it."""
    fleet.hold(session, "SessionStart", 0, source="startup")
    session.add(prompt(1), message(2, 1, "msg_1"))
    fleet.hold(session, "Stop", 3)
    fleet.send()
    session.add(message(4, 4, "msg_1"), message(4, 2, "msg_2"), message(5, 8, "msg_2"))
    fleet.hold(session, "Stop", 6)
    fleet.send()
    session.add(message(7, 16, "msg_1"))
    fleet.hold(session, "SessionEnd", 8)
    fleet.send()
    rows = of_kind(fleet, "wigtoken").rows
    assert {key: row["input_tokens"] for key, row in rows.items()} == {
        "msg_1": 1,
        "msg_1.12": 3,
        "msg_2": 8,
        "msg_1.48": 12,
    }
    fleet.check(*counts(24))


def test_what_no_message_has_is_a_row_a_model(fleet: Fleet, session: Session) -> None:
    """Compaction and titles stand in the client's ledger only."""
    fleet.hold(session, "SessionStart", 0, source="startup")
    session.add(*turn(1, 1), ledger({OPUS: 5, "claude-haiku-5": 2}, 0.5))
    key = fleet.hold(session, "SessionEnd", 9)
    fleet.send()
    rows = of_kind(fleet, "wigtoken").rows
    rest = {k: row["input_tokens"] for k, row in rows.items() if k.startswith(key)}
    assert rest == {f"{key}.{OPUS}": 4, f"{key}.claude-haiku-5": 2}
    assert len(rows) == 3
    fleet.check(*counts(7))


def test_what_was_charged_too_much_is_taken_off(fleet: Fleet, session: Session) -> None:
    """A later row of a message may say less of one count: the sums stay those of the
    pings, everywhere."""
    usage = {"input_tokens": 100, "output_tokens": 1}
    session.add(prompt(1), message(2, 0, "msg_1", usage=usage))
    fleet.hold(session, "SessionStart", 0, source="startup")
    fleet.hold(session, "Stop", 3)
    fleet.send()
    usage = {"input_tokens": 40, "output_tokens": 5}
    session.add(message(4, 0, "msg_1", usage=usage))
    fleet.hold(session, "Stop", 5)
    fleet.send()
    usage = {"input_tokens": 90, "output_tokens": 5}
    session.add(message(6, 0, "msg_2", usage=usage))
    fleet.hold(session, "SessionEnd", 7)
    fleet.send()
    fleet.check(130, 10, 0, 0)


@pytest.mark.parametrize("id_", ["has space", "x" * 200, "é", "/home/dev/CANARY"])
def test_message_whose_id_is_no_identifier_counts(
    fleet: Fleet, session: Session, id_: str
) -> None:
    """The id stays home, the tokens go."""
    fleet.hold(session, "SessionStart", 0, source="startup")
    session.add(prompt(1), message(2, 3, id_))
    key = fleet.hold(session, "SessionEnd", 3)
    fleet.send()
    assert set(of_kind(fleet, "wigtoken").rows) == {f"{key}.{OPUS}"}
    fleet.check(*counts(3))


def test_models_name_that_the_gate_refuses_is_other(
    fleet: Fleet, session: Session
) -> None:
    """At every tracker."""
    fleet.hold(session, "SessionStart", 0, source="startup")
    session.add(prompt(1), message(2, 3, "msg_1", model="vendor/CANARY"))
    fleet.hold(session, "SessionEnd", 3)
    fleet.send()
    assert of_kind(fleet, "wigtoken").rows["msg_1"]["model"] == "other"
    fleet.check(*counts(3))
    assert all(b"CANARY" not in p.everything() for p in fleet.places.values())


def test_session_that_goes_on_is_told_on(fleet: Fleet, session: Session) -> None:
    """Recorder gets a session's totals at its end; of one that is resumed, at its next
    end what it used since."""
    recorder = of_kind(fleet, "recorder")
    fleet.hold(session, "SessionStart", 0, source="startup")
    session.add(*turn(1, 1))
    fleet.hold(session, "Stop", 3)
    fleet.send()
    assert recorder.points == []
    session.add(*turn(4, 2))
    fleet.hold(session, "SessionEnd", 6)
    fleet.send()
    assert [point["value"] for point in recorder.points] == list(counts(3))
    fleet.hold(session, "SessionStart", 10, source="resume")
    session.add(*turn(11, 4))
    fleet.hold(session, "SessionEnd", 13)
    fleet.send()
    assert [point["value"] for point in recorder.points[4:]] == list(counts(4))
    (found,) = of_kind(fleet, "claude-metrics").sessions.values()
    assert found["tokens_out_total"] == 3 * 7
    fleet.check(*counts(7))


@pytest.mark.parametrize("charged", [False, True])
def test_lost_session_is_told_everywhere(
    fleet: Fleet, session: Session, charged: bool
) -> None:
    """After kill -9: a day later, once, with the machine and prefix it had; also where
    all of it was charged before, and only the end was never told."""
    fleet.hold(session, "SessionStart", 0, source="startup")
    session.add(*turn(1, 3))
    fleet.hold(session, "Stop", 3)
    fleet.send()
    if not charged:
        session.add(*turn(4, 4))
    for kind in fleet.places:
        for path in fleet.base(kind).glob("accounts/*.json"):
            os.utime(str(path), (time.time() - 90000, time.time() - 90000))
        state = fleet.base(kind) / "state.json"
        told = json.loads(state.read_text()) if state.exists() else {}
        state.write_text(json.dumps({**told, "swept_at": 0}))
    others = {"RECORDER_PREFIX": "", "WIGTOKEN_MACHINE": "other"}
    for _ in range(2):
        fleet.send(**others)
    fleet.check(*counts(3 if charged else 7))
    points = of_kind(fleet, "recorder").points
    assert len(points) == 4
    assert points[0]["name"] == "System/Code/api/Tokens/Input"
    machines = {row["machine"] for row in of_kind(fleet, "wigtoken").rows.values()}
    assert machines == {"laptop"}


def test_usage_off_sends_no_tokens_anywhere(fleet: Fleet, session: Session) -> None:
    """TELEMHQ_USAGE=0: what is made of tokens alone is not even queued."""
    session.add(*turn(1, 3))
    environ: dict[str, Any] = {**fleet.environ, "TELEMHQ_USAGE": "0"}
    for name in ("Stop", "SessionEnd-other"):
        fields = {"session_id": session.id, "transcript_path": str(session.path)}
        sent = trackers_event(name, **fields)
        done = fleet.home.hook(sent, **environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    of_kind(fleet, "otlp").wait_for(2)
    fleet.home.quiet()
    fleet.check(*counts(0))
    assert not fleet.base("wigtoken").exists()
    assert not fleet.base("recorder").exists()
    assert of_kind(fleet, "otlp").records


def trackers_event(name: str, **changes: object) -> dict[str, Any]:
    """A real event."""
    text = (FIXTURES / "events" / f"{name}.json").read_text("utf-8")
    return {**json.loads(text), **changes}


# -- Many messages ---------------------------------------------------------------------


@pytest.mark.parametrize("many", [2500, 6000])
def test_many_messages_at_once(
    fleet: Fleet, session: Session, script: ModuleType, many: int
) -> None:
    """At most 1,000 rows a request; beyond what an outbox file may hold, the rest is
    told in one row. No size sets a ping aside, also when it has to wait."""
    fleet.hold(session, "SessionStart", 0, source="startup")
    session.add(prompt(1), *(message(2, 1, f"msg_{n}") for n in range(many)))
    fleet.hold(session, "Stop", 3)
    of_kind(fleet, "wigtoken").disturb = lambda _: 302
    fleet.send()
    of_kind(fleet, "wigtoken").disturb = None
    (fleet.base("wigtoken") / "state.json").unlink()
    fleet.send()
    fleet.hold(session, "SessionEnd", 4)
    fleet.send()
    fleet.check(*counts(many))
    rows = of_kind(fleet, "wigtoken").rows
    assert len(rows) <= script.ROWS_MAX
    assert len(rows) == many or len(rows) > 3000
    sent = [body["messages"] for _, body in of_kind(fleet, "wigtoken").accepted]
    assert max(map(len, sent)) == 1000
    assert not list(fleet.base("wigtoken").glob("refused/*"))


# -- Between the requests of one ping --------------------------------------------------

KILL = """
import telemhq_ping as script
counted = [0]
def counting(*args):
    counted[0] += 1
    if counted[0] == %d:
        die()
"""
WRAPS = {
    "before a request is sent": "wrap(script, 'post', before=counting)",
    "behind its answer": "wrap(script, 'post', after=counting)",
    "behind what is remembered": "wrap(script.Outbox, 'rewrite', after=counting)",
}
PATH = "sys.path.insert(0, directory)\n"


def ended(fleet: Fleet, session: Session, size: int, many: int) -> str:
    """A session that has ended, its last ping waiting everywhere; its event_id."""
    fleet.hold(session, "SessionStart", 0, source="startup")
    fleet.send()
    rows = [message(2, size, f"msg_{n}") for n in range(many)]
    session.add(prompt(1), *rows)
    return fleet.hold(session, "SessionEnd", 4)


@only(trackers.Recorder, trackers.Wigtoken)
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("where", sorted(WRAPS))
def test_killed_between_the_requests_of_one_ping(
    fleet: Fleet, session: Session, where: str, nth: int
) -> None:
    """Whoever comes after goes on behind those accepted: at most the one request that
    was on its way comes twice, and its comment shows it."""
    key = ended(fleet, session, 1, 2500)
    recorder, wigtoken = of_kind(fleet, "recorder"), of_kind(fleet, "wigtoken")
    patch = PATH + KILL % nth + WRAPS[where]
    for kind in ("recorder", "wigtoken"):
        name = fleet.base(kind).name
        process = start_patched(
            fleet.home, patch, "detached", "-1", name, **fleet.environ
        )
        process.communicate(timeout=60)
        dies = nth < 4 or (kind == "recorder" and "request" in where)
        if "answer" in where:
            dies = nth < 4 or kind == "recorder"
        if dies:
            assert process.returncode == -signal.SIGKILL, where
    fleet.send()
    names = [point["name"] for point in recorder.points]
    repeated = len(names) - 4
    assert repeated == (1 if "answer" in where else 0)
    assert len(set(names)) == 4
    assert all(key in point["comment"] for point in recorder.points)
    if repeated:
        del recorder.points[names.index(max(set(names), key=names.count))]
    assert wigtoken.duplicates <= 1000
    fleet.check(*counts(2500))


@only(trackers.Recorder)
@pytest.mark.parametrize("nth", [2, 3, 4])
@pytest.mark.parametrize("status", [429, 500, 503, 401])
def test_failure_in_the_middle_repeats_nothing(
    fleet: Fleet, session: Session, nth: int, status: int
) -> None:
    """What was accepted is remembered: the next try begins with the one that failed."""
    ended(fleet, session, 5, 1)
    recorder = of_kind(fleet, "recorder")
    seen = []

    def disturb(request: Request) -> Any:
        seen.append(request)
        return status if len(seen) == nth else None

    recorder.disturb = disturb
    name = fleet.base("recorder").name
    one_life = "import telemhq_ping as script\nscript.LIFE_S = 1.0\n"
    for _ in range(2):
        process = start_patched(
            fleet.home, PATH + one_life, "detached", "-1", name, **fleet.environ
        )
        process.communicate(timeout=60)
        state = fleet.base("recorder") / "state.json"
        told = json.loads(state.read_text())
        state.write_text(json.dumps({**told, "not_before": 0, "suspects": {}}))
    fleet.send()
    assert len(recorder.requests) == 5
    assert len(recorder.points) == 4
    fleet.check(*counts(5))


def test_each_request_has_a_deadline_of_its_own(fleet: Fleet, session: Session) -> None:
    """Four slow answers, each within its time, are four answers."""
    ended(fleet, session, 5, 1)
    recorder = of_kind(fleet, "recorder")
    recorder.disturb = lambda _: time.sleep(0.8)
    fleet.send(TELEMHQ_TIMEOUT="1")
    assert len(recorder.requests) == 4
    fleet.check(*counts(5))


def test_ping_is_charged_the_same_after_a_crash(fleet: Fleet, session: Session) -> None:
    """Killed at each step of charging: no row under two ids, none lost."""
    fleet.hold(session, "SessionStart", 0, source="startup")
    fleet.send()
    session.add(prompt(1), message(2, 1, "msg_1"))
    fleet.hold(session, "Stop", 3)
    for nth in range(1, 7):
        for kind in fleet.places:
            name = fleet.base(kind).name
            patch = PATH + KILL % nth + "wrap(os, 'replace', before=counting)\n"
            patch += "wrap(os, 'unlink', after=counting)"
            start_patched(
                fleet.home, patch, "detached", "-1", name, **fleet.environ
            ).communicate(timeout=60)
        session.add(message(3 + nth, 1, f"msg_1{nth}"))
        fleet.hold(session, "Stop", 3.5 + nth)
    fleet.hold(session, "SessionEnd", 20)
    fleet.send()
    fleet.check(*counts(7))
    rows = of_kind(fleet, "wigtoken").rows
    assert set(rows) == {"msg_1", *(f"msg_1{nth}" for nth in range(1, 7))}
