"""Set-up leaves alone what is not ours, and says what it does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from person import (
    EVENTS,
    PYTHON,
    URL,
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
from support import SCRIPT, SMALL_PATH, TOKEN, Home, Receiver, dead_url, event, place

if TYPE_CHECKING:
    import pathlib

# -- Backups ---------------------------------------------------------------------

THEIR_BACKUPS = ["settings.json.20260101-000000.bak", "settings.json.bak"]


@pytest.mark.parametrize("content", [b"{}", b"no JSON", b'{"env": {"A": "1"}}'])
def test_a_persons_own_backups_stay(home: Home, content: bytes) -> None:
    """uninstall leaves a person's backups alone, whatever their name, also those that
    are no JSON; only install's own go."""
    path = write_settings(home, {"model": "opus"})
    for name in THEIR_BACKUPS:
        (path.parent / name).write_bytes(content)
    before = tree(home.path)
    run(home, "install", "--url", URL)
    assert len(list(path.parent.glob("*.bak"))) == 3
    assert run(home, "uninstall").code == 0
    assert tree(home.path) == before


def test_a_backup_that_was_changed_stays(home: Home) -> None:
    """A backup of install's that a person has edited is theirs: it stays, and nothing
    is restored from it."""
    path = write_settings(home, {"model": "opus"})
    run(home, "install", "--url", URL)
    (backup,) = path.parent.glob("*.bak")
    backup.write_text('{"model": "mine"}')
    assert run(home, "uninstall").code == 0
    assert backup.read_text() == '{"model": "mine"}'
    assert read(path) == {"model": "opus"}


def test_the_record_of_others_is_not_trusted(home: Home) -> None:
    """What install did is noted in installed.json; where others can write that, install
    and uninstall refuse."""
    run(home, "install", "--url", URL)
    record = home.state / "installed.json"
    assert record.stat().st_mode & 0o777 == 0o600
    home.state.chmod(0o777)
    before = tree(home.path)
    for command in ("install", "uninstall"):
        ended = run(home, command)
        assert ended.code == 1
        assert f"{home.state} can be written by others" in ended.err
    assert tree(home.path) == before


# -- A set-up by TelemHQ's documentation -----------------------------------------

THEIR_COMMAND = "python3 ~/.claude/hooks/telemhq_ping.py"
THEIR_HOOK = {"hooks": [{"type": "command", "command": THEIR_COMMAND}]}
THEIR_SETTINGS = {"hooks": {"Stop": [THEIR_HOOK], "StopFailure": [THEIR_HOOK]}}
THEIR_SCRIPT = "#!/usr/bin/env python3\nprint('the sample of the documentation')\n"


@pytest.fixture
def documented(home: Home) -> Home:
    """A HOME with TelemHQ's own settings block and script."""
    write_settings(home, THEIR_SETTINGS)
    installed(home).parent.mkdir()
    installed(home).write_text(THEIR_SCRIPT)
    installed(home).chmod(0o755)
    return home


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_install_says_that_a_script_is_replaced(
    documented: Home, options: list[str]
) -> None:
    """Where another script stands under our name, install says that it is replaced and
    kept; --dry-run says so, too, and replaces nothing."""
    before = tree(documented.path)
    ended = run(documented, "install", *options)
    assert ended.code == 0
    replaced = f"{installed(documented)} is replaced: it is a script that is not this"
    assert replaced in ended.out
    assert "it is kept, and uninstall puts it back" in ended.out
    if options:
        assert tree(documented.path) == before
    else:
        (kept,) = installed(documented).parent.glob("*.bak")
        assert kept.read_text() == THEIR_SCRIPT


def test_uninstall_brings_back_exactly_what_was_there(documented: Home) -> None:
    """After install, its hooks' work and uninstall, TelemHQ's set-up is as it was, byte
    for byte and mode for mode."""
    before = tree(documented.path)
    with Receiver() as receiver:
        run(documented, "install", "--url", receiver.url)
        command = commands_in(read(settings_path(documented)))[0][2]
        subprocess.run(
            ["/bin/sh", "-c", command],
            input=json.dumps(event("Stop")).encode(),
            env=documented.env(receiver.url),
            check=True,
        )
        receiver.wait_for(1)
        documented.quiet()
    run(documented, "install", "--url", URL + "X", "--tools")
    ended = run(documented, "uninstall")
    assert ended.code == 0
    assert "is again the script from before install" in ended.out
    assert tree(documented.path) == before


