"""Which precision `precision: auto` means: bfloat16 where it is multiplied fast, float32 elsewhere.

A CPU without bfloat16 instructions emulates them, nine times slower than float32 (measured on one with AVX2 alone).
"""

from pathlib import Path

import torch

from unicom_dist.config.schema import Config
from unicom_dist.parallel.mesh import Mesh

CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo: Intel and AMD, Intel's tiles, Arm


def fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware."""
    if device.type != "cpu":
        return True
    try:
        words = CPUINFO.read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not CPU_FLAGS.isdisjoint(words)


def dtype_of(precision: str) -> torch.dtype:
    """Of forward and backward in a stage whose `precision` is decided."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that a stage's `precision` means on `device`."""
    return dtype_of("bfloat16" if precision == "auto" and fast_bfloat16(device) else precision)


def with_precision(config: Config, mesh: Mesh) -> Config:
    """`config` with every stage's `auto` decided, by what rank 0 computes on. Collective over the world."""
    decided = str(mesh.broadcast_object(training_dtype("auto", mesh.device))).removeprefix("torch.")
    stages = [s.model_copy(update={"precision": decided}) if s.precision == "auto" else s for s in config.stages]
    return config.model_copy(update={"stages": stages})
