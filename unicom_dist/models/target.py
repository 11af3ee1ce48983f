"""What the decoder draws: pixels, or the latents of a frozen VAE.

A target space turns pictures into what the flow runs over and back. The VAE is no part of the codec: no checkpoint,
average or export holds it, and its `fingerprint` says which one a codec was trained with.
Shapes: B pictures [3, H, W] in [-1, 1]; c channels and `scale` pixels per side of a cell of the target space.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import DecoderConfig
from unicom_dist.models.diffusers_classes import diffusers_class
from unicom_dist.models.encoders.base import fingerprint, weights_digest
from unicom_dist.models.published import quietly

DOCS = "docs/codec.md"
KINDS = ("AutoencoderKL", "AutoencoderTiny")
ENCODED_TOGETHER = 1 << 20  # pixels; the VAE's activations at full resolution are the memory peak of a codec step


def target_shape(config: DecoderConfig, height: int, width: int) -> tuple[int, int, int]:
    """(c, h, w) of a picture of height x width pixels. ConfigError unless a cell or patch covers whole pixels."""
    vae = config.space == "vae"
    channels, scale = (config.vae_channels, config.vae_scale) if vae else (3, 1)
    unit = scale * config.patch_px
    if height % unit or width % unit:
        raise ConfigError(
            f"a picture of {height} x {width} pixels",
            f"the decoder draws patches of {unit} x {unit} pixels",
            f"use sides that are multiples of {unit}",
            DOCS,
        )
    return channels, height // scale, width // scale


def patch_count(config: DecoderConfig, height: int, width: int) -> int:
    """Patches of a picture of height x width pixels. ConfigError as `target_shape`."""
    _, rows, columns = target_shape(config, height, width)
    return (rows // config.patch_px) * (columns // config.patch_px)


class Target(Protocol):
    """A target space. `fingerprint` is empty where there are no weights."""

    channels: int
    scale: int
    fingerprint: str

    def encode(self, images: Tensor) -> Tensor:
        """[B, c, H/scale, W/scale] float32 of images [B, 3, H, W]. No gradient."""

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32, not clamped, of z [B, c, H/scale, W/scale]; differentiable."""

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """As `target_shape`."""


class PixelTarget:
    """The pixels themselves."""

    channels, scale, fingerprint = 3, 1, ""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config

    def encode(self, images: Tensor) -> Tensor:
        return images.float()

    def decode(self, z: Tensor) -> Tensor:
        return z.float()

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return target_shape(self._config, height, width)


class VaeTarget:
    """Normalised latents of a frozen VAE in float32: (mode of the posterior - shift) x scaling factor.

    Reads the folder's config.json and its weights. CheckpointError: they are missing, damaged or of another kind.
    ConfigError: channels or scale are not those of the configuration.
    """

    def __init__(self, config: DecoderConfig, device: torch.device | str = "cpu") -> None:
        self._config = config
        folder = vae_folder(config.vae_path)
        self._vae, published = load_vae(folder)
        self._vae.to(device)
        self.channels = int(published["latent_channels"])
        self.scale = 2 ** (len(published.get("block_out_channels") or published["decoder_block_out_channels"]) - 1)
        self._factor = float(published.get("scaling_factor") or 1.0)
        self._shift = float(published.get("shift_factor") or 0.0)
        self.fingerprint = vae_fingerprint(config)
        if (self.channels, self.scale) != (config.vae_channels, config.vae_scale):
            raise ConfigError(
                f"codec.decoder: vae_channels = {config.vae_channels}, vae_scale = {config.vae_scale}",
                f"the VAE in {folder} has {self.channels} channels and {self.scale} pixels a cell",
                f"codec.decoder.vae_channels={self.channels} codec.decoder.vae_scale={self.scale}",
                DOCS,
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        together = max(1, ENCODED_TOGETHER // (images.shape[2] * images.shape[3]))
        latents = []
        for some in torch.split(images.float(), together):
            encoded = self._vae.encode(some)
            latents.append(encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents)
        return (torch.cat(latents) - self._shift) * self._factor

    def decode(self, z: Tensor) -> Tensor:
        """See `Target`. Without gradients, pictures larger than `vae_tile_px` are decoded in tiles that overlap."""
        tile = self._config.vae_tile_px
        self._vae.use_tiling = tile > 0 and not torch.is_grad_enabled()
        if self._vae.use_tiling:
            self._vae.tile_sample_min_size, self._vae.tile_latent_min_size = tile, tile // self.scale
        images: Tensor = self._vae.decode(z.float() / self._factor + self._shift).sample
        return images

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        return target_shape(self._config, height, width)


def build_target(config: DecoderConfig, device: torch.device | str = "cpu") -> Target:
    """The configured target space, its weights on `device`. Errors as `VaeTarget`."""
    return VaeTarget(config, device) if config.space == "vae" else PixelTarget(config)


def vae_fingerprint(config: DecoderConfig) -> str:
    """Digest of the VAE's weights and of how its latents are normalised, without building it; "" in pixels.

    CheckpointError as `VaeTarget`.
    """
    if config.space != "vae":
        return ""
    folder = vae_folder(config.vae_path)
    published = read_config(folder)
    normalisation = {key: published.get(key) for key in ("_class_name", "scaling_factor", "shift_factor")}
    return fingerprint({"weights_sha256": weights_digest(weight_files(folder)), **normalisation})


def check_vae(config: DecoderConfig, expected: str) -> None:
    """CheckpointError unless the configured VAE has the fingerprint `expected`, that of a codec's training."""
    found = vae_fingerprint(config)
    if found != expected:
        raise CheckpointError(
            f"the VAE in {config.vae_path!r} is not the one the codec was trained with",
            f"its fingerprint is {found}, the codec's is {expected}: its latents mean something else",
            "name the VAE of the training in codec.decoder.vae_path",
            DOCS,
        )


def vae_folder(path: str) -> Path:
    """`path`, or `path/vae` where a whole published model is named."""
    return Path(path) / "vae" if (Path(path) / "vae").is_dir() else Path(path)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. CheckpointError when it is not a VAE's that is known here."""
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _foreign(folder, f"no readable config.json there: {error}") from error
    if content.get("_class_name") not in KINDS:
        raise _foreign(folder, f"its config.json is of a {content.get('_class_name', 'model without a class name')}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files. CheckpointError when there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise _foreign(folder, "no *.safetensors there")
    return files


def load_vae(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The VAE, frozen, in evaluation mode, float32, and its config.json."""
    published = read_config(folder)
    weight_files(folder)
    try:
        kind = diffusers_class(published["_class_name"])
        with quietly("diffusers"):
            vae, found = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers raises many kinds for a folder that does not fit itself
        raise _foreign(folder, f"{type(error).__name__}: {error}") from error
    # diffusers only warns of tensors that it left random, and of those that it left out.
    for what in ("missing", "unexpected"):
        if names := sorted(found[f"{what}_keys"]):
            raise _foreign(folder, f"{len(names)} tensors are {what}, {names[0]} among them")
    return vae.eval().requires_grad_(False), published


def _foreign(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"codec.decoder.vae_path: no VAE in {folder}",
        " ".join(why.split())[:300],
        f"name the folder of a diffusers {' or '.join(KINDS)} with its safetensors",
        DOCS,
    )
