"""Ablations without a training: intervals, verdicts and their words, the grid, claims and page from made-up figures."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.explain import write_config
from unicom_dist.config.load import Loaded, load_recipe
from unicom_dist.config.schema import AblationConfig
from unicom_dist.evaluate.intervals import Estimate, over_seeds_and_pictures
from unicom_dist.testing.tiny import tiny_config
from unicom_dist.tracking.report.data import Curve, Stage
from unicom_dist.tracking.report.forest import Bar, forest
from unicom_dist.train.ablation import codec, codec_page
from unicom_dist.train.ablation.cells import Variant, check_settings, make_cells
from unicom_dist.train.ablation.codec_claims import claims_of
from unicom_dist.train.ablation.codec_grid import Point, equal_scalars, points_of, published
from unicom_dist.train.ablation.findings import Claim, Finding
from unicom_dist.train.ablation.measured import Measured
from unicom_dist.train.ablation.reconstruction import METRICS


def finding(low: float, high: float, expected: str = "above", margin: float = 0.0) -> Finding:
    return Finding("A", "B", "PSNR", "dB", Estimate((low + high) / 2, low, high), expected, margin, paper=0.44)


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [
        (0.1, 0.9, "above", "agrees"),
        (-0.9, -0.1, "above", "disagrees"),
        (-0.1, 0.9, "above", "not decided"),
        (-0.9, -0.1, "below", "agrees"),
        (0.1, 0.9, "below", "disagrees"),
        (-0.9, 0.1, "below", "not decided"),
        (-0.9, 0.9, "equal", "agrees"),
        (1.1, 1.9, "equal", "disagrees"),
        (-1.9, -1.1, "equal", "disagrees"),
        (0.5, 1.5, "equal", "not decided"),
        (-math.inf, math.inf, "above", "not decided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, expected, verdict):
    assert finding(low, high, expected, margin=1.0).verdict == verdict


def test_the_sentence_says_verdict_difference_interval_and_the_papers_figure():
    assert finding(0.1, 0.9).sentence == (
        "Agrees: PSNR of A minus that of B is +0.50 dB (95 % interval +0.10 to +0.90, paper +0.44)."
    )
    assert finding(-0.9, -0.1).sentence.startswith("Disagrees: PSNR of A minus that of B is -0.50 dB")
    equal = finding(0.5, 1.5, "equal", margin=1.0).sentence
    assert equal.startswith("Not decided: ")
    assert "±1 dB counts as nearly equal" in equal
    unknown = Finding("A", "B", "PSNR", "dB", Estimate(0.5, -math.inf, math.inf), "above")
    assert "no interval" in unknown.sentence
    assert "inf" not in unknown.sentence
    assert unknown.as_dict()["difference"] == {"mean": 0.5, "low": None, "high": None}


def test_a_claim_counts_the_verdicts_of_its_findings():
    good, bad, open_ = finding(0.1, 0.9), finding(-0.9, -0.1), finding(-0.1, 0.9)
    assert Claim("c", "s", (good, good)).verdict == "agrees"
    assert Claim("c", "s", (bad,)).verdict == "disagrees"
    assert Claim("c", "s", (open_, open_)).verdict == "not decided"
    mixed = Claim("c", "s", (good, bad, open_, good)).verdict
    assert mixed == "agrees in 2, disagrees in 1, not decided in 1 of 4 comparisons"


def test_the_interval_holds_for_other_seeds_and_other_pictures():
    random = np.random.default_rng(0)
    hits, runs = 0, 400
    for _ in range(runs):
        seeds, pictures = random.normal(0, 0.5, (3, 1)), random.normal(0, 2, (1, 40))
        found = over_seeds_and_pictures(1 + seeds + pictures + random.normal(0, 1, (3, 40)))
        hits += found.low <= 1 <= found.high
    assert 0.93 * runs < hits <= runs  # it errs on the safe side


def test_the_interval_of_one_source_of_variation_is_students():
    found = over_seeds_and_pictures(np.array([[1.0], [2.0], [3.0]]))
    assert found.mean == 2
    half = 4.302652729911275 / 3**0.5  # t of two degrees of freedom, standard deviation 1
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert over_seeds_and_pictures(np.array([[1.0, 2.0, 3.0]])) == pytest.approx(found)
    assert over_seeds_and_pictures(np.array([[1.0]])) == (1.0, -math.inf, math.inf)
    assert over_seeds_and_pictures(np.ones((2, 3))) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="seed and picture"):
        over_seeds_and_pictures(np.ones(3))


def test_the_grid_pairs_channels_with_tokens_of_equal_scalars():
    points = points_of(AblationConfig(kinds=["attention", "mlp"], widths=[16, 64], spatial=["pool"]), 1280)
    assert list(points) == [
        "identity-1280", "identity-pool-1280",
        "attention-16", "attention-64", "attention-pool-64", "attention-pool-256",
        "mlp-16", "mlp-64", "mlp-pool-64", "mlp-pool-256",
    ]  # fmt: skip
    pairs = [(a.name, b.name) for a, b in equal_scalars(points)]
    assert pairs == [
        ("attention-16", "attention-pool-64"), ("attention-64", "attention-pool-256"),
        ("mlp-16", "mlp-pool-64"), ("mlp-64", "mlp-pool-256"),
    ]  # fmt: skip
    for left, right in equal_scalars(points):
        assert 64 * left.channels == 16 * right.channels
    rows = {name: published(point) for name, point in points.items()}
    assert {name: row and (row.tokens, row.channels, row.psnr) for name, row in rows.items() if row} == {
        "identity-1280": (1024, 1152, 23.26),
        "identity-pool-1280": (256, 1152, 20.29),
        "attention-64": (1024, 64, 22.61),
        "mlp-64": (1024, 64, 22.17),
    }


def test_every_cell_is_a_recipe_of_its_own(tmp_path):
    base = tiny_config(tmp_path, ablation={"seeds": 2}, seed=5)
    points = points_of(base.ablation.model_copy(update={"widths": [4]}), 12)
    variants = [Variant(name, point.overrides()) for name, point in points.items()]
    cells = make_cells(
        Loaded(base, {"seed": "recipe:1", "name": "recipe:2"}, tmp_path), variants, [codec.codec_stage(base)]
    )
    assert len(cells) == 2 * len(points)
    assert len({cell.folder for cell in cells}) == len(cells)
    first, second = cells[0], cells[1]
    assert (first.seed, second.seed) == (5, 6)
    assert first.config.codec.compressor.kind == "identity"
    assert first.config.codec.compressor.channels == 12
    assert [stage.name for stage in first.config.stages] == ["codec"]
    assert first.config.codec.decoder == base.codec.decoder
    assert first.origins["seed"] == "unicom ablate"
    write_config(first.folder, first.config, first.origins)
    assert load_recipe(first.folder).config == first.config
    check_settings(first.config)
    check_settings(second.config)  # not begun
    other = make_cells(
        Loaded(tiny_config(tmp_path, ablation={"seeds": 2}, seed=5, stages={"codec": {"lr": 0.5}}), {}, tmp_path),
        variants,
        [tiny_config(tmp_path, stages={"codec": {"lr": 0.5}}).stage("codec")],
    )
    with pytest.raises(ConfigError, match=r"stages\.codec\.lr = 0\.001, the recipe now says 0\.5"):
        check_settings(other[0].config)
    observed = tiny_config(tmp_path, stages={"codec": {"log_every": 7}}).stage("codec")
    check_settings(make_cells(Loaded(base, {}, tmp_path), variants, [observed])[0].config)


def test_a_recipe_without_a_codec_is_refused(tmp_path):
    config = tiny_config(tmp_path, stages=[{"name": "latents", "kind": "latents"}])
    with pytest.raises(ConfigError, match="no codec stage"):
        codec.codec_stage(config)


PSNRS = {  # of made-up variants: tokens matter, kinds hardly, 64 channels cost 0.2 dB
    "identity-1280": 22.0, "identity-pool-1280": 19.0, "attention-64": 21.8, "attention-pool-256": 19.5,
    "mlp-64": 21.8, "mlp-pool-256": 22.5,
}  # fmt: skip


@pytest.fixture
def result(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, ablation={"seeds": 3, "widths": [64]})
    points = points_of(config.ablation, 1280)
    stage = codec.codec_stage(config)
    cells = make_cells(
        Loaded(config, {}, tmp_path), [Variant(name, point.overrides()) for name, point in points.items()], [stage]
    )
    random = np.random.default_rng(0)
    hard = random.normal(0, 3, 40)  # the pictures differ much more than the variants do
    measured, stages = [], {}
    for cell in cells:
        name = cell.variant.name
        values = PSNRS[name] + hard + random.normal(0, 0.1) + random.normal(0, 0.2, 40)
        figures = {"PSNR": values, "SSIM": values / 30, "LPIPS": 1 - values / 30, "rFID": [90 - values.mean()]}
        keys = [f"picture-{number}" for number in range(40)]
        measured.append(Measured(keys, 1000, {key: list(v) for key, v in figures.items()}, {}))
        early, late = (0.9, 0.3) if "pool" not in name else (0.7, 0.5)
        noise = random.normal(0, 0.01)
        stages[cell.name] = Stage("codec", {}, 60.0)
        for shift in (-0.05, 0.05):
            curve = Curve([], [(50, early + noise + shift), (300, late + noise - shift)])
            stages[cell.name].curves[f"loss/flow@{0.5 + shift}"] = curve
    monkeypatch.setattr(codec, "read_stage", lambda cell: stages[cell.name])
    tokens = {name: 64 if point.all_tokens else 16 for name, point in points.items()}
    return codec.summary(config, stage, points, tokens, cells, measured)


def test_claims_follow_from_the_figures(result):
    found = {claim["claim"].partition(":")[0]: claim for claim in result["claims"]}
    channels = found["Channels compress, tokens do not"]
    assert channels["verdict"] == "agrees"
    first = channels["findings"][0]
    assert first["sentence"].startswith(
        "Agrees: PSNR of 64 × 64, attention minus that of 16 × 1280, no compressor, pooled is +2."
    )
    assert first["paper"] == 2.32
    assert [finding["metric"] for finding in channels["findings"][:4]] == ["PSNR", "SSIM", "LPIPS", "rFID"]
    assert "feature cosine" not in result["seed_std"]  # not measured
    equal = next(claim for text, claim in found.items() if "equally many values" in text)
    assert equal["verdict"] == "agrees in 4, disagrees in 4 of 8 comparisons"  # the MLP with fewer tokens is the better
    assert "Disagrees: PSNR of 64 × 64, MLP" in str(equal["findings"])
    nearly = next(claim for text, claim in found.items() if "nearly as good as all" in text)
    assert nearly["verdict"] == "agrees"
    kinds = next(claim for text, claim in found.items() if "better than an MLP" in text)
    assert kinds["verdict"] == "not decided"
    dynamics = next(claim for text, claim in found.items() if "slower" in text)
    assert dynamics["verdict"] == "agrees"
    assert len(dynamics["findings"]) == 4
    assert [step for step, _ in result["variants"][0]["curves"]["loss/flow"]] == [50, 300]
    assert result["variants"][0]["curves"]["loss/flow"][0][1] == pytest.approx(0.9, abs=0.02)
    assert result["variants"][0]["curves"]["loss/perceptual"] == []


def test_the_page_shows_verdicts_figures_and_noise(result, tmp_path):
    folder = tmp_path / "run"
    write_config(folder, tiny_config(tmp_path), {})
    json.loads(json.dumps(result, allow_nan=False))
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    strips = {variant["name"]: [picture] * 3 for variant in result["variants"]}
    path = folder / "sheet.png"
    codec_page.sheet(result, [picture] * 3, strips).save(path)
    page = codec_page.render(result, path, folder)
    for claim in result["claims"]:
        for text in (claim["claim"], claim["findings"][0]["sentence"]):
            assert text in page
    for metric in codec_page.metrics_of(result):
        assert f"{result['variants'][0]['figures'][metric.name]['mean']:.{metric.digits}f}" in page
    assert f"{result['seed_std']['PSNR']:.2f} dB PSNR apart" in page
    assert "22.61" in page  # table 4
    assert 'src="data:image/' in page
    assert "http://" not in page
    assert "https://" not in page
    assert str(tmp_path) not in page.partition('id="configuration"')[0]
    assert "codec.compressor.channels" in page


def test_claims_need_their_points():
    points = {point.name: point for point in (Point("identity", "none", 12), Point("mlp", "none", 4))}
    tables = {name: {metric.name: np.ones((1, 2)) for metric in METRICS} for name in points}
    claims = claims_of(points, dict.fromkeys(points, 4), tables, {name: [[]] for name in points})
    assert [claim.text for claim in claims] == ["4 channels are nearly as good as all 12."]


def test_intervals_below_each_other():
    bars = [Bar("a <b>", 1.0, 0.5, 1.5, "#123456"), Bar("alone", -1.0, -math.inf, math.inf, "#123456")]
    svg = forest("PSNR", bars, "dB", zero="none")
    assert svg is not None
    assert "a &lt;b&gt;" in svg
    assert "1.00 (0.50 to 1.50)" in svg
    assert "inf" not in svg
    assert svg.count("<circle") == 2
    assert forest("PSNR", []) is None
