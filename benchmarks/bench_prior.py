"""One training step of the prior against the same prior on transformers' Qwen2, and against transfusion-pytorch.

A step is forward, losses, backward and fused AdamW, one thread, float32, in the same loop for everybody.

packed: one row of `PriorLoader`, the same at every step, in two sizes: a model of a hundred thousand weights (that of
`bench_step.py`) with a row of 96 positions, and one of seven million with a row of 1,024 that holds images of 8 x 8 to
16 x 16. The peer is what one writes with transformers: the ways in and out of the images are ours, everything else is
its Qwen2, given vectors, positions and a dense mask of the row, and torch's cross-entropy. It has our weights, and its
loss has to equal ours within 1e-5 before anything is timed. Mask and plan are made beforehand, as loaders do.

ragged: 16 samples a step, each a text and the image it asks for; texts log-normal (median 48 tokens, sigma 0.6, at most
192), images of 4 to 16 rows and columns, all drawn once. Four such steps in turn. The peer takes samples as they are,
lays them out and pads them in its forward, so ours lays out, packs and plans within the step, too; both draw noise and
times there. Width, depth, heads and vocabulary are the same; the peer's layers are conditioned on the time by maps of
4 x width, so ours has a wider MLP instead, for as many weights. Beside it the peer with its samples sorted by length
before they are cut into steps, as perfect bucketing would have it. Losses cannot be equal here: the models differ.

    python benchmarks/bench_prior.py [--rounds 7] [--only tiny 7M ragged]
"""

import argparse
import copy
import logging
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import Goal, Timing, importable, interleaved, publish
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.config.schema import Config, PriorConfig, StageConfig
from unicom_dist.data.loader import PriorLoader, build_vocabulary
from unicom_dist.data.samples import Arrays, Content, Picture, Text, collate, lay_out
from unicom_dist.models.attention import visible
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.flow import interpolate
from unicom_dist.models.layers import at_grid
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.objective.terms import prior_counts, prior_terms, total
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets

LR = 1e-4
OURS, QWEN2, TRANSFUSION, SORTED = "ours", "transformers", "transfusion-pytorch", "transfusion-pytorch, sorted"
Pass = Callable[[], None]  # some optimizer steps


@dataclass(frozen=True)
class Packed:
    """A model and the row it is trained on."""

    prior: dict[str, int]
    row_positions: int
    grids: tuple[tuple[int, int], ...]
    latent_channels: int
    feature_channels: int
    steps: int  # of a round
    goal: float


SIZES = {
    "tiny": Packed(
        {"hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 192, "layers": 2}, 96, ((2, 2),), 4, 12, steps=50, goal=2.5
    ),
    "7M": Packed(
        {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 768, "layers": 8},
        1024,
        ((8, 8), (12, 12), (16, 16)),
        64,
        384,
        steps=1,
        goal=1.08,
    ),
}
RAGGED = "ragged"
STEPS, SAMPLES = 4, 16  # of a round, of a step
WIDTH, DEPTH, HEADS, CHANNELS, FEATURES, TOKENS = 128, 4, 4, 16, 16, 1000
SPECIAL = 3 + 2 + 129  # ids that transfusion-pytorch adds: of sequences, of images, of the digits of their sizes
MODEL = PriorConfig(
    hidden=WIDTH, layers=DEPTH, heads=HEADS, kv_heads=HEADS, ffn=1412, tie_embeddings=False, max_grid=16
)
RAGGED_GOAL = 2.0


def trained(module: nn.Module, loss: Callable[[Any], Tensor], batches: Sequence[Any]) -> Pass:
    """The loop of all methods: a step on each batch."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-6, fused=True)

    def run() -> None:
        for batch in batches:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()

    return run


def our_loss(model: Transfusion, stage: StageConfig, batch: PackedBatch) -> Tensor:
    """As in training."""
    return total(prior_terms(model(batch), batch, stage), prior_counts(batch))


def packed_row(size: Packed, folder: Path) -> tuple[Config, Transfusion, PackedBatch]:
    """The tiny recipe with a prior of this size, and the loader's first row with all three tasks."""
    config = tiny_config(
        folder,
        prior=dict(size.prior),
        codec={"compressor": {"channels": size.latent_channels}},
        stages={"pretrain": {"batch": 1, "micro_batches": 1, "row_positions": size.row_positions}},
    )
    write_tiny_assets(folder)
    write_tiny_sets(config, feature_channels=size.feature_channels, grids=size.grids)
    vocabulary = build_vocabulary(config)
    model = Transfusion(config.prior, vocabulary.size, size.latent_channels, size.feature_channels)
    stats = LatentStats(torch.zeros(size.latent_channels), torch.ones(size.latent_channels))
    draw_weights(model)
    plan = partial(model.share.plan, dtype=torch.float32)
    with PriorLoader(config, config.stage("pretrain"), vocabulary, stats, plan=plan) as loader:
        while True:
            (batch,) = loader.next_step()
            if len(set(batch.tasks)) == 3:
                return config, model, batch


def draw_weights(model: nn.Module) -> None:
    """Matrices at random, so that every position counts in the loss; a new flow head is zero and would hide all."""
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=draw)


