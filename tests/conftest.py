"""Fixtures: a HOME of one's own and a receiver, both gone after the test; and how the
tests are spread over several processes (`-n 4`, by pytest-xdist, where it is there)."""

from __future__ import annotations

import os
import py_compile
import signal
import sys
from typing import TYPE_CHECKING, Any, Iterator

import pytest

if TYPE_CHECKING:
    import pathlib
    import types

sys.path.insert(0, os.path.dirname(__file__))
sys.dont_write_bytecode = True

from support import SCRIPT, Home, Receiver, load_script  # noqa: E402

CLIENTS = ("test_claude_code.py", "test_plugin.py")  # the files that drive Claude Code
# A shell's background job ignores SIGINT, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Tests say which faults they hold to."""
    text = "fault(N, ...): holds to these rows of faults.py"
    config.addinivalue_line("markers", text)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to whichever process is free, but for those that drive the real Claude
    Code: they share what was played once, so a file's stay in one process. Theirs are
    the largest groups, and so begin first. (xdist_group needs what pytest 9.2 lacks.)
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if path.endswith(CLIENTS) else nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_sessionstart(session: pytest.Session) -> None:
    """The script is installed now: sessions that began an hour ago are older. All the
    processes run it, so the one that starts them does this, and makes its bytecode."""
    if not hasattr(session.config, "workerinput"):
        installed = SCRIPT.stat()
        os.utime(SCRIPT, ns=(installed.st_atime_ns, installed.st_mtime_ns))
        py_compile.compile(str(SCRIPT), doraise=True)


@pytest.fixture
def home(tmp_path: pathlib.Path) -> Iterator[Home]:
    """A fresh HOME; whatever still runs in it at the end of the test is ended."""
    found = Home(tmp_path / "home")
    yield found
    found.end()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver on loopback that answers 200."""
    with Receiver() as found:
        yield found


@pytest.fixture(scope="session")
def script() -> types.ModuleType:
    """The script as a module."""
    return load_script()
