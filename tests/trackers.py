"""Receivers that hold their clients to each tracker's contract, and what they counted.

They answer as the real ones do; what a real one would silently do wrong with (a row
without an id, a time in seconds) they keep in `faults`.
"""

from __future__ import annotations

import datetime
import json
import re
import uuid
from typing import Any, Callable, Mapping

from support import Receiver, Request, wait_until

COUNTS = ("input", "output", "cached", "creation")


def is_iso(text: object) -> bool:
    """Whether a text is ISO 8601 in UTC with a Z, and of this century's years."""
    if not isinstance(text, str) or not re.fullmatch(r"[-\dT:.]+Z", text):
        return False
    return datetime.datetime.fromisoformat(text[:-1]).year >= 2020


class Strict(Receiver):
    """A tracker of one kind. `answer` (as a Receiver's) goes before its own rules when
    it is set to anything but 200.

    faults: what no client may do. accepted: the bodies that were answered with 2xx.
    """

    kind = ""
    secret = "SECRET_0123456789"
    base = ""  # of the URL that its variable has

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.accepted: list[tuple[str, Any]] = []
        self.disturb: Callable[[Request], Any] | None = None
        super().__init__(self.serve)

    @property
    def place(self) -> str:
        """Scheme, host, port."""
        return f"http://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        """The variables that make it a destination."""
        raise NotImplementedError

    def serve(self, request: Request) -> Any:
        """Answer by the contract, unless `disturb` has an answer of its own."""
        found = self.disturb(request) if self.disturb else None
        return self.judge(request) if found is None else found

    def judge(self, request: Request) -> Any:
        """The contract."""
        if request.method != "POST":
            return 405, {}, b""
        given = request.headers.get("Authorization")
        if given != f"Bearer {self.secret}":
            return 401, {}, b"{}"
        if request.headers.get("Content-Type") != "application/json":
            self.faults.append("content type")
            return 415, {}, b"{}"
        status, said = self.take(request.path, json.loads(request.body))
        if 200 <= status < 300:
            self.accepted.append((request.path, json.loads(request.body)))
        return status, {}, json.dumps(said).encode()

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, what is said) to a body."""
        raise NotImplementedError

    def totals(self) -> dict[str, int]:
        """The tokens that it would show."""
        raise NotImplementedError

    def everything(self) -> bytes:
        """All bytes that it ever got, but for its own secret."""
        return b"\n".join(
            request.path.encode() + str(request.headers).encode() + request.body
            for request in list(self.requests)
        )

    def wait_for_totals(self, expected: Mapping[str, int], timeout: float = 20) -> None:
        """Wait until it shows so much."""
        try:
            wait_until(lambda: self.totals() == expected, timeout)
        except AssertionError:
            assert self.totals() == expected


class Wigtoken(Strict):
    """wigtoken: rows by id, the first wins; at most 1,000; a bucket of 100 requests."""

    kind = "wigtoken"
    secret = "wts_SECRET_0123456789"

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.duplicates = 0
        super().__init__()

    def env(self) -> dict[str, str]:
        return {
            "WIGTOKEN_SERVER": self.place,
            "WIGTOKEN_TOKEN": self.secret,
            "WIGTOKEN_MACHINE": "laptop",
        }

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        if path != "/api/ingest/messages":
            return 404, {}
        machine = body.get("machine")
        if not isinstance(machine, str) or not re.fullmatch(r"[\w.\-]{1,100}", machine):
            return 400, {"error": "machine"}
        if len(body["messages"]) > 1000:
            return 413, {"error": "too many"}
        applied = 0
        for row in body["messages"]:
            key = row.get("message_id")
            if not key or not is_iso(row.get("ts")) or not row.get("model"):
                self.faults.append(f"row: {row}")
                continue
            if key in self.rows:
                self.duplicates += 1
                continue
            self.rows[key] = dict(row, machine=machine)
            applied += 1
        said = {"ok": True, "received": len(body["messages"]), "applied": applied}
        return 200, dict(said, duplicates=len(body["messages"]) - applied)

    def totals(self) -> dict[str, int]:
        names = (
            "input_tokens",
            "output_tokens",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
        )
        rows = list(self.rows.values())
        return {
            count: sum(row[name] for row in rows) for count, name in zip(COUNTS, names)
        }


