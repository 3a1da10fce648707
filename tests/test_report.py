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
    only_enqueue,
    place,
    run_sender,
    script_command,
)

pty = pytest.importorskip("pty", reason="terminals of POSIX")

if TYPE_CHECKING:
    import pathlib

SUMS = [
    "tool_calls",
    "tool_failures",
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cache_creation_input_tokens",
    "reasoning_tokens",
    "total_tokens",
    "cost_usd",
]


def ping(n: int, **more: Any) -> dict[str, Any]:
    """The n-th ping of a year of work."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(1767268800 + n * 3600))
    return {
        "event_id": f"{n:032x}",
        "event": "Stop",
        "timestamp": at,
        "status": "failed" if n % 10 == 0 else "success",
        "session_id": f"session-{n // 5}",
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
    home: Home, pings: list[dict[str, Any]], kind: str = "telemhq"
) -> pathlib.Path:
    """A destination's sent.jsonl with these pings; gives its path."""
    path = home.state / (kind + "-0123456789ab") / "sent.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    at = "2026-01-01T00:00:00.000Z"
    with open(str(path), "a") as file:
        for one in pings:
            line = {"at": at, "answer": "HTTP 200", "ping": one}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
    return path


def printed(ended: Ended) -> list[Any]:
    """The pings that `sent` printed."""
    return [json.loads(line.split(" ", 3)[3]) for line in ended.out.splitlines()]


def rows(home: Home, *options: str, **env: Any) -> Any:
    """What `report --json` prints."""
    ended = run(home, "report", "--json", *options, **env)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


# -- What the sender keeps -------------------------------------------------------


def test_what_was_delivered_is_kept_as_sent(home: Home, receiver: Receiver) -> None:
    """The sender keeps each ping that was delivered, byte for byte as it was sent, with
    the time and the answer, in a file that is its user's alone."""
    receiver.answer = 201
    place(home, receiver.url, 3)
    run_sender(home, receiver.url)
    path = home.destination() / "sent.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["ping"] for line in lines] == receiver.pings
    assert [line["answer"] for line in lines] == ["HTTP 201"] * 3
    assert all(abs(time.time() - seconds(line["at"])) < 60 for line in lines)
    printed = run(home, "sent").out.splitlines()
    bodies = [line.split(" ", 3)[3] for line in printed]
    assert [body.encode() for body in bodies] == [r.body for r in receiver.requests]


def seconds(text: str) -> float:
    """ISO 8601 to seconds since 1970."""
    import calendar

    return calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))


def test_the_hook_keeps_nothing(home: Home) -> None:
    """What was not delivered is not in sent.jsonl; the hook never writes there."""
    url = dead_url()
    only_enqueue(home, url)
    run_sender(home, url)
    assert not (home.destination() / "sent.jsonl").exists()


def test_it_is_kept_before_the_pings_file_goes(home: Home, receiver: Receiver) -> None:
    """A sender that dies between the two has kept the ping; it is sent again under its
    id, and counted once."""
    (event_id,) = place(home, receiver.url, 1)
    run_sender(
        home,
        receiver.url,
        patch="wrap(os, 'unlink', before=lambda path, **k: 'outbox' in path and die())",
    )
    assert len(home.waiting()) == 1
    path = home.destination() / "sent.jsonl"
    assert event_id in path.read_text("utf-8")
    run_sender(home, receiver.url)
    assert path.read_text("utf-8").count(event_id) == 2
    assert len(receiver.requests) == 2
    assert len(run(home, "sent").out.splitlines()) == 1
    assert rows(home)[0]["turns"] == 1


def test_sent_is_bounded(home: Home, receiver: Receiver) -> None:
    """A full file makes way for a new one; both are read."""
    place(home, receiver.url, 30)
    small = "sys.path.insert(0, directory); import telemhq_ping as t"
    run_sender(home, receiver.url, patch=f"{small}; t.SENT_MAX_BYTES = 10000")
    names = sorted(path.name for path in home.destination().glob("sent.jsonl*"))
    assert names == ["sent.jsonl", "sent.jsonl.1"]
    for name in names:
        assert (home.destination() / name).stat().st_size < 12000
    ids = [one["event_id"] for one in printed(run(home, "sent", "-n", "9"))]
    assert ids == [ping["event_id"] for ping in receiver.pings[-9:]]


def test_a_full_disk_stops_no_delivery(home: Home, receiver: Receiver) -> None:
    """Where sent.jsonl cannot be written, pings are delivered all the same; a line that
    was cut off is none."""
    place(home, receiver.url, 2)
    path = home.destination() / "sent.jsonl"
    path.mkdir()
    run_sender(home, receiver.url)
    assert len(receiver.requests) == 2
    assert home.waiting() == []
    path.rmdir()
    path.write_text('{"at": "2026-01-01T00:00:00.000Z", "answer": "HTTP 200", "pi')
    assert run(home, "sent").out == ""


