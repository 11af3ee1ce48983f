"""Does a picture show what its caption says? Answered by the nearest prototype in the features of a third network.

Every caption has a prototype: the mean feature of the real pictures that carry it. A picture is right when, among all
prototypes, its caption's is nearest by cosine after the mean of the prototypes was subtracted (what all pictures share,
such as the white background, would otherwise hide the differences). The network is neither the encoder the model reads
through nor the one its loss looks through: its features were never optimised against.
Shapes: B pictures, P prototypes, C feature channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Embed = Callable[[Sequence[Image.Image]], Tensor]


@dataclass(frozen=True)
class Prototypes:
    """The captions, their centred unit vectors [P, C], and the centre [C]."""

    captions: list[str]
    vectors: Tensor
    centre: Tensor

    @property
    def chance(self) -> float:
        """Accuracy of guessing: 1 / P."""
        return 1 / len(self.captions)

    def ranks(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """How many prototypes are nearer to each feature than its own caption's: 0 = right. Ties count against it.

        features: [B, C]. KeyError for a caption without prototype. Returns: [B] int64.
        """
        number = {caption: i for i, caption in enumerate(self.captions)}
        own = torch.tensor([number[caption] for caption in captions], dtype=torch.int64)
        similarity = F.normalize(features.float() - self.centre, dim=-1) @ self.vectors.T
        reached = similarity.gather(1, own[:, None])
        return (similarity >= reached).sum(1) - 1

    def farther(self, ranks: Tensor) -> Tensor:
        """Share of the other prototypes that are farther: 1 = right, 1/2 = guessed. Returns: [B] float64."""
        return 1 - ranks.double() / (len(self.captions) - 1)


def build_prototypes(features: Tensor, captions: Sequence[str]) -> Prototypes:
    """One prototype per distinct caption, from [B, C] features of real pictures. ValueError with fewer than two."""
    distinct = sorted(set(captions))
    if len(distinct) < 2:
        raise ValueError("judging by the nearest prototype needs at least two different captions")
    number = {caption: i for i, caption in enumerate(distinct)}
    index = torch.tensor([number[caption] for caption in captions], dtype=torch.int64)
    sums = torch.zeros(len(distinct), features.shape[1]).index_add_(0, index, features.float())
    means = sums / torch.bincount(index, minlength=len(distinct))[:, None]
    centre = means.mean(0)
    return Prototypes(distinct, F.normalize(means - centre, dim=-1), centre)


def correct_within(ranks: Tensor, k: int) -> Tensor:
    """1.0 where the caption's prototype is among the k nearest, else 0.0. Returns: [B] float64."""
    return (ranks < k).double()
