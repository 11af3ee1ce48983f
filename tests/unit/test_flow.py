"""Rectified flow: path, target, times. One process."""

import math

import pytest
import torch

from unicom_dist.config.schema import CodecConfig, PriorConfig
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.models.flow import flux_shift, shift_factor
from unicom_dist.objective.flow import clean_from_velocity, interpolate, sample_t, shift, squared_error, target
from unicom_dist.sample.solver import time_grid


def test_path_runs_from_noise_to_data_at_the_velocity() -> None:
    data, noise = torch.randn(2, 5, 3, 4, dtype=torch.float64).unbind(0)
    assert torch.equal(interpolate(data, noise, torch.zeros(5)), noise)
    assert torch.equal(interpolate(data, noise, torch.ones(5)), data)
    t = torch.rand(5, dtype=torch.float64)
    slope = (interpolate(data, noise, t + 1e-4) - interpolate(data, noise, t - 1e-4)) / 2e-4
    torch.testing.assert_close(slope, target(data, noise))


def test_clean_estimate_of_the_true_velocity_is_the_data() -> None:
    data, noise = torch.randn(2, 5, 3, 4).unbind(0)
    t = torch.rand(5)
    torch.testing.assert_close(clean_from_velocity(interpolate(data, noise, t), target(data, noise), t), data)


def test_one_time_per_row_of_a_packed_batch() -> None:
    data, noise = torch.randn(2, 6, 4).unbind(0)
    t = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])
    torch.testing.assert_close(interpolate(data, noise, t)[2], (data[2] + noise[2]) / 2)


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.5])
def test_shift_is_the_published_formula_in_our_time(factor: float) -> None:
    """With sigma = 1 - t: sigma' = s sigma / (1 + (s-1) sigma), ends fixed, monotone."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift(t, factor)
    sigma = 1 - t
    torch.testing.assert_close(1 - shifted, factor * sigma / (1 + (factor - 1) * sigma))
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted.diff() > 0).all()
    assert (shifted[5] < 0.5) == (factor > 1)


@pytest.mark.parametrize("config", [PriorConfig(), CodecConfig()])
def test_uniform_times_are_uniform_and_keyed(config: PriorConfig | CodecConfig) -> None:
    t = sample_t(config, 20_000, torch.Generator().manual_seed(1))
    assert torch.equal(t, sample_t(config, 20_000, torch.Generator().manual_seed(1)))
    assert not torch.equal(t, sample_t(config, 20_000, torch.Generator().manual_seed(2)))
    counts = torch.histc(t, 10, 0, 1)
    assert (counts - 2000).abs().max() < 200


def test_logit_normal_times_lie_in_the_middle_and_shift_towards_noise() -> None:
    config = PriorConfig(timestep="logit-normal")
    t = sample_t(config, 20_000, torch.Generator().manual_seed(1))
    assert torch.logit(t).std().item() == pytest.approx(1, abs=0.03)
    shifted = sample_t(config.model_copy(update={"timestep_shift": 4.0}), 20_000, torch.Generator().manual_seed(1))
    assert torch.equal(shifted, shift(t, 4.0))
    assert shifted.mean() < 0.3 < t.mean()


def test_squared_error_is_the_mean_over_channels() -> None:
    data, noise = torch.randn(2, 5, 3, 4).unbind(0)
    velocity = target(data, noise) + torch.arange(5.0)[:, None, None]
    torch.testing.assert_close(squared_error(velocity, data, noise), torch.arange(5.0).square(), rtol=1e-4, atol=1e-5)
    assert squared_error(velocity[:0], data[:0], noise[:0]).shape == (0,)


def test_the_shift_of_a_resolution_is_that_of_diffusers() -> None:
    """mu by its pipeline, the shift by its scheduler, in noise levels: sigma = 1 - t."""
    diffusers_class("FluxTransformer2DModel")  # hides a torchvision that does not fit this torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for patches in (64, 256, 1000, 4096):
        theirs = scheduler.time_shift(calculate_shift(patches), 1.0, 1 - t)
        torch.testing.assert_close(1 - shift(t, flux_shift(patches)), theirs)
        steps = 4
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=calculate_shift(patches))
        torch.testing.assert_close(1 - torch.tensor(time_grid(steps, flux_shift(patches))), scheduler.sigmas)
    assert flux_shift(256) == pytest.approx(math.exp(0.5))
    assert flux_shift(4096) == pytest.approx(math.exp(1.15))


def test_the_shift_of_a_codec_follows_the_picture_if_asked() -> None:
    fixed, by_size = CodecConfig(timestep_shift=2.0), CodecConfig(timestep_shift=2.0, resolution_shift=True)
    assert shift_factor(fixed, 256) == shift_factor(fixed) == 2.0
    assert shift_factor(by_size, 1024) == flux_shift(1024)
    assert shift_factor(PriorConfig(timestep_shift=3.0)) == 3.0
    with pytest.raises(ValueError, match="size of the image"):
        shift_factor(by_size)
    few, many = (sample_t(by_size, 1000, torch.Generator().manual_seed(1), patches) for patches in (256, 4096))
    assert torch.equal(few, shift(sample_t(CodecConfig(), 1000, torch.Generator().manual_seed(1)), flux_shift(256)))
    assert bool((many <= few).all())
