"""How fast, how big: measure the hook and its sender, print one table.

    python3 tests/benchmark.py            medians of 25 interleaved runs; some minutes
    python3 tests/benchmark.py --quick    5 runs, shorter transcripts; to see it work
    python3 tests/benchmark.py --only hook,drain,usage

Not a test: it fails for nothing. Every figure is a ratio within one run, but for sizes
and the reading rate. Linux or macOS; what it starts it ends, traffic is loopback only.
"""
from __future__ import annotations

import argparse
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.dont_write_bytecode = True

from support import (  # noqa: E402
    FIXTURES,
    SCRIPT,
    Home,
    dead_url,
    event,
    only_enqueue,
    place,
)

BARE = [sys.executable, "-I", "-S"]
HOOK = BARE + [str(SCRIPT)]
SENDER = HOOK + ["--sender", "-1"]
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


class Server:
    """Answers every POST with 200 after `delay_s`; as little else as can be done.

    In a process of its own, so that it shares no interpreter with what is measured.
    keep: a file to which it adds every body, a line each.
    """

    def __init__(self, delay_s, keep=os.devnull):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(delay_s), "--keep", str(keep)],
            stdout=subprocess.PIPE,
        )
        port = int(self.process.stdout.readline())
        self.url = "http://127.0.0.1:%d/ping/benchmark" % port

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def serve(delay_s, keep):
    """The server's process."""
    kept = open(keep, "ab", 0)
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listening.getsockname()[1], flush=True)

    def answer(connection):
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
            kept.write(body + b"\n")
            try:
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            except OSError:
                pass

    while True:
        connection = listening.accept()[0]
        if delay_s:
            threading.Thread(target=answer, args=(connection,), daemon=True).start()
        else:
            answer(connection)


def spawn(command, env):
    """Start a command with a pipe on stdin; (pid, the pipe's end to write to)."""
    read, write = os.pipe()
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    pid = os.posix_spawn(
        command[0], command, env, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)] + null
    )
    os.close(read)
    return pid, write


def wall_and_cpu_s(command, env, stdin, at_once=1):
    """Seconds from the start of `at_once` such commands to the end of the last, and
    what they took of the CPU."""
    begun = time.perf_counter()
    started = [spawn(command, env) for _ in range(at_once)]
    for _, write in started:
        left = memoryview(stdin)
        while left:
            left = left[os.write(write, left) :]
        os.close(write)
    cpu = 0
    for pid, _ in started:
        _, status, used = os.wait4(pid, 0)
        assert status == 0, command
        cpu += used.ru_utime + used.ru_stime
    return time.perf_counter() - begun, cpu


