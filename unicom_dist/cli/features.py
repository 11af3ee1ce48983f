"""`unicom features`: encode the shards of a recipe with its encoder, into feature tars joined by key."""

import typer

from unicom_dist.cli.screen import AsJson, Overrides, Recipe, load, logged, print_json, print_table
from unicom_dist.config.errors import DataError

app = typer.Typer(help="Encode shards into feature tars with Ray.", no_args_is_help=True)


@app.command()
def run(recipe: Recipe, overrides: Overrides = None) -> None:
    """Encode what is not encoded yet; may be interrupted and run again."""
    from pipelines import features

    with logged():
        features.run(load(recipe, overrides).config)


@app.command()
def status(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say how many shards of each set are encoded."""
    from pipelines import features

    rows = features.status(load(recipe, overrides).config)
    if as_json:
        print_json(rows)
    else:
        print_table(("set", "shards done", "of", "samples"), [[str(cell) for cell in row.values()] for row in rows])


@app.command()
def verify(recipe: Recipe, overrides: Overrides = None) -> None:
    """Read every feature tar. It is compared with its manifest and the images it belongs to."""
    from pipelines import features

    with logged():
        problems = features.verify(load(recipe, overrides).config)
    if problems:
        raise DataError(
            f"{len(problems)} problems in the feature tars",
            "; ".join(problems[:3]),
            "delete the named tars and run `unicom features run` again",
            "docs/data.md",
        )
