"""The query-guided pathway as a stage: the prior of the stages before stays as it is, a guide is trained beside it.

The exported folder holds both, and `query` in its config.json says so: it is read, sampled and evaluated as any prior.
"""

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.models.attention import Plan
from unicom_dist.models.backbone import WHOLE, Part
from unicom_dist.models.init import Source
from unicom_dist.models.query_guided import OWN, Guide, QueryGuided, guide_weight, query_segments
from unicom_dist.models.segments import PackedBatch, Segment
from unicom_dist.models.sharding import outlined
from unicom_dist.models.share import Share
from unicom_dist.parallel.engine import Piece
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.tracking.flops import query_flops
from unicom_dist.train.prior import PriorTask


class QueryTask(PriorTask):
    """A guide on the same packed rows; the cross-entropy that is reported is that of the frozen model."""

    def __init__(self, config: Config, stage: StageConfig) -> None:
        super().__init__(config, stage)
        before = [other for other in config.stages[: config.stages.index(stage)] if other.kind == "prior"]
        self._continues = bool(before) and before[-1].query.enabled

    def outline(self, mesh: Mesh, part: Part) -> QueryGuided:
        assert part is WHOLE  # the configuration refuses pipelines
        return outlined(partial(QueryGuided, self.config.prior, self.stage.query, *self.sizes), mesh)

    @cached_property
    def source(self) -> Source:
        prior, seed = super().source, self.config.seed

        def source(piece: Piece) -> Tensor:
            return guide_weight(piece, seed) if piece.name.startswith(OWN) else prior(piece)

        return source

    def begins(self, name: str) -> bool:
        return name.startswith(OWN) and not self._continues

    def plan(self, share: Share, segments: list[Segment]) -> Plan:
        return share.plan(query_segments(segments, self.stage.query.queries), torch.float32)

    def flops(self, batch: PackedBatch) -> int:
        return query_flops(self.config.prior, self._guide, batch, self.sizes[0])

    @cached_property
    def _guide(self) -> Guide:
        """Its shapes."""
        with torch.device("meta"):
            return Guide(self.config.prior, self.stage.query, self.sizes[1])

    @cached_property
    def description(self) -> dict[str, Any]:
        return {**super().description, "query": self.stage.query.model_dump(mode="json")}
