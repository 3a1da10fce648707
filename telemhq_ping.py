#!/usr/bin/env python3
"""Tell a TelemHQ tracker what Claude Code did, never what was said.

A hook script for Claude Code: one file, standard library only, Python 3.8 to 3.15.

What runs when
    hook()      what the settings' command calls, with an event on stdin: makes it a
                ping, puts that into the outbox, starts a sender, exits. No network.
    sender()    detached, at most one per destination: POSTs what waits, the oldest
                first; ends when the outbox is empty, or after 60 s without news.
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
    transcript. All that is written is below $TELEMHQ_STATE_DIR, else telemhq/ in
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


def use_signals(work: Callable[[Any], object]) -> bool:
    """Do something with the module signal; whether that could be done. First with the
    private one behind it, which is there at once: the public one takes 2 ms."""
    for name in ("_signal", "signal"):
        try:
            work(__import__(name))
            return True
        except Exception:  # noqa: BLE001 - that module has changed
            continue
    return False


# Claude Code runs a hook's command; a Ctrl-C in its terminal is not meant for us, and
# would be a traceback. A command, which a person runs, it ends. And to look for garbage
# would take a twentieth of a hook's time; a sender does it.
imported = __name__ != "__main__" and sys.flags.no_site and sys.argv[:1] == ["-c"]
if imported or (__name__ == "__main__" and len(sys.argv) < 2):
    use_signals(lambda signals: signals.signal(signals.SIGINT, signals.SIG_IGN))
    gc.disable()

import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from http.server import HTTPServer
    from queue import Queue
    from ssl import SSLContext
    from typing import Any, Callable, Dict, Iterator, NoReturn
    from urllib.request import OpenerDirector

    Fields = Dict[str, Any]  # of an event, a ping, a row: what JSON's objects hold
    Shape = Callable[[object], bool]
    Tell = Callable[[str], None]  # says a line to a person, or swallows it
    ReadSecret = Callable[[str], str]  # what a file holds that only its owner can read

__version__ = "1.1.0"

SCRIPT = "telemhq_ping.py"

STDIN_WAIT_S = 5.0  # a stdin that is never closed; Claude Code kills us at 10
STDIN_MAX_BYTES = 256 << 20  # events hold whole files; beyond this it is none
FOREGROUND_S = 8.0  # delivery while the hook waits, in all; below its timeout of 10
LIFE_S = 60.0  # a sender's: longer than a restart of the tracker
LINGER_S = 5.0  # a sender's wait for the next tool event: they come some seconds apart
LOOK_S = 0.1  # between a waiting sender's looks at the outbox; 10 us each
TIMEOUT_S = (10.0, 1.0, 30.0)  # one socket operation: default, least, most
DEADLINE = 1.5  # a whole request's time in timeouts: urllib bounds operations only
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
SUSPECT_PAUSE_S = 300.0  # between two tries of a ping that has been found at fault
SUSPECTS_MAX = 200  # remembered; more than any pass makes
WITNESS_REFUSALS = 25  # set aside on one witness's word, before another is heard
POISON_CHARGES, POISON_AGE_S = 8, 3600.0  # both: neither a burst nor an outage blames
PACE_PINGS, PACE_S = 25, (30.0, 90.0)  # after an outage: pings a pass, then a pause
LOG_MAX_BYTES = 256 << 10  # some 2,000 passes
SENT_MAX_BYTES = 5 << 20  # some 5,000 pings; with the file before it, 10,000


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
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception:  # noqa: BLE001 - not JSON, or that module has changed
        pass
    from json import JSONDecoder

    try:
        return JSONDecoder(strict=False, parse_int=int_or_none).raw_decode(text)[0]
    except RecursionError:
        raise ValueError("nested too deeply") from None


def find_quoter() -> Callable[[str], str]:
    """What makes a text a JSON string, in ASCII."""
    try:
        from _json import encode_basestring_ascii

        if encode_basestring_ascii('"') == '"\\""':
            return encode_basestring_ascii
    except Exception:  # noqa: BLE001 - that module has changed, or is not there
        pass
    from json import dumps

    return dumps


def encode_json(value: object) -> str:
    """`value` (dict, list, str, bool, None, finite number) as compact ASCII JSON."""
    return encoded(value, find_quoter())


def encoded(value: object, quoted: Callable[[str], str]) -> str:
    """The same, with what quotes a text."""
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
        pass
    from hashlib import sha256

    return sha256(raw).hexdigest()


def path_hash(path: str, key: str) -> str:
    """First 12 hex of the hash of a path; `key` may be empty."""
    secret = key.encode("utf-8", "surrogateescape")
    return sha256_hex(path.encode("utf-8", "surrogatepass"), secret)[:12]


DIGITS, LOWER = "0123456789", "abcdefghijklmnopqrstuvwxyz"
LETTERS_DIGITS = frozenset(DIGITS + LOWER + LOWER.upper())
IDENTIFIER = LETTERS_DIGITS.union("_.:-")


def identifier(value: object, more: str = "") -> bool:
    """1 to 128 letters, digits and _ . : - (and `more`), a letter or digit first."""
    if not isinstance(value, str) or not 0 < len(value) <= 128:
        return False
    allowed = IDENTIFIER.union(more) if more else IDENTIFIER
    return value[0] in LETTERS_DIGITS and allowed.issuperset(value)


def number(value: object) -> bool:
    """A finite number from 0 up to 2^53, which every JSON reader keeps exact."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value < 1 << 53  # of NaN that is false


def boolean(value: object) -> bool:
    """True or False."""
    return isinstance(value, bool)


def all_of(value: object, characters: str, longest: int) -> bool:
    """A text of these characters only, 1 to `longest` of them."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= longest
        and not value.strip(characters)
    )


def clean(text: str, longest: int = 128) -> str:
    """`text` without control characters and lone surrogates, cut."""
    return "".join(
        character
        for character in text
        if not (
            character < " "
            or "\x7f" <= character <= "\x9f"
            or "\ud800" <= character <= "\udfff"
        )
    )[:longest]


def iso_time(ns: int) -> str:
    """Nanoseconds since 1970 as ISO 8601, UTC, with milliseconds."""
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9))
    return f"{day}.{ns // 10**6 % 1000:03d}Z"


# -- Settings --------------------------------------------------------------------------

PLUGIN_URL = "CLAUDE_PLUGIN_OPTION_PING_URL"  # what the plugin's user was asked for
SWITCH = {"1": 1, "yes": 1, "on": 1, "true": 1, "0": 0, "no": 0, "off": 0, "false": 0}


class Settings:
    """The TELEMHQ_ variables. `ignored`: those that make no sense, and why."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.ignored: list[str] = []
        option = environ.get(PLUGIN_URL, "")
        self.url = environ.get("TELEMHQ_PING_URL", option)
        self.hash_key = environ.get("TELEMHQ_HASH_KEY", "")
        self.debug = self.switch("TELEMHQ_HOOK_DEBUG")
        self.foreground = self.switch("TELEMHQ_FOREGROUND") or self.debug
        self.allow_http = self.switch("TELEMHQ_ALLOW_HTTP")
        self.git = self.switch("TELEMHQ_GIT")
        # For privacy's sake, what is not understood in these two means off.
        self.usage = self.switch_on("TELEMHQ_USAGE")
        self.tool_names = self.switch_on("TELEMHQ_TOOL_NAMES")
        self.project: str | None = self.choice(
            "TELEMHQ_PROJECT", "it has nothing to show", lambda v: clean(v).strip()
        )
        self.machine: str | None = self.choice(
            "TELEMHQ_MACHINE",
            "only letters, digits and _ . : - may be in it",
            lambda v: v if identifier(v) else None,
        )
        seconds = self.choice("TELEMHQ_TIMEOUT", "it is no number of seconds", duration)
        self.timeout_s: float = seconds or TIMEOUT_S[0]
        self.state_dir = self.find_state_dir()
        named = environ.get("TELEMHQ_DESTINATIONS", "").lower().split(",")
        named = list(dict.fromkeys(filter(None, map(str.strip, named))))
        self.destinations = named or ["telemhq"]

    def find_state_dir(self) -> str | None:
        """Where the state is kept; None: nothing tells where home is."""
        config = self.environ.get("CLAUDE_CONFIG_DIR") or "~/.claude"
        found: str | None = self.choice(
            "TELEMHQ_STATE_DIR", "it must be absolute", absolute
        )
        return (
            found
            or absolute(os.path.join(config, "telemhq"))
            or absolute("~/.claude/telemhq")
        )

    def choice(self, name: str, problem: str, accept: Callable[[str], Any]) -> Any:
        """What `accept` makes of a variable; None when that is nothing."""
        value = self.environ.get(name)
        if not value:
            return None
        found = accept(value)
        if found is None or found == "":
            self.ignored.append(f"{name} is ignored: {problem}")
        return found or None

    def switch(self, name: str) -> bool:
        """A variable that is 1 or 0; what is neither counts as 0."""
        return bool(
            self.choice(name, "it must be 1 or 0", lambda v: SWITCH.get(v.lower()))
        )

    def switch_on(self, name: str) -> bool:
        """A variable that is 1 unless set; what is neither 1 nor 0 counts as 0."""
        return not self.environ.get(name) or self.switch(name)


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
    authority = rest.replace("?", "/").replace("#", "/").split("/")[0]
    if "@" in authority:
        raise ValueError("it must not hold user:password@")
    host, colon, port = authority.partition(":")
    good = LETTERS_DIGITS.union("-._")
    if authority.startswith("["):  # [::1]:8080
        host, closed, port = authority[1:].partition("]")
        colon, port = port[:1], port[1:]
        good = frozenset(DIGITS + "abcdefABCDEF:.")
        if not closed or colon not in ("", ":"):
            raise ValueError("it names no host")
    if not host or not good.issuperset(host) or ".." in "." + host:
        raise ValueError("it names no host")
    if colon and not (port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        raise ValueError("its port is not a number from 1 to 65535")
    return scheme.lower(), host.lower(), port


def loopback(host: str) -> bool:
    """Whether `host` is this machine, by name or plain address."""
    if host in ("localhost", "::1"):
        return True
    parts = host.split(".")
    return (
        parts[0] == "127"
        and len(parts) == 4
        and all(part.isdigit() and int(part) < 256 for part in parts)
    )


def origin(url: str) -> str:
    """Scheme, host and port: what may be shown of a valid URL."""
    return "/".join(url.replace("?", "/").replace("#", "/").split("/")[:3])


# -- Event -> ping: the privacy gate. What is not in this section never leaves. --------


def one_line(value: object, longest: int) -> bool:
    """1 to `longest` characters, no control characters among them."""
    return isinstance(value, str) and value != "" and clean(value, longest) == value


def project_name(value: object) -> bool:
    """1 to 128 characters, no control characters among them."""
    return one_line(value, 128)


def model_name(value: object) -> bool:
    """An identifier such as claude-x@date or claude-x[1m]."""
    return identifier(value, "@[]")


def branch_name(value: object) -> bool:
    """An identifier, slashes allowed."""
    return identifier(value, "/")


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
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cache_creation_input_tokens",
    "reasoning_tokens",
    "total_tokens",
)


def token_counts(value: object) -> bool:
    """An object of TOKENS and their numbers."""
    return counts(value, TOKENS.__contains__)


def counts_by_model(value: object) -> bool:
    """An object: model's name -> its token counts."""
    return counts(value, model_name, token_counts)


