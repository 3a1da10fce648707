"""install and uninstall, as a person runs them, each in a fresh HOME."""

from __future__ import annotations

import json
import os
import re
import shlex
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
    PYTHON,
    URL,
    Terminal,
    commands_in,
    install,
    installed,
    read,
    run,
    settings_path,
    tree,
    uninstall,
    write_settings,
)
from support import (
    ROOT,
    SCRIPT,
    SMALL_PATH,
    Home,
    Receiver,
    event,
    place,
    script_command,
    wait_until,
)

if TYPE_CHECKING:
    import pathlib

BACKUP = "~/.claude/settings.json.telemhq-backup"
HERE, PLUGIN = "~/.claude/hooks/telemhq_ping.py", "telemhq-ping@telemhq-ping"


def events_in(home: Home) -> list[str]:
    """The events in the user's settings."""
    return list(read(settings_path(home))["hooks"])


# -- What install makes of a settings file ---------------------------------------

USERS = {  # what a person's settings may hold: all of it stays
    "größe": "日本語 \U0001f600 naïve",
    "permissions": {"allow": ["Bash(ls:*)"], "deny": []},
    "numbers": [1, 2.5, 1e-7, True, None, 12345678901234567890],
    "env": {"OTHER": "x"},
}
BOTH = {"hooks": {"Stop": [OTHER_HOOK]}, "env": {"TELEMHQ_PING_URL": URL}}
SHAPES = {
    "empty": b" \n",
    "an empty object": b"{}",
    "lines": json.dumps(USERS, indent=2, ensure_ascii=False).encode() + b"\n",
    "escaped, CRLF": json.dumps(USERS, indent=4).replace("\n", "\r\n").encode(),
    "one line": json.dumps(USERS, separators=(",", ":")).encode(),
    "tabs, byte order mark, half a character": (
        '\ufeff{\n\t"a": "é\\ud83d",\n\t"hooks": {\n\t\t"Stop": []\n\t}\n}\n'.encode()
    ),
    "someone else's hook, the URL by hand": json.dumps(BOTH).encode(),
    "empty hooks, a key twice": b'{"hooks": {}, "env": {"A": "1"},\n "env": {}}',
}


