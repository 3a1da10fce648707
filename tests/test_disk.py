"""On disk: what is written where and with which permissions, and what disables it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from types import ModuleType
from typing import Any, Callable, Iterator

import pytest

from support import (
    FIXTURES,
    SCRIPT,
    TOKEN,
    Home,
    Receiver,
    Request,
    dead_url,
    event,
    hook_command,
    only_enqueue,
    patched,
    wait_until,
)

resource = pytest.importorskip("resource", reason="limits of POSIX")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")

SILENT = (0, b"", b"")
LINUX = sys.platform.startswith("linux")


def outcome(done: subprocess.CompletedProcess[bytes]) -> tuple[int, bytes, bytes]:
    """What Claude Code sees of a hook: exit status, stdout, stderr."""
    return done.returncode, done.stdout, done.stderr


def mode(path: pathlib.Path) -> int:
    """A path's permission bits."""
    return stat.S_IMODE(os.lstat(str(path)).st_mode)


@pytest.fixture(scope="module")
def shared() -> Iterator[Receiver]:
    """One receiver for the whole module: its URL's directory has one name."""
    with Receiver() as found:
        yield found


@pytest.fixture(scope="module")
def directory_name(shared: Receiver, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of that destination's directory, as a hook made it."""
    home = Home(tmp_path_factory.mktemp("name") / "home")
    home.hook(event("Stop"), shared.url, TELEMHQ_FOREGROUND="1")
    return home.destination().name


@pytest.fixture
def base(home: Home, shared: Receiver, directory_name: str) -> pathlib.Path:
    """The destination's directory, made by hand before any hook, with its outbox."""
    del shared.requests[:]
    found = home.state / directory_name
    (found / "outbox").mkdir(parents=True)
    for path in (home.path / ".claude", home.state, found, found / "outbox"):
        path.chmod(0o700)
    return found


# -- Layout ----------------------------------------------------------------------------


def test_a_ping_waits_in_a_file_of_its_own(home: Home) -> None:
    """outbox/<time_ns>-<event_id>.json holds the ping and what the sender needs."""
    before = time.time_ns()
    found = event("Stop")
    assert outcome(home.hook(found, dead_url())) == SILENT
    (path,) = home.waiting()
    parts = re.fullmatch(r"(\d{20})-([0-9a-f]+)\.json", path.name)
    assert parts
    ns, event_id = parts.groups()
    assert before <= int(ns) <= time.time_ns()
    record = json.loads(path.read_text("ascii"))
    assert set(record) == {"ping", "local"}
    assert record["ping"]["event_id"] == event_id
    assert record["local"]["transcript"] == found["transcript_path"]


def test_without_usage_the_transcripts_path_is_not_kept(home: Home) -> None:
    """The transcript's path is on disk only where usage is on for that ping."""
    home.hook(event("Stop"), dead_url(), TELEMHQ_USAGE="0", TELEMHQ_FOREGROUND="1")
    (path,) = home.waiting()
    assert json.loads(path.read_text("ascii"))["local"] == {"usage": False}
    for path in home.state.rglob("*"):
        assert path.is_dir() or b"/home/dev/.claude" not in path.read_bytes()


def test_the_outbox_sorts_by_the_time_of_the_events(home: Home) -> None:
    """Oldest first by name: that is the order in which pings are delivered."""
    url, ids = dead_url(), []
    for _ in range(5):
        home.hook(event("Stop"), url)
        (new,) = [p.stem[21:] for p in home.waiting() if p.stem[21:] not in ids]
        ids.append(new)
    assert [path.stem[21:] for path in home.waiting()] == ids


def test_everything_written_is_below_the_state_directory(
    home: Home, receiver: Receiver
) -> None:
    """Neither the project nor anything else in HOME is touched."""
    before = set(home.path.rglob("*"))
    receiver.answer = lambda request: 400 if request.ping["event"] == "Stop" else 200
    for name in ("SessionStart-startup", "Stop"):
        only_enqueue(home, receiver.url, event(name))
    assert outcome(home.hook(event("SessionEnd-other"), receiver.url)) == SILENT
    receiver.wait_for(3)
    home.quiet()
    new = set(home.path.rglob("*")) - before - set(home.state.rglob("*"))
    assert new == {home.path / ".claude", home.state}


def test_each_url_has_a_directory_of_its_own_that_does_not_tell_it(home: Home) -> None:
    """A destination's directory is its kind and a short hash."""
    for url in (dead_url(), dead_url() + "x", "http://127.0.0.1:9/ping/" + TOKEN):
        home.hook(event("Stop"), url)
    names = sorted(path.name for path in home.state.iterdir())
    assert len(names) == 3
    for name in names:
        assert re.fullmatch("telemhq-[0-9a-f]{8,16}", name)
        assert len(list((home.state / name / "outbox").glob("[0-9]*.json"))) == 1


def test_what_is_delivered_is_gone_and_what_is_refused_is_set_aside(
    home: Home, receiver: Receiver
) -> None:
    """After a delivery no ping is left; one that is refused where another is accepted
    is in refused/."""
    receiver.answer = lambda request: 400 if request.ping["event"] == "Stop" else 200
    only_enqueue(home, receiver.url, event("Stop"))
    home.hook(event("StopFailure"), receiver.url)
    receiver.wait_for(2)
    home.quiet()
    base = home.destination()
    assert list((base / "outbox").iterdir()) == []
    (refused,) = (base / "refused").iterdir()
    assert json.loads(refused.read_text("ascii"))["ping"]["event"] == "Stop"


# -- Permissions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [{}, {"CLAUDE_CONFIG_DIR": "new/config"}, {"TELEMHQ_STATE_DIR": "new/deep/state"}],
    ids=lambda where: "".join(where) or "default",
)
@pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
def test_only_the_user_can_read_what_is_written(
    home: Home, receiver: Receiver, where: dict[str, str], umask: int
) -> None:
    """Directories 0700, parents too, files 0600, whatever the umask."""
    answers = {"Stop": 400, "StopFailure": 200, "SessionEnd": 500}
    receiver.answer = lambda request: answers[request.ping["event"]]
    before = set(home.path.rglob("*"))
    env: dict[str, Any] = {name: home.path / value for name, value in where.items()}
    alone = f"os.umask({umask}); os.posix_spawn = lambda *_, **__: 0"
    sent = event("Stop")
    assert outcome(patched(home, alone, url=receiver.url, sent=sent, **env)) == SILENT
    for name in ("StopFailure", "SessionEnd-other"):
        done = subprocess.run(
            hook_command(),
            input=json.dumps(event(name)).encode(),
            cwd=str(home.project),
            capture_output=True,
            timeout=30,
            env=home.env(receiver.url, TELEMHQ_FOREGROUND="1", **env),
            preexec_fn=lambda: os.umask(umask) and None,
        )
        assert outcome(done) == SILENT
    new = set(home.path.rglob("*")) - before
    names = {path.name for path in new}
    assert {"outbox", "refused", "lock", "state.json", "sender.log"} <= names
    assert len([name for name in names if name.endswith(".json")]) >= 3
    for path in new:
        assert oct(mode(path)) == oct(0o700 if path.is_dir() else 0o600), path


