"""Exported weights into models: find them, build on the meta device, fill from safetensors, check that all fits.

Two kinds of folder work: a run directory (`weights/<stage>/`, the last finished prior stage counts) and a model folder
as `UniComPipeline.save_pretrained` writes it (`model_index.json`, `codec/`, `prior/`).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from unicom_dist.checkpoint.weights import read_weights, read_weights_config
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import CodecConfig, EncoderConfig, PriorConfig, QueryConfig
from unicom_dist.data.manifest import latent_producer
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.codec import Codec, LatentStats
from unicom_dist.models.encoders.base import fingerprint
from unicom_dist.models.layers import grid_table
from unicom_dist.models.query_guided import QueryGuided
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.sample.model_folder import check_folder

DOCS = "docs/sampling.md"
MODEL_INDEX = "model_index.json"


@dataclass(frozen=True)
class Parts:
    """Where the weights of a model are; without a finished prior stage `prior` is None."""

    codec: Path
    prior: Path | None


@dataclass(frozen=True)
class LoadedCodec:
    """A codec, the encoder it belongs to, and the content of its config.json with the codec's own `fingerprint`."""

    model: Codec
    encoder: EncoderConfig
    content: dict[str, Any]


@dataclass(frozen=True)
class LoadedPrior:
    """A prior with what it needs to read prompts and to undo the normalisation of latents."""

    model: Transfusion
    vocabulary: Vocabulary
    stats: LatentStats
    content: dict[str, Any] = field(default_factory=dict)  # empty for modules in memory
    tokenizer: Path = Path()  # folder


def find_parts(folder: str | Path, stage: str = "") -> Parts:
    """The weights in a model folder or run directory; `stage` names a prior stage other than the last finished one.

    CheckpointError: neither kind of folder, no finished codec, no such stage; a model folder that is not whole.
    """
    folder = Path(folder)
    if (folder / MODEL_INDEX).is_file():
        check_folder(folder)
        prior = folder / "prior"
        return Parts(folder / "codec", prior if prior.is_dir() else None)
    weights = folder / "weights"
    if not weights.is_dir():
        raise CheckpointError(
            f"{folder} holds no model",
            f"there is neither {MODEL_INDEX} (a model folder) nor weights/ (a run with a finished stage) in it",
            "name the run directory of a finished `unicom train`, or a folder written by save_pretrained",
            DOCS,
        )
    stages = load_recipe(folder).config.stages
    done = [item for item in stages if (weights / item.name / "config.json").is_file()]
    codecs = [item.name for item in done if item.kind == "codec"]
    priors = [item.name for item in done if item.kind == "prior"]
    if not codecs:
        raise CheckpointError(
            f"{folder} has no finished codec stage", "pictures are decoded by it", "let the training go on", DOCS
        )
    if stage and stage not in priors:
        raise CheckpointError(
            f"{folder} has no finished prior stage {stage!r}",
            f"finished: {', '.join(priors) or 'none'}",
            "name one of these, or let the training go on",
            DOCS,
        )
    chosen = stage or (priors[-1] if priors else "")
    return Parts(weights / codecs[-1], weights / chosen if chosen else None)


