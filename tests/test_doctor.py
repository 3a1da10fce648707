"""doctor: it proves, instead of looking, what lies between an event and the tracker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import pytest

from person import (
    EVENTS,
    IMPORT,
    PYTHON,
    Ended,
    installed,
    on_a_terminal,
    read,
    run,
    settings_path,
    tree,
    write_settings,
)
from support import (
    SCRIPT,
    SMALL_PATH,
    TOKEN,
    Home,
    Receiver,
    dead_url,
    event,
    is_alive,
    place,
    pythons,
)


@pytest.fixture
def well(home: Home, receiver: Receiver) -> Home:
    """A HOME where all is well: installed for `receiver`, one ping delivered."""
    run(home, "install", "--url", receiver.url)
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(1)
    home.quiet()
    return home


def diagnosis(home: Home, **env: Any) -> tuple[int, str, str]:
    """doctor's exit status, its good lines and its bad ones, as two texts. What it only
    tells is among the good ones."""
    return told(run(home, "doctor", *env.pop("options", ()), **env))


def told(ended: Ended) -> tuple[int, str, str]:
    """The same of a doctor that has run."""
    lines = ended.out.splitlines()
    good = [line[2:] for line in lines if line[:2] in ("✓ ", "· ")]
    bad = [line[2:] for line in lines if line.startswith("✗ ")]
    assert len(good) + len(bad) == len(lines)
    assert ended.code == (1 if bad else 0)
    assert ended.err == ""
    return ended.code, "\n".join(good), "\n".join(bad)


def test_doctor_is_content(well: Home, receiver: Receiver) -> None:
    """All is well: a good line per check, exit 0; the host was asked by GET, once."""
    code, good, bad = diagnosis(well)
    assert (code, bad) == (0, "")
    for words in (
        *("hook for " + name for name in EVENTS),
        f"a ping arrived from the command for Stop in {settings_path(well)}",
        f"a ping arrived from the command for StopFailure in {settings_path(well)}",
        f"ping URL, from {settings_path(well)}",
        "pings from this directory say project api",
        f"tracker at http://127.0.0.1:{receiver.port} answers",
        "state directory " + str(well.state),
        "no pings wait",
        "back-off: none",
        "last delivery: 2",
    ):
        assert words in good
    assert [request.method for request in receiver.requests] == ["POST", "GET"]
    assert receiver.requests[1].body == b""


def test_doctor_changes_nothing(well: Home) -> None:
    """doctor writes no file, and leaves none in TMPDIR; Python caches bytecode when it
    runs the commands."""
    temporary = well.path / "tmp"
    temporary.mkdir()
    before = tree(well.path)
    diagnosis(well, TMPDIR=temporary)
    well.quiet()
    after = tree(well.path)
    cached = [name for name in set(after) - set(before) if name.endswith(".pyc")]
    assert {name: after[name] for name in after if name not in cached} == before


def test_doctor_in_an_empty_home(home: Home) -> None:
    """With nothing installed doctor names each missing hook and the URL, exit 1."""
    code, _, bad = diagnosis(home)
    assert code == 1
    for name in EVENTS:
        assert "no hook for " + name in bad
    assert "run `install`" in bad
    assert "TELEMHQ_PING_URL is not set" in bad


def test_doctor_names_one_missing_hook(well: Home) -> None:
    """Where one event's hook is gone, that one is named."""
    found = read(settings_path(well))
    del found["hooks"]["SessionEnd"]
    write_settings(well, found)
    _, _good, bad = diagnosis(well)
    assert "no hook for SessionEnd" in bad
    assert "hook for Stop" not in bad


def test_doctor_sees_disabled_hooks(well: Home) -> None:
    """disableAllHooks is named as a cause."""
    write_settings(well, dict(read(settings_path(well)), disableAllHooks=True))
    assert "disableAllHooks" in diagnosis(well)[2]


def test_doctor_sees_a_projects_hooks(home: Home, receiver: Receiver) -> None:
    """Hooks and URL in the project's settings count, where doctor runs in it."""
    run(home, "install", "--url", receiver.url, "--project", home.project)
    code, good, bad = diagnosis(home)
    assert (code, bad) == (0, "")
    assert "settings.local.json" in good


NOT_STRICT = {
    "a comma": "{,}",
    "a comment": '{"a": 1 /* mine */}',
    "NaN": '{"a": NaN}',
    "a list of hooks": '{"hooks": []}',
}


