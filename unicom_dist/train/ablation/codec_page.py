"""The page about a codec ablation, made from `ablation.json`: verdicts, pictures, tables, charts, how it was done."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unicom_dist.sample.sheet import picture_sheet
from unicom_dist.tracking.console import format_duration
from unicom_dist.tracking.report import tables
from unicom_dist.tracking.report.charts import Line, chart
from unicom_dist.tracking.report.data import load_run
from unicom_dist.tracking.report.document import document
from unicom_dist.tracking.report.forest import Bar, forest
from unicom_dist.tracking.report.html import Child, Markup, join, table, tag
from unicom_dist.train.ablation.codec_claims import label, reference_width
from unicom_dist.train.ablation.codec_grid import TABLE_4, Point, published
from unicom_dist.train.ablation.measured import Metric
from unicom_dist.train.ablation.page import (
    ARROWS,
    STACK,
    WIDE,
    Result,
    interval,
    lead_picture,
    numbers,
    sentence,
    shade,
    title_block,
    trainings,
    verdicts,
)
from unicom_dist.train.ablation.reconstruction import METRICS, PSNR, RFID

COLORS = {"identity": "#1c2430", "attention": "#3465a4", "mlp": "#c4601d"}
FEWER = {"identity": "#8a93a0", "attention": "#8fb4dd", "mlp": "#e9b48c"}  # the same with a quarter of the tokens


def render(result: Result, sheet: Path, run_dir: Path) -> str:
    """The page as HTML; `sheet` is the picture, `run_dir` has configuration and environment."""
    run = load_run(run_dir)
    sections = [
        ("verdict", "What it says beside the paper", verdicts(result)),
        ("pictures", "The same held-out pictures", pictures(sheet, result)),
        ("steps", "Equal steps", equal_steps(result)),
        ("scalars", "Equal scalars", equal_scalars(result)),
        ("paper", "Beside table 4", beside_paper(result)),
        ("curves", "Curves", curves(result)),
        ("method", "How it was done", method(result)),
        ("configuration", "Configuration", tables.configuration(run)),
        ("environment", "Environment", tables.environment(run)),
    ]
    return document("Codec ablation – UniCom", header(result), sections)


def sheet(result: Result, originals: Sequence[Image.Image], strips: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Originals above, then one row per variant."""
    rows: list[tuple[str, Sequence[Image.Image]]] = [("original", originals)]
    for variant in result["variants"]:
        name = name_of(variant).replace("×", "x")  # the built-in font has no such sign
        rows.append((name, strips[variant["name"]]))
    return picture_sheet(rows)


def header(result: Result) -> Markup:
    """Title and the figures that say how large the experiment is."""
    facts = {
        "trainings": trainings(result),
        "steps": f"{result['steps']} of {result['batch']} pictures",
        "pictures": f"{result['image_px']} px",
        "encoder": result["encoder"],
        "measured on": f"{result['pictures']} held-out pictures",
        "training time": format_duration(result["training_s"]),
    }
    return title_block("UniCom codec ablation", "Channels or tokens: what a codec can do without", facts)


def pictures(sheet: Path, result: Result) -> Markup | None:
    """The sheet, of the first seed."""
    picture = lead_picture(sheet, "held-out pictures, one row per variant")
    if picture is None:
        return None
    seed = result["seeds"][0]
    note = f"Drawn by the trainings with seed {seed} from the same noise. Rows: tokens × channels per picture."
    return join(picture, tag("p", note))


def equal_steps(result: Result) -> Markup:
    """All variants after the same steps: figures with intervals, and differences to no compression at all."""
    rows: list[list[Child]] = []
    for variant in result["variants"]:
        values = variant["tokens"] * variant["channels"]
        cells: list[Child] = [name_of(variant), f"{values:,}", f"{variant['parameters'] / 1e6:.2f} M"]
        for metric in metrics_of(result):
            estimate = variant["figures"][metric.name]
            bounds = tag("small", interval(estimate, metric.digits))
            cells.append(join(f"{estimate['mean']:.{metric.digits}f} ", bounds))
        rows.append(cells)
    head: list[Child] = ["tokens × channels", "values", "parameters"]
    head += [f"{metric.name} {metric.unit} {ARROWS[metric.better]}" for metric in metrics_of(result)]
    whole = name_of(result["variants"][0])
    charts = []
    for metric in metrics_of(result):
        bars = [
            Bar(name_of(variant), *numbers(variant["against_whole"][metric.name]), color_of(variant))
            for variant in result["variants"][1:]
        ]
        charts.append(forest(f"{metric.name}: difference to {whole}", bars, metric.unit, whole, metric.digits))
    note = (
        "95 % intervals over seeds and pictures. Those of the table are wide because pictures differ; the charts"
        " compare variants seed by seed and picture by picture. Parameters: of compressor and decompressor."
    )
    return join(table(head, rows, tuple(range(1, len(head)))), tag("p", note), tag("div", *charts, style=STACK))


def equal_scalars(result: Result) -> Markup | None:
    """Pairs with as many values per picture: all tokens with d channels, a quarter with 4 d."""
    claim = next((claim for claim in result["claims"] if "equally many values" in claim["claim"]), None)
    if claim is None:
        return None
    charts = []
    for metric in metrics_of(result):
        found = [finding for finding in claim["findings"] if finding["metric"] == metric.name]
        bars = [
            Bar(f"{f['left']} | {f['right'].partition(',')[0]}", *numbers(f["difference"]), "#3465a4") for f in found
        ]
        zero = "as good with a quarter of the tokens"
        charts.append(
            forest(f"{metric.name}: all tokens minus a quarter of them", bars, metric.unit, zero, metric.digits)
        )
    text = f"{sentence(claim['verdict'])} Both sides of a pair have as many values per picture and the same steps."
    return join(tag("p", text), tag("div", *charts, style=STACK))


