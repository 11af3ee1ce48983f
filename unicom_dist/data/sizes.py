"""Width and height of every stored picture of a shard, without decoding any.

Read from the pictures' headers once and kept beside the shard as `name.tar.sizes` (JSON: the shard's sha256 from the
manifest, and a [width, height] per sample, upright). Like the side index it is a cache: `unicom data ingest` writes it,
and it is made again when missing or of other contents.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicom_dist.config.errors import UnicomError
from unicom_dist.data.decode import IMAGE_EXTENSIONS, header_size
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.tar import Shard, ShardEntry, replace_file

FORMAT = "unicom-picture-sizes/1"


def set_sizes(pairs: ShardSet) -> NDArray[np.int32]:
    """[n, 2] (width, height) of the pictures of a set in sample order; (0, 0) where the header cannot be read.

    DataError: a shard is missing or damaged.
    """
    parts = [shard_sizes(pairs.folder, entry) for entry in pairs.manifest.shards]
    return np.concatenate([np.zeros((0, 2), np.int32), *parts])


def shard_sizes(folder: Path, entry: ShardEntry) -> NDArray[np.int32]:
    """The same for one shard."""
    path = folder / f"{entry.name}.sizes"
    try:
        content: Any = json.loads(path.read_bytes())
        sizes = np.array(content["sizes"], np.int32).reshape(-1, 2)
        if content["format"] == FORMAT and content["sha256"] == entry.sha256 and len(sizes) == entry.samples:
            return sizes
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no file, or not one of ours
    shard = Shard(folder / entry.name)
    sizes = np.array([_size(shard[number]) for number in range(len(shard))], np.int32).reshape(-1, 2)
    content = {"format": FORMAT, "sha256": entry.sha256, "sizes": sizes.tolist()}
    with contextlib.suppress(UnicomError):  # a read-only data folder
        replace_file(path, json.dumps(content, separators=(",", ":")).encode())
    return sizes


def _size(members: dict[str, memoryview]) -> tuple[int, int]:
    content = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    return (0, 0) if content is None else header_size(io.BytesIO(content))
