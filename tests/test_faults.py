"""Each fault of faults.py has a test."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator

from faults import ELSEWHERE, FAULTS


def marked() -> Iterator[tuple[int, str]]:
    """(number, file) of every `fault(N, ...)` in the tests' source."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            if isinstance(node, ast.Call) and name == "fault":
                for number in node.args:
                    yield ast.literal_eval(number), path.name


def test_every_fault_has_a_test() -> None:
    """No row of the table is without a test, and no test names a row that is none."""
    found = dict(marked())
    missing = {n: FAULTS[n] for n in set(FAULTS) - set(found) - ELSEWHERE}
    assert missing == {}
    assert set(found) <= set(FAULTS)
