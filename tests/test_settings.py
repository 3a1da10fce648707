"""Variables and URLs, and that README and settings files say what the script does."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from support import ROOT, SCRIPT, TOKEN, Home, Receiver, dead_url, event

URL = "https://telemhq.com/ping/" + TOKEN


def debug(home: Home, url: str | None, **more: Any) -> str:
    """What debug mode says on stderr about one Stop event."""
    done = home.hook(event("Stop"), url, TELEMHQ_HOOK_DEBUG="1", **more)
    assert (done.returncode, done.stdout) == (0, b"")
    return done.stderr.decode()


def settings(script: ModuleType, **environ: str) -> Any:
    """The settings of an environment with a URL."""
    return script.Settings(dict({"TELEMHQ_PING_URL": URL}, **environ))


# -- Variables -------------------------------------------------------------------------

NONSENSE = (
    ("TELEMHQ_MACHINE", "build 7"),
    ("TELEMHQ_MACHINE", "a/b"),
    ("TELEMHQ_MACHINE", "x" * 129),
    ("TELEMHQ_MACHINE", "é"),
    ("TELEMHQ_PROJECT", "\x1b\x07"),
    ("TELEMHQ_PROJECT", "   "),
    ("TELEMHQ_TIMEOUT", "soon"),
    ("TELEMHQ_TIMEOUT", "10s"),
    ("TELEMHQ_TIMEOUT", "nan"),
    ("TELEMHQ_TIMEOUT", "1,5"),
    ("TELEMHQ_FOREGROUND", "maybe"),
    ("TELEMHQ_ALLOW_HTTP", "2"),
    ("TELEMHQ_USAGE", "perhaps"),
    ("TELEMHQ_TOOL_NAMES", "some"),
    ("TELEMHQ_GIT", "main"),
    ("TELEMHQ_STATE_DIR", "relative/path"),
    ("TELEMHQ_STATE_DIR", "."),
)


@pytest.mark.parametrize("name, value", NONSENSE)
def test_nonsense_is_ignored_and_named_in_debug_mode(
    home: Home, receiver: Receiver, name: str, value: str
) -> None:
    """A value that makes no sense stops nothing; debug mode names its variable."""
    told = debug(home, receiver.url, **{name: value})
    assert [line for line in told.splitlines() if name in line and "ignored" in line]
    assert "skipped" not in told
    (ping,) = receiver.pings
    assert ping["project"] == "api"
    assert "machine" not in ping
    assert home.state.is_dir()
    assert not (home.project / "relative").exists()


def test_nonsense_is_ignored_silently_in_hook_mode(
    home: Home, receiver: Receiver
) -> None:
    """All of it at once: nothing is said, and the ping is delivered."""
    env: dict[str, Any] = dict(NONSENSE)
    done = home.hook(event("Stop"), receiver.url, **env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert receiver.wait_for(1)[0]["project"] == "api"


@pytest.mark.parametrize(
    "name, value",
    [
        ("TELEMHQ_MACHINE", "build-7"),
        ("TELEMHQ_PROJECT", "My shop"),
        ("TELEMHQ_HASH_KEY", "any text / at all"),
        ("TELEMHQ_TIMEOUT", "5"),
        ("TELEMHQ_TIMEOUT", "2.5"),
        ("TELEMHQ_FOREGROUND", "1"),
        ("TELEMHQ_FOREGROUND", "0"),
        ("TELEMHQ_ALLOW_HTTP", "1"),
        ("TELEMHQ_USAGE", "0"),
        ("TELEMHQ_TOOL_NAMES", "0"),
        ("TELEMHQ_GIT", "1"),
        ("TELEMHQ_STATE_DIR", "~/elsewhere"),
    ],
)
def test_a_good_value_is_taken_without_a_word(
    home: Home, receiver: Receiver, name: str, value: str
) -> None:
    """What makes sense is not complained about."""
    assert "ignored" not in debug(home, receiver.url, **{name: value})
    assert len(receiver.pings) == 1


def test_an_empty_variable_is_as_none(home: Home, receiver: Receiver) -> None:
    """A variable that is set to nothing counts as not set, and is no nonsense."""
    assert "ignored" not in debug(home, receiver.url, **{n: "" for n, _ in NONSENSE})
    assert receiver.pings[0]["project"] == "api"
    assert home.state.is_dir()


@pytest.mark.parametrize(
    "given, seconds",
    [
        (None, 10),
        ("", 10),
        ("5", 5),
        ("2.5", 2.5),
        ("1", 1),
        ("30", 30),
        ("0.2", 1),
        ("31", 30),
        ("3600", 30),
        ("nan", 10),
        ("soon", 10),
    ],
)
def test_the_timeout_is_clamped(
    script: ModuleType, given: str | None, seconds: float
) -> None:
    """TELEMHQ_TIMEOUT: 10 seconds, clamped to 1 to 30; nonsense is the default."""
    found = settings(script, **({} if given is None else {"TELEMHQ_TIMEOUT": given}))
    assert found.timeout_s == seconds


@pytest.mark.parametrize("given", ["0", "-3", "inf", "-inf", "1e400", "1" * 400])
def test_no_timeout_is_outside_its_bounds(script: ModuleType, given: str) -> None:
    """A timeout can never be switched off or made endless."""
    assert 1 <= settings(script, TELEMHQ_TIMEOUT=given).timeout_s <= 30


def test_project_and_machine_arrive(home: Home, receiver: Receiver) -> None:
    """TELEMHQ_PROJECT names the project, TELEMHQ_MACHINE the machine."""
    env = {"TELEMHQ_PROJECT": "My shop/é", "TELEMHQ_MACHINE": "build-7"}
    debug(home, receiver.url, **env)
    (ping,) = receiver.pings
    assert (ping["project"], ping["machine"]) == ("My shop/é", "build-7")


@pytest.mark.parametrize("value", ["", "0", "false", "nonsense"])
def test_debug_mode_is_off_unless_asked_for(
    home: Home, receiver: Receiver, value: str
) -> None:
    """TELEMHQ_HOOK_DEBUG: only a yes makes the hook talk; nonsense does not."""
    done = home.hook(event("Stop"), receiver.url, TELEMHQ_HOOK_DEBUG=value)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert receiver.wait_for(1)


@pytest.mark.parametrize("value", ["0", "no", "", "nonsense"])
def test_foreground_is_off_unless_asked_for(
    home: Home, receiver: Receiver, value: str
) -> None:
    """Without a yes the hook itself waits for no server."""
    done = home.hook(event("Stop"), receiver.url, TELEMHQ_FOREGROUND=value)
    assert done.returncode == 0
    receiver.wait_for(1)
    home.quiet()
    assert "sender.log" in os.listdir(str(home.destination()))


STATE_DIRS: tuple[tuple[dict[str, str], str], ...] = (
    ({}, "~/.claude/telemhq"),
    ({"CLAUDE_CONFIG_DIR": "~/config"}, "~/config/telemhq"),
    ({"CLAUDE_CONFIG_DIR": "$HOME/config"}, "~/config/telemhq"),
    ({"CLAUDE_CONFIG_DIR": ""}, "~/.claude/telemhq"),
    ({"TELEMHQ_STATE_DIR": "$HOME/a/b", "CLAUDE_CONFIG_DIR": "$HOME/c"}, "~/a/b"),
    ({"TELEMHQ_STATE_DIR": "$HOME/a/../b/"}, "~/b"),
    ({"TELEMHQ_STATE_DIR": "~/a b"}, "~/a b"),
    ({"TELEMHQ_STATE_DIR": ""}, "~/.claude/telemhq"),
)


@pytest.mark.parametrize("given, expected", STATE_DIRS)
def test_where_the_state_is_kept(
    home: Home, given: dict[str, str], expected: str
) -> None:
    """TELEMHQ_STATE_DIR, else telemhq/ in CLAUDE_CONFIG_DIR, else in ~/.claude."""
    env: dict[str, Any] = {
        k: v.replace("$HOME", str(home.path)) for k, v in given.items()
    }
    before = set(home.path.rglob("*"))
    done = home.hook(event("Stop"), dead_url(), TELEMHQ_FOREGROUND="1", **env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    state = home.path / expected[2:]
    assert len(list(state.glob("*/outbox/*.json"))) == 1
    others = set(home.path.rglob("*")) - before - set(state.rglob("*")) - {state}
    assert others <= set(state.parents)


# -- URLs ------------------------------------------------------------------------------

GOOD_URLS = (
    URL,
    "https://telemhq.com:443/ping/x",
    "https://telemhq.com:8443/ping/x",
    "HTTPS://TELEMHQ.COM/ping/x",
    "https://sub-1.example.co.uk/ping/x?a=b&c=%20",
    "https://telemhq.com",
    "https://192.0.2.7/ping/x",
    "https://[2001:db8::1]/ping/x",
    "https://[2001:db8::1]:8443/ping/x",
    "https://[::ffff:192.0.2.7]/ping/x",
    "https://telemhq.com/ping/user@x",
    "http://127.0.0.1:8080/ping/x",
    "http://127.0.0.1/ping/x",
    "http://127.1.2.3/ping/x",
    "http://localhost:8080/ping/x",
    "HTTP://LOCALHOST/ping/x",
    "http://[::1]/ping/x",
    "http://[::1]:8080/ping/x",
)
HTTP_ELSEWHERE = (
    "http://telemhq.com/ping/x",
    "http://192.0.2.7/ping/x",
    "http://10.0.0.1:8080/ping/x",
    "http://0.0.0.0/ping/x",
    "http://127.evil.com/ping/x",
    "http://127.0.0.1.evil.com/ping/x",
    "http://127.0.0.evil/ping/x",
    "http://127.0.0.256/ping/x",
    "http://localhost.evil.com/ping/x",
    "http://evil.com/127.0.0.1",
    "http://evil.com#localhost",
    "http://evil.com?localhost",
    "http://notlocalhost/ping/x",
    "http://128.0.0.1/ping/x",
    "http://1270.0.0.1/ping/x",
    "http://[::2]/ping/x",
    "http://[2001:db8::1]/ping/x",
    "http://[::127.0.0.1]/ping/x",
)
BAD_URLS = (
    "telemhq.com/ping/x",
    "//telemhq.com/ping/x",
    "/ping/x",
    "https:telemhq.com/ping/x",
    "https:/telemhq.com/ping/x",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "ftp://telemhq.com/ping/x",
    "data:text/plain,x",
    "data://telemhq.com/ping/x",
    "javascript:alert(1)",
    "ws://telemhq.com/ping/x",
    "httpsx://telemhq.com/ping/x",
    "https://user:password@telemhq.com/ping/x",
    "https://user@telemhq.com/ping/x",
    "https://@telemhq.com/ping/x",
    "https://telemhq.com@evil.com/ping/x",
    "http://127.0.0.1:80@evil.com/ping/x",
    "http://localhost:80@evil.com:80/ping/x",
    "https://",
    "https:///ping/x",
    "https://:443/ping/x",
    "https://?x",
    "https://#x",
    "https://telemhq.com:/ping/x",
    "https://telemhq.com:0/ping/x",
    "https://telemhq.com:65536/ping/x",
    "https://telemhq.com:-1/ping/x",
    "https://telemhq.com:+443/ping/x",
    "https://telemhq.com:443:443/ping/x",
    "https://telemhq.com:https/ping/x",
    "https://telemhq.com:4\u0664/ping/x",
    "https://[::1/ping/x",
    "https://::1/ping/x",
    "https://[]/ping/x",
    "https://[zz::1]/ping/x",
    "https://[::1]x/ping/x",
    "https://[::1]:x/ping/x",
    "https://telemhq.com/ping/a b",
    " https://telemhq.com/ping/x",
    "https://telemhq.com/ping/x ",
    "https://telemhq.com/ping/x\n",
    "https://telemhq.com/ping/x\r\nHost: evil.com",
    "https://telemhq.com\r\n/ping/x",
    "https://telemhq.com/ping/\tx",
    "https://telemhq.com/ping/\x7f",
    "https://telemhq.com\\@evil.com/ping/x",
    "https:\\\\telemhq.com\\ping\\x",
    "https://telemhq.com/ping\\x",
    "https://t\u00e9lemhq.com/ping/x",
    "https://telemhq.com/ping/\u00e9",
    "https://telemhq\u3002com/ping/x",
    "https://telemhq.com/ping/\udcff",
    "https://tele%6dhq.com/ping/x",
    "https://telemhq.com,evil.com/ping/x",
    "https://<token>/ping/x",
    "https://telemhq.com/ping/<token>",
    '"https://telemhq.com/ping/x"',
    "$TELEMHQ_PING_URL",
)


@pytest.mark.parametrize("url", GOOD_URLS)
def test_a_good_url_is_a_destination(script: ModuleType, url: str) -> None:
    """https anywhere, and http to this machine, by name, IPv4 or IPv6, with a port."""
    found = script.find_tracker(script.Settings({"TELEMHQ_PING_URL": url}))
    assert found.url == url


@pytest.mark.parametrize("url", BAD_URLS, ids=ascii)
def test_a_bad_url_is_no_destination(script: ModuleType, url: str) -> None:
    """Other schemes, user:password@, no host, bad ports, spaces: refused."""
    for more in ({}, {"TELEMHQ_ALLOW_HTTP": "1"}):
        environ = dict({"TELEMHQ_PING_URL": url}, **more)
        with pytest.raises(script.Skipped, match="TELEMHQ_PING_URL"):
            script.find_tracker(script.Settings(environ))


@pytest.mark.parametrize(
    "url, word",
    [
        ("https://user:password@telemhq.com/", "user:password@"),
        ("https://user@telemhq.com/", "user:password@"),
        ("ftp://telemhq.com/", "https://"),
        ("telemhq.com/ping/x", "https://"),
        ("https:///ping/x", "host"),
        ("https://telemhq.com:0/", "port"),
        ("https://telemhq.com/a b", "space"),
        ("https://telemhq.com/\r\nX: y", "space"),
        ("http://telemhq.com/", "TELEMHQ_ALLOW_HTTP=1"),
    ],
)
def test_a_bad_url_is_refused_with_a_clear_reason(
    script: ModuleType, url: str, word: str
) -> None:
    """Debug mode and doctor say what is wrong with the URL."""
    with pytest.raises(script.Skipped, match=re.escape(word)):
        script.find_tracker(script.Settings({"TELEMHQ_PING_URL": url}))


@pytest.mark.parametrize("url", HTTP_ELSEWHERE)
def test_http_elsewhere_needs_to_be_allowed(script: ModuleType, url: str) -> None:
    """A token never travels in the clear, unless TELEMHQ_ALLOW_HTTP=1 says it may."""
    for value in ("", "0", "nonsense"):
        environ = {"TELEMHQ_PING_URL": url, "TELEMHQ_ALLOW_HTTP": value}
        with pytest.raises(script.Skipped, match="TELEMHQ_ALLOW_HTTP"):
            script.find_tracker(script.Settings(environ))
    environ = {"TELEMHQ_PING_URL": url, "TELEMHQ_ALLOW_HTTP": "1"}
    assert script.find_tracker(script.Settings(environ)).url == url


@pytest.mark.parametrize(
    "url, expected",
    [
        ("HTTPS://Telemhq.Com/ping/X", ("https", "telemhq.com", "")),
        ("http://127.0.0.1:8080/ping/x", ("http", "127.0.0.1", "8080")),
        ("https://[2001:DB8::1]:8443/x", ("https", "2001:db8::1", "8443")),
        ("https://telemhq.com?x@y:1/", ("https", "telemhq.com", "")),
        ("https://telemhq.com#x@y:1/", ("https", "telemhq.com", "")),
    ],
)
def test_a_url_is_split_as_urllib_will_split_it(
    script: ModuleType, url: str, expected: tuple[str, str, str]
) -> None:
    """The host that is judged is the host that urllib connects to."""
    from urllib.parse import urlsplit

    assert script.split_url(url) == expected
    split = urlsplit(url)
    assert (split.scheme, split.hostname, str(split.port or "")) == expected


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/ping/" + TOKEN,
        "data:text/plain," + TOKEN,
        f"https://user:{TOKEN}@telemhq.com/",
        f"https://telemhq.com/ping/{TOKEN}\r\nX: y",
        "telemhq.com/ping/" + TOKEN,
        f"https://telemhq.com/ping/{TOKEN} ",
        "http://192.0.2.7/ping/" + TOKEN,
        "http://127.evil.com/ping/" + TOKEN,
        "https://telemhq.com/ping/\udcff" + TOKEN,
        "",
        None,
    ],
    ids=ascii,
)
def test_a_hook_without_a_usable_url_does_nothing(home: Home, url: str | None) -> None:
    """Silence, exit 0, nothing written; debug mode says why, without the URL."""
    before = set(home.path.rglob("*"))
    done = home.hook(event("Stop"), url)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    told = debug(home, url)
    assert told.startswith("TelemHQ hook skipped: ")
    assert told.count("\n") == 1
    assert "TELEMHQ_PING_URL" in told
    assert TOKEN not in told
    assert set(home.path.rglob("*")) == before
    assert home.processes() == []


@pytest.mark.parametrize("change", [("http:", "HTTP:"), ("127.0.0.1", "localhost")])
def test_a_url_in_other_words_delivers(
    home: Home, receiver: Receiver, change: tuple[str, str]
) -> None:
    """A scheme in capitals and a loopback name lead to the tracker all the same."""
    told = debug(home, receiver.url.replace(*change))
    assert len(receiver.pings) == 1
    assert "HTTP 200" in told


def test_a_fragment_is_not_sent_and_a_query_is(home: Home, receiver: Receiver) -> None:
    """What urllib sends of a URL is its path and query."""
    debug(home, receiver.url + "?a=%20b#secret")
    assert [request.path for request in receiver.requests] == [f"/ping/{TOKEN}?a=%20b"]


# -- README and settings files ---------------------------------------------------------

EXAMPLE = ROOT / "settings.example.json"
COMMAND = (
    "cd ~/.claude/hooks && python3 -ESc 'import telemhq_ping as t; t.hook()' "
    "|| python3 -I -S ~/.claude/hooks/telemhq_ping.py || true"
)
TELEMHQS_COMMAND = "python3 ~/.claude/hooks/telemhq_ping.py"  # from TelemHQ's own pages


def variables(text: str) -> set[str]:
    """The names of all TELEMHQ_ variables in a text."""
    return set(re.findall(r"\bTELEMHQ_[A-Z][A-Z_]*[A-Z]\b", text))


def without_trackers(text: str) -> str:
    """The script without the section on trackers, whose variables are its own."""
    before, _, rest = text.partition("\n# -- Trackers")
    return before + "\n# -- " + rest.split("\n# -- ", 1)[1]


def readme_rows(pattern: str, after: str = "") -> list[str]:
    """The first group of `pattern` in the README's lines, from heading `after` on."""
    text = (ROOT / "README.md").read_text("utf-8")
    if after:
        text = re.split("(?m)^## ", text.split("\n" + after + "\n", 1)[1], maxsplit=1)[
            0
        ]
    return [found.group(1) for found in re.finditer("(?m)^" + pattern, text)]


