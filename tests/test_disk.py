"""On disk: what is written where and with which permissions, what disables it, and what
may stand there instead."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import time
from typing import Any, Callable

import pytest

from scenes import NO_SENDER, ids, put
from support import (
    FIXTURES,
    Home,
    Receiver,
    Request,
    dead_url,
    event,
    hook_command,
    only_enqueue,
    patched,
    place,
    run_sender,
    wait_until,
)

SILENT = (0, b"", b"")


def outcome(done: subprocess.CompletedProcess[bytes]) -> tuple[int, bytes, bytes]:
    """What Claude Code sees of a hook: exit status, stdout, stderr."""
    return done.returncode, done.stdout, done.stderr


def mode(path: pathlib.Path) -> int:
    """A path's permission bits."""
    return stat.S_IMODE(path.lstat().st_mode)


# -- What is written -------------------------------------------------------------------


@pytest.mark.parametrize("usage", [True, False])
def test_a_ping_waits_in_a_file_of_its_own(home: Home, usage: bool) -> None:
    """Its name tells time, event, session and id; it holds the ping and what charging
    needs, of which the transcript's path is kept only where usage is on."""
    before, found = time.time_ns(), event("Stop")
    path = only_enqueue(home, dead_url(), found, TELEMHQ_USAGE=str(int(usage)))
    ns, kind, session, event_id = path.name[: -len(".json")].split("-")
    assert before <= int(ns) <= time.time_ns()
    assert (len(ns), kind) == (20, "Stop")
    assert session == hashlib.sha256(found["session_id"].encode()).hexdigest()[:16]
    record = json.loads(path.read_text("ascii"))
    assert record["ping"]["event_id"] == event_id
    assert (found["transcript_path"] in path.read_text()) == usage
    assert re.fullmatch("telemhq-[0-9a-f]{12}", home.destination().name)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "where",
    [{}, {"CLAUDE_CONFIG_DIR": "new/config"}, {"TELEMHQ_STATE_DIR": "new/deep/state"}],
    ids=lambda where: "".join(where) or "default",
)
@pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
def test_only_the_user_can_read_what_is_written(
    home: Home, receiver: Receiver, where: dict[str, str], umask: int
) -> None:
    """Directories 0700, parents too, files 0600, whatever the umask; in the foreground
    and in the background. Nothing else in HOME is touched."""
    receiver.answer = lambda r: 400 if receiver.requests[0] is r else 200
    before = set(home.path.rglob("*"))
    env: dict[str, Any] = {name: home.path / value for name, value in where.items()}
    state = next(iter(env.values()), home.path / ".claude")
    for foreground in ("0", "1"):
        env["TELEMHQ_FOREGROUND"] = foreground
        alone = f"os.umask({umask}); os.posix_spawn = lambda *_, **__: 0"
        only = {name: value for name, value in env.items() if name in where}
        patched(home, alone, url=receiver.url, sent=event("SubagentStop"), **only)
        line = f"umask {umask:03o}; {hook_command()[2]}"
        done = home.shell(line, event("Stop"), receiver.url, **env)
        assert outcome(done) == SILENT
        home.quiet()
    new = set(home.path.rglob("*")) - before
    names = {"outbox", "refused", "lock", "state.json", "sender.log", "sent.jsonl"}
    assert names <= {path.name for path in new}
    for path in new:
        assert oct(mode(path)) == oct(0o700 if path.is_dir() else 0o600), path
        assert path == state or state in path.parents or path in state.parents


# -- What disables it ------------------------------------------------------------------


def give_away(path: pathlib.Path) -> None:
    """Make it a directory that belongs to another user."""
    if os.geteuid():
        pytest.skip("only root can chown")
    path.mkdir(0o700)
    os.chown(path, 12345, 12345)


UNSOUND: dict[str, Callable[[pathlib.Path], object]] = {
    "file": pathlib.Path.touch,
    "link": lambda path: path.symlink_to("/tmp"),
    "dangling": lambda path: path.symlink_to("/nowhere"),
    "open": lambda path: subprocess.run(["mkdir", "-m", "770", path], check=True),
    "foreign": give_away,
}


