"""Pictures to latents and back: encoder, compressor, decompressor and pixel decoder behind plain methods.

Shapes: P pictures, n latents of d channels, D encoder channels. Latents that leave this module are un-normalised.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unicom_dist.config.errors import CheckpointError, ConfigError, NonFiniteError
from unicom_dist.config.schema import EncoderConfig
from unicom_dist.data.buckets import Buckets, Shape
from unicom_dist.data.decode import flatten
from unicom_dist.data.samples import grid_positions
from unicom_dist.models.codec import Codec
from unicom_dist.models.encoders import EncodedImage, Encoder, build_encoder
from unicom_dist.models.encoders.blank import blank_features
from unicom_dist.models.flow import shift_factor
from unicom_dist.models.target import Target, build_target, check_vae, patch_count
from unicom_dist.sample.solver import Solver, Velocity, integrate, noise_from_seeds, time_grid

DOCS = "docs/sampling.md"
Input = Image.Image | EncodedImage


class Latents(NamedTuple):
    """One picture's latents [n, d] float32, un-normalised, and their grid (rows, columns), n = rows x columns."""

    values: Tensor
    grid: tuple[int, int]


class PictureCodec:
    """A trained codec, the frozen encoder it reads through, and the target space it draws in.

    `content` is the codec's config.json, {} for modules in memory; `batch` pictures are worked on at a time. The module
    is used as it is: put it in evaluation mode.
    """

    def __init__(
        self,
        codec: Codec,
        encoder: EncoderConfig,
        content: dict[str, Any] | None = None,
        batch: int = 32,
        target: Target | None = None,
    ) -> None:
        self.codec, self.encoder_config, self.batch = codec, encoder, batch
        self.content = content or {}
        self.buckets = Buckets(codec.config.decoder)
        self._encoder: Encoder | None = None
        self._target = target

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

    @property
    def target(self) -> Target:
        """The target space, its VAE loaded when first needed. CheckpointError: no VAE, or not the training's."""
        if self._target is None:
            config = self.codec.config.decoder
            if "vae_fingerprint" in self.content:
                check_vae(config, self.content["vae_fingerprint"])
            self._target = build_target(config, self.device)
        return self._target

    @cached_property
    def blank(self) -> Latents:
        """The latents of a black picture."""
        return self.encode([blank_features(self.encoder, self.encoder_config)])[0]

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
            values, mask, places = padded(tensors, [item.grid for item in chosen], self.device)
            out = self.codec.encode(values, mask, places).float().cpu()
            grids = [self.codec.config.compressor.latent_grid(item.grid) for item in chosen]
            latents += [Latents(z[: math.prod(grid)], grid) for z, grid in zip(out, grids, strict=True)]
        return latents

    @torch.no_grad()
    def decode(
        self,
        latents: Sequence[Latents],
        seeds: int | Sequence[int] = 0,
        steps: int = 8,
        solver: Solver = "euler",
        shapes: Sequence[Shape] | None = None,
        guidance: float = 1.0,
    ) -> list[Image.Image]:
        """Pictures of un-normalised latents, one in each of `shapes`; by default those that fit their grids.

        steps: of the solver; 1 draws the one-step estimate. guidance: v = v_blank + guidance (v - v_blank), v_blank
        that of a black picture's latents; 1 = off, otherwise the encoder is needed and the decoder is called twice.
        ConfigError: wrong number of seeds. CheckpointError: the VAE is another one.
        """
        seeds = seeds_for(seeds, len(latents))
        if shapes is None:
            shapes = [self.buckets.shape_of(columns, rows) for _, (rows, columns) in latents]
        of_shape: dict[Shape, list[int]] = {}
        for number, shape in enumerate(shapes):
            of_shape.setdefault(shape, []).append(number)
        pictures: dict[int, Image.Image] = {}
        for shape, numbers in of_shape.items():
            for start in range(0, len(numbers), self.batch):
                chosen = numbers[start : start + self.batch]
                flow = self._flow([latents[number] for number in chosen], guidance)
                noise = noise_from_seeds([seeds[number] for number in chosen], self.target.shape(*shape), "decoder")
                patches = patch_count(self.codec.config.decoder, *shape)
                times = time_grid(steps, shift_factor(self.codec.config, patches))
                drawn = self.target.decode(integrate(flow, noise.to(self.device), times, solver))
                pictures.update(zip(chosen, to_pictures(drawn), strict=True))
        return [pictures[number] for number in range(len(latents))]

    def reconstruct(
        self,
        images: Sequence[Input],
        seeds: int | Sequence[int] = 0,
        decoder_steps: int = 8,
        solver: Solver = "euler",
        shapes: Sequence[Shape] | None = None,
        guidance: float = 1.0,
    ) -> list[Image.Image]:
        """Pictures, or features of them, through encoder, compressor and decoder; other arguments as in `decode`.

        By default a picture decides its own shape, features by their grid.
        """
        if shapes is None:
            sizes = [item.grid[::-1] if isinstance(item, EncodedImage) else item.size for item in images]
            shapes = [self.buckets.shape_of(*size) for size in sizes]
        return self.decode(self.encode(images), seeds, decoder_steps, solver, shapes, guidance)

    def _flow(self, latents: Sequence[Latents], guidance: float) -> Velocity:
        """The velocity that draws these latents' pictures; what depends on the latents alone is computed once."""
        told = self._tokens(latents)
        blank = self._tokens([self.blank] * len(latents)) if guidance != 1 else None

        def velocity(z: Tensor, t: float) -> Tensor:
            times = z.new_full((len(z),), t)
            out: Tensor = self.codec.decoder(z, times, *told)
            if blank is None:
                return out
            without: Tensor = self.codec.decoder(z, times, *blank)
            return without + guidance * (out - without)

        return velocity

    def _tokens(self, latents: Sequence[Latents]) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the decoder reads of them: tokens [P, n, E], grid [P, n, 2] and mask [P, n]."""
        values, mask, grid = padded([z.values for z in latents], [z.grid for z in latents], self.device)
        return self.codec.decompressor(values.to(self.codec.dtype), mask), grid, mask


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
    """[P, 3, H, W] in [-1, 1], clamped, as RGB pictures. NonFiniteError: NaN, which as 8 bits would be some colour."""
    broken = int(pixels.isnan().flatten(1).any(1).sum())
    if broken:
        raise NonFiniteError(
            f"{broken} of {len(pixels)} pictures hold NaN",
            "the decoder has diverged, or its precision is too low for what it computes",
            "take an earlier checkpoint, or draw in float32",
            DOCS,
        )
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(item) for item in scaled.permute(0, 2, 3, 1).cpu().numpy()]
