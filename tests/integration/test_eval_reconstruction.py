"""The reconstruction suite on an untrained tiny codec and on folders, with cheap judging networks. One process."""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unicom_dist.cli.main import run as unicom
from unicom_dist.config.errors import ConfigError, DataError, NonFiniteError, PreflightError
from unicom_dist.config.explain import write_config
from unicom_dist.config.schema import Config, EvalConfig
from unicom_dist.data.manifest import Manifest
from unicom_dist.evaluate import reconstruction_suite as suite
from unicom_dist.evaluate.fid_features import PROTOCOLS
from unicom_dist.evaluate.frechet import FeatureSums, frechet_distance
from unicom_dist.evaluate.image_metrics import psnr
from unicom_dist.evaluate.parts import Build, PartTask
from unicom_dist.evaluate.picture_pairs import CodecPairs, PicturePair, key_seed, with_codec_of
from unicom_dist.evaluate.result import write_result
from unicom_dist.evaluate.ruler import Ruler, to_bytes
from unicom_dist.models.encoders import build_encoder, encoder_fingerprint
from unicom_dist.models.encoders.random import CHANNELS
from unicom_dist.sample.pictures import to_pictures
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import write_tiny_weights
from unicom_dist.tracking.report import page

HELDOUT = 70  # two parts and a bit


class CheapFid:
    """Eight random projections of the picture at 8 x 8 px in place of Inception's features."""

    protocol = PROTOCOLS["torch-fidelity"]

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.interpolate(pictures.float() / 255, (8, 8), mode="area").flatten(1)
        return small @ torch.randn(192, 8, generator=torch.Generator().manual_seed(0)) / 14


