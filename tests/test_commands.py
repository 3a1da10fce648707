"""The commands, as a person runs them, each in a fresh HOME."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from person import (
    EVENTS,
    IMPORT,
    OTHER_HOOK,
    URL,
    Ended,
    Terminal,
    commands_in,
    installed,
    on_a_terminal,
    read,
    run,
    settings_path,
    tree,
    write_settings,
)
from support import (
    ROOT,
    SCRIPT,
    TOKEN,
    Home,
    Receiver,
    Wire,
    dead_url,
    event,
    place,
    pythons,
    read_request,
    wait_until,
)

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")

if TYPE_CHECKING:
    from person import Tree


# -- The command line ------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["--frobnicate"],
        ["install", "--url"],
        ["doctor", "extra"],
        ["preview", "NoSuchEvent"],
        ["flush", "--yes"],
    ],
    ids=" ".join,
)
def test_bad_usage_exits_2_with_a_message(home: Home, arguments: list[str]) -> None:
    """Bad usage gets argparse's message on stderr and exit status 2."""
    ended = run(home, *arguments)
    assert ended.code == 2
    assert ended.err.startswith("usage: telemhq_ping.py")
    assert ended.out == ""


def test_help_is_for_users(home: Home) -> None:
    """--help tells of every command first, then of the options, then of every variable;
    each option of each command has its meaning."""
    ended = run(home, "--help")
    assert ended.code == 0
    places = [
        ended.out.index(f"\n{word}:\n") for word in ("commands", "options", "variables")
    ]
    assert places == sorted(places)
    commands = re.findall(r"(?m)^    (\w+)", ended.out[places[0] : places[1]])
    assert commands == [
        "demo",
        "preview",
        "install",
        "doctor",
        "sent",
        "report",
        "flush",
        "uninstall",
    ]
    assert "TELEMHQ_PING_URL" in ended.out[places[2] :]
    for command in commands:
        told = run(home, command, "--help").out
        assert told.startswith(f"usage: telemhq_ping.py {command} ")
        options = re.findall(r"(?m)^  (-.*)$", told)
        assert options
        for option in options:  # its meaning stands beside it, or below
            assert "  " in option or f"  {option}\n        " in told


@pytest.mark.parametrize(
    "module, command",
    [("json", "preview Stop"), ("argparse", "doctor"), ("subprocess", "doctor")],
)
def test_a_python_that_lacks_something(home: Home, module: str, command: str) -> None:
    """Where Python lacks a module, as a distribution's minimal one does, a command
    names it: no traceback, exit 1."""
    code = f"import sys; sys.modules[{module!r}] = None; import telemhq_ping as t\n"
    code += f"sys.exit(t.main({command.split()}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=home.env(PYTHONPATH=str(ROOT)),
        capture_output=True,
    )
    assert done.returncode == 1
    assert f"this Python lacks the module {module}".encode() in done.stderr
    assert b"Traceback" not in done.stderr


def test_on_a_terminal_without_arguments_it_helps(home: Home) -> None:
    """A person who runs the file without arguments gets the help."""
    code, out = on_a_terminal(home, b"")
    assert code == 0
    assert "install" in out
    assert "TELEMHQ_PING_URL" in out


@pytest.mark.parametrize("python", pythons())
def test_every_python_runs_the_commands(home: Home, python: str) -> None:
    """The commands compile and run on every supported Python."""
    assert run(home, "--version", python=python).out.strip() == "telemhq_ping 1.1.0"
    ended = run(home, "install", "--url", URL, python=python)
    assert ended.code == 0, ended.err
    assert run(home, "preview", "Stop", python=python).code == 0
    assert run(home, "uninstall", python=python).code == 0
    assert list(home.path.rglob("settings.json*")) == []


def test_it_says_that_an_old_python_will_not_do(home: Home) -> None:
    """A Python older than 3.8 ends a command with status 1 and a reason."""
    old = pythons(7, 8)
    if not old:
        pytest.skip("no Python 3.7 here")
    ended = run(home, "doctor", python=old[0])
    assert ended.code == 1
    assert "3.8" in ended.err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode_gets_other_marks(
    home: Home, receiver: Receiver, encoding: str
) -> None:
    """Where a check mark cannot be printed, doctor's marks are plain words."""
    run(home, "install", "--url", receiver.url)
    ended = run(home, "doctor", PYTHONIOENCODING=encoding)
    assert ended.code == 0, ended.out + ended.err
    assert "ok hook for Stop" in ended.out
    assert "-- pings from this directory" in ended.out
    installed(home).unlink()
    ended = run(home, "doctor", PYTHONIOENCODING=encoding)
    assert "!! nothing arrived" in ended.out
    assert "?" not in ended.out


def test_without_a_home_it_says_so() -> None:
    """Where nothing tells the home directory, install refuses and writes nothing."""
    if os.geteuid():
        pytest.skip("only root can become an unknown user")
    script = "import os, sys; os.setuid(54321); os.execv(sys.executable, sys.argv[1:])"
    shutil.copy(str(SCRIPT), "/tmp/telemhq_ping_nobody.py")
    if not os.access(os.path.dirname(sys.executable), os.X_OK):
        pytest.skip("no interpreter for others")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            sys.executable,
            "/tmp/telemhq_ping_nobody.py",
            "install",
        ],
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    os.unlink("/tmp/telemhq_ping_nobody.py")
    if b"Permission denied" in done.stderr:
        pytest.skip("the interpreter is not for others")
    assert done.returncode == 1
    assert b"home directory" in done.stderr


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"Stop"', b"\xff\xfe{}"])
def test_hook_mode_never_exits_2(home: Home, raw: bytes) -> None:
    """Without arguments it is the hook: whatever comes on stdin, exit 0 and silence."""
    done = home.hook(raw)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# -- demo ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Tree, Ended]:
    """One demo in a fresh HOME, with a TMPDIR of its own: (home, before, ended)."""
    home = Home(tmp_path_factory.mktemp("demo") / "home")
    temporary = home.path / "tmp"
    temporary.mkdir()
    before = tree(home.path)
    ended = run(home, "demo", TMPDIR=temporary, url=URL, TELEMHQ_TIMEOUT="nonsense")
    return home, before, ended


