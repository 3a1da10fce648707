"""doctor: it proves, instead of looking, what lies between an event and the tracker."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import py_compile
import re
import shutil
import socket
import subprocess
import sys
import time
from typing import Any, Callable

import pytest

from person import EVENTS, Ended, read, run, settings_path, tree, write_settings
from support import (
    ROOT,
    SCRIPT,
    SMALL_PATH,
    TOKEN,
    Home,
    Receiver,
    Wire,
    dead_url,
    event,
    is_alive,
    place,
    pythons,
)

SCRIPT_THERE = "~/.claude/hooks/telemhq_ping.py"
COMMAND = read(ROOT / "settings.example.json")["hooks"]["Stop"][0]["hooks"][0][
    "command"
]
PLUGIN = {"enabledPlugins": {"telemhq-ping@telemhq-ping": True}}


def registered(command: str = COMMAND, events: Any = EVENTS) -> dict[str, Any]:
    """The hooks of settings in which this command is registered for these events."""
    hook = {"type": "command", "command": command, "timeout": 10}
    return {name: [{"hooks": [hook]}] for name in events}


def set_up(home: Home, url: str, command: str = COMMAND, **more: Any) -> None:
    """The script and settings, as by hand after the README; `more` for settings."""
    hooks = home.path / ".claude" / "hooks"
    hooks.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(SCRIPT), str(hooks))
    env = {"TELEMHQ_PING_URL": url, **more.pop("env", {})}
    write_settings(home, {"env": env, "hooks": registered(command), **more})


@pytest.fixture
def well(home: Home, receiver: Receiver) -> Home:
    """A HOME where all is well: set up for `receiver`, one ping delivered."""
    set_up(home, receiver.url)
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(1)
    home.quiet()
    return home


def told(ended: Ended) -> tuple[int, str, str]:
    """A doctor's exit status, its good lines and its bad ones, as two texts. What it
    only tells is among the good ones, with its mark."""
    lines = [line for line in ended.out.splitlines() if line[1:2] == " "]
    good = [line for line in lines if line[:2] in ("✓ ", "· ")]
    bad = [line for line in lines if line.startswith("✗ ")]
    assert len(good) + len(bad) == len(lines)
    assert ended.code == (1 if bad else 0)
    assert ended.err == ""
    return ended.code, "\n".join(good), "\n".join(bad)


def diagnosis(home: Home, *options: str, **env: Any) -> tuple[int, str, str]:
    """What `doctor` says."""
    return told(run(home, "doctor", *options, **env))


def doctor_where(home: Home, patch: str, **env: Any) -> tuple[int, str, str]:
    """What it says where a system is as `patch` (Python) makes it."""
    code = f"import errno, fcntl, os, sys, telemhq_ping as t\n{patch}\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(t.main(['doctor']))"],
        env=home.env(PYTHONPATH=str(ROOT), **env),
        cwd=str(home.project),
        capture_output=True,
        timeout=60,
    )
    return told(Ended(done.returncode, done.stdout, done.stderr))


def test_doctor_is_content(well: Home, receiver: Receiver) -> None:
    """All is well: exit 0, a line of at most 100 columns for each thing that was tried:
    each hook's own command, with a receiver of doctor's, whose times are told; the
    tracker, by one GET; the disk. The token is not called proven."""
    code, good, bad = diagnosis(well)
    assert (code, bad) == (0, "")
    arrived = (
        r"✓ {} by ~/.claude/settings.json: arrived at doctor's own receiver, hook "
    )
    for name in EVENTS:
        assert re.search(arrived.format(name) + r"\d+ ms, in all \d+ ms", good)
    for words in (
        "· TELEMHQ_PING_URL is from ~/.claude/settings.json",
        "· pings from this directory say project api",
        f"✓ telemhq at http://127.0.0.1:{receiver.port} answers; only `doctor --send`",
        "✓ hooks can write to ~/.claude/telemhq",
        "✓ telemhq: no pings wait",
        "✓ telemhq: last delivery: ",
    ):
        assert words in good
    assert [request.method for request in receiver.requests] == ["POST", "GET"]
    assert receiver.requests[1].body == b""
    assert max(map(len, good.splitlines())) <= 100


def test_doctor_changes_nothing(well: Home) -> None:
    """doctor leaves no file, in TMPDIR neither; Python caches bytecode when it runs the
    commands. Nor does it where there is no state yet."""
    temporary = well.path / "tmp"
    temporary.mkdir()
    for _ in range(2):
        before = tree(well.path)
        diagnosis(well, TMPDIR=temporary)
        well.quiet()
        after = tree(well.path)
        new = [name for name in after if ".pyc" in name or name.endswith("__pycache__")]
        assert {name: after[name] for name in after if name not in new} == {
            name: before[name] for name in before if name not in new
        }
        shutil.rmtree(str(well.state), ignore_errors=True)


def test_doctor_in_an_empty_home(home: Home) -> None:
    """With nothing installed doctor names each missing hook and the URL, exit 1."""
    code, _, bad = diagnosis(home)
    assert code == 1
    for name in EVENTS:
        assert f"no hook for {name}: run `install`" in bad
    assert "TELEMHQ_PING_URL is not set" in bad


# -- Settings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("{,}", "Claude Code ignores the whole of {path}: "),
        ('{"a": 1 /* mine */}', "Claude Code ignores the whole of {path}: "),
        ('{"hooks": []}', "Claude Code ignores the whole of {path}: "),
        ('{"disableAllHooks": true}', "{path} turns hooks off"),
    ],
)
def test_doctor_sees_settings_that_stop_hooks(
    well: Home, text: str, words: str
) -> None:
    """A file that is no strict JSON, which Claude Code ignores whole, and one that
    turns all hooks off are named; the list goes on behind it."""
    path = well.project / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text(text)
    _, good, bad = diagnosis(well)
    assert words.format(path="~/acme/api/.claude/settings.json") in bad
    assert "last delivery" in good


def client(home: Home, version: str) -> str:
    """A PATH with a claude command of that version on it."""
    path = home.path / "bin" / "claude"
    path.parent.mkdir(exist_ok=True)
    said = f"echo '{version} (Claude Code)'"
    path.write_text(f'#!/bin/sh\necho >> "$0.asked"\n{said}\n')
    path.chmod(0o755)
    return f"{path.parent}:{SMALL_PATH}"


@pytest.mark.parametrize("version", ["2.1.77", "2.1.78", "10.0.1"])
def test_doctor_knows_the_client(well: Home, version: str) -> None:
    """A client before 2.1.78 ignores settings whole that name StopFailure; newer ones
    are fine. It is asked once, for its start takes a while."""
    code, good, bad = diagnosis(well, PATH=client(well, version))
    ignores = (
        "ignores the whole of ~/.claude/settings.json: update it, or run `install`"
    )
    assert (ignores in bad) == (version == "2.1.77") == (code == 1)
    assert f"✓ Claude Code {version}" in good
    assert (well.path / "bin" / "claude.asked").read_text() == "\n"
    assert "· Claude Code was not found" in diagnosis(well)[1]


def test_one_missing_hook_and_a_projects_hooks(well: Home) -> None:
    """Where one event's hook is gone, that one is named; a project's own counts."""
    found = read(settings_path(well))
    gone = {"SessionEnd": found["hooks"].pop("SessionEnd")}
    write_settings(well, found)
    assert diagnosis(well)[2] == "✗ no hook for SessionEnd: run `install`"
    path = well.project / ".claude" / "settings.local.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"hooks": gone}))
    code, good, _ = diagnosis(well, "--run-all")
    assert code == 0
    assert "SessionEnd by ~/acme/api/.claude/settings.local.json: arrived" in good


SECOND = f"python3 {SCRIPT_THERE}"
TWICE = {
    "the same command": (COMMAND, {}, ""),
    "another command": (SECOND, {}, "Stop by {0} and {1}: take one out"),
    "another URL": (
        f"TELEMHQ_PING_URL=http://127.0.0.1:1/ {SECOND}",
        {},
        "· Stop by {0} and {1}, to two URLs: each is told the whole",
    ),
    "the plugin": (COMMAND, PLUGIN, "Stop by {0} and the plugin ({0}): take one out"),
}


@pytest.mark.fault(89)
@pytest.mark.parametrize("name", TWICE)
def test_doctor_sees_an_event_registered_twice(well: Home, name: str) -> None:
    """An event that two commands tell, or one and the plugin, is named with both
    places, as two URLs where one of them has its own. The same command in two files is
    run once by Claude Code, and no fault."""
    command, more, words = TWICE[name]
    path = well.project / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"hooks": registered(command, ["Stop"])}))
    write_settings(well, {**read(settings_path(well)), **more})
    _, good, bad = diagnosis(well)
    places = "~/.claude/settings.json", "~/acme/api/.claude/settings.json"
    assert words.format(*places) in good + bad
    assert ("take one out" in bad) == ("take one out" in words)


# -- Each command is run -----------------------------------------------------------

FORMS = [
    f"python3 {SCRIPT_THERE}",
    f"env python3 {SCRIPT_THERE} 2>/dev/null || true",
    f"cat | nice python3 {SCRIPT_THERE}",
    f'"$HOME"/.claude/hooks/../hooks/{SCRIPT.name}',
    "cd ~/.claude/hooks && python3 -ESc 'import telemhq_ping as t; t.hook()'",
]


@pytest.mark.parametrize("command", FORMS)
def test_doctor_runs_the_very_command(
    home: Home, receiver: Receiver, command: str
) -> None:
    """Whatever form a command has that names the script: doctor runs it; and says that
    it sends nothing where the script is gone."""
    set_up(home, receiver.url, command)
    (home.path / ".claude" / "hooks" / SCRIPT.name).chmod(0o755)
    code, good, _ = diagnosis(home)
    assert code == 0
    assert good.count("arrived at doctor's own receiver") == 3
    (home.path / ".claude" / "hooks" / SCRIPT.name).unlink()
    assert diagnosis(home)[2].count("sends nothing and says") == 3


BROKEN = {
    f"/nonexistent/python3 {SCRIPT_THERE}": "/nonexistent/python3: not found",
    SCRIPT_THERE: "Permission denied",
    f"echo hello; python3 {SCRIPT_THERE}": "Stop by ~/.claude/settings.json prints "
    "`hello`: run `install`, or mend it",
    f"TELEMHQ_STATE_DIR=/proc/no python3 {SCRIPT_THERE}": "cannot write",
    f"TELEMHQ_PING_URL= python3 {SCRIPT_THERE}": "says `TELEMHQ_PING_URL is not set",
}


@pytest.mark.parametrize("command", BROKEN)
def test_doctor_says_what_a_broken_command_said(
    home: Home, receiver: Receiver, command: str
) -> None:
    """Where nothing arrives, the command's own last word is told, in debug mode if it
    has none; what it prints would go into the session."""
    set_up(home, receiver.url, command)
    (home.path / ".claude" / "hooks" / SCRIPT.name).chmod(0o600)
    _, good, bad = diagnosis(home, "--run-all")
    assert BROKEN[command] in bad
    assert "project api" in good


def test_doctor_sees_an_old_python_and_another_version(well: Home) -> None:
    """An interpreter older than Python 3.8 will not do; a script of another version is
    not what was checked."""
    there = well.path / ".claude" / "hooks" / SCRIPT.name
    text = re.sub(
        r"\n__version__ = .*", '\n__version__ = "0.9.0"', there.read_text("utf-8")
    )
    there.write_text(text, "utf-8")
    assert (
        "Stop by ~/.claude/settings.json is version 0.9.0: `install`"
        in (diagnosis(well)[2])
    )
    for python in pythons(6, 8)[-1:]:
        write_settings(well, {"hooks": registered(f"{python} {SCRIPT_THERE}")})
        assert "sends nothing" in diagnosis(well)[2]


def test_doctor_ends_a_command_that_hangs(home: Home, receiver: Receiver) -> None:
    """A command that never ends is ended, with all that it started, and named."""
    hang = f"sleep 1000 & echo $! >> ~/sleeper; wait; python3 {SCRIPT_THERE}"
    set_up(home, receiver.url, hang)
    code, _, bad = doctor_where(home, "t.HOOK_MOST_S = 0.5")
    assert code == 1
    assert "says `it does not end`" in bad
    sleepers = (home.path / "sleeper").read_text().split()
    assert len(sleepers) == 3
    assert not any(is_alive(int(sleeper)) for sleeper in sleepers)


def test_doctors_own_runs_stay_on_this_machine(home: Home, receiver: Receiver) -> None:
    """What doctor runs sends nothing to any tracker, whatever the settings' env says,
    and leaves the state alone."""
    with Receiver() as other:
        endpoint = f"http://127.0.0.1:{other.port}"
        more = {"TELEMHQ_DESTINATIONS": "telemhq,otlp", "TELEMHQ_HOOK_DEBUG": "1"}
        set_up(home, receiver.url, env={**more, "TELEMHQ_OTLP_ENDPOINT": endpoint})
        code, good, _ = diagnosis(home, TELEMHQ_STATE_DIR=home.state)
        assert code == 0
        assert f"otlp at {endpoint} answers" in good
        assert [request.ping for request in other.requests] == [{"resourceLogs": []}]
    assert [request.method for request in receiver.requests] == ["GET"]
    assert not home.state.exists()


@pytest.mark.parametrize("where", ["user", "project"])
def test_doctor_does_not_run_a_strangers_command(well: Home, where: str) -> None:
    """A command that sets a variable of ours, and so may send elsewhere, and one of a
    project's settings are run with --run-all only; without it nothing is proven."""
    command = f"python3 {SCRIPT_THERE}; touch ran"
    path = settings_path(well)
    if where == "project":
        path = well.project / ".claude" / "settings.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"hooks": registered(command, ["Stop"])}))
    else:
        command = f"TELEMHQ_PROJECT=x {command}"
        write_settings(well, {**read(path), "hooks": registered(command)})
    bad = diagnosis(well)[2]
    assert "was not tried, for what it may do: `doctor --run-all`" in bad
    assert not (well.project / "ran").exists()
    diagnosis(well, "--run-all")
    assert (well.project / "ran").exists()


