"""What the tests share: the script as Claude Code runs it, and a real receiver."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import http.client
import http.server
import importlib
import json
import os
import pathlib
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    import email.message
    import types

    from typing_extensions import Self  # mypy knows it; no test needs it

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "telemhq_ping.py"
FIXTURES = ROOT / "tests" / "fixtures"
# A PATH as small as can be, in which the Python that runs the tests is `python3`.
SMALL_PATH = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
TOKEN = "SECRETTOKEN0123456789"  # the credential in every test URL: must never leak
TAKEN: dict[int, socket.socket] = {}  # the ports of dead URLs


def command(python: str = sys.executable, directory: object = ROOT) -> str:
    """The settings' command for a script in `directory`, without its second thought."""
    start = "import telemhq_ping as t; t.hook()"
    return f"cd '{directory}' && exec {python} -ESc '{start}'"


def hook_command() -> list[str]:
    """The same as the arguments of a process."""
    return ["/bin/sh", "-c", command()]


def script_command(*arguments: str, python: str = sys.executable) -> list[str]:
    """The command of a person who runs the script."""
    return [python, str(SCRIPT), *arguments]


def sender_command(*arguments: str, python: str = sys.executable) -> list[str]:
    """The command of a sender, with its arguments."""
    start = "import sys; sys.path.insert(0, sys.argv[1]); "
    start += "__import__(sys.argv[2]).sender()"
    return [python, "-ISc", start, str(ROOT), SCRIPT.stem, *arguments]


def event(name: str, **changes: Any) -> dict[str, Any]:
    """The real event `tests/fixtures/events/<name>.json`, with some fields changed."""
    text = (FIXTURES / "events" / (name + ".json")).read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    found.update(changes)
    return found


