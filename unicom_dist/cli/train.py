"""`unicom train`: the stages of a recipe, in order, each on as many ranks as asked for."""

import os
from typing import Annotated

import typer

from unicom_dist.cli.screen import Overrides, Recipe, load, logged, say
from unicom_dist.config.errors import ConfigError


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=0, help="Ranks on this machine; 0 = parallel.nproc.")] = 0,
    stage: Annotated[str, typer.Option(help="Only this stage.")] = "",
) -> None:
    """Train the stages of a recipe. Finished stages are skipped, an interrupted one continues from its checkpoint."""
    loaded = load(recipe, [*(overrides or []), *([f"parallel.nproc={nproc}"] if nproc else [])])
    config = loaded.config
    names = [item.name for item in config.stages]
    if stage and stage not in names:
        from difflib import get_close_matches

        near = get_close_matches(stage, names, 1, 0.5)
        remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none'}"
        raise ConfigError(f"--stage {stage}", "the recipe has no such stage", remedy, "docs/configuration.md#stages")

    from pipelines import latents
    from unicom_dist.config.explain import write_config
    from unicom_dist.tracking.env import write_env
    from unicom_dist.tracking.mirror import start_mirror
    from unicom_dist.tracking.status import write_status
    from unicom_dist.train import pipeline

    pipeline.preflight(config)
    table = pipeline.who_is_where(config)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        write_config(config.run_dir, config, loaded.origins)
        write_env(config.run_dir, layout=table)
        write_status(config.run_dir, "running")  # what an earlier start left there is no longer true
        start_mirror(config.run_dir, config.tracking)
        if table:
            say(f"ranks of the prior's stages:\n{table}")
    with logged():
        pipeline.run(config, latents.run, only=stage, say=say)
