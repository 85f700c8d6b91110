"""The architecture of the package: which module may import which, read from the source with `ast`.

Each violation names file and line, what is imported, and the rule. The rules, one test each:

    layers       a component (a folder or a top-level module) imports only from lower layers
    cycles       no import cycles, including imports inside functions
    late         an import of the package inside a function avoids loading a heavy library
    ray          only the stages and the few modules that connect to a cluster import Ray
    light        modules that only forward data import without torch, transformers and peft
    constants    a timing constant has one value in the package
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ray_detox"

LAYERS = (
    ("addresses",),
    ("errors", "machine"),
    ("bounded",),
    ("config",),
    ("records", "draws"),
    ("lab", "recipes", "resources"),
    ("models", "data", "rewards"),
    ("rl", "evaluation"),
    ("store",),
    ("runs",),
    ("signals",),
    ("stages",),
    ("pipeline",),
    ("api", "viewer", "lab.build"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
"""Components of each layer, lowest first.

`api` and `__init__` are the public API of the package. `lab.build` is a component of its own: it trains
the embedded models, and only a script for developers runs it.
"""

BESIDE = {("data", "models"), ("rewards", "models"), ("evaluation", "rl")}
"""Pairs of components in the same layer, of which the first may import the second."""

ONLY = {"viewer": {"store", "addresses"}}
"""Components with fewer allowed imports than their layer has: others would slow the page down."""

HEAVY = frozenset(
    "ray torch transformers peft boto3 awswrangler pandas datasets tensorboardX rich pydantic "
    "numpy pyarrow sqlite3".split()
)
"""Libraries that are slow to import or may be missing, so that late imports are justified."""

LATE = {
    "cli": "each verb loads only what it needs, so that --help and error messages appear at once",
    "api": "the public API loads only what is called",
    "__init__": "the public API loads only what is used",
    "recipes.loading": "pydantic; a command that only reads results needs none",
    "pipeline": "Ray reads its environment when it is imported, so the driver connects first",
    "evaluation.measure": "torch; the summary needs only this module's names",
    "evaluation.summarise": "torch; the embedded model needs no note about its generation settings",
    "runs.console": "rich; a program that reads our lines needs none",
    "runs.publish": "boto3; a result in SQLite needs none",
    "store.opening": "boto3, or sqlite3, which a Python may be built without",
    "stages.cluster.connect": "Ray reads its environment when it is imported",
    "stages.evaluate": "torch; the driver only passes shards on",
    "stages.finish": "numpy; a task on the driver's node loads what it needs",
    "stages.preflight": "torch; most settings are checked without it",
    "stages.rewards.actor": "torch; the pool and the clients only pass texts on",
    "stages.train": "torch; the driver only passes checkpoints on",
    "stages.worker": "torch; the driver only passes checkpoints on",
}
"""Modules and components that may import modules of the package inside functions, with the reason:
what the importing process does not have to load."""

RAY = {
    "stages": "the stages run on Ray",
    "cli.jobs": "the client of Ray's job server",
}
"""Components and modules that may import Ray, each with the reason."""

FOR_START_UP = ("cli", "api", "__main__", "__init__")
"""Components that may import late only to start faster, even if no heavy library is avoided."""

LIGHT = (
    "records",
    "stages.progress",
    "stages.rewards.directory",
    "runs.storage",
    "runs.checkpoint_store",
    "store",
    "viewer",
)
"""Modules and components that import without torch, transformers and peft."""


@dataclass(frozen=True)
class Import:
    """An import in the source of the package."""

    importer: str
    """Module without the package's name, such as `stages.train`."""
    imported: str
    """Module without the package's name, or the full name of a library."""
    own: bool
    late: bool
    """Whether the import is inside a function."""
    function: str
    """The outermost function that contains it; empty if it is not late."""
    where: str
    """File and line."""


def module_name(file: Path) -> str:
    """Return the module name of a file, without the package's name and `__init__`."""
    parts = file.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}


COMPONENTS = {name for layer in LAYERS for name in layer}


def component(module: str) -> str:
    """Return the component of a module: the module itself if it is in LAYERS, otherwise its folder."""
    return module if module in COMPONENTS else module.partition(".")[0]


def library(name: str) -> str:
    return name.partition(".")[0]


