"""What every prior of an ablation is measured by: pictures drawn for captions, at several steps of its training.

The judge is the one of prompt retrieval (`evaluate/judge.py`): it looks at pictures, so that priors over different
latents can be compared. Captions, noise and solver are the same for all; each picture's figure is kept.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unicom_dist.checkpoint.saved import Checkpoint, checkpoints
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.schema import Config
from unicom_dist.data.pairs import spread
from unicom_dist.evaluate.generation import Gallery, draw, resnet_judge
from unicom_dist.evaluate.heldout import Pair, read_pairs
from unicom_dist.evaluate.judge import Embed
from unicom_dist.models.query_guided import OWN
from unicom_dist.sample.loading import check_pair, load_codec, load_prior
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.train.ablation.cells import DOCS, Cell
from unicom_dist.train.ablation.measured import Measured, Metric, read, strip, write
from unicom_dist.train.stages import codec_folder
from unicom_dist.train.tasks import make_task

STRIP = "drawn.png"
SPLITS = {"heldout": "prompt retrieval, held out", "train": "prompt retrieval, training captions"}
METRICS = tuple(Metric(name, "", "higher") for name in SPLITS.values())


def at(metric: str, step: int) -> str:
    """Name of a figure at a step of the training."""
    return f"{metric} at step {step}"


def measure(
    cells: Sequence[Cell], config: Config, say: Callable[[str], None], embed: Embed | None = None
) -> tuple[list[Measured], list[tuple[str, Image.Image]]]:
    """The figures of every training, and (caption, original) of the pictures that are shown.

    Reads what was measured before and measures the rest. ConfigError, DataError, CheckpointError: something is missing.
    """
    encoder = load_codec(codec_folder(cells[0].config, cells[0].stage)).content["encoder_fingerprint"]
    pairs = {split: read_pairs(config, split, encoder) for split in SPLITS}
    chosen = {split: [some[n] for n in spread(config.eval.prompts, len(some))] for split, some in pairs.items()}
    shown = spread(config.ablation.pictures, len(chosen["heldout"]))
    gallery: Gallery | None = None
    found: list[Measured] = []
    for cell in cells:
        steps = [step for step, _ in saved(cell)]
        identity = {
            "prompts": {split: [pair.key for pair in some] for split, some in chosen.items()},
            "judge": config.eval.judge_path,
            "sample": config.sample.model_dump(mode="json"),
            "steps": steps,
            "shown": len(shown),
        }
        measured = read(cell.folder, identity, STRIP)
        if measured is None:
            if gallery is None:
                embed = embed or resnet_judge(config.eval.judge_path, config.codec.decoder.image_px)
                gallery = Gallery(embed, [pair for some in pairs.values() for pair in some])
            measured, pictures = figures(cell, chosen, gallery, identity)
            strip([pictures[number] for number in shown]).save(cell.folder / STRIP)
            write(cell.folder, measured)
            told = (f"{m.name} {measured.mean(at(m.name, steps[-1])):.3f}" for m in METRICS)
            say(f"{cell.name}: {'  '.join(told)}")
        found.append(measured)
    return found, [(chosen["heldout"][n].caption, chosen["heldout"][n].picture) for n in shown]


def saved(cell: Cell) -> list[tuple[int, Path]]:
    """The checkpoints of the stage that is compared, by step. CheckpointError without one."""
    found = [(int(path.name.rpartition("-")[2]), path) for path in checkpoints(cell.checkpoints)]
    if not found:
        raise CheckpointError(
            f"{cell.checkpoints} holds no checkpoint",
            "the priors of an ablation are compared at the steps of their checkpoints",
            "run the same command again: it trains what is missing",
            DOCS,
        )
    return sorted(found)


def figures(
    cell: Cell, chosen: dict[str, list[Pair]], gallery: Gallery, identity: dict[str, Any]
) -> tuple[Measured, list[Image.Image]]:
    """All figures of a training, and what its last weights draw for the held-out captions."""
    values: dict[str, list[float]] = {}
    for step, pipeline in at_steps(cell):
        drawn = {split: draw(pipeline, pairs, cell.config) for split, pairs in chosen.items()}
        for split, pairs in chosen.items():
            ranks = gallery.judge(drawn[split], [pair.caption for pair in pairs]).ranks
            values[at(SPLITS[split], step)] = gallery.prototypes.farther(ranks).tolist()
    weights = pipeline.prior.model.named_parameters()
    trained = sum(p.numel() for name, p in weights if not cell.stage.query.enabled or name.startswith(OWN))
    return Measured([pair.key for pair in chosen["heldout"]], trained, values, identity), drawn["heldout"]


def at_steps(cell: Cell) -> Iterator[tuple[int, UniComPipeline]]:
    """The model as it was at each checkpoint, with averaged weights."""
    task = make_task(cell.config, cell.stage)
    codec = load_codec(codec_folder(cell.config, cell.stage))
    for step, path in saved(cell):
        with tempfile.TemporaryDirectory(prefix="unicom-ablation-") as folder:
            task.export(Path(folder), Checkpoint(path).tensors("ema"), step)
            prior = load_prior(Path(folder))
        check_pair(codec.content, prior.content, cell.folder)
        yield step, UniComPipeline(codec.model, codec.encoder, prior, codec.content)
