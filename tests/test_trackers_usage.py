"""Usage at every tracker: each shows what the client itself says, to the token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from types import ModuleType
from typing import Any

import pytest

import transcripts
from support import FIXTURES, patched
from trackers import Fleet, fleet, is_iso
from transcripts import HAIKU, OPUS, iso, ledger, message

__all__ = ["fleet"]  # fixtures


class Session(transcripts.Session):
    """A session that begins now; its hooks wait until all trackers have its pings."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        super().__init__(fleet.home, next(iter(fleet.places.values())), time.time() - 1)
        self.add()  # an empty transcript
        self.fields = {"session_id": self.id, "transcript_path": str(self.path)}

    def tell(self, name: str, *rows: dict[str, Any], **more: Any) -> None:
        """Rows, then an event of this session, told everywhere."""
        self.add(*rows)
        self.fleet.hook(name, **self.fields, TELEMHQ_FOREGROUND=1, **more)

    def end_in_outage(self, many: int) -> None:
        """Messages, and the session's end, whose ping waits everywhere."""
        self.add(*(message(0, 1) for _ in range(many)), ledger({OPUS: many}))
        self.fleet.outage("SessionEnd-other", **self.fields)


@pytest.fixture
def session(fleet: Fleet) -> Session:
    """A session that has begun."""
    found = Session(fleet)
    found.tell("SessionStart-startup")
    return found


def another(fleet: Fleet) -> None:
    """An event of another session, in a project with other settings."""
    others: dict[str, Any] = {"RECORDER_PREFIX": "Other", "WIGTOKEN_MACHINE": "other"}
    fleet.hook("Stop", session_id="another", TELEMHQ_FOREGROUND=1, **others)


def sums(n: int) -> tuple[int, int, int, int]:
    """What a tracker shows of messages of size n in all."""
    return n, 3 * n, 5 * n, 7 * n


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", ["parallel", "resume", "subagent", "tools"])
def test_every_tracker_shows_the_clients_own_sums(fleet: Fleet, name: str) -> None:
    """Of real transcripts, with tools, parallel calls, subagents, resumed: the five
    show the same, and it is what the client says. wigtoken's rows are the API's, by id
    and time. Nothing that was said, done, or kept secret reached any, or lies there."""
    folder = FIXTURES / "transcripts" / name
    wanted = json.loads((folder / "expected.json").read_text("utf-8"))
    copy = fleet.home.path / ".claude" / "projects" / "-acme"
    shutil.copytree(folder, copy)
    path = copy / f"{wanted['session_id']}.jsonl"
    fields: dict[str, Any] = {"session_id": path.stem, "transcript_path": str(path)}
    for event_name in ("SessionStart-startup", "Stop", "SessionEnd-other"):
        fleet.hook(event_name, **fields, TELEMHQ_FOREGROUND=1)
    total = wanted["unique_messages_total"]
    fleet.check(
        *(total["input_tokens"], total["output_tokens"]),
        *(total["cache_read_input_tokens"], total["cache_creation_input_tokens"]),
    )
    (found,) = fleet.places["claude-metrics"].sessions.values()
    spent = sum(n for key, n in total.items() if key != "output_tokens")
    assert found["tokens_in_total"] == spent
    assert found["tokens_out_total"] == total["output_tokens"]
    texts = "".join(found.read_text("utf-8") for found in copy.rglob("*.jsonl"))
    rows = fleet.places["wigtoken"].rows
    assert [key for key in rows if f'"{key.partition(".")[0]}"' in texts]
    assert all(is_iso(row["ts"]) for row in rows.values())
    for place in fleet.places.values():
        everything = place.everything()
        for secret in ("CANARY", "/home/dev", str(fleet.home.path)):
            assert secret not in everything
    for file in fleet.home.state.rglob("*"):
        assert "SECRET" not in str(file)
        assert file.is_dir() or b"SECRET" not in file.read_bytes(), file


def test_what_no_message_has_is_a_row_a_model(fleet: Fleet, session: Session) -> None:
    """wigtoken gets compaction, titles, an id that is none, as a row a model, under an
    id that is no message's. (A message's is the answer's real one; with the API's
    request where a router repeats it.) Where a tracker was away, the next sender is of
    a session with other settings, and tells those of the hook."""
    session.tell("Stop", message(0, 1, "1"), message(0, 16, "1", requestId="2"))
    unnamed = message(0, 2, "has space CANARY")
    session.add(unnamed, message(0, 8, "2", model="vendor/CANARY"))
    fleet.outage("Stop", **session.fields)
    another(fleet)
    whole = ledger({OPUS: 32, "vendor/CANARY": 8, HAIKU: 2})
    session.tell("SessionEnd-other", whole)
    rows = fleet.places["wigtoken"].rows
    own = {key: row["input_tokens"] for key, row in rows.items() if "msg_" in key}
    assert own == {"msg_1": 1, "msg_1.2": 16, "msg_2": 8}
    assert rows["msg_2"] == {
        "machine": "laptop",
        "message_id": "msg_2",
        "model": "other",
        "ts": iso(session.begun),
        "input_tokens": 8,
        "output_tokens": 24,
        "cache_read_input_tokens": 40,
        "cache_creation_input_tokens": 56,
    }
    rest: dict[str, int] = {}
    for key in set(rows) - set(own):
        model = rows[key]["model"]
        assert key.endswith("." + model)
        rest[model] = rest.get(model, 0) + rows[key]["input_tokens"]
    assert rest == {OPUS: 15, HAIKU: 2}
    fleet.check(*sums(42))
    assert all("CANARY" not in place.everything() for place in fleet.places.values())


