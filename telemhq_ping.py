#!/usr/bin/env python3
"""Tell a TelemHQ tracker what Claude Code did, never what was said.

A hook script for Claude Code: one file, standard library only, Python 3.8 to 3.15.

What runs when
    hook()      what the settings' command calls, with an event on stdin: makes it a
                ping, puts that into the outbox, starts a sender, exits. No network.
    sender()    detached, at most one per destination: POSTs what waits, the oldest
                first; ends when nothing new comes, or after 60 s.
    For the commands, which a person runs, see --help.
How to read it
    From top to bottom it follows a ping; no section uses one below it. Down to the
    first banner stands all that runs while Claude Code waits, down to the second what
    runs in the background. It is imported, for Python keeps a module's bytecode; a
    script is compiled at every run, which is slower, and works as well.
What leaves
    The fields of GATE, each only in the shape it has there: numbers, booleans, hashes,
    identifiers, the project's name. Never a prompt, an answer, a command, a tool's
    input or output, a path, an error's text, the environment.
What is read and written
    The event; the project's .git when it is a file; a tracker's token, where its class
    names a file for it; by the sender, for counts only, the transcripts. All that is
    written is below $TELEMHQ_STATE_DIR, else telemhq/ in $CLAUDE_CONFIG_DIR, else
    ~/.claude/telemhq/ (directories 0700, files 0600), and Python's own __pycache__.
Variables
    TELEMHQ_PING_URL    where pings go; unset, empty or invalid: nothing happens
    TELEMHQ_PROJECT     the project's name, instead of its directory's
    TELEMHQ_MACHINE     a name for this machine, sent along
    TELEMHQ_HASH_KEY    makes the hashes of paths HMACs under this key
    TELEMHQ_USAGE       0: open no transcript, send no tokens
    TELEMHQ_GIT         1: send the git branch
    TELEMHQ_TOOL_NAMES  0: send no names of MCP servers, their tools and custom agents
    TELEMHQ_TIMEOUT     seconds for one socket operation (10; 1 to 30)
    TELEMHQ_FOREGROUND  1: the hook waits for the delivery (containers, CI)
    TELEMHQ_ALLOW_HTTP  1: allow http:// to other machines
    TELEMHQ_STATE_DIR   where the state is kept
    TELEMHQ_DESTINATIONS  who gets pings, a list; by default TelemHQ alone (what other
                        trackers need stands in the section Trackers)
    TELEMHQ_HOOK_DEBUG  1: deliver while the hook waits, tell on stderr what happens
Exit status
    Hook and sender: 0, whatever happens; nothing on stdout, and nothing on stderr but
    under TELEMHQ_HOOK_DEBUG. Commands: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import gc
import sys

# Before any other import: no json.py of a project, or beside this file, is ours.
if __name__ == "__main__" and not sys.flags.isolated:
    ours = (sys.base_prefix + "/", sys.base_exec_prefix + "/", sys.base_prefix + "\\")
    top = [sys.base_prefix] if sys.platform == "win32" else []  # it has modules there
    sys.path[:] = [path for path in sys.path if path in top or path.startswith(ours)]
elif sys.flags.no_site:
    beside = __file__[: -len(__name__ + ".py") - 1]
    sys.path[:] = [path for path in sys.path if path not in ("", beside)]
if sys.flags.no_site:
    gc.disable()  # costs a hook a twentieth of its time; a minute's garbage is little

import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from ssl import SSLContext
    from subprocess import Popen
    from threading import Thread
    from typing import Any, Callable, Dict, Iterator, NoReturn, Optional, Tuple
    from urllib.request import OpenerDirector

    Fields = Dict[str, Any]  # of an event, a ping, a row: what JSON's objects hold
    Models = Dict[str, list[int]]  # model -> counts, in the order of COUNTS
    Shape = Callable[[object], bool]
    Tell = Callable[[str], None]  # says a line to a person, or swallows it
    Check = Tuple[Optional[bool], str]  # a line of doctor's: whether that is well
    Change = Tuple[str, Optional[bytes], int]  # of a file: path, content, mode

__version__ = "1.1.0"

SCRIPT = "telemhq_ping.py"

STDIN_MAX_BYTES = 256 << 20  # events hold whole files; beyond this it is none
FOREGROUND_S = 8.0  # delivery while the hook waits, in all; below its timeout of 10
ONCE_S, ONCE_LAST_S = 5.0, 2.5  # there: the last request begins, and may take
LIFE_S = 60.0  # a sender's: longer than a restart of the tracker
LINGER_S = 5.0  # a sender's wait for the next tool event: they come some seconds apart
LOOK_S = 0.1  # between a waiting process's looks; 10 us each
TIMEOUT_S = (10.0, 1.0, 30.0)  # one socket operation: default, least, most
DEADLINE = 3.0  # a request's, in timeouts: urllib spends one on each dead address
OUTBOX_MAX_PINGS = 5000  # some 4 MB, a day of heavy use while the tracker is away
REFUSED_MAX_PINGS = 100  # kept to be looked at, not to be sent
RECORD_MAX_BYTES = 2 << 20  # a ping has 1 to 4 KB, ROWS_MAX messages the rest
ROWS_MAX = 4000  # messages beside a ping, 0.1 KB each; more are added up, by model
PATH_MAX_CHARS = 4096  # PATH_MAX on Linux
STATE_MAX_BYTES = 4 << 20  # ours is some KB
UNFINISHED_S = 3600.0  # a file unfinished for so long has lost its writer
BACKOFF_MAX_S = 900.0  # 15 min: the end of an outage is noticed soon enough
HOLD_S = (900.0, 21600.0)  # 15 min to 6 h: a person must mend the cause
RETRY_AFTER_MAX_S = 86400.0  # a day: no server may silence us for longer
FAILURES_BORNE = 3  # in a row, of different events: then it may be the tracker's fault
REFUSALS_BORNE = 25  # where others were delivered: all of one kind may be refused
SUSPECT_PAUSE_S = 300.0  # between two tries of a ping that has been found at fault
SUSPECTS_MAX = 200  # remembered; more than any pass makes
POISON_CHARGES, POISON_AGE_S = 8, 3600.0  # both: neither a burst nor an outage blames
LOG_MAX_BYTES = 256 << 10  # some 2,000 passes
SENT_MAX_BYTES = 5 << 20  # some 5,000 pings; with the file before it, 10,000
LINE_MAX_BYTES = 8 << 20  # rows that count are some KB long
ID_CHARS = 12  # of a hash, 48 bits: among 64,000 two are the same once in 100,000 times
LAG_S = 2.0  # a turn's last row comes up to 0.1 s after its Stop fired
POLL_S = 0.05  # between two looks at a transcript that is awaited
CHARGE_TRIES = 3  # an I/O error passes, or does not
WAIT_MAX_S = 3600.0  # a ping that cannot be charged for a full disk goes without
DAY_S = 86400.0  # a session without a word for so long is lost
ACCOUNTS_MAX = 500  # sessions remembered: some months' worth
ACCOUNT_MAX_BYTES = 16 << 20  # 64,000 answers: 4 MB
SEEN_MAX = 1 << 18  # answers and tool calls remembered; a very long session has 130,000
CHARGED_MAX = 8  # charges remembered, until the ping's own file has them


class Skipped(Exception):
    """Why a hook or a command did not do its work, for a person to read."""


# -- JSON, hashes, shapes --------------------------------------------------------------
# json costs a hook 7 ms (it imports re), hashlib 3 ms, CPython's private modules behind
# them next to nothing. Whatever goes wrong with a private one, the public one is asked.


class ScannerContext:
    """What CPython's JSON scanner asks its decoder for (array_hook: since 3.15)."""

    strict = False
    object_hook = object_pairs_hook = array_hook = None
    parse_float = parse_constant = float
    parse_int = int


def decode_json(text: str) -> Any:
    """The JSON value that `text` begins with; ValueError when there is none."""
    text = text.strip()
    try:
        from _json import make_scanner

        return make_scanner(ScannerContext)(text, 0)[0]  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - not JSON, or that module has changed
        from json import JSONDecoder

    try:
        return JSONDecoder(strict=False).raw_decode(text)[0]
    except RecursionError:
        raise ValueError("nested too deeply") from None


def encode_json(value: object) -> str:
    """`value` (dict, list, str, bool, None, finite number) as compact ASCII JSON."""
    try:
        from _json import encode_basestring_ascii as quoted
        from _json import make_encoder

        # No look-out for cycles, no indentation, nothing sorted, no look-out for NaN.
        encoder = make_encoder(None, str, quoted, None, ":", ",", False, False, True)
        return "".join(encoder(value, 0))
    except Exception:  # noqa: BLE001 - that module has changed, or is not there
        from json import dumps

    return dumps(value, separators=(",", ":"))


def sha256_hex(raw: bytes, key: bytes = b"") -> str:
    """SHA-256 of bytes, 64 hex digits; HMAC-SHA-256 when there is a key."""
    if key:
        import hmac

        return hmac.new(key, raw, "sha256").hexdigest()
    private = "_sha2" if sys.version_info >= (3, 12) else "_sha256"
    try:
        return str(__import__(private).sha256(raw).hexdigest())
    except Exception:  # noqa: BLE001 - that module has changed, or is not there
        from hashlib import sha256

    return sha256(raw).hexdigest()


def path_hash(path: str, key: str) -> str:
    """First 12 hex of the hash of a path; `key` may be empty."""
    secret = key.encode("utf-8", "surrogateescape")
    return sha256_hex(path.encode("utf-8", "surrogatepass"), secret)[:12]


LOWER = "abcdefghijklmnopqrstuvwxyz"
LETTERS_DIGITS = frozenset("0123456789" + LOWER + LOWER.upper())


def identifier(value: object, more: str = "") -> bool:
    """1 to 128 letters, digits and _ . : - (and `more`), a letter or digit first."""
    if not isinstance(value, str) or not 0 < len(value) <= 128:
        return False
    allowed = LETTERS_DIGITS.union("_.:-", more)
    return value[0] in LETTERS_DIGITS and allowed.issuperset(value)


def number(value: object) -> bool:
    """A finite number from 0 up to 2^53, which every JSON reader keeps exact."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value < 1 << 53  # of NaN that is false


def number_in(found: Fields, name: str) -> Any:
    """The number under `name`, 0 when there is none."""
    value = found.get(name)
    return value if number(value) else 0


def object_in(found: Fields, name: str) -> Fields:
    """The object under `name`, an empty one when there is none."""
    value = found.get(name)
    return value if isinstance(value, dict) else {}


def boolean(value: object) -> bool:
    """True or False."""
    return isinstance(value, bool)


def clean(text: str) -> str:
    """`text` without what does not show (controls, lone surrogates), cut."""
    return "".join(filter(str.isprintable, text))[:128]


def iso_time(ns: int) -> str:
    """Nanoseconds since 1970 as ISO 8601, UTC, with milliseconds."""
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9))
    return f"{day}.{ns // 10**6 % 1000:03d}Z"


def seconds_of(stamp: object) -> float:
    """Such a time, or a transcript's, in seconds since 1970; 0 when it is none."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(str(stamp).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0


# -- Settings --------------------------------------------------------------------------

PLUGIN_URL = "CLAUDE_PLUGIN_OPTION_PING_URL"  # what the plugin's user was asked for
ON, OFF = ("1", "yes", "on", "true"), ("0", "no", "off", "false", "")


class Settings:
    """The TELEMHQ_ variables. `ignored`: those that make no sense, and why."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.ignored: list[str] = []
        self.url = environ.get("TELEMHQ_PING_URL", environ.get(PLUGIN_URL, ""))
        self.hash_key = environ.get("TELEMHQ_HASH_KEY", "")
        self.debug = self.switch("TELEMHQ_HOOK_DEBUG")
        self.foreground = self.switch("TELEMHQ_FOREGROUND") or self.debug
        self.allow_http = self.switch("TELEMHQ_ALLOW_HTTP")
        self.git = self.switch("TELEMHQ_GIT")
        # For privacy's sake, what is not understood in these two means off.
        self.usage = self.switch("TELEMHQ_USAGE", unset=True)
        self.tool_names = self.switch("TELEMHQ_TOOL_NAMES", unset=True)
        self.project: str | None = self.choice(
            "TELEMHQ_PROJECT", lambda v: clean(v).strip(), "it has nothing to show"
        )
        self.machine: str | None = self.choice(
            "TELEMHQ_MACHINE",
            lambda v: identifier(v) and v,
            "only letters, digits and _ . : - may be in it",
        )
        seconds = self.choice("TELEMHQ_TIMEOUT", duration, "it is no number of seconds")
        self.timeout_s: float = seconds or TIMEOUT_S[0]
        chosen = self.choice("TELEMHQ_STATE_DIR", absolute, "it must be absolute")
        config = absolute(environ.get("CLAUDE_CONFIG_DIR", "")) or absolute("~/.claude")
        # None: nothing tells where home is.
        self.state_dir: str | None = chosen or (
            os.path.join(config, "telemhq") if config else None
        )
        named = environ.get("TELEMHQ_DESTINATIONS", "").lower().replace(",", " ")
        self.destinations = list(dict.fromkeys(named.split())) or ["telemhq"]

    def choice(self, name: str, accept: Callable[[str], Any], problem: str) -> Any:
        """What `accept` makes of a variable; None when that is nothing."""
        value = self.environ.get(name)
        if not value:
            return None
        found = accept(value)
        if not found:
            self.ignored.append(f"{name} is ignored: {problem}")
        return found or None

    def switch(self, name: str, unset: bool = False) -> bool:
        """A variable that is 1 or 0; what is neither counts as 0."""
        value = self.environ.get(name, "").lower()
        if value not in (*ON, *OFF):
            self.ignored.append(f"{name} is ignored: it must be 1 or 0")
        return value in ON if value else unset


def duration(text: str) -> float | None:
    """Seconds, clamped to what TIMEOUT_S allows; None when `text` is no number."""
    try:
        return max(TIMEOUT_S[1], min(float(text), TIMEOUT_S[2]))
    except ValueError:
        return None


def absolute(path: str) -> str | None:
    """`path` normalised, ~ expanded; None when it is relative, or there is no home."""
    if path.startswith("~") and os.environ.get("HOME") == "":
        return None  # expanduser() would make it a path below /
    path = os.path.normpath(os.path.expanduser(path))
    return path if os.path.isabs(path) else None


def split_url(url: str) -> tuple[str, str]:
    """(scheme, host) of an absolute URL; ValueError says what is wrong."""
    if not url.isascii() or any(c <= " " or c in '\x7f\\"<>^`{|}' for c in url):
        raise ValueError("it has a space or another character that no URL may hold")
    scheme, found, rest = url.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        raise ValueError("it must start with https://")
    host = rest.replace("?", "/").replace("#", "/").split("/")[0]
    if "@" in host:
        raise ValueError("it must not hold user:password@")
    if ":" in host and not host.endswith("]"):
        host, _, port = host.rpartition(":")
        if not (port.isdigit() and int(port) < 65536):
            raise ValueError("its port is no number up to 65535")
    host = host.strip("[]")  # of an IPv6 address
    if not host or not LETTERS_DIGITS.union("-._:").issuperset(host):
        raise ValueError("it names no host")
    return scheme.lower(), host.lower()


def loopback(host: str) -> bool:
    """Whether `host` is this machine, by the names that people use."""
    return host in ("localhost", "127.0.0.1", "::1")


def origin(url: str) -> str:
    """Scheme, host and port: what may be shown of a valid URL."""
    return "/".join(url.replace("?", "/").replace("#", "/").split("/")[:3])


# -- Event -> ping: the privacy gate. What is not in this section never leaves. --------


def line_of_text(value: object) -> bool:
    """1 to 128 characters that show."""
    return isinstance(value, str) and value != "" and clean(value) == value


def model_name(value: object) -> bool:
    """An identifier such as claude-x@date or claude-x[1m]."""
    return identifier(value, "@[]")


def branch_name(value: object) -> bool:
    """An identifier, slashes allowed."""
    return identifier(value, "/")


def error_code(value: object) -> bool:
    """A code such as rate_limit: an identifier of lower-case letters and _."""
    return identifier(value) and not str(value).strip(LOWER + "_")


def counts(value: object, keys: Shape = identifier, shape: Shape = number) -> bool:
    """An object whose every key and value has its shape; at most 20 of them."""
    return (
        isinstance(value, dict)
        and len(value) <= 20
        and all(keys(key) and shape(inner) for key, inner in value.items())
    )


TOKENS = (
    "input_tokens output_tokens cached_input_tokens cache_creation_input_tokens "
    "reasoning_tokens total_tokens"
).split()


def counts_by_model(value: object) -> bool:
    """An object: model's name -> its TOKENS, and what they cost."""
    return counts(value, model_name, counts)


# All that can ever leave: field -> the only shape it may have.
GATE: dict[str, Shape] = {}
for names, shape in (
    ("event_id event timestamp status provider tool hook_version machine", identifier),
    ("session_id prompt_id tool_name tool_use_id permission_mode effort", identifier),
    ("agent_id agent_type source reason trigger notification_type", identifier),
    ("project", line_of_text),
    ("model", model_name),
    ("git_branch", branch_name),
    ("error", error_code),
    ("cwd_hash transcript_path_hash", identifier),
    ("is_interrupt stop_hook_active usage_complete", boolean),
    ("duration_ms exit_code error_chars prompt_chars", number),
    ("last_assistant_message_chars background_tasks event_bytes", number),
    ("tool_calls tool_failures interrupts", number),
    ("cost_usd lines_added lines_removed", number),
    (" ".join(TOKENS), number),
    ("tools", counts),  # name -> calls
    ("models", counts_by_model),
):
    GATE.update(dict.fromkeys(names.split(), shape))
ORIGIN = {"provider": "anthropic", "tool": "claude-code", "hook_version": __version__}
COPIED = (  # from the event to the ping under the same name
    "session_id prompt_id tool_name tool_use_id permission_mode agent_id agent_type "
    "source trigger notification_type model duration_ms is_interrupt stop_hook_active"
).split()
CLIENT_AGENTS = frozenset(  # Claude Code's own agent types: 2.1.329's and older ones
    "general-purpose Explore Plan claude claude-code-guide fork worker web-fetch "
    "workflow-subagent comment-thread-analyst statusline-setup "
    "output-style-setup".split()
)


def message_rows(value: object) -> bool:
    """A list of [id, model, time (ms since 1970), the counts of an API message in the
    order of TOKENS, without their total]."""
    return all(
        isinstance(row, list)
        and len(row) == 3 + 5
        and all(map(model_name, row[:2]))
        and all(map(number, row[2:]))
        for row in (value if isinstance(value, list) else [value])
    )


BESIDE: dict[str, Shape] = {  # beside a ping, for a tracker that needs it, never in it
    # What its own variables said when the ping was made: name -> one line of text.
    "own": lambda value: counts(value, identifier, line_of_text),
    "messages": message_rows,  # those whose tokens the ping was charged
    "totals": counts,  # the session's, so far
    "since_end": counts,  # the same since it last ended
}


def gate(fields: Fields, shapes: dict[str, Shape] = GATE) -> Fields:
    """Of `fields` what GATE names, in its shape. Every body is made by this."""
    return {
        name: fields[name]
        for name, shape in shapes.items()
        if name in fields and shape(fields[name])
    }


def gate_beside(fields: Fields, needs: tuple[str, ...]) -> Fields:
    """Of what stands beside a ping only what its tracker needs, in its shape."""
    return gate(fields, {name: BESIDE[name] for name in needs})


def model_shown(name: object) -> str:
    """A model's name as it may leave: a router's vendor/name, an ARN is `other`."""
    return str(name) if model_name(name) else "other"


