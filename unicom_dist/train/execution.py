"""The micro-batches of a step through this rank's slice of the model, whatever the layout.

Every rank of a replica (one coordinate of dp) holds the same batches. Between pp_stages hidden states travel; the loss
arises in the last chunk of the last pp_stage. With one pp_stage the same code runs and nothing is sent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from unicom_dist.objective.terms import LossTerm, total
from unicom_dist.parallel.engine import Engine
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.parallel.pipeline.runtime import Payload, Pipeline
from unicom_dist.parallel.pipeline.stage import AutogradStage, Root
from unicom_dist.train.stages import Task
from unicom_dist.train.watchdog import Watchdog

Terms = Mapping[str, LossTerm]


class Execution:
    """Forward and backward of a stage's batches. Constructing it is collective over the pipeline axis."""

    def __init__(self, task: Task[Any], engine: Engine, mesh: Mesh, watchdog: Watchdog) -> None:
        self._task, self._engine, self._mesh, self._watchdog = task, engine, mesh, watchdog
        layout = mesh.layout
        schedule = layout.schedule if layout.pp > 1 else "1f1b"  # alone, the order that holds one micro-batch at a time
        self._last_chunk = layout.pp_stages_per_rank - 1
        self._pipeline = Pipeline(mesh.pp, mesh.device, schedule, layout.pp_stages_per_rank)

    def train(self, batches: Sequence[Any], counts: Mapping[str, int], observe: Callable[[Terms], None]) -> None:
        """Gradients of all micro-batches of a step, reduced; `counts`: items per term of the whole step.

        `observe` is handed each micro-batch's loss terms, in the last pp_stage alone. Collective over the world.
        """

        def compute(micro: int, chunk: int, received: Payload) -> tuple[Payload, Tensor | None]:
            self._watchdog.doing("forward", micro, chunk)
            output = self._engine(batches[micro], *self._inputs(chunk, received))
            if not self._is_last(chunk):
                return (output,), None
            terms = self._task.terms(output, batches[micro])
            observe(terms)
            return (), total(terms, counts, self._mesh.zero.size)

        stage = AutogradStage(compute, self._backward)
        with self._engine.accumulate():
            self._pipeline.run(stage, self._boundaries(batches))
            self._watchdog.doing("reduction of the gradients")

    def _backward(self, roots: Sequence[Root], gradients: Sequence[Tensor | None]) -> None:
        self._watchdog.doing("backward")
        (root,), (gradient,) = roots, gradients
        self._engine.backward(root, gradient)  # type: ignore[arg-type]

    def _boundaries(self, batches: Sequence[Any]) -> list[list[Boundary]]:
        return [self._task.boundaries(batch, self._mesh.layout) for batch in batches]

    def _inputs(self, chunk: int, received: Payload) -> tuple[Any, ...]:
        """What the engine takes besides the batch: nothing where the model begins."""
        return (*received, chunk) if received else ()

    def _is_last(self, chunk: int) -> bool:
        return self._mesh.last_pp_stage and chunk == self._last_chunk
