"""On a GPU: packed mixed attention of six rows, forward and backward, against its visible pairs without a mask.

The rows are those of `benchmarks/bench_attention.py`; 28 query and 4 key heads of 128 channels in bfloat16 (the 7B
shape). Plans for FlexAttention are made in the loader's thread and only moved here; `mask anew` is what BAGEL's
training does, torch's `create_block_mask` for every batch. TF/s count 14 K operations per visible pair and head. The
clock is wall time between synchronisations.

    python benchmarks/gpu/bench_attention.py [--rounds 7]
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_kernels import clock
from common import Goal, interleaved, publish

from unicom_dist.models.attention import visible
from unicom_dist.models.flex import BLOCK, FlexPlan, _kernel
from unicom_dist.models.operations import visible_pairs
from unicom_dist.models.segments import Segment
from unicom_dist.testing.segments import LAYOUTS, layout

HEADS, KEY_HEADS, CHANNELS = 28, 4, 128
UNMASKED, DENSE, ANEW, OURS = "no mask", "dense mask", "FlexAttention, mask anew", "FlexAttention (ours)"


def methods(segments: list[Segment]) -> dict[str, Callable[[], object]]:
    """Forward and backward, each."""
    positions = sum(segment.length for segment in segments)
    shapes = [(1, heads, positions, CHANNELS) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    qkv = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    grad = torch.randn_like(qkv[0])
    rows = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in qkv]
    mask = torch.zeros(positions, positions, device="cuda", dtype=torch.bfloat16)
    mask.masked_fill_(~visible(segments).cuda(), float("-inf"))
    prepared = FlexPlan.build(segments)
    rule = prepared.to("cuda").mask.mask_mod
    look = torch.compile(create_block_mask)

    def sdpa(bias: torch.Tensor | None) -> object:
        query, key, value = qkv
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
        return torch.autograd.grad(out, qkv, grad)

    def anew() -> object:
        found = look(rule, 1, 1, positions, positions, device="cuda", BLOCK_SIZE=BLOCK)
        return torch.autograd.grad(_kernel(True)(*qkv, block_mask=found, enable_gqa=True), qkv, grad)

    def ours() -> object:
        return torch.autograd.grad(prepared.to("cuda")(0, *rows), rows, grad[0].transpose(0, 1))

    return {UNMASKED: partial(sdpa, None), DENSE: partial(sdpa, mask), ANEW: anew, OURS: ours}


def main() -> int:
    """Measure, print, write; 1 if a goal was missed, 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: torch sees no GPU")
        return 3
    rows, goals, over_anew = [], [], []
    figures: dict[str, dict[str, Any]] = {}
    for name in LAYOUTS:
        segments = layout(name)
        positions, pairs = sum(segment.length for segment in segments), visible_pairs(segments)
        found = interleaved(methods(segments), options.rounds, clock)
        for method, timing in found.items():
            shown = positions**2 if method == UNMASKED else pairs
            rate = 14 * HEADS * CHANNELS * shown / timing.median / 1e12
            efficiency = found[UNMASKED].median * pairs / positions**2 / timing.median
            rows.append([name, method, f"{1e3 * timing.median:.2f}", f"{rate:.0f}", f"{efficiency:.2f}", timing.spread])
            figures[f"{name}, {method}"] = {"seconds": timing, "tflops": rate, "efficiency": efficiency}
        over_anew.append(found[ANEW].median / found[OURS].median)
        if positions >= 4096:
            goals.append(Goal(f"efficiency, {name}", figures[f"{name}, {OURS}"]["efficiency"], 0.75))
        if name == "mix8k":
            goals.append(Goal("dense mask / ours, mix8k", found[DENSE].median / found[OURS].median, 6))
    mean = math.exp(sum(map(math.log, over_anew)) / len(over_anew))
    goals.append(Goal("mask anew / ours, geometric mean", mean, 1.3))
    columns = ["row", "method", "ms", "TF/s", "efficiency", "spread"]
    return 0 if publish("gpu_attention", columns, rows, goals, figures, ("triton",)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
