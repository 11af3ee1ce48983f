"""Keep less for the backward pass: a tensor that autograd saved is rebuilt from others that are there anyway.

Works on whatever operations run inside, also Megatron's and DeepSpeed's, since it acts on what they save and not on
what they are. What is rebuilt must not read parameters, which ZeRO-3 may have released by then.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_allowed = ContextVar("allowed", default=True)


@contextmanager
def _keep_as_is() -> Iterator[None]:
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def recomputed_whole() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch's checkpoint: what a block that is recomputed whole saves is dropped anyway."""
    return _keep_as_is(), _keep_as_is()


class _Rebuilt:
    """Computed at the first of `uses` readings and dropped after the last."""

    def __init__(self, rebuild: Callable[[], Tensor]) -> None:
        self.rebuild, self.uses, self.left = rebuild, 0, 0
        self.value: Tensor | None = None

    def read(self) -> Tensor:
        if self.value is None:
            self.left = self.uses
            with torch.no_grad():
                self.value = self.rebuild()
        value, self.left = self.value, self.left - 1
        if self.left <= 0:
            self.value = None
        return value


@dataclass
class _Slot:
    """One saved tensor: itself, or where it comes from and how it lies there."""

    tensor: Tensor | None
    source: _Rebuilt | None = None
    lies: tuple[Any, Any, Any] = ((), (), 0)

    def read(self) -> Tensor:
        if self.source is None:
            assert self.tensor is not None
            return self.tensor
        whole, (size, stride, offset) = self.source.read(), self.lies
        return whole.as_strided(size, stride, whole.storage_offset() + offset)


class Kept:
    """Context that gathers what autograd saves inside, so that some of it need not be kept after all.

    Does nothing unless `active`, within a block that is recomputed whole, and under torch.compile, which decides for
    itself.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active and torch.is_grad_enabled() and _allowed.get() and not torch.compiler.is_compiling()
        self._slots: list[_Slot] = []
        self._offers: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self._hooks: Any = torch.autograd.graph.saved_tensors_hooks(self._pack, _Slot.read) if self.active else None

    def _pack(self, tensor: Tensor) -> _Slot:
        slot = _Slot(tensor)
        self._slots.append(slot)
        return slot

    def __enter__(self) -> "Kept":
        if self._hooks is not None:
            self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
        for tensor, rebuild in self._offers:
            self.replace(tensor, rebuild)
        self._offers = []

    def offer(self, tensor: Tensor, rebuild: Callable[[], Tensor]) -> None:
        """`replace`, when the block ends."""
        if self.active:
            self._offers.append((tensor, rebuild))

    def replace(self, tensor: Tensor, rebuild: Callable[[], Tensor]) -> None:
        """Where all of `tensor` was saved, under any shape, save `rebuild` instead: it returns the same values.

        `rebuild` runs without gradients, once per backward pass, and holds what it needs (detached). A tensor that is
        not laid out contiguously stays as it is.
        """
        if not self.active or not tensor.is_contiguous() or tensor.storage_offset():
            return
        source = _Rebuilt(rebuild)
        place = tensor.untyped_storage().data_ptr()
        for slot in self._slots:
            saved = slot.tensor
            if saved is None or saved.numel() != tensor.numel() or saved.dtype != tensor.dtype:
                continue
            if saved.untyped_storage().data_ptr() == place:
                slot.lies = (saved.size(), saved.stride(), saved.storage_offset())
                slot.tensor, slot.source = None, source
                source.uses += 1
