"""Attention of one rectangle of queries and keys, forward and backward, without autograd.

Written out so that many calls can share the tensors they read and keep nothing but their results. `Fused` is torch's
CPU kernel, which never holds all scores; `Products` are plain matrix products, for everywhere else.
Shapes: query [B, H, Q, K]; key and value [B, H, L, K] (heads may share memory); bias broadcastable to [B, 1, Q, L] or
None; `causal`, without bias, hides keys after the query's own number. out [B, H, Q, K]; normaliser [B, H, Q], the
logarithm of the sum of exponentials of a query's scores.
"""

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from unicom_dist.models.layers import LONGEST_PRODUCT
from unicom_dist.parallel.precision import fast_bfloat16

aten = torch.ops.aten


class Kernel(Protocol):
    """softmax(q k^T / sqrt(K) + bias) v."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """out, normaliser."""

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        normaliser: Tensor,
        bias: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, given that of `out`."""


class Fused:
    """torch's flash attention for CPUs."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, normaliser = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias
        )
        return out, normaliser

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        normaliser: Tensor,
        bias: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_query, d_key, d_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, normaliser, 0.0, causal, attn_mask=bias
        )
        return d_query, d_key, d_value


class Products:
    """All scores in memory; softmax in float32."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(query, key, bias, causal)
        normaliser = scores.logsumexp(-1)
        weights = scores.sub_(normaliser[..., None]).exp_().to(value.dtype)
        return torch.matmul(weights, value), normaliser

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        normaliser: Tensor,
        bias: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = self._scores(query, key, bias, causal).sub_(normaliser[..., None]).exp_()
        d_scores = torch.matmul(grad, value.transpose(-1, -2)).to(weights.dtype)
        d_scores.sub_((grad * out).sum(-1, dtype=weights.dtype)[..., None]).mul_(weights).mul_(query.shape[-1] ** -0.5)
        d_scores, weights = d_scores.to(query.dtype), weights.to(grad.dtype)
        return (
            torch.matmul(d_scores, key),
            torch.matmul(d_scores.transpose(-1, -2), query),
            torch.matmul(weights.transpose(-1, -2), grad),
        )

    def _scores(self, query: Tensor, key: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            scores.masked_fill_(hidden, float("-inf"))
        return scores if bias is None else scores.add_(bias)


FUSED, PRODUCTS = Fused(), Products()


def kernel_for(query: Tensor, key: Tensor) -> Kernel:
    """The faster one."""
    if query.device.type != "cpu":
        return PRODUCTS
    return PRODUCTS if query.dtype == torch.bfloat16 and key.shape[2] <= LONGEST_PRODUCT else FUSED


def computed_in(tensor: Tensor) -> torch.dtype:
    """The dtype of all calls: that of `tensor`, but float32 where a CPU would emulate bfloat16."""
    emulated = tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and not _multiplies_bfloat16()
    return torch.float32 if emulated else tensor.dtype


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    return fast_bfloat16(torch.device("cpu"))
