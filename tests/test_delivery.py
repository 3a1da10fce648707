"""One request, one verdict: statuses, back-off, deadlines, redirects, TLS, proxies."""

from __future__ import annotations

import email.utils
import io
import json
import random
import socket
import struct
import time
from types import ModuleType
from typing import Any, Callable

import pytest

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
    read_request,
    run_sender,
    wait_until,
)

DAY_S = 86400.0
NOW = 1_800_000_000.0
TLS = FIXTURES / "tls"
CA: dict[str, Any] = {"SSL_CERT_FILE": TLS / "ca.pem"}
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


def expected_verdict(status: int) -> str:
    """DESIGN.md's sentence, written once more."""
    if status in (408, 425, 429):
        return "not now"
    if status == 409 or status >= 500:
        return "retry"
    if status in (401, 402, 403, 404, 405, 407, 410, 451) or 300 <= status <= 399:
        return "hold"
    return "delivered" if status < 300 else "refused"


def problem(home: Home) -> str | None:
    """The verdict that state.json tells of the last problem."""
    found: dict[str, str] = home.state_json().get("problem") or {}
    return found.get("verdict")


def backoff(home: Home) -> float:
    """Seconds between the last failure and the next attempt, by state.json."""
    state = home.state_json()
    return float(state["not_before"] - state["set_at"])


def assert_kept(home: Home, verdict: str, count: int = 1) -> None:
    """Everything still waits, and a back-off of that verdict stands."""
    assert len(home.waiting()) == count
    assert problem(home) == verdict
    state = home.state_json()
    assert state["failures"] == 1
    assert state["not_before"] > time.time() - 30
    assert not state["losses"]
    if verdict in ("hold", "refused"):
        assert 450 <= backoff(home) <= 900
    else:
        assert 2 <= backoff(home) <= 4


# -- Verdicts -------------------------------------------------------------------------


@pytest.mark.parametrize("hundreds", [2, 3, 4, 5])
def test_every_status_has_its_verdict(script: ModuleType, hundreds: int) -> None:
    """Each status from 200 to 599 has the verdict that DESIGN.md gives it."""
    statuses = range(100 * hundreds, 100 * hundreds + 100)
    found = {status: script.verdict_of(status) for status in statuses}
    assert found == {status: expected_verdict(status) for status in statuses}


@pytest.mark.parametrize("status", [101, 199, 600, 999])
def test_a_status_of_no_class_is_no_answer(script: ModuleType, status: int) -> None:
    """A status outside of 200 to 599 is as no answer: the ping is tried again."""
    assert script.verdict_of(status) == "retry"


@pytest.mark.parametrize("status", [204, 299])
def test_a_2xx_delivers(home: Home, status: int) -> None:
    """Any 2xx is an acceptance: the ping's file goes, nothing is counted as lost."""
    with Receiver(status) as receiver:
        (event_id,) = place(home, receiver.url)
        run_sender(home, receiver.url)
        assert [ping["event_id"] for ping in receiver.pings] == [event_id]
    assert home.waiting() == []
    assert not home.state_json()["failures"]
    assert not home.state_json()["losses"]


@pytest.mark.parametrize(
    "status", [304, 401, 404, 451, 408, 429, 409, 500, 599, 400, 413, 499]
)
def test_a_status_that_may_not_be_the_pings_fault_keeps_it(
    home: Home, status: int
) -> None:
    """Whatever is no success: without a witness the ping stays, a back-off stands."""
    with Receiver(status) as receiver:
        place(home, receiver.url)
        run_sender(home, receiver.url)
        assert len(receiver.requests) == 1
    assert_kept(home, expected_verdict(status))


@pytest.mark.parametrize("status", [400, 413, 499])
def test_a_refused_ping_is_set_aside(home: Home, status: int) -> None:
    """Where another ping is delivered, any other 4xx sets the ping aside and counts it,
    without a back-off."""
    with Receiver() as receiver:
        event_id, _ = place(home, receiver.url, 2)
        receiver.answer = lambda r: status if r.ping["event_id"] == event_id else 200
        run_sender(home, receiver.url)
        run_sender(home, receiver.url)
        assert len(receiver.requests) == 2
    assert home.waiting() == []
    (aside,) = (home.destination() / "refused").iterdir()
    assert event_id in aside.name
    state = home.state_json()
    (loss,) = state["losses"].items()
    assert str(status) in loss[0]
    assert loss[1] == 1
    assert state["not_before"] <= time.time()


