"""Conversations and documents about images, as `.json` members of a set of their own.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": KEY}, {"type": "text", "text": "Mirror it"}]},
                  {"role": "assistant", "content": [{"type": "think", "text": …}, {"type": "image", "image": KEY}]}]}
    {"document": [{"type": "text", "text": …}, {"type": "image", "image": KEY}, …]}

KEY names an image of the training set or of a set of conversations; "" is the sample's own image. `content` may be a
plain string. What the assistant shows is drawn. What a user shows is a reference where the reply draws, and is read
where the reply is text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from unicom_dist.config.errors import DataError
from unicom_dist.data.samples import Layout, Layouts, Part, Picture, Role, Task, Turn, Use, Words

DOCS = "docs/data.md"
Shown = Words | str  # text, or the key of an image


@dataclass(frozen=True, slots=True)
class Message:
    """What one role says and shows; a document is a single message of nobody (role "")."""

    role: str
    parts: tuple[Shown, ...]

    @property
    def shows(self) -> bool:
        """Whether it holds an image."""
        return any(isinstance(part, str) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of a sample."""

    messages: tuple[Message, ...]

    @classmethod
    def parse(cls, content: Mapping[str, Any], key: str) -> "Conversation":
        """Of the content of a `.json` member; `key` is its sample's. DataError: not a conversation, nothing in it."""
        if "document" in content:
            return cls((Message("", _parts(content["document"], key)),))
        messages = content.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _bad(key, "it has neither `messages` nor a `document`")
        parsed = []
        for message in messages:
            role = message.get("role") if isinstance(message, dict) else None
            if role not in get_args(Role):
                raise _bad(key, f"`role` is {role!r}, not one of {', '.join(get_args(Role))}")
            parsed.append(Message(str(role), _parts(message.get("content"), key)))
        if not any(message.role == "assistant" for message in parsed):
            raise _bad(key, "the assistant says nothing, so there is nothing to learn")
        return cls(tuple(parsed))

    @property
    def texts(self) -> list[str]:
        """All that is said, in order."""
        return [part.text for message in self.messages for part in message.parts if isinstance(part, Words)]

    @property
    def draws(self) -> bool:
        """Whether the assistant shows an image."""
        return any(message.role == "assistant" and message.shows for message in self.messages)

    def shown(self) -> list[tuple[str, str]]:
        """(what is said since the image before, key) of every image."""
        found: list[tuple[str, str]] = []
        said: list[str] = []
        for part in (part for message in self.messages for part in message.parts):
            if isinstance(part, Words):
                said.append(part.text)
            else:
                found.append((" ".join(said), part))
                said = []
        return found

    def without(self, *, text: bool = False, images: bool = False) -> "Conversation":
        """Without what the user says, or shows: as a guided sampler asks."""

        def kept(message: Message) -> Message:
            if message.role != "user":
                return message
            return Message("user", tuple(p for p in message.parts if not (images if isinstance(p, str) else text)))

        return Conversation(tuple(kept(message) for message in self.messages))

    def shorter(self) -> "Conversation | None":
        """Without its last exchange; None if there is only one, or if it is a document."""
        ends = [n for n, message in enumerate(self.messages) if message.role == "assistant"]
        return Conversation(self.messages[: ends[-2] + 1]) if len(ends) > 1 else None

    def layout(
        self,
        layouts: Layouts,
        task: Task,
        grid: Callable[[str, bool], tuple[int, int]],
        reading: tuple[Use, ...] = ("read",),
        goes_on: bool = False,
    ) -> tuple[Layout, list[str]]:
        """The layout and the keys of its images by number.

        `grid(key, read)`: rows and columns of an image's features, else of its latents. `reading`: the forms in which
        an image is read. `goes_on`: the assistant has to speak next; what the user shows is a reference then.
        """
        keys: list[str] = []

        def picture(key: str, uses: tuple[Use, ...]) -> Picture:
            keys.append(key)
            return Picture(grid(key, uses == reading), uses, len(keys) - 1)

        def laid(message: Message, number: int) -> tuple[Part, ...]:
            parts: list[Part] = []
            for place, part in enumerate(message.parts):
                if isinstance(part, Words):
                    parts.append(part)
                elif message.role == "user":
                    parts.append(picture(part, ("reference",) if self._drawn_after(number, goes_on) else reading))
                else:
                    last = number == len(self.messages) - 1 and place == len(message.parts) - 1 and not goes_on
                    parts.append(picture(part, ("draw",) if last else ("draw", "reference")))
            return tuple(parts)

        if not self.messages[0].role:
            return layouts.document(task, laid(self.messages[0], 0)), keys
        roles = {role: role for role in get_args(Role)}
        turns = [Turn(roles[message.role], laid(message, n)) for n, message in enumerate(self.messages)]
        return layouts.conversation(task, turns, goes_on), keys

    def _drawn_after(self, number: int, goes_on: bool) -> bool:
        reply = next((message for message in self.messages[number + 1 :] if message.role == "assistant"), None)
        return goes_on if reply is None else reply.shows


def _parts(content: Any, key: str) -> tuple[Shown, ...]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not content:
        raise _bad(key, f"a message's `content` is {content!r:.60}")
    return tuple(_part(part, key) for part in content)


def _part(part: Any, key: str) -> Shown:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if kind in ("text", "think") else None
    if isinstance(text, str) and text.strip():
        return Words(text.strip(), kind == "think")
    if kind == "image" and isinstance(part.get("image"), str):
        return str(part["image"]) or key
    raise _bad(key, f"a part of its content is {part!r:.60}")


def _bad(key: str, why: str) -> DataError:
    return DataError(
        f"sample {key!r} is not a conversation", why, 'see the format: {"messages": [...]} or {"document": [...]}', DOCS
    )
