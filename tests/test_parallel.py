"""Tests that run in several processes: none is left out, and each is told."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent
if sys.platform != "linux":
    pytest.skip("elsewhere one process runs them all", allow_module_level=True)

ONE = """
import os, pathlib, pytest, time

@pytest.fixture(scope="module")
def begun():
    yield os.getpid()
    pathlib.Path("torn-NAME").touch()

def test_first(begun):
    pathlib.Path("pid-NAME").write_text(str(begun))
    os.system("echo said by NAME")
    time.sleep(1)  # the other process takes the other module meanwhile
    assert "NAME" != "b"

@pytest.mark.alone
def test_last():
    assert pathlib.Path("torn-a").exists() and pathlib.Path("torn-b").exists()
    pathlib.Path("pid-last").write_text(str(os.getpid()))

def test_second(begun):
    assert str(begun) == pathlib.Path("pid-NAME").read_text()
    if pathlib.Path("die").exists() and "NAME" == "a":
        os._exit(0)
"""


def path_with(directory: pathlib.Path) -> str:
    """PYTHONPATH with a directory in front."""
    return os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])


def run(path: pathlib.Path, *arguments: str) -> tuple[int, str]:
    """Run two modules of tests, of which one test fails; (exit status, output)."""
    (path / "conftest.py").write_text("pytest_plugins = ['parallel']\n")
    for name in ("a", "b"):
        (path / f"test_{name}.py").write_text(ONE.replace("NAME", name))
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", str(path / "base")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=str(path),
        env={**os.environ, "PYTHONPATH": path_with(TESTS)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def pids(path: pathlib.Path) -> list[str]:
    """Which processes ran the tests of a, of b, and the last ones."""
    return [(path / f"pid-{name}").read_text() for name in ("a", "b", "last")]


def test_all_are_run_and_told(tmp_path: pathlib.Path) -> None:
    """Each module in a process of its own, what is marked so after them; of the one
    that fails all is told."""
    code, out = run(tmp_path, "--jobs", "2")
    assert code == 1
    assert re.search(r"1 failed, 5 passed", out)
    assert "said by b" in out
    assert "said by a" not in out
    assert len(set(pids(tmp_path))) == 3


def test_one_job(tmp_path: pathlib.Path) -> None:
    """One process runs them as pytest does."""
    code, out = run(tmp_path, "--jobs", "1", "-k", "first or second")
    assert (code, "1 failed, 3 passed" in out) == (1, True)
    (tmp_path / "pid-last").touch()
    assert len(set(pids(tmp_path))) == 2


def test_process_that_dies(tmp_path: pathlib.Path) -> None:
    """The tests that it has not told of are missed."""
    (tmp_path / "die").touch()
    code, out = run(tmp_path, "--jobs", "2")
    assert code not in (0, 1)
    assert "1 tests were not run" in out


def test_first_failure_ends_it(tmp_path: pathlib.Path) -> None:
    """With -x no other test is begun, and what was begun is torn down."""
    code, out = run(tmp_path, "--jobs", "2", "-x")
    assert (code, "1 failed" in out) == (1, True)
    assert not (tmp_path / "pid-last").exists()
    assert (tmp_path / "torn-a").exists() or not (tmp_path / "pid-a").exists()
