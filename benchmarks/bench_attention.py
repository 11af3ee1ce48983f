"""Packed mixed attention, forward and backward, of six rows, against what its visible pairs cost without a mask.

The rows (`unicom_dist.testing.segments`): t2i, captions of 96 tokens with an image of 256 to draw; und, a question, an
image of 576 to read and an answer; inter, one document of 256 tokens and images of 256 in turn; mix, all of them; 2k
to 8k positions. Four heads of 64 channels, in the dtype this CPU trains in: bfloat16 if it multiplies that, as CPUs
with AVX2 alone do not (many times slower), else float32.

    efficiency = time of SDPA without a mask x visible pairs / all pairs / time

so 1 is attention that computes what is visible at the full speed of torch's kernel, and nothing else.

    python benchmarks/bench_attention.py [--rounds 5] [--only t2i2k ...] [--dtype float32]
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Goal, Timing, interleaved, publish
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from unicom_dist.models import attention_plan
from unicom_dist.models.attention import AttentionPlan, visible
from unicom_dist.models.attention_kernels import Rectangle, kernel_for
from unicom_dist.models.attention_plan import documents
from unicom_dist.models.flex import FlexPlan
from unicom_dist.models.operations import visible_pairs
from unicom_dist.models.segments import Segment
from unicom_dist.parallel.precision import training_dtype
from unicom_dist.testing.segments import LAYOUTS, layout

HEADS, CHANNELS = 4, 64
UNMASKED, DENSE, SAMPLES, CAUSAL = "no mask", "dense mask", "sample by sample", "samples as text"
WHOLE, OURS, BARE = "ours, samples whole", "ours", "ours, bare calls"
NOTES = {CAUSAL: "another mask", UNMASKED: "all pairs"}


def tensors(positions: int, heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value [S, H or G, K], and a gradient of the result."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(positions, n, CHANNELS) for n in (heads, key_heads, key_heads, heads)]
    drawn = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    return [*(x.requires_grad_() for x in drawn[:3]), drawn[3]]


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """torch's attention of [S, H, K]; shared keys are repeated, as it needs them."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    heads = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=causal)[0].transpose(0, 1)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as the kernel wants it."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def by_sample(segments: Sequence[Segment], dtype: torch.dtype, causal: bool) -> Callable[..., Tensor]:
    """One call per sample with its own dense mask (what BAGEL does without a flash kernel), or a causal one."""
    samples = documents(segments)
    lengths = [sample.length for sample in samples]
    masks = [None if causal else additive(visible(sample.segments), dtype) for sample in samples]

    def attend(*qkv: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths) for x in qkv), masks, strict=True)
        return torch.cat([sdpa(q, k, v, mask, causal) for q, k, v, mask in parts])

    return attend


def methods(segments: list[Segment], dtype: torch.dtype, every: bool = True) -> dict[str, Callable[..., Tensor]]:
    """Each from query, key and value to the result; masks and plans are made here and not timed."""
    plan = AttentionPlan.build(segments, dtype)
    found: dict[str, Callable[..., Tensor]] = {UNMASKED: sdpa, OURS: lambda *qkv: plan(0, *qkv)}
    if not every:
        return found
    mask = additive(visible(segments), dtype)
    with patch.object(attention_plan, "CALL", math.inf):
        whole = AttentionPlan.build(segments, dtype)
    return {
        UNMASKED: sdpa,
        DENSE: lambda *qkv: sdpa(*qkv, mask),
        SAMPLES: by_sample(segments, dtype, causal=False),
        CAUSAL: by_sample(segments, dtype, causal=True),
        WHOLE: lambda *qkv: whole(0, *qkv),
        OURS: found[OURS],
    }


@torch.no_grad()
def bare_calls(segments: list[Segment], *qkv: Tensor, grad: Tensor) -> Callable[[], None]:
    """The kernel calls of our plan, forward and backward, on inputs that lie ready; their results are dropped."""
    inputs = []
    kernel = kernel_for(qkv[0])
    for call in AttentionPlan.build(segments, qkv[0].dtype).calls:
        query, d_out = (call.queries(x, HEADS).contiguous() for x in (qkv[0], grad))
        key, value = (call.keys(x, HEADS).contiguous() for x in qkv[1:])
        inputs.append((d_out, Rectangle(query, key, value, call.bias, call.causal)))

    def run() -> None:
        for d_out, rectangle in inputs:
            kernel.backward(d_out, rectangle, *kernel.forward(rectangle))

    return run


def times(segments: list[Segment], key_heads: int, dtype: torch.dtype, rounds: int) -> dict[str, Timing]:
    """Forward and backward."""
    *qkv, grad = tensors(sum(s.length for s in segments), HEADS, key_heads, dtype)
    every = key_heads == HEADS
    compared: dict[str, Callable[[], object]] = {
        name: lambda form=form: torch.autograd.grad(form(*qkv), qkv, grad)
        for name, form in methods(segments, dtype, every).items()
    }
    if every:
        compared[BARE] = bare_calls(segments, *qkv, grad=grad)
    return interleaved(compared, rounds)


