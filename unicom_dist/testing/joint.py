"""A tiny joint prior and batches for it, for tests in one process and in layouts."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from unicom_dist.config.schema import CompressorConfig, PriorConfig
from unicom_dist.models.backbone import WHOLE, Part
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.joint import JointPrior
from unicom_dist.models.segments import PackedBatch
from unicom_dist.testing.tiny_batch import Stretch, tiny_batch

LATENT, FEATURE, VOCABULARY = 4, 10, 48
PRIOR = PriorConfig(hidden=32, layers=4, heads=4, kv_heads=2, ffn=48, max_grid=8)
COMPRESSOR = CompressorConfig(channels=LATENT, heads=2, attention_width=8, expanded=12)
LATENT_STATS = LatentStats(torch.linspace(-0.3, 0.3, LATENT), torch.linspace(0.5, 1.5, LATENT))
FEATURE_STATS = LatentStats(torch.linspace(-1, 1, FEATURE), torch.linspace(0.5, 2, FEATURE))


def joint_prior(prior: PriorConfig = PRIOR, part: Part = WHOLE, momentum: float = 0.1, seed: int = 1) -> JointPrior:
    """A model, or a part of it, whose flow head does not start at zero."""
    module = JointPrior(prior, COMPRESSOR, VOCABULARY, LATENT_STATS, FEATURE_STATS, momentum, seed, part)
    if part.last:
        with torch.no_grad():
            module.flow_head.out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return module


def joint_batch(samples: Sequence[Sequence[Stretch]], seed: int = 0) -> PackedBatch:
    """As `tiny_batch`, with features of the images to be denoised instead of their latents."""
    batch = tiny_batch(samples, VOCABULARY, LATENT, FEATURE, seed)
    features = torch.randn(batch.latents.shape[0], FEATURE, generator=torch.Generator().manual_seed(seed))
    features = features * FEATURE_STATS.std + FEATURE_STATS.mean
    return replace(batch, latents=torch.full_like(batch.latents, torch.nan), target_features=features)
