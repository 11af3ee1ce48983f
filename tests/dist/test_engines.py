"""Engines on two gloo ranks against one process: norms, weights, frozen parts, ranks without a modality, state.

One start of two processes does everything (DeepSpeed's import takes seconds); the tests look at what it brought back.
"""

import itertools
import os

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig
from unicom_dist.parallel.deepspeed_config import deepspeed_config
from unicom_dist.parallel.engine import Buffers, Engine, OptimizerConfig, whole_tensors
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.parallel.plain import PlainEngine
from unicom_dist.parallel.zero import ZeroEngine
from unicom_dist.testing.communication import Communication
from unicom_dist.testing.distributed import run_ranks

pytestmark = pytest.mark.dist
STEPS, WORLD, LR = 4, 2, 1e-2
STAGES = [0, 1, 2, 3]
PRECISIONS = ["float32", "bfloat16"]
MODELS = [(precision, freeze) for precision in PRECISIONS for freeze in (False, True)]
LARGE = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "prefetch_bucket_size", "max_reuse_distance")}
WAYS = {  # options of the engine, whether all forwards of a step come first, activations recomputed
    "gather once": ({"gather_once": True}, False, False),
    "gather once, forwards first": ({"gather_once": True}, True, False),
    "forwards first, recomputed": ({"extra": {"zero_optimization": LARGE}}, True, True),
    "second copy of the weights": ({"extra": {"zero_optimization": {"zero_hpz_partition_size": 2}}}, True, False),
    "weights and state on the CPU": ({"offload": "cpu"}, False, False),
}


def engine_of(
    stage: int,
    module: nn.Module,
    precision: str,
    mesh: Mesh,
    gather_once: bool = False,
    offload: str = "none",
    extra: dict[str, object] | None = None,
) -> Engine:
    """The engine of a ZeRO stage."""
    config = OptimizerConfig(precision=precision, clip=0.5)
    if stage == 0:
        return PlainEngine(module, config, mesh)
    layout = Layout(dp=mesh.world, zero_stage=stage, gather_once=gather_once)
    settings = deepspeed_config(ParallelConfig(offload=offload, zero_stage=stage), layout, precision, extra)
    return ZeroEngine(module, config, mesh, settings, gather_once=gather_once)


