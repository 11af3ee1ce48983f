"""Joint training in one process: loss and gradients against plain autograd, cuts, parts, statistics. Seconds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unicom_dist.config.errors import CollapseError
from unicom_dist.config.schema import JointConfig, PriorConfig, StageConfig
from unicom_dist.models import joint
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.backbone import Part
from unicom_dist.models.joint import JointPrior
from unicom_dist.models.latent_statistics import Moments, effective_rank
from unicom_dist.models.segments import PackedBatch
from unicom_dist.objective.terms import joint_counts, joint_terms, total
from unicom_dist.testing.joint import FEATURE, FEATURE_STATS, LATENT, LATENT_STATS, joint_batch, joint_prior
from unicom_dist.testing.layouts import merged
from unicom_dist.train.collapse import Spread, check_spread

STAGE = StageConfig(
    name="joint",
    kind="prior",
    steps=1,
    lambda_text=0.7,
    lambda_flow=5.0,
    joint=JointConfig(enabled=True, lambda_recon=2.0),
)
DRAW = [("text", 3), ("latent", 6), ("text", 2)]
SAMPLES = [DRAW, [("text", 4)], [("feature", 4), ("text", 3)], [("text", 2), ("latent", 4), ("text", 3), ("latent", 2)]]


def loss_of(module: JointPrior, batches: list[PackedBatch]) -> Tensor:
    """The loss of a step of these micro-batches, backward done."""
    counts: dict[str, int] = {}
    for batch in batches:
        for name, count in joint_counts(batch).items():
            counts[name] = counts.get(name, 0) + count
    losses = []
    for batch in batches:
        losses.append(total(joint_terms(module(batch), batch, STAGE), counts))
        losses[-1].backward()
    return torch.stack(losses).sum().detach()


def gradients(module: JointPrior) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def by_hand(module: JointPrior, batch: PackedBatch) -> Tensor:
    """The same loss image by image, in whole tensors and without any of the module's own arithmetic."""
    std, mean = LATENT_STATS.std, LATENT_STATS.mean
    lengths = [segment.length for segment in batch.segments if segment.mode == "noise"]
    raws, rebuilt = [], []
    for image in torch.split(batch.target_features, lengths):
        raw = module.compressor(image[None])
        raws.append(raw[0])
        rebuilt.append(module.reconstruct.out(module.reconstruct.decompressor(raw))[0])
    z = (torch.cat(raws) - mean) / std
    wanted = (batch.target_features - FEATURE_STATS.mean) / FEATURE_STATS.std
    t = batch.t[:, None]
    backbone = module.backbone
    x = torch.zeros(batch.num_positions, module.config.hidden)
    x[batch.token_index] = backbone.model.embed_tokens(batch.token_ids)
    x[batch.latent_index] = module.embed_latents(t * z + (1 - t) * batch.noise, batch.t, batch.latent_grid)
    x[batch.feature_index] = module.connector(batch.features) + module.place(batch.feature_grid)
    hidden = backbone.model(x, batch.rope_positions, AttentionPlan.build(batch.segments, x.dtype))
    text = F.cross_entropy(backbone.lm_head.logits(hidden[batch.label_index]), batch.label_ids)
    flow = (module.flow_head(hidden[batch.latent_index]) - (z.detach() - batch.noise)).square().mean()
    return 0.7 * text + 5.0 * flow + 2.0 * (torch.cat(rebuilt) - wanted).square().mean()


def test_loss_and_gradients_equal_plain_autograd() -> None:
    module, batch = joint_prior(), joint_batch(SAMPLES)
    loss = loss_of(module, [batch])
    mine = gradients(module)
    module.zero_grad()
    expected = by_hand(module, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    wanted = gradients(module)
    assert mine.keys() == wanted.keys() == dict(module.named_parameters()).keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-6, msg=name)
        assert grad.any(), name


