"""Trackers: from variables to destinations, from a ping to requests, to the letter."""

from __future__ import annotations

import email.message
import json
import pathlib
import re
import time
from types import ModuleType
from typing import Any

import pytest

import trackers
from support import FIXTURES, TOKEN, Request, wait_until
from trackers import Fleet, fleet

__all__ = ["fleet"]  # fixtures

# A ping, and the log record that it becomes.
OTLP = json.loads((FIXTURES / "otlp.json").read_text("utf-8"))
PING = OTLP["ping"]
EVENT_ID = PING["event_id"]
ROW = ["msg_01abc.req_1", "claude-opus-5-5", 1763640000250, 3, 5, 7, 11, 2]
TOKENS = "input_tokens output_tokens cached_input_tokens cache_creation_input_tokens"
USED = {name: PING[name] for name in f"{TOKENS} total_tokens tool_calls".split()}
GOOD = {  # what makes each a destination
    "telemhq": {"TELEMHQ_PING_URL": f"https://telemhq.com/ping/{TOKEN}"},
    "wigtoken": {
        "WIGTOKEN_SERVER": "https://wig.example/",
        "WIGTOKEN_TOKEN": "wts_SECRET",
        "WIGTOKEN_MACHINE": "laptop",
    },
    "recorder": {"RECORDER_PAT": "pat_SECRET", "RECORDER_PREFIX": "Code/{project}"},
    "otlp": {"TELEMHQ_OTLP_ENDPOINT": "http://localhost:4318"},
    "claude-metrics": {"CLAUDE_METRICS_API_TOKEN": "cm_SECRET"},
}
KINDS = tuple(GOOD)
EVERYTHING = {k: v for found in GOOD.values() for k, v in found.items()}


def find(script: ModuleType, **environ: str) -> tuple[list[Any], list[str]]:
    """The trackers of an environment, and what is wrong with others."""
    found, problems = script.find_trackers(script.Settings(environ))
    return found, problems


def made(script: ModuleType, kind: str, **changes: str) -> Any:
    """A tracker, from the variables that are good for it."""
    environ = {"TELEMHQ_DESTINATIONS": kind, **GOOD[kind], **changes}
    (tracker,), problems = find(script, **environ)
    assert problems == []
    return tracker


# -- Who is named, and what it is set up with ------------------------------------------


def test_who_is_named_gets_pings(script: ModuleType) -> None:
    """In the list's order, once each; by default TelemHQ alone, whatever variables of
    others lie around. What is wrong with one is told, and stops only that one."""
    for named, kinds in (
        *(("", ["telemhq"]), (" , ", ["telemhq"]), (",".join(KINDS), list(KINDS))),
        (" OTLP , Recorder,,otlp", ["otlp", "recorder"]),
    ):
        found, problems = find(script, **EVERYTHING, TELEMHQ_DESTINATIONS=named)
        assert ([tracker.kind for tracker in found], problems) == (kinds, [])
    named = "recoder,wigtoken,otlp"
    found, problems = find(script, TELEMHQ_DESTINATIONS=named, **GOOD["otlp"])
    assert [tracker.kind for tracker in found] == ["otlp"]
    assert "'recoder' is none of telemhq, wigtoken" in problems[0]
    assert problems[1:] == ["WIGTOKEN_SERVER is not set in your own settings"]


UNUSABLE = (  # a variable, values, and what is said of them
    ("wigtoken", "WIGTOKEN_SERVER", "is not set", [""]),
    ("wigtoken", "WIGTOKEN_SERVER", "TELEMHQ_ALLOW_HTTP", ["http://far.example"]),
    ("wigtoken", "WIGTOKEN_SERVER", "user:", ["https://u:SECRET@far.example"]),
    ("wigtoken", "WIGTOKEN_TOKEN", "is not", ["", "SECRET\r\nX: y", "SECRET b", "é"]),
    ("wigtoken", "WIGTOKEN_MACHINE", "is not", ["", "my laptop", "a:b"]),
    ("recorder", "RECORDER_PAT", "is not set", [""]),
    ("recorder", "RECORDER_PREFIX", "is not set", ["", "  ", "a\nb", "a" * 129]),
    ("recorder", "RECORDER_URL", "https://", ["recorder.example"]),
    ("otlp", "TELEMHQ_OTLP_ENDPOINT", "is not set", [""]),
    ("otlp", "TELEMHQ_OTLP_HEADERS", "Name=value", ["SECRET", "a b=SECRET"]),
    ("otlp", "TELEMHQ_OTLP_HEADERS", "Name=value", ["a=SECRET%0d%0aX", "a=SECRET%z"]),
    ("claude-metrics", "CLAUDE_METRICS_DISABLED", "is set", ["1"]),
    ("claude-metrics", "CLAUDE_METRICS_API_URL", "https://", ["/api"]),
)


