"""The real Claude Code, run where nothing but loopback can be reached.

A scenario is a function of a test module that takes a `World`. `run` executes it in a
network namespace of its own, together with the receiver and a stand-in for the
Messages API, and gives back what was `Seen`. Facts about the client: version 2.1.329.
"""

import contextlib
import fcntl
import http.server
import importlib
import json
import os
import pathlib
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from support import ROOT, SCRIPT, Home, Receiver, wait_until

RUN_S = 90  # one run of the client: the longest takes 10 s on an idle machine
SCENARIO_S = 240  # one scenario: several runs of the client
NAMESPACE = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
TRUE_NAMES = {  # a ping's name of a count: the API's, the client's ledger's
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


def text(words):
    """A text block of an answer."""
    return {"type": "text", "text": words}


def tool(name, **tool_input):
    """A tool_use block of an answer: the client really runs it."""
    return {"type": "tool_use", "id": _random_id("toolu"), "name": name,
            "input": tool_input}  # fmt: skip


def slow(seconds, *blocks):
    """An answer that begins only after a while."""

    def answer():
        time.sleep(seconds)
        return list(blocks)

    return answer


def _random_id(kind):
    return "%s_%024x" % (kind, random.getrandbits(96))


class Messages:
    """A stand-in for the Messages API: streams what `script` says, keeps the bill.

    `script` maps a word of a prompt to the answers of that turn, in order. An answer is
    a list of blocks, an HTTP status, or a function that gives one of these. `bill` has
    one entry per message that was sent to its end: session_id, id and its counts.
    """

    def __init__(self, script):
        self.script, self.bill, self.asked = script, [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send("application/json", b"{}")

            do_HEAD = do_GET

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if not self.path.startswith("/v1/messages?"):
                    return self.send("application/json", b"{}")
                asked = json.loads(body)
                outer.asked.append(asked)
                answer = outer.answer(asked["messages"])
                if isinstance(answer, int):
                    error = {"type": "error", "message": "CANARY_API_ERROR"}
                    found = json.dumps({"type": "error", "error": error}).encode()
                    return self.send("application/json", found, answer)
                session_id = self.headers["X-Claude-Code-Session-Id"]
                with contextlib.suppress(OSError):
                    self.stream(session_id, asked["model"], answer)

            def send(self, kind, body, status=200):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def stream(self, session_id, model, blocks):
                message = {"id": _random_id("msg"), "type": "message", "content": [],
                           "role": "assistant", "model": model, "stop_reason": None,
                           "stop_sequence": None}  # fmt: skip
                counts = _counts()
                begun = dict(counts, output_tokens=1)
                begun.pop("output_tokens_details")
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("request-id", _random_id("req"))
                self.end_headers()
                self.tell("message_start", message=dict(message, usage=begun))
                for index, block in enumerate(blocks):
                    self.block(index, block)
                used_tool = any(block["type"] == "tool_use" for block in blocks)
                reason = "tool_use" if used_tool else "end_turn"
                delta = {"stop_reason": reason, "stop_sequence": None}
                self.tell("message_delta", delta=delta, usage=counts)
                self.tell("message_stop")
                entry = {"session_id": session_id, "id": message["id"], "model": model}
                outer.bill.append(dict(entry, **_flat(counts)))

            def block(self, index, block):
                if block["type"] == "text":
                    empty = dict(block, text="")
                    delta = {"type": "text_delta", "text": block["text"]}
                else:
                    empty = dict(block, input={})
                    found = json.dumps(block["input"])
                    delta = {"type": "input_json_delta", "partial_json": found}
                self.tell("content_block_start", index=index, content_block=empty)
                self.tell("content_block_delta", index=index, delta=delta)
                self.tell("content_block_stop", index=index)

            def tell(self, kind, **fields):
                found = json.dumps(dict(fields, type=kind))
                self.wfile.write(("event: %s\ndata: %s\n\n" % (kind, found)).encode())
                self.wfile.flush()

            def log_message(self, *_):
                """Nothing: the tests read `asked` and `bill`."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, messages):
        """The answer that is next after the last prompt with a word of the script."""
        said = 0
        for message in reversed(messages):
            if message["role"] == "assistant":
                said += 1
            elif message["role"] == "user":
                words = _words(message["content"])
                for word, answers in self.script.items():
                    if word in words:
                        found = answers[min(said, len(answers) - 1)]
                        return found() if callable(found) else found
        return [text("CANARY_ASSISTANT has nothing to add")]


def _words(content):
    """The text of a user message, without tool results."""
    if isinstance(content, str):
        return content
    return " ".join(block.get("text", "") for block in content)


def _counts():
    """The usage of one message: numbers that no wrong sum of them matches by chance."""
    return {
        "input_tokens": random.randrange(100, 1000),
        "output_tokens": random.randrange(1000, 2000),
        "cache_read_input_tokens": random.randrange(2000, 9000),
        "cache_creation_input_tokens": random.randrange(10, 100),
        "output_tokens_details": {"thinking_tokens": random.randrange(10, 1000)},
    }


def _flat(counts):
    return dict(counts, **counts["output_tokens_details"])


# -- The world the client lives in ------------------------------------------------


class World:
    """One HOME with the script installed, the receiver, the stand-in, the client."""

    def __init__(self, path):
        self.home = Home(path)
        self.receiver = Receiver()
        self.messages = Messages({})
        self.runs, self.children = [], []

    def install(self, *blocks):
        """Copy the script, and write settings.json: these blocks' hooks, in order."""
        folder = self.home.path / ".claude" / "hooks"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(SCRIPT), str(folder / SCRIPT.name))
        hooks = {}
        for block in blocks:
            for event, groups in block["hooks"].items():
                hooks.setdefault(event, []).extend(groups)
        settings = self.home.path / ".claude" / "settings.json"
        settings.write_text(json.dumps({"hooks": hooks}))

    def env(self, **more):
        """The client's environment: clean, offline, the tracker's URL exported."""
        found = self.home.env(
            self.receiver.url,
            ANTHROPIC_BASE_URL=self.messages.url, ANTHROPIC_API_KEY="dummy",
            DISABLE_TELEMETRY=1, DISABLE_AUTOUPDATER=1, DISABLE_ERROR_REPORTING=1,
            CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1, CLAUDE_CODE_MAX_RETRIES=0,
            IS_SANDBOX=1, **more
        )  # fmt: skip
        found["PATH"] = os.path.dirname(sys.executable) + ":" + found["PATH"]
        return found

    def start(self, prompts, *options, **env):
        """Start the client on one prompt, or on a list of them in one session."""
        many = not isinstance(prompts, str)
        form = "stream-json" if many else "json"
        command = [str(client()), "-p", "--output-format", form, *options,
                   "--dangerously-skip-permissions"]  # fmt: skip
        command += ["--input-format", form, "--verbose"] if many else [prompts]
        child = subprocess.Popen(
            command, env=self.env(**env), cwd=str(self.home.project),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.children.append(child)
        for prompt in prompts if many else ():
            message = {"role": "user", "content": prompt}
            row = json.dumps({"type": "user", "message": message}).encode()
            child.stdin.write(row + b"\n")
            child.stdin.flush()
        return child

    def claude(self, prompts, *options, **env):
        """Run the client to its end; give its result and the seconds it took."""
        begun = time.monotonic()
        child = self.start(prompts, *options, **env)
        stdout, stderr = child.communicate(timeout=RUN_S)
        seconds = time.monotonic() - begun
        results = [json.loads(line) for line in stdout.splitlines() if line.strip()]
        results = [found for found in results if found.get("type") == "result"]
        stderr = stderr.decode("utf-8", "replace")
        assert results, "the client gave no result: %s" % stderr
        found = {"result": results[-1], "seconds": seconds, "stderr": stderr}
        self.runs.append(found)
        return found

    def settle(self):
        """Wait until every ping made so far has been delivered, and the sender ended."""
        wait_until(lambda: not self.home.waiting(), 30)
        self.home.quiet(30)

    def close(self):
        """End what runs, by id."""
        for child in self.children:
            with contextlib.suppress(OSError):
                child.kill()
        self.home.end()
        self.receiver.close()

    def seen(self):
        """What a test may want to know, as JSON."""
        requests = [
            {"headers": dict(found.headers.items()), "path": found.path,
             "body": found.body.decode("latin-1")}
            for found in self.receiver.requests
        ]  # fmt: skip
        return {"requests": requests, "runs": self.runs, "bill": self.messages.bill}


class Seen:
    """What became of a scenario."""

    def __init__(self, path, found):
        self.home = path
        self.requests, self.runs = found["requests"], found["runs"]
        self.bill, self.told = found["bill"], found["told"]
        self.pings = [
            json.loads(request["body"].encode("latin-1")) for request in self.requests
        ]

    def transcripts(self):
        """Every transcript's bytes, by path: subagents' too."""
        found = (self.home / ".claude" / "projects").rglob("*.jsonl")
        return {path: path.read_bytes() for path in found}


# -- The namespace ---------------------------------------------------------------


def client():
    """The client's path; skips the test where there is none."""
    default = str(ROOT / ".cache" / "claude" / "package" / "claude")
    found = pathlib.Path(os.environ.get("TELEMHQ_TEST_CLAUDE") or default)
    if not os.access(str(found), os.X_OK):
        pytest.skip("no Claude Code: set TELEMHQ_TEST_CLAUDE to its program")
    return found


def run(scenario, path, **arguments):
    """Run `scenario(world, **arguments)` where only loopback exists; what was Seen."""
    client()
    try:
        tried = subprocess.run(NAMESPACE + ["true"], stderr=subprocess.PIPE, timeout=10)
    except OSError as error:
        pytest.skip("no network namespace: %s" % error)
    if tried.returncode:
        pytest.skip("no network namespace: %s" % tried.stderr.decode().strip())
    home = pathlib.Path(path) / "home"
    asked = [scenario.__module__, scenario.__name__, str(home), json.dumps(arguments)]
    ended = subprocess.run(
        NAMESPACE + [sys.executable, "-B", __file__] + asked,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        timeout=SCENARIO_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr.decode("utf-8", "replace")
    return Seen(home, json.loads(ended.stdout))


def _loopback_up():
    """What `ip link set lo up` does (netdevice(7)): SIOCSIFFLAGS with IFF_UP."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 1))


def main(module, scenario, home, arguments):
    """Inside the namespace: play the scenario, print what was seen."""
    _loopback_up()
    world = World(home)
    try:
        play = getattr(importlib.import_module(module), scenario)
        told = play(world, **json.loads(arguments))
        print(json.dumps(dict(world.seen(), told=told)))
    finally:
        world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
