"""Losses do not depend on how a step is cut; empty terms are exact zeros. One process."""

from dataclasses import replace

import pytest
import torch

from unicom_dist.config.schema import CodecConfig, CompressorConfig, StageConfig
from unicom_dist.models.codec import CodecBatch
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.target import PixelTarget
from unicom_dist.objective.perceptual import Lpips
from unicom_dist.objective.perceptual_loss import PerceptualLoss
from unicom_dist.objective.terms import codec_counts, codec_terms, prior_counts, prior_terms, total

STAGE = StageConfig(name="sft", kind="prior", steps=1, lambda_text=1.5, lambda_flow=5.0)


def prior_step(labels: int, latents: int, seed: int = 0) -> tuple[tuple[torch.Tensor, torch.Tensor], PackedBatch]:
    """Outputs that require gradients and a batch with only what losses read."""
    draw = torch.Generator().manual_seed(seed)
    none = torch.zeros(0, dtype=torch.int64)
    grid = torch.zeros(0, 2, dtype=torch.int64)
    batch = PackedBatch(
        segments=[],
        rope_positions=none,
        token_ids=none,
        token_index=none,
        label_index=torch.arange(labels),
        label_ids=torch.randint(9, (labels,), generator=draw),
        latents=torch.randn(latents, 4, generator=draw),
        noise=torch.randn(latents, 4, generator=draw),
        t=torch.rand(latents, generator=draw),
        flow_index=torch.arange(latents),
        latent_index=torch.arange(latents),
        latent_grid=grid,
        features=torch.zeros(0, 3),
        feature_index=none,
        feature_grid=grid,
        keys=[],
        tasks=[],
        sources=[],
        label_sample=none,
        latent_sample=none,
    )
    losses = torch.rand(labels, generator=draw).requires_grad_()
    return (losses, torch.randn(latents, 4, generator=draw).requires_grad_()), batch


def test_prior_loss_is_the_weighted_sum_of_means() -> None:
    (losses, velocity), batch = prior_step(6, 10)
    expected = 1.5 * losses.mean()
    expected = expected + 5.0 * (velocity - (batch.latents - batch.noise)).square().mean()
    terms = prior_terms((losses, velocity), batch, STAGE)
    torch.testing.assert_close(total(terms, prior_counts(batch)), expected)


def test_prior_gradients_do_not_depend_on_the_cut() -> None:
    """Two ranks with unequal shares, averaged by the engine, against one process with everything."""
    pieces = [prior_step(5, 0, seed=1), prior_step(1, 12, seed=2)]
    counts = {"text": 6, "flow": 12}
    for outputs, batch in pieces:
        (total(prior_terms(outputs, batch, STAGE), counts, replicas=2) / 2).backward()
    losses, velocity = (torch.cat([outputs[i].detach() for outputs, _ in pieces]).requires_grad_() for i in (0, 1))
    whole = replace(
        pieces[0][1],
        label_ids=torch.cat([batch.label_ids for _, batch in pieces]),
        latents=torch.cat([batch.latents for _, batch in pieces]),
        noise=torch.cat([batch.noise for _, batch in pieces]),
        flow_index=torch.arange(12),
    )
    total(prior_terms((losses, velocity), whole, STAGE), counts).backward()
    torch.testing.assert_close(torch.cat([outputs[0].grad for outputs, _ in pieces]), losses.grad)
    torch.testing.assert_close(torch.cat([outputs[1].grad for outputs, _ in pieces]), velocity.grad)


@pytest.mark.parametrize(("labels", "latents"), [(0, 5), (5, 0), (0, 0)])
def test_an_empty_modality_is_an_exact_zero_on_the_graph(labels: int, latents: int) -> None:
    outputs, batch = prior_step(labels, latents)
    terms = prior_terms(outputs, batch, STAGE)
    loss = total(terms, prior_counts(batch))
    assert loss.isfinite()
    for name, count in prior_counts(batch).items():
        assert (terms[name].sum.item() == 0) == (count == 0)
        assert terms[name].sum.requires_grad
    loss.backward()
    assert all(output.grad is not None for output in outputs)


