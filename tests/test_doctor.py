"""doctor: it proves, instead of looking, what lies between an event and the tracker."""

from __future__ import annotations

import errno
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Callable

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
)

if TYPE_CHECKING:
    import pathlib
    import socket

SCRIPT_THERE = "~/.claude/hooks/telemhq_ping.py"
EXAMPLE = read(ROOT / "settings.example.json")["hooks"]
COMMAND = EXAMPLE["Stop"][0]["hooks"][0]["command"]
PLUGIN: dict[str, Any] = {"enabledPlugins": {"telemhq-ping@telemhq-ping": True}}


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
        assert re.search(arrived.format(name) + r"\d+ ms, all \d+ ms", good)
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


def test_doctor_leaves_nothing_behind(home: Home, receiver: Receiver) -> None:
    """doctor leaves no file, in TMPDIR neither, where there is no state yet neither;
    but Python caches bytecode when it runs the commands."""
    set_up(home, receiver.url)
    (home.path / "tmp").mkdir()
    before = tree(home.path)
    diagnosis(home, TMPDIR=home.path / "tmp")
    home.quiet()
    new = set(tree(home.path)) - set(before)
    assert [name for name in new if "__pycache__" not in name] == []


# -- Each thing that may be wrong has its line --------------------------------------


def settings(home: Home, command: str = COMMAND, **more: Any) -> None:
    """Change the user's settings: the command of our events, and `more`."""
    found = {**read(settings_path(home)), "hooks": registered(command)}
    env = {**found["env"], **more.pop("env", {})}
    write_settings(home, {**found, "env": env, **more})


def in_project(home: Home, found: object) -> None:
    """Give the project these settings, or this text."""
    path = home.project / ".claude" / "settings.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(found if isinstance(found, str) else json.dumps(found))


def script_of(home: Home) -> pathlib.Path:
    """Where the script is."""
    return home.path / ".claude" / "hooks" / SCRIPT.name


def wait_there(home: Home, count: int, age_s: float, other: bool = False) -> None:
    """Have pings wait for the tracker, or for another URL."""
    url = read(settings_path(home))["env"]["TELEMHQ_PING_URL"]
    place(home, dead_url() if other else url, count, age_s)


def backed_off(home: Home) -> None:
    """A ping waits, and a back-off of a quarter of an hour stands."""
    wait_there(home, 1, 10)
    now = time.time()
    home.set_state(set_at=now, not_before=now + 900, problem="HTTP 404")


def another_version(home: Home) -> None:
    """The script is an older one."""
    text = script_of(home).read_text()
    older = re.sub(r"\n__version__ = .*", '\n__version__ = "0.9.0"', text)
    script_of(home).write_text(older)


def told_before(home: Home, count: int, **fields: Any) -> None:
    """Of 150 pings that were delivered the last ones lack tokens."""
    pings: list[dict[str, Any]] = [{"event_id": f"{n:032x}"} for n in range(150)]
    for ping in [pings[0], *pings[-count:]]:
        ping.update(fields, usage_complete=False)
    lines = [json.dumps({"at": "", "answer": "", "ping": ping}) for ping in pings]
    (home.destination() / "sent.jsonl").write_text("\n".join(lines))


def state_is(home: Home, what: str) -> None:
    """The state directory is a link, or a file."""
    shutil.move(str(home.state), str(home.path / "elsewhere"))
    if what == "link":
        home.state.symlink_to(home.path / "elsewhere")
    else:
        home.state.write_text("")


