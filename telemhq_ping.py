#!/usr/bin/env python3
"""Tell a TelemHQ tracker what Claude Code did, never what was said.

A hook script for Claude Code: one file, standard library only, Python 3.8 or newer.

What runs when
    hook     no arguments, an event of Claude Code on stdin: turns the event into a ping,
             writes the ping into the outbox, starts a sender, exits. No network.
    sender   `--sender FD`, started by a hook, detached, at most one per destination:
             POSTs what waits, oldest first; ends when the outbox is empty or after 60 s.
    A person runs the commands: see `--help`.

What leaves
    Only the fields of the table GATE, each only in the shape given there: numbers,
    booleans, hashes, the project's name, identifiers. Never a prompt, an answer, a
    command, a tool's input or output, a path, an error text, the environment.

What is read and written
    The event; `.git` of the project when it is a file (a worktree); the transcript, for
    counts, by the sender only. Everything written is below $TELEMHQ_STATE_DIR, else
    telemhq/ in $CLAUDE_CONFIG_DIR, else ~/.claude/telemhq/ (0700; files 0600).

Variables
    TELEMHQ_PING_URL    where pings go; unset, empty or invalid: nothing happens
    TELEMHQ_PROJECT     the project's name, instead of its directory's
    TELEMHQ_MACHINE     a name for this machine, sent along
    TELEMHQ_HASH_KEY    makes the path hashes HMACs under this key
    TELEMHQ_USAGE       0: never read a transcript, send no tokens
    TELEMHQ_GIT         1: send the git branch
    TELEMHQ_TIMEOUT     seconds for one socket operation (10; 1 to 30)
    TELEMHQ_FOREGROUND  1: deliver inside the hook (containers, CI)
    TELEMHQ_ALLOW_HTTP  1: allow http:// to other machines
    TELEMHQ_STATE_DIR   where the state is kept
    TELEMHQ_HOOK_DEBUG  1: deliver inside the hook and say on stderr what happens

Exit status
    hook and sender: always 0, with nothing on stdout, and on stderr only under
    TELEMHQ_HOOK_DEBUG. Commands: 0 done, 1 failed, 2 bad usage.
"""

import os
import stat
import sys
import time

__version__ = "1.0.0"

STDIN_WAIT_S = 5.0  # a parent that never closes stdin; Claude Code kills us at 10
FOREGROUND_S = 8.0  # delivery inside the hook, in all; below the hook timeout of 10
LIFE_S = 60.0  # a sender's: long enough for a restart of the tracker, short for `ps`
TIMEOUT_S = (10.0, 1.0, 30.0)  # one socket operation: default, least, most
DEADLINE = 1.5  # a whole request's time, in timeouts: urllib bounds only operations
OUTBOX_MAX_PINGS = 5000  # some 4 MB; a day of heavy use while the tracker is away
REFUSED_MAX_PINGS = 100  # kept to be looked at, not to be sent
PING_MAX_BYTES = 64 << 10  # ours are 1 to 4 KB: anything larger is not ours
SWEEP_AFTER_S = 3600.0  # an unfinished file this old has lost its writer
BACKOFF_MAX_S = 900.0  # 15 min: an outage is noticed as over soon enough
HOLD_S = (900.0, 21600.0)  # 15 min to 6 h: a person must mend the cause
RETRY_AFTER_MAX_S = 86400.0  # a day: no server may silence us for longer
POISON_CHARGES, POISON_AGE_S = 8, 3600.0  # both: neither a burst nor an outage blames
PROBE_PINGS = 25  # after an outage, per pass: a probe and 24 more
PACE_S = (30.0, 90.0)  # and then this long until the next pass
LOG_MAX_BYTES = 256 << 10  # some 2,000 passes; then rotated, once


class Skipped(Exception):
    """Why a hook or a command did not do its work; the text is for a person."""


# -- JSON and hashes, without the cost of importing json (7 ms) and hashlib (3 ms) ------


class Scanner:
    """What `_json.make_scanner` wants to know (see json/scanner.py)."""

    strict, object_hook, object_pairs_hook = False, None, None
    parse_float = parse_constant = float

    @staticmethod
    def parse_int(text):
        """An int; longer than any count, None (int() refuses thousands of digits)."""
        return int(text) if len(text) < 20 else None


def decode_json(text):
    """The JSON value that `text` (str) begins with; ValueError when there is none."""
    try:
        from _json import make_scanner
    except ImportError:  # not CPython
        from json.scanner import py_make_scanner as make_scanner

        Scanner.memo = {}
        from json.decoder import JSONArray, JSONObject, scanstring

        Scanner.parse_object, Scanner.parse_array = JSONObject, JSONArray
        Scanner.parse_string = staticmethod(scanstring)
    try:
        return make_scanner(Scanner)(text.strip(), 0)[0]
    except StopIteration:
        raise ValueError("not JSON") from None


def encode_json(value):
    """`value` (dict, list, str, bool, None, finite number) as compact ASCII JSON."""
    if isinstance(value, str):
        try:
            from _json import encode_basestring_ascii
        except ImportError:  # not CPython
            from json.encoder import encode_basestring_ascii
        return encode_basestring_ascii(value)
    if isinstance(value, dict):
        pairs = (encode_json(k) + ":" + encode_json(v) for k, v in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(encode_json, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def sha256_hex(raw):
    """SHA-256 of bytes, 64 hex digits."""
    try:
        from _sha2 import sha256  # CPython 3.12 and newer
    except ImportError:
        try:
            from _sha256 import sha256
        except ImportError:
            from hashlib import sha256
    return sha256(raw).hexdigest()


def path_hash(path, key):
    """First 12 hex of SHA-256 of a path; of HMAC-SHA-256 under `key` when it is set."""
    raw = path.encode("utf-8", "surrogatepass")
    if not key:
        return sha256_hex(raw)[:12]
    import hmac

    return hmac.new(key.encode("utf-8", "surrogateescape"), raw, "sha256").hexdigest()[
        :12
    ]


# -- Event -> ping: the privacy gate. What is not in this section never leaves. ---------

LETTERS_DIGITS = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
)


def identifier(value, more="", longest=128):
    """Letters, digits and _ . : - (and `more`), no space, no slash; starts with one."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= longest
        and value[0] in LETTERS_DIGITS
        and LETTERS_DIGITS.union("_.:-", more).issuperset(value)
    )


def model_name(value):
    """An identifier, also with @ [ ] (Vertex names; [1m])."""
    return identifier(value, "@[]")


def branch_name(value):
    """An identifier, also with / (only where TELEMHQ_GIT asks for it)."""
    return identifier(value, "/")


def error_code(value):
    """Lower-case letters and _, at most 40: `rate_limit`, never a message."""
    return identifier(value, longest=40) and not value.strip(
        "abcdefghijklmnopqrstuvwxyz_"
    )


def hash12(value):
    """What `path_hash` makes."""
    return (
        isinstance(value, str) and len(value) == 12 and not value.strip("0123456789abcdef")
    )


def number(value):
    """A finite number from 0 up to 2^53 (what every JSON reader keeps exact)."""
    return type(value) in (int, float) and 0 <= value < 1 << 53


def flag(value):
    """true or false."""
    return isinstance(value, bool)


def project_name(value):
    """1 to 128 characters, no control character, no lone surrogate."""
    return isinstance(value, str) and bool(value) and clean(value) == value


def tool_counts(value):
    """At most 20 tools: name -> calls."""
    return (
        isinstance(value, dict)
        and len(value) <= 20
        and all(identifier(name) and number(n) for name, n in value.items())
    )


def model_counts(value):
    """Model -> {token count's name: number}."""
    return isinstance(value, dict) and all(
        model_name(name)
        and isinstance(counts, dict)
        and all(key in TOKENS and number(n) for key, n in counts.items())
        for name, counts in value.items()
    )


TOKENS = (  # of what TelemHQ adds up; the first four make the total
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cache_creation_input_tokens",
    "reasoning_tokens",
    "total_tokens",
)
COPIED = {  # from the event to the ping under the same name, in this shape or not at all
    "session_id": identifier,
    "prompt_id": identifier,
    "tool_name": identifier,
    "tool_use_id": identifier,
    "permission_mode": identifier,
    "agent_id": identifier,
    "agent_type": identifier,
    "source": identifier,
    "trigger": identifier,
    "notification_type": identifier,
    "model": model_name,
    "duration_ms": number,
    "is_interrupt": flag,
    "stop_hook_active": flag,
}
GATE = {  # everything that can ever leave, and the only shape in which it can
    "provider": identifier,  # anthropic
    "tool": identifier,  # claude-code
    "hook_version": identifier,
    "event_id": identifier,  # random
    "event": identifier,  # hook_event_name
    "timestamp": identifier,  # when the event happened
    "status": identifier,  # success or failed
    "project": project_name,
    "machine": identifier,  # TELEMHQ_MACHINE
    "cwd_hash": hash12,
    "transcript_path_hash": hash12,
    "error": error_code,
    "exit_code": number,
    "error_chars": number,
    "effort": identifier,  # effort.level
    "reason": identifier,  # SessionEnd only: elsewhere it is text
    "prompt_chars": number,
    "last_assistant_message_chars": number,
    "background_tasks": number,  # how many
    "event_bytes": number,  # size of the event on stdin
    "git_branch": branch_name,  # TELEMHQ_GIT
    "usage_complete": flag,
    "cost_usd": number,
    "models": model_counts,
    "tool_calls": number,
    "tool_failures": number,
    "tools": tool_counts,
}
GATE.update(COPIED)
GATE.update((name, number) for name in TOKENS)


def gate(fields):
    """The ping: what of `fields` (dict) is in GATE and has the shape it asks for.

    Every body that is sent comes out of this function.
    """
    return {name: fields[name] for name in GATE if name in fields and GATE[name](fields[name])}


def clean(text):
    """`text` without control characters and lone surrogates, at most 128 characters."""
    kept = (
        c
        for c in text
        if c >= " " and not "\x7f" <= c <= "\x9f" and not "\ud800" <= c <= "\udfff"
    )
    return "".join(kept)[:128]


def iso_time(ns):
    """Nanoseconds since 1970 as ISO 8601, UTC, with milliseconds."""
    seconds, rest = divmod(ns, 10**9)
    return "%s.%03dZ" % (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)),
        rest // 10**6,
    )


