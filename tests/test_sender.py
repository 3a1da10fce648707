"""The sender: one at a time, its life, its passes, its bounds, its patience."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from types import ModuleType
from typing import Any, Callable, Iterable, Iterator

import pytest

from support import (
    ONE_LIFE,
    ROOT,
    SCRIPT,
    TOKEN,
    Home,
    Receiver,
    Request,
    Wire,
    dead_url,
    event,
    hook_command,
    only_enqueue,
    patched,
    place,
    read_request,
    run_sender,
    wait_lock_free,
    wait_until,
)

fcntl = pytest.importorskip("fcntl", reason="locks of POSIX")

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
NO_SENDER = "os.posix_spawn = lambda *a, **k: 0\n"


def ids(requests: Iterable[Request]) -> list[str]:
    """The event_ids of requests, in the order of their arrival."""
    return [request.ping["event_id"] for request in list(requests)]


def answers(found: dict[str, int], default: int = 200) -> Callable[[Request], int]:
    """An answer by event_id."""
    return lambda request: found.get(request.ping["event_id"], default)


def end_backoff(home: Home, **changes: object) -> None:
    """Let a back-off, and the pause of every suspect, end now, as time would."""
    state = home.state_json()
    suspects = {name: [pair[0], 0] for name, pair in state["suspects"].items()}
    home.set_state(**{**state, "not_before": 0, "suspects": suspects, **changes})


def charges(home: Home) -> dict[str, int]:
    """event_id -> charges of each ping that has any."""
    found = home.state_json()["suspects"].items()
    return {name[21:53]: pair[0] for name, pair in found if pair[0]}


class Gate:
    """An answer that is withheld until `open` is set."""

    def __init__(self, answer: int = 200) -> None:
        self.answer, self.open = answer, threading.Event()

    def __call__(self, _: Request) -> int:
        self.open.wait(30)
        return self.answer


@pytest.fixture
def gated() -> Iterator[tuple[Receiver, Gate]]:
    """A receiver that withholds its answers, and its gate."""
    gate = Gate()
    with Receiver(gate) as receiver:
        yield receiver, gate
        gate.open.set()


# -- From the hook to the sender ------------------------------------------------------


def test_the_hook_never_lists_the_outbox(home: Home, receiver: Receiver) -> None:
    """However full the outbox is, the hook does not look into it."""
    place(home, receiver.url)
    traced = home.path / "listed"
    note = f"""
def note(path=".", *_):
    with open({str(traced)!r}, "a") as file:
        file.write("%s\\n" % path)
for name in ("listdir", "scandir"):
    wrap(os, name, before=note)
"""
    patched(home, NO_SENDER + note, url=receiver.url, sent=event("Stop"))
    assert len(home.waiting()) == 2
    listed = traced.read_text() if traced.exists() else ""
    assert "outbox" not in listed
    run_sender(home, receiver.url, note + ONE_LIFE)  # whereas a sender must
    assert "outbox" in traced.read_text()


def test_the_ping_is_in_the_outbox_before_the_lock_is_tried(
    home: Home, receiver: Receiver
) -> None:
    """Write, rename, then the lock, then the sender: so no ping is overlooked."""
    traced = home.path / "traced"
    note = f"""
def note(text):
    with open({str(traced)!r}, "a") as file:
        file.write(text + "\\n")
wrap(os, "replace", before=lambda a, b: note("rename" * ("/outbox/" in str(b))))
wrap(fcntl, "flock", before=lambda fd, how: note("lock"))
os.posix_spawn = lambda *a, **k: note("sender")
"""
    patched(home, note, url=receiver.url, sent=event("Stop"))
    assert traced.read_text().split() == ["rename", "lock", "sender"]


def test_the_lock_is_never_free_between_hook_and_sender(
    home: Home, gated: tuple[Receiver, Gate]
) -> None:
    """The hook hands the held lock on: when it has returned, the sender holds it."""
    receiver, gate = gated
    home.hook(event("Stop"), receiver.url)
    with open(str(home.destination() / "lock"), "a") as file, pytest.raises(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    receiver.wait_for(1)
    gate.open.set()
    wait_lock_free(str(home.destination() / "lock"))
    assert (home.destination() / "lock").exists()


@linux
def test_what_kind_of_process_the_sender_is(
    home: Home, gated: tuple[Receiver, Gate]
) -> None:
    """A fresh interpreter, own session, no parent of ours, cwd /, null on 0 to 2."""
    receiver, _ = gated
    held, inherited = os.pipe()
    os.set_inheritable(inherited, True)
    hook = subprocess.Popen(
        hook_command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=home.env(receiver.url),
        cwd=str(home.project),
        start_new_session=True,
        pass_fds=[inherited],
    )
    os.close(inherited)
    hook.communicate(json.dumps(event("Stop")).encode())
    receiver.wait_for(1)
    (pid,) = home.processes()
    proc = pathlib.Path("/proc", str(pid))
    command = (proc / "cmdline").read_bytes().split(b"\0")[:-1]
    words = [os.fsdecode(part) for part in command]
    assert words[1:5] == ["-I", "-S", "-X", "lazy_imports=all"]
    assert words[-5:-2] == [str(ROOT), "telemhq_ping", "detached"]
    assert words[-1] == home.destination().name
    fields = (proc / "stat").read_text().rsplit(")", 1)[1].split()
    assert int(fields[1]) not in (hook.pid, os.getpid())  # its parent
    assert (int(fields[2]), int(fields[3])) == (pid, pid)  # its group and session
    assert os.readlink(str(proc / "cwd")) == "/"
    files = {int(fd.name): os.readlink(str(fd)) for fd in (proc / "fd").iterdir()}
    assert [files.pop(fd) for fd in (0, 1, 2)] == ["/dev/null"] * 3
    targets = [target for target in files.values() if ".so" not in target]  # PyPy's
    kinds = sorted(target.split(":")[0] for target in targets)
    assert kinds == sorted([str(home.destination() / "lock"), "socket"])
    assert os.read(held, 1) == b""  # nobody holds the other end: it was not inherited
    os.close(held)


@linux
def test_one_sender_at_a_time(home: Home, gated: tuple[Receiver, Gate]) -> None:
    """While a sender runs, hooks start no other; it sees what they enqueue."""
    receiver, gate = gated
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(1)
    sender = home.processes()
    for _ in range(4):
        home.hook(event("Stop"), receiver.url)
        assert home.processes() == sender
    gate.open.set()
    home.quiet()
    assert len(set(ids(receiver.requests))) == len(receiver.requests) == 5
    assert home.waiting() == []


def test_fifty_hooks_at_once(home: Home, receiver: Receiver) -> None:
    """Fifty hooks at once: fifty pings delivered, once each, one request at a time."""
    # They are held by their stdin until all have started: within 5 s.
    many = 50 if sys.implementation.name == "cpython" else 20
    begun = [
        subprocess.Popen(
            hook_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=home.env(receiver.url),
            cwd=str(home.project),
            start_new_session=True,
        )
        for _ in range(many)
    ]
    for number, hook in enumerate(begun):
        assert hook.stdin
        sent = event("Stop", prompt_id=f"prompt-{number}")
        hook.stdin.write(json.dumps(sent).encode())
        hook.stdin.flush()
    for hook in begun:  # all have started: now all go on
        assert hook.stdin
        hook.stdin.close()
    for hook in begun:
        assert hook.stdout
        assert hook.stdout.read() == b""
        hook.stdout.close()
        assert hook.wait(30) == 0
    receiver.wait_for(many, timeout=30)
    home.quiet()
    prompts = sorted(ping["prompt_id"] for ping in receiver.pings)
    assert prompts == sorted(f"prompt-{number}" for number in range(many))
    assert receiver.most_at_once == 1
    assert home.waiting() == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_ping_in_the_last_moment(home: Home, receiver: Receiver, moment: str) -> None:
    """A ping that comes around the unlock is delivered without another hook."""
    place(home, receiver.url)
    hook = """
