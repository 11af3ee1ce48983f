"""`unicom generate`: a file of prompts drawn into a folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from unicom_dist.cli.screen import logged


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run directory or a saved model folder.")],
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="A .txt, .jsonl, .csv, .tsv or .parquet file.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    workers: Annotated[
        int, typer.Option(min=0, help="Ray actors; 1 = no Ray, 0 = one per GPU, or per core without.")
    ] = 0,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    form: Annotated[
        Literal["files", "tars"], typer.Option("--format", help="PNGs, or WebDataset tars of PNG, text and JSON.")
    ] = "files",
    seed: Annotated[int | None, typer.Option(help="Of rows without their own.", show_default="the recipe's")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.", show_default="the recipe's")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="1 = none.", show_default="the recipe's")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun or dpm.", show_default="the recipe's")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of the computation.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Pictures an actor draws at a time.")] = 16,
    column: Annotated[str, typer.Option(help="Where a table has its prompts.")] = "prompt",
    shard_samples: Annotated[int, typer.Option(min=1, help="Pictures per tar.")] = 256,
    stage: Annotated[str, typer.Option(help="A prior stage other than the last finished one.")] = "",
) -> None:
    """Draw every prompt of a file; may be interrupted and run again."""
    from pipelines import generate as job
    from unicom_dist.cli.sample import settings_of

    with logged():
        base = settings_of(model, seed=seed, steps=steps, guidance=guidance, solver=solver)
        settings = job.Settings(
            images_per_prompt=images_per_prompt,
            seed=base.seed,
            steps=base.steps,
            guidance=base.guidance,
            guidance_interval=base.guidance_interval,
            renorm=base.renorm,
            renorm_min=base.renorm_min,
            solver=base.solver,
            decoder_steps=base.decoder_steps,
            decoder_guidance=base.decoder_guidance,
            dtype=dtype,
        )
        job.run(model, prompts, out, settings, form, batch, workers, stage, column, shard_samples)
