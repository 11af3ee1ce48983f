"""Collectives and bytes of one optimizer step per layout, against the least that could do the same work.

Four gloo ranks count what they send (`unicom_dist.testing.communication`); bytes do not depend on the machine. P
parameters, n ranks in `mesh.zero`, m micro-batches, low = 2 bytes (bfloat16) and g = 4 bytes (gradients, averaged in
float32) per parameter; every rank sends at least, per step,

    ZeRO 0      2 g P (n-1)/n              an all-reduce of the gradients
    ZeRO 1, 2   (g + low) P (n-1)/n        reduce-scatter, then gather the new weights
    ZeRO 3      (g + 2 m low) P (n-1)/n    gathered for every forward and every backward pass
    gather once (g + low) P (n-1)/n        the least with which the weights can be split

Weights small enough to stay gathered (64 MiB), fetched ahead, or still at hand from the pass before would hide what a
large model sends, so all of that is switched off. The first two steps, in which DeepSpeed records, are not counted.

    python benchmarks/bench_comm.py
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Goal, publish
from torch import nn

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig
from unicom_dist.parallel.deepspeed_config import deepspeed_config
from unicom_dist.parallel.engine import Engine, OptimizerConfig
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.parallel.plain import PlainEngine
from unicom_dist.parallel.zero import ZeroEngine
from unicom_dist.testing.communication import Communication
from unicom_dist.testing.distributed import run_ranks

RANKS, WIDTH, LAYERS, LOW, GRADIENT = 4, 64, 6, 2, 4
PARAMETERS = LAYERS * WIDTH * WIDTH
LARGE = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")}


@dataclass(frozen=True)
class Row:
    """One layout, what a step does, and the bytes per parameter that it has to send, but for the factor (n-1)/n."""

    name: str
    layout: Layout
    micros: int
    step: Callable[[Engine, int], None]
    least: float


def one_by_one(engine: Engine, micros: int) -> None:
    """Backward right after forward."""
    for _ in range(micros):
        engine.backward(engine(torch.randn(8, WIDTH, dtype=torch.bfloat16)).float().square().mean())


def forwards_first(engine: Engine, micros: int) -> None:
    """As a pipeline fills up: all forwards are in flight at once."""
    outputs = [engine(torch.randn(8, WIDTH, dtype=torch.bfloat16)) for _ in range(micros)]
    for output in outputs:
        engine.backward(output.float().square().mean())


def data_parallel(stage: int, **options: Any) -> Layout:
    """All ranks replicas."""
    return Layout(dp=RANKS, zero_stage=stage, **options)


SPLIT = GRADIENT + LOW
ROWS = [
    Row("dp, ZeRO 0", data_parallel(0), 1, one_by_one, 2 * GRADIENT),
    Row("dp, ZeRO 1", data_parallel(1), 1, one_by_one, SPLIT),
    Row("dp, ZeRO 2", data_parallel(2), 1, one_by_one, SPLIT),
    Row("dp, ZeRO 3", data_parallel(3), 1, one_by_one, GRADIENT + 2 * LOW),
    Row("dp, ZeRO 3", data_parallel(3), 4, one_by_one, GRADIENT + 8 * LOW),
    Row("dp, ZeRO 3, forwards first", data_parallel(3), 4, forwards_first, GRADIENT + 8 * LOW),
    Row("dp, ZeRO 3, gather once", data_parallel(3, gather_once=True), 1, one_by_one, SPLIT),
    Row("dp, ZeRO 3, gather once", data_parallel(3, gather_once=True), 4, one_by_one, SPLIT),
    Row("dp, ZeRO 3, gather once, forwards first", data_parallel(3, gather_once=True), 4, forwards_first, SPLIT),
]


def network() -> nn.Module:
    """Matrices alone, which divide among the ranks: no padding."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


def engine_of(row: Row, mesh: Mesh) -> Engine:
    """The row's engine."""
    options = OptimizerConfig(precision="bfloat16")
    if row.layout.zero_stage == 0:
        return PlainEngine(network(), options, mesh)
    settings = deepspeed_config(ParallelConfig(), row.layout, "bfloat16", {"zero_optimization": LARGE})
    return ZeroEngine(network(), options, mesh, settings, gather_once=row.layout.gather_once)


def count(rank: int, world: int, rows: list[Row]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """(calls, bytes) by operation of the third step of every row, on this rank."""
    found = []
    for row in rows:
        engine = engine_of(row, init_mesh(row.layout))
        for _ in range(3):
            with Communication() as counted:
                with engine.accumulate():
                    row.step(engine, row.micros)
                engine.step(1e-3)
        engine.close()
        found.append((dict(counted.calls), dict(counted.sent)))
    return found


def main() -> int:
    """Print the table; 0 if every goal was met."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    measured = run_ranks(count, RANKS, ROWS, timeout_s=600)[0]
    table, figures, goals = [], {}, []
    for row, (calls, sent) in zip(ROWS, measured, strict=True):
        n = row.layout.dp * row.layout.ulysses
        least = row.least * PARAMETERS * (n - 1) / n
        data = sum(sent.values()) - sent.get("small", 0)
        split = SPLIT * PARAMETERS * (n - 1) / n
        text = ", ".join(f"{number} {name}" for name, number in sorted(calls.items()))
        figures[f"{row.name}, m = {row.micros}"] = {"calls": calls, "bytes": sent, "least": round(least)}
        table.append([row.name, str(row.micros), text, f"{data:,}", f"{data / least:.3f}", f"{data / split:.2f}"])
        off = max(data / least, least / data)  # fewer would mean that the formula or the count is wrong
        goals.append(Goal(f"bytes over the least, {row.name}, m = {row.micros}", off, 1.0005, at_least=False))
    columns = ["layout", "m", "calls", "bytes sent", "over least", "over one gather"]
    return 0 if publish("bench_comm", columns, table, goals, figures, ["deepspeed"]) else 1


if __name__ == "__main__":
    sys.exit(main())
