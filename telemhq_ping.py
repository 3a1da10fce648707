#!/usr/bin/env python3
"""Tell a TelemHQ tracker what Claude Code did, never what was said.

A hook script for Claude Code: one file, standard library only, Python 3.8 or newer.

What runs when
    hook     (no arguments, an event on stdin) makes the event a ping, puts it into the
             outbox, starts a sender, exits. No network.
    sender   (--sender FD) detached, at most one per destination: POSTs what waits, the
             oldest first; ends when the outbox is empty, at the latest after 60 s.
    For the commands, which a person runs, see --help.
How to read it
    Down to the first banner stands all that runs while Claude Code waits. Below it are
    two texts: SENDER, which the sender compiles, and COMMANDS.
What leaves
    The fields of GATE, each only in the shape it has there: numbers, booleans, hashes,
    identifiers, the project's name. Never a prompt, an answer, a command, a tool's
    input or output, a path, an error's text, the environment.
What is read and written
    The event; the project's .git when it is a file; by the sender, for counts only, the
    transcript. All that is written is below $TELEMHQ_STATE_DIR, else telemhq/ in
    $CLAUDE_CONFIG_DIR, else ~/.claude/telemhq/ (directories 0700, files 0600).
Variables
    TELEMHQ_PING_URL    where pings go; unset, empty or invalid: nothing happens
    TELEMHQ_PROJECT     the project's name, instead of its directory's
    TELEMHQ_MACHINE     a name for this machine, sent along
    TELEMHQ_HASH_KEY    makes the hashes of paths HMACs under this key
    TELEMHQ_USAGE       0: open no transcript, send no tokens
    TELEMHQ_GIT         1: send the git branch
    TELEMHQ_TIMEOUT     seconds for one socket operation (10; 1 to 30)
    TELEMHQ_FOREGROUND  1: deliver inside the hook (containers, CI)
    TELEMHQ_ALLOW_HTTP  1: allow http:// to other machines
    TELEMHQ_STATE_DIR   where the state is kept
    TELEMHQ_HOOK_DEBUG  1: deliver inside the hook and tell on stderr what happens
Exit status
    Hook and sender: 0, whatever happens; nothing on stdout, and nothing on stderr but
    under TELEMHQ_HOOK_DEBUG. Commands: 0 done, 1 failed, 2 bad usage.
"""

import sys

if __name__ == "__main__" and not sys.flags.isolated:  # no project's json.py
    ours = (sys.base_prefix + "/", sys.base_exec_prefix + "/", sys.base_prefix + "\\")
    sys.path[:] = [path for path in sys.path if path.startswith(ours)]

import os
import stat
import time

__version__ = "1.0.0"

STDIN_WAIT_S = 5.0  # a stdin that is never closed; Claude Code kills us at 10
FOREGROUND_S = 8.0  # delivery inside the hook, in all; below the hook's timeout of 10
LIFE_S = 60.0  # a sender's: longer than a restart of the tracker
TIMEOUT_S = (10.0, 1.0, 30.0)  # one socket operation: default, least, most
DEADLINE = 1.5  # a whole request's time in timeouts: urllib bounds operations only
OUTBOX_MAX_PINGS = 5000  # some 4 MB, a day of heavy use while the tracker is away
REFUSED_MAX_PINGS = 100  # kept to be looked at, not to be sent
PING_MAX_BYTES = 64 << 10  # ours are 1 to 4 KB
UNFINISHED_S = 3600.0  # a file unfinished for so long has lost its writer
BACKOFF_MAX_S = 900.0  # 15 min: the end of an outage is noticed soon enough
HOLD_S = (900.0, 21600.0)  # 15 min to 6 h: a person must mend the cause
RETRY_AFTER_MAX_S = 86400.0  # a day: no server may silence us for longer
POISON_CHARGES, POISON_AGE_S = 8, 3600.0  # both: neither a burst nor an outage blames
PROBE_PINGS, PACE_S = 25, (30.0, 90.0)  # after an outage: pings a pass, then a pause
LOG_MAX_BYTES = 256 << 10  # some 2,000 passes


class Skipped(Exception):
    """Why a hook or a command did not do its work, for a person to read."""

# -- JSON and hashes, without the cost of importing json (7 ms) and hashlib (3 ms) -----

try:
    from _json import encode_basestring_ascii, make_scanner
except ImportError:  # not CPython
    from json import JSONDecoder, dumps as encode_basestring_ascii

    def make_scanner(_):
        """The same from the public module."""
        return JSONDecoder(strict=False, parse_int=Scanner.parse_int).scan_once

class Scanner:
    """What `make_scanner` is told (json/scanner.py). An int of 20 digits is no count,
    and int() may refuse it."""

    strict, object_hook, object_pairs_hook = False, None, None
    parse_float = parse_constant = float
    parse_int = staticmethod(lambda text: int(text) if len(text) < 20 else None)

def decode_json(text):
    """The JSON value that `text` (str) begins with; ValueError when there is none."""
    try:
        return make_scanner(Scanner)(text.strip(), 0)[0]
    except (StopIteration, RecursionError, SystemError):
        # SystemError: 3.10 and 3.11 find no JSONDecodeError while json is not imported.
        raise ValueError("not JSON, or nested too deeply") from None

def encode_json(value):
    """`value` (dict, list, str, bool, None, finite number) as compact ASCII JSON."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, dict):
        pairs = (encode_json(k) + ":" + encode_json(v) for k, v in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(encode_json, value)) + "]"
    return {None: "null", True: "true", False: "false"}[value] if (
        value is None or isinstance(value, bool)) else repr(value)

def sha256_hex(raw, key=b""):
    """SHA-256 of bytes, 64 hex digits; HMAC-SHA-256 when there is a key (bytes)."""
    if key:
        import hmac
        return hmac.new(key, raw, "sha256").hexdigest()
    try:
        from _sha2 import sha256  # CPython from 3.12 on
    except ImportError:
        try:
            from _sha256 import sha256
        except ImportError:
            from hashlib import sha256
    return sha256(raw).hexdigest()

def path_hash(path, key):
    """First 12 hex of the hash of a path; `key` (str) may be empty."""
    key = key.encode("utf-8", "surrogateescape")
    return sha256_hex(path.encode("utf-8", "surrogatepass"), key)[:12]

# -- Event -> ping: the privacy gate. What is not in this section never leaves. --------

DIGITS, LOWER = "0123456789", "abcdefghijklmnopqrstuvwxyz"
LETTERS_DIGITS = frozenset(DIGITS + LOWER + LOWER.upper())

def identifier(value, more=""):
    """1 to 128 letters, digits and _ . : - (and `more`), a letter or digit first."""
    good = LETTERS_DIGITS.union("_.:-", more)
    return (isinstance(value, str) and 0 < len(value) <= 128
            and value[0] in LETTERS_DIGITS and good.issuperset(value))

def project_name(value):
    """1 to 128 characters, no control characters among them."""
    return isinstance(value, str) and value != "" and clean(value) == value

def number(value):
    """A finite number from 0 up to 2^53, which every JSON reader keeps exact."""
    return type(value) in (int, float) and 0 <= value < 1 << 53

def all_of(value, characters, longest):
    """A text of these characters only, 1 to `longest` of them."""
    return (isinstance(value, str) and 0 < len(value) <= longest
            and not value.strip(characters))

def counts(value, keys=identifier, shape=number):
    """An object whose every key and value has its shape; at most 20 of them."""
    return isinstance(value, dict) and len(value) <= 20 and all(
        keys(key) and shape(inner) for key, inner in value.items())

TOKENS = ("input_tokens", "output_tokens", "cached_input_tokens",
          "cache_creation_input_tokens", "reasoning_tokens", "total_tokens")
GATE = {}  # everything that can ever leave: field -> the only shape in which it may
for names, shape in (
    ("event_id event timestamp status provider tool hook_version machine session_id "
     "prompt_id tool_name tool_use_id permission_mode effort agent_id agent_type "
     "source reason trigger notification_type", identifier),
    ("project", project_name),
    ("model", lambda v: identifier(v, "@[]")),  # claude-x@date, claude-x[1m]
    ("git_branch", lambda v: identifier(v, "/")),
    ("error", lambda v: all_of(v, LOWER + "_", 40)),  # a code such as rate_limit
    ("cwd_hash transcript_path_hash", lambda v: all_of(v, DIGITS + "abcdef", 12)),
    ("is_interrupt stop_hook_active usage_complete", lambda v: isinstance(v, bool)),
    ("duration_ms exit_code error_chars prompt_chars last_assistant_message_chars "
     "background_tasks event_bytes tool_calls tool_failures cost_usd", number),
    (" ".join(TOKENS), number),
    ("tools", counts),  # name -> calls
    ("models", lambda v: counts(
        v, GATE["model"], lambda inner: counts(inner, TOKENS.__contains__))),
):
    GATE.update(dict.fromkeys(names.split(), shape))
ORIGIN = {"provider": "anthropic", "tool": "claude-code", "hook_version": __version__}
COPIED = (  # from the event to the ping under the same name
    "session_id prompt_id tool_name tool_use_id permission_mode agent_id agent_type "
    "source trigger notification_type model duration_ms is_interrupt stop_hook_active"
    ).split()

def gate(fields):
    """Of `fields` (dict) what GATE names, in its shape. Every body is made by this."""
    return {name: fields[name] for name, shape in GATE.items()
            if name in fields and shape(fields[name])}

def clean(text):
    """`text` without control characters and lone surrogates, at most 128 characters."""
    return "".join(c for c in text if not (
        c < " " or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff"))[:128]

def iso_time(ns):
    """Nanoseconds since 1970 as ISO 8601, UTC, with milliseconds."""
    day = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9))
    return "%s.%03dZ" % (day, ns // 10**6 % 1000)

def error_fields(event):
    """`error` and its numbers. A tool's error text holds its output, and paths."""
    name, error = event.get("hook_event_name"), event.get("error")
    if name == "StopFailure":
        return {"error": error}  # one of Claude Code's own codes, or the gate drops it
    if name != "PostToolUseFailure":
        return {"error": "error"} if error else {}
    fields = {"error": "tool_error"}
    if isinstance(error, str):
        fields["error_chars"] = len(error)
        code = "".join(error[10:31].split()[:1])
        if error.startswith("Exit code ") and code.isascii() and code.isdigit():
            fields["exit_code"] = int(code)
    return fields

