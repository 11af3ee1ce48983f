"""Packed batches for the prior: text, text-to-image and image-to-text samples in the mixture of the stage.

Every rank plans the whole step (tasks, captions, lengths, packing) and reads latents and features of its own rows only,
so neither order nor packing depends on the number of ranks or micro-batches. A malformed sample is skipped, counted and
named, and the next of its task takes its place. The state holds the draws per task and the samples in unfinished rows;
it does not grow with what was consumed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.mixture import MixtureSchedule
from unicom_dist.data.npy import gather
from unicom_dist.data.order import Order, generator_of, key_of
from unicom_dist.data.packing import Packer
from unicom_dist.data.pairs import captions_of, document, feature_channels, grid_of, open_set, spread
from unicom_dist.data.prefetch import BadSamples, Share, State, StepLoader
from unicom_dist.data.samples import Content, Layout, Layouts, Task, collate
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.flow import sample_t
from unicom_dist.models.segments import PackedBatch

# Share of the text-to-image samples prompted with one of the further captions (keywords) instead of the caption.
FURTHER_CAPTIONS = 0.2
_ROWS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Planned:
    """A sample whose place is decided and whose arrays are not read yet."""

    task: Task
    ordinal: int  # draw number within the task
    number: int
    visit: int
    layout: Layout

    @property
    def length(self) -> int:
        """Positions."""
        return self.layout.length


class _Reader:
    """Plans and reads the samples of one set. `joint`: with the features of which the model makes the latents."""

    def __init__(
        self,
        config: Config,
        pairs: ShardSet,
        stage: str,
        vocabulary: Vocabulary,
        stats: LatentStats,
        limit: int,
        joint: bool,
    ) -> None:
        self.pairs, self.limit = pairs, limit
        self._config, self._stage, self._stats = config, stage, stats
        self._layouts = Layouts(vocabulary)
        self._part = config.encoder.kind
        self._latent_channels = stats.mean.shape[0]
        self._feature_channels = feature_channels(pairs, self._part)
        self._joint = joint

    def plan(self, task: Task, ordinal: int, number: int, visit: int, *, training: bool = True) -> Planned:
        """Decide on caption and layout. DataError: malformed, or longer than a row (text is cut instead)."""
        sample = self.pairs[number]
        captions = captions_of(sample)
        if task == "text":
            layout = self._layouts.text(document(captions), self.limit)
        elif task == "image_to_text":
            grid = grid_of(sample, self._part, "features.npy", self._feature_channels)
            layout = self._layouts.image_to_text(captions.main, grid)
        else:
            part, extension, channels = self._drawn()
            grid = grid_of(sample, part, extension, channels)
            prompt = captions.main
            if training:
                chance = key_of(self._config.seed, self._stage, sample.key, visit, "caption")
                drop, further, which = (chance & 0xFFFFF) / 2**20, (chance >> 20 & 0xFFFFF) / 2**20, chance >> 40
                if drop < self._config.prior.condition_dropout:
                    prompt = ""
                elif captions.further and further < FURTHER_CAPTIONS:
                    prompt = captions.further[which % len(captions.further)]
            layout = self._layouts.text_to_image(prompt, grid)
        if layout.length > self.limit:
            what = f"sample {sample.key!r} takes {layout.length} positions as {task}"
            raise DataError(what, f"a row has {self.limit}", "raise row_positions of the stage")
        return Planned(task, ordinal, number, visit, layout)

    def read(self, rows: Sequence[Planned], fixed_t: float | None = None) -> PackedBatch:
        """The arrays, noise and times of planned samples, end to end. DataError on values that are not finite."""
        contents = [Content(self.pairs.key(planned.number), planned.layout) for planned in rows]
        seen = [n for n, planned in enumerate(rows) if planned.task == "image_to_text"]
        for n, features in zip(seen, self._arrays(rows, seen, self._part, "features.npy"), strict=True):
            contents[n].image = features
        drawn = [n for n, planned in enumerate(rows) if planned.task == "text_to_image"]
        part, extension, _ = self._drawn()
        for n, array in zip(drawn, self._arrays(rows, drawn, part, extension), strict=True):
            content = contents[n]
            generator = generator_of(self._config.seed, self._stage, content.key, rows[n].visit)
            t = sample_t(self._config.prior, 1, generator)
            content.t = float(t[0]) if fixed_t is None else fixed_t
            content.noise = torch.empty(array.shape[0], self._latent_channels).normal_(generator=generator)
            if self._joint:
                content.target = array
            else:
                content.image = self._stats.normalise(array.float())
        return collate(contents, self._latent_channels, self._feature_channels)

    def _drawn(self) -> tuple[str, str, int]:
        """(part, extension, channels) of what is read of an image to be drawn."""
        if self._joint:
            return self._part, "features.npy", self._feature_channels
        return "latent", "latent.npy", self._latent_channels

    def _arrays(self, rows: Sequence[Planned], which: list[int], part: str, extension: str) -> Sequence[Tensor]:
        """The stored array of each of the samples `which`, [n, C]: views of one tensor that is filled in one copy."""
        if not which:
            return []
        (contents,) = self.pairs.columns([rows[n].number for n in which], extension, part=part)
        arrays = gather(contents, lambda n: self.pairs.key(rows[which[n]].number))
        split = torch.split(arrays, [len(rows[n].layout.image_index) for n in which])
        if not arrays.isfinite().all():
            key = next(
                self.pairs.key(rows[n].number) for n, a in zip(which, split, strict=True) if not a.isfinite().all()
            )
            raise DataError(
                f"sample {key!r}: the {part!r} part holds values that are not finite",
                "one of them would end the run with a loss that is not a number",
                "run `unicom data check`, then compute the damaged shard again",
                "docs/data.md",
            )
        return split


class PriorLoader(StepLoader[PackedBatch]):
    """Training batches of a prior stage for one data-parallel rank.

    `stats` are those of the latents in `run_dir/latents`; `expect_fingerprint`: {part: fingerprint} of the features
    ("siglip2", …) and latents ("latent"). DataError: missing or foreign parts, too many bad samples (`next_step`).
    """

    def __init__(
        self,
        config: Config,
        stage: StageConfig,
        vocabulary: Vocabulary,
        stats: LatentStats,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        expect_fingerprint: Mapping[str, str] | None = None,
        prefetch: int = 2,
    ) -> None:
        weights = {task: getattr(stage.mixture, task) for task in get_args(Task)}
        self._mixture = MixtureSchedule(weights)
        joint = stage.joint.enabled
        latents = "text_to_image" in self._mixture.shares and not joint
        pairs = open_set(config, "train", latents=latents, expect_fingerprint=expect_fingerprint)
        self._reader = _Reader(config, pairs, stage.name, vocabulary, stats, stage.row_positions, joint)
        self._orders = {task: Order(len(pairs), config.seed, stage.name, task) for task in self._mixture.shares}
        self._ordinals = dict.fromkeys(self._mixture.shares, 0)
        self._packer: Packer[Planned] = Packer(stage.row_positions)
        self._bad = BadSamples(len(pairs), config.data.max_bad_fraction)
        self._share = Share(stage.batch, dp_rank, dp_size, stage.micro_batches)
        self._step, self._row_count, self._filled = 0, 0, 0
        identity = {
            "stage": stage.name,
            "seed": config.seed,
            "samples": len(pairs),
            "mixture": self._mixture.shares,
            "row_positions": stage.row_positions,
        }
        super().__init__(identity, prefetch)

    def report(self) -> dict[str, float]:
        """Figures for the metrics: empty share of the rows since the start, malformed samples met."""
        positions = self._row_count * self._reader.limit
        empty = 1 - self._filled / positions if positions else 0.0
        return {"data/pad_fraction": empty, "data/bad_samples": float(len(self._bad.names))}

    def _next(self) -> list[PackedBatch]:
        rows = [self._next_row() for _ in range(self._share.total)]
        self._step += 1
        self._row_count += len(rows)
        self._filled += sum(planned.length for row in rows for planned in row)
        mine = rows[self._share.first : self._share.first + self._share.count]
        return [self._reader.read([planned for row in piece for planned in row]) for piece in self._share.cut(mine)]

    def _next_row(self) -> list[Planned]:
        while True:
            row = self._packer.add(self._next_sample(self._mixture.draw()))
            if row is not None:
                return row

    def _next_sample(self, task: str) -> Planned:
        while True:
            ordinal = self._ordinals[task]
            self._ordinals[task] += 1
            try:
                planned = self._plan(task, ordinal)
                self._bad.accept()
                return planned
            except DataError as error:
                self._bad.report(f"{self._reader.pairs.key(self._orders[task][ordinal][0])} ({task})", error)

    def _plan(self, task: str, ordinal: int) -> Planned:
        number, visit = self._orders[task][ordinal]
        return self._reader.plan(next(t for t in get_args(Task) if t == task), ordinal, number, visit)

    def _snapshot(self) -> State:
        return {
            "step": self._step,
            "counts": dict(self._mixture.counts),
            "ordinals": dict(self._ordinals),
            "open_rows": [[[planned.task, planned.ordinal] for planned in row] for row in self._packer.open],
        }

    def _restore(self, state: State) -> None:
        self._step = int(state["step"])
        self._mixture.counts = {task: int(n) for task, n in state["counts"].items()}
        self._ordinals = {task: int(n) for task, n in state["ordinals"].items()}
        self._packer.restore([[self._plan(task, int(n)) for task, n in row] for row in state["open_rows"]])


def heldout_prior_batches(
    config: Config,
    vocabulary: Vocabulary,
    stats: LatentStats,
    t: float,
    limit: int,
    tasks: Sequence[Task] = ("text_to_image", "image_to_text"),
    batch: int = 16,
    joint: bool = False,
) -> Iterator[PackedBatch]:
    """`limit` held-out pairs, evenly apart, as each of `tasks`, images at time `t`, noise keyed by the sample.

    `joint`: with features instead of latents.
    """
    pairs = open_set(config, "heldout", latents="text_to_image" in tasks and not joint)
    reader = _Reader(config, pairs, "heldout", vocabulary, stats, _ROWS_AT_ONCE, joint)
    numbers = spread(limit, len(pairs))
    for first in range(0, len(numbers), batch):
        chosen = numbers[first : first + batch]
        yield reader.read([reader.plan(task, n, n, 0, training=False) for n in chosen for task in tasks], fixed_t=t)
