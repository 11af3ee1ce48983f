"""The plan's figures against the modules themselves, on the meta device, and what these keep. One process, seconds."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from unicom_dist.cli.main import run
from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import PriorConfig, QueryConfig, StageConfig
from unicom_dist.models.backbone import Part, Qwen2
from unicom_dist.models.query_guided import QueryGuided
from unicom_dist.models.sharding import outline
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.parallel import cross_entropy
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.plan import memory
from unicom_dist.plan.activations import (
    Batch,
    asking_positions,
    decoder_layer_activations,
    guide_activations,
    in_flight,
    layer_activations,
    rank_layer_activations,
)
from unicom_dist.plan.memory import rank_memory
from unicom_dist.plan.parameters import (
    Sizes,
    Trained,
    layer_matrices,
    parameters,
    parts,
    pp_ranks,
    rank_parameters,
    rank_parts,
)
from unicom_dist.testing.tiny_batch import tiny_batch

SIZES = Sizes(vocabulary=151, latent_channels=6, feature_channels=10)
SMALL = PriorConfig(hidden=32, layers=5, heads=4, kv_heads=2, ffn=48, tie_embeddings=False)
TIED = SMALL.model_copy(update={"tie_embeddings": True})
QUERY = QueryConfig(enabled=True, queries=5, connector_layers=2, decoder_layers=3, decoder_width=24)
# Two images to be drawn, of 22 latents.
SAMPLES = [[("text", 9), ("latent", 16)], [("feature", 6), ("text", 4), ("latent", 6)], [("text", 23)]]
DRAWN = Batch(64, 0.5, 1, drawn=22, images=2)
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


def counted(module: torch.nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters by the plan's parts: all, and those that an optimizer may move."""
    found: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, p in module.named_parameters():
        part = ".".join(name.split(".")[: 1 + name.startswith("guide.")])
        found[p.requires_grad][part] += p.numel()
    return dict(found[True] + found[False]), dict(found[True])


@pytest.mark.parametrize("prior", [SMALL, TIED, SMALL.model_copy(update={"qk_norm": True})], ids=["own", "tied", "qk"])
@pytest.mark.parametrize(
    "values", [{}, {"trainable": "connector"}, {"query": QUERY}], ids=["all", "connector", "query"]
)
def test_what_a_stage_trains_part_by_part(prior: PriorConfig, values: dict[str, object]) -> None:
    trained = Trained.of(StageConfig(name="stage", kind="prior", steps=1, **values))
    with torch.device("meta"):
        if trained.query is None:
            module = Transfusion(prior, 151, 6, 10)
        else:
            module = QueryGuided(prior, QUERY, 151, 6, 10)
    module.train_only(trained.part)
    whole, moved = counted(module)
    found = parts(prior, SIZES, trained.query)
    assert found == whole == rank_parts(prior, SIZES, Layout(), 0, trained.query)
    assert {name: count for name, count in found.items() if name in trained} == moved


