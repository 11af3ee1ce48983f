"""Encoders against their references, and what they say about foreign weights. One process, about 10 s."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fetched import fetched, published
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipelines import features as features_job
from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import Config, EncoderConfig
from unicom_dist.models.encoders import build_encoder, encoder_fingerprint, encoder_shape
from unicom_dist.models.encoders.efficientnet import EfficientNetEncoder, EfficientNetLite2
from unicom_dist.models.encoders.folding import fold_batch_norm
from unicom_dist.models.encoders.resnet import STAGES, ResNet50, load_resnet50
from unicom_dist.models.encoders.siglip2 import naflex_grid


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Siglip2VisionConfig
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_patches=16, patch_size=8
    )
    folder = tmp_path_factory.mktemp("siglip")
    Siglip2VisionModel(config).save_pretrained(folder)
    return folder


def siglip(folder: Path, patches: int = 20) -> EncoderConfig:
    return EncoderConfig(kind="siglip2", path=str(folder), max_patches=patches)


SIZES = [(64, 64), (100, 40), (31, 77), (8, 200), (5, 5)]


def test_siglip2_features_equal_transformers_processor_and_model(siglip_folder: Path) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

    encoder = build_encoder(siglip(siglip_folder))
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    ours = encoder.encode([encoder.preprocess(image) for image in pictures])
    inputs = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20)(pictures, return_tensors="pt")
    model = Siglip2VisionModel.from_pretrained(siglip_folder).eval()
    with torch.inference_mode():
        reference = model(**inputs).last_hidden_state
    for row, (features, grid) in enumerate(ours):
        assert grid == tuple(inputs["spatial_shapes"][row].tolist())
        expected = reference[row, : grid[0] * grid[1]].numpy()
        assert features.shape == expected.shape == (grid[0] * grid[1], encoder.channels)
        np.testing.assert_allclose(features, expected, atol=2e-5)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (640, 480), (3000, 20), (257, 255), (16, 4096)])
def test_naflex_grid_equals_transformers(width: int, height: int) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    for patches in (4, 256, 1024):
        expected = get_image_size_for_max_num_patches(height, width, 16, patches)
        assert naflex_grid(height, width, 16, patches) == (expected[0] // 16, expected[1] // 16)


def test_siglip2_features_do_not_depend_on_the_batch(siglip_folder: Path) -> None:
    encoder = build_encoder(siglip(siglip_folder))
    prepared = [encoder.preprocess(picture(*size, seed)) for seed, size in enumerate(SIZES)]
    together = encoder.encode(prepared)
    for item, expected in zip(prepared, together, strict=True):
        np.testing.assert_allclose(encoder.encode([item])[0].features, expected.features, atol=2e-5)


def test_siglip2_with_a_missing_tensor_is_refused(siglip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(siglip_folder / "model.safetensors")
    weights.pop(next(name for name in weights if "post_layernorm.weight" in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((siglip_folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="does not hold siglip2 weights") as caught:
        build_encoder(siglip(tmp_path))
    assert "post_layernorm" in caught.value.why


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "bert"}'])
def test_a_folder_of_another_model_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    for function in (build_encoder, encoder_fingerprint, encoder_shape):
        with pytest.raises(ConfigError, match=r"encoder\.path"):
            function(siglip(tmp_path))


def test_a_missing_encoder_folder_is_named() -> None:
    for kind in ("siglip2", "efficientnet-lite2"):
        with pytest.raises(ConfigError, match="/nowhere/at/all"):
            build_encoder(EncoderConfig(kind=kind, path="/nowhere/at/all"))


def test_features_run_fetches_what_a_hub_id_names_and_says_so(
    siglip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetched_ids = []

    def hub(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        if not local_files_only:
            fetched_ids.append(name)
        if name not in fetched_ids:
            raise FileNotFoundError(f"no snapshot of {name}")
        return str(siglip_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    encoder = EncoderConfig(kind="siglip2", path="someone/siglip2")
    with pytest.raises(ConfigError, match="someone/siglip2") as caught:
        encoder_fingerprint(encoder)
    assert "`unicom features run` fetches it" in caught.value.remedy
    config = Config(name="a", run_dir=str(tmp_path), data={"path": str(tmp_path)}, encoder=encoder)
    with caplog.at_level("INFO"), pytest.raises(DataError):  # there are no pictures to encode
        features_job.run(config)
    assert fetched_ids == ["someone/siglip2"]
    assert "encoder someone/siglip2: taken from the model hub" in caplog.text
    assert encoder_shape(encoder) == (encoder.max_patches, 32)


def test_fingerprint_names_weights_and_processing(siglip_folder: Path, tmp_path: Path) -> None:
    config = siglip(siglip_folder)
    encoder = build_encoder(config)
    assert encoder.fingerprint == encoder_fingerprint(config)
    assert encoder_shape(config) == (encoder.max_tokens, encoder.channels)
    others = [siglip(siglip_folder, 21), config.model_copy(update={"dtype": "bfloat16"})]
    from safetensors.torch import load_file

    weights = load_file(siglip_folder / "model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((siglip_folder / "config.json").read_text())
    prints = {encoder.fingerprint, *map(encoder_fingerprint, [*others, siglip(tmp_path)])}
    assert len(prints) == 4
    assert encoder_fingerprint(config.model_copy(update={"batch": 7})) == encoder.fingerprint


def test_random_encoder_is_a_function_of_the_picture() -> None:
    config = EncoderConfig(kind="random")
    one, two = build_encoder(config), build_encoder(config)
    prepared = [one.preprocess(picture(40, 30, seed)) for seed in range(3)]
    together = one.encode(prepared)
    assert encoder_shape(config) == (together[0].features.shape[0], one.channels)
    assert one.fingerprint == two.fingerprint == encoder_fingerprint(config)
    for item, expected in zip(prepared, together, strict=True):
        np.testing.assert_array_equal(two.encode([item])[0].features, expected.features)
    assert not np.allclose(together[0].features, together[1].features)


@pytest.mark.parametrize("bias", [True, False])
def test_folded_convolution_equals_convolution_and_batch_norm(bias: bool) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 8, 3, groups=2, bias=bias), nn.BatchNorm2d(8, eps=1e-3).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 2)
    x = torch.randn(2, 6, 7, 7)
    moments = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    weight, folded_bias = fold_batch_norm(conv.weight, conv.bias, moments, 1e-3)
    torch.testing.assert_close(nn.functional.conv2d(x, weight, folded_bias, groups=2), norm(conv(x)))


def test_efficientnet_grid_and_size() -> None:
    model = EfficientNetLite2().eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 1280, 2, 3)
    # 6,092,072 published parameters less the classifier (1,281,000); folding leaves one bias for two values.
    norms = sum(module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_092_072 - 1_281_000 - norms


# Block, and cells per token side; with 24 to 352 channels per cell every level fills its part of the 1280.
LEVELS = ((20, 1, 352), (14, 2, 120), (10, 2, 88), (3, 2, 24))


def pyramid_by_hand(blocks: nn.ModuleList, run: Callable[[], object], rows: int, columns: int) -> torch.Tensor:
    """Tokens [B, rows x columns, 1280] from what `blocks` put out while `run()` goes through the network.

    Each level averaged to cells of equal size; a token holds its cells channel by channel, normalised level by level.
    """
    maps: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            maps[number] = output.float().clone()

        return hook

    handles = [blocks[number].register_forward_hook(keep(number)) for number, *_ in LEVELS]
    with torch.inference_mode():
        run()
    for handle in handles:
        handle.remove()
    levels = []
    for number, side, channels in LEVELS:
        batch, width, high, wide = maps[number].shape
        assert width == channels
        cut = maps[number].reshape(
            batch, width, rows, side, high // rows // side, columns, side, wide // columns // side
        )
        tokens = cut.mean((4, 7)).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, width * side * side)
        mean, var = tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0, keepdim=True)
        levels.append((tokens - mean) / torch.sqrt(var + 1e-5))
    return torch.cat(levels, -1)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (128, 32)])
def test_the_pyramid_is_what_four_blocks_of_the_plain_network_put_out(height: int, width: int) -> None:
    torch.manual_seed(0)
    model = EfficientNetLite2().eval()
    images = torch.randn(2, 3, height, width)
    expected = pyramid_by_hand(model.blocks, lambda: model(images), height // 32, width // 32)
    with torch.inference_mode():
        got = model.pyramid(images)
    assert got.shape == (2, 1280, height // 32, width // 32)
    torch.testing.assert_close(got.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_the_pyramid_of_the_published_weights_is_that_of_its_blocks() -> None:
    folder = fetched("efficientnet-lite2")
    config = EncoderConfig(kind="efficientnet-lite2", path=str(folder), image_px=64)
    plain, pyramid = build_encoder(config, "cpu"), build_encoder(config.model_copy(update={"levels": "pyramid"}), "cpu")
    prepared = [pyramid.preprocess(picture(*size, seed)) for seed, size in enumerate([(64, 64), (90, 40)])]
    assert isinstance(plain, EfficientNetEncoder)
    expected = pyramid_by_hand(plain.network.blocks, lambda: plain.encode(prepared), 2, 2)
    for row, (features, grid) in enumerate(pyramid.encode(prepared)):
        assert grid == (2, 2)
        np.testing.assert_allclose(features, expected[row], rtol=1e-4, atol=1e-4)


def test_efficientnet_refuses_other_weights_and_sizes(tmp_path: Path) -> None:
    save_file({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="does not hold efficientnet-lite2 weights"):
        build_encoder(EncoderConfig(kind="efficientnet-lite2", path=str(tmp_path)))
    with pytest.raises(ConfigError, match="image_px = 100") as caught:
        build_encoder(EncoderConfig(kind="efficientnet-lite2", path=str(tmp_path), image_px=100))
    assert "multiple of 32" in caught.value.remedy


def keras_resnet() -> dict[str, torch.Tensor]:
    """Random weights under the published names, small enough to keep activations finite."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def layer(conv: str, norm: str, module: nn.Conv2d) -> None:
        out = module.out_channels
        weights[f"{conv}.weight"] = torch.randn(module.weight.shape, generator=generator) * 0.02
        weights[f"{conv}.bias"] = torch.randn(out, generator=generator) * 0.1
        for part in ("gamma", "moving_variance"):
            weights[f"{norm}.{part}"] = torch.rand(out, generator=generator) + 0.5
        for part in ("beta", "moving_mean"):
            weights[f"{norm}.{part}"] = torch.randn(out, generator=generator) * 0.1

    model = ResNet50()
    layer("conv1", "bn_conv1", model.conv1)
    for number, repeats, _ in STAGES:
        for name in (f"{number}{'abcdef'[block]}" for block in range(repeats)):
            block = model.blocks[name]
            for branch in "abc":
                layer(f"res{name}_branch2{branch}", f"bn{name}_branch2{branch}", getattr(block, branch))
            if block.shortcut is not None:
                layer(f"res{name}_branch1", f"bn{name}_branch1", block.shortcut)
    return weights


