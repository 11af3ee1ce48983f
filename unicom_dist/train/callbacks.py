"""What happens beside the steps: the log line and records, the held-out loss, the picture grid.

`Observer` is told of every step and does nothing costly in it: losses are summed on the device and read once per
`log_every`; evaluation and pictures run on the averaged weights in a second copy of the model.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import torch
from rich.console import Console
from torch import nn

from unicom_dist.config.errors import PreflightError
from unicom_dist.data.encode import png_bytes
from unicom_dist.data.tar import replace_file
from unicom_dist.objective.terms import LossTerm
from unicom_dist.parallel.engine import whole_tensors
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.precision import dtype_of
from unicom_dist.tracking.console import StageConsole
from unicom_dist.tracking.flops import Peak, device_peak
from unicom_dist.tracking.metrics import MetricsWriter
from unicom_dist.tracking.status import write_status
from unicom_dist.train.alone import alone
from unicom_dist.train.execution import LossSums
from unicom_dist.train.heldout_losses import heldout_losses

if TYPE_CHECKING:
    from unicom_dist.train.loop import Run

log = logging.getLogger(__name__)

STATUS_S = 2.0
PICTURES_SHARE = 0.5  # of the free memory that a copy of the model may take for drawing


class Observer:
    """A stage's figures. Everything but `add_losses` is collective over dp in the steps in which it acts."""

    def __init__(self, run: "Run", terminal: IO[str] | None) -> None:
        self.run, self.stage = run, run.stage
        self._losses = LossSums()
        self._counts: dict[str, int] = {}
        self._totals: dict[str, float] = {}
        self._dtype = dtype_of(self.stage.precision)
        self._since = self._first_step = run.step
        self._step_s = self._waited_s = 0.0
        self._copy: nn.Module | None = None  # for pictures, on rank 0
        self._room: bool | None = None  # whether rank 0 has room for it
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
        self._losses.add(terms)

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
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        for name, amount in amounts.items():
            self._totals[name] = self._totals.get(name, 0.0) + amount
        self._step_s += step_s
        self._waited_s += waited_s
        step, last = self.run.step, self.run.step == self.stage.steps
        if step % self.stage.log_every == 0 or last or self._since == step - 1 == 0:
            self._log(lr, norm)
        elif self._console:
            self._console.update(step)
        self._losses.keep()

    def step_skipped(self, waited_s: float, step_s: float) -> None:
        """A step is finished that was not applied: its time counts, its losses do not."""
        self._losses.drop()
        self._step_s += step_s
        self._waited_s += waited_s
        if self._console:
            self._console.update(self.run.step)

    def between_steps(self) -> None:
        """Evaluation and pictures, where it is time for them; however long they take."""
        step, last = self.run.step, self.run.step == self.stage.steps
        if self.stage.eval_every and step % self.stage.eval_every == 0 and not last:
            self._evaluate()
        if self.stage.sample_every and step % self.stage.sample_every == 0 and not last:
            self._sample()

    def finish(self) -> None:
        """The last evaluation and pictures of the stage, and the record that it is done."""
        self._evaluate()
        self._sample()
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
        further = run.task.figures(run.mesh, run.step)
        sums, averages = self._losses.take_all(list(self._counts), run.task.averages, run.mesh)
        losses = {name: value / max(self._counts[name], 1) for name, (value, _) in sums.items()}
        if self._metrics and self._console:
            steps = run.step - self._since
            seconds = max(self._step_s, 1e-9)
            values = {"loss/total": sum(value / max(self._counts[name], 1) for name, (_, value) in sums.items())}
            values |= {f"loss/{name}": value for name, value in losses.items() if self._counts[name]}
            values |= averages
            values |= {"lr": lr, "grad_norm": norm, "step_s": seconds / steps, "data_wait_s": self._waited_s / steps}
            for name in ("tokens", "latents", "images"):
                if name in self._totals:
                    values[f"{name}_per_s"] = self._totals[name] / seconds
            if self._totals.get("flops") and self._peak:
                values["mfu"] = self._totals["flops"] / seconds / (self._peak.flops_per_s * run.mesh.world)
            values |= {**getattr(run.loader, "report", dict)(), **further, **run.spikes.figures()}
            self._metrics.log(self.stage.name, run.step, values)
            self._console.update(run.step, values)
            self._status()
        self._counts.clear()
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

    def _evaluate(self) -> None:
        """Losses on held-out data. Collective over the world."""
        run, began = self.run, time.perf_counter()
        values = heldout_losses(run)
        if not values:
            return
        if self._metrics and self._console:
            self._metrics.log(self.stage.name, run.step, values, kind="eval")
            shown = "  ".join(
                f"{name.removeprefix('loss/').replace('loss_raw/', 'raw ')} {value:.4g}"
                for name, value in values.items()
            )
            self._console.note(f"step {run.step} held out: {shown}  ({time.perf_counter() - began:.1f} s)")

    def _averaged(self) -> nn.Module | None:
        """The whole model with the averaged weights, on rank 0. Collective over the world.

        None where it is not: on other ranks and, which is said once, where rank 0 has no room for it.
        """
        run, engine = self.run, self.run.engine
        if self._room is None:
            numel = sum(math.prod(shape) for shape in {f.name: f.piece.shape for f in engine.fragments}.values())
            need = numel * self._dtype.itemsize * run.mesh.pp.size  # roughly: pp_stages are about equal
            self._room = run.mesh.broadcast_object(need < free_bytes(run.mesh.device) * PICTURES_SHARE)
            if self._console and not self._room:
                self._console.note(
                    f"no pictures while training: the whole model takes {need / 2**30:.1f} GiB, which rank 0 lacks;"
                    " `unicom sample` draws them from the exported weights"
                )
        if not self._room:
            return None
        if self._first and self._copy is None:
            self._copy = run.task.build(Mesh(0, 1, run.mesh.device)).requires_grad_(False).to(run.mesh.device).eval()
            for parameter in self._copy.parameters():
                parameter.data = parameter.data.to(self._dtype)
        own = dict(self._copy.named_parameters()) if self._copy else {}
        for name, tensor in whole_tensors(run.mesh, run.ema.buffers, engine.fragments, engine.replicated, self._dtype):
            own[name].data.copy_(tensor)
        return self._copy

    @torch.no_grad()
    def _sample(self) -> None:
        """A labelled grid of pictures, drawn by rank 0 while the others wait. Collective over the world."""
        model, config = self._averaged(), self.run.config
        draw = partial(self._draw, model)
        alone(self.run.mesh, Path(config.run_dir), "drawing pictures", draw, config.parallel.timeout_s)

    def _draw(self, model: nn.Module | None) -> None:
        if model is not None and self._metrics and self._console:
            path = Path(self.run.config.run_dir) / "samples" / self.stage.name / f"step-{self.run.step:06d}.png"
            grid, labels = self.run.task.draw(model)
            kind = "reconstructions" if self.stage.kind == "codec" else "prompts"
            record = {"kind": kind, "stage": self.stage.name, "step": self.run.step, "labels": labels}
            try:
                replace_file(path, png_bytes(grid))
                replace_file(path.with_suffix(".json"), json.dumps(record, indent=1).encode())
            except PreflightError as error:  # the run goes on without them
                log.warning("step %d: its pictures are lost: %s", self.run.step, error)
                self._console.note(f"step {self.run.step} pictures are lost: {error.what}: {error.why}")
                return
            shown = str(path.relative_to(self.run.config.run_dir))
            self._metrics.log(self.stage.name, self.run.step, {"path": shown, "name": "samples"}, kind="artifact")
            self._console.note(f"step {self.run.step} pictures: {path}")


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
