"""The sender: one at a time, its life, its bounds; and while a hook waits for it."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import threading
import time
from typing import Any, Iterator

import pytest

from scenes import FAST, NO_SENDER, Scene, id_of, ids, lone, put, until, waiting
from support import (
    ONE_LIFE,
    Home,
    Receiver,
    Request,
    Wire,
    dead_url,
    event,
    hook_command,
    is_free,
    only_enqueue,
    patched,
    place,
    read_request,
    run_sender,
    wait_until,
)

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")
linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
SILENT = (0, b"", b"")
DAY_S = 86400
TOOL = event("PostToolUse-Bash")


RELEASE = threading.Event()


@pytest.fixture
def held() -> Iterator[Receiver]:
    """A receiver that withholds its answers until RELEASE is set."""
    RELEASE.clear()
    with Receiver(lambda _: RELEASE.wait(30) and 200) as receiver:
        yield receiver
        RELEASE.set()


# -- From the hook to the sender -------------------------------------------------------


@pytest.mark.fault(29)
def test_the_ping_is_on_disk_before_the_lock_is_tried(home: Home) -> None:
    """Write, rename, then the lock, then the sender: no ping is overlooked. And the
    hook looks into no outbox, however full that is."""
    url, traced = dead_url(), home.path / "traced"
    place(home, url)
    note = f"""
def note(text):
    with open({str(traced)!r}, "a") as file:
        file.write(text + "\\n")
wrap(os, "replace", before=lambda a, b: note("rename" * ("/outbox/" in str(b))))
wrap(fcntl, "flock", before=lambda fd, how: note("lock"))
for name in ("listdir", "scandir"):
    wrap(os, name, before=lambda path, *_: note("list" * ("/outbox" in str(path))))
os.posix_spawn = lambda *a, **k: note("sender")
"""
    patched(home, note, url=url, sent=event("Stop"))
    assert traced.read_text().split() == ["rename", "lock", "sender"]


RAISES = """
def posix_spawn(*_, setsid, **__):
    raise {}
os.posix_spawn = posix_spawn
"""
NO_SPAWN = {
    "PyPy, Termux": "import gc\ndel os.posix_spawn, gc.set_threshold, time.tzset\n",
    "musl": RAISES.format("NotImplementedError('setsid')"),
    "macOS before 10.15": RAISES.format("OSError(22, 'Invalid argument')"),
}


@linux
@pytest.mark.fault(72)
@pytest.mark.parametrize("system", [None, *NO_SPAWN])
def test_a_sender_is_nobodys_child_and_alone(
    home: Home, held: Receiver, system: str | None
) -> None:
    """Own session, no parent of ours, cwd /, null on 0 to 2, and no descriptor but the
    lock: it holds no pipe of the hook's, and its group's death is not the sender's.
    The lock is handed on: when the hook has returned the sender holds it. Hooks start
    no other; it sees what they enqueue. All that without posix_spawn, too."""
    if system:
        done = patched(home, NO_SPAWN[system], url=held.url, sent=event("Stop"))
    else:
        done = home.hook(event("Stop"), held.url)
    assert (done.returncode, done.stdout, done.stderr) == SILENT
    assert not is_free(home.destination() / "lock")
    held.wait_for(1)
    (pid,) = home.processes()
    proc = pathlib.Path("/proc", str(pid))
    fields = (proc / "stat").read_text().rsplit(")", 1)[1].split()
    assert int(fields[1]) != os.getpid()  # its parent
    assert (int(fields[2]), int(fields[3])) == (pid, pid)  # its group and session
    assert os.readlink(proc / "cwd") == "/"
    files = {int(fd.name): os.readlink(fd) for fd in (proc / "fd").iterdir()}
    assert [files.pop(fd) for fd in (0, 1, 2)] == ["/dev/null"] * 3
    targets = [target for target in files.values() if ".so" not in target]  # PyPy's
    kinds = sorted(target.split(":")[0] for target in targets)
    assert kinds == sorted([str(home.destination() / "lock"), "socket"])
    for _ in range(3):
        home.hook(event("Stop"), held.url)
        assert home.processes() == [pid]
    RELEASE.set()
    home.quiet()
    assert len(set(ids(held))) == len(held.requests) == 4
    assert home.waiting() == []


@pytest.mark.fault(7)
def test_fifty_hooks_at_once(home: Home, receiver: Receiver) -> None:
    """Fifty pings delivered, once each, one request at a time."""
    hooks = [home.start(receiver.url) for _ in range(50)]
    for number, hook in enumerate(hooks):
        assert hook.stdin
        hook.stdin.write(json.dumps(event("Stop", prompt_id=f"p-{number}")).encode())
        hook.stdin.flush()
    for hook in hooks:  # all have started: now all go on
        assert hook.stdin
        hook.stdin.close()
    assert [hook.wait(60) for hook in hooks] == [0] * 50
    wait_until(lambda: not home.waiting(), 60)
    home.quiet()
    prompts = sorted(ping["prompt_id"] for ping in receiver.pings)
    assert prompts == sorted(f"p-{number}" for number in range(50))
    assert receiver.most_at_once == 1


OVER = """
real, gone = time.monotonic, []
time.monotonic = lambda: real() + 100 * len(gone)
wrap(os, "unlink", after=lambda *_, **__: gone or gone.append(1))
"""


@pytest.mark.fault(8, 63)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "how, over", [("detached", ""), ("detached", OVER), ("once", "")]
)
def test_a_ping_in_the_last_moment(
    home: Home, receiver: Receiver, moment: str, how: str, over: str
) -> None:
    """A ping that a hook of another process brings around the first unlock is delivered
    without one more, also when the sender's life is over then, or a hook waits for it.
    """
    place(home, receiver.url)
    beside = f"""
