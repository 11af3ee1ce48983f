"""`unicom data`: fetch what a recipe needs, make shards of image-text pairs, look at them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from unicom_dist.cli.screen import AsJson, Overrides, Recipe, load, logged, print_json, print_table, say
from unicom_dist.config.errors import ConfigError, DataError

DOCS = "docs/data.md"
app = typer.Typer(help="Fetch assets; make, check and show shards of image-text pairs.", no_args_is_help=True)
Source = Annotated[
    str, typer.Argument(metavar="RECIPE|SOURCE", help="A recipe; or, with --out, a folder, table or glob of tars.")
]


@app.command()
def fetch(
    recipe: Recipe,
    overrides: Overrides = None,
    suite: Annotated[
        Literal["quick", "reconstruction"], typer.Option(help="Also what this evaluation needs.")
    ] = "quick",
) -> None:
    """Fetch the assets the recipe names, pinned and digest-checked. What is there is not fetched again."""
    from pipelines import fetch as job

    with logged():
        job.run(load(recipe, overrides).config, suite=suite)


@app.command()
def ingest(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="Folder for the sets; SOURCE is then a source, not a recipe.")] = "",
    name: Annotated[str, typer.Option("--set", help="Make this one of data.sets of data.source instead.")] = "train",
) -> None:
    """Turn a source into shards. Beside them index and manifest; held-out keys are split off.

    A source is of image-text pairs; with --set also of texts, documents or conversations, as data.sets says.
    """
    from pipelines import ingest as job
    from unicom_dist.config.load import load_values

    if out:
        values = {"name": "ingest", "run_dir": out, "data": {"source": source, "path": out}}
        loaded = load_values(values, overrides or [])
    else:
        if (folder := Path(source)).is_dir() and not (folder / "config.yaml").is_file():
            why = "it is a source, not a recipe, and says nothing about where the sets go"
            raise ConfigError(f"unicom data ingest {source}", why, "add --out and a folder, such as data/mine", DOCS)
        loaded = load(source, overrides)
    with logged():
        job.run(loaded.config, name=name)


@app.command()
def check(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare every shard with its manifest, byte for byte."""
    from unicom_dist.data.overview import check_sets

    checks = list(check_sets(load(recipe, overrides).config.data.path))
    if as_json:
        print_json([asdict(item) for item in checks])
    else:
        rows = [(c.set, c.part, str(c.shards), str(c.samples), "; ".join(c.problems) or "whole") for c in checks]
        print_table(("set", "part", "shards", "samples", "state"), rows)
    damaged = [item for item in checks if item.problems]
    if damaged:
        first = damaged[0]
        raise DataError(
            f"{len(damaged)} of {len(checks)} parts are damaged",
            f"{first.set}/{first.part}: {first.problems[0]}",
            "run the command that made them again: `unicom data ingest`, `unicom features run`",
            DOCS,
        )


@app.command()
def stats(recipe: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Count samples, bytes and captions of every set."""
    from unicom_dist.data.overview import set_stats

    found = list(set_stats(load(recipe, overrides).config.data.path))
    if as_json:
        print_json([asdict(item) for item in found])
        return
    columns = (
        "set",
        "shards",
        "samples",
        "MB",
        "distinct captions",
        "words per caption",
        "further captions",
        "skipped",
    )
    rows = [
        (
            s.set,
            s.shards,
            s.samples,
            f"{s.bytes / 1e6:.1f}",
            s.distinct_captions,
            f"{s.mean_words:.1f}",
            s.further_captions,
            s.skipped,
        )
        for s in found
    ]
    print_table(columns, [[str(cell) for cell in row] for row in rows])


@app.command()
def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("preview.png"),
    name: Annotated[str, typer.Option("--set", help="train, augmented, heldout, edits, …")] = "train",
    count: Annotated[int, typer.Option(min=1, help="Pictures shown.")] = 24,
) -> None:
    """Draw pictures of a set under their captions into one image file."""
    from PIL import Image

    from unicom_dist.data import overview
    from unicom_dist.sample.grid import picture_grid

    config = load(recipe, overrides).config
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"--out {out}", "its ending names no kind of picture", f"for example {out}.png", DOCS)
    images, captions = overview.preview(config.data.path, name, count)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(images, captions, title=f"{config.data.path} {name}").save(out)
    say(f"{len(images)} pictures: {out}")
