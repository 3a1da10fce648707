"""Usage at every tracker: each shows what the client itself says, to the token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import uuid
from types import ModuleType
from typing import Any, Iterator

import pytest

from support import FIXTURES, Home, Request, patched
from trackers import Fleet, is_iso

OPUS, HAIKU = "claude-opus-5-5", "claude-haiku-5"
EXACT = ("parallel", "resume", "subagent", "tools")
A_SESSION = ("SessionStart-startup", "Stop", "SessionEnd-other")


@pytest.fixture
def fleet(
    request: pytest.FixtureRequest, home: Home, script: ModuleType
) -> Iterator[Fleet]:
    """All five trackers, or those that a test names."""
    found = Fleet(home, script, *getattr(request, "param", ()))
    yield found
    found.close()


class Session:
    """A session of Claude Code: its transcript below HOME, and hooks that wait until
    all trackers have its pings."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.id = fleet, str(uuid.uuid4())
        project = fleet.home.path / ".claude" / "projects" / "-acme"
        project.mkdir(parents=True, exist_ok=True)
        self.path = project / f"{self.id}.jsonl"
        self.path.touch()

    def add(self, *rows: dict[str, Any]) -> None:
        """Add rows to the transcript, written now."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() - 1))
        same = {"sessionId": self.id, "timestamp": now}
        with self.path.open("a") as file:
            for row in rows:
                file.write(
                    json.dumps({**same, "uuid": str(uuid.uuid4()), **row}) + "\n"
                )

    def hook(self, name: str, **more: Any) -> None:
        """An event of this session, told everywhere."""
        self.fleet.hook(name, **self.fields(), TELEMHQ_FOREGROUND=1, **more)

    def fields(self) -> dict[str, Any]:
        """What its events have in common."""
        return {"session_id": self.id, "transcript_path": str(self.path)}


@pytest.fixture
def session(fleet: Fleet) -> Session:
    """A session that has begun."""
    found = Session(fleet)
    found.hook("SessionStart-startup")
    return found


def message(n: int, key: str, model: str = OPUS) -> dict[str, Any]:
    """An assistant row of size n: n tokens in, 3n out, 5n cached, 7n written there."""
    usage = {
        "input_tokens": n,
        "output_tokens": 3 * n,
        "cache_read_input_tokens": 5 * n,
        "cache_creation_input_tokens": 7 * n,
    }
    content = [{"type": "text", "text": "CANARY"}]
    found = {"id": key, "role": "assistant", "model": model, "stop_reason": "end_turn"}
    return {
        "type": "assistant",
        "message": {**found, "content": content, "usage": usage},
    }


def ledger(sizes: dict[str, int], cost: float) -> dict[str, Any]:
    """A `cost-state` row: the client's own sums; `sizes` is model -> size."""
    names = ("inputTokens", "outputTokens", "cacheReadInputTokens")
    models = {
        model: {
            **dict(zip((*names, "cacheCreationInputTokens"), sums(n))),
            "costUSD": cost / len(sizes),
        }
        for model, n in sizes.items()
    }
    return {"type": "cost-state", "totalCostUSD": cost, "modelUsage": models}


def sums(n: int) -> tuple[int, int, int, int]:
    """What a tracker shows of messages of size n in all."""
    return n, 3 * n, 5 * n, 7 * n


def only(*kinds: str) -> pytest.MarkDecorator:
    """A test with these trackers alone."""
    return pytest.mark.parametrize("fleet", [kinds], indirect=True, ids=[""])


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", EXACT)
def test_every_tracker_shows_the_clients_own_sums(fleet: Fleet, name: str) -> None:
    """Of real transcripts, with tools, parallel calls, subagents, resumed: the five
    show the same, and it is what the client says. wigtoken's rows are the API's, by id
    and time. Nothing that was said, done, or kept secret reached any, or lies there."""
    folder = FIXTURES / "transcripts" / name
    wanted = json.loads((folder / "expected.json").read_text("utf-8"))
    copy = fleet.home.path / ".claude" / "projects" / "-acme"
    shutil.copytree(str(folder), str(copy))
    path = copy / f"{wanted['session_id']}.jsonl"
    fields: dict[str, Any] = {"session_id": path.stem, "transcript_path": str(path)}
    for event_name in A_SESSION:
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
        assert b"CANARY" not in everything
        assert b"/home/dev" not in everything
        assert str(fleet.home.path).encode() not in everything
    for file in fleet.home.state.rglob("*"):
        assert "SECRET" not in str(file)
        assert file.is_dir() or b"SECRET" not in file.read_bytes(), file


def test_what_comes_after_a_charge_is_a_row_of_its_own(
    fleet: Fleet, session: Session
) -> None:
    """wigtoken's server keeps the first row of an id: a message that grew goes as the
    difference, under an id that tells it; what no message has (compaction, titles, an
    id that is none) as a row a model."""
    session.add(message(1, "msg_1"))
    session.hook("Stop")
    session.add(message(4, "msg_1"), message(2, "has space CANARY"))
    session.add(message(8, "msg_2", "vendor/CANARY"))
    fleet.outage("Stop", **session.fields())
    another(fleet)  # its sender has other settings, and tells those of the hook
    assert fleet.places["wigtoken"].rows["msg_2"]["machine"] == "laptop"
    session.add(ledger({OPUS: 16, "vendor/CANARY": 8, HAIKU: 2}, 0.5))
    session.hook("SessionEnd-other")
    rows = fleet.places["wigtoken"].rows
    own = {key: row["input_tokens"] for key, row in rows.items() if "msg_" in key}
    assert own.pop("msg_1") == 1
    assert own.pop("msg_2") == 8
    assert list(own.values()) == [3]  # msg_1. and something
    assert rows["msg_2"]["model"] == "other"
    rest: dict[str, int] = {}
    for key, row in rows.items():
        if "msg_" not in key:
            assert key.endswith("." + row["model"])
            model = row["model"]
            rest[model] = rest.get(model, 0) + row["input_tokens"]
    assert rest == {OPUS: 12, HAIKU: 2}
    fleet.check(*sums(26))
    assert all(b"CANARY" not in place.everything() for place in fleet.places.values())