import subprocess
seen = []
def unlocked(fd, how):
    if how & fcntl.LOCK_UN and not seen:
        seen.append(1)
        subprocess.run({hook_command()!r}, env={home.env(receiver.url)!r},
            input={json.dumps(event("Stop")).encode()!r})
wrap(fcntl, "flock", {moment}=unlocked)
"""
    name = home.destination().name
    patched(home, over + beside, how, "-1", name, url=receiver.url)
    home.quiet()
    assert len(set(ids(receiver))) == 2
    assert home.waiting() == []


@pytest.mark.fault(83)
@pytest.mark.parametrize("error", ["ENOLCK", "ENOSYS"])
def test_a_file_system_without_locks(
    home: Home, receiver: Receiver, error: str
) -> None:
    """An error of the lock other than "busy" counts as free: hook and sender go on."""
    broken = f"""
import errno
def broken(*_):
    raise OSError(errno.{error}, "no locks")
fcntl.flock = broken
"""
    env: dict[str, Any] = {"TELEMHQ_FOREGROUND": "1"}
    patched(home, broken, url=receiver.url, sent=event("Stop"), **env)
    assert len(receiver.requests) == 1
    place(home, receiver.url)
    run_sender(home, receiver.url, broken + ONE_LIFE)
    assert len(receiver.requests) == 2
    assert home.waiting() == []


# -- A sender's life -------------------------------------------------------------------


@pytest.mark.fault(16)
def test_a_tracker_that_comes_back(home: Home) -> None:
    """A sender that failed stays, without the lock; a tracker that returns within its
    life gets the ping without another hook."""
    scene = Scene(home, until(503, 10))
    scene.play([], lone(1))
    assert scene.delivered()[0] < 60
    url = dead_url()
    home.hook(event("Stop"), url)
    wait_until(lambda: len(list(home.state.glob("*/state.json"))) == 2)
    locks = list(home.state.glob("*/lock"))
    wait_until(lambda: all(map(is_free, locks)))
    assert home.processes()


def test_a_sender_that_slept_looks_again(home: Home) -> None:
    """While it slept, another sender may have been told to wait for long."""
    with Receiver((503, {}, b"")) as receiver:
        place(home, receiver.url)
        name = str(home.destination() / "state.json")
        patch = f"""
def asleep(seconds):
    if seconds > 1:
        with open({name!r}, "w") as file:
            now = time.time()
            file.write('{{"set_at": %d, "not_before": %d}}' % (now - 1, now + 600))
time.sleep = asleep
"""
        run_sender(home, receiver.url, patch)
        assert len(receiver.requests) == 1


def test_a_life_is_a_minute(home: Home, receiver: Receiver) -> None:
    """After 60 s a sender ends; a fresh one goes on with what it had no time for."""
    found = place(home, receiver.url, 10)
    leap = """