@pytest.mark.parametrize("text", NOT_STRICT.values(), ids=NOT_STRICT.keys())
def test_doctor_begins_with_settings_that_the_client_ignores(
    well: Home, text: str
) -> None:
    """A file that is no strict JSON, which Claude Code ignores whole, is the first that
    doctor names."""
    path = well.project / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text(text)
    ended = run(well, "doctor")
    assert ended.code == 1
    assert ended.out.startswith(f"✗ Claude Code ignores the whole of {path}: mend it: ")


def test_doctor_tells_of_keys_that_stand_twice(well: Home) -> None:
    """A key that stands twice is told, for of the two the client sees the last."""
    path = well.project / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text('{"env": {}, "env": {}}')
    code, good, _ = diagnosis(well)
    assert code == 0
    assert f'"env" stands twice in {path}' in good


def test_doctor_misses_the_script(well: Home) -> None:
    """Where the script that settings name is gone, doctor says so."""
    installed(well).unlink()
    bad = diagnosis(well)[2]
    assert "the script is missing" in bad
    assert "run `install`" in bad


@pytest.mark.parametrize("python", ["/nonexistent/python3", "python2-of-old"])
def test_doctor_misses_the_interpreter(well: Home, python: str) -> None:
    """Where the interpreter that settings name is gone, doctor says so."""
    text = settings_path(well).read_text("utf-8")
    text = text.replace(PYTHON, python).replace("|| python3 ", f"|| {python} ")
    settings_path(well).write_text(text, "utf-8")
    bad = diagnosis(well)[2]
    assert "interpreter is missing" in bad
    assert python in bad


def test_doctor_sees_an_old_interpreter(well: Home) -> None:
    """An interpreter older than Python 3.8 will not do."""
    old = pythons(6, 8)
    if not old:
        pytest.skip("no old Python here")
    text = settings_path(well).read_text("utf-8")
    settings_path(well).write_text(text.replace(PYTHON, old[-1]), "utf-8")
    assert "its Python is older than 3.8" in diagnosis(well)[2]


def test_doctor_sees_another_version(well: Home) -> None:
    """Where the installed script is of another version, doctor says to install."""
    text = installed(well).read_text("utf-8")
    installed(well).write_text(text.replace('"1.1.0"', '"0.9.0"', 1), "utf-8")
    bad = diagnosis(well)[2]
    assert "version 1.1.0" in bad
    assert "run `install`" in bad


@pytest.mark.parametrize(
    "url, words",
    [
        ("telemhq.com/ping/" + TOKEN, "https://"),
        ("http://tracker.invalid/ping/" + TOKEN, "use https://"),
        ("https://u:p@tracker.invalid/" + TOKEN, "user:password"),
        ("https://tracker.invalid/ping/" + TOKEN, "network"),
    ],
)
def test_doctor_sees_a_wrong_url(well: Home, url: str, words: str) -> None:
    """An unusable URL, and a host that is not there, are named, without the token."""
    write_settings(well, dict(read(settings_path(well)), env={"TELEMHQ_PING_URL": url}))
    assert words in diagnosis(well)[2]


def test_doctor_sees_ignored_variables(well: Home) -> None:
    """A variable that makes no sense is named."""
    assert "TELEMHQ_TIMEOUT is ignored" in diagnosis(well, TELEMHQ_TIMEOUT="soon")[2]


ANSWERS = {
    404: "the tracker answered 404: the token in TELEMHQ_PING_URL is wrong or was "
    "revoked",
    401: "the tracker answered 401",
    410: "the tracker answered 410: the tracker was deleted",
    301: "the tracker answered 301: it has moved",
    500: "the tracker answered 500: it has a problem of its own",
}


@pytest.mark.parametrize("status", ANSWERS)
def test_doctor_tells_what_an_answer_means(
    well: Home, receiver: Receiver, status: int
) -> None:
    """A tracker that does not take pings is named, with the reason in words."""
    receiver.answer = status, {"Location": "/" + TOKEN}, b""
    assert ANSWERS[status] in diagnosis(well)[2]


@pytest.mark.parametrize("status", [200, 204, 405])
def test_doctor_takes_any_good_answer(
    well: Home, receiver: Receiver, status: int
) -> None:
    """An answer to GET is good; 405, too: not every tracker knows GET."""
    receiver.answer = status
    assert diagnosis(well)[0] == 0


