"""Fused kernels on a GPU equal the plain forms: values and gradients in bfloat16, against float32."""

from collections.abc import Callable

import pytest
import torch

from unicom_dist.config.schema import KernelsConfig, PriorConfig
from unicom_dist.models.attention import AttentionPlan, visible
from unicom_dist.models.backbone import Layer
from unicom_dist.models.flex import FlexPlan
from unicom_dist.models.functions import silu_product
from unicom_dist.models.layers import rms_norm, rotary_angles, rotate
from unicom_dist.models.segments import Segment
from unicom_dist.parallel.cross_entropy import linear_cross_entropy
from unicom_dist.parallel.kernels import adamw, apex_rms_norm, choose, detect

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 300, 256


def needs(option: str) -> None:
    found = {kernel.option: kernel for kernel in detect(cuda=True)}[option]
    if not found.available:
        pytest.skip(f"{found.title}: {found.text}")


def errors(form: Callable, shapes: list[tuple[int, ...]], exact: Callable, dtype: torch.dtype) -> list[float]:
    """Relative errors of the result and of each gradient against float64."""
    draw = torch.Generator(device="cuda").manual_seed(0)
    tensors = [torch.randn(s, generator=draw, device="cuda").to(dtype).requires_grad_() for s in shapes]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, true = form(*tensors), exact(*wide)
    d_out = torch.randn(true.shape, generator=draw, device="cuda")
    found = [out, *torch.autograd.grad(out, tensors, d_out.to(out.dtype))]
    wanted = [true, *torch.autograd.grad(true, wide, d_out.to(out.dtype).double())]
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


FORMS = {
    "norm": (lambda x, w: rms_norm(x, w, 1e-6), [(ROWS, WIDTH), (WIDTH,)]),
    "activation": (silu_product, [(ROWS, WIDTH), (ROWS, WIDTH)]),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_functions(name: str, dtype: torch.dtype, tolerance: float) -> None:
    form, shapes = FORMS[name]
    assert max(errors(form, shapes, form, dtype)) <= tolerance


def test_rotation() -> None:
    cos, sin = rotary_angles(torch.arange(ROWS, device="cuda"), 64, 1e6)

    def form(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat(rotate(query, key, cos.to(key.dtype), sin.to(key.dtype)), -2)

    assert max(errors(form, [(ROWS, 4, 64), (ROWS, 2, 64)], form, torch.bfloat16)) <= 0.01


def test_apex_norm() -> None:
    needs("fused_norm")
    shapes = [(ROWS, WIDTH), (WIDTH,)]
    plain = errors(FORMS["norm"][0], shapes, FORMS["norm"][0], torch.bfloat16)
    fused = errors(lambda x, w: apex_rms_norm(x, w, 1e-6), shapes, FORMS["norm"][0], torch.bfloat16)
    assert all(mine <= 1.5 * theirs + 1e-4 for mine, theirs in zip(fused, plain, strict=True))


def test_apex_adam_takes_the_steps_of_torchs() -> None:
    needs("fused_adam")
    found = []
    for fused in ("off", "on"):
        weight = torch.linspace(-1, 1, 5000, device="cuda").requires_grad_()
        kernels = choose(KernelsConfig(fused_adam=fused), cuda=True)
        optimizer = adamw([{"params": [weight], "weight_decay": 0.1}], (0.9, 0.95), 1e-8, kernels)
        optimizer.param_groups[0]["lr"] = 1e-2
        for step in range(5):
            weight.grad = torch.sin(torch.arange(5000, device="cuda") * (step + 1.0))
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [384, 1000])
def test_flex_attention_and_its_gradients(length: int) -> None:
    needs("flex_attention")
    segments = [
        Segment(0, "causal", 70),
        Segment(0, "noise", 130),
        Segment(0, "causal", 40),
        Segment(1, "full", 64),
        Segment(1, "causal", length - 304),
    ]
    seen = visible(segments).cuda()

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
        heads = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1)

    flex, padded = FlexPlan.build(segments, "cuda"), AttentionPlan.build(segments, torch.bfloat16, "cuda")
    shapes = [(length, 4, 64), (length, 2, 64), (length, 2, 64)]
    for plan in (flex, padded):
        assert max(errors(lambda *tensors, p=plan: p(0, *tensors), shapes, dense, torch.bfloat16)) <= 0.02


def test_flex_attention_is_compiled_once_for_batches_of_one_padded_length() -> None:
    needs("flex_attention")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for text in range(300, 312):  # more different lengths than may be compiled
        segments = [Segment(0, "causal", text), Segment(0, "noise", 130), Segment(1, "causal", 1024 - 130 - text)]
        shapes = [(1024, 4, 64), (1024, 2, 64), (1024, 2, 64)]
        query, key, value = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        FlexPlan.build(segments, "cuda")(0, query, key, value).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_language_head() -> None:
    ids = torch.randint(5000, (ROWS,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hidden @ weight.T, ids, reduction="none").sum()

    def chunked(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, ids).sum()

    assert max(errors(chunked, [(ROWS, WIDTH), (5000, WIDTH)], plain, torch.bfloat16)) <= 0.02


@pytest.mark.parametrize("selective", [False, True])
def test_a_layer_holds_what_the_formula_says(selective: bool) -> None:
    """Bytes allocated between forward and backward of a layer, within 5 % of plan's figure."""
    from unicom_dist.plan.activations import layer_activations

    config = PriorConfig(hidden=512, layers=1, heads=8, kv_heads=2, ffn=1408)
    layer, positions = Layer(config).to("cuda", torch.bfloat16), 4096
    cos, sin = (tensor.bfloat16() for tensor in rotary_angles(torch.arange(positions, device="cuda"), 64, 1e6))
    plan = AttentionPlan.build([Segment(0, "causal", positions)], torch.bfloat16, "cuda")
    x = torch.randn(positions, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x, cos, sin, plan, 0, selective).sum().backward()  # what libraries allocate at first use
    before = torch.cuda.memory_allocated()
    out = layer(x, cos, sin, plan, 0, selective)
    held = torch.cuda.memory_allocated() - before - out.nbytes + x.nbytes
    expected = layer_activations(config, "selective" if selective else "none") * positions
    assert held <= 1.05 * expected