def test_their_commands_come_back_among_later_changes(documented: Home) -> None:
    """Where a person has changed the settings since, the commands from before install
    come back in their places, and the changes stay."""
    run(documented, "install", "--url", URL)
    found = read(settings_path(documented))
    found["model"] = "opus"
    write_settings(documented, found)
    run(documented, "uninstall")
    expected = {**THEIR_SETTINGS, "model": "opus"}
    assert read(settings_path(documented)) == expected
    assert installed(documented).read_text() == THEIR_SCRIPT


def test_uninstall_without_install_leaves_their_script(documented: Home) -> None:
    """Where install was never run, another script under our name is not ours to remove,
    and neither are its hooks."""
    before = tree(documented.path)
    ended = run(documented, "uninstall")
    assert ended.code == 1
    assert f"{installed(documented)} is not this script" in ended.err
    assert tree(documented.path) == before


def test_uninstall_of_a_set_up_by_hand(home: Home) -> None:
    """A set-up by the README's lines, without install: uninstall takes out script and
    hooks, and leaves the files that install did not make."""
    example = json.loads((SCRIPT.parent / "settings.example.json").read_text("utf-8"))
    write_settings(home, {"model": "opus", **example})
    installed(home).parent.mkdir()
    shutil.copy(str(SCRIPT), str(installed(home)))
    ended = run(home, "uninstall")
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "Removed.")
    assert read(settings_path(home)) == {"model": "opus"}
    assert not installed(home).exists()
    write_settings(home, example)
    run(home, "uninstall")
    assert read(settings_path(home)) == {}


def test_a_link_to_a_checkout_is_no_file_of_ours(home: Home) -> None:
    """Where the script in hooks/ is a link to a checkout, uninstall removes the link,
    and leaves the checkout."""
    checkout = home.path / "checkout.py"
    shutil.copy(str(SCRIPT), str(checkout))
    installed(home).parent.mkdir(parents=True)
    installed(home).symlink_to(checkout)
    run(home, "install", "--url", URL)
    assert installed(home).is_symlink()
    assert run(home, "uninstall").code == 0
    assert not os.path.lexists(str(installed(home)))
    assert checkout.read_bytes() == SCRIPT.read_bytes()


@pytest.mark.parametrize(
    "found", [b"{", b"[]", b'{"made": 1, "settings": {"x": 1, "y": {}}, "script": []}']
)
def test_a_damaged_record_is_as_none(home: Home, found: bytes) -> None:
    """Where installed.json is damaged, uninstall goes by what it recognises."""
    write_settings(home, {"model": "opus"})
    run(home, "install", "--url", URL)
    (home.state / "installed.json").write_bytes(found)
    assert run(home, "uninstall").code == 0
    assert read(settings_path(home)) == {"model": "opus"}
    assert not installed(home).exists()


# -- uninstall says what remains -------------------------------------------------


def test_uninstall_where_nothing_was(home: Home) -> None:
    """Where nothing was installed, uninstall says that, and changes nothing."""
    before = tree(home.path)
    ended = run(home, "uninstall")
    assert (ended.code, ended.out) == (0, "Nothing of it was installed here.\n")
    assert tree(home.path) == before


def test_uninstall_beside_the_plugin(home: Home, receiver: Receiver) -> None:
    """While the plugin is enabled, uninstall says where, and how to remove it, and
    leaves the state to it."""
    plugin = {"enabledPlugins": {"telemhq-ping@telemhq-ping": True}}
    write_settings(home, plugin)
    run(home, "install", "--url", receiver.url)
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(1)
    home.quiet()
    ended = run(home, "uninstall")
    assert f"The plugin is enabled in {settings_path(home)}" in ended.out
    assert "claude plugin uninstall telemhq-ping@telemhq-ping" in ended.out
    assert "Removed." not in ended.out
    assert not installed(home).exists()
    assert home.destination().exists()


