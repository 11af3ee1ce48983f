"""How a sample becomes tokens, image positions, segments and labels.

Qwen2.5's chat roles, without a system turn (| marks the parts):
text            caption: keywords <|endoftext|>                       every token but the first is a label
text_to_image   <|im_start|>user ⏎ caption <|im_end|> ⏎ <|im_start|>assistant ⏎ <|vision_start|>
                | latents | <|vision_end|>                            label: <|vision_start|>, so that text can start
                                                                      an image; a dropped caption is left out
image_to_text   <|im_start|>user ⏎ <|vision_start|> | features | <|vision_end|> instruction <|im_end|> ⏎
                <|im_start|>assistant ⏎ caption <|im_end|>            labels: caption and <|im_end|>
conversations   turns of both roles, each closed by <|im_end|> ⏎; text and images in any order. Labels: what the
                assistant says, the <|vision_start|> of what it draws and the <|im_end|> of its turns.
documents       text and images in any order, without turns, closed by <|endoftext|>: everything is a label but the
                first token and what stands inside images.
An image is read (encoder features), a reference (clean latents, for drawing after it), or drawn (latents being
denoised). Nobody but itself sees an image being denoised, so a drawn image that something follows is followed by its
clean latents, at the same rotary position: what a sampler's cache holds once the image is there.
Shapes: S positions, T tokens, Y labels, N latents, F of them denoised, M features.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicom_dist.config.schema import PriorConfig
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.segments import Mode, PackedBatch, Segment, centred

Task = Literal["text", "text_to_image", "image_to_text", "image_text_to_image", "interleaved"]
TASKS: tuple[Task, ...] = ("text", "text_to_image", "image_to_text", "image_text_to_image", "interleaved")
INSTRUCTION = "Describe the image."
THINK, END_THINK = "<think>\n", "\n</think>\n"  # plain text, as in Qwen's reasoning models
TEMPLATE_TEXTS = ("user", "assistant", "system", "\n", INSTRUCTION, THINK, END_THINK)
DEFAULT = PriorConfig()
Ints = NDArray[np.int64]
Use = Literal["read", "reference", "draw"]
Role = Literal["system", "user", "assistant"]
READING: dict[str, tuple[Use, ...]] = {  # forms of an image that is read, by prior.understanding
    "raw": ("read",),
    "dim_concat": ("read",),
    "seq_concat": ("read", "reference"),
}
MODES: dict[Use, Mode] = {"read": "full", "reference": "full", "draw": "noise"}


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens. `learned`: each is to be predicted from what stands before it."""

    tokens: tuple[int, ...]
    learned: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of rows x columns positions: number `image` of the sample's images, in one or two of its forms.

    Several forms lie one after the other at one rotary position. A `read` before a `reference` is one segment.
    """

    grid: tuple[int, int]
    uses: tuple[Use, ...]
    image: int = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """One form of an image in a layout: its rows x columns positions begin at `start`."""

    use: Use
    start: int
    grid: tuple[int, int]
    image: int = 0
    timed: bool = False  # the position before is its time's

    @property
    def size(self) -> int:
        """Positions."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One sample on its own axis of `length` positions."""

    task: Task
    segments: tuple[tuple[Mode, int], ...]
    tokens: Ints  # [T]
    token_index: Ints  # [T]
    label_index: Ints  # [Y]
    label_ids: Ints  # [Y]
    rope: Ints  # [S], or [S, 2] rows and columns
    images: tuple[Placed, ...] = ()

    @property
    def length(self) -> int:
        """Positions."""
        return len(self.rope)

    def cut(self, limit: int) -> "Layout":
        """The first `limit` positions, of a layout without images."""
        if self.length <= limit:
            return self
        kept = self.label_index < limit - 1  # a label stands before the token it names
        return Layout(
            self.task,
            (("causal", limit),),
            self.tokens[:limit],
            self.token_index[:limit],
            self.label_index[kept],
            self.label_ids[kept],
            self.rope[:limit],
        )


