"""Packed batches for the prior: samples of every kind in the mixture of the stage.

Every rank plans the whole step (streams, texts, lengths, packing, who takes which row) and reads latents and features
of its own rows only, so neither order nor packing depends on the number of ranks or micro-batches. A malformed sample
is skipped, counted and named, and the next of its stream takes its place. The state holds the draws per stream and the
samples in unfinished rows; it does not grow with what was consumed.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import TRAIN, Config, SetKind, StageConfig, held_out_set
from unicom_dist.data.balance import amounts_of, deal
from unicom_dist.data.images import Images
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.mixture import MixtureSchedule
from unicom_dist.data.order import Order
from unicom_dist.data.packing import Packer
from unicom_dist.data.pairs import open_set, spread
from unicom_dist.data.planning import Planned, SampleReader, Source
from unicom_dist.data.prefetch import BadSamples, Share, State, StepLoader
from unicom_dist.data.samples import TASKS, Task
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.attention import Plan
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.operations import transfusion_flops
from unicom_dist.models.segments import PackedBatch, Segment

_ROWS_AT_ONCE = 1 << 24


class Stream:
    """What a mixture weighs, TASK or TASK/SET: its sets one after the other, gone through in an order of its own.

    `stream[n]`: set, sample number there and visit of the n-th draw; `drawn` of them were made. DataError: no sample.
    """

    def __init__(self, name: str, sources: Sequence[Source], seed: int, stage: str) -> None:
        self.name, self.drawn = name, 0
        self.task = next(task for task in TASKS if task == name.partition("/")[0])
        self._sources = sources
        size = sum(len(source.samples) for source in sources)
        if not size:
            raise DataError(
                f"the mixture of stage {stage} draws {name}, whose sets hold no sample",
                "an order needs something to go through",
                f"fill {', '.join(source.name for source in sources)}, or give {name} the weight 0",
                "docs/data.md",
            )
        self.order = Order(size, seed, stage, name)

    def __getitem__(self, ordinal: int) -> tuple[Source, int, int]:
        place, visit = self.order[ordinal]
        for source in self._sources:
            if place < len(source.samples):
                return source, place, visit
            place -= len(source.samples)
        raise IndexError(place)


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
        self._mixture = MixtureSchedule(stage.mixture_at(0).streams)
        tasks = [task for task in TASKS if stage.draws(task)]
        joint = stage.joint.enabled
        untouched = ("text", "image_to_text") if config.prior.understanding == "raw" else ("text",)
        latents = not joint and any(task not in untouched for task in tasks)
        sources = {
            name: open_source(config, name, latents=latents, expect_fingerprint=expect_fingerprint)
            for name in config.data.kinds
        }
        images = Images([source.samples for source in sources.values() if source.samples.parts], config.encoder.kind)
        self._reader = SampleReader(config, images, stage.name, vocabulary, stats, stage.row_positions, joint)
        self._streams = {
            name: Stream(name, [sources[each] for each in sets_of(config, name)], config.seed, stage.name)
            for name in stage.streams
        }
        self._packer: Packer[Planned] = Packer(stage.row_positions)
        sizes = {name: stream.order.size for name, stream in self._streams.items()}
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
            **({"mixture_changes": [[n, stage.mixture_at(n).streams] for n in changes]} if changes else {}),
        }
        super().__init__(identity, prefetch)

    def report(self) -> dict[str, float]:
        """Figures for the metrics, since the start.

        Empty share of the rows, malformed samples met, FLOPs of a step's costliest rank over the mean of the ranks,
        and how often each stream of the mixture has gone through its samples.
        """
        positions = self._row_count * self._reader.limit
        return {
            "data/pad_fraction": 1 - self._filled / positions if positions else 0.0,
            "data/bad_samples": float(len(self._bad.names)),
            "data/rank_imbalance": self._costliest / self._mean_cost if positions else 1.0,
            **{f"data/epochs/{name}": stream.drawn / stream.order.size for name, stream in self._streams.items()},
        }

    def _next(self) -> list[PackedBatch]:
        if self._step in self._stage.mixture_changes:
            self._mixture = MixtureSchedule(self._stage.mixture_at(self._step).streams)
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
            row = self._packer.add(self._next_sample(self._streams[self._mixture.draw()]))
            if row is not None:
                return row

    def _next_sample(self, stream: Stream) -> Planned:
        while True:
            ordinal = stream.drawn
            stream.drawn += 1
            try:
                planned = self._plan(stream, ordinal)
                self._bad.accept()
                return planned
            except DataError as error:
                source, number, _ = stream[ordinal]
                self._bad.report(f"{source.samples.key(number)} ({stream.name})", error)

    def _plan(self, stream: Stream, ordinal: int) -> Planned:
        source, number, visit = stream[ordinal]
        return replace(self._reader.plan(stream.task, source, number, visit), drawn=(stream.name, ordinal))

    def _snapshot(self) -> State:
        return {
            "step": self._step,
            "counts": dict(self._mixture.counts),
            "drawn": {name: stream.drawn for name, stream in self._streams.items()},
            "open_rows": [[list(planned.drawn) for planned in row] for row in self._packer.open],
        }

    def _restore(self, state: State) -> None:
        self._step = int(state["step"])
        mixture = self._stage.mixture_at(max(self._step - 1, 0))  # as the last step was drawn
        self._mixture = MixtureSchedule(mixture.streams)
        self._mixture.counts = {name: int(n) for name, n in state["counts"].items()}
        for name, drawn in state["drawn"].items():
            self._streams[name].drawn = int(drawn)
        rows = state["open_rows"]
        self._packer.restore([[self._plan(self._streams[name], int(n)) for name, n in row] for row in rows])


def sets_of(config: Config, stream: str) -> list[str]:
    """The sets that a stream of a mixture, TASK or TASK/SET, draws from."""
    task, _, name = stream.partition("/")
    return [name] if name else config.data.sets_of(task)


def open_source(
    config: Config,
    name: str,
    *,
    latents: bool,
    held_out: bool = False,
    expect_fingerprint: Mapping[str, str] | None = None,
) -> Source:
    """A set or its held-out one, with the features (and latents) of its images if they are pairs or it has any."""
    kind, folder = config.data.kinds[name], held_out_set(name) if held_out else name
    if kind != "pairs" and not Manifest.file(Path(config.data.path) / folder, config.encoder.kind).exists():
        return Source(name, kind, ShardSet(Path(config.data.path) / folder))
    return Source(name, kind, open_set(config, folder, latents=latents, expect_fingerprint=expect_fingerprint))


def heldout_prior_batches(
    config: Config,
    vocabulary: Vocabulary,
    stats: LatentStats,
    t: float,
    limit: int,
    tasks: Sequence[Task] = ("text_to_image", "image_to_text"),
    batch: int = 16,
    joint: bool = False,
    name: str = TRAIN,
) -> Iterator[PackedBatch]:
    """`limit` held-out pairs of the set `name`, evenly apart, as each of `tasks`, images at time `t`.

    Noise is keyed by the sample. `joint`: with features instead of latents.
    """
    wanted = "text_to_image" in tasks or config.prior.understanding != "raw"
    pairs = open_source(config, name, latents=wanted and not joint, held_out=True)
    images = Images([pairs.samples], config.encoder.kind)
    reader = SampleReader(config, images, "heldout", vocabulary, stats, _ROWS_AT_ONCE, joint)
    numbers = spread(limit, len(pairs.samples))
    for first in range(0, len(numbers), batch):
        chosen = numbers[first : first + batch]
        yield reader.read([reader.plan(task, pairs, n, 0, training=False) for n in chosen for task in tasks], fixed_t=t)


def heldout_sets(config: Config) -> dict[str, SetKind]:
    """Those of `data.sets` that have a held-out one with samples in it, and what they hold."""

    def there(folder: Path) -> bool:
        return Manifest.file(folder).is_file() and Manifest.read(folder).samples > 0

    root = Path(config.data.path)
    return {name: kind for name, kind in config.data.sets.items() if there(root / held_out_set(name))}


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
    """As `heldout_prior_batches`, of `limit` held-out conversations, documents or texts of the set `name`.

    Malformed ones are left out. The images they show are those of `heldout` and their own.
    """
    further = open_source(config, name, latents=not joint, held_out=True)
    assert further.kind != "pairs"
    shown = [open_set(config, "heldout", latents=not joint), *([further.samples] if further.samples.parts else [])]
    images = Images(shown, config.encoder.kind)
    reader = SampleReader(config, images, "heldout", vocabulary, stats, _ROWS_AT_ONCE, joint)
    numbers = spread(limit, len(further.samples))
    for first in range(0, len(numbers), batch):
        planned = []
        for n in numbers[first : first + batch]:
            with contextlib.suppress(DataError):
                planned.append(reader.plan(further.kind, further, n, 0, training=False))
        if planned:
            yield reader.read(planned, fixed_t=t)
