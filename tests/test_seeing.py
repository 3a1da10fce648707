"""What a person sees and does by hand: demo, preview, sent, flush, a hook in debug
mode."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from person import (
    URL,
    Terminal,
    on_a_terminal,
    run,
    tree,
    write_settings,
)
from support import (
    SCRIPT,
    TOKEN,
    Home,
    Receiver,
    dead_url,
    event,
    place,
)

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")

# -- demo --------------------------------------------------------------------------


def test_demo_shows_what_leaves_and_what_stays(home: Home) -> None:
    """The demo shows the exact JSON that left for a failed tool; nothing that was said,
    done or where is in it. What was handed over is shown field by field; what did not
    leave is marked, and a sentence under it says what each mark means. The user's own
    variables shape it; nothing is left behind."""
    before = tree(home.path)
    ended = run(home, "demo", url=URL, TELEMHQ_PROJECT="x", TMPDIR=home.project)
    assert (ended.code, ended.err) == (0, "")
    assert tree(home.path) == before
    out = " ".join(ended.out.split())
    ping = json.loads(out.partition(" left ")[2].partition(" ~~: ")[0])
    told = [ping[name] for name in ("event", "status", "project")]
    assert told == ["PostToolUseFailure", "failed", "x"]
    for content in "hunter2", "deploy", "/home/you":
        assert content not in json.dumps(ping)
    for words in (
        'tool_input: ~~{"command": "./deploy --password hunter2"}~~ error:',
        'cwd: ~~"/home/you/acme"~~ # ',
        'deploy.key"~~ = ',
        'tool_name: "Bash" ',
        "~~: it stayed here; of # its hash has left, of = its length.",
    ):
        assert words in out
    assert out.endswith("To install it: python3 telemhq_ping.py install")


@pytest.mark.parametrize("columns, most", [(80, 40), (60, 60)])
def test_demo_fits_the_terminal(home: Home, columns: int, most: int) -> None:
    """It fits 80 columns by 40 lines; at 60 columns lines break between words only."""
    out = run(home, "demo", COLUMNS=columns).out
    lines = out.splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= columns
    assert {'"transcript_path_hash":', '"PostToolUseFailure",'} <= set(out.split())
    assert on_a_terminal(home, b"", "demo", COLUMNS="0")[0] == 0  # nobody sized it


def test_demo_tells_real_times(home: Home) -> None:
    """Its milliseconds are those that passed: a hook that takes half a second says
    so."""
    slow = home.path / "slow"
    slow.write_text(f'#!/bin/sh\nsleep 0.5\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    code = (
        f"import sys; sys.executable = {str(slow)!r}; sys.path.insert(0, sys.argv[1])\n"
        "import telemhq_ping as t; sys.exit(t.main(['demo']))"
    )
    out = subprocess.check_output(
        [sys.executable, "-c", code, str(SCRIPT.parent)], env=home.env()
    ).decode()
    there, hook = map(int, re.findall(r"(\d+) ms", out))
    assert 500 < hook <= there < 10000


# -- preview -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Stop", "PostToolUseFailure-Bash"])
def test_preview_prints_the_ping_that_the_hook_sends(
    home: Home, receiver: Receiver, name: str
) -> None:
    """preview prints what the hook sends for the same event, but for id and time; the
    settings' variables shape it as they do there."""
    env: dict[str, Any] = {"TELEMHQ_PROJECT": "set", "TELEMHQ_USAGE": "0"}
    write_settings(home, {"env": env})
    sent = json.dumps(event(name)).encode()
    ended = run(home, "preview", sent=sent, url=receiver.url)
    assert receiver.requests == []
    home.hook(sent, receiver.url, **env)
    shown, ping = json.loads(ended.out), receiver.wait_for(1)[0]
    for found in shown, ping:
        del found["event_id"], found["timestamp"]
    assert shown == ping
    assert ended.err.startswith(f"POST http://127.0.0.1:{receiver.port}/...\n")


@pytest.mark.parametrize("raw", ["", "{", '{"hook_event_name": "A b"}'])
def test_preview_says_plainly_when_that_is_no_event(home: Home, raw: str) -> None:
    """What is no event gets a sentence, and exit status 1; so does a closed stdin."""
    ended = run(home, "preview", sent=raw.encode())
    assert (ended.code, ended.out) == (1, "")
    assert ("stdin held no event" if raw[1:] else "stdin is not JSON") in ended.err
    done = subprocess.run(
        ["/bin/sh", "-c", f"'{sys.executable}' '{SCRIPT}' preview <&-"],
        env=home.env(),
        capture_output=True,
    )
    assert done.returncode == 1
    assert b"stdin is not JSON" in done.stderr


TRACKERS = ["telemhq", "wigtoken", "recorder", "otlp", "claude-metrics"]


@pytest.mark.parametrize("name", TRACKERS)
def test_preview_of_a_tracker_before_it_is_set_up(home: Home, name: str) -> None:
    """What a tracker would get is shown before its variables are set, with
    placeholders, which are said to be ones; in any event one of them gets something."""
    shown = []
    for kind in ("Stop", "SessionEnd"):
        ended = run(home, "preview", kind, "--destination", name)
        assert ended.code == 0, ended.err
        shown.append(ended.err)
        assert "shown with placeholders" in ended.err
    assert [said for said in shown if "\nPOST https://tracker.test" in said]


