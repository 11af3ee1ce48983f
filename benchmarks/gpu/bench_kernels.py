"""On a GPU: each fused kernel against the form it replaces, and the prior's step with and without them.

Attention counts 4 K operations per visible pair and head forward, 2.5 times that backward; the block mask is built anew
for each call, as a training step does. Head: 8,192 labels of width 3,584 and 152,064 tokens. Step: 4 layers of the 7B
shape on a row of 8,192 positions, without the optimizer. The clock is wall time between synchronisations.

    python benchmarks/gpu/bench_kernels.py [--rounds 7]
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Goal, interleaved, publish

from unicom_dist.config.schema import PriorConfig
from unicom_dist.models import functions
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.backbone import Decoder
from unicom_dist.models.flex import FlexPlan
from unicom_dist.models.operations import visible_pairs
from unicom_dist.models.segments import Segment
from unicom_dist.parallel.cross_entropy import linear_cross_entropy
from unicom_dist.parallel.kernels import detect

HEADS, KV_HEADS, CHANNELS = 28, 4, 128
LAYOUTS = {
    "t2i 4k": [(mode, n) for _ in range(12) for mode, n in (("causal", 96), ("noise", 256))],
    "und 8k": [(mode, n) for _ in range(8) for mode, n in (("causal", 32), ("full", 576), ("causal", 416))],
    "text 8k": [("causal", 8192)],
}


def packing(pieces: list[tuple[str, int]]) -> list[Segment]:
    """Samples of the pieces; a sample starts at every text that is not a continuation (und: three pieces)."""
    size = 3 if any(mode == "full" for mode, _ in pieces) else min(2, len(pieces))
    return [Segment(number // size, mode, n) for number, (mode, n) in enumerate(pieces)]  # type: ignore[arg-type]


def clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def attention(segments: list[Segment]) -> dict[str, Callable[[], object]]:
    positions = sum(s.length for s in segments)
    shapes = [(positions, heads, CHANNELS) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    tensors = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    builds: dict[str, Callable[[], Any]] = {
        "cut, plain products": lambda: AttentionPlan.build(segments, torch.bfloat16, "cuda"),
        "FlexAttention": lambda: FlexPlan.build(segments, "cuda"),
    }

    def once(build: Callable[[], Any]) -> object:
        return torch.autograd.grad(build()(0, *tensors).float().sum(), tensors)

    return {name: partial(once, build) for name, build in builds.items()}


def head() -> dict[str, Callable[[], object]]:
    weight = (torch.randn(152_064, 3584, device="cuda") * 0.02).bfloat16().requires_grad_()
    hidden = torch.randn(8192, 3584, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(152_064, (8192,), device="cuda")
    return {
        "whole logits": lambda: torch.autograd.grad(
            F.cross_entropy(F.linear(hidden, weight).float(), ids, reduction="sum"), (hidden, weight)
        ),
        "chunks": lambda: torch.autograd.grad(linear_cross_entropy(hidden, weight, ids).sum(), (hidden, weight)),
    }


def step() -> dict[str, Callable[[], object]]:
    prior = PriorConfig(hidden=3584, layers=4, heads=HEADS, kv_heads=KV_HEADS, ffn=18944)
    decoder = Decoder(prior, 8).to("cuda", torch.bfloat16)
    segments = packing(LAYOUTS["und 8k"])
    x = torch.randn(8192, 3584, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(8192, device="cuda")
    plain = dict(functions._FORMS)
    functions.compile_all()
    compiled = dict(functions._FORMS)

    def run(forms: dict[str, Callable[..., object]], flex: bool) -> None:
        functions._FORMS.update(forms)
        plan = FlexPlan.build(segments, "cuda") if flex else AttentionPlan.build(segments, torch.bfloat16, "cuda")
        decoder(x, positions, plan).float().sum().backward()
        decoder.zero_grad()

    return {
        "plain": lambda: run(plain, False),
        "FlexAttention": lambda: run(plain, True),
        "FlexAttention, compiled functions": lambda: run(compiled, True),
    }


def peak_gib(method: Callable[[], object]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    method()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: torch sees no GPU")
        return 0
    for kernel in detect(cuda=True):
        print(f"{kernel.title}: {kernel.text}")
    groups = {f"attention {name}": attention(packing(pieces)) for name, pieces in LAYOUTS.items()}
    groups |= {"head": head(), "step": step()}
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    goals: list[Goal] = []
    for group, methods in groups.items():
        peaks = {name: peak_gib(method) for name, method in methods.items()}
        timings = interleaved(methods, options.rounds, clock)
        first = next(iter(methods))
        for name, timing in timings.items():
            ratio = timings[first].median / timing.median
            rows.append(
                [group, name, f"{1e3 * timing.median:.2f}", f"{ratio:.2f}", f"{peaks[name]:.2f}", timing.spread]
            )
            figures[f"{group}, {name}"] = {"seconds": timing, "peak_gib": peaks[name]}
            if group == "head" and name == "chunks":
                goals += [
                    Goal("head, time", 1 / ratio, 1.05, False),
                    Goal("head, peak GiB", peaks[name], 2.1, False, "GiB"),
                ]
    for name, pieces in LAYOUTS.items():
        work = 14 * HEADS * CHANNELS * visible_pairs(packing(pieces))
        seconds = figures[f"attention {name}, FlexAttention"]["seconds"].median
        figures[f"attention {name}, TF/s"] = work / seconds / 1e12
        print(f"attention {name}: {work / seconds / 1e12:.0f} TF/s on visible pairs, mask included")
    met = publish(
        "gpu_kernels", ["", "form", "ms", "speed-up", "peak GiB", "spread"], rows, goals, figures, ("triton",)
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
