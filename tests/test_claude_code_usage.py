"""The pings' tokens and cost are those of the real Claude Code's own ledger."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

import claude_code
from claude_code import (
    Seen,
    Talk,
    World,
    billed,
    charged,
    hooks,
    ledger,
    pings_of,
    slow,
    text,
    tool,
)
from support import wait_until

DAY_S = 86400
SCRIPT: dict[str, list[Any]] = {
    "PLAIN": [[text("CANARY_SAY")]],
    "TOOLS": [
        [text("CANARY_SAY"), tool("Bash", command="echo CANARY_OUT")],
        [tool("Bash", command="exit 3"), tool("Read", file_path="/CANARY")],
        [text("CANARY_DONE")],
    ],
    "PARALLEL": [
        [tool("Bash", command=f"echo CANARY_{i}") for i in range(4)],
        [text("CANARY_DONE")],
    ],
    "DELEGATE": [
        [
            tool(
                "Agent",
                description="CANARY",
                prompt="SUBTASK",
                subagent_type="general-purpose",
                model="haiku",
            )
        ],
        [text("CANARY_DELEGATED")],
    ],
    "SUBTASK": [[tool("Bash", command="echo CANARY")], slow(3, text("CANARY_FOUND"))],
    "<task-notification>": [[text("CANARY_NOTED")]],
    "FAIL": [[tool("Bash", command="echo CANARY")], 401],
    # More than 2 s after the turn before: nothing of it can ride on that turn's Stop.
    "HANG": [slow(2.5, tool("Bash", command="echo CANARY")), slow(600)],
}
# What the hook has seen from its first turn on; what it has not, or not to its end.
WHOLE = ["plain", "tools", "parallel", "agent", "error", "failed", "resumed"]
WHOLE += ["compacted", "cleared"]
PARTS = ["forked", "met later", "killed", "killed and resumed"]


def play_all(world: World, more: bool) -> dict[str, Any]:
    """Every kind of session, one after the other; their results, by name."""
    example = json.loads(claude_code.EXAMPLE.read_text("utf-8"))
    world.messages.script = SCRIPT
    met = world.claude("TOOLS")["session_id"]
    world.messages.bill.clear()  # the hook is installed now: all that was is history
    world.install(example, hooks("SessionStart", "SubagentStop") if more else hooks())
    results = {}
    for name in ("plain", "tools", "parallel"):
        results[name] = world.claude(name.upper())
    results["agent"] = world.claude("DELEGATE")
    results["error"] = world.talk("PLAIN", "FAIL", "PLAIN")
    results["failed"] = world.claude("FAIL")

    talk = Talk(world)
    results["compacted"] = [talk.say(p) for p in ("TOOLS", "/compact", "PLAIN")][-1]
    talk.say("/clear")
    results["cleared"] = talk.say("PLAIN")
    talk.end()

    first = world.claude("TOOLS")
    results["resumed"] = world.claude("PLAIN", "--resume", first["session_id"])
    Talk(world, "--resume", first["session_id"]).end()  # left at once
    fork = "--resume", first["session_id"], "--fork-session"
    results["forked"] = world.claude("PARALLEL", *fork)
    results["met later"] = world.claude("PLAIN", "--resume", met)

    results["killed"] = kill_in_mid_turn(world)
    results["killed and resumed"] = kill_in_mid_turn(world)
    a_day_passes(world)
    again = results["killed and resumed"]["session_id"]
    world.claude("PLAIN", "--resume", again)
    world.settle()
    return results


def kill_in_mid_turn(world: World) -> dict[str, Any]:
    """A session whose second turn has used tokens when the client dies."""
    talk = Talk(world)
    result = talk.say("PLAIN")
    asked = len(world.messages.asked)
    talk.say("HANG", answered=False)
    wait_until(lambda: len(world.messages.asked) == asked + 2)
    used = world.messages.bill[-1]["id"].encode()
    transcript = world.transcript(result["session_id"])
    wait_until(lambda: used in transcript.read_bytes())
    talk.kill()
    return result


def a_day_passes(world: World) -> None:
    """As if nothing had happened for a day; then someone starts a session."""
    world.settle()
    then = time.time() - DAY_S - 60
    for account in world.home.state.glob("*/accounts/*.json"):
        os.utime(str(account), (then, then))
    world.home.set_state(**dict(world.home.state_json(), swept_at=0))
    world.claude("PLAIN")
    world.settle()


@pytest.fixture(scope="module", params=["the example's events", "more events"])
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    """What became of all sessions; `told` has the client's own results, by name."""
    more = request.param == "more events"
    return claude_code.run(play_all, tmp_path_factory.mktemp("all"), more=more)


def play_session_end_alone(world: World) -> dict[str, Any]:
    """Sessions of people who want one ping each; their results, by name."""
    world.messages.script = SCRIPT
    met = world.claude("TOOLS")["session_id"]
    world.messages.bill.clear()
    world.install(hooks("SessionEnd"))
    results = {"several turns": world.talk("TOOLS", "PLAIN", "PARALLEL")}
    first = world.claude("TOOLS")["session_id"]
    results["resumed"] = world.claude("PLAIN", "--resume", first)
    results["met later"] = world.claude("PLAIN", "--resume", met)
    world.settle()
    return results


