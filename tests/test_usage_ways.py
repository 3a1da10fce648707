"""Usage, in every way of working: what a user may do to a session, exact all the same.

Sizes are those of test_usage. A session of `met` began after the script was installed,
one of `session` an hour before it.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import subprocess
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from support import SCRIPT, Home, Receiver, event, patched, run_sender, script_command
from test_usage import (
    DAY_S,
    HAIKU,
    MULTIPLES,
    NOTHING_READ,
    OPUS,
    USAGE_FIELDS,
    Opened,
    Session,
    hurried,
    iso,
    ledger,
    message,
    prompt,
    result,
    send,
    session,
    size_of,
    summed,
    turn,
    usage_of,
    used,
)

if TYPE_CHECKING:
    from typing import Callable

__all__ = ["session"]  # fixtures

# Makes the nth call (or each, for 0) of a function of os fail for one path.
FAILING = """
import errno
def failing(name, path, code, nth=1):
    real, calls = getattr(os, name), [0]
    def wrapped(*args, **kwargs):
        if args and args[0] == path:
            calls[0] += 1
            if calls[0] == nth or not nth:
                raise OSError(getattr(errno, code), os.strerror(1), path)
        return real(*args, **kwargs)
    setattr(os, name, wrapped)
"""


@pytest.fixture
def met(home: Home, receiver: Receiver) -> Session:
    """A session that began after the script was installed, still without rows."""
    return Session(home, receiver, time.time())


def send_patched(session: Session, patch: str) -> list[tuple[str, Any]]:
    """Like `session.send`, by a sender in whose process `patch` ran before."""
    url = session.receiver.url
    done = patched(session.home, FAILING + patch, "detached", "-1", url=url)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    return [(ping["event"], size_of(ping)) for ping in session.new()]


def told(session: Session) -> int:
    """The size that all the session's pings have charged."""
    return sum(size_of(ping) or 0 for ping in session.usage())


def complete(session: Session) -> list[bool]:
    """What each ping with usage says of its being complete."""
    return [ping.get("usage_complete", True) for ping in session.usage()]


def interrupted(at: float, **changes: object) -> dict[str, Any]:
    """The row that Esc leaves."""
    text = {"type": "text", "text": "[Request interrupted by user]"}
    row = prompt(
        at, message={"role": "user", "content": [text]}, uuid=str(uuid.uuid4())
    )
    return dict(row, interruptedMessageId=str(uuid.uuid4()), **changes)


def failed_call(at: float, n: int) -> list[dict[str, Any]]:
    """A message that calls a tool, which fails."""
    call, failed = (
        message(at, n, None, "tool_use", tools=["Bash"]),
        result(at + 0.5, True),
    )
    failed["message"]["content"][0]["tool_use_id"] = call["message"]["content"][0]["id"]
    return [call, failed]


# -- Once over all of a session's files (row 43) ---------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_copies_of_the_parents_rows_count_once(session: Session, at_once: bool) -> None:
    """Agents' files may begin with copies of their parent's rows, under the same ids:
    tokens, tool calls and failures count once over all of the session's files.
    """
    parent = [prompt(0), *failed_call(1, 1), message(3, 2, "msg_2", "tool_use")]
    parent += [message(3, 0, stop="tool_use") for _ in range(20)]  # no recent one
    session.add(*parent, message(8, 4, "msg_3"))
    session.hold("SessionStart", -1, source="startup")

    def fork() -> None:
        for name in ("a1", "b1"):
            session.add(*parent, to=session.agent(name))
            session.add(prompt(4), to=session.agent(name))
        session.add(message(5, 8, "msg_4"), to=session.agent("a1"))
        session.add(message(5, 8, "msg_4"), message(6, 16), to=session.agent("b1"))

    if at_once:
        fork()
    session.hold("Stop", 9, then=() if at_once else fork)
    session.hold("SubagentStop", 10)
    session.send()
    pings = session.usage()
    assert [size_of(ping) for ping in pings] == ([31, 0] if at_once else [7, 24])
    assert summed(pings, "tool_calls", "tool_failures") == {
        "tool_calls": 1,
        "tool_failures": 1,
    }


def test_a_copy_that_is_more_complete_than_its_original(session: Session) -> None:
    """The row with the most output counts, whichever of the files holds it."""
    partial = dict(usage_of(1), output_tokens=1)
    session.add(prompt(0), message(1, 0, "msg_1", "tool_use", usage=partial))
    session.add(message(1, 1, "msg_1", "tool_use"), message(2, 2), to=session.agent())
    session.hold("Stop", 3)
    send(session.home, session.receiver.url)
    assert summed(session.usage(), *MULTIPLES) == used(3)


def test_copies_of_history_are_history(session: Session) -> None:
    """A copy of a row that is never billed is not billed either, even if it is younger
    than its original.
    """
    session.add(*turn(0, 1), message(1, 2, "msg_old"), *turn(10, 4))
    session.add(message(11, 2, "msg_old"), message(11, 8), to=session.agent())
    session.hold("Stop", 12)
    assert session.send() == [("Stop", 12)]


# -- A long session (row 44) -----------------------------------------------------------


