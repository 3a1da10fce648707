"""The command line, as a person uses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from person import URL, install, on_a_terminal, run, uninstall
from support import ROOT, Home, Receiver, pythons, script_command

if TYPE_CHECKING:
    import pathlib


def test_help_is_for_users(home: Home) -> None:
    """--help tells of every command, then of every variable;
    each option of each command has its meaning. Without arguments it is the same."""
    ended = run(home, "--help")
    assert ended.code == 0
    titles = ("commands", "variables")
    places = [ended.out.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    commands = re.findall(r"(?m)^    (\w+)", ended.out[places[0] : places[1]])
    expected = "demo preview install doctor sent report flush uninstall"
    assert commands == expected.split()
    assert "TELEMHQ_PING_URL" in ended.out[places[1] :]
    for command in commands:
        told = run(home, command, "--help").out
        assert told.startswith(f"usage: telemhq_ping.py {command} ")
        for option in re.findall(r"(?m)^  (-.*)$", told):
            assert "  " in option or f"  {option}\n        " in told
    assert on_a_terminal(home, b"") == (0, ended.out)


@pytest.mark.fault(74)
@pytest.mark.parametrize(
    "module, command",
    [("json", "preview Stop"), ("argparse", "doctor"), ("subprocess", "demo")],
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
    assert re.match(r"\d", run(home, "--version", python=python).out)
    ended = install(home, "--url", receiver.url, python=python)
    assert ended.code == 0, ended.out + ended.err
    assert run(home, "preview", "Stop", python=python).code == 0
    assert uninstall(home, python=python).code == 0
    assert list(home.path.rglob("settings.json*")) == []


@pytest.mark.parametrize("python", pythons(7, 8))
def test_an_old_python_installs_nothing(home: Home, python: str) -> None:
    """3.7, whose hooks would do nothing, is told so."""
    ended = install(home, "--url", URL, python=python)
    assert (ended.code, os.listdir(str(home.path))) == (1, ["acme"])
    assert "it needs Python 3.8 or newer" in ended.err


def test_without_docstrings_there_is_no_help(home: Home) -> None:
    """The commands' options are read from them: that is said."""
    ended = run(home, "doctor", PYTHONOPTIMIZE=2)
    assert (ended.code, ended.out) == (1, "")
    assert "no PYTHONOPTIMIZE=2" in ended.err


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
