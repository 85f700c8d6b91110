"""What a data file holds by its first bytes, which decide if its name says something else."""

import re

from ray_detox.config import ConfigError

COMPRESSIONS = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
}
"""First bytes of compressed files, by the suffix that they should have."""
BYTES_TO_LOOK_AT = 1024
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_UNPACK = "Unpack it, and set data.path to the files in it"
_EXPORT = "Export it as .csv, .jsonl or .parquet with the program that wrote it"
_OTHERS = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS and not the data",
        "Fetch the data with: git lfs pull",
    ),
    (b"PK\3\4", "a zip archive or an Excel workbook", "Unpack it, or save the sheet as .csv"),
    (b"\xd0\xcf\x11\xe0", "a workbook of an older Excel", "Save the sheet as .csv"),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"PARE", "encrypted Parquet", "Decrypt it with the program that wrote it"),
    (b"ORC", "ORC", _EXPORT),
    (b"Obj\1", "Avro", _EXPORT),
    (b"\x89HDF", "HDF5", _EXPORT),
    (b"SQLite format 3", "an SQLite database", _EXPORT),
    (b"%PDF", "a PDF", _EXPORT),
    (b"\x80\4\x95", "a pickle of Python, which could run code", _EXPORT),
    (b"\x80\5\x95", "a pickle of Python, which could run code", _EXPORT),
)
_PAGE = re.compile(rb"\s*<(!doctype|!--|html|head|body|\?xml|table|div|error)\b", re.IGNORECASE)
_JSON = re.compile(rb'\s*(\[\s*)?\{\s*"')


def compression_of(start: bytes) -> str:
    """Return the suffix of compressed files that begin like this; empty if it is not compressed."""
    return next((suffix for first, suffix in COMPRESSIONS.items() if start.startswith(first)), "")


def check_content(start: bytes, kind: str, path: str) -> None:
    """Check that a file's first bytes are not of another kind than its name says.

    Args:
        start: the first `BYTES_TO_LOOK_AT` bytes, decompressed if the file is text.
        kind: `jsonl`, `csv`, `parquet` or `arrow`.
        path: of the file, for messages.

    Raises:
        ConfigError: they are.
    """
    found = _foreign_content(start, kind)
    if found:
        raise ConfigError(f"data.path: {path} is {found[0]}. {found[1]}.")


def _foreign_content(start: bytes, kind: str) -> tuple[str, str] | None:
    """Return what the bytes are if not of this kind, and what to do."""
    for first, what, remedy in _OTHERS:
        if start.startswith(first):
            return what, remedy
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    for first, table in _TABLES.items():
        if start.startswith(first) and table != kind:
            return f"a file of the kind {table} and not {kind}", f"Rename it to end in .{table}"
    text = start.removeprefix(b"\xef\xbb\xbf")
    if _PAGE.match(text):
        return (
            "a web page or XML (its text begins with a tag in < >) and not data",
            "Download the file itself, after signing in if the page asks for it, or export it as .csv "
            "or .jsonl",
        )
    if kind != "jsonl" and _JSON.match(text):
        return f"JSON and not {kind}", "Rename it to end in .jsonl"
    if kind in ("parquet", "arrow") and compression_of(start):
        return f"compressed as a whole ({compression_of(start)})", "Decompress it"
    return None
