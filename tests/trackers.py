"""Receivers that hold their clients to each tracker's contract, and what they counted.

They answer as the real ones do; what a real one would silently do wrong with (a row
without an id, a time in seconds) they keep in `faults`. Behind each rule stands where
it comes from. Run: seen by running the real thing, or a copy of its code. Read: in its
public sources, documentation or specification. Unknown: assumed; the server is not
public, and who has an account may find it otherwise.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import re
import uuid
from types import ModuleType
from typing import Any, Callable, Iterator

import pytest

from support import Home, Receiver, Request, event


def is_iso(text: object) -> bool:
    """Whether a text is ISO 8601 in UTC with a Z, and of this century's years."""
    if not isinstance(text, str) or not re.fullmatch(r"[-\dT:.]+Z", text):
        return False
    return datetime.datetime.fromisoformat(text[:-1]).year >= 2020


def added(rows: Any, *names: str) -> tuple[int, ...]:
    """The sums of what rows have under these names."""
    return tuple(sum(row.get(name, 0) for row in list(rows)) for name in names)


class Strict(Receiver):
    """A tracker of one kind. disturb: what it answers instead, when that is anything.
    faults: what no client may do. accepted: the bodies that were answered with 2xx."""

    kind = ""
    variables = ""  # that make it a destination; PLACE: its address; SECRET
    secret = "SECRET_0123456789"

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.accepted: list[tuple[str, Any]] = []
        self.disturb: Callable[[Request], Any] | None = None
        super().__init__(self.serve)
        self.place = f"http://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        """The variables that make it a destination."""
        text = self.variables.replace("PLACE", self.place)
        filled = text.replace("SECRET", self.secret)
        return dict(re.findall(r"(\w+?)=(\S+)", filled))

    def serve(self, request: Request) -> Any:
        """Answer by the contract, unless `disturb` has an answer of its own."""
        found = self.disturb(request) if self.disturb else None
        return self.judge(request) if found is None else found

    def judge(self, request: Request) -> Any:
        """What all of them have in common."""
        if request.method != "POST":
            return 405, {}, b""  # wigtoken, rotel: run; the others: unknown
        given = request.headers.get("Authorization")
        if given != f"Bearer {self.secret}":
            return 401, {}, b"{}"  # wigtoken: run; the others: read
        if request.headers.get("Content-Type") != "application/json":
            self.faults.append("content type")  # rotel: run (415); the others: read
        body = json.loads(request.body)
        status, said = self.take(request.path, body)
        if 200 <= status < 300:
            self.accepted.append((request.path, body))
        return status, {}, json.dumps(said).encode()

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, what is said) to a body."""
        raise NotImplementedError

    def need(self, good: object, what: str) -> None:
        """Note what no client may do."""
        if not good:
            self.faults.append(what)

    def sums(self) -> tuple[int, ...]:
        """The tokens that it would show: input, output, cached, creation."""
        raise NotImplementedError

    def everything(self) -> str:
        """All that it ever got."""
        return "".join(f"{r.path}{r.headers}{r.body!r}" for r in list(self.requests))


class Wigtoken(Strict):
    """wigtoken, server 0.3."""

    kind = "wigtoken"
    variables = "WIGTOKEN_SERVER=PLACE WIGTOKEN_TOKEN=SECRET WIGTOKEN_MACHINE=laptop"
    secret = "wts_SECRET_0123456789"  # read: real ones begin so

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.duplicates = 0
        super().__init__()

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        if path != "/api/ingest/messages":  # run
            return 404, {}
        machine = body.get("machine")
        if not re.fullmatch(r"[\w.\-]{1,100}", str(machine or "")):  # run: required
            return 400, {"error": "machine"}
        if len(body["messages"]) > 1000:  # run
            return 413, {"error": "too many"}
        applied = 0
        for row in body["messages"]:
            key = row.get("message_id")
            self.need(key, "a row without an id")  # run: skipped silently
            self.need(is_iso(row.get("ts")), "ts")  # run: seconds land in 1970
            self.need(row.get("model"), "model")  # read
            if key in self.rows:  # run: unique over the server, and the first wins
                self.duplicates += 1
            elif key:
                self.rows[key] = dict(row, machine=machine)
                applied += 1
        said = {"ok": True, "received": len(body["messages"]), "applied": applied}
        return 200, {**said, "duplicates": len(body["messages"]) - applied}  # run

    def sums(self) -> tuple[int, ...]:
        names = ("input", "output", "cache_read_input", "cache_creation_input")
        return added(self.rows.values(), *(f"{name}_tokens" for name in names))  # run


