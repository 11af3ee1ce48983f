"""Compressor and decompressor: equivariance, padding, packing, fewer tokens, bottlenecks. One process, seconds."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import CompressorConfig
from unicom_dist.models.codec import disturbed, divergence
from unicom_dist.models.compressor import Compressor, Decompressor, Projector
from unicom_dist.models.compressor.blocks import within_rows
from unicom_dist.models.init import initialise

WIDE = 24
KINDS = {
    "averaged heads": CompressorConfig(channels=6, heads=4),
    "explicit width": CompressorConfig(channels=6, heads=2, attention_width=16),
    "no mlp": CompressorConfig(channels=6, heads=2, attention_width=16, mlp_ratio=0, expanded=12),
    "per token": CompressorConfig(kind="mlp", channels=6),
}
KEPT = {"attention": "averaged heads", "mlp": "per token"}
GRIDS = ((2, 3), (1, 7), (3, 3), (4, 1), (1, 1))


def stirred(network: Any) -> Any:
    """Weights drawn, biases and gains too, in float64."""
    initialise(network.double(), seed=3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return network


def both(config: CompressorConfig) -> list[tuple[Projector, int]]:
    """Each direction with its input channels."""
    return [(stirred(Compressor(config, WIDE)), WIDE), (stirred(Decompressor(config, WIDE)), config.channels)]


def tokens(channels: int, n: int = 7, size: int = 3) -> torch.Tensor:
    return torch.randn(size, n, channels, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def places(rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)


def padded_images() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [B, n, D], mask and grid of images of `GRIDS`."""
    n = max(math.prod(grid) for grid in GRIDS)
    x = tokens(WIDE, n, len(GRIDS))
    mask = torch.arange(n) < torch.tensor([math.prod(grid) for grid in GRIDS])[:, None]
    grid = torch.nn.utils.rnn.pad_sequence([places(*grid) for grid in GRIDS], batch_first=True)
    return x, mask, grid


def all_variants() -> list[CompressorConfig]:
    kinds = [{"kind": "attention", "heads": 4}, {"kind": "mlp", "heads": 4}]
    made = [
        CompressorConfig(channels=6, spatial=spatial, bottleneck=bottleneck, **kind)
        for kind, spatial, bottleneck in itertools.product(kinds, ("none", "pool", "resampler"), ("none", "tanh", "kl"))
    ]
    return made + [
        CompressorConfig(kind="identity", channels=WIDE, heads=4, spatial=spatial)
        for spatial in ("none", "pool", "resampler")
    ]


def variant_name(config: CompressorConfig) -> str:
    return f"{config.kind}-{config.spatial}-{config.bottleneck}"


every_variant = pytest.mark.parametrize("config", all_variants(), ids=variant_name)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_shapes_keep_tokens_and_change_channels(config: CompressorConfig) -> None:
    (narrow, _), (widen, _) = both(config)
    latents = narrow(tokens(WIDE))
    assert latents.shape == (3, 7, 6)
    assert widen(latents).shape == (3, 7, config.expanded or WIDE)


@torch.no_grad()
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_permuting_tokens_permutes_the_output(config: CompressorConfig) -> None:
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    for network, channels in both(config):
        x = tokens(channels)
        torch.testing.assert_close(network(x[:, order]), network(x)[:, order])
        assert not torch.allclose(network(x[:, order]), network(x))


@torch.no_grad()
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_padding_is_neither_seen_nor_returned(config: CompressorConfig) -> None:
    mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    for network, channels in both(config):
        x = tokens(channels)
        out = network(x, mask)
        for other in (1e3, math.inf, math.nan):
            torch.testing.assert_close(network(torch.where(mask[..., None], x, other), mask), out)
        torch.testing.assert_close(network(x[1:2, :3]), out[1:2, :3])
        assert not out[~mask].any()


@every_variant
def test_padding_of_no_content_reaches_latents_or_gradients(config: CompressorConfig) -> None:
    network = stirred(Compressor(config, WIDE))
    x, mask, grid = padded_images()
    gradients = []
    for filling in (0.0, math.nan):
        leaf = torch.where(mask[..., None], x, filling).requires_grad_()
        out = network(leaf, mask, torch.where(mask[..., None], grid, 0 if filling == 0 else 99))
        weights = [p for p in network.parameters() if p.requires_grad]
        found = torch.autograd.grad(out.square().sum(), [leaf, *weights], allow_unused=True)
        gradients.append((out.detach(), *(g for g in found if g is not None)))
        assert not found[0][~mask].any()
    for zeros, nans in zip(*gradients, strict=True):
        assert torch.equal(zeros, nans)


