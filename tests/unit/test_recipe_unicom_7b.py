"""The full-size codec recipe: its sizes, and that two published folders are all it needs. One process, seconds."""

from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image

from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import Config
from unicom_dist.models.codec import Codec, CodecBatch
from unicom_dist.models.decoder_weights import check_architecture, decoder_source
from unicom_dist.models.encoders import build_encoder
from unicom_dist.models.init import fill
from unicom_dist.models.target import build_target, patch_count
from unicom_dist.parallel.tensor import materialise
from unicom_dist.testing.tiny_flux import POOLED, TEXT, VAE_CHANNELS, tiny_flux, write_tiny_flux
from unicom_dist.testing.tiny_siglip2 import write_tiny_siglip2

RECIPE = "unicom_7b/codec"
SIGLIP = 1152


def test_it_is_the_published_model_and_recipe() -> None:
    config = load_recipe(RECIPE).config
    with torch.device("meta"):
        codec = Codec(config.codec, SIGLIP)
    flux = sum(parameter.numel() for parameter in codec.decoder.flux.parameters())
    assert flux == pytest.approx(11.9e9, rel=0.002)
    assert codec.decoder.flux.x_embedder.in_features == 64
    assert all(parameter.requires_grad for parameter in codec.parameters())
    assert sum(p.numel() for p in codec.compressor.parameters()) == pytest.approx(4.1e6, rel=0.05)
    assert patch_count(config.codec.decoder, 1024, 1024) == 4096
    stage = config.stage("codec")
    assert (stage.batch, stage.steps) == (256, 50_000)
    assert config.codec.compressor.channels == 64


def test_its_keys_are_those_of_the_published_configuration(tmp_path: Path) -> None:
    """As FLUX.1-dev's transformer/config.json has them; what it leaves out are diffusers' defaults."""
    (tmp_path / "config.json").write_text(
        '{"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "attention_head_dim": 128,'
        ' "guidance_embeds": true, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,'
        ' "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768}'
    )
    check_architecture(load_recipe(RECIPE).config.codec.decoder, tmp_path)


def small(folder: Path) -> Config:
    """The recipe with paths, and every size as the tiny folders say it."""
    return load_recipe(
        RECIPE,
        [
            f"encoder.path={folder}/siglip",
            "encoder.max_patches=16",
            "encoder.dtype=float32",
            f"codec.decoder.init_from={folder}/flux",
            f"codec.decoder.vae_path={folder}/flux",
            f"codec.decoder.vae_channels={VAE_CHANNELS}",
            "codec.decoder.vae_scale=2",
            "codec.decoder.image_px=32",
            "codec.decoder.double_blocks=2",
            "codec.decoder.single_blocks=2",
            "codec.decoder.heads=2",
            "codec.decoder.head_dim=16",
            "codec.decoder.rope_axes=[4, 6, 6]",
            f"codec.decoder.text_channels={TEXT}",
            f"codec.decoder.pooled_channels={POOLED}",
            "codec.compressor.channels=8",
            "codec.compressor.heads=4",
        ],
    ).config


def test_folders_in_the_published_format_are_all_it_needs(tmp_path: Path) -> None:
    write_tiny_flux(tmp_path / "flux", seed=4)
    write_tiny_siglip2(tmp_path / "siglip", patch_px=16)
    config = small(tmp_path)
    encoder, target = build_encoder(config.encoder), build_target(config.codec.decoder)
    codec = Codec(config.codec, encoder.channels, config.seed, outline=True)
    source = decoder_source(codec.decoder, config.seed)
    materialise(codec.decoder)
    fill(codec.decoder, source, "decoder.")
    assert torch.equal(codec.decoder.flux.proj_out.weight, tiny_flux(4).proj_out.weight)
    (encoded,) = encoder.encode([encoder.preprocess(Image.new("RGB", (48, 48), "red"))])
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    n = len(encoded.features)
    batch = CodecBatch(
        images=images,
        features=torch.from_numpy(encoded.features)[None],
        mask=torch.ones(1, n, dtype=torch.bool),
        grid=torch.tensor(list(product(*map(range, encoded.grid))))[None],
        noise=torch.randn(1, *target.shape(32, 32)),
        t=torch.tensor([0.5]),
        latent_noise=torch.zeros(1, n, 8),
        latent_noise_level=torch.zeros(1),
        keys=["a"],
        data=target.encode(images),
    )
    velocity, clean = codec(batch)
    (velocity - (batch.target - batch.noise)).square().mean().backward()
    still = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in still if not name.endswith("text_embedder.linear_1.weight")] == []
    assert target.decode(clean).shape == images.shape
