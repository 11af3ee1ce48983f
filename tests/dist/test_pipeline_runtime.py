"""Four ranks of a pipeline against one process: gradients under every schedule, in one start of the processes.

The model is a chain of eight blocks. Beside the hidden state a target rides along that nobody differentiates, and a
loss arises in the second pp_stage too. Micro-batches differ in length, one of them has no target rows.
"""

import random
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unicom_dist.parallel.mesh import Axis
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.parallel.pipeline.deferred import WeightGradients, defer
from unicom_dist.parallel.pipeline.runtime import Payload, Pipeline
from unicom_dist.parallel.pipeline.split import LayerCosts, by_rank, split
from unicom_dist.parallel.pipeline.stage import AutogradStage
from unicom_dist.testing.distributed import run_ranks

pytestmark = pytest.mark.dist
WIDTH, LAYERS, RANKS = 6, 8, 4
CASES = [  # schedule, micro-batches, chunks, whether ranks pause now and then
    ("gpipe", 5, 1, False),
    ("1f1b", 7, 1, False),
    ("1f1b", 2, 1, False),  # fewer micro-batches than ranks
    ("1f1b", 8, 1, True),
    ("interleaved", 8, 2, False),
    ("interleaved", 7, 2, True),  # not a multiple of the ranks
    ("interleaved", 3, 2, False),
    ("zero-bubble", 6, 1, True),
    ("zero-bubble", 2, 1, False),
]


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def data(micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, WIDTH] of another length in every micro-batch, and a target, which may have no rows."""
    generator = torch.Generator().manual_seed(micro)
    rows = 3 + micro % 3
    targets = 0 if micro == 1 else rows - 1
    return torch.randn(rows, WIDTH, generator=generator), torch.randn(targets, WIDTH, generator=generator)


def boundaries(micros: int) -> list[list[Boundary]]:
    shapes = [(tuple(x.shape), tuple(y.shape)) for x, y in map(data, range(micros))]
    return [[Boundary(x, torch.float32), Boundary(y, torch.float32, differentiable=False)] for x, y in shapes]


def compute(
    blocks: dict[int, Block],
    parts: list[range],
    pauses: random.Random | None,
    micro: int,
    chunk: int,
    received: Payload,
) -> tuple[Payload, torch.Tensor | None]:
    """One pp_stage; the first makes the data, the last the loss."""
    x, target = received or data(micro)
    if pauses:
        time.sleep(pauses.choice([0, 0, 0.02]))
    auxiliary = None
    for layer in parts[chunk]:
        x = blocks[layer](x)
        if layer == 3:
            auxiliary = 0.1 * x.square().mean()
    if LAYERS - 1 not in parts[chunk]:
        return (x, target), auxiliary
    loss = F.mse_loss(x[: len(target)], target, reduction="sum") + x.sum() / 7
    return (), loss if auxiliary is None else loss + auxiliary


def gradients(axis: Axis, schedule: str, micros: int, chunks: int, slow: bool) -> dict[str, torch.Tensor]:
    """Of the blocks of this rank, accumulated into views of a flat buffer, as the plain engine does."""
    parts = by_rank(split(LayerCosts([1.0] * LAYERS), axis.size * chunks), axis.size)[axis.rank]
    module = nn.ModuleDict({str(layer): Block(layer) for part in parts for layer in part})
    flat = torch.zeros(sum(p.numel() for p in module.parameters()))
    views = flat.split([p.numel() for p in module.parameters()])
    for p, view in zip(module.parameters(), views, strict=True):
        p.grad = view.view_as(p)
    weights: WeightGradients | None = defer(module) if schedule == "zero-bubble" else None
    blocks = {int(layer): block for layer, block in module.items()}
    pauses = random.Random(axis.rank) if slow else None
    stage = AutogradStage(partial(compute, blocks, list(parts), pauses), weights=weights)
    Pipeline(axis, torch.device("cpu"), schedule, chunks).run(stage, boundaries(micros))
    assert not stage._graphs, "an activation was not freed"
    names = [name for name, _ in module.named_parameters()]
    return {name: view.clone() for name, view in zip(names, views, strict=True)}


def losses(axis: Axis) -> list[float]:
    """Of three micro-batches, by forward passes alone; empty but on the last rank."""
    parts = by_rank(split(LayerCosts([1.0] * LAYERS), axis.size * 2), axis.size)[axis.rank]
    blocks = {layer: Block(layer) for part in parts for layer in part}
    found = []

    def listed(micro: int, chunk: int, received: Payload) -> tuple[Payload, torch.Tensor | None]:
        sent, loss = compute(blocks, list(parts), None, micro, chunk, received)
        if not sent:
            found.append(loss.item())
        return sent, loss

    stage = AutogradStage(listed)
    with torch.no_grad():
        Pipeline(axis, torch.device("cpu"), "interleaved", 2).run(stage, boundaries(3), backward=False)
    assert not stage._graphs, "an activation was not freed"
    return found


def refused(axis: Axis) -> str:
    """What a stage that hands out other tensors than announced is told. Nothing is sent by then."""

    def wrong(micro: int, chunk: int, received: Payload) -> tuple[Payload, torch.Tensor | None]:
        return (torch.zeros(1, WIDTH, requires_grad=True), torch.zeros(0, WIDTH)), None

    try:
        Pipeline(axis, torch.device("cpu")).run(AutogradStage(wrong), boundaries(1))
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int, world: int) -> dict[str, object]:
    everyone = torch.distributed.group.WORLD
    axis = Axis("pp", rank, world, everyone, tuple(range(world)))
    result: dict[str, object] = {str(case): gradients(axis, *case) for case in CASES}
    result["losses"] = losses(axis)
    if rank < 2:  # last: the second rank of this pipeline is never sent anything
        pair = torch.distributed.new_group([0, 1], use_local_synchronization=True)
        result["refused"] = refused(Axis("pp", rank, 2, pair, (0, 1))) if rank == 0 else ""
    return result


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, torch.Tensor]]]:
    return run_ranks(work, RANKS, timeout_s=100)


def alone(micros: int) -> dict[str, torch.Tensor]:
    """Plain autograd over all blocks."""
    module = nn.ModuleDict({str(layer): Block(layer) for layer in range(LAYERS)})
    blocks = {int(layer): block for layer, block in module.items()}
    for micro in range(micros):
        _, loss = compute(blocks, [range(LAYERS)], None, micro, 0, ())
        loss.backward()
    return {name: p.grad.reshape(-1) for name, p in module.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_process(ranks, case):
    expected = alone(case[1])
    found = {name: grad for rank in ranks for name, grad in rank[str(case)].items()}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)])
def test_one_rank_runs_the_same_code(schedule, chunks):
    found = gradients(Axis("pp"), schedule, 3, chunks, False)
    for name, grad in alone(3).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_tensor_that_was_not_announced_is_refused_before_it_is_sent(ranks):
    assert "(1, 6) torch.float32 for F0.0" in ranks[0]["refused"]
    assert "shape=(3, 6)" in ranks[0]["refused"]


def test_forward_passes_alone_give_the_losses(ranks):
    expected = losses(Axis("pp"))
    assert len(expected) == 3
    assert [rank["losses"] for rank in ranks] == [[], [], [], pytest.approx(expected)]
