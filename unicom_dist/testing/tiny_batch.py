"""Packed batches of random content, written down as what stands where."""

from collections.abc import Sequence

import torch

from unicom_dist.models.segments import Mode, PackedBatch, Segment, centred

Stretch = tuple[str, int]  # what and how many: ("text", 5), ("feature", 4), ("latent", 4)
MODES: dict[str, Mode] = {"text": "causal", "latent": "noise", "feature": "full"}


def tiny_batch(
    samples: Sequence[Sequence[Stretch]],
    vocabulary: int,
    latent_channels: int,
    feature_channels: int,
    seed: int = 0,
    rope2d: bool = False,
    time_token: bool = False,
) -> PackedBatch:
    """A batch of random content; text labels predict the next token, images are 2 columns wide.

    `rope2d`, `time_token`: as in `lay_out`; a latent stretch holds its time, too.
    """
    draw = torch.Generator().manual_seed(seed)
    where: dict[str, list[int]] = {what: [] for what in (*MODES, "time")}
    grids: dict[str, list[tuple[int, int]]] = {what: [] for what in MODES}
    segments, times, label_sample, latent_sample, place = [], [], [], [], 0
    rope: list[list[int]] = []  # row and column
    labels: list[int] = []
    image_times: list[float] = []
    for number, stretches in enumerate(samples):
        position = 0
        for what, length in stretches:
            segments.append(Segment(number, MODES[what], length))
            where[what] += range(place, place + length)
            if what == "text":
                rope += [[p, p] for p in range(position, position + length)]
                labels += range(place, place + length - 1)
                label_sample += [number] * (length - 1)
                position += length
            else:
                timed = time_token and what == "latent"
                if timed:
                    where["time"].append(place)
                    where[what].remove(place)
                    rope.append([position, position])
                    length -= 1
                    place += 1
                grid = [(i // 2, i % 2) for i in range(length)]
                grids[what] += grid
                inside = centred(torch.tensor(grid)) if rope2d else torch.zeros(length, 2, dtype=torch.int64)
                rope += (position + inside).tolist()
                position += max((length + 1) // 2, 2) if rope2d else 1
            if what == "latent":
                image_times.append(torch.rand(1, generator=draw).item())
                times += image_times[-1:] * length
                latent_sample += [number] * length
            place += length
    index = {name: torch.tensor(places, dtype=torch.int64) for name, places in where.items()}
    positions = torch.tensor(rope, dtype=torch.int64).reshape(-1, 2)
    noised, seen = len(where["latent"]), len(where["feature"])
    return PackedBatch(
        segments=segments,
        rope_positions=positions if rope2d else positions[:, 0],
        token_ids=torch.randint(vocabulary, (len(where["text"]),), generator=draw),
        token_index=index["text"],
        label_index=torch.tensor(labels, dtype=torch.int64),
        label_ids=torch.randint(vocabulary, (len(labels),), generator=draw),
        latents=torch.randn(noised, latent_channels, generator=draw),
        noise=torch.randn(noised, latent_channels, generator=draw),
        t=torch.tensor(times),
        flow_index=torch.arange(noised),
        latent_index=index["latent"],
        latent_grid=torch.tensor(grids["latent"], dtype=torch.int64).reshape(-1, 2),
        features=torch.randn(seen, feature_channels, generator=draw),
        feature_index=index["feature"],
        feature_grid=torch.tensor(grids["feature"], dtype=torch.int64).reshape(-1, 2),
        keys=[str(number) for number in range(len(samples))],
        tasks=["interleaved"] * len(samples),
        sources=["train"] * len(samples),
        label_sample=torch.tensor(label_sample, dtype=torch.int64),
        latent_sample=torch.tensor(latent_sample, dtype=torch.int64),
        time_index=index["time"],
        times=torch.tensor(image_times if time_token else []),
    )
