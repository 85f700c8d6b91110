"""Errors whose message is a sentence for the person who gave a command or called the API.

Apart from `config.py`, so that a command which only reads results does not import pydantic.
"""

from ray_detox.addresses import redact


class ConfigError(ValueError):
    """A setting or an argument is not valid; the message says what is, and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or else the error's type.

    For errors of libraries, whose message may have many lines and quote an address with credentials.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redact((lines or [type(error).__name__])[0].rstrip(".:"))


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a log-probability is NaN or infinite; another attempt would fail again."""