def test_preview_shows_no_secret_of_a_tracker(home: Home) -> None:
    """No token is shown, and no path of an endpoint: it may hold one. A tracker that is
    none is named, with those that there are."""
    env: dict[str, Any] = {
        "TELEMHQ_OTLP_ENDPOINT": f"https://otlp.test/{TOKEN}",
        "TELEMHQ_OTLP_HEADERS": f"X-Key={TOKEN}",
    }
    ended = run(home, "preview", "Stop", "--destination", "otlp", **env)
    assert "POST https://otlp.test/...\n" in ended.err
    assert TOKEN not in ended.out + ended.err
    assert "placeholders" not in ended.err
    ended = run(home, "preview", "Stop", "--destination", "nobody")
    assert ended.code == 1
    assert f"there is no tracker nobody; there are: {', '.join(TRACKERS)}" in ended.err


# -- A hook by hand ----------------------------------------------------------------


def by_hand(home: Home, **env: Any) -> str:
    """What the README's debug command says."""
    return home.hook(event("Stop"), imported=False, **env).stderr.decode()


def test_a_hook_by_hand_takes_the_settings_url(home: Home, receiver: Receiver) -> None:
    """By hand, without a URL in the shell, a hook in debug mode says which settings
    file has it, and takes it; the shell's own goes before it. Run by Claude Code, or
    not in debug mode, it looks at no settings file."""
    write_settings(home, {"env": {"TELEMHQ_PING_URL": receiver.url}})
    said = by_hand(home, TELEMHQ_HOOK_DEBUG=1)
    assert "TELEMHQ_PING_URL is from ~/.claude/settings.json" in said
    assert "HTTP 200" in said
    assert len(receiver.pings) == 1
    assert by_hand(home) == ""
    said = by_hand(home, TELEMHQ_HOOK_DEBUG=1, CLAUDE_PROJECT_DIR=home.project)
    assert "TELEMHQ_PING_URL is not set" in said
    with Receiver() as other:
        by_hand(home, TELEMHQ_HOOK_DEBUG=1, url=other.url)
        assert len(other.pings) == 1
    home.quiet()
    assert len(receiver.pings) == 1


# -- flush -------------------------------------------------------------------------


def test_flush_delivers_what_waits(home: Home, receiver: Receiver) -> None:
    """flush sends everything, oldest first, in spite of a back-off, to the URL that the
    settings have, and says so."""
    write_settings(home, {"env": {"TELEMHQ_PING_URL": receiver.url}})
    sent = place(home, receiver.url, 5, 100)
    now = time.time()
    home.set_state(failures=3, set_at=now, not_before=now + 3600)
    ended = run(home, "flush")
    assert ended.code == 0, ended.err
    assert [ping["event_id"] for ping in receiver.pings] == sent
    assert ended.out.endswith("None left.\n")
    assert home.waiting() == []


def test_flush_without_a_url_says_what_to_do(home: Home) -> None:
    """Without a URL it says what is missing; with the plugin alone, that Claude Code
    has it, and what to do."""
    ended = run(home, "flush")
    assert ended.code == 1
    assert "TELEMHQ_PING_URL is not set" in ended.err
    write_settings(home, {"enabledPlugins": {"telemhq-ping@telemhq-ping": True}})
    ended = run(home, "flush")
    assert ended.code == 1
    assert "only Claude Code knows the plugin's URL" in ended.err
    assert "only Claude Code knows" in by_hand(home, TELEMHQ_HOOK_DEBUG=1)


# -- flush --adopt -----------------------------------------------------------------


@pytest.mark.fault(34)
@pytest.mark.parametrize("how", ["asked", "--yes"])
def test_adopt_shows_and_moves(home: Home, receiver: Receiver, how: str) -> None:
    """--adopt shows how many pings it would move, whose, how old, from which directory
    to which and whose host; asks; then moves and sends them. --yes asks nothing."""
    place(home, dead_url(), 1)
    other = home.waiting()[0].parent.parent
    other = other.rename(other.with_name("otlp-0123456789ab"))  # stays where it is
    (kept,) = home.waiting()
    sent = place(home, dead_url(), 1, 500)
    sent += place(home, dead_url(), 2, 400)
    path = home.waiting()[2]
    path.write_text(path.read_text().replace('"api"', '"web"'))
    damaged = path.with_name(f"{time.time_ns():020d}-Stop--{'0' * 32}.json")
    damaged.write_text("{")  # hinders no other
    sent += place(home, receiver.url, 1)
    *_, former, present = [path.parent.parent.name for path in home.waiting()]
    if how == "asked":
        terminal = Terminal(home, "flush", "--adopt", TELEMHQ_PING_URL=receiver.url)
        terminal.answer("Move them? [y/N] ", "y\n")
        code, out = terminal.end()
    else:
        ended = run(home, "flush", "--adopt", "--yes", url=receiver.url)
        code, out = ended.code, ended.out
    assert code == 1
    assert "3 pings of api, web wait, the oldest for 6 min\n" in out
    host = f"http://127.0.0.1:{receiver.port}"
    assert f"\n  from {former} to {present}, {host}\n" in out
    assert [ping["event_id"] for ping in receiver.pings] == sent
    assert [path for path in home.waiting() if path != damaged] == [kept]
    assert re.search(rf"~/.claude/telemhq/.*/{damaged.name}\s+stays: ", out)
    assert "1 left." in out


@pytest.mark.fault(34)
def test_nothing_is_moved_without_a_yes(home: Home, receiver: Receiver) -> None:
    """Pings of a former URL never go to the new one by themselves: not by flush, nor
    where nobody can be asked, nor after a no."""
    place(home, dead_url(), 2)
    before = home.waiting()
    assert run(home, "flush", url=receiver.url).code == 0
    ended = run(home, "flush", "--adopt", url=receiver.url)
    assert ended.code == 1
    assert "nothing was changed; --yes asks nothing" in ended.err
    code, out = on_a_terminal(
        home, b"n\n", "flush", "--adopt", TELEMHQ_PING_URL=receiver.url
    )
    assert code == 1
    assert "nothing was changed" in out
    assert home.waiting() == before
    assert receiver.requests == []
