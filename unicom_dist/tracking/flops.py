"""Mask-exact floating-point operations of a training step, and what they are compared with for MFU.

A multiplication and an addition count as two: forward 2 per weight and position, backward twice that. Only query-key
pairs that see each other count, so padding, hidden pairs and recomputation never raise MFU.
Ref: Chowdhery et al. 2022 (PaLM), appendix B, for model FLOPs utilisation.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.codec import Codec, CodecBatch
from unicom_dist.models.compressor import Projection
from unicom_dist.models.joint import image_lengths
from unicom_dist.models.operations import Amounts, layer_weights, transfusion_flops, visible_pairs
from unicom_dist.models.query_guided import Guide, query_segments
from unicom_dist.models.segments import PackedBatch
from unicom_dist.parallel.pipeline.split import TIME_CHANNELS


def prior_flops(
    config: PriorConfig,
    batch: PackedBatch,
    vocab_size: int,
    *,
    time_channels: int = TIME_CHANNELS,
    backbone_frozen: bool = False,
) -> int:
    """Operations of forward and backward over `batch` (this rank's; sum over micro-batches and ranks for a step)."""
    amounts = Amounts(
        batch.num_positions,
        visible_pairs(batch.segments),
        batch.label_ids.shape[0],
        batch.latents.shape[0],
        batch.features.shape[0],
        batch.times.shape[0],
    )
    return transfusion_flops(
        config,
        amounts,
        vocabulary=vocab_size,
        latent_channels=batch.latents.shape[1],
        feature_channels=batch.features.shape[1],
        time_channels=time_channels,
        backbone_frozen=backbone_frozen,
    )


def query_flops(config: PriorConfig, guide: Guide, batch: PackedBatch, vocab_size: int) -> int:
    """As `prior_flops`, of a guide and the frozen transformer that it asks.

    That transformer's layers cost 4 per weight and position, queries among these: gradients pass through them to the
    queries. Its ways in, and the language head, are only computed: 2. The guide's own maps cost 6, those of data 4, per
    row: a query, an image, a latent, or a latent or query.
    """
    h, lengths, queries = config.hidden, image_lengths(batch), guide.queries.weight.shape[0]
    asking = query_segments(batch.segments, queries)
    positions = sum(segment.length for segment in asking)
    total = 4 * positions * config.layers * layer_weights(config) + 12 * config.layers * h * visible_pairs(asking)
    shown = batch.latents.shape[0] - sum(lengths)
    latents, features = batch.latents.shape[1], batch.features.shape[1]
    timed = shown if config.time_injection == "add" else 0
    ways_in = (
        shown * latents * h + timed * (TIME_CHANNELS * h + h * h) + batch.features.shape[0] * (features * h + h * h)
    )
    total += 2 * (ways_in + batch.label_ids.shape[0] * vocab_size * h)
    rows = {"query": len(lengths) * queries, "image": len(lengths), "latent": sum(lengths)}
    rows["both"] = rows["query"] + rows["latent"]
    for name, module in guide.named_modules():
        if isinstance(module, nn.Linear):
            of_data = name in ("decoder.latent_in", "decoder.time.lift")
            total += (4 if of_data else 6) * rows[_guided_rows(name)] * module.weight.numel()
    wide, deep = guide.decoder.config.hidden, len(guide.decoder.layers)
    pairs = sum((queries + length) ** 2 for length in lengths)
    return total + 12 * (len(guide.connector.layers) * h * len(lengths) * queries**2 + deep * wide * pairs)


def _guided_rows(name: str) -> str:
    """What a linear map of a guide is applied to."""
    if name.startswith("connector."):
        return "query"
    if name.startswith("decoder.time.") or name.endswith(".modulation"):
        return "image"
    return "both" if name.startswith("decoder.layers.") else "latent"


def codec_flops(codec: Codec, batch: CodecBatch) -> int:
    """Operations of forward and backward of the codec over `batch`, without the perceptual network.

    Per weight and the rows it sees 2 forward, 2 for the gradient of its input (none where that is data) and 2 for its
    own (none where it is frozen); 12 K H per visible pair of the attentions, but for a resampler's
    four pairs per latent, which are no matrix products. Rows are the patches, the real latents, both, the features
    where a resampler reads them, or one per image.
    """
    images, patch = batch.images.shape[0], codec.config.decoder.patch_px
    patches = batch.noise.shape[2] * batch.noise.shape[3] // patch**2
    _, latents = codec.compressor.layout(batch.grid, batch.mask)
    assert latents is not None
    lengths: list[int] = latents.sum(1).tolist()
    rows = {"image": images, "patch": images * patches, "token": sum(lengths), "feature": int(batch.mask.sum())}
    rows["both"] = rows["patch"] + rows["token"]
    total = 0
    for name, module in codec.named_modules():
        if isinstance(module, nn.Linear):
            from_data = name.endswith("embedder.linear_1") or (
                name.endswith("x_embedder") and not codec.config.decoder.concat_tokens
            )
            passes = 2 + 2 * (not from_data) + 2 * module.weight.requires_grad
            total += passes * rows[_rows_of(name)] * module.weight.numel()
    decoder = codec.config.decoder
    joint = sum((patches + n) ** 2 for n in lengths) * decoder.heads * decoder.head_dim
    alone = sum(n**2 for n in lengths)
    widths = sum(int(module.query_bias.numel()) for module in codec.modules() if isinstance(module, Projection))
    return total + 12 * (joint * (decoder.double_blocks + decoder.single_blocks) + alone * widths)


def token_flops(modules: Iterable[nn.Module], lengths: Sequence[int]) -> int:
    """Operations of forward and backward of compressors and their like over images of so many tokens.

    6 per weight and token, 12 per channel and pair of tokens in attention.
    """
    parts = [part for module in modules for part in module.modules()]
    weights = sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))
    widths = sum(part.query_bias.numel() for part in parts if isinstance(part, Projection))
    return 6 * weights * sum(lengths) + 12 * widths * sum(n**2 for n in lengths)


def _rows_of(name: str) -> str:
    """What a linear map of the codec is applied to, by its place in the model."""
    if name == "compressor.resampler.key_value":
        return "feature"
    inner = name.removeprefix("decoder.flux.")
    if inner == name or inner == "context_embedder":
        return "token"
    if inner.startswith("time_text_embed") or inner.endswith(".linear"):
        return "image"
    if inner.startswith("single_transformer_blocks"):
        return "both"
    return "token" if any(part in inner for part in (".add_", ".to_add_out", ".ff_context")) else "patch"


def forward_flops(function: Callable[[], object]) -> int:
    """Operations of one call as torch counts them, for networks that have no formula here; costs the call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


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
