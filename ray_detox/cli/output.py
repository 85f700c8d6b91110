"""Terminal output of commands: it cannot steer the terminal or fail on its encoding."""

import argparse
import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path

from ray_detox.errors import ConfigError
from ray_detox.recipes.names import expand
from ray_detox.runs.printable import escape_control, printable


def replace_unencodable() -> None:
    """Let the standard streams replace a character that their encoding lacks instead of failing."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def print_error(message: object) -> None:
    """Print an error of a command to the standard error stream."""
    with suppress(OSError):  # the terminal may have been closed; the exit code still tells
        print(f"ray-detox: {escape_control(str(message))}", file=sys.stderr, flush=True)


def describe_os_error(error: OSError) -> str:
    """Describe an error of the operating system in a sentence, with the file and what may help."""
    where = f" ({printable(error.filename)})" if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    advice = {
        errno.ENOSPC: "Free some space there, and repeat the command.",
        errno.EDQUOT: "Free some of your quota there, and repeat the command.",
        errno.EROFS: "Choose a folder that can be written to, such as with --output.",
        errno.EACCES: "Give this user the right to use it, or choose another place.",
        errno.EMFILE: "Raise the limit of open files (ulimit -n).",
        errno.ENOMEM: "Free some memory, and repeat the command.",
    }
    return f"{reason}{where}. {advice.get(error.errno or 0, '')}".rstrip()


def discard_output() -> None:
    """Discard what the standard output still holds, which cannot be written."""
    # Python would try it again when it exits, and print the error.
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


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
