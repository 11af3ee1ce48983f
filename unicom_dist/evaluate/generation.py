"""Do the drawn pictures show what was asked for? Nearest prototype in the features of ResNet50 (see `judge.py`).

Prototypes are the pictures of training and held-out set, at the size the model draws. Prompts are captions of both
sets; those of the held-out set were never trained on. The codec's reconstructions of the real pictures are judged as
well: what the judge makes of them bounds what a perfect prior could reach. Where pictures have keywords, those that
many share are kinds with a prototype each, and a drawn picture can at least be of the right kind.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unicom_dist.config.schema import Config
from unicom_dist.evaluate.heldout import Pair
from unicom_dist.evaluate.judge import Embed, Prototypes, build_prototypes, correct_within
from unicom_dist.evaluate.rows import Row, measure
from unicom_dist.models.encoders.resnet import load_resnet50
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.sample.drawing import Drawing
from unicom_dist.sample.loading import LoadedPrior
from unicom_dist.sample.pipeline import UniComPipeline

TOP = (1, 5)
KIND_SHARE = 0.02  # of the pictures: a keyword that so many have is a kind
NOTE = (
    "Prompt accuracy: share of pictures whose caption's prototype is the nearest, or among the nearest five, of all; "
    "prompt retrieval: share of the other prototypes that are farther than it; "
    "prompt kind: share of pictures nearest to the mean picture of their caption's kind. "
    "Judged by ResNet50, which is neither encoder nor loss network."
)


def resnet_judge(folder: str, image_px: int, device: torch.device | str = "cpu", batch: int = 32) -> Embed:
    """Pictures to pooled ResNet50 features [B, 2048]. ConfigError if the weights are missing.

    Pictures are shown at their own size, but between 64 px, below which the network leaves nothing of them, and the
    224 px it was trained at. Measured on 500 emoji reduced to 32 px, share nearest to the prototype of their original:
    .93 when all are shown at 64 px, .73 at 128 px.
    """
    network = load_resnet50(folder, device)
    side = min(max(64, image_px), 224)

    def embed(pictures: Sequence[Image.Image]) -> Tensor:
        found = []
        for start in range(0, len(pictures), batch):
            shown = [
                p.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for p in pictures[start : start + batch]
            ]
            pixels = torch.from_numpy(np.stack([np.asarray(p) for p in shown])).permute(0, 3, 1, 2)
            with torch.inference_mode():
                found.append(network(pixels.to(device).float() / 127.5 - 1).cpu())
        return torch.cat(found).clone()

    return embed


@dataclass(frozen=True)
class Drawn:
    """Pictures for prompts, and how many prototypes are nearer than the prompt's own (0 = right).

    `kind_ranks`: the same for the prototypes of kinds, of the prompts that have one.
    """

    prompts: list[str]
    pictures: list[Image.Image]
    ranks: Tensor
    kind_ranks: Tensor


class Gallery:
    """The judge with the prototypes of all known pictures, and of their kinds where there are some."""

    def __init__(self, embed: Embed, pairs: Sequence[Pair]) -> None:
        self._embed = embed
        features = embed([pair.picture for pair in pairs])
        self.prototypes: Prototypes = build_prototypes(features, [pair.caption for pair in pairs])
        kinds = kinds_of(pairs)
        self._kinds = {pairs[number].caption: kind for number, kind in kinds.items()}
        self.kinds = build_prototypes(features[list(kinds)], list(kinds.values())) if kinds else None

    def judge(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Drawn:
        """Rank every picture's caption among the prototypes, and its kind among the kinds."""
        features = self._embed(pictures)
        of_kind = [number for number, caption in enumerate(captions) if caption in self._kinds]
        kind_ranks = torch.empty(0, dtype=torch.int64)
        if self.kinds and of_kind:
            kind_ranks = self.kinds.ranks(features[of_kind], [self._kinds[captions[number]] for number in of_kind])
        return Drawn(list(captions), list(pictures), self.prototypes.ranks(features, captions), kind_ranks)


