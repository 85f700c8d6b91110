"""Generate the table of settings in `ray_detox/recipes/README.md` from `ray_detox/config.py`.

python scripts/settings_table.py           print the table
python scripts/settings_table.py --write   write it into the README, between the two markers
"""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from pathlib import Path
from typing import Any

from ray_detox import config

README = Path(__file__).resolve().parents[1] / "ray_detox/recipes/README.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def sentences(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in itertools.pairwise(body.body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def default(field: "dataclasses.Field[Any]") -> str:
    """A field's default as YAML would have it."""
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    # The newlines of the prompt template, for one, must stay on the table's line.
    return str(value).lower() if isinstance(value, bool) else repr(value).strip("'") or '""'


def table() -> str:
    """Every setting with its default and its sentence, section by section."""
    lines = []
    for section in dataclasses.fields(config.RunConfig):
        cls = section.type
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            continue
        lines += [f"**{section.name}**: {(cls.__doc__ or '').strip()}", ""]
        lines += ["| setting | default | |", "|---|---|---|"]
        text = sentences(cls)
        lines += [
            f"| `{section.name}.{f.name}` | `{default(f)}` | {text[f.name].replace('|', chr(92) + '|')} |"
            for f in dataclasses.fields(cls)
        ]
        lines.append("")
    return "\n".join(lines).strip()


def with_table(readme: str) -> str:
    """Return the README with the current table between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
