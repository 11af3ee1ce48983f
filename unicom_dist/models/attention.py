"""Attention over packed samples: the definition (`visible`) and a fast form equal to it (`AttentionPlan`).

A plan is built once per batch, from the segments alone, and used by every layer. It is a list of calls of an attention
kernel (`attention_plan.py` says which): rectangles of queries and keys, which read the layer's tensors where they lie,
and batches of short samples.
Shapes: S positions, H query heads and G key heads of K channels, r = H / G; a call has n queries and L keys.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unicom_dist.models.attention_kernels import Rectangle, computed_in, kernel_for
from unicom_dist.models.attention_plan import Document, Piece, plan_calls
from unicom_dist.models.segments import Segment


class Attend(Protocol):
    """How the queries of a layer meet keys and values; realised by a plan, a recorder of prefixes and a cache."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, H, K], key and value [S, G, K] -> [S, H, K]."""


class Plan(Attend, Protocol):
    """An `Attend` of one batch, made from its segments."""

    def to(self, device: torch.device | str) -> "Plan":
        """The same on `device`."""


class _Spread(NamedTuple):
    """Per position: number of its segment and of its sample, and whether its segment is two-way and hidden."""

    segment: Tensor
    sample: Tensor
    two_way: Tensor
    hidden: Tensor


def _spread(segments: Sequence[Segment]) -> _Spread:
    table = torch.tensor([(s.length, s.sample, s.mode != "causal", s.mode == "noise") for s in segments])
    table = table.reshape(-1, 4).to(torch.int64)
    number = torch.arange(len(segments)).repeat_interleave(table[:, 0])
    rows = table[number]
    return _Spread(number, rows[:, 1], rows[:, 2].bool(), rows[:, 3].bool())


def _sees(position: Tensor, s: _Spread) -> Tensor:
    """The visibility rule: [..., L] fields -> [..., L, L], query by key."""
    same_sample = s.sample[..., :, None] == s.sample[..., None, :]
    together = s.segment[..., :, None] == s.segment[..., None, :]
    earlier = position[..., None, :] <= position[..., :, None]
    return same_sample & (earlier | (together & s.two_way[..., None, :])) & (~s.hidden[..., None, :] | together)


def visible(segments: Sequence[Segment]) -> Tensor:
    """Which key (column) each query (row) sees, as a dense matrix: the definition every fast path is tested against.

    A query sees a key iff both are of one sample, and the key is not later or both are in one full or noise segment,
    and the key is not in a noise segment or both are in that one.

    Returns: [S, S] bool.
    """
    spread = _spread(segments)
    return _sees(torch.arange(spread.sample.shape[0]), spread)


class Take(torch.autograd.Function):
    """x[index] for distinct indices; the backward pass writes rows instead of accumulating them one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        """x [S, h] -> [len(index), h]."""
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Zeros but for the rows taken."""
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).index_copy_(0, index, grads[0]), None


class Rearrange(torch.autograd.Function):
    """out[i] = x[forward[i]]; backward reads d_out at `backward`, the place in `out` of each row of x.

    Both ways are pure reads: index_select's own backward is a serial accumulation, 20x slower on a CPU. Rows of `out`
    beyond one copy of x (padding) receive gradients from nobody.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        """x [S, ...] -> [len(forward), ...]."""
        ctx.save_for_backward(backward)
        return x.index_select(0, forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The inverse reading."""
        (backward,) = ctx.saved_tensors
        return grads[0].index_select(0, backward), None, None


