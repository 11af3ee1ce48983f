"""`unicom convert`: weights from one form into another."""

from pathlib import Path
from typing import Annotated

import typer

from unicom_dist.cli.screen import logged, say
from unicom_dist.config.errors import ConfigError

app = typer.Typer(help="Turn a run into a model folder.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Turn a run into a model folder."""


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model folder to write; must not exist.")],
    stage: Annotated[str, typer.Option(help="A prior stage other than the last finished one.")] = "",
) -> None:
    """Write what a run has trained as one folder: averaged weights in bfloat16, vocabulary, latent statistics."""
    if out.exists():
        raise ConfigError(f"{out} exists", "a model folder is written whole, not into another", "name a new folder")
    from unicom_dist.sample.pipeline import UniComPipeline

    with logged():
        UniComPipeline.from_pretrained(run, stage=stage).save_pretrained(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{out}: {size / 1e6:.1f} MB; draw with `unicom sample {out} PROMPT`")
