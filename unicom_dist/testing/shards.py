"""Shard sets of a tiny configuration, written directly: pictures, random features, random latents.

For tests of what reads shards. The features and latents mean nothing; the real ones come from the pipelines.
"""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unicom_dist.config.schema import Config
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import write_npy
from unicom_dist.data.shardset import part_name
from unicom_dist.data.tar import ShardWriter
from unicom_dist.testing.tiny import COLOURS, SHAPES, SIDE, draw_shape

FINGERPRINT = "tiny-features"


def write_tiny_sets(
    config: Config,
    samples: int = 24,
    heldout: int = 4,
    *,
    feature_channels: int = 12,
    grids: Sequence[tuple[int, int]] = ((2, 2),),
    shard_samples: int = 10,
    sizes: Sequence[tuple[int, int]] = ((SIDE, SIDE),),
) -> None:
    """Write `train`, `heldout` (and `augmented`, if configured) with features and latents of `config.run_dir`.

    Sample n has the grid `grids[n % len(grids)]` and `sizes[n % len(sizes)]` as width and height in pixels. Latents
    have the channels of `config.codec.compressor`.
    """
    sets = {"train": samples, "heldout": heldout}
    if config.data.augmented_views:
        sets["augmented"] = samples * config.data.augmented_views
    for name, count in sets.items():
        write_set(config, name, count, feature_channels, grids, shard_samples, sizes)


def write_set(
    config: Config,
    name: str,
    count: int,
    feature_channels: int,
    grids: Sequence[tuple[int, int]],
    shard_samples: int,
    sizes: Sequence[tuple[int, int]] = ((SIDE, SIDE),),
) -> None:
    """One set, shard by shard: images and captions, features beside them, latents below the run directory."""
    kind = config.encoder.kind
    folders = {"": Path(config.data.path) / name, kind: Path(config.data.path) / name}
    folders["latent"] = Path(config.run_dir) / "latents" / name
    manifests = {part: Manifest(part=part, fingerprint=FINGERPRINT) for part in folders}
    generator = np.random.default_rng(len(name))
    for shard in range(math.ceil(count / shard_samples)):
        base = f"tiny-{shard:06d}.tar"
        writers = {part: ShardWriter(folder / part_name(base, part)) for part, folder in folders.items()}
        for number in range(shard * shard_samples, min((shard + 1) * shard_samples, count)):
            key, (rows, columns) = f"{name}-{number:04d}", grids[number % len(grids)]
            grid = json.dumps({"grid": [rows, columns]}).encode()
            features = generator.standard_normal((rows * columns, feature_channels)).astype(np.float16)
            latents = generator.standard_normal((rows * columns, config.codec.compressor.channels)).astype(np.float16)
            writers[""].write(key, _picture(number, sizes[number % len(sizes)]))
            writers[kind].write(key, {"features.npy": write_npy(features), "json": grid})
            writers["latent"].write(key, {"latent.npy": write_npy(latents), "json": grid})
        for part, writer in writers.items():
            manifests[part].shards.append(writer.close())
    for part, manifest in manifests.items():
        manifest.write(folders[part])


def _picture(number: int, size: tuple[int, int]) -> dict[str, bytes]:
    colour, shape = list(COLOURS)[number % len(COLOURS)], SHAPES[number // len(COLOURS) % len(SHAPES)]
    buffer = io.BytesIO()
    draw_shape(shape, COLOURS[colour], number).resize(size).save(buffer, "WEBP", lossless=True)
    texts = {"caption": f"a {colour} {shape}", "captions": [colour, shape], "source": "tiny", "view": 0}
    return {"webp": buffer.getvalue(), "json": json.dumps(texts).encode()}