import subprocess
seen = []
def hook(fd, how):
    if how & fcntl.LOCK_UN and not seen:
        seen.append(1)
        hook = {!r}
        subprocess.run(hook, input={!r}, env={!r})
wrap(fcntl, "flock", {}=hook)
""".format(
        hook_command(),
        json.dumps(event("Stop")).encode(),
        home.env(receiver.url),
        moment,
    )
    run_sender(home, receiver.url, hook)
    home.quiet()
    assert len(set(ids(receiver.requests))) == 2
    assert home.waiting() == []


def test_a_file_system_without_locks(home: Home, receiver: Receiver) -> None:
    """An error of the lock other than "busy" counts as free: hook and sender go on."""
    broken = """
import errno
def broken(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = broken
"""
    patched(home, broken, url=receiver.url, sent=event("Stop"))
    receiver.wait_for(1)
    home.quiet()
    place(home, receiver.url)
    run_sender(home, receiver.url, broken + ONE_LIFE)
    assert len(receiver.requests) == 2
    assert home.waiting() == []


def test_a_busy_lock_ends_a_sender(home: Home, receiver: Receiver) -> None:
    """A sender that finds the lock taken sends nothing and ends."""
    place(home, receiver.url)
    with open(str(home.destination() / "lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run_sender(home, receiver.url)
    assert receiver.requests == []
    assert len(home.waiting()) == 1


@pytest.mark.parametrize("name", ["lock", "state.json"])
def test_a_lost_file_is_no_loss(home: Home, receiver: Receiver, name: str) -> None:
    """Lock and state may be deleted: the next hook delivers as ever."""
    place(home, receiver.url, 2)
    run_sender(home, receiver.url)
    (home.destination() / name).unlink()
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(3)
    wait_until(lambda: not home.waiting())


def test_killing_the_hooks_group_spares_the_sender(
    home: Home, gated: tuple[Receiver, Gate]
) -> None:
    """The group that Claude Code kills does not hold the sender."""
    receiver, gate = gated
    patched(
        home,
        "wrap(os, 'posix_spawn', after=lambda *_: os.killpg(0, signal.SIGKILL))",
        url=receiver.url,
        sent=event("Stop"),
    )
    receiver.wait_for(1)
    gate.open.set()
    wait_until(lambda: not home.waiting())
    assert len(receiver.requests) == 1


def test_killing_the_hook_with_all_its_children(home: Home, receiver: Receiver) -> None:
    """A sender that is killed together with the hook: the next hook delivers."""
    family = """
def family(*args, **kwargs):
    os.kill(spawn(*args, **kwargs), signal.SIGKILL)
    die()
spawn, os.posix_spawn = os.posix_spawn, family
"""
    killed = patched(home, family, url=receiver.url, sent=event("Stop"))
    assert killed.returncode == -signal.SIGKILL
    assert len(home.waiting()) == 1
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(2)
    wait_until(lambda: not home.waiting())


# -- A sender's life ------------------------------------------------------------------


def test_a_sender_ends_when_the_outbox_is_empty(home: Home, receiver: Receiver) -> None:
    """No daemon: what has delivered everything is gone."""
    home.hook(event("Stop"), receiver.url)
    wait_until(lambda: not home.waiting())
    home.quiet(10)


@linux
def test_a_server_that_comes_back(home: Home) -> None:
    """A sender that failed stays, without the lock; a tracker that returns within its
    life gets the ping without another hook."""
    url = dead_url()
    home.hook(event("Stop"), url)
    wait_until(lambda: home.state_json().get("failures"))
    not_before = home.state_json()["not_before"]
    (sender,) = home.processes()
    wait_lock_free(str(home.destination() / "lock"))
    home.hook(event("Stop"), url)  # during the back-off it starts nothing
    if time.time() < not_before:
        assert home.processes() == [sender]
    with Receiver(port=int(url.split(":")[2].split("/")[0])) as receiver:
        receiver.wait_for(2, timeout=50)
        wait_until(lambda: not home.waiting())
        home.quiet()
    assert len(set(ids(receiver.requests))) == len(receiver.requests) == 2
    assert home.state_json()["failures"] == 0


@linux
def test_a_backoff_longer_than_its_life_ends_a_sender(home: Home) -> None:
    """Nobody sleeps for 15 minutes in the process table."""
    with Receiver(404) as receiver:
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(1)
        home.quiet()
    assert home.state_json()["not_before"] - time.time() > 400
    assert len(home.waiting()) == 1


@pytest.mark.parametrize("left_s, starts", [(600, False), (-1, True)])
def test_a_standing_backoff_starts_no_sender(
    home: Home, receiver: Receiver, left_s: int, starts: bool
) -> None:
    """A hook starts a sender where no back-off stands, and only there."""
    place(home, receiver.url)
    now, started = time.time(), home.path / "started"
    home.set_state(failures=1, set_at=now - 10, not_before=now + left_s)
    note = f"os.posix_spawn = lambda *a, **k: open({str(started)!r}, 'w').close()"
    patched(home, note, url=receiver.url, sent=event("Stop"))
    assert len(home.waiting()) == 2
    assert started.exists() == starts


@linux
def test_many_hooks_are_one_client(home: Home) -> None:
    """While a back-off lasts, no hook of any session starts a sender."""
    with Receiver(404) as receiver:
        home.hook(event("Stop"), receiver.url)
        wait_until(lambda: home.state_json().get("failures"))
        home.quiet()
        for number in range(12):
            home.hook(event("Stop", session_id=f"session-{number}"), receiver.url)
            assert home.processes() == []
        assert len(receiver.requests) == 1
    assert home.state_json()["failures"] == 1
    assert len(home.waiting()) == 13


def test_the_first_hook_after_a_backoff_delivers(
    home: Home, receiver: Receiver
) -> None:
    """When the back-off is over, any event's hook starts a sender again."""
    place(home, receiver.url, 3)
    now = time.time()
    home.set_state(failures=5, set_at=now - 100, not_before=now + 1000)
    home.hook(event("Notification"), receiver.url)
    assert receiver.requests == []
    home.set_state(failures=5, set_at=now - 100, not_before=now - 1)
    home.hook(event("Notification"), receiver.url)
    receiver.wait_for(5)
    wait_until(lambda: not home.waiting())


def leap_after(pings: int) -> str:
    """A patch under which a minute passes after the n-th ping was delivered."""
    return f"""
real, gone = time.monotonic, []
time.monotonic = lambda: real() + 100 * (len(gone) >= {pings})
wrap(os, "unlink", after=lambda path, *_: "/outbox/" in str(path) and gone.append(path))
"""


def test_a_life_is_a_minute(home: Home, receiver: Receiver) -> None:
    """After 60 s a sender ends; what it has not tried waits for the next hook's."""
    place(home, receiver.url, 10)
    run_sender(home, receiver.url, leap_after(3))
    assert len(receiver.requests) == 3
    assert len(home.waiting()) == 7
    assert not home.state_json()["failures"]
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(11)
    wait_until(lambda: not home.waiting())
    assert len(set(ids(receiver.requests))) == 11


@pytest.mark.parametrize("call", ["socket.getaddrinfo", "urllib.request.HTTPHandler"])
def test_an_unexpected_error_backs_off(home: Home, call: str) -> None:
    """A sender that fails for an unforeseen reason does not do so at every hook."""
    with Receiver() as receiver:
        place(home, receiver.url)
        odd = f"""
import socket, urllib.request
def odd(*_, **__):
    raise RuntimeError("odd")
{call} = odd
"""
        run_sender(home, receiver.url, odd + ONE_LIFE)
        assert home.state_json()["not_before"] > time.time()
        home.hook(event("Stop"), receiver.url)
        assert receiver.requests == []
    assert len(home.waiting()) == 2


# -- Foreground -----------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["TELEMHQ_FOREGROUND", "TELEMHQ_HOOK_DEBUG"])
def test_in_the_foreground_the_hook_delivers(
    home: Home, receiver: Receiver, variable: str
) -> None:
    """When the hook has returned, everything is delivered, and no process remains."""
    place(home, receiver.url, 2)
    env: dict[str, Any] = {variable: "1"}
    home.hook(event("Stop"), receiver.url, **env)
    assert len(receiver.requests) == 3
    assert home.waiting() == []
    assert home.processes() == []


@pytest.mark.parametrize(
    "variable, attempts", [("TELEMHQ_FOREGROUND", 0), ("TELEMHQ_HOOK_DEBUG", 1)]
)
def test_a_backoff_in_the_foreground(home: Home, variable: str, attempts: int) -> None:
    """A foreground hook obeys a back-off; a debugging one tries once and says so."""
    with Receiver(503) as receiver:
        place(home, receiver.url)
        now = time.time()
        home.set_state(failures=3, set_at=now - 5, not_before=now + 500)
        env: dict[str, Any] = {variable: "1"}
        run = home.hook(event("Stop"), receiver.url, **env)
        # After a 5xx the other ping is asked, too.
        assert (len(receiver.requests) > 0) == attempts
    assert (b"back-off" in run.stderr) == attempts
    assert len(home.waiting()) == 2


def test_a_busy_lock_in_the_foreground(home: Home, receiver: Receiver) -> None:
    """A foreground hook waits for the lock, but 8 s at most in all."""
    place(home, receiver.url)
    ten_times = """
real, sleep = time.monotonic, time.sleep
time.monotonic = lambda: real() * 10
time.sleep = lambda s: sleep(s / 10)
"""
    with open(str(home.destination() / "lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begun = time.monotonic()
        run = patched(
            home,
            ten_times,
            url=receiver.url,
            sent=event("Stop"),
            TELEMHQ_FOREGROUND="1",
        )
        assert 0.7 < time.monotonic() - begun < 8  # not ten times as long
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    assert receiver.requests == []
    assert len(home.waiting()) == 2


def test_a_lock_that_comes_free_in_the_foreground(
    home: Home, receiver: Receiver
) -> None:
    """A foreground hook that waited for the lock delivers when it comes free."""
    place(home, receiver.url)
    with open(str(home.destination() / "lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        timer = threading.Timer(0.7, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND="1")
        timer.join()
    assert len(receiver.requests) == 2
    assert home.waiting() == []


def test_a_machine_without_dev_fd(home: Home, receiver: Receiver) -> None:
    """Where descriptors cannot be listed (a container without /proc), pings go too."""
    hide = "real = os.listdir\ndef listdir(path='.'):\n    if path == '/dev/fd':\n"
    hide += "        raise FileNotFoundError(path)\n    return real(path)\n"
    hide += "os.listdir = listdir\n"
    patched(home, hide, url=receiver.url, sent=event("Stop"))
    assert len(receiver.wait_for(1)) == 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_shell_that_ignores_sigterm_makes_no_sender_that_does(home: Home) -> None:
    """Behind `trap '' TERM` the sender can still be ended by SIGTERM."""

    def answer(_: object) -> int:
        time.sleep(2)
        return 200

    with Receiver(answer) as receiver:
        line = f"trap '' TERM; exec {sys.executable} -I -S {SCRIPT}"
        raw = json.dumps(event("Stop")).encode()
        subprocess.run(
            ["/bin/sh", "-c", line], input=raw, env=home.env(receiver.url), check=True
        )
        receiver.wait_for(1)
        (sender,) = home.processes()
        with open(f"/proc/{sender}/status") as file:
            (ignored,) = [row.split()[1] for row in file if row.startswith("SigIgn")]
        assert not int(ignored, 16) >> (signal.SIGTERM - 1) & 1


def test_a_tls_handshake_without_an_answer_is_retried(home: Home) -> None:
    """A server that takes the connection and says nothing is down, not set up wrong."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"https://127.0.0.1:{server.getsockname()[1]}/ping/{TOKEN}"
        place(home, url)
        run_sender(home, url, TELEMHQ_TIMEOUT="1")
    assert home.state_json()["problem"]["verdict"] == "not now"
    assert home.state_json()["problem"]["what"] == "timed out"
    assert len(home.waiting()) == 1


# -- Passes ---------------------------------------------------------------------------


def test_oldest_first(home: Home, receiver: Receiver) -> None:
    """Pings go in the order of their events, whatever order they were written in."""
    late = place(home, receiver.url, 3)
    early = place(home, receiver.url, 3, age_s=5000)
    run_sender(home, receiver.url)
    assert ids(receiver.requests) == early + late


@pytest.mark.parametrize("status", [408, 425, 429])
def test_an_answer_that_is_not_about_the_ping_ends_the_pass(
    home: Home, status: int
) -> None:
    """Not now: one request a pass, all is kept, nobody is suspected."""
    with Receiver(status) as receiver:
        waiting = place(home, receiver.url, 4)
        run_sender(home, receiver.url)
        assert ids(receiver.requests) == waiting[:1]
    assert len(home.waiting()) == 4
    assert not home.state_json()["suspects"]


@pytest.mark.parametrize("status", [500, 503, 599, 409, 302, 401, 404, 400, 422])
def test_an_answer_that_may_be_the_pings_fault_is_asked_about(
    home: Home, status: int
) -> None:
    """The next ping and the newest are tried once; if they fail too, it is the server:
    all is kept, nobody charged."""
    with Receiver(status) as receiver:
        waiting = place(home, receiver.url, 4)
        run_sender(home, receiver.url)
        assert ids(receiver.requests) == [waiting[0], waiting[1], waiting[3]]
    assert len(home.waiting()) == 4
    assert not charges(home)
    state = home.state_json()
    assert not state["losses"]
    assert state["failures"] == 1


@pytest.mark.parametrize("silent", [True, False])
def test_no_answer_after_connecting_is_as_a_5xx(home: Home, silent: bool) -> None:
    """Silence or a closed connection: two other pings are tried, then no more."""

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        if silent:
            wire.over.wait(30)

    with Wire(talk) as wire:
        place(home, wire.url, 4)
        run_sender(home, wire.url, TELEMHQ_TIMEOUT=1)
        assert wire.connections == 3
    assert len(home.waiting()) == 4
    assert (home.state_json()["failures"], charges(home)) == (1, {})


def test_a_ping_that_alone_is_not_answered_is_charged(home: Home) -> None:
    """Of five the server stays silent on one: the four are delivered, it is charged."""
    silent = []

    def answer(request: Request) -> int:
        if request.ping["event_id"] in silent:
            time.sleep(3)
        return 200

    with Receiver(answer) as receiver:
        waiting = place(home, receiver.url, 5)
        silent.append(waiting[1])
        run_sender(home, receiver.url, TELEMHQ_TIMEOUT=1)
        assert ids(receiver.requests) == waiting
    (kept,) = home.waiting()
    assert waiting[1] in kept.name
    assert charges(home) == {waiting[1]: 1}


@pytest.mark.parametrize("bad", [0, 3, 9])
def test_one_poisoned_ping_does_not_stop_the_others(home: Home, bad: int) -> None:
    """One ping always answered 500: the others flow in the same pass; it is charged."""
    with Receiver() as receiver:
        waiting = place(home, receiver.url, 10)
        receiver.answer = answers({waiting[bad]: 500})
        run_sender(home, receiver.url)
        assert ids(receiver.requests) == waiting
    (kept,) = home.waiting()
    assert waiting[bad] in kept.name
    # The last one has no witness.
    assert charges(home) == ({} if bad == 9 else {waiting[bad]: 1})
    assert not (home.destination() / "refused").exists()


@pytest.mark.parametrize(
    "age_s, passes, aside", [(3900, 8, True), (3300, 9, False)], ids=["old", "young"]
)
def test_poison_needs_eight_charges_and_an_hour(
    home: Home, age_s: int, passes: int, aside: bool
) -> None:
    """A ping is poison when it has 8 charges and is also an hour old, not before."""
    with Receiver() as receiver:
        (bad,) = place(home, receiver.url, age_s=age_s)
        receiver.answer = answers({bad: 500})
        for _ in range(passes):
            assert len(home.waiting()) == 1  # seven charges do not suffice
            place(home, receiver.url)
            run_sender(home, receiver.url)
            end_backoff(home)
        assert len(receiver.requests) == 2 * passes
    assert len(home.waiting()) == (not aside)
    refused = home.destination() / "refused"
    assert len(list(refused.iterdir()) if refused.exists() else []) == aside
    assert sum(home.state_json()["losses"].values()) == aside


def test_two_poisoned_pings_apart(home: Home) -> None:
    """Each ping that fails beside one that is accepted is charged by itself."""
    with Receiver() as receiver:
        waiting = place(home, receiver.url, 6)
        receiver.answer = answers({waiting[1]: 500, waiting[4]: 503})
        run_sender(home, receiver.url)
        assert ids(receiver.requests) == waiting
    assert len(home.waiting()) == 2
    assert charges(home) == {waiting[1]: 1, waiting[4]: 1}


def test_a_refused_ping_behind_a_poisoned_one(home: Home) -> None:
    """A 400 right behind a 500 is set aside, and the rest of the queue flows."""
    with Receiver() as receiver:
        waiting = place(home, receiver.url, 5)
        receiver.answer = answers({waiting[0]: 500, waiting[1]: 400})
        for _ in range(3):
            run_sender(home, receiver.url)
            end_backoff(home)
        assert set(waiting[2:]) <= set(ids(receiver.requests))
    (kept,) = home.waiting()
    assert waiting[0] in kept.name


HUNDRED_LIVES = (
    ONE_LIFE
    + """
import http.client, ssl, urllib.request
wall, wall_ns, ahead = time.time, time.time_ns, [0]
time.time = lambda: wall() + ahead[0]
time.time_ns = lambda: wall_ns() + ahead[0] * 10**9
sys.path.insert(0, directory)
for n in range(100):
    pid = os.fork()
    if not pid:
        import telemhq_ping
        telemhq_ping.sender()
    os.waitpid(pid, 0)
    ahead[0] += 1000  # beyond the longest back-off of a retry
os._exit(0)
"""
)


def test_a_server_that_is_down_for_a_hundred_passes(home: Home) -> None:
    """A whole server answering 500 for a day: none charged, dropped or set aside."""
    with Receiver(500) as receiver:
        waiting = place(home, receiver.url, 5, age_s=7200)
        run_sender(home, receiver.url, HUNDRED_LIVES)
        # Three to find out whose fault it is, two, and then, all suspects, one a pass.
        assert len(receiver.requests) == 103
        assert set(ids(receiver.requests)) == set(waiting)
        state = home.state_json()
        assert (charges(home), state["losses"]) == ({}, {})
        assert state["failures"] >= 20
        assert len(home.waiting()) == 5
        assert not (home.destination() / "refused").exists()
        receiver.answer = 200
        home.set_state(**dict(state, set_at=0, not_before=0))
        run_sender(home, receiver.url)
    assert home.waiting() == []


def test_a_hundred_refused_pings(home: Home) -> None:
    """400 for the first hundred: set aside, counted; the rest goes in that pass."""
    with Receiver() as receiver:
        waiting = place(home, receiver.url, 105)
        receiver.answer = answers(dict.fromkeys(waiting[:100], 400))
        run_sender(home, receiver.url)
        assert sorted(ids(receiver.requests)) == sorted(waiting)
    assert home.waiting() == []
    assert len(list((home.destination() / "refused").iterdir())) == 100
    state = home.state_json()
    assert list(state["losses"].values()) == [100]
    assert state["failures"] == 0


def test_the_newest_hundred_of_the_refused_are_kept(home: Home) -> None:
    """refused/ is for a person to look at: the newest hundred; all are counted."""
    with Receiver() as receiver:
        waiting = place(home, receiver.url, 120)
        receiver.answer = answers(dict.fromkeys(waiting, 422))
        place(home, receiver.url, 10)
        run_sender(home, receiver.url)
    kept = sorted(path.name for path in (home.destination() / "refused").iterdir())
    assert [name[21:53] for name in kept] == waiting[20:]
    assert sum(home.state_json()["losses"].values()) == 120


def test_a_delivery_ends_the_row_of_failures(home: Home) -> None:
    """The n of the back-off is of failures in a row: a delivery starts it anew."""
    with Receiver(503) as receiver:
        place(home, receiver.url)
        for n in (1, 2, 3):
            run_sender(home, receiver.url)
            assert home.state_json()["failures"] == n
            end_backoff(home)
        receiver.answer = 200
        run_sender(home, receiver.url)
        assert home.state_json()["failures"] == 0
        place(home, receiver.url)
        receiver.answer = 503
        run_sender(home, receiver.url)
    assert home.state_json()["failures"] == 1


# -- Pacing ---------------------------------------------------------------------------


def test_after_an_outage_a_backlog_goes_slowly(home: Home) -> None:
    """A pass after a failed one: a probe and 24 more, then 30 to 90 s, till the end."""
    with Receiver(429) as receiver:
        waiting = place(home, receiver.url, 120)
        run_sender(home, receiver.url)
        receiver.answer, sent = 200, []
        for most in (25, 75, 120):
            end_backoff(home, paced_until=0)
            before = len(receiver.requests)
            run_sender(home, receiver.url)
            sent += ids(receiver.requests)[before:]
            assert sent == waiting[:most]
            state = home.state_json()
            assert (state["failures"], state["not_before"]) == (0, 0)
            if most < 120:
                assert 29 <= state["paced_until"] - time.time() <= 90
        assert state["recovered_at"] == state["paced_until"] == 0
        waiting = place(home, receiver.url, 60)
        before = len(receiver.requests)
        run_sender(home, receiver.url)
        assert ids(receiver.requests)[before:] == waiting  # no outage: not paced


def test_after_an_outage_the_first_is_a_probe(home: Home) -> None:
    """While the server is still not itself, a whole backlog costs it one request."""
    with Receiver(429) as receiver:
        place(home, receiver.url, 60)
        for attempts in (1, 2, 3):
            run_sender(home, receiver.url)
            assert len(receiver.requests) == attempts
            end_backoff(home)


def test_a_life_that_ends_does_not_end_the_pacing(home: Home) -> None:
    """A paced pass that its sender's life cuts short is followed by a paced one."""
    with Receiver(429) as receiver:
        place(home, receiver.url, 60)
        run_sender(home, receiver.url)
        end_backoff(home)
        receiver.answer = 200
        before = len(receiver.requests)
        run_sender(home, receiver.url, leap_after(5) + ONE_LIFE)
        assert len(receiver.requests) - before == 5
        run_sender(home, receiver.url)
        assert len(receiver.requests) - before <= 5 + 25


def test_a_large_backlog_without_an_outage_is_not_paced(
    home: Home, receiver: Receiver
) -> None:
    """Three hundred pings of an hour offline go in one pass when nothing has failed."""
    waiting = place(home, receiver.url, 300)
    run_sender(home, receiver.url)
    assert ids(receiver.requests) == waiting
    assert home.waiting() == []


# -- Bounds, junk, a broken state -----------------------------------------------------


def test_the_outbox_is_bounded(home: Home) -> None:
    """A hook adds to a full outbox as to any other; the sender keeps the newest 5,000,
    and counts every ping that had to go."""
    url = dead_url()
    waiting = place(home, url, 5199)
    newest = only_enqueue(home, url)
    assert len(home.waiting()) == 5200
    run_sender(home, url)
    assert [path.name for path in home.waiting()][-1] == newest.name
    assert [path.name[21:53] for path in home.waiting()][:-1] == waiting[200:]
    assert list(home.state_json()["losses"].values()) == [200]


def put_directory(path: pathlib.Path) -> None:
    """A directory with a file in it."""
    path.mkdir()
    (path / "file").write_text("x")


JUNK = {
    "empty": lambda path: path.write_bytes(b""),
    "NULs": lambda path: path.write_bytes(b"\0" * 4096),
    "half": lambda path: path.write_bytes(b'{"ping": {"event_id": "0123'),
    "list": lambda path: path.write_bytes(b"[1, 2]"),
    "no ping": lambda path: path.write_bytes(b'{"ping": {}, "local": {}}'),
    "null": lambda path: path.write_bytes(b'{"ping": null}'),
    "deep": lambda path: path.write_bytes(b"[" * 60000),
    "1 MB": lambda path: path.write_bytes(b'{"ping": {"a": "%s"}}' % (b"x" * 2**20)),
    "no number": lambda path: path.write_bytes(b'{"ping": {"total_tokens": NaN}}'),
    "not UTF-8": lambda path: path.write_bytes(b'{"ping": "\xff\xfe"}'),
    "FIFO": lambda path: os.mkfifo(str(path)),  # nobody ever writes to it
    "link": lambda path: path.symlink_to("/dev/zero"),  # it has no end
    "dangling": lambda path: path.symlink_to("/nonexistent"),
    "loop": lambda path: path.symlink_to(path),
    "directory": put_directory,
}


@pytest.mark.parametrize("named", ["as a ping", "otherwise"])
def test_junk_in_the_outbox(home: Home, receiver: Receiver, named: str) -> None:
    """What is no ping blocks nothing, is not followed, not sent, not kept."""
    early = place(home, receiver.url, age_s=9000)
    outbox = home.destination() / "outbox"
    for number, put in enumerate(JUNK.values()):
        name = f"{time.time_ns() - 10**12 + number:020d}-{number:032x}.json"
        put(outbox / (name if named == "as a ping" else f"junk-{number}"))
    late = place(home, receiver.url)
    begun = time.monotonic()
    run_sender(home, receiver.url)
    assert time.monotonic() - begun < 10
    assert ids(receiver.requests) == early + late
    assert list(outbox.iterdir()) == []
    losses = home.state_json()["losses"]
    assert sum(losses.values()) == len(JUNK)


def test_a_link_is_not_followed(home: Home, receiver: Receiver) -> None:
    """A symbolic link to a real ping is not sent, and its target stays as it was."""
    path = only_enqueue(home, receiver.url)
    target = home.path / "elsewhere.json"
    path.rename(target)
    kept = target.read_bytes()
    path.symlink_to(target)
    run_sender(home, receiver.url)
    assert receiver.requests == []
    assert target.read_bytes() == kept
    assert not os.path.lexists(str(path))


def test_a_ping_file_holds_no_more_than_the_gate_lets_through(
    home: Home, receiver: Receiver
) -> None:
    """Fields that someone put into an outbox file do not leave with it."""
    path = only_enqueue(home, receiver.url)
    record = json.loads(path.read_text())
    record["ping"].update(prompt="CANARY", cwd="/home/dev", tool_input={"a": "CANARY"})
    record["ping"]["session_id"] = "CANARY with spaces"
    record["local"] = {}
    path.write_text(json.dumps(record))
    run_sender(home, receiver.url)
    (request,) = receiver.requests
    assert b"CANARY" not in request.body
    assert b"/home/dev" not in request.body


def test_unfinished_files_are_swept_after_an_hour(
    home: Home, receiver: Receiver
) -> None:
    """A dot-name is a ping being written, or, an hour later, one whose writer died."""
    place(home, receiver.url)
    outbox = home.destination() / "outbox"
    old, young = outbox / ".old.json.aaaa", outbox / ".young.json.bbbb"
    for path, age_s in ((old, 3700), (young, 3000)):
        path.write_text("{")
        os.utime(str(path), (time.time() - age_s,) * 2)
    run_sender(home, receiver.url)
    assert list(outbox.iterdir()) == [young]
    assert not home.state_json()["losses"]


STATES = {
    "empty": b"",
    "half": b'{"failures": 3, "not_bef',
    "binary": bytes(range(256)) * 40,
    "list": b"[1, 2, 3]",
    "NaN": b'{"failures": NaN, "set_at": NaN, "not_before": NaN}',
    "infinite": b'{"failures": Infinity, "set_at": -Infinity, "not_before": 1e999}',
    "a million failures": b'{"failures": 1000000}',
    "negative": b'{"failures": -5, "set_at": -1, "not_before": -1}',
    "strings": b'{"failures": "3", "paced_until": "y", "suspects": "z"}',
    "wrong shapes": b'{"suspects": [1], "losses": 7, "problem": "x", "set_at": {}}',
    "wrong values": b'{"suspects": {"a": "b"}, "losses": {"c": null}, "problem": {}}',
    "wrong pairs": b'{"suspects": {"a": [], "b": [1], "c": ["1", 2], "d": [1, null]}}',
    "booleans": b'{"failures": true, "set_at": true, "not_before": true}',
    "from the future": b'{"failures": 2, "set_at": 9e12, "not_before": 9.1e12}',
    "for ever": b'{"failures": 2, "set_at": 0, "not_before": 9e15}',
    "huge integer": b'{"failures": 1' + b"0" * 5000 + b', "not_before": 1}',
    "deep": b'{"failures": ' + b"[" * 100000,
    "deep inside": b'{"problem": {"what": ' + b"[" * 500 + b"]" * 500 + b"}}",
    "NaN inside": b'{"problem": {"at": NaN}, "losses": {"x": NaN}}',
    "5 MB": b'{"failures": 1, "x": "' + b"y" * (5 << 20) + b'"}',
}


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_a_broken_state_counts_as_none(
    script: ModuleType, home: Home, receiver: Receiver, content: bytes
) -> None:
    """Whatever state.json holds: every value is sane; hook and sender work on."""
    place(home, receiver.url)
    (home.destination() / "state.json").write_bytes(content)
    state = script.State.load(str(home.destination() / "state.json"))
    assert type(state.failures) is int
    assert 0 <= state.failures <= 64
    assert state.backoff_left_s(time.time()) == 0
    assert 2 <= script.backoff_s("retry", state.failures + 1, None, 0) <= 900
    only_enqueue(home, receiver.url)
    run_sender(home, receiver.url)
    assert len(receiver.requests) == 2
    assert home.waiting() == []
    assert home.state_json()["failures"] == 0


def test_a_state_that_is_no_file(home: Home, receiver: Receiver) -> None:
    """state.json as a FIFO or a link blocks nobody and leads nowhere."""
    place(home, receiver.url, 2)
    state = home.destination() / "state.json"
    os.mkfifo(str(state))
    run_sender(home, receiver.url)
    assert len(receiver.requests) == 2
    target = home.path / "target"
    target.write_text("mine")
    state.unlink()
    state.symlink_to(target)
    place(home, receiver.url)
    run_sender(home, receiver.url)
    assert len(receiver.requests) == 3
    assert target.read_text() == "mine"


# -- Clocks ---------------------------------------------------------------------------

DAY_S, TWO_YEARS_S = 86400, 2 * 365 * 86400


def clock(offset_s: int) -> str:
    """A patch that sets the wall clock wrong by so many seconds."""
    return (
        "wall, wall_ns = time.time, time.time_ns\n"
        f"time.time = lambda: wall() + ({offset_s})\n"
        f"time.time_ns = lambda: wall_ns() + ({offset_s}) * 10**9\n"
    )


@pytest.mark.parametrize(
    "offset_s", [-DAY_S, -TWO_YEARS_S, DAY_S, TWO_YEARS_S], ids=lambda s: f"{s:+d} s"
)
def test_a_clock_that_was_wrong_for_a_while(home: Home, offset_s: int) -> None:
    """After a failure under a wrong clock the first hook of a sane one delivers all."""
    with Receiver(404) as receiver:  # a hold: the longest back-off that is our own
        place(home, receiver.url, 2)
        only_enqueue(home, receiver.url)
        patched(home, clock(offset_s) + NO_SENDER, url=receiver.url, sent=event("Stop"))
        run_sender(home, receiver.url, clock(offset_s) + ONE_LIFE)
        assert home.state_json()["failures"] == 1
        assert len(home.waiting()) == 4
        receiver.answer = 200
        before = len(receiver.requests)
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(before + 5)
        wait_until(lambda: not home.waiting())
    assert not home.state_json()["losses"]


@pytest.mark.parametrize("offset_s", [-DAY_S, -TWO_YEARS_S, TWO_YEARS_S])
def test_a_clock_that_goes_wrong_during_a_backoff(
    home: Home, receiver: Receiver, offset_s: int
) -> None:
    """A clock set back, or far ahead, ends a standing back-off: delivery goes on."""
    place(home, receiver.url, 2)
    now = time.time()
    home.set_state(failures=2, set_at=now - 10, not_before=now + 600)
    run_sender(home, receiver.url, clock(offset_s) + ONE_LIFE)
    assert len(receiver.requests) == 2
    assert home.waiting() == []
    assert not home.state_json()["losses"]


# -- Destinations ---------------------------------------------------------------------


def test_a_dead_destination_does_not_touch_another(
    home: Home, receiver: Receiver
) -> None:
    """Destination A is down: B's pings go at once, and its state knows no failure."""
    with Receiver(404) as down:
        home.hook(event("Stop"), down.url)
        wait_until(lambda: down.requests)
        home.quiet()
        (a,) = home.state.iterdir()
        kept = (a / "state.json").read_bytes()
        home.hook(event("Stop"), receiver.url)
        receiver.wait_for(1)
        home.quiet()
        assert (a / "state.json").read_bytes() == kept
        assert len(down.requests) == 1
    assert len(list((a / "outbox").iterdir())) == 1
    (b,) = [path for path in home.state.iterdir() if path != a]
    state = json.loads((b / "state.json").read_text())
    assert (state["failures"], state["not_before"]) == (0, 0)
    assert list((b / "outbox").iterdir()) == []


def test_old_pings_never_go_to_a_new_url(home: Home, receiver: Receiver) -> None:
    """The URL changes while pings wait: the new one gets the new ones, no other."""
    with Receiver(401) as old:
        home.hook(event("Stop", prompt_id="before"), old.url)
        wait_until(lambda: old.requests)
        home.quiet()
    new = receiver.url + "2"
    home.hook(event("Stop", prompt_id="after"), new)
    receiver.wait_for(1)
    home.quiet()
    assert [ping["prompt_id"] for ping in receiver.pings] == ["after"]
    (kept,) = home.waiting()
    assert json.loads(kept.read_text())["ping"]["prompt_id"] == "before"


# -- What it tells --------------------------------------------------------------------


@linux
def test_neither_token_nor_content_is_on_disk_or_in_an_argument(home: Home) -> None:
    """The whole state directory and every process's arguments: no token, no content."""
    canary = "CANARY"
    arguments: list[bytes] = []

    def look(_: Request) -> tuple[int, dict[str, str], bytes]:
        arguments.extend(
            pathlib.Path("/proc", str(pid), "cmdline").read_bytes()
            for pid in home.processes()
        )
        return (
            404,
            {"Location": receiver.url, "Retry-After": canary},
            b"CANARY " + TOKEN.encode(),
        )

    sent = [event(name) for name in ("Stop", "PostToolUseFailure-Bash", "StopFailure")]
    with Receiver(look) as receiver:
        for found in sent:
            home.hook(found, receiver.url)
        receiver.wait_for(1)
        home.quiet()
        for status in (302, 400, 429, 500):
            receiver.answer = status, {"Location": receiver.url}, b""
            end_backoff(home)
            run_sender(home, receiver.url)

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 503 CANARY %s\r\nCANARY\r\n\r\n" % TOKEN.encode())

    with Wire(talk) as wire:
        for url in (wire.url, wire.url.replace("http:", "https:"), dead_url()):
            home.hook(sent[0], url)
            wait_until(lambda: len(list(home.state.glob("*/sender.log"))) > 0)
            run_sender(home, url)
    home.end()
    assert arguments
    for line in arguments:
        assert TOKEN.encode() not in line
        assert b"127.0.0.1" not in line
        assert b"acme" not in line
    files = [path for path in home.state.rglob("*") if path.is_file()]
    assert any(path.name == "sender.log" for path in files)
    for path in files:
        raw = path.read_bytes()
        assert TOKEN.encode() not in raw, path
        assert canary.encode() not in raw, path
        assert TOKEN not in str(path)


def test_the_log_is_rotated(home: Home, receiver: Receiver) -> None:
    """sender.log does not grow without end: one old one beside it, no more."""
    place(home, receiver.url)
    path = home.destination() / "sender.log"
    path.write_text("x" * 79 + "\n")
    run_sender(home, receiver.url)
    assert path.read_text().startswith("xxx")
    assert path.stat().st_size > 80
    for _ in range(3):
        path.write_text(("x" * 79 + "\n") * 4000)
        for _ in range(2):
            place(home, receiver.url)
            run_sender(home, receiver.url)
        assert path.stat().st_size < 1000
    logs = sorted(p.name for p in home.destination().glob("sender.log*"))
    assert logs == ["sender.log", "sender.log.1"]


def test_everything_it_writes_is_private(home: Home) -> None:
    """Whatever a sender writes is 0600 in directories of 0700, under any umask."""
    with Receiver(400) as receiver:
        bad, _ = place(home, receiver.url, 2)
        receiver.answer = answers({bad: 400})
        run_sender(home, receiver.url, "os.umask(0)\n" + ONE_LIFE)
    made = ["sender.log", "state.json", "lock"]
    for name in made:
        assert (home.destination() / name).stat().st_mode & 0o7777 == 0o600, name
    assert (home.destination() / "refused").stat().st_mode & 0o7777 == 0o700


def test_a_sender_prints_nothing(home: Home) -> None:
    """Neither success nor failure is told on stdout or stderr; the exit status is 0."""
    for status in (200, 400, 404, 503):
        with Receiver(status) as receiver:
            place(home, receiver.url)
            run = run_sender(home, receiver.url)
            assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


@pytest.mark.parametrize("argument", ["-1", "0", "99", "x", ""])
def test_a_descriptor_that_is_not_the_lock(
    home: Home, receiver: Receiver, argument: str
) -> None:
    """A sender with anything but the lock's descriptor: exit 0, nothing printed."""
    place(home, receiver.url)
    run = patched(home, ONE_LIFE, "detached", argument, url=receiver.url)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
    if argument.lstrip("-").isdigit():
        assert len(receiver.requests) == 1
