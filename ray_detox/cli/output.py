"""Terminal output of commands: it cannot steer the terminal or fail on its encoding."""

import argparse
import io
import sys
from contextlib import suppress
from pathlib import Path

from ray_detox.errors import ConfigError
from ray_detox.recipes.names import expand
from ray_detox.runs.printable import escape_control


def replace_unencodable() -> None:
    """Let the standard streams replace a character that their encoding lacks instead of failing."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def print_error(message: object) -> None:
    """Print an error of a command to the standard error stream."""
    with suppress(OSError):  # the terminal may have been closed; the exit code still tells
        print(f"ray-detox: {escape_control(str(message))}", file=sys.stderr, flush=True)


def is_unicode() -> bool:
    """Return whether the standard output can encode every character."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    return encoding.replace("-", "").startswith("utf")


def path(text: str) -> Path:
    """Return the path that an option names; a shell leaves `~` in `--output=~/runs` as it is.

    Raises:
        argparse.ArgumentTypeError: there is no home folder, or the text is empty.
    """
    if not text:  # such as "$OUTPUT" with a variable that is not set
        raise argparse.ArgumentTypeError("it is empty; expected the path of a file or folder")
    try:
        return expand(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
