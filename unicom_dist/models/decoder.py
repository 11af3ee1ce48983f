"""The diffusion decoder: diffusers' FLUX transformer, reading semantic tokens where FLUX reads text.

It draws pixels or a VAE's latents (`target.py`). Weights and blocks are `FluxTransformer2DModel`'s own, so published
FLUX folders fit. The loop over the blocks is ours: it gives each image its own token positions and padding.
Shapes: B images of [c, h, w] in the target space, P patches of c p p values, n semantic tokens of E channels, K
channels per head.
Time: ours has t = 1 at the data; FLUX has sigma = 0 there and predicts noise - data. `to_flux` and `from_flux` convert.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unicom_dist.config.schema import DecoderConfig
from unicom_dist.models.compressor import padding_bias
from unicom_dist.models.decoder_training import add_adapters, train_chosen
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.models.flux_attention import FastFluxAttention, angles
from unicom_dist.models.patches import patchify, token_under_patch, unpatchify

LEAST_REMAINING = 0.1  # bounds 1 / (1 - t) where a clean prediction is turned into a velocity
THOUSAND = 1000.0  # FLUX embeds 1000 sigma and 1000 times the guidance


def to_flux(t: Tensor) -> Tensor:
    """Our time to FLUX's: sigma = 1 - t."""
    return 1 - t


def from_flux(output: Tensor, z_t: Tensor, t: Tensor, prediction: str) -> Tensor:
    """The network's output in our convention.

    `velocity`: the network predicts noise - data, so v = -output. `clean`: it predicts the data, so
    v = (output - z_t) / max(1 - t, 0.1). Shapes: output and z_t [B, ...], t [B].
    """
    if prediction == "velocity":
        return -output
    remaining = (1 - t).clamp_min(LEAST_REMAINING).reshape((-1,) + (1,) * (z_t.dim() - 1))
    return (output - z_t) / remaining


def projection(config: DecoderConfig, token_channels: int) -> nn.Module | None:
    """From tokens to where FLUX reads text; None where it reads them as they are. `mlp` Ref: UniWorld-V1."""
    width = config.text_channels
    if not width:
        return None
    if config.projector == "linear":
        return nn.Linear(token_channels, width)
    return nn.Sequential(nn.Linear(token_channels, 3 * width), nn.SiLU(), nn.Linear(3 * width, width))


class DiffusionDecoder(nn.Module):
    """Velocity in the target space given semantic tokens of `token_channels`.

    Parameters that `config.trainable` does not name are frozen. ConfigError: it names none.
    """

    def __init__(self, config: DecoderConfig, token_channels: int) -> None:
        super().__init__()
        self.config = config
        patch = (config.vae_channels if config.space == "vae" else 3) * config.patch_px**2
        self.projector = projection(config, token_channels)
        zeros = torch.zeros(config.pooled_channels)
        self.pooled = nn.Parameter(zeros, requires_grad=False) if config.pooled_path else None
        self.flux: Any = diffusers_class("FluxTransformer2DModel")(
            patch_size=1,
            in_channels=patch + (token_channels if config.concat_tokens else 0),
            out_channels=patch,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=config.text_channels or token_channels,
            pooled_projection_dim=config.pooled_channels,
            guidance_embeds=config.guidance_embeds,
            axes_dims_rope=config.rope_axes,
        )
        self.flux.set_attn_processor(FastFluxAttention())
        if config.trainable == "lora":
            add_adapters(self.flux, config)
        train_chosen(self, config)

    def reset(self) -> None:
        """Blocks start as identities and the output at zero (adaLN-zero); call after drawing the weights."""
        for name, module in self.flux.named_modules():
            if ".lora_B." in name:
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear) and (name == "proj_out" or name.endswith((".linear", "norm.linear"))):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def angles(self, grid: Tensor, mask: Tensor | None, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B, n + P, 1, K] float32. Tokens sit where their part of the image is, or at 0."""
        batch, device = grid.shape[0], grid.device
        places = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device)).float()
        if self.config.token_positions == "grid":
            seen = grid if mask is None else grid * mask[..., None]
            extent = seen.amax(1, keepdim=True) + 1 if grid.shape[1] else grid.new_ones(batch, 1, 2)
            scale = torch.tensor([rows, columns], device=device) / extent
            tokens = (grid + 0.5) * scale - 0.5
        else:
            tokens = grid.new_zeros(grid.shape).float()
        return angles(torch.cat([tokens, places.expand(batch, -1, -1)], 1), self.config.rope_axes)

    def embedded(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, D]: time t [B], and the constants that FLUX takes beside it."""
        batch = t.shape[0]
        pooled = (
            t.new_zeros(batch, self.config.pooled_channels) if self.pooled is None else self.pooled.expand(batch, -1)
        )
        inputs = [to_flux(t.float()) * THOUSAND, pooled.to(dtype)]
        if self.config.guidance_embeds:
            inputs.insert(1, torch.full_like(inputs[0], self.config.guidance * THOUSAND))
        out: Tensor = self.flux.time_text_embed(*inputs)
        return out

    def predict(self, z_t: Tensor, t: Tensor, tokens: Tensor, grid: Tensor, mask: Tensor | None = None) -> Tensor:
        """The network's own output [B, c, h, w] (FLUX velocity, or the clean image); arguments as `forward`."""
        flux, patch = self.flux, self.config.patch_px
        dtype = next(flux.parameters()).dtype  # reading a module's own weight here, ZeRO 3 would gather it by itself
        height, width = z_t.shape[-2:]
        patches = patchify(z_t.to(dtype), patch)
        tokens = tokens.to(dtype)
        if self.config.concat_tokens:
            place = token_under_patch(grid, height // patch, width // patch)
            under = tokens.gather(1, place[..., None].expand(-1, -1, tokens.shape[-1]))
            patches = torch.cat([patches, under], -1)
        image = flux.x_embedder(patches)
        embedded = self.embedded(t, dtype)
        tokens = flux.context_embedder(tokens if self.projector is None else self.projector(tokens))
        cos, sin = self.angles(grid, mask, height // patch, width // patch)
        rotary = cos.to(dtype), sin.to(dtype)
        bias = padding_bias(mask, dtype)
        extra = {"attention_mask": None if bias is None else F.pad(bias, (0, image.shape[1]))}
        for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                tokens, image = checkpoint(block, image, tokens, embedded, rotary, extra, use_reentrant=False)
            else:
                tokens, image = block(image, tokens, embedded, rotary, extra)
        return unpatchify(flux.proj_out(flux.norm_out(image, embedded)), patch, height, width)

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor, grid: Tensor, mask: Tensor | None = None) -> Tensor:
        """Velocity [B, c, h, w] float32 in our convention.

        z_t [B, c, h, w] noised target, t [B] with 1 = data, tokens [B, n, E], grid [B, n, 2] their (row, column), mask
        [B, n] True = a real token.
        """
        output = self.predict(z_t, t, tokens, grid, mask).float()
        return from_flux(output, z_t.float(), t.float(), self.config.prediction)
