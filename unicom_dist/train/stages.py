"""What differs between the kinds of training stage: model, data, loss, held-out loss and what is exported.

A `Task` hands these to the loop. Losses come as sums with counts, so that the loop can divide by the counts of the
whole step (all ranks, all micro-batches).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from unicom_dist.checkpoint.weights import Chosen, StoredWeights, export_weights, read_weights_config, replace_folder
from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, PriorConfig, StageConfig, held_out_set
from unicom_dist.data.loader import (
    CodecLoader,
    PriorLoader,
    fixed_codec_batches,
    heldout_codec_batches,
    heldout_conversation_batches,
    heldout_conversations,
    heldout_prior_batches,
)
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.pairs import feature_channels, open_set
from unicom_dist.data.prefetch import StepLoader
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.backbone import WHOLE, Part
from unicom_dist.models.codec import Codec, CodecBatch, LatentStats
from unicom_dist.models.decoder_weights import decoder_source
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.models.encoders.trained import TrainedEncoder, export_encoder
from unicom_dist.models.init import Source, fill, local_values
from unicom_dist.models.kernels import use
from unicom_dist.models.published import published_source
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.sharding import outline
from unicom_dist.models.share import Share
from unicom_dist.models.target import Target, build_target, check_vae, vae_fingerprint
from unicom_dist.models.transfusion import Transfusion, initial_weight
from unicom_dist.objective.perceptual_loss import PerceptualLoss, load_perceptual, scheduled
from unicom_dist.objective.terms import LossTerm, codec_counts, codec_terms, prior_counts, prior_terms
from unicom_dist.parallel.kernels import choose
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.parallel.pipeline.runtime import Payload
from unicom_dist.parallel.pipeline.split import by_rank, estimate, split
from unicom_dist.parallel.precision import dtype_of
from unicom_dist.parallel.tensor import materialise
from unicom_dist.sample.loading import load_codec
from unicom_dist.tracking.flops import codec_flops, prior_flops
from unicom_dist.train.codec_inputs import CodecInputs
from unicom_dist.train.linear_start import PICTURES, linear_start, set_start
from unicom_dist.train.pictures import draw_heldout_edits, draw_prompts, draw_reconstructions, one_above_the_other

ENCODER = "encoder."  # names of a trained encoder's tensors, within a codec
Batch = TypeVar("Batch", CodecBatch, PackedBatch)


class Task(ABC, Generic[Batch]):
    """One training stage over data `Batch`. Building the module and the loader are separate, cheap-first steps."""

    def __init__(self, config: Config, stage: StageConfig) -> None:
        self.config, self.stage = config, stage

    @abstractmethod
    def build(self, mesh: Mesh) -> nn.Module:
        """This rank's slice of the model with its initial weights, parameters frozen as the stage says.

        Under ZeRO it may be on the meta device: then `initial` has the weights.
        """

    def initial(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Initial values of a parameter of `build` that is on the meta device, float32 and of its shape."""
        raise NotImplementedError(f"{name}: the model has its weights")

    @abstractmethod
    def loader(self, mesh: Mesh) -> StepLoader[Batch]:
        """This rank's training batches."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """Items of every loss term in a batch, known before the forward pass."""

    @abstractmethod
    def amounts(self, batch: Batch) -> dict[str, float]:
        """What throughput is measured in ("tokens", "latents", "images") and "flops" where they can be counted."""

    def completed(self, batch: Batch) -> Batch:
        """The batch, on the device, with what frozen networks make of it: all that the forward pass reads."""
        return batch

    @abstractmethod
    def terms(self, outputs: Any, batch: Batch) -> dict[str, LossTerm]:
        """The loss terms of this rank's share of a batch: names as in `counts`."""

    def outcome(self, outputs: Any, batch: Batch, first: bool, last: bool) -> tuple[Payload, dict[str, LossTerm]]:
        """Of what a chunk returned: what goes on to the next, and the loss terms that arise in this one.

        `first`, `last`: whether the model begins or ends in the chunk.
        """
        return ((), self.terms(outputs, batch)) if last else ((outputs,), {})

    def boundaries(self, batch: Batch) -> list[Boundary]:
        """What passes between the pp_stages for a batch: as `outcome` hands it on."""
        return []

    def begins(self, name: str) -> bool:
        """Whether the stage starts this tensor from `build`'s values rather than from the stage before."""
        return False

    def begin_step(self, step: int) -> None:
        """What of the loss follows the step; `step` steps of the stage are finished."""
        return

    def after_step(self, mesh: Mesh) -> None:
        """What the model keeps beside its weights follows the step. Collective over the world."""

    def figures(self, mesh: Mesh, step: int) -> dict[str, float]:
        """Further values for the metrics, the same on every rank. Collective over the world."""
        return {}

    def restore(self, description: Mapping[str, Any]) -> None:
        """Take up what the model keeps beside its weights from a checkpoint's `description`."""

    @abstractmethod
    def heldout(self) -> Iterator[tuple[str, Batch]]:
        """(suffix, batch): fixed held-out batches; the loss terms of each are reported as `loss/<term><suffix>`."""

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What the model is, beside its weights: enough to build it and to draw with it. Plain JSON values."""

    @abstractmethod
    def export(self, folder: Path, weights: Mapping[str, Tensor], step: int) -> None:
        """Write the averaged weights as a folder others can read. Called on rank 0."""

    @abstractmethod
    def draw(self, model: nn.Module) -> tuple[Image.Image, list[str]]:
        """A grid of pictures of the model as it is, and their labels. Called on rank 0."""


class CodecTask(Task[CodecBatch]):
    """Compressor, decompressor and decoder on images and their features."""

    def __init__(self, config: Config, stage: StageConfig) -> None:
        super().__init__(config, stage)
        pairs = open_set(config, "train")
        self._channels = feature_channels(pairs, config.encoder.kind)
        self._fingerprint = pairs.part_manifests[config.encoder.kind].fingerprint
        self._target: Target | None = None
        self._perceptual: PerceptualLoss | None = None
        self._now = scheduled(config.codec, 0)  # the loss of the step
        self._start: tuple[Tensor, Tensor] | None = None  # of the compressor's linear path
        self._flops: dict[tuple[int, ...], float] = {}  # by shape: counting takes longer than a small step may
        with torch.device("meta"):  # an engine may have split the weights of the model itself
            self._shapes = Codec(config.codec, self._channels)

    def build(self, mesh: Mesh) -> nn.Module:
        if self._target is None:
            self._target = build_target(self.config.codec.decoder, mesh.device)
            self._inputs = CodecInputs(self.config, self._target)
            self._perceptual = load_perceptual(self.config.codec, self._target)
            if self._perceptual is not None:
                self._perceptual.to(mesh.device, dtype_of(self.stage.precision))
        decoder = self.config.codec.decoder
        first = not self.config.codec_before(self.stage)  # later stages continue the one before
        published = bool(decoder.init_from) and first
        module = Codec(self.config.codec, self._channels, self.config.seed, outline=published)
        if published:
            self._source = decoder_source(module.decoder, self.config.seed)
            if mesh.layout.zero_stage == 0:
                materialise(module.decoder)
                fill(module.decoder, self._source, "decoder.")
        if self.config.codec.compressor.start == "linear" and first:
            if self._start is None:
                batches = fixed_codec_batches(self.config, "train", 0.0, PICTURES)
                self._start = linear_start(module.compressor, (self._inputs(b.to(mesh.device)) for b in batches))
            set_start(module.compressor, self._start)
        if self.config.codec.encoder_trainable:
            module.encoder = TrainedEncoder(self.config.encoder)
        if self.stage.trainable == "decoder":
            joint = StoredWeights(joint_folder(self.config, self.stage) / "compressor")
            values = {name: joint[name].float() for name in joint if self.begins(name)}
            module.load_state_dict(values, strict=False)
            module.compressor.requires_grad_(False)
        return module

    def initial(self, name: str, parameter: nn.Parameter) -> Tensor:
        return local_values(name, parameter, self._source)

    def begins(self, name: str) -> bool:
        return self.stage.trainable == "decoder" and name.startswith("compressor.")

    def loader(self, mesh: Mesh) -> StepLoader[CodecBatch]:
        expected: dict[str, str] = {self.config.encoder.kind: encoder_fingerprint(self.config.encoder)}
        return CodecLoader(self.config, self.stage, mesh.dp.rank, mesh.dp.size, expect_fingerprint=expected)

    def counts(self, batch: CodecBatch) -> dict[str, int]:
        return codec_counts(batch, self._now)

    def begin_step(self, step: int) -> None:
        self._now = scheduled(self.config.codec, step)

    def figures(self, mesh: Mesh, step: int) -> dict[str, float]:
        ramped = self.config.codec.perceptual_start + self.config.codec.perceptual_ramp
        return {"perceptual_weight": self._now.perceptual_weight} if ramped else {}

    def amounts(self, batch: CodecBatch) -> dict[str, float]:
        shape = (*batch.features.shape, *batch.noise.shape, int(batch.mask.sum()))
        if shape not in self._flops:
            self._flops[shape] = float(codec_flops(self._shapes, batch))
        return {"images": float(batch.images.shape[0]), "flops": self._flops[shape]}

    def terms(self, outputs: Any, batch: CodecBatch) -> dict[str, LossTerm]:
        return codec_terms(outputs, batch, self._now, self._perceptual)

    def completed(self, batch: CodecBatch) -> CodecBatch:
        return self._inputs(batch)

    def restore(self, description: Mapping[str, Any]) -> None:
        check_vae(self.config.codec.decoder, description.get("vae_fingerprint", ""))

    def heldout(self) -> Iterator[tuple[str, CodecBatch]]:
        for t in self.config.eval.fixed_t:
            for batch in heldout_codec_batches(self.config, t, self.config.eval.images):
                yield f"@{t:g}", batch

    @cached_property
    def description(self) -> dict[str, Any]:
        own = {}
        if self.stage.trainable == "decoder":  # it goes with the prior of the joint stage
            own = {"fingerprint": read_weights_config(joint_folder(self.config, self.stage))["codec_fingerprint"]}
        if self.config.codec.decoder.space == "vae":
            own["vae_fingerprint"] = vae_fingerprint(self.config.codec.decoder)
        return own | {
            "codec": self.config.codec.model_dump(mode="json"),
            "encoder": self.config.encoder.model_dump(mode="json"),
            "encoder_fingerprint": self._fingerprint,
            "encoder_channels": self._channels,
            "provenance": provenance(self.config, self.stage),
        }

    def export(self, folder: Path, weights: Mapping[str, Tensor], step: int) -> None:
        own: dict[str, Any] = {}
        if self.config.codec.encoder_trainable:
            place = Path(self.config.run_dir) / "encoder"
            trained = Chosen(weights, lambda name: name.startswith(ENCODER))
            replace_folder(place, lambda folder: export_encoder(self.config.encoder, trained, folder))
            weights = Chosen(weights, lambda name: not name.startswith(ENCODER))
            encoder = self.config.encoder.model_copy(update={"path": str(place)})
            codec = self.config.codec.model_copy(update={"encoder_trainable": False})  # from here on it is as any other
            own = {
                "codec": codec.model_dump(mode="json"),
                "encoder": encoder.model_dump(mode="json"),
                "encoder_fingerprint": encoder_fingerprint(encoder),
            }
        export_weights(folder, {**self.description, **own, "step": step}, weights)

    def draw(self, model: nn.Module) -> tuple[Image.Image, list[str]]:
        assert isinstance(model, Codec)
        assert self._target is not None
        return draw_reconstructions(self.config, model, self._target)


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
        use(module, choose(self.config.kernels, cuda=mesh.device.type == "cuda"))
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
        share.flex = choose(self.config.kernels, cuda=mesh.device.type == "cuda").flex_attention
        return PriorLoader(
            self.config,
            self.stage,
            self._vocabulary,
            self._stats,
            mesh.dp.rank,
            mesh.dp.size,
            expect_fingerprint=expected,
            plan=partial(share.plan, dtype=torch.float32),  # masks serve bfloat16 queries as well
        )

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return prior_counts(batch, self.stage.z_loss)

    def amounts(self, batch: PackedBatch) -> dict[str, float]:
        frozen = self.stage.trainable != "all"
        flops = prior_flops(self.config.prior, batch, self._vocabulary.size, backbone_frozen=frozen)
        return {
            "tokens": float(batch.token_ids.shape[0]),
            "latents": float(batch.latents.shape[0]),
            "flops": float(flops),
        }

    def terms(self, outputs: Any, batch: PackedBatch) -> dict[str, LossTerm]:
        return prior_terms(outputs, self._share.region(batch), self.stage)

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
        for name, task in heldout_conversations(self.config).items():
            for t in self.config.eval.fixed_t if getattr(self.stage.mixture, task) else ():
                for batch in heldout_conversation_batches(
                    self.config, name, self._vocabulary, self._stats, t, limit, joint=joint
                ):
                    yield f"_{name.removesuffix(held_out_set(''))}@{t:g}", batch

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
        if self.stage.mixture.image_text_to_image:
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


def codec_folder(config: Config, stage: StageConfig) -> Path:
    """Exported weights of the last codec stage before `stage`. DataError when the recipe has none there."""
    name = config.codec_before(stage)
    if not name:
        what = f"there is no codec stage before {stage.name!r}"
        raise DataError(what, "the prior draws what a codec decodes", "add one to `stages`")
    return Path(config.run_dir) / "weights" / name


def joint_folder(config: Config, stage: StageConfig) -> Path:
    """Exported weights of the last joint stage before `stage`."""
    before = config.stages[: config.stages.index(stage)]
    return Path(config.run_dir) / "weights" / [other.name for other in before if other.joint.enabled][-1]


def read_stats(run_dir: Path) -> LatentStats:
    """Statistics of the run's latents. DataError when the latents stage has not finished."""
    path = run_dir / "latents" / "stats.json"
    try:
        return LatentStats.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "the prior learns normalised latents", "run the latents stage first"
        ) from None


def provenance(config: Config, stage: StageConfig) -> dict[str, Any]:
    """Which recipe and stage made the weights."""
    return {"recipe": config.name, "seed": config.seed, "stage": stage.name, "data": config.data.source}
