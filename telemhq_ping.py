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
    TELEMHQ_PING_URL    where pings go; empty: no tracker gets anything
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
    from os.path import join, realpath  # it is there already

    # Homebrew's prefix is a link; with a separator, for /opt/py-app is not in /opt/py.
    ours = tuple(join(realpath(p), "") for p in (sys.base_prefix, sys.base_exec_prefix))
    sys.path[:] = [p for p in sys.path if join(realpath(p), "").startswith(ours)]
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
    from collections import Counter
    from socket import socket
    from ssl import SSLContext
    from subprocess import Popen
    from typing import Any, Callable, Dict, Iterator, NoReturn, Optional, Tuple
    from urllib.request import OpenerDirector

    Names = Tuple[str, ...]  # of fields, events, variables
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
    return (
        isinstance(value, str)
        and len(value) <= 128
        and value[:1] in LETTERS_DIGITS
        and LETTERS_DIGITS.union("_.:-", more).issuperset(value)
    )


def number(value: object) -> bool:
    """A finite number from 0 up to 2^53, which every JSON reader keeps exact."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value < 1 << 53  # of NaN that is false
    )


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
ON, OFF = ("1", "yes", "on", "true"), ("0", "no", "off", "false")


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
        self.usage = self.switch("TELEMHQ_USAGE", "1")
        self.tool_names = self.switch("TELEMHQ_TOOL_NAMES", "1")
        self.project = clean(environ.get("TELEMHQ_PROJECT", "")).strip()
        self.machine: str | None = self.choice(
            "TELEMHQ_MACHINE",
            lambda v: identifier(v) and v,
            "only letters, digits and _ . : - may be in it",
        )
        self.timeout_s: float = (
            self.choice("TELEMHQ_TIMEOUT", duration, "it is no number of seconds")
            or TIMEOUT_S[0]
        )
        self.state_dir: str | None = (  # None: nothing tells where home is
            self.choice("TELEMHQ_STATE_DIR", absolute, "it must be absolute")
            or absolute(os.path.join(environ.get("CLAUDE_CONFIG_DIR", ""), "telemhq"))
            or absolute("~/.claude/telemhq")
        )
        named = environ.get("TELEMHQ_DESTINATIONS", "").lower().replace(",", " ")
        self.destinations = list(dict.fromkeys(named.split())) or ["telemhq"]

    def choice(self, name: str, accept: Callable[[str], Any], problem: str) -> Any:
        """What `accept` makes of a variable; None when that is nothing."""
        value = self.environ.get(name, "")
        found = accept(value) or None
        if value and not found:
            self.ignored.append(f"{name} is ignored: {problem}")
        return found

    def switch(self, name: str, unset: str = "0") -> bool:
        """A variable that is 1 or 0; what is neither counts as 0."""
        value = (self.environ.get(name) or unset).lower()
        if value not in (*ON, *OFF):
            self.ignored.append(f"{name} counts as 0: it must be 1 or 0")
        return value in ON


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


def origin(url: str) -> str:
    """Scheme, host and port: what may be shown of a valid URL."""
    return "/".join(url.replace("?", "/").replace("#", "/").split("/")[:3])


def split_url(url: str) -> tuple[str, str]:
    """(scheme, host) of an absolute URL; ValueError says what is wrong."""
    if not LETTERS_DIGITS.union("-._~:/?#[]@!$&'()*+,;=%").issuperset(url):
        raise ValueError("it has a space or another character that no URL may hold")
    scheme, _, host = origin(url).lower().partition("://")
    port = "443"
    if scheme not in ("http", "https"):
        raise ValueError("it must start with https://")
    if ":" in host and not host.endswith("]"):
        host, _, port = host.rpartition(":")
    host = host.strip("[]")  # of an IPv6 address
    known = host and LETTERS_DIGITS.union("-._:").issuperset(host)
    if not (known and port.isdigit() and int(port) < 65536):
        raise ValueError("it must have HOST or HOST:PORT, and no user:password@")
    return scheme, host


def loopback(host: str) -> bool:
    """Whether `host` is this machine, by the names that people use."""
    return host in ("localhost", "127.0.0.1", "::1")


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
    return isinstance(value, list) and all(
        isinstance(row, list)
        and len(row) == 3 + 5
        and all(map(model_name, row[:2]))
        and all(map(number, row[2:]))
        for row in value
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
        name: fields[name] for name, shape in shapes.items() if shape(fields.get(name))
    }


def gate_beside(fields: Fields, needs: Names) -> Fields:
    """Of what stands beside a ping only what its tracker needs, in its shape."""
    return gate(fields, {name: BESIDE[name] for name in needs})


def model_shown(name: object) -> str:
    """A model's name as it may leave: a router's vendor/name, an ARN is `other`."""
    return str(name) if model_name(name) else "other"


def tool_shown(name: str, tool_names: bool) -> str:
    """A tool's name as it may leave: `mcp__server__tool` may tell on its user."""
    return "mcp" if not tool_names and name.startswith("mcp__") else name


def small_file(path: str) -> str:
    """What a small text file begins with; "" when it is none, or cannot be read."""
    if not os.path.isfile(path):  # a FIFO, which nobody may ever write to
        return ""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(PATH_MAX_CHARS)
    except OSError:
        return ""


def main_repository(directory: str) -> str:
    """Of a git worktree its repository's name, else "". A worktree's .git is a file:
    `gitdir: REPOSITORY/.git/worktrees/NAME` (gitrepository-layout)."""
    text = small_file(os.path.join(directory, ".git"))
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
    if (directory + os.sep).startswith(top + os.sep):
        directory = top
    name = directory.replace("\\", "/").split("/")[-1]
    name = clean(main_repository(directory) or name)
    return name if name.strip(" .") else "unknown"


def error_fields(event: Fields) -> Fields:
    """Of what failed its `error`, with numbers: a tool's text holds its output."""
    name, error = event.get("hook_event_name"), event.get("error")
    if name == "StopFailure":
        return {"error": error}  # one of Claude Code's own codes, or the gate drops it
    if name != "PostToolUseFailure":
        return {"error": "error"} if error else {}
    text = str(error or "")
    fields: Fields = {"error": "tool_error", "error_chars": len(text)}
    begin, _, code = text.partition("\n")[0].rpartition(" ")
    if begin == "Exit code" and identifier(code) and code.isdigit():
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
    agent = texts.get("agent_type")
    if agent and not (settings.tool_names or agent in CLIENT_AGENTS):
        fields["agent_type"] = "custom"
    for key in ("cwd", "transcript_path"):
        if texts.get(key):
            fields[f"{key}_hash"] = path_hash(texts[key], settings.hash_key)
    for key in ("prompt", "last_assistant_message"):
        if key in texts:
            fields[f"{key}_chars"] = len(texts[key])
    return fields


def make_ping(event: Fields, settings: Settings, ns: int, event_bytes: int) -> Fields:
    """The ping of one event. ns: when it happened, in nanoseconds since 1970.
    event_bytes: its size on stdin."""
    name, effort = event.get("hook_event_name"), event.get("effort")
    tasks = event.get("background_tasks")
    errors = error_fields(event)
    return gate(
        {
            **{key: event.get(key) for key in COPIED},
            **text_fields(event, settings),
            **errors,
            **ORIGIN,
            "event": name,
            "status": "failed" if errors else "success",
            "project": project_of(event, settings),
            "event_id": os.urandom(16).hex(),
            "timestamp": iso_time(ns),
            "machine": settings.machine,
            "event_bytes": event_bytes,
            "effort": effort.get("level") if isinstance(effort, dict) else None,
            "background_tasks": len(tasks) if isinstance(tasks, list) else None,
            # Elsewhere it is a text.
            "reason": event.get("reason") if name == "SessionEnd" else None,
        }
    )


def local_of(event: Fields, settings: Settings, ping: Fields) -> Fields:
    """What the sender needs for the ping's usage and never sends; {}: no usage."""
    transcript = event.get("transcript_path")
    if not ("session_id" in ping and str(transcript).endswith(".jsonl")):
        return {}
    if not settings.usage:
        return {"usage": False}
    return {
        "transcript": transcript,
        "agent_transcript": event.get("agent_transcript_path") or None,
        "tool_names": settings.tool_names,
        "git": settings.git,
    }


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
    what must never be shown, others. default_url: where it is else; path: what belongs
    behind that. token: the variable that has it, file: where else it may stand. events:
    those that it wants (none: all). needs: what of BESIDE it is given. asked: the path
    where a GET shows whether it takes us. reads: how much of a 200's body says more
    than 200. secret: what it knows us by. own: texts for its bodies, by its own
    variables; they wait beside a ping, for the sender may be another session's, with
    other settings. nothing: a body that records nothing, where a GET says less.
    Skipped: why none can be made of the settings.
    """

    kind = default_url = path = token = file = asked = ""
    variables: Names = ()
    events: Names = ()
    needs: Names = ()
    dislike = "it may not like a field, or the size"  # why it refuses, most likely
    reads = 0

    def __init__(self, settings: Settings) -> None:
        self.url = url_in(settings, self.variables[0], self.default_url, self.path)
        self.headers = dict(JSON_BODY)
        self.secret = ""
        if self.token:
            self.secret = secret_in(settings, self.token, self.file)
            self.headers["Authorization"] = f"Bearer {self.secret}"
        self.own: Fields = {}
        self.nothing: Fields = {}

    def directory_name(self) -> str:
        """Its directory's name, which tells neither the URL nor the secret."""
        known_by = f"{self.url}\n{self.secret}".strip()
        return f"{self.kind}-{sha256_hex(known_by.encode())[:12]}"

    def wants(self, ping: Fields) -> bool:
        """Whether a ping concerns it: others are not even queued."""
        return not self.events or ping.get("event") in self.events

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


def url_in(settings: Settings, name: str, default: str, path: str) -> str:
    """The URL in a variable, with the path that belongs behind it; Skipped when it is
    none that a ping may go to."""
    url = settings.environ.get(name) or default
    if not url:
        raise Skipped(f"{name} is not set in your own settings")
    try:
        scheme, host = split_url(url)
        if scheme == "http" and not (settings.allow_http or loopback(host)):
            raise ValueError(ALLOW_HTTP)
    except ValueError as error:
        raise Skipped(f"{name} is not usable: {error}") from None
    if path:
        url = url.rstrip("/")
    return url if url.endswith(path) else url + path


