"""Learning rate by step: linear warm-up, then constant or cosine down to a share of the peak."""

import math

from unicom_dist.config.schema import StageConfig


def learning_rate(stage: StageConfig, step: int) -> float:
    """Learning rate of the step that follows `step` finished ones; a function of the configuration alone."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return stage.lr
    progress = min(1.0, (step - stage.warmup) / max(1, stage.steps - stage.warmup))
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