def unfolded_resnet(weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The Keras graph layer by layer: padding, biased convolution, batch normalisation, activation."""

    def layer(x: torch.Tensor, conv: str, norm: str, stride: int = 1, pad: int = 0) -> torch.Tensor:
        x = nn.functional.conv2d(x, weights[f"{conv}.weight"], weights[f"{conv}.bias"], stride, pad)
        moments = [weights[f"{norm}.{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta")]
        return nn.functional.batch_norm(x, *moments, eps=1e-3)

    blue_first = torch.stack([(images[:, channel] + 1) / 2 * 255 for channel in (2, 1, 0)], 1)
    x = blue_first - torch.tensor([103.939, 116.779, 123.68])[:, None, None]
    x = layer(nn.functional.pad(x, (3, 3, 3, 3)), "conv1", "bn_conv1", 2).relu()
    x = nn.functional.max_pool2d(nn.functional.pad(x, (1, 1, 1, 1)), 3, 2)
    for number, repeats, _ in STAGES:
        for block in range(repeats):
            name, stride = f"{number}{'abcdef'[block]}", 2 if block == 0 and number > 2 else 1
            y = layer(x, f"res{name}_branch2a", f"bn{name}_branch2a", stride).relu()
            y = layer(y, f"res{name}_branch2b", f"bn{name}_branch2b", pad=1).relu()
            y = layer(y, f"res{name}_branch2c", f"bn{name}_branch2c")
            if block == 0:
                x = layer(x, f"res{name}_branch1", f"bn{name}_branch1", stride)
            x = (x + y).relu()
    return x.mean((2, 3))


def test_resnet50_equals_the_unfolded_graph(tmp_path: Path) -> None:
    weights = keras_resnet()
    save_file(weights, tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        features = load_resnet50(tmp_path)(images)
        torch.testing.assert_close(features, unfolded_resnet(weights, images), rtol=1e-3, atol=1e-4)
    assert features.shape == (2, 2048)


def test_resnet50_refuses_a_folder_without_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        load_resnet50(tmp_path)
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="does not hold ResNet50 weights"):
        load_resnet50(tmp_path)


@pytest.mark.slow
def test_efficientnet_equals_the_published_implementation() -> None:
    reference_module = published("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    from safetensors.torch import load_file

    folder = fetched("efficientnet-lite2")
    reference = reference_module.EfficientNet.from_name("efficientnet-lite2").eval()
    reference.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    encoder = build_encoder(EncoderConfig(kind="efficientnet-lite2", path=str(folder)), "cpu")
    prepared = [encoder.preprocess(picture(256, 256, seed)) for seed in range(2)]
    images = torch.from_numpy(np.stack([item["pixels"] for item in prepared])).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = reference.extract_features((images - 127) / 128).flatten(2).transpose(1, 2).numpy()
    for row, item in enumerate(encoder.encode(prepared)):
        np.testing.assert_allclose(item.features, expected[row], atol=1e-3)


@pytest.mark.slow
def test_resnet50_knows_a_cat() -> None:
    from safetensors.torch import load_file

    data = published("skimage.data", "scikit-image")
    folder = fetched("resnet50")
    image = Image.fromarray(data.chelsea()).resize((224, 224))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    weights = load_file(folder / "model.safetensors")
    scores = load_resnet50(folder)(pixels) @ weights["fc1000.weight"].T + weights["fc1000.bias"]
    labels = json.loads((folder / "labels.json").read_text())
    best = int(scores.argmax())
    assert "cat" in (labels[best] if isinstance(labels, list) else labels[str(best)]).lower()
