"""What of a transcript counts: each answer of the API, once, by its fullest row."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import random
import shutil
import sys
from typing import TYPE_CHECKING, Any, Callable, Iterator

import pytest

from support import FIXTURES
from transcripts import (
    END,
    HAIKU,
    MULTIPLES,
    NAMES,
    OPUS,
    START,
    Session,
    cost_of,
    interrupted,
    ledger,
    message,
    prompt,
    result,
    session,
    size_of,
    summed,
    turn,
    usage_of,
    used,
)

if TYPE_CHECKING:
    from support import Request

__all__ = ["session"]  # fixtures

# -- Real transcripts, cut everywhere --------------------------------------------------


def expected(name: str) -> Any:
    """What the client itself says of a real transcript."""
    path = FIXTURES / "transcripts" / name / "expected.json"
    return json.loads(path.read_text("utf-8"))


def replay(session: Session, name: str) -> Iterator[tuple[float, Any, Any]]:
    """A real transcript as this session's, in order of time: when, which file, what."""
    folder, old = FIXTURES / "transcripts" / name, expected(name)["session_id"]
    found: list[tuple[float, Any, Any]] = []
    for path in sorted(folder.rglob("*.jsonl")):
        below = path.relative_to(folder).as_posix().replace(old, session.id)
        to, at = session.path.parent / below, 0.0
        for line in path.read_bytes().splitlines():
            row = dict(json.loads(line), sessionId=session.id)
            if "timestamp" in row:
                stamp = row["timestamp"].replace("Z", "+00:00")
                at = datetime.datetime.fromisoformat(stamp).timestamp()
            found.append((at, to, row))
    first = min(step[0] for step in found)
    for at, to, row in sorted(found, key=lambda step: step[0]):
        if "timestamp" in row:
            row["timestamp"] = at - first
        yield at - first, to, row


TRANSCRIPTS = sorted(path.name for path in (FIXTURES / "transcripts").iterdir())


@pytest.mark.parametrize("often", [False, True], ids=["at the end", "often"])
@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_sums_are_the_clients_own(session: Session, name: str, often: bool) -> None:
    """However much of a transcript is there when a ping is charged: the sums over all
    pings are the client's ledger, cost included."""
    chance = random.Random(name)
    for at, path, row in replay(session, name):
        text = session.text([row])
        cut = chance.randrange(len(text))  # in mid-line, in mid-character
        session.add(text[:cut], to=path)
        if often and chance.random() < 0.2:
            session.charge("Stop", at)
        session.add(text[cut:], to=path)
        if often and chance.random() < 0.8:
            session.charge("Stop", at)
        if row["type"] == "cost-state":
            session.hook(END, at + 0.005)
    session.send()
    known, pings = expected(name), session.receiver.pings
    theirs = ("input_tokens", "output_tokens", "cache_read_input_tokens")
    given = known["unique_messages_total"]
    counts = [given.get(n, 0) for n in (*theirs, "cache_creation_input_tokens")]
    assert summed(pings, *NAMES.split()) == counts
    assert summed(pings, "total_tokens") == [sum(counts)]
    assert summed(pings, "cost_usd") == [pytest.approx(known["client_cost_usd"])]


# -- One row per answer ----------------------------------------------------------------


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    """A row without its message's id, or without its own fields."""
    said = {k: v for k, v in row["message"].items() if k not in names}
    found = {k: v for k, v in row.items() if k not in names}
    return {**found, "message": said}


def blocks(n: int, key: str, *names: str) -> list[dict[str, Any]]:
    """Two rows of an answer of size n, without some of what tells whose they are."""
    return [without(message(at, n, key), *names) for at in (1, 2)]


