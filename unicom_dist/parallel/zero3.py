"""ZeRO-3 with DeepSpeed's settings as generated from nothing but the precision."""

from torch import nn

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig
from unicom_dist.parallel.deepspeed_config import deepspeed_config
from unicom_dist.parallel.engine import OptimizerConfig
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.zero import ZeroEngine


class Zero3Engine(ZeroEngine):
    """Until every caller passes its settings."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, mesh: Mesh) -> None:
        settings = deepspeed_config(ParallelConfig(), Layout(zero_stage=3), config.precision)
        super().__init__(module, config, mesh, settings)