@pytest.mark.fault(27)
@pytest.mark.parametrize("make", UNSOUND.values(), ids=UNSOUND)
@pytest.mark.parametrize("below", ["", "/*", "/*/outbox", "/*/refused", "/*/accounts"])
def test_what_another_could_control_disables_the_hook(
    home: Home, make: Callable[[pathlib.Path], object], below: str
) -> None:
    """From telemhq/ down: exit 0, silence, nothing written or sent; debug names it."""
    url = dead_url()
    only_enqueue(home, url)
    below = below.replace("*", home.destination().name)
    unsound = pathlib.Path(str(home.state) + below)
    shutil.rmtree(home.state)
    unsound.parent.mkdir(parents=True, exist_ok=True)
    for path in (unsound.parent, unsound.parent.parent):
        path.chmod(0o700)
    make(unsound)
    before = {path: mode(path) for path in home.path.rglob("*")}
    assert outcome(home.hook(event("Stop"), url)) == SILENT
    told = home.hook(event("Stop"), url, TELEMHQ_HOOK_DEBUG="1")
    assert (told.returncode, told.stdout) == (0, b"")
    assert str(unsound).encode() in told.stderr
    assert {path: mode(path) for path in home.path.rglob("*")} == before
    assert home.processes() == []


@pytest.mark.fault(27)
def test_a_claude_directory_may_be_a_link(home: Home, receiver: Receiver) -> None:
    """As people with dotfiles have it; and one that was there keeps its mode."""
    (home.path / "dotfiles").mkdir()
    (home.path / ".claude").symlink_to("dotfiles")
    (home.path / "dotfiles").chmod(0o755)
    home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND="1")
    assert len(receiver.pings) == 1
    assert mode(home.path / "dotfiles") == 0o755


# -- A disk that refuses ---------------------------------------------------------------


@pytest.mark.fault(26, 85)
@pytest.mark.parametrize("most_blocks", [0, 1])
def test_a_quota_leaves_no_partial_file(
    home: Home, receiver: Receiver, most_blocks: int
) -> None:
    """A write that fails in the middle: exit 0, silence, nothing left, nothing sent;
    debug mode names the place."""
    line = f"ulimit -f {most_blocks}; {hook_command()[2]}"  # of 512 bytes
    assert outcome(home.shell(line, event("Stop"), receiver.url)) == SILENT
    assert [path for path in home.state.rglob("*") if not path.is_dir()] == []
    told = home.shell(line, event("Stop"), receiver.url, TELEMHQ_HOOK_DEBUG="1")
    assert (told.returncode, told.stdout) == (0, b"")
    assert str(home.state).encode() in told.stderr
    assert (receiver.requests, home.processes()) == ([], [])


@pytest.mark.fault(26, 85)
@pytest.mark.parametrize("error", ["ENOSPC", "EROFS"])
def test_a_full_or_read_only_disk(home: Home, error: str) -> None:
    """No space, no inodes, read-only, from any step of a hook on: exit 0, silence; its
    ping is whole, or no file of it is there."""
    url, kept = dead_url(), set()
    for room in range(12):
        shutil.rmtree(home.state, ignore_errors=True)
        refuse = f"""
import errno
done = []
def refuse(*_):
    done.append(1)
    if len(done) > {room}:
        raise OSError(errno.{error}, "refused")
for name in ("mkdir", "open", "replace"):
    wrap(os, name, before=refuse)
"""
        run = patched(home, NO_SENDER + refuse, url=url, sent=event("Stop"))
        assert outcome(run) == SILENT
        files = {path for path in home.state.rglob("*") if path.is_file()}
        assert {path for path in files if path.name != "lock"} == {*home.waiting()}
        kept.add(len(home.waiting()))
    assert kept == {0, 1}


# -- Strange things in place of ours ---------------------------------------------------

