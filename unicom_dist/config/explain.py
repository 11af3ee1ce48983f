"""A configuration written out, one key explained, two configurations compared.

The YAML written here can be read back by `load_recipe`, origins included. Imports no torch.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from unicom_dist.config.errors import ConfigError, PreflightError
from unicom_dist.config.load import Loaded
from unicom_dist.config.problems import known_keys, sections
from unicom_dist.config.schema import Config
from unicom_dist.config.storage import reason
from unicom_dist.config.tree import DOCS, dump

DEFAULT = "default"


@dataclass(frozen=True)
class Explanation:
    """What a key means, and, where a recipe was given, its value there and who set it."""

    key: str
    type: str
    default: str
    meaning: str
    value: Any = None
    origin: str = ""


@dataclass(frozen=True)
class Difference:
    """A dotted key whose value differs; a side is None and `missing` where the key does not exist there."""

    key: str
    left: Any
    right: Any
    missing: Literal["", "left", "right"] = ""


def flatten(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value in the order of the schema; stages are addressed by name."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value, key = getattr(config, name), prefix + name
        if isinstance(value, BaseModel):
            flat |= flatten(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, BaseModel) for item in value):
            for number, item in enumerate(value):
                flat |= flatten(item, f"{key}.{getattr(item, 'name', number)}.")
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def to_yaml(config: Config, origins: Mapping[str, str]) -> str:
    """The whole configuration as a recipe, every value with its origin in a comment."""
    lines = list(_lines(config, origins, "", ""))
    width = min(60, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {note}\n" if note else f"{text}\n" for text, note in lines)


def write_config(run_dir: str | Path, config: Config, origins: Mapping[str, str]) -> Path:
    """Write `run_dir/config.yaml`, values and origins, whole or not at all. PreflightError if it cannot."""
    path = Path(run_dir) / "config.yaml"
    temporary = path.with_name(f".config.yaml.{os.getpid()}.tmp")
    kept = {key: origin_of(key, origins) for key in flatten(config)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = to_yaml(config, {}) + dump({"origins": kept}, flow=False)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise PreflightError(f"{path} cannot be written", reason(error), "choose another run_dir", DOCS) from None
    return path


def explain(key: str, loaded: Loaded | None = None) -> list[Explanation]:
    """The key, or all keys of a section; `stages.sft.steps` and `stages.<name>.steps` both work. ConfigError."""
    values = flatten(loaded.config) if loaded is not None else {}
    rows = []
    for pattern, field in known_keys():
        concrete = [name for name in values if _matches(pattern, name)] or [pattern]
        for name in concrete:
            if _below(key, name) or _below(key, pattern):
                origin = "" if loaded is None else origin_of(name, loaded.origins)
                rows.append(_explanation(name, field, values.get(name), origin))
    if not rows and key.startswith("stages.") and not key.startswith("stages.<name>"):
        # Without a recipe, or with one that has no such stage, a stage's key is explained in general.
        tail = key.split(".", 2)[2:]
        if tail and (loaded is None or key.split(".")[1] in [stage.name for stage in loaded.config.stages]):
            return explain("stages.<name>." + tail[0], None)
    if not rows:
        known = [*(pattern for pattern, _ in known_keys()), *Config.model_fields, *values]
        near = difflib.get_close_matches(key, known, 3, 0.6)
        near = near or [pattern for pattern in known if pattern.rsplit(".", 1)[-1] == key]
        hint = f"did you mean {' or '.join(near)}?" if near else f"sections: {', '.join(Config.model_fields)}"
        raise ConfigError(f"there is no key {key}", "no section has it", hint, DOCS)
    return rows


def diff(left: Config, right: Config) -> list[Difference]:
    """Keys whose values differ, defaults filled in on both sides."""
    a, b = flatten(left), flatten(right)
    found = []
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in b:
            found.append(Difference(key, a[key], None, "right"))
        elif key not in a:
            found.append(Difference(key, None, b[key], "left"))
        elif a[key] != b[key]:
            found.append(Difference(key, a[key], b[key]))
    return found


def type_name(annotation: Any) -> str:
    """An annotation as a reader would say it: `whole number`, `one of a, b`, `list of text`."""
    simple = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}
    if annotation in simple:
        return simple[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__.lower()
    arguments = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(str(part) for part in arguments)}"
    if get_origin(annotation) is list:
        return f"list of {type_name(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}}}"
    if get_origin(annotation) is tuple:
        return f"{len(arguments)} values, each a {type_name(arguments[0])}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(type_name(part) for part in arguments)
    return type_name(arguments[0]) if arguments else str(annotation)


def scalar(value: Any) -> str:
    """A value in YAML on one line."""
    if isinstance(value, tuple):
        value = list(value)
    return dump(value, flow=True).strip()


def _lines(section: BaseModel, origins: Mapping[str, str], prefix: str, indent: str) -> Iterator[tuple[str, str]]:
    for name in type(section).model_fields:
        value, key = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:", ""
            yield from _lines(value, origins, f"{key}.", indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            yield f"{indent}{name}:", ""
            for item in value:
                inner = list(_lines(item, origins, f"{key}.{item.name}.", indent + "    "))
                for number, (text, note) in enumerate(inner):
                    yield (f"{indent}  - {text.lstrip()}" if number == 0 else text), note
        else:
            yield f"{indent}{name}: {scalar(value)}", (origin_of(key, origins) if origins else "")


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Where a value comes from; of one with free keys, {SET: WEIGHT} for example, where these come from."""
    found = dict.fromkeys(origin for name, origin in origins.items() if _below(key, name))
    return ", ".join(found) or DEFAULT


def _matches(pattern: str, key: str) -> bool:
    parts, names = pattern.split("."), key.split(".")
    return len(parts) == len(names) and all(a in ("<name>", b) for a, b in zip(parts, names, strict=True))


def _below(key: str, name: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _explanation(key: str, field: FieldInfo, value: Any, origin: str) -> Explanation:
    if field.default_factory is not None:
        default = "empty"
    elif field.default is PydanticUndefined:
        default = "none, must be given"
    else:
        default = scalar(field.default) if not sections(field.annotation) else ""
    limits = [_limit(item) for item in field.metadata]
    kind = "; ".join([type_name(field.annotation), *(limit for limit in limits if limit)])
    return Explanation(key, kind, default, field.description or "", value, origin)


def _limit(item: Any) -> str:
    words = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    inner = getattr(item, "metadata", None)
    if inner:
        return ", ".join(text for part in inner if (text := _limit(part)))
    return ", ".join(
        f"{sign} {getattr(item, name)}" for name, sign in words.items() if getattr(item, name, None) is not None
    )
