"""SigLIP2 NaFlex: aspect ratio kept, at most `max_patches` patches of 16 x 16 pixels, attention over real patches only.

The network is transformers' `Siglip2VisionModel`; the tokens are its last hidden state after the final normalisation.
Preparing a picture equals transformers' `Siglip2ImageProcessor` without needing torchvision.
Shapes: P patches padded to the longest picture of the batch, features [n, D] of the real ones. Ref: arXiv:2502.14786.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import EncoderConfig
from unicom_dist.models.encoders.base import (
    DOCS,
    EncodedImage,
    Prepared,
    fingerprint,
    weights_digest,
    wrong_weights,
)
from unicom_dist.models.encoders.crop import crop_to_ratio
from unicom_dist.models.published import quietly

log = logging.getLogger(__name__)
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]


class Siglip2Encoder:
    """The `siglip2` encoder. ConfigError: folder or hub id without SigLIP2 vision weights."""

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

        folder = resolve(config, download=True)
        vision = _vision_config(folder)
        self.fingerprint = siglip2_fingerprint(config)
        self._device = device
        try:
            with quietly("transformers"):  # of the text tower, in hundreds of lines
                model, info = Siglip2VisionModel.from_pretrained(
                    folder, dtype=getattr(torch, config.dtype), local_files_only=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise wrong_weights(folder, config.kind, str(error)) from error
        # transformers only warns about tensors it did not find and leaves them random.
        if info["missing_keys"] or info["mismatched_keys"]:
            first = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[0]
            raise wrong_weights(folder, config.kind, f"tensor {first} is missing or has another shape")
        self.network: nn.Module = model.eval().requires_grad_(False).to(device)
        self.channels: int = model.config.hidden_size
        self.max_tokens = config.max_patches
        self._crop = config.crop == "bucket"
        self.patch_px = patch_side(vision)
        self._name = config.path

    def describe(self) -> str:
        return f"SigLIP2 NaFlex ({self._name}), up to {self.max_tokens} tokens of {self.channels} channels"

    def preprocess(self, image: Image.Image) -> Prepared:
        patches, grid = siglip2_view(image, self.patch_px, self.max_tokens, self._crop)
        return {"patches": patches, "grid": np.array(grid)}

    @torch.inference_mode()
    def encode(self, batch: Sequence[Prepared]) -> list[EncodedImage]:
        counts = [len(item["patches"]) for item in batch]
        longest = max(counts)
        patches = torch.zeros(len(batch), longest, batch[0]["patches"].shape[1], dtype=torch.uint8)
        for row, (item, count) in enumerate(zip(batch, counts, strict=True)):
            patches[row, :count] = torch.from_numpy(np.ascontiguousarray(item["patches"]))
        mask = torch.arange(longest) < torch.tensor(counts)[:, None]
        shapes = torch.from_numpy(np.stack([item["grid"] for item in batch]))
        tokens = self.tokens(patches.to(self._device), mask.to(self._device), shapes)
        features = tokens.float().cpu().numpy()
        return [
            EncodedImage(features[row, :count], (int(shapes[row, 0]), int(shapes[row, 1])))
            for row, count in enumerate(counts)
        ]

    def tokens(self, patches: Tensor, mask: Tensor, extent: Tensor) -> Tensor:
        """[B, n, D] of patches [B, n, p p 3] uint8; mask [B, n], True = real; extent [B, 2]: rows and columns."""
        dtype = next(self.network.parameters()).dtype
        pixels = torch.where(mask[..., None], patches / 127.5 - 1, 0.0)
        out = self.network(pixel_values=pixels.to(dtype), pixel_attention_mask=mask.int(), spatial_shapes=extent)
        hidden: Tensor = out.last_hidden_state
        return hidden


def siglip2_view(
    image: Image.Image, patch_px: int, max_patches: int, crop: bool
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """What the encoder sees, row-major patches [n, p p 3], each (row, column, channel), and their rows and columns.

    Bytes, so that they stay small until they are encoded.
    """
    image = crop_to_ratio(image.convert("RGB")) if crop else image.convert("RGB")
    rows, columns = naflex_grid(image.height, image.width, patch_px, max_patches)
    p = patch_px
    if image.size != (columns * p, rows * p):
        image = image.resize((columns * p, rows * p), Image.Resampling.BILINEAR)
    patches = np.asarray(image).reshape(rows, p, columns, p, 3).swapaxes(1, 2).reshape(rows * columns, p * p * 3)
    return patches, (rows, columns)


def siglip2_view_of(config: EncoderConfig) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """`siglip2_view` of the configured encoder, without building it."""
    side, crop = patch_side(_vision_config(resolve(config, download=False))), config.crop == "bucket"
    return lambda image: siglip2_view(image, side, config.max_patches, crop)[0]


def naflex_grid(height: int, width: int, patch_px: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches: the largest common scale at which rows x columns <= max_patches.

    Sides are rounded up to whole patches. The scale is found by bisection to 1e-5, as published: the rounding of the
    last step decides the grid.
    """
    low, high = 1e-6, 100.0

    def sides(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch_px)), max(1, math.ceil(width * scale / patch_px))

    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = sides(middle)
        low, high = (middle, high) if rows * columns <= max_patches else (low, middle)
    return sides(low)


