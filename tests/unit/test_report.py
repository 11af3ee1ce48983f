"""The report page: self-contained, escaped, sensible axes, true figures. One process, seconds."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from unicom_dist.config.errors import DataError
from unicom_dist.tracking import report
from unicom_dist.tracking.metrics import MetricsWriter, Record
from unicom_dist.tracking.report.charts import Axis, Line, chart, number, smooth
from unicom_dist.tracking.report.data import load_run
from unicom_dist.tracking.report.html import Markup, tag, text
from unicom_dist.tracking.report.pictures import spread
from unicom_dist.tracking.status import write_status

EVIL = '<script>alert("x")</script>&\'"'


def make_run(folder: Path, name: str = "first") -> Path:
    folder.mkdir(parents=True)
    stages = [{"name": "codec", "kind": "codec"}, {"name": "pretrain", "kind": "prior"}]
    config = {"name": name, "stages": stages, "sample": {"prompts": [EVIL]}}
    origins = {"name": "recipes/tiny.yaml:1", "stages.codec.kind": "default"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "origins": origins}))
    with MetricsWriter(folder) as writer:
        for stage in ("codec", "pretrain"):
            for step in range(1, 61):
                writer.log(stage, step, {"loss/flow": 2 / step, "lr": 1e-3, "tokens_per_s": 100.0, "step_s": 0.1})
            writer.log(stage, 60, {"loss/flow": 0.05, "loss/flow@0.1": 0.2, "loss/flow@0.9": 0.1}, kind="eval")
            pictures = folder / "samples" / stage
            pictures.mkdir(parents=True)
            for step in (20, 60):
                Image.new("RGB", (40, 20), (step, 0, 0)).save(pictures / f"step-{step:06d}.png")
                kind = "reconstructions" if stage == "codec" else "prompts"
                details = {"kind": kind, "step": step, "stage": stage, "labels": [EVIL, "red apple"]}
                (pictures / f"step-{step:06d}.json").write_text(json.dumps(details))
    row = {
        "metric": "PSNR", "split": "held-out", "value": 21.5, "ci": [21.0, 22.0], "n": 8, "better": "higher",
        "beats_all": True, "note": "",
        "baselines": {"untrained": 7.0, "trivial": {"name": "mean image", "value": 11.0}},
    }  # fmt: skip
    captions = [{"key": "k", "truth": "a red apple", "generated": EVIL}]
    (folder / "eval.json").write_text(json.dumps({"rows": [row], "captions": captions}))
    write_status(folder, "done", exit_code=0)
    return folder


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.images = 0
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.images += tag == "img"
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_fetches_nothing_and_runs_only_its_script(tmp_path: Path) -> None:
    path = report.run([make_run(tmp_path / "a")])
    assert path == tmp_path / "a" / "report.html"
    html = path.read_text()
    page = Page(html)
    assert page.scripts == 1
    assert page.images == 4
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "http" not in re.sub(r"http-equiv", "", html)
    assert "default-src 'none'" in html.replace("&#x27;", "'")
    assert "alert(&quot;x&quot;)" in html
    assert "<script>alert" not in html


def test_page_shows_figures_pictures_configuration(tmp_path: Path) -> None:
    html = report.run([make_run(tmp_path / "a", name="my run")]).read_text()
    for shown in (
        "my run",
        "21.50",
        "21.00 – 22.00",
        "11.00 (mean image)",
        "recipes/tiny.yaml:1",
        "stages.codec.name",
        "a red apple",
    ):
        assert shown in html
    assert html.index("Pictures drawn from prompts") < html.index("Reconstructions") < html.index("Evaluation")
    assert "pretrain, step 60" in html  # the newest grid of prompts leads; the codec's are reconstructions
    assert "codec, step 60" in html
    assert 'class="good"' in html


def test_pictures_of_an_evaluation_lead_their_sections(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "samples" / "eval").mkdir()
    for name in ("reconstructions", "heldout-prompts"):
        Image.new("RGB", (9, 9)).save(folder / "samples" / "eval" / f"{name}.png")
    html = report.run([folder]).read_text()
    drawn, rebuilt = html.index("eval, heldout prompts"), html.index("eval, reconstructions")
    assert drawn < html.index("over its steps") < html.index("<h2>Reconstructions") < rebuilt
    assert Page(html).images == 6


def test_runs_are_overlaid_in_common_charts(tmp_path: Path) -> None:
    out = report.run([make_run(tmp_path / "a", "one"), make_run(tmp_path / "b", "two")], tmp_path / "both.html")
    html = out.read_text()
    Page(html)
    charts = re.findall(r'aria-label="flow loss: ([^"]*)"', html)
    assert charts == ["one, training, one, held-out, two, training, two, held-out over steps"] * 2


def test_losses_taken_apart_share_a_chart_and_raw_weights_stand_beside_the_averaged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with MetricsWriter(folder) as writer:
        for step in (1, 2, 3):
            parts = {f"loss_by_ratio/flow/{name}": 1.0 / step for name in ("1:1", "3:2", "1:4")}
            epochs = {"data/epochs/text": step / 9, "data/epochs/text_to_image/photos": step / 5}
            writer.log("pretrain", step, {**parts, **epochs, "loss_by_latents/flow/256": 0.5})
        of_photos = {"loss/text_photos": 4.0, "loss/flow_photos@0.1": 0.4}
        writer.log("pretrain", 60, {"loss_raw/flow": 0.07, "loss_raw/flow@0.1": 0.3, **of_photos}, kind="eval")
    html = report.run([folder]).read_text()
    Page(html)
    assert re.findall(r'aria-label="(epochs[^"]*)"', html) == ["epochs: text, text_to_image/photos over steps"]
    assert re.findall(r'aria-label="([^":]* of photos[^":]*):', html) == [
        "text loss of photos",
        "flow loss of photos at t",
    ]
    assert re.findall(r'aria-label="(flow loss by [^"]*)"', html) == ["flow loss by ratio: 1:4, 1:1, 3:2 over steps"]
    flow = re.findall(r'aria-label="flow loss: ([^"]*)"', html)
    assert flow == ["training, held-out over steps", "training, held-out, held-out, not averaged over steps"]
    assert "loss_raw" not in html
    assert 'aria-label="raw' not in html


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    write_status(tmp_path / "a", "running")
    Page(report.run([tmp_path / "a"]).read_text())


def test_damaged_parts_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    (folder / "eval.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    (folder / "samples" / "codec" / "step-000060.png").write_bytes(b"not a picture")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "ki')
    Page(report.run([folder]).read_text())


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a run directory"):
        report.run([tmp_path])
    with pytest.raises(DataError, match="not a folder"):
        report.run([tmp_path / "none"])


def test_numbers_in_metrics_are_not_lost_to_what_is_not_finite(tmp_path: Path) -> None:
    points = [(1, math.nan), (2, 1.0), (3, math.inf), (4, 2.0)]
    svg = chart("loss", [Line("training", points, "#000")])
    assert svg is not None
    assert "nan" not in svg
    assert "inf" not in svg
    assert chart("loss", [Line("training", [(1, math.nan)], "#000")]) is None


@pytest.mark.parametrize(("low", "high", "log"), [(1.0, 2.0, False), (0.01, 1.0, True), (-1.0, 100.0, False)])
def test_axis_is_logarithmic_for_wide_positive_ranges(low: float, high: float, log: bool) -> None:
    svg = chart("loss", [Line("training", [(1, high), (2, low)], "#000")])
    assert svg is not None
    assert re.search(r'data-y="[^"]* (\d)"', svg).group(1) == str(int(log))  # type: ignore[union-attr]


def test_values_can_be_read_back_from_the_coordinates() -> None:
    values = [3.0, 0.5, 0.02]
    svg = chart("loss", [Line("training", list(enumerate(values)), "#000", exact=True)])
    assert svg is not None
    low, high, start, end, log = map(float, re.search(r'data-y="([^"]*)"', svg).group(1).split())  # type: ignore[union-attr]
    points = re.search(r'points="([^"]*)" stroke="#000" class="line"', svg).group(1)  # type: ignore[union-attr]
    assert log == 1
    axis = Axis(low, high, start, end, log=True)
    for point, value in zip(points.split(), values, strict=True):
        share = (float(point.split(",")[1]) - start) / (end - start)
        assert low * (high / low) ** share == pytest.approx(value, rel=1e-3)
        assert float(point.split(",")[1]) == pytest.approx(axis.px(value), abs=0.01)


def test_constant_curves_and_single_points_have_charts() -> None:
    for points in ([(5, 2.0)], [(1, 0.0), (2, 0.0)], [(1, -3.0), (9, -3.0)]):
        svg = chart("loss", [Line("held-out", points, "#000", dots=True)])
        assert svg is not None
        assert "nan" not in svg


def test_running_mean_keeps_constants_and_trends() -> None:
    assert [y for _, y in smooth([(i, 7.0) for i in range(200)])] == pytest.approx([7.0] * 200)
    ramp = smooth([(i, float(i)) for i in range(400)])
    assert [y for _, y in ramp[:380]] == pytest.approx(list(range(380)))


def test_markup_is_not_escaped_twice_and_text_always_is() -> None:
    assert tag("b", EVIL) == "<b>&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;&#x27;&quot;</b>"
    assert tag("i", tag("b", "<")) == "<i><b>&lt;</b></i>"
    assert tag("a", "x", href='"><script>', class_="c", hidden=True, title=None) == (
        '<a href="&quot;&gt;&lt;script&gt;" class="c" hidden>x</a>'
    )
    assert text(Markup("<b>") + EVIL).count("<") == 0  # a sum of markup and text is text


def test_numbers_read_well() -> None:
    assert [number(v) for v in (0.0, 12.5, 0.03125, 3.1e-5, 45678.0, 2.5e6)] == [
        "0", "12.5", "0.03125", "3.10e-05", "45.68k", "2.5M",
    ]  # fmt: skip


def test_mfu_stands_beside_its_peak_and_a_long_last_record_is_work(tmp_path: Path) -> None:
    lines = [
        Record("latents", 0, "stage", {"state": "running"}, 1000.0),
        Record("latents", 0, "stage", {"state": "done"}, 8200.0),
        Record("codec", 1, "train", {"mfu": 0.125}, 9000.0),
        Record("codec", 2, "params", {"mfu_peak_flops_per_s": 4e11, "mfu_peak_source": "a measured GEMM"}, 9001.0),
        Record("codec", 2, "train", {"mfu": 0.125}, 99000.0),  # a pause
        Record("codec", 2, "stage", {"state": "done"}, 99010.0),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(line.to_json() + "\n" for line in lines))
    write_status(tmp_path, "done")
    stages = load_run(tmp_path).stages
    assert {name: (stage.state, stage.busy_s) for name, stage in stages.items()} == {
        "latents": ("done", 7200.0),
        "codec": ("done", 11.0),
    }
    html = report.run([tmp_path]).read_text()
    assert "12.5 % of 400 GFLOP/s" in html
    assert "a measured GEMM" in html


def test_few_of_many_steps_with_the_first_and_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "samples" / "sft"
    folder.mkdir(parents=True)
    for step in range(1, 21):
        Image.new("RGB", (2, 2)).save(folder / f"step-{step:06d}.png")
    write_status(tmp_path, "done")
    steps = [grid.step for grid in spread(load_run(tmp_path).grids, 5)]
    assert steps[0] == 1
    assert steps[-1] == 20
    assert len(steps) == 5