def tool_shown(name: str, tool_names: bool) -> str:
    """A tool's name as it may leave: `mcp__server__tool` may tell on its user."""
    return "mcp" if not tool_names and name.startswith("mcp__") else name


def main_repository(directory: str) -> str:
    """Of a git worktree its repository's name, else "". A worktree's .git is a file:
    `gitdir: REPOSITORY/.git/worktrees/NAME` (gitrepository-layout)."""
    path = os.path.join(directory, ".git")
    if not os.path.isfile(path):  # nor a FIFO, which nobody may ever write to
        return ""
    with open(path, "rb") as file:
        text = file.read(PATH_MAX_CHARS).decode()
    repository, found, tree = text[len("gitdir: ") :].rpartition("/worktrees/")
    if not found or "/" in tree:  # a submodule's
        return ""
    top, name = os.path.split(os.path.normpath(os.path.join(directory, repository)))
    if name.startswith("."):  # .git, or .bare by a common habit
        return os.path.basename(top)
    return name[:-4] if name.endswith(".git") else name


def project_of(event: Fields, settings: Settings) -> str:
    """The project's name; neither a `cd src` nor a worktree makes another project."""
    if settings.project:
        return settings.project
    cwd, top = event.get("cwd"), settings.environ.get("CLAUDE_PROJECT_DIR", "")
    if not isinstance(cwd, str) or not cwd:
        return "unknown"
    directory, top = os.path.normpath(cwd), os.path.normpath(top)
    if (directory + os.sep).startswith(top.rstrip(os.sep) + os.sep):
        directory = top
    name = directory.replace("\\", "/").split("/")[-1]
    try:
        name = main_repository(directory) or name
    except (OSError, ValueError):
        pass  # it cannot be read; a NUL in it
    name = clean(name)
    return name if name.strip(" .") else "unknown"


def error_fields(event: Fields) -> Fields:
    """Of what failed its `error`, with numbers: a tool's text holds its output."""
    name, error = event.get("hook_event_name"), event.get("error")
    if name == "StopFailure":
        return {"error": error}  # one of Claude Code's own codes, or the gate drops it
    if name != "PostToolUseFailure":
        return {"error": "error"} if error else {}
    fields: Fields = {"error": "tool_error"}
    if isinstance(error, str):
        fields["error_chars"] = len(error)
        code = "".join(error[10:31].split()[:1])
        if error.startswith("Exit code ") and code.isascii() and code.isdigit():
            fields["exit_code"] = int(code)
    return fields


def text_fields(event: Fields, settings: Settings) -> Fields:
    """What may be told of an event's texts: names as they leave, hashes, lengths."""
    texts = {key: text for key, text in event.items() if isinstance(text, str)}
    fields: Fields = {}
    if texts.get("model"):
        fields["model"] = model_shown(texts["model"])
    if "tool_name" in texts:
        fields["tool_name"] = tool_shown(texts["tool_name"], settings.tool_names)
    if texts.get("agent_type"):
        told = settings.tool_names or texts["agent_type"] in CLIENT_AGENTS
        fields["agent_type"] = texts["agent_type"] if told else "custom"
    for key in ("cwd", "transcript_path"):
        if texts.get(key):
            fields[f"{key}_hash"] = path_hash(texts[key], settings.hash_key)
    for key in ("prompt", "last_assistant_message"):
        if key in texts:
            fields[f"{key}_chars"] = len(texts[key])
    return fields


def make_ping(
    event: Fields, settings: Settings, project: str, ns: int, event_bytes: int
) -> Fields:
    """The ping of one event. project: its name. ns: when it happened, in nanoseconds
    since 1970. event_bytes: its size on stdin."""
    name, effort = event.get("hook_event_name"), event.get("effort")
    tasks = event.get("background_tasks")
    errors = error_fields(event)
    fields = {key: event.get(key) for key in COPIED}
    fields.update(text_fields(event, settings), **errors, **ORIGIN)
    fields.update(
        event=name,
        status="failed" if errors else "success",
        project=project,
        event_id=os.urandom(16).hex(),
        timestamp=iso_time(ns),
        machine=settings.machine,
        event_bytes=event_bytes,
        effort=effort.get("level") if isinstance(effort, dict) else effort,
        background_tasks=len(tasks) if isinstance(tasks, list) else None,
    )
    if name == "SessionEnd":  # elsewhere it is a text
        fields["reason"] = event.get("reason")
    return gate(fields)


def opens(path: object) -> bool:
    """Whether a path in an event may be a transcript's."""
    return isinstance(path, str) and path.endswith(".jsonl")


def local_of(event: Fields, settings: Settings, ping: Fields) -> Fields:
    """What the sender needs for the ping's usage and never sends; {}: no usage."""
    transcript, agent = event.get("transcript_path"), event.get("agent_transcript_path")
    if not ("session_id" in ping and opens(transcript)):
        return {}
    if not settings.usage:
        return {"usage": False}
    shown: Fields = {"tool_names": settings.tool_names, "git": settings.git}
    local = {"transcript": transcript, **shown}
    if opens(agent):
        local["agent_transcript"] = agent
    return local


# -- Trackers: who gets what -----------------------------------------------------------
# A tracker is one class here and its name in TRACKERS; nothing else in this file knows
# it. All that it is sent is made from the gate's output: the ping, and what BESIDE lets
# through for those that need it.

# Those that open an account, and those that tokens are charged to.
SESSION_EVENTS = ("SessionStart", "Stop", "StopFailure", "SubagentStop", "SessionEnd")
ALLOW_HTTP = "http:// can be read on the way; use https:// (or TELEMHQ_ALLOW_HTTP=1)"
JSON_BODY = {
    "Content-Type": "application/json",
    "User-Agent": f"telemhq-ping/{__version__}",
}


class Request:
    """One POST: url (secret), headers, body. (None: a GET, which records nothing.)"""

    def __init__(self, url: str, headers: dict[str, str], body: bytes | None) -> None:
        self.url, self.headers, self.body = url, headers, body


class Tracker:
    """A service that takes pings, as far as all of them are alike.

    kind: its name in TELEMHQ_DESTINATIONS. variables: what it is set up with: the URL,
    what must never be shown, others. events: those that it wants (none: all). needs:
    what of BESIDE it is given. asked: the path where a GET shows whether it takes us.
    reads: how much of a 200's body says more than 200. url: where it is; secret: what
    it knows us by. own: texts for its bodies, by its own variables. nothing: a body
    that records nothing, where a GET says less. Skipped: why none can be made of the
    settings.
    """

    kind = ""
    variables: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    asked = ""
    dislike = "it may not like a field, or the size"  # why it refuses, most likely
    reads = 0

    def __init__(self, url: str, secret: str = "") -> None:
        self.url, self.secret = url, secret
        self.own: dict[str, str] = {}
        self.nothing: Fields | None = None
        self.headers = dict(JSON_BODY)
        if secret:
            self.headers["Authorization"] = f"Bearer {secret}"

    def directory_name(self) -> str:
        """Its directory's name, which tells neither the URL nor the secret."""
        known_by = "\n".join(filter(None, (self.url, self.secret)))
        return f"{self.kind}-{sha256_hex(known_by.encode())[:12]}"

    def wants(self, ping: Fields) -> bool:
        """Whether a ping concerns it: others are not even queued."""
        return not self.events or ping.get("event") in self.events

    def frozen(self, ping: Fields) -> dict[str, str]:
        """Its own texts, to wait beside the ping: the sender may be another session's,
        with other settings."""
        project = str(ping.get("project"))
        return {k: clean(t.replace("{project}", project)) for k, t in self.own.items()}

    def requests(self, ping: Fields, beside: Fields) -> list[Request]:
        """What is sent of a ping, in this order; the same bytes at every repeat."""
        raise NotImplementedError

    def refuses(self, _: bytes) -> bool:
        """Whether the beginning of a 200's body says that the ping was refused."""
        return False

    def check(self) -> Request:
        """A request that records nothing, and shows whether the tracker takes us."""
        if self.nothing:
            return self.post("", self.nothing)
        return Request(self.url + self.asked, self.headers, None)

    def post(self, path: str, fields: Fields) -> Request:
        """A request with a JSON body."""
        return Request(self.url + path, self.headers, encode_json(fields).encode())


def url_in(settings: Settings, name: str, default: str = "") -> str:
    """The URL in a variable; Skipped when it is none that a ping may go to."""
    url = settings.environ.get(name) or default
    if not url:
        raise Skipped(f"{name} is not set")
    try:
        scheme, host = split_url(url)
        if scheme == "http" and not (settings.allow_http or loopback(host)):
            raise ValueError(ALLOW_HTTP)
    except ValueError as error:
        raise Skipped(f"{name} is not usable: {error}") from None
    return url


def secret_in(settings: Settings, name: str, path: str = "") -> str:
    """A token that may stand in a header, in a variable or else in a file (~ is home)
    that only its owner can read; Skipped says what is wrong, and not it."""
    text, file = settings.environ.get(name, ""), absolute(path) or ""
    if not text and os.path.isfile(file):
        found = os.stat(file)
        if os.name == "posix" and (
            found.st_mode & 0o077 or found.st_uid != os.getuid()
        ):
            raise Skipped(f"{path} can be read by others: chmod 600 mends that")
        with open(file, encoding="ascii", errors="replace") as opened:
            text = opened.read(PATH_MAX_CHARS)
    text = text.strip()
    if not text:
        raise Skipped(f"{name} is not set")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise Skipped(f"{name} is not usable: it has characters that no token has")
    return text


class TelemHQ(Tracker):
    """TelemHQ (public docs): the ping is the body, the token is in the URL's path."""

    kind = "telemhq"
    variables = ("TELEMHQ_PING_URL",)

    def __init__(self, settings: Settings) -> None:
        super().__init__(url_in(settings, "TELEMHQ_PING_URL", settings.url))

    def requests(self, ping: Fields, _: Fields) -> list[Request]:
        """The ping as it is; a repeat of it has the same Idempotency-Key."""
        headers = {"Idempotency-Key": ping["event_id"], **self.headers}
        return [Request(self.url, headers, encode_json(ping).encode())]


class Wigtoken(Tracker):
    """wigtoken (server 0.3): a row for each API message. The server knows a row by its
    id and keeps the first, so that a repeat is harmless; it ignores project and
    session, and wants a name for the machine."""

    kind = "wigtoken"
    variables = ("WIGTOKEN_SERVER", "WIGTOKEN_TOKEN", "WIGTOKEN_MACHINE")
    events = SESSION_EVENTS
    needs = ("own", "messages")
    ROWS_MAX = 1000  # more in a request: 413

    def __init__(self, settings: Settings) -> None:
        url = url_in(settings, "WIGTOKEN_SERVER").rstrip("/") + "/api/ingest/messages"
        super().__init__(url, secret_in(settings, "WIGTOKEN_TOKEN"))
        machine = settings.environ.get("WIGTOKEN_MACHINE") or settings.machine
        if not machine:
            raise Skipped("WIGTOKEN_MACHINE is not set; the server demands a name")
        if not identifier(machine) or ":" in machine:
            text = "only letters, digits and _ . - may be in it"
            raise Skipped(f"WIGTOKEN_MACHINE is not usable: {text}")
        self.own = {"machine": machine}
        self.nothing = {**self.own, "messages": []}

    def requests(self, _: Fields, beside: Fields) -> list[Request]:
        """The messages charged, some at a time."""
        rows = [
            {
                "message_id": message,
                "model": model,
                "ts": iso_time(ms * 10**6),
                "input_tokens": counts[0],
                "output_tokens": counts[1],
                "cache_read_input_tokens": counts[2],
                "cache_creation_input_tokens": counts[3],
            }
            for message, model, ms, *counts in beside.get("messages", ())
        ]
        machine = (beside.get("own") or self.own)["machine"]
        most = range(0, len(rows), self.ROWS_MAX)
        parts = [rows[first : first + self.ROWS_MAX] for first in most]
        return [self.post("", {"machine": machine, "messages": part}) for part in parts]


class Recorder(Tracker):
    """Recorder (its recipe, CLI and SDK): a request a value, four values a session,
    under a prefix that is chosen for each project. Nothing is known of how it takes a
    repeat: the comment tells one."""

    kind = "recorder"
    variables = ("RECORDER_URL", "RECORDER_PAT", "RECORDER_PREFIX")
    events = SESSION_EVENTS  # or a session that ends without a word is never told
    needs = ("own", "since_end")
    URL = "https://api.recorder.nasebanal.com"
    NAMES = ("/Input", "/Output", "/CacheRead", "/CacheCreate")  # as TOKENS has them

    def __init__(self, settings: Settings) -> None:
        url = url_in(settings, "RECORDER_URL", self.URL).rstrip("/") + "/api/v1/records"
        super().__init__(url, secret_in(settings, "RECORDER_PAT"))
        prefix = settings.environ.get("RECORDER_PREFIX", "").strip().rstrip("/")
        if not line_of_text(prefix):
            text = "is not set for this project (to a line of text)"
            raise Skipped(f"RECORDER_PREFIX {text}")
        self.own = {"prefix": prefix}

    def requests(self, ping: Fields, beside: Fields) -> list[Request]:
        """What the session used, when it ends (again: since it last did)."""
        used, prefix = beside.get("since_end", {}), beside.get("own", {}).get("prefix")
        ends = ping.get("event") in ("SessionEnd", "SessionLost")
        if not (ends and prefix and any(used.values())):
            return []
        alike = {
            "unit": "tokens",
            "data_type": "integer",
            "chart_type": "line",
            "recorded_at": ping.get("timestamp"),
            "comment": f"telemhq_ping {ping['event_id']}",
        }
        return [
            self.post("", {"name": prefix + name, "value": used.get(count, 0), **alike})
            for count, name in zip(TOKENS, self.NAMES)
        ]


OTLP_NAMES = {  # the GenAI conventions' or the client's own telemetry's -> the ping's
    "gen_ai.provider.name": "provider",
    "gen_ai.response.model": "model",
    "gen_ai.conversation.id": "session_id",
    "session.id": "session_id",
    "prompt.id": "prompt_id",
    "gen_ai.usage.input_tokens": "all_input",
    "gen_ai.usage.cache_read.input_tokens": "cached_input_tokens",
    "gen_ai.usage.cache_creation.input_tokens": "cache_creation_input_tokens",
    "gen_ai.usage.output_tokens": "output_tokens",
}
OTLP_TYPES: dict[type, str] = {
    str: "stringValue",
    bool: "boolValue",
    int: "intValue",
    float: "doubleValue",
}
OTLP_ELSEWHERE = ("input_tokens", "timestamp", "event", "hook_version")


class OTLP(Tracker):
    """OpenTelemetry: a log record a ping, OTLP/HTTP with JSON (its specification: names
    in lowerCamelCase, 64-bit integers as strings, nanoseconds). At least once:
    telemhq.event_id tells a repeat."""

    kind = "otlp"
    variables = ("TELEMHQ_OTLP_ENDPOINT", "TELEMHQ_OTLP_HEADERS")
    dislike = "it may take protobuf only, and no JSON"
    reads = 4096
    INFO, ERROR = 9, 17

    def __init__(self, settings: Settings) -> None:
        url = url_in(settings, "TELEMHQ_OTLP_ENDPOINT").rstrip("/")
        super().__init__(url if url.endswith("/v1/logs") else url + "/v1/logs")
        self.secret = settings.environ.get("TELEMHQ_OTLP_HEADERS", "")
        try:
            self.headers = {**self.headers_in(self.secret), **JSON_BODY}
        except ValueError:
            text = "it must be Name=value,Name=value (%2C is a comma, %20 a space)"
            raise Skipped(f"TELEMHQ_OTLP_HEADERS is not usable: {text}") from None
        self.nothing = {"resourceLogs": []}

    @staticmethod
    def headers_in(text: str) -> dict[str, str]:
        """Name=value,... with %XX in the values, as OpenTelemetry's own variables have
        it; ValueError when it is not so."""
        found = {}
        for pair in filter(None, map(str.strip, text.split(","))):
            name, equals, value = map(str.strip, pair.partition("="))
            first, *rest = value.split("%")
            value = first + "".join(chr(int(p[:2], 16)) + p[2:] for p in rest)
            good = identifier(name) and value.isascii() and value.isprintable()
            if not (equals and good):
                raise ValueError("no header")
            found[name] = value
        return found

    def requests(self, ping: Fields, _: Fields) -> list[Request]:
        """The one record. (Back ends that do not know eventName yet show the body.)"""
        name = f"claude_code.{ping.get('event')}"
        failed = ping.get("status") == "failed"
        when_s = seconds_of(ping.get("timestamp"))
        record = {
            "timeUnixNano": str(round(when_s * 1000) * 10**6),
            "severityNumber": self.ERROR if failed else self.INFO,
            "eventName": name,
            "body": {"stringValue": name},
            "attributes": self.attributes({"event.name": name, **self.named(ping)}),
        }
        scope = {"name": "telemhq_ping", "version": ping.get("hook_version", "")}
        resource = {"attributes": self.attributes({"service.name": "claude-code"})}
        scopes = [{"scope": scope, "logRecords": [record]}]
        logs = [{"resource": resource, "scopeLogs": scopes}]
        return [self.post("", {"resourceLogs": logs})]

    @staticmethod
    def named(ping: Fields) -> Fields:
        """A ping's fields under the names that attributes have."""
        ping = with_all_input(ping)
        found = {name: ping[key] for name, key in OTLP_NAMES.items() if key in ping}
        for field in ping:
            if field not in (*OTLP_NAMES.values(), *OTLP_ELSEWHERE):
                found[f"telemhq.{field}"] = ping[field]
        return found

    def attributes(self, fields: Fields) -> list[Fields]:
        """Fields as KeyValues, the inner ones of objects laid flat. An attribute keeps
        its type: a cost is a double, also when it is 0."""
        found: list[Fields] = []
        for name, value in fields.items():
            if isinstance(value, dict):
                inner = {f"{name}.{key}": deeper for key, deeper in value.items()}
                found += self.attributes(inner)
                continue
            kind = float if name.endswith("cost_usd") else type(value)
            told = str(value) if kind is int else kind(value)
            found.append({"key": name, "value": {OTLP_TYPES[kind]: told}})
        return found

    def refuses(self, body: bytes) -> bool:
        """A partial success rejects the one record: it must not be sent again."""
        try:
            partial = decode_json(body.decode("utf-8", "replace"))["partialSuccess"]
            return int(partial["rejectedLogRecords"]) > 0
        except (ValueError, KeyError, TypeError):
            return False


METRICS_KINDS = {
    "Notification": "notification",
    "PreCompact": "pre_compact",
    "SubagentStop": "subagent_stop",
}