STATES: dict[str, bytes] = {
    "truncated": b'{"failures": 3, "set_at": 17',
    "binary": bytes(range(256)) * 40,
    "a list": b"[1, 2, 3]",
    "NaN": b'{"failures": NaN, "set_at": NaN, "not_before": NaN}',
    "infinite": b'{"failures": 1e999, "set_at": -Infinity, "not_before": Infinity}',
    "a million failures": b'{"failures": 1000000}',
    "strings": b'{"failures": "9", "set_at": "now", "suspects": "z", "problem": "x"}',
    "wrong shapes": b'{"suspects": [1], "losses": 7, "set_at": {}, "not_before": null}',
    "wrong inside": b'{"suspects": {"a": "b", "c": [1]}, "losses": {"c": null}}',
    "endless inside": b'{"suspects": {"a": 1e999}, "losses": {"c": 1e999}}',
    "booleans": b'{"failures": true, "set_at": true, "not_before": true}',
    "from the future": b'{"failures": 2, "set_at": 9e12, "not_before": 9.1e12}',
    "for ever": b'{"failures": 2, "set_at": 0, "not_before": 9e15}',
    "huge": b'{"failures": 1' + b"0" * 5000 + b', "not_before": 1}',
    "deep": b'{"failures": ' + b"[" * 100000,
    "5 MB": b'{"failures": 1, "x": "' + b"y" * (5 << 20) + b'"}',
}
STRANGERS: dict[str, Callable[[pathlib.Path], object]] = {
    "directory": lambda path: (path / "file").mkdir(parents=True),
    "FIFO": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "full": lambda path: path.symlink_to("/dev/full"),
    "dangling": lambda path: path.symlink_to("/nowhere"),
    "link": lambda path: path.symlink_to(path.parents[3] / "precious"),
}


@pytest.mark.fault(24)
@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_a_damaged_state_is_as_none(
    home: Home, receiver: Receiver, content: bytes
) -> None:
    """Whatever state.json holds: the next hook's sender delivers, every value is sane,
    and the next back-off is 15 min at most."""
    place(home, receiver.url)
    path = home.destination() / "state.json"
    path.write_bytes(content)
    home.hook(event("Stop"), receiver.url)
    receiver.wait_for(2)
    home.quiet()
    state = home.state_json()
    assert (home.waiting(), state["failures"]) == ([], 0)
    assert abs(state["delivered_at"] - time.time()) < 60
    path.write_bytes(content)
    receiver.answer = 503
    place(home, receiver.url)
    run_sender(home, receiver.url)
    state = home.state_json()
    assert state["failures"] >= 1
    assert 2 <= state["not_before"] - state["set_at"] <= 900


@pytest.mark.fault(24, 65)
@pytest.mark.parametrize("name", ["lock", "state.json", "sender.log", "sent.jsonl"])
@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_file_blocks_nobody(
    home: Home, receiver: Receiver, name: str, make: Callable[[pathlib.Path], object]
) -> None:
    """Whatever stands in place of a file of ours, hook and sender go on, also where a
    pass fails; a link does not lead them elsewhere."""
    place(home, receiver.url, 2)
    path, precious = home.destination() / name, home.path / "precious"
    precious.write_text("mine")
    path.unlink(missing_ok=True)
    make(path)
    run_sender(home, receiver.url)
    assert len(receiver.requests) == 2
    receiver.answer = 503
    place(home, receiver.url)
    home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND="1")
    assert (len(receiver.requests), len(home.waiting())) == (4, 2)
    assert precious.read_text() == "mine"


CONTENT = (
    b"",
    b"\0" * 4096,
    b'{"ping": {"event_id": "0123',
    b"[1, 2]",
    b'{"ping": {}, "local": {}}',
    b"[" * 60000,
    b'{"ping": {"a": "%s"}}' % (b"x" * (1 << 20)),
    b'{"ping": {"total_tokens": NaN}}',
    b'{"ping": "\xff\xfe"}',
)


@pytest.mark.fault(25)
@pytest.mark.parametrize("named", ["as a ping", "the old way", "otherwise"])
def test_junk_in_the_outbox(home: Home, receiver: Receiver, named: str) -> None:
    """What is no ping blocks nothing, is not followed, not sent, and set aside; what is
    not named like one is left alone; one being written stays, unless its writer has
    been gone for an hour."""
    early = put(home, receiver.url, ["Stop"], time.time() - 9000)
    outbox, names = home.destination() / "outbox", []
    for number in range(len(CONTENT) + len(STRANGERS)):
        name = f"{time.time_ns() - 10**12 + number:020d}-{number:032x}.json"
        if named == "as a ping":
            name = name.replace("-", "-Stop-0123456789abcdef-")
        names.append(name if named != "otherwise" else f"junk-{number}")
    for name, content in zip(names, CONTENT):
        (outbox / name).write_bytes(content)
    for name, make in zip(names[len(CONTENT) :], STRANGERS.values()):
        make(outbox / name)
    late = put(home, receiver.url, ["Stop"])
    old, young = outbox / ".old.json.aaaa", outbox / ".young.json.bbbb"
    for path, age_s in ((old, 3700), (young, 3000)):
        path.write_text("{")
        os.utime(path, (time.time() - age_s,) * 2)
    run_sender(home, receiver.url)
    assert ids(receiver) == early + late
    left = names if named == "otherwise" else []
    assert {path.name for path in outbox.iterdir()} == {young.name, *left}
    lost = sum(home.state_json()["losses"].values())
    assert lost + len(left) == len(names)


