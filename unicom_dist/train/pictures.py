"""The picture grids drawn while training: held-out reconstructions of the codec, prompts and edits of the prior.

They are drawn on rank 0 with the averaged weights; prompts, seed and solver come from the recipe's `sample` section.
"""

import itertools
from collections.abc import Sequence

import torch
from PIL import Image

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.buckets import Shape
from unicom_dist.data.loader import heldout_codec_batches
from unicom_dist.data.pairs import captions_of, open_set, spread
from unicom_dist.data.text import Vocabulary
from unicom_dist.evaluate.edits import draw_edits, edit_grid, read_edits
from unicom_dist.models.codec import Codec, LatentStats
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.models.target import Target
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.sample.drawing import Drawing
from unicom_dist.sample.grid import picture_grid
from unicom_dist.sample.loading import LoadedPrior
from unicom_dist.sample.pictures import Latents, to_pictures
from unicom_dist.sample.pipeline import UniComPipeline

RECONSTRUCTIONS = 16
EDITS = 8


@torch.no_grad()
def draw_reconstructions(config: Config, codec: Codec, target: Target) -> tuple[Image.Image, list[str]]:
    """Held-out pictures, each followed by what the codec makes of its features; labelled with their captions."""
    pipeline = UniComPipeline(codec, config.encoder, target=target)
    seeds = itertools.count(config.sample.seed)
    images, keys, sample = [], [], config.sample
    for batch in heldout_codec_batches(config, 0.0, RECONSTRUCTIONS):
        there = batch.to(next(codec.parameters()).device)
        encoded = codec.encode(codec.features(there), there.mask, there.grid)
        latents = []
        places, real = codec.compressor.layout(batch.grid, batch.mask)
        assert real is not None
        for values, mask, grid in zip(encoded.float().cpu(), real, places, strict=True):
            rows, columns = (grid[mask].amax(0) + 1).tolist()
            latents.append(Latents(values[mask], (rows, columns)))
        own = list(itertools.islice(seeds, len(latents)))
        shapes = [Shape(*batch.images.shape[-2:])] * len(latents)
        drawn = pipeline.decode(latents, own, sample.decoder_steps, sample.solver, shapes, sample.decoder_guidance)
        images += [picture for pair in zip(to_pictures(batch.images), drawn, strict=True) for picture in pair]
        keys += batch.keys
    labels = [text for caption in heldout_captions(config, keys) for text in (caption, "reconstructed")]
    return picture_grid(images, labels, columns=8, title="held out: original, reconstructed"), labels


def heldout_captions(config: Config, keys: Sequence[str]) -> list[str]:
    """The captions of the held-out samples `keys`, which are evenly apart; the key itself where there is no caption.

    Each is at its place or, where the loader had to take the next readable sample, after it.
    """
    pairs, captions = open_set(config, "heldout"), []
    for first, key in zip(spread(len(keys), len(pairs)), keys, strict=True):
        number = next(n % len(pairs) for n in range(first, first + len(pairs)) if pairs.key(n % len(pairs)) == key)
        try:
            captions.append(captions_of(pairs[number]).main)
        except DataError:
            captions.append(key)
    return captions


def draw_prompts(
    config: Config, codec: Codec, prior: Transfusion, vocabulary: Vocabulary, stats: LatentStats
) -> tuple[Image.Image, list[str]]:
    """One picture per prompt of the recipe; the seed is the same at every step, so that grids can be compared."""
    sample = config.sample
    pipeline = UniComPipeline(codec, config.encoder, LoadedPrior(prior, vocabulary, stats))
    seeds = [sample.seed + number for number in range(len(sample.prompts))]
    images = pipeline.draw([pipeline.asking(prompt) for prompt in sample.prompts], seeds, Drawing.of(sample))
    return picture_grid(images, sample.prompts), list(sample.prompts)


def draw_heldout_edits(
    config: Config, codec: Codec, prior: Transfusion, vocabulary: Vocabulary, stats: LatentStats
) -> tuple[Image.Image, list[str]] | None:
    """Edits of held-out pictures: shown, drawn, target; None where the recipe has none."""
    edits = read_edits(config, encoder_fingerprint(config.encoder), EDITS)
    if not edits:
        return None
    pipeline = UniComPipeline(codec, config.encoder, LoadedPrior(prior, vocabulary, stats))
    return edit_grid(edits, draw_edits(pipeline, edits, config)), [edit.instruction for edit in edits]


def one_above_the_other(pictures: Sequence[Image.Image]) -> Image.Image:
    """Grids in one picture, on white."""
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
