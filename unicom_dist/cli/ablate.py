"""`unicom ablate`: the same training for every variant of a grid and several seeds, compared on one page."""

import typer

from unicom_dist.cli.screen import Overrides, Recipe, load, logged, say

app = typer.Typer(no_args_is_help=True, help="Train the variants of a grid with several seeds, compare them.")


@app.command("codec")
def codec(recipe: Recipe, overrides: Overrides = None) -> None:
    """Channels against tokens, attention against MLP. Finished trainings are skipped, interrupted ones continue."""
    loaded = load(recipe, overrides)

    from unicom_dist.train.ablation import codec as ablation

    with logged():
        page = ablation.run(loaded, say)
    say(f"page: {page}")


@app.command("pathway")
def pathway(recipe: Recipe, overrides: Overrides = None) -> None:
    """Pathway I against II, compressed latents against all channels. Finished trainings are skipped."""
    loaded = load(recipe, overrides)

    from pipelines import latents
    from unicom_dist.train.ablation import pathway as ablation

    with logged():
        page = ablation.run(loaded, latents.run, say)
    say(f"page: {page}")
