"""Which positions of a batch a rank works on, where several ranks work on one batch.

The positions are padded to a multiple of the ranks (and of `Share.multiple`) and cut into as many consecutive *regions*
as Ulysses has ranks. All tensor-parallel ranks see their region in attention, in the MLP and in the heads; under
sequence parallelism each holds a *slice* of it between the layers, on which it computes the norms and the ways in of
the images.
Shapes as in `segments.py`; n positions of a slice.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from unicom_dist.config.layout import Layout
from unicom_dist.models.attention import Attend, AttentionPlan, Plan, Take
from unicom_dist.models.segments import PackedBatch, Segment
from unicom_dist.parallel.megatron import gather_positions
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.ulysses import heads_to_positions, positions_to_heads


class Share:
    """This rank's share of any batch. Its methods are collective over tp or ulysses where they say so."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._slices = mesh.tp.size if mesh.layout.sequence_parallel else 1
        self.flex = False  # attend by FlexAttention
        self.multiple = 1  # of positions: what is compiled for a length sees few of them

    @property
    def layout(self) -> Layout:
        """How the ranks share the model and the batch."""
        return self._mesh.layout

    def rows(self, batch: PackedBatch) -> int:
        """n: positions of the hidden states that this rank holds between the layers."""
        return self._padded(batch) // self._mesh.layout.sequence_cut

    def region(self, batch: PackedBatch) -> PackedBatch:
        """What lies in this rank's region: it computes the losses of these labels and latents."""
        return within(batch, self._mesh.ulysses.rank, self.rows(batch) * self._slices)

    def slice_of(self, region: PackedBatch) -> PackedBatch:
        """What lies in this rank's slice of its region."""
        return within(region, self._mesh.tp.rank, region.num_positions // self._slices) if self._slices > 1 else region

    def text(self, embedding: nn.Module, region: PackedBatch, mine: PackedBatch) -> Tensor:
        """Vectors [T, h] of the tokens in the slice. Collective over tp."""
        if self._slices == 1:
            everything: Tensor = embedding(region.token_ids)
            return everything
        ids = region.token_ids.new_full((region.num_positions,), -1)
        ids.index_copy_(0, region.token_index, region.token_ids)
        vectors: Tensor = Take.apply(embedding(ids[None])[:, 0], mine.token_index)  # type: ignore[no-untyped-call]
        return vectors

    def plan(self, segments: list[Segment], dtype: torch.dtype) -> Plan:
        """How a batch of these segments attends, for queries of `dtype`; made on the CPU, where the batch is made."""
        padding = -sum(segment.length for segment in segments) % self._unit
        if padding:
            segments = [*segments, Segment(segments[-1].sample + 1, "causal", padding)]
        if not self.flex:
            return AttentionPlan.build(segments, dtype)
        from unicom_dist.models.flex import FlexPlan  # imports the compiler: more than a second of CPU

        return FlexPlan.build(segments)

    def attend(self, batch: PackedBatch, dtype: torch.dtype) -> Attend:
        """Attention over the whole batch from the positions of a region. Collective over ulysses."""
        plan = batch.plan or self.plan(batch.segments, dtype).to(batch.rope_positions.device)
        if self._mesh.ulysses.size == 1:
            return plan

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            heads = heads_to_positions(self._mesh.ulysses, query, key, value)
            return positions_to_heads(self._mesh.ulysses, plan(layer, *heads))

        return attend

    def gather(self, hidden: Tensor) -> Tensor:
        """Hidden states of the region from those of the slices. Collective over tp."""
        return gather_positions(hidden, self._mesh) if self._slices > 1 else hidden

    def _padded(self, batch: PackedBatch) -> int:
        return -(-batch.num_positions // self._unit) * self._unit

    @property
    def _unit(self) -> int:
        """What the padded positions are a multiple of."""
        return math.lcm(self._mesh.layout.sequence_cut, self.multiple)


def within(batch: PackedBatch, number: int, length: int) -> PackedBatch:
    """What lies at positions [number length, (number + 1) length), counted from the first of them.

    Positions beyond the batch are padding: they hold nothing. `segments`, `keys` and `tasks` stay those of the batch.
    """
    begin, end = number * length, (number + 1) * length
    if (begin, end) == (0, batch.num_positions):
        return batch
    rope = batch.rope_positions[begin:end]
    rope = torch.cat([rope, rope.new_zeros(length - rope.shape[0], *rope.shape[1:])])
    if begin == 0 and end > batch.num_positions:  # nothing but padding is added
        return replace(batch, rope_positions=rope)
    indices = (batch.token_index, batch.label_index, batch.latent_index, batch.feature_index, batch.time_index)
    here = torch.cat(indices).cpu()  # how many lie inside must be known: one wait for a GPU, not one for each
    here = (here >= begin) & (here < end)
    token, label, latent, feature, time = (
        inside.nonzero()[:, 0].to(rope.device, non_blocking=True)
        for inside in torch.split(here, [len(index) for index in indices])
    )
    # Of the latents here, those being denoised: their numbers among them.
    rank = torch.full((batch.latents.shape[0],), -1, dtype=torch.long, device=rope.device)
    rank[latent] = torch.arange(latent.shape[0], device=rope.device)
    flow = rank[batch.flow_index]
    return replace(
        batch,
        rope_positions=rope,
        token_ids=batch.token_ids[token],
        token_index=batch.token_index[token] - begin,
        label_index=batch.label_index[label] - begin,
        label_ids=batch.label_ids[label],
        label_sample=batch.label_sample[label],
        latents=batch.latents[latent],
        flow_index=flow[flow >= 0],
        noise=batch.noise[latent],
        t=batch.t[latent],
        latent_index=batch.latent_index[latent] - begin,
        latent_grid=batch.latent_grid[latent],
        latent_sample=batch.latent_sample[latent],
        features=batch.features[feature],
        feature_index=batch.feature_index[feature] - begin,
        feature_grid=batch.feature_grid[feature],
        time_index=batch.time_index[time] - begin,
        times=batch.times[time],
    )