def kinds_of(pairs: Sequence[Pair]) -> dict[int, str]:
    """By number of the pair, the commonest of its further texts, if at least KIND_SHARE of the pairs have it.

    Empty where all would be of one kind.
    """
    counts = Counter(text for pair in pairs for text in set(pair.further))
    kinds = {}
    for number, pair in enumerate(pairs):
        commonest = max(pair.further, key=lambda text: (counts[text], text), default="")
        if counts[commonest] >= max(2, KIND_SHARE * len(pairs)):
            kinds[number] = commonest
    return kinds if len(set(kinds.values())) > 1 else {}


def draw(pipeline: UniComPipeline, pairs: Sequence[Pair], config: Config) -> list[Image.Image]:
    """A picture for each pair's caption as the recipe's `sample` section says, on the grid of the pair's latents."""
    sample = config.sample
    how = Drawing.of(sample)
    pictures: dict[int, Image.Image] = {}
    seeds = {number: sample.seed + number for number in range(len(pairs))}
    latent_grid = pipeline.codec.config.compressor.latent_grid
    for grid in {pair.grid for pair in pairs}:
        chosen = [number for number, pair in enumerate(pairs) if pair.grid == grid]
        drawn = pipeline.draw(
            [pipeline.asking(pairs[number].caption) for number in chosen],
            [seeds[number] for number in chosen],
            how,
            latent_grid(grid),
        )
        pictures.update(zip(chosen, drawn, strict=True))
    return [pictures[number] for number in range(len(pairs))]


def untrained_prior(pipeline: UniComPipeline, seed: int) -> UniComPipeline:
    """The same codec with a prior of initial weights, which draws the noise it began with.

    So it does with either prediction, but with that of the velocity, which is 0 everywhere, `in_one_step`.
    """
    prior = pipeline.prior
    model = prior.model
    config = model.config.model_copy(update={"prediction": "velocity"})
    fresh = Transfusion(config, prior.vocabulary.size, model.latent_channels, model.feature_channels, seed)
    fresh = fresh.to(pipeline.device, model.dtype).eval().requires_grad_(False)
    loaded = LoadedPrior(fresh, prior.vocabulary, prior.stats)
    return UniComPipeline(pipeline.codec, pipeline.encoder_config, loaded, batch=pipeline.batch)


def in_one_step(config: Config) -> Config:
    """The recipe for drawing with `untrained_prior`: one step ends where any number of steps would."""
    return config.model_copy(update={"sample": config.sample.model_copy(update={"steps": 1})})


def prompt_rows(
    gallery: Gallery, split: str, drawn: Drawn, untrained: Drawn, mean: Image.Image, rebuilt: Drawn
) -> list[Row]:
    """Accuracy and retrieval of drawn pictures, and the judge's own on the codec's reconstructions of the real ones."""
    constant = gallery.judge([mean] * len(drawn.prompts), drawn.prompts)
    scores: list[tuple[str, Callable[[Drawn], Tensor], float]] = [
        (f"accuracy, top {k}", partial(_within, k=k), min(1.0, k * gallery.prototypes.chance)) for k in TOP
    ]
    scores.append(("retrieval", lambda one: gallery.prototypes.farther(one.ranks), 0.5))
    if gallery.kinds and len(drawn.kind_ranks):
        scores.append(("kind", lambda one: correct_within(one.kind_ranks, 1), gallery.kinds.chance))
    prompts, judge = [], []
    for name, score, chance in scores:
        values, own = score(drawn).tolist(), score(rebuilt).tolist()
        fresh, blind = float(score(untrained).mean()), float(score(constant).mean())
        trivial = ("mean image", blind) if blind > chance else ("chance", chance)
        prompts.append(measure(f"prompt {name}", split, values, "higher", None, fresh, trivial, NOTE))
        judge.append(measure(f"judge on reconstructions, {name}", split, own, "higher", trivial=("chance", chance)))
    return prompts + judge


def _within(drawn: Drawn, k: int) -> Tensor:
    return correct_within(drawn.ranks, k)
