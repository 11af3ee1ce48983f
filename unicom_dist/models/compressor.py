"""The semantic compressor and its inverse: channels narrowed or widened, tokens kept.

A block is `Linear(LN x) + SelfAttention(LN x)`, then a gated GELU MLP of LN is added. No position enters, so the map is
permutation-equivariant; tokens of one image see each other, padding is neither seen nor returned.
Shapes: B images, n tokens (padded), C channels in, E channels out.
Ref: UniTok's attention projection, as used by UniCom (arXiv 2603.10702, section 3.2 and appendix A.1).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import CompressorConfig
from unicom_dist.models.layers import attend


def padding_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Attention bias [B, 1, 1, n] that hides padding (mask [B, n], True = real); None when there is none to hide."""
    if mask is None or (mask.device.type == "cpu" and bool(mask.all())):
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -1e9)[:, None, None]


class Projection(nn.Module):
    """Self-attention from C to E channels.

    With `width` = 0 this is UniTok's form: q, k and v have the wider of both widths; when narrowing, heads are averaged
    and their channels pooled to E, when widening they are concatenated. With an explicit width it is ordinary
    multi-head attention of that width. Queries and values have biases, keys have none (it would cancel in the softmax).
    """

    def __init__(self, inputs: int, outputs: int, heads: int, width: int) -> None:
        super().__init__()
        self.average = width == 0 and outputs < inputs
        width = width or max(inputs, outputs)
        if width % heads:
            legal = [n for n in range(1, min(width, 64) + 1) if width % n == 0]
            raise ConfigError(
                f"codec.compressor.heads = {heads}",
                f"the attention is {width} channels wide, which {heads} heads do not divide",
                f"codec.compressor.heads one of {legal}, or another codec.compressor.attention_width",
            )
        self.heads, self.outputs = heads, outputs
        self.qkv = nn.Linear(inputs, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(outputs if self.average else width, outputs)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, n, C] -> [B, n, E]; bias [B, 1, 1, n]."""
        query, key, value = self.qkv(x).chunk(3, -1)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (query + self.query_bias, key, value + self.value_bias)
        )
        mixed = attend(query, key, value, bias)
        if self.average:
            mixed = F.adaptive_avg_pool1d(mixed.mean(1), self.outputs)
        else:
            mixed = mixed.transpose(1, 2).flatten(-2)
        out: Tensor = self.out(mixed)
        return out


class AttentionBlock(nn.Module):
    """A parallel linear path and attention, then a gated MLP of `ratio` times the output width (0 = none)."""

    def __init__(self, inputs: int, outputs: int, heads: int, width: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.straight = nn.Linear(inputs, outputs)
        self.attention = Projection(inputs, outputs, heads, width)
        hidden = round(ratio * outputs)
        self.mlp_norm = nn.LayerNorm(outputs) if hidden else None
        self.mlp_in = nn.Linear(outputs, 2 * hidden) if hidden else None
        self.mlp_out = nn.Linear(hidden, outputs) if hidden else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, n, C] -> [B, n, E]."""
        x = self.norm(x)
        x = self.straight(x) + self.attention(x, padding_bias(mask, x.dtype))
        if self.mlp_norm is None or self.mlp_in is None or self.mlp_out is None:
            return x
        gate, value = self.mlp_in(self.mlp_norm(x)).chunk(2, -1)
        out: Tensor = x + self.mlp_out(F.gelu(gate) * value)
        return out


class MlpBlock(nn.Module):
    """Each token alone: LN, Linear, GELU, Linear; the hidden width is `ratio` times the output width."""

    def __init__(self, inputs: int, outputs: int, ratio: float) -> None:
        super().__init__()
        hidden = max(1, round(ratio * outputs))
        self.norm = nn.LayerNorm(inputs)
        self.mlp_in = nn.Linear(inputs, hidden)
        self.mlp_out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, n, C] -> [B, n, E]; `mask` matters only to the caller, tokens do not meet."""
        out: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.norm(x))))
        return out


class Projector(nn.Module):
    """One block of the configured kind from `inputs` to `outputs` channels. Padded tokens come out as zeros."""

    def __init__(self, config: CompressorConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block: AttentionBlock | MlpBlock | None
        if config.kind == "attention":
            width = config.attention_width
            self.block = AttentionBlock(inputs, outputs, config.heads, width, config.mlp_ratio)
        elif config.kind == "mlp":
            self.block = MlpBlock(inputs, outputs, config.mlp_ratio)
        elif inputs == outputs:
            self.block = None
        else:
            raise ConfigError(
                f"codec.compressor.kind = identity with {inputs} channels in and {outputs} out",
                "an identity keeps the channels as they are",
                f"codec.compressor.channels = {inputs} and codec.compressor.expanded = 0, or kind = attention",
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, n, inputs] -> [B, n, outputs]; mask [B, n], True = a real token."""
        if self.block is not None:
            x = self.block(x, mask)
        return x if mask is None else x * mask[..., None]


class Compressor(Projector):
    """Encoder tokens of `in_channels` to latents of `config.channels`."""

    def __init__(self, config: CompressorConfig, in_channels: int) -> None:
        super().__init__(config, in_channels, config.channels)


class Decompressor(Projector):
    """Latents back to `config.expanded` channels (or the encoder's), for the decoder to read."""

    def __init__(self, config: CompressorConfig, out_channels: int) -> None:
        super().__init__(config, config.channels, config.expanded or out_channels)