def lay_out(task: Task, pieces: Iterable[Text | Picture], rope2d: bool = False, time_token: bool = False) -> Layout:
    """Text and pictures one after the other. All positions of a picture share one rotary id, what follows goes on.

    `rope2d`: positions are rows and columns instead, equal for text; a picture is `centred` in a square beyond what
    stands before it, and what follows goes on beyond the square. `time_token`: a position for the time before a picture
    that is drawn. ValueError: a learned token with no token right before it.
    """
    segments: list[tuple[Mode, int]] = []
    tokens: list[int] = []
    learned: list[bool] = []
    spans: list[Ints] = []  # of the tokens
    rope: list[Ints] = []
    images: list[Placed] = []
    place = turn = 0

    def line(first: int, count: int, step: int) -> Ints:
        ids = first + step * np.arange(count)
        return np.stack([ids, ids], 1) if rope2d else ids

    def segment(mode: Mode, length: int, join: bool) -> None:
        if join and segments and segments[-1][0] == mode:
            mode, before = segments.pop()
            length += before
        segments.append((mode, length))

    for piece in pieces:
        if isinstance(piece, Text):
            count = len(piece.tokens)
            if not count:
                continue
            segment("causal", count, join=True)
            tokens += piece.tokens
            learned += [piece.learned] * count
            spans.append(np.arange(place, place + count))
            rope.append(line(turn, count, 1))
            place, turn = place + count, turn + count
            continue
        for order, use in enumerate(piece.uses):
            timed = time_token and use == "draw"
            image = Placed(use, place + timed, piece.grid, piece.image, timed)
            segment(MODES[use], timed + image.size, join=order > 0)
            images.append(image)
            rope.append(line(turn, int(timed), 0))
            inside = turn + centred(grid_positions(*piece.grid)).numpy() if rope2d else line(turn, image.size, 0)
            rope.append(inside)
            place += timed + image.size
        turn += max(piece.grid) if rope2d else 1
    ids = np.array(tokens, dtype=np.int64)
    index = np.concatenate([np.zeros(0, np.int64), *spans])
    label = np.flatnonzero(learned)
    if len(label) and (label[0] == 0 or (index[label] - index[label - 1] != 1).any()):
        raise ValueError("a learned token stands at the beginning or right after an image")
    positions = np.concatenate([line(0, 0, 0), *rope])
    return Layout(task, tuple(segments), ids, index, index[label] - 1, ids[label], positions, tuple(images))


@dataclass(frozen=True, slots=True)
class Words:
    """Text of a turn. `think`: a trace before the answer."""

    text: str
    think: bool = False


