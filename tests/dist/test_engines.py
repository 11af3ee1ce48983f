"""Engines on two gloo ranks against one process: gradients, norms, weights, frozen parts, ranks without a modality.

One start of two processes does everything (DeepSpeed's import takes seconds); the tests look at what it brought back.
"""

import itertools
import os

import pytest
import torch
from torch import nn

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig
from unicom_dist.parallel.deepspeed_config import deepspeed_config
from unicom_dist.parallel.engine import Engine, OptimizerConfig, whole_tensors
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.parallel.plain import PlainEngine
from unicom_dist.parallel.zero import ZeroEngine
from unicom_dist.testing.distributed import run_ranks

pytestmark = pytest.mark.dist
STEPS, WORLD, LR = 4, 2, 1e-2
CASES = [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
STAGES = [0, 1, 2, 3]


def engine_of(stage: int, module: nn.Module, precision: str, mesh: Mesh, **options: object) -> Engine:
    """The engine of a ZeRO stage."""
    config = OptimizerConfig(precision=precision, clip=0.5)
    if stage == 0:
        return PlainEngine(module, config, mesh)
    layout = Layout(dp=mesh.world, zero_stage=stage, **options)
    return ZeroEngine(
        module, config, mesh, deepspeed_config(ParallelConfig(), layout, precision), gather_once=layout.gather_once
    )


class TwoTowers(nn.Module):
    """Two inputs, either of which may have no rows; both towers always run."""

    def __init__(self, freeze: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(5, 7), nn.Linear(3, 7)
        self.norm, self.head = nn.LayerNorm(7), nn.Linear(7, 3)  # 3 and 7 do not divide by two: padded fragments
        self.register_buffer("table", torch.linspace(0, 1, 7) / 3, persistent=False)
        if freeze:
            self.left.requires_grad_(False)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        dtype = self.norm.weight.dtype
        rows = torch.cat([self.left(batch[0].to(dtype)), self.right(batch[1].to(dtype))])
        return self.head(self.norm(rows + self.table.to(dtype))).float()


def micro_batch(step: int, rank: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 0 has no right rows in odd steps, rank 1 no left rows in even ones: nobody may hang."""
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    left = 0 if rank == 1 and step % 2 == 0 else 4
    right = 0 if rank == 0 and step % 2 == 1 else 2 + rank
    return torch.randn(left, 5, generator=generator), torch.randn(right, 3, generator=generator)


def rows_of(step: int) -> int:
    parts = [micro_batch(step, rank, micro) for rank in range(WORLD) for micro in range(2)]
    return sum(len(part) for pair in parts for part in pair)


def train(engine: Engine, ranks: list[int], steps: range) -> list[float]:
    """Each rank its own samples; one process all of them, as more micro-batches."""
    norms = []
    for step in steps:
        with engine.accumulate():
            for rank in ranks:
                for micro in range(2):
                    out = engine(micro_batch(step, rank, micro))
                    engine.backward(out.square().sum() / rows_of(step) * engine.mesh.zero.size)
        norms.append(engine.step(LR))
    return norms


def work(rank: int, world: int) -> dict[str, object]:
    """Everything this file looks at, from one rank."""
    os.environ["TORCH_EXTENSIONS_DIR"] = "/dev/null/nowhere"  # what is compiled would have to be put here
    os.environ["PATH"] = ""  # and there is no compiler
    mesh, result = init_mesh(timeout_s=60), {}
    for precision, freeze in CASES:
        for stage in STAGES:
            engine = engine_of(stage, TwoTowers(freeze), precision, mesh)
            norms = train(engine, [rank], range(STEPS))
            weights = dict(
                whole_tensors(engine.mesh, engine.state()["weight"], engine.fragments, engine.replicated, torch.float32)
            )
            result[stage, precision, freeze] = (norms, weights)
            if stage == 3 and precision == "float32" and not freeze:
                result["held"] = sum(buffer.numel() for buffer in engine.state()["weight"])
                result["table"] = engine.module.table.clone()
                result["continues"] = continues(engine, mesh, rank)
                result["not finite"] = not_finite(engine)
            engine.close()
    return result


def continues(engine: Engine, mesh: Mesh, rank: int) -> bool:
    """Whether a new engine with this one's state goes on bit for bit."""
    saved = {kind: [b.clone() for b in buffers] for kind, buffers in engine.state().items()}
    other = engine_of(3, TwoTowers(False), "float32", mesh)
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


def not_finite(engine: Engine) -> tuple[bool, bool]:
    """(raised, weights unchanged) after rank 0 alone saw a number that is not finite."""
    before = [b.clone() for buffers in engine.state().values() for b in buffers]
    poison = float("nan") if engine.mesh.rank == 0 else 1.0
    with engine.accumulate():
        engine.backward(engine((torch.full((2, 5), poison), torch.ones(2, 3))).sum())
    try:
        engine.step(LR)
        return False, False
    except NonFiniteError:
        after = [b for buffers in engine.state().values() for b in buffers]
        return True, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(work, WORLD, timeout_s=240)


@pytest.fixture(scope="module")
def alone():
    mesh, result = Mesh(0, 1, torch.device("cpu")), {}
    for precision, freeze in CASES:
        engine = PlainEngine(TwoTowers(freeze), OptimizerConfig(precision=precision, clip=0.5), mesh)
        norms = train(engine, [0, 1], range(STEPS))
        result[precision, freeze] = (
            norms,
            dict(
                whole_tensors(engine.mesh, engine.state()["weight"], engine.fragments, engine.replicated, torch.float32)
            ),
        )
    return result


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("precision", "freeze"), CASES)
def test_two_ranks_train_as_one_process(ranks, alone, stage, precision, freeze):
    norms, weights = alone[precision, freeze]
    tolerance = 1e-5 if precision == "float32" else 3e-2  # low-precision gradients add up in another order
    for rank in ranks:
        assert rank[stage, precision, freeze][0] == pytest.approx(norms, rel=tolerance)
    got = ranks[0][stage, precision, freeze][1]
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight, rtol=tolerance, atol=tolerance / 3, msg=name)


def test_deepspeed_compiles_nothing(ranks):
    assert ranks  # `work` left it neither a compiler nor a folder for the result


def test_frozen_weights_stay_exactly(ranks):
    for stage, precision in itertools.product(STAGES, ("float32", "bfloat16")):
        _, weights = ranks[0][stage, precision, True]
        assert torch.equal(weights["left.weight"], TwoTowers(True).left.weight)
        assert not torch.equal(weights["right.weight"], TwoTowers(True).right.weight)


def test_zero3_holds_half_of_the_weights_on_each_of_two_ranks(ranks):
    whole = sum(p.numel() for p in TwoTowers(False).parameters())
    padding = len(list(TwoTowers(False).parameters()))
    for rank in ranks:
        assert whole / 2 <= rank["held"] <= whole / 2 + padding


def test_zero3_leaves_position_tables_in_float32(ranks):
    assert torch.equal(ranks[0]["table"], TwoTowers(False).table)
    assert ranks[0]["table"].dtype == torch.float32


def test_zero3_continues_bit_for_bit_from_its_own_state(ranks):
    assert all(rank["continues"] for rank in ranks)


def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_the_update(ranks):
    assert [rank["not finite"] for rank in ranks] == [(True, True)] * WORLD
