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
    The event; the project's .git when it is a file; by the sender, for counts only, the
    transcripts. All that is written is below $TELEMHQ_STATE_DIR, else telemhq/ in
    $CLAUDE_CONFIG_DIR, else ~/.claude/telemhq/ (directories 0700, files 0600), and
    Python's own __pycache__ beside this file.
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
    gc.disable()  # a hook makes no garbage worth a twentieth of its time; a sender does

import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from http.server import HTTPServer
    from queue import Queue
    from ssl import SSLContext
    from typing import Any, Callable, Dict, Iterable, Iterator, NoReturn
    from urllib.request import OpenerDirector

    Fields = Dict[str, Any]  # of an event, a ping, a row: what JSON's objects hold
    Shape = Callable[[object], bool]
    Tell = Callable[[str], None]  # says a line to a person, or swallows it
    ReadSecret = Callable[[str], str]  # what a file holds that only its owner can read

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
PING_MAX_BYTES = 64 << 10  # ours are 1 to 4 KB
RECORD_MAX_BYTES = 2 << 20  # the same with ROWS_MAX messages beside it
SECRET_MAX_BYTES = 4096  # a token in a file
ROWS_MAX = 4000  # messages beside a ping, 0.1 KB each; more are added up, by model
OWN_MAX_CHARS = 300  # a text of the user's with the project's name in it
PATH_MAX_CHARS = 4096  # PATH_MAX on Linux; a longer path opens nothing
STATE_MAX_BYTES = 4 << 20  # ours is some KB
UNFINISHED_S = 3600.0  # a file unfinished for so long has lost its writer
BACKOFF_MAX_S = 900.0  # 15 min: the end of an outage is noticed soon enough
HOLD_S = (900.0, 21600.0)  # 15 min to 6 h: a person must mend the cause
RETRY_AFTER_MAX_S = 86400.0  # a day: no server may silence us for longer
FAILURES_MAX = 64  # counted no further: the longest back-off is reached long before
FAILURES_BORNE = 3  # in a row, of different events: then it may be the tracker's fault
REFUSALS_BORNE = 25  # where others were delivered: all of one kind may be refused
SUSPECT_PAUSE_S = 300.0  # between two tries of a ping that has been found at fault
SUSPECTS_MAX = 200  # remembered; more than any pass makes
POISON_CHARGES, POISON_AGE_S = 8, 3600.0  # both: neither a burst nor an outage blames
LOG_MAX_BYTES = 256 << 10  # some 2,000 passes
SENT_MAX_BYTES = 5 << 20  # some 5,000 pings; with the file before it, 10,000
BLOCK_BYTES = 4 << 20  # of a transcript, read at once
LINE_MAX_BYTES = 8 << 20  # rows that count are some KB long
ID_CHARS = 12  # of a hash, 48 bits: among 64,000 two are the same once in 100,000 times
STAMP_S = 0.001  # rows tell their time in milliseconds
LAG_S = 2.0  # a turn's last row comes up to 0.1 s after its Stop fired
POLL_S = 0.05  # between two looks at a transcript that is awaited
READ_S = 20.0  # reading for one ping; the rest is for the session's next
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


def int_or_none(digits: str) -> int | None:
    """A JSON integer. One of 20 digits is no count, and int() may refuse it."""
    return int(digits) if len(digits) < 20 else None


class ScannerContext:
    """What CPython's JSON scanner asks its decoder for (array_hook: since 3.15)."""

    strict = False
    object_hook = object_pairs_hook = array_hook = None
    parse_float = parse_constant = float
    parse_int = staticmethod(int_or_none)


def decode_json(text: str) -> Any:
    """The JSON value that `text` begins with; ValueError when there is none."""
    text = text.strip()
    try:
        from _json import make_scanner

        return make_scanner(ScannerContext)(text, 0)[0]  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - not JSON, or that module has changed
        from json import JSONDecoder

    try:
        return JSONDecoder(strict=False, parse_int=int_or_none).raw_decode(text)[0]
    except RecursionError:
        raise ValueError("nested too deeply") from None


def encode_json(value: object) -> str:
    """`value` (dict, list, str, bool, None, finite number) as compact ASCII JSON."""
    try:
        from _json import encode_basestring_ascii

        return encoded(value, encode_basestring_ascii)
    except Exception:  # noqa: BLE001 - that module has changed, or is not there
        from json import dumps

    return dumps(value, separators=(",", ":"))


def encoded(value: object, quoted: Callable[[str], str]) -> str:
    """The same, with what makes a text a JSON string."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        pairs = [f"{quoted(k)}:{encoded(found, quoted)}" for k, found in value.items()]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([encoded(found, quoted) for found in value]) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


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


DIGITS, LOWER = "0123456789", "abcdefghijklmnopqrstuvwxyz"
LETTERS_DIGITS = frozenset(DIGITS + LOWER + LOWER.upper())


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


def boolean(value: object) -> bool:
    """True or False."""
    return isinstance(value, bool)


def clean(text: str, longest: int = 128) -> str:
    """`text` without control characters and lone surrogates, cut."""

    def shows(c: str) -> bool:
        return " " <= c < "\x7f" or "\x9f" < c < "\ud800" or c > "\udfff"

    return "".join(filter(shows, text))[:longest]


def iso_time(ns: int) -> str:
    """Nanoseconds since 1970 as ISO 8601, UTC, with milliseconds."""
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9))
    return f"{day}.{ns // 10**6 % 1000:03d}Z"


# -- Settings --------------------------------------------------------------------------

PLUGIN_URL = "CLAUDE_PLUGIN_OPTION_PING_URL"  # what the plugin's user was asked for
SWITCH = dict.fromkeys(("1", "yes", "on", "true"), True)
SWITCH.update(dict.fromkeys(("0", "no", "off", "false"), False))


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
            lambda v: v if identifier(v) else None,
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
        named = environ.get("TELEMHQ_DESTINATIONS", "").lower().split(",")
        named = list(dict.fromkeys(filter(None, map(str.strip, named))))
        self.destinations = named or ["telemhq"]

    def choice(self, name: str, accept: Callable[[str], Any], problem: str) -> Any:
        """What `accept` makes of a variable; None when that is nothing."""
        value = self.environ.get(name)
        found = accept(value) if value else None
        if value and not found:
            self.ignored.append(f"{name} is ignored: {problem}")
        return found or None

    def switch(self, name: str, unset: bool = False) -> bool:
        """A variable that is 1 or 0; what is neither counts as 0."""
        value = self.environ.get(name, "").lower()
        if value and value not in SWITCH:
            self.ignored.append(f"{name} is ignored: it must be 1 or 0")
        return SWITCH.get(value, False) if value else unset


def duration(text: str) -> float | None:
    """Seconds, clamped to what TIMEOUT_S allows; None when `text` is no number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return min(max(value, TIMEOUT_S[1]), TIMEOUT_S[2]) if value == value else None


def absolute(path: str) -> str | None:
    """`path` normalised, ~ expanded; None when it is relative, or there is no home."""
    if path.startswith("~") and os.environ.get("HOME") == "":
        return None  # expanduser() would make it a path below /
    path = os.path.normpath(os.path.expanduser(path))
    return path if os.path.isabs(path) else None


