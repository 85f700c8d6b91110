"""Files beside the code that must keep up with it: the README, the recipes, libraries."""

import hashlib
import json
import re
import runpy
from pathlib import Path

from ray_detox.recipes.loading import recipe_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_every_setting_as_the_code_has_it():
    settings_table = runpy.run_path(str(ROOT / "scripts/settings_table.py"))

    assert settings_table["with_table"](README) == README, "run settings_table.py --write"


def test_the_readme_names_every_module_script_and_recipe():
    modules = {p.name for p in (ROOT / "ray_detox").glob("*.py")} - {"__init__.py", "__main__.py"}
    stages = {p.name for p in (ROOT / "ray_detox/stages").glob("*.py")} - {"__init__.py"}
    scripts = {p.name for p in (ROOT / "scripts").iterdir() if p.is_file()} - {"_env.sh"}
    missing = [
        name
        for name in sorted(modules | stages | scripts)
        if not re.search(rf"^ *{name} ", README, re.M)
    ]
    missing += [name for name in recipe_names() if f"| `{name}` |" not in README]

    assert not missing


def test_libraries_of_the_page_are_those_that_were_looked_at():
    vendor = ROOT / "ray_detox/viewer/static/vendor"
    manifest = json.loads((vendor / "MANIFEST.json").read_text(encoding="utf-8"))
    listed = {name: digest for library in manifest for name, digest in library["files"].items()}

    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in vendor.iterdir()
        if file.name != "MANIFEST.json"
    }

    assert found == listed
    for library in manifest:
        assert library["version"]
        assert library["licence"]
        assert any(name.endswith(".LICENSE") for name in library["files"])