@pytest.mark.parametrize("kind, name, words, values", UNUSABLE)
def test_a_reason_names_the_variable_and_no_secret(
    script: ModuleType, kind: str, name: str, words: str, values: list[str]
) -> None:
    """What is missing or unusable is told by its variable's name, not by its value."""
    for value in values:
        environ = {"TELEMHQ_DESTINATIONS": kind, **GOOD[kind], name: value}
        found, (text,) = find(script, **environ)
        assert found == []
        assert text.startswith(name)
        assert words in text
        assert "SECRET" not in text


def test_a_directory_is_named_by_url_and_secret(script: ModuleType) -> None:
    """Another URL or another secret is another destination; what shapes a body, and
    not where it goes, makes none. TelemHQ's name stays what it was."""
    url = GOOD["telemhq"]["TELEMHQ_PING_URL"]
    expected = "telemhq-" + script.sha256_hex(url.encode())[:12]
    assert made(script, "telemhq").directory_name() == expected
    for kind, change in (
        ("wigtoken", {"WIGTOKEN_TOKEN": "wts_OTHER"}),
        ("wigtoken", {"WIGTOKEN_SERVER": "https://other.example"}),
        ("otlp", {"TELEMHQ_OTLP_HEADERS": "Authorization=Bearer OTHER"}),
        ("claude-metrics", {"CLAUDE_METRICS_API_TOKEN": "cm_OTHER"}),
    ):
        name = made(script, kind).directory_name()
        assert re.fullmatch(re.escape(kind) + "-[0-9a-f]{12}", name)
        assert made(script, kind, **change).directory_name() != name
    other = made(script, "wigtoken", WIGTOKEN_MACHINE="", TELEMHQ_MACHINE="x")
    assert other.directory_name() == made(script, "wigtoken").directory_name()
    assert other.own == {"machine": "x"}


# -- From a ping to requests -----------------------------------------------------------


class Place:
    """A strict receiver that is called without a network."""

    def __init__(self, script: ModuleType, kind: str) -> None:
        (cls,) = (found for found in trackers.ALL if found.kind == kind)
        self.strict: Any = cls()
        self.strict.close()
        environ = {"TELEMHQ_DESTINATIONS": kind, **self.strict.env()}
        ((self.tracker,), _) = find(script, **environ)

    def send(self, requests: list[Any]) -> list[int]:
        """The statuses of requests."""
        found = []
        for request in requests:
            headers = email.message.Message()
            for name, value in request.headers.items():
                headers[name] = value
            method = "GET" if request.body is None else "POST"
            path = re.sub(r"^\w+://[^/]+", "", request.url)
            sent = Request(method, path, headers, request.body or b"")
            found.append(self.strict.serve(sent)[0])
        return found


def test_otlp_gets_a_record_a_ping(script: ModuleType) -> None:
    """OTLP/HTTP with JSON, names by the GenAI conventions where there are any; the body
    and event.name for back ends that do not know eventName; a cost is a double, also
    when it is 0, and inside a model's; counts are integers."""
    place = Place(script, "otlp")
    assert place.send(place.tracker.requests(PING, {})) == [200]
    assert place.strict.faults == []
    (record,) = place.strict.records
    assert record == OTLP["record"]
    assert isinstance(record["telemhq.models.haiku.cost_usd"], float)
    ((_, body),) = place.strict.accepted
    (logs,) = body["resourceLogs"][0]["scopeLogs"]
    assert logs["scope"] == {"name": "telemhq_ping", "version": "1.1.0"}
    assert logs["logRecords"][0]["timeUnixNano"] == "1795176000250000000"
    place.send(place.tracker.requests(dict(PING, status="failed"), {}))
    assert place.strict.records[1]["severity"] == 17


def test_a_partial_success_refuses(script: ModuleType) -> None:
    """A 200 that rejects the record is a refusal, and no other one is."""
    for said, refused in (
        *((text, False) for text in ("", "{}", "OK", '{"partialSuccess": null}')),
        ('{"partialSuccess": {"rejectedLogRecords": "0"}}', False),
        ('{"partialSuccess": {"errorMessage": "a warning"}}', False),
        ('{"partialSuccess": {"rejectedLogRecords": "1"', False),
        ('{"partialSuccess": {"rejectedLogRecords": 1e999}}', False),
        ('{"partialSuccess": {"rejectedLogRecords": "1"}}', True),
        ('{"partialSuccess": {"rejectedLogRecords": 1}}', True),
    ):
        assert made(script, "otlp").refuses(said.encode()) is refused


