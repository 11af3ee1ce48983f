"""Pictures to latents and back: encoder, compressor, decompressor and pixel decoder behind plain methods.

Shapes: P pictures, n latents of d channels, D encoder channels. Latents that leave this module are un-normalised.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import EncoderConfig
from unicom_dist.data.decode import flatten
from unicom_dist.data.samples import grid_positions
from unicom_dist.models.codec import Codec
from unicom_dist.models.encoders import EncodedImage, Encoder, build_encoder
from unicom_dist.sample.solver import Solver, integrate, noise_from_seeds, time_grid

DOCS = "docs/sampling.md"
Input = Image.Image | EncodedImage


class Latents(NamedTuple):
    """One picture's latents [n, d] float32, un-normalised, and their grid (rows, columns), n = rows x columns."""

    values: Tensor
    grid: tuple[int, int]


class PictureCodec:
    """A trained codec and the frozen encoder it reads through.

    `content` is the codec's config.json, {} for modules in memory; `batch` pictures are worked on at a time. The module
    is used as it is: put it in evaluation mode.
    """

    def __init__(
        self, codec: Codec, encoder: EncoderConfig, content: dict[str, Any] | None = None, batch: int = 32
    ) -> None:
        self.codec, self.encoder_config, self.batch = codec, encoder, batch
        self.content = content or {}
        self._encoder: Encoder | None = None

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.codec.parameters()).device

    @property
    def encoder(self) -> Encoder:
        """The frozen encoder, loaded when first needed. ConfigError: no weights; CheckpointError: another encoder."""
        if self._encoder is None:
            encoder = build_encoder(self.encoder_config, self.device)
            expected = self.content.get("encoder_fingerprint", encoder.fingerprint)
            if encoder.fingerprint != expected:
                raise CheckpointError(
                    f"the encoder in {self.encoder_config.path!r} is not the one the model was trained with",
                    f"its fingerprint is {encoder.fingerprint}, the model's is {expected} ({encoder.describe()})",
                    "put the encoder's weights of the training there, or fetch them with `unicom data fetch`",
                    DOCS,
                )
            self._encoder = encoder
        return self._encoder

    def features(self, images: Sequence[Input]) -> list[EncodedImage]:
        """Encoder features; what is encoded already passes through. ConfigError: features of another width."""
        encoded: dict[int, EncodedImage] = {}
        pictures: list[tuple[int, Image.Image]] = []
        for number, item in enumerate(images):
            if isinstance(item, EncodedImage):
                encoded[number] = item
            else:
                pictures.append((number, flatten(item)))
        size = self.encoder_config.batch
        for start in range(0, len(pictures), size):
            chosen = pictures[start : start + size]
            results = self.encoder.encode([self.encoder.preprocess(image) for _, image in chosen])
            encoded.update({number: found for (number, _), found in zip(chosen, results, strict=True)})
        ordered = [encoded[number] for number in range(len(images))]
        foreign = {item.features.shape[1] for item in ordered} - {self.codec.encoder_channels}
        if foreign:
            raise ConfigError(
                f"features of {foreign.pop()} channels",
                f"this model reads {self.codec.encoder_channels} channels ({self.encoder_config.kind})",
                "pass pictures, or features of this model's encoder",
                DOCS,
            )
        return ordered

    @torch.no_grad()
    def encode(self, images: Sequence[Input]) -> list[Latents]:
        """Un-normalised latents of pictures, or of features that were computed before."""
        encoded = self.features(images)
        latents: list[Latents] = []
        for start in range(0, len(encoded), self.batch):
            chosen = encoded[start : start + self.batch]
            tensors = [features_tensor(item) for item in chosen]
            values, mask, _ = padded(tensors, [item.grid for item in chosen], self.device)
            out = self.codec.encode(values, mask).float().cpu()
            latents += [Latents(z[: len(x)], item.grid) for z, x, item in zip(out, tensors, chosen, strict=True)]
        return latents

    @torch.no_grad()
    def decode(
        self,
        latents: Sequence[Latents],
        seeds: int | Sequence[int] = 0,
        steps: int = 8,
        solver: Solver = "euler",
    ) -> list[Image.Image]:
        """Pictures of un-normalised latents, each of `codec.decoder.image_px` a side."""
        seeds = seeds_for(seeds, len(latents))
        times = time_grid(steps, self.codec.config.timestep_shift)
        pictures: list[Image.Image] = []
        for start in range(0, len(latents), self.batch):
            chosen = slice(start, start + self.batch)
            pictures += self._decode(latents[chosen], seeds[chosen], times, solver)
        return pictures

    def reconstruct(
        self,
        images: Sequence[Input],
        seeds: int | Sequence[int] = 0,
        decoder_steps: int = 8,
        solver: Solver = "euler",
    ) -> list[Image.Image]:
        """Pictures, or features of them, through encoder, compressor and decoder."""
        return self.decode(self.encode(images), seeds, decoder_steps, solver)

    def _decode(
        self, latents: Sequence[Latents], seeds: Sequence[int], times: Sequence[float], solver: Solver
    ) -> list[Image.Image]:
        values, mask, grid = padded([z.values for z in latents], [z.grid for z in latents], self.device)
        tokens = self.codec.decompressor(values.to(self.codec.dtype), mask)  # the same at every time

        def velocity(z: Tensor, t: float) -> Tensor:
            out: Tensor = self.codec.decoder(z, z.new_full((len(z),), t), tokens, grid, mask)
            return out

        side = self.codec.config.decoder.image_px
        noise = noise_from_seeds(seeds, (3, side, side), "decoder").to(self.device)
        return to_pictures(integrate(velocity, noise, times, solver))


def seeds_for(seeds: int | Sequence[int], count: int) -> list[int]:
    """One seed per picture: the same for all if there is a single one. ConfigError if the numbers differ."""
    chosen = [seeds] * count if isinstance(seeds, int) else list(seeds)
    if len(chosen) != count:
        what = f"{len(chosen)} seeds for {count} pictures"
        raise ConfigError(what, "every picture has its own", "give one, or one per picture", DOCS)
    return chosen


def features_tensor(item: EncodedImage) -> Tensor:
    """[n, D] float32."""
    return torch.from_numpy(np.array(item.features, np.float32))


def padded(
    tensors: Sequence[Tensor], grids: Sequence[tuple[int, int]], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """[n_i, C] tensors as [P, n, C] float32, mask [P, n] (None if all are of one length), places [P, n, 2]."""
    values = torch.nn.utils.rnn.pad_sequence([tensor.float() for tensor in tensors], batch_first=True)
    places = torch.nn.utils.rnn.pad_sequence([grid_positions(*grid) for grid in grids], batch_first=True)
    lengths = torch.tensor([len(tensor) for tensor in tensors])
    mask = torch.arange(values.shape[1]) < lengths[:, None]
    return values.to(device), None if bool(mask.all()) else mask.to(device), places.to(device)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """[P, 3, H, W] in [-1, 1], clamped, as RGB pictures."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(item) for item in scaled.permute(0, 2, 3, 1).cpu().numpy()]
