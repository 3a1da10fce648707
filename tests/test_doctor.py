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

from person import EVENTS, Ended, read, run, settings_path, write_settings
from support import (
    ROOT,
    SCRIPT,
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
    import socket
    from types import ModuleType

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
    assert max(map(len, ended.out.splitlines())) <= 100
    out = ended.out.replace("\n    ", " ")
    lines = [line for line in out.splitlines() if line[2:3] == " "]
    good = [line for line in lines if line[:3] in ("ok ", "-- ")]
    bad = [line for line in lines if line.startswith("!! ")]
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
    """All is well: exit 0, a line for each thing that was tried and none left behind:
    each hook's own command, with a receiver of doctor's, whose times are told; the
    tracker, by one GET; the disk. The token is not called proven."""
    code, good, bad = diagnosis(well)
    assert (code, bad) == (0, "")
    arrived = r"ok {} by ~/.claude/settings.json: arrived at doctor's own receiver in "
    for name in EVENTS:
        assert re.search(arrived.format(name) + r"\d+ ms \(hook: \d+ ms\)", good)
    for words in (
        "-- TELEMHQ_PING_URL is from ~/.claude/settings.json",
        f"ok telemhq at http://127.0.0.1:{receiver.port} answers; only `doctor --send`",
        "ok hooks can write to ~/.claude/telemhq",
        "ok telemhq: last delivery: ",
    ):
        assert words in good
    assert [request.method for request in receiver.requests] == ["POST", "GET"]
    assert receiver.requests[1].body == b""
    assert os.listdir(str(well.destination() / "outbox")) == []


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


def wait_there(home: Home, count: int, age_s: float, other: bool = False) -> None:
    """Have pings wait for the tracker, or for another URL."""
    url = read(settings_path(home))["env"]["TELEMHQ_PING_URL"]
    place(home, dead_url() if other else url, count, age_s)


def backed_off(home: Home) -> None:
    """A ping waits, and a back-off of a quarter of an hour stands."""
    wait_there(home, 1, 10)
    now = time.time()
    home.set_state(set_at=now, not_before=now + 900, problem="HTTP 404")


def plugin_is_off(home: Home) -> None:
    """The user's settings enable the plugin, the project's disable it."""
    settings(home, **PLUGIN)
    in_project(home, {"enabledPlugins": dict.fromkeys(PLUGIN["enabledPlugins"], False)})


def gone_tracker(home: Home) -> None:
    """Pings wait for a tracker that is no longer named."""
    wait_there(home, 2, 10, True)
    outbox = home.waiting()[0].parent.parent
    outbox.rename(outbox.with_name("otlp-0123456789ab"))


def told_before(home: Home, count: int, **fields: Any) -> None:
    """Of 150 pings that were delivered the last ones lack tokens."""
    pings: list[dict[str, Any]] = [{"event_id": f"{n:032x}"} for n in range(150)]
    for ping in [pings[0], *pings[-count:]]:
        ping.update(fields, usage_complete=False)
    lines = [json.dumps({"at": "", "answer": "", "ping": ping}) for ping in pings]
    (home.destination() / "sent.jsonl").write_text("\n".join(lines))


def linked(home: Home) -> None:
    """The state directory is a link."""
    shutil.move(str(home.state), str(home.path / "elsewhere"))
    home.state.symlink_to(home.path / "elsewhere")


USER, PROJECT = "~/.claude/settings.json", "~/acme/api/.claude/settings.json"
SECOND = f"python3 {SCRIPT_THERE}"
TWO = [registered(c)["Stop"][0] for c in (COMMAND, f"TELEMHQ_PING_URL=x {SECOND}")]
SOCKS = {"HTTPS_PROXY": "socks5://127.0.0.1:1"}
RAN = f"python3 {SCRIPT_THERE}; touch ran"
LINES: dict[str, Callable[[Home], object]] = {
    "!! no hook for SessionEnd: run `install`": lambda home: settings(
        home, hooks=registered(events=["Stop", "StopFailure"])
    ),
    f"!! Claude Code ignores {PROJECT} or a part: ": lambda home: in_project(
        home, '{"a": 1 /* mine */}'
    ),
    f"!! {PROJECT} turns hooks off: take disableAllHooks out": lambda home: in_project(
        home, {"disableAllHooks": True}
    ),
    f"ok Stop by {USER}: arrived at doctor's own receiver": lambda home: in_project(
        home, {"hooks": registered(COMMAND, ["Stop"])}
    ),
    f"!! Stop by {USER} and {PROJECT}: each sends a ping; take": lambda home: (
        in_project(home, {"hooks": registered(SECOND, ["Stop"])})
    ),
    f"!! Stop by {USER} and the plugin .{USER}.: each sends": lambda home: settings(
        home, **PLUGIN
    ),
    f"-- Stop by {USER}: two commands, to two URLs": lambda home: settings(
        home, hooks={**registered(), "Stop": TWO}
    ),
    f"!! Stop by {USER} sends nothing and says `.*: not found": lambda home: settings(
        home, f"/no/python3 {SCRIPT_THERE}"
    ),
    f"!! Stop by {USER} prints `hello`: run `install`, or mend": lambda home: settings(
        home, f"echo hello; python3 {SCRIPT_THERE}"
    ),
    f"-- Stop by {USER} was not tried: not your own, or": lambda home: settings(
        home, f"TELEMHQ_PROJECT=x {RAN}"
    ),
    f"-- PreCompact by {PROJECT} was not tried: not your own": lambda home: in_project(
        home, {"hooks": registered(RAN, ["PreCompact"])}
    ),
    f"-- switched off here: .* is empty in {PROJECT}": lambda home: in_project(
        home, {"env": {"TELEMHQ_PING_URL": ""}}
    ),
    "!! .*: SOCKS proxies are not .*: name an HTTP proxy": lambda home: settings(
        home, env={"TELEMHQ_PING_URL": "https://a.invalid/x", **SOCKS}
    ),
    "-- for another URL 2 pings of api wait, .* for 4 days": lambda home: wait_there(
        home, 2, 400000, True
    ),
    "-- for otlp, which gets nothing here, 2 pings of api wait": gone_tracker,
    "-- Claude Code keeps the plugin's URL": lambda home: write_settings(home, PLUGIN),
    f"ok SessionEnd by {USER}: arrived": plugin_is_off,
    "!! .* for 6 min: `flush` sends": lambda home: wait_there(home, 2, 400),
    "!! telemhq: 404: is the URL in": backed_off,
    "!! telemhq: the next try is in 14 min": backed_off,
    "-- telemhq: 2 lost so far, refused: HTTP 422": lambda home: home.set_state(
        losses={"refused: HTTP 422": 2}
    ),
    "!! ~/.claude/telemhq is no directory, or a symbolic link: mend that": linked,
    "!! ~/.claude/telemhq/.*/outbox can be written by others": lambda home: (
        home.destination() / "outbox"
    ).chmod(0o777),
    "-- .* is false in 3 of the last 100: an answer came late": lambda home: (
        told_before(home, 3, event="Stop", total_tokens=5)
    ),
    "-- .* is false in 2 of the last 100: no transcript": lambda home: told_before(
        home, 2, event="Stop"
    ),
}


@pytest.mark.fault(27, 34, 85, 88, 89)
@pytest.mark.parametrize("line", LINES)
def test_what_may_be_wrong_has_its_line(well: Home, line: str) -> None:
    """Each thing that may be wrong has a line with its cause and its remedy, and makes
    exit 1; what is only told does not. The list goes on to its end. What a stranger's
    command does is not done."""
    LINES[line](well)
    code, good, bad = diagnosis(well)
    lines = f"{good}\n{bad}"
    assert re.search(line, lines)
    assert code == (line[0] == "!")
    assert re.search("hooks can write|TELEMHQ_STATE_DIR", lines)
    assert not (well.project / "ran").exists()


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
    env = {"TELEMHQ_TIMEOUT": "theirs"}
    path.write_text(json.dumps({"allowManagedHooksOnly": True, "env": env}))
    patch = f"t.MANAGED_DIRS = {{sys.platform: {str(well.path / 'company')!r}}}"
    bad = doctor_where(well, patch)[2]
    assert "!! allowManagedHooksOnly: only your company's hooks run; ask there" in bad
    assert "!! TELEMHQ_TIMEOUT is ignored: it is no number of seconds" in bad


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
        assert (code, good.count("ok hooks can write to")) == (0, 2)
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
    assert "!! ~/.claude/hooks/__pycache__/telemhq_ping." in bad
    assert ": remove it, Python makes it anew" in bad


# -- The tracker -------------------------------------------------------------------


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    "url, words",
    [
        ("telemhq.com/ping/", "it must start with https://"),
        ("https://u:p@tracker.invalid/", "and no user:password@"),
        ("https://tracker.invalid/ping/", "is there a network?"),
        ("http://127.0.0.1:1/", "Connection refused: is TELEMHQ_PING_URL right"),
    ],
)
def test_doctor_sees_a_wrong_url(home: Home, url: str, words: str) -> None:
    """An unusable URL, and a host that is not there, are named, without the token."""
    set_up(home, url + TOKEN)
    assert words in diagnosis(home)[2]


