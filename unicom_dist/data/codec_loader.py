"""Batches for the codec: images, their encoder features, and the randomness of the step.

The global order is a function of (seed, stage, number of samples) alone: step k takes positions [k B, (k+1) B) of it, a
rank takes its contiguous share, micro-batches are contiguous pieces of that. A malformed sample is replaced by the next
readable one by number, which every rank can tell without asking the others.
Shapes: B images of px x px, n tokens of D channels (padded), d latent channels.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.decode import TargetCache
from unicom_dist.data.npy import read_npy, to_tensor
from unicom_dist.data.order import Order, generator_of
from unicom_dist.data.pairs import feature_channels, grid_of, image_of, open_set, spread
from unicom_dist.data.prefetch import BadSamples, Share, State, StepLoader
from unicom_dist.data.samples import grid_positions
from unicom_dist.data.shardset import ShardSet
from unicom_dist.models.codec import CodecBatch
from unicom_dist.models.flow import sample_t

Draw = tuple[int, int]  # sample number, visit


class _Reader:
    """Reads samples of several sets, numbered through, and collates them."""

    def __init__(self, config: Config, sets: Sequence[ShardSet], stage: str, channels: int) -> None:
        self._config, self._sets, self._stage = config, sets, stage
        self._starts = np.cumsum([0, *(len(pairs) for pairs in sets)]).tolist()
        self._part, self._feature_channels = config.encoder.kind, channels
        compressor = config.codec.compressor
        self._latent_channels = channels if compressor.kind == "identity" else compressor.channels
        self._cache = TargetCache(config.codec.decoder.image_px)
        self.bad = BadSamples(len(self), config.data.max_bad_fraction)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, draws: Sequence[Draw], fixed_t: float | None = None) -> CodecBatch:
        """The samples of `draws` with their noise; `fixed_t` replaces the drawn time and turns latent noise off."""
        px, d = self._cache.px, self._latent_channels
        samples = [(*self._readable(number), visit) for number, visit in draws]
        size, longest = len(samples), max(len(features) for _, _, features, _, _ in samples)
        images = np.empty((size, 3, px, px), np.float32)
        features = torch.zeros(size, longest, self._feature_channels, dtype=samples[0][2].dtype)
        mask = torch.zeros(size, longest, dtype=torch.bool)
        grid = torch.zeros(size, longest, 2, dtype=torch.long)
        noise, latent_noise = torch.empty(size, 3, px, px), torch.zeros(size, longest, d)
        t, level = torch.empty(size), torch.zeros(size)
        tau = self._config.codec.latent_noise_tau if fixed_t is None else 0.0
        for row, (key, target, tokens, shape, visit) in enumerate(samples):
            n = len(tokens)
            images[row] = target
            features[row, :n], mask[row, :n], grid[row, :n] = tokens, True, grid_positions(*shape)
            generator = generator_of(self._config.seed, self._stage, key, visit)
            drawn = sample_t(self._config.codec, 1, generator)
            t[row] = drawn[0] if fixed_t is None else fixed_t
            noise[row].normal_(generator=generator)
            if tau:
                level[row] = tau * torch.rand(1, generator=generator)[0]
                latent_noise[row, :n].normal_(generator=generator)
        images *= 1 / 127.5
        images -= 1
        keys = [sample[0] for sample in samples]
        return CodecBatch(torch.from_numpy(images), features, mask, grid, noise, t, latent_noise, level, keys)

    def _readable(
        self, number: int
    ) -> tuple[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]], torch.Tensor, tuple[int, int]]:
        """(key, target, features, grid) of sample `number`, or of the next one that can be read."""
        while True:
            pairs, row = self._set_of(number)
            key = pairs.key(row)
            try:
                sample = pairs[row]
                grid = grid_of(sample, self._part, "features.npy", self._feature_channels)
                target = self._cache.get(number, image_of(sample), f"{pairs.folder.name}/{key}")
                tokens = to_tensor(read_npy(sample.parts[self._part]["features.npy"], key))
                self.bad.accept()
                return key, target, tokens, grid
            except DataError as error:
                self.bad.report(f"{pairs.folder.name}/{key}", error)
                number = (number + 1) % len(self)

    def _set_of(self, number: int) -> tuple[ShardSet, int]:
        which = bisect.bisect_right(self._starts, number) - 1
        return self._sets[which], number - self._starts[which]


class CodecLoader(StepLoader[CodecBatch]):
    """Training batches of a codec stage for one data-parallel rank.

    `expect_fingerprint`: {part: fingerprint} the features must carry. DataError: missing or foreign parts, too many
    malformed samples (from `next_step`).
    """

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        expect_fingerprint: Mapping[str, str] | None = None,
        prefetch: int = 2,
    ) -> None:
        names = ["train", "augmented"] if config.data.augmented_views else ["train"]
        sets = [open_set(config, name, expect_fingerprint=expect_fingerprint) for name in names]
        self._reader = _Reader(config, sets, stage.name, feature_channels(sets[0], config.encoder.kind))
        self._order = Order(len(self._reader), config.seed, stage.name)
        self._share = Share(stage.batch, dp_rank, dp_size, stage.micro_batches)
        self._step = 0
        identity = {"stage": stage.name, "seed": config.seed, "samples": len(self._reader), "batch": stage.batch}
        super().__init__(identity, prefetch)

    def report(self) -> dict[str, float]:
        """Figures for the metrics: malformed samples met so far."""
        return {"data/bad_samples": float(len(self._reader.bad.names))}

    def _next(self) -> list[CodecBatch]:
        first = self._step * self._share.total + self._share.first
        draws = [self._order[ordinal] for ordinal in range(first, first + self._share.count)]
        self._step += 1
        return [self._reader.batch(piece) for piece in self._share.cut(draws)]

    def _snapshot(self) -> State:
        return {"step": self._step}

    def _restore(self, state: State) -> None:
        self._step = int(state["step"])


def heldout_codec_batches(config: Config, t: float, limit: int, batch: int = 32) -> Iterator[CodecBatch]:
    """`limit` held-out samples, evenly apart, in batches at time `t`, with noise that depends on their keys only."""
    pairs = open_set(config, "heldout")
    reader = _Reader(config, [pairs], "heldout", feature_channels(pairs, config.encoder.kind))
    numbers = spread(limit, len(pairs))
    for first in range(0, len(numbers), batch):
        yield reader.batch([(number, 0) for number in numbers[first : first + batch]], fixed_t=t)
