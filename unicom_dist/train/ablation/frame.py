"""What is around the trainings of every ablation: before them run directory and status, after them result and page."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from unicom_dist.config.explain import write_config
from unicom_dist.config.load import Loaded
from unicom_dist.config.schema import StageConfig
from unicom_dist.tracking.env import write_env
from unicom_dist.tracking.mirror import start_mirror
from unicom_dist.tracking.report.document import write_page
from unicom_dist.tracking.status import write_status
from unicom_dist.train.ablation.cells import Cell
from unicom_dist.train.ablation.measured import strip_of
from unicom_dist.train.pipeline import final_status, preflight

RESULT, PAGE, SHEET = "ablation.json", "ablation.html", "samples/ablation/sheet.png"


@contextmanager
def ablation(loaded: Loaded, stage: StageConfig) -> Iterator[Path]:
    """The ablation's run directory; its status says how the block ended. `stage`: the one that is compared."""
    config, folder = loaded.config, Path(loaded.config.run_dir)
    preflight(config)
    write_config(folder, config, loaded.origins)
    write_env(folder)
    write_status(folder, "running")
    start_mirror(folder, config.tracking)
    try:
        yield folder
    except BaseException as error:
        final_status(config, error)
        raise
    write_status(folder, "done", stage=stage.name, step=stage.steps, exit_code=0)


def strips_of(cells: Sequence[Cell], name: str) -> dict[str, list[Image.Image]]:
    """By variant, the pictures of the strip `name` of its first seed."""
    return {cell.variant.name: strip_of(cell.folder / name) for cell in reversed(cells)}


def publish(
    folder: Path, result: Mapping[str, Any], sheet: Image.Image, render: Callable[[Mapping[str, Any], Path, Path], str]
) -> Path:
    """Write result, sheet, and the page that `render(result, path of the sheet, folder)` makes; the page's path."""
    write_page(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (folder / SHEET).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / SHEET)
    write_page(folder / PAGE, render(result, folder / SHEET, folder))
    return folder / PAGE
