"""The plan's figures against the modules themselves, on the meta device. One process, seconds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from unicom_dist.cli.main import run
from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.backbone import Part, Qwen2
from unicom_dist.models.sharding import outline
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.parallel import cross_entropy
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.plan import memory
from unicom_dist.plan.memory import Batch, in_flight, layer_activations, rank_layer_activations, rank_memory
from unicom_dist.plan.parameters import Sizes, layer_matrices, parameters, pp_ranks, rank_parameters

SIZES = Sizes(vocabulary=151, latent_channels=6, feature_channels=10)
SMALL = PriorConfig(hidden=32, layers=5, heads=4, kv_heads=2, ffn=48, tie_embeddings=False)
TIED = SMALL.model_copy(update={"tie_embeddings": True})
# hidden, layers, query and key-value heads, MLP, vocabulary, tied: parameters (transformers, perf. of published models)
PUBLISHED = {
    (896, 24, 14, 2, 4864, 151936, True): 494_032_768,
    (1536, 28, 12, 2, 8960, 151936, True): 1_543_714_304,
    (3584, 28, 28, 4, 18944, 152064, False): 7_615_616_512,
    (8192, 80, 64, 8, 29568, 152064, False): 72_706_203_648,
}


def prior_of(shape: tuple[int, int, int, int, int, int, bool]) -> PriorConfig:
    h, layers, heads, kv, ffn, _, tied = shape
    return PriorConfig(hidden=h, layers=layers, heads=heads, kv_heads=kv, ffn=ffn, tie_embeddings=tied)


@pytest.mark.parametrize("shape", PUBLISHED)
def test_backbones_have_the_published_sizes(shape: tuple[int, int, int, int, int, int, bool]) -> None:
    prior, sizes = prior_of(shape), Sizes(shape[5], 64, 1152)
    with torch.device("meta"):
        model = Transfusion(prior, shape[5], 64, 1152)
    assert isinstance(model.backbone, Qwen2)
    assert sum(p.numel() for p in model.backbone.parameters()) == PUBLISHED[shape]
    assert sum(p.numel() for p in model.parameters()) == parameters(prior, sizes)


@contextmanager
def playing(layout: Layout, rank: int) -> Iterator[Mesh]:
    """The mesh of one rank; its process group communicates with nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        yield init_mesh(layout)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("prior", [SMALL, TIED], ids=["own head", "tied"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2),
        Layout(tp=4),  # more ranks than key-value heads
        Layout(pp=2),
        Layout(pp=2, pp_stages_per_rank=2, schedule="interleaved"),
        Layout(pp=3, tp=2, sequence_parallel=True),
    ],
    ids=str,
)
def test_a_rank_holds_exactly_the_planned_parameters(prior: PriorConfig, layout: Layout) -> None:
    ranks = pp_ranks(prior, SIZES, layout)
    for pp in range(layout.pp):
        part = Part(pp == 0, pp == layout.pp - 1, ranks[pp])
        with playing(layout, pp * layout.tp) as mesh:
            module = outline(prior, SIZES.vocabulary, 6, 10, mesh, part)
        assert sum(p.numel() for p in module.parameters()) == rank_parameters(prior, SIZES, layout, pp)


def test_layer_matrices_are_what_a_position_is_multiplied_with() -> None:
    with torch.device("meta"):
        layer = Qwen2(SMALL, 11).model.layers["0"]
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert matrices == layer_matrices(SMALL)


def test_activations_of_a_layer_in_numbers() -> None:
    """7B: A = 12 + 4/7 + 6 * 5.2857 + 4 * 28 / 3584 = 44.3 bytes per position and channel."""
    prior = prior_of(list(PUBLISHED)[2])
    a, h, r = layer_activations(prior, "none"), 3584, 18944 / 3584
    assert a / h == pytest.approx(44.317, abs=1e-3)
    assert layer_activations(prior, "selective") / h == pytest.approx(a / h - 4 - 2 * r)
    assert layer_activations(prior, "full") == 2 * h


def test_sequence_parallelism_divides_all_and_tensor_parallelism_what_is_within() -> None:
    whole = rank_layer_activations(SMALL, Layout())
    assert rank_layer_activations(SMALL, Layout(tp=2, sequence_parallel=True)) == whole / 2
    assert rank_layer_activations(SMALL, Layout(tp=2)) == (whole - 8 * 32) / 2 + 8 * 32
    assert rank_layer_activations(SMALL, Layout(ulysses=2)) == whole / 2


@pytest.mark.parametrize(
    ("layout", "first", "last"),
    [
        (Layout(pp=4, schedule="gpipe"), 16, 16),
        (Layout(pp=4, schedule="1f1b"), 4, 1),
        (Layout(pp=4, schedule="interleaved", pp_stages_per_rank=2), 5.5, 2.5),
    ],
)
def test_micro_batches_in_flight(layout: Layout, first: float, last: float) -> None:
    assert in_flight(layout, 16, 0) == first
    assert in_flight(layout, 16, layout.pp - 1) == last


def test_states_per_parameter() -> None:
    batch, sizes = Batch(64, 0.5, 2), Sizes(4096, 6, 10)
    by_stage = {stage: rank_memory(SMALL, sizes, Layout(dp=4, zero_stage=stage), batch, 0) for stage in (0, 1, 3)}
    held = parameters(SMALL, sizes)
    per = {s: (m.weights / held, m.gradients / held, m.optimizer / held) for s, m in by_stage.items()}
    assert per[0] == (2, 6, 12)
    assert per[1] == pytest.approx((2, 3, 3), rel=1e-4)
    assert per[3] == pytest.approx((0.5, 3, 3), rel=1e-4)


def test_the_head_is_planned_with_the_chunk_that_is_used() -> None:
    assert memory.CHUNK_LOGITS == cross_entropy.CHUNK_LOGITS


def test_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "recipes/tiny.yaml", "--gpus", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["ranks"][0]["parameters"] == found["parameters"]
    seven = ["prior.hidden=3584", "prior.heads=28", "prior.kv_heads=4", "prior.ffn=18944", "prior.layers=28"]
    assert run(["plan", "recipes/tiny.yaml", *seven, "parallel.zero_stage=0", "--gpus", "1", "--hardware", "h100"]) == 2
    assert "does NOT fit" in capsys.readouterr().out