def make_ping(event, settings, project, ns, event_bytes):
    """The ping of one event (dict). project: its name. ns: when it happened, in
    nanoseconds since 1970. event_bytes: its size on stdin."""
    name, effort = event.get("hook_event_name"), event.get("effort")
    failed = name in ("PostToolUseFailure", "StopFailure") or event.get("error")
    fields = {key: event[key] for key in COPIED if key in event}
    fields.update(error_fields(event), **ORIGIN)
    fields.update(event=name, status="failed" if failed else "success", project=project,
                  event_id=os.urandom(16).hex(), timestamp=iso_time(ns),
                  machine=settings.machine, event_bytes=event_bytes,
                  effort=effort.get("level") if isinstance(effort, dict) else effort)
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

# -- Settings and destination ----------------------------------------------------------

SWITCH = {"1": 1, "yes": 1, "on": 1, "true": 1, "0": 0, "no": 0, "off": 0, "false": 0}

class Settings:
    """The TELEMHQ_ variables. `ignored`: those that make no sense, and why."""

    def __init__(self, environ):
        self.environ, self.ignored = environ, []
        option = environ.get("CLAUDE_PLUGIN_OPTION_PING_URL", "")
        self.url = environ.get("TELEMHQ_PING_URL", option)
        self.hash_key = environ.get("TELEMHQ_HASH_KEY", "")
        self.debug = self.switch("TELEMHQ_HOOK_DEBUG")
        self.foreground = self.switch("TELEMHQ_FOREGROUND") or self.debug
        self.allow_http = self.switch("TELEMHQ_ALLOW_HTTP")
        self.git = self.switch("TELEMHQ_GIT")
        # For privacy's sake, what is not understood here means off.
        self.usage = not environ.get("TELEMHQ_USAGE") or self.switch("TELEMHQ_USAGE")
        self.project = self.choice(
            "TELEMHQ_PROJECT", "it has nothing to show", lambda v: clean(v).strip())
        self.machine = self.choice(
            "TELEMHQ_MACHINE", "only letters, digits and _ . : - may be in it",
            lambda v: v if identifier(v) else None)
        seconds = self.choice("TELEMHQ_TIMEOUT", "it is no number of seconds", duration)
        self.timeout_s = seconds or TIMEOUT_S[0]
        config = environ.get("CLAUDE_CONFIG_DIR") or "~/.claude"
        self.state_dir = (  # None: nothing tells where home is
            self.choice("TELEMHQ_STATE_DIR", "it must be absolute", absolute)
            or absolute(os.path.join(config, "telemhq"))
            or absolute("~/.claude/telemhq"))

    def choice(self, name, problem, accept):
        """What `accept` makes of a variable; None when that is nothing."""
        value = self.environ.get(name)
        found = accept(value) if value else None
        if value and found is None or found == "":
            self.ignored.append("%s is ignored: %s" % (name, problem))
        return found or None

    def switch(self, name):
        """A variable that is 1 or 0; what is neither counts as 0."""
        return self.choice(name, "it must be 1 or 0", lambda v: SWITCH.get(v.lower()))

def duration(text):
    """Seconds, clamped to what TIMEOUT_S allows; None when `text` is no number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return min(max(value, TIMEOUT_S[1]), TIMEOUT_S[2]) if value == value else None

def absolute(path):
    """`path` normalised, ~ expanded; None when it is relative."""
    path = os.path.normpath(os.path.expanduser(path))
    return path if os.path.isabs(path) else None

class Destination:
    """Where pings go, as a value: another service would cost one more such value.

    kind: the service. url: secret. headers: dict. bodies: function ping -> [bytes],
    each POSTed to `url` with the ping's event_id as Idempotency-Key.
    """

    def __init__(self, kind, url, headers, bodies):
        self.kind, self.url, self.headers, self.bodies = kind, url, headers, bodies

    def directory(self, state_dir):
        """Its own directory; the name does not tell the URL."""
        short = sha256_hex(self.url.encode())[:12]
        return os.path.join(state_dir or "", self.kind + "-" + short)

def telemhq(url):
    """TelemHQ: the body is the ping, the token is in the URL's path (public docs)."""
    headers = {"Content-Type": "application/json",
               "User-Agent": "telemhq-ping/" + __version__}
    return Destination("telemhq", url, headers, lambda p: [encode_json(p).encode()])

def split_url(url):
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
    if authority.startswith("["):
        host, found, port = authority[1:].partition("]")
        colon, port, good = port[:1], port[1:], frozenset(DIGITS + "abcdefABCDEF:.")
        good = good if found and colon in ("", ":") else ()
    if not host or not set(host).issubset(good) or ".." in "." + host:
        raise ValueError("it names no host")
    if colon and not (port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        raise ValueError("its port is not a number from 1 to 65535")
    return scheme.lower(), host.lower(), port

def loopback(host):
    """Whether `host` is this machine, by name or plain address."""
    parts = host.split(".")
    return host in ("localhost", "::1") or (
        parts[0] == "127" and len(parts) == 4
        and all(part.isdigit() and int(part) < 256 for part in parts))

def origin(url):
    """Scheme, host and port: what may be shown of a valid URL."""
    return "/".join(url.replace("?", "/").replace("#", "/").split("/")[:3])

def find_destination(settings):
    """The destination that the settings name; Skipped says why there is none."""
    if not settings.url:
        raise Skipped("TELEMHQ_PING_URL is not set; export it with your tracker's URL")
    try:
        scheme, host, _ = split_url(settings.url)
        if scheme == "http" and not (settings.allow_http or loopback(host)):
            raise ValueError("http:// can be read on the way; use https:// (or set "
                             "TELEMHQ_ALLOW_HTTP=1)")
    except ValueError as error:
        raise Skipped("TELEMHQ_PING_URL is not usable: %s" % error) from None
    return telemhq(settings.url)

# -- On disk ---------------------------------------------------------------------------

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)

def unsound(directory):
    """Why `directory` must not be used, or "" (also when it is not there yet)."""
    try:
        found = os.lstat(directory)
    except OSError as error:
        return "" if isinstance(error, FileNotFoundError) else error.strerror
    if not stat.S_ISDIR(found.st_mode):
        link = stat.S_ISLNK(found.st_mode)
        return "is a symbolic link" if link else "is no directory"
    if os.name == "posix" and found.st_uid != os.geteuid():
        return "belongs to someone else"
    writable = os.name == "posix" and found.st_mode & 0o022
    return "can be written by others" if writable else ""

def need_sound(state_dir, base):
    """Raise Skipped when others may have a hand in anything from telemhq/ down."""
    if not state_dir:
        raise Skipped("there is no home directory; set TELEMHQ_STATE_DIR")
    for name in ("outbox", "refused", "accounts", "..", "."):
        directory = os.path.normpath(os.path.join(base, name))
        if unsound(directory):
            raise Skipped("%s %s; mend or remove it" % (directory, unsound(directory)))

def write_file(path, content):
    """Make `path` hold `content` (bytes), all or nothing, 0600 (the umask is 077)."""
    directory, name = os.path.split(path)
    unfinished = os.path.join(directory, ".%s.%s" % (name, os.urandom(4).hex()))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW
    try:
        fd = os.open(unfinished, flags, 0o600)
    except FileNotFoundError:
        os.makedirs(directory, 0o700, exist_ok=True)
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

def write_object(path, value):
    """Make `path` hold `value` (dict) as JSON."""
    write_file(path, encode_json(value).encode())

def open_regular(path):
    """A descriptor to read a regular file; ValueError when it is anything else."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("not a regular file")
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | NO_FOLLOW)

def read_file(path, most):
    """A regular file's bytes; ValueError when it is none, or has more than `most`."""
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError("too large")
    return content

def read_object(path, most):
    """A file's JSON object; ValueError when it holds none, OSError as it comes."""
    found = decode_json(read_file(path, most).decode("utf-8", "replace"))
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found

def remove(path):
    """Delete a file or an empty directory; whether that worked."""
    for delete in (os.unlink, os.rmdir):
        try:
            delete(path)
            return True
        except OSError:
            pass
    return False

def ping_file(base, ns, event_id):
    """Path of a ping in the outbox; names sort by the time of the event."""
    return os.path.join(base, "outbox", "%020d-%s.json" % (ns, event_id))

def ns_of(path):
    """The time in a ping's path or name."""
    return int(os.path.basename(path)[:20])

def quiet_s(path):
    """Seconds since a file was written, 0 when it is gone."""
    try:
        return time.time() - os.lstat(path).st_mtime
    except OSError:
        return 0

def load_state(base):
    """state.json; whatever the file holds, every key has a value that makes sense."""
    try:
        found = read_object(os.path.join(base, "state.json"), 4 << 20)
    except (OSError, ValueError):
        found = {}
    numbers = ("failures", "set_at", "not_before", "delivered_at", "swept_at")
    state = {key: found[key] if number(found.get(key)) else 0 for key in numbers}
    state["failures"] = int(min(state["failures"], 64))
    state["recovering"] = found.get("recovering") is True
    for key in ("charges", "losses", "problem"):
        state[key] = found[key] if isinstance(found.get(key), dict) else {}
    for key in ("charges", "losses"):
        state[key] = {k: int(n) for k, n in state[key].items() if number(n)}
    problem = state["problem"].items()
    good = {k: v for k, v in problem if isinstance(v, str) or number(v)}
    return dict(state, problem=good)