@pytest.fixture(scope="module")
def seen_at_the_end(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What became of sessions with a hook for SessionEnd alone."""
    path = tmp_path_factory.mktemp("end")
    return claude_code.run(play_session_end_alone, path)


@pytest.mark.parametrize("name", WHOLE + PARTS)
def test_tokens_are_those_of_the_api(seen: Seen, name: str) -> None:
    """A session's pings add up to what the API billed, each message once."""
    assert charged(seen, name) == billed(seen, name)


@pytest.mark.parametrize("name", ["several turns", "resumed", "met later"])
def test_session_end_alone_has_it_all(seen_at_the_end: Seen, name: str) -> None:
    """Who registers nothing else gets a whole session's tokens with its end."""
    assert charged(seen_at_the_end, name) == billed(seen_at_the_end, name)


@pytest.mark.parametrize("name", WHOLE)
def test_tokens_are_those_of_the_clients_ledger(seen: Seen, name: str) -> None:
    """A session's pings add up to the client's own result, to the token."""
    assert charged(seen, name) == ledger(seen, name)


@pytest.mark.parametrize("name", WHOLE)
def test_cost_is_that_of_the_clients_ledger(seen: Seen, name: str) -> None:
    """A whole session's pings add up to the client's own total cost."""
    pings = pings_of(seen, name)
    cost = sum(ping.get("cost_usd", 0) for ping in pings)
    assert cost == pytest.approx(seen.told[name]["total_cost_usd"], abs=1e-9)


@pytest.mark.parametrize("name", ["forked", "met later"])
def test_no_cost_of_a_session_with_a_history(seen: Seen, name: str) -> None:
    """The ledger holds what was before the hook: its cost is never billed again."""
    pings = pings_of(seen, name)
    assert pings
    assert not any("cost_usd" in ping for ping in pings)


@pytest.mark.parametrize("name", ["plain", "tools", "parallel"])
def test_a_stop_carries_its_whole_turn(seen: Seen, name: str) -> None:
    """The last message too, although the client writes it after it fired Stop."""
    assert charged(seen, name, "Stop") == billed(seen, name)
    (stop,) = [ping for ping in pings_of(seen, name) if ping["event"] == "Stop"]
    assert "usage_complete" not in stop


@pytest.mark.parametrize("name", WHOLE)
def test_a_session_end_waits_for_the_ledger(seen: Seen, name: str) -> None:
    """Written after /clear, before any other end; not at all when no turn was made."""
    ends = [ping for ping in pings_of(seen, name) if ping["event"] == "SessionEnd"]
    assert len(ends) == (3 if name == "resumed" else 1)
    assert not any("usage_complete" in ping for ping in ends)


def test_a_session_that_was_killed_is_reported(seen: Seen) -> None:
    """A day after kill -9, one SessionLost ping carries what no event reported."""
    for name in ("killed", "killed and resumed"):
        pings = pings_of(seen, name)
        (lost,) = [ping for ping in pings if ping["event"] == "SessionLost"]
        assert (lost["status"], lost["usage_complete"]) == ("success", False)
        assert lost["project"] == "api"
        assert lost["total_tokens"] > 0


def test_a_session_that_ended_is_not_reported_again(seen: Seen) -> None:
    """The sweep makes one ping per lost session, and none for the others."""
    assert [ping["event"] for ping in seen.pings].count("SessionLost") == 2


def test_tools_are_counted(seen: Seen) -> None:
    """Calls and failures, by tool, of all turns and subagents."""
    found = {}
    for name in ("tools", "parallel", "agent"):
        pings = pings_of(seen, name)
        calls = sum(ping.get("tool_calls", 0) for ping in pings)
        found[name] = calls, sum(ping.get("tool_failures", 0) for ping in pings)
    assert found == {"tools": (3, 2), "parallel": (4, 0), "agent": (2, 0)}
    (stop,) = [ping for ping in pings_of(seen, "tools") if ping["event"] == "Stop"]
    assert stop["tools"] == {"Bash": 2, "Read": 1}


def test_models_are_named(seen: Seen) -> None:
    """A subagent's model appears beside the main chain's."""
    usage = seen.told["agent"]["modelUsage"]
    assert len(usage) == 2
    found: dict[str, int] = {}
    for ping in pings_of(seen, "agent"):
        parts = ping.get("models", {ping.get("model"): ping})
        for model, counts in parts.items():
            found[model] = found.get(model, 0) + counts.get("output_tokens", 0)
    assert {m: n for m, n in found.items() if n} == {
        model: counts["outputTokens"] for model, counts in usage.items()
    }


def test_a_stop_says_how_long_the_turn_took(seen: Seen) -> None:
    """From the prompt to Stop, within what the client's run took."""
    (stop,) = [ping for ping in pings_of(seen, "tools") if ping["event"] == "Stop"]
    assert 100 < stop["duration_ms"] < 1000 * seen.runs[2]["seconds"]


def test_nothing_but_counts_is_sent_or_kept(seen: Seen) -> None:
    """No canary of prompt, answer, command or output in a ping or on disk."""
    assert "CANARY" not in json.dumps(seen.requests)
    assert [path for path, held in seen.state().items() if "CANARY" in held] == []


def test_claude_code_never_notices(seen: Seen) -> None:
    """No hook error, no output of a hook, in any transcript or on stderr."""
    assert seen.noticed() == []
    assert [run["stderr"] for run in seen.runs if run["stderr"]] == []