def test_the_background_sender_keeps_to_the_permissions(
    home: Home, receiver: Receiver
) -> None:
    """What the detached process writes is the user's alone, too."""
    receiver.answer = lambda request: 400 if request.ping["event"] == "Stop" else 200
    only_enqueue(home, receiver.url, event("Stop"))
    process = subprocess.Popen(
        hook_command(),
        stdin=subprocess.PIPE,
        env=home.env(receiver.url),
        cwd=str(home.project),
        preexec_fn=lambda: os.umask(0) and None,  # noqa: PLW1509 - takes no lock
    )
    process.communicate(json.dumps(event("StopFailure")).encode(), 30)
    receiver.wait_for(2)
    home.quiet()
    found = list(home.state.rglob("*"))
    assert {"refused", "state.json", "sender.log"} <= {path.name for path in found}
    for path in found:
        assert oct(mode(path)) == oct(0o700 if path.is_dir() else 0o600), path


def test_what_others_made_keeps_its_permissions(
    home: Home, shared: Receiver, base: pathlib.Path
) -> None:
    """A ~/.claude or an outbox that was there is never chmodded."""
    made = (home.path / ".claude", home.state, base, base / "outbox")
    for path in made:
        path.chmod(0o755)
    assert (
        outcome(home.hook(event("Stop"), shared.url, TELEMHQ_FOREGROUND="1")) == SILENT
    )
    assert len(shared.pings) == 1
    assert [mode(path) for path in made] == [0o755] * 4