def backoff_left_s(state, now):
    """Seconds until the back-off ends, 0 when none stands. One that was set in what is
    now the future is none: a clock that jumped must not stop delivery."""
    latest = min(state["not_before"], state["set_at"] + RETRY_AFTER_MAX_S)
    return latest - now if state["set_at"] <= now < latest else 0

def take_lock(base):
    """The destination's lock: a descriptor, None while someone else holds it, -1 when
    there can be none. The kernel frees it at its holder's death. An error other than
    "busy" counts as free: rather one ping twice under its id than all of them never."""
    try:
        flags = os.O_RDWR | os.O_CREAT | NO_FOLLOW
        fd = os.open(os.path.join(base, "lock"), flags, 0o600)
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
    """Give the lock back, also from a hook just ending that still shares it."""
    try:
        if os.name == "posix":
            import fcntl
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)
    except (OSError, ValueError):
        pass  # there was none

# -- Hook: what Claude Code runs -------------------------------------------------------

def read_stdin(keep):
    """All bytes of stdin (none unless `keep`), to its end: Claude Code shows an error
    when it is closed early. Never closed, it counts as it is after STDIN_WAIT_S."""
    import select
    parts, ends = [], time.monotonic() + STDIN_WAIT_S
    try:
        # select() on Windows knows sockets only.
        while os.name == "nt" or select.select(
                [0], [], [], max(0.0, ends - time.monotonic()))[0]:
            part = os.read(0, 1 << 20)
            if not part:
                break
            parts += [part] if keep else []
    except OSError:
        pass
    return b"".join(parts)

def inside(path, directory):
    """Whether `path` is `directory` or below it."""
    for resolve in (os.path.normpath, os.path.realpath):  # /tmp is a link on macOS
        top = resolve(directory).rstrip(os.sep) + os.sep
        if (resolve(path) + os.sep).startswith(top):
            return True
    return False

def main_repository(directory):
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

def project_of(event, settings):
    """The project's name; neither a `cd src` nor a worktree makes another project."""
    cwd = event.get("cwd") if isinstance(event.get("cwd"), str) else ""
    top, name = settings.environ.get("CLAUDE_PROJECT_DIR"), ""
    try:
        directory = top if cwd and top and inside(cwd, top) else cwd
        if directory and not settings.project:
            name = os.path.normpath(directory).replace("\\", "/").split("/")[-1]
            name = main_repository(directory) or name
    except (OSError, ValueError):
        pass  # a NUL in it
    name = clean(name)
    return settings.project or (name if name.strip(" .") else "unknown")

def local_of(event, settings, ping):
    """What the sender needs for the ping's usage and never sends; {}: no usage."""
    transcript, agent = event.get("transcript_path"), event.get("agent_transcript_path")
    if not (settings.usage and "session_id" in ping and isinstance(transcript, str)
            and transcript.endswith(".jsonl")):
        return {}
    local = {"transcript": transcript, "git": settings.git}
    return dict(local, agent_transcript=agent) if isinstance(agent, str) else local

def registered_elsewhere(event, environ):
    """Whether, run as a plugin, a settings file runs this script for the same event."""
    config = absolute(environ.get("CLAUDE_CONFIG_DIR") or "~/.claude") or ""
    project = os.path.join(environ.get("CLAUDE_PROJECT_DIR") or config, ".claude")
    if not (environ.get("CLAUDE_PLUGIN_ROOT") and environ.get("TELEMHQ_PING_URL")):
        return False  # without that variable, the settings' one would send nothing
    for path in (os.path.join(config, "settings.json"),
                 os.path.join(project, "settings.json"),
                 os.path.join(project, "settings.local.json")):
        try:
            groups = read_object(path, 1 << 20)["hooks"][event["hook_event_name"]]
            if "telemhq_ping.py" in encode_json(groups):
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass
    return False

def start_sender(lock, environ):
    """Start the detached sender and hand it the lock; it outlives the hook. A fresh
    interpreter, for urllib crashes in a forked process on macOS. In its own session and
    with no descriptor but the lock: Claude Code kills groups and families, and waits
    for the end of its pipes."""
    script = os.path.abspath(__file__)
    command = [sys.executable, "-I", "-S", script, "--sender", str(lock)]
    if os.name == "nt":  # unrun; descriptors are not inherited there
        import subprocess
        drop_lock(lock)
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
        null = subprocess.DEVNULL
        subprocess.Popen(command[:-1] + ["-1"], stdin=null, stdout=null, stderr=null,
                         creationflags=flags, cwd=os.path.dirname(script), env=environ)
        return
    os.chdir("/")  # keep no project's directory busy
    try:
        inherited = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:  # a container without /proc
        inherited = range(256)
    for fd in inherited:
        try:
            os.set_inheritable(fd, fd in (0, 1, 2, lock))
        except OSError:
            pass  # not open, or the listing's own
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    how = {"file_actions": null, "setsigdef": [15]}  # SIGTERM, if our shell ignored it
    try:
        os.posix_spawn(command[0], command, environ, setsid=True, **how)
    except NotImplementedError:  # the sender calls setsid() itself
        os.posix_spawn(command[0], command, environ, **how)

def hook(settings, tell):
    """The event on stdin becomes a ping in the outbox; Skipped says why it did not."""
    ends, ns = time.monotonic() + FOREGROUND_S, time.time_ns()
    os.umask(0o077)
    for text in settings.ignored:
        tell(text)
    try:
        destination = find_destination(settings)
    except Skipped:
        read_stdin(keep=False)
        raise
    raw = read_stdin(keep=True)
    try:
        event = decode_json(raw.decode("utf-8", "replace").lstrip("\ufeff"))
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise Skipped("stdin held no JSON object, which Claude Code would send")
    if registered_elsewhere(event, settings.environ):
        raise Skipped("a settings file runs this script for the event, too")
    ping = make_ping(event, settings, project_of(event, settings), ns, len(raw))
    base = destination.directory(settings.state_dir)
    need_sound(settings.state_dir, base)
    path = ping_file(base, ns, ping["event_id"])
    try:
        write_object(path, {"ping": ping, "local": local_of(event, settings, ping)})
    except OSError as error:
        raise Skipped("cannot write to %s: %s" % (base, error.strerror)) from None
    tell("%s %s is in the outbox" % (ping.get("event"), ping["event_id"]))
    if settings.foreground:
        bring(SENDER)
        deliver_here(destination, base, settings, ends, tell)
        if os.path.exists(path):
            tell("the ping waits in the outbox; a later hook delivers it")
    elif not backoff_left_s(load_state(base), time.time()):
        lock = take_lock(base)
        if lock is not None:  # busy: a sender runs, and will see the file
            start_sender(lock, settings.environ)

def bring(text):
    """Compile SENDER or COMMANDS into this module, under this file's line numbers."""
    try:
        with open(__file__, encoding="utf-8") as file:
            above = file.read().partition(text)[0].count("\n")
    except OSError:
        above = 0  # the file was removed meanwhile
    exec(compile("\n" * above + text, __file__, "exec"), globals())

def run_for_claude_code(arguments):
    """Hook or sender; never fails, never returns, prints only in debug mode."""
    settings = None

    def tell(text, label="TelemHQ hook: "):
        if settings and settings.debug:
            try:
                os.write(2, (label + text + "\n").encode("utf-8", "backslashreplace"))
            except OSError:
                pass

    try:
        for fd in (0, 1, 2):
            try:
                os.fstat(fd)
            except OSError:  # closed: or the next file that we open would be our stdin
                os.open(os.devnull, os.O_RDWR)
        settings = Settings(dict(os.environ))
        if sys.version_info < (3, 8):
            raise Skipped("it needs Python 3.8 or newer")
        if arguments:
            bring(SENDER)
            run_sender(int(arguments[1]), settings)
        else:
            hook(settings, tell)
    except Skipped as reason:
        tell(str(reason), "TelemHQ hook skipped: ")
    except BaseException as error:  # the promise: Claude Code never notices
        tell(repr(error), "TelemHQ hook skipped: ")
    os._exit(0)

# ======================================================================================
# Nothing below this line runs while Claude Code waits, unless TELEMHQ_FOREGROUND or
# TELEMHQ_HOOK_DEBUG has the hook deliver by itself. What follows is two texts, compiled
# where they are used: Python compiles a script at every run, and with them each hook
# would take half as long again. First SENDER, the code of the detached process.
# ======================================================================================

