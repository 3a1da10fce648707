"""Variables and URLs, and that the script's first lines say what they do."""

from __future__ import annotations

import os
import re
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest

from support import SCRIPT, TOKEN, Home, Receiver, event

URL = "https://telemhq.com/ping/" + TOKEN
SILENT = (0, b"", b"")

# -- Variables -------------------------------------------------------------------------

NONSENSE = (
    *(("TELEMHQ_MACHINE", value) for value in ("build 7", "a/b", "x" * 129, "é")),
    *(("TELEMHQ_TIMEOUT", value) for value in ("soon", "10s", "1,5")),
    *(("TELEMHQ_STATE_DIR", value) for value in ("relative/path", ".")),
    *(("TELEMHQ_FOREGROUND", "maybe"), ("TELEMHQ_ALLOW_HTTP", "2")),
    *(("TELEMHQ_USAGE", "perhaps"), ("TELEMHQ_TOOL_NAMES", "some")),
    ("TELEMHQ_GIT", "main"),
)
SENSE = (
    *(("TELEMHQ_MACHINE", "build-7"), ("TELEMHQ_PROJECT", "My shop/é")),
    *(("TELEMHQ_TIMEOUT", "2.5"), ("TELEMHQ_STATE_DIR", "~/elsewhere")),
    *(("TELEMHQ_HASH_KEY", "any text / at all"), ("TELEMHQ_GIT", "yes")),
    *(("TELEMHQ_USAGE", "Off"), ("TELEMHQ_ALLOW_HTTP", "TRUE")),
    *((name, "") for name, _ in NONSENSE),
)


@pytest.mark.parametrize("name, value", [*NONSENSE, *SENSE])
def test_what_makes_no_sense_is_named_and_as_not_set(
    script: ModuleType, name: str, value: str
) -> None:
    """An empty variable counts as not set, and is no nonsense. What is not understood
    in those that keep something at home means off."""
    found, plain = script.Settings({name: value}), script.Settings({})
    nonsense = (name, value) in NONSENSE
    assert [name in text for text in found.ignored] == [True] * nonsense
    if nonsense:
        for known in ("machine", "timeout_s", "state_dir", "foreground"):
            assert getattr(found, known) == getattr(plain, known)
        assert found.usage == (name != "TELEMHQ_USAGE")
        assert found.tool_names == (name != "TELEMHQ_TOOL_NAMES")
        assert (found.allow_http, found.git, found.debug) == (False,) * 3


def test_nonsense_stops_nothing_and_is_told_in_debug_mode(
    home: Home, receiver: Receiver
) -> None:
    """All of it at once: the ping is delivered; debug mode names each."""
    env: dict[str, Any] = {**dict(NONSENSE), "TELEMHQ_HOOK_DEBUG": "1"}
    done = home.hook(event("Stop"), receiver.url, **env)
    (ping,) = receiver.pings
    assert (ping["project"], "machine" in ping) == ("api", False)
    for name, _ in NONSENSE:
        assert re.search(f"{name} (is ignored|counts as 0): ", done.stderr.decode())
    assert done.stderr.count(b"counts as 0: it must be 1 or 0") == 5
    assert not (home.project / "relative").exists()


def test_the_timeout_is_clamped(script: ModuleType) -> None:
    """10 seconds, 1 to 30: it can neither be switched off nor made endless."""
    for given, seconds in (
        *(("", 10), ("5", 5), ("2.5", 2.5), ("0.2", 1), ("31", 30), ("nan", 1)),
        *(("0", 1), ("-3", 1), ("inf", 30), ("-inf", 1), ("1e400", 30)),
    ):
        assert script.Settings({"TELEMHQ_TIMEOUT": given}).timeout_s == seconds


STATE_DIRS: tuple[tuple[dict[str, str], str], ...] = (
    ({}, "~/.claude/telemhq"),
    ({"CLAUDE_CONFIG_DIR": "~/config"}, "~/config/telemhq"),
    ({"CLAUDE_CONFIG_DIR": "relative"}, "~/.claude/telemhq"),
    ({"TELEMHQ_STATE_DIR": "/a/../b c/", "CLAUDE_CONFIG_DIR": "/c"}, "/b c"),
    ({"TELEMHQ_STATE_DIR": "", "CLAUDE_CONFIG_DIR": ""}, "~/.claude/telemhq"),
)


@pytest.mark.parametrize("given, expected", STATE_DIRS)
def test_where_the_state_is_kept(
    script: ModuleType, given: dict[str, str], expected: str
) -> None:
    """TELEMHQ_STATE_DIR, else telemhq/ in CLAUDE_CONFIG_DIR, else in ~/.claude."""
    assert script.Settings(given).state_dir == os.path.expanduser(expected)


@pytest.mark.fault(69)
@pytest.mark.skipif(os.name != "posix", reason="needs sh")
def test_an_empty_home_is_none(home: Home, receiver: Receiver) -> None:
    """HOME="": nothing is written outside the user's own directories, or at all."""
    done = home.hook(event("Stop"), receiver.url, HOME="", TELEMHQ_HOOK_DEBUG=1)
    assert b"skipped: " in done.stderr
    assert receiver.requests == []
    assert not os.path.exists("/.claude/telemhq")


# -- URLs ------------------------------------------------------------------------------

