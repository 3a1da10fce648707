"""The privacy gate: what leaves, in which shape, and that nothing else ever does."""

from __future__ import annotations

import ast
import hashlib
import hmac
import io
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import tokenize
from types import ModuleType
from typing import Any, Iterator, NoReturn

import pytest

from support import (
    FIXTURES,
    SCRIPT,
    Home,
    Receiver,
    event,
    only_enqueue,
    run_sender,
)

NS = 1700000000 * 10**9 + 123456789  # 2023-11-14T22:13:20.123Z
GIT = shutil.which("git") or ""
git_needed = pytest.mark.skipif(not GIT, reason="git is not installed")


def sha12(path: str) -> str:
    """The first 12 hex of SHA-256 of a path."""
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def ping_of(
    script: ModuleType,
    found: dict[str, Any],
    environ: dict[str, str] | None = None,
    project: str | None = "api",
) -> dict[str, Any]:
    """The ping of an event through the pure function."""
    settings = script.Settings(environ or {})
    ping: dict[str, Any] = script.make_ping(found, settings, project, NS, 700)
    return ping


def project(
    script: ModuleType, cwd: object, project_dir: object = None, name: object = None
) -> Any:
    """The project that the hook finds for a cwd and its environment."""
    environ = {"CLAUDE_PROJECT_DIR": project_dir, "TELEMHQ_PROJECT": name}
    environ = {key: str(value) for key, value in environ.items() if value is not None}
    found = {"cwd": cwd if cwd is None or isinstance(cwd, (int, list)) else str(cwd)}
    return script.project_of(found, script.Settings(environ))


# -- The table of real events ----------------------------------------------------------

MAIN = {
    "session_id": "8ca3ea98-6bcf-4f18-8872-ceeb337b0138",
    "transcript_path_hash": "8ca3ea98-6bcf-4f18-8872-ceeb337b0138",
}
TURN = dict(MAIN, prompt_id="00c096b0-615a-45f7-9adf-071eeaafa7e5")
TOOL = dict(TURN, permission_mode="bypassPermissions", effort="medium")
PARENT = {
    "session_id": "92ae2d89-3992-489b-a27b-709dc23bbf73",
    "transcript_path_hash": "92ae2d89-3992-489b-a27b-709dc23bbf73",
    "prompt_id": "cb56ffa8-0776-49b5-98e9-425701921a79",
}
PARENT_TOOL = dict(PARENT, permission_mode="bypassPermissions", effort="medium")
AGENT = {"agent_id": "a1a6d15b57a3bfbee", "agent_type": "general-purpose"}
IN_AGENT = dict(PARENT_TOOL, **AGENT)
CLEARED = {
    "session_id": "0c801846-70dc-4eaa-9f13-7b4e758f5df9",
    "transcript_path_hash": "0c801846-70dc-4eaa-9f13-7b4e758f5df9",
}
COMPACTED = dict(CLEARED, prompt_id="fffc88e9-2f5e-4ebd-b5eb-25e9acb703fd")
NEXT = {
    "session_id": "b738a1dc-9e18-482b-94d9-712135dedb00",
    "transcript_path_hash": "b738a1dc-9e18-482b-94d9-712135dedb00",
}
FORK = {
    "session_id": "2f7e0101-5a16-421f-aee1-7f7d4d4685f6",
    "transcript_path_hash": "2f7e0101-5a16-421f-aee1-7f7d4d4685f6",
}
BROKEN = {
    "session_id": "986ac084-8f27-4be3-9b1c-0fc3bb192ae1",
    "transcript_path_hash": "986ac084-8f27-4be3-9b1c-0fc3bb192ae1",
    "prompt_id": "7bfa956d-67e1-40ae-b162-5d31645dceb3",
}
FAILED = {"status": "failed", "error": "tool_error", "is_interrupt": False}

EXPECTED: dict[
    str, dict[str, Any]
] = {  # fixture: the ping, but for what every ping has (`ALWAYS`)
    "MessageDisplay": dict(TURN, event="MessageDisplay"),
    "Notification": dict(
        CLEARED,
        event="Notification",
        prompt_id="ed55b3df-a932-4bdf-809c-483d0c461814",
        notification_type="agent_needs_input",
    ),
    "PostCompact-manual": dict(COMPACTED, event="PostCompact", trigger="manual"),
    "PostToolBatch": dict(TOOL, event="PostToolBatch"),
    "PostToolBatch-in-subagent": dict(IN_AGENT, event="PostToolBatch"),
    "PostToolUse-Agent": dict(
        PARENT_TOOL,
        event="PostToolUse",
        tool_name="Agent",
        tool_use_id="toolu_1959211045",
        duration_ms=11,
    ),
    "PostToolUse-Bash": dict(
        TOOL,
        event="PostToolUse",
        tool_name="Bash",
        tool_use_id="toolu_1074063086",
        duration_ms=25,
    ),
    "PostToolUse-Bash-in-subagent": dict(
        IN_AGENT,
        event="PostToolUse",
        tool_name="Bash",
        tool_use_id="toolu_1394297927",
        duration_ms=30,
    ),
    "PostToolUse-Write": dict(
        TOOL,
        event="PostToolUse",
        tool_name="Write",
        tool_use_id="toolu_2642065829",
        duration_ms=11,
    ),
    "PostToolUseFailure-Bash": dict(
        TOOL,
        event="PostToolUseFailure",
        tool_name="Bash",
        tool_use_id="toolu_4076715236",
        duration_ms=8,
        exit_code=3,
        error_chars=25,
        **FAILED,
    ),
    "PostToolUseFailure-Bash-in-subagent": dict(
        IN_AGENT,
        event="PostToolUseFailure",
        tool_name="Bash",
        tool_use_id="toolu_2813545004",
        duration_ms=7,
        exit_code=3,
        error_chars=25,
        **FAILED,
    ),
    "PostToolUseFailure-Read": dict(
        TOOL,
        event="PostToolUseFailure",
        tool_name="Read",
        tool_use_id="toolu_4141811313",
        duration_ms=5,
        error_chars=80,
        **FAILED,
    ),
    "PreCompact-manual": dict(COMPACTED, event="PreCompact", trigger="manual"),
    "PreToolUse-Agent": dict(
        PARENT_TOOL,
        event="PreToolUse",
        tool_name="Agent",
        tool_use_id="toolu_1959211045",
    ),
    "PreToolUse-Bash": dict(
        TOOL, event="PreToolUse", tool_name="Bash", tool_use_id="toolu_1074063086"
    ),
    "PreToolUse-Bash-in-subagent": dict(
        IN_AGENT, event="PreToolUse", tool_name="Bash", tool_use_id="toolu_1394297927"
    ),
    "PreToolUse-Read": dict(
        TOOL, event="PreToolUse", tool_name="Read", tool_use_id="toolu_4141811313"
    ),
    "PreToolUse-Write": dict(
        TOOL, event="PreToolUse", tool_name="Write", tool_use_id="toolu_2642065829"
    ),
    "SessionEnd-clear": dict(
        CLEARED,
        event="SessionEnd",
        prompt_id="ae9ba13a-92d0-47fe-aee9-3ff381890253",
        reason="clear",
    ),
    "SessionEnd-other": dict(TURN, event="SessionEnd", reason="other"),
    "SessionEnd-prompt_input_exit": dict(
        NEXT,
        event="SessionEnd",
        prompt_id="eac71d1d-e9a5-4596-a1d6-d62cfd07ee26",
        reason="prompt_input_exit",
    ),
    "SessionStart-clear": dict(NEXT, event="SessionStart", source="clear"),
    "SessionStart-compact": dict(
        COMPACTED, event="SessionStart", source="compact", model="claude-opus-5-5"
    ),
    "SessionStart-fork": dict(FORK, event="SessionStart", source="fork"),
    "SessionStart-resume": dict(MAIN, event="SessionStart", source="resume"),
    "SessionStart-startup": dict(MAIN, event="SessionStart", source="startup"),
    "Stop": dict(
        TOOL,
        event="Stop",
        stop_hook_active=False,
        last_assistant_message_chars=22,
        background_tasks=0,
    ),
    "StopFailure": dict(
        BROKEN,
        event="StopFailure",
        effort="medium",
        status="failed",
        error="authentication_failed",
        last_assistant_message_chars=38,
    ),
    "SubagentStart": dict(PARENT, event="SubagentStart", **AGENT),
    "SubagentStop": dict(
        IN_AGENT,
        event="SubagentStop",
        stop_hook_active=False,
        last_assistant_message_chars=22,
        background_tasks=1,
    ),
    "UserPromptSubmit": dict(
        TURN,
        event="UserPromptSubmit",
        permission_mode="bypassPermissions",
        prompt_chars=25,
    ),
}


