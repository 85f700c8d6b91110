"""Text from models, data sets and messages, made safe to print on any stream."""

import re
import unicodedata
from typing import TextIO

from ray_detox.addresses import redact

# Categories of Unicode: control, format (bidi overrides, zero width, tags), surrogate, private use,
# line separator and paragraph separator.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
"""Characters without a glyph that have other categories (Unicode's Default_Ignorable_Code_Point)."""
_EMOJI_STYLE = re.compile("[\ufe0e\ufe0f]")
"""Say whether a symbol is drawn in colour; dropped, since a terminal decides that by itself."""


def printable(text: object) -> str:
    """Return `text` on one line, with every character that could steer a terminal written out.

    Example: an escape character becomes the four characters backslash, x, 1, b.
    """
    one_line = str(text).translate(dict.fromkeys(map(ord, "\t\n\r\u2028\u2029"), " "))
    return escape_control(one_line).strip()


def counted(count: float | str, noun: str) -> str:
    """Return a number or a range with its noun, such as `1 worker`, `2 workers` or `2..4 workers`."""
    number = count if isinstance(count, str) else f"{count:g}"
    return f"{number} {noun}{'' if number == '1' else 's'}"


def escape_control(text: str) -> str:
    """Write out every invisible character and redact addresses; ends of lines and tabs stay.

    Example: an escape character becomes the four characters backslash, x, 1, b.
    """
    if not text.replace("\n", "").isprintable() or _INVISIBLE.search(text):
        text = _EMOJI_STYLE.sub("", text)
        text = "".join(c if c in "\n\t" else _escape(c) for c in text)
    return redact(text)  # last: an invisible character must not hide a part of an address


def encodable(text: str, stream: TextIO) -> str:
    """Replace the characters that the encoding of `stream` does not have by question marks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        return text.encode(encoding, errors="replace").decode(encoding)
    except LookupError:  # the stream's encoding is not one of Python's
        return text.encode("ascii", errors="replace").decode("ascii")


def _escape(character: str) -> str:
    if unicodedata.category(character) not in _UNSAFE and not _INVISIBLE.match(character):
        return character
    code = ord(character)
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
