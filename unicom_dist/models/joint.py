"""The prior together with the compressor that makes its latents, for stages that train both.

The latents' raw features come with the batch; the compressor narrows them image by image, running statistics normalise
them, and the prior denoises them. The flow target is what the compressor made, held fixed: gradients reach the
compressor through the noised input and through a reconstruction of the features, never through the target, which would
shrink to whatever is easiest to predict.
Shapes: N latents of d channels, in images of n each, from features of D channels.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unicom_dist.config.schema import CompressorConfig, PriorConfig
from unicom_dist.models.attention import Take
from unicom_dist.models.backbone import WHOLE, Part
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.compressor import Compressor, Decompressor
from unicom_dist.models.encoders.base import fingerprint
from unicom_dist.models.init import fill, initial
from unicom_dist.models.latent_statistics import LatentStatistics
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion

OWN = ("compressor.", "reconstruct.")  # names of what joint training adds to a prior


def compressor_fingerprint(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> str:
    """Of the compressor among `tensors` as it is exported (bfloat16), by which a decoder is matched with its prior.

    content: what is known of the prior, the `encoder_fingerprint` of its features among it.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if name.startswith("compressor.")):
        digest.update(name.encode())
        digest.update(tensors[name].to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return fingerprint({"compressor_sha256": digest.hexdigest(), "encoder": content["encoder_fingerprint"]})


def held(latents: Tensor) -> Tensor:
    """The latents as a flow target: nothing flows back into them from there."""
    return latents.detach()


class Reconstruction(nn.Module):
    """Latents back to the encoder's features: the decompressor and a linear map to D channels."""

    def __init__(self, config: CompressorConfig, channels: int) -> None:
        super().__init__()
        self.decompressor = Decompressor(config, channels)
        self.out = nn.Linear(config.expanded or channels, channels)

    def forward(self, latents: Tensor, mask: Tensor | None) -> Tensor:
        """[B, n, d] -> [B, n, D]; mask [B, n], True = a real token."""
        features: Tensor = self.out(self.decompressor(latents, mask))
        return features


class JointPrior(Transfusion):
    """A prior, its compressor and the reconstruction that holds the latents, or a part of them.

    `latents`, `features`: mean and deviation of the compressor's latents and the encoder's channels, where it starts.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        config: PriorConfig,
        compressor: CompressorConfig,
        vocab_size: int,
        latents: LatentStats,
        features: LatentStats,
        momentum: float,
        seed: int = 0,
        part: Part = WHOLE,
    ) -> None:
        channels = features.mean.shape[0]
        super().__init__(config, vocab_size, latents.mean.shape[0], channels, seed, part)
        if not part.first:
            return
        self.compressor = Compressor(compressor, channels)
        self.reconstruct = Reconstruction(compressor, channels)
        for name in OWN:
            fill(self.get_submodule(name[:-1]), partial(initial, seed=seed), name)
        with torch.device("cpu"):
            self.statistics = LatentStatistics(latents, momentum)
            self.register_buffer("feature_mean", features.mean.float(), persistent=False)
            self.register_buffer("feature_std", features.std.float(), persistent=False)

    @torch.no_grad()
    def start_from(self, codec: Mapping[str, Tensor]) -> None:
        """Take compressor and decompressor from the tensors of a codec; elsewhere than in the first part, nothing."""
        if self.part.first:
            self.compressor.load_state_dict(_below("compressor.", codec))
            self.reconstruct.decompressor.load_state_dict(_below("decompressor.", codec))

    def compress(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Normalised latents [N, d] of `batch.target_features` and errors [N] of the features rebuilt from them.

        An error is the mean over D channels of the squared error, in units of each channel's variance. Both float32.
        """
        images = Images.of(batch, batch.target_features.device)
        features = images.pad(batch.target_features.to(self.dtype))
        raw = self.compressor(features, images.mask)
        rebuilt = images.rows(self.reconstruct(raw, images.mask))
        rows = images.rows(raw)
        if torch.is_grad_enabled():
            self.statistics.step.add(rows.detach())
        wanted = (batch.target_features.float() - self.feature_mean) / self.feature_std
        return self.statistics.normalise(rows), (rebuilt.float() - wanted).square().mean(1)

    def forward(self, batch: PackedBatch, x: Any = None, chunk: int = 0) -> Any:
        """As `Transfusion.forward`, with more beside it, as a tuple.

        After the hidden states, or losses and velocity, comes the flow target: latents [N, d] of the batch to be handed
        on with the hidden states as `x`, in the end those in this rank's region. Last come, where the model begins,
        `errors` [N] of the reconstruction.
        """
        errors: tuple[Tensor, ...] = ()
        if x is None:
            latents, error = self.compress(batch)
            errors = (self._shared(error),)
        else:
            x, latents = x
        batch = replace(batch, latents=latents)
        out = super().forward(batch, x, chunk)
        if self.backbone.model.ends(chunk):
            losses, velocity, *squares = out
            return (losses, velocity, held(self.share.region(batch).latents), *squares, *errors)
        return (out, held(latents), *errors)

    def _shared(self, errors: Tensor) -> Tensor:
        """This rank's part of the errors: all ranks of ulysses and tp compute all of them.

        The values add up over ulysses. Gradients add up over the ranks whose positions differ: under sequence
        parallelism those of tp, too.
        """
        layout = self.share.layout
        part = errors / layout.sequence_cut
        return part + (errors / layout.ulysses - part).detach() if layout.sequence_cut > 1 else errors


def image_lengths(batch: PackedBatch) -> list[int]:
    """Latents of each image to be denoised; a noise segment may also hold the image's time."""
    timed = int(len(batch.times) > 0)
    return [segment.length - timed for segment in batch.segments if segment.mode == "noise"]


class Images:
    """Where the tokens of images [N, C] lie in a padded batch [B, n, C]."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self._count, self._longest = len(lengths), max(lengths, default=1)
        self.mask: Tensor | None = None  # [B, n]; None when all images are equally long
        if any(length != self._longest for length in lengths):
            real = torch.arange(self._longest)[None] < torch.tensor(lengths)[:, None]
            self.mask = real.to(device)
            self._place = real.flatten().nonzero()[:, 0].to(device)

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> "Images":
        """The images to be denoised: one to a noise segment, in order."""
        return cls(image_lengths(batch), device)

    def pad(self, rows: Tensor) -> Tensor:
        """[N, C] -> [B, n, C]."""
        if self.mask is not None:
            rows = rows.new_zeros(self.mask.numel(), rows.shape[1]).index_copy_(0, self._place, rows)
        if not self._count:  # one token that nobody reads: every module runs, also without an image
            return rows.new_zeros(1, 1, rows.shape[1])
        return rows.view(self._count, self._longest, -1)

    def rows(self, padded: Tensor) -> Tensor:
        """[B, n, C] -> [N, C]."""
        flat = padded.flatten(0, 1)
        if self.mask is None:
            return flat[: self._count * self._longest]
        out: Tensor = Take.apply(flat, self._place)  # type: ignore[no-untyped-call]
        return out


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