# All that can ever leave: field -> the only shape it may have.
GATE: dict[str, Shape] = {}
for names, shape in (
    ("event_id event timestamp status provider tool hook_version machine", identifier),
    ("session_id prompt_id tool_name tool_use_id permission_mode effort", identifier),
    ("agent_id agent_type source reason trigger notification_type", identifier),
    ("project", project_name),
    ("model", model_name),
    ("git_branch", branch_name),
    ("error", error_code),
    ("cwd_hash transcript_path_hash", short_hash),
    ("is_interrupt stop_hook_active usage_complete", boolean),
    ("duration_ms exit_code error_chars prompt_chars", number),
    ("last_assistant_message_chars background_tasks event_bytes", number),
    ("tool_calls tool_failures interrupts cost_usd", number),
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
    return counts(value, identifier, lambda text: one_line(text, OWN_MAX_CHARS))


def message_rows(value: object) -> bool:
    """A list, bounded, of [id, model, time (ms since 1970), the counts of an API
    message in the order of TOKENS, without their total]."""
    return (
        isinstance(value, list)
        and len(value) <= ROWS_MAX
        and all(isinstance(row, list) and len(row) == 3 + 5 for row in value)
        and all(identifier(row[0], "@[]") and model_name(row[1]) for row in value)
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
    if not isinstance(fields, dict):
        return {}
    return {
        name: fields[name]
        for name in needs
        if name in fields and BESIDE[name](fields[name])
    }


def model_shown(name: object) -> str:
    """A model's name as it may leave: a router's vendor/name, an ARN is `other`."""
    return str(name) if model_name(name) else "other"


def tool_shown(name: str, tool_names: bool) -> str:
    """A tool's name as it may leave: `mcp__server__tool` may tell on its user."""
    return "mcp" if not tool_names and name.startswith("mcp__") else name


def agent_shown(agent_type: str, tool_names: bool) -> str:
    """An agent's type as it may leave: a custom one's name is its user's text."""
    if tool_names or not agent_type or agent_type in CLIENT_AGENTS:
        return agent_type
    return "custom"


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


def make_ping(
    event: Fields, settings: Settings, project: str, ns: int, event_bytes: int
) -> Fields:
    """The ping of one event. project: its name. ns: when it happened, in nanoseconds
    since 1970. event_bytes: its size on stdin."""
    name, effort = event.get("hook_event_name"), event.get("effort")
    failed = name in ("PostToolUseFailure", "StopFailure") or event.get("error")
    fields = {key: event[key] for key in COPIED if key in event}
    fields.update(error_fields(event), **ORIGIN)
    fields.update(
        event=name,
        status="failed" if failed else "success",
        project=project,
        event_id=os.urandom(16).hex(),
        timestamp=iso_time(ns),
        machine=settings.machine,
        event_bytes=event_bytes,
        effort=effort.get("level") if isinstance(effort, dict) else effort,
    )
    if isinstance(event.get("model"), str) and event["model"]:
        fields["model"] = model_shown(event["model"])
    if isinstance(event.get("tool_name"), str):
        fields["tool_name"] = tool_shown(event["tool_name"], settings.tool_names)
    if isinstance(event.get("agent_type"), str):
        fields["agent_type"] = agent_shown(event["agent_type"], settings.tool_names)
    if name == "SessionEnd":  # elsewhere it is a text
        fields["reason"] = event.get("reason")
    for key in ("cwd", "transcript_path"):
        if isinstance(event.get(key), str) and event[key]:
            fields[key + "_hash"] = path_hash(event[key], settings.hash_key)
    for key in ("prompt", "last_assistant_message"):
        if isinstance(event.get(key), str):
            fields[key + "_chars"] = len(event[key])
    if isinstance(event.get("background_tasks"), list):
        fields["background_tasks"] = len(event["background_tasks"])
    return gate(fields)


# -- Trackers: who gets what -----------------------------------------------------------
# A tracker is one class here and its name in TRACKERS; nothing else in this file knows
# it. All that it is sent is made from the gate's output: the ping, and what BESIDE lets
# through for those that need it.

SESSION_EVENTS = (  # those that open an account, and those that tokens are charged to
    "SessionStart",
    "Stop",
    "StopFailure",
    "SubagentStop",
    "SessionEnd",
)
USER_AGENT = {"User-Agent": f"telemhq-ping/{__version__}"}
JSON_BODY = {"Content-Type": "application/json", **USER_AGENT}


class Request:
    """One POST: url (secret), headers, body. (None: a GET, which records nothing.)"""

    def __init__(self, url: str, headers: dict[str, str], body: bytes | None) -> None:
        self.url, self.headers, self.body = url, headers, body


class Tracker:
    """A service that takes pings, as far as all of them are alike.

    kind: its name in TELEMHQ_DESTINATIONS. variables: what it is set up with; secrets:
    those that must never be shown. needs: what of BESIDE it is given. url: where it is;
    secret: what it knows us by. reads: how much of a 200's body says more than 200.
    Made from Settings, and of what reads a secret's file; Skipped: why there is none.
    """

    kind = ""
    variables: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    url_is_secret = False
    reads = 0
    idle = ""  # why it wants nothing here, though it is set up

    def __init__(self, url: str, secret: str = "") -> None:
        self.url, self.secret = url, secret
        self.headers = dict(JSON_BODY)
        if secret:
            self.headers["Authorization"] = f"Bearer {secret}"

    def directory_name(self) -> str:
        """Its directory's name, which tells neither the URL nor the secret."""
        known_by = "\n".join(filter(None, (self.url, self.secret)))
        return f"{self.kind}-{sha256_hex(known_by.encode())[:12]}"

    def wants(self, _: Fields) -> bool:
        """Whether a ping concerns it: others are not even queued."""
        return True

    def frozen(self, _: Fields) -> dict[str, str]:
        """What its own variables put into the bodies of a ping. It waits beside the
        ping, for the sender may be another session's, with other settings."""
        return {}

    def requests(self, ping: Fields, beside: Fields) -> list[Request]:
        """What is sent of a ping, in this order; the same bytes at every repeat."""
        raise NotImplementedError

    def refuses(self, _: bytes) -> bool:
        """Whether the beginning of a 200's body says that the ping was refused."""
        return False

    def check(self) -> Request:
        """A request that records nothing, and shows whether the tracker takes us."""
        return Request(self.url, self.headers, None)

    def post(self, path: str, fields: Fields) -> Request:
        """A request with a JSON body."""
        return Request(self.url + path, self.headers, encode_json(fields).encode())


def need_usable(url: str, allow_http: bool) -> None:
    """ValueError when `url` is no URL that a ping may go to."""
    scheme, host, _ = split_url(url)
    if scheme == "http" and not (allow_http or loopback(host)):
        raise ValueError(
            "http:// can be read on the way; use https:// (or set TELEMHQ_ALLOW_HTTP=1)"
        )


def base_url(settings: Settings, name: str, default: str = "") -> str:
    """The base URL in a variable, without a slash at its end; Skipped: unusable."""
    url = settings.environ.get(name) or default
    if not url:
        raise Skipped(f"{name} is not set")
    try:
        need_usable(url, settings.allow_http)
        if "?" in url or "#" in url:
            raise ValueError("it must be a base URL, without ? and #")
    except ValueError as error:
        raise Skipped(f"{name} is not usable: {error}") from None
    return url.rstrip("/")


def no_usage(settings: Settings) -> str:
    """Why what is made of tokens has nothing to send, "" when it has."""
    return "" if settings.usage else "TELEMHQ_USAGE=0 leaves it nothing to send"


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
        if not settings.url:
            raise Skipped(
                "TELEMHQ_PING_URL is not set; export it with your tracker's URL"
            )
        try:
            need_usable(settings.url, settings.allow_http)
        except ValueError as error:
            raise Skipped(f"TELEMHQ_PING_URL is not usable: {error}") from None
        super().__init__(settings.url)

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
    needs = ("own", "messages")
    ROWS_MAX = 1000  # more in a request: 413
    MACHINE_MAX_CHARS = 100

    def __init__(self, settings: Settings, _: ReadSecret) -> None:
        token = settings.environ.get("WIGTOKEN_TOKEN", "")
        url = base_url(settings, "WIGTOKEN_SERVER") + "/api/ingest/messages"
        super().__init__(url, secret_in(token, "WIGTOKEN_TOKEN"))
        self.idle = no_usage(settings)
        self.machine = settings.environ.get("WIGTOKEN_MACHINE") or settings.machine
        if not self.machine:
            raise Skipped("WIGTOKEN_MACHINE is not set; the server demands a name")
        if not identifier(self.machine) or ":" in self.machine:
            raise Skipped("WIGTOKEN_MACHINE may hold letters, digits and _ . - only")
        if len(self.machine) > self.MACHINE_MAX_CHARS:
            raise Skipped("WIGTOKEN_MACHINE is too long")

    def wants(self, ping: Fields) -> bool:
        """What tokens are charged to, and what opens the account."""
        return not self.idle and ping.get("event") in SESSION_EVENTS

    def frozen(self, _: Fields) -> dict[str, str]:
        """The machine's name."""
        return {"machine": str(self.machine)}

    def requests(self, _: Fields, beside: Fields) -> list[Request]:
        """The messages charged, some at a time."""
        rows = [self.row(*row) for row in beside.get("messages", ())]
        machine = beside.get("own", {}).get("machine", self.machine)
        return [
            self.post(
                "", {"machine": machine, "messages": rows[at : at + self.ROWS_MAX]}
            )
            for at in range(0, len(rows), self.ROWS_MAX)
        ]

    @staticmethod
    def row(message: str, model: str, ms: int, *counts: int) -> Fields:
        """A message as the server has it; counts: in the order of TOKENS."""
        return {
            "message_id": message,
            "model": model,
            "ts": iso_time(ms * 10**6),
            "input_tokens": counts[0],
            "output_tokens": counts[1],
            "cache_read_input_tokens": counts[2],
            "cache_creation_input_tokens": counts[3],
        }

    def check(self) -> Request:
        """No message at all."""
        return self.post("", {"machine": self.machine, "messages": []})


class Recorder(Tracker):
    """Recorder (its recipe, CLI and SDK): a request a value, four values a session,
    under a prefix that is chosen for each project. Nothing is known of how it takes a
    repeat: the comment tells one."""

    kind = "recorder"
    variables = ("RECORDER_PAT", "RECORDER_URL", "RECORDER_PREFIX")
    secrets = ("RECORDER_PAT",)
    needs = ("own", "since_end")
    URL = "https://api.recorder.nasebanal.com"
    VALUES = (
        ("/Input", "input_tokens"),
        ("/Output", "output_tokens"),
        ("/CacheRead", "cached_input_tokens"),
        ("/CacheCreate", "cache_creation_input_tokens"),
    )
    PREFIX_MAX_CHARS = 128

    def __init__(self, settings: Settings, _: ReadSecret) -> None:
        url = base_url(settings, "RECORDER_URL", self.URL) + "/api/v1/records"
        token = settings.environ.get("RECORDER_PAT", "")
        super().__init__(url, secret_in(token, "RECORDER_PAT"))
        self.idle = no_usage(settings)
        self.prefix = settings.environ.get("RECORDER_PREFIX", "").strip().rstrip("/")
        if self.prefix and not project_name(self.prefix):
            raise Skipped("RECORDER_PREFIX is not usable: it is no line of text")
        if not self.prefix:
            self.idle = "RECORDER_PREFIX is not set for this project"

    def wants(self, ping: Fields) -> bool:
        """The ends; and whatever tells that a session is there, or none that ends
        without a word would ever be told."""
        return not self.idle and ping.get("event") in SESSION_EVENTS

    def frozen(self, ping: Fields) -> dict[str, str]:
        """Where the project's values are kept."""
        return {"prefix": self.prefix.replace("{project}", str(ping.get("project")))}

    def requests(self, ping: Fields, beside: Fields) -> list[Request]:
        """What the session used, when it ends (again: since it last did)."""
        used, prefix = beside.get("since_end", {}), beside.get("own", {}).get("prefix")
        ends = ping.get("event") in ("SessionEnd", "SessionLost")
        if not (ends and prefix and any(used.values())):
            return []
        return [
            self.post(
                "",
                {
                    "name": prefix + name,
                    "unit": "tokens",
                    "data_type": "integer",
                    "chart_type": "line",
                    "value": used.get(count, 0),
                    "recorded_at": ping.get("timestamp"),
                    "comment": f"telemhq_ping {ping['event_id']}",
                },
            )
            for name, count in self.VALUES
        ]


class OTLP(Tracker):
    """OpenTelemetry: a log record a ping, OTLP/HTTP with JSON (its specification: names
    in lowerCamelCase, 64-bit integers as strings, nanoseconds). At least once:
    telemhq.event_id tells a repeat."""

    kind = "otlp"
    variables = ("TELEMHQ_OTLP_ENDPOINT", "TELEMHQ_OTLP_HEADERS")
    secrets = ("TELEMHQ_OTLP_HEADERS",)
    reads = 4096
    INFO, ERROR = 9, 17
    NAMES = (  # the ping's, the GenAI conventions' or the client's own telemetry's
        ("provider", "gen_ai.provider.name"),
        ("model", "gen_ai.response.model"),
        ("session_id", "gen_ai.conversation.id"),
        ("session_id", "session.id"),
        ("prompt_id", "prompt.id"),
        ("cached_input_tokens", "gen_ai.usage.cache_read.input_tokens"),
        ("cache_creation_input_tokens", "gen_ai.usage.cache_creation.input_tokens"),
        ("output_tokens", "gen_ai.usage.output_tokens"),
    )
    ELSEWHERE = ("input_tokens", "cost_usd", "timestamp", "event", "hook_version")

    def __init__(self, settings: Settings, _: ReadSecret) -> None:
        url = base_url(settings, "TELEMHQ_OTLP_ENDPOINT")
        super().__init__(url if url.endswith("/v1/logs") else url + "/v1/logs")
        self.secret = settings.environ.get("TELEMHQ_OTLP_HEADERS", "")
        try:
            self.headers = {**self.headers_in(self.secret), **JSON_BODY}
        except ValueError:
            text = "it must be Name=value,Name=value (%2C is a comma, %20 a space)"
            raise Skipped(f"TELEMHQ_OTLP_HEADERS is not usable: {text}") from None

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
        """The one record."""
        failed = ping.get("status") == "failed"
        record = {
            "timeUnixNano": str(ns_of_iso(ping.get("timestamp"))),
            "severityNumber": self.ERROR if failed else self.INFO,
            "eventName": f"claude_code.{ping.get('event')}",
            "attributes": list(map(self.attribute, self.named(ping))),
        }
        scope = {"name": "telemhq_ping", "version": ping.get("hook_version", "")}
        return [self.export([{"scope": scope, "logRecords": [record]}])]

    def export(self, scopes: list[Fields]) -> Request:
        """An ExportLogsServiceRequest."""
        service = self.attribute(("service.name", "claude-code"))
        resource = {"attributes": [service]}
        logs = [{"resource": resource, "scopeLogs": scopes}] if scopes else []
        return self.post("", {"resourceLogs": logs})

    def named(self, ping: Fields) -> Iterator[tuple[str, object]]:
        """A ping's fields as attributes have them; objects are laid flat."""
        if "input_tokens" in ping:
            yield "gen_ai.usage.input_tokens", all_input(ping)
        if "cost_usd" in ping:  # an attribute keeps its type, also when it is 0
            yield "telemhq.cost_usd", float(ping["cost_usd"])
        for field, value in ping.items():
            if field not in self.ELSEWHERE:
                names = [name for known, name in self.NAMES if known == field]
                for name in names or [f"telemhq.{field}"]:
                    yield from self.flat(name, value)

    def flat(self, name: str, value: object) -> Iterator[tuple[str, object]]:
        """An attribute, or those of an object's inner values."""
        if not isinstance(value, dict):
            yield name, value
            return
        for key, inner in value.items():
            yield from self.flat(f"{name}.{key}", inner)

    @staticmethod
    def attribute(pair: tuple[str, object]) -> Fields:
        """A KeyValue."""
        name, value = pair
        found: Fields = {"stringValue": value}
        if isinstance(value, bool):
            found = {"boolValue": value}
        elif isinstance(value, int):
            found = {"intValue": str(value)}
        elif isinstance(value, float):
            found = {"doubleValue": value}
        return {"key": name, "value": found}

    def refuses(self, body: bytes) -> bool:
        """A partial success rejects the one record: it must not be sent again."""
        try:
            partial = decode_json(body.decode("utf-8", "replace"))["partialSuccess"]
            return int(partial["rejectedLogRecords"]) > 0
        except (ValueError, KeyError, TypeError):
            return False

    def check(self) -> Request:
        """An export of nothing."""
        return self.export([])


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
    SYSTEM = (  # event, kind, what of the ping its payload has
        ("Notification", "notification", ("notification_type",)),
        ("PreCompact", "pre_compact", ("trigger",)),
        ("SubagentStop", "subagent_stop", ("agent_id", "agent_type")),
    )
    TOOL = ("PostToolUse", "PostToolUseFailure")
    EXECUTION = ("Stop", "StopFailure")
    SESSION = ("SessionStart", "Stop", "SessionEnd", "SessionLost")

    def __init__(self, settings: Settings, read_secret: ReadSecret) -> None:
        if SWITCH.get(settings.environ.get("CLAUDE_METRICS_DISABLED", "").lower()):
            raise Skipped("CLAUDE_METRICS_DISABLED is set")
        url = base_url(settings, "CLAUDE_METRICS_API_URL", self.URL) + "/events"
        token = settings.environ.get("CLAUDE_METRICS_API_TOKEN", "")
        if not token:
            try:
                token = read_secret(self.TOKEN_FILE)
            except OSError as error:
                text = f"is not set, and {self.TOKEN_FILE} of no use: {error.strerror}"
                raise Skipped(f"CLAUDE_METRICS_API_TOKEN {text}") from None
        super().__init__(url, secret_in(token, "CLAUDE_METRICS_API_TOKEN"))
        # Without it, Laravel answers what it does not accept with a redirect.
        self.headers["Accept"] = "application/json"

    def wants(self, ping: Fields) -> bool:
        """The events that it has a place for."""
        event = ping.get("event")
        known = (*self.TOOL, *self.EXECUTION, *self.SESSION)
        return event in known or any(event == name for name, _, _ in self.SYSTEM)

    def requests(self, ping: Fields, beside: Fields) -> list[Request]:
        """One of each kind that the event is."""
        event, found = ping.get("event"), []
        if event in self.EXECUTION or ping.get("total_tokens"):
            found.append(self.post("/execution", self.execution(ping)))
        if event in self.TOOL:
            found.append(self.post("/tool", self.tool(ping)))
        for name, kind, fields in self.SYSTEM:
            if name == event:
                payload = {field: ping[field] for field in fields if field in ping}
                system = {"kind": kind, "payload": payload}
                found.append(
                    self.post("/system", {**self.common(ping, "/system"), **system})
                )
        if event in self.SESSION:
            found.append(self.post("/session", self.session(ping, beside)))
        return found

    @staticmethod
    def common(ping: Fields, path: str) -> Fields:
        """What every kind but a session's begins with; event_id is a UUID, and another
        one for each request of a ping."""
        key = sha256_hex(f"{ping['event_id']}{path}".encode())
        uuid = f"{key[:8]}-{key[8:12]}-4{key[13:16]}-8{key[17:20]}-{key[20:32]}"
        return without_none(
            event_id=uuid,
            session_id=ping.get("session_id"),
            turn_id=ping.get("prompt_id"),
            permission_mode=ping.get("permission_mode"),
            client_meta={"client": f"telemhq_ping {ping.get('hook_version')}"},
        )

    def execution(self, ping: Fields) -> Fields:
        """A turn, or what tokens went to behind one. response_text: null, which the
        plugin sends when it has none."""
        tools = ping.get("tools", {}).items()
        fields = without_none(
            message_length=ping.get("last_assistant_message_chars"),
            tools_used=[{"name": name, "count": calls} for name, calls in tools],
            tokens_in=all_input(ping) if "input_tokens" in ping else None,
            tokens_out=ping.get("output_tokens"),
            cache_read_tokens=ping.get("cached_input_tokens"),
            cache_creation_tokens=ping.get("cache_creation_input_tokens"),
            thinking_tokens=ping.get("reasoning_tokens"),
            model=ping.get("model"),
            duration_ms=ping.get("duration_ms"),
            stop_reason=ping.get("error"),
            status=ping.get("status"),
        )
        return {**self.common(ping, "/execution"), "response_text": None, **fields}

    def tool(self, ping: Fields) -> Fields:
        """A tool's call."""
        fields = without_none(
            tool_name=ping.get("tool_name"),
            success=ping.get("status") == "success",
            duration_ms=ping.get("duration_ms"),
            error_class=ping.get("error"),
            subagent_type=ping.get("agent_type"),
        )
        return {**self.common(ping, "/tool"), **fields}

    def session(self, ping: Fields, beside: Fields) -> Fields:
        """A session as it stands: known by its id, each such request replaces it."""
        event, at, totals = ping["event"], ping.get("timestamp"), beside.get("totals")
        ends = event in ("SessionEnd", "SessionLost")
        common = self.common(ping, "/session")
        fields = without_none(
            session_id=common.get("session_id"),
            client_meta=common["client_meta"],
            started_at=at if event == "SessionStart" else None,
            ended_at=at if ends else None,
            exit_kind=ping.get("reason", "lost") if ends else None,
        )
        if totals:
            fields.update(
                tokens_in_total=all_input(totals),
                tokens_out_total=totals.get("output_tokens", 0),
                tool_calls_total=totals.get("tool_calls", 0),
            )
        return fields

    def check(self) -> Request:
        """A GET where only POSTs are taken."""
        return Request(self.url + "/session", self.headers, None)


def without_none(**fields: object) -> Fields:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


def all_input(counts: Fields) -> int:
    """All tokens that went in, cached or not, which TelemHQ's names tell apart."""
    names = ("input_tokens", "cached_input_tokens", "cache_creation_input_tokens")
    return sum(int(counts.get(name, 0)) for name in names)


def ns_of_iso(text: object) -> int:
    """The inverse of iso_time(); 0 when it is no such time."""
    from calendar import timegm

    try:
        seconds, _, ms = str(text).rstrip("Z").partition(".")
        when = time.strptime(seconds, "%Y-%m-%dT%H:%M:%S")
        return timegm(when) * 10**9 + int(ms or 0) * 10**6
    except ValueError:
        return 0


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


def read_secret(path: str) -> str:
    """What a file (~ is home) holds that only its owner can read; else OSError."""
    fd = os.open(absolute(path) or "", os.O_RDONLY | NO_WAIT)
    try:
        found = os.fstat(fd)
        if os.name == "posix" and (
            found.st_mode & 0o077 or found.st_uid != os.geteuid()
        ):
            raise PermissionError(1, "others can read it, chmod 600 mends that")
        return os.read(fd, SECRET_MAX_BYTES).decode("ascii", "replace")
    finally:
        os.close(fd)


def write_object(path: str, value: Fields) -> None:
    """Make `path` hold `value` as JSON."""
    write_file(path, encode_json(value).encode())


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


def ns_of(path: str) -> int:
    """The time in a ping's path or name, nanoseconds since 1970."""
    return int(os.path.basename(path)[:20])


class Lock:
    """A destination's lock, held. fd: -1 when there can be none."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Leave it to the sender that was given it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def release(self) -> None:
        """Give it back, also from a hook just ending that still shares it."""
        if self.fd < 0:
            return
        try:
            if os.name == "posix":
                import fcntl

                fcntl.flock(self.fd, fcntl.LOCK_UN)
            os.close(self.fd)
        except OSError:
            pass  # closed already
        self.fd = -1


def try_lock(fd: int) -> bool:
    """Lock an open file; whether nobody else holds it. The kernel frees it at its
    holder's death. An error other than "busy" counts as free: rather one ping twice
    under its id than all of them never."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            return error.errno not in (13, 0)  # EACCES; under Wine none is set
        return True
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


class Suspect:
    """A ping that failed and may be at fault. charges: how often a witness was
    delivered where it was not. tried_at: the last time, seconds since 1970."""

    def __init__(self, charges: int, tried_at: float) -> None:
        self.charges, self.tried_at = charges, tried_at

    def is_due(self, now: float) -> bool:
        """Whether it may be tried again; one not yet charged always may."""
        waited = 0 <= now - self.tried_at < SUSPECT_PAUSE_S
        return not (self.charges and waited)


class State:
    """state.json: what a destination remembers from pass to pass.

    failures: passes that failed, in a row. set_at, not_before: when the back-off was
    set, and ends. delivered_at, swept_at: the last delivery, the last sweep.
    recovered_at: pings older than that are an outage's backlog, of which pace_pings go
    at a time, none before paced_until. (All times: seconds since 1970, 0: never.)
    suspects: name in the outbox -> Suspect. losses: reason -> pings lost.
    verdict, problem, problem_at: of the last failure. saved: False where the disk
    refused, so that only this process knows.
    """

    NUMBERS = (
        "failures set_at not_before delivered_at swept_at recovered_at paced_until "
        "pace_pings"
    ).split()

    def __init__(self, path: str, found: Fields) -> None:
        """Whatever was found, every attribute has a value that makes sense."""
        numbers = {k: found[k] if number(found.get(k)) else 0 for k in self.NUMBERS}
        self.path = path
        self.failures = int(min(numbers["failures"], FAILURES_MAX))
        self.set_at: float = numbers["set_at"]
        self.not_before: float = numbers["not_before"]
        self.delivered_at: float = numbers["delivered_at"]
        self.swept_at: float = numbers["swept_at"]
        self.recovered_at: float = numbers["recovered_at"]
        self.paced_until: float = numbers["paced_until"]
        self.pace_pings = int(min(numbers["pace_pings"], OUTBOX_MAX_PINGS))
        self.suspects = dict(self.suspects_in(found.get("suspects")))
        losses = found.get("losses")
        losses = losses if isinstance(losses, dict) else {}
        self.losses = {k: int(n) for k, n in losses.items() if number(n)}
        problem = found.get("problem")
        problem = problem if isinstance(problem, dict) else {}
        texts = {k: v for k, v in problem.items() if isinstance(v, str)}
        self.verdict = texts.get("verdict", "")
        self.problem = texts.get("what", "")
        self.problem_at: float = problem["at"] if number(problem.get("at")) else 0
        self.saved = True

    @classmethod
    def load(cls, path: str) -> State:
        """What the file holds, or the state of one that never delivered."""
        try:
            return cls(path, read_object(path, STATE_MAX_BYTES))
        except (OSError, ValueError):
            return cls(path, {})

    @staticmethod
    def suspects_in(found: object) -> Iterator[tuple[str, Suspect]]:
        """The suspects that make sense: name -> [charges, tried_at]."""
        for name, pair in found.items() if isinstance(found, dict) else ():
            if isinstance(pair, list) and len(pair) == 2 and all(map(number, pair)):
                yield name, Suspect(int(pair[0]), pair[1])

    def save(self) -> None:
        """Write the file; a disk that refuses must not stop delivery."""
        found: Fields = {name: getattr(self, name) for name in self.NUMBERS}
        found["suspects"] = {
            name: [suspect.charges, suspect.tried_at]
            for name, suspect in self.suspects.items()
        }
        found["losses"] = self.losses
        found["problem"] = {}
        if self.problem:
            found["problem"] = {
                "verdict": self.verdict,
                "what": self.problem,
                "at": self.problem_at,
            }
        try:
            write_object(self.path, found)
            self.saved = True
        except OSError:
            self.saved = False

    def backoff_left_s(self, now: float) -> float:
        """Seconds until the back-off ends, 0 when none stands. One that was set in what
        is now the future is none: a clock that jumped must not stop delivery."""
        ends = min(self.not_before, self.set_at + RETRY_AFTER_MAX_S)
        return ends - now if self.set_at <= now < ends else 0

    def pace_left_s(self, now: float) -> float:
        """Seconds until the next part of a backlog may go."""
        left = self.paced_until - now
        return left if 0 < left <= PACE_S[1] else 0

    def suspect(self, name: str) -> Suspect:
        """The suspect of that name; a new one when there is none yet."""
        return self.suspects.setdefault(name, Suspect(0, time.time()))

    def lost(self, reason: str, count: int = 1) -> None:
        """Count pings that will never be delivered."""
        self.losses[reason] = self.losses.get(reason, 0) + count


class Record:
    """What the file of a ping that waits holds. ping: what is sent. local: what the
    sender needs and never sends. beside: what else the tracker needs, by the gate.
    accepted: how many of the ping's requests have been; the next ones go."""

    def __init__(
        self,
        ping: Fields,
        local: Fields | None = None,
        beside: Fields | None = None,
        accepted: int = 0,
    ) -> None:
        self.ping, self.local, self.beside = ping, local or {}, beside or {}
        self.accepted = accepted

    @classmethod
    def load(cls, found: Fields, needs: tuple[str, ...]) -> Record:
        """As `as_object` gave it, through the gate; ValueError: it holds no ping."""
        ping, local = found.get("ping"), found.get("local")
        accepted: Any = found.get("accepted")
        ping = gate(ping) if isinstance(ping, dict) else {}
        if "event_id" not in ping:
            raise ValueError("no ping")
        local = local if isinstance(local, dict) else {}
        beside = gate_beside(found.get("beside"), needs)
        return cls(ping, local, beside, int(accepted) if number(accepted) else 0)

    def as_object(self) -> Fields:
        """As JSON's objects have it."""
        found: Fields = {"ping": self.ping, "local": self.local}
        if self.beside:
            found["beside"] = self.beside
        if self.accepted:
            found["accepted"] = self.accepted
        return found


class Outbox:
    """A destination's directory: the pings that wait, and all else that is kept of it.

    outbox/ holds a file for each ping, named by its time and id, so that names sort by
    age. needs: what else of BESIDE its tracker is given.
    """

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

    def need_sound(self) -> None:
        """Skipped when others may have a hand in anything from telemhq/ down."""
        for name in ("..", ".", "outbox", "refused", "accounts"):
            directory = os.path.normpath(self.path(name))
            problem = unsound(directory)
            if problem:
                raise Skipped(f"{directory} {problem}; mend or remove it")

    def put(
        self, ns: int, ping: Fields, local: Fields, beside: Fields | None = None
    ) -> str:
        """Add the ping of an event of that time; its name. It is whole or not there."""
        name = f"{ns:020d}-{ping['event_id']}.json"
        content = encode_json(Record(ping, local, beside).as_object()).encode()
        write_file(self.file(name), content, make_directory=True)
        return name

    def holds_any(self) -> bool:
        """Whether a ping waits. It looks no further than to the first one, however many
        there are."""
        try:
            with os.scandir(self.path("outbox")) as entries:
                return any(self.is_ping(entry.name) for entry in entries)
        except OSError:
            return False

    def waiting(self) -> list[str]:
        """Names of the pings that wait, oldest first."""
        try:
            return sorted(filter(self.is_ping, os.listdir(self.path("outbox"))))
        except FileNotFoundError:
            return []

    @staticmethod
    def is_ping(name: str) -> bool:
        """Whether a name in outbox/ is a ping's."""
        return name[:20].isdecimal() and name[20:21] == "-" and name.endswith(".json")

    def strangers(self) -> list[str]:
        """Names in outbox/ that are no ping's. What was never finished is removed."""
        found = []
        for name in os.listdir(self.path("outbox")):
            if self.is_ping(name):
                continue
            if not name.startswith("."):
                found.append(name)
            elif age_s(self.file(name)) > UNFINISHED_S:
                remove(self.file(name))
        return found

    def record(self, name: str) -> Record:
        """What a file holds. OSError: it is gone; ValueError: it is no ping."""
        most = RECORD_MAX_BYTES if self.needs else PING_MAX_BYTES
        return Record.load(read_object(self.file(name), most), self.needs)

    def read(self, name: str) -> tuple[Fields, Fields]:
        """(ping, local) of a file. OSError: it is gone; ValueError: it is no ping."""
        record = self.record(name)
        return record.ping, record.local

    def rewrite(self, name: str, record: Record) -> None:
        """Make the ping that waits under `name` this one, as it will be sent."""
        write_object(self.file(name), record.as_object())

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

    def account_path(self, session_id: str) -> str:
        """Where it is kept what of a session was reported."""
        return self.path("accounts", sha256_hex(session_id.encode())[:16] + ".json")

    def take_lock(self) -> Lock | None:
        """The lock; None while someone else holds it. It is never deleted."""
        flags = os.O_RDWR | os.O_CREAT | NO_FOLLOW
        try:
            fd = os.open(self.path("lock"), flags, 0o600)
        except OSError:
            return Lock(-1)
        if try_lock(fd):
            return Lock(fd)
        os.close(fd)
        return None


def outbox_of(settings: Settings, tracker: Tracker) -> Outbox:
    """The outbox of a tracker; Skipped when there is no place for it."""
    if not settings.state_dir:
        raise Skipped("there is no home directory; set TELEMHQ_STATE_DIR")
    directory = os.path.join(settings.state_dir, tracker.directory_name())
    return Outbox(directory, tracker.needs)


def find_tracker(settings: Settings, name: str = "") -> Tracker:
    """The tracker whose directory has that name, by default the first that is named;
    Skipped says why there is none."""
    trackers, problems = find_trackers(settings, read_secret)
    for tracker in trackers:
        if name in ("", tracker.directory_name()):
            return tracker
    raise Skipped("; ".join(problems) or "it is no destination any more")


def outboxes(state_dir: str | None) -> list[Outbox]:
    """Every destination's outbox that there is, also of URLs no longer configured."""
    found = []
    for name in sorted(os.listdir(state_dir)) if os.path.isdir(state_dir or "") else ():
        kind, dash, short = name.rpartition("-")
        if kind and dash and len(short) == 12 and short_hash(short):
            found.append(Outbox(os.path.join(state_dir or "", name)))
    return found


# -- Hook: what Claude Code runs -------------------------------------------------------

THIS_FILE = os.path.abspath(__file__)  # now, for a hook leaves its directory


def read_stdin(keep: bool = True) -> bytes:
    """All bytes of stdin (none unless `keep`), to its end: Claude Code shows an error
    when it is closed early. Never closed, it counts as it is after STDIN_WAIT_S; beyond
    STDIN_MAX_BYTES it is none."""
    ends = time.monotonic() + STDIN_WAIT_S
    parts: list[bytes] = []
    size = 0

    def read() -> None:
        nonlocal size
        while time.monotonic() < ends and size <= STDIN_MAX_BYTES:
            part = os.read(0, 1 << 16)  # as much as a pipe holds
            if not part:
                break
            size += len(part)
            if keep:
                parts.append(part)

    if set_alarm(STDIN_WAIT_S):
        try:
            try:
                read()
            finally:
                set_alarm(0)
        except OSError:
            pass  # it is no file to read from, or the time is over
    else:
        run_in_thread(read, STDIN_WAIT_S)
    return b"".join(parts) if size <= STDIN_MAX_BYTES else b""


def set_alarm(seconds: float) -> bool:
    """Have TimeoutError raised after so many seconds, 0: no more. False where there is
    no alarm."""

    def give_up(*_: object) -> None:
        raise TimeoutError("timed out")

    def set_it(signals: Any) -> None:
        signals.signal(signals.SIGALRM, give_up)
        signals.setitimer(signals.ITIMER_REAL, seconds)

    return use_signals(set_it)


def run_in_thread(work: Callable[[], None], seconds: float) -> None:
    """Do what may wait for ever, and leave it when the time is over. For Windows, which
    has no alarm; a thread starts late when the machine is busy."""
    import _thread

    over = _thread.allocate_lock()
    over.acquire()

    def run() -> None:
        try:
            work()
        except OSError:
            pass
        finally:
            over.release()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError:  # no thread to be had
        run()
    over.acquire(True, seconds)


def inside(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or below it, whatever links lead there (/tmp is one
    on macOS), and however a file system that knows no case has it spelled."""
    top = os.path.normpath(directory).rstrip(os.sep) + os.sep
    if (os.path.normpath(path) + os.sep).startswith(top):
        return True
    if len(path) > PATH_MAX_CHARS:
        return False
    try:
        wanted = os.stat(directory)
    except OSError:
        return False
    below, here = "", os.path.realpath(path)
    while here != below:
        try:
            if os.path.samestat(os.stat(here), wanted):
                return True
        except OSError:
            pass  # removed meanwhile; what it lay in may be there
        below, here = here, os.path.dirname(here)
    return False


def main_repository(directory: str) -> str:
    """Of a git worktree its repository's name, else "". A worktree's .git is a file:
    `gitdir: REPOSITORY/.git/worktrees/NAME` (gitrepository-layout)."""
    try:
        text = read_file(os.path.join(directory, ".git"), 4096).decode()
    except (OSError, ValueError):
        return ""
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
        pass  # a NUL in it
    name = clean(name)
    return name if name.strip(" .") else "unknown"


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


def opens(path: object) -> bool:
    """Whether a path in an event may be a transcript's."""
    return (
        isinstance(path, str)
        and path.endswith(".jsonl")
        and len(path) <= PATH_MAX_CHARS
    )


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


def registered_elsewhere(event: Fields, environ: dict[str, str]) -> bool:
    """Whether, run as a plugin, a settings file runs this script for the same event."""
    if not environ.get("CLAUDE_PLUGIN_ROOT"):
        return False
    config = absolute(environ.get("CLAUDE_CONFIG_DIR") or "~/.claude") or ""
    project = os.path.join(environ.get("CLAUDE_PROJECT_DIR") or config, ".claude")
    for path in (
        os.path.join(config, "settings.json"),
        os.path.join(project, "settings.json"),
        os.path.join(project, "settings.local.json"),
    ):
        try:  # the file may be a link into somebody's dotfiles
            hooks = read_object(os.path.realpath(path), 1 << 20)["hooks"]
            groups = hooks[event["hook_event_name"]]
            if any(names_script(h["command"]) for g in groups for h in g["hooks"]):
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def sender_command(*arguments: str) -> list[str]:
    """The command of a sender: a fresh interpreter that imports this file."""
    directory, name = os.path.split(THIS_FILE)
    start = (
        "import sys; sys.path.insert(0, sys.argv[1]); __import__(sys.argv[2]).sender()"
    )
    python = [sys.executable, "-I", "-S", "-X", "lazy_imports=all"]
    if sys.pycache_prefix == os.devnull:  # there is bad bytecode that must not be used
        python += ["-X", f"pycache_prefix={os.devnull}"]
    return [*python, "-c", start, directory, name[: -len(".py")], *arguments]


def start_sender(held: dict[str, Lock], environ: dict[str, str]) -> None:
    """Start a detached sender and hand it the locks of these destinations (names of
    their directories); it outlives us. It serves the first, and starts a sender for
    each of the others: one start is all that Claude Code waits for.

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
    command = sender_command("detached", *served)
    try:
        spawn_sender(command, fds, environ)
    except (AttributeError, NotImplementedError, OSError):
        # Windows, PyPy, Termux: no posix_spawn. macOS before 10.15, old C libraries:
        # no setsid=.
        start_sender_by_subprocess(command, fds, environ)
    finally:
        for lock in held.values():
            lock.close()


def spawn_sender(command: list[str], fds: list[int], environ: dict[str, str]) -> None:
    """Start a sender without the import of subprocess, 8 ms."""
    spawn = os.posix_spawn
    try:
        inherited = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:  # a container without /proc
        inherited = list(range(256))
    for fd in inherited:
        try:
            os.set_inheritable(fd, fd in (0, 1, 2, *fds))
        except OSError:
            continue  # not open, or the listing's own
    spawn(
        command[0],
        command,
        environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)
        ],
        setsigdef=[2, 15],  # SIGINT, which we ignore, and SIGTERM, if our shell does
        setsid=True,
    )


def start_sender_by_subprocess(
    command: list[str], fds: list[int], environ: dict[str, str]
) -> None:
    """Start a sender where that cannot be had. SIGTERM: it resets it for itself."""
    import subprocess

    apart: dict[str, Any] = {"pass_fds": fds, "start_new_session": True}
    if os.name == "nt":
        apart = {"creationflags": 0x8 | 0x200}  # DETACHED_PROCESS, NEW_PROCESS_GROUP
        apart["cwd"] = os.path.dirname(THIS_FILE)
    subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environ,
        **apart,
    )


def deliver_in_foreground(
    queued: list[tuple[Outbox, str]], settings: Settings, ends: float, tell: Tell
) -> None:
    """Run a sender for each outbox and the ping put into it ("": none was), all at once
    and until `ends` (monotonic): no longer, whatever they meet, for a sender may be
    killed at any instant."""
    import subprocess

    left = max(0.5, ends - time.monotonic())
    senders = [
        subprocess.Popen(
            sender_command("foreground", f"{left:.3f}", name, outbox.name()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if settings.debug else subprocess.DEVNULL,
            env=settings.environ,
        )
        for outbox, name in queued
    ]
    ends = time.monotonic() + left
    for process, (outbox, name) in zip(senders, queued):
        try:
            process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            tell("the time is over")
        if name and os.path.exists(outbox.file(name)):
            tell("the ping waits in the outbox; a later hook delivers it")


def event_on_stdin() -> tuple[Fields, int]:
    """(event, its size in bytes); Skipped when there is none."""
    raw = read_stdin()
    try:
        event = decode_json(raw.decode("utf-8", "replace").lstrip("\ufeff"))
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise Skipped("stdin held no JSON object, which Claude Code would send")
    return event, len(raw)


def destinations(settings: Settings, tell: Tell) -> list[Tracker]:
    """The trackers that pings can go to; Skipped when there is none."""
    trackers, problems = find_trackers(settings, read_secret)
    if not trackers:
        raise Skipped("; ".join(problems))
    for text in problems:
        tell(text)
    return trackers


def ours_alone(trackers: list[Tracker], settings: Settings) -> list[Tracker]:
    """Those of a plugin's trackers that the same event is not told by the script that a
    settings file runs: that one has no URL from the plugin."""
    environ = {k: v for k, v in settings.environ.items() if k != PLUGIN_URL}
    theirs, _ = find_trackers(Settings(environ), read_secret)
    told = [tracker.directory_name() for tracker in theirs]
    found = [tracker for tracker in trackers if tracker.directory_name() not in told]
    if not found:
        raise Skipped("a settings file runs this script for the event, too")
    return found


def enqueue(
    outbox: Outbox, tracker: Tracker, ns: int, ping: Fields, local: Fields
) -> str:
    """Put a ping into a tracker's outbox, if it wants it; its name, "" when it does
    not. Skipped says why that cannot be."""
    if not tracker.wants(ping):
        return ""
    outbox.need_sound()
    beside = gate_beside({"own": tracker.frozen(ping)}, tracker.needs)
    try:
        return outbox.put(ns, ping, local, beside)
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
        read_stdin(keep=False)
        raise
    event, event_bytes = event_on_stdin()
    if registered_elsewhere(event, settings.environ):
        trackers = ours_alone(trackers, settings)
    ping = make_ping(event, settings, project_of(event, settings), ns, event_bytes)
    local = local_of(event, settings, ping)
    queued, problems = [], []
    for tracker in trackers:
        outbox = outbox_of(settings, tracker)
        try:
            name = enqueue(outbox, tracker, ns, ping, local)
        except Skipped as why:
            problems.append(str(why))
            continue
        if name or outbox.holds_any():
            queued.append((outbox, name))
    if any(name for _, name in queued):
        tell(f"{ping.get('event')} {ping['event_id']} is in the outbox")
    if settings.foreground:
        deliver_in_foreground(queued, settings, ends, tell)
    else:
        start_senders(queued, settings)
    if problems:
        raise Skipped("; ".join(problems))


def start_senders(queued: list[tuple[Outbox, str]], settings: Settings) -> None:
    """Have a sender started for each outbox where none runs and no back-off stands."""
    held = {}
    for outbox, _ in queued:
        if not outbox.state().backoff_left_s(time.time()):
            lock = outbox.take_lock()
            if lock is not None:  # busy: a sender runs, and will see the file
                held[outbox.name()] = lock
    if held:
        start_sender(held, settings.environ)


def open_missing_descriptors() -> None:
    """Open those of 0, 1, 2 that are closed: or a file of ours would be our stdin."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


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
        open_missing_descriptors()
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
    directory, name = os.path.split(THIS_FILE)
    name = f"{name[: -len('.py')]}.{sys.implementation.cache_tag}.pyc"
    return os.path.join(directory, "__pycache__", name)


def keep_others_out(directory: str) -> bool:
    """Under a umask of 000 Python makes a directory in which anybody may put bytecode:
    whether it was so. (As open as the script's own directory it may stay.)"""
    mode = os.stat(directory).st_mode
    if not mode & ~os.stat(os.path.dirname(directory)).st_mode & 0o022:
        return False
    os.chmod(directory, stat.S_IMODE(mode) & ~0o022)
    return True


def is_stale(bytecode: str) -> bool:
    """Whether the file, or a link that is its name, has changed since. Python compares
    its time and size only, which two versions may share (cp -p)."""
    changed = max(os.stat(THIS_FILE).st_ctime_ns, os.lstat(THIS_FILE).st_ctime_ns)
    return changed > os.stat(bytecode).st_ctime_ns


def is_damaged(bytecode: str) -> bool:
    """Whether it cannot be loaded. Python never recovers from a .pyc that a power cut
    has cut off: the settings' command then runs us as a script."""
    import marshal

    try:
        code = marshal.loads(read_file(bytecode, STATE_MAX_BYTES)[16:])
    except (EOFError, ValueError, TypeError):
        return True
    return not isinstance(code, type(is_damaged.__code__))


def bytecode_serves() -> bool:
    """Whether what Python has cached of this file is good. What is not is removed, or,
    where nothing can be removed, left unused from now on."""
    if sys.pycache_prefix == os.devnull:
        return True  # it is left unused
    bytecode = bytecode_path()
    try:
        opened = keep_others_out(os.path.dirname(bytecode))
        bad = is_stale(bytecode) or (__name__ == "__main__" and is_damaged(bytecode))
    except OSError:
        return True  # there is none
    if (bad or opened) and not remove(bytecode):
        sys.pycache_prefix = os.devnull
    return not bad


def hook() -> NoReturn:
    """What Claude Code runs."""
    try:
        if not bytecode_serves() and __name__ != "__main__":
            from importlib import reload

            sys.path.insert(0, os.path.dirname(THIS_FILE))
            reload(sys.modules[__name__]).hook()  # what the file holds now
    except Exception:  # noqa: BLE001
        pass  # then with what is there
    run_for_claude_code(report_event)


# ======================================================================================
# All above runs while Claude Code waits; all below in the background, in a sender.
# (Foreground and debug mode: Claude Code waits for the sender as well.)
# ======================================================================================


# -- Transcripts: rows that count ------------------------------------------------------

BLOCK_BYTES = 4 << 20  # read at once
LINE_MAX_BYTES = 8 << 20  # rows that count are some KB long
UNREAD_MAX_BYTES = 768 << 20  # more at once is skipped
STAMP_S = 0.001  # rows tell their time in milliseconds
RECENT_MAX = 16  # messages a file: only these may still get rows with larger counts
QUIET_FILE_S = 3600.0  # an agent that wrote nothing for an hour has ended
IDS_MAX = 1 << 17  # ids remembered, 1.5 MB; a very long session has 64,000
ID_CHARS = 12  # 48 bits: among IDS_MAX ids two are the same in one session of 30,000
NEEDLES = (
    b'"usage"',
    b'"is_error":true',
    b'"cost-state"',
    b'"interruptedMessageId"',
    b'"promptId"',
)
OUTLINE_NEEDLES = (b'"usage"', b'"cost-state"', b'"promptId"')
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
INTERRUPTED = "[Request interrupted by user"  # the client's words, in a row of its own
OUTPUT = 1  # the output tokens' place in COUNTS
LEDGER_CLIENTS = {  # the first versions that end a session with a cost-state row
    "cli": (2, 1, 220),  # interactive: 2.1.219 wrote none, 2.1.252 did
    "": (2, 1, 271),  # others, `-p` above all: 2.1.270 wrote none, 2.1.288 did
}


def lines_that_matter(
    fd: int, offset: int, needles: tuple[bytes, ...] = NEEDLES
) -> Iterator[tuple[int, bytes]]:
    """The whole lines behind `offset` that may hold a count, by their bytes. Yields
    (offset behind the line, line), and (offset, b"") where all before it is read."""
    os.lseek(fd, offset, os.SEEK_SET)
    rest, block = b"", os.read(fd, BLOCK_BYTES)
    while block:
        block = rest + block
        whole = block.rfind(b"\n") + 1
        found = lines_in(block, whole, needles)
        for start in sorted(found):
            yield offset + found[start], block[start : found[start]]
        rest = block[whole:]
        if len(rest) > LINE_MAX_BYTES:  # do not keep it; its end will not parse
            whole, rest = len(block), b""
        offset += whole
        yield offset, b""
        block = os.read(fd, BLOCK_BYTES)


def lines_in(block: bytes, whole: int, needles: tuple[bytes, ...]) -> dict[int, int]:
    """Where lines that hold a needle start and end, of the first `whole` bytes."""
    found: dict[int, int] = {}
    for needle in needles:
        at = block.find(needle, 0, whole)
        while at >= 0:
            start, end = block.rfind(b"\n", 0, at) + 1, block.find(b"\n", at) + 1
            # Tools' results are user rows too: most of the file, and no prompts.
            prompt = needle == b'"promptId"'
            if not prompt or block.find(b'"tool_result"', start, end) < 0:
                found[start] = end
            at = block.find(needle, end, whole)
    return found


def short_id(text: str) -> str:
    """What is kept of an id: enough to know it again."""
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


def minus(counts: list[int], less: list[int]) -> list[int]:
    """The difference, count by count."""
    return [a - b for a, b in zip(counts, less)]


def total(*parts: dict[str, list[int]]) -> list[int]:
    """The sum over all models of all `parts` (model -> counts)."""
    found = [0] * len(COUNTS)
    for part in parts:
        for counts in part.values():
            found = plus(found, counts)
    return found


def seconds_of(stamp: object) -> float:
    """A row's timestamp in seconds since 1970, 0 when it is none."""
    from datetime import datetime

    try:
        return datetime.fromisoformat(str(stamp).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0


class Row:
    """A line of a transcript that counts, or tells of a turn. What it lacks or has
    otherwise than expected raises: the format is internal to the client.

    at: when it was written, seconds since 1970, 0 when it does not tell.
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


class MessageRow(Row):
    """One content block of an API message, with the whole message's usage.

    id: short; message_id: whole. real: no words of the client's own. copied: from
    another session. calls: tool calls, id -> name. final: the turn ends with this
    message.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        message, session = fields["message"], fields.get("sessionId")
        if not message["id"]:
            raise ValueError("no id")
        self.message_id = str(message["id"])
        self.id = short_id(self.message_id)
        self.counts = counts_in(message["usage"], 1)
        model = message.get("model")
        self.real = model != "<synthetic>" and not fields.get("isApiErrorMessage")
        self.model = model_shown(model)
        self.copied = fields.get("requestSessionId", session) != session
        self.final = message.get("stop_reason") not in (None, "tool_use")
        self.calls: dict[str, object] = {}
        content = message.get("content")
        for block in content if isinstance(content, list) else ():
            if block.get("type") == "tool_use" and isinstance(block.get("id"), str):
                self.calls[short_id(block["id"])] = block.get("name")
        self.branch = fields.get("gitBranch")
        self.keeps_ledger = keeps_ledger(fields)


class UserRow(Row):
    """A prompt, results of tools, or what the client put in.

    failed: ids of the tool calls that failed. interrupt: what it is known by, "" when
    it tells of none. prompt: it begins a turn of the session; begins: of an agent.
    prompt_id: of the turn; "" from clients that do not mark it.
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
        self.begins = not (results or self.interrupt)
        self.prompt = self.begins and not (inserted or self.sidechain)
        self.prompt_id = ""
        if isinstance(fields.get("promptId"), str):
            self.prompt_id = short_id(fields["promptId"])
        self.keeps_ledger = keeps_ledger(fields)


class LedgerRow(Row):
    """The client's own sums of a session, at its end: counts by model, and the cost."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        cost = fields["totalCostUSD"]
        self.cost: float = cost if number(cost) else 0
        self.models: dict[str, list[int]] = {}
        for name, used in fields["modelUsage"].items():
            shown = model_shown(name)
            known = self.models.get(shown, [0] * len(COUNTS))
            self.models[shown] = plus(known, counts_in(used, 2))


ROWS: dict[str, type[Row]] = {
    "assistant": MessageRow,
    "user": UserRow,
    "cost-state": LedgerRow,
}


def keeps_ledger(fields: Fields) -> bool:
    """Whether the client that wrote a row ends its sessions with a ledger. One that
    does not tell its version is taken for a present one."""
    version = str(fields.get("version")).split(".")
    if len(version) != 3 or not all(part.isdecimal() for part in version):
        return True
    first = LEDGER_CLIENTS["cli" if fields.get("entrypoint") == "cli" else ""]
    return [int(part[:9]) for part in version] >= list(first)


class Outline:
    """What a transcript tells of its session's beginning and turns, up to `until`.

    begun: the first row's time. last_prompt: the last prompt's. last_run: the time of
    the first prompt behind the end of an earlier run, 0 when there was none. named:
    whether this client marks prompts' rows. spoken: whether anything was answered.
    keeps_ledger: whether this client writes ledgers.
    """

    def __init__(self, path: str, until: float, ends: float) -> None:
        self.begun = self.last_prompt = self.last_run = 0.0
        self.named = self.spoken = False
        self.keeps_ledger, ended = True, False
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            head = os.read(fd, 1 << 16)
            stamp = head.partition(b'"timestamp":"')[2].partition(b'"')[0]
            self.begun = seconds_of(stamp.decode("ascii", "replace"))
            if size > UNREAD_MAX_BYTES:
                self.spoken = True  # too much to find a prompt in
                return
            for _, line in lines_that_matter(fd, 0, OUTLINE_NEEDLES):
                marked = b'"promptId"' in line or b'"cost-state"' in line
                row = Row.parse(line) if marked else None
                self.spoken = self.spoken or b'"usage"' in line
                if isinstance(row, LedgerRow):
                    ended = True
                if isinstance(row, UserRow) and row.at <= until + STAMP_S:
                    self.named = self.named or row.prompt_id != ""
                    self.keeps_ledger = row.keeps_ledger
                    if row.prompt and row.at:
                        self.last_prompt = row.at
                        self.last_run, ended = row.at if ended else self.last_run, False
                if time.monotonic() > ends:
                    raise TimeoutError("the rest is for the next ping")
        finally:
            os.close(fd)


class Ids:
    """Ids as short hashes, in a text; beyond IDS_MAX the oldest are forgotten."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.known: dict[str, None] | None = None  # made when first asked for

    def all(self) -> dict[str, None]:
        """The ids, oldest first."""
        if self.known is None:
            starts = range(0, len(self.text), ID_CHARS)
            self.known = {self.text[at : at + ID_CHARS]: None for at in starts}
        return self.known

    def __contains__(self, key: str) -> bool:
        return key in self.all()

    def add(self, key: str) -> None:
        """Remember one more."""
        self.all()[key] = None

    def as_text(self) -> str:
        """The newest of them, as they are kept."""
        if self.known is None:
            return self.text
        return "".join(list(self.known)[-IDS_MAX:])


class Message:
    """An API message that was counted, as long as a further row of it may come.

    calls: short ids of its tool calls.
    """

    def __init__(self) -> None:
        self.counts = [0] * len(COUNTS)
        self.calls: set[str] = set()


class Transcript:
    """One of a session's transcripts, and how far it was read.

    name: "" for the session's own, else an agent's, below the session's directory.
    inode: as text, for JSON readers lose digits; "" as long as it was never open. at:
    the last row's time. begun: when its first message that counted was asked for.
    prompted_at, over_at: the last prompt's time, the last final message's. prompt_id:
    of the turn that it works in. recent: short ids of its newest messages.
    """

    KEPT = ("inode", "offset", "at", "begun", "prompted_at", "over_at", "prompt_id")

    def __init__(self, name: str) -> None:
        self.name, self.inode, self.offset = name, "", 0
        self.at = self.begun = self.prompted_at = self.over_at = 0.0
        self.prompt_id = ""
        self.recent: list[str] = []

    @classmethod
    def load(cls, name: str, found: list[Any]) -> Transcript:
        """As `as_list` gave it; ValueError when it has another form."""
        transcript = cls(name)
        for key, value in zip(cls.KEPT, found):
            text = isinstance(getattr(transcript, key), str)
            if not (isinstance(value, str) if text else number(value)):
                raise ValueError(f"no {key}")
            setattr(transcript, key, value)
        transcript.recent = list(found[len(cls.KEPT)])
        return transcript

    def as_list(self) -> list[Any]:
        """As JSON has it, but for its messages."""
        return [getattr(self, key) for key in self.KEPT]

    def is_over(self) -> bool:
        """Whether the last message has come of what it was last asked."""
        return self.over_at > 0 and self.over_at >= self.prompted_at

    def read(self, path: str, ends: float, take: Callable[[Row], bool]) -> bool:
        """Hand every row gained to `take`, until that returns False: such a row is read
        again next time. False when something was passed over.

        OSError or ValueError: it cannot be read; TimeoutError: not to its end by `ends`
        (monotonic).
        """
        fd = open_regular(path)
        try:
            found = os.fstat(fd)
            known, self.inode = self.inode, str(found.st_ino)
            if known not in ("", self.inode) or self.offset > found.st_size:
                # Replaced or shrunk: the ledger may settle it, nothing counts twice.
                self.offset = found.st_size
                return False
            if found.st_size - self.offset > UNREAD_MAX_BYTES:
                self.offset = found.st_size
                return False
            for end, line in lines_that_matter(fd, self.offset):
                row = Row.parse(line) if line else None
                if row is not None:
                    row.at = row.at or self.at
                    if not take(row):
                        return True
                    self.at = row.at
                self.offset = end
                if time.monotonic() > ends:
                    raise TimeoutError("the rest is for the next ping")
            if self.name and time.time() - found.st_mtime > QUIET_FILE_S:
                self.recent = []
            return True
        finally:
            os.close(fd)

    def rows_before(self, path: str, end: int) -> Iterator[Row]:
        """The rows of the first `end` bytes, whatever was read."""
        fd = open_regular(path)
        try:
            for offset, line in lines_that_matter(fd, 0):
                if offset > end:
                    return
                row = Row.parse(line) if line else None
                if row is not None:
                    yield row
        finally:
            os.close(fd)


# -- Accounts: tokens, charged once ----------------------------------------------------

USAGE_EVENTS = ("Stop", "StopFailure", "SubagentStop", "SessionEnd")
LAG_S = 2.0  # a turn's last row comes up to 0.1 s after its Stop fired
POLL_S = 0.05  # between two looks at a transcript that is awaited
READ_S = 20.0  # reading for one ping; the rest is for the session's next
OPEN_TRIES = 4  # of a transcript that cannot be opened, however old the event is
QUIET_S = DAY_S = 86400.0  # a session without a word for a day is lost
ACCOUNT_MAX_S = 30 * DAY_S  # then an account is dropped
ACCOUNT_MAX_BYTES = 16 << 20  # 64,000 messages of 250 agents: 2 MB
TRANSCRIPTS_MAX = 10000  # of a session; a busy one has some hundred
CHARGED_MAX = 32  # charges remembered, until the ping's own file has them
NAMES_MAX = 100  # models, and tools, told apart in one account
PROMPTS_MAX = 8  # times of prompts remembered: events may come late
ABSENT, FAILED, FAILED_AGENT, PART = "absent", "failed", "agent", "part"  # a reading


class Usage:
    """What was read and not yet charged. models: model -> counts, of which some may be
    negative, when too much was charged before. tools: name -> calls. rows: for trackers
    that need it, short id of a message -> [its id, model, time in ms, its counts]."""

    NUMBERS = ("tool_calls", "tool_failures", "interrupts")

    def __init__(self) -> None:
        self.models: dict[str, list[int]] = {}
        self.tools: dict[str, int] = {}
        self.rows: dict[str, tuple[str, str, int, list[int]]] = {}
        self.tool_calls = self.tool_failures = self.interrupts = 0

    @classmethod
    def load(cls, found: Fields) -> Usage:
        """As `as_object` gave it."""
        usage = cls()
        usage.models = models_in(found["models"])
        usage.tools = {name: int(calls) for name, calls in found["tools"].items()}
        for name in cls.NUMBERS:
            setattr(usage, name, int(found[name]))
        for key, (message, model, ms, given) in found.get("rows", {}).items():
            counts = [int(n) for n in given]
            usage.rows[str(key)] = str(message), str(model), int(ms), counts
        return usage

    def as_object(self) -> Fields:
        """As JSON's objects have it."""
        found: Fields = {name: getattr(self, name) for name in self.NUMBERS}
        found.update(models=self.models, tools=self.tools)
        if self.rows:
            found["rows"] = self.rows
        return found

    def add(self, model: str, counts: list[int]) -> None:
        """Add to a model's counts."""
        add_to(self.models, model, counts)

    def merge(self, more: Usage) -> None:
        """Add all that was read by another."""
        for model, counts in more.models.items():
            self.add(model, counts)
        for name, calls in more.tools.items():
            self.tools[name] = self.tools.get(name, 0) + calls
        for name in self.NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.rows.update(more.rows)

    def add_row(self, row: MessageRow, told: list[int]) -> None:
        """Note whose tokens were gained. told: what the message had until now; when
        that was charged, the difference goes under an id of its own."""
        message, gained = row.message_id, minus(row.counts, told)
        if row.id in self.rows:
            message, _, _, before = self.rows[row.id]
            gained = plus(before, gained)
        elif any(told):
            message = f"{message}.{row.counts[OUTPUT]}"
        known = row.id in self.rows or len(self.rows) < ROWS_MAX - 2 * NAMES_MAX
        if known and identifier(message):
            self.rows[row.id] = message, row.model, int(row.at * 1000), gained

    def add_call(self, name: object) -> None:
        """Count a call of a tool; by name when that is an identifier."""
        self.tool_calls += 1
        known = name in self.tools or len(self.tools) < NAMES_MAX
        if isinstance(name, str) and identifier(name) and known:
            self.tools[name] = self.tools.get(name, 0) + 1

    def fields(self, model: str, tool_names: bool) -> Fields:
        """The fields of a ping. model: the main chain's last."""
        models = {name: positive(counts) for name, counts in self.models.items()}
        models = {name: counts for name, counts in models.items() if any(counts)}
        fields = named(total(models))
        fields.update(tool_calls=self.tool_calls, tool_failures=self.tool_failures)
        if self.interrupts:
            fields["interrupts"] = self.interrupts
        if models and list(models) != [model]:
            fields["models"] = {name: named(counts) for name, counts in models.items()}
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


def rows_charged(usage: Usage, event_id: str, ms: int) -> list[list[Any]]:
    """The messages whose tokens are charged to a ping, as BESIDE has them: together
    what the ping says, to the token. What no message has (the ledger's, or more rows
    than there may be) has a row for each model; what was charged too much before is
    taken off. ms: the event's time."""
    left = {model: positive(counts) for model, counts in usage.models.items()}
    rows: list[list[Any]] = []
    for message, model, at, counts in usage.rows.values():
        rest = left.get(model, [0] * len(COUNTS))
        told = [min(pair) for pair in zip(positive(counts), rest)]
        if any(told):
            rows.append([message, model, at or ms, *told])
            left[model] = minus(rest, told)
    for model, counts in left.items():
        name = f"{event_id}.{model}"
        if not identifier(name, "@[]"):  # it is too long
            name = f"{event_id}.{short_id(model)}"
        if any(counts):
            rows.append([name, model, ms, *counts])
    return rows


def add_to(models: dict[str, list[int]], model: str, counts: list[int]) -> None:
    """Add counts to a model's; beyond NAMES_MAX models, to those of `other`."""
    name = model if model in models or len(models) < NAMES_MAX else model_shown(None)
    models[name] = plus(models.get(name, [0] * len(COUNTS)), counts)


def positive(counts: list[int]) -> list[int]:
    """The counts without the negative ones."""
    return [max(0, n) for n in counts]


def named(counts: list[int]) -> Fields:
    """Counts as a ping has them: all of COUNTS, and the total."""
    found = {names[0]: n for names, n in zip(COUNTS, counts)}
    return {**found, "total_tokens": sum(counts) - found["reasoning_tokens"]}


def models_in(found: Fields) -> dict[str, list[int]]:
    """Model -> counts, as an account's file has them; ValueError when it has not."""
    models = {str(name): [int(n) for n in found[name]] for name in found}
    if any(len(counts) != len(COUNTS) for counts in models.values()):
        raise ValueError("no counts")
    return models


class Account:
    """What of a session was read and charged.

    first, source, opened_at: the event that opened it. ours_from: a session that began
    later than that was ours from its start. since: older rows are history, never
    billed; None before the transcript was first read. whole: nothing of the session is
    history. transcript: where its own transcript is now; place: a hash of where it was
    when last read. identity: fields for a SessionLost. ids: messages that were counted;
    history: those that never will be. messages: id -> those that may still grow.
    reported: model -> counts, charged so far; cost: USD, likewise. charged: event_id ->
    its usage fields. ledger: the client's, as long as nothing was said after it.
    settled_at: when it last had the last word. prompts: their times; prompt_id: the
    last one's. spoke_at: the main chain's last message; spoke_for: its prompt_id.
    over_at: the last end of a turn. stopped_at: the last Stop. owed: (ns, ping) of a
    SessionLost not yet in the outbox. merged: marks of former accounts that are in it.
    unlearned: its ids are not all known. damaged: what was charged is not known.

    For trackers that need it (needs: what of BESIDE): own: what was frozen with the
    last ping. tool_calls: told so far. at_end: the counts told when the session last
    ended. beside: event_id -> what stands beside a ping that was charged.
    """

    TEXTS = (
        *("first", "source", "transcript", "place", "model", "branch"),
        *("prompt_id", "spoke_for"),
    )
    NUMBERS = (
        *("opened_at", "ours_from", "last_at", "settled_at", "spoke_at", "over_at"),
        *("stopped_at", "cost"),
    )
    SWITCHES = ("whole", "ended", "keeps_ledger", "unlearned")
    IDENTITY = ("project", "session_id", "cwd_hash", "transcript_path_hash")

    def __init__(self, path: str) -> None:
        self.path = path
        self.first = self.source = self.transcript = self.place = ""
        self.model = self.branch = self.prompt_id = self.spoke_for = ""
        self.opened_at = self.ours_from = self.last_at = self.settled_at = 0.0
        self.spoke_at = self.over_at = self.stopped_at = self.cost = 0.0
        self.whole = self.keeps_ledger = True
        self.ended = self.unlearned = False
        self.since: float | None = None
        self.ledger: tuple[dict[str, list[int]], float] | None = None
        self.owed: list[tuple[int, Fields]] = []
        self.identity: Fields = {}
        self.charged: dict[str, Fields] = {}
        self.reported: dict[str, list[int]] = {}
        self.prompts: list[float] = []
        self.merged: list[str] = []
        self.transcripts: dict[str, Transcript] = {}
        self.messages: dict[str, Message] = {}
        self.ids, self.history, self.gained = Ids(), Ids(), Usage()
        self.damaged = False
        self.needs: tuple[str, ...] = ()
        self.own: Fields = {}
        self.tool_calls = 0
        self.at_end = [0] * len(COUNTS)
        self.beside: dict[str, Fields] = {}

    # -- Its file --

    @classmethod
    def load(cls, path: str) -> Account:
        """OSError as it comes; ValueError: the file holds no account."""
        found = read_object(path, ACCOUNT_MAX_BYTES)
        account = cls(path)
        try:
            if found.get("version") == 2:
                account.fill(found)
            else:
                account.fill_from_1_0(found)
        except (KeyError, TypeError, AttributeError, IndexError):
            raise ValueError("no account") from None
        return account

    def fill(self, found: Fields) -> None:
        """Take all from what `as_object` gave."""
        for names, good in (
            (self.TEXTS, lambda value: isinstance(value, str)),
            (self.NUMBERS, number),
            (self.SWITCHES, boolean),
        ):
            for name in names:
                if not good(found[name]):
                    raise ValueError(f"no {name}")
                setattr(self, name, found[name])
        self.since = None if found["since"] is None else float(found["since"])
        self.identity, self.charged = dict(found["identity"]), dict(found["charged"])
        self.reported = models_in(found["reported"])
        self.prompts = [float(at) for at in found["prompts"]]
        self.merged = [str(mark) for mark in found["merged"]]
        self.ids, self.history = Ids(found["ids"]), Ids(found["history"])
        self.gained = Usage.load(found["gained"])
        if found["ledger"] is not None:
            self.ledger = models_in(found["ledger"][0]), float(found["ledger"][1])
        self.owed = [(int(ns), dict(ping)) for ns, ping in found["owed"]]
        if "beside" in found:
            self.own, self.tool_calls = dict(found["own"]), int(found["tool_calls"])
            self.at_end = models_in({"": found["at_end"]})[""]
            self.beside = {k: dict(found["beside"][k]) for k in found["beside"]}
        for name, kept in found["transcripts"].items():
            self.transcripts[name] = Transcript.load(name, kept)
            for key, (counts, calls) in kept[-1].items():
                message = self.messages[key] = Message()
                message.counts, message.calls = [int(n) for n in counts], set(calls)

    def fill_from_1_0(self, found: Fields) -> None:
        """Take all from an account of version 1.0.0, which knew the ids of each file's
        last messages only."""
        ledger = found["ledger"]

        def models(given: Fields) -> dict[str, list[int]]:
            return {
                str(name): [int(given[name].get(names[0], 0)) for names in COUNTS]
                for name in given
            }

        self.first, self.transcript = str(found["first"]), str(found["transcript"])
        self.whole, self.ended = bool(found["whole"]), bool(found["ended"])
        self.last_at, self.cost = float(found["last_at"]), float(found["cost"])
        self.opened_at = self.ours_from = float(found["prompt_by"] or found["last_at"])
        known = found["files"] or found["since"] or not found["prompt_by"]
        self.since = float(found["since"]) if known else None
        self.identity = {k: found["identity"][k] for k in found["identity"]}
        self.charged, self.reported = dict(found["charged"]), models(found["reported"])
        self.prompts = [float(at) for at in found["prompts"]]
        self.gained.models = models(found["models"])
        self.gained.tools = {name: int(n) for name, n in found["tools"].items()}
        self.gained.tool_calls = int(found["tool_calls"])
        self.gained.tool_failures = int(found["tool_failures"])
        if ledger:
            self.ledger = models(ledger["models"]), float(ledger["cost"])
        if found["owed"]:
            self.owed = [(ns_of(found["owed"][0]), dict(found["owed"][1]))]
        self.place, self.unlearned = short_id(self.transcript), True
        for name, (inode, offset, ids, _) in found["files"].items():
            transcript = self.transcripts[name] = Transcript(name)
            transcript.inode = "" if inode is None else str(inode)
            transcript.offset = int(offset)
            for text in ids:
                self.ids.add(short_id(text))

    def as_object(self) -> Fields:
        """As JSON's objects have it."""
        plain = (*self.TEXTS, *self.NUMBERS, *self.SWITCHES)
        found: Fields = {name: getattr(self, name) for name in plain}
        found.update(
            version=2,
            since=self.since,
            identity=self.identity,
            charged=self.charged,
            reported=self.reported,
            prompts=self.prompts,
            merged=self.merged,
            ids=self.ids.as_text(),
            history=self.history.as_text(),
            gained=self.gained.as_object(),
            ledger=self.ledger,
            owed=self.owed,
            transcripts={},
        )
        if self.needs or self.beside:
            found.update(own=self.own, tool_calls=self.tool_calls)
            found.update(at_end=self.at_end, beside=self.beside)
        for name, kept in self.transcripts.items():
            messages = [(key, self.messages[key]) for key in kept.recent]
            recent = {key: [m.counts, sorted(m.calls)] for key, m in messages}
            found["transcripts"][name] = [*kept.as_list(), recent]
        return found

    def save(self) -> None:
        """Write the file, all or nothing; only as much as must be remembered."""
        known = {key for kept in self.transcripts.values() for key in kept.recent}
        self.messages = {k: m for k, m in self.messages.items() if k in known}
        self.charged = dict(list(self.charged.items())[-CHARGED_MAX:])
        self.forget_beside()
        directory = os.path.dirname(self.path)
        if not os.path.isdir(directory):
            os.mkdir(directory, 0o700)
        write_object(self.path, self.as_object())

    def forget_beside(self) -> None:
        """Keep what stands beside the last pings charged, by rows: their own files have
        it by then, unless the disk was full."""
        kept: dict[str, Fields] = {}
        rows = 0
        for event_id in reversed(list(self.beside)):
            rows += len(self.beside[event_id].get("messages", ()))
            if not kept or (rows <= 2 * ROWS_MAX and len(kept) < CHARGED_MAX):
                kept[event_id] = self.beside[event_id]
        self.beside = dict(reversed(list(kept.items())))

    # -- What events say of its session --

    def begin(self, ping: Fields, at: float, ours: float) -> None:
        """Open it with the event that its session was met at."""
        self.first, self.opened_at, self.ours_from = str(ping.get("event")), at, ours
        self.source = str(ping.get("source")) if self.first == "SessionStart" else ""

    def follow(self, ping: Fields, local: Fields, at: float) -> bool:
        """Take from an event where the transcript is now; whether that is new."""
        if at < self.last_at and self.transcript:
            return False
        moved = self.transcript != str(local["transcript"])
        self.transcript = str(local["transcript"])
        self.identity = {name: ping[name] for name in self.IDENTITY if name in ping}
        return moved

    def meet(self, ping: Fields, local: Fields, at: float) -> None:
        """Note an event that tells no usage: its session is not lost."""
        if self.follow(ping, local, at) or self.ended:
            self.ended = False
            self.save()
        else:
            os.utime(self.path)

    def path_of(self, name: str) -> str:
        """Path of a transcript."""
        top = self.transcript[: -len(".jsonl")]
        return os.path.join(top, name) if name else self.transcript

    def agents(self) -> list[str]:
        """Names of the agents' transcripts that there are, at any depth."""
        top = self.transcript[: -len(".jsonl")]
        return sorted(
            os.path.relpath(os.path.join(directory, name), top)
            for directory, _, names in os.walk(os.path.join(top, "subagents"))
            for name in names
            if name.startswith("agent-") and name.endswith(".jsonl")
        )

    # -- What was read is told --

    def settle(self, at: float) -> float:
        """Add what the client's ledger has more (compaction and titles are calls of no
        row); give the cost not yet reported. It is sums that are compared: the ledger
        may name a model otherwise."""
        models, cost = self.ledger or ({}, 0.0)
        missing = minus(total(models), total(self.gained.models, self.reported))
        missing = positive(missing)
        for name, counts in models.items():
            known = [0] * len(COUNTS)
            for part in (self.gained.models, self.reported):
                known = plus(known, part.get(name, [0] * len(COUNTS)))
            more = positive(minus(counts, known))
            more = [min(pair) for pair in zip(more, missing)]
            missing = minus(missing, more)
            self.gained.add(name, more)
        new = max(0, round(cost - self.cost, 10))
        self.cost, self.settled_at = max(cost, self.cost), max(at, self.settled_at)
        return new

    def take_usage(self, tool_names: bool, event_id: str, at: float) -> Fields:
        """The usage fields of what was read since the last charge; now it is told."""
        fields, rest = self.gained.fields(self.model, tool_names), Usage()
        rows = rows_charged(self.gained, event_id, int(at * 1000))
        self.tool_calls += self.gained.tool_calls
        for name, counts in self.gained.models.items():
            add_to(self.reported, name, positive(counts))
            if min(counts) < 0:  # told before, and too much: the next ping has less
                rest.models[name] = minus(counts, positive(counts))
        self.gained = rest
        if self.needs:
            told = total(self.reported)
            beside = {
                "messages": rows,
                "totals": {**named(told), "tool_calls": self.tool_calls},
                "since_end": named(minus(told, self.at_end)),
            }
            self.beside[event_id] = gate_beside(beside, self.needs)
        return fields

    # -- A former URL's account --

    def merge(self, former: Account, mark: str) -> None:
        """Take in the account that a former URL's destination has of the session: what
        both together have not counted is read, and charged to pings to come. mark:
        names that account, so that after a crash it is not taken in twice."""
        if mark in self.merged:
            return
        self.merged.append(mark)
        earlier = former
        if former.since is not None and self.since is not None:
            earlier = former if former.since <= self.since else self
        self.first, self.source = earlier.first, earlier.source
        self.opened_at, self.ours_from = earlier.opened_at, earlier.ours_from
        self.since, self.whole = earlier.since, earlier.whole
        theirs, ours = former.history.all(), self.history.all()
        self.history = Ids("".join(key for key in theirs if key in ours))
        self.ids = Ids("".join({**former.ids.all(), **self.ids.all()}))
        if former.last_at > self.last_at or not self.transcript:
            self.ended, self.model = former.ended, former.model
            self.transcript, self.place = former.transcript, former.place
            self.identity, self.own = former.identity, former.own
        for name in {**former.transcripts, **self.transcripts}:
            self.merge_transcript(name, former.transcripts.get(name))
        self.messages = {**former.messages, **self.messages}
        self.merge_told(former)

    def merge_transcript(self, name: str, theirs: Transcript | None) -> None:
        """Go back to where the one that read less of a transcript was."""
        if theirs is not None and name not in self.transcripts:
            self.transcripts[name] = theirs
            return
        ours = self.transcripts[name]
        if theirs is None or theirs.inode != ours.inode:
            ours.offset = 0
        else:
            ours.offset, ours.at = min(ours.offset, theirs.offset), theirs.at
            recent = [key for key in theirs.recent if key not in ours.recent]
            ours.recent, ours.begun = recent + ours.recent, theirs.begun or ours.begun

    def merge_told(self, former: Account) -> None:
        """Add what was counted and told of the former account."""
        for name, counts in former.reported.items():
            add_to(self.reported, name, counts)
        self.gained.merge(former.gained)
        self.charged = {**former.charged, **self.charged}
        self.beside = {**former.beside, **self.beside}
        self.tool_calls += former.tool_calls
        self.at_end = plus(former.at_end, self.at_end)
        self.owed, self.cost = former.owed + self.owed, max(former.cost, self.cost)
        self.ledger = self.ledger or former.ledger
        self.prompts = sorted({*former.prompts, *self.prompts})[-PROMPTS_MAX:]
        self.unlearned = self.unlearned or former.unlearned
        for name in ("last_at", "settled_at", "spoke_at", "over_at", "stopped_at"):
            setattr(self, name, max(getattr(self, name), getattr(former, name)))


def learn(ids: Ids, path: str, end: int) -> None:
    """Remember the ids of a transcript's first `end` bytes."""
    for row in Transcript("").rows_before(path, min(end, UNREAD_MAX_BYTES)):
        if isinstance(row, MessageRow):
            ids.add(row.id)


class Reading:
    """A look, or several, at what the transcripts of an account's session have gained.

    git: the branch is wanted. repeated: tool calls met again, in copied rows. unnamed:
    this client does not mark prompts. missed: counts are missing for that reason.
    """

    def __init__(self, account: Account, git: bool = False) -> None:
        self.account, self.git = account, git
        self.repeated: set[str] = set()
        self.unnamed = self.missed = False

    def read(self, until: float, ends: float) -> str:
        """Count what the transcripts have gained up to `until`. The session's own comes
        first: agents' files may begin with copies of its rows. Gives what is missing:
        "" nothing, PART of it, all because the transcript is ABSENT or opening FAILED.
        """
        account = self.account
        try:
            if account.place != short_id(account.transcript):
                self.relocate()
            if account.unlearned:
                self.learn_told()
            if account.since is None:
                account.since = self.find_beginning(ends)
            if account.since is None:
                return ""
            account.since = max(account.since, switched_off_at(account.path))
            whole = self.read_one("", until, ends)
        except TimeoutError:
            return PART
        except (OSError, ValueError) as error:
            return ABSENT if says_absent(error) and not account.place else FAILED
        return self.read_agents(until, ends) or ("" if whole else PART)

    def read_agents(self, until: float, ends: float) -> str:
        """Count what the agents' transcripts have gained; what is missing."""
        missing = ""
        for name in self.account.agents():
            try:
                if not self.read_one(name, until, ends):
                    missing = PART
            except (FileNotFoundError, ValueError):
                continue  # it is none, or none any more
            except TimeoutError:
                return PART
            except OSError:
                missing = missing or FAILED_AGENT
        return missing

    # -- Where it begins --

    def find_beginning(self, ends: float) -> float | None:
        """What is older is history; None as long as the transcript says nothing."""
        account = self.account
        if account.source in ("startup", "clear"):
            return 0.0
        if account.source in ("resume", "fork"):
            return account.opened_at
        outline = Outline(account.transcript, account.opened_at, ends)
        if outline.spoken and not outline.named:
            self.unnamed = True
            return account.opened_at
        if outline.begun and outline.begun >= account.ours_from:
            return 0.0
        if not outline.named:
            return None
        if account.first == "UserPromptSubmit":  # its row comes after it
            return account.opened_at
        if account.first == "SessionEnd" and outline.keeps_ledger:
            return outline.last_run  # told of ends alone: this one's run is ours
        return outline.last_prompt

    def pass_over(self) -> None:
        """Go to the present ends of all transcripts, and remember the ids before them:
        of an account whose file is damaged nobody knows what was charged."""
        account = self.account
        for name in ["", *account.agents()]:
            path, transcript = account.path_of(name), Transcript(name)
            try:
                found = os.stat(path)
                learn(account.history, path, found.st_size)
            except (FileNotFoundError, ValueError):
                if name:
                    continue  # it is none
                raise
            transcript.inode, transcript.offset = str(found.st_ino), found.st_size
            account.transcripts[name] = transcript
        account.since, account.whole, account.damaged = 0.0, False, True
        account.place = short_id(account.transcript)

    def learn_told(self) -> None:
        """Remember all that was read: version 1.0.0 did not."""
        for name, transcript in self.account.transcripts.items():
            try:
                path = self.account.path_of(name)
                transcript.inode = transcript.inode or str(os.stat(path).st_ino)
                learn(self.account.ids, path, transcript.offset)
            except (FileNotFoundError, ValueError):
                continue  # it is gone
        self.account.unlearned = False

    def relocate(self) -> None:
        """Go on at another path. A file that is not the same one there is a copy, and
        read anew: what was counted is remembered."""
        account = self.account
        os.close(open_regular(account.transcript))
        for name, transcript in account.transcripts.items():
            try:
                inode = str(os.stat(account.path_of(name)).st_ino)
            except OSError:
                inode = ""
            if inode != transcript.inode and account.place:
                transcript.inode, transcript.offset = inode, 0
        account.place = short_id(account.transcript)

    # -- What counts --

    def read_one(self, name: str, until: float, ends: float) -> bool:
        """Count what one transcript has gained; False if something was passed over."""
        known = self.account.transcripts
        if name not in known and len(known) >= TRANSCRIPTS_MAX:
            return False
        transcript = known.setdefault(name, Transcript(name))

        def take(row: Row) -> bool:
            main = not name and not row.sidechain
            if row.at > until + (0 if main else LAG_S) + STAMP_S:
                return False  # a later ping's
            self.count(row, transcript, main)
            return True

        return transcript.read(self.account.path_of(name), ends, take)

    def count(self, row: Row, transcript: Transcript, main: bool) -> None:
        """Count a row. main: it is of the session's main chain."""
        if isinstance(row, MessageRow) and row.real:
            self.count_message(row, transcript, main)
        elif isinstance(row, UserRow):
            self.count_user(row, transcript, main)
        elif isinstance(row, LedgerRow) and main:
            self.account.ledger = row.models, row.cost

    def count_message(
        self, row: MessageRow, transcript: Transcript, main: bool
    ) -> None:
        """Count a message's tokens, once, and its tool calls."""
        message = self.message_of(row, transcript)
        if message is None:
            self.repeated.update(row.calls)
            return
        if main:
            self.note_word(row)
        # Every content block of a message has a row, each with the message's whole
        # usage; in older ones the output may be partial.
        account = self.account
        if row.counts[OUTPUT] > message.counts[OUTPUT] or not any(message.counts):
            account.gained.add(row.model, minus(row.counts, message.counts))
            if "messages" in account.needs:
                account.gained.add_row(row, message.counts)
            message.counts = row.counts
        for call, name in row.calls.items():
            if call in message.calls:
                self.repeated.add(call)
            else:
                message.calls.add(call)
                account.gained.add_call(name)
        if row.final and (main or transcript.name):
            transcript.over_at = max(transcript.over_at, row.at)

    def note_word(self, row: MessageRow) -> None:
        """Note what the main chain's newest message tells."""
        account = self.account
        account.ledger = None  # older than this message: not the last word
        account.spoke_at, account.spoke_for = row.at, account.prompt_id
        account.model, account.keeps_ledger = row.model, row.keeps_ledger
        asked = self.git and branch_name(row.branch)
        account.branch = str(row.branch) if asked else ""

    def message_of(self, row: MessageRow, transcript: Transcript) -> Message | None:
        """A row's message, known or new; None when the row must not count."""
        account = self.account
        if row.copied or row.at < (account.since or 0):
            account.whole, self.missed = False, self.missed or self.unnamed
            account.history.add(row.id)
        if row.id in account.history:
            return None
        if row.id in account.ids:
            return account.messages.get(row.id)
        account.ids.add(row.id)
        if row.at <= account.settled_at:
            return None  # the ledger had it
        transcript.recent = [*transcript.recent[1 - RECENT_MAX :], row.id]
        transcript.begun = transcript.begun or transcript.at or row.at
        account.messages[row.id] = Message()
        return account.messages[row.id]

    def count_user(self, row: UserRow, transcript: Transcript, main: bool) -> None:
        """Count failed tools and interrupts; note that a prompt begins a turn."""
        account = self.account
        if row.at >= (account.since or 0):
            failed = [call for call in row.failed if call not in self.repeated]
            account.gained.tool_failures += len(failed)
            if main and row.interrupt and row.interrupt not in account.ids:
                account.ids.add(row.interrupt)
                account.gained.interrupts += 1
        if main:
            account.prompt_id = row.prompt_id or account.prompt_id
            if row.interrupt:
                account.over_at = max(account.over_at, row.at)
            if row.prompt:
                account.keeps_ledger = row.keeps_ledger
                account.prompts = [*account.prompts[1 - PROMPTS_MAX :], row.at]
        elif transcript.name and row.begins:
            transcript.prompted_at = max(transcript.prompted_at, row.at)
            transcript.prompt_id = row.prompt_id


class Charge:
    """What a ping is told of what its session has used.

    at: the event's time. ends: monotonic; nothing is awaited for longer. patient: what
    the client has yet to write is awaited at all.
    """

    def __init__(
        self,
        account: Account,
        ping: Fields,
        local: Fields,
        at: float,
        ends: float,
        patient: bool,
    ) -> None:
        self.account, self.ping, self.local = account, ping, local
        self.at, self.ends, self.patient = at, ends, patient
        self.event = str(ping["event"])
        self.wants_git = local.get("git") is True
        self.reading = Reading(account, self.wants_git)

    def fields(self) -> Fields:
        """The usage fields, now or, after a crash, again; the account's file has them
        before they are told. Where nothing can be read, nothing is charged: all of it
        is for the session's next ping, or the sweep."""
        account, event_id = self.account, str(self.ping["event_id"])
        if event_id in account.charged:
            return dict(account.charged[event_id])
        account.follow(self.ping, self.local, self.at)
        fields = self.gather(event_id)
        if fields is not None:
            account.charged[event_id] = fields
        if self.event in ("Stop", "StopFailure"):
            account.over_at = max(account.over_at, self.at)
        if self.event == "Stop":
            account.stopped_at = max(account.stopped_at, self.at)
        account.last_at = max(account.last_at, self.at)
        account.save()
        return {"usage_complete": False} if fields is None else fields

    def gather(self, event_id: str) -> Fields | None:
        """Usage since the session's last such ping; None where no transcript can be
        read."""
        account = self.account
        fields: Fields = {}
        account.ended = False
        missing, came = self.read_and_wait()
        if missing in (ABSENT, FAILED):
            return None
        ends = self.event == "SessionEnd"
        settled = ends and account.whole and account.ledger is not None
        if settled:
            fields["cost_usd"] = account.settle(self.at)
        elif missing or self.reading.missed or account.damaged or not came:
            fields["usage_complete"] = False
        account.ended = ends and (settled or not missing)
        tool_names = self.local.get("tool_names") is not False
        fields.update(account.take_usage(tool_names, event_id, self.at))
        if ends:
            account.at_end = total(account.reported)
        begun = self.stop_begun() if self.event == "Stop" else 0.0
        if begun:
            fields["duration_ms"] = round((self.at - begun) * 1000)
        if self.wants_git:
            fields["git_branch"] = account.branch
        return fields

    def read_and_wait(self) -> tuple[str, bool]:
        """Read until all has come; if `patient`, until the event is LAG_S old: the
        client writes a turn's last message, a session's ledger after it. Gives what is
        missing, and whether that came."""
        until = float("inf") if self.event == "SessionEnd" else self.at
        lag = min(LAG_S, self.at + LAG_S - time.time())
        give_up = min(time.monotonic() + lag, self.ends)
        tries = 0
        while True:
            ends = min(time.monotonic() + READ_S, self.ends)
            missing = self.reading.read(until, ends)
            came, tries = self.has_come(), tries + 1
            failed = missing in (FAILED, FAILED_AGENT)
            if missing in (ABSENT, PART) or (came and not failed):
                return missing, came
            waits = self.patient and time.monotonic() < give_up
            tries_again = failed and tries < OPEN_TRIES and time.monotonic() < self.ends
            if not waits and not tries_again:
                return missing, came
            time.sleep(POLL_S)

    def has_come(self) -> bool:
        """Whether all is there that the client writes at such an event."""
        account = self.account
        main = account.transcripts.get("") or Transcript("")
        if self.event == "SubagentStop":
            return self.agent_is_over()
        if self.event == "Stop":
            told = account.stopped_at if account.stopped_at < self.at else 0.0
            is_last_word = main.over_at > told and main.over_at >= self.turn_begun()
            return is_last_word or self.agents_turn() > 0
        if self.event != "SessionEnd":
            return True
        if account.whole and account.keeps_ledger:
            return account.ledger is not None
        over_at = max(account.over_at, main.over_at)
        return over_at >= self.turn_begun() or self.agents_turn() > 0

    def agent_is_over(self) -> bool:
        """Whether the last message has come of the agent that the event names."""
        path = self.local.get("agent_transcript")
        if not isinstance(path, str) or not os.path.isfile(path):
            return True
        known, name = self.account.transcripts.items(), os.path.basename(path)
        return any(agent.is_over() for key, agent in known if key.endswith(name))

    def stop_begun(self) -> float:
        """When that began which a Stop ends; 0 when that is not known."""
        stopped_at = self.account.stopped_at
        if self.ping.get("stop_hook_active") and 0 < stopped_at < self.at:
            return stopped_at  # another hook had the turn go on from there
        return self.agents_turn() or self.turn_begun()

    def turn_begun(self) -> float:
        """When the event's turn began; 0 when that is not known."""
        begun = [at for at in self.account.prompts if at <= self.at + STAMP_S]
        return max([0.0, *begun])

    def agents_turn(self) -> float:
        """When a turn began in which only an agent worked, so that no word of the main
        chain is to come; 0 when it is none. A skill with `context: fork` makes one; its
        prompt's row comes after the Stop, but the agent's rows name the prompt."""
        account, begun, prompt_id = self.account, self.turn_begun(), ""
        if isinstance(self.ping.get("prompt_id"), str):
            prompt_id = short_id(self.ping["prompt_id"])
        if prompt_id and prompt_id == account.spoke_for:
            return 0.0
        for name, agent in account.transcripts.items():
            if name and agent.is_over():
                if prompt_id and prompt_id == agent.prompt_id:
                    return agent.begun
                if account.spoke_at < begun <= agent.begun + STAMP_S:
                    return begun
        return 0.0


def says_absent(error: Exception) -> bool:
    """Whether what went wrong means that there is no such transcript."""
    from errno import ENAMETOOLONG

    absent = (FileNotFoundError, NotADirectoryError, ValueError)
    return isinstance(error, absent) or getattr(error, "errno", 0) == ENAMETOOLONG


def ours_from(outbox: Outbox, path: str, at: float) -> float:
    """Sessions that began later than this were ours from their start, whatever event
    they are met at first: Esc and a denied permission fire no hook. path: of the
    account. at: of the event. (All in seconds since 1970.)"""
    for other in outboxes(os.path.dirname(outbox.directory)):
        former = other.kind() == outbox.kind() and other.name() != outbox.name()
        if former and os.path.lexists(other.path("accounts", os.path.basename(path))):
            return at  # until now, another URL of the same tracker was told
    installed = [at]
    for known in (THIS_FILE, outbox.path("lock")):
        try:
            installed.append(os.stat(known).st_ctime)
        except OSError:
            continue
    return max(min(installed), at - DAY_S)


def open_account(outbox: Outbox, ping: Fields, local: Fields, at: float) -> Account:
    """The account of an event's session. Only where there is none, one is opened at its
    beginning. OSError: it cannot be read, and must not be replaced."""
    path = outbox.account_path(str(ping["session_id"]))
    try:
        account = Account.load(path)
    except FileNotFoundError:
        account = Account(path)
        account.begin(ping, at, ours_from(outbox, path, at))
    except ValueError:
        if ping.get("event") not in USAGE_EVENTS:
            raise  # time enough when something is to be told
        account = Account(path)
        account.follow(ping, local, at)
        Reading(account).pass_over()
    account.needs = outbox.needs
    return account


def charge(
    outbox: Outbox, name: str, record: Record, ends: float, patient: bool
) -> Record:
    """What the file of a ping holds, with the usage in it. Its `local`, which its hook
    left for us, is not empty. ends: monotonic. patient: false when someone waits.

    The order makes it exact: the account is committed together with which ping was
    charged what; then the ping's file is rewritten; then it may be sent. Whoever comes
    after a crash finds the same charge, so that it is neither lost nor doubled.
    """
    ping, local, at = record.ping, record.local, ns_of(name) / 1e9
    event, beside = ping.get("event"), record.beside
    if local.get("usage") is False:
        switch_off(outbox.account_path(str(ping["session_id"])), at)
        return record
    if ping.get("reason") != "clear":
        patient = True  # only /clear awaits our end before it writes its ledger
    try:
        account = open_account(outbox, ping, local, at)
        account.own = beside.get("own", {})
        if event not in USAGE_EVENTS:
            account.meet(ping, local, at)
            return record
        fields = Charge(account, ping, local, at, ends, patient).fields()
        told = account.beside.get(str(ping["event_id"]), {})
        beside = gate_beside({**beside, **told}, outbox.needs)
    except (OSError, ValueError):
        if event not in USAGE_EVENTS:
            return record
        fields = {"usage_complete": False}  # not charged: the next ping has it
    record = Record(gate({**ping, **fields}), {}, beside)
    try:
        outbox.rewrite(name, record)
    except OSError:
        pass  # a full disk: a repeat finds the same charge in the account
    return record


def mark_of(account_path: str) -> str:
    """The file whose time says until when a session ran with usage switched off."""
    return account_path[: -len(".json")] + ".off"


def switch_off(account_path: str, at: float) -> None:
    """Note that a session's usage was switched off at an event of that time: what it
    had used until then is never billed."""
    directory = os.path.dirname(account_path)
    if not os.path.isdir(directory):
        os.mkdir(directory, 0o700)
    mark = mark_of(account_path)
    write_file(mark, b"")
    os.utime(mark, (at, at))


def switched_off_at(account_path: str) -> float:
    """When that was the last time, seconds since 1970; 0: never."""
    try:
        return os.lstat(mark_of(account_path)).st_mtime
    except OSError:
        return 0.0


def find_lost(account: Account, settings: Settings, ends: float) -> None:
    """Have the account owe a ping of what was used and never told. Today's settings
    shape it."""
    Reading(account).read(float("inf"), min(time.monotonic() + READ_S, ends))
    gained = any(positive(total(account.gained.models)))
    ended = total(account.reported) == account.at_end
    if not gained and (ended or "since_end" not in account.needs):
        return
    told: dict[str, list[int]] = {}
    for models in (account.reported, account.gained.models):
        for name, counts in models.items():
            add_to(told, name, positive(counts))
    mark = f"{account.identity.get('session_id')}{encode_json(told)}"
    ns, event_id = int(account.last_at * 1e9), sha256_hex(mark.encode())[:32]
    fields = account.take_usage(settings.tool_names, event_id, account.last_at)
    account.at_end = total(account.reported)
    fields.update(account.identity, **ORIGIN, event="SessionLost", event_id=event_id)
    fields.update(timestamp=iso_time(ns), status="success", usage_complete=False)
    fields["machine"] = settings.machine
    path = path_hash(account.transcript, settings.hash_key)
    if settings.hash_key and fields.get("transcript_path_hash") != path:
        # Hashed under another key, or none. The path can be hashed anew; the cwd is not
        # known here.
        fields["transcript_path_hash"] = path
        fields.pop("cwd_hash", None)
    account.owed.append((ns, gate(fields)))


def report_lost(outbox: Outbox, path: str, settings: Settings, ends: float) -> None:
    """One ping of what a session had used that ended without a word (kill -9, power).
    path: its account's; committed first, so that a crash cannot make two pings. With
    usage off nothing is opened or told."""
    if not settings.usage:
        return
    try:
        account = Account.load(path)
    except ValueError:
        return  # damaged: nobody knows what was told
    account.needs = outbox.needs
    if not account.owed and not account.ended:
        find_lost(account, settings, ends)
        if account.owed:
            account.save()
    if account.owed:
        for ns, ping in account.owed:
            told = {"own": account.own, **account.beside.get(ping["event_id"], {})}
            beside = gate_beside(told, outbox.needs)
            name = f"{ns:020d}-{ping['event_id']}.json"
            outbox.rewrite(name, Record(ping, {}, beside))
        account.owed = []
        account.save()


def hand_over(former_path: str, path: str) -> None:
    """Make a session's account at one destination another's, which may have its own.
    Both locks are held, and the pings that wait come after it."""
    if not os.path.lexists(path):
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        os.replace(former_path, path)
        return
    try:
        account, former = Account.load(path), Account.load(former_path)
        account.merge(former, sha256_hex(encode_json(former.as_object()).encode())[:16])
        account.save()
    except ValueError:
        pass  # one is damaged: the present one's holds, or opens anew
    os.unlink(former_path)


# -- Delivery: one request, one verdict ------------------------------------------------

DELIVERED, NOT_NOW, RETRY, HOLD, REFUSED = (
    "delivered",
    "not now",
    "retry",
    "hold",
    "refused",
)
VERDICTS = {  # of statuses that do not go with their hundred
    **dict.fromkeys((408, 425, 429), NOT_NOW),  # the tracker's own word: later
    409: RETRY,  # the same ping's first try is still at work
    **dict.fromkeys((401, 402, 403, 404, 405, 407, 410, 451), HOLD),  # URL or token
}
VERDICTS_BY_HUNDRED = {2: DELIVERED, 3: HOLD, 4: REFUSED}
HOLDS = (HOLD, REFUSED)  # a person must mend something: the longer back-off
SYSTEM_CERTIFICATES = "/etc/ssl/cert.pem"  # macOS, BSD, Alpine; elsewhere none needed
INTERIM_MAX = 100  # answers before the answer; the watchdog ends what goes on


class Answer:
    """What became of one request.

    what: for a person. retry_after: the header's text, or None. may_blame: whether the
    ping itself may be the cause, and not only the way to the tracker. body: what a 2xx
    begins with, as far as the tracker says something in it.
    """

    body = b""

    def __init__(
        self,
        verdict: str,
        what: str,
        retry_after: str | None = None,
        may_blame: bool = False,
    ) -> None:
        self.verdict, self.what = verdict, what
        self.retry_after, self.may_blame = retry_after, may_blame


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


def backoff_s(
    verdict: str, failures: int, retry_after: str | None, now: float
) -> float:
    """Seconds to wait after the n-th failure in a row: jittered, for machines must not
    come back together, and not before the server asked for."""
    from random import uniform

    power, asked = 2.0 ** min(failures, 20), retry_after_s(retry_after, now)
    if verdict in HOLDS:
        wait = min(HOLD_S[0] * power / 2, HOLD_S[1]) * uniform(0.5, 1)
    else:
        wait = uniform(2, min(BACKOFF_MAX_S, 2 * power))
    if asked:
        wait = max(wait, min(asked + uniform(0, 1 + asked / 10), RETRY_AFTER_MAX_S))
    return wait


def make_opener(url: str) -> OpenerDirector:
    """An opener that can do no more than it must: no redirects (urllib would turn the
    POST into a GET without a body, and call its 200 a success), no other schemes; the
    environment's proxies, but never for loopback; TLS verified."""
    from urllib import request

    opener = request.OpenerDirector()
    opener.addheaders = []
    opener.add_handler(request.HTTPHandler())
    if url.lower().startswith("https") and hasattr(request, "HTTPSHandler"):
        opener.add_handler(request.HTTPSHandler(context=verifying_context()))
    if not loopback(split_url(url)[1]):
        opener.add_handler(request.ProxyHandler(request.getproxies_environment()))
    return opener


def verifying_context() -> SSLContext:
    """What TLS is verified with. A Python that brings no certificates (python.org's for
    macOS, until its "Install Certificates.command" has run) takes the system's."""
    import ssl

    context, paths = ssl.create_default_context(), ssl.get_default_verify_paths()
    chosen = {paths.openssl_cafile_env, paths.openssl_capath_env} & set(os.environ)
    found = paths.cafile or paths.capath or context.cert_store_stats()["x509_ca"]
    if not (chosen or found):
        try:
            context.load_verify_locations(SYSTEM_CERTIFICATES)
        except OSError:
            pass  # then every ping is held, and doctor says why
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
        response = opener.open(posted, timeout=timeout_s)
        if response is None:  # no handler took an https URL
            return Answer(HOLD, "this Python was built without TLS")
        with response:
            answer = answer_of(response)
            if reads and answer.verdict == DELIVERED:
                answer.body = beginning_of(response, reads)
            return answer
    except URLError as error:  # urllib wraps what fails up to the end of sending
        broken = isinstance(error.reason, (ConnectionResetError, BrokenPipeError))
        return no_answer(error.reason, RETRY if broken else NOT_NOW)
    except (OSError, HTTPException, ValueError) as error:  # and nothing after that
        return no_answer(error, RETRY)


def beginning_of(response: Any, most: int) -> bytes:
    """The first bytes of a response's body. What breaks off has been accepted."""
    from http.client import HTTPException

    body, part = b"", b"-"
    try:
        while part and len(body) < most:
            part = response.read1(most - len(body))
            body += part
    except (OSError, HTTPException, ValueError):
        pass
    return body


def answer_of(response: Any) -> Answer:
    """What a response says. Interim ones (102, 103) come before it: http.client skips
    100 only."""
    for _ in range(INTERIM_MAX):
        if not 100 <= response.status < 200 or response.status == 101:
            break
        response.headers = None
        response.begin()
    verdict = verdict_of(response.status)
    asked = response.headers.get("Retry-After")
    may_blame = verdict in (RETRY, HOLD, REFUSED)
    return Answer(verdict, f"HTTP {response.status}", asked, may_blame)


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
    return Answer(verdict, what, None, verdict == RETRY)


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


class Sender:
    """Delivers from one outbox. ends: monotonic, when this life is over. tell: for a
    person. patient: whether to await what the client writes after its event. status:
    the exit status when the watchdog ends the process."""

    def __init__(
        self,
        outbox: Outbox,
        tracker: Tracker,
        settings: Settings,
        ends: float,
        tell: Tell = silent,
        patient: bool = True,
        status: int = 0,
    ) -> None:
        self.outbox, self.tracker, self.settings = outbox, tracker, settings
        self.ends, self.tell, self.patient, self.status = ends, tell, patient, status
        self.state = outbox.state()
        self.opener: OpenerDirector | None = None
        self.seen: set[str] = set()  # names found at the start, or dealt with since
        self.walk: Walk | None = None
        self.sending = ""  # the name of the ping whose request is on its way
        self.deadline = float("inf")  # monotonic, of that request
        self.watched = self.alarmed = False  # who ends a request that overstays
        self.began_with = self.fingerprint()

    def is_over(self) -> bool:
        """Whether this life is."""
        return time.monotonic() >= self.ends

    def fingerprint(self) -> list[tuple[int, int, int]]:
        """What changes when this file is replaced, or the outbox removed."""
        try:
            script, outbox = os.stat(THIS_FILE), os.stat(self.outbox.path("outbox"))
        except OSError:
            return []
        return [
            (script.st_size, script.st_mtime_ns, script.st_ctime_ns),
            (outbox.st_dev, outbox.st_ino, 0),
        ]

    def is_outdated(self) -> bool:
        """Whether the script or the outbox is not the one that this life began with."""
        return self.fingerprint() != self.began_with

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

    # The request on its way, and its watchdog

    def attempt(
        self, name: str, record: Record, requests: list[Request]
    ) -> Answer | None:
        """Send those requests of a ping that are still to be accepted, one after
        another; the first that is not delivered has the last word. None: there was none
        to send, or no time for all of them."""
        answer = None
        for request in requests[record.accepted :]:
            if answer and self.is_over():
                return None
            answer = self.send(name, record.ping, request)
            if answer.verdict != DELIVERED:
                break
            record.accepted += 1
            if record.accepted < len(requests):
                self.remember(name, record)
        return answer

    def remember(self, name: str, record: Record) -> None:
        """Note how many requests were accepted, before the next one goes: whoever comes
        after us goes on behind them."""
        try:
            self.outbox.rewrite(name, record)
        except OSError:
            pass  # a full disk: after a crash they are repeated

    def send(self, name: str, ping: Fields, request: Request) -> Answer:
        """Send one request; it has a deadline of its own."""
        self.sending = name
        try:
            self.opener = self.opener or make_opener(self.tracker.url)
        except ImportError as error:  # some distributions ship a part of the library
            self.tell(f"this Python lacks the module {error.name}")
            return Answer(HOLD, f"this Python lacks the module {error.name}")
        limit = self.settings.timeout_s
        if not self.patient:
            limit = max(0.1, min(limit, (self.ends - time.monotonic()) / DEADLINE))
        begun = time.monotonic()
        self.watch_over(DEADLINE * limit)
        answer = post(self.opener, request, limit, self.tracker.reads)
        self.watch_over(float("inf"))
        if answer.verdict == DELIVERED and self.tracker.refuses(answer.body):
            answer = Answer(REFUSED, f"{answer.what}, rejected", may_blame=True)
        took_ms = (time.monotonic() - begun) * 1000
        self.tell(
            f"{ping.get('event')} {ping['event_id']} to {origin(self.tracker.url)}: "
            f"{answer.what} in {took_ms:.0f} ms, {answer.verdict}"
        )
        return answer

    def watch_over(self, seconds: float) -> None:
        """See to it that what is sent now ends within so many seconds: by the watchdog
        or, where there is no thread to be had, by an alarm, which a hung resolver does
        not hear."""
        self.deadline = time.monotonic() + seconds
        if not self.watched:
            import _thread

            self.watched = True
            try:
                _thread.start_new_thread(self.watch, ())
            except RuntimeError:
                self.log("no thread to be had for the watchdog")
                self.alarmed = hasattr(os, "fork")  # Windows has no alarm
        if self.alarmed:
            import signal

            signal.signal(signal.SIGALRM, self.cut_off)
            signal.alarm(0 if seconds == float("inf") else int(seconds) + 1)

    @staticmethod
    def cut_off(*_: object) -> None:
        """The alarm's handler: the request on its way fails."""
        raise TimeoutError("timed out")

    def watch(self) -> None:
        """The watchdog, a thread. When a request overstays (a hung resolver, a dripping
        response), count that and end the process: nothing else ends the request."""
        while time.monotonic() < self.deadline:
            time.sleep(LOOK_S / 2)
        try:
            answer = Answer(RETRY, "no whole answer in time", may_blame=True)
            if self.walk and self.walk.is_known_bad(self.sending, answer):
                self.state.save()
            else:
                self.state.suspect(self.sending)
                self.fail(answer)
            self.tell("no whole answer in time; the ping waits")
        finally:
            os._exit(self.status)

    # From pass to pass

    def fail(self, answer: Answer) -> None:
        """Count a pass that failed, and start a back-off. The row of failures begins
        anew when it is a person's turn to mend something, or no more."""
        now, state = time.time(), self.state
        mended = (answer.verdict in HOLDS) != (state.verdict in HOLDS)
        state.failures = 1 if mended else min(state.failures + 1, FAILURES_MAX)
        wait = backoff_s(answer.verdict, state.failures, answer.retry_after, now)
        state.set_at, state.not_before = now, now + wait
        state.verdict, state.problem = answer.verdict, answer.what
        state.problem_at = now
        state.save()
        self.log(f"{answer.verdict}: {answer.what}, next try in {wait:.0f} s")

    def refresh(self) -> None:
        """Look at what others have written; not where only this process knows."""
        if self.state.saved:
            self.state = self.outbox.state()

    def backoff_left_s(self) -> float:
        """Seconds until the back-off ends, 0 when none stands."""
        self.refresh()
        return self.state.backoff_left_s(time.time())

    def one_pass(self) -> None:
        """Try all that waits and is due, until an answer says that now is no time. The
        lock must be held."""
        self.refresh()
        self.walk = Walk(self)
        self.walk.go()

    def news(self) -> bool:
        """Whether a ping waits that has come since, and was not dealt with."""
        return not self.seen.issuperset(self.outbox.waiting())

    def linger(self) -> None:
        """After a tool's event stay a while with the lock in hand, for the next one:
        the hooks meanwhile start no process. Ends when there is news or no use."""
        if not (self.walk and self.walk.last_event in BURSTS):
            return
        until = min(time.monotonic() + LINGER_S, self.ends)
        looked, again = 0, True
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            if self.is_outdated():
                return
            changed = os.stat(self.outbox.path("outbox")).st_mtime_ns
            # Once more after each change: two may have the same time.
            if (changed != looked or again) and self.news():
                return
            looked, again = changed, changed != looked

    def work(self) -> None:
        """Passes, one for each burst of pings, while no back-off stands; then the daily
        sweep. The lock must be held."""
        while True:
            self.one_pass()
            if self.is_over() or self.state.backoff_left_s(time.time()):
                break
            if self.patient:
                self.linger()
            if not self.news() or self.is_outdated():
                break
        self.sweep()

    def live(self, lock: Lock | None) -> None:
        """Pass after pass, to the end of this life. After each the lock is given back,
        and then the outbox listed once more: a hook that found the lock busy counts on
        that. So news begin a new life."""
        while lock is not None:
            if not self.backoff_left_s():
                self.work()
            wait = self.backoff_left_s()
            alone = not self.state.saved and not self.is_outdated()
            if wait and alone:  # nobody else knows of it: the lock stays here
                time.sleep(max(0.0, min(wait, self.ends - time.monotonic())))
                if not self.is_over():
                    continue
            lock.release()
            if not wait and self.news():
                lock = self.outbox.take_lock()
                if lock and self.is_outdated():  # go on by the code as it is now
                    bytecode_serves()  # stale bytecode is not what it shall run
                    start_sender({self.outbox.name(): lock}, self.settings.environ)
                    return
                if self.is_over():
                    self.ends = time.monotonic() + LIFE_S
                continue
            wait = wait or self.pace_left_s()
            if not wait or time.monotonic() + wait >= self.ends:
                return
            time.sleep(wait)
            lock = self.outbox.take_lock()

    def pace_left_s(self) -> float:
        """Seconds until the next part of a backlog may go, 0 when there is none."""
        if not (self.walk and self.walk.paced):
            return 0.0
        return self.state.pace_left_s(time.time())

    def sweep(self) -> None:
        """Once a day: report sessions that were lost, drop accounts long unused. While
        pings wait, a session is not lost."""
        now, accounts = time.time(), self.outbox.path("accounts")
        if 0 <= now - self.state.swept_at < QUIET_S or self.outbox.waiting():
            return
        for name in os.listdir(accounts) if os.path.isdir(accounts) else ():
            if self.is_over():
                return
            path = os.path.join(accounts, name)
            try:
                unfinished = name.startswith(".")
                if age_s(path) > QUIET_S and not unfinished:
                    report_lost(self.outbox, path, self.settings, self.ends)
                if age_s(path) > (UNFINISHED_S if unfinished else ACCOUNT_MAX_S):
                    remove(path)
            except Exception as error:  # noqa: BLE001 - it must not hide the others
                self.log(f"an account is broken: {type(error).__name__}")
        self.state.swept_at = now
        self.state.save()


class Walk:
    """One walk along an outbox, oldest first: pings that have never failed, then
    suspects.

    After an answer that may be the ping's fault or the tracker's, witnesses are heard:
    the next ping, and the newest of another kind. Is one delivered, the tracker is
    well, and the ping is charged or set aside; else the walk ends with a back-off, and
    nobody is to blame. So no ping stands in the way of the others, and no bad day of
    the tracker empties an outbox.

    delivered: pings so far. last_event: of the last one delivered. paced: whether a
    part of the backlog must wait.
    """

    def __init__(self, sender: Sender) -> None:
        self.sender, self.outbox, self.state = sender, sender.outbox, sender.state
        self.tried = self.delivered = self.refusals_left = 0
        self.last_event = self.last_answer = ""
        self.paced = False
        for name in self.outbox.strangers():
            self.set_aside(name, "no ping")
        waiting = self.outbox.waiting()
        if sender.walk is None:  # its first: the next sender's, if life is too short
            sender.seen.update(waiting)
        self.names = self.within_bounds(waiting)
        self.forget_suspects()
        suspects = self.state.suspects
        self.fresh = [name for name in self.names if name not in suspects]
        self.done: set[str] = set()  # tried in this walk
        self.first_undone = 0  # in `fresh`
        self.looked_into: dict[str, tuple[object, object]] = {}
        self.met: set[object] = set()  # sessions of which a ping was charged
        self.backlog_left = self.backlog_share()

    def go(self) -> None:
        """Walk to the end, or until an answer says that now is no time."""
        complete = self.try_fresh() and self.try_suspects()
        if complete and self.tried and not self.paced:
            self.state.recovered_at = self.state.pace_pings = self.state.paced_until = 0
        if self.tried:
            self.state.save()
            self.sender.log(
                f"delivered {self.delivered} of {len(self.names)}, "
                f"last answer: {self.last_answer}"
            )

    # What waits

    def within_bounds(self, names: list[str]) -> list[str]:
        """The newest OUTBOX_MAX_PINGS names; the others' pings are lost. They go some
        at a time, counted before: a foreground sender may be killed meanwhile."""
        excess = names[:-OUTBOX_MAX_PINGS]
        for start in range(0, len(excess), 100):
            if self.sender.is_over():
                break
            some = excess[start : start + 100]
            for name in some:
                self.count_loss(name, "outbox full")
            self.state.save()
            for name in some:
                remove(self.outbox.file(name))
            self.sender.seen.update(some)
        return names[-OUTBOX_MAX_PINGS:]

    def forget_suspects(self) -> None:
        """Drop those that wait no more; and those least charged, if there are too many:
        in an outage everything looks suspect."""
        suspects = self.state.suspects
        for name in set(suspects).difference(self.names):
            del suspects[name]
        most_charged = sorted(suspects, key=lambda name: -suspects[name].charges)
        for name in most_charged[SUSPECTS_MAX:]:
            del suspects[name]

    def look_into(self, name: str) -> tuple[object, object]:
        """(event, session) of a ping; session: None when nothing is still to be charged
        to it. Each file is looked into once."""
        if name not in self.looked_into:
            event = session = None
            try:
                ping, local = self.outbox.read(name)
                event, session = ping.get("event"), local and ping.get("session_id")
            except (OSError, ValueError):
                pass  # it will be found out when it is its turn
            self.looked_into[name] = event, session or None
        return self.looked_into[name]

    def count_loss(self, name: str, reason: str) -> None:
        """Count a ping that will not be delivered, and the tokens charged to it."""
        self.state.lost(reason)
        try:
            ping = self.outbox.read(name)[0]
            self.state.lost("tokens", int(ping["total_tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def set_aside(self, name: str, reason: str) -> None:
        """Move what can never be delivered out of the others' way."""
        self.count_loss(name, reason)
        self.state.suspects.pop(name, None)
        self.state.save()
        self.outbox.set_aside(name)

    # After an outage all machines come back at once: the backlog goes bit by bit

    def backlog_share(self) -> int:
        """How many pings of an outage's backlog may go in this walk."""
        state, now = self.state, time.time()
        if state.failures:  # the first walk after the outage, if it is over
            state.recovered_at, state.pace_pings = now, PACE_PINGS
            state.paced_until = 0
        elif not 0 < state.recovered_at <= now:
            state.recovered_at = 0
        if not state.recovered_at:
            return OUTBOX_MAX_PINGS
        return 0 if state.pace_left_s(now) else state.pace_pings

    def must_wait(self, name: str) -> bool:
        """Whether a ping is of the backlog, and this walk's share of it is sent."""
        if not self.state.recovered_at or ns_of(name) / 1e9 > self.state.recovered_at:
            return False
        if self.backlog_left > 0:
            self.backlog_left -= 1
            return False
        if not self.paced:
            self.paced = True
            self.pace()
        return True

    def pace(self) -> None:
        """Let the rest of the backlog wait; twice as many the next time."""
        from random import uniform

        state, now = self.state, time.time()
        if not state.pace_left_s(now):
            state.paced_until = now + uniform(*PACE_S)
            if self.delivered == self.tried:
                state.pace_pings = min(2 * state.pace_pings, OUTBOX_MAX_PINGS)
            state.save()

    # Pings that have never failed

    def try_fresh(self) -> bool:
        """Try them; False when the walk is over."""
        for name in self.fresh:
            if self.sender.is_over():
                return False
            self.sender.seen.add(name)
            if name in self.done or self.must_wait(name):
                continue
            answer = self.attempt(name)
            if answer is None or answer.verdict == DELIVERED:
                continue
            if not self.survives(name, answer):
                return False
        return True

    def survives(self, name: str, answer: Answer) -> bool:
        """Deal with an answer that is no success; False when the walk is over."""
        if not answer.may_blame:
            self.sender.fail(answer)
            return False
        if answer.verdict == RETRY and retry_after_s(answer.retry_after, time.time()):
            self.state.suspect(name)  # it asks for silence: others go first, later
            self.sender.fail(answer)
            return False
        if answer.verdict == REFUSED and self.refusals_left:
            self.refusals_left -= 1
            self.blame(name, answer)
            return True
        return self.hear_witnesses(name, answer)

    def hear_witnesses(self, name: str, answer: Answer) -> bool:
        """Find out whose fault an answer is; False when it may be the tracker's."""
        failed, last = {name: answer}, answer
        for witness in self.witnesses(name):
            found = self.attempt(witness)
            if found is None:
                continue
            last = found
            if found.verdict == DELIVERED:
                self.refusals_left = WITNESS_REFUSALS
                for suspect, its_answer in failed.items():
                    self.blame(suspect, its_answer)
                return True
            if not found.may_blame:
                break  # the tracker's own word, or none
            failed[witness] = found
        for suspect in failed:
            self.state.suspect(suspect)
        if self.delivered and last is answer and answer.verdict in HOLDS:
            return True  # nobody to ask, but others were taken: it alone waits
        self.sender.fail(answer if last.may_blame else last)
        return False

    def witnesses(self, name: str) -> Iterator[str]:
        """At most two pings that have never failed: the next one, and the newest of
        another kind of event, else the newest."""
        rest = [other for other in self.fresh if other not in self.done]
        if rest:
            yield rest.pop(0)
        kind = self.look_into(name)[0]
        for other in reversed(rest):
            if self.look_into(other)[0] not in (kind, None):
                yield other
                return
        if rest:
            yield rest[-1]

    def blame(self, name: str, answer: Answer) -> None:
        """The tracker is well: refuse the ping for good, or charge it."""
        if answer.verdict == REFUSED:
            self.set_aside(name, f"refused: {answer.what}")
            return
        suspect, now = self.state.suspect(name), time.time()
        suspect.charges, suspect.tried_at = suspect.charges + 1, now
        old = now - ns_of(name) / 1e9 > POISON_AGE_S
        if suspect.charges >= POISON_CHARGES and old:
            self.set_aside(name, "always fails")

    # Suspects

    def try_suspects(self) -> bool:
        """Try those that are due, the longest untried first; False when the walk is
        over. What was delivered in this walk is their witness."""
        suspects, now = self.state.suspects, time.time()
        self.sender.seen.update(suspects)
        due = [
            name
            for name, suspect in suspects.items()
            if name not in self.done and suspect.is_due(now)
        ]
        for name in sorted(due, key=lambda name: (suspects[name].tried_at, name)):
            if self.sender.is_over():
                return False
            if self.must_wait(name):
                continue
            answer = self.attempt(name)
            if answer is None or answer.verdict == DELIVERED:
                continue
            if not self.is_known_bad(name, answer):
                self.sender.fail(answer)
                return False
            if not self.delivered:
                return False  # nothing tells what the next one's answer would mean
        return True

    def is_known_bad(self, name: str, answer: Answer) -> bool:
        """Whether a failed suspect's answer says nothing of the tracker: others were
        delivered in this walk, and it is charged, or it was charged before."""
        suspect = self.state.suspects.get(name)
        if not (suspect and answer.may_blame):
            return False
        suspect.tried_at = time.time()
        if self.delivered:
            self.blame(name, answer)
            return True
        return suspect.charges > 0

    # One ping

    def attempt(self, name: str) -> Answer | None:
        """Send a ping; None when there is nothing to send under `name`, or no time."""
        record = self.read_record(name)
        if record is None:
            return None
        requests = self.sender.tracker.requests(record.ping, record.beside)
        answer = self.sender.attempt(name, record, requests)
        if answer is None:
            if not self.sender.is_over():
                self.drop(name)
            return None
        self.tried += 1
        self.last_answer = answer.what
        if answer.verdict == DELIVERED:
            # Before its file goes: after a crash it may stand in sent.jsonl twice, but
            # never not at all.
            self.sender.keep(record.ping, requests, answer)
            self.accepted(name, record.ping)
        return answer

    def drop(self, name: str) -> None:
        """Remove a ping of which the tracker wants nothing: so it is no witness."""
        remove(self.outbox.file(name))
        self.state.suspects.pop(name, None)

    def accepted(self, name: str, ping: Fields) -> None:
        """The tracker has the ping: only now its file goes."""
        remove(self.outbox.file(name))
        self.delivered += 1
        if self.refusals_left:  # a witness that came by itself
            self.refusals_left = WITNESS_REFUSALS
        self.last_event = str(ping.get("event"))
        state = self.state
        state.suspects.pop(name, None)
        state.failures, state.not_before = 0, 0
        state.delivered_at = time.time()

    def read_record(self, name: str) -> Record | None:
        """The ping to send, its usage charged; None when there is none under `name`, or
        no time to charge those before it."""
        self.done.add(name)
        try:
            record = self.outbox.record(name)
        except OSError:  # gone, or an I/O error: perhaps another time
            return None
        except ValueError:
            self.set_aside(name, "no ping")
            return None
        if not record.local:
            return record
        for older in self.older_of_session(name, record.ping.get("session_id")):
            if self.sender.is_over():
                return None
            try:
                self.charge(older, self.outbox.record(older))
            except (OSError, ValueError):
                continue
        return self.charge(name, record)

    def charge(self, name: str, record: Record) -> Record:
        """The ping with its usage in it; whatever a transcript holds, the ping goes."""
        sender = self.sender
        try:
            return charge(self.outbox, name, record, sender.ends, sender.patient)
        except Exception as error:  # noqa: BLE001
            sender.log(f"usage left out: {type(error).__name__}")
            return record

    def older_of_session(self, name: str, session_id: object) -> Iterator[str]:
        """The session's older pings that are sent later than `name`: they are charged
        before it, so that the tokens are each turn's own."""
        fresh = self.fresh
        while self.first_undone < len(fresh) and fresh[self.first_undone] in self.done:
            self.first_undone += 1
        for older in fresh[self.first_undone :]:
            if older >= name:
                return
            event, session = self.look_into(older)
            if older in self.done or session != session_id:
                continue
            # Those that tell usage; and the first, with which the account opens.
            if event in USAGE_EVENTS or session_id not in self.met:
                self.met.add(session_id)
                self.looked_into[older] = event, None
                yield older


def deliver_now(
    outbox: Outbox,
    tracker: Tracker,
    settings: Settings,
    ends: float,
    tell: Tell,
    name: str,
) -> None:
    """Deliver while a hook waits, until `ends` (monotonic). Debug mode ignores a
    back-off, once. name: the hook's ping; no more is waited for when it is gone. (There
    may be none: then another sender at work is enough.)"""
    state = outbox.state()
    left = state.backoff_left_s(time.time())
    if left and not settings.debug:
        return
    if left:
        why = state.problem or "after an outage"
        tell(f"a back-off lasts {left:.0f} s more ({why}); this attempt ignores it")
    lock = outbox.take_lock()
    while lock is None:
        if not name or not os.path.exists(outbox.file(name)):
            return
        if time.monotonic() >= ends:
            raise Skipped("a sender is at work and has the ping; see sender.log")
        time.sleep(LOOK_S / 2)
        lock = outbox.take_lock()
    sender = Sender(outbox, tracker, settings, ends, tell, patient=False)
    while lock is not None:
        sender.work()
        left = sender.backoff_left_s()
        if left and not sender.state.saved:  # nobody else knows: at most one a second
            time.sleep(max(0.0, min(1.0, ends - time.monotonic())))
        lock.release()
        if left or sender.is_over() or not sender.news():
            return
        lock = outbox.take_lock()


def deliver_in_background(
    outbox: Outbox, tracker: Tracker, settings: Settings, lock: Lock
) -> None:
    """A detached sender's life."""
    try:
        inherited, own = os.fstat(lock.fd), os.lstat(outbox.path("lock"))
        held: Lock | None = lock if os.path.samestat(inherited, own) else None
    except OSError:
        held = None
    sender = Sender(outbox, tracker, settings, time.monotonic() + LIFE_S)
    try:
        sender.live(held or outbox.take_lock())
    except Exception as error:  # noqa: BLE001 - or each hook would start one in vain
        if os.path.isdir(outbox.path("outbox")):  # else it was removed meanwhile
            sender.state.suspect(sender.sending)
            sender.fail(Answer(RETRY, f"internal error: {type(error).__name__}"))


def send(settings: Settings, tell: Tell) -> None:
    """Deliver as the command line says: `foreground SECONDS NAME DESTINATION`, or
    `detached FD DESTINATION`, with other destinations that are to have a sender behind
    it. DESTINATION is the name of its directory, FD its lock, NAME the hook's ping."""
    gc.enable()
    if hasattr(gc, "set_threshold"):  # PyPy has none
        gc.set_threshold(10_000)  # importing urllib would set off a hundred collections
    began = time.monotonic()
    how, number, *names = sys.argv[3:]
    name = names.pop(0) if how == "foreground" else ""
    for fd, other in zip(names[1::2], names[2::2]):
        try:
            start_sender({other: Lock(int(fd))}, settings.environ)
        except OSError:
            continue  # the next hook tries it again
    tracker = find_tracker(settings, *names[:1])
    outbox = outbox_of(settings, tracker)
    outbox.need_sound()
    if how == "foreground":
        ends = began + float(number) - 0.25  # so that a failure is still noted
        deliver_now(outbox, tracker, settings, ends, tell, name)
        return
    if os.name == "posix":
        import signal

        os.nice(5)  # the session's own work comes first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # our shell may ignore it
    deliver_in_background(outbox, tracker, settings, Lock(int(number)))


def sender() -> NoReturn:
    """What a hook starts."""
    run_for_claude_code(send)


# ======================================================================================
# All below is run by a person: the commands.
# ======================================================================================


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
        self.managed_only = any(
            file.content.get("allowManagedHooksOnly") for file in self.files
        )

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


# -- Stand-ins -------------------------------------------------------------------------


def shown(path: str) -> str:
    return path.replace(os.path.expanduser("~") + os.sep, "~" + os.sep)


def masked(url: str) -> str:
    return origin(url) + "/…"


class PingName:
    def __init__(self, name: str) -> None:
        self.ns = int(name[:20])


def adopt(former: Outbox, present: Outbox, name: str) -> None:
    os.replace(former.file(name), present.file(name))


# -- Commands: flush -------------------------------------------------------------------

MEANINGS = (  # of an answer, by what it begins with
    (("HTTP 401", "HTTP 402", "HTTP 403"), "is the token in {token} right, and paid?"),
    (("HTTP 404", "HTTP 405", "HTTP 410"), "is the URL in {url} right, is it there?"),
    (("HTTP 408", "HTTP 409", "HTTP 425", "HTTP 429"), "it is busy; sent again later"),
    (("HTTP 407", "proxy"), "HTTPS_PROXY may lack USER:PASSWORD@, NO_PROXY this host"),
    (("SOCKS",), "it is not supported; name an HTTP proxy in HTTPS_PROXY"),
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
    token = tracker.secrets[0]
    url = next((name for name in tracker.variables if name != token), token)
    dislike = "it may not like a field, or the size"
    if kind == OTLP.kind:
        dislike = "it may take protobuf only, and no JSON"
    meaning = meaning.replace("{token}", token).replace("{url}", url)
    return what.replace("HTTP ", "") + ": " + meaning.replace("{dislike}", dislike)


class Teller:
    """Prints what a sender tells, in a user's words, and counts what was delivered."""

    delivered = 0

    def __call__(self, text: str) -> None:
        said, _, verdict = text.rpartition(", ")
        self.delivered += verdict == DELIVERED
        print(
            f"{said}, kept" if verdict in (NOT_NOW, RETRY, HOLD) else text, flush=True
        )


def take_settings() -> None:
    """Give a hook that a person runs in debug mode what Claude Code would give it, and
    say where the URL is from."""
    if not Settings(dict(os.environ)).debug or "CLAUDE_PROJECT_DIR" in os.environ:
        return
    try:
        around = Surroundings()
    except (Skipped, OSError):
        return
    source = around.sources.get(URL_NAME)
    if source and URL_NAME not in os.environ:
        print(f"TelemHQ hook: {URL_NAME} is from {shown(source)}", file=sys.stderr)
    os.environ.update(around.settings.environ)


def wait_for_lock(outbox: Outbox, ends: float) -> Lock:
    """The outbox's lock; Skipped when a sender still has it at `ends` (monotonic)."""
    lock = outbox.take_lock()
    while lock is None:
        if time.monotonic() >= ends:
            raise Skipped(
                f"a sender is at work in {shown(outbox.directory)}; try later"
            )
        time.sleep(LOOK_S)
        lock = outbox.take_lock()
    return lock


def flush_outbox(outbox: Outbox, tracker: Tracker, settings: Settings) -> int:
    """Deliver what waits, in spite of a back-off; how many pings that were."""
    tell, ends = Teller(), time.monotonic() + LIFE_S
    sender = Sender(outbox, tracker, settings, ends, tell, status=1)
    while True:
        lock = wait_for_lock(outbox, ends)
        sender.one_pass()
        lock.release()
        # A hook that found the lock busy counts on this look.
        if sender.backoff_left_s() or sender.is_over() or not sender.news():
            return tell.delivered


def is_kept_by_client(around: Surroundings) -> bool:
    """Whether only Claude Code knows TelemHQ's URL: it keeps a plugin's options."""
    settings = around.settings
    wanted = TelemHQ.kind in settings.destinations and not settings.url
    return wanted and URL_NAME not in settings.environ and bool(around.plugin_in())


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
    pings = f"{counted(len(names), 'ping')} of {', '.join(sorted(projects)[:5])}"
    age = span(time.time() - PingName(names[0]).ns / 1e9)
    return f"{pings} wait{'s' if len(names) == 1 else ''}, the oldest for {age}"


def adopt_all(present: Outbox, tracker: Tracker, state_dir: str, yes: bool) -> None:
    """Move what waits for former URLs of a tracker to the present one's, if a person
    says so: it may be another project's."""
    for former in outboxes(state_dir):
        other = former.kind() == present.kind() and former.name() != present.name()
        if not (other and former.waiting()):
            continue
        former.need_sound()
        print(what_waits(former))
        print(f"  from {former.name()} to {present.name()}, {origin(tracker.url)}")
        if not yes and not (at_a_terminal() and ask("Move them?")):
            raise Skipped("nothing was moved; `flush --adopt --yes` does not ask")
        os.makedirs(present.path("outbox"), exist_ok=True)
        locks = [wait_for_lock(one, time.monotonic()) for one in (former, present)]
        for name in former.waiting():
            adopt(former, present, name)
        for lock in locks:
            lock.release()


def add_flush_arguments(parser: ArgumentParser) -> None:
    """The options of flush."""
    told = "first move here what waits for a former URL; it shows what, and asks"
    parser.add_argument("--adopt", action="store_true", help=told)
    parser.add_argument("--yes", action="store_true", help="move it without asking")


def flush(options: Namespace) -> int:
    """deliver what waits now, in spite of a back-off"""
    around, delivered, left = Surroundings(), 0, 0
    settings = around.settings
    os.environ.update(settings.environ)  # urllib looks for proxies there
    if is_kept_by_client(around) and settings.destinations == [TelemHQ.kind]:
        how = f"run `{URL_NAME}=… {SCRIPT} flush`, or start a session"
        raise Skipped(f"only Claude Code knows the plugin's URL; {how}")
    for tracker in destinations(settings, print):
        outbox = outbox_of(settings, tracker)
        outbox.need_sound()
        if options.adopt:
            adopt_all(outbox, tracker, settings.state_dir or "", options.yes)
        if outbox.waiting():
            delivered += flush_outbox(outbox, tracker, settings)
        if outbox.waiting():
            left += len(outbox.waiting())
            print(f"{tracker.kind}: {in_words(outbox.state().problem, tracker.kind)}")
    print(f"{delivered} delivered, {left} left.")
    return 1 if left else 0


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


# -- Commands: what has left -----------------------------------------------------------


def deliveries(outbox: Outbox) -> list[Fields]:
    """The lines of sent.jsonl, the oldest first, each ping once: after a crash it may
    stand there twice."""
    import json

    found: dict[str, Fields] = {}
    for name in ("sent.jsonl.1", "sent.jsonl"):
        try:
            lines = read_file(outbox.path(name), 2 * SENT_MAX_BYTES).splitlines()
        except (OSError, ValueError):
            continue
        for line in lines:
            try:
                delivery = json.loads(line)
                found.setdefault(str(delivery["ping"]["event_id"]), delivery)
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a full disk
    return list(found.values())


# -- Commands: a hook with a tracker of our own, on loopback ---------------------------

ARRIVES_S = 30.0  # a ping that has not come by then is lost
HOOK_MOST_S = 15.0  # a hook that takes longer is stuck


def receiver(arrived: Queue[tuple[float, Fields]]) -> HTTPServer:
    """A tracker on loopback that says 200. arrived: gets (monotonic, ping)."""
    import http.server
    import json
    import threading

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

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    serve = server.serve_forever
    threading.Thread(target=serve, args=(LOOK_S / 10,), daemon=True).start()
    return server


def play(
    command: list[str], event: Fields, environ: dict[str, str], directory: str
) -> tuple[str, Fields, str]:
    """Run a hook as Claude Code does, its state in a directory: (what it printed, the
    ping that arrived or {}, times). One that hangs is ended."""
    import queue
    import subprocess

    arrived: Queue[tuple[float, Fields]] = queue.Queue()
    server, state_dir = receiver(arrived), os.path.join(directory, "state")
    environ = {**environ, "TELEMHQ_STATE_DIR": state_dir}
    environ["TELEMHQ_DESTINATIONS"] = TelemHQ.kind  # nobody else is to get samples
    environ[URL_NAME] = f"http://127.0.0.1:{server.server_address[1]}/ping/sample"
    begun, printed = time.monotonic(), os.path.join(directory, "printed")
    with open(printed, "wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=environ,
            start_new_session=True,
        )
    try:
        process.communicate(encode_json(event).encode(), HOOK_MOST_S)
        hook_ms = (time.monotonic() - begun) * 1000
        made = os.path.isdir(state_dir)  # else nothing will arrive
        at, ping = arrived.get(timeout=ARRIVES_S if made else LOOK_S)
        times = f"hook {hook_ms:.0f} ms, in all {(at - begun) * 1000:.0f} ms"
    except subprocess.TimeoutExpired:
        getattr(os, "killpg", os.kill)(process.pid, 9)
        return "it does not end", {}, ""
    except queue.Empty:
        ping, times = {}, ""
    server.shutdown()
    end_senders(state_dir)
    return read_file(printed, STATE_MAX_BYTES).decode("utf-8", "replace"), ping, times


def end_senders(state_dir: str) -> None:
    """Wait for senders: they end where the outbox is gone, and unlock before."""
    import shutil

    for outbox in outboxes(state_dir):
        shutil.rmtree(outbox.path("outbox"), ignore_errors=True)
        wait_for_lock(outbox, time.monotonic() + ARRIVES_S).release()
        time.sleep(LOOK_S)


# -- Commands: doctor ------------------------------------------------------------------

WAIT_OLD_S = 300.0  # a ping that waits for longer is worth a word
LAST_PINGS = 100  # of a destination are asked whether their usage was complete
GIT_BASH = "C:\\Program Files\\Git\\bin\\bash.exe"  # it runs hooks on Windows
ELSEWHERE = "mend that, or set TELEMHQ_STATE_DIR to a place of your own"


def run_checks(around: Surroundings, send: bool, run_all: bool = False) -> bool:
    """Print doctor's list; whether all is well. send: also send a real ping. run_all:
    run also what may be a stranger's command."""
    os.environ.update(around.settings.environ)  # urllib looks for proxies there
    version, well = client_version(), True
    looks = {
        "settings": check_files(around, version),
        "hooks": check_hooks(around, version, run_all),
        "bytecode": check_bytecode(installed_script()),
        "variables": check_variables(around),
        "trackers": check_trackers(around),
        "disk": check_disk(around),
        "test": send_test(around.settings) if send else iter(()),
    }
    for name, checks in looks.items():
        try:
            for good, line in checks:
                print(mark(good), line, flush=True)
                well = well and good is not False
        except (Skipped, OSError, ValueError) as error:
            print(mark(False), f"no more of the {name}: {error}")
            well = False
    return well


def check_files(
    around: Surroundings, version: str
) -> Iterator[tuple[bool | None, str]]:
    """Whether Claude Code reads the settings, and runs the hooks in them."""
    yield bool(version) or None, f"Claude Code {version or 'was not found'}"
    if around.managed_only:
        yield False, "allowManagedHooksOnly: hooks run in your company's settings only"
    for file in around.files:
        path, events = shown(file.path), [hook.event for hook in file.hooks()]
        if file.problem:
            yield False, f"Claude Code ignores the whole of {path}: {file.problem}"
        if is_too_old(version) and "StopFailure" in events:
            yield False, f"it ignores the whole of {path}: update it, or run `install`"
        if file.content.get("disableAllHooks"):
            yield False, f"{path} turns hooks off: take disableAllHooks out of it"


def hooks_of_ours(around: Surroundings) -> list[tuple[RegisteredHook, str]]:
    """[(hook that runs the script, its file)]; Claude Code runs the same one once."""
    found: dict[tuple[str, str], tuple[RegisteredHook, str]] = {}
    for file in around.files:
        for hook in filter(RegisteredHook.names_script, file.hooks()):
            found.setdefault((hook.event, hook.command), (hook, file.path))
    return list(found.values())


def check_hooks(
    around: Surroundings, version: str, run_all: bool
) -> Iterator[tuple[bool | None, str]]:
    """Whether each event runs the script, and once; each such command is run."""
    plugin, found = around.plugin_in(), hooks_of_ours(around)
    for event in dict.fromkeys([*EVENTS, *(hook.event for hook, _ in found)]):
        ours = [pair for pair in found if pair[0].event == event]
        for hook, path in ours:
            yield try_hook(hook, path, around, run_all)
        by = [shown(path) for _, path in ours]
        if plugin and event in EVENTS:
            by.append(f"the plugin ({shown(plugin)})")
        both = f"{event} by {' and '.join(by)}"
        if not by and (event != "StopFailure" or not is_too_old(version)):
            yield False, f"no hook for {event}: run `install`"
        elif len(by) > 1 and any(URL_NAME in hook.command for hook, _ in ours):
            yield None, f"{both}, to two URLs: each is told the whole"
        elif len(by) > 1:
            yield False, f"{both}: take one out, for each sends a ping"
        elif not ours:
            yield True, both


def try_hook(
    hook: RegisteredHook, path: str, around: Surroundings, run_all: bool
) -> tuple[bool, str]:
    """Run a hook's command; whether a ping of this version arrived."""
    import tempfile

    name = f"{hook.event} by {shown(path)}"
    known = path in [file.path for file in around.theirs()]
    known = known or hook.command == hook_command(hook.event)
    if not run_all and ("TELEMHQ_" in hook.command or not known):
        return False, f"{name} was not tried, for what it may do: `doctor --run-all`"
    git_bash = os.environ.get("CLAUDE_CODE_GIT_BASH_PATH") or GIT_BASH
    shell = "/bin/sh" if os.name == "posix" else git_bash
    event = {"hook_event_name": hook.event, "session_id": "x", "cwd": os.getcwd()}
    for debug in ("0", "1"):  # again when it failed without a word
        environ = {**around.settings.environ, "TELEMHQ_HOOK_DEBUG": debug}
        with tempfile.TemporaryDirectory() as place:
            said, ping, times = play([shell, "-c", hook.command], event, environ, place)
        if ping or said:
            break
    lines, remedy = said.strip().splitlines() or [""], "run `install`, or mend it"
    if not ping:
        why = lines[-1].rpartition("skipped: ")[2] or "nothing"
        return False, f"{name} sends nothing and says `{why}`: {remedy}"
    if said:  # which Claude Code shows to its user, or to the model
        return False, f"{name} prints `{lines[0]}`: {remedy}"
    if ping.get("hook_version") != __version__:
        other = f"{name} is version {ping.get('hook_version')}"
        return False, f"{other}: `install` makes it {__version__}"
    return True, f"{name}: arrived at doctor's own receiver, {times}"


def check_bytecode(script: str) -> Iterator[tuple[bool | None, str]]:
    """Whether what Python has cached of the installed script is made of it."""
    from importlib.machinery import SourceFileLoader
    from importlib.util import cache_from_source

    cached, loader = cache_from_source(script), SourceFileLoader("", script)
    if not (os.path.exists(cached) and os.path.exists(script)):
        return
    problem = unsound(os.path.dirname(cached))
    try:
        made = loader.source_to_code(loader.get_data(script), script)
        if loader.get_code("") != made:
            problem = "is not made of the script"
    except (EOFError, ValueError, TypeError):
        problem = "is damaged"
    if problem:
        yield False, f"{shown(cached)} {problem}: remove it, Python makes it anew"


def check_variables(around: Surroundings) -> Iterator[tuple[bool | None, str]]:
    """Whether each variable is understood; where the URL is, what a ping will say."""
    settings, documented = around.settings, f"{__doc__} {OTLP.variables}"
    for problem in settings.ignored:
        yield False, problem
    for name in sorted(settings.environ):
        test = name.startswith("TELEMHQ_TEST_")  # this project's own
        if name.startswith("TELEMHQ_") and name not in documented and not test:
            yield False, f"{name} is no variable of this script: see --help"
    source = shown(around.sources.get(URL_NAME) or "the shell's environment")
    if settings.url:
        yield True, f"pings go to {masked(settings.url)}, by {source}"
    elif URL_NAME in settings.environ:
        yield None, f"switched off here: {URL_NAME} is empty in {source}"
    elif is_kept_by_client(around):
        yield None, "Claude Code keeps the plugin's URL; it is not tried here"
    project = project_of({"cwd": os.getcwd()}, settings)
    yield None, f"pings from this directory say project {project}"


def check_trackers(around: Surroundings) -> Iterator[tuple[bool | None, str]]:
    """Whether the trackers are set up, and answer to what records nothing."""
    settings = around.settings
    trackers, problems = find_trackers(settings, read_secret)
    unset = is_kept_by_client(around) or settings.environ.get(URL_NAME) == ""
    for problem in problems:
        if not (unset and URL_NAME in problem):
            yield False, problem
    for tracker in trackers:
        name = f"{tracker.kind} at {origin(tracker.url)}"
        what = refusal(tracker, settings.timeout_s)
        if what:
            yield False, f"{name}: {in_words(what, tracker.kind)}"
        else:
            yield True, f"{name} answers; only `doctor --send` proves the token"
        if tracker.idle:
            yield None, f"{tracker.kind} gets nothing here: {tracker.idle}"


def refusal(tracker: Tracker, timeout_s: float) -> str:
    """What a tracker answers, within a sender's deadline, to what records nothing; ""
    when that is good."""
    import threading
    from urllib.request import getproxies_environment, proxy_bypass

    scheme, host, _ = split_url(tracker.url)
    proxy = getproxies_environment().get(scheme, "").lower()
    if proxy.startswith("socks") and not loopback(host) and not proxy_bypass(host):
        return "SOCKS proxy"
    question, opener = tracker.check(), make_opener(tracker.url)
    answers: list[Answer] = []

    def ask_it() -> None:
        answers.append(post(opener, question, timeout_s))

    thread = threading.Thread(target=ask_it, daemon=True)
    thread.start()
    thread.join(DEADLINE * timeout_s)
    answer = answers[0] if answers else Answer(RETRY, "no whole answer in time")
    got = question.body is None and answer.what in ("HTTP 400", "HTTP 405", "HTTP 422")
    return "" if got or answer.verdict == DELIVERED else answer.what


def obstacle(outbox: Outbox) -> str:
    """What keeps hooks from an outbox, "" when nothing does. It writes a file there, or
    where the directory would be made, and locks it, as hooks do; nothing stays."""
    import errno

    path = outbox.path("outbox")
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    trial = os.path.join(path, ".doctor")
    try:
        outbox.need_sound()
        write_file(trial, b" " * PING_MAX_BYTES)
        if os.name == "posix":
            import fcntl

            with open(trial, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except Skipped as error:
        return shown(str(error).partition(";")[0])
    except OSError as error:
        no_locks = error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
        what = "has no locks, so that pings go twice" if no_locks else "is not writable"
        return f"{shown(path)} {what} ({error.strerror})"
    finally:
        remove(trial)
    return ""


def check_disk(around: Surroundings) -> Iterator[tuple[bool | None, str]]:
    """Whether hooks can write, how delivery goes, what waits for other URLs."""
    settings, kept = around.settings, outboxes(around.settings.state_dir)
    trackers = find_trackers(settings, read_secret)[0]
    ours = [outbox_of(settings, tracker) for tracker in trackers]
    if is_kept_by_client(around):
        ours += [outbox for outbox in kept if outbox.kind() == TelemHQ.kind]
    nowhere = Outbox(os.path.join(settings.state_dir or "", "none"))
    problems = list(filter(None, map(obstacle, ours or [nowhere])))
    for problem in problems:
        yield False, f"{problem}: {ELSEWHERE}"
    if not problems:
        yield True, f"hooks can write to {shown(settings.state_dir or '')}"
    for outbox in ours:
        yield from check_delivery(outbox)
    for outbox in kept:
        known = outbox.name() in [other.name() for other in ours]
        if not known and outbox.waiting():
            yield None, f"for another URL {what_waits(outbox)} (`flush --adopt`)"


def check_delivery(outbox: Outbox) -> Iterator[tuple[bool | None, str]]:
    """How delivery from an outbox goes."""
    kind, state, now = outbox.kind(), outbox.state(), time.time()
    backoff_s = state.backoff_left_s(now)
    old = [n for n in outbox.waiting()[:1] if now - PingName(n).ns / 1e9 > WAIT_OLD_S]
    late = bool(backoff_s or old)
    remedy = ": `flush` sends now" if late else ""
    yield not late, f"{kind}: {what_waits(outbox)}{remedy}"
    if backoff_s:
        why = in_words(state.problem, kind)
        yield False, f"{kind}: the next try is in {span(backoff_s)}, for {why}"
    done = state.delivered_at
    when = f"{span(now - done)} ago" if done else "none yet"
    yield bool(done) or None, f"{kind}: last delivery: {when}"
    for reason, count in sorted(state.losses.items()):
        what = reason.rpartition("refused: ")[2]
        why = in_words(what, kind) if what.startswith("HTTP") else reason
        yield False, f"{kind}: {count} lost, {why}; `doctor --clear` when you saw it"
    pings = [line["ping"] for line in deliveries(outbox)[-LAST_PINGS:]]
    short = [ping for ping in pings if ping.get("usage_complete") is False]
    if short:
        text = f"{kind}: {len(short)} of the last {counted(len(pings), 'ping')} said"
        yield None, f"{text} usage_complete: false, {why_incomplete(short)}"


def why_incomplete(pings: list[Fields]) -> str:
    """Why pings lack tokens, most likely."""
    ends = [ping for ping in pings if ping.get("event") == "SessionEnd"]
    if not any("total_tokens" in ping for ping in pings):
        return "for the transcript or its account could not be read"
    if 2 * len(ends) > len(pings):
        return "for this Claude Code tells no cost at the end of `-p`"
    return "for an answer's end came late; the next ping has it"


def send_test(settings: Settings) -> Iterator[tuple[bool | None, str]]:
    """Send a ping that is marked as a test, the way that every ping goes."""
    event, ns = {"hook_event_name": "Test", "cwd": os.getcwd()}, time.time_ns()
    ping = make_ping(event, settings, project_of(event, settings), ns, 0)
    for tracker in destinations(settings, print):
        kind, outbox = tracker.kind, outbox_of(settings, tracker)
        name = enqueue(outbox, tracker, ns, ping, {})
        if not name:
            yield None, f"{kind} takes no test"
            continue
        flush_outbox(outbox, tracker, settings)
        if name in outbox.waiting():
            why = in_words(outbox.state().problem, kind)
            yield False, f"{kind} did not take the test, {why}"
        elif os.path.exists(outbox.path("refused", name)):
            yield False, f"{kind} refused the test: `doctor` says why"
        else:
            yield True, f"{kind} has taken the test {ping['event_id']}"


def add_doctor_arguments(parser: ArgumentParser) -> None:
    """The options of doctor."""
    for name, told in (
        ("--send", "send one real ping, with the event Test: that proves the token"),
        ("--clear", "forget the losses that you have seen"),
        ("--run-all", "also run what may be a stranger's command, say a project's"),
    ):
        parser.add_argument(name, action="store_true", help=told)


def doctor(options: Namespace) -> int:
    """check all that lies between an event and the tracker, and say what to do"""
    around = Surroundings()
    for outbox in outboxes(around.settings.state_dir) if options.clear else ():
        lock = wait_for_lock(outbox, time.monotonic() + LIFE_S)
        state = outbox.state()
        state.losses = {}
        state.save()
        lock.release()
    return 0 if run_checks(around, options.send, options.run_all) else 1


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
        run_checks(Surroundings(), False)
    return 0


# -- Commands: preview, demo -----------------------------------------------------------

DEMO_MODEL = "claude-opus-5-5"
SAMPLES: dict[str, Fields] = {  # beside what Claude Code sends with every event
    "PostToolUseFailure": {
        "tool_name": "Bash",
        "tool_input": {"command": "./deploy --password hunter2"},
        "error": "Exit code 3\nno /home/you/acme/deploy.key",
        "duration_ms": 1250,
    },
    "SessionEnd": {"reason": "prompt_input_exit"},
    "SessionStart": {"source": "startup", "model": DEMO_MODEL},
    "Stop": {"last_assistant_message": "The password is hunter2."},
    "StopFailure": {"error": "rate_limit", "last_assistant_message": "API Error: 429"},
}
SAMPLE_USED = dict(zip(TOKENS, (12, 950, 41200, 2300, 0, 44462)))
SHOWN_HEADERS = (*JSON_BODY, "Accept", "Idempotency-Key")  # others may hold secrets
PLACEHOLDERS = {"HEADERS": "X-Token=sample"}  # by a variable's last word
PLACEHOLDERS.update(
    dict.fromkeys(("URL", "ENDPOINT", "SERVER"), "https://tracker.test")
)


def sample(name: str, transcript: str) -> Fields:
    """A sample event."""
    event: Fields = {"hook_event_name": name, "session_id": f"5e551011{'-0000' * 4}"}
    return {
        **event,
        "cwd": "/home/you/acme",
        "transcript_path": transcript,
        **SAMPLES[name],
    }


def tracker_named(name: str, settings: Settings) -> Tracker:
    """A tracker by its kind, as it is set up; before it is, with placeholders."""
    if name not in TRACKERS:
        raise Skipped(f"there is no tracker {name}; there are: {', '.join(TRACKERS)}")
    make: Any = TRACKERS[name]
    environ = {**settings.environ, "TELEMHQ_DESTINATIONS": name}
    try:
        return find_tracker(Settings(environ))
    except Skipped as why:
        print(f"{why}; shown with placeholders.", file=sys.stderr)
    for variable in make.variables:
        environ[variable] = PLACEHOLDERS.get(variable.rpartition("_")[2], "sample")
    tracker: Tracker = make(Settings(environ), read_secret)
    return tracker


def print_requests(ping: Fields, tracker: Tracker, usage: bool) -> None:
    """Print what a tracker gets of a ping, with sample tokens, and no secrets."""
    import json

    beside: Fields = {"own": tracker.frozen(ping)}
    if usage and ping.get("event") in USAGE_EVENTS:
        counts = [SAMPLE_USED[name] for name in TOKENS[:5]]
        beside["messages"] = [["msg_01", DEMO_MODEL, time.time_ns() // 10**6, *counts]]
        beside["totals"] = beside["since_end"] = {**SAMPLE_USED, "tool_calls": 3}
        ping = gate({**ping, **SAMPLE_USED, "model": DEMO_MODEL})
        print("The token counts are samples.", file=sys.stderr)
    beside = gate_beside(beside, tracker.needs)
    requests = tracker.requests(ping, beside) if tracker.wants(ping) else []
    for request in requests:
        print(f"POST {masked(request.url)}")
        for header, value in request.headers.items():
            print(f"{header}: {value if header in SHOWN_HEADERS else '…'}")
        print(json.dumps(json.loads(request.body or b"{}"), indent=2) + "\n")
    if not requests:
        print(f"{tracker.kind} gets nothing of {ping.get('event')}. {tracker.idle}")


def add_preview_arguments(parser: ArgumentParser) -> None:
    """The options of preview."""
    told = "a sample; without it an event is read from stdin"
    parser.add_argument("event", nargs="?", choices=sorted(SAMPLES), help=told)
    told = "the requests that this tracker gets, instead of the ping"
    parser.add_argument("--destination", metavar="TRACKER", help=told)


def preview(options: Namespace) -> int:
    """print the ping that an event (stdin, or a sample) makes"""
    import json

    settings = Surroundings().settings
    if options.event:
        event = sample(options.event, "/home/you/session.jsonl")
        size = len(encode_json(event))
    else:
        if sys.stdin and sys.stdin.isatty():
            print("Paste an event (JSON), then Ctrl-D on a line of its own:")
        event, size = event_on_stdin()
    project = project_of(event, settings)
    ping = make_ping(event, settings, project, time.time_ns(), size)
    if options.destination:
        tracker = tracker_named(options.destination, settings)
        print_requests(ping, tracker, settings.usage)
        return 0
    print(json.dumps(ping, indent=2))
    if settings.usage and ping.get("event") in USAGE_EVENTS:
        print("Tokens are added later, from the transcript.", file=sys.stderr)
    return 0


def wrapped(text: str, begin: str = "", rest: str = "") -> str:
    """A text as wide as the terminal, broken between words only. begin, rest: what its
    lines begin with."""
    import shutil
    import textwrap

    width = min(88, shutil.get_terminal_size().columns)
    wrapper = textwrap.TextWrapper(width, begin, rest, break_long_words=False)
    wrapper.break_on_hyphens = False
    return wrapper.fill(text)


def fate(name: str, value: object, ping: Fields) -> str:
    """A field of an event, marked by what became of it."""
    import json

    text = json.dumps(value)
    if ping.get(name) == value:
        return text
    marks = {f"{name}_hash": " #", f"{name}_chars": " ="}
    mark = "".join(marks[kind] for kind in marks if kind in ping)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):  # no-color.org
        return f"\x1b[9;2m{text}\x1b[0m{mark}"  # struck out and dim (ECMA-48)
    return f"~~{text}~~{mark}"


def play_and_show(name: str, directory: str) -> None:
    """Run the hook on a sample event; print its times, what was handed over, what
    became of it, what left."""
    import json

    event = sample(name, os.path.join(directory, "session.jsonl"))
    start = f"import sys; sys.path.insert(0, {directory!r}); {IMPORT}"
    ours = [name for name in os.environ if name.startswith("TELEMHQ_")]
    environ = {name: os.environ[name] for name in os.environ if name not in ours}
    _, ping, times = play([sys.executable, "-ESc", start], event, environ, directory)
    if not ping:
        raise Skipped("a ping did not arrive")
    print(f"{name}: {times}")
    for field, value in event.items():
        if field != "hook_event_name":
            print(wrapped(f"{field}: {fate(field, value, ping)}", "  ", "    "))
    print(wrapped(json.dumps(ping), "  left ", "    ") + "\n")


def demo(_: Namespace) -> int:
    """show, on this machine only, what leaves of an event and what stays"""
    import py_compile
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        script = os.path.join(directory, SCRIPT)
        write_file(script, read_file(this_script(), STATE_MAX_BYTES))
        py_compile.compile(script)
        intro = "Claude Code hands an event to the hook; a tracker gets the ping."
        print(wrapped(intro) + "\n")
        play_and_show("PostToolUseFailure", directory)
        usage = {"input_tokens": 12, "output_tokens": 950}
        usage.update(cache_read_input_tokens=41200, cache_creation_input_tokens=2300)
        message = {"id": "msg_01", "model": DEMO_MODEL, "stop_reason": "end_turn"}
        row = {"type": "assistant", "message": {**message, "usage": usage}}
        text = encode_json({**row, "timestamp": iso_time(time.time_ns())}) + "\n"
        write_file(os.path.join(directory, "session.jsonl"), text.encode())
        play_and_show("Stop", directory)
    struck = "Struck out" if "\x1b" in fate("", "", {}) else "~~"
    text = f"{struck}: it stayed here. Of # only a hash has left, of = only the length."
    print(wrapped(text) + f"\n\nTo install it: python3 {SCRIPT} install")
    return 0


# -- Commands: sent, report ------------------------------------------------------------

GROUPS = ("day", "project", "model", "session")
COLUMNS = {  # of the table: name in a row, which is the pings' own -> heading
    "turns": "turns",
    "failed_turns": "failed",
    "tool_calls": "tools",
    "tool_failures": "failed",
    **dict(zip(TOKENS, "input output cached written thinking tokens".split())),
    "cost_usd": "cost $",
}
NOTHING = "Nothing was delivered yet: `doctor` says why, `flush` sends what waits."


def outboxes_named(name: str | None) -> list[Outbox]:
    """All outboxes, or those of that kind or directory's name."""
    kept = outboxes(Surroundings().settings.state_dir)
    found = [outbox for outbox in kept if name in (None, outbox.name(), outbox.kind())]
    if name and not found:
        known = ", ".join(outbox.name() for outbox in kept)
        raise Skipped(f"there is no destination {name}; there are: {known or 'none'}")
    return found


def add_sent_arguments(parser: ArgumentParser) -> None:
    """The options of sent."""
    parser.add_argument("-n", type=int, default=20, help="how many (20)")
    told = "only this one: a tracker, or its directory's name"
    parser.add_argument("--destination", metavar="NAME", help=told)


def sent(options: Namespace) -> int:
    """print the last pings that left, as they were sent, with time and answer"""
    found = [
        (outbox, deliveries(outbox)) for outbox in outboxes_named(options.destination)
    ]
    for outbox, lines in found:
        for line in lines[-options.n :]:
            for body in line.get("bodies") or [encode_json(line["ping"])]:
                print(line.get("at"), outbox.kind(), line.get("answer"), body)
    if not any(lines for _, lines in found):
        print(NOTHING, file=sys.stderr)
    return 0


def day_of(ping: Fields) -> str:
    """The day of a ping, here (not in UTC)."""
    seconds = seconds_of(ping.get("timestamp"))
    return time.strftime("%Y-%m-%d", time.localtime(seconds)) if seconds else "unknown"


def shares(ping: Fields, by: str) -> list[tuple[str, Fields]]:
    """[(row's name, what of the ping counts there)]; several with several models."""
    if by == "day":
        return [(day_of(ping), ping)]
    models = ping.get("models")
    if by != "model" or not isinstance(models, dict):
        name = "session_id" if by == "session" else by
        return [(str(ping.get(name, "unknown")), ping)]
    found = [
        (name, counts)
        for name, counts in models.items()
        if counts_by_model({name: counts})
    ]
    for _, counts in found:
        counts["total_tokens"] = sum(counts.get(kind, 0) for kind in TOKENS[:4])
    return found


def rows_of(pings: list[Fields], by: str) -> list[Fields]:
    """One row for each day, project, model or session, in order. cost_usd: None where
    no ping has told it yet."""
    columns = list(COLUMNS)[4 if by == "model" else 0 :]  # a model has no turns
    rows: dict[str, Fields] = {}
    for ping in pings:
        turn = ping.get("event") in ("Stop", "StopFailure")
        failed = turn and ping.get("status") == "failed"
        counted = {**ping, "turns": int(turn), "failed_turns": int(failed)}
        for key, part in shares(counted, by):
            found = [name for name in columns if number(part.get(name))]
            if found:
                empty = {by: key, **dict.fromkeys(columns, 0), "cost_usd": None}
                row = rows.setdefault(key, empty)
            for name in found:
                row[name] = round((row[name] or 0) + part[name], 6)
    return [rows[key] for key in sorted(rows)]


def cell(row: Fields, name: str) -> str:
    """A value of a row, for a person."""
    if row[name] is None:
        return printable("\u2013", "-")  # a dash: not known yet
    return f"{row[name]:.2f}" if name == "cost_usd" else f"{row[name]:,}"


def print_table(rows: list[Fields], by: str) -> None:
    """Print rows and their sums. Where a terminal has no room the kinds of tokens are
    left out, then names are cut off."""
    import shutil

    names = [name for name in rows[0] if name != by]
    total: Fields = {by: "in all"}
    for name in names:
        known = [row[name] for row in rows if row[name] is not None]
        total[name] = sum(known) if known else None
    rows = [*rows, total]
    keys = [by, *(clean(str(row[by])) for row in rows)]
    longest = max(map(len, keys))
    for left in (names, [name for name in names if name not in TOKENS[:5]]):
        lines = [[COLUMNS[name] for name in left]]
        lines += [[cell(row, name) for name in left] for row in rows]
        widths = [1 + max(map(len, column)) for column in zip(*lines)]
        room = shutil.get_terminal_size().columns - sum(widths)
        if room >= longest:
            break
    room = min(longest, max(room, len("2026-01-01")))
    for key, cells in zip(keys, lines):
        name = key if len(key) <= room else key[: room - 1] + "~"
        print(name.ljust(room) + "".join(map(str.rjust, cells, widths)))


def add_report_arguments(parser: ArgumentParser) -> None:
    """The options of report."""
    told = "one row for each (day)"
    parser.add_argument("--by", choices=GROUPS, default="day", help=told)
    told = "only the last N, today included"
    parser.add_argument("--days", type=int, metavar="N", help=told)
    told = "only this one: a tracker, or its directory's name"
    parser.add_argument("--destination", metavar="NAME", help=told)
    told = "a list of objects instead of tables"
    parser.add_argument("--json", action="store_true", help=told)


def report(options: Namespace) -> int:
    """add up what was delivered, by day, project, model or session"""
    import datetime
    import json

    found, days = [], options.days or 10**5
    since = str(datetime.date.today() - datetime.timedelta(days - 1))
    kept = outboxes_named(options.destination)
    for outbox in kept:
        pings = [line["ping"] for line in deliveries(outbox)]
        rows = rows_of([ping for ping in pings if day_of(ping) >= since], options.by)
        found += [{"destination": outbox.name(), **row} for row in rows]
        if options.json or not (rows or outbox.waiting()):
            continue
        print(f"{outbox.name()}:")
        if rows:
            print_table(rows, options.by)
        if outbox.waiting():
            print(f"Not in it: {what_waits(outbox)}.")
        for reason, count in sorted(outbox.state().losses.items()):
            print(f"Not in it: {count} lost, {reason}.")
    if options.json:
        print(json.dumps(found, indent=2))
    elif not found:
        print(NOTHING if not options.days else "Nothing was delivered in that time.")
    return 0


# -- Commands: the command line --------------------------------------------------------


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
    line.add(demo)
    add_preview_arguments(line.add(preview))
    command = line.add(install)
    command.add_argument("--url", help="the ping URL, to be kept in settings.json")
    line.switch(command, "--tools", f"register tool activity, too: {TOOLS}")
    command.add_argument("--project", metavar="DIR", help=project)
    line.switch(command, "--dry-run", "show what would change, and change nothing")
    line.switch(command, "--yes", "ask nothing")
    add_doctor_arguments(line.add(doctor))
    add_sent_arguments(line.add(sent))
    add_report_arguments(line.add(report))
    add_flush_arguments(line.add(flush))
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
    take_settings()
    hook()
