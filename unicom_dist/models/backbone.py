"""The Qwen2.5 decoder, with attention left to the caller.

Parameter names equal those of transformers' `Qwen2ForCausalLM`, so published folders load as they are. The layers work
on one axis of S positions and know nothing of samples or masks: an `Attend` (attention.py) does. A `Part` of the model
holds some of its layers under the names they have in the whole.
Shapes: S positions, D width, H query heads and G key heads of K channels, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unicom_dist.config.layout import Recompute
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.attention import Attend, AttentionPlan
from unicom_dist.models.head import LanguageHead
from unicom_dist.models.init import fill, initial
from unicom_dist.models.kept import Kept, recomputed_whole
from unicom_dist.models.layers import GatedMlp, RMSNorm, rotary_angles, rotate
from unicom_dist.models.segments import Segment

INITIAL_STD = 0.02  # Qwen2's initializer_range


@dataclass(frozen=True)
class Part:
    """What one rank of a pipeline holds: `layers[c]` are the layers of its chunk c; no ranges mean all layers.

    first: the embedding and the ways in of the images, before chunk 0. last: the norm and the heads, after the last.
    """

    first: bool = True
    last: bool = True
    layers: tuple[range, ...] = ()

    def chunks(self, layers: int) -> tuple[range, ...]:
        """The layers of each chunk, in a model of so many."""
        return self.layers or (range(layers),)


WHOLE = Part()


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k and v; with `qk_norm` every head of q and k is normalised."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden // config.heads
        self.q_proj = nn.Linear(config.hidden, config.heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(config.heads * self.head_dim, config.hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries [S, H K], keys and values [S, G K] of x [S, D]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int) -> Tensor:
        """[S, D] -> [S, D]; cos and sin [S, K]."""
        query, key, value = (projected.view(len(projected), -1, self.head_dim) for projected in self.qkv(x))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, key, cos, sin)
        out: Tensor = self.o_proj(attend(layer, query, key, value).flatten(-2))
        return out


class Layer(nn.Module):
    """Attention and gated MLP, each after a norm and added to the stream."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMlp(config.hidden, config.ffn)
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int, selective: bool = False
    ) -> Tensor:
        """[S, D] -> [S, D]. `selective`: norms and the MLP's activation are computed again in the backward pass."""
        kept = Kept(selective)
        normed = self.input_layernorm(x, kept)
        with kept:
            x = x + self.self_attn(normed, cos, sin, attend, layer)
        kept = Kept(selective)
        normed = self.post_attention_layernorm(x, kept)
        with kept:
            out: Tensor = x + self.mlp(normed, selective)
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm (`model.` in the published names), or a part of them."""

    def __init__(self, config: PriorConfig, vocab_size: int, part: Part = WHOLE) -> None:
        super().__init__()
        self.config, self.part = config, part
        self.chunks = part.chunks(config.layers)
        self.recompute: Recompute = "full" if config.gradient_checkpointing else "none"
        if part.first:
            self.embed_tokens = nn.Embedding(vocab_size, config.hidden)
        self.layers = nn.ModuleDict({str(number): Layer(config) for chunk in self.chunks for number in chunk})
        if part.last:
            self.norm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor, rope_positions: Tensor, attend: Attend, chunk: int = 0) -> Tensor:
        """[S, D] -> [S, D] through the layers of a chunk at `rope_positions` [S]; after the last, the final norm."""
        cos, sin = rotary_angles(rope_positions, self.config.hidden // self.config.heads, self.config.rope_theta)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        recompute = self.recompute == "full" and torch.is_grad_enabled()
        selective = self.recompute == "selective"
        for number in self.chunks[chunk]:
            layer = self.layers[str(number)]
            if recompute:
                x = checkpoint(layer, x, cos, sin, attend, number, use_reentrant=False, context_fn=recomputed_whole)
            else:
                x = layer(x, cos, sin, attend, number, selective)
        return self.norm(x) if self.ends(chunk) else x

    def ends(self, chunk: int) -> bool:
        """Whether the chunk is the end of the model."""
        return self.part.last and chunk == len(self.chunks) - 1


class Qwen2(nn.Module):
    """Qwen2.5 with its language head, or a part of it. `seed` alone decides the initial weights.

    A tied head is the embedding itself where both are held; a part with the head alone has a copy.
    """

    def __init__(
        self, config: PriorConfig, vocab_size: int, seed: int = 0, prefix: str = "", part: Part = WHOLE
    ) -> None:
        super().__init__()
        self.model = Decoder(config, vocab_size, part)
        if part.last:
            self.lm_head = LanguageHead(config.hidden, vocab_size)
            if config.tie_embeddings and part.first:
                self.lm_head.weight = self.model.embed_tokens.weight
        fill(self, partial(initial, seed=seed, std=INITIAL_STD), prefix)

    def forward(self, token_ids: Tensor, rope_positions: Tensor, segments: list[Segment]) -> Tensor:
        """Logits [S, V] of a packing of text alone: token_ids and rope_positions [S]."""
        x = self.model.embed_tokens(token_ids)
        plan = AttentionPlan.build(segments, x.dtype, x.device)
        return self.lm_head.logits(self.model(x, rope_positions, plan))
