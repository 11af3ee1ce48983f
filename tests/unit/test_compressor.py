"""Compressor and decompressor: equivariance, padding, legal heads. One process, seconds."""

import pytest
import torch

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import CompressorConfig
from unicom_dist.models.compressor import Compressor, Decompressor, Projector
from unicom_dist.models.init import initialise

WIDE = 24
KINDS = {
    "averaged heads": CompressorConfig(channels=6, heads=4),
    "explicit width": CompressorConfig(channels=6, heads=2, attention_width=16),
    "no mlp": CompressorConfig(channels=6, heads=2, attention_width=16, mlp_ratio=0, expanded=12),
    "per token": CompressorConfig(kind="mlp", channels=6),
}


def both(config: CompressorConfig) -> list[tuple[Projector, int]]:
    """Each direction with its input channels, weights drawn, in float64."""
    pair: list[tuple[Projector, int]] = [
        (Compressor(config, WIDE), WIDE),
        (Decompressor(config, WIDE), config.channels),
    ]
    for network, _ in pair:
        initialise(network.double(), seed=3)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return pair


def tokens(channels: int, n: int = 7) -> torch.Tensor:
    return torch.randn(3, n, channels, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


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
        torch.testing.assert_close(network(torch.where(mask[..., None], x, 1e3), mask), out)
        torch.testing.assert_close(network(x[1:2, :3]), out[1:2, :3])
        assert not out[~mask].any()


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
    torch.testing.assert_close(block(x, None), expected)


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


def test_identity_keeps_tokens_and_refuses_other_channels() -> None:
    config = CompressorConfig(kind="identity", channels=WIDE)
    x = tokens(WIDE)
    assert torch.equal(Compressor(config, WIDE)(x), x)
    with pytest.raises(ConfigError, match="identity with 24 channels in and 6 out"):
        Compressor(CompressorConfig(kind="identity", channels=6), WIDE)
