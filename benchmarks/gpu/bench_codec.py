"""On one GPU: images per second, MFU and peak memory of a codec step with the decoder of FLUX.1-dev's size.

A step is the trainer's without reading data and without the moving average: pictures through a VAE of FLUX's shape in
float32, the codec forward and backward in bfloat16 with recomputation, one AdamW step of `PlainEngine` (ZeRO 0).
Weights are random. `lora` and `image-branch` have all 57 blocks; `all` has as many as one card holds with float32
master weights and moments (--blocks). 1024 tokens per picture, no perceptual term. MFU: operations of
`tracking/flops.py` (nothing for recomputation or the VAE) over the time and over the data sheet's figure. The clock is
wall time between synchronisations.

    python benchmarks/gpu/bench_codec.py [--px 512 1024] [--batch 4] [--trainable lora all] [--steps 5] [--rounds 3]
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Timing, publish
from train_figures import measured

from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import CodecConfig
from unicom_dist.models.codec import Codec, CodecBatch
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.models.target import build_target
from unicom_dist.objective.terms import codec_counts, codec_terms, total
from unicom_dist.parallel.engine import OptimizerConfig
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.plain import PlainEngine
from unicom_dist.parallel.tensor import materialise
from unicom_dist.tracking.flops import codec_flops, device_peak

CHANNELS, SIDE = 1152, 32  # of SigLIP2; 32 x 32 tokens
TINY = {"heads": 2, "head_dim": 16, "rope_axes": (4, 6, 6), "text_channels": 24, "pooled_channels": 12}


def vae_folder(folder: Path, tiny: bool) -> dict[str, Any]:
    """A VAE of FLUX's shape with random weights in `folder`; what the decoder's section says about it."""
    widths = (8, 8) if tiny else (128, 256, 512, 512)
    vae = diffusers_class("AutoencoderKL")(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8 if tiny else 32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.save_pretrained(folder)
    return {"vae_path": str(folder), "vae_scale": 2 ** (len(widths) - 1)}


def codec_config(options: argparse.Namespace, trainable: str, vae: dict[str, Any]) -> CodecConfig:
    """The full-size recipe's codec; `all` with the number of blocks that was asked for."""
    config = load_recipe("unicom_7b/codec").config.codec
    changes: dict[str, Any] = {**vae, "trainable": trainable}
    if trainable == "all" or options.device == "cpu":
        changes |= {"double_blocks": options.blocks[0], "single_blocks": options.blocks[1]}
    decoder = config.decoder.model_copy(update=changes | (TINY if options.device == "cpu" else {}))
    return config.model_copy(update={"decoder": decoder, "perceptual": "none"})


def batch_of(config: CodecConfig, pictures: int, px: int, device: torch.device) -> CodecBatch:
    """Random pictures and features."""
    cells = px // config.decoder.vae_scale
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    return CodecBatch(
        images=torch.rand(pictures, 3, px, px) * 2 - 1,
        features=torch.randn(pictures, SIDE * SIDE, CHANNELS),
        mask=torch.ones(pictures, SIDE * SIDE, dtype=torch.bool),
        grid=places.expand(pictures, -1, -1),
        noise=torch.randn(pictures, config.decoder.vae_channels, cells, cells),
        t=torch.rand(pictures),
        latent_noise=torch.zeros(pictures, SIDE * SIDE, config.compressor.channels),
        latent_noise_level=torch.zeros(pictures),
        keys=[str(number) for number in range(pictures)],
    ).to(device)


def run(options: argparse.Namespace, trainable: str, vae: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Figures at every resolution."""
    config = codec_config(options, trainable, vae)
    codec = Codec(config, CHANNELS, outline=True)
    materialise(codec.decoder, device)
    with torch.no_grad():
        for parameter in codec.decoder.parameters():
            parameter.normal_(std=0.02)
    precision = "bfloat16" if device.type == "cuda" else "float32"
    engine = PlainEngine(codec, OptimizerConfig(precision=precision), Mesh(0, 1, device))
    target, found = build_target(config.decoder, device), []
    for px in options.px:
        batch = batch_of(config, options.batch, px, device)

        def step(batch: CodecBatch = batch) -> None:
            batch.data = target.encode(batch.images)
            with engine.accumulate():
                terms = codec_terms(engine(batch), batch, config, None)
                engine.backward(total(terms, codec_counts(batch, config)))
            engine.step(1e-5)

        try:
            rounds = [measured(step, options.steps, device) for _ in range(options.rounds)]
        except torch.OutOfMemoryError:
            print(f"  {trainable} at {px} px: out of memory with {options.batch} pictures")
            continue
        seconds = Timing.of([second for one in rounds for second in one.seconds])
        found.append(
            {
                "trainable": trainable,
                "blocks": [config.decoder.double_blocks, config.decoder.single_blocks],
                "px": px,
                "pictures": options.batch,
                "seconds": seconds,
                "images_per_s": options.batch / seconds.median,
                "flops": codec_flops(codec, batch),
                "peak_bytes": max(one.peak for one in rounds),
            }
        )
    engine.close()
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--trainable", nargs="+", choices=["lora", "image-branch", "all"], default=["lora", "all"])
    parser.add_argument("--blocks", nargs=2, type=int, default=[8, 16], help="double and single blocks of `all`")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a trial in miniature")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no GPU (a trial without one: --device cpu --px 16 --blocks 1 1 --batch 1)")
        return 3
    device = torch.device(options.device)
    peak = device_peak(device, torch.bfloat16).flops_per_s if device.type == "cuda" else float("inf")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        vae = vae_folder(Path(folder), tiny=device.type == "cpu")
        for trainable in options.trainable:
            found += run(options, trainable, vae, device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for figure in found:
        figure["mfu"] = figure["flops"] / figure["seconds"].median / peak
    rows = [
        [
            f"{figure['trainable']}, {figure['blocks'][0]} + {figure['blocks'][1]} blocks",
            str(figure["px"]),
            f"{figure['images_per_s']:.2f}",
            f"{figure['mfu']:.1%}",
            f"{figure['peak_bytes'] / 2**30:.1f}",
            figure["seconds"].spread,
        ]
        for figure in found
    ]
    publish("bench_codec", ["what trains", "px", "images/s", "MFU", "peak GiB", "spread"], rows, [], {"rows": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