def expected_ping(script: ModuleType, name: str) -> dict[str, Any]:
    """The whole ping of a fixture, but for its event_id, timestamp and event_bytes."""
    found = {
        "provider": "anthropic",
        "tool": "claude-code",
        "status": "success",
        "project": "api",
        "hook_version": script.__version__,
        "cwd_hash": "4a97ff8f91c6",  # sha256("/home/dev/acme/api")
    }
    found.update(EXPECTED[name])
    found["transcript_path_hash"] = sha12(
        "/home/dev/.claude/projects/-home-dev-acme-api/{}.jsonl".format(
            found["transcript_path_hash"]
        )
    )
    return found


def test_every_real_event_is_in_the_table() -> None:
    """Each event that the real client was seen to fire has its expected ping."""
    names = {path.stem for path in (FIXTURES / "events").iterdir()}
    assert names == set(EXPECTED)
    assert len(names) >= 30


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_real_event_becomes_exactly_this_ping(script: ModuleType, name: str) -> None:
    """Each real event gives the documented fields, and not one field more."""
    ping = ping_of(script, event(name))
    assert re.fullmatch("[0-9a-f]{32}", ping.pop("event_id"))
    assert ping.pop("timestamp") == "2023-11-14T22:13:20.123Z"
    assert ping.pop("event_bytes") == 700
    assert ping == expected_ping(script, name)


def test_every_real_event_arrives_as_the_pure_function_says(
    home: Home, receiver: Receiver, script: ModuleType
) -> None:
    """Run as Claude Code runs it, each event's ping arrives with the same fields."""
    sent = {}
    for name in sorted(EXPECTED):
        raw = json.dumps(event(name)).encode()
        # Usage is added in the background.
        done = home.hook(raw, receiver.url, TELEMHQ_USAGE=0)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        sent[name] = len(raw)
    pings = receiver.wait_for(len(sent), 60)
    left = [dict(expected_ping(script, n), event_bytes=sent[n]) for n in sorted(sent)]
    for ping, request in zip(pings, list(receiver.requests)):
        assert request.headers["Idempotency-Key"] == ping.pop("event_id")
        assert re.fullmatch(
            r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", ping.pop("timestamp")
        )
        assert ping in left
        left.remove(ping)
    assert left == []


def test_every_event_has_an_id_of_its_own(script: ModuleType) -> None:
    """The same event twice is two pings: their ids are random."""
    ids = {ping_of(script, event("Stop"))["event_id"] for _ in range(50)}
    assert len(ids) == 50


# -- Shapes ----------------------------------------------------------------------------


