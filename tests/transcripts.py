"""Sessions of Claude Code: rows written by hand, real hooks and senders on our clock.

A message's size is a number n, and all its counts are multiples of it: sizes that are
powers of two tell from a sum which messages are in it, and how often. Times are seconds
after the session's begin, a minute after the script was installed. Hooks and senders
are forked from one interpreter, and their clock is set from outside: a sender's sleep
lets it go on, and what the client writes meanwhile is written when it gets there.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
import uuid
from typing import Any, Iterable, Sequence

import pytest

from support import ROOT, Home, Receiver, event

OPUS, HAIKU = "claude-opus-5-5", "claude-haiku-5"
PRICES = {OPUS: 1 / 64, HAIKU: 1 / 1024}  # of a message of size 1; floats add exactly
NAMES = "input_tokens output_tokens cached_input_tokens cache_creation_input_tokens"
TIMES = (1, 3, 5, 7, 2, 16)  # a ping's count: how many times the size of a message
MULTIPLES = dict(zip(f"{NAMES} reasoning_tokens total_tokens".split(), TIMES))
DAY_S = 86400.0
START, END = "SessionStart-startup", "SessionEnd-other"

NURSERY = r"""
# For each job on stdin, a line of JSON: the script's hook or sender in a forked child.
# Says how it ended (as os.wait does), what it wrote, and its most memory in KB.
import _thread, datetime, email.utils, fcntl, http.client, json, os, random, signal
import ssl, sys, tempfile, threading, time, urllib.request  # what a sender may import


def set_clock(job):
    main, slept, later = _thread.get_ident(), [0.0], sorted(job["later"])
    real = {name: getattr(time, name) for name in ("time", "monotonic", "sleep")}
    ahead = job["now"] - real["time"]()
    if job["entry"] == "hook":  # all at once
        time.time, time.time_ns = lambda: job["now"], lambda: round(job["now"] * 1e9)
        return
    time.time = lambda: real["time"]() + ahead + slept[0]
    time.time_ns = lambda: int(time.time() * 1e9)
    time.monotonic = lambda: real["monotonic"]() + slept[0]

    def sleep(seconds):
        if _thread.get_ident() != main:
            return real["sleep"](seconds)
        slept[0] += seconds
        while later and later[0][0] <= time.time():
            _, path, text = later.pop(0)
            with open(path, "a") as file:
                file.write(text)

    time.sleep = sleep


def play(job):
    signal.alarm(90)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv[:] = ["-c", *job["arguments"]]
    set_clock(job)
    os.posix_spawn = lambda *a, **k: 0  # whoever starts a sender starts it here
    os.POSIX_SPAWN_OPEN = 0  # PyPy has neither
    exec(job["patch"], {"os": os, "time": time})
    sys.path.insert(0, job["script"])
    import telemhq_ping
    getattr(telemhq_ping, job["entry"])()
    os._exit(9)


for line in sys.stdin:
    job = json.loads(line)
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(job["stdin"].encode())
        given.seek(0)
        child = os.fork()
        if not child:
            for fd, file in enumerate((given, said, said)):
                os.dup2(file.fileno(), fd)
            play(job)
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        told = [status, said.read().decode(), usage.ru_maxrss]
        print(json.dumps(told), flush=True)
