"""A reply: text, and images where the model begins one, until it ends its turn.

What was said and drawn stays in the context: an image's clean latents stand at the rotary position it was drawn at, and
text goes on after it. Where an image begins, the context is read anew, because what the user shows is then a reference.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from unicom_dist.data.samples import END_THINK, THINK, Layouts, collate
from unicom_dist.models.cache import Prefix
from unicom_dist.sample.dialogue import Dialogue, Seen
from unicom_dist.sample.drawing import Drawing, draw
from unicom_dist.sample.loading import LoadedPrior
from unicom_dist.sample.pictures import Latents
from unicom_dist.sample.writing import Chooser, TextStream

NEVER = ("<|im_start|>", "<|vision_end|>", "<|image_pad|>")  # nothing that the assistant says


class Drawn(NamedTuple):
    """A picture of a reply, its un-normalised latents, and how it stands in what follows."""

    picture: Image.Image
    latents: Latents
    seen: Seen


@dataclass(frozen=True, slots=True)
class Writing:
    """How replies are written.

    draws: True = one image and nothing after it, False = text alone, None = as the model decides. think: a trace comes
    first. images: most that are drawn where the model decides.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    think: bool = False
    draws: bool | None = None
    images: int = 4


def reply(
    prior: LoadedPrior,
    layouts: Layouts,
    dialogue: Dialogue,
    grid: tuple[int, int],
    seed: int = 0,
    writing: Writing | None = None,
    drawing: Drawing | None = None,
) -> Iterator[str | Tensor]:
    """Pieces of text as they are written, and the normalised latents [n, d] of every image, of `grid`, once drawn.

    Image number k has the seed `seed` + k.
    """
    writing, drawing = writing or Writing(), drawing or Drawing()
    writer = _Writer(prior, layouts, seed, writing)
    left = 1 if writing.draws else 0 if writing.draws is False else writing.images
    number, tokens = 0, prior.vocabulary.encode(THINK) if writing.think else []
    if writing.think:
        yield THINK
    while True:
        if not writing.draws or writing.think:
            so_far = replace(dialogue, reply=(*dialogue.reply, tokens))
            text = writer.write(so_far, may_draw=bool(left), until=END_THINK.strip() if writing.draws else "")
            tokens = [*tokens, *(yield from text)]
        if not (writing.draws or writer.begins_image):
            return
        dialogue = replace(dialogue, reply=(*dialogue.reply, tokens))
        z = draw(prior.model, layouts, [dialogue], [seed + number], grid, drawing)[0]
        yield z
        left, number, tokens = left - 1, number + 1, []
        if writing.draws:
            return
        dialogue = replace(dialogue, reply=(*dialogue.reply, Seen(None, grid, z.cpu(), grid)))


class _Writer:
    """Writes one reply, with one budget of tokens."""

    def __init__(self, prior: LoadedPrior, layouts: Layouts, seed: int, writing: Writing) -> None:
        self._prior, self._layouts = prior, layouts
        self._choose = Chooser([seed], writing.temperature, writing.top_p)
        self._left = writing.max_tokens
        control = prior.vocabulary.control
        self._never = [control[name] for name in NEVER]
        self._image = control["<|vision_start|>"]
        self._stop = (control["<|im_end|>"], control["<|endoftext|>"])
        self.begins_image = False

    def write(self, dialogue: Dialogue, may_draw: bool, until: str) -> Generator[str, None, list[int]]:
        """Pieces of text, up to the end of the turn, an image (`begins_image`) or the words `until`. Returns tokens."""
        model, vocabulary = self._prior.model, self._prior.vocabulary
        prefix = self._read(dialogue)
        stream, tokens = TextStream(vocabulary), list[int]()
        banned = self._never if may_draw and not until else [*self._never, self._image]
        self.begins_image = False
        while self._left:
            logits = model.next_logits(prefix)
            logits[:, banned] = float("-inf")
            chosen = self._choose(logits)
            token = int(chosen)
            self._left -= 1
            self.begins_image = token == self._image
            if self.begins_image or token in self._stop:
                break
            tokens.append(token)
            piece = stream.add(token)
            if piece:
                yield piece
            if until and until in vocabulary.decode(tokens):
                break
            prefix = model.append_tokens(prefix, chosen)
        rest = stream.end()
        if rest:
            yield rest
        return tokens

    def _read(self, dialogue: Dialogue) -> Prefix:
        model = self._prior.model
        content = dialogue.content(self._layouts, model.config.understanding)
        batch = collate([content], model.latent_channels, model.read_channels)
        prefix = model.encode_prefix(batch.to(next(model.parameters()).device))
        prefix.reserve(self._left)
        return prefix