def stale(path: pathlib.Path) -> None:
    """Bytecode of another script, of the same time and size."""
    time_and_size = path.stat()
    other = path.with_name("other.py")
    other.write_bytes(b"import os  #".ljust(time_and_size.st_size))
    os.utime(str(other), ns=(time_and_size.st_mtime_ns,) * 2)
    made = py_compile.compile(str(other))
    assert made
    shutil.move(made, made.replace("other.", "telemhq_ping."))
    other.unlink()


def damaged(path: pathlib.Path) -> None:
    """Bytecode that a full disk has cut off."""
    made = py_compile.compile(str(path))
    assert made
    os.truncate(made, 1000)


def opened(path: pathlib.Path) -> None:
    """Bytecode that others may put there."""
    py_compile.compile(str(path))
    (path.parent / "__pycache__").chmod(0o777)


@pytest.mark.parametrize("spoil", [stale, damaged, opened])
def test_doctor_sees_bytecode_that_is_not_the_scripts(
    home: Home, receiver: Receiver, spoil: Callable[[pathlib.Path], None]
) -> None:
    """What Python would run in place of the script is compared with it: bytecode that
    is another script's, damaged, or in a directory that others can write to is
    named. (The command runs the script as such, and so leaves it.)"""
    set_up(home, receiver.url, f"python3 -B {SCRIPT_THERE}; true mend_bytecode")
    patch = "t.try_hook = lambda *_: (None, 'skipped')"
    assert doctor_where(home, patch)[0] == 0
    spoil(home.path / ".claude" / "hooks" / SCRIPT.name)
    code, good, bad = doctor_where(home, patch)
    assert code == 1
    assert "✗ ~/.claude/hooks/__pycache__" in bad
    assert bad.endswith("remove it, Python makes it anew")
    assert "last delivery" in good