def secret_in(settings: Settings, name: str, path: str) -> str:
    """A token that may stand in a header, in a variable or else in a file (~ is home);
    Skipped says what is wrong, and not it."""
    text = (settings.environ.get(name) or small_file(absolute(path) or "")).strip()
    if not text:
        raise Skipped(f"{name} is not set in your own settings")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise Skipped(f"{name} is not usable: it has characters that no token has")
    return text


class TelemHQ(Tracker):
    """TelemHQ (public docs): the ping is the body, the token is in the URL's path."""

    kind = "telemhq"
    variables = ("TELEMHQ_PING_URL",)

    def __init__(self, settings: Settings) -> None:
        self.default_url = settings.url
        if not self.default_url:
            raise Skipped(
                "TELEMHQ_PING_URL is not set: `install --url URL` or the plugin sets it"
            )
        super().__init__(settings)

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
    path = "/api/ingest/messages"
    token = "WIGTOKEN_TOKEN"
    needs = ("own", "messages")
    ROWS_MAX = 1000  # more in a request: 413

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        machine = settings.environ.get("WIGTOKEN_MACHINE") or settings.machine or ""
        if not identifier(machine) or ":" in machine:
            raise Skipped("WIGTOKEN_MACHINE is not set to letters, digits and _ . -")
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
        own = beside.get("own") or self.own
        return [
            self.post("", {**own, "messages": rows[first : first + self.ROWS_MAX]})
            for first in range(0, len(rows), self.ROWS_MAX)
        ]


class Recorder(Tracker):
    """Recorder (its recipe, CLI and SDK): a request a value, four values a session,
    under a prefix that is chosen for each project. Nothing is known of how it takes a
    repeat: the comment tells one."""

    kind = "recorder"
    variables = ("RECORDER_URL", "RECORDER_PAT", "RECORDER_PREFIX")
    events = SESSION_EVENTS  # or a session that ends without a word is never told
    needs = ("own", "since_end")
    default_url = "https://api.recorder.nasebanal.com"
    path = "/api/v1/records"
    token = "RECORDER_PAT"
    NAMES = ("/Input", "/Output", "/CacheRead", "/CacheCreate")  # as TOKENS has them

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        prefix = settings.environ.get("RECORDER_PREFIX", "").rstrip("/ ")
        if not line_of_text(prefix):
            raise Skipped("RECORDER_PREFIX is not set to a line of text here")
        self.own = {"prefix": prefix}

    def requests(self, ping: Fields, beside: Fields) -> list[Request]:
        """What the session used, when it ends (again: since it last did)."""
        used, own = beside.get("since_end", {}), beside.get("own")
        ends = ping.get("event") in ("SessionEnd", "SessionLost")
        if not (ends and own and used.get("total_tokens")):
            return []
        prefix = clean(own["prefix"].replace("{project}", str(ping.get("project"))))
        bodies = [
            {
                "name": prefix + name,
                "unit": "tokens",
                "data_type": "integer",
                "chart_type": "line",
                "value": used.get(count),
                "recorded_at": ping.get("timestamp"),
                "comment": f"telemhq_ping {ping['event_id']}",
            }
            for name, count in zip(self.NAMES, TOKENS)
        ]
        return [self.post("", body) for body in bodies]


def with_all_input(counts: Fields) -> Fields:
    """The same, with all tokens that went in, which TelemHQ's names tell apart."""
    if "total_tokens" not in counts:
        return counts
    return {**counts, "all_input": counts["total_tokens"] - counts["output_tokens"]}


def picked(fields: Fields, names: str) -> Fields:
    """The fields named that there are; `theirs=ours`: under a tracker's name."""
    found = {}
    for word in names.split():
        name, _, field = word.partition("=")
        if (field or name) in fields:
            found[name] = fields[field or name]
    return found


OTLP_NAMES = (  # the GenAI conventions' or the client's own telemetry's, the ping's
    "gen_ai.provider.name=provider gen_ai.response.model=model "
    "gen_ai.conversation.id=session_id session.id=session_id prompt.id=prompt_id "
    "gen_ai.usage.input_tokens=all_input gen_ai.usage.output_tokens=output_tokens "
    "gen_ai.usage.cache_read.input_tokens=cached_input_tokens "
    "gen_ai.usage.cache_creation.input_tokens=cache_creation_input_tokens"
)
OTLP_TOLD = {pair.partition("=")[2] for pair in OTLP_NAMES.split()}.union(
    ("input_tokens", "timestamp", "event", "hook_version")
)
OTLP_TYPES: dict[type, str] = {
    str: "stringValue",
    bool: "boolValue",
    int: "intValue",
    float: "doubleValue",
}


def header_in(pair: str) -> tuple[str, str]:
    """Name=value with %XX in the value, as OpenTelemetry's own variables have it;
    ValueError when it is not so."""
    name, equals, value = map(str.strip, pair.partition("="))
    first, *rest = value.split("%")
    value = first + "".join(chr(int(p[:2], 16)) + p[2:] for p in rest)
    if not (equals and identifier(name) and value.isascii() and value.isprintable()):
        raise ValueError("no header")
    return name, value


class OTLP(Tracker):
    """OpenTelemetry: a log record a ping, OTLP/HTTP with JSON (its specification: names
    in lowerCamelCase, 64-bit integers as strings, nanoseconds). At least once:
    telemhq.event_id tells a repeat."""

    kind = "otlp"
    variables = ("TELEMHQ_OTLP_ENDPOINT", "TELEMHQ_OTLP_HEADERS")
    dislike = "it may take protobuf only, and no JSON"
    path = "/v1/logs"
    reads = 4096

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.secret = settings.environ.get("TELEMHQ_OTLP_HEADERS", "")
        try:
            given = map(header_in, filter(str.strip, self.secret.split(",")))
            self.headers = {**dict(given), **JSON_BODY}
        except ValueError:
            text = "it must be Name=value,Name=value (%2C is a comma, %20 a space)"
            raise Skipped(f"TELEMHQ_OTLP_HEADERS is not usable: {text}") from None
        self.nothing = {"resourceLogs": []}

    def requests(self, ping: Fields, _: Fields) -> list[Request]:
        """The one record. (Back ends that do not know eventName yet show the body.)"""
        name, severity = f"claude_code.{ping.get('event')}", 9  # INFO
        if ping.get("status") == "failed":
            severity = 17  # ERROR
        when_ms = seconds_of(ping.get("timestamp")) * 1000
        rest = {f"telemhq.{key}": ping[key] for key in ping if key not in OTLP_TOLD}
        fields = {**picked(with_all_input(ping), OTLP_NAMES), **rest}
        record = {
            "timeUnixNano": f"{when_ms:.0f}000000",
            "severityNumber": severity,
            "eventName": name,
            "body": {"stringValue": name},
            "attributes": self.attributes({"event.name": name, **fields}),
        }
        scope = {"name": "telemhq_ping", "version": ping.get("hook_version", "")}
        service = {"attributes": self.attributes({"service.name": "claude-code"})}
        scopes = [{"scope": scope, "logRecords": [record]}]
        logs = [{"resource": service, "scopeLogs": scopes}]
        return [self.post("", {"resourceLogs": logs})]

    def attributes(self, fields: Fields, prefix: str = "") -> list[Fields]:
        """Fields as KeyValues, the inner ones of objects laid flat. An attribute keeps
        its type: a cost is a double, also when it is 0."""
        found: list[Fields] = []
        for name, value in fields.items():
            if isinstance(value, dict):
                found += self.attributes(value, f"{prefix}{name}.")
            else:
                kind = float if name.endswith("cost_usd") else type(value)
                told = str(value) if kind is int else kind(value)
                found.append({"key": prefix + name, "value": {OTLP_TYPES[kind]: told}})
        return found

    def refuses(self, body: bytes) -> bool:
        """A partial success rejects the one record: it must not be sent again."""
        try:
            partial = decode_json(body.decode("utf-8", "replace"))["partialSuccess"]
            return int(partial["rejectedLogRecords"]) > 0
        except (ValueError, KeyError, TypeError, OverflowError):
            return False


METRICS_KINDS = {
    "Notification": "notification",
    "PreCompact": "pre_compact",
    "SubagentStop": "subagent_stop",
}
METRICS_EVENT = "session_id client_meta event_id turn_id=prompt_id permission_mode "
METRICS_SESSION = (
    "session_id client_meta tokens_in_total=all_input tokens_out_total=output_tokens "
    "tool_calls_total=tool_calls "
)
METRICS = (  # a path, the events that are told there, the names of their fields
    (
        "/execution",  # also for any other with tokens
        "Stop StopFailure",
        METRICS_EVENT
        + "message_length=last_assistant_message_chars model duration_ms status "
        "stop_reason=error tokens_in=all_input tokens_out=output_tokens "
        "cache_read_tokens=cached_input_tokens thinking_tokens=reasoning_tokens "
        "cache_creation_tokens=cache_creation_input_tokens tools_used response_text",
    ),
    (
        "/tool",
        "PostToolUse PostToolUseFailure",
        METRICS_EVENT
        + "tool_name success duration_ms error_class=error subagent_type=agent_type",
    ),
    ("/system", " ".join(METRICS_KINDS), METRICS_EVENT + "kind payload"),
    ("/session", "SessionStart", METRICS_SESSION + "started_at=timestamp"),
    ("/session", "Stop", METRICS_SESSION),
    (
        "/session",
        "SessionEnd SessionLost",
        METRICS_SESSION + "ended_at=timestamp exit_kind=reason",
    ),
)