def test_the_docstring_names_every_variable() -> None:
    """The contract at the script's top lists the variables that its code reads; those
    of other trackers stand in their section."""
    text = SCRIPT.read_text("utf-8")
    docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
    code = text.replace(docstring, "")
    listed = set(re.findall(r"(?m)^    (TELEMHQ_[A-Z_]+)  ", docstring))
    assert listed == variables(without_trackers(code))
    assert len(listed) >= 9


def test_the_readmes_table_names_every_variable() -> None:
    """README's table of variables has a row for each of the code's, no more."""
    rows = readme_rows(r"\| `(TELEMHQ_[A-Z_]+)`")
    code = variables(without_trackers(SCRIPT.read_text("utf-8")))
    assert sorted(rows) == sorted(code)


def test_the_readmes_table_of_what_is_sent_is_the_gate(script: ModuleType) -> None:
    """README's sent table names each field that can leave, and no other."""
    cells = readme_rows(r"\| (`[^|]+)\|", "## What is sent")
    fields = [name for cell in cells for name in re.findall("`([a-z0-9_]+)`", cell)]
    assert sorted(fields) == sorted(script.GATE)


def test_settings_example_is_complete_and_as_documented() -> None:
    """Stop, StopFailure and SessionEnd, one command each, a timeout, no env block.

    A failing `claude -p` sends a SIGTERM to its StopFailure hooks, before Python is up.
    """
    commands = {
        "Stop": COMMAND,
        "StopFailure": "trap '' TERM; " + COMMAND,
        "SessionEnd": COMMAND,
    }
    hooks = {
        name: [{"hooks": [{"type": "command", "command": command, "timeout": 10}]}]
        for name, command in commands.items()
    }
    assert json.loads(EXAMPLE.read_text("utf-8")) == {"hooks": hooks}


