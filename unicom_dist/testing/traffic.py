"""What the ranks of a layout send in a step of the prior, for every purpose, beside the least that serves it.

The real Transfusion goes through the trainer's own execution and engine on four gloo ranks; calls are told apart by the
axis on which they run and by forward, backward and optimizer step. What a layer sends is the difference between a deep
and a shallow model, divided by the difference in depth; what is left of the shallow one is its ends'.

Least (calls, bytes sent) of a rank, for the way each is done (not a bound on all ways: a backward pass of the embedding
needs no weights, yet ZeRO 3 gathers them). t, u, n = ranks of tp, ulysses, zero; S positions of the batch, padded; h
width; a query and g key heads of k; Y labels; m micro-batches; P parameters of the rank's pp_stage; 2 bytes (bfloat16)
but for gradients between ranks and the loss's statistics (4):

    tp + sp, a layer forward    (4, 4 2 S h (t-1)/t)       two gathers, two scattered sums: arXiv 2205.05198, fig. 5
             a layer backward   (6, 6 2 S h (t-1)/t)       their transposes; two inputs gathered again for d_weight
             embedding          (2, 2 2 S h (t-1)/t)       scattered sum of the looked-up rows, and its transpose
             heads              (3, (2 S h + 2 2 Y h + 8 t Y) (t-1)/t)
                                positions gathered, d_hidden of the labels summed; two numbers a label and rank
             norms, image towers (1, 2 4 P' (t-1)/t)       all-reduce of the P' gradients of which each rank has a part
             copied key heads   (1, 2 4 P" (c-1)/c)        the same among the c = t/g ranks that hold a copy, if t > g
    ulysses  a layer, each way  (2, 2 S/u (2 a + 2 g) k (u-1)/u)   in: q, k, v; out: heads: arXiv 2309.14509, section 3
    pp       boundary           (m, 2 m S h / (t under sp))        in each direction that the rank has a neighbour in
    ZeRO 3   one by one         (2 m M + 1, (4 + 2 m 2) P (n-1)/n) M modules with weights, gathered twice a micro-batch
             gather once        (2, (4 + 2) P (n-1)/n)     one all-gather, one reduce-scatter
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import CodecConfig, Config, PriorConfig, StageConfig
from unicom_dist.models.segments import PackedBatch
from unicom_dist.parallel.engine import Engine, pieces_of
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.testing.communication import Call, Communication
from unicom_dist.testing.layouts import LayoutTask
from unicom_dist.testing.tiny_batch import tiny_batch
from unicom_dist.train.execution import Execution
from unicom_dist.train.loop import make_engine
from unicom_dist.train.watchdog import Watchdog

VOCABULARY, LATENT, FEATURE = 256, 32, 32  # everything divides among four ranks, and no tensor is below 64 bytes
HEADS, KV_HEADS, HEAD, WIDTH = 8, 2, 16, 128
SHALLOW, DEEP = 2, 6
SAMPLES = [[("text", 24), ("latent", 16)], [("feature", 8), ("text", 16)]]  # 64 positions
LOW, GRADIENT = 2, 4  # bytes
# Weights that would stay gathered, be fetched ahead or be at hand from the pass before hide what a large model sends.
LARGE = {f"stage3_{name}": 0 for name in ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")}


@dataclass(frozen=True)
class Sent:
    """A rank's calls and bytes in a step for one purpose, and the least."""

    purpose: str
    calls: float
    least_calls: float
    bytes: float
    least_bytes: float


@dataclass(frozen=True)
class Step:
    """What a rank sent in one step, and the sizes on which the least depends."""

    log: list[Call]  # of forward and backward passes and the reduction
    finish: list[Call]  # of the optimizer step
    layers: int  # of this rank, as everything below
    modules: int  # with weights of their own
    parameters: int
    partial: dict[str, int]  # parameters by what their gradients are to be summed over