NAMELESS = without(message(1, 1), "id", "requestId")
ANSWERS = {
    "a row for each block": [*blocks(1, "a"), message(3, 2)],
    "a router's one id": [
        message(1, 1, "a", requestId="req_1"),
        *[message(2, 2, "a", requestId="req_2")] * 2,
    ],
    "no message.id": [*blocks(1, "a", "id"), *blocks(2, "b", "id")],
    "no requestId": [*blocks(1, "a", "requestId"), *blocks(2, "b", "requestId")],
    "neither": [NAMELESS, NAMELESS, without(message(2, 2), "id", "requestId")],
    "0/0, later whole": [message(1, 0, "a"), message(2, 3, "a"), message(3, 0, "a")],
    "0/1, later whole": [
        message(1, 0, "a", usage=usage_of(3, input_tokens=0)),
        message(2, 3, "a"),
    ],
    "growing": [message(1, 1, "a"), message(2, 2, "a"), message(3, 3, "a")],
}
between = pytest.mark.parametrize("between", [False, True], ids=["one ping", "each"])


@pytest.mark.fault(76, 78)
@between
@pytest.mark.parametrize("case", ANSWERS)
def test_answer_counts_once(session: Session, case: str, between: bool) -> None:
    """An answer is known by message.id and requestId, else by what there is of them,
    else by its row's uuid; it counts once, by its fullest row (the later at a tie:
    some routers begin with 0/1), also when a ping came between its rows."""
    session.add(prompt(0))
    for row in ANSWERS[case]:
        session.add(row)
        if between:
            session.charge("Stop", 4)
    session.charge("Stop", 5)
    assert summed(session.receiver.pings, *MULTIPLES) == list(used(3).values())


@pytest.mark.fault(77)
def test_advisors_calls_count_under_their_own_model(session: Session) -> None:
    """`usage.iterations` names calls of another model inside an answer, which its
    counts lack. (A compaction's are in no ledger either.)"""
    parts = [
        {"type": "message", **usage_of(1)},
        {"type": "advisor_message", "model": HAIKU, **usage_of(2)},
        {"type": "compaction", **usage_of(1024)},
    ]
    rows = [message(i, 0, "a", usage=usage_of(1, iterations=parts)) for i in (1, 2)]
    ping = session.charge("Stop", 3, prompt(0), *rows)
    assert ping["models"] == {OPUS: used(1), HAIKU: used(2)}
    assert (ping["model"], size_of(ping)) == (OPUS, 3)
    ping = session.charge(END, 4, ledger({OPUS: 1, HAIKU: 2}))
    assert (size_of(ping), ping["cost_usd"]) == (0, cost_of({OPUS: 1, HAIKU: 2}))


NO_ANSWERS: list[Any] = [  # each between two answers
    message(1, 1024, model="<synthetic>"),
    message(1, 1024, isApiErrorMessage=True),
    dict(message(1, 1024), type="system"),
    message(1, 0, usage={"input_tokens": -1, "output_tokens": "3"}),
    message(1, 0, usage={"input_tokens": [1], "output_tokens": {"a": 1}}),
    message(1, 0, usage={"input_tokens": 2**60, "output_tokens": 10**40}),
    message(1, 0, usage=usage_of(0, iterations=[7, {"type": "advisor_message"}])),
    dict(message(1, 1), message=None),
    dict(message(1, 1), message=["usage"]),
    b'["usage","promptId"]\n"usage"\nnull\n\n\r\n',
    {"type": "cost-state", "totalCostUSD": "1", "modelUsage": {OPUS: {}}},
    {"type": "cost-state", "totalCostUSD": 1, "modelUsage": [1]},
    b'{"type":"assistant","message":{"id":"a","usage":NaN}}\n',
    b'{"type":"assistant","usage":{"input_tokens":1}\n{"usage":\n"usage"}\n',
    b'{"type":"assistant","usage":"\\ud83\n"usage\\x"\n{"usage":,}\n{"usage":tru}\n',
    b'{"usage":' + b"[" * 100000 + b"]" * 100000 + b"}\n",
    b'{"type":"assistant","usage":' + b"9" * 20000 + b"}\n",
]


