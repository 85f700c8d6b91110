"""Text from models, data sets and messages, made safe to print on any stream."""

import unicodedata
from typing import TextIO

# Categories of Unicode: control, format (bidi overrides, zero width), surrogate, private use,
# line separator and paragraph separator.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def printable(text: object) -> str:
    """Return `text` on one line, with every character that could steer a terminal written out.

    Example: an escape character becomes the four characters backslash, x, 1, b.
    """
    one_line = str(text).translate(dict.fromkeys(map(ord, "\t\n\r\u2028\u2029"), " "))
    return escape_control(one_line).strip()


def escape_control(text: str) -> str:
    """Write out every character that could steer a terminal; ends of lines and tabs stay.

    Example: an escape character becomes the four characters backslash, x, 1, b.
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c in "\n\t" else _escape(c) for c in text)


def encodable(text: str, stream: TextIO) -> str:
    """Replace the characters that the encoding of `stream` does not have by question marks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        return text.encode(encoding, errors="replace").decode(encoding)
    except LookupError:  # the stream's encoding is not one of Python's
        return text.encode("ascii", errors="replace").decode("ascii")


def _escape(character: str) -> str:
    if unicodedata.category(character) not in _UNSAFE:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
