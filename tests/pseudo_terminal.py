"""A pseudo-terminal: what a program prints on it, and what a person then sees."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from tests.environment import python_path

ROOT = Path(__file__).resolve().parents[1]


def on_terminal(*words: str, columns: int = 80, **environment: str) -> str:
    """Run Python on a pseudo-terminal, and return all that it printed."""
    head, tail = pty.openpty()
    fcntl.ioctl(tail, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    settings = {
        "TERM": "xterm-256color",
        "PYTHONPATH": python_path(ROOT),
        "PYTHONIOENCODING": "utf-8",
    }
    process = subprocess.Popen(
        [sys.executable, *words],
        stdin=tail,
        stdout=tail,
        stderr=tail,
        env=inherited | settings | environment,
    )
    os.close(tail)
    printed = b""
    while True:
        try:
            some = os.read(head, 65536)
        except OSError:  # Linux: the last process has closed the terminal
            break
        if not some:
            break
        printed += some
    os.close(head)
    assert process.wait(timeout=60) == 0, printed.decode(errors="replace")
    return printed.decode(errors="replace")


def screen(printed: str) -> list[str]:
    """Return the lines that a terminal shows in the end; knows the codes that a bar needs."""
    lines, row, column = [""], 0, 0
    for code in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", printed):
        if code == "\r":
            column = 0
        elif code == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif not code.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + code + lines[row][column + len(code) :]
            column += len(code)
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code.endswith("K"):
            lines[row] = "" if code == "\x1b[2K" else lines[row][:column]
        else:
            assert code[-1] in "mhl", f"a code that a bar does not need: {code!r}"
    return [line.rstrip() for line in lines]
