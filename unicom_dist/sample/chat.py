"""A conversation that grows: what the user says and shows, what the model says and draws."""

from collections.abc import Iterator, Sequence

from unicom_dist.config.errors import ConfigError
from unicom_dist.data.conversations import Message
from unicom_dist.data.samples import Words
from unicom_dist.sample.dialogue import DOCS, Dialogue, Seen
from unicom_dist.sample.drawing import Drawing
from unicom_dist.sample.pictures import Input
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.sample.replies import Drawn, Writing


class Chat:
    """Several turns with one model. Turn number k has the seed `seed` + 1000 k, so that its pictures differ."""

    def __init__(self, pipeline: UniComPipeline, seed: int = 0, drawing: Drawing | None = None) -> None:
        self._pipeline, self._seed, self._drawing = pipeline, seed, drawing
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._messages: tuple[Message, ...] = ()
        self._images: dict[str, Seen] = {}

    def say(self, text: str, images: Sequence[Input] = (), writing: Writing | None = None) -> Iterator[str | Drawn]:
        """One turn of the user; yields the reply. ConfigError: nothing was said or shown, too long a text.

        A turn counts once its reply has ended: one that is broken off leaves the conversation as it was.
        """
        if not (text.strip() or images):
            raise ConfigError("nothing was said", "a turn holds words or an image", "say something", DOCS)
        if text.strip():
            self._pipeline.check_text(text)
        shown = {f"shown {len(self._images) + n}": seen for n, seen in enumerate(self._pipeline.seen(images))}
        words = (Words(text.strip()),) if text.strip() else ()
        messages = (*self._messages, Message("user", (*shown, *words)))
        known = {**self._images, **shown}
        turn = len(self._messages) // 2
        said: list[Words | str] = []
        spoken = ""
        for piece in self._pipeline.generate(
            Dialogue(messages, known), self._seed + 1000 * turn, writing, self._drawing
        ):
            if isinstance(piece, str):
                spoken += piece
            else:
                said += [Words(spoken)] if spoken.strip() else []
                spoken, key = "", f"drawn {len(known)}"
                known[key] = piece.seen
                said.append(key)
            yield piece
        said += [Words(spoken)] if spoken.strip() else []
        self._messages, self._images = (*messages, Message("assistant", tuple(said))), known
