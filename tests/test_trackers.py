"""Trackers: from variables to destinations, from a ping to requests, to the letter."""

from __future__ import annotations

import contextlib
import email.message
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

import pytest

import trackers
from support import (
    FIXTURES,
    ROOT,
    SCRIPT,
    TOKEN,
    Home,
    Request,
    event,
    patched,
    script_command,
    wait_until,
)

if TYPE_CHECKING:
    import pathlib
    from types import ModuleType

README = (ROOT / "README.md").read_text("utf-8")
EVENT_ID = "0123456789abcdef0123456789abcdef"
PING = {
    "event_id": EVENT_ID,
    "event": "Stop",
    "timestamp": "2026-11-20T12:00:00.250Z",
    "status": "success",
    "project": "api",
    "session_id": "5e551011-0000-4000-8000-000000000000",
    "prompt_id": "prompt-1",
    "provider": "anthropic",
    "tool": "claude-code",
    "hook_version": "1.1.0",
    "model": "claude-opus-5-5",
    "input_tokens": 3,
    "output_tokens": 5,
    "cached_input_tokens": 7,
    "cache_creation_input_tokens": 11,
    "reasoning_tokens": 2,
    "total_tokens": 26,
    "tools": {"Bash": 2, "mcp__a__b": 1},
    "tool_calls": 3,
    "duration_ms": 1250,
    "usage_complete": False,
    "cost_usd": 0.5,
}
ROW = ["msg_01abc", "claude-opus-5-5", 1763640000250, 3, 5, 7, 11, 2]
USED = {
    "input_tokens": 3,
    "output_tokens": 5,
    "cached_input_tokens": 7,
    "cache_creation_input_tokens": 11,
    "total_tokens": 26,
    "tool_calls": 3,
}
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


def section_cut(title: str) -> tuple[str, str]:
    """(one section of the script, all the rest)."""
    text = SCRIPT.read_text("utf-8")
    start = text.index(f"# -- {title}")
    end = text.index("\n# -- ", start + 1)
    return text[start:end], text[:start] + text[end:]


def made(script: ModuleType, kind: str, **changes: str) -> Any:
    """A tracker, from the variables that are good for it."""
    environ = {"TELEMHQ_DESTINATIONS": kind, **GOOD[kind], **changes}
    (tracker,), problems = script.find_trackers(
        script.Settings(environ), script.read_secret
    )
    assert problems == []
    return tracker


def problem(script: ModuleType, kind: str, **changes: str) -> str:
    """Why there is no such tracker."""
    environ = {"TELEMHQ_DESTINATIONS": kind, **GOOD[kind], **changes}
    found, problems = script.find_trackers(script.Settings(environ), script.read_secret)
    assert found == []
    (text,) = problems
    return str(text)


# -- Who is named, and what it is set up with ------------------------------------------


def test_no_trackers_name_stands_outside_of_its_section() -> None:
    """Adding a tracker touches one section: no other one knows any of them, or their
    variables. (TelemHQ's own name is the product's.)"""
    inside, outside = section_cut("Trackers")
    names = r"(?i)wigtoken|recorder|otlp|claude[-_]?metrics"
    assert re.findall(names, outside) == []
    assert len(set(map(str.lower, re.findall(names, inside)))) >= 4


def test_trackers_are_in_the_auditors_part() -> None:
    """The section stands right behind the gate's."""
    banners = re.findall(r"(?m)^# -- (\w+)", SCRIPT.read_text("utf-8"))
    assert banners[banners.index("Trackers") - 1] == "Event"


def test_by_default_only_telemhq_is_used(script: ModuleType) -> None:
    """Other trackers' variables that lie around mean nothing."""
    environ = {k: v for found in GOOD.values() for k, v in found.items()}
    for named in ({}, {"TELEMHQ_DESTINATIONS": ""}, {"TELEMHQ_DESTINATIONS": " , "}):
        found, problems = script.find_trackers(
            script.Settings({**environ, **named}), script.read_secret
        )
        assert [tracker.kind for tracker in found] == ["telemhq"]
        assert problems == []


@pytest.mark.parametrize(
    "named, kinds",
    [
        ("wigtoken", ["wigtoken"]),
        ("otlp,telemhq", ["otlp", "telemhq"]),
        (" OTLP , Recorder,,otlp", ["otlp", "recorder"]),
        (",".join(KINDS), list(KINDS)),
    ],
)
def test_named_trackers_are_used(
    script: ModuleType, named: str, kinds: list[str]
) -> None:
    """The list's order, once each; case and spaces do not matter."""
    environ = {k: v for found in GOOD.values() for k, v in found.items()}
    environ["TELEMHQ_DESTINATIONS"] = named
    found, problems = script.find_trackers(script.Settings(environ), script.read_secret)
    assert [tracker.kind for tracker in found] == kinds
    assert problems == []


def test_what_is_wrong_with_one_stops_only_that_one(script: ModuleType) -> None:
    """What is wrong with one is told; the others work."""
    environ = {"TELEMHQ_DESTINATIONS": "recoder,wigtoken,otlp", **GOOD["otlp"]}
    found, problems = script.find_trackers(script.Settings(environ), script.read_secret)
    assert [tracker.kind for tracker in found] == ["otlp"]
    assert len(problems) == 2
    assert "recoder" in problems[0]
    assert "claude-metrics" in problems[0]
    assert "WIGTOKEN_SERVER is not set" in problems[1]