class Recorder(Strict):
    """Recorder: one value a request, no idempotency: each is one more point."""

    kind = "recorder"
    secret = "pat_SECRET_0123456789"
    NAMES = ("Input", "Output", "CacheRead", "CacheCreate")

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        super().__init__()

    def env(self) -> dict[str, str]:
        return {
            "RECORDER_URL": self.place,
            "RECORDER_PAT": self.secret,
            "RECORDER_PREFIX": "System/Code/{project}/Tokens",
        }

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        if path != "/api/v1/records":
            return 404, {"error": {"code": "not_found", "message": ""}}
        good = (
            isinstance(body["value"], int)
            and body["data_type"] == "integer"
            and body["chart_type"] == "line"
            and body["unit"] == "tokens"
            and is_iso(body["recorded_at"])
            and body["name"].rsplit("/", 1)[1] in self.NAMES
            and len(body["name"].rsplit("/", 1)[0]) > 0
            and re.search(r"\b[0-9a-f]{32}\b", body["comment"])
        )
        if not good:
            self.faults.append(f"record: {body}")
            return 422, {"error": {"code": "invalid", "message": ""}}
        self.points.append(body)
        return 201, {"id": len(self.points)}

    def totals(self) -> dict[str, int]:
        found = dict.fromkeys(COUNTS, 0)
        for point in list(self.points):
            name = point["name"].rsplit("/", 1)[1]
            found[COUNTS[self.NAMES.index(name)]] += point["value"]
        return found


