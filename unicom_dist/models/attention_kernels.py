"""Attention of one rectangle of queries and keys, forward and backward, without autograd.

Written out so that many calls can share the tensors they read and keep nothing but their results. `Fused` is torch's
CPU kernel, which never holds all scores; `Blocked` has another backward, for bfloat16; `Products` are plain matrix
products, for everywhere else.
Shapes: out [B, H, Q, K]; normaliser [B, H, Q], the logarithm of the sum of exponentials of a query's scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from unicom_dist.parallel.precision import fast_bfloat16

aten = torch.ops.aten

SCORES_AT_ONCE = 1 << 20  # in float32, 4 MiB: about what a core's own cache holds
FEWEST_KEYS = 64


class Rectangle(NamedTuple):
    """What a kernel is given."""

    query: Tensor  # [B, H, Q, K]
    key: Tensor  # [B, H, L, K]; heads may share memory
    value: Tensor  # as key
    bias: Tensor | None  # broadcastable to [B, 1, Q, L]
    causal: bool  # without bias: keys after the query's own number are hidden


Gradients = tuple[Tensor, Tensor, Tensor]  # of query, key and value


class Kernel(Protocol):
    """softmax(q k^T / sqrt(K) + bias) v."""

    def forward(self, rectangle: Rectangle) -> tuple[Tensor, Tensor]:
        """out, normaliser."""

    def backward(self, grad: Tensor, rectangle: Rectangle, out: Tensor, normaliser: Tensor) -> Gradients:
        """Gradients of the rectangle's tensors, given that of `out`."""


class Fused:
    """torch's flash attention for CPUs."""

    def forward(self, rectangle: Rectangle) -> tuple[Tensor, Tensor]:
        query, key, value, bias, causal = rectangle
        out, normaliser = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias
        )
        return out, normaliser

    def backward(self, grad: Tensor, rectangle: Rectangle, out: Tensor, normaliser: Tensor) -> Gradients:
        query, key, value, bias, causal = rectangle
        d_query, d_key, d_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, normaliser, 0.0, causal, attn_mask=bias
        )
        return d_query, d_key, d_value


class Blocked(Fused):
    """torch's flash attention for CPUs; backward as products of float32, multiplied in bfloat16, some keys at a time.

    torch's own backward rounds what it has to bfloat16 after every block of queries: its error is 1.2 times that of one
    dense call, that of this .88 times.
    """

    def backward(self, grad: Tensor, rectangle: Rectangle, out: Tensor, normaliser: Tensor) -> Gradients:
        """In float32; of keys whose memory heads share, one gradient for all of these heads: [B, 1, L, K]."""
        query, key, value, bias, causal = rectangle
        batch, heads, queries, width = query.shape
        length, shared = key.shape[2], key.shape[1] > 1 and key.stride(1) == 0
        # The queries of heads that share their keys are further rows of one product: [P, R, n, K] against [P, L, K].
        products, rows = (batch, heads) if shared else (batch * heads, 1)

        def of_queries(x: Tensor) -> Tensor:
            return _contiguous(x).view(products, rows, queries, -1)

        def of_keys(x: Tensor) -> Tensor:
            return _contiguous(x[:, :1] if shared else x).view(products, length, width)

        scale = width**-0.5  # of scores, not of queries, which are exact as they are
        key, value = of_keys(key), of_keys(value)
        query, grad, offset = of_queries(query), of_queries(grad), -of_queries(normaliser)
        mean = (grad * of_queries(out)).sum(-1, keepdim=True)
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        block = max(FEWEST_KEYS, SCORES_AT_ONCE // (products * rows * queries))
        with multiplied_in_bfloat16():
            for begin in range(0, length, block):
                keys = slice(begin, begin + block)
                k, v = key[:, keys], value[:, keys]
                seeing = begin if causal else 0  # the first query that sees any of them
                q, g, o, m = (x[:, :, seeing:].flatten(1, 2) for x in (query, grad, offset, mean))
                weights = torch.bmm(q, k.transpose(1, 2))
                torch.add(o, weights, alpha=scale, out=weights)
                if causal:
                    corner = weights.view(products, rows, -1, k.shape[1])[:, :, : k.shape[1]]
                    corner.masked_fill_(_later(k.shape[1], k.device), float("-inf"))
                if bias is not None:
                    weights.view(batch, heads, queries, -1).add_(bias[..., keys])
                weights.exp_()
                torch.bmm(weights.transpose(1, 2), g, out=d_value[:, keys])
                d_scores = torch.bmm(g, v.transpose(1, 2)).sub_(m).mul_(weights)
                torch.bmm(d_scores.transpose(1, 2), q, out=d_key[:, keys])
                if begin:
                    d_query[:, :, seeing:].add_(torch.bmm(d_scores, k).view(products, rows, -1, width))
                else:
                    torch.bmm(d_scores, k, out=d_query.flatten(1, 2))
        d_query, d_key = d_query.mul_(scale).view(batch, heads, queries, width), d_key.mul_(scale)
        return d_query, d_key.view(batch, -1, length, width), d_value.view(batch, -1, length, width)


def _contiguous(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format).contiguous()


def _later(length: int, device: torch.device) -> Tensor:
    """[L, L]: keys after the query's own number."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)


@contextmanager
def multiplied_in_bfloat16() -> Iterator[None]:
    """CPUs that multiply bfloat16 round the factors of float32 products to it, and sum and keep float32 as ever.

    Holds for the process, so for products of other threads, too.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Products:
    """All scores in memory; softmax in float32."""

    def forward(self, rectangle: Rectangle) -> tuple[Tensor, Tensor]:
        scores, value = self._scores(rectangle), rectangle.value
        normaliser = scores.logsumexp(-1)
        weights = scores.sub_(normaliser[..., None]).exp_().to(value.dtype)
        return torch.matmul(weights, value), normaliser

    def backward(self, grad: Tensor, rectangle: Rectangle, out: Tensor, normaliser: Tensor) -> Gradients:
        query, key, value, *_ = rectangle
        weights = self._scores(rectangle).sub_(normaliser[..., None]).exp_()
        d_scores = torch.matmul(grad, value.transpose(-1, -2)).to(weights.dtype)
        d_scores.sub_((grad * out).sum(-1, dtype=weights.dtype)[..., None]).mul_(weights).mul_(query.shape[-1] ** -0.5)
        d_scores, weights = d_scores.to(query.dtype), weights.to(grad.dtype)
        return (
            torch.matmul(d_scores, key),
            torch.matmul(d_scores.transpose(-1, -2), query),
            torch.matmul(weights.transpose(-1, -2), grad),
        )

    def _scores(self, rectangle: Rectangle) -> Tensor:
        query, key, _, bias, causal = rectangle
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if causal:
            scores.masked_fill_(_later(scores.shape[-1], scores.device), float("-inf"))
        return scores if bias is None else scores.add_(bias)


FUSED, BLOCKED, PRODUCTS = Fused(), Blocked(), Products()


def kernel_for(query: Tensor) -> Kernel:
    """The fastest one for such tensors."""
    if query.device.type != "cpu":
        return PRODUCTS
    return BLOCKED if query.dtype == torch.bfloat16 else FUSED


def computed_in(tensor: Tensor) -> torch.dtype:
    """The dtype of all calls: that of `tensor`, but float32 where a CPU would emulate bfloat16."""
    emulated = tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and not _multiplies_bfloat16()
    return torch.float32 if emulated else tensor.dtype


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    return fast_bfloat16(torch.device("cpu"))
