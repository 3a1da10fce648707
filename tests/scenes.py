"""What the queue's tests share: what waits, and hours on a clock of their own."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from typing import Any, Callable, Iterable, NamedTuple

from support import (
    ROOT,
    Home,
    Receiver,
    Wire,
    event,
    place,
    read_request,
)

NO_SENDER = "os.posix_spawn = lambda *a, **k: 0\n"


# -- What waits, what was set aside ----------------------------------------------------


def id_of(name: str) -> str:
    """The event_id in the name of a ping's file."""
    return name[: -len(".json")].rpartition("-")[2]


def ids(receiver: Receiver) -> list[str]:
    """The event_ids of what was received, in the order of its arrival."""
    return [request.ping["event_id"] for request in list(receiver.requests)]


def waiting(home: Home) -> list[str]:
    """The event_ids of what waits, oldest first."""
    return [id_of(path.name) for path in home.waiting()]


def aside(home: Home) -> list[str]:
    """The event_ids of what was set aside, oldest first."""
    found = sorted(path.name for path in home.state.glob("*/refused/*"))
    return [id_of(name) for name in found]


def charges(home: Home) -> dict[str, int]:
    """event_id -> charges of each suspect that waits; 0: it failed unjudged."""
    found = home.state_json().get("suspects", {})
    names = [path.name for path in home.waiting()]
    return {id_of(name): found[name] for name in names if name in found}


def let_time_pass(home: Home) -> None:
    """A back-off, and the pause of suspects, end as time would have it."""
    home.set_state(**{**home.state_json(), "not_before": 0, "suspects_at": 0})


def put(
    home: Home,
    url: str,
    kinds: Iterable[str],
    at: float | None = None,
    session: str = "one",
    first: int = 0,
) -> list[str]:
    """Put pings of these events into the outbox, the oldest first, all made at `at`
    (seconds since 1970; now); their event_ids. first: the first one's number."""
    kinds, found = list(kinds), []
    place(home, url, 0)  # a hook has made the outbox, and a model
    outbox, model = home.made[url]
    ns = int((at or time.time()) * 1e9) - len(kinds)
    short = hashlib.sha256(session.encode()).hexdigest()[:16]
    for n, kind in enumerate(kinds):
        ping = {**model, "event": kind, "event_id": os.urandom(16).hex()}
        ping.update(session_id=session, prompt_id=f"p-{first + n}")
        name = f"{ns + n:020d}-{kind}-{short}-{ping['event_id']}.json"
        (outbox / name).write_text(json.dumps({"ping": ping, "local": {}}))
        found.append(ping["event_id"])
    return found


# -- Patches of a process --------------------------------------------------------------

# Time goes ten times as fast.
FAST = """
real, real_sleep, began = time.monotonic, time.sleep, time.monotonic()
time.monotonic = lambda: began + 10 * (real() - began)
time.sleep = lambda seconds: real_sleep(seconds / 10)
"""


# -- Hours in a moment -----------------------------------------------------------------

# Hooks and senders as processes of the script, forked from one that has imported it.
# Time is a number that all share: it passes while one of them sleeps, or where the far
# side says so; the hooks that are due meanwhile run then.
DRIVER = """
import calendar, email.utils, http.client, json, mmap, os, random, struct, sys
import threading, time, urllib.request
directory, path = sys.argv[1:]
given = json.load(sys.stdin)
shared = mmap.mmap(os.open(path, os.O_RDWR), 16)  # now, the number of the next event
main, real_sleep = threading.get_ident(), time.sleep
sys.path.insert(0, directory)
sys.argv[:] = ["-c"]
import telemhq_ping

def now():
    return struct.unpack_from("d", shared)[0]

def sleep(seconds):
    if threading.get_ident() != main:  # a watchdog
        return real_sleep(0.002)
    until = now() + seconds
    while True:
        number = struct.unpack_from("q", shared, 8)[0]
        if number >= len(given) or given[number][0] > until:
            break
        struct.pack_into("q", shared, 8, number + 1)
        struct.pack_into("d", shared, 0, max(now(), given[number][0]))
        run(number, given[number][1])
    struct.pack_into("d", shared, 0, max(now(), until))

def run(number, event):
    over, held = os.pipe()
    pid = os.fork()
    if not pid:
        read, write = os.pipe()
        os.write(write, json.dumps(event).encode())
        os.close(write)
        os.dup2(read, 0)
        telemhq_ping.hook()
    os.close(held)
    os.waitpid(pid, 0)
    os.read(over, 1)  # its sender has ended, too
    os.close(over)

def spawn(_, command, environ, **__):
    pid = os.fork()
    if not pid:
        number = struct.unpack_from("q", shared, 8)[0]
        random.seed(SEED + number)  # or a fork takes a seed of its own
        start = command.index("-c")
        sys.argv[:] = ["-c", *command[start + 2:]]
        exec(command[start + 1])
    return pid

time.time = time.monotonic = now
time.time_ns = lambda: int(now() * 1e9)
time.sleep, os.posix_spawn, os.POSIX_SPAWN_OPEN = sleep, spawn, 0
SEED = 7
sleep(given.pop()[0] - now())
"""
ANSWER_S = 0.05  # what an answer takes
DRIP, RESET = "drip", "reset"