# -- What disables it ------------------------------------------------------------------


def make_file(path: pathlib.Path, _: object) -> None:
    """A file where a directory should be."""
    path.write_text("mine")


def make_link(path: pathlib.Path, aside: pathlib.Path) -> None:
    """A symbolic link to a directory of the same user."""
    aside.mkdir()
    path.symlink_to(aside)


def make_dangling(path: pathlib.Path, aside: pathlib.Path) -> None:
    """A symbolic link that leads nowhere yet."""
    path.symlink_to(aside)


def make_world_writable(path: pathlib.Path, _: object) -> None:
    """A directory in which anyone may write."""
    path.mkdir()
    path.chmod(0o777)


def make_group_writable(path: pathlib.Path, _: object) -> None:
    """A directory in which a group may write."""
    path.mkdir()
    path.chmod(0o770)


def make_foreign(path: pathlib.Path, _: object) -> None:
    """A directory that belongs to another user."""
    path.mkdir()
    path.chmod(0o700)
    os.chown(str(path), 12345, 12345)


UNSOUND = (
    make_file,
    make_link,
    make_dangling,
    make_world_writable,
    make_group_writable,
    make_foreign,
)
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can chown"
)


@pytest.mark.parametrize(
    "make",
    [pytest.param(m, marks=needs_root) if m is make_foreign else m for m in UNSOUND],
    ids=lambda make: make.__name__[5:],
)
@pytest.mark.parametrize("below", ["", "/*", "/*/outbox", "/*/refused", "/*/accounts"])
def test_what_another_could_control_disables_the_hook(
    home: Home,
    shared: Receiver,
    directory_name: str,
    make: Callable[..., object],
    below: str,
) -> None:
    """From telemhq/ down: exit 0, silence, nothing written or sent; debug names it."""
    del shared.requests[:]
    unsound = home.path / ".claude" / ("telemhq" + below.replace("*", directory_name))
    unsound.parent.mkdir(parents=True)
    for path in (unsound.parent, unsound.parent.parent):
        path.chmod(0o700)
    make(unsound, home.path / "aside")
    before = {path: mode(path) for path in home.path.rglob("*")}
    assert outcome(home.hook(event("Stop"), shared.url)) == SILENT
    if below in ("", "/*/outbox"):
        told = home.hook(event("Stop"), shared.url, TELEMHQ_HOOK_DEBUG="1")
        assert told.returncode == 0
        assert told.stdout == b""
        assert told.stderr.startswith(b"TelemHQ hook skipped: ")
        assert str(unsound).encode() in told.stderr
    assert {path: mode(path) for path in home.path.rglob("*")} == before
    assert not shared.requests
    assert not home.processes()


def test_a_state_dir_of_the_users_own_choice_is_held_to_the_same(
    home: Home, shared: Receiver
) -> None:
    """TELEMHQ_STATE_DIR that is a link or open to all disables the hook."""
    del shared.requests[:]
    (home.path / "real").mkdir()
    (home.path / "link").symlink_to("real")
    (home.path / "open").mkdir()
    (home.path / "open").chmod(0o777)
    for name in ("link", "open"):
        done = home.hook(
            event("Stop"), shared.url, TELEMHQ_STATE_DIR=str(home.path / name)
        )
        assert outcome(done) == SILENT
        assert list((home.path / name).iterdir()) == []
    assert not shared.requests
    assert not home.state.exists()


def test_a_linked_claude_directory_is_fine(home: Home, shared: Receiver) -> None:
    """~/.claude itself may be a symbolic link, as people with dotfiles have it."""
    del shared.requests[:]
    (home.path / "dotfiles").mkdir()
    (home.path / ".claude").symlink_to("dotfiles")
    assert (
        outcome(home.hook(event("Stop"), shared.url, TELEMHQ_FOREGROUND="1")) == SILENT
    )
    assert len(shared.pings) == 1
    assert (home.path / "dotfiles" / "telemhq").is_dir()


