"""`unicom train`: the stages of a recipe, in order, each on as many ranks as asked for."""

from typing import Annotated

import typer

from unicom_dist.cli.screen import Overrides, Recipe, load, logged


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=0, help="Ranks on this machine; 0 = parallel.nproc.")] = 0,
    stage: Annotated[str, typer.Option(help="Only this stage.")] = "",
) -> None:
    """Train the stages of a recipe; finished stages are skipped, an interrupted one continues from its checkpoint."""
    changes = [*(overrides or []), *([f"parallel.nproc={nproc}"] if nproc else [])]
    loaded = load(recipe, changes)

    from pipelines import latents
    from unicom_dist.train import pipeline

    with logged():
        pipeline.run(loaded.config, loaded, runners={"latents": latents.run}, stage=stage)