class Ping(NamedTuple):
    """A ping that the far side has got. number: in the order of all events. at, made:
    seconds since the scene began."""

    number: int
    kind: str
    session: str
    at: float
    made: float


class Scene:
    """An outbox with a backlog, then a hook every now and then; a tracker that answers
    as it is told to: a status, (status, Retry-After), DRIP or RESET.

    answers: each request that was made, [(the ping, its answer)]. made: when each event
    was, by its number, seconds since the scene began.
    """

    def __init__(self, home: Home, answer: Callable[[Ping], Any]) -> None:
        self.home, self.answer = home, answer
        self.answers: list[tuple[Ping, Any]] = []
        self.made: list[float] = []
        self.began = float(int(time.time()))
        self.path = home.path / "clock"
        self.path.write_bytes(struct.pack("dq", self.began, 0))
        with open(self.path, "r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 16)

    def pass_s(self, seconds: float) -> float:
        """Let time pass; seconds since the scene began."""
        (now,) = struct.unpack_from("d", self.shared)
        struct.pack_into("d", self.shared, 0, now + seconds)
        return float(now + seconds - self.began)

    def talk(self, connection: socket.socket) -> None:
        """The far side of one request."""
        ping = json.loads(read_request(connection))
        at, number = self.pass_s(ANSWER_S), int(ping["prompt_id"][2:])
        sent = Ping(number, ping["event"], ping["session_id"], at, self.made[number])
        found = self.answer(sent)
        self.answers.append((sent, found))
        if found == RESET:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return
        connection.sendall(b"HTTP/1.1 ")
        while found == DRIP:
            connection.sendall(b"2")
            self.pass_s(1)
            time.sleep(0.01)
        status, asked = found if isinstance(found, tuple) else (found, "")
        head = f"{status} X\r\nRetry-After: {asked}\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())

    def play(
        self, backlog: list[tuple[str, str]], later: list[tuple[float, Any]]
    ) -> None:
        """Play it to the end. backlog: (event, session) of what waits at the start.
        later: [(seconds, event)], the last of which is the end, and no event."""
        with Wire(self.talk) as wire:
            for n, (kind, session) in enumerate(backlog):
                put(self.home, wire.url, [kind], self.began - 1 + n / 1e3, session, n)
            self.made = [0.0] * len(backlog) + [at for at, _ in later]
            given = [
                (self.began + at, dict(sent, prompt_id=f"p-{number}"))
                for number, (at, sent) in enumerate(later, len(backlog))
            ]
            python = [sys.executable, "-I", "-S", "-c", DRIVER, ROOT, self.path]
            subprocess.run(
                list(map(str, python)),
                input=json.dumps(given).encode(),
                env=self.home.env(wire.url, TELEMHQ_USAGE="0"),
                check=True,
                timeout=100,
            )

    def delivered(self) -> dict[int, float]:
        """number -> when it was delivered; AssertionError for one delivered twice."""
        found: dict[int, float] = {}
        for ping, answer in self.answers:
            if answer == 200:
                assert ping.number not in found
                found[ping.number] = ping.at
        return found


def every(
    seconds: float, until_s: float, kinds: Iterable[str] = ("Stop",)
) -> list[tuple[float, Any]]:
    """An event every so many seconds, of these kinds in turn; then the end."""
    names, found = list(kinds), []
    for n in range(int(until_s / seconds)):
        sent = event(names[n % len(names)], session_id="later")
        found.append((n * seconds + 0.5, sent))
    return [*found, (until_s, {})]


def lone(*at_s: float) -> list[tuple[float, Any]]:
    """Stops at these seconds; the end is ten minutes after the last."""
    return [*((s, event("Stop", session_id="s")) for s in at_s), (at_s[-1] + 600, {})]


Answers = Callable[[Ping], Any]


def at(answer: Any, *numbers: int) -> Answers:
    """This answer to some, 200 to the others."""
    return lambda ping: answer if ping.number in numbers else 200


def until(answer: Any, end_s: float, begin_s: float = 0) -> Answers:
    """This answer to all, for a while."""
    return lambda ping: answer if begin_s <= ping.at < end_s else 200
