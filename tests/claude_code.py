"""The real Claude Code, run where nothing but loopback can be reached.

A scenario is a function of a test module that takes a `World`. `run` executes it in a
network namespace of its own, together with the receiver and a stand-in for the
Messages API, and gives back what was `Seen`. Facts about the client: version 2.1.329.
"""

from __future__ import annotations

import contextlib
import http.server
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator

import pytest

from support import ROOT, SCRIPT, Home, Receiver, wait_until

fcntl = pytest.importorskip("fcntl", reason="its network namespace is Linux's")

SCENARIO_S = 180  # one scenario; on an idle machine the longest takes 30 s
SHOWN_S = 60  # until the terminal shows something
API_KEY = "dummy"
NAMESPACE = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
EXAMPLE = ROOT / "settings.example.json"
PARENT = "PRIVATE_HOME"  # a directory above the project: its name must not leave
COUNTS = {  # a ping's name of a count: the API's name, the client's ledger's
    "input_tokens": ("input_tokens", "inputTokens"),
    "output_tokens": ("output_tokens", "outputTokens"),
    "cached_input_tokens": ("cache_read_input_tokens", "cacheReadInputTokens"),
    "cache_creation_input_tokens": (
        "cache_creation_input_tokens",
        "cacheCreationInputTokens",
    ),
    "reasoning_tokens": ("thinking_tokens", "thinkingTokens"),
}


# -- What the model says -------------------------------------------------------


def text(words: str, **how: float) -> dict[str, Any]:
    """A text block of an answer; `times` over (word by word, so to say), each time
    after a `pause` in seconds."""
    return {"type": "text", "text": words, **how}


def tool(name: str, **tool_input: object) -> dict[str, Any]:
    """A tool_use block of an answer: the client really runs it."""
    known = {"type": "tool_use", "id": _random_id("toolu")}
    return {**known, "name": name, "input": tool_input}


def _random_id(kind: str) -> str:
    return f"{kind}_{random.getrandbits(96):024x}"


