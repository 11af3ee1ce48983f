"""What a model folder says beside its weights, in the files where diffusers and transformers look for it.

    model_index.json                           the class of every part
    latent_stats.json                          mean and std of the latents that the prior draws
    scheduler_prior/, scheduler_decoder/       the two flows' shift, and which way their times run
    generation_config.json                     how pictures are drawn unless asked otherwise; tokens that end texts
    preprocessor_config.json                   the encoder, which is not in the folder
    manifest.json                              size and sha256 of every file, and what the weights come from
Folders without these (but model_index.json) are read as well.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unicom_dist import __version__
from unicom_dist.checkpoint.tensorfile import write_synced
from unicom_dist.checkpoint.weights import read_weights_config
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.schema import CodecConfig, EncoderConfig, PriorConfig, SampleConfig
from unicom_dist.config.storage import reason
from unicom_dist.data.buckets import Buckets
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.flow import shift_factor
from unicom_dist.models.target import patch_count

DOCS = "docs/checkpoints.md"
INDEX = "model_index.json"
MANIFEST = "manifest.json"
STATS = "latent_stats.json"
GENERATION = "generation_config.json"
CODEC = ("unicom_dist.models.codec", "Codec")
PRIOR = ("unicom_dist.models.transfusion", "Transfusion")
QUERY_GUIDED = ("unicom_dist.models.query_guided", "QueryGuided")
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
CONVENTION = {
    "time": "t = 0 is noise, t = 1 is data; sigma = 1 - t",
    "sigmas": "for N steps 1 - i / N, i = 0 … N - 1, moved by the shift s: s sigma / (1 + (s - 1) sigma); then 0",
    "velocity": "the networks predict data - noise; diffusers' schedulers take its negative",
}


@dataclass(frozen=True)
class Origin:
    """What the weights alone do not tell."""

    weights: str = "ema"
    sampling: SampleConfig = field(default_factory=SampleConfig)
    evaluation: dict[str, Any] = field(default_factory=dict)


def describe_folder(folder: Path, parts: list[str], square: tuple[int, int], origin: Origin) -> None:
    """Write all of the files above into a folder that has its parts. square: feature grid of a square picture."""
    contents = {name: read_weights_config(folder / name) for name in parts}
    codec, encoder = (contents["codec"][name] for name in ("codec", "encoder"))
    _write(folder / "scheduler_decoder" / "scheduler_config.json", decoder_scheduler(CodecConfig.model_validate(codec)))
    generation: dict[str, Any] = {}
    if "prior" in parts:
        content = contents["prior"]
        grid = CodecConfig.model_validate(codec).compressor.latent_grid(square)
        config = PriorConfig.model_validate(content["prior"])
        values = math.prod(grid) * int(content["latent_channels"])
        _write(folder / "scheduler_prior" / "scheduler_config.json", _scheduler(shift_factor(config, values)))
        _write(folder / STATS, {**content["stats"], "convention": "the prior draws (z - mean) / std of the latents z"})
        own = folder / "prior" / "tokenizer"
        vocabulary = Vocabulary.load(folder / "prior" / "vocabulary.json", own if own.is_dir() else config.tokenizer)
        control = vocabulary.control
        generation = {"bos_token_id": control["<|endoftext|>"], "eos_token_id": control["<|im_end|>"]}
    _write(folder / GENERATION, generation | {"sampling": origin.sampling.model_dump(mode="json")})
    identity = {"encoder_fingerprint": contents["codec"]["encoder_fingerprint"]}
    _write(folder / "preprocessor_config.json", preprocessing(EncoderConfig.model_validate(encoder)) | identity)
    index: dict[str, Any] = {"_class_name": "UniComPipeline", "_unicom_version": __version__}
    index |= {"codec": CODEC, "scheduler_decoder": ("diffusers", SCHEDULER)}
    if "prior" in parts:
        guided = contents["prior"].get("query", {}).get("enabled", False)
        index |= {"prior": QUERY_GUIDED if guided else PRIOR, "scheduler_prior": ("diffusers", SCHEDULER)}
    _write(folder / INDEX, index)
    _write(folder / MANIFEST, manifest(folder, contents, origin))


def decoder_scheduler(config: CodecConfig) -> dict[str, Any]:
    """scheduler_config.json of the decoder; its shift may follow the size of the picture, as in FLUX."""
    if config.resolution_shift:
        dynamic = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
        side = Buckets(config.decoder).shape_of(1, 1)
        return _scheduler(shift_factor(config, patch_count(config.decoder, *side)), **dynamic)
    return _scheduler(config.timestep_shift)


def _scheduler(shift: float, **dynamic: float) -> dict[str, Any]:
    """The configuration of diffusers' Euler scheduler. shift: of square pictures where it follows the size."""
    kind: dict[str, Any] = {"use_dynamic_shifting": bool(dynamic), **dynamic}
    if dynamic:
        kind["time_shift_type"] = "exponential"
    steps = {"num_train_timesteps": 1000, "shift": shift}
    return {"_class_name": SCHEDULER, **steps, **kind, "_convention": CONVENTION}


