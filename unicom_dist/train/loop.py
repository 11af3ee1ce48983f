"""The training loop of one stage, in the order in which things happen.

A step: read the micro-batches of this dp coordinate; sum the items of every loss term over ranks and micro-batches (one
all-reduce, which also carries the wish to stop and the loss of the step before); forward and backward on each; one
gradient reduction; clip; AdamW; moving average.
Losses are divided by the global counts, so neither they nor the gradients depend on how the samples were cut. Nothing
else happens in a step: figures, pictures and checkpoints look in every so many steps.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from unicom_dist.checkpoint.saved import Checkpoint, check_model, latest, read_extra, read_rng, read_state
from unicom_dist.checkpoint.store import CheckpointStore
from unicom_dist.config.errors import CheckpointError, ConfigError, NonFiniteError, Preempted
from unicom_dist.config.layout import DOCS, refusals
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.prefetch import StepLoader
from unicom_dist.objective.terms import LossTerm
from unicom_dist.parallel.deepspeed_config import deepspeed_config
from unicom_dist.parallel.engine import Engine, OptimizerConfig
from unicom_dist.parallel.kernels import choose
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.plain import PlainEngine
from unicom_dist.parallel.zero import ZeroEngine
from unicom_dist.train.alone import alone
from unicom_dist.train.callbacks import Observer
from unicom_dist.train.ema import Ema
from unicom_dist.train.execution import Execution
from unicom_dist.train.schedule import learning_rate
from unicom_dist.train.signals import StopRequest
from unicom_dist.train.spikes import Spikes
from unicom_dist.train.stages import Task
from unicom_dist.train.tasks import make_task
from unicom_dist.train.trained import loss_table, trained_table
from unicom_dist.train.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything a stage in progress consists of. `step` optimizer steps are finished."""

    config: Config
    stage: StageConfig
    task: Task[Any]
    mesh: Mesh
    engine: Engine
    ema: Ema
    loader: StepLoader[Any]
    store: CheckpointStore
    stop: StopRequest
    watchdog: Watchdog
    execution: Execution
    step: int = 0
    begun: int = 0  # the step this process began at

    def __post_init__(self) -> None:
        self.spikes = Spikes(self.config.run_dir, self.stage, self.mesh)


def train_stage(
    config: Config,
    stage: StageConfig,
    mesh: Mesh,
    stop: StopRequest,
    watchdog: Watchdog,
    terminal: IO[str] | None,
) -> None:
    """Train `stage` from where it stands to its last step and export its weights. Collective over the world.

    Preempted: a rank was asked to stop; all of them finished the step and wrote a checkpoint.
    """
    run = start_run(config, stage, mesh, stop, watchdog)
    with run.store, Observer(run, terminal) as observer:
        while run.step < stage.steps:
            stopping = train_step(run, observer)
            last = run.step == stage.steps
            if last or stopping or (stage.checkpoint_every and run.step % stage.checkpoint_every == 0):
                save(run)
            if stopping and not last:
                run.store.wait()
                raise Preempted(
                    f"stage {stage.name!r} stopped at step {run.step} of {stage.steps}, checkpoint written",
                    "a signal asked for it",
                    "run the same command again to continue",
                )
        observer.finish()
    run.store.wait()
    what = f"exporting the weights of {stage.name}"
    alone(mesh, Path(config.run_dir), what, partial(export, run), config.parallel.timeout_s)
    run.loader.close()
    run.engine.close()
    mesh.barrier()


def export(run: Run) -> None:
    """Write the averages in the stage's last checkpoint as a folder others can read, one tensor in memory at a time."""
    last = latest(run.store.folder)
    assert last is not None
    folder = Path(run.config.run_dir) / "weights" / run.stage.name
    run.task.export(folder, Checkpoint(last).tensors("ema"), run.step)


