"""Packed batches move whole. One process."""

import torch

from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.segments import PackedBatch, Segment


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    whole = torch.zeros(0, dtype=torch.int64)
    batch = PackedBatch(
        segments=[Segment(0, "causal", 2)],
        rope_positions=torch.arange(2),
        token_ids=torch.arange(2),
        token_index=torch.arange(2),
        label_index=whole,
        label_ids=whole,
        latents=torch.zeros(0, 4),
        noise=torch.zeros(0, 4),
        t=torch.zeros(0),
        flow_index=whole,
        latent_index=whole,
        latent_grid=torch.zeros(0, 2, dtype=torch.int64),
        features=torch.zeros(0, 8),
        feature_index=whole,
        feature_grid=torch.zeros(0, 2, dtype=torch.int64),
        keys=["a"],
        tasks=["text"],
        sources=["train"],
        label_sample=whole,
        latent_sample=whole,
    )
    moved = batch.to("meta")
    assert batch.num_positions == moved.num_positions == 2
    assert moved.segments == batch.segments
    assert moved.keys == ["a"]
    tensors = [value for value in (getattr(moved, name) for name in PackedBatch.__slots__) if torch.is_tensor(value)]
    assert len(tensors) == 19
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.plan is None
    batch.plan = AttentionPlan.build(batch.segments, torch.float32)
    assert batch.to("cpu").plan is batch.plan
    assert batch.to("meta").plan is not batch.plan
    assert batch.token_ids.device.type == "cpu"
