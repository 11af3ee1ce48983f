"""Which weights of a decoder train, adapters, and the table that says so. One process, seconds."""

from pathlib import Path

import pytest
import torch
from torch import nn

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import DecoderConfig, StageConfig
from unicom_dist.models.decoder import DiffusionDecoder
from unicom_dist.models.decoder_training import plain_name
from unicom_dist.models.init import initialise
from unicom_dist.testing.tiny_flux import tiny_flux_keys
from unicom_dist.train.trained import trained_table

CHANNELS = 10
STAGE = StageConfig(name="codec", kind="codec", steps=1)


def decoder(**changes) -> DiffusionDecoder:
    built = DiffusionDecoder(DecoderConfig(**{**tiny_flux_keys(Path("nowhere")), **changes}), CHANNELS)
    initialise(built, 1)
    return built


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 4, CHANNELS), torch.zeros(2, 4, 2).long()


PROJECTOR = {f"projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}


def test_all_means_all() -> None:
    built = decoder()
    assert trained(built) == {name for name, _ in built.named_parameters()}


def test_the_projector_alone() -> None:
    assert trained(decoder(trainable="projector")) == PROJECTOR
    without = trained(decoder(trainable="projector", projector="linear", text_channels=0))
    assert without == {"flux.context_embedder.weight", "flux.context_embedder.bias"}


def test_the_image_branch_is_what_the_patches_pass() -> None:
    built = decoder(trainable="image-branch")
    double = {n for n, _ in built.named_parameters() if n.startswith("flux.transformer_blocks.0.")}
    kept = {name.split("transformer_blocks.0.")[1] for name in double - trained(built)}
    assert kept
    assert all(
        name.startswith(("norm1_context.", "ff_context.", "attn.add_", "attn.to_add_out", "attn.norm_added"))
        for name in kept
    )
    single = {n for n, _ in built.named_parameters() if n.startswith("flux.single_transformer_blocks.")}
    assert single <= trained(built)
    assert trained(built) >= PROJECTOR
    others = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")
    assert not any(name.startswith(tuple(f"flux.{part}" for part in others)) for name in trained(built))


def test_adapters_change_nothing_at_first_and_alone_get_gradients() -> None:
    plain, adapted = decoder(), decoder(trainable="lora", lora_rank=3, lora_alpha=6.0)
    fresh = decoder(trainable="lora")
    fresh.reset()
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            assert not fresh.get_parameter(name).any()
            nn.init.zeros_(parameter)
    state = {plain_name(name): tensor for name, tensor in adapted.state_dict().items() if ".lora_" not in name}
    plain.load_state_dict(state)
    given = inputs()
    torch.testing.assert_close(adapted.predict(*given), plain.predict(*given))
    adapters = {name for name in trained(adapted) if ".lora_" in name}
    assert trained(adapted) == adapters | PROJECTOR
    weights = [
        name for name, module in plain.flux.named_modules() if isinstance(module, nn.Linear) and "blocks" in name
    ]
    of_norms = [name for name in weights if name.endswith(".linear")]
    assert len(adapters) == 2 * (len(weights) - len(of_norms))
    a = adapted.get_parameter("flux.transformer_blocks.0.attn.to_q.lora_A.default.weight")
    assert a.shape[0] == 3
    adapted.predict(*given).square().sum().backward()
    assert {name for name, parameter in adapted.named_parameters() if parameter.grad is not None} == trained(adapted)


@torch.no_grad()
def test_an_adapter_is_its_product_scaled() -> None:
    adapted = decoder(trainable="lora", lora_rank=2, lora_alpha=6.0)
    layer = adapted.flux.single_transformer_blocks[0].proj_mlp
    x = torch.randn(4, 32)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    b.normal_()
    expected = nn.functional.linear(x, layer.base_layer.weight + 3.0 * b @ a, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_published_weights_are_needed_where_weights_stay_frozen() -> None:
    with pytest.raises(ValueError, match="would stay random"):
        DecoderConfig(trainable="lora")
    with pytest.raises(ValueError, match="nothing to project to"):
        DecoderConfig(projector="mlp")


@pytest.mark.parametrize("trainable", ["lora", "image-branch"])
def test_a_group_that_is_empty_is_refused(trainable: str) -> None:
    with pytest.raises(ConfigError, match="0 double and 0 single blocks has no such weights"):
        decoder(trainable=trainable, double_blocks=0, single_blocks=0)


def test_the_table_counts_what_trains() -> None:
    built = nn.ModuleDict({"decoder": decoder(trainable="projector")})
    table = trained_table(built, STAGE).splitlines()
    flux, projector = (
        sum(p.numel() for p in part.parameters()) for part in (built.decoder.flux, built.decoder.projector)
    )
    assert table[1].split() == ["decoder.projector", f"{projector:,}", "0"]
    assert table[2].split() == ["decoder.flux", "0", f"{flux:,}"]
    assert table[-1].split() == ["all", f"{projector:,}", f"{flux:,}"]
    with pytest.raises(ConfigError, match="trains no weight"):
        trained_table(built.requires_grad_(False), STAGE)