"""


@functools.lru_cache(maxsize=1)
def nursery() -> subprocess.Popen[bytes]:
    """The interpreter that hooks and senders are forked from."""
    if not hasattr(os, "fork"):
        pytest.skip("it forks")
    isolated = [sys.executable, "-I", "-S", "-c", NURSERY]
    found = subprocess.Popen(
        isolated, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    atexit.register(found.kill)
    return found


def run(home: Home, entry: str, now: float, **job: Any) -> int:
    """Run a hook or a sender, `now` being its time; it says nothing, and exits 0. Its
    most memory, in KB."""
    known = {"arguments": [], "later": [], "stdin": "", "cwd": str(home.project)}
    process, job = nursery(), {**known, **job, "entry": entry, "now": now}
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(job).encode() + b"\n")
    process.stdin.flush()
    status, said, most_kb = json.loads(process.stdout.readline())
    assert said == ""
    assert status in job.get("status", (0,))
    return int(most_kb)


# -- Rows, as Claude Code writes them --------------------------------------------------


def used(n: int) -> dict[str, Any]:
    """The counts of a ping (or of a model in it) for messages of size n in all."""
    return {name: n * times for name, times in MULTIPLES.items()}


def size_of(ping: dict[str, Any]) -> Any:
    """The size that a ping charges, None when it has no usage."""
    found = {name: ping[name] for name in MULTIPLES if name in ping}
    assert not found or found == used(found["input_tokens"]), found
    return found.get("input_tokens")


def usage_of(n: int, **changes: object) -> dict[str, Any]:
    """The `usage` of an API message of size n."""
    counts = {"input_tokens": n, "output_tokens": 3 * n, "service_tier": "standard"}
    counts.update(cache_read_input_tokens=5 * n, cache_creation_input_tokens=7 * n)
    return {**counts, "output_tokens_details": {"thinking_tokens": 2 * n}, **changes}


def row(kind: str, at: object, message: object, **changes: object) -> dict[str, Any]:
    """Any row with a message."""
    known = {"type": kind, "timestamp": at, "isSidechain": False, "message": message}
    return {**known, "uuid": str(uuid.uuid4()), "gitBranch": "main", **changes}


def prompt(at: float, **changes: object) -> dict[str, Any]:
    """The user row that a prompt becomes."""
    said = {"role": "user", "content": "CANARY_TEXT é 漢字 😀"}
    return row("user", at, said, **{"promptId": str(uuid.uuid4()), **changes})


def message(
    at: float,
    n: int,
    key: str = "",
    stop: str | None = "end_turn",
    model: object = OPUS,
    tools: Iterable[str] = (),
    usage: object = None,
    **changes: object,
) -> dict[str, Any]:
    """An assistant row: one block of the answer `key`, which is of size n."""
    key, content = key or uuid.uuid4().hex, []
    for i, name in enumerate(tools):
        call = {"type": "tool_use", "id": f"toolu_{key}_{i}", "name": name}
        content.append({**call, "input": {"command": "CANARY_INPUT"}})
    said = {"id": f"msg_{key}", "role": "assistant", "model": model}
    said.update(stop_reason=stop, usage=usage or usage_of(n))
    said["content"] = content or [{"type": "text", "text": "CANARY_TEXT"}]
    return row("assistant", at, said, **{"requestId": f"req_{key}", **changes})


def turn(at: float, n: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt and its answer, a second later."""
    return prompt(at), message(at + 1, n, **changes)


def result(at: float, call: str = "toolu_1", error: bool = False) -> dict[str, Any]:
    """The user row of one tool's result."""
    block = {"type": "tool_result", "tool_use_id": call, "content": "CANARY_RESULT"}
    content = [{**block, "is_error": True} if error else block]
    return row("user", at, {"role": "user", "content": content})


def interrupted(at: float) -> dict[str, Any]:
    """The row that Esc leaves."""
    text = [{"type": "text", "text": "[Request interrupted by user]"}]
    mark = {"interruptedMessageId": str(uuid.uuid4())}
    return row("user", at, {"role": "user", "content": text}, **mark)


def cost_of(sizes: dict[str, int]) -> float:
    """What messages of these sizes cost, by model."""
    return sum(n * PRICES.get(model, 0) for model, n in sizes.items())