def load_codec(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedCodec:
    """The codec of an exported folder, frozen, in evaluation mode. CheckpointError: missing, damaged, foreign."""
    content, tensors = read_weights(folder)
    try:
        config = CodecConfig.model_validate(content["codec"])
        encoder = EncoderConfig.model_validate(content["encoder"])
        with torch.device("meta"):
            model = Codec(config, int(content["encoder_channels"]))
    except (KeyError, ValidationError) as error:
        raise _foreign(folder, "a codec", error) from None
    fill(model, tensors, folder)
    return LoadedCodec(model.to(device, dtype).eval().requires_grad_(False), encoder, with_fingerprint(content, folder))


def with_fingerprint(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """config.json of the codec in `folder` with the `fingerprint` of its latents, by which a prior is paired with it.

    An exported model folder keeps it, because its weights may be of another precision.
    """
    if "fingerprint" in content:
        return content
    producer = latent_producer(folder / "model.safetensors", content["encoder_fingerprint"])
    return {**content, "fingerprint": fingerprint(producer)}


def load_prior(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedPrior:
    """The prior of an exported folder, frozen, in evaluation mode. CheckpointError: missing, damaged, foreign."""
    content, tensors = read_weights(folder)
    try:
        config = PriorConfig.model_validate(content["prior"])
        stats = LatentStats.from_json(content["stats"])
        own_tokenizer = folder / "tokenizer"
        tokenizer = own_tokenizer if own_tokenizer.is_dir() else Path(config.tokenizer)
        vocabulary = Vocabulary.load(folder / "vocabulary.json", tokenizer)
        with torch.device("meta"):
            sizes = vocabulary.size, content["latent_channels"], content["feature_channels"]
            query = QueryConfig.model_validate(content.get("query", {}))
            model = QueryGuided(config, query, *sizes) if query.enabled else Transfusion(config, *sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise _foreign(folder, "a prior", error) from None
    # What is computed from the configuration rather than stored has to be computed again after the meta device.
    model.places = grid_table(config.max_grid, config.hidden)
    if config.tie_embeddings:
        name = "backbone.model.embed_tokens.weight"
        tensors = tensors | {"backbone.lm_head.weight": tensors[name]} if name in tensors else tensors
    fill(model, tensors, folder)
    if config.tie_embeddings:
        model.backbone.lm_head.weight = model.backbone.model.embed_tokens.weight
    model = model.to(device, dtype).eval().requires_grad_(False)
    return LoadedPrior(model, vocabulary, stats, content, tokenizer)


def fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Give `model` (on the meta device) exactly `tensors`. CheckpointError if they do not fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [
        *(f"missing {name}" for name in expected.keys() - found.keys()),
        *(f"unexpected {name}" for name in found.keys() - expected.keys()),
        *(
            f"{name} is {list(found[name])}, the configuration says {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the weights in {folder} do not fit their config.json",
            "; ".join(sorted(problems)[:3]) + more,
            "export them again, or take config.json and model.safetensors from the same run",
            DOCS,
        )
    model.load_state_dict(tensors, assign=True)


def check_pair(codec: dict[str, Any], prior: dict[str, Any], folder: Path) -> None:
    """CheckpointError unless the prior draws the latents of this codec and reads the features of its encoder.

    `codec` as `load_codec` gives it, `prior` the content of the prior's config.json.
    """
    channels = codec["codec"]["compressor"]["channels"]
    if codec["codec"]["compressor"]["kind"] == "identity":
        channels = codec["encoder_channels"]
    for name, left, right in (
        ("latent channels", channels, prior["latent_channels"]),
        ("feature channels", codec["encoder_channels"], prior["feature_channels"]),
        ("encoder fingerprint", codec["encoder_fingerprint"], prior.get("encoder_fingerprint")),
        ("codec fingerprint", codec["fingerprint"], prior.get("codec_fingerprint")),
    ):
        if left != right:
            raise CheckpointError(
                f"codec and prior in {folder} do not belong together",
                f"{name}: {left} in the codec, {right} in the prior",
                "train a decoder for the prior's compressor: a codec stage with trainable: decoder after the joint one"
                if prior.get("joint") is not None
                else "take both from one run; after training the codec again, train the prior again on its latents",
                DOCS,
            )


def default_grid(encoder: EncoderConfig) -> tuple[int, int]:
    """(rows, columns) of the features of a square picture: what the prior draws unless asked for another grid."""
    if encoder.kind == "efficientnet-lite2":
        side = encoder.image_px // 32  # the stride of the network
    elif encoder.kind == "siglip2":
        side = math.isqrt(encoder.max_patches)
    else:
        from unicom_dist.models.encoders.random import GRID

        side = GRID
    return side, side


def stage_names(folder: str | Path) -> list[str]:
    """Finished prior stages of a run directory in their order; of a model folder the one stage its weights are of."""
    folder = Path(folder)
    if (folder / MODEL_INDEX).is_file():
        if not (folder / "prior").is_dir():
            return []
        return [read_weights_config(folder / "prior").get("provenance", {}).get("stage", "prior")]
    stages = load_recipe(folder).config.stages
    return [s.name for s in stages if s.kind == "prior" and (folder / "weights" / s.name / "config.json").is_file()]


def _foreign(folder: Path, what: str, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {error}".splitlines()
    return CheckpointError(
        f"{folder}/config.json does not describe {what}",
        " ".join(reason[:3]),
        "export the weights again with this version",
        DOCS,
    )
