"""Bytes kept for training: activations of a layer, and states of a rank under each ZeRO stage, against the formulas.

Activations: one backbone layer of width 512 on 1,280 bfloat16 positions; what torch allocated during the forward pass
and still holds after it, the layer's input included and its output (the next layer's input) not. The same for
transformers' Qwen2 layer, eager and compiled, on the same shapes.
States: two gloo ranks train a model of a million weights for two steps; what torch allocated meanwhile and still holds:
weights, master weights, moments, and the gradients that the engine keeps. The formulas are those of `unicom plan`.

    python benchmarks/bench_memory.py
"""

import gc
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Goal, importable, publish
from memory import held_bytes
from torch import Tensor, nn

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig, PriorConfig
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.backbone import Decoder
from unicom_dist.models.layers import rotary_angles
from unicom_dist.models.segments import Segment
from unicom_dist.parallel import kernels
from unicom_dist.plan.activations import layer_activations
from unicom_dist.testing.distributed import run_ranks

POSITIONS = 1280
PRIOR = PriorConfig(hidden=512, layers=1, heads=8, kv_heads=2, ffn=1408)
WIDTH, DEPTH, RANKS = 512, 4, 2


def kept(forward: Callable[[Tensor], Tensor]) -> float:
    """Bytes per position and channel between forward and backward."""
    x = torch.randn(POSITIONS, PRIOR.hidden).bfloat16().requires_grad_()
    forward(x)  # what libraries allocate at first use
    held, out = held_bytes(lambda: forward(x))
    return float((held - out.untyped_storage().nbytes() + x.nbytes) / POSITIONS / PRIOR.hidden)


def ours(mode: Any) -> float:
    """A decoder of one layer, its last norm left out."""
    decoder = Decoder(PRIOR, 8).bfloat16()
    decoder.recompute = mode
    decoder.norm = nn.Identity()  # type: ignore[assignment]
    plan = AttentionPlan.build([Segment(0, "causal", POSITIONS)], torch.bfloat16)
    angles = 2 * POSITIONS * 64 * 2  # cosines and sines, shared by all layers
    positions = torch.arange(POSITIONS)
    return kept(lambda x: decoder(x, positions, plan)) - angles / POSITIONS / PRIOR.hidden


def transformers_layer() -> Callable[[Tensor], Tensor]:
    """Qwen2's decoder layer with torch's attention kernel."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    config = Qwen2Config(
        hidden_size=PRIOR.hidden,
        num_attention_heads=PRIOR.heads,
        num_key_value_heads=PRIOR.kv_heads,
        intermediate_size=PRIOR.ffn,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    layer = Qwen2DecoderLayer(config, 0).bfloat16()
    cos, sin = (t.bfloat16()[None] for t in rotary_angles(torch.arange(POSITIONS), 64, 1e6))

    def forward(x: Tensor) -> Tensor:
        out = layer(x[None], position_embeddings=(cos, sin), attention_mask=None)
        return (out[0] if isinstance(out, tuple) else out)[0]

    return forward


def states(rank: int, world: int) -> dict[str, float]:
    """Bytes per weight that each engine holds after two steps."""
    from unicom_dist.parallel.deepspeed_config import deepspeed_config
    from unicom_dist.parallel.engine import OptimizerConfig
    from unicom_dist.parallel.mesh import init_mesh
    from unicom_dist.parallel.plain import PlainEngine
    from unicom_dist.parallel.zero import ZeroEngine, import_deepspeed

    import_deepspeed(torch.device("cpu"))
    found = {}
    # Small buckets: DeepSpeed allocates its own, of a size that does not depend on the model, at the start.
    small = {"zero_optimization": {"reduce_bucket_size": 1 << 12, "stage3_param_persistence_threshold": 0}}
    for stage in (0, 1, 2, 3):
        layout = Layout(dp=world, zero_stage=stage)
        mesh = init_mesh(layout)

        def train(stage: int = stage, layout: Layout = layout, mesh: Any = mesh) -> Any:
            module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))
            options = OptimizerConfig()
            settings = deepspeed_config(
                ParallelConfig(zero_stage=stage), layout, "bfloat16", small if stage == 3 else {}
            )
            engine = PlainEngine(module, options, mesh) if stage == 0 else ZeroEngine(module, options, mesh, settings)
            for _ in range(2):
                with engine.accumulate():
                    engine.backward(engine(torch.ones(4, WIDTH, dtype=torch.bfloat16)).float().sum())
                engine.step(1e-4)
            return engine

        held, engine = held_bytes(train)
        found[f"ZeRO-{stage}"] = held / (DEPTH * WIDTH**2)
        engine.close()
        del engine
        gc.collect()  # what the engine leaves must not be given back while the next is measured
    return found


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    torch.set_num_threads(1)
    rows, goals, figures = [], [], {}

    def add(what: str, found: float, formula: float, bound: float | None) -> None:
        rows.append([what, f"{found:.2f}", f"{formula:.2f}", f"{found / formula:.3f}"])
        figures[what] = {"found": found, "formula": formula}
        if bound:
            goals.append(Goal(what, found / formula, bound, at_least=False))

    for mode in ("none", "selective", "full"):
        formula = layer_activations(PRIOR, mode) / PRIOR.hidden
        add(f"layer, recompute {mode}", ours(mode), formula, 1.05)
    plain = layer_activations(PRIOR, "none") / PRIOR.hidden
    if importable("transformers"):
        layer = transformers_layer()
        add("layer, transformers", kept(layer), plain, None)
        if {k.option: k for k in kernels.detect(cuda=False)}["compile"].available:
            add("layer, transformers compiled", kept(torch.compile(layer)), plain, None)
    per_rank = run_ranks(states, RANKS, timeout_s=300)
    # weights 2, master weights and moments 12, gradients: 2 + 4 without ZeRO, 4 / ranks kept by stage 3
    formulas = {0: 20.0, 1: 2 + 12 / RANKS, 2: 2 + 12 / RANKS, 3: (2 + 12 + 4) / RANKS}
    for stage, formula in formulas.items():
        add(f"rank of {RANKS}, ZeRO-{stage}", max(found[f"ZeRO-{stage}"] for found in per_rank), formula, 1.02)
    print(f"\nlayer: bytes per position and channel; rank: bytes per weight (of {DEPTH * WIDTH**2:,})\n")
    met = publish(
        "bench_memory", ["", "found", "formula", "ratio"], rows, goals, figures, ("transformers", "deepspeed")
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
