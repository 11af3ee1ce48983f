"""What one worker of `unicom generate` does: draw pictures with one model, into PNGs or into a tar."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from unicom_dist.data.encode import png_bytes
from unicom_dist.data.tar import ShardWriter, replace_file
from unicom_dist.sample.guidance import Renorm
from unicom_dist.sample.pipeline import MAX_PROMPT_TOKENS, UniComPipeline
from unicom_dist.sample.solver import Solver


@dataclass(frozen=True)
class Settings:
    """What the pictures depend on besides model and prompts."""

    images_per_prompt: int = 1
    seed: int = 0
    steps: int = 25
    guidance: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    renorm: Renorm = "none"
    renorm_min: float = 0.0
    solver: Solver = "euler"
    decoder_steps: int = 8
    decoder_guidance: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Wanted:
    """One picture: its key, which is its name without extension, what it shows and its seed."""

    key: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Task:
    """Pictures that one worker makes together: files below the folder `target`, or the tar `target`."""

    name: str
    target: str
    pictures: tuple[Wanted, ...]


class GenerateWorker:
    """Draws with one model. Lives in one actor, or in the job's own process."""

    def __init__(self, model: str, stage: str, batch: int, settings: Settings, fingerprint: str) -> None:
        dtype = getattr(torch, settings.dtype)
        self._pipeline = UniComPipeline.from_pretrained(model, dtype=dtype, stage=stage, batch=batch)
        self._batch, self._settings, self._fingerprint = batch, settings, fingerprint

    def process(self, task: Task, count: Callable[[int], None]) -> dict[str, str]:
        """Write what is not there of a task; {key: reason} of what cannot be drawn."""
        skipped: dict[str, str] = {}
        if task.target.endswith(".tar"):
            with ShardWriter(task.target) as writer:
                for wanted, facts, png in self._drawn(task.pictures, skipped, count):
                    text, described = wanted.prompt.encode(), json.dumps(facts, ensure_ascii=False).encode()
                    writer.write(wanted.key, {"png": png, "txt": text, "json": described})
            return skipped
        missing = [wanted for wanted in task.pictures if not picture_file(Path(task.target), wanted).is_file()]
        count(len(task.pictures) - len(missing))  # by a worker that was killed
        for wanted, _, png in self._drawn(missing, skipped, count):
            replace_file(picture_file(Path(task.target), wanted), png)
        return skipped

    def _drawn(
        self, pictures: Sequence[Wanted], skipped: dict[str, str], count: Callable[[int], None]
    ) -> Iterator[tuple[Wanted, dict[str, Any], bytes]]:
        """Each picture with its facts, as a PNG that holds them, too."""
        how = self._settings
        for start in range(0, len(pictures), self._batch):
            some = pictures[start : start + self._batch]
            usable = [wanted for wanted in some if self._fits(wanted, skipped)]
            if not usable:
                count(len(some))
                continue
            drawn = self._pipeline(
                [wanted.prompt for wanted in usable],
                seeds=[wanted.seed for wanted in usable],
                steps=how.steps,
                guidance=how.guidance,
                guidance_interval=how.guidance_interval,
                renorm=how.renorm,
                renorm_min=how.renorm_min,
                solver=how.solver,
                decoder_steps=how.decoder_steps,
                decoder_guidance=how.decoder_guidance,
            )
            for wanted, image in zip(usable, drawn, strict=True):
                facts = {**asdict(how), "prompt": wanted.prompt, "seed": wanted.seed, "model": self._fingerprint}
                yield wanted, facts, png_bytes(image, facts)
            count(len(some))

    def _fits(self, wanted: Wanted, skipped: dict[str, str]) -> bool:
        length = len(self._pipeline.prior.vocabulary.encode(wanted.prompt))
        if length > MAX_PROMPT_TOKENS:
            skipped[wanted.key] = f"the prompt has {length} tokens, at most {MAX_PROMPT_TOKENS} are read"
        return length <= MAX_PROMPT_TOKENS


def picture_file(folder: Path, wanted: Wanted) -> Path:
    """Where a picture goes that is a file of its own."""
    return folder / f"{wanted.key}.png"


def build_worker(model: str, stage: str, batch: int, settings: Settings, fingerprint: str) -> GenerateWorker:
    """The worker of an actor; it takes the actor's GPU if it has one."""
    return GenerateWorker(model, stage, batch, settings, fingerprint)