def test_64000_messages_of_250_agents(session: Session) -> None:
    """A session of 64,000 messages of 250 agents is exact, its account small, and what
    comes later is charged as fast as ever.
    """
    session.add(prompt(0))
    session.hold("SessionStart", -1, source="startup")
    text = json.dumps(dict(message(1, 1, "msg_KEY", "tool_use"), sessionId=session.id))
    text = text.replace('"timestamp": 1', f'"timestamp": "{iso(session.begun + 1)}"')
    text = text.replace('": ', '":') + "\n"
    for agent in range(250):
        path = session.agent(f"{agent:03d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [text.replace("msg_KEY", f"msg_{agent}_{i}") for i in range(256)]
        path.write_text("".join(rows))
    for at in (2, 2.1, 2.2):  # a busy machine does not read it all for the first one
        session.hold("Stop", at)
    session.send()
    assert told(session) == 64000
    (account,) = session.accounts()
    assert account.stat().st_size < 3 << 20
    copied = session.agent("007").read_bytes() + session.agent("249").read_bytes()
    session.add(copied, message(3, 1), to=session.agent("copies"))
    session.hold("Stop", 4)
    begun = time.monotonic()
    assert session.send() == [("Stop", 1)]
    assert time.monotonic() - begun < 15  # on a busy machine; alone some 0.5 s


# -- An account that cannot be read (row 45) -------------------------------------------


@pytest.mark.parametrize("code", ["EIO", "EACCES", "EMFILE"])
def test_unreadable_account_is_never_replaced(met: Session, code: str) -> None:
    """One I/O error while the account is read: that ping goes without usage and says
    so; the next one has it all, and nothing is billed twice.
    """
    met.add(*turn(0, 1))
    met.hold("Stop", 2)
    met.send()
    met.add(*turn(10, 2))
    met.hold("Stop", 12)
    (path,) = met.accounts()
    before = path.read_bytes()
    assert send_patched(met, f"failing('open', {str(path)!r}, {code!r})") == [
        ("Stop", None)
    ]
    last = met.usage()[-1]
    assert {name: last[name] for name in USAGE_FIELDS & set(last)} == NOTHING_READ
    assert path.read_bytes() == before
    met.add(*turn(20, 4), ledger({OPUS: 7}, 0.5))
    met.hold("SessionEnd", 30)
    assert met.send() == [("SessionEnd", 6)]
    assert met.usage()[-1]["cost_usd"] == 0.5


def damages() -> dict[str, Callable[[bytes], bytes]]:
    """What may become of a file, by name."""
    return {
        "empty": lambda _: b"",
        "binary": lambda raw: bytes(255 - byte for byte in raw),
        "cut off": lambda raw: raw[: len(raw) // 2],
        "NULs": lambda raw: b"\0" * len(raw),
        "an empty object": lambda _: b"{}",
        "a version only": lambda _: b'{"version":2}',
        "a list": lambda _: b"[]",
        "of tomorrow": lambda raw: raw.replace(b'"version":2', b'"version":3'),
        "another type": lambda raw: raw.replace(b'"transcripts":{', b'"x":{', 1),
        "texts for numbers": lambda raw: raw.replace(b'"cost":0', b'"cost":"0"'),
        "17 MB": lambda raw: raw[:-1] + b" " * (17 << 20) + b"}",
    }


@pytest.mark.parametrize("name", damages())
def test_damaged_account_opens_at_the_present_ends(met: Session, name: str) -> None:
    """Nobody knows what was charged: what is in the files is not charged again, nor are
    copies of it later; what comes is, without the ledger's difference.
    """
    rows = [*turn(0, 1), message(2, 2, "msg_a")]
    met.add(*rows)
    met.add(message(1, 4, "msg_b"), to=met.agent())
    met.hold("Stop", 3)
    assert met.send() == [("Stop", 7)]
    (path,) = met.accounts()
    path.write_bytes(damages()[name](path.read_bytes()))
    met.add(*turn(10, 8))
    met.hold("PostToolUse", 11)
    met.hold("Stop", 12, then=[*turn(20, 16), ledger({OPUS: 99}, 9.0)])
    met.send()
    met.add(*rows, message(21, 32), to=met.agent("copies"))
    met.hold("SessionEnd", 30)
    met.send()
    pings = met.usage()
    assert [size_of(ping) for ping in pings] == [7, 0, 48]
    assert pings[1]["usage_complete"] is False
    assert "cost_usd" not in pings[2]


def test_damaged_account_is_told_where_nothing_is_awaited(met: Session) -> None:
    """Behind a StopFailure no row is to come; that counts are missing is told."""
    met.add(*turn(0, 1))
    met.hold("Stop", 2)
    met.send()
    (path,) = met.accounts()
    path.write_bytes(b"{")
    met.add(*turn(10, 2))
    met.hold("StopFailure", 12)
    assert met.send() == [("StopFailure", 0)]
    met.add(*turn(20, 4))
    met.hold("StopFailure", 22)
    assert met.send() == [("StopFailure", 4)]
    assert [ping.get("usage_complete") for ping in met.usage()] == [None, False, None]


def test_damaged_account_waits_for_its_transcript(met: Session) -> None:
    """Where the present ends cannot be known, nothing is opened: not at the start."""
    met.add(*turn(0, 1))
    met.hold("Stop", 2)
    met.send()
    (path,) = met.accounts()
    path.write_bytes(b"{")
    met.path.rename(met.path.with_suffix(".away"))
    met.hold("Stop", 3)
    assert met.send() == [("Stop", None)]
    met.path.with_suffix(".away").rename(met.path)
    met.add(*turn(10, 2))
    met.hold("Stop", 12, then=turn(20, 4))
    met.hold("Stop", 22)
    assert met.send() == [("Stop", 0), ("Stop", 4)]


def account_of_1_0(session: Session, **changes: object) -> dict[str, Any]:
    """An account as version 1.0.0 wrote it, after one turn of size 1."""
    counts = {
        "input_tokens": 1,
        "output_tokens": 3,
        "cached_input_tokens": 5,
        "cache_creation_input_tokens": 7,
        "reasoning_tokens": 2,
    }
    found = session.path.stat()
    files = {"": [found.st_ino, found.st_size, {"msg_z": counts}, {}]}
    return dict(
        {
            "since": 0,
            "first": "SessionStart",
            "prompt_by": 0,
            "whole": True,
            "ended": False,
            "last_at": session.begun + 2,
            "transcript": str(session.path),
            "files": files,
            "owed": [],
            "model": OPUS,
            "branch": "",
            "prompts": [session.begun],
            "reported": {OPUS: counts},
            "charged": {},
            "ledger": {},
            "cost": 0,
            "models": {},
            "tools": {},
            "tool_calls": 0,
            "tool_failures": 0,
            "final": [],
            "identity": {"project": "api", "session_id": session.id, "machine": "mini"},
            "git": False,
        },
        **changes,
    )


def put_account(session: Session, account: dict[str, Any]) -> None:
    """Write a session's account."""
    session.hold("Notification", 0)
    session.send()
    (path,) = session.accounts()
    path.write_text(json.dumps(account))


@pytest.mark.parametrize("inode", [True, False])
def test_account_of_version_1_0_is_read_on(met: Session, inode: bool) -> None:
    """A session that goes on over an update is charged where it was; what version 1.0.0
    had counted and forgotten is known again, so that no copy of it counts.
    """
    met.add(*turn(0, 1, key="msg_a"))
    account = account_of_1_0(met)
    if not inode:  # beyond 10^19 it could not read it again
        account["files"][""][0] = None
    put_account(met, account)
    met.add(message(1, 1, "msg_a"), message(1, 2, "msg_b"), to=met.agent())
    met.add(*turn(10, 4))
    met.hold("Stop", 12, then=[ledger({OPUS: 7, HAIKU: 8}, 0.5)])
    met.hold("SessionEnd", 20)
    assert met.send() == [("Stop", 6), ("SessionEnd", 8)]
    assert met.usage()[-1]["cost_usd"] == 0.5


# -- Transcripts that move (row 46) ----------------------------------------------------


MOVES: dict[str, Callable[[str, str], object]] = {
    "renamed": os.rename,
    "copied": shutil.copytree,
}


@pytest.mark.parametrize("how", MOVES)
def test_each_events_transcript_path_holds_from_then_on(met: Session, how: str) -> None:
    """A project's directory that moves takes its transcripts along: all is charged,
    agents' too, where an event says that they are; nothing twice where they are copies.
    """
    met.add(prompt(0), *failed_call(0.5, 1), message(1.5, 0))
    met.add(message(1, 2), to=met.agent())
    met.hold("Stop", 3)
    met.send()
    met.add(*turn(10, 4))
    moved = met.path.parent.with_name("-moved")
    MOVES[how](str(met.path.parent), str(moved))
    met.path = moved / met.path.name
    met.add(*turn(20, 8), interrupted(22))
    met.hold("PostToolUse", 21)
    met.send()
    met.add(message(22, 16), to=met.agent())
    met.add(message(22, 32), to=met.agent("a2"))
    met.hold("Stop", 23)
    met.add(*turn(30, 64), ledger({OPUS: 127}, 0.5))
    met.hold("SessionEnd", 40)
    assert met.send() == [("Stop", 60), ("SessionEnd", 64)]
    counted = summed(met.usage(), "tool_calls", "tool_failures", "interrupts")
    assert counted == {"tool_calls": 1, "tool_failures": 1, "interrupts": 1}
    assert met.usage()[-1]["cost_usd"] == 0.5


def test_lost_session_is_looked_for_where_it_moved_to(session: Session) -> None:
    """The sweep reads the transcript where the last event said that it is."""
    session.hold("SessionStart", -1, source="startup")
    moved = session.path.with_name("moved.jsonl")
    session.path = moved
    session.hold("PreToolUse", 1)
    session.send()
    session.add(*turn(0, 1))
    session.later_by(DAY_S + 60)
    assert session.send() == [("SessionLost", 1)]


# -- Transcripts that cannot be opened (row 47) ----------------------------------------


@pytest.mark.parametrize("code", ["EIO", "EMFILE", "EACCES", "ENOENT"])
@pytest.mark.parametrize("name", ["Stop", "SessionEnd"])
def test_failed_open_is_tried_again(session: Session, name: str, code: str) -> None:
    """A transcript that cannot be opened once is opened again before anything is
    charged, however old the event is.
    """
    session.add(*turn(0, 1))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 2)
    session.send()
    session.add(*turn(10, 2), ledger({OPUS: 3}, 0.5))
    session.hold(name, 12)
    patch = f"failing('open', {str(session.path)!r}, {code!r})"
    assert send_patched(session, patch) == [(name, 2)]
    assert complete(session) == [True, True]


@pytest.mark.parametrize("what", ["session", "agent"])
def test_what_cannot_be_read_is_never_charged_as_zero(
    session: Session, what: str
) -> None:
    """Where every open fails, the ping says so; the tokens are in the session's next
    ping, or, after its end, in a SessionLost.
    """
    old_client: dict[str, Any] = {"version": "2.1.113"}  # no ledger settles it
    session.add(*turn(0, 1, **old_client))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 2)
    session.send()
    session.add(*turn(10, 2, **old_client))
    session.add(message(11, 4), to=session.agent())
    path = session.path if what == "session" else session.agent()
    for name in ("Stop", "SessionEnd"):
        session.hold(name, 12)
        found = send_patched(session, f"failing('open', {str(path)!r}, 'EIO', 0)")
        assert found in ([(name, None)], [(name, 2 if name == "Stop" else 0)])
    assert complete(session) == [True, False, False]
    session.later_by(DAY_S + 60)
    assert session.send() == [("SessionLost", 6 if what == "session" else 4)]