def test_a_ping_file_holds_no_more_than_the_gate_lets_through(
    home: Home, receiver: Receiver
) -> None:
    """Fields that someone put into an outbox file do not leave with it, nor a ping to
    which a link leads."""
    place(home, receiver.url, 2)
    path, link = home.waiting()
    record = json.loads(path.read_text())
    record["ping"].update(prompt="CANARY", cwd="/home/dev", tool_input={"a": "CANARY"})
    record["ping"]["session_id"] = "CANARY with spaces"
    path.write_text(json.dumps(record))
    link.rename(home.path / "elsewhere")
    link.symlink_to(home.path / "elsewhere")
    run_sender(home, receiver.url)
    (request,) = receiver.requests
    assert b"CANARY" not in request.body
    assert b"/home/dev" not in request.body
    assert (home.path / "elsewhere").exists()
    assert not os.path.lexists(link)


def test_the_log_is_rotated(home: Home, receiver: Receiver) -> None:
    """sender.log does not grow without end: one old one beside it, no more."""
    put(home, receiver.url, ["Stop"])
    path = home.destination() / "sender.log"
    for _ in range(3):
        path.write_text(("x" * 79 + "\n") * 4000)
        for _ in range(2):
            put(home, receiver.url, ["Stop"])
            run_sender(home, receiver.url)
        assert path.stat().st_size < 1000
    logs = sorted(p.name for p in home.destination().glob("sender.log*"))
    assert logs == ["sender.log", "sender.log.1"]


# -- Secrets ---------------------------------------------------------------------------


@pytest.mark.fault(32)
@pytest.mark.parametrize("answer", [200, 302, 400, 503, None])
def test_neither_url_nor_content_is_on_disk_or_in_an_argument(
    home: Home, receiver: Receiver, answer: Any
) -> None:
    """The token, the URL and the events' content are in no file, no file's name, and no
    process's arguments, whatever the server says."""
    secret = f"SECRET{time.time_ns():032x}"
    lines: list[bytes] = []

    def echo(request: Request) -> Any:
        """A server that tells all it knows, in every place of its answer."""
        with contextlib.suppress(OSError):
            for pid in home.processes():
                lines.extend([pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()])
        body = request.path.encode() + request.body
        return answer, {"Location": request.path, "X-Token": secret}, body

    receiver.answer = echo
    url = (receiver.url if answer else dead_url()).rpartition("/")[0] + "/" + secret
    shutil.copytree(FIXTURES / "transcripts" / "tools", home.path / "t")
    (transcript,) = (home.path / "t").glob("*.jsonl")
    names = "SessionStart-startup UserPromptSubmit PostToolUse-Write Notification "
    names += "PostToolUseFailure-Read Stop StopFailure"
    for name in [*names.split(), "SessionEnd-other"]:
        found = event(name, title="CANARY_TITLE", new={"CANARY_NEW": "CANARY_NEW"})
        if answer == 200:
            found["transcript_path"] = str(transcript)
        assert outcome(home.hook(found, url)) == SILENT
    wait_until(lambda: list(home.state.glob("*/sender.log")))
    wait_until(lambda: answer != 200 or not home.waiting())
    home.end()
    assert len(lines) > 0 or not answer or not os.path.isdir("/proc/self")
    files = [path for path in home.state.rglob("*") if path.is_file()]
    lines += [os.fsencode(path) + path.read_bytes() for path in files]
    for needle in (secret, "CANARY", "/ping/", "Invalid API", "File does not exist"):
        assert needle.encode() not in b"\n".join(lines), needle
