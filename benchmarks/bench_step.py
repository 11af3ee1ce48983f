"""What a trainer costs per step besides the model: ours, accelerate and transformers' Trainer over a hand-written loop.

Model, batch, loss and optimizer are the same: a Transfusion model of a hundred thousand weights and one packed row, on
one thread, so that a step takes a few milliseconds and a trainer's own work shows. The hand-written loops do nothing
but forward, loss, backward, clipping, fused AdamW and the average of the weights: once as usual, which is what the
trainers are measured against, and once with all weights in one flat buffer, as our engine has them. Ours also counts
for all ranks, schedules the learning rate, looks for spikes, and hands losses, throughput and MFU to the log and the
console every ten steps, as it always does. The peers average no weights. The clock is CPU time of the process,
background threads included; set-up is not measured. What a trainer adds is far less than a machine drifts in a minute,
so rounds are short and many, and each is compared with the loop of the same round.

    python benchmarks/bench_step.py [--steps 20] [--rounds 41]
"""

import argparse
import io
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Goal, Timing, importable, in_turn, publish
from torch import nn

from unicom_dist.config.schema import Config
from unicom_dist.data.loader import PriorLoader, build_vocabulary
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.objective.terms import prior_counts, prior_terms, total
from unicom_dist.parallel.mesh import RENDEZVOUS, init_mesh
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.train.callbacks import Observer
from unicom_dist.train.ema import Ema
from unicom_dist.train.execution import Execution
from unicom_dist.train.loop import Run, make_engine, train_step
from unicom_dist.train.signals import StopRequest
from unicom_dist.train.tasks import make_task
from unicom_dist.train.watchdog import Watchdog

LATENT_CHANNELS, FEATURE_CHANNELS = 4, 12
LR, CLIP, EMA, LOG_EVERY = 1e-4, 1.0, 0.9, 10
HAND, FLAT, OURS = "hand-written loop", "hand-written, flat buffers", "ours"
ACCELERATE, TRAINER = "accelerate", "transformers Trainer"
Method = Callable[[int], float]  # steps -> CPU seconds of exactly those steps


def configure(folder: Path, zero_stage: int = 0, write: bool = True) -> Config:
    """The tiny recipe with a prior stage that logs as a real one does; `write`: its data as well."""
    prior = {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 192, "layers": 2}
    stage = {
        "steps": 1 << 30,
        "batch": 1,
        "micro_batches": 1,
        "row_positions": 96,
        "lr": LR,
        "warmup": 0,
        "ema": EMA,
        "log_every": LOG_EVERY,
    }
    engine = {"zero_stage": zero_stage}
    config = tiny_config(folder, prior=prior, parallel=engine, stages={"pretrain": {**stage, "clip": CLIP}})
    # The stage before it, which it would start from, is left out.
    config = config.model_copy(update={"stages": [s for s in config.stages if s.name in ("codec", "pretrain")]})
    if write:
        write_tiny_assets(folder)
        write_tiny_sets(config, feature_channels=FEATURE_CHANNELS)
    return config


def one_batch(config: Config) -> PackedBatch:
    """A packed row with text, an image to draw and an image to read."""
    stats = LatentStats(torch.zeros(LATENT_CHANNELS), torch.ones(LATENT_CHANNELS))
    with PriorLoader(config, config.stage("pretrain"), build_vocabulary(config), stats) as loader:
        while True:
            (batch,) = loader.next_step()
            if len(batch.latents) and len(batch.features):
                return batch


class WithLoss(nn.Module):
    """The model as transformers and accelerate want it: batch in, loss out."""

    def __init__(self, config: Config, vocabulary_size: int) -> None:
        super().__init__()
        self.model = Transfusion(config.prior, vocabulary_size, LATENT_CHANNELS, FEATURE_CHANNELS)
        self.stage = config.stage("pretrain")

    def forward(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        return {"loss": total(prior_terms(self.model(batch), batch, self.stage), prior_counts(batch))}


def by_hand(module: WithLoss, batch: PackedBatch, flat: bool = False) -> Method:
    """The least a training step can be: one call each for zeroing, clipping, AdamW and the average of the weights.

    `flat`: all weights lie in one buffer, and so do their gradients.
    """
    weights = [flattened(module)] if flat else list(module.parameters())
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.95), eps=1e-6, fused=True)

    def run(steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=not flat)
            module(batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP, foreach=True)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - EMA)
        return time.process_time() - start

    return run


def flattened(module: nn.Module) -> nn.Parameter:
    """One parameter that holds all weights of `module` end to end; its gradient holds theirs."""
    flat = nn.Parameter(nn.utils.parameters_to_vector(module.parameters()).detach())
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat.data, module.parameters())
    start = 0
    for p in module.parameters():
        p.grad = flat.grad[start : start + p.numel()].view_as(p)
        start += p.numel()
    return flat


class Same:
    """A loader that always gives the same step."""

    def __init__(self, batch: PackedBatch) -> None:
        self._batches = [batch]

    def next_step(self) -> list[PackedBatch]:
        return self._batches


