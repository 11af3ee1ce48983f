"""The pixel decoder: diffusers' FLUX transformer over pixel patches, reading semantic tokens where FLUX reads text.

Weights and blocks are `FluxTransformer2DModel`'s own, so published FLUX folders fit. The loop over the blocks is ours:
it gives each image its own token positions and padding, and attends by the fast path of `layers.attend`.
Shapes: B images [3, H, W], P patches of 3 p p values, n semantic tokens of E channels, K channels per head.
Time: ours has t = 1 at the data; FLUX has sigma = 0 there and predicts noise - data. `to_flux` and `from_flux` convert.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unicom_dist.config.schema import DecoderConfig
from unicom_dist.models.compressor import padding_bias
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.models.layers import attend

LEAST_REMAINING = 0.1  # bounds 1 / (1 - t) where a clean prediction is turned into a velocity
POOLED = 8  # FLUX's pooled text vector; ours is constant zeros, its width is immaterial
ROPE_THETA = 10_000.0


def flux_class() -> Any:
    """`diffusers.FluxTransformer2DModel`."""
    return diffusers_class("FluxTransformer2DModel")


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


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B, H/p W/p, 3 p p], channel-major inside a patch as FLUX packs its latents."""
    batch, channels, height, width = images.shape
    cut = images.view(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify`."""
    cut = patches.view(patches.shape[0], height // patch, width // patch, -1, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, height, width)


def token_under_patch(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Index [B, rows columns] of the token that covers each patch; grid [B, n, 2] in row-major order, padding zero."""
    extent = grid.amax(1) + 1  # [B, 2] token rows and columns
    row = (torch.arange(rows, device=grid.device) + 0.5) / rows * extent[:, :1]
    column = (torch.arange(columns, device=grid.device) + 0.5) / columns * extent[:, 1:]
    return (row.long()[:, :, None] * extent[:, 1, None, None] + column.long()[:, None, :]).flatten(1)


class FastFluxAttention:
    """FLUX's joint attention through `layers.attend`, with angles and padding per image; a diffusers processor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Image [B, P, D] (and tokens [B, n, D] in double blocks); bias [B, 1, 1, n+P]; cos, sin [B, n+P, 1, K]."""
        assert image_rotary_emb is not None
        cos, sin = image_rotary_emb
        streams = [(attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k, hidden_states)]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
            streams.insert(0, (*added, encoder_hidden_states))
        parts = [
            (norm_q(to_q(x).unflatten(-1, (attn.heads, -1))), norm_k(to_k(x).unflatten(-1, (attn.heads, -1))), to_v(x))
            for to_q, to_k, to_v, norm_q, norm_k, x in streams
        ]
        query, key, value = (torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        value = value.unflatten(-1, (attn.heads, -1))
        mixed = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attention_mask)
        mixed = mixed.transpose(1, 2).flatten(-2)
        if encoder_hidden_states is None:
            return mixed
        tokens, image = mixed.tensor_split([encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](image), attn.to_add_out(tokens)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """FLUX's rotary form on x [B, L, H, K]: neighbouring channels are a pair; cos and sin [B, L, 1, K] in x's dtype."""
    swapped = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * cos + swapped * sin


class PixelDecoder(nn.Module):
    """Velocity of pixels given semantic tokens of `token_channels`."""

    def __init__(self, config: DecoderConfig, token_channels: int) -> None:
        super().__init__()
        self.config = config
        self.flux = flux_class()(
            patch_size=1,
            in_channels=3 * config.patch_px**2 + (token_channels if config.concat_tokens else 0),
            out_channels=3 * config.patch_px**2,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=token_channels,
            pooled_projection_dim=POOLED,
            guidance_embeds=False,
            axes_dims_rope=config.rope_axes,
        )
        self.flux.set_attn_processor(FastFluxAttention())

    def reset(self) -> None:
        """Blocks start as identities and the output at zero (adaLN-zero); call after drawing the weights."""
        for name, module in self.flux.named_modules():
            if isinstance(module, nn.Linear) and (name == "proj_out" or name.endswith((".linear", "norm.linear"))):
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
        ids = torch.cat([tokens, places.expand(batch, -1, -1)], 1)
        ids = F.pad(ids, (1, 0))  # FLUX's first axis is unused
        waves = []
        for axis, width in enumerate(self.config.rope_axes):
            rates = ROPE_THETA ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
            waves.append((ids[..., axis, None] * rates).repeat_interleave(2, -1))
        angle = torch.cat(waves, -1)[:, :, None]
        return angle.cos(), angle.sin()

    def predict(self, z_t: Tensor, t: Tensor, tokens: Tensor, grid: Tensor, mask: Tensor | None = None) -> Tensor:
        """The network's own output [B, 3, H, W] (FLUX velocity, or the clean image); arguments as `forward`."""
        flux, patch = self.flux, self.config.patch_px
        dtype = flux.x_embedder.weight.dtype
        height, width = z_t.shape[-2:]
        patches = patchify(z_t.to(dtype), patch)
        if self.config.concat_tokens:
            place = token_under_patch(grid, height // patch, width // patch)
            under = tokens.to(dtype).gather(1, place[..., None].expand(-1, -1, tokens.shape[-1]))
            patches = torch.cat([patches, under], -1)
        image = flux.x_embedder(patches)
        pooled = image.new_zeros(image.shape[0], POOLED)
        embedded = flux.time_text_embed(to_flux(t.float()) * 1000, pooled)
        tokens = flux.context_embedder(tokens.to(dtype))
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
        """Velocity [B, 3, H, W] float32 in our convention.

        z_t [B, 3, H, W] noised pixels in [-1, 1] terms, t [B] with 1 = data, tokens [B, n, E], grid [B, n, 2] their
        (row, column), mask [B, n] True = a real token.
        """
        output = self.predict(z_t, t, tokens, grid, mask).float()
        return from_flux(output, z_t.float(), t.float(), self.config.prediction)
