"""Forward and backward of the compressor, 1152 to 64 channels with 18 heads, against its matrix products alone.

`products` multiplies the same matrices, attention's scores and mixtures among them, and does nothing else: no norm, no
softmax, no bias, no activation. Once for an image of 1,024 tokens, once for images of several sizes, where `padded`
fills all up to the longest and `packed` has them end to end. Forward and backward, gradients of the tokens and of all
weights, float32, one thread.

    python benchmarks/bench_compressor.py [--rounds 7]
"""

import argparse
import os
from collections.abc import Callable, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Goal, interleaved, publish
from torch import Tensor, nn

from unicom_dist.config.schema import CompressorConfig
from unicom_dist.models.compressor import Compressor

CHANNELS, SQUARE = 1152, (32, 32)
MIXED = ((32, 32), (16, 16), (23, 44), (12, 20), (28, 14))  # of 1,024 to 240 tokens


def products(network: Compressor, rows: list[Tensor]) -> Callable[[], None]:
    """The compressor's matrix products over images [n, D], each with its own scores."""
    block = network.block
    weights = [layer.weight for layer in block.modules() if isinstance(layer, nn.Linear)]
    straight, qkv, out, mlp_in, mlp_out = weights
    heads = block.attention.heads
    lengths = [len(row) for row in rows]
    x = torch.cat(rows).requires_grad_()

    def step() -> None:
        parts = (part.unflatten(-1, (heads, -1)).split(lengths) for part in (x @ qkv.T).chunk(3, -1))
        mixed = []
        for query, key, value in zip(*parts, strict=True):
            scores = query.transpose(0, 1) @ key.permute(1, 2, 0)
            mixed.append((scores @ value.transpose(0, 1)).sum(0))
        narrow = x @ straight.T + torch.cat(mixed) @ out.T
        gate = (narrow @ mlp_in.T)[:, : mlp_out.shape[1]]
        torch.autograd.grad((gate @ mlp_out.T).sum(), [x, *weights])

    return step


def padded(network: Compressor, rows: list[Tensor]) -> Callable[[], None]:
    """As a training batch holds them."""
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).requires_grad_()
    mask = torch.arange(x.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return lambda: gradients(network(x, mask), x, network)


def packed(network: Compressor, rows: list[Tensor]) -> Callable[[], None]:
    """As the latents job has them."""
    x, lengths = torch.cat(rows).requires_grad_(), [len(row) for row in rows]
    places = torch.zeros(len(x), 2, dtype=torch.long)  # read by spatial variants only
    return lambda: gradients(network.packed(x, places, lengths), x, network)


def gradients(out: Tensor, x: Tensor, network: Compressor) -> None:
    """Of the sum, for the tokens and every weight."""
    torch.autograd.grad(out.sum(), [x, *network.parameters()])


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    network = Compressor(CompressorConfig(), CHANNELS)

    def images(grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        return [torch.randn(rows * columns, CHANNELS, generator=draw) for rows, columns in grids]

    square, mixed = images([SQUARE]), images(MIXED)
    timings = interleaved(
        {
            "1,024 tokens: products": products(network, square),
            "1,024 tokens: compressor": packed(network, square),
            "mixed: products": products(network, mixed),
            "mixed: padded": padded(network, mixed),
            "mixed: packed": packed(network, mixed),
        },
        options.rounds,
    )
    rows, speeds = [], {}
    for name, timing in timings.items():
        floor = timings[f"{name.split(':')[0]}: products"]
        speeds[name] = floor.median / timing.median
        rows.append([name, f"{timing.median * 1e3:.0f}", f"{speeds[name]:.2f}", timing.spread])
    tokens = [len(image) for image in mixed]
    print(f"\nmixed: {len(tokens)} images of {min(tokens)} to {max(tokens)} tokens, {sum(tokens)} in all\n")
    faster = timings["mixed: padded"].median / timings["mixed: packed"].median
    met = publish(
        "bench_compressor",
        ["", "CPU ms", "speed of the products", "spread"],
        rows,
        [
            Goal("1,024 tokens, of the products' speed", speeds["1,024 tokens: compressor"], 0.8),
            Goal("mixed and packed, of the products' speed", speeds["mixed: packed"], 0.8),
            Goal("packed over padded", faster, 1.0),
        ],
        {name: {"seconds": timing, "of_products": speeds[name]} for name, timing in timings.items()},
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
