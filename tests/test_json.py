"""JSON and hashes without their cost: the same results as the public modules'."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys

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
    *("NaN", "Infinity", "-Infinity", "9007199254740993"),
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
    Written is compact ASCII, byte for byte. Texts, and those with one character
    dropped, doubled or exchanged, are read as json reads them. Absurd nesting is no
    crash."""
    need_cpython(python)
    texts = list(TEXTS)
    for text in TEXTS:
        for at in range(len(text)):
            middles = ("", text[at] * 2, *'{}[]",:\\0u-.e \0')
            texts += [text[:at] + middle + text[at + 1 :] for middle in middles]
    done = subprocess.run(
        [python, "-I", "-S", "-c", FRESH, str(SCRIPT.parent)],
        input=ascii([VALUES, SIZES, texts]).encode(),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    written, hashes, read, deep = ast.literal_eval(done.stdout.decode())
    assert written == [json.dumps(value, separators=(",", ":")) for value in VALUES]
    assert hashes == [hashlib.sha256(b"x" * size).hexdigest() for size in SIZES]
    assert dict(zip(texts, read)) == {text: outcome(text) for text in texts}
    assert deep == ["ValueError"] * 2


# -- CPython's private modules, as they may be in a future Python ----------------------

# The public ones are those of that Python: they go on working, so they are imported
# before.
PUBLIC = "import hashlib, hmac, json\n"
GONE = "sys.modules.update(dict.fromkeys(('_json', '_sha2', '_sha256')))\n"
REPLACED = """
import hashlib, hmac, json, types
def private(*_, **__):
    {}
for name in ("_json", "_sha2", "_sha256"):
    sys.modules[name] = module = types.ModuleType(name)
    module.make_scanner = module.encode_basestring_ascii = module.sha256 = private
    module.make_encoder = private
"""
SCANNER = """
import hashlib, hmac, json, _json
real = _json.make_scanner
def make_scanner(context):
    scan = real(context)
    {}
_json.make_scanner = make_scanner
"""
FUTURES = {
    "gone": PUBLIC + GONE,
    "gone for all": GONE,
    "raising": REPLACED.format("raise SystemError"),
    "a scanner that asks for more": SCANNER.format("return context.what_3_19_has"),
    "asks later": SCANNER.format("return lambda *_: context.what_3_19_has"),
    "another answer": SCANNER.format("return lambda *_: None"),
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
