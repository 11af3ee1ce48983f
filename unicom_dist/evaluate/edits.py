"""Edits of held-out pictures: does the drawn picture come nearer to the one that was asked for?

What it is compared with: what the untrained prior draws, and the first reference as the codec gives it back, which is
what a model that ignores the instruction would draw.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, held_out_set
from unicom_dist.data.buckets import Buckets
from unicom_dist.data.conversations import Conversation, Message
from unicom_dist.data.images import Found, Images
from unicom_dist.data.loader import heldout_sets
from unicom_dist.data.pairs import conversation_of, open_set, spread
from unicom_dist.data.samples import Words
from unicom_dist.evaluate.heldout import Pair, read_pair, to_unit
from unicom_dist.evaluate.image_metrics import psnr
from unicom_dist.evaluate.reconstruction import Distance, reconstruct
from unicom_dist.evaluate.rows import Better, Row, measure
from unicom_dist.sample.dialogue import Dialogue
from unicom_dist.sample.drawing import Drawing
from unicom_dist.sample.grid import picture_grid
from unicom_dist.sample.pipeline import UniComPipeline

log = logging.getLogger(__name__)
SPLIT = "heldout edits"
NOTE = "Edits: the drawn picture against the target; reference unchanged: the first picture shown, after the codec."
COLUMNS = 6  # of a grid: two edits a row


@dataclass(frozen=True)
class PictureEdit:
    """What is shown, what is asked for, and what it should look like."""

    references: tuple[Pair, ...]
    instruction: str
    target: Pair


def read_edits(config: Config, encoder: str, limit: int) -> list[PictureEdit]:
    """At most `limit` edits of held-out pictures, evenly apart over the sets; [] where the recipe has none.

    Conversations of another form, and malformed ones, are left out. `encoder`: the fingerprint of the features'.
    DataError: features of another encoder, or none.
    """
    kind, expected = config.encoder.kind, {str(config.encoder.kind): encoder}
    names = [held_out_set(name) for name, holds in heldout_sets(config).items() if holds == "image_text_to_image"]
    if not names:
        return []
    sets = [open_set(config, name, expect_fingerprint=expected) for name in ("heldout", *names)]
    images, buckets = Images(sets, kind), Buckets(config.codec.decoder)

    def pair(key: str, wanted_by: str) -> Pair:
        found = images.find(key, wanted_by)
        return read_pair(sets[found.which], found.number, kind, buckets)

    every = [Found(which, number) for which in range(1, len(sets)) for number in range(len(sets[which]))]
    edits = []
    for found in (every[number] for number in spread(limit, len(every))):
        sample = images.sample(found)
        try:
            parts = single_edit(conversation_of(sample))
            if parts is not None:
                references, instruction, target = parts
                shown = tuple(pair(key, sample.key) for key in references)
                edits.append(PictureEdit(shown, instruction, pair(target, sample.key)))
        except DataError as error:
            log.warning("left out of the evaluation: %s", error.what)
    return edits


def single_edit(conversation: Conversation) -> tuple[list[str], str, str] | None:
    """Keys of the references, instruction, key of the target; None unless pictures and words get one picture."""
    if [message.role for message in conversation.messages] != ["user", "assistant"]:
        return None
    user, reply = conversation.messages
    references = [part for part in user.parts if isinstance(part, str)]
    instruction = " ".join(part.text for part in user.parts if isinstance(part, Words))
    targets = [part for part in reply.parts if isinstance(part, str)]
    return (references, instruction, targets[0]) if references and instruction and len(targets) == 1 else None


def draw_edits(pipeline: UniComPipeline, edits: Sequence[PictureEdit], config: Config) -> list[Image.Image]:
    """A picture for each edit as the recipe's `sample` section says, on the grid of the target."""
    how = Drawing.of(config.sample)
    seen = iter(pipeline.seen([pair.features for edit in edits for pair in edit.references]))
    asked = []
    for edit in edits:
        images = {str(number): next(seen) for number in range(len(edit.references))}
        asked.append(Dialogue((Message("user", (*images, Words(edit.instruction))),), images))
    pictures: dict[int, Image.Image] = {}
    for grid in {edit.target.grid for edit in edits}:
        chosen = [number for number, edit in enumerate(edits) if edit.target.grid == grid]
        drawn = pipeline.draw(
            [asked[number] for number in chosen],
            [config.sample.seed + number for number in chosen],
            how,
            pipeline.codec.config.compressor.latent_grid(grid),
        )
        pictures.update(zip(chosen, drawn, strict=True))
    return [pictures[number] for number in range(len(edits))]


def edit_rows(
    edits: Sequence[PictureEdit],
    drawn: Sequence[Image.Image],
    untrained: Sequence[Image.Image],
    pipeline: UniComPipeline,
    config: Config,
    lpips: Distance,
) -> list[Row]:
    """LPIPS and PSNR of the drawn pictures to the targets."""
    unchanged = reconstruct(pipeline, [edit.references[0] for edit in edits], config)
    metrics: list[tuple[str, Distance, Better]] = [
        ("LPIPS (VGG)", lpips_of(lpips), "lower"),
        ("PSNR (dB)", psnr, "higher"),
    ]
    rows = []
    for name, metric, better in metrics:
        model, fresh, same = (_each(metric, edits, pictures) for pictures in (drawn, untrained, unchanged))
        trivial = ("reference unchanged", sum(same) / len(same))
        mean = sum(fresh) / len(fresh)
        rows.append(measure(f"edit: {name}", SPLIT, model, better, None, mean, trivial, NOTE))
    return rows


def lpips_of(lpips: Distance) -> Distance:
    """The perceptual distance of pictures in [0, 1]."""

    def distance(images: Tensor, references: Tensor) -> Tensor:
        with torch.no_grad():
            return lpips(images * 2 - 1, references * 2 - 1).double()

    return distance


def _each(metric: Distance, edits: Sequence[PictureEdit], pictures: Sequence[Image.Image]) -> list[float]:
    values = []
    for edit, picture in zip(edits, pictures, strict=True):
        target = edit.target.picture
        fitted = picture if picture.size == target.size else picture.resize(target.size, Image.Resampling.LANCZOS)
        values.append(float(metric(to_unit([fitted]), to_unit([target]))[0]))
    return values


def edit_grid(edits: Sequence[PictureEdit], drawn: Sequence[Image.Image], cell_px: int = 128) -> Image.Image:
    """Three pictures an edit: what is shown, what was drawn under the instruction, the target."""
    images, labels = [], []
    for edit, picture in zip(edits, drawn, strict=True):
        images += [_beside([pair.picture for pair in edit.references]), picture, edit.target.picture]
        labels += ["shown", edit.instruction, "target"]
    return picture_grid(images, labels, COLUMNS, cell_px, title="edits of held-out pictures: shown, drawn, target")


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    if len(pictures) == 1:
        return pictures[0]
    height = max(picture.height for picture in pictures)
    canvas = Image.new("RGB", (sum(picture.width for picture in pictures), height), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, (height - picture.height) // 2))
        left += picture.width
    return canvas