@every_variant
def test_packed_equals_padded_forward_and_backward(config: CompressorConfig) -> None:
    """Float32, where the two forms may round differently."""
    network = stirred(Compressor(config, WIDE)).float()
    x, mask, grid = (t.float() if t.is_floating_point() else t for t in padded_images())
    x.requires_grad_()
    latent_grid, latent_mask = network.layout(grid, mask)
    expected = network(x, mask, grid)[latent_mask]
    packed = network.packed(x[mask], grid[mask], mask.sum(1).tolist())
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.detach().abs().max())))
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    parameters = [x, *network.parameters()]
    for one, other in zip(
        torch.autograd.grad((packed * probe).sum(), parameters, allow_unused=True),
        torch.autograd.grad((expected * probe).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max())))
    sizes = [math.prod(config.latent_grid(grid)) for grid in GRIDS]
    assert latent_mask.sum(1).tolist() == sizes
    for found, image in zip(latent_grid, GRIDS, strict=True):
        rows, columns = config.latent_grid(image)
        assert torch.equal(found[: rows * columns], places(rows, columns))
        assert not found[rows * columns :].any()


@torch.no_grad()
@every_variant
def test_images_end_to_end_do_not_know_their_neighbours(config: CompressorConfig) -> None:
    """Another order of the images permutes their latents; an image alone has the same, one of NaN spoils no other."""
    network = stirred(Compressor(config, WIDE))
    images = [tokens(WIDE, math.prod(grid), 1)[0] for grid in GRIDS]

    def compress(order: list[int]) -> dict[int, torch.Tensor]:
        x, grid = torch.cat([images[n] for n in order]), torch.cat([places(*GRIDS[n]) for n in order])
        out = network.packed(x, grid, [len(images[n]) for n in order])
        return dict(zip(order, out.split([math.prod(config.latent_grid(GRIDS[n])) for n in order]), strict=True))

    first, second = compress([0, 1, 2, 3, 4]), compress([3, 0, 4, 2, 1])
    for n in range(len(GRIDS)):
        torch.testing.assert_close(second[n], first[n])
        torch.testing.assert_close(compress([n])[n], first[n])
    images[2] = images[2] * math.nan
    spoiled = compress([0, 1, 2, 3, 4])
    assert spoiled[2].isnan().all()
    assert all(torch.equal(spoiled[n], first[n]) for n in (0, 1, 3, 4))


@torch.no_grad()
@every_variant
def test_spatial_variants_follow_the_places_not_the_order_of_tokens(config: CompressorConfig) -> None:
    network = stirred(Compressor(config, WIDE))
    x, grid = tokens(WIDE, 12, 2), places(3, 4).expand(2, -1, -1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    latents, moved = network(x, None, grid), network(x[:, order], None, grid[:, order])
    torch.testing.assert_close(moved, latents[:, order] if config.spatial == "none" else latents)
    if config.spatial != "none":
        assert latents.shape[1] == 2 * 2
        assert not torch.allclose(network(x[:, order], None, grid), latents)


@torch.no_grad()
def test_pooling_is_the_mean_of_the_tokens_that_are_there() -> None:
    network = Compressor(CompressorConfig(kind="identity", channels=WIDE, spatial="pool"), WIDE).double()
    x = tokens(WIDE, 15, 1)
    image = x[0].view(5, 3, WIDE)
    expected = [
        image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(0, 1).mean(0)
        for row in range(3)
        for column in range(2)
    ]
    torch.testing.assert_close(network(x, None, places(5, 3)[None])[0], torch.stack(expected))


@torch.no_grad()
def test_resampler_written_out() -> None:
    """Softmax over the tokens of the cell, per head; keys know their place; the mean of the cell is added."""
    config = CompressorConfig(kind="identity", channels=WIDE, spatial="resampler", heads=3)
    network = stirred(Compressor(config, WIDE))
    part = network.resampler
    x = tokens(WIDE, 3 * 2, 1)
    expected = []
    for cell in ((0, 1, 2, 3), (4, 5)):  # of 3 rows and 2 columns; the second has one row
        own = x[0, list(cell)]
        normal = torch.nn.functional.layer_norm(own, (WIDE,), part.norm.weight, part.norm.bias)
        query = part.query(normal.mean(0))
        key, value = part.key_value(normal).chunk(2, -1)
        key = key + part.places[: len(cell)]
        heads = []
        for head in range(3):
            mine = slice(8 * head, 8 * head + 8)
            weights = (key[:, mine] @ query[mine] / 8**0.5).softmax(0)
            heads.append(weights @ value[:, mine])
        expected.append(own.mean(0) + part.out(torch.cat(heads)))
    torch.testing.assert_close(network(x, None, places(3, 2)[None])[0], torch.stack(expected))


@torch.no_grad()
@pytest.mark.parametrize("name", ["averaged heads", "explicit width"])
def test_tokens_read_each_other(name: str) -> None:
    for network, channels in both(KINDS[name]):
        x = tokens(channels)
        changed = x.clone()
        changed[:, 0] *= -1  # not a shift: the norm would undo it
        assert (network(x)[:, 1:] != network(changed)[:, 1:]).any(-1).all()


@torch.no_grad()
def test_keys_have_no_bias_and_narrowing_averages_heads() -> None:
    """The published form, written out: width of the input, softmax per head, heads averaged, pooled, then a linear."""
    block = both(KINDS["averaged heads"])[0][0].block.attention
    x = tokens(WIDE)
    query, key, value = (x @ weight.T for weight in block.qkv.weight.chunk(3))
    query, value = query + block.query_bias, value + block.value_bias
    heads = []
    for head in range(4):
        part = slice(6 * head, 6 * head + 6)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / 6**0.5
        heads.append(scores.softmax(-1) @ value[..., part])
    expected = (
        torch.nn.functional.adaptive_avg_pool1d(torch.stack(heads).mean(0), 6) @ block.out.weight.T + block.out.bias
    )
    torch.testing.assert_close(block(x, within_rows(None)), expected)


@torch.no_grad()
def test_tanh_bounds_the_same_latents() -> None:
    plain, bounded = (
        stirred(Compressor(CompressorConfig(channels=6, heads=4, bottleneck=name), WIDE)) for name in ("none", "tanh")
    )
    x = tokens(WIDE)
    torch.testing.assert_close(bounded(x), plain(x).tanh())


@torch.no_grad()
def test_a_posterior_is_read_by_its_mean_and_sampled_by_the_noise_of_the_batch() -> None:
    network = stirred(Compressor(CompressorConfig(channels=6, heads=4, bottleneck="kl"), WIDE)).float()
    x, mask, _ = padded_images()
    mean, log_variance = network.posterior(x.float(), mask)
    assert torch.equal(network(x.float(), mask), mean)

    def disturb(noise: torch.Tensor, level: float) -> torch.Tensor:
        batch: Any = SimpleNamespace(latent_noise=noise, latent_noise_level=torch.full((len(noise),), level))
        return disturbed(mean, log_variance, mask, batch)

    draw = torch.Generator().manual_seed(0)
    sampled = torch.stack([disturb(torch.randn(mean.shape, generator=draw), 0.5) for _ in range(400)])
    spread = mean[0][mask[0]].std(correction=0)  # of the first image
    wanted = (log_variance.exp() + (0.5 * spread) ** 2).sqrt()[0][mask[0]]
    torch.testing.assert_close(sampled.std(0)[0][mask[0]], wanted, rtol=0.2, atol=0)
    assert (sampled.mean(0) - mean)[mask].abs().max() < 0.3 * float(wanted.max())
    assert not sampled[:, ~mask].any()
    assert torch.equal(disturb(torch.zeros_like(mean), 0.0), mean)


def test_divergence_equals_torchs() -> None:
    draw = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 5, 3, generator=draw), torch.randn(2, 5, 3, generator=draw)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).mean(-1)
    expected = torch.stack([each[0].mean(), each[1, :2].mean()])
    torch.testing.assert_close(divergence(mean, log_variance, mask), expected)


