"""Names of columns in files of data, and columns that the names of folders hold."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote

from ray_detox.config import ConfigError

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""Value in the name of a folder that stands for none."""


def check_names(names: Sequence[str], path: str) -> None:
    """Check that no two columns of a file have the same name.

    Raises:
        ConfigError: two have.
    """
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ConfigError(
            f"data.path: {path} has more than one column {twice[0]!r}. Rename or remove one of them in "
            "the file."
        )


def partition_columns(path: str) -> dict[str, str | None]:
    """Return the columns in the names of the folders above a file, such as `topic=food`.

    Spark, Hive and pyarrow leave a column by which they part a data set out of its files.
    """
    columns: dict[str, str | None] = {}
    for folder in reversed(PurePosixPath(path).parts[:-1]):
        name, mark, value = folder.partition("=")
        if not (name and mark):
            break
        columns[unquote(name)] = None if value == NULL_PARTITION else unquote(value)
    return columns