SENDER = r'''
import threading
from calendar import timegm
from collections import Counter
from datetime import datetime
from email.utils import parsedate
from http.client import HTTPException
from random import uniform
from urllib import request
from urllib.error import URLError

# -- Usage: tokens from the transcript, charged once (by the sender only) --------------

USAGE_EVENTS = ("Stop", "StopFailure", "SubagentStop", "SessionEnd")
LAG_S, POLL_S = 2.0, 0.05  # a turn's last row comes up to 0.1 s after its Stop fired
READ_S = 20.0  # reading for one ping; the rest is for the session's next
BLOCK_BYTES, LINE_MAX_BYTES = 4 << 20, 8 << 20  # rows that count are some KB long
UNREAD_MAX_BYTES = 768 << 20  # more at once is skipped
SEEN_MAX = 256  # messages remembered, and tool calls: repeats stand close together
QUIET_S, ACCOUNT_MAX_S = 86400.0, 30 * 86400.0  # a session is lost, an account dropped
COUNTS = {  # the ping's name: the transcript's, the ledger's
    "input_tokens": ("input_tokens", "inputTokens"),
    "output_tokens": ("output_tokens", "outputTokens"),
    "cached_input_tokens": ("cache_read_input_tokens", "cacheReadInputTokens"),
    "cache_creation_input_tokens":
        ("cache_creation_input_tokens", "cacheCreationInputTokens"),
    "reasoning_tokens": ("thinking_tokens", "thinkingTokens")}
NOTHING = {  # read and not yet charged
    "models": {}, "tools": {}, "tool_calls": 0, "tool_failures": 0, "final": []}
NEEDLES = (b'"usage"', b'"is_error":true', b'"cost-state"', b'"promptId"')

def lines_that_matter(fd, offset):
    """The whole lines behind `offset` that may hold a count, by their bytes. Yields
    (offset behind the line, line), and (offset, b"") where all before it is read."""
    os.lseek(fd, offset, os.SEEK_SET)
    rest, block = b"", os.read(fd, BLOCK_BYTES)
    while block:
        block = rest + block
        whole, ends = block.rfind(b"\n") + 1, {}
        for needle in NEEDLES:
            at = block.find(needle, 0, whole)
            while at >= 0:
                start, end = block.rfind(b"\n", 0, at) + 1, block.find(b"\n", at) + 1
                # Tools' results are user rows too: most of the file, and no prompts.
                prompt = needle == b'"promptId"'
                if not prompt or block.find(b'"tool_result"', start, end) < 0:
                    ends[start] = end
                at = block.find(needle, end, whole)
        for start in sorted(ends):
            yield offset + ends[start], block[start : ends[start]]
        rest = block[whole:]
        if len(rest) > LINE_MAX_BYTES:  # do not keep it; its end will not parse
            whole, rest = len(block), b""
        offset += whole
        yield offset, b""
        block = os.read(fd, BLOCK_BYTES)

def copy_of(value):
    """A deep copy of a JSON value."""
    return decode_json(encode_json(value))

def counts_of(found, column):
    """Counter of a row's usage (column 0) or of a model's entry in the ledger (1)."""
    details = found.get("output_tokens_details")
    found = dict(found, **details) if isinstance(details, dict) else found
    given = {name: found.get(names[column]) for name, names in COUNTS.items()}
    return Counter({name: int(n) for name, n in given.items() if number(n)})

def add(models, name, more):
    """Add a Counter to a model's."""
    models[name] = Counter(models.get(name)) + more

def summed(*parts):
    """The sum over all models of all `parts` (model -> counts)."""
    return sum((Counter(n) for part in parts for n in part.values()), Counter())

def new_account(ping, local, at):
    """An account as its first event opens it. Rows older than `since` are history; so
    is what stands before the last prompt up to `prompt_by`, and, where a session's end
    is all we are told, what stands before an earlier end: none of it is ever billed.

    models: model -> counts, read and not yet charged; reported: charged. charged:
    event_id -> its usage fields. owed: path and ping of a SessionLost not yet queued.
    files: transcript -> [inode, offset, {message's id: counts}, {tool call's id: 1}].
    """
    first = ping.get("event")
    start = ping.get("source") if first == "SessionStart" else None
    known = start in ("startup", "clear", "resume", "fork") or first == "SessionEnd"
    names = ("project", "machine", "session_id", "cwd_hash", "transcript_path_hash")
    return {"since": at if start in ("resume", "fork") else 0, "first": first,
            "prompt_by": 0 if known else at, "whole": True, "ended": False,
            "last_at": at, "transcript": local["transcript"], "files": {}, "owed": [],
            "model": "", "branch": "", "prompts": [], "reported": {}, "charged": {},
            "ledger": {}, "cost": 0, **copy_of(NOTHING),
            "identity": {name: ping[name] for name in names if name in ping}}

def make_history(account, at):
    """Forget what was counted: it stands before the account's beginning, `at`."""
    account["whole"] = account["whole"] and not account["models"]
    account.update(copy_of(NOTHING), since=at)

def count_message(account, row, relative, at):
    """Count an assistant row: its message's tokens, once, and its tool calls."""
    message, session = row["message"], row.get("sessionId")
    key, model = message["id"], message["model"]
    if not identifier(key) or not GATE["model"](model) or row.get("isApiErrorMessage"):
        return  # <synthetic>: the client's own words
    if row.get("requestSessionId", session) != session or 0 < at < account["since"]:
        account["whole"] = False  # copied from another session, or history
        return
    main = not relative and not row.get("isSidechain")
    if main and account["ledger"]:  # it is older than this message: not the last word
        if account["first"] == "SessionEnd" and not account["charged"]:
            make_history(account, at)
        account["ledger"] = {}
    # Every content block of a message has a row, each with the message's whole usage;
    # in older ones the output may be partial.
    seen, calls = account["files"][relative][2:]
    before, after = Counter(seen.get(key)), counts_of(message["usage"], 0)
    if key not in seen or after["output_tokens"] > before["output_tokens"]:
        seen[key] = after
        counts = account["models"][model] = Counter(account["models"].get(model))
        counts.update(after)
        counts.subtract(before)
    content = message.get("content")
    for block in content if isinstance(content, list) else ():
        call, name = block.get("id"), block.get("name")
        if block.get("type") == "tool_use" and identifier(call) and call not in calls:
            calls[call] = 1
            account["tool_calls"] += 1
            if identifier(name):
                account["tools"][name] = account["tools"].get(name, 0) + 1
    if main:
        branch = row.get("gitBranch") if account.get("git") else ""
        account.update(model=model, branch=branch if GATE["git_branch"](branch) else "")
    if message.get("stop_reason") not in (None, "tool_use") and (main or relative):
        account["final"].append(relative)

def count_user(account, row, relative, at, until):
    """Count a user row: failed tools; or note that a prompt begins a turn. False when
    that turn is a later event's."""
    content = row["message"].get("content")
    blocks = content if isinstance(content, list) else ()
    if any(block.get("type") == "tool_result" for block in blocks):
        if not 0 < at < account["since"]:
            failed = [block for block in blocks if block.get("is_error") is True]
            account["tool_failures"] += len(failed)
    elif not (relative or row.get("isSidechain") or row.get("isMeta")
              or row.get("isCompactSummary")):
        if at > until - LAG_S:
            return False
        if 0 < at <= account["prompt_by"]:
            make_history(account, at)
        account["prompts"] = account["prompts"][-7:] + [at]
    return True

def count_line(account, line, relative, until):
    """Count one line; False when it was stamped after `until`, seconds since 1970."""
    try:
        row, at = decode_json(line.decode("utf-8", "replace")), 0
        if "timestamp" in row:
            stamp = row["timestamp"].replace("Z", "+00:00")
            at = datetime.fromisoformat(stamp).timestamp()
        if at > until:
            return False
        if row["type"] == "assistant":
            count_message(account, row, relative, at)
        elif row["type"] == "user":
            return count_user(account, row, relative, at, until)
        elif row["type"] == "cost-state" and not relative:
            used = row["modelUsage"].items()
            models = {name: counts_of(n, 1) for name, n in used if GATE["model"](name)}
            cost = row["totalCostUSD"] if number(row["totalCostUSD"]) else 0
            account["ledger"] = {"models": models, "cost": cost}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        pass  # an internal format that may change: what is not understood, not counted
    return True

def read_transcript(account, relative, until, ends):
    """Count what a transcript has gained. relative: "" for the session's own, else a
    subagent's, below it. OSError or ValueError: there is no more to be had now."""
    path = account["transcript"]
    fd = open_regular(os.path.join(path[:-6], relative) if relative else path)
    try:
        found = os.fstat(fd)
        new = [found.st_ino, 0, {}, {}]
        position = account["files"].setdefault(relative, new)
        inode, offset = position[:2]
        position[:2] = found.st_ino, found.st_size
        if inode != found.st_ino or offset > found.st_size:
            return  # replaced or shrunk: the ledger may settle it, nothing counts twice
        if found.st_size - offset > UNREAD_MAX_BYTES:
            raise ValueError("too much")
        position[1] = offset
        for end, line in lines_that_matter(fd, offset):
            if line and not count_line(account, line, relative, until):
                return
            position[1] = end
            if time.monotonic() > ends:
                raise TimeoutError("the rest is for the next ping")
    finally:
        os.close(fd)

def read_session(account, until, ends):
    """Count what a session's transcripts have gained; whether there is one to read. Its
    own comes first: it tells where history ends."""
    top = account["transcript"][:-6]  # without .jsonl
    files = [os.path.relpath(os.path.join(directory, name), top)
             for directory, _, names in os.walk(os.path.join(top, "subagents"))
             for name in names if name.startswith("agent-") and name.endswith(".jsonl")]
    for relative in [""] + sorted(files):
        try:
            read_transcript(account, relative, until, ends)
        except (OSError, ValueError):
            if not relative:
                return False
    return True

def settle(account):
    """Add what the client's ledger has more (compaction and titles are calls of no
    row); give the cost not yet reported. It is sums that are compared: the ledger may
    name a model otherwise."""
    ledger, models, reported = account["ledger"], account["models"], account["reported"]
    missing = summed(ledger["models"]) - summed(models, reported)
    for name, counts in ledger["models"].items():
        known = Counter(models.get(name)) + Counter(reported.get(name))
        more = (Counter(counts) - known) & missing
        missing = missing - more
        add(models, name, more)
    cost = max(0, round(ledger["cost"] - account["cost"], 10))
    account["cost"] = max(ledger["cost"], account["cost"])
    return cost

def named(counts):
    """Counts as a ping has them: all of COUNTS, and the total."""
    found = {name: counts[name] for name in COUNTS}
    return dict(found, total_tokens=sum(found.values()) - found["reasoning_tokens"])

def take_usage(account):
    """The usage fields of what was read since the last charge; now it is reported."""
    models = {name: +Counter(counts) for name, counts in account["models"].items()}
    models = {name: counts for name, counts in models.items() if counts}
    for name, counts in models.items():
        add(account["reported"], name, counts)
    fields = dict(named(summed(models)), tool_calls=account["tool_calls"],
                  tool_failures=account["tool_failures"])
    if models and list(models) != [account["model"]]:
        fields["models"] = {name: named(counts) for name, counts in models.items()}
    if account["tools"]:
        used = sorted(account["tools"].items(), key=lambda pair: (-pair[1], pair[0]))
        fields["tools"] = dict(used[:20])
    if account["model"]:
        fields["model"] = account["model"]
    account.update(copy_of(NOTHING))
    for position in account["files"].values():
        position[2:] = [dict(list(ids.items())[-SEEN_MAX:]) for ids in position[2:]]
    return fields

def usage_of(account, ping, local, at, ends, patient):
    """Usage fields since the session's last such ping; {}: no transcript can be read.
    Waits, if `patient`, until the event is LAG_S old for what the client writes after
    it: a turn's last message, a session's ledger."""
    event, top, awaited = ping["event"], account["transcript"][:-6], ""
    account["git"] = local.get("git")
    if event == "SubagentStop":
        awaited = os.path.relpath(local.get("agent_transcript") or top, top)
    expects = event in ("Stop", "SessionEnd") or (
        event == "SubagentStop" and os.path.isfile(os.path.join(top, awaited)))
    until = float("inf") if event == "SessionEnd" else at + LAG_S
    give_up = min(time.monotonic() + min(LAG_S, at + LAG_S - time.time()), ends)
    while True:
        if not read_session(account, until, min(time.monotonic() + READ_S, ends)):
            return {}
        came = awaited in account["final"]
        if event == "SessionEnd":
            came = account["ledger"]
        if came or not (expects and patient) or time.monotonic() >= give_up:
            break
        time.sleep(POLL_S)
    fields = {} if came or not expects else {"usage_complete": False}
    if event == "SessionEnd" and came and account["whole"]:
        fields["cost_usd"] = settle(account)
    fields.update(take_usage(account))
    begun = [prompt for prompt in account["prompts"] if 0 < prompt <= at]
    if event == "Stop" and begun:
        fields["duration_ms"] = round((at - begun[-1]) * 1000)
    if local.get("git"):
        fields["git_branch"] = account["branch"]
    return fields

def load_account(path):
    """An account, or None when there is none."""
    try:
        return read_object(path, 8 << 20)
    except (OSError, ValueError):
        return None

def charge(base, path, record, ends, foreground):
    """The ping of an outbox file (`record` at `path`), with its usage in it.

    The order makes it exact: the account is committed together with which ping was
    charged what; then the ping's file is rewritten; then it may be sent. Whoever comes
    after a crash finds the same charge, so that it is neither lost nor doubled.
    """
    ping, local, at = record["ping"], record["local"], ns_of(path) / 1e9
    name = sha256_hex(ping["session_id"].encode())[:16] + ".json"
    account_path = os.path.join(base, "accounts", name)
    found = load_account(account_path)
    account = found or new_account(ping, local, at)
    if ping.get("event") not in USAGE_EVENTS:
        if found and not found["ended"]:
            os.utime(account_path)  # not quiet, for the sweep
        else:
            write_object(account_path, dict(account, ended=False))
        return ping
    event_id = ping["event_id"]
    if event_id not in account["charged"]:
        patient = not foreground or ping.get("reason") != "clear"  # it awaits our end
        fields = usage_of(account, ping, local, at, ends, patient)
        charged = dict(list(account["charged"].items())[-15:], **{event_id: fields})
        account.update(charged=charged, ended=ping["event"] == "SessionEnd", last_at=at)
        write_object(account_path, account)
    ping = gate(dict(ping, **account["charged"][event_id]))
    try:
        write_object(path, {"ping": ping, "local": {}})
    except OSError:
        pass  # a full disk: a repeat finds the same charge in the account
    return ping

def report_lost(base, path, ends):
    """One ping of what a session had used that ended without a word (kill -9, power).
    path: its account's; committed first, so that a crash cannot make two pings."""
    account = load_account(path) or {"ended": True, "owed": []}
    if not account["owed"] and not account["ended"]:
        read_session(account, float("inf"), min(time.monotonic() + READ_S, ends))
        if summed(account["models"]):
            fields = dict(account["identity"], **take_usage(account))
            mark = fields["session_id"] + encode_json(account["reported"])
            ns, event_id = int(account["last_at"] * 1e9), sha256_hex(mark.encode())[:32]
            fields.update(ORIGIN, event="SessionLost", event_id=event_id,
                          timestamp=iso_time(ns), status="success",
                          usage_complete=False)
            account["owed"] = [ping_file(base, ns, event_id), gate(fields)]
            write_object(path, account)
    if account["owed"]:
        write_object(account["owed"][0], {"ping": account["owed"][1], "local": {}})
        write_object(path, dict(account, owed=[]))

# -- Delivery: one request, one verdict ------------------------------------------------

DELIVERED, RETRY, HOLD, REFUSED = "delivered", "retry", "hold", "refused"
HOLD_STATUS = (401, 402, 403, 404, 405, 407, 410, 451)  # the URL or token, not the ping
RETRY_STATUS = (408, 425, 429)

def verdict_of(status):
    """What becomes of a ping that was answered with this HTTP status."""
    if 200 <= status < 300:
        return DELIVERED
    if 300 <= status < 400 or status in HOLD_STATUS:
        return HOLD
    return REFUSED if 400 <= status < 500 and status not in RETRY_STATUS else RETRY

def retry_after_s(text, now):
    """Seconds that a Retry-After asks for (RFC 9110, 10.2.3), 0 when it is unusable."""
    text = (text or "").strip()
    try:
        digits = text.isascii() and text.isdigit()
        wait = float(text[:20]) if digits else timegm(parsedate(text)) - now
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), RETRY_AFTER_MAX_S)

def backoff_s(verdict, failures, retry_after, now):
    """Seconds to wait after the n-th failure in a row: jittered, for machines must not
    come back together, and not before the server asked for."""
    power, asked = 2.0 ** min(failures, 20), retry_after_s(retry_after, now)
    wait = uniform(2, min(BACKOFF_MAX_S, 2 * power))
    if verdict == HOLD:
        wait = min(HOLD_S[0] * power / 2, HOLD_S[1])
    if asked:
        wait = max(wait, min(asked + uniform(0, 1 + asked / 10), RETRY_AFTER_MAX_S))
    return wait

def make_opener(url):
    """An opener that can do no more than it must: no redirects (urllib would turn the
    POST into a GET without a body, and call its 200 a success), no other schemes; the
    environment's proxies, but never for loopback; TLS verified."""
    opener = request.OpenerDirector()
    opener.addheaders = []
    opener.add_handler(request.HTTPHandler())
    if url.lower().startswith("https") and hasattr(request, "HTTPSHandler"):
        from ssl import create_default_context
        opener.add_handler(request.HTTPSHandler(context=create_default_context()))
    if not loopback(split_url(url)[1]):
        opener.add_handler(request.ProxyHandler(request.getproxies_environment()))
    return opener

def post(opener, url, headers, body, timeout_s):
    """POST bytes: (verdict, what for a person, Retry-After or None, whether the ping
    itself may be the cause). Of the response one buffer is read, at most."""
    try:
        post_it = request.Request(url, body, headers, method="POST")
        with opener.open(post_it, timeout=timeout_s) as response:
            status, asked = response.status, response.headers.get("Retry-After")
        return verdict_of(status), "HTTP %d" % status, asked, status >= 500
    except (AttributeError, TypeError):  # no response: no handler took an https URL
        return HOLD, "this Python was built without TLS", None, False
    except (OSError, HTTPException, ValueError) as error:
        # urllib wraps what fails up to the end of sending, and nothing after that.
        connected = not isinstance(error, URLError)
        cause = error if connected else error.reason
    ssl, what = sys.modules.get("ssl"), getattr(cause, "strerror", "")
    what = "timed out" if "timed out" in str(cause) else what or type(cause).__name__
    if ssl and isinstance(cause, ssl.SSLError) and "EOF" not in str(cause):
        return HOLD, "TLS: %s" % (getattr(cause, "reason", "") or what), None, False
    proxy = str(cause).partition("Tunnel connection failed: ")[2][:3]
    if proxy.isdigit():  # a proxy's status says nothing against the ping
        verdict = RETRY if verdict_of(int(proxy)) == RETRY else HOLD
        return verdict, "proxy: HTTP " + proxy, None, False
    return RETRY, str(what), None, connected

# -- Sender: empties one outbox --------------------------------------------------------

class Sender:
    """Delivers from one outbox, detached or inside a hook. ends: monotonic, when this
    life is over. tell: a function of a line of text, for a person."""

    status = 0  # the exit status when the watchdog ends the process

    def __init__(self, destination, base, settings, ends, tell):
        self.destination, self.base, self.settings = destination, base, settings
        self.ends, self.tell, self.tried = ends, tell, set()  # names that failed
        self.state, self.opener = load_state(base), make_opener(destination.url)
        self.deadline = float("inf")  # monotonic, of the request on its way
        threading.Thread(target=self.watch, daemon=True).start()

    def path(self, *names):
        """Path of something in the destination's directory."""
        return os.path.join(self.base, *names)

    def save(self, **changes):
        """Write state.json; a disk that refuses must not stop delivery."""
        self.state.update(changes)
        try:
            write_object(self.path("state.json"), self.state)
        except OSError:
            pass

    def log(self, text):
        """Add a line to sender.log: no payload, no URL, no token."""
        path, flags = self.path("sender.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND
        line = "%s %d %s\n" % (iso_time(time.time_ns()), os.getpid(), text)
        try:
            fd = os.open(path, flags | NO_FOLLOW, 0o600)
            os.write(fd, line.encode("utf-8", "replace"))
            if os.fstat(fd).st_size > LOG_MAX_BYTES:
                os.replace(path, path + ".1")
            os.close(fd)
        except OSError:
            pass

    def waiting(self):
        """Names of the pings in the outbox, oldest first. What is no ping goes aside,
        what was never finished is removed."""
        names = []
        for name in os.listdir(self.path("outbox")):
            if name[:20].isdigit() and name[20:21] == "-" and name.endswith(".json"):
                names.append(name)
            elif not name.startswith("."):
                self.set_aside(name, "no ping")
            elif quiet_s(self.path("outbox", name)) > UNFINISHED_S:
                remove(self.path("outbox", name))
        return sorted(names)

    def lose(self, name, reason):
        """Count a ping that will not be delivered, and the tokens charged to it."""
        losses = self.state["losses"]
        losses[reason] = losses.get(reason, 0) + 1
        try:
            ping = gate(read_object(self.path("outbox", name), PING_MAX_BYTES)["ping"])
            losses["tokens"] = losses.get("tokens", 0) + int(ping["total_tokens"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.save()

    def set_aside(self, name, reason):
        """Move what can never be delivered out of the others' way."""
        self.lose(name, reason)
        self.tried.add(name)
        try:
            os.makedirs(self.path("refused"), 0o700, exist_ok=True)
            os.replace(self.path("outbox", name), self.path("refused", name))
            for old in sorted(os.listdir(self.path("refused")))[:-REFUSED_MAX_PINGS]:
                remove(self.path("refused", old))
        except OSError:
            remove(self.path("outbox", name))

    def read_ping(self, name):
        """The ping to send, its usage charged; None when there is none under `name`."""
        path = self.path("outbox", name)
        try:
            record = read_object(path, PING_MAX_BYTES)
            record["ping"] = gate(record["ping"])
            if "event_id" not in record["ping"]:
                raise ValueError("no ping")
        except OSError:  # gone, or an I/O error: perhaps another time
            self.tried.add(name)
            return None
        except (ValueError, KeyError, TypeError):
            self.set_aside(name, "no ping")
            return None
        try:
            if record.get("local"):
                hurry = self.settings.foreground
                return charge(self.base, path, record, self.ends, hurry)
        except Exception as error:  # whatever a transcript holds, the ping goes
            self.log("usage left out: " + type(error).__name__)
        return record["ping"]

    def attempt(self, ping):
        """POST one ping; gives what `post` gives."""
        url, limit = self.destination.url, self.settings.timeout_s
        if self.settings.foreground:
            limit = max(0.1, min(limit, (self.ends - time.monotonic()) / DEADLINE))
        headers = {"Idempotency-Key": ping["event_id"], **self.destination.headers}
        begun = time.monotonic()
        self.deadline = begun + DEADLINE * limit
        for body in self.destination.bodies(ping):
            answer = post(self.opener, url, headers, body, limit)
            if answer[0] != DELIVERED:
                break
        self.deadline = float("inf")
        took_ms, name = (time.monotonic() - begun) * 1000, ping.get("event")
        self.tell("%s %s to %s: %s in %d ms, %s" % (
            name, ping["event_id"], origin(url), answer[1], took_ms, answer[0]))
        return answer

    def watch(self):
        """The watchdog, a thread. When a request overstays (a hung resolver, a dripping
        response), count that and end the process: nothing else ends the request."""
        while time.monotonic() < self.deadline:
            time.sleep(POLL_S)
        self.fail((RETRY, "no whole answer in time", None))
        self.tell("no whole answer in time; the ping waits")
        os._exit(self.status)

    def fail(self, answer):
        """Count a pass that failed, and start a back-off."""
        (verdict, what, asked), now, state = answer[:3], time.time(), self.state
        again = state["problem"].get("verdict") == verdict
        failures = min(state["failures"] + 1, 64) if again else 1
        wait = backoff_s(verdict, failures, asked, now)
        self.save(failures=failures, set_at=now, not_before=now + wait, recovering=True,
                  problem={"verdict": verdict, "what": what, "at": now})
        self.log("%s: %s, next try in %d s" % (verdict, what, wait))

    def one_pass(self):
        """Try every ping once, oldest first, until an answer says that now is no time.
        The lock must be held."""
        self.state = state = load_state(self.base)
        names, sent, suspect = self.waiting(), 0, None
        for name in names[:-OUTBOX_MAX_PINGS]:
            self.lose(name, "outbox full")
            remove(self.path("outbox", name))
        for name in set(state["charges"]).difference(names):
            del state["charges"][name]
        for name in names[-OUTBOX_MAX_PINGS:]:
            if time.monotonic() >= self.ends:
                break
            if state["recovering"] and sent == PROBE_PINGS:
                self.pace()
                break
            ping = self.read_ping(name) if name not in self.tried else None
            if not ping:
                continue
            answer, sent = self.attempt(ping), sent + 1
            if answer[0] == DELIVERED:
                self.accepted(name, suspect)
                suspect = None
            elif answer[0] == REFUSED:
                state["failures"] = 0
                self.set_aside(name, "refused: " + answer[1])
            else:
                self.tried.add(name)
                if suspect or not answer[3]:
                    suspect = None
                    self.fail(answer)
                    break
                suspect = name, answer  # its fault or the server's? The next ping tells
        else:
            state["recovering"] = False
        if suspect:
            self.fail(suspect[1])
        if sent:
            self.save()
            self.log("sent %d of %d, last: %s" % (sent, len(names), answer[1]))

    def accepted(self, name, suspect):
        """The tracker has the ping: only now its file goes. A suspect is charged."""
        if not remove(self.path("outbox", name)):
            self.tried.add(name)
        self.state.update(failures=0, not_before=0, delivered_at=time.time())
        if suspect:
            name, charges = suspect[0], self.state["charges"]
            charges[name] = charges.get(name, 0) + 1
            age_s = time.time() - ns_of(name) / 1e9
            if charges[name] >= POISON_CHARGES and age_s > POISON_AGE_S:
                self.set_aside(name, "always fails")

    def pace(self):
        """After an outage all machines come back at once: the rest of ours can wait."""
        now = time.time()
        self.state.update(set_at=now, not_before=now + uniform(*PACE_S))

    def live(self, lock):
        """Pass after pass. In between the lock is given back, and then the outbox
        listed once more: a hook that found the lock busy counts on that."""
        while lock is not None:
            if not backoff_left_s(load_state(self.base), time.time()):
                self.one_pass()
                self.sweep()
            drop_lock(lock)
            wait = backoff_left_s(load_state(self.base), time.time())
            if time.monotonic() + wait >= self.ends:
                return
            if wait:
                time.sleep(wait)
                self.tried.clear()
            elif all(name in self.tried or not name[:20].isdigit()
                     for name in os.listdir(self.path("outbox"))):
                return
            lock = take_lock(self.base)

    def sweep(self):
        """Once a day: report sessions that were lost, drop accounts long unused. While
        pings wait, a session is not lost."""
        now, accounts = time.time(), self.path("accounts")
        if 0 <= now - self.state["swept_at"] < QUIET_S or self.waiting():
            return
        for name in os.listdir(accounts) if os.path.isdir(accounts) else ():
            path = os.path.join(accounts, name)
            try:
                if quiet_s(path) > QUIET_S and name[0] != ".":
                    report_lost(self.base, path, self.ends)
                if quiet_s(path) > (UNFINISHED_S if name[0] == "." else ACCOUNT_MAX_S):
                    remove(path)
            except Exception as error:  # a broken account must not hide the others
                self.log("an account is broken: " + type(error).__name__)
        self.save(swept_at=now)

def run_sender(lock, settings):
    """The detached process. lock: the inherited descriptor, -1 when there is none."""
    os.umask(0o077)
    if os.name == "posix":
        os.nice(5)  # the session's own work comes first
        if os.getsid(0) != os.getpid():
            os.setsid()
    destination = find_destination(settings)
    base = destination.directory(settings.state_dir)
    need_sound(settings.state_dir, base)
    try:
        ours = os.path.samestat(os.fstat(lock), os.lstat(os.path.join(base, "lock")))
    except OSError:
        ours = False
    ends = time.monotonic() + LIFE_S
    sender = Sender(destination, base, settings, ends, lambda _: None)
    try:
        sender.live(lock if ours else take_lock(base))
    except FileNotFoundError:
        pass  # the state was removed meanwhile
    except Exception as error:  # back off, or every hook would start one that fails
        sender.fail((RETRY, "internal error: " + type(error).__name__, None))

def deliver_here(destination, base, settings, ends, tell):
    """One pass inside the hook, over by `ends` (monotonic), waits included."""
    state, lock = load_state(base), None
    left = backoff_left_s(state, time.time())
    if left:
        tell("a back-off lasts %d s more (%s); this attempt ignores it" % (
            left, state["problem"].get("what", "after an outage")))
        if not settings.debug:
            return
    while lock is None:
        lock = take_lock(base)
        if lock is None and time.monotonic() >= ends:
            raise Skipped("a sender is at work and has the ping; see sender.log")
        time.sleep(POLL_S if lock is None else 0)
    sender = Sender(destination, base, settings, ends, tell)
    sender.one_pass()
    sender.sweep()
    drop_lock(lock)
'''

