"""Batches for the codec: images, their encoder features, and the randomness of the step.

The global order is a function of (seed, stage, number of samples) alone: step k takes positions [k B, (k+1) B) of it, a
rank takes its contiguous share, micro-batches are contiguous pieces of that. With aspect buckets the order is
rearranged into groups of one shape (`BucketOrder`), and pieces are cut where groups end, on all ranks alike.
A malformed sample is replaced by the next readable one by number, of the same shape if there is any, which every rank
can tell without asking the others.
Shapes: B images of H x W, n tokens of D channels (padded), m latents of d channels (padded).
"""

import bisect
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.buckets import BucketOrder, Buckets, Draw, Shape, group_size
from unicom_dist.data.decode import Pixels, TargetCache, decode_image
from unicom_dist.data.npy import read_npy, to_tensor
from unicom_dist.data.order import Order, generator_of
from unicom_dist.data.pairs import feature_channels, grid_of, image_of, open_set, spread
from unicom_dist.data.prefetch import BadSamples, Share, State, StepLoader
from unicom_dist.data.samples import grid_positions
from unicom_dist.data.shardset import Sample, ShardSet
from unicom_dist.data.sizes import set_sizes
from unicom_dist.models.codec import CodecBatch
from unicom_dist.models.encoders import encoder_view
from unicom_dist.models.flow import sample_t
from unicom_dist.models.target import target_shape


