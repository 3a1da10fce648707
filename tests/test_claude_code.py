"""The real Claude Code fires the hook: the pings arrive, and it never notices."""

from __future__ import annotations

import hashlib
import json
import pathlib
import time
from typing import Any

import pytest

import claude_code
from claude_code import Seen, World, hooks, slow, text, tool

EXAMPLE = claude_code.EXAMPLE
PARENT = claude_code.PARENT
TELEMHQ = {  # TelemHQ's own settings block, as its page gives it
    "hooks": {
        event: [
            {
                "hooks": [
                    {
                        "type": "command",
                        "command": "python3 ~/.claude/hooks/telemhq_ping.py",
                    }
                ]
            }
        ]
        for event in ("Stop", "StopFailure")
    }
}
SCRIPT: dict[str, list[Any]] = {
    "WORK": [
        [text("CANARY_SAY"), tool("Bash", command="echo CANARY_OUT CANARY_COMMAND")],
        [tool("Write", file_path="CANARY_FILE.txt", content="CANARY_CONTENT")],
        [tool("Bash", command="echo CANARY_STDERR >&2; exit 3")],
        [tool("Read", file_path="CANARY_NOT_THERE.txt")],
        [text("CANARY_DONE")],
    ],
    "FAIL": [401],
    # StopFailure is not waited for: what comes next must not overtake it.
    "PLAIN": [slow(0.5, text("CANARY_PLAIN"))],
}


def install(world: World) -> None:
    """The example's events, and the README's optional ones for tool activity."""
    world.install(
        json.loads(EXAMPLE.read_text("utf-8")),
        hooks("PostToolUse", matcher="Bash|Edit|MultiEdit|Write"),
        hooks("PostToolUseFailure"),
    )
    world.messages.script = SCRIPT


# -- A session: tools, two of which fail, then an API error ----------------------


def play_session(world: World) -> None:
    install(world)
    world.talk("WORK CANARY_PROMPT", "FAIL", "PLAIN")
    world.settle()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What became of a session of three turns."""
    return claude_code.run(play_session, tmp_path_factory.mktemp("session"))


def test_each_event_arrives_as_one_ping(seen: Seen) -> None:
    """Turns, tool calls and failures arrive in order, once each."""
    names = "event", "status", "tool_name", "error", "exit_code", "reason"
    found = [tuple(ping.get(name) for name in names) for ping in seen.pings]
    assert found == [
        ("PostToolUse", "success", "Bash", None, None, None),
        ("PostToolUse", "success", "Write", None, None, None),
        ("PostToolUseFailure", "failed", "Bash", "tool_error", 3, None),
        ("PostToolUseFailure", "failed", "Read", "tool_error", None, None),
        ("Stop", "success", None, None, None, None),
        ("StopFailure", "failed", None, "authentication_failed", None, None),
        ("Stop", "success", None, None, None, None),
        ("SessionEnd", "success", None, None, None, "other"),
    ]


def test_each_ping_says_where_it_belongs(seen: Seen) -> None:
    """All pings carry the session's id, the project's name and hash, their own id."""
    session_id = seen.runs[0]["result"]["session_id"]
    cwd = hashlib.sha256(str(seen.home / "acme" / "api").encode()).hexdigest()[:12]
    for request, ping in zip(seen.requests, seen.pings):
        assert (ping["provider"], ping["tool"]) == ("anthropic", "claude-code")
        assert (ping["project"], ping["session_id"]) == ("api", session_id)
        assert ping["cwd_hash"] == cwd
        assert request["headers"]["Idempotency-Key"] == ping["event_id"]
    assert len({ping["event_id"] for ping in seen.pings}) == len(seen.pings)
    timestamps = [ping["timestamp"] for ping in seen.pings]
    assert timestamps == sorted(timestamps)


def test_nothing_that_was_said_or_done_leaves(seen: Seen) -> None:
    """No prompt, answer, command, output, file name or path in any byte received."""
    said, sent = json.dumps(list(seen.rows())), json.dumps(seen.requests)
    for canary in ("PROMPT", "SAY", "OUT", "FILE", "STDERR", "NOT_THERE"):
        assert "CANARY_" + canary in said
    assert PARENT in said
    for content in ("CANARY", PARENT, "acme", "does not exist"):
        assert content not in sent


def test_nothing_that_was_said_or_done_is_kept(seen: Seen) -> None:
    """No prompt, answer, command, output or file name in any file of the script's."""
    assert [path for path, held in seen.state().items() if "CANARY" in held] == []


def test_claude_code_never_notices(seen: Seen) -> None:
    """No hook error, no output of a hook, in the transcript or on stderr."""
    assert [row for row in seen.rows() if row.get("subtype") == "stop_hook_summary"]
    assert seen.noticed() == []
    assert seen.runs[0]["stderr"] == ""


# -- TelemHQ's own settings block -------------------------------------------------


def play_telemhq_block(world: World) -> None:
    world.install(TELEMHQ)
    world.messages.script = SCRIPT
    world.talk("PLAIN", "FAIL", "PLAIN")
    world.settle()


def test_the_block_on_telemhqs_page_works_unchanged(tmp_path: pathlib.Path) -> None:
    """Who pasted TelemHQ's block sees turns and failures, and the client nothing."""
    seen = claude_code.run(play_telemhq_block, tmp_path)
    found = [(ping["event"], ping["status"]) for ping in seen.pings]
    turn = ("Stop", "success")
    assert found == [turn, ("StopFailure", "failed"), turn]
    assert seen.noticed() == []


# -- A client that ends in an API error --------------------------------------------


def play_failing_runs(world: World) -> None:
    world.install(json.loads(EXAMPLE.read_text("utf-8")))
    world.messages.script = SCRIPT
    for _ in range(3):
        world.claude("FAIL")
        world.settle()


@pytest.mark.alone  # its shell has 15 ms: no other test may delay it
def test_a_failing_run_says_so_before_it_ends(tmp_path: pathlib.Path) -> None:
    """By the example's `trap`, StopFailure arrives although `claude -p` sends its hook
    a SIGTERM after some 15 ms, before Python is up."""
    seen = claude_code.run(play_failing_runs, tmp_path)
    found = [(ping["event"], ping.get("error")) for ping in seen.pings]
    failure = ("StopFailure", "authentication_failed")
    assert found == 3 * [failure, ("SessionEnd", None)]


# -- A slow server -----------------------------------------------------------------


def play_slow_server(world: World) -> None:
    install(world)

    def two_seconds(_: object) -> int:
        time.sleep(2)
        return 200

    for _ in range(3):
        for answer in (200, two_seconds):
            world.receiver.answer = answer
            world.claude("WORK")
            world.receiver.answer = 200
            world.settle()


def test_a_slow_server_does_not_slow_the_session(tmp_path: pathlib.Path) -> None:
    """The client takes as long when each ping takes the server 2 s."""
    seen = claude_code.run(play_slow_server, tmp_path)
    seconds = [run["seconds"] for run in seen.runs]
    assert min(seconds[1::2]) - min(seconds[0::2]) < 1, seconds
    took = [
        hook["durationMs"] for row in seen.rows() for hook in row.get("hookInfos", ())
    ]
    assert len(took) == 6, took
    assert sorted(took)[3] < 1000, took
