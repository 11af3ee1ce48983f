"""Frozen image encoders behind one interface: `build_encoder(config)` and, without building it, `encoder_fingerprint`.

To add one: a module with a class that has the members of `base.Encoder`, its name in `EncoderConfig.kind`, a branch in
both functions here and a parity test against the reference implementation.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unicom_dist.config.schema import EncoderConfig
from unicom_dist.models.encoders.base import EncodedImage, Encoder, Prepared

__all__ = [
    "EncodedImage",
    "Encoder",
    "Prepared",
    "build_encoder",
    "encoder_fingerprint",
    "encoder_shape",
    "encoder_view",
    "fetch_encoder",
]


def build_encoder(config: EncoderConfig, device: torch.device | str | None = None) -> Encoder:
    """The configured encoder with its weights, on `device` (default: the first GPU, else the CPU).

    ConfigError: weights missing or another network's, impossible resolution.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if config.kind == "siglip2":
        from unicom_dist.models.encoders.siglip2 import Siglip2Encoder

        return Siglip2Encoder(config, where)
    if config.kind == "efficientnet-lite2":
        from unicom_dist.models.encoders.efficientnet import EfficientNetEncoder

        return EfficientNetEncoder(config, where)
    from unicom_dist.models.encoders.random import RandomEncoder

    return RandomEncoder(config)


def fetch_encoder(config: EncoderConfig) -> None:
    """Have the weights that a hub id names on this machine; says before it fetches them. ConfigError: not to be had."""
    if config.kind == "siglip2":
        from unicom_dist.models.encoders.siglip2 import resolve

        resolve(config, download=True)


def encoder_fingerprint(config: EncoderConfig) -> str:
    """What `build_encoder(config).fingerprint` would be, from the weight files alone."""
    if config.kind == "siglip2":
        from unicom_dist.models.encoders.siglip2 import siglip2_fingerprint

        return siglip2_fingerprint(config)
    if config.kind == "efficientnet-lite2":
        from unicom_dist.models.encoders.efficientnet import efficientnet_fingerprint

        return efficientnet_fingerprint(config)
    from unicom_dist.models.encoders.random import random_fingerprint

    return random_fingerprint(config)


def encoder_view(config: EncoderConfig) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """RGB picture -> what a trained encoder's network reads of it: [side, side, 3], or patches [n, p p 3]."""
    if config.kind == "siglip2":
        from unicom_dist.models.encoders.siglip2 import siglip2_view_of

        return siglip2_view_of(config)
    from unicom_dist.models.encoders.efficientnet import efficientnet_view

    return lambda image: efficientnet_view(image, config.image_px)


def encoder_shape(config: EncoderConfig) -> tuple[int, int]:
    """Most tokens an image can have, and channels of a token, without building the encoder."""
    if config.kind == "siglip2":
        from unicom_dist.models.encoders.siglip2 import siglip2_shape

        return siglip2_shape(config)
    if config.kind == "efficientnet-lite2":
        from unicom_dist.models.encoders.efficientnet import efficientnet_shape

        return efficientnet_shape(config)
    from unicom_dist.models.encoders.random import RandomEncoder

    return RandomEncoder.max_tokens, RandomEncoder.channels