def beside_paper(result: Result) -> Markup:
    """The rows of table 4 and the variants that correspond to them."""
    rows: list[list[Child]] = []
    for row in TABLE_4:
        for variant in result["variants"]:
            if published(point_of(variant)) is row:
                kind = {"identity": "none", "mlp": "MLP", "attention": "MHA"}[row.kind]
                there: list[Child] = [f"{kind}, {row.tokens} × {row.channels}", row.rfid, row.psnr, row.ssim]
                figures = [_mean(variant, metric.name, metric.digits) for metric in metrics_of(result)]
                rows.append([*there, name_of(variant), *figures])
    head: list[Child] = ["paper", "rFID ↓", "PSNR ↑", "SSIM ↑", "here"]
    head += [f"{metric.name} {ARROWS[metric.better]}" for metric in metrics_of(result)]
    rfid = (
        f" rFID here is of {result['pictures']} pictures, which raises it much: compare it within this page only."
        if RFID in metrics_of(result)
        else " rFID is not measured here: of so few pictures it says little."
    )
    note = (
        "UniCom (arXiv 2603.10702), table 4: ImageNet at 1024 px, FLUX.1-dev as decoder, SigLIP2 with 1152 channels."
        " Compare the differences between rows, not the figures: pictures, encoder, decoder and size are others here."
    )
    return join(table(head, rows, (1, 2, 3, *range(5, len(head)))), tag("p", note + rfid))


def curves(result: Result) -> Markup | None:
    """Held-out losses over the steps, means over the seeds."""
    variants = result["variants"]
    width = reference_width([point_of(v) for v in variants if v["kind"] != "identity" and v["spatial"] == "none"])
    told = [v for v in variants if v["kind"] == "identity" or (v["spatial"] == "none" and v["channels"] == width)]
    groups = [("The paper's comparison", told)]
    for kind, name in (("attention", "Attention"), ("mlp", "MLP")):
        groups.append((name, [v for v in variants if v["kind"] == kind]))
    blocks: list[Child] = []
    for title, group in groups:
        charts = []
        for key, name in (("loss/flow", "held-out flow loss"), ("loss/perceptual", "held-out perceptual loss")):
            lines = [
                Line(name_of(v), [(step, value) for step, value in v["curves"][key]], shade(v, group), dots=True)
                for v in group
            ]
            charts.append(chart(name, lines, labels=True))
        if any(charts):
            blocks += [tag("h3", title), tag("div", *(item for item in charts if item), class_="charts", style=WIDE)]
    note = (
        "Of the averaged weights, which trail behind while the loss falls fast. Means over the seeds and fixed times."
    )
    return join(*blocks, tag("p", note)) if blocks else None


def method(result: Result) -> Markup:
    """What the figures mean, and what they cannot tell."""
    noise = result["seed_std"][PSNR.name]
    means = [variant["figures"][PSNR.name]["mean"] for variant in result["variants"]]
    by_seed = ""
    if noise is not None:
        by_seed = (
            f" Two trainings of one variant that differ in nothing but the seed lie {noise:.2f} dB PSNR apart (standard"
            f" deviation, pooled over the variants); the variants lie between {min(means):.2f} and {max(means):.2f} dB."
        )
    wiring = ""
    if result["concat_tokens"]:
        wiring = (
            " Beside reading all tokens by attention, each patch of the decoder is given the token at its place"
            " (concat_tokens): with a quarter of the tokens several patches share one. The paper's decoder has"
            " attention only; this one may favour all tokens."
        )
    texts = [
        f"Every variant was trained with seeds {', '.join(map(str, result['seeds']))} for {result['steps']} steps of"
        f" {result['batch']} pictures, with the same decoder, learning rate and loss, and with one seed on the same"
        " pictures in the same order with the same noise. The page compares how far they come in these steps, not where"
        " they would end." + by_seed,
        "Spatial variants make one token of 2 × 2, by their mean or by a learned query, before channels are narrowed."
        + wiring,
        "Held-out pictures are drawn anew from their features with the same noise for every variant. PSNR, SSIM and"
        " LPIPS (VGG; training looks through AlexNet) compare pictures at the size that is drawn, feature cosine what"
        " the encoder sees in them.",
        "Intervals are t intervals over seeds and pictures at once (variance of the seeds' means plus that of the"
        " pictures' means, degrees of freedom after Satterthwaite); of flow losses over seeds alone. They are not"
        " corrected for the number of comparisons. A verdict needs the whole interval on one side: “agrees” on the"
        " side of the claim, “disagrees” on the other, else “not decided”.",
    ]
    return join(*(tag("p", text) for text in texts))


def metrics_of(result: Result) -> list[Metric]:
    """Those that were measured."""
    return [metric for metric in METRICS if metric.name in result["seed_std"]]


def name_of(variant: Mapping[str, Any]) -> str:
    """ "64 × 16, attention"."""
    return label(point_of(variant), variant["tokens"])


def point_of(variant: Mapping[str, Any]) -> Point:
    """The point of the grid a variant of `ablation.json` is."""
    return Point(variant["kind"], variant["spatial"], variant["channels"])


def color_of(variant: Mapping[str, Any]) -> str:
    """By kind, pale with fewer tokens."""
    return (COLORS if variant["spatial"] == "none" else FEWER)[variant["kind"]]


def _mean(variant: Mapping[str, Any], metric: str, digits: int) -> str:
    return f"{variant['figures'][metric]['mean']:.{digits}f}"
