"""See what left: sent.jsonl, `sent` and `report`."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from person import run, write_settings
from support import SCRIPT, Home, Receiver, place

if TYPE_CHECKING:
    import pathlib

SUMS = {  # a heading of the table: the field of a ping
    "tools": "tool_calls",
    "failed-tools": "tool_failures",
    "input": "input_tokens",
    "output": "output_tokens",
    "cached": "cached_input_tokens",
    "written": "cache_creation_input_tokens",
    "thinking": "reasoning_tokens",
    "tokens": "total_tokens",
}


def ping(n: int, **more: Any) -> dict[str, Any]:
    """The n-th ping of a year of work."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(1767268800 + n * 3600))
    return {
        "event_id": f"{n:032x}",
        "event": "Stop" if n % 10 else "StopFailure",
        "timestamp": at,
        "status": "success" if n % 10 else "failed",
        "session_id": f"{n // 5:08x}-0000-4000-8000-000000000000",
        "project": ("acme", "beta", "a-project-with-quite-a-long-name-indeed")[n % 3],
        "model": ("claude-opus-5-5", "claude-haiku-5")[n % 2],
        "tool_calls": 2,
        "tool_failures": n % 2,
        "input_tokens": 12,
        "output_tokens": 950 + n,
        "cached_input_tokens": 41200,
        "cache_creation_input_tokens": 2300,
        "reasoning_tokens": 5,
        "total_tokens": 44462 + n,
        **more,
    }


def kept(
    home: Home, pings: list[dict[str, Any]], name: str = "telemhq-0123456789ab"
) -> pathlib.Path:
    """A destination's sent.jsonl with these pings; gives its path."""
    path = home.state / name / "sent.jsonl"
    (path.parent / "outbox").mkdir(parents=True, exist_ok=True)
    lines = [{"at": "2026-01-01", "answer": "HTTP 200", "ping": one} for one in pings]
    with open(str(path), "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def rows(home: Home, *options: str, **env: Any) -> dict[str, dict[str, str]]:
    """What `report` prints on a wide terminal: row -> heading -> what stands there."""
    ended = run(home, "report", *options, COLUMNS=140, **{"TZ": "UTC", **env})
    assert ended.code == 0, ended.err
    head, *lines = ended.out.splitlines()
    headings = head.replace("cost $", "cost").split()[1:]
    if "tools" in headings:
        headings[headings.index("tools") + 1] = "failed-tools"
    found = {}
    for line in lines:
        name, *cells = line.rsplit(None, len(headings))
        found[name] = dict(zip(headings, cells))
    return found


def number(text: str) -> float:
    """A number in the table."""
    return float(text.replace(",", ""))


# -- What the sender keeps, and `sent` ---------------------------------------------


def flush(home: Home, url: str, patch: str = "") -> None:
    """Deliver what waits, in a process where `patch` (Python) has been run."""
    code = f"import sys, telemhq_ping as t; {patch}\nsys.exit(t.main(['flush']))"
    env = home.env(url, PYTHONPATH=str(SCRIPT.parent))
    subprocess.check_output([sys.executable, "-c", code], env=env)


def test_what_was_delivered_is_kept_as_sent(home: Home, receiver: Receiver) -> None:
    """Each ping that was delivered is kept, byte for byte as it was sent, with the time
    and the answer, in a file that is its user's alone; `sent` prints it."""
    receiver.answer = 201
    place(home, receiver.url, 3)
    flush(home, receiver.url)
    path = home.destination() / "sent.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    bodies = []
    for line in run(home, "sent").out.splitlines():
        at, *words, body = line.split(" ", 4)
        assert time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 60)) <= at
        assert words == ["telemhq", "HTTP", "201"]
        bodies.append(body.encode())
    assert bodies == [request.body for request in receiver.requests]


