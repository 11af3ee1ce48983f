"""Weight gradients put off: not there before their time, the same afterwards, and what holds them is freed."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unicom_dist.parallel.pipeline.deferred import DeferredLinear, defer


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))


def inputs() -> torch.Tensor:
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_gradients_come_at_release_and_are_the_same():
    plain, x = model(), inputs()
    plain(x).square().sum().backward()
    module, y = model(), inputs()
    names = list(module.state_dict())
    weights = defer(module)
    assert list(module.state_dict()) == names
    assert isinstance(module[0], DeferredLinear)
    flat = torch.zeros_like(module[0].weight)
    module[0].weight.grad = flat
    loss = module(y).square().sum()
    with weights.held("first"):
        loss.backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(module[2].weight.grad, plain[2].weight.grad)  # a norm is not put off
    assert not flat.any()
    assert module[3].weight.grad is None
    weights.release("first")
    assert module[0].weight.grad is flat, "the engine's buffer was replaced"
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_backward_pass_outside_is_refused():
    module = model()
    defer(module)
    with pytest.raises(RuntimeError, match="not inside `held`"):
        module(inputs()).sum().backward()


def test_data_as_input_leaves_the_layer_as_it_is():
    plain, module = model()[0], nn.Sequential(model()[0])
    weights = defer(module)
    plain(inputs().detach()).sum().backward()
    with weights.held(0):
        module(inputs().detach()).sum().backward()
    torch.testing.assert_close(module[0].weight.grad, plain.weight.grad)
    weights.release(0)
    torch.testing.assert_close(module[0].weight.grad, plain.weight.grad)


def test_hooks_run_when_the_gradient_is_there():
    module, seen = model(), []
    weights = defer(module)
    module[3].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with weights.held(0):
        module(inputs()).sum().backward()
    assert not seen
    weights.release(0)
    assert len(seen) == 1


def test_recomputed_layers_and_frozen_ones():
    plain, module = model(), model()
    for each in (plain, module):
        each[0].weight.requires_grad_(False)
    plain(inputs()).sum().backward()
    weights = defer(module)
    with weights.held(0):
        checkpoint(module, inputs(), use_reentrant=False).sum().backward()
    weights.release(0)
    assert module[0].weight.grad is None
    torch.testing.assert_close(module[0].bias.grad, plain[0].bias.grad)
    torch.testing.assert_close(module[3].weight.grad, plain[3].weight.grad)


def test_activations_are_held_until_release():
    module, alive = model(), []
    module[3].register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0])))
    weights = defer(module)
    with weights.held(0):
        module(inputs()).sum().backward()
    assert alive[0]() is not None
    weights.release(0)
    assert alive[0]() is None
