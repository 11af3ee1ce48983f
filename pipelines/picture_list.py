"""The pictures below a folder or in its tars, and under which names below another folder their results go."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from PIL import Image

from pipelines.parts import reason_of
from pipelines.sources import IMAGE_SUFFIXES
from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.data.decode import decode_image
from unicom_dist.data.tar import Shard

DOCS = "docs/codec.md"
SHEET = "reconstructions.png"  # among the results, a name no result has


@dataclass(frozen=True)
class Picture:
    """One picture to reconstruct: `name` below the source, where it is, and where it goes."""

    name: str
    path: str
    target: str
    member: tuple[int, str] | None = None  # of a tar

    def read(self) -> Image.Image:
        """Upright RGB. DataError: missing or damaged."""
        try:
            content = _shard(self.path).member(*self.member) if self.member else Path(self.path).read_bytes()
        except OSError as error:
            raise DataError(f"{self.name}: {error.strerror or error}") from error
        return decode_image(content, self.name)


@lru_cache(maxsize=8)
def _shard(path: str) -> Shard:
    return Shard(path)


def list_pictures(source: str | Path, out: Path, limit: int = 0) -> tuple[list[Picture], dict[str, str]]:
    """The pictures below `source`, or in the tar or picture `source`, in the order of their names, and unreadable tars.

    Two pictures that differ in their suffix alone keep it: a.jpg.png. `limit` = 0: all. What is below `out` does not
    count. ConfigError: `out` is `source` itself. DataError: no such folder, no picture in it.
    """
    root = Path(source)
    if root.resolve() == out.resolve():
        raise ConfigError(f"--out {out}", "the pictures are read from there", "name another folder", DOCS)
    inside = out.resolve().is_relative_to(root.resolve())
    found: list[tuple[str, str, tuple[int, str] | None]] = []
    broken: dict[str, str] = {}
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    for path in files:
        if not path.is_file() or (inside and path.resolve().is_relative_to(out.resolve())):
            continue
        name = path.name if path == root else path.relative_to(root).as_posix()
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found.append((name, str(path), None))
        elif path.suffix == ".tar":
            try:
                found += _members(path, name.removesuffix(".tar"))
            except DataError as error:
                broken[name] = reason_of(error, name)
    if not found:
        reason = "; ".join(f"{name}: {why}" for name, why in broken.items())
        raise DataError(
            f"--reconstruct {source}",
            reason or ("there is no image in this folder" if root.is_dir() else "there is no such folder"),
            f"name a folder of images ({' '.join(IMAGE_SUFFIXES)}) or tars, or `heldout` with a run directory",
            DOCS,
        )
    short = [PurePosixPath(name).with_suffix(".png").as_posix() for name, _, _ in found]
    wanted = Counter([*short, SHEET])
    names = [name for name, _, _ in found]
    targets = [f"{name}.png" if wanted[target] > 1 else target for name, target in zip(names, short, strict=True)]
    if len(set(targets)) < len(targets):
        targets = [f"{name}.png" for name in names]
    pictures = [
        Picture(name, path, str(out / target), member)
        for (name, path, member), target in zip(found, targets, strict=True)
    ]
    pictures.sort(key=lambda picture: picture.name)
    return pictures[: limit or None], broken


def _members(path: Path, stem: str) -> Iterator[tuple[str, str, tuple[int, str]]]:
    shard = Shard(path)
    for number, key in enumerate(shard.keys):
        extension = next((ext for ext in shard[number] if f".{ext.lower()}" in IMAGE_SUFFIXES), None)
        if extension is not None:
            yield f"{stem}/{key.lstrip('/')}.{extension}", str(path), (number, extension)