@pytest.mark.parametrize("channels", [32, 64, 128, 256, 1152])
def test_every_width_of_the_paper_keeps_the_published_form(channels: int) -> None:
    with torch.device("meta"):
        config = CompressorConfig(channels=channels)
        latents = Compressor(config, 1152)(torch.zeros(1, 5, 1152))
        assert latents.shape == (1, 5, channels)
        assert Decompressor(config, 1152)(latents).shape == (1, 5, 1152)


def test_published_sizes_match_the_published_form() -> None:
    """1152 to 64 with 18 heads: about 4.1M parameters narrowing and 9.6M widening."""
    config = CompressorConfig()
    narrow = sum(parameter.numel() for parameter in Compressor(config, 1152).parameters())
    widen = sum(parameter.numel() for parameter in Decompressor(config, 1152).parameters())
    assert narrow == pytest.approx(4.1e6, rel=0.05)
    assert widen == pytest.approx(9.6e6, rel=0.05)


def test_heads_that_do_not_divide_are_refused_with_the_legal_ones() -> None:
    with pytest.raises(ConfigError, match=r"heads = 5") as raised:
        Compressor(CompressorConfig(channels=6, heads=5), WIDE)
    assert "[1, 2, 3, 4, 6, 8, 12, 24]" in raised.value.remedy


def test_legal_heads_divide_both_directions_and_the_resampler() -> None:
    config = CompressorConfig(channels=6, heads=5, expanded=20)
    for network in (Compressor, Decompressor):
        with pytest.raises(ConfigError, match="20 and 24 channels") as raised:
            network(config, WIDE)
        assert "one of [1, 2, 4]" in raised.value.remedy
    with pytest.raises(ConfigError, match=r"heads = 18"):
        Compressor(CompressorConfig(kind="mlp", channels=6, spatial="resampler"), WIDE)


def test_identity_keeps_tokens_and_refuses_other_channels() -> None:
    config = CompressorConfig(kind="identity", channels=WIDE)
    x = tokens(WIDE)
    assert torch.equal(Compressor(config, WIDE)(x), x)
    with pytest.raises(ConfigError, match="identity with 24 channels in and 6 out"):
        Compressor(CompressorConfig(kind="identity", channels=6), WIDE)
    with pytest.raises(ValidationError, match="leaves the values"):
        CompressorConfig(kind="identity", channels=WIDE, bottleneck="tanh")