def preprocessing(encoder: EncoderConfig) -> dict[str, Any]:
    """preprocessor_config.json: how a picture enters the encoder, and which one that is."""
    scale = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    if encoder.kind == "siglip2":
        kind = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": encoder.max_patches, **scale}
    elif encoder.kind == "efficientnet-lite2":
        scale = {"image_mean": [127.0] * 3, "image_std": [128.0] * 3, "rescale_factor": 1.0}
        kind = {"size": {"height": encoder.image_px, "width": encoder.image_px}, **scale}
    else:
        kind = scale
    return {**kind, "encoder": encoder.model_dump(mode="json")}


def manifest(folder: Path, contents: dict[str, dict[str, Any]], origin: Origin) -> dict[str, Any]:
    """What manifest.json says: its files, and per part step, recipe, stage and data."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    parts = {name: {"step": content.get("step"), **content.get("provenance", {})} for name, content in contents.items()}
    said = {"weights": origin.weights, "parts": parts}
    return said | ({"evaluation": origin.evaluation} if origin.evaluation else {}) | {"files": files}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json; {} of a folder that has none. CheckpointError: it cannot be read."""
    if not (folder / MANIFEST).is_file():
        return {}
    return _read(folder / MANIFEST)


def problems_of(folder: Path, contents: bool = True) -> list[str]:
    """What differs from manifest.json: missing files, other sizes and, with `contents`, other digests."""
    problems = []
    for name, said in read_manifest(folder).get("files", {}).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != said["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {said['bytes']}")
        elif contents and _sha256(path) != said["sha256"]:
            problems.append(f"{name} has another content")
    return problems


def check_folder(folder: Path) -> None:
    """CheckpointError unless the files have the sizes that were written and the statistics are those of the prior.

    Digests are not looked at here: reading all weights twice takes as long as loading them.
    """
    problems = problems_of(folder, contents=False)
    if not problems and (folder / STATS).is_file():
        said, own = _read(folder / STATS), read_weights_config(folder / "prior").get("stats", {})
        problems = [f"{STATS}: {name} is not the prior's" for name in ("mean", "std") if said[name] != own.get(name)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder} is not as it was exported", "; ".join(problems[:3]) + more, "copy or export it again", DOCS
        )


def sampling_of(folder: Path) -> SampleConfig:
    """How a model folder says pictures are drawn; the defaults where it says nothing. CheckpointError: not readable."""
    if not (folder / GENERATION).is_file():
        return SampleConfig()
    try:
        return SampleConfig.model_validate(_read(folder / GENERATION).get("sampling", {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{folder / GENERATION}: sampling.{'.'.join(map(str, first['loc']))}"
        raise CheckpointError(where, first["msg"], "correct it, or remove the file", DOCS) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read", reason(error), "copy or export the folder again", DOCS
        ) from None
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