def test_doctor_sees_a_dead_host(home: Home) -> None:
    """Where nothing listens, doctor says so."""
    run(home, "install", "--url", dead_url())
    bad = diagnosis(home)[2]
    assert "tracker at http://127.0.0.1" in bad
    assert "Connection refused" in bad


@pytest.mark.parametrize(
    "count, age_s, words",
    [
        (2, 10, r"2 pings wait, the oldest for 1\d s"),
        (1, 10, r"1 ping waits, the oldest for 1\d s"),
        (2, 400, r"2 pings wait, the oldest for 6 min"),
        (2, 400000, r"2 pings wait, the oldest for 4 days"),
    ],
)
def test_doctor_minds_only_old_pings(
    well: Home, receiver: Receiver, count: int, age_s: int, words: str
) -> None:
    """Pings that wait are a problem only when they are older than five minutes."""
    place(well, receiver.url, count, age_s)
    code, good, bad = diagnosis(well)
    assert code == (age_s > 300)
    assert re.search(words, bad if code else good)


def test_doctor_tells_of_a_back_off(well: Home, receiver: Receiver) -> None:
    """Under a back-off doctor says how long, and why, in words."""
    place(well, receiver.url, 1)
    now = time.time()
    well.set_state(
        failures=1,
        set_at=now,
        not_before=now + 840,
        problem={"verdict": "hold", "what": "HTTP 404", "at": now},
    )
    bad = diagnosis(well)[2]
    assert "1 ping waits" in bad
    assert ANSWERS[404] in bad
    assert "back-off: 13 min more" in bad


def test_doctor_tells_a_pause_from_a_failure(well: Home, receiver: Receiver) -> None:
    """The pause after an outage is neither a fault nor blamed on the tracker."""
    place(well, receiver.url, 1)
    now = time.time()
    paced = {"recovered_at": now, "paced_until": now + 60, "pace_pings": 24}
    well.set_state(**paced, problem={"what": "HTTP 404"})
    code, good, bad = diagnosis(well)
    assert (code, bad) == (0, "")
    assert re.search(r"after an outage pings go bit by bit, the next in \d+ s", good)
    assert "404" not in good


def test_doctor_lists_refused_and_lost(home: Home) -> None:
    """Refused and lost pings are listed by reason, with their tokens."""
    with Receiver() as receiver:
        receiver.answer = lambda _: 422 if len(receiver.requests) == 1 else 200
        run(home, "install", "--url", receiver.url)
        place(home, receiver.url, 2)  # of which the second proves the tracker well
        run(home, "flush")
        home.set_state(losses=dict(home.state_json()["losses"], tokens=77))
        bad = diagnosis(home)[2]
    assert "lost: 1, refused: HTTP 422" in bad
    assert "lost: 77, tokens" in bad
    assert "refused" in bad
    assert str(home.destination()) in bad


def test_doctor_sees_pings_of_a_former_url(well: Home) -> None:
    """Pings that wait for a URL no longer configured are counted, with the remedy."""
    place(well, dead_url(), 2)
    bad = diagnosis(well)[2]
    assert "2 pings wait for a URL no longer configured" in bad
    assert "flush --adopt" in bad


@pytest.mark.parametrize("what", ["link", "mode", "file"])
def test_doctor_sees_an_unsound_state_directory(well: Home, what: str) -> None:
    """A state directory that others could change is named."""
    if what == "mode":
        well.state.chmod(0o777)
    else:
        shutil.move(str(well.state), str(well.path / "elsewhere"))
        if what == "link":
            well.state.symlink_to(well.path / "elsewhere")
        else:
            well.state.write_text("")
    assert "state directory: " + str(well.state) in diagnosis(well)[2]


# -- Each command is run ---------------------------------------------------------


def only(home: Home, command: str, **more: Any) -> None:
    """Settings in which this command alone is registered, for all of install's events;
    its place is `~/.claude/hooks`, PYTHON stands for a Python."""
    command = command.replace("PYTHON", PYTHON)
    hook = {"type": "command", "command": command, "timeout": 10}
    hooks = {name: [{"hooks": [hook]}] for name in EVENTS}
    found = read(settings_path(home))
    write_settings(home, {**found, "hooks": hooks, **more})