def test_what_a_request_looks_like(home: Home, receiver: Receiver) -> None:
    """A request is one POST of the ping, its event_id the Idempotency-Key."""
    home.hook(event("Stop"), receiver.url)
    (ping,) = receiver.wait_for(1)
    (request,) = receiver.requests
    assert (request.method, request.path) == ("POST", "/ping/" + TOKEN)
    assert request.headers["Idempotency-Key"] == ping["event_id"]
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Host"] == f"127.0.0.1:{receiver.port}"
    allowed = {
        "host",
        "content-type",
        "content-length",
        "idempotency-key",
        "user-agent",
        "connection",
        "accept-encoding",
    }
    assert {name.lower() for name in request.headers} <= allowed


def test_the_pings_file_is_sent_as_it_is(home: Home, receiver: Receiver) -> None:
    """The body is the ping that the hook wrote into the outbox, no more and no less."""
    path = only_enqueue(home, receiver.url, event("Stop", transcript_path=""))
    ping = json.loads(path.read_text())["ping"]
    run_sender(home, receiver.url)
    assert receiver.pings == [ping]


# -- Back-off -------------------------------------------------------------------------


def date(at: float) -> str:
    """An HTTP date (RFC 9110's preferred form)."""
    return email.utils.formatdate(at, usegmt=True)


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, 0),
        ("", 0),
        ("0", 0),
        ("1", 1),
        ("120", 120),
        (" 120 ", 120),
        ("86400", DAY_S),
        ("86401", DAY_S),
        ("1" + "0" * 20, DAY_S),
        ("9" * 5000, DAY_S),
        ("-5", 0),
        ("1.5", 0),
        ("1e3", 0),
        ("0x10", 0),
        ("\u0661\u0662\u0660", 0),  # Arabic digits: 120
        ("\u00b2", 0),  # a digit to str.isdigit, not to int
        ("soon", 0),
        ("inf", 0),
        ("nan", 0),
        (date(NOW - 60), 0),
        (date(NOW + 300), 300),
        (date(NOW + 10 * DAY_S), DAY_S),
        ("Fri, 31 Dec 9999 23:59:59 GMT", DAY_S),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0),
        ("Mon, 99 Foo 2026 99:99:99 GMT", 0),
        ("Fri, 15 Jan 2027 08:05:00 GMT", 300),
        ("Friday, 15-Jan-27 08:05:00 GMT", 300),  # RFC 850
    ],
)
def test_retry_after(script: ModuleType, text: str | None, expected: float) -> None:
    """Retry-After is understood as seconds or date, and clamped to 24 h."""
    assert script.retry_after_s(text, NOW) == pytest.approx(expected)


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="zones of POSIX")
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def test_retry_after_dates_are_gmt(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    """A date is GMT wherever the machine is, also in the form that names no zone."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for text in (date(NOW + 300), time.asctime(time.gmtime(NOW + 300))):
            assert script.retry_after_s(text, NOW) == pytest.approx(300), text
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "failures, most",
    [(1, 4), (2, 8), (3, 16), (8, 512), (9, 900), (64, 900), (10**6, 900)],
)
def test_backoff_after_a_retry(script: ModuleType, failures: int, most: int) -> None:
    """After the n-th failure in a row: between 2 s and 2*2^n s, 900 s at most."""
    random.seed(7)
    waits = [script.backoff_s("retry", failures, None, NOW) for _ in range(2000)]
    assert 2 <= min(waits) < 2 + most / 50
    assert most * 0.98 < max(waits) <= most
    assert sum(waits) / len(waits) == pytest.approx((2 + most) / 2, rel=0.05)


@pytest.mark.parametrize(
    "failures, most",
    [(1, 900), (2, 1800), (3, 3600), (5, 14400), (6, 21600), (10**6, 21600)],
)
@pytest.mark.parametrize("verdict", ["hold", "refused"])
def test_backoff_after_a_hold(
    script: ModuleType, verdict: str, failures: int, most: int
) -> None:
    """A hold waits 15 min, doubling to 6 h, jittered down to half."""
    random.seed(7)
    waits = [script.backoff_s(verdict, failures, None, NOW) for _ in range(2000)]
    assert most * 0.5 <= min(waits) < most * 0.51
    assert most * 0.99 < max(waits) <= most


@pytest.mark.parametrize("verdict", ["retry", "not now", "hold"])
@pytest.mark.parametrize("asked", [1, 120, 7000, 80000])
def test_backoff_honours_retry_after(
    script: ModuleType, verdict: str, asked: int
) -> None:
    """No attempt comes before what Retry-After asks for, and not two at one moment."""
    waits = [script.backoff_s(verdict, 1, str(asked), NOW) for _ in range(200)]
    assert asked <= min(waits)
    assert max(waits) <= max(asked * 1.1 + 1, 900 if verdict == "hold" else 4)
    if asked > 900:
        assert len(set(waits)) > 100


def test_no_server_silences_us_for_more_than_a_day(script: ModuleType) -> None:
    """Whatever Retry-After says, the wait is 24 h at most."""
    for text in ("86399", "86400", "1" + "0" * 20, date(NOW + 90 * DAY_S)):
        for _ in range(50):
            assert script.backoff_s("retry", 10**6, text, NOW) <= DAY_S


@pytest.mark.parametrize(
    "set_at, not_before, expected",
    [
        (0, 0, 0),
        (NOW - 10, NOW + 50, 50),
        (NOW, NOW + 50, 50),
        (NOW - 10, NOW, 0),
        (NOW - 10, NOW - 5, 0),
        (NOW + 1, NOW + 50, 0),  # the clock was set back since
        (NOW + 2 * DAY_S, NOW + 3 * DAY_S, 0),
        (NOW - 10, NOW + 1000 * DAY_S, DAY_S - 10),  # it stood ahead for a moment
        (NOW - 2 * DAY_S, NOW + 1000 * DAY_S, 0),
    ],
)
def test_how_long_a_backoff_holds(
    script: ModuleType, set_at: float, not_before: float, expected: float
) -> None:
    """A back-off holds while set_at <= now < not_before, and never beyond a day."""
    state = script.State("", {"set_at": set_at, "not_before": not_before})
    assert state.backoff_left_s(NOW) == pytest.approx(expected)


def test_retry_after_reaches_the_backoff(home: Home) -> None:
    """A 429's Retry-After decides when the next attempt may come."""
    with Receiver(lambda _: (429, {"Retry-After": "120"}, b"")) as receiver:
        place(home, receiver.url)
        run_sender(home, receiver.url)
    assert 120 <= backoff(home) <= 133


def test_a_retry_after_of_a_thousand_years(home: Home) -> None:
    """A server that asks for 10^20 s gets a day."""
    with Receiver(lambda _: (503, {"Retry-After": "1" + "0" * 20}, b"")) as receiver:
        place(home, receiver.url)
        run_sender(home, receiver.url)
    assert 80000 <= backoff(home) <= DAY_S


# -- No answer ------------------------------------------------------------------------


def reset(connection: socket.socket) -> None:
    """Take the request, then reset the connection."""
    read_request(connection)
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def close(connection: socket.socket) -> None:
    """Take the request, then close the connection without an answer."""
    read_request(connection)


def say(answer: bytes) -> Callable[[socket.socket], object]:
    """Take the request, then say these bytes and close."""

    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(answer)

    return talk


def test_a_dead_server(home: Home) -> None:
    """Connection refused: one attempt a pass, the ping is kept, a back-off stands."""
    url, traced = dead_url(), home.path / "traced"
    note = f"""
import socket
def note(*_, **__):
    with open({str(traced)!r}, "a") as file:
        file.write("connect\\n")
wrap(socket, "create_connection", before=note)
"""
    place(home, url, 3)
    run_sender(home, url, ONE_LIFE + note)
    assert_kept(home, "not now", 3)
    assert traced.read_text() == "connect\n"


@pytest.mark.parametrize(
    "talk",
    [
        reset,
        close,
        say(b"HTTP/1.1 "),
        say(b"SSH-2.0-OpenSSH_9.6\r\n"),
        say(b"\0" * 9000),
        say(b"HTTP/1.1 2000 OK\r\n\r\n"),
        say(b"HTTP/1.1 -20 OK\r\n\r\n"),
        say(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n"),
        say(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n"),
        say(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
        say(b"HTTP/1.1 600 Beyond\r\n\r\n"),
    ],
    ids=[
        "reset",
        "closed",
        "half",
        "SSH",
        "NULs",
        "2000",
        "-20",
        "headers",
        "line",
        "101",
        "600",
    ],
)
def test_no_answer_of_http(home: Home, talk: Callable[..., object]) -> None:
    """A server that does not answer in HTTP: one attempt, the ping is kept."""
    with Wire(talk) as wire:
        place(home, wire.url)
        run_sender(home, wire.url)
        assert wire.connections == 1
    assert_kept(home, "retry")


def test_a_silent_server(home: Home) -> None:
    """A server that never answers costs one attempt of TELEMHQ_TIMEOUT seconds."""
    with Wire(lambda _: wire.over.wait(30)) as wire:
        place(home, wire.url)
        begun = time.monotonic()
        run_sender(home, wire.url, TELEMHQ_TIMEOUT=1)
        assert 1 <= time.monotonic() - begun < 10
        assert wire.connections == 1
    assert_kept(home, "retry")


# -- Deadlines ------------------------------------------------------------------------


def drip_headers(connection: socket.socket) -> None:
    """Answer for ever, a byte at a time, each in time for the socket's timeout."""
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"y")
        time.sleep(0.1)


def drip_status(connection: socket.socket) -> None:
    """The same from the first byte on."""
    read_request(connection)
    for byte in b"HTTP/1.1 200" + b" " * 10000:
        connection.sendall(bytes([byte]))
        time.sleep(0.2)


def continue_for_ever(connection: socket.socket) -> None:
    """A flood of interim answers."""
    read_request(connection)
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 50)


@pytest.mark.parametrize("talk", [drip_headers, drip_status, continue_for_ever])
def test_an_answer_that_never_ends_is_cut_off(
    home: Home, talk: Callable[..., object]
) -> None:
    """A request ends by 1.5 times the timeout; the failure counts, the ping is kept."""
    ended = []

    def timed(connection: socket.socket) -> None:
        begun = time.monotonic()
        try:
            talk(connection)
        finally:
            ended.append(time.monotonic() - begun)

    with Wire(timed) as wire:
        place(home, wire.url)
        run_sender(home, wire.url, TELEMHQ_TIMEOUT=1)
        assert wire.connections == 1
        wait_until(lambda: ended)
    if talk is not continue_for_ever:  # that some http.clients end by themselves
        assert ended[0] > 1
    assert ended[0] < 4
    assert_kept(home, "retry")


def drip_body(connection: socket.socket) -> None:
    """Accept, then an answer's body without an end, a byte at a time."""
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b"y")
        time.sleep(0.1)


def endless_body(connection: socket.socket) -> None:
    """Accept, then a body without an end, as fast as it goes."""
    read_request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"y" * 65536)


