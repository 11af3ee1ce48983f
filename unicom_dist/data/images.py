"""The images of several sets: found by key, their features and latents read together."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unicom_dist.config.errors import DataError
from unicom_dist.data.npy import gather
from unicom_dist.data.pairs import feature_channels, grid_of
from unicom_dist.data.shardset import Sample, ShardSet


class Found(NamedTuple):
    """Sample `number` of set number `which`."""

    which: int
    number: int


class Images:
    """Images of `sets`, all with the features of the encoder `part`. DataError: no sample has features."""

    def __init__(self, sets: Sequence[ShardSet], part: str) -> None:
        self.sets = list(sets)
        self.feature_channels = feature_channels(self.sets[0], part)
        self._by_key: dict[str, Found] = {}

    def place(self, samples: ShardSet, number: int) -> Found:
        """Of the image of sample `number` of one of the sets."""
        return Found(self.sets.index(samples), number)

    def sample(self, found: Found) -> Sample:
        """Key and members of an image's sample."""
        return self.sets[found.which][found.number]

    def key(self, found: Found) -> str:
        """Key of an image's sample."""
        return self.sets[found.which].key(found.number)

    def find(self, key: str, wanted_by: str) -> Found:
        """The image called `key`; of several the one in the first set. DataError, naming `wanted_by`: none is."""
        if not self._by_key:
            for which in reversed(range(len(self.sets))):
                self._by_key |= {name: Found(which, number) for number, name in enumerate(self.sets[which].keys())}
        try:
            return self._by_key[key]
        except KeyError:
            raise DataError(
                f"sample {wanted_by!r} shows the image {key!r}, which no set has",
                "images are looked up by key: " + ", ".join(str(pairs.folder) for pairs in self.sets),
                "ingest the image, or name its set in data.sets",
                "docs/data.md",
            ) from None

    def grid(self, found: Found, part: str, extension: str, channels: int) -> tuple[int, int]:
        """Rows and columns of what `part` holds of an image. DataError: missing, damaged, of another width."""
        return grid_of(self.sample(found), part, extension, channels)

    def arrays(self, wanted: Sequence[tuple[Found, int]], part: str, extension: str) -> list[Tensor]:
        """The stored arrays [n, C] of images of n positions: views of one tensor, filled in one copy where all are of
        one set. DataError: damaged, or values that are not finite.
        """
        results: list[Tensor] = [torch.zeros(0, 0)] * len(wanted)
        for which, pairs in enumerate(self.sets):
            here = [n for n, (found, _) in enumerate(wanted) if found.which == which]
            if not here:
                continue
            numbers = [wanted[n][0].number for n in here]
            (contents,) = pairs.columns(numbers, extension, part=part)
            values = gather(contents, lambda n, pairs=pairs, numbers=numbers: pairs.key(numbers[n]))  # type: ignore[misc]
            split = torch.split(values, [wanted[n][1] for n in here])
            if not values.isfinite().all():
                key = next(self.key(wanted[n][0]) for n, a in zip(here, split, strict=True) if not a.isfinite().all())
                raise DataError(
                    f"sample {key!r}: the {part!r} part holds values that are not finite",
                    "one of them would end the run with a loss that is not a number",
                    "run `unicom data check`, then compute the damaged shard again",
                    "docs/data.md",
                )
            for n, array in zip(here, split, strict=True):
                results[n] = array
        return results
