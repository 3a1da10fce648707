"""How fast, how big: measure the hook and its sender, print one table.

    python3 tests/benchmark.py            medians of 25 interleaved runs; ten minutes
    python3 tests/benchmark.py --quick    5 runs, shorter transcripts; to see it work
    python3 tests/benchmark.py --only hook,cpu,drain,usage,fleet

Not a test: it fails for nothing. Every figure is a ratio within one run, but for sizes
and the reading rate. Linux or macOS (which lacks the section on CPU); what it starts it
ends, traffic is loopback only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

from support import (  # noqa: E402
    FIXTURES,
    ROOT,
    SCRIPT,
    Home,
    dead_url,
    event,
    load_script,
    only_enqueue,
    place,
    sender_command,
)

PYTHON = sys.executable
BARE = [PYTHON, "-I", "-S"]
PASS = f"{PYTHON} -I -S -c pass"
SAMPLE = f"{PYTHON} -I -S ~/.claude/hooks/sample.py"
AS_SCRIPT = f"{PYTHON} -I -S ~/.claude/hooks/telemhq_ping.py"
# The job as most such hooks do it: parse, hash, POST, wait for the answer.
SYNCHRONOUS = """
import hashlib, json, os, sys, urllib.request
event = json.load(sys.stdin)
ping = {"event": event["hook_event_name"], "session_id": event["session_id"],
        "cwd_hash": hashlib.sha256(event["cwd"].encode()).hexdigest()[:12]}
request = urllib.request.Request(
    os.environ["TELEMHQ_PING_URL"], json.dumps(ping).encode(),
    {"Content-Type": "application/json"})
with urllib.request.urlopen(request, timeout=10) as response:
    response.read()
