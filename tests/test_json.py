"""JSON and hashes without their cost: the same results as the public modules'."""

from __future__ import annotations

import ast
import hashlib
import hmac
import json
import random
import subprocess
import sys
from types import ModuleType
from typing import Any, Callable

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

GOOD = (
    "{}",
    "[]",
    '""',
    "0",
    "-1",
    "1.5e3",
    "-0.0",
    "true",
    "false",
    "null",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "9007199254740993",
    "9999999999999999999",
    '{"a":{"b":[1,2.5,"x",null,true,{}]},"c":"d"}',
    ' \t\r\n{"a": 1}\r\n',
    '{"a":1,"a":2}',
    '"\\u00e9 \\ud83d\\ude00 \\ud800 \\" \\\\ \\/ \\b\\f\\n\\r\\t"',
    '"é 😀 \x7f \u2028"',
    '"a raw \t tab and \n newline"',
    "[" * 50 + "]" * 50,
    "[1] and what follows",
)
BAD = (
    "",
    " ",
    "nope",
    "{",
    "[1,",
    '{"a"}',
    '{"a":}',
    '{"a":1,}',
    "{1:2}",
    '"open',
    '"\\x"',
    '"\\u12"',
    "'a'",
    "-",
    "+1",
    "nul",
    "\x00",
    "\ufeff{}",
    "<html>",
)
VALUES: tuple[object, ...] = (
    {},
    [],
    "",
    0,
    -1,
    1.5,
    1e-7,
    1e22,
    2**60,
    True,
    False,
    None,
    {"a": {"b": [1, 2.5, "x", None, True, {}]}, "c": "d"},
    (1, (2, "3")),
    'é 😀 \ud800 " \\ / \b\f\n\r\t\x00\x1f\x7f\u2028',
    {"ключ": ["значение"]},
)


def public_decode(text: str) -> Any:
    """What the public module makes of the value that `text` begins with."""
    return json.JSONDecoder(strict=False).raw_decode(text.strip())[0]


def outcome(decode: Callable[[str], Any], text: str) -> str:
    """The value (as repr: NaN is not equal to itself), or that there is none."""
    try:
        return repr(decode(text))
    except ValueError:
        return "ValueError"
    except RecursionError:
        return "RecursionError"


def random_value(dice: random.Random, depth: int = 0) -> Any:
    """A random JSON value of every type, strings of every plane and lone surrogates."""
    kind = dice.randrange(9 if depth < 4 else 7)
    if kind < 3:
        letters = '"\\/\b\n\t\x00\x1f\x7faZ09 é€\u2028\ud800\udfff😀'
        return "".join(dice.choice(letters) for _ in range(dice.randrange(12)))
    if kind < 5:
        return dice.choice(
            (0, -1, dice.randrange(10**18), dice.uniform(-1e9, 1e9), 1e-300)
        )
    if kind < 7:
        return dice.choice((True, False, None))
    count = dice.randrange(5)
    if kind == 7:
        return [random_value(dice, depth + 1) for _ in range(count)]
    return {f"k{i} é": random_value(dice, depth + 1) for i in range(count)}


def spoilt(dice: random.Random, text: str) -> str:
    """`text` with one character dropped, doubled or exchanged."""
    if not text:
        return text
    at = dice.randrange(len(text))
    middle = dice.choice(("", text[at] * 2, dice.choice('{}[]",:\\0u-.e \x00')))
    return text[:at] + middle + text[at + 1 :]


@pytest.mark.parametrize("text", GOOD)
def test_a_good_text_gives_what_the_json_module_gives(
    script: ModuleType, text: str
) -> None:
    """Every kind of JSON value is read as json reads it, lone surrogates included."""
    assert outcome(script.decode_json, text) == repr(public_decode(text))


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_json_is_a_value_error(script: ModuleType, text: str) -> None:
    """Text that begins with no JSON value raises ValueError, as in the json module."""
    with pytest.raises(ValueError):
        public_decode(text)
    with pytest.raises(ValueError):
        script.decode_json(text)


def test_thousands_of_random_texts_are_read_alike(script: ModuleType) -> None:
    """Random values and spoilt texts of them read exactly as the json module reads."""
    dice = random.Random(20)
    for _ in range(3000):
        text = json.dumps(
            random_value(dice),
            ensure_ascii=dice.random() < 0.5,
            indent=dice.choice((None, 1)),
        )
        for candidate in (text, spoilt(dice, text)):
            expected = outcome(public_decode, candidate)
            assert outcome(script.decode_json, candidate) == expected, candidate