@pytest.mark.parametrize("talk", [drip_body, endless_body])
def test_a_body_is_not_read(home: Home, talk: Callable[..., object]) -> None:
    """Status and headers decide: a 2xx with an endless body delivers at once."""
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
    with Wire(talk) as wire:
        place(home, wire.url, 2)
        begun = time.monotonic()
        run_sender(home, wire.url, ONE_LIFE + count)
        assert time.monotonic() - begun < 8
        assert wire.connections == 2
    assert home.waiting() == []
    # One buffer of each answer; how large that is, is the interpreter's choice.
    read = sum(map(int, counted.read_text().split()))
    assert 0 < read <= 2 * max(4096, io.DEFAULT_BUFFER_SIZE)


def test_a_resolver_that_hangs(home: Home) -> None:
    """The watchdog counts a failure, ends the sender; the next hook does not wait."""
    with Receiver() as receiver:
        place(home, receiver.url)
        hang = """
import socket
hang = time.sleep
socket.getaddrinfo = lambda *a, **k: hang(60)
"""
        begun = time.monotonic()
        run_sender(home, receiver.url, hang + ONE_LIFE, TELEMHQ_TIMEOUT=1)
        assert 1.4 < time.monotonic() - begun < 10
        assert_kept(home, "retry")
        kept = home.state_json()
        home.set_state(**dict(kept, not_before=kept["set_at"] + 600))
        home.hook(event("Stop"), receiver.url)
        assert home.processes() == []
        assert receiver.requests == []
    assert len(home.waiting()) == 2
    assert home.state_json()["failures"] == 1