def split_url(url: str) -> tuple[str, str, str]:
    """(scheme, host, port's text) of an absolute URL; ValueError says what is wrong."""
    if not url.isascii() or any(c <= " " or c in '\x7f\\"<>^`{|}' for c in url):
        raise ValueError("it has a space or another character that no URL may hold")
    scheme, found, rest = url.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        raise ValueError("it must start with https://")
    host = rest.replace("?", "/").replace("#", "/").split("/")[0]
    if "@" in host:
        raise ValueError("it must not hold user:password@")
    port, good = "", LETTERS_DIGITS.union("-._")
    if ":" in host and not host.endswith("]"):
        host, _, port = host.rpartition(":")
        if not (port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
            raise ValueError("its port is not a number from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):  # [::1]
        host, good = host[1:-1], frozenset(DIGITS + "abcdefABCDEF:.")
    if not host or not good.issuperset(host) or ".." in "." + host:
        raise ValueError("it names no host")
    return scheme.lower(), host.lower(), port


def loopback(host: str) -> bool:
    """Whether `host` is this machine, by name or plain address."""
    first, *others = host.split(".")
    plain = len(others) == 3 and all(p.isdigit() and int(p) < 256 for p in others)
    return host in ("localhost", "::1") or (first == "127" and plain)


def origin(url: str) -> str:
    """Scheme, host and port: what may be shown of a valid URL."""
    return "/".join(url.replace("?", "/").replace("#", "/").split("/")[:3])


# -- Event -> ping: the privacy gate. What is not in this section never leaves. --------


def line_of_text(value: object, longest: int = 128) -> bool:
    """1 to `longest` characters, no control characters among them."""
    return isinstance(value, str) and value != "" and clean(value, longest) == value


def model_name(value: object) -> bool:
    """An identifier such as claude-x@date or claude-x[1m]."""
    return identifier(value, "@[]")


def branch_name(value: object) -> bool:
    """An identifier, slashes allowed."""
    return identifier(value, "/")


def all_of(value: object, characters: str, longest: int) -> bool:
    """A text of these characters only, 1 to `longest` of them."""
    text = value if isinstance(value, str) else ""
    return 0 < len(text) <= longest and not text.strip(characters)


def error_code(value: object) -> bool:
    """A code such as rate_limit, at most 40 characters."""
    return all_of(value, LOWER + "_", 40)


def short_hash(value: object) -> bool:
    """Up to 12 hex digits."""
    return all_of(value, DIGITS + "abcdef", 12)


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
    known = (*TOKENS, "cost_usd").__contains__
    return counts(value, model_name, lambda inner: counts(inner, known))


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
    ("cwd_hash transcript_path_hash", short_hash),
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


def own_texts(value: object) -> bool:
    """What a user chose for a tracker: identifier -> one line of text."""
    return counts(value, identifier, lambda text: line_of_text(text, OWN_MAX_CHARS))


def message_rows(value: object) -> bool:
    """A list, bounded, of [id, model, time (ms since 1970), the counts of an API
    message in the order of TOKENS, without their total]."""
    return (
        isinstance(value, list)
        and len(value) <= ROWS_MAX
        and all(isinstance(row, list) and len(row) == 3 + 5 for row in value)
        and all(model_name(row[0]) and model_name(row[1]) for row in value)
        and all(all(map(number, row[2:])) for row in value)
    )


def session_counts(value: object) -> bool:
    """An object of TOKENS, and the calls of tools."""
    return counts(value, (*TOKENS, "tool_calls").__contains__)


BESIDE: dict[str, Shape] = {  # beside a ping, for a tracker that needs it, never in it
    "own": own_texts,  # what its own variables said when the ping was made
    "messages": message_rows,  # those whose tokens the ping was charged
    "totals": session_counts,  # the session's, so far
    "since_end": session_counts,  # the same since it last ended
}


def gate(fields: Fields) -> Fields:
    """Of `fields` what GATE names, in its shape. Every body is made by this."""
    return {
        name: fields[name]
        for name, shape in GATE.items()
        if name in fields and shape(fields[name])
    }


def gate_beside(fields: object, needs: tuple[str, ...]) -> Fields:
    """Of what stands beside a ping only what its tracker needs, in its shape."""
    given = fields if isinstance(fields, dict) else {}
    return {
        name: given[name]
        for name in needs
        if name in given and BESIDE[name](given[name])
    }


def model_shown(name: object) -> str:
    """A model's name as it may leave: a router's vendor/name, an ARN is `other`."""
    return str(name) if model_name(name) else "other"


def tool_shown(name: str, tool_names: bool) -> str:
    """A tool's name as it may leave: `mcp__server__tool` may tell on its user."""
    return "mcp" if not tool_names and name.startswith("mcp__") else name


def agent_shown(agent_type: str, tool_names: bool) -> str:
    """An agent's type as it may leave: a custom one's name is its user's text."""
    return agent_type if tool_names or agent_type in CLIENT_AGENTS else "custom"


def inside(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or below it, whatever links lead there (/tmp is one
    on macOS)."""
    for spelled in (os.path.normpath, os.path.realpath):
        top = spelled(directory).rstrip(os.sep) + os.sep
        if len(path) <= PATH_MAX_CHARS and (spelled(path) + os.sep).startswith(top):
            return True
    return False


def main_repository(directory: str) -> str:
    """Of a git worktree its repository's name, else "". A worktree's .git is a file:
    `gitdir: REPOSITORY/.git/worktrees/NAME` (gitrepository-layout)."""
    path = os.path.join(directory, ".git")
    if not os.path.isfile(path):  # nor a FIFO, which nobody may ever write to
        return ""
    with open(path, "rb") as file:
        text = file.read(PATH_MAX_CHARS).decode()
    worktrees = os.path.dirname(os.path.join(directory, text[7:].strip()))
    if not text.startswith("gitdir:") or os.path.basename(worktrees) != "worktrees":
        return ""
    top, name = os.path.split(os.path.dirname(os.path.normpath(worktrees)))
    if name.startswith("."):  # .git, or .bare by a common habit
        return os.path.basename(top)
    return name[:-4] if name.endswith(".git") else name


def project_of(event: Fields, settings: Settings) -> str:
    """The project's name; neither a `cd src` nor a worktree makes another project."""
    if settings.project:
        return settings.project
    cwd = event.get("cwd") if isinstance(event.get("cwd"), str) else ""
    top, name = settings.environ.get("CLAUDE_PROJECT_DIR"), ""
    try:
        directory = top if cwd and top and inside(cwd, top) else cwd
        if directory:
            name = os.path.normpath(directory).replace("\\", "/").split("/")[-1]
            name = main_repository(directory) or name
    except (OSError, ValueError):
        pass  # it cannot be read; a NUL in it
    name = clean(name)
    return name if name.strip(" .") else "unknown"


def no_event(event: Fields) -> str:
    """Why an event is none of Claude Code's, "" when it is one. Cursor runs hooks of
    ~/.claude/settings.json too, with events of its own."""
    name = event.get("hook_event_name")
    if "cursor_version" in event:
        return "the event is Cursor's, not Claude Code's"
    if not isinstance(name, str) or not "A" <= name[:1] <= "Z":
        return "the event has no name as Claude Code's have: it is none of them"
    return ""


def error_fields(event: Fields) -> Fields:
    """`error` and its numbers. A tool's error text holds its output, and paths."""
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
        fields["agent_type"] = agent_shown(texts["agent_type"], settings.tool_names)
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
    failed = name in ("PostToolUseFailure", "StopFailure") or event.get("error")
    fields = {key: event[key] for key in COPIED if key in event}
    fields.update(text_fields(event, settings), **error_fields(event), **ORIGIN)
    fields.update(
        event=name,
        status="failed" if failed else "success",
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
    short = isinstance(path, str) and len(path) <= PATH_MAX_CHARS
    return short and str(path).endswith(".jsonl")


def local_of(event: Fields, settings: Settings, ping: Fields) -> Fields:
    """What the sender needs for the ping's usage and never sends; {}: no usage."""
    transcript, agent = event.get("transcript_path"), event.get("agent_transcript_path")
    if not ("session_id" in ping and opens(transcript)):
        return {}
    if not settings.usage:
        return {"usage": False}
    local: Fields = {"transcript": transcript, "git": settings.git}
    if not settings.tool_names:
        local["tool_names"] = False
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
NO_USAGE = "TELEMHQ_USAGE=0 leaves it nothing to send"
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

    kind: its name in TELEMHQ_DESTINATIONS. variables: what it is set up with; secrets:
    those that must never be shown. events: those that it wants (none: all). needs: what
    of BESIDE it is given. url: where it is; secret: what it knows us by. reads: how
    much of a 200's body says more than 200. idle: why it wants nothing, though set up.
    own: texts for its bodies, by its own variables. nothing: a body that records
    nothing (None: a GET does that). Skipped: why none can be made of the settings.
    """

    kind = ""
    variables: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    url_is_secret = False
    reads = 0
    idle = ""

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
        return not self.idle and (not self.events or ping.get("event") in self.events)

    def frozen(self, ping: Fields) -> dict[str, str]:
        """Its own texts, to wait beside the ping: the sender may be another session's,
        with other settings."""
        project = str(ping.get("project"))
        return {k: text.replace("{project}", project) for k, text in self.own.items()}

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
        return Request(self.url, self.headers, None)

    def post(self, path: str, fields: Fields) -> Request:
        """A request with a JSON body."""
        return Request(self.url + path, self.headers, encode_json(fields).encode())


def url_in(settings: Settings, name: str, default: str = "", base: bool = True) -> str:
    """The URL in a variable, `base`: to which a path is added; Skipped when it is none
    that a ping may go to."""
    url = settings.environ.get(name) or default
    if not url:
        raise Skipped(f"{name} is not set")
    try:
        scheme, host, _ = split_url(url)
        if scheme == "http" and not (settings.allow_http or loopback(host)):
            raise ValueError(ALLOW_HTTP)
        if base and ("?" in url or "#" in url):
            raise ValueError("it must be a base URL, without ? and #")
    except ValueError as error:
        raise Skipped(f"{name} is not usable: {error}") from None
    return url.rstrip("/") if base else url


def secret_in(text: str, name: str) -> str:
    """A token that may stand in a header; Skipped says what is wrong, and not it."""
    text = text.strip()
    if not text:
        raise Skipped(f"{name} is not set")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise Skipped(f"{name} is not usable: it has characters that no token has")
    return text


class TelemHQ(Tracker):
    """TelemHQ (public docs): the ping is the body, the token is in the URL's path."""

    kind = "telemhq"
    variables = secrets = ("TELEMHQ_PING_URL",)
    url_is_secret = True

    def __init__(self, settings: Settings, _: ReadSecret) -> None:
        super().__init__(url_in(settings, "TELEMHQ_PING_URL", settings.url, base=False))

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
    secrets = ("WIGTOKEN_TOKEN",)
    events = SESSION_EVENTS
    needs = ("own", "messages")
    ROWS_MAX = 1000  # more in a request: 413

    def __init__(self, settings: Settings, _: ReadSecret) -> None:
        url = url_in(settings, "WIGTOKEN_SERVER") + "/api/ingest/messages"
        token = settings.environ.get("WIGTOKEN_TOKEN", "")
        super().__init__(url, secret_in(token, "WIGTOKEN_TOKEN"))
        self.idle = "" if settings.usage else NO_USAGE
        machine = settings.environ.get("WIGTOKEN_MACHINE") or settings.machine
        if not machine:
            raise Skipped("WIGTOKEN_MACHINE is not set; the server demands a name")
        if not identifier(machine) or ":" in machine or len(machine) > 100:
            text = "only letters, digits and _ . - may be in it, at most 100"
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
        machine = {**self.own, **beside.get("own", {})}["machine"]
        most = range(0, len(rows), self.ROWS_MAX)
        parts = [rows[first : first + self.ROWS_MAX] for first in most]
        return [self.post("", {"machine": machine, "messages": part}) for part in parts]


class Recorder(Tracker):
    """Recorder (its recipe, CLI and SDK): a request a value, four values a session,
    under a prefix that is chosen for each project. Nothing is known of how it takes a
    repeat: the comment tells one."""

    kind = "recorder"
    variables = ("RECORDER_PAT", "RECORDER_URL", "RECORDER_PREFIX")
    secrets = ("RECORDER_PAT",)
    events = SESSION_EVENTS  # or a session that ends without a word is never told
    needs = ("own", "since_end")
    URL = "https://api.recorder.nasebanal.com"
    NAMES = ("/Input", "/Output", "/CacheRead", "/CacheCreate")  # as TOKENS has them

    def __init__(self, settings: Settings, _: ReadSecret) -> None:
        url = url_in(settings, "RECORDER_URL", self.URL) + "/api/v1/records"
        token = settings.environ.get("RECORDER_PAT", "")
        super().__init__(url, secret_in(token, "RECORDER_PAT"))
        self.idle = "" if settings.usage else NO_USAGE
        prefix = settings.environ.get("RECORDER_PREFIX", "").strip().rstrip("/")
        if not line_of_text(prefix):
            self.idle = (
                "RECORDER_PREFIX is not set for this project (to a line of text)"
            )
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
OTLP_ELSEWHERE = ("input_tokens", "timestamp", "event", "hook_version")


class OTLP(Tracker):
    """OpenTelemetry: a log record a ping, OTLP/HTTP with JSON (its specification: names
    in lowerCamelCase, 64-bit integers as strings, nanoseconds). At least once:
    telemhq.event_id tells a repeat."""

    kind = "otlp"
    variables = ("TELEMHQ_OTLP_ENDPOINT", "TELEMHQ_OTLP_HEADERS")
    secrets = ("TELEMHQ_OTLP_HEADERS",)
    reads = 4096
    INFO, ERROR = 9, 17

    def __init__(self, settings: Settings, _: ReadSecret) -> None:
        url = url_in(settings, "TELEMHQ_OTLP_ENDPOINT")
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
            good = LETTERS_DIGITS.union("-_.").issuperset(name) and value.isascii()
            if not (name and equals and good and value.isprintable()):
                raise ValueError("no header")
            found[name] = value
        return found

    def requests(self, ping: Fields, _: Fields) -> list[Request]:
        """The one record. (Back ends that do not know eventName yet show the body.)"""
        name = f"claude_code.{ping.get('event')}"
        failed = ping.get("status") == "failed"
        record = {
            "timeUnixNano": str(ns_of_iso(ping.get("timestamp"))),
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
            typed: Fields = {"stringValue": value}
            if isinstance(value, bool):
                typed = {"boolValue": value}
            elif isinstance(value, float) or name.endswith("cost_usd"):
                typed = {"doubleValue": float(value)}
            elif isinstance(value, int):
                typed = {"intValue": str(value)}
            found.append({"key": name, "value": typed})
        return found

    def refuses(self, body: bytes) -> bool:
        """A partial success rejects the one record: it must not be sent again."""
        try:
            partial = decode_json(body.decode("utf-8", "replace"))["partialSuccess"]
            return int(partial["rejectedLogRecords"]) > 0
        except (ValueError, KeyError, TypeError):
            return False


class ClaudeMetrics(Tracker):
    """Claude Metrics (its plugin 0.4.0; the server is not public): the metadata of what
    the plugin sends. Never a prompt, a response or an e-mail address."""

    kind = "claude-metrics"
    variables = (
        "CLAUDE_METRICS_API_URL",
        "CLAUDE_METRICS_API_TOKEN",
        "CLAUDE_METRICS_DISABLED",
    )
    secrets = ("CLAUDE_METRICS_API_TOKEN",)
    needs = ("totals",)
    URL = "http://127.0.0.1:8000/api/v1"
    TOKEN_FILE = "~/.claude-metrics/token"
    PATHS = (  # to where an event is told; one with tokens is an execution, too
        ("/execution", ("Stop", "StopFailure")),
        ("/tool", ("PostToolUse", "PostToolUseFailure")),
        ("/system", ("Notification", "PreCompact", "SubagentStop")),
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

    def __init__(self, settings: Settings, read_secret: ReadSecret) -> None:
        if SWITCH.get(settings.environ.get("CLAUDE_METRICS_DISABLED", "").lower()):
            raise Skipped("CLAUDE_METRICS_DISABLED is set")
        url = url_in(settings, "CLAUDE_METRICS_API_URL", self.URL) + "/events"
        token = settings.environ.get("CLAUDE_METRICS_API_TOKEN", "")
        try:
            token = token or read_secret(self.TOKEN_FILE)
        except OSError as error:
            text = f"is not set, and {self.TOKEN_FILE} of no use: {error.strerror}"
            raise Skipped(f"CLAUDE_METRICS_API_TOKEN {text}") from None
        super().__init__(url, secret_in(token, "CLAUDE_METRICS_API_TOKEN"))
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
            totals = with_all_input(beside.get("totals", {}))
            return {**found, **self.session(ping), **picked(totals, self.TOTALS)}
        key = sha256_hex(f"{ping['event_id']}{path}".encode())
        uuid = f"{key[:8]}-{key[8:12]}-4{key[13:16]}-8{key[17:20]}-{key[20:32]}"
        found.update(picked(ping, "turn_id=prompt_id permission_mode"), event_id=uuid)
        if path == "/execution":
            tools = ping.get("tools", {}).items()
            used = [{"name": name, "count": calls} for name, calls in tools]
            found.update(picked(with_all_input(ping), self.EXECUTION), tools_used=used)
            return {**found, "response_text": None}
        if path == "/tool":
            success = ping.get("status") == "success"
            return {**found, **picked(ping, self.TOOL), "success": success}
        kind = "".join(f"_{c.lower()}" if c.isupper() else c for c in ping["event"])
        payload = picked(ping, "notification_type trigger agent_id agent_type")
        return {**found, "kind": kind[1:], "payload": payload}

    @staticmethod
    def session(ping: Fields) -> Fields:
        """A session as it stands: each such request replaces it."""
        if ping["event"] == "SessionStart":
            return picked(ping, "started_at=timestamp")
        if ping["event"] == "Stop":
            return {}
        return picked({"reason": "lost", **ping}, "ended_at=timestamp exit_kind=reason")

    def check(self) -> Request:
        """A GET where only POSTs are taken."""
        return Request(self.url + "/session", self.headers, None)


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


def ns_of_iso(text: object) -> int:
    """The inverse of iso_time(); 0 when it is no such time."""
    from datetime import datetime

    try:
        when = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return 0
    return round(when.timestamp() * 1000) * 10**6


TRACKERS: dict[str, Callable[[Settings, ReadSecret], Tracker]] = {
    found.kind: found for found in (TelemHQ, Wigtoken, Recorder, OTLP, ClaudeMetrics)
}


def find_trackers(
    settings: Settings, read_secret: ReadSecret
) -> tuple[list[Tracker], list[str]]:
    """The trackers that the settings name; and why others that they name are none.
    read_secret: OSError when a file holds none that only its owner can read."""
    trackers, problems = [], []
    for name in settings.destinations:
        try:
            if name not in TRACKERS:
                known = ", ".join(TRACKERS)
                raise Skipped(f"TELEMHQ_DESTINATIONS: {name!r} is none of {known}")
            trackers.append(TRACKERS[name](settings, read_secret))
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
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if os.name == "posix" and found.st_uid != os.geteuid():
        return "belongs to someone else"
    if os.name == "posix" and found.st_mode & 0o022:
        return "can be written by others"
    return ""


def write_file(path: str, content: bytes, make_directory: bool = False) -> None:
    """Make `path` hold `content`, all or nothing, 0600 (the umask is 077).

    make_directory: also when its directory is missing. Only hooks may do that: what
    `uninstall` has removed must not come back from a sender still at work.
    """
    directory, name = os.path.split(path)
    unfinished = os.path.join(directory, f".{name}.{os.urandom(4).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW
    try:
        fd = os.open(unfinished, flags, 0o600)
    except FileNotFoundError:
        if not make_directory:
            raise
        os.makedirs(directory, 0o700, exist_ok=True)
        fd = os.open(unfinished, flags, 0o600)
    try:
        try:
            while content:
                content = content[os.write(fd, content) :]
        finally:
            os.close(fd)
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


def read_secret(path: str) -> str:
    """What a file (~ is home) holds that only its owner can read; else OSError."""
    fd = os.open(absolute(path) or "", os.O_RDONLY | NO_WAIT)
    try:
        found = os.fstat(fd)
        mine = os.name != "posix" or found.st_uid == os.geteuid()
        if not mine or (os.name == "posix" and found.st_mode & 0o077):
            raise PermissionError(1, "others can read it, chmod 600 mends that")
        return os.read(fd, SECRET_MAX_BYTES).decode("ascii", "replace")
    finally:
        os.close(fd)


def remove(path: str) -> bool:
    """Delete a file or an empty directory; whether that worked."""
    for delete in (os.unlink, os.rmdir):
        try:
            delete(path)
            return True
        except OSError:
            continue
    return False


def age_s(path: str) -> float:
    """Seconds since a file was written, 0 when it is gone."""
    try:
        return time.time() - os.lstat(path).st_mtime
    except OSError:
        return 0.0


class Lock:
    """A destination's lock, held. fd: -1 where there can be none. The kernel frees it
    at its holder's death; the file is never deleted."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def take(cls, path: str) -> Lock | None:
        """The lock of that file; None while someone else holds it. Any error but "busy"
        counts as free: rather one ping twice under its id than all of them never."""
        fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o600)
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
        return cls(fd)

    def close(self) -> None:
        """Leave it to the sender that was given it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def release(self) -> None:
        """Give it back, also from a hook just ending that still shares it."""
        try:
            if self.fd >= 0 and os.name == "posix":
                import fcntl

                fcntl.flock(self.fd, fcntl.LOCK_UN)
        except OSError:
            pass  # a file system without locks
        self.close()


class Suspect:
    """A ping that failed. charges: how often that was its own fault, for another was
    delivered; 0: not judged yet. tried_at: the last time, seconds since 1970."""

    def __init__(self, charges: int, tried_at: float) -> None:
        self.charges, self.tried_at = charges, tried_at


class State:
    """state.json: what a destination remembers from pass to pass.

    failures: passes that failed, in a row. set_at, not_before: when the back-off was
    set, and ends. delivered_at, swept_at: the last delivery, the last sweep. verdict,
    problem, problem_at: of the last failure. (Times: seconds since 1970, 0: never.)
    suspects: name in the outbox -> Suspect. losses: reason -> pings lost.
    """

    def __init__(self, path: str, found: Fields) -> None:
        """Whatever was found, every attribute has a value that makes sense."""

        def known(name: str) -> float:
            return float(found[name]) if number(found.get(name)) else 0

        self.path = path
        self.failures = min(known("failures"), FAILURES_MAX)
        self.set_at, self.not_before = known("set_at"), known("not_before")
        self.delivered_at, self.swept_at = known("delivered_at"), known("swept_at")
        self.verdict = str(found.get("verdict", ""))
        self.problem = str(found.get("problem", ""))
        self.problem_at = known("problem_at")
        losses = object_in(found, "losses")
        self.losses = {k: int(n) for k, n in losses.items() if number(n)}
        self.suspects = {
            name: Suspect(int(pair[0]), pair[1])
            for name, pair in object_in(found, "suspects").items()
            if isinstance(pair, list) and len(pair) == 2 and all(map(number, pair))
        }

    @classmethod
    def load(cls, path: str) -> State:
        """What the file holds, or the state of one that never delivered."""
        try:
            return cls(path, read_object(path, STATE_MAX_BYTES))
        except (OSError, ValueError):
            return cls(path, {})

    def save(self) -> None:
        """Write the file; a disk that refuses must not stop delivery."""
        found = {name: value for name, value in vars(self).items() if name != "path"}
        suspects = self.suspects.items()
        found["suspects"] = {name: [s.charges, s.tried_at] for name, s in suspects}
        try:
            write_file(self.path, encode_json(found).encode())
        except OSError:
            pass

    def backoff_left_s(self, now: float) -> float:
        """Seconds until the back-off ends, 0 when none stands. One that was set in what
        is now the future is none: a clock that jumped must not stop delivery."""
        ends = min(self.not_before, self.set_at + RETRY_AFTER_MAX_S)
        return ends - now if self.set_at <= now < ends else 0

    def suspect(self, name: str) -> Suspect:
        """The suspect of that name; a new one when there is none yet."""
        return self.suspects.setdefault(name, Suspect(0, time.time()))

    def lost(self, reason: str, count: int = 1) -> None:
        """Count pings that will never be delivered."""
        self.losses[reason] = self.losses.get(reason, 0) + count


def object_in(found: Fields, name: str) -> Fields:
    """The object under `name`, an empty one when there is none."""
    value = found.get(name)
    return value if isinstance(value, dict) else {}


class Record:
    """What the file of a ping that waits holds. ping: what is sent. local: what
    charging needs and never leaves. beside: what else the tracker needs, by the gate.
    accepted: how many of the ping's requests have been; the next ones go."""

    def __init__(
        self, ping: Fields, local: Fields, beside: Fields, accepted: int = 0
    ) -> None:
        self.ping, self.local, self.beside = ping, local, beside
        self.accepted = accepted

    @classmethod
    def load(cls, found: Fields, needs: tuple[str, ...]) -> Record:
        """What a file holds, through the gate; ValueError: that is no ping."""
        ping, accepted = gate(object_in(found, "ping")), found.get("accepted", 0)
        if "event_id" not in ping:
            raise ValueError("no ping")
        beside = gate_beside(found.get("beside"), needs)
        local = object_in(found, "local")
        return cls(ping, local, beside, int(accepted) if number(accepted) else 0)

    def encode(self) -> bytes:
        """As the file holds it."""
        found: Fields = {"ping": self.ping, "local": self.local, "beside": self.beside}
        return encode_json({**found, "accepted": self.accepted}).encode()


class PingName:
    """What the name of a ping's file tells: <time>-<event>-<session>-<event_id>.json,
    so that no file is opened to know whose it is. ns: the event's time, nanoseconds
    since 1970, 20 digits, so that names sort by age. session: 16 hex digits, which also
    name its account. (With time and id alone it is a ping, too.)"""

    def __init__(self, name: str) -> None:
        ns, _, rest = name[: -len(".json")].partition("-")
        parts = rest.split("-")
        self.ns = int(ns)
        self.event, self.session = parts[:2] if len(parts) == 3 else ("", "")
        self.event_id = parts[-1]

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

    def kind(self) -> str:
        """The kind of the tracker that it is, or was, for."""
        return self.name().rpartition("-")[0]

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

    def put(self, ns: int, record: Record) -> str:
        """Add the ping of an event of that time; its name. It is whole or not there."""
        name = PingName.make(ns, record.ping)
        write_file(self.file(name), record.encode(), make_directory=True)
        return name

    def waiting(self) -> list[str]:
        """Names of the pings that wait, oldest first."""
        try:
            return sorted(filter(PingName.is_one, os.listdir(self.path("outbox"))))
        except FileNotFoundError:
            return []

    def record(self, name: str) -> Record:
        """What a file holds. OSError: it is gone; ValueError: it is no ping."""
        most = RECORD_MAX_BYTES if self.needs else PING_MAX_BYTES
        return Record.load(read_object(self.file(name), most), self.needs)

    def rewrite(self, name: str, record: Record) -> None:
        """Make the ping that waits under `name` this one, as it will be sent."""
        write_file(self.file(name), record.encode())

    def set_aside(self, name: str) -> None:
        """Move what can never be delivered out of the others' way, to refused/."""
        refused = self.path("refused")
        try:
            if not os.path.isdir(refused):
                os.mkdir(refused, 0o700)
            os.replace(self.file(name), os.path.join(refused, name))
            for old in sorted(os.listdir(refused))[:-REFUSED_MAX_PINGS]:
                remove(os.path.join(refused, old))
        except OSError:
            remove(self.file(name))

    def state(self) -> State:
        """What is remembered from pass to pass."""
        return State.load(self.path("state.json"))

    def take_lock(self) -> Lock | None:
        """The lock; None while someone else holds it."""
        return Lock.take(self.path("lock"))


def outbox_of(settings: Settings, tracker: Tracker) -> Outbox:
    """The outbox of a tracker; Skipped when there is no place for it."""
    if not settings.state_dir:
        raise Skipped("there is no home directory; set TELEMHQ_STATE_DIR")
    directory = os.path.join(settings.state_dir, tracker.directory_name())
    return Outbox(directory, tracker.needs)


# -- Hook: what Claude Code runs -------------------------------------------------------

THIS_FILE = os.path.abspath(__file__)  # now, for a hook leaves its directory


def read_stdin() -> bytes:
    """All bytes of stdin, to its end: Claude Code shows an error when it is closed
    early. More than STDIN_MAX_BYTES are none."""
    parts, size, part = [], 0, b"-"
    while part and size <= STDIN_MAX_BYTES:
        try:
            part = os.read(0, 1 << 16)  # as much as a pipe holds
        except OSError:
            part = b""
        size += len(part)
        parts.append(part)
    return b"".join(parts) if size <= STDIN_MAX_BYTES else b""


def event_on_stdin() -> tuple[Fields, int]:
    """(event, its size in bytes); Skipped when there is none."""
    raw = read_stdin()
    try:
        event = decode_json(raw.decode("utf-8", "replace").lstrip("\ufeff"))
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise Skipped("stdin held no JSON object, which Claude Code would send")
    problem = no_event(event)
    if problem:
        raise Skipped(problem)
    return event, len(raw)


def sender_command(*arguments: str) -> list[str]:
    """The command of a sender: a fresh interpreter that imports this file."""
    directory, name = os.path.split(THIS_FILE)
    start = (
        "import sys; sys.path.insert(0, sys.argv[1]); __import__(sys.argv[2]).sender()"
    )
    python = [sys.executable, "-I", "-S", "-X", "lazy_imports=all", "-c", start]
    return [*python, directory, name[: -len(".py")], *arguments]


def start_sender(
    held: dict[str, Lock], environ: dict[str, str], how: str = "detached"
) -> None:
    """Start a sender that outlives us, and hand it the locks of these destinations
    (names of their directories). It serves the first, and starts a sender for each of
    the others: one start is all that Claude Code waits for. how: "once" makes one pass,
    "debug" talks on our stderr besides.

    A fresh interpreter, for urllib crashes in a forked process on macOS. In its own
    session and with no descriptor but the locks: Claude Code kills groups and families,
    and waits for the end of its pipes.
    """
    if os.name == "nt":  # no descriptor is inherited there: a sender locks for itself
        for lock in held.values():
            lock.release()
    else:
        os.chdir("/")  # keep no project's directory busy
    fds = [lock.fd for lock in held.values() if lock.fd >= 0]
    served = [word for name, lock in held.items() for word in (str(lock.fd), name)]
    command, quiet = sender_command(how, *served), (0, 1, 2)[: 3 - (how == "debug")]
    try:
        spawn(command, fds, environ, quiet)
    except (AttributeError, NotImplementedError, OSError):
        # Windows, PyPy, Termux: no posix_spawn. macOS before 10.15, old C libraries:
        # no setsid=.
        from subprocess import DEVNULL, Popen

        apart: dict[str, Any] = {"pass_fds": fds, "start_new_session": True}
        if os.name == "nt":  # DETACHED_PROCESS, CREATE_NEW_PROCESS_GROUP
            apart = {"creationflags": 0x8 | 0x200, "cwd": os.path.dirname(THIS_FILE)}
        apart["stderr"] = DEVNULL if 2 in quiet else None
        Popen(command, stdin=DEVNULL, stdout=DEVNULL, env=environ, **apart)
    finally:
        for lock in held.values():
            lock.close()


def spawn(
    command: list[str], fds: list[int], environ: dict[str, str], quiet: tuple[int, ...]
) -> None:
    """Start a process without the import of subprocess, 8 ms. fds: what it inherits.
    quiet: what is /dev/null for it."""
    spawn_it = os.posix_spawn
    try:
        inherited = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:  # a container without /proc
        inherited = list(range(256))
    for fd in inherited:
        try:
            os.set_inheritable(fd, fd in (0, 1, 2, *fds))
        except OSError:
            continue  # not open, or the listing's own
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in quiet]
    usual: Any = {"setsid": True, "setsigdef": [15]}  # SIGTERM: our shell may ignore it
    spawn_it(command[0], command, environ, file_actions=null, **usual)


def start_senders(queued: dict[Outbox, str], settings: Settings) -> list[Outbox]:
    """Have a sender started for each outbox where none runs and no back-off stands
    (debug mode does not care); for which one was."""
    held, started = {}, []
    for outbox in queued:
        if settings.debug or not outbox.state().backoff_left_s(time.time()):
            lock = outbox.take_lock()
            if lock is not None:  # busy: a sender runs, and will see the file
                held[outbox.name()] = lock
                started.append(outbox)
    if held:
        waits = "debug" if settings.debug else "once"
        how = waits if settings.foreground else "detached"
        start_sender(held, settings.environ, how)
    return started


def wait_for_senders(
    queued: dict[Outbox, str], started: list[Outbox], ends: float
) -> None:
    """Wait until our senders have given their locks back; for another one only as long
    as it has not sent our ping; until `ends` (monotonic) at most."""
    for outbox, name in queued.items():
        lock = None
        while lock is None and time.monotonic() < ends:
            if outbox not in started and not os.path.exists(outbox.file(name)):
                break
            time.sleep(LOOK_S / 10)
            lock = outbox.take_lock()
        if lock is not None:
            lock.release()


def destinations(settings: Settings, tell: Tell) -> list[Tracker]:
    """The trackers that pings can go to; Skipped when there is none."""
    trackers, problems = find_trackers(settings, read_secret)
    if not trackers:
        raise Skipped("; ".join(problems))
    for text in problems:
        tell(text)
    return trackers


def enqueue(
    outbox: Outbox, tracker: Tracker, ns: int, ping: Fields, local: Fields
) -> str:
    """Put a ping into a tracker's outbox; its name. Skipped says why that cannot be."""
    outbox.need_sound()
    beside = gate_beside({"own": tracker.frozen(ping)}, tracker.needs)
    try:
        return outbox.put(ns, Record(ping, local, beside))
    except OSError as error:
        raise Skipped(f"cannot write to {outbox.directory}: {error.strerror}") from None


def report_event(settings: Settings, tell: Tell) -> None:
    """The event on stdin becomes a ping in the outboxes; Skipped says why it did not.
    No destination hinders another."""
    ends, ns = time.monotonic() + FOREGROUND_S, time.time_ns()
    for text in settings.ignored:
        tell(text)
    try:
        trackers = destinations(settings, tell)
    except Skipped:
        read_stdin()
        raise
    event, event_bytes = event_on_stdin()
    ping = make_ping(event, settings, project_of(event, settings), ns, event_bytes)
    local = local_of(event, settings, ping)
    queued, problems = {}, []
    for tracker in trackers:
        outbox = outbox_of(settings, tracker)
        try:
            if tracker.wants(ping):
                queued[outbox] = enqueue(outbox, tracker, ns, ping, local)
        except Skipped as why:
            problems.append(str(why))
    if queued:
        tell(f"{ping['event']} {ping['event_id']} is in the outbox")
    started = start_senders(queued, settings)
    if settings.foreground:
        wait_for_senders(queued, started, ends)
        if any(os.path.exists(outbox.file(name)) for outbox, name in queued.items()):
            tell("the ping waits in the outbox; a later hook delivers it")
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


def bytecode_path() -> str:
    """Where Python caches this file's bytecode (PEP 3147)."""
    directory, name = os.path.split(THIS_FILE[: -len(".py")])
    tag = sys.implementation.cache_tag
    return os.path.join(directory, "__pycache__", f"{name}.{tag}.pyc")


def mend_bytecode(path: str) -> None:
    """Close a __pycache__ that a umask of 000 left open to others: Python would run
    what they put there. As a script, remove bytecode that cannot be loaded: Python
    never does, and the settings' command imports it in vain."""
    cache, beside = os.path.dirname(path), os.path.dirname(THIS_FILE)
    mode = os.stat(cache).st_mode
    if mode & ~os.stat(beside).st_mode & 0o022:  # as open as the script's it may be
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
        mend_bytecode(bytecode_path())
    except OSError:
        pass  # there is none
    run_for_claude_code(report_event)


# ======================================================================================
# All above runs while Claude Code waits; all below in the background, in a sender.
# (Foreground and debug mode: Claude Code waits for the sender as well.)
# ======================================================================================


# -- Transcripts: rows that count ------------------------------------------------------

NEEDLES = (b'"usage"', b'"is_error":true', b'"cost-state"', b'"interruptedMessageId"')
COUNTS = (  # the ping's name, the transcript's, the ledger's
    ("input_tokens", "input_tokens", "inputTokens"),
    ("output_tokens", "output_tokens", "outputTokens"),
    ("cached_input_tokens", "cache_read_input_tokens", "cacheReadInputTokens"),
    (
        "cache_creation_input_tokens",
        "cache_creation_input_tokens",
        "cacheCreationInputTokens",
    ),
    ("reasoning_tokens", "thinking_tokens", "thinkingTokens"),
)
LEDGER_SUMS = (  # the ping's name, the ledger's
    ("cost_usd", "totalCostUSD"),
    ("lines_added", "totalLinesAdded"),
    ("lines_removed", "totalLinesRemoved"),
)
NO_LEDGER: list[Any] = [{}, {}, [0, 0, 0]]
NONE = [0] * len(COUNTS)
OUTPUT = 1  # the output tokens' place in COUNTS
INTERRUPTED = "[Request interrupted by user"  # the client's words, in a row of its own


def matters(line: bytes) -> bool:
    """Whether a line of a transcript may hold a count, or begin a turn, by its bytes.
    Tools' results are most of the file."""
    begins = b'"promptId"' in line and b'"tool_result"' not in line
    return begins or any(needle in line for needle in NEEDLES)


def short_id(text: str) -> str:
    """What is kept of an id: 48 bits, enough to know it again."""
    from hashlib import sha256  # imported already, by urllib

    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:ID_CHARS]


def counts_in(found: Fields, column: int) -> list[int]:
    """The counts of a row's usage (column 1) or of a model in the ledger (2), in the
    order of COUNTS."""
    details = found.get("output_tokens_details")
    found = {**found, **details} if isinstance(details, dict) else found
    given = [found.get(names[column]) for names in COUNTS]
    return [int(n) if number(n) else 0 for n in given]  # type: ignore[arg-type]


def plus(counts: list[int], more: list[int]) -> list[int]:
    """The sum, count by count."""
    return [a + b for a, b in zip(counts, more)]


def seconds_of(stamp: object) -> float:
    """A row's timestamp in seconds since 1970, 0 when it is none."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(str(stamp).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0


class Row:
    """A line of a transcript that counts, or begins a turn. What it lacks or has
    otherwise than expected raises: the format is internal to the client.

    at: when it was written, seconds since 1970; where it does not tell, as the row
    before it.
    """

    def __init__(self, fields: Fields) -> None:
        self.at = seconds_of(fields["timestamp"]) if "timestamp" in fields else 0.0
        self.sidechain = bool(fields.get("isSidechain"))

    @staticmethod
    def parse(line: bytes) -> Row | None:
        """The row that a line holds, None when it holds none of ours."""
        try:
            fields = decode_json(line.decode("utf-8", "replace"))
            return ROWS[fields["type"]](fields)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class AnswerRow(Row):
    """One content block of an answer of the API, with the whole answer's usage.

    key: what the answer is known by; name: the id that it has for a person; request:
    the API's. real: no words of the client's own. copied: from another session;
    origin: which, as far as it tells; branched: by /branch. stopped: it is whole;
    final: the turn ends with it. calls: tool calls, short id -> name. inner: (model,
    counts) of other models' calls inside it.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        message, session = fields["message"], fields.get("sessionId")
        self.request = str(fields.get("requestId") or "")
        self.name = str(message.get("id") or self.request or fields["uuid"])
        self.key = short_id(self.name) + short_id(self.request)[:4]
        self.counts = counts_in(message["usage"], 1)
        model, stop_reason = message.get("model"), message.get("stop_reason")
        self.real = model != "<synthetic>" and not fields.get("isApiErrorMessage")
        self.model = model_shown(model)
        self.origin = fields.get("requestSessionId", session)
        self.branched = bool(fields.get("forkedFrom"))
        self.copied = self.origin != session or self.branched
        self.stopped = stop_reason is not None
        self.final = stop_reason not in (None, "tool_use")
        self.calls: dict[str, object] = {}
        content = message.get("content")
        for block in content if isinstance(content, list) else ():
            if block.get("type") == "tool_use" and isinstance(block.get("id"), str):
                self.calls[short_id(block["id"])] = block.get("name")
        self.inner = [
            (model_shown(call.get("model")), counts_in(call, 1))
            for call in message["usage"].get("iterations") or ()
            if call.get("type") == "advisor_message"
        ]
        self.branch = fields.get("gitBranch")


class UserRow(Row):
    """A prompt, results of tools, or what the client put in.

    failed: short ids of the tool calls that failed. interrupt: what it is known by, ""
    when it tells of none. prompt: it begins a turn of the session.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        content = fields["message"].get("content")
        blocks = content if isinstance(content, list) else []
        results = [block for block in blocks if block.get("type") == "tool_result"]
        failed = [block for block in results if block.get("is_error") is True]
        self.failed = [short_id(str(block.get("tool_use_id"))) for block in failed]
        texts = [str(block.get("text")) for block in blocks if not results]
        self.interrupt = ""
        if "interruptedMessageId" in fields or "".join(texts).startswith(INTERRUPTED):
            self.interrupt = short_id(f"{fields.get('uuid')} {fields.get('timestamp')}")
        inserted = fields.get("isMeta") or fields.get("isCompactSummary")
        self.prompt = not (results or self.interrupt or inserted)


class LedgerRow(Row):
    """The client's own sums of a session so far. ledger: [model -> counts, model ->
    USD, the sums of LEDGER_SUMS]."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        models: dict[str, list[int]] = {}
        costs: dict[str, float] = {}
        for name, used in fields["modelUsage"].items():
            shown, cost = model_shown(name), used.get("costUSD")
            models[shown] = plus(models.get(shown, NONE), counts_in(used, 2))
            costs[shown] = costs.get(shown, 0) + (cost if number(cost) else 0)
        sums = [fields.get(theirs) for _, theirs in LEDGER_SUMS]
        self.ledger = [models, costs, [n if number(n) else 0 for n in sums]]


ROWS: dict[str, Callable[[Fields], Row]] = {
    "assistant": AnswerRow,
    "user": UserRow,
    "cost-state": LedgerRow,
}


class Transcript:
    """How far one of a session's transcripts was read.

    inode: as text, for JSON readers lose digits. ended_at: the time of the last row
    that ended a turn, seconds since 1970.
    """

    def __init__(self, inode: str = "", offset: int = 0, ended_at: float = 0) -> None:
        self.inode, self.offset, self.ended_at = inode, offset, ended_at

    def rows(self, path: str, ends: float) -> Iterator[Row]:
        """The rows gained. One at which the reader stops is read again next time.
        OSError or ValueError: it cannot be read; TimeoutError: not to its end by `ends`
        (monotonic)."""
        with open(open_regular(path), "rb") as file:
            inode, at, whole = str(os.fstat(file.fileno()).st_ino), 0.0, True
            file.seek(max(0, self.offset - 1))
            if inode != self.inode or (self.offset and file.read(1) != b"\n"):
                self.offset = file.seek(0)  # another file, or not what it was
            self.inode, position = inode, self.offset
            for line in iter(lambda: file.readline(LINE_MAX_BYTES), b""):
                position += len(line)
                begins, whole = whole, line.endswith(b"\n")
                # The parts of one that is too long are no lines.
                row = Row.parse(line) if begins and whole and matters(line) else None
                if row is not None:
                    at = row.at = row.at or at
                    yield row
                if whole:
                    self.offset = position
                if time.monotonic() > ends:
                    raise TimeoutError("the rest is for the next ping")


# -- Accounts: tokens, charged once ----------------------------------------------------

USAGE_EVENTS = ("Stop", "StopFailure", "SubagentStop", "SessionEnd", "SessionLost")
HISTORY, CALLED, FAILED = "history", "call", "failed"  # what else stands in `seen`
IDENTITY = ("project", "session_id", "cwd_hash", "transcript_path_hash")


def less(counts: list[int], others: list[int]) -> list[int]:
    """The difference, count by count; never negative."""
    return [max(0, a - b) for a, b in zip(counts, others)]


def total(*parts: dict[str, list[int]]) -> list[int]:
    """The sum over all models of all `parts` (model -> counts)."""
    found = NONE
    for part in parts:
        for counts in part.values():
            found = plus(found, counts)
    return found


def named(counts: list[int]) -> Fields:
    """Counts as a ping has them: all of COUNTS, and the total."""
    found = {names[0]: n for names, n in zip(COUNTS, counts)}
    return {**found, "total_tokens": sum(counts) - found["reasoning_tokens"]}


class Usage:
    """What was read and is to be charged. models: model -> counts. tools: name ->
    calls. rows: for a tracker that keeps answers, [id, model, time in ms, the counts]
    of what each has gained."""

    def __init__(self) -> None:
        self.models: dict[str, list[int]] = {}
        self.tools: dict[str, int] = {}
        self.rows: list[list[Any]] = []
        self.tool_calls = self.tool_failures = self.interrupts = 0

    def add(self, model: str, counts: list[int]) -> None:
        """Count tokens of a model."""
        if any(counts):
            self.models[model] = plus(self.models.get(model, NONE), counts)

    def fields(self, model: str, tool_names: bool, costs: dict[str, float]) -> Fields:
        """The fields of a ping. model: the main chain's last. costs: model -> USD."""
        fields = named(total(self.models))
        fields.update(tool_calls=self.tool_calls, tool_failures=self.tool_failures)
        if self.interrupts:
            fields["interrupts"] = self.interrupts
        models = {name: named(counts) for name, counts in self.models.items()}
        for name, cost in costs.items():
            models.setdefault(name, {})["cost_usd"] = cost
        if models and list(models) != [model]:
            fields["models"] = models
        tools: dict[str, int] = {}
        for name, calls in self.tools.items():
            shown = tool_shown(name, tool_names)
            tools[shown] = tools.get(shown, 0) + calls
        if tools:
            used = sorted(tools.items(), key=lambda pair: (-pair[1], pair[0]))
            fields["tools"] = dict(used[:20])
        if model:
            fields["model"] = model
        return fields

    def messages(self, event_id: str, ms: int) -> list[list[Any]]:
        """`rows` as BESIDE has them: together what the ping says, to the token. What no
        answer has (the ledger's, or more than there may be) has a row for each model.
        ms: the event's time."""
        found, left = self.rows[: ROWS_MAX - 200], dict(self.models)
        for _, model, _, *counts in found:
            left[model] = less(left[model], counts)
        for model, counts in left.items():
            name = f"{event_id}.{model}"
            if not identifier(name, "@[]"):  # it is too long
                name = f"{event_id}.{short_id(model)}"
            found += [[name, model, ms, *counts]] if any(counts) else []
        return found


class Account:
    """What of a session was charged at one destination. Every attribute but `path` is
    what its file holds, a plain value of JSON.

    transcript: where the session's own is. identity, own: of the last ping, for a
    SessionLost. since: older rows are history (seconds since 1970). was_read: its
    history is known. transcripts: name -> Transcript's arguments. seen: key of an
    answer -> its counts, or HISTORY; short id of a tool call -> CALLED, FAILED.
    history: whether the main chain's last answer is: "", "own", or "branched". parent:
    of a fork: session, key of the last answer copied. baseline: the ledger at the end
    of history; [] when nobody knows it. told: model -> counts, since then. ledger: the
    client's, while it is the last word. row_at: of the newest row; settled_at: of the
    newest that the baseline has. last_at, stopped_at: the last charge, the last end of
    a turn; prompted_at: the last prompt. total, tool_calls: told in all; at_end: when
    the session last ended. charged: event_id -> [fields, what stands beside].
    """

    def __init__(self, path: str, since: float = 0) -> None:
        self.path, self.since = path, float(since)
        self.transcript = self.model = self.branch = self.history = ""
        self.identity: Fields = {}
        self.own: Fields = {}
        self.row_at = self.settled_at = 0.0
        self.last_at = self.stopped_at = self.prompted_at = 0.0
        self.was_read = False
        self.transcripts: dict[str, list[Any]] = {}
        self.seen: dict[str, str] = {}
        self.parent: list[str] = []
        self.baseline: list[Any] = NO_LEDGER
        self.ledger: list[Any] = []
        self.told: dict[str, list[int]] = {}
        self.total, self.at_end, self.tool_calls = NONE, NONE, 0
        self.charged: dict[str, list[Fields]] = {}

    @classmethod
    def load(cls, path: str) -> Account:
        """OSError as it comes; ValueError: the file holds no account."""
        account, found = cls(path), read_object(path, ACCOUNT_MAX_BYTES)
        for name in account.kept():
            kind = type(getattr(account, name))
            if not isinstance(found.get(name), (int, kind) if kind is float else kind):
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
        top = self.transcript[: -len(".jsonl")]
        paths = [
            os.path.join(directory, name)
            for directory, _, names in os.walk(os.path.join(top, "subagents"))
            for name in sorted(names)
            if name.startswith("agent-") and name.endswith(".jsonl")
        ]
        agents = {os.path.relpath(path, top): path for path in paths}
        return {"": self.transcript, **agents}

    def count_of(self, key: str) -> list[int]:
        """What of an answer was counted."""
        known = self.seen.get(key)
        return [int(n) for n in known.split(",")] if known else NONE

    def seen_elsewhere(self, key: str) -> set[str]:
        """All that the accounts of other sessions, which have this key, have seen."""
        directory, own = os.path.split(self.path)
        found: set[str] = set()
        for name in os.listdir(directory) if os.path.isdir(directory) else ():
            path = os.path.join(directory, name)
            if own in name:  # or what a killed sender left unfinished of it
                continue
            try:
                if key.encode() in read_file(path, ACCOUNT_MAX_BYTES):
                    found.update(Account.load(path).seen)
            except (OSError, ValueError):
                continue
        return found


class Reading:
    """A look, or several, at what the transcripts of an account's session have gained.
    until: the time of the event. ends: monotonic. keeps: for a tracker that keeps
    answers."""

    def __init__(
        self, account: Account, until: float, ends: float, keeps: bool = False
    ) -> None:
        self.account, self.until, self.ends = account, until, ends
        self.keeps, self.usage = keeps, Usage()
        self.elsewhere: set[str] | None = None
        # The first answer of each id: some routers give many answers the same.
        keys = reversed(account.seen) if keeps else ()
        self.firsts = {key[:ID_CHARS]: key for key in keys}

    def read(self) -> bool:
        """Count what was gained; False: a part. The session's own comes first: agents'
        files may begin with copies of its rows. OSError or ValueError: that one cannot
        be read."""
        account, whole = self.account, True
        for name, path in account.files().items():
            try:
                if account.since and not (name or account.was_read):
                    account.since = max(account.since, self.end_of_earlier_runs())
                self.read_one(name, path)
            except TimeoutError:
                return False
            except (OSError, ValueError):
                if not name:
                    raise
                whole = whole and not os.path.isfile(path)
        account.was_read = True
        return whole

    def end_of_earlier_runs(self) -> float:
        """When that began which follows the last ledger with an answer behind it: what
        stands before was told by whoever served the earlier run; 0: there was none."""
        since = begun = 0.0
        ended = False
        for row in Transcript().rows(self.account.transcript, self.ends):
            if row.at > self.until + STAMP_S:
                break
            if isinstance(row, LedgerRow):
                ended, begun = True, 0.0
            elif ended:
                begun = begun or row.at
                # (After SIGINT, the one broken off stands behind the last ledger.)
                if isinstance(row, AnswerRow) and row.stopped:
                    since, ended = begun, False
        return since

    def read_one(self, name: str, path: str) -> None:
        """Count what one transcript has gained, up to the event's time: the client
        writes agents' rows a little later."""
        account = self.account
        transcript = Transcript(*account.transcripts.get(name, ()))
        try:
            for row in transcript.rows(path, self.ends):
                main = not name and not row.sidechain
                if row.at > self.until + (0 if main else LAG_S) + STAMP_S:
                    break  # a later ping's
                account.row_at = max(account.row_at, row.at)
                if isinstance(row, AnswerRow):
                    counts = row.real and self.count_answer(row, main)
                    if counts and row.final and (main or name):
                        transcript.ended_at = max(transcript.ended_at, row.at)
                elif isinstance(row, UserRow):
                    self.count_user(row, main)
                elif isinstance(row, LedgerRow) and main:
                    account.ledger = row.ledger
                    if account.history == "own":
                        account.baseline = row.ledger
        finally:
            if transcript.inode:
                account.transcripts[name] = list(vars(transcript).values())

    def is_history(self, row: AnswerRow) -> bool:
        """Whether an answer not seen before was told, or used, before our time."""
        account = self.account
        if row.copied or row.at < account.since:
            return True
        if account.was_read:
            return False
        if self.elsewhere is None:
            self.elsewhere = account.seen_elsewhere(row.key)
        return row.key in self.elsewhere

    def count_answer(self, row: AnswerRow, main: bool) -> bool:
        """Count an answer's tokens, once, and its tool calls; False: it is history."""
        account, seen = self.account, self.account.seen
        new = row.key not in seen
        if new and self.is_history(row):
            seen[row.key] = HISTORY
        elif new and row.at <= account.settled_at:
            seen[row.key] = ",".join(map(str, row.counts))  # the ledger had it
        past = seen.get(row.key) == HISTORY
        if main:
            self.note(row, past, new)
        if past:
            seen.update(dict.fromkeys(row.calls, HISTORY))
            return False
        self.gain(row.key, row.model, row.counts, row)
        for n, (model, counts) in enumerate(row.inner):
            self.gain(short_id(f"{row.key} {n}"), model, counts)
        for call, tool in row.calls.items():
            if call not in seen:
                seen[call] = CALLED
                self.usage.tool_calls += 1
                if isinstance(tool, str) and identifier(tool):
                    self.usage.tools[tool] = self.usage.tools.get(tool, 0) + 1
        return True

    def note(self, row: AnswerRow, past: bool, new: bool) -> None:
        """Note what the main chain's newest answer tells."""
        account = self.account
        if not past:
            account.history, account.model = "", row.model
            account.branch = str(row.branch) if branch_name(row.branch) else ""
            if row.stopped:
                account.ledger = []  # no last word any more
        elif new:
            account.history = "branched" if row.branched else "own"
            # /branch begins a ledger anew; of others it is found behind the history.
            account.baseline = NO_LEDGER if row.branched else []
            copied = row.copied and identifier(row.origin)
            account.parent = [str(row.origin), row.key] if copied else []
            account.told, account.ledger = {}, []

    def gain(
        self, key: str, model: str, counts: list[int], row: AnswerRow | None = None
    ) -> None:
        """Count what an answer has gained: in older rows the output may be partial, and
        some routers begin with none at all. row: for a tracker that keeps the first row
        of each id, which then is one of its own for what was gained later."""
        known = self.account.count_of(key)
        gained = less(counts, known)
        if counts[OUTPUT] < known[OUTPUT] or not any(gained):
            self.account.seen.setdefault(key, ",".join(map(str, counts)))
            return
        self.account.seen[key] = ",".join(map(str, plus(known, gained)))
        self.usage.add(model, gained)
        if row and self.keeps and identifier(row.name):
            first = self.firsts.setdefault(key[:ID_CHARS], key)
            name = row.name if first == key else f"{row.name}.{row.request}"
            name += f".{counts[OUTPUT]}" if any(known) else ""
            self.usage.rows.append([name, model, int(row.at * 1000), *gained])

    def count_user(self, row: UserRow, main: bool) -> None:
        """Count failed tools and interrupts; note that a prompt begins a turn."""
        account, seen = self.account, self.account.seen
        for call in row.failed:
            if seen.get(call) == CALLED:
                seen[call] = FAILED
                self.usage.tool_failures += 1
        if main and row.at >= account.since:
            if row.interrupt and row.interrupt not in seen:
                seen[row.interrupt] = CALLED
                self.usage.interrupts += 1
            if row.prompt:
                account.prompted_at = max(account.prompted_at, row.at)


def open_account(outbox: Outbox, name: str, ping: Fields) -> tuple[Account, bool]:
    """(the account of a ping's session, whether it is a damaged one's successor).
    OSError: it cannot be read, and must not be replaced. One that meets a session in
    its middle begins where we were installed, for Esc and a denied permission fire no
    hook; but a day before at most."""
    path = outbox.account_path(session_name(ping["session_id"]))
    at, source = PingName(name).ns / 1e9, ping.get("source")
    try:
        return Account.load(path), False
    except ValueError:
        account = Account(path, time.time())
        account.baseline = []
        return account, True
    except FileNotFoundError:
        pass
    starts = ping.get("event") == "SessionStart"
    known = filter(os.path.exists, (THIS_FILE, outbox.path("lock")))
    installed = min([at, *(os.stat(path).st_ctime for path in known)])
    account = Account(path, max(installed, at - DAY_S))
    if starts and source in ("resume", "fork"):
        account.since = at
    if starts and source in ("startup", "clear"):
        account.since, account.was_read = 0.0, True  # it has no history
    return account, False


class Charge:
    """One try to give a ping its session's new usage. ends: monotonic, for all of it.

    at: the event's time. stopped_at: when the session's turn before ended, 0: not
    known. saving: what fails now is writing. damaged: nobody knows what was told.
    """

    def __init__(self, outbox: Outbox, name: str, record: Record, ends: float) -> None:
        self.outbox, self.name, self.record = outbox, name, record
        self.ping, self.local = record.ping, record.local
        self.event, self.at = str(record.ping["event"]), PingName(name).ns / 1e9
        self.account, self.damaged = open_account(outbox, name, record.ping)
        stopped_at = self.account.stopped_at
        self.stopped_at = stopped_at if stopped_at < self.at else 0.0
        until = {"SessionEnd": self.at + LAG_S, "SessionLost": float("inf")}
        ends = min(ends, time.monotonic() + READ_S)
        keeps = "messages" in outbox.needs
        self.reading = Reading(
            self.account, until.get(self.event, self.at), ends, keeps
        )
        self.saving = False

    def run(self) -> Record:
        """The ping with its usage: now or, after a crash, again. The account is saved
        with it, then the ping's file is rewritten, then it may be sent: so nothing is
        lost, and nothing told twice."""
        account, event_id = self.account, str(self.ping["event_id"])
        charges = self.event in USAGE_EVENTS and self.local.get("usage") is not False
        if self.local.get("usage") is False:
            account.since = max(account.since, self.at)
        else:
            self.meet()
        if charges and event_id not in account.charged:
            account.charged[event_id] = self.tell()
        self.saving = True
        if not charges:
            account.save()
            return self.record
        account.save()
        fields, beside = account.charged[event_id]
        beside = gate_beside({**self.record.beside, **beside}, self.outbox.needs)
        record = Record(gate({**self.ping, **fields}), {}, beside)
        self.outbox.rewrite(self.name, record)
        return record

    def meet(self) -> None:
        """Note what a SessionLost would tell, and where the transcript is."""
        account, path = self.account, str(self.local["transcript"])
        if os.path.isfile(path) or not account.transcript:
            account.transcript = path
        account.own, account.last_at = self.record.beside.get("own", {}), self.at
        account.identity = {k: self.ping[k] for k in IDENTITY if k in self.ping}

    def tell(self) -> list[Fields]:
        """[the usage fields, what stands beside] of all that was used since the last
        charge. OSError or ValueError: the transcript cannot be read."""
        account, usage = self.account, self.reading.usage
        ends = self.event in ("SessionEnd", "SessionLost")
        complete = self.read_and_wait() and not self.damaged
        fields: Fields = {}
        costs: dict[str, float] = {}
        if ends and account.baseline and account.ledger and not self.damaged:
            fields, costs = self.settle()
        else:
            for model, counts in usage.models.items():
                account.told[model] = plus(account.told.get(model, NONE), counts)
            if not complete or self.event == "SessionLost":
                fields["usage_complete"] = False
        account.total = plus(account.total, total(usage.models))
        account.tool_calls += usage.tool_calls
        beside = {
            "messages": usage.messages(self.ping["event_id"], int(self.at * 1000)),
            "totals": {**named(account.total), "tool_calls": account.tool_calls},
            "since_end": named(less(account.total, account.at_end)),
        }
        account.at_end = account.total if ends else account.at_end
        tool_names = self.local.get("tool_names") is not False
        fields.update(usage.fields(account.model, tool_names, costs))
        self.add_turn(fields)
        return [fields, gate_beside(beside, self.outbox.needs)]

    def add_turn(self, fields: Fields) -> None:
        """Add what is known of the turn that ends; note that it does."""
        account, begun = self.account, self.stopped_at
        # Else another hook had the turn go on from there.
        if not self.ping.get("stop_hook_active"):
            begun = account.prompted_at if account.prompted_at > begun else 0.0
        if self.event == "Stop" and 0 < begun <= self.at:
            fields["duration_ms"] = round((self.at - begun) * 1000)
        if self.local.get("git") is True:
            fields["git_branch"] = account.branch
        if self.event in ("Stop", "StopFailure"):
            account.stopped_at = self.at

    def settle(self) -> tuple[Fields, dict[str, float]]:
        """Add what the client's ledger has gained since the baseline and nobody told
        (compaction and titles are calls of no row); ({cost and lines gained}, model ->
        cost). It is sums that are compared: it may name a model otherwise than rows. It
        is the baseline from now on."""
        account, usage = self.account, self.reading.usage
        models, costs, sums = account.ledger
        base, base_costs, base_sums = account.baseline
        parts = (base, account.told, dict(usage.models))
        left = less(total(models), total(*parts))
        for model, counts in models.items():
            known = total(*({model: part.get(model, NONE)} for part in parts))
            more = [min(pair) for pair in zip(less(counts, known), left)]
            left = less(left, more)
            usage.add(model, more)
        account.baseline, account.told = account.ledger, {}
        account.settled_at = account.row_at
        gained = [max(0, round(a - b, 10)) for a, b in zip(sums, base_sums)]
        costs = {k: round(c - base_costs.get(k, 0), 10) for k, c in costs.items()}
        return (
            {ours: n for (ours, _), n in zip(LEDGER_SUMS, gained)},
            {model: cost for model, cost in costs.items() if cost > 0},
        )

    def read_and_wait(self) -> bool:
        """Read until all has come, or the event is LAG_S old: the client writes a
        turn's last row, a session's ledger after it. Whether all has."""
        lag = min(LAG_S, self.at + LAG_S - time.time())
        give_up, tries = time.monotonic() + lag, 0
        while True:
            whole, tries = self.reading.read(), tries + 1
            came, now = self.has_come(), time.monotonic()
            if (whole and came) or now >= self.reading.ends:
                return whole and came
            if now >= give_up and (whole or tries >= CHARGE_TRIES):
                return False
            time.sleep(POLL_S)

    def has_come(self) -> bool:
        """Whether what the client writes at such an event is there."""
        account, name = self.account, ""
        if self.event == "SessionEnd":
            if account.parent and not account.baseline:
                self.find_baseline(*account.parent)
            return not account.baseline or bool(account.ledger)
        if self.event == "SubagentStop":
            agent, top = str(self.local.get("agent_transcript")), account.transcript
            name = os.path.relpath(agent, top[: -len(".jsonl")])
            if not os.path.isfile(agent):
                return True
        elif self.event != "Stop":
            return True
        found = account.transcripts.get(name)
        return bool(found) and found[2] > self.stopped_at  # type: ignore[index]

    def find_baseline(self, session: str, key: str) -> None:
        """Of a fork: the last ledger in its parent's file before any answer that was
        not copied, which is what the client goes on from; none there: it begins anew.
        session: the parent's; key: of the last answer that was copied."""
        account, copied = self.account, False
        found, account.parent = NO_LEDGER, []
        path = os.path.join(os.path.dirname(account.transcript), session + ".jsonl")
        try:
            for row in Transcript().rows(path, self.reading.ends):
                if isinstance(row, LedgerRow):
                    found = row.ledger
                elif isinstance(row, AnswerRow) and row.real and not row.sidechain:
                    if copied and row.key != key:
                        break
                    copied = copied or row.key == key
        except (OSError, ValueError):
            return
        if copied:
            account.baseline = found


def charge(outbox: Outbox, name: str, record: Record, ends: float) -> Record | None:
    """What the file of a ping holds, with the usage in it. Its `local` is not empty.
    ends: monotonic. None: it must wait, for the disk refuses what must be remembered.

    Where nothing can be read, nothing is charged: it is for the session's next ping.
    """
    charges = record.ping.get("event") in USAGE_EVENTS
    path = outbox.account_path(session_name(record.ping["session_id"]))
    for tries in range(CHARGE_TRIES):
        time.sleep(POLL_S if tries else 0)
        one = None
        try:
            if not charges and record.local.get("usage", True) and os.path.exists(path):
                os.utime(path)  # its session is not lost
                return record
            one = Charge(outbox, name, record, ends)
            return one.run()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            break  # there is no such transcript
        except OSError:
            continue
    if not charges or record.local.get("usage") is False:
        return record
    if one and one.saving and time.time() - PingName(name).ns / 1e9 < WAIT_MAX_S:
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
    news = account.baseline and account.ledger and account.baseline != account.ledger
    ended = account.total == account.at_end or "since_end" not in outbox.needs
    if ended and not news and not reading.usage.models:
        return
    shown, mark = dict(account.identity), [account.total, reading.usage.models, news]
    transcript_hash = path_hash(account.transcript, settings.hash_key)
    if shown.get("transcript_path_hash") != transcript_hash:
        shown.pop("cwd_hash", None)  # hashed under another key; its path is not known
    shown.update(ORIGIN, event="SessionLost", status="success")
    shown["event_id"] = sha256_hex((encode_json(mark) + path).encode())[:32]
    shown["transcript_path_hash"] = transcript_hash
    shown["timestamp"] = iso_time(int(account.last_at * 1e9))
    shown["machine"] = settings.machine
    local = {"transcript": account.transcript, "tool_names": settings.tool_names}
    record = Record(gate(shown), {**local, "git": settings.git}, {"own": account.own})
    outbox.rewrite(PingName.make(int(account.last_at * 1e9), shown), record)


# -- Delivery: one request, one verdict ------------------------------------------------

DELIVERED, NOT_NOW, RETRY, HOLD = "delivered", "not now", "retry", "hold"
REFUSED, NOTHING = "refused", "nothing"  # the latter: the tracker wants nothing of it
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

    what: for a person. status: HTTP's, 0 when none came. retry_after_s: how long the
    tracker asked us to wait. body: what a 2xx begins with, as far as it says something.
    """

    body = b""

    def __init__(
        self, verdict: str, what: str, status: int = 0, retry_after_s: float = 0
    ) -> None:
        self.verdict, self.what, self.status = verdict, what, status
        self.retry_after_s = retry_after_s


def verdict_of(status: int) -> str:
    """What becomes of a ping that was answered with this HTTP status."""
    return VERDICTS.get(status) or VERDICTS_BY_HUNDRED.get(status // 100, RETRY)


def retry_after_s(text: str | None, now: float) -> float:
    """Seconds that a Retry-After asks for (RFC 9110, 10.2.3), 0 when it is unusable."""
    text = (text or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:20]), RETRY_AFTER_MAX_S)
    if not text:
        return 0.0
    from calendar import timegm
    from email.utils import parsedate

    try:
        date = parsedate(text)
        wait = timegm(date) - now if date else 0.0
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), RETRY_AFTER_MAX_S)


def backoff_s(verdict: str, failures: int, asked_s: float = 0) -> float:
    """Seconds to wait after the n-th failure in a row: jittered, for machines must not
    come back together, and not before the server asked for."""
    from random import uniform

    power = 2.0 ** min(failures, 20)
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

    scheme, host, _ = split_url(url)
    opener = request.OpenerDirector()
    opener.addheaders = []
    opener.add_handler(request.HTTPHandler())
    if scheme == "https":
        if not hasattr(request, "HTTPSHandler"):
            raise Skipped("this Python was built without TLS")
        opener.add_handler(request.HTTPSHandler(context=verifying_context()))
    if not loopback(host):
        proxies = request.getproxies_environment()
        used = not request.proxy_bypass_environment(host, proxies)  # type: ignore[attr-defined]
        if used and proxies.get(scheme, "").startswith("socks"):
            raise Skipped("SOCKS proxies are not supported")
        opener.add_handler(request.ProxyHandler(proxies))
    return opener


def verifying_context() -> SSLContext:
    """What TLS is verified with: as Claude Code does, so with NODE_EXTRA_CA_CERTS and
    without Python 3.13's strictness. A Python that brings no certificates (python.org's
    for macOS, until its "Install Certificates.command" has run) takes the system's."""
    import ssl

    context, paths = ssl.create_default_context(), ssl.get_default_verify_paths()
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    chosen = {paths.openssl_cafile_env, paths.openssl_capath_env} & set(os.environ)
    found = paths.cafile or paths.capath or context.cert_store_stats()["x509_ca"]
    more = [os.environ.get("NODE_EXTRA_CA_CERTS", "")]
    for path in more if chosen or found else [*more, SYSTEM_CERTIFICATES]:
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

    try:
        posted = request.Request(sent.url, sent.body, sent.headers)
        response: Any = opener.open(posted, timeout=timeout_s)
        with response:
            answer = answer_of(response)
            try:
                if reads and answer.verdict == DELIVERED:
                    answer.body = response.read1(reads)
            except (OSError, HTTPException, ValueError):
                pass  # what breaks off now has been accepted
            return answer
    except URLError as error:  # urllib wraps what fails up to the end of sending
        broken = isinstance(error.reason, (ConnectionResetError, BrokenPipeError))
        return no_answer(error.reason, RETRY if broken else NOT_NOW)
    except (OSError, HTTPException, ValueError) as error:  # and nothing after that
        return no_answer(error, RETRY)


def answer_of(response: Any) -> Answer:
    """What a response says. Interim ones (102, 103) come before it: http.client skips
    100 only. Whatever asks for a wait is the tracker's own word, and no ping's fault.
    """
    while 100 <= response.status < 200 and response.status != 101:
        response.headers = None
        response.begin()  # the watchdog ends what goes on
    status, asked = response.status, response.headers.get("Retry-After")
    verdict, wait = verdict_of(status), retry_after_s(asked, time.time())
    if wait and verdict != DELIVERED:
        verdict = NOT_NOW
    return Answer(verdict, f"HTTP {status}", status, wait)


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
    if proxy.isdigit():  # a proxy's status says nothing against the ping
        passing = verdict_of(int(proxy)) in (NOT_NOW, RETRY)
        return Answer(NOT_NOW if passing else HOLD, f"proxy: HTTP {proxy}")
    return Answer(verdict, what)


# -- Sender: empties one outbox --------------------------------------------------------

BURSTS = (  # events of which another may follow within seconds
    "PreToolUse PostToolUse PostToolUseFailure PostToolBatch PermissionRequest "
    "PermissionDenied SubagentStart"
).split()


def add_line(path: str, line: str, most: int) -> None:
    """Add a line to a file, which makes way for a new one when it has `most` bytes. It
    never fails: no disk may stop delivery."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_WAIT | NO_FOLLOW
    raw = line.encode("utf-8", "replace")
    try:
        fd = os.open(path, flags, 0o600)
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, raw) < len(raw):
                os.ftruncate(fd, size)  # a full disk: the line or nothing
        finally:
            os.close(fd)
        if size + len(raw) > most:
            rename(path, path + ".1")
    except OSError:
        pass  # a FIFO, a directory, a full disk


class Courier:
    """Delivers the pings of one outbox, one at a time; the outbox's lock must be held.

    ends: monotonic: no request begins after it. once: somebody waits: a request has
    ONCE_LAST_S beyond the end. tell: for a person. overstays: called with the name of a
    ping, and an answer, before its request is ended with the process (its exit status:
    `status`). by_session: a session's name -> names of its pings, not charged yet.
    """

    def __init__(
        self, outbox: Outbox, tracker: Tracker, settings: Settings, tell: Tell = silent
    ) -> None:
        self.outbox, self.tracker, self.settings = outbox, tracker, settings
        self.tell = tell
        self.ends = self.deadline = float("inf")  # the latter: of what is sent now
        self.once, self.status, self.sending = False, 0, ""
        self.opener: OpenerDirector | None = None
        self.by_session: dict[str, list[str]] = {}
        self.overstays: Callable[[str, Answer], object] = print

    def is_over(self) -> bool:
        """Whether no request may begin any more."""
        return time.monotonic() >= self.ends

    def log(self, text: str) -> None:
        """Add a line to sender.log: no payload, no URL, no token."""
        line = f"{iso_time(time.time_ns())} {os.getpid()} {text}\n"
        add_line(self.outbox.path("sender.log"), line, LOG_MAX_BYTES)

    def keep(self, ping: Fields, requests: list[Request], answer: Answer) -> None:
        """Add a delivered ping to sent.jsonl, for its user to look up what left; with
        its bodies, where those are not the ping itself."""
        found: Fields = {"at": iso_time(time.time_ns()), "answer": answer.what}
        bodies = [(request.body or b"").decode() for request in requests]
        text = encode_json(ping)
        if bodies != [text]:
            found["bodies"] = bodies
        line = f'{encode_json(found)[:-1]},"ping":{text}}}\n'
        add_line(self.outbox.path("sent.jsonl"), line, SENT_MAX_BYTES)

    def deliver(self, name: str) -> Answer | None:
        """Send a ping; None when there is nothing to send under `name`, or no time.
        ValueError: it is no ping."""
        record = self.charged(name)
        if record is None:
            return None
        requests = self.tracker.requests(record.ping, record.beside)
        answer = None if requests else Answer(NOTHING, "nothing to send")
        for request in requests[record.accepted :]:
            if answer and self.is_over():
                return None
            answer = self.send(name, record.ping, request)
            if answer.verdict != DELIVERED:
                return answer
            record.accepted += 1
            if record.accepted < len(requests):
                self.outbox.rewrite(name, record)  # whoever comes next goes on there
        if answer and requests:
            # Before its file goes: after a crash it may stand there twice, but never
            # not at all.
            self.keep(record.ping, requests, answer)
        remove(self.outbox.file(name))  # only now
        return answer

    def send(self, name: str, ping: Fields, request: Request) -> Answer:
        """Send one request of a ping; it has a deadline of its own."""
        timeout_s, begun = self.settings.timeout_s, time.monotonic()
        limit = DEADLINE * timeout_s
        if self.once:
            limit = max(0.1, min(limit, self.ends + ONCE_LAST_S - begun))
        if not self.opener:
            import _thread

            try:
                self.opener = make_opener(self.tracker.url)
            except (Skipped, ImportError) as why:  # some ship a part of the library
                return Answer(HOLD, str(why))
            _thread.start_new_thread(self.watch, ())
        self.sending, self.deadline = name, begun + limit
        answer = post(self.opener, request, min(timeout_s, limit), self.tracker.reads)
        self.deadline = float("inf")
        if answer.verdict == DELIVERED and self.tracker.refuses(answer.body):
            answer = Answer(REFUSED, f"{answer.what}, rejected", answer.status)
        took_ms = (time.monotonic() - begun) * 1000
        self.tell(
            f"{ping.get('event')} {ping['event_id']} to {origin(self.tracker.url)}: "
            f"{answer.what} in {took_ms:.0f} ms, {answer.verdict}"
        )
        return answer

    def watch(self) -> None:
        """The watchdog, a thread. When a request overstays (a hung resolver, a dripping
        response), have that noted and end the process: nothing else ends it."""
        while time.monotonic() < self.deadline:
            time.sleep(LOOK_S / 2)
        try:
            self.overstays(self.sending, Answer(RETRY, "no whole answer in time"))
            self.tell("no whole answer in time; the ping waits")
        finally:
            os._exit(self.status)

    def charged(self, name: str) -> Record | None:
        """The ping to send, its usage charged, and before it that of its session's
        older ones, so that the tokens are each turn's own; None when there is none
        under `name`, or it must wait."""
        try:
            record = self.outbox.record(name)
            session = self.by_session[PingName(name).session] if record.local else []
            while session and session[0] < name:
                if self.is_over():
                    return None
                older = session.pop(0)
                try:
                    self.charge(older, self.outbox.record(older))
                except (OSError, ValueError):
                    continue
            return self.charge(name, record)
        except OSError:  # gone, or an I/O error: perhaps another time
            return None

    def charge(self, name: str, record: Record) -> Record | None:
        """The ping with its usage in it; whatever a transcript holds, the ping goes."""
        try:
            if record.local:
                return charge(self.outbox, name, record, self.ends)
        except Exception as error:  # noqa: BLE001
            self.log(f"usage left out: {type(error).__name__}")
        return record


class Pass:
    """One walk along an outbox: pings that have never failed, oldest first; then those
    that failed and were not judged; then those that were charged.

    A failure may be the ping's fault or the tracker's: another ping that is delivered
    tells. So failures are noted, and a delivery judges them: what was refused is set
    aside, what else failed is charged. When only failures come, of different events,
    the pass ends with a back-off, and nobody is to blame. So no ping stands in the way
    of the others, and no bad day of the tracker empties an outbox.

    names: what waits, oldest first. noted: name -> its answer, since the last delivery.
    last_event: of the last ping delivered.
    """

    def __init__(self, sender: Sender) -> None:
        self.sender, self.outbox, self.state = sender, sender.outbox, sender.state
        self.names = self.outbox.waiting()
        self.noted: dict[str, Answer] = {}
        self.tried = self.delivered = 0
        self.last_event = self.last_answer = ""
        self.done: set[str] = set()

    # What waits

    def tidy(self) -> None:
        """Make way: what is no ping is set aside; of more than OUTBOX_MAX_PINGS the
        oldest without usage are lost, then the oldest; suspects that wait no more are
        forgotten, and those least charged, for in an outage everything looks suspect.
        """
        for name in os.listdir(self.outbox.path("outbox")):
            if not PingName.is_one(name) and not name.startswith("."):
                self.set_aside(name, "no ping")
            elif name.startswith(".") and age_s(self.outbox.file(name)) > UNFINISHED_S:
                remove(self.outbox.file(name))
        names, usage = self.names, USAGE_EVENTS
        names.sort(key=lambda name: (PingName(name).event in usage, name))
        lost = names[: max(0, len(names) - OUTBOX_MAX_PINGS)]
        for name in lost:
            self.count_loss(name, "outbox full")
        if lost:
            self.state.save()  # before they go: we may be killed meanwhile
        for name in lost:
            remove(self.outbox.file(name))
        self.names = sorted(names[len(lost) :])
        suspects = self.state.suspects
        kept = sorted(suspects, key=lambda name: -suspects[name].charges)[:SUSPECTS_MAX]
        for name in set(suspects).difference(set(kept).intersection(self.names)):
            del suspects[name]

    def count_loss(self, name: str, reason: str) -> None:
        """Count a ping that will not be delivered, and the tokens charged to it."""
        self.state.lost(reason)
        try:
            ping = self.outbox.record(name).ping
            self.state.lost("tokens", int(ping["total_tokens"]))
        except (OSError, ValueError, KeyError):
            pass

    def set_aside(self, name: str, reason: str) -> None:
        """Move what can never be delivered out of the others' way."""
        self.count_loss(name, reason)
        self.state.suspects.pop(name, None)
        self.state.save()
        self.outbox.set_aside(name)

    def order(self) -> Iterator[str]:
        """The names, in the order in which they are tried. The last failure that is
        borne is one of another event, the newest: a witness that is like the others
        would say little."""
        suspects, now = self.state.suspects, time.time()
        fresh = [name for name in self.names if name not in suspects]
        for name in fresh:
            if len(self.noted) == self.borne() - 1:
                failed = PingName(next(iter(self.noted))).event
                for other in reversed(fresh):
                    if other not in self.done and PingName(other).event != failed:
                        yield other
                        break
            yield name
        known = list(suspects.items())
        yield from [name for name, suspect in known if not suspect.charges]
        for name, suspect in known:
            paused = 0 <= now - suspect.tried_at < SUSPECT_PAUSE_S
            if suspect.charges and not paused:
                yield name

    # Whose fault

    def borne(self) -> int:
        """How many failures in a row end the pass."""
        refused = all(answer.verdict == REFUSED for answer in self.noted.values())
        return REFUSALS_BORNE if self.delivered and refused else FAILURES_BORNE

    def go(self) -> None:
        """Walk to the end, or until an answer says that now is no time."""
        self.tidy()
        by_session = self.sender.courier.by_session = {}
        for name in self.names:
            by_session.setdefault(PingName(name).session, []).append(name)
        goes_on = True
        for name in self.order():
            if self.sender.courier.is_over() or not goes_on:
                break
            if name not in self.done:
                goes_on = self.attempt(name)
        if goes_on and self.noted and not self.delivered:
            self.sender.fail(self.noted.popitem()[1])
        if self.tried:
            self.state.save()
            self.sender.courier.log(
                f"delivered {self.delivered} of {len(self.names)}, "
                f"last answer: {self.last_answer}"
            )

    def attempt(self, name: str) -> bool:
        """Try one ping; False when the pass is over."""
        self.done.add(name)
        try:
            answer = self.sender.courier.deliver(name)
        except ValueError:
            self.set_aside(name, "no ping")
            return True
        if answer is None or answer.verdict == NOTHING:
            return True
        self.tried += 1
        self.last_answer = answer.what
        return self.weigh(name, answer)

    def weigh(self, name: str, answer: Answer) -> bool:
        """Find out whose fault an answer is; False when the pass is over."""
        state, suspect = self.state, self.state.suspects.get(name)
        if answer.verdict == DELIVERED:
            self.delivered += 1
            self.last_event = PingName(name).event
            state.suspects.pop(name, None)
            state.failures, state.not_before, state.delivered_at = 0, 0, time.time()
            for failed, its_answer in self.noted.items():
                self.judge(failed, its_answer)
            self.noted = {}
        elif answer.verdict == NOT_NOW:
            if answer.status >= 500:
                state.suspect(name)  # others go first, next time
            self.sender.fail(answer)
            return False
        elif suspect and (suspect.charges or self.delivered):
            suspect.tried_at = time.time()
            if self.delivered:  # the tracker is well
                self.judge(name, answer)
        else:
            self.noted[name] = answer
            state.suspect(name)
            if len(self.noted) >= self.borne():
                self.sender.fail(answer)
                return False
        return True

    def judge(self, name: str, answer: Answer) -> None:
        """The tracker is well: refuse the ping for good, or charge it."""
        if answer.verdict == REFUSED:
            self.set_aside(name, f"refused: {answer.what}")
            return
        suspect, now = self.state.suspect(name), time.time()
        suspect.charges, suspect.tried_at = suspect.charges + 1, now
        old = now - PingName(name).ns / 1e9 > POISON_AGE_S
        if suspect.charges >= POISON_CHARGES and old:
            self.set_aside(name, "always fails")


class Sender:
    """A sender's life, from pass to pass.

    ends: monotonic. once: somebody waits: no back-off is waited for. status: the exit
    status when a request that overstays ends the process. known: names of pings that
    are no news.
    """

    def __init__(
        self,
        outbox: Outbox,
        tracker: Tracker,
        settings: Settings,
        ends: float,
        tell: Tell = silent,
        once: bool = False,
        status: int = 0,
    ) -> None:
        self.outbox, self.settings, self.ends = outbox, settings, ends
        self.state, self.once = outbox.state(), once
        self.known: set[str] = set()
        self.courier = Courier(outbox, tracker, settings, tell)
        self.courier.ends, self.courier.once = ends, once
        self.courier.status, self.courier.overstays = status, self.cut_off
        self.on_pass = Pass(self)

    def is_over(self) -> bool:
        """Whether this life is."""
        return self.courier.is_over()

    def is_gone(self) -> bool:
        """Whether the outbox was removed: by uninstall, most likely."""
        return not os.path.isdir(self.outbox.path("outbox"))

    def news(self) -> bool:
        """Whether a ping waits that has come since the last pass began."""
        return not self.known.issuperset(self.outbox.waiting())

    def backoff_left_s(self) -> float:
        """Seconds until the back-off ends, 0 when none stands."""
        self.state = self.outbox.state()
        return self.state.backoff_left_s(time.time())

    def fail(self, answer: Answer) -> None:
        """Count a pass that failed, and start a back-off. The row of failures begins
        anew when it is a person's turn to mend something, or no more."""
        now, state = time.time(), self.state
        mended = (answer.verdict in HOLDS) != (state.verdict in HOLDS)
        state.failures = 1 if mended else min(state.failures + 1, FAILURES_MAX)
        wait = backoff_s(answer.verdict, int(state.failures), answer.retry_after_s)
        state.set_at, state.not_before = now, now + wait
        state.verdict, state.problem = answer.verdict, answer.what
        state.problem_at = now
        state.save()
        self.courier.log(f"{answer.verdict}: {answer.what}, next try in {wait:.0f} s")

    def cut_off(self, name: str, answer: Answer) -> None:
        """The request of that ping overstayed, and ends the process."""
        if self.on_pass.weigh(name, answer) and name in self.on_pass.noted:
            self.fail(answer)
        self.state.save()

    def one_pass(self) -> None:
        """Try all that waits and is due, until an answer says that now is no time."""
        self.state = self.outbox.state()
        self.on_pass = Pass(self)
        self.on_pass.go()
        # What there was no time for is news, to the next sender.
        self.known.update(self.on_pass.done if self.is_over() else self.on_pass.names)

    def linger(self) -> None:
        """After a tool's event stay a while with the lock in hand, for the next one:
        the hooks meanwhile start no process. Ends when there is news or no use."""
        until = min(time.monotonic() + LINGER_S, self.ends)
        if self.on_pass.last_event in BURSTS and not self.once:
            while time.monotonic() < until and not self.is_gone() and not self.news():
                time.sleep(LOOK_S)

    def work(self) -> None:
        """Passes, one for each burst of pings, while no back-off stands; then the daily
        sweep, which may find some more."""
        again = True
        while again:
            self.one_pass()
            if self.is_over() or self.state.backoff_left_s(time.time()):
                return
            self.linger()
            if not self.news():
                self.sweep()
            again = self.news()

    def live(self, lock: Lock | None) -> None:
        """Pass after pass, to the end of this life. After each the lock is given back,
        and then the outbox listed once more: a hook that found the lock busy counts on
        that. When this life is over then, news begin a new one."""
        while lock is not None:
            self.work()
            lock.release()
            wait = self.backoff_left_s()
            if wait and (self.once or time.monotonic() + wait >= self.ends):
                return
            if not wait and not self.news():
                return
            time.sleep(wait)
            lock = None if self.is_gone() else self.outbox.take_lock()
            if lock and not wait and self.is_over():
                start_sender({self.outbox.name(): lock}, self.settings.environ)
                return

    def sweep(self) -> None:
        """Once a day: tell of sessions that were lost, forget the oldest accounts."""
        now, accounts = time.time(), self.outbox.path("accounts")
        if 0 <= now - self.state.swept_at < DAY_S or not os.path.isdir(accounts):
            return
        names = [name for name in os.listdir(accounts) if not name.startswith(".")]
        paths = sorted([os.path.join(accounts, name) for name in names], key=age_s)
        for path in paths[ACCOUNTS_MAX:]:
            remove(path)
        for path in paths[:ACCOUNTS_MAX]:
            if self.is_over():
                return
            if self.settings.usage and age_s(path) > DAY_S:
                try:
                    report_lost(self.outbox, path, self.settings, self.ends)
                except Exception as error:  # noqa: BLE001 - it must not hide others
                    self.courier.log(f"lost session: {type(error).__name__}")
        self.state.swept_at = now
        self.state.save()


def send(settings: Settings, tell: Tell) -> None:
    """Deliver as the command line says: HOW FD DESTINATION, with other destinations
    that are to have a sender behind it. HOW: see start_sender. DESTINATION: the name of
    its directory; FD: its lock, -1 when none was handed on."""
    gc.enable()
    if hasattr(gc, "set_threshold"):  # PyPy has none
        gc.set_threshold(10_000)  # importing urllib would set off a hundred collections
    how, fd, name, *others = sys.argv[3:]
    once, life_s = how != "detached", LIFE_S if how == "detached" else ONCE_S
    ends = time.monotonic() + life_s
    for other_fd, other in zip(others[::2], others[1::2]):
        try:
            start_sender({other: Lock(int(other_fd))}, settings.environ)
        except OSError:
            continue  # the next hook tries it again
    trackers, problems = find_trackers(settings, read_secret)
    found = [tracker for tracker in trackers if tracker.directory_name() == name]
    if not found:
        raise Skipped("; ".join(problems) or "it is no destination any more")
    outbox = outbox_of(settings, found[0])
    outbox.need_sound()
    lock = Lock(int(fd)) if int(fd) >= 0 else outbox.take_lock()
    sender = Sender(outbox, found[0], settings, ends, tell, once)
    if how == "debug" and sender.backoff_left_s():
        why = sender.state.problem or "after an outage"
        tell(f"a back-off lasts {sender.backoff_left_s():.0f} s more ({why})")
    if not once and os.name == "posix":
        os.nice(5)  # the session's own work comes first
    try:
        sender.live(lock)
    except Exception as error:  # noqa: BLE001 - or each hook would start one in vain
        if not sender.is_gone():
            sender.state.suspect(sender.courier.sending)
            sender.fail(Answer(RETRY, f"internal error: {type(error).__name__}"))


def sender() -> NoReturn:
    """What a hook starts."""
    run_for_claude_code(send)


# ======================================================================================
# All below is run by a person: the commands.
# ======================================================================================


def outboxes(state_dir: str | None) -> list[Outbox]:
    """Every destination's outbox that there is, also of URLs no longer configured."""
    top = state_dir or ""
    names = sorted(os.listdir(top)) if os.path.isdir(top) else []
    found = [Outbox(os.path.join(top, name)) for name in names if "-" in name]
    return [outbox for outbox in found if os.path.isdir(outbox.path("outbox"))]


USAGE_FIELDS = (  # what a ping is charged
    *TOKENS,
    *("models", "tools", "tool_calls", "tool_failures", "interrupts"),
    *("cost_usd", "lines_added", "lines_removed"),
)


def adopt(former: Outbox, present: Outbox, name: str) -> None:
    """Move a ping that waits for a former URL of a tracker to the present one's. Both
    locks are held. What it was charged there must not be told here twice: either the
    session's account here begins behind it, or, when that has counted already, the ping
    goes without. OSError or ValueError: it cannot be moved."""
    record = Outbox(former.directory, present.needs).record(name)
    path, at = present.account_path(PingName(name).session), PingName(name).ns / 1e9
    if not record.local and record.ping.get("total_tokens"):
        try:
            account = Account.load(path)
        except FileNotFoundError:
            account = Account(path)
        if not account.transcripts:
            account.since = max(account.since, at)
            account.save()
        elif account.since < at:
            ping = {k: v for k, v in record.ping.items() if k not in USAGE_FIELDS}
            record = Record({**ping, "usage_complete": False}, {}, {})
    present.rewrite(name, record)
    remove(former.file(name))


# -- Commands: talking with a person ---------------------------------------------------

URL_NAME = "TELEMHQ_PING_URL"
MARKS = {True: ("✓", "ok"), False: ("✗", "!!"), None: ("·", "--")}  # fancy, ASCII


def at_a_terminal() -> bool:
    """Whether a person can be asked."""
    return bool(sys.stdin) and sys.stdin.isatty() and sys.stdout.isatty()


def ask(question: str) -> bool:
    """Whether a person says yes; no answer is a no."""
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        print()
        return False
    return answer.strip().lower() in ("y", "yes")


def counted(count: int, noun: str) -> str:
    """`no pings`, `1 ping`, `2 pings`."""
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def printable(text: str, plain: str) -> str:
    """`text`, or `plain` where the terminal's encoding knows no such characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return plain
    return text


def mark(good: bool | None) -> str:
    """The mark of a line: good, bad, or None for what is only told."""
    fancy, plain = MARKS[good]
    return fancy if printable("✓✗·", "") else plain


# -- Commands: the settings files of Claude Code ---------------------------------------

IMPORT = "import telemhq_ping as t; t.hook()"  # a module's bytecode is cached
IGNORE_TERM = "trap '' TERM; "  # a failing `claude -p` sends one before Python is up
HOOK_TIMEOUT_S = 10  # Claude Code's; without it a SessionEnd hook has 1.5 s
FILE_MAX_BYTES = 16 << 20  # settings and scripts are smaller
EVENTS = ("Stop", "StopFailure", "SessionEnd")  # what install registers
TOOL_EVENTS = ("PostToolUse", "PostToolUseFailure")  # --tools: both for the same tools
TOOLS = "Bash|Edit|MultiEdit|Write"  # those that change something, as TelemHQ's docs
MANAGED_SETTINGS = {  # a company's, by sys.platform; Linux is the default
    "": ("/etc/claude-code/managed-settings.json",),
    "darwin": ("/Library/Application Support/ClaudeCode/managed-settings.json",),
    "win32": (
        "C:\\Program Files\\ClaudeCode\\managed-settings.json",
        "C:\\ProgramData\\ClaudeCode\\managed-settings.json",  # older clients'
    ),
}


def config_dir() -> str:
    """Claude Code's own directory; Skipped when nothing tells where home is."""
    found = absolute(os.environ.get("CLAUDE_CONFIG_DIR") or "~/.claude")
    if found is None:
        raise Skipped("there is no home directory; set CLAUDE_CONFIG_DIR")
    return found


def this_script() -> str:
    """Path of this very file."""
    return os.path.realpath(__file__)


def hooks_dir() -> str:
    """Where install puts the script."""
    return os.path.join(config_dir(), "hooks")


def installed_script() -> str:
    """Path of the script as install puts it there."""
    return os.path.join(hooks_dir(), SCRIPT)


def settings_path(project: str | None) -> str:
    """The settings file of the user, or of a project (a directory; OSError: none)."""
    if not project:
        return os.path.join(config_dir(), "settings.json")
    os.listdir(project)
    return os.path.join(os.path.abspath(project), ".claude", "settings.local.json")


def project_settings(project: str) -> list[str]:
    """The settings files that a project may have."""
    names = ("settings.json", "settings.local.json")
    return [os.path.join(project, ".claude", name) for name in names]


def shell_words(command: str) -> list[str]:
    """The words and operators of a shell command; [] when they cannot be told apart."""
    import shlex

    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        return [] if "\n" in command else list(lexer)
    except ValueError:  # a quote without its end
        return []


def runs_script_only(words: list[str]) -> bool:
    """Whether words are [PYTHON [-OPTION ...]] SCRIPT, and nothing else."""
    paths = [word.replace("\\", "/") for word in words if not word.startswith("-")]
    if not paths or paths[-1].split("/")[-1] != SCRIPT or words[-1].startswith("-"):
        return False
    if any(sign in word for word in words for sign in ("=", "`")):
        return False
    if len(paths) == 1:
        return len(words) == 1
    python = paths[0].split("/")[-1]
    return len(paths) == 2 and not words[0].startswith("-") and python.startswith("py")


def imports_script_only(words: list[str]) -> bool:
    """Whether words are cd DIRECTORY && PYTHON -ESc IMPORT [|| PYTHON SCRIPT]."""
    begins = words[:1] == ["cd"] and words[2:3] == ["&&"] and len(words) >= 6
    if not begins or words[4:6] != ["-ESc", IMPORT]:
        return False
    rest = words[6:]
    return not rest or (rest[0] == "||" and runs_script_only(rest[1:]))


def names_script(command: str) -> bool:
    """Whether a hook's command runs this script, as a file or by import. (Without re:
    the hook of a plugin asks this, too.)"""

    def in_a_word(neighbour: str) -> bool:
        return neighbour.isalnum() or neighbour in ("_", "-", ".")

    for spelled in (SCRIPT, "import telemhq_ping"):
        before, found, after = command.partition(spelled)
        while found:
            if not in_a_word(before[-1:]) and not in_a_word(after[:1]):
                return True
            before, found, after = after.partition(spelled)
    return False


class RegisteredHook:
    """One hook in settings. event: its name. group: the dict that holds it. entry:
    itself, a dict."""

    def __init__(self, event: str, group: Fields, entry: Fields) -> None:
        self.event, self.group, self.entry = event, group, entry
        command = entry.get("command")
        self.command = command if isinstance(command, str) else ""

    def names_script(self) -> bool:
        """Whether its command runs the script, in whatever way."""
        return names_script(self.command)

    def is_ours(self) -> bool:
        """Whether its command does nothing but run the script: in TelemHQ's form, or in
        one that an install has written. Only such commands are ever changed."""
        words = shell_words(self.command)
        if words[:4] == ["trap", "", "TERM", ";"]:
            words = words[4:]
        if words[-2:] == ["||", "true"]:
            words = words[:-2]
        return runs_script_only(words) or imports_script_only(words)

    def meets(self, other: RegisteredHook) -> bool:
        """Whether both run for some event of the same name."""
        matchers = [hook.group.get("matcher") or "*" for hook in (self, other)]
        same = "*" in matchers or matchers[0] == matchers[1]
        return self.event == other.event and same


def hooks_of(content: Fields) -> list[RegisteredHook]:
    """The hooks in settings (dict), in their order."""
    return [
        RegisteredHook(event, group, entry)
        for event, groups in content.get("hooks", {}).items()
        for group in groups
        for entry in group["hooks"]
    ]


def need_form(content: object) -> None:
    """Raise ValueError when settings are not of the form that Claude Code documents."""
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    hooks = content.get("hooks", {})
    if not isinstance(content.get("env", {}), dict) or not isinstance(hooks, dict):
        raise ValueError('"env" and "hooks" must be objects')
    for event, groups in hooks.items():
        if not isinstance(groups, list):
            raise ValueError(f'"{event}" in "hooks" must be a list')
        for group in groups:
            entries = group.get("hooks") if isinstance(group, dict) else None
            if not isinstance(entries, list):
                raise ValueError(f'"{event}" has an entry without a list of "hooks"')
            if not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f'"{event}" has a hook that is no object')


class SettingsFile:
    """A settings file of Claude Code's.

    path: as it is named. real: what that is a link to, for dotfiles are often links.
    raw: its bytes, None when there is no file. content: the JSON object in it.
    problem: why it is no settings file, or "". twice: keys that stand there twice.
    """

    def __init__(self, path: str) -> None:
        self.path, self.real = path, os.path.realpath(path)
        self.raw: bytes | None = None
        self.content: Fields = {}
        self.problem = ""
        self.twice: list[str] = []
        try:
            self.raw = read_file(self.real, FILE_MAX_BYTES)
            self.content = self.decode(self.raw)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.problem = error.strerror or "it cannot be read"
        except (ValueError, RecursionError) as error:
            self.problem = str(error)

    def decode(self, raw: bytes) -> Fields:
        """The settings in a file's bytes; ValueError says why there are none. As strict
        as Claude Code: it ignores the whole of a file with a comment in it."""
        import json

        def no_constant(name: str) -> None:
            raise ValueError(f"{name} is no JSON")

        def pairs(found: list[tuple[str, Any]]) -> Fields:
            names = [name for name, _ in found]
            self.twice += [name for name in dict(found) if names.count(name) > 1]
            return dict(found)

        text = raw.decode("utf-8-sig")
        if not text.strip():
            return {}
        content: Fields = json.loads(
            text, object_pairs_hook=pairs, parse_constant=no_constant
        )
        need_form(content)
        return content

    def encode(self, content: Fields) -> bytes:
        """`content` as the file would hold it, in its own indent and line ends."""
        import json
        import re

        raw = self.raw or b""
        indents = re.findall(rb"\n([ \t]+)\"", raw)
        indent = indents[0].decode() if indents else "  "
        text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
        if b"\r\n" in raw:
            text = text.replace("\n", "\r\n")
        return text.encode("utf-8", "backslashreplace")  # half of a character: "\ud83d"

    def hooks(self) -> list[RegisteredHook]:
        """The hooks in it."""
        return hooks_of(self.content)

    def env(self) -> Fields:
        """Its env block."""
        env: Fields = self.content.get("env", {})
        return env

    def events(self) -> list[str]:
        """The events for which anything is registered in it."""
        return [hook.event for hook in self.hooks()]

    def names_script(self) -> bool:
        """Whether any hook in it runs the script."""
        return any(hook.names_script() for hook in self.hooks())

    def need_editable(self) -> None:
        """Raise Skipped when the file cannot be changed without harm."""
        if self.problem:
            left = f"{self.path} is left as it is, for it is no settings file"
            raise Skipped(f"{left}: {self.problem}")
        if self.twice:
            again = f'"{self.twice[0]}" stands there twice; take one of them out'
            raise Skipped(f"{self.path} is left as it is: {again}")
        if self.raw is not None and not os.stat(self.real).st_mode & stat.S_IWUSR:
            raise Skipped(f"{self.path} is left as it is: it is read-only")

    def write(self, raw: bytes) -> None:
        """Make the file hold these bytes; its mode stays."""
        mode = 0o600
        if self.raw is not None:
            mode = stat.S_IMODE(os.stat(self.real).st_mode)
        write_file(self.real, raw, make_directory=True)
        os.chmod(self.real, mode)


def has_plugin(content: Fields) -> bool:
    """Whether settings (dict) enable this script as a plugin."""
    plugins = content.get("enabledPlugins")
    if not isinstance(plugins, dict):
        return False
    return any(on and name.startswith("telemhq-ping@") for name, on in plugins.items())


class Surroundings:
    """What a hook finds that Claude Code runs here.

    files: the settings files, in the order in which each goes before those above it.
    settings: from the environment and the files' env blocks. sources: of each variable
    the path of the file that sets it; where there is none, it is the shell.
    """

    def __init__(self) -> None:
        paths = [
            settings_path(None),
            *project_settings(os.getcwd()),
            *MANAGED_SETTINGS.get(sys.platform, MANAGED_SETTINGS[""]),
        ]
        self.files = [SettingsFile(path) for path in dict.fromkeys(paths)]
        self.sources: dict[str, str] = {}
        environ = dict(os.environ)
        for file in self.files:
            for name, value in file.env().items():
                environ[name] = str(value)
                self.sources[name] = file.path
        self.settings = Settings(environ)

    def plugin_in(self) -> str:
        """The settings file that enables this script as a plugin, or ""."""
        for file in self.files:
            if has_plugin(file.content):
                return file.path
        return ""

    def theirs(self) -> list[SettingsFile]:
        """The files whose commands are their owner's: the user's and the managed ones.
        A project's may be a stranger's shell code."""
        project = project_settings(os.getcwd())
        return [file for file in self.files if file.path not in project]


def is_plugin_alone(around: Surroundings) -> bool:
    """Whether only the plugin, and so the client, knows where TelemHQ's pings go."""
    settings = around.settings
    wanted = TelemHQ.kind in settings.destinations and not settings.url
    return wanted and bool(around.plugin_in())


# -- Commands: flush -------------------------------------------------------------------


class Teller:
    """Prints what a sender tells, and counts what was delivered."""

    delivered = 0

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        if text.endswith(DELIVERED):
            self.delivered += 1


def wait_for_lock(outbox: Outbox, ends: float) -> Lock:
    """The outbox's lock; Skipped when a sender still has it at `ends` (monotonic)."""
    lock = outbox.take_lock()
    while lock is None:
        if time.monotonic() >= ends:
            raise Skipped("a sender is at work and has the pings; see sender.log")
        time.sleep(LOOK_S)
        lock = outbox.take_lock()
    return lock


def flush_outbox(outbox: Outbox, tracker: Tracker, settings: Settings) -> int:
    """Deliver what waits, in spite of a back-off; how many pings that were."""
    tell, ends = Teller(), time.monotonic() + LIFE_S
    lock = wait_for_lock(outbox, ends)
    sender = Sender(outbox, tracker, settings, ends, tell, status=1)
    while True:
        empty(outbox, sender)
        lock.release()
        # A hook that found the lock busy counts on this look.
        if sender.backoff_left_s() or sender.is_over() or not sender.news():
            return tell.delivered
        lock = wait_for_lock(outbox, ends)


def empty(outbox: Outbox, sender: Sender) -> None:
    """Pass after pass, as long as each delivers something and no back-off stands."""
    left, before = len(outbox.waiting()), 0
    while left and left != before:
        sender.one_pass()
        left, before = len(outbox.waiting()), left
        if sender.state.backoff_left_s(time.time()):
            return


def flush(options: Namespace) -> int:
    """deliver what waits now, in spite of a back-off"""
    around = Surroundings()
    settings = around.settings
    if is_plugin_alone(around) and not find_trackers(settings, read_secret)[0]:
        how = f"run `{URL_NAME}=... {SCRIPT} flush`, or start a session"
        raise Skipped(f"the plugin's URL is known to Claude Code only; {how}")
    delivered = left = 0
    for tracker in destinations(settings, print):
        outbox = outbox_of(settings, tracker)
        outbox.need_sound()
        if options.adopt:
            adopt_all(settings, outbox)
        if outbox.waiting():
            delivered += flush_outbox(outbox, tracker, settings)
        left += len(outbox.waiting())
    print(f"{delivered} delivered, {left} left.")
    return 1 if left else 0


def adopt_all(settings: Settings, present: Outbox) -> None:
    """Move what waits for former URLs of a tracker to the present one's."""
    kind = present.kind()
    os.makedirs(present.path("outbox"), 0o700, exist_ok=True)
    held = wait_for_lock(present, time.monotonic() + LIFE_S)
    try:
        for former in outboxes(settings.state_dir):
            if former.directory != present.directory and former.kind() == kind:
                former.need_sound()
                lock = former.take_lock()
                if lock is None:
                    raise Skipped(f"a sender is at work in {former.directory}")
                for name in former.waiting():
                    adopt(former, present, name)
                lock.release()
    finally:
        held.release()


# -- Commands: what install changes, shown and remembered ------------------------------


class Mask:
    """Hides secrets in text that a person reads, alike ones alike, so that a change of
    one shows: `<hidden 1>`."""

    SHOWN = ("TELEMHQ_PROJECT", "TELEMHQ_MACHINE", "TELEMHQ_STATE_DIR")

    def __init__(self, *contents: Fields) -> None:
        """contents: settings (dicts), whose env blocks may hold secrets."""
        self.numbers: dict[str, int] = {}
        self.names = {name for content in contents for name in content.get("env", {})}
        self.names.difference_update(self.SHOWN)

    def hidden(self, secret: str) -> str:
        """What is shown instead of a secret."""
        number = self.numbers.setdefault(secret, len(self.numbers) + 1)
        return f"<hidden {number}>"

    def url(self, url: str) -> str:
        """A URL without what may be secret: scheme and host stay."""
        import re

        match = re.match(r"\w+://[\w.:\[\]-]+(?=[/?#]|$)", url)
        shown = match.group() if match else ""
        rest = url[len(shown) :]
        return shown + ("/" + self.hidden(rest) if len(rest) > 1 else rest)

    def value(self, text: str) -> str:
        """A text of the settings, say a command: without URLs and set variables."""
        import re

        def url(match: re.Match[str]) -> str:
            return self.url(match.group())

        def assignment(match: re.Match[str]) -> str:
            return match.group(1) + self.hidden(match.group(2))

        secret = r"(\b[A-Z_]*(?:URL|KEY|TOKEN|SECRET|PASSWORD)=['\"]?)"
        text = re.sub(r"\w+://[^\s'\"]+", url, text)
        return re.sub(secret + r"(?!\w+://)([^\s'\";]+)", assignment, text)

    def text(self, raw: bytes) -> str:
        """The bytes of a settings file, for a person."""
        import json
        import re

        key = ""

        def shown(match: re.Match[str]) -> str:
            nonlocal key
            try:
                said = str(json.loads(match.group(1)))
            except ValueError:
                return '"..."'
            if match.group(2):  # a colon: it is a key
                key = said
                return match.group()
            masked = self.value(said)
            if masked == said and key in self.names:
                masked = self.hidden(said)
            key = ""
            return match.group() if masked == said else json.dumps(masked)

        text = raw.decode("utf-8", "replace")
        return re.sub(r'("(?:[^"\\]|\\.)*")(\s*:)?', shown, text)


def print_diff(path: str, before: bytes, after: bytes, mask: Mask) -> None:
    """Print how the bytes of a settings file will change, secrets masked."""
    import difflib

    old, new = (mask.text(raw).splitlines() for raw in (before, after))
    for line in difflib.unified_diff(old, new, path, path, lineterm=""):
        print(line)


def remove_if_empty(directory: str) -> None:
    """Remove a directory with nothing in it; any other stays."""
    try:
        os.rmdir(directory)
    except OSError:
        pass


class InstallRecord:
    """What install did, so that uninstall undoes that and no more: installed.json.

    script: SHA-256 of the script as it was put there, or "". kept: where the script is
    that stood there before, or "". made: directories that were made. settings: of each
    settings file (its real path) {"made": bool, "written": SHA-256 of what install made
    of it, "backups": {path: SHA-256}, the oldest first}.
    """

    def __init__(self) -> None:
        self.path = os.path.join(config_dir(), "telemhq", "installed.json")
        problem = unsound(os.path.dirname(self.path))
        if problem:  # somebody else could tell uninstall what to delete
            raise Skipped(f"{os.path.dirname(self.path)} {problem}; mend or remove it")
        try:
            found = read_object(self.path, FILE_MAX_BYTES)
        except (OSError, ValueError):
            found = {}
        self.script = str(found.get("script", ""))
        self.kept = str(found.get("kept", ""))
        made, settings = found.get("made"), found.get("settings")
        self.made = list(map(str, made)) if isinstance(made, list) else []
        self.settings: dict[str, Fields] = {}
        for name, entry in settings.items() if isinstance(settings, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("backups"), dict):
                self.settings[name] = entry

    def save(self) -> None:
        """Write it; the file goes when there is nothing to remember."""
        if not (self.script or self.kept or self.settings):
            remove(self.path)
            return
        found = {"script": self.script, "kept": self.kept}
        content = encode_json({**found, "made": self.made, "settings": self.settings})
        write_file(self.path, content.encode(), make_directory=True)

    def will_make(self, path: str) -> None:
        """Note which directories are missing above a file that will be written."""
        directory = os.path.dirname(path)
        while not os.path.isdir(directory):
            if directory not in self.made:
                self.made.append(directory)
            directory = os.path.dirname(directory)

    def remove_directories(self) -> None:
        """Remove those that install made and that are empty again."""
        for directory in sorted(self.made, key=len, reverse=True):
            remove_if_empty(directory)
        self.made = [path for path in self.made if os.path.isdir(path)]

    def changes(self, file: SettingsFile, new: bytes) -> None:
        """A settings file will hold `new`; what it holds is kept beside it."""
        self.will_make(file.real)
        entry = self.settings.setdefault(
            file.real, {"made": file.raw is None, "written": "", "backups": {}}
        )
        if file.raw is not None and not self.is_as_written(file):
            backup = file.real + time.strftime(".%Y%m%d-%H%M%S.bak")
            if not os.path.lexists(backup):
                entry["backups"][backup] = sha256_hex(file.raw)
                write_file(backup, file.raw)
        entry["written"] = sha256_hex(new)

    def is_as_written(self, file: SettingsFile) -> bool:
        """Whether a settings file is still as install has made it."""
        written = self.settings.get(file.real, {}).get("written")
        return file.raw is not None and written == sha256_hex(file.raw)

    def backups(self, file: SettingsFile) -> list[SettingsFile]:
        """The backups that install made of a file and nobody changed, oldest first."""
        found = []
        entry = self.settings.get(file.real, {})
        for path, digest in entry.get("backups", {}).items():
            backup = SettingsFile(path)
            if backup.raw is not None and sha256_hex(backup.raw) == digest:
                found.append(backup)
        return found


# -- Commands: install's plan ----------------------------------------------------------

OLDEST_CLIENT = (2, 1, 78)  # older ones ignore settings whole that name StopFailure
OLDEST_CLIENT_TEXT = "2.1.78"
CLIENT_ANSWERS_S = 20.0  # `claude --version`, on a slow disk
CLIENT_PLACES = (
    (".local", "bin"),
    (".claude", "local"),
)  # below home; often not in PATH
TITLE = b"Tell a TelemHQ tracker what Claude Code did"  # each version begins with it


def client_version() -> str:
    """What `claude --version` says, such as 2.1.329; "" when no client was found."""
    import re
    import shutil
    import subprocess

    home = os.path.expanduser("~")
    places = [os.path.join(home, *names) for names in CLIENT_PLACES]
    search = os.pathsep.join([os.environ.get("PATH", ""), *places])
    client = shutil.which("claude", path=search)
    if not client:
        return ""
    try:
        said = subprocess.run(
            [client, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "DISABLE_AUTOUPDATER": "1"},
            timeout=CLIENT_ANSWERS_S,
            check=False,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(rb"\d+\.\d+\.\d+", said)
    return match.group().decode() if match else ""


def is_too_old(version: str) -> bool:
    """Whether this client (its version, "" unknown) knows no StopFailure."""
    numbers = tuple(int(part) for part in version.split(".")) if version else ()
    return bool(numbers) and numbers < OLDEST_CLIENT


def shell_quoted(path: str) -> str:
    """A path as one word for a shell; on Windows that is Git Bash."""
    import shlex

    return shlex.quote(path.replace("\\", "/") if os.name == "nt" else path)


def own_interpreter() -> str:
    """The Python that runs this: not a virtual environment's, which comes and goes, but
    the one behind it."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    major, minor = sys.version_info[:2]
    behind = os.path.join(sys.base_prefix, "bin", f"python{major}.{minor}")
    if os.name == "nt":
        behind = os.path.join(sys.base_prefix, "python.exe")
    elif not os.path.exists(behind):  # PyPy has other names
        behind = os.path.realpath(sys.executable)
    return behind if os.path.exists(behind) else sys.executable


def names_release(path: str) -> bool:
    """Whether a path holds a full version, as pyenv's and Homebrew's do: an upgrade
    removes it."""
    import re

    return re.search(r"\d+\.\d+\.\d+", path) is not None


def interpreter() -> str:
    """The Python to name in settings: this one, by a path that outlives its upgrade
    where there is such a path."""
    import shutil

    own = own_interpreter()
    if not names_release(own):
        return own
    major, minor = sys.version_info[:2]
    places = [os.environ.get("PATH", ""), "/opt/homebrew/bin", "/usr/local/bin"]
    for name in (f"python{major}.{minor}", "python3"):
        found = shutil.which(name, path=os.pathsep.join(places))
        stable = found and os.path.isabs(found) and not names_release(found)
        if found and stable and os.path.realpath(found) == os.path.realpath(own):
            return found
    return own


def hook_command(event: str) -> str:
    """The command for settings. It imports the script from its own directory; when that
    fails (bytecode that a crash has cut off, a Python that an upgrade has removed), it
    runs it. It never ends with 2, which Claude Code takes for a veto."""
    python = shell_quoted(interpreter())
    other = "python3" if names_release(python) else python
    directory, script = shell_quoted(hooks_dir()), shell_quoted(installed_script())
    imported = f"cd {directory} && {python} -ESc '{IMPORT}'"
    trap = IGNORE_TERM if event == "StopFailure" else ""
    return f"{trap}{imported} || {other} -I -S {script} || true"


def with_ours(
    content: Fields, url: str | None, tools: bool, client: str = ""
) -> Fields:
    """Settings with our hooks, and with the ping URL unless it is None. client: its
    version; StopFailure is left out, or taken out, where it would do harm."""
    import copy

    content = copy.deepcopy(content)
    if url is not None:
        content.setdefault("env", {})[URL_NAME] = url
    if is_too_old(client):
        take_out(content, [hook for hook in hooks_of(content) if is_harmful(hook)])
    there = [hook.event for hook in hooks_of(content) if hook.names_script()]
    for event in [*EVENTS, *TOOL_EVENTS] if tools else EVENTS:
        if event in there or (event == "StopFailure" and is_too_old(client)):
            continue
        group: Fields = {"matcher": TOOLS} if event in TOOL_EVENTS else {}
        group["hooks"] = [{"type": "command", "command": SCRIPT}]
        content.setdefault("hooks", {}).setdefault(event, []).append(group)
    for hook in hooks_of(content):
        if hook.is_ours():
            command = hook_command(hook.event)
            hook.entry.update(command=command, timeout=HOOK_TIMEOUT_S)
    return content


def is_harmful(hook: RegisteredHook) -> bool:
    """Whether it is ours, for an event that older clients than OLDEST_CLIENT stumble
    on."""
    return hook.event == "StopFailure" and hook.is_ours()


def take_out(content: Fields, hooks: list[RegisteredHook]) -> None:
    """Remove hooks from settings, and what that leaves empty."""
    for hook in hooks:
        hook.group["hooks"].remove(hook.entry)
    groups_of = content.get("hooks", {})
    for event in {hook.event for hook in hooks}:
        groups_of[event] = [group for group in groups_of[event] if group["hooks"]]
        if not groups_of[event]:
            del groups_of[event]
    if hooks and not groups_of:
        del content["hooks"]


def unfilled(url: str) -> str:
    """Why a ping URL is a form that was not filled in, or ""."""
    if "<" in url or ">" in url:
        return "<token> stands for your tracker's own: copy its whole URL"
    _, found, rest = url.partition("://")
    path = rest.partition("/")[2].split("?")[0]
    if found and path.strip("/") in ("", "ping"):
        return f"{URL_NAME} has no token: copy the whole URL of your tracker"
    return ""


def ask_for_url() -> str | None:
    """The ping URL that a person types, unseen; None when it is none."""
    import getpass

    print("The URL of your tracker looks like https://telemhq.com/ping/<token>.")
    try:
        url = getpass.getpass("Ping URL (not shown; Enter to go on without): ")
    except EOFError:
        return None
    return url.strip() or None


class ScriptFile:
    """The script where install puts it. raw: what is there, None: nothing."""

    def __init__(self) -> None:
        self.path = installed_script()
        self.real = os.path.realpath(self.path)
        self.raw: bytes | None = None
        try:
            self.raw = read_file(self.real, FILE_MAX_BYTES)
        except FileNotFoundError:
            pass

    def is_ours(self) -> bool:
        """Whether what is there is this script, in whatever version."""
        return self.raw is not None and TITLE in self.raw[:1000]

    def version(self) -> str:
        """Its version, for a person."""
        import re

        match = re.search(rb'\n__version__ = "([\w.]+)"', self.raw or b"")
        return match.group(1).decode() if match else "unknown"

    def bytecode_dir(self) -> str:
        """Where Python caches its bytecode."""
        return os.path.join(os.path.dirname(self.path), "__pycache__")

    def remove_bytecode(self) -> None:
        """Remove what Pythons have cached of it."""
        import glob

        stem = os.path.splitext(SCRIPT)[0]
        pattern = os.path.join(glob.escape(self.bytecode_dir()), stem + ".*.pyc")
        for path in glob.glob(pattern):
            remove(path)

    def write(self, source: bytes) -> None:
        """Put `source` there. Python takes cached bytecode for that of any source of
        the same size and second: a changed file gets another second. And under a umask
        of 000 it would let everybody write it: so its directory is made here."""
        if self.raw != source:
            old = os.stat(self.real).st_mtime if os.path.exists(self.real) else 0.0
            write_file(self.real, source, make_directory=True)
            written = max(time.time(), old + 1)
            os.utime(self.real, (written, written))
        os.chmod(self.real, 0o700)
        self.remove_bytecode()
        if not os.path.isdir(self.bytecode_dir()):
            os.mkdir(self.bytecode_dir())
            os.chmod(self.bytecode_dir(), 0o755)


class InstallPlan:
    """What install will do. file: the settings file; new: the bytes that it will hold;
    url: the ping URL to write, None to leave it; script: what stands in its place."""

    def __init__(self, options: Namespace, url: str | None) -> None:
        self.url = url
        self.file = SettingsFile(settings_path(options.project))
        self.file.need_editable()
        self.client = client_version()
        self.source = read_file(this_script(), FILE_MAX_BYTES)
        self.script = ScriptFile()
        before = self.file.content
        self.content = with_ours(before, url, options.tools, self.client)
        self.new = self.file.raw or b""
        if self.content != before:
            self.new = self.file.encode(self.content)

    def is_done(self) -> bool:
        """Whether all stands there already."""
        return self.content == self.file.content and self.script.raw == self.source

    def show(self) -> None:
        """Print what will change."""
        mask = Mask(self.file.content, self.content)
        print_diff(self.file.path, self.file.raw or b"", self.new, mask)
        if self.script.raw is not None and self.script.raw != self.source:
            what = (
                "a script that is not this one; it is kept, and uninstall puts it back"
            )
            if self.script.is_ours():
                what = f"version {self.script.version()} of this script"
            print(f"{self.script.path} is replaced: it is {what}.")
        if is_too_old(self.client):
            old = f"Claude Code {self.client} ignores settings that name StopFailure"
            print(f"{old} ({OLDEST_CLIENT_TEXT} does not): it is left out.")
        elif not self.client:
            least = f"Claude Code {OLDEST_CLIENT_TEXT} or newer"
            print(f"No claude command was found; this is for {least}.")

    def carry_out(self) -> None:
        """Change the files; first note how that is undone."""
        record = InstallRecord()
        record.will_make(self.script.real)
        record.will_make(record.path)
        if self.script.raw is not None and not self.script.is_ours():
            record.kept = self.script.real + time.strftime(".%Y%m%d-%H%M%S.bak")
        record.script = sha256_hex(self.source)
        if self.content != self.file.content:
            record.changes(self.file, self.new)
        record.save()
        if record.kept and not os.path.lexists(record.kept):
            os.rename(self.script.real, record.kept)
        if self.content != self.file.content:
            self.file.write(self.new)
        self.script.write(self.source)


def git_says(directory: str, *arguments: str) -> tuple[int, str]:
    """(exit status, output) of git in a directory; 128 without git or a repository."""
    import subprocess

    try:
        ended = subprocess.run(
            ["git", "-C", directory, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except OSError:
        return 128, ""
    return ended.returncode, ended.stdout.decode("utf-8", "replace").strip()


def tell_where_token_is(file: SettingsFile) -> None:
    """Say where the token ended up, when somebody could see it there."""
    if file.real != os.path.abspath(file.path):
        print(f"{file.path} is a link: the URL, with its token, is in {file.real}.")
    directory, name = os.path.split(file.real)
    if git_says(directory, "check-ignore", "-q", name)[0] != 1:
        return  # ignored, or no repository
    exclude = git_says(directory, "rev-parse", "--git-path", "info/exclude")[1]
    exclude = os.path.normpath(os.path.join(directory, exclude))
    inside = git_says(directory, "rev-parse", "--show-prefix")[1] + name
    print(f"Git does not ignore {file.real}, which holds the URL with its token:")
    print(f"  echo {shell_quoted('/' + inside)} >> {shell_quoted(exclude)}")


# -- Commands: uninstall ---------------------------------------------------------------


def without_ours(content: Fields, before: Fields) -> Fields:
    """Settings without our hooks and ping URL; those that `before` had (settings of
    before install, {}: none) are put back."""
    import copy

    content = copy.deepcopy(content)
    env = content.get("env", {})
    env.pop(URL_NAME, None)
    if URL_NAME in before.get("env", {}):
        env[URL_NAME] = before["env"][URL_NAME]
    if "env" in content and not env:
        del content["env"]
    theirs = [hook for hook in hooks_of(before) if hook.is_ours()]
    ours = []
    for hook in hooks_of(content):
        if not hook.is_ours():
            continue
        same = [other for other in theirs if other.event == hook.event]
        if same:
            hook.entry.clear()
            hook.entry.update(same[0].entry)
            theirs.remove(same[0])
        else:
            ours.append(hook)
    take_out(content, ours)
    return content


def restored(file: SettingsFile, record: InstallRecord) -> bytes | None:
    """What a settings file must hold without install; None: there was none."""
    backups = record.backups(file)
    entry = record.settings.get(file.real, {})
    if backups and record.is_as_written(file):
        first = backups[0]
        if record.kept or not any(hook.is_ours() for hook in first.hooks()):
            return first.raw  # nobody else has changed it
    before = backups[0].content if backups and record.kept else {}
    after = without_ours(file.content, before)
    for backup in backups:
        theirs = not any(hook.is_ours() for hook in backup.hooks())
        if theirs and without_ours(backup.content, before) == after:
            return backup.raw
    return file.encode(after) if after or not entry.get("made") else None


def restore(file: SettingsFile, record: InstallRecord) -> bool:
    """Take ours out of a settings file; whether there was anything. Our backups go, for
    they may hold ping URLs."""
    if not (URL_NAME in file.env() or any(hook.is_ours() for hook in file.hooks())):
        return False
    file.need_editable()
    new, backups = restored(file, record), record.backups(file)
    print_diff(file.path, file.raw or b"", new or b"", Mask(file.content))
    if new is None:
        os.unlink(file.real)
    else:
        file.write(new)
    for backup in backups:
        os.unlink(backup.path)
    record.settings.pop(file.real, None)
    return True


def known_projects() -> list[str]:
    """The directories in which Claude Code has run, from its own .claude.json."""
    path = os.path.join(os.path.expanduser("~"), ".claude.json")
    if os.environ.get("CLAUDE_CONFIG_DIR"):
        path = os.path.join(config_dir(), ".claude.json")
    try:
        projects = read_object(path, 4 * FILE_MAX_BYTES).get("projects")
    except (OSError, ValueError):
        return []
    return list(projects) if isinstance(projects, dict) else []


def others_that_name_script(record: InstallRecord) -> list[str]:
    """Paths of settings files that still name the script that install has put there."""
    paths = [file.path for file in Surroundings().files] + list(record.settings)
    for project in known_projects():
        paths += project_settings(project)
    named: dict[str, str] = {}
    for path in paths:
        file = SettingsFile(path)
        theirs = record.kept and file.real not in record.settings
        if file.names_script() and not theirs:  # but the one from before install
            named.setdefault(file.real, path)
    return list(named.values())


def remove_script(record: InstallRecord) -> None:
    """Remove the script and its bytecode; the one from before install comes back. (A
    link to somebody's checkout: the link goes, not what it leads to.)"""
    script = ScriptFile()
    ours = script.is_ours() or sha256_hex(script.raw or b"") == record.script
    if script.raw is not None and not ours:
        print(f"{script.path} is not this script: it stays.")
    elif os.path.isfile(record.kept):
        os.replace(record.kept, script.real)
        print(f"{script.path} is again the script from before install.")
    elif script.raw is not None:
        remove(script.path)
    script.remove_bytecode()
    remove_if_empty(script.bytecode_dir())
    record.script = record.kept = ""


def remove_state(state_dir: str | None) -> None:
    """Remove all that is kept of each destination, after a sender at work is done."""
    import shutil

    for outbox in outboxes(state_dir):
        wait_for_lock(outbox, time.monotonic() + LIFE_S).release()
        shutil.rmtree(outbox.directory)


def need_no_loss(kept: list[Outbox]) -> None:
    """Skipped when pings wait that would be lost, and nobody says that they may be."""
    waiting = sum(len(outbox.waiting()) for outbox in kept)
    if not waiting:
        return
    print(f"{counted(waiting, 'ping')} wait and would be lost; `flush` sends them.")
    if not (at_a_terminal() and ask("Remove them?")):
        raise Skipped("nothing was changed; with --yes they are removed")


def remove_rest(record: InstallRecord, state_dir: str | None, with_state: bool) -> None:
    """Remove what no settings file needs any more: script, state, directories."""
    remove_script(record)
    if with_state:
        remove_state(state_dir)
    record.save()
    if state_dir:
        remove_if_empty(state_dir)
    record.remove_directories()


def uninstall(options: Namespace) -> int:
    """the inverse of install: settings as before, script and state removed"""
    around, record, script = Surroundings(), InstallRecord(), ScriptFile()
    kept, plugin = outboxes(around.settings.state_dir), around.plugin_in()
    file = SettingsFile(settings_path(options.project))
    file.need_editable()
    if not options.yes:
        need_no_loss(kept)
    if script.raw is not None and not record.script and not script.is_ours():
        raise Skipped(f"{script.path} is not this script; nothing was changed")
    there = restore(file, record) or bool(record.script or kept) or script.is_ours()
    record.remove_directories()
    record.save()
    still = others_that_name_script(record)
    for path in still:
        print(f"{path} still names the script: it stays, with its state.")
        print("  `uninstall --project DIR` takes it out of a project's local settings.")
    if not still:
        remove_rest(record, around.settings.state_dir, with_state=not plugin)
    if plugin:
        print(f"The plugin is enabled in {plugin}; its state stays.")
        print("  claude plugin uninstall telemhq-ping@telemhq-ping")
    elif not still:
        print("Removed." if there else "Nothing of it was installed here.")
    return 0


# -- Commands: a tracker of our own, on loopback ---------------------------------------

ARRIVES_S = 30.0  # a ping that has not come by then is lost
DEMO_MODEL = "claude-opus-5-5"
SAMPLES: dict[str, Fields] = {  # beside what Claude Code sends with every event
    "PostToolUseFailure": {
        "tool_name": "Bash",
        "tool_input": {"command": "./deploy --password hunter2"},
        "error": "Exit code 3\nno /home/you/acme/deploy.key",
        "duration_ms": 1250,
    },
    "Stop": {
        "last_assistant_message": "The password is hunter2.",
        "stop_hook_active": False,
    },
    "SessionEnd": {"reason": "prompt_input_exit"},
    "SessionStart": {"source": "startup", "model": DEMO_MODEL},
    "PostToolUse": {
        "tool_name": "Bash",
        "tool_input": {"command": "cat notes"},
        "tool_response": {"stdout": "hunter2"},
        "duration_ms": 25,
    },
    "StopFailure": {
        "error": "rate_limit",
        "last_assistant_message": "API Error: 429",
    },
}


def sample(name: str, transcript: str, cwd: str = "/home/you/acme") -> Fields:
    """A sample event."""
    return {
        "hook_event_name": name,
        "session_id": "5e551011-0000-4000-8000-0000000000",
        "cwd": cwd,
        "transcript_path": transcript,
        **SAMPLES[name],
    }


class Receiver:
    """A tracker on loopback that says 200. arrived: a queue of (monotonic, ping)."""

    def __init__(self) -> None:
        import queue

        self.arrived: Queue[tuple[float, Fields]] = queue.Queue()
        self.server: HTTPServer | None = None
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}/ping/sample"

    def start(self) -> None:
        """Listen, on the same port as before."""
        import http.server
        import json
        import threading

        arrived = self.arrived

        class Handler(http.server.BaseHTTPRequestHandler):
            """Takes pings."""

            def do_POST(self) -> None:
                """One ping."""
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.end_headers()
                arrived.put((time.monotonic(), json.loads(body)))

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = http.server.HTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        serve = self.server.serve_forever
        threading.Thread(target=serve, args=(LOOK_S / 10,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def environ(self, directory: str) -> dict[str, str]:
        """The variables for a hook that sends here, its state in `directory`."""
        return {
            "TELEMHQ_STATE_DIR": os.path.join(directory, "state"),
            URL_NAME: self.url,
            "TELEMHQ_DESTINATIONS": "telemhq",  # nobody else is to get samples
        }


def remove_tree(directory: str) -> None:
    """Remove a directory; a sender that is still at work may put something there while
    we do, and nothing once it is gone."""
    import shutil

    ends = time.monotonic() + ARRIVES_S
    while os.path.isdir(directory) and time.monotonic() < ends:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(LOOK_S / 10)


def wait_for_end(state_dir: str) -> None:
    """Wait until a sender has ended: it gives its lock back just before."""
    for outbox in outboxes(state_dir):
        wait_for_lock(outbox, time.monotonic() + ARRIVES_S).release()
    time.sleep(LOOK_S / 2)


# -- Commands: doctor ------------------------------------------------------------------

WAIT_OLD_S = 300.0  # a ping that waits for longer is worth a word
HOOK_MOST_S = 15.0  # a hook that takes longer is stuck
TRIAL_S = 10.0  # for its ping to arrive
MEANINGS = (  # of an answer, by what it begins with
    ("HTTP 402", "the tracker's account wants to be paid"),
    ("HTTP 408", "it was slow; pings are kept and sent later"),
    ("HTTP 40", "the token in {variable} is wrong or was revoked"),
    ("HTTP 410", "the tracker was deleted"),
    ("HTTP 42", "it has too much to do; pings are kept and sent later"),
    ("HTTP 3", "it has moved; put its new address into {variable}"),
    ("HTTP", "it has a problem of its own; pings are kept and sent later"),
    (
        "proxy: HTTP 407",
        "the proxy wants a password: HTTPS_PROXY=http://USER:PASSWORD@…",
    ),
    ("proxy", "the proxy in HTTPS_PROXY refuses; NO_PROXY can name the tracker's host"),
    ("TLS: WRONG_VERSION", "no TLS is spoken there: is https:// right, and the port?"),
    ("TLS: HTTP_REQUEST", "no TLS is spoken there: is https:// right, and the port?"),
    ("TLS", "the certificate is not trusted; SSL_CERT_FILE can name a company's own"),
    ("this Python", "run `install` with a Python that has the module ssl"),
    ("", "is {variable} right, is there a network, or a proxy for HTTPS_PROXY?"),
)
MACOS_CERTIFICATES = "run `Install Certificates.command` in your Python's folder"


class Check:
    """One line of doctor's. good: all is well; None: only told. text: what was looked
    at and found. remedy: what to do when it is not well."""

    def __init__(self, good: bool | None, text: str, remedy: str = "") -> None:
        self.good, self.text, self.remedy = good, text, remedy

    def line(self) -> str:
        """For a person."""
        told = f"{mark(self.good)} {self.text}"
        return told if self.good is not False else f"{told}: {self.remedy}"


def print_checks(checks: Iterable[Check]) -> bool:
    """Print checks as they are made; whether all is well."""
    well = True
    for check in checks:
        print(check.line(), flush=True)
        well = well and check.good is not False
    return well


def doctor(options: Namespace) -> int:
    """check all that lies between an event and the tracker, and say what to do"""
    around = Surroundings()
    if options.clear:
        clear_losses(around.settings.state_dir)
    well = print_checks(diagnosis(around, options.run_all))
    if options.send:
        well = print_checks([send_test(around.settings)]) and well
    return 0 if well else 1


def diagnosis(around: Surroundings, run_all: bool = False) -> Iterator[Check]:
    """All checks, in the order of a ping's way. run_all: run every command, too."""
    yield from check_settings(around)
    version = client_version()
    yield from check_client(around, version)
    yield from check_events(around, version)
    yield from check_commands(around, run_all)
    yield from check_variables(around)
    yield from check_trackers(around)
    yield from check_disk(around)


def check_settings(around: Surroundings) -> Iterator[Check]:
    """Whether Claude Code reads the settings files at all."""
    for file in around.files:
        if file.problem:
            ignored = f"Claude Code ignores the whole of {file.path}"
            yield Check(False, ignored, f"mend it: {file.problem}")
        for name in file.twice:
            yield Check(None, f'"{name}" stands twice in {file.path}; the last counts')
        if file.content.get("disableAllHooks"):
            off = f"hooks are turned off by {file.path}"
            yield Check(False, off, "take disableAllHooks out of it")


def check_client(around: Surroundings, version: str) -> Iterator[Check]:
    """Whether the client (its version, "" unknown) can read settings that name
    StopFailure."""
    if not version:
        yield Check(None, "no claude command was found")
        return
    harmed = [file.path for file in around.files if "StopFailure" in file.events()]
    if is_too_old(version) and harmed:
        ignores = f"Claude Code {version} ignores the whole of {harmed[0]}"
        why = f"it knows no StopFailure; update it to {OLDEST_CLIENT_TEXT} or newer"
        yield Check(False, ignores, f"{why}, or run `install`")
    else:
        yield Check(True, f"Claude Code {version}")


def check_events(around: Surroundings, version: str) -> Iterator[Check]:
    """Whether each event that the client knows runs the script, and does so once."""
    found: dict[str, list[tuple[RegisteredHook, str]]] = {}
    for file in around.files:
        for hook in file.hooks():
            if hook.names_script():
                found.setdefault(hook.event, []).append((hook, file.path))
    plugin = around.plugin_in()
    wanted = list(EVENTS)
    if is_too_old(version):
        wanted.remove("StopFailure")
    for event in dict.fromkeys([*wanted, *found]):
        places = found.get(event, [])
        if not places and plugin:
            yield Check(True, f"hook for {event}, by the plugin in {plugin}")
        elif not places:
            yield Check(False, f"no hook for {event}", "run `install`")
        else:
            yield Check(True, f"hook for {event}, in {places[0][1]}")
            yield from check_twice(event, places, plugin)


def check_twice(
    event: str, places: list[tuple[RegisteredHook, str]], plugin: str
) -> Iterator[Check]:
    """Whether an event becomes two pings. Claude Code runs the same command once."""
    (first, path), rest = places[0], places[1:]
    for hook, other in rest:
        if hook.command != first.command and hook.meets(first):
            both = f"{path} and {other}" if path != other else path
            twice = f"{event} is registered twice, in {both}"
            yield Check(False, twice, "take one out, for each sends a ping")
    if plugin and event in EVENTS:
        text = f"{event} is registered by the plugin, too, which leaves it to {path}"
        yield Check(None, text)


def is_macos_stub(command: str) -> bool:
    """Whether a command's Python is macOS's, which without the command line tools does
    nothing but open a dialog."""
    import shutil
    import subprocess

    if sys.platform != "darwin":
        return False
    pythons = [word for word in shell_words(command) if "python" in word]
    if not any(shutil.which(word) == "/usr/bin/python3" for word in pythons):
        return False
    try:
        quiet = subprocess.DEVNULL
        asked = ["xcode-select", "-p"]
        return subprocess.call(asked, stdout=quiet, stderr=quiet) != 0
    except OSError:
        return True


def sets_variable(command: str) -> bool:
    """Whether a command sets a TELEMHQ_ variable: it might send elsewhere."""
    import re

    return re.search(r"\bTELEMHQ_\w+=", command) is not None


def check_commands(around: Surroundings, run_all: bool) -> Iterator[Check]:
    """Whether each command that names the script sends a ping: each is run."""
    trusted = [file.path for file in around.theirs()]
    seen = set()
    for file in sorted(around.files, key=lambda file: file.path not in trusted):
        for hook in file.hooks():
            if not hook.names_script() or hook.command in seen:
                continue
            seen.add(hook.command)
            ours = hook.command == hook_command(hook.event)
            foreign = file.path not in trusted and not ours
            shown = Mask(file.content).value(hook.command)
            if foreign or sets_variable(hook.command):
                question = f"Run this command of {file.path}?\n  {shown}\n"
                if not (run_all or (at_a_terminal() and ask(question))):
                    text = f"not tried, in {file.path}: {shown}"
                    yield Check(False, text, "`doctor --run-all` tries it")
                    continue
            yield try_command(hook, file.path, around)


def try_command(hook: RegisteredHook, path: str, around: Surroundings) -> Check:
    """Run a command of settings; whether a ping of this version arrived."""
    name = f"the command for {hook.event} in {path}"
    if is_macos_stub(hook.command):
        remedy = "run `xcode-select --install`, or `install` with another Python"
        return Check(False, f"{name} opens a dialog at every event", remedy)
    shell = find_shell()
    if not shell:
        return Check(None, f"{name} was not tried: there is no Git Bash")
    environ = {**around.settings.environ, "TELEMHQ_HOOK_DEBUG": "0"}
    trial = Trial(shell, hook.command, environ)
    if trial.ping is None:
        if not trial.said:
            environ["TELEMHQ_HOOK_DEBUG"] = "1"
            trial.said = Trial(shell, hook.command, environ).said
        cause = trial.cause() + "; run `install`, or mend the command"
        return Check(False, f"nothing arrived from {name}", cause)
    if trial.said:  # which Claude Code shows to its user, or to the model
        prints = f"a ping arrived from {name}, but it prints `{trial.said[0]}`"
        return Check(False, prints, trial.cause() + "; run `install`")
    version = trial.ping.get("hook_version")
    if version != __version__:
        other = f"{name} is version {version or 'of another script'}"
        return Check(False, other, f"run `install` to make it version {__version__}")
    times = f"{trial.hook_ms} ms in the hook, there after {trial.arrived_ms} ms"
    return Check(True, f"a ping arrived from {name}: {times}")


def find_shell() -> str:
    """The shell that runs Claude Code's hooks: on Windows, Git's bash; "": none."""
    import shutil

    if os.name != "nt":
        return "/bin/sh"
    places = [os.environ.get("CLAUDE_CODE_GIT_BASH_PATH", "")]
    names = ("ProgramFiles", "ProgramFiles(x86)", "LocalAppData")
    tops = [os.path.join(os.environ.get(name, ""), "Git") for name in names]
    git = shutil.which("git")
    if git:
        tops.append(os.path.dirname(os.path.dirname(git)))
    places += [os.path.join(top, "bin", "bash.exe") for top in tops]
    return next((place for place in places if os.path.isfile(place)), "")


class Trial:
    """One run of a command as Claude Code does it, on a sample event, with a receiver
    of our own, and the state in a directory that goes.

    ping: what arrived, None: nothing. hook_ms, arrived_ms: after the start. said: lines
    that it printed. status: its exit status. command: the command.
    """

    def __init__(self, shell: str, command: str, environ: dict[str, str]) -> None:
        import queue
        import tempfile

        self.command, self.ping = command, None
        directory, receiver = tempfile.mkdtemp("telemhq"), Receiver()
        environ = {**environ, **receiver.environ(directory)}
        environ.pop("CLAUDE_PLUGIN_ROOT", None)
        try:
            begun = time.monotonic()
            self.run([shell, "-c", command], environ, directory)
            self.hook_ms = round((time.monotonic() - begun) * 1000)
            try:
                at, self.ping = receiver.arrived.get(timeout=self.patience_s(directory))
                self.arrived_ms = round((at - begun) * 1000)
            except queue.Empty:
                pass
            wait_for_end(os.path.join(directory, "state"))
        finally:
            receiver.stop()
            remove_tree(directory)

    def run(self, command: list[str], environ: dict[str, str], directory: str) -> None:
        """Run it, with a sample event on stdin; one that hangs is ended."""
        import signal
        import subprocess

        event = sample("Stop", os.path.join(directory, "none.jsonl"), os.getcwd())
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
        try:
            out = process.communicate(encode_json(event).encode(), HOOK_MOST_S)[0]
        except subprocess.TimeoutExpired:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            out = b"it does not end"
            process.wait()
        self.said = out.decode("utf-8", "replace").strip().splitlines()
        self.status = process.returncode

    @staticmethod
    def patience_s(directory: str) -> float:
        """How long to wait for a ping: where none was made, none will come."""
        made = os.path.isdir(os.path.join(directory, "state"))
        return TRIAL_S if made else 0.5

    def cause(self) -> str:
        """Why nothing arrived, as far as can be told."""
        text = "\n".join(self.said)
        scripts = [word for word in shell_words(self.command) if word.endswith(SCRIPT)]
        paths = [os.path.expandvars(os.path.expanduser(word)) for word in scripts]
        gone = any(not os.path.exists(path) for path in paths)
        if gone or "can't open file" in text or "No module named" in text:
            return "the script is missing"
        if "Permission denied" in text:
            return "a file there may not be executed"
        missing = [line for line in self.said if "not found" in line]
        missing += [line for line in self.said if "No such file" in line]
        if missing:
            return f"the interpreter is missing: `{missing[0]}`"
        if "SyntaxError" in text or "3.8" in text:
            return "its Python is older than 3.8"
        if text:
            return f"it said `{text.rpartition('skipped: ')[2].splitlines()[-1]}`"
        return f"it said nothing, and ended with {self.status}"


def known_variables() -> list[str]:
    """The variables that this file's docstring and its trackers name."""
    import re

    names: list[str] = re.findall(r"(?m)^    (TELEMHQ_\w+)", __doc__ or "")
    for tracker in TRACKERS.values():
        names += getattr(tracker, "variables", ())
    return [name for name in names if name.startswith("TELEMHQ_")]


def check_variables(around: Surroundings) -> Iterator[Check]:
    """Whether each variable is understood; where the URL comes from, and what the
    project would be called here."""
    import difflib

    settings, known = around.settings, known_variables()
    for problem in settings.ignored:
        yield Check(False, "settings", problem)
    for name in sorted(settings.environ):
        if not name.startswith("TELEMHQ_") or name in known:
            continue
        if name.startswith("TELEMHQ_TEST_"):  # this project's own tests
            continue
        ends = [other[len("TELEMHQ_") :] for other in known]
        close = difflib.get_close_matches(name[len("TELEMHQ_") :], ends, 1, 0.5)
        remedy = f"did you mean TELEMHQ_{close[0]}?" if close else "take it out"
        yield Check(False, f"{name} is no variable of this script", remedy)
    if settings.url:
        source = around.sources.get(URL_NAME, "the environment of this shell")
        yield Check(True, f"ping URL, from {source}")
    project = project_of({"cwd": os.getcwd()}, settings)
    yield Check(None, f"pings from this directory say project {project}")


def in_words(what: str, variable: str = URL_NAME) -> str:
    """What an answer means (`what` of an Answer), and what to do. variable: that which
    holds the tracker's URL or token."""
    said = "the tracker answered " + what[5:] if what.startswith("HTTP ") else what
    meaning = next(text for begins, text in MEANINGS if what.startswith(begins))
    if "CERTIFICATE_VERIFY_FAILED" in what and sys.platform == "darwin":
        meaning = f"{meaning}; or {MACOS_CERTIFICATES}"
    return f"{said}: {meaning.replace('{variable}', variable)}"


def check_trackers(around: Surroundings) -> Iterator[Check]:
    """Whether the destinations are usable, and answer to what records nothing."""
    settings = around.settings
    trackers, problems = find_trackers(settings, read_secret)
    if is_plugin_alone(around):
        kept = "the plugin's URL is kept by Claude Code; it is not tried here"
        yield Check(None, kept)
        problems = [problem for problem in problems if URL_NAME not in problem]
    for problem in problems:
        told = unfilled(settings.url) if "<" in settings.url else problem
        yield Check(False, "destination", told)
    for tracker in trackers:
        name = "tracker" if tracker.kind == TelemHQ.kind else tracker.kind
        problem = unfilled(tracker.url) if tracker.kind == TelemHQ.kind else ""
        if problem:
            yield Check(False, "destination", problem)
            continue
        question, opener = tracker.check(), make_opener(tracker.url)
        answer = post(opener, question, settings.timeout_s)
        good = answer.verdict == DELIVERED
        if question.body is None:  # a GET: any word of its own is good enough
            good = good or answer.verdict == REFUSED or answer.what == "HTTP 405"
        text = f"{name} at {origin(tracker.url)} answers"
        yield Check(good, text, in_words(answer.what, tracker.secrets[0]))
        if tracker.idle:
            yield Check(None, f"{name} gets nothing from here: {tracker.idle}")


def check_disk(around: Surroundings) -> Iterator[Check]:
    """Whether all is well on disk: what waits, what failed, what was lost."""
    settings, state_dir = around.settings, around.settings.state_dir or ""
    if not state_dir:
        yield Check(False, "state directory", "set TELEMHQ_STATE_DIR, or HOME")
        return
    kept, present = outboxes(state_dir), {}
    for tracker in find_trackers(settings, read_secret)[0]:
        outbox = outbox_of(settings, tracker)
        present[outbox.directory] = outbox, tracker.secrets[0]
    if is_plugin_alone(around):
        ours = [outbox for outbox in kept if outbox.kind() == TelemHQ.kind]
        present.update((outbox.directory, (outbox, URL_NAME)) for outbox in ours)
    nowhere = Outbox(os.path.join(state_dir, "none")), URL_NAME
    for outbox, _ in present.values() or [nowhere]:
        try:
            outbox.need_sound()
        except Skipped as error:
            yield Check(False, "state directory", str(error))
            return
    yield Check(True, "state directory " + state_dir)
    for outbox, variable in present.values():
        for check in check_delivery(outbox, variable):
            if len(present) > 1:
                check.text = f"{outbox.kind()}: {check.text}"
            yield check
    yield from check_formers([o for o in kept if o.directory not in present])


def check_formers(formers: list[Outbox]) -> Iterator[Check]:
    """Whether pings wait for what is no destination any more."""
    for former in formers:
        waiting, kind = len(former.waiting()), former.kind()
        if waiting:
            text = f"{counted(waiting, 'ping')} wait for a URL no longer configured"
            text += "" if kind == TelemHQ.kind else f" ({kind})"
            yield Check(False, text, "`flush --adopt` sends them to the present one")


def check_delivery(outbox: Outbox, variable: str) -> Iterator[Check]:
    """How delivery from an outbox goes."""
    now, names, state = time.time(), outbox.waiting(), outbox.state()
    backoff_s, pace_s = state.backoff_left_s(now), 0.0
    text, fine = "no pings wait", True
    if names:
        age_s = now - PingName(names[0]).ns / 1e9
        verb = "waits" if len(names) == 1 else "wait"
        text = (
            f"{counted(len(names), 'ping')} {verb}, the oldest for {duration_of(age_s)}"
        )
        fine = not backoff_s and age_s < WAIT_OLD_S
    yield Check(fine, text, "`flush` sends them now")
    if backoff_s:
        why = "a pause after an outage"
        if state.failures:
            why = in_words(state.problem, variable)
        yield Check(False, f"back-off: {duration_of(backoff_s)} more", why)
    elif pace_s and names:
        text = f"after an outage pings go bit by bit, the next in {duration_of(pace_s)}"
        yield Check(None, text)
    else:
        yield Check(True, "back-off: none")
    last = "none yet"
    if state.delivered_at:
        last = iso_time(int(state.delivered_at * 1e9))
    yield Check(True, f"last delivery: {last}")
    for reason, count in sorted(state.losses.items()):
        seen = "`doctor --clear` when you have seen it"
        if reason != "tokens":
            seen = f"look into {outbox.path('refused')}, then {seen}"
        yield Check(False, f"lost: {count}, {reason}", seen)


def duration_of(seconds: float) -> str:
    """`40 s`, `3 min`, `5 h`, `2 days`."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{int(seconds / unit)} {name}"
    return f"{int(seconds)} s"


def clear_losses(state_dir: str | None) -> None:
    """Forget the losses that a person has seen."""
    for outbox in outboxes(state_dir):
        lock = wait_for_lock(outbox, time.monotonic() + LIFE_S)
        state = outbox.state()
        if state.losses:
            state.losses = {}
            state.save()
        lock.release()


def send_test(settings: Settings) -> Check:
    """Send one ping that is marked as a test, the way that every ping goes."""
    event, ns = {"hook_event_name": "Test", "cwd": os.getcwd()}, time.time_ns()
    ping = make_ping(event, settings, project_of(event, settings), ns, 0)
    text = f"a ping with the event Test, {ping['event_id']}"
    for tracker in destinations(settings, print):
        outbox = outbox_of(settings, tracker)
        name = enqueue(outbox, tracker, ns, ping, {})
        if name:
            flush_outbox(outbox, tracker, settings)
        if name in outbox.waiting():
            return Check(False, text, f"it waits for {origin(tracker.url)}; see above")
    return Check(True, f"{text}, is in your tracker")


# -- Commands: install, which ends with what doctor says -------------------------------


def install(options: Namespace) -> int:
    """put the script into ~/.claude/hooks and register it in settings.json"""
    settings, url = Surroundings().settings, options.url
    if url is None and not settings.url and at_a_terminal() and not options.dry_run:
        url = ask_for_url()
    if url is not None:
        if unfilled(url):
            raise Skipped(unfilled(url))
        TelemHQ(Settings({**settings.environ, URL_NAME: url}), read_secret)
    plan = InstallPlan(options, url)
    plan.show()
    if not options.dry_run:
        questions = at_a_terminal() and not options.yes and not plan.is_done()
        if questions and not ask("Write this?"):
            raise Skipped("nothing was changed")
        plan.carry_out()
        print(f"Installed: {plan.file.path} names {plan.script.path}.")
        if url is not None:
            tell_where_token_is(plan.file)
    if not (url or settings.url):
        print(f"Now export {URL_NAME}, or run install again with --url.")
    elif at_a_terminal() and not options.dry_run:
        print("Sessions that run already must be started anew. doctor says:")
        print_checks(diagnosis(Surroundings()))
    return 0


# -- Commands: preview, demo -----------------------------------------------------------

WIDTH = 88  # of the demo's lines
DEMO_EVENTS = 3  # of SAMPLES are enough to see it; --all shows the rest
STRUCK, PLAIN = "\x1b[9;2m", "\x1b[0m"  # ECMA-48


SAMPLE_USED = {**dict.fromkeys(TOKENS, 0), "input_tokens": 12, "output_tokens": 950}
SAMPLE_USED.update(cached_input_tokens=41200, cache_creation_input_tokens=2300)
SAMPLE_USED.update(total_tokens=44462, tool_calls=3)
SHOWN_HEADERS = (*JSON_BODY, "Accept", "Idempotency-Key")  # others may hold secrets


def tracker_named(settings: Settings, name: str) -> Tracker:
    """A destination, by its tracker's kind or its directory's name."""
    trackers, problems = find_trackers(settings, read_secret)
    for tracker in trackers:
        if name in (tracker.kind, tracker.directory_name()):
            return tracker
    known = ", ".join(tracker.kind for tracker in trackers) or "none"
    text = f"there is no destination {name}; TELEMHQ_DESTINATIONS names: {known}"
    raise Skipped("; ".join([text, *problems]))


def print_requests(ping: Fields, settings: Settings, name: str) -> None:
    """Print what a destination gets of a ping; sample tokens, and no secrets."""
    import json

    tracker, ns = tracker_named(settings, name), time.time_ns()
    beside: Fields = {"own": tracker.frozen(ping)}
    if settings.usage and ping.get("event") in USAGE_EVENTS:
        counts = [SAMPLE_USED[name] for name in TOKENS[:5]]
        beside["messages"] = [["msg_01", DEMO_MODEL, ns // 10**6, *counts]]
        beside["totals"] = beside["since_end"] = SAMPLE_USED
        ping = gate({**ping, **SAMPLE_USED, "model": DEMO_MODEL})
    beside = gate_beside(beside, tracker.needs)
    requests = tracker.requests(ping, beside) if tracker.wants(ping) else []
    for request in requests:
        url = f"{origin(request.url)}/..." if tracker.url_is_secret else request.url
        print(f"POST {url}")
        for header, value in request.headers.items():
            print(f"{header}: {value if header in SHOWN_HEADERS else '...'}")
        print(json.dumps(json.loads(request.body or b"{}"), indent=2) + "\n")
    if not requests:
        print(f"{tracker.kind} gets nothing of {ping.get('event')}. {tracker.idle}")
    elif "total_tokens" in ping:
        print("The token counts are samples.", file=sys.stderr)


def preview(options: Namespace) -> int:
    """print the ping that an event (stdin, or a sample) makes"""
    import json

    if options.event:
        raw = encode_json(sample(options.event, "/x.jsonl")).encode()
    else:
        if sys.stdin and sys.stdin.isatty():
            print("Paste an event (JSON), then Ctrl-D on a line of its own:")
        raw = b"".join(iter(lambda: os.read(0, 1 << 16), b""))
    event = decode_json(raw.decode("utf-8", "replace").lstrip("\ufeff"))
    if not isinstance(event, dict):
        raise Skipped("that is no event")
    settings = Surroundings().settings
    project = project_of(event, settings)
    ping = make_ping(event, settings, project, time.time_ns(), len(raw))
    if options.destination:
        print_requests(ping, settings, options.destination)
        return 0
    print(json.dumps(ping, indent=2))
    if settings.usage:
        note = "Tokens and cost are added later, from the transcript, by the sender."
        print(note, file=sys.stderr)
    return 0


def in_colour() -> bool:
    """Whether output may be coloured (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


class Demo:
    """The script as it is installed, in a directory of its own, with a receiver."""

    def __init__(self, directory: str) -> None:
        self.receiver = Receiver()
        self.hooks = os.path.join(directory, "hooks")
        self.state_dir = os.path.join(directory, "state")
        self.transcript = os.path.join(directory, "session.jsonl")
        self.environ = {"HOME": directory, **self.receiver.environ(directory)}
        if "SYSTEMROOT" in os.environ:  # without it Windows has no random numbers
            self.environ["SYSTEMROOT"] = os.environ["SYSTEMROOT"]

    def prepare(self) -> None:
        """The script with its bytecode, and the transcript of a session."""
        import py_compile

        copied = os.path.join(self.hooks, SCRIPT)
        source = read_file(this_script(), FILE_MAX_BYTES)
        write_file(copied, source, make_directory=True)
        py_compile.compile(copied)
        write_file(self.transcript, b"")

    def work(self) -> None:
        """What a turn adds to the transcript: an answer, with its tokens."""
        message = {
            "id": "msg_" + os.urandom(8).hex(),
            "model": DEMO_MODEL,
            "stop_reason": "end_turn",
            "usage": {
                "input_tokens": 12,
                "output_tokens": 950,
                "cache_read_input_tokens": 41200,
                "cache_creation_input_tokens": 2300,
            },
        }
        now = iso_time(time.time_ns())
        self.add_row({"type": "assistant", "timestamp": now, "message": message})

    def end(self) -> None:
        """What the client adds at a session's end: its own ledger."""
        ledger = {
            "inputTokens": 12,
            "outputTokens": 950,
            "cacheReadInputTokens": 41200,
            "cacheCreationInputTokens": 2300,
        }
        models = {DEMO_MODEL: ledger}
        self.add_row({"type": "cost-state", "totalCostUSD": 0.06, "modelUsage": models})

    def add_row(self, row: Fields) -> None:
        """Append a row to the transcript."""
        with open(self.transcript, "a", encoding="utf-8") as file:
            file.write(encode_json(row) + "\n")

    def play(self, name: str) -> tuple[Fields, Fields, str]:
        """Run the hook as Claude Code does: (event, ping, how long that took)."""
        import queue
        import subprocess

        if name == "Stop":
            self.work()
        if name == "SessionEnd":
            self.end()
        event, begun = sample(name, self.transcript), time.monotonic()
        subprocess.run(
            [sys.executable, "-ESc", IMPORT],
            input=encode_json(event).encode(),
            env=self.environ,
            cwd=self.hooks,
            check=True,
        )
        took_ms = (time.monotonic() - begun) * 1000
        try:
            at, ping = self.receiver.arrived.get(timeout=ARRIVES_S)
        except queue.Empty:
            raise Skipped("a ping did not arrive") from None
        after_ms = (at - begun) * 1000
        times = f"{took_ms:.0f} ms in the hook, delivered after {after_ms:.0f} ms"
        return event, ping, times

    def show(self, name: str) -> None:
        """Play an event; print what was handed over, what became of it, what left."""
        import json
        import textwrap

        event, ping, times = self.play(name)
        print(f"{name}: {times}")
        for field, value in event.items():
            if field != "hook_event_name":
                print(f"  {field:24}{fate(field, value, ping)}")
        body = json.dumps(ping)
        lines = textwrap.wrap(
            body, WIDTH - 9, break_long_words=False, break_on_hyphens=False
        )
        print("  left " + "\n       ".join(lines) + "\n")

    def outage(self) -> None:
        """The receiver goes away, and is back in a second: nothing is lost."""
        import threading

        self.receiver.stop()
        threading.Timer(1, self.receiver.start).start()
        times = self.play("StopFailure")[2]
        print(f"The tracker was away for a second. StopFailure: {times}.")


def fate(name: str, value: object, ping: Fields) -> str:
    """What was handed over in a field of an event, and what became of it."""
    import json

    text = json.dumps(value)
    if ping.get(name) == value:
        return text
    room = WIDTH - 48
    text = text if len(text) <= room else text[: room - 3] + "..."
    struck = f"{STRUCK}{text}{PLAIN}" if in_colour() else f"~~{text}~~"
    if name + "_hash" in ping:
        return f"{struck} only its hash left"
    if name + "_chars" in ping:
        return f"{struck} only its length left"
    return f"{struck} stayed home"


def demo(options: Namespace) -> int:
    """show, on this machine only, what leaves of an event and what stays"""
    import tempfile

    names = list(SAMPLES) if options.all else list(SAMPLES)[:DEMO_EVENTS]
    directory = tempfile.mkdtemp("telemhq")
    try:
        scene = Demo(directory)
        scene.prepare()
        print(
            "Claude Code hands an event to the hook; a tracker on this machine gets the"
        )
        print("ping. What is struck out was handed over, and did not leave.\n")
        for name in names:
            scene.show(name)
        scene.outage()
        wait_for_end(scene.state_dir)
        scene.receiver.stop()
    finally:
        remove_tree(directory)
    print(f"To install it: python3 {SCRIPT} install")
    return 0


# -- Commands: sent, report ------------------------------------------------------------

GROUPS = ("day", "project", "model", "session")
BAR_LEAST, KEY_MOST = 6, 30  # columns
SUMS = ("tool_calls", "tool_failures", *TOKENS, "cost_usd")  # the pings' own names
COLUMNS = (  # of the table: heading, name in a row; the last to go when it is narrow
    ("turns", "turns"),
    ("failed", "failed"),
    ("tools", "tool_calls"),
    ("input", "input_tokens"),
    ("output", "output_tokens"),
    ("cached", "cached_input_tokens"),
    ("written", "cache_creation_input_tokens"),
    ("tokens", "total_tokens"),
    ("cost $", "cost_usd"),
)
NARROW = [COLUMNS[n] for n in (6, 5, 4, 3, 2, 1)]  # where there is no room, these go


class Delivery:
    """One line of sent.jsonl. at: ISO 8601, UTC. answer: the tracker's. ping: what it
    told."""

    def __init__(self, found: Fields) -> None:
        """ValueError: it is none, or was cut off."""
        self.at, self.answer = str(found.get("at")), str(found.get("answer"))
        if not isinstance(found.get("ping"), dict):
            raise ValueError("no ping")
        self.ping: Fields = found["ping"]
        self.others = found.get("bodies")

    def bodies(self) -> list[str]:
        """What was sent: the ping, or what another tracker gets of it."""
        if isinstance(self.others, list):
            return list(map(str, self.others))
        return [encode_json(self.ping)]


def outboxes_named(name: str | None) -> list[Outbox]:
    """The outboxes to tell of: by kind or directory's name, TelemHQ's by default."""
    kept = outboxes(Surroundings().settings.state_dir)
    wanted = name or TelemHQ.kind
    found = [outbox for outbox in kept if wanted in (outbox.name(), outbox.kind())]
    if name and not found:
        known = ", ".join(outbox.name() for outbox in kept)
        raise Skipped(f"there is no destination {name}; there are: {known or 'none'}")
    return found


def deliveries(kept: list[Outbox]) -> list[Delivery]:
    """What was delivered, the oldest first, each ping once: after a crash it may stand
    there twice."""
    import json

    found: dict[str, Delivery] = {}
    for outbox in kept:
        for name in ("sent.jsonl.1", "sent.jsonl"):
            try:
                raw = read_file(outbox.path(name), 2 * SENT_MAX_BYTES)
            except (OSError, ValueError):
                continue
            for line in raw.splitlines():
                try:
                    delivery = Delivery(json.loads(line))
                    found.setdefault(str(delivery.ping["event_id"]), delivery)
                except (ValueError, KeyError, AttributeError):
                    continue  # cut off by a full disk
    return sorted(found.values(), key=lambda delivery: delivery.at)


def sent(options: Namespace) -> int:
    """print the last pings that left, as they were sent, with time and answer"""
    found = deliveries(outboxes_named(options.destination))
    for delivery in found[-options.n :]:
        for body in delivery.bodies():
            print(delivery.at, delivery.answer, body)
    if not found:
        print("Nothing was delivered yet.", file=sys.stderr)
    return 0


def day_of(timestamp: object) -> str:
    """The day here (not in UTC) of a ping's timestamp."""
    seconds = seconds_of(timestamp)
    if not seconds:
        return "unknown"
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def shares(ping: Fields, by: str) -> list[tuple[str, Fields]]:
    """[(row's name, what of the ping counts there)]; several with several models."""
    models = ping.get("models")
    if by == "day":
        return [(day_of(ping.get("timestamp")), ping)]
    if by == "session":
        return [(str(ping.get("session_id", "unknown")), ping)]
    if by == "project" or not isinstance(models, dict):
        return [(str(ping.get(by, "unknown")), ping)]
    rest = {name: value for name, value in ping.items() if name not in TOKENS}
    found = [(str(ping.get("model", "unknown")), rest)]
    for model, counts in models.items():
        if isinstance(counts, dict):
            billed = [counts[name] for name in TOKENS[:4] if number(counts.get(name))]
            found.append((model, {"total_tokens": sum(billed), **counts}))
    return found


def rows_of(found: list[Delivery], by: str, since: str) -> list[Fields]:
    """One row for each day, project, model or session, in order; `since`: a day."""
    rows: dict[str, Fields] = {}
    for delivery in found:
        if since and day_of(delivery.ping.get("timestamp")) < since:
            continue
        for key, part in shares(delivery.ping, by):
            row = rows.setdefault(key, {by: key, "turns": 0, "failed": 0})
            row["turns"] += part.get("event") in ("Stop", "StopFailure")
            row["failed"] += part.get("status") == "failed"
            for name in SUMS:
                value = part.get(name, 0)
                row[name] = row.get(name, 0) + (value if number(value) else 0)
    for row in rows.values():
        row["cost_usd"] = round(row["cost_usd"], 6)
    return [rows[key] for key in sorted(rows)]


def short_number(value: float) -> str:
    """`950`, `41.2k`, `3.5M`."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= 10 * unit or (value >= unit and unit > 10**3):
            return f"{value / unit:.1f}{name}"
    return f"{value:.0f}"


class Table:
    """A report for a terminal of that width. lines: the rows, and their sums. columns:
    those that have room. exact: whether numbers are written in full."""

    def __init__(self, rows: list[Fields], by: str, width: int) -> None:
        total: Fields = {by: "in all"}
        for _, name in COLUMNS:
            total[name] = sum(row[name] for row in rows)
        self.rows, self.by, self.width = rows, by, width
        self.lines = [*rows, total]
        self.columns, self.exact = list(COLUMNS), True
        longest = max(len(str(row[by])) for row in self.lines)
        self.key_width = min(KEY_MOST, longest)
        self.exact = self.bar_width() >= BAR_LEAST
        for column in NARROW:  # these go first
            if self.bar_width() < BAR_LEAST:
                self.columns.remove(column)
        self.bar_columns = max(0, self.bar_width())

    def cell(self, row: Fields, name: str) -> str:
        """A value of a row, for a person."""
        if name == "cost_usd":
            return f"{row[name]:.2f}"
        return f"{row[name]:,}" if self.exact else short_number(row[name])

    def column_width(self, heading: str, name: str) -> int:
        """How wide a column is, with the gap before it."""
        cells = [self.cell(row, name) for row in self.lines]
        return 2 + max(len(heading), *map(len, cells))

    def bar_width(self) -> int:
        """What is left for the bars."""
        columns = sum(self.column_width(*column) for column in self.columns)
        return self.width - self.key_width - columns - 1

    def key(self, row: Fields) -> str:
        """What a row is called, as wide as the column."""
        text = clean(str(row[self.by]))
        if len(text) > self.key_width:
            text = text[: self.key_width - 1] + "~"
        return text.ljust(self.key_width)

    def bar(self, row: Fields, most: float) -> str:
        """A row's tokens, as a bar; `most` fill all there is."""
        length = self.bar_columns * row["total_tokens"] / most if most else 0
        return printable("█", "#") * round(length)

    def print(self) -> None:
        """Print the heading, the rows with their bars, and the sums."""
        wide = {name: self.column_width(head, name) for head, name in self.columns}
        heads = [head.rjust(wide[name]) for head, name in self.columns]
        print(self.by.ljust(self.key_width) + "".join(heads))
        most = max(row["total_tokens"] for row in self.rows)
        for row in self.lines:
            cells = [self.cell(row, name).rjust(wide[name]) for name in wide]
            line = self.key(row) + "".join(cells)
            if row is not self.lines[-1]:
                line += " " + self.bar(row, most)
            print(line.rstrip())


def report(options: Namespace) -> int:
    """add up what was delivered, by day, project, model or session"""
    import json
    import shutil

    kept = outboxes_named(options.destination)
    since = ""
    if options.days:
        noon = time.mktime((*time.localtime()[:3], 12, 0, 0, 0, 0, -1))
        since = time.strftime(
            "%Y-%m-%d", time.localtime(noon - 86400 * (options.days - 1))
        )
    rows = rows_of(deliveries(kept), options.by, since)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    if rows:
        Table(rows, options.by, shutil.get_terminal_size().columns).print()
    else:
        print("Nothing was delivered in that time.")
    waiting = sum(len(outbox.waiting()) for outbox in kept)
    if waiting:
        print(f"Not in it: {counted(waiting, 'ping')} still to be delivered.")
    for outbox in kept:
        for reason, count in sorted(outbox.state().losses.items()):
            print(f"Not in it: lost: {count}, {reason}.")
    return 0


# -- Commands: the command line --------------------------------------------------------


def at_least_one(text: str) -> int:
    """A number of days or lines."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


class CommandLine:
    """The parser of the command line, command by command."""

    def __init__(self) -> None:
        import argparse

        self.parser = argparse.ArgumentParser(
            prog=SCRIPT,
            usage=f"{SCRIPT} COMMAND [OPTION ...]",
            description="Tell a TelemHQ tracker what Claude Code did, "
            "never what was said.",
            epilog=epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,  # it would stand before the commands
        )
        self.commands = self.parser.add_subparsers(
            title="commands", metavar="COMMAND", prog=SCRIPT
        )
        version, told = f"telemhq_ping {__version__}", "print the version"
        group = self.parser.add_argument_group("options")
        said = "print this, or COMMAND's"
        group.add_argument("-h", "--help", action="help", help=said)
        group.add_argument("--version", action="version", version=version, help=told)

    def add(self, run: Callable[[Namespace], int]) -> ArgumentParser:
        """Add a command; its function is its name, its docstring its help."""
        said = run.__doc__ or ""
        command: ArgumentParser = self.commands.add_parser(
            run.__name__, help=said, description=said[:1].upper() + said[1:] + "."
        )
        command.set_defaults(run=run)
        return command

    def switch(self, command: ArgumentParser, name: str, said: str) -> None:
        """Add an option without a value."""
        command.add_argument(name, action="store_true", help=said)


def epilog() -> str:
    """The variables and files, from this file's docstring."""
    text = (__doc__ or "").partition("Variables\n")[2].partition("Exit status")[0]
    return f"variables:\n{text}\nThe README has the rest." if text else ""


def command_line() -> ArgumentParser:
    """All commands; of what is parsed, `run` is the command's function."""
    line = CommandLine()
    project = "in that project's settings.local.json, instead of yours"
    line.switch(line.add(demo), "--all", "show every kind of event")
    command = line.add(preview)
    said = "a sample; without it an event is read from stdin"
    command.add_argument("event", nargs="?", choices=sorted(SAMPLES), help=said)
    said = "the requests that this tracker gets, instead of the ping"
    command.add_argument("--destination", metavar="NAME", help=said)
    command = line.add(install)
    command.add_argument("--url", help="the ping URL, to be kept in settings.json")
    line.switch(command, "--tools", f"register tool activity, too: {TOOLS}")
    command.add_argument("--project", metavar="DIR", help=project)
    line.switch(command, "--dry-run", "show what would change, and change nothing")
    line.switch(command, "--yes", "ask nothing")
    command = line.add(doctor)
    line.switch(command, "--send", "send one real ping, with the event Test")
    line.switch(command, "--clear", "forget the losses that you have seen")
    line.switch(command, "--run-all", "run commands of the project's settings, too")
    which = "its kind or directory; TelemHQ's by default"
    command = line.add(sent)
    command.add_argument("-n", type=at_least_one, default=20, help="how many (20)")
    command.add_argument("--destination", metavar="NAME", help=which)
    command = line.add(report)
    said = "one row for each"
    command.add_argument("--by", choices=GROUPS, default="day", help=said)
    said = "only the last N, today included"
    command.add_argument("--days", type=at_least_one, metavar="N", help=said)
    command.add_argument("--destination", metavar="NAME", help=which)
    line.switch(command, "--json", "a list of objects instead of a table")
    said = "also what waits for a former URL"
    line.switch(line.add(flush), "--adopt", said)
    command = line.add(uninstall)
    command.add_argument("--project", metavar="DIR", help=project)
    line.switch(command, "--yes", "remove pings that wait, too")
    return line.parser


def main(arguments: list[str]) -> int:
    """Run a command; the exit status."""
    if sys.version_info < (3, 8):
        print(f"{SCRIPT} needs Python 3.8 or newer", file=sys.stderr)
        return 1
    os.umask(0o077)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="replace")  # a terminal that knows no such character
    try:
        options = command_line().parse_args(arguments or ["--help"])
        if not hasattr(options, "run"):
            options = command_line().parse_args(["--help"])
        status: int = options.run(options)
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        lacks = f"this Python lacks the module {error.name}"
        print(f"{SCRIPT}: {lacks}; take a whole one", file=sys.stderr)
        return 1
    except BrokenPipeError:  # head(1) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (Skipped, OSError, EOFError, ValueError) as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    if sys.argv[1:] or os.isatty(0):
        sys.exit(main(sys.argv[1:]))
    hook()
