"""A run directory with exported weights of untrained models, for tests of what reads them: nothing is trained.

The models are the tiny recipe's on the `random` encoder. Parts that start at zero (the flow head, the decoder's output)
get small random weights, so that what comes out depends on what goes in.
"""

from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from unicom_dist.checkpoint.weights import export_weights
from unicom_dist.config.explain import write_config
from unicom_dist.config.schema import Config
from unicom_dist.data.manifest import latent_producer
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.codec import Codec, LatentStats
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.models.encoders.base import fingerprint
from unicom_dist.models.encoders.random import CHANNELS
from unicom_dist.models.transfusion import Transfusion

Model = TypeVar("Model", bound=nn.Module)


def tiny_codec(config: Config, channels: int = CHANNELS) -> Codec:
    """The recipe's codec with every weight random."""
    return _stir(Codec(config.codec, channels, config.seed))


def tiny_prior(config: Config, vocabulary: Vocabulary, channels: int = CHANNELS, seed: int = 0) -> Transfusion:
    """The recipe's prior with every weight random."""
    latents = config.codec.compressor.channels
    return _stir(Transfusion(config.prior, vocabulary.size, latents, channels, config.seed + seed))


def tiny_stats(config: Config) -> LatentStats:
    """Statistics that normalisation cannot ignore."""
    channels = config.codec.compressor.channels
    return LatentStats(torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels))


def write_tiny_weights(config: Config, dtype: torch.dtype = torch.float32, channels: int = CHANNELS) -> None:
    """Write `weights/<stage>/` of every stage of the recipe below its run directory, and its config.yaml."""
    run = Path(config.run_dir)
    vocabulary = Vocabulary.full(config.prior.tokenizer)
    stats = tiny_stats(config)
    encoder, codec_fingerprint = encoder_fingerprint(config.encoder), ""
    for number, stage in enumerate(config.stages):
        folder = run / "weights" / stage.name
        if stage.kind == "codec":
            content = {
                "codec": config.codec.model_dump(mode="json"),
                "encoder": config.encoder.model_dump(mode="json"),
                "encoder_fingerprint": encoder,
                "encoder_channels": channels,
                "stats": stats.to_json(),
                "step": stage.steps,
            }
            export_weights(folder, content, dict(tiny_codec(config, channels).named_parameters()), dtype=dtype)
            codec_fingerprint = fingerprint(latent_producer(folder / "model.safetensors", encoder))
        elif stage.kind == "prior":
            content = {
                "prior": config.prior.model_dump(mode="json"),
                "latent_channels": config.codec.compressor.channels,
                "feature_channels": channels,
                "stats": stats.to_json(),
                "encoder_fingerprint": encoder,
                "codec_fingerprint": codec_fingerprint,
                "step": stage.steps,
                "provenance": {"stage": stage.name},
            }
            model = tiny_prior(config, vocabulary, channels, number)
            export_weights(folder, content, dict(model.named_parameters()), partial(_save, vocabulary), dtype)
    write_config(run, config, {})


def _save(vocabulary: Vocabulary, folder: Path) -> None:
    vocabulary.save(folder / "vocabulary.json")


@torch.no_grad()
def _stir(model: Model) -> Model:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval().requires_grad_(False)
