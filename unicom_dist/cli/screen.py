"""What every subcommand shares: where it prints, how it shows tables and JSON, how it reads a recipe."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from unicom_dist.config.load import Loaded

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe: a path, or the name of an installed one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes, such as stages.codec.steps=10.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load(recipe: str, overrides: Sequence[str] | None) -> "Loaded":
    """The checked recipe. ConfigError."""
    from unicom_dist.config.load import load_recipe

    return load_recipe(recipe, overrides or [])


def console() -> "Console":
    """Rich on stdout; wide where there is no terminal to say how wide it is."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    """One line on stdout, as it is."""
    print(text, flush=True)


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; tab-separated lines elsewhere."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("\t".join(row))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


@contextmanager
def logged(json_on_stdout: bool = False) -> Iterator[None]:
    """Show what the library logs during the block: information on stdout unless JSON goes there, else on stderr."""
    inform = logging.StreamHandler(sys.stderr if json_on_stdout else sys.stdout)
    warn = logging.StreamHandler(sys.stderr)
    inform.addFilter(lambda record: record.levelno < logging.WARNING)
    inform.setFormatter(logging.Formatter("%(message)s"))
    warn.setLevel(logging.WARNING)
    warn.setFormatter(logging.Formatter("warning: %(message)s"))
    own = [logging.getLogger(name) for name in ("unicom_dist", "pipelines")]
    for logger in own:
        logger.handlers += [inform, warn]
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in own:
            logger.handlers = [handler for handler in logger.handlers if handler not in (inform, warn)]
            logger.propagate = True
