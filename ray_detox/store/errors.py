"""Errors of the result stores."""


class StoreError(ValueError):
    """A result could not be stored or read; the message is one line for the user."""


class BadCursor(StoreError):
    """A cursor does not come from an earlier page of the same list and query."""