def test_otlps_endpoint_and_headers(script: ModuleType) -> None:
    """/v1/logs is added to a base URL, once; headers as OTEL_EXPORTER_OTLP_HEADERS has
    them, which cannot change what a body is."""
    for endpoint in ("https://x.example/otlp", "https://x.example/otlp/v1/logs"):
        tracker = made(script, "otlp", TELEMHQ_OTLP_ENDPOINT=endpoint)
        assert tracker.url == "https://x.example/otlp/v1/logs"
    for text, headers in (
        ("Authorization=Bearer ab==", {"Authorization": "Bearer ab=="}),
        ("Authorization=Basic%20ab%3D", {"Authorization": "Basic ab="}),
        ("a=1, b = 2%2C3 ,", {"a": "1", "b": "2,3"}),
        ("Content-Type=text/plain", {}),
    ):
        found = made(script, "otlp", TELEMHQ_OTLP_HEADERS=text).headers
        assert found == {**made(script, "otlp").headers, **headers}


def test_a_token_may_stand_in_its_owners_file(
    script: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~/.claude-metrics/token is its plugin's; the variable goes before it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".claude-metrics" / "token"
    path.parent.mkdir()
    path.write_text("cm_FILE\n")
    for token, expected in (("", "cm_FILE"), ("cm_A", "cm_A")):
        found = made(script, "claude-metrics", CLAUDE_METRICS_API_TOKEN=token)
        assert found.secret == expected


CLAUDE_METRICS: tuple[tuple[str, dict[str, Any], list[str]], ...] = (
    # event, changes, the paths of its requests
    ("SessionStart", {"source": "startup"}, ["session"]),
    ("Stop", {}, ["execution", "session"]),
    ("StopFailure", {"status": "failed", "error": "rate_limit"}, ["execution"]),
    ("PostToolUse", {"tool_name": "Bash"}, ["tool"]),
    ("PostToolUseFailure", {"tool_name": "Bash", "status": "failed"}, ["tool"]),
    ("Notification", {"notification_type": "idle"}, ["system"]),
    ("PreCompact", {"trigger": "auto"}, ["system"]),
    ("SubagentStop", {"agent_type": "Explore"}, ["system"]),
    ("SubagentStop", {"total_tokens": 26}, ["execution", "system"]),
    ("SessionEnd", {"reason": "clear"}, ["session"]),
    ("SessionEnd", {"total_tokens": 26}, ["execution", "session"]),
    ("SessionLost", {"total_tokens": 26}, ["execution", "session"]),
)


@pytest.mark.parametrize("name, changes, paths", CLAUDE_METRICS)
def test_claude_metrics_gets_the_metadata_of_its_plugins_events(
    script: ModuleType, name: str, changes: dict[str, Any], paths: list[str]
) -> None:
    """Each kind of event at its own path; a repeat is known by its UUID."""
    place = Place(script, "claude-metrics")
    spent = "total_tokens" in changes
    bare = {
        k: v for k, v in PING.items() if spent or not k.endswith(("tokens", "ools"))
    }
    ping = {**bare, "event": name, **changes}
    assert place.tracker.wants(ping)
    requests = place.tracker.requests(ping, {"totals": USED})
    assert [request.url.rsplit("/", 1)[1] for request in requests] == paths
    for _ in range(2):
        assert place.send(requests) == [202] * len(paths)
    assert place.strict.faults == []
    assert len(place.strict.events) == len(set(paths) - {"session"})
    for found in place.strict.events.values():
        kinds = (None, "notification", "pre_compact", "subagent_stop")
        assert found.get("kind") in kinds
    for session in place.strict.sessions.values():
        assert session["tokens_in_total"] == 21
        assert session["tokens_out_total"] == 5
        assert session["tool_calls_total"] == 3
        assert ("ended_at" in session) == (name in ("SessionEnd", "SessionLost"))
        assert ("started_at" in session) == (name == "SessionStart")
    assert place.strict.sums() == ((3, 5, 7, 11) if spent else (0, 0, 0, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_is_the_same_at_every_repeat(
    script: ModuleType, kind: str
) -> None:
    """From the frozen ping and what stands beside it, and nothing else: neither the
    clock nor today's settings. No body holds a secret."""
    environ = {"WIGTOKEN_MACHINE": "other", "RECORDER_PREFIX": "Other/{project}"}
    first, later = made(script, kind), made(script, kind, **environ)
    beside: dict[str, Any] = {"messages": [ROW], "totals": USED, "since_end": USED}
    beside["own"] = first.own
    for name in ("Stop", "SessionEnd", "PostToolUse"):
        ping = dict(PING, event=name)
        one, two = first.requests(ping, beside), later.requests(ping, beside)
        assert [vars(request) for request in one] == [vars(request) for request in two]
        assert not [request for request in one if b"SECRET" in request.body]


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_records_nothing(script: ModuleType, kind: str) -> None:
    """Doctor's question is answered, and leaves nothing behind. A tracker can ask for
    nothing that the gate does not know; TelemHQ's and otlp are sent the ping alone."""
    place = Place(script, kind)
    assert place.send([place.tracker.check()])[0] in (200, 405)
    assert place.strict.faults == []
    assert not [name for name in trackers.KEPT if getattr(place.strict, name, None)]
    assert set(place.tracker.needs) <= set(script.BESIDE)
    assert bool(place.tracker.needs) == (kind not in ("telemhq", "otlp"))


def test_the_gate_beside_a_ping(script: ModuleType) -> None:
    """Only in its shape, and only what the tracker needs, also of what somebody else
    has written beside a ping."""
    for name, good, bad in (
        ("messages", [ROW], [ROW[:-1]]),
        ("messages", [["e.m@1[x]", *ROW[1:]]], [["a b", *ROW[1:]]]),
        ("messages", [], [[ROW[0], "vendor/name", *ROW[2:]]]),
        ("messages", [ROW], [[*ROW[:-1], "CANARY"]]),
        ("totals", USED, {**USED, "a canary": 1}),
        ("since_end", USED, {**USED, "tool_calls": "CANARY"}),
        ("own", {"prefix": "A/b c/é"}, {"prefix": "a\nb"}),
        ("own", {"prefix": "a" * 128}, {"prefix": "a" * 129}),
    ):
        assert script.gate_beside({name: good, "CANARY": 1}, (name,)) == {name: good}
        assert script.gate_beside({name: bad}, (name,)) == {}
        assert script.gate_beside({name: good}, ()) == {}


# -- From a hook to five trackers ------------------------------------------------------


TROUBLES: dict[str, Any] = {
    "dead": None,
    "slow": lambda _: time.sleep(6),
    "poisoned": lambda _: 400,
    "rotated": lambda _: 401,
    "unsound": None,
}


@pytest.mark.fault(35)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_one_in_trouble_delays_no_other(fleet: Fleet, trouble: str) -> None:
    """Dead, slow, poisoned, unsound: the four others have it all within seconds, and
    the hook is as fast as ever."""
    place = fleet.places["wigtoken"]
    place.disturb = TROUBLES[trouble]
    if trouble == "dead":
        place.close()
    elif trouble == "unsound":
        fleet.base("wigtoken").mkdir(parents=True)
        fleet.base("wigtoken").chmod(0o777)
    begun = time.monotonic()
    for name in ("SessionStart-startup", "Stop", "SessionEnd-other"):
        fleet.hook(name)
    assert time.monotonic() - begun < 5
    wait_until(lambda: all("wigtoken" in str(path) for path in fleet.home.waiting()))
    assert len(fleet.places["telemhq"].by_id) == 3
    assert len(fleet.places["otlp"].records) == 3
    fleet.home.end()


def test_what_a_collector_rejects_is_not_sent_again(fleet: Fleet) -> None:
    """A partial success is a refusal: set aside and counted, when others are taken."""
    place = fleet.places["otlp"]
    for name in ("Stop", "PostToolUse-Bash", "SessionEnd-other"):
        fleet.outage(name, transcript_path="")

    def reject(request: Request) -> None:
        place.reject = b"claude_code.Stop" in request.body

    place.disturb = reject
    fleet.hook("Notification")
    wait_until(lambda: not fleet.home.waiting())
    fleet.home.quiet()
    events = {record["event"].partition(".")[2] for record in place.records}
    assert events == {"Notification", "PostToolUse", "SessionEnd"}
    assert len(place.requests) == 4
    assert len(list(fleet.base("otlp").glob("refused/*"))) == 1
    losses = json.loads((fleet.base("otlp") / "state.json").read_text())["losses"]
    assert losses == {"refused: HTTP 200, rejected": 1}