def imports_of(module: str, tree: ast.AST) -> Iterator[Import]:
    """Yield the imports of a module, without those under `if TYPE_CHECKING:`."""

    def visit(node: ast.AST, function: str) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            # `from ray_detox.store import notebook` imports a module, `... import StoreError` a name.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
            starts = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            inside = function or (f"{node.name}:{node.lineno}" if starts else "")  # type: ignore[attr-defined]
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside)
        for name in names:
            where = f"{FILES[module].relative_to(ROOT)}:{node.lineno}"  # type: ignore[attr-defined]
            if library(name) != PACKAGE:
                yield Import(module, name, False, bool(function), function, where)
                continue
            target = name.removeprefix(PACKAGE).removeprefix(".") or "__init__"
            if target.startswith("__version__"):
                continue  # a constant that is defined before any import
            while target not in FILES:
                target = target.rpartition(".")[0] or "__init__"
            if target != module:
                yield Import(module, target, True, bool(function), function, where)

    return visit(tree, "")


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(
        found
        for module, file in FILES.items()
        for found in imports_of(module, ast.parse(file.read_text(encoding="utf-8")))
    )


def own_imports() -> list[Import]:
    return [found for found in all_imports() if found.own]


@cache
def loads(module: str) -> frozenset[str]:
    """Return the heavy libraries that importing a module loads, directly or indirectly."""
    seen, todo = {module}, [module]
    found = set()
    while todo:
        for one in (i for i in all_imports() if i.importer == todo[-1] and not i.late):
            if one.own and one.imported not in seen:
                seen.add(one.imported)
                todo.insert(0, one.imported)
            elif not one.own:
                found.add(library(one.imported))
        todo.pop()
    return frozenset(found & HEAVY)


def reason_in(table: dict[str, str], module: str) -> str | None:
    """Return the key of a module or its component in a table; None if it has neither."""
    return next((key for key in (module, component(module)) if key in table), None)


def check(violations: list[str]) -> None:
    """Fail with one line for each violation."""
    assert not violations, "\n" + "\n".join(violations)


# ---- layers ----------------------------------------------------------------------------------


def test_every_component_is_in_one_layer():
    components = {component(module) for module in FILES}

    assert sum(len(layer) for layer in LAYERS) == len(COMPONENTS)
    check(
        [f"{PACKAGE}/{name}: is in no layer; add it to LAYERS" for name in components - COMPONENTS]
    )


def layer_violations(imports: list[Import]) -> list[str]:
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    violations = []
    for one in imports:
        above, below = component(one.importer), component(one.imported)
        if above == below or not {above, below} <= height.keys():
            continue  # the test of components reports those without a layer
        allowed = height[below] < height[above] or (above, below) in BESIDE
        if not allowed or below not in ONLY.get(above, {below}):
            rule = (
                f"{above} may import {' and '.join(sorted(ONLY[above]))} only"
                if above in ONLY
                else f"{below} is not below {above}"
            )
            violations.append(f"{one.where}: {one.importer} imports {one.imported}; {rule}")
    return violations


def test_a_module_imports_only_lower_layers():
    check(layer_violations(own_imports()))


# ---- cycles ----------------------------------------------------------------------------------


def cycles(imports: list[Import]) -> list[str]:
    """Return one line for each import that closes a cycle, found by depth-first search."""
    after: dict[str, list[Import]] = {}
    for one in imports:
        after.setdefault(one.importer, []).append(one)
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in done:
            return
        for one in after.get(module, []):
            if one.imported in path:
                circle = [*path[path.index(one.imported) :], one.imported]
                found.append(f"{one.where}: closes the cycle {' -> '.join(circle)}")
            else:
                walk(one.imported, [*path, one.imported])
        done.add(module)

    for module in sorted(after):
        walk(module, [module])
    return found


def test_there_are_no_import_cycles():
    check(cycles(own_imports()))


# ---- imports inside functions ------------------------------------------------------------------


def late_violations(imports: list[Import]) -> list[str]:
    violations = []
    functions: dict[tuple[str, str], list[Import]] = {}
    for one in imports:
        if one.late:
            functions.setdefault((one.importer, one.function), []).append(one)
    for (importer, _), together in functions.items():
        own = [one for one in together if one.own]
        if not own:
            continue
        targets = ", ".join(dict.fromkeys(one.imported for one in own))
        what = f"{own[0].where}: {importer} imports {targets} inside a function"
        if reason_in(LATE, importer) is None:
            violations.append(f"{what}; import at the top, or give the reason in LATE")
        elif component(importer) not in FOR_START_UP:
            spared = {library(one.imported) for one in together if not one.own} & HEAVY
            spared = spared.union(*(loads(one.imported) for one in own)) - loads(importer)
            if not spared:
                violations.append(f"{what}, which spares no heavy library; import at the top")
    return violations


