"""The stages of a recipe, in order: training stages in groups of ranks, the latents between them by whoever is given.

Consecutive training stages share one start of the ranks. A stage whose exported weights are those of its last step is
skipped, and said so; a stage that was stopped continues. The same call is therefore right for the first start and after
any interruption. Imports no torch: the ranks import it themselves, and starting them must not wait for it.
"""

import json
import logging
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from unicom_dist.config.errors import ConfigError, DataError, Preempted, PreflightError, UnicomError
from unicom_dist.config.layout import Layout, refusals
from unicom_dist.config.schema import EDITS, Config, StageConfig
from unicom_dist.config.storage import storage_error
from unicom_dist.data.manifest import Manifest
from unicom_dist.tracking.metrics import MetricsWriter, read_metrics
from unicom_dist.tracking.status import State, read_status, write_status

log = logging.getLogger(__name__)
Runner = Callable[[Config, Callable[[str], None]], object]
MIN_FREE_BYTES = 256 << 20


def run(
    config: Config,
    run_latents: Runner,
    *,
    only: str = "",
    say: Callable[[str], None] = log.info,
) -> None:
    """Run the stages of `config` (or the one named `only`) that are not done yet.

    `run_latents(config, on_state)` computes the latents of a finished codec and tells its state; `say` receives a line
    for the user per event. When torchrun or srun started this process, it is one of the ranks, else the ranks are
    started here.
    Raises whatever ended the run, after writing it to the status file.
    """
    from unicom_dist.train.launch import joined

    preflight(config)
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) if joined() else 0
    stages = [config.stage(only)] if only else list(config.stages)
    started = time.monotonic()
    stage = stages[0] if stages else None
    try:
        for group in grouped(stages):
            todo = []
            for stage in group:
                if finished(config, stage):
                    say(f"{stage.name}: finished before, skipped")
                else:
                    todo.append(stage)
            if not todo:
                continue
            stage = todo[0]
            if stage.kind == "latents":
                if rank == 0:
                    say(f"{stage.name}: computing the latents of all images")
                _on_rank_0(config, "computing the latents", partial(run_latents, config, partial(note_latents, config)))
            elif joined():
                _train_joined(config, todo)
            else:
                _train_here(config, todo, say)
    except BaseException as error:
        known = _of_a_rank(error, rank) if joined() else error
        final_status(config, known, keep=joined())
        if known is error:
            raise
        raise known from None
    if joined():
        from unicom_dist.parallel.mesh import close_mesh

        close_mesh()
    if rank:
        return
    write_status(config.run_dir, "done", stage=stages[-1].name, step=stages[-1].steps, exit_code=0)
    say(
        f"all stages of {config.name} are finished ({time.monotonic() - started:.0f} s); the run is in {config.run_dir}"
    )


def note_latents(config: Config, state: str) -> None:
    """Record the state of the recipe's latents stage in metrics.jsonl, unless that is what it says already."""
    stage = next((stage.name for stage in config.stages if stage.kind == "latents"), "")
    said = [r.values.get("state") for r in read_metrics(config.run_dir) if r.kind == "stage" and r.stage == stage]
    if stage and (state == "running" or said[-1:] != [state]):
        with MetricsWriter(config.run_dir) as metrics:
            metrics.log(stage, 0, {"state": state}, kind="stage")


def who_is_where(config: Config) -> str:
    """The layout of the prior's stages as a table; "" where the ranks are replicas, and where the layout is refused."""
    from unicom_dist.train.launch import ranks_of

    world = ranks_of(config)
    layout = Layout.of(config.parallel, world)
    shared = layout.pp * layout.ulysses * layout.tp > 1
    return layout.table() if shared and not refusals(config.parallel, config.prior, world) else ""