class Recorder(Strict):
    """Recorder: its recipe, its CLI and its SDK; the server is not public."""

    kind = "recorder"
    variables = (
        "RECORDER_URL=PLACE RECORDER_PAT=SECRET "
        "RECORDER_PREFIX=System/Code/{project}/Tokens"
    )
    secret = "pat_SECRET_0123456789"  # unknown: what a token looks like
    NAMES = ("Input", "Output", "CacheRead", "CacheCreate")  # read: the recipe's four

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        super().__init__()

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        if path != "/api/v1/records":  # read
            return 404, {"error": {"code": "not_found", "message": ""}}
        prefix, _, name = body["name"].rpartition("/")
        self.need(isinstance(body["value"], int), "value")  # read: by its data_type
        self.need(body["data_type"] == "integer", "data_type")  # read
        self.need(body["chart_type"] == "line", "chart_type")  # read
        self.need(body["unit"] == "tokens", "unit")  # read
        self.need(prefix and name in self.NAMES, "name")  # read
        self.need(is_iso(body["recorded_at"]), "recorded_at")  # read: compared as text
        # Ours: a doubled point can be told by it.
        self.need(re.search(r"\b[0-9a-f]{32}\b", body["comment"]), "comment")
        self.points.append(body)  # unknown: idempotency; so each is one more point
        return 201, {"id": len(self.points)}  # unknown: 200 or 201

    def sums(self) -> tuple[int, ...]:
        points = [{p["name"].rpartition("/")[2]: p["value"]} for p in list(self.points)]
        return added(points, *self.NAMES)


