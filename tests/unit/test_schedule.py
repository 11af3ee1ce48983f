"""Learning rate and moving average. One process."""

import pytest
import torch

from unicom_dist.config.schema import StageConfig
from unicom_dist.train.ema import Ema
from unicom_dist.train.schedule import learning_rate


def stage(**values: object) -> StageConfig:
    return StageConfig.model_validate({"name": "s", "kind": "codec", "steps": 100, "lr": 2.0, "warmup": 10, **values})


def test_warm_up_is_linear_and_reaches_the_peak():
    rates = [learning_rate(stage(), step) for step in range(10)]
    assert rates == pytest.approx([0.2 * (step + 1) for step in range(10)])


def test_constant_stays_and_cosine_falls_to_its_share():
    assert {learning_rate(stage(), step) for step in range(10, 100)} == {2.0}
    cosine = [learning_rate(stage(schedule="cosine", min_lr_ratio=0.25), step) for step in range(10, 101)]
    assert cosine[0] == 2.0
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[45] == pytest.approx(2.0 * (0.25 + 0.75 * 0.5))
    assert cosine[-1] == pytest.approx(0.5)


def test_average_is_the_recurrence_with_a_decay_shortened_at_the_start():
    weights = [torch.zeros(3), torch.zeros(0)]
    ema = Ema({"weight": weights, "exp_avg": weights}, 0.9)
    expected = 0.0
    for n in range(1, 200):
        weights[0].fill_(n)
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    torch.testing.assert_close(ema.buffers[0], torch.full((3,), expected))


def test_without_decay_the_average_is_the_weights():
    weights = [torch.randn(5)]
    ema = Ema({"weight": weights, "exp_avg": weights}, 0.0)
    weights[0].mul_(3)
    ema.update()
    torch.testing.assert_close(ema.buffers[0], weights[0])


def test_frozen_weights_are_their_own_average():
    trained, frozen = torch.zeros(2), torch.ones(3)
    ema = Ema({"weight": [trained, frozen], "exp_avg": [torch.zeros(2), torch.zeros(0)]}, 0.9)
    assert ema.buffers[1] is frozen
    trained.fill_(1.0)
    ema.update()
    assert 0 < ema.buffers[0][0] < 1
    ema.load([torch.full((2,), 5.0), torch.ones(3)], 7)
    assert (ema.buffers[0].tolist(), ema.buffers[1] is frozen, ema.updates) == ([5.0, 5.0], True, 7)