def ours(config: Config, batch: PackedBatch) -> Method:
    """The trainer's own step, with its log, console, status file and average of the weights."""
    stage = config.stage("pretrain")
    mesh = init_mesh(config.layout(stage, 1), 60)
    task = make_task(config, stage)
    engine = make_engine(task, config, stage, mesh)
    ema = Ema(engine.state(), stage.ema)
    store: Any = None
    loader: Any = Same(batch)
    dog = Watchdog()
    execution = Execution(task, engine, mesh, dog)
    state = Run(config, stage, task, mesh, engine, ema, loader, store, StopRequest(), dog, execution)
    observer = Observer(state, io.StringIO()).__enter__()

    def run(steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            train_step(state, observer)
        return time.process_time() - start

    return run


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """What `unicom train` gives a rank that is alone. ZeRO-3 needs it while it is set up; the peers must not see it."""
    given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", RENDEZVOUS: str(folder / "rendezvous")}
    os.environ.update(given)
    yield
    for name in given:
        del os.environ[name]


def accelerated(module: WithLoss, batch: PackedBatch) -> Method:
    """accelerate's documented loop."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-6, fused=True)
    data = torch.utils.data.DataLoader([0] * 100000, batch_size=1, collate_fn=lambda _: {"batch": batch})
    model, optimizer, loader = accelerator.prepare(module, optimizer, data)

    def run(steps: int) -> float:
        batches = iter(loader)
        next(batches)
        start = time.process_time()
        for _ in range(steps):
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(model(**next(batches))["loss"])
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
        return time.process_time() - start

    return run


def hugging_face(module: WithLoss, batch: PackedBatch, folder: Path) -> Method:
    """transformers' Trainer, without tracking, progress bar, evaluation and checkpoints."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times from the end of the second step, when everything is set up."""

        start = seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == 2:
                self.start = time.process_time()
            self.seconds = time.process_time() - self.start

    def run(steps: int) -> float:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps + 2,
            per_device_train_batch_size=1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            adam_beta2=0.95,
            adam_epsilon=1e-6,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        clock = Clock()
        trainer = Trainer(
            module, arguments, data_collator=lambda _: {"batch": batch}, train_dataset=[0] * 100000, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.seconds

    return run


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as name:
        folder = Path(name)
        config = configure(folder)
        prepare(config)
        batch, size = one_batch(config), build_vocabulary(config).size
        methods: dict[str, Method] = {
            HAND: by_hand(WithLoss(config, size), batch),
            FLAT: by_hand(WithLoss(config, size), batch, flat=True),
        }
        with one_rank(folder):
            methods[OURS] = ours(config, batch)
            methods[f"{OURS}, ZeRO-3"] = ours(configure(folder, 3, write=False), batch)
        if importable("accelerate"):
            methods[ACCELERATE] = accelerated(WithLoss(config, size), batch)
            methods[TRAINER] = hugging_face(WithLoss(config, size), batch, folder / "hf")
        found = in_turn({name: partial(method, options.steps) for name, method in methods.items()}, options.rounds)
        timings = {name: Timing.of([value / options.steps for value in seconds]) for name, seconds in found.items()}
        weights = sum(p.numel() for p in WithLoss(config, size).parameters())
    over = {
        method: 1e3 * statistics.median((a - b) / options.steps for a, b in zip(seconds, found[HAND], strict=True))
        for method, seconds in found.items()
    }
    rows = [
        [method, f"{1e3 * t.median:.2f}", f"{over[method]:+.2f}", f"{t.median / timings[HAND].median:.2f}", t.spread]
        for method, t in timings.items()
    ]
    goals = [Goal("fixed cost of a step", over[OURS], 0.5, at_least=False, unit="ms")]
    for peer in (ACCELERATE, TRAINER):
        ratio = timings[peer].median / timings[OURS].median if peer in timings else None
        goals.append(Goal(f"step of {peer} / ours", ratio, 1))
    print(f"\n{weights:,} weights, {batch.num_positions} positions, {options.steps} steps a round\n")
    met = publish(
        "bench_step",
        ["method", "CPU ms/step", "over the loop, ms", "ratio", "spread"],
        rows,
        goals,
        {
            method: {
                "ms_per_step": 1e3 * t.median,
                "over_loop_ms": over[method],
                "low": 1e3 * t.low,
                "high": 1e3 * t.high,
            }
            for method, t in timings.items()
        },
        ("transformers", "accelerate", "deepspeed"),
    )
    return 0 if met else 1


def prepare(config: Config) -> None:
    """What earlier stages would have left: vocabulary, statistics and the encoder's fingerprint in the manifests."""
    import json

    from unicom_dist.data.manifest import Manifest
    from unicom_dist.train.pipeline import prepare_vocabulary

    prepare_vocabulary(config)
    stats = LatentStats(torch.zeros(LATENT_CHANNELS), torch.ones(LATENT_CHANNELS))
    (Path(config.run_dir) / "latents" / "stats.json").write_text(json.dumps(stats.to_json()))
    manifest = Manifest.read(Path(config.data.path) / "train", config.encoder.kind)
    manifest.fingerprint = encoder_fingerprint(config.encoder)
    manifest.write(Path(config.data.path) / "train")


if __name__ == "__main__":
    sys.exit(main())