@pytest.mark.parametrize(
    "kind, changes, names",
    [
        ("telemhq", {"TELEMHQ_PING_URL": ""}, "TELEMHQ_PING_URL is not set"),
        ("telemhq", {"TELEMHQ_PING_URL": "ftp://x"}, "TELEMHQ_PING_URL"),
        ("wigtoken", {"WIGTOKEN_SERVER": ""}, "WIGTOKEN_SERVER is not set"),
        ("wigtoken", {"WIGTOKEN_SERVER": "http://far.example"}, "WIGTOKEN_SERVER"),
        ("wigtoken", {"WIGTOKEN_SERVER": "https://u:p@far.example"}, "user:password"),
        ("wigtoken", {"WIGTOKEN_SERVER": "https://far.example/?a=b"}, "base URL"),
        ("wigtoken", {"WIGTOKEN_TOKEN": ""}, "WIGTOKEN_TOKEN is not set"),
        ("wigtoken", {"WIGTOKEN_TOKEN": "a\r\nX: y"}, "WIGTOKEN_TOKEN"),
        ("wigtoken", {"WIGTOKEN_TOKEN": "a b"}, "WIGTOKEN_TOKEN"),
        ("wigtoken", {"WIGTOKEN_TOKEN": "é"}, "WIGTOKEN_TOKEN"),
        ("wigtoken", {"WIGTOKEN_MACHINE": ""}, "WIGTOKEN_MACHINE is not set"),
        ("wigtoken", {"WIGTOKEN_MACHINE": "my laptop"}, "WIGTOKEN_MACHINE"),
        ("wigtoken", {"WIGTOKEN_MACHINE": "a:b"}, "WIGTOKEN_MACHINE"),
        ("wigtoken", {"WIGTOKEN_MACHINE": "a" * 101}, "WIGTOKEN_MACHINE"),
        ("recorder", {"RECORDER_PAT": ""}, "RECORDER_PAT is not set"),
        ("recorder", {"RECORDER_URL": "recorder.example"}, "RECORDER_URL"),
        ("recorder", {"RECORDER_PREFIX": "a\nb"}, "RECORDER_PREFIX"),
        ("recorder", {"RECORDER_PREFIX": "a" * 129}, "RECORDER_PREFIX"),
        ("otlp", {"TELEMHQ_OTLP_ENDPOINT": ""}, "TELEMHQ_OTLP_ENDPOINT is not set"),
        ("otlp", {"TELEMHQ_OTLP_HEADERS": "SECRET"}, "TELEMHQ_OTLP_HEADERS"),
        ("otlp", {"TELEMHQ_OTLP_HEADERS": "a=SECRET%0d%0aX"}, "TELEMHQ_OTLP_HEADERS"),
        ("otlp", {"TELEMHQ_OTLP_HEADERS": "a b=SECRET"}, "TELEMHQ_OTLP_HEADERS"),
        ("otlp", {"TELEMHQ_OTLP_HEADERS": "a=SECRET%zz"}, "TELEMHQ_OTLP_HEADERS"),
        ("claude-metrics", {"CLAUDE_METRICS_DISABLED": "1"}, "DISABLED is set"),
        ("claude-metrics", {"CLAUDE_METRICS_API_URL": "/api"}, "METRICS_API_URL"),
    ],
)
def test_reason_names_the_variable_and_no_secret(
    script: ModuleType, kind: str, changes: dict[str, str], names: str
) -> None:
    """What is missing or unusable is told by its variable's name, not by its value."""
    text = problem(script, kind, **changes)
    assert names in text
    assert "SECRET" not in text
    assert TOKEN not in text


def test_wigtokens_machine_is_telemhqs_unless_it_has_one(script: ModuleType) -> None:
    """WIGTOKEN_MACHINE, else TELEMHQ_MACHINE; the host's name never leaves."""
    machine = {"TELEMHQ_MACHINE": "desk"}
    assert made(script, "wigtoken", **machine).machine == "laptop"
    assert made(script, "wigtoken", WIGTOKEN_MACHINE="", **machine).machine == "desk"
    # A name that TelemHQ takes, and wigtoken does not:
    text = problem(script, "wigtoken", WIGTOKEN_MACHINE="", TELEMHQ_MACHINE="a:b")
    assert "WIGTOKEN_MACHINE" in text