def put(field: str, value: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """An event with `value` where `field` comes from, and its environment."""
    if field == "event":
        return event("Stop", hook_event_name=value), {}
    if field == "effort":
        return event("Stop", effort={"level": value}), {}
    if field == "reason":
        return event("SessionEnd-other", reason=value), {}
    if field == "machine":
        return event("Stop"), {"TELEMHQ_MACHINE": value}
    return event("Stop", **{field: value}), {}


IDENTIFIERS = (
    "session_id",
    "prompt_id",
    "tool_name",
    "tool_use_id",
    "permission_mode",
    "agent_id",
    "agent_type",
    "source",
    "trigger",
    "notification_type",
    "event",
    "effort",
    "reason",
    "machine",
)
GOOD_IDENTIFIERS = ("a", "Z", "7", "mcp__srv-1__do.it:now", "0b738a1d-9e18", "x" * 128)
BAD_IDENTIFIERS = (
    "",
    "x" * 129,
    " a",
    "a b",
    "a\n",
    "a\tb",
    "a\0b",
    "/home/dev",
    "a/b",
    "a\\b",
    "~",
    "_a",
    "-a",
    ".a",
    ":a",
    "é",
    "aé",
    "a\u0663",
    "\uff41",
    "a\u200b",
    "a\ud800",
    "a,b",
    "a=b",
    "a+b",
    "a%20b",
    "a'b",
    'a"b',
    "a{b}",
    "a$b",
)
NOT_STRINGS: tuple[object, ...] = (None, True, 5, 1.5, [], ["a"], {}, {"a": "b"})


@pytest.mark.parametrize("field", IDENTIFIERS)
def test_a_string_leaves_only_in_the_shape_of_an_identifier(
    script: ModuleType, field: str
) -> None:
    """ASCII letters, digits and _ . : -, 1 to 128: anything else is left out, whole."""
    for value in GOOD_IDENTIFIERS:
        assert ping_of(script, *put(field, value))[field] == value
    others = NOT_STRINGS if field != "machine" else ()
    for bad in (*BAD_IDENTIFIERS, "a@b", "a[b]", *others):
        assert field not in ping_of(script, *put(field, bad)), repr(bad)


@pytest.mark.parametrize(
    "name", ["claude-opus-5-5[1m]", "claude-sonnet-4@20250514", "eu.anthropic.x-v1:0"]
)
def test_a_model_may_also_have_at_and_brackets(script: ModuleType, name: str) -> None:
    """Models are named so by Vertex, by Bedrock and for long contexts."""
    assert ping_of(script, event("Stop", model=name))["model"] == name


@pytest.mark.parametrize(
    "name",
    [
        "arn:aws:bedrock:eu-west-1:123456789012:inference-profile/eu.anthropic.x",
        "projects/acme/models/x",
        "anthropic/claude-opus-5",
        "my model",
        "[1m]",
        *filter(None, BAD_IDENTIFIERS),
    ],
)
def test_a_model_that_is_no_identifier_is_other(script: ModuleType, name: str) -> None:
    """No slash and no space: a router's vendor, an ARN with an account's number in it
    stay home. That there was a model is told all the same."""
    assert ping_of(script, event("Stop", model=name))["model"] == "other"


@pytest.mark.parametrize("name", ["", *NOT_STRINGS], ids=repr)
def test_what_names_no_model_is_none(script: ModuleType, name: object) -> None:
    """An empty name, and what is no text, is left out."""
    assert "model" not in ping_of(script, event("Stop", model=name))


@pytest.mark.parametrize("value", [0, 1, 25, 1.5, 2**50])
def test_a_number_leaves_as_it_is(script: ModuleType, value: float) -> None:
    """Durations are sent unchanged."""
    ping = ping_of(script, event("PostToolUse-Bash", duration_ms=value))
    assert ping["duration_ms"] == value


@pytest.mark.parametrize(
    "value",
    [-1, float("nan"), float("inf"), -float("inf"), 10**400, True, "25", None, [1], {}],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_finite_count_is_no_number(
    script: ModuleType, value: object
) -> None:
    """A number that no JSON reader could take, or that is none, is left out."""
    ping = ping_of(script, event("PostToolUse-Bash", duration_ms=value))
    assert "duration_ms" not in ping


@pytest.mark.parametrize("field", ["is_interrupt", "stop_hook_active"])
def test_a_flag_is_true_or_false_and_nothing_else(
    script: ModuleType, field: str
) -> None:
    """Booleans are sent as booleans; what only looks like one is left out."""
    for value in (True, False):
        assert ping_of(script, event("Stop", **{field: value}))[field] is value
    others: tuple[object, ...] = (0, 1, "true", "", None, [], {})
    for other in others:
        assert field not in ping_of(script, event("Stop", **{field: other}))


@pytest.mark.parametrize(
    "source, field, value, expected",
    [
        ("prompt", "prompt_chars", "héllo", 5),
        ("prompt", "prompt_chars", "", 0),
        ("prompt", "prompt_chars", ["CANARY"], None),
        ("prompt", "prompt_chars", 5, None),
        ("last_assistant_message", "last_assistant_message_chars", "x" * 70000, 70000),
        ("last_assistant_message", "last_assistant_message_chars", None, None),
        ("background_tasks", "background_tasks", [{"description": "CANARY"}] * 3, 3),
        ("background_tasks", "background_tasks", "CANARY", None),
        ("background_tasks", "background_tasks", 7, None),
        ("background_tasks", "background_tasks", {"CANARY": 1}, None),
    ],
)
def test_of_content_only_its_size_leaves(
    script: ModuleType, source: str, field: str, value: object, expected: int | None
) -> None:
    """Texts are counted in characters, background tasks as a list's length."""
    assert ping_of(script, event("Stop", **{source: value})).get(field) == expected


@pytest.mark.parametrize("name", ["PermissionDenied", "Stop", "Future", "SessionStart"])
def test_a_reason_leaves_from_session_end_only(script: ModuleType, name: str) -> None:
    """Elsewhere `reason` is text: it stays home even when it is one word."""
    found = event("SessionEnd-other", hook_event_name=name, reason="secretword")
    assert "reason" not in ping_of(script, found)


# -- error -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "authentication_failed",
        "oauth_org_not_allowed",
        "account_on_hold",
        "verification_required",
        "billing_error",
        "rate_limit",
        "overloaded",
        "invalid_request",
        "model_not_found",
        "server_error",
        "unknown",
        "max_output_tokens",
        "cloud_credential_error",
        "x" * 40,
    ],
)
def test_a_stop_failures_code_is_sent(script: ModuleType, code: str) -> None:
    """Claude Code's own error codes tell what stopped the turn."""
    ping = ping_of(script, event("StopFailure", error=code))
    assert (ping["error"], ping["status"]) == (code, "failed")


@pytest.mark.parametrize(
    "text",
    [
        "Rate_limit",
        "rate limit",
        "rate-limit",
        "rate_limit2",
        "rate_limit: secret",
        "x" * 41,
        "/etc/passwd",
        "é",
        "",
        None,
        {"type": "rate_limit"},
        ["rate_limit"],
        429,
    ],
    ids=repr,
)
def test_a_stop_failure_without_a_code_is_failed_all_the_same(
    script: ModuleType, text: object
) -> None:
    """What is no lower-case code could be a message: left out; the status stays."""
    ping = ping_of(script, event("StopFailure", error=text))
    assert "error" not in ping
    assert ping["status"] == "failed"


@pytest.mark.parametrize(
    "text, exit_code",
    [
        ("Exit code 3\nCANARY_STDERR", 3),
        ("Exit code 0", 0),
        ("Exit code 127\n", 127),
        ("Exit code 255 and more", 255),
        ("Exit code ", None),
        ("Exit code \u0663\nx", None),
        ("Exit code x", None),
        ("Exit code", None),
        ("exit code 3", None),
        ("The Exit code 3", None),
        ("rate_limit", None),
        ("", None),
    ],
)
def test_of_a_failed_tools_text_only_exit_code_and_length_leave(
    script: ModuleType, text: str, exit_code: int | None
) -> None:
    """The text holds output and paths: `tool_error`, its code, its length."""
    ping = ping_of(script, event("PostToolUseFailure-Bash", error=text))
    assert (ping["error"], ping["status"]) == ("tool_error", "failed")
    assert ping.get("exit_code") == exit_code
    assert ping["error_chars"] == len(text)


@pytest.mark.parametrize("digits", [5, 10, 11, 12, 20, 400, 5000])
def test_an_exit_code_is_the_whole_number_or_none(
    script: ModuleType, digits: int
) -> None:
    """An absurd exit code is never cut into another one."""
    text = "Exit code " + "7" * digits + "\nx"
    ping = ping_of(script, event("PostToolUseFailure-Bash", error=text))
    assert ping.get("exit_code") in (None, int("7" * min(digits, 400)))


@pytest.mark.parametrize("value", [None, {}, {"message": "CANARY"}, ["x"], 3, True])
def test_a_failed_tool_without_a_text_is_a_tool_error(
    script: ModuleType, value: object
) -> None:
    """PostToolUseFailure says `tool_error` whatever its `error` is."""
    ping = ping_of(script, event("PostToolUseFailure-Bash", error=value))
    assert (ping["error"], ping["status"]) == ("tool_error", "failed")
    assert "exit_code" not in ping
    assert "error_chars" not in ping


@pytest.mark.parametrize("name", ["Stop", "PostToolUse", "SessionEnd", "Future", None])
@pytest.mark.parametrize(
    "value", ["CANARY text", "rate_limit", {"a": 1}, ["x"], 3, True]
)
def test_any_other_event_that_carries_an_error_says_just_that(
    script: ModuleType, name: str | None, value: object
) -> None:
    """An error of another event is the word `error`, and the status is failed."""
    ping = ping_of(script, event("Stop", hook_event_name=name, error=value))
    assert (ping["error"], ping["status"]) == ("error", "failed")


@pytest.mark.parametrize("value", [None, "", False, {}, []])
def test_an_empty_error_is_no_error(script: ModuleType, value: object) -> None:
    """An event whose `error` is there but empty has not failed."""
    ping = ping_of(script, event("Stop", error=value))
    assert "error" not in ping
    assert ping["status"] == "success"


