"""How latents become pictures: target space, steps, shift, guidance by a black picture. One process, seconds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.schema import Config
from unicom_dist.models.flow import flux_shift
from unicom_dist.models.target import build_target
from unicom_dist.sample.pictures import Latents, PictureCodec, to_pictures
from unicom_dist.sample.solver import integrate, noise_from_seeds, time_grid
from unicom_dist.testing.tiny import COLOURS, draw_shape, tiny_config
from unicom_dist.testing.tiny_flux import VAE_CHANNELS, tiny_vae
from unicom_dist.testing.tiny_run import tiny_codec

VAE = {"space": "vae", "vae_channels": VAE_CHANNELS, "vae_scale": 2, "image_px": 16, "patch_px": 2}


def recipe(folder: Path, decoder: dict | None = None, **codec) -> Config:
    return tiny_config(folder, codec={**codec, "decoder": decoder or {}})


def codec_of(config: Config, **content) -> PictureCodec:
    return PictureCodec(tiny_codec(config), config.encoder, content, batch=2)


def latents(count: int = 3) -> list[Latents]:
    draw = torch.Generator().manual_seed(0)
    return [Latents(torch.randn(16, 4, generator=draw), (4, 4)) for _ in range(count)]


def by_hand(pictures: PictureCodec, one: Latents, seed: int, times: list[float], guidance: float = 1.0) -> Image.Image:
    """A picture by the codec's own modules."""
    model, grid = pictures.codec, torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        def of(values: torch.Tensor) -> torch.Tensor:
            return model.decode_velocity(z, torch.full((1,), t), values[None], grid)

        v = of(one.values)
        return v if guidance == 1 else (1 - guidance) * of(pictures.blank.values) + guidance * v

    noise = noise_from_seeds([seed], pictures.target.shape(16, 16), "decoder")
    with torch.no_grad():
        return to_pictures(pictures.target.decode(integrate(velocity, noise, times)))[0]


def distance(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_pictures_come_through_the_vae_in_their_order(tmp_path: Path) -> None:
    tiny_vae(1).save_pretrained(tmp_path / "vae")
    pictures = codec_of(recipe(tmp_path, {**VAE, "vae_path": str(tmp_path)}))
    assert pictures.target.shape(16, 16) == (VAE_CHANNELS, 8, 8)
    drawn = pictures.decode(latents(), [1, 2, 3], steps=3)
    for one, seed, picture in zip(latents(), [1, 2, 3], drawn, strict=True):
        assert picture.size == (16, 16)
        assert distance(picture, by_hand(pictures, one, seed, time_grid(3))) <= 1
    assert distance(drawn[0], drawn[1]) > 3


def test_the_vae_of_the_training_is_asked_for(tmp_path: Path) -> None:
    tiny_vae(1).save_pretrained(tmp_path / "one")
    tiny_vae(2).save_pretrained(tmp_path / "two")
    configs = [recipe(tmp_path, {**VAE, "vae_path": str(tmp_path / name)}) for name in ("one", "two")]
    print_of = build_target(configs[0].codec.decoder).fingerprint
    assert codec_of(configs[0], vae_fingerprint=print_of).target.fingerprint == print_of
    with pytest.raises(CheckpointError, match="not the one the codec was trained with"):
        codec_of(configs[1], vae_fingerprint=print_of).decode(latents(1))


def test_one_step_is_the_one_step_estimate(tmp_path: Path) -> None:
    pictures, (one,) = codec_of(recipe(tmp_path)), latents(1)
    noise = noise_from_seeds([7], (3, 16, 16), "decoder")
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    with torch.no_grad():
        estimate = noise + pictures.codec.decode_velocity(noise, torch.zeros(1), one.values[None], grid)
    for solver in ("euler", "heun"):
        assert distance(pictures.decode([one], 7, 1, solver)[0], to_pictures(estimate)[0]) <= 1


def test_the_shift_of_the_resolution_is_used_in_drawing(tmp_path: Path) -> None:
    pictures, (one,) = codec_of(recipe(tmp_path, resolution_shift=True, timestep_shift=9.0)), latents(1)
    drawn = pictures.decode([one], 7, steps=3)[0]
    assert distance(drawn, by_hand(pictures, one, 7, time_grid(3, flux_shift(16)))) <= 1
    assert distance(drawn, by_hand(pictures, one, 7, time_grid(3, 9.0))) > 1


def test_guidance_moves_away_from_a_black_picture(tmp_path: Path) -> None:
    pictures = codec_of(recipe(tmp_path))
    (blank,) = pictures.encode([Image.new("RGB", (32, 32))])
    assert torch.equal(pictures.blank.values, blank.values)
    (one,) = pictures.encode([draw_shape("circle", COLOURS["red"])])
    assert distance(pictures.decode([one], 7, 3)[0], by_hand(pictures, one, 7, time_grid(3))) <= 1
    for guidance in (0.0, 2.5):
        drawn = pictures.decode([one], 7, 3, guidance=guidance)[0]
        assert distance(drawn, by_hand(pictures, one, 7, time_grid(3), guidance)) <= 1
    assert distance(pictures.decode([one], 7, 3, guidance=0.0)[0], pictures.decode([blank], 7, 3)[0]) <= 1


def test_guidance_takes_blank_latents_of_another_grid(tmp_path: Path) -> None:
    pictures, wide = codec_of(recipe(tmp_path)), Latents(torch.randn(6, 4), (2, 3))
    guided = pictures.decode([wide, *latents(1)], [1, 2], 2, guidance=3.0)
    assert distance(guided[0], pictures.decode([wide], [1], 2, guidance=3.0)[0]) <= 1
    assert distance(guided[0], pictures.decode([wide], [1], 2)[0]) > 1
