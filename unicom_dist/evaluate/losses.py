"""The prior's losses on held-out pairs: flow loss at fixed times, cross-entropy of captions.

What they are compared with: the untrained model, and the best guess without a network. For the flow that is the linear
one that knows the latents' mean and variance (they are normalised) and nothing else. For captions it is the frequency
of each token in the training captions.
Shapes: Y labels, N latents of d channels.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unicom_dist.config.schema import Config
from unicom_dist.data.loader import heldout_conversation_batches, heldout_prior_batches, heldout_sets
from unicom_dist.data.pairs import captions_of, open_set
from unicom_dist.data.samples import Task
from unicom_dist.data.text import Vocabulary
from unicom_dist.evaluate.rows import Row, measure
from unicom_dist.models.flow import linear_velocity
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.objective.flow import squared_error
from unicom_dist.sample.loading import LoadedPrior

NOTE = "Flow loss: mean over the fixed times; the linear guess knows the latents' mean and variance."

Predict = Callable[[PackedBatch], Tensor]


@dataclass
class PerSample:
    """Sums of a loss over the items of each sample, and their counts."""

    sums: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)

    def add(self, losses: Tensor, sample: Tensor, samples: int) -> None:
        """losses [items], sample [items] the sample number of each; samples without items are left out."""
        sums = torch.zeros(samples, dtype=torch.float64).index_add_(0, sample.cpu(), losses.double().cpu())
        counts = torch.bincount(sample.cpu(), minlength=samples)
        self.sums += sums[counts > 0].tolist()
        self.counts += counts[counts > 0].tolist()

    @property
    def mean(self) -> float:
        """Loss per item."""
        return sum(self.sums) / sum(self.counts)


def linear_guess(batch: PackedBatch) -> Tensor:
    """The best velocity [F, d] linear in z_t for latents of mean 0 and variance 1."""
    return linear_velocity(*batch.denoised())


@torch.no_grad()
def flow_losses(predict: Predict, batches: Iterable[PackedBatch]) -> PerSample:
    """||v - (z1 - eps)||^2 per latent, averaged over channels, summed per image."""
    losses = PerSample()
    for batch in batches:
        drawn = batch.flow_index
        error = squared_error(predict(batch), batch.latents[drawn], batch.noise[drawn])
        losses.add(error, batch.latent_sample[drawn], len(batch.keys))
    return losses


def flow_rows(
    config: Config, stages: Iterable[tuple[str, LoadedPrior]], untrained: Transfusion
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """A row per stage (mean over `eval.fixed_t`) and one per time for the last; {stage: {t: loss}} of all."""
    times = config.eval.fixed_t
    batches: list[list[PackedBatch]] = []
    fresh: list[float] = []
    linear: list[float] = []
    rows: list[Row] = []
    by_time: list[Row] = []
    figures: dict[str, dict[str, float]] = {}
    for stage, prior in stages:
        if not batches:  # the same for all stages: they share vocabulary, latents and statistics
            batches = [list(_heldout(config, prior, t, "text_to_image")) for t in times]
            fresh = [flow_losses(lambda batch: untrained(batch)[1], some).mean for some in batches]
            linear = [flow_losses(linear_guess, some).mean for some in batches]
        found = [flow_losses(_velocity_of(prior.model), some) for some in batches]
        figures[stage] = {f"{t:g}": losses.mean for t, losses in zip(times, found, strict=True)}
        counts = found[0].counts
        over_times = [sum(sums) / len(times) for sums in zip(*(losses.sums for losses in found), strict=True)]
        trivial = ("linear guess", sum(linear) / len(times))
        untrained_mean = sum(fresh) / len(times)
        split = f"heldout, {stage}"
        rows.append(measure("flow loss", split, over_times, "lower", counts, untrained_mean, trivial, NOTE))
        by_time = [
            measure(f"flow loss, t = {t:g}", split, losses.sums, "lower", counts, fresh[i], ("linear guess", linear[i]))
            for i, (t, losses) in enumerate(zip(times, found, strict=True))
        ]
    return rows + by_time, figures


def edit_flow_row(config: Config, stage: str, prior: LoadedPrior, untrained: Transfusion) -> Row | None:
    """The flow loss of held-out edits, mean over `eval.fixed_t`; None where the recipe has none."""
    names = [name for name, kind in heldout_sets(config).items() if kind == "image_text_to_image"]
    model, fresh, linear = PerSample(), PerSample(), PerSample()
    for t in config.eval.fixed_t:
        batches = [batch for name in names for batch in _conversations(config, name, prior, t)]
        for losses, predict in (
            (model, _velocity_of(prior.model)),
            (fresh, _velocity_of(untrained)),
            (linear, linear_guess),
        ):
            found = flow_losses(predict, batches)
            losses.sums += found.sums
            losses.counts += found.counts
    if not model.sums:
        return None
    times = len(config.eval.fixed_t)
    sums, counts = (
        [sum(values[n :: len(values) // times]) for n in range(len(values) // times)]
        for values in (model.sums, model.counts)
    )
    trivial = ("linear guess", linear.mean)
    return measure("flow loss", f"heldout edits, {stage}", sums, "lower", counts, fresh.mean, trivial, NOTE)


def _velocity_of(model: Transfusion) -> Predict:
    return lambda batch: model(batch)[1]


def caption_row(config: Config, stage: str, prior: LoadedPrior, untrained: Transfusion) -> Row:
    """Cross-entropy in nats per token of the captions of held-out pictures, end token included."""
    batches = list(_heldout(config, prior, 0.5, "image_to_text"))
    frequencies = unigram(config, prior.vocabulary)
    model, fresh, plain = PerSample(), PerSample(), PerSample()
    with torch.no_grad():
        for batch in batches:
            for losses, found in (
                (model, prior.model(batch)[0]),
                (fresh, untrained(batch)[0]),
                (plain, -frequencies.to(batch.label_ids.device)[batch.label_ids]),
            ):
                losses.add(found, batch.label_sample, len(batch.keys))
    trivial = ("unigram", plain.mean)
    return measure(
        "caption loss (nats/token)", f"heldout, {stage}", model.sums, "lower", model.counts, fresh.mean, trivial
    )


def unigram(config: Config, vocabulary: Vocabulary) -> Tensor:
    """Log-frequencies [V] of the tokens of the training captions, each token counted once more than it occurs."""
    pairs = open_set(config, "train")
    counts: Counter[int] = Counter()
    for number in range(len(pairs)):
        counts.update(vocabulary.encode(captions_of(pairs[number]).main))
        counts[vocabulary.control["<|im_end|>"]] += 1
    frequencies = torch.ones(vocabulary.size, dtype=torch.float64)
    for token, count in counts.items():
        frequencies[token] += count
    return (frequencies / frequencies.sum()).log().float()


def _heldout(config: Config, prior: LoadedPrior, t: float, task: Task) -> Iterable[PackedBatch]:
    batches = heldout_prior_batches(config, prior.vocabulary, prior.stats, t, config.eval.images, tasks=(task,))
    device = next(prior.model.parameters()).device
    return (batch.to(device) for batch in batches)


def _conversations(config: Config, name: str, prior: LoadedPrior, t: float) -> Iterable[PackedBatch]:
    found = heldout_conversation_batches(config, name, prior.vocabulary, prior.stats, t, config.eval.images)
    device = next(prior.model.parameters()).device
    return (batch.to(device) for batch in found)
