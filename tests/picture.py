"""Draw .github/*.svg, for the README: what commands print at a terminal of POSIX."""

from __future__ import annotations

import contextlib
import html
import json
import os
import pathlib
import pty
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "telemhq_ping.py"
COLUMNS, CHAR_PX, LINE_PX = 80, 8.2, 18
SVG = """<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve"
 width="{0}" height="{1}" viewBox="0 0 {0} {1}"><style>
text {{ white-space: pre; fill: #e6edf3;
  font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }}
.gone {{ text-decoration: line-through; fill: #8b949e }}
</style><rect width="100%" height="100%" rx="8" fill="#0d1117"/>
"""
KINDS = "input_tokens output_tokens cached_input_tokens cache_creation_input_tokens"
USED = (  # day, model, turns, the tokens of each by kind, dollars
    ("2026-11-19", "claude-opus-5-5", 31, (61, 4587, 200335, 12963), 3.91),
    ("2026-11-20", "claude-opus-5-5", 18, (50, 4451, 172233, 11685), 2.05),
    ("2026-11-20", "claude-haiku-4-5", 9, (44, 3465, 100233, 9780), 0.22),
)


def at_terminal(home: str, command: str) -> str:
    """What a command of the script prints at a terminal; it must end with 0."""
    ours, theirs = pty.openpty()
    env = {"HOME": home, "COLUMNS": str(COLUMNS), "TZ": "UTC", "LANG": "C.UTF-8"}
    words = [sys.executable, str(SCRIPT), *command.split()]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, env=env)
    os.close(theirs)
    printed, part = b"", b"-"
    with contextlib.suppress(OSError):  # Linux's word for the end
        while part:
            part = os.read(ours, 65536)
            printed += part
    os.close(ours)
    assert process.wait(60) == 0
    return printed.decode().replace("\r\n", "\n")


def demo(home: str) -> str:
    """The demo's first event, and what its marks mean."""
    begin, first, *_, marks, _ = at_terminal(home, "demo").split("\n\n")
    return f"{begin}\n\n{first}\n\n{marks}\n"


def report(home: str) -> str:
    """What `report` makes of two days' pings."""
    pings: list[dict[str, object]] = []
    for day, model, turns, tokens, cost in USED:
        ping = {"timestamp": f"{day}T10:00:00.000Z", "model": model, "event": "Stop"}
        used = {**dict(zip(KINDS.split(), tokens)), "total_tokens": sum(tokens)}
        for n in range(turns):
            turn = {"status": "failed" if n == 4 else "success", "tool_calls": n % 7}
            pings.append({**ping, **used, **turn, "tool_failures": n % 6 // 5})
        pings.append({**ping, "event": "SessionEnd", "cost_usd": cost})
    lines = [json.dumps({"ping": {**p, "event_id": n}}) for n, p in enumerate(pings)]
    directory = pathlib.Path(home, ".claude", "telemhq", "telemhq-0123456789ab")
    (directory / "outbox").mkdir(parents=True)
    (directory / "sent.jsonl").write_text("\n".join(lines))
    asked = ("report", "report --by model")
    return "\n".join(f"$ {SCRIPT.name} {a}\n{at_terminal(home, a)}" for a in asked)


def drawn(text: str) -> str:
    """A text as an SVG; what is marked as gone is struck out."""
    text = html.escape(text.rstrip("\n"), quote=False)
    text = re.sub(r"~~(.+?)~~", r'~~<tspan class="gone">\1</tspan>~~', text)
    lines = text.split("\n")
    found = SVG.format(round((COLUMNS + 4) * CHAR_PX), (len(lines) + 2) * LINE_PX)
    for n, line in enumerate(lines, 2):
        found += f'<text x="16" y="{n * LINE_PX - 5}">{line}</text>\n'
    return found + "</svg>\n"


if __name__ == "__main__":
    for show in (demo, report):
        with tempfile.TemporaryDirectory() as top:
            picture = drawn(show(top))
        (ROOT / ".github" / f"{show.__name__}.svg").write_text(picture, "utf-8")