def test_a_session_that_goes_on_is_told_on(fleet: Fleet, session: Session) -> None:
    """Recorder gets a session's totals at its end; of one that is resumed, at its next
    end what it used since."""
    recorder = fleet.places["recorder"]
    session.tell("Stop", message(0, 1))
    assert recorder.points == []
    session.tell("SessionEnd-other", message(0, 2))
    assert [point["value"] for point in recorder.points] == list(sums(3))
    session.tell("SessionStart-resume")
    session.tell("SessionEnd-other", message(0, 4))
    assert [point["value"] for point in recorder.points[4:]] == list(sums(4))
    (found,) = fleet.places["claude-metrics"].sessions.values()
    assert found["tokens_out_total"] == 3 * 7
    fleet.check(*sums(7))


@pytest.mark.parametrize("charged", [False, True])
def test_a_lost_session_is_told_everywhere(
    fleet: Fleet, session: Session, charged: bool
) -> None:
    """After kill -9: a day later, once, with the machine and prefix it had; also where
    all of it was charged before, and only the end was never told."""
    session.tell("Stop", message(0, 3))
    if not charged:
        session.add(message(0, 4))
    for path in fleet.home.state.glob("*/accounts/*.json"):
        os.utime(str(path), (time.time() - 90000,) * 2)
    for path in fleet.home.state.glob("*/state.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "swept_at": 0}))
    for _ in range(2):
        another(fleet)
    fleet.home.quiet(30)
    fleet.check(*sums(3 if charged else 7))
    names = [point["name"] for point in fleet.places["recorder"].points]
    assert (len(names), "System/Code/api/Tokens/Input" in names) == (4, True)
    rows = fleet.places["wigtoken"].rows.values()
    assert {row["machine"] for row in rows} == {"laptop"}


def test_usage_off_sends_no_tokens_anywhere(fleet: Fleet) -> None:
    """TELEMHQ_USAGE=0: what is made of tokens alone is not sent."""
    session = Session(fleet)
    session.tell("Stop", message(0, 3), TELEMHQ_USAGE=0)
    session.tell("SessionEnd-other", TELEMHQ_USAGE=0)
    fleet.check(*sums(0))
    assert not fleet.places["wigtoken"].requests
    assert not fleet.places["recorder"].requests
    assert len(fleet.places["otlp"].records) == 2


@pytest.mark.parametrize("fleet", [["telemhq", "wigtoken"]], indirect=True)
def test_many_messages_at_once(
    fleet: Fleet, session: Session, script: ModuleType
) -> None:
    """At most 1,000 rows a request; beyond what an outbox file may hold, the rest is
    told in one row a model. No size sets a ping aside, also when it has to wait."""
    session.end_in_outage(6000)
    another(fleet)
    fleet.home.quiet(30)
    fleet.check(*sums(6000))
    sent = [body["messages"] for _, body in fleet.places["wigtoken"].accepted]
    assert max(map(len, sent)) == 1000
    assert len(fleet.places["wigtoken"].rows) == script.ROWS_MAX + 1
    assert not list(fleet.base("wigtoken").glob("refused/*"))


# -- Between the requests of one ping --------------------------------------------------

KILL = """
sys.path.insert(0, directory)
import telemhq_ping as script
counted = [0]
def counting(*args):
    counted[0] += 1
    if counted[0] == %d:
        die()
wrap(script, "post", %s=counting)
"""


@pytest.mark.parametrize("fleet", [["recorder", "wigtoken"]], indirect=True)
@pytest.mark.fault(3, 4)
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_between_the_requests_of_one_ping(
    fleet: Fleet, session: Session, when: str, nth: int
) -> None:
    """Whoever comes after goes on behind those accepted: at most the one request that
    was on its way comes twice, and its comment shows it."""
    session.end_in_outage(2500)
    recorder, wigtoken = fleet.places["recorder"], fleet.places["wigtoken"]
    for name in fleet.names.values():
        patch = KILL % (nth, when)
        done = patched(fleet.home, patch, "detached", "-1", name, **fleet.environ)
        assert done.returncode == -signal.SIGKILL
    fleet.hook("Stop", transcript_path="", TELEMHQ_FOREGROUND=1)
    names = [point["name"] for point in recorder.points]
    assert len(set(names)) == 4
    assert len(names) == 4 + (when == "after")
    assert len({point["comment"] for point in recorder.points}) == 1
    if when == "after":
        del recorder.points[names.index(max(names, key=names.count))]
        assert 0 < wigtoken.duplicates <= 1000
    fleet.check(*sums(2500))
