"""How close the pipeline comes to its schedules: pp_stages that sleep, four ranks, 16 micro-batches.

A forward pass sleeps F, a backward pass B = 2 F (a chunk of two on a rank half of it), so the efficiency of a schedule
is known, and what is lost beyond its bubble is the runtime's and the machine's. Beside each schedule of ours: what the
simulator predicts, with free messages and with messages as slow as a rank here takes to wake up for one that arrives
(measured in every round), and torch.distributed.pipelining with the same module in the same processes. `1f1b` is also
run with one habit of the peer's at a time: receives posted only when needed; sends awaited before the next action.
The clock is wall time, as waiting is the point; every round starts on all ranks at one agreed moment. On a busy machine
a sleep lasts longer than asked for, so efficiency is the time the ranks really slept over the time of the step; against
the sleeps that were asked for it is shown as well. `of replay` takes the machine out: the time that the simulator gives
the schedule with the very sleeps that happened and free messages, over the time of the step.

    python benchmarks/bench_bubble.py [--rounds 5] [--forward-ms 50]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from common import Goal, Timing, publish
from torch import Tensor, nn

from unicom_dist.parallel.mesh import Axis
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.parallel.pipeline.messages import Instruction, Receive
from unicom_dist.parallel.pipeline.runtime import Payload, Pipeline
from unicom_dist.parallel.pipeline.schedule import Action, Actions, build
from unicom_dist.parallel.pipeline.simulate import Costs, best_efficiency, simulate
from unicom_dist.parallel.pipeline.stage import AutogradStage
from unicom_dist.testing.distributed import run_ranks

RANKS, MICROS, WIDTH = 4, 16, 8
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero-bubble": 1}
PEERS = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B", "interleaved": "ScheduleInterleaved1F1B"}
GOALS = {"1f1b": 0.98, "interleaved": 0.96}
CPU, MESSAGE = torch.device("cpu"), "message"


SLEPT: list[float] = []  # seconds of each sleep of this rank, in order


def sleep(seconds: float) -> None:
    """Sleep, and note how long it took."""
    start = time.perf_counter()
    time.sleep(seconds)
    SLEPT.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Slept(Costs):
    """Every action as long as it was; `slept`: by rank and action."""

    slept: Mapping[tuple[int, Action], float] = field(default_factory=dict)

    def duration(self, action: Action, pp_stage: int, splits: bool) -> float:
        """See `Costs`."""
        return self.slept[pp_stage % RANKS, action]


class Sleep(torch.autograd.Function):
    """The identity, slowly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        """x, after `forward_s`."""
        ctx.backward_s = backward_s
        sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient, after `backward_s`."""
        sleep(ctx.backward_s)
        return grads[0], None, None


class Sleeper(nn.Module):
    """A pp_stage."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        """[n, WIDTH] -> [n, WIDTH]."""
        out: Tensor = Sleep.apply(x * self.weight, self.forward_s, self.backward_s)
        return out


class Splitting(AutogradStage):
    """Sleeps for the weights' gradients at W."""

    weight_s = 0.0

    def backward_weight(self, micro: int, chunk: int) -> None:
        """W."""
        sleep(self.weight_s)


class Late(Pipeline):
    """A receive is posted only when an action needs it."""

    def _instructions(self, micros: int, backward: bool) -> list[Instruction]:
        program = super()._instructions(micros, backward)
        receives = {step.message.action: step for step in program if isinstance(step, Receive)}
        moved: list[Instruction] = []
        for step in program:
            if isinstance(step, Action) and step in receives:
                moved.append(receives[step])
            if not isinstance(step, Receive):
                moved.append(step)
        return moved


class Awaiting(Pipeline):
    """A send is waited for before anything else is done."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        start = self._channels.send

        def send(target: int, tensors: Sequence[Tensor]) -> None:
            start(target, tensors)
            self._channels.finish()

        self._channels.send = send  # type: ignore[method-assign]


def ours(axis: Axis, schedule: str, forward_s: float, kind: type[Pipeline] = Pipeline) -> Callable[[], object]:
    """A step of our runtime."""
    chunks = CHUNKS[schedule]
    weight_s = forward_s if schedule == "zero-bubble" else 0.0
    sleepers = [Sleeper(forward_s / chunks, 2 * forward_s / chunks - weight_s) for _ in range(chunks)]

    def compute(micro: int, chunk: int, received: Payload) -> tuple[Payload, Tensor | None]:
        x = sleepers[chunk](received[0] if received else torch.ones(1, WIDTH))
        last = chunk == chunks - 1 and axis.rank == axis.size - 1
        return ((), x.sum()) if last else ((x,), None)

    stage = Splitting(compute)
    stage.weight_s = weight_s
    pipeline = kind(axis, CPU, schedule, chunks)
    boundaries = [[Boundary((1, WIDTH), torch.float32)]] * MICROS
    return lambda: pipeline.run(stage, boundaries)


def theirs(axis: Axis, schedule: str, forward_s: float) -> Callable[[], object]:
    """A step of torch.distributed.pipelining."""
    from torch.distributed import pipelining

    chunks = CHUNKS[schedule]
    stages = [
        pipelining.PipelineStage(
            Sleeper(forward_s / chunks, 2 * forward_s / chunks),
            chunk * axis.size + axis.rank,
            axis.size * chunks,
            CPU,
            group=axis.group,
        )
        for chunk in range(chunks)
    ]
    runner = getattr(pipelining, PEERS[schedule])(
        stages if chunks > 1 else stages[0], MICROS, loss_fn=lambda out, _: out.sum(), scale_grads=False
    )
    x, target = torch.ones(MICROS, WIDTH), torch.zeros(MICROS)
    first, last = axis.rank == 0, axis.rank == axis.size - 1
    return lambda: runner.step(*([x] if first else []), **({"target": target} if last else {}))


@dataclass(frozen=True)
class Round:
    """A step: from the agreed start to the last rank's end, and the sleeps of every rank in order."""

    seconds: float
    slept: list[list[float]]

    @property
    def efficiency(self) -> float:
        """Share of the ranks' time that they slept."""
        return sum(map(sum, self.slept)) / (RANKS * self.seconds)

    def replayed(self, actions: Actions) -> float:
        """Share of the step that it would have taken with these very sleeps and free messages."""
        slept = {
            (rank, action): seconds
            for rank, mine in enumerate(actions)
            for action, seconds in zip(mine, self.slept[rank], strict=True)
        }
        return simulate(actions, Slept((), (), (), slept=slept)).makespan / self.seconds