def errors(dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of result and gradients against float64, on t2i2k with one head."""
    segments = layout("t2i2k")
    *qkv, grad = tensors(sum(s.length for s in segments), 1, 1, dtype)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    seen = visible(segments)
    plan = AttentionPlan.build(segments, dtype)

    def results(out: Tensor, at: list[Tensor]) -> list[Tensor]:
        return [x.double() for x in (out.detach(), *torch.autograd.grad(out, at, grad.to(out.dtype)))]

    true = results(sdpa(*wide, additive(seen, torch.float64)), wide)
    forms = {DENSE: sdpa(*qkv, additive(seen, dtype)), OURS: plan(0, *qkv)}
    found = {name: results(out, qkv) for name, out in forms.items()}
    return {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(mine, true, strict=True))
        for name, mine in found.items()
    }


def planning(rounds: int) -> dict[str, Timing]:
    """Seconds to prepare a row: plans at 8k and 32k positions, and the block mask at 8k as torch makes it."""
    row = layout("mix8k")
    count = row[-1].sample + 1
    long = [Segment(s.sample + count * n, s.mode, s.length) for n in range(4) for s in row]
    rule, positions = FlexPlan.build(row).mask.mask_mod, sum(s.length for s in row)
    compared: dict[str, Callable[[], object]] = {
        "plan, 8k": lambda: AttentionPlan.build(row, torch.float32),
        "plan, 32k": lambda: AttentionPlan.build(long, torch.float32),
        "block mask, 8k": lambda: FlexPlan.build(row),
        "block mask, 32k": lambda: FlexPlan.build(long),
        "create_block_mask, 8k": lambda: create_block_mask(rule, 1, 1, positions, positions, device="cpu"),
    }
    return interleaved(compared, rounds)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as above")
    options = parser.parse_args()
    dtype = training_dtype(options.dtype or "auto", torch.device("cpu"))
    torch.set_num_threads(1)
    rows, figures, ours, over_dense, over_samples = [], {}, {}, {}, []
    for name, key_heads in [*((name, HEADS) for name in options.only), ("t2i4k", 1)]:
        segments = layout(name)
        positions = sum(s.length for s in segments)
        share = visible_pairs(segments) / positions**2
        title = name if key_heads == HEADS else f"{name}, shared keys"
        began = time.perf_counter()
        found = times(segments, key_heads, dtype, options.rounds)
        print(f"  {title}: {time.perf_counter() - began:.0f} s", flush=True)
        for method, timing in found.items():
            efficiency = found[UNMASKED].median * share / timing.median
            speed = f"{found[DENSE].median / timing.median:.2f}" if DENSE in found else ""
            shown = "" if method in NOTES else f"{efficiency:.2f}"
            rows.append([title, method, f"{1e3 * timing.median:.0f}", speed, shown, timing.spread])
            figures[f"{title}, {method}"] = {"seconds": timing, "efficiency": efficiency, "visible": share}
        if key_heads == HEADS:
            ours[name] = found[UNMASKED].median * share / found[OURS].median
            over_dense[name] = found[DENSE].median / found[OURS].median
            over_samples.append(found[SAMPLES].median / found[OURS].median)
    goals = [
        Goal("efficiency, geometric mean", geometric_mean(list(ours.values())), 0.70),
        Goal(f"efficiency, least ({min(ours, key=ours.__getitem__)})", min(ours.values()), 0.50),
        *(
            Goal(f"dense mask / ours, {name}", over_dense[name], bound)
            for name, bound in (("t2i4k", 8), ("mix8k", 8), ("inter4k", 2))
            if name in ours
        ),
        Goal("sample by sample / ours, geometric mean", geometric_mean(over_samples), 1.6),
    ]
    planned = planning(options.rounds)
    milliseconds = {name: 1e3 * timing.median for name, timing in planned.items()}
    rows += [["planning", name, f"{ms:.2f}", "", "", planned[name].spread] for name, ms in milliseconds.items()]
    for what in ("plan", "block mask"):
        for size, bound in (("8k", 2), ("32k", 8)):
            goals.append(Goal(f"{what}, {size}", milliseconds[f"{what}, {size}"], bound, False, "ms"))
    faster = milliseconds["create_block_mask, 8k"] / milliseconds["block mask, 8k"]
    goals.append(Goal("create_block_mask / ours, 8k", faster, 100))
    exact, low = errors(torch.float32), errors(torch.bfloat16)
    goals += [
        Goal("relative error in float32", exact[OURS], 1e-5, False, ""),
        Goal("error in bfloat16 / dense mask's", low[OURS] / low[DENSE], 1.1, False),
    ]
    figures |= {"planning": planned, "errors": {"float32": exact, "bfloat16": low}}
    columns = ["row", "method", "ms", "over dense", "efficiency", "spread"]
    name = "bench_attention" + ("_bfloat16" if dtype == torch.bfloat16 else "")
    return 0 if publish(name, columns, rows, goals, figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
