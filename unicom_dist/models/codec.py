"""The semantic codec: compressor, decompressor and pixel decoder, its batch, and the statistics of its latents.

Shapes: B images of H x W pixels, n tokens of D encoder channels (padded; `mask` marks real ones), d latent channels.
Time: t = 1 is data, z_t = t z1 + (1 - t) eps, v = z1 - eps.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from unicom_dist.config.schema import CodecConfig
from unicom_dist.models.compressor import Compressor, Decompressor
from unicom_dist.models.decoder import DiffusionDecoder
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
    latent_noise: Tensor  # [B, m, d] in the layout of the latents
    latent_noise_level: Tensor  # [B], std in units of the latents' standard deviation
    keys: list[str]
    blank: Tensor | None = None  # [B] bool, True = to be trained with the features of a black picture; None = none
    data: Tensor | None = None  # [B, c, h, w], the images in the target space; None where that is pixels
    views: Tensor | None = None  # [B, ...] uint8, what a trained encoder sees (`encoder_view`); None for a frozen one

    @property
    def target(self) -> Tensor:
        """What the flow leads to, [B, c, h, w]."""
        return self.images if self.data is None else self.data

    def to(self, device: torch.device | str) -> "CodecBatch":
        """A copy whose tensors are on `device`; dtypes are kept (the model casts at its border)."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if torch.is_tensor(value)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
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

    def shared(self) -> "LatentStats":
        """The same means, and for all channels one deviation: the root of their mean variance."""
        return LatentStats(self.mean, self.std.square().mean().sqrt().expand_as(self.std).clone())

    def to_json(self) -> dict[str, list[float]]:
        """Plain lists, for `config.json` and `latents/stats.json`."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, list[float]]) -> "LatentStats":
        """The inverse of `to_json`. ValueError: not a mean and a positive deviation for each of some channels."""
        try:
            mean, std = (torch.tensor(values[name], dtype=torch.float32) for name in ("mean", "std"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"mean and std of each channel are not there ({error})") from None
        if mean.dim() != 1 or mean.shape != std.shape or not (mean.isfinite() & std.isfinite() & (std > 0)).all():
            raise ValueError("there is not a finite mean and a positive std for each channel")
        return cls(mean, std)

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

    Latents are un-normalised here; `LatentStats` belongs to the prior. `seed` alone decides the initial weights, but
    those of the decoder with `outline`: it is on the meta device, for `decoder_source` to give it published ones.
    """

    def __init__(self, config: CodecConfig, encoder_channels: int, seed: int = 0, outline: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder_channels = encoder_channels
        self.compressor = Compressor(config.compressor, encoder_channels)
        self.decompressor = Decompressor(config.compressor, encoder_channels)
        with torch.device("meta") if outline else nullcontext():
            self.decoder = DiffusionDecoder(config.decoder, config.compressor.expanded or encoder_channels)
        initialise(self, seed)
        self.decoder.reset()
        self.encoder: nn.Module | None = None  # given where it learns with the codec, which never needs it later

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which everything between the borders is computed."""
        return next(self.decoder.parameters()).dtype

    def features(self, batch: CodecBatch) -> Tensor:
        """What the compressor reads of a batch [B, n, D]: the stored features, or a trained encoder's tokens."""
        if self.encoder is None or batch.views is None:
            return batch.features.to(self.dtype)
        tokens: Tensor = self.encoder(batch.views, batch.mask, batch.grid)
        return tokens.to(self.dtype)

    def encode(self, features: Tensor, mask: Tensor | None = None, grid: Tensor | None = None) -> Tensor:
        """Latents [B, m, d] (weights' dtype, padding zero) of features [B, n, D]; mask [B, n], True = a real token.

        A spatial compressor needs grid [B, n, 2]; `compressor.layout` has the latents' own grid and mask.
        """
        latents: Tensor = self.compressor(features.to(self.dtype), mask, grid)
        return latents

    def decode_velocity(
        self, z_t: Tensor, t: Tensor, latents: Tensor, grid: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Velocity [B, c, h, w] float32 at z_t [B, c, h, w] and t [B], given latents [B, m, d] at grid [B, m, 2]."""
        tokens = self.decompressor(latents.to(self.dtype), mask)
        velocity: Tensor = self.decoder(z_t, t, tokens, grid, mask)
        return velocity

    def forward(self, batch: CodecBatch) -> tuple[Tensor, ...]:
        """Velocity and clean estimate, both [B, c, h, w] float32, in the decoder's target space.

        After them, for a compressor with a posterior, its `divergence` [B]; last, for a trained encoder, the `drift`
        [B] of its tokens from the stored features.
        """
        grid, mask = self.compressor.layout(batch.grid, batch.mask)
        assert mask is not None
        features = self.features(batch)
        mean, log_variance = self.compressor.posterior(features, batch.mask, batch.grid)
        latents = disturbed(mean, log_variance, mask, batch)
        z_t = interpolate(batch.target.float(), batch.noise.float(), batch.t.float())
        velocity = self.decode_velocity(z_t, batch.t, latents, grid, mask)
        clean = clean_from_velocity(z_t, velocity, batch.t)
        further = [] if log_variance is None else [divergence(mean, log_variance, mask)]
        if self.encoder is not None:
            further.append(drift(features, batch.features, batch.mask))
        return velocity, clean, *further


def disturbed(mean: Tensor, log_variance: Tensor | None, mask: Tensor, batch: CodecBatch) -> Tensor:
    """Latents [B, m, d] for the decoder to read: a sample of the posterior, with noise added.

    The noise has `latent_noise_level` standard deviations of the image's own latents, so that the decoder later
    forgives a prior's errors (RAE, noise-augmented decoding). The sum of both Gaussians is drawn at once, by
    `latent_noise`; where that is zero, the mean is read.
    """
    level = batch.latent_noise_level * spread_of(mean.detach(), mask)
    if log_variance is None:
        return mean + level.to(mean.dtype)[:, None, None] * batch.latent_noise.to(mean.dtype)
    deviation = (log_variance.float().exp() + level.square()[:, None, None]).sqrt()
    return (mean + deviation * batch.latent_noise * mask[..., None]).to(mean.dtype)


def divergence(mean: Tensor, log_variance: Tensor, mask: Tensor) -> Tensor:
    """Of N(mean, variance) from N(0, 1), nats per latent channel, averaged over the image's real latents, [B] float32.

    (mean^2 + variance - log variance - 1) / 2. Ref: Kingma and Welling 2013, appendix B.
    """
    mean, log_variance = mean.float(), log_variance.float()
    each = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).mean(-1)
    return (each * mask).sum(1) / mask.sum(1).clamp_min(1)


def drift(tokens: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference [B] float32 of tokens from stored features, both [B, n, D], over real tokens."""
    error = (tokens.float() - features.float()).square().mean(-1)
    return (error * mask).sum(1) / mask.sum(1).clamp_min(1)


def spread_of(latents: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation [B] over the real tokens and all channels of each image, whatever else the batch holds."""
    wide, weight = latents.float(), mask[..., None].float()
    count = (weight.sum((1, 2)) * latents.shape[-1]).clamp_min(1)
    mean = (wide * weight).sum((1, 2)) / count
    return ((wide - mean[:, None, None]).square() * weight).sum((1, 2)).div(count).sqrt()