def test_the_target_carries_no_gradient_and_the_input_does(monkeypatch: pytest.MonkeyPatch) -> None:
    only_flow = STAGE.model_copy(update={"lambda_text": 0.0, "joint": JointConfig(enabled=True, lambda_recon=0.0)})

    def compressor_gradient() -> Tensor:
        module, batch = joint_prior(), joint_batch(SAMPLES)
        total(joint_terms(module(batch), batch, only_flow), joint_counts(batch)).backward()
        return module.compressor.block.straight.weight.grad

    detached = compressor_gradient()
    assert detached.any()
    monkeypatch.setattr(joint, "held", lambda latents: latents)
    assert not torch.allclose(detached, compressor_gradient())


def test_neither_loss_gradients_nor_statistics_depend_on_the_cut() -> None:
    whole, cut = joint_prior(), joint_prior()
    batches = [joint_batch([sample], seed) for seed, sample in enumerate(SAMPLES)]
    one = loss_of(whole, [merged(batches)])
    several = loss_of(cut, batches)
    torch.testing.assert_close(one, several)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(cut)[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    for module in (whole, cut):
        module.statistics.update(lambda sums: sums)
    torch.testing.assert_close(whole.statistics.mean, cut.statistics.mean)
    torch.testing.assert_close(whole.statistics.var, cut.statistics.var)
    assert not torch.allclose(whole.statistics.mean, LATENT_STATS.mean)


def test_parts_called_in_sequence_equal_one_process() -> None:
    """What the runtime of a pipeline does: hidden states and target forward, one gradient back, two losses."""
    batch, counts = joint_batch(SAMPLES), joint_counts(joint_batch(SAMPLES))
    whole = joint_prior()
    loss = loss_of(whole, [batch])
    first = joint_prior(part=Part(first=True, last=False, layers=(range(2),)))
    last = joint_prior(part=Part(first=False, last=True, layers=(range(2, 4),)))
    with torch.no_grad():  # the copy of a tied embedding
        last.backbone.lm_head.weight.copy_(first.backbone.model.embed_tokens.weight)
    hidden, latents, errors = first(batch)
    assert not latents.requires_grad
    received = hidden.detach().requires_grad_()
    here = total(joint_terms((hidden, latents, errors), batch, STAGE, last=False), counts)
    there = total(joint_terms(last(batch, (received, latents)), batch, STAGE, first=False), counts)
    there.backward()
    torch.autograd.backward([here, hidden], [None, received.grad])
    torch.testing.assert_close((here + there).detach(), loss)
    wanted, found = gradients(whole), {**gradients(last), **gradients(first)}
    tied = "backbone.model.embed_tokens.weight"
    found[tied] = found[tied] + found.pop("backbone.lm_head.weight")
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_images_runs_every_part_and_is_an_exact_zero(dtype: torch.dtype) -> None:
    module, batch = joint_prior().to(dtype), joint_batch([[("text", 4)]])
    module.statistics.float()
    terms = joint_terms(module(batch), batch, STAGE)
    assert joint_counts(batch) == {"text": 3, "flow": 0, "recon": 0}
    assert float(terms["recon"].sum) == float(terms["flow"].sum) == 0
    total(terms, joint_counts(batch)).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        if name.startswith(("compressor.", "reconstruct.")):
            assert not p.grad.any(), name
    before = module.statistics.mean.clone()
    module.statistics.update(lambda sums: sums)
    assert torch.equal(before, module.statistics.mean)


def test_held_out_batches_leave_the_statistics_alone() -> None:
    module = joint_prior()
    with torch.no_grad():
        module(joint_batch(SAMPLES))
    assert module.statistics.step.count == 0


def test_statistics_follow_the_latents() -> None:
    """With momentum 1 they are those of the step; with less, those of the mixture of before and now."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, LATENT, generator=draw) * 3 + 7
    for momentum in (1.0, 0.25):
        statistics = joint_prior(momentum=momentum).statistics
        old = torch.randn(20_000, LATENT, generator=draw).double()
        old = (old - old.mean(0)) / old.std(0, correction=0) * LATENT_STATS.std + LATENT_STATS.mean
        for part in rows.split([1, 1999, 2000]):
            statistics.step.add(part)
        statistics.update(lambda sums: sums)
        weights = torch.cat([torch.full((4000,), momentum / 4000), torch.full((20_000,), (1 - momentum) / 20_000)])[
            :, None
        ]
        both = torch.cat([rows.double(), old])
        mean = (weights * both).sum(0)
        torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            statistics.var.double(), (weights * (both - mean).square()).sum(0), rtol=1e-4, atol=1e-4
        )


def test_moments_equal_those_of_all_rows() -> None:
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(1)) @ torch.randn(5, 5) + 10
    moments = Moments(torch.full((5,), 9.0))
    for part in rows.split([7, 0, 293]):
        moments.add(part)
    torch.testing.assert_close(moments.mean(), rows.double().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.covariance(), rows.double().T.cov(correction=0), rtol=1e-4, atol=1e-5)


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1, 0, 0]))) == pytest.approx(2)
    assert effective_rank(torch.ones(4, 4)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == 0


def latents_after(steps: int, lambda_recon: float) -> tuple[Spread, Spread]:
    """(start, end) of latents of features with four directions, trained with lambda_flow = 5 on four batches."""
    small = PriorConfig(hidden=16, layers=1, heads=2, kv_heads=1, ffn=32, max_grid=8)
    stage = STAGE.model_copy(update={"lambda_text": 1.0, "joint": JointConfig(enabled=True, lambda_recon=lambda_recon)})
    module, draw = joint_prior(small, momentum=0.05), torch.Generator().manual_seed(5)
    directions = torch.randn(4, FEATURE, generator=draw) / 2
    batches = []
    for seed in range(4):
        batch = joint_batch([[("text", 3), ("latent", 16), ("text", 2)]] * 4, seed)
        features = torch.randn(64, 4, generator=draw) @ directions + 0.1 * torch.randn(64, FEATURE, generator=draw)
        batches.append(replace(batch, target_features=features * FEATURE_STATS.std + FEATURE_STATS.mean))
    statistics = module.statistics
    statistics.momentum = 1.0  # as the latents stage measures them
    module(merged(batches))
    statistics.update(lambda sums: sums)
    statistics.momentum = 0.05
    start = Spread(statistics.std, effective_rank(statistics.take_window().covariance()))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.95), foreach=False)
    for step in range(steps):
        batch = batches[step % 4]
        optimizer.zero_grad()
        total(joint_terms(module(batch), batch, stage), joint_counts(batch)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if step == steps - 20:
            statistics.take_window()
        statistics.update(lambda sums: sums)
    return start, Spread(statistics.std, effective_rank(statistics.take_window().covariance()))


@pytest.mark.parametrize(
    ("detached", "lambda_recon", "sign"),
    [
        (False, 0.0, "deviation is"),  # the target gives way: latents shrink, faster than their statistics follow
        (True, 0.0, "effective rank is"),  # all channels say the same, through which the noise averages out
        (True, JointConfig().lambda_recon, ""),
    ],
)
def test_collapse_is_detected_and_does_not_happen_as_configured(
    monkeypatch: pytest.MonkeyPatch, detached: bool, lambda_recon: float, sign: str
) -> None:
    if not detached:
        monkeypatch.setattr(joint, "held", lambda latents: latents)
    start, end = latents_after(140, lambda_recon)
    limits = JointConfig(enabled=True)
    check_spread(start, start, limits, "joint", 0)
    if not sign:
        check_spread(end, start, limits, "joint", 140)
        return
    with pytest.raises(CollapseError, match=sign) as caught:
        check_spread(end, start, limits, "joint", 140)
    assert caught.value.exit_code == 6
    assert all((caught.value.what, caught.value.why, caught.value.remedy, caught.value.docs))
    check_spread(end, start, JointConfig(enabled=True, collapse=0.0), "joint", 140)


def test_a_collapse_names_its_channels() -> None:
    start = Spread(torch.ones(8), 6.0)
    now = Spread(torch.tensor([1, 0.01, 0.02, 0.05, 1, 1, 1, 0.09]), 5.0)
    with pytest.raises(CollapseError, match=r"smallest channel deviation is 0\.01, it was 1 \(channels 1-3, 7\)"):
        check_spread(now, start, JointConfig(enabled=True), "joint", 7)
    unmeasured = Spread(torch.ones(8), 0.0)
    check_spread(unmeasured, start, JointConfig(enabled=True), "joint", 7)
