"""The Qwen2.5 backbone equals transformers' on the same weights. One process, seconds."""

import pytest
import torch

from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.backbone import Qwen2
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.models.segments import Segment

VOCABULARY = 97


def config(tied: bool = False, recompute: bool = False) -> PriorConfig:
    return PriorConfig(
        hidden=48, layers=3, heads=6, kv_heads=2, ffn=80, tie_embeddings=tied, gradient_checkpointing=recompute
    )


def reference(tied: bool) -> torch.nn.Module:
    # Hides a torchvision that does not fit this torch, which would also break transformers.
    diffusers_class("FluxTransformer2DModel")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=80,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            rms_norm_eps=1e-6,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    ).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(tied: bool) -> None:
    theirs = reference(tied)
    for parameter in theirs.parameters():  # default initial weights are small: logits would agree by being near zero
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    ours = Qwen2(config(tied), VOCABULARY)
    ours.load_state_dict(theirs.state_dict())
    lengths = [19, 7, 30]
    token_ids = torch.randint(VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])
    segments = [Segment(sample, "causal", length) for sample, length in enumerate(lengths)]
    with torch.no_grad():
        logits = ours(token_ids, positions, segments)
        expected = torch.cat([theirs(ids[None]).logits[0] for ids in token_ids.split(lengths)])
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() / expected.abs().max() <= 1e-5


def test_state_dict_names_are_the_published_ones() -> None:
    assert Qwen2(config(), VOCABULARY).state_dict().keys() == reference(tied=False).state_dict().keys()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (Qwen2(config(), VOCABULARY, seed).state_dict() for seed in (3, 3, 4))
    deeper = Qwen2(config().model_copy(update={"layers": 5}), VOCABULARY, 3).state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(first[name], again[name])
    assert torch.equal(first[name], deeper[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.2.self_attn.q_proj.weight"])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.1)


def test_recomputation_changes_no_gradient() -> None:
    ids, positions, segments = torch.arange(12), torch.arange(12), [Segment(0, "causal", 12)]
    grads = []
    for recompute in (False, True):
        model = Qwen2(config(recompute=recompute), VOCABULARY, seed=1)
        model(ids, positions, segments).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)