class ClaudeMetrics(Tracker):
    """Claude Metrics (its plugin 0.4.0; the server is not public): the metadata of what
    the plugin sends. Never a prompt, a response or an e-mail address."""

    kind = "claude-metrics"
    variables = (
        "CLAUDE_METRICS_API_URL",
        "CLAUDE_METRICS_API_TOKEN",
        "CLAUDE_METRICS_DISABLED",
    )
    default_url = "http://127.0.0.1:8000/api/v1"
    path = "/events"
    asked = "/session"
    token = "CLAUDE_METRICS_API_TOKEN"
    file = "~/.claude-metrics/token"
    events = tuple(" ".join(events for _, events, _ in METRICS).split())
    needs = ("totals",)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if settings.switch("CLAUDE_METRICS_DISABLED"):
            raise Skipped("CLAUDE_METRICS_DISABLED is set")
        # Without it, Laravel answers what it does not accept with a redirect.
        self.headers["Accept"] = "application/json"

    def requests(self, ping: Fields, beside: Fields) -> list[Request]:
        """One of each kind that the event is."""
        found = []
        for path, events, names in METRICS:
            used = path == "/execution" and ping.get("total_tokens")
            if used or ping["event"] in events.split():
                told = self.told(path, ping, beside)
                found.append(self.post(path, picked(told, names)))
        return found

    def told(self, path: str, ping: Fields, beside: Fields) -> Fields:
        """What the names stand for. event_id is a UUID, another one for each request of
        a ping; a session is known by its own id. (The plugin sends null, too, when it
        has no response_text.)"""
        from uuid import NAMESPACE_URL, uuid5

        totals = beside.get("totals", {}) if path == "/session" else {}
        tools = ping.get("tools", {}).items()
        return {
            "reason": "lost",
            **with_all_input({**ping, **totals}),
            "client_meta": {"client": f"telemhq_ping {ping.get('hook_version')}"},
            "event_id": str(uuid5(NAMESPACE_URL, f"{ping['event_id']}{path}")),
            "success": ping.get("status") == "success",
            "response_text": None,
            "tools_used": [{"name": name, "count": calls} for name, calls in tools],
            "kind": METRICS_KINDS.get(ping["event"]),
            "payload": picked(ping, "notification_type trigger agent_id agent_type"),
        }


TRACKERS: dict[str, type[Tracker]] = {
    found.kind: found for found in (TelemHQ, Wigtoken, Recorder, OTLP, ClaudeMetrics)
}


def find_trackers(settings: Settings) -> tuple[list[Tracker], list[str]]:
    """The trackers that the settings name; and why others that they name are none. An
    empty URL switches them all off."""
    trackers, problems = [], []
    if settings.environ.get("TELEMHQ_PING_URL") == "":
        return [], ["TELEMHQ_PING_URL is empty: all is switched off here"]
    for name in settings.destinations:
        try:
            if name not in TRACKERS:
                raise Skipped(
                    f"TELEMHQ_DESTINATIONS: {name!r} is none of {', '.join(TRACKERS)}"
                )
            trackers.append(TRACKERS[name](settings))
        except Skipped as why:
            problems.append(str(why))
    return trackers, problems


def counts_in_project(name: str) -> bool:
    """Whether a command takes a variable from a project's settings, which may be a
    stranger's: those of ours, but neither URL nor secret of another tracker (our URL is
    both), so that no secret goes to a stranger; no PATH, no proxy."""
    others = [one.variables for one in TRACKERS.values() if one is not TelemHQ]
    if any(name in variables[:2] for variables in others):
        return False
    return name[:8] == "TELEMHQ_" or any(name in variables for variables in others)


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
    for _ in range(20 if os.name == "nt" else 0):
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
            return
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

    def make(self) -> None:
        """Make its directories (the umask is 077): only where a ping is put into them,
        for what `uninstall` has removed must not come back."""
        for part in ("outbox", "refused", "accounts"):
            os.makedirs(self.path(part), exist_ok=True)

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
        """Whatever the file holds, every attribute has a value that makes sense."""
        try:
            found = read_object(outbox.path("state.json"), STATE_MAX_BYTES)
        except (OSError, ValueError):
            found = {}
        for name, value in found.items():
            default = getattr(State, name, None)
            if number(value) if default == 0 else isinstance(default, type(value)):
                setattr(self, name, value)
        self.suspects, self.losses = (
            {key: int(n) for key, n in object_in(found, name).items() if number(n)}
            for name in ("suspects", "losses")
        )

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
    raw, part = bytearray(), b"-"
    while part and len(raw) <= STDIN_MAX_BYTES:
        try:
            part = os.read(0, 1 << 16)  # as much as a pipe holds
        except OSError:
            part = b""
        raw += part
    return bytes(raw) if len(raw) <= STDIN_MAX_BYTES else b""


def event_in(raw: bytes) -> Fields:
    """The event that stdin held; Skipped when that is none of Claude Code's."""
    try:
        event = decode_json(raw.decode("utf-8", "replace").lstrip("\ufeff"))
    except ValueError:
        raise Skipped("stdin is not JSON") from None
    found: Fields = event if isinstance(event, dict) else {}
    name = found.get("hook_event_name", "")
    ours = identifier(name) and "A" <= name[:1] <= "Z"
    # Cursor runs hooks of ~/.claude/settings.json too, with events of its own.
    if not ours or "cursor_version" in found:
        raise Skipped("stdin held no event of Claude Code's")
    return found


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
    beside = gate_beside({"own": tracker.own}, tracker.needs)
    name = PingName.make(ns, ping)
    try:
        outbox.make()
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
    if not trackers:
        raise Skipped("; ".join(problems))
    event = event_in(raw)
    ping = make_ping(event, settings, ns, len(raw))
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
COUNTS = (  # in the order of TOKENS; then what they cost, which only the ledger tells
    "input_tokens output_tokens cache_read_input_tokens cache_creation_input_tokens "
    "thinking_tokens costUSD"
).split()
LEDGER_COUNTS = (
    "inputTokens outputTokens cacheReadInputTokens cacheCreationInputTokens "
    "thinkingTokens costUSD"
).split()
LEDGER_SUMS = {  # the ping's name -> the ledger's
    "cost_usd": "totalCostUSD",
    "lines_added": "totalLinesAdded",
    "lines_removed": "totalLinesRemoved",
}
NONE = [0] * len(COUNTS)
NO_LEDGER: list[Any] = [{}, [0] * len(LEDGER_SUMS)]


def short_id(text: object) -> str:
    """What is kept of an id: ID_CHARS, enough to know it again."""
    return path_hash(str(text), "")


def numbers_in(found: Fields, names: list[str]) -> list[Any]:
    """The numbers under these names (an answer's thinking is told in its details), 0
    where there is none."""
    found = {**found, **object_in(found, "output_tokens_details")}
    return [number_in(found, name) for name in names]


def blocks_in(found: Fields, name: str, kind: str) -> list[Fields]:
    """Of the list under `name` the objects of one type."""
    value = found.get(name)
    blocks = value if isinstance(value, list) else []
    return [block for block in blocks if block.get("type") == kind]


def add_counts(models: Models, name: str, counts: list[int]) -> None:
    """Add to a model's counts."""
    models[name] = [a + b for a, b in zip(models.get(name, NONE), counts)]


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
        self.counts = numbers_in(message["usage"], COUNTS)
        if message.get("model") == "<synthetic>" or fields.get("isApiErrorMessage"):
            raise ValueError("words of the client's own")
        self.model = model_shown(message.get("model"))
        self.stop_reason = message.get("stop_reason")
        self.origin = fields.get("requestSessionId", session)
        self.branched = fields.get("forkedFrom")
        self.copied = self.origin != session or self.branched
        calls = blocks_in(message, "content", "tool_use")
        self.calls: Fields = {
            short_id(call.get("id")): call.get("name") for call in calls
        }
        self.inner = [
            (model_shown(call.get("model")), numbers_in(call, COUNTS))
            for call in blocks_in(message["usage"], "iterations", "advisor_message")
        ]
        branch = fields.get("gitBranch")
        self.branch = str(branch) if branch_name(branch) else ""


class UserRow(Row):
    """A prompt, results of tools, or what the client put in. failed: short ids of the
    tool calls that failed. interrupt: it tells of one. key: what the row is known by.
    prompt: it begins a turn."""

    def __init__(self, fields: Fields) -> None:
        results = blocks_in(fields["message"], "content", "tool_result")
        self.failed = [
            short_id(block.get("tool_use_id"))
            for block in results
            if block.get("is_error")
        ]
        texts = blocks_in(fields["message"], "content", "text")
        said = "".join([str(block.get("text")) for block in texts])
        self.interrupt = said.startswith(INTERRUPTED)
        self.key = short_id(fields.get("uuid") or fields.get("timestamp"))
        inserted = fields.get("isMeta") or fields.get("isCompactSummary")
        other = results or self.interrupt or inserted
        self.prompt = "promptId" in fields and not other


class LedgerRow(Row):
    """The client's own sums of a session so far. ledger: [model -> counts, sums in the
    order of LEDGER_SUMS]."""

    def __init__(self, fields: Fields) -> None:
        models: Models = {}
        for name, used in fields["modelUsage"].items():
            add_counts(models, model_shown(name), numbers_in(used, LEDGER_COUNTS))
        self.ledger = [models, numbers_in(fields, [*LEDGER_SUMS.values()])]


ROWS = {"assistant": AnswerRow, "user": UserRow, "cost-state": LedgerRow}


def rows_behind(path: str, place: Fields, ends: float) -> Iterator[Row]:
    """The rows of a transcript behind a place, which moves on; one at which the reader
    stops is read again next time. place: inode (a text, for JSON readers lose digits),
    offset of the end of the last line read; {}: the begin. OSError or ValueError: it
    cannot be read; TimeoutError: not to its end by `ends` (monotonic)."""
    with open(open_regular(path), "rb") as file:
        inode, at = str(os.fstat(file.fileno()).st_ino), 0.0
        file.seek(place.get("offset", 0))
        if inode != place.get("inode") or file.read(1) != b"\n":
            file.seek(0)  # another file, or not what it was
            place.update(inode=inode, offset=0)
        for line in iter(lambda: file.readline(LINE_MAX_BYTES), b""):
            if line.endswith(b"\n"):  # else it is half-written, or too long
                row = Row.parse(line)
                if row is not None:
                    at = row.at = row.at or at
                    yield row
                place["offset"] = file.tell() - 1
            if time.monotonic() > ends:
                raise TimeoutError("the rest is for the next ping")


# -- Accounts: tokens, charged once ----------------------------------------------------

USAGE_EVENTS = ("Stop", "StopFailure", "SubagentStop", "SessionEnd", "SessionLost")
HISTORY, CALLED = "history", "call"  # what else stands in `seen`


def less(counts: list[int], others: list[int]) -> list[int]:
    """The difference, count by count; never negative."""
    return [max(0, round(a - b, 10)) for a, b in zip(counts, others)]


def total(models: Models) -> list[int]:
    """The sum over all models (model -> counts)."""
    return [sum(column) for column in zip(NONE, *models.values())]


def named(counts: list[int]) -> Fields:
    """Counts as a ping has them: with their total (reasoning is part of the output),
    and with what they cost, where that is known."""
    *tokens, cost = counts
    found: Fields = dict(zip(TOKENS, [*tokens, sum(tokens[:-1])]))
    return {**found, "cost_usd": cost} if cost else found


