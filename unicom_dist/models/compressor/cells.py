"""Fewer tokens: one for each cell of 2 x 2 neighbours, for the comparison of token with channel compression.

Cells are found by the tokens' places (row, column), so the order of the tokens does not matter. Where a side is odd the
last cells hold two tokens or one. Cells come out in raster order.
Shapes: B images, n tokens of C channels, m cells, W channels of attention in H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIDE = 2


@dataclass(frozen=True)
class Cells:
    """The cells of images in a padded batch: which tokens they hold, and where they are."""

    members: Tensor  # [B, m, 4] int64: token at each place of the cell, 0 where there is none
    present: Tensor  # [B, m, 4] bool
    grid: Tensor  # [B, m, 2] int64, (row, column), padding zero
    mask: Tensor  # [B, m] bool, True = a cell

    @classmethod
    def of(cls, grid: Tensor, mask: Tensor | None) -> "Cells":
        """Of tokens at grid [B, n, 2]; mask [B, n], True = a real token (None: all are). Waits for a GPU once."""
        size, tokens = grid.shape[:2]
        real = torch.ones_like(grid[..., 0], dtype=torch.bool) if mask is None else mask
        row, column = grid.masked_fill(~real[..., None], 0).unbind(-1)
        rows, columns = (place.amax(1) // SIDE + 1 for place in (row, column))  # [B] each
        count = rows * columns
        longest = int(count.max())
        cell = row // SIDE * columns[:, None] + column // SIDE
        slot = (cell * SIDE + row % SIDE) * SIDE + column % SIDE
        slot = slot.masked_fill(~real, longest * SIDE**2)  # padding goes to a slot that is cut off
        numbers = torch.arange(tokens, device=grid.device).expand(size, -1)
        members = numbers.new_zeros(size, longest * SIDE**2 + 1).scatter(1, slot, numbers)[:, :-1]
        present = real.new_zeros(size, longest * SIDE**2 + 1).scatter(1, slot, real)[:, :-1]
        number = torch.arange(longest, device=grid.device)
        inside = number < count[:, None]
        places = torch.stack([number // columns[:, None], number % columns[:, None]], -1) * inside[..., None]
        return cls(members.reshape(size, longest, -1), present.reshape(size, longest, -1), places, inside)

    @classmethod
    def end_to_end(cls, grid: Tensor, lengths: Sequence[int]) -> tuple["Cells", list[int]]:
        """Of images of so many tokens that lie end to end, grid [T, 2], as of one row, and the cells of each image."""
        parts = [cls.of(piece[None], None) for piece in torch.split(grid, list(lengths))]
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        members = torch.cat([part.members + start for part, start in zip(parts, starts, strict=True)], 1)
        present, places, mask = (
            torch.cat([getattr(part, name) for part in parts], 1) for name in ("present", "grid", "mask")
        )
        return cls(members, present, places, mask), [part.mask.shape[1] for part in parts]

    def gather(self, x: Tensor) -> Tensor:
        """Tokens [B, n, C] cell by cell, [B, m, 4, C]; the content of places without a token means nothing."""
        flat = self.members.flatten(1)[..., None].expand(-1, -1, x.shape[-1])
        return x.gather(1, flat).view(*self.members.shape, -1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean [B, m, C] of each cell's tokens; zero for padding."""
        total = self.gather(x).masked_fill(~self.present[..., None], 0).sum(2)
        return total / self.present.sum(2, keepdim=True).clamp_min(1).to(x.dtype)


class Resampler(nn.Module):
    """The mean of a cell, and what a query made of it reads of the cell's tokens by cross-attention.

    A query sees its own cell only, which costs memory in proportion to the tokens; keys know their place in the cell,
    so that a head can choose one. Ref: the spatial vision aggregator of Cambrian-1, arXiv 2406.16860.
    """

    def __init__(self, channels: int, heads: int, width: int) -> None:
        super().__init__()
        width = width or channels
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, width)
        self.key_value = nn.Linear(channels, 2 * width)
        self.places = nn.Parameter(torch.zeros(SIDE**2, width))
        self.out = nn.Linear(width, channels)

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        """[B, n, C] -> [B, m, C]."""
        normal = self.norm(x)
        key, value = cells.gather(self.key_value(normal)).chunk(2, -1)
        by_head = (*key.shape[:-1], self.heads, -1)
        key, value = (key + self.places).view(by_head), value.reshape(by_head)
        query = self.query(cells.mean(normal)).view(*key.shape[:2], 1, self.heads, -1)
        # Products of one query with four keys: too small for a matrix product or a fused kernel.
        scores = (query * key).sum(-1) * key.shape[-1] ** -0.5  # [B, m, 4, H]
        scores = scores.masked_fill(~cells.present[..., None], -1e9)  # finite: a padding cell has no token at all
        read = (scores.float().softmax(2).to(value.dtype)[..., None] * value).sum(2)
        out: Tensor = cells.mean(x) + self.out(read.flatten(-2))
        return out
