"""What the pages of all ablations share: verdicts with their findings, intervals in words, colours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unicom_dist.tracking.report.html import Child, Markup, join, table, tag
from unicom_dist.tracking.report.pictures import embed
from unicom_dist.train.ablation.findings import digits_of

Result = Mapping[str, Any]
STYLES = {"agrees": "good", "disagrees": "poor"}
STACK = "display: grid; gap: 14px; max-width: 860px"
WIDE = "grid-template-columns: repeat(auto-fill, minmax(420px, 1fr))"  # of charts
ARROWS = {"higher": "↑", "lower": "↓"}


def title_block(kicker: str, title: str, facts: Mapping[str, Child]) -> Markup:
    """Title and the figures that say how large the experiment is."""
    items = [tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items()]
    return tag("header", tag("p", kicker, class_="kicker"), tag("h1", title), tag("dl", *items))


def trainings(result: Result) -> str:
    """ "9: 3 variants × 3 seeds"."""
    variants, seeds = len(result["variants"]), len(result["seeds"])
    return f"{variants * seeds}: {variants} variants × {seeds} seeds"


def lead_picture(sheet: Path, alt: str) -> Markup | None:
    """The sheet, above what is said about it; None if it cannot be read."""
    source = embed(sheet)
    image = source and tag("img", src=source, alt=alt, loading="lazy")
    return tag("div", tag("figure", image), class_="lead") if image else None


def verdicts(result: Result) -> Markup:
    """Every claim with its verdict and, in words, the findings in the first metric; all of them folded."""
    blocks: list[Child] = []
    for claim in result["claims"]:
        verdict, findings = claim["verdict"], claim["findings"]
        lead = [tag("li", f["sentence"]) for f in findings if f["metric"] == findings[0]["metric"] or len(findings) < 5]
        rows: list[list[Child]] = [_finding(finding) for finding in findings]
        head: list[Child] = ["left", "right", "figure", "left − right", "95 % interval", "paper", "expected", "verdict"]
        folded = table(head, rows, (3, 4, 5))
        blocks += [
            tag("h3", claim["claim"], tag("small", claim["source"])),
            tag("p", tag("span", sentence(verdict), class_=STYLES.get(verdict))),
            tag("ul", *lead),
            tag("details", tag("summary", f"all {len(findings)} comparisons"), folded),
        ]
    return join(*blocks)


def sentence(verdict: str) -> str:
    """A verdict on its own."""
    words = {"agrees": "Agrees.", "disagrees": "Disagrees.", "not decided": "Not decided by these intervals."}
    return words.get(verdict, f"Mixed: {verdict}.")


def _finding(finding: Mapping[str, Any]) -> list[Child]:
    digits = digits_of(finding["unit"])
    expected = {"above": "> 0", "below": "< 0", "equal": f"within ±{finding['margin']:g}"}[finding["expected"]]
    return [
        finding["left"],
        finding["right"],
        f"{finding['metric']} {finding['unit']}",
        _signed(finding["difference"]["mean"], digits),
        interval(finding["difference"], digits, signed=True),
        _signed(finding["paper"], digits),
        expected,
        tag("span", finding["verdict"], class_=STYLES.get(finding["verdict"])),
    ]


def shade(variant: Mapping[str, Any], group: Sequence[Mapping[str, Any]]) -> str:
    """A colour of its own within a chart."""
    palette = ("#1c2430", "#3465a4", "#c4601d", "#2e8540", "#8b4fa8", "#b3344d", "#5f6b7a", "#0f8f8f", "#8a6d1b")
    return palette[list(group).index(variant) % len(palette)]


def numbers(estimate: Mapping[str, float | None]) -> tuple[float, float, float]:
    """Mean, low and high of an estimate out of JSON."""
    mean, low, high = estimate["mean"], estimate["low"], estimate["high"]
    assert mean is not None
    return mean, -float("inf") if low is None else low, float("inf") if high is None else high


def _signed(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:+.{digits}f}"


def interval(estimate: Mapping[str, float | None], digits: int, signed: bool = False) -> str:
    """The bounds in words."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return "not known"
    sign = "+" if signed else ""
    return f"{low:{sign}.{digits}f} … {high:{sign}.{digits}f}"
