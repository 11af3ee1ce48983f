"""A tiny prior with every feature on, trained by the trainer's own step under any layout, and by hand in one process.

The samples of a step are fixed; a layout only decides how they are cut into micro-batches and ranks. What comes back is
everything that has to be equal: losses, the gradient of the first step, norms, moments, weights, averages, and the
held-out loss of the averages.
Shapes as in `models/segments.py`.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import (
    CodecConfig,
    CompressorConfig,
    Config,
    ParallelConfig,
    PriorConfig,
    StageConfig,
)
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.init import Source, fill, generator_for
from unicom_dist.models.joint import JointPrior
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.objective.terms import LossTerm, joint_counts, joint_terms, prior_counts, prior_terms, total
from unicom_dist.parallel.engine import Buffers, Engine, Piece, decay_groups, whole_tensors
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.testing.tiny_batch import Stretch, tiny_batch
from unicom_dist.train.collapse import Spread
from unicom_dist.train.ema import Ema
from unicom_dist.train.execution import Execution, LossSums, Terms
from unicom_dist.train.joint import JointTask
from unicom_dist.train.loop import Run, make_engine, train_step
from unicom_dist.train.prior import PriorTask
from unicom_dist.train.schedule import learning_rate
from unicom_dist.train.signals import StopRequest
from unicom_dist.train.stages import Task
from unicom_dist.train.watchdog import Watchdog

VOCABULARY, LATENT, FEATURE = 67, 5, 7  # 67 does not divide by anything
PRIOR = PriorConfig(hidden=32, layers=5, heads=4, kv_heads=2, ffn=48, max_grid=8, tie_embeddings=False)
COMPRESSOR = CompressorConfig(channels=LATENT, heads=2, attention_width=8, expanded=6)
LATENTS = LatentStats(torch.linspace(-0.3, 0.3, LATENT), torch.linspace(0.5, 1.5, LATENT))
FEATURES = LatentStats(torch.linspace(-1, 1, FEATURE), torch.linspace(0.5, 2, FEATURE))
STEPS, PIECES = 5, 8

# The pieces of a step, from which micro-batches are made. One has no image, one no text, one no label at all.
SAMPLES: tuple[tuple[tuple[Stretch, ...], ...], ...] = (
    ((("text", 7),), (("text", 4),)),
    ((("latent", 4),),),
    ((("text", 5), ("latent", 6)), (("feature", 4), ("text", 6))),
    ((("feature", 4), ("text", 3), ("latent", 4)),),
    ((("text", 3), ("latent", 4), ("text", 5)), (("text", 2), ("latent", 2))),
    ((("feature", 6), ("text", 8)),),
    ((("text", 1), ("latent", 8)),),
    ((("text", 6), ("latent", 4)), (("feature", 2), ("text", 4)), (("text", 3),)),
)


@dataclass(frozen=True)
class Case:
    """What is trained, and how the ranks share it."""

    layout: Layout = field(default_factory=Layout)
    tied: bool = False
    precision: str = "float32"
    trainable: str = "all"
    merge: int = 1  # pieces per micro-batch
    joint: bool = False  # with the compressor
    options: bool = False  # two-dimensional positions, time tokens, norms of queries and keys, preconditioning, z-loss

    @property
    def config(self) -> Config:
        """One prior stage; nothing in it is read from disk."""
        options = {"positions": "rope2d", "time_injection": "token", "qk_norm": True, "prediction": "edm"}
        others = options if self.options else {}
        prior = PRIOR.model_copy(update={"tie_embeddings": self.tied, **others})
        stage = StageConfig.model_validate(
            {"name": "prior", "kind": "prior", "steps": STEPS, "batch": PIECES, "lr": 1e-2, "warmup": 2, "clip": 0.3}
            | {"eps": 1e-5, "weight_decay": 0.1, "ema": 0.5, "precision": self.precision, "trainable": self.trainable}
            | {"joint": {"enabled": self.joint, "momentum": 0.3}, "z_loss": 0.1 * self.options}
        )
        codec = CodecConfig(compressor=COMPRESSOR)
        return Config(name="layouts", run_dir=".", codec=codec, prior=prior, stages=[stage])

    @property
    def like(self) -> "Case":
        """The same training in one process."""
        return replace(self, layout=Layout(), merge=PIECES, precision="float32")


@dataclass
class Outcome:
    """What training left. Tensors are whole, on the CPU, on rank 0 alone."""

    losses: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradient: dict[str, Tensor] = field(default_factory=dict)  # of the first step, after clipping
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, Tensor] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    heldout: dict[str, float] = field(default_factory=dict)


def source(piece: Piece) -> Tensor:
    """Initial weights without zeros and ones, so that nothing is right by chance."""
    drawn = torch.randn(piece.shape, generator=generator_for(0, piece.name))
    if len(piece.shape) < 2:
        return piece.of(0.1 * drawn if piece.name.endswith("bias") else 1 + 0.1 * drawn)
    return piece.of(0.3 * drawn / piece.shape[1] ** 0.5 * (4 if "embed" in piece.name else 1))


def piece_of(step: int, number: int, options: bool = False) -> PackedBatch:
    """One piece of a step, of random content that depends on nothing else."""
    seed = 100 * step + number
    return tiny_batch(SAMPLES[number], VOCABULARY, LATENT, FEATURE, seed, rope2d=options, time_token=options)


def with_features(piece: PackedBatch, step: int, number: int) -> PackedBatch:
    """The piece with features of the images to be denoised instead of their latents."""
    features = torch.randn(piece.latents.shape[0], FEATURE, generator=generator_for(step, f"features {number}"))
    return replace(piece, latents=torch.full_like(piece.latents, torch.nan), target_features=features)


def merged(pieces: Sequence[PackedBatch]) -> PackedBatch:
    """The pieces one after the other on one axis."""
    first, *others = pieces
    for piece in others:
        positions, samples = first.num_positions, len(first.keys)
        values: dict[str, Any] = {}
        rows = ("rope_positions", "token_ids", "label_ids", "latents", "noise", "t", "latent_grid", "features")
        for name in (*rows, "feature_grid", "target_features", "times"):
            values[name] = torch.cat([getattr(first, name), getattr(piece, name)])
        for name in ("token_index", "label_index", "latent_index", "feature_index", "time_index"):
            values[name] = torch.cat([getattr(first, name), getattr(piece, name) + positions])
        values["flow_index"] = torch.cat([first.flow_index, piece.flow_index + first.latents.shape[0]])
        for name in ("label_sample", "latent_sample"):
            values[name] = torch.cat([getattr(first, name), getattr(piece, name) + samples])
        moved = [replace(segment, sample=segment.sample + samples) for segment in piece.segments]
        values |= {"segments": first.segments + moved, "keys": first.keys + piece.keys}
        first = replace(first, **values, tasks=first.tasks + piece.tasks, sources=first.sources + piece.sources)
    return first


class LayoutTask(PriorTask):
    """A prior stage without data on disk."""

    def __init__(self, config: Config) -> None:
        Task.__init__(self, config, config.stages[0])

    @property
    def sizes(self) -> tuple[int, int, int]:
        return VOCABULARY, LATENT, FEATURE

    @property
    def source(self) -> Source:
        return source

    def amounts(self, batch: PackedBatch) -> dict[str, float]:
        return {"tokens": float(batch.token_ids.shape[0])}


class JointLayoutTask(JointTask):
    """A joint stage without data on disk."""

    def __init__(self, config: Config) -> None:
        Task.__init__(self, config, config.stages[0])
        self._stats, self._features = LATENTS, FEATURES
        self._start, self._model, self._continues = Spread(LATENTS.std, 0.0), None, False

    sizes, source, amounts = LayoutTask.sizes, LayoutTask.source, LayoutTask.amounts


class Pieces:
    """The loader: a dp coordinate's consecutive share of each step's pieces, `merge` of them per micro-batch."""

    def __init__(self, case: Case, mesh: Mesh) -> None:
        share = PIECES // mesh.dp.size
        self._numbers = range(mesh.dp.rank * share, (mesh.dp.rank + 1) * share)
        self._merge, self._step, self._joint, self._options = case.merge, 0, case.joint, case.options

    def next_step(self) -> list[PackedBatch]:
        """The next step's."""
        pieces = [piece_of(self._step, number, self._options) for number in self._numbers]
        if self._joint:
            pieces = [with_features(piece, self._step, n) for n, piece in zip(self._numbers, pieces, strict=True)]
        self._step += 1
        return [merged(pieces[n : n + self._merge]) for n in range(0, len(pieces), self._merge)]


