"""On one GPU: tokens per second, MFU and peak memory of Qwen2.5-shaped priors, and transformers on the same row.

A step is the trainer's: batches to the device, `Execution`, `PlainEngine` (ZeRO 0: float32 master weights, AdamW on all
of them) and the moving average; reading data is not in it. A row is 8,192 positions. `mix8k` is 8 x [96 text, 256
drawn] + 3 x [32 text, 576 read, 416 text] + 1 x 4 [256 text, 256 read] + 256 text; `text` is one document. Every text
position has a label. Tokens are positions of any kind.
MFU is mask-exact: operations of `tracking/flops.py` (only visible pairs, labels that exist, nothing for recomputation)
over the time, over the data sheet's 989 TFLOP/s for H200 and over the best square GEMM of this very run.
transformers' Qwen2ForCausalLM (SDPA, loss of its own) runs in the same engine from the same weights; its first loss
and gradient norm are held against ours. A size whose step `unicom plan` puts beyond the card runs with as many of its
layers as leave room for the peer's logits, and the row says how many. The clock is wall time between synchronisations.

    python benchmarks/gpu/bench_train.py [--size 0.5B 1.5B 7B] [--steps 5] [--rounds 3]
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import Goal, Timing, importable, in_turn, publish

from unicom_dist.config.layout import Layout, Recompute
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import KernelsConfig, PriorConfig
from unicom_dist.models import functions
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.init import Source, fill, generator_for
from unicom_dist.models.segments import Mode, PackedBatch, Segment
from unicom_dist.objective.terms import LossTerm
from unicom_dist.parallel.engine import Piece
from unicom_dist.parallel.kernels import detect
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.pipeline.channels import Boundary
from unicom_dist.plan.hardware import USABLE
from unicom_dist.plan.memory import Batch, Memory, rank_memory
from unicom_dist.plan.parameters import Sizes
from unicom_dist.tracking.flops import device_peak, measure_peak, visible_pairs
from unicom_dist.train.ema import Ema
from unicom_dist.train.execution import Execution, LossSums
from unicom_dist.train.loop import add_up, make_engine
from unicom_dist.train.stages import PriorTask
from unicom_dist.train.watchdog import Watchdog

LATENT_CHANNELS, FEATURE_CHANNELS, LR, WARM_UP = 64, 1152, 1e-5, 2
LOGIT_BYTES = 14  # a logit of transformers' loss: bfloat16, float32, and gradients of both, with a copy
PLAIN, FLEX, COMPILED, BOTH = "plain", "flex_attention", "compile", "flex_attention + compile"
PEER, PEER_COMPILED = "transformers", "transformers, torch.compile"
Row = list[tuple[Mode, int]]
First = tuple[float, float]  # nats per label of a first step, and its gradient's norm


@dataclass(frozen=True)
class Size:
    """Shape of a published model and how it is trained here. `scale` divides the lengths of the rows."""

    prior: PriorConfig
    vocabulary: int
    recompute: Recompute = "none"
    micro_batches: int = 4
    scale: int = 1


def shape(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool = True) -> PriorConfig:
    return PriorConfig(
        hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=ffn, tie_embeddings=tied, norm_eps=1e-6
    )


SIZES = {
    "tiny": Size(shape(64, 2, 4, 2, 192), 512, "full", 2, 32),
    "0.5B": Size(shape(896, 24, 14, 2, 4864), 151_936),
    "1.5B": Size(shape(1536, 28, 12, 2, 8960), 151_936),
    "7B": Size(shape(3584, 28, 28, 4, 18_944, False), 152_064, "full"),
}
MIX: list[Row] = [
    *([[("causal", 96), ("noise", 256)]] * 8),
    *([[("causal", 32), ("full", 576), ("causal", 416)]] * 3),
    [("causal", 256), ("full", 256)] * 4,
    [("causal", 256)],
]
ROWS: dict[str, list[Row]] = {"mix8k": MIX, "text": [[("causal", 8192)]]}


def packed(samples: list[Row], size: Size, seed: int) -> PackedBatch:
    """A row of random content."""
    draw = torch.Generator().manual_seed(seed)
    segments = [Segment(n, mode, length // size.scale) for n, row in enumerate(samples) for mode, length in row]
    where: dict[str, list[int]] = {"causal": [], "noise": [], "full": []}
    grid: dict[str, list[tuple[int, int]]] = {"causal": [], "noise": [], "full": []}
    rope: list[int] = []
    times, latent_sample, label_sample, begin, sample, place = [], [], [], 0, -1, 0
    for s in segments:
        if s.sample != sample:
            sample, place = s.sample, 0
        where[s.mode] += range(begin, begin + s.length)
        side = int(s.length**0.5)
        grid[s.mode] += [(n // side, n % side) for n in range(s.length)] if s.mode != "causal" else []
        rope += range(place, place + s.length) if s.mode == "causal" else [place] * s.length
        place += s.length if s.mode == "causal" else 1
        if s.mode == "noise":
            times += [float(torch.rand((), generator=draw))] * s.length
            latent_sample += [s.sample] * s.length
        if s.mode == "causal":
            label_sample += [s.sample] * s.length
        begin += s.length
    text, drawn, read = (torch.tensor(where[mode], dtype=torch.int64) for mode in ("causal", "noise", "full"))
    latents, noise = torch.randn(2, len(drawn), LATENT_CHANNELS, generator=draw)
    ids, labels = torch.randint(size.vocabulary, (2, len(text)), generator=draw)
    grids = {mode: torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2) for mode, pairs in grid.items()}
    return PackedBatch(
        segments=segments,
        rope_positions=torch.tensor(rope),
        token_ids=ids,
        token_index=text,
        label_index=text.clone(),
        label_ids=labels,
        latents=latents,
        noise=noise,
        t=torch.tensor(times),
        latent_index=drawn,
        latent_grid=grids["noise"],
        features=torch.randn(len(read), FEATURE_CHANNELS, generator=draw),
        feature_index=read,
        feature_grid=grids["full"],
        keys=[str(n) for n in range(len(samples))],
        tasks=["benchmark"] * len(samples),
        label_sample=torch.tensor(label_sample),
        latent_sample=torch.tensor(latent_sample, dtype=torch.int64),
    )


@dataclass(frozen=True)
class Tokens:
    """All that a step asks of a vocabulary."""

    size: int


class Shaped(PriorTask):
    """The trainer's prior task without data on disk."""

    def __init__(self, size: Size, prior: PriorConfig, device: torch.device) -> None:
        precision = "bfloat16" if device.type == "cuda" else "float32"
        config = load_recipe("tiny").config
        off = KernelsConfig(**dict.fromkeys(KernelsConfig.model_fields, "off"))
        self.config = config.model_copy(update={"prior": prior, "kernels": off})
        stage = next(stage for stage in config.stages if stage.kind == "prior")
        self.stage = stage.model_copy(update={"precision": precision, "trainable": "all"})
        self._device, self._channels = device, FEATURE_CHANNELS
        vocabulary: Any = Tokens(size.vocabulary)
        self._vocabulary = vocabulary
        self._stats = LatentStats(torch.zeros(LATENT_CHANNELS), torch.ones(LATENT_CHANNELS))

    @property
    def source(self) -> Source:  # type: ignore[override]  # drawn where it is quick
        """Weights of the shape's usual spread, by name: the peer has the same."""

        def draw(piece: Piece) -> Tensor:
            if len(piece.shape) < 2:
                return torch.zeros(piece.cut) if piece.name.endswith("bias") else torch.ones(piece.cut)
            seed = generator_for(0, piece.name).initial_seed()
            generator = torch.Generator(self._device).manual_seed(seed)
            return piece.of(torch.randn(piece.shape, generator=generator, device=self._device) * 0.02)

        return draw