# -- What is absent, what is new -------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_field_that_is_null_is_left_out(script: ModuleType, name: str) -> None:
    """No ping ever holds a null, whichever field of the event is one."""
    found = event(name)
    for key in found:
        ping = ping_of(script, dict(found, **{key: None}))
        assert None not in ping.values()
        assert "null" not in script.encode_json(ping)
    ping = ping_of(script, dict.fromkeys(found), project=None)
    assert set(ping) <= {
        "provider",
        "tool",
        "status",
        "hook_version",
        "event_id",
        "timestamp",
        "event_bytes",
        "error",
    }


def test_an_empty_event_is_a_ping_still(script: ModuleType) -> None:
    """A ping is made of any JSON object, even an empty one."""
    ping = ping_of(script, {}, project="unknown")
    assert ping["provider"] == "anthropic"
    assert ping["status"] == "success"
    assert ping["project"] == "unknown"
    assert "session_id" not in ping


def test_what_a_future_event_brings_stays_home(script: ModuleType) -> None:
    """Unknown events are named and timed; their unknown fields do not leave."""
    found = {
        "hook_event_name": "QuantumLeap",
        "session_id": "s1",
        "leap_to": "secret",
        "leap_count": 5,
        "leap_ok": True,
        "leap_path": "/home/dev/x",
        "details": {"session_id": "s2", "model": "inner", "duration_ms": 9},
        "cost_usd": 1.5,
        "total_tokens": 12,
        "models": {"m": {"input_tokens": 3}},
        "tools": {"Bash": 3},
        "git_branch": "secret-branch",
        "machine": "secret-machine",
        "project": "secret-project",
        "status": "secret-status",
        "event_id": "secret-id",
        "timestamp": "secret-time",
        "exit_code": 3,
        "error_chars": 4,
        "hook_version": "secret-version",
        "cwd_hash": "0123456789ab",
    }
    ping = ping_of(script, found)
    assert set(ping) == {
        "provider",
        "tool",
        "status",
        "hook_version",
        "event_id",
        "timestamp",
        "event_bytes",
        "event",
        "project",
        "session_id",
    }
    assert ping["event"] == "QuantumLeap"
    assert "secret" not in script.encode_json(ping)


@pytest.mark.parametrize("value", [None, "", "build-7", "a b", "x" * 129])
def test_a_machine_is_named_only_where_the_user_named_it(
    script: ModuleType, value: str | None
) -> None:
    """TELEMHQ_MACHINE adds `machine`; without it, no host name leaves."""
    environ = {} if value is None else {"TELEMHQ_MACHINE": value}
    expected = value if value == "build-7" else None
    assert ping_of(script, event("Stop"), environ).get("machine") == expected


def test_the_gate_passes_nothing_that_is_not_in_its_table(script: ModuleType) -> None:
    """The allow-list decides alone: unknown names and wrong shapes do not pass it."""
    assert script.gate({"prompt": "x", "cwd": "/x", "project_path": "x"}) == {}
    for name in script.GATE:
        for value in (None, "/home/dev/x y\n", -1, {"/a": 1}, ["x"], object()):
            if (name, value) != ("project", "/home/dev/x y\n"):
                assert script.gate({name: value}) == {}, (name, value)


def test_no_field_of_the_gate_takes_an_overlong_text(script: ModuleType) -> None:
    """Whatever may one day go wrong before the gate: 128 characters are the most."""
    assert script.gate({"project": "a" * 128, "tool": "a" * 128}) != {}
    for name in script.GATE:
        for length in (129, 100000):
            assert script.gate({name: "a" * length}) == {}, name


# -- Names of tools and agents ---------------------------------------------------------

UNNAMED = {"TELEMHQ_TOOL_NAMES": "0"}


@pytest.mark.parametrize(
    "name, shown",
    [
        ("mcp__pg-prod-acme__drop_customer", "mcp"),
        ("mcp__claude_ai_Gmail__search", "mcp"),
        ("mcp__a b__c/d", "mcp"),
        ("mcp__" + "x" * 200, "mcp"),
        ("mcp__", "mcp"),
        ("Bash", "Bash"),
        ("ListMcpResourcesTool", "ListMcpResourcesTool"),
        ("mcp", "mcp"),
        ("a b", None),
        ("", None),
        (None, None),
        (["mcp__a__b"], None),
    ],
)
def test_without_tool_names_an_mcp_servers_tool_is_mcp(
    script: ModuleType, name: object, shown: str | None
) -> None:
    """TELEMHQ_TOOL_NAMES=0: the names of servers and of their tools stay home."""
    found = event("PostToolUse-Bash", tool_name=name)
    assert ping_of(script, found, UNNAMED).get("tool_name") == shown


@pytest.mark.parametrize(
    "name, shown",
    [
        ("general-purpose", "general-purpose"),
        ("Explore", "Explore"),
        ("claude-code-guide", "claude-code-guide"),
        ("web-fetch", "web-fetch"),
        ("acme-payroll-fixer", "custom"),
        ("plugin:acme", "custom"),
        ("explore", "custom"),
        ("the agent of Jane", "custom"),
        ("", None),
        (None, None),
        ({"name": "Explore"}, None),
    ],
)
def test_without_tool_names_an_agent_of_the_users_own_is_custom(
    script: ModuleType, name: object, shown: str | None
) -> None:
    """TELEMHQ_TOOL_NAMES=0: only the agents that the client brings are named."""
    found = event("SubagentStart", agent_type=name)
    assert ping_of(script, found, UNNAMED).get("agent_type") == shown


@pytest.mark.parametrize("value", ["0", "no", "off", "nonsense"])
def test_tool_names_are_off_at_any_word_but_yes(script: ModuleType, value: str) -> None:
    """What is not understood means off, for privacy's sake; unset means on."""
    found = event("SubagentStart", agent_type="mine", tool_name="mcp__a__b")
    ping = ping_of(script, found, {"TELEMHQ_TOOL_NAMES": value})
    assert (ping["agent_type"], ping["tool_name"]) == ("custom", "mcp")
    for environ in ({}, {"TELEMHQ_TOOL_NAMES": ""}, {"TELEMHQ_TOOL_NAMES": "1"}):
        ping = ping_of(script, found, environ)
        assert (ping["agent_type"], ping["tool_name"]) == ("mine", "mcp__a__b")


@pytest.mark.parametrize("value", ["", "0"])
def test_tool_names_count_in_the_table_of_tools_too(
    home: Home, receiver: Receiver, value: str
) -> None:
    """In `tools`, which the sender makes, all tools of MCP servers are one `mcp`, with
    the sum of their calls; the setting is the hook's that made the ping."""
    shutil.copytree(str(FIXTURES / "transcripts" / "tools"), str(home.path / "t"))
    (transcript,) = (home.path / "t").glob("*.jsonl")
    text = transcript.read_text("utf-8")
    for name in ("Read", "Write"):
        assert text.count(f'"name":"{name}"')
        text = text.replace(f'"name":"{name}"', f'"name":"mcp__acme__{name}"')
    transcript.write_text(text)
    same = {"session_id": transcript.stem, "transcript_path": str(transcript)}
    only_enqueue(home, receiver.url, event("SessionStart-startup", **same))
    end = event("SessionEnd-other", **same)
    only_enqueue(home, receiver.url, end, TELEMHQ_TOOL_NAMES=value)
    run_sender(home, receiver.url)
    tools = receiver.wait_for(2)[1]["tools"]
    assert tools["Bash"] > 0
    if value:
        assert set(tools) == {"Bash", "mcp"}
        assert tools["mcp"] == 2
    else:
        assert set(tools) == {"Bash", "mcp__acme__Read", "mcp__acme__Write"}


