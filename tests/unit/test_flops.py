"""FLOPs by formula against torch's own counter and against the dense mask. One process, seconds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from unicom_dist.config.schema import CodecConfig, CompressorConfig, DecoderConfig, PriorConfig, QueryConfig
from unicom_dist.models.attention import visible
from unicom_dist.models.codec import Codec, CodecBatch
from unicom_dist.models.compressor import Compressor
from unicom_dist.models.joint import Reconstruction
from unicom_dist.models.operations import visible_pairs
from unicom_dist.models.query_guided import QueryGuided, query_segments
from unicom_dist.models.segments import PackedBatch, Segment
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.tracking.flops import (
    codec_flops,
    forward_flops,
    measure_peak,
    prior_flops,
    query_flops,
    token_flops,
)

LINEAR = ("mm", "addmm")
VOCAB, D, FEATURES = 50, 8, 24


def segments() -> list[Segment]:
    return [
        Segment(0, "causal", 5), Segment(0, "full", 4), Segment(0, "causal", 3),
        Segment(1, "causal", 7), Segment(1, "noise", 6), Segment(1, "causal", 2),
        Segment(2, "noise", 1),
    ]  # fmt: skip


def prior_batch() -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    modes = [segment.mode for segment in segments() for _ in range(segment.length)]
    index = {mode: torch.tensor([i for i, m in enumerate(modes) if m == mode]) for mode in ("causal", "full", "noise")}
    text, noise, full = (len(index[mode]) for mode in ("causal", "noise", "full"))
    return PackedBatch(
        segments=segments(),
        rope_positions=torch.arange(len(modes)),
        token_ids=torch.randint(VOCAB, (text,), generator=generator),
        token_index=index["causal"],
        label_index=index["causal"][:9],
        label_ids=torch.randint(VOCAB, (9,), generator=generator),
        latents=torch.randn(noise, D, generator=generator),
        noise=torch.randn(noise, D, generator=generator),
        t=torch.full((noise,), 0.5),
        flow_index=torch.arange(noise),
        latent_index=index["noise"],
        latent_grid=torch.zeros(noise, 2, dtype=torch.int64),
        features=torch.randn(full, FEATURES, generator=generator),
        feature_index=index["full"],
        feature_grid=torch.zeros(full, 2, dtype=torch.int64),
        keys=["a", "b", "c"],
        tasks=["image_to_text", "text_to_image", "text_to_image"],
        sources=["train"] * 3,
        label_sample=torch.zeros(9, dtype=torch.int64),
        latent_sample=torch.ones(noise, dtype=torch.int64),
    )


def linear_flops(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts()["Global"]
    return sum(number for op, number in counts.items() if str(op).removeprefix("aten.") in LINEAR)


def test_visible_pairs_equal_the_dense_mask() -> None:
    assert visible_pairs(segments()) == int(visible(segments()).sum())


@pytest.mark.parametrize("frozen", [False, True])
def test_prior_flops_equal_the_counter_without_attention(frozen: bool) -> None:
    config = PriorConfig(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, max_grid=4)
    model, batch = Transfusion(config, VOCAB, D, FEATURES), prior_batch()
    model.train_only("connector" if frozen else "all")
    torch.nn.init.normal_(model.flow_head.out.weight)
    with FlopCounterMode(display=False) as counter:
        losses, velocity = model(batch)
        (losses.sum() + velocity.square().sum()).backward()
    attention = 12 * config.layers * config.hidden * visible_pairs(batch.segments)
    expected = prior_flops(config, batch, VOCAB, backbone_frozen=frozen) - attention
    assert expected == pytest.approx(linear_flops(counter), rel=0.01)


def test_query_flops_equal_the_counter_without_attention() -> None:
    config = PriorConfig(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, max_grid=4)
    query = QueryConfig(enabled=True, queries=3, connector_layers=1, decoder_layers=2, decoder_width=64)
    model, batch = QueryGuided(config, query, VOCAB, D, FEATURES), prior_batch()
    model.train_only("all")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with FlopCounterMode(display=False) as counter:
        losses, velocity = model(batch)
        (losses.sum() + velocity.square().sum()).backward()
    attention = 12 * config.layers * config.hidden * visible_pairs(query_segments(batch.segments, 3))
    attention += 12 * 64 * (2 * 3**2 + 2 * ((3 + 6) ** 2 + (3 + 1) ** 2))
    expected = query_flops(config, model.guide, batch, VOCAB) - attention
    assert expected == linear_flops(counter)


@pytest.mark.parametrize(("concat", "frozen"), [(False, False), (True, False), (False, True)])
def test_codec_flops_equal_the_counter_without_attention(concat: bool, frozen: bool) -> None:
    decoder = DecoderConfig(
        image_px=16, patch_px=4, double_blocks=1, single_blocks=1, heads=2, head_dim=16, rope_axes=(4, 6, 6),
        concat_tokens=concat,
    )  # fmt: skip
    codec = Codec(CodecConfig(compressor=CompressorConfig(channels=8, heads=2), decoder=decoder), FEATURES)
    for parameter in codec.parameters():  # adaLN-zero would not change the counts, but zeros hide nothing here
        torch.nn.init.normal_(parameter, std=0.02)
    codec.decoder.flux.transformer_blocks[0].ff.requires_grad_(not frozen)
    codec.decoder.flux.transformer_blocks[0].ff_context.requires_grad_(not frozen)
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(2, -1, -1)
    batch = CodecBatch(
        images=torch.rand(2, 3, 16, 16), features=torch.randn(2, 9, FEATURES), mask=torch.ones(2, 9, dtype=torch.bool),
        grid=grid, noise=torch.randn(2, 3, 16, 16), t=torch.tensor([0.2, 0.7]), latent_noise=torch.zeros(2, 9, 8),
        latent_noise_level=torch.zeros(2), keys=["a", "b"],
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        velocity, _ = codec(batch)
        velocity.square().sum().backward()
    width, patches, tokens = 32, 16, 9
    compressor_pairs = 2 * tokens**2 * (FEATURES + FEATURES)
    attention = 12 * (2 * (patches + tokens) ** 2 * width * 2 + compressor_pairs)
    assert codec_flops(codec, batch) - attention == pytest.approx(linear_flops(counter), rel=0.01)


def test_a_resampler_reads_features_and_writes_latents() -> None:
    """Its operations are what it has more than pooling."""
    decoder = DecoderConfig(
        image_px=16, patch_px=4, double_blocks=1, single_blocks=1, heads=2, head_dim=16, rope_axes=(4, 6, 6)
    )
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(3))[None]
    batch = CodecBatch(
        images=torch.rand(1, 3, 16, 16), features=torch.randn(1, 9, FEATURES), mask=torch.ones(1, 9, dtype=torch.bool),
        grid=grid, noise=torch.randn(1, 3, 16, 16), t=torch.tensor([0.2]), latent_noise=torch.zeros(1, 4, 8),
        latent_noise_level=torch.zeros(1), keys=["a"],
    )  # fmt: skip
    formula, counted = [], []
    for spatial in ("resampler", "pool"):
        compressor = CompressorConfig(channels=8, heads=2, spatial=spatial)
        codec = Codec(CodecConfig(compressor=compressor, decoder=decoder), FEATURES)
        for parameter in codec.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        with FlopCounterMode(display=False) as counter:
            velocity, _ = codec(batch)
            velocity.square().sum().backward()
        formula.append(codec_flops(codec, batch))
        counted.append(linear_flops(counter))
    assert formula[0] - formula[1] == counted[0] - counted[1]
    attention = 12 * ((16 + 4) ** 2 * 32 * 2 + 4**2 * (FEATURES + FEATURES))
    assert formula[1] - attention == pytest.approx(counted[1], rel=0.01)


def test_padded_tokens_add_no_flops() -> None:
    codec = Codec(
        CodecConfig(
            compressor=CompressorConfig(channels=8, heads=2),
            decoder=DecoderConfig(
                image_px=8, patch_px=4, double_blocks=1, single_blocks=0, heads=1, head_dim=8, rope_axes=(2, 2, 4)
            ),
        ),
        FEATURES,
    )

    def batch(real: int, padded: int) -> CodecBatch:
        mask = (torch.arange(padded) < real)[None]
        zeros = torch.zeros(1, 3, 8, 8)
        grid = torch.zeros(1, padded, 2, dtype=torch.int64)
        features, latents = torch.zeros(1, padded, FEATURES), torch.zeros(1, padded, 8)
        return CodecBatch(zeros, features, mask, grid, zeros, torch.zeros(1), latents, torch.zeros(1), ["a"])

    assert codec_flops(codec, batch(4, 4)) == codec_flops(codec, batch(4, 9)) < codec_flops(codec, batch(5, 9))


def test_flops_of_compressor_and_reconstruction_equal_the_counter() -> None:
    """The counter leaves CPU attention out: 12 per channel and pair of tokens."""
    config = CompressorConfig(channels=8, heads=2, attention_width=16, expanded=24)
    towers = [Compressor(config, 32), Reconstruction(config, 32)]
    with FlopCounterMode(display=False) as counter:
        towers[1](towers[0](torch.randn(1, 40, 32)), None).square().sum().backward()
    assert token_flops(towers, [40]) - 12 * 40**2 * (16 + 16) == linear_flops(counter)
    assert token_flops(towers, [3, 5]) == token_flops(towers, [3]) + token_flops(towers, [5])


def test_forward_flops_of_a_product() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    assert forward_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_measured_peak_says_how_it_was_measured() -> None:
    peak = measure_peak(torch.device("cpu"), torch.float32, seconds=0.01)
    assert peak.flops_per_s > 1e8
    assert "measured" in peak.source
    assert "float32" in peak.source
