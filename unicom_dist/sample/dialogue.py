"""Conversations as a sampler reads them: laid out by the training's own code, up to where the assistant speaks.

What a user shows is read (features) where the reply is text, a reference (clean latents) where the reply draws. What
the assistant drew stands as clean latents alone: the noised ones of training are seen by nobody else.
Shapes: n latents of d channels, D encoder channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from torch import Tensor

from unicom_dist.config.errors import ConfigError
from unicom_dist.data.conversations import Conversation, Message
from unicom_dist.data.samples import (
    READING,
    Arrays,
    Content,
    Layouts,
    Part,
    Picture,
    Role,
    Text,
    Turn,
    Use,
    Words,
    beside,
)
from unicom_dist.sample.guidance import Branch

DOCS = "docs/sampling.md"


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """An image of a conversation: features [n, D] to read, clean normalised latents [n, d], each with its grid."""

    features: Tensor | None
    grid: tuple[int, int]
    latents: Tensor
    latent_grid: tuple[int, int]


Reply = Sequence[Sequence[int] | Seen]  # tokens, and images that were drawn, without what begins and ends them


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages, the last of them not the assistant's, and the images they show by key.

    reply: what the assistant has said and drawn so far in answer.
    """

    messages: tuple[Message, ...]
    images: Mapping[str, Seen] = field(default_factory=dict)
    reply: Reply = ()

    @property
    def shows(self) -> bool:
        """Whether the user shows an image, which image guidance needs."""
        return any(message.shows for message in self.messages if message.role == "user")

    def branch(self, branch: Branch) -> "Dialogue":
        """Under less of the condition."""
        conversation = Conversation(self.messages)
        if branch != "all":
            conversation = conversation.without(text=branch == "no text", images=branch == "no image")
        return replace(self, messages=conversation.messages)

    def image(self, key: str) -> Seen:
        """An image that is shown. ConfigError: it was not given."""
        if key not in self.images:
            raise ConfigError(
                f"the conversation shows an image {key!r} that was not given",
                f"given: {', '.join(map(repr, self.images)) or 'none'}",
                "give it with the conversation",
                DOCS,
            )
        return self.images[key]

    def content(self, layouts: Layouts, understanding: str, draws: bool = False) -> Content:
        """What the model reads before it goes on; `draws`: it begins an image. `understanding`: prior.understanding.

        ConfigError: an image that is shown was not given, or has no features and would have to be read.
        """
        shown: list[tuple[Seen, Use]] = []

        def picture(key: str, uses: tuple[Use, ...]) -> Picture:
            seen = self.image(key)
            shown.extend((seen, use) for use in uses)
            return Picture(seen.grid if "read" in uses else seen.latent_grid, uses, len(shown) - 1)

        def laid(number: int, message: Message) -> tuple[Part, ...]:
            reads = message.role != "assistant" and not self._drawn_after(number, draws)
            uses: tuple[Use, ...] = READING[understanding] if reads else ("reference",)
            return tuple(part if isinstance(part, Words) else picture(part, uses) for part in message.parts)

        roles = {role: role for role in get_args(Role)}
        turns = [Turn(roles[message.role], laid(number, message)) for number, message in enumerate(self.messages)]
        control = layouts.vocabulary.control
        begin, end = Text((control["<|vision_start|>"],)), Text((control["<|vision_end|>"],))
        pieces: list[Text | Picture] = []
        for part in self.reply:
            if isinstance(part, Seen):
                shown.append((part, "reference"))
                pieces += [begin, Picture(part.latent_grid, ("reference",), len(shown) - 1), end]
            else:
                pieces.append(Text(tuple(part)))
        pieces += [begin] * draws
        layout = layouts.conversation("interleaved", turns, goes_on=True, reply=pieces)
        return Content("", layout, [_arrays(seen, use, understanding) for seen, use in shown])

    def _drawn_after(self, number: int, draws: bool) -> bool:
        reply = next((message for message in self.messages[number + 1 :] if message.role == "assistant"), None)
        drawn = draws or any(isinstance(part, Seen) for part in self.reply)
        return drawn if reply is None else reply.shows


def _arrays(seen: Seen, use: Use, understanding: str) -> Arrays:
    if use != "read":
        return Arrays(seen.latents)
    if seen.features is None:
        raise ConfigError(
            "an image of the conversation has no features",
            "it would have to be read, and only its latents are known",
            "give the picture",
            DOCS,
        )
    return Arrays(beside(seen.features, seen.latents) if understanding == "dim_concat" else seen.features)