def codec_step(t: list[float]) -> tuple[tuple[torch.Tensor, torch.Tensor], CodecBatch]:
    draw = torch.Generator().manual_seed(len(t))
    size = len(t)
    images, noise, velocity, clean = torch.randn(4, size, 3, 32, 32, generator=draw).unbind(0)
    batch = CodecBatch(
        images=images,
        features=torch.zeros(size, 1, 4),
        mask=torch.ones(size, 1, dtype=torch.bool),
        grid=torch.zeros(size, 1, 2, dtype=torch.int64),
        noise=noise,
        t=torch.tensor(t),
        latent_noise=torch.zeros(size, 1, 2),
        latent_noise_level=torch.zeros(size),
        keys=[""] * size,
    )
    return (velocity.requires_grad_(), clean.requires_grad_()), batch


def test_perceptual_term_looks_at_low_noise_images_alone() -> None:
    network = Lpips("alex")
    config = CodecConfig(perceptual_min_t=0.5, perceptual_weight=0.7)
    (velocity, clean), batch = codec_step([0.1, 0.5, 0.9, 0.4])
    assert codec_counts(batch, config) == {"flow": 4, "perceptual": 2}
    perceptual = PerceptualLoss(network, PixelTarget(config.decoder))
    terms = codec_terms((velocity, clean), batch, config, perceptual)
    loss = total(terms, codec_counts(batch, config))
    expected = (velocity - (batch.images - batch.noise)).square().mean()
    expected = expected + 0.7 * network(clean[1:3], batch.images[1:3]).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert clean.grad is not None
    assert clean.grad.flatten(1).any(1).tolist() == [False, True, True, False]


def test_perceptual_term_of_no_image_is_an_exact_zero_on_the_graph() -> None:
    config = CodecConfig()
    outputs, batch = codec_step([0.1, 0.2])
    terms = codec_terms(outputs, batch, config, PerceptualLoss(Lpips("alex"), PixelTarget(config.decoder)))
    assert terms["perceptual"].sum.item() == 0
    total(terms, codec_counts(batch, config)).backward()
    assert outputs[1].grad is not None
    assert not outputs[1].grad.any()


def test_without_a_perceptual_network_there_is_no_such_term() -> None:
    config = CodecConfig(perceptual="none")
    outputs, batch = codec_step([0.9])
    assert codec_terms(outputs, batch, config, None).keys() == codec_counts(batch, config).keys() == {"flow"}


def test_a_posterior_adds_its_divergence_with_its_own_weight() -> None:
    config = CodecConfig(perceptual="none", compressor=CompressorConfig(bottleneck="kl", kl_weight=0.3))
    outputs, batch = codec_step([0.9, 0.1])
    terms = codec_terms((*outputs, torch.tensor([2.0, 5.0])), batch, config, None)
    counts = codec_counts(batch, config)
    assert terms.keys() == counts.keys() == {"flow", "kl"}
    expected = terms["flow"].sum / 2 + 0.3 * 3.5
    torch.testing.assert_close(total(terms, counts), expected)


def test_flow_error_near_the_data_is_weighted_as_the_error_of_the_clean_image() -> None:
    """((1-t) / max(1-t, c))^2: all ones for c = 0, the clean image's error for c = 1, and finite at t = 1."""
    (velocity, clean), batch = codec_step([0.0, 0.5, 0.9, 1.0])
    error = (velocity - (batch.images - batch.noise)).square().flatten(1).mean(1)
    for remaining, weights in {0.0: [1, 1, 1, 1], 0.2: [1, 1, 0.25, 0], 1.0: [1, 0.25, 0.01, 0]}.items():
        config = CodecConfig(perceptual="none", flow_remaining=remaining)
        flow = codec_terms((velocity, clean), batch, config, None)["flow"]
        assert flow.count == 4
        torch.testing.assert_close(flow.sum, (error * torch.tensor(weights)).sum())