class Request:
    """One request as the receiver saw it; `at` is monotonic seconds."""

    def __init__(
        self, method: str, path: str, headers: email.message.Message, body: bytes
    ) -> None:
        self.method, self.path, self.headers, self.body = method, path, headers, body
        self.at = time.monotonic()

    @property
    def ping(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Receiver:
    """An HTTP(S) server on 127.0.0.1 that keeps every request that came whole.

    `answer` is a status, or a function Request -> status or (status, headers, body).
    It may sleep or raise. `most_at_once` is the most requests ever in flight.
    """

    def __init__(
        self, answer: Any = 200, port: int = 0, tls: tuple[str, str] | None = None
    ) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.most_at_once = 0
        in_flight, guard, outer = [0], threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 30

            def serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if len(body) < length:
                    return  # its sender was killed: no server accepts it
                request = Request(self.command, self.path, self.headers, body)
                with guard:
                    in_flight[0] += 1
                    outer.most_at_once = max(outer.most_at_once, in_flight[0])
                    outer.requests.append(request)
                try:
                    given = outer.answer
                    found = given(request) if callable(given) else given
                finally:
                    with guard:
                        in_flight[0] -= 1
                known = found if isinstance(found, tuple) else (found, {}, b"")
                status, headers, body = known
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            do_POST = do_GET = do_HEAD = do_PUT = do_CONNECT = serve  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Nothing: the tests read `requests`."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, request_queue_size, block_on_close = True, 256, False

            def handle_error(self, *_: object) -> None:
                """Clients that go away are part of the tests."""

        if port in TAKEN:
            TAKEN.pop(port).close()
        self.server = Server(("127.0.0.1", port), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.server.socket = context.wrap_socket(
                self.server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.server.socket.settimeout(5)  # for a connection that is gone again
        self.port = self.server.server_address[1]
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}/ping/{TOKEN}"
        serve = functools.partial(self.server.serve_forever, 0.02)
        threading.Thread(target=serve, daemon=True).start()

    @property
    def pings(self) -> list[dict[str, Any]]:
        """Every ping received so far, in order, repeats included."""
        return [request.ping for request in list(self.requests)]

    def wait_for(self, count: int, timeout: float = 15) -> list[dict[str, Any]]:
        """Wait until `count` requests have arrived; give the pings."""
        wait_until(lambda: len(self.requests) >= count, timeout)
        return self.pings

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_until(
    true: Callable[[], object], timeout: float = 15, every: float = 0.02
) -> None:
    """Wait until `true()` holds; AssertionError when it does not in time."""
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"not within {timeout:g} s"
        time.sleep(every)


def dead_url() -> str:
    """A loopback URL where nothing listens before a receiver is made for its port."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    port = bound.getsockname()[1]
    TAKEN[port] = bound  # or it might be given to another test
    return f"http://127.0.0.1:{port}/ping/{TOKEN}"


class Home:
    """A HOME of its own: environment, state directory, and the processes in it."""

    def __init__(self, path: str | pathlib.Path) -> None:
        if os.name != "posix":
            import pytest

            pytest.skip("hooks are run by sh in it; see test_windows.py")
        self.path = pathlib.Path(path)
        self.made: dict[str | None, tuple[pathlib.Path, Any]] = {}  # by `place`
        self.project = self.path / "acme" / "api"
        self.project.mkdir(parents=True)
        self.state = self.path / ".claude" / "telemhq"

    def env(self, url: str | None = None, **more: object) -> dict[str, str]:
        """A clean environment, as small as Claude Code's users may have."""
        found = {"HOME": str(self.path), "PATH": SMALL_PATH, "LANG": "C.UTF-8"}
        if url is not None:
            found["TELEMHQ_PING_URL"] = url
        found.update({name: str(value) for name, value in more.items()})
        return found

    def hook(
        self,
        sent: Any,
        url: str | None = None,
        python: str = sys.executable,
        imported: bool = True,
        **more: Any,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run the script as Claude Code does: sh -c, pipes, its own session.

        `sent` is an event or the bytes on stdin. imported: as the settings' command
        does, or as a script, as in TelemHQ's own settings block.
        """
        as_script = f"exec {python} -I -S '{SCRIPT}'"
        return self.shell(command(python) if imported else as_script, sent, url, **more)

    def shell(
        self,
        line: str,
        sent: Any = b"",
        url: str | None = None,
        cwd: object = None,
        timeout: float = 30,
        **more: object,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run any shell command as Claude Code runs a hook's."""
        return subprocess.run(
            ["/bin/sh", "-c", line],
            input=sent if isinstance(sent, bytes) else json.dumps(sent).encode(),
            capture_output=True,
            env=self.env(url, **more),
            cwd=str(cwd or self.project),
            start_new_session=True,
            timeout=timeout,
        )

    def start(self, url: str | None, **more: Any) -> subprocess.Popen[bytes]:
        """Start the hook in a session of its own; its stdin is a pipe."""
        more.update(stdin=subprocess.PIPE, cwd=str(self.project))
        env = self.env(url)
        return subprocess.Popen(hook_command(), env=env, start_new_session=True, **more)

    def destination(self) -> pathlib.Path:
        """The one destination's directory."""
        (found,) = [path for path in self.state.iterdir() if path.is_dir()]
        return found

    def waiting(self) -> list[pathlib.Path]:
        """The paths of the pings in every outbox, oldest first."""
        return sorted(self.state.glob("*/outbox/[0-9]*.json"), key=lambda p: p.name)

    def state_json(self) -> dict[str, Any]:
        """state.json of the one destination, {} when there is none yet."""
        try:
            text = (self.destination() / "state.json").read_text("utf-8")
            found: dict[str, Any] = json.loads(text)
        except (OSError, ValueError):
            return {}
        return found

    def set_state(self, **values: object) -> None:
        """Write state.json of the one destination: the given values and no other."""
        (self.destination() / "state.json").write_text(json.dumps(values))

    def processes(self) -> list[int]:
        """The ids of this script's live processes that belong to this HOME (Linux)."""
        found, mark = [], b"HOME=" + os.fsencode(str(self.path))
        for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                line = pathlib.Path("/proc", entry, "cmdline").read_bytes()
                if b"telemhq_ping" not in line:
                    continue
                environ = pathlib.Path("/proc", entry, "environ").read_bytes()
                if mark in environ.split(b"\0"):
                    found.append(int(entry))
        return found

    def quiet(self, timeout: float = 15) -> None:
        """Wait until no process of this HOME runs any more; one that is just starting
        has no command line yet, but a lock."""
        locks = self.state.glob
        wait_until(
            lambda: not self.processes() and all(map(is_free, locks("*/lock"))), timeout
        )

    def end(self) -> None:
        """End every process of this HOME, by id."""
        ended = self.processes()
        for pid in ended:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, ended)))