class TwoTowers(nn.Module):
    """Two inputs, either of which may have no rows; both towers always run, `sometimes` only where x is given."""

    def __init__(self, freeze: bool = False, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(5, 7), nn.Linear(3, 7)
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3)  # 3 and 7 do not divide by two: padded fragments
        self.sometimes = nn.Linear(3, 3)
        self.register_buffer("table", torch.linspace(0, 1, 7) / 3, persistent=False)
        self.recompute = recompute
        if freeze:
            self.left.requires_grad_(False)

    def towers(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([self.left(left), self.right(right)])
        return self.head(self.norm(rows + self.table.to(rows.dtype)))

    def forward(
        self, batch: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor | None = None, chunk: int = 0
    ) -> torch.Tensor:
        inputs = [part.to(self.norm.weight.dtype) for part in batch]
        out = checkpoint(self.towers, *inputs, use_reentrant=False) if self.recompute else self.towers(*inputs)
        return (out if x is None else self.sometimes(out) + x).float()


def micro_batch(step: int, rank: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0 has no right rows in odd steps, rank 1 no left rows in even ones: nobody may hang."""
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    left = 0 if rank == 1 and step % 2 == 0 else 4
    right = 0 if rank == 0 and step % 2 == 1 else 2 + rank
    return torch.randn(left, 5, generator=generator), torch.randn(right, 3, generator=generator)


def rows_of(step: int) -> int:
    parts = [micro_batch(step, rank, micro) for rank in range(WORLD) for micro in range(2)]
    return sum(len(part) for pair in parts for part in pair)


def train(engine: Engine, ranks: list[int], steps: range, forwards_first: bool = False) -> list[float]:
    """Each rank its own samples; one process all of them, as more micro-batches. Step 1 alone uses all layers.

    `forwards_first`: as an inner pp_stage of a pipeline, which keeps the place in the graph and is given gradients.
    """
    norms = []
    for step in steps:
        with engine.accumulate():
            waiting = []
            for rank, micro in itertools.product(ranks, range(2)):
                out = engine(micro_batch(step, rank, micro), torch.ones(1) if step == 1 else None)
                scale = engine.mesh.zero.size / rows_of(step)
                if forwards_first:
                    waiting.append((get_gradient_edge(out), 2 * out.detach() * scale))
                else:
                    engine.backward(out.square().sum() * scale)
            for edge, gradient in waiting:
                engine.backward([edge], [gradient])
        norms.append(engine.step(LR))
    return norms


def whole(engine: Engine, buffers: Buffers) -> dict[str, torch.Tensor]:
    """Every tensor, on rank 0. Collective."""
    return dict(whole_tensors(engine.mesh, buffers, engine.fragments, engine.replicated, torch.float32))


def work(rank: int, world: int) -> dict[object, object]:
    """Everything this file looks at, from one rank."""
    os.environ["TORCH_EXTENSIONS_DIR"] = "/dev/null/nowhere"  # what is compiled would have to be put here
    os.environ["PATH"] = ""  # and there is no compiler
    mesh, result = init_mesh(timeout_s=60), {}
    for stage, (precision, freeze) in itertools.product(STAGES, MODELS):
        engine = engine_of(stage, TwoTowers(freeze), precision, mesh)
        norms = train(engine, [rank], range(STEPS))
        result[stage, precision, freeze] = (norms, whole(engine, engine.state()["weight"]))
        if not freeze:
            result["continues", stage, precision] = continues(engine, stage, precision, rank)
        if precision == "float32" and not freeze:
            result["held", stage] = sum(buffer.numel() for buffer in engine.state()["weight"])
            result["gradients", stage] = gradients(engine, rank)
            result["not finite", stage] = not_finite(engine)
            result["table", stage] = engine.module.table.clone()
        if precision == "bfloat16" and freeze:
            result["using", stage] = using(engine)
        engine.close()
    for way, (options, forwards_first, recompute) in WAYS.items():
        for stage, precision in itertools.product([1, 3] if "offload" in options else [3], PRECISIONS):
            engine = engine_of(stage, TwoTowers(recompute=recompute), precision, mesh, **options)
            norms = train(engine, [rank], range(STEPS - 1), forwards_first)
            with Communication() as counted:
                norms += train(engine, [rank], range(STEPS - 1, STEPS), forwards_first)
            result[way, stage, precision] = (norms, whole(engine, engine.state()["weight"]))
            result["calls", way] = counted.calls
            engine.close()
    return result


def continues(engine: Engine, stage: int, precision: str, rank: int) -> bool:
    """Whether a new engine with this one's state goes on bit for bit."""
    saved = {kind: [b.clone() for b in buffers] for kind, buffers in engine.state().items()}
    other = engine_of(stage, TwoTowers(), precision, engine.mesh)
    other.load_state(saved, engine.steps_done)
    train(engine, [rank], range(STEPS, STEPS + 2))
    train(other, [rank], range(STEPS, STEPS + 2))
    same = all(
        torch.equal(a, b)
        for kind, buffers in engine.state().items()
        for a, b in zip(buffers, other.state()[kind], strict=True)
    )
    other.close()
    return same


def gradients(engine: Engine, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(of the engine, of the same weights in one process) for the samples of both ranks."""
    alone = TwoTowers()
    weights = engine.mesh.broadcast_object(whole(engine, engine.state()["weight"]))
    alone.load_state_dict(weights)
    with engine.accumulate():
        engine.backward(engine(micro_batch(0, rank, 0)).square().sum() * WORLD)
    for number in range(WORLD):
        alone(micro_batch(0, number, 0)).square().sum().backward()
    buffers = engine.gradients()
    found = whole(engine, buffers)
    engine.step(0.0)
    return found, {name: torch.zeros(p.shape) if p.grad is None else p.grad for name, p in alone.named_parameters()}


def using(engine: Engine) -> list[bool]:
    """Outputs with other weights equal those of a module that has them; afterwards everything is as it was."""
    batch = (torch.ones(2, 5), torch.ones(1, 3))
    half = [0.5 * buffer for buffer in engine.state()["weight"]]
    other = TwoTowers(True).bfloat16()
    other.load_state_dict(engine.mesh.broadcast_object(whole(engine, half)))
    other.table = engine.module.table.clone()
    with torch.no_grad():
        before = engine(batch)
        with engine.using(half):
            within = engine(batch)
        return [torch.equal(within, other(batch)), torch.equal(engine(batch), before), not torch.equal(within, before)]


def not_finite(engine: Engine) -> tuple[bool, bool, bool]:
    """(raised, weights unchanged, goes on) after rank 0 alone saw a number that is not finite."""
    before = [b.clone() for buffers in engine.state().values() for b in buffers]
    poison = float("nan") if engine.mesh.rank == 0 else 1.0
    with engine.accumulate():
        engine.backward(engine((torch.full((2, 5), poison), torch.ones(2, 3))).sum())
    try:
        engine.step(LR)
        return False, False, False
    except NonFiniteError:
        after = [b for buffers in engine.state().values() for b in buffers]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return True, same, train(engine, [engine.mesh.rank], range(1))[0] > 0


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(work, WORLD, timeout_s=280)


@pytest.fixture(scope="module")
def alone():
    mesh, result = Mesh(0, 1, torch.device("cpu")), {}
    for precision, freeze in MODELS:
        engine = engine_of(0, TwoTowers(freeze), precision, mesh)
        norms = train(engine, [0, 1], range(STEPS))
        result[precision, freeze] = (norms, whole(engine, engine.state()["weight"]))
    return result


def check(ranks, expected, key, precision):
    norms, weights = expected
    tolerance = 1e-5 if precision == "float32" else 3e-2  # low-precision gradients add up in another order
    for rank in ranks:
        assert rank[key][0] == pytest.approx(norms, rel=tolerance)
    got = ranks[0][key][1]
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight, rtol=tolerance, atol=tolerance / 3, msg=name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("precision", "freeze"), MODELS)
def test_two_ranks_train_as_one_process(ranks, alone, stage, precision, freeze):
    check(ranks, alone[precision, freeze], (stage, precision, freeze), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_the_ways_to_run_a_step_train_the_same_weights(ranks, alone, way, precision):
    for stage in (1, 3) if "CPU" in way else (3,):
        check(ranks, alone[precision, False], (way, stage, precision), precision)


def test_gather_once_gathers_and_reduces_once(ranks):
    for way in ("gather once", "gather once, forwards first"):
        calls = ranks[0]["calls", way]
        assert (calls["all-gather"], calls["reduce-scatter"], calls["all-reduce"]) == (1, 1, 0)
    assert ranks[0]["calls", "forwards first, recomputed"]["all-gather"] > 1


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_equal_one_process(ranks, stage):
    got, expected = ranks[0]["gradients", stage]
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_deepspeed_compiles_nothing(ranks):
    assert ranks  # `work` left it neither a compiler nor a folder for the result


def test_frozen_weights_stay_exactly(ranks):
    for stage, precision in itertools.product(STAGES, PRECISIONS):
        _, weights = ranks[0][stage, precision, True]
        assert torch.equal(weights["left.weight"], TwoTowers().left.weight)
        assert not torch.equal(weights["right.weight"], TwoTowers().right.weight)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_holds_half_of_the_state_on_each_of_two_ranks(ranks, stage):
    total = sum(p.numel() for p in TwoTowers().parameters())
    padding = len(list(TwoTowers().parameters()))
    for rank in ranks:
        assert total / 2 <= rank["held", stage] <= total / 2 + padding


@pytest.mark.parametrize("stage", STAGES)
def test_position_tables_stay_in_float32(ranks, stage):
    assert torch.equal(ranks[0]["table", stage], TwoTowers().table)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_continues_bit_for_bit_from_its_own_state(ranks, stage):
    assert all(rank["continues", stage, precision] for rank in ranks for precision in PRECISIONS)


@pytest.mark.parametrize("stage", STAGES)
def test_averaged_weights_serve_a_forward_pass_and_go(ranks, stage):
    assert all(all(rank["using", stage]) for rank in ranks)


@pytest.mark.parametrize("stage", STAGES)
def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_the_update(ranks, stage):
    assert [rank["not finite", stage] for rank in ranks] == [(True, True, True)] * WORLD
