"""The picture grids drawn while training: held-out reconstructions of the codec, prompts of the prior.

Both are drawn on rank 0 with the averaged weights; prompts, seed and solver come from the recipe's `sample` section.
"""

import torch
from PIL import Image

from unicom_dist.config.schema import Config
from unicom_dist.data.loader import heldout_codec_batches
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.codec import Codec, LatentStats
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.sample.grid import picture_grid
from unicom_dist.sample.loading import LoadedPrior
from unicom_dist.sample.pictures import Latents, to_pictures
from unicom_dist.sample.pipeline import UniComPipeline

RECONSTRUCTIONS = 16


@torch.no_grad()
def draw_reconstructions(config: Config, codec: Codec) -> tuple[Image.Image, list[str]]:
    """Held-out pictures, each followed by what the codec makes of its features; labelled with their keys."""
    batch = next(heldout_codec_batches(config, 0.0, RECONSTRUCTIONS))
    encoded = codec.encode(
        batch.features.to(next(codec.parameters()).device), batch.mask.to(next(codec.parameters()).device)
    )
    latents = []
    for values, mask, grid in zip(encoded.float().cpu(), batch.mask, batch.grid, strict=True):
        rows, columns = (grid[mask].amax(0) + 1).tolist()
        latents.append(Latents(values[mask], (rows, columns)))
    pipeline = UniComPipeline(codec, config.encoder)
    seeds = [config.sample.seed + number for number in range(len(latents))]
    drawn = pipeline.decode(latents, seeds, config.sample.decoder_steps, config.sample.solver)
    images, labels = [], []
    for key, original, image in zip(batch.keys, to_pictures(batch.images), drawn, strict=True):
        images += [original, image]
        labels += [key, "reconstructed"]
    return picture_grid(images, labels, columns=8, title="held out: original, reconstructed"), labels


def draw_prompts(
    config: Config, codec: Codec, prior: Transfusion, vocabulary: Vocabulary, stats: LatentStats
) -> tuple[Image.Image, list[str]]:
    """One picture per prompt of the recipe; the seed is the same at every step, so that grids can be compared."""
    sample = config.sample
    pipeline = UniComPipeline(codec, config.encoder, LoadedPrior(prior, vocabulary, stats))
    seeds = [sample.seed + number for number in range(len(sample.prompts))]
    images = pipeline(sample.prompts, seeds, sample.steps, sample.guidance, sample.solver, sample.decoder_steps)
    return picture_grid(images, sample.prompts), list(sample.prompts)