class ClaudeMetrics(Tracker):
    """Claude Metrics (its plugin 0.4.0; the server is not public): the metadata of what
    the plugin sends. Never a prompt, a response or an e-mail address."""

    kind = "claude-metrics"
    variables = (
        "CLAUDE_METRICS_API_URL",
        "CLAUDE_METRICS_API_TOKEN",
        "CLAUDE_METRICS_DISABLED",
    )
    needs = ("totals",)
    asked = "/session"
    URL, FILE = "http://127.0.0.1:8000/api/v1", "~/.claude-metrics/token"
    PATHS = (  # to where an event is told; one with tokens is an execution, too
        ("/execution", ("Stop", "StopFailure")),
        ("/tool", ("PostToolUse", "PostToolUseFailure")),
        ("/system", tuple(METRICS_KINDS)),
        ("/session", ("SessionStart", "Stop", "SessionEnd", "SessionLost")),
    )
    events = tuple(event for _, events in PATHS for event in events)
    EXECUTION = (  # response_text: the plugin sends null, too, when it has none
        "message_length=last_assistant_message_chars model duration_ms status "
        "stop_reason=error tokens_in=all_input tokens_out=output_tokens "
        "cache_read_tokens=cached_input_tokens thinking_tokens=reasoning_tokens "
        "cache_creation_tokens=cache_creation_input_tokens"
    )
    TOOL = "tool_name duration_ms error_class=error subagent_type=agent_type"
    TOTALS = (
        "tokens_in_total=all_input tokens_out_total=output_tokens "
        "tool_calls_total=tool_calls"
    )

    def __init__(self, settings: Settings) -> None:
        if settings.environ.get("CLAUDE_METRICS_DISABLED", "").lower() in ON:
            raise Skipped("CLAUDE_METRICS_DISABLED is set")
        url = (
            url_in(settings, "CLAUDE_METRICS_API_URL", self.URL).rstrip("/") + "/events"
        )
        super().__init__(
            url, secret_in(settings, "CLAUDE_METRICS_API_TOKEN", self.FILE)
        )
        # Without it, Laravel answers what it does not accept with a redirect.
        self.headers["Accept"] = "application/json"

    def requests(self, ping: Fields, beside: Fields) -> list[Request]:
        """One of each kind that the event is."""
        found = []
        for path, events in self.PATHS:
            used = path == "/execution" and ping.get("total_tokens")
            if used or ping.get("event") in events:
                found.append(self.post(path, self.body(path, ping, beside)))
        return found

    def body(self, path: str, ping: Fields, beside: Fields) -> Fields:
        """What every kind begins with, and its own; event_id is a UUID, and another one
        for each request of a ping. A session is known by its own id."""
        client = {"client": f"telemhq_ping {ping.get('hook_version')}"}
        found = {**picked(ping, "session_id"), "client_meta": client}
        if path == "/session":
            ends = "ended_at=timestamp exit_kind=reason"
            names = {"SessionStart": "started_at=timestamp", "Stop": ""}
            own = picked({"reason": "lost", **ping}, names.get(ping["event"], ends))
            totals = with_all_input(beside.get("totals", {}))
            return {**found, **own, **picked(totals, self.TOTALS)}
        from uuid import NAMESPACE_URL, uuid5

        key = str(uuid5(NAMESPACE_URL, f"{ping['event_id']}{path}"))
        found.update(picked(ping, "turn_id=prompt_id permission_mode"), event_id=key)
        if path == "/execution":
            tools = ping.get("tools", {}).items()
            used = [{"name": name, "count": calls} for name, calls in tools]
            found.update(picked(with_all_input(ping), self.EXECUTION), tools_used=used)
            return {**found, "response_text": None}
        if path == "/tool":
            success = ping.get("status") == "success"
            return {**found, **picked(ping, self.TOOL), "success": success}
        payload = picked(ping, "notification_type trigger agent_id agent_type")
        return {**found, "kind": METRICS_KINDS[ping["event"]], "payload": payload}


def picked(ping: Fields, names: str) -> Fields:
    """The fields named that a ping has; `theirs=ours`: under a tracker's name."""
    found = {}
    for word in names.split():
        name, _, field = word.partition("=")
        if (field or name) in ping:
            found[name] = ping[field or name]
    return found


def with_all_input(counts: Fields) -> Fields:
    """The same, with all tokens that went in, which TelemHQ's names tell apart."""
    if "input_tokens" not in counts:
        return counts
    names = ("input_tokens", "cached_input_tokens", "cache_creation_input_tokens")
    return {**counts, "all_input": sum(int(counts.get(name, 0)) for name in names)}


TRACKERS: dict[str, Callable[[Settings], Tracker]] = {
    found.kind: found for found in (TelemHQ, Wigtoken, Recorder, OTLP, ClaudeMetrics)
}


def find_trackers(settings: Settings) -> tuple[list[Tracker], list[str]]:
    """The trackers that the settings name; and why others that they name are none."""
    trackers, problems = [], []
    for name in settings.destinations:
        try:
            if name not in TRACKERS:
                known = ", ".join(TRACKERS)
                raise Skipped(f"TELEMHQ_DESTINATIONS: {name!r} is none of {known}")
            trackers.append(TRACKERS[name](settings))
        except Skipped as why:
            problems.append(str(why))
    return trackers, problems


# -- Outbox: what waits, on disk -------------------------------------------------------

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # or opening a FIFO waits for its other end


def unsound(directory: str) -> str:
    """Why `directory` must not be used, or "" (also when it is not there yet)."""
    try:
        found = os.lstat(directory)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or "cannot be read"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory, or a symbolic link"
    if os.name != "posix":
        return ""
    if found.st_uid != os.geteuid():
        return "belongs to someone else"
    return "can be written by others" if found.st_mode & 0o022 else ""


