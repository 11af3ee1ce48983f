"""Cross-entropy of the next token straight from hidden states: the logits [Y, V] are never whole in memory.

Rows are taken in chunks. The forward pass makes a chunk's logits once, reads loss and gradients off them, and drops
them: three matrix products in all, as many as the plain form has. The gradients, computed for d_loss = 1, wait for the
backward pass, which scales them. (Making the logits again in the backward pass would hold no gradient of the weight in
between, and cost a fourth product; measured, the time is the scarcer of the two.)
With vocabulary parallelism each rank of a group holds V/t rows of the weight; per chunk the ranks exchange two numbers
a row.
Shapes: Y labels of width h, V vocabulary, R rows of the weight here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unicom_dist.parallel.mesh import Axis

CHUNK_LOGITS = 1 << 25  # of one chunk on one rank: 128 MiB in float32


@dataclass(frozen=True)
class VocabShard:
    """The ranks of `axis` hold R rows each, in their order; rows from `total` on stand for no token."""

    axis: Axis
    total: int


def linear_cross_entropy(hidden: Tensor, weight: Tensor, label_ids: Tensor, shard: VocabShard | None = None) -> Tensor:
    """-log softmax(hidden weight^T)[label] in nats: [Y] float32 (float64 from float64).

    hidden [Y, h]; weight [R, h] in the same dtype; label_ids [Y] in [0, V). The softmax is in float32.
    Under a `shard`, hidden and labels are the same on all its ranks, and so are the result and the (complete) gradient
    of hidden. Collective over the shard's axis, in forward and in backward.
    """
    return cross_entropy_and_z(hidden, weight, label_ids, shard)[0]


def cross_entropy_and_z(
    hidden: Tensor, weight: Tensor, label_ids: Tensor, shard: VocabShard | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and log^2 Z of each softmax, [Y]; Z is its normaliser.

    One walk serves both: the gradient of the first is that of cross-entropy + z_loss log^2 Z (PaLM, arXiv 2204.02311,
    section 5), and the second is a figure without gradient.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        both: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(hidden, weight, label_ids, shard, z_loss)  # type: ignore[no-untyped-call]
        return both
    losses, squares, *_ = _walk(hidden, weight, label_ids, shard, z_loss, None, False, False)
    return losses, squares


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of sum(losses) come with the losses; another d_loss scales them, or repeats the walk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, label_ids: Tensor, shard: VocabShard | None, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        losses, squares, *gradients = _walk(hidden, weight, label_ids, shard, z_loss, None, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden, weight, label_ids)
        ctx.mark_non_differentiable(squares)
        ctx.shard, ctx.z_loss, ctx.gradients = shard, z_loss, gradients
        return losses, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, label_ids = ctx.saved_tensors
        same_for_all = len(label_ids) < 2 or d_losses.stride(0) == 0  # a broadcast number, as the gradient of a sum is
        if ctx.gradients is None or not same_for_all:
            ctx.gradients = None
            wanted = ctx.needs_input_grad[:2]
            _, _, d_hidden, d_weight = _walk(hidden, weight, label_ids, ctx.shard, ctx.z_loss, d_losses, *wanted)
            return d_hidden, d_weight, None, None, None
        gradients, ctx.gradients = ctx.gradients, None  # handed out once: they are scaled in place
        for gradient in gradients:
            if gradient is not None and len(label_ids):
                gradient.mul_(d_losses[0])
        return *gradients, None, None, None


@torch.no_grad()
def _walk(
    hidden: Tensor,
    weight: Tensor,
    label_ids: Tensor,
    shard: VocabShard | None,
    z_loss: float,
    d_losses: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Losses and squares [Y]; gradients [Y, h] and [R, h] of sum((losses + z_loss squares) d_losses) where wanted.

    d_losses: None = ones.
    """
    rows = weight.shape[0]
    first, real = 0, rows
    if shard is not None:
        first = shard.axis.rank * rows
        real = min(max(shard.total - first, 0), rows)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(hidden.shape[0], dtype=exact, device=hidden.device)
    squares = torch.empty_like(losses)
    d_hidden = torch.empty_like(hidden) if want_hidden else None
    d_weight = torch.zeros_like(weight) if want_weight else None
    step = max(1, CHUNK_LOGITS // rows)
    for begin in range(0, hidden.shape[0], step):
        chunk = slice(begin, begin + step)
        x, column = hidden[chunk], label_ids[chunk] - first
        here = (column >= 0) & (column < real)
        column = column.clamp(0, rows - 1)[:, None]
        values = F.linear(x, weight).to(exact)
        values[:, real:] = torch.finfo(exact).min  # not -inf: a rank may hold nothing but padding
        target = values.gather(1, column)[:, 0].masked_fill_(~here, 0.0)
        largest = values.amax(-1)
        values.sub_(largest[:, None]).exp_()
        log_sum, target = _over_ranks(values.sum(-1).log_().add_(largest), target, shard)
        losses[chunk], squares[chunk] = log_sum - target, log_sum.square()
        if not (want_hidden or want_weight):
            continue
        scale = torch.ones_like(losses[chunk]) if d_losses is None else d_losses[chunk].to(exact)
        pull = scale * (1 + 2 * z_loss * log_sum)
        values.mul_(((largest - log_sum).exp_() * pull)[:, None])  # softmax, of this rank's rows
        values.scatter_add_(1, column, (-scale * here)[:, None])
        d_logits = values.to(weight.dtype)
        del values
        if d_hidden is not None:
            torch.mm(d_logits, weight, out=d_hidden[chunk])
        if d_weight is not None:
            d_weight.addmm_(d_logits.T, x)
        del d_logits  # before the next chunk's are made
    if d_hidden is not None and shard is not None:
        shard.axis.sum(d_hidden)
    return losses, squares, d_hidden, d_weight


def _over_ranks(log_sum: Tensor, target: Tensor, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """Log of the sum of exponentials and the label's logit over all rows, of this rank's (0 for another's label)."""
    if shard is None:
        return log_sum, target
    every = shard.axis.gather(torch.stack([log_sum, target]))
    return every[:, 0].logsumexp(0), every[:, 1].sum(0)