# -- Variables ---------------------------------------------------------------------


def test_doctor_reads_variables(well: Home, receiver: Receiver) -> None:
    """A TELEMHQ_ variable that is none, or makes no sense, is named. Where the URL is
    from is told, and what project a ping from here would name."""
    bad = diagnosis(well, TELEMHQ_PROJCT="x", TELEMHQ_TIMEOUT="soon")[2]
    assert "TELEMHQ_PROJCT is no variable of this script" in bad
    assert "TELEMHQ_TIMEOUT is ignored" in bad
    write_settings(well, {"hooks": registered()})
    good = diagnosis(well, url=receiver.url, TELEMHQ_PROJECT="acme")[1]
    assert "TELEMHQ_PING_URL is from the shell's environment" in good
    assert "pings from this directory say project acme" in good


@pytest.mark.parametrize("where", ["project", "shell"])
def test_a_project_that_is_switched_off_is_no_fault(well: Home, where: str) -> None:
    """`"TELEMHQ_PING_URL": ""` switches the hook off for a project: told as that, and
    pings that wait for the URL that is used elsewhere are no fault either."""
    place(well, read(settings_path(well))["env"]["TELEMHQ_PING_URL"], 2, 400)
    if where == "project":
        path = well.project / ".claude" / "settings.json"
        path.parent.mkdir()
        path.write_text('{"env": {"TELEMHQ_PING_URL": ""}}')
        code, good, bad = diagnosis(well)
    else:
        write_settings(well, {"hooks": registered()})
        code, good, bad = diagnosis(well, url="")
    assert (code, bad) == (0, "")
    assert "· switched off here: TELEMHQ_PING_URL is empty in " in good
    assert "· for another URL 2 pings of api wait, the oldest for 6 min" in good


