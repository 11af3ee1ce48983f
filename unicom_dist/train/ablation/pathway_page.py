"""The page about a pathway ablation, made from `ablation.json`: verdicts, pictures, charts, figures, method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from unicom_dist.sample.sheet import picture_sheet
from unicom_dist.tracking.console import format_duration
from unicom_dist.tracking.report import tables
from unicom_dist.tracking.report.charts import Line, chart
from unicom_dist.tracking.report.data import load_run
from unicom_dist.tracking.report.document import document
from unicom_dist.tracking.report.html import Child, Markup, join, table, tag
from unicom_dist.train.ablation.drawing import METRICS
from unicom_dist.train.ablation.page import (
    ARROWS,
    WIDE,
    Result,
    interval,
    lead_picture,
    shade,
    title_block,
    trainings,
    verdicts,
)
from unicom_dist.train.ablation.pathway_claims import CHANCE


def render(result: Result, sheet: Path, run_dir: Path) -> str:
    """The page as HTML; `sheet` is the picture, `run_dir` has configuration and environment."""
    run = load_run(run_dir)
    sections = [
        ("verdict", "What it says beside the paper", verdicts(result)),
        ("pictures", "Drawn for the same held-out captions", pictures(sheet, result)),
        ("curves", "Convergence", curves(result)),
        ("figures", "Figures", figures(result)),
        ("method", "How it was done", method(result)),
        ("configuration", "Configuration", tables.configuration(run)),
        ("environment", "Environment", tables.environment(run)),
    ]
    return document("Pathway ablation – UniCom", header(result), sections)


def sheet(result: Result, originals: Sequence[Image.Image], strips: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Originals above, then one row per variant."""
    rows: list[tuple[str, Sequence[Image.Image]]] = [("the pictures of these captions", originals)]
    return picture_sheet([*rows, *((variant["label"], strips[variant["name"]]) for variant in result["variants"])])


def header(result: Result) -> Markup:
    """Title and the figures that say how large the experiment is."""
    facts = {
        "trainings": trainings(result),
        "steps": ", ".join(f"{steps} {name}" for name, steps in result["stages"].items()),
        "batch": f"{result['batch']} rows of {result['row_positions']} positions",
        "transformer": f"{result['layers']} layers of {result['hidden']}",
        "encoder": result["encoder"],
        "training time": format_duration(result["training_s"]),
    }
    return title_block("UniCom pathway ablation", "Who draws, and how many channels", facts)


def pictures(sheet: Path, result: Result) -> Markup | None:
    """The sheet, of the first seed, after the last step."""
    picture = lead_picture(sheet, "pictures for held-out captions, one row per variant")
    if picture is None:
        return None
    captions = tag("p", f"Captions, from the left: {'; '.join(result['captions'])}.")
    note = f"Drawn by the trainings with seed {result['seeds'][0]} after the last step, from the same noise."
    return join(picture, captions, tag("p", note))


def curves(result: Result) -> Markup:
    """Prompt retrieval and held-out flow loss over the steps, means over the seeds."""
    variants = result["variants"]
    charts = []
    for metric in METRICS:
        lines = []
        for variant in variants:
            points = [(int(step), estimate["mean"]) for step, estimate in variant["figures"][metric.name].items()]
            lines.append(Line(variant["label"], [(0, CHANCE), *points], shade(variant, variants), dots=True))
        charts.append(chart(f"{metric.name} {ARROWS[metric.better]}", lines, labels=True))
    for channels in sorted({variant["channels"] for variant in variants}):
        same = [variant for variant in variants if variant["channels"] == channels and variant["flow"]]
        if len(same) > 1:
            lines = [Line(v["label"], [(s, x) for s, x in v["flow"]], shade(v, variants), dots=True) for v in same]
            charts.append(chart("held-out flow loss ↓", lines, labels=True))
    note = (
        "Prompt retrieval: share of all other pictures that are less like the one drawn than the caption's own, in the"
        " eyes of ResNet50; one half before the first step. Flow losses of different latents cannot be compared."
    )
    return join(tag("div", *(item for item in charts if item), class_="charts", style=WIDE), tag("p", note))


def figures(result: Result) -> Markup:
    """Every figure at every step, with its interval."""
    steps = result["steps"]
    rows: list[list[Child]] = []
    for metric in METRICS:
        for variant in result["variants"]:
            cells: list[Child] = [metric.name, variant["label"], f"{variant['parameters'] / 1e6:.2f} M"]
            cells.append(f"{variant['step_s']:.2f} s")
            for step in steps:
                estimate = variant["figures"][metric.name][str(step)]
                bounds = tag("small", interval(estimate, metric.digits))
                cells.append(join(f"{estimate['mean']:.{metric.digits}f} ", bounds))
            rows.append(cells)
    head: list[Child] = ["figure", "variant", "trained parameters", "a step", *(f"step {step}" for step in steps)]
    note = (
        "95 % intervals over seeds and captions; they are wide because captions differ. The verdicts compare variants"
        " seed by seed and caption by caption. Parameters: of the stage that draws."
    )
    return join(table(head, rows, tuple(range(2, len(head)))), tag("p", note))


def method(result: Result) -> Markup:
    """What the figures mean, and what they cannot tell."""
    reading, *_, drawing = result["stages"]
    whole = result["variants"][-1]
    texts = [
        f"Every variant was trained with seeds {', '.join(map(str, result['seeds']))}, with one seed on the same"
        f" samples in the same order: the stages before {drawing} (first {reading}) teach the transformer to read and"
        f" are the same for both pathways; then {drawing} teaches drawing. In Pathway I it trains the whole"
        " transformer, in Pathway II the transformer stays as it is, and queries, connector and flow decoder are"
        " trained. Codecs are trained once per width, for all seeds.",
        f"A wider latent says more about its picture at the same noise. The shift of the times therefore grows with the"
        f" root of the width, so that drawing {whole['channels']} channels is not made harder by its times."
        f" The transformer is {result['hidden']} wide: with {whole['channels']} channels a latent does not fit"
        " through it, where in the paper (3584 wide, 1152 channels) it does. This favours compressed latents here.",
        f"{result['prompts']['heldout']} held-out and {result['prompts']['train']} training captions were drawn"
        " with the averaged weights at the steps given, with the same noise, solver and guidance, and decoded by the"
        " codec of the width. The page compares how fast they learn in these steps, not where they would end.",
        "Intervals are t intervals over seeds and captions at once (variance of the seeds' means plus that of the"
        " captions' means, degrees of freedom after Satterthwaite); of flow losses and steps over seeds alone. They are"
        " not corrected for the number of comparisons. A verdict needs the whole interval on one side.",
    ]
    return join(*(tag("p", text) for text in texts))
