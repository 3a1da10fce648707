"""The script is to be read from top to bottom before it is trusted, and short."""

from __future__ import annotations

import ast
import re
from typing import Iterator

import pytest

from support import SCRIPT

TEXT = SCRIPT.read_text("utf-8")
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
SECTIONS = (  # DESIGN's words, in the order of a ping's way
    *("JSON", "Settings", "Event -> ping", "Trackers", "Outbox", "Hook"),
    *("Transcripts", "Accounts", "Delivery", "Sender", "Commands"),
)
BANNERS = [i for i, line in enumerate(LINES, 1) if line.startswith("# -- ")]
RULERS = [i for i, line in enumerate(LINES, 1) if line.startswith("# ====")]
Definition = (ast.FunctionDef, ast.ClassDef)


def line_of(title: str) -> int:
    """The line of the first banner that begins so."""
    return next(i for i in BANNERS if LINES[i - 1].startswith(f"# -- {title}"))


def section_of(line: int) -> int:
    """The number of the section that holds a line; 0: what stands before the first."""
    return sum(1 for banner in BANNERS if banner <= line)


def definitions() -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Every function, class and method, the inner ones too."""
    return (node for node in ast.walk(TREE) if isinstance(node, Definition))


def test_each_section_has_a_banner_that_one_can_grep() -> None:
    """`grep '^# --'` lists the sections, by DESIGN's words, in the order of a ping's
    way; two more tell what runs while Claude Code waits, and what in the background."""
    firsts = [line_of(title) for title in SECTIONS]
    assert firsts == sorted(firsts)
    assert {len(LINES[i - 1]) for i in BANNERS} == {88}
    first, _, second, _ = RULERS
    assert "while Claude Code waits" in LINES[first]
    assert "run by a person" in LINES[second]
    assert line_of("Hook") < first < line_of("Transcripts")
    assert line_of("Sender") < second < line_of("Commands")


@pytest.mark.parametrize(
    "begin, end, most, nodes",
    [
        (0, RULERS[0], 1700, 0),
        (0, RULERS[2], 2850, 21000),
        (RULERS[2], len(LINES), 1200, 0),
        (0, len(LINES), 4000, 29500),
    ],
    ids=("what Claude Code waits for", "what runs by itself", "commands", "all"),
)
def test_the_file_is_short(begin: int, end: int, most: int, nodes: int) -> None:
    """Down to the first banner what Claude Code waits for, down to the second all that
    runs by itself, then the commands; nobody wins by density."""
    assert end - begin <= most
    parts = [node for node in TREE.body if begin < node.lineno < end]
    count = sum(1 for part in parts for _ in ast.walk(part))
    assert count <= nodes or not nodes


def test_each_function_can_be_seen_at_once() -> None:
    """No function has more than 40 lines, no class more than 160, and each says what it
    means (but for those within others, and methods named by Python)."""
    inner = {
        found
        for node in definitions()
        if isinstance(node, ast.FunctionDef)
        for found in ast.walk(node)
        if found is not node
    }
    long, silent = [], []
    for node in definitions():
        most = 40 if isinstance(node, ast.FunctionDef) else 160
        if (node.end_lineno or 0) - node.lineno >= most:
            long.append(f"{node.name}, line {node.lineno}")
        untold = not node.name.startswith("__") and not ast.get_docstring(node)
        if untold and node not in inner:
            silent.append(f"{node.name}, line {node.lineno}")
    assert (long, silent) == ([], [])


def names_in(node: ast.AST, load: bool) -> dict[str, int]:
    """Names that are read in a definition, or given a meaning there -> a line."""
    found: dict[str, int] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            if isinstance(inner.ctx, ast.Load) == load:
                found.setdefault(inner.id, inner.lineno)
        elif not load and isinstance(inner, ast.arg):
            found[inner.arg] = inner.lineno
        elif not load and isinstance(inner, (ast.Import, ast.ImportFrom)):
            for alias in inner.names:
                found[alias.asname or alias.name] = inner.lineno
        elif not load and isinstance(inner, ast.ExceptHandler) and inner.name:
            found[inner.name] = inner.lineno
    return found


def defined_at() -> dict[str, int]:
    """Names defined at the top level -> the line that defines them first."""
    found: dict[str, int] = {}
    for node in TREE.body:
        own = isinstance(node, Definition)
        names = {node.name: node.lineno} if own else names_in(node, load=False)  # type: ignore[attr-defined]
        for name, line in names.items():
            found.setdefault(name, line)
    return found


def test_each_section_uses_only_what_stands_above_it() -> None:
    """An auditor who has read down to a banner knows all that what stands above it can
    do: no section names a function, class or constant of one below."""
    lines = defined_at()
    wrong = []
    for node in TREE.body:
        own = names_in(node, load=False) if isinstance(node, Definition) else {}
        for name, line in names_in(node, load=True).items():
            if section_of(lines.get(name, 0)) > section_of(line) and name not in own:
                wrong.append(f"line {line}: {name}")
    assert wrong == []


def test_no_code_hides_in_a_text() -> None:
    """Nothing is compiled from a text, and no text spans lines but for docstrings."""
    called = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}
    assert called & {"exec", "eval", "compile", "globals"} == set()
    told = [node for node in [TREE, *definitions()] if ast.get_docstring(node)]
    assert TEXT.count('"""') == 2 * len(told) > 200
    assert "'''" not in TEXT


# What an auditor finds above the outbox: nothing there writes, connects or starts
# anything, and one function opens one file.
PURE = {
    "os": {"environ", "path", "sep", "urandom"},
    "os.path": {"basename", "dirname", "expanduser", "isabs", "isfile", "join"}
    | {"normpath", "realpath", "split"},
    "sys": {"argv", "base_exec_prefix", "base_prefix", "flags", "path", "platform"}
    | {"version_info"},
    "time": {"gmtime", "strftime"},
    "stat": set(),
    "gc": {"disable"},
}
MODULES = {*PURE, "__future__", "_json", "_signal", "datetime", "hashlib", "hmac"}
MODULES |= {"json", "signal"}


def dotted(node: ast.AST) -> str:
    """`os.path` of the node that says so, "" of any other expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_what_leaves_is_decided_before_anything_touches_disk_or_network() -> None:
    """An auditor may stop after the trackers: up to there nothing can write a file or
    open a connection; a worktree's .git alone is read."""
    opened = []
    for part in TREE.body:
        typing = isinstance(part, ast.If) and dotted(part.test) == "TYPE_CHECKING"
        for node in ast.walk(part) if part.lineno < line_of("Outbox") else ():
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= MODULES
            elif isinstance(node, ast.ImportFrom):
                assert node.module in MODULES or typing
            elif isinstance(node, ast.Name):
                assert node.id not in ("print", "input"), node.lineno
                opened += [getattr(part, "name", "")] if node.id == "open" else []
            elif isinstance(node, ast.Attribute):
                owner = dotted(node.value)
                assert owner not in PURE or node.attr in PURE[owner], node.lineno
    assert opened == ["main_repository"]


def test_no_trackers_name_stands_outside_of_its_section() -> None:
    """Adding a tracker touches one section: no other one knows any of them, or their
    variables. (TelemHQ's own name is the product's.)"""
    first, last = line_of("Trackers"), line_of("Outbox")
    names = re.compile(r"(?i)wigtoken|recorder|otlp|claude[-_]?metrics")
    found = [i for i, line in enumerate(LINES, 1) if names.search(line)]
    assert [i for i in found if not first < i < last] == []
    assert len(found) > 10
