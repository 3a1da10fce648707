"""The script is to be read from top to bottom before it is trusted, and short."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
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


def global_names(table: symtable.SymbolTable) -> set[str]:
    """The global names that a module, or a function or class in it, refers to."""
    symbols = [found for found in table.get_symbols() if found.is_referenced()]
    own = {found.get_name() for found in symbols if found.is_global()}
    return own.union(*map(global_names, table.get_children()))


@pytest.mark.parametrize("end", [*BANNERS[1:], len(LINES)])
def test_each_section_uses_only_what_stands_above_it(end: int) -> None:
    """An auditor who has read down to a banner knows all that what stands above it can
    do: no section names a function, class or constant of one below."""
    table = symtable.symtable("\n".join(LINES[: end - 1]), SCRIPT.name, "exec")
    symbols = [s for s in table.get_symbols() if s.is_assigned() or s.is_imported()]
    known = {symbol.get_name() for symbol in symbols} | {*dir(builtins), "__file__"}
    known.add("__conditional_annotations__")  # Python's own, from 3.14 on
    assert global_names(table) - known == set()


def test_no_code_hides_in_a_text() -> None:
    """Nothing is compiled from a text, and no text spans lines but for docstrings."""
    called = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}
    assert called & {"exec", "eval", "compile", "globals"} == set()
    told = [node for node in [TREE, *definitions()] if ast.get_docstring(node)]
    assert TEXT.count('"""') == 2 * len(told) > 200
    assert "'''" not in TEXT


# All of these modules that an auditor finds above the outbox: nothing there writes,
# connects or starts anything, and one function opens one file.
PURE = {
    "os": "environ path sep urandom",
    "os.path": "basename expanduser isabs isfile join normpath split",
    "sys": "argv base_exec_prefix base_prefix flags path platform version_info",
    "time": "gmtime strftime",
    "stat": "",
    "gc": "disable",
}
OTHERS = "__future__ _json _signal datetime hashlib hmac json signal uuid"
MODULES = {*PURE, *OTHERS.split()}


def dotted(node: ast.AST) -> str:
    """`os.path` of the node that says so, "" of any other expression."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_what_leaves_is_decided_before_anything_touches_disk_or_network() -> None:
    """An auditor may stop after the trackers: up to there nothing can write a file or
    open a connection; only a worktree's .git is read, and a tracker's token's file."""
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
                assert owner not in PURE or node.attr in PURE[owner].split()
    assert opened == ["small_file"]


def test_no_trackers_name_stands_outside_of_its_section() -> None:
    """Adding a tracker touches one section: no other one knows any of them, or their
    variables. (TelemHQ's own name is the product's.)"""
    first, last = line_of("Trackers"), line_of("Outbox")
    names = re.compile(r"(?i)wigtoken|recorder|otlp|claude[-_]?metrics")
    found = [i for i, line in enumerate(LINES, 1) if names.search(line)]
    assert [i for i in found if not first < i < last] == []
    assert len(found) > 10
