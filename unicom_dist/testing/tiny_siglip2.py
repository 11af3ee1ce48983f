"""A published SigLIP2 in miniature: text and vision tower in one folder, as `save_pretrained` writes it."""

from pathlib import Path

import torch

from unicom_dist.models.diffusers_classes import diffusers_class


def write_tiny_siglip2(folder: Path, patch_px: int = 8) -> Path:
    """Random weights, 32 channels, two layers; patches of `patch_px` pixels a side. Returns `folder`."""
    diffusers_class("FluxTransformer2DModel")  # hides a torchvision that does not fit this torch
    from transformers import Siglip2Config, Siglip2Model

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tower | {"num_patches": 16, "patch_size": patch_px}
    text = tower | {"vocab_size": 64, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    Siglip2Model(Siglip2Config(vision_config=vision, text_config=text)).save_pretrained(folder)
    return folder
