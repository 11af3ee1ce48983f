"""The engine without sharding: torch AdamW on every rank, gradients summed over the replicas in one call per group.

All parameters of a group share one flat buffer (the module's parameters are views of it), so a step is a handful of
operations whatever the number of parameters. In bfloat16 the module sees a bfloat16 copy of the float32 master weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unicom_dist.parallel.engine import (
    Buffers,
    Fragment,
    OptimizerConfig,
    check_finite,
    decay_groups,
    whole_parameters,
)
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
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        groups = []
        for number, named in enumerate(decay_groups(module)):
            trained = number < 2
            master, low = self._flatten(named, len(self._master), dtype)
            self._master.append(master)
            self._low.append(low)
            if trained and named:
                low_grad = torch.zeros_like(low)
                self._low_grad.append(low_grad)
                self._grad.append(low_grad if low is master else torch.zeros_like(master))
                start = 0
                for _, p in named:
                    p.grad = low_grad[start : start + p.numel()].view_as(p)
                    start += p.numel()
                groups.append(
                    {
                        "params": [nn.Parameter(master)],
                        "weight_decay": config.weight_decay if number == 0 else 0.0,
                        "group": number,
                    }
                )
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        for group, grad in zip(self._optimizer.param_groups, self._grad, strict=True):
            group["params"][0].grad = grad
            self._moments(group["params"][0])

    def _flatten(self, named: list[tuple[str, nn.Parameter]], group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(master, low): the group's parameters laid end to end; each parameter becomes a view of `low`."""
        start = 0
        for name, p in named:
            self.fragments.append(Fragment(name, tuple(p.shape), 0, p.numel(), group, start, p.numel()))
            start += p.numel()
        master = torch.zeros(start, device=self.mesh.device)
        for f, (_, p) in zip(self.fragments[len(self.fragments) - len(named) :], named, strict=True):
            master[f.start : f.start + f.numel] = p.detach().reshape(-1).float()
        low = master if dtype == torch.float32 else master.to(dtype)
        for f, (_, p) in zip(self.fragments[len(self.fragments) - len(named) :], named, strict=True):
            p.data = low[f.start : f.start + f.numel].view(f.shape)
        return master, low

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a flat parameter, created at once so that it can be saved before the first step."""
        state = self._optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state  # type: ignore[no-any-return]

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        yield
        for grad, low_grad in zip(self._grad, self._low_grad, strict=True):
            if grad is not low_grad:
                grad.copy_(low_grad)
            self.mesh.sum_dp(grad)
            if self.mesh.dp_size > 1:
                grad.div_(self.mesh.dp_size)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        norms = [torch.linalg.vector_norm(grad) for grad in self._grad]
        norm = float(norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms)))
        try:
            check_finite(norm)
            if self.config.clip and norm > self.config.clip:
                for grad in self._grad:
                    grad.mul_(self.config.clip / (norm + 1e-6))
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        finally:
            for grad in self._low_grad:
                grad.zero_()
        self._refresh()
        self.steps_done += 1
        return norm

    def _refresh(self) -> None:
        with torch.no_grad():
            for low, master in zip(self._low, self._master, strict=True):
                if low is not master:
                    low.copy_(master)

    def state(self) -> dict[str, Buffers]:
        moments: dict[str, Buffers] = {
            kind: [master.new_empty(0) for master in self._master] for kind in ("exp_avg", "exp_avg_sq")
        }
        for group in self._optimizer.param_groups:
            for kind, buffers in moments.items():
                buffers[group["group"]] = self._moments(group["params"][0])[kind]
        return {"weight": self._master, **moments}

    def load_state(self, state: dict[str, Buffers], steps_done: int) -> None:
        own = self.state()
        with torch.no_grad():
            for kind, buffers in own.items():
                for number, buffer in enumerate(buffers):
                    if kind in state:
                        buffer.copy_(state[kind][number])
                    else:
                        buffer.zero_()
            for group in self._optimizer.param_groups:
                self._moments(group["params"][0])["step"].fill_(steps_done)
        self.steps_done = steps_done
        self._refresh()

    def full(self, buffers: Buffers, dtype: torch.dtype) -> dict[str, Tensor]:
        return dict(whole_parameters([buffer.unsqueeze(0) for buffer in buffers], self.fragments, dtype))

    def close(self) -> None:
        for p in self.module.parameters():
            p.grad = None
