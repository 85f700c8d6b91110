"""Load a recipe, apply overrides such as `ppo.kl_coef=0.1`, and name every mistake in it."""

import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_detox.config import ConfigError, RunConfig, T

RECIPES = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a packaged recipe, or a YAML file by path, then apply overrides.

    Args:
        recipe: name of a packaged recipe, or path of a .yaml file.
        overrides: `section.name=value`, values in YAML.

    Raises:
        ConfigError: unknown recipe, key or type, or contradictory values.
    """
    tree = _read_recipe(recipe)
    for override in overrides:
        apply_override(tree, override)
    tree["recipe"] = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    return config_from_dict(tree)


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe and the settings among words such as `lab train.steps=2`; `lab` if none is there.

    Raises:
        ConfigError: there are two recipes.
    """
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise ConfigError(
            f"Two recipes, {recipes[0]!r} and {recipes[1]!r}; give one. "
            "Settings have the form section.name=value."
        )
    return recipes[0] if recipes else "lab", [word for word in words if "=" in word]


def config_from_dict(tree: Mapping[str, Any]) -> RunConfig:
    """Make a run from nested plain values, as in a recipe or a stored config.json."""
    return build(RunConfig, tree)


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        names = recipe_names()
        near = difflib.get_close_matches(recipe, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the recipes are {', '.join(names)}."
        raise ConfigError(f"Unknown recipe {recipe!r}; {hint} A path of your own .yaml works, too.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"Recipe {path} is no valid YAML: {reason}.") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"Recipe {path} holds a {type(tree).__name__}; expected sections of settings."
        )
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put the value of `section.name=value`, read as YAML, into nested settings."""
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"Override {override!r} has no '='. Write it as section.name=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r}: the value is no valid YAML.") from error
    *sections, name = dotted.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"Override {override!r}: {section!r} is a value and not a section.")
        node = child
    node[name] = value


def build(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Make a `cls` from nested mappings, naming any key it does not know and any wrong type."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = (
                f"did you mean {where + near[0]!r}?"
                if near
                else _where_else(str(key), known, where)
            )
            raise ConfigError(f"Unknown setting {where + str(key)!r}; {hint}")
    values = {key: _convert(hints[key], value, f"{where}{key}") for key, value in tree.items()}
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{where.rstrip('.') or 'The run'} is incomplete: {error}.") from error


def _where_else(key: str, known: Sequence[str], where: str) -> str:
    """Point at the section that has this key, or list what is known here."""
    homes = [
        f"{section.name}.{key}"
        for section in fields(RunConfig)
        if is_dataclass(section.type) and key in {f.name for f in fields(section.type)}
    ]
    if homes:
        return f"did you mean {homes[0]!r}?"
    return f"known {'in ' + where.rstrip('.') if where else 'here'}: {', '.join(known)}."


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Check `value` against a field's type, converting only what loses nothing."""
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}; expected a section, such as {name}.key=value.")
        return build(hint, value, f"{name}.")
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        choices = typing.get_args(hint)
        if value is None and type(None) in choices:
            return None
        kinds = [choice for choice in choices if choice is not type(None)]
        if value is not None and type(value) in kinds:
            return value
        return _convert(kinds[0], value, name)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{name} is {value!r}; expected a list, such as [a, b].")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{name}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}; expected names with values.")
        return dict(value)
    return _convert_scalar(hint, value, name)


def _convert_scalar(hint: type, value: Any, name: str) -> Any:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    good = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        good, value = True, float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text, because it has no dot.
        try:
            good, value = True, float(value)
        except ValueError:
            good = False
    if good and hint is float and not math.isfinite(value):
        good = False
    if not good:
        raise ConfigError(f"{name} is {value!r}; expected {words[hint]}.")
    return value