def train_step(run: Run, observer: Observer) -> bool:
    """One optimizer step; whether any rank was asked to stop. Collective over the world."""
    began = time.perf_counter()
    with run.watchdog.watching(first=run.step == run.begun):
        run.watchdog.doing("waiting for data")
        batches = run.loader.next_step()
        waited = time.perf_counter() - began
        run.task.begin_step(run.step)
        run.watchdog.doing("sum of the counts over all ranks")
        counts, amounts, stopping, loss_before = count_step(run, batches)
        run.spikes.judge(loss_before)
        if run.mesh.device.type != "cpu":
            batches = [batch.to(run.mesh.device) for batch in batches]

        def observe(terms: Mapping[str, LossTerm]) -> None:
            observer.add_losses(terms)
            run.spikes.add(terms, counts)

        run.execution.train(batches, counts, observe)
        lr = learning_rate(run.stage, run.step)
        run.watchdog.doing("optimizer step")
        keys = [batch.keys for batch in batches]
        norm = None
        try:
            norm = run.engine.step(lr)
            run.spikes.finished(run.step, keys, norm)
            run.ema.update()
        except NonFiniteError as error:
            run.spikes.skip(run.step, keys, error)
        run.task.after_step(run.mesh)
        run.step += 1
        run.watchdog.doing("sum of the losses over all ranks")
        if norm is None:
            observer.step_skipped(waited, time.perf_counter() - began)
        else:
            observer.step_done(counts, amounts, lr, norm, waited, time.perf_counter() - began)
    observer.between_steps()
    return stopping


def count_step(run: Run, batches: list[Any]) -> tuple[dict[str, int], dict[str, float], bool, float]:
    """Items per loss term and amounts of the whole step; whether any rank wants to stop; the loss of the step before.

    Of the ranks that work on the same batches one counts them. Collective over the world.
    """
    counts: dict[str, float] = {}
    amounts: dict[str, float] = {}
    for batch in batches:
        add_up(counts, run.task.counts(batch))
        add_up(amounts, run.task.amounts(batch))
    stop, loss = run.stop.requested, run.spikes.take_loss()
    if run.mesh.world > 1:
        share = float(run.mesh.model.rank == 0)
        vector = [share * value for value in (*counts.values(), *amounts.values())]
        summed = torch.tensor([*vector, loss, float(stop)], dtype=torch.float64, device=run.mesh.device)
        values = run.mesh.everyone.sum(summed).tolist()
        counts = dict(zip(counts, values, strict=False))
        amounts = dict(zip(amounts, values[len(counts) :], strict=False))
        loss, stop = values[-2], values[-1] > 0
    return {name: int(value) for name, value in counts.items()}, amounts, stop, loss


def add_up(totals: dict[str, float], values: Mapping[str, float]) -> None:
    """totals += values, by name."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def start_run(config: Config, stage: StageConfig, mesh: Mesh, stop: StopRequest, watchdog: Watchdog) -> Run:
    """Model, engine, data and where they stand: the stage's newest checkpoint, else the stage before. Collective."""
    task = make_task(config, stage)
    engine = make_engine(task, config, stage, mesh)
    folder = Path(config.run_dir) / "checkpoints"
    store = CheckpointStore(folder / stage.name, mesh, config.keep_checkpoints, config.parallel.timeout_s)
    loader = task.loader(mesh)
    checkpoint = mesh.broadcast_object(latest(folder / stage.name) if mesh.rank == 0 else None)
    before = mesh.broadcast_object(_stage_before(config, stage) if mesh.rank == 0 else None)
    if checkpoint is None and before is not None:
        start_from(before, task, engine, mesh)
        log.info("stage %s starts from %s", stage.name, before)
    ema = Ema(engine.state(), stage.ema)
    execution = Execution(task, engine, mesh, watchdog)
    run = Run(config, stage, task, mesh, engine, ema, loader, store, stop, watchdog, execution)
    if checkpoint is not None:
        resume(run, checkpoint)
    return run


def start_from(checkpoint: Path, task: Task[Any], engine: Engine, mesh: Mesh) -> None:
    """Weights of the stage before, but for what begins with this stage. CheckpointError. Collective over the world."""
    own, there = engine.state(), Checkpoint(checkpoint).shapes
    taken = [f for f in engine.fragments if not task.begins(f.name)]
    check_model(checkpoint, taken + [f for f in engine.fragments if task.begins(f.name) and f.name in there], mesh)
    saved = read_state(checkpoint, taken, own, ("weight",))
    for f in engine.fragments:
        if task.begins(f.name):
            here = slice(f.start, f.start + f.numel)
            saved["weight"][f.group][here] = own["weight"][f.group][here].cpu()
    engine.load_state(saved, 0)
    task.restore(read_extra(checkpoint).get("model", {}))


