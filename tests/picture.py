"""Draw what a command prints at a terminal as an SVG, for the README.

    python3 tests/picture.py .github/demo.svg demo

runs `telemhq_ping.py demo` at a terminal of 88 columns and draws its colours, as a
reader with a light or a dark page sees them. Linux or macOS.
"""

from __future__ import annotations

import argparse
import html
import os
import pathlib
import pty
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS, CHAR_PX, LINE_PX, MARGIN_PX = 88, 7.8, 18, 16
STYLES = {  # of the codes that the commands use (ECMA-48, SGR)
    "1": "b",
    "2": "d",
    "9": "s",
    "31": "r",
    "32": "g",
    "33": "y",
    "34": "u",
    "36": "c",
    "90": "d",
}
SHEET = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre; fill: #e6edf3 }
.b { font-weight: bold } .d { fill: #8b949e } .s { text-decoration: line-through }
.r { fill: #ff7b72 } .g { fill: #7ee787 } .y { fill: #e3b341 } .u { fill: #79c0ff }
.c { fill: #76e3ea }
"""


def run_at_terminal(*arguments: str) -> str:
    """What the script prints at a terminal; it must end with 0."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ.update(COLUMNS=str(COLUMNS), TERM="xterm-256color")
        os.environ.pop("NO_COLOR", None)
        script = str(ROOT / "telemhq_ping.py")
        os.execv(sys.executable, [sys.executable, script, *arguments])
    printed = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux's word for the end
            break
        if not part:
            break
        printed += part
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(printed.decode())
    return printed.decode().replace("\r\n", "\n")


def spans(line: str, on: set[str]) -> str:
    """A line as SVG spans. on: the styles in force, carried from line to line."""
    found = []
    for number, part in enumerate(re.split(r"\x1b\[([\d;]*)m", line)):
        if number % 2:
            for code in part.split(";"):
                if code in STYLES:
                    on.add(STYLES[code])
                else:
                    on.clear()
        elif part:
            text = html.escape(part)
            names = " ".join(sorted(on))
            found.append(f'<tspan class="{names}">{text}</tspan>' if on else text)
    return "".join(found)


def draw(text: str) -> str:
    """Text with colour codes as an SVG."""
    lines = text.rstrip("\n").split("\n")
    width = round(COLUMNS * CHAR_PX + 2 * MARGIN_PX)
    height = len(lines) * LINE_PX + 2 * MARGIN_PX
    on: set[str] = set()
    rows = [
        f'<text x="{MARGIN_PX}" y="{MARGIN_PX + LINE_PX * (number + 0.7):.1f}">'
        f"{spans(line, on)}</text>"
        for number, line in enumerate(lines)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" xml:space="preserve">\n'
        f"<style>{SHEET}</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what a command prints.")
    parser.add_argument("target", type=pathlib.Path, help="the SVG to write")
    parser.add_argument("arguments", nargs="+", help="of telemhq_ping.py")
    options = parser.parse_args()
    options.target.write_text(draw(run_at_terminal(*options.arguments)), "utf-8")


if __name__ == "__main__":
    main()
