"""A pp_stage that autograd differentiates: keeps the graph of every micro-batch from its forward to its backward.

Of the tensors sent on only the graph is kept, so their memory is free as soon as they have arrived elsewhere.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from unicom_dist.parallel.pipeline.deferred import WeightGradients
from unicom_dist.parallel.pipeline.runtime import Gradients, Payload

Compute = Callable[[int, int, Payload], tuple[Payload, Tensor | None]]
Root = Tensor | GradientEdge
Backward = Callable[[Sequence[Root], Sequence[Tensor | None]], None]


def differentiate(roots: Sequence[Root], gradients: Sequence[Tensor | None]) -> None:
    """Accumulate the gradients of all leaves."""
    torch.autograd.backward(roots, gradients)  # type: ignore[arg-type]  # its signature does not mix the kinds of roots


class AutogradStage:
    """See `Stage`. `compute(micro, chunk, received)`: what to send on, and a scalar loss of this pp_stage or None.

    Losses may arise in any pp_stage; each is differentiated where it arises, together with what comes back from the
    pp_stages after. `backward(roots, gradients)` does it: roots are losses (gradient None) and places in the graph.
    With `weights`, as `defer` returns it, B leaves the weights' gradients of linear layers to W.
    """

    def __init__(
        self,
        compute: Compute,
        backward: Backward = differentiate,
        weights: WeightGradients | None = None,
    ) -> None:
        self._compute, self._backward, self._weights = compute, backward, weights
        self._graphs: dict[tuple[int, int], tuple[Payload, list[GradientEdge | None], Tensor | None]] = {}

    def forward(self, micro: int, chunk: int, received: Payload) -> Payload:
        """F. Without gradients (`torch.no_grad`) nothing is kept."""
        sent, loss = self._compute(micro, chunk, received)
        if torch.is_grad_enabled():
            edges = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in sent]
            self._graphs[micro, chunk] = (received, edges, loss)
        return sent

    def backward(self, micro: int, chunk: int, gradients: Gradients) -> Gradients:
        """B; all of the backward pass without `weights`."""
        received, edges, loss = self._graphs.pop((micro, chunk))
        roots: list[Root] = [] if loss is None else [loss]
        given: list[Tensor | None] = [None] * len(roots)
        for edge, gradient in zip(edges, gradients, strict=True):
            if edge is not None and gradient is not None:
                roots.append(edge)
                given.append(gradient)
        later: Any = self._weights.held((micro, chunk)) if self._weights else nullcontext()
        with later:
            if roots:
                self._backward(roots, given)
        return tuple(tensor.grad for tensor in received)

    def backward_weight(self, micro: int, chunk: int) -> None:
        """W."""
        if self._weights:
            self._weights.release((micro, chunk))
