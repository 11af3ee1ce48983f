"""Building blocks shared by the models: normalisation, rotary positions, gated MLP, embeddings of time and place.

Shapes: S positions, H heads of K channels, D width. Modules compute in the dtype of their weights; norms, angles and
softmax are computed in float32.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.models.functions import RmsNormFunction, RotateFunction, silu_product
from unicom_dist.models.kept import Kept

LONGEST_PRODUCT = 1024  # keys; beyond, the fused kernel is as fast and holds no scores


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis; the division in float32. Equal to Qwen2's norm."""
    out: Tensor = RmsNormFunction.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain per channel."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.normalise = rms_norm  # or a fused kernel

    def forward(self, x: Tensor, kept: Kept | None = None) -> Tensor:
        """[..., D] -> [..., D]. `kept` is told how to compute the result again (from a copy of the gain, see there)."""
        out = self.normalise(x, self.weight, self.eps)
        if kept is not None and kept.active:
            kept.offer(out, partial(self.normalise, x.detach(), self.weight.detach().clone(), self.eps))
        return out


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [S, K] float32 of positions [S]; the halves of K repeat the same frequencies (Qwen2's layout).

    Positions [S, 2] are rows and columns: frequencies turn by one and the other in turn. Where both are equal, as those
    of text are, this is the one-dimensional rotation (as in HunyuanImage 3.0, arXiv 2509.23951).
    """
    powers = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    if positions.dim() == 1:
        turns = positions[:, None]
    else:
        turns = positions[:, torch.arange(len(powers), device=positions.device) % 2]
    angles = turns.float() * (1.0 / theta**powers)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions applied to query [..., H, K] and key [..., G, K]; cos and sin [..., K] in their dtype."""
    rotated: tuple[Tensor, Tensor] = RotateFunction.apply(query, key, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v.

    query [B, H, Q, K], key and value [B, H or fewer, L, K] (a divisor: groups of query heads share one), bias
    broadcastable to [B, 1, Q, L], in query's dtype. Returns [B, H, Q, K].
    The fused kernel, except in training with short bfloat16 sequences on CPUs: that kernel's backward takes 2 to 7
    times as long as that of plain products up to 512 positions, 1.2 times at 1024; its forward is the faster one.
    """
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if trained and query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= LONGEST_PRODUCT:
        return attend_by_products(query, key, value, bias)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=query.shape[1] != key.shape[1])


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attend` with all scores in memory."""
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    query = query.reshape(batch, -1, groups * length, width)  # the heads of a group are further rows of one product
    scores = torch.matmul(query * width**-0.5, key.transpose(-1, -2))
    if bias is not None:
        scores.view(batch, -1, groups, length, key.shape[2]).add_(bias.unsqueeze(2))
    return torch.matmul(scores.softmax(-1), value).reshape(batch, heads, length, width)


class GatedMlp(nn.Module):
    """down(silu(gate x) * up x), named as in Qwen2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def gate_up(self, x: Tensor) -> tuple[Tensor, ...]:
        """Both products of x."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor, selective: bool = False) -> Tensor:
        """[..., D] -> [..., D]. `selective`: the input of the last product is computed again in the backward pass."""
        gate, up = self.gate_up(x)
        product = silu_product(gate, up)
        kept = Kept(selective)
        kept.offer(product, partial(silu_product, gate.detach(), up.detach()))
        with kept:
            out: Tensor = self.down_proj(product)
        return out


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, then Linear, SiLU, Linear."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.lift = nn.Linear(frequencies, width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """[...] in [0, 1] -> [..., D]."""
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = t.float()[..., None] * 1000 * rates
        dtype = next(self.parameters()).dtype  # reading `self.lift.weight` here, ZeRO 3 would gather it by itself
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
        out: Tensor = self.out(F.silu(self.lift(waves)))
        return out


def grid_table(size: int, width: int) -> Tensor:
    """Frozen sines and cosines of 0 ... size-1, [size, width / 2]: one half of a 2-D position table."""
    quarter = width // 4
    rates = torch.exp(-math.log(10_000.0) * torch.arange(quarter, dtype=torch.float32) / quarter)
    angles = torch.arange(size, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


def at_grid(table: Tensor, grid: Tensor) -> Tensor:
    """Position vectors [..., D] of places [..., 2]: the row's half, then the column's half."""
    return torch.cat([table[grid[..., 0]], table[grid[..., 1]]], -1)
