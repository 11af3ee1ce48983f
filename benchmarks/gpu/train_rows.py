"""Shapes of the models that the training benchmark measures, and the rows they are trained on (see bench_train.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unicom_dist.config.layout import Recompute
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.segments import Mode, PackedBatch, Segment

LATENT_CHANNELS, FEATURE_CHANNELS = 64, 1152
Row = Sequence[tuple[Mode, int]]


@dataclass(frozen=True)
class Size:
    """Shape of a published model and how it is trained here. `scale` divides the lengths of the rows."""

    prior: PriorConfig
    vocabulary: int
    recompute: Recompute = "none"
    micro_batches: int = 4
    scale: int = 1


def shape(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool = True) -> PriorConfig:
    """A Qwen2.5 of these sizes."""
    return PriorConfig(
        hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=ffn, tie_embeddings=tied, norm_eps=1e-6
    )


SIZES = {
    "tiny": Size(shape(64, 2, 4, 2, 192), 512, "full", 2, 32),
    "0.5B": Size(shape(896, 24, 14, 2, 4864), 151_936),
    "1.5B": Size(shape(1536, 28, 12, 2, 8960), 151_936),
    "7B": Size(shape(3584, 28, 28, 4, 18_944, False), 152_064, "full"),
}
DRAWN: Row = [("causal", 96), ("noise", 256)]
READ: Row = [("causal", 32), ("full", 576), ("causal", 416)]
INTERLEAVED: Row = [("causal", 256), ("full", 256)] * 4
ROWS: dict[str, list[Row]] = {
    "mix8k": [*[DRAWN] * 8, *[READ] * 3, INTERLEAVED, [("causal", 256)]],
    "text": [[("causal", 8192)]],
}


def packed(samples: Sequence[Row], size: Size, seed: int) -> PackedBatch:
    """A row of random content."""
    draw = torch.Generator().manual_seed(seed)
    segments = [Segment(n, mode, length // size.scale) for n, row in enumerate(samples) for mode, length in row]
    where: dict[Mode, list[int]] = {"causal": [], "noise": [], "full": []}
    grid: dict[Mode, list[tuple[int, int]]] = {"causal": [], "noise": [], "full": []}
    rope: list[int] = []
    times: list[float] = []
    latent_sample: list[int] = []
    label_sample: list[int] = []
    begin, sample, place = 0, -1, 0
    for s in segments:
        if s.sample != sample:
            sample, place = s.sample, 0
        where[s.mode] += range(begin, begin + s.length)
        side = int(s.length**0.5)
        grid[s.mode] += [(n // side, n % side) for n in range(s.length)] if s.mode != "causal" else []
        rope += range(place, place + s.length) if s.mode == "causal" else [place] * s.length
        place += s.length if s.mode == "causal" else 1
        if s.mode == "noise":
            times += [float(torch.rand((), generator=draw))] * s.length
            latent_sample += [s.sample] * s.length
        if s.mode == "causal":
            label_sample += [s.sample] * s.length
        begin += s.length
    text, drawn, read = (torch.tensor(found, dtype=torch.int64) for found in where.values())
    latents, noise = torch.randn(2, len(drawn), LATENT_CHANNELS, generator=draw)
    ids, labels = torch.randint(size.vocabulary, (2, len(text)), generator=draw)
    grids = {mode: torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2) for mode, pairs in grid.items()}
    return PackedBatch(
        segments=segments,
        rope_positions=torch.tensor(rope),
        token_ids=ids,
        token_index=text,
        label_index=text.clone(),
        label_ids=labels,
        latents=latents,
        noise=noise,
        t=torch.tensor(times),
        flow_index=torch.arange(len(drawn)),
        latent_index=drawn,
        latent_grid=grids["noise"],
        features=torch.randn(len(read), FEATURE_CHANNELS, generator=draw),
        feature_index=read,
        feature_grid=grids["full"],
        keys=[str(n) for n in range(len(samples))],
        tasks=["interleaved"] * len(samples),
        sources=["train"] * len(samples),
        label_sample=torch.tensor(label_sample),
        latent_sample=torch.tensor(latent_sample, dtype=torch.int64),
    )