def measured(command, env):
    """Run a command through the LAUNCHER: (wall s, CPU s, peak bytes)."""
    run = subprocess.run(
        BARE + ["-c", LAUNCHER] + command, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    wall, cpu, peak, status = run.stdout.split()
    assert status == b"0", command
    return float(wall), float(cpu), int(peak)


class Table:
    """The lines of the table, printed as they come."""

    def __init__(self):
        print("%-62s %10s   %s" % ("", "measured", "goal"))

    def section(self, text):
        print("\n" + text)

    def row(self, what, value, form, goal="", good=True):
        verdict = "" if good else "   MISSED"
        print("  %-60s %10s   %s%s" % (what, form % value, goal, verdict), flush=True)

    def most(self, what, value, form, limit, aim=""):
        """A figure that should be at most `limit`."""
        goal = "<= " + form % limit + (" (aim %s)" % aim if aim else "")
        self.row(what, value, form, goal, value <= limit)

    def least(self, what, value, form, limit):
        """A figure that should be at least `limit`."""
        self.row(what, value, form, ">= " + form % limit, value >= limit)


# -- The hook -------------------------------------------------------------------------


class Variant:
    """One thing to measure again and again; `walls`, `cpus` its times."""

    def __init__(self, command, env, stdin, home=None, at_once=1, keep=0):
        self.command, self.env, self.stdin, self.home = command, env, stdin, home
        self.at_once, self.keep, self.walls, self.cpus = at_once, keep, [], []

    def run(self):
        """Measure once, then put everything back, outside of the measured time."""
        wall, cpu = wall_and_cpu_s(self.command, self.env, self.stdin, self.at_once)
        self.walls.append(wall)
        self.cpus.append(cpu)
        if not self.home:
            return
        if self.keep is None:  # a server that answers: the sender ends by itself
            self.home.quiet(30)
        self.home.end()
        self.home.quiet(30)
        for path in self.home.waiting()[self.keep or 0 :]:
            path.unlink()
        for path in self.home.state.glob("*/state.json"):
            path.unlink()  # so that no back-off spares the next run its sender

    @property
    def s(self):
        return median(self.walls)


def measure_hook(table, top, runs):
    """The hook's wall time, against a bare interpreter's and the synchronous job's."""
    fast, slow, hanging = Server(0), Server(0.2), Server(10)
    small = json.dumps(event("Stop")).encode()
    large = json.dumps(event("Stop", last_assistant_message="x" * (1 << 20))).encode()
    names = ["one", "slow", "hang", "dead", "full", "big", "eight"]
    homes = {name: Home(top / name) for name in names}

    def hook(name, url, stdin=small, **more):
        return Variant(HOOK, homes[name].env(url), stdin, homes[name], **more)

    place(homes["full"], hanging.url, 5000)
    env = homes["one"].env(fast.url)
    variants = {
        "bare": Variant(BARE + ["-c", "pass"], env, b""),
        "sync": Variant(BARE + ["-c", SYNCHRONOUS], env, small),
        "hook": hook("one", fast.url, keep=None),
        "200 ms": hook("slow", slow.url, keep=None),
        "10 s": hook("hang", hanging.url),
        "dead": hook("dead", dead_url()),
        "5,000": hook("full", hanging.url, keep=5000),
        "1 MB": hook("big", fast.url, large, keep=None),
        "8 bare": Variant(BARE + ["-c", "pass"], env, b"", at_once=8),
        "8 hooks": hook("eight", fast.url, keep=None, at_once=8),
    }
    order = list(variants.values())
    for variant in order:  # once to warm up: makes directories, fills caches
        variant.run()
        variant.walls.clear()
        variant.cpus.clear()
    for _ in range(runs):
        random.shuffle(order)
        for variant in order:
            variant.run()
    for home in homes.values():
        home.end()
    for server in (fast, slow, hanging):
        server.close()
    one = {name: variant.s for name, variant in variants.items()}
    table.section("The hook's wall time (medians of %d interleaved runs)" % runs)
    table.row("python3 -I -S -c pass, ms", one["bare"] * 1e3, "%.1f")
    table.row("the hook, ms", one["hook"] * 1e3, "%.1f")
    hook_s = one["hook"]
    table.most("hook / python3 -I -S -c pass", hook_s / one["bare"], "%.2f", 3, "2.3")
    cpu = median(variants["hook"].cpus) / median(variants["bare"].cpus)
    table.row("the same in CPU time, which a busy machine blurs less", cpu, "%.2f")
    what = "hook / the same job done synchronously"
    table.most(what, hook_s / one["sync"], "%.2f", 0.5, "0.35")
    for name, what in (
        ("200 ms", "a server that takes 200 ms"),
        ("10 s", "a server that takes 10 s"),
        ("dead", "a dead server"),
        ("5,000", "5,000 pings in the outbox"),
    ):
        table.most("with %s / without" % what, one[name] / hook_s, "%.2f", 1.15)
    table.most("with a 1 MB event / without", one["1 MB"] / one["hook"], "%.2f", 2)
    table.most("eight hooks at once / eight bare interpreters at once",
               one["8 hooks"] / one["8 bare"], "%.2f", 3)  # fmt: skip


# -- The sender -----------------------------------------------------------------------


def measure_drain(table, top, runs):
    """How fast a sender empties an outbox of 5,000, against a bare urllib loop."""
    server, home, bodies = Server(0), Home(top / "drain"), top / "bodies"
    env, walls, loops, peaks = home.env(server.url), [], [], []
    for _ in range(runs):
        place(home, server.url, 5000)
        records = [json.loads(path.read_text()) for path in home.waiting()]
        bodies.write_text("".join(json.dumps(r["ping"]) + "\n" for r in records))
        wall, _, peak = measured(SENDER, env)
        assert not home.waiting()
        loop = measured(BARE + ["-c", BARE_LOOP, str(bodies), server.url], env)[0]
        walls.append(wall)
        loops.append(loop)
        peaks.append(peak)
    server.close()
    table.section("The sender, 5,000 pings waiting (medians of %d)" % runs)
    table.row("pings a second", 5000 / median(walls), "%.0f")
    table.least("rate / that of a bare urllib loop over the same bodies",
                median(loops) / median(walls), "%.2f", 0.6)  # fmt: skip
    table.most("the sender's peak memory, MB", max(peaks) / 1e6, "%.1f", 40)


# -- Usage ----------------------------------------------------------------------------


class Transcript:
    """A growing transcript of rows as the real client writes them."""

    def __init__(self, path, session_id):
        self.path, self.session_id, self.messages = path, session_id, 0
        (found,) = (FIXTURES / "transcripts" / "tools").glob("*.jsonl")
        rows = [json.loads(line) for line in found.read_text("utf-8").splitlines()]
        users = [row for row in rows if row["type"] == "user"]
        assistants = [row for row in rows if row["type"] == "assistant"]
        self.prompt, self.result, self.work = users[0], users[1], assistants[:2]
        self.last = assistants[-1]
        self.text = SCRIPT.read_text("utf-8")  # what tools mostly show: source code

    def turn(self, at, calls=6, result_chars=24000):
        """One turn's lines: a prompt, some tool calls with long results, an answer."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(at))
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
        lines = (
            json.dumps(
                dict(row, timestamp=stamp, sessionId=self.session_id),
                separators=(",", ":"),
            )  # fmt: skip
            for row in rows
        )
        return "".join(line + "\n" for line in lines)

    def message(self, row):
        """An assistant row with the id of the message being written."""
        return dict(row, message=dict(row["message"], id="msg_%d" % self.messages))

    def grow(self, size):
        """Append turns, stamped an hour ago, until the file has `size` bytes."""
        with open(str(self.path), "a") as file:
            while file.tell() < size:
                file.write("".join(self.turn(time.time() - 3600) for _ in range(20)))

    def append(self):
        """Append one turn of a few seconds ago."""
        with open(str(self.path), "a") as file:
            file.write(self.turn(time.time() - 5))


def place_event(home, url, name, session_id, transcript, age_s, **changes):
    """Put an event's ping into the outbox with what the sender needs for its usage."""
    made = only_enqueue(home, url, event(name, session_id=session_id, **changes))
    record = json.loads(made.read_text("utf-8"))
    record["local"] = {"transcript": str(transcript), "git": False}
    later = "%020d-%s" % (time.time_ns() - int(age_s * 1e9), made.name[21:])
    made.with_name(later).write_text(json.dumps(record))
    made.unlink()


def measure_usage(table, top, runs, large_mb):
    """Reading a transcript: the first time, and for one more turn."""
    server, home = Server(0, top / "received"), Home(top / "usage")
    url = server.url
    env, paths = home.env(url), {}
    for size_mb in (1, large_mb):
        paths[size_mb] = top / ("%d.jsonl" % size_mb)
        Transcript(paths[size_mb], "unused").grow(size_mb << 20)

    def first_read(size_mb, number):
        session_id = "first-%d-%d" % (size_mb, number)
        place_event(home, url, "SessionStart-startup", session_id, paths[size_mb], 7200)
        measured(SENDER, env)  # opens the account
        place_event(home, url, "Stop", session_id, paths[size_mb], 10)
        return measured(SENDER, env)

    firsts = {size_mb: [] for size_mb in paths}
    for number in range(min(runs, 7)):
        for size_mb in paths:
            firsts[size_mb].append(first_read(size_mb, number))
    small, large = (
        median(wall for wall, _, _ in firsts[size_mb]) for size_mb in (1, large_mb)
    )
    rate = (paths[large_mb].stat().st_size - paths[1].stat().st_size) / (large - small)
    growing = {size_mb: Transcript(path, "growing") for size_mb, path in paths.items()}
    cpus = {size_mb: [] for size_mb in paths}
    for size_mb, transcript in growing.items():
        transcript.messages = 10**6 * size_mb
        transcript.session_id = "first-%d-0" % size_mb
    for _ in range(runs):
        for size_mb, transcript in growing.items():
            transcript.append()
            place_event(home, url, "Stop", transcript.session_id, transcript.path, 3)
            cpus[size_mb].append(measured(SENDER, env)[1])
    agree = sums_agree(top / "received", growing)
    table.section("Usage, %d MB of typical rows (medians of %d first reads, %d turns)"
                  % (large_mb, min(runs, 7), runs))  # fmt: skip
    table.most("one more turn, CPU: after %d MB / after 1 MB" % large_mb,
               median(cpus[large_mb]) / median(cpus[1]), "%.2f", 1.2)  # fmt: skip
    table.least("first read of %d MB, MB/s (less what 1 MB takes)" % large_mb,
                rate / 1e6, "%.0f", 300)  # fmt: skip
    peak = max(peak for _, _, peak in firsts[large_mb])
    table.most("its peak memory, MB", peak / 1e6, "%.1f", 60)
    small_cpu, large_cpu = (
        median(cpu for _, cpu, _ in firsts[size_mb]) for size_mb in (1, large_mb)
    )
    rate = rate * (large - small) / (large_cpu - small_cpu)
    table.row("the same per second of CPU time, MB/s", rate / 1e6, "%.0f")
    table.row("the whole sender over 1 MB, ms", small * 1e3, "%.0f")
    table.row("the pings' tokens are those of the transcripts", agree, "%s")
    jq = shutil.which("jq")
    if jq:
        naive = '[.[] | select(.type == "assistant").message.usage.output_tokens] | add'
        wall, _, peak = measured([jq, "-s", naive, str(paths[large_mb])], env)
        size = paths[large_mb].stat().st_size
        table.row("beside it: jq -s, the naive sum, MB/s", size / wall / 1e6, "%.0f")
        table.row("its peak memory, MB", peak / 1e6, "%.0f")
    server.close()


def sums_agree(received, growing):
    """Whether the pings of a session add up to what its transcript holds, each message
    counted once."""
    charged = {}
    for line in received.read_text("utf-8").splitlines():
        ping = json.loads(line)
        more = ping.get("output_tokens", 0)
        charged[ping["session_id"]] = charged.get(ping["session_id"], 0) + more
    for transcript in growing.values():
        once = {}
        with open(str(transcript.path), encoding="utf-8") as file:
            for line in file:
                if '"type":"assistant"' in line:
                    message = json.loads(line)["message"]
                    once[message["id"]] = message["usage"]["output_tokens"]
        if charged.get(transcript.session_id) != sum(once.values()):
            return "NO"
    return "yes"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few runs, short files")
    parser.add_argument("--runs", type=int, help="of each figure (25; quick: 5)")
    parser.add_argument("--only", default="hook,drain,usage", help="some sections")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.keep)
    runs = options.runs or (5 if options.quick else 25)
    print("CPython %s, %s, %d CPUs, load %.1f" % (
        platform.python_version(), platform.platform(), os.cpu_count(),
        os.getloadavg()[0]))  # fmt: skip
    table, chosen = Table(), options.only.split(",")
    with tempfile.TemporaryDirectory() as name:
        top = pathlib.Path(name)
        if "hook" in chosen:
            measure_hook(table, top, runs)
        if "drain" in chosen:
            measure_drain(table, top, 1 if options.quick else 5)
        if "usage" in chosen:
            measure_usage(table, top, runs, 40 if options.quick else 400)


if __name__ == "__main__":
    main()