real, gone = time.monotonic, []
time.monotonic = lambda: real() + 100 * (len(gone) >= 3)
wrap(os, "unlink", after=lambda path, *_: "/outbox/" in str(path) and gone.append(path))
"""
    run_sender(home, receiver.url, leap)
    log = home.destination() / "sender.log"
    assert "delivered 3 of 10" in log.read_text()
    wait_until(lambda: not home.waiting())
    home.quiet()
    assert ids(receiver) == found
    assert len({line.split()[1] for line in log.read_text().splitlines()}) == 2


def test_an_unexpected_error_backs_off(home: Home, receiver: Receiver) -> None:
    """A sender that fails for an unforeseen reason does not do so at every hook."""
    place(home, receiver.url)
    odd = "import urllib.request\nurllib.request.HTTPHandler = None\n"
    run_sender(home, receiver.url, odd + ONE_LIFE)
    assert home.state_json()["not_before"] > time.time()
    home.hook(event("Stop"), receiver.url)
    assert (receiver.requests, len(home.waiting())) == ([], 2)


def test_oldest_first(home: Home, receiver: Receiver) -> None:
    """Pings go in the order of their events, whatever order they were written in; one
    whose file is named the old way (time and id only) is one as well."""
    late = put(home, receiver.url, ["Stop"] * 3)
    early = put(home, receiver.url, ["Stop"] * 3, time.time() - 5000)
    path = home.waiting()[1]
    path.rename(path.with_name(f"{path.name[:20]}-{id_of(path.name)}.json"))
    run_sender(home, receiver.url)
    assert ids(receiver) == early + late


# -- While a hook waits for it ---------------------------------------------------------


def test_in_the_foreground_all_destinations_are_served(
    home: Home, receiver: Receiver
) -> None:
    """At once, each by a sender that makes one pass over all that waits, and stays for
    no more; when the hook has returned no process remains."""
    place(home, receiver.url, 2)
    more: dict[str, Any] = {"TELEMHQ_DESTINATIONS": "telemhq,otlp"}
    more["TELEMHQ_FOREGROUND"] = "1"
    more["TELEMHQ_OTLP_ENDPOINT"] = receiver.url.partition("/ping")[0]
    begun = time.monotonic()
    home.hook(TOOL, receiver.url, **more)
    assert (len(receiver.requests), home.waiting(), home.processes()) == (4, [], [])
    assert time.monotonic() - begun < 4


@pytest.mark.fault(62)
def test_what_time_is_too_short_for_goes_to_a_detached_sender(home: Home) -> None:
    """No request begins after 5 of 8 s; what is left is handed on, with the lock."""

    def answer(_: Request) -> int:
        time.sleep(0.2)
        return 200

    with Receiver(answer) as receiver:
        found, begun = put(home, receiver.url, ["Stop"] * 12), time.monotonic()
        fast, name = FAST, home.destination().name
        run = patched(home, fast, "once", "-1", name, url=receiver.url)
        assert (run.returncode, run.stdout, run.stderr) == SILENT
        assert 1 <= len(receiver.requests) < 12
        assert time.monotonic() - begun < 5
        assert not is_free(home.destination() / "lock")
        wait_until(lambda: not home.waiting())
        assert (ids(receiver), receiver.most_at_once) == (found, 1)


@pytest.mark.fault(62)
def test_fifty_thousand_in_the_foreground(home: Home, receiver: Receiver) -> None:
    """However much waits, the hook ends within its 8 s; the newest 5,000 are kept, the
    loss is counted."""
    put(home, receiver.url, ["Stop"])
    (first,) = home.waiting()
    ns = int(first.name[:20])
    for n in range(1, 50_000):
        os.link(first, first.parent / f"{ns - n:020d}{first.name[20:]}")
    begun = time.monotonic()
    run = home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND="1")
    assert time.monotonic() - begun < 10
    assert (run.returncode, run.stdout, run.stderr) == SILENT
    home.hook(event("Stop"), receiver.url)  # a slow machine's sender was ended
    wait_until(lambda: not home.waiting(), 60, 0.2)
    # What one has counted that was ended before it went, is counted once more.
    assert 45_001 <= home.state_json()["losses"]["outbox full"] <= 45_102
    assert 5000 <= len(receiver.requests) <= 5002


@pytest.mark.fault(62)
def test_four_hundred_lost_sessions_in_the_foreground(
    home: Home, receiver: Receiver
) -> None:
    """The daily sweep of a slow disk ends with the hook's time, too."""
    place(home, receiver.url)
    accounts = home.destination() / "accounts"
    for n in range(400):
        account = accounts / f"{n:016x}.json"
        account.write_text("{}")
        os.utime(account, (time.time() - 2 * DAY_S,) * 2)
    slow = """
def slow(path, *_, **__):
    if "/accounts/" in str(path):
        real_sleep(0.05)
wrap(os, "open", before=slow)
"""
    begun, name = time.monotonic(), home.destination().name
    patch = FAST + slow
    patched(home, patch, "once", "-1", name, url=receiver.url)
    assert time.monotonic() - begun < 6
    assert len(receiver.requests) == 1
    home.end()