def error_fields(event):
    """`error` and its numbers; the text of a tool's error holds output and paths."""
    name, error = event.get("hook_event_name"), event.get("error")
    if name == "StopFailure":
        return {"error": error}  # one of Claude Code's own codes, or the gate drops it
    if name != "PostToolUseFailure":
        return {"error": "error"} if error else {}
    fields = {"error": "tool_error"}
    if isinstance(error, str):
        fields["error_chars"] = len(error)
        code = "".join(error[10:21].split()[:1])
        if error.startswith("Exit code ") and code.isascii() and code.isdigit():
            fields["exit_code"] = int(code)
    return fields


def make_ping(event, settings, project, ns, event_bytes):
    """The ping of one event.

    event: dict, as Claude Code sent it. settings: Settings. project: str. ns: when the
    event happened, nanoseconds since 1970. event_bytes: its size on stdin.
    """
    name, effort = event.get("hook_event_name"), event.get("effort")
    failed = name in ("PostToolUseFailure", "StopFailure") or event.get("error")
    fields = {key: event[key] for key in COPIED if key in event}
    fields.update(error_fields(event))
    fields.update(
        provider="anthropic",
        tool="claude-code",
        hook_version=__version__,
        event_id=os.urandom(16).hex(),
        event=name,
        timestamp=iso_time(ns),
        status="failed" if failed else "success",
        project=project,
        machine=settings.machine,
        effort=effort.get("level") if isinstance(effort, dict) else effort,
        event_bytes=event_bytes,
    )
    if name == "SessionEnd":
        fields["reason"] = event.get("reason")
    for key in ("cwd", "transcript_path"):
        if event.get(key) and isinstance(event[key], str):
            fields[key + "_hash"] = path_hash(event[key], settings.hash_key)
    for key in ("prompt", "last_assistant_message"):
        if isinstance(event.get(key), str):
            fields[key + "_chars"] = len(event[key])
    if isinstance(event.get("background_tasks"), list):
        fields["background_tasks"] = len(event["background_tasks"])
    return gate(fields)


# -- Settings and destination ------------------------------------------------------------

WORDS = {"1": 1, "true": 1, "yes": 1, "on": 1, "0": 0, "false": 0, "no": 0, "off": 0}


class Settings:
    """The TELEMHQ_ variables. `ignored`: what made no sense and why, for debug mode."""

    def __init__(self, environ):
        self.environ, self.ignored = environ, []
        self.url = environ.get("TELEMHQ_PING_URL", "")
        self.project = clean(environ.get("TELEMHQ_PROJECT", "")).strip()
        self.hash_key = environ.get("TELEMHQ_HASH_KEY", "")
        self.machine = environ.get("TELEMHQ_MACHINE") or None
        if self.machine and not identifier(self.machine):
            self.ignore("TELEMHQ_MACHINE", "may hold letters, digits and _ . : - only")
            self.machine = None
        if environ.get("TELEMHQ_PROJECT") and not self.project:
            self.ignore("TELEMHQ_PROJECT", "has no visible character")
        self.debug = environ.get("TELEMHQ_HOOK_DEBUG", "") not in ("", "0")
        self.foreground = self.word("TELEMHQ_FOREGROUND")
        self.allow_http = self.word("TELEMHQ_ALLOW_HTTP")
        self.git = self.word("TELEMHQ_GIT")
        # A switch for privacy: what is not understood means off.
        self.usage = not environ.get("TELEMHQ_USAGE") or self.word("TELEMHQ_USAGE")
        self.timeout_s = self.seconds(environ.get("TELEMHQ_TIMEOUT"))
        self.state_dir = self.directory(environ)

    def ignore(self, name, why):
        """Note that variable `name` was ignored."""
        self.ignored.append("%s is ignored: it %s" % (name, why))

    def word(self, name):
        """A variable that is 1 or 0; anything else counts as 0."""
        value = self.environ.get(name, "").lower()
        if value and value not in WORDS:
            self.ignore(name, "must be 1 or 0")
        return bool(WORDS.get(value))

    def seconds(self, text):
        """TELEMHQ_TIMEOUT, clamped."""
        default, least, most = TIMEOUT_S
        try:
            value = float(text or default)
        except ValueError:
            value = 0.0
        if not 0 < value < 1e9:
            self.ignore("TELEMHQ_TIMEOUT", "must be a number of seconds, 1 to 30")
            return default
        return min(max(value, least), most)

    def directory(self, environ):
        """The state directory, absolute; "" when there is no home directory."""
        chosen = environ.get("TELEMHQ_STATE_DIR") or ""
        if chosen and os.path.isabs(os.path.expanduser(chosen)):
            return os.path.normpath(os.path.expanduser(chosen))
        if chosen:
            self.ignore("TELEMHQ_STATE_DIR", "must be an absolute path")
        config = os.path.expanduser(environ.get("CLAUDE_CONFIG_DIR") or "~/.claude")
        if not os.path.isabs(config):
            config = os.path.expanduser("~/.claude")
        return os.path.join(config, "telemhq") if os.path.isabs(config) else ""


class Destination:
    """Where pings go, as a value: another service would be another such value.

    kind: str, names the service. url: str, secret. headers: dict of str. bodies: a
    function ping -> [bytes]; each is POSTed to `url`, with the ping's event_id as
    Idempotency-Key.
    """

    def __init__(self, kind, url, headers, bodies):
        self.kind, self.url, self.headers, self.bodies = kind, url, headers, bodies

    def directory(self, state_dir):
        """This destination's own directory; the URL cannot be told from its name."""
        short = sha256_hex(self.url.encode("utf-8", "surrogatepass"))[:12]
        return os.path.join(state_dir, self.kind + "-" + short)


def telemhq(url):
    """TelemHQ: the token is in the URL's path, the body is the ping (its public docs)."""
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "telemhq-ping/" + __version__,
    }
    return Destination("telemhq", url, headers, lambda p: [encode_json(p).encode()])


