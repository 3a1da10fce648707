"""The command line, as a person uses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from person import (
    URL,
    install,
    installed,
    on_a_terminal,
    run,
    uninstall,
)
from support import ROOT, SCRIPT, Home, Receiver, pythons, script_command

if TYPE_CHECKING:
    import pathlib


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["--frobnicate"],
        ["--"],
        ["install", "--url"],
        ["doctor", "extra"],
        ["preview", "NoSuchEvent"],
        ["sent", "--yes"],
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
    each option of each command has its meaning. Without arguments it is the same."""
    ended = run(home, "--help")
    assert ended.code == 0
    titles = ("commands", "options", "variables")
    places = [ended.out.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    commands = re.findall(r"(?m)^    (\w+)", ended.out[places[0] : places[1]])
    expected = "demo preview install doctor sent report flush uninstall"
    assert commands == expected.split()
    assert "TELEMHQ_PING_URL" in ended.out[places[2] :]
    for command in commands:
        told = run(home, command, "--help").out
        assert told.startswith(f"usage: telemhq_ping.py {command} ")
        for option in re.findall(r"(?m)^  (-.*)$", told):
            assert "  " in option or f"  {option}\n        " in told
    assert on_a_terminal(home, b"") == (0, ended.out)


@pytest.mark.fault(74)
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


@pytest.mark.parametrize("python", pythons())
def test_every_python_runs_the_commands(
    home: Home, receiver: Receiver, python: str
) -> None:
    """The commands compile and run on every supported Python."""
    assert re.match(r"telemhq_ping \d", run(home, "--version", python=python).out)
    ended = install(home, "--url", receiver.url, python=python)
    assert ended.code == 0, ended.out + ended.err
    assert run(home, "preview", "Stop", python=python).code == 0
    assert uninstall(home, python=python).code == 0
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
    """Where a check mark cannot be printed, marks are plain words."""
    ended = install(home, "--url", receiver.url, PYTHONIOENCODING=encoding)
    assert ended.code == 0, ended.out + ended.err
    assert "ok Stop by" in ended.out
    assert "-- pings from this directory" in ended.out
    installed(home).unlink()
    ended = run(home, "doctor", PYTHONIOENCODING=encoding)
    assert "!! " in ended.out
    assert "?" not in ended.out


@pytest.mark.fault(69)
def test_without_a_home_it_says_so(tmp_path: pathlib.Path) -> None:
    """Where nothing tells the home directory, install refuses and writes nothing."""
    done = subprocess.run(
        script_command("install", "--yes", "--url", URL),
        env={"HOME": "", "PATH": "/usr/bin:/bin"},
        cwd=str(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 1
    assert b"there is no home directory; set CLAUDE_CONFIG_DIR" in done.stderr
    assert os.listdir(str(tmp_path)) == []


def test_a_reader_that_has_seen_enough(home: Home) -> None:
    """A pipe that is closed early, as by head(1), is no error."""
    command = f"'{sys.executable}' '{SCRIPT}' --help | head -n 1"
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=home.env(), capture_output=True
    )
    assert done.stdout.startswith(b"usage: ")
    assert done.stderr == b""
