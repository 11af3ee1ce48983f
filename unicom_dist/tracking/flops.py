"""Mask-exact floating-point operations of a prior step, and what they are compared with for MFU.

A multiplication and an addition count as two: forward 2 per weight and position, backward twice that. Only query-key
pairs that see each other count, so padding, hidden pairs and recomputation never raise MFU.
Symbols: h hidden, a query heads, k key-value heads, c channels per head, f MLP width, V vocabulary, L layers.
Ref: Chowdhery et al. 2022 (PaLM), appendix B, for model FLOPs utilisation.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.segments import PackedBatch, Segment


def visible_pairs(segments: Iterable[Segment]) -> int:
    """Query-key pairs that see each other, summed over the samples (equals `visible(segments).sum()`)."""
    pairs = 0
    sample, seen = -1, 0  # `seen`: positions of this sample that later segments see
    for segment in segments:
        if segment.sample != sample:
            sample, seen = segment.sample, 0
        n = segment.length
        pairs += n * seen + (n * (n + 1) // 2 if segment.mode == "causal" else n * n)
        if segment.mode != "noise":
            seen += n
    return pairs


def layer_weights(config: PriorConfig) -> int:
    """Weights of the matrices of one backbone layer: queries, keys, values, output and the gated MLP."""
    head_channels = config.hidden // config.heads
    attention = 2 * config.hidden * config.heads * head_channels + 2 * config.hidden * config.kv_heads * head_channels
    return attention + 3 * config.hidden * config.ffn


def prior_flops(
    config: PriorConfig,
    batch: PackedBatch,
    vocab_size: int,
    *,
    time_channels: int = 256,
    backbone_frozen: bool = False,
) -> int:
    """Operations of forward and backward over `batch` (this rank's; sum over micro-batches and ranks for a step).

    6 per backbone weight and position (4 when the backbone is frozen: gradients pass through, its weights get none),
    12 L a c per visible pair, 6 V h per label, and the towers: input projections get no gradient for their input.
    """
    h, latents, images = config.hidden, batch.latents.shape[0], batch.features.shape[0]
    d, channels = batch.latents.shape[1], batch.features.shape[1]
    per_weight = 4 if backbone_frozen else 6
    backbone = per_weight * batch.num_positions * config.layers * layer_weights(config)
    attention = 12 * config.layers * h * visible_pairs(batch.segments)
    head = per_weight * batch.label_ids.shape[0] * vocab_size * h
    latent_in = 4 * latents * d * h
    time_embedding = latents * (4 * time_channels * h + 6 * h * h)
    connector = images * (4 * channels * h + 6 * h * h)
    flow_head = 6 * latents * h * d
    return backbone + attention + head + latent_in + time_embedding + connector + flow_head


@dataclass(frozen=True)
class Peak:
    """What the device of one rank could do: `flops_per_s`, and `source` to be said wherever MFU is shown."""

    flops_per_s: float
    source: str


# Dense bfloat16 tensor-core figures of the makers' data sheets.
_DATASHEET_BF16 = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}


def device_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Peak:
    """The data sheet's figure for known GPUs in bfloat16, else the best of square GEMMs timed for about `seconds`.

    All ranks of a machine should call it at the same time, so that what they share is measured as shared.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, flops in _DATASHEET_BF16.items():
            if model in name and dtype == torch.bfloat16:
                return Peak(flops, f"data sheet of {model}, bfloat16")
    return measure_peak(device, dtype, seconds)


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> Peak:
    """Times square matrix products on `device` with the threads this process has; the fastest counts."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    best_s, until = float("inf"), time.perf_counter() + seconds
    with torch.no_grad():
        a @ b
        while best_s == float("inf") or time.perf_counter() < until:
            _synchronize(device)
            start = time.perf_counter()
            a @ b
            _synchronize(device)
            best_s = min(best_s, time.perf_counter() - start)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Peak(2 * n**3 / best_s, f"measured: {n} x {n} GEMM, {str(dtype).removeprefix('torch.')}, {where}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
