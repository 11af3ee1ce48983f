"""Decoding: pictures per second through `PictureCodec.decode` against the bare calls of diffusers' transformer.

`diffusers` is FluxTransformer2DModel with its own attention, called once per solver step on patches that lie ready, and
nothing else: no noise, no decompressor, no solver, no pictures. `ours` goes from latents to PIL pictures with the same
weights and number of calls. float32, one thread; CPU time of the process.

    python benchmarks/bench_decoder.py [--rounds 5] [--steps 8] [--pictures 8]
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Goal, interleaved, publish

from unicom_dist.config.schema import CodecConfig, CompressorConfig, DecoderConfig, EncoderConfig
from unicom_dist.models.codec import Codec
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.sample.pictures import Latents, PictureCodec

CHANNELS, GRID = 384, (8, 8)
BLOCKS = {"heads": 4, "head_dim": 64, "rope_axes": (16, 24, 24)}
SIZES = {  # the laptop recipe's, and one with four times as many patches and more blocks
    "64 px": DecoderConfig(image_px=64, patch_px=8, double_blocks=1, single_blocks=3, **BLOCKS),
    "256 px": DecoderConfig(image_px=256, patch_px=16, double_blocks=2, single_blocks=4, **BLOCKS),
}


def methods(decoder: DecoderConfig, steps: int, pictures: int) -> dict[str, Callable[[], object]]:
    """Both ways to make `steps` calls for so many pictures."""
    compressor = CompressorConfig(channels=64, heads=4, attention_width=256, expanded=256)
    codec = Codec(CodecConfig(compressor=compressor, decoder=decoder), CHANNELS).eval().requires_grad_(False)
    through = PictureCodec(codec, EncoderConfig(kind="random"), batch=pictures)
    latents = [Latents(torch.randn(GRID[0] * GRID[1], 64), GRID) for _ in range(pictures)]
    bare = diffusers_class("FluxTransformer2DModel")(**codec.decoder.flux.config).eval().requires_grad_(False)
    bare.load_state_dict(codec.decoder.flux.state_dict())
    rows = decoder.image_px // decoder.patch_px
    inputs = {
        "hidden_states": torch.randn(pictures, rows * rows, 3 * decoder.patch_px**2),
        "encoder_hidden_states": torch.randn(pictures, GRID[0] * GRID[1], 256),
        "pooled_projections": torch.zeros(pictures, decoder.pooled_channels),
        "timestep": torch.full((pictures,), 0.5),
        "txt_ids": torch.zeros(GRID[0] * GRID[1], 3),
        "img_ids": torch.nn.functional.pad(torch.cartesian_prod(torch.arange(rows), torch.arange(rows)), (1, 0)),
    }

    def calls() -> None:
        with torch.no_grad():
            for _ in range(steps):
                bare(**inputs, return_dict=False)

    return {"diffusers, bare calls": calls, "PictureCodec.decode (ours)": lambda: through.decode(latents, 0, steps)}


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, goals, figures = [], [], {}
    for size, decoder in SIZES.items():
        timings = interleaved(methods(decoder, options.steps, options.pictures), options.rounds)
        bare, ours = timings.values()
        for name, timing in timings.items():
            rate, ratio = options.pictures / timing.median, timing.median / bare.median
            rows.append([size, name, f"{rate:.2f}", f"{timing.median:.3f}", f"{ratio:.3f}", timing.spread])
            figures[f"{size}: {name}"] = {"seconds": timing, "pictures_per_s": rate}
        goals.append(Goal(f"{size}: time over the bare calls", ours.median / bare.median, 1.03, at_least=False))
    print(f"\n{options.pictures} pictures, {options.steps} Euler steps, {GRID[0] * GRID[1]} tokens\n")
    columns = ["decoder", "method", "pictures/s", "CPU s", "ratio", "spread"]
    met = publish("bench_decoder", columns, rows, goals, figures, ["diffusers"])
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
