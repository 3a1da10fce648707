"""See what left: sent.jsonl, `sent` and `report`."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from person import Ended, run, tree
from support import (
    SCRIPT,
    Home,
    Receiver,
    dead_url,
    place,
)

if TYPE_CHECKING:
    import pathlib

SUMS = [
    *("tool_calls", "tool_failures", "input_tokens", "output_tokens"),
    *("cached_input_tokens", "cache_creation_input_tokens", "reasoning_tokens"),
    *("total_tokens", "cost_usd"),
]


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


def printed(ended: Ended) -> list[Any]:
    """The pings that `sent` printed."""
    return [json.loads(line.split(" ", 4)[4]) for line in ended.out.splitlines()]


def rows(home: Home, *options: str, **env: Any) -> Any:
    """What `report --json` prints."""
    ended = run(home, "report", "--json", *options, **env)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def table(home: Home, *options: str, columns: int = 100) -> list[list[str]]:
    """The words of each line that `report` prints."""
    ended = run(home, "report", *options, COLUMNS=columns, TZ="UTC")
    assert ended.code == 0, ended.err
    return [line.split() for line in ended.out.splitlines()]


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


def test_sent_is_bounded(home: Home, receiver: Receiver) -> None:
    """A full file makes way for a new one; both are read, the oldest first."""
    place(home, receiver.url, 30)
    flush(home, receiver.url, "t.SENT_MAX_BYTES = 10000")
    for name in ("sent.jsonl", "sent.jsonl.1"):
        assert (home.destination() / name).stat().st_size < 12000
    ids = [one["event_id"] for one in printed(run(home, "sent", "-n", "9"))]
    assert ids == [ping["event_id"] for ping in receiver.pings[-9:]]


def test_sent_prints_the_last_ones_of_each(home: Home) -> None:
    """`sent` prints the last twenty of each destination, `-n 3` the last three;
    --destination chooses one. Another tracker's bodies are shown as sent."""
    kept(home, [ping(n) for n in range(30)])
    path = kept(home, [], "otlp-0123456789ab")
    line = {"at": "2026-01-01", "answer": "HTTP 200", "ping": ping(1)}
    path.write_text(json.dumps({**line, "bodies": ["{}", "[]"]}) + "\n")
    assert len(run(home, "sent").out.splitlines()) == 22
    ended = run(home, "sent", "-n", "3", "--destination", "telemhq")
    assert [one["event_id"] for one in printed(ended)] == [
        f"{n:032x}" for n in (27, 28, 29)
    ]
    assert run(home, "sent", "--destination", path.parent.name).out.splitlines() == [
        f"2026-01-01 otlp HTTP 200 {body}" for body in ("{}", "[]")
    ]


@pytest.mark.parametrize("command", ["sent", "report"])
def test_without_pings_it_says_what_to_do(home: Home, command: str) -> None:
    """Where nothing was delivered, that is said, and what to do; nothing is written. A
    destination that is none is named, with those that there are."""
    ended = run(home, command)
    assert ended.code == 0
    said = "Nothing was delivered yet: `doctor` says why, `flush` sends what waits."
    assert said in ended.out + ended.err
    assert sorted(os.listdir(str(home.path))) == ["acme"]
    assert rows(home) == []
    path = kept(home, [ping(1)])
    before = tree(home.path)
    ended = run(home, command, "--destination", "nowhere")
    assert ended.code == 1
    assert f"no destination nowhere; there are: {path.parent.name}" in ended.err
    assert run(home, command).code == 0
    assert tree(home.path) == before


# -- report: the sums --------------------------------------------------------------


def test_the_sums_are_the_trackers(home: Home, receiver: Receiver) -> None:
    """The sums equal what the tracker received, to the token, under the pings' own
    names; there is no row of totals."""
    place(home, receiver.url, 12)
    for n, path in enumerate(home.waiting()):
        record = {"ping": ping(n, cost_usd=0.1 * n), "local": {}}
        path.write_text(json.dumps(record))
    flush(home, receiver.url)
    assert len(receiver.pings) == 12
    for by in ("day", "project", "model", "session"):
        found = rows(home, "--by", by)
        assert len({row[by] for row in found}) == len(found)
        for name in SUMS if by != "model" else SUMS[2:]:
            expected = sum(one.get(name, 0) for one in receiver.pings)
            total = sum(row[name] for row in found)
            assert round(total - expected, 6) == 0
        if by != "model":
            assert sum(row["turns"] for row in found) == 12
            assert sum(row["failed_turns"] for row in found) == 2


def test_report_groups(home: Home) -> None:
    """--by day (here, not in UTC), project, model or session, in order."""
    kept(home, [ping(n) for n in range(48)])
    days = [row["day"] for row in rows(home, TZ="UTC")]
    assert days == ["2026-01-01", "2026-01-02", "2026-01-03"]
    east = rows(home, TZ="EAST-11:59")
    assert [row["turns"] for row in east] == [1, 24, 23]
    projects = [row["project"] for row in rows(home, "--by", "project")]
    assert projects == ["a-project-with-quite-a-long-name-indeed", "acme", "beta"]
    assert len(rows(home, "--by", "session")) == 10
    models = [row["model"] for row in rows(home, "--by", "model")]
    assert models == ["claude-haiku-5", "claude-opus-5-5"]


