"""How the next token is chosen, and how tokens become text piece by piece.

Shapes: P texts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unicom_dist.config.errors import ConfigError
from unicom_dist.data.text import Vocabulary
from unicom_dist.sample.solver import seeded

DOCS = "docs/sampling.md"


class Chooser:
    """Draws tokens from softmax(logits / temperature), cut to the likeliest that make up `top_p` together.

    Each text has a generator of its own seed: what is written does not depend on the texts beside it.
    temperature 0: the likeliest token. ConfigError: a negative temperature, top_p outside (0, 1].
    """

    def __init__(self, seeds: Sequence[int], temperature: float = 0.0, top_p: float = 1.0) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            what = f"temperature {temperature:g}, top_p {top_p:g}"
            raise ConfigError(what, "temperature is 0 or more, top_p in (0, 1]", "0.7 and 0.9 are usual", DOCS)
        self.temperature, self.top_p = temperature, top_p
        self.generators = [seeded(seed, "text") for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [P, V] -> tokens [P] int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scaled = (logits.double() / self.temperature).softmax(-1)
        chances, tokens = torch.sort(scaled, dim=-1, descending=True, stable=True)
        total = chances.cumsum(-1)
        kept = total - chances < self.top_p  # the first always is
        share = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators])
        mass = (chances * kept).sum(-1, keepdim=True)
        place = (total <= share.to(total)[:, None] * mass).sum(-1, keepdim=True)
        return tokens.gather(-1, place.clamp_max(logits.shape[-1] - 1))[:, 0]


class TextStream:
    """Text of tokens that come one after the other; a character whose bytes are not all there waits for them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens: list[int] = []
        self._told = 0

    def add(self, token: int) -> str:
        """What a further token adds to the text; "" while a character is incomplete."""
        self._tokens.append(token)
        text = self._vocabulary.decode(self._tokens)
        return "" if text.endswith("\ufffd") else self._tell(text)

    def end(self) -> str:
        """What is left."""
        return self._tell(self._vocabulary.decode(self._tokens))

    def _tell(self, text: str) -> str:
        new, self._told = text[self._told :], len(text)
        return new
