"""A real OpenTelemetry collector takes the pings: rotel, a Rust program in a wheel
(`pip install rotel==0.0.1a15`). What is tested is what the collector itself printed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import socket
import subprocess
from typing import Any

import pytest

from support import wait_until


def agent() -> str:
    """The collector's program; skipped, or under TELEMHQ_TEST_NEED_ROTEL failed, where
    it is not installed."""
    found = importlib.util.find_spec("rotel")
    places = (found.submodule_search_locations if found else None) or ["/nowhere"]
    path = os.path.join(places[0], "rotel-agent")
    if not os.path.exists(path):
        needed = os.environ.get("TELEMHQ_TEST_NEED_ROTEL")
        (pytest.fail if needed else pytest.skip)("no rotel: pip install rotel")
    return path


class Rotel:
    """The collector, on two ports of loopback; it prints each record into a file."""

    def __init__(self, program: str, path: pathlib.Path) -> None:
        self.path, self.output = path, path.open("ab")
        with socket.create_server(("127.0.0.1", 0)) as one, socket.socket() as two:
            two.bind(("127.0.0.1", 0))
            ports = [found.getsockname()[1] for found in (one, two)]
        self.url = f"http://127.0.0.1:{ports[0]}"
        self.command = [program, "start", "--exporter", "blackhole"]
        self.command += ["--debug-log", "logs", "--debug-log-verbosity", "detailed"]
        self.command += ["--otlp-http-endpoint", f"127.0.0.1:{ports[0]}"]
        self.command += ["--otlp-grpc-endpoint", f"127.0.0.1:{ports[1]}"]
        self.address = "127.0.0.1", ports[0]
        self.start()

    def start(self) -> None:
        """Start it; wait until it listens."""
        self.process = subprocess.Popen(
            self.command, stdout=self.output, stderr=subprocess.DEVNULL
        )

        def listens() -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(self.address, 1).close()
                return True
            return False

        wait_until(listens)

    def kill(self) -> None:
        """An outage."""
        self.process.kill()
        self.process.wait()

    def records(self) -> list[dict[str, tuple[str, str]]]:
        """Of each record what was printed: name -> (type, value)."""
        parts = self.path.read_text("utf-8", "replace").split("LogRecord #")[1:]
        found = []
        for part in parts:
            pairs = re.findall(r"(?m)^ *-> ([\w.-]+): (\w+)\((.*)\)$", part)
            record = {name: (kind, value) for name, kind, value in pairs}
            for title in ("EventName", "Body", "SeverityNumber", "Timestamp"):
                (value,) = re.findall(f"(?m)^{title}: (.*)$", part)
                record[title] = "", value
            found.append(record)
        return found


def play(world: Any, program: str) -> dict[str, Any]:
    """A session of three turns; the collector is away in the second."""
    import claude_code

    rotel = Rotel(program, world.home.path / "printed")
    usual = world.env()
    usual.update(TELEMHQ_DESTINATIONS="telemhq,otlp", TELEMHQ_OTLP_ENDPOINT=rotel.url)
    world.env = lambda: usual
    world.install("SessionStart", "PostToolUse")
    blocks = [claude_code.text("CANARY"), claude_code.tool("Bash", command="true")]
    answer = [claude_code.text("CANARY")]
    turns = ("FIRST", "SECOND", "THIRD")
    world.messages.script = {word: [blocks, answer] for word in turns}
    talk = claude_code.Talk(world)
    talk.say("FIRST")
    wait_until(lambda: not world.home.waiting() and len(rotel.records()) > 2, 30)
    rotel.kill()
    talk.say("SECOND")
    wait_until(world.home.waiting)
    rotel.start()
    talk.say("THIRD")
    talk.end()
    world.settle()
    wait_until(lambda: len(rotel.records()) >= len(world.receiver.requests))
    rotel.kill()
    return {"session_id": talk.result["session_id"], "records": rotel.records()}


def test_a_collector_prints_a_real_clients_session(tmp_path: pathlib.Path) -> None:
    """Claude Code itself, its turns told once each, to the token, over an outage: one
    record a ping, with its name in three places, token counts as integers, cost as a
    double, once."""
    claude_code = pytest.importorskip("claude_code")
    program = agent()
    seen = claude_code.run(play, tmp_path, program=program)
    told = seen.told["records"]  # by way of JSON, which knows no tuples
    records = [{name: tuple(pair) for name, pair in record.items()} for record in told]
    by_id = {ping["event_id"]: ping for ping in seen.pings}
    assert len(records) == len(seen.pings) == len(by_id)
    for record in records:
        ping = by_id.pop(record["telemhq.event_id"][1])
        name = f"claude_code.{ping['event']}"
        assert record["EventName"] == ("", name)
        assert record["Body"] == ("", f"Str({name})")
        assert record["event.name"] == ("Str", name)
        assert int(record["Timestamp"][1]) > 1.7e18
        for field, (kind, value) in record.items():
            if field.endswith("tokens"):
                assert (kind, int(value) >= 0) == ("Int", True), field
            if field.endswith("cost_usd"):
                assert (kind, float(value) >= 0) == ("Double", True), field
        count = record.get("gen_ai.usage.output_tokens", ("Int", "None"))
        assert count == ("Int", str(ping.get("output_tokens")))
    assert sum("telemhq.cost_usd" in record for record in records) == 1
    total = sum(ping.get("output_tokens", 0) for ping in seen.pings)
    assert total == sum(entry["output_tokens"] for entry in seen.bill) > 0
    assert b"CANARY" not in (seen.home / "printed").read_bytes()
