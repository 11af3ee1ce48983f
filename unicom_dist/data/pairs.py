"""The sets of image-text pairs a recipe names, and the fields of one pair.

Sets live under `data.path`: `train`, `augmented` (further views, read by the codec only), `heldout`, and those of
`data.sets` with their held-out ones.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, SetKind
from unicom_dist.data.conversations import Conversation
from unicom_dist.data.decode import IMAGE_EXTENSIONS
from unicom_dist.data.npy import read_npy
from unicom_dist.data.samples import TEMPLATE_TEXTS
from unicom_dist.data.shardset import Sample, ShardSet
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.published import architecture


class Captions(NamedTuple):
    """The caption of an image and further texts about it."""

    main: str
    further: list[str]


def open_set(
    config: Config, name: str, *, latents: bool = False, expect_fingerprint: Mapping[str, str] | None = None
) -> ShardSet:
    """The set `name` with its features, and its latents if asked for. DataError if a part is missing or foreign."""
    folder = Path(config.data.path) / name
    parts: dict[str, Path] = {config.encoder.kind: folder}
    if latents:
        parts["latent"] = Path(config.run_dir) / "latents" / name
    expected = {part: value for part, value in (expect_fingerprint or {}).items() if part in parts}
    return ShardSet(folder, parts, expected)


def build_vocabulary(config: Config) -> Vocabulary:
    """The vocabulary `config.prior` asks for; a trimmed one covers the texts of all that is trained with.

    A full one has the spare rows of the published weights the prior starts from: the softmax was trained with them.
    """
    if config.prior.vocabulary == "full":
        published = config.prior.init_from
        return Vocabulary.full(config.prior.tokenizer, architecture(Path(published)).rows if published else 0)
    least = config.prior.vocabulary_pictures
    groups = [list(TEMPLATE_TEXTS)] * least
    for name, kind in config.data.kinds.items():
        samples = ShardSet(Path(config.data.path) / name)
        for number in range(len(samples)):
            with contextlib.suppress(DataError):  # the loader names and counts what is malformed
                groups.append(_said(samples[number], kind))
    return Vocabulary.trimmed(config.prior.tokenizer, groups, least)


def _said(sample: Sample, kind: SetKind) -> list[str]:
    if kind != "pairs":
        return conversation_of(sample).texts
    captions = captions_of(sample)
    return [captions.main, *captions.further, document(captions)]


def conversation_of(sample: Sample) -> Conversation:
    """The conversation or document of a sample. DataError: it has none, or a malformed one."""
    return Conversation.parse(json_of(sample.parts[""], sample.key), sample.key)


def captions_of(sample: Sample) -> Captions:
    """The texts of a pair. DataError: no or damaged `.json`, empty caption."""
    content = json_of(sample.parts[""], sample.key)
    main = content.get("caption")
    if not isinstance(main, str) or not main.strip():
        raise DataError(f"sample {sample.key!r} has no caption", "an image without text teaches nothing")
    further = content.get("captions") or []
    if not isinstance(further, list) or not all(isinstance(text, str) for text in further):
        raise DataError(f"sample {sample.key!r}: `captions` is not a list of texts", f"it is {further!r:.80}")
    return Captions(main.strip(), [text.strip() for text in further if text.strip()])


def document(captions: Captions) -> str:
    """The texts of a pair as one line, for text-only samples."""
    return f"{captions.main}: {', '.join(captions.further)}" if captions.further else captions.main


def grid_of(sample: Sample, part: str, extension: str, channels: int = 0) -> tuple[int, int]:
    """(rows, columns) of the array of `part`. DataError: damaged, or its shape is not [rows x columns, channels]."""
    shape = read_npy(sample.parts[part][extension], sample.key).shape if extension in sample.parts[part] else ()
    grid = json_of(sample.parts[part], sample.key).get("grid")
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise DataError(f"sample {sample.key!r}: the {part!r} part has no grid", f"`grid` is {grid!r}")
    rows, columns = grid
    if len(shape) != 2 or shape[0] != rows * columns or (channels and shape[1] != channels):
        wanted = f"[{rows * columns}, {channels or 'channels'}]"
        raise DataError(f"sample {sample.key!r}: the {part!r} part has shape {list(shape)}", f"expected {wanted}")
    return rows, columns


def feature_channels(pairs: ShardSet, part: str) -> int:
    """Channels D of the features, read from the first sample that has them. DataError if none has."""
    for number in range(len(pairs)):
        try:
            sample = pairs[number]
            grid_of(sample, part, "features.npy")
            return int(read_npy(sample.parts[part]["features.npy"], sample.key).shape[1])
        except DataError:
            continue
    raise DataError(f"{pairs.folder}: no sample has {part!r} features", "", "run `unicom features run`", "docs/data.md")


def image_of(sample: Sample) -> memoryview:
    """The stored image. DataError if there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.parts[""]:
            return sample.parts[""][extension]
    raise DataError(f"sample {sample.key!r} has no image", f"looked for {', '.join(IMAGE_EXTENSIONS)}")


def json_of(members: Mapping[str, memoryview], key: str) -> dict[str, Any]:
    """The content of a `.json` member. DataError: none, damaged, or not an object."""
    try:
        content = json.loads(bytes(members["json"]))
    except KeyError:
        raise DataError(f"sample {key!r} has no .json member") from None
    except ValueError as error:
        raise DataError(f"sample {key!r}: the .json member cannot be read", str(error)) from error
    if not isinstance(content, dict):
        raise DataError(f"sample {key!r}: the .json member is not an object")
    return content


def spread(limit: int, total: int) -> list[int]:
    """At most `limit` of `total` sample numbers, evenly apart: neighbours in key order are often of one kind."""
    count = min(limit, total)
    return [number * total // count for number in range(count)]
