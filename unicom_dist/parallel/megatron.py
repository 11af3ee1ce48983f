"""Megatron-core's tensor-parallel layers on the groups of a mesh, without its global state.

The layers take their group explicitly. What they still read from outside is set up here, once: the buffer into which
sequence parallelism gathers and, where there is no accelerator, an answer to "which device?".
"""

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from unicom_dist.config.errors import PreflightError
from unicom_dist.parallel.mesh import Mesh

_INSTALL = "pip install 'megatron-core>=0.16.1,<0.17'"


@cache
def import_megatron() -> Any:
    """`megatron.core.tensor_parallel`, imported late (it takes seconds) and ready for use."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says about optional packages: `unicom doctor` lists them
            layers = importlib.import_module("megatron.core.tensor_parallel")
            state = importlib.import_module("megatron.core.parallel_state")
    except ImportError as error:
        raise PreflightError("parallel.tp > 1", f"megatron-core cannot be imported: {error}", _INSTALL) from error
    names = ("_GLOBAL_MEMORY_BUFFER", "_set_global_memory_buffer")
    missing = [name for name in names if not hasattr(state, name)]
    if missing:
        raise PreflightError(
            f"megatron-core lacks parallel_state.{missing[0]}", "the adapter was written for another version", _INSTALL
        )
    # Its advice to set CUDA_DEVICE_MAX_CONNECTIONS=1 would queue ZeRO-3's gathers behind the computation.
    functions = importlib.import_module("megatron.core.tensor_parallel.layers")
    functions.linear_with_grad_accumulation_and_async_allreduce.warned = True
    if state._GLOBAL_MEMORY_BUFFER is None:
        state._set_global_memory_buffer()
    if not torch.cuda.is_available():
        # Workaround: Megatron allocates its gathered tensors on "the current CUDA device", also under gloo. Remove when
        # its mappings and layers ask for the device of their input (megatron-core 0.16.1 does not).
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    return layers


class ColumnParallel(nn.Module):
    """Linear layers of one input as one product, some outputs of each on every rank of tp.

    [n, inputs] -> a [m, width] for every of `widths`: m = n, or under sequence parallelism n times the ranks, whose
    positions are gathered (and gathered again in backward, so that only the rank's own stay in memory).
    """

    def __init__(self, inputs: int, widths: Sequence[int], bias: bool, mesh: Mesh) -> None:
        super().__init__()
        self.widths, total = list(widths), sum(widths) * mesh.tp.size
        self.layer = import_megatron().ColumnParallelLinear(inputs, total, bias=bias, **_settings(mesh))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Collective over tp, in forward and in backward."""
        return torch.split(self.layer(x)[0], self.widths, -1)


class RowParallel(nn.Module):
    """A linear layer, some inputs on every rank of tp and the outputs summed.

    [m, inputs / t] -> [n, outputs]: n = m, or under sequence parallelism m / t, of the sum the rank's own positions.
    """

    def __init__(self, inputs: int, outputs: int, mesh: Mesh) -> None:
        super().__init__()
        self.layer = import_megatron().RowParallelLinear(
            inputs, outputs, bias=False, input_is_parallel=True, skip_bias_add=False, **_settings(mesh)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Collective over tp, in forward and in backward."""
        out: Tensor = self.layer(x)[0]
        return out


def _settings(mesh: Mesh) -> dict[str, Any]:
    config = importlib.import_module("megatron.core.model_parallel_config").ModelParallelConfig(
        tensor_model_parallel_size=mesh.tp.size,
        sequence_parallel=mesh.layout.sequence_parallel,
        use_cpu_initialization=True,  # the torch.device context decides, not the current GPU
        perform_initialization=False,  # weights are drawn by name
    )
    return {"config": config, "init_method": None, "tp_group": mesh.tp.group}


def vocab_embedding(rows: int, width: int, mesh: Mesh) -> nn.Module:
    """A table of `rows` rows (a multiple of t), split among the ranks of tp: ids [T] -> [T, width].

    Under sequence parallelism ids [1, m] of all positions -> [m / t, 1, width] of the rank's own; an id outside the
    table gives zeros. Collective over tp.
    """
    embedding: nn.Module = import_megatron().VocabParallelEmbedding(
        rows, width, reduce_scatter_embeddings=mesh.layout.sequence_parallel, **_settings(mesh)
    )
    return embedding


def gather_positions(x: Tensor, mesh: Mesh) -> Tensor:
    """Sequence-parallel [n, h] -> [n t, h] on every rank of tp, for computations all of them do alike.

    Every rank's gradient is complete, so backward takes the rank's rows of it. Collective over tp.
    """
    gather = import_megatron().gather_from_sequence_parallel_region
    out: Tensor = gather(x, tensor_parallel_output_grad=False, group=mesh.tp.group)
    return out
