"""Which task trains a stage."""

from typing import Any

from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.train.codec import CodecTask
from unicom_dist.train.joint import JointTask
from unicom_dist.train.prior import PriorTask
from unicom_dist.train.query import QueryTask
from unicom_dist.train.stages import Task


def make_task(config: Config, stage: StageConfig) -> Task[Any]:
    """The task of a training stage."""
    if stage.kind == "codec":
        return CodecTask(config, stage)
    if stage.query.enabled:
        return QueryTask(config, stage)
    return JointTask(config, stage) if stage.joint.enabled else PriorTask(config, stage)