@pytest.mark.parametrize("digits", [20, 400, 5000, 100000])
def test_an_integer_beyond_every_count_is_no_number(
    script: ModuleType, digits: int
) -> None:
    """An absurdly long integer costs no time and no error: it counts as null."""
    text = '{"a": %s, "b": 1}' % ("9" * digits)
    assert script.decode_json(text) == {"a": None, "b": 1}


@pytest.mark.parametrize("text", ["[" * 300000, '{"a":' * 300000], ids=("list", "dict"))
def test_absurd_nesting_is_an_error_that_can_be_caught(
    script: ModuleType, text: str
) -> None:
    """Nesting beyond the interpreter's depth raises, it does not crash."""
    with pytest.raises((RecursionError, ValueError)):
        script.decode_json(text)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_is_written_as_the_json_module_writes_it(
    script: ModuleType, value: object
) -> None:
    """Every kind of value becomes the bytes of json.dumps, compact and ASCII."""
    written = script.encode_json(value)
    assert written == json.dumps(value, separators=(",", ":"))
    assert written.isascii()


def test_thousands_of_random_values_are_written_alike(script: ModuleType) -> None:
    """Random values are written byte for byte as the json module writes them."""
    dice = random.Random(21)
    for _ in range(3000):
        value = random_value(dice)
        expected = json.dumps(value, separators=(",", ":"))
        assert script.encode_json(value) == expected


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 1000, 1 << 20])
def test_sha256_is_hashlibs(script: ModuleType, size: int) -> None:
    """The hash is SHA-256, at every length at which its padding changes."""
    raw = random.Random(size).getrandbits(8 * size + 1).to_bytes(size + 1, "big")[:size]
    assert script.sha256_hex(raw) == hashlib.sha256(raw).hexdigest()


PATHS = (
    "/home/dev/acme/api",
    "",
    "/é/😀",
    "/bad\udcff",
    "/lone\ud800",
    "C:\\x",
    "/\x00",
)


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_a_path_hash_is_the_first_12_hex_of_its_sha256(
    script: ModuleType, path: str
) -> None:
    """Without a key a path's hash can be reproduced by anyone who knows the path."""
    raw = path.encode("utf-8", "surrogatepass")
    assert script.path_hash(path, "") == hashlib.sha256(raw).hexdigest()[:12]


@pytest.mark.parametrize(
    "key", [b"k", b"x" * 200, "ключ".encode(), b"\xff\xfe"], ids=repr
)
@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_a_path_hash_under_a_key_is_an_hmac(
    script: ModuleType, path: str, key: bytes
) -> None:
    """Under a key the hash is HMAC-SHA-256 with the variable's own bytes as the key."""
    raw = path.encode("utf-8", "surrogatepass")
    expected = hmac.new(key, raw, "sha256").hexdigest()[:12]
    assert script.path_hash(path, key.decode("utf-8", "surrogateescape")) == expected


FRESH = r"""
import sys
exec(sys.argv[2])
sys.path.insert(0, sys.argv[1])
import telemhq_ping as script

def outcome(text):
    try:
        return repr(script.decode_json(text))
    except ValueError:
        return "ValueError"
    except RecursionError:
        return "RecursionError"

values, good, bad = eval(sys.stdin.read())
found = [
    [script.encode_json(value) for value in values],
    [script.sha256_hex(b"x" * size) for size in (0, 64, 1000)],
    [outcome(text) for text in good],
]
loaded = sorted({"json", "re", "hashlib"} & set(sys.modules))
found += [[outcome(text) for text in bad], outcome("[" * 300000), loaded]
print(ascii(found))
"""
# How CPython's private modules may be in a future Python. The public ones are those of
# that Python: they go on working, so they are imported before.
PUBLIC = "import hashlib, hmac, json, sys, types"
FUTURES = {
    "gone": PUBLIC
    + """
for name in ("_json", "_sha2", "_sha256"):
    sys.modules[name] = None
""",
    "gone for the public modules too": """
import sys
for name in ("_json", "_sha2", "_sha256"):
    sys.modules[name] = None
""",
    "lacking names": PUBLIC
    + """
for name in ("_json", "_sha2", "_sha256"):
    sys.modules[name] = types.ModuleType(name)
""",
    "raising at the import": PUBLIC
    + """
class Finder:
    def find_spec(name, path=None, target=None):
        if name in ("_json", "_sha2", "_sha256"):
            raise RuntimeError("private")
sys.meta_path.insert(0, Finder)
for name in ("_json", "_sha2", "_sha256"):
    sys.modules.pop(name, None)
""",
    "raising at the call": PUBLIC
    + """
def private(*_, **__):
    raise SystemError("private")
for name in ("_json", "_sha2", "_sha256"):
    sys.modules[name] = module = types.ModuleType(name)
    module.make_scanner = module.encode_basestring_ascii = module.sha256 = private
""",
    "called otherwise": PUBLIC
    + """
def private(*, what):
    return what
for name in ("_json", "_sha2", "_sha256"):
    sys.modules[name] = module = types.ModuleType(name)
    module.make_scanner = module.encode_basestring_ascii = module.sha256 = private
""",
    "a scanner that asks for more": PUBLIC
    + """
import _json
real = _json.make_scanner
class Scanner:
    def __init__(self, context):
        self.scan = real(context)
        context.what_3_19_has  # as 3.15 began to ask for array_hook
    def __call__(self, *arguments):
        return self.scan(*arguments)
_json.make_scanner = Scanner
""",
    "a scanner that asks for more at its call": PUBLIC
    + """
import _json
real = _json.make_scanner
class Scanner:
    def __init__(self, context):
        self.context, self.scan = context, real(context)
    def __call__(self, *arguments):
        self.context.what_3_19_has
        return self.scan(*arguments)
_json.make_scanner = Scanner
""",
    "a scanner with another answer": PUBLIC
    + """
import _json
_json.make_scanner = lambda context: lambda text, at: None
""",
}


