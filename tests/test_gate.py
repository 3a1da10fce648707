"""The privacy gate: what leaves, in which shape, and that nothing else ever does."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pathlib
import re
import shutil
import subprocess
from types import ModuleType
from typing import Any, Iterator

import pytest

from support import FIXTURES, Home, Receiver, event

NS = 1700000000 * 10**9 + 123456789  # 2023-11-14T22:13:20.123Z
ALWAYS = {  # what every ping has
    *("provider", "tool", "status", "project", "hook_version", "event_id"),
    *("timestamp", "event_bytes"),
}
# Each event that the real client was seen to fire -> its ping, but for what is its own:
# event_id, timestamp, event_bytes, hook_version.
PINGS = json.loads((FIXTURES / "pings.json").read_text("utf-8"))


def ping_of(script: ModuleType, found: Any, **environ: str) -> dict[str, Any]:
    """The ping of an event through the pure functions."""
    settings = script.Settings(environ)
    ping: dict[str, Any] = script.make_ping(found, settings, NS, 700)
    return ping


# -- Real events -----------------------------------------------------------------------


def test_every_real_event_arrives_as_exactly_this_ping(
    home: Home, receiver: Receiver, script: ModuleType
) -> None:
    """Each real event, run as Claude Code runs it, gives the documented fields, and not
    one field more; every ping has an id of its own."""
    names = sorted(path.stem for path in (FIXTURES / "events").iterdir())
    assert names == sorted(PINGS)
    sent = {}
    for name in names:
        raw = json.dumps(event(name)).encode()
        done = home.hook(raw, receiver.url, TELEMHQ_USAGE=0)  # tokens come later
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        sent[name] = dict(PINGS[name], event_bytes=len(raw))
    receiver.wait_for(len(sent), 60)
    ids = set()
    for request in receiver.requests:
        ping = request.ping
        ids.add(ping["event_id"])
        assert re.fullmatch("[0-9a-f]{32}", ping.pop("event_id"))
        assert re.fullmatch(r"20[-\d]{8}T[:\d]{8}\.\d{3}Z", ping.pop("timestamp"))
        assert ping.pop("hook_version") == script.__version__
        assert ping in sent.values()
    assert len(ids) == len(sent)


# -- Shapes ----------------------------------------------------------------------------

GOOD = ("a", "Z", "7", "mcp__srv-1__do.it:now", "0b738a1d-9e18", "x" * 128)
BAD: tuple[Any, ...] = (
    *("", "x" * 129, " a", "a b", "a\n", "a\tb", "a\0b", "/home/dev", "a/b", "a\\b"),
    *("~", "_a", "-a", ".a", ":a", "é", "a\u0663", "\uff41", "a\u200b", "a\ud800"),
    *("a,b", "a=b", "a+b", "a%20b", "a'b", 'a"b', "a{b}", "a$b", "a@b", "a[b]"),
    *(None, True, 5, 1.5, [], ["a"], {}, {"a": "b"}),
)
IDENTIFIERS = (
    *("session_id", "prompt_id", "tool_name", "tool_use_id", "permission_mode"),
    *("agent_id", "agent_type", "source", "trigger", "notification_type"),
    *("hook_event_name", "reason"),
)


def test_a_text_leaves_only_in_the_shape_of_an_identifier(script: ModuleType) -> None:
    """ASCII letters, digits and _ . : -, 1 to 128: anything else is left out, whole."""
    for field in IDENTIFIERS:
        name = "SessionEnd-other" if field == "reason" else "Stop"
        leaves = "event" if field == "hook_event_name" else field
        for value in (*GOOD, *BAD):
            ping = ping_of(script, event(name, **{field: value}))
            assert ping.get(leaves) == (value if value in GOOD else None), field


@pytest.mark.fault(49)
def test_a_model_that_is_no_identifier_is_other(script: ModuleType) -> None:
    """A router's vendor, an ARN with an account's number in it stay home. That there
    was a model is told all the same."""
    told = "claude-opus-5-5[1m]", "claude-sonnet-4@20250514", "eu.x:0"
    for name, shown in (
        *((n, n) for n in told),
        *((n, "other") for n in ("arn:aws:x:1:123456789012:y/z", "my model", "[1m]")),
        *(("anthropic/claude", "other"), ("", None), (["opus"], None), (None, None)),
    ):
        assert ping_of(script, event("Stop", model=name)).get("model") == shown


FAILED = "PostToolUseFailure-Bash"
TABLE: tuple[tuple[str, str, str, tuple[Any, ...], object], ...] = (
    # a real event, its field, the ping's, values of the former, what becomes of them
    *(("Stop", "duration_ms", "duration_ms", (n,), n) for n in (0, 25, 1.5, 2**50)),
    ("Stop", "duration_ms", "duration_ms", (-1, 10**400, 2**53, True, "25", [1]), None),
    ("Stop", "duration_ms", "duration_ms", (float("nan"), float("inf")), None),
    *(("Stop", "is_interrupt", "is_interrupt", (b,), b) for b in (True, False)),
    ("Stop", "is_interrupt", "is_interrupt", (0, 1, "true", []), None),
    ("Stop", "prompt", "prompt_chars", ("héllo",), 5),
    ("Stop", "prompt", "prompt_chars", (["CANARY"], 5), None),
    ("Stop", "background_tasks", "background_tasks", ([{"a": "CANARY"}] * 3,), 3),
    ("Stop", "background_tasks", "background_tasks", ("CANARY", 7), None),
    ("Stop", "reason", "reason", ("secretword",), None),  # elsewhere it is a text
    ("Stop", "cwd", "cwd_hash", ("", None, ["/x"]), None),
    ("StopFailure", "error", "error", ("rate_limit",), "rate_limit"),
    ("StopFailure", "error", "error", ("Rate_limit", "rate limit", "x" * 129), None),
    ("StopFailure", "error", "error", ("/etc/passwd", "é", "", 429), None),
    (FAILED, "error", "exit_code", ("Exit code 127\nCANARY", "Exit code 127"), 127),
    (FAILED, "error", "exit_code", ("Exit code ", "The Exit code 3", ["x"]), None),
    (FAILED, "error", "exit_code", ("Exit code \u0663", None), None),
    (FAILED, "error", "error", ("CANARY", {"a": 1}, None), "tool_error"),
    (FAILED, "error", "error_chars", ("CANARY",), 6),
    ("Stop", "error", "error", ("rate_limit", {"a": 1}, 3), "error"),
    ("Stop", "error", "error", (None, "", False, {}, []), None),
)


@pytest.mark.parametrize("name, field, leaves, values, told", TABLE)
def test_a_value_leaves_in_its_shape_or_not_at_all(
    script: ModuleType, name: str, field: str, leaves: str, values: Any, told: object
) -> None:
    """Numbers, flags, codes, lengths; a failed tool's text holds output and paths."""
    for value in values:
        ping = ping_of(script, event(name, **{field: value}))
        assert ping.get(leaves) == told
        assert type(ping.get(leaves)) is type(told)
        failed = "Failure" in name or told == "error"
        assert ping["status"] == ("failed" if failed else "success")