# -- sent ------------------------------------------------------------------------


def test_sent_prints_the_last_ones(home: Home) -> None:
    """`sent` prints the last twenty, `sent -n 3` the last three, the oldest first, each
    with its time and its answer."""
    kept(home, [ping(n) for n in range(30)])
    assert len(run(home, "sent").out.splitlines()) == 20
    lines = run(home, "sent", "-n", "3").out.splitlines()
    assert all(line.startswith("2026-01-01T00:00:00.000Z HTTP 200 {") for line in lines)
    found = [json.loads(line.split(" ", 3)[3])["event_id"] for line in lines]
    assert found == [f"{n:032x}" for n in (27, 28, 29)]


def test_sent_with_nothing_to_show(home: Home) -> None:
    """Where nothing was delivered, `sent` says so, and changes nothing."""
    ended = run(home, "sent")
    assert (ended.code, ended.out) == (0, "")
    assert "Nothing was delivered yet" in ended.err
    assert sorted(os.listdir(str(home.path))) == ["acme"]


@pytest.mark.parametrize("arguments", [["sent", "-n", "0"], ["report", "--days", "-1"]])
def test_numbers_must_make_sense(home: Home, arguments: list[str]) -> None:
    """No line, and a negative number of days, are bad usage."""
    assert run(home, *arguments).code == 2


# -- report ----------------------------------------------------------------------


def test_the_sums_are_the_trackers(home: Home, receiver: Receiver) -> None:
    """The sums equal what the tracker received, to the token, under the pings' own
    names; there is no row of totals."""
    made = [ping(n, cost_usd=0.1 * n) for n in range(12)]
    for n, one in enumerate(made):
        path = only_enqueue(home, receiver.url)
        record = {"ping": dict(one, event_id=f"{n:032x}"), "local": {}}
        path.write_text(json.dumps(record))
    run_sender(home, receiver.url)
    assert len(receiver.pings) == 12
    for by in ("day", "project", "model", "session"):
        found = rows(home, "--by", by)
        assert len({row[by] for row in found}) == len(found)
        for name in SUMS:
            expected = sum(one.get(name, 0) for one in receiver.pings)
            total = sum(row[name] for row in found)
            assert round(total - expected, 6) == 0
        assert sum(row["turns"] for row in found) == 12
        assert sum(row["failed"] for row in found) == 2


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
    models = rows(home, "--by", "model")
    assert [(row["model"], row["turns"]) for row in models] == [
        ("claude-haiku-5", 24),
        ("claude-opus-5-5", 24),
    ]


def test_several_models_in_one_ping(home: Home) -> None:
    """The tokens of a ping with several models go to each; the turn to the main one."""
    models = {
        "claude-opus-5-5": {"input_tokens": 10, "output_tokens": 20},
        "claude-haiku-5": {"input_tokens": 1, "cached_input_tokens": 2},
    }
    one = ping(1, models=models, model="claude-opus-5-5", total_tokens=33)
    kept(home, [one])
    haiku, opus = rows(home, "--by", "model")
    assert (haiku["turns"], haiku["total_tokens"]) == (0, 3)
    assert (opus["turns"], opus["total_tokens"], opus["output_tokens"]) == (1, 30, 20)


@pytest.mark.parametrize("by", ["day", "project", "model", "session"])
def test_what_was_tampered_with_counts_as_far_as_it_can(home: Home, by: str) -> None:
    """A file that somebody has edited breaks no report."""
    odd: list[dict[str, Any]] = [
        {
            "models": {
                "opus": 5,
                "haiku": {"input_tokens": "many", "output_tokens": [1]},
            }
        },
        {"models": [], "model": {}, "timestamp": 7, "cost_usd": "much"},
        {"models": {"opus": {"input_tokens": None}}, "project": [1], "session_id": {}},
        {"event": [], "status": {}, "total_tokens": {}, "timestamp": "yesterday"},
    ]
    kept(home, [ping(0), *({**ping(n), **more} for n, more in enumerate(odd, 1))])
    told = sum(row["total_tokens"] for row in rows(home, "--by", by))
    assert told >= ping(0)["total_tokens"]


def test_report_of_the_last_days(home: Home) -> None:
    """--days N counts today as the first."""
    now = time.time()
    stamps = [
        time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(now - days * 86400))
        for days in range(5)
    ]
    kept(home, [ping(n, timestamp=stamp) for n, stamp in enumerate(stamps)])
    assert len(rows(home)) == 5
    assert len(rows(home, "--days", "3")) == 3
    assert len(rows(home, "--days", "1")) == 1