@pytest.mark.parametrize("known_by", ["record", "client"])
def test_uninstall_names_other_projects(home: Home, known_by: str) -> None:
    """Another project's settings that name the script are named: those that install has
    written, and those of the projects that the client knows. The script stays."""
    other = home.path / "other"
    other.mkdir()
    run(home, "install", "--url", URL)
    run(home, "install", "--project", other)
    if known_by == "client":
        record = home.state / "installed.json"
        found = read(record)
        found["settings"] = {}
        record.write_text(json.dumps(found))
        projects: dict[str, Any] = {str(other): {}, "/gone": {}}
        known = json.dumps({"projects": projects})
        (home.path / ".claude.json").write_text(known)
    ended = run(home, "uninstall")
    path = other / ".claude" / "settings.local.json"
    assert ended.code == 0
    assert f"{path} still names the script: it stays" in ended.out
    assert "uninstall --project DIR" in ended.out
    assert "Removed." not in ended.out
    assert installed(home).exists()
    ended = run(home, "uninstall", "--project", other)
    assert "Removed." in ended.out
    assert not installed(home).exists()


# -- Where the token ends up -----------------------------------------------------


def git(directory: pathlib.Path, *arguments: str) -> None:
    """Run git there."""
    if not shutil.which("git"):
        pytest.skip("no git")
    subprocess.run(["git", "-C", str(directory), *arguments], check=True)


def test_install_says_that_git_does_not_ignore_the_token(home: Home) -> None:
    """--project in a repository writes the token into a file that git may not ignore:
    install says so, and the line that it gives makes git ignore it."""
    git(home.project, "init", "-q")
    ended = run(home, "install", "--url", URL, "--project", home.project)
    path = home.project / ".claude" / "settings.local.json"
    assert f"Git does not ignore {path}" in ended.out
    remedy = ended.out.splitlines()[-1].strip()
    assert remedy.startswith("echo /.claude/settings.local.json >> ")
    subprocess.run(["/bin/sh", "-c", remedy], check=True, cwd="/")
    git(home.project, "check-ignore", "-q", str(path))
    ended = run(home, "install", "--url", URL + "X", "--project", home.project)
    assert "Git does not ignore" not in ended.out


def test_install_says_nothing_of_git_without_a_token(home: Home) -> None:
    """Where no URL is written, git is no matter."""
    git(home.project, "init", "-q")
    ended = run(home, "install", "--project", home.project)
    assert "Git" not in ended.out


def test_install_says_where_a_link_leads_the_token(home: Home) -> None:
    """Settings that are a link into dotfiles: install says where the token is now, and
    that git does not ignore it there."""
    dotfiles = home.path / "dotfiles"
    dotfiles.mkdir()
    git(dotfiles, "init", "-q")
    real = dotfiles / "claude.json"
    real.write_text("{}")
    settings_path(home).parent.mkdir()
    settings_path(home).symlink_to(real)
    ended = run(home, "install", "--url", URL)
    assert (
        f"{settings_path(home)} is a link: the URL, with its token, is in" in ended.out
    )
    assert str(real) in ended.out
    assert f"Git does not ignore {real}" in ended.out


# -- The diff --------------------------------------------------------------------


def test_the_diff_shows_a_change_of_the_url_alone(home: Home) -> None:
    """A new URL for the same host shows in the diff, though both are masked; the same
    secret has the same mask."""
    run(home, "install", "--url", URL)
    ended = run(home, "install", "--url", URL + "X", "--dry-run")
    changed = re.findall(r'(?m)^([+-]) +"TELEMHQ_PING_URL": "(.*)"', ended.out)
    host = "https://tracker.invalid/"
    assert changed == [("-", host + "<hidden 1>"), ("+", host + "<hidden 2>")]
    assert "@@" not in run(home, "install", "--url", URL).out


