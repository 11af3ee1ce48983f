"""How the ranks share Transfusion: the one place that says so (the model's own files read as for one process).

Tensor parallelism after Megatron-LM (arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198): within a layer
attention is shared by heads and the MLP by channels, the vocabulary by tokens; norms and the image towers are held
whole. Between the layers every rank has its own positions; the heads see all positions of the region on every rank.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.backbone import WHOLE, Attention, Part
from unicom_dist.models.init import fill
from unicom_dist.models.layers import GatedMlp
from unicom_dist.models.share import Share
from unicom_dist.models.transfusion import Transfusion, initial_weight
from unicom_dist.parallel.engine import pieces_of
from unicom_dist.parallel.megatron import ColumnParallel
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.tensor import (
    Column,
    Declaration,
    Headwise,
    Positionwise,
    Row,
    Vocabulary,
    VocabularyHead,
    materialise,
    shard,
)

EMBEDDING = "backbone.model.embed_tokens.weight"
LAYER = "backbone.model.layers.*"
Model = TypeVar("Model", bound=Transfusion)


class FusedAttention(Attention):
    """Attention on a rank's heads: q, k and v are one product."""

    qkv_proj: ColumnParallel

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """See `Attention`."""
        products: tuple[Tensor, ...] = self.qkv_proj(x)
        return products


class FusedMlp(GatedMlp):
    """The MLP on a rank's channels: gate and up are one product."""

    gate_up_proj: ColumnParallel

    def gate_up(self, x: Tensor) -> tuple[Tensor, ...]:
        """See `GatedMlp`."""
        products: tuple[Tensor, ...] = self.gate_up_proj(x)
        return products


def declarations(config: PriorConfig) -> list[Declaration]:
    """Every module that the ranks share; the flow head, which no line names, all ranks compute alike."""
    heads = (("q_proj", config.heads), ("k_proj", config.kv_heads), ("v_proj", config.kv_heads))
    channels = (("gate_proj", config.ffn), ("up_proj", config.ffn))
    return [
        Vocabulary("backbone.model.embed_tokens"),
        Column(f"{LAYER}.self_attn", heads, "qkv_proj", FusedAttention),
        Headwise(f"{LAYER}.self_attn.[qk]_norm"),
        Row(f"{LAYER}.self_attn.o_proj"),
        Column(f"{LAYER}.mlp", channels, "gate_up_proj", FusedMlp),
        Row(f"{LAYER}.mlp.down_proj"),
        Positionwise(f"{LAYER}.input_layernorm"),
        Positionwise(f"{LAYER}.post_attention_layernorm"),
        Positionwise("backbone.model.norm"),
        VocabularyHead("backbone.lm_head"),
        Positionwise("latent_in"),
        Positionwise("time"),
        Positionwise("connector"),
        Positionwise("compressor"),  # on whole images, but its gradient comes through the rank's own positions
        Positionwise("reconstruct"),
    ]


def outline(
    config: PriorConfig, vocab_size: int, latent_channels: int, feature_channels: int, mesh: Mesh, part: Part = WHOLE
) -> Transfusion:
    """This rank's part and shard on the meta device: parameters with shapes and `pieces`, but no memory yet."""
    return outlined(partial(Transfusion, config, vocab_size, latent_channels, feature_channels, part=part), mesh)


def outlined(build: Callable[[], Model], mesh: Mesh) -> Model:
    """`outline` of what `build` makes: a Transfusion or a kind of it, of which it may be a part."""
    with torch.device("meta"):
        module = build()
        shard(module, declarations(module.config), mesh)
    config, part = module.config, module.part
    if config.tie_embeddings and part.first != part.last:
        copy = module.backbone.get_parameter("model.embed_tokens.weight" if part.first else "lm_head.weight")
        copy.pieces = [  # type: ignore[attr-defined]
            replace(piece, name=EMBEDDING, sum_over="tied", owner=piece.owner and part.first)
            for piece in pieces_of(EMBEDDING, copy, tuple(copy.shape))
        ]
    if mesh.layout.recompute != "none":
        module.backbone.model.recompute = mesh.layout.recompute
    module.share = Share(mesh)
    return module


def build_transfusion(
    config: PriorConfig,
    vocab_size: int,
    latent_channels: int,
    feature_channels: int,
    seed: int,
    mesh: Mesh,
    part: Part = WHOLE,
) -> Transfusion:
    """This rank's part and shard with its initial weights: those of the whole model, cut.

    In memory are never more than the rank's own weights and one tensor of the whole model.
    """
    module = outline(config, vocab_size, latent_channels, feature_channels, mesh, part)
    materialise(module)
    fill(module, partial(initial_weight, seed=seed))
    return module
