"""How long a schedule takes: an event simulation of its action lists, the idle time, and a picture of both.

A rank runs its actions in order; an action starts when the rank is free and what it needs has arrived. A message
arrives `costs.message` after the action that made it, whatever else is under way. The unit of time is the caller's.
Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unicom_dist.parallel.pipeline.messages import chunks_of
from unicom_dist.parallel.pipeline.schedule import Action, Actions


@dataclass(frozen=True)
class Costs:
    """Time of each action by pp_stage (in their order through the model), and of a message between two ranks.

    `backward` is the whole backward pass. In a schedule with W actions, B takes `backward - weight` and W `weight`.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weight: Sequence[float]
    message: float = 0.0

    @classmethod
    def equal(
        cls, pp_stages: int, forward: float = 1.0, backward: float = 2.0, weight: float = 1.0, message: float = 0.0
    ) -> "Costs":
        """The same for every pp_stage."""
        return cls([forward] * pp_stages, [backward] * pp_stages, [weight] * pp_stages, message)

    def duration(self, action: Action, pp_stage: int, splits: bool) -> float:
        """Of one action; `splits`: the schedule has W actions."""
        if action.kind == "F":
            return self.forward[pp_stage]
        if action.kind == "W":
            return self.weight[pp_stage]
        return self.backward[pp_stage] - (self.weight[pp_stage] if splits else 0.0)


@dataclass(frozen=True)
class Span:
    """An action's time on its rank."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What every rank did when, in its order."""

    spans: list[list[Span]]

    @property
    def makespan(self) -> float:
        """From the start of the first action to the end of the last."""
        return max(span.end for mine in self.spans for span in mine)

    @property
    def idle(self) -> list[float]:
        """By rank: the part of the makespan in which it computed nothing."""
        return [self.makespan - sum(span.end - span.start for span in mine) for mine in self.spans]

    @property
    def efficiency(self) -> float:
        """Share of all ranks' time that is computation."""
        return 1 - sum(self.idle) / (len(self.spans) * self.makespan)


def best_efficiency(ranks: int, micros: int, chunks: int = 1) -> float:
    """v m / (v m + p - 1): of any schedule without W actions, for equal pp_stages and free messages.

    Ref: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
    """
    return chunks * micros / (chunks * micros + ranks - 1)


def simulate(actions: Actions, costs: Costs | None = None) -> Simulation:
    """Run the schedule on paper; `costs` defaults to F = 1, B = 2 (of which W = 1) and free messages.

    ValueError when an action waits for something that never comes.
    """
    ranks, chunks = len(actions), chunks_of(actions)
    costs = costs or Costs.equal(ranks * chunks)
    splits = any(action.kind == "W" for mine in actions for action in mine)
    finished: dict[tuple[str, int, int], tuple[int, float]] = {}  # by kind, pp_stage, micro-batch: rank and end
    spans: list[list[Span]] = [[] for _ in actions]
    progress = True
    while progress:
        progress = False
        for rank, mine in enumerate(actions):
            while len(spans[rank]) < len(mine):
                action = mine[len(spans[rank])]
                pp_stage = action.chunk * ranks + rank
                needs = _needs(action, pp_stage, ranks * chunks)
                if any(need not in finished for need in needs):
                    break
                start = spans[rank][-1].end if spans[rank] else 0.0
                for source, end in map(finished.__getitem__, needs):
                    start = max(start, end + (costs.message if source != rank else 0.0))
                end = start + costs.duration(action, pp_stage, splits)
                finished[action.kind, pp_stage, action.micro] = (rank, end)
                spans[rank].append(Span(action, start, end))
                progress = True
    stuck = {rank: str(mine[len(spans[rank])]) for rank, mine in enumerate(actions) if len(spans[rank]) < len(mine)}
    if stuck:
        raise ValueError(f"the schedule deadlocks; waiting for ever, by rank: {stuck}")
    return Simulation(spans)


def in_flight(mine: Sequence[Action]) -> int:
    """Most micro-batches of a chunk whose activations a rank holds at a time, from its action list."""
    last = "W" if any(action.kind == "W" for action in mine) else "B"
    held = most = 0
    for action in mine:
        held += (action.kind == "F") - (action.kind == last)
        most = max(most, held)
    return most


def timeline(actions: Actions, costs: Costs | None = None, unit: float = 1.0) -> str:
    """A line per rank and a cell per `unit` of time: F3 is the forward pass of micro-batch 3, F3' that of chunk 1.

    An action longer than a cell goes on as ─, idle time is a dot.
    """
    simulation = simulate(actions, costs)
    width = 1 + max(len(_label(action)) for mine in actions for action in mine)
    lines = []
    for rank, mine in enumerate(simulation.spans):
        cells = ["·".ljust(width)] * round(simulation.makespan / unit)
        for span in mine:
            start, end = round(span.start / unit), round(span.end / unit)
            text = _label(span.action).ljust(width * (end - start) - 1, "─") + " "
            cells[start:end] = _cut(text, width)
        lines.append(f"rank {rank}  {''.join(cells)}".rstrip())
    return "\n".join(lines)


def _label(action: Action) -> str:
    return f"{action.kind}{action.micro}" + "'" * action.chunk


def _cut(text: str, width: int) -> list[str]:
    return [text[i : i + width] for i in range(0, len(text), width)]


def _needs(action: Action, pp_stage: int, pp_stages: int) -> list[tuple[str, int, int]]:
    needs = {
        "F": [("F", pp_stage - 1)],
        "B": [("F", pp_stage), ("B", pp_stage + 1)],
        "W": [("B", pp_stage)],
    }[action.kind]
    return [(kind, where, action.micro) for kind, where in needs if 0 <= where < pp_stages]