def test_what_is_no_answer_counts_nothing(session: Session) -> None:
    """The client's own words, its reports of API errors, and whatever else a transcript
    may hold, count nothing and cost no other row its count."""
    session.add(prompt(0))
    for i, row in enumerate(NO_ANSWERS):
        session.add(row, message(2, 1 << i))
    ping = session.charge("Stop", 5)
    assert size_of(ping) == (1 << len(NO_ANSWERS)) - 1
    assert (ping["model"], ping.get("usage_complete", True)) == (OPUS, True)


# -- An agent's files ------------------------------------------------------------------


def test_agents_have_transcripts_of_their_own(session: Session) -> None:
    """Each agent's file below the session's is charged, at any depth, from where its
    last read ended; other files there are not transcripts."""
    deep = session.agent("a2").parent / "workflow" / "7" / "agent-deep.jsonl"
    session.add(message(2, 4), to=session.agent())
    session.add(message(2, 8), to=deep)
    session.add(message(2, 1024), to=deep.parent / "journal.jsonl")
    session.add(message(2, 2048), to=deep.parent / "agent-deep.meta.json")
    session.add(message(2, 4096), to=session.path.with_suffix("") / "agent-x.jsonl")
    assert size_of(session.charge("Stop", 4, *turn(0, 1), message(3, 2))) == 15
    session.add(message(20, 16), to=session.agent())
    session.add(message(20, 32), to=deep)
    session.add(message(20, 64), to=session.agent("a3"))
    assert size_of(session.charge("Stop", 21)) == 112


@pytest.mark.fault(43)
@between
def test_copies_of_the_parents_rows_count_once(session: Session, between: bool) -> None:
    """Agents' files may begin with copies of their parent's rows, under the same ids:
    tokens, tool calls and failures count once over all of the session's files."""
    call = message(1, 1, "c", "tool_use", tools=["Bash"])
    parent = [prompt(0), call, result(2, "toolu_c_0", error=True)]
    parent += [message(3, 2, "b", "tool_use"), *[message(3, 0) for _ in range(300)]]
    session.add(*parent, message(8, 4))
    session.hook(START, -1)
    if between:
        session.charge("Stop", 9)
    for name in ("a1", "b1"):
        session.add(*parent, message(5, 8, "shared"), to=session.agent(name))
    session.add(message(6, 16), to=session.agent("b1"))
    session.charge("Stop", 10)
    pings = session.receiver.pings
    assert summed(pings, "tool_calls", "tool_failures") == [1, 1]
    assert sum(size_of(ping) or 0 for ping in pings) == 31


@pytest.mark.fault(44)
def test_64000_messages_of_250_agents(session: Session) -> None:
    """Such a session is exact, its account bounded and readable, and what comes later
    is charged once, copies or not."""
    session.hook(START, -1)
    session.add(prompt(0))
    text = session.text([message(1, 1, "KEY", "tool_use")])
    for agent in range(250):
        rows = [text.replace(b"KEY", b"%d_%d" % (agent, i)) for i in range(256)]
        session.add(*rows, to=session.agent(f"{agent:03d}"))
    for at in (2, 2.1, 2.2, 2.3):  # a slow machine does not read it all for the first
        session.hook("Stop", at)
    assert sum(size_of(ping) or 0 for ping in session.send()) == 64000
    (account,) = session.accounts()
    assert account.stat().st_size < 5 << 20
    copied = [session.agent(name).read_bytes() for name in ("007", "249")]
    session.add(*copied, message(3, 1), to=session.agent("copies"))
    assert size_of(session.charge("Stop", 4)) == 1


# -- Transcripts that are no transcripts, or not the same ------------------------------


def make_big(path: pathlib.Path) -> None:
    """A file without a line's end."""
    path.touch()
    os.truncate(path, 1 << 30)


