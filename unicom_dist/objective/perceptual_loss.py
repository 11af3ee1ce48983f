"""The perceptual term of the codec's loss: which network, what it is shown, from when on.

The network compares the decoder's clean estimate of samples with little noise with the pictures, at `perceptual_px` a
side. Pixels are shown whole, reduced (antialiased) or enlarged. Where a VAE's latents are drawn it is a crop instead:
decoding is the memory peak of the step, and a crop of latents can be decoded alone. Its place follows from the sample's
own noise, so that it does not depend on how the step is cut.
Shapes: B pictures [B, 3, H, W] in [-1, 1]; z [B, c, H/scale, W/scale] in the decoder's target space.
"""

import logging
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import CodecConfig
from unicom_dist.models.target import Target
from unicom_dist.objective.feature_distance import FeatureDistance
from unicom_dist.objective.feature_distance import Kind as FeatureKind
from unicom_dist.objective.perceptual import Kind as LpipsKind
from unicom_dist.objective.perceptual import Lpips

log = logging.getLogger(__name__)

DOCS = "docs/codec.md"
LEAST_PX = 32  # below, the last stages of a network are empty
JUDGES = {"lpips-vgg": "the LPIPS", "resnet50": "the judge's verdict"}  # what evaluation finds with a network


class PerceptualLoss(nn.Module):
    """A frozen network, the target space it looks into, and the side at which it looks; 0 = the pictures' own."""

    def __init__(self, network: nn.Module, target: Target, px: int = 0) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.target, self.px = target, px

    def forward(self, z: Tensor, images: Tensor, noise: Tensor) -> Tensor:
        """Distance [B] float32 of what z shows to the images; `noise` is that of z. Gradient to z alone."""
        if self.target.scale == 1:
            shown, images = at_side(self.target.decode(z), self.px), at_side(images, self.px)
        else:
            z, images = crop(z, images, noise, max(1, self.px // self.target.scale), self.target.scale, self.px > 0)
            shown = self.target.decode(z)
        distance: Tensor = self.network(shown, images.float())
        return distance


def load_perceptual(config: CodecConfig, target: Target) -> PerceptualLoss | None:
    """What `config` names, None for "none". ConfigError: too few pixels. DataError: no or foreign weights."""
    if config.perceptual == "none":
        return None
    side = config.perceptual_px or config.decoder.image_px
    if side < LEAST_PX:
        raise ConfigError(
            f"codec.perceptual = {config.perceptual} at {side} px",
            f"the network needs pictures of at least {LEAST_PX} px a side",
            f"set codec.perceptual_px to {LEAST_PX} or more, or codec.perceptual to none",
            DOCS,
        )
    if config.perceptual in JUDGES:
        log.warning(
            "codec.perceptual = %s: evaluation measures with the same network, %s of this codec is trained for",
            config.perceptual,
            JUDGES[config.perceptual],
        )
    return PerceptualLoss(load_network(config.perceptual, config.perceptual_path), target, config.perceptual_px)


def load_network(name: str, folder: str) -> nn.Module:
    """The network of that name: pictures [B, 3, H, W], twice, to distances [B]. DataError: no or foreign weights."""
    family, _, trunk = name.partition("-")
    if family == "lpips":
        return Lpips.load(cast(LpipsKind, trunk), folder)
    try:
        return FeatureDistance.load(cast(FeatureKind, name), folder)
    except (ConfigError, SafetensorError, KeyError, OSError, ValueError) as error:
        reason = error.why if isinstance(error, ConfigError) else str(error)
        raise DataError(
            f"codec.perceptual_path = {folder!r} does not hold {name} weights",
            reason,
            f"name the folder of {name}, such as assets/{name}, fetched by `unicom data fetch`",
            DOCS,
        ) from error


def at_side(images: Tensor, px: int) -> Tensor:
    """The images with a longer side of `px` pixels, float32; 0 = as they are. Bilinear, antialiased when reducing."""
    height, width = images.shape[-2:]
    longer = max(height, width)
    if px in (0, longer):
        return images.float()
    size = (max(1, round(height * px / longer)), max(1, round(width * px / longer)))
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=px < longer)


def crop(z: Tensor, images: Tensor, noise: Tensor, cells: int, scale: int, cut: bool = True) -> tuple[Tensor, Tensor]:
    """Windows of at most cells x cells of z, and of the pixels they cover; not `cut`: everything.

    Each sample's place is even over all there are: two of its noise values through the normal distribution function.
    """
    height, width = z.shape[-2:]
    rows, columns = min(cells, height), min(cells, width)
    if not cut or (rows, columns) == (height, width):
        return z, images
    drawn = torch.special.ndtr(noise.flatten(1)[:, :2].float())
    room = drawn.new_tensor([height - rows + 1, width - columns + 1])
    top, left = torch.minimum(drawn * room, room - 1).long().unbind(1)
    return _window(z, top, left, rows, columns), _window(
        images, top * scale, left * scale, rows * scale, columns * scale
    )


def _window(x: Tensor, top: Tensor, left: Tensor, rows: int, columns: int) -> Tensor:
    """[B, c, rows, columns] of x [B, c, H, W], each sample from its own top and left [B]."""
    sample = torch.arange(len(x), device=x.device)[:, None, None]
    row = (top[:, None] + torch.arange(rows, device=x.device))[:, :, None]
    column = (left[:, None] + torch.arange(columns, device=x.device))[:, None]
    return x.permute(0, 2, 3, 1)[sample, row, column].permute(0, 3, 1, 2)


def scheduled(config: CodecConfig, step: int) -> CodecConfig:
    """`config` with the perceptual weight of the step that follows `step` finished ones.

    0 for `perceptual_start` steps, then rising evenly over `perceptual_ramp` steps to `perceptual_weight`.
    """
    if step >= config.perceptual_start + config.perceptual_ramp:
        return config
    share = max(0, step - config.perceptual_start + 1) / (config.perceptual_ramp + 1)
    return config.model_copy(update={"perceptual_weight": config.perceptual_weight * share})