class Account:
    """What of a session was charged at one destination. Every attribute is what its
    file holds, a plain value of JSON.

    ping, beside: the last one, and what stood there, for a SessionLost. since: older
    rows are history. transcripts: path -> the place read to, and when the last row that
    ended a turn came. seen: key of an answer -> its counts, or HISTORY; short id of a
    tool call -> CALLED, HISTORY when it failed; of an interrupt -> HISTORY.
    in_history: the main chain's last answer is. baseline: the ledger at the end of
    history, and what was told since; [] when nobody knows it. ledger: the client's,
    while it is the last word. totals: told in all; at_end: when the session last ended.
    charged: event_id -> what it is told.
    """

    def __init__(self, path: str, since: float = 0) -> None:
        self.path, self.since = path, float(since)
        self.transcript = self.model = self.branch = ""
        self.ping: Fields = {}
        self.beside: Fields = {}
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
        for name, value in vars(account).items():
            if type(found.get(name)) is not type(value):
                raise ValueError("no account")
            setattr(account, name, found[name])
        account.path = path  # it may have moved
        return account

    def save(self) -> None:
        """Write the file, all or nothing."""
        self.charged = dict(list(self.charged.items())[-CHARGED_MAX:])
        write_file(self.path, encode_json(vars(self)).encode())

    def files(self) -> list[str]:
        """The session's transcripts: its own, and its agents', at any depth."""
        from glob import escape, glob

        top = escape(self.transcript[: -len(".jsonl")])
        agents = os.path.join(top, "subagents", "**", "agent-*.jsonl")
        paths = sorted(glob(agents, recursive=True))
        return [self.transcript, *filter(os.path.isfile, paths)]

    def settle(self, usage: Reading) -> None:
        """Add what the client's ledger has gained since the baseline and nobody told
        (compaction and titles are calls of no row), its cost and lines. It is sums that
        are compared: it may name a model otherwise than rows. It is the baseline from
        now on."""
        models, sums = self.ledger
        told, base_sums = self.baseline
        left = less(total(models), total(told))
        for model, counts in models.items():
            known = told.get(model, NONE)
            more = [min(pair) for pair in zip(less(counts, known), left)]
            left = less(left, more)
            if any(more):
                add_counts(usage.models, model, more)
                add_counts(usage.rest, model, more)
        self.baseline = self.ledger
        usage.numbers.update(dict(zip(LEDGER_SUMS, less(sums, base_sums))))

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
                copied = row.key == key
    except (OSError, ValueError):
        copied = False
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
    at: the time of the event. over: the session is. ends: monotonic. until: of the last
    row that counts; agents_until: of theirs. elsewhere: what other sessions'
    accounts have seen; None: there may be a history that nobody knows yet. copied: the
    main chain's last answer, if another session has it, too. models: model -> counts;
    rest: those that are in no row. rows: as BESIDE has them, of what each answer has
    gained. tools: name -> calls. numbers: a ping's others."""

    def __init__(
        self, account: Account, at: float, over: bool, ends: float, tool_names: bool
    ) -> None:
        from collections import Counter

        self.account, self.ends, self.tool_names = account, ends, tool_names
        at += 0.001  # rows tell their time in milliseconds
        self.until, self.agents_until = at + (LAG_S if over else 0), at + LAG_S
        self.elsewhere: set[str] | None = set()
        if account.since and not account.transcripts:
            begun = end_of_earlier_runs(account.transcript, self.until, ends)
            account.since, self.elsewhere = max(account.since, begun), None
        self.copied: AnswerRow | None = None
        self.models: Models = {}
        self.rest: Models = {}
        self.rows: list[list[Any]] = []
        self.tools: Counter[str] = Counter()
        self.numbers = Counter(tool_calls=0, tool_failures=0)
        # The first answer of each id: some routers give many answers the same.
        self.firsts = {key[:ID_CHARS]: key for key in reversed(account.seen)}

    def read(self) -> bool:
        """Count what was gained; False: a part. The session's own comes first: agents'
        files may begin with copies of its rows. OSError or ValueError: one cannot be
        read."""
        account = self.account
        try:
            for path in account.files():
                self.read_one(path, path == account.transcript)
        except TimeoutError:
            return False
        copied, self.copied = self.copied, None
        if copied and not account.baseline:  # now, for its parent may go on
            top = os.path.dirname(account.transcript)
            path = os.path.join(top, f"{copied.origin}.jsonl")
            account.baseline = ledger_until(path, copied.key, self.ends)
        return True

    def read_one(self, path: str, main: bool) -> None:
        """Count what one transcript has gained, up to the event's time: the client
        writes agents' rows a little later."""
        account = self.account
        place = account.transcripts.setdefault(path, {"ended_at": 0.0})
        for row in rows_behind(path, place, self.ends):
            if row.at > (self.until if main else self.agents_until):
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
        account, seen = self.account, self.account.seen
        if row.key not in seen and self.is_history(row):
            seen[row.key] = HISTORY
            if main:  # what its ledger had of before stands behind it, or nobody knows
                account.in_history, account.ledger = not row.branched, []
                account.baseline = NO_LEDGER if row.branched else []
                self.copied = row if row.copied else None
        if seen.get(row.key) == HISTORY:
            return False
        if main:
            account.in_history = False
            account.model, account.branch = row.model, row.branch
            if row.stop_reason is not None:
                account.ledger = []  # no last word any more
        first = self.firsts.setdefault(row.key[:ID_CHARS], row.key)
        name = row.name if first == row.key else f"{row.name}.{row.request}"
        self.gain(row.key, row.model, row.counts, name, row.at)
        for n, (model, counts) in enumerate(row.inner):
            self.gain(f"{row.key}.{n}", model, counts)
        for call, tool in row.calls.items():
            if call not in seen:
                seen[call] = CALLED
                self.numbers["tool_calls"] += 1
                if identifier(tool):
                    self.tools[tool_shown(tool, self.tool_names)] += 1
        return True

    def gain(
        self, key: str, model: str, counts: list[int], name: str = "", at: float = 0
    ) -> None:
        """Count what an answer has gained: in older rows the output may be partial, and
        some routers begin with none at all. name: under which a tracker is told the
        answer: one that keeps the first row of each gets another for what is later."""
        known = self.account.seen.get(key, NONE)
        more = less(counts, known)
        self.account.seen[key] = [max(pair) for pair in zip(known, counts)]
        if not any(more):
            return
        add_counts(self.models, model, more)
        if any(known):
            name += f".{sum(counts)}"
        if identifier(name) and len(self.rows) < ROWS_MAX:
            self.rows.append([name, model, int(at * 1000), *more[:-1]])
        else:
            add_counts(self.rest, model, more)

    def count_user(self, row: UserRow, main: bool) -> None:
        """Count failed tools and interrupts; note that a prompt begins a turn."""
        account, seen = self.account, self.account.seen
        for call in row.failed:
            if seen.get(call) == CALLED:
                seen[call] = HISTORY
                self.numbers["tool_failures"] += 1
        if main and row.at >= account.since:
            if row.interrupt and row.key not in seen:
                seen[row.key] = HISTORY
                self.numbers["interrupts"] += 1
            if row.prompt:
                account.prompted_at = row.at

    def fields(self, model: str) -> Fields:
        """The fields of a ping. model: the main chain's last."""
        fields = {**named(total(self.models)), **self.numbers, "model": model}
        models = {name: named(counts) for name, counts in self.models.items()}
        if models and list(models) != [model]:
            fields["models"] = models
        if self.tools:
            fields["tools"] = dict(self.tools.most_common(20))
        return fields

    def messages(self, event_id: str, at: float) -> list[list[Any]]:
        """The rows: together what the ping says, to the token. What no answer has (the
        ledger's, or more than there may be) has a row for each model."""
        rest = [
            [f"{event_id}.{model}"[:128], model, int(at * 1000), *counts[:-1]]
            for model, counts in self.rest.items()
            if any(counts[:-1])
        ]
        return self.rows + rest


def open_account(outbox: Outbox, name: str, ping: Fields) -> Account:
    """The account of a ping's session. One that meets it in its middle begins where we
    were installed, for Esc and a denied permission fire no hook; a day before at most.
    OSError: it cannot be read, and must not be replaced. ValueError: it was damaged,
    and has begun anew."""
    path = outbox.account_path(session_name(ping["session_id"]))
    try:
        return Account.load(path)
    except ValueError:
        Account(path, time.time()).save()
        raise
    except FileNotFoundError:
        pass
    at = PingName(name).ns / 1e9
    ours = (THIS_FILE, outbox.path("lock"))
    installed = min(at, *(os.stat(path).st_ctime for path in ours))
    known = {"startup": 0.0, "clear": 0.0, "resume": at, "fork": at}
    source = str(ping.get("source"))  # of a SessionStart
    return Account(path, known.get(source, max(installed, at - DAY_S)))


