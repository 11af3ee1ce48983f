"""Packed batches for the prior: samples of every kind in the mixture of the stage.

Every rank plans the whole step (tasks, texts, lengths, packing, who takes which row) and reads latents and features of
its own rows only, so neither order nor packing depends on the number of ranks or micro-batches. A malformed sample is
skipped, counted and named, and the next of its task takes its place. The state holds the draws per task and the samples
in unfinished rows; it does not grow with what was consumed.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, StageConfig, held_out_set
from unicom_dist.data.balance import amounts_of, deal
from unicom_dist.data.images import Images
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.mixture import MixtureSchedule
from unicom_dist.data.order import Order
from unicom_dist.data.packing import Packer
from unicom_dist.data.pairs import open_set, spread
from unicom_dist.data.planning import Planned, SampleReader
from unicom_dist.data.prefetch import BadSamples, Share, State, StepLoader
from unicom_dist.data.samples import TASKS, Task
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.attention import Plan
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.operations import transfusion_flops
from unicom_dist.models.segments import PackedBatch, Segment

PAIR_TASKS: tuple[Task, ...] = ("text", "text_to_image", "image_to_text")  # made of an image and its captions
_ROWS_AT_ONCE = 1 << 24


class PriorLoader(StepLoader[PackedBatch]):
    """Training batches of a prior stage for one data-parallel rank.

    `stats` are those of the latents in `run_dir/latents`; `expect_fingerprint`: {part: fingerprint} of the features
    ("siglip2", …) and latents ("latent"). `plan` prepares attention, in the loader's thread.
    DataError: missing or foreign parts, too many bad samples (`next_step`).
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
        plan: Callable[[list[Segment]], Plan] | None = None,
        prefetch: int = 2,
    ) -> None:
        self._plan_attention = plan
        self._stage = stage
        self._mixture = MixtureSchedule(stage.mixture_at(0))
        tasks = [task for task in TASKS if stage.draws(task)]
        joint = stage.joint.enabled
        untouched = ("text", "image_to_text") if config.prior.understanding == "raw" else ("text",)
        latents = not joint and any(task not in untouched for task in tasks)
        pairs = open_set(config, "train", latents=latents, expect_fingerprint=expect_fingerprint)
        self._sources: dict[Task, list[ShardSet]] = {task: [pairs] for task in tasks}
        further = {
            name: open_conversations(config, name, latents=latents, expect_fingerprint=expect_fingerprint)
            for name, task in config.data.conversations.items()
        }
        for task in tasks:
            if task not in PAIR_TASKS:
                self._sources[task] = [
                    further[name] for name, kind in config.data.conversations.items() if kind == task
                ]
        shown = [pairs, *(other for other in further.values() if other.parts)]
        images = Images(shown, config.encoder.kind)
        self._reader = SampleReader(config, images, stage.name, vocabulary, stats, stage.row_positions, joint)
        sizes = {task: sum(map(len, sources)) for task, sources in self._sources.items()}
        for task in tasks:
            if not sizes[task]:
                raise DataError(
                    f"the mixture of stage {stage.name} draws {task}, whose sets hold no sample",
                    "an order needs something to go through",
                    f"fill the sets of data.conversations, or give {task} the weight 0",
                    "docs/data.md",
                )
        self._orders = {task: Order(sizes[task], config.seed, stage.name, task) for task in tasks}
        self._ordinals: dict[Task, int] = dict.fromkeys(tasks, 0)
        self._packer: Packer[Planned] = Packer(stage.row_positions)
        self._bad = BadSamples(max(sizes.values()), config.data.max_bad_fraction)
        self._share = Share(stage.batch, dp_rank, dp_size, stage.micro_batches)
        self._flops = partial(
            transfusion_flops,
            config.prior,
            vocabulary=vocabulary.size,
            latent_channels=stats.mean.shape[0],
            feature_channels=config.prior.read_channels(images.feature_channels, stats.mean.shape[0]),
            backbone_frozen=stage.trainable != "all",
        )
        self._step, self._row_count, self._filled = 0, 0, 0
        self._costliest, self._mean_cost = 0.0, 0.0  # summed over the steps
        changes = sorted(stage.mixture_changes)
        identity = {
            "stage": stage.name,
            "seed": config.seed,
            "samples": sizes,
            "mixture": self._mixture.shares,
            "row_positions": stage.row_positions,
            **({"mixture_changes": [[n, stage.mixture_at(n)] for n in changes]} if changes else {}),
        }
        super().__init__(identity, prefetch)

    def report(self) -> dict[str, float]:
        """Figures for the metrics, since the start.

        Empty share of the rows, malformed samples met, FLOPs of a step's costliest rank over the mean of the ranks,
        and how often each task has gone through its samples.
        """
        positions = self._row_count * self._reader.limit
        return {
            "data/pad_fraction": 1 - self._filled / positions if positions else 0.0,
            "data/bad_samples": float(len(self._bad.names)),
            "data/rank_imbalance": self._costliest / self._mean_cost if positions else 1.0,
            **{f"data/epochs/{task}": drawn / self._orders[task].size for task, drawn in self._ordinals.items()},
        }

    def _next(self) -> list[PackedBatch]:
        if self._step in self._stage.mixture_changes:
            self._mixture = MixtureSchedule(self._stage.mixture_at(self._step))
        rows = [self._next_row() for _ in range(self._share.total)]
        self._step += 1
        self._row_count += len(rows)
        self._filled += sum(planned.length for row in rows for planned in row)
        costs = [sum(self._flops(amounts_of(planned.layout)) for planned in row) for row in rows]
        dealt = deal(costs, self._share.ranks, self._share.micro_batches)
        self._costliest += max(sum(costs[n] for piece in pieces for n in piece) for pieces in dealt)
        self._mean_cost += sum(costs) / self._share.ranks
        mine = dealt[self._share.rank]
        return [self._batch([planned for n in piece for planned in rows[n]]) for piece in mine]

    def _batch(self, samples: list[Planned]) -> PackedBatch:
        batch = self._reader.read(samples)
        if self._plan_attention is not None:
            batch.plan = self._plan_attention(batch.segments)
        return batch

    def _next_row(self) -> list[Planned]:
        while True:
            row = self._packer.add(self._next_sample(task_named(self._mixture.draw())))
            if row is not None:
                return row

    def _next_sample(self, task: Task) -> Planned:
        while True:
            ordinal = self._ordinals[task]
            self._ordinals[task] += 1
            try:
                planned = self._plan(task, ordinal)
                self._bad.accept()
                return planned
            except DataError as error:
                pairs, number = self._source(task, self._orders[task][ordinal][0])
                self._bad.report(f"{pairs.key(number)} ({task})", error)

    def _plan(self, task: Task, ordinal: int) -> Planned:
        place, visit = self._orders[task][ordinal]
        pairs, number = self._source(task, place)
        if task in PAIR_TASKS:
            return self._reader.plan_pair(task, ordinal, number, visit)
        return self._reader.plan_conversation(task, ordinal, pairs, number, visit)

    def _source(self, task: Task, place: int) -> tuple[ShardSet, int]:
        """The set that holds sample `place` of a task, and the number of the sample there."""
        for pairs in self._sources[task]:
            if place < len(pairs):
                return pairs, place
            place -= len(pairs)
        raise IndexError(place)

    def _snapshot(self) -> State:
        return {
            "step": self._step,
            "counts": dict(self._mixture.counts),
            "ordinals": dict(self._ordinals),
            "open_rows": [[[planned.task, planned.ordinal] for planned in row] for row in self._packer.open],
        }

    def _restore(self, state: State) -> None:
        self._step = int(state["step"])
        self._mixture = MixtureSchedule(self._stage.mixture_at(max(self._step - 1, 0)))  # as the last step was drawn
        self._mixture.counts = {task: int(n) for task, n in state["counts"].items()}
        self._ordinals = {task_named(task): int(n) for task, n in state["ordinals"].items()}
        self._packer.restore([[self._plan(task_named(task), int(n)) for task, n in row] for row in state["open_rows"]])


