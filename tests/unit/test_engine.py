"""The plain engine against a hand-written AdamW loop, and what it promises about state. One process."""

import pytest
import torch
from torch import nn

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.parallel.engine import OptimizerConfig, decay_groups, whole_tensors
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.plain import PlainEngine

ALONE = Mesh(0, 1, torch.device("cpu"))
LR = 1e-2


def network(freeze: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 11), nn.GELU(), nn.LayerNorm(11), nn.Linear(11, 3))
    if freeze:
        module[0].requires_grad_(False)
    return module


def data(step: int, micro: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + micro))


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return out.float().square().sum() / 16


def train(engine: PlainEngine, steps: range) -> list[float]:
    norms = []
    for step in steps:
        with engine.accumulate():
            for micro in range(2):
                engine.backward(loss_of(engine(data(step, micro).to(next(engine.module.parameters()).dtype))))
        norms.append(engine.step(LR))
    return norms


def by_hand(module: nn.Module, config: OptimizerConfig, steps: int) -> list[float]:
    matrices, vectors, _ = decay_groups(module)
    groups = [
        {"params": [p for _, p in matrices], "weight_decay": config.weight_decay},
        {"params": [p for _, p in vectors], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=config.betas, eps=config.eps)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            loss_of(module(data(step, micro))).backward()
        trained = [p for p in module.parameters() if p.requires_grad]
        norms.append(float(nn.utils.clip_grad_norm_(trained, config.clip)))
        optimizer.step()
    return norms


@pytest.mark.parametrize("freeze", [False, True])
def test_steps_equal_a_hand_written_loop(freeze):
    config = OptimizerConfig(precision="float32", clip=0.5)
    engine, reference = PlainEngine(network(freeze), config, ALONE), network(freeze)
    norms, expected = train(engine, range(4)), by_hand(reference, config, 4)
    assert norms == pytest.approx(expected, rel=1e-5)
    assert max(norms) > config.clip  # so clipping was tested
    for (name, got), (_, wanted) in zip(engine.module.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(got, dict(network().named_parameters())[name]) == (freeze and name.startswith("0."))


def test_bfloat16_computes_low_and_remembers_high():
    engine = PlainEngine(network(), OptimizerConfig(precision="bfloat16"), ALONE)
    before = [weight.clone() for weight in engine.state()["weight"]]
    train(engine, range(3))
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    whole = dict(whole_tensors(ALONE, engine.state()["weight"], engine.fragments, True, torch.float32))
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, whole[name].bfloat16())
    rounded = sum(float((weight - weight.bfloat16()).abs().sum()) for weight in engine.state()["weight"])
    assert rounded > 0  # the master weights hold more than the module sees
    assert not torch.equal(before[0], engine.state()["weight"][0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loading_a_state_continues_bit_for_bit(precision):
    engine = PlainEngine(network(), OptimizerConfig(precision=precision), ALONE)
    train(engine, range(2))
    saved = {kind: [b.clone() for b in buffers] for kind, buffers in engine.state().items()}
    train(engine, range(2, 4))
    other = PlainEngine(network(), OptimizerConfig(precision=precision), ALONE)
    other.load_state(saved, 2)
    train(other, range(2, 4))
    for kind, buffers in engine.state().items():
        assert all(torch.equal(a, b) for a, b in zip(buffers, other.state()[kind], strict=True)), kind


def test_a_gradient_that_is_not_finite_touches_nothing_and_is_gone_in_the_next_step():
    engine = PlainEngine(network(), OptimizerConfig(precision="float32"), ALONE)
    train(engine, range(1))
    before = {kind: [b.clone() for b in buffers] for kind, buffers in engine.state().items()}
    with engine.accumulate():
        engine.backward(engine(torch.full((8, 6), float("nan"))).sum())
    with pytest.raises(NonFiniteError):
        engine.step(LR)
    for kind, buffers in engine.state().items():
        assert all(torch.equal(a, b) for a, b in zip(buffers, before[kind], strict=True)), kind
    train(engine, range(1, 2))


def test_only_matrices_are_decayed():
    module = network(freeze=True)
    matrices, vectors, frozen = ([name for name, _ in group] for group in decay_groups(module))
    assert matrices == ["3.weight"]
    assert vectors == ["2.weight", "2.bias", "3.bias"]
    assert frozen == ["0.weight", "0.bias"]