def is_alive(pid: int) -> bool:
    """Whether a process still has its files, and with them its locks. (On Linux, one
    not yet waited for has none.)"""
    try:
        if os.path.isdir("/proc/self"):
            stat = pathlib.Path("/proc", str(pid), "stat").read_bytes()
            return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")
        os.kill(pid, 0)
        return True
    except OSError:
        return False


def is_free(lock: str | pathlib.Path) -> bool:
    """Whether nobody holds a file's flock."""
    import fcntl

    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def load_script() -> types.ModuleType:
    """The script as a module, for tables over its pure functions."""
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(SCRIPT.stem)


# Run before the script in `patched`: wrap a function of a module, kill the process.
PRELUDE = """
import fcntl, os, signal, sys, time

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def wrap(module, name, before=None, after=None):
    real = getattr(module, name)
    def wrapped(*args, **kwargs):
        if before:
            before(*args)
        found = real(*args, **kwargs)
        if after:
            after(*args)
        return found
    setattr(module, name, wrapped)

if not hasattr(os, "posix_spawn"):  # PyPy: a sender's start has that name all the same
    def posix_spawn(path, command, environ, **_):
        from subprocess import DEVNULL, Popen
        null = {"stdin": DEVNULL, "stdout": DEVNULL, "stderr": DEVNULL}
        new = {"close_fds": False, "start_new_session": True}
        return Popen(command, env=environ, **null, **new).pid
    os.posix_spawn, os.POSIX_SPAWN_OPEN = posix_spawn, 0
"""
# Imports the script, as the settings' command does, after the patch.
RUNNER = """
import sys
directory, patch, entry = sys.argv[1:4]
sys.argv[1:4] = [directory, "telemhq_ping"]
exec(patch)
sys.path.insert(0, directory)
import telemhq_ping
getattr(telemhq_ping, entry)()
"""
# A sender that would sleep through a back-off, or for the next event, has ended.
ONE_LIFE = """
import _thread
main_thread, real_sleep = _thread.get_ident(), time.sleep
def sleep(seconds):
    if _thread.get_ident() == main_thread and seconds > 0.09:
        os._exit(0)
    real_sleep(seconds)
time.sleep = sleep
"""


def patched(
    home: Home,
    patch: str,
    *arguments: str,
    url: str | None = None,
    sent: Any = b"",
    timeout: float = 60,
    **env: object,
) -> subprocess.CompletedProcess[bytes]:
    """Run a hook, or a sender with its arguments, with the Python source `patch` run
    before it, in its process.

    That is how the tests fake the clock, the resolver and the disk, and how they kill
    at a named point: nothing in the script knows of it. `patch` may use PRELUDE.
    """
    entry = "sender" if arguments else "hook"
    isolated = [sys.executable, "-I", "-S", "-c"]
    return subprocess.run(
        [*isolated, RUNNER, str(ROOT), PRELUDE + patch, entry, *arguments],
        input=sent if isinstance(sent, bytes) else json.dumps(sent).encode(),
        capture_output=True,
        env=home.env(url, **env),
        cwd=str(home.project),
        start_new_session=True,
        timeout=timeout,
    )


