"""What a trainer costs per step besides the model: ours, accelerate and transformers' Trainer over a hand-written loop.

Model, batch, loss and optimizer are the same: a Transfusion model of a hundred thousand weights and one packed row, on
one thread, so that a step takes a few milliseconds and a trainer's own work shows. The hand-written loop does nothing
but forward, loss, backward, clipping and fused AdamW; ours also counts for all ranks, schedules the learning rate,
averages the weights, and hands losses, throughput and MFU to the log and the console every ten steps, as it always
does. The clock is CPU time of the process, background threads included; set-up is not measured.

    python benchmarks/bench_step.py [--steps 100] [--rounds 7]
"""

import argparse
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
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
from unicom_dist.parallel.mesh import Mesh
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
LR, CLIP, LOG_EVERY = 1e-4, 1.0, 10
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


def by_hand(module: WithLoss, batch: PackedBatch) -> Method:
    """The least a training step can be."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-6, fused=True)

    def run(steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            optimizer.zero_grad()
            module(batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            optimizer.step()
        return time.process_time() - start

    return run


class Same:
    """A loader that always gives the same step."""

    def __init__(self, batch: PackedBatch) -> None:
        self._batches = [batch]

    def next_step(self) -> list[PackedBatch]:
        return self._batches


def ours(config: Config, batch: PackedBatch) -> Method:
    """The trainer's own step, with its log, console, status file and average of the weights."""
    stage, mesh = config.stage("pretrain"), Mesh(0, 1, torch.device("cpu"))
    task = make_task(config, stage)
    engine = make_engine(task, config, stage, mesh)
    ema = Ema(engine.state()["weight"], stage.ema)
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
    """Measure, print, write; 1 if the goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as name:
        folder = Path(name)
        config = configure(folder)
        prepare(config)
        batch, size = one_batch(config), build_vocabulary(config).size
        methods: dict[str, Method] = {
            "hand-written loop": by_hand(WithLoss(config, size), batch),
            "ours": ours(config, batch),
        }
        if importable("accelerate"):
            methods["accelerate"] = accelerated(WithLoss(config, size), batch)
            methods["transformers Trainer"] = hugging_face(WithLoss(config, size), batch, folder / "hf")
        found = in_turn({name: partial(method, options.steps) for name, method in methods.items()}, options.rounds)
        timings = {name: Timing.of([value / options.steps for value in seconds]) for name, seconds in found.items()}
        weights = sum(p.numel() for p in WithLoss(config, size).parameters())
    hand = timings["hand-written loop"].median
    rows = [
        [method, f"{1e3 * t.median:.2f}", f"{1e3 * (t.median - hand):+.2f}", f"{t.median / hand:.2f}", t.spread]
        for method, t in timings.items()
    ]
    print(f"\n{weights:,} weights, {batch.num_positions} positions, {options.steps} steps a round\n")
    met = publish(
        "bench_step",
        ["method", "CPU ms/step", "over hand-written, ms", "ratio", "spread"],
        rows,
        [Goal("fixed cost of a step", 1e3 * (timings["ours"].median - hand), 0.5, at_least=False, unit="ms")],
        {
            method: {"ms_per_step": 1e3 * t.median, "low": 1e3 * t.low, "high": 1e3 * t.high}
            for method, t in timings.items()
        },
        ("transformers", "accelerate"),
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
