"""The Inception network of FID and the ways to its 299 px, each against what it stands for. One process, seconds."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fetched import ASSETS
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.torchscript import read_tensors
from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.evaluate.fid_features import PROTOCOLS, FidFeatures, tf1_bilinear
from unicom_dist.models.encoders.inception import FidInception, load_fid_inception


def pictures(count: int = 2, height: int = 40, width: int = 56) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def weights() -> dict[str, torch.Tensor]:
    """Random ones, under the names of the file, that keep activations alive through the depth."""
    torch.manual_seed(1)
    found = {}
    for name, module in FidInception().named_modules():
        if isinstance(module, torch.nn.Conv2d):
            outputs = module.out_channels
            found[f"{name}.weight"] = torch.nn.init.kaiming_normal_(torch.empty_like(module.weight))
            found[f"{name}.beta"], found[f"{name}.mean"] = torch.randn(outputs) * 0.1, torch.randn(outputs) * 0.1
            found[f"{name}.var"] = torch.rand(outputs) + 0.5
    return found


class Written:
    """The network once more, layer after layer from the published description, without folding or memory formats."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.w = tensors

    def conv(self, x, name, stride=1, padding=0):
        x = torch.nn.functional.conv2d(x, self.w[f"{name}.weight"], None, stride, padding)
        moments = (self.w[f"{name}.mean"], self.w[f"{name}.var"])
        return torch.nn.functional.batch_norm(x, *moments, None, self.w[f"{name}.beta"], eps=1e-3).relu()

    def average(self, x):
        padded = torch.nn.functional.pad(torch.stack([x, torch.ones_like(x)]), (1, 1, 1, 1))
        total, places = (p.unfold(2, 3, 1).unfold(3, 3, 1).sum((-1, -2)) for p in padded)
        return total / places

    def __call__(self, x):
        pool = torch.nn.functional.max_pool2d
        x = self.conv(self.conv(self.conv(x, "conv", 2), "conv_1"), "conv_2", 1, 1)
        x = pool(self.conv(self.conv(pool(x, 3, 2), "conv_3"), "conv_4"), 3, 2)
        for m in ("mixed", "mixed_1", "mixed_2"):
            five = self.conv(self.conv(x, f"{m}.tower.conv"), f"{m}.tower.conv_1", 1, 2)
            three = self.conv(self.conv(x, f"{m}.tower_1.conv"), f"{m}.tower_1.conv_1", 1, 1)
            three = self.conv(three, f"{m}.tower_1.conv_2", 1, 1)
            x = torch.cat([self.conv(x, f"{m}.conv"), five, three, self.conv(self.average(x), f"{m}.tower_2.conv")], 1)
        three = self.conv(self.conv(x, "mixed_3.tower.conv"), "mixed_3.tower.conv_1", 1, 1)
        three = self.conv(three, "mixed_3.tower.conv_2", 2)
        x = torch.cat([self.conv(x, "mixed_3.conv", 2), three, pool(x, 3, 2)], 1)
        for m in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
            a = self.conv(self.conv(x, f"{m}.tower.conv"), f"{m}.tower.conv_1", 1, (0, 3))
            a = self.conv(a, f"{m}.tower.conv_2", 1, (3, 0))
            b = self.conv(x, f"{m}.tower_1.conv")
            for number, padding in enumerate([(3, 0), (0, 3), (3, 0), (0, 3)], 1):
                b = self.conv(b, f"{m}.tower_1.conv_{number}", 1, padding)
            x = torch.cat([self.conv(x, f"{m}.conv"), a, b, self.conv(self.average(x), f"{m}.tower_2.conv")], 1)
        a = self.conv(self.conv(x, "mixed_8.tower.conv"), "mixed_8.tower.conv_1", 2)
        b = self.conv(self.conv(x, "mixed_8.tower_1.conv"), "mixed_8.tower_1.conv_1", 1, (0, 3))
        b = self.conv(self.conv(b, "mixed_8.tower_1.conv_2", 1, (3, 0)), "mixed_8.tower_1.conv_3", 2)
        x = torch.cat([a, b, pool(x, 3, 2)], 1)
        for m, pooled in (("mixed_9", self.average), ("mixed_10", lambda y: pool(y, 3, 1, 1))):
            a = self.conv(x, f"{m}.tower_conv")
            b = self.conv(self.conv(x, f"{m}.tower_1_conv"), f"{m}.tower_1_conv_1", 1, 1)
            ends = [
                self.conv(end, f"{m}.{tower}_mixed_conv{number}", 1, padding)
                for end, tower in ((a, "tower"), (b, "tower_1"))
                for number, padding in (("", (0, 1)), ("_1", (1, 0)))
            ]
            x = torch.cat([self.conv(x, f"{m}.conv"), *ends, self.conv(pooled(x), f"{m}.tower_2_conv")], 1)
        return x.mean((2, 3))


