"""The semantic codec's batch and the statistics of its latents.

Shapes: B images of H x W pixels, n tokens of D encoder channels (padded; `mask` marks real ones), d latent channels.
Time: t = 1 is data, z_t = t z1 + (1 - t) eps, v = z1 - eps.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(slots=True)
class CodecBatch:
    """Images and their encoder features, with the randomness of the step drawn beforehand."""

    images: Tensor  # [B, 3, H, W] in [-1, 1]
    features: Tensor  # [B, n, D]
    mask: Tensor  # [B, n] bool, True = a real token
    grid: Tensor  # [B, n, 2] int64, (row, column)
    noise: Tensor  # [B, 3, H, W]
    t: Tensor  # [B]
    latent_noise: Tensor  # [B, n, d]
    latent_noise_level: Tensor  # [B], std in units of the latents' standard deviation
    keys: list[str]

    def to(self, device: torch.device | str) -> "CodecBatch":
        """A copy whose tensors are on `device`; dtypes are kept (the model casts at its border)."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.type is Tensor}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


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