class Api(http.server.BaseHTTPRequestHandler):
    """A connection of the client to the stand-in `messages`."""

    messages: Messages

    def do_GET(self) -> None:
        self.send("application/json", b"{}")

    do_HEAD = do_GET  # noqa: N815 - a name that http.server gives

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.path.startswith("/v1/messages?"):
            self.send("application/json", b"{}")
            return
        asked = json.loads(body)
        answer = self.messages.answer(asked["messages"])
        if isinstance(answer, int):
            error = {"type": "error", "message": "CANARY_API_ERROR"}
            found = json.dumps({"type": "error", "error": error}).encode()
            self.send("application/json", found, answer)
            return
        with contextlib.suppress(OSError):
            self.stream(asked["model"], answer)

    def send(self, kind: str, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self, model: str, blocks: list[dict[str, Any]]) -> None:
        message: dict[str, Any] = {"id": _random_id("msg"), "type": "message"}
        message.update(role="assistant", model=model, content=[], stop_reason=None)
        # Numbers that no wrong sum of them matches by chance.
        numbers = {"input_tokens": 1000, "cache_read_input_tokens": 9000}
        numbers.update(cache_creation_input_tokens=100, output_tokens=2000)
        counts = {name: random.randrange(n // 9, n) for name, n in numbers.items()}
        begun = {**counts, "output_tokens": 1}
        thought = {"thinking_tokens": random.randrange(1, counts["output_tokens"])}
        entry = {**begun, "id": message["id"], "thinking_tokens": 0}
        entry["session_id"] = self.headers["X-Claude-Code-Session-Id"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("request-id", _random_id("req"))
        self.end_headers()
        self.tell("message_start", message={**message, "usage": begun})
        self.messages.bill.append(entry)
        for index, block in enumerate(blocks):
            self.block(index, block)
        used_tool = any(block["type"] == "tool_use" for block in blocks)
        delta = {"stop_reason": "tool_use" if used_tool else "end_turn"}
        usage = {**counts, "output_tokens_details": thought}
        self.tell("message_delta", delta=delta, usage=usage)
        entry.update(counts, **thought)
        self.tell("message_stop")

    def block(self, index: int, block: dict[str, Any]) -> None:
        if block["type"] == "text":
            empty = text("")
            delta = {"type": "text_delta", "text": block["text"]}
        else:
            empty = {**block, "input": {}}
            found = json.dumps(block["input"])
            delta = {"type": "input_json_delta", "partial_json": found}
        self.tell("content_block_start", index=index, content_block=empty)
        for _ in range(block.get("times", 1)):
            time.sleep(block.get("pause", 0))
            self.tell("content_block_delta", index=index, delta=delta)
        self.tell("content_block_stop", index=index)

    def tell(self, kind: str, **fields: object) -> None:
        found = json.dumps({**fields, "type": kind})
        self.wfile.write(f"event: {kind}\ndata: {found}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Nothing: the tests read `bill`."""


class Messages:
    """A stand-in for the Messages API: streams what `script` says, keeps the bill.

    `script` maps a word of a prompt to the answers of that turn, in order. An answer is
    a list of blocks or an HTTP status. `bill` has one entry per message: session_id, id
    and the API's names of COUNTS. One that the client broke off has the counts that it
    began with.
    """

    def __init__(self) -> None:
        self.script: dict[str, list[Any]] = {}
        self.bill: list[dict[str, Any]] = []
        handler = type("Handler", (Api,), {"messages": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, messages: list[dict[str, Any]]) -> Any:
        """The answer that is next after the last prompt with a word of the script."""
        said = 0
        for message in reversed(messages):
            if message["role"] == "assistant":
                said += 1
            elif message["role"] == "user":
                content = message["content"]
                blocks = [text(content)] if isinstance(content, str) else content
                words = " ".join(block.get("text", "") for block in blocks)
                # A turn that failed and its successor come as one message.
                last = max(self.script, key=words.rfind)
                if last in words:
                    return self.script[last][min(said, len(self.script[last]) - 1)]
        return [text("CANARY_ASSISTANT has nothing to add")]


# -- The world the client lives in ------------------------------------------------


class World:
    """One HOME with the script installed, the receiver, the stand-in, the client."""

    def __init__(self, path: str) -> None:
        self.home = Home(path)
        self.receiver = Receiver()
        self.messages = Messages()
        self.url: str | None = self.receiver.url  # that the client's shell exports
        self.runs: list[dict[str, Any]] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.terminals: list[Terminal] = []
        (self.home.path / ".claude" / "hooks").mkdir(parents=True)
        # What the client keeps of someone who answered all that it asks at first.
        trusted = {str(self.home.project): {"hasTrustDialogAccepted": True}}
        kept = {"hasCompletedOnboarding": True, "theme": "dark", "projects": trusted}
        approved = {"approved": [API_KEY[-20:]], "rejected": []}
        kept["customApiKeyResponses"] = approved
        (self.home.path / ".claude.json").write_text(json.dumps(kept))

    def install(self, *events: str) -> None:
        """Copy the script; the user's settings.json has the example's hooks, and the
        same for these events."""
        folder = self.home.path / ".claude" / "hooks"
        shutil.copy(str(SCRIPT), str(folder / SCRIPT.name))
        settings = json.loads(EXAMPLE.read_text("utf-8"))
        for event in events:
            settings["hooks"][event] = settings["hooks"]["Stop"]
        (folder.parent / "settings.json").write_text(json.dumps(settings))

    def env(self) -> dict[str, str]:
        """The client's environment: clean, offline, the tracker's URL exported."""
        return self.home.env(
            self.url,
            ANTHROPIC_BASE_URL=self.messages.url,
            ANTHROPIC_API_KEY=API_KEY,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1,
            CLAUDE_CODE_MAX_RETRIES=0,
            IS_SANDBOX=1,
        )

    def start(self, form: str, *options: str) -> subprocess.Popen[bytes]:
        """Start the client; `form` is that of its output."""
        command = [client(), "-p", "--dangerously-skip-permissions"]
        command += ["--output-format", form, *options]
        child = subprocess.Popen(
            command,
            env=self.env(),
            cwd=str(self.home.project),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.children.append(child)
        return child

    def claude(self, prompt: str, *options: str) -> Any:
        """One session of one prompt, `claude -p`; gives the client's own result."""
        stdout, stderr = self.start("json", *options, prompt).communicate()
        return self.ended(json.loads(stdout), stderr)

    def talk(self, *prompts: str) -> dict[str, Any]:
        """One session of several turns; gives the client's own last result."""
        talk = Talk(self)
        result = [talk.say(prompt) for prompt in prompts][-1]
        talk.end()
        return result

    def ended(self, result: Any, stderr: bytes) -> Any:
        """Keep what the client said about one run."""
        said = stderr.decode("utf-8", "replace")
        self.runs.append({"result": result, "stderr": said})
        return result

    def ledger(self, session_id: str) -> dict[str, Any]:
        """What the client itself says of a session, in the end: its last ledger."""
        found: dict[str, Any] = {"modelUsage": {}, "totalCostUSD": 0}
        projects = self.home.path / ".claude" / "projects"
        (path,) = projects.glob(f"*/{session_id}.jsonl")
        for line in path.read_bytes().splitlines():
            row = json.loads(line)
            found = row if row.get("type") == "cost-state" else found
        return {**found, "session_id": session_id}

    def settle(self) -> None:
        """Wait until every ping has been delivered, and the sender has ended."""
        wait_until(lambda: not self.home.waiting(), 30)
        self.home.quiet(30)

    def close(self) -> None:
        """End what runs, by id."""
        for child in self.children:
            child.kill()
            child.wait()
        for terminal in self.terminals:
            terminal.close()
        self.home.end()
        self.receiver.close()


class Talk:
    """A session that goes on: the client on its stream-json input."""

    def __init__(self, world: World, *options: str) -> None:
        options += ("--verbose", "--input-format", "stream-json")
        self.world = world
        self.result: dict[str, Any] = {}
        self.child = world.start("stream-json", *options)

    def say(self, prompt: str) -> dict[str, Any]:
        """Give one prompt; wait for the turn's result."""
        row = {"type": "user", "message": {"role": "user", "content": prompt}}
        assert self.child.stdin
        assert self.child.stdout
        assert self.child.stderr
        self.child.stdin.write(json.dumps(row).encode() + b"\n")
        self.child.stdin.flush()
        self.result = {}
        while self.result.get("type") != "result":
            line = self.child.stdout.readline()
            assert line, f"the client ended: {self.child.stderr.read()!r}"
            self.result = json.loads(line)
        return self.result

    def end(self) -> None:
        """End of input: the client ends the session by itself."""
        _, stderr = self.child.communicate()
        self.world.ended(self.result, stderr)


class Terminal:
    """An interactive session of the client, in a tmux of its own."""

    def __init__(self, world: World, *options: str) -> None:
        self.world, place = world, f"tmux{len(world.terminals)}"
        self.tmux = ["tmux", "-S", str(world.home.path / place), "-f", os.devnull]
        self.ask("new-session", "-d", "-x", "120", "-y", "40", client(), *options)
        world.terminals.append(self)
        self.wait_for("\N{HEAVY RIGHT-POINTING ANGLE QUOTATION MARK ORNAMENT}")

    def ask(self, *command: str) -> str:
        """A command of tmux; gives what it says."""
        ended = subprocess.run(
            [*self.tmux, *command],
            env=dict(self.world.env(), TERM="xterm-256color"),
            cwd=str(self.world.home.project),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
        )
        assert ended.returncode == 0, (command[0], ended.stderr)
        return ended.stdout.decode("utf-8", "replace")

    def wait_for(self, words: str) -> None:
        """Wait until the screen shows them."""
        wait_until(lambda: words in self.ask("capture-pane", "-p"), SHOWN_S, every=0.1)

    def press(self, key: str) -> None:
        """A key, by tmux's name of it."""
        self.ask("send-keys", key)

    def say(self, prompt: str) -> None:
        """Type a prompt that is not on the screen yet, and send it."""
        self.ask("send-keys", "-l", prompt)
        self.wait_for(prompt)
        self.press("Enter")

    def runs(self) -> bool:
        """Whether the client has not ended: its tmux ends with it."""
        try:
            self.ask("has-session")
        except AssertionError:
            return False
        return True

    def leave(self) -> None:
        """/exit; wait for the client's end."""
        self.say("/exit")
        wait_until(lambda: not self.runs(), SHOWN_S, every=0.1)

    def close(self) -> None:
        """End it, if it still runs."""
        if self.runs():
            self.ask("kill-server")


class Seen:
    """What became of a scenario."""

    def __init__(self, path: pathlib.Path, found: dict[str, Any]) -> None:
        self.home = path
        self.requests, self.runs = found["requests"], found["runs"]
        self.bill, self.told = found["bill"], found["told"]
        self.pings = [json.loads(request["body"]) for request in self.requests]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row of every transcript, the subagents' among them."""
        for path in (self.home / ".claude" / "projects").rglob("*.jsonl"):
            for line in path.read_bytes().splitlines():
                yield json.loads(line)

    def noticed(self) -> list[dict[str, Any]]:
        """The rows in which the client tells of a hook's error or output."""
        return [
            row
            for row in self.rows()
            if row.get("hookErrors")
            or row.get("hasOutput")
            or "hook_" in (row.get("attachment") or {}).get("type", "")
        ]


def pings_of(seen: Seen, name: str) -> list[dict[str, Any]]:
    """The pings of one session."""
    session_id = seen.told[name]["session_id"]
    return [ping for ping in seen.pings if ping["session_id"] == session_id]


def charged(seen: Seen, name: str, *events: str) -> dict[str, int]:
    """The counts of a session's pings (of these events), added up."""
    pings = pings_of(seen, name)
    pings = [ping for ping in pings if not events or ping["event"] in events]
    return {count: sum(ping.get(count, 0) for ping in pings) for count in COUNTS}


def billed(seen: Seen, name: str) -> dict[str, int]:
    """The counts that the API gave out to a session."""
    session_id = seen.told[name]["session_id"]
    bill = [entry for entry in seen.bill if entry["session_id"] == session_id]
    return {count: sum(e[names[0]] for e in bill) for count, names in COUNTS.items()}


def ledger(seen: Seen, name: str) -> tuple[dict[str, int], float]:
    """A session's counts and cost by the client's own ledger, less what its `before`
    (a parent, an earlier run) had."""
    told, nothing = seen.told[name], {"modelUsage": {}, "totalCostUSD": 0}
    before = told.get("before", nothing)
    counts = dict.fromkeys(COUNTS, 0)
    for sign, sums in (1, told), (-1, before):
        for usage in sums["modelUsage"].values():
            for count, names in COUNTS.items():
                counts[count] += sign * usage[names[1]]
    return counts, told["totalCostUSD"] - before["totalCostUSD"]


# -- The namespace ---------------------------------------------------------------


def client() -> str:
    """The client's path."""
    default = ROOT / ".cache" / "claude" / "package" / "claude"
    return os.environ.get("TELEMHQ_TEST_CLAUDE") or str(default)


def need(command: list[str], why: str) -> None:
    """Skip the test, saying why, where a command does not work."""
    no_input = subprocess.DEVNULL
    try:
        tried = subprocess.run(command, stdin=no_input, capture_output=True, timeout=60)
        if tried.returncode == 0:
            return
        found = tried.stderr.decode("utf-8", "replace").strip()
    except OSError as error:
        found = str(error.strerror)
    needed = os.environ.get("TELEMHQ_TEST_NEED_CLAUDE")  # .ci/run: no test is left out
    (pytest.fail if needed else pytest.skip)(f"{why} ({found})")


def run(scenario: Callable[..., Any], path: pathlib.Path, **arguments: object) -> Seen:
    """Run `scenario(world, **arguments)` where only loopback exists; what was Seen."""
    need([client(), "--version"], "no Claude Code: set TELEMHQ_TEST_CLAUDE to its path")
    need([*NAMESPACE, "true"], "no network namespace")
    home = pathlib.Path(path) / PARENT
    asked = [scenario.__module__, scenario.__name__, str(home), json.dumps(arguments)]
    ended = subprocess.run(
        [*NAMESPACE, sys.executable, "-B", __file__, *asked],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SCENARIO_S + 30,
    )
    assert ended.returncode == 0, ended.stderr.decode("utf-8", "replace")
    return Seen(home, json.loads(ended.stdout))


def main(module: str, scenario: str, home: str, arguments: str) -> None:
    """Inside the namespace: play the scenario, print what was seen."""
    with socket.socket() as any_one:  # `ip link set lo up` (netdevice(7)): SIOCSIFFLAGS
        fcntl.ioctl(any_one, 0x8914, struct.pack("16sh14x", b"lo", 1))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(SCENARIO_S)
    world = World(home)
    try:
        play = getattr(importlib.import_module(module), scenario)
        told = play(world, **json.loads(arguments))
        requests = [
            {"headers": dict(r.headers), "path": r.path, "body": r.body.decode()}
            for r in world.receiver.requests
        ]
        seen = {"requests": requests, "runs": world.runs, "bill": world.messages.bill}
        print(json.dumps({**seen, "told": told}))
    finally:
        world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