def task_named(name: str) -> Task:
    """The task called `name`."""
    return next(task for task in TASKS if task == name)


def open_conversations(
    config: Config, name: str, *, latents: bool, expect_fingerprint: Mapping[str, str] | None
) -> ShardSet:
    """A set of conversations, with the features (and latents) of its own images if it has any."""
    folder = Path(config.data.path) / name
    if not Manifest.file(folder, config.encoder.kind).exists():
        return ShardSet(folder)
    return open_set(config, name, latents=latents, expect_fingerprint=expect_fingerprint)


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
    wanted = "text_to_image" in tasks or config.prior.understanding != "raw"
    pairs = open_set(config, "heldout", latents=wanted and not joint)
    images = Images([pairs], config.encoder.kind)
    reader = SampleReader(config, images, "heldout", vocabulary, stats, _ROWS_AT_ONCE, joint)
    numbers = spread(limit, len(pairs))
    for first in range(0, len(numbers), batch):
        chosen = numbers[first : first + batch]
        yield reader.read(
            [reader.plan_pair(task, n, n, 0, training=False) for n in chosen for task in tasks], fixed_t=t
        )


def heldout_conversations(config: Config) -> dict[str, Task]:
    """The held-out sets of conversations that are there, and the task each is of."""
    named = {held_out_set(name): task_named(task) for name, task in config.data.conversations.items()}
    return {name: task for name, task in named.items() if Manifest.file(Path(config.data.path) / name).is_file()}


def heldout_conversation_batches(
    config: Config,
    name: str,
    vocabulary: Vocabulary,
    stats: LatentStats,
    t: float,
    limit: int,
    batch: int = 16,
    joint: bool = False,
) -> Iterator[PackedBatch]:
    """As `heldout_prior_batches`, of `limit` conversations of the held-out set `name`.

    Malformed ones are left out. The images they show are those of `heldout` and their own.
    """
    task = heldout_conversations(config)[name]
    further = open_conversations(config, name, latents=not joint, expect_fingerprint=None)
    shown = [open_set(config, "heldout", latents=not joint), *([further] if further.parts else [])]
    images = Images(shown, config.encoder.kind)
    reader = SampleReader(config, images, "heldout", vocabulary, stats, _ROWS_AT_ONCE, joint)
    numbers = spread(limit, len(further))
    for first in range(0, len(numbers), batch):
        planned = []
        for n in numbers[first : first + batch]:
            with contextlib.suppress(DataError):
                planned.append(reader.plan_conversation(task, n, further, n, 0, training=False))
        if planned:
            yield reader.read(planned, fixed_t=t)