def test_the_timeout_is_clamped(home: Home) -> None:
    """A TELEMHQ_TIMEOUT of nearly nothing is a second: a slow answer still counts."""

    def slow(_: object) -> int:
        time.sleep(0.6)
        return 200

    with Receiver(slow) as receiver:
        place(home, receiver.url)
        run_sender(home, receiver.url, TELEMHQ_TIMEOUT="0.001")
    assert home.waiting() == []


# -- Redirects, schemes ---------------------------------------------------------------


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(
    home: Home, receiver: Receiver, status: int
) -> None:
    """Wherever a 3xx points, nothing goes there; the ping is held."""
    with Receiver(lambda _: (status, {"Location": receiver.url}, b"")) as first:
        place(home, first.url)
        run_sender(home, first.url)
        assert len(first.requests) == 1
    assert receiver.requests == []
    assert_kept(home, "hold")


@pytest.mark.parametrize("location", ["/ping/other", "file:///etc/passwd", ""])
def test_a_redirect_to_anything_else_is_not_followed(home: Home, location: str) -> None:
    """Neither the same server nor another scheme is a place to follow to."""
    with Receiver(lambda _: (302, {"Location": location}, b"")) as receiver:
        place(home, receiver.url)
        run_sender(home, receiver.url)
        assert [request.method for request in receiver.requests] == ["POST"]
    assert_kept(home, "hold")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_http_to_loopback(home: Home, receiver: Receiver, host: str) -> None:
    """http:// to this very machine needs no permission."""
    url = receiver.url.replace("127.0.0.1", host)
    place(home, url)
    run_sender(home, url)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("allowed", ["", "0", "1"])