def kept(module: torch.nn.Module) -> int:
    """Bytes that the forward pass over `SAMPLES` keeps for the backward pass, beside the weights."""
    batch, found = tiny_batch(SAMPLES, 151, 6, 10), {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that its place stays taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = module(batch)
    assert outputs[0].isfinite().all()
    return sum(storage.nbytes() for place, storage in found.items() if place not in weights)


def guided(recompute: str, layers: int = 1, connector_layers: int = 1, decoder_layers: int = 1) -> QueryGuided:
    query = QUERY.model_copy(update={"connector_layers": connector_layers, "decoder_layers": decoder_layers})
    module = QueryGuided(SMALL.model_copy(update={"layers": layers}), query, 151, 6, 10)
    module.train_only("all")
    module.backbone.model.recompute = recompute
    return module


def unguided(recompute: str, part: str, layers: int) -> Transfusion:
    module = Transfusion(SMALL.model_copy(update={"layers": layers}), 151, 6, 10)
    module.train_only(part)
    module.backbone.model.recompute = recompute
    return module


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_more_layer_keeps_what_is_planned(recompute: str) -> None:
    """But for the norms' two numbers a position, which the formulas leave out, and a few bytes of attention's."""
    scales = 8 * (recompute == "none")
    for part, frozen in (("all", False), ("connector", True)):
        more = kept(unguided(recompute, part, 3)) - kept(unguided(recompute, part, 2))
        planned = layer_activations(SMALL, recompute, 4, frozen=frozen) + scales
        assert more == pytest.approx(64 * planned, rel=1e-3)
    more = kept(guided(recompute, layers=3)) - kept(guided(recompute, layers=2))
    positions = asking_positions(QUERY, DRAWN)
    assert positions == 64 - 22 + 2 * 5
    planned = layer_activations(SMALL, recompute, 4, frozen=True) + scales
    assert more == pytest.approx(positions * planned, rel=1e-3)


def test_a_guide_keeps_what_is_planned() -> None:
    one = kept(guided("full"))
    connector = kept(guided("full", connector_layers=2)) - one
    assert connector == (layer_activations(SMALL.of_width(32), "none", 4) + 8) * 2 * 5
    decoder = kept(guided("full", decoder_layers=2)) - one
    times = 4 * 2 * QUERY.decoder_width  # of two images, as every layer's modulation reads them
    assert decoder == (decoder_layer_activations(SMALL, QUERY, 4) + 8) * (2 * 5 + 22) + times
    whole = guide_activations(SMALL, QUERY, DRAWN, 4)
    assert whole == pytest.approx(2 * connector + 3 * decoder, rel=0.01)


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


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_frozen_weights_cost_themselves_alone(stage: int) -> None:
    batch, layout = Batch(64, 0.5, 2), Layout(dp=4, zero_stage=stage)
    everything = rank_memory(SMALL, SIZES, layout, batch, 0)
    aligned = rank_memory(SMALL, SIZES, layout, batch, 0, trained=Trained("connector"))
    ranks, backbone = (1 if stage == 0 else 4), parts(SMALL, SIZES)["backbone"]
    assert (aligned.weights, aligned.gathered) == (everything.weights, everything.gathered)
    assert everything.average - aligned.average == pytest.approx(4 * backbone / ranks, rel=1e-3)
    assert everything.optimizer - aligned.optimizer == pytest.approx(8 * backbone / ranks, rel=1e-3)
    assert everything.gradients - aligned.gradients == pytest.approx((2 + 4 / ranks) * backbone, rel=1e-3)
    assert everything.head - aligned.head == 2 * SIZES.vocabulary * SMALL.hidden  # its gradient


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


def test_command_plans_what_a_stage_trains(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for stage in ("alignment", "sft"):
        assert run(["plan", "query_guided", "--stage", stage, "--gpus", "1", "--json"]) == 0
        found[stage] = json.loads(capsys.readouterr().out)
    assert found["alignment"]["trained"] == found["alignment"]["parameters"]
    guide = [name for name, count in found["sft"]["parts"].items() if count["trained"]]
    assert guide == ["guide.queries", "guide.connector", "guide.decoder"]
    assert found["sft"]["trained"] == sum(found["sft"]["parts"][name]["trained"] for name in guide)
    assert found["sft"]["parts"]["backbone"]["frozen"] == found["alignment"]["parts"]["backbone"]["trained"]
    assert found["sft"]["ranks"][0]["optimizer"] < found["alignment"]["ranks"][0]["optimizer"]
    assert run(["plan", "query_guided", "--stage", "sft", "parallel.tp=2"]) == 2
    assert "trained data-parallel only" in capsys.readouterr().err


def test_auto_is_the_precision_of_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for precision in ("auto", "bfloat16", "float32"):
        assert run(["plan", "tiny", f"stages.sft.precision={precision}", "--stage", "sft", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["ranks"])
    assert found[0] == found[1] != found[2]
