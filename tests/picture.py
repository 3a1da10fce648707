"""Draw what a command prints at a terminal as an SVG, for the README.

    python3 tests/picture.py .github/demo.svg demo

It runs `telemhq_ping.py demo` at a terminal of 88 columns. Linux or macOS.
"""

from __future__ import annotations

import html
import os
import pathlib
import pty
import re
import sys

COLUMNS, CHAR_PX, LINE_PX, MARGIN_PX = 88, 7.8, 18, 16
# Styles of the codes that the commands use (ECMA-48, SGR).
CODES = dict(zip(["1", "2", "9", "31", "32", "33", "34", "36", "90"], "bdsrgyucd"))
SHEET = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre; fill: #e6edf3 }
.b { font-weight: bold } .d { fill: #8b949e } .s { text-decoration: line-through }
.r { fill: #ff7b72 } .g { fill: #7ee787 } .y { fill: #e3b341 } .u { fill: #79c0ff }
.c { fill: #76e3ea }
"""


def run_at_terminal(arguments: list[str]) -> str:
    """What the script prints at a terminal; it must end with 0."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ.update(COLUMNS=str(COLUMNS), TERM="xterm-256color")
        os.environ.pop("NO_COLOR", None)
        script = str(pathlib.Path(__file__).resolve().parents[1] / "telemhq_ping.py")
        os.execv(sys.executable, [sys.executable, script, *arguments])
    printed, part = b"", b"-"
    while part:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux's word for the end
            break
        printed += part
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(printed.decode())
    return printed.decode().replace("\r\n", "\n")


def spans(line: str, on: set[str]) -> str:
    """A line as SVG spans. on: the styles in force, carried from line to line."""
    found = ""
    for number, part in enumerate(re.split(r"\x1b\[([\d;]*)m", line)):
        if number % 2:
            for code in part.split(";"):
                on.update(CODES.get(code, ""))
                if code not in CODES:
                    on.clear()
        elif part:
            names = f' class="{" ".join(sorted(on))}"' if on else ""
            found += f"<tspan{names}>{html.escape(part)}</tspan>"
    return found


def draw(text: str) -> str:
    """Text with colour codes as an SVG."""
    lines = text.rstrip("\n").split("\n")
    width = round(COLUMNS * CHAR_PX + 2 * MARGIN_PX)
    height = len(lines) * LINE_PX + 2 * MARGIN_PX
    rows, on = "", set("")
    for number, line in enumerate(lines):
        y = MARGIN_PX + LINE_PX * (number + 0.7)
        rows += f'<text x="{MARGIN_PX}" y="{y:.1f}">{spans(line, on)}</text>\n'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} xml:space="preserve">'
    ground = '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>'
    return f"{head}\n<style>{SHEET}</style>\n{ground}\n{rows}</svg>\n"


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(draw(run_at_terminal(sys.argv[2:])), "utf-8")
