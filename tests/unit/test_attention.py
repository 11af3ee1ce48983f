"""Packed attention equals its dense definition, and the definition is what the design says. One process, seconds."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from unicom_dist.config.layout import Layout
from unicom_dist.models import attention, attention_kernels, attention_plan
from unicom_dist.models.attention import AttentionPlan, visible
from unicom_dist.models.attention_kernels import BLOCKED, PRODUCTS, Kernel, multiplied_in_bfloat16
from unicom_dist.models.attention_plan import Document, plan_calls
from unicom_dist.models.layers import attend, attend_by_products
from unicom_dist.models.operations import visible_pairs
from unicom_dist.models.segments import Segment
from unicom_dist.models.share import Share
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.testing.segments import LAYOUTS, layout, random_packing

SHARED_HEADS = [(2, 2), (4, 2), (3, 1)]  # query heads and key heads
# Of a call and of one of several samples: small packings are cut, or some, or none; none, in a square of the row.
PRICES = {"cut": (0.0, 0.0), "as costs are": (60.0, 180.0), "whole": (math.inf, 0.0), "one square": (1e9, 1e18)}
WAYS = ["cut", "whole", "one square"]


@pytest.fixture
def price(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets what calls cost in pairs, and lets text be cut into pieces of two."""

    def choose(name: str) -> None:
        for constant, value in zip(("CALL", "BATCH"), PRICES[name], strict=True):
            monkeypatch.setattr(attention_plan, constant, value)
        monkeypatch.setattr(attention_plan, "SMALLEST", 2)
        attention_plan._pieces_of_text.cache_clear()

    yield choose
    attention_plan._pieces_of_text.cache_clear()


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


def drawn(segments: list[Segment], heads: tuple[int, int], seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value."""
    draw = torch.Generator().manual_seed(seed)
    positions = sum(segment.length for segment in segments)
    shapes = [(positions, count, 6) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


def dense(segments: list[Segment], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """By the definition."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    heads = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=visible(segments))[0].transpose(0, 1)


def with_gradients(out: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, weights)]


def assert_equal_dense(segments: list[Segment], heads: tuple[int, int], seed: int) -> None:
    tensors = drawn(segments, heads, seed, torch.float64)
    plan = AttentionPlan.build(segments, torch.float64)
    mine = with_gradients(plan(0, *tensors), tensors)
    for fast, slow in zip(mine, with_gradients(dense(segments, *tensors), tensors), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-11, msg=lambda text: f"{segments}: {text}")


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


@pytest.mark.parametrize("name", PRICES)
def test_packed_attention_equals_dense_over_random_packings(name: str, price: Callable[[str], None]) -> None:
    price(name)
    for seed in range(400):
        assert_equal_dense(random_packing(seed), SHARED_HEADS[seed % 3], seed)


def test_packed_attention_equals_dense_over_long_segments() -> None:
    """Beyond the kernel's blocks of 192 and 768 queries and 512 keys, at the real price of a call."""
    interleaved = [
        Segment(0, "causal", 210),
        Segment(0, "noise", 200),
        Segment(0, "full", 200),
        Segment(0, "causal", 60),
    ]
    assert_equal_dense([*interleaved, Segment(1, "causal", 530)], (4, 2), 0)
    assert_equal_dense([Segment(0, "full", 30), Segment(0, "causal", 1000), Segment(0, "noise", 200)], (2, 2), 0)


