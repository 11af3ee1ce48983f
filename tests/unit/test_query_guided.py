"""The query-guided pathway in one process: what the velocity follows, what trains, sampling against training."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import PriorConfig, QueryConfig, StageConfig
from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.query_guided import OWN, QueryGuided, guide_weight, query_segments, with_queries
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.objective.terms import prior_counts, prior_terms, total
from unicom_dist.parallel.engine import pieces_of
from unicom_dist.testing.tiny_batch import tiny_batch

PRIOR = PriorConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, max_grid=8)
QUERY = QueryConfig(enabled=True, queries=3, connector_layers=2, decoder_layers=2, decoder_width=24)
VOCABULARY, LATENT, FEATURE = 50, 4, 6
DRAW = [("text", 3), ("latent", 6), ("text", 2)]
SAMPLES = [DRAW, [("text", 4)], [("feature", 4), ("text", 3), ("latent", 4)], [("text", 2), ("latent", 2)]]
STAGE = StageConfig(name="query", kind="prior", steps=1, query=QUERY)


def model(prior: PriorConfig = PRIOR, trained: bool = True) -> QueryGuided:
    """`trained`: with nothing at or near zero, so that everything has a say in the velocity."""
    module = QueryGuided(prior, QUERY, VOCABULARY, LATENT, FEATURE, seed=1)
    module.train_only("all")
    if trained:
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return module


def batch_of(samples: list[list[tuple[str, int]]] = SAMPLES, seed: int = 0, prior: PriorConfig = PRIOR) -> PackedBatch:
    options = prior.positions == "rope2d", prior.time_injection == "token"
    return tiny_batch(samples, VOCABULARY, LATENT, FEATURE, seed, *options)


def velocity(module: QueryGuided, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        return module(batch)[1]


def test_a_new_guide_moves_nothing_and_its_connector_has_the_scale_of_the_decoder() -> None:
    module, batch = model(trained=False), batch_of()
    assert not velocity(module, batch).any()
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    size = module.guide.connector(states, lambda s: AttentionPlan.build(s, torch.float32)).square().mean().sqrt()
    assert size.item() == pytest.approx(math.sqrt(5.5), rel=1e-3)


def test_queries_stand_where_the_images_to_be_drawn_stood() -> None:
    batch = batch_of()
    asking, places = with_queries(batch, 3)
    assert asking.segments == query_segments(batch.segments, 3)
    assert asking.num_positions == sum(segment.length for segment in asking.segments)
    held = torch.cat([asking.token_index, asking.feature_index, asking.latent_index, places])
    assert sorted(held.tolist()) == list(range(asking.num_positions))
    assert places.tolist() == [3, 4, 5, 19, 20, 21, 24, 25, 26]
    assert asking.rope_positions[places].tolist() == [3, 4, 5, 4, 5, 6, 2, 3, 4]
    torch.testing.assert_close(asking.rope_positions[asking.token_index], batch.rope_positions[batch.token_index])


def test_velocity_follows_prompt_image_read_time_and_noise_of_its_own_sample_alone() -> None:
    module, batch = model(), batch_of()
    before = velocity(module, batch)
    parts = [slice(0, 6), slice(6, 10), slice(10, 12)]

    def changed(batch: PackedBatch) -> list[bool]:
        after = velocity(module, batch)
        return [not torch.equal(before[part], after[part]) for part in parts]

    tokens = batch.token_ids.clone()
    tokens[0] = (tokens[0] + 1) % VOCABULARY
    assert changed(replace(batch, token_ids=tokens)) == [True, False, False]
    tokens = batch.token_ids.clone()
    tokens[3] = (tokens[3] + 1) % VOCABULARY  # after the image
    assert changed(replace(batch, token_ids=tokens)) == [False, False, False]
    assert changed(replace(batch, features=batch.features + 1)) == [False, True, False]
    t = batch.t.clone()
    t[10:] = 0.5
    assert changed(replace(batch, t=t)) == [False, False, True]
    noise = batch.noise.clone()
    noise[0] += 1
    assert changed(replace(batch, noise=noise)) == [True, False, False]


def test_the_guide_alone_is_trained_and_all_of_it() -> None:
    module, batch = model(), batch_of()
    total(prior_terms(module(batch), batch, STAGE), prior_counts(batch)).backward()
    for name, parameter in module.named_parameters():
        found = parameter.grad is not None and bool(parameter.grad.any())
        assert found == name.startswith(OWN), name


def test_a_batch_without_images_reaches_every_weight_with_an_exact_zero() -> None:
    module, batch = model(), batch_of([[("text", 4)]])
    outputs = module(batch)
    assert outputs[1].shape == (0, LATENT)
    total(prior_terms(outputs, batch, STAGE), prior_counts(batch)).backward()
    for name, parameter in module.named_parameters():
        if name.startswith(OWN):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_text_is_predicted_as_by_the_model_that_is_asked() -> None:
    module, batch = model(), batch_of()
    plain = Transfusion(PRIOR, VOCABULARY, LATENT, FEATURE, seed=1)
    plain.load_state_dict({name: tensor for name, tensor in module.state_dict().items() if not name.startswith(OWN)})
    with torch.no_grad():
        torch.testing.assert_close(module(batch)[0], plain(batch)[0])


def test_the_cut_of_a_batch_does_not_matter() -> None:
    module = model()
    batch = batch_of()
    alone = batch_of([DRAW])
    same = replace(
        alone,
        **{name: getattr(batch, name)[: len(getattr(alone, name))] for name in ("token_ids", "latents", "noise", "t")},
    )
    torch.testing.assert_close(velocity(module, batch)[:6], velocity(module, same), rtol=1e-4, atol=1e-6)


OPTIONS = [{}, {"positions": "rope2d"}, {"time_injection": "token"}, {"qk_norm": True}, {"prediction": "edm"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "rope2d", "token", "qk_norm", "edm"])
def test_sampling_after_a_prefix_equals_training(options: dict[str, object]) -> None:
    prior = PRIOR.model_copy(update=options)
    module = model(prior)
    size = 6 + (prior.time_injection == "token")
    whole = batch_of([[("text", 3), ("latent", size)], [("feature", 4), ("text", 2), ("latent", size)]], 3, prior)
    prefix_batch = batch_of([[("text", 3)], [("feature", 4), ("text", 2)]], 3, prior)
    prefix_batch = replace(prefix_batch, token_ids=whole.token_ids, features=whole.features)
    t = whole.t.view(2, 6)[:, 0]
    z_t = (whole.t[:, None] * whole.latents + (1 - whole.t[:, None]) * whole.noise).view(2, 6, LATENT)
    prefix = module.encode_prefix(prefix_batch)
    wanted = velocity(module, whole).view(2, 6, LATENT)
    found = module.velocity_from_prefix(prefix, z_t, t, whole.latent_grid[:6])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    again = module.velocity_from_prefix(prefix.select([1, 1]).first(1), z_t[1:], t[1:], whole.latent_grid[:6])
    torch.testing.assert_close(again, wanted[1:], rtol=1e-4, atol=1e-5)


def test_what_is_written_behind_a_prefix_is_read_by_the_queries() -> None:
    module = model()
    tokens = torch.tensor([7])
    longer = batch_of([[("text", 4)]])
    shorter = replace(batch_of([[("text", 3)]]), token_ids=longer.token_ids[:3])
    longer = replace(longer, token_ids=torch.cat([shorter.token_ids, tokens]))
    grown = module.append_tokens(module.encode_prefix(shorter), tokens)
    z_t, grid = torch.randn(1, 2, LATENT), torch.tensor([[0, 0], [0, 1]])
    found = module.velocity_from_prefix(grown, z_t, torch.tensor([0.3]), grid)
    wanted = module.velocity_from_prefix(module.encode_prefix(longer), z_t, torch.tensor([0.3]), grid)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_initial_weights_follow_name_and_seed() -> None:
    module = model(trained=False)
    for name, parameter in module.named_parameters():
        if name.startswith(OWN):
            piece = pieces_of(name, parameter, tuple(parameter.shape))[0]
            torch.testing.assert_close(parameter.detach(), guide_weight(piece, 1), msg=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("parallel={nproc: 2, tp: 2}", "data-parallel only"),
        ("stages.pretrain.query.enabled=true", "before pretrain|enable it here too"),
        ("stages.alignment={query: {enabled: true}, trainable: all}", "first prior stage"),
        ("stages.sft.joint.enabled=true", "query.enabled"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(change: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe("recipes/tiny.yaml", ["stages.sft.query.enabled=true", change])
