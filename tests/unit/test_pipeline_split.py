"""Layers to pp_stages: against every possible cut."""

import itertools

import pytest

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import PriorConfig
from unicom_dist.parallel.pipeline.split import LayerCosts, by_rank, estimate, split


def every_cut(count: int, pp_stages: int):
    for cuts in itertools.combinations(range(1, count), pp_stages - 1):
        yield [range(a, b) for a, b in itertools.pairwise((0, *cuts, count))]


@pytest.mark.parametrize("pp_stages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("ends", [(0.0, 0.0), (0.3, 2.5), (4.0, 0.0), (0.1, 30.0)])
def test_no_cut_has_a_faster_slowest_stage(pp_stages, ends):
    costs = LayerCosts([1, 1, 2, 1, 3, 1, 1], *ends)
    found = split(costs, pp_stages)
    slowest = min(max(map(costs.of, cut)) for cut in every_cut(7, pp_stages))
    assert max(map(costs.of, found)) == pytest.approx(slowest)
    best = [cut for cut in every_cut(7, pp_stages) if max(map(costs.of, cut)) <= slowest + 1e-9]
    assert sum(costs.of(s) ** 2 for s in found) == pytest.approx(min(sum(costs.of(s) ** 2 for s in c) for c in best))
    assert [layer for part in found for layer in part] == list(range(7))


def test_equal_layers_are_dealt_evenly_and_a_heavy_head_gets_fewer():
    assert [len(part) for part in split(LayerCosts([1.0] * 8), 4)] == [2, 2, 2, 2]
    assert sorted(len(part) for part in split(LayerCosts([1.0] * 10), 4)) == [2, 2, 3, 3]
    assert [len(part) for part in split(LayerCosts([1.0] * 8, 0.0, 2.0), 2)] == [5, 3]


def test_chunks_of_a_rank_are_every_p_th_stage():
    stages = split(LayerCosts([1.0] * 8), 4)
    assert by_rank(stages, 2) == [(range(2), range(4, 6)), (range(2, 4), range(6, 8))]


def test_estimated_head_of_a_small_model_weighs_several_layers():
    costs = estimate(PriorConfig(), 151936, 64, 768, text=0.4)
    # Qwen2.5-0.5B: 2.15 GFLOP a position in 24 layers, 0.82 in the head at text positions.
    assert sum(costs.layers) == pytest.approx(2.15e9, rel=0.01)
    assert costs.head == pytest.approx(0.4 * 0.82e9, rel=0.01)
    assert 3 < costs.head / costs.layers[0] < 4
    assert len(split(costs, 4)[-1]) < 6


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError) as error:
        split(LayerCosts([1.0] * 3), 4)
    assert "at least one layer" in error.value.why
    assert "1 to 3" in error.value.remedy
