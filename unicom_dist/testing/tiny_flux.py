"""A published model in miniature: `transformer/` and `vae/` as diffusers' `save_pretrained` writes FLUX.1-dev.

Weights are random, sharded over several files, guidance input included; what a recipe says to start from it is
`tiny_flux_keys`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from unicom_dist.models.diffusers_classes import diffusers_class

VAE_CHANNELS, TEXT, POOLED = 4, 24, 12
TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4 * VAE_CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def tiny_flux(seed: int = 0) -> Any:
    """A FluxTransformer2DModel no part of which is zero."""
    return _random(diffusers_class("FluxTransformer2DModel")(**TRANSFORMER), seed)


def tiny_vae(seed: int = 0, channels: int = VAE_CHANNELS) -> Any:
    """An AutoencoderKL of 2 pixels per cell, with FLUX's kind of normalisation."""
    vae = diffusers_class("AutoencoderKL")(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.25,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return _random(vae, seed)


def write_tiny_flux(folder: Path, seed: int = 0) -> Path:
    """`folder/transformer` in several files and `folder/vae`; returns `folder`."""
    tiny_flux(seed).save_pretrained(folder / "transformer", max_shard_size="40KB")
    tiny_vae(seed).save_pretrained(folder / "vae")
    return folder


def tiny_flux_keys(folder: Path) -> dict[str, Any]:
    """`codec.decoder` of a recipe that starts from `write_tiny_flux(folder)`."""
    return {
        "space": "vae",
        "vae_path": str(folder),
        "vae_channels": VAE_CHANNELS,
        "vae_scale": 2,
        "image_px": 16,
        "patch_px": 2,
        "init_from": str(folder),
        "double_blocks": 2,
        "single_blocks": 2,
        "heads": 2,
        "head_dim": 16,
        "rope_axes": [4, 6, 6],
        "text_channels": TEXT,
        "pooled_channels": POOLED,
        "guidance_embeds": True,
        "projector": "mlp",
    }


@torch.no_grad()
def _random(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.copy_(drawn / fan_in**0.5 + (parameter.ndim == 1 and bool(parameter.all())))
    return module.eval()