class Charge:
    """One try to give a ping its session's new usage. at: the event's time. over: the
    session is. ends: monotonic."""

    def __init__(self, outbox: Outbox, name: str, record: Record, ends: float) -> None:
        self.ping, self.local = record.ping, record.local
        self.event, self.at = str(record.ping["event"]), PingName(name).ns / 1e9
        self.needs, self.ends = outbox.needs, ends
        self.over = self.event in ("SessionEnd", "SessionLost")
        self.account = open_account(outbox, name, record.ping)
        self.account.ping, self.account.beside = record.ping, record.beside

    def count(self) -> Fields:
        """What the ping is told: now or, after a crash, again. OSError or ValueError:
        the transcript cannot be read."""
        account, event_id = self.account, self.ping["event_id"]
        if self.local.get("usage") is False:
            account.since = max(account.since, self.at)
            return {}
        path = str(self.local["transcript"])
        if os.path.isfile(path) or not account.transcript:
            account.transcript = path
        if self.event in USAGE_EVENTS and event_id not in account.charged:
            account.charged[event_id] = self.tell()
        return object_in(account.charged, event_id)

    def tell(self) -> Fields:
        """All that was used since the last charge: usage fields, what stands beside."""
        account, event_id = self.account, self.ping["event_id"]
        at = float("inf") if self.event == "SessionLost" else self.at
        tool_names = bool(self.local.get("tool_names"))
        usage = Reading(account, at, self.over, self.ends, tool_names)
        complete = self.read_and_wait(usage)
        if account.baseline:
            told, sums = account.baseline
            account.baseline = [{**told}, sums]
            for model, counts in usage.models.items():
                add_counts(account.baseline[0], model, counts)
        if not complete:
            usage.numbers["usage_complete"] = False
        elif self.over and account.baseline:
            account.settle(usage)
        fields = usage.fields(account.model)
        self.add_turn(fields)
        totals = {name: n + fields[name] for name, n in account.totals.items()}
        beside = {
            "messages": usage.messages(event_id, self.at),
            "totals": totals,
            "since_end": {name: n - account.at_end[name] for name, n in totals.items()},
        }
        account.totals = totals
        account.at_end = totals if self.over else account.at_end
        return {**fields, **gate_beside(beside, self.needs)}

    def add_turn(self, fields: Fields) -> None:
        """Add what is known of the turn that ends; note that it does."""
        account = self.account
        begun = account.prompted_at
        if self.ping.get("stop_hook_active"):
            begun = account.stopped_at  # another hook had the turn go on from there
        if self.event == "Stop" and 0 < begun <= self.at:
            fields["duration_ms"] = round((self.at - begun) * 1000)
        if self.local.get("git"):
            fields["git_branch"] = account.branch
        if self.event in ("Stop", "StopFailure"):
            account.stopped_at, account.prompted_at = self.at, 0.0

    def read_and_wait(self, usage: Reading) -> bool:
        """Read until all has come, or the event is LAG_S old: the client writes a
        turn's last row, a session's ledger after it. Whether all has."""
        for _ in range(round(LAG_S / POLL_S)):
            if usage.read() and self.has_come():
                return True
            if time.time() > self.at + LAG_S:
                break
            time.sleep(POLL_S)
        return False

    def has_come(self) -> bool:
        """Whether what the client writes at such an event is there."""
        account = self.account
        if self.over:
            return not account.baseline or bool(account.ledger)
        agent = self.local.get("agent_transcript")
        awaited = {"Stop": account.transcript, "SubagentStop": agent}
        place = account.transcripts.get(str(awaited.get(self.event)))
        return place is None or place["ended_at"] > account.stopped_at


def charge(outbox: Outbox, name: str, record: Record, ends: float) -> Record | None:
    """What the file of a ping holds, with the usage in it. Its `local` is not empty.
    ends: monotonic. The account is saved with what is told, then the ping's file is
    rewritten, then it may be sent: so nothing is lost, and nothing told twice. None: it
    must wait, for the disk refuses that. Where nothing can be read, nothing is charged:
    it is for the session's next ping. A damaged account begins anew, now."""
    if record.ping.get("event") not in ("SessionStart", *USAGE_EVENTS):
        return record
    told = unknown = {"usage_complete": False}
    for _ in range(CHARGE_TRIES):
        try:
            one = Charge(outbox, name, record, ends)
            told = one.count()
            one.account.save()
            break
        except FileNotFoundError:
            told = unknown  # there is no such transcript
            break
        except (AttributeError, LookupError, TypeError, ValueError):  # it is damaged
            path = outbox.account_path(session_name(record.ping["session_id"]))
            Account(path, time.time()).save()
            told = unknown
            break
        except OSError:
            time.sleep(POLL_S)
    else:
        if told != unknown and age_s(outbox.file(name)) < WAIT_MAX_S:
            return None
        told = unknown
    beside = gate_beside({**record.beside, **told}, outbox.needs)
    record = Record(gate({**record.ping, **told}), {}, beside)
    try:
        outbox.rewrite(name, record)
    except OSError:
        pass  # the account knows what it is told
    return record


def report_lost(outbox: Outbox, path: str, settings: Settings, ends: float) -> None:
    """Put a ping into the outbox for a session that ended without a word (kill -9,
    power), if something of it was told to nobody. path: its account's. The ping's id is
    made of that, so that a crash makes no two; today's settings shape it."""
    account = Account.load(path)
    if not account.transcript:
        return  # it only ever saw TELEMHQ_USAGE=0
    known = account.ping
    event = {
        "hook_event_name": "SessionLost",
        "session_id": known["session_id"],
        "transcript_path": account.transcript,
    }
    ns = round(seconds_of(known["timestamp"]) * 1000) * 10**6
    ping = make_ping(event, settings, ns, -1)  # an event of no size
    ping["project"] = known["project"]
    ping["event_id"] = sha256_hex(encode_json(vars(account)).encode())[:32]
    if ping["transcript_path_hash"] == known["transcript_path_hash"]:
        ping["cwd_hash"] = known.get("cwd_hash")  # of another key it would say nothing
    record = Record(ping, local_of(event, settings, ping), account.beside)
    name = PingName.make(ns, ping)
    told = Charge(outbox, name, record, ends).tell()
    used = told["total_tokens"] or told.get("cost_usd")
    if used or any(object_in(told, "since_end").values()):
        outbox.rewrite(name, record)


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
        proxies, there = request.getproxies_environment(), vars(request)
        spared = there["proxy_bypass_environment"](host, proxies)
        if not spared and proxies.get(scheme, "").startswith("socks"):
            raise Skipped("SOCKS proxies are not supported")
        opener.add_handler(request.ProxyHandler(proxies))
    return opener


