"""What all benchmarks share: interleaved rounds, medians, one table, one JSON.

Machines are noisy and shared, so nothing is compared across runs: all methods of a benchmark run in the same process,
one round of each after the other, and what is reported is the ratio of the medians. The clock is the CPU time of this
process (all its threads) unless a benchmark says otherwise.
"""

import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

Measured = TypeVar("Measured")
RESULTS = Path(__file__).parent / "results"
ALWAYS = ("torch", "numpy")


@dataclass(frozen=True)
class Timing:
    """Seconds per round."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Median and range of some rounds."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    @property
    def spread(self) -> str:
        """Range relative to the median, e.g. `-4 % .. +11 %`."""
        return f"{self.low / self.median - 1:+.0%} .. {self.high / self.median - 1:+.0%}"


def in_turn(methods: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """What every method returns in each of `rounds` rounds, after one that does not count.

    A round calls each method once; the order is reversed every other round, so that drift falls on all alike.
    """
    found: dict[str, list[Measured]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name in list(methods) if number % 2 else reversed(list(methods)):
            gc.collect()
            value = methods[name]()
            if number:
                found[name].append(value)
    return found


def interleaved(
    methods: Mapping[str, Callable[[], object]], rounds: int = 7, clock: Callable[[], float] = time.process_time
) -> dict[str, Timing]:
    """Seconds on `clock` that each method takes, measured `in_turn`."""

    def timed(method: Callable[[], object]) -> float:
        start = clock()
        method()
        return clock() - start

    found = in_turn({name: partial(timed, method) for name, method in methods.items()}, rounds)
    return {name: Timing.of(seconds) for name, seconds in found.items()}


def importable(module: str) -> bool:
    """Whether a peer is installed; says so if it is not."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    if not found:
        print(f"  {module} is not installed: not measured")
    return found


@dataclass(frozen=True)
class Goal:
    """A figure and the bound it is held against. None: the peer is not installed; the goal does not count as met."""

    what: str
    value: float | None
    bound: float
    at_least: bool = True
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether the figure was measured and is on the right side of its bound."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> list[str]:
        """For the table."""
        sign = "≥" if self.at_least else "≤"
        goal = f"{sign} {self.bound:g} {self.unit}"
        if self.value is None:
            return [self.what, "", goal, "not measured"]
        return [self.what, f"{self.value:.2f} {self.unit}", goal, "met" if self.met else "MISSED"]


def publish(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    goals: Sequence[Goal],
    figures: Mapping[str, Any],
    packages: Sequence[str] = (),
) -> bool:
    """Print the table and the goals and write `results/<name>.json`. Returns whether every goal was met."""
    import torch

    _print_table(columns, rows)
    if goals:
        print()
        _print_table(["goal", "measured", "bound", ""], [goal.row() for goal in goals])
    RESULTS.mkdir(exist_ok=True)
    content = {
        "benchmark": name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "cores": os.cpu_count(),
            "architecture": platform.machine(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "load": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **_versions((*ALWAYS, *packages))},
        "figures": figures,
        "goals": [{**asdict(goal), "met": goal.met} for goal in goals],
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")
    print(f"\nwritten: benchmarks/results/{path.name}")
    return all(goal.met for goal in goals)


def _plain(value: object) -> object:
    if isinstance(value, Timing):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(width=120, highlight=False).print(table)
