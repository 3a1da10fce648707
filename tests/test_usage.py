"""Usage, from outside: what of a transcript is charged to which ping, and only once.

A message's size is a number n, and all its counts are multiples of it: sizes that are
powers of two tell from a sum which messages are in it, and how often.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import threading
import time
import uuid
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ClassVar,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)

import pytest

from support import (
    FIXTURES,
    Home,
    Receiver,
    Request,
    event,
    sender_command,
    wait_until,
)

if TYPE_CHECKING:
    Then = Sequence[dict[str, Any] | bytes] | Callable[[], object]
    Event = tuple[float, str, dict[str, Any]]

OPUS, HAIKU = "claude-opus-5-5", "claude-haiku-5"
MULTIPLES = {  # a ping's count: how many times the size of a message
    "input_tokens": 1,
    "output_tokens": 3,
    "cached_input_tokens": 5,
    "cache_creation_input_tokens": 7,
    "reasoning_tokens": 2,
    "total_tokens": 16,
}
USAGE_FIELDS = set(MULTIPLES) | {
    "models",
    "tools",
    "tool_calls",
    "tool_failures",
    "cost_usd",
    "usage_complete",
    "git_branch",
}
NOTHING_READ = {"usage_complete": False}  # all that such a ping has of USAGE_FIELDS
DAY_S = 86400.0


# -- Rows, as Claude Code writes them; `at` is in seconds after the session's begin ----


def used(n: int) -> dict[str, int]:
    """The counts of a ping (or of a model in it) for messages of size n in all."""
    return {name: n * times for name, times in MULTIPLES.items()}


def size_of(ping: dict[str, Any]) -> Any:
    """The size that a ping charges, None when it has no usage."""
    found = {name: ping[name] for name in MULTIPLES if name in ping}
    assert not found or found == used(found["input_tokens"]), found
    return found.get("input_tokens")


def usage_of(n: int) -> dict[str, Any]:
    """The `usage` of an API message of size n."""
    return {
        "input_tokens": n,
        "cache_creation_input_tokens": 7 * n,
        "cache_read_input_tokens": 5 * n,
        "output_tokens": 3 * n,
        "output_tokens_details": {"thinking_tokens": 2 * n},
        "service_tier": "standard",
    }


def prompt(at: float, **changes: object) -> dict[str, Any]:
    """The user row that a prompt becomes."""
    message = {"role": "user", "content": "CANARY_TEXT é 漢字 😀"}
    return dict(
        {
            "type": "user",
            "promptId": str(uuid.uuid4()),
            "timestamp": at,
            "isSidechain": False,
            "message": message,
        },
        **changes,
    )


def message(
    at: float,
    n: int,
    key: str | None = None,
    stop: str | None = "end_turn",
    model: str = OPUS,
    tools: Iterable[object] = (),
    usage: object = None,
    **changes: object,
) -> dict[str, Any]:
    """An assistant row: one content block of the API message `key`, which is of size n.

    tools: names of tools it calls. usage: instead of that of size n.
    """
    content = [
        {
            "type": "tool_use",
            "id": "toolu_" + uuid.uuid4().hex,
            "name": name,
            "input": {"command": "CANARY_INPUT"},
        }
        for name in tools
    ]
    found = {
        "id": key or "msg_" + uuid.uuid4().hex,
        "type": "message",
        "role": "assistant",
        "model": model,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": usage or usage_of(n),
        "content": content or [{"type": "text", "text": "CANARY_TEXT"}],
    }
    return dict(
        {
            "type": "assistant",
            "timestamp": at,
            "isSidechain": False,
            "gitBranch": "main",
            "message": found,
        },
        **changes,
    )


def result(at: float, error: bool = False) -> dict[str, Any]:
    """The user row of one tool's result."""
    found: dict[str, Any] = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": "CANARY_RESULT",
    }
    if error:
        found["is_error"] = True
    return prompt(at, message={"role": "user", "content": [found]})


def ledger(sizes: dict[str, int], cost: float) -> dict[str, Any]:
    """A `cost-state` row: the client's own sums; `sizes` is model -> size."""
    names = {
        "inputTokens": 1,
        "outputTokens": 3,
        "cacheReadInputTokens": 5,
        "cacheCreationInputTokens": 7,
        "thinkingTokens": 2,
    }
    models = {
        model: {name: n * times for name, times in names.items()}
        for model, n in sizes.items()
    }
    return {"type": "cost-state", "totalCostUSD": cost, "modelUsage": models}


def iso(seconds: float) -> str:
    """Seconds since 1970 as a row's timestamp."""
    found = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return found.strftime("%Y-%m-%dT%H:%M:%S.") + f"{found.microsecond // 1000:03d}Z"


class Session:
    """A session of Claude Code: its transcript below HOME, its pings in the outbox.

    begun: seconds since 1970; an hour ago, so that no sender waits for late rows.
    """

    def __init__(
        self, home: Home, receiver: Receiver, begun: float | None = None
    ) -> None:
        self.home, self.receiver, self.id = home, receiver, str(uuid.uuid4())
        self.begun = round(time.time() - 3600 if begun is None else begun, 3)
        self.path = home.path / ".claude" / "projects" / "-acme" / (self.id + ".jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.base = home.state / ("telemhq-" + url_hash(receiver.url))
        self.later: dict[str, Callable[[], object]]
        self.later = receiver.__dict__.setdefault("later", {})
        self.taken = 0
        self.took = 0.0
        self.peaks: list[int] = []
        receiver.answer = self.answer

    def answer(self, request: Request) -> int:
        """The tracker takes its time: meanwhile the client writes what `hold` said."""
        self.later.pop(str(request.ping.get("event_id")), int)()
        return 200

    def agent(self, name: str = "a1") -> pathlib.Path:
        """The path of a subagent's transcript."""
        return self.path.with_suffix("") / "subagents" / f"agent-{name}.jsonl"

    def add(
        self, *rows: dict[str, Any] | bytes, to: pathlib.Path | None = None
    ) -> None:
        """Append rows (dicts or bytes) to the transcript, or to the file `to`."""
        lines = []
        for row in rows:
            if isinstance(row, bytes):
                lines.append(row)
                continue
            whole = dict({"sessionId": self.id, "cwd": "/home/dev/acme/api"}, **row)
            if isinstance(whole.get("timestamp"), (int, float)):
                whole["timestamp"] = iso(self.begun + whole["timestamp"])
            text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False)
            lines.append(text.encode() + b"\n")
        path = to or self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(str(path), "ab") as file:
            file.write(b"".join(lines))

    def hold(
        self, name: str, at: float, then: Then = (), git: bool = False, **fields: object
    ) -> str:
        """Put the ping of an event into the outbox; its event_id.

        then: rows that the client adds, or a function to call, once it was sent.
        """
        ns = int((self.begun + at) * 1e9)
        ping: dict[str, Any] = dict(
            {
                "provider": "anthropic",
                "tool": "claude-code",
                "hook_version": "1.1.0",
                "event_id": uuid.uuid4().hex,
                "event": name,
                "timestamp": iso(ns / 1e9),
                "status": "success",
                "project": "api",
                "session_id": self.id,
                "cwd_hash": "c" * 12,
                "transcript_path_hash": "d" * 12,
            },
            **fields,
        )
        record = {"ping": ping, "local": {"transcript": str(self.path), "git": git}}
        outbox = self.base / "outbox"
        if not outbox.is_dir():
            for directory in (self.home.state, self.base, outbox):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = outbox / (f"{ns:020d}-{ping['event_id']}.json")
        path.write_text(json.dumps(record))
        if then:
            add = then if callable(then) else lambda: self.add(*then)
            self.later[ping["event_id"]] = add
        return str(ping["event_id"])

    def send(self, **env: object) -> list[tuple[str, int | None]]:
        """Run a sender to its end; the session's new pings as (event, size)."""
        send(self.home, self.receiver.url, **env)
        return [(ping["event"], size_of(ping)) for ping in self.new()]

    def new(self) -> list[dict[str, Any]]:
        """The session's pings that came in since the last such question."""
        found = [p for p in self.receiver.pings if p.get("session_id") == self.id]
        found, self.taken = found[self.taken :], len(found)
        return found

    def usage(self) -> list[dict[str, Any]]:
        """All the session's pings that may carry usage, so far."""
        names = ("Stop", "StopFailure", "SubagentStop", "SessionEnd", "SessionLost")
        found = [p for p in self.receiver.pings if p.get("session_id") == self.id]
        return [ping for ping in found if ping["event"] in names]

    def hook(
        self,
        name: str,
        url: str | None = None,
        env: dict[str, Any] | None = None,
        **changes: object,
    ) -> None:
        """Run the hook with a real event, as if it came from this session."""
        found = dict(session_id=self.id, transcript_path=str(self.path), **changes)
        url = url or self.receiver.url
        done = self.home.hook(event(name, **found), url, **(env or {}))
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def accounts(self) -> list[pathlib.Path]:
        """The files of all accounts."""
        return sorted((self.base / "accounts").glob("*.json"))

    def later_by(self, seconds: float) -> None:
        """Let time pass since the last event of all sessions, and since the last
        sweep.
        """
        for path in self.accounts():
            then = time.time() - seconds
            os.utime(str(path), (then, then))
        self.home.set_state(**dict(self.home.state_json(), swept_at=0))


def url_hash(url: str) -> str:
    """What names a destination's directory."""
    return hashlib.sha256(url.encode()).hexdigest()[:12]