def test_doctor_of_a_plugin_alone(home: Home, receiver: Receiver) -> None:
    """With the plugin alone nothing is missing: its URL is the client's secret, and
    doctor shows the destinations that it finds on disk."""
    place(home, receiver.url, 2, 10)
    write_settings(home, PLUGIN)
    code, good, bad = diagnosis(home)
    assert (code, bad) == (0, "")
    assert "✓ Stop by the plugin (~/.claude/settings.json)" in good
    assert "· Claude Code keeps the plugin's URL; it is not tried here" in good
    assert "✓ telemhq: 2 pings of api wait, the oldest for 1" in good


# -- The tracker -------------------------------------------------------------------


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    "url, words",
    [
        ("telemhq.com/ping/" + TOKEN, "https://"),
        ("file:///etc/" + TOKEN, "https://"),
        ("http://tracker.invalid/ping/" + TOKEN, "use https://"),
        ("https://u:p@tracker.invalid/" + TOKEN, "user:password"),
        ("https://telemhq.com/ping/<token>", "no URL may hold"),
        ("https://tracker.invalid/ping/" + TOKEN, "is there a network?"),
        (
            "http://127.0.0.1:1/ping/" + TOKEN,
            "Connection refused: is TELEMHQ_PING_URL right",
        ),
    ],
)
def test_doctor_sees_a_wrong_url(home: Home, url: str, words: str) -> None:
    """An unusable URL, and a host that is not there, are named, without the token."""
    set_up(home, url)
    assert words in diagnosis(home)[2]


