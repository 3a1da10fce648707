"""JSON and hashes without their cost: the same results as the public modules'."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from support import (
    SCRIPT,
    Home,
    Receiver,
    event,
    need_cpython,
    only_enqueue,
    patched,
    pythons,
    run_sender,
)

TEXTS = (
    *("{}", "[]", '""', "0", "-1", "1.5e3", "-0.0", "true", "false", "null", "1e400"),
    *("NaN", "Infinity", "-Infinity", "9007199254740993", "9999999999999999999"),
    '{"a":{"b":[1,2.5,"x",null,true,{}]},"c":"d"}',
    ' \t\r\n{"a": 1, "a": 2}\r\n',
    '"\\u00e9 \\ud83d\\ude00 \\ud800 \\" \\\\ \\/ \\b\\f\\n\\r\\t"',
    '"é 😀 \x7f \u2028 a raw \t tab and \n newline"',
    "[1] and what follows",
    # and what is none
    *("", " ", "nope", "{", "[1,", '{"a"}', '{"a":}', '{"a":1,}', "{1:2}", '"open'),
    *('"\\x"', '"\\u12"', "'a'", "-", "+1", "nul", "\x00", "\ufeff{}", "<html>"),
)
VALUES: tuple[object, ...] = (
    *({}, [], "", 0, -1, 1.5, 1e-7, 1e22, 2**60, True, False, None),
    *((1, (2, "3")), {"ключ": [{"a": [1, 2.5, "x", None, True, {}]}]}),
    'é 😀 \ud800 " \\ / \b\f\n\r\t\x00\x1f\x7f\u2028',
)
SIZES = (0, 1, 55, 56, 63, 64, 65, 119, 1000, 1 << 20)  # where its padding changes


def outcome(text: str) -> str:
    """What the public module makes of the value that a text begins with (as repr: NaN
    is not equal to itself), or that there is none."""
    try:
        return repr(json.JSONDecoder(strict=False).raw_decode(text.strip())[0])
    except ValueError:
        return "ValueError"


def random_value(dice: random.Random, depth: int = 0) -> Any:
    """A random JSON value of every type, strings of every plane and lone surrogates."""
    kind = dice.randrange(6 if depth < 4 else 4)
    if kind < 2:
        letters = '"\\/\b\n\t\x00\x1f\x7faZ09 é€\u2028\ud800\udfff😀'
        return "".join(dice.choice(letters) for _ in range(dice.randrange(12)))
    if kind == 2:
        numbers = (0, -1, dice.randrange(10**18), dice.uniform(-1e9, 1e9), 1e-300)
        return dice.choice(numbers)
    if kind == 3:
        return dice.choice((True, False, None))
    found = [random_value(dice, depth + 1) for _ in range(dice.randrange(5))]
    return found if kind == 4 else {f"k{i} é": value for i, value in enumerate(found)}


@pytest.mark.parametrize("digits", [20, 400, 5000, 100000])
def test_an_integer_beyond_every_count_is_no_number(
    script: ModuleType, digits: int
) -> None:
    """An absurdly long integer costs no time and no error: it counts as null."""
    text = '{"a": %s, "b": 1}' % ("9" * digits)
    assert script.decode_json(text) == {"a": None, "b": 1}


FRESH = r"""
import sys
sys.path.insert(0, sys.argv[1])
import telemhq_ping as script

def outcome(text):
    try:
        return repr(script.decode_json(text))
    except ValueError:
        return "ValueError"

values, sizes, texts = eval(sys.stdin.read())
written = [script.encode_json(value) for value in values]
hashes = [script.sha256_hex(b"x" * size) for size in sizes]
read = [outcome(text) for text in texts]
deep = [outcome(text * 300000) for text in ("[", '{"a":')]
print(ascii([written, hashes, read, deep]))
"""


@pytest.mark.parametrize("python", pythons())
def test_every_python_reads_and_writes_alike(python: str) -> None:
    """Each CPython, in a process where nobody imported json before us, agrees with it.
    Written is compact ASCII, byte for byte; whole texts,
    and those with one character dropped, doubled or exchanged, are read as json reads
    them. Absurd nesting is no crash."""
    need_cpython(python)
    dice = random.Random(20)
    values, texts = [*VALUES], [*TEXTS]
    for _ in range(1000):
        values.append(random_value(dice))
        text = json.dumps(values[-1], ensure_ascii=dice.random() < 0.5, indent=1)
        at = dice.randrange(len(text))
        middle = dice.choice(("", text[at] * 2, dice.choice('{}[]",:\\0u-.e \x00')))
        texts += [text, text[:at] + middle + text[at + 1 :]]
    done = subprocess.run(
        [python, "-I", "-S", "-c", FRESH, str(SCRIPT.parent)],
        input=ascii([values, SIZES, texts]).encode(),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    written, hashes, read, deep = ast.literal_eval(done.stdout.decode())
    assert written == [json.dumps(value, separators=(",", ":")) for value in values]
    assert hashes == [hashlib.sha256(b"x" * size).hexdigest() for size in SIZES]
    assert dict(zip(texts, read)) == {text: outcome(text) for text in texts}
    assert deep == ["ValueError"] * 2


# -- CPython's private modules, as they may be in a future Python ----------------------

# The public ones are those of that Python: they go on working, so they are imported
# before.
NAMES = "('_json', '_sha2', '_sha256')"
PUBLIC = "import hashlib, hmac, json, sys, types\n"
REPLACED = (
    PUBLIC
    + """
{}
for name in ("_json", "_sha2", "_sha256"):
    sys.modules[name] = module = types.ModuleType(name)
    module.make_scanner = module.encode_basestring_ascii = module.sha256 = private
"""
)
SCANNER = (
    PUBLIC
    + """
import _json
real = _json.make_scanner
class Scanner:
    def __init__(self, context):
        self.context, self.scan = context, real(context)
        {}
    def __call__(self, *arguments):
        {}
        return self.scan(*arguments)
_json.make_scanner = Scanner
"""
)
FUTURES = {
    "gone": f"{PUBLIC}for name in {NAMES}:\n    sys.modules[name] = None",
    "gone for all": f"import sys\nfor name in {NAMES}:\n    sys.modules[name] = None",
    "raising": REPLACED.format("def private(*_, **__):\n    raise SystemError"),
    "called otherwise": REPLACED.format("def private(*, what):\n    return what"),
    "a scanner that asks for more": SCANNER.format("context.what_3_19_has", "pass"),
    "asks for it later": SCANNER.format("pass", "self.context.what_3_19_has"),
    "another answer": PUBLIC
    + "import _json\n_json.make_scanner = lambda context: lambda text, at: None",
}


@pytest.mark.fault(71)
@pytest.mark.parametrize("future", FUTURES)
def test_hook_and_sender_work_by_the_public_modules(
    home: Home, receiver: Receiver, future: str
) -> None:
    """In a Python of the future an event becomes the same ping, and is delivered."""
    need_cpython(sys.executable)
    path = only_enqueue(home, receiver.url, event("Stop"))
    alone = FUTURES[future] + "\nos.posix_spawn = lambda *_, **__: 0"
    done = patched(home, alone, url=receiver.url, sent=event("Stop"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (other,) = set(home.waiting()) - {path}
    today, tomorrow = (json.loads(p.read_text("ascii")) for p in (path, other))
    for name in ("event_id", "timestamp"):
        assert tomorrow["ping"].pop(name) != today["ping"].pop(name)
    assert tomorrow == today
    done = run_sender(home, receiver.url, FUTURES[future])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert len(receiver.requests) == 2
    assert home.waiting() == []