class _Reader:
    """Reads samples of several sets, numbered through, and collates them."""

    def __init__(self, config: Config, sets: Sequence[ShardSet], stage: str, channels: int) -> None:
        self._config, self._sets, self._stage = config, sets, stage
        self._starts = np.cumsum([0, *(len(pairs) for pairs in sets)]).tolist()
        self._part, self._feature_channels = config.encoder.kind, channels
        compressor = config.codec.compressor
        self._latent_channels = channels if compressor.kind == "identity" else compressor.channels
        self.shapes = Buckets(config.codec.decoder)
        self.buckets = np.zeros(len(self), np.int8)  # number of the shape of each sample
        if self.shapes.aspect:
            self.buckets = self.shapes.of_all(np.concatenate([set_sizes(pairs) for pairs in sets]))
        self._cache, self._seen = TargetCache(), TargetCache()
        self._view = encoder_view(config.encoder) if config.codec.encoder_trainable else None
        self.bad = BadSamples(len(self), config.data.max_bad_fraction)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, draws: Sequence[Draw], fixed_t: float | None = None) -> CodecBatch:
        """The samples of `draws`, of one bucket, with their noise.

        `fixed_t` replaces the drawn time and turns latent noise off.
        """
        height, width = self.shapes.shapes[self.buckets[draws[0][0]]]
        codec, d = self._config.codec, self._latent_channels
        samples = [(*self._readable(number), visit) for number, visit in draws]
        seen = [torch.from_numpy(view) for *_, view, _ in samples if view is not None]
        views = pad_sequence(seen, batch_first=True) if seen else None
        size, longest = len(samples), max(len(features) for _, _, features, *_ in samples)
        images = np.empty((size, 3, height, width), np.float32)
        features = torch.zeros(size, longest, self._feature_channels, dtype=samples[0][2].dtype)
        mask = torch.zeros(size, longest, dtype=torch.bool)
        grid = torch.zeros(size, longest, 2, dtype=torch.long)
        latents = [math.prod(codec.compressor.latent_grid(shape)) for _, _, _, shape, *_ in samples]
        space = target_shape(codec.decoder, height, width)
        patches = space[1] * space[2] // codec.decoder.patch_px**2
        noise, latent_noise = torch.empty(size, *space), torch.zeros(size, max(latents), d)
        t, level = torch.empty(size), torch.zeros(size)
        training = fixed_t is None
        tau = codec.latent_noise_tau if training else 0.0
        sampled = training and codec.compressor.bottleneck == "kl"
        blank = torch.zeros(size, dtype=torch.bool) if training and codec.condition_dropout else None
        for row, (key, target, tokens, shape, _, visit) in enumerate(samples):
            n = len(tokens)
            images[row] = target
            features[row, :n], mask[row, :n], grid[row, :n] = tokens, True, grid_positions(*shape)
            generator = generator_of(self._config.seed, self._stage, key, visit)
            drawn = sample_t(codec, 1, generator, patches)
            t[row] = drawn[0] if fixed_t is None else fixed_t
            noise[row].normal_(generator=generator)
            if tau:
                level[row] = tau * torch.rand(1, generator=generator)[0]
            if tau or sampled:
                latent_noise[row, : latents[row]].normal_(generator=generator)
            if blank is not None:
                blank[row] = torch.rand(1, generator=generator)[0] < codec.condition_dropout
        images *= 1 / 127.5
        images -= 1
        keys = [sample[0] for sample in samples]
        pixels = torch.from_numpy(images)
        return CodecBatch(pixels, features, mask, grid, noise, t, latent_noise, level, keys, blank, views=views)

    def _readable(self, wanted: int) -> tuple[str, Pixels, torch.Tensor, tuple[int, int], Pixels | None]:
        """(key, target, features, grid, encoder's view) of sample `wanted`, or of the next one that can be read."""
        shape = self.shapes.shapes[self.buckets[wanted]]
        for number in self._candidates(wanted):
            pairs, row = self._set_of(number)
            key = pairs.key(row)
            name = f"{pairs.folder.name}/{key}"
            try:
                sample = pairs[row]
                grid = grid_of(sample, self._part, "features.npy", self._feature_channels)
                tokens = to_tensor(read_npy(sample.parts[self._part]["features.npy"], key))
                if not math.isfinite(tokens.sum(dtype=torch.float64)):
                    raise DataError(f"sample {key!r}: the features hold values that are not finite")
                make = functools.partial(self._target, sample, name, shape)
                own = self.buckets[number] == self.buckets[wanted]
                target = self._cache.get(number, make) if own else make()
                view = self._view and self._seen.get(number, functools.partial(self._viewed, sample, name))
                self.bad.accept()
                return key, target, tokens, grid, view
            except DataError as error:
                self.bad.report(name, error)
        raise AssertionError("BadSamples ends the run before every sample was tried twice")

    def _target(self, sample: Sample, name: str, shape: Shape) -> Pixels:
        return self.shapes.target(decode_image(image_of(sample), name), shape)

    def _viewed(self, sample: Sample, name: str) -> Pixels:
        assert self._view is not None
        return np.ascontiguousarray(self._view(decode_image(image_of(sample), name)))

    def _candidates(self, wanted: int) -> Iterator[int]:
        """`wanted`, those after it in the same bucket, then all others; none is left out and no number ends it."""
        yield wanted
        after = np.roll(np.arange(len(self)), -wanted)
        same = self.buckets[after] == self.buckets[wanted]
        yield from itertools.cycle([*after[same][1:].tolist(), *after[~same].tolist(), wanted])

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
        names = [*config.data.pairs, *(["augmented"] if config.data.augmented_views else [])]
        sets = [open_set(config, name, expect_fingerprint=expect_fingerprint) for name in names]
        self._reader = _Reader(config, sets, stage.name, feature_channels(sets[0], config.encoder.kind))
        self._order = Order(len(self._reader), config.seed, stage.name)
        self._share = Share(stage.batch, dp_rank, dp_size, stage.micro_batches)
        self._step = 0
        identity: dict[str, object] = {
            "stage": stage.name,
            "seed": config.seed,
            "samples": len(self._reader),
            "batch": stage.batch,
        }
        self._groups: BucketOrder | None = None
        if self._reader.shapes.aspect:
            self._groups = BucketOrder(self._order, self._reader.buckets, group_size(stage.batch))
            identity["buckets"] = digest_of(self._reader)
        super().__init__(identity, prefetch)

    def report(self) -> dict[str, float]:
        """Figures for the metrics: malformed samples met so far."""
        return {"data/bad_samples": float(len(self._reader.bad.names))}

    def _next(self) -> list[CodecBatch]:
        pieces = self._share.cut(self._draws())
        if self._groups is not None:
            size = math.gcd(len(pieces[0]), self._groups.group)
            pieces = [piece[at : at + size] for piece in pieces for at in range(0, len(piece), size)]
        self._step += 1
        return [self._reader.batch(piece) for piece in pieces]

    def _draws(self) -> list[Draw]:
        """This rank's share of the next step."""
        first, count = self._share.first, self._share.count
        if self._groups is not None:
            return self._groups.take(self._share.total)[first : first + count]
        first += self._step * self._share.total
        return [self._order[ordinal] for ordinal in range(first, first + count)]

    def _snapshot(self) -> State:
        return {"step": self._step, **({} if self._groups is None else self._groups.snapshot())}

    def _restore(self, state: State) -> None:
        self._step = int(state["step"])
        if self._groups is not None:
            self._groups.restore(int(state["taken"]), state["waiting"])


def digest_of(reader: _Reader) -> str:
    """What the groups depend on besides the order: the bucket of every sample."""
    return hashlib.sha256(reader.buckets.tobytes()).hexdigest()[:16]


def heldout_codec_batches(config: Config, t: float, limit: int, batch: int = 32) -> Iterator[CodecBatch]:
    """As `fixed_codec_batches`, of held-out samples."""
    return fixed_codec_batches(config, "heldout", t, limit, batch)


def fixed_codec_batches(config: Config, name: str, t: float, limit: int, batch: int = 32) -> Iterator[CodecBatch]:
    """`limit` samples of a set, evenly apart, in batches at time `t`, with noise that depends on their keys only.

    With aspect buckets they come bucket by bucket.
    """
    pairs = open_set(config, name)
    reader = _Reader(config, [pairs], name, feature_channels(pairs, config.encoder.kind))
    numbers = sorted(spread(limit, len(pairs)), key=lambda number: (reader.buckets[number], number))
    for _, group in itertools.groupby(numbers, key=lambda number: reader.buckets[number]):
        same = [(number, 0) for number in group]
        for first in range(0, len(same), batch):
            yield reader.batch(same[first : first + batch], fixed_t=t)
