"""Transfusion shared among ranks computes what one process does: outputs, loss, every gradient, in the fewest calls.

One start of four processes goes through all layouts (importing Megatron takes seconds); the tests look at what it
brought back. Two minutes of CPU, one of time.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.init import fill, generator_for
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.sharding import build_transfusion
from unicom_dist.models.transfusion import Part, Transfusion
from unicom_dist.parallel.engine import Piece, pieces_of
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.testing.distributed import run_ranks
from unicom_dist.testing.tiny_batch import tiny_batch

pytestmark = pytest.mark.dist
WORLD, LATENT, FEATURE = 4, 6, 10
CONFIG = PriorConfig(hidden=32, layers=3, heads=8, kv_heads=2, ffn=48, max_grid=8, tie_embeddings=False)

MIXED = [
    [("text", 5), ("latent", 4), ("text", 6)],
    [("feature", 6), ("text", 4)],
    [("text", 3)],
    [("text", 2), ("latent", 8), ("text", 3), ("feature", 2), ("text", 2), ("latent", 4)],
]  # 49 positions: they divide by no number of ranks
TEXT = [[("text", 7)], [("text", 14)]]
IMAGES = [[("latent", 9)], [("feature", 4), ("latent", 6)]]


@dataclass(frozen=True)
class Case:
    """A layout (dp is what it leaves of the four ranks), a model, and the batch of each dp coordinate in turn."""

    tp: int = 1
    ulysses: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    config: PriorConfig = CONFIG
    vocabulary: int = 50
    samples: tuple[Any, ...] = (MIXED,)
    parts: tuple[Part, ...] = (Part(),)
    dtype: torch.dtype = torch.float32
    train: str = "all"

    @property
    def layout(self) -> Layout:
        return Layout(
            dp=WORLD // (self.tp * self.ulysses),
            tp=self.tp,
            ulysses=self.ulysses,
            sequence_parallel=self.sequence_parallel,
            recompute=self.recompute,
        )

    def batches(self) -> list[PackedBatch]:
        """By dp coordinate."""
        samples = [self.samples[coordinate % len(self.samples)] for coordinate in range(self.layout.dp)]
        return [tiny_batch(s, self.vocabulary, LATENT, FEATURE, seed) for seed, s in enumerate(samples)]


TIED = CONFIG.model_copy(update={"tie_embeddings": True})
TWO_PARTS = (Part(True, False, (range(2),)), Part(False, True, (range(2, 3),)))
INTERLEAVED = (Part(True, False, (range(1), range(2, 3))), Part(False, True, (range(1, 2), range(3, 4))))
CASES = {
    "tp 2": Case(tp=2),
    "tp 2, sp": Case(tp=2, sequence_parallel=True),
    "tp 4, copied kv heads, uneven vocabulary": Case(tp=4),
    "tp 4, sp, copied kv heads, uneven vocabulary": Case(tp=4, sequence_parallel=True),
    "tp 4, sp, a rank with padding rows alone": Case(tp=4, sequence_parallel=True, vocabulary=5),
    "ulysses 2": Case(ulysses=2),
    "ulysses 4, copied kv heads": Case(ulysses=4),
    "tp 2, ulysses 2": Case(tp=2, ulysses=2),
    "tp 2, sp, ulysses 2": Case(tp=2, sequence_parallel=True, ulysses=2),
    "tp 2, sp, replicas without images and without text": Case(tp=2, sequence_parallel=True, samples=(TEXT, IMAGES)),
    "ulysses 2, replicas without text and without images": Case(ulysses=2, samples=(IMAGES, TEXT)),
    "tp 4, without text": Case(tp=4, samples=(IMAGES,)),
    "tp 2, sp, tied": Case(tp=2, sequence_parallel=True, config=TIED, vocabulary=49),
    "pp 2, tied, tp 2, sp": Case(tp=2, sequence_parallel=True, config=TIED, vocabulary=49, parts=TWO_PARTS),
    "pp 2, tied": Case(config=TIED, parts=TWO_PARTS),
    "pp 2 interleaved, tp 2, ulysses 2": Case(
        tp=2, ulysses=2, config=CONFIG.model_copy(update={"layers": 4}), parts=INTERLEAVED
    ),
    "tp 2, sp, ulysses 2, recompute full": Case(tp=2, sequence_parallel=True, ulysses=2, recompute="full"),
    "tp 2, sp, recompute selective": Case(tp=2, sequence_parallel=True, recompute="selective"),
    "tp 2, sp, ulysses 2, recompute selective": Case(tp=2, ulysses=2, sequence_parallel=True, recompute="selective"),
    "tp 2, sp, backbone frozen": Case(tp=2, sequence_parallel=True, train="connector"),
    "tp 2, sp, ulysses 2, bfloat16": Case(tp=2, sequence_parallel=True, ulysses=2, dtype=torch.bfloat16),
}


def weight(piece: Piece) -> Tensor:
    """Of a model in which no part starts at zero or one."""
    values = torch.randn(piece.shape, generator=generator_for(0, piece.name))
    return piece.of(values * 0.2 if len(piece.shape) > 1 else 0.5 + 0.3 * values)


def loss_of(outputs: tuple[Tensor, Tensor], batch: PackedBatch) -> Tensor:
    """Both terms, with weights that differ by label and by latent."""
    losses, velocity = outputs
    error = (velocity - (batch.latents - batch.noise)).square().mean(1)
    return (losses * (1 + batch.label_ids % 3)).sum() / 30 + (error * (1 + batch.t)).sum() / 20


@dataclass
class Finding:
    """What one rank brings back of a case."""

    loss: float = 0.0
    outputs: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
    gradients: dict[str, Tensor] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


def alone(case: Case) -> Finding:
    """The whole model on the batches of all replicas, one after the other."""
    model = Transfusion(case.config, case.vocabulary, LATENT, FEATURE)
    fill(model, weight)
    model.to(case.dtype).train_only(case.train)
    model.backbone.model.recompute = "none"
    losses, all_outputs = [], []
    for batch in case.batches():
        outputs = model(batch)
        losses.append(loss_of(outputs, batch))
        all_outputs.append(outputs)
    torch.stack(losses).sum().backward()
    outputs = tuple(torch.cat(parts).detach() for parts in zip(*all_outputs, strict=True))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return Finding(float(sum(losses)), outputs, gradients)


def forward(parts: list[Transfusion], batch: PackedBatch) -> Any:
    """Through the parts in the order of the pipeline, chunk by chunk."""
    x = None
    for chunk in range(len(parts[0].backbone.model.chunks)):
        for part in parts:
            x = part(batch, x, chunk)
    return x


def shared(case: Case) -> Finding:
    """The same by all ranks together; what is compared comes back from every rank."""
    mesh = init_mesh(case.layout)
    parts = [build_transfusion(case.config, case.vocabulary, LATENT, FEATURE, 0, mesh, part) for part in case.parts]
    for part in parts:
        fill(part, weight)
        part.to(case.dtype).train_only(case.train)
    batch = case.batches()[mesh.dp.rank]
    outputs = forward(parts, batch)
    region = parts[0].share.region(batch)
    loss = loss_of(outputs, region) * mesh.zero.size
    loss.backward()
    total = mesh.zero.sum(loss.detach().clone()) / mesh.zero.size
    everyones = gathered((mesh.dp.rank, mesh.ulysses.rank, [o.detach() for o in outputs]))
    once = {(dp, ulysses): o for dp, ulysses, o in everyones}
    finding = Finding(float(total), tuple(torch.cat(o) for o in zip(*(once[at] for at in sorted(once)), strict=True)))
    assemble(parts, mesh, finding)
    return finding


def gathered(value: Any) -> list[Any]:
    box: list[Any] = [None] * WORLD
    dist.all_gather_object(box, value)
    return box


def assemble(parts: list[Transfusion], mesh: Mesh, finding: Finding) -> None:
    """Whole gradients from the pieces, exactly as the pieces say: averaged over zero, partial ones summed."""
    entries = []
    for pp, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                finding.complaints.append(f"{name} has no gradient")
                continue
            flat, start = mesh.zero.sum(parameter.grad.clone()).flatten() / mesh.zero.size, 0
            for piece in pieces_of(name, parameter, tuple(parameter.shape)):
                entries.append((pp, mesh.tp.rank, piece, flat[start : start + piece.numel].view(piece.cut)))
                start += piece.numel
            if flat[start:].any():
                finding.complaints.append(f"{name}: padding has a gradient")
    ranks = mesh.tp.size
    first = {(pp, tp, piece.name): (piece, grad) for group in gathered(entries) for pp, tp, piece, grad in group}
    cuts: dict[tuple[Any, ...], list[tuple[int, int, Piece, Tensor]]] = {}
    for (pp, tp, name), (piece, grad) in first.items():
        cuts.setdefault((name, piece.begin, piece.cut), []).append((pp, tp, piece, grad))
    covered: Counter[str] = Counter()
    for (name, begin, _), holders in cuts.items():
        piece = holders[0][2]
        whole = finding.gradients.setdefault(name, torch.zeros(piece.shape))
        values = [grad for *_, grad in holders]
        sums = {holder.sum_over for *_, holder, _ in holders}
        if sums == {"tied"}:
            values = [sum(grad for pp, tp, _, grad in holders if tp == t) for t in {tp for _, tp, *_ in holders}]
        elif sums != {""}:
            values = [torch.stack(values).sum(0)]
        if any((value - values[0]).abs().max() > 1e-5 * values[0].abs().max() for value in values if value.numel()):
            finding.complaints.append(f"{name} from {begin}: copies got different gradients")
        if len(sums) != 1 or sum(holder.owner for *_, holder, _ in holders) != 1:
            finding.complaints.append(f"{name} from {begin}: {sums}, owners {[h.owner for *_, h, _ in holders]}")
        piece.of(whole).copy_(values[0])
        covered[name] += piece.numel
    for name, whole in finding.gradients.items():
        if covered[name] != whole.numel():
            finding.complaints.append(f"{name}: {covered[name]} of {whole.numel()} elements held by {ranks} ranks")


class Calls(TorchDispatchMode):
    """Counts the collectives that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def calls_per_layer(case: Case) -> tuple[Counter[str], Counter[str]]:
    """Collectives of a layer, forward and backward: those of a model of three less those of one, halved."""
    found = []
    for layers in (3, 1):
        mesh = init_mesh(case.layout)
        config = case.config.model_copy(update={"layers": layers})
        model = build_transfusion(config, case.vocabulary, LATENT, FEATURE, 0, mesh)
        batch = case.batches()[mesh.dp.rank]
        with Calls() as going:
            loss = loss_of(model(batch), model.share.region(batch))
        with Calls() as coming:
            loss.backward()
        found.append((going.counts, coming.counts))
    (three, three_back), (one, one_back) = found
    return tuple(
        Counter({name: (more[name] - less[name]) // 2 for name in more if more[name] > less[name]})
        for more, less in ((three, one), (three_back, one_back))
    )


def work(rank: int, world: int) -> dict[Any, Any]:
    """Everything this file looks at, from one rank."""
    result: dict[Any, Any] = {name: shared(case) for name, case in CASES.items()}
    if rank:
        result = {name: finding.complaints for name, finding in result.items()}
    for name in CALLS:
        result["calls", name] = calls_per_layer(CASES[name])
    result["initial"] = initial_weights_are_cut()
    return result


def initial_weights_are_cut() -> list[str]:
    """Parameters whose initial values are not the cuts of one process's."""
    case = CASES["tp 4, sp, copied kv heads, uneven vocabulary"]
    whole = dict(Transfusion(case.config, case.vocabulary, LATENT, FEATURE, 3).named_parameters())
    model = build_transfusion(case.config, case.vocabulary, LATENT, FEATURE, 3, init_mesh(case.layout))
    wrong = []
    for name, parameter in model.named_parameters():
        pieces = pieces_of(name, parameter, tuple(parameter.shape))
        expected = torch.cat([piece.of(whole[piece.name]).flatten() for piece in pieces])
        values, padding = parameter.flatten()[: len(expected)], parameter.flatten()[len(expected) :]
        if not torch.equal(values, expected) or padding.any():
            wrong.append(name)
    return wrong


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(work, WORLD, timeout_s=280)


@pytest.mark.parametrize("name", CASES)
def test_shared_equals_one_process(ranks: list[dict[Any, Any]], name: str) -> None:
    case, got = CASES[name], ranks[0][name]
    expected = alone(case)
    tolerance = 1e-5 if case.dtype == torch.float32 else 4e-2
    assert got.complaints == []
    assert [rank[name] for rank in ranks[1:]] == [[]] * (WORLD - 1)
    assert got.loss == pytest.approx(expected.loss, rel=tolerance)
    for ours, theirs in zip(got.outputs, expected.outputs, strict=True):
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) <= tolerance
    assert got.gradients.keys() == expected.gradients.keys()
    far = {n: d for n, g in expected.gradients.items() if (d := distance(got.gradients[n], g)) > tolerance}
    assert far == {}


# Sequence parallelism: gathered before q|k|v and gate|up, scattered after their ends; backward the transposes, and the
# two inputs gathered again for the weights' gradients. Ulysses: one exchange each way round attention.
GATHERED, SCATTERED, REDUCED, EXCHANGED = "_allgather_base_", "_reduce_scatter_base_", "allreduce_", "alltoall_base_"
CALLS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "tp 2": ({REDUCED: 2}, {REDUCED: 2}),
    "tp 2, sp": ({GATHERED: 2, SCATTERED: 2}, {GATHERED: 4, SCATTERED: 2}),
    "tp 2, sp, recompute selective": ({GATHERED: 2, SCATTERED: 2}, {GATHERED: 4, SCATTERED: 2}),
    "ulysses 2": ({EXCHANGED: 2}, {EXCHANGED: 2}),
    "tp 2, sp, ulysses 2": (
        {GATHERED: 2, SCATTERED: 2, EXCHANGED: 2},
        {GATHERED: 4, SCATTERED: 2, EXCHANGED: 2},
    ),
    # The forward's again, but for the last, whose result nobody reads.
    "tp 2, sp, ulysses 2, recompute full": (
        {GATHERED: 2, SCATTERED: 2, EXCHANGED: 2},
        {GATHERED: 6, SCATTERED: 3, EXCHANGED: 4},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_layer_communicates_the_least_it_can(ranks: list[dict[Any, Any]], name: str) -> None:
    for rank in ranks:
        assert rank["calls", name] == CALLS[name]


def test_initial_weights_are_cuts_of_one_process_s(ranks: list[dict[Any, Any]]) -> None:
    assert [rank["initial"] for rank in ranks] == [[]] * WORLD


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest value."""
    if not theirs.numel():
        return 0.0
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-30))
