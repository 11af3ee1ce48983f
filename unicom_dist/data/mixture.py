"""The mixture of tasks: exact shares without chance.

The next sample goes to the task that lags its share most (largest deficit; ties go to the task named first), so the
counts stay next to the shares at any time. The counters are the whole state. Other weights are another schedule: its
counts begin at 0, so that they are exact from then on, while what is drawn goes on in its own order.
"""

from collections.abc import Mapping


class MixtureSchedule:
    """Draws task names by fixed positive weights. `counts` is the state; it may be set to resume."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        if total <= 0 or min(weights.values()) < 0:
            raise ValueError(f"weights must be positive, got {dict(weights)}")
        self.shares = {task: weight / total for task, weight in weights.items() if weight > 0}
        self.counts = dict.fromkeys(self.shares, 0)

    def draw(self) -> str:
        """The task of the next sample."""
        drawn = sum(self.counts.values()) + 1
        task = max(self.shares, key=lambda name: self.shares[name] * drawn - self.counts[name])
        self.counts[task] += 1
        return task
