"""The Qwen2.5 decoder, with attention left to the caller.

Parameter names equal those of transformers' `Qwen2ForCausalLM`, so published folders load as they are. The layers work
on one axis of S positions and know nothing of samples or masks: an `Attend` (attention.py) does.
Shapes: S positions, D width, H query heads and G key heads of K channels, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.attention import Attend, AttentionPlan
from unicom_dist.models.head import LanguageHead
from unicom_dist.models.init import initialise
from unicom_dist.models.layers import GatedMlp, RMSNorm, rotary_angles, rotate
from unicom_dist.models.segments import Segment

INITIAL_STD = 0.02  # Qwen2's initializer_range


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k and v."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden // config.heads
        self.q_proj = nn.Linear(config.hidden, config.heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(config.heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int) -> Tensor:
        """[S, D] -> [S, D]; cos and sin [S, K]."""
        query = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        key = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int) -> Tensor:
        """[S, D] -> [S, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, layer)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm (`model.` in the published names)."""

    def __init__(self, config: PriorConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)

    def forward(self, x: Tensor, rope_positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [S, D] after the final norm, from input vectors [S, D] at `rope_positions` [S]."""
        cos, sin = rotary_angles(rope_positions, self.config.hidden // self.config.heads, self.config.rope_theta)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        recompute = self.config.gradient_checkpointing and torch.is_grad_enabled()
        for number, layer in enumerate(self.layers):
            if recompute:
                x = checkpoint(layer, x, cos, sin, attend, number, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend, number)
        hidden: Tensor = self.norm(x)
        return hidden


class Qwen2(nn.Module):
    """Qwen2.5 with its language head. `seed` alone decides the initial weights."""

    def __init__(self, config: PriorConfig, vocab_size: int, seed: int = 0, prefix: str = "") -> None:
        super().__init__()
        self.model = Decoder(config, vocab_size)
        self.lm_head = LanguageHead(config.hidden, vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        initialise(self, seed, INITIAL_STD, prefix)

    def forward(self, token_ids: Tensor, rope_positions: Tensor, segments: list[Segment]) -> Tensor:
        """Logits [S, V] of a packing of text alone: token_ids and rope_positions [S]."""
        x = self.model.embed_tokens(token_ids)
        plan = AttentionPlan.build(segments, x.dtype, x.device)
        return self.lm_head.logits(self.model(x, rope_positions, plan))