def test_the_gate_decides_alone(script: ModuleType) -> None:
    """The allow-list knows a field and its only shape; nothing else passes it."""
    for name, good, bad in (
        ("prompt", None, "x"),
        ("project", "My shop/é", "a\nb"),
        ("git_branch", "feat/x-1", "a b"),
        ("cwd_hash", "0123456789ab", "/home/dev"),
        ("lines_added", 12, "12"),
        ("lines_removed", 0, -1),
        ("cost_usd", 0.25, True),
        ("tools", {"Bash": 2}, {"/bin/sh": 2}),
        ("tools", {f"t{n}": n for n in range(20)}, {f"t{n}": n for n in range(21)}),
        ("models", {"opus": {"input_tokens": 3, "cost_usd": 0.5}}, {"opus": 3}),
        ("models", {"haiku": {"cost_usd": 0.5}}, {"opus": {"cost_usd": "CANARY"}}),
        ("models", {}, {"vendor/opus": {"cost_usd": 0.5}}),
    ):
        assert script.gate({name: good}) == ({} if good is None else {name: good})
        assert script.gate({name: bad}) == {}, (name, bad)
    for name in script.GATE:  # whatever may one day go wrong before it
        for wrong in ("a" * 129, "a" * 100000, None, object(), {"/a": 1}, ["x"]):
            assert script.gate({name: wrong}) == {}, name


# -- Names of tools and agents ---------------------------------------------------------


