"""The README says what the script does: picture, sample, options, files, links."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support import ROOT, SCRIPT, Home, Receiver, event, place, wait_until

if TYPE_CHECKING:
    from types import ModuleType

README = (ROOT / "README.md").read_text("utf-8")
PICTURE = ROOT / ".github" / "demo.svg"


def masked(text: str) -> str:
    """A text without what differs from run to run: numbers, ids, times."""
    text = re.sub(r"\"?(/[\w.-]*)?/tmp\w*[^\s\"]*", "PATH", text)
    text = re.sub(r"\x1b\[[\d;]*m|~~", "", text)
    text = re.sub(r"[0-9a-f]{12,}|[\d.]+", "N", text)
    return " ".join(text.split())


@pytest.mark.skipif(os.name != "posix", reason="draws at a terminal")
def test_the_picture_shows_what_the_demo_prints() -> None:
    """The picture in the README is the demo's own output, but for numbers and ids."""
    printed = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "picture.py"), "/dev/stdout", "demo"],
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    ).stdout.decode()

    def words(picture: str) -> str:
        rows = re.findall(r"(?s)<text[^>]*>(.*?)</text>", picture)
        lines = [html.unescape(re.sub(r"<[^>]*>", "", row)) for row in rows]
        return masked("\n".join(lines))

    assert words(PICTURE.read_text("utf-8")) == words(printed)
    assert len(words(printed)) > 500
    assert "](.github/demo.svg)" in README


def test_the_sample_ping_would_pass_the_gate(script: ModuleType) -> None:
    """The sample in the README has fields of the gate only, each in its shape."""
    (sample,) = re.findall(r"(?s)```json\n(\{.*?\})\n```", README)
    ping = json.loads(sample)
    assert script.gate(ping) == ping
    names = ("input", "output", "cached_input", "cache_creation_input")
    assert ping["total_tokens"] == sum(ping[f"{name}_tokens"] for name in names)


def test_every_command_and_option_that_is_named_exists(home: Home) -> None:
    """`command --option` in the README is one that the script knows."""
    commands = [
        "demo",
        "preview",
        "install",
        "doctor",
        "sent",
        "report",
        "flush",
        "uninstall",
    ]
    known = {}
    for command in commands:
        told = subprocess.run(
            [sys.executable, str(SCRIPT), command, "--help"],
            stdout=subprocess.PIPE,
            env=home.env(),
            timeout=30,
            check=True,
        ).stdout.decode()
        known[command] = set(re.findall(r"(?<!\w)-{1,2}[a-z][\w-]*", told))
        assert re.search(rf"\b{command}\b", README), command
    prose = re.sub(r"(?s)\n```.*?\n```", "", README)
    spans = re.findall(r"`([^`]+)`", " ".join(prose.split()))
    checked = 0
    for span in spans:
        words = span.split()
        for command in commands:
            if command in words and words[0] not in ("claude", "cd"):
                behind = words[words.index(command) + 1 :]
                options = {word for word in behind if word.startswith("-")}
                assert options <= known[command], span
                checked += len(options)
    assert checked >= 8


@pytest.mark.skipif(os.name != "posix", reason="needs the background sender here")
def test_the_table_of_files_is_what_is_on_disk(home: Home, receiver: Receiver) -> None:
    """Each file that a destination gets has a row in the README's table."""
    section = README.split("\n## Files\n")[1].split("\n## ")[0]
    cells = re.findall(r"(?m)^\| (.*?) \|", section)
    named = {name.rstrip("/") for cell in cells for name in re.findall("`(.+?)`", cell)}
    place(home, receiver.url, 3)
    receiver.answer = lambda _: 400 if len(receiver.requests) == 1 else 200
    for name in ("SessionStart-startup", "Stop"):
        home.hook(event(name), receiver.url)
    wait_until(lambda: not home.waiting(), 30)
    home.quiet(30)
    found = {path.name for path in home.destination().iterdir()}
    assert found <= named
    kept = {"outbox", "refused", "accounts", "state.json", "lock", "sent.jsonl"}
    assert found >= kept


def test_its_links_lead_somewhere() -> None:
    """Every relative link of the README names a file of this repository."""
    links = re.findall(r"\]\(([^)#][^)]*)\)", README)
    local = [link for link in links if "://" not in link]
    assert len(local) >= 3
    for link in local:
        assert (ROOT / link).exists(), link
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings


def test_its_source_fits_100_columns() -> None:
    """So it can be read in an editor, beside the code."""
    assert [line for line in README.splitlines() if len(line) > 100] == []
