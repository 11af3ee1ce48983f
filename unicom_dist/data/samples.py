"""How a sample becomes tokens, image positions, segments and labels.

Qwen2.5's chat roles, without a system turn (| marks the parts):
text            caption: keywords <|endoftext|>                       every token but the first is a label
text_to_image   <|im_start|>user ⏎ caption <|im_end|> ⏎ <|im_start|>assistant ⏎ <|vision_start|>
                | latents | <|vision_end|>                            label: <|vision_start|>, so that text can start
                                                                      an image; a dropped caption is left out
image_to_text   <|im_start|>user ⏎ <|vision_start|> | features | <|vision_end|> instruction <|im_end|> ⏎
                <|im_start|>assistant ⏎ caption <|im_end|>            labels: caption and <|im_end|>
Shapes: S positions, T tokens, Y labels, N latents, M features.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicom_dist.data.text import Vocabulary
from unicom_dist.models.segments import Mode, PackedBatch, Segment

Task = Literal["text", "text_to_image", "image_to_text"]
TASKS: tuple[Task, ...] = ("text", "text_to_image", "image_to_text")
INSTRUCTION = "Describe the image."
TEMPLATE_TEXTS = ("user", "assistant", "\n", INSTRUCTION)
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One sample on its own axis of `length` positions."""

    task: Task
    segments: tuple[tuple[Mode, int], ...]
    tokens: Ints  # [T]
    token_index: Ints  # [T]
    label_index: Ints  # [Y]
    label_ids: Ints  # [Y]
    rope: Ints  # [S]
    image_index: Ints  # [N] of text_to_image, [M] of image_to_text, else empty
    grid: tuple[int, int]  # rows, columns of the image; (0, 0) without one

    @property
    def length(self) -> int:
        """Positions."""
        return len(self.rope)