# -- One sender for a burst of events --------------------------------------------------


def delivered(home: Home, receiver: Receiver, count: int) -> bool:
    """Whether so many pings have arrived, once each, and none waits."""
    found = ids(receiver)
    return len(set(found)) == len(found) == count and not home.waiting()


@pytest.mark.parametrize("last", ["Stop", "SessionEnd-other"])
def test_one_sender_serves_a_burst(home: Home, receiver: Receiver, last: str) -> None:
    """After a tool's event the sender stays, and takes what comes: the next hooks start
    no process. With a turn or a session it ends. A foreground hook in the middle does
    not wait for the lock once its ping is gone."""
    home.hook(TOOL, receiver.url)
    wait_until(lambda: delivered(home, receiver, 1))
    (sender,) = home.processes()
    for number, name in enumerate(["PreToolUse-Bash", "PostToolUseFailure-Bash"], 2):
        home.hook(event(name), receiver.url)
        assert home.processes() == [sender]
        wait_until(lambda number=number: delivered(home, receiver, number))  # type: ignore[misc]
    begun = time.monotonic()
    home.hook(TOOL, receiver.url, TELEMHQ_FOREGROUND="1")
    assert delivered(home, receiver, 4)
    assert home.processes() == [sender]
    home.hook(event(last), receiver.url, TELEMHQ_USAGE="0")
    home.quiet()
    assert time.monotonic() - begun < 4
    assert delivered(home, receiver, 5)


@pytest.mark.fault(67)
@pytest.mark.parametrize("answer", [b"200", b"503", b"400", b"302", b""])
def test_what_was_removed_during_a_request_stays_away(
    home: Home, answer: bytes
) -> None:
    """Uninstalled while a request is on its way: no file of it appears again."""

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        shutil.rmtree(home.state)
        connection.sendall(b"HTTP/1.1 " + answer)
        while not answer:
            connection.sendall(b"2")  # until the watchdog ends the sender
            time.sleep(0.1)
        connection.sendall(b" X\r\nContent-Length: 0\r\n\r\n")

    with Wire(talk) as wire:
        only_enqueue(home, wire.url)
        home.hook(TOOL, wire.url, TELEMHQ_TIMEOUT=1)
        wait_until(lambda: wire.connections == 1)
        home.quiet()
        assert wire.connections == 1
    assert not home.state.exists()


# -- Bounds, clocks --------------------------------------------------------------------


@pytest.mark.fault(29)
def test_the_outbox_is_bounded(home: Home) -> None:
    """A hook adds to a full outbox as to any other; the sender keeps 5,000: the oldest
    without usage go first, then the oldest, all counted."""
    url = dead_url()
    old = put(home, url, ["Stop"] * 100, time.time() - 300)
    put(home, url, ["PreToolUse"] * 60, time.time() - 200)
    new = put(home, url, ["Stop"] * 4950, time.time() - 100)
    newest = only_enqueue(home, url)
    run_sender(home, url)
    assert waiting(home) == [*old[51:], *new, id_of(newest.name)]
    assert home.state_json()["losses"]["outbox full"] == 111


@pytest.mark.fault(23)
@pytest.mark.parametrize("offset_s", [-DAY_S, -730 * DAY_S, DAY_S, 730 * DAY_S])
def test_a_clock_that_was_wrong_for_a_while(home: Home, offset_s: int) -> None:
    """After a failure under a wrong clock the first hook of a sane one delivers all; a
    clock that goes wrong ends a back-off, but for one a day ahead."""
    wrong = f"""
wall, wall_ns = time.time, time.time_ns
time.time = lambda: wall() + ({offset_s})
time.time_ns = lambda: wall_ns() + ({offset_s}) * 10**9
"""
    with Receiver(404) as receiver:  # a hold: the longest back-off that is our own
        place(home, receiver.url)
        patched(home, wrong + NO_SENDER, url=receiver.url, sent=event("Stop"))
        run_sender(home, receiver.url, wrong + ONE_LIFE)
        assert (home.state_json()["failures"], len(home.waiting())) == (1, 2)
        receiver.answer = 200
        home.hook(event("Stop"), receiver.url)
        wait_until(lambda: not home.waiting())
        home.quiet()
        place(home, receiver.url)
        now = time.time()
        home.set_state(failures=2, set_at=now - 10, not_before=now + 600)
        run_sender(home, receiver.url, wrong + ONE_LIFE)
        assert home.waiting() == []
    assert not home.state_json()["losses"]
