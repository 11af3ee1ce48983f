"""What a compressor's latents look like: moments that add up over ranks and micro-batches, and running statistics.

Shapes: N latents of d channels.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from unicom_dist.models.codec import LatentStats

STD_FLOOR = 1e-4  # a dead channel must not turn into infinities


class Moments:
    """Count, sum and sum of outer products of rows [N, d], as deviations from a fixed `center` [d], in float64.

    One flat tensor of 1 + d + d^2, so that ranks and micro-batches simply add up.
    """

    def __init__(self, center: Tensor) -> None:
        self._center = center.detach().clone()
        self.flat = torch.zeros(1 + center.shape[0] * (1 + center.shape[0]), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in rows [N, d]; no synchronisation."""
        rows = rows.float() - self._center.to(rows.device)
        count = self.flat.new_full((1,), rows.shape[0])
        sums = rows.sum(0, dtype=torch.float64), (rows.T @ rows).double().flatten()
        self.flat = self.flat.to(rows.device) + torch.cat([count.to(rows.device), *sums])

    @property
    def count(self) -> int:
        """Rows."""
        return int(self.flat[0])

    def mean(self) -> Tensor:
        """[d] float64; of no rows, the center."""
        return self._center.to(self.flat) + self._first()

    def covariance(self) -> Tensor:
        """[d, d] float64, about the mean; of no rows, zero."""
        d = self._center.shape[0]
        first = self._first()
        return self.flat[1 + d :].view(d, d) / self.flat[0].clamp_min(1) - first[:, None] * first

    def _first(self) -> Tensor:
        return self.flat[1 : 1 + self._center.shape[0]] / self.flat[0].clamp_min(1)


def effective_rank(covariance: Tensor) -> float:
    """exp(entropy of the eigenvalues' shares) of a covariance matrix [d, d]: between 1 and d; 0 without any variance.

    Ref: Roy and Vetterli 2007, on the eigenvalues of the covariance.
    """
    values = torch.linalg.eigvalsh(covariance.double().cpu()).clamp_min(0)
    total = float(values.sum())
    if not total > 0:
        return 0.0
    shares = values / total
    return math.exp(float(torch.special.entr(shares).sum()))


class LatentStatistics(nn.Module):
    """Running mean and variance of the compressor's raw output by channel, outside of autograd.

    A step sees the statistics as they were before it, whatever its micro-batches; `update` then gives the step's rows
    the weight `momentum` in a mixture of what was and what is new (mean and variance of that mixture).
    """

    mean: Tensor
    var: Tensor

    def __init__(self, start: LatentStats, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", start.mean.float().clone(), persistent=False)
        self.register_buffer("var", start.std.float().square(), persistent=False)
        self._center = start.mean.float()
        self.step, self.window = Moments(self._center), Moments(self._center)

    @property
    def std(self) -> Tensor:
        """[d]."""
        return self.var.sqrt().clamp_min(STD_FLOOR)

    def normalise(self, rows: Tensor) -> Tensor:
        """(z - mean) / std, float32, of rows [..., d]."""
        return (rows.float() - self.mean) / self.std

    def stats(self) -> LatentStats:
        """As they are now, on the CPU."""
        return LatentStats(self.mean.detach().cpu().clone(), self.std.detach().cpu())

    def state(self) -> dict[str, list[float]]:
        """Plain lists, exact, for checkpoints."""
        return {"mean": self.mean.tolist(), "var": self.var.tolist()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """The inverse of `state`."""
        self.mean.copy_(torch.tensor(state["mean"]))
        self.var.copy_(torch.tensor(state["var"]))

    @torch.no_grad()
    def update(self, everyone: Callable[[Tensor], Tensor]) -> None:
        """Mix in the step's rows, summed over the replicas by `everyone` (in place); without any, nothing changes.

        Collective over the replicas. No synchronisation with the host.
        """
        step, self.step = self.step, Moments(self._center)
        step.flat = everyone(step.flat.to(self.mean.device))
        m = self.momentum * (step.flat[0] > 0)
        shift = step.mean() - self.mean
        self.var.copy_((1 - m) * self.var + m * step.covariance().diagonal() + m * (1 - m) * shift.square())
        self.mean.copy_(self.mean + m * shift)
        self.window.flat = self.window.flat.to(step.flat.device) + step.flat

    def take_window(self) -> Moments:
        """The rows of all replicas in the steps since the last call."""
        window, self.window = self.window, Moments(self._center)
        return window