def test_http_to_another_machine(home: Home, receiver: Receiver, allowed: str) -> None:
    """http:// to another machine makes a ping only under TELEMHQ_ALLOW_HTTP=1."""
    there = "http://tracker.invalid/ping/" + TOKEN
    env: dict[str, Any] = {"TELEMHQ_ALLOW_HTTP": allowed, "http_proxy": receiver.url}
    no_sender = "os.posix_spawn = lambda *a, **k: 0"
    patched(home, no_sender, url=there, sent=event("Stop"), **env)
    assert len(home.waiting()) == (allowed == "1")
    run_sender(home, there, ONE_LIFE + NO_DNS, **env)
    assert len(receiver.requests) == (allowed == "1")
    assert home.waiting() == []


# -- TLS ------------------------------------------------------------------------------


def served(name: str) -> Receiver:
    """A TLS receiver with one of the certificates."""
    return Receiver(tls=(str(TLS / (name + ".pem")), str(TLS / (name + ".key"))))


def test_tls_delivers(home: Home) -> None:
    """https to a server whose certificate is trusted and names it delivers."""
    with served("loopback") as receiver:
        home.hook(event("Stop"), receiver.url, **CA)
        receiver.wait_for(1)
        home.quiet()
    assert home.waiting() == []


@pytest.mark.parametrize(
    "name, env",
    [
        ("self-signed", {}),
        ("self-signed", CA),
        ("loopback", {}),
        ("wrong-host", CA),
        ("self-signed", {"PYTHONHTTPSVERIFY": "0"}),
    ],
    ids=["self-signed", "self-signed, CA", "unknown CA", "wrong host", "verify off"],
)
def test_tls_that_is_not_verified_is_held(
    home: Home, name: str, env: dict[str, Any]
) -> None:
    """A certificate that does not prove who is there: held, and not a byte sent."""
    with served(name) as receiver:
        place(home, receiver.url, 2)
        run_sender(home, receiver.url, **env)
        assert receiver.requests == []
    assert_kept(home, "hold", 2)
    assert home.state_json()["problem"]["what"].startswith("TLS")


