"""The language loss over 152,064 tokens: peak memory and time against logits at every position.

One packed row of 1,024 positions, 41 % of them text. `all positions` is what transformers does: logits of every
position, cross-entropy that ignores those without a label. Then the same map at the labels alone, and ours, which also
never holds the labels' logits whole. Forward and backward, hidden states and weight both with gradients, in float32:
CPUs without bfloat16 units multiply it 50 times slower. Memory: bytes that torch allocates between start and end beyond
what was there, at their peak.

    python benchmarks/bench_head.py [--width 256] [--rounds 5]
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Goal, interleaved, publish
from memory import peak_bytes
from torch.nn import functional as F

from unicom_dist.parallel.cross_entropy import linear_cross_entropy

VOCABULARY, POSITIONS, TEXT = 152_064, 1024, 0.41


def methods(width: int) -> dict[str, Callable[[], None]]:
    """The three forms of one loss."""
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(VOCABULARY, width, generator=draw) * 0.02).requires_grad_()
    hidden = torch.randn(POSITIONS, width, generator=draw).requires_grad_()
    labels = torch.randperm(POSITIONS, generator=draw)[: int(TEXT * POSITIONS)].sort()[0]
    ids = torch.randint(VOCABULARY, (len(labels),), generator=draw)

    every = torch.full((POSITIONS,), -100).index_copy(0, labels, ids)

    def gradients(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, (hidden, weight))

    return {
        "all positions": lambda: gradients(F.cross_entropy(F.linear(hidden, weight), every, reduction="sum")),
        "labels": lambda: gradients(F.cross_entropy(F.linear(hidden[labels], weight), ids, reduction="sum")),
        "labels, in chunks (ours)": lambda: gradients(linear_cross_entropy(hidden[labels], weight, ids).sum()),
    }


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compared = methods(options.width)
    peaks = {name: peak_bytes(method) for name, method in compared.items()}
    timings = interleaved(compared, options.rounds)
    first, *_, last = compared
    rows = [
        [
            name,
            f"{peaks[name] / 2**20:.0f}",
            f"{peaks[name] / peaks[first]:.2f}",
            f"{timings[name].median:.2f}",
            f"{timings[name].median / timings[first].median:.2f}",
            timings[name].spread,
        ]
        for name in compared
    ]
    print(f"\n{POSITIONS} positions, {TEXT:.0%} text, {VOCABULARY:,} tokens, width {options.width}\n")
    met = publish(
        "bench_head",
        ["logits", "peak MiB", "ratio", "CPU s", "ratio", "spread"],
        rows,
        [
            Goal("peak memory over all positions", peaks[last] / peaks[first], 0.20, at_least=False),
            Goal("time over all positions", timings[last].median / timings[first].median, 0.40, at_least=False),
        ],
        {name: {"peak_bytes": peaks[name], "seconds": timings[name], "width": options.width} for name in compared},
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
