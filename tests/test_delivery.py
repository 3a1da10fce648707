"""One request, one verdict: statuses, back-off, deadlines, redirects, TLS, proxies."""

from __future__ import annotations

import email.utils
import io
import random
import socket
import subprocess
import time
from types import ModuleType
from typing import Any, Callable

import pytest

from scenes import NO_SENDER, ids, put
from support import (
    FIXTURES,
    ONE_LIFE,
    TOKEN,
    Home,
    Receiver,
    Wire,
    dead_url,
    event,
    only_enqueue,
    patched,
    place,
    pythons,
    read_request,
    run_sender,
    sender_command,
    wait_until,
)

DAY_S = 86400.0
NOW = 1_800_000_000.0
TLS = FIXTURES / "tls"
CA: dict[str, Any] = {"SSL_CERT_FILE": TLS / "ca.pem"}


def expected_verdict(status: int) -> str:
    """DESIGN.md's sentence, written once more."""
    if status in (408, 425, 429):
        return "not now"
    if status == 409 or status >= 500:
        return "retry"
    if status in (401, 402, 403, 404, 405, 407, 410, 451) or 300 <= status <= 399:
        return "hold"
    return "delivered" if status < 300 else "refused"


def assert_kept(home: Home, verdict: str, count: int = 1) -> None:
    """Everything still waits, and a back-off of that verdict stands."""
    assert len(home.waiting()) == count
    state = home.state_json()
    assert state["verdict"] == verdict
    assert (state["failures"], state["losses"]) == (1, {})
    least, most = (450, 900) if verdict in ("hold", "refused") else (2, 4)
    assert least <= state["not_before"] - state["set_at"] <= most


# -- Verdicts --------------------------------------------------------------------------


@pytest.mark.fault(13)
def test_every_status_has_its_verdict(script: ModuleType) -> None:
    """Each status from 200 to 599 has the verdict that DESIGN.md gives it."""
    for status in range(200, 600):
        assert script.verdict_of(status) == expected_verdict(status), status


@pytest.mark.parametrize("status", [408, 425, 429, 409, 500, 599, 304, 401, 400, 422])
def test_what_all_pings_are_answered(home: Home, status: int) -> None:
    """Where nothing is delivered all is kept, nobody is charged, and a back-off stands:
    after one request, if the tracker said "not now", else after three, the third of
    them of the newest of another event."""
    with Receiver(status) as receiver:
        kinds = ["PostToolUse", "PostToolUse", "PostToolUse", "Stop", "PostToolUse"]
        found = put(home, receiver.url, kinds)
        run_sender(home, receiver.url)
        verdict = expected_verdict(status)
        asked = [found[0], found[1], found[3]][: 1 if verdict == "not now" else 3]
        assert ids(receiver) == asked
    assert_kept(home, verdict, 5)
    assert not any(home.state_json()["suspects"].values())


@pytest.mark.parametrize("status", [204, 299])
def test_a_2xx_delivers(home: Home, status: int) -> None:
    """One POST of the ping as the hook made it, its event_id the Idempotency-Key; the
    file goes, nothing is counted as lost."""
    with Receiver(status) as receiver:
        home.hook(event("Stop"), receiver.url)
        (ping,) = receiver.wait_for(1)
        (request,) = receiver.requests
        home.quiet()
    assert (request.method, request.path) == ("POST", "/ping/" + TOKEN)
    assert request.headers["Idempotency-Key"] == ping["event_id"]
    assert request.headers["Content-Type"] == "application/json"
    allowed = "host content-type content-length idempotency-key user-agent connection"
    names = {name.lower() for name in request.headers}
    assert names <= {*allowed.split(), "accept-encoding"}
    assert home.waiting() == []
    state = home.state_json()
    assert (state["failures"], state["losses"]) == (0, {})


# -- Back-off --------------------------------------------------------------------------


def date(at: float) -> str:
    """An HTTP date (RFC 9110's preferred form)."""
    return email.utils.formatdate(at, usegmt=True)


