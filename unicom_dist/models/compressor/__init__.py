"""The semantic compressor and its inverse: channels narrowed or widened, tokens kept or, for comparison, made fewer.

A block is `Linear(LN x) + SelfAttention(LN x)`, then a gated GELU MLP of LN is added (`blocks.py`). No position enters,
so the map is permutation-equivariant; tokens of one image see each other, padding is neither seen nor returned. Spatial
variants first make one token of each cell of 2 x 2 (`cells.py`), so that latents have a grid of their own.
Precision: all is computed in the dtype of the weights, with norms and softmax accumulated in float32 by their kernels,
and no autocast is entered anywhere. In a bfloat16 stage latents are rounded to 8 bits like every other activation; the
latents job computes in float32.
Shapes: B images, n tokens (padded), D channels in, m latents of d channels; T tokens end to end.
Ref: UniTok's attention projection, as used by UniCom (arXiv 2603.10702, section 3.2 and appendix A.1).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import CompressorConfig
from unicom_dist.models.compressor.blocks import (
    Attend,
    AttentionBlock,
    MlpBlock,
    Projection,
    check_heads,
    padding_bias,
    within_images,
    within_rows,
    without_padding,
)
from unicom_dist.models.compressor.cells import Cells, Resampler

__all__ = ["Compressor", "Decompressor", "Projection", "Projector", "Resampler", "padding_bias"]

LOG_VARIANCE = (-30.0, 20.0)  # bounds of a posterior, as in diffusers' VAEs


class Projector(nn.Module):
    """One block of the configured kind from `inputs` to `outputs` channels."""

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

    def project(self, x: Tensor, look: Attend) -> Tensor:
        """[..., inputs] -> [..., outputs]; the tokens of an image read each other by `look`."""
        return x if self.block is None else self.block(x, look)


class Compressor(Projector):
    """Encoder tokens of `in_channels` to latents of `config.channels`. ConfigError: heads that do not divide."""

    def __init__(self, config: CompressorConfig, in_channels: int) -> None:
        check_heads(config, in_channels)
        super().__init__(config, in_channels, config.channels)
        self.config = config
        learned = config.spatial == "resampler"
        self.resampler = Resampler(in_channels, config.heads, config.attention_width) if learned else None
        kl = config.bottleneck == "kl"
        self.posterior_head = nn.Linear(config.channels, 2 * config.channels) if kl else None

    def layout(self, grid: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Grid [B, m, 2] and mask [B, m] of the latents of tokens at grid [B, n, 2] with mask [B, n], True = real."""
        if self.config.spatial == "none":
            return grid, mask
        cells = Cells.of(grid, mask)
        return cells.grid, cells.mask

    def forward(self, x: Tensor, mask: Tensor | None = None, grid: Tensor | None = None) -> Tensor:
        """[B, n, D] -> [B, m, d], padding zero; of a posterior the mean. Arguments as for `posterior`."""
        return self.posterior(x, mask, grid)[0]

    def posterior(
        self, x: Tensor, mask: Tensor | None = None, grid: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mean [B, m, d], padding zero, and log variance [B, m, d], None unless the bottleneck is a posterior.

        x [B, n, D]; mask [B, n], True = a real token; grid [B, n, 2] (row, column), which spatial variants need.
        """
        x = without_padding(x, mask)
        if self.config.spatial != "none":
            assert grid is not None
            cells = Cells.of(grid, mask)
            x, mask = self._fewer(x, cells), cells.mask
        mean, log_variance = self._bottleneck(self.project(x, within_rows(mask)))
        return without_padding(mean, mask), log_variance

    def packed(self, x: Tensor, grid: Tensor, lengths: Sequence[int]) -> Tensor:
        """Latents end to end of images of `lengths` tokens end to end: x [T, D], grid [T, 2]. Nothing is padded.

        An image has `config.latent_grid` of its grid latents. Equal to `forward`.
        """
        if self.config.spatial != "none":
            cells, lengths = Cells.end_to_end(grid, lengths)
            x = self._fewer(x[None], cells)[0]
        return self._bottleneck(self.project(x, within_images(lengths)))[0]

    def _fewer(self, x: Tensor, cells: Cells) -> Tensor:
        return cells.mean(x) if self.resampler is None else self.resampler(x, cells)

    def _bottleneck(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.posterior_head is not None:
            mean, log_variance = self.posterior_head(x).chunk(2, -1)
            return mean, log_variance.clamp(*LOG_VARIANCE)
        return (x.tanh() if self.config.bottleneck == "tanh" else x), None


class Decompressor(Projector):
    """Latents back to `config.expanded` channels (or the encoder's), for the decoder to read; as many as came in."""

    def __init__(self, config: CompressorConfig, out_channels: int) -> None:
        check_heads(config, out_channels)
        super().__init__(config, config.channels, config.expanded or out_channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, m, d] -> [B, m, E], padding zero; mask [B, m], True = a real latent."""
        return without_padding(self.project(without_padding(x, mask), within_rows(mask)), mask)