class Layouts:
    """Builds the layouts of a vocabulary. Results are cached and must not be changed."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        control = vocabulary.control
        self._start, self._end = control["<|im_start|>"], control["<|im_end|>"]
        self._vision_start, self._vision_end = control["<|vision_start|>"], control["<|vision_end|>"]
        self._end_of_text = control["<|endoftext|>"]
        newline = vocabulary.encode("\n")
        self._user = [self._start, *vocabulary.encode("user"), *newline]
        self._assistant = [self._end, *newline, self._start, *vocabulary.encode("assistant"), *newline]
        self._instruction = vocabulary.encode(INSTRUCTION)
        self.text = functools.lru_cache(maxsize=1 << 14)(self._text)
        self.text_to_image = functools.lru_cache(maxsize=1 << 14)(self._text_to_image)
        self.image_to_text = functools.lru_cache(maxsize=1 << 14)(self._image_to_text)

    def _text(self, text: str, limit: int) -> Layout:
        """A document, cut to `limit` positions."""
        tokens = [*self.vocabulary.encode(text), self._end_of_text][:limit]
        length = len(tokens)
        ids = np.array(tokens)
        index = np.arange(length)
        return Layout(
            "text", (("causal", length),), ids, index, index[:-1], ids[1:], index, np.zeros(0, np.int64), (0, 0)
        )

    def _text_to_image(self, caption: str, grid: tuple[int, int]) -> Layout:
        """A prompt and the image it asks for; the empty caption is the unconditional prompt."""
        before = [*self._user, *self.vocabulary.encode(caption), *self._assistant, self._vision_start]
        return _around_image("text_to_image", before, [self._vision_end], grid, "noise", [len(before) - 1])

    def _image_to_text(self, answer: str, grid: tuple[int, int]) -> Layout:
        """An image and its description; without an answer the layout ends where the model has to go on."""
        before = [*self._user, self._vision_start]
        prompt = [self._vision_end, *self._instruction, *self._assistant]
        reply = [*self.vocabulary.encode(answer), self._end] if answer else []
        first = len(before) + len(prompt)
        labels = list(range(first, first + len(reply)))
        return _around_image("image_to_text", before, prompt + reply, grid, "full", labels)


def _around_image(
    task: Task, before: list[int], after: list[int], grid: tuple[int, int], mode: Mode, labels: list[int]
) -> Layout:
    """Text, an image of rows x columns positions, text. `labels` counts tokens, leaving the image out."""
    image, start, length = grid[0] * grid[1], len(before), len(before) + grid[0] * grid[1] + len(after)
    token_index = np.concatenate([np.arange(start), np.arange(start + image, length)])
    # All positions of an image share one rotary id, the text goes on one later.
    rope = np.concatenate([np.arange(start), np.full(image, start), np.arange(start + 1, start + 1 + len(after))])
    tokens = np.array([*before, *after])
    label = np.array(labels, dtype=np.int64)
    return Layout(
        task,
        (("causal", start), (mode, image), ("causal", len(after))),
        tokens,
        token_index,
        token_index[label] - 1,
        tokens[label],
        rope,
        np.arange(start, start + image),
        grid,
    )


@dataclass(slots=True)
class Content:
    """What goes with a layout: its key and the arrays of its image, if it has one."""

    key: str
    layout: Layout
    image: Tensor | None = None  # [N, d] clean normalised latents or [M, D] features
    noise: Tensor | None = None  # [N, d]
    t: float = 1.0
    target: Tensor | None = None  # [N, D] features of which the model itself makes the latents


def collate(contents: Sequence[Content], latent_channels: int, feature_channels: int) -> PackedBatch:
    """Samples end to end on one axis. The last axes are d and D even if there is no such image."""
    layouts = [content.layout for content in contents]
    starts = np.cumsum([0, *(layout.length for layout in layouts)])[:-1]

    def shifted(arrays: Sequence[Ints], by: Sequence[np.int64] | Ints) -> Tensor:
        moved = [array + start for array, start in zip(arrays, by, strict=True)]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *moved]))

    zeros = np.zeros(len(layouts), np.int64)
    drawn = [n for n, layout in enumerate(layouts) if layout.task == "text_to_image"]
    seen = [n for n, layout in enumerate(layouts) if layout.task == "image_to_text"]
    sizes = torch.tensor([len(layouts[n].image_index) for n in drawn], dtype=torch.long)
    return PackedBatch(
        segments=[
            Segment(n, mode, length) for n, layout in enumerate(layouts) for mode, length in layout.segments if length
        ],
        rope_positions=shifted([layout.rope for layout in layouts], zeros),
        token_ids=shifted([layout.tokens for layout in layouts], zeros),
        token_index=shifted([layout.token_index for layout in layouts], starts),
        label_index=shifted([layout.label_index for layout in layouts], starts),
        label_ids=shifted([layout.label_ids for layout in layouts], zeros),
        latents=_rows([_latents(contents[n], latent_channels) for n in drawn], latent_channels),
        noise=_rows([contents[n].noise for n in drawn], latent_channels),
        t=torch.repeat_interleave(torch.tensor([contents[n].t for n in drawn], dtype=torch.float32), sizes),
        flow_index=torch.arange(int(sizes.sum())),
        latent_index=shifted([layouts[n].image_index for n in drawn], starts[drawn]),
        latent_grid=_grids([layouts[n].grid for n in drawn]),
        features=_rows([contents[n].image for n in seen], feature_channels),
        feature_index=shifted([layouts[n].image_index for n in seen], starts[seen]),
        feature_grid=_grids([layouts[n].grid for n in seen]),
        keys=[content.key for content in contents],
        tasks=[layout.task for layout in layouts],
        label_sample=torch.from_numpy(
            np.repeat(np.arange(len(layouts)), [len(layout.label_ids) for layout in layouts])
        ),
        latent_sample=torch.repeat_interleave(torch.tensor(drawn, dtype=torch.long), sizes),
        target_features=_rows([contents[n].target for n in drawn], feature_channels),
    )


def _latents(content: Content, channels: int) -> Tensor | None:
    """[N, d]; where the model has to make them, not a number: whoever forgets to will notice."""
    return content.image if content.target is None else torch.full((content.target.shape[0], channels), math.nan)


def _rows(tensors: Sequence[Tensor | None], channels: int) -> Tensor:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else torch.zeros(0, channels)


@functools.lru_cache(maxsize=1024)
def grid_positions(rows: int, columns: int) -> Tensor:
    """[rows x columns, 2] int64 (row, column) in raster order."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)


def _grids(grids: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.zeros(0, 2, dtype=torch.long), *(grid_positions(*grid) for grid in grids)])