NONE = (
    "0|-5|1.5|1e3|0x10|soon|inf|nan|Mon, 99 Foo 2026 99:99:99 GMT|\u0661\u0662|\u00b2|"
)
RETRY_AFTER = {
    **dict.fromkeys(NONE.split("|"), 0),
    date(NOW - 60): 0,
    "1": 1,
    " 120 ": 120,
    "86401": DAY_S,
    "1" + "0" * 20: DAY_S,
    "9" * 5000: DAY_S,
    date(NOW + 300): 300,
    "Friday, 15-Jan-27 08:05:00 GMT": 300,  # RFC 850
    time.asctime(time.gmtime(NOW + 300)): 300,  # names no zone: GMT all the same
    date(NOW + 10 * DAY_S): DAY_S,
    "Fri, 31 Dec 9999 23:59:59 GMT": DAY_S,
}


@pytest.mark.fault(15)
@pytest.mark.skipif(not hasattr(time, "tzset"), reason="zones of POSIX")
def test_retry_after(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After is understood as seconds or date, wherever the machine is, and
    clamped to 24 h."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    found = {text: script.retry_after_s(text, NOW) for text in RETRY_AFTER}
    monkeypatch.undo()
    time.tzset()
    assert found == pytest.approx(RETRY_AFTER)


BACKOFFS = [
    ("retry", 1, 2, 4),
    ("retry", 3, 2, 16),
    ("not now", 8, 2, 512),
    ("retry", 10**6, 2, 900),
    ("hold", 1, 450, 900),
    ("refused", 2, 900, 1800),
    ("hold", 10**6, 10800, 21600),
]


@pytest.mark.fault(15)
def test_backoff(script: ModuleType) -> None:
    """After the n-th failure in a row uniform between 2 s and 2*2^n s, 900 s at most;
    a hold waits 15 min, doubling to 6 h, jittered down to half. Never before a
    Retry-After is over, nor a day later; a fleet comes back over half of its time."""
    random.seed(7)
    for verdict, failures, least, most in BACKOFFS:
        waits = [script.backoff_s(verdict, failures) for _ in range(2000)]
        width = (most - least) / 50
        assert least <= min(waits) <= least + width
        assert most - width <= max(waits) <= most
        assert sum(waits) / 2000 == pytest.approx((least + most) / 2, rel=0.05)
    for asked in (1, 120, 7000, 80000, DAY_S):
        waits = [script.backoff_s("not now", 1, asked) for _ in range(2000)]
        most = min(int(1.5 * asked), int(DAY_S))
        assert asked <= min(waits)
        assert max(4, most) * 0.98 <= max(waits) <= max(4, most)


# -- No answer -------------------------------------------------------------------------


def say(
    answer: bytes, more: bytes = b"", pause_s: float = 0
) -> Callable[[socket.socket], None]:
    """Take the request, then say these bytes; then more for ever, or close."""

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer)
        while more:
            connection.sendall(more)
            time.sleep(pause_s)

    return talk


@pytest.mark.fault(16)
def test_a_dead_server(home: Home) -> None:
    """Connection refused: all is kept, nobody is suspected, a back-off stands."""
    url = dead_url()
    place(home, url, 3)
    run_sender(home, url)
    assert_kept(home, "not now", 3)
    assert home.state_json()["suspects"] == {}


NONSENSE = {
    "closed": b"",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "-20": b"HTTP/1.1 -20 OK\r\n\r\n",
    "101": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "600": b"HTTP/1.1 600 Beyond\r\n\r\n",
    "headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n",
}


@pytest.mark.fault(16)
@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
def test_no_answer_of_http(home: Home, answer: bytes) -> None:
    """A server that does not answer in HTTP: one attempt, the ping is kept."""
    with Wire(say(answer)) as wire:
        place(home, wire.url)
        run_sender(home, wire.url)
        assert wire.connections == 1
    assert_kept(home, "retry")