class Collector(Strict):
    """An OpenTelemetry collector: protobuf's JSON mapping, to the letter."""

    kind = "otlp"
    reject = False  # answer with a partial success

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        super().__init__()

    def env(self) -> dict[str, str]:
        return {
            "TELEMHQ_OTLP_ENDPOINT": self.place,
            "TELEMHQ_OTLP_HEADERS": f"Authorization=Bearer {self.secret},x-scope=me",
        }

    def value(self, value: dict[str, Any]) -> Any:
        """What an AnyValue holds; a fault when it is none."""
        ((kind, inner),) = value.items()
        good = {
            "stringValue": isinstance(inner, str),
            "boolValue": isinstance(inner, bool),
            "intValue": isinstance(inner, str) and re.fullmatch(r"-?\d{1,19}", inner),
            "doubleValue": isinstance(inner, float),
        }
        if not good.get(kind):
            self.faults.append(f"value: {value}")
        return int(inner) if kind == "intValue" else inner

    def attributes(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """Attributes by name; their names must be unique."""
        named = {pair["key"]: self.value(pair["value"]) for pair in found}
        if len(named) != len(found):
            self.faults.append("an attribute twice")
        return named

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        if path != "/v1/logs":
            return 404, {}
        for resource in body["resourceLogs"]:
            service = self.attributes(resource["resource"]["attributes"])
            for scope in resource["scopeLogs"]:
                for record in scope["logRecords"]:
                    if not re.fullmatch(r"\d{19}", record["timeUnixNano"]):
                        self.faults.append("time")
                    if record["severityNumber"] not in (9, 17):
                        self.faults.append("severity")
                    if self.reject:
                        partial = {"rejectedLogRecords": "1", "errorMessage": "no"}
                        return 200, {"partialSuccess": partial}
                    found = self.attributes(record["attributes"])
                    found.update(service, event=record["eventName"])
                    found["severity"] = record["severityNumber"]
                    self.records.append(found)
        return 200, {}

    def totals(self) -> dict[str, int]:
        def total(name: str) -> int:
            key = f"gen_ai.usage.{name}"
            return sum(record.get(key, 0) for record in list(self.records))

        cached = total("cache_read.input_tokens")
        creation = total("cache_creation.input_tokens")
        given = total("input_tokens") - cached - creation, total("output_tokens")
        return dict(zip(COUNTS, (*given, cached, creation)))


class ClaudeMetrics(Strict):
    """Claude Metrics: Laravel, which answers what it does not accept with a 302 unless
    JSON was asked for; events are known by their UUID, sessions by their id."""

    kind = "claude-metrics"
    PATHS = ("execution", "tool", "system", "session")

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.sessions: dict[str, dict[str, Any]] = {}
        super().__init__()

    def env(self) -> dict[str, str]:
        return {
            "CLAUDE_METRICS_API_URL": f"{self.place}/api/v1",
            "CLAUDE_METRICS_API_TOKEN": self.secret,
        }

    def judge(self, request: Request) -> Any:
        if request.headers.get("Accept") != "application/json":
            return 302, {"Location": self.place}, b""
        return super().judge(request)

    def take(self, path: str, body: Any) -> tuple[int, Any]:
        kind = path.rsplit("/", 1)[1]
        if path != f"/api/v1/events/{kind}" or kind not in self.PATHS:
            return 404, {}
        if not isinstance(body.get("client_meta"), dict) or not body.get("session_id"):
            self.faults.append(f"common: {body}")
            return 422, {}
        if "account_email" in body or "prompt_text" in body:
            self.faults.append("a person's own")
        if kind == "session":
            self.sessions.setdefault(body["session_id"], {}).update(body)
            return 202, {}
        try:
            key = str(uuid.UUID(body["event_id"]))
        except ValueError:
            return 422, {}
        if key != body["event_id"]:
            return 422, {}
        if key in self.events:
            return 202, {"duplicate": True}
        needed = {
            "execution": ("response_text", "status"),
            "tool": ("tool_name", "success"),
            "system": ("kind", "payload"),
        }
        if any(name not in body for name in needed[kind]):
            self.faults.append(f"{kind}: {body}")
            return 422, {}
        if body.get("response_text") is not None:
            self.faults.append("a response")
        self.events[key] = dict(body, path=kind)
        return 202, {}

    def totals(self) -> dict[str, int]:
        rows = [row for row in list(self.events.values()) if row["path"] == "execution"]

        def total(name: str) -> int:
            return sum(row.get(name, 0) for row in rows)

        cached, creation = total("cache_read_tokens"), total("cache_creation_tokens")
        given = total("tokens_in") - cached - creation, total("tokens_out")
        return dict(zip(COUNTS, (*given, cached, creation)))


class TelemHQ(Strict):
    """TelemHQ: a ping a request; what comes again is known by its event_id."""

    kind = "telemhq"

    def __init__(self) -> None:
        self.by_id: dict[str, dict[str, Any]] = {}
        super().__init__()

    def env(self) -> dict[str, str]:
        return {"TELEMHQ_PING_URL": self.url}

    def judge(self, request: Request) -> Any:
        if request.method != "POST":
            return 200, {}, b"how to"
        if request.headers.get("Idempotency-Key") != request.ping["event_id"]:
            self.faults.append("key")
        self.by_id.setdefault(request.ping["event_id"], request.ping)
        self.accepted.append((request.path, request.ping))
        return 200, {}, b""

    def totals(self) -> dict[str, int]:
        names = (
            "input_tokens",
            "output_tokens",
            "cached_input_tokens",
            "cache_creation_input_tokens",
        )
        pings = list(self.by_id.values())
        return {
            count: sum(ping.get(name, 0) for ping in pings)
            for count, name in zip(COUNTS, names)
        }


ALL = (TelemHQ, Wigtoken, Recorder, Collector, ClaudeMetrics)
OTHERS = ALL[1:]
