"""The training stage of the codec: compressor, decompressor and decoder, and the encoder if it learns too."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unicom_dist.checkpoint.weights import Chosen, StoredWeights, export_weights, read_weights_config, replace_folder
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.loader import (
    CodecLoader,
    fixed_codec_batches,
    heldout_codec_batches,
)
from unicom_dist.data.pairs import feature_channels, open_set
from unicom_dist.data.prefetch import StepLoader
from unicom_dist.models.codec import Codec, CodecBatch
from unicom_dist.models.decoder_weights import decoder_source
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.models.encoders.trained import TrainedEncoder, export_encoder
from unicom_dist.models.init import fill, local_values
from unicom_dist.models.target import Target, build_target, check_vae, vae_fingerprint
from unicom_dist.objective.perceptual_loss import PerceptualLoss, load_perceptual, scheduled
from unicom_dist.objective.terms import LossTerm, codec_counts, codec_terms
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.precision import dtype_of
from unicom_dist.parallel.tensor import materialise
from unicom_dist.tracking.flops import codec_flops
from unicom_dist.train.codec_inputs import CodecInputs
from unicom_dist.train.linear_start import PICTURES, linear_start, set_start
from unicom_dist.train.pictures import draw_reconstructions
from unicom_dist.train.stages import Task, joint_folder, provenance

ENCODER = "encoder."  # names of a trained encoder's tensors, within a codec


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
                inputs = (self._inputs(batch.to(mesh.device)) for batch in batches)
                self._start = linear_start(module.compressor, inputs, self.config.codec.latent_scale == "channel")
            set_start(module.compressor, self._start)
        if self.config.codec.encoder_trainable:
            module.encoder = TrainedEncoder(self.config.encoder)
        if self.stage.trainable == "decoder":
            joint = StoredWeights(joint_folder(self.config, self.stage) / "compressor")
            values = {name: joint[name].float() for name in joint if self.begins(name)}
            module.load_state_dict(values, strict=False)
            module.compressor.requires_grad_(False)
        trained = {name.partition(".")[0] for name, weight in module.named_parameters() if weight.requires_grad}
        assert ("encoder" in trained) == self.config.codec.encoder_trainable, "the encoder stays frozen"
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
