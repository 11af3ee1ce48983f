"""Weight gradients of linear layers at a time of our choosing: what the zero-bubble schedule calls W.

Between `with weights.held(key):` around a backward pass and `weights.release(key)` later, each linear layer that the
pass went through keeps its input and its output's gradient and computes only the gradient of its input. `release`
then computes gradient^T input and hands it to autograd at the weight, exactly as the backward pass would have: it
is added to `weight.grad` in place, or creates it, and hooks on the weight run then.

All other parameters (norms, embeddings, tensor-parallel layers with a backward pass of their own) get their gradients
at once. So the result is right whichever layers take part; their share only decides how much of the bubble W can fill.

It needs the weight to be there at W as it was at B. Under ZeRO-3 a layer's weights are given back after its backward
pass, and a gradient of the whole weight does not fit what is left.
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

    def put_off(self, layer: nn.Linear, x: Tensor, grad: Tensor) -> bool:
        """Keep x [n, in] and grad [n, out] for later; False when the gradients are wanted at once."""
        if self._current is None:
            return False
        self._current.append((layer, x, grad))
        return True


class DeferredLinear(nn.Linear):
    """`nn.Linear` whose weight gradients come when its `gradients` say. Made by `defer`."""

    gradients: WeightGradients

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out: Tensor = _Linear.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return out


def defer(module: nn.Module) -> WeightGradients:
    """Make every plain `nn.Linear` in `module` a `DeferredLinear`, in place; names and parameters stay as they are."""
    gradients = WeightGradients()
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = DeferredLinear
            layer.gradients = gradients  # type: ignore[assignment]
    return gradients


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: DeferredLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        rows, seen = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad @ weight if for_x else None
        if ctx.layer.gradients.put_off(ctx.layer, seen, rows):
            return grad_x, None, None, None
        return grad_x, rows.T @ seen if for_weight else None, rows.sum(0) if for_bias else None, None