def run_sender(
    home: Home, url: str | None, patch: str = ONE_LIFE, **env: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run a detached sender that takes the lock itself, till it first sleeps."""
    name = home.destination().name
    return patched(home, patch, "detached", "-1", name, url=url, **env)


def only_enqueue(
    home: Home, url: str | None, sent: Any = None, **env: Any
) -> pathlib.Path:
    """Run a hook that starts no sender; the path of the ping it put into the outbox."""
    before = set(home.waiting())
    sent = event("Stop") if sent is None else sent
    patched(home, "os.posix_spawn = lambda *a, **k: 0", url=url, sent=sent, **env)
    (found,) = set(home.waiting()) - before
    return found


def place(home: Home, url: str | None, count: int = 1, age_s: float = 0.0) -> list[str]:
    """Put pings into the outbox by hand, as hooks would have `age_s` ago, oldest first.

    Gives their event_ids. They are copies of one that a hook made.
    """
    if url not in home.made:
        path = only_enqueue(home, url)
        home.made[url] = path.parent, json.loads(path.read_text("utf-8"))["ping"]
        path.unlink()
    outbox, model = home.made[url]
    session = hashlib.sha256(model["session_id"].encode()).hexdigest()[:16]
    found, ns = [], time.time_ns() - int(age_s * 1e9) - count
    for n in range(count):
        ping = dict(model, event_id=os.urandom(16).hex())
        name = f"{ns + n:020d}-{ping['event']}-{session}-{ping['event_id']}.json"
        (outbox / name).write_text(json.dumps({"ping": ping, "local": {}}))
        found.append(ping["event_id"])
    return found


class Wire(socketserver.ThreadingTCPServer):
    """A TCP server on 127.0.0.1 that speaks no HTTP by itself.

    `talk(connection)` runs in a thread for each connection, which is closed after it.
    `connections` counts them; `over` is set when the test is.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, talk: Callable[[socket.socket], object]) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.talk, self.connections, self.over = talk, 0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/ping/{TOKEN}"
        serve = functools.partial(self.serve_forever, 0.02)
        threading.Thread(target=serve, daemon=True).start()

    def verify_request(self, *_: object) -> bool:
        self.connections += 1
        return True

    def finish_request(self, connection: Any, _: object) -> None:
        with contextlib.suppress(OSError):
            self.talk(connection)

    def shutdown_request(self, connection: Any) -> None:
        self.close_request(connection)  # `talk` may have chosen how: by a reset

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


def read_request(connection: socket.socket) -> bytes:
    """Read one POST off a connection; its body."""
    with connection.makefile("rb") as file:
        file.readline()
        headers = http.client.parse_headers(file)
        return file.read(int(headers.get("Content-Length", 0)))


@functools.lru_cache
def all_pythons() -> dict[int, str]:
    """{minor: path} of Pythons: this one, and CPythons of pyenv and the PATH."""
    found = {sys.version_info[1]: sys.executable}
    ask = "import sys; print(sys.implementation.name, sys.version_info[1])"
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    paths = sorted(glob.glob(f"{pyenv}/versions/3.*/bin/python3"))
    for path in (*paths, *(shutil.which(f"python3.{minor}") for minor in range(6, 20))):
        done = path and subprocess.run([path, "-ISc", ask], capture_output=True)
        name, _, minor = (done.stdout.decode() if done else "").partition(" ")
        if path and name == "cpython":
            found.setdefault(int(minor), path)
    return found


def pythons(least: int = 8, below: int = 100) -> list[str]:
    """Paths of the Pythons 3.N found, `least` <= N < `below`, one of each, in order."""
    found = all_pythons()
    return [found[minor] for minor in sorted(found) if least <= minor < below]


def need_cpython(python: str) -> None:
    """Skip where `python` (one of `pythons`) has no private modules of CPython."""
    import pytest

    if python == sys.executable and sys.implementation.name != "cpython":
        pytest.skip("what CPython's private modules save")
