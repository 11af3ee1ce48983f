"""The semantic codec: compressor, decompressor and pixel decoder, its batch, and the statistics of its latents.

Shapes: B images of H x W pixels, n tokens of D encoder channels (padded; `mask` marks real ones), d latent channels.
Time: t = 1 is data, z_t = t z1 + (1 - t) eps, v = z1 - eps.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from unicom_dist.config.schema import CodecConfig
from unicom_dist.models.compressor import Compressor, Decompressor
from unicom_dist.models.decoder import PixelDecoder
from unicom_dist.models.flow import clean_from_velocity, interpolate
from unicom_dist.models.init import initialise


@dataclass(slots=True)
class CodecBatch:
    """Images and their encoder features, with the randomness of the step drawn beforehand.

    c channels and h x w cells: of the decoder's target space (`target_shape`), which is 3 and H x W in pixels.
    """

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    features: Tensor  # [B, n, D]
    mask: Tensor  # [B, n] bool, True = a real token
    grid: Tensor  # [B, n, 2] int64, (row, column)
    noise: Tensor  # [B, c, h, w]
    t: Tensor  # [B]
    latent_noise: Tensor  # [B, n, d]
    latent_noise_level: Tensor  # [B], std in units of the latents' standard deviation
    keys: list[str]
    blank: Tensor | None = None  # [B] bool, True = to be trained with the features of a black picture; None = none
    data: Tensor | None = None  # [B, c, h, w], the images in the target space; None where that is pixels

    @property
    def target(self) -> Tensor:
        """What the flow leads to, [B, c, h, w]."""
        return self.images if self.data is None else self.data

    def to(self, device: torch.device | str) -> "CodecBatch":
        """A copy whose tensors are on `device`; dtypes are kept (the model casts at its border)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if torch.is_tensor(value)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class LatentStats:
    """Mean and standard deviation of each latent channel over a data set, both [d] float32."""

    mean: Tensor
    std: Tensor

    def normalise(self, latents: Tensor) -> Tensor:
        """(z - mean) / std over the last axis, in z's dtype."""
        return ((latents.float() - self.mean.to(latents.device)) / self.std.to(latents.device)).to(latents.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """z std + mean over the last axis, in z's dtype."""
        return (latents.float() * self.std.to(latents.device) + self.mean.to(latents.device)).to(latents.dtype)

    def to_json(self) -> dict[str, list[float]]:
        """Plain lists, for `config.json` and `latents/stats.json`."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, list[float]]) -> "LatentStats":
        """The inverse of `to_json`."""
        return cls(torch.tensor(values["mean"]), torch.tensor(values["std"]))

    @classmethod
    def from_tensors(cls, tensors: Iterable[Tensor], floor: float = 1e-4) -> "LatentStats":
        """Population mean and std of the rows of a stream of [n, d] tensors, without holding them (Chan et al. 1979).

        `floor` bounds the std from below, so that a dead channel does not turn into infinities. ValueError on no rows.
        """
        count, mean, moment = 0, torch.zeros(()), torch.zeros(())
        for tensor in tensors:
            rows = tensor.reshape(-1, tensor.shape[-1]).double()
            if not rows.shape[0]:
                continue
            new = rows.mean(0)
            total = count + rows.shape[0]
            delta = new - mean
            moment = moment + (rows - new).square().sum(0) + delta.square() * (count * rows.shape[0] / total)
            mean = mean + delta * (rows.shape[0] / total)
            count = total
        if not count:
            raise ValueError("statistics of no latents")
        return cls(mean.float(), (moment / count).sqrt().clamp_min(floor).float())


class Codec(nn.Module):
    """Features to latents (`encode`), latents to the velocity of pixels (`decode_velocity`), both to train (`forward`).

    Latents are un-normalised here; `LatentStats` belongs to the prior. `seed` alone decides the initial weights.
    """

    def __init__(self, config: CodecConfig, encoder_channels: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.encoder_channels = encoder_channels
        self.compressor = Compressor(config.compressor, encoder_channels)
        self.decompressor = Decompressor(config.compressor, encoder_channels)
        self.decoder = PixelDecoder(config.decoder, config.compressor.expanded or encoder_channels)
        initialise(self, seed)
        self.decoder.reset()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which everything between the borders is computed."""
        return next(self.decoder.parameters()).dtype

    def encode(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Latents [B, n, d] (weights' dtype, padding zero) of features [B, n, D]; mask [B, n], True = a real token."""
        latents: Tensor = self.compressor(features.to(self.dtype), mask)
        return latents

    def decode_velocity(
        self, z_t: Tensor, t: Tensor, latents: Tensor, grid: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, c, h, w] float32 at z_t [B, c, h, w] and t [B], given latents [B, n, d] at grid [B, n, 2]."""
        tokens = self.decompressor(latents.to(self.dtype), mask)
        velocity: Tensor = self.decoder(z_t, t, tokens, grid, mask)
        return velocity

    def forward(self, batch: CodecBatch) -> tuple[Tensor, Tensor]:
        """Velocity and clean estimate, both [B, c, h, w] float32, in the decoder's target space.

        The decoder reads latents disturbed by `latent_noise_level` standard deviations of the image's own latents, so
        that it later forgives a prior's errors. Ref: RAE, noise-augmented decoding.
        """
        latents = self.encode(batch.features, batch.mask)
        level = (batch.latent_noise_level * spread_of(latents.detach(), batch.mask)).to(latents.dtype)
        latents = latents + level[:, None, None] * batch.latent_noise.to(latents.dtype)
        z_t = interpolate(batch.target.float(), batch.noise.float(), batch.t.float())
        velocity = self.decode_velocity(z_t, batch.t, latents, batch.grid, batch.mask)
        return velocity, clean_from_velocity(z_t, velocity, batch.t)


def spread_of(latents: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation [B] over the real tokens and all channels of each image, whatever else the batch holds."""
    wide, weight = latents.float(), mask[..., None].float()
    count = (weight.sum((1, 2)) * latents.shape[-1]).clamp_min(1)
    mean = (wide * weight).sum((1, 2)) / count
    return ((wide - mean[:, None, None]).square() * weight).sum((1, 2)).div(count).sqrt()
