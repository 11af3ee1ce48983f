"""The configuration: one tree of typed sections, read from a recipe.

Every field says its unit. Unknown keys are refused (`load.py` names the nearest one). Cross-field rules that need more
than one section are validators of the section that holds both. Imports no torch.
"""

from unicom_dist.config.schema.base import Section, Unworkable
from unicom_dist.config.schema.codec import CodecConfig, CompressorConfig, DecoderConfig
from unicom_dist.config.schema.data import EDITS, TASKS_OF, TRAIN, DataConfig, EncoderConfig, SetKind, held_out_set
from unicom_dist.config.schema.parallel import KernelsConfig, ParallelConfig
from unicom_dist.config.schema.prior import PriorConfig
from unicom_dist.config.schema.recipe import Config
from unicom_dist.config.schema.stage import LEARNED_BY, JointConfig, Mixture, QueryConfig, SpikeConfig, StageConfig
from unicom_dist.config.schema.use import AblationConfig, EvalConfig, SampleConfig, TrackingConfig

__all__ = [
    "EDITS",
    "LEARNED_BY",
    "TASKS_OF",
    "TRAIN",
    "AblationConfig",
    "CodecConfig",
    "CompressorConfig",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "EvalConfig",
    "JointConfig",
    "KernelsConfig",
    "Mixture",
    "ParallelConfig",
    "PriorConfig",
    "QueryConfig",
    "SampleConfig",
    "Section",
    "SetKind",
    "SpikeConfig",
    "StageConfig",
    "TrackingConfig",
    "Unworkable",
    "held_out_set",
]
