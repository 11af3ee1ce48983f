"""Weight gradients of linear layers at a time of our choosing: what the zero-bubble schedule calls W.

A backward pass inside `with weights.held(key):` goes through the linear layers for the gradients of their inputs alone;
each keeps its input and its output's gradient. `weights.release(key)` computes gradient^T input of each and hands it
to autograd at the weight, just as a backward pass does: it is added to `weight.grad` in place, or creates it, and the
hooks of the weight run, once, with the gradient there.

All other parameters (norms, embeddings, tensor-parallel layers with a backward pass of their own) get their gradients
at once, so the result is right whichever layers take part; their share decides how much of the bubble W can fill.

It needs the weight to be there at W as it was at B. DeepSpeed's ZeRO-3 gives a layer's weights back after its backward
pass, and a gradient of the whole weight fits nothing that is left.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightGradients:
    """What was put off, by key."""

    def __init__(self) -> None:
        self._held: dict[Hashable, list[tuple[nn.Linear, Tensor, Tensor]]] = {}
        self._current: list[tuple[nn.Linear, Tensor, Tensor]] | None = None

    @contextmanager
    def held(self, key: Hashable) -> Iterator[None]:
        """Backward passes inside put their linear layers' weight gradients off."""
        self._current = self._held.setdefault(key, [])
        try:
            yield
        finally:
            self._current = None

    def release(self, key: Hashable) -> None:
        """Compute and accumulate what `key` put off; a layer's activations are freed as soon as it is done."""
        waiting = self._held.pop(key)
        while waiting:
            layer, x, grad = waiting.pop()
            if layer.weight.requires_grad:
                torch.autograd.backward([layer.weight], [grad.T @ x])
            if layer.bias is not None and layer.bias.requires_grad:
                torch.autograd.backward([layer.bias], [grad.sum(0)])

    def put_off(self, layer: nn.Linear, x: Tensor, grad: Tensor) -> None:
        """Keep x [n, in] and grad [n, out] for later. RuntimeError in a backward pass that is not inside `held`."""
        if self._current is None:
            raise RuntimeError("a backward pass through layers with deferred weight gradients, but not inside `held`")
        self._current.append((layer, x, grad))


class DeferredLinear(nn.Linear):
    """`nn.Linear` that leaves its weight's gradient to `gradients`. Made by `defer`.

    Where the input needs no gradient there is nothing to do first, and the layer is a plain one.
    """

    gradients: WeightGradients

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not x.requires_grad:
            return super().forward(x)
        out: Tensor = _InputGradient.apply(x, self)  # type: ignore[no-untyped-call]
        return out


def defer(module: nn.Module) -> WeightGradients:
    """Make every plain `nn.Linear` in `module` a `DeferredLinear`, in place; names and parameters stay as they are."""
    gradients = WeightGradients()
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = DeferredLinear
            layer.gradients = gradients  # type: ignore[assignment]
    return gradients


class _InputGradient(torch.autograd.Function):
    """The layer as a function of its input alone: the graph does not lead to the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: DeferredLinear) -> Tensor:
        ctx.save_for_backward(x, layer.weight)
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        ctx.layer.gradients.put_off(ctx.layer, x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
        return grad @ weight, None