class OnQwen2(nn.Module):
    """Our prior as one writes it with transformers, with the weights of `ours`: row and mask in, loss out."""

    def __init__(self, ours: Transfusion, vocabulary_size: int, stage: StageConfig) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        super().__init__()
        config = ours.config
        self.language = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocabulary_size,
                hidden_size=config.hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                intermediate_size=config.ffn,
                rms_norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tie_embeddings,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        self.language.load_state_dict(ours.backbone.state_dict())
        towers = (ours.latent_in, ours.time, ours.connector, ours.flow_head)
        self.latent_in, self.time, self.connector, self.flow_head = map(copy.deepcopy, towers)
        self.register_buffer("places", ours.places)
        self.stage = stage

    def forward(self, batch: PackedBatch, mask: Tensor) -> Tensor:
        hidden = self.language.model(
            inputs_embeds=self.embed(batch)[None], attention_mask=mask, position_ids=batch.rope_positions[None]
        ).last_hidden_state[0]
        text = F.cross_entropy(self.language.lm_head(hidden[batch.label_index]), batch.label_ids)
        velocity = self.flow_head(hidden[batch.latent_index])
        flow = F.mse_loss(velocity, batch.latents - batch.noise)
        return self.stage.lambda_text * text + self.stage.lambda_flow * flow

    def embed(self, batch: PackedBatch) -> Tensor:
        """Input vectors [S, h]."""
        z_t = interpolate(batch.latents, batch.noise, batch.t)
        text = self.language.model.embed_tokens(batch.token_ids)
        latents = self.latent_in(z_t) + self.time(batch.t) + at_grid(self.places, batch.latent_grid)
        features = self.connector(batch.features.float()) + at_grid(self.places, batch.feature_grid)
        x = text.new_zeros(batch.num_positions, text.shape[1])
        x[torch.cat([batch.token_index, batch.latent_index, batch.feature_index])] = torch.cat(
            [text, latents, features]
        )
        return x


def dense_mask(batch: PackedBatch) -> Tensor:
    """[1, 1, S, S], additive: torch's kernel likes it best."""
    seen = visible(batch.segments)
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[None, None]


def require_equal(ours: Tensor, theirs: Tensor) -> None:
    """Both compute the same, or there is nothing to compare."""
    difference = float((ours - theirs).detach().abs() / ours.detach().abs())
    assert difference <= 1e-5, f"the losses differ by {difference:.1e}"
    print(f"  losses: {ours.item():.6f}, equal to {difference:.0e}")


class Measured(NamedTuple):
    """A comparison: seconds of a round of `steps`, weights and computed positions per method."""

    timings: dict[str, Timing]
    steps: int
    weights: dict[str, int]
    positions: dict[str, int]  # of a step


def packed(size: Packed, rounds: int) -> Measured:
    """Ours and transformers on one row."""
    with tempfile.TemporaryDirectory(prefix="bench-prior-") as name:
        config, model, batch = packed_row(size, Path(name))
        stage, vocabulary_size = config.stage("pretrain"), build_vocabulary(config).size
    batches = [batch] * size.steps
    loss = partial(our_loss, model, stage)
    modules: dict[str, nn.Module] = {OURS: model}
    methods = {OURS: trained(model, loss, batches)}
    if importable("transformers"):
        modules[QWEN2] = peer = OnQwen2(model, vocabulary_size, stage)
        their_loss = partial(peer, mask=dense_mask(batch))
        require_equal(loss(batch), their_loss(batch))
        methods[QWEN2] = trained(peer, their_loss, batches)
    timings = interleaved(methods, rounds)
    return Measured(timings, size.steps, weights_of(modules), dict.fromkeys(modules, batch.num_positions))


class Sample(NamedTuple):
    """A text and the image it asks for."""

    tokens: Tensor  # [T] int64
    latents: Tensor  # [rows, columns, d]

    @property
    def length(self) -> int:
        """Tokens and latents."""
        return len(self.tokens) + self.latents[..., 0].numel()


def samples(count: int) -> list[Sample]:
    """Lengths and sizes as the module says; the contents mean nothing."""
    draw, values = random.Random(0), torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        length = max(2, min(round(48 * draw.lognormvariate(0, 0.6)), 192))
        grid = draw.randint(4, 16), draw.randint(4, 16)
        tokens = torch.randint(TOKENS, (length,), generator=values)
        found.append(Sample(tokens, torch.randn(*grid, CHANNELS, generator=values)))
    return found