@pytest.mark.parametrize("raw", SHAPES.values(), ids=SHAPES.keys())
def test_install_keeps_everything_else(home: Home, raw: bytes) -> None:
    """All that a settings file holds stays, in its order, and so does its mode, and how
    its lines end. After another install with another URL, and uninstall, HOME is as it
    was, byte for byte and mode for mode."""
    path = write_settings(home, raw)
    path.chmod(0o640)
    at_first = tree(home.path)
    before = json.loads(raw.decode("utf-8-sig")) if raw.strip() else {}
    assert "Installed." in install(home, "--url", URL).out
    found, written = read(path), path.read_bytes()
    assert [key for key in found if key in before] == list(before)
    ours = {key: found[key] for key in ("env", "hooks")}
    assert {**found, **before, **ours} == found
    assert found["env"] == {**before.get("env", {}), "TELEMHQ_PING_URL": URL}
    theirs = before.get("hooks", {}).get("Stop", [])
    assert found["hooks"]["Stop"][: len(theirs)] == theirs
    assert {e for e, _, c in commands_in(found) if SCRIPT.name in c} == set(EVENTS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (b"\r\n" in raw) == (b"\r\n" in written)
    install(home, "--url", URL + "X", "--tools")
    assert uninstall(home).code == 0
    assert tree(home.path) == at_first


@pytest.mark.parametrize("unit", [2, None])
def test_the_text_is_changed_as_little_as_can_be(home: Home, unit: int | None) -> None:
    """What install adds is added to the text: a line of the user's stays that line,
    with its spaces, and what is one line stays one."""
    raw = '{"list":  ["a", "b"],\n\n  "env": {"A": "1"}, "model": "opus"\n}\n'
    raw = raw.replace("{", "{\n  ", 1) if unit else raw.replace("\n", "")
    path = write_settings(home, raw.encode())
    install(home, "--url", URL)
    text = path.read_text()
    hooks = json.dumps({"hooks": read(path)["hooks"]}, indent=2)[1:-2]
    hooks = "," + (hooks if unit else re.sub(r"\n *", " ", hooks))
    url = f', "TELEMHQ_PING_URL": "{URL}"'
    assert text.replace(url, "", 1).replace(hooks, "", 1) == raw


MALFORMED = {
    "a comment": b'{\n  // mine\n  "a": 1\n}\n',
    "hooks is a list": b'{"hooks": []}',
    "Stop is an object": b'{"hooks": {"Stop": {}}}',
    "a number that is none": b'{"a": NaN}',
    "a directory": b"",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_file_that_cannot_be_changed_is_left_alone(home: Home, what: str) -> None:
    """What is no settings file is left alone, by install and uninstall: exit 1, and its
    name is told."""
    if what == "a directory":
        settings_path(home).mkdir(parents=True)
    else:
        write_settings(home, MALFORMED[what])
    before = tree(home.path)
    for command in install, uninstall:
        ended = command(home)
        assert ended.code == 1
        assert "~/.claude/settings.json is left as it is: " in ended.err
        assert tree(home.path) == before


THEIRS = [
    "~/bin/notify",
    "python3 ~/.claude/hooks/my_telemhq_ping.py",
    "python3 ~/.claude/hooks/telemhq_ping.pyc",
    "python3 ~/.claude/hooks/telemhq_ping.py | tee log",
    "python3 ~/.claude/hooks/telemhq_ping.py 'x",
    "~/bin/guard ~/.claude/hooks/telemhq_ping.py",
    "TELEMHQ_PROJECT=x python3 ~/.claude/hooks/telemhq_ping.py",
    "cd /tmp\npython3 ~/.claude/hooks/telemhq_ping.py",
    f"cd ~/.claude/hooks && TELEMHQ_PING_URL={URL} python3 -ESc '{IMPORT}' || true",
    "cd ~/.claude/hooks && python3 -c 'import telemhq_ping; telemhq_ping.hook()'",
    f"cd ~/.claude/hooks && python3 -ESc '{IMPORT}' | tee log",
]
OURS = [
    "python3 ~/.claude/hooks/telemhq_ping.py",
    "python3 -I -S ~/.claude/hooks/telemhq_ping.py || true",
    "/usr/bin/python3.8 '/old place/telemhq_ping.py'",
    '"/opt/my python/bin/python3" -I "$HOME/.claude/hooks/telemhq_ping.py" || true',
    "~/.claude/hooks/telemhq_ping.py",
    commands_in(read(ROOT / "settings.example.json"))[1][2],
    (
        f"trap '' TERM; cd '/old place' && /usr/bin/python3 -ESc '{IMPORT}' || "
        "/usr/bin/python3 -I -S '/old place/telemhq_ping.py' || true"
    ),
    f"cd ~/.claude/hooks && /opt/Python -ESc '{IMPORT}'",
]


def check_command(home: Home, command: str) -> None:
    """The command imports the installed script with an interpreter that is there; when
    that fails, it runs it."""
    words = shlex.split(command.replace("trap '' TERM; ", "", 1))
    assert os.access(words[3], os.X_OK)
    assert words[:3] == ["cd", str(installed(home).parent), "&&"]
    assert words[4:7] == ["-ESc", IMPORT, "||"]
    fallback = ["python3", "-I", "-S", str(installed(home)), "||", "true"]
    assert words[7:] == fallback


def test_an_upgrade_replaces_only_our_commands(home: Home) -> None:
    """Old commands of ours are replaced where they stand, an old script, too; what is
    beside them is never touched. Where a person's own command runs the script none of
    ours is added: one ping, not two."""
    theirs = [{"type": "command", "command": c, "timeout": 3} for c in THEIRS]
    mine = [{"command": command, "note": "kept"} for command in OURS]
    group = {"matcher": "*", "hooks": [*mine, *theirs]}
    write_settings(
        home, {"hooks": {"Stop": [group], "SessionEnd": [{"hooks": theirs}]}}
    )
    installed(home).parent.mkdir()
    installed(home).write_bytes(SCRIPT.read_bytes().replace(b'"1.', b'"0.'))
    assert "Installed." in install(home).out
    found = read(settings_path(home))["hooks"]
    assert list(found) == ["Stop", "SessionEnd", "StopFailure"]
    assert found["SessionEnd"] == [{"hooks": theirs}]
    assert found["Stop"][0]["hooks"][len(OURS) :] == theirs
    for new in found["Stop"][0]["hooks"][: len(OURS)]:
        assert new["note"] == "kept"
        check_command(home, new["command"])
    assert installed(home).read_bytes() == SCRIPT.read_bytes()
    ended = uninstall(home)
    left = {"Stop": [{**group, "hooks": theirs}], "SessionEnd": [{"hooks": theirs}]}
    assert read(settings_path(home)) == {"hooks": left}
    # Without the script theirs would be a veto.
    assert f"not {HERE}: a command in ~/.claude/settings.json may" in ended.out
    assert installed(home).exists()


@pytest.mark.fault(28)
def test_install_into_an_empty_home(home: Home) -> None:
    """Without settings they are made, as settings.example.json has them. Whatever the
    umask, what install makes is for its user only, and uninstall leaves nothing of it.
    Where the tracker is away, that is doctor's verdict, and so the exit status."""
    before, mask = tree(home.path), os.umask(0)
    try:
        ended = install(home, "--url", URL)
    finally:
        os.umask(mask)
    assert (ended.code, "Connection refused" in ended.out) == (1, True)
    assert "~/.claude/settings.json will be made:" in ended.out
    text = settings_path(home).read_text()
    for path, short in (installed(home).parent, "~/.claude/hooks"), (PYTHON, "python3"):
        text = text.replace(str(path), short)
    example = read(ROOT / "settings.example.json")
    assert json.loads(text) == {"env": {"TELEMHQ_PING_URL": URL}, **example}
    assert installed(home).read_bytes() == SCRIPT.read_bytes()
    assert stat.S_IMODE(installed(home).stat().st_mode) == 0o700
    modes = {name: mode for name, (mode, _) in tree(home.path).items()}
    assert not [n for n, mode in modes.items() if n[:7] == ".claude" and mode & 0o077]
    uninstall(home)
    assert tree(home.path) == before
    assert uninstall(home).code == 0  # nothing of it is here


@pytest.mark.fault(27)
@pytest.mark.parametrize("linked", ["settings.json", "hooks", "", "dangling"])
def test_links_into_dotfiles_stay(home: Home, linked: str) -> None:
    """A settings file, a directory of hooks or a ~/.claude that is a link stays one;
    what it leads to is changed, and comes back."""
    dangling = linked == "dangling"
    linked = "settings.json" if dangling else linked
    real, link = home.path / "dotfiles" / "x", home.path / ".claude" / linked
    link.parent.mkdir(exist_ok=True)
    real.parent.mkdir()
    if linked == "settings.json" and not dangling:
        real.write_bytes(SHAPES["lines"])
    elif not dangling:
        real.mkdir()
        (real / "mine").write_text("x")
    link.symlink_to(os.path.relpath(str(real), str(link.parent)))
    before = tree(home.path)
    ended = install(home, "--url", URL)
    assert link.is_symlink()
    assert events_in(home) == EVENTS
    if linked == "settings.json":
        assert "It is a link: what changes is ~/dotfiles/x" in ended.out
    assert uninstall(home).code == 0
    assert tree(home.path) == before


@pytest.mark.parametrize("name", ["it's größe", 'say "$HOME"', "a;b &c"])
def test_a_home_of_any_name(tmp_path: pathlib.Path, name: str) -> None:
    """Whatever a home is called, the installed commands send pings, doctor is content,
    and uninstall leaves it as it was."""
    home = Home(tmp_path / name)
    before = tree(home.path)
    with Receiver() as receiver:
        ended = install(home, "--url", receiver.url, "--send")
        assert ended.code == 0, ended.out + ended.err
        assert receiver.requests[-1].ping["event"] == "Test"
        found = read(settings_path(home))
        done = subprocess.run(
            ["/bin/sh", "-c", commands_in(found)[0][2]],
            input=json.dumps(event("Stop")).encode(),
            env={"HOME": str(home.path), "PATH": "/nonexistent", **found["env"]},
            capture_output=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        wait_until(lambda: [r for r in receiver.requests if r.method == "POST"])
        home.quiet()
    assert uninstall(home).code == 0
    assert tree(home.path) == before


@pytest.mark.parametrize("how", ["--symlinks", "--copies"])
def test_a_virtual_environment_is_not_named(home: Home, how: str) -> None:
    """It comes and goes: the Python that it was made of is the one that stays."""
    if how == "--copies" and sys.version_info < (3, 11):
        pytest.skip("such a one does not tell")
    place = home.path / "venv"
    made = [sys.executable, "-m", "venv", "--without-pip", how, str(place)]
    subprocess.check_call(made)
    install(home, "--url", URL, python=str(place / "bin" / "python"))
    assert str(place) not in settings_path(home).read_text()


# -- What install says, and asks -------------------------------------------------


def test_dry_run_says_all_and_changes_nothing(home: Home) -> None:
    """--dry-run names the script, the lines that change and no others (without the
    URL), the backup, and that others can read the file; and changes nothing. Nor does
    install where nobody can be asked."""
    path = write_settings(home, {"model": "opus", "env": {"A": "1", "KEY": "hidden"}})
    path.chmod(0o644)
    before = tree(home.path)
    ended = run(home, "install", "--url", URL, "--tools")
    assert (ended.code, "--yes asks nothing" in ended.err) == (1, True)
    dry = run(home, "install", "--url", URL, "--tools", "--dry-run")
    assert (dry.code, dry.out) == (0, ended.out + "Nothing was changed.\n")
    said = ended.out.splitlines()
    assert said[0].startswith("~/.claude/hooks/telemhq_ping.py will be this script")
    assert said[1] == "~/.claude/settings.json will change:"
    assert said[2] == '  +    "TELEMHQ_PING_URL": "..."'
    assert said[-3:] == [
        f"As it is now it is kept as {BACKUP}",
        "Others can read it, and the URL in it is a secret:",
        "  chmod 600 ~/.claude/settings.json",
    ]
    assert all(re.match(r"  \+ ", line) for line in said[2:-3])
    assert "hidden" not in ended.out
    assert tree(home.path) == before
    install(home, "--url", URL, "--tools")
    ended = run(home, "install", "--url", URL, "--tools", "--dry-run")
    assert ended.out == "Nothing was changed.\n"


def test_install_at_a_terminal(home: Home, receiver: Receiver) -> None:
    """At a terminal install asks for the URL, without an echo, and again after a bad
    one; says what it will change, and asks; offers a real ping, which alone proves the
    token; and ends with doctor's checks, whose verdict is the exit status."""
    terminal = Terminal(home, "install")
    terminal.answer(ASKED, "telemhq.com/ping/x\n")
    terminal.answer("it must start with https://", "https://telemhq.com/ping/\n")
    terminal.answer("has no token", receiver.url + "\n")
    terminal.answer("Write this? [y/N]", "yes\n")
    terminal.answer("Nothing else proves the token. [y/N]", "y\n")
    code, out = terminal.end()  # which looks for the token
    assert code == 0, out
    assert read(settings_path(home))["env"]["TELEMHQ_PING_URL"] == receiver.url
    assert out.index('+  "env"') < out.index("Write this?") < out.index("Installed.")
    assert out.index("Installed.") < out.index("ok Stop by ~/.claude/settings.json")
    posts = [request.ping for request in receiver.requests if request.body]
    assert [ping["event"] for ping in posts] == ["Test"]


def test_other_trackers_alone_need_no_url(home: Home, receiver: Receiver) -> None:
    """With other trackers only in TELEMHQ_DESTINATIONS no ping URL is asked for."""
    endpoint = receiver.url.rpartition("/ping")[0]
    env = {"TELEMHQ_DESTINATIONS": "otlp", "TELEMHQ_OTLP_ENDPOINT": endpoint}
    write_settings(home, {"env": env})
    terminal = Terminal(home, "install")
    terminal.answer("Write this? [y/N]", "y\n")
    terminal.answer("Nothing else proves the token. [y/N]", "n\n")
    out = terminal.end()[1]
    assert ASKED not in out
    assert read(settings_path(home))["env"] == env


ASKED = "The URL of your tracker (not shown"
WRITE, REMOVE = "Write this? [y/N]", "Remove it? [y/N]"


@pytest.mark.parametrize(
    "command, prompt, typed, words",
    [
        ("install", ASKED, "\x03", "interrupted"),
        ("install --url " + URL, WRITE, "\x03", "interrupted"),
        ("install --url " + URL, WRITE, "n\n", "nothing was changed"),
        ("install --url " + URL, WRITE, "\x04", "interrupted"),
        ("uninstall", REMOVE, "\x03", "interrupted"),
        ("uninstall", REMOVE, "\n", "nothing was changed"),
    ],
)
def test_whatever_is_no_yes_changes_nothing(
    home: Home, command: str, prompt: str, typed: str, words: str
) -> None:
    """A no, an empty answer, Ctrl-D or Ctrl-C at a question: one line, exit 1, no
    traceback, and all is as it was."""
    if command == "uninstall":
        install(home, "--url", URL)
    before = tree(home.path)
    terminal = Terminal(home, *command.split())
    terminal.answer(prompt, typed)
    code, out = terminal.end()
    assert code == 1
    assert out.rstrip().splitlines()[-1].startswith(f"telemhq_ping.py: {words}")
    assert tree(home.path) == before


# -- Faults ----------------------------------------------------------------------


@pytest.mark.fault(26)
@pytest.mark.parametrize("fails", ["script", "backup", "settings"])
def test_a_full_disk_leaves_nothing_half_done(home: Home, fails: str) -> None:
    """Where a file cannot be written, the message names it. Settings come last: without
    a script no command is in them, and no file is half written."""
    size = len(SCRIPT.read_bytes())
    padding = "x" * (size + 2000)
    path = write_settings(home, {"model": padding} if fails != "script" else {})
    most = {"script": 5000, "backup": size + 1000, "settings": size + 2100}[fails]
    before, resource = path.read_bytes(), pytest.importorskip("resource")
    done = subprocess.run(
        script_command("install", "--yes", "--url", URL),
        env=home.env(),
        cwd=str(home.project),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    name = {"script": "hooks/telemhq_ping.py", "backup": BACKUP[10:]}
    where = "~/.claude/" + name.get(fails, "settings.json")
    assert done.returncode == 1
    assert f"{where}: File too large" in done.stderr.decode()
    assert path.read_bytes() == before
    whole = [SCRIPT.read_bytes(), before]
    assert all(found in whole for _, found in tree(home.path).values() if found)


@pytest.mark.parametrize("version", ["1.0.128", "2.1.77", "2.1.78"])
def test_an_old_client_gets_no_stop_failure(home: Home, version: str) -> None:
    """For a client before 2.1.78, which ignores a whole file that names StopFailure,
    install leaves it out, and says so; doctor does not miss it."""
    path = home.path / "bin" / "claude"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\necho '{version} (Claude Code)'\n")
    path.chmod(0o755)
    ended = install(home, "--url", URL, PATH=f"{home.path / 'bin'}:{SMALL_PATH}")
    old = version != "2.1.78"
    assert events_in(home) == (["Stop", "SessionEnd"] if old else EVENTS)
    assert ("Claude Code here is older than 2.1.78" in ended.out) == old
    assert ("-- no hook for StopFailure" in ended.out) == old


# -- uninstall -------------------------------------------------------------------

THEIR_HOOK = {
    "hooks": [{"type": "command", "command": "python3 ~/.claude/hooks/telemhq_ping.py"}]
}
THEIR_SETTINGS = {"hooks": {"Stop": [THEIR_HOOK], "StopFailure": [THEIR_HOOK]}}
THEIR_SCRIPT = "#!/usr/bin/env python3\nprint('the sample of the documentation')\n"


def test_telemhqs_own_set_up_comes_back(home: Home) -> None:
    """Where another script stands under our name, uninstall leaves it and its hooks.
    install says that it is replaced, and where it is kept. After upgrades and uninstall
    that set-up is as it was, byte for byte and mode for mode."""
    own = {"type": "command", "command": THEIRS[6]}  # it will have a script again
    hooks = {**THEIR_SETTINGS["hooks"], "SessionEnd": [{"hooks": [own]}]}
    write_settings(home, {"hooks": hooks})
    installed(home).parent.mkdir()
    installed(home).write_text(THEIR_SCRIPT)
    installed(home).chmod(0o755)
    before = tree(home.path)
    ended = uninstall(home)
    assert ended.code == 1
    assert "~/.claude/hooks/telemhq_ping.py is not this script" in ended.err
    assert tree(home.path) == before
    ended = install(home, "--url", URL)
    kept = installed(home).with_name("telemhq_ping.py.telemhq-backup")
    assert "hooks/telemhq_ping.py is another script" in ended.out
    assert "~/.claude/hooks/" + kept.name in ended.out
    assert kept.read_text() == THEIR_SCRIPT
    install(home, "--url", URL + "X", "--tools")
    ended = uninstall(home)
    assert "telemhq_ping.py, and the one from before install comes back" in ended.out
    assert tree(home.path) == before


def test_uninstall_leaves_no_command_without_its_script(home: Home) -> None:
    """TelemHQ's block without its script would end with 2, a veto: it does not come
    back; nor does a set-up by the README's lines stay."""
    for block in THEIR_SETTINGS, read(ROOT / "settings.example.json"):
        write_settings(home, {"model": "opus", **block})
        install(home)
        assert uninstall(home).code == 0
        assert read(settings_path(home)) == {"model": "opus"}
        assert not installed(home).exists()


def test_uninstall_takes_only_what_is_ours(home: Home) -> None:
    """What a person has changed since the install stays changed, text and all; so do
    files of theirs, other hooks' bytecode among them. No backup remains."""
    theirs = '{"a": [1, 2],\n "hooks": {"Stop": [' + json.dumps(OTHER_HOOK) + "]}}"
    path = write_settings(home, theirs.encode())
    install(home, "--url", URL)
    path.write_text(path.read_text().replace("[1, 2]", "[true,  2]"))
    cache = installed(home).parent / "__pycache__"
    files = [cache / "mine.cpython-39.pyc", home.state / "notes.txt"]
    files.append(home.state / "acme-mail" / "outbox" / "letter")
    for file in (*files, cache / "telemhq_ping.cpython-39.pyc"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    ended = uninstall(home)
    assert (ended.code, "telemhq stays: look what is in it" in ended.out) == (0, True)
    assert path.read_text() == theirs.replace("[1, 2]", "[true,  2]")
    assert all(file.exists() for file in files)
    assert os.listdir(str(cache)) == ["mine.cpython-39.pyc"]
    assert not installed(home).exists()
    assert not path.with_name(path.name + ".telemhq-backup").exists()


def test_uninstall_names_what_it_cannot_remove(home: Home) -> None:
    """What the system does not let go is named, with its word, and exit 1. A project's
    own command that needs the script keeps it."""
    install(home, "--url", URL)
    refuse = "def refuse(path):\n    raise PermissionError(13, 'Permission denied')\n"
    code = f"import os, sys, telemhq_ping as t\n{refuse}os.unlink = refuse\n"
    code += "sys.exit(t.main(['uninstall', '--yes']))"
    env = home.env(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.returncode == 1
    assert b"~/.claude/settings.json: Permission denied" in done.stderr
    path = home.project / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text(json.dumps(THEIR_SETTINGS))
    assert f"not {HERE}: a command in ~/acme/api/" in uninstall(home).out
    assert installed(home).exists()
    path.unlink()
    install(home, "--url", URL)
    path.symlink_to(settings_path(home))  # the user's own, in a repository of dotfiles
    assert uninstall(home).code == 0
    assert not installed(home).exists()


def sent_once(home: Home) -> None:
    """One ping is delivered, for the record."""
    with Receiver() as receiver:
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(1)
        home.quiet()


def test_uninstall_says_what_goes(home: Home) -> None:
    """uninstall names what it would remove: hooks and URL, script, and the state with
    how many pings wait and how many are on record. Nobody asked: nothing is changed.
    --keep-state leaves the state."""
    assert uninstall(home).out == "This goes:\n  nothing.\n"
    sent_once(home)
    install(home, "--url", URL)
    place(home, URL, 2)
    before = tree(home.path)
    ended = run(home, "uninstall")
    assert ended.code == 1
    assert "nothing was changed; --yes asks nothing" in ended.err
    assert tree(home.path) == before
    assert ended.out.splitlines() == [
        "This goes:",
        "  ~/.claude/settings.json: our hooks and the ping URL",
        "  ~/.claude/hooks/telemhq_ping.py",
        "  ~/.claude/telemhq, with the pings that wait: 2 (`flush` sends them),",
        "    and the record of those sent: 1 (--keep-state leaves both)",
    ]
    ended = uninstall(home, "--keep-state")
    assert (ended.code, "telemhq, with" in ended.out) == (0, False)
    assert ended.out.endswith("Removed.\n")
    assert sorted(os.listdir(str(home.state.parent))) == ["telemhq"]
    path = write_settings(home, {"enabledPlugins": {PLUGIN: True}})
    local = home.project / ".claude" / "settings.json"
    local.parent.mkdir()
    local.write_text(json.dumps({"enabledPlugins": {PLUGIN: False}}))
    assert "The plugin in ~/.claude/settings.json stays" in uninstall(home).out
    assert len(home.waiting()) == 2
    path.unlink()
    local.unlink()
    assert uninstall(home).code == 0
    assert sorted(os.listdir(str(home.path))) == ["acme"]


@pytest.mark.fault(67)
def test_uninstall_waits_for_a_sender(home: Home) -> None:
    """While a request is on its way uninstall waits for it; then nothing is left."""
    answered: list[int] = []

    def slowly(_: Any) -> int:
        time.sleep(1)
        answered.append(1)
        return 200

    with Receiver(answer=slowly) as receiver:
        install(home, "--url", URL)
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(1)
        assert uninstall(home).code == 0
        assert answered
    home.quiet()
    assert sorted(os.listdir(str(home.path))) == ["acme"]
