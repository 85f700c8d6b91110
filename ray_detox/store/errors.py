"""What can go wrong with a store, in the words of the person who asked."""


class StoreError(ValueError):
    """A result could not be stored or read; the message is for the person who asked."""


class BadCursor(StoreError):
    """A cursor is none that this list and this query gave out."""
