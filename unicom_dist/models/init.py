"""Initial weights as a function of (seed, parameter name), so that they do not depend on rank, layout or order."""

import hashlib

import torch
from torch import nn


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that belongs to (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch.no_grad()
def initialise(module: nn.Module, seed: int, std: float = 0.0, prefix: str = "") -> None:
    """Draw every matrix of `module` anew; vectors keep what their module gave them, except biases, which become zero.

    `std` > 0: normal of that deviation (embeddings and Qwen2's matrices). `std` = 0: uniform within 1/sqrt(fan in).
    `prefix` is the name of `module` in the model, so that a part gets the same weights alone and inside the whole.
    """
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            if name.rsplit(".", 1)[-1].endswith("bias"):
                parameter.zero_()
            continue
        generator = generator_for(seed, prefix + name)
        if std:
            drawn = torch.randn(parameter.shape, generator=generator) * std
        else:
            bound = parameter[0].numel() ** -0.5
            drawn = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
        parameter.copy_(drawn)
