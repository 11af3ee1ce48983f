"""Reading a run directory back: its configuration with origins, and what the tracking tools want of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unicom_dist.config.errors import DataError

CONFIG_FILE = "config.yaml"
DOCS = "docs/tracking.md"


@dataclass(frozen=True)
class RunConfig:
    """The resolved configuration as plain values, and where each dotted key came from ("" origin: not recorded)."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Dotted key to value; stages are addressed by name as on the command line."""
        return flatten(self.values)


def run_folder(path: str | Path) -> Path:
    """`path` as an absolute folder that looks like a run; DataError when it is none."""
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise DataError(
            f"{path} is not a folder", "a run directory is expected", "give the `run_dir` of a recipe", DOCS
        )
    if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", "status")):
        raise DataError(
            f"{path} is not a run directory",
            "it has none of metrics.jsonl, config.yaml and status",
            "give the `run_dir` of a recipe that was started with `unicom train`",
            DOCS,
        )
    return folder


def read_config(run_dir: str | Path) -> RunConfig:
    """The config.yaml of a run; an empty one when there is none or it cannot be read."""
    try:
        item = yaml.safe_load((Path(run_dir) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return RunConfig()
    if not isinstance(item, dict):
        return RunConfig()
    origins = item.pop("origins", None)
    values = item.pop("config") if isinstance(item.get("config"), dict) else item
    return RunConfig(values, {str(k): str(v) for k, v in origins.items()} if isinstance(origins, dict) else {})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a list of named sections is addressed by the names, any other list is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
            for section in value:
                flat.update(flatten(section, f"{prefix}{key}.{section['name']}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def without_credentials(text: str) -> str:
    """`text` with `user:password@` taken out of every address in it, fit for files and screens."""
    return re.sub(r"://[^/\s]+@", "://", text)  # up to the last @: a password may hold one
