"""pydantic's findings as errors a user can act on: the dotted key, its value and origin, the reason, what would work.

Imports no torch.
"""

import difflib
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import Config, Unworkable
from unicom_dist.config.tree import DOCS

NEEDS = {
    "int_type": "needs a whole number",
    "int_from_float": "needs a whole number",
    "float_type": "needs a number",
    "finite_number": "needs a finite number",
    "string_type": "needs text (put it in quotes)",
    "bool_type": "needs true or false",
    "list_type": "needs a list",
    "tuple_type": "needs a list",
    "model_type": "is a section: it needs `key: value` lines",
    "model_attributes_type": "is a section: it needs `key: value` lines",
}


def explain_problems(error: ValidationError, data: Any, origins: dict[str, str], recipe: str) -> ConfigError:
    """One ConfigError for all findings of `error` about the plain tree `data`."""
    problems = [_problem(item, data, origins) for item in error.errors()]
    if len(problems) == 1:
        return problems[0]
    listed = "\n".join(
        f"        {item.what}: {'; '.join(text for text in (item.why, item.remedy) if text)}" for item in problems
    )
    return ConfigError(f"{len(problems)} values in {recipe} cannot work", "\n" + listed, "change each as said", DOCS)


def _problem(item: ErrorDetails, data: Any, origins: dict[str, str]) -> ConfigError:
    key = dotted(item["loc"], data)
    where = f" ({origins[key]})" if key in origins else ""
    parent, _, name = key.rpartition(".")
    field = _field(item["loc"])
    docs = f"{DOCS}#{key.split('.')[0]}" if key else DOCS
    context = item.get("ctx", {})
    kind = item["type"]
    if kind == "value_error":
        cause = context.get("error")
        what, why, remedy = cause.parts if isinstance(cause, Unworkable) else (str(cause), "", "")
        return ConfigError(f"{key}: {what}" if key else what, why, remedy, docs)
    if kind == "extra_forbidden":
        known = list(_section(item["loc"][:-1]).model_fields)
        return ConfigError(
            f"{key}{where} is not a known key",
            f"{f'section {parent}' if parent else 'a recipe'} has no {name}",
            _nearest_key(name, parent, known),
            docs,
        )
    if kind == "missing":
        meaning = f" ({field.description})" if field is not None and field.description else ""
        return ConfigError(
            f"{key} is missing", f"it has no default{meaning}", f"add it, or override it: {key}=...", docs
        )
    why = NEEDS.get(kind) or item["msg"].removeprefix("Input ")
    return ConfigError(f"{key} = {item['input']!r}{where}", why, _remedy(field, item), docs)


def dotted(loc: tuple[int | str, ...], data: Any) -> str:
    """A location as users write it: `stages.sft.steps` rather than `stages.3.steps`."""
    parts, here = [], data
    for part in loc:
        if isinstance(part, int) and isinstance(here, list) and part < len(here):
            here = here[part]
            named = isinstance(here, dict) and isinstance(here.get("name"), str)
            parts.append(here["name"] if named else str(part))
        else:
            here = here.get(part) if isinstance(here, dict) else None
            parts.append(str(part))
    return ".".join(parts)


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections a field's annotation names, directly or as items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (list, tuple, Union, types.UnionType, Annotated):
        return [found for part in get_args(annotation) for found in sections(part)]
    return []


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every (dotted key, field) of the schema; an item of a list appears as `<name>`."""
    for name, field in model.model_fields.items():
        key = prefix + name
        inner = sections(field.annotation)
        if inner:
            star = ".<name>." if get_origin(field.annotation) is list else "."
            for section in inner:
                yield from known_keys(section, key + star)
        else:
            yield key, field


def _section(loc: tuple[int | str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            inner = sections(model.model_fields[part].annotation)
            model = inner[0] if inner else model
    return model


def _field(loc: tuple[int | str, ...]) -> FieldInfo | None:
    names = [part for part in loc if isinstance(part, str)]
    while names and names[-1] not in _section(tuple(names[:-1])).model_fields:
        names.pop()
    return _section(tuple(names[:-1])).model_fields.get(names[-1]) if names else None


def _nearest_key(name: str, parent: str, known: list[str]) -> str:
    prefix = f"{parent}." if parent else ""
    near = [prefix + match for match in difflib.get_close_matches(name, known, 1, 0.6)]
    elsewhere = [key for key, _ in known_keys() if key.rsplit(".", 1)[-1] == name]
    if near or elsewhere:
        return f"did you mean {' or '.join([*near, *elsewhere][:3])}?"
    return f"known here: {', '.join(known)}"


def _remedy(field: FieldInfo | None, item: ErrorDetails) -> str:
    if field is None:
        return ""
    choices = [str(choice) for choice in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    near = difflib.get_close_matches(str(item["input"]), choices, 1, 0.5)
    parts = [f"did you mean {near[0]}" if near else "", f"one of {', '.join(choices)}" if choices else ""]
    parts.append(f"it means: {field.description}" if field.description else "")
    if not field.is_required() and field.default_factory is None and not sections(field.annotation):
        parts.append(f"default {field.default!r}")
    return "; ".join(part for part in parts if part)