# ======================================================================================
# Nothing below this line runs inside Claude Code: the commands, run by a person.
# ======================================================================================

COMMANDS = r'''
import argparse, contextlib, copy, difflib, glob, http.server, json, queue, re, shlex
import shutil, subprocess, tempfile, threading, urllib.request
SCRIPT, SELF = "telemhq_ping.py", os.path.realpath(__file__)
CONFIG = absolute(os.environ.get("CLAUDE_CONFIG_DIR") or "~/.claude") or ""
INSTALLED = os.path.join(CONFIG, "hooks", SCRIPT)
EVENTS = {"Stop": None, "StopFailure": None, "SessionEnd": None}  # event: matcher
TOOL_EVENTS = {"PostToolUse": "Bash|Edit|MultiEdit|Write", "PostToolUseFailure": None}
NAMED = re.compile(r"(?s)(.*[\s/\\'\"])?telemhq_ping\.py([\s'\"]|$)")  # in a command
ALONE = re.compile(  # [trap '' TERM;] [PYTHON [-OPTION ...]] SCRIPT [|| true]
    r"(trap '' TERM; )?({0}\bpy[\w.-]*['\"]?(\s+-\w+)*\s+)?{0}\btelemhq_ping\.py"
    r"['\"]?(\s*\|\|\s*true)?$".format(r"('[^']*|\"[^\"]*|[^\s;&|='\"]*)"))
WAIT_OLD_S, ARRIVES_S = 300.0, 30.0  # doctor: a ping waits too long; demo: it is lost
REASONS = {  # what an answer means, by what it begins with
    "HTTP 40": "the token in TELEMHQ_PING_URL is wrong or was revoked",
    "HTTP 41": "the tracker was deleted",
    "HTTP 3": "it has moved; put its new address into TELEMHQ_PING_URL",
    "HTTP": "it has a problem of its own; pings are kept and sent later",
    "TLS": "the certificate is not trusted; SSL_CERT_FILE can name a company's own",
    "": "is TELEMHQ_PING_URL right, is there a network, or a proxy for HTTPS_PROXY?"}

def settings_file(project):
    """The settings file of the user, or of a project (a directory, OSError if not)."""
    if not project:
        return os.path.join(CONFIG, "settings.json")
    os.listdir(project)
    return os.path.join(os.path.abspath(project), ".claude", "settings.local.json")

def read_settings(path):
    """(bytes, dict) of a settings file, (None, {}) when there is none."""
    try:
        raw = read_file(os.path.realpath(path), 1 << 24)
        text = raw.decode("utf-8-sig")
        found = json.loads(text) if text.strip() else {}
        hooks_in(found, NAMED), found.get("env", {}).items()  # of the form we rely on
        return raw, found
    except FileNotFoundError:
        return None, {}
    except Exception as error:
        raise Skipped("%s is left as it is, no settings: %r" % (path, error)) from None

def effective_settings():
    """Settings as a hook has them here; `files`: {path: dict} of the settings files."""
    environ, files, problems = dict(os.environ), {}, []
    here = os.path.join(os.getcwd(), ".claude", "settings")
    for path in (settings_file(None), here + ".json", here + ".local.json",
                 "/Library/Application Support/ClaudeCode/managed-settings.json",
                 "/etc/claude-code/managed-settings.json"):
        try:
            files[path] = read_settings(path)[1]
            environ.update((k, str(v)) for k, v in files[path].get("env", {}).items())
        except Skipped as error:
            problems.append(str(error))
    settings = Settings(environ)
    settings.files, settings.ignored = files, problems + settings.ignored
    return settings

def hooks_in(found, pattern):
    """[(event, group, hook)] of settings (dict) whose commands match."""
    return [(event, group, hook) for event, groups in found.get("hooks", {}).items()
            for group in groups[:] for hook in group["hooks"]
            if pattern.match(hook.get("command", ""))]

def with_ours(found, url, tools):
    """Settings (dict) with our hooks, and with the ping URL unless it is None."""
    found = copy.deepcopy(found)
    if url is not None:
        found.setdefault("env", {})["TELEMHQ_PING_URL"] = url
    for event, matcher in dict(EVENTS, **(TOOL_EVENTS if tools else {})).items():
        if event not in [event for event, _, _ in hooks_in(found, NAMED)]:
            group = {"matcher": matcher} if matcher else {}
            group["hooks"] = [{"type": "command", "command": SCRIPT, "timeout": 10}]
            found.setdefault("hooks", {}).setdefault(event, []).append(group)
    for event, _, hook in hooks_in(found, ALONE):
        hook.update(command=hook_command(event), timeout=10)
    return found

def without_ours(found):
    """Settings (dict) without our hooks, the ping URL, and hooks and env left empty."""
    found = copy.deepcopy(found)
    found.get("env", {}).pop("TELEMHQ_PING_URL", None)
    for event, group, hook in hooks_in(found, ALONE):
        group["hooks"].remove(hook)
    hooks = {event: [group for group in groups if group["hooks"]]
             for event, groups in found.get("hooks", {}).items()}
    found = dict(found, hooks={event: hooks[event] for event in hooks if hooks[event]})
    return {k: v for k, v in found.items() if v or k not in ("hooks", "env")}

def hook_command(event):
    """The command for settings, with an interpreter that works from any shell."""
    python = os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])
    if sys.prefix == sys.base_prefix or not os.path.exists(python):
        python = sys.executable  # no virtual environment, which comes and goes
    trap = "trap '' TERM; " if event == "StopFailure" else ""  # README, More events
    return trap + "%s -I -S %s || true" % (shlex.quote(python), shlex.quote(INSTALLED))

def as_bytes(raw, found):
    """Settings (dict) as a file, in the indent and line ends of `raw` (bytes)."""
    indent = (re.findall(rb"\n([ \t]+)\"", raw) or [b"  "])[0].decode()
    text = json.dumps(found, indent=indent, ensure_ascii=False) + "\n"
    text = text.replace("\n", "\r\n") if b"\r\n" in raw else text
    return text.encode("utf-8", "backslashreplace")  # half of a character: "\ud83d"

def show_diff(path, *settings):
    """Print how settings (two dicts) will change, hiding the path of every URL."""
    texts = [re.sub(
        r"(TELEMHQ_PING_URL\W+|\b(?=\w+://))(\w+://[\w.:\[\]-]+(?=[/?#\"']))?[^\"'\n]*",
        r"\1\2/...", as_bytes(b"", found).decode()).splitlines() for found in settings]
    print("\n".join(difflib.unified_diff(*texts, path, path, lineterm="")))

def write_settings(path, new, old):
    """Write a settings file (bytes), and `old` (bytes, or None) into a backup."""
    real = os.path.realpath(path)
    mode = stat.S_IMODE(os.stat(real).st_mode) if os.path.exists(real) else 0o600
    if not mode & 0o200:
        raise Skipped("%s is left as it is: it is read-only" % path)
    backup = real + time.strftime(".%Y%m%d-%H%M%S.bak")
    if old is not None and not os.path.exists(backup):
        write_file(backup, old)
    write_file(real, new)
    os.chmod(real, mode)

def install(options):
    """Copy this file to ~/.claude/hooks, register it in settings.json."""
    path, settings = settings_file(options.project), effective_settings()
    raw, before = read_settings(path)
    if options.url is not None:
        find_destination(Settings(dict(settings.environ, TELEMHQ_PING_URL=options.url)))
    after = with_ours(before, options.url, options.tools)
    show_diff(path, before, after)
    if not options.dry_run:
        if before != after:
            write_settings(path, as_bytes(raw or b"", after), raw)
        target, script = os.path.realpath(INSTALLED), read_file(SELF, 1 << 24)
        if not os.path.exists(target) or read_file(target, 1 << 24) != script:
            write_file(target, script)
        os.chmod(target, 0o700)
        print("Installed: %s names %s." % (path, INSTALLED))
    if not (options.url or settings.url):
        print("Now export TELEMHQ_PING_URL, or run install again with --url.")

def restore(path):
    """Take ours out of a settings file; the backups go: they may hold ping URLs."""
    raw, before = read_settings(path)
    after, real = without_ours(before), os.path.realpath(path)
    if not hooks_in(before, ALONE) and "TELEMHQ_PING_URL" not in before.get("env", {}):
        return
    new = as_bytes(raw, after) if after else None  # None: install has made it
    backups = sorted(glob.glob(glob.escape(real) + ".[0-9]*-[0-9]*.bak"))
    for backup in backups:
        old, found = read_settings(backup)
        if not hooks_in(found, ALONE) and without_ours(found) == without_ours(before):
            new, after = old, found  # nothing else has changed: to the byte as it was
    show_diff(path, before, after)
    write_settings(path, new or b"", None)
    for name in backups + [real] * (new is None):
        os.unlink(name)

def uninstall(options):
    """The inverse of install: settings as before, script and state removed."""
    path, state_dir = settings_file(options.project), effective_settings().state_dir
    waiting = sum(map(len, outboxes(state_dir).values()))
    if waiting and not options.yes:
        print("%d pings wait and would be lost; `flush` sends them." % waiting)
        if not sys.stdin.isatty() or input("Remove them? [y/N] ").lower() != "y":
            raise Skipped("nothing was changed; with --yes they are removed")
    restore(path)
    for name in (path, settings_file(None)):
        if hooks_in(read_settings(name)[1], NAMED):
            print("%s still names the script: it stays, with its state." % name)
            return
    for base in outboxes(state_dir):
        shutil.rmtree(base)
    remove(INSTALLED)
    for directory in (state_dir or CONFIG, CONFIG + "/hooks", CONFIG, path + "/.."):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(os.path.normpath(directory))
    print("Removed.")

def outboxes(state_dir):
    """{a destination's directory: names of the pings that wait there, oldest first}."""
    ping, found = "/outbox/" + "[0-9]" * 20 + "-*.json", glob.escape(state_dir or "")
    return {base: sorted(map(os.path.basename, glob.glob(glob.escape(base) + ping)))
            for base in sorted(glob.glob(found + "/*-" + "[0-9a-f]" * 12))}

def flush(options):
    """One pass of a sender now, in spite of a back-off."""
    settings, told = effective_settings(), []
    destination, Sender.status = find_destination(settings), 1
    base = destination.directory(settings.state_dir or "")
    need_sound(settings.state_dir, base)
    if options.adopt:
        adopt(settings.state_dir, base)
    if outboxes(settings.state_dir).get(base):
        settings.debug = True  # ignores the back-off
        deliver_here(destination, base, settings, time.monotonic() + LIFE_S,
                     lambda text: told.append(text) or print(text, flush=True))
    left = len(outboxes(settings.state_dir).get(base, ()))
    print("%d delivered, %d left." % (sum(t.endswith(DELIVERED) for t in told), left))
    return 1 if left else 0

def adopt(state_dir, base):
    """Move what waits for former URLs, and their accounts, to the present one's."""
    for former in set(outboxes(state_dir)) - {base}:
        need_sound(state_dir, former)
        lock = take_lock(former)
        if lock is None:
            raise Skipped("a sender is at work in %s; try again in a minute" % former)
        for path in glob.glob(glob.escape(former) + "/[ao]*/*.json"):
            target = path.replace(former, base, 1)
            if not os.path.exists(target):
                os.renames(path, target)
        drop_lock(lock)

def doctor(options):
    """Check all that lies between an event and the tracker; say what to do."""
    settings = effective_settings()
    lines = *check_hooks(settings), *check_url(settings), *check_state(settings)
    for good, text, remedy in lines:
        print("✓ " + text if good else "✗ %s: %s" % (text, remedy))
    return 0 if all(good for good, _, _ in lines) else 1

def check_hooks(settings):
    """Yields whether each event runs the script, and whether that works."""
    where, commands = {}, set()
    for path, found in settings.files.items():
        if found.get("disableAllHooks"):
            yield False, "settings", "disableAllHooks in %s turns them off" % path
        if any(found["enabledPlugins"][name] for name in found.get("enabledPlugins", ())
               if name.startswith("telemhq-ping@")):
            where.update(dict.fromkeys(EVENTS, "the plugin"))
        where.update((event, path) for event, _, _ in hooks_in(found, NAMED))
        commands.update(hook["command"] for _, _, hook in hooks_in(found, ALONE))
    for event in dict.fromkeys((*EVENTS, *where)):
        yield event in where, "hook for %s, in %s" % (
            event, where.get(event, "no settings file")), "run `install`"
    for command in sorted(commands):
        plain = command.replace("|| true", "").strip()
        status, said = subprocess.getstatusoutput(plain + " --version </dev/null")
        problem = {127: "the interpreter is missing", 2: "the script is missing"}.get(
            status, "it is not version %s, or not Python 3.8" % __version__)
        yield (said.endswith(" " + __version__), "script and interpreter: " + plain,
               problem + "; run `install`")

def in_words(what):
    """What an answer of `post` means, and what to do."""
    said = "the tracker answered " + what[5:] if what[:5] == "HTTP " else what
    return "%s: %s" % (said, next(REASONS[r] for r in REASONS if what.startswith(r)))

def check_url(settings):
    """Yields whether the ping URL is usable and answers; a GET records no run."""
    yield from ((False, "settings", problem) for problem in settings.ignored)
    try:
        url = find_destination(settings).url
    except Skipped as error:
        yield False, "ping URL", str(error)
        return
    get = argparse.Namespace(open=lambda request, timeout: make_opener(url).open(
        urllib.request.Request(url, headers=request.headers), timeout=timeout))
    verdict, what, _, _ = post(get, url, telemhq(url).headers, None, settings.timeout_s)
    good = verdict in (DELIVERED, REFUSED) or what == "HTTP 405"  # 405: it takes POSTs
    yield good, "tracker at %s answers a GET" % origin(url), in_words(what)

def check_state(settings):
    """Yields whether all is well on disk: what waits, what failed, what was lost."""
    state_dir, now = settings.state_dir or "", time.time()
    base = os.path.join(state_dir, "none")
    try:
        with contextlib.suppress(Skipped):
            base = find_destination(settings).directory(state_dir)
        need_sound(state_dir, base)
    except Skipped as error:
        yield False, "state directory", str(error)
        return
    yield True, "state directory " + state_dir, ""
    waiting, state = outboxes(state_dir), load_state(base)
    names = waiting.pop(base, ())
    age, left = now - ns_of(names[0]) / 1e9 if names else 0, backoff_left_s(state, now)
    waits = "%d pings wait, the oldest for %d min" % (len(names), age / 60)
    yield not names or not left and age < WAIT_OLD_S, waits, "`flush` sends them now"
    why = in_words(str(state["problem"].get("what", ""))) if state["failures"] else (
        "after an outage the pings are sent bit by bit")
    yield not left, "back-off: %s" % ("%d s more" % left if left else "none"), why
    yield True, "last delivery: " + (iso_time(int(state["delivered_at"] * 1e9)) if (
        state["delivered_at"]) else "none"), ""
    for reason, count in sorted(state["losses"].items()):
        yield False, "lost: %d, %s" % (count, reason), "see refused/ in " + base
    for names in filter(None, waiting.values()):
        yield False, "%d pings wait for a URL no longer configured" % len(names), (
            "`flush --adopt` sends them to the present one")

SAMPLES = {  # what Claude Code sends with some events, beside what it always sends
    "SessionStart": {"source": "startup", "model": "claude-opus-5-5"},
    "PostToolUse": {"tool_name": "Bash", "tool_input": {"command": "cat notes"},
                    "tool_response": {"stdout": "hunter2"}, "duration_ms": 25},
    "PostToolUseFailure": {"tool_name": "Bash", "tool_input": {"command": "./deploy"},
                           "error": "Exit code 3\nno /home/you/acme/key"},
    "Stop": {"last_assistant_message": "It is hunter2.", "stop_hook_active": False},
    "StopFailure": {"error": "rate_limit", "last_assistant_message": "API Error: 429"},
    "SessionEnd": {"reason": "prompt_input_exit"}}

def sample(name, transcript):
    """A sample event (dict)."""
    return dict(SAMPLES[name], hook_event_name=name, transcript_path=transcript,
                session_id="5e551011-0000-4000-8000-0000000000", cwd="/home/you/acme")

def preview(options):
    """Print the ping that an event (stdin, or a sample) makes, without its tokens."""
    sampled = options.event and encode_json(sample(options.event, "/x.jsonl")).encode()
    raw, settings = sampled or sys.stdin.buffer.read(), effective_settings()
    event = decode_json(raw.decode("utf-8", "replace").lstrip("\ufeff"))
    if not isinstance(event, dict):
        raise Skipped("that is no event")
    ping = make_ping(
        event, settings, project_of(event, settings), time.time_ns(), len(raw))
    print(json.dumps(ping, indent=2))

class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes pings and says 200. arrived: (when, ping)s."""
    arrived, log_message = queue.Queue(), lambda *_: None

    def do_POST(self):
        """One ping."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.arrived.put((time.monotonic(), json.loads(body)))

def receive(port):
    """Start a receiver on loopback; its server."""
    server = http.server.HTTPServer(("127.0.0.1", port), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server

def show(name, transcript, environ):
    """Run the hook as Claude Code does; what stays home, what arrives, and when."""
    event, begun = sample(name, transcript), time.monotonic()
    subprocess.run([sys.executable, "-I", "-S", SELF],
                   input=encode_json(event).encode(), env=environ, check=True)
    took = time.monotonic() - begun
    at, ping = Receiver.arrived.get(timeout=ARRIVES_S)
    home = [key + (" (its hash went)" if key + "_hash" in ping else
                   " (its length went)" if key + "_chars" in ping else "")
            for key in event if event[key] not in (name, ping.get(key))]
    print("%s: %d ms in the hook, delivered after %d ms" % (
        name, took * 1000, (at - begun) * 1000))
    print("  stayed home: " + ", ".join(home))
    print("  left: " + json.dumps(ping, indent=2).replace("\n", "\n  ") + "\n")

def demo(options):
    """Show, on this machine only, what leaves of each event; then an outage."""
    with tempfile.TemporaryDirectory() as directory:
        server, state_dir = receive(0), os.path.join(directory, "state")
        port, transcript = server.server_address[1], os.path.join(directory, "x.jsonl")
        environ = {"HOME": directory, "TELEMHQ_STATE_DIR": state_dir,
                   "TELEMHQ_PING_URL": "http://127.0.0.1:%d/ping/demo" % port}
        model, now = SAMPLES["SessionStart"]["model"], iso_time(time.time_ns())
        usage, ledger = (dict.fromkeys(names, 400) for names in zip(*COUNTS.values()))
        rows = ({"type": "assistant", "timestamp": now, "message": {
            "id": "msg_01", "model": model, "stop_reason": "end_turn", "usage": usage}},
            {"type": "cost-state", "totalCostUSD": 0.02, "modelUsage": {model: ledger}})
        write_file(transcript, "".join(encode_json(r) + "\n" for r in rows).encode())
        for name in SAMPLES:
            show(name, transcript, environ)
        print("Now the receiver goes away; a second after the next event it is back.\n")
        server.shutdown()
        server.server_close()
        threading.Timer(1, receive, [port]).start()
        show("Stop", transcript, environ)
        print("Nothing was lost.")
        while take_lock(list(outboxes(state_dir))[0]) is None:
            time.sleep(POLL_S)
        time.sleep(0.2)  # the sender ends after it has given the lock back

def main(arguments):
    """Run a command; the exit status."""
    if sys.version_info < (3, 8) or not CONFIG:
        sys.exit(SCRIPT + " needs Python 3.8 or newer, and a home directory")
    os.umask(0o077)
    sys.stdout.reconfigure(errors="replace")  # a terminal that knows no ✓
    parser = argparse.ArgumentParser(
        prog=SCRIPT, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--version", action="version", version=SCRIPT[:-3] + " " + __version__)
    commands = parser.add_subparsers(metavar="COMMAND")
    for run, names in ((demo, ""), (preview, "event"), (doctor, ""),
                       (flush, "--adopt"), (uninstall, "--project --yes"),
                       (install, "--url --tools --project --dry-run")):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run)
        for name in names.split():
            command.add_argument(name, **{
                "event": {"nargs": "?", "choices": list(SAMPLES)}, "--url": {},
                "--project": {"metavar": "DIR"}}.get(name, {"action": "store_true"}))
    options = parser.parse_args(arguments or ["--help"])
    try:
        return options.run(options) or 0
    except (Skipped, OSError, EOFError, ValueError, queue.Empty) as error:
        print("%s: %s" % (SCRIPT, error or "a ping did not arrive"), file=sys.stderr)
        return 1
'''

if __name__ == "__main__":
    if sys.argv[1:2] == ["--sender"] or not (sys.argv[1:] or os.isatty(0)):
        run_for_claude_code(sys.argv[1:])
    bring(SENDER)
    bring(COMMANDS)
    sys.exit(main(sys.argv[1:]))