def test_the_diff_is_of_the_files_bytes(home: Home) -> None:
    """The lines that the diff takes out are those of the file, and the lines that it
    puts in those of the file to come."""
    raw = (
        '{\n  "permissions": {"allow": ["Bash(ls:*)", "Read"]},\n  "model":   "opus"}\n'
    )
    path = write_settings(home, raw.encode())
    out = run(home, "install").out
    assert '-  "permissions": {"allow": ["Bash(ls:*)", "Read"]},' in out
    assert '-  "model":   "opus"}' in out
    added = [line[1:] for line in out.splitlines() if re.match(r"\+(?!\+\+)", line)]
    new = path.read_text("utf-8").splitlines()
    assert [line for line in added if line not in new] == []


def test_the_diff_masks_other_secrets(home: Home) -> None:
    """Secrets of other tools, too, are masked in what the diff shows around."""
    env = {"ANTHROPIC_API_KEY": "sk-" + TOKEN, "TELEMHQ_PROJECT": "acme"}
    write_settings(home, {"env": env})
    out = run(home, "install", "--url", URL).out  # `run` looks for the token
    assert '"ANTHROPIC_API_KEY": "<hidden' in out
    assert '"TELEMHQ_PROJECT": "acme"' in out


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_duplicate_keys_are_refused(home: Home, command: str) -> None:
    """A file in which a key stands twice would lose one of them: it is left alone, and
    the key is named."""
    raw = b'{"env": {"A": "1"}, "model": "opus", "env": {"TELEMHQ_PING_URL": ""}}'
    path = write_settings(home, raw)
    ended = run(home, command)
    assert ended.code == 1
    assert f'{path} is left as it is: "env" stands there twice' in ended.err
    assert path.read_bytes() == raw


# -- At a terminal ---------------------------------------------------------------


def test_install_asks_for_the_url(home: Home, receiver: Receiver) -> None:
    """At a terminal install asks for the URL, without an echo; shows the diff, asks,
    and ends with doctor's verdict."""
    terminal = Terminal(home, "install")
    terminal.answer("Ping URL (not shown", receiver.url + "\n")
    terminal.answer("Write this? [y/N]", "yes\n")
    code, out = terminal.end()  # which looks for the token
    assert code == 0
    assert read(settings_path(home))["env"]["TELEMHQ_PING_URL"] == receiver.url
    assert out.index("+++") < out.index("Write this?") < out.index("doctor says:")
    said = out[out.index("doctor says:") :]
    assert "✓ a ping arrived from the command for Stop" in said
    assert "✓ tracker at http://127.0.0.1" in said


@pytest.mark.parametrize("typed", ["n\n", "\n", "\x04", "nonsense\n"])
def test_a_no_changes_nothing(home: Home, typed: str) -> None:
    """Whatever is no yes leaves everything as it was: exit 1."""
    before = tree(home.path)
    terminal = Terminal(home, "install", "--url", URL)
    terminal.answer("Write this? [y/N]", typed)
    code, out = terminal.end()
    assert code == 1
    assert "nothing was changed" in out
    assert tree(home.path) == before


@pytest.mark.parametrize("typed", ["y\n", "yes\n", "Y\n", " YES \n"])
def test_yes_is_yes(home: Home, typed: str) -> None:
    """y and yes are a yes, in whatever case."""
    terminal = Terminal(home, "install", "--url", dead_url())
    terminal.answer("Write this? [y/N]", typed)
    assert terminal.end()[0] == 0
    assert installed(home).exists()


def test_install_goes_on_without_a_url(home: Home) -> None:
    """An empty answer is no URL: install goes on, and says what is missing."""
    terminal = Terminal(home, "install")
    terminal.answer("Ping URL (not shown", "\n")
    terminal.answer("Write this? [y/N]", "y\n")
    code, out = terminal.end()
    assert code == 0
    assert "export TELEMHQ_PING_URL" in out
    assert "env" not in read(settings_path(home))


def test_install_asks_nothing_with_yes(home: Home) -> None:
    """With --yes, and where all is as it should be, nothing is asked."""
    url = dead_url()
    code, out = on_a_terminal(home, b"", "install", "--url", url, "--yes")
    assert code == 0
    assert "[y/N]" not in out
    code, out = on_a_terminal(home, b"", "install", "--url", url)
    assert code == 0
    assert "[y/N]" not in out


