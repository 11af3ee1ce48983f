"""The training stages of the prior: the Transfusion backbone, whole or in pp_stages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from unicom_dist.checkpoint.weights import export_weights, read_weights_config
from unicom_dist.config.schema import TASKS_OF, Config, PriorConfig, SetKind, StageConfig
from unicom_dist.data.loader import (
    PriorLoader,
    heldout_conversation_batches,
    heldout_prior_batches,
    heldout_sets,
)
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.pairs import feature_channels, open_set
from unicom_dist.data.prefetch import StepLoader
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.attention import Plan
from unicom_dist.models.backbone import WHOLE, Part
from unicom_dist.models.codec import Codec, LatentStats
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.models.init import Source, fill, local_values
from unicom_dist.models.kernels import use
from unicom_dist.models.published import published_source
from unicom_dist.models.segments import PackedBatch, Segment
from unicom_dist.models.sharding import outline
from unicom_dist.models.share import Share
from unicom_dist.models.transfusion import Transfusion, initial_weight
from unicom_dist.objective.breakdown import Kinds, kinds_of, names_of
from unicom_dist.objective.terms import LossTerm, prior_counts, prior_terms
from unicom_dist.parallel.kernels import Kernels, choose
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.parallel.pipeline.split import by_rank, estimate, split
from unicom_dist.parallel.precision import dtype_of
from unicom_dist.parallel.tensor import materialise
from unicom_dist.sample.loading import load_codec
from unicom_dist.tracking.flops import prior_flops
from unicom_dist.train.pictures import draw_heldout_edits, draw_prompts, one_above_the_other
from unicom_dist.train.stages import Task, codec_folder, provenance, read_stats


class PriorTask(Task[PackedBatch]):
    """The Transfusion backbone on packed rows of text, features and latents."""

    def __init__(self, config: Config, stage: StageConfig) -> None:
        super().__init__(config, stage)
        self._run = Path(config.run_dir)
        self._vocabulary = Vocabulary.load(self._run / "vocabulary.json", config.prior.tokenizer)
        self._stats = read_stats(self._run)
        self._channels = feature_channels(open_set(config, "train"), config.encoder.kind)
        self._codec: Codec | None = None  # decodes the pictures drawn while training; loaded with the first

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens of the vocabulary, channels of the latents, channels of the features."""
        return self._vocabulary.size, self._stats.mean.shape[0], self._channels

    @property
    def stats(self) -> LatentStats:
        """By which the latents are normalised."""
        return self._stats

    def build(self, mesh: Mesh) -> nn.Module:
        module = self.outline(mesh, part_of(self.config.prior, *self.sizes, mesh))
        kernels = choose(self.config.kernels, cuda=mesh.device.type == "cuda")
        use(module, kernels)
        self._attend_by(module.share, kernels)
        module.train_only("connector" if self.stage.trainable == "connector" else "all")
        if module.part.last:
            module.backbone.lm_head.z_loss = self.stage.z_loss
        if mesh.layout.zero_stage == 0:
            materialise(module)
            fill(module, self.source)
        self._share = getattr(self, "_share", module.share)  # of the model that is trained, not of a copy to draw with
        return module

    def outline(self, mesh: Mesh, part: Part) -> Transfusion:
        """This rank's slice of the model on the meta device."""
        return outline(self.config.prior, *self.sizes, mesh, part)

    def initial(self, name: str, parameter: nn.Parameter) -> Tensor:
        return local_values(name, parameter, self.source)

    @cached_property
    def source(self) -> Source:
        """Where the initial weights come from: the seed and, for the backbone, a published folder if one is named."""
        drawn = partial(initial_weight, seed=self.config.seed)
        first = next(stage.name for stage in self.config.stages if stage.kind == "prior")
        if not self.config.prior.init_from or self.stage.name != first:  # later stages continue the one before
            return drawn
        published = published_source(self.config.prior, self._vocabulary.source_ids)
        return lambda piece: (published if piece.name.startswith("backbone.") else drawn)(piece)

    def loader(self, mesh: Mesh) -> StepLoader[PackedBatch]:
        expected: dict[str, str] = {self.config.encoder.kind: encoder_fingerprint(self.config.encoder)}
        share = Share(mesh)
        self._attend_by(share, choose(self.config.kernels, cuda=mesh.device.type == "cuda"))
        return PriorLoader(
            self.config,
            self.stage,
            self._vocabulary,
            self._stats,
            mesh.dp.rank,
            mesh.dp.size,
            expect_fingerprint=expected,
            plan=partial(self.plan, share),
        )

    def _attend_by(self, share: Share, kernels: Kernels) -> None:
        """FlexAttention where it is chosen. Its kernels are compiled for a length, so batches are padded to whole rows.

        Dropped conditions make rows shorter, too. A query stage does not attend over rows of this length.
        """
        share.flex = kernels.flex_attention
        if share.flex and not self.stage.query.enabled:
            share.multiple = self.stage.row_positions

    def plan(self, share: Share, segments: list[Segment]) -> Plan:
        """How a batch attends, prepared where it is made: masks of float32 serve bfloat16 queries as well."""
        return share.plan(segments, torch.float32)

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return prior_counts(batch, self.stage.z_loss)

    def amounts(self, batch: PackedBatch) -> dict[str, float]:
        return {
            "tokens": float(batch.token_ids.shape[0]),
            "latents": float(batch.latents.shape[0]),
            "flops": float(self.flops(batch)),
        }

    def flops(self, batch: PackedBatch) -> int:
        """Operations of forward and backward over the batch."""
        frozen = self.stage.trainable != "all"
        return prior_flops(self.config.prior, batch, self._vocabulary.size, backbone_frozen=frozen)

    def terms(self, outputs: Any, batch: PackedBatch) -> dict[str, LossTerm]:
        return prior_terms(outputs, self._share.region(batch), self.stage, self._kinds(batch))

    def _kinds(self, batch: PackedBatch) -> Kinds:
        return kinds_of(batch, list(self.config.data.kinds))

    @property
    def averages(self) -> Mapping[str, Sequence[str]]:
        return names_of(list(self.config.data.kinds))

    def boundaries(self, batch: PackedBatch) -> list[Boundary]:
        width = self.config.prior.hidden
        return [Boundary((self._share.rows(batch), width), dtype_of(self.stage.precision))]

    def heldout(self) -> Iterator[tuple[str, PackedBatch]]:
        limit, joint = self.config.eval.images, self.stage.joint.enabled
        for t in self.config.eval.fixed_t:
            for batch in heldout_prior_batches(
                self.config, self._vocabulary, self._stats, t, limit, ("text_to_image",), joint=joint
            ):
                yield f"@{t:g}", batch
        for batch in heldout_prior_batches(
            self.config, self._vocabulary, self._stats, 0.5, limit, tasks=("image_to_text",)
        ):
            yield "", batch
        for name, kind in heldout_sets(self.config).items():
            if any(self.stage.draws(task) for task in TASKS_OF[kind]):
                yield from self._heldout_of(name, kind)

    def _heldout_of(self, name: str, kind: SetKind) -> Iterator[tuple[str, PackedBatch]]:
        """Of a further set: what is said once, as it does not depend on the time, and what is drawn at every time."""
        limit, joint = self.config.eval.images, self.stage.joint.enabled
        given = self._vocabulary, self._stats

        def batches(t: float, task: Literal["image_to_text", "text_to_image"]) -> Iterator[PackedBatch]:
            if kind == "pairs":
                return heldout_prior_batches(self.config, *given, t, limit, (task,), joint=joint, name=name)
            return heldout_conversation_batches(self.config, name, *given, t, limit, joint=joint)

        if kind != "image_text_to_image":
            for batch in batches(0.5, "image_to_text"):
                yield f"_{name}", replace(batch, flow_index=batch.flow_index[:0])
        for t in self.config.eval.fixed_t if kind != "text" else ():
            for batch in batches(t, "text_to_image"):
                yield f"_{name}@{t:g}", batch

    @cached_property
    def description(self) -> dict[str, Any]:
        codec = read_weights_config(codec_folder(self.config, self.stage))
        return {
            "prior": self.config.prior.model_dump(mode="json"),
            "latent_channels": self._stats.mean.shape[0],
            "feature_channels": self._channels,
            "stats": self._stats.to_json(),
            "encoder_fingerprint": codec["encoder_fingerprint"],
            "codec_fingerprint": Manifest.read(self._run / "latents" / "train", "latent").fingerprint,
            "provenance": provenance(self.config, self.stage),
        }

    def export(self, folder: Path, weights: Mapping[str, Tensor], step: int) -> None:
        content = {**self.description, "step": step}
        export_weights(folder, content, weights, lambda place: self._vocabulary.save(place / "vocabulary.json"))

    def draw(self, model: nn.Module) -> tuple[Image.Image, list[str]]:
        assert isinstance(model, Transfusion)
        if self._codec is None:
            device = next(model.parameters()).device
            self._codec = load_codec(codec_folder(self.config, self.stage), device, model.dtype).model
        grid, labels = draw_prompts(self.config, self._codec, model, self._vocabulary, self.stats)
        if self.stage.draws("image_text_to_image"):
            edits = draw_heldout_edits(self.config, self._codec, model, self._vocabulary, self.stats)
            if edits is not None:
                grid, labels = one_above_the_other([grid, edits[0]]), [*labels, *edits[1]]
        return grid, labels


def part_of(prior: PriorConfig, vocabulary: int, latent_channels: int, feature_channels: int, mesh: Mesh) -> Part:
    """The layers of this rank's pp_stages, such that the slowest pp_stage is as fast as can be."""
    layout = mesh.layout
    if layout.pp == 1:
        return WHOLE
    costs = estimate(prior, vocabulary, latent_channels, feature_channels)
    mine = by_rank(split(costs, layout.pp_stages), layout.pp)[mesh.pp.rank]
    return Part(mesh.pp.rank == 0, mesh.last_pp_stage, mine)
