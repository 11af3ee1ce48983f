"""Pipeline schedules as data: for every rank, the list of what it computes, in order.

The layers are cut into pp_stages; pp_stage c * p + r is chunk c of rank r (p ranks, v chunks a rank). Each of the m
micro-batches runs forward through all pp_stages in turn and backward in reverse. Of a pp_stage and a micro-batch,

    F  is the forward pass: needs F of the pp_stage before
    B  the backward pass: needs F here and B of the pp_stage after; without a W in the schedule it is all of it
    W  the gradients of the weights, where B computes only those of the inputs: needs B here

Every F, B (and W) occurs exactly once. Activations are held from F to B (to W, if there is one): what is held at most
is said at each schedule. Bubble: time a rank idles, with costs F, B, W of the whole rank, equal on all ranks.
Imports no torch.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

from unicom_dist.config.errors import ConfigError

Kind = Literal["F", "B", "W"]
DOCS = "docs/parallelism.md"


class Action(NamedTuple):
    """One computation of a rank."""

    kind: Kind
    chunk: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro}.{self.chunk}"


Actions = list[list[Action]]  # by rank


def gpipe(ranks: int, micros: int) -> Actions:
    """All forwards, then all backwards. Holds m micro-batches; bubble (p - 1)(F + B).

    Ref: Huang et al. 2019, arXiv 1811.06965.
    """
    return [[Action(kind, 0, i) for kind in ("F", "B") for i in range(micros)] for _ in range(ranks)]


def one_forward_one_backward(ranks: int, micros: int) -> Actions:
    """1F1B: each backward as soon as it can run. Rank r holds min(m, p - r) micro-batches; bubble (p - 1)(F + B).

    Ref: Narayanan et al. 2021, arXiv 2006.09503 (PipeDream-Flush).
    """
    actions: Actions = []
    for rank in range(ranks):
        ahead = min(micros, ranks - rank - 1)  # forwards before the first pair of a forward and a backward
        mine = [Action("F", 0, i) for i in range(ahead)]
        for i in range(ahead, micros):
            mine += [Action("F", 0, i), Action("B", 0, i - ahead)]
        actions.append(mine + [Action("B", 0, i) for i in range(micros - ahead, micros)])
    return actions


def interleaved(ranks: int, micros: int, chunks: int) -> Actions:
    """1F1B over v chunks a rank: bubble (p - 1)(F + B) / v for m >= p, at v times the messages.

    Micro-batches advance in rounds of g: a chunk runs a whole round before the next chunk does. Classic rounds are of
    p, and m is a multiple; here the m micro-batches are dealt evenly to floor(m / p) rounds, so any m works: no round
    is smaller than p, so the first of a round is back at rank 0 by the time the last has left it. (For m < p it is
    not: right, but the ranks wait.) Rank r holds min(v m, (v - 1) g + 2 (p - 1 - r) + 1) micro-batches of a chunk, g
    being the largest round. Ref: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
    """
    rounds = _rounds(ranks, micros)
    forwards = [(chunk, i) for part in rounds for chunk in range(chunks) for i in part]
    backwards = [(chunk, i) for part in rounds for chunk in reversed(range(chunks)) for i in part]
    actions: Actions = []
    for rank in range(ranks):
        ahead = min(len(forwards), (chunks - 1) * len(rounds[0]) + 2 * (ranks - 1 - rank))
        mine = [Action("F", *forwards[n]) for n in range(ahead)]
        for n in range(ahead, len(forwards)):
            mine += [Action("F", *forwards[n]), Action("B", *backwards[n - ahead])]
        actions.append(mine + [Action("B", *backward) for backward in backwards[len(backwards) - ahead :]])
    return actions


def zero_bubble(ranks: int, micros: int) -> Actions:
    """ZB-H1: 1F1B whose weight gradients fill the bubble: (p - 1)(F + B - W) for m >= p, where W <= F and W <= B.

    Rank r starts r micro-batches late with W, so that all ranks hold the same, at most min(m, p), which is the most
    that 1F1B holds anywhere. Ref: Qi et al. 2023, arXiv 2401.10241, section 2.3.
    """
    actions: Actions = []
    for rank in range(ranks):
        ahead = min(micros, ranks - rank)
        mine = [Action("F", 0, i) for i in range(ahead)]
        for i in range(micros):
            mine.append(Action("B", 0, i))
            if i >= rank:
                mine.append(Action("W", 0, i - rank))
            if ahead + i < micros:
                mine.append(Action("F", 0, ahead + i))
        actions.append(mine + [Action("W", 0, i) for i in range(max(0, micros - rank), micros)])
    return actions


def forward_only(ranks: int, micros: int, chunks: int = 1) -> Actions:
    """Forward passes alone, in the order of `interleaved`: for losses on held-out data."""
    forwards = [(chunk, i) for part in _rounds(ranks, micros) for chunk in range(chunks) for i in part]
    return [[Action("F", *forward) for forward in forwards] for _ in range(ranks)]


def build(name: str, ranks: int, micros: int, chunks: int = 1) -> Actions:
    """The schedule called `name` in the configuration (gpipe, 1f1b, interleaved or zero-bubble), or `forward`.

    ConfigError for an unknown name, for no micro-batch at all, and for several chunks without `interleaved`.
    """
    if micros < 1 or ranks < 1 or chunks < 1:
        raise ConfigError(
            f"{ranks} pipeline ranks, {chunks} pp_stages a rank and {micros} micro-batches",
            "a pipeline moves at least one micro-batch through at least one pp_stage",
            "use 1 or more of each",
            DOCS,
        )
    if name == "interleaved":
        return interleaved(ranks, micros, chunks)
    if name == "forward":
        return forward_only(ranks, micros, chunks)
    simple = {"gpipe": gpipe, "1f1b": one_forward_one_backward, "zero-bubble": zero_bubble}
    if name not in simple:
        known = ", ".join(sorted([*simple, "interleaved"]))
        raise ConfigError(f"parallel.schedule = {name!r}", "there is no such schedule", f"use one of {known}", DOCS)
    if chunks > 1:
        raise ConfigError(
            f"parallel.schedule = {name} with parallel.pp_stages_per_rank = {chunks}",
            "only the interleaved schedule runs several pp_stages on a rank",
            "parallel.schedule=interleaved, or parallel.pp_stages_per_rank=1",
            DOCS,
        )
    return simple[name](ranks, micros)


def _rounds(ranks: int, micros: int) -> list[range]:
    """`micros` dealt to floor(m / p) rounds (one, if m < p), the larger ones first."""
    count = max(1, micros // ranks)
    size, larger = divmod(micros, count)
    starts = [number * size + min(number, larger) for number in range(count + 1)]
    return [range(start, end) for start, end in pairwise(starts)]