def verifying_context() -> SSLContext:
    """What TLS is verified with: as Claude Code does, so with NODE_EXTRA_CA_CERTS and
    without Python 3.13's strictness. A Python that brings no certificates (python.org's
    for macOS, until its "Install Certificates.command" has run) takes the system's."""
    import ssl

    context = ssl.create_default_context()
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    paths = [os.environ.get("NODE_EXTRA_CA_CERTS", "")]
    named = {"SSL_CERT_FILE", "SSL_CERT_DIR"}.intersection(os.environ)
    if not (named or context.cert_store_stats()["x509_ca"]):
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
    while 100 <= response.status < 200 and response.status != 101:
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

    A failure may be the ping's fault or the tracker's: another's delivery tells. So
    failures are noted, and a delivery judges them: what was refused is set aside, what
    else failed is charged. When only failures come, of different events, the pass ends
    with a back-off. noted: name -> its answer, since the last delivery. done: names
    that are no news; trying: the last. in_burst: more is likely to follow."""

    def __init__(self, sender: Sender) -> None:
        self.sender, self.outbox = sender, sender.outbox
        self.state = State(sender.outbox)
        self.names: list[str] = []
        self.done: set[str] = set()
        self.noted: dict[str, Answer] = {}
        self.trying, self.delivered, self.in_burst = "", 0, False

    def tidy(self) -> None:
        """List what waits; of too many the oldest without usage are lost first."""
        names, suspects = self.outbox.waiting(), self.state.suspects
        names.sort(key=lambda name: PingName(name).event in USAGE_EVENTS)
        lost = names[:-OUTBOX_MAX_PINGS]
        for batch in [lost[n : n + 100] for n in range(0, len(lost), 100)]:
            self.count_losses(batch, "outbox full")
            for name in batch:
                remove(self.outbox.file(name))
        self.names = sorted(names[-OUTBOX_MAX_PINGS:])
        waiting = sorted(suspects.keys() & self.names)
        known = sorted(waiting, key=lambda name: -suspects[name])[:SUSPECTS_MAX]
        self.state.suspects = {name: suspects[name] for name in known}

    def count_losses(self, names: list[str], reason: str) -> None:
        """Count pings and their tokens as lost before they go: we may be killed."""
        losses = self.state.losses
        losses[reason] = losses.get(reason, 0) + len(names)
        for name in names:
            try:
                tokens = self.outbox.record(name).ping["total_tokens"]
                losses["tokens"] = losses.get("tokens", 0) + tokens
            except (OSError, ValueError, KeyError):
                continue
        self.state.save(self.outbox)

    def set_aside(self, name: str, reason: str) -> None:
        """Move what can never be delivered out of the others' way."""
        self.count_losses([name], reason)
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
        """The newest of another event, for a witness like the others would say little.
        The older of its session are charged first: tokens are each turn's own."""
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
            record.ping["usage_complete"] = False
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
    request on its way. answered: what the last answer was.
    """

    opener: OpenerDirector | None = None
    deadline = float("inf")
    answered = ""

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
        self.answered, took_ms = answer.what, (time.monotonic() - begun) * 1000
        said = answer.verdict if answer.verdict in (DELIVERED, REFUSED) else "kept"
        self.tell(
            f"{ping.get('event')} {ping['event_id']} to {origin(self.tracker.url)}: "
            f"{answer.what} in {took_ms:.0f} ms, {said}"
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
        """Once a day: tell of sessions that were lost, forget the oldest accounts and
        files whose writer was killed."""
        from glob import escape, glob

        now, state = time.time(), self.on_pass.state
        if 0 <= now - state.swept_at < DAY_S:
            return
        accounts = escape(self.outbox.path("accounts"))
        paths = sorted(glob(os.path.join(accounts, "*.json")), key=age_s)
        old = paths[ACCOUNTS_MAX:]
        for part in ("", "outbox", "refused", "accounts"):
            unfinished = glob(os.path.join(escape(self.outbox.path(part)), ".*"))
            old += [path for path in unfinished if age_s(path) > UNFINISHED_S]
        for path in old:
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
    if not once and os.name == "posix":
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
    import pathlib

    ours = f"*-{12 * '[0-9a-f]'}/outbox"  # as directory_name() calls them
    places = sorted(pathlib.Path(state_dir or os.devnull).glob(ours))
    return [Outbox(str(place.parent)) for place in places if place.is_dir()]


def adopt(former: Outbox, present: Outbox, name: str) -> None:
    """Move a ping from a former URL's outbox; both locks are held. What it was charged
    must not be told here twice: the session's account here begins behind it, or, when
    that has counted already, it goes without numbers. OSError, ValueError: it stays."""
    record = Outbox(former.directory, present.needs).record(name)
    if record.ping.get("total_tokens"):
        account, at = open_account(present, name, record.ping), PingName(name).ns / 1e9
        if account.transcripts and account.since < at:
            told = (number, counts, counts_by_model)
            ping = {k: v for k, v in record.ping.items() if GATE[k] not in told}
            record = Record({**ping, "usage_complete": False}, {}, {})
        else:
            account.since = max(account.since, at)
            account.save()
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
URL_IS_KEPT = "only Claude Code knows the plugin's URL: start a session"
MARKS = {True: "ok", False: "!!", None: "--"}  # of a check; None: it is only told


def at_home(text: str) -> str:
    """A text for a person, who knows home as ~."""
    home = os.path.expanduser("~")
    return text.replace(home + os.sep, "~" + os.sep) if len(home) > 1 else text


def folded(text: str, columns: int) -> str:
    """A line of text in lines of so many columns, broken only between words."""
    from textwrap import TextWrapper

    fold = TextWrapper(columns, subsequent_indent="    ", break_on_hyphens=False)
    fold.break_long_words = False
    return fold.fill(text)


def say(text: str) -> None:
    """Print a line for a person."""
    print(folded(at_home(text), 100), flush=True)


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
    whose = ", ".join(sorted(projects)[:5]) or "nobody"
    return f"{len(names)} {pings} of {whose} {wait}, the oldest for {age}"


MEANINGS = {  # of an answer: what it begins with (a pattern) -> the meaning
    "HTTP 40[123]": "is the token in {token} right, and paid?",
    "HTTP (404|405|410|451)": "is the URL in {url} right, is it there?",
    "HTTP (408|409|425|429)": "it is busy; sent again later",
    "HTTP 407|proxy": "HTTPS_PROXY may lack USER:PASSWORD@, NO_PROXY this host",
    "SOCKS": "name an HTTP proxy in HTTPS_PROXY",
    "HTTP 413": "it refuses this ping as too large",
    "HTTP 3": "it has moved; put its new address into {url}",
    "HTTP 5|no whole": "it has a problem of its own; sent again later",
    "HTTP 2..$": "older pings go first; `flush` sends the rest",
    "HTTP": "it refuses this ping; {dislike}",
    "TLS: (WRONG_VERSION|HTTP)": "no TLS is spoken there; is https:// right?",
    "TLS": "SSL_CERT_FILE can name a company's certificates",
    "this Python": "run `install` with a whole Python",
    "": "is {url} right, is a proxy down, is there a network?",
}


def in_words(what: str, kind: str) -> str:
    """An answer (`what` of an Answer) of a kind of tracker, and what it means."""
    import re

    meaning = next(text for begin, text in MEANINGS.items() if re.match(begin, what))
    tracker: Any = TRACKERS[kind]
    url, token = tracker.variables[0], tracker.variables[:2][-1]
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
        paths[0] = os.path.realpath(getattr(sys, "_base_executable", paths[0]))
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
        names = [os.path.basename(word) for word in words if word[:1] != "-"]
        run = rf"(py[\w.]* )?{script}"
        imported = rf"(trap  TERM; )?cd [^;&|]+ && [^;&| ]+ IMPORT( \|\| {run})?"
        self.is_ours = bool(
            re.fullmatch(rf"({imported}|{run})( \|\| true)?", " ".join(names))
        )


def hooks_of(content: Fields) -> list[RegisteredHook]:
    """The hooks in settings (dict), in their order. TypeError, AttributeError or
    KeyError: they have not the form that is documented."""
    return [
        RegisteredHook(event, group, entry)
        for event, groups in content.get("hooks", {}).items()
        for group in groups + []  # noqa: RUF005 - so that what is no list raises
        for entry in group["hooks"] + []
    ]


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
        self.hooks: list[RegisteredHook] = []
        self.mode, self.text, self.problem = 0o600, "{}\n", ""
        try:
            if os.path.exists(self.real):
                self.mode = stat.S_IMODE(os.stat(self.real).st_mode)
                self.raw = read_file(self.real, FILE_MAX_BYTES)
            if self.raw and self.raw.strip():
                self.text = self.raw.decode("utf-8")
            # As strict as Claude Code: a comment or NaN, and it ignores all of a file.
            content = json.loads(self.text.lstrip("\ufeff"), parse_constant=int)
            content.get("env", {}).items()
            self.hooks, self.content = hooks_of(content), content
        except (OSError, ValueError, RecursionError) as error:
            self.problem = str(getattr(error, "strerror", "") or error)
        except (AttributeError, KeyError, TypeError):
            self.problem = "its env or a hook has not the form that is documented"
        self.env: Fields = self.content.get("env", {})

    def retold(self, content: Fields) -> str:
        """The text of `content`, in which all that is not new has its place on the line
        from ours, and what is added within a line does not break that."""
        import difflib
        import json
        import re

        part = re.compile(r'[\s\ufeff]*(?:"(?:[^"\\]|\\.)*"|[^\s"\[\]{},:]+|.)')
        unit = (re.findall(r"\n([ \t]+)\S", self.text) or ["  "])[0]
        before = json.loads(self.text.lstrip("\ufeff"))
        old, new = (
            part.findall(json.dumps(found, ensure_ascii=False, indent=unit))
            for found in (before, content)
        )
        here, told = part.findall(self.text), ""
        if len(old) != len(here):
            here = old  # it has a key twice
        matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
        for what, start, end, first, last in matcher.get_opcodes():
            added = "".join(new[first:last])
            if what == "equal":
                added = "".join(here[start:end])
            elif what == "insert" and "\n" not in here[end]:
                added = re.sub(r"\n\s*", " ", added)
            told += added
        ending = "\r\n" if "\r\n" in self.text else "\n"
        return re.sub(r"\r?\n", ending, told) + self.text[len(self.text.rstrip()) :]


class Surroundings:
    """What a hook finds here. files: settings files; each goes before those above it.
    own: paths of all but a project's, which may be a stranger's: of its env only our
    variables count. settings: from environment and files. url_from: the file that has
    TelemHQ's URL, or "". plugin: that which enables us as a plugin. url_is_kept: as its
    option, which Claude Code alone knows. managed_only: a company allows no others."""

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
            for name, value in file.env.items():
                if file.path in self.own or counts_in_project(name):
                    environ[name] = str(value)
            if URL_NAME in file.env:
                self.url_from = file.path
            enabled = object_in(file.content, "enabledPlugins").get(PLUGIN)
            if enabled is not None:
                self.plugin = file.path if enabled else ""
            if file.path in managed and file.content.get("allowManagedHooksOnly"):
                self.managed_only = True
        self.settings = Settings(environ)
        wanted = TelemHQ.kind in self.settings.destinations
        unknown = not self.settings.url and URL_NAME not in environ
        self.url_is_kept = bool(self.plugin) and wanted and unknown


# -- Commands: flush -------------------------------------------------------------------


def take_settings() -> None:
    """Give a hook that is run by hand in debug mode what Claude Code would give it."""
    given = dict(os.environ)
    if not Settings(given).debug or "CLAUDE_PROJECT_DIR" in given:
        return
    try:
        around = Surroundings()
        os.environ.update({**around.settings.environ, **given})
    except (Skipped, OSError, ValueError):
        return
    if around.url_is_kept:
        tell_on_stderr(f": {URL_IS_KEPT}")
    elif around.url_from and URL_NAME not in given:
        tell_on_stderr(at_home(f": {URL_NAME} is from {around.url_from}"))


def wait_for_lock(outbox: Outbox) -> int:
    """The outbox's lock; Skipped when a sender has it for longer than its life."""
    for _ in range(int(LIFE_S / LOOK_S)):
        lock = outbox.take_lock()
        if lock is not None:
            return lock
        time.sleep(LOOK_S)
    raise Skipped(f"a sender is at work in {outbox.directory}; try later")


def flush_outbox(outbox: Outbox, tracker: Tracker, settings: Settings) -> str:
    """Deliver what waits, in spite of a back-off; what the last answer was."""
    ends = time.monotonic() + LIFE_S
    sender = Sender(tracker, settings, ends, say, once=True, status=1)
    live(sender, wait_for_lock(outbox))
    return sender.answered


def adopt_all(here: list[Tracker], settings: Settings, yes: bool) -> int:
    """Move what waits for trackers' former URLs, if a person says so; how many stay."""
    moves, stay = [], 0
    for tracker in here:
        present = outbox_of(settings, tracker)
        for former in outboxes(settings.state_dir):
            other = kind_of(former) == tracker.kind and former.name() != present.name()
            if other and former.waiting():
                former.need_sound()
                present.need_sound()
                say(what_waits(former))
                route = f"{former.name()} to {present.name()}"
                print(f"  from {route}, {origin(tracker.url)}")
                moves.append((former, present))
    if moves:
        need_yes("Move them?", yes)
    for former, present in moves:
        present.make()
        locks = [wait_for_lock(one) for one in (former, present)]
        for name in former.waiting():
            try:
                adopt(former, present, name)
            except (OSError, ValueError) as error:
                stay += 1
                why = getattr(error, "strerror", "") or error
                say(f"{former.file(name)} stays: {why}")
        for lock in locks:
            unlock(lock)
    return stay


def flush(options: Namespace) -> int:
    """deliver what waits now, in spite of a back-off

    --adopt  first move here what waits for a former URL; it shows what, and asks
    --yes  move it without asking
    """
    around, left = Surroundings(), 0
    settings = around.settings
    os.environ.update(settings.environ)  # urllib looks for proxies there
    trackers, problems = find_trackers(settings)
    if around.url_is_kept:
        problems = [URL_IS_KEPT, *(p for p in problems if URL_NAME not in p)]
    if options.adopt:
        left = adopt_all(trackers, settings, options.yes)
    for tracker in trackers:
        outbox = outbox_of(settings, tracker)
        outbox.need_sound()
        if outbox.waiting():
            flush_outbox(outbox, tracker, settings)
        left += len(outbox.waiting())
        if outbox.backoff_left_s():
            say(f"{tracker.kind}: {in_words(State(outbox).problem, tracker.kind)}")
    if problems:
        raise Skipped("; ".join(problems))
    print(f"{left or 'None'} left.")
    return 1 if left else 0


# -- Commands: doctor ------------------------------------------------------------------

ARRIVES_S = 30.0  # a ping that has not come by then is lost
HOOK_MOST_S = 15.0  # a hook that takes longer is stuck


def receive(server: socket) -> Fields:
    """The ping that comes to a tracker on loopback, {} when none does in time. Asked to
    wait for longer than it lives, its sender ends at once."""
    try:
        connection = server.accept()[0]
        connection.settimeout(server.gettimeout())
        with connection, connection.makefile("rb") as request:
            connection.sendall(b"HTTP/1.0 503 \r\nRetry-After: 99\r\n\r\n")
            connection.shutdown(1)  # nothing more is written: the sender hangs up
            body = request.read().decode().partition("\r\n\r\n")[2]
        ping: Fields = decode_json(body)
        return ping
    except (OSError, ValueError):
        return {}