# -- Hashes ----------------------------------------------------------------------------

PATHS = (
    "/home/dev/acme/api",
    "/é/😀",
    "/bad\udcff",
    "/lone\ud800",
    "C:\\x",
    "x" * 9000,
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path)[:20])
@pytest.mark.parametrize("field", ["cwd", "transcript_path"])
def test_a_path_leaves_as_twelve_hex_of_its_hash(
    script: ModuleType, field: str, path: str
) -> None:
    """Paths are sent as the first 12 hex of SHA-256, lone surrogates passed through."""
    ping = ping_of(script, event("Stop", **{field: path}))
    assert ping[field + "_hash"] == sha12(path)


@pytest.mark.parametrize(
    "key", [b"k", b"x" * 200, b"\xff\xfe", "ключ".encode()], ids=repr
)
def test_a_hash_key_makes_it_an_hmac(script: ModuleType, key: bytes) -> None:
    """TELEMHQ_HASH_KEY makes a guessable path unguessable: HMAC-SHA-256."""
    environ = {"TELEMHQ_HASH_KEY": key.decode("utf-8", "surrogateescape")}
    for path in PATHS:
        ping = ping_of(script, event("Stop", cwd=path, transcript_path=path), environ)
        raw = path.encode("utf-8", "surrogatepass")
        expected = hmac.new(key, raw, "sha256").hexdigest()[:12]
        assert ping["cwd_hash"] == ping["transcript_path_hash"] == expected


@pytest.mark.parametrize("value", ["", None, 5, True, ["/x"], {"path": "/x"}], ids=repr)
def test_no_path_is_no_hash(script: ModuleType, value: object) -> None:
    """transcript_path may be empty: then there is no hash of it."""
    ping = ping_of(script, event("Stop", cwd=value, transcript_path=value))
    assert "cwd_hash" not in ping
    assert "transcript_path_hash" not in ping


def test_key_and_strange_paths_work_through_the_process(
    home: Home, receiver: Receiver
) -> None:
    """A key that is no text and a path with a lone surrogate both work."""
    raw = json.dumps(event("Stop", cwd="/w/lone\ud800")).encode()
    env: dict[str, Any] = {
        "TELEMHQ_HASH_KEY": "\udcff\udcfe",
        "TELEMHQ_FOREGROUND": "1",
    }
    assert home.hook(raw, receiver.url, **env).returncode == 0
    (ping,) = receiver.wait_for(1)
    raw_path = "/w/lone\ud800".encode("utf-8", "surrogatepass")
    expected = hmac.new(b"\xff\xfe", raw_path, "sha256").hexdigest()[:12]
    assert (ping["cwd_hash"], ping["project"]) == (expected, "lone")


# -- Project ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cwd, project_dir, name, expected",
    [
        ("/w/acme/src", "/w/acme", "Shop", "Shop"),
        ("/w/acme", "/w/acme", None, "acme"),
        ("/w/acme/src/deep", "/w/acme", None, "acme"),
        ("/w/acme/", "/w/acme/", None, "acme"),
        ("/w/acme/src/../lib", "/w/acme", None, "acme"),
        ("/w/acme/../other", "/w/acme", None, "other"),
        ("/w/acme-old", "/w/acme", None, "acme-old"),
        ("/w", "/w/acme", None, "w"),
        ("/elsewhere/tool", "/w/acme", None, "tool"),
        ("/w/acme", None, None, "acme"),
        ("/w/acme", "", "", "acme"),
        ("/", None, None, "unknown"),
        ("", None, None, "unknown"),
        (None, None, None, "unknown"),
        (5, None, None, "unknown"),
        (["/w/acme"], None, None, "unknown"),
        ("/w/My Shop (neu) é", None, None, "My Shop (neu) é"),
        ("/w/a\tb\x1b[31m\r\n\x7f\x9bc", None, None, "ab[31mc"),
        ("/w/\x01\x02", None, None, "unknown"),
        ("/w/a\0b", None, None, "ab"),
        ("/w/a\udcffb\ud800", None, None, "ab"),
        ("/w/" + "x" * 200, None, None, "x" * 128),
        ("/w/acme", None, "two words/and more", "two words/and more"),
        ("/w/acme", None, "y" * 200, "y" * 128),
        ("/w/acme", None, "a\nb\x1b\udcff", "ab"),
        ("/w/acme", None, "\x1b\x07 ", "acme"),
        ("C:\\Users\\jane\\acme", None, None, "acme"),
    ],
)
def test_the_projects_name(
    script: ModuleType,
    cwd: object,
    project_dir: str | None,
    name: str | None,
    expected: str,
) -> None:
    """TELEMHQ_PROJECT, else the project directory around the cwd, else the cwd."""
    assert project(script, cwd, project_dir, name) == expected


def test_a_cd_inside_the_project_makes_no_new_project(
    home: Home, receiver: Receiver
) -> None:
    """A cwd below CLAUDE_PROJECT_DIR is that project, one outside is not."""
    top = str(home.project)
    for cwd in (top, top + "/src", str(home.path / "other")):
        found = event("Stop", cwd=cwd)
        done = home.hook(found, receiver.url, CLAUDE_PROJECT_DIR=top)
        assert done.returncode == 0
    names = [ping["project"] for ping in receiver.wait_for(3)]
    assert names == ["api", "api", "other"]


@pytest.mark.skipif(os.name != "posix", reason="links need a privilege there")
def test_a_symbolic_link_to_the_project_is_the_project(
    script: ModuleType, tmp_path: pathlib.Path
) -> None:
    """A cwd inside counts as inside whichever of the two names a link the way."""
    (tmp_path / "acme" / "src").mkdir(parents=True)
    (tmp_path / "current").symlink_to("acme")
    assert project(script, tmp_path / "acme" / "src", tmp_path / "current") == "current"
    assert project(script, tmp_path / "current" / "src", tmp_path / "acme") == "acme"
    (tmp_path / "acme" / "away").symlink_to(tmp_path)
    assert project(script, tmp_path / "acme" / "away", tmp_path / "acme") == "acme"


