"""The codec as a whole, its noise on latents, and the statistics of latents. One process, seconds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import CodecConfig, CompressorConfig, DecoderConfig
from unicom_dist.models.codec import Codec, CodecBatch, LatentStats, spread_of
from unicom_dist.models.flow import interpolate
from unicom_dist.train.stages import read_stats

CONFIG = CodecConfig(
    compressor=CompressorConfig(channels=6, heads=2, attention_width=16, expanded=20),
    decoder=DecoderConfig(
        image_px=16, patch_px=4, double_blocks=1, single_blocks=1, heads=2, head_dim=16, rope_axes=(4, 6, 6)
    ),
)
CHANNELS = 24


def batch(size: int = 4, tokens: int = 4) -> CodecBatch:
    draw = torch.Generator().manual_seed(size)
    return CodecBatch(
        images=torch.rand(size, 3, 16, 16, generator=draw) * 2 - 1,
        features=torch.randn(size, tokens, CHANNELS, generator=draw),
        mask=torch.ones(size, tokens, dtype=torch.bool),
        grid=torch.cartesian_prod(torch.arange(2), torch.arange(2)).expand(size, -1, -1),
        noise=torch.randn(size, 3, 16, 16, generator=draw),
        t=torch.rand(size, generator=draw),
        latent_noise=torch.randn(size, tokens, 6, generator=draw),
        latent_noise_level=torch.zeros(size),
        keys=[str(number) for number in range(size)],
    )


def codec(config: CodecConfig = CONFIG) -> Codec:
    """A codec whose decoder does not start at zero."""
    built = Codec(config, CHANNELS, seed=5)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return built


@torch.no_grad()
def test_forward_is_encode_then_decode() -> None:
    network, inputs = codec(), batch()
    velocity, clean = network(inputs)
    t = inputs.t[:, None, None, None]
    z_t = t * inputs.images + (1 - t) * inputs.noise
    latents = network.encode(inputs.features, inputs.mask)
    assert latents.shape == (4, 4, 6)
    torch.testing.assert_close(network.decode_velocity(z_t, inputs.t, latents, inputs.grid, inputs.mask), velocity)
    torch.testing.assert_close(clean, z_t + (1 - t) * velocity)


@torch.no_grad()
def test_latent_noise_scales_with_the_latents_of_each_image() -> None:
    network, inputs = codec(), batch()
    velocity, _ = network(inputs)
    noisy = replace(inputs, latent_noise_level=torch.tensor([0.0, 0.5, 0.0, 1.0]))
    disturbed, _ = network(noisy)
    moved = (velocity - disturbed).flatten(1).norm(dim=1)
    assert moved[0] == moved[2] == 0
    assert 0 < moved[1] < moved[3]
    latents = network.encode(inputs.features, inputs.mask)
    torch.testing.assert_close(spread_of(latents, inputs.mask), latents.flatten(1).std(1, correction=0))
    half = inputs.mask.clone()
    half[:, 2:] = False
    torch.testing.assert_close(spread_of(latents, half), latents[:, :2].flatten(1).std(1, correction=0))


def variant(**keys: object) -> CodecConfig:
    return CONFIG.model_copy(update={"compressor": CONFIG.compressor.model_copy(update=keys)})


@torch.no_grad()
@pytest.mark.parametrize("spatial", ["pool", "resampler"])
def test_the_decoder_reads_the_latents_of_a_spatial_compressor_at_their_own_places(spatial: str) -> None:
    """Images of 3 x 3 and 2 x 2 tokens have 2 x 2 and 1 x 1 latents; padding of neither is read."""
    network, inputs = codec(variant(spatial=spatial)), batch(2, 9)
    grid = torch.nn.utils.rnn.pad_sequence([places(3, 3), places(2, 2)], batch_first=True)
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, 0.7])
    inputs = replace(inputs, grid=grid, mask=mask, latent_noise=noise, latent_noise_level=level)
    velocity, _ = network(inputs)
    for row, (n, m) in enumerate(((9, 4), (4, 1))):
        alone = replace(
            inputs,
            **{name: getattr(inputs, name)[row, None] for name in ("images", "noise", "t", "latent_noise_level")},
            **{name: getattr(inputs, name)[row, None, :n] for name in ("features", "mask", "grid")},
            latent_noise=noise[row, None, :m],
        )
        torch.testing.assert_close(network(alone)[0][0], velocity[row])
        latents = network.encode(alone.features, alone.mask, alone.grid)
        assert latents.shape == (1, m, 6)
    z_t = inputs.t[0] * inputs.images[:1] + (1 - inputs.t[0]) * inputs.noise[:1]
    latents, own = network.encode(inputs.features[:1], None, grid[:1]), places(2, 2)[None]
    torch.testing.assert_close(network.decode_velocity(z_t, inputs.t[:1], latents, own), velocity[:1])


def places(rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


@torch.no_grad()
def test_a_posterior_is_sampled_by_the_batch_and_its_divergence_comes_third() -> None:
    network, inputs = codec(variant(bottleneck="kl")), batch()
    velocity, _, divergence = network(inputs)
    mean, log_variance = network.compressor.posterior(inputs.features, inputs.mask)
    each = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1)
    torch.testing.assert_close(divergence, each.mean((1, 2)))
    z_t = interpolate(inputs.images, inputs.noise, inputs.t)
    sample = mean + (log_variance / 2).exp() * inputs.latent_noise
    decoded = [network.decode_velocity(z_t, inputs.t, latents, inputs.grid, inputs.mask) for latents in (sample, mean)]
    torch.testing.assert_close(velocity, decoded[0])
    still, *_ = network(replace(inputs, latent_noise=torch.zeros_like(inputs.latent_noise)))
    torch.testing.assert_close(still, decoded[1])
    assert torch.equal(network.encode(inputs.features, inputs.mask), mean)


@pytest.mark.parametrize("keys", [{}, {"spatial": "resampler"}, {"bottleneck": "kl"}, {"bottleneck": "tanh"}])
def test_every_weight_gets_a_gradient(keys: dict[str, str]) -> None:
    network = codec(variant(**keys))
    inputs = batch()
    velocity, *_ = network(replace(inputs, latent_noise=inputs.latent_noise[:, :1]) if "spatial" in keys else inputs)
    velocity.square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # The pooled vector is constant zero; a last block's tokens are read by nobody.
    expected_still = ("text_embedder.linear_1.weight",)
    assert [name for name in still if not name.endswith(expected_still)] == []


def test_bfloat16_weights_take_float32_batches() -> None:
    network = codec()
    exact, _ = network(batch())
    rough, clean = network.bfloat16()(batch())
    assert rough.dtype == clean.dtype == torch.float32
    assert (rough - exact).norm() / exact.norm() < 0.05


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = Codec(CONFIG, CHANNELS, seed=5).state_dict()
    torch.manual_seed(2)
    again, other = Codec(CONFIG, CHANNELS, seed=5).state_dict(), Codec(CONFIG, CHANNELS, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["compressor.block.straight.weight"], other["compressor.block.straight.weight"])


def test_a_codec_learns_to_draw_what_it_is_told() -> None:
    """Two images told apart by their features alone: at t = 0 the right one is drawn from pure noise."""
    config = CONFIG.model_copy(update={"decoder": CONFIG.decoder.model_copy(update={"prediction": "clean"})})
    network, inputs = Codec(config, CHANNELS, seed=0), batch(2)
    images = torch.stack([torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), -0.5)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        noise = torch.randn(2, 3, 16, 16, generator=draw)
        _, clean = network(replace(inputs, images=images, noise=noise, t=torch.zeros(2)))
        loss = (clean - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05  # ignoring the features leaves 0.25


@pytest.mark.parametrize("pieces", [[100], [1, 99], [30, 0, 33, 37]])
def test_statistics_of_a_stream_equal_those_of_the_whole(pieces: list[int]) -> None:
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 1, 50]) + 1000
    stats = LatentStats.from_tensors(rows.split(pieces))
    torch.testing.assert_close(stats.mean, rows.double().mean(0).float())
    torch.testing.assert_close(stats.std, rows.double().std(0, correction=0).float())


def test_normalised_latents_have_unit_scale_and_return() -> None:
    latents = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 1, 50]) + 7
    stats = LatentStats.from_tensors([latents])
    normal = stats.normalise(latents)
    torch.testing.assert_close(normal.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(stats.denormalise(normal), latents)
    same = LatentStats.from_json(json.loads(json.dumps(stats.to_json())))
    assert torch.equal(same.mean, stats.mean)
    assert torch.equal(same.std, stats.std)


def test_a_dead_channel_does_not_become_infinite() -> None:
    stats = LatentStats.from_tensors([torch.ones(10, 2)])
    assert stats.normalise(torch.ones(1, 2)).isfinite().all()


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no latents"):
        LatentStats.from_tensors([torch.zeros(0, 3)])


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"mean": [0.0]}',
        '{"mean": ["a"], "std": [1.0]}',
        '{"mean": [0.0, 0.0], "std": [1.0]}',
        '{"mean": [0.0], "std": [0.0]}',
        '{"mean": [NaN], "std": [1.0]}',
        '{"mean": 0.0, "std": 1.0}',
    ],
)
def test_damaged_statistics_are_a_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "stats.json").write_text(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_stats(tmp_path)