@pytest.mark.parametrize("name", ["lock", "state.json", "sender.log", "sender.log.1"])
def test_a_link_in_place_of_a_file_is_never_followed(
    home: Home, shared: Receiver, base: pathlib.Path, name: str
) -> None:
    """A symbolic link where a file of ours should be does not lead us elsewhere."""
    target = home.path / "precious"
    target.write_text('{"not_before": 0}')
    (base / name).symlink_to(target)
    settings: tuple[dict[str, Any], ...] = ({}, {"TELEMHQ_FOREGROUND": "1"})
    for more in settings:
        assert outcome(home.hook(event("Stop"), shared.url, **more)) == SILENT
        home.quiet()
    assert target.read_text() == '{"not_before": 0}'
    assert oct(mode(target)) == oct(0o644 & ~_umask())
    assert len({ping["event_id"] for ping in shared.pings}) == 2


def _umask() -> int:
    """This process's umask."""
    found = os.umask(0)
    os.umask(found)
    return found


# -- A disk that refuses ---------------------------------------------------------------


def limited(
    home: Home, url: str, limit: int, **more: object
) -> subprocess.CompletedProcess[bytes]:
    """A hook that may write files of at most `limit` bytes, as under a quota."""
    return subprocess.run(
        hook_command(),
        input=json.dumps(event("Stop")).encode(),
        cwd=str(home.project),
        capture_output=True,
        timeout=30,
        env=home.env(url, **more),
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


@pytest.mark.parametrize("limit", [0, 1, 100])
def test_a_quota_leaves_no_partial_file(
    home: Home, receiver: Receiver, limit: int
) -> None:
    """A write that fails in the middle: exit 0, silence, nothing left, nothing sent."""
    assert outcome(limited(home, receiver.url, limit)) == SILENT
    assert [path for path in home.state.rglob("*") if not path.is_dir()] == []
    told = limited(home, receiver.url, limit, TELEMHQ_HOOK_DEBUG="1")
    assert told.returncode == 0
    assert told.stdout == b""
    assert told.stderr.startswith(b"TelemHQ hook skipped: ")
    assert str(home.state).encode() in told.stderr
    assert TOKEN.encode() not in told.stderr
    assert not receiver.requests
    assert not home.processes()


TINY_DISK = r"""
mount -t tmpfs -o size=64k,nr_inodes=16,mode=0700 tmpfs "$1" || exit 77
cd "$1" || exit 77
case $2 in
full) dd if=/dev/zero of=filler bs=1k count=100 2>&- ;;
files*)
    i=0; while [ $i -lt 16 ] && touch file$i 2>&-; do i=$((i+1)); done
    for n in ${2#files}; do rm file$n; done ;;
readonly) mount -o remount,ro "$1" || exit 77 ;;
esac
cd /
"$3" -I -S "$4"
echo "exit $?"
find "$1" -type f ! -name 'file*' ! -name 'filler' -print
"""


def run_on_tiny_disk(
    home: Home, kind: str, url: str, **more: object
) -> subprocess.CompletedProcess[bytes]:
    """A hook in a mount namespace whose state directory is a full or read-only disk."""
    home.state.mkdir(parents=True)
    home.state.chmod(0o700)
    unshare = shutil.which("unshare")
    for flags in (["-m"], ["-r", "-m"]):
        if not unshare:
            break
        done = subprocess.run(
            [
                unshare,
                *flags,
                "/bin/sh",
                "-c",
                TINY_DISK,
                "sh",
                str(home.state),
                kind,
                sys.executable,
                str(SCRIPT),
            ],
            input=json.dumps(event("Stop")).encode(),
            cwd=str(home.project),
            capture_output=True,
            timeout=60,
            env=dict(home.env(url, **more), PATH="/usr/sbin:/usr/bin:/sbin:/bin"),
        )
        if done.stdout.startswith((b"exit", b"TelemHQ")):
            return done
    pytest.skip("no mount namespace here: a tmpfs cannot be mounted")


@pytest.mark.skipif(not LINUX, reason="tmpfs in a mount namespace is Linux")
@pytest.mark.parametrize("kind", ["full", "files", "files 1", "files 1 2", "readonly"])
def test_a_full_or_read_only_disk_is_survived(
    home: Home, receiver: Receiver, kind: str
) -> None:
    """No space, no inodes, read-only: exit 0, silence, no partial file left."""
    done = run_on_tiny_disk(home, kind, receiver.url)
    assert (done.stdout, done.stderr) == (b"exit 0\n", b"")
    assert not receiver.requests


@pytest.mark.skipif(not LINUX, reason="tmpfs in a mount namespace is Linux")
def test_a_disk_with_room_for_the_ping_alone_keeps_it(home: Home) -> None:
    """Where there is room for the ping and nothing else, it is there, whole."""
    done = run_on_tiny_disk(home, "files 1 2 3", dead_url())
    assert re.fullmatch(rb"exit 0\n/\S+/outbox/\d{20}-\w+\.json\n", done.stdout)
    assert done.stderr == b""


@pytest.mark.skipif(not LINUX, reason="tmpfs in a mount namespace is Linux")
def test_the_tiny_disk_works_when_it_is_not_full(
    home: Home, receiver: Receiver
) -> None:
    """The same hook on the same small disk delivers as long as there is room."""
    done = run_on_tiny_disk(home, "roomy", receiver.url, TELEMHQ_FOREGROUND="1")
    assert done.stdout.startswith(b"exit 0\n")
    assert done.stderr == b""
    assert len(receiver.pings) == 1


# -- state.json ------------------------------------------------------------------------

STATES = {
    "truncated": b'{"failures": 3, "set_at": 17',
    "empty": b"",
    "binary": bytes(range(256)),
    "NULs": b"\0" * 4096,
    "a list": b"[1, 2, 3]",
    "a number": b"7",
    "null": b"null",
    "NaN": b'{"failures": NaN, "set_at": NaN, "not_before": NaN, "charges": NaN}',
    "infinite": b'{"failures": 1, "set_at": -Infinity, "not_before": Infinity}',
    "strings": b'{"failures": "9", "set_at": "now", "not_before": "never"}',
    "objects": b'{"failures": {}, "set_at": [], "not_before": {"a": 1}}',
    "nulls": b'{"failures": null, "set_at": null, "not_before": null, "problem": null}',
    "negative": b'{"failures": -5, "set_at": -1, "not_before": -1, "delivered_at": -1}',
    "huge": b'{"failures": %s, "set_at": %s, "not_before": %s}' % ((b"9" * 400,) * 3),
    "wrong inside": b'{"charges": {"a": "b"}, "losses": [1], "problem": "x"}',
    "wrong problem": b'{"problem": {"verdict": 5}, "recovering": "yes"}',
    "deep": b"[" * 200000,
    "not UTF-8": b'{"failures": 1, "problem": {"verdict": "\xff", "what": "\xfe"}}',
    "large": b'{"failures": 1, "x": "' + b"x" * (5 << 20) + b'"}',
}


@pytest.mark.parametrize("name", sorted(STATES))
def test_a_damaged_state_is_as_none(
    home: Home, shared: Receiver, base: pathlib.Path, name: str
) -> None:
    """Whatever state.json holds, the next hook delivers, and writes a sane one."""
    (base / "state.json").write_bytes(STATES[name])
    # Not in the foreground: that has one attempt, and a busy machine resets some.
    assert outcome(home.hook(event("Stop"), shared.url)) == SILENT
    assert len(shared.wait_for(1)) == 1
    wait_until(lambda: not home.waiting())
    wait_until(lambda: (base / "state.json").read_bytes() != STATES[name])
    wait_until(lambda: home.state_json()["delivered_at"] > 0)
    state = home.state_json()
    assert state["failures"] == 0
    assert abs(state["delivered_at"] - time.time()) < 60


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_a_state_that_is_no_file_never_blocks(
    home: Home, shared: Receiver, base: pathlib.Path, kind: str
) -> None:
    """A FIFO, a directory or a link in place of state.json does not stop delivery."""
    path = base / "state.json"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(str(path))
    else:
        path.symlink_to("/dev/zero")
    assert outcome(home.hook(event("Stop"), shared.url)) == SILENT
    assert len(shared.wait_for(1)) == 1
    wait_until(lambda: not home.waiting())


def test_a_state_from_the_future_does_not_stop_delivery(
    home: Home, shared: Receiver, base: pathlib.Path
) -> None:
    """A back-off that was set at a time that has not come yet is none."""
    ahead = time.time() + 2 * 365 * 86400
    state = {"failures": 9, "set_at": ahead, "not_before": ahead + 900}
    (base / "state.json").write_text(json.dumps(state))
    home.hook(event("Stop"), shared.url, TELEMHQ_FOREGROUND="1")
    assert len(shared.pings) == 1


def test_a_sane_back_off_does_stop_it(
    home: Home, shared: Receiver, base: pathlib.Path
) -> None:
    """The counter-example: a back-off set a moment ago keeps the ping waiting."""
    state = {"failures": 1, "set_at": time.time() - 1, "not_before": time.time() + 900}
    (base / "state.json").write_text(json.dumps(state))
    home.hook(event("Stop"), shared.url, TELEMHQ_FOREGROUND="1")
    assert shared.pings == []
    assert len(home.waiting()) == 1
    assert not home.processes()


@pytest.mark.parametrize("failures", [10**6, 2**52])
def test_a_million_failures_are_clamped(home: Home, failures: int) -> None:
    """However many failures there were: the next back-off is at most 15 min."""
    url = dead_url()
    home.hook(event("Stop"), url, TELEMHQ_FOREGROUND="1")
    problem = dict(home.state_json()["problem"])
    home.set_state(failures=failures, problem=problem)
    begun = time.time()
    done = home.hook(event("Stop"), url, TELEMHQ_FOREGROUND="1")
    assert outcome(done) == SILENT
    state = home.state_json()
    assert 1 < state["failures"] < 1000
    assert begun + 1 < state["not_before"] <= time.time() + 900


def test_no_state_holds_delivery_back_for_more_than_a_day(
    script: ModuleType, tmp_path: pathlib.Path
) -> None:
    """A back-off that would last for years ends after a day at the latest."""
    now = time.time()
    for not_before in (now + 10 * 365 * 86400, 1e15, 2**52):
        state = {"set_at": now - 1, "not_before": not_before}
        (tmp_path / "state.json").write_text(json.dumps(state))
        left = script.State.load(str(tmp_path / "state.json")).backoff_left_s(now)
        assert 0 < left <= 86400


@pytest.mark.parametrize(
    "set_at, not_before, left",
    [(0, 0, 0), (-10, 20, 20), (0, 20, 20), (-10, 0, 0), (-30, -10, 0), (1, 20, 0)],
)
def test_a_back_off_holds_between_its_two_times(
    script: ModuleType, tmp_path: pathlib.Path, set_at: int, not_before: int, left: int
) -> None:
    """It holds only while set_at <= now < not_before."""
    now = float(int(time.time()))
    state = {"set_at": now + set_at, "not_before": now + not_before}
    (tmp_path / "state.json").write_text(json.dumps(state))
    found = script.State.load(str(tmp_path / "state.json"))
    assert found.backoff_left_s(now) == left


# -- Strange things in the outbox ------------------------------------------------------


def fill_with_oddities(outbox: pathlib.Path, precious: pathlib.Path) -> None:
    """Everything that is no ping, under names of pings and others."""
    old = f"{time.time_ns() - 10**9:020d}-"
    for name, content in (
        ("empty", b""),
        ("nuls", b"\0" * 2000),
        ("half", b'{"ping": {"event_id": "x'),
        ("large", b" " * (1 << 20)),
        ("list", b"[]"),
        ("text", b"hello"),
        ("other", b'{"ping": 5, "local": 5}'),
        ("none", b'{"ping": {}, "local": {}}'),
        ("deep", b"[" * 60000),
    ):
        (outbox / (old + name + ".json")).write_bytes(content)
    os.mkfifo(str(outbox / (old + "fifo.json")))
    (outbox / (old + "link.json")).symlink_to(precious)
    (outbox / (old + "dangling.json")).symlink_to("/nowhere")
    (outbox / (old + "directory.json")).mkdir()
    (outbox / (old + "full.json")).mkdir()
    (outbox / (old + "full.json") / "x").write_text("x")
    (outbox / "README").write_text("not a ping")
    (outbox / "zzz").mkdir()
    (outbox / ".unfinished").write_text("half")


@pytest.mark.parametrize("foreground", ["0", "1"])
def test_oddities_in_the_outbox_stop_nothing(
    home: Home, shared: Receiver, base: pathlib.Path, foreground: str
) -> None:
    """FIFOs, links, directories, torn files: the hook's ping is delivered."""
    precious = home.path / "precious.json"
    precious.write_text(json.dumps({"ping": {"CANARY": 1}, "local": {}}))
    fill_with_oddities(base / "outbox", precious)
    env: dict[str, Any] = {"TELEMHQ_FOREGROUND": foreground}
    assert outcome(home.hook(event("Stop"), shared.url, **env)) == SILENT
    wait_until(lambda: shared.requests, 30)
    home.quiet(30)
    assert [ping["event"] for ping in shared.pings] == ["Stop"]
    assert json.loads(precious.read_text()) == {"ping": {"CANARY": 1}, "local": {}}
    # Another hook finds them set aside or ignored, and delivers too.
    assert outcome(home.hook(event("Stop"), shared.url, **env)) == SILENT
    wait_until(lambda: len(shared.requests) == 2, 30)
    home.quiet(30)
    left = {path.name for path in (base / "outbox").iterdir()}
    assert not [name for name in left if name.endswith(".json") and "full" not in name]


@pytest.mark.parametrize(
    "name, good",
    [
        ("01795279881368758865-8b039e0d.json", True),
        ("01795279881368758865_8b039e0d.json", False),
        ("1795279881368758865-8b039e0d.json", False),
        (".01795279881368758865-8b039e0d.json", False),
        ("01795279881368758865-8b039e0d.jsonl", False),
        ("\u00b2" * 20 + "-8b039e0d.json", False),  # digits that int() does not take
    ],
)
def test_which_names_are_pings(script: ModuleType, name: str, good: bool) -> None:
    """Only a name from which a time can be read is a ping's."""
    assert script.Outbox.is_ping(name) is good
    if good:
        assert script.ns_of("/outbox/" + name) == 1795279881368758865


# -- Secrets ---------------------------------------------------------------------------


def every_byte(directory: pathlib.Path) -> bytes:
    """All names and contents of files below a directory."""
    found = []
    for path in directory.rglob("*"):
        found.append(os.fsencode(str(path.relative_to(directory))))
        if path.is_file():
            found.append(path.read_bytes())
    return b"\n".join(found)


def every_command_line(home: Home) -> bytes:
    """The arguments of every process of the script in a HOME."""
    found = []
    for pid in home.processes():
        with contextlib.suppress(OSError):
            found.append(pathlib.Path("/proc", str(pid), "cmdline").read_bytes())
    return b"\n".join(found)


SESSION = (
    "SessionStart-startup",
    "UserPromptSubmit",
    "PostToolUse-Write",
    "PostToolUseFailure-Read",
    "Notification",
    "SubagentStop",
    "Stop",
    "StopFailure",
    "SessionEnd-other",
)


@pytest.mark.parametrize("answer", ["dead", 200, 302, 400])
def test_neither_url_nor_content_is_ever_on_disk(
    home: Home, receiver: Receiver, answer: Any
) -> None:
    """The token, the URL and the events' content are in no file and no file name."""
    secret = f"SECRET{time.time_ns():032x}"

    def echo(request: Request) -> tuple[Any, dict[str, str], bytes]:
        """A server that tells all it knows, in every place of its answer."""
        body = request.path.encode() + request.body
        return answer, {"Location": request.path, "X-Token": secret}, body

    receiver.answer = echo
    url = (dead_url() if answer == "dead" else receiver.url).replace(TOKEN, secret)
    shutil.copytree(str(FIXTURES / "transcripts" / "tools"), str(home.path / "t"))
    (transcript,) = (home.path / "t").glob("*.jsonl")
    for name in SESSION:
        found = event(name, title="CANARY_TITLE", new={"CANARY_NEW": "CANARY_NEW"})
        if answer == 200:
            found["transcript_path"] = str(transcript)
        more: dict[str, Any] = {}
        if name == SESSION[-1]:
            more["TELEMHQ_FOREGROUND"] = "1"
        assert outcome(home.hook(found, url, **more)) == SILENT
    if answer not in (200, 400):  # the sender waits for its back-off to end
        home.end()
    home.quiet(30)
    assert answer == "dead" or receiver.requests
    for needle in (
        secret,
        "CANARY",
        "/ping/",
        "Invalid API key",
        "File does not exist",
    ):
        assert needle.encode() not in every_byte(home.state), needle


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_neither_url_nor_content_is_in_any_processs_arguments(
    home: Home, receiver: Receiver
) -> None:
    """`ps` shows other users nothing: the sender gets the URL by its environment."""
    secret, release = f"SECRET{time.time_ns():032x}", threading.Event()
    receiver.answer = lambda _: release.wait(30) and 200
    home.hook(event("UserPromptSubmit"), receiver.url.replace(TOKEN, secret))
    receiver.wait_for(1)
    lines = every_command_line(home)
    release.set()
    assert b"detached" in lines
    for needle in (secret, "CANARY", str(receiver.port)):
        assert needle.encode() not in lines, needle
    assert secret in receiver.requests[0].path
