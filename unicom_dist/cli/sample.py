"""`unicom sample`: pictures for prompts, captions for images, reconstructions beside originals."""

from pathlib import Path
from typing import Annotated

import typer

from unicom_dist.cli.screen import logged, say
from unicom_dist.config.errors import ConfigError

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A run directory or an exported model folder.")]


def sample(
    checkpoint: Checkpoint,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to draw.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Describe this image; may be repeated.")] = None,
    reconstruct: Annotated[str, typer.Option(help="Encode and decode the images of this folder, or `heldout`.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="Solver steps; 0 = as the recipe says.")] = 0,
    guidance: Annotated[float, typer.Option(help="Guidance weight; negative = as the recipe says.")] = -1.0,
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt; images reconstructed.")] = 1,
) -> None:
    """Draw the prompts, describe images, or reconstruct images."""
    if not (prompts or image or reconstruct):
        raise ConfigError(
            "nothing to do",
            "neither a prompt nor --image nor --reconstruct was given",
            f'write for example `unicom sample {checkpoint} "red apple"`',
            "docs/getting-started.md",
        )
    from unicom_dist.sample import command

    with logged():
        for line in command.run(
            checkpoint,
            prompts=prompts or [],
            images=image or [],
            reconstruct=reconstruct,
            out=out,
            seed=seed,
            steps=steps,
            guidance=guidance,
            count=count,
        ):
            say(line)