class TrafficTask(LayoutTask):
    """A prior stage whose sizes divide among the ranks."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        return VOCABULARY, LATENT, FEATURE


def configuration(layers: int, folder: str, layout: Layout) -> Config:
    """One prior stage in bfloat16; DeepSpeed's settings as for a model that is too large to keep anything gathered."""
    prior = PriorConfig(
        hidden=WIDTH, layers=layers, heads=HEADS, kv_heads=KV_HEADS, ffn=192, max_grid=8, tie_embeddings=False
    )
    stage = StageConfig.model_validate(
        {"name": "prior", "kind": "prior", "steps": 9, "batch": 8, "lr": 1e-3, "precision": "bfloat16"}
    )
    config = Config(name="traffic", run_dir=folder, codec=CodecConfig(), prior=prior, stages=[stage])
    if layout.zero_stage == 3 and not layout.gather_once:
        config.deepspeed.extra["zero_optimization"] = LARGE
    return config


def step_of(mesh: Mesh, layers: int, micros: int) -> Step:
    """The third step of a model (DeepSpeed records in the first two). Collective over the world."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(layers, folder, mesh.layout)
        task = TrafficTask(config)
        engine = make_engine(task, config, config.stages[0], mesh)
    execution = Execution(task, engine, mesh, Watchdog())
    batches = [batch_of(seed) for seed in range(micros)]
    counts = {name: n * micros * mesh.dp.size for name, n in task.counts(batches[0]).items()}
    for _ in range(3 if mesh.layout.zero_stage else 1):
        with Communication() as passes:
            execution.train(batches, counts, lambda terms: None)
        with Communication() as finish:
            engine.step(1e-3)
    engine.close()
    return sizes_of(engine, passes.log, finish.log)


def batch_of(seed: int) -> PackedBatch:
    """A micro-batch."""
    return tiny_batch(SAMPLES, VOCABULARY, LATENT, FEATURE, seed)


def sizes_of(engine: Engine, log: list[Call], finish: list[Call]) -> Step:
    """The step with the sizes of this rank's slice of the model."""
    module: Any = engine.module
    partial: dict[str, int] = {}
    parameters = 0
    for name, p in module.named_parameters():
        shape = tuple(getattr(p, "ds_shape", p.shape))
        for piece in pieces_of(name, p, shape):
            parameters += piece.numel
            partial[piece.sum_over] = partial.get(piece.sum_over, 0) + piece.numel
    layers = sum(len(chunk) for chunk in module.backbone.model.chunks)
    return Step(log, finish, layers, modules_with_weights(module), parameters, partial)


def modules_with_weights(module: nn.Module) -> int:
    """What ZeRO 3 gathers in one go."""
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules())


def total(calls: Iterable[Call], ranks: tuple[int, ...], backward: bool | None = None) -> tuple[int, int]:
    """(calls, bytes) among `ranks`, in one direction or both; not what is below 64 bytes."""
    found = [c for c in calls if c.ranks == ranks and c.name != "small" and backward in (None, c.backward)]
    return len(found), sum(c.sent for c in found)


def traffic(layout: Layout, micros: int = 1) -> list[Sent]:
    """By purpose, on this rank. Collective over the world, which is `layout`'s."""
    mesh = init_mesh(layout)
    shallow = step_of(mesh, SHALLOW, micros)
    found: list[Sent] = []
    if layout.tp > 1:
        found += of_tensor_parallelism(mesh, shallow, step_of(mesh, DEEP, micros), micros)
    if layout.ulysses > 1:
        found += of_ulysses(mesh, shallow, step_of(mesh, DEEP, micros), micros)
    if layout.pp > 1:
        found.append(of_boundaries(mesh, shallow, micros))
    if layout.zero_stage == 3:
        found.append(of_weights(mesh, shallow, micros))
    return found


def per_layer(
    ranks: tuple[int, ...], shallow: Step, deep: Step, micros: int, least: tuple[tuple[int, float], tuple[int, float]]
) -> list[Sent]:
    """Forward and backward of one layer and micro-batch; `least` of both."""
    times, found = (deep.layers - shallow.layers) * micros, []
    for name, backward, (least_calls, least_bytes) in zip(("forward", "backward"), (False, True), least, strict=True):
        more, less = total(deep.log, ranks, backward), total(shallow.log, ranks, backward)
        calls, sent = ((a - b) / times for a, b in zip(more, less, strict=True))
        found.append(Sent(f"layer, {name}", calls, least_calls, sent, least_bytes))
    return found