def test_without_tool_names_only_the_clients_own_are_told(script: ModuleType) -> None:
    """TELEMHQ_TOOL_NAMES=0, or what is not understood: names of MCP servers, of their
    tools and of a user's own agents stay home."""
    for field, name, shown in (
        ("tool_name", "mcp__pg-prod-acme__drop_customer", "mcp"),
        ("tool_name", "mcp__a b__c/d", "mcp"),
        ("tool_name", "ListMcpResourcesTool", "ListMcpResourcesTool"),
        ("tool_name", ["mcp__a__b"], None),
        ("agent_type", "general-purpose", "general-purpose"),
        ("agent_type", "acme-payroll-fixer", "custom"),
        ("agent_type", "the agent of Jane", "custom"),
        ("agent_type", "", None),
    ):
        found = event("PostToolUse-Bash", **{field: name})
        for value in ("0", "nonsense"):
            ping = ping_of(script, found, TELEMHQ_TOOL_NAMES=value)
            assert ping.get(field) == shown


# -- Hashes ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", [b"", b"k", b"x" * 200, b"\xff\xfe"], ids=repr)
@pytest.mark.parametrize("path", ["/home/dev/api", "/é/😀", "/lone\ud800", "C:\\x"])
def test_a_path_leaves_as_twelve_hex_of_its_hash(
    script: ModuleType, path: str, key: bytes
) -> None:
    """The first 12 hex of SHA-256, lone surrogates passed through, which anyone who
    knows the path can reproduce; TELEMHQ_HASH_KEY makes it an HMAC."""
    raw = path.encode("utf-8", "surrogatepass")
    made = hmac.new(key, raw, "sha256") if key else hashlib.sha256(raw)
    environ = {"TELEMHQ_HASH_KEY": os.fsdecode(key)}
    ping = ping_of(script, event("Stop", cwd=path, transcript_path=path), **environ)
    assert ping["cwd_hash"] == ping["transcript_path_hash"] == made.hexdigest()[:12]


# -- Project ---------------------------------------------------------------------------


def project(script: ModuleType, cwd: object, top: object, name: object = None) -> str:
    """The project of a cwd, in a session that began in `top`."""
    environ = {"CLAUDE_PROJECT_DIR": top, "TELEMHQ_PROJECT": name}
    given = {key: str(value) for key, value in environ.items() if value is not None}
    found = {"cwd": str(cwd) if isinstance(cwd, pathlib.Path) else cwd}
    return str(script.project_of(found, script.Settings(given)))


def test_the_projects_name(script: ModuleType) -> None:
    """TELEMHQ_PROJECT, else the project directory around the cwd, else the cwd."""
    for cwd, top, name, expected in (
        ("/w/acme/src", "/w/acme", "Shop", "Shop"),
        ("/w/acme/src/deep", "/w/acme", None, "acme"),
        ("/w/acme/", "/w/acme/", None, "acme"),
        ("/w/acme/../other", "/w/acme", None, "other"),
        ("/w/acme-old", "/w/acme", None, "acme-old"),
        ("/w/acme", "", "", "acme"),
        *((cwd, None, None, "unknown") for cwd in ("/", "", None, ["/w/acme"])),
        ("/w/My Shop (neu) é", None, None, "My Shop (neu) é"),
        ("/w/a\tb\x1b[31m\r\n\x7f\x9bc\udcff\ud800", None, None, "ab[31mc"),
        ("/w/a\0b", None, None, "ab"),
        ("/w/" + "x" * 200, None, None, "x" * 128),
        ("/w/acme", None, "two words/and more", "two words/and more"),
        ("/w/acme", None, "\x1b\x07 ", "acme"),
        ("C:\\Users\\jane\\acme", None, None, "acme"),
    ):
        assert project(script, cwd, top, name) == expected


def git(directory: pathlib.Path, *arguments: str) -> None:
    """Run git there, with no settings of this machine."""
    env = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    env["GIT_CONFIG_NOSYSTEM"] = "1"
    given = ("protocol.file.allow=always", "user.name=t", "user.email=t@example.org")
    command = ["git", *(word for pair in given for word in ("-c", pair)), *arguments]
    subprocess.check_output(command, cwd=directory, env=env, stderr=subprocess.DEVNULL)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_git_worktree_is_its_main_repositorys_project(
    script: ModuleType, tmp_path: pathlib.Path
) -> None:
    """Real worktrees, of bare repositories too; a submodule is not a worktree."""
    top = tmp_path
    git(top, "init", "-q", "shop")
    git(top / "shop", "commit", "-q", "--allow-empty", "-m", "first")
    git(top / "shop", "worktree", "add", "-q", "-b", "fix", "../shop-fix")
    (top / "shop-fix" / "src").mkdir()
    (top / "market").mkdir()
    for bare, tree in (("depot.git", "depot-fix"), ("market/.bare", "main-tree")):
        git(top, "clone", "-q", "--bare", "shop", bare)
        git(top / bare, "worktree", "add", "-q", "-b", tree, str(top / tree))
    git(top, "init", "-q", "mall")
    git(top / "mall", "submodule", "add", "-q", str(top / "shop"), "stall")
    for cwd, began, expected in (
        ("shop", None, "shop"),
        ("shop-fix", None, "shop"),
        ("shop-fix/src", "shop-fix", "shop"),
        ("shop-fix", "shop", "shop"),
        ("depot-fix", None, "depot"),
        ("main-tree", None, "market"),
        ("mall/stall", None, "stall"),
        ("mall/stall", "mall", "mall"),
    ):
        assert project(script, top / cwd, top / began if began else None) == expected


