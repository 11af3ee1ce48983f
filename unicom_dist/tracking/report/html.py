"""HTML built from escaped pieces: a string becomes text, only `Markup` goes in as it is."""

import html
from typing import Union

Child = Union["Markup", str, int, float, None]
_VOID = ("img", "meta", "br", "input")


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


def text(value: Child) -> Markup:
    """`value` as HTML: markup unchanged, everything else escaped, None as nothing."""
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else html.escape(str(value), quote=True))


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """`<name …>children</name>`. An attribute True stands alone, False or None is left out; `_` in names is `-`."""
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    if name in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{''.join(text(child) for child in children)}</{name}>")


def join(*children: Child) -> Markup:
    """The children one after the other."""
    return Markup("".join(text(child) for child in children))


def table(head: list[Child], rows: list[list[Child]], numeric: tuple[int, ...] = (), class_: str = "") -> Markup:
    """A table; columns in `numeric` are set right-aligned with figures of equal width."""

    def cells(kind: str, row: list[Child]) -> Markup:
        return tag(
            "tr", *(tag(kind, cell, class_="num" if column in numeric else None) for column, cell in enumerate(row))
        )

    body = tag("tbody", *(cells("td", row) for row in rows))
    inner = tag("table", tag("thead", cells("th", head)), body, class_=class_ or None)
    return tag("div", inner, class_="scroll")
