"""The tables of the report: evaluation, throughput per stage, configuration with origins, environment."""

import json
import math
from statistics import median
from typing import Any

from unicom_dist.tracking.console import format_duration
from unicom_dist.tracking.report.charts import number
from unicom_dist.tracking.report.data import Curve, Run
from unicom_dist.tracking.report.html import Child, Markup, join, table, tag


def evaluation(runs: list[Run]) -> Markup | None:
    """One row per figure and run, green where its whole interval beats every baseline. None without an evaluation."""
    many = len(runs) > 1
    found = [(run, row) for run in runs for row in evaluation_rows(run)]
    if not found:
        return None
    order = list(dict.fromkeys((row["metric"], row.get("split")) for _, row in found))
    found.sort(key=lambda item: order.index((item[1]["metric"], item[1].get("split"))))  # runs side by side
    rows: list[list[Child]] = [[*([run.name] if many else []), *_evaluation_row(row)] for run, row in found]
    notes = dict.fromkeys(str(row["note"]) for _, row in found if row.get("note"))
    head: list[Child] = ["figure", "data", "model", "95 % interval", "untrained", "trivial baseline", "n"]
    first = 1 if many else 0
    numeric = tuple(first + column for column in (2, 3, 4, 5, 6))
    legend = "Green: the whole 95 % bootstrap interval is better than every baseline. ↑ higher is better, ↓ lower."
    return join(
        table([*(["run"] if many else []), *head], rows, numeric, "evaluation"), tag("p", " ".join([legend, *notes]))
    )


def evaluation_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of eval.json, those of its further suites after the quick one's; [] when there are none."""
    parts = [run.evaluation, *suites(run).values()]
    rows = [row for part in parts if isinstance(part.get("rows"), list) for row in part["rows"]]
    return [row for row in rows if isinstance(row, dict) and "metric" in row]


def suites(run: Run) -> dict[str, dict[str, Any]]:
    """What eval.json holds of further suites, by name."""
    found = run.evaluation.get("suites")
    return {name: part for name, part in found.items() if isinstance(part, dict)} if isinstance(found, dict) else {}


def _evaluation_row(row: dict[str, Any]) -> list[Child]:
    baselines = row.get("baselines") or {}
    trivial = baselines.get("trivial")
    untrained = baselines.get("untrained")
    compared = trivial is not None or untrained is not None
    style = ("good" if row.get("beats_all") else "poor") if compared else None
    interval = row.get("ci") or []
    return [
        f"{row['metric']} {'↑' if row.get('better') == 'higher' else '↓'}",
        row.get("split"),
        tag("span", figure(row.get("value")), class_=style),
        " – ".join(figure(bound) for bound in interval),
        figure(untrained),
        f"{figure(trivial.get('value'))} ({trivial.get('name')})" if isinstance(trivial, dict) else figure(trivial),
        row.get("n"),
    ]


def figure(value: Any) -> str:
    """A measured figure with the digits that mean something; "" for None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "" if value is None else str(value)
    if not math.isfinite(value):
        return "–"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def throughput(runs: list[Run]) -> Markup | None:
    """Per stage: steps, time, seconds per step, rates, MFU and data wait, as medians over the stage."""
    many = len(runs) > 1
    rows: list[list[Child]] = []
    sources: list[str] = []
    for run in runs:
        for stage in run.stages.values():
            curves = stage.curves
            step_s, wait_s, mfu = (_median(curves, name) for name in ("step_s", "data_wait_s", "mfu"))
            cells: list[Child] = [stage.name, stage.last_step or "", format_duration(stage.busy_s)]
            cells.append("" if step_s is None else f"{1000 * step_s:.3g} ms")
            for name in ("tokens_per_s", "latents_per_s", "images_per_s"):
                rate = _median(curves, name)
                cells.append(number(float(f"{rate:.3g}")) if rate else "")
            peak = stage.params.get("mfu_peak_flops_per_s")
            of = f" of {number(peak / 1e9)} GFLOP/s" if isinstance(peak, int | float) else ""
            cells.append("" if mfu is None else f"{100 * mfu:.1f} %{of}")
            cells.append("" if wait_s is None or not step_s else f"{100 * wait_s / step_s:.1f} %")
            rows.append([*([run.name] if many else []), *cells])
            source = stage.params.get("mfu_peak_source")
            if source and source not in sources:
                sources.append(str(source))
    if not rows:
        return None
    head: list[Child] = ["stage", "steps", "time", "step", "tokens/s", "latents/s", "images/s", "MFU", "data wait"]
    first = 2 if many else 1
    body = table([*(["run"] if many else []), *head], rows, tuple(range(first, first + 8)))
    note = "Medians over a stage; time without pauses between starts. MFU counts visible pairs only"
    return join(body, tag("p", f"{note}{'; its peak per rank: ' + '; '.join(sources) if sources else ''}."))


def _median(curves: dict[str, Curve], name: str) -> float | None:
    values = [y for _, y in curves[name].train if math.isfinite(y)] if name in curves else []
    return median(values) if values else None


def configuration(run: Run) -> Markup | None:
    """Every key with its value and where it came from: set ones first and open, the defaults folded away."""
    flat = run.config.flat()
    if not flat:
        return None
    chosen: list[list[Child]] = []
    defaults: list[list[Child]] = []
    for key, value in flat.items():
        origin = run.config.origins.get(key, "")
        row: list[Child] = [tag("code", key), tag("code", _value(value)), origin]
        (defaults if origin == "default" else chosen).append(row)
    parts: list[Child] = []
    if chosen:
        parts.append(table(["key", "value", "set in"], chosen, class_="config"))
    if defaults:
        folded = table(["key", "value", ""], defaults, class_="config")
        parts.append(tag("details", tag("summary", f"{len(defaults)} values left at their defaults"), folded))
    return join(*parts)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def environment(run: Run) -> Markup | None:
    """Machine, software and every start of the run."""
    env = run.env
    if not env:
        return None
    packages = env.get("packages") or {}
    variables = env.get("variables") or {}
    machine = f"{env.get('cores', '?')} cores, {env.get('memory_gib', '?')} GiB memory"
    rows: list[list[Child]] = [
        ["processor", f"{env.get('cpu', '')} · {machine}"],
        ["devices", ", ".join(env.get("devices") or []) or "no accelerator"],
        ["system", f"{env.get('platform', '')} · Python {env.get('python', '')}"],
        ["commit", tag("code", env.get("commit") or "not known")],
        ["packages", " · ".join(f"{name} {version}" for name, version in packages.items())],
    ]
    if variables:
        rows.append(["variables", tag("code", " ".join(f"{k}={v}" for k, v in variables.items()))])
    if env.get("layout"):
        rows.append(["ranks", tag("pre", "\n".join(env["layout"]))])
    starts = [start for start in env.get("starts") or [] if isinstance(start, dict)]
    for start in starts[-8:]:
        rows.append([f"start {start.get('time', '')}", tag("code", " ".join(map(str, start.get("command") or [])))])
    return table(["", ""], rows, class_="facts")
