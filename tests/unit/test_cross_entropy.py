"""Cross-entropy without whole logits equals the plain form, gradients included. One process."""

import math

import pytest
import torch
from torch.nn import functional as F

from unicom_dist.models.head import LanguageHead
from unicom_dist.parallel import cross_entropy
from unicom_dist.parallel.cross_entropy import linear_cross_entropy

LABELS, WIDTH, VOCABULARY = 11, 6, 29


@pytest.fixture(params=[1, 3, 1000], ids=["row by row", "chunks of 3", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", request.param * VOCABULARY)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(LABELS, WIDTH, generator=draw, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (LABELS,), generator=draw)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids


def plain(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids, reduction="none")


def test_value_by_hand() -> None:
    weight = torch.tensor([[0.0], [math.log(3.0)]])
    losses = linear_cross_entropy(torch.tensor([[1.0], [0.0]]), weight, torch.tensor([0, 1]))
    torch.testing.assert_close(losses, torch.tensor([math.log(4.0), math.log(2.0)]))


@pytest.mark.parametrize("per_row", [False, True], ids=["sum", "weighted rows"])
def test_losses_and_gradients_equal_the_plain_form(chunk: None, per_row: bool) -> None:
    factors = torch.linspace(-1, 3, LABELS, dtype=torch.float64) if per_row else torch.tensor(0.7, dtype=torch.float64)
    found, expected = [], []
    for function, results in ((linear_cross_entropy, found), (plain, expected)):
        hidden, weight, ids = inputs()
        losses = function(hidden, weight, ids)
        ((losses * factors).sum() if per_row else losses.sum() * factors).backward()
        results += [losses.detach(), hidden.grad, weight.grad]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, ids = inputs()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, ids), (hidden, weight))


def test_bfloat16_is_as_exact_as_the_plain_form(chunk: None) -> None:
    def against_exact(function: object) -> list[float]:
        exact = [tensor.detach().requires_grad_() for tensor in inputs(torch.bfloat16)[:2]]
        exact = [tensor.detach().double().requires_grad_() for tensor in exact]
        hidden, weight, ids = inputs(torch.bfloat16)
        losses, reference = function(hidden, weight, ids), plain(*exact, ids)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        reference.sum().backward()
        pairs = [(losses, reference), (hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)]
        return [float((mine - true).norm() / true.norm()) for mine, true in pairs]

    for mine, theirs in zip(against_exact(linear_cross_entropy), against_exact(plain), strict=True):
        assert mine <= max(2 * theirs, 0.01)  # a weight's gradient is rounded once per chunk


def test_backward_may_run_twice_and_with_another_gradient() -> None:
    hidden, weight, ids = inputs()
    losses = linear_cross_entropy(hidden, weight, ids)
    first = torch.autograd.grad(losses.sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(losses.sum() * 2, (hidden, weight), retain_graph=True)
    row = torch.autograd.grad(losses[3], (hidden, weight))
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(2 * one, two)
    expected = torch.autograd.grad(plain(hidden, weight, ids)[3], (hidden, weight))
    torch.testing.assert_close(row, expected)


def test_no_labels_is_an_exact_zero_that_reaches_the_weights() -> None:
    hidden, weight, ids = inputs()
    losses = linear_cross_entropy(hidden[:0], weight, ids[:0])
    assert losses.shape == (0,)
    losses.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert hidden.grad is not None


def test_frozen_head_passes_the_gradient_on_and_gets_none(chunk: None) -> None:
    head = LanguageHead(WIDTH, VOCABULARY).double().requires_grad_(False)
    hidden, _, ids = inputs()
    head(hidden, ids).sum().backward()
    expected = torch.autograd.grad(plain(hidden, head.weight, ids).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None


def test_without_gradients_only_losses_are_computed(chunk: None) -> None:
    hidden, weight, ids = inputs()
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, ids)
    torch.testing.assert_close(losses, plain(hidden, weight, ids).detach())
    assert not losses.requires_grad


def test_large_logits_stay_finite() -> None:
    hidden, weight, ids = inputs(torch.float32)
    losses = linear_cross_entropy(hidden * 1e4, weight, ids)
    losses.sum().backward()
    torch.testing.assert_close(losses, plain(hidden * 1e4, weight, ids))
    assert weight.grad.isfinite().all()


def test_whole_logits_are_never_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor any operation makes is a chunk's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, (tuple, list)) else [out]
            largest = max([largest, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
            return out

    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 3 * VOCABULARY)
    hidden, weight, ids = inputs()
    many, labels = hidden.detach().repeat(20, 1).requires_grad_(), ids.repeat(20)
    with Watch():
        linear_cross_entropy(many, weight, labels).sum().backward()
    assert largest <= max(many.numel(), weight.numel(), 3 * VOCABULARY)
