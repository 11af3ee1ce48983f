"""Pictures, their encoder and its features."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from unicom_dist.config.schema.base import Fraction, Section, Unworkable

EDITS = "edits"  # the set of edits that ingest makes
TRAIN = "train"  # the set of pairs that every recipe has
SetKind = Literal["pairs", "text", "image_text_to_image", "interleaved"]
TASKS_OF: dict[SetKind, tuple[str, ...]] = {  # the tasks that samples of a set serve
    "pairs": ("text", "text_to_image", "image_to_text"),
    "text": ("text",),
    "image_text_to_image": ("image_text_to_image",),
    "interleaved": ("interleaved",),
}


def held_out_set(name: str) -> str:
    """The set that is to the set `name` what heldout/ is to train/, and `heldout` itself of that."""
    return "heldout" if name == TRAIN else f"{name}-heldout"


class DataConfig(Section):
    """Image-text pairs and where their shards are."""

    source: str = Field("fluent-emoji", description="`fluent-emoji`, a folder, a .csv/.jsonl/.parquet table, or a glob of tars")
    path: str = Field("data/fluent-emoji", description="folder of the shard sets train/, augmented/ and heldout/")
    image_px: PositiveInt = Field(256, description="longest side of the stored images, pixels")
    held_out: Fraction = Field(0.08, description="share of the keys kept for evaluation, chosen by key hash")
    augmented_views: int = Field(0, ge=0, description="further views per training image (background, scale, shift, flip)")
    edits: int = Field(0, ge=0, description="edits (recolour, mirror, crop, compose) made from the training images, as the set edits/; a fifth as many from held-out ones, as edits-heldout/")
    shard_samples: PositiveInt = Field(512, description="samples per tar")
    languages: list[str] = Field(["en"], description="CLDR languages the captions are taken from")
    sets: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], SetKind] = Field(
        default_factory=dict, description="further sets under `path` and what they hold: pairs, as train; text; or conversations and documents, by their task"
    )
    limit: int = Field(0, ge=0, description="use only the first N images of the source; 0 = all")
    max_bad_fraction: Fraction = Field(0.01, description="stop when more than this share of the samples is malformed")

    @property
    def kinds(self) -> dict[str, SetKind]:
        """What every set holds that a prior is trained with."""
        return {TRAIN: "pairs", **self.sets}

    @property
    def pairs(self) -> list[str]:
        """The sets of pairs."""
        return [name for name, kind in self.kinds.items() if kind == "pairs"]

    @property
    def further_sets(self) -> list[str]:
        """Names of the sets beside train, each followed by its held-out one; not all of them need be there."""
        names = dict.fromkeys([*self.sets, *([EDITS] if self.edits else [])])
        return [each for name in names for each in (name, held_out_set(name))]

    def sets_of(self, task: str) -> list[str]:
        """The sets whose samples serve a task."""
        return [name for name, kind in self.kinds.items() if task in TASKS_OF[kind]]

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name in self.sets:
            if name in (TRAIN, "augmented", "heldout") or name.endswith(held_out_set("")):
                raise Unworkable(f"sets.{name}", "a set of this name is made of data.source", "give it another name")
        return self


class EncoderConfig(Section):
    """The frozen image encoder."""

    kind: Literal["siglip2", "efficientnet-lite2", "random"] = Field("siglip2", description="`random` is for tests only")
    path: str = Field("", description="folder or hub id of the published weights")
    levels: Literal["last", "pyramid"] = Field("last", description="pyramid: four depths of efficientnet-lite2 side by side, as many channels")
    image_px: PositiveInt = Field(256, description="side of the square view for encoders with a fixed grid, pixels")
    max_patches: PositiveInt = Field(1024, description="most patches per image (NaFlex encoders keep the aspect ratio)")
    crop: Literal["none", "bucket"] = Field("none", description="bucket: see only the part that codec.decoder.buckets: aspect draws; goes with it")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the forward pass")
    batch: PositiveInt = Field(32, description="images per forward pass")

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if self.levels == "pyramid" and self.kind != "efficientnet-lite2":
            raise ValueError(f"levels = pyramid exists for efficientnet-lite2 only; kind = {self.kind} has levels = last")
        if self.crop == "bucket" and self.kind == "efficientnet-lite2":
            raise Unworkable(
                "crop = bucket with kind = efficientnet-lite2",
                "it sees squares, whatever the shape of the picture",
                "use kind: siglip2, or crop: none",
            )
        return self


class FeaturesConfig(Section):
    """The Ray job that writes feature tars."""

    workers: int = Field(0, ge=0, description="Ray actors; 0 = one per GPU, or one per core without GPUs")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="stored precision")
