"""What happens beside the steps: the log line and records, the held-out loss, the picture grid.

`Observer` is told of every step and does nothing costly in it: losses are summed on the device and read once per
`log_every`; evaluation and pictures run on the averaged weights in a second copy of the model.
"""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor, nn

from unicom_dist.objective.terms import LossTerm
from unicom_dist.parallel.engine import whole_tensors
from unicom_dist.tracking.console import StageConsole
from unicom_dist.tracking.flops import Peak, device_peak
from unicom_dist.tracking.metrics import MetricsWriter
from unicom_dist.tracking.status import write_status

if TYPE_CHECKING:
    from unicom_dist.train.loop import Run

log = logging.getLogger(__name__)

STATUS_S = 2.0


class Observer:
    """A stage's figures. Everything but `add_losses` is collective over dp in the steps in which it acts."""

    def __init__(self, run: "Run", terminal: IO[str] | None) -> None:
        self.run, self.stage = run, run.stage
        self._losses: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._dtype = torch.bfloat16 if self.stage.precision == "bfloat16" else torch.float32
        self._since = self._first_step = run.step
        self._step_s = self._waited_s = 0.0
        self._copy: nn.Module | None = None
        self._first = run.mesh.rank == 0
        self._metrics: MetricsWriter | None = None
        self._console: StageConsole | None = None
        self._terminal = terminal
        self._status_s = -STATUS_S
        self._peak: Peak | None = None  # measured at the second record: the first step must not wait for it

    def __enter__(self) -> "Observer":
        if self._first:
            self._metrics = MetricsWriter(self.run.config.run_dir)
            if self.run.step:
                self._metrics.resumed(self.stage.name, self.run.step)
            console = Console(file=self._terminal) if self._terminal else Console(stderr=True)
            trained = [stage.name for stage in self.run.config.stages]
            position = f"{trained.index(self.stage.name) + 1}/{len(trained)}"
            self._console = StageConsole(
                self.stage.name, self.stage.steps, start_step=self.run.step, position=position, console=console
            ).__enter__()
            if self.run.step:
                self._console.note(f"continues at step {self.run.step} from its checkpoint")
            self._status()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console:
            self._console.close()
        if self._metrics:
            self._metrics.close()

    def add_losses(self, terms: Mapping[str, LossTerm]) -> None:
        """Remember a micro-batch's losses (no synchronisation)."""
        for name, term in terms.items():
            value = term.sum.detach().float()
            self._losses[name] = self._losses[name] + value if name in self._losses else value
            self._weights[name] = term.weight

    def step_done(
        self,
        counts: Mapping[str, int],
        amounts: Mapping[str, float],
        lr: float,
        norm: float,
        waited_s: float,
        step_s: float,
    ) -> None:
        """A step is finished; `counts` and `amounts` are those of all ranks."""
        for name, value in (*counts.items(), *amounts.items()):
            self._totals[name] = self._totals.get(name, 0.0) + value
        self._step_s += step_s
        self._waited_s += waited_s
        step, last = self.run.step, self.run.step == self.stage.steps
        if step % self.stage.log_every == 0 or last or self._since == step - 1 == 0:
            self._log(lr, norm)
        elif self._console:
            self._console.update(step)
        if self.stage.eval_every and step % self.stage.eval_every == 0 and not last:
            self._evaluate(self._averaged())
        if self.stage.sample_every and step % self.stage.sample_every == 0 and not last:
            self._sample(self._averaged())

    def finish(self) -> None:
        """The last evaluation and pictures of the stage, and the record that it is done."""
        model = self._averaged()
        self._evaluate(model)
        self._sample(model)
        self._copy = None
        if self._metrics:
            self._metrics.log(self.stage.name, self.run.step, {"state": "done"}, kind="stage")

    def _log(self, lr: float, norm: float) -> None:
        run = self.run
        if self._peak is None and self._since > self._first_step:
            self._peak = device_peak(run.mesh.device, self._dtype)
            if self._metrics:
                yardstick = {"mfu_peak_flops_per_s": self._peak.flops_per_s, "mfu_peak_source": self._peak.source}
                self._metrics.log(self.stage.name, run.step, yardstick, kind="params")
        sums = run.mesh.dp.sum(torch.stack(list(self._losses.values()))).tolist()
        losses = {name: value / max(self._totals[name], 1.0) for name, value in zip(self._losses, sums, strict=True)}
        if self._metrics and self._console:
            steps = run.step - self._since
            seconds = max(self._step_s, 1e-9)
            values = {"loss/total": sum(self._weights[name] * value for name, value in losses.items())}
            values |= {f"loss/{name}": value for name, value in losses.items() if self._totals[name]}
            values |= {"lr": lr, "grad_norm": norm, "step_s": seconds / steps, "data_wait_s": self._waited_s / steps}
            for name in ("tokens", "latents", "images"):
                if name in self._totals:
                    values[f"{name}_per_s"] = self._totals[name] / seconds
            if self._totals.get("flops") and self._peak:
                values["mfu"] = self._totals["flops"] / seconds / (self._peak.flops_per_s * run.mesh.world)
            values |= getattr(run.loader, "report", dict)()
            self._metrics.log(self.stage.name, run.step, values)
            self._console.update(run.step, values)
            self._status()
        self._losses.clear()
        self._totals.clear()
        self._since, self._step_s, self._waited_s = run.step, 0.0, 0.0

    def _status(self) -> None:
        """Refresh the status file, at most every STATUS_S seconds: it costs as much as a small step."""
        if time.monotonic() - self._status_s < STATUS_S:
            return
        self._status_s = time.monotonic()
        try:
            write_status(self.run.config.run_dir, "running", stage=self.stage.name, step=self.run.step)
        except OSError as error:
            log.warning("the status file could not be written: %s", error)

    def _averaged(self) -> nn.Module:
        """The model with the averaged weights, on every rank. Collective over dp."""
        run = self.run
        engine = run.engine
        weights = dict(whole_tensors(run.mesh, run.ema.buffers, engine.fragments, engine.replicated, self._dtype))
        if self._copy is None:
            self._copy = run.task.build().requires_grad_(False).to(run.mesh.device)
            for parameter in self._copy.parameters():
                parameter.data = parameter.data.to(self._dtype)
        for name, parameter in self._copy.named_parameters():
            if run.mesh.rank == 0:
                parameter.data.copy_(weights[name])
        return self._copy.eval()

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> None:
        """Losses on held-out data, each rank taking every dp-th batch. Collective over dp."""
        run, began = self.run, time.perf_counter()
        sums: dict[str, Tensor] = {}
        for suffix, batch in run.task.heldout():
            counts = run.task.counts(batch)
            mine = run.mesh.rank == 0
            terms = run.task.terms(model(batch.to(run.mesh.device)), batch.to(run.mesh.device)) if mine else {}
            for name, count in counts.items():
                if suffix and name == "text":  # the one label of a text-to-image sample says nothing
                    continue
                key = f"loss/{name}{suffix}"
                pair = sums.setdefault(key, torch.zeros(2, dtype=torch.float64))
                if mine and count:
                    pair += torch.tensor([float(terms[name].sum), count], dtype=torch.float64)
        if not sums:
            return
        pairs = run.mesh.dp.sum(torch.stack(list(sums.values())).to(run.mesh.device)).tolist()
        values = {name: total / count for name, (total, count) in zip(sums, pairs, strict=True) if count}
        times = [value for name, value in values.items() if name.startswith("loss/flow@")]
        if times:
            values["loss/flow"] = sum(times) / len(times)
        if self._metrics and self._console:
            self._metrics.log(self.stage.name, run.step, values, kind="eval")
            shown = "  ".join(f"{name.removeprefix('loss/')} {value:.4g}" for name, value in values.items())
            self._console.note(f"step {run.step} held out: {shown}  ({time.perf_counter() - began:.1f} s)")

    def _sample(self, model: nn.Module) -> None:
        """A labelled grid of pictures, drawn by rank 0 while the others wait. Collective over the world."""
        if self._metrics and self._console:
            folder = Path(self.run.config.run_dir) / "samples" / self.stage.name
            path = folder / f"step-{self.run.step:06d}.png"
            grid, labels = self.run.task.draw(model)
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(path)
            kind = "reconstructions" if self.stage.kind == "codec" else "prompts"
            record = {"kind": kind, "stage": self.stage.name, "step": self.run.step, "labels": labels}
            path.with_suffix(".json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            shown = str(path.relative_to(self.run.config.run_dir))
            self._metrics.log(self.stage.name, self.run.step, {"path": shown, "name": "samples"}, kind="artifact")
            self._console.note(f"step {self.run.step} pictures: {path}")
        self.run.mesh.barrier()