"""
BARE_LOOP = """
import os, sys, urllib.request
os.nice(5)  # as the sender is
for line in open(sys.argv[1], "rb"):
    request = urllib.request.Request(
        sys.argv[2], line.strip(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        response.read()
"""
# Runs a command; tells its wall time, CPU time and peak memory. A process of its own,
# for on Linux a child's peak counts from its parent's size.
LAUNCHER = """
import os, sys, time
begun = time.perf_counter()
null = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=null)
_, status, used = os.wait4(pid, 0)
wall = time.perf_counter() - begun
unit = 1 if sys.platform == "darwin" else 1024
print(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * unit, status)
"""


def example_command() -> str:
    """The example settings' command for a Stop, with this Python in it."""
    example = json.loads((ROOT / "settings.example.json").read_text("utf-8"))
    command: str = example["hooks"]["Stop"][0]["hooks"][0]["command"]
    return command.replace("python3 ", PYTHON + " ")


def home_with_script(path: pathlib.Path) -> Home:
    """A HOME in which the script is installed, and the sample beside it."""
    home = Home(path)
    hooks = home.path / ".claude" / "hooks"
    hooks.mkdir(parents=True)
    shutil.copy(str(SCRIPT), str(hooks))
    (hooks / "sample.py").write_text(SYNCHRONOUS)
    return home


class Server:
    """Answers every POST with 200 after `delay_s`; as little else as can be done.

    In a process of its own, so that it shares no interpreter with what is measured.
    keep: a file to which it adds every body, a line each.
    """

    def __init__(self, delay_s: float, keep: str | pathlib.Path = os.devnull) -> None:
        self.process = subprocess.Popen(
            [PYTHON, __file__, "--serve", str(delay_s), "--keep", str(keep)],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout
        port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{port}/ping/benchmark"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve(delay_s: float, keep: str) -> None:
    """The server's process; it ends with the benchmark's."""
    kept = os.open(keep, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listening.getsockname()[1], flush=True)
    parent = os.getppid()

    def answer(connection: socket.socket) -> None:
        with connection:
            raw = b""
            while b"\r\n\r\n" not in raw:
                part = connection.recv(65536)
                if not part:
                    return
                raw += part
            head, _, body = raw.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            while len(body) < length:
                part = connection.recv(65536)
                if not part:
                    return
                body += part
            time.sleep(delay_s)
            os.write(kept, body + b"\n")
            with contextlib.suppress(OSError):
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )

    listening.settimeout(5)
    while os.getppid() == parent:
        try:
            connection = listening.accept()[0]
        except socket.timeout:
            continue
        connection.settimeout(None)
        if delay_s:
            threading.Thread(target=answer, args=(connection,), daemon=True).start()
        else:
            answer(connection)


def spawn(command: list[str], env: dict[str, str]) -> tuple[int, int]:
    """Start a command with a pipe on stdin; (pid, the pipe's end to write to)."""
    read, write = os.pipe()
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    stdin = (os.POSIX_SPAWN_DUP2, read, 0)
    pid = os.posix_spawn(command[0], command, env, file_actions=[stdin, *null])
    os.close(read)
    return pid, write


def feed(write: int, stdin: bytes) -> None:
    """Write all of it into a pipe, and close that."""
    left = memoryview(stdin)
    while left:
        left = left[os.write(write, left) :]
    os.close(write)


def wall_and_cpu_s(
    command: list[str], env: dict[str, str], stdin: bytes, at_once: int = 1
) -> tuple[float, float]:
    """Seconds from the start of `at_once` such commands to the end of the last, and
    what they took of the CPU."""
    begun = time.perf_counter()
    started = [spawn(command, env) for _ in range(at_once)]
    for _, write in started:
        feed(write, stdin)
    cpu = 0.0
    for pid, _ in started:
        _, status, used = os.wait4(pid, 0)
        assert status == 0, command
        cpu += used.ru_utime + used.ru_stime
    return time.perf_counter() - begun, cpu


def measured(command: list[str], env: dict[str, str]) -> tuple[float, float, int]:
    """Run a command through the LAUNCHER: (wall s, CPU s, peak bytes)."""
    run = subprocess.run(
        [*BARE, "-c", LAUNCHER, *command],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    wall, cpu, peak, status = run.stdout.split()
    assert status == b"0", command
    return float(wall), float(cpu), int(peak)


class Table:
    """The lines of the table, printed as they come."""

    def __init__(self) -> None:
        print(f"{'':<64} {'measured':>9} {'asked':>9} {'aim':>7}")

    def section(self, text: str) -> None:
        print("\n" + text)

    def row(
        self, what: str, value: object, form: str, asked: str = "", aim: str = ""
    ) -> None:
        """A line; `value` is shown in the given format."""
        shown = format(value, form)
        print(f"  {what:<62} {shown:>9} {asked:>9} {aim:>7}", flush=True)

    def most(
        self, what: str, value: float, form: str, asked: float, aim: float | None = None
    ) -> None:
        """A figure that should be at most what is asked, and at best the aim."""
        self.judged(what, value, form, asked, aim, value <= asked)

    def least(
        self, what: str, value: float, form: str, asked: float, aim: float | None = None
    ) -> None:
        """A figure that should be at least what is asked."""
        self.judged(what, value, form, asked, aim, value >= asked)

    def judged(
        self,
        what: str,
        value: float,
        form: str,
        asked: float,
        aim: float | None,
        good: bool,
    ) -> None:
        """A line with what is asked, and whether it is met."""
        aimed_at = "" if aim is None else format(aim, form)
        met = "" if good else "  MISSED"
        self.row(what, value, form, format(asked, form), aimed_at + met)


# -- The hook -------------------------------------------------------------------------


class Variant:
    """One thing to measure again and again; `walls`, `cpus` its times.

    home: where it leaves a sender and pings behind. keep: how many pings wait there
    before and after each run; None: the sender delivers them, and ends by itself.
    """

    def __init__(
        self,
        line: str,
        env: dict[str, str],
        stdin: bytes,
        home: Home | None = None,
        at_once: int = 1,
        keep: int | None = 0,
    ) -> None:
        self.command, self.env, self.stdin = ["/bin/sh", "-c", line], env, stdin
        self.home, self.at_once, self.keep = home, at_once, keep
        self.walls: list[float] = []
        self.cpus: list[float] = []

    def run(self) -> None:
        """Measure once, then put everything back, outside of the measured time."""
        wall, cpu = wall_and_cpu_s(self.command, self.env, self.stdin, self.at_once)
        self.walls.append(wall)
        self.cpus.append(cpu)
        if not self.home:
            return
        if self.keep is None:
            self.home.quiet(30)
        self.home.end()
        self.home.quiet(30)
        for path in self.home.waiting()[self.keep or 0 :]:
            path.unlink()
        for path in self.home.state.glob("*/state.json"):
            path.unlink()  # so that no back-off spares the next run its sender

    @property
    def s(self) -> float:
        return median(self.walls)


def measure_variants(variants: dict[str, Variant], runs: int) -> None:
    """Run them all, interleaved, in another order each time."""
    order = list(variants.values())
    for variant in order:  # once to warm up: makes bytecode, directories, fills caches
        variant.run()
        variant.walls.clear()
        variant.cpus.clear()
    for _ in range(runs):
        random.shuffle(order)
        for variant in order:
            variant.run()


def trackers_at(url: str) -> dict[str, str]:
    """The variables that send to all five trackers, each of them the same server."""
    place = url.rsplit("/ping/", 1)[0]
    return {
        "TELEMHQ_DESTINATIONS": "telemhq,wigtoken,recorder,otlp,claude-metrics",
        "WIGTOKEN_SERVER": place,
        "WIGTOKEN_TOKEN": "wts_benchmark",
        "WIGTOKEN_MACHINE": "benchmark",
        "RECORDER_URL": place,
        "RECORDER_PAT": "benchmark",
        "RECORDER_PREFIX": "{project}",
        "TELEMHQ_OTLP_ENDPOINT": place,
        "CLAUDE_METRICS_API_URL": place,
        "CLAUDE_METRICS_API_TOKEN": "benchmark",
    }


def measure_hook(table: Table, top: pathlib.Path, runs: int) -> None:
    """The hook's wall time, against a bare interpreter's and the synchronous job's."""
    fast, slow, hanging = Server(0), Server(0.2), Server(10)
    small = json.dumps(event("Stop")).encode()
    large = json.dumps(event("Stop", last_assistant_message="x" * (1 << 20))).encode()
    names = ["one", "slow", "hang", "dead", "full", "big", "eight", "script", "five"]
    homes = {name: home_with_script(top / name) for name in names}
    line = example_command()

    def hook(
        name: str, url: str, stdin: bytes = small, line: str = line, **more: Any
    ) -> Variant:
        return Variant(line, homes[name].env(url), stdin, homes[name], **more)

    place(homes["full"], hanging.url, 5000)
    env = homes["one"].env(fast.url)
    five = {**homes["five"].env(fast.url), **trackers_at(fast.url)}
    variants = {
        "bare": Variant(PASS, env, b""),
        "sample": Variant(SAMPLE, env, small),
        "hook": hook("one", fast.url, keep=None),
        "script": hook("script", fast.url, line=AS_SCRIPT, keep=None),
        "five": Variant(line, five, small, homes["five"], keep=None),
        "200 ms": hook("slow", slow.url, keep=None),
        "10 s": hook("hang", hanging.url),
        "dead": hook("dead", dead_url()),
        "5,000": hook("full", hanging.url, keep=5000),
        "1 MB": hook("big", fast.url, large, keep=None),
        "8 bare": Variant(PASS, env, b"", at_once=8),
        "8 hooks": hook("eight", fast.url, keep=None, at_once=8),
    }
    try:
        measure_variants(variants, runs)
    finally:
        for home in homes.values():
            home.end()
        for server in (fast, slow, hanging):
            server.close()
    show_hook(table, variants, runs)


def show_hook(table: Table, variants: dict[str, Variant], runs: int) -> None:
    """The figures of the hook."""
    one = {name: variant.s for name, variant in variants.items()}
    hook_s = one["hook"]
    table.section(f"The hook's wall time, through sh (medians of {runs} runs)")
    table.row("python3 -I -S -c pass, ms", one["bare"] * 1e3, ".1f")
    table.row("the hook by the example's command, ms", hook_s * 1e3, ".1f")
    table.row("the synchronous sample, ms", one["sample"] * 1e3, ".1f")
    table.most("hook / python3 -I -S -c pass", hook_s / one["bare"], ".2f", 1.45, 1.3)
    cpu = median(variants["hook"].cpus) / median(variants["bare"].cpus)
    table.row("the same in CPU time, which a busy machine blurs less", cpu, ".2f")
    table.most(
        "hook / the synchronous sample", hook_s / one["sample"], ".2f", 0.25, 0.2
    )
    ratio = one["script"] / one["bare"]
    table.most("run as a script / python3 -I -S -c pass", ratio, ".2f", 4.2, 3.5)
    for name, what in (
        ("200 ms", "a tracker that takes 200 ms"),
        ("10 s", "a tracker that takes 10 s"),
        ("dead", "a dead tracker"),
        ("5,000", "5,000 pings in the outbox"),
    ):
        ratio = one[name] / hook_s
        table.most(f"with {what} / without", ratio, ".2f", 1.15, 1.05)
    more = (one["five"] - hook_s) / 4 / one["bare"]
    table.most("each further destination, in bare interpreters", more, ".2f", 0.2)
    cpus = [median(variants[name].cpus) for name in ("five", "hook", "bare")]
    more = (cpus[0] - cpus[1]) / 4 / cpus[2]
    table.row("the same in CPU time", more, ".2f")
    table.most("with a 1 MB event / without", one["1 MB"] / hook_s, ".2f", 2)
    ratio = one["8 hooks"] / one["8 bare"]
    table.most("eight hooks at once / eight bare interpreters", ratio, ".2f", 3)


# -- What an event costs, all in ------------------------------------------------------


def adopt_orphans() -> None:
    """Make this process the parent of what its descendants leave behind (Linux)."""
    failed = ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)
    if failed:  # 36: PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl")


def stamp(at: float) -> str:
    """A time as transcripts write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(at))


class Burst:
    """Hooks and samples in turn, at a pace; everything they leave behind is reaped, so
    that the CPU time of all of it is known. Of a process that has no other children."""

    def __init__(self, kinds: dict[str, Any]) -> None:
        self.kinds = kinds  # kind -> {"line", "env", "stdin"}
        self.cpu_s = dict.fromkeys((*kinds, "senders"), 0.0)
        self.count = dict.fromkeys((*kinds, "senders"), 0)
        self.started: dict[int, str] = {}  # pid -> kind

    def reap(self, options: int) -> bool:
        """Reap one child; False when there is none (any more, or yet)."""
        try:
            pid, _, used = os.wait4(-1, options)
        except ChildProcessError:
            return False
        if not pid:
            return False
        kind = self.started.pop(pid, "senders")
        self.cpu_s[kind] += used.ru_utime + used.ru_stime
        self.count[kind] += 1
        return True

    def run(self, events: int, every_s: float, append: list[list[str]]) -> None:
        """`events` of each kind, one of a kind every `every_s`. append: for each event
        [the file, the turn of 1970] to add to a transcript before it, or nothing."""
        begun, step = time.monotonic(), every_s / len(self.kinds)
        number = 0
        for n in range(events):
            if append:
                with open(append[n][0], "a") as file:
                    file.write(append[n][1].replace(stamp(0), stamp(time.time() - 1)))
            for kind, given in self.kinds.items():
                until = begun + number * step
                while time.monotonic() < until:
                    if not self.reap(os.WNOHANG):
                        time.sleep(0.005)
                pid, write = spawn(["/bin/sh", "-c", given["line"]], given["env"])
                self.started[pid] = kind
                feed(write, given["stdin"].encode())
                number += 1
        while self.reap(0):
            pass


def burst(given: dict[str, Any]) -> None:
    """The process of a Burst: it prints CPU seconds and how many processes there were,
    by kind."""
    adopt_orphans()
    signal.alarm(600)
    found = Burst(given["kinds"])
    found.run(given["events"], given["every_s"], given.get("append", []))
    print(json.dumps({"cpu_s": found.cpu_s, "count": found.count}))


def cpu_of_events(
    home: Home, url: str, sent: dict[str, Any], events: int, every_s: float, **more: Any
) -> tuple[float, float, float, int]:
    """CPU of such an event, in seconds: (of its hook, its share of the senders, of the
    sample), and how many senders there were."""
    stdin, env = json.dumps(sent), home.env(url)
    lines = {"hook": example_command(), "sample": SAMPLE}
    kinds = {
        kind: {"line": line, "env": env, "stdin": stdin} for kind, line in lines.items()
    }
    given = {"kinds": kinds, "events": events, "every_s": every_s, **more}
    run = subprocess.run(
        [PYTHON, __file__, "--burst"],
        input=json.dumps(given).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(run.stdout)
    assert not home.waiting()
    cpu = {kind: seconds / events for kind, seconds in found["cpu_s"].items()}
    return cpu["hook"], cpu["senders"], cpu["sample"], found["count"]["senders"]


def measure_cpu(table: Table, top: pathlib.Path, seconds: float) -> None:
    """CPU of an event: its hook's, and its share of the sender's."""
    table.section(f"CPU of an event, all in (bursts of {seconds:.0f} s)")
    if sys.platform != "linux":
        table.row("not measured: the senders cannot be adopted here", "", "")
        return
    server, home = Server(0), home_with_script(top / "cpu")
    try:
        tool, events = event("PostToolUse-Bash"), int(seconds * 2)
        found = cpu_of_events(home, server.url, tool, events, 0.5)
        show_cpu(table, "tool events, two a second", found, 0.45, 0.35)
        alone = int(seconds / 4)  # each sender is over when the next event comes
        found = cpu_of_events(home, server.url, event("Stop"), alone, 4)
        show_cpu(table, "single Stops", found, 1.15, 1.0)
        path = top / "cpu.jsonl"
        transcript = Transcript(path, "cpu")
        transcript.grow(1 << 20)
        stop = event("Stop", session_id="cpu", transcript_path=str(path))
        append = [[str(path), transcript.turn(0)] for _ in range(alone)]
        found = cpu_of_events(home, server.url, stop, alone, 4, append=append)
        show_cpu(table, "single Stops with their usage", found, None, None)
    finally:
        home.end()
        server.close()


def show_cpu(
    table: Table,
    what: str,
    found: tuple[float, float, float, int],
    asked: float | None,
    aim: float | None,
) -> None:
    """The CPU of one kind of event."""
    hook, sender, sample, senders = found
    ratio = (hook + sender) / sample
    parts = f"{hook * 1e3:.1f} + {sender * 1e3:.1f} ms, the sample {sample * 1e3:.1f}"
    if asked is None:
        table.row(f"{what} / the sample", ratio, ".2f")
    else:
        table.most(f"{what} / the sample", ratio, ".2f", asked, aim)
    table.row(f"   hook + sender: {parts}; senders", senders, "d")


# -- The sender -----------------------------------------------------------------------


def measure_drain(table: Table, top: pathlib.Path, runs: int) -> None:
    """How fast a sender empties an outbox of 5,000, against a bare urllib loop."""
    server, home, bodies = Server(0), Home(top / "drain"), top / "bodies"
    env = home.env(server.url)
    walls, loops, peaks = [], [], []
    for _ in range(runs):
        place(home, server.url, 5000)
        records = [json.loads(path.read_text()) for path in home.waiting()]
        bodies.write_text("".join(json.dumps(r["ping"]) + "\n" for r in records))
        wall, _, peak = measured(sender_command(), env)
        while home.waiting():  # a busy machine: one life was too short
            more, _, _ = measured(sender_command(), env)
            wall += more
        loop = measured([*BARE, "-c", BARE_LOOP, str(bodies), server.url], env)[0]
        walls.append(wall)
        loops.append(loop)
        peaks.append(peak)
    server.close()
    table.section(f"The sender, 5,000 pings waiting (medians of {runs})")
    table.row("pings a second", 5000 / median(walls), ".0f")
    rate = median(loops) / median(walls)
    table.least("rate / that of a bare urllib loop", rate, ".2f", 0.72, 0.8)
    table.most("the sender's peak memory, MB", max(peaks) / 1e6, ".1f", 23)


# -- Usage ----------------------------------------------------------------------------


class Transcript:
    """A growing transcript of rows as the real client writes them."""

    def __init__(self, path: pathlib.Path, session_id: str) -> None:
        self.path, self.session_id, self.messages = path, session_id, 0
        (found,) = (FIXTURES / "transcripts" / "tools").glob("*.jsonl")
        rows = [json.loads(line) for line in found.read_text("utf-8").splitlines()]
        users = [row for row in rows if row["type"] == "user"]
        assistants = [row for row in rows if row["type"] == "assistant"]
        self.prompt, self.result, self.work = users[0], users[1], assistants[:2]
        self.last = assistants[-1]
        self.text = SCRIPT.read_text("utf-8")  # what tools mostly show: source code

    def turn(self, at: float, calls: int = 6, result_chars: int = 24000) -> str:
        """One turn's lines: a prompt, some tool calls with long results, an answer."""
        rows = [dict(self.prompt)]
        for _ in range(calls):
            self.messages += 1
            rows += [self.message(row) for row in self.work]
            start = random.randrange(len(self.text) - result_chars)
            content = self.text[start : start + result_chars]
            block = dict(self.result["message"]["content"][0], content=content)
            block["is_error"] = False
            message = {"role": "user", "content": [block]}
            shown = {"stdout": content, "stderr": ""}
            rows.append(dict(self.result, message=message, toolUseResult=shown))
        self.messages += 1
        rows.append(self.message(self.last))
        changes = {"timestamp": stamp(at), "sessionId": self.session_id}
        lines = (json.dumps({**row, **changes}, separators=(",", ":")) for row in rows)
        return "".join(line + "\n" for line in lines)

    def message(self, row: dict[str, Any]) -> dict[str, Any]:
        """An assistant row with the id of the message being written."""
        return dict(row, message=dict(row["message"], id=f"msg_{self.messages}"))

    def grow(self, size: int) -> None:
        """Append turns, stamped an hour ago, until the file has `size` bytes."""
        with open(str(self.path), "a") as file:
            while file.tell() < size:
                file.write("".join(self.turn(time.time() - 3600) for _ in range(20)))

    def append(self) -> None:
        """Append one turn of a few seconds ago."""
        with open(str(self.path), "a") as file:
            file.write(self.turn(time.time() - 5))


def place_event(
    home: Home, url: str, name: str, session_id: str, path: pathlib.Path, age_s: float
) -> None:
    """Put an event's ping into the outbox with what the sender needs for its usage.
    path: of the transcript."""
    made = only_enqueue(home, url, event(name, session_id=session_id))
    record = json.loads(made.read_text("utf-8"))
    record["local"] = {"transcript": str(path), "git": False}
    later = f"{time.time_ns() - int(age_s * 1e9):020d}-{made.name[21:]}"
    made.with_name(later).write_text(json.dumps(record))
    made.unlink()


class UsageBench:
    """Transcripts of two sizes, and what reading them takes.

    firsts: size in MB -> of each first read (wall s, CPU s, peak bytes). turns: size ->
    CPU s of each turn more. received: a file with every ping that was sent.
    """

    def __init__(self, top: pathlib.Path, large_mb: int) -> None:
        self.received, self.home = top / "received", Home(top / "usage")
        self.server = Server(0, self.received)
        self.env = self.home.env(self.server.url)
        self.growing: dict[int, Transcript] = {}
        for size_mb in (1, large_mb):
            transcript = Transcript(top / f"{size_mb}.jsonl", f"first-{size_mb}-0")
            transcript.grow(size_mb << 20)
            self.growing[size_mb] = transcript
        self.firsts: dict[int, list[tuple[float, float, int]]] = {1: [], large_mb: []}
        self.turns: dict[int, list[float]] = {1: [], large_mb: []}

    def place(self, name: str, session_id: str, size_mb: int, age_s: float) -> None:
        """Put an event into the outbox, of a session with a transcript of that size."""
        path = self.growing[size_mb].path
        place_event(self.home, self.server.url, name, session_id, path, age_s)

    def first_read(self, size_mb: int, number: int) -> None:
        """Measure the first turn's end of a session that has such a transcript."""
        session_id = f"first-{size_mb}-{number}"
        self.place("SessionStart-startup", session_id, size_mb, 7200)
        measured(sender_command(), self.env)  # opens the account
        self.place("Stop", session_id, size_mb, 10)
        self.firsts[size_mb].append(measured(sender_command(), self.env))

    def turn(self, size_mb: int) -> None:
        """Measure one turn more."""
        transcript = self.growing[size_mb]
        transcript.append()
        self.place("Stop", transcript.session_id, size_mb, 3)
        self.turns[size_mb].append(measured(sender_command(), self.env)[1])

    def sums_agree(self) -> bool:
        """Whether the pings of a session add up to what its transcript holds, each
        message counted once."""
        charged: dict[str, int] = {}
        for line in self.received.read_text("utf-8").splitlines():
            ping = json.loads(line)
            more = ping.get("output_tokens", 0)
            charged[ping["session_id"]] = charged.get(ping["session_id"], 0) + more
        return all(
            charged.get(transcript.session_id) == output_tokens(transcript.path)
            for transcript in self.growing.values()
        )


def output_tokens(path: pathlib.Path) -> int:
    """The output tokens of a transcript, each message counted once."""
    once = {}
    with open(str(path), encoding="utf-8") as file:
        for line in file:
            if '"type":"assistant"' in line:
                message = json.loads(line)["message"]
                once[message["id"]] = message["usage"]["output_tokens"]
    return sum(once.values())


def measure_usage(table: Table, top: pathlib.Path, runs: int, large_mb: int) -> None:
    """Reading a transcript: the first time, and for one more turn."""
    bench, first_runs = UsageBench(top, large_mb), min(runs, 7)
    try:
        for number in range(first_runs):
            for size_mb in bench.growing:
                bench.first_read(size_mb, number)
        for size_mb, transcript in bench.growing.items():
            transcript.messages = 10**6 * size_mb  # ids of their own
        for _ in range(runs):
            for size_mb in bench.growing:
                bench.turn(size_mb)
        table.section(
            f"Usage, {large_mb} MB of typical rows (medians of {first_runs} first "
            f"reads, {runs} turns)"
        )
        show_usage(table, bench, large_mb)
    finally:
        bench.home.end()
        bench.server.close()


def show_usage(table: Table, bench: UsageBench, large_mb: int) -> None:
    """The figures of reading transcripts."""
    path = bench.growing[large_mb].path
    read = path.stat().st_size - bench.growing[1].path.stat().st_size
    walls = {n: median(wall for wall, _, _ in bench.firsts[n]) for n in (1, large_mb)}
    cpus = {n: median(cpu for _, cpu, _ in bench.firsts[n]) for n in (1, large_mb)}
    ratio = median(bench.turns[large_mb]) / median(bench.turns[1])
    what = f"one more turn, CPU: after {large_mb} MB / after 1 MB"
    table.most(what, ratio, ".2f", 1.2)
    rate = read / (walls[large_mb] - walls[1]) / 1e6
    what = f"first read of {large_mb} MB, MB/s (less what 1 MB takes)"
    table.least(what, rate, ".0f", 300)
    peak = max(peak for _, _, peak in bench.firsts[large_mb])
    table.most("its peak memory, MB", peak / 1e6, ".1f", 60)
    rate = read / (cpus[large_mb] - cpus[1]) / 1e6
    table.row("the same per second of CPU time, MB/s", rate, ".0f")
    table.row("the whole sender over 1 MB, ms", walls[1] * 1e3, ".0f")
    agree = "yes" if bench.sums_agree() else "NO"
    table.row("the pings' tokens are those of the transcripts", agree, "")
    jq = shutil.which("jq")
    if jq:
        naive = '[.[] | select(.type == "assistant").message.usage.output_tokens] | add'
        wall, _, peak = measured([jq, "-s", naive, str(path)], bench.env)
        rate = path.stat().st_size / wall / 1e6
        table.row("beside it: jq -s, the naive sum, MB/s", rate, ".0f")
        table.row("its peak memory, MB", peak / 1e6, ".0f")


# -- A fleet after an outage ----------------------------------------------------------

OUTAGE_S = 3600.0
STATUS = 302  # what the tracker answers meanwhile
ANSWER_S = 0.05
EVENT_EVERY_S = 60.0  # of each machine, on average, at random
FLEET_ENDS_S = 4 * OUTAGE_S
WINDOW_S = 60.0


class Machine:
    """A machine's hooks and senders, over hours, in an instant: the script's own code
    and files; only the clock and the far side are not real.

    now: seconds since the outage began. requests: when each was made.
    """

    BEGAN = 1_800_000_000.0  # seconds since 1970

    def __init__(self, script: Any, directory: str, seed: int) -> None:
        self.script, self.random = script, random.Random(seed)
        self.now, self.next_event = 0.0, self.random.uniform(0, EVENT_EVERY_S)
        self.requests: list[float] = []
        self.is_well = False
        url = "http://127.0.0.1:1/ping/benchmark"
        environ = {"TELEMHQ_PING_URL": url, "TELEMHQ_STATE_DIR": directory}
        self.settings = script.Settings(environ)
        self.tracker = script.find_tracker(self.settings)
        self.outbox = script.outbox_of(self.settings, self.tracker)
        self.event = {"hook_event_name": "Stop", "session_id": "s", "cwd": "/a"}

    # What the script sees of the clock and the tracker

    def time(self) -> float:
        return self.BEGAN + self.now

    def time_ns(self) -> int:
        return int(self.time() * 1e9)

    monotonic = time

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)  # gmtime, strftime

    def sleep(self, seconds: float) -> None:
        """Let time pass, and the hooks that are due in it run."""
        until = self.now + seconds
        while self.next_event <= until:
            self.now = max(self.now, self.next_event)
            self.next_event += self.random.expovariate(1 / EVENT_EVERY_S)
            self.hook()
        self.now = max(self.now, until)

    def post(self, *_: object) -> Any:
        """A request's answer."""
        self.requests.append(self.now)
        status = STATUS if self.now < OUTAGE_S else 200
        self.sleep(ANSWER_S)
        verdict = self.script.verdict_of(status)
        return self.script.Answer(verdict, f"HTTP {status}", None, verdict == "hold")

    # What it does

    def hook(self) -> None:
        """What a hook does about its ping."""
        if self.is_well:
            self.requests.append(self.now)
            return
        script, ns = self.script, self.time_ns()
        ping = script.make_ping(self.event, self.settings, "api", ns, 100)
        self.outbox.put(ns, ping, {})
        if self.outbox.state().backoff_left_s(self.time()):
            return
        lock = self.outbox.take_lock()
        if lock is not None:
            ends = self.monotonic() + script.LIFE_S
            script.Sender(self.outbox, self.tracker, self.settings, ends).live(lock)
        done = self.now > OUTAGE_S and not self.outbox.waiting()
        self.is_well = done  # from here on, each event is a request


