"""Generate what is derived from `ray_detox/config.py`: the README's table and the JSON schema.

python scripts/settings_table.py           print the table
python scripts/settings_table.py --write   write the table into `ray_detox/recipes/README.md`, between
                                           its two markers, and the schema into `schema.json` beside it
"""

import json
import sys
from pathlib import Path

from pydantic.fields import FieldInfo

from ray_detox.config import RunConfig, Section
from ray_detox.recipes.loading import schema

RECIPES = Path(__file__).resolve().parents[1] / "ray_detox/recipes"
README, SCHEMA = RECIPES / "README.md", RECIPES / "schema.json"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def default(field: FieldInfo) -> str:
    """Return a field's default as YAML writes it."""
    value = field.default
    if field.is_required():
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
    """Return every setting with its default and its description, section by section."""
    lines = []
    for name, section in RunConfig.model_fields.items():
        cls = section.annotation
        if not (isinstance(cls, type) and issubclass(cls, Section)):
            continue
        lines += [f"**{name}**: {(cls.__doc__ or '').strip()}", ""]
        lines += ["| setting | default | |", "|---|---|---|"]
        for setting, field in cls.model_fields.items():
            text = " ".join((field.description or "").split()).replace("|", r"\|")
            lines.append(f"| `{name}.{setting}` | `{default(field)}` | {text} |")
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
        SCHEMA.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")
    else:
        print(table())
