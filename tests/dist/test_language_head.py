"""The language head on two gloo ranks: a split vocabulary against the whole one and against Megatron; under ZeRO-3.

One start of two processes does everything; the tests look at what it brought back.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig, PriorConfig
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.backbone import Qwen2
from unicom_dist.models.head import LanguageHead
from unicom_dist.models.segments import Segment
from unicom_dist.parallel import cross_entropy
from unicom_dist.parallel.cross_entropy import VocabShard
from unicom_dist.parallel.deepspeed_config import deepspeed_config
from unicom_dist.parallel.engine import OptimizerConfig, whole_tensors
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.parallel.plain import PlainEngine
from unicom_dist.parallel.zero import ZeroEngine
from unicom_dist.testing.distributed import run_ranks

pytestmark = pytest.mark.dist
WIDTH, LABELS, WORLD = 6, 13, 2
VOCABULARIES = [30, 29, 1]  # even; a padded row; a rank with nothing but padding
MODES = ["none", "selective", "full"]
Result = dict[str, torch.Tensor]


def inputs(vocabulary: int, labels: int = LABELS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(labels, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocabulary, WIDTH, generator=draw, dtype=torch.float64)
    ids = torch.randint(vocabulary, (labels,), generator=draw)
    return hidden, weight, ids, torch.linspace(-1, 2, labels, dtype=torch.float64)


def run(head: LanguageHead, hidden: torch.Tensor, ids: torch.Tensor, factors: torch.Tensor | None) -> Result:
    losses = head(hidden, ids)
    (losses.sum() if factors is None else (losses * factors).sum()).backward()
    with torch.no_grad():
        logits = head.logits(hidden)
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": head.weight.grad, "logits": logits}


def split(mesh, vocabulary: int, weighted: bool, labels: int = LABELS) -> Result:
    hidden, weight, ids, factors = inputs(vocabulary, labels)
    rows = -(-vocabulary // WORLD)
    head = LanguageHead(WIDTH, rows).double()
    padded = torch.cat([weight, torch.full((rows * WORLD - vocabulary, WIDTH), 7.0, dtype=torch.float64)])
    head.weight.data = padded[mesh.tp.rank * rows :][:rows].clone()
    head.shard = VocabShard(mesh.tp, vocabulary)
    return run(head, hidden, ids, factors if weighted else None)


def megatron(mesh) -> Result:
    """Megatron's own loss of the same logits, for the even vocabulary."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD)
    hidden, weight, ids, _ = inputs(VOCABULARIES[0])
    mine = weight.float().chunk(WORLD)[mesh.tp.rank].requires_grad_()
    losses = vocab_parallel_cross_entropy(F.linear(hidden.detach().float(), mine), ids)
    losses.sum().backward()
    return {"losses": losses.detach(), "weight": mine.grad}


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(29, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = LanguageHead(WIDTH, 29)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embedding(ids)), ids.flip(0))


class Recomputing(nn.Module):
    """Embedding, two layers and head, with activations recomputed."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        prior = PriorConfig(hidden=8, layers=2, heads=2, kv_heads=1, ffn=12, tie_embeddings=False)
        self.backbone = Qwen2(prior, 29, seed=3)
        self.backbone.model.recompute = mode

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = torch.cat([ids, ids.new_zeros(1)])  # a position without a label
        plan = AttentionPlan.build([Segment(0, "causal", len(tokens))], torch.float32)
        hidden = self.backbone.model(self.backbone.model.embed_tokens(tokens), torch.arange(len(tokens)), plan)
        return self.backbone.lm_head(hidden[:-1], ids.flip(0))


def train(engine, ranks: list[int]) -> dict[str, torch.Tensor]:
    """Three steps; rank 1 has no labels in the second."""
    for step in range(3):
        with engine.accumulate():
            for rank in ranks:
                count = 0 if (rank, step) == (1, 1) else 9
                ids = torch.randint(29, (count,), generator=torch.Generator().manual_seed(10 * step + rank))
                engine.backward(engine(ids).sum() / 18 * (WORLD if len(ranks) == 1 else 1))
        engine.step(1e-2)
    weights = engine.state()["weight"]
    return dict(whole_tensors(engine.mesh, weights, engine.fragments, engine.replicated, torch.float32))


def work(rank: int, world: int) -> dict[object, object]:
    replicas, model = init_mesh(Layout(dp=world)), init_mesh(Layout(tp=world))
    cross_entropy.CHUNK_LOGITS = 4 * 15  # 4 rows a chunk at 15 rows of the weight
    result: dict[object, object] = {}
    for vocabulary in VOCABULARIES:
        for weighted in (False, True):
            result[vocabulary, weighted] = split(model, vocabulary, weighted)
    result["none"] = split(model, 29, False, labels=0)
    result["megatron"] = megatron(model)
    for tied in (False, True):
        released = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # not even small weights stay
        settings = deepspeed_config(ParallelConfig(), Layout(zero_stage=3), "float32", released)
        engine = ZeroEngine(Tied(tied), OptimizerConfig(precision="float32"), replicas, settings)
        result["zero3", tied] = train(engine, [rank])
        engine.close()
    for mode in MODES:
        settings = deepspeed_config(ParallelConfig(), Layout(zero_stage=3), "float32", released)
        engine = ZeroEngine(Recomputing(mode), OptimizerConfig(precision="float32"), replicas, settings)
        result["zero3", mode] = train(engine, [rank])
        engine.close()
    return result


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(work, WORLD, timeout_s=240)


def whole(vocabulary: int, weighted: bool) -> Result:
    hidden, weight, ids, factors = inputs(vocabulary)
    head = LanguageHead(WIDTH, vocabulary).double()
    head.weight.data = weight
    return run(head, hidden, ids, factors if weighted else None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_split_vocabulary_gives_the_same_losses_and_gradients(ranks, vocabulary, weighted):
    expected = whole(vocabulary, weighted)
    found = [rank[vocabulary, weighted] for rank in ranks]
    for result in found:
        for name in ("losses", "hidden", "logits"):
            torch.testing.assert_close(result[name], expected[name], rtol=1e-10, atol=1e-10, msg=name)
    rows = torch.cat([result["weight"] for result in found])
    torch.testing.assert_close(rows[:vocabulary], expected["weight"], rtol=1e-10, atol=1e-10)
    assert not rows[vocabulary:].any()


def test_losses_and_gradients_equal_megatrons(ranks):
    for rank in ranks:
        for name in ("losses", "weight"):
            mine = rank[VOCABULARIES[0], False][name].float()
            torch.testing.assert_close(mine, rank["megatron"][name], rtol=1e-5, atol=1e-6)


def test_no_labels_on_any_rank(ranks):
    for rank in ranks:
        assert rank["none"]["losses"].shape == (0,)
        assert not rank["none"]["weight"].any()


@pytest.mark.parametrize("tied", [False, True])
def test_zero3_trains_the_head_as_one_process(ranks, tied):
    alone = PlainEngine(Tied(tied), OptimizerConfig(precision="float32"), Mesh(0, 1, torch.device("cpu")))
    expected = train(alone, [0, 1])
    found = ranks[0]["zero3", tied]
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=3e-6, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_under_zero3_reads_no_released_weight(ranks, mode):
    alone = PlainEngine(Recomputing("none"), OptimizerConfig(precision="float32"), Mesh(0, 1, torch.device("cpu")))
    expected = train(alone, [0, 1])
    for name, weight in expected.items():
        torch.testing.assert_close(ranks[0]["zero3", mode][name], weight, rtol=1e-5, atol=3e-6, msg=name)