GOOD_URLS = (
    URL,
    "HTTPS://TELEMHQ.COM:8443/ping/x",
    "https://sub-1.example.co.uk/ping/x?a=b&c=%20",
    *("https://telemhq.com/ping/user@x", "https://telemhq.com?x@y:1"),
    *("https://telemhq.com", "https://192.0.2.7/x", "https://[2001:db8::1]:8443/x"),
    *("http://127.0.0.1:8080/x", "http://LOCALHOST/x"),
    *("http://[::1]/ping/x", "http://[::1]:8080/ping/x"),
)
HTTP_ELSEWHERE = (
    *("http://telemhq.com/x", "http://10.0.0.1:8080/x", "http://0.0.0.0/x"),
    *("http://127.evil.com/x", "http://127.0.0.1.evil.com/x", "http://127.0.0.256/x"),
    "http://127.0.0.1.2/x",
    *("http://localhost.evil.com/x", "http://notlocalhost/x", "http://1270.0.0.1/x"),
    *("http://evil.com/127.0.0.1", "http://evil.com#localhost", "http://[::2]/x"),
)
BAD_URLS = (
    *("telemhq.com/x", "//telemhq.com/x", "/x", "https:telemhq.com/x", "https:/a.b/x"),
    *("file:///etc/passwd", "ftp://a.b/x", "data:text/plain,x", "httpsx://a.b/x"),
    *("https://user:password@a.b/x", "https://@a.b/x", "http://127.0.0.1:80@evil.com"),
    *("https://", "https:///x", "https://:443/x", "https://?x", "https://#x"),
    *("https://a.b:/x", "https://a.b:65536/x", "https://a.b:-1/x"),
    *("https://a.b:https/x", "https://a.b:4\u0664/x"),
    *("https://[]/x", "https://[::1]x/x", "https://[::1]:x/x"),
    *("https://a.b/a b", " https://a.b/x", "https://a.b/x\n", "https://a.b/\x7f"),
    *("https://a.b/x\r\nHost: evil.com", "https://a.b\\@evil.com/x", "https://a.b\\x"),
    *("https://t\u00e9l.com/x", "https://a\u3002b/x", "https://a.b/\udcff"),
    *("https://tele%6dhq.com/x", "https://a.b,evil.com/x", "https://a.b/<token>"),
    *('"https://a.b/x"', "$TELEMHQ_PING_URL"),
)


@pytest.mark.fault(31)
@pytest.mark.parametrize("url", [*GOOD_URLS, *HTTP_ELSEWHERE, *BAD_URLS], ids=ascii)
def test_which_urls_are_destinations(script: ModuleType, url: str) -> None:
    """https anywhere, http to this machine, by name, IPv4 or IPv6; http elsewhere only
    with TELEMHQ_ALLOW_HTTP=1, for a token never travels in the clear. Other schemes,
    user:password@, no host, bad ports, spaces: never."""
    for allowed in ("", "nonsense", "1"):
        environ = {"TELEMHQ_PING_URL": url, "TELEMHQ_ALLOW_HTTP": allowed}
        settings = script.Settings(environ)
        found, problems = script.find_trackers(settings)
        if url in GOOD_URLS or (url in HTTP_ELSEWHERE and allowed == "1"):
            assert [tracker.url for tracker in found] == [url]
            split = urlsplit(url)  # the host that is judged is the one it connects to
            assert script.split_url(url) == (split.scheme, split.hostname)
        else:
            assert found == []
            assert "TELEMHQ_PING_URL is not usable" in problems[0]


@pytest.mark.fault(31, 39)
@pytest.mark.parametrize(
    "url, word",
    [
        (f"https://user:{TOKEN}@telemhq.com/", "user:password@"),
        (f"ftp://127.0.0.1/ping/{TOKEN}", "https://"),
        (f"https://telemhq.com:https/{TOKEN}", "HOST:PORT"),
        (f"https://telemhq.com/ping/{TOKEN}\r\nX: y", "space"),
        (f"http://192.0.2.7/ping/{TOKEN}", "TELEMHQ_ALLOW_HTTP=1"),
        (f"https://telemhq.com/ping/\udcff{TOKEN}", "character"),
        ("", "is empty: all is switched off"),
        (None, "is not set: `install --url URL`"),
    ],
    ids=ascii,
)
def test_a_hook_without_a_usable_url_does_nothing(
    home: Home, url: str | None, word: str
) -> None:
    """Silence, exit 0, nothing written; debug mode says why, and not the token."""
    before = set(home.path.rglob("*"))
    done = home.hook(event("Stop"), url)
    assert (done.returncode, done.stdout, done.stderr) == SILENT
    more: dict[str, Any] = {"TELEMHQ_HOOK_DEBUG": 1}
    if url == "":  # it pauses the other trackers, too
        more["TELEMHQ_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
        more["TELEMHQ_DESTINATIONS"] = "otlp telemhq"
    done = home.hook(event("Stop"), url, **more)
    (told,) = done.stderr.decode().splitlines()
    assert told.startswith("TelemHQ hook skipped: TELEMHQ_PING_URL")
    assert word in told
    assert TOKEN not in told
    assert set(home.path.rglob("*")) == before
    assert home.processes() == []


def test_the_docstring_names_every_variable(script: ModuleType) -> None:
    """The contract at the script's top lists the variables that the code reads; those
    of other trackers stand in their section."""
    text, docstring = SCRIPT.read_text("utf-8"), script.__doc__ or ""
    code = set(re.findall(r"\bTELEMHQ_[A-Z_]*[A-Z]\b", text.replace(docstring, "")))
    others = (t.variables for kind, t in script.TRACKERS.items() if kind != "telemhq")
    documented = set(re.findall(r"(?m)^    (TELEMHQ_[A-Z_]+)  ", docstring))
    assert documented == code.difference(*others)
    assert len(code) >= 9