def test_network_equals_its_description(tmp_path: Path) -> None:
    tensors = weights()
    save_file(tensors, tmp_path / "model.safetensors")
    network = load_fid_inception(tmp_path)
    images = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = Written(tensors)(images)
    assert expected.shape == (1, 2048)
    assert expected.std() > 0.01
    torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ValueError, match="299"):
        network(images[..., :256])


def test_fetched_weights_are_those_of_the_archive() -> None:
    folder = ASSETS / "fid-inception"
    if not folder.is_dir():
        pytest.skip("`unicom data fetch recipes/quickstart.yaml --suite reconstruction` fetches the network of FID")
    tensors = load_file(folder / "model.safetensors")
    network = load_fid_inception(folder)
    images = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = network(images)
    torch.testing.assert_close(features, Written(tensors)(images), rtol=0, atol=1e-4)
    # As the archive's own program gave it, on the same input with the same torch.
    assert features.mean().item() == pytest.approx(REFERENCE_MEAN, abs=1e-5)
    assert features[0, :4].tolist() == pytest.approx(REFERENCE_FIRST, abs=1e-4)


REFERENCE_MEAN = 0.18733972
REFERENCE_FIRST = [0.11420333, 0.00176589, 0.27099025, 0.0]


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.fid_path") as caught:
        load_fid_inception(tmp_path)
    assert "--suite reconstruction" in caught.value.remedy
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="does not hold the Inception network"):
        load_fid_inception(tmp_path)


def tf1_written_out(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape
    out = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            y, x = row * height / side, column * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            below = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            out[row, column] = above * (1 - (y - top)) + below * (y - top)
    return out


@pytest.mark.parametrize("size", [(9, 13), (40, 31)])
def test_bilinear_of_tensorflow_1(size: tuple[int, int]) -> None:
    images = pictures(1, *size).float()
    expected = tf1_written_out(images[0, 1].numpy(), 23)
    np.testing.assert_allclose(tf1_bilinear(images, 23)[0, 1].numpy(), expected, atol=1e-3)


def test_clean_resizing_is_pillows_bicubic_on_float_channels() -> None:
    for images in (pictures(1, 40, 56), pictures(1, 512, 340)):
        shown = PROTOCOLS["clean-fid"].prepare(images)[0].numpy() * 128 + 128
        for channel, found in zip(images[0].numpy(), shown, strict=True):
            expected = Image.fromarray(channel.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(found, np.asarray(expected).clip(0, 255), atol=1e-2)


def test_value_ranges() -> None:
    white = torch.full((1, 3, 299, 299), 255, dtype=torch.uint8)
    black = torch.zeros_like(white)
    ends = {name: (p.prepare(black).mean().item(), p.prepare(white).mean().item()) for name, p in PROTOCOLS.items()}
    for name in ("torch-fidelity", "clean-fid"):
        assert ends[name] == pytest.approx((-1, 127 / 128), abs=1e-5)
    assert ends["pytorch-fid"] == pytest.approx((-1, 1), abs=1e-5)


def test_only_bytes_are_measured(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    embed = FidFeatures(load_fid_inception(tmp_path), "torch-fidelity")
    with pytest.raises(TypeError, match="8-bit"):
        embed(pictures().float())
    assert embed(pictures(1)).shape == (1, 2048)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def archive(pickled: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("net/data.pkl", pickled)
        file.writestr("net/data/0", np.arange(12, dtype="<f4").tobytes())
    return content.getvalue()


def test_torchscript_tensors_are_read_without_running_anything(tmp_path: Path, capsys) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 4)
            self.scale = torch.nn.Parameter(torch.arange(6.0).view(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    network = Net()
    torch.jit.script(network).save(str(tmp_path / "net.pt"))
    found = read_tensors((tmp_path / "net.pt").read_bytes())
    assert {name: array.tolist() for name, array in found.items()} == {
        name: tensor.tolist() for name, tensor in network.state_dict().items()
    }
    for bad in (archive(pickle.dumps({"x": Evil()})), b"no archive", archive(b"no pickle")):
        with pytest.raises(DataError, match="refused to load a TorchScript archive"):
            read_tensors(bad)
    assert "executed" not in capsys.readouterr().out
