"""The paper's claims about the codec, each with the comparisons of this ablation that bear on it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from unicom_dist.evaluate.intervals import over_seeds_and_pictures
from unicom_dist.tracking.report.data import Points
from unicom_dist.train.ablation.codec_grid import Point, Published, equal_scalars, published
from unicom_dist.train.ablation.findings import Claim, Expected, Finding
from unicom_dist.train.ablation.measured import Metric
from unicom_dist.train.ablation.reconstruction import LPIPS, PSNR, RFID, SSIM

Tables = Mapping[str, Mapping[str, NDArray[np.float64]]]  # variant -> metric -> values [seeds, pictures]
SeedCurves = Mapping[str, Sequence[Points]]  # variant -> held-out flow loss over the steps, one curve per seed

MARGINS = {PSNR: 1.0, SSIM: 0.05}  # what counts as nearly equal; the paper's own differences are within
PAPER_WIDTH = 64
SOURCE = "UniCom, table 4"


class Comparisons:
    """Differences between variants over the same seeds and pictures, in words of the page."""

    def __init__(self, points: Mapping[str, Point], tokens: Mapping[str, int], tables: Tables) -> None:
        self.points, self._tokens, self._tables = points, tokens, tables

    def label(self, point: Point) -> str:
        """ "64 × 16, attention": tokens, channels, kind."""
        return label(point, self._tokens[point.name])

    def findings(self, left: Point, right: Point, metrics: Sequence[Metric], better: bool = True) -> Iterator[Finding]:
        """`left` against `right` in each metric that was measured: expected to be better, or else nearly equal."""
        for metric in metrics:
            if metric.name not in self._tables[left.name]:
                continue  # pictures too small for it, or no network
            there, other = published(left), published(right)
            paper = None if there is None or other is None else _paper_difference(there, other, metric)
            expected: Expected = "equal"
            if better:
                expected = "above" if metric.better == "higher" else "below"
            values = self._tables[left.name][metric.name] - self._tables[right.name][metric.name]
            margin = 0.0 if better else MARGINS[metric]
            difference = over_seeds_and_pictures(values)
            names = self.label(left), self.label(right)
            yield Finding(*names, metric.name, metric.unit, difference, expected, margin, paper)


def label(point: Point, tokens: int) -> str:
    """ "64 × 16, attention": tokens, channels, kind."""
    kind = {"identity": "no compressor", "mlp": "MLP"}.get(point.kind, point.kind)
    fewer = {"none": "", "pool": ", pooled", "resampler": ", resampled"}[point.spatial]
    return f"{tokens} × {point.channels}, {kind}{fewer}"


def claims_of(
    points: Mapping[str, Point], tokens: Mapping[str, int], tables: Tables, curves: SeedCurves
) -> list[Claim]:
    """All claims on which the points of the grid have something to say."""
    compare = Comparisons(points, tokens, tables)
    every = list(points.values())
    ends = [point for point in every if point.kind == "identity"]
    whole, quarters = ends[0], ends[1:]
    channel = [point for point in every if point.all_tokens and point is not whole]
    width = reference_width(channel)
    chosen = [point for point in channel if point.channels == width]
    pairs = [
        (a, b)
        for a in channel
        for b in channel
        if (a.kind, b.kind) == ("attention", "mlp") and a.channels == b.channels
    ]
    wider = [(b, a) for a in chosen for b in channel if a.kind == b.kind and b.channels > width]
    claims = [
        Claim(
            f"Channels compress, tokens do not: {width} channels with all tokens are better than all channels with a"
            " quarter of the tokens, though they are fewer values.",
            SOURCE,
            tuple(f for a in chosen for b in quarters for f in compare.findings(a, b, (PSNR, SSIM, LPIPS, RFID))),
        ),
        Claim(
            "With equally many values per picture, all tokens with d channels are better than a quarter of the tokens"
            " with 4 d.",
            "follows from it; the paper compares unequal numbers",
            tuple(f for a, b in equal_scalars(points) for f in compare.findings(a, b, (PSNR, SSIM, LPIPS, RFID))),
        ),
        Claim(
            f"{width} channels are nearly as good as all {whole.channels}.",
            SOURCE + " and table 1",
            tuple(f for a in chosen for f in compare.findings(a, whole, (PSNR, SSIM), better=False)),
        ),
        Claim(
            "Attention is better than an MLP of the same shape.",
            SOURCE,
            tuple(f for a, b in pairs for f in compare.findings(a, b, (PSNR, SSIM))),
        ),
        Claim(
            f"More than {width} channels gain next to nothing.",
            SOURCE,
            tuple(f for b, a in wider for f in compare.findings(b, a, (PSNR, SSIM), better=False)),
        ),
        *dynamics(compare, chosen, quarters, curves),
    ]
    return [claim for claim in claims if claim.findings]


def reference_width(channel: Sequence[Point]) -> int:
    """The paper's width where the grid has it, else the middle one of the grid."""
    widths = sorted({point.channels for point in channel})
    return PAPER_WIDTH if PAPER_WIDTH in widths else widths[len(widths) // 2]


def dynamics(
    compare: Comparisons, chosen: Sequence[Point], quarters: Sequence[Point], curves: SeedCurves
) -> Iterator[Claim]:
    """Held-out flow loss of channel variants against a quarter of the tokens, early and at the end."""
    findings = []
    for a in chosen:
        for b in quarters:
            steps = sorted(set.intersection(*({step for step, _ in curve} for p in (a, b) for curve in curves[p.name])))
            if len(steps) < 2:
                continue
            expectations: list[tuple[int, Expected]] = [(steps[0], "above"), (steps[-1], "below")]
            for step, expected in expectations:
                differences = [
                    dict(left)[step] - dict(right)[step]
                    for left, right in zip(curves[a.name], curves[b.name], strict=True)
                ]
                difference = over_seeds_and_pictures(np.array(differences)[:, None])
                names = compare.label(a), compare.label(b)
                findings.append(Finding(*names, f"held-out flow loss at step {step}", "", difference, expected))
    yield Claim(
        "With compressed channels training starts slower than with a quarter of the tokens, and ends better.",
        "UniCom, appendix A.1 (there: slower for the first ten thousand steps)",
        tuple(findings),
    )


def _paper_difference(left: Published, right: Published, metric: Metric) -> float | None:
    values = {PSNR: left.psnr - right.psnr, SSIM: left.ssim - right.ssim, RFID: left.rfid - right.rfid}
    return round(values[metric], 4) if metric in values else None
