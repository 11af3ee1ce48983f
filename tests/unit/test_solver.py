"""Solvers of the sampling equation. One process, milliseconds."""

import itertools
import math

import pytest
import torch

from unicom_dist.sample.solver import integrate, noise_from_seeds, time_grid


def test_time_grid_of_four_shifted_steps_is_the_flux_schedule():
    assert time_grid(4, 3.0) == pytest.approx([1 - s for s in (1, 0.9, 0.75, 0.5, 0)])


def test_unshifted_grid_is_even_and_ends_are_exact():
    assert time_grid(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for shift in (0.3, 1.0, 7.0):
        grid = time_grid(9, shift)
        assert (grid[0], grid[-1]) == (0.0, 1.0)
        assert all(a < b for a, b in itertools.pairwise(grid))


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-1, 1.0), (3, 0.0)])
def test_impossible_grids_are_refused(steps, shift):
    with pytest.raises(ValueError, match="steps >= 1"):
        time_grid(steps, shift)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_constant_field_is_solved_exactly(solver):
    target, noise = torch.randn(4, 3), torch.randn(4, 3)
    result = integrate(lambda z, t: target - noise, noise, time_grid(3, 2.0), solver)
    torch.testing.assert_close(result, target)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_error_falls_with_the_order_of_the_solver(solver, order):
    errors = []
    for steps in (32, 64, 128):
        result = integrate(lambda z, t: z * math.cos(3 * t), torch.ones(1), time_grid(steps), solver)
        errors.append(abs(result.item() - math.exp(math.sin(3) / 3)))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.3 for slope in slopes), slopes


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_field_is_never_evaluated_at_the_data_end(solver):
    seen = []
    integrate(lambda z, t: seen.append(t) or z, torch.ones(1), time_grid(6), solver)
    assert seen[0] == 0.0
    assert max(seen) < 1.0
    assert len(seen) == {"euler": 6, "heun": 11}[solver]


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