SCRIPT_THERE = "~/.claude/hooks/telemhq_ping.py"
FORMS = [
    f"python3 {SCRIPT_THERE}",
    f"python3 -I -S {SCRIPT_THERE} || true",
    f"env python3 {SCRIPT_THERE}",
    f"nice python3 {SCRIPT_THERE}",
    f"python3 {SCRIPT_THERE} 2>/dev/null || true",
    f"cat | python3 {SCRIPT_THERE}",
    f'"$HOME"/.claude/hooks/../hooks/{SCRIPT.name}',
    f"cd ~/.claude/hooks && PYTHON -ESc '{IMPORT}'",
]


@pytest.mark.parametrize("command", FORMS)
def test_doctor_runs_the_very_command(well: Home, command: str) -> None:
    """Whatever form a command has that names the script: doctor runs it, and says that
    a ping arrived, and how long that took."""
    only(well, command)
    code, good, bad = diagnosis(well)
    assert (code, bad) == (0, "")
    path = settings_path(well)
    times = r": \d+ ms in the hook, there after \d+ ms"
    assert re.search(f"a ping arrived from the command for Stop in {path}{times}", good)


@pytest.mark.parametrize("command", FORMS)
def test_doctor_sees_that_no_form_works_without_the_script(
    well: Home, command: str
) -> None:
    """Whatever form a command has: where the script is gone, doctor says so."""
    only(well, command)
    installed(well).unlink()
    code, _, bad = diagnosis(well)
    assert code == 1
    assert "nothing arrived from the command for Stop" in bad
    assert "the script is missing" in bad


def test_doctor_sees_a_script_that_may_not_be_executed(well: Home) -> None:
    """A script that settings run by itself, without execute bit, is named as that."""
    only(well, SCRIPT_THERE)
    installed(well).chmod(0o600)
    assert "a file there may not be executed" in diagnosis(well)[2]


def test_doctor_says_why_a_hook_skipped(well: Home) -> None:
    """Where the script runs and sends nothing, its own reason is given."""
    only(well, f"python3 {SCRIPT_THERE}")
    text = installed(well).read_text("utf-8")
    changed = text.replace(
        "    raw = read_stdin()\n", '    raise Skipped("of the moon")\n', 1
    )
    assert changed != text
    installed(well).write_text(changed, "utf-8")
    assert "it said `of the moon`" in diagnosis(well)[2]


def test_doctor_sees_a_hook_that_prints(well: Home) -> None:
    """What a command prints would go into the session: that is a fault."""
    only(well, f"echo hello; python3 {SCRIPT_THERE}")
    bad = diagnosis(well)[2]
    assert "a ping arrived from the command for Stop" in bad
    assert "it prints `hello`" in bad


def test_doctor_ends_a_command_that_hangs(well: Home) -> None:
    """A command that never ends is ended, with all that it started, and named."""
    hang = f"sleep 1000 & echo $! > ~/sleeper; wait; python3 {SCRIPT_THERE}"
    code = (
        "import sys, telemhq_ping as t; t.HOOK_MOST_S = 1.0; "
        "sys.exit(t.main(['doctor']))"
    )
    only(well, hang)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=well.env(PYTHONPATH=str(SCRIPT.parent)),
        cwd=str(well.project),
        capture_output=True,
        timeout=60,
    )
    assert b"it said `it does not end`" in done.stdout
    assert done.returncode == 1
    assert not is_alive(int((well.path / "sleeper").read_text()))


def test_doctors_own_runs_stay_on_this_machine(well: Home, receiver: Receiver) -> None:
    """What doctor runs sends nothing to the tracker, whatever the settings' env says,
    and leaves the state alone."""
    found = read(settings_path(well))
    with Receiver() as other:
        endpoint = f"http://127.0.0.1:{other.port}"
        found["env"].update(
            TELEMHQ_DESTINATIONS="telemhq,otlp",
            TELEMHQ_OTLP_ENDPOINT=endpoint,
            TELEMHQ_HOOK_DEBUG="1",
        )
        write_settings(well, found)
        before = tree(well.state)
        code, good, bad = diagnosis(well, TELEMHQ_STATE_DIR=well.state)
        assert (code, bad) == (0, "")
        assert f"otlp at {endpoint} answers" in good
        assert [request.ping for request in other.requests] == [{"resourceLogs": []}]
    assert [request.method for request in receiver.requests] == ["POST", "GET"]
    assert tree(well.state) == before


