"""What an ablation says about the claims of a paper: agrees, disagrees, or the interval does not decide."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from unicom_dist.evaluate.intervals import Estimate

Verdict = Literal["agrees", "disagrees", "not decided"]
Expected = Literal["above", "below", "equal"]
WORDS = {"agrees": "Agrees", "disagrees": "Disagrees", "not decided": "Not decided"}


def digits_of(unit: str) -> int:
    """Behind the point: those that mean something."""
    return {"dB": 2, "steps": 0}.get(unit, 3)


@dataclass(frozen=True)
class Finding:
    """The difference `left` minus `right` in one metric, and what the claim expects of it.

    `equal` means within `margin`, which is ours: a paper that says "nearly equal" seldom says how nearly.
    """

    left: str
    right: str
    metric: str
    unit: str
    difference: Estimate
    expected: Expected
    margin: float = 0.0
    paper: float | None = None  # the same difference there

    @property
    def verdict(self) -> Verdict:
        """By the whole interval: on the expected side, or on the other, of zero or of the margin."""
        low, high = self.difference.low, self.difference.high
        if self.expected == "equal":
            inside, outside = -self.margin <= low and high <= self.margin, high < -self.margin or low > self.margin
        elif self.expected == "above":
            inside, outside = low > 0, high < 0
        else:
            inside, outside = high < 0, low > 0
        return "agrees" if inside else "disagrees" if outside else "not decided"

    @property
    def sentence(self) -> str:
        """The finding in words."""
        mean, low, high = (f"{value:+.{self.digits}f}" for value in self.difference)
        unit = f" {self.unit}" if self.unit else ""
        known = math.isfinite(self.difference.low)
        parts = [f"95 % interval {low} to {high}" if known else "no interval from a single value"]
        parts += [] if self.paper is None else [f"paper {self.paper:+.{self.digits}f}"]
        margin = f"; ±{self.margin:g}{unit} counts as nearly equal" if self.expected == "equal" else ""
        return (
            f"{WORDS[self.verdict]}: {self.metric} of {self.left} minus that of {self.right} is {mean}{unit}"
            f" ({', '.join(parts)}){margin}."
        )

    @property
    def digits(self) -> int:
        """Behind the point: those that mean something."""
        return digits_of(self.unit)

    def as_dict(self) -> dict[str, Any]:
        """The form of `ablation.json`."""
        return {
            "left": self.left,
            "right": self.right,
            "metric": self.metric,
            "unit": self.unit,
            "difference": self.difference.as_dict(),
            "expected": self.expected,
            "margin": self.margin,
            "paper": self.paper,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Claim:
    """A claim, where it is made, and the findings that bear on it."""

    text: str
    source: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """The findings' common verdict, or how many there are of each."""
        counts = Counter(finding.verdict for finding in self.findings)
        if len(counts) == 1:
            return next(iter(counts))
        parts = [f"{name} in {counts[name]}" for name in WORDS if name in counts]  # type: ignore[index]
        return f"{', '.join(parts)} of {len(self.findings)} comparisons"

    def as_dict(self) -> dict[str, Any]:
        """The form of `ablation.json`."""
        findings = [finding.as_dict() for finding in self.findings]
        return {"claim": self.text, "source": self.source, "verdict": self.verdict, "findings": findings}