ANSWERS = {
    **{
        n: f"{n}: is the token in TELEMHQ_PING_URL right, and paid?" for n in (401, 403)
    },
    **{n: f"{n}: is the URL in TELEMHQ_PING_URL right, is it" for n in (404, 410, 451)},
    **{n: f"{n}: it refuses this ping; it may not like" for n in (400, 415, 422)},
    413: "413: it refuses this ping as too large",
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
    at = f"telemhq at http://127.0.0.1:{receiver.port}"
    takes_posts = status in (400, 422)  # and tells nothing of a GET
    assert (f"!! {at}: {ANSWERS[status]}" in bad) == (not takes_posts)
    assert f"!! telemhq did not take the test, {ANSWERS[status]}" in bad
    assert len(home.waiting()) == 1
    assert not re.search(r"hold|not now|retry|hidden", ended.out)


def test_a_collector_may_take_protobuf_only(home: Home, receiver: Receiver) -> None:
    """400 and 415 of an OTLP receiver mean that it takes no JSON, most likely; and it
    is its own endpoint that 404 speaks of."""
    endpoint = {"TELEMHQ_OTLP_ENDPOINT": receiver.url.partition("/ping")[0]}
    set_up(home, receiver.url, env={"TELEMHQ_DESTINATIONS": "otlp", **endpoint})
    for status, words in (
        (400, "400: it refuses this ping; it may take protobuf only, and no JSON"),
        (415, "415: it refuses this ping; it may take protobuf only, and no JSON"),
        (413, "413: it refuses this ping as too large"),
        (404, "404: is the URL in TELEMHQ_OTLP_ENDPOINT right"),
    ):
        receiver.answer = status
        assert f"{words}" in diagnosis(home)[2]


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
    A delivery that never was is not called good: `last delivery: none yet`."""
    set_up(home, receiver.url)
    code, good, bad = diagnosis(home, "--send")
    assert (code, bad) == (0, "")
    (ping,) = [r.ping for r in receiver.requests if r.method == "POST"]
    assert (ping["event"], ping["project"]) == ("Test", "api")
    assert f"ok telemhq has taken the test {ping['event_id']}" in good
    home.set_state()
    assert "-- telemhq: last delivery: none yet" in diagnosis(home)[1]


def test_a_test_behind_many_is_not_refused(script: ModuleType) -> None:
    """When its minute is over before its turn comes, the last answer was another's."""
    said = script.in_words("HTTP 200", "telemhq")
    assert said == "200: older pings go first; `flush` sends the rest"


def test_a_test_that_was_not_sent_is_told(home: Home, receiver: Receiver) -> None:
    """Some trackers take none: that is said, and what proves their token; where
    nothing is to be sent to at all, --send has failed."""
    server = receiver.url.partition("/ping")[0]
    more = {"WIGTOKEN_SERVER": server, "WIGTOKEN_TOKEN": TOKEN, "WIGTOKEN_MACHINE": "m"}
    set_up(
        home, "https://a.invalid/x", env={"TELEMHQ_DESTINATIONS": "wigtoken", **more}
    )
    code, good, _ = diagnosis(home, "--send")
    assert f"ok wigtoken at {server} answers; only a session proves the token" in good
    assert "-- wigtoken takes no test: its first session proves the token" in good
    assert (code, len(receiver.requests)) == (0, 1)
    settings(home, env={"TELEMHQ_PING_URL": ""})
    assert "!! no test was sent: no URL is known" in diagnosis(home, "--send")[2]


def test_a_strangers_settings_give_little(well: Home, receiver: Receiver) -> None:
    """Of the env in a project's settings, which may be a stranger's, only variables of
    ours count: no PATH, through which a command would be theirs, and no proxy."""
    theirs = well.project / "python3"
    theirs.write_text("#!/bin/sh\ntouch ran\n")
    theirs.chmod(0o755)
    env = {"PATH": str(well.project), "HTTPS_PROXY": receiver.url}
    env.update(TELEMHQ_TIMEOUT="theirs", RECORDER_PREFIX="{project}")
    env.update(TELEMHQ_OTLP_ENDPOINT=receiver.url.partition("/ping")[0])
    in_project(well, {"env": env})
    own = {"TELEMHQ_PING_URL": "https://a.invalid/x", "RECORDER_PAT": "x"}
    own.update(TELEMHQ_DESTINATIONS="telemhq recorder otlp", RECORDER_URL=dead_url())
    settings(well, env=own)
    asked, bad = len(receiver.requests), diagnosis(well)[2]
    assert "TELEMHQ_TIMEOUT is ignored" in bad
    assert "TELEMHQ_OTLP_ENDPOINT is not set in your own settings" in bad
    assert "RECORDER_PREFIX" not in bad
    assert not (well.project / "ran").exists()
    assert len(receiver.requests) == asked


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
    assert re.search(rf"!! ~/.claude/telemhq\S* {words}", bad)
    assert (os.strerror(number) in bad) == bool(number)
    assert "mend that, or set TELEMHQ_STATE_DIR to another place" in bad
    assert "telemhq: last delivery: " in good
    assert "for another URL 1 ping of api waits" in good
