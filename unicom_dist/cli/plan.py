"""`unicom plan`: who is where, what a rank needs and whether it fits, without starting anything."""

from typing import Annotated, Any

import typer

from unicom_dist.cli.screen import AsJson, Overrides, Recipe, load, print_json, print_table, say
from unicom_dist.config.errors import ConfigError

FULL_VOCABULARY = 151_936  # rows of Qwen2.5's tables


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", help="Ranks; 0 = parallel.nproc.", min=0)] = 0,
    hardware: Annotated[str, typer.Option("--hardware", help="A card: h100, h200, a100, ...")] = "h200",
    stage: Annotated[str, typer.Option("--stage", help="A prior stage; default: the last.")] = "",
    vocabulary: Annotated[
        int, typer.Option("--vocabulary", help="Tokens, where it is trimmed.", min=1)
    ] = FULL_VOCABULARY,
    feature_channels: Annotated[int, typer.Option("--features", help="Channels of the encoder.", min=1)] = 1152,
    text: Annotated[
        float, typer.Option("--text", help="Share of the positions with a text label.", min=0, max=1)
    ] = 0.5,
    drawn: Annotated[
        float, typer.Option("--drawn", help="Share that are latents to draw; query stages.", min=0, max=1)
    ] = 0.5,
    latents: Annotated[int, typer.Option("--latents", help="Latents of an image to draw; query stages.", min=1)] = 256,
    as_json: AsJson = False,
) -> None:
    """Print a prior's layout and the memory each rank needs. Exit status 2 if no card has that much."""
    from unicom_dist.config.layout import Layout, refusals
    from unicom_dist.plan.activations import Batch
    from unicom_dist.plan.hardware import MEMORY, USABLE
    from unicom_dist.plan.memory import rank_memory
    from unicom_dist.plan.parameters import Sizes, Trained, parts, pp_ranks

    config = load(recipe, overrides).config
    stages = [s for s in config.stages if s.kind == "prior" and stage in ("", s.name)]
    if not stages:
        names = ", ".join(s.name for s in config.stages if s.kind == "prior")
        raise ConfigError(f"--stage {stage}", "the recipe has no such prior stage", f"one of: {names}")
    if hardware not in MEMORY:
        raise ConfigError(f"--hardware {hardware}", "its memory is not known", f"one of: {', '.join(MEMORY)}")
    world = gpus or config.parallel.nproc
    for refusal in refusals(config.parallel, config.prior, world):
        raise ConfigError(refusal.what, refusal.why, refusal.remedy, "docs/parallelism.md")
    chosen, layout = stages[-1], Layout.of(config.parallel, world)
    sizes = Sizes(vocabulary, config.codec.compressor.channels, feature_channels)
    rows = max(1, chosen.batch // (layout.dp * chosen.micro_batches))
    positions = rows * chosen.row_positions
    latents_drawn = int(positions * drawn)
    batch = Batch(positions, text, chosen.micro_batches, latents_drawn, -(-latents_drawn // latents))
    precision = "float32" if chosen.precision == "float32" else "bfloat16"  # which auto is on every one of these cards
    trained = Trained.of(chosen)
    memory = [rank_memory(config.prior, sizes, layout, batch, pp, precision, trained) for pp in range(layout.pp)]
    most, room = max(m.total for m in memory), int(MEMORY[hardware] * USABLE)
    by_part = parts(config.prior, sizes, trained.query)
    whole = sum(by_part.values())
    moved = {name: count * (name in trained) for name, count in by_part.items()}
    if as_json:
        found: dict[str, Any] = {
            "stage": chosen.name,
            "parameters": whole,
            "trained": sum(moved.values()),
            "parts": {name: {"trained": n, "frozen": by_part[name] - n} for name, n in moved.items()},
            "layers": [[list(chunk) for chunk in chunks] for chunks in pp_ranks(config.prior, sizes, layout)],
            "ranks": [{"parameters": m.parameters, **m.table(), "total": m.total} for m in memory],
            "usable": room,
            "fits": most <= room,
        }
        print_json(found)
    else:
        say(layout.table() + "\n")
        rows_of_parts = [[name, f"{n:,}", f"{by_part[name] - n:,}"] for name, n in moved.items()]
        print_table([f"parameters of {chosen.name}", "trained", "frozen"], rows_of_parts)
        say(f"\n{whole:,} parameters, {sum(moved.values()):,} trained; {positions:,} positions in a micro-batch")
        purposes = list(memory[0].table())
        print_table(
            ["GB per rank", *purposes, "total"],
            [
                [f"pp {pp}", *(f"{m.table()[n] / 1e9:.2f}" for n in purposes), f"{m.total / 1e9:.2f}"]
                for pp, m in enumerate(memory)
            ],
        )
        verdict = "fits" if most <= room else "does NOT fit"
        say(f"{verdict}: {most / 1e9:.1f} of {room / 1e9:.1f} GB usable on {hardware}")
    if most > room:
        raise ConfigError(
            f"{most / 1e9:.1f} GB on a {hardware}",
            f"{room / 1e9:.1f} GB are usable there",
            "parallel.recompute=full, a higher zero_stage, more ranks or tp, smaller rows, or offload",
            "docs/parallelism.md",
        )
