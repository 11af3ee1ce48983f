"""The perceptual term: what its network is shown, schedule, feature distances, refusals. One process, 15 s."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import CodecConfig, DecoderConfig
from unicom_dist.models.codec import Codec, CodecBatch
from unicom_dist.models.encoders.efficientnet import PYRAMID, EfficientNetLite2
from unicom_dist.models.encoders.resnet import ResNet50
from unicom_dist.models.target import PixelTarget, Target
from unicom_dist.objective.feature_distance import FeatureDistance, _efficientnet_stages, _resnet_stages
from unicom_dist.objective.perceptual import Lpips
from unicom_dist.objective.perceptual_loss import (
    PerceptualLoss,
    at_side,
    crop,
    load_network,
    load_perceptual,
    scheduled,
)
from unicom_dist.objective.terms import codec_counts, codec_terms, total
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.train.codec import CodecTask

SCALE = 4


class Enlarging:
    """A target space of means over SCALE x SCALE pixels, decoded by repeating them."""

    channels, scale, fingerprint = 3, SCALE, ""

    def encode(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, SCALE)

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z, scale_factor=SCALE, mode="nearest")

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height // SCALE, width // SCALE


def step(t: list[float], target: Target, px: int = 32) -> tuple[tuple[Tensor, Tensor], CodecBatch]:
    """Outputs of a codec and the part of a batch that losses read."""
    draw = torch.Generator().manual_seed(1)
    size = len(t)
    images = torch.rand(size, 3, px, px, generator=draw) * 2 - 1
    data = target.encode(images)
    velocity, clean, noise = torch.randn(3, *data.shape, generator=draw).unbind(0)
    none = torch.zeros(size, 1, 2)
    batch = CodecBatch(
        images=images,
        features=none,
        mask=torch.ones(size, 1, dtype=torch.bool),
        grid=none.long(),
        noise=noise,
        t=torch.tensor(t),
        latent_noise=none,
        latent_noise_level=torch.zeros(size),
        keys=[""] * size,
        data=data if target.scale > 1 else None,
    )
    return (velocity, clean), batch


def part(batch: CodecBatch, chosen: slice) -> CodecBatch:
    values = {
        name: getattr(batch, name)[chosen] for name in ("images", "features", "mask", "grid", "noise", "t", "keys")
    }
    return replace(batch, **values, data=None if batch.data is None else batch.data[chosen])


@pytest.mark.parametrize(("target", "px"), [(PixelTarget(DecoderConfig()), 48), (Enlarging(), 40)])
def test_gradients_do_not_depend_on_how_the_step_is_cut(target: Target, px: int) -> None:
    """Micro-batches with unequally many low-noise samples against one batch; crops are where they were."""
    config = CodecConfig(perceptual_min_t=0.5, perceptual_weight=0.7, perceptual_px=px)
    perceptual = PerceptualLoss(Lpips("alex"), target, px)
    outputs, batch = step([0.6, 0.1, 0.5, 0.9, 0.7], target, 64)
    whole = [output.clone().requires_grad_() for output in outputs]
    counts = codec_counts(batch, config)
    assert counts == {"flow": 5, "perceptual": 4}
    loss = total(codec_terms((whole[0], whole[1]), batch, config, perceptual), counts)
    loss.backward()
    pieces, summed = [output.clone().requires_grad_() for output in outputs], torch.zeros(())
    for chosen in (slice(0, 2), slice(2, 5)):
        terms = codec_terms((pieces[0][chosen], pieces[1][chosen]), part(batch, chosen), config, perceptual)
        piece = total(terms, counts)
        piece.backward()
        summed = summed + piece.detach()
    torch.testing.assert_close(summed, loss.detach())
    for one, other in zip(whole, pieces, strict=True):
        assert one.grad is not None
        assert one.grad.any()
        torch.testing.assert_close(other.grad, one.grad)


def test_a_crop_of_the_target_space_shows_the_same_part_of_the_picture() -> None:
    target, draw = Enlarging(), torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 32, 48, generator=draw)
    noise = torch.randn(6, 3, 8, 12, generator=draw)
    noise[0], noise[1] = -9.0, 9.0  # the first and the last place
    z, window = crop(target.encode(images), images, noise, 5, SCALE)
    assert z.shape == (6, 3, 5, 5)
    assert window.shape == (6, 3, 20, 20)
    torch.testing.assert_close(target.encode(window), z)
    torch.testing.assert_close(window[0], images[0, :, :20, :20])
    torch.testing.assert_close(window[1], images[1, :, -20:, -20:])
    assert any(not torch.equal(window[i], images[i, :, :20, :20]) for i in range(2, 6))
    whole, same = crop(target.encode(images), images, noise, 64, SCALE)
    assert same is images
    assert whole.shape == (6, 3, 8, 12)


def test_pictures_are_shown_at_the_configured_side() -> None:
    images = torch.rand(2, 3, 64, 32)
    assert at_side(images, 0) is images
    torch.testing.assert_close(at_side(images, 16), F.interpolate(images, (16, 8), mode="bilinear", antialias=True))
    assert at_side(images, 128).shape == (2, 3, 128, 64)
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, images: Tensor, references: Tensor) -> Tensor:
            seen.extend([images, references])
            return (images - references).square().mean((1, 2, 3))

    PerceptualLoss(Watching(), PixelTarget(DecoderConfig()), 16)(images, images, images)
    assert [tuple(x.shape) for x in seen] == [(2, 3, 16, 8)] * 2


def test_weight_is_zero_then_rises_then_stays() -> None:
    config = CodecConfig(perceptual_weight=0.5, perceptual_start=10, perceptual_ramp=3)
    weights = [scheduled(config, step).perceptual_weight for step in (0, 9, 10, 11, 12, 13, 500)]
    assert weights == [0, 0, 0.125, 0.25, 0.375, 0.5, 0.5]
    plain = CodecConfig()
    assert scheduled(plain, 0) is plain


def test_without_weight_the_network_does_not_run() -> None:
    target = PixelTarget(DecoderConfig())
    outputs, batch = step([0.9], target)
    config = CodecConfig(perceptual_weight=0.0)
    perceptual = PerceptualLoss(nn.Identity(), target)  # fails when it is called with two pictures
    terms = codec_terms(outputs, batch, config, perceptual)
    assert terms.keys() == codec_counts(batch, config).keys() == {"flow"}


def hooked(blocks: dict[str, nn.Module], run: Any) -> list[Tensor]:
    """What the blocks return while `run` runs."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: found.append(output.clone())) for block in blocks.values()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", ["efficientnet-lite2", "resnet50"])
