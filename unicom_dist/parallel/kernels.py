"""Which fused kernels this machine has, and which of them a run uses.

Every kernel stands behind a plain form with the same result, so none is needed. `auto` takes those in `FASTER`; the
others are there to be switched on and measured (benchmarks/gpu). PyPI's package `apex` is another project than
NVIDIA's.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unicom_dist.config.errors import PreflightError
from unicom_dist.config.schema import KernelsConfig

if TYPE_CHECKING:
    from torch import Tensor

BUILD = "build NVIDIA's from its source, https://github.com/NVIDIA/apex, with --cpp_ext --cuda_ext"
FASTER = frozenset(
    {"flex_attention"}
)  # a dense mask costs the square of a row; block-sparse kernels skip what is hidden


@dataclass(frozen=True)
class Found:
    """A kernel and whether it can be used here. `option`: its key under `kernels`, "" where there is none."""

    option: str
    title: str
    available: bool
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Kernels:
    """The kernels a run uses."""

    fused_adam: bool = False
    fused_norm: bool = False
    flex_attention: bool = False
    compile: bool = False


def detect(cuda: bool) -> list[Found]:
    """Every kernel, found without importing it. `cuda`: whether the ranks compute on GPUs."""
    return [*_apex(cuda), _transformer_engine(), _flex(cuda), _compiler(cuda)]


def choose(config: KernelsConfig, cuda: bool) -> Kernels:
    """The kernels to use. PreflightError for one that is `on` and cannot be used here."""
    chosen = {}
    for found in detect(cuda):
        if not found.option:
            continue
        switch = getattr(config, found.option)
        if switch == "on" and not found.available:
            raise PreflightError(
                f"kernels.{found.option} = on",
                f"{found.title}: {found.text}",
                f"{found.remedy + '; or ' if found.remedy else ''}kernels.{found.option}=auto",
                "docs/performance.md",
            )
        chosen[found.option] = found.available and (switch == "on" or (switch == "auto" and found.option in FASTER))
    return Kernels(**chosen)


def is_nvidia_apex() -> bool | None:
    """Whether the package `apex` is NVIDIA's; None when there is no such package."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    return any((Path(root) / "multi_tensor_apply").is_dir() for root in spec.submodule_search_locations or [])


def _apex(cuda: bool) -> Iterator[Found]:
    nvidia = is_nvidia_apex()
    parts = (
        ("fused_adam", "apex FusedAdam", "amp_C"),
        ("fused_norm", "apex FusedRMSNorm", "fused_layer_norm_cuda"),
        ("", "apex weight gradient accumulation", "fused_weight_gradient_mlp_cuda"),
    )
    for option, title, extension in parts:
        if nvidia is None:
            absent = "NVIDIA apex is not installed; torch's own kernels are used"
            yield Found(option, title, False, absent, BUILD if cuda else "")
        elif not nvidia:
            other = "the package apex that is installed is another project, not NVIDIA's"
            yield Found(option, title, False, other, f"pip uninstall apex, then {BUILD}")
        elif importlib.util.find_spec(extension) is None:
            yield Found(option, title, False, f"this apex was built without {extension}", BUILD)
        elif not cuda:
            yield Found(option, title, False, "there is no GPU it could run on")
        elif not option:
            yield Found(
                option, title, True, "found; not used: it adds to Megatron's own gradient buffers, and ZeRO has its own"
            )
        else:
            yield Found(option, title, True, "found")


def _transformer_engine() -> Found:
    title = "Transformer Engine"
    if importlib.util.find_spec("transformer_engine") is None:
        return Found("", title, False, "not installed; torch's own kernels are used")
    return Found("", title, True, "found; not used: in bfloat16 its kernels repeat apex's and torch's")


def _flex(cuda: bool) -> Found:
    option, title = "flex_attention", "FlexAttention"
    if not cuda:
        return Found(option, title, False, "there is no GPU, and on CPUs it has no backward pass")
    if importlib.util.find_spec("triton") is None:
        return Found(option, title, False, "it is compiled by triton, which is not installed", "pip install triton")
    return Found(option, title, True, f"in torch {importlib.metadata.version('torch')}")


def _compiler(cuda: bool) -> Found:
    option, title = "compile", "torch.compile"
    compiler = next(
        (path for name in (os.environ.get("CXX", ""), "g++", "clang++") if (path := shutil.which(name))), ""
    )
    if not compiler:
        return Found(option, title, False, "there is no C++ compiler", "install g++, or name one in CXX")
    if cuda and importlib.util.find_spec("triton") is None:
        return Found(option, title, False, "on GPUs it needs triton, which is not installed", "pip install triton")
    return Found(option, title, True, f"with {compiler}")


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, kernels: Kernels) -> Any:
    """A torch optimizer: AdamW with decoupled decay over `groups`, each with its `weight_decay`."""
    if kernels.fused_adam:
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, lr=0.0, betas=betas, eps=eps, adam_w_mode=True)
    import torch

    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def apex_rms_norm(x: "Tensor", weight: "Tensor", eps: float) -> "Tensor":
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, by NVIDIA apex; keeps x and a number per row."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    out: Tensor = fused_rms_norm_affine(x, weight, weight.shape, eps)
    return out
