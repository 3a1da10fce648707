"""A person at the command line: what the tests of the commands share."""

from __future__ import annotations

import json
import os
import pathlib
import select
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from support import SCRIPT, TOKEN, script_command

pty = pytest.importorskip("pty", reason="terminals of POSIX")

if TYPE_CHECKING:
    from support import Home

    # relative path: mode, and a file's content or a link's target
    Tree = dict[str, tuple[int, bytes | str | None]]

URL = "http://127.0.0.1:9/ping/" + TOKEN  # where nobody listens
OTHER_HOOK = {"hooks": [{"type": "command", "command": "~/bin/notify 'done' | cat"}]}
IMPORT = "import telemhq_ping as t; t.hook()"
EVENTS = ["Stop", "StopFailure", "SessionEnd"]
PYTHON = sys.executable  # that install names: of a virtual environment, its base
if sys.prefix != sys.base_prefix:
    PYTHON = os.path.realpath(sys.executable)


class Ended:
    """How a command ended: `code`, `out`, `err`."""

    def __init__(self, code: int, out: bytes, err: bytes = b"") -> None:
        self.code, self.out, self.err = code, out.decode("utf-8"), err.decode("utf-8")


def run(
    home: Home,
    *arguments: object,
    sent: bytes = b"",
    script: pathlib.Path = SCRIPT,
    python: str = sys.executable,
    **env: Any,
) -> Ended:
    """Run a command; its output never holds the token."""
    url = env.pop("url", None)
    command = script_command(*map(str, arguments), python=python)
    if script != SCRIPT:
        command = [python, str(script), *map(str, arguments)]
    done = subprocess.run(
        command,
        input=sent,
        capture_output=True,
        env=home.env(url, **env),
        cwd=str(home.project),
        timeout=120,
    )
    assert TOKEN.encode() not in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr
    return Ended(done.returncode, done.stdout, done.stderr)


def install(home: Home, *arguments: object, **env: Any) -> Ended:
    """Install without a question."""
    return run(home, "install", "--yes", *arguments, **env)


def uninstall(home: Home, *arguments: object, **env: Any) -> Ended:
    """Uninstall without a question."""
    return run(home, "uninstall", "--yes", *arguments, **env)


def settings_path(home: Home) -> pathlib.Path:
    """The user's settings file."""
    return home.path / ".claude" / "settings.json"


def write_settings(home: Home, content: object) -> pathlib.Path:
    """Give the user's settings file these bytes, or this value as JSON."""
    path = settings_path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = json.dumps(content, indent=2).encode()
    path.write_bytes(content)
    return path


def read(path: pathlib.Path) -> Any:
    """The JSON in a file."""
    return json.loads(path.read_text("utf-8-sig"))


def commands_in(settings: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    """[(event, matcher, command)] in settings, in order."""
    return [
        (name, group.get("matcher"), hook["command"])
        for name, groups in settings.get("hooks", {}).items()
        for group in groups
        for hook in group["hooks"]
    ]


def installed(home: Home) -> pathlib.Path:
    """Where install puts the script."""
    return home.path / ".claude" / "hooks" / SCRIPT.name


def tree(path: pathlib.Path) -> Tree:
    """{relative path: (mode, content or link)} of everything below a directory."""
    found: Tree = {}
    for top, directories, files in os.walk(str(path)):
        for name in directories + files:
            full = os.path.join(top, name)
            mode = os.lstat(full).st_mode
            content: bytes | str | None = None
            if stat.S_ISLNK(mode):
                content = os.readlink(full)
            elif stat.S_ISREG(mode):
                with open(full, "rb") as file:
                    content = file.read()
            found[os.path.relpath(full, str(path))] = stat.S_IMODE(mode), content
    return found


ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A command on a terminal. out: what it has printed so far."""

    def __init__(self, home: Home, *arguments: str, **env: str) -> None:
        self.out = ""
        self.fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *script_command(*arguments)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
            env=home.env(**{"COLUMNS": "80", "NO_COLOR": "1", **env}),
            cwd=str(home.project),
            start_new_session=True,
        )
        os.close(theirs)

    def read(self) -> bool:
        """Take what it prints; False when it has ended."""
        assert select.select([self.fd], [], [], 60)[0], self.out
        try:
            part = os.read(self.fd, 65536)
        except OSError:  # Linux says EIO when the other side is closed
            part = b""
        self.out += part.decode("utf-8")
        return part != b""

    def answer(self, prompt: str, typed: str) -> None:
        """Wait for a prompt, then type."""
        while prompt not in self.out:
            assert self.read(), self.out
        time.sleep(0.1)  # input() misses a signal between its prompt and its read
        os.write(self.fd, typed.encode())

    def end(self) -> tuple[int, str]:
        """(exit status, output), when it has ended."""
        while self.read():
            pass
        code = self.process.wait()
        os.close(self.fd)
        assert TOKEN not in self.out
        assert "Traceback" not in self.out
        return code, self.out.replace("\r\n", "\n")


def on_a_terminal(
    home: Home, typed: bytes, *arguments: str, **env: str
) -> tuple[int, str]:
    """Run a command on a terminal, type something; (exit status, output)."""
    terminal = Terminal(home, *arguments, **env)
    os.write(terminal.fd, typed)
    return terminal.end()