Part = Words | Picture


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role says and shows."""

    role: Role
    parts: tuple[Part, ...]


class Layouts:
    """Builds the layouts of a vocabulary, for a prior. Results of the three plain tasks are cached: leave them alone.

    `lay_out` is the function of that name, with the prior's rules.
    """

    def __init__(self, vocabulary: Vocabulary, prior: PriorConfig = DEFAULT) -> None:
        self.vocabulary = vocabulary
        self.lay_out = functools.partial(
            lay_out, rope2d=prior.positions == "rope2d", time_token=prior.time_injection == "token"
        )
        control = vocabulary.control
        self._start, self._end = control["<|im_start|>"], control["<|im_end|>"]
        self._vision_start, self._vision_end = control["<|vision_start|>"], control["<|vision_end|>"]
        self._end_of_text = control["<|endoftext|>"]
        self._newline = vocabulary.encode("\n")
        self._user = [self._start, *vocabulary.encode("user"), *self._newline]
        self._assistant = [self._end, *self._newline, self._start, *vocabulary.encode("assistant"), *self._newline]
        self._instruction = vocabulary.encode(INSTRUCTION)
        self.text = functools.lru_cache(maxsize=1 << 14)(self._text)
        self.text_to_image = functools.lru_cache(maxsize=1 << 14)(self._text_to_image)
        self.image_to_text = functools.lru_cache(maxsize=1 << 14)(self._image_to_text)

    def _text(self, text: str, limit: int) -> Layout:
        """A document of text alone, cut to `limit` positions."""
        first, *others = [*self.vocabulary.encode(text), self._end_of_text][:limit]
        return self.lay_out("text", [Text((first,)), Text(tuple(others), learned=True)])

    def _text_to_image(self, caption: str, grid: tuple[int, int]) -> Layout:
        """A prompt and the image it asks for; the empty caption is the unconditional prompt."""
        before = (*self._user, *self.vocabulary.encode(caption), *self._assistant)
        drawn = Picture(grid, ("draw",))
        return self.lay_out(
            "text_to_image", [Text(before), self._begin(learned=True), drawn, Text((self._vision_end,))]
        )

    def _image_to_text(self, answer: str, grid: tuple[int, int], uses: tuple[Use, ...] = ("read",)) -> Layout:
        """An image and its description; without an answer the layout ends where the model has to go on."""
        prompt = (self._vision_end, *self._instruction, *self._assistant)
        reply = (*self.vocabulary.encode(answer), self._end) if answer else ()
        before = Text((*self._user, self._vision_start))
        return self.lay_out("image_to_text", [before, Picture(grid, uses), Text(prompt), Text(reply, learned=True)])

    def conversation(
        self, task: Task, turns: Sequence[Turn], goes_on: bool = False, reply: Sequence[Text | Picture] = ()
    ) -> Layout:
        """Turns of a conversation. `goes_on`: it ends where the assistant speaks next, after its `reply` so far."""
        pieces: list[Text | Picture] = []
        for turn in turns:
            said = turn.role == "assistant"
            pieces.append(Text((self._start, *self.vocabulary.encode(turn.role), *self._newline)))
            pieces += self._parts(turn.parts, learned=said)
            pieces += [Text((self._end,), learned=said), Text(tuple(self._newline))]
        if goes_on:
            pieces += [Text(tuple(self._assistant[1 + len(self._newline) :])), *reply]
        return self.lay_out(task, pieces)

    def document(self, task: Task, parts: Sequence[Part]) -> Layout:
        """Text and images that follow each other, all of them to be learned, after an <|endoftext|> that opens it."""
        opening, closing = Text((self._end_of_text,)), Text((self._end_of_text,), learned=True)
        return self.lay_out(task, [opening, *self._parts(parts, learned=True), closing])

    def _begin(self, learned: bool) -> Text:
        return Text((self._vision_start,), learned)

    def _parts(self, parts: Sequence[Part], learned: bool) -> list[Text | Picture]:
        pieces: list[Text | Picture] = []
        for part in parts:
            if isinstance(part, Picture):
                # The end of an image is not learned: its size is known before.
                drawn = "draw" in part.uses
                pieces += [self._begin(learned and drawn), part, Text((self._vision_end,))]
            else:
                text = f"{THINK}{part.text}{END_THINK}" if part.think else part.text
                pieces.append(Text(tuple(self.vocabulary.encode(text)), learned))
        return pieces


@dataclass(slots=True)
class Arrays:
    """The arrays of one form of an image, in the order of `Layout.images`."""

    values: Tensor | None = None  # [n, D] what is read; [n, d] clean normalised latents of the other uses
    noise: Tensor | None = None  # [n, d] of an image being drawn
    t: float = 1.0
    target: Tensor | None = None  # [n, D] features of which the model itself makes the latents


def beside(features: Tensor, latents: Tensor) -> Tensor:
    """What is read under dim_concat: features [n, D] and clean normalised latents [n, d] as [n, D + d] float32."""
    return torch.cat([features.float(), latents.float()], 1)


@dataclass(slots=True)
class Content:
    """What goes with a layout: key and set of its sample, and the arrays of its images."""

    key: str
    layout: Layout
    images: Sequence[Arrays] = ()
    source: str = ""


def collate(contents: Sequence[Content], latent_channels: int, feature_channels: int) -> PackedBatch:
    """Samples end to end on one axis. The last axes are d and D even if there is no such image."""
    layouts = [content.layout for content in contents]
    starts = np.cumsum([0, *(layout.length for layout in layouts)])[:-1]

    def shifted(arrays: Sequence[Ints], by: Sequence[np.int64] | Ints) -> Tensor:
        moved = [array + start for array, start in zip(arrays, by, strict=True)]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *moved]))

    zeros = np.zeros(len(layouts), np.int64)
    rope = np.concatenate([layout.rope for layout in layouts])
    placed = [
        (number, int(starts[number]) + place.start, place, image)
        for number, content in enumerate(contents)
        for place, image in zip(content.layout.images, content.images, strict=True)
    ]
    seen = [entry for entry in placed if entry[2].use == "read"]
    made = [entry for entry in placed if entry[2].use != "read"]
    sizes = torch.tensor([place.size for _, _, place, _ in made], dtype=torch.long)
    drawn = torch.tensor([place.use == "draw" for _, _, place, _ in made], dtype=torch.bool)
    times = torch.tensor([image.t for _, _, _, image in made], dtype=torch.float32)
    return PackedBatch(
        segments=[
            Segment(n, mode, length) for n, layout in enumerate(layouts) for mode, length in layout.segments if length
        ],
        rope_positions=torch.from_numpy(rope),
        token_ids=shifted([layout.tokens for layout in layouts], zeros),
        token_index=shifted([layout.token_index for layout in layouts], starts),
        label_index=shifted([layout.label_index for layout in layouts], starts),
        label_ids=shifted([layout.label_ids for layout in layouts], zeros),
        latents=_rows([_latents(image, latent_channels) for _, _, _, image in made], latent_channels),
        noise=_rows([_noise(place, image, latent_channels) for _, _, place, image in made], latent_channels),
        t=torch.repeat_interleave(times, sizes),
        flow_index=torch.repeat_interleave(drawn, sizes).nonzero()[:, 0],
        latent_index=_indices([(start, place.size) for _, start, place, _ in made]),
        latent_grid=_grids([place.grid for _, _, place, _ in made]),
        features=_rows([image.values for _, _, _, image in seen], feature_channels),
        feature_index=_indices([(start, place.size) for _, start, place, _ in seen]),
        feature_grid=_grids([place.grid for _, _, place, _ in seen]),
        keys=[content.key for content in contents],
        tasks=[layout.task for layout in layouts],
        sources=[content.source for content in contents],
        label_sample=torch.from_numpy(
            np.repeat(np.arange(len(layouts)), [len(layout.label_ids) for layout in layouts])
        ),
        latent_sample=torch.repeat_interleave(torch.tensor([n for n, _, _, _ in made], dtype=torch.long), sizes),
        time_index=_indices([(start - 1, 1) for _, start, place, _ in made if place.timed]),
        times=torch.tensor([image.t for _, _, place, image in made if place.timed], dtype=torch.float32),
        target_features=_rows([image.target for _, _, _, image in made], feature_channels),
    )


def _latents(image: Arrays, channels: int) -> Tensor | None:
    """[N, d]; where the model has to make them, not a number: whoever forgets to will notice."""
    return image.values if image.target is None else torch.full((image.target.shape[0], channels), math.nan)


def _noise(place: Placed, image: Arrays, channels: int) -> Tensor:
    return torch.zeros(place.size, channels) if image.noise is None else image.noise


def _rows(tensors: Sequence[Tensor | None], channels: int) -> Tensor:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else torch.zeros(0, channels)


def _indices(spans: Sequence[tuple[int, int]]) -> Tensor:
    """Positions of (start, length) spans, [their sum]."""
    return torch.cat([torch.zeros(0, dtype=torch.long), *(torch.arange(a, a + n) for a, n in spans)])


@functools.lru_cache(maxsize=1024)
def grid_positions(rows: int, columns: int) -> Tensor:
    """[rows x columns, 2] int64 (row, column) in raster order."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)


def _grids(grids: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.zeros(0, 2, dtype=torch.long), *(grid_positions(*grid) for grid in grids)])