def test_imports_inside_functions_avoid_a_heavy_library():
    check(late_violations(list(all_imports())))


# ---- Ray ---------------------------------------------------------------------------------------


def ray_violations(imports: tuple[Import, ...]) -> list[str]:
    return [
        f"{one.where}: {one.importer} imports {one.imported}; only {', '.join(RAY)} may import Ray"
        for one in imports
        if not one.own and library(one.imported) == "ray" and reason_in(RAY, one.importer) is None
    ]


def test_only_the_stages_and_modules_that_connect_to_a_cluster_import_ray():
    check(ray_violations(all_imports()))


# ---- light modules -----------------------------------------------------------------------------


def test_modules_that_forward_data_load_no_model_library():
    modules = [
        f"{PACKAGE}.{module}"
        for module in FILES
        if any(module == name or module.startswith(f"{name}.") for name in LIGHT)
    ]
    code = (
        "import importlib, sys\n"
        "for name in ('torch', 'transformers', 'peft'):\n"
        "    sys.modules[name] = None  # importing it now fails\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        print(f'{name} does not import without torch, transformers and peft: {error}')\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )

    assert len(modules) >= 15
    check(done.stdout.splitlines())


# ---- constants ---------------------------------------------------------------------------------


def test_a_timing_constant_has_one_value_in_the_package():
    values: dict[str, dict[str, str]] = {}
    for file in FILES.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Assign):
                continue
            for target in node.targets:
                name = target.id.lstrip("_") if isinstance(target, ast.Name) else ""
                if name.isupper() and name.endswith(("_S", "_MS")):
                    where = f"{file.relative_to(ROOT)}:{node.lineno}"
                    values.setdefault(name, {})[where] = ast.unparse(node.value)

    assert len(values) >= 10
    check(
        [
            f"{', '.join(found)}: {name} is defined more than once; share it or rename one"
            for name, found in values.items()
            if len(found) > 1
        ]
    )


# ---- the rules detect violations ---------------------------------------------------------------


def bad(importer: str, source: str) -> list[Import]:
    """Return the imports of a module as if it had this source."""
    return list(imports_of(importer, ast.parse(source)))


@pytest.mark.parametrize(
    "importer, source, message",
    [
        ("runs.resume", "\n\nfrom ray_detox.stages import preflight", "runs/resume.py:3: runs.res"),
        (
            "viewer.server",
            "from ray_detox.runs.folder import RunFolder",
            "may import addresses and store only",
        ),
        ("models.policy", "def f():\n from ray_detox.rl import ppo", "rl is not below models"),
        ("recipes.loading", "from ray_detox import resources", "resources is not below recipes"),
    ],
)
def test_an_import_of_a_higher_layer_is_reported(importer, source, message):
    (violation,) = layer_violations(bad(importer, source))

    assert message in violation


def test_a_cycle_is_reported_with_its_modules():
    imports = bad("store.pages", "from ray_detox.store import sqlite")
    imports += bad("store.sqlite", "def f():\n from ray_detox.store.pages import Page")

    (violation,) = cycles(imports)

    assert violation.startswith("ray_detox/store/sqlite.py:2: closes the cycle store.pages -> ")


@pytest.mark.parametrize(
    "importer, source, message",
    [
        ("rl.loop", "def f():\n from ray_detox.rl import ppo", "give the reason in LATE"),
        ("stages.train", "def f():\n from ray_detox import draws", "spares no heavy library"),
    ],
)
def test_a_late_import_without_a_reason_is_reported(importer, source, message):
    (violation,) = late_violations(bad(importer, source))

    assert message in violation


def test_ray_in_another_room_is_named():
    (violation,) = ray_violations(tuple(bad("rl.loop", "def f():\n import ray.data")))

    assert "rl/loop.py:2: rl.loop imports ray.data; only stages, cli.jobs" in violation


def test_imports_for_type_checkers_are_not_counted():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n from ray_detox import pipeline"

    assert [one.imported for one in bad("rl.loop", source)] == ["typing.TYPE_CHECKING"]