ANSWERS = {
    301: "301: it has moved; put its new address into TELEMHQ_PING_URL",
    401: "401: is the token in TELEMHQ_PING_URL right, and paid?",
    403: "403: is the token in TELEMHQ_PING_URL right, and paid?",
    404: "404: is the URL in TELEMHQ_PING_URL right, is it there?",
    410: "410: is the URL in TELEMHQ_PING_URL right, is it there?",
    413: "413: it refuses this ping; it may not like a field, or the size",
    415: "415: it refuses this ping; it may not like a field, or the size",
    429: "429: it is busy; sent again later",
    500: "500: it has a problem of its own; sent again later",
}


@pytest.mark.parametrize("status", ANSWERS)
def test_doctor_tells_what_an_answer_means(
    home: Home, receiver: Receiver, status: int
) -> None:
    """Each answer has its one meaning, for a person: to a GET, to --send's ping, which
    then waits as any does, and afterwards. No word of the inside is among it."""
    set_up(home, receiver.url)
    receiver.answer = status, {"Location": "/" + TOKEN}, b""
    ended = run(home, "doctor", "--send")
    code, _, bad = told(ended)
    assert code == 1
    assert f"✗ telemhq at http://127.0.0.1:{receiver.port}: {ANSWERS[status]}" in bad
    assert f"✗ telemhq did not take the test, {ANSWERS[status]}" in bad
    assert len(home.waiting()) == 1
    assert not re.search(r"hold|not now|retry|hidden", ended.out)
    assert max(map(len, bad.splitlines())) <= 110
    bad = diagnosis(home)[2]
    assert "telemhq: 1 ping of api waits, the oldest for " in bad
    assert re.search(
        rf"the next try is in \d+ \w+, for {re.escape(ANSWERS[status])}", bad
    )