@pytest.mark.fault(16)
@pytest.mark.parametrize("scheme, verdict", [("http", "retry"), ("https", "not now")])
def test_a_silent_server(home: Home, scheme: str, verdict: str) -> None:
    """One that never answers costs TELEMHQ_TIMEOUT seconds (a second at least); in the
    handshake of TLS that is no connection, and no person's turn to mend something."""
    with Wire(lambda _: wire.over.wait(30)) as wire:
        url = wire.url.replace("http:", scheme + ":")
        place(home, url)
        begun = time.monotonic()
        run_sender(home, url, TELEMHQ_TIMEOUT="0.001")
        assert 1 <= time.monotonic() - begun < 10
        assert wire.connections == 1
    assert_kept(home, verdict)
    assert home.state_json()["problem"] == "timed out"


INTERIM = b"HTTP/1.1 102 A\r\n\r\nHTTP/1.1 100 B\r\n\r\nHTTP/1.1 103 C\r\nX: y\r\n\r\n"


@pytest.mark.fault(56)
@pytest.mark.parametrize("python", pythons())
@pytest.mark.parametrize("status", [b"200", b"503"])
def test_interim_answers_are_no_answer(home: Home, python: str, status: bytes) -> None:
    """What follows a 1xx is the answer; it takes one request. (http.client, whose
    insides this needs, is the same in all Pythons.)"""
    answer = b"HTTP/1.1 " + status + b" X\r\nContent-Length: 0\r\n\r\n"
    with Wire(say(INTERIM + answer)) as wire:
        place(home, wire.url)
        words = sender_command("detached", "-1", home.destination().name, python=python)
        sender = subprocess.Popen(words, env=home.env(wire.url))
        wait_until(home.state_json)
        sender.kill()  # it may sleep through a back-off
        sender.wait()
        assert wire.connections == 1
    assert len(home.waiting()) == (status == b"503")


# -- Deadlines -------------------------------------------------------------------------


