"""The README says what the script does: each table, figure, picture and command."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from types import ModuleType

import pytest

from support import ROOT, SCRIPT, Home, Receiver, event, place, script_command

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = "demo preview install doctor sent report flush uninstall"
SHAPES = {
    "text": "line_of_text",
    "identifier, also `@ [ ]`": "model_name",
    "identifier, also `/`": "branch_name",
    "12 hex digits": "identifier",
    "lower-case code": "error_code",
    "name → number": "counts",
    "model → numbers": "counts_by_model",
}
VERDICTS = {
    "delivered": "DELIVERED",
    "kept; next try after 2 s to 15 min": "NOT_NOW RETRY",
    "kept; next try after 8 min to 6 h": "HOLD",
    "refused": "REFUSED",
}
posix = pytest.mark.skipif(os.name != "posix", reason="a terminal, a HOME, sh")


def table(title: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its head; their cells."""
    section = README.partition(f"\n## {title}\n")[2]
    rows = re.split(r"\n(?!\|)", section.partition("\n| --- |")[2])[0]
    return [row[2:-2].split(" | ") for row in rows.splitlines()[1:]]


def marked(text: str) -> list[str]:
    """What stands in back quotes."""
    return re.findall(r"`(.+?)`", text)


def shell(begin: str) -> list[str]:
    """The block of shell that follows `begin`, as a command."""
    text = README.partition(begin)[2].partition("```sh\n")[2].partition("\n```")[0]
    return ["/bin/sh", "-c", text]


def test_it_is_short() -> None:
    """It has at most 250 lines of at most 100 columns, and 1,900 words."""
    lines = README.splitlines()
    assert len(lines) <= 250
    assert len(README.split()) <= 1900
    assert [line for line in lines if len(line) > 100] == []


def test_its_links_lead_somewhere() -> None:
    """Every relative link names a file of this repository or a heading."""
    headings = re.findall("(?m)^#+ (.*)", re.sub("[^\\w\n #-]", "", README.lower()))
    for link in re.findall(r"\]\(([^)]+)\)", README):
        known = "://" in link or link[1:].replace("-", " ") in headings
        assert known or (ROOT / link).exists(), link


@posix
@pytest.mark.parametrize("name", ["demo", "report"])
def test_the_pictures_are_real(name: str, home: Home) -> None:
    """Each picture is a command's own output, 20 lines at most, nothing cut off."""
    import picture

    kept = (ROOT / ".github" / f"{name}.svg").read_text("utf-8")
    new = picture.drawn(getattr(picture, name)(str(home.path)))
    texts = [html.unescape(re.sub("<.*?>", "", svg)) for svg in (kept, new)]
    assert max(map(len, texts[0].splitlines())) <= picture.COLUMNS
    for varies in (r'"\S*/tmp\S*"', r"[0-9a-f]{12,}|[\d.]+", r"\s+"):
        texts = [re.sub(varies, " N ", text) for text in texts]
    assert texts[0] == texts[1]
    assert kept.count("<text") <= 20


def test_the_fields_are_the_gates(script: ModuleType) -> None:
    """The table of what is sent is the gate's, shapes too; so is the sample ping."""
    told = {}
    for names, shape, _ in table("What is sent"):
        shown = getattr(script, SHAPES.get(shape, shape))
        told.update(dict.fromkeys(marked(names), shown))
    assert told == script.GATE
    ping = json.loads(README.partition("```json\n")[2].partition("```")[0])
    assert script.gate(ping) == ping
    assert sum(ping.get(name, 0) for name in script.TOKENS) == 2 * ping["total_tokens"]


def test_the_variables_are_the_scripts(script: ModuleType) -> None:
    """Each variable of --help is in the table, with its default; so are trackers'."""
    rows = {marked(row[0])[0]: "".join(marked(row[1])) for row in table("Settings")}
    documented = re.findall(r"(?m)^    (TELEMHQ_\w+)", str(script.__doc__))
    assert sorted(rows) == sorted(documented)
    assert {**vars(script.Settings(rows)), "environ": {}} == vars(script.Settings({}))
    for kind, tracker in script.TRACKERS.items():
        assert {kind, *tracker.variables} <= set(marked(README))