def test_ledger_has_what_cannot_be_read(met: Session) -> None:
    """Where the ledger has had the last word, what could not be read is not charged
    again when it can.
    """
    met.add(*turn(0, 1), ledger({OPUS: 3}, 0.5))
    met.add(message(1, 2), to=met.agent())
    met.hold("SessionEnd", 2)
    patch = f"failing('open', {str(met.agent())!r}, 'EIO', 0)"
    assert send_patched(met, patch) == [("SessionEnd", 3)]
    assert complete(met) == [True]
    met.add(*turn(10, 4), ledger({OPUS: 7}, 1.0))
    met.hold("SessionEnd", 12)
    assert met.send() == [("SessionEnd", 4)]


# -- A new URL in mid-session (row 48) -------------------------------------------------


def adopt(home: Home, url: str) -> None:
    """Run `flush --adopt`."""
    done = subprocess.run(
        script_command("flush", "--adopt"),
        env=home.env(url),
        cwd=str(home.project),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def to_url(session: Session, receiver: Receiver) -> None:
    """From now on the session's hooks name another tracker."""
    other = Session(session.home, receiver)
    session.base, session.receiver, session.taken = other.base, receiver, 0
    session.later = other.later
    receiver.answer = session.answer


@pytest.mark.parametrize("installed_before", [True, False])
@pytest.mark.parametrize("order", ["adopted at once", "after a turn", "after the end"])
@pytest.mark.parametrize("former", ["well", "away", "not yet tried"])
def test_adopted_session_is_exact(
    home: Home, receiver: Receiver, installed_before: bool, order: str, former: str
) -> None:
    """A session that goes on under a new URL: what both trackers were told together is
    what was used, whether the former one was away or not, whenever it was adopted.
    """
    begun = time.time() - (0 if installed_before else 3600)
    session = Session(home, receiver, begun)
    session.add(*turn(0, 1))
    session.hold("Stop", 2)
    session.send()
    if former == "away":
        receiver.answer = 503
    session.add(*turn(10, 2), *turn(20, 4))
    session.hold("Stop", 12)
    session.hold("Stop", 22)
    if former == "well":
        session.send()
    elif former == "away":
        run_sender(home, receiver.url)
    before = {ping["event_id"]: ping for ping in session.usage()}
    with Receiver() as second:
        to_url(session, second)
        if order == "adopted at once":
            adopt(home, second.url)
        session.add(*turn(30, 8))
        session.hold("Stop", 32)
        session.send()
        if order == "after a turn":
            adopt(home, second.url)
        session.add(*turn(40, 16), ledger({OPUS: 31}, 0.5))
        session.hold("SessionEnd", 50)
        session.send()
        if order == "after the end":
            adopt(home, second.url)
        after = {ping["event_id"]: ping for ping in session.usage()}
    delivered = [*after.values()]
    delivered = list(before.values())[: None if former == "well" else 1] + delivered
    assert sum(size_of(ping) or 0 for ping in delivered) == 31
    assert len(list(home.state.glob("*/accounts/*.json"))) == 1
    if order != "after the end":
        assert [p["cost_usd"] for p in delivered if "cost_usd" in p] == [0.5]


def test_adopting_twice_merges_once(session: Session) -> None:
    """A `flush --adopt` that was killed before it removed the former account adds
    nothing when it is repeated.
    """
    session.add(*turn(0, 1))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 2)
    session.send()
    (former,) = session.accounts()
    with Receiver() as second:
        to_url(session, second)
        session.add(*turn(10, 2))
        session.hold("Stop", 12)
        session.send()
        raw = former.read_bytes()
        adopt(session.home, second.url)
        former.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        former.write_bytes(raw)
        adopt(session.home, second.url)
        session.add(*turn(20, 4), ledger({OPUS: 7, HAIKU: 8}, 0.5))
        session.hold("SessionEnd", 30)
        session.send()
        assert size_of(session.usage()[-1]) == 12


