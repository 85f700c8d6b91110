"""READMEs, recipes and vendored libraries match the code."""

import hashlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ray_detox.config import RunConfig
from ray_detox.recipes.loading import recipe_names, schema

ROOT = Path(__file__).resolve().parents[1]
READMES = {
    folder: (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for folder in (
        ".",
        "cluster",
        "ray_detox",
        "ray_detox/recipes",
        "ray_detox/store",
        "scripts",
        "tests",
    )
}


def names_in_tables(readme):
    """Return the names in the first column of the README's tables, such as `aws.yaml`."""
    cells = re.findall(r"^\| ([^|]+) \|", readme, re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_settings_table_of_the_readme_is_current():
    settings_table = runpy.run_path(str(ROOT / "scripts/settings_table.py"))
    readme = READMES["ray_detox/recipes"]

    assert settings_table["with_table"](readme) == readme, "run settings_table.py --write"


def test_the_schema_file_is_current_and_every_recipe_names_it():
    folder = ROOT / "ray_detox/recipes"

    assert json.loads((folder / "schema.json").read_text()) == schema(), (
        "run settings_table.py --write"
    )
    for recipe in folder.glob("*.yaml"):
        first = recipe.read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=schema.json", recipe.name


def test_the_readme_is_short_and_its_tables_are_narrow():
    lines = READMES["."].splitlines()

    assert len(lines) < 200
    assert [line for line in lines if line.startswith("|") and len(line) > 160] == []


def test_the_tree_in_the_readme_matches_the_package():
    (tree,) = re.findall(r"```\n(ray_detox/\n.+?)```", READMES["."], re.S)
    package = ROOT / "ray_detox"
    modules = {p.name for p in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{p.parent.relative_to(package)}/" for p in package.rglob("*/__init__.py")}
    folders.add("recipes/")
    top = {
        p.name for p in ROOT.iterdir() if p.is_dir() and p.name in ("cluster", "scripts", "tests")
    }
    below = {f"{p.parent.name}/" for p in (ROOT / "tests").glob("*/__init__.py")}

    named = set(re.findall(r"[a-z_]+(?:/|\.py)(?!\w)", tree)) - {"ray_detox/"}
    inner = {f"{Path(folder).name}/" for folder in folders}

    assert named == modules | inner | {f"{name}/" for name in top} | below


def test_the_readmes_list_every_script_recipe_and_file():
    def files(folder, pattern="*"):
        return {p.name for p in (ROOT / folder).glob(pattern) if p.is_file()} - {"README.md"}

    store = files("ray_detox/store", "*.py") - {"__init__.py"}

    assert files("scripts") - {"_env.sh"} == names_in_tables(READMES["scripts"])
    assert set(recipe_names()) <= names_in_tables(READMES["ray_detox/recipes"])
    assert files("cluster") <= names_in_tables(READMES["cluster"])
    assert store == {n for n in names_in_tables(READMES["ray_detox/store"]) if n.endswith(".py")}


@pytest.mark.parametrize("folder", READMES)
def test_links_point_to_existing_files_and_headings(folder):
    for target in re.findall(r"\]\(([^)]+)\)", READMES[folder]):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / folder / file if file else ROOT / folder / "README.md").resolve()
        assert path.is_file(), target
        text = path.read_text(encoding="utf-8")
        headings = [re.sub(r"[^\w\- ]", "", h) for h in re.findall(r"^#+ (.+)$", text, re.M)]
        assert not anchor or anchor in {h.lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("folder", READMES)
def test_settings_that_a_readme_names_exist(folder):
    sections = {k: v for k, v in RunConfig().to_dict().items() if isinstance(v, dict)}

    for section, name in re.findall(r"(?<![/\w])([a-z]+)\.([a-z_]+)(?==|`)", READMES[folder]):
        if section in sections and name not in ("yaml", "sqlite"):  # these are files
            assert name in sections[section], f"{section}.{name}"


def test_scripts_and_tests_that_the_readmes_name_exist():
    text = "\n".join(READMES.values())
    tests = "\n".join(p.read_text("utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    paths = set(re.findall(r"\b(?:scripts|cluster)/\w+\.(?:sh|py|yaml)\b", text))
    paths |= {f"tests/{name}" for name in re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)`", text)}

    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
    names = set(re.findall(r"`(test_\w+)`", text))
    assert len(names) >= 4
    assert [name for name in sorted(names) if f"def {name}(" not in tests] == []


def test_the_readme_lists_every_command():
    shown = subprocess.run(
        [sys.executable, "-m", "ray_detox", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    table = READMES["."].partition("\n## Commands\n")[2].partition("\n## ")[0]

    commands = set(re.findall(r"^    ([a-z-]+)(?:  |$)", shown, re.M))
    assert commands == set(re.findall(r"^\| `ray-detox ([\w-]+)", table, re.M))


def test_vendored_libraries_match_their_recorded_hashes():
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
