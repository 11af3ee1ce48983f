"""The query-guided pathway: a frozen transformer is asked by learnable queries what to draw, a flow decoder draws it.

M queries take the place of the image that is to be drawn: they read what the backbone read before them (text, images,
each other), and nobody reads them. Their final states pass through a connector, a bidirectional transformer, and
condition a second, trained transformer that denoises the latents. What was there of `Transfusion` stays as it is.
Ref: UniCom arXiv 2603.10702, section 3.3 (Pathway II); sizes and initial weights of the connector: MetaQuery, arXiv
2504.06256.
Shapes as in `segments.py`; I images to be drawn, F latents of theirs, h width of the backbone, w of the flow decoder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.config.schema import PriorConfig, QueryConfig
from unicom_dist.models.attention import Attend, Take
from unicom_dist.models.backbone import INITIAL_STD, Attention, Layer
from unicom_dist.models.cache import AfterPrefix, Prefix
from unicom_dist.models.init import fill, initial
from unicom_dist.models.joint import image_lengths
from unicom_dist.models.layers import GatedMlp, RMSNorm, TimeEmbedding, at_grid, grid_table, rotary_angles
from unicom_dist.models.segments import PackedBatch, Segment
from unicom_dist.models.transfusion import FlowHead, Transfusion
from unicom_dist.parallel.engine import Piece

OWN = "guide."  # the names of what this pathway adds to a Transfusion
CONNECTOR_STD = 0.014  # of the matrices of its layers
CONNECTOR_GAIN = math.sqrt(5.5)  # of its last norm: the scale at which a decoder expects its condition

Planner = Callable[[list[Segment]], Attend]  # how a packing of these segments attends


def guide_weight(piece: Piece, seed: int) -> Tensor:
    """A piece of a new guide (with its seed, a `Source`): the decoder starts as an identity whose velocity is 0."""
    if "modulation." in piece.name or piece.name.startswith("guide.decoder.head.out."):
        return torch.zeros(piece.cut)
    if piece.name == "guide.connector.norm.weight":
        return torch.full(piece.cut, CONNECTOR_GAIN)
    if piece.name.startswith("guide.queries."):
        return initial(piece, seed, INITIAL_STD)
    return initial(piece, seed, CONNECTOR_STD if piece.name.startswith("guide.connector.layers.") else 0.0)


class Queries(nn.Module):
    """M vectors of the backbone's width, no rows of its embedding: these stay as they are."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def forward(self, images: int) -> Tensor:
        """[I M, h]: all of them for each image."""
        return self.weight.repeat(images, 1)


class QueryConnector(nn.Module):
    """The queries' states to the decoder's width: bidirectional layers, Linear, GELU, Linear, norm."""

    def __init__(self, config: PriorConfig, layers: int, width: int) -> None:
        super().__init__()
        self.config = config.of_width(config.hidden)
        self.layers = nn.ModuleList(Layer(self.config) for _ in range(layers))
        self.lift = nn.Linear(config.hidden, width)
        self.act = nn.GELU()
        self.out = nn.Linear(width, width)
        self.norm = RMSNorm(width, config.norm_eps)

    def forward(self, states: Tensor, plan: Planner) -> Tensor:
        """[I, M, h] -> [I, M, w]."""
        images, count = states.shape[:2]
        positions = torch.arange(count, device=states.device).repeat(images)
        cos, sin = rotary_angles(positions, self.config.hidden // self.config.heads, self.config.rope_theta)
        attend = plan([Segment(number, "full", count) for number in range(images)])
        x = states.flatten(0, 1)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend, number)
        out: Tensor = self.norm(self.out(self.act(self.lift(x))))
        return out.view(images, count, -1)


