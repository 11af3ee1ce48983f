"""FLUX's joint attention by the fast path of `layers.attend`, with its own angles and padding for each image.

Shapes: B images, P patches, n semantic tokens, D width, H heads of K channels.
"""

from typing import Any

import torch
from torch import Tensor

from unicom_dist.models.layers import attend

THETA = 10_000.0


class FastFluxAttention:
    """A diffusers attention processor."""

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


def angles(places: Tensor, axes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """cos and sin [B, L, 1, K] float32 of places [B, L, 2], (row, column); K = sum of `axes`, computed in float64.

    FLUX's first axis is unused: all images are at 0 there.
    """
    waves = [places.new_zeros((*places.shape[:2], axes[0]), dtype=torch.float64)]
    for axis, width in enumerate(axes[1:]):
        rates = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64, device=places.device) / width)
        waves.append((places[..., axis, None].double() * rates).repeat_interleave(2, -1))
    angle = torch.cat(waves, -1)[:, :, None]
    return angle.cos().float(), angle.sin().float()