def write_file(path: str, content: bytes) -> None:
    """Make `path` hold `content`, all or nothing, 0600 (the umask is 077)."""
    directory, name = os.path.split(path)
    unfinished = os.path.join(directory, f".{name}.{os.urandom(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW
    fd = os.open(unfinished, flags, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        rename(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise


def rename(path: str, target: str) -> None:
    """Move a file onto another. Windows refuses while someone has that open."""
    for _ in range(20):
        try:
            os.replace(path, target)
            return
        except PermissionError:
            time.sleep(0.02)
    os.replace(path, target)


def open_regular(path: str) -> int:
    """A descriptor to read a regular file; ValueError when it is anything else."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("not a regular file")
    return os.open(path, os.O_RDONLY | NO_WAIT | NO_FOLLOW)


def read_file(path: str, most: int) -> bytes:
    """A regular file's bytes; ValueError when it is none, or has more than `most`."""
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError("too large")
    return content


def read_object(path: str, most: int) -> Fields:
    """A file's JSON object; ValueError when it holds none, OSError as it comes."""
    found = decode_json(read_file(path, most).decode("utf-8", "replace"))
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def remove(path: str) -> None:
    """Delete a file or an empty directory, if that can be."""
    for delete in (os.unlink, os.rmdir):
        try:
            delete(path)
        except OSError:
            continue


def age_s(path: str) -> float:
    """Seconds since a file was written, 0 when it is gone."""
    try:
        return time.time() - os.lstat(path).st_mtime
    except OSError:
        return 0.0


def unlock(lock: int) -> None:
    """Give a lock back, also from a hook just ending that still shares it."""
    try:
        with open(lock, "rb"):  # which closes it
            if os.name == "posix":
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_UN)
    except (OSError, ValueError):
        pass  # there can be none


class Record:
    """What the file of a ping that waits holds. ping: what is sent. local: what
    charging needs and never leaves. beside: what else the tracker needs, by the gate.
    accepted: how many of the ping's requests have been; the next ones go."""

    def __init__(
        self, ping: Fields, local: Fields, beside: Fields, accepted: int = 0
    ) -> None:
        self.ping, self.local, self.beside = ping, local, beside
        self.accepted = accepted


class PingName:
    """What the name of a ping's file tells: <time>-<event>-<session>-<event_id>.json,
    so that no file is opened to know whose it is. ns: the event's time, nanoseconds
    since 1970, 20 digits, so that names sort by age. session: 16 hex digits, which also
    name its account. (With time and id alone it is a ping, too.)"""

    def __init__(self, name: str) -> None:
        ns, *parts = name[: -len(".json")].split("-")
        self.ns = int(ns)
        self.event, self.session = parts[:2] if len(parts) == 3 else ("", "")

    @staticmethod
    def make(ns: int, ping: Fields) -> str:
        """The name of a ping's file."""
        event = "".join(filter(str.isalnum, str(ping.get("event", ""))))
        session = session_name(ping.get("session_id"))
        return f"{ns:020d}-{event}-{session}-{ping['event_id']}.json"

    @staticmethod
    def is_one(name: str) -> bool:
        """Whether a name in outbox/ is a ping's."""
        return name[:20].isdecimal() and name[20:21] == "-" and name.endswith(".json")


def session_name(session_id: object) -> str:
    """What a session is called in names of files; "" when there is none."""
    return sha256_hex(session_id.encode())[:16] if isinstance(session_id, str) else ""


class Outbox:
    """A destination's directory: the pings that wait, and all else that is kept of it.
    needs: what of BESIDE its tracker is given."""

    def __init__(self, directory: str, needs: tuple[str, ...] = ()) -> None:
        self.directory, self.needs = directory, needs

    def name(self) -> str:
        """The directory's own name: it tells the tracker, and no secret."""
        return os.path.basename(self.directory)

    def path(self, *names: str) -> str:
        """Path of something in the directory."""
        return os.path.join(self.directory, *names)

    def file(self, name: str) -> str:
        """Path of a ping's file."""
        return self.path("outbox", name)

    def account_path(self, session: str) -> str:
        """Where it is kept what of a session (its name) was charged."""
        return self.path("accounts", session + ".json")

    def need_sound(self) -> None:
        """Skipped when others may have a hand in anything from telemhq/ down."""
        for name in ("..", ".", "outbox", "refused", "accounts"):
            directory = os.path.normpath(self.path(name))
            problem = unsound(directory)
            if problem:
                raise Skipped(f"{directory} {problem}; mend or remove it")

    def waiting(self) -> list[str]:
        """Names of the pings that wait, oldest first."""
        try:
            return sorted(filter(PingName.is_one, os.listdir(self.path("outbox"))))
        except FileNotFoundError:
            return []

    def record(self, name: str) -> Record:
        """What a file holds. OSError: it is gone; ValueError: it is no ping."""
        found = read_object(self.file(name), RECORD_MAX_BYTES)
        ping = gate(object_in(found, "ping"))
        if "event_id" not in ping:
            raise ValueError("no ping")
        beside = gate_beside(object_in(found, "beside"), self.needs)
        accepted = int(number_in(found, "accepted"))
        return Record(ping, object_in(found, "local"), beside, accepted)

    def rewrite(self, name: str, record: Record) -> None:
        """Make the ping that waits under `name` this one, all or nothing."""
        write_file(self.file(name), encode_json(vars(record)).encode())

    def set_aside(self, name: str) -> None:
        """Move what can never be delivered out of the others' way, to refused/."""
        try:
            os.replace(self.file(name), self.path("refused", name))
            names = sorted(os.listdir(self.path("refused")))
            for old in names[:-REFUSED_MAX_PINGS]:
                remove(self.path("refused", old))
        except OSError:
            remove(self.file(name))

    def backoff_left_s(self) -> float:
        """Seconds until the back-off ends, 0 when none stands. One that was set in what
        is now the future is none: a clock that jumped must not stop delivery."""
        state, now = State(self), time.time()
        left_s = min(state.not_before, state.set_at + RETRY_AFTER_MAX_S) - now
        return max(0.0, left_s) if state.set_at <= now else 0.0

    def take_lock(self) -> int | None:
        """A descriptor that holds the lock, until its last holder's death at most; None
        while someone else does. Any error but "busy" counts as free (-1: there can be
        none): rather one ping twice under its id than all of them never."""
        fd = -1
        try:
            flags = os.O_RDWR | os.O_CREAT | NO_FOLLOW
            fd = os.open(self.path("lock"), flags, 0o600)
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            busy = isinstance(error, (BlockingIOError, PermissionError))
            if fd >= 0 and (busy or (os.name == "nt" and not error.errno)):  # Wine's
                os.close(fd)
                return None
        return fd


class State:
    """state.json: what a destination remembers from pass to pass.

    failures: passes that failed, in a row. set_at, not_before: when the back-off was
    set, and ends. delivered_at, swept_at, suspects_at: the last delivery, sweep, try of
    charged suspects. (Seconds since 1970, 0: never.) verdict, problem: of the last
    failure. suspects: name of a ping that failed -> how often it was charged; 0: it was
    not judged yet. losses: reason -> pings lost.
    """

    failures = set_at = not_before = delivered_at = swept_at = suspects_at = 0.0
    verdict = problem = ""

    def __init__(self, outbox: Outbox) -> None:
        """Whatever the file holds, every attribute has a value of its kind."""
        self.suspects: dict[str, int] = {}
        self.losses: dict[str, int] = {}
        try:
            found = read_object(outbox.path("state.json"), STATE_MAX_BYTES)
        except (OSError, ValueError):
            found = {}
        for name, value in found.items():
            default = getattr(self, name, None)
            if number(value) if default == 0 else isinstance(default, type(value)):
                setattr(self, name, value)

    def save(self, outbox: Outbox) -> None:
        """Write the file; a disk that refuses must not stop delivery."""
        try:
            write_file(outbox.path("state.json"), encode_json(vars(self)).encode())
        except OSError:
            pass


def outbox_of(settings: Settings, tracker: Tracker) -> Outbox:
    """The outbox of a tracker; Skipped when there is no place for it."""
    if not settings.state_dir:
        raise Skipped("there is no home directory; set TELEMHQ_STATE_DIR")
    directory = os.path.join(settings.state_dir, tracker.directory_name())
    return Outbox(directory, tracker.needs)


# -- Hook: what Claude Code runs -------------------------------------------------------

THIS_FILE = os.path.abspath(__file__)  # now, for a hook leaves its directory
START = "import sys; sys.path.insert(0, sys.argv[1]); __import__(sys.argv[2]).sender()"


def read_stdin() -> bytes:
    """All bytes of stdin, to its end: Claude Code shows an error when it is closed
    early. More than STDIN_MAX_BYTES are none."""
    raw = bytearray()
    try:
        for part in iter(lambda: os.read(0, 1 << 16), b""):  # what a pipe holds
            raw += part
            if len(raw) > STDIN_MAX_BYTES:
                return b""
    except OSError:
        pass  # it is closed
    return bytes(raw)


def event_in(raw: bytes) -> Fields:
    """The event that stdin held; Skipped when that is none of Claude Code's."""
    try:
        event: Fields = decode_json(raw.decode("utf-8", "replace").lstrip("\ufeff"))
        ours = "A" <= event["hook_event_name"][:1] <= "Z"
        # Cursor runs hooks of ~/.claude/settings.json too, with events of its own.
        if ours and "cursor_version" not in event:
            return event
    except (ValueError, KeyError, TypeError):
        pass
    raise Skipped("stdin held no event of Claude Code's: no JSON, no name, or Cursor's")


def start_sender(
    held: dict[str, int], settings: Settings, once: bool = False
) -> Popen[bytes] | None:
    """Start a sender that outlives us, and hand it the locks of these destinations
    (names of their directories). It serves the first, and starts a sender for each of
    the others: one start is all that Claude Code waits for. once: it makes one pass,
    in debug mode it talks on our stderr; only of such a one the process is given.

    A fresh interpreter, for urllib crashes in a forked process on macOS. In a session
    of its own, without our descriptors: Claude Code kills groups and families, and
    waits for the end of its pipes."""
    os.chdir("/")  # keep no project's directory busy
    if os.name == "nt":  # no descriptor is inherited there: a sender locks for itself
        for lock in held.values():
            unlock(lock)
        held = dict.fromkeys(held, -1)
    fds = [lock for lock in held.values() if lock >= 0]
    served = [word for name, lock in held.items() for word in (str(lock), name)]
    command = [sys.executable, "-I", "-S", "-X", "lazy_imports=all", "-c", START]
    command += os.path.split(THIS_FILE[: -len(".py")])
    command += ["once" if once else "detached", *served]
    try:
        if not once and spawn(command, fds, settings.environ):
            return None
        from subprocess import DEVNULL, Popen

        return Popen(
            command,
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=None if once and settings.debug else DEVNULL,
            env=settings.environ,
            pass_fds=fds,
            start_new_session=True,
            # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
            creationflags=0x8 | 0x200 if os.name == "nt" else 0,
        )
    finally:
        for lock in fds:
            os.close(lock)


def spawn(command: list[str], fds: list[int], environ: dict[str, str]) -> bool:
    """Start a process without the import of subprocess, 8 ms; whether that works here.
    fds: what it inherits."""
    try:
        for fd in map(int, os.listdir("/dev/fd")):
            try:
                os.set_inheritable(fd, fd in fds)
            except OSError:
                continue  # the listing's own
        quiet = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in (0, 1, 2)]
        os.posix_spawn(
            command[0],
            command,
            environ,
            file_actions=quiet,
            setsid=True,
            setsigdef=[15],  # SIGTERM: our shell may ignore it
        )
    except (AttributeError, NotImplementedError, OSError):
        return False  # Windows, PyPy, Termux, no /proc; setsid=: old C libraries
    return True


def start_delivery(queued: dict[Outbox, str], settings: Settings) -> None:
    """Start a sender for the outboxes (and the name of our ping in each) where no
    back-off stands, which debug mode ignores. Where one runs already, it will see the
    file. In the foreground each makes one pass, and is waited for; where another runs,
    until that has sent our ping; FOREGROUND_S at most."""
    ends, held, busy = time.monotonic() + FOREGROUND_S, {}, []
    for outbox, name in queued.items():
        if settings.debug or not outbox.backoff_left_s():
            lock = outbox.take_lock()
            if lock is None:
                busy.append(outbox.file(name))
            else:
                held[outbox.name()] = lock
    if not settings.foreground:
        if held:
            start_sender(held, settings)
        return
    senders: list[Any] = [start_sender({n: held[n]}, settings, True) for n in held]
    while time.monotonic() < ends and (
        any(sender.poll() is None for sender in senders)
        or any(map(os.path.exists, busy))
    ):
        time.sleep(LOOK_S / 10)
    for sender in senders:
        sender.kill()  # no use to one that has ended


def enqueue(
    outbox: Outbox, tracker: Tracker, ns: int, ping: Fields, local: Fields
) -> str:
    """Put a ping into a tracker's outbox; its name. Skipped says why that cannot be."""
    outbox.need_sound()
    beside = gate_beside({"own": tracker.frozen(ping)}, tracker.needs)
    name = PingName.make(ns, ping)
    try:
        # Only here: what `uninstall` has removed must not come back.
        for part in ("outbox", "refused"):
            os.makedirs(outbox.path(part), exist_ok=True)
        outbox.rewrite(name, Record(ping, local, beside))
    except OSError as error:
        raise Skipped(f"cannot write to {outbox.directory}: {error.strerror}") from None
    return name


def report_event(settings: Settings, tell: Tell) -> None:
    """The event on stdin becomes a ping in the outboxes; Skipped says why it did not.
    No destination hinders another."""
    ns = time.time_ns()
    for text in settings.ignored:
        tell(text)
    raw = read_stdin()
    trackers, problems = find_trackers(settings)
    event = event_in(raw)
    ping = make_ping(event, settings, project_of(event, settings), ns, len(raw))
    local = local_of(event, settings, ping)
    queued = {}
    for tracker in trackers:
        outbox = outbox_of(settings, tracker)
        try:
            if tracker.wants(ping):
                queued[outbox] = enqueue(outbox, tracker, ns, ping, local)
                tell(f"{ping['event']} {ping['event_id']} is in the outbox")
        except Skipped as why:
            problems.append(str(why))
    start_delivery(queued, settings)
    if problems:
        raise Skipped("; ".join(problems))


def silent(_: str) -> None:
    """Tell nobody."""


def tell_on_stderr(text: str) -> None:
    """Tell a person who set TELEMHQ_HOOK_DEBUG."""
    try:
        os.write(2, f"TelemHQ hook{text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def run_for_claude_code(work: Callable[[Settings, Tell], None]) -> NoReturn:
    """Hook or sender, to the end of the process: never fails, prints only in debug
    mode. This is the one broad boundary: Claude Code never notices."""
    tell: Tell = silent
    try:
        for fd in (0, 1, 2):
            try:
                os.fstat(fd)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # or a file of ours would be our stdin
        os.umask(0o077)
        settings = Settings(dict(os.environ))
        if settings.debug:
            tell = tell_on_stderr
        if sys.version_info < (3, 8):
            raise Skipped("it needs Python 3.8 or newer")
        work(settings, lambda text: tell(": " + text))
    except Skipped as reason:
        tell(f" skipped: {reason}")
    except BaseException as error:  # noqa: BLE001
        tell(f" skipped: {error!r}")
    os._exit(0)


def mend_bytecode() -> None:
    """Close a __pycache__ that a umask of 000 left open to others: Python would run
    what they put there. As a script, remove bytecode that cannot be loaded: Python
    never does, and the settings' command imports it in vain."""
    directory, name = os.path.split(THIS_FILE[: -len(".py")])
    cache = os.path.join(directory, "__pycache__")
    path = os.path.join(cache, f"{name}.{sys.implementation.cache_tag}.pyc")  # PEP 3147
    mode = os.stat(cache).st_mode
    if mode & 0o022:
        os.chmod(cache, stat.S_IMODE(mode) & ~0o022)
        remove(path)
    if __name__ == "__main__":
        import marshal

        try:
            marshal.loads(read_file(path, STATE_MAX_BYTES)[16:])
        except (EOFError, ValueError, TypeError):
            remove(path)


def hook() -> NoReturn:
    """What Claude Code runs."""
    try:
        mend_bytecode()
    except OSError:
        pass  # there is none
    run_for_claude_code(report_event)


# ======================================================================================
# All above runs while Claude Code waits; all below in the background, in a sender.
# (Foreground and debug mode: Claude Code waits for the sender as well.)
# ======================================================================================


# -- Transcripts: rows that count ------------------------------------------------------

INTERRUPTED = "[Request interrupted by user"  # the client's words, in a row of its own
NEEDLES = (b'"usage"', b'"is_error":true', b'"cost-state"', INTERRUPTED.encode())
COUNTS = (  # in the order of TOKENS, which has their total behind them
    "input_tokens output_tokens cache_read_input_tokens cache_creation_input_tokens "
    "thinking_tokens"
).split()
LEDGER_COUNTS = (
    "inputTokens outputTokens cacheReadInputTokens cacheCreationInputTokens "
    "thinkingTokens"
).split()
LEDGER_SUMS = {  # the ping's name -> the ledger's
    "cost_usd": "totalCostUSD",
    "lines_added": "totalLinesAdded",
    "lines_removed": "totalLinesRemoved",
}
NO_LEDGER: list[Any] = [{}, {}, {}]
NONE = [0] * len(COUNTS)
OUTPUT = 1  # the output tokens' place


def matters(line: bytes) -> bool:
    """Whether a line of a transcript may hold a count, or begin a turn, by its bytes.
    Tools' results are most of the file."""
    begins = b'"promptId"' in line and b'"tool_result"' not in line
    return begins or any(needle in line for needle in NEEDLES)


def short_id(text: str) -> str:
    """What is kept of an id: ID_CHARS, enough to know it again."""
    return path_hash(text, "")


def counts_in(usage: Fields) -> list[int]:
    """The counts of an answer's usage."""
    usage = {**usage, **object_in(usage, "output_tokens_details")}
    return [int(number_in(usage, name)) for name in COUNTS]


def added(models: Models, more: Models) -> Models:
    """The sum, model by model, count by count."""
    sums = dict(models)
    for name, counts in more.items():
        sums[name] = [a + b for a, b in zip(sums.get(name, NONE), counts)]
    return sums


class Row:
    """A line of a transcript that counts, or begins a turn. What it lacks or has
    otherwise than expected raises: the format is internal to the client. at: when it
    was written, seconds since 1970; where it does not tell, as the row before it."""

    at = 0.0

    @staticmethod
    def parse(line: bytes) -> Row | None:
        """The row that a line holds, None when it holds none of ours."""
        try:
            fields = decode_json(line.decode("utf-8", "replace"))
            row = ROWS[fields["type"]](fields)
            row.at = seconds_of(fields.get("timestamp"))
            return row
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class AnswerRow(Row):
    """One content block of an answer of the API, with the whole answer's usage. key:
    what the answer is known by; name, request: the message's and the API's own ids.
    copied: from another session; origin: which, if it tells; branched: by /branch.
    stop_reason: None while it is not whole. calls: of tools, short id -> name. inner:
    (model, counts) of other models' calls in it."""

    def __init__(self, fields: Fields) -> None:
        message, session = fields["message"], fields.get("sessionId")
        self.request = str(fields.get("requestId") or "")
        self.name = str(message.get("id") or self.request or fields["uuid"])
        self.key = short_id(self.name) + short_id(self.request)[:4]
        self.counts = counts_in(message["usage"])
        if message.get("model") == "<synthetic>" or fields.get("isApiErrorMessage"):
            raise ValueError("words of the client's own")
        self.model = model_shown(message.get("model"))
        self.stop_reason = message.get("stop_reason")
        self.origin = fields.get("requestSessionId", session)
        self.branched = bool(fields.get("forkedFrom"))
        self.copied = self.origin != session or self.branched
        self.calls: Fields = {}
        content = message.get("content")
        for block in content if isinstance(content, list) else ():
            if block.get("type") == "tool_use" and isinstance(block.get("id"), str):
                self.calls[short_id(block["id"])] = block.get("name")
        self.inner = [
            (model_shown(call.get("model")), counts_in(call))
            for call in message["usage"].get("iterations") or ()
            if call.get("type") == "advisor_message"
        ]
        self.branch = fields.get("gitBranch")


class UserRow(Row):
    """A prompt, results of tools, or what the client put in. failed: short ids of the
    tool calls that failed. interrupt: it tells of one. prompt: it begins a turn."""

    def __init__(self, fields: Fields) -> None:
        content = fields["message"].get("content")
        blocks = content if isinstance(content, list) else []
        results = [block for block in blocks if block.get("type") == "tool_result"]
        failed = [block for block in results if block.get("is_error") is True]
        self.failed = [short_id(str(block.get("tool_use_id"))) for block in failed]
        said = "".join([str(block.get("text")) for block in blocks])
        self.interrupt = said.startswith(INTERRUPTED)
        inserted = fields.get("isMeta") or fields.get("isCompactSummary")
        self.prompt = not (results or self.interrupt or inserted)


class LedgerRow(Row):
    """The client's own sums of a session so far. ledger: [model -> counts, model ->
    USD, name in LEDGER_SUMS -> sum]."""

    def __init__(self, fields: Fields) -> None:
        models: Models = {}
        costs: dict[str, float] = {}
        for name, used in fields["modelUsage"].items():
            shown = model_shown(name)
            counts = [int(number_in(used, count)) for count in LEDGER_COUNTS]
            models = added(models, {shown: counts})
            costs[shown] = costs.get(shown, 0) + number_in(used, "costUSD")
        sums = {ours: number_in(fields, name) for ours, name in LEDGER_SUMS.items()}
        self.ledger = [models, costs, sums]


ROWS = {"assistant": AnswerRow, "user": UserRow, "cost-state": LedgerRow}


def rows_behind(path: str, place: Fields, ends: float) -> Iterator[Row]:
    """The rows of a transcript behind a place, which moves on; one at which the reader
    stops is read again next time. place: offset, and inode (a text, for JSON readers
    lose digits); {}: the begin. OSError or ValueError: it cannot be read; TimeoutError:
    not to its end by `ends` (monotonic)."""
    with open(open_regular(path), "rb") as file:
        inode, at, whole = str(os.fstat(file.fileno()).st_ino), 0.0, True
        offset = place.get("offset", 0)
        file.seek(max(0, offset - 1))
        if inode != place.get("inode") or (offset and file.read(1) != b"\n"):
            offset = file.seek(0)  # another file, or not what it was
        place.update(inode=inode, offset=offset)
        for line in iter(lambda: file.readline(LINE_MAX_BYTES), b""):
            begins, whole = whole, line.endswith(b"\n")
            # The parts of one that is too long are no lines.
            row = Row.parse(line) if begins and whole and matters(line) else None
            if row is not None:
                at = row.at = row.at or at
                yield row
            if whole:
                place["offset"] = file.tell()
            if time.monotonic() > ends:
                raise TimeoutError("the rest is for the next ping")


# -- Accounts: tokens, charged once ----------------------------------------------------

USAGE_EVENTS = ("Stop", "StopFailure", "SubagentStop", "SessionEnd", "SessionLost")
HISTORY, CALLED = "history", "call"  # what else stands in `seen`
IDENTITY = "project session_id cwd_hash transcript_path_hash timestamp".split()


def less(counts: list[int], others: list[int]) -> list[int]:
    """The difference, count by count; never negative."""
    return [max(0, a - b) for a, b in zip(counts, others)]


def total(models: Models) -> list[int]:
    """The sum over all models (model -> counts)."""
    return [sum(column) for column in zip(NONE, *models.values())]


def named(counts: list[int]) -> Fields:
    """Counts as a ping has them, with their total: reasoning is part of the output."""
    return dict(zip(TOKENS, [*counts, sum(counts[:-1])]))


def gained(now: Fields, before: Fields) -> Fields:
    """What numbers have gained, name by name; never negative."""
    return {name: max(0, round(n - before.get(name, 0), 10)) for name, n in now.items()}


class Account:
    """What of a session was charged at one destination. Every attribute but `path` is
    what its file holds, a plain value of JSON.

    identity, own: of the last ping, for a SessionLost. since: older rows are history.
    transcripts: name -> the place read to, and when the last row came that ended a
    turn. seen: key of an answer -> its counts, or HISTORY; short id of a tool call ->
    CALLED, HISTORY when it failed. in_history: the main chain's last answer is.
    baseline: the ledger at the end of history, and what was told since; [] when nobody
    knows it. ledger: the client's, while it is the last word. totals: told in all;
    at_end: when the session last ended. charged: event_id -> what it is told.
    """

    def __init__(self, path: str, since: float = 0) -> None:
        self.path, self.since = path, float(since)
        self.transcript = self.model = self.branch = ""
        self.identity: Fields = {}
        self.own: Fields = {}
        self.stopped_at = self.prompted_at = 0.0
        self.in_history = False
        self.transcripts: dict[str, Fields] = {}
        self.seen: dict[str, Any] = {}
        self.baseline: list[Any] = NO_LEDGER
        self.ledger: list[Any] = []
        self.totals: Fields = dict.fromkeys((*TOKENS, "tool_calls"), 0)
        self.at_end = self.totals
        self.charged: Fields = {}

    @classmethod
    def load(cls, path: str) -> Account:
        """OSError as it comes; ValueError: the file holds no account."""
        account, found = cls(path), read_object(path, ACCOUNT_MAX_BYTES)
        for name, value in account.kept().items():
            if type(found.get(name)) is not type(value):
                raise ValueError("no account")
            setattr(account, name, found[name])
        return account

    def kept(self) -> Fields:
        """All that its file holds."""
        return {name: value for name, value in vars(self).items() if name != "path"}

    def save(self) -> None:
        """Write the file, all or nothing."""
        self.seen = dict(list(self.seen.items())[-SEEN_MAX:])
        self.charged = dict(list(self.charged.items())[-CHARGED_MAX:])
        directory = os.path.dirname(self.path)
        if not os.path.isdir(directory):
            os.mkdir(directory, 0o700)
        write_file(self.path, encode_json(self.kept()).encode())

    def files(self) -> dict[str, str]:
        """Name -> path of the session's transcripts: its own, "", and its agents', at
        any depth. The names stay where the files move."""
        from glob import escape, glob

        top = self.transcript[: -len(".jsonl")]
        agents = os.path.join(escape(top), "subagents", "**", "agent-*.jsonl")
        paths = sorted(glob(agents, recursive=True))
        return {"": self.transcript, **{os.path.relpath(p, top): p for p in paths}}

    def settle(self, usage: Reading) -> None:
        """Add what the client's ledger has gained since the baseline and nobody told
        (compaction and titles are calls of no row), its cost and lines. It is sums that
        are compared: it may name a model otherwise than rows. It is the baseline from
        now on."""
        models, costs, sums = self.ledger
        told, base_costs, base_sums = self.baseline
        left = less(total(models), total(told))
        for model, counts in models.items():
            known = told.get(model, NONE)
            more = [min(pair) for pair in zip(less(counts, known), left)]
            left = less(left, more)
            if any(more):
                usage.models = added(usage.models, {model: more})
        self.baseline = self.ledger
        usage.costs = gained(costs, base_costs)
        usage.numbers.update(gained(sums, base_sums))

    def seen_elsewhere(self, key: str) -> set[str]:
        """All that the accounts of other sessions, which have this key, have seen."""
        from glob import escape, glob

        found: set[str] = set()
        for path in glob(os.path.join(escape(os.path.dirname(self.path)), "*.json")):
            try:
                if key.encode() in read_file(path, ACCOUNT_MAX_BYTES):
                    found.update(Account.load(path).seen)
            except (OSError, ValueError):
                continue
        return found


def ledger_until(path: str, key: str, ends: float) -> list[Any]:
    """The last ledger in the file of a fork's parent before any answer that was not
    copied, which is what the client goes on from (none there: it begins anew); [] when
    nobody knows. key: of the last answer that was copied."""
    found, copied = NO_LEDGER, False
    try:
        for row in rows_behind(path, {}, ends):
            if isinstance(row, LedgerRow):
                found = row.ledger
            elif isinstance(row, AnswerRow):
                if copied and row.key != key:
                    break
                copied = copied or row.key == key
    except (OSError, ValueError):
        return []
    return found if copied else []


def end_of_earlier_runs(path: str, until: float, ends: float) -> float:
    """When that began which follows the last ledger with an answer behind it: what
    stands before was told by whoever served the earlier run; 0: there was none."""
    since, begun = 0.0, -1.0  # no ledger yet
    for row in rows_behind(path, {}, ends):
        if row.at > until:
            break
        begun = 0.0 if isinstance(row, LedgerRow) else begun or row.at
        # (After SIGINT, the one broken off stands behind the last ledger.)
        if isinstance(row, AnswerRow) and row.stop_reason is not None:
            since = max(since, begun)
    return since


class Reading:
    """A look, or several, at what the transcripts of an account's session have gained.
    until: the time of the event. ends: monotonic. first: there may be a history that
    nobody knows yet. parent: of a fork: its parent's file, key of the last answer
    copied. models: model -> counts; costs: -> USD. tools: name -> calls. numbers: a
    ping's others. rows: as BESIDE has them, of what each answer has gained."""

    def __init__(self, account: Account, until: float, ends: float) -> None:
        self.account, self.ends = account, ends
        self.until = until + 0.001  # rows tell their time in milliseconds
        self.tool_names = True
        self.first = bool(account.since) and not account.transcripts
        self.parent: tuple[str, str] | None = None
        self.elsewhere: set[str] | None = None if self.first else set()
        self.models: Models = {}
        self.costs: Fields = {}
        self.tools: dict[str, int] = {}
        self.numbers: Fields = {"tool_calls": 0, "tool_failures": 0}
        self.rows: list[list[Any]] = []
        # The first answer of each id: some routers give many answers the same.
        self.firsts = {key[:ID_CHARS]: key for key in reversed(account.seen)}

    def read(self) -> bool:
        """Count what was gained; False: a part. The session's own comes first: agents'
        files may begin with copies of its rows. OSError or ValueError: one cannot be
        read."""
        account = self.account
        try:
            if self.first:
                begun = end_of_earlier_runs(account.transcript, self.until, self.ends)
                account.since, self.first = max(account.since, begun), False
            for name, path in account.files().items():
                if not name or os.path.isfile(path):
                    self.read_one(name, path)
        except TimeoutError:
            return False
        if self.parent and not account.baseline:  # now, for that one may go on
            path = os.path.join(os.path.dirname(account.transcript), self.parent[0])
            account.baseline = ledger_until(path, self.parent[1], self.ends)
        self.parent = None
        return True

    def read_one(self, name: str, path: str) -> None:
        """Count what one transcript has gained, up to the event's time: the client
        writes agents' rows a little later."""
        account, main = self.account, not name
        place = account.transcripts.setdefault(name, {"ended_at": 0.0})
        for row in rows_behind(path, place, self.ends):
            if row.at > self.until + (LAG_S if name else 0):
                break  # a later ping's
            if isinstance(row, AnswerRow):
                counts = self.count_answer(row, main)
                if counts and row.stop_reason not in (None, "tool_use"):
                    place["ended_at"] = row.at
            elif isinstance(row, UserRow):
                self.count_user(row, main)
            elif isinstance(row, LedgerRow) and main:
                account.ledger = row.ledger
                if account.in_history:
                    account.baseline = row.ledger

    def is_history(self, row: AnswerRow) -> bool:
        """Whether an answer not seen before was told, or used, before our time."""
        account = self.account
        if row.copied or row.at < account.since:
            return True
        if self.elsewhere is None:
            self.elsewhere = account.seen_elsewhere(row.key)
        return row.key in self.elsewhere

    def count_answer(self, row: AnswerRow, main: bool) -> bool:
        """Count an answer's tokens, once, and its tool calls; False: it is history."""
        seen = self.account.seen
        new = row.key not in seen
        if new and self.is_history(row):
            seen[row.key] = HISTORY
        past = seen.get(row.key) == HISTORY
        if main:
            self.note(row, past, new)
        if past:
            return False
        self.gain(row.key, row.model, row.counts, row)
        for n, (model, counts) in enumerate(row.inner):
            self.gain(short_id(f"{row.key} {n}"), model, counts)
        for call, name in row.calls.items():
            if call not in seen:
                seen[call] = CALLED
                self.numbers["tool_calls"] += 1
                if identifier(name):
                    tool = tool_shown(name, self.tool_names)
                    self.tools[tool] = self.tools.get(tool, 0) + 1
        return True

    def note(self, row: AnswerRow, past: bool, new: bool) -> None:
        """Note what the main chain's newest answer tells."""
        account = self.account
        if not past:
            account.in_history, account.model = False, row.model
            account.branch = str(row.branch) if branch_name(row.branch) else ""
            if row.stop_reason is not None:
                account.ledger = []  # no last word any more
        elif new:
            # /branch begins a ledger anew; of others it is found behind the history.
            account.baseline = NO_LEDGER if row.branched else []
            account.in_history = not row.branched
            copied = row.copied and identifier(row.origin)
            self.parent = (f"{row.origin}.jsonl", row.key) if copied else None
            account.ledger = []

    def gain(
        self, key: str, model: str, counts: list[int], row: AnswerRow | None = None
    ) -> None:
        """Count what an answer has gained: in older rows the output may be partial, and
        some routers begin with none at all. row: for a tracker that keeps the first row
        of each id, which then is one of its own for what was gained later."""
        known = self.account.seen.setdefault(key, NONE)
        more = less(counts, known)
        if counts[OUTPUT] < known[OUTPUT] or not any(more):
            return
        self.account.seen[key] = [max(pair) for pair in zip(known, counts)]
        self.models = added(self.models, {model: more})
        if row and identifier(row.name):
            first = self.firsts.setdefault(key[:ID_CHARS], key)
            name = row.name if first == key else f"{row.name}.{row.request}"
            name += f".{counts[OUTPUT]}" if any(known) else ""
            self.rows.append([name, model, int(row.at * 1000), *more])

    def count_user(self, row: UserRow, main: bool) -> None:
        """Count failed tools and interrupts; note that a prompt begins a turn."""
        account, seen = self.account, self.account.seen
        for call in row.failed:
            if seen.get(call) == CALLED:
                seen[call] = HISTORY
                self.numbers["tool_failures"] += 1
        if main and row.at >= account.since:
            if row.interrupt:
                self.numbers["interrupts"] = self.numbers.get("interrupts", 0) + 1
            if row.prompt:
                account.prompted_at = row.at

    def fields(self, model: str) -> Fields:
        """The fields of a ping. model: the main chain's last."""
        fields = {**named(total(self.models)), **self.numbers, "model": model}
        models = {name: named(counts) for name, counts in self.models.items()}
        for name in filter(self.costs.get, self.costs):
            models.setdefault(name, {})["cost_usd"] = self.costs[name]
        if models and list(models) != [model]:
            fields["models"] = models
        if self.tools:
            used = sorted(self.tools.items(), key=lambda pair: (-pair[1], pair[0]))
            fields["tools"] = dict(used[:20])
        return fields


def open_account(outbox: Outbox, name: str, ping: Fields) -> Account:
    """The account of a ping's session. One that meets it in its middle begins where we
    were installed, for Esc and a denied permission fire no hook; a day before at most.
    OSError: it cannot be read, and must not be replaced. ValueError: it was damaged,
    and has begun anew."""
    path = outbox.account_path(session_name(ping["session_id"]))
    at = PingName(name).ns / 1e9
    try:
        return Account.load(path)
    except ValueError:
        account = Account(path, time.time())
        account.baseline = []
        account.save()
        raise
    except FileNotFoundError:
        pass
    ours = (THIS_FILE, outbox.path("lock"))
    installed = min(at, *(os.stat(path).st_ctime for path in ours))
    known = {"startup": 0.0, "clear": 0.0, "resume": at, "fork": at}
    source = str(ping.get("source"))  # of a SessionStart
    return Account(path, known.get(source, max(installed, at - DAY_S)))


def messages(usage: Reading, event_id: str, ms: int) -> list[list[Any]]:
    """Its rows: together what the ping says, to the token. What no answer has (the
    ledger's, or more than there may be) has a row for each model. ms: the time."""
    found, left = usage.rows[: ROWS_MAX - 200], dict(usage.models)
    for _, model, _, *counts in found:
        left[model] = less(left[model], counts)
    for model, counts in left.items():
        if any(counts):
            found.append([f"{event_id}.{model}"[:128], model, ms, *counts])
    return found


class Charge:
    """One try to give a ping its session's new usage. at: the event's time. ends: the
    session does."""

    def __init__(self, outbox: Outbox, name: str, record: Record, ends: float) -> None:
        self.outbox, self.name, self.record = outbox, name, record
        self.ping, self.local = record.ping, record.local
        self.event, self.at = str(record.ping["event"]), PingName(name).ns / 1e9
        self.ends = self.event in ("SessionEnd", "SessionLost")
        self.account = open_account(outbox, name, record.ping)
        until = {"SessionEnd": self.at + LAG_S, "SessionLost": float("inf")}
        self.reading = Reading(self.account, until.get(self.event, self.at), ends)
        self.reading.tool_names = self.local.get("tool_names") is not False

    def count(self) -> None:
        """Note what is new; for a SessionLost, too. OSError or ValueError: the
        transcript cannot be read."""
        account, event_id = self.account, self.ping["event_id"]
        if self.local.get("usage") is False:
            account.since = max(account.since, self.at)
            return
        path = str(self.local["transcript"])
        if os.path.isfile(path) or not account.transcript:
            account.transcript = path
        account.own = self.record.beside.get("own", {})
        account.identity = {k: self.ping[k] for k in IDENTITY if k in self.ping}
        if self.event in USAGE_EVENTS and event_id not in account.charged:
            account.charged[event_id] = self.tell()

    def keep(self) -> Record:
        """The ping with its usage: now or, after a crash, again. The account is saved
        with it, then the ping's file is rewritten, then it may be sent: so nothing is
        lost, and nothing told twice."""
        self.account.save()
        told = self.account.charged.get(self.ping["event_id"])
        if told is None:
            return self.record
        beside = gate_beside({**self.record.beside, **told}, self.outbox.needs)
        record = Record(gate({**self.ping, **told}), {}, beside)
        self.outbox.rewrite(self.name, record)
        return record

    def tell(self) -> Fields:
        """All that was used since the last charge: usage fields, what stands beside."""
        account, usage = self.account, self.reading
        complete = self.read_and_wait()
        if account.baseline:
            told, *sums = account.baseline
            account.baseline = [added(told, usage.models), *sums]
        if self.ends and complete and account.baseline and account.ledger:
            account.settle(usage)
        elif not complete or self.event == "SessionLost":
            usage.numbers["usage_complete"] = False
        fields = usage.fields(account.model)
        self.add_turn(fields)
        totals = {name: n + fields[name] for name, n in account.totals.items()}
        beside = {
            "messages": messages(usage, self.ping["event_id"], int(self.at * 1000)),
            "totals": totals,
            "since_end": gained(totals, account.at_end),
        }
        account.totals = totals
        account.at_end = totals if self.ends else account.at_end
        return {**fields, **gate_beside(beside, self.outbox.needs)}

    def add_turn(self, fields: Fields) -> None:
        """Add what is known of the turn that ends; note that it does."""
        account, begun = self.account, self.account.stopped_at
        # Else another hook had the turn go on from there.
        if not self.ping.get("stop_hook_active"):
            begun = account.prompted_at if account.prompted_at > begun else 0.0
        if self.event == "Stop" and 0 < begun <= self.at:
            fields["duration_ms"] = round((self.at - begun) * 1000)
        if self.local.get("git") is True:
            fields["git_branch"] = account.branch
        if self.event in ("Stop", "StopFailure"):
            account.stopped_at = self.at

    def read_and_wait(self) -> bool:
        """Read until all has come, or the event is LAG_S old: the client writes a
        turn's last row, a session's ledger after it. Whether all has."""
        lag = min(LAG_S, self.at + LAG_S - time.time())
        give_up = min(time.monotonic() + lag, self.reading.ends)
        while True:
            came = self.reading.read() and self.has_come()
            if came or time.monotonic() >= give_up:
                return came
            time.sleep(POLL_S)

    def has_come(self) -> bool:
        """Whether what the client writes at such an event is there."""
        account, name = self.account, ""
        if self.ends:
            return not account.baseline or bool(account.ledger)
        if self.event == "SubagentStop":
            agent, top = str(self.local.get("agent_transcript")), account.transcript
            name = os.path.relpath(agent, top[: -len(".jsonl")])
            if not os.path.isfile(agent):
                return True
        elif self.event != "Stop":
            return True
        ended_at: float = account.transcripts.get(name, {}).get("ended_at", 0.0)
        return ended_at > account.stopped_at


def charge(outbox: Outbox, name: str, record: Record, ends: float) -> Record | None:
    """What the file of a ping holds, with the usage in it. Its `local` is not empty.
    ends: monotonic. None: it must wait, for the disk refuses what must be remembered.
    Where nothing can be read, nothing is charged: it is for the session's next ping."""
    charges = record.ping.get("event") in USAGE_EVENTS
    off, saving = record.local.get("usage") is False, False
    path = outbox.account_path(session_name(record.ping["session_id"]))
    if not (charges or off) and os.path.exists(path):
        os.utime(path)  # its session is not lost
        return record
    for _ in range(CHARGE_TRIES):
        saving = False
        try:
            one = Charge(outbox, name, record, ends)
            one.count()
            saving = True
            return one.keep()
        except (FileNotFoundError, ValueError):
            break  # there is no such transcript; the account is damaged
        except OSError:
            time.sleep(POLL_S)
    if off or not charges:
        return record
    if saving and time.time() - PingName(name).ns / 1e9 < WAIT_MAX_S:
        return None
    fields = {**record.ping, "usage_complete": False}
    record = Record(gate(fields), {}, record.beside)
    try:
        outbox.rewrite(name, record)  # so that a repeat is the same
    except OSError:
        pass
    return record


def report_lost(outbox: Outbox, path: str, settings: Settings, ends: float) -> None:
    """Put a ping into the outbox for a session that ended without a word (kill -9,
    power), if something of it was told to nobody. path: its account's. The ping's id is
    made of what it will tell, so that a crash makes no two; today's settings shape it.
    """
    account = Account.load(path)
    reading = Reading(account, float("inf"), ends)
    reading.read()
    known, now = account.baseline[1:], account.ledger[1:]  # cost and lines
    news = reading.models or (known and now and known != now)
    ended = account.totals == account.at_end or "since_end" not in outbox.needs
    if ended and not news:
        return
    shown = dict(account.identity)
    transcript_hash = path_hash(account.transcript, settings.hash_key)
    if shown.get("transcript_path_hash") != transcript_hash:
        shown.pop("cwd_hash", None)  # hashed under another key; its path is not known
    shown.update(
        ORIGIN,
        event="SessionLost",
        status="success",
        event_id=sha256_hex(encode_json(account.kept()).encode())[:32],
        transcript_path_hash=transcript_hash,
        machine=settings.machine,
    )
    local = {"transcript": account.transcript, "tool_names": settings.tool_names}
    record = Record(gate(shown), {**local, "git": settings.git}, {"own": account.own})
    ns = int(seconds_of(shown["timestamp"]) * 1e9)
    outbox.rewrite(PingName.make(ns, shown), record)


# -- Delivery: one request, one verdict ------------------------------------------------

DELIVERED, NOT_NOW, RETRY = "delivered", "not now", "retry"
HOLD, REFUSED = "hold", "refused"
VERDICTS = {  # of statuses that do not go with their hundred
    **dict.fromkeys((408, 425, 429), NOT_NOW),  # the tracker's own word: later
    409: RETRY,  # the same ping's first try is still at work
    **dict.fromkeys((401, 402, 403, 404, 405, 407, 410, 451), HOLD),  # URL or token
}
VERDICTS_BY_HUNDRED = {2: DELIVERED, 3: HOLD, 4: REFUSED}
HOLDS = (HOLD, REFUSED)  # a person must mend something: the longer back-off
SYSTEM_CERTIFICATES = "/etc/ssl/cert.pem"  # macOS, BSD, Alpine; elsewhere none needed


class Answer:
    """What became of one request.

    what: for a person. retry_after_s: how long the tracker asked us to wait. body: what
    a 2xx begins with, as far as it says something.
    """

    body = b""

    def __init__(self, verdict: str, what: str, retry_after_s: float = 0) -> None:
        self.verdict, self.what, self.retry_after_s = verdict, what, retry_after_s


def verdict_of(status: int) -> str:
    """What becomes of a ping that was answered with this HTTP status."""
    return VERDICTS.get(status) or VERDICTS_BY_HUNDRED.get(status // 100, RETRY)


def retry_after_s(text: str | None, now: float) -> float:
    """Seconds that a Retry-After asks for (RFC 9110, 10.2.3), 0 when it is unusable."""
    from calendar import timegm
    from email.utils import parsedate

    text = (text or "").strip()
    try:
        if text.isascii() and text.isdigit():
            wait = float(text)
        else:
            wait = timegm(parsedate(text)) - now  # type: ignore[arg-type]
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0  # neither
    return min(max(wait, 0.0), RETRY_AFTER_MAX_S)


def backoff_s(verdict: str, failures: float, asked_s: float = 0) -> float:
    """Seconds to wait after the n-th failure in a row: jittered, for machines must not
    come back together, and not before the server asked for."""
    from random import uniform

    power = 2.0 ** int(min(failures, 20))
    if verdict in HOLDS:
        wait = min(HOLD_S[0] * power / 2, HOLD_S[1]) * uniform(0.5, 1)
    else:
        wait = uniform(2, min(BACKOFF_MAX_S, 2 * power))
    return max(wait, min(asked_s * uniform(1, 1.5), RETRY_AFTER_MAX_S))


def make_opener(url: str) -> OpenerDirector:
    """An opener that can do no more than it must: no redirects (urllib would turn the
    POST into a GET without a body, and call its 200 a success), no other schemes; the
    environment's proxies, but never for loopback; TLS verified. Skipped: none can."""
    from urllib import request

    scheme, host = split_url(url)
    opener = request.OpenerDirector()
    opener.add_handler(request.HTTPHandler())
    if scheme == "https":
        if not hasattr(request, "HTTPSHandler"):
            raise Skipped("this Python was built without TLS")
        opener.add_handler(request.HTTPSHandler(context=verifying_context()))
    if not loopback(host):
        proxies = request.getproxies_environment()
        spared = request.proxy_bypass_environment(host, proxies)  # type: ignore[attr-defined]
        if not spared and proxies.get(scheme, "").startswith("socks"):
            raise Skipped("SOCKS proxies are not supported")
        opener.add_handler(request.ProxyHandler(proxies))
    return opener


def verifying_context() -> SSLContext:
    """What TLS is verified with: as Claude Code does, so with NODE_EXTRA_CA_CERTS and
    without Python 3.13's strictness. The system's, too, unless others are named: a
    Python may bring none (python.org's for macOS, before its "Install Certificates").
    """
    import ssl

    context = ssl.create_default_context()
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    paths = [os.environ.get("NODE_EXTRA_CA_CERTS", "")]
    if not {"SSL_CERT_FILE", "SSL_CERT_DIR"}.intersection(os.environ):
        paths.append(SYSTEM_CERTIFICATES)
    for path in paths:
        try:
            context.load_verify_locations(path)
        except (OSError, ValueError):
            continue  # then every ping is held, and doctor says why
    return context


def post(
    opener: OpenerDirector, sent: Request, timeout_s: float, reads: int = 0
) -> Answer:
    """POST a request (GET, if it has no body). Of the response one buffer is read, at
    most; reads: how many bytes of a 2xx's body are asked for."""
    from http.client import HTTPException
    from urllib import request
    from urllib.error import URLError

    answer = None
    try:
        posted = request.Request(sent.url, sent.body, sent.headers)
        with opener.open(posted, timeout=timeout_s) as response:
            answer = answer_of(response)
            if reads and answer.verdict == DELIVERED:
                answer.body = response.read1(reads)
            return answer
    except URLError as error:  # urllib wraps what fails up to the end of sending
        broken = isinstance(error.reason, (ConnectionResetError, BrokenPipeError))
        return no_answer(error.reason, RETRY if broken else NOT_NOW)
    except (OSError, HTTPException, ValueError) as error:  # and nothing after that
        return answer or no_answer(error, RETRY)


def answer_of(response: Any) -> Answer:
    """What a response says. Interim ones (102, 103) come before it: http.client skips
    100 only. Whatever asks for a wait is the tracker's own word, no ping's fault."""
    while response.status in (102, 103):
        response.headers = None
        response.begin()  # the watchdog ends what goes on
    status, asked = response.status, response.headers.get("Retry-After")
    verdict, wait = verdict_of(status), retry_after_s(asked, time.time())
    if wait and verdict != DELIVERED:
        verdict = NOT_NOW
    return Answer(verdict, f"HTTP {status}", wait)


def no_answer(cause: object, verdict: str) -> Answer:
    """What it means that none came. verdict: RETRY when there was a connection, so that
    the ping may be the cause, else NOT_NOW."""
    ssl, text = sys.modules.get("ssl"), str(cause)
    what = getattr(cause, "strerror", "") or type(cause).__name__
    if "timed out" in text:
        what = "timed out"
    if ssl and isinstance(cause, ssl.SSLError) and "EOF" not in text:
        return Answer(HOLD, f"TLS: {getattr(cause, 'reason', '') or what}")
    proxy = text.partition("Tunnel connection failed: ")[2][:3]
    if proxy:  # its status says nothing against the ping
        return Answer(HOLD if proxy < "5" else NOT_NOW, f"proxy: HTTP {proxy}")
    return Answer(verdict, what)


# -- Sender: empties one outbox --------------------------------------------------------


def add_line(path: str, line: str, most: int) -> None:
    """Add a line to a file, which makes way for a new one when it has `most` bytes. It
    never fails: no disk may stop delivery."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_WAIT | NO_FOLLOW
    raw = line.encode("utf-8", "replace")
    try:
        with open(os.open(path, flags, 0o600), "ab", buffering=0) as file:
            size = file.tell()
            if file.write(raw) < len(raw):
                file.truncate(size)  # a full disk: the line or nothing
        if size + len(raw) > most:
            rename(path, path + ".1")
    except OSError:
        pass  # a FIFO, a directory, a full disk


class Pass:
    """One walk along an outbox: pings that never failed, oldest first; then those that
    failed and were not judged; then those that were charged.

    A failure may be the ping's fault or the tracker's: another ping that is delivered
    tells. So failures are noted, and a delivery judges them: what was refused is set
    aside, what else failed is charged. When only failures come, of different events,
    the pass ends with a back-off, and nobody is to blame. noted: name -> its answer,
    since the last delivery. done: names that are no news; trying: the last. in_burst:
    what was delivered last ends nothing, so that others are likely to follow."""

    def __init__(self, sender: Sender) -> None:
        self.sender, self.outbox = sender, sender.outbox
        self.state = State(sender.outbox)
        self.names: list[str] = []
        self.done: set[str] = set()
        self.noted: dict[str, Answer] = {}
        self.trying, self.delivered, self.in_burst = "", 0, False

    def tidy(self) -> None:
        """List what waits, and make way: of too many the oldest without usage are lost,
        then the oldest; of the suspects those that were charged most are kept in mind.
        """
        for name in os.listdir(self.outbox.path("outbox")):
            if name.startswith(".") and age_s(self.outbox.file(name)) > UNFINISHED_S:
                remove(self.outbox.file(name))
        names, suspects = self.outbox.waiting(), self.state.suspects
        names.sort(key=lambda name: PingName(name).event in USAGE_EVENTS)
        for name in names[:-OUTBOX_MAX_PINGS]:
            self.set_aside(name, "outbox full")
        self.names = sorted(names[-OUTBOX_MAX_PINGS:])
        waiting = sorted(suspects.keys() & self.names)
        known = sorted(waiting, key=lambda name: -suspects[name])[:SUSPECTS_MAX]
        self.state.suspects = {name: suspects[name] for name in known}

    def set_aside(self, name: str, reason: str) -> None:
        """Count a ping that will not be delivered, and the tokens charged to it, and
        move it out of the others' way: then, for we may be killed meanwhile."""
        losses = self.state.losses
        losses[reason] = losses.get(reason, 0) + 1
        try:
            tokens = self.outbox.record(name).ping["total_tokens"]
            losses["tokens"] = losses.get("tokens", 0) + tokens
        except (OSError, ValueError, KeyError):
            pass
        self.state.save(self.outbox)
        self.outbox.set_aside(name)

    def order(self) -> Iterator[str]:
        """The names, in the order of their tries."""
        suspects = self.state.suspects
        fresh = [name for name in self.names if name not in suspects]
        for name in fresh:
            if len(self.noted) == self.borne() - 1:
                yield from self.witness(fresh)
            yield name
        due = not 0 <= time.time() - self.state.suspects_at < SUSPECT_PAUSE_S
        if due:
            self.state.suspects_at = time.time()
        known = sorted(suspects, key=lambda name: suspects[name])
        yield from [name for name in known if due or not suspects[name]]
        self.done.update(suspects)

    def witness(self, fresh: list[str]) -> Iterator[str]:
        """The last failure that is borne is the newest of another event: a witness like
        the others would say little. The older pings of its session are charged before
        it, so that the tokens are each turn's own."""
        kind = PingName(next(iter(self.noted))).event
        left = [n for n in fresh if n not in self.done and PingName(n).event != kind]
        for newest in left[-1:]:
            session = PingName(newest).session
            for name in fresh:
                if name < newest and PingName(name).session == session:
                    self.charged(name)
            yield newest

    def charged(self, name: str) -> Record | None:
        """The ping to send, its usage charged: whatever a transcript holds, the ping
        goes. None when there is none under `name`, or it must wait."""
        try:
            record = self.outbox.record(name)
        except OSError:
            return None  # gone, or an I/O error: perhaps another time
        except ValueError:
            self.set_aside(name, "no ping")
            return None
        try:
            if record.local:
                return charge(self.outbox, name, record, self.sender.ends)
        except Exception as error:  # noqa: BLE001
            self.sender.log(f"{type(error).__name__} at {name}")
        return record

    def borne(self) -> int:
        """How many failures in a row end the pass."""
        refused = all(answer.verdict == REFUSED for answer in self.noted.values())
        return REFUSALS_BORNE if self.delivered and refused else FAILURES_BORNE

    def walk(self) -> None:
        """Try all that is due, until an answer says that now is no time."""
        for name in self.order():
            if self.sender.is_over():
                break
            if name not in self.done:
                self.trying = name
                self.done.add(name)
                record = self.charged(name)
                answer = record and self.sender.deliver(name, record)
                if answer and not self.weigh(name, answer):
                    self.fail(answer)
                    return
        if self.noted and not self.delivered:
            self.fail(self.noted.popitem()[1])

    def weigh(self, name: str, answer: Answer) -> bool:
        """Find out whose fault an answer is; False when the pass is over."""
        state, charges = self.state, self.state.suspects.get(name)
        if answer.verdict == DELIVERED:
            self.delivered += 1
            self.in_burst = PingName(name).event not in USAGE_EVENTS
            state.failures, state.not_before, state.delivered_at = 0, 0, time.time()
            for failed, its_answer in self.noted.items():
                self.judge(failed, its_answer)
            self.noted = {}
        elif answer.verdict == NOT_NOW:
            if answer.what.startswith("HTTP 5"):
                state.suspects.setdefault(name, 0)  # others go first, next time
            return False
        elif self.delivered and charges is not None:
            self.judge(name, answer)
        elif not charges:
            self.noted[name] = answer
            state.suspects.setdefault(name, 0)
            return len(self.noted) < self.borne()
        return True

    def judge(self, name: str, answer: Answer) -> None:
        """The tracker is well: refuse the ping for good, or charge it."""
        self.state.suspects[name] += 1
        old = time.time() - PingName(name).ns / 1e9 > POISON_AGE_S
        if answer.verdict == REFUSED:
            self.set_aside(name, f"refused: {answer.what}")
        elif self.state.suspects[name] >= POISON_CHARGES and old:
            self.set_aside(name, "always fails")

    def fail(self, answer: Answer) -> None:
        """The pass failed: start a back-off. The row of failures begins anew when it is
        a person's turn to mend something, or no more."""
        now, state = time.time(), self.state
        mended = (answer.verdict in HOLDS) != (state.verdict in HOLDS)
        state.failures = 1 if mended else state.failures + 1
        wait = backoff_s(answer.verdict, state.failures, answer.retry_after_s)
        state.set_at, state.not_before = now, now + wait
        state.verdict, state.problem = answer.verdict, answer.what
        state.save(self.outbox)
        self.done.update(self.names)  # no news, even on a full disk
        self.sender.log(f"{answer.verdict}: {answer.what}, next try in {wait:.0f} s")


class Sender:
    """A sender's life, from pass to pass.

    ends: monotonic: no request begins after it. tell: for a person. once: somebody
    waits: for no back-off, and for ONCE_LAST_S beyond the end at most. status: the exit
    status when a request that overstays ends the process. deadline: monotonic, of the
    request on its way.
    """

    opener: OpenerDirector | None = None
    deadline = float("inf")

    def __init__(
        self,
        tracker: Tracker,
        settings: Settings,
        ends: float,
        tell: Tell,
        once: bool = False,
        status: int = 0,
    ) -> None:
        self.tracker, self.settings = tracker, settings
        self.outbox = outbox_of(settings, tracker)
        self.ends, self.tell, self.once, self.status = ends, tell, once, status
        self.on_pass = Pass(self)

    def is_over(self) -> bool:
        """Whether this life is."""
        return time.monotonic() >= self.ends

    def news(self) -> bool:
        """Whether a ping waits that has come since the last pass began."""
        return not self.on_pass.done.issuperset(self.outbox.waiting())

    def log(self, text: str) -> None:
        """Add a line to sender.log: no payload, no URL, no token."""
        line = f"{iso_time(time.time_ns())} {os.getpid()} {text}\n"
        add_line(self.outbox.path("sender.log"), line, LOG_MAX_BYTES)

    def deliver(self, name: str, record: Record) -> Answer | None:
        """Send a ping; None when there is nothing to send, or no time."""
        requests, answer = self.tracker.requests(record.ping, record.beside), None
        for request in requests[record.accepted :]:
            if self.is_over():
                return None
            answer = self.send(record.ping, request)
            if answer.verdict != DELIVERED:
                return answer
            record.accepted += 1
            try:
                if record.accepted < len(requests):  # whoever comes next goes on there
                    self.outbox.rewrite(name, record)
            except OSError:
                pass  # a full disk: after a crash they are repeated
        if answer:
            self.keep(record.ping, requests, answer)
        remove(self.outbox.file(name))  # only now: after a crash, kept or sent twice
        return answer

    def keep(self, ping: Fields, requests: list[Request], answer: Answer) -> None:
        """Add a delivered ping to sent.jsonl; its bodies, where those are another."""
        found: Fields = {"at": iso_time(time.time_ns()), "answer": answer.what}
        bodies = [(request.body or b"").decode() for request in requests]
        if bodies != [encode_json(ping)]:
            found["bodies"] = bodies
        line = encode_json({**found, "ping": ping}) + "\n"
        add_line(self.outbox.path("sent.jsonl"), line, SENT_MAX_BYTES)

    def send(self, ping: Fields, request: Request) -> Answer:
        """Send one request of a ping; it has a deadline of its own."""
        from _thread import start_new_thread

        timeout_s, begun = self.settings.timeout_s, time.monotonic()
        self.deadline = begun + DEADLINE * timeout_s
        if self.once:
            self.deadline = min(self.deadline, self.ends + ONCE_LAST_S)
        try:
            if not self.opener:
                self.opener = make_opener(self.tracker.url)
                start_new_thread(self.watch, ())
            answer = post(self.opener, request, timeout_s, self.tracker.reads)
        except (Skipped, ImportError) as why:  # some ship a part of the library
            answer = Answer(HOLD, str(why))
        self.deadline = float("inf")
        if self.tracker.refuses(answer.body):
            answer = Answer(REFUSED, f"{answer.what}, rejected")
        took_ms = (time.monotonic() - begun) * 1000
        self.tell(
            f"{ping.get('event')} {ping['event_id']} to {origin(self.tracker.url)}: "
            f"{answer.what} in {took_ms:.0f} ms"
        )
        return answer

    def watch(self) -> None:
        """The watchdog, a thread. When a request overstays (a hung resolver, a dripping
        response), have that noted and end the process: nothing else ends it."""
        while time.monotonic() < self.deadline:
            time.sleep(LOOK_S)
        try:
            self.break_off("no whole answer in time")
        finally:
            os._exit(self.status)

    def one_pass(self) -> None:
        """Tidy, try what waits, remember what became of it; wait for the next of a
        burst of events, and sweep when none comes."""
        self.on_pass = on_pass = Pass(self)
        on_pass.tidy()
        on_pass.walk()
        on_pass.state.save(self.outbox)
        self.log(f"delivered {on_pass.delivered} of {len(on_pass.names)}")
        until = time.monotonic() + LINGER_S
        waits = on_pass.in_burst and not self.once
        while waits and time.monotonic() < until and not self.news():
            time.sleep(LOOK_S)  # meanwhile hooks start no process
        if not self.news():
            self.sweep()

    def break_off(self, what: str) -> None:
        """Note that this process ends with the ping that is tried."""
        answer = Answer(RETRY, what)
        self.on_pass.weigh(self.on_pass.trying, answer)
        self.on_pass.fail(answer)
        self.tell(f"{what}; the ping waits")

    def sweep(self) -> None:
        """Once a day: tell of sessions that were lost, forget the oldest accounts."""
        from glob import escape, glob

        now, state = time.time(), self.on_pass.state
        if 0 <= now - state.swept_at < DAY_S:
            return
        accounts = escape(self.outbox.path("accounts"))
        paths = sorted(glob(os.path.join(accounts, "*.json")), key=age_s)
        for path in paths[ACCOUNTS_MAX:]:
            remove(path)
        for path in paths if self.settings.usage else ():
            if self.is_over():
                return
            try:
                if age_s(path) > DAY_S:
                    report_lost(self.outbox, path, self.settings, self.ends)
            except Exception as error:  # noqa: BLE001 - it must not hide the others
                self.log(f"lost session: {type(error).__name__}")
        state.swept_at = now
        state.save(self.outbox)


def live(sender: Sender, lock: int | None) -> None:
    """Pass after pass, to the end of a sender's life. After each the lock is given
    back, and then the outbox listed once more: a hook that found the lock busy counts
    on that. When this life is over then, news begin a new one."""
    outbox = sender.outbox
    while lock is not None:
        if sender.once or not outbox.backoff_left_s():
            sender.one_pass()
        unlock(lock)
        wait = outbox.backoff_left_s()
        if wait and (sender.once or time.monotonic() + wait >= sender.ends):
            return
        if not wait and not sender.news():
            return
        time.sleep(wait)
        lock = outbox.take_lock()
        if lock is not None and sender.is_over():
            start_sender({outbox.name(): lock}, sender.settings)
            return


def send(settings: Settings, tell: Tell) -> None:
    """Deliver as start_sender's command says: HOW, then each destination's lock (-1:
    none was handed on) and name; those behind the first are to have other senders."""
    how, fd, name, *others = sys.argv[3:]
    once = how != "detached"
    ends = time.monotonic() + (ONCE_S if once else LIFE_S)
    if others:  # the next one starts the rest
        held = {other: int(fd) for fd, other in zip(others[::2], others[1::2])}
        start_sender(held, settings)
    trackers = find_trackers(settings)[0]
    (tracker,) = [one for one in trackers if one.directory_name() == name]
    sender = Sender(tracker, settings, ends, tell, once)
    lock = int(fd) if int(fd) >= 0 else sender.outbox.take_lock()
    if os.name == "posix":
        os.nice(5)  # the session's own work comes first
    try:
        live(sender, lock)
    except Exception as error:  # noqa: BLE001 - or each hook would start one in vain
        sender.break_off(f"internal error: {type(error).__name__}")


def sender() -> NoReturn:
    """What a hook starts."""
    run_for_claude_code(send)


# ======================================================================================
# All below is run by a person: the commands.
# ======================================================================================


def kind_of(outbox: Outbox) -> str:
    """The kind of the tracker that an outbox is, or was, for."""
    return outbox.name().rpartition("-")[0]


def outboxes(state_dir: str | None) -> list[Outbox]:
    """Every destination's outbox that there is, also of URLs no longer configured."""
    top = state_dir or ""
    names = sorted(os.listdir(top)) if os.path.isdir(top) else []
    found = [Outbox(os.path.join(top, name)) for name in names if "-" in name]
    return [outbox for outbox in found if os.path.isdir(outbox.path("outbox"))]


def adopt(former: Outbox, present: Outbox, name: str) -> None:
    """Move a ping from a former URL's outbox; both locks are held. What it was charged
    must not be told here twice: the session's account here begins behind it, or, when
    that has counted already, it goes without numbers. OSError, ValueError: it stays."""
    record = Outbox(former.directory, present.needs).record(name)
    used = record.ping.get("total_tokens") and "session_id" in record.ping
    if used and not record.local:
        account, at = open_account(present, name, record.ping), PingName(name).ns / 1e9
        if not account.transcripts:
            account.since = max(account.since, at)
            account.save()
        elif account.since < at:
            told = (number, counts, counts_by_model)
            ping = {k: v for k, v in record.ping.items() if GATE[k] not in told}
            record = Record({**ping, "usage_complete": False}, {}, {})
    present.rewrite(name, record)
    remove(former.file(name))


def deliveries(outbox: Outbox) -> list[Fields]:
    """The lines of sent.jsonl, each ping once: after a crash it may be there twice."""
    found: dict[str, Fields] = {}
    for name in ("sent.jsonl.1", "sent.jsonl"):
        try:
            lines = read_file(outbox.path(name), 2 * SENT_MAX_BYTES).splitlines()
        except (OSError, ValueError):
            continue
        for line in lines:
            try:
                delivery = decode_json(line.decode())
                found.setdefault(str(delivery["ping"]["event_id"]), delivery)
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a full disk
    return list(found.values())


# -- Commands: talking with a person ---------------------------------------------------

URL_NAME = "TELEMHQ_PING_URL"
MARKS = {True: "ok", False: "!!", None: "--"}  # of a check; None: it is only told


def at_home(text: str) -> str:
    """A text for a person, who knows home as ~."""
    home = os.path.expanduser("~")
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text


def say(text: str) -> None:
    """Print a line for a person."""
    print(at_home(text), flush=True)


def says_yes(question: str) -> bool:
    """Whether a person says yes; nobody there is a no."""
    return os.isatty(0) and input(f"{question} [y/N] ").lower() in ("y", "yes")


def need_yes(question: str, yes: bool) -> None:
    """Skipped unless a person says yes, on the command line or now."""
    if not (yes or says_yes(question)):
        raise Skipped("nothing was changed; --yes asks nothing")


def span(seconds: float) -> str:
    """`40 s`, `3 min`, `5 h`, `2 days`."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{int(seconds / unit)} {name}"
    return f"{int(max(seconds, 0))} s"


def what_waits(outbox: Outbox) -> str:
    """`2 pings of a, b wait, the oldest for 6 min`: whose they are, and how long."""
    names, projects = outbox.waiting(), set()
    for name in names:
        try:
            projects.add(str(outbox.record(name).ping.get("project")))
        except (OSError, ValueError):
            continue  # sent meanwhile, or no ping
    if not names:
        return "no pings wait"
    pings, wait = ("ping", "waits") if len(names) == 1 else ("pings", "wait")
    age = span(time.time() - PingName(names[0]).ns / 1e9)
    whose = ", ".join(sorted(projects)[:5])
    return f"{len(names)} {pings} of {whose} {wait}, the oldest for {age}"


MEANINGS = (  # of an answer, by what it begins with
    (("HTTP 401", "HTTP 402", "HTTP 403"), "is the token in {token} right, and paid?"),
    (("HTTP 404", "HTTP 405", "HTTP 410"), "is the URL in {url} right, is it there?"),
    (("HTTP 408", "HTTP 409", "HTTP 425", "HTTP 429"), "it is busy; sent again later"),
    (("HTTP 407", "proxy"), "HTTPS_PROXY may lack USER:PASSWORD@, NO_PROXY this host"),
    (("SOCKS",), "name an HTTP proxy in HTTPS_PROXY"),
    (("HTTP 3",), "it has moved; put its new address into {url}"),
    (("HTTP 5", "no whole"), "it has a problem of its own; sent again later"),
    (("HTTP",), "it refuses this ping; {dislike}"),
    (("TLS: WRONG_VERSION", "TLS: HTTP"), "no TLS is spoken there; is https:// right?"),
    (("TLS",), "SSL_CERT_FILE can name a company's certificates"),
    (("this Python",), "run `install` with a whole Python"),
    (("",), "is {url} right, is there a network?"),
)


def in_words(what: str, kind: str) -> str:
    """An answer (`what` of an Answer) of a kind of tracker, and what it means."""
    meaning = next(text for begins, text in MEANINGS if what.startswith(begins))
    tracker: Any = TRACKERS[kind]
    url, *others = tracker.variables
    token = (others or [url])[0]
    meaning = meaning.format(url=url, token=token, dislike=tracker.dislike)
    return f"{what.replace('HTTP ', '')}: {meaning}"


# -- Commands: the settings files of Claude Code ---------------------------------------

IMPORT = "import telemhq_ping as t; t.hook()"  # a module's bytecode is cached
HOOK_TIMEOUT_S = 10  # Claude Code's; without it a SessionEnd hook has 1.5 s
FILE_MAX_BYTES = 16 << 20  # settings and scripts are smaller
EVENTS = ("Stop", "StopFailure", "SessionEnd")  # what install registers
TOOL_EVENTS = ("PostToolUse", "PostToolUseFailure")  # --tools: both for the same tools
TOOLS = "Bash|Edit|MultiEdit|Write"  # those that change something, as TelemHQ's docs
PLUGIN = "telemhq-ping@telemhq-ping"
MANAGED_DIRS = {  # where a company's settings are, but for Linux
    "darwin": "/Library/Application Support/ClaudeCode",
    "win32": "C:\\Program Files\\ClaudeCode",
}


def config_path(*names: str) -> str:
    """A path in Claude Code's directory; Skipped when nothing tells where home is."""
    found = absolute(os.environ.get("CLAUDE_CONFIG_DIR") or "~/.claude")
    if found is None:
        raise Skipped("there is no home directory; set CLAUDE_CONFIG_DIR")
    return os.path.join(found, *names)


def hook_command(event: str) -> str:
    """The command for settings: it imports the script, or else runs it: bytecode may be
    cut off by a crash. It never ends with 2, which Claude Code takes for a veto."""
    import shlex

    paths = [sys.executable, config_path("hooks"), config_path("hooks", SCRIPT)]
    if sys.prefix != sys.base_prefix:  # a virtual environment comes and goes
        paths[0] = os.path.realpath(sys.executable)
    # With slashes, for Git Bash.
    python, directory, script = (shlex.quote(p.replace(os.sep, "/")) for p in paths)
    # A failing `claude -p` sends a TERM before Python is up.
    trap = "trap '' TERM; " if event == "StopFailure" else ""
    imported = f"{trap}cd {directory} && {python} -ESc '{IMPORT}'"
    return f"{imported} || python3 -I -S {script} || true"


class RegisteredHook:
    """One hook in settings: its event, itself (entry), the dict that holds it (group).
    names_script: whether its command runs the script. is_ours: whether it does nothing
    else, as install, the README or TelemHQ have it: only such are ever changed."""

    def __init__(self, event: str, group: Fields, entry: Fields) -> None:
        import re
        import shlex

        self.event, self.group, self.entry = event, group, entry
        self.command, script = str(entry.get("command")), re.escape(SCRIPT)
        spelled = rf"(?<![\w.-])({script}|import telemhq_ping)(?![\w.-])"
        self.names_script = bool(re.search(spelled, self.command))
        try:
            words = shlex.split(self.command.replace(IMPORT, "IMPORT"))
        except ValueError:  # a quote without its end
            words = []
        names = [re.split(r"[/\\]", word)[-1].replace(" ", "_") for word in words]
        names = ["PYTHON" if name[:2] == "py" else name for name in names]
        said = " ".join(name for name in names if name[:1] != "-")
        run = rf"(PYTHON )?{script}"
        imported = rf"(trap  TERM; )?cd [^\s;&|]+ && PYTHON IMPORT( \|\| {run})?"
        self.is_ours = bool(re.fullmatch(rf"({imported}|{run})( \|\| true)?", said))


def hooks_of(content: Fields) -> list[RegisteredHook]:
    """The hooks in settings (dict), in their order."""
    return [
        RegisteredHook(event, group, entry)
        for event, groups in content.get("hooks", {}).items()
        for group in groups
        for entry in group["hooks"]
    ]


def retold(text: str, at: int, new: Any, line: str) -> str:
    """`new` as JSON; what it has in common with the value at `at` in `text` stays as it
    is written there, and what is one line stays one. line: the break and indent."""
    import json
    import re

    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,:]*")
    old, end = decode(text, at)
    if old == new:
        return text[at:end]
    if type(old) is not type(new) or not isinstance(new, (dict, list)):
        return json.dumps(new, ensure_ascii=False)
    left = dict(new if isinstance(new, dict) else enumerate(new))
    unit = (re.findall(r"\n([ \t]+)\S", text) or ["  "])[0]
    told, n, spot, line = "", 0, at + 1, line + unit
    value = next(gap.finditer(text, spot)).end()
    while text[value] not in "]}":
        key: Any = n
        if text[at] == "{":
            key, value = decode(text, value)
            value = next(gap.finditer(text, value)).end()
        if key in left:
            told += text[spot:value] + retold(text, value, left.pop(key), line)
        spot, n = decode(text, value)[1], n + 1
        value = next(gap.finditer(text, spot)).end()
    lines = n == 0 or text[at + 1].isspace()
    for key, added in left.items():
        said = json.dumps(added, ensure_ascii=False, indent=unit if lines else None)
        name = f"{json.dumps(key)}: " if text[at] == "{" else ""
        told += ("," + line if lines else ", ") + name + said.replace("\n", line)
    tail = text[spot:end] if n else line[: -len(unit)] + text[end - 1]
    return text[at] + re.sub(r"^\s*,", "", told) + tail


class File:
    """A file of a person's. path: as it is named. real: what that is a link to, for
    dotfiles are often links. raw: its bytes, None when there is none. mode: its. As
    settings of Claude Code's: text: the JSON in it; content: the object in that, with
    its hooks and env; problem: why it is none, or ""."""

    def __init__(self, path: str) -> None:
        import json

        self.path, self.real = path, os.path.realpath(path)
        self.raw: bytes | None = None
        self.content: Fields = {}
        self.mode, self.text, self.problem = 0o600, "{}\n", ""
        try:
            if os.path.exists(self.real):
                self.mode = stat.S_IMODE(os.stat(self.real).st_mode)
                self.raw = read_file(self.real, FILE_MAX_BYTES)
            if self.raw and self.raw.strip():
                self.text = self.raw.decode("utf-8")
            # As strict as Claude Code: it ignores all of a file with a comment in it.
            content = json.loads(self.text.lstrip("\ufeff"))
            lists = [*content.get("hooks", {}).values()]
            lists += [hook.group["hooks"] for hook in hooks_of(content)]
            if not all(isinstance(found, list) for found in lists):
                raise TypeError
            content.get("env", {}).items()
            self.content = content
        except (OSError, ValueError, RecursionError) as error:
            self.problem = str(getattr(error, "strerror", "") or error)
        except (AttributeError, KeyError, TypeError):
            self.problem = "it has not the form that is documented"
        self.hooks = hooks_of(self.content)
        self.env: Fields = self.content.get("env", {})

    def retold(self, content: Fields) -> str:
        """Its text, changed as little as can be to hold `content`."""
        begin, end = self.text.index("{"), len(self.text.rstrip())
        line = "\r\n" if "\r\n" in self.text else "\n"
        new = retold(self.text, begin, content, line)
        return self.text[:begin] + new + self.text[end:]


class Surroundings:
    """What a hook finds here. files: settings files; each goes before those above it.
    own: the paths of all but a project's, which may be a stranger's. settings: from
    environment and files. url_from: the file that has TelemHQ's URL, or "". plugin: the
    one that enables this script as a plugin. url_is_kept: as the plugin's option, which
    Claude Code alone knows. managed_only: a company allows no hooks but its own."""

    def __init__(self) -> None:
        import glob

        company = MANAGED_DIRS.get(sys.platform, "/etc/claude-code")
        managed = [os.path.join(company, "managed-settings.json")]
        managed += sorted(glob.glob(os.path.join(company, "managed-settings.d/*.json")))
        user, project = config_path("settings.json"), os.path.abspath(".claude")
        names = ("settings.json", "settings.local.json")
        paths = [user, *(os.path.join(project, name) for name in names), *managed]
        self.files = [File(path) for path in dict.fromkeys(paths)]
        self.own, self.managed_only, self.plugin = {user, *managed}, False, ""
        environ, self.url_from = dict(os.environ), ""
        for file in self.files:
            environ.update({name: str(value) for name, value in file.env.items()})
            if URL_NAME in file.env:
                self.url_from = file.path
            plugins = file.content.get("enabledPlugins")
            if isinstance(plugins, dict) and plugins.get(PLUGIN):
                self.plugin = file.path
            if file.path in managed and file.content.get("allowManagedHooksOnly"):
                self.managed_only = True
        self.settings = Settings(environ)
        wanted = TelemHQ.kind in self.settings.destinations
        unknown = not self.settings.url and URL_NAME not in environ
        self.url_is_kept = bool(self.plugin) and wanted and unknown


# -- Commands: flush -------------------------------------------------------------------


def take_settings() -> None:
    """Give a hook that is run by hand in debug mode what Claude Code would give it."""
    if not Settings(dict(os.environ)).debug or "CLAUDE_PROJECT_DIR" in os.environ:
        return
    try:
        around = Surroundings()
    except (Skipped, OSError):
        return
    if around.url_from and URL_NAME not in os.environ:
        tell_on_stderr(at_home(f": {URL_NAME} is from {around.url_from}"))
    for name, value in around.settings.environ.items():
        os.environ.setdefault(name, value)


def wait_for_lock(outbox: Outbox) -> int:
    """The outbox's lock; Skipped when a sender has it for longer than its life."""
    ends, lock = time.monotonic() + LIFE_S, outbox.take_lock()
    while lock is None:
        if time.monotonic() >= ends:
            raise Skipped(f"a sender is at work in {outbox.directory}; try later")
        time.sleep(LOOK_S)
        lock = outbox.take_lock()
    return lock


def flush_outbox(outbox: Outbox, tracker: Tracker, settings: Settings) -> str:
    """Deliver what waits, in spite of a back-off; the last answer."""
    told, ends = [""], time.monotonic() + LIFE_S

    def tell(text: str) -> None:
        print(text, flush=True)
        told.append(text)

    sender = Sender(tracker, settings, ends, tell, once=True, status=1)
    live(sender, wait_for_lock(outbox))
    return told[-1].partition(": ")[2].rpartition(" in ")[0]


def adopt_all(present: Outbox, tracker: Tracker, state_dir: str, yes: bool) -> None:
    """Move what waits for a tracker's former URLs, if a person says so."""
    for former in outboxes(state_dir):
        other = kind_of(former) == kind_of(present) and former.name() != present.name()
        if not (other and former.waiting()):
            continue
        former.need_sound()
        print(what_waits(former))
        print(f"  from {former.name()} to {present.name()}, {origin(tracker.url)}")
        need_yes("Move them?", yes)
        os.makedirs(present.path("outbox"), exist_ok=True)
        locks = [wait_for_lock(one) for one in (former, present)]
        for name in former.waiting():
            try:
                adopt(former, present, name)
            except (OSError, ValueError) as error:
                print(f"  {name} stays there: {error}")
        for lock in locks:
            unlock(lock)


def flush(options: Namespace) -> int:
    """deliver what waits now, in spite of a back-off

    --adopt  first move here what waits for a former URL; it shows what, and asks
    --yes  move it without asking
    """
    around, left = Surroundings(), 0
    settings = around.settings
    os.environ.update(settings.environ)  # urllib looks for proxies there
    if around.url_is_kept and settings.destinations == [TelemHQ.kind]:
        raise Skipped("only Claude Code knows the plugin's URL: start a session")
    trackers, problems = find_trackers(settings)
    for tracker in trackers:
        outbox = outbox_of(settings, tracker)
        outbox.need_sound()
        if options.adopt:
            adopt_all(outbox, tracker, settings.state_dir or "", options.yes)
        what = flush_outbox(outbox, tracker, settings) if outbox.waiting() else ""
        left += len(outbox.waiting())
        if outbox.waiting() and what:
            print(f"{tracker.kind}: {in_words(what, tracker.kind)}")
    if problems:
        raise Skipped("; ".join(problems))
    print(f"{left or 'None'} left.")
    return 1 if left else 0


# -- Commands: doctor ------------------------------------------------------------------

ARRIVES_S = 30.0  # a ping that has not come by then is lost
HOOK_MOST_S = 15.0  # a hook that takes longer is stuck


def receiver(arrived: list[tuple[float, Fields]]) -> tuple[int, Thread]:
    """A tracker on loopback: (port, a thread that takes one (monotonic, ping))."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            arrived.append((time.monotonic(), decode_json(body.decode())))
            self.send_response_only(200)  # which logs nothing
            self.end_headers()

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.timeout = ARRIVES_S
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    return server.server_address[1], thread


def play(command: list[str], event: Fields, environ: Fields) -> tuple[str, Fields, str]:
    """Run a hook, 15 s at most: (what it printed, the ping that arrived, times)."""
    import subprocess
    import tempfile

    arrived: list[tuple[float, Fields]] = []
    port, thread = receiver(arrived)
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile() as out:
        environ = {**environ, "TELEMHQ_STATE_DIR": os.path.join(place, "state")}
        environ["TELEMHQ_DESTINATIONS"] = TelemHQ.kind  # nobody else is to get samples
        environ["CLAUDE_PROJECT_DIR"] = os.getcwd()
        environ[URL_NAME] = f"http://127.0.0.1:{port}/ping/sample"
        begun, pipe = time.monotonic(), subprocess.PIPE
        process = subprocess.Popen(
            command, 0, None, pipe, out, out, env=environ, start_new_session=True
        )
        try:
            process.communicate(encode_json(event).encode(), HOOK_MOST_S)
        except subprocess.TimeoutExpired:
            getattr(os, "killpg", os.kill)(process.pid, 9)
            return "it does not end", {}, ""
        hook_ms = (time.monotonic() - begun) * 1000
        out.seek(0)
        said = out.read().decode("utf-8", "replace")
        # Where it made no state nothing will arrive.
        thread.join(ARRIVES_S if os.listdir(place) else 10 * LOOK_S)
        at, ping = arrived[0] if arrived else (begun, {})
        for outbox in outboxes(environ["TELEMHQ_STATE_DIR"]):
            if ping:  # its sender looks for more: what is none ends that at once
                write_file(outbox.file(PingName.make(time.time_ns(), ping)), b"")
            lock = wait_for_lock(outbox)
            time.sleep(LOOK_S)  # a sender that tries it now ends
            unlock(lock)
    return said, ping, f"hook {hook_ms:.0f} ms, all {(at - begun) * 1000:.0f} ms"


def check_settings(around: Surroundings) -> Iterator[Check]:
    """Whether Claude Code reads the settings and runs hooks, and what these will do."""
    settings = around.settings
    if around.managed_only:
        yield False, "allowManagedHooksOnly: hooks run in your company's settings only"
    for file in around.files:
        if file.problem:
            yield False, f"Claude Code ignores all of {file.path}: {file.problem}"
        if file.content.get("disableAllHooks") is True:
            yield False, f"{file.path} turns hooks off: take disableAllHooks out of it"
    for problem in settings.ignored:
        yield False, problem
    source = around.url_from or "the shell's environment"
    if settings.url:
        yield None, f"{URL_NAME} is from {source}"
    elif URL_NAME in settings.environ:
        yield None, f"switched off here: {URL_NAME} is empty in {source}"
    elif around.url_is_kept:
        yield None, "Claude Code keeps the plugin's URL; it is not tried here"


def check_hooks(around: Surroundings) -> Iterator[Check]:
    """Whether each event runs the script, and once; each such command is run."""
    found: dict[tuple[str, str], tuple[RegisteredHook, str]] = {}
    for file in around.files:
        for hook in [hook for hook in file.hooks if hook.names_script]:
            key = hook.event, hook.command  # Claude Code runs the same one once
            found.setdefault(key, (hook, file.path))
    for event in dict.fromkeys([*EVENTS, *(event for event, _ in found)]):
        ours = [pair for pair in found.values() if pair[0].event == event]
        for hook, path in ours:
            yield try_hook(around, hook, path)
        by = [path for _, path in ours]
        if around.plugin and event in EVENTS:
            by.append(f"the plugin ({around.plugin})")
        both = f"{event} by {' and '.join(by)}"
        if not by:  # StopFailure is not for every client
            bad = None if event == "StopFailure" else False
            yield bad, f"no hook for {event}: run `install`"
        elif len(by) > 1 and any(URL_NAME in hook.command for hook, _ in ours):
            yield None, f"{both}, to two URLs: each is told the whole"
        elif len(by) > 1:
            yield False, f"{both}: take one out, for each sends a ping"
        elif not ours:
            yield True, both


def try_hook(around: Surroundings, hook: RegisteredHook, path: str) -> Check:
    """Run a hook's command; whether its ping arrived."""
    name = f"{hook.event} by {path}"
    known = path in around.own or hook.command == hook_command(hook.event)
    if "TELEMHQ_" in hook.command or not known:
        return None, f"{name} was not tried: it may be a stranger's, or send elsewhere"
    shell = "/bin/sh" if os.name == "posix" else "C:\\Program Files\\Git\\bin\\bash.exe"
    event = {"hook_event_name": hook.event, "session_id": "x", "cwd": os.getcwd()}
    environ = {**around.settings.environ, "TELEMHQ_HOOK_DEBUG": "0"}
    said, ping, times = play([shell, "-c", hook.command], event, environ)
    if ping and not said:
        return True, f"{name}: arrived at doctor's own receiver, {times}"
    line = (said.strip().splitlines() or ["nothing"])[-1]
    does = "prints" if ping else "sends nothing and says"
    return False, f"{name} {does} `{line}`: run `install`, or mend it"


def check_bytecode(_: Surroundings) -> Iterator[Check]:
    """Whether what Python has cached of the installed script is made of it."""
    from importlib.machinery import SourceFileLoader
    from importlib.util import cache_from_source

    script = config_path("hooks", SCRIPT)
    cached, loader = cache_from_source(script), SourceFileLoader("", script)
    if not (os.path.exists(cached) and os.path.exists(script)):
        return
    try:
        made = loader.source_to_code(loader.get_data(script), script)
        good = loader.get_code("") == made and not unsound(os.path.dirname(cached))
    except (EOFError, ValueError, TypeError):
        good = False
    if not good:
        yield False, f"{cached} is not the script's: remove it, Python makes it anew"


def answer_to(asked: Request, settings: Settings) -> Answer:
    """What a tracker answers within a sender's deadline."""
    import threading

    answers = [Answer(RETRY, "no whole answer in time")]

    def ask() -> None:
        try:
            answers.append(post(make_opener(asked.url), asked, settings.timeout_s))
        except Skipped as why:
            answers.append(Answer(HOLD, str(why)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(DEADLINE * settings.timeout_s)
    return answers[-1]


def check_trackers(around: Surroundings) -> Iterator[Check]:
    """Whether the trackers are set up, and answer to what records nothing."""
    settings = around.settings
    trackers, problems = find_trackers(settings)
    unset = around.url_is_kept or settings.environ.get(URL_NAME) == ""
    for problem in problems:
        if not (unset and URL_NAME in problem):
            yield False, problem
    for tracker in trackers:
        name, asked = f"{tracker.kind} at {origin(tracker.url)}", tracker.check()
        answer = answer_to(asked, settings)
        takes_posts = answer.what in ("HTTP 400", "HTTP 405", "HTTP 422")
        if (takes_posts and asked.body is None) or answer.verdict == DELIVERED:
            yield True, f"{name} answers; only `doctor --send` proves the token"
        else:
            yield False, f"{name}: {in_words(answer.what, tracker.kind)}"


def obstacle(outbox: Outbox) -> str:
    """What keeps hooks from writing and locking a file in an outbox, or ""."""
    import errno

    path = outbox.path("outbox")
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    trial = os.path.join(path, ".doctor")
    try:
        outbox.need_sound()
        write_file(trial, b" " * (64 << 10))
        if os.name == "posix":
            import fcntl

            with open(trial, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except Skipped as error:
        return str(error).partition(";")[0]
    except OSError as error:
        no_locks = error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
        what = "has no locks, so that pings go twice" if no_locks else "is not writable"
        return f"{path} {what} ({error.strerror})"
    finally:
        remove(trial)
    return ""


def check_disk(around: Surroundings) -> Iterator[Check]:
    """Whether hooks can write, how delivery goes, what waits for other URLs."""
    settings, kept = around.settings, outboxes(around.settings.state_dir)
    trackers = find_trackers(settings)[0]
    ours = [outbox_of(settings, tracker) for tracker in trackers]
    if around.url_is_kept:
        ours += [outbox for outbox in kept if kind_of(outbox) == TelemHQ.kind]
    nowhere = Outbox(os.path.join(settings.state_dir or "", "none"))
    problems = list(filter(None, map(obstacle, ours or [nowhere])))
    for problem in problems:
        yield False, f"{problem}: mend that, or set TELEMHQ_STATE_DIR to another place"
    if not problems:
        yield True, f"hooks can write to {settings.state_dir}"
    names = [outbox.name() for outbox in ours]
    for outbox in kept:
        if outbox.name() in names:
            yield from check_delivery(outbox)
        elif outbox.waiting():
            yield None, f"for another URL {what_waits(outbox)} (`flush --adopt`)"


def check_delivery(outbox: Outbox) -> Iterator[Check]:
    """How delivery from an outbox goes."""
    kind, state, now = kind_of(outbox), State(outbox), time.time()
    backoff_s, names = outbox.backoff_left_s(), outbox.waiting()
    late = backoff_s or (names and now - PingName(names[0]).ns / 1e9 > LIFE_S)
    yield not late, f"{kind}: {what_waits(outbox)}{': `flush` sends now' * bool(late)}"
    if backoff_s:
        why = in_words(state.problem, kind)
        yield False, f"{kind}: the next try is in {span(backoff_s)}, for {why}"
    done = state.delivered_at
    when = f"{span(now - done)} ago" if done else "none yet"
    yield bool(done) or None, f"{kind}: last delivery: {when}"
    for reason, count in sorted(state.losses.items()):
        yield None, f"{kind}: {count} lost so far, {reason}"
    pings = [line["ping"] for line in deliveries(outbox)[-100:]]
    short = [ping for ping in pings if ping.get("usage_complete") is False]
    if short:
        why = "an answer came late, the next has it"
        if not any("total_tokens" in ping for ping in short):
            why = "no transcript could be read"
        text = f"{kind}: usage_complete is false in {len(short)} of the last"
        yield None, f"{text} {len(pings)}: {why}"


def send_test(around: Surroundings) -> Iterator[Check]:
    """Send a ping that is marked as a test, the way that every ping goes."""
    settings, ns = around.settings, time.time_ns()
    event = {"hook_event_name": "Test", "cwd": os.getcwd()}
    ping = make_ping(event, settings, project_of(event, settings), ns, 0)
    for tracker in find_trackers(settings)[0]:  # why others are none is told above
        if tracker.wants(ping):
            kind, outbox = tracker.kind, outbox_of(settings, tracker)
            name = enqueue(outbox, tracker, ns, ping, {})
            what = flush_outbox(outbox, tracker, settings)
            kept = [outbox.file(name), outbox.path("refused", name)]
            if any(map(os.path.exists, kept)):
                yield False, f"{kind} did not take the test, {in_words(what, kind)}"
            else:
                yield True, f"{kind} has taken the test {ping['event_id']}"


def doctor(options: Namespace) -> int:
    """check all that lies between an event and the tracker, and say what to do

    --send  send one real ping, with the event Test: that proves the token
    """
    around, well = Surroundings(), True
    os.environ.update(around.settings.environ)  # urllib looks for proxies there
    looks = [check_settings, check_hooks, check_bytecode, check_trackers, check_disk]
    for look in [*looks, send_test] if options.send else looks:
        try:
            for good, line in look(around):
                say(f"{MARKS[good]} {line}")
                well = well and good is not False
        except (Skipped, OSError, ValueError) as error:
            say(f"{MARKS[False]} not all could be looked at: {error}")
            well = False
    return 0 if well else 1


# -- Commands: set-up ------------------------------------------------------------------

BACKUP = ".telemhq-backup"  # added to the name of a file that install replaces
TITLE = b"Tell a TelemHQ tracker what Claude Code did"  # each version begins with it
OLDEST_CLIENT = (2, 1, 78)  # older ones ignore settings whole that name StopFailure


def is_old_client() -> bool:
    """Whether the Claude Code here knows no StopFailure."""
    import re
    import subprocess

    asked, null = ["claude", "--version"], subprocess.DEVNULL
    try:
        said = subprocess.check_output(asked, stdin=null, stderr=null, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return False
    version = tuple(map(int, re.findall(rb"\d+", said)[:3]))
    return len(version) == 3 and version < OLDEST_CLIENT


def add_ours(content: Fields, url: str | None, events: list[str]) -> None:
    """Give settings our hooks for these events, and the ping URL unless it is None."""
    if url is not None:
        content.setdefault("env", {})[URL_NAME] = url
    there = [hook.event for hook in hooks_of(content) if hook.names_script]
    for event in [event for event in events if event not in there]:
        group: Fields = {"matcher": TOOLS} if event in TOOL_EVENTS else {}
        group["hooks"] = [{"type": "command", "command": SCRIPT}]
        content.setdefault("hooks", {}).setdefault(event, []).append(group)
    for hook in hooks_of(content):
        if hook.is_ours:
            ours = hook_command(hook.event)
            hook.entry.update(command=ours, timeout=HOOK_TIMEOUT_S)


def without_ours(content: Fields) -> Fields:
    """Settings without our hooks, the ping URL, and what that leaves empty."""
    content.get("env", {}).pop(URL_NAME, None)
    for hook in hooks_of(content):
        if hook.is_ours:
            hook.group["hooks"].remove(hook.entry)
    hooks = content.get("hooks", {})
    for event, groups in list(hooks.items()):
        groups[:] = [group for group in groups if group["hooks"]]
        if not groups:
            del hooks[event]
    return {k: v for k, v in content.items() if v != {} or k not in ("hooks", "env")}


def print_changes(before: str, after: str) -> None:
    """Print the lines that go and those that come, without our URL."""
    import difflib
    import re

    url = re.compile(rf'("{URL_NAME}"\s*:\s*)"[^"]*"')
    old, new = ([s.rstrip(",") for s in t.splitlines()] for t in (before, after))
    for line in difflib.unified_diff(old, new, n=0, lineterm=""):
        if line[0] in "+-" and line.strip() not in ("+++", "---"):
            print(" ", url.sub(r'\1"..."', line))


def chosen_url(url: str | None, settings: Settings) -> str | None:
    """The ping URL to write: that one, or (None) what a person types unseen, until
    pings can go there; None when that is nothing. Skipped: none can go to that one."""
    import getpass

    while True:
        asked = "The URL of your tracker (not shown; Enter to go on without): "
        wanted = getpass.getpass(asked).strip() if url is None else url
        if url is None and not wanted:
            return None
        try:
            TelemHQ(Settings({**settings.environ, URL_NAME: wanted}))
            rest = wanted.partition("://")[2].rstrip("/")
            if "/" in rest and not rest.endswith("/ping"):
                return wanted
            raise Skipped(f"{URL_NAME} has no token: copy your tracker's whole URL")
        except Skipped as why:
            if url is not None:
                raise
            print(f"{why}.")


def settings_to_change() -> File:
    """The user's settings; Skipped when they cannot be changed without harm."""
    file = File(config_path("settings.json"))
    if file.problem:
        why = f"it is no settings file: {file.problem}"
        raise Skipped(f"{file.path} is left as it is: {why}")
    return file


def write_all(changes: list[Change]) -> None:
    """Make each file what it is to be; Skipped names one that cannot be written."""
    for path, content, mode in changes:
        try:
            if content is None:
                remove(path)
            else:
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                write_file(path, content)
                os.chmod(path, mode)
        except OSError as error:  # a full disk has no path in it
            raise Skipped(f"{path}: {error.strerror}") from error


def to_install(options: Namespace, url: str | None) -> list[Change]:
    """Say what install will change; it, the settings last."""
    changes: list[Change] = []
    script = File(config_path("hooks", SCRIPT))
    source = read_file(os.path.realpath(THIS_FILE), FILE_MAX_BYTES)
    if TITLE not in (script.raw or TITLE)[:1000]:
        say(f"{script.path} is another script: until uninstall puts it back")
        say(f"  it is kept as {script.path + BACKUP}")
        changes.append((script.path + BACKUP, script.raw, script.mode))
    if script.raw != source:
        say(f"{script.path} will be this script, version {__version__}.")
        changes.append((script.path, source, 0o700))
    file, events = settings_to_change(), [*EVENTS]
    if is_old_client():
        print("Claude Code here is older than 2.1.78, which alone knows StopFailure.")
        events.remove("StopFailure")
    events += TOOL_EVENTS if options.tools else ()
    add_ours(file.content, url, events)
    text = file.retold(file.content)
    if text != file.text:
        say(f"{file.path} will {'be made' if file.raw is None else 'change'}:")
        print_changes(file.text if file.raw else "", text)
        if os.path.islink(file.path):
            say(f"It is a link: what changes is {file.real}")
        again = any(hook.is_ours and IMPORT in hook.command for hook in file.hooks)
        if file.raw is not None and not again:
            say(f"As it is now it is kept as {file.real + BACKUP}")
            changes.append((file.real + BACKUP, file.raw, 0o600))
        if file.mode & 0o044 and os.name == "posix" and URL_NAME in text:
            print("Others can read it, and the URL in it is a secret:")
            say(f"  chmod 600 {file.real}")
        raw = text.encode("utf-8", "backslashreplace")
        changes.append((file.real, raw, file.mode))
    return changes


def install(options: Namespace) -> int:
    """put the script into ~/.claude/hooks and register it in settings.json

    --url URL  the ping URL, to be kept in settings.json
    --tools  register tool activity, too: Bash, Edit, MultiEdit, Write
    --send  send one real ping at the end, with the event Test
    --dry-run  show what would change, and change nothing
    --yes  ask nothing
    """
    settings, url = Surroundings().settings, options.url
    asks = os.isatty(0) and not (options.yes or options.dry_run)
    wanted = TelemHQ.kind in settings.destinations and not settings.url
    if url is not None or (asks and wanted):
        url = chosen_url(url, settings)
    changes = to_install(options, url)
    if options.dry_run:
        print("Nothing was changed.")
        return 0
    if changes:
        need_yes("Write this?", options.yes)
        write_all(changes)
        print("Installed. Sessions that run already must be started anew.")
    if asks and not options.send and find_trackers(Surroundings().settings)[0]:
        offer = "Send one real test ping, too? Nothing else proves the token."
        options.send = says_yes(offer)
    return doctor(options)


def to_remove() -> list[Change]:
    """Say what uninstall removes; it, settings first: no command without its script."""
    import glob

    changes: list[Change] = []
    file, script = settings_to_change(), File(config_path("hooks", SCRIPT))
    before, backup = File(script.path + BACKUP), File(file.real + BACKUP)
    if TITLE not in (script.raw or TITLE)[:1000]:
        raise Skipped(f"{script.path} is not this script; nothing was changed")
    if URL_NAME in file.env or any(hook.is_ours for hook in file.hooks):
        content, what = without_ours(file.content), "our hooks and the ping URL"
        left = file.retold(content).encode("utf-8", "backslashreplace")
        raw = left if content else None
        # Hooks without their script would be a veto.
        veto = before.raw is None and any(hook.is_ours for hook in backup.hooks)
        same = content == without_ours(backup.content) and not veto
        if same and backup.raw is not None:
            raw, what = backup.raw, "it is again as it was before install"
        say(f"  {file.path}: {what}")
        changes += [(file.real, raw, file.mode), (backup.path, None, 0)]
    if script.raw is not None:
        back = ", and the one from before install comes back"
        say(f"  {script.path}{'' if before.raw is None else back}")
        changes += [(script.path, before.raw, before.mode), (before.path, None, 0)]
        made = config_path("hooks", "__pycache__", SCRIPT[:-3])
        changes += [(path, None, 0) for path in glob.glob(glob.escape(made) + ".*.pyc")]
    return changes


def uninstall(options: Namespace) -> int:
    """the inverse of install: settings as before, script and state removed

    --keep-state  leave what waits, and the record of what was sent
    --yes  ask nothing
    """
    import shutil

    around = Surroundings()
    state_dir = around.settings.state_dir or ""
    if around.plugin:
        say(f"The plugin in {around.plugin} stays, with its state. To remove:")
        say(f"  claude plugin uninstall {PLUGIN}; rm -r {state_dir}")
    print("This goes:")
    changes = to_remove()
    kept = [] if options.keep_state or around.plugin else outboxes(state_dir)
    if not (changes or kept):
        print("  nothing: none of it is here.")
        return 0
    if kept:
        waiting = sum(len(outbox.waiting()) for outbox in kept)
        sent = sum(len(deliveries(outbox)) for outbox in kept)
        say(f"  {state_dir}, with the pings that wait: {waiting} (`flush` sends them),")
        print(f"    and the record of those sent: {sent} (--keep-state leaves both)")
    need_yes("Remove it?", options.yes)
    write_all(changes)
    for outbox in kept:
        unlock(wait_for_lock(outbox))
        shutil.rmtree(outbox.directory)
    made = [config_path("hooks", "__pycache__"), config_path("hooks")]
    for directory in (*made, state_dir, config_path()):
        if not os.path.islink(directory):
            remove(directory)  # unless there is more in it
    print("Removed.")
    return 0


# -- Commands: seeing ------------------------------------------------------------------

DEMO_MODEL = "claude-opus-5-5"
COMMON = {"session_id": "sample", "cwd": "/home/you/acme"}
SAMPLES: dict[str, Fields] = {
    "PostToolUseFailure": {
        **COMMON,
        "transcript_path": "/home/you/.claude/session.jsonl",
        "tool_name": "Bash",
        "tool_input": {"command": "./deploy --password hunter2"},
        "error": "Exit code 3\nno /home/you/acme/deploy.key",
        "duration_ms": 1250,
    },
    "SessionEnd": {**COMMON, "reason": "prompt_input_exit"},
    "Stop": {**COMMON, "last_assistant_message": "The password is hunter2."},
}
SAMPLE_USED = dict(zip(TOKENS, (12, 950, 41200, 2300, 0, 44462)))


def tracker_named(name: str, settings: Settings) -> Tracker:
    """A tracker by its kind, as it is set up; before it is, with placeholders."""
    if name not in TRACKERS:
        raise Skipped(f"there is no tracker {name}; there are: {', '.join(TRACKERS)}")
    make: Any = TRACKERS[name]
    try:
        return TRACKERS[name](settings)
    except Skipped as why:
        print(f"{why}; shown with placeholders.", file=sys.stderr)
    url, *others = [n for n in make.variables if not n.endswith("HEADERS")]
    environ = {url: "https://tracker.test", **dict.fromkeys(others, "sample")}
    return TRACKERS[name](Settings(environ))


def preview(options: Namespace) -> int:
    """print what a tracker gets of an event (stdin, or a sample)

    event PostToolUseFailure|SessionEnd|Stop  a sample
    --destination TRACKER  the tracker (telemhq)
    """
    import json

    settings, ns = Surroundings().settings, time.time_ns()
    if options.event or os.isatty(0):
        name = options.event or "Stop"
        raw = encode_json({"hook_event_name": name, **SAMPLES[name]}).encode()
    else:
        raw = read_stdin()
    event = event_in(raw)
    ping = make_ping(event, settings, project_of(event, settings), ns, len(raw))
    tracker = tracker_named(options.destination or TelemHQ.kind, settings)
    beside: Fields = {"own": tracker.frozen(ping)}
    if settings.usage and ping["event"] in USAGE_EVENTS:
        counts = [SAMPLE_USED[name] for name in TOKENS[:5]]
        beside["messages"] = [["msg_01", DEMO_MODEL, ns // 10**6, *counts]]
        beside["totals"] = beside["since_end"] = {**SAMPLE_USED, "tool_calls": 3}
        ping = gate({**ping, **SAMPLE_USED, "model": DEMO_MODEL})
        print("The token counts are samples.", file=sys.stderr)
    beside = gate_beside(beside, tracker.needs)
    requests = tracker.requests(ping, beside) if tracker.wants(ping) else []
    for request in requests:
        print(f"POST {origin(request.url)}/...", file=sys.stderr)
        print(json.dumps(json.loads(request.body or b"{}"), indent=2), flush=True)
    if not requests:
        print(f"{tracker.kind} gets nothing of {ping['event']}.")
    return 0


def demo(_: Namespace) -> int:
    """show, on this machine only, what leaves of an event and what stays"""
    import json
    import py_compile
    import shutil
    import tempfile
    import textwrap

    print("What Claude Code hands over, and what leaves of it:\n", flush=True)
    with tempfile.TemporaryDirectory() as place:
        script = os.path.join(place, SCRIPT)
        write_file(script, read_file(os.path.realpath(THIS_FILE), STATE_MAX_BYTES))
        py_compile.compile(script)
        failed = SAMPLES["PostToolUseFailure"]
        event = {"hook_event_name": "PostToolUseFailure", **failed}
        start = f"import sys; sys.path.insert(0, {place!r}); {IMPORT}"
        environ = {k: v for k, v in os.environ.items() if k[:8] != "TELEMHQ_"}
        ping, times = play([sys.executable, "-ESc", start], event, environ)[1:]
    if not ping:
        raise Skipped("a ping did not arrive")
    lines = [f"{ping['event']}: {times}"]
    for name, value in failed.items():
        text = json.dumps(value)
        if ping.get(name) != value:
            left = {f"{name}_hash": " #", f"{name}_chars": " ="}
            text = f"~~{text}~~" + "".join(left[k] for k in left if k in ping)
        lines.append(f"  {name}: {text}")
    marks = "~~: it stayed here. Of # only a hash has left, of = only the length."
    lines += [f"  left {json.dumps(ping)}", "", marks, ""]
    width = min(88, shutil.get_terminal_size().columns)
    wrapper = textwrap.TextWrapper(width, subsequent_indent="    ")
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    for paragraph in [*lines, f"To install it: python3 {SCRIPT} install"]:
        print(wrapper.fill(paragraph))
    return 0


COLUMNS = {  # of the table: name in a row, which is the pings' own -> heading
    "turns": "turns",
    "failed_turns": "failed",
    "tool_calls": "tools",
    "tool_failures": "failed",
    **dict(zip(TOKENS, "input output cached written thinking tokens".split())),
    "cost_usd": "cost $",
}


def kept_of(name: str | None) -> list[tuple[Outbox, list[Fields]]]:
    """What left all outboxes, or those of that kind or name; Skipped: nothing."""
    kept = outboxes(Surroundings().settings.state_dir)
    kept = [outbox for outbox in kept if name in (None, outbox.name(), kind_of(outbox))]
    found = [(outbox, deliveries(outbox)) for outbox in kept]
    if not any(lines for _, lines in found):
        raise Skipped("nothing was delivered yet: `doctor` says why, `flush` sends")
    return found


def sent(options: Namespace) -> int:
    """print the last 20 pings that left, as they were sent, with time and answer

    --destination NAME  only this one: a tracker, or its directory's name
    """
    for outbox, lines in kept_of(options.destination):
        for line in lines[-20:]:
            for body in line.get("bodies") or [encode_json(line["ping"])]:
                print(line.get("at"), kind_of(outbox), line.get("answer"), body)
    return 0


def shares(ping: Fields, by: str) -> list[tuple[str, Fields]]:
    """[(row's name, what of the ping counts there)]; several with several models."""
    models = ping.get("models")
    if by == "model" and isinstance(models, dict):
        return [
            (name, {**used, "total_tokens": sum(used.get(k, 0) for k in TOKENS[:4])})
            for name, used in models.items()
            if counts_by_model({name: used})
        ]
    seconds = seconds_of(ping.get("timestamp"))
    day = time.strftime("%Y-%m-%d", time.localtime(seconds)) if seconds else "unknown"
    name = "session_id" if by == "session" else by
    return [(str({**ping, "day": day}.get(name, "unknown")), ping)]


def rows_of(pings: list[Fields], by: str) -> dict[str, Fields]:
    """Sums for each day, project, model or session, of what its pings have told."""
    rows: dict[str, Fields] = {}
    for ping in pings:
        turn = ping.get("event") in ("Stop", "StopFailure")
        failed = turn and ping.get("status") == "failed"
        more = {"turns": int(turn), "failed_turns": int(failed)}
        for key, part in shares({**ping, **more}, by):
            for name in COLUMNS:
                if number(part.get(name)) and (part[name] or name == "cost_usd"):
                    row = rows.setdefault(clean(key), {})
                    row[name] = round(row.get(name, 0) + part[name], 6)
    return dict(sorted(rows.items()))


def print_table(rows: dict[str, Fields], by: str) -> None:
    """Print rows and sums; without room, no kinds of tokens, then names cut off."""
    import shutil

    total: Fields = {}
    for row in rows.values():
        total.update({name: total.get(name, 0) + row[name] for name in row})
    rows = {**rows, "in all": total}
    names = list(COLUMNS)[4 if by == "model" else 0 :]  # a model has no turns
    longest = max(map(len, rows))
    for left in (names, [name for name in names if name not in TOKENS[:5]]):
        lines = [[COLUMNS[name] for name in left]]
        for row in rows.values():
            lines.append([f"{row.get(name, 0):,}" for name in left])
            lines[-1][-1] = f"{row['cost_usd']:.2f}" if "cost_usd" in row else "\u2013"
        widths = [1 + max(map(len, column)) for column in zip(*lines)]
        room = shutil.get_terminal_size().columns - sum(widths)
        if room >= longest:
            break
    room = min(longest, max(room, len("2026-01-01")))
    for key, cells in zip([by, *rows], lines):
        print(f"{key:{room}.{room}}" + "".join(map(str.rjust, cells, widths)))


def report(options: Namespace) -> int:
    """add up what was delivered, by day, project, model or session

    --by day|project|model|session  one row for each (day)
    --destination NAME  only this one: a tracker, or its directory's name
    """
    by, found = options.by or "day", kept_of(options.destination)
    for outbox, lines in found:
        rows = rows_of([line["ping"] for line in lines], by)
        if len(found) > 1:
            print(f"{outbox.name()}:")
        if rows:
            print_table(rows, by)
    return 0


# -- Commands: the command line --------------------------------------------------------


def command_line() -> ArgumentParser:
    """All commands; of what is parsed, `run` is the command's function."""
    import argparse

    about = (__doc__ or "").partition("Variables\n")[2].partition("Exit status")[0]
    parser = argparse.ArgumentParser(
        prog=SCRIPT,
        epilog=f"variables:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", prog=SCRIPT, required=True
    )
    for run in (demo, preview, install, doctor, sent, report, flush, uninstall):
        # A docstring has a line for each option: its form, two spaces, what it means.
        said, *forms = (run.__doc__ or "").splitlines()
        command = commands.add_parser(run.__name__, help=said, description=said)
        command.set_defaults(run=run)
        for form, _, meaning in (text.strip().partition("  ") for text in forms):
            name, _, value = form.partition(" ")
            how: Fields = {"action": "store_true"}
            if "|" in value:
                how = {"choices": value.split("|")}
            elif value:
                how = {"metavar": value}
            if name[:1] != "-":
                how["nargs"] = "?"
            if meaning:
                command.add_argument(name, help=meaning, **how)
    return parser


def main(arguments: list[str]) -> int:
    """Run a command; the exit status."""
    os.umask(0o077)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what a terminal does not know
    try:
        options = command_line().parse_args(arguments or ["--help"])
        status: int = options.run(options)
        return status
    except (KeyboardInterrupt, EOFError):
        print(file=sys.stderr)  # behind the question
        told, status = "interrupted", 130
    except ImportError as error:
        told, status = f"this Python lacks the module {error.name}; take a whole one", 1
    except BrokenPipeError:  # head(1) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (Skipped, OSError, ValueError) as error:
        told, status = str(error), 1
    print(f"{SCRIPT}: {at_home(told)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    if sys.argv[1:] or os.isatty(0):
        sys.exit(main(sys.argv[1:]))
    take_settings()
    hook()
