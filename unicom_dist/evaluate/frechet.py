"""Distances of two sets of features: Fréchet distance (FID) from sums, kernel distance (KID) from the features.

Sums of two parts of a set add up to those of the set, so parts may be computed anywhere and in any order. Everything is
float64. Shapes: n samples of C features.
Ref: Heusel et al., arXiv 1706.08500 (FID); Bińkowski et al., arXiv 1801.01401 (KID).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicom_dist.config.errors import DataError

KID_SUBSETS = 100
KID_SUBSET = 1000
Features = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureSums:
    """How many, their sum [C] and the sum of their outer products [C, C], float64."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Features) -> "FeatureSums":
        """Of [n, C] features. DataError if one is not finite."""
        _check_finite(features)
        x = torch.from_numpy(features).double()
        return cls(len(x), x.sum(0), x.T @ x)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """The sums of both sets together."""
        return FeatureSums(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """[C]."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """[C, C], over n - 1 as numpy.cov. DataError for fewer than two samples."""
        if self.count < 2:
            raise DataError(
                f"{self.count} picture{'' if self.count == 1 else 's'}: no covariance",
                "a Fréchet distance needs at least two, and means little below thousands",
                "measure more pictures, or set eval.fid_path to '' for the other figures",
                "docs/evaluation.md",
            )
        mean = self.mean
        return (self.outer - self.count * mean[:, None] * mean) / (self.count - 1)


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """|mean difference|^2 + tr A + tr B - 2 tr (A B)^(1/2) of the covariances A and B; 0 for equal sets.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2)' B^(1/2), which unlike the root of the product loses no
    digits where A and B are singular, as they are for fewer samples than features.
    """
    cov_a, cov_b = a.covariance, b.covariance
    root = torch.linalg.svdvals(_root(cov_a).T @ _root(cov_b)).sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    return max(float(distance), 0.0)


def distance_to_constant(a: FeatureSums, features: Tensor) -> float:
    """Fréchet distance to a set whose samples all have the features [C]: its covariance is zero."""
    return float((a.mean - features.double()).square().sum() + a.covariance.trace())


def _root(covariance: Tensor) -> Tensor:
    """R [C, rank] with R R' = the covariance; directions without variance are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


def kernel_distance(a: Features, b: Features, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """Squared MMD with the kernel (x'y / C + 1)^3, unbiased, so that it may fall below 0.

    Up to KID_SUBSET samples a set: of all of them, and no interval. Above: mean over KID_SUBSETS random subsets of that
    size, and the range of 95 % of them. DataError for fewer than two samples or values that are not finite.
    """
    for features in (a, b):
        _check_finite(features)
    size = min(KID_SUBSET, len(a), len(b))
    if size < 2:
        raise DataError(f"{size} picture: no kernel distance", "it needs at least two", "measure more pictures")
    if max(len(a), len(b)) <= KID_SUBSET:
        return _squared_mmd(a, b), None
    random = np.random.default_rng(seed)
    found = [_squared_mmd(_some(a, size, random), _some(b, size, random)) for _ in range(KID_SUBSETS)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(np.mean(found)), (float(low), float(high))


def _some(features: Features, size: int, random: np.random.Generator) -> Features:
    return features[random.choice(len(features), size, replace=False)]


def _squared_mmd(a: Features, b: Features) -> float:
    x, y = torch.from_numpy(a).double(), torch.from_numpy(b).double()

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(within[0] + within[1] - 2 * kernel(x, y).mean())


def _check_finite(features: Features) -> None:
    if not np.isfinite(features).all():
        broken = np.flatnonzero(~np.isfinite(features).all(1))
        raise DataError(
            f"features of {len(broken)} of {len(features)} pictures are not finite",
            f"the first is number {broken[0]}",
            "look at the picture; a model that draws NaN has diverged",
        )