def play(command: list[str], event: Fields, environ: Fields) -> tuple[str, Fields, str]:
    """Run a hook, 15 s at most: (what it printed, the ping that arrived, times)."""
    import socket
    import subprocess
    import tempfile

    server = socket.create_server(("127.0.0.1", 0))
    with server, tempfile.TemporaryDirectory() as place:
        own = {
            "CLAUDE_PROJECT_DIR": os.getcwd(),
            "TELEMHQ_DESTINATIONS": TelemHQ.kind,  # nobody else is to get samples
            "TELEMHQ_FOREGROUND": "0",  # it is answered when it has ended
            "TELEMHQ_HOOK_DEBUG": "0",
            "TELEMHQ_STATE_DIR": place,
            URL_NAME: f"http://127.0.0.1:{server.getsockname()[1]}/ping/sample",
        }
        begun, pipe = time.monotonic(), subprocess.PIPE
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            env={**environ, **own},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            said = process.communicate(encode_json(event), HOOK_MOST_S)[0]
        except subprocess.TimeoutExpired:
            getattr(os, "killpg", os.kill)(process.pid, 9)
            return "it does not end", {}, ""
        hook_ms = (time.monotonic() - begun) * 1000
        # Where it made no state nothing will arrive.
        server.settimeout(ARRIVES_S if os.listdir(place) else 10 * LOOK_S)
        ping, all_ms = receive(server), (time.monotonic() - begun) * 1000
        for outbox in outboxes(place):
            unlock(wait_for_lock(outbox))
    return said, ping, f"in {all_ms:.0f} ms (hook: {hook_ms:.0f} ms)"


def check_settings(around: Surroundings) -> Iterator[Check]:
    """Whether Claude Code reads the settings and runs hooks, and what these will do."""
    settings = around.settings
    if around.managed_only:
        yield False, "allowManagedHooksOnly: only your company's hooks run; ask there"
    for file in around.files:
        if file.problem:
            yield False, f"Claude Code ignores {file.path} or a part: {file.problem}"
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
    found: dict[str, dict[str, str]] = {event: {} for event in EVENTS}
    for file in around.files:
        for hook in file.hooks:
            if hook.names_script:  # Claude Code runs the same command once
                found.setdefault(hook.event, {}).setdefault(hook.command, file.path)
    for event in EVENTS if around.plugin else ():
        found[event][PLUGIN] = f"the plugin ({around.plugin})"
    for event, commands in found.items():
        for command, path in commands.items():
            yield try_hook(around, event, command, path)
        both = f"{event} by {' and '.join(dict.fromkeys(commands.values()))}"
        if not commands:  # StopFailure is not for every client
            bad = None if event == "StopFailure" else False
            yield bad, f"no hook for {event}: run `install`"
        elif len(commands) > 1 and any(URL_NAME in command for command in commands):
            yield None, f"{both}: two commands, to two URLs; each is told the whole"
        elif len(commands) > 1:
            yield False, f"{both}: each sends a ping; take one out"


def try_hook(around: Surroundings, event: str, command: str, path: str) -> Check:
    """Run a hook's command; whether its ping arrived."""
    name = f"{event} by {path}"
    known = path in around.own or command == hook_command(event)
    if "TELEMHQ_" in command or not known:
        return None, f"{name} was not tried: not your own, or it sets TELEMHQ_ itself"
    shell = "/bin/sh" if os.name == "posix" else "C:\\Program Files\\Git\\bin\\bash.exe"
    sample = {"hook_event_name": event, "session_id": "x", "cwd": os.getcwd()}
    said, ping, times = play([shell, "-c", command], sample, around.settings.environ)
    if ping and not said:
        return True, f"{name}: arrived at doctor's own receiver {times}"
    line = said.strip().rpartition("\n")[2] or "nothing"
    does = "prints" if ping else "sends nothing and says"
    return False, f"{name} {does} `{line}`: run `install`, or mend it"


def check_bytecode(_: Surroundings) -> Iterator[Check]:
    """Whether what Python has cached of the installed script is made of it."""
    from importlib.machinery import SourceFileLoader
    from importlib.util import cache_from_source

    script = config_path("hooks", SCRIPT)
    cached, loader = cache_from_source(script), SourceFileLoader("", script)
    if not os.path.exists(cached):
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
    from threading import Thread

    try:
        given = make_opener(asked.url), asked, settings.timeout_s
    except Skipped as why:
        return Answer(HOLD, str(why))
    answers = [Answer(RETRY, "no whole answer in time")]
    thread = Thread(target=lambda: answers.append(post(*given)), daemon=True)
    thread.start()
    thread.join(DEADLINE * settings.timeout_s)
    return answers[-1]


def check_trackers(around: Surroundings) -> Iterator[Check]:
    """Whether the trackers are set up, and answer to what records nothing."""
    settings = around.settings
    os.environ.update(settings.environ)  # urllib looks for proxies there
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
            proof = (
                "`doctor --send`" if tracker.wants({"event": "Test"}) else "a session"
            )
            yield True, f"{name} answers; only {proof} proves the token"
        else:
            yield False, f"{name}: {in_words(answer.what, tracker.kind)}"


