"""What a run has learnt as a folder for others: a model folder, or the backbone alone as a Qwen2.5 folder.

Weights come from an exported stage or from any checkpoint, tensor by tensor: memory holds one of them.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unicom_dist.checkpoint.description import described_prior
from unicom_dist.checkpoint.huggingface import write_qwen
from unicom_dist.checkpoint.saved import COMPLETE, Checkpoint, latest
from unicom_dist.checkpoint.weights import (
    Chosen,
    StoredWeights,
    export_weights,
    read_weights_config,
    replace_folder,
)
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import EncoderConfig, SampleConfig
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.joint import OWN, compressor_fingerprint
from unicom_dist.sample.loading import MODEL_INDEX, check_pair, default_grid, find_parts, with_fingerprint
from unicom_dist.sample.model_folder import Origin, describe_folder, read_manifest, sampling_of

log = logging.getLogger(__name__)

Weights = Literal["ema", "raw"]
Format = Literal["unicom", "qwen"]
DOCS = "docs/checkpoints.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Stored:
    """A codec or a prior: the content of its config.json, its tensors by name, and where a prior's text files are."""

    content: dict[str, Any]
    tensors: Mapping[str, Tensor]
    vocabulary: Path = Path()
    tokenizer: Path = Path()

    def text(self) -> Vocabulary:
        """The prior's vocabulary. DataError when its files are missing or do not belong together."""
        return Vocabulary.load(self.vocabulary, self.tokenizer)


