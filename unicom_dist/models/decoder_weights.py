"""Initial weights of a decoder that starts from a published FLUX: `config.json` and one or several safetensors files.

Tensors are read one by one, when they are asked for. What FLUX lacks (the projector, adapters) is drawn; the pooled
vector comes from its own file.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import DecoderConfig
from unicom_dist.models.decoder import DiffusionDecoder
from unicom_dist.models.decoder_training import plain_name
from unicom_dist.models.init import Source, initial
from unicom_dist.models.published import readable
from unicom_dist.parallel.engine import Piece

# Our key, the published one, and the default of FluxTransformer2DModel where a config.json leaves it out.
FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("double_blocks", "num_layers", 19),
    ("single_blocks", "num_single_layers", 38),
    ("heads", "num_attention_heads", 24),
    ("head_dim", "attention_head_dim", 128),
    ("rope_axes", "axes_dims_rope", (16, 56, 56)),
    ("text_channels", "joint_attention_dim", 4096),
    ("pooled_channels", "pooled_projection_dim", 768),
    ("guidance_embeds", "guidance_embeds", False),
)
DOCS = "docs/codec.md"


def decoder_source(decoder: DiffusionDecoder, seed: int, prefix: str = "decoder.") -> Source:
    """Values of `decoder`'s parameters, which are called `prefix`… and may be on the meta device.

    ConfigError: the configuration describes another FLUX. CheckpointError: files damaged, or tensors missing, unknown
    or of another shape.
    """
    config, drawn = decoder.config, drawn_source(seed)
    folder = transformer_folder(config.init_from)
    check_architecture(config, folder)
    own = {plain_name(name): tuple(p.shape) for name, p in decoder.flux.named_parameters() if ".lora_" not in name}
    published = Published(folder)
    published.check(own)

    def source(piece: Piece) -> Tensor:
        name = piece.name.removeprefix(prefix)
        if name == "pooled":
            return pooled_vector(config)
        if name.startswith("flux.") and ".lora_" not in name:
            return published.read(plain_name(name.removeprefix("flux.")))
        return drawn(piece)

    return source


def drawn_source(seed: int) -> Source:
    """Weights from the seed alone; the second half of an adapter is zero."""
    return lambda piece: torch.zeros(piece.cut) if ".lora_B." in piece.name else initial(piece, seed)


class Published:
    """The tensors of all safetensors files of a folder. CheckpointError: none there, or damaged ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[Path, Any]] = {}
        with ExitStack() as stack:
            for path in sorted(folder.glob("*.safetensors")):
                stack.enter_context(readable(path))
                file: Any = safe_open(path, framework="pt")
                self._files |= dict.fromkeys(file.keys(), (path, file))

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """CheckpointError unless these tensors of these shapes are there, and no others."""
        stored = {name: tuple(file.get_slice(name).get_shape()) for name, (_, file) in self._files.items()}
        wrong = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
        if wrong:
            shown = [
                f"{name} is {list(stored[name]) if name in stored else 'absent'},"
                f" the decoder has {list(wanted[name]) if name in wanted else 'none'}"
                for name in wrong[:3]
            ]
            raise CheckpointError(
                f"codec.decoder.init_from = {self._folder}: {len(wrong)} of {len(wanted)} tensors do not fit",
                "; ".join(shown),
                "a folder with all *.safetensors of one FluxTransformer2DModel",
                DOCS,
            )

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        path, file = self._files[name]
        with readable(path):
            values: Tensor = file.get_tensor(name)
        return values


def transformer_folder(path: str) -> Path:
    """`path`, or `path/transformer` where a whole published model is named."""
    return Path(path) / "transformer" if (Path(path) / "transformer").is_dir() else Path(path)


def check_architecture(config: DecoderConfig, folder: Path) -> None:
    """ConfigError naming every key in which the recipe and `folder/config.json` differ; CheckpointError: not FLUX's."""
    try:
        published: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"codec.decoder.init_from = {folder}",
            f"no readable config.json there: {error}",
            "the folder of a published FluxTransformer2DModel",
            DOCS,
        ) from error
    kind = published.get("_class_name", "FluxTransformer2DModel")
    if kind != "FluxTransformer2DModel" or published.get("patch_size", 1) != 1:
        raise CheckpointError(
            f"codec.decoder.init_from = {folder}",
            f"a {kind} with patch_size = {published.get('patch_size', 1)}",
            "the folder of a FluxTransformer2DModel with patch_size 1, such as FLUX.1-dev's transformer/",
            DOCS,
        )
    expected = {field: published.get(key, default) for field, key, default in FIELDS}
    expected["rope_axes"] = tuple(expected["rope_axes"])
    different = {field: value for field, value in expected.items() if getattr(config, field) != value}
    if different:
        raise ConfigError(
            "codec.decoder: " + ", ".join(f"{field} = {getattr(config, field)}" for field in different),
            f"the weights in {folder} belong to another architecture",
            " ".join(f"codec.decoder.{field}={json.dumps(value)}" for field, value in different.items()),
            DOCS,
        )


def pooled_vector(config: DecoderConfig) -> Tensor:
    """The only tensor of the file `config.pooled_path`, flattened. CheckpointError: another shape, or unreadable."""
    path = Path(config.pooled_path)
    with readable(path), safe_open(path, framework="pt") as file:
        tensors: list[Tensor] = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    if len(tensors) != 1 or tensors[0].numel() != config.pooled_channels:
        found = ", ".join(str(list(tensor.shape)) for tensor in tensors) or "nothing"
        raise CheckpointError(
            f"codec.decoder.pooled_path = {path}: it holds {found}",
            f"one vector of pooled_channels = {config.pooled_channels} values is needed",
            "save the pooled text embedding of an empty prompt there, alone",
            DOCS,
        )
    return tensors[0].reshape(-1)