SETTING = f"TELEMHQ_PROJECT=x python3 {SCRIPT_THERE}; touch ran"


@pytest.mark.parametrize("where", ["user", "project"])
def test_doctor_asks_before_it_runs_what_might_be_foreign(
    well: Home, where: str
) -> None:
    """A command that sets a TELEMHQ_ variable, and one of the project's settings, is
    shown, and run only when the person says so."""
    command = SETTING if where == "user" else SETTING.split(" ", 1)[1]
    hooks = {"Stop": [{"hooks": [{"type": "command", "command": command}]}]}
    path = settings_path(well)
    if where == "project":
        path = well.project / ".claude" / "settings.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"hooks": hooks}))
    else:
        only(well, command)
    ran = well.project / "ran"
    code, _, bad = diagnosis(well)
    assert code == 1
    assert f"not tried, in {path}: {command}: `doctor --run-all` tries it" in bad
    for typed in ("\n", "n\n"):
        out = on_a_terminal(well, typed.encode(), "doctor")[1]
        assert f"Run this command of {path}?\n  {command}" in out
    assert not ran.exists()
    on_a_terminal(well, b"y\n", "doctor")
    assert ran.exists()
    ran.unlink()
    run(well, "doctor", "--run-all")
    assert ran.exists()


def test_doctor_masks_the_secrets_of_a_command(well: Home) -> None:
    """A URL in a command that is shown is masked."""
    only(well, f"TELEMHQ_PING_URL=https://h.invalid/ping/{TOKEN} {SCRIPT_THERE}")
    assert "TELEMHQ_PING_URL=https://h.invalid/<hidden 1>" in diagnosis(well)[2]


def test_doctor_warns_of_macos_stub(script: Any, monkeypatch: Any) -> None:
    """macOS's /usr/bin/python3 without the command line tools opens a dialog at every
    event: a command with it is named, and not run."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 2)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/python3")
    hook = script.RegisteredHook("Stop", {}, {"command": f"python3 {SCRIPT_THERE}"})
    check = script.try_command(hook, "settings.json", None)
    assert check.good is False
    assert "opens a dialog at every event" in check.text
    assert "xcode-select --install" in check.remedy


# -- What is registered, and for which client ------------------------------------


def client(home: Home, version: str) -> str:
    """A PATH with a claude command of that version on it."""
    path = home.path / "bin" / "claude"
    path.parent.mkdir(exist_ok=True)
    said = f"echo '{version} (Claude Code)'"
    path.write_text(f'#!/bin/sh\necho >> "$0.asked"\n{said}\n')
    path.chmod(0o755)
    return f"{path.parent}:{SMALL_PATH}"


def test_doctor_sees_a_client_too_old_for_stop_failure(well: Home) -> None:
    """A client before 2.1.78 ignores settings whole that name StopFailure."""
    code, _, bad = diagnosis(well, PATH=client(well, "2.1.77"))
    assert code == 1
    ignores = f"Claude Code 2.1.77 ignores the whole of {settings_path(well)}"
    assert ignores in bad
    assert "update it to 2.1.78 or newer, or run `install`" in bad


@pytest.mark.parametrize("version", ["2.1.78", "2.2.0", "10.0.1"])
def test_doctor_is_content_with_newer_clients(well: Home, version: str) -> None:
    """From 2.1.78 on a client is fine. It is asked once: its start takes a while."""
    code, good, _ = diagnosis(well, PATH=client(well, version))
    assert code == 0
    assert f"Claude Code {version}" in good
    assert (well.path / "bin" / "claude.asked").read_text() == "\n"


def test_doctor_finds_no_client(well: Home) -> None:
    """Without a claude command, doctor tells so; that is no fault."""
    assert "no claude command was found" in diagnosis(well)[1]


def test_doctor_sees_an_event_registered_twice(well: Home) -> None:
    """An event that two commands send is named with both places; the same command in
    two files is run once by Claude Code, and no fault."""
    path = well.project / ".claude" / "settings.json"
    path.parent.mkdir()
    same = read(settings_path(well))["hooks"]["Stop"]
    path.write_text(json.dumps({"hooks": {"Stop": same}}))
    assert diagnosis(well)[0] == 0
    hooks = {"Stop": [{"hooks": [{"type": "command", "command": FORMS[0]}]}]}
    path.write_text(json.dumps({"hooks": hooks}))
    bad = diagnosis(well, options=["--run-all"])[2]
    twice = f"Stop is registered twice, in {settings_path(well)} and {path}"
    assert bad == f"{twice}: take one out, for each sends a ping"


def test_doctor_tells_matchers_apart(well: Home) -> None:
    """Two commands for different tools do not meet."""
    found = read(settings_path(well))
    found["hooks"]["PostToolUse"] = [
        {"matcher": matcher, "hooks": [{"type": "command", "command": command}]}
        for matcher, command in (("Bash", FORMS[0]), ("Edit", FORMS[1]))
    ]
    write_settings(well, found)
    assert diagnosis(well)[0] == 0
    del found["hooks"]["PostToolUse"][0]["matcher"]
    write_settings(well, found)
    assert "PostToolUse is registered twice" in diagnosis(well)[2]


PLUGIN = {"enabledPlugins": {"telemhq-ping@telemhq-ping": True}}


def test_doctor_knows_that_the_plugin_stands_back(well: Home) -> None:
    """Beside the settings' command the plugin sends nothing: both places are told."""
    write_settings(well, dict(read(settings_path(well)), **PLUGIN))
    code, good, _ = diagnosis(well)
    assert code == 0
    path = settings_path(well)
    assert f"Stop is registered by the plugin, too, which leaves it to {path}" in good