def test_a_collector_may_take_protobuf_only(home: Home, receiver: Receiver) -> None:
    """400 and 415 of an OTLP receiver mean that it takes no JSON, most likely; and it
    is its own endpoint that 404 speaks of."""
    set_up(
        home,
        "",
        env={
            "TELEMHQ_DESTINATIONS": "otlp",
            "TELEMHQ_OTLP_ENDPOINT": receiver.url.partition("/ping")[0],
        },
    )
    for status, words in (
        (400, "400: it refuses this ping; it may take protobuf only, and no JSON"),
        (415, "415: it refuses this ping; it may take protobuf only, and no JSON"),
        (404, "404: is the URL in TELEMHQ_OTLP_ENDPOINT right"),
    ):
        receiver.answer = status
        assert f"{words}" in diagnosis(home)[2]


@pytest.mark.parametrize("status", [200, 204, 400, 405])
def test_doctor_takes_any_good_answer(
    home: Home, receiver: Receiver, status: int
) -> None:
    """An answer to GET is good; 405, too: not every tracker knows GET."""
    set_up(home, receiver.url)
    receiver.answer = status
    assert diagnosis(home)[0] == 0


@pytest.mark.parametrize("known, remedy", [(True, "https://"), (False, "certificates")])
def test_doctor_tells_tls_from_certificates(
    home: Home, script: Any, known: bool, remedy: str
) -> None:
    """https:// to a server that speaks no TLS is not called a certificate's fault; that
    is told with what can name a company's own."""
    if known:
        with Receiver() as receiver:
            set_up(home, receiver.url.replace("http://", "https://"))
            bad = diagnosis(home)[2]
    else:
        bad = script.in_words("TLS: CERTIFICATE_VERIFY_FAILED", "telemhq")
    assert remedy in bad
    assert ("certificates" in bad) == (not known)


def test_doctor_waits_no_longer_than_a_sender(home: Home) -> None:
    """A tracker that answers without an end has a sender's deadline, and a remedy."""

    def drip(connection: socket.socket) -> None:
        connection.recv(1000)
        for _ in range(100):
            connection.sendall(b"H")
            time.sleep(0.2)

    with Wire(drip) as wire:
        set_up(home, wire.url, "true telemhq_ping.py")
        begun = time.monotonic()
        bad = diagnosis(home, TELEMHQ_TIMEOUT="1")[2]
        assert 3 < time.monotonic() - begun < 8
    assert "no whole answer in time: it has a problem of its own" in bad


