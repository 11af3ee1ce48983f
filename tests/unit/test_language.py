"""Cross-entropy of the next token. One process."""

import math

import torch

from unicom_dist.objective.language import cross_entropy


def test_cross_entropy_is_minus_log_probability() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    expected = torch.tensor([math.log(4.0), math.log(2.0)])
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([0, 1])), expected)


def test_softmax_is_float32_for_bfloat16_logits() -> None:
    logits = torch.linspace(-3, 3, 1000).bfloat16()[None]
    exact = -(logits.double()[0, 7] - logits.double()[0].logsumexp(0))
    assert abs(cross_entropy(logits, torch.tensor([7])).item() - exact.item()) < 1e-5


def test_no_labels_is_an_empty_loss_with_a_gradient() -> None:
    logits = torch.zeros(0, 10, requires_grad=True)
    cross_entropy(logits, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None
