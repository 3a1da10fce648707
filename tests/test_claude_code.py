"""The real Claude Code fires the hook: the pings arrive, tokens and cost are those of
its own ledger and of the API, and it never notices. Each way of working once."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import signal
import time
from typing import Any

import pytest

import claude_code
from claude_code import (
    PARENT,
    SHOWN_S,
    Seen,
    Talk,
    Terminal,
    World,
    billed,
    charged,
    ledger,
    pings_of,
    text,
    tool,
)
from support import wait_until

AGENT = {"description": "CANARY", "subagent_type": "general-purpose", "model": "haiku"}
SCRIPT: dict[str, list[Any]] = {
    "WORK": [
        [text("CANARY_SAY"), tool("Bash", command="echo CANARY_OUT CANARY_COMMAND")],
        [tool("Write", file_path="CANARY_FILE.txt", content="CANARY_1\nCANARY_2\n")],
        [tool("Bash", command="echo CANARY_STDERR >&2; exit 3")],
        [tool("Read", file_path="CANARY_NOT_THERE.txt")],
        [text("CANARY_DONE")],
    ],
    # StopFailure is not waited for: what comes next must not overtake it.
    "PLAIN": [[text("CANARY_PLAIN", pause=0.5)]],
    "PARALLEL": [
        [tool("Bash", command=f"echo CANARY_{i}") for i in range(4)],
        [text("CANARY_DONE")],
    ],
    "DELEGATE": [
        [tool("Agent", prompt="SUBTASK", **AGENT)],
        [text("CANARY_DELEGATED")],
    ],
    "SUBTASK": [[tool("Bash", command="echo CANARY")], [text("CANARY_FOUND", pause=3)]],
    "<task-notification>": [[text("CANARY_NOTED")]],
    "FAIL": [[tool("Bash", command="echo CANARY")], 401],
    "UNAUTHORISED": [401],
    "TALK": [
        [text("CANARY_SAY"), tool("Bash", command="echo CANARY_OUT")],
        [text("CANARY_DRIP ", times=1000, pause=0.2)],
    ],
    "MAKE": [[text("CANARY_SAY"), tool("Bash", command="touch CANARY_FILE")]],
}


def nothing_leaves(seen: Seen) -> None:
    """No prompt, answer, command, output, file name or path is in a ping or on disk;
    no hook had an error or said anything."""
    for content in ("CANARY", PARENT, "acme", "does not exist"):
        assert content not in json.dumps(seen.requests)
    kept = (seen.home / ".claude" / "telemhq").rglob("*")
    assert not [p for p in kept if p.is_file() and b"CANARY" in p.read_bytes()]
    assert seen.noticed() == []
    assert [run["stderr"] for run in seen.runs if run["stderr"]] == []


# -- One session, event by event: tools, two of which fail, then an API error ----------


def play_session(world: World) -> dict[str, Any]:
    def two_seconds(_: object) -> int:
        time.sleep(2)
        return 200

    world.install("PostToolUse", "PostToolUseFailure")
    world.messages.script, world.receiver.answer = SCRIPT, two_seconds
    talked = world.talk("WORK CANARY_PROMPT", "UNAUTHORISED", "PLAIN")
    world.settle()
    return {"session": world.ledger(talked["session_id"])}


def test_each_event_arrives_as_one_ping(tmp_path: Any) -> None:
    """In order, once each, with whose it is; nothing else leaves. No hook waits for a
    tracker that takes 2 s to answer."""
    seen = claude_code.run(play_session, tmp_path)
    names = "event", "status", "tool_name", "error", "exit_code", "reason"
    assert [tuple(ping.get(name) for name in names) for ping in seen.pings] == [
        ("PostToolUse", "success", "Bash", None, None, None),
        ("PostToolUse", "success", "Write", None, None, None),
        ("PostToolUseFailure", "failed", "Bash", "tool_error", 3, None),
        ("PostToolUseFailure", "failed", "Read", "tool_error", None, None),
        ("Stop", "success", None, None, None, None),
        ("StopFailure", "failed", None, "authentication_failed", None, None),
        ("Stop", "success", None, None, None, None),
        ("SessionEnd", "success", None, None, None, "other"),
    ]
    cwd = hashlib.sha256(str(seen.home / "acme" / "api").encode()).hexdigest()[:12]
    whose = "anthropic", "claude-code", "api", seen.runs[0]["result"]["session_id"], cwd
    fields = "provider", "tool", "project", "session_id", "cwd_hash"
    for request, ping in zip(seen.requests, seen.pings):
        assert tuple(ping[name] for name in fields) == whose
        assert request["headers"]["Idempotency-Key"] == ping["event_id"]
    assert len({ping["event_id"] for ping in seen.pings}) == len(seen.pings)
    stop, end = seen.pings[4], seen.pings[-1]
    assert stop["tools"] == {"Bash": 2, "Read": 1, "Write": 1}
    assert (stop["tool_calls"], stop["tool_failures"]) == (4, 2)
    assert 100 < stop["duration_ms"] < 1000 * claude_code.SCENARIO_S
    assert end["lines_added"] == seen.told["session"]["totalLinesAdded"] > 0
    said = json.dumps(list(seen.rows()))
    for canary in ("PROMPT", "SAY", "OUT", "FILE", "STDERR", "NOT_THERE"):
        assert "CANARY_" + canary in said
    infos = [info for row in seen.rows() for info in row.get("hookInfos", ())]
    assert 0 < max(info["durationMs"] for info in infos) < 2000
    nothing_leaves(seen)


def play_failing_runs(world: World) -> None:
    world.install()
    world.messages.script = SCRIPT
    for _ in range(4):
        world.claude("UNAUTHORISED")
        world.settle()


def test_a_failing_run_says_so_before_it_ends(tmp_path: Any) -> None:
    """By the example's `trap`, StopFailure arrives although `claude -p` sends its hook
    a SIGTERM after some 15 ms, before Python is up. (On a busy machine the shell itself
    may not be up by then.)"""
    seen = claude_code.run(play_failing_runs, tmp_path)
    errors = [p["error"] for p in seen.pings if p["event"] == "StopFailure"]
    assert len(errors) >= 2
    assert set(errors) == {"authentication_failed"}
    assert [p["event"] for p in seen.pings].count("SessionEnd") == 4


# -- Tokens and cost: claude -p, and sessions of several turns -------------------------


def play_print(world: World) -> dict[str, Any]:
    """Every way that needs no terminal, one after the other; the ledgers, by name."""
    world.messages.script = SCRIPT
    met = world.claude("WORK")["session_id"]
    before = {"met later": world.ledger(met)}
    world.messages.bill.clear()  # the hook is installed now: all that was is history
    world.install("SessionStart", "SubagentStop")
    ways = {"plain": world.claude("PLAIN"), "tools": world.claude("WORK")}
    ways["parallel"] = world.claude("PARALLEL")
    ways["agent"] = world.claude("DELEGATE")
    ways["error"] = world.talk("PLAIN", "FAIL", "PLAIN")
    ways["failed"] = world.claude("FAIL")

    talk = Talk(world)
    ways["compacted"] = [talk.say(p) for p in ("WORK", "/compact", "PLAIN")][-1]
    talk.say("/clear")
    ways["cleared"] = talk.say("PLAIN")
    talk.end()

    ways["resumed"] = first = world.claude("WORK")
    resume = "--resume", str(first["session_id"])
    talk = Talk(world, *resume)
    talk.say("PLAIN")
    ways["forked while it runs"] = world.claude("PLAIN", *resume, "--fork-session")
    before["forked while it runs"] = world.ledger(resume[1])
    world.settle()
    talk.end()
    Talk(world, *resume).end()  # left at once
    before["forked"] = world.ledger(resume[1])
    talk = Talk(world, *resume, "--fork-session")
    ways["forked"] = [talk.say(p) for p in ("PARALLEL", "/compact", "PLAIN")][-1]
    talk.end()
    ways["met later"] = world.claude("PLAIN", "--resume", met)
    ways["broken off"] = broken_off(world)

    world.settle()
    told = {name: world.ledger(way["session_id"]) for name, way in ways.items()}
    for name, known in before.items():
        told[name]["before"] = known
    return told


def broken_off(world: World) -> dict[str, Any]:
    """SIGINT in the middle of a stream."""
    billed = len(world.messages.bill)
    child = world.start("stream-json", "--verbose", "TALK")
    wait_until(lambda: len(world.messages.bill) == billed + 2, 30)
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    return {"session_id": world.messages.bill[-1]["session_id"]}


# -- The interactive client, in a terminal ---------------------------------------------


def play_terminal(world: World) -> dict[str, Any]:
    """A first turn that Esc, then one that a denied permission breaks off, neither of
    which fires a hook; a branch. The ledgers, by name."""
    world.messages.script = SCRIPT
    world.install()
    ids = {}
    shown = {"streaming": ("TALK", "CANARY_DRIP"), "permission": ("MAKE", "proceed?")}
    for name, (prompt, words) in shown.items():
        arrived = len(world.receiver.requests)
        terminal = Terminal(world, "--permission-mode", "manual")
        terminal.say(prompt)
        terminal.wait_for(words)
        terminal.press("Escape")
        terminal.wait_for("Interrupted")
        terminal.say("PLAIN")
        terminal.wait_for("CANARY_PLAIN")
        wait_until(lambda n=arrived: len(world.receiver.requests) > n, SHOWN_S)  # type: ignore[misc]
        terminal.leave()
        world.settle()
        ids[name] = world.messages.bill[-1]["session_id"]
    terminal = Terminal(world)
    terminal.say("PLAIN")
    terminal.wait_for("CANARY_PLAIN")
    ids["its parent"] = world.messages.bill[-1]["session_id"]
    terminal.say("/branch")
    terminal.wait_for("Branched")
    terminal.say("PARALLEL")
    terminal.wait_for("CANARY_DONE")
    terminal.leave()
    world.settle()
    ids["branched"] = world.messages.bill[-1]["session_id"]
    return {name: world.ledger(session_id) for name, session_id in ids.items()}


# -- What became of them ---------------------------------------------------------------

PRINT = ["plain", "tools", "parallel", "agent", "error", "failed", "compacted"]
PRINT += ["cleared", "resumed", "forked", "forked while it runs", "met later"]
PRINT += ["broken off"]
TERMINAL = ["streaming", "permission", "its parent", "branched"]


@pytest.fixture(scope="module")
def seen_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was seen of a play; each is played once."""

    @functools.lru_cache
    def played(play: Any) -> Seen:
        if play is play_terminal and not shutil.which("tmux"):
            pytest.skip("no tmux, which drives the interactive client")
        return claude_code.run(play, tmp_path_factory.mktemp(play.__name__))

    return played


