"""Runs the tests in several processes at once, which pytest alone cannot.

Three for two processors, for tests wait, too; or `--jobs N`. The tests of a module stay
in one process and in their order, for they share fixtures. Those marked `alone` come
last, one at a time: they would get in the way of others, or others in theirs.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Iterable

import pytest

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

    Module = list[pytest.Item]


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "processes to run the tests in (default: 3 for 2 processors)"
    parser.addoption("--jobs", type=int, metavar="N", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: run last, with no other test beside it")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run all tests, or leave that to pytest, which does without several processes."""
    option = session.config.option
    alone = [item for item in session.items if item.get_closest_marker("alone")]
    modules = modules_of(item for item in session.items if item not in alone)
    jobs = min(option.jobs or usual_jobs(), len(modules))
    if jobs < 2 or session.testsfailed or option.collectonly or option.usepdb:
        return None
    run_together(session, modules, jobs)
    run_in_order(session, alone)
    return True


def usual_jobs() -> int:
    """How many processes do well here; 1 where a forked process is not sound."""
    if sys.platform != "linux":
        return 1
    return len(os.sched_getaffinity(0)) * 3 // 2


def modules_of(items: Iterable[pytest.Item]) -> list[Module]:
    """The tests by module. What takes longest begins first, or it would be waited for
    in the end: Claude Code's sessions, then what is large."""

    def rank(module: Module) -> tuple[bool, int]:
        path = module[0].path
        return not path.name.startswith("test_claude_code"), -path.stat().st_size

    return sorted(
        (list(group) for _, group in itertools.groupby(items, lambda item: item.path)),
        key=rank,
    )


def run_in_order(session: pytest.Session, items: Module) -> None:
    """Run tests as pytest does."""
    for item, following in zip(items, [*items[1:], None]):
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)


def run_together(session: pytest.Session, modules: list[Module], jobs: int) -> None:
    """Run all modules in so many processes, and tell this one's pytest of each test."""
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined] # one
    fork = multiprocessing.get_context("fork")
    todo: SimpleQueue[int | None] = fork.SimpleQueue()
    for number in [*range(len(modules)), *[None] * jobs]:
        todo.put(number)
    workers: dict[connection.Connection, Any] = {}
    for _ in range(jobs):
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=work, args=(session, modules, todo, theirs))
        process.start()
        theirs.close()
        workers[ours] = process
    left = sum(map(len, modules))
    try:
        while workers:
            ready: list[Any] = connection.wait(list(workers))
            for ours in ready:
                if tell_pytest(session, ours):
                    left -= 1
                else:
                    del workers[ours]
        assert not left, f"{left} tests were not run: their process has died"
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join(10)
            process.kill()


def work(
    session: pytest.Session,
    modules: list[Module],
    todo: SimpleQueue[int | None],
    told: connection.Connection,
) -> None:
    """Run one module after the other, as long as there are any."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plugins = session.config.pluginmanager
    capture: Any = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()  # into files of this process
    plugins.unregister(name="terminalreporter")
    plugins.register(Teller(session.config, told))
    try:
        for number in iter(todo.get, None):
            run_in_order(session, modules[number])
    except KeyboardInterrupt:  # end what the tests have begun, and do that once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        session.config.hook.pytest_sessionfinish(session=session, exitstatus=2)


class Teller:
    """Tells the first process of each test that is over."""

    def __init__(self, config: pytest.Config, told: connection.Connection) -> None:
        self.config, self.told = config, told
        self.reports: list[Any] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        make = self.config.hook.pytest_report_to_serializable
        self.reports.append(make(config=self.config, report=report))

    def pytest_runtest_logfinish(
        self, nodeid: str, location: tuple[str, int | None, str]
    ) -> None:
        self.told.send((nodeid, location, self.reports))
        self.reports = []


def tell_pytest(session: pytest.Session, worker: connection.Connection) -> bool:
    """Have a worker's next test reported as if it had run here. False: it is done."""
    config, hook = session.config, session.config.hook
    try:
        nodeid, location, reports = worker.recv()
    except EOFError:
        return False
    hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
    for data in reports:
        report = hook.pytest_report_from_serializable(config=config, data=data)
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True