def test_https_never_falls_back_to_the_clear(home: Home) -> None:
    """Where no TLS answers, nothing of the ping or the token is on the wire."""
    said = []

    def talk(connection: socket.socket) -> None:
        said.append(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        said.append(connection.recv(65536))

    with Wire(talk) as wire:
        url = wire.url.replace("http:", "https:")
        (event_id,) = place(home, url)
        run_sender(home, url)
    assert wire.connections == 1
    assert said[0][:1] == b"\x16"  # a TLS handshake
    assert TOKEN.encode() not in b"".join(said)
    assert event_id.encode() not in b"".join(said)
    assert_kept(home, "hold")


def test_a_python_without_tls_holds(home: Home) -> None:
    """A Python that was built without TLS cannot send: held, never in the clear."""
    with served("loopback") as receiver:
        place(home, receiver.url)
        run_sender(home, receiver.url, 'sys.modules["ssl"] = None\n' + ONE_LIFE, **CA)
        assert receiver.requests == []
    assert_kept(home, "hold")


# -- Proxies --------------------------------------------------------------------------

PROXY_VARIABLES = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
]
ELSEWHERE = "http://tracker.invalid/ping/" + TOKEN


@pytest.mark.parametrize(
    "scheme, host",
    [("http", "127.0.0.1"), ("http", "localhost"), ("https", "localhost")],
)
def test_no_proxy_for_loopback(home: Home, scheme: str, host: str) -> None:
    """Whatever the environment says, a proxy never sees what goes to loopback."""
    with Receiver(502) as proxy, served("loopback") as tls, Receiver() as plain:
        receiver = tls if scheme == "https" else plain
        url = receiver.url.replace("127.0.0.1", host)
        place(home, url)
        env: dict[str, Any] = dict.fromkeys(PROXY_VARIABLES, proxy.url)
        run_sender(home, url, **env, **CA)
        assert len(receiver.requests) == 1
        assert proxy.requests == []


def test_the_environments_proxy_is_honoured(home: Home) -> None:
    """Elsewhere the ping goes by the proxy that the environment names."""
    with Receiver() as proxy:
        env = {"TELEMHQ_ALLOW_HTTP": "1", "http_proxy": proxy.url}
        path = only_enqueue(home, ELSEWHERE, **env)
        run_sender(home, ELSEWHERE, ONE_LIFE + NO_DNS, **env)
        (request,) = proxy.requests
    assert request.path == ELSEWHERE
    assert request.ping["event_id"] in path.name
    assert home.waiting() == []


def test_a_proxy_is_passed_by_where_no_proxy_says_so(home: Home) -> None:
    """NO_PROXY is honoured too."""
    here = NO_DNS.replace('"localhost"', '"tracker.invalid"')
    here = here.replace("lookup(host", 'lookup("127.0.0.1"')
    with Receiver() as proxy, Receiver() as receiver:
        url = receiver.url.replace("127.0.0.1", "tracker.invalid")
        env = {"TELEMHQ_ALLOW_HTTP": "1", "http_proxy": proxy.url}
        env["no_proxy"] = "tracker.invalid"
        only_enqueue(home, url, **env)
        run_sender(home, url, ONE_LIFE + here, **env)
        assert len(receiver.requests) == 1
        assert proxy.requests == []


@pytest.mark.parametrize(
    "status, verdict",
    [(400, "hold"), (403, "hold"), (407, "hold"), (429, "not now"), (502, "not now")],
)
def test_a_proxy_that_opens_no_tunnel(home: Home, status: int, verdict: str) -> None:
    """A proxy's own answer to CONNECT is never the ping's fault: it is kept."""
    url = ELSEWHERE.replace("http:", "https:")
    with Receiver(status) as proxy:
        env = {"https_proxy": f"http://127.0.0.1:{proxy.port}"}
        only_enqueue(home, url, **env)
        run_sender(home, url, ONE_LIFE + NO_DNS, **env)
        (request,) = proxy.requests
    assert (request.method, request.path) == ("CONNECT", "tracker.invalid:443")
    assert TOKEN not in str(request.headers)
    assert_kept(home, verdict)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "nonsense", "http://"])
def test_a_proxy_that_cannot_be_used(home: Home, proxy: str) -> None:
    """A proxy of an unknown kind: the ping is kept, and a back-off stands."""
    env = {"TELEMHQ_ALLOW_HTTP": "1", "http_proxy": proxy}
    only_enqueue(home, ELSEWHERE, **env)
    run_sender(home, ELSEWHERE, ONE_LIFE + NO_DNS, **env)
    assert len(home.waiting()) == 1
    assert home.state_json()["not_before"] > time.time()