@pytest.mark.fault(50, 51, 90)
@pytest.mark.parametrize("name", PRINT + TERMINAL)
def test_tokens_and_cost_are_the_clients_own(seen_of: Any, name: str) -> None:
    """A session's pings add up to what the API gave out, and to what its ledger has
    gained, cost to the cent. (Of a message that was broken off the API has not said how
    much of an output it was: the ledger may have an estimate.) A Stop carries its whole
    turn, the last message too, although the client writes it after it fired Stop.
    Nothing else is sent or kept, nor does the client notice anything."""
    seen = seen_of(play_terminal if name in TERMINAL else play_print)
    nothing_leaves(seen)
    pings, given = pings_of(seen, name), billed(seen, name)
    found, (counts, cost) = charged(seen, name), ledger(seen, name)
    if name == "streaming":
        assert found["output_tokens"] > given.pop("output_tokens")
    assert {count: found[count] for count in given} == given
    assert sum(ping.get("cost_usd", 0) for ping in pings) == pytest.approx(cost)
    assert cost > 0 or name == "failed"
    if name != "broken off":
        assert found == counts
        assert [ping["event"] for ping in pings if "usage_complete" in ping] == []
    if name in ("plain", "tools", "parallel"):
        assert charged(seen, name, "Stop") == given
