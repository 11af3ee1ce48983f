"""How well the codec gives back held-out pictures, beside the mean picture and an untrained codec."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from unicom_dist.config.schema import Config
from unicom_dist.data.buckets import Shape
from unicom_dist.evaluate.heldout import Pair, to_unit
from unicom_dist.evaluate.image_metrics import psnr, ssim
from unicom_dist.evaluate.rows import Better, Row, measure
from unicom_dist.models.codec import Codec
from unicom_dist.sample.pictures import PictureCodec

Distance = Callable[[Tensor, Tensor], Tensor]  # [B, 3, H, W] in [-1, 1], twice -> [B]


def reconstruct(pipeline: PictureCodec, pairs: Sequence[Pair], config: Config) -> list[Image.Image]:
    """The pairs' pictures, drawn anew from their features; seeds count up from the recipe's."""
    seeds = [config.sample.seed + number for number in range(len(pairs))]
    features = [pair.features for pair in pairs]
    shapes = [Shape(pair.picture.height, pair.picture.width) for pair in pairs]
    return pipeline.reconstruct(
        features, seeds, config.sample.decoder_steps, config.sample.solver, shapes, config.sample.decoder_guidance
    )


def untrained_codec(pipeline: PictureCodec, seed: int) -> PictureCodec:
    """The same codec with its initial weights."""
    fresh = Codec(pipeline.codec.config, pipeline.codec.encoder_channels, seed)
    fresh = fresh.to(pipeline.device, pipeline.codec.dtype).eval().requires_grad_(False)
    return PictureCodec(fresh, pipeline.encoder_config, batch=pipeline.batch, target=pipeline.target)


def reconstruction_rows(
    originals: Sequence[Image.Image],
    rebuilt: Sequence[Image.Image],
    untrained: Sequence[Image.Image],
    mean: Image.Image,
    lpips: Distance,
) -> list[Row]:
    """One row per metric over held-out pictures. SSIM only from 11 px a side up."""
    truth = to_unit(originals)
    candidates = [to_unit(rebuilt), to_unit(untrained), to_unit([mean]).expand_as(truth)]

    def distance(images: Tensor, references: Tensor) -> Tensor:
        with torch.no_grad():
            pieces = zip(torch.split(images, 16), torch.split(references, 16), strict=True)
            return torch.cat([lpips(a * 2 - 1, b * 2 - 1).double() for a, b in pieces])

    metrics: list[tuple[str, Distance, Better, str]] = [("PSNR (dB)", psnr, "higher", "")]
    if min(truth.shape[-2:]) >= 11:
        metrics.append(("SSIM", ssim, "higher", "SSIM: Gaussian window of 11 px, sigma 1.5."))
    metrics.append(("LPIPS (VGG)", distance, "lower", "LPIPS: VGG16 trunk, version 0.1."))
    rows = []
    for name, metric, better, note in metrics:
        model, fresh, flat = (metric(images, truth) for images in candidates)
        trivial = ("mean image", float(flat.mean()))
        rows.append(measure(name, "heldout", model.tolist(), better, None, float(fresh.mean()), trivial, note))
    return rows
