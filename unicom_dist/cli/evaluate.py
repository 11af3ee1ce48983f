"""`unicom eval`: figures of a trained model on held-out data, each beside an untrained model and a trivial baseline."""

from typing import Annotated, Literal

import typer

from unicom_dist.cli.sample import Checkpoint
from unicom_dist.cli.screen import AsJson, console, logged, print_json


def evaluate(
    checkpoint: Checkpoint,
    suite: Annotated[Literal["quick"], typer.Option(help="Which figures.")] = "quick",
    recipe: Annotated[str, typer.Option(help="Names the data and the judges; a model folder has no own.")] = "",
    out: Annotated[str, typer.Option(help="Folder for eval.json and the pictures [default: CKPT].")] = "",
    as_json: AsJson = False,
) -> None:
    """Measure reconstructions, losses and pictures on held-out data; also written to eval.json."""
    from unicom_dist.evaluate import quick
    from unicom_dist.evaluate.rows import table

    with logged(json_on_stdout=as_json):
        rows = quick.run(checkpoint, recipe=recipe, out=out)
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        console().print(table(rows, f"{suite} suite: {checkpoint}"))
