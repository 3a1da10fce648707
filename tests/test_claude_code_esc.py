"""A first turn that a person breaks off is told with the next event, to the token.

Neither Esc nor a denied permission fires a hook, and only the interactive client knows
them: it is driven through tmux.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

import claude_code
from claude_code import (
    SHOWN_S,
    Seen,
    Terminal,
    World,
    billed,
    charged,
    dripping,
    ledger,
    pings_of,
    text,
    tool,
)
from support import wait_until

SCRIPT: dict[str, list[Any]] = {
    "TALK": [
        [text("CANARY_SAY"), tool("Bash", command="echo CANARY_OUT")],
        [dripping("CANARY_DRIP")],
    ],
    "MAKE": [[text("CANARY_SAY"), tool("Bash", command="touch CANARY_FILE")]],
    "PLAIN": [[text("CANARY_PLAIN")]],
}
BROKEN_OFF = {  # a prompt, and what the screen shows when Esc is pressed
    "streaming": ("TALK", "CANARY_DRIP"),
    "permission": ("MAKE", "Do you want to proceed?"),
}


def play_all(world: World) -> dict[str, Any]:
    """A session of each kind, one after the other; the client's ledgers, by name."""
    world.install(json.loads(claude_code.EXAMPLE.read_text("utf-8")))
    world.messages.script = SCRIPT
    return {name: play(world, *how) for name, how in BROKEN_OFF.items()}


def play(world: World, prompt: str, shown: str) -> dict[str, Any]:
    """Esc in the first turn, a second one that ends by itself, /exit."""
    arrived = len(world.receiver.requests)
    terminal = Terminal(world, "--permission-mode", "manual")
    terminal.say(prompt)
    terminal.wait_for(shown)
    terminal.press("Escape")
    terminal.wait_for("Interrupted")
    terminal.say("PLAIN")
    terminal.wait_for("CANARY_PLAIN")
    wait_until(lambda: len(world.receiver.requests) > arrived, SHOWN_S)
    terminal.leave()
    world.settle()
    session_id = world.messages.bill[-1]["session_id"]
    lines = world.transcript(session_id).read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    last = [row for row in rows if row.get("type") == "cost-state"][-1]
    return {
        "session_id": session_id,
        "modelUsage": last["modelUsage"],
        "total_cost_usd": last["totalCostUSD"],
        "interrupts": len([row for row in rows if "interruptedMessageId" in row]),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What became of both sessions; `told` has the client's ledgers, by name."""
    if not shutil.which("tmux"):
        pytest.skip("no tmux, which drives the interactive client")
    return claude_code.run(play_all, tmp_path_factory.mktemp("esc"))


each = pytest.mark.parametrize("name", BROKEN_OFF)


@each
def test_no_event_tells_of_it(seen: Seen, name: str) -> None:
    """The turn that was broken off makes no ping of its own."""
    found = [(ping["event"], ping["status"]) for ping in pings_of(seen, name)]
    assert found == [("Stop", "success"), ("SessionEnd", "success")]


@each
def test_tokens_are_those_of_the_clients_ledger(seen: Seen, name: str) -> None:
    """Both turns' tokens are told, each once."""
    assert charged(seen, name) == ledger(seen, name)


@each
def test_tokens_are_those_of_the_api(seen: Seen, name: str) -> None:
    """What the API gave out is told; of a message that was broken off, it has not said
    how much of an output it was: the client's ledger has an estimate."""
    found, given = charged(seen, name), billed(seen, name)
    if name == "streaming":
        assert found.pop("output_tokens") > given.pop("output_tokens")
    assert found == given


@each
def test_the_next_stop_has_it(seen: Seen, name: str) -> None:
    """The second turn's Stop has the first one's counts too: nothing waits longer."""
    given = billed(seen, name)
    assert charged(seen, name, "Stop") == given
    stop = pings_of(seen, name)[0]
    assert stop["tools"] == {"Bash": 1}


@each
def test_cost_is_that_of_the_clients_ledger(seen: Seen, name: str) -> None:
    """The session is whole, so that its cost is told, and told in full."""
    cost = sum(ping.get("cost_usd", 0) for ping in pings_of(seen, name))
    assert cost == pytest.approx(seen.told[name]["total_cost_usd"], abs=1e-9)
    assert cost > 0


@each
def test_the_interrupt_is_counted(seen: Seen, name: str) -> None:
    """`interrupts` is on the next ping, once."""
    assert [ping.get("interrupts") for ping in pings_of(seen, name)] == [1, None]


@each
def test_the_counts_are_complete(seen: Seen, name: str) -> None:
    """No ping says that something is missing."""
    assert not any("usage_complete" in ping for ping in pings_of(seen, name))


def test_nothing_that_was_said_leaves(seen: Seen) -> None:
    """No prompt, answer or command in a ping or on disk; and no hook was noticed."""
    assert "CANARY" not in json.dumps(seen.requests)
    assert [path for path, held in seen.state().items() if "CANARY" in held] == []
    assert seen.noticed() == []
