"""Packed attention equals its dense definition, and the definition is what the design says. One process, seconds."""

import random

import pytest
import torch

from unicom_dist.models import attention
from unicom_dist.models.attention import AttentionPlan, visible
from unicom_dist.models.layers import attend, attend_by_products
from unicom_dist.models.segments import Segment
from unicom_dist.testing.segments import random_packing


def by_the_book(segments: list[Segment]) -> torch.Tensor:
    """The rule of the design, position by position."""
    owner = [(number, segment) for number, segment in enumerate(segments) for _ in range(segment.length)]
    table = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for q, (q_number, q_segment) in enumerate(owner):
        for k, (k_number, k_segment) in enumerate(owner):
            same = q_number == k_number
            table[q, k] = (
                q_segment.sample == k_segment.sample
                and (k <= q or (same and k_segment.mode in ("full", "noise")))
                and (k_segment.mode != "noise" or same)
            )
    return table


@pytest.mark.parametrize("seed", range(20))
def test_visible_is_the_rule_of_the_design(seed: int) -> None:
    segments = random_packing(seed)
    assert torch.equal(visible(segments), by_the_book(segments))


def test_visible_on_an_edit_by_hand() -> None:
    segments = [Segment(0, "causal", 1), Segment(0, "noise", 2), Segment(0, "causal", 1), Segment(1, "full", 2)]
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 1, 1],
            [0, 0, 0, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(visible(segments), expected)


def test_packed_attention_equals_dense_over_random_packings() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(300):
        segments = random_packing(seed)
        positions = sum(segment.length for segment in segments)
        heads, key_heads = random.Random(seed).choice([(2, 2), (4, 2), (4, 1)])
        shapes = [(positions, heads, 6), (positions, key_heads, 6), (positions, key_heads, 6)]
        fast = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
        slow = [tensor.detach().clone().requires_grad_() for tensor in fast]
        out = AttentionPlan.build(segments, torch.float64)(0, *fast)
        repeated = [slow[0], *(tensor.repeat_interleave(heads // key_heads, 1) for tensor in slow[1:])]
        query, key, value = (tensor.transpose(0, 1) for tensor in repeated)
        dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible(segments))
        torch.testing.assert_close(out, dense.transpose(0, 1), rtol=1e-10, atol=1e-12)
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        (out * weights).sum().backward()
        (dense.transpose(0, 1) * weights).sum().backward()
        for mine, theirs in zip(fast, slow, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_plan_of_one_length_has_one_bucket_and_of_many_few() -> None:
    equal = AttentionPlan.build([Segment(sample, "causal", 32) for sample in range(9)], torch.float32)
    assert [(size, longest) for size, longest, _ in equal.buckets] == [(9, 32)]
    mixed = AttentionPlan.build([Segment(sample, "causal", 1 + sample) for sample in range(100)], torch.float32)
    padded = sum(size * longest for size, longest, _ in mixed.buckets)
    assert padded < 1.2 * 5050
    assert len(mixed.buckets) < 20


def test_plan_of_nothing_returns_nothing() -> None:
    empty = torch.zeros(0, 2, 4)
    assert AttentionPlan.build([], torch.float32)(0, empty, empty, empty).shape == (0, 2, 4)


def test_bfloat16_attention_is_close_to_float32() -> None:
    segments = [Segment(0, "causal", 20), Segment(0, "noise", 40), Segment(1, "causal", 50)]
    query, key, value = torch.randn(3, 110, 4, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    exact = AttentionPlan.build(segments, torch.float32)(0, query, key, value)
    plan = AttentionPlan.build(segments, torch.bfloat16)
    rough = plan(0, query.bfloat16(), key.bfloat16(), value.bfloat16()).float()
    assert (rough - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("bias_rows", [0, 1, 5])
def test_products_equal_the_fused_kernel(key_heads: int, bias_rows: int) -> None:
    draw = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, 5, 8, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, 2, key_heads, 7, 8, generator=draw, dtype=torch.float64).unbind(0)
    bias = torch.randn(2, 1, bias_rows, 7, generator=draw, dtype=torch.float64) if bias_rows else None
    torch.testing.assert_close(attend_by_products(query, key, value, bias), attend(query, key, value, bias))


def test_packed_attention_by_products_equals_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short bfloat16 sequences take the products: the same packings through them, in double precision."""
    draw = torch.Generator().manual_seed(0)
    for seed in range(50):
        segments = random_packing(seed)
        positions = sum(segment.length for segment in segments)
        query = torch.randn(positions, 4, 6, generator=draw, dtype=torch.float64)
        key, value = torch.randn(2, positions, 2, 6, generator=draw, dtype=torch.float64).unbind(0)
        plan = AttentionPlan.build(segments, torch.float64)
        fused = plan(0, query, key, value)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "attend", attend_by_products)
            torch.testing.assert_close(plan(0, query, key, value), fused)