def split_url(url):
    """(scheme, host, port text) of an absolute URL; ValueError says what is wrong."""
    if not url.isascii() or any(c <= " " or c in '\x7f\\"<>^`{|}' for c in url):
        raise ValueError("it has a space or another character that no URL may hold")
    scheme, found, rest = url.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        raise ValueError("it must start with https://")
    authority = rest.split("/")[0].split("?")[0].split("#")[0]
    if "@" in authority:
        raise ValueError("it must not hold user:password@")
    if authority.startswith("["):
        host, found, port = authority[1:].partition("]")
        good = found and port[:1] in ("", ":") and not host.strip("0123456789abcdefABCDEF:.")
        port, colon = port[1:], port[:1]
    else:
        host, colon, port = authority.partition(":")
        good = LETTERS_DIGITS.union("-._").issuperset(host)
    if not host or not good:
        raise ValueError("it names no host")
    if colon and not (port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        raise ValueError("its port is not a number from 1 to 65535")
    return scheme.lower(), host.lower(), port


def loopback(host):
    """Whether `host` is this machine, by name or by a plain address."""
    parts = host.split(".")
    return host in ("localhost", "::1") or (
        len(parts) == 4 and parts[0] == "127" and all(p.isdigit() for p in parts)
    )


def origin(url):
    """Scheme, host and port of a valid URL: what may be shown of it."""
    return "/".join(url.split("/")[:3]).split("?")[0].split("#")[0]


def find_destination(settings):
    """The destination that the settings name; Skipped says why there is none."""
    if not settings.url:
        raise Skipped("TELEMHQ_PING_URL is not set; export it with your tracker's URL")
    try:
        scheme, host, _ = split_url(settings.url)
        if scheme == "http" and not (settings.allow_http or loopback(host)):
            raise ValueError("it is http://, which anyone on the way can read; use https://"
                             " (or set TELEMHQ_ALLOW_HTTP=1)")  # fmt: skip
    except ValueError as error:
        raise Skipped("TELEMHQ_PING_URL is not usable: %s" % error) from None
    return telemhq(settings.url)


# -- On disk -----------------------------------------------------------------------------

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def unsound(directory):
    """Why `directory` must not be used, or "" (also when it is not there yet)."""
    try:
        found = os.lstat(directory)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return "%s: %s" % (directory, error.strerror)
    if stat.S_ISLNK(found.st_mode):
        return directory + " is a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return directory + " is not a directory"
    if os.name == "posix" and found.st_uid != os.geteuid():
        return directory + " belongs to someone else"
    if os.name == "posix" and found.st_mode & 0o022:
        return directory + " can be written by others"
    return ""


def need_sound(state_dir, base):
    """Raise Skipped when something from telemhq/ down could be under another's control."""
    if not state_dir:
        raise Skipped("there is no home directory; set TELEMHQ_STATE_DIR")
    inside = [os.path.join(base, name) for name in ("outbox", "refused", "accounts")]
    for directory in [state_dir, base] + inside:
        problem = unsound(directory)
        if problem:
            raise Skipped(problem + "; remove it, or set TELEMHQ_STATE_DIR")


def write_file(path, content):
    """Make `path` hold `content` (bytes): all or nothing, and 0600 from the start."""
    directory, name = os.path.split(path)
    unfinished = os.path.join(directory, ".%s.%s" % (name, os.urandom(4).hex()))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW
    try:
        fd = os.open(unfinished, flags, 0o600)
    except FileNotFoundError:
        os.makedirs(directory, 0o700, exist_ok=True)  # the umask is 077: parents too
        fd = os.open(unfinished, flags, 0o600)
    try:
        try:
            while content:
                content = content[os.write(fd, content) :]
        finally:
            os.close(fd)
        os.replace(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise


def open_regular(path):
    """A descriptor of a regular file to read; ValueError when it is something else."""
    try:
        # A FIFO must not block us, a symbolic link must not lead us elsewhere.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | NO_FOLLOW)
    except OSError:
        if os.path.islink(path):
            raise ValueError("a symbolic link") from None
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError("not a regular file")
    return fd


def read_file(path, most):
    """All of a regular file (bytes). ValueError: not one, or larger than `most` bytes."""
    fd = open_regular(path)
    try:
        content = b""
        while len(content) <= most:
            part = os.read(fd, most + 1 - len(content))
            if not part:
                return content
            content += part
        raise ValueError("too large")
    finally:
        os.close(fd)


def read_object(path, most):
    """The JSON object in a file; ValueError when there is none, OSError as it comes."""
    try:
        found = decode_json(read_file(path, most).decode("utf-8", "replace"))
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def write_object(path, value):
    """The opposite of `read_object`."""
    write_file(path, encode_json(value).encode())


def remove(path):
    """Delete a file or an empty directory; whether that worked."""
    for delete in (os.unlink, os.rmdir):
        try:
            delete(path)
            return True
        except OSError:
            pass
    return False


def enqueue(base, name, ping, local):
    """Put a ping into the outbox; when this returns, nothing but the disk can lose it."""
    write_object(os.path.join(base, "outbox", name), {"ping": ping, "local": local})


def ping_file_name(ns, event_id):
    """Sorts by the time of the event."""
    return "%020d-%s.json" % (ns, event_id)


def load_state(base):
    """state.json, with a sane value for every key, whatever the file holds."""
    try:
        found = read_object(os.path.join(base, "state.json"), 4 << 20)
    except (OSError, ValueError):
        found = {}
    state = {}
    for key in ("failures", "set_at", "not_before", "delivered_at", "swept_at"):
        state[key] = found[key] if number(found.get(key)) else 0
    state["failures"] = int(min(state["failures"], 64))
    state["recovering"] = found.get("recovering") is True
    for key in ("charges", "losses"):
        given = found.get(key) if isinstance(found.get(key), dict) else {}
        state[key] = {k: n for k, n in given.items() if type(n) is int and number(n)}
    problem = found.get("problem")
    good = isinstance(problem, dict) and all(
        isinstance(problem.get(key), str) for key in ("verdict", "what")
    )
    state["problem"] = problem if good else None
    return state


def backoff_left_s(state, now):
    """Seconds until the back-off ends, 0 when none stands.

    A clock that was set back (set_at is in the future) or that jumped ahead while the
    back-off was set must not stop delivery.
    """
    latest = min(state["not_before"], state["set_at"] + RETRY_AFTER_MAX_S)
    return latest - now if state["set_at"] <= now < latest else 0


def take_lock(base):
    """The destination's lock: a descriptor, or None while another process holds it.

    The kernel frees it at its holder's death. An error other than "busy" (a file system
    without locks) counts as free: rather a ping twice under one id than never.
    """
    try:
        fd = os.open(os.path.join(base, "lock"), os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o600)
    except OSError:
        return -1
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(fd)
        return None
    except OSError:
        pass
    return fd


def drop_lock(fd):
    """Give the lock back; explicitly, for a hook that is ending may share it."""
    if fd < 0:
        return
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:
        pass
    os.close(fd)


# -- Usage: tokens from the transcript, charged once. Runs in the sender only. ----------

USAGE_EVENTS = ("Stop", "StopFailure", "SubagentStop", "SessionEnd")
LAG_S = 2.0  # Claude Code writes a turn's last row up to 0.1 s after it fired Stop
POLL_S = 0.05  # while waiting for that row
READ_S = 20.0  # one charge's reading; what is left rides on the session's next ping
BLOCK_BYTES = 4 << 20  # read at once
LINE_MAX_BYTES = 8 << 20  # rows with counts are some KB; longer ones hold pasted files
TRANSCRIPT_MAX_BYTES = 768 << 20  # unread; more is skipped, and the ledger settles it
SEEN_IDS = 256  # messages and tools remembered: repeats stand close together
AGENTS_MAX = 1000  # subagents' transcripts of one session
QUIET_S = 86400.0  # a session without a word for this long is lost; also: a sweep a day
ACCOUNT_MAX_S = 30 * 86400.0  # after its last event
COUNTS = (  # ping's name, transcript's name, ledger's name
    ("input_tokens", "input_tokens", "inputTokens"),
    ("output_tokens", "output_tokens", "outputTokens"),
    ("cached_input_tokens", "cache_read_input_tokens", "cacheReadInputTokens"),
    ("cache_creation_input_tokens",) * 2 + ("cacheCreationInputTokens",),
    ("reasoning_tokens", "thinking_tokens", "thinkingTokens"),
)
NEEDLES = (b'"usage"', b'"is_error":true', b'"cost-state"', b'"promptId"')


def lines_that_matter(fd, offset):
    """The whole lines behind `offset` whose bytes say that they may hold a count.

    Yields (end, line), `end` the offset behind the line, and (end, b"") after each block:
    everything before `end` is read. A half-written last line is left for the next read.
    """
    os.lseek(fd, offset, os.SEEK_SET)
    rest, passed_over = b"", 0
    while True:
        block = os.read(fd, BLOCK_BYTES)
        if not block:
            return
        if passed_over:  # inside a line that is too long to keep
            end = block.find(b"\n") + 1
            passed_over += end or len(block)
            if not end:
                continue
            offset, block, passed_over = offset + passed_over, block[end:], 0
        block = rest + block
        whole, ends = block.rfind(b"\n") + 1, {}
        for needle in NEEDLES:
            at = block.find(needle, 0, whole)
            while at >= 0:
                start, end = block.rfind(b"\n", 0, at) + 1, block.find(b"\n", at) + 1
                # Tools' results are user rows too: most of the file, and no prompts.
                if needle != b'"promptId"' or block.find(b'"tool_result"', start, end) < 0:
                    ends[start] = end
                at = block.find(needle, end, whole)
        for start in sorted(ends):
            yield offset + ends[start], block[start : ends[start]]
        offset, rest = offset + whole, block[whole:]
        if len(rest) > LINE_MAX_BYTES:
            passed_over, rest = len(rest), b""
        yield offset, b""


def new_pending():
    """What an account has read and not yet charged to a ping."""
    return {"models": {}, "calls": 0, "failures": 0, "tools": {}, "final": [], "ledger": None}


def row_time(row):
    """A row's timestamp in seconds since 1970, 0 when it has none."""
    from datetime import datetime

    try:
        text = row["timestamp"].replace("Z", "+00:00")
        return datetime.fromisoformat(text).timestamp()
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return 0.0


def counts_of(found, column):
    """The five counts of COUNTS out of a usage or a ledger object."""
    counts = [found.get(names[column]) for names in COUNTS]
    details = found.get("output_tokens_details")
    if column == 1 and isinstance(details, dict):
        counts[4] = details.get("thinking_tokens")
    return [int(n) if number(n) else 0 for n in counts]


def add_counts(models, model, counts):
    """Add five counts to those of `model`."""
    sums = models.setdefault(model, [0] * len(COUNTS))
    for i, n in enumerate(counts):
        sums[i] += n


def totals(models):
    """The sums of COUNTS over all models."""
    return [sum(column) for column in zip(*models.values())] or [0] * len(COUNTS)


def count_message(account, row, message, relative, at):
    """Add one assistant row: its message's tokens once, its tool calls."""
    pending, seen, key = account["pending"], account["seen"], message.get("id")
    model, usage = message.get("model"), message.get("usage")
    if not (isinstance(key, str) and isinstance(usage, dict) and model_name(model)):
        return  # <synthetic> among them: the client's own words, no API call
    if row.get("isApiErrorMessage"):
        return
    copied = row.get("requestSessionId", row.get("sessionId")) != row.get("sessionId")
    if copied or 0 < at < account["since"]:
        account["whole"] = False  # another session's, or older than the account
        return
    # The client repeats a message's usage in the row of each of its content blocks; in
    # older rows the output count may be a partial one.
    counts, before = counts_of(usage, 1), seen.get(key, [0] * len(COUNTS))
    if key not in seen or counts[1] > before[1]:
        counts = [max(pair) for pair in zip(counts, before)]
        more = [n - m for n, m in zip(counts, before)]
        add_counts(pending["models"], model, more)
        seen[key] = counts
    content = message.get("content")
    for block in content if isinstance(content, list) else ():
        if not isinstance(block, dict) or block.get("type") != "tool_use":
            continue
        tool = str(block.get("id"))
        if tool not in account["calls"]:
            account["calls"][tool] = 0
            pending["calls"] += 1
            if identifier(block.get("name")):
                tools = pending["tools"]
                tools[block["name"]] = tools.get(block["name"], 0) + 1
    pending["ledger"] = None  # written before this message, so not the last word
    main = not relative and not row.get("isSidechain")
    if main:
        account["model"], account["branch"] = model, row.get("gitBranch")
    if (main or relative) and message.get("stop_reason") not in (None, "tool_use"):
        pending["final"].append(relative)


def count_user(account, row, message, relative, at):
    """Take note of one user row: failed tools, or a prompt."""
    content = message.get("content")
    results = [
        block
        for block in (content if isinstance(content, list) else ())
        if isinstance(block, dict) and block.get("type") == "tool_result"
    ]
    if results:
        if not 0 < at < account["since"]:
            failed = [block for block in results if block.get("is_error") is True]
            account["pending"]["failures"] += len(failed)
        return
    injected = row.get("isMeta") or row.get("isCompactSummary") or row.get("isSidechain")
    if relative or injected:
        return
    if at <= account["first_prompt_by"]:
        # The turn in which the hook first met the session begins here: all before it is
        # history, and is never billed again.
        pending = account["pending"]
        if pending["models"] or pending["calls"]:
            account["whole"] = False
        account["pending"], account["since"] = new_pending(), at
    account["prompts"] = account["prompts"][-7:] + [at]


def count_line(account, relative, line, until):
    """Add one line to what is pending; False when it is younger than `until`."""
    try:
        row = decode_json(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return True
    if not isinstance(row, dict):
        return True
    at, message = row_time(row), row.get("message")
    if at > until:
        return False
    message = message if isinstance(message, dict) else {}
    if row.get("type") == "assistant":
        count_message(account, row, message, relative, at)
    elif row.get("type") == "user":
        count_user(account, row, message, relative, at)
    elif row.get("type") == "cost-state" and not relative:
        used, cost = row.get("modelUsage"), row.get("totalCostUSD")
        if isinstance(used, dict) and number(cost):
            models = {m: counts_of(u, 2) for m, u in used.items() if isinstance(u, dict)}
            account["pending"]["ledger"] = {"models": models, "cost": cost}
    return True


def read_transcript(account, relative, until, ends):
    """Count what one transcript has gained.

    relative: "" for the session's own file, else a subagent's, below it. until: rows
    stamped later (seconds since 1970) are left. ends: monotonic, no reading after it.
    OSError or ValueError: nothing more to be had from it now (missing, no regular file,
    too much at once, no time left).
    """
    main = account["transcript"]
    path = os.path.join(os.path.splitext(main)[0], relative) if relative else main
    fd = open_regular(path)
    try:
        found = os.fstat(fd)
        inode, offset = account["files"].get(relative, (found.st_ino, 0))
        unread = found.st_size - offset
        replaced = inode != found.st_ino or unread < 0
        if replaced or unread > TRANSCRIPT_MAX_BYTES:
            # To its end: rather a count that the ledger settles than one made twice.
            account["files"][relative] = [found.st_ino, found.st_size]
            if replaced:
                return
            raise ValueError("too much unread")
        account["files"][relative] = [inode, offset]
        for end, line in lines_that_matter(fd, offset) if unread else ():
            if line and not count_line(account, relative, line, until):
                return
            account["files"][relative][1] = end
            if time.monotonic() > ends:
                raise TimeoutError("the rest is for the next ping")
    finally:
        os.close(fd)


def read_session(account, until, ends):
    """Count what a session's transcripts have gained; False when there is no transcript.

    The session's own file first: it tells where the account begins.
    """
    try:
        read_transcript(account, "", until, ends)
    except (OSError, ValueError):
        return False
    top, agents = os.path.splitext(account["transcript"])[0], []
    for directory, _, names in os.walk(os.path.join(top, "subagents")):
        for name in names:
            if name.startswith("agent-") and name.endswith(".jsonl"):
                agents.append(os.path.relpath(os.path.join(directory, name), top))
    for relative in sorted(agents)[:AGENTS_MAX]:
        try:
            read_transcript(account, relative, until, ends)
        except (OSError, ValueError):
            continue
    for key in ("seen", "calls"):
        account[key] = dict(list(account[key].items())[-SEEN_IDS:])
    return True


def account_path(base, session_id):
    """One file per session."""
    return os.path.join(base, "accounts", sha256_hex(session_id.encode())[:16] + ".json")


def new_account(ping, transcript, at):
    """An account as it opens at its first event: where history ends.

    A new session has none; a resumed or forked one, all that is older than its start;
    met in the middle, all that is older than the prompt it was met at.
    """
    start = ping.get("source") if ping.get("event") == "SessionStart" else None
    return {
        "transcript": transcript,
        "identity": {
            key: ping[key]
            for key in ("project", "machine", "session_id", "cwd_hash", "transcript_path_hash")
            if key in ping
        },
        "since": at if start in ("resume", "fork") else 0,
        "first_prompt_by": 0 if start in ("startup", "clear", "resume", "fork") else at,
        "whole": True,
        "ended": False,
        "files": {},
        "seen": {},
        "calls": {},
        "prompts": [],
        "model": None,
        "branch": None,
        "last_at": at,
        "pending": new_pending(),
        "reported": {},
        "cost": 0,
        "charged": {},
        "owed": None,
    }


def load_account(path):
    """An account, or None when there is none that can be used."""
    try:
        account = read_object(path, 8 << 20)
    except (OSError, ValueError):
        return None
    for key, value in new_account({}, "", 0).items():
        given = account.get(key)
        good = number(given) if number(value) else isinstance(given, type(value))
        if not good and value is not None:
            return None
    return account


def settle(account):
    """Add to what is pending what the client's ledger has more; give the new cost.

    Compaction and titles are API calls of no row. Sums are compared, not models: the
    ledger may name a model otherwise than the rows do. Less than we reported: nothing.
    """
    ledger, models = account["pending"]["ledger"], account["pending"]["models"]
    have = {}
    for part in (account["reported"], models):
        for model, counts in part.items():
            add_counts(have, model, counts)
    missing = [n - m for n, m in zip(totals(ledger["models"]), totals(have))]
    for model, counts in ledger["models"].items():
        known = have.get(model, [0] * len(COUNTS))
        more = [max(0, min(gap, n - m)) for gap, n, m in zip(missing, counts, known)]
        if any(more) and model_name(model):
            add_counts(models, model, more)
            missing = [gap - n for gap, n in zip(missing, more)]
    cost, account["cost"] = ledger["cost"] - account["cost"], ledger["cost"]
    return max(0, round(cost, 10))


def named_counts(counts):
    """Five counts under the ping's names, and the total of the first four."""
    named = {names[0]: n for names, n in zip(COUNTS, counts)}
    named["total_tokens"] = sum(counts[:4])
    return named


def take_pending(account):
    """The usage fields of what is pending, which counts as reported from now on."""
    pending, account["pending"] = account["pending"], new_pending()
    for model, counts in pending["models"].items():
        add_counts(account["reported"], model, counts)
    worked = {m: named_counts(c) for m, c in pending["models"].items() if any(c)}
    fields = named_counts(totals(pending["models"]))
    fields.update(tool_calls=pending["calls"], tool_failures=pending["failures"])
    if account["model"]:
        fields["model"] = account["model"]
    if len(worked) > 1:
        fields["models"] = worked
    used = sorted(pending["tools"].items(), key=lambda pair: (-pair[1], pair[0]))[:20]
    if used:
        fields["tools"] = dict(used)
    return fields


def usage_fields(account, ping, local, at, ends, patient):
    """What the session used since its last such ping; {} without a transcript.

    Waits, when `patient`, until the event is LAG_S old for what the client writes after
    it fired the event: a turn's last message, a session's ledger.
    """
    name, awaited = ping.get("event"), ""
    if name == "SubagentStop":
        top = os.path.splitext(account["transcript"])[0]
        awaited = os.path.relpath(local.get("agent_transcript") or top, top)
        if not os.path.isfile(os.path.join(top, awaited)):
            name = "no transcript of its own"  # a compaction's agent has none
    until = at + LAG_S if name != "SessionEnd" else float("inf")
    give_up = min(time.monotonic() + min(LAG_S, at + LAG_S - time.time()), ends)
    while True:
        if not read_session(account, until, min(time.monotonic() + READ_S, ends)):
            return {}
        complete = {
            "Stop": awaited in account["pending"]["final"],
            "SubagentStop": awaited in account["pending"]["final"],
            "SessionEnd": account["pending"]["ledger"] is not None,
        }.get(name, True)
        if complete or not patient or time.monotonic() >= give_up:
            break
        time.sleep(POLL_S)
    cost = None
    if name == "SessionEnd" and complete and account["whole"]:
        cost = settle(account)
    fields = take_pending(account)
    if cost is not None:
        fields["cost_usd"] = cost
    if not complete:
        fields["usage_complete"] = False
    begun = [prompt for prompt in account["prompts"] if 0 < prompt <= at]
    if name == "Stop" and begun:
        fields["duration_ms"] = round((at - begun[-1]) * 1000)
    if local.get("git") is True:
        fields["git_branch"] = account["branch"]
    return fields


def charge(base, name, record, ends, foreground):
    """The ping of one outbox file, with its usage in it; opens the session's account.

    name: the file's. record: {"ping", "local"}. ends: monotonic, no waiting after it.
    The order is what makes it exact: the account is committed together with which ping
    was charged what, then the ping's file is rewritten, then it may be sent. A crash in
    between finds the same charge again, so that it is neither lost nor doubled.
    """
    ping, local = record["ping"], record["local"]
    transcript, session_id = local.get("transcript"), ping.get("session_id")
    if not isinstance(transcript, str) or not session_id:
        return ping
    path, at = account_path(base, session_id), int(name[:20]) / 1e9
    found = load_account(path)
    account = found or new_account(ping, transcript, at)
    account["last_at"] = max(account["last_at"], at)
    if ping.get("event") not in USAGE_EVENTS:
        if found and not found["ended"]:
            os.utime(path)  # the sweep looks at it
        else:
            account["ended"] = False
            write_object(path, account)
        return ping
    fields = account["charged"].get(ping["event_id"])
    if fields is None:
        clearing = foreground and ping.get("reason") == "clear"  # it waits for us to end
        fields = usage_fields(account, ping, local, at, ends, not clearing)
        account["charged"][ping["event_id"]] = fields
        account["charged"] = dict(list(account["charged"].items())[-16:])
        account["ended"] = ping["event"] == "SessionEnd"
        write_object(path, account)
    ping = gate(dict(ping, **fields))
    write_object(os.path.join(base, "outbox", name), {"ping": ping, "local": {}})
    return ping


def pay_owed(base, path, account):
    """Put the SessionLost ping that the account owes into the outbox, once."""
    if account["owed"]:
        name, ping = account["owed"]
        enqueue(base, name, gate(ping), {})
        account["owed"] = None
        write_object(path, account)


def sweep_accounts(base, now):
    """Once a day: report what sessions that ended without a word had used; drop old ones.

    now: seconds since 1970. kill -9 and a power cut fire no SessionEnd.
    """
    directory = os.path.join(base, "accounts")
    for entry in os.listdir(directory) if os.path.isdir(directory) else ():
        path = os.path.join(directory, entry)
        try:
            quiet = now - os.lstat(path).st_mtime
        except OSError:
            continue
        if quiet > (SWEEP_AFTER_S if entry.startswith(".") else ACCOUNT_MAX_S):
            remove(path)
        account = load_account(path) if quiet > QUIET_S else None
        if account is None:
            continue
        pay_owed(base, path, account)
        if account["ended"]:
            continue
        read_session(account, float("inf"), time.monotonic() + READ_S)
        if not any(totals(account["pending"]["models"])):
            continue
        fields = dict(account["identity"], **take_pending(account))
        mark = "%s %s" % (account["identity"].get("session_id"), account["reported"])
        ns = int(account["last_at"] * 1e9)
        fields.update(
            provider="anthropic",
            tool="claude-code",
            hook_version=__version__,
            event="SessionLost",
            event_id=sha256_hex(mark.encode())[:32],
            timestamp=iso_time(ns),
            status="success",
            usage_complete=False,
        )
        account["owed"] = [ping_file_name(ns, fields["event_id"]), gate(fields)]
        write_object(path, account)
        pay_owed(base, path, account)


# -- Delivery: one request, one verdict --------------------------------------------------

DELIVERED, RETRY, HOLD, REFUSED = "delivered", "retry", "hold", "refused"
HOLD_STATUS = (401, 402, 403, 404, 405, 407, 410, 451)  # the ping is not at fault
RETRY_STATUS = (408, 425, 429)  # the server is not either: not now


class Answer:
    """What came of one attempt.

    verdict: what becomes of the ping. what: for a person; no URL, no text of the server.
    retry_after: the header's text or None. maybe_ping: whether the ping itself may be
    what the server cannot digest (5xx, or no answer although connected).
    """

    def __init__(self, verdict, what, retry_after=None, maybe_ping=False):
        self.verdict, self.what = verdict, what
        self.retry_after, self.maybe_ping = retry_after, maybe_ping


def verdict_of(status):
    """The verdict on an HTTP status (200 to 599; anything else is no answer)."""
    if 200 <= status < 300:
        return DELIVERED
    if 300 <= status < 400 or status in HOLD_STATUS:
        return HOLD
    if 400 <= status < 500 and status not in RETRY_STATUS:
        return REFUSED
    return RETRY


def retry_after_s(text, now):
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3), 0 when unusable."""
    from email.utils import parsedate_to_datetime

    text = (text or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:20]), RETRY_AFTER_MAX_S)
    try:
        wait = parsedate_to_datetime(text).timestamp() - now
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), RETRY_AFTER_MAX_S)


def backoff_s(verdict, failures, retry_after, now):
    """Seconds to wait after the n-th failure in a row, n >= 1.

    Jittered, so that a thousand machines do not come back at one moment; never before
    what the server asked for.
    """
    from random import uniform

    power = 2.0 ** min(failures, 20)
    if verdict == HOLD:
        wait = min(HOLD_S[0] * power / 2, HOLD_S[1])
    else:
        wait = uniform(2, min(BACKOFF_MAX_S, 2 * power))
    asked = retry_after_s(retry_after, now)
    if asked:
        wait = max(wait, min(asked + uniform(0, 1 + asked / 10), RETRY_AFTER_MAX_S))
    return wait


def make_opener(url):
    """An opener that does no more than it must: http, https, the environment's proxies.

    No redirects (urllib would make the POST a GET without a body, and call its 200 a
    success), no ftp, file or data, no cookies, no passwords.
    """
    from urllib import request

    opener = request.OpenerDirector()
    opener.addheaders = []
    opener.add_handler(request.HTTPHandler())
    if hasattr(request, "HTTPSHandler"):
        import ssl

        opener.add_handler(request.HTTPSHandler(context=ssl.create_default_context()))
    if not loopback(split_url(url)[1]):
        opener.add_handler(request.ProxyHandler(request.getproxies_environment()))
    return opener


def answer_of(error):
    """The Answer that an exception of urllib's stands for."""
    from urllib.error import URLError

    reason = getattr(error, "reason", error) if isinstance(error, URLError) else error
    text = getattr(reason, "strerror", None) or type(reason).__name__
    ssl = sys.modules.get("ssl")
    if ssl and isinstance(reason, ssl.SSLError):
        text = "TLS: " + (getattr(reason, "reason", None) or text).replace("_", " ").lower()
        if not isinstance(reason, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            return Answer(HOLD, text)
    tunnel = str(reason).partition("Tunnel connection failed: ")[2][:3]
    if tunnel.isdigit():  # the proxy's answer, not the tracker's: no ping is refused by it
        verdict = verdict_of(int(tunnel))
        return Answer(HOLD if verdict == REFUSED else verdict, "proxy: HTTP " + tunnel)
    if isinstance(reason, TimeoutError) or "timed out" in str(reason):
        text = "timed out"
    # urllib wraps what fails up to the end of sending, and nothing after that.
    return Answer(RETRY, text, maybe_ping=not isinstance(error, URLError))


def post(opener, url, headers, body, timeout_s):
    """POST `body` (bytes) to `url`; an Answer, whatever happens.

    Of the response only the status and headers are read: at most one buffer of it.
    """
    from http.client import HTTPException
    from urllib.request import Request

    try:
        request = Request(url, body, headers, method="POST")
        with opener.open(request, timeout=timeout_s) as response:
            status, retry_after = response.status, response.headers.get("Retry-After")
    except (OSError, HTTPException, ValueError) as error:
        return answer_of(error)
    except AttributeError:  # no handler took the URL: this Python was built without TLS
        return Answer(HOLD, "this Python cannot do https")
    return Answer(verdict_of(status), "HTTP %d" % status, retry_after, status >= 500)


# -- Sender: empties one outbox ----------------------------------------------------------


class Sender:
    """One life of delivering, in the detached process, or in a hook in the foreground.

    destination: Destination. base: its directory. settings: Settings. ends: monotonic,
    when this life is over. tell: a function of one line of text for a person.
    """

    def __init__(self, destination, base, settings, ends, tell):
        self.destination, self.base, self.ends, self.tell = destination, base, ends, tell
        self.foreground = settings.foreground or settings.debug
        self.timeout_s = settings.timeout_s
        self.tried = set()  # names that failed since the last back-off
        self.state = load_state(base)
        self.opener = make_opener(destination.url)

    def outbox(self, name=""):
        """Path of the outbox, or of a file in it."""
        return os.path.join(self.base, "outbox", name)

    def save(self):
        """Write state.json; a disk that refuses must not stop delivery."""
        try:
            write_object(os.path.join(self.base, "state.json"), self.state)
        except OSError:
            pass

    def log(self, text):
        """Append a line to sender.log: no payload, no URL, no token."""
        path = os.path.join(self.base, "sender.log")
        line = "%s %d %s\n" % (iso_time(time.time_ns()), os.getpid(), text)
        try:
            if os.path.exists(path) and os.path.getsize(path) > LOG_MAX_BYTES:
                os.replace(path, path + ".1")
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW
            fd = os.open(path, flags, 0o600)
            os.write(fd, line.encode("utf-8", "replace"))
            os.close(fd)
        except OSError:
            pass

    def waiting(self):
        """Names of the pings in the outbox, oldest first."""
        try:
            names = os.listdir(self.outbox())
        except OSError:
            return []
        return sorted(name for name in names if not name.startswith("."))

    def untried(self):
        """Whether a ping waits that was not tried in this life."""
        return any(name not in self.tried for name in self.waiting())

    def tidy(self):
        """Sweep what was never finished, set aside what is no ping, keep the bound."""
        names = self.waiting()
        for name in os.listdir(self.outbox()) if os.path.isdir(self.outbox()) else ():
            try:
                age = time.time() - os.lstat(self.outbox(name)).st_mtime
            except OSError:
                continue
            if name.startswith(".") and age > SWEEP_AFTER_S:
                remove(self.outbox(name))
        for name in names:
            if not (name[:20].isdigit() and name[20:21] == "-" and name.endswith(".json")):
                self.set_aside(name, "no ping")
        names = self.waiting()
        for name in names[: max(0, len(names) - OUTBOX_MAX_PINGS)]:
            self.lose(name, "outbox full")
            remove(self.outbox(name))
        present = set(names)
        charges = self.state["charges"]
        self.state["charges"] = {n: c for n, c in charges.items() if n in present}

    def lose(self, name, reason):
        """Count a ping that will never be delivered, and the tokens charged to it."""
        losses = self.state["losses"]
        losses[reason] = losses.get(reason, 0) + 1
        try:
            ping = read_object(self.outbox(name), PING_MAX_BYTES).get("ping")
            tokens = ping.get("total_tokens") if isinstance(ping, dict) else None
        except (OSError, ValueError):
            tokens = None
        if number(tokens) and tokens:
            losses["tokens"] = losses.get("tokens", 0) + int(tokens)
        self.save()

    def set_aside(self, name, reason):
        """Move a ping that is refused for good out of the way of the others."""
        refused = os.path.join(self.base, "refused")
        self.lose(name, reason)
        self.tried.add(name)  # should the move fail, do not spin on it
        try:
            os.makedirs(refused, 0o700, exist_ok=True)
            os.replace(self.outbox(name), os.path.join(refused, name))
            for old in sorted(os.listdir(refused))[:-REFUSED_MAX_PINGS]:
                remove(os.path.join(refused, old))
        except OSError:
            remove(self.outbox(name))

    def read_ping(self, name):
        """The ping to send, with its usage; None when there is none to send under `name`."""
        try:
            record = read_object(self.outbox(name), PING_MAX_BYTES)
            if not isinstance(record.get("ping"), dict):
                raise ValueError("no ping")
            record["ping"] = gate(record["ping"])
            if not {"event_id", "provider", "status"} <= record["ping"].keys():
                raise ValueError("no ping")
        except FileNotFoundError:
            return None
        except OSError:  # no descriptor free, an I/O error: perhaps another time
            self.tried.add(name)
            return None
        except ValueError:
            self.set_aside(name, "no ping")
            return None
        if not isinstance(record.get("local"), dict) or not record["local"]:
            return record["ping"]
        try:
            return charge(self.base, name, record, self.ends, self.foreground)
        except Exception as error:  # whatever a transcript holds, the ping goes
            self.log("usage left out: " + type(error).__name__)
            return record["ping"]

    def attempt(self, ping):
        """Send one ping; an Answer. Ends the process when urllib overstays its time."""
        import threading

        left = self.ends - time.monotonic() if self.foreground else float("inf")
        watchdog = threading.Timer(min(DEADLINE * self.timeout_s, left), self.overdue)
        watchdog.daemon = True
        headers = dict(self.destination.headers)
        headers["Idempotency-Key"] = ping["event_id"]
        begun = time.monotonic()
        watchdog.start()
        try:
            for body in self.destination.bodies(ping):
                timeout_s = max(0.1, min(self.timeout_s, left))
                answer = post(self.opener, self.destination.url, headers, body, timeout_s)
                if answer.verdict != DELIVERED:
                    break
        finally:
            watchdog.cancel()
        self.tell(
            "%s %s to %s: %s in %d ms, %s"
            % (
                ping.get("event", "ping"),
                ping["event_id"],
                origin(self.destination.url),
                answer.what,
                (time.monotonic() - begun) * 1000,
                {RETRY: "kept", HOLD: "kept", REFUSED: "set aside"}.get(
                    answer.verdict, answer.verdict
                ),
            )
        )
        return answer

    def overdue(self):
        """The watchdog: count the failure, then end the process; nothing else can.

        A hung resolver, a response dripped byte by byte: no timeout of urllib's ends them.
        """
        self.fail(Answer(RETRY, "no whole answer in time"))
        self.tell("no whole answer in time, kept")
        os._exit(0)

    def fail(self, answer):
        """Count a failed pass and start a back-off."""
        state, now = self.state, time.time()
        before = state["problem"]["verdict"] if state["problem"] else None
        again = state["failures"] and before == answer.verdict
        state["failures"] = min(state["failures"] + 1, 64) if again else 1
        wait = backoff_s(answer.verdict, state["failures"], answer.retry_after, now)
        state.update(set_at=now, not_before=now + wait, recovering=True)
        state["problem"] = {"verdict": answer.verdict, "what": answer.what, "at": now}
        self.save()
        self.log("%s: %s, next try in %d s" % (answer.verdict, answer.what, wait))

    def one_pass(self):
        """Try every waiting ping once, oldest first, until one says that it is no time.

        The lock must be held. Returns how many were delivered.
        """
        self.state = state = load_state(self.base)
        self.tidy()
        # After an outage a thousand machines come back at once: go slowly until the
        # backlog is gone.
        most = PROBE_PINGS if state["recovering"] else OUTBOX_MAX_PINGS * 2
        sent = delivered = 0
        suspect = None  # (name, its Answer): the server's fault or the ping's?
        for name in self.waiting():
            if name in self.tried or time.monotonic() >= self.ends:
                continue
            if sent >= most:
                self.pace()
                break
            ping = self.read_ping(name)
            if ping is None:
                continue
            answer = self.attempt(ping)
            sent += 1
            if answer.verdict == DELIVERED:
                delivered += 1
                self.accepted(name)
                if suspect:
                    self.accuse(suspect[0])
                    suspect = None
            elif answer.verdict == REFUSED and not suspect:
                state["failures"] = 0
                state["problem"] = {
                    "verdict": REFUSED, "what": answer.what, "at": time.time()
                }  # fmt: skip
                self.set_aside(name, "refused: " + answer.what)
            else:
                self.tried.add(name)
                if suspect or not answer.maybe_ping:
                    self.fail(answer)
                    break
                suspect = name, answer  # the next ping will tell
        else:
            if suspect:
                self.fail(suspect[1])
            elif sent:
                state["recovering"] = False
        if sent:
            self.log("delivered %d of %d tried" % (delivered, sent))
            self.save()
        return delivered

    def accepted(self, name):
        """The tracker has it: only now the file goes."""
        if not remove(self.outbox(name)):
            self.tried.add(name)
        self.state.update(failures=0, not_before=0, delivered_at=time.time())

    def accuse(self, name):
        """Charge a ping that failed while the next one was accepted; poison goes aside."""
        charges = self.state["charges"]
        charges[name] = charges.get(name, 0) + 1
        age_s = time.time() - int(name[:20]) / 1e9
        if charges[name] >= POISON_CHARGES and age_s > POISON_AGE_S:
            self.set_aside(name, "always fails")

    def pace(self):
        """Let others have their turn before the rest of the backlog."""
        from random import uniform

        now = time.time()
        self.state.update(set_at=now, not_before=now + uniform(*PACE_S), recovering=True)
        self.save()
        self.tell("more wait; the next pass comes in about a minute")

    def live(self, lock):
        """Pass after pass until the outbox is empty or this life is over.

        lock: descriptor of the held lock. It is given back between the passes, and the
        outbox is listed once more after that: a hook that found it busy counts on us.
        """
        while lock is not None:
            if not backoff_left_s(load_state(self.base), time.time()):
                self.sweep()
                self.one_pass()
            drop_lock(lock)
            wait = backoff_left_s(load_state(self.base), time.time())
            if wait:
                if time.monotonic() + wait >= self.ends:
                    return
                time.sleep(wait)
                self.tried.clear()
            elif time.monotonic() >= self.ends or not self.untried():
                return
            lock = take_lock(self.base)

    def sweep(self):
        """Once a day, look for sessions that ended without a word."""
        state, now = load_state(self.base), time.time()
        if 0 <= now - state["swept_at"] < QUIET_S:
            return
        try:
            sweep_accounts(self.base, now)
        except Exception as error:  # a broken account must not stop delivery
            self.log("sweep: " + type(error).__name__)
        self.state = state
        state["swept_at"] = now
        self.save()


def run_sender(lock, environ):
    """The detached process. lock: descriptor of the held lock, as inherited, or -1."""
    os.umask(0o077)
    if os.name == "posix":
        os.nice(10)  # a session's own work comes first
        if os.getsid(0) != os.getpid():
            os.setsid()  # where posix_spawn could not
    settings = Settings(environ)
    destination = find_destination(settings)
    base = destination.directory(settings.state_dir)
    need_sound(settings.state_dir, base)
    try:
        ours = os.path.samestat(os.fstat(lock), os.stat(os.path.join(base, "lock")))
    except (OSError, ValueError, OverflowError):
        ours = False
    if not ours:  # Windows, or started by hand
        lock = take_lock(base)
    sender = Sender(destination, base, settings, time.monotonic() + LIFE_S, lambda _: None)
    try:
        sender.live(lock)
    except Exception as error:  # back off, or every hook would start one that fails
        sender.fail(Answer(RETRY, "internal error: " + type(error).__name__))


def start_sender(lock, environ):
    """Start the detached sender and hand it the lock; it outlives the hook.

    A fresh interpreter: forking and then using urllib crashes on macOS. It keeps no
    descriptor of ours but the lock (Claude Code waits for the end of an inherited pipe),
    and is in no group and, once we have ended, in no family that Claude Code kills.
    """
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), "--sender", str(lock)]
    if os.name == "nt":
        start_sender_on_windows(command, lock, environ)
        return
    os.chdir("/")  # do not keep a project's directory busy
    for name in os.listdir("/dev/fd"):
        fd = int(name)
        if fd > 2:
            try:
                os.set_inheritable(fd, fd == lock)
            except OSError:
                pass  # the descriptor of the listing itself
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    try:
        os.posix_spawn(command[0], command, environ, file_actions=null, setsid=True)
    except NotImplementedError:
        os.posix_spawn(command[0], command, environ, file_actions=null)


def start_sender_on_windows(command, lock, environ):
    """The same without descriptors to inherit: the sender takes the lock itself. (Unrun.)"""
    import subprocess

    drop_lock(lock)
    flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
    subprocess.Popen(
        command[:-1] + ["-1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=True,
        creationflags=flags | subprocess.CREATE_NO_WINDOW,
        cwd=os.path.dirname(command[3]),
        env=environ,
    )


# -- Hook: what Claude Code runs ---------------------------------------------------------


def read_stdin(keep):
    """All bytes of stdin (b"" unless `keep`), to its end: an early close is an error that
    Claude Code shows. A stdin that is never closed counts as it is after STDIN_WAIT_S."""
    import select

    parts, ends = [], time.monotonic() + STDIN_WAIT_S
    try:
        while True:
            if os.name == "posix":  # select() on Windows knows sockets only
                left = max(0.0, ends - time.monotonic())
                if not select.select([0], [], [], left)[0]:
                    break
            part = os.read(0, 1 << 20)
            if not part:
                break
            if keep:
                parts.append(part)
    except OSError:
        pass
    return b"".join(parts)


def inside(path, directory):
    """Whether `path` is `directory` or below it."""
    for resolve in (os.path.normpath, os.path.realpath):  # /tmp is a link on macOS
        top = resolve(directory)
        if (resolve(path) + os.sep).startswith(top.rstrip(os.sep) + os.sep):
            return True
    return False


def main_repository(directory):
    """Of a git worktree, its repository's name; "" for anything else (gitrepository-layout).

    A worktree's .git is a file: `gitdir: <repository>/.git/worktrees/<name>`.
    """
    try:
        text = read_file(os.path.join(directory, ".git"), 4096).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""
    if not text.startswith("gitdir:"):
        return ""
    found = os.path.normpath(os.path.join(directory, text[7:].strip()))
    worktrees = os.path.dirname(found)
    top, name = os.path.split(os.path.dirname(worktrees))
    if os.path.basename(worktrees) != "worktrees":
        return ""
    if name.startswith("."):  # .git, or .bare by a common habit
        return os.path.basename(top)
    return name[:-4] if name.endswith(".git") else name


def project_of(event, settings):
    """The project's name: a `cd src` or a worktree must not make another project."""
    cwd = event.get("cwd") if isinstance(event.get("cwd"), str) else ""
    directory = settings.environ.get("CLAUDE_PROJECT_DIR") or ""
    try:
        if not (cwd and directory and inside(cwd, directory)):
            directory = cwd
        name = main_repository(directory) if directory else ""
        name = name or os.path.basename(os.path.normpath(directory))
    except (OSError, ValueError):  # a NUL or a lone surrogate in it
        name = ""
    return settings.project or (clean(name).strip(" .") and clean(name)) or "unknown"


def local_of(event, settings, ping):
    """What the sender needs for the ping's usage and never sends; {} when that is off."""
    transcript = event.get("transcript_path")
    if not (settings.usage and "session_id" in ping and transcript):
        return {}
    local = {"transcript": transcript, "git": settings.git}
    if ping.get("event") == "SubagentStop":
        local["agent_transcript"] = event.get("agent_transcript_path")
    return {key: v for key, v in local.items() if isinstance(v, (str, bool))}


def deliver_here(destination, base, settings, name, started, tell):
    """One pass inside the hook: FOREGROUND_S at most since `started`, waits included."""
    left = backoff_left_s(load_state(base), time.time())
    if left:
        problem = (load_state(base)["problem"] or {}).get("what", "pacing after an outage")
        if not settings.debug:
            return
        tell("a back-off lasts %d s more (%s); this attempt ignores it" % (left, problem))
    ends, lock = started + FOREGROUND_S, take_lock(base)
    while lock is None:
        if time.monotonic() >= ends:
            raise Skipped("a sender is at work and has the ping; see sender.log in " + base)
        time.sleep(POLL_S)
        lock = take_lock(base)
    Sender(destination, base, settings, ends, tell).one_pass()
    drop_lock(lock)
    if os.path.exists(os.path.join(base, "outbox", name)):
        tell("the ping waits in the outbox; a later hook delivers it")


def hook(settings, tell):
    """One event on stdin becomes one ping in the outbox; Skipped says why it did not."""
    started, ns = time.monotonic(), time.time_ns()
    os.umask(0o077)
    for text in settings.ignored:
        tell(text)
    try:
        destination = find_destination(settings)
    except Skipped:
        read_stdin(keep=False)
        raise
    raw = read_stdin(keep=True)
    size, text = len(raw), raw.decode("utf-8", "replace").lstrip("\ufeff")
    del raw
    try:
        event = decode_json(text)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise Skipped("stdin held no JSON object (%d bytes); Claude Code sends one" % size)
    ping = make_ping(event, settings, project_of(event, settings), ns, size)
    base = destination.directory(settings.state_dir)
    need_sound(settings.state_dir, base)
    name = ping_file_name(ns, ping["event_id"])
    try:
        enqueue(base, name, ping, local_of(event, settings, ping))
    except OSError as error:
        raise Skipped("cannot write to %s: %s" % (base, error.strerror)) from None
    tell("%s %s is in the outbox" % (ping.get("event", "ping"), ping["event_id"]))
    if settings.debug or settings.foreground:
        deliver_here(destination, base, settings, name, started, tell)
    elif not backoff_left_s(load_state(base), time.time()):
        lock = take_lock(base)
        if lock is not None:  # busy: a sender runs, and will see the file
            start_sender(lock, settings.environ)


def run_for_claude_code(arguments):
    """Hook or sender; never returns, never fails, prints nothing (but in debug mode)."""
    debug = os.environ.get("TELEMHQ_HOOK_DEBUG", "") not in ("", "0")

    def tell(text, label="TelemHQ hook: "):
        if debug:
            os.write(2, (label + text + "\n").encode("utf-8", "backslashreplace"))

    try:
        for fd in (0, 1, 2):
            try:
                os.fstat(fd)
            except OSError:  # closed: or the next file we open would be our stdin
                os.open(os.devnull, os.O_RDWR)
        if not sys.flags.isolated:  # TelemHQ's own block: a json.py beside us is not json
            sys.path[:] = [p for p in sys.path if p.startswith(sys.base_prefix + os.sep)]
        if sys.version_info < (3, 8):
            raise Skipped("it needs Python 3.8 or newer")
        if arguments:
            run_sender(int(arguments[1]), dict(os.environ))
        else:
            hook(Settings(dict(os.environ)), tell)
    except Skipped as reason:
        try:
            tell(str(reason), "TelemHQ hook skipped: ")
        except OSError:
            pass
    except BaseException as error:  # the promise: Claude Code never notices
        try:
            tell("%s: %s" % (type(error).__name__, error), "TelemHQ hook skipped: ")
        except OSError:
            pass
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sender"] or not (sys.argv[1:] or (sys.stdin and os.isatty(0))):
        run_for_claude_code(sys.argv[1:])

# ========================================================================================
# Nothing below this line runs inside Claude Code: the commands, run by a person.
# ========================================================================================


def main(arguments):
    """Run a command; the exit status."""
    if arguments == ["--version"]:
        print("telemhq_ping " + __version__)
        return 0
    print(__doc__)
    if arguments and arguments not in (["--help"], ["-h"]):
        print("telemhq_ping: unknown arguments: " + " ".join(arguments), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