class DecoderLayer(nn.Module):
    """A layer that time shifts, scales and gates, starting as an identity (adaLN-zero of DiT, arXiv 2212.09748)."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMlp(config.hidden, config.ffn)
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.modulation = nn.Linear(config.hidden, 6 * config.hidden)

    def forward(
        self, x: Tensor, time: Tensor, image: Tensor, cos: Tensor, sin: Tensor, attend: Attend, layer: int
    ) -> Tensor:
        """[S, w] -> [S, w]; time [I, w], image [S] the number of each position's image."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(F.silu(time))[image].chunk(6, -1)
        x = x + gate * self.self_attn(self.input_layernorm(x) * (1 + scale) + shift, cos, sin, attend, layer)
        out: Tensor = x + mlp_gate * self.mlp(self.post_attention_layernorm(x) * (1 + mlp_scale) + mlp_shift)
        return out


class FlowDecoder(nn.Module):
    """Denoises the latents of images, each beside its condition: both attend to both."""

    places: Tensor

    def __init__(self, config: PriorConfig, query: QueryConfig, latent_channels: int) -> None:
        super().__init__()
        width = query.decoder_width
        self.config = config.of_width(width)
        self.latent_in = nn.Linear(latent_channels, width)
        self.time = TimeEmbedding(width)
        self.layers = nn.ModuleList(DecoderLayer(self.config) for _ in range(query.decoder_layers))
        self.head = FlowHead(width, latent_channels, config.norm_eps)
        with torch.device("cpu"):
            self.register_buffer("places", grid_table(config.max_grid, width), persistent=False)

    def forward(
        self, condition: Tensor, z_t: Tensor, t: Tensor, grid: Tensor, lengths: Sequence[int], plan: Planner
    ) -> Tensor:
        """Velocity [F, d] of latents z_t [F, d], image by image: condition [I, M, w], t [I], grid [F, 2].

        `lengths`: latents of each image.
        """
        count, device, dtype = condition.shape[1], condition.device, condition.dtype
        latents = self.latent_in(z_t.to(dtype)) + at_grid(self.places.to(dtype), grid)
        parts = zip(condition, torch.split(latents, list(lengths)), strict=True)
        x = torch.cat(list(chain.from_iterable(parts)))
        image = torch.repeat_interleave(torch.tensor([count + length for length in lengths])).to(device)
        drawn = [torch.arange(count + length) >= count for length in lengths]
        is_latent = torch.cat(drawn).nonzero()[:, 0].to(device)
        # Queries have an order, latents share the position after them: their places are told by the table.
        positions = torch.cat([torch.arange(count + length).clamp_max(count) for length in lengths]).to(device)
        cos, sin = rotary_angles(positions, self.config.hidden // self.config.heads, self.config.rope_theta)
        cos, sin = cos.to(dtype), sin.to(dtype)
        attend = plan([Segment(number, "full", count + length) for number, length in enumerate(lengths)])
        time = self.time(t)
        for number, layer in enumerate(self.layers):
            x = layer(x, time, image, cos, sin, attend, number)
        velocity: Tensor = self.head(Take.apply(x, is_latent))  # type: ignore[no-untyped-call]
        return velocity


class Guide(nn.Module):
    """All that is trained: queries, connector, flow decoder."""

    def __init__(self, config: PriorConfig, query: QueryConfig, latent_channels: int) -> None:
        super().__init__()
        self.queries = Queries(query.queries, config.hidden)
        self.connector = QueryConnector(config, query.connector_layers, query.decoder_width)
        self.decoder = FlowDecoder(config, query, latent_channels)


@dataclass(frozen=True)
class GuidedPrefix(Prefix):
    """Prefixes and what the queries found in them; None where something was written behind them since."""

    condition: Tensor | None = None  # [P, M, w]

    def select(self, index: Tensor | Sequence[int]) -> "GuidedPrefix":
        """See `Prefix`."""
        index = torch.as_tensor(index, device=self.bias.device)
        return guided(Prefix.select(self, index), None if self.condition is None else self.condition[index])

    def first(self, count: int) -> "GuidedPrefix":
        """See `Prefix`."""
        return guided(Prefix.first(self, count), None if self.condition is None else self.condition[:count])


def guided(prefix: Prefix, condition: Tensor | None) -> GuidedPrefix:
    """The prefix, in the same buffers, with a condition."""
    values = (prefix.keys, prefix.values, prefix.bias, prefix.next_position, prefix.last_hidden, prefix.padded)
    return GuidedPrefix(*values, condition)


class QueryGuided(Transfusion):
    """A frozen Transfusion with a guide. It reads and writes as before; what it draws, the guide's decoder draws."""

    def __init__(
        self,
        config: PriorConfig,
        query: QueryConfig,
        vocab_size: int,
        latent_channels: int,
        feature_channels: int,
        seed: int = 0,
    ) -> None:
        super().__init__(config, vocab_size, latent_channels, feature_channels, seed)
        self.query = query
        self.guide = Guide(config, query, latent_channels)
        fill(self.guide, partial(guide_weight, seed=seed), OWN)

    def train_only(self, part: Literal["all", "connector"]) -> None:
        """Let the optimizer move the guide alone, whatever `part` of the transformer it might."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(OWN))

    def forward(self, batch: PackedBatch, x: Tensor | None = None, chunk: int = 0) -> tuple[Tensor, ...]:
        """As `Transfusion.forward` in one part: the cross-entropy is that of the frozen model, without gradient.

        A plan that comes with the batch is one of `query_segments`.
        """
        lengths = image_lengths(batch)
        asking, places = with_queries(batch, self.query.queries)
        queries = self.guide.queries(max(len(lengths), 1))  # also without an image, so that all ranks do the same
        text = torch.cat([self.backbone.model.embed_tokens(asking.token_ids), queries[: len(places)]])
        vectors = self.embed(replace(asking, token_index=torch.cat([asking.token_index, places])), text)
        hidden = self.backbone.model(vectors, asking.rope_positions, self.share.attend(asking, self.dtype))
        label_losses = self.backbone.lm_head(hidden[asking.label_index].detach(), asking.label_ids)
        states = Take.apply(hidden, places) if lengths else queries  # type: ignore[no-untyped-call]
        states = states.unflatten(0, (-1, self.query.queries))
        (z_t, t), grid = batch.denoised(), batch.latent_grid[batch.flow_index]
        if lengths:
            begins = torch.tensor(lengths).cumsum(0).to(t.device) - torch.tensor(lengths, device=t.device)
            velocity = self._velocity(self._condition(states), z_t, t[begins], grid, lengths)
        else:
            nothing = self._condition(states), z_t.new_zeros(1, z_t.shape[1]), t.new_zeros(1), grid.new_zeros(1, 2)
            velocity = self._velocity(*nothing, [1])[:0]
        losses = label_losses if self.backbone.lm_head.z_loss else (label_losses,)
        return (losses[0], velocity, *losses[1:])

    @torch.no_grad()
    def encode_prefix(self, batch: PackedBatch) -> GuidedPrefix:
        """See `Transfusion`."""
        return self._asked(super().encode_prefix(batch))

    @torch.no_grad()
    def velocity_from_prefix(self, prefix: Prefix, z_t: Tensor, t: Tensor, grid: Tensor) -> Tensor:
        """See `Transfusion`. The queries read a prefix once; a look costs the flow decoder alone."""
        condition = prefix.condition if isinstance(prefix, GuidedPrefix) else None
        if condition is None:
            condition = self._asked(prefix).condition
        assert condition is not None
        count, new = z_t.shape[:2]
        grid = grid.expand(count, new, 2).flatten(0, 1)
        velocity = self._velocity(condition, z_t.flatten(0, 1), t, grid, [new] * count)
        return velocity.view(count, new, -1)

    @torch.no_grad()
    def append_tokens(self, prefix: Prefix, tokens: Tensor) -> Prefix:
        """See `Transfusion`."""
        return guided(super().append_tokens(prefix, tokens), None)

    def _asked(self, prefix: Prefix) -> GuidedPrefix:
        """The prefix with the condition: the queries pass behind it and leave no trace."""
        count, asked = prefix.last_hidden.shape[0], self.query.queries
        offset = torch.arange(asked, device=prefix.bias.device)
        first = prefix.next_position[:, None]
        positions = first + offset.reshape(-1, *(1,) * (first.dim() - 2))
        after = AfterPrefix(prefix, asked)
        states = self.backbone.model(self.guide.queries(count), positions.flatten(0, 1), after)
        return guided(prefix, self._condition(states.unflatten(0, (count, asked))))

    def _condition(self, states: Tensor) -> Tensor:
        condition: Tensor = self.guide.connector(states, self._plan)
        return condition

    def _velocity(self, condition: Tensor, z_t: Tensor, t: Tensor, grid: Tensor, lengths: Sequence[int]) -> Tensor:
        self.place(grid)  # a grid beyond the table is refused in the same words
        output = self.guide.decoder(condition, z_t, t, grid, lengths, self._plan)
        return self.velocity(output, z_t.float(), t.float().repeat_interleave(torch.tensor(lengths, device=t.device)))

    def _plan(self, segments: list[Segment]) -> Attend:
        return self.share.plan(segments, self.dtype).to(self.places.device)


def query_segments(segments: Sequence[Segment], queries: int) -> list[Segment]:
    """The segments with queries in the places of the images to be drawn."""
    return [replace(s, length=queries) if s.mode == "noise" else s for s in segments]


def with_queries(batch: PackedBatch, queries: int) -> tuple[PackedBatch, Tensor]:
    """The batch with places for queries instead of the images to be drawn, and these places [I M], which hold nothing.

    The queries of an image have the rotary positions from that of the image on. A plan of the batch is kept.
    """
    device = batch.rope_positions.device
    segments = query_segments(batch.segments, queries)
    old = torch.tensor([segment.length for segment in batch.segments])
    new = torch.tensor([segment.length for segment in segments])
    image = torch.tensor([segment.mode == "noise" for segment in segments])
    begins, began = new.cumsum(0) - new, old.cumsum(0) - old
    stays = ~image.repeat_interleave(old)
    moved = torch.arange(int(old.sum())) + (begins - began).repeat_interleave(old)
    places = (begins[image][:, None] + torch.arange(queries)).flatten().to(device)
    rope = batch.rope_positions.new_zeros(int(new.sum()), *batch.rope_positions.shape[1:])
    rope[moved[stays].to(device)] = batch.rope_positions[stays.to(device)]
    first = batch.rope_positions[began[image].to(device)].repeat_interleave(queries, 0)
    offset = torch.arange(queries, device=device).repeat(int(image.sum()))
    # With two-dimensional positions an image's first latent may lie away from the corner the text goes on from.
    rope[places] = (first if rope.dim() == 1 else first.amin(-1, keepdim=True)) + offset.reshape(
        -1, *(1,) * (rope.dim() - 1)
    )
    moved = moved.to(device)
    clean = torch.ones(batch.latents.shape[0], dtype=torch.bool, device=device)
    clean[batch.flow_index] = False
    asking = replace(
        batch,
        segments=segments,
        rope_positions=rope,
        token_index=moved[batch.token_index],
        label_index=moved[batch.label_index],
        latents=batch.latents[clean],
        noise=batch.noise[clean],
        t=batch.t[clean],
        flow_index=batch.flow_index[:0],
        latent_index=moved[batch.latent_index[clean]],
        latent_grid=batch.latent_grid[clean],
        latent_sample=batch.latent_sample[clean],
        feature_index=moved[batch.feature_index],
        time_index=batch.time_index[:0],
        times=batch.times[:0],
    )
    return asking, places