@pytest.mark.skipif(sys.platform == "win32", reason="has no such modes")
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604, 0o666])
def test_token_file_that_others_can_read_is_refused(
    script: ModuleType,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
) -> None:
    """~/.claude-metrics/token is the plugin's; only its owner may have a look at it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "No such file" in problem(
        script, "claude-metrics", CLAUDE_METRICS_API_TOKEN=""
    )
    (tmp_path / ".claude-metrics").mkdir()
    path = tmp_path / ".claude-metrics" / "token"
    path.write_text("cm_FILE\n")
    path.chmod(mode)
    if mode & 0o077:
        text = problem(script, "claude-metrics", CLAUDE_METRICS_API_TOKEN="")
        assert "chmod 600" in text
        assert "cm_FILE" not in text
    else:
        tracker = made(script, "claude-metrics", CLAUDE_METRICS_API_TOKEN="")
        assert tracker.secret == "cm_FILE"
    # The variable goes before the file, whatever that is.
    assert made(script, "claude-metrics").secret == "cm_SECRET"


def test_directory_is_named_by_url_and_secret(script: ModuleType) -> None:
    """Another URL or another secret is another destination; TelemHQ's name stays what
    it was: pings wait there."""
    url = GOOD["telemhq"]["TELEMHQ_PING_URL"]
    expected = "telemhq-" + script.sha256_hex(url.encode())[:12]
    assert made(script, "telemhq").directory_name() == expected
    for kind, change in (
        ("wigtoken", {"WIGTOKEN_TOKEN": "wts_OTHER"}),
        ("wigtoken", {"WIGTOKEN_SERVER": "https://other.example"}),
        ("recorder", {"RECORDER_PAT": "pat_OTHER"}),
        ("otlp", {"TELEMHQ_OTLP_HEADERS": "Authorization=Bearer OTHER"}),
        ("claude-metrics", {"CLAUDE_METRICS_API_TOKEN": "cm_OTHER"}),
    ):
        name = made(script, kind).directory_name()
        assert re.fullmatch(re.escape(kind) + "-[0-9a-f]{12}", name)
        assert made(script, kind).directory_name() == name
        assert made(script, kind, **change).directory_name() != name
    # What shapes a body, and not where it goes, makes no other one.
    name = made(script, "wigtoken").directory_name()
    assert made(script, "wigtoken", WIGTOKEN_MACHINE="x").directory_name() == name


# -- From a ping to requests -----------------------------------------------------------


class Place:
    """A strict receiver that is called without a network."""

    def __init__(self, kind: str) -> None:
        (cls,) = (found for found in trackers.ALL if found.kind == kind)
        self.strict: Any = cls()
        self.strict.close()

    def tracker(self, script: ModuleType, **changes: str) -> Any:
        """The tracker that sends to it."""
        environ = {"TELEMHQ_DESTINATIONS": self.strict.kind, **self.strict.env()}
        (found,), problems = script.find_trackers(
            script.Settings({**environ, **changes}), script.read_secret
        )
        assert problems == []
        return found

    def send(self, requests: list[Any]) -> list[int]:
        """The statuses of requests."""
        return [self.answer(request)[0] for request in requests]

    def answer(self, request: Any) -> Any:
        """(status, headers, body) that a request gets."""
        headers = email.message.Message()
        for name, value in request.headers.items():
            headers[name] = value
        method = "GET" if request.body is None else "POST"
        path = re.sub(r"^\w+://[^/]+", "", request.url)
        place = Request(method, path, headers, request.body or b"")
        return self.strict.serve(place)


def test_telemhqs_body_is_the_ping(script: ModuleType) -> None:
    """Byte for byte, whatever stands beside it for others."""
    (request,) = made(script, "telemhq").requests(PING, {"messages": [ROW]})
    assert request.body == script.encode_json(PING).encode()
    assert request.headers["Idempotency-Key"] == EVENT_ID
    assert "Authorization" not in request.headers


def test_wigtoken_gets_a_row_a_message(script: ModuleType) -> None:
    """Its own id, model, time and four counts; the machine that was its when the ping
    was made."""
    place = Place("wigtoken")
    tracker = place.tracker(script)
    beside = {"own": {"machine": "desk"}, "messages": [ROW]}
    requests = tracker.requests(PING, beside)
    assert json.loads(requests[0].body) == {
        "machine": "desk",
        "messages": [
            {
                "message_id": "msg_01abc",
                "model": "claude-opus-5-5",
                "ts": "2025-11-20T12:00:00.250Z",
                "input_tokens": 3,
                "output_tokens": 5,
                "cache_read_input_tokens": 7,
                "cache_creation_input_tokens": 11,
            }
        ],
    }
    assert place.send(requests) == [200]
    assert place.send(requests) == [200]
    assert place.strict.totals() == dict(zip(trackers.COUNTS, (3, 5, 7, 11)))
    assert place.strict.faults == []


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 4000])
def test_wigtoken_gets_at_most_1000_rows_a_request(
    script: ModuleType, count: int
) -> None:
    """More: 413. No rows: no request."""
    place = Place("wigtoken")
    rows = [[f"msg_{n}", *ROW[1:]] for n in range(count)]
    requests = place.tracker(script).requests(PING, {"messages": rows})
    assert place.send(requests) == [200] * -(-count // 1000)
    assert place.strict.totals()["output"] == 5 * count
    assert place.strict.faults == []


@pytest.mark.parametrize("name", ["SessionEnd", "SessionLost"])
def test_recorder_gets_four_values_a_session(script: ModuleType, name: str) -> None:
    """Under the project's prefix, at the session's end, with the event's id."""
    place = Place("recorder")
    tracker = place.tracker(script)
    own = tracker.frozen(PING)
    assert own == {"prefix": "System/Code/api/Tokens"}
    ping = dict(PING, event=name)
    requests = tracker.requests(ping, {"own": own, "since_end": USED})
    assert place.send(requests) == [201] * 4
    assert place.strict.faults == []
    assert [point["name"] for point in place.strict.points] == [
        f"System/Code/api/Tokens/{name}"
        for name in ("Input", "Output", "CacheRead", "CacheCreate")
    ]
    assert [point["value"] for point in place.strict.points] == [3, 5, 7, 11]
    assert {point["recorded_at"] for point in place.strict.points} == {
        PING["timestamp"]
    }
    assert all(EVENT_ID in point["comment"] for point in place.strict.points)


def test_recorder_gets_nothing_else(script: ModuleType) -> None:
    """No value before the end, of a session that used nothing, without a prefix."""
    tracker = made(script, "recorder")
    own = tracker.frozen(PING)
    end = dict(PING, event="SessionEnd")
    assert tracker.requests(PING, {"own": own, "since_end": USED}) == []
    assert tracker.requests(end, {"own": own}) == []
    nothing = dict.fromkeys(USED, 0)
    assert tracker.requests(end, {"own": own, "since_end": nothing}) == []
    assert tracker.requests(end, {"since_end": USED}) == []
    assert tracker.wants(end)
    assert not made(script, "recorder", RECORDER_PREFIX="").wants(end)


def test_otlp_gets_a_record_a_ping(script: ModuleType) -> None:
    """OTLP/HTTP with JSON, names by the GenAI conventions where there are any."""
    place = Place("otlp")
    (request,) = place.tracker(script).requests(PING, {})
    assert place.send([request]) == [200]
    assert place.strict.faults == []
    assert place.strict.records == [
        {
            "service.name": "claude-code",
            "event": "claude_code.Stop",
            "severity": 9,
            "telemhq.event_id": EVENT_ID,
            "telemhq.status": "success",
            "telemhq.project": "api",
            "telemhq.tool": "claude-code",
            "session.id": PING["session_id"],
            "gen_ai.conversation.id": PING["session_id"],
            "prompt.id": "prompt-1",
            "gen_ai.provider.name": "anthropic",
            "gen_ai.response.model": "claude-opus-5-5",
            "gen_ai.usage.input_tokens": 21,
            "gen_ai.usage.cache_read.input_tokens": 7,
            "gen_ai.usage.cache_creation.input_tokens": 11,
            "gen_ai.usage.output_tokens": 5,
            "telemhq.reasoning_tokens": 2,
            "telemhq.total_tokens": 26,
            "telemhq.tools.Bash": 2,
            "telemhq.tools.mcp__a__b": 1,
            "telemhq.tool_calls": 3,
            "telemhq.duration_ms": 1250,
            "telemhq.usage_complete": False,
            "telemhq.cost_usd": 0.5,
        }
    ]
    (body,) = place.strict.accepted
    (logs,) = body[1]["resourceLogs"][0]["scopeLogs"]
    assert logs["scope"] == {"name": "telemhq_ping", "version": "1.1.0"}
    assert logs["logRecords"][0]["timeUnixNano"] == "1795176000250000000"