def test_doctor_of_a_plugin_alone(home: Home, receiver: Receiver) -> None:
    """With the plugin alone nothing is missing: its URL is the client's secret, and
    doctor shows the destinations that it finds on disk."""
    place(home, receiver.url, 2, 10)
    write_settings(home, PLUGIN)
    code, good, bad = diagnosis(home)
    assert (code, bad) == (0, "")
    assert f"hook for Stop, by the plugin in {settings_path(home)}" in good
    assert "the plugin's URL is kept by Claude Code" in good
    assert "2 pings wait, the oldest for" in good
    assert "no longer configured" not in good


def test_flush_of_a_plugin_alone_says_what_to_do(
    home: Home, receiver: Receiver
) -> None:
    """Without a URL flush says that the client keeps the plugin's, and what to do."""
    place(home, receiver.url, 1)
    write_settings(home, PLUGIN)
    ended = run(home, "flush")
    assert ended.code == 1
    assert "the plugin's URL is known to Claude Code only" in ended.err
    assert "TELEMHQ_PING_URL=... telemhq_ping.py flush" in ended.err


# -- Variables -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("TELEMHQ_PROJCT", "did you mean TELEMHQ_PROJECT?"),
        ("TELEMHQ_URL", "did you mean TELEMHQ_PING_URL?"),
        ("TELEMHQ_XYZZY", "take it out"),
    ],
)
def test_doctor_sees_unknown_variables(well: Home, name: str, remedy: str) -> None:
    """A TELEMHQ_ variable that is none is named, with the one that is near."""
    bad = diagnosis(well, **{name: "x"})[2]
    assert bad == f"{name} is no variable of this script: {remedy}"


def test_doctor_tells_where_the_url_comes_from(well: Home, receiver: Receiver) -> None:
    """The ping URL's source is named: the file that sets it, or the shell."""
    assert f"ping URL, from {settings_path(well)}" in diagnosis(well)[1]
    found = read(settings_path(well))
    del found["env"]
    write_settings(well, found)
    good = diagnosis(well, url=receiver.url)[1]
    assert "ping URL, from the environment of this shell" in good


def test_doctor_tells_the_projects_name(well: Home) -> None:
    """doctor says what project the pings from here would name."""
    assert "pings from this directory say project api" in diagnosis(well)[1]
    good = diagnosis(well, TELEMHQ_PROJECT="acme")[1]
    assert "pings from this directory say project acme" in good


@pytest.mark.parametrize(
    "url, words",
    [
        ("https://telemhq.com/ping/", "has no token"),
        ("https://telemhq.com/ping/<token>", "<token> stands for"),
    ],
)
def test_doctor_sees_a_url_that_was_not_filled_in(
    well: Home, url: str, words: str
) -> None:
    """A URL without its token is named as that, and not tried."""
    write_settings(well, dict(read(settings_path(well)), env={"TELEMHQ_PING_URL": url}))
    assert words in diagnosis(well)[2]


# -- Answers, in words -----------------------------------------------------------


