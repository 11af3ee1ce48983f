"""A stage of the curriculum: what it trains, on what, and how."""

import math
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from unicom_dist.config.schema.base import Fraction, NonNegative, Section, Unworkable


def _checked(weight: object) -> object:
    """Said once, and not for each of the two forms that a weight may have."""
    values = list(weight.values()) if isinstance(weight, dict) else [weight]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf for value in values):
        raise Unworkable(f"{weight!r} is no weight", "needs a number >= 0, or such numbers by set", "for example 0.5, or {train: 0.4, photos: 0.1}")
    return weight


Weight = Annotated[float | dict[str, float], BeforeValidator(_checked)]


class Mixture(Section):
    """Sampling weights of the tasks of a prior stage; any positive numbers, normalised to shares of samples.

    A task has one weight, and its sets are gone through as one; or a weight for each set, {SET: WEIGHT}.
    """

    text: Weight = Field(0.0, description="captions alone, and sets of text")
    text_to_image: Weight = Field(0.0, description="draw the image of a caption")
    image_to_text: Weight = Field(0.0, description="describe an image")
    image_text_to_image: Weight = Field(0.0, description="draw after images and words: edits")
    interleaved: Weight = Field(0.0, description="documents and conversations of text and images in any order")

    @property
    def streams(self) -> dict[str, float]:
        """The weights above 0, by TASK where its sets are drawn as one, by TASK/SET where they have their own."""
        found: dict[str, float] = {}
        for task in type(self).model_fields:
            weight = getattr(self, task)
            found |= {f"{task}/{name}": each for name, each in weight.items()} if isinstance(weight, dict) else {task: weight}
        return {stream: weight for stream, weight in found.items() if weight}

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.streams:
            raise Unworkable("all weights are 0", "there is nothing to draw from", "give at least one task a positive weight")
        return self


class JointConfig(Section):
    """A prior stage that goes on training the codec's compressor, which makes the latents, together with the backbone."""

    enabled: bool = Field(False, description="prior: train the compressor too, from the encoder's features")
    lambda_recon: NonNegative = Field(20.0, description="weight of the mean squared error of the features rebuilt from the latents, in variances of their channels")
    momentum: float = Field(0.01, gt=0, le=1, description="weight of a step in the running mean and variance by which the latents are normalised")
    collapse: Fraction = Field(0.1, description="the run ends when the latents' spread or effective rank falls below this share of what it was; 0 = never")


class QueryConfig(Section):
    """A prior stage that keeps the model as it is and trains queries of it, a connector and a flow decoder (Pathway II)."""

    enabled: bool = Field(False, description="prior: freeze the transformer; learnable queries ask it what a decoder of its own is to draw")
    queries: PositiveInt = Field(256, description="learnable vectors in the place of the image to be drawn")
    connector_layers: PositiveInt = Field(6, description="bidirectional layers, as wide as the transformer, between the queries and the decoder; MetaQuery 24, OpenUni 6")
    decoder_layers: PositiveInt = Field(12, description="layers of the flow decoder")
    decoder_width: int = Field(768, ge=4, multiple_of=4, description="width of the flow decoder")


class SpikeConfig(Section):
    """Steps whose loss or gradients are not finite, or far above what they were."""

    factor: NonNegative = Field(0.0, description="a step whose loss or gradient norm is above factor x its running median is recorded with its sample keys; 0 = none")
    window: PositiveInt = Field(100, description="steps of the running median; none is judged before there are so many")
    skip: int = Field(0, ge=0, description="steps in a row that are left out, and recorded, because their gradients are not finite; one more ends the run")


# The losses that a sample of a task is there for, by the weight of a prior stage.
LEARNED_BY: dict[str, tuple[str, ...]] = {
    "text": ("lambda_text",),
    "text_to_image": ("lambda_flow",),
    "image_to_text": ("lambda_text",),
    "image_text_to_image": ("lambda_flow",),
    "interleaved": ("lambda_text", "lambda_flow"),
}