def shown(ended: Ended) -> dict[str, Any]:
    """{event: ping} of a demo's output."""
    found: dict[str, Any] = {}
    block = r"(?m)^(\w+): .*\n(?:  .*\n)*?  left ((?:.+\n)+)"
    for name, body in re.findall(block, ended.out):
        found[name] = json.loads(body)
    return found


def test_demo_shows_the_pings(demonstration: tuple[Home, Tree, Ended]) -> None:
    """The demo shows the exact JSON that left for each of three events, and exits 0."""
    _, _, ended = demonstration
    assert ended.code == 0, ended.err
    pings = shown(ended)
    assert list(pings) == ["PostToolUseFailure", "Stop", "SessionEnd"]
    for name, ping in pings.items():
        assert ping["event"] == name
        assert ping["status"] == ("failed" if "Failure" in name else "success")
        assert ping["project"] == "acme"


def test_demo_fits_a_screen(demonstration: tuple[Home, Tree, Ended]) -> None:
    """The demo has at most 60 lines, none wider than 100 columns: two to begin with,
    and how to install as the last one."""
    lines = demonstration[2].out.splitlines()
    assert len(lines) <= 60
    assert max(len(line) for line in lines) <= 100
    assert [bool(line) for line in lines[:4]] == [True, True, False, True]
    assert lines[-1] == "To install it: python3 telemhq_ping.py install"


def test_demo_shows_realistic_tokens_and_cost(
    demonstration: tuple[Home, Tree, Ended],
) -> None:
    """The demo's Stop has the tokens of its transcript, its SessionEnd the cost."""
    pings = shown(demonstration[2])
    assert pings["Stop"]["cached_input_tokens"] == 41200
    assert pings["Stop"]["total_tokens"] == 44462
    assert pings["Stop"]["model"] == "claude-opus-5-5"
    assert pings["SessionEnd"]["cost_usd"] == 0.06


def test_demo_strikes_out_what_stays_home(
    demonstration: tuple[Home, Tree, Ended],
) -> None:
    """The demo shows what Claude Code handed over, field by field; what did not leave
    is struck out, and none of it is in the pings."""
    _, _, ended = demonstration
    handed = dict(re.findall(r"(?m)^  (\w+) {2,}(.*)$", ended.out))
    assert handed["tool_input"].startswith('~~{"command": "./deploy --password')
    assert handed["tool_input"].endswith("~~ stayed home")
    assert handed["transcript_path"].endswith("~~ only its hash left")
    message = '~~"The password is hunter2."~~ only its length left'
    assert handed["last_assistant_message"] == message
    assert handed["error"].endswith("~~ only its length left")
    assert handed["tool_name"] == '"Bash"'
    assert handed["reason"] == '"prompt_input_exit"'
    for ping in shown(ended).values():
        for content in "hunter2", "deploy", "/home/you":
            assert content not in json.dumps(ping)


def test_demo_survives_an_outage(demonstration: tuple[Home, Tree, Ended]) -> None:
    """The demo gives the times of each event; one is delivered after an outage."""
    _, _, ended = demonstration
    times = re.findall(r"(\d+) ms in the hook, delivered after (\d+) ms", ended.out)
    assert len(times) == 4
    assert all(0 < int(hook) < int(delivered) for hook, delivered in times)
    assert int(times[-1][1]) >= 1000
    assert "The tracker was away for a second." in ended.out


def test_demo_shows_all_on_request(home: Home) -> None:
    """demo --all shows an event of each kind."""
    ended = run(home, "demo", "--all")
    assert ended.code == 0, ended.err
    assert sorted(shown(ended)) == [
        "PostToolUse",
        "PostToolUseFailure",
        "SessionEnd",
        "SessionStart",
        "Stop",
        "StopFailure",
    ]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_demo_has_colours_at_a_terminal_only(home: Home, no_color: str) -> None:
    """At a terminal what stays home is struck out by the terminal, unless NO_COLOR is
    set; elsewhere there is no escape sequence."""
    code, out = on_a_terminal(home, b"", "demo", NO_COLOR=no_color)
    assert code == 0
    assert ("\x1b[9;2m" in out) == (not no_color)
    assert ("~~" in out) == bool(no_color)


def test_demo_leaves_nothing_behind(demonstration: tuple[Home, Tree, Ended]) -> None:
    """After the demo HOME and TMPDIR are as before, and no sender is alive."""
    home, before, _ = demonstration
    assert tree(home.path) == before
    assert home.processes() == []


# -- preview ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Stop", "PostToolUseFailure-Bash", "SessionEnd-other"]
)
def test_preview_prints_the_ping_that_the_hook_sends(
    home: Home, receiver: Receiver, name: str
) -> None:
    """preview prints what the hook sends for the same event, but for id and time."""
    env: dict[str, Any] = {
        "TELEMHQ_PROJECT": "acme",
        "TELEMHQ_HASH_KEY": "k",
        "TELEMHQ_USAGE": 0,
    }
    sent = json.dumps(event(name)).encode()
    ended = run(home, "preview", sent=sent, url=receiver.url, **env)
    assert ended.code == 0
    assert receiver.requests == []
    assert home.waiting() == []
    home.hook(sent, receiver.url, **env)
    shown, ping = json.loads(ended.out), receiver.wait_for(1)[0]
    for ping_or_shown in shown, ping:
        del ping_or_shown["event_id"], ping_or_shown["timestamp"]
    assert shown == ping


def test_preview_has_samples(home: Home) -> None:
    """`preview Stop` shows the ping of a built-in sample, without any URL set, and says
    that tokens are added later; unless none are."""
    ended = run(home, "preview", "Stop")
    assert ended.code == 0
    assert json.loads(ended.out)["event"] == "Stop"
    assert ended.err.startswith("Tokens and cost are added later")
    assert run(home, "preview", "Stop", TELEMHQ_USAGE="0").err == ""
    assert not (home.path / ".claude").exists()


