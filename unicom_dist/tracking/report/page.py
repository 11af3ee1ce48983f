"""The report page: sections put together, nothing loaded from anywhere, a content policy that would forbid it."""

import base64
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from unicom_dist.tracking.console import format_duration
from unicom_dist.tracking.report import tables
from unicom_dist.tracking.report.assets import CSS, SCRIPT
from unicom_dist.tracking.report.charts import Line, chart, number
from unicom_dist.tracking.report.data import Curve, Run, load_run
from unicom_dist.tracking.report.html import Child, Markup, join, tag
from unicom_dist.tracking.report.pictures import captions, pictures

REPORT_FILE = "report.html"
TRAIN, HELD_OUT = "#3465a4", "#c4601d"
COLORS = ("#3465a4", "#c4601d", "#2e8540", "#8b4fa8", "#b3344d", "#5f6b7a", "#0f8f8f", "#8a6d1b")
_NAMES = {
    "loss/total": "total loss", "loss/text": "text cross-entropy", "loss/flow": "flow loss",
    "loss/perceptual": "perceptual loss", "grad_norm": "gradient norm", "lr": "learning rate",
    "tokens_per_s": "tokens per second", "latents_per_s": "latents per second", "images_per_s": "images per second",
    "mfu": "MFU", "step_s": "step time", "data_wait_s": "data wait", "pad_share": "padding",
}  # fmt: skip
_UNITS = {"mfu": "share of peak", "step_s": "s", "data_wait_s": "s per step", "pad_share": "share", "loss/text": "nats"}
_SPEED = ("tokens_per_s", "latents_per_s", "images_per_s", "mfu", "step_s", "data_wait_s", "pad_share")


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write one page about one run, or about several with their curves in common charts.

    `out` defaults to report.html in the (first) run directory; the file is replaced when the page is whole.
    Returns the path. DataError for a folder that is no run; OSError when `out` cannot be written.
    """
    runs = [load_run(folder) for folder in run_dirs]
    path = Path(out) if out else runs[0].folder / REPORT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(render(runs), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(runs: list[Run]) -> str:
    """The whole page as HTML."""
    title = " · ".join(run.name for run in runs)
    # The page may run its own script and show its own pictures; everything else is refused by the browser.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [section for section in _sections(runs) if section[2]]
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} – UniCom run"),
        tag("style", Markup(CSS)),
    )
    body = tag(
        "body",
        _header(runs),
        tag("nav", *links),
        tag("main", *(tag("section", tag("h2", name), content, id=anchor) for anchor, name, content in sections)),
        tag("div", id="tip", hidden=True),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _sections(runs: list[Run]) -> list[tuple[str, str, Markup | None]]:
    return [
        ("pictures", "Pictures drawn from prompts", _per_run(runs, [pictures(run, "prompts") for run in runs])),
        ("reconstructions", "Reconstructions", _per_run(runs, [pictures(run, "reconstruction") for run in runs])),
        ("captions", "Captions", _per_run(runs, [captions(run) for run in runs])),
        ("evaluation", "Evaluation", tables.evaluation(runs)),
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
        style = f"flex-grow:{max(share, 1.0):.2f};background:{COLORS[index % len(COLORS)]}"
        parts.append(tag("span", label, style=style, title=f"{label}, {stage.last_step} steps"))
    return tag("div", *parts, class_="timeline")


def curves(runs: list[Run]) -> Markup | None:
    """The charts, stage by stage: losses first, then other figures, speed last and folded away."""
    stages = list(dict.fromkeys(name for run in runs for name in run.stages))
    blocks: list[Child] = [_legend(runs)]
    for stage in stages:
        names = dict.fromkeys(n for run in runs if stage in run.stages for n in run.stages[stage].curves)
        ordered = sorted(names, key=_rank)
        main = [c for n in ordered if n not in _SPEED and (c := _chart(runs, stage, n))]
        speed = [c for n in ordered if n in _SPEED and (c := _chart(runs, stage, n))]
        if main or speed:
            blocks.append(tag("h3", stage or "pipeline"))
        if main:
            blocks.append(tag("div", *main, class_="charts"))
        if speed:
            folded = tag("div", *speed, class_="charts")
            blocks.append(tag("details", tag("summary", "speed"), folded, class_="speed"))
    return join(*blocks) if len(blocks) > 1 else None


def _rank(name: str) -> tuple[int, str]:
    known = list(_NAMES)
    group = (
        0 if name == "loss/total" else 1 if name.startswith("loss/") and "@" not in name else 2 if "@" in name else 3
    )
    return group, f"{known.index(name):02}" if name in known else f"99{name}"


def _chart(runs: list[Run], stage: str, name: str) -> Markup | None:
    lines = []
    for index, run in enumerate(runs):
        curve = run.stages[stage].curves.get(name, Curve()) if stage in run.stages else Curve()
        several = len(runs) > 1
        train, heldout = (COLORS[index % len(COLORS)],) * 2 if several else (TRAIN, HELD_OUT)
        prefix = f"{run.name} " if several else ""
        lines.append(Line(f"{prefix}train", curve.train, train))
        lines.append(Line(f"{prefix}held-out", curve.heldout, heldout, dots=True))
    title, _, fixed = name.partition("@")
    label = _NAMES.get(title, title.removeprefix("loss/").replace("_", " "))
    return chart(f"{label} at t = {fixed}" if fixed else label, lines, _UNITS.get(title, ""))


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
