"""How the ranks share the model and the data: the axes, who is where, and which layouts are legal.

world = pp x dp x ulysses x tp; tp varies fastest (its ranks exchange most and should be neighbours), pp slowest.
`RULES` is the only statement of what works: validation, `unicom plan`, the help and docs/parallelism.md all read it.
Imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from unicom_dist.config.schema import ParallelConfig, PriorConfig

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
Recompute = Literal["none", "selective", "full"]
AXES = ("pp", "dp", "ulysses", "tp")
DOCS = "docs/parallelism.md"


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes and what else decides who holds and sends what."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ulysses: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0
    schedule: Schedule = "1f1b"
    pp_stages_per_rank: int = 1
    gather_once: bool = False
    recompute: Recompute = "none"

    @classmethod
    def of(cls, parallel: "ParallelConfig", world: int) -> "Layout":
        """The layout of `world` ranks; dp is what the other axes leave (rounded down: see `RULES`)."""
        return cls(
            dp=max(1, world // (parallel.tp * parallel.pp * parallel.ulysses)),
            tp=parallel.tp,
            pp=parallel.pp,
            ulysses=parallel.ulysses,
            sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
            zero_stage=parallel.zero_stage,
            schedule=parallel.schedule,
            pp_stages_per_rank=parallel.pp_stages_per_rank,
            gather_once=parallel.gather_once,
            recompute=parallel.recompute,
        )

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.ulysses * self.tp

    @property
    def pp_stages(self) -> int:
        """Slices of layers over all ranks; slice c * pp + r is chunk c of the ranks at pp coordinate r."""
        return self.pp * self.pp_stages_per_rank

    @property
    def sequence_cut(self) -> int:
        """Ranks among which the positions of a batch are split between the layers."""
        return self.ulysses * (self.tp if self.sequence_parallel else 1)

    def data_parallel(self) -> "Layout":
        """The same ranks without splitting the model: how a codec is trained."""
        return Layout(dp=self.world, zero_stage=self.zero_stage, recompute=self.recompute)

    def sizes(self) -> dict[str, int]:
        """Size by axis, slowest first."""
        return {axis: getattr(self, axis) for axis in AXES}

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of `rank` by axis."""
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return {axis: place[axis] for axis in AXES}

    def groups(self, axes: tuple[str, ...]) -> list[list[int]]:
        """The ranks, in order, that differ in `axes` alone: one list per combination of the other coordinates."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            place = self.coordinates(rank)
            found.setdefault(tuple(place[axis] for axis in AXES if axis not in axes), []).append(rank)
        return list(found.values())

    def table(self) -> str:
        """Who is where: a row per (pp, dp), the ranks of its ulysses and tp coordinates side by side."""
        columns = [f"u{u} t{t}" if self.ulysses > 1 else f"tp {t}" for u in range(self.ulysses) for t in range(self.tp)]
        width = max(len(str(self.world - 1)), *(len(column) for column in columns)) + 2
        lines = [" " * 12 + "".join(column.rjust(width) for column in columns)]
        inner = self.ulysses * self.tp
        for row in range(self.pp * self.dp):
            pp, dp = divmod(row, self.dp)
            ranks = "".join(str(row * inner + number).rjust(width) for number in range(inner))
            lines.append(f"pp {pp}  dp {dp}".ljust(12) + ranks)
        return "\n".join(lines)


@dataclass(frozen=True)
class Refusal:
    """Why a layout cannot work: what was asked, why not, and what would do."""

    what: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Request:
    """What the rules look at."""

    parallel: "ParallelConfig"
    prior: "PriorConfig"
    world: int


@dataclass(frozen=True)
class Rule:
    """One sentence for the documentation, and the check behind it."""

    text: str
    check: Callable[[Request], Refusal | None]


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _tensor_parallel(prior: "PriorConfig") -> str:
    """The tp of which no rule refuses any."""
    heads, kv = prior.heads, prior.kv_heads
    works = [n for n in divisors(heads) if (kv % n == 0 or n % kv == 0) and prior.ffn % n == 0]
    return f"parallel.tp = one of {_among(works)}"


def _among(values: list[int]) -> str:
    return ", ".join(str(value) for value in values)


def _world(r: Request) -> Refusal | None:
    p = r.parallel
    unit = p.tp * p.pp * p.ulysses
    if r.world % unit == 0:
        return None
    below = r.world // unit * unit
    return Refusal(
        f"{r.world} ranks with tp x pp x ulysses = {p.tp} x {p.pp} x {p.ulysses}",
        f"a replica takes {unit} ranks, and {r.world} is not a multiple of {unit}",
        f"start {' or '.join(str(n) for n in (below, below + unit) if n)} ranks,"
        f" or choose sizes whose product divides {r.world}",
    )


def _heads(r: Request) -> Refusal | None:
    if r.prior.heads % r.parallel.tp == 0:
        return None
    return Refusal(
        f"parallel.tp = {r.parallel.tp}",
        f"the {r.prior.heads} attention heads do not divide among that many ranks",
        _tensor_parallel(r.prior),
    )


def _kv_heads(r: Request) -> Refusal | None:
    tp, kv = r.parallel.tp, r.prior.kv_heads
    if kv % tp == 0 or tp % kv == 0:
        return None
    return Refusal(
        f"parallel.tp = {tp}",
        f"the {kv} key-value heads can neither be dealt out to {tp} ranks nor copied equally often",
        _tensor_parallel(r.prior),
    )


def _ffn(r: Request) -> Refusal | None:
    if r.prior.ffn % r.parallel.tp == 0:
        return None
    return Refusal(
        f"parallel.tp = {r.parallel.tp}",
        f"the MLP's width prior.ffn = {r.prior.ffn} does not divide by it",
        _tensor_parallel(r.prior),
    )


def _ulysses(r: Request) -> Refusal | None:
    tp, u = r.parallel.tp, r.parallel.ulysses
    if r.prior.heads % tp:  # refused for that
        return None
    heads, kv = r.prior.heads // tp, max(1, r.prior.kv_heads // tp)
    if heads % u == 0 and (kv % u == 0 or u % kv == 0):
        return None
    works = [n for n in divisors(heads) if kv % n == 0 or n % kv == 0]
    return Refusal(
        f"parallel.ulysses = {u}",
        f"within attention every rank takes whole heads, and {heads} query and {kv} key-value heads"
        f" (per tensor-parallel rank) do not divide among {u}",
        f"parallel.ulysses = one of {_among(works)}",
    )


def _layers(r: Request) -> Refusal | None:
    p = r.parallel
    if p.pp * p.pp_stages_per_rank <= r.prior.layers:
        return None
    return Refusal(
        f"parallel.pp = {p.pp} with pp_stages_per_rank = {p.pp_stages_per_rank}",
        f"every pp_stage needs a layer, and the model has {r.prior.layers}",
        f"pp x pp_stages_per_rank <= {r.prior.layers}",
    )


def _interleaved(r: Request) -> Refusal | None:
    p = r.parallel
    if p.schedule == "interleaved" and (p.pp == 1 or p.pp_stages_per_rank == 1):
        return Refusal(
            f"parallel.schedule = interleaved with pp = {p.pp}, pp_stages_per_rank = {p.pp_stages_per_rank}",
            "interleaving alternates between several pp_stages on each of several ranks",
            "set pp and pp_stages_per_rank to 2 or more, or schedule: 1f1b",
        )
    if p.schedule != "interleaved" and p.pp_stages_per_rank > 1:
        return Refusal(
            f"parallel.pp_stages_per_rank = {p.pp_stages_per_rank} with schedule = {p.schedule}",
            "only the interleaved schedule runs several pp_stages on a rank",
            "schedule: interleaved, or pp_stages_per_rank: 1",
        )
    return None


def _zero_bubble(r: Request) -> Refusal | None:
    p = r.parallel
    if p.schedule != "zero-bubble" or (p.pp > 1 and p.zero_stage < 3):
        return None
    if p.pp == 1:
        return Refusal(
            "parallel.schedule = zero-bubble with pp = 1",
            "one rank has no bubble to fill",
            "pp: 2 or more, or schedule: 1f1b",
        )
    return Refusal(
        "parallel.schedule = zero-bubble with zero_stage = 3",
        "the gradients of the weights come after the backward pass, when ZeRO-3 has given the weights back",
        "zero_stage: 2, 1 or 0, or schedule: 1f1b or interleaved",
    )


def _gather_once(r: Request) -> Refusal | None:
    if not r.parallel.gather_once or r.parallel.zero_stage == 3:
        return None
    return Refusal(
        f"parallel.gather_once = true with zero_stage = {r.parallel.zero_stage}",
        "the weights are split, and so gathered, only under ZeRO-3",
        "zero_stage: 3, or remove gather_once",
    )


def _offload(r: Request) -> Refusal | None:
    p = r.parallel
    if p.offload == "none" or p.zero_stage == 3 or (p.zero_stage and p.offload == "cpu"):
        return None
    return Refusal(
        f"parallel.offload = {p.offload} with zero_stage = {p.zero_stage}",
        "DeepSpeed keeps the optimizer elsewhere for ZeRO stages 1 to 3, and on NVMe for stage 3 only",
        "zero_stage: 3" + (" or offload: cpu with zero_stage 1 or 2" if p.offload == "nvme" else ", 2 or 1"),
    )


def _nvme(r: Request) -> Refusal | None:
    if r.parallel.offload != "nvme" or r.parallel.nvme_path:
        return None
    return Refusal(
        "parallel.offload = nvme", "no folder is named for it", "parallel.nvme_path = a folder on each node's NVMe"
    )


RULES = [
    Rule("The number of ranks is a multiple of tp x pp x ulysses; the quotient is dp.", _world),
    Rule("tp divides the attention heads.", _heads),
    Rule("tp divides the key-value heads, or is a multiple of them (each is then copied).", _kv_heads),
    Rule("tp divides the width of the MLP.", _ffn),
    Rule("ulysses divides a tensor-parallel rank's heads, and divides or multiplies its key-value heads.", _ulysses),
    Rule("There are at least as many layers as pp_stages (pp x pp_stages_per_rank).", _layers),
    Rule("Several pp_stages per rank and the interleaved schedule need each other, and pp of 2 or more.", _interleaved),
    Rule("The zero-bubble schedule needs pp of 2 or more, and weights that stay: ZeRO 0 to 2.", _zero_bubble),
    Rule("gather_once is a choice of ZeRO-3.", _gather_once),
    Rule("Offload to the CPU needs ZeRO, offload to NVMe needs ZeRO-3.", _offload),
    Rule("Offload to NVMe needs a folder.", _nvme),
]


def refusals(parallel: "ParallelConfig", prior: "PriorConfig", world: int) -> list[Refusal]:
    """Every rule that the layout of `world` ranks breaks, in the order of `RULES`; empty = legal."""
    request = Request(parallel, prior, world)
    return [found for rule in RULES if (found := rule.check(request))]