def ledger(sizes: dict[str, int], lines: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """A `cost-state` row: the client's own sums since the session's begin."""
    names = ("input", "output", "cacheReadInput", "cacheCreationInput", "thinking")
    models: dict[str, dict[str, float]] = {}
    for model, n in sizes.items():
        models[model] = {
            f"{name}Tokens": n * times for name, times in zip(names, TIMES)
        }
        models[model]["costUSD"] = cost_of({model: n})
    found = {"type": "cost-state", "totalCostUSD": cost_of(sizes), "modelUsage": models}
    return {**found, "totalLinesAdded": lines[0], "totalLinesRemoved": lines[1]}


def iso(seconds: float) -> str:
    """Seconds since 1970 as a row's timestamp."""
    found = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return found.isoformat("T", "milliseconds")[:-6] + "Z"


# -- Sessions --------------------------------------------------------------------------


class Session:
    """A session: its transcript below HOME, its events, what its tracker was told."""

    def __init__(self, home: Home, receiver: Receiver, begun: float = 0) -> None:
        self.home, self.receiver, self.id = home, receiver, str(uuid.uuid4())
        self.begun = begun or round(time.time() + 60, 3)
        self.path = home.path / ".claude" / "projects" / "-acme" / (self.id + ".jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.now = 0.0  # of the last event
        self.taken = 0
        self.script, self.peak_kb = ROOT, 0

    def agent(self, name: str = "a1") -> pathlib.Path:
        """The path of a subagent's transcript."""
        return self.path.with_suffix("") / "subagents" / f"agent-{name}.jsonl"

    def text(self, rows: Sequence[dict[str, Any] | bytes]) -> bytes:
        """Rows as they are in the file."""
        lines = []
        for given in rows:
            if isinstance(given, bytes):
                lines.append(given)
                continue
            whole = {"sessionId": self.id, "cwd": "/home/dev/acme/api", **given}
            if isinstance(whole.get("timestamp"), (int, float)):
                whole["timestamp"] = iso(self.begun + whole["timestamp"])
            text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False)
            lines.append(text.encode() + b"\n")
        return b"".join(lines)

    def add(
        self, *rows: dict[str, Any] | bytes, to: pathlib.Path | None = None
    ) -> None:
        """Append rows to the transcript, or to the file `to`."""
        path = to or self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(self.text(rows))

    def fork(self, how: str = "--fork-session") -> Session:
        """A session that begins with copies of what this one has said so far, as the
        client makes it: "unmarked" in versions 2.1.156 to 2.1.288."""
        fork = Session(self.home, self.receiver, self.begun)
        for line in self.path.read_bytes().splitlines():
            copy = {**json.loads(line), "sessionId": fork.id}
            if copy["type"] == "assistant" and how != "unmarked":
                copy.setdefault("requestSessionId", self.id)
            if how == "/branch":
                origin = {"sessionId": self.id, "messageUuid": copy.get("uuid")}
                copy["forkedFrom"] = origin
            if copy["type"] != "cost-state":
                fork.add(copy)
        fork.now = self.now
        return fork

    def hook(
        self, name: str, at: float, url: str = "", patch: str = "", **fields: Any
    ) -> None:
        """Run the hook for an event (`SessionStart-fork`: such a one), which starts no
        sender. Fields in capitals are variables."""
        variables = {key: fields.pop(key) for key in list(fields) if key.isupper()}
        known = {"cwd": str(self.home.project), "session_id": self.id}
        known["transcript_path"] = str(self.path)
        job: dict[str, Any] = {"patch": patch, "script": str(self.script)}
        job["stdin"] = json.dumps(event(name, **{**known, **fields}))
        job["env"] = self.home.env(url or self.receiver.url, **variables)
        self.now = at
        run(self.home, "hook", self.begun + at, **job)

    def send(
        self,
        at: float | None = None,
        url: str = "",
        patch: str = "",
        later: Sequence[tuple[float, pathlib.Path, Sequence[Any]]] = (),
        status: Sequence[int] = (0,),
        name: str = "",
        **variables: object,
    ) -> list[dict[str, Any]]:
        """Run a sender to its end, at a time (half a minute after the last event); this
        session's new pings. later: what the client writes at which time."""
        url, script = url or self.receiver.url, str(self.script)
        name = name or "telemhq-" + hashlib.sha256(url.encode()).hexdigest()[:12]
        now = self.begun + (self.now + 30 if at is None else at)
        job: dict[str, Any] = {"patch": patch, "script": script}
        job["arguments"] = [script, "telemhq_ping", "detached", "-1", name]
        job["env"] = self.home.env(url, **variables)
        job["later"] = [
            (self.begun + when, str(path), self.text(rows).decode())
            for when, path, rows in later
        ]
        self.peak_kb = run(self.home, "sender", now, status=status, **job)
        return self.new()

    def charge(self, name: str, at: float, *rows: Any, **fields: Any) -> Any:
        """Rows, then an event, then a sender: the event's ping."""
        if rows:
            self.add(*rows)
        self.hook(name, at, **fields)
        found = self.send()
        assert found, "no ping"
        return found[-1]

    def new(self) -> list[dict[str, Any]]:
        """This session's pings that came in since the last such question."""
        found = [p for p in self.receiver.pings if p.get("session_id") == self.id]
        found, self.taken = found[self.taken :], len(found)
        return found

    def accounts(self) -> list[pathlib.Path]:
        """The files of all accounts of this HOME."""
        return sorted(self.home.state.glob("*/accounts/*.json"))


@pytest.fixture
def session(home: Home, receiver: Receiver) -> Session:
    """A session that begins in a minute, still without rows."""
    return Session(home, receiver)


def summed(pings: Iterable[dict[str, Any]], *names: str) -> list[Any]:
    """The sums over pings, as TelemHQ makes them."""
    pings = list(pings)
    return [sum(ping.get(name, 0) for ping in pings) for name in names]
