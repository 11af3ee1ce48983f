"""Figures of a whole set of pairs, from its parts: rows with intervals, figures per size, and which pictures are worst.

Memory does not grow with the set but for a few numbers per picture: features are kept as sums, and of at most
KID_PICTURES pictures as they are.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from unicom_dist.data.pairs import spread
from unicom_dist.evaluate.fid_features import NETWORK, Protocol
from unicom_dist.evaluate.frechet import (
    KID_SUBSET,
    KID_SUBSETS,
    Features,
    FeatureSums,
    distance_to_constant,
    frechet_distance,
    kernel_distance,
)
from unicom_dist.evaluate.intervals import bootstrap
from unicom_dist.evaluate.parts import PART, Part
from unicom_dist.evaluate.rows import Row, measure
from unicom_dist.evaluate.ruler import METRICS

KID_PICTURES = 10_000
BIASED_BELOW = 10_000  # pictures, as a rule: rFID falls by more than noise when the set grows


class Baseline(NamedTuple):
    """What a picture that needs no codec scores: its name, figures by metric, and FID features [C] if there are any."""

    name: str
    scores: dict[str, float]
    features: Features | None


class SetScores:
    """Parts put together in their order. `pictures`: how many there will be, at most."""

    def __init__(self, pictures: int) -> None:
        self.keys: list[str] = []
        self.left_out: list[str] = []
        self.sizes: list[tuple[int, int]] = []  # width, height
        self._scores: dict[str, list[NDArray[np.float64]]] = {}
        self._sums: tuple[FeatureSums, FeatureSums] | None = None
        self._kept: list[tuple[Features, Features]] = []
        self._keep = max(1, PART * KID_PICTURES // max(pictures, KID_PICTURES))  # of a part

    def add(self, part: Part) -> None:
        """The next part. DataError for features that are not finite."""
        self.left_out += part.left_out
        if not part.keys:
            return
        self.keys += part.keys
        self.sizes += [(int(width), int(height)) for width, height in part.sizes]
        for name in METRICS:
            if name in part.arrays:
                self._scores.setdefault(name, []).append(part.arrays[name])
        if "originals" in part.arrays:
            sides = part.arrays["originals"], part.arrays["rebuilt"]
            sums = FeatureSums.of(sides[0]), FeatureSums.of(sides[1])
            self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])
            chosen = spread(self._keep, len(part.keys))
            self._kept.append((sides[0][chosen], sides[1][chosen]))

    @property
    def scores(self) -> dict[str, NDArray[np.float64]]:
        """By metric, [n]; NaN for a picture too small for it."""
        return {name: np.concatenate(values) for name, values in self._scores.items()}

    def rows(self, name: str, protocol: Protocol | None, baseline: Baseline) -> list[Row]:
        """A row per figure of the set called `name`. DataError: too few pictures for rFID."""
        sizes = sorted(set(self.sizes))
        split = f"{name}, {f'{sizes[0][0]} x {sizes[0][1]} px' if len(sizes) == 1 else f'{len(sizes)} sizes'}"
        rows = [] if protocol is None else self._set_rows(split, protocol, baseline)
        for key, values in self.scores.items():
            values, metric = values[np.isfinite(values)], METRICS[key]
            if len(values):
                trivial = (baseline.name, baseline.scores[key])
                rows.append(
                    measure(metric.title, split, values.tolist(), metric.better, None, None, trivial, metric.note)
                )
        return rows

    def _set_rows(self, split: str, protocol: Protocol, baseline: Baseline) -> list[Row]:
        assert self._sums is not None
        assert baseline.features is not None
        (a, b), constant = self._sums, baseline.features
        note = f"rFID, KID: {NETWORK}; {protocol.text}."
        if a.count < BIASED_BELOW:
            note += f" Below {BIASED_BELOW:,} pictures rFID is biased upwards: compare it at the same n only."
        flat = distance_to_constant(a, torch.from_numpy(constant))
        rows = [Row("rFID", split, frechet_distance(a, b), None, a.count, "lower", None, (baseline.name, flat), note)]
        x, y = (np.concatenate(side) for side in zip(*self._kept, strict=True))
        value, interval = kernel_distance(x, y)
        flat, _ = kernel_distance(x[:KID_SUBSET], np.repeat(constant[None], min(len(x), KID_SUBSET), 0))
        note = f"KID: mean and range of {KID_SUBSETS} subsets of {KID_SUBSET}." if interval else "KID: of all pictures."
        rows.append(Row("KID", split, value, interval, len(x), "lower", None, (baseline.name, flat), note))
        return rows

    def by_size(self) -> list[dict[str, Any]]:
        """Mean and interval of every metric for the pictures of each size, the most frequent first."""
        sizes = sorted(set(self.sizes), key=lambda size: (-self.sizes.count(size), size))
        found = []
        for size in sizes:
            here = np.array([other == size for other in self.sizes])
            of_size: dict[str, Any] = {"width": size[0], "height": size[1], "n": int(here.sum())}
            for name, values in self.scores.items():
                if np.isfinite(values[here]).all():
                    of_size[name] = {"value": float(values[here].mean()), "ci": list(bootstrap(values[here]))}
            found.append(of_size)
        return found

    def worst(self, count: int) -> list[int]:
        """Numbers of the pictures of the largest LPIPS, or of the lowest PSNR where there is none; worst first."""
        scores = self.scores
        by = -scores["lpips"] if "lpips" in scores and np.isfinite(scores["lpips"]).all() else scores["psnr"]
        return [int(number) for number in np.argsort(by, kind="stable")[:count]]

    def of(self, number: int) -> dict[str, Any]:
        """The picture's key and figures."""
        finite = {name: float(values[number]) for name, values in self.scores.items() if np.isfinite(values[number])}
        return {"key": self.keys[number], **finite}
