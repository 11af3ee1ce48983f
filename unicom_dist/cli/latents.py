"""`unicom latents`: compress the features with a trained codec, into latent tars and their statistics."""

from functools import partial

import typer

from unicom_dist.cli.screen import Overrides, Recipe, load, logged

app = typer.Typer(help="Compress features into latent tars with Ray.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Compress features into latent tars with Ray."""


@app.command()
def run(recipe: Recipe, overrides: Overrides = None) -> None:
    """Compress what is not compressed yet. `unicom train` does it by itself between its codec and prior stages."""
    from pipelines import latents
    from unicom_dist.train.pipeline import note_latents

    config = load(recipe, overrides).config
    with logged():
        latents.run(config, partial(note_latents, config))
