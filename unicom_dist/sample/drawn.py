"""Which pictures a folder holds already: those of the same weights, settings and prompts are not drawn again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicom_dist.config.schema import SampleConfig
from unicom_dist.data.tar import replace_file
from unicom_dist.models.encoders.base import fingerprint, weights_digest
from unicom_dist.sample.loading import find_parts

RECORD = "drawn.json"


def identity_of(checkpoint: str, stage: str, settings: SampleConfig, asked: Mapping[str, Any]) -> str:
    """Identity of what pictures depend on; reads the weights once. CheckpointError as `find_parts`."""
    parts = find_parts(checkpoint, stage)
    folders = [folder for folder in (parts.codec, parts.prior) if folder]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    return fingerprint({"weights": weights_digest(files), "settings": settings.model_dump(mode="json"), **asked})


def is_drawn(folder: Path, identity: str) -> bool:
    """Whether the pictures noted in `folder` are of this identity and all there."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return bool(record["identity"] == identity and all((folder / name).is_file() for name in record["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def note_drawn(folder: Path, identity: str) -> None:
    """Note that the pictures in `folder` are of this identity. PreflightError: not writable."""
    names = sorted(path.name for path in folder.glob("*.png"))
    replace_file(folder / RECORD, (json.dumps({"identity": identity, "files": names}, indent=1) + "\n").encode())
