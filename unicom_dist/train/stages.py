"""What differs between the kinds of training stage: model, data, loss, held-out loss and what is exported.

A `Task` hands these to the loop. Losses come as sums with counts, so that the loop can divide by the counts of the
whole step (all ranks, all micro-batches).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image
from torch import Tensor, nn

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.prefetch import StepLoader
from unicom_dist.models.codec import CodecBatch, LatentStats
from unicom_dist.models.segments import PackedBatch
from unicom_dist.objective.terms import LossTerm
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.parallel.pipeline.runtime import Payload

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

    @property
    def averages(self) -> Mapping[str, Sequence[str]]:
        """Names of what the items of a term are broken down to, for the terms that are."""
        return {}

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
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "the prior learns normalised latents", "run the latents stage first"
        ) from None


def provenance(config: Config, stage: StageConfig) -> dict[str, Any]:
    """Which recipe and stage made the weights."""
    return {"recipe": config.name, "seed": config.seed, "stage": stage.name, "data": config.data.source}