def of_tensor_parallelism(mesh: Mesh, shallow: Step, deep: Step, micros: int) -> list[Sent]:
    """Layers, the ends of the model, and gradients of which every rank has a part."""
    batch, t, ranks = batch_of(0), mesh.tp.size, mesh.tp.ranks
    share, whole = (t - 1) / t, LOW * batch.num_positions * WIDTH
    found = per_layer(ranks, shallow, deep, micros, ((4, 4 * whole * share), (6, 6 * whole * share)))
    layers_calls, layers_bytes = (
        sum(values) * shallow.layers * micros
        for values in zip(*((sent.calls, sent.bytes) for sent in found), strict=True)
    )
    calls, sent = total(shallow.log, ranks)
    labels = len(batch.label_ids)
    least_calls, least = 0, 0.0
    if mesh.pp.rank == 0:
        least_calls, least = 2, 2 * whole * share
    if mesh.last_pp_stage:
        least_calls, least = least_calls + 3, least + (whole + 2 * LOW * labels * WIDTH + 8 * t * labels) * share
    ends = (calls - layers_calls, least_calls * micros, sent - layers_bytes, least * micros)
    found.append(Sent("embedding, heads", *ends))
    least_sum = 2 * GRADIENT * shallow.partial.get("tp", 0) * share
    found.append(Sent("gradients in parts", *_pair(total(shallow.finish, ranks), (1, least_sum))))
    copies = t // KV_HEADS
    if copies > 1:
        first = mesh.tp.rank // copies * copies
        least_sum = 2 * GRADIENT * shallow.partial["kv"] * (copies - 1) / copies
        held = total(shallow.finish, ranks[first : first + copies])
        found.append(Sent("gradients of copied heads", *_pair(held, (1, least_sum))))
    return found


def of_ulysses(mesh: Mesh, shallow: Step, deep: Step, micros: int) -> list[Sent]:
    """The exchanges round attention: nothing else runs on the axis."""
    u = mesh.ulysses.size
    positions = batch_of(0).num_positions // u
    least = LOW * positions * (2 * HEADS + 2 * KV_HEADS) * HEAD * (u - 1) / u
    found = per_layer(mesh.ulysses.ranks, shallow, deep, micros, ((2, least), (2, least)))
    calls, sent = total(shallow.log, mesh.ulysses.ranks)
    times = shallow.layers * micros
    return [*found, Sent("both, whole model", calls, 4 * times, sent, 2 * least * times)]


def of_boundaries(mesh: Mesh, step: Step, micros: int) -> Sent:
    """Hidden states to the next pp_stage, gradients to the one before."""
    neighbours = (mesh.pp.rank > 0) + (not mesh.last_pp_stage)
    cut = mesh.layout.sequence_cut
    least = LOW * batch_of(0).num_positions // cut * WIDTH * micros * neighbours
    return Sent("boundary", *_pair(total(step.log, mesh.pp.ranks), (micros * neighbours, least)))


def of_weights(mesh: Mesh, step: Step, micros: int) -> Sent:
    """Gathered weights and reduced gradients."""
    n, once = mesh.zero.size, mesh.layout.gather_once
    gathers = 1 if once else 2 * micros
    least = (GRADIENT + gathers * LOW) * step.parameters * (n - 1) / n
    calls = 2 if once else gathers * step.modules + 1
    passes, finish = total(step.log, mesh.zero.ranks), total(step.finish, mesh.zero.ranks)
    both = (passes[0] + finish[0], passes[1] + finish[1])
    return Sent("weights and gradients", *_pair(both, (calls, least)))


def _pair(found: tuple[float, float], least: tuple[float, float]) -> tuple[float, float, float, float]:
    return found[0], least[0], found[1], least[1]
