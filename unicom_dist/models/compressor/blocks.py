"""From C to E channels, token by token or with self-attention among the tokens of an image.

Blocks do not know how images are laid out: they take tokens [..., n, C] and an `Attend`, by which the tokens of an
image read each other, in rows of a padded batch or end to end.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import CompressorConfig
from unicom_dist.models.layers import attend

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value [..., n, H, K] -> [..., n, H, K]


def hidden(mask: Tensor | None) -> Tensor | None:
    """Where padding is [B, n] (mask [B, n], True = real); None when there is none, as far as no GPU has to be asked."""
    return None if mask is None or (mask.device.type == "cpu" and bool(mask.all())) else ~mask


def padding_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Attention bias [B, 1, 1, n] that hides padding (mask [B, n], True = real); None when there is none to hide."""
    padding = hidden(mask)
    if padding is None:
        return None
    return torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill_(padding, -1e9)[:, None, None]


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, n, C] with zeros for padding, whatever was there: a bias in attention does not hide what is not finite."""
    padding = hidden(mask)
    return x if padding is None else x.masked_fill(padding[..., None], 0)


def within_rows(mask: Tensor | None) -> Attend:
    """Every row [n, ...] of a batch is an image; padding is not seen."""

    def look(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return attend(query, key, value, padding_bias(mask, query.dtype)).transpose(1, 2)

    return look


def within_images(lengths: Sequence[int]) -> Attend:
    """Images of so many tokens lie end to end [T, ...]: block-diagonal attention, nothing padded."""

    def look(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if len(set(lengths)) <= 1:
            rows = (part.view(len(lengths), -1, *part.shape[1:]) for part in (query, key, value))
            return within_rows(None)(*rows).flatten(0, 1)
        images = zip(*(torch.split(part, list(lengths)) for part in (query, key, value)), strict=True)
        return torch.cat([within_rows(None)(*(part[None] for part in image))[0] for image in images])

    return look


def check_heads(config: CompressorConfig, encoder_channels: int) -> None:
    """ConfigError unless the heads divide every attention of compressor and decompressor; names the numbers that do."""
    wide = config.expanded or encoder_channels
    widths: set[int] = set()  # of queries
    if config.kind == "attention":
        widths = {config.attention_width or max(config.channels, channels) for channels in (encoder_channels, wide)}
    if config.spatial == "resampler":
        widths.add(config.attention_width or encoder_channels)
    if any(width % config.heads for width in widths):
        legal = [n for n in range(1, min(*widths, 64) + 1) if not any(width % n for width in widths)]
        raise ConfigError(
            f"codec.compressor.heads = {config.heads}",
            f"so many heads do not divide the attention's {' and '.join(map(str, sorted(widths)))} channels",
            f"codec.compressor.heads one of {legal}, or another codec.compressor.attention_width",
        )


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
        self.heads, self.outputs = heads, outputs
        self.qkv = nn.Linear(inputs, 3 * width, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(outputs if self.average else width, outputs)

    def forward(self, x: Tensor, look: Attend) -> Tensor:
        """[..., n, C] -> [..., n, E]."""
        query, key, value = self.qkv(x).chunk(3, -1)
        query, value = query + self.query_bias, value + self.value_bias
        mixed = look(*(part.unflatten(-1, (self.heads, -1)) for part in (query, key, value)))
        if self.average:
            mixed = F.adaptive_avg_pool1d(mixed.mean(-2), self.outputs)
        else:
            mixed = mixed.flatten(-2)
        out: Tensor = self.out(mixed)
        return out


class AttentionBlock(nn.Module):
    """A parallel linear path and attention, then a gated MLP of `ratio` times the output width (0 = none)."""

    def __init__(self, inputs: int, outputs: int, heads: int, width: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.straight = nn.Linear(inputs, outputs)
        self.attention = Projection(inputs, outputs, heads, width)
        inner = round(ratio * outputs)
        self.mlp_norm = nn.LayerNorm(outputs) if inner else None
        self.mlp_in = nn.Linear(outputs, 2 * inner) if inner else None
        self.mlp_out = nn.Linear(inner, outputs) if inner else None

    def forward(self, x: Tensor, look: Attend) -> Tensor:
        """[..., n, C] -> [..., n, E]."""
        x = self.norm(x)
        x = self.straight(x) + self.attention(x, look)
        if self.mlp_norm is None or self.mlp_in is None or self.mlp_out is None:
            return x
        gate, value = self.mlp_in(self.mlp_norm(x)).chunk(2, -1)
        out: Tensor = x + self.mlp_out(F.gelu(gate) * value)
        return out


class MlpBlock(nn.Module):
    """Each token alone: LN, Linear, GELU, Linear; the hidden width is `ratio` times the output width."""

    def __init__(self, inputs: int, outputs: int, ratio: float) -> None:
        super().__init__()
        inner = max(1, round(ratio * outputs))
        self.norm = nn.LayerNorm(inputs)
        self.mlp_in = nn.Linear(inputs, inner)
        self.mlp_out = nn.Linear(inner, outputs)

    def forward(self, x: Tensor, look: Attend) -> Tensor:
        """[..., n, C] -> [..., n, E]; tokens do not `look` at each other."""
        out: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.norm(x))))
        return out
