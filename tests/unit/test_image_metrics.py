"""PSNR, SSIM and bootstrap intervals. One process, about a second."""

import math

import numpy as np
import pytest
import torch
from fetched import published

from unicom_dist.evaluate.image_metrics import psnr, ssim
from unicom_dist.evaluate.intervals import bootstrap, weighted_mean


def pictures(seed: int, count: int = 3, px: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, px, px, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [1, 16, 100])
def test_psnr_of_a_constant_offset(offset):
    images = torch.full((2, 3, 8, 8), 0.25)
    assert psnr(images + offset / 255, images).tolist() == pytest.approx([20 * math.log10(255 / offset)] * 2, abs=1e-4)


def test_equal_pictures_reach_the_best_values():
    images = pictures(0)
    assert psnr(images, images).tolist() == [100.0] * 3
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3)


def test_ssim_equals_scikit_image():
    structural_similarity = published("skimage.metrics", "scikit-image").structural_similarity
    images, references = pictures(1, px=29), 0.5 * pictures(1, px=29) + 0.5 * pictures(2, px=29)
    expected = [
        structural_similarity(
            a.numpy().astype(np.float64),
            b.numpy().astype(np.float64),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
        for a, b in zip(images, references, strict=True)
    ]
    assert ssim(images, references).tolist() == pytest.approx(expected, abs=1e-10)


def test_psnr_equals_scikit_image():
    peak_signal_noise_ratio = published("skimage.metrics", "scikit-image").peak_signal_noise_ratio
    a, b = pictures(3), pictures(4)
    expected = [peak_signal_noise_ratio(y.numpy(), x.numpy(), data_range=1.0) for x, y in zip(a, b, strict=True)]
    assert psnr(a, b).tolist() == pytest.approx(expected, abs=1e-4)


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="11 px"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_interval_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(generator.normal(3.0, 1.0, 40), resamples=200)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_of_a_ratio_weighs_samples_by_their_counts():
    values, weights = [10.0, 1.0, 2.0], [10.0, 1.0, 2.0]
    assert weighted_mean(values, weights) == 1.0
    assert bootstrap(values, weights) == pytest.approx((1.0, 1.0))
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
