"""Random packings of samples and segments, for tests of attention."""

import random

from unicom_dist.models.segments import Mode, Segment

MODES: list[Mode] = ["causal", "full", "noise"]


def random_packing(seed: int) -> list[Segment]:
    """One to seven samples of up to five short segments of any mode."""
    draw = random.Random(seed)
    return [
        Segment(sample, draw.choice(MODES), draw.randint(1, 9))
        for sample in range(draw.randint(1, 7))
        for _ in range(draw.randint(1, 5))
    ]