def test_sent_prints_the_last_ones_of_each(home: Home) -> None:
    """`sent` prints the last twenty of each destination; --destination chooses one.
    Another tracker's bodies are shown as sent."""
    kept(home, [ping(n) for n in range(30)])
    path = kept(home, [], "otlp-0123456789ab")
    line = {"at": "2026-01-01", "answer": "HTTP 200", "ping": ping(1)}
    path.write_text(json.dumps({**line, "bodies": ["{}", "[]"]}) + "\n")
    assert len(run(home, "sent").out.splitlines()) == 22
    out = run(home, "sent", "--destination", "telemhq").out
    assert re.findall('"event_id":"0*(..?)"', out)[-3:] == ["1b", "1c", "1d"]
    assert run(home, "sent", "--destination", path.parent.name).out.splitlines() == [
        f"2026-01-01 otlp HTTP 200 {body}" for body in ("{}", "[]")
    ]


@pytest.mark.parametrize("command", ["sent", "report"])
def test_without_pings_it_says_what_to_do(home: Home, command: str) -> None:
    """Where nothing was delivered, that is said, and what to do; nothing is written."""
    ended = run(home, command)
    assert ended.code == 1
    assert "nothing was delivered yet: `doctor` says why, `flush` sends" in ended.err
    assert sorted(os.listdir(str(home.path))) == ["acme"]


def test_the_state_may_be_where_settings_say(home: Home) -> None:
    """sent, report and uninstall take TELEMHQ_STATE_DIR from a settings file, too."""
    kept(home, [ping(1)])
    elsewhere = home.state.rename(home.path / "elsewhere")
    write_settings(home, {"env": {"TELEMHQ_STATE_DIR": str(elsewhere)}})
    for command in (["sent"], ["report"], ["uninstall", "--yes"]):
        assert run(home, *command).code == 0
    assert not elsewhere.exists()


# -- report: the sums --------------------------------------------------------------


@pytest.mark.parametrize("by", ["day", "project", "model", "session"])
def test_the_sums_are_the_trackers(home: Home, receiver: Receiver, by: str) -> None:
    """The sums equal what the tracker received, to the token; the last row has those of
    all the others. A model has no turns and no tools, so it has no columns for them."""
    place(home, receiver.url, 12)
    for n, path in enumerate(home.waiting()):
        record = {"ping": ping(n, cost_usd=0.25 * n), "local": {}}
        path.write_text(json.dumps(record))
    flush(home, receiver.url)
    assert len(receiver.pings) == 12
    found = rows(home, "--by", by)
    total = found.pop("in all")
    expected = {"turns": 12.0, "failed": 2.0, "cost": 16.5}
    for heading, field in SUMS.items():
        expected[heading] = sum(one.get(field, 0) for one in receiver.pings)
    if by == "model":
        for heading in ("turns", "failed", "tools", "failed-tools"):
            del expected[heading]
    for heading, value in expected.items():
        assert number(total[heading]) == value
        assert sum(number(row[heading]) for row in found.values()) == value
    assert ("turns" in total) == (by != "model")


def test_failed_turns_and_failed_tools_are_apart(home: Home) -> None:
    """Failed turns stand beside turns, failed tools beside tools. Only Stop and
    StopFailure are turns: a failed tool's own ping is none, nor is a test."""
    names = ["Stop", "StopFailure", "SessionEnd", "PostToolUseFailure", "Test"]
    pings = [ping(n, event=name) for n, name in enumerate(names)]
    for one in pings:
        one["status"] = "failed" if "Failure" in one["event"] else "success"
        one.update(tool_calls=3, tool_failures=1)
    kept(home, pings)
    assert list(rows(home)["in all"].values())[:4] == ["2", "1", "15", "5"]


MODELS = {
    "claude-opus-5-5": {"output_tokens": 30, "total_tokens": 30, "cost_usd": 0.5},
    "claude-haiku-5": {"cost_usd": 0.25},  # a title, which is in no transcript
}


