"""The whole tree, and the rules between its sections."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from unicom_dist.config.layout import Layout, refusals
from unicom_dist.config.schema.base import Section, Unworkable, multiples
from unicom_dist.config.schema.codec import CodecConfig
from unicom_dist.config.schema.data import TASKS_OF, DataConfig, EncoderConfig, FeaturesConfig
from unicom_dist.config.schema.parallel import DeepSpeedConfig, KernelsConfig, ParallelConfig
from unicom_dist.config.schema.prior import PriorConfig
from unicom_dist.config.schema.stage import StageConfig
from unicom_dist.config.schema.use import AblationConfig, EvalConfig, SampleConfig, TrackingConfig


class Config(Section):
    """A recipe."""

    name: str = Field(description="of the run, shown in reports and MLflow")
    seed: int = Field(0, ge=0, description="of weights, sample order, noise and augmentation")
    run_dir: str = Field(description="everything the run writes")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept per stage")
    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    features: FeaturesConfig = FeaturesConfig()
    codec: CodecConfig = CodecConfig()
    prior: PriorConfig = PriorConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    kernels: KernelsConfig = KernelsConfig()
    stages: list[StageConfig] = Field(default_factory=list)
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()
    ablation: AblationConfig = AblationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _stages(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise Unworkable(f"stages = {names}", "folders and overrides are named after stages", "give each stage its own name")
        for refusal in refusals(self.parallel, self.prior, self.parallel.nproc):
            raise Unworkable(refusal.what, refusal.why, refusal.remedy)
        for stage in self.stages:
            replicas = self.layout(stage, self.parallel.nproc).dp
            share = replicas * stage.micro_batches
            for stream in stage.streams if stage.kind == "prior" else ():
                task, _, name = stream.partition("/")
                there = self.data.sets_of(task)
                if not there or (name and name not in there):
                    raise Unworkable(
                        f"stages.{stage.name}.mixture{'' if stream in stage.mixture.streams else '_changes'} with {task}{f': {name}' if name else ''}",
                        f"no set of data.sets {f'called {name} ' if name else ''}is of that task, so there is nothing to draw",
                        f"data.sets: {{{name or 'SET'}: {task if task in TASKS_OF else 'pairs'}}}, or " + (f"one of {', '.join(there)}" if there else f"{task}: 0"),
                    )
            if stage.kind != "latents" and stage.batch % share:
                raise Unworkable(
                    f"stages.{stage.name}.batch = {stage.batch}",
                    f"it does not divide into dp x micro_batches = {replicas} x {stage.micro_batches} equal pieces",
                    f"use {multiples(stage.batch, share)}",
                )
        return self

    @model_validator(mode="after")
    def _views(self) -> Self:
        buckets, crop = self.codec.decoder.buckets, self.encoder.crop
        if (buckets == "aspect") != (crop == "bucket"):
            raise Unworkable(
                f"codec.decoder.buckets = {buckets} with encoder.crop = {crop}",
                "the encoder has to see what the decoder draws, no more and no less of the picture",
                "codec.decoder.buckets: aspect with encoder.crop: bucket, or codec.decoder.buckets: square with encoder.crop: none",
            )
        return self

    @model_validator(mode="after")
    def _trained_encoder(self) -> Self:
        others = {
            "encoder.kind = random": self.encoder.kind == "random",
            f"codec.condition_dropout = {self.codec.condition_dropout}": self.codec.condition_dropout > 0,
            **{f"stages.{stage.name}.trainable = decoder": stage.trainable == "decoder" for stage in self.stages},
        }
        for other, found in others.items():
            if self.codec.encoder_trainable and found:
                raise Unworkable(f"codec.encoder_trainable = true with {other}", "this encoder or these features stay as they are", "use codec.encoder_trainable: false, or change the other")
        return self

    @model_validator(mode="after")
    def _perceptual(self) -> Self:
        if self.codec.perceptual == self.encoder.kind:
            raise Unworkable(
                f"codec.perceptual = {self.codec.perceptual} with encoder.kind = {self.encoder.kind}",
                "what the encoder does not see, a loss in its own features does not miss",
                "use another network, such as lpips-alex",
            )
        return self

    @model_validator(mode="after")
    def _understanding(self) -> Self:
        reading, spatial = self.prior.understanding, self.codec.compressor.spatial
        others = {
            f"codec.compressor.spatial = {spatial}": (spatial != "none", "features and latents stand side by side, and these latents are fewer"),
            **{f"stages.{s.name}.joint.enabled = true": (s.joint.enabled, "the latents that are read would be those of the compressor before") for s in self.stages},
        }
        for other, (found, why) in others.items():
            if reading != "raw" and found:
                raise Unworkable(f"prior.understanding = {reading} with {other}", why, "prior.understanding: raw, or change the other")
        return self

    @model_validator(mode="after")
    def _joint(self) -> Self:
        joint = ""  # the last joint stage so far
        compressor = self.codec.compressor
        for stage in self.stages:
            if stage.joint.enabled and compressor.kind == "identity":
                raise Unworkable(
                    f"stages.{stage.name}.joint.enabled = true with codec.compressor.kind = identity",
                    "an identity has nothing to train",
                    "codec.compressor.kind: attention or mlp, or joint.enabled: false",
                )
            if stage.joint.enabled and self.codec.latent_scale == "shared":
                raise Unworkable(
                    f"stages.{stage.name}.joint.enabled = true with codec.latent_scale = shared",
                    "the latents of a joint stage are normalised by running deviations, channel by channel",
                    "codec.latent_scale: channel, or joint.enabled: false",
                )
            if stage.joint.enabled and (compressor.spatial != "none" or compressor.bottleneck == "kl"):
                key = "spatial" if compressor.spatial != "none" else "bottleneck"
                raise Unworkable(
                    f"stages.{stage.name}.joint.enabled = true with codec.compressor.{key} = {getattr(compressor, key)}",
                    "joint training rebuilds the features of every token from its latent, without sampling",
                    f"codec.compressor.{key}: none, or joint.enabled: false",
                )
            if stage.kind == "prior" and joint and not stage.joint.enabled:
                raise Unworkable(
                    f"stages.{stage.name}.joint.enabled = false after the joint stage {joint}",
                    "it would read latents of the compressor as it was before",
                    f"enable it here too, or put {stage.name} before {joint}",
                )
            if stage.trainable == "decoder" and not joint:
                raise Unworkable(
                    f"stages.{stage.name}.trainable = decoder",
                    "the compressor is taken from a joint stage, and there is none before",
                    "put it after a prior stage with joint.enabled: true, or use trainable: all",
                )
            joint = stage.name if stage.joint.enabled else joint
        return self

    @model_validator(mode="after")
    def _query(self) -> Self:
        p, begun = self.parallel, ""  # the last query stage so far
        split = {key: getattr(p, key) for key in ("tp", "pp", "ulysses") if getattr(p, key) > 1}
        for stage in self.stages:
            if stage.query.enabled and split:
                raise Unworkable(
                    f"stages.{stage.name}.query.enabled = true with " + ", ".join(f"parallel.{key} = {size}" for key, size in split.items()),
                    "queries, connector and flow decoder are small and trained data-parallel only",
                    "parallel: {tp: 1, pp: 1, ulysses: 1} with a zero_stage of 0 to 3",
                )
            before = [other for other in self.stages[: self.stages.index(stage)] if other.kind == "prior"]
            if stage.query.enabled and not before and not self.prior.init_from:
                raise Unworkable(
                    f"stages.{stage.name}.query.enabled = true in the first prior stage, without prior.init_from",
                    "the transformer that the queries ask would stay as it was drawn at random",
                    f"put a prior stage before {stage.name}, or name published weights in prior.init_from",
                )
            if stage.kind == "prior" and begun and not stage.query.enabled:
                raise Unworkable(
                    f"stages.{stage.name}.query.enabled = false after the query stage {begun}",
                    "it would move the transformer that the queries of that stage ask",
                    f"enable it here too, or put {stage.name} before {begun}",
                )
            begun = stage.name if stage.query.enabled else begun
        return self

    def codec_before(self, stage: StageConfig) -> str:
        """Name of the last codec stage before `stage`; "" when there is none."""
        names = [other.name for other in self.stages[: self.stages.index(stage)] if other.kind == "codec"]
        return names[-1] if names else ""

    def layout(self, stage: StageConfig, world: int) -> Layout:
        """How `world` ranks share a stage: as `parallel` says for a prior; a codec is small and only data-parallel."""
        layout = Layout.of(self.parallel, world)
        return layout if stage.kind == "prior" else layout.data_parallel()

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`; KeyError if there is none."""
        return {stage.name: stage for stage in self.stages}[name]
