"""What trains of the decoder: all of it, the image stream of its blocks, low-rank adapters, or its projector alone.

The projector always trains. The image stream are the weights that the patches pass: in double blocks those of FLUX's
image side, in single blocks, where both pass the same, all. Ref: UniWorld-V1, which trains that of a published FLUX.
Adapters are peft's (Hu et al. 2021, arXiv 2106.09685) on the attentions and MLPs of all blocks; they are parameters
like others, named `….lora_A.default.weight`: checkpoints, averages and exports keep them beside the weights they adapt.
"""

import re
from typing import Any

from torch import nn

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import DecoderConfig

IMAGE_STREAM = re.compile(
    r"transformer_blocks\.\d+\.(norm1\.|attn\.(to_[qkv]|to_out|norm_q|norm_k)\.|ff\.)|single_transformer_blocks\."
)
ADAPTED = (
    r"(single_)?transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)
DOCS = "docs/codec.md"


def add_adapters(flux: nn.Module, config: DecoderConfig) -> None:
    """Adapters of `config.lora_rank` beside every linear map of the blocks; as they start they change nothing."""
    from peft import LoraConfig, inject_adapter_in_model

    if not config.double_blocks + config.single_blocks:
        raise _nothing(config)
    adapters = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=ADAPTED)  # type: ignore[arg-type]  # it takes floats
    inject_adapter_in_model(adapters, flux)


def train_chosen(decoder: Any, config: DecoderConfig) -> None:
    """Freeze what `config.trainable` leaves out. ConfigError when it names nothing that is there."""
    if config.trainable == "all":
        return
    chosen = 0
    for name, parameter in decoder.flux.named_parameters():
        adapter = ".lora_" in name
        trained = adapter if config.trainable == "lora" else bool(IMAGE_STREAM.match(name))
        parameter.requires_grad_(trained and config.trainable != "projector")
        chosen += parameter.requires_grad
    if decoder.projector is None:
        decoder.flux.context_embedder.requires_grad_(True)
    if not chosen and config.trainable != "projector":
        raise _nothing(config)


def plain_name(name: str) -> str:
    """The name that an adapted weight has without adapters."""
    return name.replace(".base_layer.", ".")


def _nothing(config: DecoderConfig) -> ConfigError:
    return ConfigError(
        f"codec.decoder.trainable = {config.trainable}",
        f"a decoder of {config.double_blocks} double and {config.single_blocks} single blocks has no such weights",
        "codec.decoder.trainable: all, or a decoder with blocks",
        DOCS,
    )