def test_the_answers_become_what_it_says(script: ModuleType) -> None:
    """Of each HTTP status the table of answers says what becomes of the ping."""
    told: dict[int, list[str]] = {}
    for answers, becomes in table("Offline"):
        names = VERDICTS[becomes.partition(":")[0]].split()
        for hundred, a, b in re.findall(r"(\d)xx|(\d{3})(?: to (\d+))?", answers):
            first, last = int(a or hundred + "00"), int(b or a or hundred + "99")
            for status in range(first, last + 1):
                told.setdefault(status, [getattr(script, name) for name in names])
    assert sorted(told) == [*range(200, 600)]
    assert [n for n in told if script.verdict_of(n) not in told[n]] == []


def test_its_figures_are_the_scripts(script: ModuleType) -> None:
    """Lines (rounded to hundreds), bounds and times are those of the script."""
    source = SCRIPT.read_text("utf-8")
    upper = source.partition("# -- Outbox")[0]
    first, lines = (round(text.count("\n"), -2) for text in (upper, source))
    for figure in (
        f"{lines:,} lines, of which the first {first:,} decide what leaves",
        f"events for {script.LINGER_S:.0f} s",
        f"seconds for a socket; {script.DEADLINE:.0f} times as long",
        f"{script.FOREGROUND_S:.0f} s at most",
        f"more than {script.OUTBOX_MAX_PINGS:,}",
        f"2 s to {script.BACKOFF_MAX_S / 60:.0f} min",
        f"{script.HOLD_S[0] / 120:.0f} min to {script.HOLD_S[1] / 3600:.0f} h",
        f"newest {script.REFUSED_MAX_PINGS} that",
        f"newest {script.ACCOUNTS_MAX} sessions",
        f"Claude Code {'.'.join(map(str, script.OLDEST_CLIENT))}",
    ):
        assert figure in " ".join(README.split())
    assert (script.LIFE_S, script.DAY_S) == (60, 86400)  # "a minute", "a day"


@posix
def test_the_files_are_those_on_disk(home: Home, receiver: Receiver) -> None:
    """The table names what a session leaves; the command to watch a ping sends one."""
    claude = home.path / ".claude"
    claude.mkdir()
    (claude / "settings.json").write_text("{}\n")
    asked = script_command("install", "--yes", "--url", receiver.url)
    subprocess.run(asked, env=home.env(), check=True, stdout=subprocess.DEVNULL)
    place(home, receiver.url, 3)
    receiver.requests.clear()
    receiver.answer = lambda _: 400 if len(receiver.requests) == 1 else 200
    home.hook(event("SessionStart-startup"), receiver.url)
    home.quiet(60)
    watch = shell("To watch one real ping")
    said = subprocess.run(watch, env=home.env(), capture_output=True, check=True)
    assert b"~/.claude/settings.json" in said.stderr
    assert receiver.pings[-1]["session_id"] == "test"
    found = [*claude.glob("*"), *claude.glob("hooks/*"), *home.destination().glob("*")]
    told = {name.strip("/") for row in table("Files") for name in marked(row[0])}
    names = {name.rpartition("/")[2] for name in told if not name.endswith(".1")}
    assert names - {"<destination>"} == {p.name for p in found} - {"hooks", "telemhq"}


def test_every_option_that_is_named_exists(home: Home) -> None:
    """Each command is named, and with options that it has."""
    for name in COMMANDS.split():
        told = subprocess.check_output(script_command(name, "--help"), env=home.env())
        named = re.findall(rf"`{name}[^`]* (--[a-z-]+)", README)
        assert set(named) <= set(told.decode().split())
        assert f"`{name}" in README or name == "demo"


@posix
def test_the_commands_between_marks_work(home: Home) -> None:
    """The demo runs as it stands, without a URL; the tests' command is one of sh."""
    sh, _, demo = shell("<!-- demo -->")
    shown = subprocess.check_output([sh, "-c", demo], cwd=str(ROOT), env=home.env())
    assert b"left {" in shown
    subprocess.run([sh, "-nc", shell("<!-- tests -->")[2]], check=True)
