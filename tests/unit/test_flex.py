"""The block mask from the segments is the one that looking at every pair gives. One process, seconds."""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from unicom_dist.models.attention import visible
from unicom_dist.models.flex import FlexPlan
from unicom_dist.models.segments import Segment
from unicom_dist.testing.segments import layout, random_packing

BLOCKS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def assert_same_blocks(mine: BlockMask, theirs: BlockMask, segments: list[Segment]) -> None:
    for name in BLOCKS:
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), (name, segments)
    assert mine.seq_lengths == theirs.seq_lengths


def by_looking(segments: list[Segment], block: int) -> BlockMask:
    seen = visible(segments)
    return create_block_mask(
        lambda batch, head, query, key: seen[query, key], 1, 1, *seen.shape, device="cpu", BLOCK_SIZE=block
    )


def test_blocks_are_those_of_create_block_mask() -> None:
    for seed in range(1000):
        segments, block = random_packing(seed), (4, 8, 16)[seed % 3]
        assert_same_blocks(FlexPlan.build(segments, block=block).mask, by_looking(segments, block), segments)


def test_blocks_of_rows_as_trained_on() -> None:
    for name in ("t2i2k", "inter2k"):
        segments = layout(name)
        assert_same_blocks(FlexPlan.build(segments).mask, by_looking(segments, 128), segments)


def test_a_plan_moves_with_what_its_mask_function_reads() -> None:
    plan = FlexPlan.build(random_packing(0), block=8)
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert moved.mask.kv_indices.device.type == "meta"
    assert all(cell.cell_contents.device.type == "meta" for cell in moved.mask.mask_mod.__closure__)
    assert plan.mask.kv_indices.device.type == "cpu"
