"""The engine without sharding: AdamW on every rank, gradients summed over the replicas in one call per group.

All parameters of a group share one flat buffer (the module's parameters are views of it), so a step is a handful of
operations whatever the number of parameters. In bfloat16 the module sees a bfloat16 copy of the float32 master weights.
AdamW is torch's function: an optimizer object would import the compiler, more than a second of CPU at every start.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from unicom_dist.parallel.engine import (
    Buffers,
    Fragment,
    Gradients,
    OptimizerConfig,
    Root,
    decay_groups,
    fragments_of,
    pieces_of,
)
from unicom_dist.parallel.gradients import Finish
from unicom_dist.parallel.mesh import Mesh


class PlainEngine:
    """See `Engine`. The module is converted in place; its parameters must not be replaced afterwards."""

    replicated = True

    def __init__(self, module: nn.Module, config: OptimizerConfig, mesh: Mesh) -> None:
        self.module, self.config, self.mesh = module.to(mesh.device), config, mesh
        self.steps_done = 0
        self.fragments: list[Fragment] = []
        self._master: Buffers = []
        self._low: Buffers = []  # what the module computes with; the master itself in float32
        self._grad: Buffers = []  # float32, trained groups only
        self._low_grad: Buffers = []
        self._moments: dict[str, Buffers] = {"exp_avg": [], "exp_avg_sq": []}
        self._steps: Buffers = []  # of each trained group, as AdamW counts them
        for number, named in enumerate(decay_groups(module)):
            master, low = self._flatten(named, number, config.dtype)
            trained = number < 2
            self._master.append(master)
            self._low.append(low)
            for buffers in self._moments.values():
                buffers.append(torch.zeros_like(master) if trained else master.new_empty(0))
            if not trained:
                continue
            self._steps.append(torch.zeros((), device=mesh.device))
            low_grad = torch.zeros_like(low)
            self._low_grad.append(low_grad)
            self._grad.append(low_grad if low is master else torch.zeros_like(master))
            start = 0
            for _, p in named:
                p.grad = low_grad[start : start + p.numel()].view_as(p)
                start += p.numel()
        self._finish = Finish(mesh, self.fragments, self.replicated, config.clip)

    def _flatten(self, named: list[tuple[str, nn.Parameter]], group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(master, low): the group's parameters laid end to end; each parameter becomes a view of `low`."""
        master = torch.zeros(sum(p.numel() for _, p in named), device=self.mesh.device)
        low = master if dtype == torch.float32 else master.to(dtype)
        start = 0
        for name, p in named:
            end = start + p.numel()
            self.fragments += fragments_of(pieces_of(name, p, tuple(p.shape)), 0, p.numel(), group, start)
            master[start:end] = p.detach().reshape(-1).float()
            p.data = low[start:end].view(p.shape)
            start = end
        if low is not master:
            low.copy_(master)
        return master, low

    def __call__(self, batch: Any, x: Tensor | None = None, chunk: int = 0) -> Any:
        return self.module(batch) if x is None and not chunk else self.module(batch, x, chunk)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        yield
        for grad, low_grad in zip(self._grad, self._low_grad, strict=True):
            if grad is not low_grad:
                grad.copy_(low_grad)
            self.mesh.zero.sum(grad)
            if self.mesh.zero.size > 1:
                grad.div_(self.mesh.zero.size)

    def backward(self, roots: Root | Sequence[Root], gradients: Gradients = None) -> None:
        torch.autograd.backward(roots, gradients)  # type: ignore[arg-type]  # its signature does not mix kinds of roots

    def gradients(self) -> Buffers:
        return [*self._grad, *(master.new_empty(0) for master in self._master[len(self._grad) :])]

    @contextmanager
    def using(self, buffers: Buffers) -> Iterator[None]:
        kept = [master.clone() for master in self._master] if self._low[0] is self._master[0] else []
        self._load(buffers)
        try:
            yield
        finally:
            self._load(kept or self._master)

    @torch.no_grad()
    def _load(self, buffers: Buffers) -> None:
        """The weights of the forward pass from `buffers`; the master weights serve in place in float32."""
        for low, buffer in zip(self._low, buffers, strict=True):
            if low is not buffer:
                low.copy_(buffer)

    def step(self, lr: float) -> float:
        try:
            norm = self._finish(self.gradients())
            self._update(lr)
        finally:
            for grad in self._low_grad:
                grad.zero_()
        self._load(self._master)
        self.steps_done += 1
        return norm

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        """AdamW (Loshchilov and Hutter 2019), decay on the matrices only."""
        beta1, beta2 = self.config.betas
        for number, grad in enumerate(self._grad):
            adamw(
                [self._master[number]],
                [grad],
                [self._moments["exp_avg"][number]],
                [self._moments["exp_avg_sq"][number]],
                [],
                [self._steps[number]],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=self.config.weight_decay if number == 0 else 0.0,
                eps=self.config.eps,
                maximize=False,
            )

    def state(self) -> dict[str, Buffers]:
        return {"weight": self._master, **self._moments}

    def load_state(self, state: dict[str, Buffers], steps_done: int) -> None:
        own = self.state()
        with torch.no_grad():
            for kind, buffers in own.items():
                for number, buffer in enumerate(buffers):
                    if kind in state:
                        buffer.copy_(state[kind][number])
                    else:
                        buffer.zero_()
            for steps in self._steps:
                steps.fill_(steps_done)
        self.steps_done = steps_done
        self._load(self._master)

    def close(self) -> None:
        for p in self.module.parameters():
            p.grad = None
