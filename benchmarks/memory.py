"""Counting bytes of tensors: at the peak of a call, and kept for the backward pass."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(method: Callable[[], object]) -> int:
    """Most bytes allocated at one time by torch during the call, beyond those at its start (CPU allocator)."""
    method()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        method()
    now = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of some tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Saved:
    """Context in which the tensors that autograd saves are listed; `exclude` are those that live anyway."""

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        self.tensors: list[Tensor] = []
        self._known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self._known:
            self.tensors.append(tensor)
        return tensor

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        """Bytes of what was saved."""
        return storage_bytes(self.tensors)
