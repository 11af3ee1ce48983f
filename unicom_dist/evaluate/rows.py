"""One measured figure with its interval and what it must beat; an evaluation's table and JSON are made of these."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from unicom_dist.evaluate.intervals import bootstrap, weighted_mean

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Row:
    """`metric` on `split` over `n` samples; `untrained` is the same figure for the untrained model, if it has one.

    Figures of a whole set (rFID) have no interval: drawing pictures twice would shrink the set's covariance.
    """

    metric: str
    split: str
    value: float
    ci: tuple[float, float] | None
    n: int
    better: Better
    untrained: float | None
    trivial: tuple[str, float] | None  # name and value
    note: str = field(default="", compare=False)

    @property
    def beats_all(self) -> bool:
        """Whether the whole interval, or the figure where there is none, lies on the better side of every baseline."""
        others = [v for v in (self.untrained, self.trivial and self.trivial[1]) if v is not None]
        low, high = self.ci or (self.value, self.value)
        return all(low > other if self.better == "higher" else high < other for other in others)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Row":
        """The inverse of `as_dict`."""
        trivial, ci = content["baselines"]["trivial"], content["ci"]
        return cls(
            content["metric"],
            content["split"],
            content["value"],
            (ci[0], ci[1]) if ci else None,
            content["n"],
            content["better"],
            content["baselines"]["untrained"],
            (trivial["name"], trivial["value"]) if trivial else None,
            content["note"],
        )

    def as_dict(self) -> dict[str, Any]:
        """The form of `eval.json`."""
        return {
            "metric": self.metric,
            "split": self.split,
            "value": self.value,
            "ci": self.ci and list(self.ci),
            "n": self.n,
            "better": self.better,
            "beats_all": self.beats_all,
            "baselines": {
                "untrained": self.untrained,
                "trivial": None if self.trivial is None else {"name": self.trivial[0], "value": self.trivial[1]},
            },
            "note": self.note,
        }


def measure(
    metric: str,
    split: str,
    values: Sequence[float],
    better: Better,
    weights: Sequence[float] | None = None,
    untrained: float | None = None,
    trivial: tuple[str, float] | None = None,
    note: str = "",
) -> Row:
    """A row from per-sample values (or per-sample sums and their counts as `weights`), with its bootstrap interval."""
    interval = bootstrap(values, weights)
    value = weighted_mean(values, weights)
    return Row(metric, split, value, interval, len(values), better, untrained, trivial, note)


def table(rows: Sequence[Row], title: str) -> Table:
    """A table for the terminal: the figure is green where its whole 95 % interval beats every baseline, else yellow."""
    view = Table(title=title, caption="95 % bootstrap intervals over samples", caption_justify="left")
    view.add_column("metric")
    view.add_column("data")
    view.add_column("model", justify="right")
    view.add_column("95 %", justify="right", style="dim")
    view.add_column("untrained", justify="right")
    view.add_column("trivial baseline", justify="right")
    view.add_column("n", justify="right", style="dim")
    for row in rows:
        compared = row.untrained is not None or row.trivial is not None
        style = ("green" if row.beats_all else "yellow") if compared else "cyan"
        arrow = "↑" if row.better == "higher" else "↓"
        view.add_row(
            f"{row.metric} {arrow}",
            row.split,
            f"[{style}]{_number(row.value)}[/]",
            "" if row.ci is None else f"{_number(row.ci[0])} … {_number(row.ci[1])}",
            "" if row.untrained is None else _number(row.untrained),
            "" if row.trivial is None else f"{_number(row.trivial[1])} ({row.trivial[0]})",
            str(row.n),
        )
    return view


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