class Recorder:
    """In the observer's place."""

    def __init__(self, mesh: Mesh, outcome: Outcome) -> None:
        self._mesh, self._outcome, self._sums = mesh, outcome, LossSums()

    def add_losses(self, terms: Terms) -> None:
        """As the observer."""
        self._sums.add(terms)

    def step_done(self, counts: Mapping[str, int], amounts: Any, lr: float, norm: float, *_: Any) -> None:
        """As the observer."""
        sums = self._sums.take(list(counts), self._mesh)
        losses = {name: value / counts[name] for name, (value, _) in sums.items()}
        self._outcome.losses.append(
            losses | {"total": sum(value / counts[name] for name, (_, value) in sums.items()), **amounts}
        )
        self._outcome.norms.append(norm)

    def between_steps(self) -> None:
        """Nothing."""


def train(case: Case, mesh: Mesh, parallel: ParallelConfig | None = None) -> Outcome:
    """Train `case` on the ranks of `mesh`, whose layout is the case's. Collective over the world."""
    with tempfile.TemporaryDirectory() as folder:
        config = case.config.model_copy(update={"run_dir": folder, "parallel": parallel or ParallelConfig()})
        return _train(case, config, mesh)


def _train(case: Case, config: Config, mesh: Mesh) -> Outcome:
    torch.manual_seed(mesh.rank)  # nothing may depend on it
    stage = config.stages[0]
    task, dog = JointLayoutTask(config) if case.joint else LayoutTask(config), Watchdog()
    engine = make_engine(task, config, stage, mesh)
    ema = Ema(engine.state(), stage.ema)
    outcome, loader, store = Outcome(), Pieces(case, mesh), None
    execution = Execution(task, engine, mesh, dog)
    run = Run(config, stage, task, mesh, engine, ema, loader, store, StopRequest(), dog, execution)  # type: ignore[arg-type]
    observer: Any = Recorder(mesh, outcome)
    for step in range(STEPS):
        train_step(run, observer)
        if step == 0:
            moments = _whole(mesh, engine, engine.state()["exp_avg"])
            outcome.gradient = {name: value / (1 - stage.betas[0]) for name, value in moments.items()}
    state = engine.state()
    outcome.exp_avg = _whole(mesh, engine, state["exp_avg"])
    outcome.exp_avg_sq = _whole(mesh, engine, state["exp_avg_sq"])
    outcome.weight, outcome.ema = _whole(mesh, engine, state["weight"]), _whole(mesh, engine, ema.buffers)
    if case.joint and mesh.rank == 0:
        outcome.weight |= statistics_of(engine.module)
    batches, sums = Pieces(case, mesh).next_step(), LossSums()
    with engine.using(ema.buffers):
        for terms in execution.terms(batches):
            sums.add(terms)
    outcome.heldout = {name: pair[0] for name, pair in sums.take(list(task.counts(batches[0])), mesh).items()}
    train_step(run, Recorder(mesh, Outcome()))  # type: ignore[arg-type]  # the weights are the trained ones again
    engine.close()
    return outcome


