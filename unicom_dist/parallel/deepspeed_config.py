"""DeepSpeed's configuration, generated from ours; `deepspeed.extra` is merged over it, key by key. Imports no torch.

ZeRO++ is reached through `extra`: `{zero_optimization: {zero_hpz_partition_size: 8}}` keeps a second copy of the
weights within groups of 8 neighbouring ranks, from which backward passes gather; `zero_quantized_weights` and
`zero_quantized_gradients` send 8 and 4 bits (CUDA only, and not exact). `{communication_data_type: bf16}` halves the
bytes of the gradient reduction.
With `parallel.offload: nvme` the low-precision weights are there and the optimizer's state in host memory, as with
`cpu`: averaging and checkpoints read it.
"""

import difflib
from typing import Any

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.layout import DOCS, Layout
from unicom_dist.config.schema import ParallelConfig

PERSIST_ELEMENTS = 1 << 20  # ZeRO-3: parameters up to this size stay gathered between steps ...
REDUCE_ELEMENTS = 1 << 26  # gradients reduced in one call; the reduction takes a few times 256 MiB meanwhile
PERSIST_TOTAL = 32 << 20  # ... as long as they are not more than this altogether (64 MiB in bfloat16)
FREE = (  # what `extra` may hold at its top level
    "zero_optimization",
    "communication_data_type",
    "aio",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
)
_MICRO = (
    "all micro-batches of a step are reduced at once, which DeepSpeed does for 1 only",
    "stages.NAME.micro_batches",
)
_ORDER = ("it moves parameters within their group, and checkpoints know where each lies", "nothing: leave it out")
_OFFLOAD = ("where state is kept is ours to check", "parallel.offload and parallel.nvme_path")
_AXES = ("groups of ranks follow from the layout", "parallel.tp, pp and ulysses")
OURS = {  # keys that the engine relies on: why, and what to set instead
    "gradient_accumulation_steps": _MICRO,
    "managed_gradient_accumulation": _MICRO,
    "train_batch_size": _MICRO,
    "train_micro_batch_size_per_gpu": _MICRO,
    "gradient_clipping": (
        "the norm is taken over all ranks of all axes, which DeepSpeed does not know",
        "stages.NAME.clip",
    ),
    "optimizer": ("every engine has AdamW", "stages.NAME.weight_decay, betas and eps"),
    "scheduler": ("the learning rate is given at every step", "stages.NAME.lr, schedule and warmup"),
    **dict.fromkeys(
        ("bf16", "fp16", "data_types", "torch_autocast"),
        ("the engine keeps float32 weights and gradients beside one low precision", "stages.NAME.precision"),
    ),
    **dict.fromkeys(("tensor_parallel", "sequence_parallel_size", "pipeline"), _AXES),
    "zero_optimization.stage": ("another engine goes with another stage", "parallel.zero_stage"),
    **dict.fromkeys(("zero_optimization.round_robin_gradients", "zero_optimization.parameter_alignment"), _ORDER),
    **dict.fromkeys((f"zero_optimization.mics_{key}" for key in ("shard_size", "hierarchical_params_gather")), _AXES),
    **dict.fromkeys(
        (f"zero_optimization.offload_{of}.{key}" for of in ("param", "optimizer") for key in ("device", "nvme_path")),
        _OFFLOAD,
    ),
    "zero_optimization.zenflow": ("it updates weights at other times than the step", "nothing: leave it out"),
    "zero_optimization.offload_optimizer.super_offload": ("it has its own optimizer", "nothing: leave it out"),
    "zero_optimization.offload_optimizer.ratio": ("it needs an optimizer that is compiled", "nothing: leave it out"),
}


def deepspeed_config(
    parallel: ParallelConfig, layout: Layout, precision: str, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a stage trained in `precision` under `layout` (ZeRO stage 1, 2 or 3).

    ConfigError when `extra` sets what the engine relies on, or what cannot work under `layout`.
    """
    stage, offload = layout.zero_stage, parallel.offload
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_ELEMENTS}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bfloat16", "check_grad_overflow": False},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,
    }
    if stage > 1:  # in stage 1 DeepSpeed would choose another optimizer, which cannot reduce once per step
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0 if layout.gather_once else PERSIST_ELEMENTS
        zero["stage3_model_persistence_threshold"] = PERSIST_TOTAL
        zero["contiguous_gradients"] = False  # a buffer that a reduction once per step has no use for
    else:
        zero["use_multi_rank_bucket_allreduce"] = False  # each part to its owner, not all to all: half the bytes
        zero["compute_grad_norm"] = offload != "none"  # not ours to forbid there
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": offload, "pin_memory": True}
            if offload == "nvme":
                zero["offload_param"]["nvme_path"] = parallel.nvme_path
    check_extra(extra or {}, layout)
    return merged(settings, extra or {})


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `over`."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def check_extra(extra: dict[str, Any], layout: Layout) -> None:
    """ConfigError for a key of `deepspeed.extra` that the engine relies on, or that DeepSpeed ignores or cannot do."""
    for key, value in leaves(extra):
        parents = [key.rsplit(".", cut)[0] for cut in range(key.count("."), -1, -1)]
        owned = next((path for path in parents if path in OURS), None)
        if owned is not None:
            why, instead = OURS[owned]
            raise ConfigError(f"deepspeed.extra.{owned} = {value!r}", why, instead, DOCS)
        if key.split(".")[0] not in FREE:
            near = difflib.get_close_matches(key.split(".")[0], FREE, 1)
            raise ConfigError(
                f"deepspeed.extra.{key}",
                "DeepSpeed does not read it, or nothing is known of its effect on this trainer",
                f"did you mean {near[0]}?" if near else f"one of {', '.join(FREE)}",
                DOCS,
            )
        name, replicas = key.removeprefix("zero_optimization."), layout.dp * layout.ulysses
        if name == "zero_hpz_partition_size" and value > 1 and (layout.tp > 1 or replicas % value):
            raise ConfigError(
                f"deepspeed.extra.{key} = {value}",
                f"DeepSpeed makes groups of neighbouring ranks; here {replicas} ranks that are {layout.tp} apart split"
                " the weights",
                "tp = 1 and a divisor of dp x ulysses, or leave it out",
                DOCS,
            )
        if name == "zero_quantized_gradients" and value and layout.tp * layout.pp > 1:
            raise ConfigError(
                f"deepspeed.extra.{key} = {value}",
                "DeepSpeed sends them between all ranks of the world, which here hold different parts of the model",
                "tp = 1 and pp = 1, or leave it out",
                DOCS,
            )


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in `tree` that is not itself a mapping."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(f"{prefix}{key}", value)]
    return found