def grouped(stages: list[StageConfig]) -> list[list[StageConfig]]:
    """Runs of consecutive training stages; a latents stage stands alone. A codec starts before any prior needs data."""
    groups: list[list[StageConfig]] = []
    for stage in stages:
        if groups and stage.kind != "latents" and groups[-1][-1].kind != "latents":
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def finished(config: Config, stage: StageConfig) -> bool:
    """Whether the stage has done all its steps and exported its weights (a latents stage: never, it checks itself)."""
    if stage.kind == "latents":
        return False
    try:
        content = json.loads(
            (Path(config.run_dir) / "weights" / stage.name / "config.json").read_text(encoding="utf-8")
        )
        return int(content["step"]) >= stage.steps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def preflight(config: Config) -> None:
    """PreflightError: the run directory cannot be written or its disk is nearly full. ConfigError: no stages.

    DataError: a set of `data.sets` is not there, which a prior stage would find out hours later.
    """
    if not config.stages:
        raise ConfigError("stages is empty", "there is nothing to train", "take recipes/quickstart.yaml as `base:`")
    sets = config.data.sets if any(stage.kind == "prior" for stage in config.stages) else {}
    for name in sets:
        if not Manifest.file(Path(config.data.path) / name).is_file():
            how = "unicom data ingest" if name == EDITS else f"unicom data ingest --set {name}"
            raise DataError(
                f"data.sets.{name}: {Path(config.data.path) / name} is not there, or unfinished",
                "the prior's stages look for images in all sets that are named",
                f"run `{how}`, or take {name} out of data.sets",
                "docs/data.md#several-sets",
            )
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-") as probe:  # all ranks look at the same time
            probe.write(b"x" * 4096)
            probe.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise PreflightError(
            f"run_dir = {config.run_dir}",
            f"it cannot be written: {error.strerror or error}",
            "make it writable, free space, or set run_dir to another folder",
        ) from None
    if free < MIN_FREE_BYTES:
        raise PreflightError(
            f"{free / 2**20:.0f} MiB free at {config.run_dir}",
            f"a run starts with at least {MIN_FREE_BYTES / 2**20:.0f} MiB for its checkpoints",
            "free space, or set run_dir to another disk",
        )


def _on_rank_0(config: Config, what: str, work: Callable[[], object]) -> None:
    """Do `work` here, or on rank 0 of those that torchrun or srun started while the others wait. Collective."""
    from unicom_dist.train.alone import alone
    from unicom_dist.train.launch import joined

    if not joined():
        work()
        return
    from unicom_dist.parallel.mesh import Mesh, join

    alone(Mesh(*join(config.parallel.timeout_s)), Path(config.run_dir), what, work, config.parallel.timeout_s)


def prepare_vocabulary(config: Config) -> None:
    """Write run_dir/vocabulary.json if it is not there: the prior's stages and its samplers all read this one."""
    path = Path(config.run_dir) / "vocabulary.json"
    if not path.is_file():
        from unicom_dist.data.loader import build_vocabulary

        build_vocabulary(config).save(path)


def _train_here(config: Config, stages: list[StageConfig], say: Callable[[str], None]) -> None:
    from unicom_dist.train.launch import launch, threads_per_rank

    if any(stage.kind == "prior" for stage in stages):
        prepare_vocabulary(config)
    nproc = config.parallel.nproc
    threads = threads_per_rank(nproc, config.parallel.threads)
    say(f"{', '.join(stage.name for stage in stages)}: training; ranks: {nproc}, threads of each: {threads}")
    launch([(config, [stage.name for stage in stages])], Path(config.run_dir), nproc, threads)


def _train_joined(config: Config, stages: list[StageConfig]) -> None:
    """This process is a rank already: join the others and train."""
    from unicom_dist.train.signals import StopRequest
    from unicom_dist.train.worker import quiet_libraries, run_stages

    quiet_libraries()
    if any(stage.kind == "prior" for stage in stages):
        _on_rank_0(config, "preparing the vocabulary", partial(prepare_vocabulary, config))
    with StopRequest() as stop:
        run_stages(config, [stage.name for stage in stages], stop, partial(final_status, config, keep=True))


def _of_a_rank(error: BaseException, rank: int) -> BaseException:
    """What it means that `error` ended this rank: often that another one is no more."""
    from unicom_dist.train.worker import known_error

    if isinstance(error, UnicomError) or not isinstance(error, Exception):
        return error
    traceback.print_exception(error)
    return known_error(error, rank, "the traceback is above")


def final_status(config: Config, error: BaseException, *, keep: bool = False) -> None:
    """What ended the run, in its status file.

    `keep`: unless it says so already. Of several ranks the first to end knows the cause; the others end because of it.
    """
    error = storage_error(error) or error
    code = error.exit_code if isinstance(error, UnicomError) else 1
    what = error.what if isinstance(error, UnicomError) else repr(error)
    state: State = "preempted" if isinstance(error, Preempted) else "failed"
    before = read_status(config.run_dir, check_process=False)  # how far it came
    if keep and before and before.final:
        return
    stage, step = (before.stage, before.step) if before else ("", 0)
    try:
        write_status(config.run_dir, state, stage=stage, step=step, exit_code=code, message=what)
    except OSError as problem:
        log.warning("the status file could not be written: %s", problem)