@pytest.mark.parametrize("cost", [0, 1, 0.5])
def test_otlp_attribute_keeps_its_type(script: ModuleType, cost: float) -> None:
    """A back end that has seen a double takes no integer under that name."""
    (request,) = made(script, "otlp").requests(dict(PING, cost_usd=cost), {})
    assert b'"telemhq.cost_usd","value":{"doubleValue":' in request.body


def test_otlp_says_what_failed(script: ModuleType) -> None:
    """A failed event is of severity ERROR."""
    place = Place("otlp")
    place.send(place.tracker(script).requests(dict(PING, status="failed"), {}))
    assert place.strict.records[0]["severity"] == 17


@pytest.mark.parametrize(
    "body, refused",
    [
        (b"", False),
        (b"{}", False),
        (b"OK", False),
        (b'{"partialSuccess": {}}', False),
        (b'{"partialSuccess": null}', False),
        (b'{"partialSuccess": {"rejectedLogRecords": "0"}}', False),
        (b'{"partialSuccess": {"errorMessage": "a warning"}}', False),
        (b'{"partialSuccess": {"rejectedLogRecords": "1"}}', True),
        (b'{"partialSuccess": {"rejectedLogRecords": 1}}', True),
        (b'{"partialSuccess": {"rejectedLogRecords": "1"', False),
    ],
)
def test_partial_success_refuses(
    script: ModuleType, body: bytes, refused: bool
) -> None:
    """A 200 that rejects the record is a refusal, and no other one is."""
    assert made(script, "otlp").refuses(body) is refused
    for kind in set(KINDS) - {"otlp"}:
        assert not made(script, kind).refuses(body)


@pytest.mark.parametrize(
    "text, headers",
    [
        ("", {}),
        ("Authorization=Bearer abc==", {"Authorization": "Bearer abc=="}),
        ("Authorization=Basic%20abc%3D", {"Authorization": "Basic abc="}),
        ("a=1, b = 2%2C3 ,", {"a": "1", "b": "2,3"}),
        ("Content-Type=text/plain", {}),
    ],
)
def test_headers_of_ones_own(
    script: ModuleType, text: str, headers: dict[str, str]
) -> None:
    """As OTEL_EXPORTER_OTLP_HEADERS has them; they cannot change what a body is."""
    tracker = made(script, "otlp", TELEMHQ_OTLP_HEADERS=text)
    plain = made(script, "otlp").headers
    assert tracker.headers == {**plain, **headers}
    assert tracker.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "endpoint, url",
    [
        ("http://localhost:4318", "http://localhost:4318/v1/logs"),
        ("http://localhost:4318/", "http://localhost:4318/v1/logs"),
        ("https://x.example/otlp", "https://x.example/otlp/v1/logs"),
        ("https://x.example/v1/logs", "https://x.example/v1/logs"),
    ],
)
def test_endpoint_is_a_base_url(script: ModuleType, endpoint: str, url: str) -> None:
    """/v1/logs is added to it, once."""
    assert made(script, "otlp", TELEMHQ_OTLP_ENDPOINT=endpoint).url == url


CLAUDE_METRICS: tuple[
    tuple[str, dict[str, Any], list[str]], ...
] = (  # event, changes, the paths of its requests
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
    place = Place("claude-metrics")
    bare = {k: PING[k] for k in PING if not k.endswith("_tokens") and k != "tools"}
    ping = {**(bare if "total_tokens" not in changes else PING), "event": name}
    ping.update(changes)
    requests = place.tracker(script).requests(ping, {"totals": USED})
    assert [request.url.rsplit("/", 1)[1] for request in requests] == paths
    for _ in range(2):
        assert place.send(requests) == [202] * len(paths)
    assert place.strict.faults == []
    assert len(place.strict.events) == len(set(paths) - {"session"})
    if "session" in paths:
        (session,) = place.strict.sessions.values()
        assert session["tokens_in_total"] == 21
        assert session["tokens_out_total"] == 5
        assert session["tool_calls_total"] == 3
        assert ("ended_at" in session) == (name in ("SessionEnd", "SessionLost"))
        assert ("started_at" in session) == (name == "SessionStart")
    expected = (3, 5, 7, 11) if "total_tokens" in changes else (0, 0, 0, 0)
    assert place.strict.totals() == dict(zip(trackers.COUNTS, expected))


def test_claude_metrics_never_gets_prompts(script: ModuleType) -> None:
    """Its plugin sends them in full; ours does not tell of them at all."""
    tracker = made(script, "claude-metrics")
    for name in ("UserPromptSubmit", "UserPromptExpansion", "PreToolUse"):
        assert not tracker.wants(dict(PING, event=name))
    for name, _, _ in CLAUDE_METRICS[:-1]:
        assert tracker.wants(dict(PING, event=name))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_is_the_same_at_every_repeat(
    script: ModuleType, kind: str
) -> None:
    """From the frozen ping and what stands beside it, and nothing else: neither the
    clock nor today's settings."""
    environ = {"WIGTOKEN_MACHINE": "other", "RECORDER_PREFIX": "Other/{project}"}
    first, later = made(script, kind), made(script, kind, **environ)
    beside = {"messages": [ROW], "totals": USED, "since_end": USED}
    beside["own"] = first.frozen(PING)
    for name in ("Stop", "SessionEnd", "PostToolUse"):
        ping = dict(PING, event=name)
        one, two = first.requests(ping, beside), later.requests(ping, beside)
        assert [(r.url, r.headers, r.body) for r in one] == [
            (r.url, r.headers, r.body) for r in two
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_check_records_nothing(script: ModuleType, kind: str) -> None:
    """Doctor's question is answered, and leaves nothing behind."""
    place = Place(kind)
    status = place.answer(place.tracker(script).check())[0]
    assert status in (200, 405)
    assert place.strict.faults == []
    assert place.strict.totals() == dict.fromkeys(trackers.COUNTS, 0)
    for kept in ("rows", "points", "records", "events", "sessions", "by_id"):
        assert not getattr(place.strict, kept, None)


@pytest.mark.parametrize("kind", KINDS)
def test_secrets_stand_in_headers_or_the_url_only(
    script: ModuleType, kind: str
) -> None:
    """No body holds one."""
    tracker = made(script, kind)
    beside = {"messages": [ROW], "totals": USED, "since_end": USED}
    beside["own"] = tracker.frozen(PING)
    for name in ("Stop", "SessionEnd"):
        for request in tracker.requests(dict(PING, event=name), beside):
            assert b"SECRET" not in request.body


# -- The gate, for what stands beside a ping -------------------------------------------


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("messages", [], {}),
        ("messages", [ROW], [ROW[:-1]]),
        ("messages", [["e.m@1[x]", *ROW[1:]]], [["a b", *ROW[1:]]]),
        ("messages", [ROW] * 4000, [ROW] * 4001),
        ("messages", [ROW], [[*ROW[:1], "vendor/name", *ROW[2:]]]),
        ("messages", [ROW], [[*ROW[:-1], "CANARY"]]),
        ("messages", [ROW], [[*ROW[:-1], -1]]),
        ("totals", USED, {**USED, "CANARY": 1}),
        ("totals", USED, {**USED, "tool_calls": "CANARY"}),
        ("since_end", USED, [USED]),
        ("own", {"prefix": "A/b c/é"}, {"prefix": "a\nb"}),
        ("own", {"prefix": "a" * 300}, {"prefix": "a" * 301}),
        ("own", {"machine": "x"}, {"machine": 1}),
    ],
)
def test_gate_beside_the_ping(
    script: ModuleType, name: str, good: object, bad: object
) -> None:
    """Only in its shape, and only what the tracker needs."""
    needs = (name,)
    assert script.gate_beside({name: good}, needs) == {name: good}
    assert script.gate_beside({name: bad}, needs) == {}
    assert script.gate_beside({name: good}, ()) == {}
    assert script.gate_beside({name: good, "CANARY": 1}, needs) == {name: good}
    assert script.gate_beside([name], needs) == {}


