"""How fast, how big: measure the hook and its sender, print one table.

    python3 tests/benchmark.py [--quick] [hook] [cpu] [drain] [fleet]

Without words all parts: medians of 25 interleaved runs (--quick: 5), seven minutes.
Ratios are of one run, for machines differ. (On macOS the CPU of senders is not known.)
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from statistics import median
from typing import TYPE_CHECKING, Any, Callable, List, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

from support import (  # noqa: E402
    ROOT,
    SCRIPT,
    Home,
    dead_url,
    event,
    load_script,
    place,
    read_request,
    sender_command,
)

if TYPE_CHECKING:
    Rows = List[Tuple[str, float, str, str]]  # what, how much, asked, aim
PYTHON = sys.executable
BARE = [PYTHON, "-I", "-S"]
PASS, BESIDE = f"{PYTHON} -I -S -c pass", f"{PYTHON} -I -S ~/.claude/hooks/"
SAMPLE, AS_SCRIPT = BESIDE + "sample.py", BESIDE + SCRIPT.name
# The job as most such hooks do it: parse, hash, POST, wait for the answer.
SYNCHRONOUS = """
import hashlib, json, os, sys, urllib.request
event, url = json.load(sys.stdin), os.environ["TELEMHQ_PING_URL"]
ping = {"event": event["hook_event_name"], "session_id": event["session_id"],
        "cwd_hash": hashlib.sha256(event["cwd"].encode()).hexdigest()[:12]}
sent = json.dumps(ping).encode(), {"Content-Type": "application/json"}
with urllib.request.urlopen(urllib.request.Request(url, *sent), timeout=10) as response:
    response.read()
"""
BARE_LOOP = """
import os, sys, urllib.request as r
os.nice(5)  # as the sender is
for line in open(sys.argv[1], "rb"):
    sent = line.strip(), {"Content-Type": "application/json"}
    with r.urlopen(r.Request(sys.argv[2], *sent), timeout=10) as response:
        response.read()