def message_s(axis: Axis, pings: int = 10) -> float:
    """Mean time from a send to the moment a rank that waited asleep goes on, over all ranks."""
    peer = axis.ranks[axis.rank ^ 1]
    token, taken_s = torch.zeros(WIDTH), 0.0
    for number in range(2 * pings):
        if number % 2 == axis.rank % 2:
            answer = dist.irecv(torch.empty(WIDTH), peer)
            time.sleep(0.01)
            start = time.perf_counter()
            sent = dist.isend(token, peer)
            answer.wait()
            taken_s += (time.perf_counter() - start) / 2
            sent.wait()
        else:
            dist.irecv(torch.empty(WIDTH), peer).wait()
            dist.isend(token, peer).wait()
    total = torch.tensor(taken_s / pings)
    dist.all_reduce(total)
    return total.item() / axis.size


def work(rank: int, world: int, rounds: int, forward_s: float) -> dict[str, list[Round]]:
    """Every round of every method."""
    axis = Axis("pp", rank, world, dist.group.WORLD, tuple(range(world)))
    methods = {schedule: ours(axis, schedule, forward_s) for schedule in CHUNKS}
    methods["1f1b, receives posted late"] = ours(axis, "1f1b", forward_s, Late)
    methods["1f1b, sends awaited"] = ours(axis, "1f1b", forward_s, Awaiting)
    methods |= {f"torch {schedule}": theirs(axis, schedule, forward_s) for schedule in PEERS}
    measured: dict[str, list[Round]] = {method: [] for method in [*methods, MESSAGE]}
    for number in range(rounds + 1):
        for method in list(methods) if number % 2 else reversed(list(methods)):
            start = torch.tensor(time.perf_counter() + 0.02, dtype=torch.float64)  # one clock for all processes
            dist.all_reduce(start, dist.ReduceOp.MAX)
            time.sleep(max(0.0, start.item() - time.perf_counter()))
            SLEPT.clear()
            methods[method]()
            end = torch.tensor(time.perf_counter(), dtype=torch.float64)
            dist.all_reduce(end, dist.ReduceOp.MAX)
            if number == 0:  # torch infers shapes in the first round, which sleeps too
                continue
            slept = [torch.empty(len(SLEPT), dtype=torch.float64) for _ in range(world)]
            dist.all_gather(slept, torch.tensor(SLEPT, dtype=torch.float64))
            measured[method].append(Round((end - start).item(), [each.tolist() for each in slept]))
        measured[MESSAGE].append(Round(message_s(axis), []))
    return measured


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forward-ms", type=float, default=50.0)
    options = parser.parse_args()
    forward_s = options.forward_ms / 1000
    measured = run_ranks(work, RANKS, options.rounds, forward_s, timeout_s=300 + 60 * options.rounds)[0]
    message = Timing.of([each.seconds for each in measured.pop(MESSAGE)])
    rows, figures, goals = [], {}, []
    for method, rounds in measured.items():
        schedule = method.removeprefix("torch ").split(",")[0]
        chunks = CHUNKS[schedule]
        actions, costs = build(schedule, RANKS, MICROS, chunks), [forward_s / chunks * factor for factor in (1, 2, 1)]
        free, slow = (
            simulate(actions, Costs.equal(RANKS * chunks, *costs, message_s)).efficiency
            for message_s in (0.0, message.median)
        )
        bound = best_efficiency(RANKS, MICROS, chunks)
        step = Timing.of([each.seconds for each in rounds])
        efficiency = Timing.of([each.efficiency for each in rounds])
        own = not method.startswith("torch")
        replayed = statistics.median(each.replayed(actions) for each in rounds) if own else None
        asked = 3 * forward_s * MICROS / step.median
        share = efficiency.median / bound
        figures[method] = {
            "step_s": step,
            "efficiency": efficiency,
            "simulated": free,
            "simulated_with_messages": slow,
            "of_replay": replayed,
            "of_bound": share,
            "of_bound_by_sleeps_asked_for": asked / bound,
        }
        cells = [efficiency.median, slow, free, share, asked / bound]
        shown = "" if replayed is None else f"{replayed:.3f}"
        rows.append([method, f"{step.median:.3f}", step.spread, *(f"{cell:.3f}" for cell in cells), shown])
        if method in GOALS:
            goals.append(Goal(f"{method}: efficiency over v m / (v m + p - 1)", share, GOALS[method]))
    print(f"a message takes {message.median * 1000:.2f} ms ({message.spread})")
    met = publish(
        "bench_bubble",
        [
            "method",
            "step s",
            "spread",
            "efficiency",
            "with messages",
            "simulated",
            "over bound",
            "as asked",
            "of replay",
        ],
        rows,
        goals,
        {
            "ranks": RANKS,
            "micro_batches": MICROS,
            "forward_s": forward_s,
            "backward_s": 2 * forward_s,
            "message_s": message,
            **figures,
        },
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