def test_install_without_a_terminal_asks_nothing(home: Home) -> None:
    """Without a terminal install goes on."""
    ended = run(home, "install")
    assert ended.code == 0
    assert "[y/N]" not in ended.out
    assert installed(home).exists()


@pytest.mark.parametrize(
    "url, words",
    [
        ("https://telemhq.com/ping/", "has no token"),
        ("https://telemhq.com/ping", "has no token"),
        ("https://telemhq.com", "has no token"),
        ("https://telemhq.com/ping/?x=1", "has no token"),
        ("https://telemhq.com/ping/<token>", "<token> stands for your tracker's own"),
    ],
)
def test_a_url_that_was_not_filled_in_is_refused(
    home: Home, url: str, words: str
) -> None:
    """A URL without its token, and the README's <token>, are refused by name."""
    ended = run(home, "install", "--url", url)
    assert ended.code == 1
    assert words in ended.err
    assert not (home.path / ".claude").exists()


# -- Clients before 2.1.78 -------------------------------------------------------


def client(home: Home, version: str) -> str:
    """A PATH with a claude command of that version on it."""
    path = home.path / "bin" / "claude"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{version} (Claude Code)'\n")
    path.chmod(0o755)
    return f"{path.parent}:{SMALL_PATH}"


def events_in(home: Home) -> list[str]:
    """The events in the user's settings."""
    return list(read(settings_path(home))["hooks"])


@pytest.mark.parametrize("version", ["2.1.77", "1.0.128", "2.0.99"])
def test_an_old_client_gets_no_stop_failure(home: Home, version: str) -> None:
    """For a client before 2.1.78, which ignores a whole file that names StopFailure,
    install leaves it out, takes an earlier one of ours out, and says so."""
    run(home, "install")
    assert events_in(home) == EVENTS
    ended = run(home, "install", PATH=client(home, version))
    assert ended.code == 0
    assert events_in(home) == ["Stop", "SessionEnd"]
    assert f"Claude Code {version} ignores settings that name StopFailure" in ended.out
    assert run(home, "uninstall").code == 0
    assert not settings_path(home).exists()


@pytest.mark.parametrize("version", ["2.1.78", "2.1.329", "3.0.0"])
def test_newer_clients_get_all_events(home: Home, version: str) -> None:
    """From 2.1.78 on all events are registered, and nothing is said of it."""
    ended = run(home, "install", PATH=client(home, version))
    assert events_in(home) == EVENTS
    assert "Claude Code" not in ended.out


@pytest.mark.parametrize("said", ["", "error: no such option"])
def test_without_a_client_install_goes_by_a_new_one(home: Home, said: str) -> None:
    """Where no client is found, or none that tells its version, install goes by a new
    one, and says so."""
    path = client(home, said) if said else SMALL_PATH
    ended = run(home, "install", PATH=path)
    assert events_in(home) == EVENTS
    assert "this is for Claude Code 2.1.78 or newer" in ended.out


def test_a_client_outside_the_path_is_found(home: Home) -> None:
    """Claude Code's own places below HOME are looked at, too."""
    client(home, "2.1.50")
    place_of = home.path / ".local" / "bin"
    place_of.parent.mkdir()
    (home.path / "bin").rename(place_of)
    run(home, "install")
    assert events_in(home) == ["Stop", "SessionEnd"]


# -- The interpreter -------------------------------------------------------------


def names_of(home: Home) -> tuple[str, str]:
    """The Pythons in the installed command: that of the import, that of the script."""
    found = re.findall(
        r"(\S+) (?:-ESc|-I)", commands_in(read(settings_path(home)))[0][2]
    )
    return found[0], found[1]


