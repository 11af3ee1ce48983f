"""Packings of samples and segments for tests and benchmarks of attention: random ones, and the six measured ones."""

import random

from unicom_dist.models.segments import Mode, Segment

MODES: list[Mode] = ["causal", "full", "noise"]


def random_packing(seed: int, longest: int = 9) -> list[Segment]:
    """One to seven samples of up to five segments of any mode and of up to `longest` positions."""
    draw = random.Random(seed)
    return [
        Segment(sample, draw.choice(MODES), draw.randint(1, longest))
        for sample in range(draw.randint(1, 7))
        for _ in range(draw.randint(1, 5))
    ]


def layout(name: str) -> list[Segment]:
    """A row as training sees them. KeyError: not one of `LAYOUTS`."""
    return [Segment(n, mode, length) for n, sample in enumerate(LAYOUTS[name]) for mode, length in sample]


_Sample = list[tuple[Mode, int]]
_DRAWN: _Sample = [("causal", 96), ("noise", 256)]  # a caption and the image to draw
_SEEN: _Sample = [("causal", 32), ("full", 576), ("causal", 416)]  # a question, an image and a conversation
_PAGE: _Sample = [("causal", 256), ("full", 256)]  # of an interleaved document
LAYOUTS: dict[str, list[_Sample]] = {
    "t2i2k": [*[_DRAWN] * 5, [("causal", 288)]],
    "t2i4k": [*[_DRAWN] * 11, [("causal", 224)]],
    "und4k": [_SEEN] * 4,
    "inter2k": [_PAGE * 4],
    "inter4k": [_PAGE * 8],
    "mix8k": [*[_DRAWN] * 8, *[_SEEN] * 3, _PAGE * 4, [("causal", 256)]],
}
