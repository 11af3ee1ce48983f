"""How ranks share the work, and with which kernels."""

from typing import Any, Literal

from pydantic import Field, PositiveInt

from unicom_dist.config.layout import Recompute, Schedule
from unicom_dist.config.schema.base import Section, Switch


class ParallelConfig(Section):
    """How the ranks share the model and the data."""

    nproc: PositiveInt = Field(1, description="processes started on this machine")
    tp: PositiveInt = Field(1, description="tensor parallelism: ranks that share each layer's matrices")
    pp: PositiveInt = Field(1, description="pipeline parallelism: ranks that hold different layers")
    ulysses: PositiveInt = Field(1, description="ranks that share the positions of a row; within attention they share its heads")
    sequence_parallel: bool = Field(True, description="with tp > 1: split the positions between the layers as well")
    zero_stage: Literal[0, 1, 2, 3] = Field(3, description="what the replicas split: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights (DeepSpeed)")
    gather_once: bool = Field(False, description="ZeRO-3: gather the weights once a step, not once per use, and hold them in low precision meanwhile")
    schedule: Schedule = Field("1f1b", description="order of the micro-batches in the pipeline")
    pp_stages_per_rank: PositiveInt = Field(1, description="slices of layers per rank; more than 1 with schedule: interleaved")
    recompute: Recompute = Field("none", description="activations computed again in the backward pass: norms and SiLU (selective) or whole layers (full)")
    offload: Literal["none", "cpu", "nvme"] = Field("none", description="where DeepSpeed keeps optimizer state and, in ZeRO-3, weights")
    nvme_path: str = Field("", description="folder for offload: nvme")
    threads: int = Field(0, ge=0, description="CPU threads per rank; 0 = cores / nproc")
    timeout_s: PositiveInt = Field(600, description="a collective that takes longer than this ends the run, seconds")
    stall_s: PositiveInt = Field(300, description="a rank without a finished step for so long has its stack logged and ends the run, seconds")


class DeepSpeedConfig(Section):
    """What DeepSpeed gets besides what follows from `parallel` and the stage."""

    extra: dict[str, Any] = Field(default_factory=dict, description="merged over the generated DeepSpeed configuration, key by key")


class KernelsConfig(Section):
    """Fused kernels: `on` insists on one, `off` leaves it, `auto` takes it where it is there and known to be faster."""

    fused_adam: Switch = Field("auto", description="AdamW of NVIDIA apex in the ZeRO engines (plain replicas update in one call anyway)")
    fused_norm: Switch = Field("auto", description="RMSNorm of NVIDIA apex")
    flex_attention: Switch = Field("auto", description="FlexAttention over the packed row with a block mask; `auto`: on GPUs")
    compile: Switch = Field("auto", description="torch.compile of norm, rotation and activation, forward and backward")
