"""What frozen networks add to a codec's batch: latents of the VAE, features of a black picture. One process."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from unicom_dist.models.codec import CodecBatch
from unicom_dist.models.encoders import EncodedImage, build_encoder
from unicom_dist.models.encoders.blank import blank_features
from unicom_dist.models.target import build_target
from unicom_dist.testing.tiny import tiny_config
from unicom_dist.testing.tiny_flux import VAE_CHANNELS, tiny_vae
from unicom_dist.testing.tiny_run import tiny_codec
from unicom_dist.train.codec_inputs import CodecInputs, with_blank

CHANNELS = 24


def batch(tokens: int = 5) -> CodecBatch:
    draw = torch.Generator().manual_seed(2)
    return CodecBatch(
        images=torch.rand(3, 3, 16, 16, generator=draw) * 2 - 1,
        features=torch.randn(3, tokens, CHANNELS, generator=draw, dtype=torch.float64).half(),
        mask=torch.ones(3, tokens, dtype=torch.bool),
        grid=torch.arange(2 * tokens).view(1, tokens, 2).expand(3, -1, -1),
        noise=torch.randn(3, 3, 16, 16, generator=draw),
        t=torch.rand(3, generator=draw),
        latent_noise=torch.randn(3, tokens, 4, generator=draw),
        latent_noise_level=torch.full((3,), 0.5),
        keys=["a", "b", "c"],
    )


def blank(rows: int, columns: int) -> EncodedImage:
    features = np.random.default_rng(0).standard_normal((rows * columns, CHANNELS)).astype(np.float32)
    return EncodedImage(features, (rows, columns))


def test_chosen_samples_have_the_features_of_a_black_picture_and_no_others() -> None:
    given, chosen = batch(), torch.tensor([False, True, False])
    for rows, columns in ((1, 2), (2, 4)):  # fewer tokens than the batch, and more
        put, n = blank(rows, columns), rows * columns
        out = with_blank(given, chosen, put, n)
        longest = max(5, n)
        assert out.features.shape == (3, longest, CHANNELS)
        assert out.features.dtype == torch.float16
        assert torch.equal(out.features[1, :n], torch.from_numpy(put.features).half())
        assert out.mask[1].tolist() == [place < n for place in range(longest)]
        assert out.grid[1, :n].tolist() == [[r, c] for r in range(rows) for c in range(columns)]
        assert not out.grid[1, n:].any()
        assert out.latent_noise.shape == (3, longest, 4)
        assert not out.latent_noise[1, n:].any()
        for row in (0, 2):
            for name in ("features", "mask", "grid", "latent_noise"):
                assert torch.equal(getattr(out, name)[row, :5], getattr(given, name)[row]), name
                assert not getattr(out, name)[row, 5:].any()


@torch.no_grad()
def test_a_blank_sample_trains_as_if_its_picture_were_black(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    inputs, codec = CodecInputs(config, build_target(config.codec.decoder)), tiny_codec(config)
    given = replace(batch(), latent_noise_level=torch.zeros(3), blank=torch.tensor([True, False, True]))
    velocity, _ = codec(inputs(given))
    encoder = build_encoder(config.encoder)
    black = blank_features(encoder, config.encoder)
    alone = replace(
        given,
        features=torch.from_numpy(black.features).expand(3, -1, -1).half(),
        mask=torch.ones(3, len(black.features), dtype=torch.bool),
        grid=torch.cartesian_prod(*map(torch.arange, black.grid)).expand(3, -1, -1),
        latent_noise=torch.zeros(3, len(black.features), 4),
    )
    of_black, _ = codec(alone)
    untouched, _ = codec(replace(given, blank=None))
    torch.testing.assert_close(velocity[::2], of_black[::2])
    torch.testing.assert_close(velocity[1], untouched[1])
    assert not torch.allclose(velocity[0], untouched[0])
    assert inputs(replace(given, blank=torch.zeros(3, dtype=torch.bool))).features is given.features


def test_images_become_latents_where_the_decoder_draws_them(tmp_path: Path) -> None:
    tiny_vae(1).save_pretrained(tmp_path / "vae")
    keys = {"space": "vae", "vae_path": str(tmp_path), "vae_channels": VAE_CHANNELS, "vae_scale": 2, "patch_px": 2}
    config = tiny_config(tmp_path, codec={"decoder": keys})
    target = build_target(config.codec.decoder)
    out = CodecInputs(config, target)(replace(batch(), noise=torch.randn(3, VAE_CHANNELS, 8, 8)))
    assert torch.equal(out.target, target.encode(out.images))
    velocity, clean = tiny_codec(config)(out)
    assert velocity.shape == clean.shape == (3, VAE_CHANNELS, 8, 8)
    pixels = tiny_config(tmp_path)
    kept = CodecInputs(pixels, build_target(pixels.codec.decoder))(batch())
    assert kept.data is None
    assert kept.target is kept.images
