"""Where a compressor's linear path may start: at the best linear guess of the pictures from the features.

What shows the pixels lies in directions along which features vary little, and gradient descent finds those last: of the
EfficientNet pyramid of emoji, 64 principal components tell pictures of 32 px to 17.7 dB, all 1280 channels to 24.7 dB.
Reduced-rank ridge regression finds them in seconds: least squares from the features of a token to what is drawn there;
the largest components of the fit become latent channels, each of unit variance or of its share of the fit. Channels
that are left and the decoder start as ever. Ref: Izenman 1975, reduced-rank regression.
Shapes: N tokens of D channels, q values of the target space under a token, d latent channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from unicom_dist.models.codec import CodecBatch
from unicom_dist.models.compressor import Compressor
from unicom_dist.models.compressor.blocks import AttentionBlock

PICTURES = 512  # from which it is computed, evenly over the training set
RIDGE = 3e-3  # of the mean variance of a channel
LEAST = 1e-6  # of the largest component's variance; below, a component is rounding


class Regression:
    """Sums over tokens, in float64, from which a linear map from x [N, D] to y [N, q] follows."""

    def __init__(self) -> None:
        self._count, self._sums = 0, [torch.zeros((), dtype=torch.float64)] * 4

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows."""
        self._count += len(x)
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        self._sums = [old + one.double() for old, one in zip(self._sums, new, strict=True)]

    def components(self, limit: int, whiten: bool) -> tuple[Tensor, Tensor]:
        """Weight [r, D] and bias [r] that map x to the largest r <= limit components of the fitted y.

        Whitened, each has variance 1; else each keeps its share of the fit, and they have variance 1 on average.
        ValueError on no rows.
        """
        if not self._count:
            raise ValueError("a regression on no tokens")
        mean_x, mean_y, square, product = (value / self._count for value in self._sums)
        covariance = square - torch.outer(mean_x, mean_x)
        ridge = torch.eye(len(mean_x), dtype=covariance.dtype) * (RIDGE * covariance.diagonal().mean() + 1e-12)
        fit = torch.linalg.solve(covariance + ridge, product - torch.outer(mean_x, mean_y))
        variance, axes = torch.linalg.eigh(fit.T @ covariance @ fit)
        variance, axes = variance.flip(0)[:limit], axes.flip(1)[:, :limit]
        kept = variance > LEAST * variance[0]
        scale = variance[kept] if whiten else variance[kept].mean()
        weight = ((fit @ axes[:, kept]) / scale.sqrt()).T
        return weight.float(), -(weight @ mean_x).float()


@torch.no_grad()
def linear_start(compressor: Compressor, batches: Iterable[CodecBatch], whiten: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias for the first rows of the compressor's linear path; it and its other weights are on the CPU.

    batches: with what the decoder draws. whiten: as for `Regression.components`. The result is the same on every rank
    that is given the same ones.
    """
    seen: list[Tensor] = []
    hook = _block(compressor).straight.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    regression, side = Regression(), 0
    try:
        for batch in batches:
            compressor(batch.features.cpu().float(), batch.mask.cpu(), batch.grid.cpu())
            grid, mask = compressor.layout(batch.grid.cpu(), batch.mask.cpu())
            assert mask is not None
            for x, real, places, target in zip(seen.pop(), mask, grid, batch.target.cpu().float(), strict=True):
                rows, columns = (places[real].amax(0) + 1).tolist()
                side = side or max(1, round((target[0].numel() / (rows * columns)) ** 0.5))
                regression.add(x[real], under_tokens(target, rows, columns, side))
    finally:
        hook.remove()
    return regression.components(compressor.config.channels, whiten)


def under_tokens(target: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """What lies under each of rows x columns tokens of target [c, h, w], at side x side values: [tokens, c side^2]."""
    small = F.adaptive_avg_pool2d(target, (rows * side, columns * side))
    return F.pixel_unshuffle(small, side).flatten(1).T


@torch.no_grad()
def set_start(compressor: Compressor, start: tuple[Tensor, Tensor]) -> None:
    """Give the compressor's linear path the values of `linear_start`; what adds to it starts at zero."""
    block, (weight, bias) = _block(compressor), start
    block.straight.weight[: len(weight)] = weight
    block.straight.bias[: len(bias)] = bias
    for added in (block.attention.out, block.mlp_out):
        if added is not None:
            added.weight.zero_()
            added.bias.zero_()


def _block(compressor: Compressor) -> AttentionBlock:
    assert isinstance(compressor.block, AttentionBlock)  # by the configuration
    return compressor.block