@pytest.mark.fault(88)
def test_doctor_knows_that_socks_is_not_supported(home: Home) -> None:
    """A SOCKS proxy, also one that the settings' env names, is told as the cause."""
    proxy = {"HTTPS_PROXY": "socks5://127.0.0.1:1"}
    set_up(home, "https://tracker.invalid/ping/" + TOKEN, env=proxy)
    bad = diagnosis(home)[2]
    assert "SOCKS proxies are not supported: name an HTTP proxy in HTTPS_PROXY" in bad


def test_send_proves_the_token(well: Home, receiver: Receiver) -> None:
    """--send delivers one ping with the event Test, and names its id and the
    tracker."""
    code, good, bad = diagnosis(well, "--send")
    assert (code, bad) == (0, "")
    posted = [r.ping for r in receiver.requests if r.method == "POST"]
    (ping,) = [ping for ping in posted if ping["event"] == "Test"]
    assert (ping["project"], ping["status"]) == ("api", "success")
    assert f"✓ telemhq has taken the test {ping['event_id']}" in good


def test_a_test_that_is_refused_has_not_arrived(home: Home, receiver: Receiver) -> None:
    """A test that a well tracker refuses is not called arrived."""
    set_up(home, receiver.url)
    place(home, receiver.url, 2)
    refuse = {True: 422, False: 200}
    receiver.answer = lambda request: refuse[b'"Test"' in request.body]
    bad = diagnosis(home, "--send")[2]
    assert "✗ telemhq did not take the test, 422: it refuses this ping" in bad


# -- The disk ----------------------------------------------------------------------

REFUSES = """
real = os.open
def refuse(path, flags, *rest, **more):
    if ".claude/telemhq" in str(path) and flags & os.O_CREAT:
        raise OSError(errno.{0}, os.strerror(errno.{0}))
    return real(path, flags, *rest, **more)
os.open = refuse
"""
LOCKLESS = """
def flock(*_):
    raise OSError(errno.{0}, os.strerror(errno.{0}))
fcntl.flock = flock
"""
OBSTACLES = {
    "read-only": (REFUSES.format("EROFS"), errno.EROFS, "is not writable"),
    "full": (REFUSES.format("ENOSPC"), errno.ENOSPC, "is not writable"),
    "quota": (REFUSES.format("EDQUOT"), errno.EDQUOT, "is not writable"),
    "0555": (REFUSES.format("EACCES"), errno.EACCES, "is not writable"),
    "ENOSYS": (LOCKLESS.format("ENOSYS"), errno.ENOSYS, "has no locks"),
    "ENOLCK": (LOCKLESS.format("ENOLCK"), errno.ENOLCK, "has no locks"),
    "root's": ("os.geteuid = lambda: 12345", 0, "belongs to someone else"),
}


@pytest.mark.fault(83, 85)
@pytest.mark.parametrize("name", OBSTACLES)
def test_doctor_does_on_disk_as_a_hook_does(well: Home, name: str) -> None:
    """Where a hook cannot write or lock, doctor could neither: it says why, with a
    remedy that works there, and its list goes on to the end."""
    place(well, dead_url(), 1)
    patch, number, words = OBSTACLES[name]
    code, good, bad = doctor_where(well, patch)
    assert code == 1
    assert re.search(rf"✗ ~/.claude/telemhq\S* {words}", bad)
    assert (os.strerror(number) in bad) == bool(number)
    assert "mend that, or set TELEMHQ_STATE_DIR to a place of your own" in bad
    assert "telemhq: last delivery: " in good
    assert "for another URL 1 ping of api waits" in good


@pytest.mark.fault(27, 85)
@pytest.mark.parametrize("what", ["link", "mode", "file", "outbox", "no outbox"])
def test_doctor_sees_an_unsound_state_directory(well: Home, what: str) -> None:
    """A state directory that others could change, or that is none, is named; so is it
    where TELEMHQ_STATE_DIR, the remedy, is not sound itself."""
    state = well.state
    if what == "mode":
        state.chmod(0o777)
    elif what.endswith("outbox"):
        if what == "no outbox":
            shutil.rmtree(str(well.destination() / "outbox"))
            well.destination().chmod(0o777)
        else:
            (well.destination() / "outbox").chmod(0o777)
    else:
        shutil.move(str(state), str(well.path / "elsewhere"))
        if what == "link":
            state.symlink_to(well.path / "elsewhere")
        else:
            state.write_text("")
    bad = diagnosis(well)[2]
    assert re.search(r"✗ ~/.claude/telemhq\S* (is|can)\b.*TELEMHQ_STATE_DIR", bad)