ENDLESS = {
    "dripped headers": say(b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.1),
    "a flood of interim answers": say(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
}


@pytest.mark.fault(17)
@pytest.mark.parametrize("talk", ENDLESS.values(), ids=ENDLESS)
def test_an_answer_that_never_ends_is_cut_off(
    home: Home, talk: Callable[[socket.socket], None]
) -> None:
    """A request ends by 3 times the timeout; the failure counts, the ping is kept."""
    with Wire(talk) as wire:
        place(home, wire.url)
        begun = time.monotonic()
        run_sender(home, wire.url, TELEMHQ_TIMEOUT=1)
        assert time.monotonic() - begun < 8
        assert wire.connections == 1
    assert_kept(home, "retry")


@pytest.mark.fault(17)
def test_a_body_is_not_read(home: Home) -> None:
    """Status and headers decide: a 2xx with an endless body delivers at once, and of
    each answer a buffer is read."""
    counted = home.path / "read"
    count = f"""
import socket
class Counted(socket.SocketIO):
    def readinto(self, b):
        n = super().readinto(b)
        with open({str(counted)!r}, "a") as file:
            file.write("%d\\n" % n)
        return n
socket.SocketIO = Counted
"""
    with Wire(say(b"HTTP/1.1 200 OK\r\n\r\n", b"y" * 65536)) as wire:
        place(home, wire.url, 2)
        run_sender(home, wire.url, ONE_LIFE + count)
        assert wire.connections == 2
    assert home.waiting() == []
    # How large a buffer is, is the interpreter's choice.
    read = sum(map(int, counted.read_text().split()))
    assert 0 < read <= 2 * max(4096, io.DEFAULT_BUFFER_SIZE)


@pytest.mark.fault(18)
def test_a_resolver_that_hangs(home: Home, receiver: Receiver) -> None:
    """The watchdog counts a failure, ends the sender; the next hook does not wait."""
    place(home, receiver.url)
    hang = "import socket\nhang = time.sleep\n"
    hang += "socket.getaddrinfo = lambda *a, **k: hang(60)\n"
    begun = time.monotonic()
    run_sender(home, receiver.url, hang + ONE_LIFE, TELEMHQ_TIMEOUT=1)
    assert 2 < time.monotonic() - begun < 15
    assert_kept(home, "retry")
    kept = home.state_json()
    home.set_state(**dict(kept, not_before=kept["set_at"] + 600))
    home.hook(event("Stop"), receiver.url)
    assert (home.processes(), receiver.requests) == ([], [])
    assert len(home.waiting()) == 2


@pytest.mark.fault(82)
def test_a_name_with_dead_addresses(home: Home, receiver: Receiver) -> None:
    """Two IPv6 addresses where nobody answers stand before the good one: each costs a
    timeout, then the ping is delivered."""
    url = receiver.url.replace("127.0.0.1", "tracker.invalid")
    env: dict[str, Any] = {"TELEMHQ_ALLOW_HTTP": 1, "TELEMHQ_TIMEOUT": 1}
    only_enqueue(home, url, **env)
    dead = """
import socket
real_connect, hang = socket.socket.connect, time.sleep
def getaddrinfo(host, port, *_, **__):
    assert host == "tracker.invalid"
    dead = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("100::1", port, 0, 0))
    good = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
    return [dead, dead, good]
class Socket(socket.socket):
    def __init__(self, family=-1, *rest, **named):
        self.dead = family == socket.AF_INET6
        super().__init__(socket.AF_INET, *rest, **named)
    def connect(self, address):
        if self.dead:
            hang(self.gettimeout())
            raise socket.timeout("timed out")
        super().connect(address)
socket.getaddrinfo, socket.socket = getaddrinfo, Socket
"""
    run_sender(home, url, dead + ONE_LIFE, **env)
    assert len(receiver.requests) == 1
    assert home.waiting() == []


# -- Redirects, http -------------------------------------------------------------------


@pytest.mark.fault(14)
@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["", "/ping/other", "file:///etc/passwd"])
def test_a_redirect_is_not_followed(
    home: Home, receiver: Receiver, status: int, location: str
) -> None:
    """Wherever a 3xx points, nothing goes there; the ping is held."""
    location = location or receiver.url
    with Receiver(lambda _: (status, {"Location": location}, b"")) as first:
        place(home, first.url)
        run_sender(home, first.url)
        assert [request.method for request in first.requests] == ["POST"]
    assert receiver.requests == []
    assert_kept(home, "hold")


# A name that must not be looked up: nothing but loopback may be reached from a test.
NO_DNS = """
import socket
lookup = socket.getaddrinfo
def only_loopback(host, *args, **kwargs):
    if host not in ("127.0.0.1", "localhost"):
        raise socket.gaierror(-2, "Name or service not known")
    return lookup(host, *args, **kwargs)
socket.getaddrinfo = only_loopback
"""
ELSEWHERE = "http://tracker.invalid/ping/" + TOKEN


@pytest.mark.parametrize("allowed", ["0", "1"])
def test_http_to_another_machine(home: Home, receiver: Receiver, allowed: str) -> None:
    """http:// makes a ping only under TELEMHQ_ALLOW_HTTP=1; it goes by the proxy that
    the environment names."""
    env: dict[str, Any] = {"TELEMHQ_ALLOW_HTTP": allowed, "http_proxy": receiver.url}
    patched(home, NO_SENDER, url=ELSEWHERE, sent=event("Stop"), **env)
    assert len(home.waiting()) == int(allowed)
    if allowed == "1":
        run_sender(home, ELSEWHERE, ONE_LIFE + NO_DNS, **env)
    assert [request.path for request in receiver.requests] == [ELSEWHERE] * int(allowed)
    assert home.waiting() == []


# -- TLS -------------------------------------------------------------------------------


def served(name: str) -> Receiver:
    """A TLS receiver with one of the certificates."""
    return Receiver(tls=(str(TLS / (name + ".pem")), str(TLS / (name + ".key"))))


STRICT = """
import ssl
def strict(*args, **named):
    context = lenient(*args, **named)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context
lenient, ssl.create_default_context = ssl.create_default_context, strict
"""


