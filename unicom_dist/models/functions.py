"""Norm, rotary positions and gated activation with the backward pass written out, so that autograd keeps the least.

Composed of torch's operations, a norm keeps its input in float32 twice over, a rotation both its halves, an activation
its result. Here each keeps its inputs (and a number per row), in their own dtype; the forward pass is that of the plain
forms, rounding included. Derivation of the bytes: Korthikanti et al. 2022, arXiv 2205.05198, for a layer with RMSNorm
and SwiGLU.
Shapes: S positions, H heads of K channels, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, and the reciprocal root [..., 1] (float32)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """With u = x scale: d_x = scale (d_u - u mean(d_u u)), d_weight = sum(d_out u)."""
    d_out, unit = d_out.to(scale.dtype), x * scale
    shares = d_out * unit
    along = torch.matmul(shares, weight.to(scale.dtype))[..., None] / x.shape[-1]
    d_x = (d_out * weight).addcmul_(unit, along, value=-1).mul_(scale)
    return d_x.to(x.dtype), shares.flatten(0, -2).sum(0).to(weight.dtype)


def rotation_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-high, low) sin, by halves of the last axis."""
    low, high = x.chunk(2, -1)
    return x * cos.unsqueeze(-2) + torch.cat([-high, low], -1) * sin.unsqueeze(-2)


def rotation_backward(d_out: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transposed rotation."""
    low, high = (d_out * sin.unsqueeze(-2)).chunk(2, -1)
    return d_out * cos.unsqueeze(-2) + torch.cat([high, -low], -1)


def activation_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def activation_backward(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) is computed again."""
    return torch.ops.aten.silu_backward(d_out * up, gate), d_out * F.silu(gate)


_FORMS: dict[str, Callable[..., Any]] = {
    form.__name__: form
    for form in (
        norm_forward,
        norm_backward,
        rotation_forward,
        rotation_backward,
        activation_forward,
        activation_backward,
    )
}


def compile_all() -> None:
    """From now on, in this process, each of the six is one compiled kernel (torch.compile, at its first call)."""
    for name in _FORMS:
        _FORMS[name] = torch.compile(globals()[name], dynamic=True)


class RmsNormFunction(torch.autograd.Function):
    """Keeps x, a number per row and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., D], weight [D] -> [..., D]."""
        out: Tensor
        out, scale = _FORMS["norm_forward"](x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        """See `norm_backward`."""
        return *_FORMS["norm_backward"](d_out, *ctx.saved_tensors), None


class RotateFunction(torch.autograd.Function):
    """Keeps the angles, which all layers share, and nothing of query and key."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """query [..., H, K], key [..., G, K], cos and sin [..., K] -> the shapes of query and key."""
        ctx.save_for_backward(cos, sin)
        rotated = _FORMS["rotation_forward"]
        return rotated(query, cos, sin), rotated(key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """See `rotation_backward`."""
        back, angles = _FORMS["rotation_backward"], ctx.saved_tensors
        return back(d_query, *angles), back(d_key, *angles), None, None


class SiluProductFunction(torch.autograd.Function):
    """Keeps gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        ctx.save_for_backward(gate, up)
        out: Tensor = _FORMS["activation_forward"](gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """See `activation_backward`."""
        d_gate, d_up = _FORMS["activation_backward"](d_out, *ctx.saved_tensors)
        return d_gate, d_up


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise."""
    out: Tensor = SiluProductFunction.apply(gate, up)  # type: ignore[no-untyped-call]
    return out