def test_a_strange_git_file_is_no_error(
    script: ModuleType, tmp_path: pathlib.Path
) -> None:
    """Whatever `.git` holds, or is, the project has a name without control characters,
    at once."""
    path = tmp_path / "tree" / ".git"
    path.parent.mkdir()
    for content, expected in (
        (b"gitdir: ../shop/.git/worktrees/tree", "shop"),
        (b"gitdir: ../shop/.git/modules/tree\n", "tree"),
        (b"gitdir: ../a\x1bb/.git/worktrees/tree\n", "ab"),
        (b"gitdir: \0/x/.git/worktrees/tree\n", "x"),
        *((raw, "tree") for raw in (b"gitdir:\n", b"\0\0\0", b"\xff" * 100000)),
    ):
        path.write_bytes(content)
        assert project(script, path.parent, None) == expected
    path.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)  # that nobody ever writes to
    assert project(script, path.parent, None) == "tree"


# -- Canaries --------------------------------------------------------------------------

SHAPED = {*IDENTIFIERS, "model", "level"}  # what leaves when it looks like one
CONTENT = (  # fields of Claude Code's events that hold content or paths
    *("prompt", "tool_input", "tool_response", "error_details", "message", "title"),
    *("last_assistant_message", "custom_instructions", "compact_summary", "delta"),
    *("command_args", "session_title", "task_subject", "task_description", "new"),
    *("tool_calls", "background_tasks", "session_crons", "file_path", "scratchpad_dir"),
    *("agent_transcript_path", "transcript_path", "CANARY_EXTRA"),
)
LONG = (  # secrets in any shape but an identifier's
    *("the secret is CANARY", "/home/CANARY/x", "C:\\Users\\CANARY", "CANARY\n"),
    *("\ufeffCANARY", "CANARY\ud800", "CANARYx" * 200, "CANARYé", "CANARY " * 50),
    *("-CANARY", '{"session_id":"CANARY"}', "https://user:CANARY@example.org/"),
)
NUMBERS = (float("nan"), float("inf"), -5, 1e308, 10**4000, 2**53)
OTHERS: Any = (*NUMBERS, [], {}, True, None)


def strange(key: str) -> Iterator[Any]:
    """Any value that may stand under a key, secrets wherever a text is."""
    texts: tuple[str, ...] = LONG if key in SHAPED else (*LONG, "CANARY", "CANARY[1m]")
    if key == "cwd":  # of which the last name may leave
        texts = ("/home/CANARY/api", "/CANARY/../CANARY/api/")
    yield from texts
    yield from OTHERS
    yield from ([*texts], dict(zip(texts, texts)))
    if key != "effort":  # of which the level leaves, where it is an identifier
        yield dict.fromkeys((*SHAPED, *CONTENT), "CANARY")


@pytest.mark.parametrize("name", PINGS)
def test_no_content_leaves_in_whatever_field_and_shape(
    script: ModuleType, name: str
) -> None:
    """In each field of each real event, in each that may hold content, and under each
    name that only we may fill: no word of it leaves, also where it looks like an
    identifier; no path, nothing overlong, no null, no NaN, and no exception, ever."""
    real = event(name)
    for key in {*real, *CONTENT, *script.GATE}:
        for value in strange(key):
            # As it comes from stdin: through JSON, NaN and huge integers included.
            found = script.decode_json(json.dumps({**real, key: value}))
            text = script.encode_json(ping_of(script, found, TELEMHQ_MACHINE="a/b"))
            assert not re.search(r"canary|/|\\|null|nan|infinity", text.lower()), key
            assert len(text) < 4096
            ping = json.loads(text)
            assert set(ping) >= ALWAYS
            assert script.gate(ping) == ping
