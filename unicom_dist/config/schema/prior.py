"""The Transfusion backbone."""

import math
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from unicom_dist.config.schema.base import Fraction, Section, Unworkable, divisors, multiples

GUIDE_HEAD = 64  # channels of an attention head in the layers of a guide


class PriorConfig(Section):
    """The Transfusion backbone (Qwen2.5 architecture) and its flow head."""

    init_from: str = Field("", description="folder of published Qwen2.5 weights, or of a vision-language model around a Qwen2.5; empty = random initialisation")
    tokenizer: str = Field("assets/qwen2.5-tokenizer", description="folder of the Qwen2.5 tokenizer")
    vocabulary: Literal["full", "trimmed"] = Field("full", description="`trimmed` keeps the ids of the training captions and all single bytes")
    vocabulary_pictures: PositiveInt = Field(1, description="trimmed: a token is kept when the texts of this many pictures use it, else spelled by smaller ones")
    hidden: PositiveInt = Field(896, description="model width")
    layers: PositiveInt = Field(24, description="decoder blocks")
    heads: PositiveInt = Field(14, description="query heads")
    kv_heads: PositiveInt = Field(2, description="key-value heads; divides `heads`")
    ffn: PositiveInt = Field(4864, description="width of the gated MLP")
    rope_theta: float = Field(1e6, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of the RMS norms")
    tie_embeddings: bool = Field(True, description="the output head is the embedding, transposed")
    max_grid: PositiveInt = Field(64, description="latent rows and columns covered by the 2-D position table")
    understanding: Literal["raw", "dim_concat", "seq_concat"] = Field(
        "raw", description="what an image that is read enters as: encoder features; these with the latents beside them in channels; features, then latents, as twice the positions"
    )
    positions: Literal["shared", "rope2d"] = Field(
        "shared", description="of an image's positions: one rotary position and a frozen 2-D table added (BAGEL), or rotary rows and columns (HunyuanImage 3.0)"
    )
    time_injection: Literal["add", "token"] = Field("add", description="how an image being denoised learns t: added to every latent (BAGEL), or a position of its own before them (Show-o2)")
    prediction: Literal["velocity", "edm"] = Field(
        "velocity", description="what the flow head outputs: the velocity, or what the best linear guess of it leaves, at variance 1 (EDM's preconditioning); a small model learns faster from that"
    )
    qk_norm: bool = Field(False, description="RMSNorm of queries and keys, head by head; Qwen2.5 has none, so with init_from its gains start at 1")
    timestep: Literal["uniform", "logit-normal"] = Field("uniform", description="how t is drawn in training")
    timestep_shift: float = Field(1.0, gt=0, description="as codec.timestep_shift")
    resolution_shift: bool = Field(False, description="instead of timestep_shift: s = sqrt(n d / 4096) for an image of n latents of d channels, as RAE")
    condition_dropout: Fraction = Field(0.1, description="share of the samples with an image to draw that are trained without the user's words")
    reference_dropout: Fraction = Field(0.1, description="share of the edits trained without the images the user shows")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")

    def read_channels(self, features: int, latents: int) -> int:
        """Channels of what the connector reads, where the encoder's features have `features`, latents `latents`."""
        return features + latents * (self.understanding == "dim_concat")

    def of_width(self, width: int) -> Self:
        """The sizes of a guide's layers (`QueryConfig`), `width` wide, with heads of 64 channels where these divide it."""
        heads = width // math.gcd(width, GUIDE_HEAD)
        return self.model_copy(update={"hidden": width, "heads": heads, "kv_heads": heads, "ffn": 4 * width, "qk_norm": False})

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise Unworkable(
                f"hidden = {self.hidden}",
                f"rotary embedding needs an even number of channels per head, and there are {self.heads} heads",
                f"use {multiples(self.hidden, 2 * self.heads)}, or another number of heads",
            )
        if self.heads % self.kv_heads:
            raise Unworkable(
                f"kv_heads = {self.kv_heads}",
                f"every key-value head serves equally many of the {self.heads} query heads",
                f"use one of {divisors(self.heads)}",
            )
        return self