def test_failed_turns_and_failed_tools_are_apart(home: Home) -> None:
    """Failed turns stand beside turns, failed tools beside tools. Only Stop and
    StopFailure are turns: a failed tool's own ping is none, nor is a test."""
    names = ["Stop", "StopFailure", "SessionEnd", "PostToolUseFailure", "Test"]
    calls = {"tool_calls": 3, "tool_failures": 1}
    none = dict.fromkeys(SUMS[2:8], 0)
    pings = [ping(n, **{**none, **calls}, event=name) for n, name in enumerate(names)]
    for one in pings:
        one["status"] = "failed" if "Failure" in one["event"] else "success"
    kept(home, pings)
    head, day, total = table(home)
    assert head[1:5] == ["turns", "failed", "tools", "failed"]
    assert day[1:5] == total[2:6] == ["2", "1", "15", "5"]


MODELS = {
    "claude-opus-5-5": {"input_tokens": 10, "output_tokens": 20, "cost_usd": 0.5},
    "claude-haiku-5": {"cost_usd": 0.25},  # a title, which is in no transcript
}


def test_a_models_cost_is_the_ledgers(home: Home) -> None:
    """By model the ledger's cost of each is shown, also of one without new tokens, and
    of the session's one model; and no columns that a model does not have."""
    one = ping(1, event="SessionEnd", models=MODELS, total_tokens=30, cost_usd=0.75)
    alone = ping(2, event="SessionEnd", model="claude-opus-5-5", cost_usd=1)
    kept(home, [one, alone])
    haiku, opus = rows(home, "--by", "model")
    assert (haiku["model"], haiku["cost_usd"], haiku["total_tokens"]) == (
        *("claude-haiku-5", 0.25),
        0,
    )
    assert (opus["cost_usd"], opus["total_tokens"]) == (1.5, 30 + 44464)
    (head, *_, total) = table(home, "--by", "model")
    assert not {"turns", "failed", "tools"} & set(head)
    assert total[-1] == "1.75"


@pytest.mark.parametrize("by", ["day", "project", "model", "session"])
def test_a_cost_that_is_not_known_yet_is_a_dash(home: Home, by: str) -> None:
    """A session that is open has told no cost: a dash, null in JSON; not 0.00, which is
    what a session may have cost."""
    kept(home, [ping(1), ping(6, project="free", model="free", cost_usd=0)])
    assert {row["cost_usd"] for row in rows(home, "--by", by)} <= {None, 0}
    costs = [line[-1] for line in table(home, "--by", by)[1:-1]]
    assert sorted(costs) == (["0.00"] if by == "day" else ["0.00", "\u2013"])
    kept(home, [ping(1)], "telemhq-ba9876543210")
    out = run(home, "report", PYTHONIOENCODING="ascii").out
    assert " -\n" in out
    assert "?" not in out


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
    before = sum(row["total_tokens"] for row in rows(home, "--by", by))
    with open(str(kept(home, [ping(9), ping(9)])), "a") as file:
        file.write('{"at": "2026-01-01T00:00:00.000Z", "answer": "HTTP 200", "pi')
    after = sum(row["total_tokens"] for row in rows(home, "--by", by))
    assert after - before == ping(9)["total_tokens"]
    assert table(home, "--by", by)


def test_report_of_the_last_days(home: Home) -> None:
    """--days N counts today as the first; where those have nothing, that is said."""
    now = time.time()
    stamps = [
        time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(now - days * 86400))
        for days in range(1, 5)
    ]
    kept(home, [ping(n, timestamp=stamp) for n, stamp in enumerate(stamps)])
    assert len(rows(home)) == 4
    assert len(rows(home, "--days", "3")) == 2
    said = "No turn, tool or token was delivered then.\n"
    assert run(home, "report", "--days", "1").out == said


def test_each_destination_is_apart(home: Home) -> None:
    """Two trackers were told the same: their sums are never added up. Each has a table
    under its directory's name, or one is chosen, by kind or name."""
    first, other = kept(home, [ping(1)]), kept(home, [ping(1)], "otlp-0123456789ab")
    names = [path.parent.name for path in (other, first)]
    assert [row["destination"] for row in rows(home)] == names
    assert [row["turns"] for row in rows(home)] == [1, 1]
    lines = run(home, "report").out.splitlines()
    assert [line for line in lines if line.endswith(":")] == [f"{n}:" for n in names]
    for name in ("otlp", names[0]):
        assert [row["turns"] for row in rows(home, "--destination", name)] == [1]


def test_waiting_and_lost_are_told_apart(home: Home) -> None:
    """What waits and what was lost is not in the sums, and told below them."""
    place(home, dead_url(), 1)
    home.set_state(losses={"refused: HTTP 422": 2, "tokens": 99})
    out = run(home, "report").out
    assert "Not in it: 1 ping of api waits, the oldest for 0 s." in out
    assert "Not in it: 2 lost, refused: HTTP 422." in out
    assert "Not in it: 99 lost, tokens." in out


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


def test_ten_thousand_pings_take_half_a_second(home: Home) -> None:
    """10,000 pings are added up in less than half a second of CPU."""
    kept(home, [ping(n) for n in range(10000)])
    code = (
        "import sys, time, telemhq_ping as t; begun = time.process_time()\n"
        "t.main(['report'])\n"
        "print('took', time.process_time() - begun)"
    )
    env = home.env(PYTHONPATH=str(SCRIPT.parent), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-c", code]
    took = [subprocess.check_output(command, env=env).split()[-1] for _ in range(3)]
    limit = 0.5 if sys.implementation.name == "cpython" else 1
    assert min(map(float, took)) < limit