def test_a_stable_path_goes_before_a_versions_own(
    home: Home, tmp_path: pathlib.Path
) -> None:
    """Where a path without a version leads to the same Python, as in Homebrew, install
    names that: it survives an upgrade."""
    version = tmp_path / "Cellar" / "3.11.4" / "bin"
    stable = tmp_path / "bin"
    version.mkdir(parents=True)
    stable.mkdir()
    name = os.path.basename(PYTHON)
    (stable / name).symlink_to(PYTHON)
    ended = run(home, "install", python=PYTHON, PATH=f"{stable}:{SMALL_PATH}")
    assert ended.code == 0
    if re.search(r"\d+\.\d+\.\d+", PYTHON):
        assert names_of(home) == (str(stable / name), str(stable / name))
    else:
        assert names_of(home)[0] == PYTHON


def test_another_python_steps_in_for_a_versions_own(
    home: Home, receiver: Receiver
) -> None:
    """Where only a version's own path is there (pyenv), the script's run names python3:
    when an upgrade has removed that version, pings still arrive."""
    if not re.search(r"\d+\.\d+\.\d+", PYTHON):
        pytest.skip("this Python's path names no version")
    run(home, "install", "--url", receiver.url)
    assert names_of(home) == (PYTHON, "python3")
    command = commands_in(read(settings_path(home)))[0][2]
    subprocess.run(
        ["/bin/sh", "-c", command.replace(PYTHON, "/nonexistent/3.11.4/python3")],
        input=json.dumps(event("Stop")).encode(),
        env=home.env(receiver.url, PATH=f"{os.path.dirname(PYTHON)}:{SMALL_PATH}"),
        stderr=subprocess.DEVNULL,
        check=True,
    )
    assert receiver.wait_for(1)[0]["event"] == "Stop"
    home.quiet()


def test_no_virtual_environment_on_windows(
    script: Any, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    """On Windows, too, a virtual environment's python is not named, but the one behind
    it; paths are as Git Bash takes them."""
    (tmp_path / "python.exe").write_text("")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(os, "name", "nt")
    try:
        assert script.own_interpreter() == str(tmp_path / "python.exe")
        quoted = script.shell_quoted("C:\\Users\\me too\\.claude")
    finally:
        monkeypatch.undo()
    assert quoted == "'C:/Users/me too/.claude'"


# -- Ctrl-C ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, prompt",
    [
        (["install"], "Ping URL (not shown"),
        (["install", "--url", URL], "Write this?"),
        (["preview"], "Paste an event"),
        (["demo"], "Stop:"),
    ],
    ids=["a URL", "a question", "stdin", "demo"],
)
def test_ctrl_c_ends_quietly(home: Home, arguments: list[str], prompt: str) -> None:
    """Ctrl-C ends a command with one line, no traceback, and leaves nothing behind."""
    temporary = home.path / "tmp"
    temporary.mkdir()
    before = tree(home.path)
    terminal = Terminal(home, *arguments, TMPDIR=str(temporary))
    terminal.answer(prompt, "\x03")
    code, out = terminal.end()
    assert code == 130
    assert out.rstrip().splitlines()[-1] == "interrupted"
    home.quiet()
    assert tree(home.path) == before


def test_uninstall_waits_for_a_sender(home: Home) -> None:
    """While a sender is at work uninstall waits for it, and then removes the state."""
    answered: list[int] = []

    def slowly(_: Any) -> int:
        import time

        time.sleep(1)
        answered.append(1)
        return 200

    with Receiver(answer=slowly) as receiver:
        run(home, "install", "--url", receiver.url)
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(1)
        assert run(home, "uninstall", "--yes").code == 0
        assert answered
    home.quiet()
    assert sorted(os.listdir(str(home.path))) == ["acme"]


def test_flush_sends_all_of_a_backlog(home: Home, receiver: Receiver) -> None:
    """What is paced after an outage goes at once when a person flushes."""
    place(home, receiver.url, 60, 100)
    home.set_state(failures=3, set_at=0, not_before=0)
    ended = run(home, "flush", url=receiver.url)
    assert ended.code == 0
    assert "60 delivered, 0 left." in ended.out


def test_the_installed_script_is_the_file(home: Home) -> None:
    """The record names the script's hash, so that uninstall knows it again."""
    run(home, "install")
    digest = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert read(home.state / "installed.json")["script"] == digest
