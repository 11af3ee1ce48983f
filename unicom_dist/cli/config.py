"""`unicom config`: what a recipe resolves to, what a key means, how two recipes differ."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicom_dist.cli.screen import AsJson, Overrides, Recipe, load, print_json, print_table, say
from unicom_dist.config.errors import ConfigError

if TYPE_CHECKING:
    from unicom_dist.config.schema import Config

DOCS = "docs/parallelism.md#dp-and-zero"
app = typer.Typer(help="Show, explain and compare recipes.", no_args_is_help=True)


@app.command()
def show(
    recipe: Recipe,
    overrides: Overrides = None,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="Only what DeepSpeed is given, as JSON.")] = False,
    stage: Annotated[str, typer.Option(help="With --deepspeed: for this stage; default: the last that trains.")] = "",
    as_json: AsJson = False,
) -> None:
    """Print the resolved recipe, every value with its origin."""
    from unicom_dist.config import explain as written

    loaded = load(recipe, overrides)
    if deepspeed:
        print_json(generated(loaded.config, stage))
    elif as_json:
        flat = written.flatten(loaded.config)
        origins = {key: loaded.origins.get(key, written.DEFAULT) for key in flat}
        print_json({"config": loaded.config.model_dump(mode="json"), "origins": origins})
    else:
        say(written.to_yaml(loaded.config, loaded.origins).rstrip("\n"))


@app.command()
def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A dotted key or a section, such as codec.decoder.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Also show the value there.")] = "",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what a key means, its type, default and value in a recipe."""
    from unicom_dist.config import explain as written

    rows = written.explain(key, load(recipe, overrides) if recipe else None)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    for row in rows:
        say(row.key)
        if recipe and row.origin:
            say(f"  value    {written.scalar(row.value)}  ({row.origin})")
        say(f"  type     {row.type}")
        if row.default:
            say(f"  default  {row.default}")
        if row.meaning:
            say(f"  meaning  {row.meaning}")


@app.command()
def diff(
    left: Annotated[str, typer.Argument(metavar="LEFT", help="A recipe, or a run directory.")],
    right: Annotated[str, typer.Argument(metavar="RIGHT", help="A recipe, or a run directory.")],
    as_json: AsJson = False,
) -> None:
    """List the keys whose values differ, defaults filled in."""
    from unicom_dist.config import explain as written

    found = written.diff(load(left, None).config, load(right, None).config)
    if as_json:
        print_json([asdict(item) for item in found])
        return
    sides = [
        (
            item.key,
            "-" if item.missing == "left" else written.scalar(item.left),
            "-" if item.missing == "right" else written.scalar(item.right),
        )
        for item in found
    ]
    if sides:
        print_table(("key", left, right), sides)
    else:
        say("no differences")


def generated(config: "Config", stage: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a stage (default: the last that trains) on `parallel.nproc` ranks. ConfigError."""
    from unicom_dist.parallel.deepspeed_config import deepspeed_config

    trained = [item for item in config.stages if item.kind != "latents" and stage in ("", item.name)]
    if not trained:
        names = ", ".join(item.name for item in config.stages if item.kind != "latents")
        raise ConfigError(f"--stage {stage}", "the recipe trains no such stage", f"one of: {names or 'none'}", DOCS)
    layout = config.layout(trained[-1], config.parallel.nproc)
    if not layout.zero_stage:
        raise ConfigError("parallel.zero_stage = 0", "such a run does without DeepSpeed", "1, 2 or 3", DOCS)
    precision = trained[-1].precision
    if precision == "auto":
        print("precision: auto is shown as bfloat16, which it is on GPUs", file=sys.stderr)
        precision = "bfloat16"
    return deepspeed_config(config.parallel, layout, precision, config.deepspeed.extra)