def test_preview_at_a_terminal_says_that_it_waits(home: Home) -> None:
    """At a terminal preview says that it waits for an event, and how to end it."""
    terminal = Terminal(home, "preview")
    terminal.answer("Paste an event", '{"hook_event_name": "Stop"}\n\x04')
    code, out = terminal.end()
    assert code == 0
    assert "Ctrl-D" in out
    assert '"event": "Stop"' in out


def test_preview_without_a_stdin_says_so(home: Home) -> None:
    """A closed stdin is an error to read, and no traceback."""
    done = subprocess.run(
        ["/bin/sh", "-c", f"'{sys.executable}' '{SCRIPT}' preview <&-"],
        env=home.env(),
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"Bad file descriptor" in done.stderr
    assert b"Traceback" not in done.stderr


def test_preview_uses_the_settings_env_block(home: Home) -> None:
    """Variables of the settings' env block shape a preview, as they do a hook."""
    write_settings(home, {"env": {"TELEMHQ_PROJECT": "from-settings"}})
    assert json.loads(run(home, "preview", "Stop").out)["project"] == "from-settings"


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"12"])
def test_preview_of_no_event_fails(home: Home, raw: bytes) -> None:
    """What is no event gets a message and exit status 1."""
    ended = run(home, "preview", sent=raw)
    assert ended.code == 1
    assert ended.out == ""
    assert ended.err.startswith("telemhq_ping.py: ")


# -- install ---------------------------------------------------------------------

USERS = {  # what a person's settings may hold: all of it stays
    "model": "opus",
    "größe": "日本語 \U0001f600 naïve",
    "permissions": {"allow": ["Bash(ls:*)"], "deny": []},
    "numbers": [1, 2.5, 1e-7, True, None, 12345678901234567890],
    "env": {"OTHER": "x"},
}
TABS = '{\n\t"a": "é",\n\t"hooks": {\n\t\t"Stop": []\n\t}\n}\n'.encode()
CRLF = b'{\r\n    "a": 1,\r\n    "b": {\r\n        "c": []\r\n    }\r\n}\r\n'
SHAPES = {
    "empty": b"",
    "blank": b" \n",
    "an empty object": b"{}",
    "present": json.dumps(USERS, indent=2, ensure_ascii=False).encode() + b"\n",
    "present, escaped": json.dumps(USERS, indent=4).encode(),
    "one line": json.dumps(USERS).encode(),
    "CRLF": CRLF,
    "tabs": TABS,
    "byte order mark": b"\xef\xbb\xbf" + TABS,
    "half a character": b'{\n  "a": "\\ud83d",\n  "b": "\\u00e9"\n}\n',
    "someone else's hook": json.dumps({"hooks": {"Stop": [OTHER_HOOK]}}).encode(),
    "empty hooks": b'{"hooks": {}, "env": {}}',
    "the URL by hand": json.dumps({"env": {"TELEMHQ_PING_URL": URL}}).encode(),
}


def check_command(home: Home, command: str) -> None:
    """The command imports the installed script with an interpreter that is there; when
    that fails, it runs it."""
    words = shlex.split(command.replace("trap '' TERM; ", "", 1))
    python, script = words[3], installed(home)
    assert os.path.isabs(python)
    assert os.access(python, os.X_OK)
    assert words[:5] == ["cd", str(script.parent), "&&", python, "-ESc"]
    assert words[5:7] == [IMPORT, "||"]
    assert words[8:] == ["-I", "-S", str(script), "||", "true"]


def test_install_into_an_empty_home(home: Home) -> None:
    """Without settings: they are made, 0600; the script is copied, 0700."""
    ended = run(home, "install", "--url", URL)
    assert ended.code == 0
    found = read(settings_path(home))
    assert found["env"] == {"TELEMHQ_PING_URL": URL}
    assert [(e, m) for e, m, _ in commands_in(found)] == [(e, None) for e in EVENTS]
    for _, _, command in commands_in(found):
        check_command(home, command)
    for groups in found["hooks"].values():
        assert groups[0]["hooks"][0]["timeout"] == 10
        assert groups[0]["hooks"][0]["type"] == "command"
    assert stat.S_IMODE(settings_path(home).stat().st_mode) == 0o600
    assert stat.S_IMODE(installed(home).stat().st_mode) == 0o700
    assert stat.S_IMODE(installed(home).parent.stat().st_mode) == 0o700
    assert installed(home).read_bytes() == SCRIPT.read_bytes()
    assert list(settings_path(home).parent.glob("*.bak")) == []


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_install_does_not_depend_on_the_umask(home: Home, umask: int) -> None:
    """Whatever the umask, what install makes is for its user only."""
    before = os.umask(umask)
    try:
        config = home.path / "new" / "config"
        run(home, "install", "--url", URL, CLAUDE_CONFIG_DIR=config)
    finally:
        os.umask(before)
    assert (config / "settings.json").exists()
    for name, (mode, _) in tree(home.path).items():
        if name.startswith("acme"):
            continue
        if name.endswith("__pycache__"):  # as Python makes it under the usual umask
            assert stat.S_IMODE(mode) == 0o755
            continue
        assert mode & 0o077 == 0, name