def by_hand(case: Case) -> Outcome:
    """The same training with torch alone: one process, one forward and backward pass per step."""
    config, outcome = case.config, Outcome()
    stage = config.stages[0]
    model = Transfusion(config.prior, VOCABULARY, LATENT, FEATURE)
    terms_of: Callable[..., dict[str, LossTerm]] = prior_terms
    counts_of = prior_counts
    if case.joint:
        momentum = stage.joint.momentum
        model = JointPrior(config.prior, COMPRESSOR, VOCABULARY, LATENTS, FEATURES, momentum)
        terms_of, counts_of = joint_terms, joint_counts
    fill(model, source)
    model.train_only(case.trainable)  # type: ignore[arg-type]
    model.backbone.lm_head.z_loss = stage.z_loss
    matrices, vectors, _ = decay_groups(model)
    groups = [{"params": [p for _, p in named]} for named in (matrices, vectors)]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    adam = torch.optim.AdamW(
        groups, betas=stage.betas, eps=stage.eps, weight_decay=stage.weight_decay, foreach=False, fused=False
    )
    trained = dict([*matrices, *vectors])
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    alone = Mesh(0, 1, torch.device("cpu"))
    steps = Pieces(case.like, alone)
    for step in range(STEPS):
        (batch,) = steps.next_step()
        terms, counts = terms_of(model(batch), batch, stage), counts_of(batch, stage.z_loss)
        loss = total(terms, counts)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(list(trained.values()), stage.clip)
        if step == 0:
            outcome.gradient = {name: _grad(p) for name, p in trained.items()}
        for group in adam.param_groups:
            group["lr"] = learning_rate(stage, step)
        adam.step()
        if isinstance(model, JointPrior):
            model.statistics.update(lambda sums: sums)
        decay = min(stage.ema, (2 + step) / (11 + step))
        for name, p in model.named_parameters():
            ema[name].mul_(decay).add_(p.detach(), alpha=1 - decay)
        losses = {name: float(term.sum.detach()) / counts[name] for name, term in terms.items()}
        outcome.losses.append(losses | {"total": float(loss), "tokens": float(batch.token_ids.shape[0])})
        outcome.norms.append(float(norm))
    outcome.exp_avg = {name: adam.state[p]["exp_avg"] for name, p in trained.items()}
    outcome.exp_avg_sq = {name: adam.state[p]["exp_avg_sq"] for name, p in trained.items()}
    outcome.weight, outcome.ema = {name: p.detach().clone() for name, p in model.named_parameters()}, ema
    outcome.weight |= statistics_of(model) if case.joint else {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(ema[name])
        (batch,) = Pieces(case.like, alone).next_step()
        terms = terms_of(model(batch), batch, stage)
    outcome.heldout = {name: float(term.sum) for name, term in terms.items()}
    return outcome


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """What joint training keeps beside the weights."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.startswith("statistics.")}


def differences(got: Outcome, expected: Outcome) -> dict[str, float]:
    """Largest relative difference of each kind: of numbers, and of tensors over the tensor's largest element.

    Infinite where a tensor is missing or has another shape.
    """
    found = {"norm": _relative(got.norms, expected.norms), "heldout": 0.0, "loss": 0.0}
    found["heldout"] = _relative(list(got.heldout.values()), list(expected.heldout.values()))
    for mine, theirs in zip(got.losses, expected.losses, strict=True):
        found["loss"] = max(found["loss"], _relative([mine[name] for name in theirs], list(theirs.values())))
    for kind in ("gradient", "exp_avg", "exp_avg_sq", "weight", "ema"):
        mine, theirs = getattr(got, kind), getattr(expected, kind)
        errors = [_distance(mine.get(name), tensor) for name, tensor in theirs.items()]
        found[kind] = max(errors) if mine.keys() == theirs.keys() else float("inf")
    return found


def worst(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[tuple[float, str]]:
    """Tensors by distance, largest first: for the message of a test that fails."""
    return sorted(((_distance(got.get(name), tensor), name) for name, tensor in expected.items()), reverse=True)


def _distance(got: Tensor | None, expected: Tensor) -> float:
    if got is None or got.shape != expected.shape:
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _relative(got: Sequence[float], expected: Sequence[float]) -> float:
    pairs = zip(got, expected, strict=True)
    return max(abs(mine - theirs) / max(abs(theirs), 1e-12) for mine, theirs in pairs)


def _whole(mesh: Mesh, engine: Engine, buffers: Buffers) -> dict[str, Tensor]:
    """Every tensor that `buffers` hold anything of (frozen ones have no moments), on rank 0. Collective."""
    held = [f for f in engine.fragments if buffers[f.group].numel()]
    return dict(whole_tensors(mesh, buffers, held, engine.replicated, torch.float32))


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