@pytest.mark.fault(19, 87)
@pytest.mark.parametrize(
    "name, env, good",
    [
        ("loopback", CA, True),
        ("loopback", {"NODE_EXTRA_CA_CERTS": TLS / "ca.pem"}, True),
        ("loose", {"NODE_EXTRA_CA_CERTS": TLS / "loose-ca.pem"}, True),
        ("loose", {"SSL_CERT_FILE": TLS / "loose-ca.pem"}, True),
        ("self-signed", CA, False),
        ("loopback", {}, False),
        ("loopback", {"NODE_EXTRA_CA_CERTS": "/nowhere.pem"}, False),
        ("wrong-host", CA, False),
        ("self-signed", {"NODE_TLS_REJECT_UNAUTHORIZED": "0"}, False),
    ],
)
def test_tls_is_verified(
    home: Home, name: str, env: dict[str, Any], good: bool
) -> None:
    """By a known CA's signature: the system's, or the one with which Claude Code works
    there; whatever Python 3.13's strict flag says of that. Where a certificate does not
    prove who is there, all is held, and not a byte sent."""
    with served(name) as receiver:
        place(home, receiver.url, 3)
        run_sender(home, receiver.url, STRICT + ONE_LIFE, **env)
        assert len(receiver.requests) == 3 * good
    if not good:
        assert_kept(home, "hold", 3)
        assert home.state_json()["problem"].startswith("TLS")


@pytest.mark.fault(19)
@pytest.mark.parametrize("patch", ["", 'sys.modules["ssl"] = None\n'])
def test_https_never_falls_back_to_the_clear(home: Home, patch: str) -> None:
    """Where no TLS answers, or this Python has none, nothing of the ping or the token
    is on the wire; it is held."""
    said = []

    def talk(connection: socket.socket) -> None:
        said.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        said.append(connection.recv(65536))

    with Wire(talk) as wire:
        url = wire.url.replace("http:", "https:")
        (event_id,) = place(home, url)
        run_sender(home, url, patch + ONE_LIFE)
    assert b"".join(said)[:1] == (b"" if patch else b"\x16")  # a TLS handshake
    assert TOKEN.encode() not in b"".join(said)
    assert event_id.encode() not in b"".join(said)
    assert_kept(home, "hold")


# -- Proxies ---------------------------------------------------------------------------


@pytest.mark.fault(30)
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALHOST"])
def test_no_proxy_for_loopback(home: Home, scheme: str, host: str) -> None:
    """Whatever the environment says, a proxy never sees what goes to loopback."""
    names = [f"{kind}_proxy" for kind in ("http", "https", "all")]
    names += [name.upper() for name in names]
    with Receiver(502) as proxy, served("loopback") as tls, Receiver() as plain:
        receiver = tls if scheme == "https" else plain
        url = receiver.url.replace("127.0.0.1", host)
        place(home, url)
        run_sender(home, url, **dict.fromkeys(names, proxy.url), **CA)
        assert len(receiver.requests) == 1
        assert proxy.requests == []


@pytest.mark.fault(88)
@pytest.mark.parametrize(
    "scheme, status, verdict",
    [("http", 407, "hold"), ("http", 502, "not now"), ("socks5h", 502, "hold")],
)
def test_a_proxy_that_opens_no_tunnel(
    home: Home, scheme: str, status: int, verdict: str
) -> None:
    """A proxy's own answer to CONNECT is never the ping's fault: it is kept. A SOCKS
    proxy is not asked: a person must mend that."""
    url = ELSEWHERE.replace("http:", "https:")
    with Receiver(status) as proxy:
        env = {"HTTPS_PROXY": f"{scheme}://127.0.0.1:{proxy.port}"}
        only_enqueue(home, url, **env)
        run_sender(home, url, ONE_LIFE + NO_DNS, **env)
        for request in proxy.requests:
            assert (request.method, request.path) == ("CONNECT", "tracker.invalid:443")
            assert TOKEN not in str(request.headers)
        assert len(proxy.requests) == (scheme == "http")
    assert_kept(home, verdict)
