"""The report page: what stands in which section."""

import time
from collections.abc import Sequence
from pathlib import Path

from unicom_dist.tracking.console import format_duration
from unicom_dist.tracking.report import tables
from unicom_dist.tracking.report.charts import Line, chart, number
from unicom_dist.tracking.report.data import Curve, Run, load_run
from unicom_dist.tracking.report.document import Section, document, write_page
from unicom_dist.tracking.report.fidelity import fidelity
from unicom_dist.tracking.report.html import Child, Markup, join, tag
from unicom_dist.tracking.report.pictures import captions, pictures

REPORT_FILE = "report.html"
TRAIN, HELD_OUT = "#3465a4", "#c4601d"
RAW, RAW_COLOR = "loss_raw/", "#8b4fa8"  # held-out losses of the weights as they are
EPOCHS = "data/epochs"
COLORS = ("#3465a4", "#c4601d", "#2e8540", "#8b4fa8", "#b3344d", "#5f6b7a", "#0f8f8f", "#8a6d1b")
_NAMES = {
    "loss/total": "total loss", "loss/text": "text loss", "loss/flow": "flow loss",
    "loss/perceptual": "perceptual loss", "grad_norm": "gradient norm", "lr": "learning rate",
    "tokens_per_s": "tokens per second", "latents_per_s": "latents per second", "images_per_s": "images per second",
    "mfu": "MFU", "step_s": "step time", "data_wait_s": "data wait", "pad_share": "padding",
}  # fmt: skip
_UNITS = {"mfu": "share of peak", "step_s": "s", "data_wait_s": "s per step", "pad_share": "share", "loss/text": "nats"}
_BEHIND = (
    "lr", "grad_norm", "tokens_per_s", "latents_per_s", "images_per_s", "mfu", "step_s", "data_wait_s", "pad_share",
)  # fmt: skip