def test_plain_http_behind_https_is_no_certificate_problem(well: Home) -> None:
    """Where https:// meets a server that speaks no TLS, doctor says that."""
    with Receiver() as receiver:
        url = receiver.url.replace("http://", "https://")
        found = dict(read(settings_path(well)), env={"TELEMHQ_PING_URL": url})
        write_settings(well, found)
        bad = diagnosis(well)[2]
    assert "no TLS is spoken there: is https:// right, and the port?" in bad
    assert "certificate" not in bad


@pytest.mark.parametrize(
    "what, words",
    [
        ("HTTP 402", "wants to be paid"),
        ("HTTP 403", "the token in TELEMHQ_PING_URL is wrong or was revoked"),
        ("HTTP 408", "it was slow"),
        ("HTTP 429", "it has too much to do"),
        ("proxy: HTTP 407", "the proxy wants a password"),
        ("proxy: HTTP 403", "the proxy in HTTPS_PROXY refuses"),
        ("TLS: CERTIFICATE_VERIFY_FAILED", "the certificate is not trusted"),
        ("TLS: WRONG_VERSION_NUMBER", "no TLS is spoken there"),
        ("this Python was built without TLS", "a Python that has the module ssl"),
        ("timed out", "is there a network"),
    ],
)
def test_each_answer_has_a_meaning(script: Any, what: str, words: str) -> None:
    """Each answer is told with its one cause, in a user's words."""
    assert words in script.in_words(what)


def test_certificates_on_macos(script: Any, monkeypatch: Any) -> None:
    """On macOS the remedy for a certificate names python.org's command."""
    verify = "TLS: CERTIFICATE_VERIFY_FAILED"
    monkeypatch.setattr(sys, "platform", "linux")
    assert "Install Certificates.command" not in script.in_words(verify)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Install Certificates.command" in script.in_words(verify)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_managed_settings_have_a_place_on_each_system(
    script: Any, home: Home, monkeypatch: Any, platform: str
) -> None:
    """A company's settings are looked for where the client has them on this system."""
    places = {
        "linux": "/etc/claude-code/managed-settings.json",
        "darwin": "/Library/Application Support/ClaudeCode/managed-settings.json",
        "win32": "C:\\Program Files\\ClaudeCode\\managed-settings.json",
    }
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("HOME", str(home.path))
    found = [file.path for file in script.Surroundings().files]
    assert [place for place in places.values() if place in found] == [places[platform]]


# -- doctor --send, --clear ------------------------------------------------------


def test_doctor_sends_a_test(well: Home, receiver: Receiver) -> None:
    """--send delivers one ping with the event Test, and names its id."""
    code, good, bad = diagnosis_after_sending(well)
    assert (code, bad) == (0, "")
    (ping,) = [ping for ping in posted(receiver) if ping["event"] == "Test"]
    assert ping["project"] == "api"
    assert ping["status"] == "success"
    assert f"a ping with the event Test, {ping['event_id']}, is in your tracker" in good


def posted(receiver: Receiver) -> list[Any]:
    """The pings that were POSTed."""
    return [request.ping for request in receiver.requests if request.method == "POST"]


def diagnosis_after_sending(home: Home) -> tuple[int, str, str]:
    """What `doctor --send` says, without the sender's own line."""
    ended = run(home, "doctor", "--send")
    lines = [line for line in ended.out.splitlines() if line[1:2] == " "]
    return told(Ended(ended.code, "\n".join(lines).encode()))


def test_a_test_that_is_not_accepted(well: Home, receiver: Receiver) -> None:
    """A test that is not accepted waits like any ping: exit 1."""
    receiver.answer = 500
    code, _, bad = diagnosis_after_sending(well)
    assert code == 1
    assert "a ping with the event Test" in bad
    assert len(well.waiting()) == 1


def test_losses_can_be_acknowledged(well: Home) -> None:
    """Losses are shown until `doctor --clear`, which leaves the rest of the state."""
    well.set_state(losses={"refused: HTTP 422": 2}, delivered_at=12345)
    assert "lost: 2, refused: HTTP 422" in diagnosis(well)[2]
    assert "doctor --clear" in diagnosis(well)[2]
    code, good, _ = diagnosis(well, options=["--clear"])
    assert code == 0
    assert "last delivery: 1970-01-01T03:25:45" in good
    assert diagnosis(well)[0] == 0