def test_a_models_cost_is_the_ledgers(home: Home) -> None:
    """By model the ledger's cost of each is shown, also of one without new tokens, and
    of the session's one model."""
    one = ping(1, event="SessionEnd", models=MODELS, total_tokens=30, cost_usd=0.75)
    alone = ping(2, event="SessionEnd", model="claude-opus-5-5", cost_usd=1)
    kept(home, [one, alone])
    found = rows(home, "--by", "model").values()
    assert [row["cost"] for row in found] == ["0.25", "1.50", "1.75"]
    assert [row["tokens"] for row in found] == ["0", "44,494", "44,494"]


@pytest.mark.parametrize("by", ["day", "project", "model", "session"])
def test_a_cost_that_is_not_known_yet_is_a_dash(home: Home, by: str) -> None:
    """A session that is open has told no cost: a dash; not 0.00, which is what a
    session may have cost."""
    kept(home, [ping(1), ping(6, project="free", model="free", cost_usd=0)])
    assert run(home, "report", "--by", by).out.startswith(by + " ")  # a short name's
    costs = [row["cost"] for row in list(rows(home, "--by", by).values())[:-1]]
    assert sorted(costs) == (["0.00"] if by == "day" else ["0.00", "\u2013"])


@pytest.mark.parametrize("by", ["day", "project", "model", "session"])
def test_what_was_tampered_with_counts_as_far_as_it_can(home: Home, by: str) -> None:
    """A file that somebody has edited breaks no report, nor a line that a full disk cut
    off. A ping that stands there twice, as after a crash, is counted once."""
    odd: list[dict[str, Any]] = [
        {"models": {"opus": 5, "haiku": {"input_tokens": "many"}}},
        {"models": [], "model": {}, "timestamp": 7, "cost_usd": "much"},
        {"models": {"opus": {"input_tokens": None}}, "project": [1], "session_id": {}},
        {"event": [], "status": {}, "total_tokens": {}, "timestamp": "yesterday"},
    ]
    kept(home, [{**ping(n), **more} for n, more in enumerate(odd, 1)])
    before = number(rows(home, "--by", by)["in all"]["tokens"])
    with open(str(kept(home, [ping(9), ping(9)])), "a") as file:
        file.write('{"at": "2026-01-01T00:00:00.000Z", "answer": "HTTP 200", "pi')
    after = number(rows(home, "--by", by)["in all"]["tokens"])
    assert after - before == ping(9)["total_tokens"]


def test_each_destination_is_apart(home: Home) -> None:
    """Two trackers were told the same: their sums are never added up. Each has a table
    under its directory's name, or one is chosen, by kind or name."""
    first, other = kept(home, [ping(1)]), kept(home, [ping(1)], "otlp-0123456789ab")
    names = [path.parent.name for path in (other, first)]
    lines = run(home, "report").out.splitlines()
    assert [line for line in lines if line.endswith(":")] == [f"{n}:" for n in names]
    for name in ("otlp", names[0]):
        assert rows(home, "--destination", name)["in all"]["turns"] == "1"
    said = run(home, "report", "--destination", "nobody").err
    assert "nothing was delivered to nobody yet: `doctor` says why" in said


# -- report: the table -------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 140])
@pytest.mark.parametrize("by", ["day", "project", "session"])
def test_the_table_fits_the_terminal(home: Home, columns: int, by: str) -> None:
    """No line is wider than the terminal; numbers are exact. Session ids are whole
    where there is room, at 80 columns too: the kinds of tokens are left out before."""
    kept(home, [ping(n) for n in range(48)])
    out = run(home, "report", "--by", by, COLUMNS=columns).out
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert f"{sum(44462 + n for n in range(48)):,}" in lines[-1]
    assert lines[-1].startswith("in all")
    assert ("cached" in lines[0]) == (columns == 140)
    if by == "session":
        assert (ping(0)["session_id"] in out) == (columns >= 80)