def test_a_test_is_no_turn(home: Home) -> None:
    """Only Stop and StopFailure are turns."""
    names = ["Stop", "StopFailure", "SessionEnd", "Test", "PostToolUse"]
    kept(home, [ping(n, event=name) for n, name in enumerate(names)])
    assert rows(home)[0]["turns"] == 2


def test_other_destinations(home: Home) -> None:
    """TelemHQ's are reported, all URLs together; others by --destination, by kind or by
    directory; one that is not there is named, with those that are."""
    kept(home, [ping(1)])
    other = kept(home, [ping(2)], "otlp")
    second = home.state / "telemhq-ba9876543210"
    second.mkdir()
    line = {"at": "", "answer": "", "ping": ping(3)}
    (second / "sent.jsonl").write_text(json.dumps(line) + "\n")
    assert rows(home)[0]["turns"] == 2
    assert rows(home, "--destination", "otlp")[0]["output_tokens"] == 952
    assert rows(home, "--destination", other.parent.name)[0]["turns"] == 1
    ended = run(home, "report", "--destination", "nowhere")
    assert ended.code == 1
    assert "there is no destination nowhere" in ended.err
    assert other.parent.name in ended.err


def test_waiting_and_lost_are_apart(home: Home) -> None:
    """What waits and what was lost is not in the sums, and told below them."""
    url = dead_url()
    place(home, url, 3)
    home.set_state(losses={"refused: HTTP 422": 2, "tokens": 99})
    kept(home, [ping(1)])
    out = run(home, "report").out
    assert "Not in it: 3 pings still to be delivered." in out
    assert "Not in it: lost: 2, refused: HTTP 422." in out
    assert "Not in it: lost: 99, tokens." in out


def test_a_report_of_nothing(home: Home) -> None:
    """Where nothing was delivered, the report says so; as JSON it is empty."""
    assert run(home, "report").out == "Nothing was delivered in that time.\n"
    assert rows(home) == []


def on_a_wide_terminal(home: Home, columns: int, *arguments: str) -> list[str]:
    """The lines of a command's output at a terminal of so many columns."""
    main, other = pty.openpty()
    done = subprocess.run(
        script_command(*arguments),
        env=home.env(COLUMNS=str(columns), TZ="UTC"),
        stdin=other,
        capture_output=True,
    )
    os.close(main)
    os.close(other)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode("utf-8").splitlines()


@pytest.mark.parametrize("columns", [60, 80, 100, 140, 200])
@pytest.mark.parametrize("by", ["day", "project", "session"])
def test_the_table_fits_the_terminal(home: Home, columns: int, by: str) -> None:
    """The table is as wide as the terminal: numbers are exact where there is room, and
    shortened, or left out, where there is none; each row has its bar."""
    kept(home, [ping(n) for n in range(48)])
    lines = on_a_wide_terminal(home, columns, "report", "--by", by)
    assert max(len(line) for line in lines) == columns
    assert "tokens" in lines[0]
    assert "cost $" in lines[0]
    assert all("█" in line for line in lines[1:-1])
    assert lines[-1].startswith("in all")
    total = sum(44462 + n for n in range(48))
    if columns == 200:
        assert f"{total:,}" in lines[-1]
        assert "cached" in lines[0]
    if columns == 60:
        assert "2.1M" in lines[-1]


def test_a_report_in_plain_ascii(home: Home) -> None:
    """Where the encoding knows no block, bars are made of #."""
    kept(home, [ping(1)])
    out = run(home, "report", PYTHONIOENCODING="ascii").out
    assert "#" in out
    assert "?" not in out


def test_report_writes_nothing(home: Home) -> None:
    """report and sent only read."""
    kept(home, [ping(1)])
    before = tree(home.path)
    run(home, "report")
    run(home, "sent")
    assert tree(home.path) == before


def test_ten_thousand_pings_take_half_a_second(home: Home) -> None:
    """10,000 pings are added up in less than half a second of CPU."""
    kept(home, [ping(n) for n in range(10000)])
    code = (
        "import sys, time, telemhq_ping as t; sys.argv[1:] = []\n"
        "begun = time.process_time()\n"
        "t.main(['report'])\n"
        "print('took', time.process_time() - begun)"
    )
    best = 9.0
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=home.env(PYTHONPATH=str(SCRIPT.parent), PYTHONDONTWRITEBYTECODE="1"),
            capture_output=True,
            check=True,
        )
        best = min(best, float(done.stdout.split()[-1]))
    assert best < (0.5 if sys.implementation.name == "cpython" else 1)


def test_a_head_that_has_seen_enough(home: Home) -> None:
    """`sent | head -1` ends without a traceback."""
    kept(home, [ping(n) for n in range(5000)])
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} {SCRIPT} sent -n 5000 | head -1"],
        env=home.env(),
        capture_output=True,
    )
    assert done.stderr == b""
    assert len(done.stdout.splitlines()) == 1
