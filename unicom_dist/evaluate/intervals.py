"""Bootstrap intervals for means of per-picture or per-sample values."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


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
    drawn = np.random.default_rng(0).integers(0, len(total), (resamples, len(total)))
    means = total[drawn].sum(1) / np.maximum(count[drawn].sum(1), 1e-12)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