CPYTHON = sys.implementation.name == "cpython" and sys.platform == "linux"
PEAK_KB = 110 << 10 if CPYTHON else 1 << 40
BROKEN: dict[str, Callable[[pathlib.Path], object]] = {
    "missing": lambda _: None,
    "empty": pathlib.Path.touch,
    "a directory": pathlib.Path.mkdir,
    "a FIFO": os.mkfifo,
    "1 GB": make_big,
    "not UTF-8": lambda path: path.write_bytes(bytes(range(256)) * 1000),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.fault(36)
@pytest.mark.parametrize("of_agent", [False, True], ids=["own", "an agent's"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_transcript_costs_its_ping_the_usage_only(
    session: Session, case: str, of_agent: bool
) -> None:
    """The ping goes, in time, in bounded memory, and what can be read counts; where
    nothing can, it says so and has no counts."""
    path = session.agent() if of_agent else session.path
    if of_agent:
        session.add(*turn(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    BROKEN[case](path)
    ping = session.charge("Stop", 3)
    assert (size_of(ping) or 0) == of_agent
    assert of_agent or ping["usage_complete"] is False
    assert session.peak_kb < PEAK_KB


@pytest.mark.fault(36)
def test_nothing_inside_a_long_line_counts(session: Session) -> None:
    """A line of 50 MB is passed over, in any two reads; all behind it counts."""
    begun = b'{"a":"' + b"a" * (50 << 20)
    assert size_of(session.charge("Stop", 2, *turn(0, 1), begun)) == 1
    inside = message(3, 1024)
    assert size_of(session.charge("Stop", 12, inside, *turn(10, 2))) == 2
    assert session.peak_kb < PEAK_KB


OLD = [prompt(3), message(4, 2, "2", "tool_use"), message(5, 4, "4")]
NEW = [*OLD, message(11, 8, "8")]
REPLACED = ["the same rows, another inode", "other rows, another inode"]
REPLACED += ["shortened", "regrown"]


def replaced(session: Session, path: pathlib.Path, how: str) -> int:
    """Change a transcript that was read; the size of what is new in it."""
    raw, other = path.read_bytes(), path.with_suffix(".new")
    if how == "the same rows, another inode":
        session.add(raw, NEW[-1], to=other)
        os.replace(other, path)
        return 8
    if how == "other rows, another inode":  # of the same lengths
        session.add(raw.replace(b"msg_", b"gsm_"), message(11, 16), to=other)
        os.replace(other, path)
        return 16 + (7 if path == session.path else 6)
    os.truncate(path, raw.rindex(b"\n", 0, -1) + 1 if how == "shortened" else 0)
    if how == "shortened":
        session.add(NEW[-1], to=path)
        return 8
    session.add(*[message(11, 1) for _ in range(32)], *NEW, to=path)  # regrown
    return 32 + 8


@pytest.mark.fault(37)
@pytest.mark.parametrize("of_agent", [False, True], ids=["own", "an agent's"])
@pytest.mark.parametrize("how", REPLACED)
def test_replaced_transcript_is_read_again(
    session: Session, how: str, of_agent: bool
) -> None:
    """Each answer counts once, none is missing that the file has, and a ledger row
    there has its say."""
    path = session.agent() if of_agent else session.path
    session.hook(START, -1)
    session.add(*turn(0, 1), interrupted(2))
    session.add(*OLD, to=path)
    assert size_of(session.charge("Stop", 6)) == 7
    new = replaced(session, path, how)
    assert size_of(session.charge("Stop", 12)) == new
    sums = {OPUS: 7 + new + 64, HAIKU: 128}
    ping = session.charge(END, 30, *turn(20, 64), ledger(sums))
    assert (size_of(ping), ping["cost_usd"]) == (64 + 128, cost_of(sums))
    assert summed(session.receiver.pings, "interrupts") == [1]


def test_agents_rows_behind_the_end_are_a_later_runs(session: Session) -> None:
    """The client writes agents' rows up to 2 s later than an event, no more."""
    session.charge("Stop", 2, *turn(0, 1))
    session.add(message(31.9, 2), message(32.1, 4), to=session.agent())
    assert size_of(session.charge(END, 30)) == 2


@pytest.mark.fault(37, 46)
@pytest.mark.parametrize("move", [os.rename, shutil.copytree])
def test_transcripts_that_move(session: Session, move: Callable[..., Any]) -> None:
    """A project's directory that moves takes its transcripts along, agents' too: each
    event's path holds, unless there is nothing; nothing counts twice."""
    session.add(message(1, 2), to=session.agent())
    assert size_of(session.charge("Stop", 3, *turn(0, 1))) == 3
    moved = session.path.parent.with_name("-moved")
    move(session.path.parent, moved)
    session.path = moved / session.path.name
    session.add(message(11, 8), to=session.agent())
    assert size_of(session.charge("Stop", 12, *turn(10, 4))) == 12
    nowhere = str(session.path.with_name("not there.jsonl"))
    ping = session.charge("Stop", 22, *turn(20, 16), transcript_path=nowhere)
    assert size_of(ping) == 16
    ping = session.charge(END, 30, ledger({OPUS: 31}))
    assert (size_of(ping), ping["cost_usd"]) == (0, cost_of({OPUS: 31}))


INODES = """
def huge(real):
    def wrapped(*args, **kwargs):
        found = real(*args, **kwargs)
        return os.stat_result((found[0], found[1] + (1 << 64) - (1 << 40), *found[2:]))
    return wrapped
os.stat, os.fstat, os.lstat = huge(os.stat), huge(os.fstat), huge(os.lstat)
"""


@pytest.mark.fault(73)
def test_inode_numbers_beyond_20_digits(session: Session) -> None:
    """A file system that numbers its files so high does not make them look replaced."""
    for i in range(2):
        session.add(*turn(10 * i, 1 + i))
        session.hook("Stop", 10 * i + 2)
        assert [size_of(ping) for ping in session.send(patch=INODES)] == [1 + i]


# -- What a ping tells beside its counts -----------------------------------------------

UNSPEAKABLE = ["a router's/model", "arn:aws:bedrock:us-east-1:123:x/us", "a model", ""]


@pytest.mark.fault(49)
@pytest.mark.parametrize("name", [*UNSPEAKABLE, None])
def test_tokens_of_unspeakable_models_count_as_other(
    session: Session, name: str | None
) -> None:
    """A model's name that is no identifier stays home; its tokens are under `other`,
    in the ledger too."""
    session.hook(START, -1)
    rows = [prompt(0), message(1, 1, model=name), message(2, 2)]
    first = session.charge("Stop", 3, *rows)
    assert first["models"] == {"other": used(1), OPUS: used(2)}
    last = session.charge(END, 10, ledger({name or "": 5, "a/b": 1, OPUS: 2}))
    assert (size_of(last), last["cost_usd"]) == (5, cost_of({OPUS: 2}))
    assert set(last["models"]) <= {"other", OPUS}


def test_tools_are_counted(session: Session) -> None:
    """Each call counts once, under its name when that is an identifier; a failure is a
    result that says so; agents' too. The 20 most used are named. `interrupts` are
    the main chain's since the last such ping."""
    tools = ["Bash", "Bash", "Read", "mcp__acme__look-up", "CANARY a name", "../x"]
    row = message(1, 1, "m", "tool_use", tools=tools)
    results = [result(2, f"toolu_m_{i}", error=i % 2 == 0) for i in range(6)]
    grep = message(2, 2, "g", tools=["Grep"])
    failed, rows = result(2, "toolu_g_0", True), [row, row, *results, results[0]]
    session.add(grep, failed, interrupted(2), to=session.agent())
    rows += [interrupted(2.1), prompt(2.2), interrupted(2.3), message(2.4, 1)]
    first = session.charge("Stop", 3, prompt(0), *rows)
    assert first["interrupts"] == 2
    assert (first["tool_calls"], first["tool_failures"]) == (7, 4)
    assert first["tools"] == {"Bash": 2, "Read": 1, "mcp__acme__look-up": 1, "Grep": 1}
    calls = {f"Tool{i:02d}": 1 + (i * 7) % 30 for i in range(30)}
    names = [name for name, n in calls.items() for _ in range(n)]
    second = session.charge("Stop", 12, prompt(10), message(11, 1, tools=names))
    most = sorted(calls, key=lambda name: calls[name])[-20:]
    assert second["tools"] == {name: calls[name] for name in most}
    assert (second["tool_calls"], "interrupts" in second) == (len(names), False)


@pytest.mark.fault(53)
def test_stop_tells_how_long_the_turn_took(session: Session) -> None:
    """`duration_ms` runs from the prompt's row to the Stop: not from a tool's result,
    nor from a row that the client put in; where another hook blocked a Stop once, from
    that. The continuation's rows are on the second Stop, however soon they come."""
    session.hook(START, -1)
    session.add(*turn(0, 1), prompt(10.5), message(11, 2, stop="tool_use"))
    session.add(result(15), prompt(16, isMeta=True), prompt(18, isCompactSummary=True))
    session.add(message(19, 4))
    session.add(prompt(19.5), to=session.agent())
    session.add(prompt(20.25, isMeta=True), message(20.5, 8), *turn(40, 16))
    session.hook("Stop", 1.25)
    session.hook("Stop", 20.125)
    session.hook("Stop", 24.125, stop_hook_active=True)
    session.hook("Stop", 42)
    session.hook(END, 50)
    found = session.send()[1:]
    assert [size_of(ping) for ping in found] == [1, 6, 8, 16, 0]
    durations = [ping.get("duration_ms") for ping in found]
    assert durations == [1250, 9625, 4000, 2000, None]


# -- What stays on the machine ---------------------------------------------------------

WORDS = "CANARY of a transcript, with words /and/paths"


def in_place_of(name: str, value: Any = WORDS) -> dict[str, Any]:
    """An assistant row whose message has something else where `name` should be."""
    row = message(1, 1, tools=["Bash"])
    row["message"][name] = value
    return row


HOSTILE = [
    message(1, 1, gitBranch=WORDS),
    message(1, 1, tools=[WORDS, "Bash"]),
    in_place_of("content", [{"type": "tool_use", "id": [WORDS], "name": {"a": WORDS}}]),
    in_place_of("content", [{"type": "tool_use", "id": WORDS}]),
    *[in_place_of(name) for name in ("id", "content", "model", "stop_reason", "usage")],
    in_place_of("usage", {WORDS: 1, "a": WORDS}),
    prompt(1, promptId=WORDS, gitBranch=WORDS, cwd=WORDS, version=WORDS),
    dict(result(1, WORDS, error=True), toolUseResult=WORDS),
    dict(message(1, 1, timestamp=WORDS), type=WORDS),
    message(1, 1, requestId=WORDS, uuid=WORDS, slug=WORDS, requestSessionId=WORDS),
    ledger({OPUS: 2, WORDS: 2}),
]


def test_no_text_of_a_transcript_is_sent_or_kept(session: Session) -> None:
    """Not where it belongs, and not where it stands in place of a name: in no ping and,
    at no time, in any file."""
    told: list[bytes] = []

    def look(request: Request) -> int:
        files = [path for path in session.home.state.rglob("*") if path.is_file()]
        told.extend([request.body, *[path.read_bytes() for path in files]])
        return 200

    session.receiver.answer = look
    session.add(*HOSTILE)
    session.add(*HOSTILE, to=session.agent())
    for event in (START, "Stop", END, "Stop"):
        session.charge(event, 20, TELEMHQ_GIT=1)
    assert len(told) > 8
    found = [raw.partition(b"CANARY")[::2] for raw in told]
    assert [(a[-60:], b[:60]) for a, b in found if b] == []