@pytest.mark.parametrize("raw", SHAPES.values(), ids=SHAPES.keys())
def test_install_keeps_everything_else(home: Home, raw: bytes) -> None:
    """Order, meaning, unicode, indent, line ends and mode of the settings stay. A
    second run changes nothing. After a third with another URL, and uninstall, HOME is
    as it was, byte for byte and mode for mode."""
    path = write_settings(home, raw)
    path.chmod(0o640)
    path.parent.chmod(0o755)
    at_first = tree(home.path)
    before = json.loads(raw.decode("utf-8-sig")) if raw.strip() else {}
    ended = run(home, "install", "--url", URL)
    assert ended.code == 0, ended.err
    new = path.read_bytes()
    found = json.loads(new.decode("utf-8-sig"))
    assert [k for k in found if k in before] == list(before)
    for key, value in before.items():
        if key not in ("hooks", "env"):
            assert json.dumps(found[key]) == json.dumps(value)
    assert dict(found["env"], **before.get("env", {})) == found["env"]
    assert found["hooks"]["Stop"][: len(before.get("hooks", {}).get("Stop", []))] == (
        before.get("hooks", {}).get("Stop", [])
    )
    assert {e for e, _, c in commands_in(found) if SCRIPT.name in c} == set(EVENTS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (b"\r\n" in new) == (b"\r\n" in raw)
    assert new.count(b"\r\n") in (0, new.count(b"\n"))
    indent, kept = (re.search(rb"\n([ \t]+)\"", text) for text in (raw, new))
    assert kept
    assert kept.group(1) == (indent.group(1) if indent else b"  ")
    if "日本".encode() in raw:
        assert "日本語 \U0001f600 naïve".encode() in new
    after, files = tree(home.path), (path, installed(home))
    times = [file.stat().st_mtime_ns for file in files]
    ended = run(home, "install", "--url", URL)
    assert ended.code == 0
    assert "+++" not in ended.out
    assert tree(home.path) == after
    assert times == [file.stat().st_mtime_ns for file in files]
    assert run(home, "install", "--url", URL + "X", "--tools").code == 0
    assert run(home, "uninstall").code == 0
    assert tree(home.path) == at_first


def test_install_makes_a_backup(home: Home) -> None:
    """The settings as they were stay beside the new ones, under a timestamp, 0600."""
    raw = SHAPES["present"]
    path = write_settings(home, raw)
    run(home, "install")
    (backup,) = path.parent.glob("settings.json.*")
    assert re.match(r"settings\.json\.\d{8}-\d{6}.*\.bak$", backup.name)
    assert backup.read_bytes() == raw
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


@pytest.mark.parametrize("dangling", [False, True])
def test_install_follows_symlinks(home: Home, dangling: bool) -> None:
    """A settings file that is a link stays one; what it names is changed."""
    real = home.path / "dotfiles" / "claude.json"
    real.parent.mkdir()
    path = settings_path(home)
    path.parent.mkdir()
    path.symlink_to(os.path.join("..", "dotfiles", "claude.json"))
    if not dangling:
        real.write_bytes(SHAPES["present"])
    before = tree(home.path)
    assert run(home, "install").code == 0
    assert path.is_symlink()
    assert {e for e, _, _ in commands_in(read(real))} == set(EVENTS)
    assert run(home, "uninstall").code == 0
    assert tree(home.path) == before


MALFORMED = {
    "a comment": b'{\n  // mine\n  "a": 1\n}\n',
    "a trailing comma": b'{"a": 1,}',
    "cut off": b'{"hooks": {"Stop": [',
    "a list": b"[]",
    "no UTF-8": b'{"a": "\xff"}',
    "hooks is a list": b'{"hooks": []}',
    "hooks is null": b'{"hooks": null}',
    "Stop is an object": b'{"hooks": {"Stop": {}}}',
    "env is a text": b'{"env": "x"}',
    "deep": b"[" * 100000,
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_settings_are_refused(home: Home, raw: bytes) -> None:
    """What is no valid settings file is left alone: exit 1, and its name is told."""
    path = write_settings(home, raw)
    before = tree(home.path)
    for command in "install", "uninstall":
        ended = run(home, command)
        assert ended.code == 1
        assert str(path) in ended.err
        assert tree(home.path) == before


def test_read_only_settings_are_refused(home: Home) -> None:
    """A read-only settings file is left alone by install and uninstall: exit 1."""
    path = write_settings(home, SHAPES["present"])
    path.chmod(0o444)
    before = tree(home.path)
    ended = run(home, "install")
    assert (ended.code, tree(home.path)) == (1, before)
    assert str(path) in ended.err
    assert "read-only" in ended.err
    path.chmod(0o644)
    run(home, "install")
    path.chmod(0o444)
    before = tree(home.path)
    ended = run(home, "uninstall")
    assert (ended.code, tree(home.path)) == (1, before)
    assert "read-only" in ended.err


def test_settings_that_are_a_directory_are_refused(home: Home) -> None:
    """Where settings.json is a directory, install says so and exits 1."""
    settings_path(home).mkdir(parents=True)
    ended = run(home, "install")
    assert ended.code == 1
    assert str(settings_path(home)) in ended.err


THEIRS = [
    "~/bin/notify",
    "python3 ~/.claude/hooks/my_telemhq_ping.py",
    "python3 ~/.claude/hooks/telemhq_ping.pyc",
    "~/bin/guard ~/.claude/hooks/telemhq_ping.py",
    "cd /tmp; python3 ~/.claude/hooks/telemhq_ping.py",
    "python3 ~/.claude/hooks/telemhq_ping.py | tee log",
    "TELEMHQ_PROJECT=x python3 ~/.claude/hooks/telemhq_ping.py",
    "cd /tmp\npython3 ~/.claude/hooks/telemhq_ping.py",
    "cd ~/.claude/hooks && python3 -c 'import telemhq_ping; telemhq_ping.hook()'",
    f"cd ~/.claude/hooks && python3 -ESc '{IMPORT}' | tee log",
]


@pytest.mark.parametrize("command", THEIRS[:4])
def test_other_peoples_hooks_are_never_touched(home: Home, command: str) -> None:
    """Neither install nor uninstall changes a hook that is not ours."""
    hook = {"type": "command", "command": command, "timeout": 3, "extra": [1]}
    theirs = {"Stop": [{"hooks": [hook]}], "PreToolUse": [{"hooks": [hook]}]}
    write_settings(home, {"hooks": theirs})
    for _ in range(2):
        run(home, "install")
        found = read(settings_path(home))["hooks"]
        assert found["Stop"][0] == theirs["Stop"][0]
        assert found["PreToolUse"] == theirs["PreToolUse"]
    run(home, "uninstall")
    assert read(settings_path(home)) == {"hooks": theirs}


@pytest.mark.parametrize("command", THEIRS[4:])
def test_a_hook_that_runs_the_script_its_own_way_is_enough(
    home: Home, command: str
) -> None:
    """Where a person's command runs the script, none is added: one ping, not two. With
    it there, uninstall leaves the script, and says so."""
    hooks = {"Stop": [{"hooks": [{"type": "command", "command": command}]}]}
    write_settings(home, {"hooks": hooks})
    run(home, "install")
    assert read(settings_path(home))["hooks"]["Stop"] == hooks["Stop"]
    ended = run(home, "uninstall")
    assert ended.code == 0
    assert "still names the script" in ended.out
    assert installed(home).exists()


OURS = [
    "python3 ~/.claude/hooks/telemhq_ping.py",
    "python3 -I -S ~/.claude/hooks/telemhq_ping.py || true",
    "/usr/bin/python3.8 '/old place/telemhq_ping.py'",
    '"/opt/my python/bin/python3" -I "$HOME/.claude/hooks/telemhq_ping.py" || true',
    "~/.claude/hooks/telemhq_ping.py",
    (
        f"cd ~/.claude/hooks && python3 -ESc '{IMPORT}' || "
        "python3 -I -S ~/.claude/hooks/telemhq_ping.py || true"
    ),
    (
        f"trap '' TERM; cd '/old place' && /usr/bin/python3 -ESc '{IMPORT}' || "
        "/usr/bin/python3 -I -S '/old place/telemhq_ping.py' || true"
    ),
    f"cd ~/.claude/hooks && python3 -ESc '{IMPORT}'",
]


@pytest.mark.parametrize("command", OURS)
def test_an_upgrade_replaces_only_our_commands(home: Home, command: str) -> None:
    """An old command of ours is replaced where it stands; its neighbours stay."""
    mine = {"type": "command", "command": command, "note": "kept"}
    neighbour = {"type": "command", "command": "~/bin/notify"}
    group = {"matcher": "*", "hooks": [neighbour, mine, neighbour]}
    hooks = {"Stop": [OTHER_HOOK, group], "PreCompact": [group]}
    write_settings(home, {"hooks": hooks})
    installed(home).parent.mkdir()
    old = SCRIPT.read_bytes().replace(b'"1.1.0"', b'"0.9.0"')
    installed(home).write_bytes(old)
    ended = run(home, "install")
    assert ended.code == 0
    replaced = f"{installed(home)} is replaced: it is version 0.9.0 of this script."
    assert replaced in ended.out
    found = read(settings_path(home))["hooks"]
    assert list(found) == ["Stop", "PreCompact", "StopFailure", "SessionEnd"]
    assert len(found["Stop"]) == 2
    assert found["Stop"][0] == OTHER_HOOK
    for name in "Stop", "PreCompact":
        new = found[name][-1]
        assert new["matcher"] == "*"
        assert new["hooks"][0] == new["hooks"][2] == neighbour
        assert new["hooks"][1].pop("note") == "kept"
        check_command(home, new["hooks"][1]["command"])
    assert installed(home).read_bytes() == SCRIPT.read_bytes()
    run(home, "uninstall")
    left = {"matcher": "*", "hooks": [neighbour, neighbour]}
    assert read(settings_path(home)) == {
        "hooks": {"Stop": [OTHER_HOOK, left], "PreCompact": [left]}
    }


def test_dry_run_changes_nothing(home: Home) -> None:
    """--dry-run shows the diff, and leaves every file alone."""
    write_settings(home, SHAPES["present"])
    before = tree(home.path)
    ended = run(home, "install", "--url", URL, "--dry-run")
    assert ended.code == 0
    assert re.search(r"(?m)^\+.*TELEMHQ_PING_URL.*https://tracker\.invalid", ended.out)
    assert re.search(r"(?m)^\+.*telemhq_ping\.py", ended.out)
    assert tree(home.path) == before


OLD_URLS = [
    f'"https://old.invalid/ping/{TOKEN}"',
    f'"https:\\/\\/old.invalid\\/ping\\/{TOKEN}"',
    f'\n  "https://old.invalid/ping/{TOKEN}"',
    f'"https://old.invalid?token={TOKEN}"',
    f'"https://user:{TOKEN}@old.invalid/ping/x"',
    f'"old.invalid/ping/{TOKEN}"',
    f'"{TOKEN}"',
]


@pytest.mark.parametrize("old", OLD_URLS)
def test_the_diff_masks_the_urls(home: Home, old: str) -> None:
    """The diff shows no more of the old URL, and of the new one, than the host."""
    command = f"TELEMHQ_PING_URL='https://h.invalid/ping/{TOKEN}' python3 x"
    raw = f'{{"env": {{"A": "1", "TELEMHQ_PING_URL": {old}, "Z": "2"}}, '
    raw += '"hooks": {"Stop": ['
    raw += (
        f'{{"hooks": [{{"type": "command", "command": {json.dumps(command)}}}]}}]}}}}'
    )
    write_settings(home, raw.encode())
    ended = run(home, "install", "--url", URL)  # `run` looks for the token
    assert ended.code == 0
    assert re.search(r"(?m)^-.*TELEMHQ_PING_URL", ended.out)
    assert "https://tracker.invalid" in ended.out
    assert read(settings_path(home))["env"]["TELEMHQ_PING_URL"] == URL


@pytest.mark.parametrize(
    "url",
    [
        "",
        "telemhq.com/ping/" + TOKEN,
        "http://telemhq.com/ping/" + TOKEN,
        "https://u:p@telemhq.com/" + TOKEN,
        "https://telemhq.com/ping/ " + TOKEN,
    ],
)
def test_install_refuses_an_unusable_url(home: Home, url: str) -> None:
    """A URL that the hook would ignore is refused, with the reason, and without it."""
    ended = run(home, "install", "--url", url)
    assert ended.code == 1
    assert "TELEMHQ_PING_URL" in ended.err
    assert not (home.path / ".claude").exists()


def test_tools_registers_tool_activity(home: Home) -> None:
    """--tools adds successes and failures of the same tools, those that change files or
    run commands, as TelemHQ's documentation has it."""
    run(home, "install", "--tools")
    found = commands_in(read(settings_path(home)))
    assert [(name, matcher) for name, matcher, _ in found] == [
        ("Stop", None),
        ("StopFailure", None),
        ("SessionEnd", None),
        ("PostToolUse", "Bash|Edit|MultiEdit|Write"),
        ("PostToolUseFailure", "Bash|Edit|MultiEdit|Write"),
    ]


def test_project_writes_its_local_settings(home: Home) -> None:
    """--project DIR writes DIR/.claude/settings.local.json, and no user settings; its
    uninstall is the inverse."""
    before = tree(home.path)
    assert run(home, "install", "--url", URL, "--project", ".").code == 0
    path = home.project / ".claude" / "settings.local.json"
    assert {e for e, _, _ in commands_in(read(path))} == set(EVENTS)
    assert not settings_path(home).exists()
    assert installed(home).exists()
    assert run(home, "uninstall", "--project", home.project).code == 0
    assert tree(home.path) == before


def test_a_projects_uninstall_leaves_the_users_alone(home: Home) -> None:
    """While the user's settings name the script, a project's uninstall leaves it."""
    run(home, "install", "--url", URL)
    before = tree(home.path)
    run(home, "install", "--project", home.project)
    ended = run(home, "uninstall", "--project", home.project)
    assert ended.code == 0
    assert "still names the script" in ended.out
    after = tree(home.path)
    assert after.pop(os.path.join("acme", "api", ".claude"), None) in (
        None,
        (0o700, None),
    )
    assert after == before


def test_a_project_that_is_not_there_is_refused(home: Home) -> None:
    """A directory that is not there is not made."""
    ended = run(home, "install", "--project", home.path / "typo")
    assert ended.code == 1
    assert "typo" in ended.err
    assert sorted(os.listdir(str(home.path))) == ["acme"]


def test_claude_config_dir_is_honoured(home: Home) -> None:
    """With CLAUDE_CONFIG_DIR, settings and script are there, and ~/.claude is not made;
    a space in the path is no problem."""
    config = home.path / "my config"
    env: dict[str, Any] = {"CLAUDE_CONFIG_DIR": config}
    with Receiver() as receiver:
        assert run(home, "install", "--url", receiver.url, **env).code == 0
        assert not (home.path / ".claude").exists()
        command = commands_in(read(config / "settings.json"))[0][2]
        subprocess.run(
            ["/bin/sh", "-c", command],
            input=json.dumps(event("Stop")).encode(),
            env=home.env(receiver.url, **env),
            check=True,
        )
        assert receiver.wait_for(1)[0]["event"] == "Stop"
        home.quiet()
        assert run(home, "doctor", **env).code == 0
    assert run(home, "uninstall", **env).code == 0
    assert not config.exists()


def test_the_command_avoids_a_virtual_environment(
    home: Home, tmp_path: pathlib.Path
) -> None:
    """Run by a virtual environment's Python, install names the Python behind it."""
    made = tmp_path / "venv"
    make = [sys.executable, "-m", "venv", "--without-pip", str(made)]
    subprocess.run(make, check=True)
    ended = run(home, "install", python=str(made / "bin" / "python"))
    assert ended.code == 0, ended.err
    command = commands_in(read(settings_path(home)))[0][2]
    assert str(made) not in command
    shutil.rmtree(str(made))
    check_command(home, command)


def test_the_command_is_no_shim(home: Home) -> None:
    """Run through pyenv's shim, install names the interpreter itself."""
    shim = shutil.which("python3", path=os.path.expanduser("~/.pyenv/shims"))
    if not shim:
        pytest.skip("no pyenv here")
    root = os.path.expanduser("~/.pyenv")
    ended = run(home, "install", python=shim, PYENV_ROOT=root)
    assert ended.code == 0, ended.err
    assert "shims" not in commands_in(read(settings_path(home)))[0][2]


def test_the_installed_command_sends_pings(home: Home, receiver: Receiver) -> None:
    """The command that install writes, with the env block's URL, delivers a ping from a
    shell with a minimal environment."""
    run(home, "install", "--url", receiver.url)
    found = read(settings_path(home))
    done = subprocess.run(
        ["/bin/sh", "-c", commands_in(found)[0][2]],
        input=json.dumps(event("Stop")).encode(),
        env={"HOME": str(home.path), "PATH": "/nonexistent", **found["env"]},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert receiver.wait_for(1)[0]["event"] == "Stop"
    home.quiet()


def test_the_installed_command_never_blocks(home: Home) -> None:
    """With the script gone, the command exits 0: 2 would block Claude Code."""
    run(home, "install")
    command = commands_in(read(settings_path(home)))[0][2]
    installed(home).unlink()
    done = subprocess.run(
        ["/bin/sh", "-c", command], input=b"{}", env=home.env(), stderr=subprocess.PIPE
    )
    assert done.returncode == 0


def test_install_says_what_is_missing(home: Home) -> None:
    """Without any URL, install says what to do next."""
    assert "export TELEMHQ_PING_URL" in run(home, "install").out
    assert "export TELEMHQ_PING_URL" not in run(home, "install", url=URL).out


def test_the_installed_script_can_install(home: Home) -> None:
    """The installed copy runs the commands, itself too; then nothing changes."""
    run(home, "install", "--url", URL)
    before = tree(home.path)
    assert run(home, "install", "--url", URL, script=installed(home)).code == 0
    assert tree(home.path) == before


def bytecode(home: Home) -> list[str]:
    """The names in `__pycache__` beside the installed script."""
    return sorted(os.listdir(str(installed(home).parent / "__pycache__")))


def test_install_drops_bytecode_and_gives_a_new_time(home: Home) -> None:
    """Python judges bytecode by the source's second and size: install removes what is
    cached, and another version never has its predecessor's time."""
    run(home, "install")
    cached = installed(home).parent / "__pycache__" / "telemhq_ping.cpython-311.pyc"
    cached.write_bytes(b"stale")
    future = time.time() + 1000
    installed(home).write_bytes(SCRIPT.read_bytes().replace(b"1.1.0", b"0.9.9"))
    os.utime(str(installed(home)), (future, future))
    run(home, "install")
    assert bytecode(home) == []
    assert installed(home).read_bytes() == SCRIPT.read_bytes()
    assert int(installed(home).stat().st_mtime) > int(future)


def test_uninstall_removes_only_our_bytecode(home: Home) -> None:
    """uninstall removes the script's bytecode, and leaves that of other hooks."""
    run(home, "install")
    directory = installed(home).parent / "__pycache__"
    for name in ("telemhq_ping.cpython-39.pyc", "mine.cpython-39.pyc"):
        (directory / name).write_bytes(b"")
    run(home, "uninstall")
    assert bytecode(home) == ["mine.cpython-39.pyc"]


def example_command(name: str) -> str:
    """The command of an event in settings.example.json."""
    found = commands_in(read(ROOT / "settings.example.json"))
    return next(command for event, _, command in found if event == name)


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("fault", ["", "cd", "python", "import", "script"])
def test_the_examples_command_in_a_shell(
    home: Home, receiver: Receiver, shell: str, name: str, fault: str
) -> None:
    """The example's command delivers one ping; also when its import fails, for then it
    runs the script. Where nothing can run it ends with 0, and a telemhq_ping.py of the
    project's is never imported, in a HOME with a space in its name, too."""
    odd = Home(home.path / "a b")
    (odd.project / "telemhq_ping.py").write_text("import os; os.mkdir('IMPORTED')")
    hooks = odd.path / ".claude" / "hooks"
    if fault != "cd":
        hooks.mkdir(parents=True)
        shutil.copy(str(SCRIPT), str(hooks))
    if fault == "script":
        (hooks / SCRIPT.name).unlink()
    if fault == "import":  # bytecode that a full disk has cut off
        subprocess.run([sys.executable, "-m", "py_compile", hooks / SCRIPT.name])
        (cached,) = (hooks / "__pycache__").iterdir()
        cached.write_bytes(cached.read_bytes()[:50])
    path = "/nonexistent" if fault == "python" else os.path.dirname(sys.executable)
    done = subprocess.run(
        [shell, "-c", example_command(name)],
        input=json.dumps(event("Stop", hook_event_name=name)).encode(),
        env=odd.env(receiver.url, PATH=path),
        cwd=str(odd.project),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"")
    if fault in ("", "import"):
        assert (b"EOFError" in done.stderr) == bool(fault)
        assert receiver.wait_for(1)[0]["event"] == name
    odd.quiet()
    assert len(receiver.requests) == (fault in ("", "import"))
    assert not (odd.project / "IMPORTED").exists()


# -- uninstall -------------------------------------------------------------------


def test_uninstall_removes_script_and_state(home: Home, receiver: Receiver) -> None:
    """Nothing of ours stays, neither the state nor the directories."""
    run(home, "install", "--url", receiver.url)
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(1)
    home.quiet()
    assert home.state.exists()
    assert run(home, "uninstall").code == 0
    assert sorted(os.listdir(str(home.path))) == ["acme"]


def test_uninstall_leaves_what_others_put_there(home: Home) -> None:
    """Other files in Claude Code's directory, and in the state directory, stay."""
    run(home, "install")
    theirs = [home.path / ".claude" / "hooks" / "mine.py", home.state / "notes.txt"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert run(home, "uninstall").code == 0
    assert all(path.exists() for path in theirs)
    assert not installed(home).exists()


def test_uninstall_after_other_changes_takes_only_ours(home: Home) -> None:
    """What a person has changed since the install stays changed; no backup remains."""
    write_settings(home, {"a": 1, "hooks": {"Stop": [OTHER_HOOK]}})
    run(home, "install", "--url", URL)
    found = read(settings_path(home))
    found["b"] = 2
    write_settings(home, found)
    assert run(home, "uninstall").code == 0
    assert read(settings_path(home)) == {
        "a": 1,
        "hooks": {"Stop": [OTHER_HOOK]},
        "b": 2,
    }
    assert os.listdir(str(settings_path(home).parent)) == ["settings.json"]


def test_a_second_uninstall_changes_nothing(home: Home) -> None:
    """Where nothing is installed, uninstall leaves all as it is, and exits 0."""
    write_settings(home, SHAPES["empty hooks"])
    before = tree(home.path)
    assert run(home, "uninstall").code == 0
    assert tree(home.path) == before


def test_uninstall_refuses_while_pings_wait(home: Home) -> None:
    """Off a terminal, pings that wait are removed only with --yes."""
    url = dead_url()
    run(home, "install", "--url", url)
    place(home, url, 3)
    before = tree(home.path)
    ended = run(home, "uninstall")
    assert ended.code == 1
    assert "3 pings wait" in ended.out
    assert "--yes" in ended.err
    assert tree(home.path) == before
    assert run(home, "uninstall", "--yes").code == 0
    assert sorted(os.listdir(str(home.path))) == ["acme"]


@pytest.mark.parametrize(
    "typed, code", [(b"y\n", 0), (b"n\n", 1), (b"\n", 1), (b"\x04", 1)]
)
def test_uninstall_asks_on_a_terminal(home: Home, typed: bytes, code: int) -> None:
    """On a terminal uninstall asks; only a yes removes pings that wait."""
    url = dead_url()
    run(home, "install", "--url", url)
    place(home, url, 2)
    ended, out = on_a_terminal(home, typed, "uninstall")
    assert "2 pings wait" in out
    assert "[y/N]" in out
    assert ended == code
    assert installed(home).exists() == home.state.exists() == bool(code)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_what_was_removed_stays_removed(home: Home) -> None:
    """A sender that slept through uninstall does not bring the state back."""
    url = dead_url()
    run(home, "install", "--url", url)
    home.hook(event("Stop"), url)
    wait_until(lambda: home.state_json().get("failures"))
    assert home.processes()
    assert run(home, "uninstall", "--yes").code == 0
    home.quiet(30)
    assert sorted(os.listdir(str(home.path))) == ["acme"]


# -- flush -----------------------------------------------------------------------


def backed_off(home: Home) -> None:
    """A back-off of an hour for the one destination."""
    now = time.time()
    home.set_state(failures=3, set_at=now, not_before=now + 3600)


def test_flush_delivers_what_waits(home: Home, receiver: Receiver) -> None:
    """flush sends everything, oldest first, in spite of a back-off, and says so."""
    sent = place(home, receiver.url, 5, 100)
    backed_off(home)
    ended = run(home, "flush", url=receiver.url)
    assert ended.code == 0, ended.err
    assert [ping["event_id"] for ping in receiver.pings] == sent
    assert "5 delivered, 0 left" in ended.out
    assert home.waiting() == []


def test_flush_reads_the_url_from_settings(home: Home, receiver: Receiver) -> None:
    """flush works from the URL that install has put into the settings."""
    run(home, "install", "--url", receiver.url)
    place(home, receiver.url, 1)
    assert run(home, "flush").code == 0
    assert len(receiver.pings) == 1


def test_flush_with_nothing_to_do(home: Home, receiver: Receiver) -> None:
    """An empty outbox is fine: exit 0, no request, no file written."""
    ended = run(home, "flush", url=receiver.url)
    assert ended.code == 0
    assert "0 left" in ended.out
    assert receiver.requests == []
    assert not home.state.exists()


def test_flush_keeps_what_cannot_be_sent(home: Home) -> None:
    """With the server down nothing is lost: exit 1, and what is left is told."""
    url = dead_url()
    place(home, url, 3)
    ended = run(home, "flush", url=url)
    assert ended.code == 1
    assert "0 delivered, 3 left" in ended.out
    assert len(home.waiting()) == 3


def test_flush_without_a_url_fails(home: Home) -> None:
    """Without a URL flush says what is missing, and exits 1."""
    ended = run(home, "flush")
    assert ended.code == 1
    assert "TELEMHQ_PING_URL is not set" in ended.err


def test_flush_counts_refused_pings_apart(home: Home) -> None:
    """A ping that the tracker refuses is not called delivered."""
    with Receiver() as receiver:
        receiver.answer = lambda _: 422 if len(receiver.requests) == 1 else 200
        place(home, receiver.url, 2)
        ended = run(home, "flush", url=receiver.url)
    assert ended.code == 0
    assert "1 delivered, 0 left" in ended.out
    assert "refused" in ended.out


def test_a_flush_that_hangs_says_so(home: Home) -> None:
    """When the watchdog ends a flush, what it said is printed, and it exits 1."""

    def drip(connection: socket.socket) -> None:
        read_request(connection)
        for _ in range(100):
            connection.sendall(b"H")
            time.sleep(0.2)

    with Wire(drip) as wire:
        place(home, wire.url, 1)
        ended = run(home, "flush", url=wire.url, TELEMHQ_TIMEOUT=1)
    assert ended.code == 1
    assert len(home.waiting()) == 1
    assert ended.out


def test_flush_leaves_former_urls_alone(home: Home, receiver: Receiver) -> None:
    """Pings for a former URL never go to the new one by themselves."""
    place(home, dead_url(), 2)
    assert run(home, "flush", url=receiver.url).code == 0
    assert receiver.requests == []
    assert len(home.waiting()) == 2


def test_flush_adopt_moves_former_pings(home: Home, receiver: Receiver) -> None:
    """--adopt sends what waits for former URLs to the present one, with accounts."""
    former = [place(home, dead_url(), 2, 50), place(home, dead_url(), 1, 20)]
    accounts = home.waiting()[0].parent.parent / "accounts"
    accounts.mkdir(mode=0o700)
    (accounts / "0123456789abcdef.json").write_text("{}")
    sent = former[0] + former[1] + place(home, receiver.url, 1)
    ended = run(home, "flush", "--adopt", url=receiver.url)
    assert ended.code == 0, ended.err
    assert [ping["event_id"] for ping in receiver.pings] == sent
    assert home.waiting() == []
    (moved,) = home.state.glob("*/accounts/*.json")
    assert moved.parent.parent != accounts.parent
    assert stat.S_IMODE(moved.parent.stat().st_mode) == 0o700


def test_flush_adopt_with_the_server_down(home: Home) -> None:
    """--adopt with the server down moves the pings and loses none."""
    place(home, dead_url(), 2)
    ended = run(home, "flush", "--adopt", url=dead_url())
    assert ended.code == 1
    assert "2 left" in ended.out
    assert len(home.waiting()) == 2


def test_flush_adopt_leaves_a_sender_at_work_alone(
    home: Home, receiver: Receiver
) -> None:
    """While a sender of the former URL is at work, --adopt moves nothing: exit 1."""
    place(home, dead_url(), 1)
    with open(str(home.waiting()[0].parent.parent / "lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = run(home, "flush", "--adopt", url=receiver.url)
    assert ended.code == 1
    assert "a sender is at work" in ended.err
    assert receiver.requests == []
    assert len(home.waiting()) == 1


def test_flush_waits_for_a_sender(home: Home) -> None:
    """While a sender is at work flush waits; the ping is sent once."""

    def answer(_: object) -> int:
        time.sleep(1)
        return 200

    with Receiver(answer) as receiver:
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(1)
        ended = run(home, "flush", url=receiver.url)
        home.quiet()
        assert ended.code == 0
        assert len(receiver.requests) == 1


def test_the_repository_holds_the_installed_form(home: Home) -> None:
    """settings.example.json registers the same events as install does."""
    run(home, "install")
    example = commands_in(read(ROOT / "settings.example.json"))
    assert [row[:2] for row in example] == [
        row[:2] for row in commands_in(read(settings_path(home)))
    ]
