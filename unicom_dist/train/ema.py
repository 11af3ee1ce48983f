"""An exponential moving average of the master weights, kept where they lie: each rank averages its own fragments.

Early in a stage the decay is shortened to (1 + n) / (10 + n) after n updates, so that the average forgets the start.
"""

import torch

from unicom_dist.parallel.engine import Buffers


class Ema:
    """`buffers` mirror the engine's weight buffers; with decay 0 they simply follow the weights."""

    def __init__(self, weights: Buffers, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._weights = weights
        self.buffers: Buffers = [weight.clone() for weight in weights]

    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.buffers, self._weights, 1.0 - decay)

    def load(self, buffers: Buffers, updates: int) -> None:
        """Continue from saved buffers."""
        for own, saved in zip(self.buffers, buffers, strict=True):
            own.copy_(saved)
        self.updates = updates