def export(
    source: Path,
    out: Path,
    stage: str = "",
    weights: Weights = "ema",
    form: Format = "unicom",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the new folder `out` from a run directory, a checkpoint or a model folder.

    stage: a prior stage of a run other than its last finished one. weights: averaged, or as the optimizer left them.
    dtype: of what is written; float32 changes nothing of a checkpoint's weights.
    CheckpointError: incomplete, foreign or damaged source, or it does not hold what is asked for.
    """
    parts = checkpoint_parts(source, weights) if is_checkpoint(source) else exported_parts(source, stage, weights)
    if form == "unicom":
        origin = origin_of(source, stage, weights)
        replace_folder(out, lambda place: write_model(place, parts, origin, dtype))
    else:
        replace_folder(out, lambda place: write_backbone(place, parts, source, dtype))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is meant as a checkpoint, complete or not."""
    return (path / "state.json").is_file() or (path / COMPLETE).is_file() or any(path.glob("rank-*.safetensors"))


def checkpoint_parts(path: Path, weights: Weights) -> dict[str, Stored]:
    """The model that a checkpoint in a run directory is of; a prior comes with the run's finished codec."""
    saved = Checkpoint(path)
    content = {**saved.state.get("model", {}), "step": saved.step}
    tensors: Mapping[str, Tensor] = saved.tensors("weight" if weights == "raw" else "ema")
    if "codec" in content:
        return {"codec": Stored(content, tensors)}
    if "joint" in content:  # the compressor that makes the prior's latents is in there, too
        made_by = compressor_fingerprint(Chosen(tensors, lambda name: name.startswith(OWN)), content)
        content["codec_fingerprint"] = made_by
        tensors = Chosen(tensors, lambda name: not name.startswith(OWN))
    run = path.resolve().parents[2]
    prior = Stored(content, tensors, run / "vocabulary.json", tokenizer_of(content, path))
    return {"codec": exported(find_parts(run).codec), "prior": prior}


def exported_parts(folder: Path, stage: str, weights: Weights) -> dict[str, Stored]:
    """The finished stages of a run directory, or the parts of a model folder."""
    found = find_parts(folder, stage)
    parts = {"codec": exported(found.codec)}
    if found.prior is not None:
        parts["prior"] = exported(found.prior)
    if weights == "raw":
        last = found.prior or found.codec
        checkpoint = latest(folder / "checkpoints" / last.name)
        if checkpoint is None:
            raise CheckpointError(
                f"{folder} has no checkpoint of {last.name!r}",
                "exported weights are averages; those the optimizer left are in checkpoints alone",
                "--weights ema, or name a checkpoint",
                DOCS,
            )
        parts |= {name: part for name, part in checkpoint_parts(checkpoint, weights).items() if name == list(parts)[-1]}
    return parts


def exported(folder: Path) -> Stored:
    """A folder as `export_weights` writes it."""
    content = read_weights_config(folder)
    if "prior" not in content:
        return Stored(with_fingerprint(content, folder), StoredWeights(folder))
    own = folder / "tokenizer"
    tokenizer = own if own.is_dir() else tokenizer_of(content, folder)
    return Stored(content, StoredWeights(folder), folder / "vocabulary.json", tokenizer)


def tokenizer_of(content: dict[str, Any], source: Path) -> Path:
    """The folder of the tokenizer that a prior was trained with. CheckpointError when `content` is not a prior's."""
    return Path(described_prior(content, source).config.tokenizer)


def origin_of(source: Path, stage: str, weights: Weights) -> Origin:
    """What a model folder says of a source: its sampling settings, and the figures that `unicom eval` measured."""
    if (source / MODEL_INDEX).is_file():
        before = read_manifest(source)
        return Origin(before.get("weights", "ema"), sampling_of(source), before.get("evaluation", {}))
    run = source.resolve().parents[2] if is_checkpoint(source) else source
    sampling = load_recipe(run).config.sample if (run / "config.yaml").is_file() else SampleConfig()
    evaluation = figures(run / "eval.json") if run == source and not stage and weights == "ema" else {}
    return Origin(weights, sampling, evaluation)


def figures(path: Path) -> dict[str, Any]:
    """{metric (split): value} of a run's quick suite; {} if it was not evaluated."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {f"{row['metric']} ({row['split']})": row["value"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_model(folder: Path, parts: Mapping[str, Stored], origin: Origin, dtype: torch.dtype) -> None:
    """A model folder as `UniComPipeline.from_pretrained` reads it. CheckpointError when its parts do not fit."""
    if "prior" in parts:
        check_pair(parts["codec"].content, parts["prior"].content, folder)
    for name, part in parts.items():
        more = text_files(part.text(), part.tokenizer) if name == "prior" else None
        export_weights(folder / name, part.content, part.tensors, more, dtype)
    write_index(folder, list(parts), EncoderConfig.model_validate(parts["codec"].content["encoder"]), origin)


def write_backbone(folder: Path, parts: Mapping[str, Stored], source: Path, dtype: torch.dtype) -> None:
    """The prior's backbone and tokenizer as a Qwen2.5 folder. CheckpointError when there is no prior."""
    if "prior" not in parts:
        raise CheckpointError(
            f"{source} has no prior",
            "the backbone is a part of it",
            "let the training reach the end of a prior stage, or name one of its checkpoints",
            DOCS,
        )
    prior = parts["prior"]
    vocabulary = prior.text()
    special = {
        "bos_token_id": vocabulary.control["<|endoftext|>"],
        "eos_token_id": vocabulary.control["<|im_end|>"],
    }
    write_qwen(folder, described_prior(prior.content, source).config, prior.tensors, special, dtype)
    if vocabulary.kind == "full":
        copy_tokenizer(prior.tokenizer, folder)
    else:
        vocabulary.save(folder / "vocabulary.json")
        log.warning(
            "the vocabulary is trimmed, which no Hugging Face tokenizer can express: %s has the rows' texts instead",
            "vocabulary.json",
        )


def text_files(vocabulary: Vocabulary, tokenizer: Path) -> Callable[[Path], None]:
    """Writes the vocabulary, and the tokenizer that a full one only names, into a prior's folder."""

    def write(folder: Path) -> None:
        vocabulary.save(folder / "vocabulary.json")
        if vocabulary.kind == "full":
            (folder / "tokenizer").mkdir()
            copy_tokenizer(tokenizer, folder / "tokenizer")

    return write


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The files of a tokenizer that are there."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_index(folder: Path, parts: list[str], encoder: EncoderConfig, origin: Origin | None = None) -> None:
    """model_index.json and what belongs to it, which make a folder with these parts a model folder."""
    describe_folder(folder, parts, default_grid(encoder), origin or Origin())
