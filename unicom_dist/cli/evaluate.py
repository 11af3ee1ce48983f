"""`unicom eval`: figures of a trained model on held-out data, each with its interval and what it must beat."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unicom_dist.cli.screen import AsJson, console, logged, print_json
from unicom_dist.config.errors import ConfigError

if TYPE_CHECKING:
    from unicom_dist.evaluate.parts import Build, Execute, PartTask
    from unicom_dist.evaluate.rows import Row

DOCS = "docs/evaluation.md"
Model = Annotated[str, typer.Argument(metavar="CKPT", help="A run directory or a saved model folder.")]


def evaluate(
    checkpoint: Model = "",
    suite: Annotated[
        Literal["quick", "reconstruction"], typer.Option(help="quick: everything, on few; reconstruction: the codec.")
    ] = "quick",
    recipe: Annotated[str, typer.Option(help="Names the data and the judges; a model folder has no own.")] = "",
    out: Annotated[str, typer.Option(help="Folder for eval.json and the pictures [default: CKPT, else eval].")] = "",
    originals: Annotated[str, typer.Option(help="reconstruction without CKPT: a folder of pictures.")] = "",
    reconstructions: Annotated[str, typer.Option(help="... and one of the same names, made from them.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="reconstruction: most pictures; 0 = all.")] = 0,
    workers: Annotated[
        int, typer.Option(min=0, help="reconstruction: processes; 0 = one per GPU, or per core without GPUs.")
    ] = 1,
    skip_done: Annotated[
        bool, typer.Option("--skip-done", help="quick: keep figures that are of these weights and settings already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure reconstructions, losses and pictures on held-out data. Also written to eval.json."""
    folders = bool(originals or reconstructions)
    _check(checkpoint, suite, originals, reconstructions, limit, workers)
    from unicom_dist.evaluate.rows import table

    with logged(json_on_stdout=as_json):
        rows: list[Row]
        if suite == "quick":
            from unicom_dist.evaluate import quick

            rows = quick.run(checkpoint, recipe=recipe, out=out, skip_done=skip_done)
        else:
            from unicom_dist.evaluate import reconstruction_suite

            execute = _executor(workers)
            if folders:
                rows = reconstruction_suite.run_folders(
                    originals, reconstructions, recipe, out or "eval", limit, execute
                )
            else:
                rows = reconstruction_suite.run(checkpoint, recipe, out, limit, execute)
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        console().print(table(rows, f"{suite} suite: {reconstructions if folders else checkpoint}"))


def _check(checkpoint: str, suite: str, originals: str, reconstructions: str, limit: int, workers: int) -> None:
    """ConfigError unless the arguments go together."""
    example = "`unicom eval RUN`, or `unicom eval --suite reconstruction --originals A --reconstructions B`"
    if suite == "quick" and (originals or reconstructions or limit or workers != 1):
        raise ConfigError(
            "--originals, --reconstructions, --limit and --workers with --suite quick",
            "they belong to the suite `reconstruction`",
            "add --suite reconstruction",
            DOCS,
        )
    if bool(originals) != bool(reconstructions) or bool(checkpoint) == bool(originals):
        given = " ".join(
            text
            for text in (
                checkpoint,
                originals and f"--originals {originals}",
                reconstructions and f"--reconstructions {reconstructions}",
            )
            if text
        )
        why = "either a model is measured, or a folder of pictures against another one"
        raise ConfigError(f"unicom eval {given or 'of nothing'}", why, example, DOCS)


def _executor(workers: int) -> "Execute":
    """In this process for one worker, else on Ray; with a progress bar either way."""

    def execute(build: "Build", tasks: "Sequence[PartTask]") -> "Iterator[tuple[PartTask, Any]]":
        from pipelines.progress import JobProgress
        from unicom_dist.evaluate.parts import in_this_process

        with JobProgress("pictures measured", sum(task.last - task.first for task in tasks)) as progress:
            finished = 0

            def show(running: int) -> None:
                progress.update(finished + running)

            for task, result in in_this_process(build, tasks) if workers == 1 else _on_ray(build, tasks, workers, show):
                finished += task.last - task.first
                progress.update(finished)
                yield task, result

    return execute


def _on_ray(
    build: "Build", tasks: "Sequence[PartTask]", workers: int, on_count: Callable[[int], None]
) -> "Iterator[tuple[PartTask, Any]]":
    from pipelines.ray_pool import ActorPool, ray_session, resources

    share = resources(workers, len(tasks))
    with ray_session(share), ActorPool(build, share) as pool:
        yield from pool.run(tasks, on_count)