def git(directory: pathlib.Path, *arguments: str) -> None:
    """Run git there, with no settings of this machine."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "GIT_CONFIG_NOSYSTEM": "1"}
    for who in ("AUTHOR", "COMMITTER"):
        env.update({f"GIT_{who}_NAME": "t", f"GIT_{who}_EMAIL": "t@example.org"})
    subprocess.run(
        [GIT, "-c", "protocol.file.allow=always", *arguments],
        check=True,
        cwd=str(directory),
        env=env,
        timeout=60,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A repository, its bare clones, worktrees of each, and one with a submodule."""
    top = tmp_path_factory.mktemp("git")
    (top / "shop" / "src").mkdir(parents=True)
    git(top / "shop", "init", "-q")
    git(top / "shop", "commit", "-q", "--allow-empty", "-m", "first")
    git(top / "shop", "worktree", "add", "-q", "-b", "fix", "../shop-fix")
    (top / "shop-fix" / "src").mkdir()
    git(top, "clone", "-q", "--bare", "shop", "depot.git")
    git(top / "depot.git", "worktree", "add", "-q", "-b", "fix2", "../depot-fix")
    (top / "market").mkdir()
    git(top, "clone", "-q", "--bare", "shop", "market/.bare")
    git(top / "market/.bare", "worktree", "add", "-q", "-b", "fix3", "../main-tree")
    git(top, "init", "-q", "mall")
    git(top / "mall", "submodule", "add", "-q", str(top / "shop"), "stall")
    git(top / "mall/stall", "worktree", "add", "-q", "-b", "fix4", "../stall-fix")
    git(top, "init", "-q", "--separate-git-dir", "elsewhere.git", "kiosk")
    return top


@git_needed
@pytest.mark.parametrize(
    "cwd, project_dir, expected",
    [
        ("shop", None, "shop"),
        ("shop/src", "shop", "shop"),
        ("shop-fix", None, "shop"),
        ("shop-fix", "shop-fix", "shop"),
        ("shop-fix/src", "shop-fix", "shop"),
        ("shop-fix", "shop", "shop"),
        ("depot-fix", None, "depot"),
        ("market/main-tree", None, "market"),
        ("mall/stall", None, "stall"),
        ("mall/stall", "mall", "mall"),
        ("mall/stall-fix", None, "stall"),
        ("kiosk", None, "kiosk"),
    ],
)
def test_a_git_worktree_is_its_main_repositorys_project(
    script: ModuleType,
    repositories: pathlib.Path,
    cwd: str,
    project_dir: str | None,
    expected: str,
) -> None:
    """Real worktrees, of bare repositories too; a submodule is not a worktree."""
    where = repositories / project_dir if project_dir else None
    assert project(script, repositories / cwd, where) == expected


