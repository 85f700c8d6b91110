"""Load a recipe, apply overrides such as `ppo.kl_coef=0.1`, and name every mistake in it.

pydantic and yaml are imported inside the functions: `ray-detox --help` only lists the recipes.
"""

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_detox.bounded import MAX_YAML_BYTES, DamagedError, parse_yaml, read_file
from ray_detox.errors import ConfigError
from ray_detox.recipes.names import expand

if TYPE_CHECKING:
    from ray_detox.config import RunConfig

FOLDERS_VARIABLE = "RAY_DETOX_IMPORT_FROM"
"""Folders in which processes of a run look for modules with reward functions, besides `sys.path`."""

RECIPES = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str | os.PathLike[str], overrides: Sequence[str] = ()) -> "RunConfig":
    """Read a packaged recipe, or a YAML file by path, then apply overrides.

    Args:
        recipe: name of a packaged recipe, or path of a .yaml file.
        overrides: `section.name=value`, values in YAML; a setting that is text takes the text as it is.

    Raises:
        ConfigError: unknown recipe, key or type, or contradictory values.
    """
    if isinstance(overrides, str):
        raise ConfigError(
            f"overrides is {overrides!r}; expected a list of settings, such as [{overrides!r}]."
        )
    recipe = os.fspath(recipe)
    tree = _read_recipe(recipe)
    for override in overrides:
        apply_override(tree, override)
    if is_recipe_file(recipe):
        make_importable(expand(recipe).resolve().parent)
    tree["recipe"] = Path(recipe).stem if is_recipe_file(recipe) else recipe
    return config_from_dict(tree)


def is_recipe_file(recipe: str) -> bool:
    """Return whether a recipe is named by the path of a file, not by its name in the package."""
    return recipe.lower().endswith((".yaml", ".yml"))


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split arguments such as `lab train.steps=2` into the recipe, by default `lab`, and settings.

    Raises:
        ConfigError: there are two recipes.
    """
    if "" in words:
        raise ConfigError(
            "An argument is empty; is a variable of the command not set? Give a recipe and settings of "
            "the form section.name=value."
        )
    recipes = [
        word for word in words if "=" not in word or (is_recipe_file(word) and _is_file(Path(word)))
    ]
    for word in recipes:
        name, colon, value = word.partition(":")
        if colon and is_setting(name.strip()):
            raise ConfigError(f"{word!r} has no '='; write {name.strip()}={value.strip()}.")
    if len(recipes) > 1 and (names := [word for word in recipes if is_setting(word)]):
        raise ConfigError(f"{names[0]!r} is a setting without a value; write {names[0]}=value.")
    if len(recipes) > 1:
        raise ConfigError(
            f"Two recipes, {recipes[0]!r} and {recipes[1]!r}; give one. "
            "Settings have the form section.name=value."
        )
    return recipes[0] if recipes else "lab", [word for word in words if word not in recipes]


def is_setting(word: str) -> bool:
    """Return whether a word is the whole name of a setting, such as `ppo.kl_coef`."""
    from ray_detox.config import setting_exists

    return "." in word and setting_exists(word)


def make_importable(folder: Path) -> None:
    """Let this process, and those that Ray starts from it, import modules with reward functions in a folder.

    The folder comes after all others, so that a module in it does not replace one of a library.
    """
    name = str(folder.absolute())
    if name not in sys.path:
        sys.path.append(name)
    known = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)
    os.environ[FOLDERS_VARIABLE] = os.pathsep.join(dict.fromkeys(filter(None, [*known, name])))


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with which editors complete and check settings."""
    from ray_detox.config import RunConfig

    tree = RunConfig.model_json_schema()
    tree["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    tree["title"] = "A recipe of ray-detox"
    return tree


def config_from_dict(tree: Mapping[str, Any]) -> "RunConfig":
    """Make a run from nested plain values, as in a recipe or a stored config.json.

    Raises:
        ConfigError: a name is unknown, or a value is not valid.
    """
    from ray_detox.config import RunConfig

    # YAML reads a key such as 1 as a number; no setting has such a name.
    as_text: dict[str, Any] = {
        str(name): {str(key): inner for key, inner in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in tree.items()
    }
    return RunConfig(**as_text)


def override_settings(config: "RunConfig", overrides: Sequence[str]) -> "RunConfig":
    """Change the settings of a run that exists by words such as `train.steps=60`.

    Raises:
        ConfigError: a word is no setting, or a value is not valid.
    """
    if any("=" not in override for override in overrides):
        raise ConfigError("A run that exists keeps its recipe; give only section.name=value.")
    tree = config.to_dict()
    for override in overrides:
        apply_override(tree, override)
    return config_from_dict(tree)


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = expand(recipe) if is_recipe_file(recipe) else RECIPES / f"{recipe}.yaml"
    if not _is_file(path):
        names = recipe_names()
        near = difflib.get_close_matches(recipe, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the recipes are {', '.join(names)}."
        raise ConfigError(f"Unknown recipe {recipe!r}; {hint} A path of your own .yaml works, too.")
    try:
        tree = parse_yaml(read_file(path, MAX_YAML_BYTES).decode("utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"Recipe {path} is not valid YAML: it is not UTF-8 text.") from None
    except DamagedError as error:
        raise ConfigError(f"Recipe {path} is not valid YAML: {error}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"Recipe {path} holds a {type(tree).__name__}; expected sections of settings."
        )
    return tree


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long for a file
        return False


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put the value of `section.name=value` into nested settings.

    A setting that is text takes the text as it is, with its quotes, colons, braces and digits; `null`, or
    nothing, is no value if the setting may have none. Any other value is read as YAML.
    """
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"Override {override!r} has no '='. Write it as section.name=value.")
    value = _value(override, dotted, text)
    *sections, name = dotted.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"Override {override!r}: {section!r} is a value and not a section.")
        node = child
    node[name] = value


def _value(override: str, dotted: str, text: str) -> Any:
    from ray_detox.config import is_optional_text, is_text

    if is_optional_text(dotted):
        return None if text in ("", "null") else text
    if is_text(dotted):
        return text
    try:
        return parse_yaml(text)
    except DamagedError as error:
        raise ConfigError(f"Override {override[:200]!r}: the value is not valid YAML.") from error
