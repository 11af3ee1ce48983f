"""The micro-batches of a step through this rank's slice of the model, whatever the layout; held-out batches as well.

Every rank of a replica (one coordinate of dp) holds the same batches. Between pp_stages hidden states travel; the loss
arises in the last chunk of the last pp_stage. With one pp_stage the same code runs and nothing is sent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unicom_dist.objective.breakdown import means
from unicom_dist.objective.terms import LossTerm, total
from unicom_dist.parallel.engine import Engine
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.parallel.pipeline.deferred import defer
from unicom_dist.parallel.pipeline.runtime import Payload, Pipeline
from unicom_dist.parallel.pipeline.stage import AutogradStage
from unicom_dist.train.stages import Task
from unicom_dist.train.watchdog import Watchdog

Terms = Mapping[str, LossTerm]


class LossSums:
    """Sums of the loss terms of several micro-batches, kept on the device until somebody asks.

    Every rank adds what it computed. The ranks of tp compute the same, those of ulysses a share each, and every term
    arises in one pp_stage: the last, but for what joint training adds to the first.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}
        self._kept: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}

    def add(self, terms: Terms) -> None:
        """Without synchronisation."""
        for name, term in terms.items():
            pair = torch.stack([term.sum.detach().float(), term.sum.detach().float() * term.weight])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair
            if term.averages is not None:
                found = self._averages.get(name)
                self._averages[name] = term.averages if found is None else found + term.averages

    def keep(self) -> None:
        """A step begins: `drop` goes back to here."""
        self._kept = dict(self._sums), dict(self._averages)

    def drop(self) -> None:
        """Forget what came since `keep`."""
        self._sums, self._averages = (dict(kept) for kept in self._kept)

    def take(self, names: Sequence[str], mesh: Mesh) -> dict[str, tuple[float, float]]:
        """(sum, weighted sum) of each term over all ranks, and start anew. Collective over the world."""
        return self.take_all(names, {}, mesh)[0]

    def take_all(
        self, names: Sequence[str], averages: Mapping[str, Sequence[str]], mesh: Mesh
    ) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
        """As `take`, and the means their items are broken down to, by name. Collective over the world, once.

        `averages`: as `Task.averages`.
        """
        rows = torch.zeros(len(names), 2, dtype=torch.float64, device=mesh.device)
        divided = [name for name in names if name in averages]
        further = [torch.zeros(2, len(averages[name]), dtype=torch.float64, device=mesh.device) for name in divided]
        if mesh.tp.rank == 0:
            for row, name in zip(rows, names, strict=True):
                row += self._sums.get(name, 0.0)
            for table, name in zip(further, divided, strict=True):
                table += self._averages.get(name, 0.0)
        self._sums.clear()
        self._averages.clear()
        packed = mesh.everyone.sum(torch.cat([rows.flatten(), *(table.flatten() for table in further)]))
        first, *tables = torch.split(packed.cpu(), [rows.numel(), *(table.numel() for table in further)])
        pairs = dict(zip(names, ((pair[0], pair[1]) for pair in first.view(-1, 2).tolist()), strict=True))
        found = [means(averages[name], table.view(2, -1).tolist()) for name, table in zip(divided, tables, strict=True)]
        return pairs, {name: value for part in found for name, value in part.items()}


class Execution:
    """Forward and backward of a stage's batches. Constructing it is collective over the pipeline axis."""

    def __init__(self, task: Task[Any], engine: Engine, mesh: Mesh, watchdog: Watchdog) -> None:
        self._task, self._engine, self._mesh, self._watchdog = task, engine, mesh, watchdog
        layout = mesh.layout
        schedule = layout.schedule if layout.pp > 1 else "1f1b"  # alone, the order that holds one micro-batch at a time
        self._last_chunk = layout.pp_stages_per_rank - 1
        self._pipeline = Pipeline(mesh.pp, mesh.device, schedule, layout.pp_stages_per_rank)
        self._weights = defer(engine.module) if schedule == "zero-bubble" else None

    def train(self, batches: Sequence[Any], counts: Mapping[str, int], observe: Callable[[Terms], None]) -> None:
        """Gradients of all micro-batches of a step, reduced; `counts`: items per term of the whole step.

        `observe` is handed each micro-batch's loss terms, where they arise. Collective over the world.
        """

        def compute(micro: int, chunk: int, received: Payload) -> tuple[Payload, Tensor | None]:
            self._watchdog.doing("forward", micro, chunk)
            batch = self._task.completed(batches[micro])
            output = self._engine(batch, *self._inputs(chunk, received))
            sent, terms = self._task.outcome(output, batch, not received, self._is_last(chunk))
            observe(terms)
            return sent, total(terms, counts, self._mesh.zero.size) if terms else None

        with self._engine.accumulate():
            self._pipeline.run(AutogradStage(compute, self._engine.backward, self._weights), self._boundaries(batches))
            self._watchdog.doing("reduction of the gradients")

    @torch.no_grad()
    def terms(self, batches: Sequence[Any]) -> list[Terms]:
        """Loss terms of each batch without gradients, where they arise: nowhere but in the first and last pp_stage.

        Collective over the model axis and, under ZeRO-3, over `mesh.zero`: all its ranks pass equally many batches.
        """
        found: list[Terms] = [{} for _ in batches]

        def compute(micro: int, chunk: int, received: Payload) -> tuple[Payload, Tensor | None]:
            self._watchdog.doing("held-out batch", micro, chunk)
            batch = self._task.completed(batches[micro])
            output = self._engine(batch, *self._inputs(chunk, received))
            sent, terms = self._task.outcome(output, batch, not received, self._is_last(chunk))
            found[micro] = {**found[micro], **terms}
            return sent, None

        self._pipeline.run(AutogradStage(compute), self._boundaries(batches), backward=False)
        return found

    def _boundaries(self, batches: Sequence[Any]) -> list[list[Boundary]]:
        return [self._task.boundaries(batch) for batch in batches]

    def _inputs(self, chunk: int, received: Payload) -> tuple[Any, ...]:
        """What the engine takes besides the batch: nothing where the model begins."""
        return (received if len(received) > 1 else received[0], chunk) if received else ()

    def _is_last(self, chunk: int) -> bool:
        return self._mesh.last_pp_stage and chunk == self._last_chunk
