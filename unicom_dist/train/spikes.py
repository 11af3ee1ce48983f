"""Steps that went wrong: losses or gradients that are not finite, or far above what they were.

Which samples were in such a step is written to `run_dir`/logs/spikes-rank-NNNNN.jsonl, one JSON object a line: stage,
step, kind ("nonfinite", "norm", "loss"), norm, loss (of a step that is not finite: that rank's share of it; null where
it is no number), their running medians, and the sample keys of the micro-batches of that rank's replica.
All ranks decide by the same figures. A step's loss is summed over the ranks with the counts of the step after it, so a
loss that jumped is noticed then and costs no further collective; the last step's is not looked at.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.config.schema import StageConfig
from unicom_dist.objective.terms import LossTerm
from unicom_dist.parallel.mesh import Mesh

log = logging.getLogger(__name__)

KEYS_SHOWN = 8
Keys = Sequence[Sequence[str]]  # by micro-batch


@dataclass(frozen=True)
class _Finished:
    step: int
    keys: Keys
    norm: float


class Spikes:
    """Watches the steps of a stage. What it decides is the same on every rank."""

    def __init__(self, run_dir: str, stage: StageConfig, mesh: Mesh) -> None:
        self._config, self._stage, self._mesh = stage.spike, stage.name, mesh
        self._path = Path(run_dir) / "logs" / f"spikes-rank-{mesh.rank:05d}.jsonl"
        self._history = {name: deque[float](maxlen=self._config.window) for name in ("norm", "loss")}
        self._loss: Tensor | None = None  # of the step, as far as it arose in this rank
        self._finished: _Finished | None = None  # a step whose loss is not known yet
        self._in_a_row = self._skipped = self._recorded = 0

    def add(self, terms: Mapping[str, LossTerm], counts: Mapping[str, int]) -> None:
        """A micro-batch's loss terms; `counts`: items per term of the whole step. Without synchronisation."""
        if self._mesh.tp.rank:
            return  # it computes what the first rank of tp computes
        for name, term in terms.items():
            share = term.sum.detach().float() * (term.weight / max(counts[name], 1))
            self._loss = share if self._loss is None else self._loss + share

    def take_loss(self) -> float:
        """This rank's share of the loss of the step before."""
        loss, self._loss = self._loss, None
        return 0.0 if loss is None else float(loss)

    def judge(self, loss: float) -> None:
        """The step before had this loss over all ranks: record it if it or its gradient norm jumped."""
        finished, self._finished = self._finished, None
        if finished is None or not self._config.factor:
            return
        medians: dict[str, float] = {}
        kinds = []
        for name, value in (("norm", finished.norm), ("loss", loss)):
            before = self._history[name]
            if len(before) == self._config.window:
                medians[name] = statistics.median(before)
                if not value <= self._config.factor * medians[name]:
                    kinds.append(name)
            if math.isfinite(value):
                before.append(value)
        if kinds:
            self._recorded += 1
            log.warning("stage %s: %s of step %d jumped", self._stage, " and ".join(kinds), finished.step)
            self._write(kinds[0], finished.step, finished.keys, finished.norm, loss, medians)

    def finished(self, step: int, keys: Keys, norm: float) -> None:
        """`step` was applied; its gradient norm over all ranks."""
        self._in_a_row = 0
        self._finished = _Finished(step, keys, norm)

    def skip(self, step: int, keys: Keys, error: NonFiniteError) -> None:
        """`step` was not finite and was not applied. NonFiniteError, on every rank, if it is one too many in a row."""
        self._in_a_row += 1
        self._skipped += 1
        self._write("nonfinite", step, keys, math.nan, self.take_loss(), {})
        log.warning("stage %s: step %d skipped: %s", self._stage, step, error.what)
        if self._in_a_row > self._config.skip:
            every = [key for micro in keys for key in micro]
            shown = ", ".join(every[:KEYS_SHOWN]) + (", …" if len(every) > KEYS_SHOWN else "")
            times = f" in {self._in_a_row} steps in a row" if self._in_a_row > 1 else ""
            raise NonFiniteError(
                f"stage {self._stage}, step {step}: {error.what}{times}",
                f"{error.why}; its samples: {shown}",
                f"look at these samples (all of them: {self._path}), lower lr, raise warmup or set precision: float32",
                error.docs,
            )

    def figures(self) -> dict[str, float]:
        """For the metrics: how many steps were skipped and how many jumped, in this process."""
        found = {"spikes/skipped": float(self._skipped)} if self._config.skip else {}
        return found | ({"spikes/recorded": float(self._recorded)} if self._config.factor else {})

    def _write(self, kind: str, step: int, keys: Keys, norm: float, loss: float, medians: Mapping[str, float]) -> None:
        if self._mesh.model.rank:
            return  # the first rank of the replica has the same samples
        content: dict[str, object] = {
            "stage": self._stage,
            "step": step,
            "kind": kind,
            "norm": _plain(norm),
            "loss": _plain(loss),
        }
        content |= {f"median_{name}": value for name, value in medians.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**content, "keys": keys}) + "\n")
        except OSError as error:
            log.warning("%s could not be written: %s", self._path, error)


def _plain(value: float) -> float | None:
    """As JSON has it: null where it is no finite number."""
    return value if math.isfinite(value) else None
