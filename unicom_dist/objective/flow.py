"""The flow-matching loss. Path, target and times are in `unicom_dist.models.flow`, where the models use them."""

from torch import Tensor

from unicom_dist.models.flow import clean_from_velocity, interpolate, sample_t, shift, target

__all__ = ["clean_from_velocity", "interpolate", "sample_t", "shift", "squared_error", "target"]


def squared_error(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """||velocity - (data - noise)||^2, averaged over all axes but the first: [N] float32 of [N, ...]."""
    error = velocity.float() - target(data.float(), noise.float())
    return error.square().flatten(1).mean(1)
