"""The options of the prior: what is read of an image, positions, time, norms of heads, z-loss. One process, seconds."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unicom_dist.config.schema import PriorConfig, StageConfig
from unicom_dist.data.samples import Picture, Text, grid_positions, lay_out
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.flow import clean_from_velocity, interpolate, linear_velocity, sample_t, shift, shift_factor
from unicom_dist.models.layers import rotary_angles
from unicom_dist.models.segments import PackedBatch, centred
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.objective.terms import prior_counts, prior_terms, total
from unicom_dist.testing.tiny_batch import tiny_batch

LATENT, FEATURE, VOCABULARY = 6, 10, 50
PLAIN = PriorConfig(hidden=32, layers=3, heads=4, kv_heads=2, ffn=48, max_grid=8)
OPTIONS = PLAIN.model_copy(update={"positions": "rope2d", "time_injection": "token", "qk_norm": True})
MIXED = [
    [("text", 5), ("latent", 5), ("text", 6)],
    [("feature", 6), ("text", 4)],
    [("text", 2), ("latent", 9), ("text", 3), ("feature", 2), ("text", 2), ("latent", 5)],
]


def model(config: PriorConfig) -> Transfusion:
    """None of its parts starts at zero or one; float64, so that errors show above rounding."""
    built = Transfusion(config, VOCABULARY, LATENT, FEATURE, seed=1).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            draw = torch.Generator().manual_seed(len(name))
            if name.startswith(("backbone", "flow_head.out")):
                drawn = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                parameter.copy_(0.3 * drawn + (parameter.dim() == 1 and name.endswith("norm.weight")))
    return built


def packed(config: PriorConfig, samples=MIXED) -> PackedBatch:
    rope2d, token = config.positions == "rope2d", config.time_injection == "token"
    return tiny_batch(samples, VOCABULARY, LATENT, FEATURE, rope2d=rope2d, time_token=token)


@torch.no_grad()
def test_normalised_heads_equal_the_plain_formula() -> None:
    attention = model(OPTIONS).backbone.model.layers["1"].self_attn
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        seen.extend((query, key))
        return query

    attention(x, torch.ones(7, 8).double(), torch.zeros(7, 8).double(), attend, 0)
    for found, linear, norm in zip(
        seen, (attention.q_proj, attention.k_proj), (attention.q_norm, attention.k_norm), strict=True
    ):
        heads = linear(x).view(7, -1, 8)
        expected = F.rms_norm(heads, (8,), norm.weight, OPTIONS.norm_eps)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_without_the_option_no_head_is_normalised() -> None:
    assert not [name for name, _ in model(PLAIN).named_parameters() if "q_norm" in name or "k_norm" in name]


def test_text_turns_in_two_dimensions_as_in_one() -> None:
    line = torch.arange(9)
    for plane, flat in zip(
        rotary_angles(torch.stack([line, line], 1), 8, 1e4), rotary_angles(line, 8, 1e4), strict=True
    ):
        assert torch.equal(plane, flat)


def test_rows_turn_every_other_frequency_and_columns_the_rest() -> None:
    cos, sin = rotary_angles(torch.tensor([[2, 5]]), 8, 100.0)
    angles = torch.tensor([2.0, 5 / 100**0.25, 2 / 10.0, 5 / 100**0.75]).repeat(2)
    torch.testing.assert_close(cos[0], angles.cos())
    torch.testing.assert_close(sin[0], angles.sin())


@pytest.mark.parametrize(
    ("grid", "first", "last"), [((2, 5), (1, 0), (2, 4)), ((5, 2), (0, 1), (4, 2)), ((1, 1), (0, 0), (0, 0))]
)
def test_an_image_is_centred_between_the_texts_around_it(grid, first, last) -> None:
    places = centred(grid_positions(*grid))
    assert (tuple(places[0].tolist()), tuple(places[-1].tolist())) == (first, last)
    layout = lay_out("interleaved", [Text((1, 2, 3)), Picture(grid, ("draw", "reference")), Text((4,))], rope2d=True)
    size = grid[0] * grid[1]
    drawn, clean = layout.rope[3 : 3 + size], layout.rope[3 + size : 3 + 2 * size]
    assert (drawn == clean).all()
    assert drawn.min() >= 3  # nothing of it lies before the text before it
    assert drawn.max() < layout.rope[-1].min() == 3 + max(grid)


def test_the_time_has_a_position_of_its_own_before_what_is_drawn_alone() -> None:
    pieces = [Text((1, 2)), Picture((2, 2), ("draw", "reference")), Text((3,)), Picture((1, 2), ("read",), 1)]
    layout = lay_out("interleaved", pieces, time_token=True)
    assert [(image.use, image.start, image.timed) for image in layout.images] == [
        ("draw", 3, True),
        ("reference", 7, False),
        ("read", 12, False),
    ]
    assert layout.segments == (("causal", 2), ("noise", 5), ("full", 4), ("causal", 1), ("full", 2))
    assert layout.length == 14


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["velocity", "edm"])
def test_velocity_after_a_prefix_equals_the_full_forward(prediction) -> None:
    config, texts = OPTIONS.model_copy(update={"prediction": prediction}), [5, 2, 9]
    network = model(config)
    full = packed(config, [[("feature", 2), ("text", length), ("latent", 7)] for length in texts])
    _, velocity = network(full)
    prefixes = packed(config, [[("feature", 2), ("text", length)] for length in texts])
    prefixes = replace(prefixes, token_ids=full.token_ids, features=full.features)
    z_t = interpolate(full.latents, full.noise, full.t)
    drawn = network.velocity_from_prefix(
        network.encode_prefix(prefixes), z_t.view(3, 6, LATENT), full.t[::6], full.latent_grid[:6]
    )
    torch.testing.assert_close(drawn.flatten(0, 1), velocity, rtol=1e-5, atol=1e-6)


def test_a_preconditioned_head_adds_to_the_linear_guess() -> None:
    network, batch = model(PLAIN.model_copy(update={"prediction": "edm"})), packed(PLAIN)
    output = model(PLAIN)(batch)[1]  # the same weights: what the head says
    drawn = batch.flow_index
    data, noise, t = batch.latents[drawn], batch.noise[drawn], batch.t[drawn]
    z_t, n = interpolate(data, noise, t), (t.square() + (1 - t).square())[:, None]
    velocity = network(batch)[1]
    torch.testing.assert_close(velocity, linear_velocity(z_t, t) + output / n.sqrt())
    # Karras et al. 2022, eq. 7: the clean estimate is c_skip z + c_out F; here z = z_t / t, sigma = (1 - t) / t.
    sigma = ((1 - t) / t)[:, None]
    clean = z_t / t[:, None] / (sigma.square() + 1) + sigma / (sigma.square() + 1).sqrt() * output
    torch.testing.assert_close(clean_from_velocity(z_t, velocity, t), clean, rtol=1e-4, atol=1e-5)


def test_no_gradient_passes_through_the_target_of_a_preconditioned_head() -> None:
    network = model(PLAIN.model_copy(update={"prediction": "edm"}))
    z_t = torch.randn(4, LATENT).requires_grad_()
    network.velocity(torch.ones(4, LATENT).requires_grad_(), z_t, torch.rand(4)).sum().backward()
    assert z_t.grad is None


@torch.no_grad()
def test_the_time_reaches_its_image_and_nothing_else() -> None:
    network, batch = model(OPTIONS), packed(OPTIONS)
    losses, velocity = network(batch)
    later = batch.times.clone()
    later[1] = 1 - later[1]
    losses_after, after = network(replace(batch, times=later))
    assert torch.equal(losses, losses_after)
    changed = (velocity != after).all(1)
    assert changed.tolist() == [False] * 4 + [True] * 8 + [False] * 4


@torch.no_grad()
@pytest.mark.parametrize("config", [PLAIN, OPTIONS], ids=["table", "rope2d"])
def test_places_of_an_image_are_told_apart(config: PriorConfig) -> None:
    network, batch = model(config), packed(config, [[("text", 2), ("latent", 5)]])
    start = batch.num_positions - batch.latents.shape[0]
    swapped = replace(batch, latent_grid=batch.latent_grid.flip(0))
    if config.positions == "rope2d":
        rope = batch.rope_positions.clone()
        rope[start:] = rope[start:].flip(0)
        swapped = replace(swapped, rope_positions=rope)
    assert (network(batch)[1] != network(swapped)[1]).any()


@pytest.mark.parametrize("samples", [[[("text", 4)]], [[("feature", 4)]], [[("latent", 5)]]])
def test_every_weight_gets_a_gradient_whatever_the_modality(samples) -> None:
    network = model(OPTIONS)
    losses, velocity = network(packed(OPTIONS, samples))
    (losses.sum() + velocity.double().square().sum()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_z_loss_has_the_gradient_of_the_plain_formula() -> None:
    stage = StageConfig(name="prior", kind="prior", steps=1, lambda_text=0.7, z_loss=0.3)
    batch, gradients, values = packed(PLAIN), [], []
    for ours in (True, False):
        network = model(PLAIN)
        network.backbone.lm_head.z_loss = stage.z_loss if ours else 0.0
        if ours:
            outputs = network(batch)
            counts = prior_counts(batch, stage.z_loss)
            loss = total(prior_terms(outputs, batch, stage), counts)
        else:
            plan = AttentionPlan.build(batch.segments, network.dtype)
            logits = network.backbone.lm_head.logits(network.hidden(batch, plan)[batch.label_index])
            text = F.cross_entropy(logits, batch.label_ids) + stage.z_loss * logits.logsumexp(-1).square().mean()
            flow = (network(batch)[1] - (batch.latents - batch.noise)).square().mean()
            loss = stage.lambda_text * text + stage.lambda_flow * flow
        loss.backward()
        values.append(float(loss))
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_times_shift_with_the_size_of_the_image() -> None:
    config = PLAIN.model_copy(update={"resolution_shift": True, "timestep_shift": 9.0})
    assert shift_factor(config, 1024 * 64) == 4.0
    assert shift_factor(config, 256 * 64) == 2.0
    draw = torch.Generator()
    plain = sample_t(PLAIN, 50, draw.manual_seed(3))
    torch.testing.assert_close(sample_t(config, 50, draw.manual_seed(3), 256 * 64), shift(plain, 2.0))
    with pytest.raises(ValueError, match="size of the image"):
        sample_t(config, 1, draw)


def test_the_connector_reads_features_beside_latents() -> None:
    config = PLAIN.model_copy(update={"understanding": "dim_concat"})
    network = Transfusion(config, VOCABULARY, 64, 1152)
    assert network.read_channels == network.connector.lift.in_features == 1216
    assert isinstance(network.connector.lift, nn.Linear)