def run(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one page about one run, or about several with their curves in common charts.

    `out` defaults to report.html in the (first) run directory; the file is replaced when the page is whole.
    Returns the path. DataError for a folder that is no run; OSError when `out` cannot be written.
    """
    runs = [load_run(folder) for folder in run_dirs]
    path = Path(out) if out else runs[0].folder / REPORT_FILE
    write_page(path, render(runs))
    return path


def render(runs: list[Run]) -> str:
    """The whole page as HTML."""
    title = " · ".join(run.name for run in runs)
    return document(f"{title} – UniCom run", _header(runs), _sections(runs))


def _sections(runs: list[Run]) -> list[Section]:
    return [
        ("pictures", "Pictures drawn from prompts", _per_run(runs, [pictures(run, "prompts") for run in runs])),
        ("reconstructions", "Reconstructions", _per_run(runs, [pictures(run, "reconstructions") for run in runs])),
        ("captions", "Captions", _per_run(runs, [captions(run) for run in runs])),
        ("evaluation", "Evaluation", tables.evaluation(runs)),
        ("fidelity", "How reconstructions were measured", _per_run(runs, [fidelity(run) for run in runs])),
        ("curves", "Curves", curves(runs)),
        ("throughput", "Throughput", tables.throughput(runs)),
        ("configuration", "Configuration", _per_run(runs, [tables.configuration(run) for run in runs])),
        ("environment", "Environment", _per_run(runs, [tables.environment(run) for run in runs])),
    ]


def _per_run(runs: list[Run], contents: list[Markup | None]) -> Markup | None:
    found = [(run, content) for run, content in zip(runs, contents, strict=True) if content]
    if not found:
        return None
    if len(runs) == 1:
        return found[0][1]
    return join(*(tag("div", tag("h3", run.name, class_="run"), content) for run, content in found))


def _header(runs: list[Run]) -> Markup:
    title = " · ".join(run.name for run in runs)
    return tag(
        "header", tag("p", "UniCom run report", class_="kicker"), tag("h1", title), *(_facts(r, runs) for r in runs)
    )


def _facts(run: Run, runs: list[Run]) -> Markup:
    state = run.status.state if run.status else "unknown"
    encoder = run.config.flat().get("encoder.kind")
    commit = str(run.env.get("commit") or "")
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.started_s)) if run.started_s else ""
    machine = ", ".join(run.env.get("devices") or []) or _machine(run)
    facts = {
        "started": day,
        "training time": format_duration(run.busy_s) if run.stages else "",
        "steps": number(sum(stage.last_step for stage in run.stages.values())) if run.stages else "",
        "encoder": str(encoder or ""),
        "machine": machine,
        "commit": commit[:10] + ("+changes" if commit.endswith("+changes") else ""),
    }
    items: list[Child] = [tag("div", tag("dt", key), tag("dd", value)) for key, value in facts.items() if value]
    name = tag("b", run.name) if len(runs) > 1 else None
    return join(tag("p", name, tag("span", state, class_=f"state {state}")), tag("dl", *items), _timeline(run))


def _machine(run: Run) -> str:
    return f"{run.env['cpu']}, {run.env.get('cores', '?')} cores" if run.env.get("cpu") else ""


def _timeline(run: Run) -> Markup | None:
    """The stages side by side, as wide as they took."""
    if run.busy_s <= 0:
        return None
    parts = []
    for index, stage in enumerate(run.stages.values()):
        share = 100 * stage.busy_s / run.busy_s
        label = f"{stage.name} {format_duration(stage.busy_s)}"
        shown = label if share > 12 else stage.name if share > 7 else ""
        style = f"flex-grow:{max(share, 1.0):.2f};background:{COLORS[index % len(COLORS)]}"
        parts.append(tag("span", shown or Markup("&nbsp;"), style=style, title=f"{label}, {stage.last_step} steps"))
    return tag("div", *parts, class_="timeline")


def curves(runs: list[Run]) -> Markup | None:
    """The charts, stage by stage: losses open, optimiser and speed folded away."""
    stages = list(dict.fromkeys(name for run in runs for name in run.stages))
    blocks: list[Child] = [_legend(runs)]
    for stage in stages:
        names = dict.fromkeys(n for run in runs if stage in run.stages for n in run.stages[stage].curves)
        alone = [name for name in names if "@" not in name and not _family_of(name) and not name.startswith(RAW)]
        ordered = sorted(alone, key=_rank)
        front = [_chart(runs, stage, name) for name in ordered if name not in _BEHIND]
        front += [
            _fixed_times(runs, stage, name)
            for name in dict.fromkeys(n.partition("@")[0] for n in names if "@" in n and not n.startswith(RAW))
        ]
        front += [_family(runs, stage, name) for name in sorted({_family_of(n) for n in names} - {""})]
        behind = [_chart(runs, stage, name) for name in ordered if name in _BEHIND]
        charts = [[c for c in group if c] for group in (front, behind)]
        if any(charts):
            blocks.append(tag("h3", stage or "pipeline"))
        if charts[0]:
            blocks.append(tag("div", *charts[0], class_="charts"))
        if charts[1]:
            folded = tag("div", *charts[1], class_="charts")
            blocks.append(tag("details", tag("summary", "optimiser and speed"), folded))
    return join(*blocks) if len(blocks) > 1 else None


def _rank(name: str) -> tuple[int, int, str]:
    known = list(_NAMES)
    return (0 if name.startswith("loss/") else 1, known.index(name) if name in known else len(known), name)


def _curve(run: Run, stage: str, name: str) -> Curve:
    return run.stages[stage].curves.get(name, Curve()) if stage in run.stages else Curve()


def _title(name: str) -> str:
    term, _, held_out = name.partition("_")  # loss/flow_photos: of that set
    if term.startswith("loss/") and term in _NAMES and held_out:
        return f"{_NAMES[term]} of {held_out}"
    return _NAMES.get(name, name.removeprefix("loss/").replace("_", " "))


def _chart(runs: list[Run], stage: str, name: str) -> Markup | None:
    lines = []
    for index, run in enumerate(runs):
        curve = _curve(run, stage, name)
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        colors = (COLORS[index % len(COLORS)],) * 2 if len(runs) > 1 else (TRAIN, HELD_OUT)
        lines.append(Line(f"{prefix}training", curve.train, colors[0], exact=name == "lr"))
        lines.append(Line(f"{prefix}held-out", curve.heldout, colors[1], dots=True))
        raw = _curve(run, stage, name.replace("loss/", RAW)).heldout if name.startswith("loss/") else []
        lines.append(Line(f"{prefix}held-out, not averaged", raw, RAW_COLOR, dots=True))
    return chart(_title(name), lines, _UNITS.get(name, ""), may_be_log=name.startswith("loss/") or name == "grad_norm")


def _fixed_times(runs: list[Run], stage: str, name: str) -> Markup | None:
    """One chart of `name@t` for all t, dark where the input is mostly noise; of several runs each has its colour."""
    lines = []
    for index, run in enumerate(runs):
        found = run.stages[stage].curves if stage in run.stages else {}
        times = sorted(key.partition("@")[2] for key in found if key.startswith(f"{name}@"))
        for number_, t in enumerate(times):
            curve = found[f"{name}@{t}"]
            color = COLORS[index % len(COLORS)] if len(runs) > 1 else shade(number_ / max(len(times) - 1, 1))
            prefix = f"{run.name} " if len(runs) > 1 else ""
            lines.append(Line(f"{prefix}{t}", curve.heldout or curve.train, color, dots=True))
    return chart(f"{_title(name)} at t", lines, labels=len(runs) == 1)


def _family_of(name: str) -> str:
    """What a curve shares a chart with others by: `loss_by_KIND/TERM` or `data/epochs`; "" if it has its own."""
    return EPOCHS if name.startswith(f"{EPOCHS}/") else name.rpartition("/")[0] if name.startswith("loss_by_") else ""


def _family(runs: list[Run], stage: str, family: str) -> Markup | None:
    """One chart of the members of a family; of losses, None where there is a single one."""
    lines, several = [], False
    for index, run in enumerate(runs):
        found = run.stages[stage].curves if stage in run.stages else {}
        members = sorted((name for name in found if _family_of(name) == family), key=_magnitude)
        several |= len(members) > 1
        for number_, name in enumerate(members):
            color = COLORS[(index if len(runs) > 1 else number_) % len(COLORS)]
            prefix = f"{run.name} " if len(runs) > 1 else ""
            lines.append(Line(f"{prefix}{name.removeprefix(family)[1:]}", found[name].train, color))
    if family == EPOCHS:
        return chart("epochs", lines, labels=len(runs) == 1)
    kind, _, term = family.removeprefix("loss_by_").partition("/")
    return chart(f"{_title(f'loss/{term}')} by {kind}", lines, labels=len(runs) == 1) if several else None


def _magnitude(name: str) -> tuple[float, str]:
    """Members by what they stand for: "…/0.2-0.4", "…/3:2", "…/256"; tasks by name."""
    over, _, under = name.rpartition("/")[2].partition("-")[0].partition(":")
    try:
        return float(over) / float(under or 1), name
    except ValueError:
        return 0.0, name


def shade(share: float) -> str:
    """A colour between dark brown (0) and light orange (1)."""
    dark, light = (0x6B, 0x2D, 0x06), (0xF2, 0xA3, 0x5E)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(dark, light, strict=True))


def _legend(runs: list[Run]) -> Markup:
    if len(runs) == 1:
        keys = [("training (running mean; faint: as measured)", TRAIN), ("held-out", HELD_OUT)]
    else:
        keys = [(f"{run.name}", COLORS[index % len(COLORS)]) for index, run in enumerate(runs)]
        keys.append(("dashed with dots: held-out", "#8a93a0"))
    return tag(
        "p",
        *(tag("span", tag("span", class_="key", style=f"background:{c}"), f" {n}") for n, c in keys),
        class_="legend",
    )
