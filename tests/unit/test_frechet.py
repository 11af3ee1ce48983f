"""Sums of features, Fréchet and kernel distance against their definitions. One process, seconds.

torch-fidelity and pytorch-fid need torchvision, so their formula is written out here, with scipy's matrix root.
"""

import math

import numpy as np
import pytest
import torch
from fetched import published

from unicom_dist.config.errors import DataError
from unicom_dist.evaluate import frechet
from unicom_dist.evaluate.frechet import FeatureSums, distance_to_constant, frechet_distance, kernel_distance


def features(seed: int, count: int = 60, channels: int = 12, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(channels, channels))
    return (random.normal(size=(count, channels)) @ mixing + shift).astype(np.float32)


def reference(a: np.ndarray, b: np.ndarray) -> float:
    """As pytorch-fid, clean-fid and torch-fidelity define it."""
    sqrtm = published("scipy.linalg", "scipy").sqrtm
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    difference = a.mean(0) - b.mean(0)
    return float(difference @ difference + np.trace(cov_a + cov_b) - 2 * np.trace(sqrtm(cov_a @ cov_b)).real)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(FeatureSums.of(a), FeatureSums.of(b))


def test_equals_the_published_definition() -> None:
    a, b = features(1), 1.3 * features(2, 80, shift=0.2)
    assert distance(a, b) == pytest.approx(reference(a, b), rel=1e-9)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-12)


def test_known_distance_of_two_normal_distributions() -> None:
    # N(0, I) and N(.01, 1.1^2 I) in C channels: C (.01^2 + (1.1 - 1)^2).
    channels = 256
    sums = [
        FeatureSums(n, n * mean, (n - 1) * variance * np.eye(channels) + n * mean[:, None] * mean)
        for n, mean, variance in ((50, np.zeros(channels), 1.0), (70, np.full(channels, 0.01), 1.1**2))
    ]
    tensors = [FeatureSums(s.count, torch.from_numpy(s.total), torch.from_numpy(s.outer)) for s in sums]
    assert frechet_distance(*tensors) == pytest.approx(2.5856, abs=1e-8)


def test_a_set_is_at_no_distance_from_itself_even_with_fewer_samples_than_channels() -> None:
    a = features(3, count=20, channels=64)
    assert distance(a, a) == pytest.approx(0.0, abs=1e-8)
    assert distance(features(1), features(1)) == pytest.approx(0.0, abs=1e-8)


def test_singular_covariances_equal_the_published_definition() -> None:
    # scipy's root of a singular product loses digits; in the space both sets span it does not.
    a, b = features(4, 8, 30), features(5, 9, 30)
    basis = np.linalg.svd(np.concatenate([a - a.mean(0), b - b.mean(0), [a.mean(0) - b.mean(0)]]))[2][:16].T
    assert distance(a, b) == pytest.approx(reference(a @ basis, b @ basis), rel=1e-4)


@pytest.mark.parametrize("cuts", [[30], [1, 2, 59], [10, 20, 50]])
def test_sums_of_parts_equal_those_of_the_whole(cuts: list[int]) -> None:
    a = features(6)
    parts = [FeatureSums.of(part) for part in np.split(a, cuts)]
    total = sum(parts[1:], parts[0])
    whole = FeatureSums.of(a)
    assert total.count == whole.count
    np.testing.assert_allclose(total.covariance, np.cov(a.astype(np.float64), rowvar=False), rtol=0, atol=1e-10)
    other = FeatureSums.of(features(7))
    assert frechet_distance(total, other) == pytest.approx(frechet_distance(whole, other), abs=1e-8)


def test_distance_to_one_picture_repeated() -> None:
    a, point = features(8), features(9, 1)[0]
    repeated = distance(a, np.repeat(point[None], 5, 0))
    assert distance_to_constant(FeatureSums.of(a), torch.from_numpy(point)) == pytest.approx(repeated, rel=1e-9)


def mmd_written_out(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x.astype(np.float64) @ y.astype(np.float64)) / len(x) + 1) ** 3

    def within(x: np.ndarray) -> float:
        return sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))


def test_kernel_distance_is_the_unbiased_squared_mmd() -> None:
    a, b = features(10, 14), features(11, 9, shift=0.3)
    value, interval = kernel_distance(a, b)
    assert value == pytest.approx(mmd_written_out(a, b), rel=1e-9)
    assert interval is None


def test_large_sets_are_compared_by_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = features(12, 400), features(13, 400, shift=0.5)
    whole, none = kernel_distance(a, b)
    assert none is None
    monkeypatch.setattr(frechet, "KID_SUBSET", 50)
    value, interval = kernel_distance(a, b)
    assert interval is not None
    assert interval[0] < value < interval[1]
    assert abs(value - whole) < (interval[1] - interval[0]) / 5
    assert kernel_distance(a, b) == (value, interval)


def test_too_few_and_broken_features_are_refused() -> None:
    with pytest.raises(DataError, match="1 picture: no covariance"):
        distance(features(1, 1), features(2))
    with pytest.raises(DataError, match="no kernel distance"):
        kernel_distance(features(1, 1), features(2))
    broken = features(1)
    broken[3, 4] = math.nan
    with pytest.raises(DataError, match="features of 1 of 60 pictures are not finite") as caught:
        FeatureSums.of(broken)
    assert "number 3" in caught.value.why
    with pytest.raises(DataError, match="not finite"):
        kernel_distance(features(2), broken)
