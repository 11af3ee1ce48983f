"""How losses add up: every term is a sum over its items, divided by the number of such items in the whole step.

Counts are known from the batches alone, so they can be summed over micro-batches and ranks before the first backward;
the result does not depend on how the samples were cut. An empty modality is an exact zero that still reaches the
weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unicom_dist.config.schema import CodecConfig, StageConfig
from unicom_dist.models.codec import CodecBatch
from unicom_dist.models.segments import PackedBatch
from unicom_dist.objective.breakdown import Kinds, flow_averages, text_averages
from unicom_dist.objective.flow import squared_error
from unicom_dist.objective.perceptual_loss import PerceptualLoss


@dataclass(frozen=True, slots=True)
class LossTerm:
    """A weighted loss: `sum` over `count` items of this batch.

    `averages` [2, K]: sums and counts of what its items are broken down to, named by `breakdown.names_of`.
    """

    sum: Tensor
    count: int
    weight: float
    averages: Tensor | None = None


def prior_counts(batch: PackedBatch, z_loss: float = 0.0) -> dict[str, int]:
    """Items of each term of `prior_terms`: labels and noised latents; with a `z_loss`, labels once more."""
    counts = {"text": batch.label_ids.shape[0], "flow": batch.flow_index.shape[0]}
    return counts | ({"z": counts["text"]} if z_loss else {})


def prior_terms(
    outputs: tuple[Tensor, ...], batch: PackedBatch, stage: StageConfig, kinds: Kinds | None = None
) -> dict[str, LossTerm]:
    """`text`: cross-entropy per label, nats. `flow`: squared error of the velocity per latent, mean over channels.

    `z`, with a `z_loss`: log^2 Z per label. Its gradient comes with that of `text`, whose weight it therefore shares.
    `outputs` of a `Transfusion`: cross-entropy [Y], velocity [F, d] and, with a `z_loss`, log^2 Z [Y]. `kinds` of the
    samples: the terms are broken down by them.
    """
    label_losses, velocity = outputs[:2]
    counts = prior_counts(batch, stage.z_loss)
    drawn = batch.flow_index
    error = squared_error(velocity, batch.latents[drawn], batch.noise[drawn])
    by_text = text_averages(label_losses, batch, kinds) if kinds else None
    by_flow = flow_averages(error, batch, kinds) if kinds else None
    terms = {
        "text": LossTerm(label_losses.sum(), counts["text"], stage.lambda_text, by_text),
        "flow": LossTerm(error.sum(), counts["flow"], stage.lambda_flow, by_flow),
    }
    if stage.z_loss:
        terms["z"] = LossTerm(outputs[2].sum(), counts["z"], stage.lambda_text * stage.z_loss)
    return terms


def joint_counts(batch: PackedBatch, z_loss: float = 0.0) -> dict[str, int]:
    """Items of each term of `joint_terms`: those of the prior, and the features to be rebuilt."""
    return {**prior_counts(batch, z_loss), "recon": batch.target_features.shape[0]}


def joint_terms(
    outputs: tuple[Tensor, ...],
    batch: PackedBatch,
    stage: StageConfig,
    first: bool = True,
    last: bool = True,
    kinds: Kinds | None = None,
) -> dict[str, LossTerm]:
    """`prior_terms`, and `recon`: squared error of the rebuilt features per latent, mean over channels.

    `outputs` of a `JointPrior`, or of its `first` part alone, where `recon` arises, or its `last`, where the others do.
    """
    terms: dict[str, LossTerm] = {}
    if last:
        label_losses, velocity, latents, *others = outputs
        terms = prior_terms((label_losses, velocity, *others), replace(batch, latents=latents), stage, kinds)
    if first:
        terms["recon"] = LossTerm(outputs[-1].sum(), joint_counts(batch)["recon"], stage.joint.lambda_recon)
    return terms


def _low_noise(batch: CodecBatch, config: CodecConfig) -> Tensor:
    return (batch.t >= config.perceptual_min_t).nonzero()[:, 0]


def codec_counts(batch: CodecBatch, config: CodecConfig) -> dict[str, int]:
    """Items of each term of `codec_terms`: images, and images with little enough noise for the perceptual term."""
    counts = {"flow": batch.images.shape[0]}
    if config.perceptual != "none" and config.perceptual_weight:
        counts["perceptual"] = _low_noise(batch, config).shape[0]
    if config.compressor.bottleneck == "kl":
        counts["kl"] = batch.images.shape[0]
    if config.encoder_trainable:
        counts["distill"] = batch.images.shape[0]
    return counts


def codec_terms(
    outputs: tuple[Tensor, ...], batch: CodecBatch, config: CodecConfig, perceptual: PerceptualLoss | None
) -> dict[str, LossTerm]:
    """`flow`: squared error of the velocity per image, mean over values. `perceptual`: distance of the clean estimate.

    `kl`, with that bottleneck: divergence of the posterior, per image, mean over latents and channels. `distill`, with
    a trained encoder: squared difference of its tokens from the stored features, per image, mean over both.

    With `flow_remaining` = c > 0 the flow error near the data is weighted down by ((1-t) / max(1-t, c))^2, which is the
    error of the clean image there: at low noise z_t alone shows the picture, and a small decoder would learn to ignore
    its tokens.
    `perceptual` is None iff `config.perceptual` is "none"; with `perceptual_weight` = 0 the term is left out as well.
    """
    velocity, clean = outputs[:2]
    counts = codec_counts(batch, config)
    remaining = 1 - batch.t.float()
    weight = (remaining / remaining.clamp_min(config.flow_remaining)).square().nan_to_num(1.0)
    error = squared_error(velocity, batch.target, batch.noise)
    terms = {"flow": LossTerm((weight * error).sum(), counts["flow"], 1.0)}
    if perceptual is not None and "perceptual" in counts:
        chosen = _low_noise(batch, config)
        shown = clean[chosen], batch.images[chosen], batch.noise[chosen]
        distance = perceptual(*shown) if counts["perceptual"] else clean[:0]
        terms["perceptual"] = LossTerm(distance.sum(), counts["perceptual"], config.perceptual_weight)
    if "kl" in counts:
        terms["kl"] = LossTerm(outputs[2].sum(), counts["kl"], config.compressor.kl_weight)
    if "distill" in counts:
        terms["distill"] = LossTerm(outputs[-1].sum(), counts["distill"], config.distill_weight)
    return terms


def total(terms: Mapping[str, LossTerm], global_counts: Mapping[str, int], replicas: int = 1) -> Tensor:
    """The loss of one micro-batch to call backward on: sum over terms of weight x sum / global count x replicas.

    `global_counts` are the counts summed over all ranks and micro-batches of the step. `replicas` cancels the averaging
    of gradients over ranks.
    """
    parts = [term.sum * (term.weight * replicas / max(global_counts[name], 1)) for name, term in terms.items()]
    return torch.stack(parts).sum()
