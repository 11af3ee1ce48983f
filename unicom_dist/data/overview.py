"""A look at the shard sets of a recipe: are they whole, how much is in them, what do they show.

Reads manifests and, for statistics and pictures, the shards; writes nothing. Torch is not used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unicom_dist.config.errors import DataError
from unicom_dist.data.decode import IMAGE_EXTENSIONS, decode_image
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.pairs import Captions, captions_of, conversation_of, json_of
from unicom_dist.data.shardset import Sample, ShardSet
from unicom_dist.data.tar import Shard

SETS = ("train", "augmented", "heldout")


@dataclass(frozen=True)
class SetCheck:
    """One part of one set; `problems` is empty when it is whole."""

    set: str
    part: str
    shards: int
    samples: int
    problems: list[str]


@dataclass(frozen=True)
class SetStats:
    """How much a set holds. Words are counted in the main captions; `bytes` are those of the image shards."""

    set: str
    shards: int
    samples: int
    bytes: int
    distinct_captions: int
    mean_words: float
    further_captions: int
    skipped: int


def existing_sets(folder: str | Path) -> list[Path]:
    """The set folders below `folder`, or `folder` itself when it is a set. DataError if there is none."""
    root = Path(folder)
    if Manifest.file(root).is_file():
        return [root]
    there = sorted(path.parent for path in root.glob("*/manifest.json"))
    found = sorted(there, key=lambda path: SETS.index(path.name) if path.name in SETS else len(SETS))
    if not found:
        raise DataError(
            f"{root} holds no shard set",
            "no folder below it has a manifest.json",
            "run `unicom data ingest` with the same recipe first",
            "docs/data.md",
        )
    return found


def check_sets(folder: str | Path, digests: bool = True) -> Iterator[SetCheck]:
    """Every part of every set against its manifest; `digests` reads every byte. DataError as `existing_sets`."""
    for path in existing_sets(folder):
        manifests = ["", *(name.name.split(".")[1] for name in sorted(path.glob("manifest.*.json")))]
        for part in manifests:
            try:
                manifest = Manifest.read(path, part)
                problems = manifest.verify(path, digests=digests)
                problems += [problem for shard in manifest.shards if (problem := _readable(path / shard.name))]
            except DataError as error:
                yield SetCheck(path.name, part or "images", 0, 0, [f"{error.what}: {error.why}"])
                continue
            yield SetCheck(path.name, part or "images", len(manifest.shards), manifest.samples, problems)


def set_stats(folder: str | Path) -> Iterator[SetStats]:
    """Counts of every set. DataError when a set is missing or a shard is damaged."""
    for path in existing_sets(folder):
        shards = ShardSet(path)
        captions = [_texts(shards[number]) for number in range(len(shards))]
        words = sum(len(caption.main.split()) for caption in captions)
        yield SetStats(
            set=path.name,
            shards=len(shards.manifest.shards),
            samples=len(shards),
            bytes=shards.manifest.bytes,
            distinct_captions=len({caption.main for caption in captions}),
            mean_words=words / max(1, len(captions)),
            further_captions=sum(len(caption.further) for caption in captions),
            skipped=len(shards.manifest.skipped),
        )


def preview(folder: str | Path, name: str, count: int) -> tuple[list[Image.Image], list[str]]:
    """`count` samples spread evenly over a set: their pictures, and captions. DataError.

    Of a conversation the pictures that it shows, each under what is said up to it.
    """
    path = _set_folder(Path(folder), name)
    shards = ShardSet(path)
    if not len(shards):
        raise DataError(
            f"{path} is empty", "it has shards for no sample", "ingest a source that has images", "docs/data.md"
        )
    count = min(count, len(shards))
    images: list[Image.Image] = []
    labels: list[str] = []
    others: dict[str, Sample] = {}
    for number in range(count):
        sample = shards[number * len(shards) // count]
        if not _is_conversation(sample):
            images.append(_image(sample))
            labels.append(captions_of(sample).main)
            continue
        others = others or _samples(existing_sets(folder))
        for text, key in conversation_of(sample).shown():
            shown = sample if key == sample.key else others.get(key)
            if shown is None:
                raise DataError(
                    f"sample {sample.key!r} shows the image {key!r}, which no set has", "", "", "docs/data.md"
                )
            images.append(_image(shown))
            labels.append(text)
    if not images:
        raise DataError(
            f"{path} shows no pictures", "its samples are text alone", "`unicom data stats` counts them", "docs/data.md"
        )
    return images, labels


def _set_folder(root: Path, name: str) -> Path:
    """The set `name` below `root`, or `root` itself when it is a set. DataError if there is none."""
    found = {path.name: path for path in existing_sets(root)}
    if root in found.values():
        return root
    if name not in found:
        raise DataError(
            f"{root} has no set {name!r}",
            "no folder of this name has a manifest",
            f"it has {', '.join(found)}",
            "docs/data.md",
        )
    return found[name]


def _samples(folders: list[Path]) -> dict[str, Sample]:
    sets = [ShardSet(folder) for folder in folders]
    return {key: shards[number] for shards in sets for number, key in enumerate(shards.keys())}


def _is_conversation(sample: Sample) -> bool:
    return bool({"messages", "document"} & json_of(sample.parts[""], sample.key).keys())


def _texts(sample: Sample) -> Captions:
    """The captions of a pair, or what is said in a conversation."""
    return Captions(" ".join(conversation_of(sample).texts), []) if _is_conversation(sample) else captions_of(sample)


def _image(sample: Sample) -> Image.Image:
    members = sample.parts[""]
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return decode_image(members[extension], sample.key)
    raise DataError(f"sample {sample.key!r} has no image", f"it holds {', '.join(members)}")


def _readable(path: Path) -> str:
    if not path.is_file():
        return ""  # the manifest's own check has named it
    try:
        Shard(path)
    except DataError as error:
        return f"{error.what}: {error.why}"
    return ""