"""
# Tells a command's wall time and peak memory; on Linux that counts from its parent's.
LAUNCHER = """
import os, sys, time
begun = time.perf_counter()
null = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=null)
_, status, used = os.wait4(pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
assert status == 0
print(time.perf_counter() - begun, used.ru_maxrss * unit)
"""
STOP, TOOL = event("Stop"), event("PostToolUse-Bash")


def example_command() -> str:
    """The example settings' command for a Stop, with this Python in it."""
    example = json.loads((ROOT / "settings.example.json").read_text("utf-8"))
    line: str = example["hooks"]["Stop"][0]["hooks"][0]["command"]
    return line.replace("python3 ", PYTHON + " ")


def home_with_script(path: pathlib.Path) -> Home:
    """A HOME in which the script is installed, and the sample beside it."""
    home = Home(path)
    hooks = home.path / ".claude" / "hooks"
    hooks.mkdir(parents=True)
    shutil.copy(SCRIPT, hooks)
    (hooks / "sample.py").write_text(SYNCHRONOUS)
    return home


# -- The far side ----------------------------------------------------------------------


class Server:
    """Answers every POST with 200 after `delay_s`, in a process of its own."""

    def __init__(self, delay_s: float) -> None:
        words = [PYTHON, __file__, "--serve", str(delay_s)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE)
        assert self.process.stdout
        self.place = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.url = self.place + "/ping/benchmark"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def serve(delay_s: float) -> None:
    """The server's process; it ends with the benchmark's."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listening.getsockname()[1], flush=True)
    listening.settimeout(5)
    parent = os.getppid()

    def answer(connection: socket.socket) -> None:
        with connection:
            read_request(connection)
            time.sleep(delay_s)
            head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            connection.sendall(head)

    while os.getppid() == parent:
        try:
            connection = listening.accept()[0]
        except socket.timeout:
            continue
        connection.settimeout(None)
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


# -- The hook --------------------------------------------------------------------------


def start(line: str, env: dict[str, str], stdin: bytes) -> int:
    """Start a shell's command with something on its stdin; its pid."""
    read, write = os.pipe()
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    actions = [(os.POSIX_SPAWN_DUP2, read, 0), *null]
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", line], env, file_actions=actions)
    os.close(read)
    os.write(write, stdin)  # an event fits into a pipe
    os.close(write)
    return pid


class Variant:
    """One thing to measure. home: where it leaves a sender and pings behind. keep: how
    many pings wait there; None: its sender is over before the next run."""

    def __init__(
        self,
        line: str,
        env: dict[str, str],
        home: Home | None = None,
        keep: int | None = None,
    ) -> None:
        self.line, self.env, self.home, self.keep = line, env, home, keep
        self.stdin = json.dumps(STOP).encode()
        self.walls: list[float] = []

    def run(self) -> None:
        """Measure once, then put everything back, outside of the measured time."""
        begun = time.perf_counter()
        pid = start(self.line, self.env, self.stdin)
        assert os.waitpid(pid, 0)[1] == 0, self.line
        self.walls.append(time.perf_counter() - begun)
        if self.home:
            if self.keep is None:
                self.home.quiet(30)
            self.home.end()
            for path in self.home.waiting()[self.keep or 0 :]:
                path.unlink()
            for path in self.home.state.glob("*/state.json"):
                path.unlink()  # no back-off spares the next run its sender


def five_trackers(place: str) -> dict[str, str]:
    """The variables that send to all five trackers, each of them the same server."""
    urls = "WIGTOKEN_SERVER RECORDER_URL TELEMHQ_OTLP_ENDPOINT CLAUDE_METRICS_API_URL"
    secrets = "WIGTOKEN_MACHINE RECORDER_PAT RECORDER_PREFIX CLAUDE_METRICS_API_TOKEN"
    return {
        "TELEMHQ_DESTINATIONS": "telemhq,wigtoken,recorder,otlp,claude-metrics",
        "WIGTOKEN_TOKEN": "wts_benchmark",
        **dict.fromkeys(urls.split(), place),
        **dict.fromkeys(secrets.split(), "benchmark"),
    }


FIGURES = """
hook    bare    1.40  1.25  the hook / a bare interpreter, both through sh
hook    sample  -     -     the hook / the same job done synchronously
200ms   hook    1.1   1.05  the hook with a tracker that takes 200 ms / without
10s     hook    1.1   1.05  the hook with one that takes 10 s / without
dead    hook    1.1   1.05  the hook with a dead one / without
full    hook    1.1   1.05  the hook with 5,000 pings waiting / without
script  bare    7     4.5   run as a script / a bare interpreter
"""


def measure_hook(top: pathlib.Path, runs: int) -> Rows:
    """The hook's wall time through sh, against a bare interpreter's and the job done
    synchronously; all interleaved, in another order each time."""
    fast, slow, hanging = Server(0), Server(0.2), Server(10)
    line, names = example_command(), iter(range(99))

    def hook(url: str, line: str = line, **more: Any) -> Variant:
        home = home_with_script(top / str(next(names)))
        env = {**home.env(url), **more.pop("env", {})}
        return Variant(line, env, home, **more)

    one, full = hook(fast.url), hook(hanging.url, keep=5000)
    assert full.home
    place(full.home, hanging.url, 5000)
    found = {
        "bare": Variant(PASS, one.env),
        "sample": Variant(SAMPLE, one.env),
        "hook": one,
        "200ms": hook(slow.url),
        "10s": hook(hanging.url, keep=0),
        "dead": hook(dead_url(), keep=0),
        "full": full,
        "five": hook(fast.url, env=five_trackers(fast.place)),
        "script": hook(fast.url, line=AS_SCRIPT),
    }
    order = list(found.values())
    for n in range(runs + 1):
        random.shuffle(order)
        for variant in order:
            variant.run()
            if n == 0:  # it made bytecode and directories, and filled caches
                variant.walls.clear()
    for server in (fast, slow, hanging):
        server.close()
    s = {name: median(variant.walls) for name, variant in found.items()}
    more = (s["five"] - s["hook"]) / 4 / s["bare"]
    rows = [(f"{n}, ms", s[n] * 1e3, "-", "-") for n in ("bare", "hook", "sample")]
    rows.append(("each further tracker / a bare interpreter", more, "0.1", "-"))
    for line in FIGURES.strip().split("\n"):
        name, other, asked, aim, what = line.split(None, 4)
        rows.append((what, s[name] / s[other], asked, aim))
    return rows


# -- What an event costs, all in -------------------------------------------------------


def burst(given: dict[str, Any]) -> None:
    """A process that runs hooks and samples in turn, and reaps all they leave behind
    (Linux): it prints the CPU seconds of the hooks with their senders, and of the
    samples."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")  # 36: PR_SET_CHILD_SUBREAPER
    samples, cpu = set(), [0.0, 0.0]
    stdin, begun = json.dumps(given["sent"]).encode(), time.monotonic()

    def reap(options: int) -> bool:
        """Reap one child; False when there is none (any more, or yet)."""
        try:
            pid, _, used = os.wait4(-1, options)
        except ChildProcessError:
            return False
        cpu[pid in samples] += used.ru_utime + used.ru_stime
        return pid != 0

    for n in range(2 * given["events"]):
        while time.monotonic() < begun + n * given["every_s"] / 2:
            if not reap(os.WNOHANG):
                time.sleep(0.005)
        pid = start(given["lines"][n % 2], given["env"], stdin)
        if n % 2:
            samples.add(pid)
    while reap(0):
        pass
    print(json.dumps(cpu))


def measure_cpu(top: pathlib.Path, seconds: float) -> Rows:
    """CPU of an event: its hook's, and its share of the senders'."""
    if sys.platform != "linux":
        return []
    server, home = Server(0), home_with_script(top / "cpu")
    found: Rows = []
    for what, sent, every_s, asked, aim in (
        ("a tool's event, two a second", TOOL, 0.5, "0.32", "0.3"),
        ("a single Stop", STOP, 4, "1.1", "1.0"),
    ):
        events = max(3, int(seconds / every_s))
        lines, env = [example_command(), SAMPLE], home.env(server.url)
        given = {"sent": sent, "every_s": every_s, "lines": lines, "env": env}
        run = subprocess.run(
            [PYTHON, __file__, "--burst"],
            input=json.dumps({**given, "events": events}).encode(),
            stdout=subprocess.PIPE,
            check=True,
        )
        assert not home.waiting()
        ours, theirs = (cpu / events * 1e3 for cpu in json.loads(run.stdout))
        found += [
            (f"CPU of {what}, all in, ms", ours, "-", "-"),
            (f"CPU of {what} / the synchronous job's", ours / theirs, asked, aim),
        ]
    server.close()
    return found


# -- The sender ------------------------------------------------------------------------


def measured(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Run a command through the LAUNCHER: (wall s, peak MB)."""
    words = [*BARE, "-c", LAUNCHER, *command]
    run = subprocess.run(
        words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True
    )
    wall, peak = run.stdout.split()
    return float(wall), int(peak) / 1e6


def measure_drain(top: pathlib.Path, runs: int) -> Rows:
    """How fast a sender empties an outbox of 5,000, against a bare urllib loop."""
    server, home, bodies = Server(0), Home(top / "drain"), top / "bodies"
    env, times = home.env(server.url), []
    for _ in range(runs):
        place(home, server.url, 5000)
        records = [json.loads(path.read_text()) for path in home.waiting()]
        bodies.write_text("".join(json.dumps(r["ping"]) + "\n" for r in records))
        command = sender_command("detached", "-1", home.destination().name)
        wall, peak = measured(command, env)
        assert not home.waiting()  # or this machine is too slow for one life
        loop = measured([*BARE, "-c", BARE_LOOP, str(bodies), server.url], env)[0]
        times.append((wall, loop / wall, peak))
    server.close()
    wall, rate, peak = map(median, zip(*times))
    return [
        ("5,000 waiting: pings a second", 5000 / wall, "-", "-"),
        ("5,000 waiting: rate / that of a bare urllib loop", rate, "0.7", "0.8"),
        ("the sender's peak memory, MB", peak, "23", "-"),
    ]


# -- A fleet after an outage -----------------------------------------------------------

FLEET, OUTAGE_S, EVERY_S, LIFE_S = 10_000, 3600.0, 60.0, 60.0


def returns_at(backoff_s: Callable[..., float], verdict: str) -> float:
    """When a machine first comes after the outage: it tries when a back-off ends within
    a sender's life, else at the first event after it. Seconds since it began."""
    at, failures = random.uniform(0, EVERY_S), 0
    ends = at + LIFE_S
    while at < OUTAGE_S:
        failures += 1
        at += backoff_s(verdict, failures)
        if at >= ends:
            at += random.expovariate(1 / EVERY_S)
            ends = at + LIFE_S
    return at


def measure_fleet(*_: object) -> Rows:
    """The highest minute in which machines come back that an hour of failures has held,
    each with its backlog at once, in steady minutes; simulated, by the script's own
    back-off."""
    script, found = load_script(), []
    random.seed(20)
    for status in (302, 503):
        minutes = [0] * 24 * 60
        for _machine in range(FLEET):
            at = returns_at(script.backoff_s, script.verdict_of(status))
            minutes[int(at / 60)] += int(at / EVERY_S)
            for minute in range(int(at / 60) + 1, len(minutes)):
                minutes[minute] += 1
        what = f"10,000 machines after an hour of {status}: highest minute / steady"
        found.append((what, max(minutes) / FLEET, "10", "-"))
    return found


def main() -> None:
    quick, load, rows = "--quick" in sys.argv, os.getloadavg()[0], []
    parts: dict[str, tuple[Callable[..., Rows], int]] = {
        "hook": (measure_hook, 5 if quick else 25),
        "cpu": (measure_cpu, 10 if quick else 40),
        "drain": (measure_drain, 1 if quick else 5),
        "fleet": (measure_fleet, 0),
    }
    with tempfile.TemporaryDirectory() as name:
        for part in [word for word in sys.argv if word in parts] or parts:
            measure, much = parts[part]
            rows += measure(pathlib.Path(name), much)
    print(f"CPython {platform.python_version()}, {platform.system()}, load {load:.1f}")
    print(f"{'':<66} {'measured':>8} {'asked':>6} {'aim':>6}")
    for what, value, asked, aim in rows:
        print(f"{what:<66} {value:8.2f} {asked:>6} {aim:>6}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(float(sys.argv[2]))
    elif sys.argv[1:2] == ["--burst"]:
        burst(json.load(sys.stdin))
    else:
        main()