def steps_of(found: Sequence[Sample]) -> list[Sequence[Sample]]:
    """Cut into steps."""
    return [found[first : first + SAMPLES] for first in range(0, len(found), SAMPLES)]


def content(sample: Sample) -> Content:
    """Laid out, with noise and a time; all tokens but the first are learned."""
    first, *others = sample.tokens.tolist()
    grid = sample.latents.shape[0], sample.latents.shape[1]
    begin, end = TOKENS, TOKENS + 1
    layout = lay_out(
        "text_to_image", [Text((first,)), Text((*others, begin), learned=True), Picture(grid, ("draw",)), Text((end,))]
    )
    latents = sample.latents.flatten(0, 1)
    return Content("", layout, [Arrays(latents, torch.randn_like(latents), torch.rand(()).item())])


def pack(model: Transfusion, step: Sequence[Sample]) -> PackedBatch:
    """The samples of a step end to end, and how they attend."""
    batch = collate(list(map(content, step)), CHANNELS, FEATURES)
    batch.plan = model.share.plan(batch.segments, torch.float32)
    return batch


@torch.no_grad()
def padded_positions(model: nn.Module, steps: Sequence[Sequence[Sample]]) -> int:
    """What its transformer is given in a step, on average."""
    seen: list[int] = []
    handle = model.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 0].numel()))
    for step in steps:
        model([list(sample) for sample in step])
    handle.remove()
    return round(sum(seen) / len(seen))


def ragged(rounds: int) -> Measured:
    """Ours and transfusion-pytorch on samples of any length."""
    model, stage = (
        Transfusion(MODEL, TOKENS + SPECIAL, CHANNELS, FEATURES),
        StageConfig(name="pretrain", kind="prior", steps=1),
    )
    drawn = samples(STEPS * SAMPLES)
    steps = steps_of(drawn)
    modules: dict[str, nn.Module] = {OURS: model}
    methods = {OURS: trained(model, lambda step: our_loss(model, stage, pack(model, step)), steps)}
    positions = {OURS: round(sum(pack(model, step).num_positions for step in steps) / STEPS)}
    if importable("transfusion_pytorch"):
        import transfusion_pytorch

        for name, order in ((TRANSFUSION, drawn), (SORTED, sorted(drawn, key=lambda sample: sample.length))):
            modules[name] = peer = transfusion_pytorch.Transfusion(
                num_text_tokens=TOKENS,
                dim_latent=CHANNELS,
                modality_default_shape=(8, 8),
                transformer={"dim": WIDTH, "depth": DEPTH, "heads": HEADS, "dim_head": WIDTH // HEADS},
            )
            given = steps_of(order)
            positions[name] = padded_positions(peer, given)
            methods[name] = trained(peer, lambda step, peer=peer: peer([list(sample) for sample in step]), given)
    print(
        f"  {SAMPLES} samples a step, {sum(sample.length for sample in drawn) // STEPS} tokens and latents on average"
    )
    return Measured(interleaved(methods, rounds), STEPS, weights_of(modules), positions)


def weights_of(modules: dict[str, nn.Module]) -> dict[str, int]:
    """How many each has."""
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def ratio(measured: Measured, peer: str) -> float | None:
    """Time of a peer over ours."""
    timings = measured.timings
    return timings[peer].median / timings[OURS].median if peer in timings else None


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=[*SIZES, RAGGED], default=[*SIZES, RAGGED])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    found: dict[str, Measured] = {}
    goals = []
    for name in options.only:
        print(f"{name}:", flush=True)
        found[name] = ragged(options.rounds) if name == RAGGED else packed(SIZES[name], options.rounds)
        peer, bound = (TRANSFUSION, RAGGED_GOAL) if name == RAGGED else (QWEN2, SIZES[name].goal)
        goals.append(Goal(f"{peer} / ours, {name}", ratio(found[name], peer), bound))
    rows, figures = [], {}
    for name, measured in found.items():
        for method, timing in measured.timings.items():
            weights, positions = measured.weights[method], measured.positions[method]
            milliseconds, over = 1e3 * timing.median / measured.steps, ratio(measured, method)
            shown = [f"{milliseconds:.2f}", f"{over:.2f}", timing.spread]
            rows.append([name, method, f"{weights:,}", f"{positions:,}", *shown])
            figures[f"{name}, {method}"] = {
                "weights": weights,
                "positions": positions,
                "ms_per_step": milliseconds,
                "over_ours": over,
                "low": 1e3 * timing.low / measured.steps,
                "high": 1e3 * timing.high / measured.steps,
            }
    columns = ["data", "method", "weights", "positions", "CPU ms/step", "over ours", "spread"]
    met = publish("bench_prior", columns, rows, goals, figures, ("transformers", "transfusion-pytorch"))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
