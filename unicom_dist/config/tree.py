"""YAML recipes as trees whose leaves remember where they were written.

A tree is nested dicts and lists; a leaf holds a value and its origin (`recipes/quickstart.yaml:12` or `command line`).
Lists of mappings (stages) are nodes, so that one key of one stage can be overridden; other lists are leaves.
Stricter than plain YAML: duplicate keys are refused, `1e-4` is a number, dates stay text. Imports no torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from unicom_dist.config.errors import ConfigError

DOCS = "docs/configuration.md"
Tree = Any  # dict[str, Tree] | list[Tree] | Leaf


@dataclass(frozen=True)
class Leaf:
    """A value and the place it was written."""

    value: Any
    origin: str


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats and without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in pairs
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(
    r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_FLOAT_TAG = "tag:yaml.org,2002:float"
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would take for a number."""


_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


def dump(value: Any, flow: bool) -> str:
    """YAML of a plain value that `parse` reads back equal; `flow`: on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=10**6)
    return str(text).removesuffix("...\n")


def parse(text: str, name: str) -> Tree:
    """The tree of a YAML document called `name`; an empty one is an empty mapping. ConfigError if it is not YAML."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return {} if node is None else _build(loader, node, name, numbered=True)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{place} is not YAML", problem, "check indentation, quotes and colons there", DOCS) from None
    finally:
        loader.dispose()


def parse_value(text: str, origin: str) -> Tree:
    """The tree of one value given outside a file. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return Leaf("", origin) if node is None else _build(loader, node, origin, numbered=False)
    finally:
        loader.dispose()


def _build(loader: _Loader, node: yaml.Node, name: str, numbered: bool) -> Tree:
    origin = f"{name}:{node.start_mark.line + 1}" if numbered else name
    if isinstance(node, yaml.MappingNode):
        _refuse_duplicates(node, name)
        loader.flatten_mapping(node)  # `<<: *anchor`; own keys come last and win
        return {str(key.value): _build(loader, value, name, numbered) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode) and any(isinstance(item, yaml.MappingNode) for item in node.value):
        return [_build(loader, item, name, numbered) for item in node.value]
    return Leaf(loader.construct_object(node, deep=True), origin)


def _refuse_duplicates(node: yaml.MappingNode, name: str) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in seen and key.value != "<<":
            raise ConfigError(
                f"{name}:{line} repeats the key {key.value}",
                f"it was given in line {seen[key.value]} already, and only one of them can count",
                "remove one of the two lines",
                DOCS,
            )
        seen[key.value] = line


def merge(base: Tree, over: Tree) -> Tree:
    """`over` on top of `base`: mappings key by key, the rest replaced.

    A mapping over a list patches named items; a name that is not there and has a `kind` becomes a new item at the end.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}
    if isinstance(base, list) and isinstance(over, dict):
        merged = list(base)
        for key, value in over.items():
            position = find_item(base, key)
            if position is None and isinstance(value, dict) and "kind" in value:
                merged.append({"name": Leaf(key, next(leaf.origin for _, leaf in leaves(value))), **value})
                continue
            if position is None:
                origin = next((leaf.origin for _, leaf in leaves(value)), "")
                raise ConfigError(
                    f"there is no item {key!r} to change ({origin})",
                    f"the base has {', '.join(item_names(base))}",
                    "use one of these names, or give the new one a kind",
                    DOCS,
                )
            merged[position] = merge(base[position], value)
        return merged
    return over


def item_names(items: list[Tree]) -> list[str]:
    """How the items of a list are addressed: by name where they have one, else by number."""
    names = []
    for number, item in enumerate(items):
        leaf = item.get("name") if isinstance(item, dict) else None
        names.append(str(leaf.value) if isinstance(leaf, Leaf) else str(number))
    return names


def find_item(items: list[Tree], key: str) -> int | None:
    """Position of the item called `key`, else of the item number `key`, else None."""
    names = item_names(items)
    if key in names:
        return names.index(key)
    return int(key) if key.isdecimal() and int(key) < len(items) else None


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    """(dotted key, leaf) of the whole tree, items of lists by name."""
    if isinstance(tree, Leaf):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        for name, item in zip(item_names(tree), tree, strict=True):
            yield from leaves(item, f"{prefix}.{name}" if prefix else name)


def plain(tree: Tree) -> Any:
    """The values alone."""
    if isinstance(tree, Leaf):
        return tree.value
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(item) for item in tree]