def rearrange(x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """x[forward], where `forward` holds every row of x, at the places `backward`; further entries are padding."""
    out: Tensor = Rearrange.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return out


class AttentionPlan:
    """The calls that compute the attention of a row, and their masks. An `Attend`."""

    def __init__(self, pieces: Sequence[Piece], stairs: Tensor, batches: "Sequence[_Whole]") -> None:
        """Use `build`. stairs: the mask of all pieces of text, each of which reads a corner of it."""
        self._pieces, self._stairs, self._batches = pieces, stairs, batches
        self.calls: list[_Cut | _Whole] = [_Cut(piece, _corner(piece, stairs)) for piece in pieces]
        self.calls += [batch if len(batch.bias) > 1 else batch.in_place() for batch in batches]

    @classmethod
    def build(
        cls, segments: Sequence[Segment], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "AttentionPlan":
        """The plan of a batch; `dtype` is that of the queries."""
        calls = plan_calls(segments)
        masks = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(calls.pieces, _stairs(calls.pieces, masks), [_whole(d, masks) for d in calls.batches]).to(device)

    def to(self, device: torch.device | str) -> "AttentionPlan":
        """The same plan with its masks on `device`."""
        if torch.device(device) == self._stairs.device:
            return self
        batches = [batch.to(device) for batch in self._batches]
        return AttentionPlan(self._pieces, self._stairs.to(device, non_blocking=True), batches)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, H, K], key and value [S, G, K] -> [S, H, K]; the same for every layer."""
        out: Tensor = _Packed.apply(self.calls, query, key, value)  # type: ignore[no-untyped-call]
        return out


class _Packed(torch.autograd.Function):
    """All calls of a plan. Between forward and backward only inputs, result and a number per query are kept."""

    @staticmethod
    def forward(ctx: Any, calls: "Sequence[_Cut | _Whole]", query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, H, K], key and value [S, G, K] -> [S, H, K]."""
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        q, k, v = (x.to(computed_in(query)) for x in (query, key, value))
        kernel, normalisers = kernel_for(q), []
        for call in calls:
            result, normaliser = kernel.forward(_rectangle(call, q, k, v))
            call.put(out, result)
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, out, *normalisers)
        ctx.calls = calls
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; what several calls find for a key is summed in float32."""
        query, key, value, out, *normalisers = ctx.saved_tensors
        q, k, v, out, grad = (x.to(computed_in(query)) for x in (query, key, value, out, grads[0]))
        kernel, groups = kernel_for(q), k.shape[1]
        d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        sums = torch.promote_types(key.dtype, torch.float32)
        d_key, d_value = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in (key, value))
        for call, normaliser in zip(ctx.calls, normalisers, strict=True):
            dq, dk, dv = kernel.backward(
                call.queries(grad, groups), _rectangle(call, q, k, v), call.queries(out, groups), normaliser
            )
            call.put(d_query, dq)
            call.add(d_key, dk)
            call.add(d_value, dv)
        return None, d_query, d_key.to(key.dtype), d_value.to(value.dtype)


def _rectangle(call: "_Cut | _Whole", query: Tensor, key: Tensor, value: Tensor) -> Rectangle:
    """What `call` attends of query [S, H, K], key and value [S, G, K]."""
    heads, groups = query.shape[1], key.shape[1]
    return Rectangle(
        call.queries(query, groups), call.keys(key, heads), call.keys(value, heads), call.bias, call.causal
    )


class _Cut:
    """A piece: its queries are a stretch of the row, its keys one or several. Read where they lie, not copied."""

    def __init__(self, piece: Piece, bias: Tensor | None) -> None:
        self._queries, self._keys = slice(piece.begin, piece.end), [slice(*places) for places in piece.keys]
        self._lengths = [end - begin for begin, end in piece.keys]
        self.bias, self.causal = bias, piece.causal and bias is None

    def queries(self, x: Tensor, groups: int) -> Tensor:
        """[S, H, K] -> [1, H, n, K], or [G, r, n, K] where heads share keys."""
        return _heads(x[self._queries], 1 if x.shape[1] == groups else groups)

    def keys(self, x: Tensor, heads: int) -> Tensor:
        """[S, G, K] -> [1, H, L, K], or [G, r, L, K] where heads share keys: one memory."""
        parts = [x[places] for places in self._keys]
        seen = parts[0] if len(parts) == 1 else torch.cat(parts)
        split = 1 if x.shape[1] == heads else x.shape[1]
        return _heads(seen, split).expand(-1, heads // split, -1, -1)

    def put(self, into: Tensor, y: Tensor) -> None:
        """The reverse of `queries`: [1, H, n, K] or [G, r, n, K] into [S, H, K]."""
        into[self._queries].copy_(y.permute(2, 0, 1, 3).flatten(1, 2))

    def add(self, into: Tensor, y: Tensor) -> None:
        """The gradient of `keys`: [1, H, L, K] or [G, r, L, K] onto [S, G, K]."""
        if y.shape[0] * y.shape[1] != into.shape[1]:
            y = y.sum(1, keepdim=True)
        y = y.permute(2, 0, 1, 3).flatten(1, 2)
        for places, part in zip(self._keys, torch.split(y, self._lengths), strict=True):
            into[places].add_(part)


def _heads(x: Tensor, split: int) -> Tensor:
    """[n, H, K] -> [split, H / split, n, K], a view."""
    return x.view(len(x), split, -1, x.shape[2]).permute(1, 2, 0, 3)


def _stairs(pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor:
    """[n, p + n]: row i is zero up to column p + i, then minus infinity; at most n queries with p keys before them."""
    masked = [piece for piece in pieces if piece.causal and piece.before]
    n = max((piece.end - piece.begin for piece in masked), default=0)
    before = max((piece.before for piece in masked), default=0)
    return torch.full((n, before + n), float("-inf"), dtype=dtype).triu_(before + 1)


def _corner(piece: Piece, stairs: Tensor) -> Tensor | None:
    """The mask of a piece, where the kernel has to be given one."""
    if not piece.causal or not piece.before:
        return None
    n, before = piece.end - piece.begin, stairs.shape[1] - stairs.shape[0]
    return stairs[None, None, :n, before - piece.before : before + n]


class _Whole(NamedTuple):
    """A batch of B whole samples padded to L positions, under a mask. Read and written as copies."""

    bias: Tensor  # [B, 1, L, L]
    gather: Tensor  # [B L]: the position to read; for padding, any
    places: Tensor  # [n]: where in `gather` there is no padding
    positions: Tensor  # [n]: the positions read there
    begin: int  # the first position of the longest

    def to(self, device: torch.device | str) -> "_Whole":
        """The same on `device`."""
        bias, gather, places, positions = (tensor.to(device, non_blocking=True) for tensor in self[:4])
        return _Whole(bias, gather, places, positions, self.begin)

    def in_place(self) -> _Cut:
        """The same call for a batch of one: nothing is padded, so nothing need be copied."""
        stretch = (self.begin, self.begin + self.bias.shape[-1])
        return _Cut(Piece(*stretch, (stretch,), causal=False), self.bias)

    @property
    def causal(self) -> bool:
        """The mask says it."""
        return False

    def queries(self, x: Tensor, groups: int) -> Tensor:
        """[S, H, K] -> [B, H, L, K]."""
        return x.index_select(0, self.gather).view(len(self.bias), -1, *x.shape[1:]).transpose(1, 2)

    def keys(self, x: Tensor, heads: int) -> Tensor:
        """[S, G, K] -> [B, H, L, K]."""
        mine = self.queries(x, x.shape[1])
        return mine if x.shape[1] == heads else mine.repeat_interleave(heads // x.shape[1], 1)

    def put(self, into: Tensor, y: Tensor) -> None:
        """The reverse of `queries`: [B, H, L, K] into [S, H, K]."""
        rows = y.transpose(1, 2).flatten(0, 1).index_select(0, self.places)
        into.index_copy_(0, self.positions, rows.to(into.dtype))

    def add(self, into: Tensor, y: Tensor) -> None:
        """The gradient of `keys`: [B, H, L, K] into [S, G, K], where nobody else has any."""
        self.put(into, y if y.shape[1] == into.shape[1] else y.view(len(y), into.shape[1], -1, *y.shape[2:]).sum(2))


def _whole(documents: Sequence[Document], dtype: torch.dtype) -> _Whole:
    """The longest of `documents` comes first."""
    length = torch.tensor([document.length for document in documents])
    begin = torch.tensor([document.begin for document in documents])[:, None]
    longest = documents[0].length
    offset = torch.arange(longest)
    real = offset < length[:, None]
    spread = _spread([segment for document in documents for segment in document.segments])
    rows = torch.where(real, (length.cumsum(0) - length)[:, None] + offset, 0)
    sees = _sees(offset, _Spread(*(field[rows] for field in spread)))
    # A padded query sees itself alone: its softmax stays finite and its values and gradients touch nobody.
    sees = torch.where(real[:, :, None], sees & real[:, None, :], torch.eye(longest, dtype=torch.bool))
    bias = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf"))[:, None]
    positions = begin + offset
    gather, places = torch.where(real, positions, begin).flatten(), real.flatten().nonzero()[:, 0]
    return _Whole(bias, gather, places, positions[real], documents[0].begin)
