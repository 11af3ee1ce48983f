"""Batch normalisation folded into the convolution before it: y = (w x + b - mean) / sqrt(var + eps) * gamma + beta."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, moments: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Weight [out, in/groups, k, k] and bias [out] of the convolution that also normalises, computed in float64.

    moments: gamma, beta, running mean and running variance, each [out].
    """
    gamma, beta, mean, var = (moment.double() for moment in moments)
    scale = gamma / torch.sqrt(var + eps)
    shift = (torch.zeros_like(mean) if bias is None else bias.double()) - mean
    return (weight.double() * scale[:, None, None, None]).float(), (beta + shift * scale).float()