# -- Model names (row 49) --------------------------------------------------------------


MODELS = {
    "router": "anthropic/claude-opus-4.5",
    "ARN": "arn:aws:bedrock:us-east-1:123:inference-profile/us.anthropic.claude",
    "spaces": "CANARY a model",
    "empty": "",
    "long": "x" * 200,
    "null": None,
    "list": ["CANARY"],
}


@pytest.mark.parametrize("case", MODELS)
def test_tokens_of_unspeakable_models_count_as_other(
    session: Session, case: str
) -> None:
    """A model's name that is no identifier stays home; its tokens are under `other`,
    in the ledger too.
    """
    row = message(1, 1)
    row["message"]["model"] = MODELS[case]
    session.add(prompt(0), row, message(2, 2))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 3)
    settled = MODELS[case] if isinstance(MODELS[case], str) else "x/y"
    session.add(ledger({str(settled): 5, "a/b": 1, OPUS: 2}, 0.5))
    session.hold("SessionEnd", 10)
    session.send()
    first, last = session.usage()
    assert first["models"] == {"other": used(1), OPUS: used(2)}
    assert last["models"] == {"other": used(5)}
    assert last["cost_usd"] == 0.5
    raw = b"".join(request.body for request in session.receiver.requests)
    assert b"CANARY" not in raw
    assert b"arn:" not in raw