class Collector(Strict):
    """An OpenTelemetry collector: protobuf's JSON mapping, to the letter. (A real one
    is in test_rotel.py.)"""

    kind = "otlp"
    variables = (
        "TELEMHQ_OTLP_ENDPOINT=PLACE "
        "TELEMHQ_OTLP_HEADERS=Authorization=Bearer%20SECRET,x-scope=me"
    )
    reject = False  # answer with a partial success

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        super().__init__()

    def value(self, name: str, value: dict[str, Any]) -> Any:
        """What an AnyValue holds; a fault when it is none."""
        ((kind, inner),) = value.items()
        good = {
            "stringValue": isinstance(inner, str),  # read, run
            "boolValue": isinstance(inner, bool),  # read, run
            "intValue": re.fullmatch(r"-?\d{1,19}", str(inner)) and inner == str(inner),
            "doubleValue": isinstance(inner, float),  # read: a number, never null
        }
        self.need(good.get(kind), f"{name}: {value}")
        # Ours: a back end that has seen a double takes no integer under that name.
        self.need((kind == "doubleValue") == name.endswith("cost_usd"), name)
        self.need((kind == "intValue") or not name.endswith("_tokens"), name)
        return int(inner) if kind == "intValue" else inner

    def attributes(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """Attributes by name; their names must be unique (read)."""
        named = {pair["key"]: self.value(pair["key"], pair["value"]) for pair in found}
        self.need(len(named) == len(found), "an attribute twice")
        return named

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        if path != "/v1/logs":  # read, run
            return 404, {}
        if self.reject and body["resourceLogs"]:  # read: a 200 that rejects
            partial = {"rejectedLogRecords": "1", "errorMessage": "no"}
            return 200, {"partialSuccess": partial}
        for resource in body["resourceLogs"]:  # read, run: lowerCamelCase
            service = self.attributes(resource["resource"]["attributes"])
            for scope in resource["scopeLogs"]:
                for record in scope["logRecords"]:
                    self.records.append({**self.record(record), **service})
        return 200, {}  # read, run

    def record(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record's attributes, and what else it says."""
        name = record["eventName"]  # read: young, so the name stands in two more places
        found = self.attributes(record["attributes"])
        self.need(record["body"] == {"stringValue": name}, "body")  # read
        self.need(found.pop("event.name") == name, "event.name")  # read
        self.need(re.fullmatch(r"\d{19}", record["timeUnixNano"]), "time")  # read, run
        self.need(record["severityNumber"] in (9, 17), "severity")  # read: INFO, ERROR
        return {**found, "event": name, "severity": record["severityNumber"]}

    def sums(self) -> tuple[int, ...]:
        kinds = ("input", "output", "cache_read.input", "cache_creation.input")
        keys = [f"gen_ai.usage.{kind}_tokens" for kind in kinds]
        total, out, cached, creation = added(self.records, *keys)
        # read: by the GenAI conventions input_tokens has the cached ones in it
        return total - cached - creation, out, cached, creation


class ClaudeMetrics(Strict):
    """Claude Metrics: bodies as its plugin 0.4.0 sends them (run: its hooks, captured);
    the server, a Laravel application, is not public."""

    kind = "claude-metrics"
    variables = "CLAUDE_METRICS_API_URL=PLACE/api/v1 CLAUDE_METRICS_API_TOKEN=SECRET"
    NEEDED = {  # noqa: RUF012 - run: what the plugin never leaves out
        "execution": ("response_text", "status"),
        "tool": ("tool_name", "success"),
        "system": ("kind", "payload"),
    }

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.sessions: dict[str, dict[str, Any]] = {}
        super().__init__()

    def judge(self, request: Request) -> Any:
        # read: else Laravel answers what it does not accept with a redirect
        self.need(request.headers.get("Accept") == "application/json", "accept")
        return super().judge(request)

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        kind = path.rpartition("/")[2]
        if path != f"/api/v1/events/{kind}":  # run
            return 404, {}
        self.need(isinstance(body.get("client_meta"), dict), "client_meta")  # run
        self.need(body.get("session_id"), "session_id")  # run
        # Ours: never a person's own. (unknown: whether account_email is required)
        self.need(not {"account_email", "prompt_text"} & set(body), "a person's own")
        if kind == "session":  # unknown: an upsert by session_id, presumably
            self.sessions.setdefault(body["session_id"], {}).update(body)
            return 202, {}
        key = str(uuid.UUID(body["event_id"]))  # run: UUID form
        self.need(key == body["event_id"], "event_id")
        if key in self.events:  # read: a success
            return 202, {"duplicate": True}
        self.need(set(self.NEEDED[kind]) <= set(body), f"{kind}: {body}")
        self.need(body.get("response_text") is None, "a response")  # run: null happens
        self.events[key] = body
        return 202, {}  # read

    def sums(self) -> tuple[int, ...]:
        names = "tokens_in tokens_out cache_read_tokens cache_creation_tokens"
        total, out, cached, creation = added(self.events.values(), *names.split())
        # run: the plugin's tokens_in is all that went in, cached or not
        return total - cached - creation, out, cached, creation


class TelemHQ(Strict):
    """TelemHQ (read: its documentation): a ping a request, the token in the path; what
    comes again is known by its event_id."""

    kind = "telemhq"

    def __init__(self) -> None:
        self.by_id: dict[str, dict[str, Any]] = {}
        super().__init__()

    def env(self) -> dict[str, str]:
        return {"TELEMHQ_PING_URL": self.url}

    def judge(self, request: Request) -> Any:
        if request.method != "POST":
            return 200, {}, b"how to"
        key = request.headers.get("Idempotency-Key")
        self.need(key == request.ping["event_id"], "key")
        self.by_id.setdefault(request.ping["event_id"], request.ping)
        self.accepted.append((request.path, request.ping))
        return 200, {}, b""

    def sums(self) -> tuple[int, ...]:
        names = ("input", "output", "cached_input", "cache_creation_input")
        return added(self.by_id.values(), *(f"{name}_tokens" for name in names))


ALL = (TelemHQ, Wigtoken, Recorder, Collector, ClaudeMetrics)
KEPT = ("rows", "points", "records", "events", "sessions", "by_id")


class Fleet:
    """Receivers of some kinds, and a HOME that sends to them."""

    def __init__(self, home: Home, script: ModuleType, *kinds: str) -> None:
        self.home = home
        self.places: dict[str, Any] = {
            cls.kind: cls() for cls in ALL if cls.kind in kinds or not kinds
        }
        self.environ: dict[str, Any] = {"TELEMHQ_DESTINATIONS": ",".join(self.places)}
        for place in self.places.values():
            self.environ.update(place.env())
        settings = script.Settings({**self.environ})
        found, _ = script.find_trackers(settings)
        self.names = {tracker.kind: tracker.directory_name() for tracker in found}

    def base(self, kind: str) -> pathlib.Path:
        """A destination's directory."""
        return self.home.state / str(self.names[kind])

    def hook(self, name: str, **changes: Any) -> None:
        """Run a hook on a real event; capitals: variables."""
        env = {key: changes.pop(key) for key in list(changes) if key.isupper()}
        done = self.home.hook(event(name, **changes), **{**self.environ, **env})
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def outage(self, name: str, **changes: Any) -> None:
        """A hook while every tracker answers 503; then they are well again, and no
        back-off stands."""
        for place in self.places.values():
            place.disturb = lambda _: 503
        self.hook(name, TELEMHQ_FOREGROUND=1, **changes)
        self.home.end()
        for kind, place in self.places.items():
            place.disturb = None
            place.requests.clear()
            (self.base(kind) / "state.json").unlink(missing_ok=True)

    def check(self, *counts: int) -> None:
        """Each shows these counts; none was told what it may not be told."""
        shown = {kind: place.sums() for kind, place in self.places.items()}
        assert shown == dict.fromkeys(self.places, counts)
        assert [place.faults for place in self.places.values() if place.faults] == []
        assert self.home.waiting() == []


@pytest.fixture
def fleet(
    request: pytest.FixtureRequest, home: Home, script: ModuleType
) -> Iterator[Fleet]:
    """All five trackers, or those that a test names."""
    found = Fleet(home, script, *getattr(request, "param", ()))
    yield found
    for place in found.places.values():
        place.close()