class StageConfig(Section):
    """One step of the curriculum."""

    name: str = Field(description="unique; the run directory's subfolders are named after it", pattern=r"^[a-z][a-z0-9_-]*$")
    kind: Literal["codec", "latents", "prior"] = Field(description="what is trained, or `latents`: computed from the features by the codec")
    steps: int = Field(0, ge=0, description="optimizer steps; a latents stage has none")
    batch: PositiveInt = Field(32, description="codec: images per optimizer step over all ranks; prior: packed rows per step")
    micro_batches: PositiveInt = Field(1, description="pieces a rank cuts its share of the step into")
    row_positions: PositiveInt = Field(1024, description="prior: positions per packed row")
    mixture: Mixture = Mixture(text_to_image=1.0)
    mixture_changes: dict[PositiveInt, Mixture] = Field(
        {}, description="prior: other weights after so many steps, {STEP: {TASK: WEIGHT}}; tasks not named get 0, every source goes on where it stands"
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    schedule: Literal["constant", "cosine"] = Field("constant", description="of the learning rate after warm-up")
    min_lr_ratio: Fraction = Field(0.0, description="cosine: final learning rate over lr")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: NonNegative = Field(0.01, description="of AdamW, decoupled")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW: decay of the first and second moment")
    eps: float = Field(1e-6, gt=0, description="of AdamW")
    clip: NonNegative = Field(1.0, description="largest global gradient norm; 0 = no clipping")
    ema: Fraction = Field(0.999, description="decay of the weight average; 0 = none")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of forward and backward: auto = bfloat16 on GPUs and CPUs that multiply it fast; master weights and moments are float32"
    )
    lambda_text: NonNegative = Field(1.0, description="weight of the mean cross-entropy per text token")
    z_loss: NonNegative = Field(0.0, description="prior: weight of log^2 Z beside the cross-entropy, Z the normaliser of its softmax: keeps the logits from drifting")
    lambda_flow: NonNegative = Field(5.0, description="weight of the mean squared flow error per latent channel")
    trainable: Literal["all", "connector", "decoder"] = Field(
        "all", description="connector (prior): only the visual connector and heads; decoder (codec): not the compressor, which is that of the joint stage before"
    )
    joint: JointConfig = JointConfig()
    query: QueryConfig = QueryConfig()
    spike: SpikeConfig = SpikeConfig()
    log_every: PositiveInt = Field(10, description="steps between metric records")
    eval_every: int = Field(0, ge=0, description="steps between held-out losses at fixed t; 0 = only at the end")
    sample_every: int = Field(0, ge=0, description="steps between picture grids; 0 = only at the end")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints; 0 = only at the end")

    @property
    def tasks(self) -> list[str]:
        """The tasks that the mixture has at any time of the stage."""
        return [task for task in Mixture.model_fields if self.draws(task)]

    @model_validator(mode="after")
    def _learned(self) -> Self:
        if self.kind != "prior":
            return self
        for task in self.tasks:
            if not any(getattr(self, weight) for weight in LEARNED_BY[task]):
                raise Unworkable(
                    f"{task} in the mixture with " + " and ".join(f"{weight} = 0" for weight in LEARNED_BY[task]),
                    "these samples would be computed and nothing learned of them",
                    f"mixture.{task}: 0, or a weight above 0",
                )
        drawn = [task for task in self.tasks if "lambda_flow" in LEARNED_BY[task]]
        if self.joint.enabled and not drawn:
            raise Unworkable("joint.enabled = true without a task that draws", "the compressor is trained by the images that are drawn", "give mixture.text_to_image a weight, or joint.enabled: false")
        if self.trainable == "connector" and self.tasks == ["text"]:
            raise Unworkable("trainable = connector with text alone", "neither connector nor heads have a part in it", "give a task with images a weight, or trainable: all")
        return self

    @property
    def streams(self) -> list[str]:
        """What the mixture draws from at any time of the stage, as `Mixture.streams` names it."""
        return list(dict.fromkeys(name for mixture in (self.mixture, *self.mixture_changes.values()) for name in mixture.streams))

    def draws(self, task: str) -> bool:
        """Whether the task has a weight at any time of the stage."""
        return any(stream.partition("/")[0] == task for stream in self.streams)

    def mixture_at(self, step: int) -> Mixture:
        """The weights in the step after `step` others."""
        begun = [after for after in self.mixture_changes if after <= step]
        return self.mixture_changes[max(begun)] if begun else self.mixture

    @model_validator(mode="after")
    def _changes(self) -> Self:
        for after in self.mixture_changes:
            if after >= self.steps:
                raise Unworkable(f"mixture_changes.{after} of a stage of steps = {self.steps}", "it would never come", f"change it after 1 to {self.steps - 1} steps")
        return self

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if (self.kind == "latents") != (self.steps == 0):
            need = "no optimizer steps" if self.kind == "latents" else "optimizer steps"
            raise Unworkable(
                f"steps = {self.steps}",
                f"a {self.kind} stage has {need}",
                "remove `steps`" if self.kind == "latents" else "set steps >= 1",
            )
        only = {"connector": "prior", "decoder": "codec"}.get(self.trainable, self.kind)
        if self.kind != only:
            raise Unworkable(f"trainable = {self.trainable}", f"a {self.kind} stage has no such part", f"use it with kind: {only}, or trainable: all")
        if self.joint.enabled and self.kind != "prior":
            raise Unworkable("joint.enabled = true", f"a {self.kind} stage has no backbone to train with", "use it with kind: prior")
        if self.query.enabled and (self.kind != "prior" or self.joint.enabled or self.trainable != "all"):
            other = f"kind = {self.kind}" if self.kind != "prior" else "joint.enabled = true" if self.joint.enabled else f"trainable = {self.trainable}"
            raise Unworkable(f"query.enabled = true with {other}", "it trains queries, connector and flow decoder beside a frozen transformer, nothing else", "use kind: prior, joint.enabled: false and trainable: all")
        if self.warmup > self.steps:
            raise Unworkable(
                f"warmup = {self.warmup}",
                f"the stage ends after steps = {self.steps}, before the learning rate is reached",
                f"use warmup <= {self.steps}",
            )
        return self
