"""Recipes into a checked `Config`: find the file, follow `base:`, apply overrides, check, keep every value's origin.

`load_recipe("recipes/quickstart.yaml", ["stages.codec.steps=10"])`. Every error is a ConfigError naming the dotted key.
Imports no torch.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from unicom_dist.config import tree as trees
from unicom_dist.config.errors import ConfigError
from unicom_dist.config.problems import explain_problems
from unicom_dist.config.schema import Config
from unicom_dist.config.tree import DOCS, Tree

COMMAND_LINE = "command line"
RECIPES = Path(__file__).resolve().parents[2] / "recipes"  # installed beside the package


@dataclass(frozen=True)
class Loaded:
    """A checked configuration; `origins` maps dotted keys to `file:line` or `command line` (absent: the default)."""

    config: Config
    origins: dict[str, str]
    path: Path


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe and everything it is based on, then apply `key=value` overrides in order. ConfigError."""
    path = find_recipe(path_or_name)
    tree = _read_chain(path, [])
    recorded = dict(trees.leaves(tree.pop("origins", {})))  # a run's config.yaml says where its values came from
    return _checked(tree, overrides, path, recorded)


def load_values(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Loaded:
    """A configuration given as nested values rather than by a recipe, and overrides on top. ConfigError."""
    return _checked(trees.parse_value(json.dumps(values), COMMAND_LINE), overrides, Path(COMMAND_LINE), {})


def _checked(tree: Tree, overrides: Sequence[str], path: Path, recorded: dict[str, trees.Leaf]) -> Loaded:
    for override in overrides:
        tree = _override(tree, override)
    origins = {key: leaf.origin for key, leaf in trees.leaves(tree)}
    origins |= {key: str(leaf.value) for key, leaf in recorded.items() if origins.get(key, "") != COMMAND_LINE}
    try:
        # JSON mode: strict about types, and yet lists may stand for tuples.
        config = Config.model_validate_json(json.dumps(trees.plain(tree)), strict=True)
    except ValidationError as error:
        raise explain_problems(error, trees.plain(tree), origins, path.name) from None
    return Loaded(config, origins, path)


def find_recipe(path_or_name: str | Path) -> Path:
    """A path as it is; else an installed recipe, with or without `recipes/` and `.yaml`. ConfigError."""
    given = Path(path_or_name)
    if given.is_file():
        return given
    if given.is_dir():
        if (given / "config.yaml").is_file():
            return given / "config.yaml"
        raise ConfigError(f"{given} is a folder, not a recipe", "it holds no config.yaml", "name a .yaml file", DOCS)
    if not given.is_absolute():
        inner = Path(*given.parts[1:]) if given.parts[:1] == ("recipes",) else given
        for candidate in (RECIPES / inner, RECIPES / f"{inner}.yaml"):
            if candidate.is_file():
                return candidate
    installed = installed_recipes()
    known = {name.removesuffix(".yaml"): f"recipes/{name}" for name in installed}
    known |= {item.stem: str(item) for item in given.parent.glob("*.yaml")}
    near = difflib.get_close_matches(given.name.removesuffix(".yaml"), known, 1, 0.5)
    raise ConfigError(
        f"recipe {str(given)!r} not found",
        "there is no such file here, and no recipe of this name is installed",
        f"did you mean {known[near[0]]}?" if near else f"installed: {', '.join(installed) or 'none'}",
        DOCS,
    )


def installed_recipes() -> list[str]:
    """Recipes that come with the package, as paths below `recipes/`."""
    return sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml"))


def _read_chain(path: Path, above: list[Path]) -> Tree:
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(item.name for item in [*above[above.index(resolved) :], resolved])
        raise ConfigError(
            f"base = {path.name} in {above[-1].name}", f"the recipes form a circle: {chain}", "remove one `base:`", DOCS
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"{path} cannot be read", reason, "name a readable .yaml file", DOCS) from None
    tree = trees.parse(text, _shown(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{_shown(path)} is not a recipe",
            "it holds a value, not `key: value` lines",
            "see recipes/quickstart.yaml",
            DOCS,
        )
    base = tree.pop("base", None)
    if base is None:
        return tree
    value = base.value if isinstance(base, trees.Leaf) else None
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"base = {value!r} in {_shown(path)}",
            "it must be a path",
            "write for example `base: quickstart.yaml`",
            DOCS,
        )
    parent = next((place / value for place in (path.parent, RECIPES) if (place / value).is_file()), None)
    if parent is None:
        known = [*sorted(item.name for item in (path.parent / value).parent.glob("*.yaml")), *installed_recipes()]
        near = difflib.get_close_matches(Path(value).name, known, 1, 0.5)
        raise ConfigError(
            f"base = {value} ({base.origin}) not found",
            f"a base is looked for beside the recipe that names it, in {path.parent}, then among those installed",
            f"did you mean {near[0]}?" if near else f"there: {', '.join(known)}",
            DOCS,
        )
    return trees.merge(_read_chain(parent, [*above, resolved]), tree)


def _shown(path: Path) -> str:
    """The path as a reader knows it: below the installed recipes as `recipes/...`, else as given."""
    resolved = path.resolve()
    return f"recipes/{resolved.relative_to(RECIPES)}" if resolved.is_relative_to(RECIPES) else str(path)


def _override(tree: Tree, override: str) -> Tree:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(
            f"override {override!r}",
            "an override is a dotted key, an equals sign and a YAML value",
            "write for example stages.codec.steps=10",
            DOCS,
        )
    try:
        value = trees.parse_value(text, COMMAND_LINE)
    except yaml.YAMLError:
        raise ConfigError(
            f"override {override!r}", f"{text!r} is not a YAML value", f"quote it: {key}='\"...\"'", DOCS
        ) from None
    return _set(tree, key.split("."), value, key)


def _set(tree: Tree, parts: list[str], value: Tree, key: str) -> Tree:
    if not parts:
        return trees.merge(tree, value)
    head, rest = parts[0], parts[1:]
    if isinstance(tree, dict):
        return {**tree, head: _set(tree.get(head, {}), rest, value, key)}
    if isinstance(tree, list):
        position = trees.find_item(tree, head)
        if position is None:
            names = trees.item_names(tree)
            near = difflib.get_close_matches(head, names, 1, 0.5)
            raise ConfigError(
                f"override {key}",
                f"there is no {head!r} in {key.split('.' + head)[0]}: it has {', '.join(names)}",
                f"did you mean {near[0]}?" if near else "use one of these names",
                DOCS,
            )
        return [*tree[:position], _set(tree[position], rest, value, key), *tree[position + 1 :]]
    inner = key.rsplit("." + ".".join(parts), 1)[0]
    raise ConfigError(
        f"override {key}", f"{inner} = {tree.value!r} is a value, not a section", f"override {inner} itself", DOCS
    )
