"""Target spaces: pixels, and a VAE in diffusers' format. One process, seconds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import DecoderConfig
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.models.target import build_target, check_vae, patch_count, target_shape, vae_fingerprint
from unicom_dist.testing.tiny_flux import VAE_CHANNELS, tiny_vae


def config(folder: Path | str, **changes) -> DecoderConfig:
    keys = {"space": "vae", "vae_path": str(folder), "vae_channels": VAE_CHANNELS, "vae_scale": 2}
    return DecoderConfig(**{**keys, "image_px": 16, "patch_px": 2, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_vae(1).save_pretrained(folder / "vae")
    return folder


def test_pixels_are_themselves() -> None:
    target = build_target(DecoderConfig(image_px=16, patch_px=4))
    images = torch.rand(2, 3, 16, 24)
    assert torch.equal(target.encode(images), images)
    assert torch.equal(target.decode(images), images)
    assert target.shape(16, 24) == (3, 16, 24)
    assert (target.channels, target.scale, target.fingerprint) == (3, 1, "")


def test_latents_are_the_normalised_mode_of_the_posterior(saved: Path) -> None:
    target, vae = build_target(config(saved)), tiny_vae(1)
    images = torch.rand(3, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        expected = (vae.encode(images).latent_dist.mean - 0.25) * 0.5
        decoded = vae.decode(expected / 0.5 + 0.25).sample
    z = target.encode(images.requires_grad_())
    assert not z.requires_grad
    torch.testing.assert_close(z, expected)
    assert z.shape == (3, *target.shape(16, 24)) == (3, VAE_CHANNELS, 8, 12)
    torch.testing.assert_close(target.decode(z), decoded)


def test_big_pictures_are_encoded_few_at_a_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(5, 3, 16, 16)
    together = build_target(config(saved)).encode(images)
    monkeypatch.setattr("unicom_dist.models.target.ENCODED_TOGETHER", 2 * 16 * 16)
    torch.testing.assert_close(build_target(config(saved)).encode(images), together)


def test_a_gradient_passes_the_frozen_decoder(saved: Path) -> None:
    target = build_target(config(saved, vae_tile_px=8))  # tiles are for drawing
    z = torch.randn(1, VAE_CHANNELS, 8, 8, requires_grad=True)
    target.decode(z).square().sum().backward()
    assert z.grad is not None
    assert bool(z.grad.any())
    assert not any(parameter.requires_grad for parameter in target._vae.parameters())


@torch.no_grad()
def test_tiles_have_the_whole_picture_and_differ_only_as_tiles_do(saved: Path) -> None:
    z = torch.randn(1, VAE_CHANNELS, 16, 24)
    whole = build_target(config(saved)).decode(z)
    assert torch.equal(build_target(config(saved, vae_tile_px=64)).decode(z), whole)  # no larger than a tile
    tiled = build_target(config(saved, vae_tile_px=16)).decode(z)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    torch.testing.assert_close(tiled[..., :8, :8], whole[..., :8, :8], rtol=0, atol=2.0)


def test_the_tiny_autoencoder_of_diffusers_fits_too(tmp_path: Path) -> None:
    channels = (8, 8)
    vae = diffusers_class("AutoencoderTiny")(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=VAE_CHANNELS,
    )
    vae.save_pretrained(tmp_path)
    target = build_target(config(tmp_path))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(target.encode(images), vae.encode(images).latents)


def test_another_vae_is_refused(saved: Path, tmp_path: Path) -> None:
    expected = vae_fingerprint(config(saved))
    assert build_target(config(saved)).fingerprint == expected
    check_vae(config(saved / "vae"), expected)  # the folder itself may be named
    tiny_vae(2).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is not the one the codec was trained with"):
        check_vae(config(tmp_path / "other"), expected)
    tiny_vae(1).save_pretrained(tmp_path / "scaled")
    content = json.loads((tmp_path / "scaled" / "config.json").read_text())
    (tmp_path / "scaled" / "config.json").write_text(json.dumps({**content, "scaling_factor": 0.7}))
    assert vae_fingerprint(config(tmp_path / "scaled")) != expected


def test_folders_that_hold_no_vae_are_refused_with_the_reason(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no readable config") as error:
        build_target(config(tmp_path / "nowhere"))
    assert "codec.decoder.vae_path" in error.value.what
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="UNet2DModel"):
        build_target(config(tmp_path))
    (tmp_path / "config.json").write_text((saved / "vae" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="safetensors there"):
        build_target(config(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no VAE in"):
        build_target(config(tmp_path))
    with pytest.raises(ConfigError, match=f"vae_channels={VAE_CHANNELS} codec.decoder.vae_scale=2"):
        build_target(config(saved, vae_channels=16, vae_scale=8))


def test_a_vae_without_one_of_its_tensors_or_with_another_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved / "vae" / "config.json").read_text())
    tensors = load_file(saved / "vae" / "diffusion_pytorch_model.safetensors")
    lost = {name: tensor for name, tensor in tensors.items() if name != "decoder.conv_norm_out.weight"}
    others = {
        r"1 tensors are missing, decoder\.conv_norm_out\.weight": lost,
        r"1 tensors are unexpected, decoder\.more": {**tensors, "decoder.more": torch.zeros(3)},
        r"size mismatch for decoder\.conv_in\.bias": {**tensors, "decoder.conv_in.bias": torch.zeros(3)},
    }
    for why, content in others.items():
        save_file(content, tmp_path / "diffusion_pytorch_model.safetensors")
        with pytest.raises(CheckpointError, match=why):
            build_target(config(tmp_path))


def test_shapes_follow_from_the_configuration_alone() -> None:
    vae = config("nowhere", vae_channels=16, vae_scale=8, image_px=64)
    assert target_shape(vae, 64, 128) == (16, 8, 16)
    assert patch_count(vae, 1024, 1024) == 4096
    assert patch_count(DecoderConfig(image_px=16, patch_px=4), 16, 24) == 24
    with pytest.raises(ConfigError, match="multiples of 16"):
        target_shape(vae, 64, 72)
    with pytest.raises(ValueError, match="vae_path names no folder"):
        DecoderConfig(space="vae")
    with pytest.raises(ValueError, match="vae_scale x patch_px = 16"):
        config("nowhere", vae_scale=8, image_px=72)
