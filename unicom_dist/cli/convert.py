"""`unicom convert`: weights from one form into another, tensor by tensor."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from unicom_dist.cli.screen import logged, say
from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.layout import AXES, Layout

DOCS = "docs/checkpoints.md"
app = typer.Typer(help="Turn runs, checkpoints and published weights into one another.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Turn runs, checkpoints and published weights into one another."""


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, a checkpoint or a model folder.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to write; must not exist.")],
    stage: Annotated[str, typer.Option(help="A prior stage other than the last finished one.")] = "",
    weights: Annotated[Literal["ema", "raw"], typer.Option(help="Averaged, or as the optimizer left them.")] = "ema",
    form: Annotated[
        Literal["unicom", "qwen"], typer.Option("--format", help="A model folder, or the backbone as Qwen2.5.")
    ] = "unicom",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the weights written.")] = "bfloat16",
) -> None:
    """Write what a run has trained as one folder. For `unicom sample`, or for transformers."""
    _must_be_new(out)
    import torch

    from unicom_dist.sample.export import export as write

    with logged():
        write(source, out, stage, weights, form, getattr(torch, dtype))
    use = f"draw with `unicom sample {out} PROMPT`" if form == "unicom" else "load with transformers' from_pretrained"
    say(f"{out}: {_megabytes(out)}; {use}")


@app.command()
def check(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder.")]) -> None:
    """Read a model folder whole, hold it against its manifest.json."""
    from unicom_dist.sample.model_folder import MANIFEST, problems_of, read_manifest

    files = read_manifest(folder).get("files", {})
    problems = problems_of(folder) if files else [f"there is no {MANIFEST} in it"]
    if problems:
        raise CheckpointError(
            f"{folder} is not as it was exported", "; ".join(problems[:3]), "copy or export it again", DOCS
        )
    say(f"{folder}: {len(files)} files are as they were exported")


@app.command()
def reshard(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder checkpoints/<stage>/step-….")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="The checkpoint to write; must not exist.")],
    layout: Annotated[str, typer.Option(help="Sizes of the axes, such as tp=2,pp=2,dp=2; others are 1.")],
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage of the new layout.")] = 3,
) -> None:
    """Rewrite a checkpoint as ranks of another layout write it. Loading it there does not need this."""
    _must_be_new(out)
    from unicom_dist.checkpoint.reshard import reshard as rewrite

    with logged():
        rewrite(checkpoint, out, _layout(layout, zero))
    say(f"{out}: {_megabytes(out)}")


@app.command("import")
def import_(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="Published weights: a Qwen2.5, or a vision-language model around one."),
    ],
    out: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe to write; must not exist.")],
    base: Annotated[str, typer.Option(help="The recipe it changes.")] = "quickstart",
) -> None:
    """Write a recipe that starts from published weights. All their tensors must be there.

    Nothing is copied: training reads the published files, each rank its own part.
    """
    _must_be_new(out)
    import yaml

    from unicom_dist.config.load import find_recipe
    from unicom_dist.models.published import prior_section

    recipe = {"base": str(find_recipe(base).resolve()), "prior": prior_section(folder)}
    out.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    say(f"{out}: train with `unicom train {out}`")


def _must_be_new(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists", "it is written whole, not into what is there", "name a new one", DOCS)


def _layout(text: str, zero_stage: int) -> Layout:
    """The layout that e.g. tp=2,pp=2 describes. ConfigError."""
    found: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        if name not in AXES or name in found or not value.isdecimal() or not int(value):
            raise ConfigError(
                f"--layout {text}: {item.strip()!r}",
                f"an axis is one of {', '.join(AXES)}, named once, its size a positive number",
                "--layout tp=2,pp=2,dp=2",
                DOCS,
            )
        found[name] = int(value)
    pp, dp, ulysses, tp = (found.get(axis, 1) for axis in AXES)
    return Layout(dp, tp, pp, ulysses, zero_stage=zero_stage)


def _megabytes(folder: Path) -> str:
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"
