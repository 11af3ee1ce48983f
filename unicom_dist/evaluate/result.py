"""What every suite shares: the recipe that an evaluation goes by, and the file its figures are written to.

`eval.json` holds the quick suite at the top and every other suite under `suites`; a suite replaces only its own part.
"""

import json
import os
from pathlib import Path
from typing import Any

from unicom_dist.checkpoint.weights import read_weights_config
from unicom_dist.config.errors import ConfigError, PreflightError
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import Config
from unicom_dist.config.storage import reason
from unicom_dist.evaluate.rows import Row
from unicom_dist.models.encoders.base import fingerprint, weights_digest
from unicom_dist.sample.loading import find_parts

EVAL_FILE = "eval.json"


def recipe_of(folder: Path, recipe: str | Path) -> Config:
    """The recipe given, else the run's own. ConfigError: a model folder without one; CheckpointError: no model."""
    if recipe or (folder / "config.yaml").is_file():
        return load_recipe(recipe or folder).config
    name = read_weights_config(find_parts(folder).codec).get("provenance", {}).get("recipe", "RECIPE")
    raise ConfigError(
        f"{folder} is a model folder, it holds no recipe",
        "the held-out pairs and the judging networks are named by one",
        f"unicom eval {folder} --recipe recipes/{name}.yaml (once `unicom features run` is done with it)",
        "docs/evaluation.md",
    )


def measured(folder: Path, config: Config) -> str:
    """Identity of what the quick suite's figures depend on: the weights of all parts, and the recipe's settings."""
    weights = sorted(folder.glob("weights/*/*.safetensors")) or sorted(folder.glob("*/*.safetensors"))
    settings = config.model_dump(mode="json", include={"data", "encoder", "sample", "eval", "seed"})
    return fingerprint({"weights": weights_digest(weights), "settings": settings})


def rows_before(folder: Path, identity: str) -> list[Row] | None:
    """The quick suite's rows in `folder/eval.json`, if they are of what has this identity."""
    before = _read(folder / EVAL_FILE)
    if before.get("measured") != identity:
        return None
    return [Row.from_dict(row) for row in before["rows"]]


def write_result(folder: Path, content: dict[str, Any]) -> Path:
    """Put the figures of the suite `content["suite"]` into `folder/eval.json`. PreflightError: not writable."""
    path = folder / EVAL_FILE
    before = _read(path)
    others = before.get("suites", {})
    if content["suite"] == "quick":
        whole = content | ({"suites": others} if others else {})
    else:
        whole = before | {"suites": others | {content["suite"]: content}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise PreflightError(f"{path} cannot be written", reason(error), "name another folder with --out") from None
    return path


def _read(path: Path) -> dict[str, Any]:
    """What is there; nothing of a file that is missing or no such result."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("suites", {}), dict) else {}
