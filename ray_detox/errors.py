"""Errors whose message is a sentence for the person who gave a command or called the API.

Apart from `config.py`, so that a command which only reads results does not import pydantic.
"""


class ConfigError(ValueError):
    """A setting or an argument is not valid; the message says what is, and what to do."""


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a log-probability is NaN or infinite; another attempt would fail again."""