class Causal(nn.Module):
    """transformers' model: a row of one document in, the sum of its labels' losses out."""

    def __init__(self, prior: PriorConfig, vocabulary: int, recompute: bool) -> None:
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=prior.hidden,
            intermediate_size=prior.ffn,
            num_hidden_layers=prior.layers,
            num_attention_heads=prior.heads,
            num_key_value_heads=prior.kv_heads,
            max_position_embeddings=32_768,
            rms_norm_eps=prior.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": prior.rope_theta},
            tie_word_embeddings=prior.tie_embeddings,
            attn_implementation="sdpa",
        )
        self.backbone = Qwen2ForCausalLM(config)
        if recompute:
            self.backbone.gradient_checkpointing_enable()
        self.train()

    def forward(self, batch: PackedBatch) -> Tensor:
        labels = batch.label_ids[None]
        out = self.backbone(
            batch.token_ids[None], labels=labels, shift_labels=labels, num_items_in_batch=1, use_cache=False
        )
        loss: Tensor = out.loss
        return loss


class Peer(Shaped):
    """transformers' model in the trainer's step."""

    def build(self, mesh: Mesh) -> nn.Module:
        with mesh.device:
            module = Causal(self.config.prior, self._vocabulary.size, mesh.layout.recompute == "full")
        fill(module, self.source)
        return module

    def terms(self, outputs: Any, batch: PackedBatch) -> dict[str, LossTerm]:
        return {"text": LossTerm(outputs, len(batch.label_ids), self.stage.lambda_text)}

    def boundaries(self, batch: PackedBatch) -> list[Boundary]:
        return []