def test_feature_distance_is_one_minus_cosine_of_the_network_s_own_activations(kind: str) -> None:
    torch.manual_seed(0)
    images, references = (torch.rand(2, 2, 3, 64, 64) * 2 - 1).unbind(0)
    if kind == "resnet50":
        network = ResNet50()
        distance = FeatureDistance(network, _resnet_stages)
        blocks = {name: block for name, block in network.blocks.items() if name in ("2c", "3d", "4f", "5c")}
        features = [hooked(blocks, lambda x=x: network(x)) for x in (images, references)]
    else:
        lite = EfficientNetLite2()
        distance = FeatureDistance(lite, _efficientnet_stages)
        blocks = {str(number): lite.blocks[number] for number, _ in sorted(PYRAMID)}
        features = [hooked(blocks, lambda x=x: lite.pyramid((x * 127.5 + 0.5) / 128)) for x in (images, references)]
    expected = torch.zeros(2)
    for a, b in zip(*features, strict=True):
        cosine = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
        expected += (1 - cosine).mean((1, 2)) / 4
    images.requires_grad_()
    found = distance(images, references)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.any()
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    torch.testing.assert_close(distance(references, references), torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["efficientnet-lite2", "resnet50"])
def test_a_missing_or_foreign_network_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"does not hold {name} weights"):
        load_network(name, str(tmp_path))
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=rf"does not hold {name} weights"):
        load_network(name, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match=rf"does not hold {name} weights"):
        load_network(name, str(tmp_path))


def test_too_few_pixels_are_refused_and_a_judge_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decoder = DecoderConfig(image_px=16)
    with pytest.raises(ConfigError, match="at 16 px"):
        load_perceptual(CodecConfig(decoder=decoder), PixelTarget(decoder))
    save_file(Lpips("vgg").state_dict(), tmp_path / "vgg.safetensors")
    save_file(Lpips("alex").state_dict(), tmp_path / "alex.safetensors")
    for kind, warned in (("alex", False), ("vgg", True)):
        caplog.clear()
        config = CodecConfig(
            decoder=decoder, perceptual=f"lpips-{kind}", perceptual_path=str(tmp_path), perceptual_px=64
        )
        with caplog.at_level(logging.WARNING):
            assert load_perceptual(config, PixelTarget(decoder)) is not None
        assert ("evaluation measures with the same network" in caplog.text) == warned
    assert load_perceptual(CodecConfig(perceptual="none", decoder=decoder), PixelTarget(decoder)) is None


def test_the_encoder_is_no_perceptual_network() -> None:
    with pytest.raises(ConfigError, match=r"codec\.perceptual = efficientnet-lite2 with encoder\.kind"):
        load_recipe("recipes/quickstart.yaml", ["codec.perceptual=efficientnet-lite2"])


def test_encoder_and_perceptual_network_are_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of a codec stage holds the codec alone; building it does not even load the encoder."""
    save_file(Lpips("alex").state_dict(), tmp_path / "alex.safetensors")
    perceptual = {"perceptual": "lpips-alex", "perceptual_path": str(tmp_path), "perceptual_px": 64}
    config = tiny_config(tmp_path, codec={**perceptual, "perceptual_start": 2})
    write_tiny_assets(tmp_path)
    write_tiny_sets(config, 8)
    monkeypatch.setattr("unicom_dist.models.encoders.build_encoder", lambda *_: pytest.fail("encoder built"))
    task = CodecTask(config, config.stage("codec"))
    module = task.build(Mesh(0, 1, torch.device("cpu")))
    assert isinstance(module, Codec)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"compressor", "decompressor", "decoder"}
    assert not any(isinstance(child, (Lpips, FeatureDistance, PerceptualLoss)) for child in module.modules())
    batch = next(batch for _, batch in task.heldout())
    assert task.counts(batch).keys() == {"flow"}
    assert task.figures(Mesh(0, 1, torch.device("cpu")), 0) == {"perceptual_weight": 0.0}
    task.begin_step(2)
    assert task.counts(batch).keys() == {"flow", "perceptual"}