USER, PROJECT = "~/.claude/settings.json", "~/acme/api/.claude/settings.json"
SECOND = f"python3 {SCRIPT_THERE}"
RAN = f"python3 {SCRIPT_THERE}; touch ran"
LINES: dict[str, tuple[Callable[[Home], object], str]] = {
    "an event has no hook": (
        lambda home: settings(home, hooks=registered(events=["Stop", "StopFailure"])),
        "✗ no hook for SessionEnd: run `install`",
    ),
    "a project's settings have a comment": (
        lambda home: in_project(home, '{"a": 1 /* mine */}'),
        f"✗ Claude Code ignores the whole of {PROJECT}: ",
    ),
    "hooks are turned off": (
        lambda home: settings(home, disableAllHooks=True),
        f"✗ {USER} turns hooks off: take disableAllHooks out of it",
    ),
    "the client is too old": (
        lambda home: client(home, "2.1.77"),
        f"✗ it ignores the whole of {USER}: update it, or run `install`",
    ),
    "the same command twice": (
        lambda home: in_project(home, {"hooks": registered(COMMAND, ["Stop"])}),
        f"✓ Stop by {USER}: arrived at doctor's own receiver",
    ),
    "two commands": (
        lambda home: in_project(home, {"hooks": registered(SECOND, ["Stop"])}),
        f"✗ Stop by {USER} and {PROJECT}: take one out, for each sends a ping",
    ),
    "a command and the plugin": (
        lambda home: settings(home, **PLUGIN),
        f"✗ Stop by {USER} and the plugin .{USER}.: take one out",
    ),
    "two URLs": (
        lambda home: in_project(
            home, {"hooks": registered(f"TELEMHQ_PING_URL=x {SECOND}", ["Stop"])}
        ),
        f"· Stop by {USER} and {PROJECT}, to two URLs: each is told the whole",
    ),
    "the interpreter is gone": (
        lambda home: settings(home, f"/no/python3 {SCRIPT_THERE}"),
        f"✗ Stop by {USER} sends nothing and says `.*/no/python3: not found",
    ),
    "the command prints": (
        lambda home: settings(home, f"echo hello; python3 {SCRIPT_THERE}"),
        f"✗ Stop by {USER} prints `hello`: run `install`, or mend it",
    ),
    "the script skips in silence": (
        lambda home: settings(home, f"CLAUDE_PROJECT_DIR=/ HOME= {SECOND} <&-"),
        "✗ .* says `stdin held no event",
    ),
    "another version": (
        another_version,
        f"✗ Stop by {USER} is version 0.9.0: `install` makes it ",
    ),
    "a command may send elsewhere": (
        lambda home: settings(home, f"TELEMHQ_PROJECT=x {RAN}"),
        f"✗ Stop by {USER} was not tried, for what it may do: `doctor --run-all`",
    ),
    "a command is a stranger's": (
        lambda home: in_project(home, {"hooks": registered(RAN, ["PreCompact"])}),
        f"✗ PreCompact by {PROJECT} was not tried, for what it may do: ",
    ),
    "a variable is none": (
        lambda home: settings(home, env={"TELEMHQ_PROJCT": "x"}),
        "✗ TELEMHQ_PROJCT is no variable of this script: see --help",
    ),
    "a project is switched off": (
        lambda home: in_project(home, {"env": {"TELEMHQ_PING_URL": ""}}),
        f"· switched off here: TELEMHQ_PING_URL is empty in {PROJECT}",
    ),
    "a SOCKS proxy": (
        lambda home: settings(
            home,
            env={
                "TELEMHQ_PING_URL": "https://tracker.invalid/ping/" + TOKEN,
                "HTTPS_PROXY": "socks5://127.0.0.1:1",
            },
        ),
        "✗ .*: SOCKS proxies are not supported: name an HTTP proxy in HTTPS_PROXY",
    ),
    "they wait for long": (
        lambda home: wait_there(home, 1, 400),
        "✗ telemhq: 1 ping of api waits, the oldest for 6 min: `flush` sends now",
    ),
    "pings wait for another URL": (
        lambda home: wait_there(home, 2, 400000, True),
        r"· for another URL 2 pings of api wait, the oldest for 4 days .`flush",
    ),
    "a back-off": (
        backed_off,
        "✗ telemhq: the next try is in 14 min, for 404: is the URL in TELEMHQ_PING_URL",
    ),
    "a loss": (
        lambda home: home.set_state(losses={"refused: HTTP 422": 2}),
        "✗ telemhq: 2 lost, 422: it refuses this ping; .*; `doctor --clear` when you",
    ),
    "the state is a link": (
        lambda home: state_is(home, "link"),
        "✗ ~/.claude/telemhq is no directory, or a symbolic link: mend that",
    ),
    "the state is a file": (
        lambda home: state_is(home, "file"),
        "✗ ~/.claude/telemhq is no directory, or a symbolic link: mend that, or",
    ),
    "all can write there": (
        lambda home: (home.destination() / "outbox").chmod(0o777),
        "✗ ~/.claude/telemhq/telemhq-[a-z0-9]+/outbox can be written by others: mend",
    ),
    "turns lack tokens": (
        lambda home: told_before(home, 3, event="Stop", total_tokens=5),
        "· telemhq: 3 of the last 100 pings said usage_complete: false, an answer came",
    ),
    "ends lack tokens": (
        lambda home: told_before(home, 1, event="SessionEnd", total_tokens=5),
        "· .* usage_complete: false, this Claude Code tells no cost",
    ),
    "nothing could be read": (
        lambda home: told_before(home, 2, event="Stop"),
        "· .* usage_complete: false, no transcript could be read",
    ),
}