def test_record_on_disk_goes_through_the_gate(
    script: ModuleType, tmp_path: pathlib.Path
) -> None:
    """Whatever somebody else has put beside a ping: only what the tracker needs, in its
    shape, is read again."""
    record = {
        "ping": {**PING, "prompt": "CANARY"},
        "local": {},
        "beside": {"messages": [[*ROW[:2], "CANARY"]], "totals": USED, "x": "CANARY"},
        "accepted": "CANARY",
    }
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "1").write_text(json.dumps(record))
    for needs, beside in (((), {}), (("messages", "totals"), {"totals": USED})):
        found = script.Outbox(str(tmp_path), needs).record("1")
        assert (found.ping, found.beside, found.accepted) == (PING, beside, 0)


def test_needs_are_of_the_gates_table(script: ModuleType) -> None:
    """A tracker can ask for nothing that the gate does not know; TelemHQ and otlp ask
    for nothing: they are sent the ping alone."""
    for kind in KINDS:
        needs = made(script, kind).needs
        assert set(needs) <= set(script.BESIDE)
        assert bool(needs) == (kind not in ("telemhq", "otlp"))


# -- From a hook to five trackers ------------------------------------------------------


class Fleet:
    """Receivers of some kinds, and a HOME that sends to them."""

    def __init__(self, home: Home, script: ModuleType, *kinds: str) -> None:
        self.home = home
        self.places: dict[str, Any] = {
            cls.kind: cls() for cls in trackers.ALL if cls.kind in (kinds or KINDS)
        }
        self.environ = {"TELEMHQ_DESTINATIONS": ",".join(self.places)}
        for place in self.places.values():
            self.environ.update(place.env())
        found, _ = script.find_trackers(
            script.Settings({**self.environ}), script.read_secret
        )
        self.names = {tracker.kind: tracker.directory_name() for tracker in found}

    def base(self, kind: str) -> pathlib.Path:
        """A destination's directory."""
        return self.home.state / str(self.names[kind])

    def waiting(self, kind: str) -> list[pathlib.Path]:
        """The pings that wait for a tracker, oldest first."""
        return sorted(self.base(kind).glob("outbox/[0-9]*.json"))

    def hook(self, name: str, told: bytes = b"", **changes: Any) -> None:
        """Run a hook. told: what it must say on stderr."""
        env = {key: changes.pop(key) for key in list(changes) if key.isupper()}
        more: dict[str, Any] = {**self.environ, **env}
        done = self.home.hook(event(name, **changes), **more)
        assert (done.returncode, done.stdout) == (0, b"")
        assert told in done.stderr
        assert bool(told) == bool(done.stderr)

    def session(self, *names: str) -> dict[str, str]:
        """Play a real session with hooks; the fields of its events."""
        folder = FIXTURES / "transcripts" / "tools"
        expected = json.loads((folder / "expected.json").read_text("utf-8"))
        key = expected["session_id"]
        path = self.home.path / ".claude" / "projects" / "-acme" / f"{key}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(folder / f"{key}.jsonl"), str(path))
        fields = {"session_id": key, "transcript_path": str(path)}
        for name in names:
            self.hook(name, **fields)
        return fields

    def outage(self, *names: str) -> None:
        """Play a session while every tracker answers 503; then they are well again, and
        no back-off stands."""
        for place in self.places.values():
            place.disturb = lambda _: 503
        if names:
            for name in names:
                self.hook(name, transcript_path="")
        else:
            self.session(*A_SESSION)
        wait_until(lambda: all(place.requests for place in self.places.values()))
        self.home.end()
        for kind, place in self.places.items():
            place.disturb = None
            place.requests.clear()
            state = self.base(kind) / "state.json"
            if state.exists():
                state.unlink()

    def close(self) -> None:
        """End the receivers."""
        for place in self.places.values():
            place.close()


@pytest.fixture
def fleet(home: Home, script: ModuleType) -> Iterator[Callable[..., Fleet]]:
    """Makes a Fleet."""
    made: list[Fleet] = []

    def make(*kinds: str) -> Fleet:
        made.append(Fleet(home, script, *kinds))
        return made[-1]

    yield make
    for found in made:
        found.close()


TOOLS = dict(zip(trackers.COUNTS, (510, 260, 15000, 100)))  # of the fixture `tools`
A_SESSION = ("SessionStart-startup", "Stop", "SessionEnd-other")