def in_a_fresh_interpreter(python: str, patch: str = "") -> Any:
    """What a hook's own interpreter makes of the tables: json was never imported."""
    done = subprocess.run(
        [python, "-I", "-S", "-c", FRESH, str(SCRIPT.parent), patch],
        input=ascii([VALUES, GOOD, BAD]).encode(),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    written, hashes, good, bad, deep, loaded = ast.literal_eval(done.stdout.decode())
    assert written == [json.dumps(value, separators=(",", ":")) for value in VALUES]
    assert hashes == [hashlib.sha256(b"x" * n).hexdigest() for n in (0, 64, 1000)]
    assert good == [outcome(public_decode, text) for text in GOOD]
    assert dict(zip(BAD, bad)) == dict.fromkeys(BAD, "ValueError")
    assert deep in ("RecursionError", "ValueError")
    return loaded


@pytest.mark.parametrize("python", pythons())
def test_every_python_reads_and_writes_alike(python: str) -> None:
    """Each CPython, in a process where nobody imported json before us, agrees with it.

    CPython's accelerator finds its own error class only where json is loaded already.
    """
    need_cpython(python)
    assert in_a_fresh_interpreter(python) == []


@pytest.mark.parametrize("future", FUTURES)
@pytest.mark.parametrize("python", pythons())
def test_without_the_private_modules_the_public_ones_give_the_same(
    python: str, future: str
) -> None:
    """Where CPython's private modules are gone or have changed, nothing else does."""
    need_cpython(python)
    assert in_a_fresh_interpreter(python, FUTURES[future])


@pytest.mark.parametrize("future", FUTURES)
def test_hook_and_sender_work_by_the_public_modules(
    home: Home, receiver: Receiver, future: str
) -> None:
    """In a Python of the future an event becomes the same ping, and is delivered."""
    need_cpython(sys.executable)
    path = only_enqueue(home, receiver.url, event("Stop"))
    today = json.loads(path.read_text("ascii"))
    alone = FUTURES[future] + "\nos.posix_spawn = lambda *_, **__: 0"
    done = patched(home, alone, url=receiver.url, sent=event("Stop"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (path,) = set(home.waiting()) - {path}
    tomorrow = json.loads(path.read_text("ascii"))
    for name in ("event_id", "timestamp"):
        assert tomorrow["ping"].pop(name) != today["ping"].pop(name)
    assert tomorrow["ping"].pop("event_bytes") == today["ping"].pop("event_bytes")
    assert tomorrow == today
    done = run_sender(home, receiver.url, FUTURES[future])
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert len(receiver.requests) == 2
    assert home.waiting() == []


@pytest.mark.parametrize("text", ["", "nope", "{", '{"a":1,}', '"open', '"\\x"'])
def test_a_hook_tells_bad_json_from_an_error_of_its_own(home: Home, text: str) -> None:
    """What is no JSON is named as that in debug mode, in a real hook's process."""
    done = home.hook(text.encode(), "http://127.0.0.1:9/ping/x", TELEMHQ_HOOK_DEBUG="1")
    assert b"TelemHQ hook skipped: stdin" in done.stderr
    assert b"Error" not in done.stderr
