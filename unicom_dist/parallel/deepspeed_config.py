"""DeepSpeed's configuration, generated from ours; `deepspeed.extra` is merged over it, key by key. Imports no torch."""

from typing import Any

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig

DOCS = "docs/parallelism.md"
PERSIST_ELEMENTS = 1 << 20  # ZeRO-3: parameters up to this size stay gathered between steps ...
PERSIST_TOTAL = 32 << 20  # ... as long as they are not more than this altogether (64 MiB in bfloat16)


def deepspeed_config(
    parallel: ParallelConfig, layout: Layout, precision: str, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a stage trained in `precision` under `layout` (ZeRO stage 1, 2 or 3).

    ConfigError when `extra` touches what the engine relies on.
    """
    low = precision == "bfloat16"
    zero: dict[str, Any] = {"stage": layout.zero_stage}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": low},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 31,
    }
    if layout.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0 if layout.gather_once else PERSIST_ELEMENTS
        zero["stage3_model_persistence_threshold"] = PERSIST_TOTAL
    else:
        zero["use_multi_rank_bucket_allreduce"] = False  # each part to its owner, not all to all: half the bytes
    if layout.zero_stage > 1:  # with stage 1 DeepSpeed chooses another optimizer, which cannot reduce once per step
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