def hours_of(seeds: list[int]) -> list[float]:
    """When the machines with these seeds made their requests."""
    script: Any = load_script()
    found = []
    random.seed(seeds[0])
    memory = "/dev/shm"
    script.make_opener = lambda *_: None
    script.Sender.watch_over = lambda *_: None  # a thread needs a real clock
    for seed in seeds:
        parent = memory if os.path.isdir(memory) else None
        with tempfile.TemporaryDirectory(dir=parent) as name:
            machine = Machine(script, name, seed)
            script.time, script.post = machine, machine.post
            machine.sleep(FLEET_ENDS_S)
            found += machine.requests
    return found


def measure_fleet(table: Table, machines: int) -> None:
    """How high the waves are in which machines come back that an outage has held."""
    parts = [list(range(n, min(n + 50, machines))) for n in range(0, machines, 50)]
    windows = [0] * (int(FLEET_ENDS_S / WINDOW_S) + 1)
    with ProcessPoolExecutor() as pool:
        for requests in pool.map(hours_of, parts):
            for at in requests:
                windows[min(int(at / WINDOW_S), len(windows) - 1)] += 1
    steady = machines * WINDOW_S / EVENT_EVERY_S
    back = windows[int(OUTAGE_S / WINDOW_S) : -1]
    table.section(
        f"{machines:,} machines, an event a minute each, back after an hour of "
        f"{STATUS} (simulated)"
    )
    highest = max(back) / steady
    table.most("highest minute / the steady rate", highest, ".2f", 4)
    during = max(windows[: int(OUTAGE_S / WINDOW_S)]) / steady
    table.row("the same while the outage lasts", during, ".2f")
    above = [n for n, count in enumerate(back) if count > 1.25 * steady]
    over_s = (above[-1] + 1) * WINDOW_S if above else 0.0
    table.row("minutes until the rate is steady again", over_s / 60, ".0f")


def options_given() -> argparse.Namespace:
    """The command line."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs, short files")
    parser.add_argument("--runs", type=int, help="of each figure (25; quick: 5)")
    every = "hook,cpu,drain,usage,fleet"
    parser.add_argument("--only", default=every, help=f"some of {every}")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    parser.add_argument("--burst", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = options_given()
    if options.serve is not None:
        serve(options.serve, options.keep)
        return
    if options.burst:
        burst(json.load(sys.stdin))
        return
    quick = options.quick
    runs = options.runs or (5 if quick else 25)
    print(
        f"CPython {platform.python_version()}, {platform.platform()}, "
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    )
    table, chosen = Table(), options.only.split(",")
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name)
        if "hook" in chosen:
            measure_hook(table, top, runs)
        if "cpu" in chosen:
            measure_cpu(table, top, 10 if quick else 40)
        if "drain" in chosen:
            measure_drain(table, top, 1 if quick else 5)
        if "usage" in chosen:
            measure_usage(table, top, runs, 40 if quick else 400)
        if "fleet" in chosen:
            measure_fleet(table, 500 if quick else 10_000)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