@git_needed
def test_a_worktree_is_found_through_the_process(
    home: Home, receiver: Receiver, repositories: pathlib.Path
) -> None:
    """The hook itself names a worktree's ping after the main repository."""
    cwd = repositories / "shop-fix"
    assert home.hook(event("Stop", cwd=str(cwd)), receiver.url, cwd=cwd).returncode == 0
    assert receiver.wait_for(1)[0]["project"] == "shop"


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"gitdir: ../shop/.git/worktrees/tree\n", "shop"),
        (b"gitdir: ../shop/.git/worktrees/tree", "shop"),
        (b"gitdir: ../shop/.git/modules/tree\n", "tree"),
        (b"gitdir: /.git/worktrees/tree\n", "tree"),
        (b"gitdir:\n", "tree"),
        (b"gitdir: ../a\x1bb\xff/.git/worktrees/tree\n", None),
        (b"", "tree"),
        (b"\0\0\0", "tree"),
        (b"gitdir: \0/x/.git/worktrees/tree\n", None),
        (b"gitdir: /x/.git/worktrees/tree\n" * 5000, "tree"),
        (b"\xff" * 100, "tree"),
    ],
)
def test_a_strange_git_file_is_no_error(
    script: ModuleType, tmp_path: pathlib.Path, content: bytes, expected: str | None
) -> None:
    """Whatever `.git` holds, the project has a name without control characters."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / ".git").write_bytes(content)
    name = project(script, tmp_path / "tree")
    assert name.isprintable()
    assert 0 < len(name) <= 128
    assert "/" not in name
    assert expected in (None, name)


def test_a_git_that_is_a_fifo_does_not_block(home: Home, receiver: Receiver) -> None:
    """A `.git` that no one ever writes to cannot stop the hook."""
    subprocess.run(["mkfifo", str(home.project / ".git")], check=True)
    found = event("Stop", cwd=str(home.project))
    assert home.hook(found, receiver.url).returncode == 0
    assert receiver.wait_for(1)[0]["project"] == "api"


# -- Fuzz ------------------------------------------------------------------------------

SHAPED = {  # fields that leave as they are when they look like an identifier
    "session_id",
    "prompt_id",
    "tool_name",
    "tool_use_id",
    "permission_mode",
    "agent_id",
    "agent_type",
    "source",
    "trigger",
    "notification_type",
    "model",
    "hook_event_name",
    "level",
    "effort",
    "reason",
}


CONTENT = (  # fields of Claude Code's events that hold content or paths
    "prompt",
    "tool_input",
    "tool_response",
    "error_details",
    "last_assistant_message",
    "message",
    "title",
    "custom_instructions",
    "compact_summary",
    "delta",
    "command_args",
    "session_title",
    "task_subject",
    "task_description",
    "tool_calls",
    "background_tasks",
    "session_crons",
    "file_path",
    "agent_transcript_path",
    "scratchpad_dir",
    "transcript_path",
    "CANARY_EXTRA",
    "new",
)


def canary(dice: random.Random, key: str) -> str:
    """A secret as a string, of any shape but the one that may leave under `key`."""
    word = f"CANARY_{dice.randrange(10**6):06d}"
    if key == "cwd":  # of which the last name may leave
        return dice.choice(("/home/%s/api", "/%s/../%s/api/")).replace("%s", word)
    texts = [
        "the secret is " + word,
        f"/home/{word}/x",
        f"{word}/{word}",
        f"C:\\Users\\{word}",
        word + "\n",
        "\ufeff" + word,
        word + "\ud800",
        word + "x" * 200,
        word + "é",
        (word + " ") * 5000,
        "-" + word,
        "Exit code 3 " + word,
        "Exit code " + word,
        f'{{"session_id":"{word}"}}',
        f"https://user:{word}@example.org/",
        f"arn:aws:x:1:{word}/y",
    ]
    if key not in SHAPED:
        texts += [word, word.lower(), word.lower().strip("_0123456789"), word + "[1m]"]
    if key == "error":  # one lower-case word may be a code of Claude Code's
        texts = texts[:-2]
    return dice.choice(texts)


def strange(dice: random.Random, key: str, depth: int = 0) -> Any:
    """Any JSON value, with canaries wherever there is a string in it."""
    kind = dice.randrange(9 if depth < 3 else 7)
    if kind < 3:
        return canary(dice, key)
    if kind == 3:
        return dice.choice((float("nan"), float("inf"), -float("inf"), -5, -0.5, 1e308))
    if kind == 4:
        return dice.choice((10**30, -(10**30), 10**4000, 2**53, 2**63, 0, 7))
    if kind == 5:
        return dice.choice((True, False, None, "", [], {}))
    if kind == 6:
        return ["CANARY_" + "y" * 10] * dice.randrange(1, 2000)
    if kind == 7:
        return [strange(dice, "", depth + 1) for _ in range(dice.randrange(4))]
    names = dice.sample([*sorted(SHAPED), "prompt", "x"], 3)
    # Only of `effort` an inner value may leave, and only `level`.
    inner = {name: strange(dice, name, depth + 1) for name in names}
    inner[f"CANARY_KEY_{dice.randrange(99)}"] = strange(dice, "", depth + 1)
    return inner


def with_canaries(dice: random.Random, value: Any, key: str) -> Any:
    """`value` with a canary in place of every string in it."""
    if isinstance(value, dict):
        return {k: with_canaries(dice, v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [with_canaries(dice, v, "") for v in value]
    return canary(dice, key) if isinstance(value, str) else value


def mutated(dice: random.Random, names: list[str]) -> dict[str, Any]:
    """A real event, some of it replaced, with canaries where strings were."""
    found = event(dice.choice(names))
    name = found["hook_event_name"]
    for key in list(found):
        roll = dice.random()
        if roll < 0.3:
            found[key] = strange(dice, key)
        elif roll < 0.9:
            found[key] = with_canaries(dice, found[key], key)
        elif roll < 0.95:
            del found[key]
    for _ in range(dice.randrange(4)):
        key = dice.choice((*CONTENT, "error", "reason", "model"))
        found[key] = strange(dice, key)
    if dice.random() < 0.8:
        found["hook_event_name"] = name
    if isinstance(found.get("cwd"), str) and "CANARY" in found["cwd"]:
        found["cwd"] = canary(dice, "cwd")
    return found


def check_ping(script: ModuleType, text: str) -> None:
    """A ping's text holds no canary, no path, nothing overlong, only the gate's."""
    assert "canary" not in text.lower()
    assert "/" not in text
    assert "\\" not in text
    assert "null" not in text
    assert len(text) < 4096

    def constant(name: str) -> NoReturn:
        raise AssertionError(name)

    ping = json.loads(text, parse_constant=constant)
    assert set(ping) <= set(script.GATE)
    for name, value in ping.items():
        assert script.GATE[name](value)
        assert not isinstance(value, str) or len(value) <= 128
        assert not isinstance(value, (int, float)) or 0 <= value <= 2**53
    assert {"provider", "tool", "event_id", "timestamp", "status", "project"} <= set(
        ping
    )


@pytest.mark.parametrize("key", CONTENT)
def test_content_stays_home_even_when_it_looks_like_an_identifier(
    script: ModuleType, key: str
) -> None:
    """A one-word prompt or title has the shape of an identifier: it does not leave."""
    for name in EXPECTED:
        for value in (
            "CANARY",
            {"level": "CANARY"},
            ["CANARY"],
            {"description": "CANARY"},
        ):
            ping = ping_of(script, event(name, **{key: value}))
            assert "CANARY" not in script.encode_json(ping)


@pytest.mark.parametrize("seed", range(4))
def test_no_mutated_event_gets_a_canary_through(script: ModuleType, seed: int) -> None:
    """Thousands of mutated real events: no content, no path, no exception, ever."""
    dice, names = random.Random(seed), sorted(EXPECTED)
    for i in range(1000):
        found = mutated(dice, names)
        # As it comes from stdin: through JSON, NaN and huge integers included.
        found = script.decode_json(json.dumps(found, ensure_ascii=dice.random() < 0.5))
        environ = dice.choice(
            ({}, {"TELEMHQ_HASH_KEY": "k"}, {"TELEMHQ_MACHINE": "a/b"})
        )
        settings = script.Settings(environ)
        named = script.project_of(found, settings)
        ping = script.make_ping(found, settings, named, NS + i, i)
        check_ping(script, script.encode_json(ping))


def test_the_fuzz_can_find_a_leak(script: ModuleType) -> None:
    """The check itself is not blind: each kind of leak, put in by hand, is seen."""
    good = ping_of(script, event("Stop"))
    check_ping(script, script.encode_json(good))
    leaks = {
        "project": "a CANARY",
        "session_id": "a/b",
        "prompt": "x",
        "tool_name": "a b",
        "duration_ms": 10**30,
        "model": None,
        "event": "x" * 129,
        "agent_id": "a\\b",
    }
    for name, value in leaks.items():
        with pytest.raises(AssertionError):
            check_ping(script, script.encode_json(dict(good, **{name: value})))


def test_mutated_events_get_no_canary_out_of_the_process(
    home: Home, receiver: Receiver, script: ModuleType
) -> None:
    """The bytes that arrive at a receiver hold no canary, in body, path or headers."""
    dice, names = random.Random(99), sorted(EXPECTED)
    for _ in range(12):
        raw = json.dumps(mutated(dice, names)).encode("utf-8", "surrogatepass")
        done = home.hook(raw, receiver.url)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    receiver.wait_for(12, 60)
    for request in receiver.requests:
        check_ping(script, request.body.decode("ascii"))
        assert "canary" not in (request.path + str(request.headers)).lower()


# -- Bodies ----------------------------------------------------------------------------


def test_a_session_with_transcripts_sends_fields_of_the_gate_only(
    home: Home, receiver: Receiver, script: ModuleType
) -> None:
    """Tokens come from the transcripts, where all content is: none of it arrives."""
    shutil.copytree(str(FIXTURES / "transcripts" / "subagent"), str(home.path / "t"))
    (transcript,) = (home.path / "t").glob("*.jsonl")
    agents = transcript.with_suffix("") / "subagents" / "agent-a1a6d15b57a3bfbee.jsonl"
    same = {"session_id": transcript.stem, "transcript_path": str(transcript)}
    assert "CANARY" in transcript.read_text("utf-8") + agents.read_text("utf-8")
    events = (
        event("SessionStart-startup", **same),
        event("SubagentStop", agent_transcript_path=str(agents), **same),
        event("Stop", **same),
        event("SessionEnd-other", **same),
    )
    for found in events:
        assert home.hook(found, receiver.url, TELEMHQ_GIT="1").returncode == 0
    receiver.wait_for(len(events), 30)
    for request in receiver.requests:
        assert "canary" not in request.body.decode("ascii").lower()
        ping = request.ping
        assert set(ping) <= set(script.GATE)
        assert all(script.GATE[name](value) for name, value in ping.items())
    assert sum(ping.get("total_tokens", 0) for ping in receiver.pings) > 0


def test_what_someone_wrote_into_the_outbox_goes_through_the_gate(
    home: Home, receiver: Receiver, script: ModuleType
) -> None:
    """Every body comes out of the gate, also when a ping's file was changed on disk."""
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(1)
    home.quiet()
    ping = receiver.pings[0]
    ping.update(event_id="f" * 32, prompt="CANARY", session_id="/home/CANARY")
    ping.update(
        model=["CANARY"], error="CANARY text", cost_usd="CANARY", tools="CANARY"
    )
    name = f"{NS:020d}-{'f' * 32}.json"
    path = home.destination() / "outbox" / name
    path.write_text(json.dumps({"ping": ping, "local": {}}))
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(3)
    changed = [r for r in receiver.requests if r.ping["event_id"] == "f" * 32]
    assert len(changed) == 1
    assert set(changed[0].ping) <= set(script.GATE)
    assert b"CANARY" not in changed[0].body


# -- To be read from top to bottom -----------------------------------------------------

TEXT = SCRIPT.read_text("utf-8")
TREE = ast.parse(TEXT)
BANNER = re.compile(r"# -- (.*?) ?-*")
SECTIONS = (  # DESIGN's words, in the order of a ping's way
    "JSON",
    "Settings",
    "Event -> ping",
    "Trackers",
    "Outbox",
    "Hook",
    "Transcripts",
    "Accounts",
    "Delivery",
    "Sender",
    "Commands",
)
Definition = (ast.FunctionDef, ast.ClassDef)


