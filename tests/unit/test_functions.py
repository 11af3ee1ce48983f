"""Norm, rotation, activation and what is kept of them: the plain forms, with less memory. One process, seconds."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unicom_dist.config.schema import PriorConfig
from unicom_dist.models import functions
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.backbone import Decoder
from unicom_dist.models.functions import RmsNormFunction, silu_product
from unicom_dist.models.kept import Kept
from unicom_dist.models.layers import rms_norm, rotary_angles, rotate
from unicom_dist.models.segments import Segment

EPS = 1e-6


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[..., None, :] + torch.cat([-high, low], -1) * sin[..., None, :]


def angles(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary_angles(torch.arange(7), 8, 1e4)
    return cos.to(dtype), sin.to(dtype)


FORMS: dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]] = {
    "norm": (lambda x, w: rms_norm(x, w, EPS), plain_norm, [(7, 3, 8), (8,)]),
    "rotation": (
        lambda query, key: torch.cat(rotate(query, key, *angles(key.dtype)), -2),
        lambda query, key: torch.cat([plain_rotate(x, *angles(x.dtype)) for x in (query, key)], -2),
        [(7, 4, 8), (7, 2, 8)],
    ),
    "activation": (silu_product, lambda gate, up: F.silu(gate) * up, [(7, 24), (7, 24)]),
}


def inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(shape, generator=draw) * 2).to(dtype).requires_grad_() for shape in shapes]


def out_and_gradients(form: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    out = form(*tensors)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, d_out)]


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck(name: str) -> None:
    form, _, shapes = FORMS[name]
    assert torch.autograd.gradcheck(form, inputs(shapes, torch.float64))


@pytest.mark.parametrize("name", FORMS)
def test_float32_equals_the_plain_form(name: str) -> None:
    form, plain, shapes = FORMS[name]
    tensors = inputs(shapes, torch.float32)
    pairs = zip(out_and_gradients(form, tensors), out_and_gradients(plain, tensors), strict=True)
    for number, (mine, theirs) in enumerate(pairs):
        assert torch.equal(mine, theirs) or number, "the forward pass is the same to the bit"
        assert (mine - theirs).norm() / theirs.norm() <= 1e-6


@pytest.mark.parametrize("name", FORMS)
def test_bfloat16_is_no_less_exact_than_the_plain_form(name: str) -> None:
    form, plain, shapes = FORMS[name]
    tensors = inputs(shapes, torch.bfloat16)
    exact = out_and_gradients(plain, [tensor.detach().double().requires_grad_() for tensor in tensors])
    for mine, theirs, true in zip(
        out_and_gradients(form, tensors), out_and_gradients(plain, tensors), exact, strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert (mine - true).norm() <= 1.02 * (theirs - true).norm()


def test_a_frozen_gain_gets_no_gradient() -> None:
    x, weight = inputs([(5, 8), (8,)], torch.float32)
    RmsNormFunction.apply(x, weight.requires_grad_(False), EPS).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


def test_a_replaced_tensor_is_rebuilt_once_and_its_memory_given_back() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    left, right = nn.Linear(4, 5), nn.Linear(4, 5)
    rebuilt = 0

    def double() -> torch.Tensor:
        nonlocal rebuilt
        rebuilt += 1
        return x.detach() * 2

    doubled = x * 2
    memory = doubled.untyped_storage()._weak_ref()
    kept = Kept()
    kept.offer(doubled, double)
    with kept:
        out = (left(doubled) * right(doubled.view(2, 3, 4)).view(6, 5)).sum()
    del doubled
    assert torch.UntypedStorage._expired(memory)
    found = torch.autograd.grad(out, [left.weight, right.weight, x], retain_graph=True)
    assert rebuilt == 1
    expected = torch.autograd.grad((left(x * 2) * right(x * 2)).sum(), [left.weight, right.weight, x])
    again = torch.autograd.grad(out, [left.weight, right.weight, x])
    for mine, second, theirs in zip(found, again, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(second, theirs)


def test_other_tensors_stay_as_they_are() -> None:
    x, y = torch.randn(2, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    with Kept() as kept:
        out = (x * y).sum()
    kept.replace(x[0], lambda: torch.zeros(5))  # a part of what was saved
    kept.replace(y.detach().clone(), lambda: torch.zeros(5))
    torch.testing.assert_close(torch.autograd.grad(out, y)[0], x.detach().sum(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_gradient(mode: str, dtype: torch.dtype) -> None:
    config = PriorConfig(hidden=32, layers=3, heads=4, kv_heads=2, ffn=48)
    segments = [Segment(0, "causal", 9), Segment(0, "noise", 4), Segment(1, "causal", 5)]
    grads = []
    for recompute in ("none", mode):
        torch.manual_seed(0)
        decoder = Decoder(config, 11).to(dtype)
        decoder.recompute = recompute
        x = torch.randn(18, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        plan = AttentionPlan.build(segments, dtype)
        decoder(x, torch.arange(18), plan).float().square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in decoder.parameters() if parameter.grad is not None)])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.slow
def test_compiled_functions_equal_the_plain_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "_FORMS", dict(functions._FORMS))
    functions.compile_all()
    for form, plain, shapes in FORMS.values():
        tensors = inputs(shapes, torch.float32)
        pairs = zip(out_and_gradients(form, tensors), out_and_gradients(plain, tensors), strict=True)
        for mine, theirs in pairs:
            assert (mine - theirs).norm() / theirs.norm() <= 1e-6