@pytest.mark.parametrize("count, age_s", [(2, 10), (1, 10), (2, 400), (2, 400000)])
def test_doctor_minds_only_old_pings(
    well: Home, receiver: Receiver, count: int, age_s: int
) -> None:
    """Pings that wait are a fault only when they are older than five minutes."""
    place(well, receiver.url, count, age_s)
    pings = {1: "1 ping of api waits", 2: "2 pings of api wait"}[count]
    age = {10: r"1\d s", 400: "6 min", 400000: "4 days"}[age_s]
    code, good, bad = diagnosis(well)
    assert code == (age_s > 300)
    assert re.search(f"telemhq: {pings}, the oldest for {age}", bad if code else good)


def test_what_was_never_delivered_is_no_success(home: Home, receiver: Receiver) -> None:
    """`last delivery: none yet` has no tick, and is no fault."""
    set_up(home, receiver.url)
    code, good, _ = diagnosis(home)
    assert code == 0
    assert "· telemhq: last delivery: none yet" in good


@pytest.mark.fault(34)
def test_pings_of_another_url_are_no_fault(well: Home) -> None:
    """Pings that wait for a URL of another project are told as such, with whose they
    are and what would move them."""
    path = place_of(well, dead_url(), 2)
    record = read(path)
    record["ping"]["project"] = "other"
    path.write_text(json.dumps(record))
    code, good, bad = diagnosis(well)
    assert (code, bad) == (0, "")
    assert "· for another URL 2 pings of api, other wait, the oldest for " in good
    assert "flush --adopt" in good


def place_of(home: Home, url: str, count: int) -> pathlib.Path:
    """Put pings into the outbox; the path of the last one's file."""
    (*_, event_id) = place(home, url, count)
    (found,) = [path for path in home.waiting() if event_id in path.name]
    return found


def test_losses_are_shown_until_acknowledged(well: Home) -> None:
    """Losses are listed by reason, tokens too, until `doctor --clear`, which leaves the
    rest of the state."""
    well.set_state(losses={"refused: HTTP 422": 2, "tokens": 77}, delivered_at=12345)
    bad = diagnosis(well)[2]
    assert "telemhq: 2 lost, 422: it refuses this ping; " in bad
    assert "telemhq: 77 lost, tokens; `doctor --clear`" in bad
    code, good, _ = diagnosis(well, "--clear")
    assert code == 0
    assert re.search(r"last delivery: \d+ days ago", good)
    assert diagnosis(well)[0] == 0


INCOMPLETE: dict[str, dict[str, Any]] = {
    "an answer came late": {"event": "Stop", "total_tokens": 5},
    "this Claude Code tells no cost": {"event": "SessionEnd", "total_tokens": 5},
    "no transcript or account was read": {"event": "Stop"},
}


@pytest.mark.parametrize("why", INCOMPLETE)
def test_doctor_counts_pings_that_lack_tokens(well: Home, why: str) -> None:
    """How many of the last pings said `usage_complete: false` is told, and why most
    likely; that is no fault of the set-up."""
    pings: list[dict[str, Any]] = [{"event_id": f"{n:032x}"} for n in range(150)]
    for ping in pings[-3:]:
        ping.update({**INCOMPLETE[why], "usage_complete": False})
    pings[0]["usage_complete"] = False  # longer ago than what is asked about
    lines = [json.dumps({"at": "", "answer": "", "ping": ping}) for ping in pings]
    (well.destination() / "sent.jsonl").write_text("\n".join(lines))
    code, good, _ = diagnosis(well)
    assert code == 0
    text = f"3 of the last 100 pings said usage_complete: false, {why}"
    assert f"· telemhq: {text}" in good