CORNERS = {
    "one token": [Segment(0, "causal", 1)],
    "single tokens": [Segment(n // 3, mode, 1) for n, mode in enumerate(["causal", "noise", "full"] * 3)],
    "only text": [Segment(0, "causal", 40), Segment(1, "causal", 3)],
    "only images": [Segment(0, "full", 9), Segment(1, "noise", 12), Segment(2, "full", 2), Segment(2, "noise", 3)],
    "noise in a row": [Segment(0, "noise", 3), Segment(0, "noise", 4), Segment(0, "causal", 5)],
    "an empty segment": [Segment(0, "causal", 0), Segment(0, "full", 5), Segment(0, "causal", 4)],
    "padding at the end": [Segment(0, "causal", 9), Segment(0, "noise", 4), Segment(1, "causal", 3)],
}


@pytest.mark.parametrize("heads", SHARED_HEADS)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("corner", CORNERS)
def test_corner_cases(corner: str, name: str, heads: tuple[int, int], price: Callable[[str], None]) -> None:
    price(name)
    assert_equal_dense(CORNERS[corner], heads, 0)


@pytest.mark.parametrize("name", WAYS)
def test_nobody_else_reads_noise_or_another_sample(name: str, price: Callable[[str], None]) -> None:
    """Perturbed keys and values change nothing outside their segment, not by a bit, and get no gradient from there."""
    price(name)
    for seed in range(60):
        segments = random_packing(seed)
        query, key, value = drawn(segments, SHARED_HEADS[seed % 3], seed, torch.float32)
        plan, stop = AttentionPlan.build(segments, torch.float32), 0
        out = plan(0, query, key, value)
        for segment in segments:
            place = slice(stop, stop + segment.length)
            stop += segment.length
            if segment.mode != "noise":
                continue
            others = torch.ones(len(query), dtype=torch.bool)
            others[place] = False
            grads = torch.autograd.grad(out[others].sum(), (key, value), retain_graph=True)
            assert not any(grad[place].any() for grad in grads)
            changed = [x.detach().clone() for x in (key, value)]
            for x in changed:
                x[place] += 3
            assert torch.equal(plan(0, query, *changed)[others], out[others])


@pytest.mark.parametrize("name", PRICES)
def test_calls_show_exactly_what_is_visible(name: str, price: Callable[[str], None]) -> None:
    """The plan alone, without a kernel: every query is in one call, and the calls' rectangles are the definition."""
    price(name)
    for seed in range(1000):
        segments = random_packing(seed)
        calls, table = plan_calls(segments), visible(segments)
        seen, times = torch.zeros_like(table), torch.zeros(len(table), dtype=torch.int64)
        for piece in calls.pieces:
            rows = torch.arange(piece.begin, piece.end)
            keys = torch.cat([torch.arange(*places) for places in piece.keys])
            seen[rows[:, None], keys] = (keys <= rows[:, None]) if piece.causal else True
            times[rows] += 1
        for document in [document for batch in calls.batches for document in batch]:
            place = slice(document.begin, document.begin + document.length)
            seen[place, place] = visible(document.segments)
            times[place] += 1
        assert torch.equal(seen, table), segments
        assert (times == 1).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_little_is_computed_beyond_what_is_visible(name: str) -> None:
    calls, segments = plan_calls(layout(name)), layout(name)
    assert not calls.batches
    assert sum((p.end - p.begin) * p.seen for p in calls.pieces) <= 1.15 * visible_pairs(segments)
    assert len(calls.pieces) < 60


def test_short_samples_share_few_calls_and_little_padding() -> None:
    equal = plan_calls([Segment(sample, "causal", 20) for sample in range(9)])
    assert ([len(batch) for batch in equal.batches], equal.pieces) == ([9], [])
    batches = plan_calls([Segment(sample, "causal", 1 + sample % 30) for sample in range(300)]).batches
    assert sum(len(batch) * batch[0].length for batch in batches) < 1.2 * 4650
    assert len(batches) < 15


def test_a_short_row_is_one_square_and_read_in_place() -> None:
    """Several calls for a few dozen positions would cost more than the pairs of the row."""
    sizes = (42, 26, 8, 8, 8)
    row = [Segment(sample, "causal", length) for sample, length in enumerate(sizes)]
    calls = plan_calls(row)
    assert (calls.pieces, calls.batches) == ([], [[Document(0, tuple(row))]])
    assert isinstance(AttentionPlan.build(row, torch.float32).calls[0], attention._Cut)
    longer = plan_calls([Segment(sample, "causal", 2 * length) for sample, length in enumerate(sizes)])
    assert sum(map(len, longer.batches)) + len(longer.pieces) >= len(sizes)


def test_plan_of_nothing_returns_nothing() -> None:
    empty = torch.zeros(0, 2, 4, requires_grad=True)
    out = AttentionPlan.build([], torch.float32)(0, empty, empty, empty)
    assert out.shape == (0, 2, 4)
    out.sum().backward()


@pytest.mark.parametrize("name", WAYS)
def test_shares_of_the_heads_make_the_whole(name: str, price: Callable[[str], None]) -> None:
    """As tensor parallelism and Ulysses give them out, over a batch padded for the ranks."""
    price(name)
    segments = random_packing(4)
    positions = sum(segment.length for segment in segments)
    share = Share(Mesh(0, 1, torch.device("cpu"), Layout(ulysses=4)))
    query, key, value = drawn([*segments, Segment(99, "causal", -positions % 4)], (4, 2), 0, torch.float64)
    plan = share.plan(segments, torch.float64)
    whole = plan(0, query, key, value)
    torch.testing.assert_close(
        whole[:positions], dense(segments, query[:positions], key[:positions], value[:positions])
    )
    parts = [plan(0, query[:, 2 * n : 2 * n + 2], key[:, n : n + 1], value[:, n : n + 1]) for n in range(2)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_same_numbers_every_time() -> None:
    segments = layout("t2i2k")
    tensors = drawn(segments, (4, 2), 0, torch.float32)
    plan = AttentionPlan.build(segments, torch.float32)
    first, second = (with_gradients(plan(0, *tensors), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_is_as_exact_as_dense_bfloat16(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_multiplies_bfloat16", lambda: not emulated)
    segments = [Segment(0, "causal", 20), Segment(0, "noise", 40), Segment(1, "causal", 50), Segment(2, "full", 80)]
    exact = drawn(segments, (4, 2), 1, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in exact]
    true = with_gradients(dense(segments, *wide), wide)
    rough = with_gradients(dense(segments, *exact), exact)
    mine = with_gradients(AttentionPlan.build(segments, torch.bfloat16)(0, *exact), exact)
    for good, ours, theirs in zip(true, mine, rough, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - good).norm() <= 1.1 * (theirs - good).norm()


def test_products_of_others_are_not_rounded() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with multiplied_in_bfloat16():
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == before


def test_only_inputs_result_and_normalisers_are_kept() -> None:
    segments = layout("t2i2k")
    tensors = drawn(segments, (4, 2), 0, torch.float32)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = AttentionPlan.build(segments, torch.float32)(0, *tensors)
    normalisers = 4 * out.shape[0] * out.shape[1]
    assert sum(kept.values()) == sum(x.nbytes for x in (*tensors, out)) + normalisers


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("bias_rows", [0, 1, 5])
def test_products_equal_the_fused_kernel(key_heads: int, bias_rows: int) -> None:
    draw = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, 5, 8, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, 2, key_heads, 7, 8, generator=draw, dtype=torch.float64).unbind(0)
    bias = torch.randn(2, 1, bias_rows, 7, generator=draw, dtype=torch.float64) if bias_rows else None
    torch.testing.assert_close(attend_by_products(query, key, value, bias), attend(query, key, value, bias))


@pytest.mark.parametrize("kernel", [BLOCKED, PRODUCTS], ids=["blocked", "products"])
@pytest.mark.parametrize("name", WAYS)
def test_packed_attention_by_other_kernels(
    kernel: Kernel, name: str, price: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other devices compute, and bfloat16 where a CPU has it: the same packings, in double precision."""
    price(name)
    monkeypatch.setattr(attention, "kernel_for", lambda query: kernel)
    monkeypatch.setattr(attention_kernels, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(attention_kernels, "FEWEST_KEYS", 3)
    for seed in range(60):
        assert_equal_dense(random_packing(seed), SHARED_HEADS[seed % 3], seed)