class Trainer:
    """Model and engine of a task; `step` is one of training."""

    def __init__(self, task: Shaped, layout: Layout, device: torch.device) -> None:
        self.task, self.mesh = task, Mesh(0, 1, device, layout)
        self.engine = make_engine(task, task.config, task.stage, self.mesh)
        self.ema = Ema(self.engine.state()["weight"], task.stage.ema)
        self.execution = Execution(task, self.engine, self.mesh, Watchdog())
        self.sums = LossSums()

    def step(self, batches: list[PackedBatch]) -> float:
        """The gradient's norm."""
        counts: dict[str, float] = {}
        for batch in batches:
            add_up(counts, self.task.counts(batch))
        on_device = [batch.to(self.mesh.device) for batch in batches]
        whole = {name: int(value) for name, value in counts.items()}
        self.execution.train(on_device, whole, self.sums.add)
        norm = self.engine.step(LR)
        self.ema.update()
        return norm

    def first(self, batches: list[PackedBatch]) -> tuple[float, float]:
        """Nats per label of the first step, and its gradient's norm."""
        norm = self.step(batches)
        nats = self.sums.take(["text"], self.mesh)["text"][0]
        return nats / sum(len(batch.label_ids) for batch in batches), norm


@dataclass(frozen=True)
class Measured:
    """Seconds of each step of a round, and the most bytes allocated in it (0 where torch does not count)."""

    seconds: list[float]
    peak: int


def measured(step: Callable[[], object], steps: int, device: torch.device) -> Measured:
    """After `WARM_UP` steps that do not count."""
    gpu, seconds = device.type == "cuda", []
    if gpu:
        torch.cuda.empty_cache()
    for _ in range(WARM_UP):
        step()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Measured(seconds, torch.cuda.max_memory_allocated() if gpu else 0)


@contextmanager
def kernels(trainer: Trainer, compiled: dict[str, Callable[..., Any]], name: str) -> Iterator[None]:
    """Within the block the model computes with the kernels of that row."""
    plain, share = dict(functions._FORMS), trainer.engine.module.share
    if COMPILED in name:
        functions._FORMS.update(compiled)
    share.flex = FLEX in name
    try:
        yield
    finally:
        functions._FORMS.update(plain)
        share.flex = False


def compiled_forms() -> dict[str, Callable[..., Any]]:
    plain = dict(functions._FORMS)
    functions.compile_all()
    forms = dict(functions._FORMS)
    functions._FORMS.update(plain)
    return forms


def plan(size: Size, prior: PriorConfig, layout: Layout, row: PackedBatch, precision: str) -> Memory:
    """What `unicom plan` says of a step of such rows."""
    sizes = Sizes(size.vocabulary, LATENT_CHANNELS, FEATURE_CHANNELS)
    batch = Batch(row.num_positions, len(row.label_ids) / row.num_positions, size.micro_batches)
    return rank_memory(prior, sizes, layout, batch, 0, precision)


