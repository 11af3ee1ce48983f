"""Joint training: a prior stage whose compressor goes on learning.

Compressor and decompressor start from the codec of the recipe; the batches bring features instead of latents. The
exported folder holds the prior and, in compressor/, what made its latents: a decoder must be trained for that one
(a codec stage with `trainable: decoder`), and until then sampling refuses the pair.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from unicom_dist.checkpoint.weights import Chosen, StoredWeights, export_weights
from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.npy import read_npy, to_tensor
from unicom_dist.data.pairs import open_set, spread
from unicom_dist.data.shardset import ShardSet
from unicom_dist.models.backbone import Part
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.compressor import Compressor
from unicom_dist.models.init import Source
from unicom_dist.models.joint import OWN, JointPrior, Reconstruction, compressor_fingerprint, image_lengths
from unicom_dist.models.latent_statistics import Moments, effective_rank
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.sharding import outlined
from unicom_dist.objective.terms import LossTerm, joint_counts, joint_terms
from unicom_dist.parallel.engine import Piece
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.parallel.pipeline.runtime import Payload
from unicom_dist.tracking.flops import token_flops
from unicom_dist.train.collapse import Spread, check_spread
from unicom_dist.train.prior import PriorTask
from unicom_dist.train.stages import codec_folder

COMPRESSOR = "compressor"  # folder within the exported prior
CODEC = ("compressor.", "decompressor.")  # names of what is taken from the codec
SAMPLE = 64  # images from which the start is measured
ROWS_PER_CHANNEL = 4  # fewer latents tell nothing about the rank of their covariance


class JointTask(PriorTask):
    """The prior and its compressor on packed rows of text and features."""

    def __init__(self, config: Config, stage: StageConfig) -> None:
        super().__init__(config, stage)
        pairs = open_set(config, "train", latents=True)
        features = arrays(pairs, config.encoder.kind, "features.npy")
        self._features = LatentStats.from_tensors(features)
        moments = Moments(self._stats.mean)
        for latents in arrays(pairs, "latent", "latent.npy"):
            moments.add(latents)
        self._start = Spread(self._stats.std, effective_rank(moments.covariance()))
        with torch.device("meta"):
            compressor = config.codec.compressor
            self._towers = [Compressor(compressor, self._channels), Reconstruction(compressor, self._channels)]
        self._model: JointPrior | None = None  # the one that is trained
        position = config.stages.index(stage)
        before = [other for other in config.stages[:position] if other.kind == "prior"]
        self._continues = bool(before) and before[-1].joint.enabled

    @property
    def stats(self) -> LatentStats:
        """As they run."""
        return self._model.statistics.stats() if self._model is not None and self._model.part.first else self._stats

    def build(self, mesh: Mesh) -> nn.Module:
        if self._model is not None:  # another one, to draw with
            return super().build(mesh)
        self._model = cast(JointPrior, super().build(mesh))
        return self._model

    def outline(self, mesh: Mesh, part: Part) -> JointPrior:
        prior, compressor = self.config.prior, self.config.codec.compressor
        vocabulary, momentum = self.sizes[0], self.stage.joint.momentum
        build = partial(JointPrior, prior, compressor, vocabulary, self.stats, self._features, momentum, part=part)
        return outlined(build, mesh)

    @cached_property
    def source(self) -> Source:
        prior = super().source
        codec = StoredWeights(codec_folder(self.config, self.stage))

        def source(piece: Piece) -> Tensor:
            name = piece.name.removeprefix("reconstruct.")
            return piece.of(codec[name]).float() if name.startswith(CODEC) else prior(piece)

        return source

    def begins(self, name: str) -> bool:
        return name.startswith(OWN) and not self._continues

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return joint_counts(batch, self.stage.z_loss)

    def flops(self, batch: PackedBatch) -> int:
        return super().flops(batch) + token_flops(self._towers, image_lengths(batch))

    def outcome(self, outputs: Any, batch: PackedBatch, first: bool, last: bool) -> tuple[Payload, dict[str, LossTerm]]:
        kinds = self._kinds(batch) if last else None
        terms = joint_terms(outputs, self._share.region(batch), self.stage, first, last, kinds)
        return (() if last else tuple(outputs[:2])), terms

    def boundaries(self, batch: PackedBatch) -> list[Boundary]:
        latents = Boundary(tuple(batch.latents.shape), torch.float32, differentiable=False)
        return [*super().boundaries(batch), latents]

    def after_step(self, mesh: Mesh) -> None:
        assert self._model is not None
        if self._model.part.first:
            self._model.statistics.update(mesh.dp.sum)

    def figures(self, mesh: Mesh, step: int) -> dict[str, float]:
        """Of the latents. CollapseError on every rank. Collective over the world."""
        assert self._model is not None
        values = torch.zeros(2 * self.sizes[1] + 1, dtype=torch.float64, device=mesh.device)
        if mesh.rank == 0:
            statistics = self._model.statistics
            window = statistics.take_window()
            enough = window.count >= ROWS_PER_CHANNEL * self.sizes[1]
            measured = effective_rank(window.covariance()) if enough else 0.0
            values = torch.cat([statistics.mean, statistics.std, values.new_tensor([measured])])
        mean, std, rank = torch.split(mesh.everyone.sum(values).cpu(), [self.sizes[1], self.sizes[1], 1])
        now = Spread(std, float(rank))
        check_spread(now, self._start, self.stage.joint, self.stage.name, step)
        return now.figures(mean)

    @property
    def description(self) -> dict[str, Any]:
        """With the statistics as they are; `export` adds the fingerprint of the compressor."""
        content: dict[str, Any] = {**super().description, "codec_fingerprint": "", "joint": {}}
        if self._model is not None and self._model.part.first:
            statistics = self._model.statistics
            content |= {"stats": statistics.stats().to_json(), "joint": statistics.state()}
        return content

    def restore(self, description: Mapping[str, Any]) -> None:
        if self._model is not None and self._model.part.first and description.get("joint"):
            self._model.statistics.load_state(description["joint"])

    def export(self, folder: Path, weights: Mapping[str, Tensor], step: int) -> None:
        own = Chosen(weights, lambda name: name.startswith(OWN))
        prior = Chosen(weights, lambda name: not name.startswith(OWN))
        content = {**self.description, "step": step}
        content["codec_fingerprint"] = compressor_fingerprint(own, content)
        about = {
            "compressor": self.config.codec.compressor.model_dump(mode="json"),
            "encoder_fingerprint": content["encoder_fingerprint"],
            "fingerprint": content["codec_fingerprint"],
            "stats": content["stats"],
            "features": self._features.to_json(),
        }

        def more(place: Path) -> None:
            self._vocabulary.save(place / "vocabulary.json")
            export_weights(place / COMPRESSOR, about, own)

        export_weights(folder, content, prior, more)


def arrays(pairs: ShardSet, part: str, extension: str) -> Iterator[Tensor]:
    """The arrays [n, C] of some images of a set, evenly apart. Malformed ones are left out: the loader names them."""
    for number in spread(SAMPLE, len(pairs)):
        try:
            sample = pairs[number]
            yield to_tensor(read_npy(sample.parts[part][extension], sample.key)).float()
        except (DataError, KeyError):
            continue
