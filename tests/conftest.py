"""Fixtures: a HOME of one's own and a receiver, both gone after the test."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Iterator

import pytest

if TYPE_CHECKING:
    import pathlib
    import types

sys.path.insert(0, os.path.dirname(__file__))
sys.dont_write_bytecode = True

from support import SCRIPT, Home, Receiver, load_script  # noqa: E402

pytest_plugins = ["parallel"]

# A shell's background job ignores SIGINT, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart() -> None:
    """The script is installed now: sessions that began an hour ago are older."""
    installed = SCRIPT.stat()
    os.utime(SCRIPT, ns=(installed.st_atime_ns, installed.st_mtime_ns))


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
