"""An exponential moving average of the master weights, kept where they lie: each rank averages its own fragments.

Frozen groups are their own average and are not copied. Early in a stage the decay is shortened to (1 + n) / (10 + n)
after n updates, so that the average forgets the start.
"""

from collections.abc import Mapping

import torch

from unicom_dist.parallel.engine import Buffers


class Ema:
    """`buffers` mirror the weight buffers of an engine's `state`; with decay 0 they simply follow the weights."""

    def __init__(self, state: Mapping[str, Buffers], decay: float) -> None:
        self.decay, self.updates = decay, 0
        weights, moments = state["weight"], state["exp_avg"]
        trained = [moment.numel() == weight.numel() for weight, moment in zip(weights, moments, strict=True)]
        self.buffers: Buffers = [w.clone() if moves else w for w, moves in zip(weights, trained, strict=True)]
        self._averages = [buffer for buffer, moves in zip(self.buffers, trained, strict=True) if moves]
        self._weights = [weight for weight, moves in zip(weights, trained, strict=True) if moves]

    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - decay)

    def load(self, buffers: Buffers, updates: int) -> None:
        """Continue from saved buffers."""
        for own, saved in zip(self.buffers, buffers, strict=True):
            own.copy_(saved)
        self.updates = updates