@pytest.mark.skipif(os.name != "posix", reason="needs sh")
@pytest.mark.parametrize("command", [COMMAND, TELEMHQS_COMMAND])
@pytest.mark.parametrize("link", [False, True], ids=("copied", "linked"))
def test_the_documented_commands_work(
    home: Home, receiver: Receiver, command: str, link: bool
) -> None:
    """Ours and TelemHQ's own settings block work, for a copy and for a link."""
    hooks = home.path / ".claude" / "hooks"
    hooks.mkdir(parents=True)
    if link:
        (hooks / SCRIPT.name).symlink_to(SCRIPT)
    else:
        shutil.copy(str(SCRIPT), str(hooks))
    env = home.env(receiver.url)
    before = set(home.path.rglob("*"))
    for name in ("Stop", "StopFailure", "SessionEnd-other"):
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            input=json.dumps(event(name)).encode(),
            capture_output=True,
            env=env,
            cwd=str(home.project),
            start_new_session=True,
            timeout=30,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    events = {ping["event"] for ping in receiver.wait_for(3)}
    assert events == {"Stop", "StopFailure", "SessionEnd"}
    home.quiet()
    new = set(home.path.rglob("*")) - before - set(home.state.rglob("*"))
    cache = hooks / "__pycache__"
    (bytecode,) = cache.iterdir()
    assert bytecode.name == f"{SCRIPT.stem}.{sys.implementation.cache_tag}.pyc"
    assert new == {home.state, cache, bytecode}


@pytest.mark.skipif(os.name != "posix", reason="needs sh")
def test_a_missing_script_does_not_block_claude_code(home: Home) -> None:
    """Python exits 2 for a missing script, which blocks: the `|| true` makes it 0."""
    (home.path / ".claude" / "hooks").mkdir(parents=True)
    hooks = json.loads(EXAMPLE.read_text("utf-8"))["hooks"]
    env = home.env(dead_url())
    for command in {entry["hooks"][0]["command"] for (entry,) in hooks.values()}:
        codes = [
            subprocess.run(
                ["/bin/sh", "-c", text],
                input=b"{}",
                capture_output=True,
                env=env,
                cwd=str(home.project),
                timeout=30,
            ).returncode
            for text in (command, command.replace(" || true", ""))
        ]
        assert codes == [0, 2]
