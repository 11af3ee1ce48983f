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

Below these rows, of a stack of matrices, are those of the prior itself under the other axes, run by the trainer's own
execution: what each purpose sends beside its least, whose formulas are in `unicom_dist.testing.traffic`. Every rank is
looked at; a row is the rank that is furthest off. What their replicas average is in the rows above.

    python benchmarks/bench_comm.py
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from unicom_dist.testing.traffic import LARGE, Sent, traffic

RANKS, WIDTH, LAYERS, LOW, GRADIENT = 4, 64, 6, 2, 4
PARAMETERS = LAYERS * WIDTH * WIDTH


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
PIPELINE: dict[str, Any] = {"dp": 2, "pp": 2}
MODEL_ROWS = [  # name, layout, micro-batches
    ("tp 2 + sp", Layout(dp=2, tp=2, sequence_parallel=True), 1),
    ("tp 4 + sp, 2 kv heads", Layout(tp=4, sequence_parallel=True), 1),
    ("ulysses 2", Layout(dp=2, ulysses=2), 1),
    ("pp 2", Layout(**PIPELINE), 4),
    ("pp 2, ZeRO 3", Layout(**PIPELINE, zero_stage=3), 4),
    ("pp 2, ZeRO 3, gather once", Layout(**PIPELINE, zero_stage=3, gather_once=True), 4),
    ("pp 2, tp 2 + sp", Layout(pp=2, tp=2, sequence_parallel=True), 4),
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


def count_all(rank: int, world: int) -> tuple[list[Any], list[list[Sent]]]:
    """The rows of the stack of matrices and those of the prior, on this rank."""
    return count(rank, world, ROWS), [traffic(layout, micros) for _, layout, micros in MODEL_ROWS]


def off(sent: Sent) -> float:
    """Bytes over the least or below it: fewer would mean that the formula or the count is wrong."""
    return max(sent.bytes / sent.least_bytes, sent.least_bytes / sent.bytes) if sent.bytes else float("inf")


def model_rows(
    ranks: list[list[list[Sent]]], table: list[list[str]], figures: dict[str, Any], goals: list[Goal]
) -> None:
    """Add the prior's rows: per layout and purpose the rank that is furthest off in calls, then in bytes."""
    for number, (name, _, micros) in enumerate(MODEL_ROWS):
        for everyones in zip(*(rank[number] for rank in ranks), strict=True):
            sent = max(everyones, key=lambda one: (one.calls / one.least_calls, off(one)))
            what = f"{name}: {sent.purpose}"
            figures[f"{what}, m = {micros}"] = [asdict(one) for one in everyones]
            calls = f"{sent.calls:g}, least {sent.least_calls:g}"
            table.append([what, str(micros), calls, f"{sent.bytes:,.0f}", f"{sent.bytes / sent.least_bytes:.3f}", "–"])
            worst = max(map(off, everyones))
            goals.append(Goal(f"bytes over the least, {what}", worst, 1.0005, at_least=False))
            goals.append(Goal(f"calls over the least, {what}", sent.calls / sent.least_calls, 1.0, at_least=False))


def main() -> int:
    """Print the table; 0 if every goal was met."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    everything = run_ranks(count_all, RANKS, timeout_s=600)
    measured = everything[0][0]
    table, figures, goals = [], {}, []
    for row, (calls, sent) in zip(ROWS, measured, strict=True):
        n = row.layout.dp * row.layout.ulysses
        least = row.least * PARAMETERS * (n - 1) / n
        data = sum(sent.values()) - sent.get("small", 0)
        split = SPLIT * PARAMETERS * (n - 1) / n
        text = ", ".join(f"{number} {name}" for name, number in sorted(calls.items()))
        figures[f"{row.name}, m = {row.micros}"] = {"calls": calls, "bytes": sent, "least": round(least)}
        table.append([row.name, str(row.micros), text, f"{data:,}", f"{data / least:.3f}", f"{data / split:.2f}"])
        error = off(Sent(row.name, 0, 0, data, least))
        goals.append(Goal(f"bytes over the least, {row.name}, m = {row.micros}", error, 1.0005, at_least=False))
    model_rows([prior for _, prior in everything], table, figures, goals)
    columns = ["layout", "m", "calls", "bytes sent", "over least", "over one gather"]
    return 0 if publish("bench_comm", columns, table, goals, figures, ["deepspeed", "megatron-core"]) else 1


if __name__ == "__main__":
    sys.exit(main())
