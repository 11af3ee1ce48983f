"""Solvers of the sampling equation. One process, milliseconds."""

import itertools
import math

import pytest
import torch

from unicom_dist.config.errors import ConfigError
from unicom_dist.models.flow import flux_shift
from unicom_dist.sample.solver import checked_times, integrate, noise_from_seeds, time_grid


def test_time_grid_of_four_shifted_steps_is_the_flux_schedule():
    assert time_grid(4, 3.0) == pytest.approx([1 - s for s in (1, 0.9, 0.75, 0.5, 0)])


def test_unshifted_grid_is_even_and_ends_are_exact():
    assert time_grid(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for shift in (0.3, 1.0, 7.0):
        grid = time_grid(9, shift)
        assert (grid[0], grid[-1]) == (0.0, 1.0)
        assert all(a < b for a, b in itertools.pairwise(grid))


def test_three_schedules_of_the_same_steps_and_shift_are_told_apart():
    # N = 4, shift 3, as noise levels: FLUX's and BAGEL's are ours, SD3's default shifts an already shifted range.
    def shifted(sigma):
        return 3 * sigma / (1 + 2 * sigma)

    ours = [1 - t for t in time_grid(4, 3.0)]
    assert ours == pytest.approx([*(shifted(s) for s in (1, 0.75, 0.5, 0.25)), 0])
    lowest = shifted(1 / 1000)
    twice = [shifted(1 + i / 3 * (lowest - 1)) for i in range(4)]
    assert twice == pytest.approx([1, 0.8577, 0.6022, 0.0089], abs=5e-5)
    assert [1 - t for t in checked_times([1 - s for s in (*twice, 0)])] == pytest.approx([*twice, 0])


@pytest.mark.parametrize(("tokens", "mu", "shift"), [(256, 0.5, 1.649), (1024, 0.63, 1.878), (4096, 1.15, 3.158)])
def test_an_exponential_shift_is_the_plain_one_of_e_to_the_mu(tokens, mu, shift):
    assert flux_shift(tokens) == pytest.approx(shift, abs=5e-4) == pytest.approx(math.exp(mu), abs=5e-4)
    exponential = [math.exp(mu) / (math.exp(mu) + 1 / sigma - 1) for sigma in (0.75, 0.5, 0.25)]
    assert [1 - t for t in time_grid(4, math.exp(mu))[1:-1]] == pytest.approx(exponential)


def test_dpm_equals_the_published_solver():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, lower_order_final=True, final_sigmas_type="zero"
    )
    times = time_grid(6, 2.0)
    scheduler.set_timesteps(6)
    scheduler.sigmas = torch.tensor([1 - t for t in times])
    scheduler.timesteps = torch.arange(6)  # only names of the steps
    z = noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def velocity(z, t):
        return torch.sin(3 * z) * (1 + t)

    for number, t in enumerate(times[:-1]):
        z = scheduler.step(-velocity(z, t), number, z).prev_sample  # theirs runs from data to noise
    torch.testing.assert_close(integrate(velocity, noise, times, "dpm"), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("times", [[], [0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [1.0, 0.0]])
def test_times_that_do_not_rise_from_noise_to_data_are_refused(times):
    with pytest.raises(ConfigError, match="times"):
        checked_times(times)


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-1, 1.0), (3, 0.0)])
def test_impossible_grids_are_refused(steps, shift):
    with pytest.raises(ValueError, match="steps >= 1"):
        time_grid(steps, shift)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm"])
def test_constant_field_is_solved_exactly(solver):
    target, noise = torch.randn(4, 3), torch.randn(4, 3)
    result = integrate(lambda z, t: target - noise, noise, time_grid(3, 2.0), solver)
    torch.testing.assert_close(result, target)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpm", 2)])
def test_error_falls_with_the_order_of_the_solver(solver, order):
    errors = []
    for steps in (32, 64, 128):
        result = integrate(lambda z, t: z * math.cos(3 * t), torch.ones(1), time_grid(steps), solver)
        errors.append(abs(result.item() - math.exp(math.sin(3) / 3)))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.3 for slope in slopes), slopes


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm"])
def test_the_field_is_never_evaluated_at_the_data_end(solver):
    seen = []
    integrate(lambda z, t: seen.append(t) or z, torch.ones(1), time_grid(6), solver)
    assert seen[0] == 0.0
    assert max(seen) < 1.0
    assert len(seen) == {"euler": 6, "heun": 11, "dpm": 6}[solver]


def test_state_stays_float32_under_a_low_precision_field():
    result = integrate(lambda z, t: (z * 0 + 1e-3).bfloat16(), torch.ones(2), time_grid(100))
    assert result.dtype == torch.float32
    assert result[0].item() == pytest.approx(1 + 1e-3, abs=1e-5)  # bfloat16 sums would stay at 1


def test_noise_depends_on_its_own_seed_only():
    alone = noise_from_seeds([7], (5, 2), "prior")
    among = noise_from_seeds([3, 7, 1], (5, 2), "prior")
    assert torch.equal(alone[0], among[1])
    assert not torch.equal(among[0], among[2])
    assert not torch.equal(alone, noise_from_seeds([7], (5, 2), "decoder"))