def try_disk(outbox: Outbox) -> Check:
    """Write and lock a file in an outbox as hooks do; whether they can."""
    path, problem = outbox.path("outbox"), "is not writable"
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    trial = os.path.join(path, ".doctor")
    try:
        outbox.need_sound()
        write_file(trial, b" " * (64 << 10))
        problem = "has no locks, so that pings go twice"
        if os.name == "posix":
            import fcntl

            with open(trial, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True, f"hooks can write to {path}"
    except Skipped as why:
        told = str(why).partition(";")[0]
    except OSError as error:
        told = f"{path} {problem} ({error.strerror})"
    finally:
        remove(trial)
    return False, f"{told}: mend that, or set TELEMHQ_STATE_DIR to another place"


def check_disk(around: Surroundings) -> Iterator[Check]:
    """Whether hooks can write, how delivery goes, what waits for other URLs."""
    settings, kept = around.settings, outboxes(around.settings.state_dir)
    names = [tracker.directory_name() for tracker in find_trackers(settings)[0]]
    if around.url_is_kept:
        names += [outbox.name() for outbox in kept if kind_of(outbox) == TelemHQ.kind]
    for name in names or ["none"]:
        yield try_disk(Outbox(os.path.join(settings.state_dir or "", name)))
    for outbox in kept:
        if outbox.name() in names:
            yield from check_delivery(outbox)
        elif outbox.waiting() and any(n.startswith(kind_of(outbox)) for n in names):
            yield None, f"for another URL {what_waits(outbox)} (`flush --adopt`)"
        elif outbox.waiting():
            kind = kind_of(outbox)
            yield None, f"for {kind}, which gets nothing here, {what_waits(outbox)}"


def check_delivery(outbox: Outbox) -> Iterator[Check]:
    """How delivery from an outbox goes."""
    kind, state, now = kind_of(outbox), State(outbox), time.time()
    backoff_s, names = outbox.backoff_left_s(), outbox.waiting()
    late = backoff_s or (names and now - PingName(names[0]).ns / 1e9 > LIFE_S)
    remedy = ": `flush` sends now" if late else ""
    yield not late, f"{kind}: {what_waits(outbox)}{remedy}"
    if backoff_s:
        yield False, f"{kind}: {in_words(state.problem, kind)}"
        yield False, f"{kind}: the next try is in {span(backoff_s)}"
    done = state.delivered_at
    when = f"{span(now - done)} ago" if done else "none yet"
    yield bool(done) or None, f"{kind}: last delivery: {when}"
    for reason, count in state.losses.items():
        yield None, f"{kind}: {count} lost so far, {reason}"
    pings = [line["ping"] for line in deliveries(outbox)[-100:]]
    short = [ping for ping in pings if ping.get("usage_complete") is False]
    if short:
        why = "no transcript could be read"
        if any("total_tokens" in ping for ping in short):
            why = "an answer came late, the next has it"
        text = f"{kind}: usage_complete is false in {len(short)} of the last"
        yield None, f"{text} {len(pings)}: {why}"


def send_test(around: Surroundings) -> Iterator[Check]:
    """Send a ping that is marked as a test, the way that every ping goes."""
    settings, ns = around.settings, time.time_ns()
    event = {"hook_event_name": "Test", "cwd": os.getcwd()}
    ping = make_ping(event, settings, ns, 0)
    trackers = find_trackers(settings)[0]
    if not trackers:
        yield None if around.url_is_kept else False, "no test was sent: no URL is known"
    for tracker in trackers:
        kind, outbox = tracker.kind, outbox_of(settings, tracker)
        if not tracker.wants(ping):
            yield None, f"{kind} takes no test: its first session proves the token"
            continue
        name = enqueue(outbox, tracker, ns, ping, {})
        what = flush_outbox(outbox, tracker, settings)
        kept = [outbox.file(name), outbox.path("refused", name)]
        taken = not any(map(os.path.exists, kept))
        no = f"{kind} did not take the test, {in_words(what, kind)}"
        yield taken, f"{kind} has taken the test {ping['event_id']}" if taken else no


def doctor(options: Namespace) -> int:
    """check all that lies between an event and the tracker, and say what to do

    --send  send one real ping, with the event Test: that proves the token
    """
    around, well = Surroundings(), True
    looks = [check_settings, check_hooks, check_bytecode, check_trackers, check_disk]
    for look in [*looks, send_test] if options.send else looks:
        try:
            for good, line in look(around):
                say(f"{MARKS[good]} {line}")
                well = well and good is not False
        except (Skipped, OSError, ValueError) as error:
            say(f"{MARKS[False]} not all could be done: {error}")
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
        raise Skipped(f"{file.path} is left as it is: {file.problem}")
    return file


def write_all(changes: list[Change]) -> None:
    """Make each what it is to be (None: gone); Skipped names one that cannot be so."""
    from shutil import rmtree

    for path, content, mode in changes:
        try:
            if content is not None:
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                write_file(path, content)
                os.chmod(path, mode)
            elif os.path.isdir(path):
                rmtree(path)
            elif os.path.exists(path):
                os.unlink(path)
        except OSError as error:  # a full disk has no path in it
            raise Skipped(f"{path}: {error.strerror or error}") from error


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
        if file.raw is not None and not os.path.exists(file.real + BACKUP):
            say(f"As it is now it is kept as {file.real + BACKUP}")
            changes.append((file.real + BACKUP, file.raw, 0o600))
        if file.mode & 0o044 and os.name == "posix" and URL_NAME in text:
            print("Others can read it, and the URL in it is a secret:")
            print(at_home(f"  chmod 600 {file.real}"))
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
        options.send = says_yes("Send a real test ping? Nothing else proves the token.")
    return doctor(options)


def to_remove(around: Surroundings) -> list[Change]:
    """Say what uninstall removes; it, settings first: no command without its script."""
    import glob

    changes: list[Change] = []
    file, script = settings_to_change(), File(config_path("hooks", SCRIPT))
    before, backup = File(script.path + BACKUP), File(file.real + BACKUP)
    if TITLE not in (script.raw or TITLE)[:1000]:
        raise Skipped(f"{script.path} is not this script; nothing was changed")
    others = [
        found.path
        for found in around.files
        for hook in found.hooks
        if hook.names_script and not (hook.is_ours and found.real == file.real)
    ]
    if URL_NAME in file.env or any(hook.is_ours for hook in file.hooks):
        content, what = without_ours(file.content), "our hooks and the ping URL"
        left = file.retold(content).encode("utf-8", "backslashreplace")
        raw = left if content else None
        # Hooks without their script would be a veto.
        veto = before.raw is None and any(hook.is_ours for hook in backup.hooks)
        same = encode_json(content) == encode_json(without_ours(backup.content))
        if same and not veto and backup.raw is not None:
            raw, what = backup.raw, "it is again as it was before install"
        say(f"  {file.path}: {what}")
        changes += [(file.real, raw, file.mode), (backup.path, None, 0)]
    if others and before.raw is None:  # without it they would end with 2, a veto
        say(f"  not {script.path}: a command in {others[0]} may need it; take that out")
    elif script.raw is not None:
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
    around = Surroundings()
    state_dir = around.settings.state_dir or ""
    plugin = [file.path for file in around.files if PLUGIN in str(file.content)]
    if plugin:
        say(f"The plugin in {plugin[0]} stays, with its state. To remove:")
        print(f"  claude plugin uninstall {PLUGIN}; rm -r {state_dir!r}")
    print("This goes:")
    changes = to_remove(around)
    stays = options.keep_state or plugin
    kept = [] if stays else outboxes(state_dir)
    if not (changes or kept):
        print("  nothing.")
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
    write_all([(outbox.directory, None, 0) for outbox in kept])
    made = [config_path("hooks", "__pycache__"), config_path("hooks")]
    for directory in (*made, state_dir, config_path()):
        if not os.path.islink(directory):
            remove(directory)  # unless there is more in it
    if not stays and os.path.isdir(state_dir):
        say(f"{state_dir} stays: look what is in it")
    print("Removed.")
    return 0


# -- Commands: seeing ------------------------------------------------------------------

DEMO_MODEL = "claude-opus-5-5"
SAMPLES: dict[str, Fields] = {
    "PostToolUseFailure": {
        "transcript_path": "/home/you/.claude/session.jsonl",
        "tool_name": "Bash",
        "tool_input": {"command": "./deploy --password hunter2"},
        "error": "Exit code 3\nno /home/you/acme/deploy.key",
        "duration_ms": 1250,
    },
    "SessionEnd": {"reason": "prompt_input_exit"},
    "Stop": {"last_assistant_message": "The password is hunter2."},
}
HERE = {"session_id": "sample", "cwd": "/home/you/acme"}  # of all samples
SAMPLE_COUNTS = [12, 950, 41200, 2300, 0, 0]  # in the order of COUNTS


def tracker_named(name: str, settings: Settings) -> Tracker:
    """A tracker by its kind, as it is set up; before it is, with placeholders."""
    if name not in TRACKERS:
        raise Skipped(f"there is no tracker {name}; there are: {', '.join(TRACKERS)}")
    try:
        return TRACKERS[name](settings)
    except Skipped as why:
        print(f"{why}; shown with placeholders.", file=sys.stderr)
    url, *others = [n for n in TRACKERS[name].variables if not n.endswith("HEADERS")]
    environ = {url: "https://tracker.test", **dict.fromkeys(others, "sample")}
    return TRACKERS[name](Settings(environ))


def preview(options: Namespace) -> int:
    """print what a tracker gets of an event (stdin, or a sample)

    event PostToolUseFailure|SessionEnd|Stop  a sample
    --destination TRACKER  the tracker (telemhq)
    """
    import json

    settings, ns = Surroundings().settings, time.time_ns()
    name = options.event or "Stop"
    sample = encode_json({"hook_event_name": name, **HERE, **SAMPLES[name]}).encode()
    raw = sample if options.event or os.isatty(0) else read_stdin()
    event = event_in(raw)
    ping = make_ping(event, settings, ns, len(raw))
    tracker = tracker_named(options.destination or TelemHQ.kind, settings)
    beside: Fields = {"own": tracker.own}
    if settings.usage and ping["event"] in USAGE_EVENTS:
        used = {**named(SAMPLE_COUNTS), "tool_calls": 3}
        ping.update(used, model=DEMO_MODEL)
        beside["messages"] = [["msg_01", DEMO_MODEL, ns // 10**6, *SAMPLE_COUNTS[:-1]]]
        beside["totals"] = beside["since_end"] = used
        print("The token counts are samples.", file=sys.stderr)
    requests = tracker.requests(ping, beside)
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

    print("What Claude Code hands over, and what leaves of it:\n", flush=True)
    with tempfile.TemporaryDirectory() as place:
        py_compile.compile(shutil.copy(THIS_FILE, os.path.join(place, SCRIPT)))
        name = "PostToolUseFailure"
        event = {"hook_event_name": name, **HERE, **SAMPLES[name]}
        start = f"import sys; sys.path.insert(0, {place!r}); {IMPORT}"
        ping, times = play([sys.executable, "-ESc", start], event, dict(os.environ))[1:]
    if not ping:
        raise Skipped("a ping did not arrive")
    lines = [f"It arrived {times}"]
    for name, value in event.items():
        text = json.dumps(value)
        if value not in ping.values():
            text = f"~~{text}~~"
        text += " #" if f"{name}_hash" in ping else ""
        text += " =" if f"{name}_chars" in ping else ""
        lines.append(f"  {name}: {text}")
    columns = min(88, shutil.get_terminal_size().columns or 80)
    for line in [*lines, f"  left {json.dumps(ping)}"]:
        print(folded(line, columns))
    print("\n~~: it stayed here; of # its hash has left, of = its length.")
    print(f"\nTo install it: python3 {SCRIPT} install")
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
    """What left all outboxes, or those whose name begins so; Skipped: nothing."""
    places = outboxes(Surroundings().settings.state_dir)
    chosen = [outbox for outbox in places if outbox.name().startswith(name or "")]
    found = [(o, lines) for o, lines in zip(chosen, map(deliveries, chosen)) if lines]
    if not found:
        to = f" to {name}" if name else ""
        raise Skipped(
            f"nothing was delivered{to} yet: `doctor` says why, `flush` sends"
        )
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


def rows_of(pings: list[Fields], by: str) -> Fields:
    """Sums for each day, project, model or session that pings name, then for all; of
    what somebody may have changed, only what the gate lets through."""
    from collections import Counter

    rows: Fields = {}
    for ping in map(gate, pings):
        at = time.localtime(seconds_of(ping.get("timestamp")))
        ping.update(day=time.strftime("%Y-%m-%d", at), session=ping.get("session_id"))
        if ping.get("event") in ("Stop", "StopFailure"):
            ping.update(turns=1, failed_turns=int(ping.get("status") == "failed"))
        parts = {ping.get(by): ping}
        if by == "model":
            parts = ping.get("models", parts)
        for key, part in parts.items():
            for name in COLUMNS:
                if key and name in part:
                    rows.setdefault(key, Counter())[name] += part[name]
    total: Any = Counter()
    for row in rows.values():
        total.update(row)
    return {**dict(sorted(rows.items())), "in all": total}


def print_table(rows: Fields, by: str) -> None:
    """Print rows of sums; without room, no kinds of tokens, then names cut off."""
    import shutil

    columns = {}
    for name in list(COLUMNS)[4 if by == "model" else 0 :]:  # a model has no turns
        shape, cells = ",.2f" if name == "cost_usd" else ",", [COLUMNS[name]]
        for row in rows.values():
            unknown = name == "cost_usd" and name not in row
            cells.append("\u2013" if unknown else f"{row[name]:{shape}}")
        width = 1 + max(map(len, cells))
        columns[name] = [cell.rjust(width) for cell in cells]
    widths = sum(len(cells[0]) for cells in columns.values())
    room = shutil.get_terminal_size().columns - widths
    longest = max(map(len, [by, *rows]))
    if room < longest:
        for name in TOKENS[:5]:
            room += len(columns.pop(name)[0])
    room = min(longest, max(room, len("2026-01-01")))
    for key, *cells in zip([by, *rows], *columns.values()):
        print(f"{key:{room}.{room}}" + "".join(cells))


def report(options: Namespace) -> int:
    """add up what was delivered, by day, project, model or session

    --by day|project|model|session  one row for each (day)
    --destination NAME  only this one: a tracker, or its directory's name
    """
    by, found = options.by or "day", kept_of(options.destination)
    for outbox, lines in found:
        if len(found) > 1:
            print(f"{outbox.name()}:")
        print_table(rows_of([line["ping"] for line in lines], by), by)
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


def main(arguments: list[str]) -> int | str:
    """Run a command; for sys.exit(): its status, or why it failed."""
    os.umask(0o077)
    if sys.version_info < (3, 8) or not __doc__:
        return "it needs Python 3.8 or newer, and no PYTHONOPTIMIZE=2"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what a terminal does not know
    try:
        options = command_line().parse_args(arguments or ["--help"])
        return int(options.run(options))
    except BrokenPipeError:  # head(1) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (KeyboardInterrupt, EOFError):
        print(file=sys.stderr)  # behind the question
        told = "interrupted"
    except ImportError as error:
        told = f"this Python lacks the module {error.name}; take a whole one"
    except (Skipped, OSError, ValueError) as error:
        told = str(error)
    return f"{SCRIPT}: {at_home(told)}"


if __name__ == "__main__":
    if sys.argv[1:] or os.isatty(0):
        sys.exit(main(sys.argv[1:]))
    take_settings()
    hook()