BANNERS = [  # (line, title) of every section's
    (number, BANNER.sub(r"\1", line))
    for number, line in enumerate(TEXT.splitlines(), 1)
    if line.startswith("# -- ")
]


def line_of(title: str) -> int:
    """The line of the first banner that begins so."""
    return next(line for line, found in BANNERS if found.startswith(title))


def section_of(line: int) -> int:
    """The number of the section that holds a line; 0: what stands before the first."""
    return sum(1 for banner, _ in BANNERS if banner <= line)


def definitions() -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Every function, class and method, the inner ones too."""
    return (node for node in ast.walk(TREE) if isinstance(node, Definition))


def test_each_section_has_a_banner_that_one_can_grep() -> None:
    """`grep '^# --'` lists the sections, by DESIGN's words, in the order of a ping's
    way, and each banner fills its line."""
    titles = [title for _, title in BANNERS]
    firsts = [
        next(i for i, t in enumerate(titles) if t.startswith(s)) for s in SECTIONS
    ]
    assert firsts == sorted(firsts)
    lines = TEXT.splitlines()
    assert [line for line, _ in BANNERS if len(lines[line - 1]) != 88] == []


def test_two_banners_tell_what_runs_when() -> None:
    """Above the first all runs while Claude Code waits, above the second in the
    background; below it stand the commands."""
    lines = TEXT.splitlines()
    first = lines.index(
        "# All above runs while Claude Code waits; all below in the background, in a "
        "sender."
    )
    second = lines.index("# All below is run by a person: the commands.")
    assert line_of("Hook") < first < line_of("Transcripts")
    assert line_of("Sender") < second < line_of("Commands")


def names_in(node: ast.AST) -> dict[str, int]:
    """Names that are read in a definition, however deep -> the line of the first."""
    found: dict[str, int] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
            found.setdefault(inner.id, inner.lineno)
    return found


def bound_in(node: ast.AST) -> set[str]:
    """Names that a definition gives a meaning of its own, however deep."""
    found: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load):
            found.add(inner.id)
        elif isinstance(inner, ast.arg):
            found.add(inner.arg)
        elif isinstance(inner, (ast.Import, ast.ImportFrom)):
            found.update(alias.asname or alias.name for alias in inner.names)
        elif isinstance(inner, ast.ExceptHandler) and inner.name:
            found.add(inner.name)
    return found


def defined_at() -> dict[str, int]:
    """Names defined at the top level -> the line that defines them first."""
    found: dict[str, int] = {}
    for node in TREE.body:
        names = {node.name} if isinstance(node, Definition) else bound_in(node)
        for name in names:
            found.setdefault(name, node.lineno)
    return found


def test_each_section_uses_only_what_stands_above_it() -> None:
    """No section names a function, class or constant of one below it: an auditor who
    has read down to a banner knows all that what stands above it can do."""
    lines = defined_at()
    wrong = []
    for node in TREE.body:
        own = bound_in(node) if isinstance(node, Definition) else set()
        for name, line in names_in(node).items():
            above = section_of(lines.get(name, 0)) <= section_of(line)
            if not above and name not in own:
                wrong.append(f"line {line}: {name}")
    assert wrong == []
    assert section_of(lines["gate"]) < section_of(lines["hook"])


def test_no_code_hides_in_a_text() -> None:
    """Nothing is compiled from a text, and no text spans lines but for docstrings."""
    called = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}
    assert called & {"exec", "eval", "compile", "globals"} == set()
    docstrings = {
        node.body[0].lineno
        for node in [TREE, *definitions()]
        if ast.get_docstring(node) is not None
    }
    source = io.StringIO(TEXT).readline
    strings = [
        token
        for token in tokenize.generate_tokens(source)
        if token.type == tokenize.STRING and token.string.endswith(('"""', "'''"))
    ]
    assert [t.start[0] for t in strings if t.start[0] not in docstrings] == []
    assert len(strings) > 100


def test_no_function_has_60_lines() -> None:
    """Each function can be seen at once."""
    long = [
        f"{node.name}, line {node.lineno}"
        for node in definitions()
        if isinstance(node, ast.FunctionDef)
        and (node.end_lineno or 0) - node.lineno >= 59
    ]
    assert long == []


def test_no_line_is_longer_than_88_columns() -> None:
    """The script can be read in a terminal."""
    lines = TEXT.splitlines()
    assert [i + 1 for i, line in enumerate(lines) if len(line) > 88] == []


def inner_functions() -> set[ast.AST]:
    """Functions within functions: what they mean is told by the one around."""
    return {
        inner
        for node in definitions()
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
        if inner is not node and isinstance(inner, ast.FunctionDef)
    }


def test_every_function_says_what_it_means() -> None:
    """Each function and class has a docstring, but for methods named by Python."""
    told = inner_functions()
    missing = [
        f"{node.name}, line {node.lineno}"
        for node in definitions()
        if not node.name.startswith("__")
        and node not in told
        and not ast.get_docstring(node)
    ]
    assert missing == []


# What an auditor finds above the outbox: nothing there opens a file or a connection.
PURE = {
    "os": {"environ", "path", "urandom"},
    "os.path": {"expanduser", "isabs", "join", "normpath"},
    "sys": {"argv", "base_exec_prefix", "base_prefix", "flags", "path", "platform"}
    | {"version_info"},
    "time": {"gmtime", "strftime", "strptime"},
    "stat": set(),
    "gc": {"disable"},
}
PURE_MODULES = {"__future__", "_json", "calendar", "hashlib", "hmac", "json", *PURE}
PURE_MODULES -= {"os.path"}
PURE_MODULES |= {"_signal", "signal"}


def above_the_outbox() -> Iterator[ast.AST]:
    """All that stands there, but for what is imported for its types only."""
    end = line_of("Outbox")
    for node in TREE.body:
        if node.lineno < end and not (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            yield from ast.walk(node)


def dotted(node: ast.AST) -> str:
    """`os.path` of the node that says so, "" of any other expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_what_leaves_is_decided_before_anything_touches_disk_or_network() -> None:
    """An auditor may stop after the trackers: up to there nothing can open a file or a
    connection."""
    for node in above_the_outbox():
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= PURE_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert node.module in PURE_MODULES
        elif isinstance(node, ast.Name):
            assert node.id not in ("open", "print", "input"), node.lineno
        elif isinstance(node, ast.Attribute):
            owner = dotted(node.value)
            assert owner not in PURE or node.attr in PURE[owner], node.lineno


def test_nothing_below_the_gate_changes_it() -> None:
    """What is not in that section never leaves: its tables are made there, and only
    read elsewhere."""
    first, last = line_of("Event -> ping"), line_of("Trackers")
    tables = {"GATE", "BESIDE", "COPIED", "ORIGIN", "TOKENS", "CLIENT_AGENTS"}
    for node in ast.walk(TREE):
        line = getattr(node, "lineno", first)
        if first <= line < last:
            continue
        if isinstance(node, ast.Name) and node.id in tables:
            assert isinstance(node.ctx, ast.Load), line
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            assert node.value.id not in tables or isinstance(node.ctx, ast.Load), line
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id not in tables, line
    lines = defined_at()
    assert first < lines["GATE"] < lines["gate"] < lines["make_ping"] < last