def _stage_before(config: Config, stage: StageConfig) -> Path | None:
    """The last checkpoint of the stage of the same kind before this one. CheckpointError when it has none yet."""
    position = config.stages.index(stage)
    names = [other.name for other in config.stages[:position] if other.kind == stage.kind]
    if not names:
        return None
    found = latest(Path(config.run_dir) / "checkpoints" / names[-1])
    if found is None:
        raise CheckpointError(
            f"stage {stage.name!r} continues {names[-1]!r}, which has no checkpoint in {config.run_dir}",
            "its weights are where this stage starts",
            f"train {names[-1]!r} first: unicom train RECIPE --stage {names[-1]}",
        )
    return found


def make_engine(task: Task[Any], config: Config, stage: StageConfig, mesh: Mesh) -> Engine:
    """The engine of the layout's ZeRO stage. Collective over `mesh.zero`."""
    kernels = choose(config.kernels, cuda=mesh.device.type == "cuda")
    options = OptimizerConfig(stage.weight_decay, stage.betas, stage.eps, stage.clip, stage.precision, kernels)
    module = task.build(mesh)
    table = trained_table(module, stage)
    if mesh.rank == 0:
        losses = loss_table(stage) if stage.kind == "prior" else ""
        log.info("stage %s trains\n%s\n%s", stage.name, table, losses)
    if mesh.layout.zero_stage == 0:
        return PlainEngine(module, options, mesh)
    settings = deepspeed_config(config.parallel, mesh.layout, stage.precision, config.deepspeed.extra)
    if mesh.rank == 0:
        path = Path(config.run_dir) / f"deepspeed-{stage.name}.json"
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        log.info("stage %s: DeepSpeed's configuration is in %s", stage.name, path)
    return ZeroEngine(module, options, mesh, settings, task.initial, mesh.layout.gather_once)


def save(run: Run) -> None:
    """Start writing a checkpoint of the step just finished. Every rank calls it."""
    extra = {
        "stage": run.stage.name,
        "loader": run.loader.state_dict(),
        "ema_updates": run.ema.updates,
        "optimizer_steps": run.engine.steps_done,
        "model": run.task.description,
    }
    state = {**run.engine.state(), "ema": run.ema.buffers}
    run.store.save(run.step, state, run.engine.fragments, extra, run.engine.replicated)


def resume(run: Run, checkpoint: Path) -> None:
    """Continue from a checkpoint, under whatever layout it was written. Collective over the world.

    CheckpointError when it is damaged, of another model, or further than the stage goes.
    """
    extra = read_extra(checkpoint)
    if extra["step"] > run.stage.steps:
        raise CheckpointError(
            f"{checkpoint} is at step {extra['step']}, stage {run.stage.name!r} ends at {run.stage.steps}",
            "the stage was shortened after it was trained",
            f"set stages.{run.stage.name}.steps to at least {extra['step']}, or choose another run_dir",
        )
    own = {**run.engine.state(), "ema": run.ema.buffers}
    check_model(checkpoint, run.engine.fragments, run.mesh)
    saved = read_state(checkpoint, run.engine.fragments, own, ("weight", "exp_avg", "exp_avg_sq", "ema"))
    run.ema.load(saved.pop("ema"), int(extra["ema_updates"]))
    run.engine.load_state(saved, int(extra["optimizer_steps"]))
    run.task.restore(extra.get("model", {}))
    run.loader.load_state_dict(extra["loader"])
    rng = read_rng(checkpoint, run.mesh)
    if rng is not None:
        torch.set_rng_state(rng)
    run.step = run.begun = int(extra["step"])
    log.info("stage %s continues from %s", run.stage.name, checkpoint)


def check_ranks(config: Config, world: int) -> None:
    """ConfigError unless the layout and every stage's batch suit the number of ranks that were really started."""
    for refusal in refusals(config.parallel, config.prior, world):
        raise ConfigError(refusal.what, refusal.why, refusal.remedy, DOCS)
    for stage in config.stages:
        replicas = config.layout(stage, world).dp
        share = replicas * stage.micro_batches
        if stage.kind != "latents" and stage.batch % share:
            raise ConfigError(
                f"stages.{stage.name}.batch = {stage.batch} with {replicas} replicas x {stage.micro_batches} pieces",
                f"every replica takes equally many pieces of a step, and {stage.batch} is not a multiple of {share}",
                f"start another number of ranks, or set batch to a multiple of {share}",
                DOCS,
            )
