"""Confidence intervals: bootstrap for means of per-picture values, t for what was trained with several seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """sum(values) / sum(weights) where `values` are sums over `weights` items each; without weights the plain mean."""
    total = np.asarray(values, np.float64)
    return float(total.sum() / (len(total) if weights is None else np.asarray(weights, np.float64).sum()))


def bootstrap(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of `weighted_mean`, whole samples drawn with replacement (Efron 1979).

    Deterministic. For ratios (a loss per token) `values` are the samples' sums and `weights` their counts.
    ValueError without values.
    """
    total = np.asarray(values, np.float64)
    if not len(total):
        raise ValueError("an interval of no values")
    count = np.ones_like(total) if weights is None else np.asarray(weights, np.float64)
    random = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        drawn = random.integers(0, len(total), len(total))
        means.append(total[drawn].sum() / max(count[drawn].sum(), 1e-12))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Estimate(NamedTuple):
    """A mean and its confidence interval; infinite bounds where one value tells nothing of its spread."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which knows no infinity: None."""
        return {name: value if np.isfinite(value) else None for name, value in self._asdict().items()}


def over_seeds_and_pictures(values: ArrayLike, level: float = 0.95) -> Estimate:
    """The mean of `values` [S, P], measured for S trainings on the same P pictures, and a t interval for it.

    It is meant for other seeds and other pictures: the variance is that of the S means over pictures, divided by S,
    plus that of the P means over seeds, divided by P. What varies with both is thereby counted twice, which errs on the
    safe side. Degrees of freedom after Satterthwaite (1946). A bootstrap would be too narrow for two or three seeds.
    With one seed the interval is about pictures only, with one column (a figure of all pictures) about seeds only.
    ValueError without values.
    """
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"an interval needs values by seed and picture, got shape {table.shape}")
    mean = float(table.mean())
    parts = [(table.mean(1 - axis).var(ddof=1) / n, n - 1) for axis, n in enumerate(table.shape) if n > 1]
    if not parts:
        return Estimate(mean, -np.inf, np.inf)
    variance = float(sum(part for part, _ in parts))
    if variance == 0:
        return Estimate(mean, mean, mean)
    freedom = variance**2 / float(sum(part**2 / df for part, df in parts))
    half = float(stdtrit(freedom, (1 + level) / 2)) * variance**0.5
    return Estimate(mean, mean - half, mean + half)
