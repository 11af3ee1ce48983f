"""Executes a schedule on the ranks of the pipeline axis. It knows tensors and their order, not the model.

Between pp_stages pass the tensors that `Boundary`s describe. Their shapes follow from the micro-batch, which every rank
has, so nothing but the tensors is sent. Which instruction comes when is in `messages.py`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from unicom_dist.parallel.mesh import Axis
from unicom_dist.parallel.pipeline.channels import Arrival, Boundary, Channels
from unicom_dist.parallel.pipeline.messages import Instruction, Receive, Send, program
from unicom_dist.parallel.pipeline.schedule import Action, build

Payload = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]  # of a payload, in its order; None = none


class Stage(Protocol):
    """What the runtime asks of the part of the model on this rank. `chunk` counts its pp_stages."""

    def forward(self, micro: int, chunk: int, received: Payload) -> Payload:
        """F: what to send on; () from the last pp_stage. `received`: leaves of the graph, () on the first pp_stage."""

    def backward(self, micro: int, chunk: int, gradients: Gradients) -> Gradients:
        """B: gradients of what was received, from those of what was sent."""

    def backward_weight(self, micro: int, chunk: int) -> None:
        """W: the gradients of the weights, which `backward` put off. Called under the zero-bubble schedule alone."""


class Pipeline:
    """One rank's executor. Collective over the axis, as is `run`. With one rank nothing is sent."""

    def __init__(self, axis: Axis, device: torch.device, schedule: str = "1f1b", chunks: int = 1) -> None:
        self._axis, self._device, self._schedule, self._chunks = axis, device, schedule, chunks
        ring = [(rank, (rank + 1) % axis.size) for rank in range(axis.size - (chunks == 1))]
        pairs = {*ring, *((target, source) for source, target in ring)} if axis.size > 1 else set()
        self._channels = Channels(axis, device, sorted(pairs))

    def run(self, stage: Stage, boundaries: Sequence[Sequence[Boundary]], backward: bool = True) -> None:
        """All forwards and backwards of a step, or forwards alone. boundaries: by micro-batch, the same on every rank.

        ValueError when the stage hands out other tensors than the boundary's.
        """
        arriving: dict[Action, Arrival] = {}
        made: Gradients = ()
        for instruction in self._instructions(len(boundaries), backward):
            if isinstance(instruction, Receive):
                source, _, action = instruction.message
                arriving[action] = self._channels.receive(source, _sent(action, boundaries[action.micro]))
            elif isinstance(instruction, Send):
                _, target, action = instruction.message
                tensors = _checked(made, action, boundaries[action.micro], self._device)
                made = ()
                if target == self._axis.rank:
                    arriving[action] = Arrival([tensor.detach() for tensor in tensors], [])
                else:
                    self._channels.send(target, tensors)
            else:
                made = self._compute(stage, instruction, arriving.pop(instruction, None), boundaries)
        self._channels.finish()

    def _instructions(self, micros: int, backward: bool) -> list[Instruction]:
        schedule = self._schedule if backward else "forward"
        return _programs(schedule, self._axis.size, micros, self._chunks)[self._axis.rank]

    def _compute(
        self, stage: Stage, action: Action, arrival: Arrival | None, boundaries: Sequence[Sequence[Boundary]]
    ) -> Gradients:
        tensors = arrival.wait() if arrival else []
        kind, chunk, micro = action
        if kind == "W":
            stage.backward_weight(micro, chunk)
            return ()
        if kind == "F":
            for tensor, boundary in zip(tensors, boundaries[micro], strict=False):
                tensor.requires_grad_(boundary.differentiable)
            return stage.forward(micro, chunk, tuple(tensors))
        gradients = iter(tensors)
        every = (next(gradients) if boundary.differentiable else None for boundary in boundaries[micro])
        return stage.backward(micro, chunk, tuple(every) if arrival else ())


def _sent(action: Action, boundary: Sequence[Boundary]) -> list[Boundary]:
    """What goes to this action: everything forward, back only gradients."""
    return [tensor for tensor in boundary if action.kind == "F" or tensor.differentiable]


def _checked(made: Gradients, action: Action, boundary: Sequence[Boundary], device: torch.device) -> list[Tensor]:
    """The tensors to send to `action`; a gradient that is None is zero."""
    if len(made) != len(boundary):
        raise ValueError(f"{len(made)} tensors for {action}, but {len(boundary)} pass the boundary")
    tensors = []
    for tensor, expected in zip(made, boundary, strict=True):
        if action.kind == "B" and not expected.differentiable:
            continue
        if tensor is None:
            tensor = torch.zeros(expected.shape, dtype=expected.dtype, device=device)
        if tuple(tensor.shape) != expected.shape or tensor.dtype != expected.dtype:
            raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype} for {action}, but {expected} was announced")
        tensors.append(tensor)
    return tensors


@lru_cache(maxsize=8)
def _programs(schedule: str, ranks: int, micros: int, chunks: int) -> list[list[Instruction]]:
    return program(build(schedule, ranks, micros, chunks))