@pytest.mark.fault(27, 34, 85, 88, 89)
@pytest.mark.parametrize("name", LINES)
def test_what_may_be_wrong_has_its_line(well: Home, name: str) -> None:
    """Each thing that may be wrong has a line with its cause and its remedy, and makes
    exit 1; what is only told does not. The list goes on to its end. What a stranger's
    command does is not done."""
    prepare, line = LINES[name]
    prepare(well)
    code, good, bad = diagnosis(well, PATH=f"{well.path}/bin:{SMALL_PATH}")
    lines = f"{good}\n{bad}"
    assert re.search(line, lines)
    assert code == (line[0] == "✗" or "was not tried" in bad)
    assert re.search("hooks can write|TELEMHQ_STATE_DIR", lines)
    assert not (well.project / "ran").exists()


def test_its_list_goes_on_to_its_end(well: Home) -> None:
    """What breaks a look off, here that there is no room for temporary files, is one
    more line of the list, and not its end."""
    full = "OSError(errno.ENOSPC, 'No space left on device')"
    patch = f"import tempfile\ndef refuse(*_, **__):\n    raise {full}\n"
    code, good, bad = doctor_where(well, patch + "tempfile.mkdtemp = refuse")
    assert code == 1
    assert "✗ no more of the hooks: [Errno 28] No space left on device" in bad
    assert "telemhq: last delivery: " in good


def client(home: Home, version: str) -> str:
    """A PATH with a claude command of that version on it."""
    path = home.path / "bin" / "claude"
    path.parent.mkdir(exist_ok=True)
    said = f"echo '{version} (Claude Code)'"
    path.write_text(f'#!/bin/sh\necho >> "$0.asked"\n{said}\n')
    path.chmod(0o755)
    return f"{path.parent}:{SMALL_PATH}"


# -- How it finds that out ----------------------------------------------------------


@pytest.mark.fault(86)
@pytest.mark.parametrize(
    "where", ["managed-settings.json", "managed-settings.d/a.json"]
)
def test_doctor_sees_managed_settings(well: Home, where: str) -> None:
    """A company's settings count, in one file or several; and where those allow no
    hooks but their own, that is named, with who can mend it."""
    path = well.path / "company" / where
    path.parent.mkdir(parents=True)
    env = {"TELEMHQ_PROJECT": "theirs"}
    path.write_text(json.dumps({"allowManagedHooksOnly": True, "env": env}))
    patch = f"t.MANAGED_DIRS = {{sys.platform: {str(well.path / 'company')!r}}}"
    _, good, bad = doctor_where(well, patch)
    assert bad == "✗ allowManagedHooksOnly: hooks run in your company's settings only"
    assert "pings from this directory say project theirs" in good


