"""On one GPU: tokens per second, MFU and peak memory of Qwen2.5-shaped priors, and transformers on the same row.

A step is the trainer's: batches to the device, `Execution`, `PlainEngine` (ZeRO 0: float32 master weights, AdamW on all
of them) and the moving average; reading data is not in it. A row is 8,192 positions. `mix8k` is 8 x [96 text, 256
drawn] + 3 x [32 text, 576 read, 416 text] + 1 x 4 [256 text, 256 read] + 256 text; `text` is one document. Every text
position has a label. Tokens are positions of any kind.
MFU is mask-exact: operations of `tracking/flops.py` (only visible pairs, labels that exist, nothing for recomputation)
over the time, over the data sheet's 989 TFLOP/s for H200 and over the best square GEMM of this very run.
transformers' Qwen2ForCausalLM (SDPA, loss of its own) runs in the same engine from the same weights; its first loss
and gradient norm are held against ours. A size whose step `unicom plan` puts beyond the card runs with as many of its
layers as leave room for the peer's logits, and the row says how many. The clock is wall time between synchronisations.

    python benchmarks/gpu/bench_train.py [--size 0.5B 1.5B 7B] [--steps 5] [--rounds 3]
"""

import argparse
import gc
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Goal, Timing, importable, in_turn, publish
from train_figures import PEER, PEER_COMPILED, Figure, Measured, fitting, goals_of, measured, plan
from train_models import BOTH, COMPILED, FLEX, PLAIN, Peer, Shaped, Trainer, compiled_forms, kernels
from train_rows import ROWS, SIZES, packed

from unicom_dist.config.layout import Layout
from unicom_dist.models.operations import visible_pairs
from unicom_dist.parallel.kernels import detect
from unicom_dist.tracking.flops import device_peak, measure_peak

First = tuple[float, float]  # nats per label of a first step, and its gradient's norm


def run(name: str, options: argparse.Namespace, device: torch.device) -> tuple[list[Figure], First, First]:
    """Figures of every row of a size; the first loss and gradient norm, ours and the peer's (zeros without it)."""
    size, cuda = SIZES[name], device.type == "cuda"
    layout = Layout(recompute=size.recompute)
    rows = {row: [packed(s, size, n) for n in range(size.micro_batches)] for row, s in ROWS.items()}
    prior = fitting(size, layout, rows["text"][0], device)
    found: list[Figure] = []

    def note(method: str, row: str, task: Shaped, rounds: list[Measured]) -> None:
        batches, precision = rows[row], task.stage.precision
        memory = plan(size, prior, layout, batches[0], precision)
        figure = Figure(
            size=name,
            layers=prior.layers,
            of_layers=size.prior.layers,
            recompute=size.recompute,
            micro_batches=size.micro_batches,
            row=row,
            method=method,
            seconds=Timing.of([second for one in rounds for second in one.seconds]),
            tokens=sum(batch.num_positions for batch in batches),
            flops=sum(Shaped.amounts(task, batch)["flops"] for batch in batches),
            visible_share=visible_pairs(batches[0].segments) / batches[0].num_positions ** 2,
            peak_bytes=max(one.peak for one in rounds),
            plan_bytes=memory.table(),
            plan_total_bytes=memory.total,
            plan_whole_bytes=plan(size, size.prior, layout, batches[0], precision).total,
        )
        found.append(figure)

    available = {kernel.option for kernel in detect(cuda) if kernel.available}
    methods = [PLAIN, *(m for m in (FLEX, COMPILED, BOTH) if set(m.split(" + ")) <= available and not options.plain)]
    ours = Shaped(size, prior, device)
    trainer, forms = Trainer(ours, layout, device), compiled_forms()
    with kernels(trainer, forms, FLEX if FLEX in methods else PLAIN):
        first = trainer.first(rows["text"])

    def ours_once(method: str, row: str) -> Measured:
        with kernels(trainer, forms, method):
            return measured(lambda: trainer.step(rows[row]), options.steps, device)

    pairs = [(method, row) for row in ROWS for method in methods]
    turns = {f"{row}/{method}": partial(ours_once, method, row) for method, row in pairs}
    for (method, row), rounds in zip(pairs, in_turn(turns, options.rounds).values(), strict=True):
        note(method, row, ours, rounds)
    trainer.engine.close()
    del trainer
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    if not importable("transformers"):
        return found, first, (0.0, 0.0)
    theirs = Peer(size, prior, device)
    try:
        trainer = Trainer(theirs, layout, device)
        peer_first = trainer.first(rows["text"])
        for method in (PEER, PEER_COMPILED)[: 2 if COMPILED in methods and cuda else 1]:
            if method == PEER_COMPILED:
                trainer.engine.module.get_submodule("backbone").compile()
            turn = {method: lambda: measured(lambda: trainer.step(rows["text"]), options.steps, device)}
            note(method, "text", theirs, in_turn(turn, options.rounds)[method])
    except torch.OutOfMemoryError:
        print(f"  {name}: transformers ran out of memory: its rows are left out from there")
        peer_first = (0.0, 0.0)
    return found, first, peer_first


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a goal was missed, 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["0.5B", "1.5B", "7B"])
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a trial of the script, tiny only"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of a round that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="leave out the rows of FlexAttention and torch.compile")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no GPU (a trial without one: --size tiny --device cpu)")
        return 3
    if options.device == "cpu" and options.size != ["tiny"]:
        parser.error("on a CPU only --size tiny ends in reasonable time")
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    found: list[Figure] = []
    goals: list[Goal] = []
    losses: dict[str, dict[str, First]] = {}
    gemm = 0.0
    for name in options.size:
        gemm = max(gemm, measure_peak(device, dtype, 2.0 if cuda else 0.3).flops_per_s)
        rows, first, peer_first = run(name, options, device)
        found += rows
        losses[name] = {"ours": first, "transformers": peer_first}
        if peer_first[0]:
            loss, norm = (100 * abs(theirs / own - 1) for theirs, own in zip(peer_first, first, strict=True))
            goals.append(Goal(f"{name}: first losses differ by", loss, 0.1, False, "%"))
            goals.append(Goal(f"{name}: first gradient norms differ by", norm, 2, False, "%"))
    gemm = max(gemm, measure_peak(device, dtype, 2.0 if cuda else 0.3).flops_per_s)
    sheet = device_peak(device, dtype) if cuda else None
    if sheet:
        goals += goals_of(found, sheet)
    print(f"\nGEMM of this run: {gemm / 1e12:.3g} TFLOP/s; {sheet.source if sheet else 'no data sheet: CPU'}\n")
    what: dict[str, Any] = (
        {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if cuda else {"name": "CPU"}
    )
    if cuda:
        what["bytes"] = torch.cuda.get_device_properties(device).total_memory
    figures = {"device": what, "gemm_flops_per_s": gemm, "data_sheet": asdict(sheet) if sheet else None}
    met = publish(
        "gpu_train" if cuda else "gpu_train_trial_on_cpu",
        ["model", "row", "method", "tokens/s", "MFU sheet", "MFU GEMM", "peak GB", "plan GB", "spread"],
        [figure.cells(gemm, sheet) for figure in found],
        goals,
        {
            **figures,
            "first_loss_and_norm": losses,
            "rows": [figure.record(gemm, sheet) for figure in found],
        },
        ("transformers", "triton"),
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
