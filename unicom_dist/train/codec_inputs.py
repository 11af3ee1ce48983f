"""What a codec's batch needs beside what the loader read: latents of its pictures, features of a black one.

Both come from frozen networks that are no part of the model and hold no gradients: the VAE of the target space and the
encoder. Shapes as in `CodecBatch`.
"""

import math
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from unicom_dist.config.schema import Config
from unicom_dist.data.samples import grid_positions
from unicom_dist.models.codec import CodecBatch
from unicom_dist.models.encoders import EncodedImage, build_encoder
from unicom_dist.models.encoders.blank import blank_features
from unicom_dist.models.target import Target


class CodecInputs:
    """Completes batches where they are; `encoder` is loaded with the first picture that is to be blank."""

    def __init__(self, config: Config, target: Target) -> None:
        self._config, self._target = config, target

    def __call__(self, batch: CodecBatch) -> CodecBatch:
        """The batch with `data`, and with the features of a black picture where it says `blank`."""
        if self._config.codec.decoder.space == "vae":
            batch = replace(batch, data=self._target.encode(batch.images))
        if batch.blank is not None and bool(batch.blank.any()):
            batch = with_blank(batch, batch.blank, self.blank, self.blank_latents)
        return batch

    @cached_property
    def blank(self) -> EncodedImage:
        """Features of a black picture. ConfigError: the encoder's weights are not there."""
        return blank_features(build_encoder(self._config.encoder), self._config.encoder)

    @property
    def blank_latents(self) -> int:
        """How many latents they become."""
        return math.prod(self._config.codec.compressor.latent_grid(self.blank.grid))


def with_blank(batch: CodecBatch, chosen: Tensor, blank: EncodedImage, latents: int) -> CodecBatch:
    """The batch with features, mask and grid of `blank`, which becomes so many latents, where `chosen` [B]."""
    tokens = blank.features.shape[0]
    features, grid = (lengthened(value, tokens) for value in (batch.features, batch.grid))
    mask, noise = lengthened(batch.mask, tokens), lengthened(batch.latent_noise, latents)
    row = torch.zeros_like(features[0])
    row[:tokens] = torch.from_numpy(blank.features).to(row)
    places = torch.zeros_like(grid[0])
    places[:tokens] = grid_positions(*blank.grid).to(places)
    real, heard = (torch.arange(x.shape[1], device=x.device) for x in (mask, noise))
    chosen = chosen[:, None]
    return replace(
        batch,
        features=torch.where(chosen[..., None], row, features),
        mask=torch.where(chosen, real < tokens, mask),
        grid=torch.where(chosen[..., None], places, grid),
        latent_noise=noise * ~(chosen & (heard >= latents))[..., None],
    )


def lengthened(value: Tensor, length: int) -> Tensor:
    """[B, n, ...] with zeros up to `length` tokens; as it is where it has them."""
    missing = max(0, length - value.shape[1])
    return F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing)) if missing else value