def fitting(size: Size, layout: Layout, row: PackedBatch, device: torch.device) -> PriorConfig:
    """The shape with all its layers, or with as many as the card can train."""
    if device.type != "cuda" or plan(size, size.prior, layout, row, "bfloat16").total <= room(device):
        return size.prior
    left = room(device) - LOGIT_BYTES * row.num_positions * size.vocabulary
    for layers in range(size.prior.layers - 1, 0, -1):
        prior = size.prior.model_copy(update={"layers": layers})
        if plan(size, prior, layout, row, "bfloat16").total <= left:
            return prior
    raise SystemExit(f"not measured: not one layer of hidden = {size.prior.hidden} fits this GPU")


def room(device: torch.device) -> int:
    """Bytes of the card that a plan may use."""
    return int(USABLE * torch.cuda.get_device_properties(device).total_memory)


def run(name: str, options: argparse.Namespace, device: torch.device) -> tuple[list[dict[str, Any]], First, First]:
    """Figures of every row of a size; the first loss and gradient norm, ours and the peer's (zeros without it)."""
    size, cuda = SIZES[name], device.type == "cuda"
    layout = Layout(recompute=size.recompute)
    rows = {row: [packed(s, size, n) for n in range(size.micro_batches)] for row, s in ROWS.items()}
    prior = fitting(size, layout, rows["text"][0], device)
    found: list[dict[str, Any]] = []

    def note(method: str, row: str, task: Shaped, rounds: list[Measured]) -> None:
        timing = Timing.of([second for one in rounds for second in one.seconds])
        memory = plan(size, prior, layout, rows[row][0], task.stage.precision)
        found.append(
            {
                "size": name,
                "layers": prior.layers,
                "of_layers": size.prior.layers,
                "recompute": size.recompute,
                "micro_batches": size.micro_batches,
                "row": row,
                "method": method,
                "seconds": timing,
                "tokens": sum(batch.num_positions for batch in rows[row]),
                "flops": sum(Shaped.amounts(task, batch)["flops"] for batch in rows[row]),
                "visible_share": visible_pairs(rows[row][0].segments) / rows[row][0].num_positions ** 2,
                "peak_bytes": max(one.peak for one in rounds),
                "plan_bytes": memory.table(),
                "plan_total_bytes": memory.total,
                "plan_whole_bytes": plan(size, size.prior, layout, rows[row][0], task.stage.precision).total,
            }
        )

    available = {kernel.option for kernel in detect(cuda) if kernel.available}
    methods = [PLAIN, *(m for m in (FLEX, COMPILED, BOTH) if set(m.split(" + ")) <= available and not options.plain)]
    ours = Shaped(size, prior, device)
    trainer, forms = Trainer(ours, layout, device), compiled_forms()
    with kernels(trainer, forms, FLEX if FLEX in methods else PLAIN):
        first = trainer.first(rows["text"])

    def ours_once(method: str, row: str) -> Measured:
        with kernels(trainer, forms, method):
            return measured(lambda: trainer.step(rows[row]), options.steps, device)

    pairs = [(method, row) for row in ROWS for method in methods]
    turns = {f"{row}/{method}": (lambda m=method, r=row: ours_once(m, r)) for method, row in pairs}
    for (method, row), rounds in zip(pairs, in_turn(turns, options.rounds).values(), strict=True):
        note(method, row, ours, rounds)
    trainer.engine.close()
    del trainer
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    if not importable("transformers"):
        return found, first, (0.0, 0.0)
    theirs = Peer(size, prior, device)
    try:
        trainer = Trainer(theirs, layout, device)
        peer_first = trainer.first(rows["text"])
        for method in (PEER, PEER_COMPILED)[: 2 if COMPILED in methods and cuda else 1]:
            if method == PEER_COMPILED:
                trainer.engine.module.backbone.compile()
            turn = {method: lambda: measured(lambda: trainer.step(rows["text"]), options.steps, device)}
            note(method, "text", theirs, in_turn(turn, options.rounds)[method])
    except torch.OutOfMemoryError:
        print(f"  {name}: transformers ran out of memory: its rows are left out from there")
        peer_first = (0.0, 0.0)
    return found, first, peer_first


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a goal was missed, 3 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["0.5B", "1.5B", "7B"])
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a trial of the script, tiny only"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps of a round that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="leave out the rows of FlexAttention and torch.compile")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: torch sees no GPU (a trial without one: --size tiny --device cpu)")
        return 3
    if options.device == "cpu" and options.size != ["tiny"]:
        parser.error("on a CPU only --size tiny ends in reasonable time")
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    gemm, found, goals, losses = 0.0, [], [], {}
    for name in options.size:
        gemm = max(gemm, measure_peak(device, dtype, 2.0 if cuda else 0.3).flops_per_s)
        rows, first, peer_first = run(name, options, device)
        found += rows
        losses[name] = {"ours": first, "transformers": peer_first}
        if peer_first[0]:
            loss, norm = (100 * abs(theirs / own - 1) for theirs, own in zip(peer_first, first, strict=True))
            goals.append(Goal(f"{name}: first losses differ by", loss, 0.1, False, "%"))
            goals.append(Goal(f"{name}: first gradient norms differ by", norm, 2, False, "%"))
    gemm = max(gemm, measure_peak(device, dtype, 2.0 if cuda else 0.3).flops_per_s)
    sheet = device_peak(device, dtype) if cuda else None
    table = []
    for figure in found:
        rate = figure["flops"] / figure["seconds"].median
        figure |= {"tokens_per_s": figure["tokens"] / figure["seconds"].median, "mfu_gemm": rate / gemm}
        if sheet:
            figure["mfu_sheet"] = rate / sheet.flops_per_s
        peak = figure["peak_bytes"]
        cut = "" if figure["layers"] == figure["of_layers"] else f", {figure['layers']} of {figure['of_layers']} layers"
        table.append(
            [
                figure["size"] + cut,
                figure["row"],
                figure["method"],
                f"{figure['tokens_per_s']:,.0f}",
                f"{figure['mfu_sheet']:.3f}" if sheet else "-",
                f"{figure['mfu_gemm']:.3f}",
                f"{peak / 1e9:.1f}" if peak else "-",
                f"{figure['plan_total_bytes'] / 1e9:.1f}" if peak else "-",
                figure["seconds"].spread,
            ]
        )
    if cuda:
        goals += goals_of(found)
    print(f"\nGEMM of this run: {gemm / 1e12:.3g} TFLOP/s; {sheet.source if sheet else 'no data sheet: CPU'}\n")
    what: dict[str, Any] = (
        {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if cuda else {"name": "CPU"}
    )
    if cuda:
        what["bytes"] = torch.cuda.get_device_properties(device).total_memory
    figures = {"device": what, "gemm_flops_per_s": gemm, "data_sheet": asdict(sheet) if sheet else None}
    met = publish(
        "gpu_train" if cuda else "gpu_train_trial_on_cpu",
        ["model", "row", "method", "tokens/s", "MFU sheet", "MFU GEMM", "peak GB", "plan GB", "spread"],
        table,
        goals,
        {**figures, "first_loss_and_norm": losses, "rows": found},
        ("transformers", "triton"),
    )
    return 0 if met else 1


def goals_of(found: list[dict[str, Any]]) -> Iterator[Goal]:
    """Of the best of our methods on each row."""
    for name in dict.fromkeys(figure["size"] for figure in found):
        own = [f for f in found if f["size"] == name]
        mine = {r: min((f for f in own if f["row"] == r and PEER not in f["method"]), key=_median) for r in ROWS}
        mix, bound = mine["mix8k"], {"1.5B": 0.47, "7B": 0.50}.get(name)
        if bound and "mfu_sheet" in mix:
            yield Goal(f"{name}: MFU, data sheet", mix["mfu_sheet"], bound, unit="")
        off = 100 * abs(mix["peak_bytes"] / mix["plan_total_bytes"] - 1)
        yield Goal(f"{name}: peak against plan", off, 3, at_least=False, unit="%")
        eager = [f for f in own if f["method"] == PEER]
        if eager:
            yield Goal(f"{name}: over transformers, text", _median(eager[0]) / _median(mine["text"]), 1.15)


def _median(figure: dict[str, Any]) -> float:
    median: float = figure["seconds"].median
    return median


if __name__ == "__main__":
    raise SystemExit(main())