# -- Which sessions are whole (rows 50, 51) --------------------------------------------


ENDINGS = {
    "Esc": [interrupted(1.5)],
    "a denied permission": [
        result(1.2, error=True),
        interrupted(1.5, message={"role": "user", "content": "[Request interrupted"}),
    ],
    "without a trace": [],
}


@pytest.mark.parametrize("case", ENDINGS)
def test_first_turn_that_ends_without_a_hook_is_charged(
    met: Session, case: str
) -> None:
    """Esc and a denied permission fire no hook: the next event has that turn's tokens,
    with no ping for it alone, and the session's cost is told.
    """
    first = message(1, 1, stop="tool_use", tools=["Bash"])
    met.add(prompt(0), first, *ENDINGS[case], *turn(10, 2))
    met.hold("Stop", 12, then=[ledger({OPUS: 3, HAIKU: 4}, 0.5)])
    met.hold("SessionEnd", 13)
    assert met.send() == [("Stop", 3), ("SessionEnd", 4)]
    assert met.usage()[-1]["cost_usd"] == 0.5
    assert complete(met) == [True, True]


def hold_switched_off(session: Session, name: str, at: float) -> None:
    """A ping as a hook with TELEMHQ_USAGE=0 leaves it."""
    event_id = session.hold(name, at)
    (path,) = session.home.state.glob(f"*/outbox/*{event_id}.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(dict(record, local={"usage": False})))


@pytest.mark.parametrize("met_before", [False, True])
def test_what_was_used_while_usage_was_off_is_never_billed(
    met: Session, met_before: bool
) -> None:
    """A session that ran for a while with TELEMHQ_USAGE=0 is billed from where that
    ended, also where it would be ours from its start; its cost is not told.
    """
    if met_before:
        met.hold("SessionStart", -1, source="startup")
    met.add(*turn(0, 1), *turn(10, 2))
    hold_switched_off(met, "Stop", 2)
    hold_switched_off(met, "Stop", 12)
    met.send()
    met.add(*turn(20, 4))
    met.hold("Stop", 22, then=[ledger({OPUS: 7}, 0.5)])
    met.hold("SessionEnd", 23)
    assert met.send() == [("Stop", 4), ("SessionEnd", 0)]
    assert "cost_usd" not in met.usage()[-1]


@pytest.mark.parametrize(
    "first", ["Stop", "StopFailure", "UserPromptSubmit", "SessionEnd"]
)
def test_session_is_whole_whatever_event_is_met_first(met: Session, first: str) -> None:
    """A session that began after the script was there is charged from its start."""
    met.add(*turn(0, 1), ledger({OPUS: 1}, 0.25), *turn(10, 2))
    met.hold(first, 12)
    met.add(*turn(20, 4), ledger({OPUS: 7}, 0.5))
    met.hold("SessionEnd", 30)
    met.send()
    assert told(met) == 7
    assert summed(met.usage(), "cost_usd") == {"cost_usd": 0.5}


def test_session_older_than_a_day_is_not_billed_from_its_start(met: Session) -> None:
    """A session that goes on after more than a day without an account (dropped, or a
    period switched off, or begun on another machine) has a history.
    """
    met.add(*turn(0, 1), *turn(DAY_S + 60, 2))
    met.hold("Stop", DAY_S + 62)
    met.add(ledger({OPUS: 3}, 0.5))
    met.hold("SessionEnd", DAY_S + 70)
    met.send()
    assert told(met) == 2
    assert summed(met.usage(), "cost_usd") == {"cost_usd": 0}


@pytest.mark.alone  # it touches the script that all tests run
def test_session_that_began_when_the_destination_was_there(session: Session) -> None:
    """An update gives the script a new time: the destination's first use counts."""
    Session(session.home, session.receiver).hold("Notification", 0)
    session.send()
    later = Session(session.home, session.receiver, time.time())
    installed_later = time.time() + 0.05
    while time.time() < installed_later:
        time.sleep(0.01)
    found = SCRIPT.stat()
    os.utime(SCRIPT, ns=(found.st_atime_ns, found.st_mtime_ns))
    later.add(*turn(0, 1), *turn(10, 2))
    later.hold("Stop", 12)
    assert later.send() == [("Stop", 3)]


def test_session_that_another_url_was_told_of_is_not_whole(met: Session) -> None:
    """What a former URL of the same tracker was told is history for the present one."""
    met.add(*turn(0, 1))
    met.hold("Stop", 2)
    met.send()
    with Receiver() as second:
        to_url(met, second)
        met.add(*turn(10, 2))
        met.hold("Stop", 12)
        assert met.send() == [("Stop", 2)]


def unnamed(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows as clients before 2.1.78 wrote them."""
    return [{k: v for k, v in row.items() if k != "promptId"} for row in rows]


@pytest.mark.parametrize("first", ["Stop", "SessionEnd", "PostToolUse"])
@pytest.mark.parametrize("installed_before", [True, False])
def test_client_that_marks_no_prompts_is_billed_from_the_event(
    home: Home, receiver: Receiver, first: str, installed_before: bool
) -> None:
    """Where no prompt can be recognised, nothing older than the first event is billed:
    such a client's resumed session has the earlier one's rows.
    """
    begun = time.time() - (0 if installed_before else 3600)
    session = Session(home, receiver, begun)
    session.add(*unnamed(*turn(0, 1), *turn(10, 2)))
    session.hold(first, 12)
    session.add(*unnamed(*turn(20, 4)))
    session.hold("Stop", 22)
    session.send()
    assert told(session) == 4
    if first != "PostToolUse":
        assert complete(session) == [False, True]


@pytest.mark.parametrize("source", ["startup", "clear"])
def test_client_that_marks_no_prompts_is_billed_whole_from_its_startup(
    session: Session, source: str
) -> None:
    """A session met when it began has no history, whatever the client marks."""
    session.hold("SessionStart", -1, source=source)
    session.add(*unnamed(*turn(0, 1)))
    session.hold("Stop", 2)
    assert session.send() == [("SessionStart", None), ("Stop", 1)]


@pytest.mark.parametrize("version", ["2.1.113", "2.1.329", None])
def test_hook_installed_between_two_runs(session: Session, version: str | None) -> None:
    """What was before the hook was there is never billed, told by SessionEnd alone, by
    clients with a ledger and without.
    """
    mark = {"version": version} if version else {}
    end = [] if version == "2.1.113" else [ledger({OPUS: 1}, 0.25)]
    first, second = [dict(row, **mark) for row in turn(0, 1)], turn(100, 2)
    session.add(*first, *end, *[dict(row, **mark) for row in second], *end)
    session.hold("SessionEnd", 102)
    assert session.send() == [("SessionEnd", 2)]
    assert "cost_usd" not in session.usage()[-1]


# -- The sweep follows today's settings (row 52) ---------------------------------------


def lose(session: Session, **env: object) -> None:
    """A session that a real hook met, and that then was killed."""
    session.hook("SessionStart-startup", env=env)
    session.receiver.wait_for(1)
    session.home.quiet()
    session.add(*turn(0, 1, tools=["mcp__acme__drop"]))
    session.later_by(DAY_S + 60)


def test_sweep_opens_nothing_with_usage_off(met: Session) -> None:
    """TELEMHQ_USAGE=0 holds for sessions that were met before, too."""
    lose(met)
    opened = Opened(met.path.parent)
    assert met.send(TELEMHQ_USAGE=0) == [("SessionStart", None)]
    assert opened.names() == []
    opened.close()
    met.later_by(DAY_S + 60)
    assert met.send() == [("SessionLost", 1)]


HASHES = ("cwd_hash", "transcript_path_hash")


@pytest.mark.parametrize("before", ["", "old", "new"])
def test_sweep_follows_todays_settings(met: Session, before: str) -> None:
    """What a SessionLost tells is shaped as today's hooks would: no machine that is
    unset now, no hash under another key than today's.
    """
    old = {"TELEMHQ_HASH_KEY": before} if before else {}
    lose(met, TELEMHQ_MACHINE="mini", **old)
    other = Session(met.home, met.receiver, time.time())
    other.path = met.path  # the same paths under today's key
    today = {"TELEMHQ_HASH_KEY": "new", "TELEMHQ_TOOL_NAMES": 0}
    met.send(**today)
    hurried(other, "Stop", env=dict(today, TELEMHQ_USAGE=0))
    lost, wanted = met.usage()[-1], other.usage()[-1]
    assert lost["event"] == "SessionLost"
    assert lost["tools"] == {"mcp": 1}
    assert "machine" not in lost
    assert lost["transcript_path_hash"] == wanted["transcript_path_hash"]
    assert lost.get("cwd_hash") == (wanted["cwd_hash"] if before == "new" else None)


# -- A Stop that another hook blocks (row 53) ------------------------------------------


def test_stop_that_another_hook_blocks(session: Session) -> None:
    """The continuation's messages are the second Stop's, however soon they come, and
    its duration runs from the first.
    """
    session.add(prompt(0), message(1, 1))
    feedback = prompt(2.02, isMeta=True)
    session.add(feedback, message(2.5, 2, stop="tool_use"), message(6, 4))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 2)
    session.hold("Stop", 6.5, stop_hook_active=True)
    session.add(*turn(10, 8))
    session.hold("Stop", 12)
    session.send()
    pings = session.usage()
    assert [size_of(ping) for ping in pings] == [1, 6, 8]
    assert [ping["duration_ms"] for ping in pings] == [2000, 4500, 2000]
    assert complete(session) == [True, True, True]


def test_row_stamped_with_its_event_is_its_own(session: Session) -> None:
    """A row of the very millisecond of the Stop belongs to it."""
    session.add(prompt(0), message(2, 1), message(2.005, 2))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 2)
    session.hold("Stop", 3)
    assert session.send()[1:] == [("Stop", 1), ("Stop", 2)]


# -- usage_complete: false exactly when counts are missing -----------------------------


AGENT_TURNS = {  # rows of the session's own file, of the agent's, of the event
    "only an agent": ([prompt(0)], [message(0, 1)], {}),
    "the prompt's row comes later": ([], [prompt(0, promptId="p"), message(0, 1)], "p"),
}


@pytest.mark.parametrize("registered", ["Stop", "SubagentStop, too"])
@pytest.mark.parametrize("case", AGENT_TURNS)
def test_turn_in_which_only_an_agent_worked_is_complete(
    met: Session, case: str, registered: str
) -> None:
    """A skill with `context: fork`, a turn of an agent alone: no row of the main chain
    is waited for, whether the agent's end was told before or not.
    """
    rows, of_agent, prompt_id = AGENT_TURNS[case]
    met.add(*turn(-9, 2))
    met.hold("SessionStart", -10, source="startup")
    met.hold("Stop", -8)
    met.send()
    met.add(*rows)
    met.add(*of_agent, to=met.agent())
    fields = {"prompt_id": prompt_id} if prompt_id else {}
    pings = []
    if registered != "Stop":
        agent = str(met.agent())
        pings.append(hurried(met, "SubagentStop", agent_transcript_path=agent))
    pings.append(hurried(met, "Stop", **fields))
    assert sum(size_of(ping) for ping, _ in pings) == 1
    assert not any("usage_complete" in ping for ping, _ in pings)
    assert max(seconds for _, seconds in pings) < 1.7


def test_agent_of_an_earlier_turn_ends_no_turn(met: Session) -> None:
    """An agent that works on in the background and ends in a later turn does not end
    that: its last message is waited for.
    """
    met.add(prompt(-20), message(-19, 1, stop="tool_use"), message(-15, 2))
    met.add(prompt(-18, promptId="a"), message(-17, 4, stop=None), to=met.agent())
    met.hold("SessionStart", -30, source="startup")
    met.hold("Stop", -14)
    met.send()
    met.add(prompt(0))
    met.add(message(0, 8), to=met.agent())
    ping, seconds = hurried(met, "Stop")
    assert (size_of(ping), ping["usage_complete"]) == (8, False)
    assert seconds > 1.9


def test_agents_end_that_was_charged_is_complete(met: Session) -> None:
    """An agent's last message that rode on an earlier ping is not missing."""
    met.add(prompt(-1), message(-0.9, 1, stop="tool_use"), message(-0.5, 2))
    met.add(prompt(-0.8), message(-0.4, 4), to=met.agent())
    met.hold("SessionStart", -2, source="startup")
    met.hold("Stop", -0.45)
    met.send()
    agent = str(met.agent())
    ping, seconds = hurried(met, "SubagentStop", agent_transcript_path=agent)
    assert (size_of(ping), "usage_complete" in ping) == (0, False)
    assert seconds < 1.7


@pytest.mark.parametrize("name", ["Stop", "StopFailure", "SubagentStop", "SessionEnd"])
def test_session_that_keeps_no_transcript_says_so(session: Session, name: str) -> None:
    """`--no-session-persistence`: every ping that would have usage says that it has
    none, at once.
    """
    session.hold("SessionStart", -1, source="startup")
    session.hold(name, 2)
    begun = time.monotonic()
    session.send()
    assert time.monotonic() - begun < 1.7
    (ping,) = session.usage()
    assert {name: ping[name] for name in USAGE_FIELDS & set(ping)} == NOTHING_READ


CLIENTS = {  # version, entry: whether such a client ends a session with a ledger
    ("2.1.113", "cli"): False,
    ("2.1.219", "sdk-cli"): False,
    ("2.1.252", "cli"): True,
    ("2.1.270", "cli"): True,
    ("2.1.270", "sdk-cli"): False,
    ("2.1.288", "sdk-cli"): True,
    ("2.1.330", "cli"): True,
    ("3.0.0", "sdk-py"): True,
    ("of tomorrow", "cli"): True,
    ("2.1.\u00b2", "cli"): True,  # a digit that int() does not take
}


@pytest.mark.parametrize("version, entry", CLIENTS)
def test_ledger_is_awaited_from_clients_that_write_one(
    met: Session, version: str, entry: str
) -> None:
    """Clients without cost-state: SessionEnd does not wait and says nothing; the others
    are waited for, and their missing ledger is told.
    """
    mark = {"version": version, "entrypoint": entry}
    met.add(*[dict(row, **mark) for row in turn(-1, 1)])
    ping, seconds = hurried(met, "SessionEnd-other")
    writes = CLIENTS[version, entry]
    assert (size_of(ping), ping.get("usage_complete", True)) == (1, not writes)
    assert seconds > 1.9 if writes else seconds < 1.7


def test_turn_that_was_cut_off_at_the_end_is_not_complete(met: Session) -> None:
    """Without a ledger, a session that ends in the middle of a turn says so."""
    mark = {"version": "2.1.113"}
    met.add(*[dict(row, **mark) for row in (prompt(-9), message(-8, 1, stop=None))])
    ping, _ = hurried(met, "SessionEnd-other")
    assert (size_of(ping), ping["usage_complete"]) == (1, False)


# -- Interrupts ------------------------------------------------------------------------


def test_interrupts_are_counted(session: Session) -> None:
    """`interrupts` is the number of the main chain's interrupts since the last such
    ping; such a row is no prompt.
    """
    session.add(prompt(0), message(1, 1, stop=None), interrupted(2), prompt(3))
    session.add(
        message(4, 2, stop="tool_use"), interrupted(5), prompt(6), message(7, 4)
    )
    session.add(interrupted(5), to=session.agent())
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 8)
    session.add(*turn(10, 8))
    session.hold("Stop", 12)
    session.add(prompt(20), interrupted(21))
    session.hold("SessionEnd", 22)
    session.send()
    pings = session.usage()
    assert [ping.get("interrupts", 0) for ping in pings] == [2, 0, 1]
    assert [ping.get("duration_ms") for ping in pings] == [2000, 2000, None]


# -- Numbers ---------------------------------------------------------------------------


INODES = """
def huge(real):
    def wrapped(*args, **kwargs):
        found = real(*args, **kwargs)
        return os.stat_result((found[0], found[1] + (1 << 64) - (1 << 40), *found[2:]))
    return wrapped
os.stat, os.fstat = huge(os.stat), huge(os.fstat)
"""


def test_inode_numbers_beyond_20_digits(session: Session) -> None:
    """A file system that numbers its files so high does not make them look replaced."""
    session.add(*turn(0, 1))
    session.hold("SessionStart", -1, source="startup")
    session.hold("Stop", 2)
    assert send_patched(session, INODES) == [("SessionStart", None), ("Stop", 1)]
    session.add(*turn(10, 2))
    session.hold("Stop", 12)
    assert send_patched(session, INODES) == [("Stop", 2)]


@pytest.mark.parametrize("chars", [5000, 70000])
def test_path_of_70_kb_goes_without_usage(met: Session, chars: int) -> None:
    """A path that nothing can open costs its ping the usage only."""
    path = "/" + "x/" * (chars // 2) + "y.jsonl"
    done = met.home.hook(
        event("Stop", session_id=met.id, transcript_path=path),
        met.receiver.url,
        TELEMHQ_FOREGROUND=1,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (ping,) = met.receiver.pings
    assert set(ping) & USAGE_FIELDS <= {"usage_complete"}
    assert not list(met.base.glob("refused/*"))


def test_long_path_in_the_outbox_goes_without_usage(met: Session) -> None:
    """Nor does one that a hook of another version put there."""
    met.path = pathlib.Path("/" + "x/" * 10000 + "y.jsonl")
    met.hold("Stop", 1)
    assert met.send() == [("Stop", None)]
    assert complete(met) == [False]


def test_random_ways(home: Home, receiver: Receiver) -> None:
    """Whatever happens in whatever order, each token is told once: moves, interrupts,
    agents that copy, blocked Stops, senders that cannot read.
    """
    chance = random.Random(20261121)
    for _ in range(3):
        session, at, n, used_all = Session(home, receiver, time.time()), 0.0, 0, 0
        rows: list[dict[str, Any]] = []
        for _ in range(10):
            at, n = at + 10, n + 1
            turn_rows = [prompt(at), message(at + 1, n, f"{session.id} {n}")]
            used_all += n
            kind = chance.choice(["plain", "esc", "copy", "move", "fail"])
            if kind == "esc":
                turn_rows.append(interrupted(at + 2))
            session.add(*turn_rows)
            rows += turn_rows
            if kind == "copy":
                session.add(*rows, to=session.agent(f"a{n}"))
                session.add(message(at + 2, 100), to=session.agent(f"a{n}"))
                used_all += 100
            if kind == "move":
                moved = session.path.parent.with_name(f"-{uuid.uuid4().hex}")
                chance.choice(list(MOVES.values()))(
                    str(session.path.parent), str(moved)
                )
                session.path = moved / session.path.name
            if kind != "esc":
                session.hold("Stop", at + 3)
            if kind == "fail":
                patch = f"failing('open', {str(session.path)!r}, 'EIO', 0)"
                send_patched(session, patch)
            else:
                session.send()
        session.add(ledger({OPUS: used_all}, 1.0))
        session.hold("SessionEnd", at + 10)
        session.send()
        assert told(session) == used_all
        assert summed(session.usage(), "cost_usd") == {"cost_usd": 1.0}
