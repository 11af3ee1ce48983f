"""Norm, rotary positions and gated activation with the backward pass written out, so that autograd keeps the least.

Composed of torch's operations, a norm keeps its input in float32 twice over, a rotation both its halves, an activation
its result. Here each keeps its inputs (and a number per row), in their own dtype; the forward pass is that of the plain
forms, rounding included. Derivation of the bytes: Korthikanti et al. 2022, arXiv 2205.05198, for a layer with RMSNorm
and SwiGLU.
Shapes: S positions, H heads of K channels, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, and the reciprocal root [..., 1] (float32)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


class RmsNormFunction(torch.autograd.Function):
    """Keeps x, a number per row and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., D], weight [D] -> [..., D]."""
        out, scale = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """With u = x scale: d_x = scale (d_u - u mean(d_u u)), d_weight = sum(d_out u)."""
        x, weight, scale = ctx.saved_tensors
        d_out = d_out.to(scale.dtype)
        unit = x.to(scale.dtype).mul_(scale) if x.dtype != scale.dtype else x * scale
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_out * unit).flatten(0, -2).sum(0).to(weight.dtype)
        d_unit = d_out * weight
        d_x = (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True)).mul_(scale)
        return d_x.to(x.dtype), d_weight, None


class RotateFunction(torch.autograd.Function):
    """Keeps the angles, which all layers share, and nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., H, K], cos and sin [..., K] -> [..., H, K]."""
        ctx.save_for_backward(cos, sin)
        low, high = x.chunk(2, -1)
        return x * cos[..., None, :] + torch.cat([-high, low], -1) * sin[..., None, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        """The transposed rotation."""
        cos, sin = ctx.saved_tensors
        low, high = (d_out * sin[..., None, :]).chunk(2, -1)
        return d_out * cos[..., None, :] + torch.cat([high, -low], -1), None, None


class SiluProductFunction(torch.autograd.Function):
    """Keeps gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """silu(gate) is computed again."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_out * up, gate), d_out * F.silu(gate)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    out: Tensor = SiluProductFunction.apply(gate, up)  # type: ignore[no-untyped-call]
    return out
