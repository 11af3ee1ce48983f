"""The Transfusion model: who reads what, empty modalities, and cached generation. One process, seconds."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models import transfusion
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.sample.writing import Chooser
from unicom_dist.testing.tiny_batch import Stretch, tiny_batch

LATENT, FEATURE, VOCABULARY = 6, 10, 50
CONFIG = PriorConfig(hidden=32, layers=3, heads=4, kv_heads=2, ffn=48, max_grid=8)


def packed(samples: Sequence[Sequence[Stretch]], seed: int = 0) -> PackedBatch:
    return tiny_batch(samples, VOCABULARY, LATENT, FEATURE, seed)


def model(config: PriorConfig = CONFIG) -> Transfusion:
    """A model none of whose parts starts at zero, in float64 so that leaks show above rounding."""
    built = Transfusion(config, VOCABULARY, LATENT, FEATURE, seed=1).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            draw = torch.Generator().manual_seed(len(name))
            if name.startswith(("backbone", "flow_head.out")) and parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=draw)
    return built


def logits_of(network: Transfusion, batch: PackedBatch) -> torch.Tensor:
    """[Y, V] at the labels."""
    plan = AttentionPlan.build(batch.segments, network.dtype)
    return network.backbone.lm_head.logits(network.hidden(batch, plan)[batch.label_index])


MIXED = [
    [("text", 5), ("latent", 4), ("text", 6)],
    [("feature", 6), ("text", 4)],
    [("text", 3)],
    [("text", 2), ("latent", 8), ("text", 3), ("feature", 2), ("text", 2), ("latent", 4)],
]


@torch.no_grad()
def test_later_text_never_reads_noised_latents() -> None:
    batch, network = packed(MIXED), model()
    losses, velocity = network(batch)
    changed = replace(batch, latents=batch.latents + 3, noise=batch.noise * 2, t=1 - batch.t)
    losses_after, velocity_after = network(changed)
    assert torch.equal(losses, losses_after)
    assert (velocity - velocity_after).abs().amin(1).max() > 1e-3


@torch.no_grad()
def test_second_image_never_reads_the_noise_of_the_first() -> None:
    batch, network = packed(MIXED), model()
    _, velocity = network(batch)
    noise = batch.noise.clone()
    noise[4:12] += 1  # the first image of the last sample
    _, after = network(replace(batch, noise=noise))
    same = (velocity == after).all(1)
    assert same[:4].all()
    assert same[12:].all()
    assert not same[4:12].any()


@torch.no_grad()
def test_latents_of_an_image_read_each_other_and_the_text_before() -> None:
    batch, network = packed(MIXED), model()
    _, velocity = network(batch)
    noise = batch.noise.clone()
    noise[3] += 1  # the last latent of the first image
    _, after = network(replace(batch, noise=noise))
    assert (velocity[:4] != after[:4]).any(1).all()
    tokens = batch.token_ids.clone()
    tokens[0] = (tokens[0] + 1) % VOCABULARY
    _, after = network(replace(batch, token_ids=tokens))
    assert (velocity[:4] != after[:4]).any(1).all()
    assert torch.equal(velocity[4:], after[4:])


@torch.no_grad()
def test_features_reach_the_text_after_them_and_no_other_sample() -> None:
    batch, network = packed(MIXED), model()
    losses, _ = network(batch)
    features = batch.features.clone()
    features[:6] += 1
    after, _ = network(replace(batch, features=features))
    touched = losses != after
    assert torch.equal(touched, batch.label_sample == 1)


@torch.no_grad()
def test_a_sample_is_read_alike_alone_and_packed() -> None:
    network = model()
    both = packed([MIXED[0], MIXED[0]])
    losses, velocity = network(both)
    alone = packed([MIXED[0]])
    alone = replace(
        alone,
        token_ids=both.token_ids[11:],
        label_ids=both.label_ids[9:],
        latents=both.latents[4:],
        noise=both.noise[4:],
        t=both.t[4:],
    )
    losses_alone, velocity_alone = network(alone)
    torch.testing.assert_close(losses[9:], losses_alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(velocity[4:], velocity_alone, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_swapping_two_places_of_an_image_changes_the_velocity() -> None:
    batch, network = packed([[("text", 2), ("latent", 4)]]), model()
    grid = batch.latent_grid.flip(0)
    assert (network(batch)[1] != network(replace(batch, latent_grid=grid))[1]).any()


@pytest.mark.parametrize("samples", [[[("text", 4)]], [[("feature", 4)]], [[("latent", 4)]]])
def test_every_weight_gets_a_gradient_whatever_the_modality(samples: list[list[Stretch]]) -> None:
    network = model()
    losses, velocity = network(packed(samples))
    (losses.sum() + velocity.double().square().sum()).backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_an_absent_modality_leaves_its_weights_alone() -> None:
    network = model()
    losses, velocity = network(packed([[("text", 4)]]))
    (losses.square().sum() + velocity.sum()).backward()
    for name, parameter in network.named_parameters():
        if not name.startswith("backbone."):
            assert not parameter.grad.any(), name


def test_gradients_equal_autograd_without_the_fast_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[torch.Tensor]:
        network = model()
        losses, velocity = network(packed(MIXED))
        (losses.square().sum() + velocity.double().square().sum()).backward()
        return [parameter.grad for parameter in network.parameters()]

    fast = gradients()
    monkeypatch.setattr(transfusion, "rearrange", lambda x, forward, backward: x[forward])
    monkeypatch.setattr(transfusion.Take, "apply", lambda x, index: x[index])
    for mine, plain in zip(fast, gradients(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("time_injection", ["add", "token"])
def test_a_batch_padded_to_whole_rows_has_the_losses_and_gradients_of_the_bare_one(time_injection: str) -> None:
    """As for kernels that are compiled for a length; a dropped caption then changes no shape either."""

    def outcome(samples: Sequence[Sequence[Stretch]], multiple: int) -> tuple[list[torch.Tensor], int]:
        network, batch = model(CONFIG.model_copy(update={"time_injection": time_injection})), packed(samples)
        network.share.multiple = multiple
        losses, velocity = network(batch)
        (losses.square().sum() + velocity.double().square().sum()).backward()
        return [losses, velocity, *(p.grad for p in network.parameters())], network.share.rows(batch)

    bare, positions = outcome(MIXED, 1)
    padded, rows = outcome(MIXED, 64)
    assert (positions % 64 > 0, rows % 64) == (True, 0)
    for mine, plain in zip(padded, bare, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-9)
    dropped = [[("latent", 4), ("text", 6)], *MIXED[1:]]
    assert outcome(dropped, 64)[1] == rows


def test_fresh_flow_head_predicts_zero() -> None:
    _, velocity = Transfusion(CONFIG, VOCABULARY, LATENT, FEATURE)(packed(MIXED))
    assert velocity.dtype == torch.float32
    assert not velocity.any()


def test_bfloat16_weights_take_float32_batches() -> None:
    network = Transfusion(CONFIG, VOCABULARY, LATENT, FEATURE, seed=1)
    exact = logits_of(network, packed(MIXED))
    rough = logits_of(network.bfloat16(), packed(MIXED))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.03
    assert [out.dtype for out in network(packed(MIXED))] == [torch.float32] * 2


def test_connector_stage_moves_all_but_the_backbone() -> None:
    network = model()
    network.train_only("connector")
    moving = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert moving == {"latent_in", "time", "connector", "flow_head"}
    network.train_only("all")
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_an_image_beyond_the_position_table_is_refused() -> None:
    batch = packed([[("latent", 4)]])
    with pytest.raises(DataError, match="max_grid"):
        model()(replace(batch, latent_grid=batch.latent_grid + CONFIG.max_grid))


def test_a_width_without_position_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prior\.hidden = 30"):
        Transfusion(CONFIG.model_copy(update={"hidden": 30, "heads": 3, "kv_heads": 1}), VOCABULARY, LATENT, FEATURE)


@torch.no_grad()
def test_velocity_after_a_prefix_equals_the_full_forward() -> None:
    network = model()
    texts = [5, 2, 9]
    full = packed([[("feature", 2), ("text", length), ("latent", 6)] for length in texts])
    _, velocity = network(full)
    prefixes = packed([[("feature", 2), ("text", length)] for length in texts])
    prefixes = replace(prefixes, token_ids=full.token_ids, features=full.features)
    z_t = full.t[:, None] * full.latents + (1 - full.t[:, None]) * full.noise
    drawn = network.velocity_from_prefix(
        network.encode_prefix(prefixes), z_t.view(3, 6, LATENT), full.t[::6], full.latent_grid[:6]
    )
    torch.testing.assert_close(drawn.flatten(0, 1), velocity, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_greedy_text_equals_reading_everything_again_for_each_token() -> None:
    network = model()
    prefixes = packed([[("feature", 4), ("text", 3)], [("text", 6)], [("text", 1)]])
    written = network.generate_tokens(network.encode_prefix(prefixes), stop_ids=(), limit=7)
    first_token = 0
    for number, length in enumerate((3, 6, 1)):
        ids = prefixes.token_ids[first_token : first_token + length].tolist()
        first_token += length
        for token in written[number]:
            pieces = [("feature", 4)] * (number == 0) + [("text", len(ids))]
            again = replace(
                packed([pieces]),
                token_ids=torch.tensor(ids),
                features=prefixes.features[: 4 * (number == 0)],
                label_index=torch.tensor([len(ids) - 1 + 4 * (number == 0)]),
            )
            assert logits_of(network, again).argmax().item() == token
            ids.append(token)


@torch.no_grad()
def test_writing_stops_at_a_stop_token_for_each_text_alone() -> None:
    network = model()
    prefix = network.encode_prefix(packed([[("text", 3)], [("text", 6)]]))
    free = network.generate_tokens(prefix, stop_ids=(), limit=6)
    stop = free[0][2]
    stopped = network.generate_tokens(prefix, stop_ids=(stop,), limit=6)
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert stopped[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])


@torch.no_grad()
def test_drawn_text_depends_on_the_seed_alone() -> None:
    network = model()
    prefix = network.encode_prefix(packed([[("text", 3)]]))
    first, again, other = (
        network.generate_tokens(prefix, (), 12, Chooser([seed], temperature=2.0)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@torch.no_grad()
def test_selected_prefixes_are_the_same_prefixes() -> None:
    network = model()
    prefix = network.encode_prefix(packed([[("text", 3)], [("text", 6)]]))
    both = network.generate_tokens(prefix, (), 5)
    assert network.generate_tokens(prefix.select([1, 0, 1]), (), 5) == [both[1], both[0], both[1]]
