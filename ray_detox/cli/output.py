"""Terminal output of commands: it cannot steer the terminal or fail on its encoding."""

import io
import sys

from ray_detox.runs.printable import escape_control


def replace_unencodable() -> None:
    """Let the standard streams replace a character that their encoding lacks instead of failing."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def print_error(message: object) -> None:
    """Print an error of a command to the standard error stream."""
    print(f"ray-detox: {escape_control(str(message))}", file=sys.stderr)


def is_unicode() -> bool:
    """Return whether the standard output can encode every character."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    return encoding.replace("-", "").startswith("utf")