def test_a_session_that_goes_on_is_told_on(fleet: Fleet, session: Session) -> None:
    """Recorder gets a session's totals at its end; of one that is resumed, at its next
    end what it used since."""
    recorder = fleet.places["recorder"]
    session.add(message(1, "msg_1"))
    session.hook("Stop")
    assert recorder.points == []
    session.add(message(2, "msg_2"))
    session.hook("SessionEnd-other")
    assert [point["value"] for point in recorder.points] == list(sums(3))
    session.hook("SessionStart-resume")
    session.add(message(4, "msg_3"))
    session.hook("SessionEnd-other")
    assert [point["value"] for point in recorder.points[4:]] == list(sums(4))
    (found,) = fleet.places["claude-metrics"].sessions.values()
    assert found["tokens_out_total"] == 3 * 7
    fleet.check(*sums(7))


def another(fleet: Fleet) -> None:
    """An event of another session, in a project with other settings."""
    others: dict[str, Any] = {"RECORDER_PREFIX": "Other", "WIGTOKEN_MACHINE": "other"}
    fields: dict[str, Any] = {"session_id": "another"}
    fleet.hook("Stop", **fields, **others, TELEMHQ_FOREGROUND=1)


@pytest.mark.parametrize("charged", [False, True])
def test_a_lost_session_is_told_everywhere(
    fleet: Fleet, session: Session, charged: bool
) -> None:
    """After kill -9: a day later, once, with the machine and prefix it had; also where
    all of it was charged before, and only the end was never told."""
    session.add(message(3, "msg_1"))
    session.hook("Stop")
    if not charged:
        session.add(message(4, "msg_2"))
    for path in fleet.home.state.glob("*/accounts/*.json"):
        os.utime(str(path), (time.time() - 90000,) * 2)
    for path in fleet.home.state.glob("*/state.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "swept_at": 0}))
    for _ in range(2):
        another(fleet)
    fleet.home.quiet(30)
    fleet.check(*sums(3 if charged else 7))
    points = fleet.places["recorder"].points
    names = {point["name"] for point in points}
    assert (len(points), "System/Code/api/Tokens/Input" in names) == (4, True)
    rows = fleet.places["wigtoken"].rows.values()
    assert {row["machine"] for row in rows} == {"laptop"}


def test_usage_off_sends_no_tokens_anywhere(fleet: Fleet) -> None:
    """TELEMHQ_USAGE=0: what is made of tokens alone is not even queued."""
    session = Session(fleet)
    session.add(message(3, "msg_1"))
    for name in ("Stop", "SessionEnd-other"):
        session.hook(name, TELEMHQ_USAGE=0)
    fleet.check(*sums(0))
    assert not fleet.base("wigtoken").exists()
    assert not fleet.base("recorder").exists()
    assert len(fleet.places["otlp"].records) == 2


@only("telemhq", "wigtoken")
@pytest.mark.parametrize("many", [2500, 6000])
def test_many_messages_at_once(
    fleet: Fleet, session: Session, script: ModuleType, many: int
) -> None:
    """At most 1,000 rows a request; beyond what an outbox file may hold, the rest is
    told in one row a model. No size sets a ping aside, also when it has to wait."""
    session.add(*(message(1, f"msg_{n}") for n in range(many)))
    fleet.outage("Stop", **session.fields())
    session.hook("SessionEnd-other")
    fleet.home.quiet(30)
    fleet.check(*sums(many))
    sent = [body["messages"] for _, body in fleet.places["wigtoken"].accepted]
    assert max(map(len, sent)) == 1000
    rows = fleet.places["wigtoken"].rows
    assert len(rows) == many or 3000 < len(rows) <= script.ROWS_MAX
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


def ended(fleet: Fleet, session: Session, many: int) -> None:
    """A session that has ended, its last ping waiting everywhere."""
    session.add(*(message(1, f"msg_{n}") for n in range(many)), ledger({OPUS: many}, 1))
    fleet.outage("SessionEnd-other", **session.fields())


@only("recorder", "wigtoken")
@pytest.mark.fault(3, 4)
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_between_the_requests_of_one_ping(
    fleet: Fleet, session: Session, when: str, nth: int
) -> None:
    """Whoever comes after goes on behind those accepted: at most the one request that
    was on its way comes twice, and its comment shows it."""
    ended(fleet, session, 2500)
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


@only("recorder")
@pytest.mark.parametrize("status", [429, 500, 503, 401])
def test_a_failure_in_the_middle_repeats_nothing(
    fleet: Fleet, session: Session, status: int
) -> None:
    """What was accepted is remembered: the next try begins with the one that failed."""
    ended(fleet, session, 5)
    recorder = fleet.places["recorder"]
    seen = []

    def disturb(request: Request) -> Any:
        seen.append(request)
        return status if len(seen) == 3 else None

    recorder.disturb = disturb
    for _ in range(2):
        fleet.hook("Stop", transcript_path="", TELEMHQ_FOREGROUND=1)
        (fleet.base("recorder") / "state.json").unlink()
    assert len(recorder.requests) == 5
    assert len(recorder.points) == 4
    fleet.check(*sums(5))