def send(home: Home, url: str, **env: object) -> None:
    """Run a sender in the foreground until the outbox is empty."""
    done = subprocess.run(
        sender_command(),
        env=home.env(url, **env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=90,
    )
    assert (done.returncode, done.stdout) == (0, b"")


def summed(pings: list[dict[str, Any]], *names: str) -> dict[str, Any]:
    """The sums over pings, as TelemHQ makes them."""
    return {name: sum(ping.get(name, 0) for ping in pings) for name in names}


def after(seconds: float, function: Callable[..., object], *arguments: object) -> None:
    """Call `function` a little later, in a thread."""
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()


def together(table: Mapping[str, Sequence[Any]], prepare: Callable[..., None]) -> Any:
    """A module's fixture: a session for each case of `table` (id -> arguments),
    prepared by `prepare(session, *arguments)`, all charged by one sender; id ->
    session.
    """

    @pytest.fixture(scope="module")
    def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
        home, found = Home(tmp_path_factory.mktemp("together") / "home"), {}
        with Receiver() as receiver:
            for case, arguments in table.items():
                found[case] = Session(home, receiver)
                prepare(found[case], *arguments)
            begun = time.monotonic()
            send(home, receiver.url)
        for session in found.values():
            session.took = time.monotonic() - begun
        return found

    return sessions


@pytest.fixture
def session(home: Home, receiver: Receiver) -> Session:
    """A session that began an hour ago, still without rows."""
    return Session(home, receiver)


@pytest.fixture
def live(home: Home, receiver: Receiver) -> Session:
    """A session that begins now, still without rows."""
    return Session(home, receiver, time.time())


# -- Real transcripts, cut everywhere --------------------------------------------------


class Replay:
    """A real transcript as a session of its own, shown piece by piece to the sender.

    files: path -> bytes. events: (seconds after the begin, name, fields), in order.
    """

    REGISTERED: ClassVar[dict[str, tuple[str, ...]]] = {
        "SessionEnd alone": ("SessionEnd",),
        "Stop and SessionEnd": ("Stop", "StopFailure", "SessionEnd"),
        "all": (
            "SessionStart",
            "UserPromptSubmit",
            "PreToolUse",
            "PostToolUse",
            "Stop",
            "StopFailure",
            "SubagentStop",
            "Notification",
            "SessionEnd",
        ),
    }

    def __init__(self, name: str, home: Home, receiver: Receiver) -> None:
        folder = FIXTURES / "transcripts" / name
        self.expected = json.loads((folder / "expected.json").read_text("utf-8"))
        self.session = Session(home, receiver)
        old, new = self.expected["session_id"], self.session.id
        self.files: dict[pathlib.Path, bytes] = {}
        self.events: list[Event] = []
        self.ledgers: list[int] = []
        raw = {path: path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}
        self.first = min(
            self.time(found)
            for file in raw.values()
            for found in re.findall(rb'"timestamp":"([^"]+)"', file)
        )
        for path, given in raw.items():
            text = re.sub(rb'"timestamp":"([^"]+)"', self.shifted, given)
            text = text.replace(old.encode(), new.encode())
            text = text.replace(b"CANARY_TEXT", "CANARY_TEXT é 漢字 😀".encode())
            below = path.relative_to(folder).as_posix().replace(old, new)
            self.files[self.session.path.parent / below] = text
        self.find_events()

    @staticmethod
    def time(text: bytes) -> float:
        found = text.decode().replace("Z", "+00:00")
        return datetime.datetime.fromisoformat(found).timestamp()

    def shifted(self, match: re.Match[bytes]) -> bytes:
        seconds = self.time(match.group(1)) - self.first + self.session.begun
        return b'"timestamp":"%s"' % iso(seconds).encode()

    def rows(self) -> Iterator[tuple[pathlib.Path, dict[str, Any], int, float]]:
        """(path, row, offset behind it, seconds after the begin), file by file."""
        for path, text in self.files.items():
            at, end = 0.0, 0
            for line in text.splitlines(True):
                end += len(line)
                row = json.loads(line)
                if "timestamp" in row:
                    at = self.time(row["timestamp"].encode()) - self.session.begun
                yield path, row, end, at

    def find_events(self) -> None:
        """When Claude Code fired what."""
        runs = 0
        for path, row, end, at in self.rows():
            main, told = path == self.session.path, row.get("message") or {}
            if row["type"] == "queue-operation" and row["operation"] == "enqueue":
                source = "resume" if runs else "startup"
                if len(self.ledgers) == runs:
                    self.events.append((at - 0.05, "SessionStart", {"source": source}))
                    runs += 1
            elif row["type"] == "cost-state":
                self.ledgers.append(end)
                self.events.append((at + 0.05, "SessionEnd", {"reason": "other"}))
            elif (
                row["type"] == "user" and isinstance(told.get("content"), str) and main
            ):
                self.events.append((at - 0.01, "UserPromptSubmit", {}))
            elif row.get("isApiErrorMessage"):
                self.events.append((at + 0.005, "StopFailure", {}))
            elif told.get("stop_reason") == "end_turn":
                name = "Stop" if main else "SubagentStop"
                self.events.append((at + 0.005, name, {}))
        self.events.sort(key=lambda found: found[:2])

    def prompted(self) -> float:
        """When the first prompt's row was written."""
        return min(at for _, row, _, at in self.rows() if row.get("promptId"))

    def play(
        self,
        registered: str,
        chance: random.Random,
        row_by_row: bool = False,
        stops: int = 4,
    ) -> None:
        """Put the events of the registered kinds into the outbox, each with a cut of
        the files to be on disk when it is charged.
        """
        names, last = self.REGISTERED[registered], self.events[-1][0]
        events = [found for found in self.events if found[1] in names]
        begin = self.prompted() + 0.001
        more = {name for name in names if not name.startswith("Session")}
        times = [at for _, _, _, at in self.rows() if begin < at < last]
        times = (
            times if row_by_row else [chance.uniform(begin, last) for _ in range(stops)]
        )
        for at in times if more else ():
            name = "Stop" if row_by_row else chance.choice(sorted(more))
            events.append((at, name, {}))
        events.sort(key=lambda found: found[:2])
        cuts = {
            path: self.cuts(path, events, chance, row_by_row) for path in self.files
        }
        states = [{path: cuts[path][i] for path in cuts} for i in range(len(events))]
        self.show(states[0])
        for (at, name, fields), state in zip(events, states[1:] + states[-1:]):
            show = lambda state=state: self.show(state)  # noqa: E731
            self.session.hold(name, at, show, **fields)

    def cuts(
        self,
        path: pathlib.Path,
        events: list[Event],
        chance: random.Random,
        row_by_row: bool,
    ) -> list[int]:
        """How many bytes of a file are there at each event: grows, in any steps."""
        text, found = self.files[path], []
        if row_by_row:
            ends = [(at, end) for of, _, end, at in self.rows() if of == path]
            found = [max([0] + [end for at, end in ends if at <= e[0]]) for e in events]
        else:
            found = sorted(chance.randrange(len(text) + 1) for _ in events)
        for i, cut in enumerate(found):
            inside = re.compile(rb"[\x80-\xbf]").search(text, cut)
            if inside and not row_by_row and chance.random() < 0.3:
                found[i] = inside.start()  # in the middle of a character
        ended = 0
        for i, (_, name, _) in enumerate(events):
            if name == "SessionEnd":
                if path == self.session.path:
                    found[i] = max(found[i], self.ledgers[ended])
                ended += 1
                if ended == len(self.ledgers):
                    found[i:] = [len(text)] * (len(found) - i)
            if i:
                found[i] = max(found[i], found[i - 1])
        return found

    def show(self, state: dict[pathlib.Path, int]) -> None:
        """Let the files have grown to `state`: path -> bytes."""
        for path, size in state.items():
            there = path.stat().st_size if path.exists() else 0
            if size > there:
                self.session.add(self.files[path][there:size], to=path)

    def check(self) -> None:
        """The sums over all pings are the client's own."""
        pings, wanted = self.session.usage(), self.expected["unique_messages_total"]
        wanted = {
            "input_tokens": wanted.get("input_tokens", 0),
            "output_tokens": wanted.get("output_tokens", 0),
            "cached_input_tokens": wanted.get("cache_read_input_tokens", 0),
            "cache_creation_input_tokens": wanted.get("cache_creation_input_tokens", 0),
        }
        wanted["total_tokens"] = sum(wanted.values())
        used_tools, failures = {}, 0
        for _, row, _, _ in self.rows():
            content = (row.get("message") or {}).get("content")
            for block in content if isinstance(content, list) else ():
                if row["type"] == "assistant" and block["type"] == "tool_use":
                    used_tools[block["id"]] = block["name"]
                failures += block.get("is_error") is True
        wanted.update(tool_calls=len(used_tools), tool_failures=failures)
        assert summed(pings, *wanted) == wanted
        names = {name for ping in pings for name in ping.get("tools", ())}
        sums = {n: sum(p.get("tools", {}).get(n, 0) for p in pings) for n in names}
        assert sums == {n: list(used_tools.values()).count(n) for n in names}
        assert sum(sums.values()) == len(used_tools)
        cost = summed(pings, "cost_usd")["cost_usd"]
        assert cost == pytest.approx(self.expected["client_cost_usd"], abs=1e-9)


TRANSCRIPTS = sorted(path.name for path in (FIXTURES / "transcripts").iterdir())


@pytest.mark.parametrize("registered", sorted(Replay.REGISTERED))
@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_sum_is_exact_for_every_cut(
    home: Home, receiver: Receiver, name: str, registered: str
) -> None:
    """However much of a transcript is there when each ping is charged, and whatever
    events are registered, the sums over the pings are the client's own ledger.
    """
    replays = []
    for seed in range(8):
        replay = Replay(name, home, receiver)
        replay.play(registered, random.Random(f"{name} {registered} {seed}"))
        replays.append(replay)
    send(home, receiver.url)
    assert not home.waiting()
    for replay in replays:
        replay.check()


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_sum_is_exact_row_by_row(home: Home, receiver: Receiver, name: str) -> None:
    """A ping after every single row of a transcript: the sums are the ledger still."""
    replay = Replay(name, home, receiver)
    replay.play("all", random.Random(1), row_by_row=True)
    send(home, receiver.url)
    replay.check()
    rows = sum(1 for _ in replay.rows())
    assert len(replay.session.usage()) > rows / 3


# -- Where an account opens ------------------------------------------------------------


def turn(at: float, n: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt and its answer, a second later."""
    return prompt(at), message(at + 1, n, **changes)


@pytest.mark.parametrize("source", ["startup", "clear"])
def test_new_session_is_charged_from_the_start_of_its_file(
    session: Session, source: str
) -> None:
    """A session met at its startup or after /clear has no history: every row counts,
    also one that is older than the SessionStart event.
    """
    session.add(*turn(0, 4), *turn(2, 1))
    session.hold("SessionStart", 5, source=source)
    session.add(*turn(10, 2))
    session.hold("Stop", 12, then=[ledger({OPUS: 7}, 0.5)])
    session.hold("SessionEnd", 20)
    sent = session.send()
    assert sent == [("SessionStart", None), ("Stop", 7), ("SessionEnd", 0)]
    assert summed(session.usage(), "cost_usd") == {"cost_usd": 0.5}


MET_LATE = {
    "resume": ("resume", False),
    "fork": ("fork", False),
    "fork, its copy written late": ("fork", True),
}


def prepare_met_late(session: Session, source: str, late: bool) -> None:
    """A session with a history, failed tools in it, that goes on."""
    history = [*turn(0, 1, tools=["Bash"]), result(5, error=True), *turn(10, 2)]
    session.add(*([] if late else history))
    session.hold("SessionStart", 100, source=source, then=history if late else ())
    session.hold("Notification", 101, then=turn(102, 4))
    session.hold("Stop", 104, then=turn(110, 8))
    session.hold("Stop", 112, then=[ledger({OPUS: 99}, 9.0)])
    session.hold("SessionEnd", 120)


met_late = together(MET_LATE, prepare_met_late)


@pytest.mark.parametrize("case", MET_LATE)
def test_resumed_or_forked_session_has_a_history(
    met_late: dict[str, Session], case: str
) -> None:
    """Of a session first met when it is resumed or forked, rows older than that are
    never billed, nor is its ledger, which has them in it; the copy of a fork may come
    late.
    """
    pings = met_late[case].usage()
    assert [size_of(ping) for ping in pings] == [4, 8, 0]
    assert summed(pings, "tool_calls", "tool_failures", "cost_usd") == {
        "tool_calls": 0,
        "tool_failures": 0,
        "cost_usd": 0,
    }


COPIED = {first: [first] for first in ("startup", "fork", "Stop", "SessionEnd")}


def prepare_copied(session: Session, first: str) -> None:
    """A session with another's turn and one of its own, as young as that."""
    copied = {"requestSessionId": str(uuid.uuid4())}
    own = {"requestSessionId": session.id}
    session.add(*turn(0, 1, tools=["Bash"], stop="tool_use", **copied), result(2))
    session.add(message(3, 2, **copied), *turn(10, 4, **own), ledger({OPUS: 7}, 7.0))
    if first in ("startup", "fork"):
        session.hold("SessionStart", 9, source=first)
    else:
        session.hold(first, 12)
    session.hold("SessionEnd", 20)


copied = together(COPIED, prepare_copied)


@pytest.mark.parametrize("case", COPIED)
def test_rows_copied_from_another_session_never_count(
    copied: dict[str, Session], case: str
) -> None:
    """A row whose requestSessionId is another session's is that session's bill, however
    young it is and whatever event the session was met at.
    """
    pings = copied[case].usage()
    assert sum(size_of(ping) for ping in pings) == 4
    assert summed(pings, "cost_usd", "tool_calls") == {"cost_usd": 0, "tool_calls": 0}


def test_fork_of_a_real_session_is_charged_for_its_own_turn_only(
    home: Home, receiver: Receiver
) -> None:
    """A fork's file repeats its parent's rows with old times and ids: of a real one
    only what was said after the fork is billed.
    """
    replay = Replay("resume", home, receiver)
    (path,), session, run = replay.files, replay.session, 0
    for line in replay.files[path].splitlines():
        row = json.loads(line)
        run += row["type"] == "cost-state"
        if row["type"] == "assistant":
            row["requestSessionId"] = session.id if run else str(uuid.uuid4())
        session.add(row)
    ends = [at for at, name, _ in replay.events if name == "SessionEnd"]
    session.hold("SessionStart", ends[0] + 1, source="fork")
    session.hold("SessionEnd", ends[1])
    send(home, receiver.url)
    (ping,) = session.usage()
    found = [ping[name] for name in ("input_tokens", "output_tokens", "total_tokens")]
    assert found == [100, 50, 100 + 50 + 3000 + 20]
    assert "cost_usd" not in ping


MIDDLE = {
    first: [first]
    for first in (
        "Stop",
        "StopFailure",
        "SubagentStop",
        "PostToolUse",
        "Notification",
        "SessionStart",
    )
}


def prepare_middle(session: Session, first: str) -> None:
    """A session of three turns, met at the end of the second."""
    session.add(*turn(0, 1, tools=["Bash"]), result(2, error=True), prompt(10))
    session.add(message(11, 2, stop="tool_use", tools=["Read"]))
    session.add(result(12, error=True), message(13, 4))
    then = [*turn(20, 8), ledger({OPUS: 15}, 1.5)]
    session.hold(first, 14, then=then, source="compact")
    session.hold("SessionEnd", 30)


middle = together(MIDDLE, prepare_middle)


@pytest.mark.parametrize("case", MIDDLE)
def test_session_met_in_the_middle_is_charged_from_its_last_prompt(
    middle: dict[str, Session], case: str
) -> None:
    """When the first event met is another one, what is older than the last prompt
    before it is history; a tool's result is no prompt. Such an account has no cost to
    tell.
    """
    pings = middle[case].usage()
    assert sum(size_of(ping) for ping in pings) == 2 + 4 + 8
    assert summed(pings, "tool_calls", "tool_failures", "cost_usd") == {
        "tool_calls": 1,
        "tool_failures": 1,
        "cost_usd": 0,
    }


def test_session_met_in_its_first_turn_is_whole(session: Session) -> None:
    """A session met late, but before its second prompt, has no history: it is charged
    whole, and its cost is told.
    """
    session.add(*turn(0, 1))
    session.hold("Stop", 2, then=[*turn(10, 2), ledger({OPUS: 3}, 0.25)])
    session.hold("SessionEnd", 20)
    assert session.send() == [("Stop", 1), ("SessionEnd", 2)]
    assert session.usage()[-1]["cost_usd"] == 0.25


def test_session_end_alone_has_it_all(session: Session) -> None:
    """Who wants few pings registers SessionEnd alone: its ping has the whole session,
    all its turns and its cost.
    """
    session.add(*turn(0, 1), *turn(10, 2), *turn(20, 4), ledger({OPUS: 7}, 0.75))
    session.hold("SessionEnd", 30)
    assert session.send() == [("SessionEnd", 7)]
    (ping,) = session.usage()
    assert ping["cost_usd"] == 0.75
    assert "usage_complete" not in ping


def test_session_end_alone_leaves_an_earlier_run_alone(session: Session) -> None:
    """A session whose first run ended before the hook was there has that as history:
    its end alone tells of the run that it ends.
    """
    session.add(*turn(0, 1), ledger({OPUS: 1}, 0.25))
    session.add(*turn(10, 2), *turn(20, 4), ledger({OPUS: 7}, 0.75))
    session.hold("SessionEnd", 30, then=[*turn(40, 8), ledger({OPUS: 15}, 1.0)])
    session.hold("SessionEnd", 50)
    assert session.send() == [("SessionEnd", 6), ("SessionEnd", 8)]
    assert summed(session.usage(), "cost_usd") == {"cost_usd": 0}


AGAIN = {name: [name] for name in ("startup", "clear", "resume", "fork", "compact")}


def prepare_again(session: Session, source: str) -> None:
    """A session that ended, used more without a word, and began again."""
    session.add(*turn(0, 1))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 2, then=[*turn(10, 2), ledger({OPUS: 3}, 0.25)])
    session.hold("SessionEnd", 20, then=turn(30, 4))
    session.hold("SessionStart", 40, source=source)
    session.hold("Stop", 45, then=[*turn(50, 8), ledger({OPUS: 15}, 1.0)])
    session.hold("SessionEnd", 60)


again = together(AGAIN, prepare_again)


@pytest.mark.parametrize("case", AGAIN)
def test_account_is_never_reopened(again: dict[str, Session], case: str) -> None:
    """A session that goes on goes on being charged: no later SessionStart makes history
    of what was not billed yet, or bills again what was.
    """
    pings = again[case].usage()
    assert [size_of(ping) for ping in pings] == [1, 2, 4, 8]
    assert [ping.get("cost_usd") for ping in pings] == [None, 0.25, None, 0.75]


def test_each_destination_has_accounts_of_its_own(session: Session, home: Home) -> None:
    """Two destinations are told everything each."""
    session.add(*turn(0, 1))
    session.hold("Stop", 2)
    session.send()
    with Receiver() as second:
        session.receiver, session.base = (
            second,
            home.state / ("telemhq-" + url_hash(second.url)),
        )
        session.taken = 0
        session.hold("Stop", 2)
        assert session.send() == [("Stop", 1)]


# -- One row per API message -----------------------------------------------------------


def test_message_counts_once_however_many_rows_repeat_it(session: Session) -> None:
    """The client repeats a message's usage in the row of each content block: it counts
    once, also when a ping was charged between two of its rows.
    """
    session.add(prompt(0), *[message(i, 1, "msg_a", "tool_use") for i in (1, 2)])
    session.hold("Stop", 2, then=[message(3, 1, "msg_a"), message(4, 2, "msg_b")])
    session.hold("Stop", 5, then=[message(6, 2, "msg_b"), message(7, 1, "msg_a")])
    session.hold("Stop", 8)
    assert session.send() == [("Stop", 1), ("Stop", 2), ("Stop", 0)]


OUTPUTS = {
    "{}, {}".format(list(outputs), "a ping after each" if between else "one ping"): (
        outputs,
        between,
    )
    for outputs in ((1, 1, 300), (300, 1, 1), (1, 300, 2), (1, None, 20), (None, 300))
    for between in (False, True)
}


def prepare_outputs(
    session: Session, outputs: Sequence[int | None], between: bool
) -> None:
    """The rows of one message, with these output counts."""
    rows = [
        message(i, 0, "msg_a", usage=dict(usage_of(1), output_tokens=n))
        for i, n in enumerate(outputs)
    ]
    steps = [[row] for row in rows] if between else [rows]
    session.add(prompt(0), *steps[0])
    for i, then in enumerate([*steps[1:], ()]):
        session.hold("Stop", 10 + i, then=then)


outputs = together(OUTPUTS, prepare_outputs)


@pytest.mark.parametrize("case", OUTPUTS)
def test_row_with_the_most_output_counts(
    outputs: dict[str, Session], case: str
) -> None:
    """Older rows of a message hold partial output counts: the largest counts, and when
    a smaller one is charged already, the difference rides on a later ping.
    """
    most = max(n or 0 for n in OUTPUTS[case][0])
    wanted = dict(used(1), output_tokens=most, total_tokens=1 + 5 + 7 + most)
    assert summed(outputs[case].usage(), *MULTIPLES) == wanted


def test_row_with_the_most_output_counts_as_a_whole(session: Session) -> None:
    """One row of a message counts, the one with the most output: not the largest of
    each count over all its rows.
    """
    rows = [
        message(1, 0, "msg_a", usage=dict(usage_of(64), output_tokens=1)),
        message(2, 4, "msg_a"),
    ]
    session.add(prompt(0), *rows)
    session.hold("Stop", 3)
    send(session.home, session.receiver.url)
    assert summed(session.usage(), *MULTIPLES) == used(4)


def test_last_256_messages_are_remembered(session: Session) -> None:
    """A message that is repeated 255 messages later, in another read, counts once."""
    session.add(prompt(0), message(1, 1, "msg_first"))
    session.add(*[message(2, 1) for _ in range(255)])
    session.hold("Stop", 3, then=[message(4, 1, "msg_first"), message(4, 512)])
    session.hold("Stop", 5)
    assert session.send() == [("Stop", 256), ("Stop", 512)]


def test_busy_subagent_makes_no_message_of_another_file_count_twice(
    session: Session,
) -> None:
    """A message half-written when a ping was charged counts once, however many messages
    a sub-agent had in between.
    """
    session.add(prompt(0), message(1, 1, "msg_main", "tool_use", tools=["Agent"]))
    rows = [message(2, 1, f"msg_agent{i}", "tool_use") for i in range(300)]
    session.add(*rows, to=session.agent())
    session.hold("SubagentStop", 3, then=[message(4, 1, "msg_main"), message(5, 512)])
    session.hold("Stop", 6)
    assert session.send() == [("SubagentStop", 301), ("Stop", 512)]


NO_MESSAGE = {
    "synthetic": message(1, 0, model="<synthetic>", usage=usage_of(1)),
    "API error": message(1, 1, isApiErrorMessage=True),
    "both": message(1, 1, model="<synthetic>", isApiErrorMessage=True),
    "system": dict(message(1, 1), type="system"),
    "unknown type": dict(message(1, 1), type="tomorrow"),
    "negative": message(1, 0, usage={"input_tokens": -1, "output_tokens": "3"}),
    "true": message(1, 0, usage={"input_tokens": True, "output_tokens": None}),
    "lists": message(1, 0, usage={"input_tokens": [1], "output_tokens": {"a": 1}}),
    "huge": message(1, 0, usage={"input_tokens": 2**60, "output_tokens": 10**40}),
    "usage is a list": message(1, 0, usage=[1, 2, 3]),
    "message is text": dict(message(1, 1), message="usage"),
    "message is null": dict(message(1, 1), message=None),
    "message is a list": dict(message(1, 1), message=["usage"]),
    "no id, no model": dict(message(1, 1), message={"usage": usage_of(1)}),
    "a list": b'["usage","promptId"]\n',
    "empty ledger": {"type": "cost-state"},
    "text ledger": {
        "type": "cost-state",
        "totalCostUSD": "1",
        "modelUsage": {OPUS: {}},
    },
    "list ledger": {"type": "cost-state", "totalCostUSD": 1, "modelUsage": [1]},
    "text": b'"usage"\n',
    "NaN": b'{"type":"assistant","message":{"id":"a","usage":NaN}}\n',
    "Infinity": b'{"type":"assistant","message":{"id":"a","usage":{"a":-Infinity}}}\n',
    "unfinished": b'{"type":"assistant","usage":{"input_tokens":1}\n',
    "unfinished text": b'{"type":"assistant","usage\n"usage"}\n',
    "unfinished escape": b'{"type":"assistant","usage":"\\ud83\n"usage\\x"\n',
    "no value": b'{"usage": \n{"usage":,}\n{"usage"}\n{"usage":tru}\n',
    "not UTF-8": b'{"type":"assistant","usage":\xff\xfe}\n',
    "NULs": b"\0" * 1000 + b'"usage"\n',
    "nested": b'{"usage":' + b"[" * 100000 + b"]" * 100000 + b"}\n",
    "digits": b'{"type":"assistant","usage":' + b"9" * 20000 + b"}\n",
    "empty lines": b"\n\n\r\n",
}


def prepare_no_message(session: Session, row: dict[str, Any] | bytes) -> None:
    """The row between two turns."""
    session.add(*turn(0, 2), row, *turn(10, 4))
    session.hold("SessionStart", 0, source="startup")
    session.hold("Stop", 12)


no_message = together(
    {case: [row] for case, row in NO_MESSAGE.items()}, prepare_no_message
)


@pytest.mark.parametrize("case", NO_MESSAGE)
def test_row_that_is_no_api_message_counts_nothing(
    no_message: dict[str, Session], case: str
) -> None:
    """The client's own words, its reports of API errors, and whatever else a transcript
    may hold, count nothing and cost no other row its count.
    """
    (ping,) = no_message[case].usage()
    assert size_of(ping) == 6
    assert (ping["model"], ping.get("usage_complete", True)) == (OPUS, True)


NO_TIME = {
    "none": {},
    "empty": {"timestamp": ""},
    "text": {"timestamp": "yesterday"},
    "number": {"timestamp": "17"},
    "list": {"timestamp": ["2026"]},
}


def prepare_no_time(session: Session, changes: dict[str, Any]) -> None:
    """A turn whose rows have no usable time, between two others."""
    rows = [{k: v for k, v in row.items() if k != "timestamp"} for row in turn(0, 2)]
    session.add(*turn(0, 1), *[dict(row, **changes) for row in rows], *turn(10, 4))
    session.hold("SessionStart", -1, source="startup")
    session.hold("SessionEnd", 12)


no_time = together(
    {case: [changes] for case, changes in NO_TIME.items()}, prepare_no_time
)


@pytest.mark.parametrize("case", NO_TIME)
def test_row_without_a_usable_time_loses_nothing(
    no_time: dict[str, Session], case: str
) -> None:
    """A row without a time counts where it stands; one with a time that cannot be read
    may be left out; neither makes history of what stands before it.
    """
    (ping,) = no_time[case].usage()
    assert size_of(ping) in ([7] if case == "none" else [5, 7])


def test_half_written_line_waits_for_its_end(session: Session) -> None:
    """A line is read when it is whole, never before, and never twice."""
    session.add(prompt(0), message(1, 1))
    whole = session.path.read_bytes().replace(b"CANARY_TEXT", "漢".encode())
    start, cut = whole.index(b"\n") + 1, whole.rindex("漢".encode()) + 1
    session.path.write_bytes(whole[:start])
    session.hold("Stop", 2, then=[whole[start:cut]])
    session.hold("Stop", 3, then=[whole[cut:-1]])
    session.hold("Stop", 4, then=[whole[-1:]])
    session.hold("Stop", 5)
    session.hold("Stop", 6)
    assert [size for _, size in session.send()] == [0, 0, 0, 1, 0]


# -- Sub-agents ------------------------------------------------------------------------


def test_subagents_have_transcripts_of_their_own(session: Session) -> None:
    """Each sub-agent's file below the session's is charged, at any depth, from where
    its last read ended; other files there are not transcripts.
    """
    deep = session.agent("a2").parent / "workflow" / "7" / "agent-deep.jsonl"
    session.add(
        prompt(0), message(1, 1, stop="tool_use", tools=["Agent"]), message(3, 2)
    )
    session.add(prompt(1, isSidechain=True), message(2, 4), to=session.agent())
    session.add(message(2, 8), to=deep)
    session.add(message(2, 1024), to=deep.parent / "journal.jsonl")
    session.add(message(2, 2048), to=deep.parent / "agent-deep.meta.json")
    session.add(message(2, 4096), to=session.path.with_suffix("") / "agent-x.jsonl")

    def then() -> None:
        session.add(message(20, 16), to=session.agent())
        session.add(message(20, 32), to=deep)
        session.add(message(20, 64), to=session.agent("a3"))

    session.hold("Stop", 4, then=then)
    session.hold("SubagentStop", 21)
    session.hold("SessionEnd", 30)
    sent = session.send()
    assert sent == [("Stop", 15), ("SubagentStop", 112), ("SessionEnd", 0)]


def test_subagent_that_outlives_the_turn_rides_on_a_later_ping(
    session: Session,
) -> None:
    """A Stop is not the end of the work: what a sub-agent does after it is in the next
    ping, and nothing of it is lost at the session's end.
    """
    session.add(prompt(0), message(1, 1))
    session.add(message(0.5, 2, stop="tool_use"), to=session.agent())
    session.hold("SessionStart", -1, source="startup")
    more = [message(5, 4, "m", "tool_use"), message(9, 8)]
    session.hold("Stop", 2, then=lambda: session.add(*more, to=session.agent()))
    session.hold("SubagentStop", 5.5, then=[ledger({OPUS: 15}, 1.0)])
    session.hold("SessionEnd", 20)
    sent = session.send()[1:]
    assert sent == [("Stop", 3), ("SubagentStop", 4), ("SessionEnd", 8)]
    last = session.usage()[-1]
    assert (last.get("cost_usd"), last.get("usage_complete", True)) == (1.0, True)


def test_ledger_stands_before_subagents_rows_in_one_read(session: Session) -> None:
    """The ledger at the end of the session's own file covers its sub-agents'
    files too.
    """
    session.add(*turn(0, 1), ledger({OPUS: 3}, 0.5))
    session.add(message(0.5, 2), to=session.agent())
    session.hold("SessionEnd", 10)
    assert session.send() == [("SessionEnd", 3)]
    (ping,) = session.usage()
    assert (ping.get("cost_usd"), ping.get("usage_complete", True)) == (0.5, True)


def test_history_of_subagents_is_history(session: Session) -> None:
    """What sub-agents did before the session was met is never billed either."""
    session.add(*turn(0, 1), *turn(10, 2))
    session.add(message(1, 4), to=session.agent())
    session.add(message(10.5, 8), to=session.agent("a2"))
    session.hold("Stop", 12)
    assert session.send() == [("Stop", 10)]


# -- Waiting for what the client writes late -------------------------------------------


def hurried(
    session: Session, name: str, **changes: Any
) -> tuple[dict[str, Any], float]:
    """Run one hook that delivers by itself; its ping, and how long after its start."""
    begun, count = time.monotonic(), len(session.receiver.requests)
    env = dict({"TELEMHQ_FOREGROUND": 1}, **changes.pop("env", {}))
    session.hook(name, env=env, **changes)
    request = session.receiver.requests[count]
    return request.ping, request.at - begun


LATE = {  # event: what is there, where the awaited row appears, that row
    "Stop": ([prompt(0)], "", message(0, 4)),
    "Stop max_tokens": ([prompt(0)], "", message(0, 4, stop="max_tokens")),
    "Stop again": ([prompt(0), message(0, 0, stop=None)], "", message(0, 4)),
    "SubagentStop": ([prompt(0), message(0, 2)], "a1", message(0, 4)),
    "SessionEnd-other": ([prompt(0), message(0, 4)], "", ledger({OPUS: 4}, 0.5)),
    "SessionEnd-clear": ([prompt(0), message(0, 4)], "", ledger({OPUS: 4}, 0.5)),
}


@pytest.mark.parametrize("name", sorted(LATE))
def test_sender_waits_for_what_comes_100_ms_late(live: Session, name: str) -> None:
    """Stop fires before the turn's last row is in the file, SubagentStop before the
    agent's, /clear before the ledger: the ping has it all the same, and is complete.
    """
    rows, agent, row = LATE[name]
    hooked, to = name.split(maxsplit=1)[0], live.agent() if agent else None
    fields: dict[str, Any] = {}
    live.add(*rows)
    if to:
        live.add(message(0, 1, "half", "tool_use"), to=to)
        fields["agent_transcript_path"] = str(to)
    live.hook(hooked, **fields)
    after(0.1, lambda: live.add(row, to=to))
    (ping,) = live.receiver.wait_for(1)
    wanted = {"SubagentStop": 2 + 1 + 4}.get(hooked, 4)
    assert (size_of(ping), ping.get("usage_complete", True)) == (wanted, True)
    assert ping.get("cost_usd") == (0.5 if "SessionEnd" in hooked else None)


def test_second_stop_waits_for_a_row_of_its_own(live: Session) -> None:
    """A last message that was charged to an earlier ping is not the one that a Stop
    waits for.
    """
    live.add(*turn(-9, 1))
    live.hold("Stop", -7)
    live.send()
    live.add(prompt(0))
    live.hook("Stop")
    after(0.15, lambda: live.add(message(0, 2)))
    ping = live.receiver.wait_for(2)[1]
    assert (size_of(ping), ping.get("usage_complete", True)) == (2, True)


NEVER = {  # event: rows of the session's file, of the agent's file, what is charged
    "Stop, nothing": ([prompt(0)], [], 0),
    "Stop, a tool's call": ([prompt(0), message(0, 1, stop="tool_use")], [], 1),
    "Stop, a block": ([prompt(0), message(0, 1, stop=None)], [], 1),
    "Stop, a side chain's": ([prompt(0), message(0, 1, isSidechain=True)], [], 1),
    "Stop, an error": ([prompt(0), message(0, 1, isApiErrorMessage=True)], [], 0),
    "SubagentStop, a block": ([prompt(0)], [message(0, 1, stop=None)], 1),
    "SubagentStop, the main row": (list(turn(-1, 1)), [message(0, 2, stop=None)], 3),
    "SessionEnd-other, no ledger": (list(turn(-1, 1)), [], 1),
    "SessionEnd-other, an old ledger": ([ledger({OPUS: 9}, 9.0), *turn(-1, 1)], [], 1),
}


@pytest.fixture(scope="module")
def never(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases of NEVER at the same time in one HOME: (ping, next ping, seconds)."""
    home, found = Home(tmp_path_factory.mktemp("never") / "home"), {}
    with Receiver() as receiver:
        sessions = {case: Session(home, receiver, time.time()) for case in NEVER}
        begun = time.monotonic()
        for case, (rows, of_agent, _) in NEVER.items():
            live = sessions[case]
            live.add(*rows)
            fields: dict[str, Any] = {}
            if of_agent:
                live.add(*of_agent, to=live.agent())
            if case.startswith("SubagentStop"):
                fields["agent_transcript_path"] = str(live.agent())
            live.hook(case.split(",", 1)[0], **fields)
        receiver.wait_for(len(NEVER), 60)
        home.quiet()
        at = {r.ping["session_id"]: r.at - begun for r in receiver.requests}
        for live in sessions.values():
            live.add(message(1, 64))
            live.hold("StopFailure", 2)
        send(home, receiver.url)
        for case, live in sessions.items():
            found[case] = (*live.usage(), at[live.id])
    home.end()
    return found


@pytest.mark.parametrize("case", sorted(NEVER))
def test_ping_says_when_what_it_waited_for_never_came(
    never: dict[str, Any], case: str
) -> None:
    """A ping waits until its event is 2 s old, then goes with usage_complete false;
    what comes later rides on the session's next ping.
    """
    ping, following, seconds = never[case]
    assert (ping["usage_complete"], size_of(ping)) == (False, NEVER[case][2])
    assert 1.9 < seconds < 10
    assert (following.get("usage_complete", True), size_of(following)) == (True, 64)


@pytest.mark.parametrize("name", ["Stop", "SubagentStop", "SessionEnd-other"])
def test_without_a_transcript_nothing_is_waited_for(live: Session, name: str) -> None:
    """Where there is no transcript, the ping goes at once, without usage, and says
    so.
    """
    ping, seconds = hurried(live, name, agent_transcript_path=str(live.agent()))
    assert {name: ping[name] for name in USAGE_FIELDS & set(ping)} == NOTHING_READ
    assert seconds < 1.7


def test_stop_failure_waits_for_nothing(live: Session) -> None:
    """A turn that ended in an API error has no last message to wait for."""
    live.add(prompt(0), message(0, 1, stop="tool_use", tools=["Bash"]))
    ping, seconds = hurried(live, "StopFailure")
    assert (size_of(ping), ping["status"]) == (1, "failed")
    assert "usage_complete" not in ping
    assert seconds < 1.7


def test_agent_without_a_file_is_not_waited_for(live: Session) -> None:
    """Compaction's agent has no transcript of its own: its SubagentStop does not
    wait.
    """
    live.add(*turn(-1, 1))
    ping, seconds = hurried(
        live, "SubagentStop", agent_transcript_path=str(live.agent("compact"))
    )
    assert (size_of(ping), "usage_complete" in ping) == (1, False)
    assert seconds < 1.7


@pytest.mark.parametrize("there", [False, True], ids=["no ledger", "ledger"])
def test_foreground_clear_is_not_waited_for(live: Session, there: bool) -> None:
    """/clear writes its ledger after the hook: one that delivers itself waits in vain,
    so it does not; a ledger that is there is used.
    """
    live.add(*turn(-1, 1), *([ledger({OPUS: 1}, 0.5)] if there else []))
    ping, seconds = hurried(live, "SessionEnd-clear")
    assert size_of(ping) == 1
    found = ping.get("cost_usd"), ping.get("usage_complete", True)
    assert found == ((0.5, True) if there else (None, False))
    assert seconds < 1.7


def test_foreground_session_end_waits_for_its_ledger(live: Session) -> None:
    """Any other end of a session has its ledger in time, and is waited for."""
    live.add(*turn(-1, 1))
    after(0.4, lambda: live.add(ledger({OPUS: 1}, 0.5)))
    ping, _ = hurried(live, "SessionEnd-other")
    assert (ping.get("cost_usd"), ping.get("usage_complete", True)) == (0.5, True)


def test_old_events_are_not_waited_for(session: Session) -> None:
    """Pings that waited in the outbox are charged with what is there, without a
    pause.
    """
    session.add(prompt(0))
    for i in range(8):
        session.hold("Stop", i)
    begun = time.monotonic()
    session.send()
    assert time.monotonic() - begun < 8
    assert [ping["usage_complete"] for ping in session.usage()] == [False] * 8


# -- Which ping a row belongs to -------------------------------------------------------


WINDOW = {
    name + (", an agent's row" if of_agent else ""): (name, of_agent)
    for name in ("Stop", "StopFailure", "SubagentStop")
    for of_agent in (False, True)
}


def prepare_window(session: Session, name: str, of_agent: bool) -> None:
    """Rows up to 1.9 s after an event, and one 2.1 s after it."""
    to = session.agent() if of_agent else None
    session.add(*turn(0, 1))
    session.add(message(3.9, 2), message(4.1, 4), message(3.9, 8), to=to)
    session.hold("SessionStart", -1, source="startup")
    session.hold(name, 2)
    session.hold("Stop", 10)


window = together(WINDOW, prepare_window)


def test_turns_closer_than_2_s_do_not_run_into_each_other(session: Session) -> None:
    """A prompt after the event begins another turn, whose rows are for its own Stop."""
    session.add(*turn(0, 1), *turn(2.2, 2))
    session.hold("Stop", 2)
    session.hold("Stop", 4)
    assert session.send() == [("Stop", 1), ("Stop", 2)]
    assert not any("usage_complete" in ping for ping in session.usage())


@pytest.mark.parametrize("case", WINDOW)
def test_rows_of_more_than_2_s_after_an_event_are_for_a_later_ping(
    window: dict[str, Session], case: str
) -> None:
    """What an agent wrote more than 2 s after an event is not poured into its ping;
    what the main chain said after it at all is the next one's.
    """
    _, of_agent = WINDOW[case]
    wanted = [3, 12] if of_agent else [1, 14]
    assert [size_of(ping) for ping in window[case].usage()] == wanted


def test_next_turn_is_for_the_next_ping_however_soon_it_begins(
    session: Session,
) -> None:
    """A prompt that follows at once, and what it leads to, is not that Stop's."""
    session.add(*turn(0, 1), prompt(1.3), message(1.9, 2, stop="tool_use"))
    session.add(message(2.5, 4))
    session.hold("Stop", 1.2)
    session.hold("Stop", 2.6)
    assert session.send() == [("Stop", 1), ("Stop", 6)]
    assert [ping["duration_ms"] for ping in session.usage()] == [1200, 1300]


def test_outage_does_not_pour_a_day_into_its_first_stop(session: Session) -> None:
    """After an outage every turn's ping has that turn's usage."""
    for i in range(6):
        session.add(*turn(100 * i, 1 << i, tools=[f"Tool{i}"]))
        session.hold("Stop", 100 * i + 1.5)
    session.add(ledger({OPUS: 63}, 0.5))
    session.hold("SessionEnd", 700)
    assert session.send() == [("Stop", 1 << i) for i in range(6)] + [("SessionEnd", 0)]
    pings = session.usage()
    assert [p.get("tools") for p in pings[:6]] == [{f"Tool{i}": 1} for i in range(6)]
    assert [ping["duration_ms"] for ping in pings[:6]] == [1500] * 6
    assert (pings[6].get("cost_usd"), pings[6].get("usage_complete", True)) == (
        0.5,
        True,
    )


def test_session_end_takes_all(session: Session) -> None:
    """The last ping of a session leaves nothing behind, whatever its rows' times
    say.
    """
    session.add(*turn(0, 1), message(9, 2), message(3000, 4), ledger({OPUS: 7}, 0.5))
    session.hold("SessionEnd", 2)
    assert session.send() == [("SessionEnd", 7)]
    assert session.usage()[0]["cost_usd"] == 0.5


def test_other_events_carry_no_usage(session: Session) -> None:
    """Only Stop, StopFailure, SubagentStop and SessionEnd carry usage."""
    session.add(*turn(0, 1))
    names = [
        "SessionStart",
        "UserPromptSubmit",
        "PreToolUse",
        "PostToolUse",
        "PostToolUseFailure",
        "Notification",
        "PreCompact",
        "SubagentStart",
    ]
    for i, name in enumerate(names):
        session.hold(name, 2 + i / 10)
    assert session.send() == [(name, None) for name in names]
    assert not [p for p in session.receiver.pings if USAGE_FIELDS & set(p)]


# -- The client's own ledger -----------------------------------------------------------


@pytest.mark.parametrize("delivered", ["at once", "after the end"])
def test_ledger_settles_what_is_in_no_row(session: Session, delivered: str) -> None:
    """Compaction and titles are calls of no row: the last ping has them, so that the
    sums are the ledger's, also when all pings are delivered after the session's end.
    """
    ends = [ledger({OPUS: 7, HAIKU: 8}, 1.25)]
    session.add(*turn(0, 1), *turn(10, 2))
    session.hold("SessionStart", -1, source="startup")
    if delivered == "after the end":
        session.add(*ends)
        ends = []
    session.hold("Stop", 2)
    session.hold("Stop", 12, then=ends)
    session.hold("SessionEnd", 13)
    assert session.send()[1:] == [("Stop", 1), ("Stop", 2), ("SessionEnd", 12)]
    ping = session.usage()[-1]
    assert ping.get("models") == {OPUS: used(4), HAIKU: used(8)}
    assert (ping["cost_usd"], ping.get("usage_complete", True)) == (1.25, True)
    assert ping["model"] == OPUS


LEDGERS: dict[
    str, tuple[dict[str, int], Any]
] = {  # the ledger's models, after rows of OPUS: 3; what is charged on top
    "the same": ({OPUS: 3}, {}),
    "[1m]": ({OPUS + "[1m]": 3}, {}),
    "@version": ({OPUS + "@20260101": 3}, {}),
    "[1m] and more": ({OPUS + "[1m]": 7}, {OPUS + "[1m]": 4}),
    "split in two": ({OPUS: 1, OPUS + "[1m]": 2}, {}),
    "split, and another": ({OPUS: 1, OPUS + "[1m]": 2, HAIKU: 4}, 4),
    "another": ({OPUS: 3, HAIKU: 4}, {HAIKU: 4}),
    "more of both": ({OPUS: 4, HAIKU: 4}, {OPUS: 1, HAIKU: 4}),
    "less": ({OPUS: 2}, {}),
    "none": ({}, {}),
    "another instead": ({HAIKU: 1}, {}),
    "another, and more": ({OPUS: 0, HAIKU: 5}, {HAIKU: 2}),
}


def prepare_ledger(session: Session, models: dict[str, int], _: object) -> None:
    """A session of one turn of two messages."""
    session.add(*turn(0, 1), message(2, 2))
    session.hold("Stop", 3, then=[ledger(models, 0.5)])
    session.hold("SessionEnd", 5)


ledgers = together(LEDGERS, prepare_ledger)


@pytest.mark.parametrize("case", LEDGERS)
def test_ledger_doubles_nothing_and_takes_nothing_back(
    ledgers: dict[str, Session], case: str
) -> None:
    """The ledger's sums are compared: a model that it names otherwise is not charged
    again, and a ledger that says less than the rows changes nothing.
    """
    first, last = ledgers[case].usage()
    settled = LEDGERS[case][1]
    more = settled if isinstance(settled, int) else sum(settled.values())
    assert (size_of(first), size_of(last), last["cost_usd"]) == (3, more, 0.5)
    if isinstance(settled, dict) and len(settled) > 1:
        assert last["models"] == {name: used(n) for name, n in settled.items()}


def test_difference_is_never_negative_in_any_count(session: Session) -> None:
    """A count of which the ledger has less than the rows is left as it is; the others
    are settled.
    """
    row = ledger({OPUS: 8}, 0.5)
    row["modelUsage"][OPUS].update(inputTokens=1, thinkingTokens=0)
    session.add(*turn(0, 2))
    session.hold("Stop", 3, then=[row])
    session.hold("SessionEnd", 5)
    send(session.home, session.receiver.url)
    ping = session.usage()[-1]
    wanted = dict(used(6), input_tokens=0, reasoning_tokens=0, total_tokens=15 * 6)
    assert {name: ping[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "costs, told",
    [
        ((0.5, 0.75, 2.0), (0.5, 0.25, 1.25)),
        ((0.1, 0.3, 0.3), (0.1, 0.2, 0)),
        ((0.5, 0.1, 0.6), (0.5, 0, 0.1)),
    ],
    ids=repr,
)
def test_cost_is_what_has_not_been_reported_yet(
    session: Session,
    costs: tuple[float, float, float],
    told: tuple[float, float, float],
) -> None:
    """The ledger grows over resumes of a session: each end tells what is new in it,
    never something negative, and never anything twice.
    """
    runs = [[*turn(10 * i, 1), ledger({OPUS: i + 1}, n)] for i, n in enumerate(costs)]
    session.hold("SessionStart", -1, source="startup", then=runs[0])
    for i in range(len(runs)):
        session.hold("SessionEnd", 10 * i + 3, then=([*runs, ()])[i + 1])
    session.send()
    found = [ping["cost_usd"] for ping in session.usage()]
    assert found == pytest.approx(told, abs=1e-9)


@pytest.mark.parametrize("first", ["Stop", "SessionStart"])
def test_account_with_a_history_is_not_settled(session: Session, first: str) -> None:
    """The ledger of a session that was met late holds its history: neither its
    difference nor its cost is sent.
    """
    session.add(*turn(0, 1), *turn(10, 2))
    session.hold(first, 12 if first == "Stop" else 9.5, source="resume")
    session.hold("Stop", 13, then=[ledger({OPUS: 64, HAIKU: 64}, 9.0)])
    session.hold("SessionEnd", 20)
    session.send()
    assert sum(size_of(p) or 0 for p in session.usage()) == 2
    assert "cost_usd" not in session.usage()[-1]


def test_ledger_of_an_earlier_run_is_not_the_last_word(session: Session) -> None:
    """A ledger counts only when nothing was said after it; what it would have settled
    is settled at the session's next end.
    """
    session.add(*turn(0, 1), ledger({OPUS: 9}, 0.5), *turn(10, 2))
    session.hold("SessionStart", -1, source="startup")
    session.hold("SessionEnd", 12, then=[*turn(20, 4), ledger({OPUS: 19}, 1.0)])
    session.hold("SessionEnd", 30)
    assert session.send()[1:] == [("SessionEnd", 3), ("SessionEnd", 16)]
    pings = session.usage()
    assert [ping.get("cost_usd") for ping in pings] == [None, 1.0]
    assert [ping.get("usage_complete", True) for ping in pings] == [False, True]


# -- The rest of what a ping tells -----------------------------------------------------


def test_models_are_told_apart_when_there_are_several(session: Session) -> None:
    """With more than one model at work, `models` has the counts of each; `model` is
    that of the last message in the main chain, whatever sub-agents use.
    """
    session.add(prompt(0), message(1, 1, model=HAIKU), message(2, 2))
    session.add(message(3, 4, model="claude-sonnet-5@eu"), to=session.agent())
    session.add(message(4, 8, model=HAIKU, isSidechain=True))
    session.hold("Stop", 3, then=[prompt(10), message(11, 16, model=HAIKU)])
    session.hold(
        "Stop", 12, then=lambda: session.add(message(13, 32), to=session.agent())
    )
    session.hold("SubagentStop", 14)
    session.send()
    first, second, third = session.usage()
    assert first["models"] == {
        HAIKU: used(9),
        OPUS: used(2),
        "claude-sonnet-5@eu": used(4),
    }
    assert (first["model"], size_of(first)) == (OPUS, 15)
    assert (second["model"], size_of(second), "models" in second) == (HAIKU, 16, False)
    assert (third["model"], size_of(third)) == (HAIKU, 32)
    assert third["models"] == {OPUS: used(32)}  # not the main chain's last


def test_tools_are_counted(session: Session) -> None:
    """Each tool call counts once, under its name when that is an identifier; a failure
    is a result that says so, in sub-agents too.
    """
    tools = ["Bash", "Bash", "Read", "mcp__acme__look-up", "CANARY a name", "../x"]
    rows = [message(1, 1, "m", "tool_use", tools=[name]) for name in tools]
    session.add(prompt(0), *rows, *rows)
    both = result(2, error=True)
    (block,) = result(2)["message"]["content"]
    both["message"]["content"].append(dict(block, is_error=False))
    session.add(result(2), both, result(2, error=True))
    session.add(
        message(2, 2, tools=["Grep"]), result(2, error=True), to=session.agent()
    )
    session.hold("Stop", 3, then=[message(4, 4, tools=["Bash"]), result(5, error=True)])
    session.hold("Stop", 6)
    session.send()
    first, second = session.usage()
    assert (first["tool_calls"], first["tool_failures"], size_of(first)) == (7, 3, 3)
    assert first["tools"] == {"Bash": 2, "Read": 1, "mcp__acme__look-up": 1, "Grep": 1}
    assert (second["tool_calls"], second["tool_failures"]) == (1, 1)
    assert second["tools"] == {"Bash": 1}


def test_twenty_most_used_tools_are_named(session: Session) -> None:
    """Of many tools the 20 most used are named; all calls are counted."""
    calls = {f"Tool{i:02d}": 1 + (i * 7) % 30 for i in range(30)}
    names = [name for name, n in calls.items() for _ in range(n)]
    session.add(prompt(0), message(1, 1, tools=names))
    session.hold("Stop", 2)
    session.send()
    (ping,) = session.usage()
    most = sorted(calls, key=lambda name: calls[name])[-20:]
    assert ping["tools"] == {name: calls[name] for name in most}
    assert ping["tool_calls"] == sum(calls.values())


def test_stop_tells_how_long_the_turn_took(session: Session) -> None:
    """On Stop `duration_ms` runs from the prompt's row to the event: not from a tool's
    result, not from a row that the client put in, not from the next prompt.
    """
    session.add(*turn(0, 1), prompt(10.5), message(11, 2, stop="tool_use"))
    session.add(result(15), prompt(16, isMeta=True), prompt(17, isSidechain=True))
    session.add(prompt(18, isCompactSummary=True), message(19, 4), prompt(21))
    session.add(prompt(19.5), to=session.agent())
    session.hold("Stop", 1.25)
    session.hold("Stop", 20.125)
    session.hold("SubagentStop", 20.5)
    session.hold("SessionEnd", 30)
    session.send()
    found = [ping.get("duration_ms") for ping in session.usage()]
    assert found == [1250, 20125 - 10500, None, None]


BRANCHES = {  # the newest row's: the ping's
    "plain": ("main", "main"),
    "slash": ("feature/ABC-12_x.y", "feature/ABC-12_x.y"),
    "words": ("CANARY a branch", None),
    "path": ("/etc/passwd", None),
    "long": ("x" * 129, None),
    "empty": ("", None),
    "null": (None, None),
    "list": (["main"], None),
}


def prepare_branch(session: Session, branch: object, _: object) -> None:
    """Pings that ask for the branch and others."""
    session.add(prompt(0), message(1, 1, gitBranch="older"))
    newest = message(6, 1, gitBranch=branch)
    session.hold("Stop", 2, git=False, then=[message(5, 1, gitBranch="old"), newest])
    session.hold("Stop", 7, git=True)
    session.hold("Stop", 8, git=False)


branches = together(BRANCHES, prepare_branch)


@pytest.mark.parametrize("case", BRANCHES)
def test_branch_is_told_only_when_asked_for(
    branches: dict[str, Session], case: str
) -> None:
    """TELEMHQ_GIT=1 adds the branch as the ping's newest row names it, when it is
    shaped like one; without it no ping has it.
    """
    found = [ping.get("git_branch") for ping in branches[case].usage()]
    assert found == [None, BRANCHES[case][1], None]


@pytest.mark.parametrize("value, told", [(None, None), ("0", None), ("1", "main")])
def test_variable_for_the_branch(
    live: Session, value: str | None, told: str | None
) -> None:
    """Without TELEMHQ_GIT=1 the hook's ping has no branch."""
    live.add(*turn(-1, 1))
    env = {} if value is None else {"TELEMHQ_GIT": value}
    ping, _ = hurried(live, "Stop", env=env)
    assert (ping.get("git_branch"), size_of(ping)) == (told, 1)


# -- Sessions that ended without a word ------------------------------------------------


def test_lost_session_makes_one_ping(session: Session) -> None:
    """A session that was killed makes one SessionLost ping a day later: its usage, its
    project, hashes and ids, today's name of the machine; the next days nothing more.
    """
    session.add(*turn(0, 1))
    session.hold("SessionStart", -1, source="startup", machine="mini")
    session.hold("Stop", 2, then=[*turn(10, 2, tools=["Bash"]), prompt(20)])
    session.hold("PreToolUse", 11)
    session.send()
    session.add(message(21, 4, stop="tool_use"), to=session.agent())
    session.later_by(DAY_S + 60)
    assert session.send(TELEMHQ_MACHINE="midi") == [("SessionLost", 6)]
    ping = session.usage()[-1]
    assert set(ping) - set(MULTIPLES) == {
        "provider",
        "tool",
        "hook_version",
        "event_id",
        "event",
        "timestamp",
        "status",
        "project",
        "machine",
        "session_id",
        "cwd_hash",
        "transcript_path_hash",
        "model",
        "tool_calls",
        "tool_failures",
        "tools",
        "usage_complete",
    }
    told = {
        name: ping[name] for name in ("project", "machine", "session_id", "cwd_hash")
    }
    assert told == {
        "project": "api",
        "machine": "midi",
        "session_id": session.id,
        "cwd_hash": "c" * 12,
    }
    assert (ping["provider"], ping["tool"]) == ("anthropic", "claude-code")
    assert (ping["status"], ping["usage_complete"]) == ("success", False)
    assert (ping["tool_calls"], ping["tools"]) == (1, {"Bash": 1})
    for _ in range(2):
        session.later_by(DAY_S + 60)
        assert session.send() == []


@pytest.mark.parametrize("name", ["SessionStart", "Notification", "PostToolUse"])
def test_lost_session_may_have_had_any_event(session: Session, name: str) -> None:
    """Whatever event a session was met at, what it used is not lost with it."""
    session.hold(name, 0.5, source="startup")
    session.send()
    session.add(*turn(0, 1), message(5, 2, stop=None))
    session.later_by(DAY_S + 60)
    assert session.send() == [("SessionLost", 3)]


@pytest.mark.parametrize(
    "ended, rows, hours",
    [
        (True, True, 25),
        (False, False, 25),
        (False, True, 23),
        (False, False, 24 * 40),
    ],
    ids=["ended", "all is reported", "not yet quiet for a day", "all is reported, old"],
)
def test_session_that_is_not_lost(
    session: Session, ended: bool, rows: bool, hours: int
) -> None:
    """A session that ended, or with nothing unreported, or with a word within the last
    24 hours, is not lost.
    """
    session.add(*turn(0, 1))
    session.hold("SessionEnd" if ended else "Stop", 2)
    session.send()
    session.add(*(turn(10, 2) if rows else ()))
    session.later_by(hours * 3600)
    assert session.send() == []


def test_lost_session_that_goes_on_after_all_is_exact(session: Session) -> None:
    """A session that was taken for lost goes on where it was; lost again, it makes
    another ping.
    """
    session.add(*turn(0, 1))
    session.hold("SessionStart", -1, source="startup")
    session.send()
    session.later_by(DAY_S + 60)
    assert session.send() == [("SessionLost", 1)]
    session.add(*turn(10, 2))
    session.hold("Stop", 12)
    assert session.send() == [("Stop", 2)]
    session.add(*turn(20, 4))
    session.later_by(DAY_S + 60)
    assert session.send() == [("SessionLost", 4)]
    session.add(*turn(30, 8), ledger({OPUS: 15, HAIKU: 16}, 2.0))
    session.hold("SessionEnd", 40)
    assert session.send() == [("SessionEnd", 24)]
    pings = session.usage()
    assert pings[-1]["cost_usd"] == 2.0
    assert len({ping["event_id"] for ping in pings}) == 4


@pytest.mark.parametrize("foreground", [0, 1])
def test_lost_session_is_found_by_any_hook(
    home: Home, receiver: Receiver, foreground: int
) -> None:
    """Whatever session's hook comes first after a day, it has the lost one told; one
    that delivers itself leaves that to the next at most.
    """
    lost, other = Session(home, receiver), Session(home, receiver)
    lost.hold("Notification", 0)
    lost.send()
    lost.add(*turn(0, 1))
    lost.later_by(DAY_S + 60)
    for _ in range(1 + foreground):
        other.hook("Notification", env={"TELEMHQ_FOREGROUND": foreground})
    wait_until(lost.usage, 30)
    assert [size_of(ping) for ping in lost.usage()] == [1]


def test_lost_sessions_are_told_apart(home: Home, receiver: Receiver) -> None:
    """Two lost sessions that used the same make two pings with two ids."""
    sessions = [Session(home, receiver) for _ in range(2)]
    for session in sessions:
        session.hold("SessionStart", -1, source="startup")
        session.add(*turn(0, 1))
    sessions[0].send()
    sessions[0].later_by(DAY_S + 60)
    sessions[0].send()
    pings = [session.usage()[-1] for session in sessions]
    assert [size_of(ping) for ping in pings] == [1, 1]
    assert pings[0]["event_id"] != pings[1]["event_id"]


def test_lost_session_has_one_id_even_after_a_power_cut(session: Session) -> None:
    """The id of a SessionLost ping follows from the session and what is charged: an
    account that is as it was before makes the same ping again, to the byte.
    """
    session.add(*turn(0, 1))
    session.hold("Notification", 2)
    session.send()
    (path,) = session.accounts()
    before = path.read_bytes()
    for _ in range(2):
        path.write_bytes(before)
        session.later_by(DAY_S + 60)
        assert session.send() == [("SessionLost", 1)]
    bodies = [request.body for request in session.receiver.requests[-2:]]
    assert bodies[0] == bodies[1]


def test_sweep_takes_place_once_a_day(session: Session) -> None:
    """Sessions are looked for at most once a day, whatever number of senders runs."""
    session.add(*turn(0, 1))
    session.hold("Notification", 2)
    session.send()
    state = session.home.state_json()
    session.later_by(DAY_S + 60)
    session.home.set_state(**dict(state, swept_at=time.time() - DAY_S / 2))
    assert session.send() == []
    session.home.set_state(**dict(state, swept_at=time.time() - DAY_S - 60))
    assert session.send() == [("SessionLost", 1)]
    assert time.time() - session.home.state_json()["swept_at"] < 600


def test_session_whose_pings_wait_is_not_lost(session: Session) -> None:
    """After an outage of days the pings that waited are charged, each with its own: a
    session whose end waits in the outbox did not end without a word.
    """
    session.hold("SessionStart", -1, source="startup")
    session.send()
    session.add(*turn(0, 1), *turn(10, 2), ledger({OPUS: 3}, 0.5))
    session.hold("Stop", 2)
    session.hold("Stop", 12)
    session.hold("SessionEnd", 20)
    session.later_by(2 * DAY_S)
    assert session.send() == [("Stop", 1), ("Stop", 2), ("SessionEnd", 0)]
    assert session.usage()[-1].get("cost_usd") == 0.5


def test_session_whose_pings_wait_for_the_tracker_is_not_lost(session: Session) -> None:
    """As long as pings wait, because the tracker is away, no session counts as lost."""
    session.hold("SessionStart", -1, source="startup")
    session.send()
    other = Session(session.home, session.receiver, session.begun - 3600)
    for i in range(5):
        other.hold("Notification", i)
    session.add(*turn(0, 1), ledger({OPUS: 1}, 0.5))
    session.hold("SessionEnd", 2)
    session.later_by(2 * DAY_S)
    session.receiver.answer = 503
    other.hook("Notification", env={"TELEMHQ_FOREGROUND": 1})
    session.receiver.answer = 200
    session.home.set_state()
    assert session.send()[-1] == ("SessionEnd", 1)
    assert {ping["event"] for ping in session.usage()} == {"SessionEnd"}
    assert len({ping["event_id"] for ping in session.usage()}) == 1


@pytest.mark.parametrize("days, kept", [(29, 1), (31, 0)])
def test_accounts_are_dropped_30_days_after_their_last_event(
    session: Session, days: int, kept: int
) -> None:
    """What is known of a session goes 30 days after its last event; a session resumed
    after that has all of it as history.
    """
    session.add(*turn(0, 1))
    session.hold("Stop", 2)
    session.send()
    session.later_by(days * DAY_S)
    session.send()
    assert len(session.accounts()) == kept
    session.hold("SessionStart", 100, source="resume")
    session.add(*turn(110, 2))
    session.hold("Stop", 112)
    session.send()
    assert size_of(session.usage()[-1]) == 2


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0", b"{", b"[]", b"{}", b'{"files": 7}']
)
def test_broken_account_costs_no_ping(session: Session, content: bytes) -> None:
    """Whatever an account's file holds, pings are made, sent, and charged again
    soon.
    """
    session.add(*turn(0, 1))
    session.hold("Stop", 2)
    session.send()
    (path,) = session.accounts()
    path.write_bytes(content)
    session.add(*turn(10, 2))
    session.hold("Stop", 12)
    session.hold("SessionEnd", 13)
    session.send()
    assert [ping["event"] for ping in session.usage()] == ["Stop", "Stop", "SessionEnd"]
    assert (size_of(session.usage()[1]) or 0) in (0, 2)
    assert not session.home.waiting()


def test_broken_account_hides_no_lost_session(session: Session) -> None:
    """Lost sessions are found among accounts that cannot be read, and told."""
    session.add(*turn(0, 1))
    session.hold("Notification", 2)
    session.send()
    broken = [b"", b"{}", b"{", b"[]", b'{"owed": 7, "ended": 0}'] * 10
    for i, content in enumerate(broken):
        (session.base / "accounts" / f"{i:016x}.json").write_bytes(content)
    session.later_by(DAY_S + 60)
    assert session.send() == [("SessionLost", 1)]


# -- TELEMHQ_USAGE=0, and senders of other sessions ------------------------------------


class Opened:
    """What is opened in some directories, as the kernel tells it (inotify, Linux)."""

    def __init__(self, *directories: pathlib.Path) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("inotify is Linux's")
        ctypes = pytest.importorskip("ctypes")
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self.fd >= 0
        for path in directories:
            watch = self.libc.inotify_add_watch(self.fd, os.fsencode(str(path)), 0x20)
            assert watch >= 0

    def names(self) -> list[str]:
        """Names of the files, and of the directories ("" for one that is watched)."""
        found, raw = [], b""
        with contextlib.suppress(BlockingIOError):
            raw = os.read(self.fd, 1 << 16)
        while raw:
            length = struct.unpack_from("iIII", raw)[3]
            found.append(raw[16 : 16 + length].rstrip(b"\0").decode())
            raw = raw[16 + length :]
        return found

    def close(self) -> None:
        os.close(self.fd)


@pytest.mark.parametrize(
    "hook, sender, read",
    [
        ("0", "1", False),
        ("0", "0", False),
        ("1", "0", True),
        (None, "0", True),
        ("off", "1", False),
        ("no!", "1", False),
    ],
)
def test_usage_0_opens_no_transcript(
    live: Session, hook: str | None, sender: str, read: bool
) -> None:
    """For pings of a hook with TELEMHQ_USAGE=0 no transcript is opened, ever, by
    whatever session's sender; for those of any other hook it is. Not understood means
    off.
    """
    live.add(*turn(-1, 1), ledger({OPUS: 3}, 1.0))
    live.add(message(-0.5, 2), to=live.agent())
    folders = [live.path.parent, live.path.with_suffix(""), live.agent().parent]
    opened = Opened(*folders)
    live.home.state.mkdir(mode=0o700, parents=True)
    live.base.mkdir(mode=0o700)
    now = time.time()  # a back-off: the hooks' pings wait for a sender of ours
    live.home.set_state(set_at=now, not_before=now + 900)
    env = {} if hook is None else {"TELEMHQ_USAGE": hook}
    for name in ("SessionStart-startup", "Stop", "SessionEnd-clear"):
        live.hook(name, env=env)
    live.home.set_state()
    send(live.home, live.receiver.url, TELEMHQ_USAGE=sender)
    live.later_by(DAY_S + 60)
    send(live.home, live.receiver.url, TELEMHQ_USAGE=sender)
    names = opened.names()
    opened.close()
    assert len(live.usage()) == 2
    if read:
        assert {live.path.name, live.agent().name} <= set(names)
        assert sum(size_of(ping) for ping in live.usage()) == 3
    else:
        assert names == []
        assert not [p for p in live.receiver.pings if USAGE_FIELDS & set(p)]


def test_each_ping_keeps_the_settings_of_the_hook_that_made_it(
    home: Home, receiver: Receiver
) -> None:
    """One sender may empty the outbox for hooks of other sessions with other settings:
    what shapes a ping is that of its own hook, none of it the sender's.
    """
    settings = {
        "plain": {},
        "quiet": {"TELEMHQ_USAGE": 0, "TELEMHQ_PROJECT": "quiet"},
        "full": {
            "TELEMHQ_GIT": 1,
            "TELEMHQ_MACHINE": "full",
            "TELEMHQ_HASH_KEY": "key",
        },
    }
    sessions = {name: Session(home, receiver, time.time()) for name in settings}
    home.state.mkdir(mode=0o700, parents=True)
    sessions["plain"].base.mkdir(mode=0o700)
    home.set_state(set_at=time.time(), not_before=time.time() + 900)
    for name, session in sessions.items():
        session.add(*turn(-1, 1))
        session.hook("Stop", env=settings[name])
    home.set_state()
    send(
        home,
        receiver.url,
        TELEMHQ_USAGE=0,
        TELEMHQ_PROJECT="sender",
        TELEMHQ_GIT=0,
        TELEMHQ_MACHINE="sender",
        TELEMHQ_HASH_KEY="sender",
    )
    pings = {name: session.usage()[0] for name, session in sessions.items()}
    found = {
        name: (
            size_of(ping),
            ping["project"],
            ping.get("machine"),
            ping.get("git_branch"),
        )
        for name, ping in pings.items()
    }
    assert found == {
        "plain": (1, "api", None, None),
        "quiet": (None, "quiet", None, None),
        "full": (1, "api", "full", "main"),
    }
    path = str(sessions["plain"].path).encode()
    assert (
        pings["plain"]["transcript_path_hash"] == hashlib.sha256(path).hexdigest()[:12]
    )
    cwds = [pings[name]["cwd_hash"] for name in ("plain", "quiet", "full")]
    assert cwds[0] == cwds[1] != cwds[2]


# -- Transcripts that are no transcripts -----------------------------------------------


def most_kb() -> int:
    """What a sender may take. It has 30 MB without a transcript; PyPy and Pythons with
    free threads give back late what they have freed."""
    has_gil: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
    return (80 if has_gil and sys.implementation.name == "cpython" else 240) << 10


def peak_kb(pid: int) -> int:
    """The most memory that a process has had so far (Linux)."""
    status = pathlib.Path("/proc", str(pid), "status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def make_fifo(path: pathlib.Path) -> None:
    """A FIFO that nobody writes."""
    os.mkfifo(str(path))


def make_gigabyte(path: pathlib.Path) -> None:
    """1 GB without a line's end."""
    with open(str(path), "wb") as file:
        file.truncate(1 << 30)


def make_no_line(path: pathlib.Path) -> None:
    """120 MB without a line's end, small enough to be read."""
    with open(str(path), "wb") as file:
        file.truncate(120 << 20)


def make_long_line(path: pathlib.Path) -> None:
    """A line of 50 MB that looks as if it counted."""
    with open(str(path), "ab") as file:
        file.write(b'{"type":"user","promptId":"x","usage":"')
        file.write(b"CANARY " * (50 << 17) + b'"}\n')


def make_not_utf8(path: pathlib.Path) -> None:
    """Every byte there is."""
    path.write_bytes(bytes(range(256)) * 1000)


def make_link(path: pathlib.Path) -> None:
    """A symbolic link to a device without an end."""
    os.symlink("/dev/zero", str(path))


MAKERS = (
    None,
    pathlib.Path.touch,
    pathlib.Path.mkdir,
    make_fifo,
    make_gigabyte,
    make_no_line,
    make_long_line,
    make_not_utf8,
    make_link,
)
BROKEN = {
    getattr(make, "__name__", "missing") + (", an agent's" if of_agent else ""): (
        make,
        of_agent,
    )
    for make in MAKERS
    for of_agent in (False, True)
}


def prepare_broken(
    session: Session, make: Callable[[pathlib.Path], object] | None, of_agent: bool
) -> None:
    """A session whose own transcript, or an agent's, is none."""
    path = session.agent() if of_agent else session.path
    session.add(*turn(0, 1))
    session.add(message(1, 2), to=path)
    if make is not make_long_line:
        path.unlink()
    if make:
        make(path)
    if make is make_long_line:
        session.add(message(1.5, 4), to=path)

    def look() -> None:
        session.peaks.extend(map(peak_kb, session.home.processes()))

    session.hold("Stop", 2, then=look)
    session.hold("Stop", 3)


broken = together(BROKEN, prepare_broken)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_transcript_costs_the_ping_its_usage_only(
    broken: dict[str, Session], case: str
) -> None:
    """Missing, empty, a directory, a FIFO, 1 GB, not UTF-8, a line of 50 MB: the ping
    goes, in time, and bounded memory is used for it.
    """
    make, of_agent = BROKEN[case]
    own = 1 if of_agent else 0
    if make is make_long_line:
        own = 1 + 2 + 4
    first, second = broken[case].usage()
    assert (size_of(first) or 0, size_of(second) or 0) == (own, 0)
    if make in (None, make_fifo, pathlib.Path.mkdir, make_link) and not of_agent:
        found = {name: first[name] for name in USAGE_FIELDS & set(first)}
        assert found == NOTHING_READ
    assert len(broken[case].peaks) == sys.platform.startswith("linux")
    assert max(broken[case].peaks, default=0) < most_kb()
    assert broken[case].took < 30  # for all of them


def test_long_line_is_passed_over_in_any_two_reads(session: Session) -> None:
    """A line too long to keep is passed over also when its end is written much later:
    nothing inside it counts, and all behind it does.
    """
    inner = b'"usage":{"input_tokens":1},'
    session.add(*turn(0, 1), b'{"type":"assistant",' + inner * (9 << 20 >> 4))

    def then() -> None:
        session.add(inner * 1000 + b'"x":1}\n', *turn(10, 2))

    session.hold("Stop", 2, then=then)
    session.hold("Stop", 12)
    assert session.send() == [("Stop", 1), ("Stop", 2)]


REPLACED = {
    how + (", an agent's" if of_agent else ""): (how, of_agent)
    for how in ("truncated", "replaced", "grown anew", "emptied")
    for of_agent in (False, True)
}


def prepare_replaced(session: Session, how: str, of_agent: bool) -> None:
    """A session whose transcript, or an agent's, is replaced after its first Stop."""
    path = session.agent() if of_agent else session.path
    session.add(*turn(0, 1))
    rows = [prompt(3), message(4, 2, "msg_2", "tool_use"), message(5, 4, "msg_4")]
    session.add(*rows, to=path)
    session.hold("SessionStart", -1, source="startup")

    def then() -> None:
        raw, other = path.read_bytes(), path.with_suffix(".new")
        if how == "emptied":
            os.truncate(str(path), 0)
        elif how == "truncated":
            os.truncate(str(path), raw.rindex(b"\n", 0, -1) + 1)
        else:
            other.write_bytes(raw)
            session.add(*([message(5, 1024)] if how == "grown anew" else []), to=other)
            os.replace(str(other), str(path))

    session.hold("Stop", 6, then=then)
    more = [*rows, message(11, 8)]
    session.hold("Stop", 7, then=lambda: session.add(*more, to=path))
    session.hold("Stop", 12, then=[*turn(20, 16), ledger({OPUS: 31 + 1024}, 2.0)])
    session.hold("SessionEnd", 30)


replaced = together(REPLACED, prepare_replaced)


@pytest.mark.parametrize("case", REPLACED)
def test_replaced_transcript_counts_nothing_twice(
    replaced: dict[str, Session], case: str
) -> None:
    """A transcript that shrank or was replaced is skipped to its end; what comes behind
    is counted, and the client's ledger settles the rest.
    """
    pings = replaced[case].usage()
    assert [size_of(ping) for ping in pings] == [7, 0, 8, 16 + 1024]
    assert pings[-1]["cost_usd"] == 2.0


# -- What stays on the machine ---------------------------------------------------------


WORDS = "CANARY of a transcript, with words /and/paths"


def in_place_of(name: str, **changes: object) -> dict[str, Any]:
    """An assistant row whose message has WORDS, or `changes`, where `name` should
    be.
    """
    row = message(1, 1, tools=["Bash"])
    row["message"].update({name: WORDS} if name else changes)
    return row


HOSTILE = {  # texts where a name or an id should be
    "branch": [message(1, 1, gitBranch=WORDS)],
    "branch, not asked for": [message(1, 1, gitBranch="CANARY-branch")],
    "tool": [message(1, 1, tools=[WORDS, "Bash"])],
    "tool call": [
        in_place_of(
            "", content=[{"type": "tool_use", "id": [WORDS], "name": {"a": WORDS}}]
        ),
        in_place_of("", content=[{"type": "tool_use", "id": WORDS}]),
    ],
    "message": [in_place_of("id")],
    "content": [in_place_of("content")],
    "model": [in_place_of("model")],
    "stop reason": [in_place_of("stop_reason")],
    "usage": [in_place_of("usage"), in_place_of("", usage={WORDS: 1, "a": WORDS})],
    "ledger": [message(1, 1), ledger({OPUS: 2, WORDS: 2}, 1.0)],
    "prompt": [prompt(1, promptId=WORDS, gitBranch=WORDS, cwd=WORDS, version=WORDS)],
    "result": [dict(result(1, error=True), toolUseResult=WORDS)],
    "time": [message(1, 1, timestamp=WORDS)],
    "type": [dict(message(1, 1), type=WORDS)],
    "others": [message(1, 1, requestId=WORDS, slug=WORDS, requestedModel=WORDS)],
}


def note_words(
    home: Home, sessions: dict[str, Session], found: dict[str, list[Any]]
) -> None:
    """Add to `found` which sessions' words are in a file now, and where."""
    for path in home.state.rglob("*"):
        raw = path.read_bytes() if path.is_file() else b""
        if b"CANARY" in raw:
            at = raw.index(b"CANARY")
            for name, session in sessions.items():
                if session.id.encode() in raw or path.name == "sender.log":
                    where = path.parent.name, raw[max(0, at - 40) : at + 20]
                    found.setdefault(name, []).append(where)


@pytest.fixture(scope="module")
def seen_words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of a real transcript each, and of HOSTILE rows, all charged: which of them left a
    text in a ping or, at any time, in a file; {name: [where]}.
    """
    home = Home(tmp_path_factory.mktemp("words") / "home")
    found: dict[str, list[Any]] = {}
    with Receiver() as receiver:
        sessions: dict[str, Session] = {}
        for name in TRANSCRIPTS:
            replay = Replay(name, home, receiver)
            replay.play("all", random.Random(7))
            sessions[name] = replay.session
        for name, rows in HOSTILE.items():
            sessions[name] = session = Session(home, receiver)
            session.add(prompt(0), *rows)
            session.add(*rows, to=session.agent())
            for event_name in ("SessionStart", "Stop", "Stop", "SessionEnd", "Stop"):
                git = name != "branch, not asked for"
                session.hold(event_name, 2, git=git, source="startup")
        steps = dict(receiver.__dict__["later"])

        def answer(request: Request) -> int:
            steps.get(request.ping["event_id"], int)()
            note_words(home, sessions, found)
            return 200

        receiver.answer = answer
        send(home, receiver.url)
        for session in sessions.values():
            session.add(prompt(50), message(51, 1))
        sessions["branch"].later_by(DAY_S + 60)
        send(home, receiver.url)
        note_words(home, sessions, found)
        for name, session in sessions.items():
            bodies = [
                r.body for r in receiver.requests if session.id.encode() in r.body
            ]
            assert len(bodies) > 4
            if b"CANARY" in b"".join(bodies):
                found.setdefault(name, []).append("a ping")
    return found


@pytest.mark.parametrize("name", TRANSCRIPTS + sorted(HOSTILE))
def test_nothing_of_a_transcript_but_counts_ids_and_names_is_kept(
    seen_words: dict[str, list[Any]], name: str
) -> None:
    """No text of a transcript reaches a ping, an account, the log or any other file, at
    no time: not of the real ones, and not where a text stands in place of a name.
    """
    assert seen_words.get(name, []) == []


# -- What is lost is counted -----------------------------------------------------------


def test_tokens_of_a_refused_ping_are_counted_as_lost(session: Session) -> None:
    """Delivered pings and what is counted as lost are the ledger together: a ping that
    the tracker refuses takes its tokens into the count of losses, a delivered one none.
    """
    session.add(*turn(0, 1))
    session.hold("Stop", 2, then=turn(10, 2))
    session.hold("Stop", 12, then=turn(20, 4))
    session.hold("Stop", 22)
    answer = session.receiver.answer

    def refuse(request: Request) -> int:
        answer(request)
        return 400 if request.ping["total_tokens"] == 2 * 16 else 200

    session.receiver.answer = refuse
    assert session.send() == [("Stop", 1), ("Stop", 2), ("Stop", 4)]
    losses = session.home.state_json()["losses"]
    assert losses["tokens"] == 2 * 16
    assert sum(losses.values()) - losses["tokens"] == 1


def test_tokens_of_an_overflowed_ping_are_counted_when_it_was_charged(
    session: Session,
) -> None:
    """A ping that the bound forces out was charged, and its tokens are lost and
    counted; or it was not, and its tokens are in the session's next ping.
    """
    session.receiver.answer = 503
    session.add(*turn(0, 1), *turn(10, 2), *turn(20, 4), *turn(30, 8))
    for at in (2, 12, 22):
        session.hold("Stop", at)
    foreground = {"TELEMHQ_FOREGROUND": 1}
    session.hook("Notification", env=foreground)  # tries some, and so charges them
    held = [json.loads(path.read_text()) for path in session.home.waiting()]
    charged = sum(record["ping"].get("total_tokens", 0) for record in held) // 16
    outbox, ns = session.base / "outbox", int((session.begun + 100) * 1e9)
    old = {path.name for path in session.home.waiting()}
    ping = {"provider": "anthropic", "status": "success", "event": "Notification"}
    for i in range(5000):
        record = {"ping": dict(ping, event_id=f"{i:032x}"), "local": {}}
        (outbox / f"{ns + i:020d}-{i:032x}.json").write_text(json.dumps(record))
    session.home.set_state()
    session.hook("Notification", env=foreground)
    waiting = session.home.waiting()
    assert len(waiting) == 5000
    kept = [path for path in waiting if path.name in old]
    assert len(kept) == 1  # the hook's own, the newest
    losses = session.home.state_json()["losses"]
    assert 0 < charged < 15
    assert losses["tokens"] == charged * 16
    assert sum(losses.values()) - losses["tokens"] == 3 + 2
    for path in waiting:
        path.unlink()
    session.home.set_state()
    session.receiver.answer = 200
    session.hold("SessionEnd", 40)
    assert session.send()[-1] == ("SessionEnd", 15 - charged)


# -- The whole way, by hooks alone -----------------------------------------------------


def test_whole_way_of_a_session(live: Session) -> None:
    """Hooks, detached senders and a client that writes late: the sums are the
    ledger. (The rows are stamped before the first hook is done, however fast it is.)
    """
    live.hook("SessionStart-startup", source="startup")
    wait_until(lambda: len(live.receiver.requests) == 1, 30)
    live.add(prompt(0.01))
    live.hook("UserPromptSubmit")
    live.add(message(0.01, 1, stop="tool_use", tools=["Agent"]))
    live.hook("PreToolUse-Agent")
    live.add(message(0.01, 2, stop="tool_use"), to=live.agent())
    live.hook("Stop")
    after(0.1, lambda: live.add(message(0.02, 4)))
    live.receiver.wait_for(4, 30)
    live.add(message(0.03, 8), to=live.agent())
    live.hook("SubagentStop", agent_transcript_path=str(live.agent()))
    live.receiver.wait_for(5, 30)
    live.add(ledger({OPUS: 15, HAIKU: 16}, 1.5))
    live.hook("SessionEnd-other")
    live.receiver.wait_for(6, 30)
    pings = live.usage()
    assert [size_of(ping) for ping in pings] == [7, 8, 16]
    assert pings[-1]["cost_usd"] == 1.5
    assert not [ping for ping in pings if "usage_complete" in ping]
    assert live.receiver.most_at_once == 1