def resolve(config: EncoderConfig, *, download: bool) -> Path:
    """Local folder of `encoder.path`: the folder itself, or the snapshot of a hub id (fetched only if `download`)."""
    path = Path(config.path)
    if config.path and path.is_dir():
        return path
    if config.path.count("/") == 1 and not config.path.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            if download:
                log.info("encoder %s: taken from the model hub unless it is there already", config.path)
            return Path(snapshot_download(config.path, allow_patterns=_FILES, local_files_only=not download))
        except Exception as error:  # the client raises a dozen unrelated classes for "not reachable"
            raise ConfigError(
                f"encoder.path = {config.path!r} is neither a folder here nor a model the hub gave",
                str(error).splitlines()[0][:200],
                ("" if download else "`unicom features run` fetches it; or ")
                + "name a local folder with config.json and model.safetensors, or use encoder.kind=efficientnet-lite2",
                DOCS,
            ) from error
    raise ConfigError(
        f"encoder.path = {config.path!r} is not a folder",
        "the siglip2 encoder reads published weights (config.json, *.safetensors) from a folder or a hub id",
        "name the folder, or a hub id such as google/siglip2-so400m-patch16-naflex",
        DOCS,
    )


def _vision_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise wrong_weights(folder, "siglip2", f"config.json cannot be read: {error}") from error
    if not str(config.get("model_type", "")).startswith("siglip2"):
        raise wrong_weights(folder, "siglip2", f"config.json says model_type = {config.get('model_type')!r}")
    vision: dict[str, Any] = config.get("vision_config", config)
    return vision


def patch_side(vision: dict[str, Any]) -> int:
    """Pixels per side of a patch."""
    return int(vision.get("patch_size", 16))


def siglip2_fingerprint(config: EncoderConfig) -> str:
    """Identity of the features without building the network; reads the weight files once."""
    folder = resolve(config, download=False)
    vision = _vision_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise wrong_weights(folder, "siglip2", "no .safetensors file there")
    cut = ", cut to one of 33 ratios" if config.crop == "bucket" else ""
    view = f"naflex, bilinear, patch {patch_side(vision)}, at most {config.max_patches} patches{cut}"
    return fingerprint(
        {
            "kind": config.kind,
            "weights": weights_digest(files),
            "view": view,
            "dtype": config.dtype,
        }
    )


def siglip2_shape(config: EncoderConfig) -> tuple[int, int]:
    """Most tokens, and channels."""
    return config.max_patches, int(_vision_config(resolve(config, download=False)).get("hidden_size", 768))
