"""One sample of the prior, from a draw to arrays: what is decided before any array is read, and the reading.

Planning takes texts and grids alone, so every rank can plan what all ranks do. Choices, noise and times are keyed by
seed, stage, sample and visit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, SetKind
from unicom_dist.data.conversations import Conversation
from unicom_dist.data.images import Found, Images
from unicom_dist.data.order import generator_of, key_of
from unicom_dist.data.pairs import captions_of, document, json_of
from unicom_dist.data.samples import READING, Arrays, Content, Layout, Layouts, Task, beside, collate
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.flow import sample_t
from unicom_dist.models.segments import PackedBatch

# Share of the text-to-image samples prompted with one of the further captions (keywords) instead of the caption.
FURTHER_CAPTIONS = 0.2


@dataclass(frozen=True, slots=True)
class Source:
    """A set that samples are drawn from."""

    name: str
    kind: SetKind
    samples: ShardSet


@dataclass(frozen=True, slots=True)
class Planned:
    """A sample whose place is decided and whose arrays are not read yet."""

    source: str  # its set
    key: str
    visit: int
    layout: Layout
    images: tuple[Found, ...] = ()  # by number
    drawn: tuple[str, int] = ("", 0)  # by which stream of the mixture, and as its which sample

    @property
    def length(self) -> int:
        """Positions."""
        return self.layout.length


class SampleReader:
    """Plans and reads samples. `joint`: with the features of which the model makes the latents."""

    def __init__(
        self,
        config: Config,
        images: Images,
        stage: str,
        vocabulary: Vocabulary,
        stats: LatentStats,
        limit: int,
        joint: bool,
    ) -> None:
        self.images, self.limit = images, limit
        self._config, self._stage, self._stats, self._joint = config, stage, stats, joint
        self._layouts = Layouts(vocabulary, config.prior)
        self._latent_channels = stats.mean.shape[0]
        # What is read of an image to be read, and of one to be drawn or referred to.
        self._read = (config.encoder.kind, "features.npy", images.feature_channels)
        self._made = self._read if joint else ("latent", "latent.npy", self._latent_channels)
        self._reading = READING[config.prior.understanding]

    def plan(self, task: Task, source: Source, number: int, visit: int, *, training: bool = True) -> Planned:
        """Decide on the layout of sample `number` of a set.

        DataError: malformed, an image that no set has, longer than a row. Text alone is cut instead; a conversation
        loses its last exchanges.
        """
        if source.kind == "pairs":
            return self._plan_pair(task, source, number, visit, training)
        return self._plan_conversation(task, source, number, visit, training)

    def _plan_pair(self, task: Task, source: Source, number: int, visit: int, training: bool) -> Planned:
        sample = source.samples[number]
        captions = captions_of(sample)
        if task == "text":
            return Planned(source.name, sample.key, visit, self._layouts.text(document(captions), self.limit))
        found = self.images.place(source.samples, number)
        if task == "image_to_text":
            layout = self._layouts.image_to_text(captions.main, self._grid(found, read=True), self._reading)
        else:
            prompt = captions.main
            if training:
                chance = key_of(self._config.seed, self._stage, sample.key, visit, "caption")
                drop, further, which = (chance & 0xFFFFF) / 2**20, (chance >> 20 & 0xFFFFF) / 2**20, chance >> 40
                if drop < self._config.prior.condition_dropout:
                    prompt = ""
                elif captions.further and further < FURTHER_CAPTIONS:
                    prompt = captions.further[which % len(captions.further)]
            layout = self._layouts.text_to_image(prompt, self._grid(found, read=False))
        return self._fitting(Planned(source.name, sample.key, visit, layout, (found,)))

    def _plan_conversation(self, task: Task, source: Source, number: int, visit: int, training: bool) -> Planned:
        sample = source.samples[number]
        conversation = Conversation.parse(json_of(sample.parts[""], sample.key), sample.key)
        if task == "text" and conversation.shown():
            raise DataError(
                f"sample {sample.key!r} of the set {source.name} shows images",
                "data.sets says that it holds text",
                f"data.sets: {{{source.name}: interleaved}}",
                "docs/data.md",
            )
        if training and conversation.draws:  # without its image, an answer about it would be learned as a guess
            chance = key_of(self._config.seed, self._stage, sample.key, visit, "condition")
            text, reference = (chance & 0xFFFFF) / 2**20, (chance >> 20 & 0xFFFFF) / 2**20
            prior = self._config.prior
            conversation = conversation.without(
                text=text < prior.condition_dropout, images=reference < prior.reference_dropout
            )

        def grid(key: str, read: bool) -> tuple[int, int]:
            return self._grid(self.images.find(key, sample.key), read)

        while True:
            layout, keys = conversation.layout(self._layouts, task, grid, self._reading)
            images = tuple(self.images.find(key, sample.key) for key in keys)
            planned = Planned(source.name, sample.key, visit, layout, images)
            shorter = conversation.shorter() if layout.length > self.limit else None
            if shorter is None:
                return self._fitting(planned if images else replace(planned, layout=layout.cut(self.limit)))
            conversation = shorter

    def _grid(self, found: Found, read: bool) -> tuple[int, int]:
        """Of an image's features if it is to be read, else of its latents. DataError: both are read and differ."""
        grid = self.images.grid(found, *(self._read if read else self._made))
        if read and self._config.prior.understanding != "raw" and self.images.grid(found, *self._made) != grid:
            raise DataError(
                f"sample {self.images.key(found)!r}: features and latents have different grids",
                f"prior.understanding: {self._config.prior.understanding} reads both, position by position",
                "compute the latents again, or prior.understanding: raw",
                "docs/training.md",
            )
        return grid

    def _fitting(self, planned: Planned) -> Planned:
        if planned.length > self.limit:
            what = f"sample {planned.key!r} takes {planned.length} positions as {planned.layout.task}"
            raise DataError(what, f"a row has {self.limit}", "raise row_positions of the stage")
        return planned

    def read(self, rows: Sequence[Planned], fixed_t: float | None = None) -> PackedBatch:
        """The arrays, noise and times of planned samples, end to end. DataError on values that are not finite."""
        contents = [Content(row.key, row.layout, [Arrays() for _ in row.layout.images], row.source) for row in rows]
        steps = [
            (("read",), self._read, self._put_features),
            (("reference", "draw"), self._made, self._put_latents),
        ]
        if self._config.prior.understanding == "dim_concat":
            steps.append((("read",), self._made, self._add_latents))
        for uses, (part, extension, _), put in steps:
            wanted = [
                (image, row.images[place.image], place.size)
                for row, content in zip(rows, contents, strict=True)
                for place, image in zip(row.layout.images, content.images, strict=True)
                if place.use in uses
            ]
            arrays = self.images.arrays([(found, size) for _, found, size in wanted], part, extension)
            for (image, _, _), array in zip(wanted, arrays, strict=True):
                put(image, array)
        for row, content in zip(rows, contents, strict=True):
            if not any(place.use == "draw" for place in row.layout.images):
                continue
            generator = generator_of(self._config.seed, self._stage, row.key, row.visit)
            for place, image in zip(row.layout.images, content.images, strict=True):
                if place.use == "draw":
                    t = sample_t(self._config.prior, 1, generator, place.size * self._latent_channels)
                    image.t = float(t[0]) if fixed_t is None else fixed_t
                    image.noise = torch.empty(place.size, self._latent_channels).normal_(generator=generator)
        channels = self._config.prior.read_channels(self.images.feature_channels, self._latent_channels)
        return collate(contents, self._latent_channels, channels)

    def _put_features(self, image: Arrays, array: Tensor) -> None:
        image.values = array

    def _put_latents(self, image: Arrays, array: Tensor) -> None:
        if self._joint:
            image.target = array
        else:
            image.values = self._stats.normalise(array.float())

    def _add_latents(self, image: Arrays, array: Tensor) -> None:
        assert image.values is not None
        image.values = beside(image.values, self._stats.normalise(array.float()))