def cheap_ruler(config: Config | None) -> Ruler:
    encoder = build_encoder(config.encoder) if config else None
    distance = lambda a, b: (a - b).square().flatten(1).mean(1)  # noqa: E731
    return Ruler(distance, CheapFid(), encoder, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("reconstruction")
    write_tiny_assets(folder)
    config = tiny_config(folder)
    write_tiny_weights(config)
    write_tiny_sets(config, samples=4, heldout=HELDOUT, feature_channels=CHANNELS, grids=((2, 2), (3, 2)))
    for name in ("train", "heldout"):
        manifest = Manifest.read(f"{config.data.path}/{name}", "random")
        manifest.fingerprint = encoder_fingerprint(config.encoder)
        manifest.write(f"{config.data.path}/{name}")
    return config


def measured(config: Config, out: Path, **options: Any) -> dict[str, Any]:
    suite.run(config.run_dir, out=out, load_ruler=cheap_ruler, **options)
    return json.loads((out / "eval.json").read_text())["suites"]["reconstruction"]


@pytest.fixture(scope="module")
def result(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out")
    return out, measured(config, out)


def test_every_figure_is_there_with_interval_and_baseline(result: tuple[Path, dict[str, Any]]) -> None:
    out, content = result
    rows = {row["metric"]: row for row in content["rows"]}
    assert list(rows) == ["rFID", "KID", "PSNR (dB)", "SSIM", "LPIPS (VGG)", "feature cosine"]
    for name, row in rows.items():
        assert row["n"] == HELDOUT
        assert row["baselines"]["trivial"]["name"] == "mean image"
        assert (row["ci"] is None) == (name in ("rFID", "KID"))
        assert row["ci"] is None or row["ci"][0] <= row["value"] <= row["ci"][1]
    for word in ("inception-2015-tf", "299 px", "bilinear (TF1", "(x - 128) / 128", "biased"):
        assert word in rows["rFID"]["note"]
    assert "8 bits" in content["protocol"]["originals"]
    assert content["copy"] == pytest.approx({"psnr": 100.0, "ssim": 1.0, "lpips": 0.0, "cosine": 1.0})
    assert [item["lpips"] for item in content["worst"]] == sorted((i["lpips"] for i in content["worst"]), reverse=True)
    assert sum(size["n"] for size in content["sizes"]) == HELDOUT
    for name in ("suite", "worst"):
        with Image.open(out / "samples" / "eval" / f"reconstruction-{name}.png") as picture:
            assert min(picture.size) > 128
    assert not (out / ".eval-reconstruction").exists()


def test_figures_are_those_of_all_pictures_at_once(config: Config, result: tuple[Path, dict[str, Any]]) -> None:
    source = CodecPairs(config.run_dir, with_codec_of(config.run_dir, config))
    pairs, left_out = source.pairs(range(HELDOUT))
    assert left_out == []
    originals, rebuilt = (to_bytes([getattr(pair, side) for pair in pairs]) for side in ("original", "rebuilt"))
    rows = {row["metric"]: row for row in result[1]["rows"]}
    assert rows["PSNR (dB)"]["value"] == pytest.approx(psnr(rebuilt / 255, originals / 255).mean().item(), abs=0.02)
    sums = [FeatureSums.of(CheapFid()(side).numpy()) for side in (originals, rebuilt)]
    assert rows["rFID"]["value"] == pytest.approx(frechet_distance(*sums), rel=0.01)


def backwards(build: Build, tasks: Sequence[PartTask]) -> Iterator[tuple[PartTask, Any]]:
    """Two workers that know nothing of this process, and the last part first, as Ray may do it."""
    workers = [pickle.loads(pickle.dumps(build))() for _ in range(2)]
    for number, task in enumerate(reversed(tasks)):
        workers[number % 2].process(task, lambda _: None)
        yield task, None


def test_the_result_does_not_depend_on_who_measures_in_which_order(
    config: Config, result: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    again = measured(config, tmp_path, execute=backwards)
    assert again | {"seconds": 0} == result[1] | {"seconds": 0}


def test_an_interrupted_measurement_goes_on(
    config: Config, result: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    done: list[str] = []

    def until(most: int) -> Callable[[Build, Sequence[PartTask]], Iterator[tuple[PartTask, Any]]]:
        def execute(build: Build, tasks: Sequence[PartTask]) -> Iterator[tuple[PartTask, Any]]:
            for task in tasks[:most]:
                build().process(task, lambda _: None)
                done.append(task.name)
                yield task, None
            if most < len(tasks):
                raise KeyboardInterrupt

        return execute

    with pytest.raises(KeyboardInterrupt):
        measured(config, tmp_path, execute=until(2))
    again = measured(config, tmp_path, execute=until(9))
    assert done == ["part 0", "part 1", "part 2"]
    assert again | {"seconds": 0} == result[1] | {"seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        measured(config, tmp_path, execute=until(1))
    measured(config, tmp_path, execute=until(9), limit=40)  # another set: what is there is not used
    assert done[3:] == ["part 0", "part 0", "part 1"]


def test_a_picture_keeps_its_seed_in_any_part_of_the_set(config: Config) -> None:
    whole = CodecPairs(config.run_dir, with_codec_of(config.run_dir, config))
    few = CodecPairs(config.run_dir, with_codec_of(config.run_dir, config), limit=3)
    for pair in few.pairs(range(3))[0]:
        (same,) = whole.pairs([whole.keys.index(pair.key)])[0]
        assert np.abs(np.asarray(pair.rebuilt, int) - np.asarray(same.rebuilt, int)).max() <= 1  # batches differ
    assert key_seed(0, "a") != key_seed(0, "b")
    assert key_seed(0, "a") != key_seed(1, "a")


def test_malformed_pairs_are_left_out_and_counted(config: Config, tmp_path: Path, monkeypatch: Any) -> None:
    from unicom_dist.evaluate import picture_pairs

    def read(pairs: Any, number: int, *rest: Any) -> Any:
        if number == 2:
            raise DataError("sample 2 is damaged")
        return original(pairs, number, *rest)

    original = picture_pairs.read_pair
    monkeypatch.setattr(picture_pairs, "read_pair", read)
    content = measured(config, tmp_path)
    assert content["left_out"] == ["sample 2 is damaged"]
    assert {row["n"] for row in content["rows"]} == {HELDOUT - 1}


def test_other_suites_are_kept_in_the_file_and_all_are_in_the_report(
    config: Config, result: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    write_config(tmp_path, config, {})
    quick = {"suite": "quick", "rows": [result[1]["rows"][2] | {"split": "of quick"}], "captions": []}
    write_result(tmp_path, quick)
    sizes = [*result[1]["sizes"], result[1]["sizes"][0] | {"width": 48}]
    write_result(tmp_path, result[1] | {"sizes": sizes})
    write_result(tmp_path, quick)
    content = json.loads((tmp_path / "eval.json").read_text())
    assert content["rows"] == quick["rows"]
    assert content["suites"]["reconstruction"]["rows"] == result[1]["rows"]
    html = page.run([tmp_path]).read_text()
    for text in ("of quick", "rFID", "48 x ", "299 px", "How reconstructions were measured"):
        assert text in html
    (tmp_path / "eval.json").write_text("torn {")
    write_result(tmp_path, result[1])
    assert list(json.loads((tmp_path / "eval.json").read_text())) == ["suites"]


def save(folder: Path, names: Sequence[str], px: int = 20, noise: int = 0, suffix: str = "png") -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 200, (px, px + 4 * (number % 2), 3))
        pixels = pixels + np.random.default_rng(99).integers(0, noise + 1, pixels.shape)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.{suffix}")
    return folder


def test_two_folders_are_measured_without_a_model(tmp_path: Path) -> None:
    a = save(tmp_path / "a", ["x", "y", "z"])
    b = save(tmp_path / "b", ["x", "y", "z"], noise=40, suffix="bmp")
    rows = {row.metric: row for row in suite.run_folders(a, b, out=tmp_path / "out", load_ruler=cheap_ruler)}
    assert list(rows) == ["rFID", "KID", "PSNR (dB)", "SSIM", "LPIPS (VGG)"]
    assert 15 < rows["PSNR (dB)"].value < 35
    assert rows["rFID"].split == "b, 2 sizes"
    same = {row.metric: row for row in suite.run_folders(a, a, out=tmp_path / "same", load_ruler=cheap_ruler)}
    assert same["rFID"].value == pytest.approx(0, abs=1e-8)
    assert same["PSNR (dB)"].value == 100


def test_folders_that_do_not_pair_up_are_refused(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", ["x", "y"]), save(tmp_path / "b", ["x"])
    with pytest.raises(DataError, match=r"2 pictures in .*, 1 in") as caught:
        suite.run_folders(a, b, out=tmp_path / "out", load_ruler=cheap_ruler)
    assert "the first is y" in caught.value.why
    c = save(tmp_path / "c", ["x", "y"], px=24)
    with pytest.raises(DataError, match=r"x: 20 x 20 px original, 24 x 24 px\s+reconstruction"):
        suite.run_folders(a, c, out=tmp_path / "out", load_ruler=cheap_ruler)
    (c / "y.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"y\.png: the image cannot be read"):
        suite.run_folders(c, c, out=tmp_path / "out", load_ruler=cheap_ruler)
    with pytest.raises(DataError, match="no pictures"):
        suite.run_folders(tmp_path / "none", c, out=tmp_path / "out", load_ruler=cheap_ruler)
    with pytest.raises(DataError, match="1 picture: no covariance"):
        suite.run_folders(b, b, out=tmp_path / "out", load_ruler=cheap_ruler)


def test_pictures_that_are_no_numbers_are_refused() -> None:
    pixels = torch.zeros(3, 3, 4, 4)
    pixels[1, 0, 2, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 3 pictures"):
        to_pictures(pixels)


def test_pictures_too_small_for_a_figure_have_none() -> None:
    small = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    large = Image.fromarray(np.zeros((12, 20, 3), np.uint8))
    scores = cheap_ruler(None).measure([PicturePair("s", small, small), PicturePair("l", large, large)]).scores
    assert np.isnan(scores["ssim"]).tolist() == [True, False]
    assert np.isnan(scores["lpips"]).tolist() == [True, True]
    assert scores["psnr"].tolist() == [100, 100]


def test_the_network_of_fid_is_asked_for_before_anything_is_measured(config: Config, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from unicom_dist.objective.perceptual import Lpips

    save_file(Lpips("vgg").state_dict(), tmp_path / "vgg.safetensors")
    settings = EvalConfig(lpips_path=str(tmp_path), fid_path=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"eval\.fid_path"):
        Ruler.load(settings, None)
    assert Ruler.load(settings.model_copy(update={"fid_path": ""}), None).fid is None


def test_folder_that_cannot_be_written(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="cannot write"):
        measured(config, tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing"),
        (["run", "--originals", "a", "--reconstructions", "b", "--suite", "reconstruction"], "either a model"),
        (["--originals", "a", "--suite", "reconstruction"], "either a model"),
        (["run", "--workers", "2"], "--suite reconstruction"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: list[str], words: str, capsys: Any) -> None:
    assert unicom(["eval", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_build_is_small_on_its_way_to_a_worker(config: Config) -> None:
    build = Build(
        partial(CodecPairs, config.run_dir, with_codec_of(config.run_dir, config)), partial(cheap_ruler, None)
    )
    assert build.source.pairs([0])[0]
    assert len(pickle.dumps(build)) < 20_000