FORMS = [
    f"env python3 {SCRIPT_THERE} 2>/dev/null || true",
    f'cat | nice "$HOME"/.claude/hooks/../hooks/{SCRIPT.name}',
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


@pytest.mark.parametrize("how", ["stale", "damaged", "open"])
def test_doctor_sees_bytecode_that_is_not_the_scripts(home: Home, how: str) -> None:
    """What Python would run in place of the script is compared with it: bytecode made
    of another file of the same time and size, damaged, or where others can write."""
    set_up(home, dead_url())
    script = home.path / ".claude" / "hooks" / SCRIPT.name
    text, times = script.read_text(), script.stat()
    if how == "stale":
        script.write_text("import os  #".ljust(times.st_size))
        os.utime(str(script), ns=(times.st_mtime_ns,) * 2)
    made = str(py_compile.compile(str(script)))
    script.write_text(text)
    os.utime(str(script), ns=(times.st_mtime_ns,) * 2)
    patch = "t.try_hook = lambda *_: (True, 'not this time')"
    if how == "damaged":
        os.truncate(made, 1000)
    elif how == "open":
        (script.parent / "__pycache__").chmod(0o777)
    bad = doctor_where(home, patch)[2]
    assert "✗ ~/.claude/hooks/__pycache__/telemhq_ping." in bad
    assert ": remove it, Python makes it anew" in bad
    shutil.rmtree(str(script.parent / "__pycache__"))
    py_compile.compile(str(script))
    assert "__pycache__" not in doctor_where(home, patch)[2]


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
        ("telemhq.com/ping/", "it must start with https://"),
        ("http://tracker.invalid/ping/", "use https://"),
        ("https://u:p@tracker.invalid/", "it must not hold user:password@"),
        ("https://tracker.invalid/ping/", "is there a network?"),
        ("http://127.0.0.1:1/", "Connection refused: is TELEMHQ_PING_URL right"),
    ],
)
def test_doctor_sees_a_wrong_url(home: Home, url: str, words: str) -> None:
    """An unusable URL, and a host that is not there, are named, without the token."""
    set_up(home, url + TOKEN)
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


def test_what_answers_a_get_need_not_know_it(home: Home, receiver: Receiver) -> None:
    """405 to doctor's GET is good: not every tracker knows GET. https:// to a server
    that speaks no TLS is not called a certificate's fault."""
    receiver.answer = 405
    set_up(home, receiver.url)
    assert diagnosis(home)[0] == 0
    set_up(home, receiver.url.replace("http://", "https://"))
    bad = diagnosis(home)[2]
    assert "no TLS is spoken there; is https:// right?" in bad
    assert "certificate" not in bad


def test_doctor_waits_no_longer_than_a_sender(home: Home) -> None:
    """A tracker that answers without an end has a sender's deadline, and a remedy."""

    def drip(connection: socket.socket) -> None:
        connection.recv(1000)
        for _ in range(100):
            connection.sendall(b"H")
            time.sleep(0.2)

    with Wire(drip) as wire:
        write_settings(home, {"env": {"TELEMHQ_PING_URL": wire.url}})
        begun = time.monotonic()
        bad = diagnosis(home, TELEMHQ_TIMEOUT="1")[2]
        assert 3 < time.monotonic() - begun < 8
    assert "no whole answer in time: it has a problem of its own" in bad


def test_send_proves_the_token(home: Home, receiver: Receiver) -> None:
    """--send delivers one ping with the event Test, and names its id and the tracker.
    Before, `last delivery: none yet` has no tick, and is no fault."""
    set_up(home, receiver.url)
    code, good, bad = diagnosis(home, "--send")
    assert (code, bad) == (0, "")
    (ping,) = [r.ping for r in receiver.requests if r.method == "POST"]
    assert (ping["event"], ping["project"], ping["status"]) == (
        "Test",
        "api",
        "success",
    )
    assert f"✓ telemhq has taken the test {ping['event_id']}" in good
    assert "· telemhq: last delivery: none yet" in good


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


def test_losses_can_be_acknowledged(well: Home) -> None:
    """`doctor --clear` forgets losses, and leaves the rest of the state."""
    well.set_state(losses={"tokens": 77}, delivered_at=12345)
    assert "telemhq: 77 lost, tokens; `doctor --clear`" in diagnosis(well)[2]
    code, good, _ = diagnosis(well, "--clear")
    assert code == 0
    assert re.search(r"last delivery: \d+ days ago", good)
    assert diagnosis(well)[0] == 0