def test_one_event_reaches_every_tracker(fleet: Callable[..., Fleet]) -> None:
    """One hook, five destinations: each shows the session's tokens, and nothing that
    was said, done, or kept secret lies anywhere."""
    found = fleet()
    found.session("SessionStart-startup", "PostToolUse-Bash", *A_SESSION[1:])
    for place in found.places.values():
        place.wait_for_totals(TOOLS)
    found.home.quiet()
    assert [place.faults for place in found.places.values() if place.faults] == []
    assert found.home.waiting() == []
    ids = {path.name for path in found.home.state.iterdir()}
    assert ids == set(found.names.values())
    for place in found.places.values():
        everything = place.everything()
        assert b"CANARY" not in everything
        assert str(found.home.path).encode() not in everything
    for path in found.home.state.rglob("*"):
        if path.is_file():
            assert b"SECRET" not in path.read_bytes(), path
        assert "SECRET" not in str(path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_no_secret_is_in_any_processs_arguments(fleet: Callable[..., Fleet]) -> None:
    """Senders are told their destination by its directory's name."""
    found = fleet()
    lines: list[bytes] = []

    def look(_: Request) -> None:
        for pid in found.home.processes():
            with contextlib.suppress(OSError):
                lines.append(Path("/proc", str(pid), "cmdline").read_bytes())

    for place in found.places.values():
        place.disturb = look
    found.session(*A_SESSION)
    for place in found.places.values():
        place.wait_for_totals(TOOLS)
    assert len(lines) > len(KINDS)
    assert not [line for line in lines if b"SECRET" in line or b"127.0.0.1" in line]
    for name in found.names.values():
        assert [line for line in lines if name.encode() in line]


def test_debug_tells_of_each(fleet: Callable[..., Fleet]) -> None:
    """What is wrong with one, and what became of the ping at the others."""
    found = fleet("telemhq", "otlp")
    named = "telemhq,otlp,wigtoken,recoder"
    for text in (b"recoder", b"WIGTOKEN_SERVER is not set"):
        found.hook("Stop", text, TELEMHQ_DESTINATIONS=named, TELEMHQ_HOOK_DEBUG=1)
    assert len(found.places["telemhq"].requests) == 2
    assert len(found.places["otlp"].requests) == 2


def test_nothing_usable_is_a_reason(fleet: Callable[..., Fleet]) -> None:
    """Each name's own one; nothing is written."""
    found = fleet("telemhq")
    named: dict[str, Any] = {"TELEMHQ_DESTINATIONS": "wigtoken,recoder"}
    found.hook("Stop", **named)
    found.hook("Stop", b"recoder", TELEMHQ_HOOK_DEBUG=1, **named)
    found.hook("Stop", b"WIGTOKEN_SERVER", TELEMHQ_HOOK_DEBUG=1, **named)
    assert not found.home.state.exists()


def test_tracker_that_wants_nothing_of_an_event(fleet: Callable[..., Fleet]) -> None:
    """makes no outbox file of it; but what waits there gets its next try."""
    found = fleet("recorder", "telemhq")
    recorder = found.places["recorder"]
    found.hook("PostToolUse-Bash")
    found.places["telemhq"].wait_for(1)
    found.home.quiet()
    assert not found.base("recorder").exists()
    found.outage()
    assert found.waiting("recorder")
    found.hook("PostToolUse-Bash")
    recorder.wait_for_totals(TOOLS)


def test_no_sender_starts_where_nothing_waits(fleet: Callable[..., Fleet]) -> None:
    """The hook looks into an outbox no further than to its first ping."""
    found = fleet("recorder", "telemhq")
    found.session(*A_SESSION)
    found.places["recorder"].wait_for_totals(TOOLS)
    found.home.quiet()
    patch = "os.posix_spawn = lambda *a, **k: os.write(2, a[1][-1].encode() + b' ')"
    env: dict[str, Any] = dict(found.environ)
    done = patched(found.home, patch, sent=event("PostToolUse-Bash"), **env)
    assert done.stderr.decode().split() == [found.names["telemhq"]]


def test_one_start_is_all_a_hook_waits_for(fleet: Callable[..., Fleet]) -> None:
    """However many the destinations are: with a lock for each, all held."""
    found = fleet()
    patch = """
def posix_spawn(path, command, environ, **_):
    served = command[command.index("detached") + 1:]
    for fd in served[::2]:
        os.fstat(int(fd))
    os.write(2, " ".join(served[1::2]).encode() + b"\\n")
os.posix_spawn = posix_spawn
"""
    env: dict[str, Any] = dict(found.environ)
    done = patched(found.home, patch, sent=event("SessionEnd-other"), **env)
    (line,) = done.stderr.decode().splitlines()
    wanting = {path.name for path in found.home.state.iterdir()}
    assert len(wanting) > 3
    assert set(line.split()) == wanting


def test_sender_that_can_start_no_other_delivers(fleet: Callable[..., Fleet]) -> None:
    """The other's pings wait for the next hook."""
    found = fleet("telemhq", "otlp")
    found.outage("Stop")
    patch = """
import errno, subprocess
def refuse(*_, **__):
    raise OSError(errno.EAGAIN, "no process to be had")
os.posix_spawn = subprocess.Popen = refuse
"""
    names = [found.names["telemhq"], found.names["otlp"]]
    env: dict[str, Any] = dict(found.environ)
    patched(found.home, patch, "detached", "-1", names[0], "-1", names[1], **env)
    assert len(found.places["telemhq"].requests) == 1
    assert found.waiting("telemhq") == []
    assert found.places["otlp"].requests == []
    found.hook("Stop")
    found.places["otlp"].wait_for(2)


def test_prefix_and_machine_are_those_of_the_hook(fleet: Callable[..., Fleet]) -> None:
    """The sender may be another project's, with other settings."""
    found = fleet("wigtoken", "recorder")
    found.outage()
    env: dict[str, Any] = {"WIGTOKEN_MACHINE": "other", "RECORDER_PREFIX": "Other"}
    found.hook("Stop", session_id="another", transcript_path="/x.jsonl", **env)
    for place in found.places.values():
        place.wait_for_totals(TOOLS)
    assert {r["machine"] for r in found.places["wigtoken"].rows.values()} == {"laptop"}
    for point in found.places["recorder"].points:
        assert point["name"].startswith("System/Code/api/Tokens/")


def test_project_without_a_prefix_sends_nothing(fleet: Callable[..., Fleet]) -> None:
    """RECORDER_PREFIX is set for each project, in its own settings."""
    found = fleet("recorder", "telemhq")
    found.environ["RECORDER_PREFIX"] = ""
    found.session(*A_SESSION)
    found.places["telemhq"].wait_for_totals(TOOLS)
    found.home.quiet()
    assert not found.base("recorder").exists()
    assert found.places["recorder"].requests == []


# -- None hinders another --------------------------------------------------------------


def slow(_: Request) -> None:
    """An answer that takes its time."""
    time.sleep(6)


def poisoned(request: Request) -> int:
    """Everything is refused."""
    del request
    return 400


TROUBLES: dict[str, Any] = {
    "dead": None,
    "slow": slow,
    "poisoned": poisoned,
    "rotated": lambda _: 401,
}


@pytest.mark.parametrize("trouble", [*TROUBLES, "full", "unsound"])
@pytest.mark.parametrize("kind", ["telemhq", "wigtoken", "claude-metrics"])
def test_one_in_trouble_delays_no_other(
    fleet: Callable[..., Fleet], kind: str, trouble: str
) -> None:
    """Dead, slow, poisoned, full, unsound: the four others have it all within
    seconds, and the hook is as fast as ever."""
    found = fleet()
    place = found.places[kind]
    if trouble == "dead":
        place.close()
    elif trouble == "full":
        place.disturb = lambda _: 503
        outbox = found.base(kind) / "outbox"
        for directory in (found.home.state, outbox.parent, outbox):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for n in range(6000):
            (outbox / f"{n:020d}-{n:032x}.json").write_text("{}")
    elif trouble == "unsound":
        found.base(kind).mkdir(parents=True)
        found.base(kind).chmod(0o777)
    else:
        place.disturb = TROUBLES[trouble]
    begun = time.monotonic()
    found.session(*A_SESSION)
    assert time.monotonic() - begun < 8
    for other in found.places.values():
        if other is not place:
            other.wait_for_totals(TOOLS)
    found.home.end()


def test_foreground_waits_for_all_at_once(fleet: Callable[..., Fleet]) -> None:
    """8 s at most, however many are slow: their senders run side by side."""
    found = fleet("telemhq", "otlp", "claude-metrics")
    for place in found.places.values():
        place.disturb = lambda _: time.sleep(1.5)
    begun = time.monotonic()
    found.hook("PostToolUse-Bash", TELEMHQ_FOREGROUND=1)
    assert time.monotonic() - begun < 4
    assert [len(place.requests) for place in found.places.values()] == [1, 1, 1]
    assert found.home.waiting() == []
    begun = time.monotonic()
    for place in found.places.values():
        place.disturb = slow
    found.hook("PostToolUse-Bash", TELEMHQ_FOREGROUND=1, TELEMHQ_TIMEOUT=30)
    assert time.monotonic() - begun < 10


# -- Answers ---------------------------------------------------------------------------


def test_partial_success_is_a_refusal(fleet: Callable[..., Fleet]) -> None:
    """What a collector rejects in a 200 is not sent again, when others are taken."""
    found = fleet("otlp")
    place = found.places["otlp"]
    found.outage("Stop", "PostToolUse-Bash", "SessionEnd-other")

    def reject(request: Request) -> None:
        place.reject = b"claude_code.Stop" in request.body

    place.disturb = reject
    found.hook("Notification")
    wait_until(lambda: not found.waiting("otlp"))
    found.home.quiet()
    events = [record["event"] for record in place.records]
    assert sorted(events) == [
        "claude_code.Notification",
        "claude_code.PostToolUse",
        "claude_code.SessionEnd",
    ]
    assert len(place.requests) == 4
    assert len(list(found.base("otlp").glob("refused/*"))) == 1
    losses = json.loads((found.base("otlp") / "state.json").read_text())["losses"]
    assert losses == {"refused: HTTP 200, rejected": 1}


@pytest.mark.parametrize("body", [b"", b"OK", b"{}", b'{"partialSuccess":{}}'])
def test_collectors_answer_otherwise(fleet: Callable[..., Fleet], body: bytes) -> None:
    """Whatever else stands in a 200 is a success."""
    found = fleet("otlp")
    place = found.places["otlp"]
    place.disturb = lambda _: (200, {}, body)
    found.hook("Stop", transcript_path="")
    place.wait_for(1)
    found.home.quiet()
    assert found.home.waiting() == []
    assert not list(found.base("otlp").glob("refused/*"))


def test_too_many_requests_waits_for_its_turn(fleet: Callable[..., Fleet]) -> None:
    """wigtoken's 429 with Retry-After: 1 ends the pass; nothing is lost or doubled."""
    found = fleet("wigtoken")
    place = found.places["wigtoken"]
    answers = [(429, {"Retry-After": "1"}, b"{}")]
    place.disturb = lambda _: answers.pop() if answers else None
    found.session(*A_SESSION)
    place.wait_for_totals(TOOLS)
    assert place.duplicates == 0
    assert place.faults == []


def test_ping_with_nothing_to_send_is_no_witness(fleet: Callable[..., Fleet]) -> None:
    """It says nothing of the tracker: what failed beside it is not charged, and it goes
    without a word."""
    found = fleet("recorder")
    place = found.places["recorder"]
    place.disturb = lambda _: 500
    found.session("SessionStart-startup", "SessionEnd-other")
    wait_until(lambda: place.requests)
    found.home.end()
    for count in range(1, 4):
        state = found.base("recorder") / "state.json"
        told = json.loads(state.read_text())
        state.write_text(json.dumps({**told, "not_before": 0}))
        place.requests.clear()
        found.hook("Stop", session_id=f"{count}", transcript_path="/none.jsonl")
        wait_until(lambda: place.requests)
        found.home.end()
    told = json.loads((found.base("recorder") / "state.json").read_text())
    assert [charges for charges, _ in told["suspects"].values()] == [0]
    assert told["losses"] == {}


def test_plugin_beside_a_settings_file(fleet: Callable[..., Fleet]) -> None:
    """One ping an event at each tracker: the plugin leaves those to the settings' hook
    that it knows as well; TelemHQ's, whose URL only the plugin has, is its own."""
    found = fleet("telemhq", "otlp")
    url = found.environ.pop("TELEMHQ_PING_URL")
    settings = found.home.path / ".claude" / "settings.json"
    settings.parent.mkdir(exist_ok=True)
    hook = {"hooks": [{"type": "command", "command": f"python3 {SCRIPT}"}]}
    settings.write_text(json.dumps({"hooks": {"Stop": [hook]}}))
    found.hook("Stop", transcript_path="")
    plugin: dict[str, Any] = {"CLAUDE_PLUGIN_ROOT": "/x"}
    plugin["CLAUDE_PLUGIN_OPTION_PING_URL"] = url
    found.hook("Stop", transcript_path="", **plugin)
    for place in found.places.values():
        place.wait_for(1)
    found.home.quiet()
    assert [len(place.requests) for place in found.places.values()] == [1, 1]


# -- Commands --------------------------------------------------------------------------


def run(found: Fleet, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    return subprocess.run(
        script_command(*arguments),
        env=found.home.env(**{**found.environ, **env}),
        cwd=str(found.home.project),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_preview_shows_a_trackers_requests(
    fleet: Callable[..., Fleet], kind: str
) -> None:
    """All of them, as they would be sent, without a secret."""
    found = fleet()
    done = run(found, "preview", "SessionEnd", "--destination", kind)
    assert done.returncode == 0
    paths = {
        "telemhq": [""],
        "wigtoken": ["/api/ingest/messages"],
        "recorder": ["/api/v1/records"] * 4,
        "otlp": ["/v1/logs"],
        "claude-metrics": ["/api/v1/events/execution", "/api/v1/events/session"],
    }
    posts = re.findall(r"(?m)^POST http://127.0.0.1:\d+(\S*)", done.stdout)
    assert [path.replace("/...", "") for path in posts] == paths[kind]
    assert "SECRET" not in done.stdout + done.stderr
    assert "Bearer" not in done.stdout
    if kind == "wigtoken":
        assert '"machine": "laptop"' in done.stdout
    assert found.places[kind].requests == []


def test_preview_says_what_is_not_sent(fleet: Callable[..., Fleet]) -> None:
    """An event that a tracker does not want; a name that is no destination."""
    found = fleet("recorder")
    done = run(found, "preview", "PostToolUse", "--destination", "recorder")
    assert "recorder gets nothing of PostToolUse" in done.stdout
    done = run(found, "preview", "Stop", "--destination", "otlp")
    assert done.returncode == 1
    assert "no destination otlp" in done.stderr


def test_doctor_checks_each_and_records_nothing(fleet: Callable[..., Fleet]) -> None:
    """A line a destination; a rotated token is told by its variable."""
    found = fleet()
    done = run(found, "doctor")
    for kind in KINDS[1:]:
        (line,) = re.findall(f"(?m)^(.*) {kind} at http://127.0.0.1", done.stdout)
        assert line in ("✓", "ok", "[ok]"), done.stdout
    for place in found.places.values():
        assert len(place.requests) == 1
        assert place.totals() == dict.fromkeys(trackers.COUNTS, 0)
        assert place.faults == []
        for kept in ("rows", "points", "records", "events", "sessions", "by_id"):
            assert not getattr(place, kept, None)
    for kind, name in (("wigtoken", "WIGTOKEN_TOKEN"), ("recorder", "RECORDER_PAT")):
        found.places[kind].disturb = lambda _: 401
        done = run(found, "doctor")
        assert done.returncode == 1
        (line,) = re.findall(f"(?m)^.* {kind} at .*$", done.stdout)
        assert name in line
        assert "SECRET" not in done.stdout


def test_doctor_names_what_is_missing(fleet: Callable[..., Fleet]) -> None:
    """An unknown name, a missing variable, a project without a prefix."""
    found = fleet("recorder")
    env = {"TELEMHQ_DESTINATIONS": "recorder,wigtoken,recoder", "RECORDER_PREFIX": ""}
    done = run(found, "doctor", **env)
    assert done.returncode == 1
    assert "'recoder' is none of telemhq, wigtoken" in done.stdout
    assert "WIGTOKEN_SERVER is not set" in done.stdout
    assert "RECORDER_PREFIX is not set for this project" in done.stdout


def test_flush_and_adopt_are_each_destinations_own(
    fleet: Callable[..., Fleet], home: Home
) -> None:
    """Pings of a former token go to the present one's of the same tracker, and to no
    other tracker."""
    found = fleet("wigtoken", "otlp")
    wigtoken, otlp = found.places["wigtoken"], found.places["otlp"]
    found.outage()
    wigtoken.secret = "wts_OTHER"
    env = {"WIGTOKEN_TOKEN": "wts_OTHER"}
    assert "(wigtoken)" in run(found, "doctor", **env).stdout
    wigtoken.requests.clear()
    wigtoken.disturb = otlp.disturb = lambda _: 503
    assert run(found, "flush", **env).returncode == 1
    wigtoken.disturb = otlp.disturb = None
    assert wigtoken.requests == []
    done = run(found, "flush", "--adopt", **env)
    assert done.returncode == 0, done.stdout
    assert wigtoken.totals() == TOOLS
    assert otlp.totals() == TOOLS
    assert home.waiting() == []


# -- The README ------------------------------------------------------------------------


def test_readmes_table_has_each_tracker_and_its_variables(script: ModuleType) -> None:
    """A row a tracker, with every variable that its class names, and no other."""
    section = README.split("\n## Other trackers\n", 1)[1].split("\n## ", 1)[0]
    table = section.split("<table>", 1)[1].split("</table>", 1)[0]
    rows = {
        re.findall("<code>([a-z-]+)</code>", row)[0]: set(
            re.findall("<code>([A-Z_]{8,})</code>", row)
        )
        for row in table.split("<tr>")[2:]
    }
    assert set(rows) == set(script.TRACKERS) - {"telemhq"}
    for name, variables in rows.items():
        named = set(script.TRACKERS[name].variables)
        assert variables - {"TELEMHQ_MACHINE"} == named


def test_readmes_collector_configuration_is_short() -> None:
    """Ten lines that receive logs by OTLP/HTTP on this machine."""
    (block,) = re.findall(r"(?s)```yaml\n(.*?)```", README)
    assert len(block.splitlines()) <= 10
    assert "endpoint: 127.0.0.1:4318" in block
    assert "logs: {receivers: [otlp]" in block
