"""Where DeepSpeed keeps the shards of a model: stage 3 splits every parameter, stages 1 and 2 whole groups of them.

Both give parameters their values one at a time, keep the float32 of this rank's shard alone, say where which elements
lie, and reach DeepSpeed's buffers. They read private fields of its optimizers, checked against the versions tested.
Frozen parameters, of which DeepSpeed keeps no master weights, get a float32 shard here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.layout import DOCS
from unicom_dist.parallel.deepspeed_adapter import Groups, number_alike, other_version
from unicom_dist.parallel.engine import Buffers, Fragment, OptimizerConfig, decay_groups, fragments_of, pieces_of
from unicom_dist.parallel.mesh import Mesh

Initial = Callable[[str, nn.Parameter], Tensor]  # values of a parameter of this rank, float32, of its shape
Named = list[tuple[str, Any]]  # parameters, to which DeepSpeed adds attributes
GATHER_ELEMENTS = 1 << 26  # gathered in one call by `gather_once`; twice as much memory while it lasts
HELD = -1  # stands for a module that uses a parameter: DeepSpeed does not release it meanwhile


@dataclass(frozen=True)
class Place:
    """Elements [offset, offset + numel) of a flattened parameter are at `start` of a group's buffer here."""

    group: int
    start: int
    offset: int
    numel: int


def materialise(name: str, parameter: nn.Parameter, initial: Initial | None, mesh: Mesh, dtype: torch.dtype) -> Tensor:
    """Put low-precision values into `parameter`, on the mesh's device; returns them in float32, flattened."""
    if parameter.is_meta:
        if initial is None:
            raise ValueError(f"{name} is on the meta device and no initial values are given")
        exact = initial(name, parameter).to(mesh.device, torch.float32)
        filled = nn.Parameter(exact.to(dtype), requires_grad=parameter.requires_grad)
        filled.__dict__.update(parameter.__dict__)
        torch.utils.swap_tensors(parameter, filled)  # type: ignore[no-untyped-call]
    else:
        exact = parameter.detach().to(mesh.device, torch.float32)
        parameter.data = exact.to(dtype)
    return exact.reshape(-1)


class Shards:
    """What both layouts share. `trained` are the optimizer's groups: matrices, tied matrices, vectors, if any.

    Copies of a tied matrix are on different pp_stages; alone in their group they are cut alike: shards can be summed.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, mesh: Mesh) -> None:
        self.module, self.mesh = module, mesh
        self.dtype = config.dtype
        matrices, vectors, frozen = decay_groups(module)
        tied = [(n, p) for n, p in matrices if any(piece.sum_over == "tied" for piece in pieces_of(n, p, p.shape))]
        alone = {name for name, _ in tied}
        groups = [([m for m in matrices if m[0] not in alone], True), (tied, True), (vectors, False)]
        self.trained: list[Named] = [named for named, _ in groups if named]
        self.decayed = [decayed for named, decayed in groups if named]
        self.frozen: Named = list(frozen)
        self.places: dict[str, Place] = {}
        self.fragments: list[Fragment] = []
        self.frozen_master = torch.empty(0)
        self._exact: dict[str, Tensor] = {}

    masters: list[Any]  # DeepSpeed's float32 weights, by group; the keys of the optimizer's state

    def weights(self) -> Buffers:
        """Master weights of all groups, the frozen ones last."""
        return [*(flat.data for flat in self.masters), self.frozen_master]

    def hold(self, gather: bool) -> None:
        """Nothing where the weights are whole."""

    def release(self) -> None:
        """Nothing where the weights are whole."""

    def _finish(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Fragments from places, and master weights from the float32 values that DeepSpeed rounded."""
        weights = self.weights()
        for buffer in weights:
            buffer.zero_()  # DeepSpeed leaves what it pads with as it finds it
        for name, p in [named for group in [*self.trained, self.frozen] for named in group]:
            place = self.places[name]
            pieces = pieces_of(name, p, shapes[name])
            self.fragments += fragments_of(pieces, place.offset, place.numel, place.group, place.start)
            weights[place.group][place.start : place.start + place.numel] = self._exact.pop(name)


class ParameterShards(Shards):
    """Stage 3: each flattened parameter is cut into `mesh.zero.size` pieces of equal, padded size."""

    needed = (
        "fp32_partitioned_groups_flat",
        "fp16_partitioned_groups_flat_numel",
        "grad_partitions_flat_buffer",
        "grad_position",
        "persistent_parameters",
        "overflow",
        "offload_optimizer",
        "_partition_all_parameters",
        "_reassign_or_swap_out_partitioned_parameters",
    )

    def prepare(self, deepspeed: Any, settings: dict[str, Any], groups: Groups, initial: Initial | None) -> None:
        """Give one parameter after the other its values and split it. Collective over `mesh.zero`."""
        if self.frozen and settings["zero_optimization"].get("offload_param", {}).get("device") == "nvme":
            raise ConfigError(
                "parallel.offload = nvme with frozen weights",
                "DeepSpeed has no way to set a weight that is on NVMe and that no optimizer updates",
                "parallel.offload = cpu, or train all weights",
                DOCS,
            )
        number_alike(deepspeed, self.mesh)
        first: Any = None
        for name, parameter in self.module.named_parameters():
            p: Any = parameter
            exact = materialise(name, p, initial, self.mesh, self.dtype)
            if first is None:
                first = p
                deepspeed.zero.Init(
                    module=nn.ParameterList([p]),
                    data_parallel_group=groups.get_data_parallel_group(),
                    config_dict_or_path=settings,
                    dtype=self.dtype,
                    mpu=groups,
                    zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
                )
            else:
                first.convert_to_zero_parameters(param_list=[p])
            offset = min(self.mesh.zero.rank * p.ds_tensor.ds_numel, p.ds_numel)
            self._exact[name] = exact[offset : offset + p.ds_tensor.ds_numel].clone()
            del exact  # before the next one is made

    def attach(self, deepspeed: Any, zero: Any) -> None:
        """Find everything in DeepSpeed's optimizer. Collective over `mesh.zero`."""
        missing = [name for name in self.needed if not hasattr(zero, name)]
        if missing:
            raise other_version(deepspeed, missing)
        self._zero, self.masters = zero, list(zero.fp32_partitioned_groups_flat)
        start, last = 0, len(self.masters)
        for number, named in enumerate([*self.trained, self.frozen]):
            for name, p in named:
                span = p.ds_tensor.ds_numel
                offset = min(self.mesh.zero.rank * span, p.ds_numel)
                if number < len(self.trained):
                    group, where, _ = zero.grad_position[zero.get_param_id(p)]
                else:
                    group, where, start = last, start, start + span
                self.places[name] = Place(group, where, offset, min(span, p.ds_numel - offset))
        self.frozen_master = torch.zeros(start, device=self.mesh.device)
        self._finish({name: tuple(p.ds_shape) for group in [*self.trained, self.frozen] for name, p in group})
        self.load(self.weights())

    def gradients(self) -> Buffers:
        """Views of DeepSpeed's reduced gradients."""
        if self._zero.offload_optimizer:
            found = [flat.grad for flat in self.masters]
        else:
            sizes = [int(numel) for numel in self._zero.fp16_partitioned_groups_flat_numel]
            found = list(self._zero.grad_partitions_flat_buffer.split(sizes))
        return [*found, self.frozen_master.new_empty(0)]

    def load(self, weights: Buffers) -> None:
        """Low-precision weights from `weights`, and the gathered small ones. Collective over `mesh.zero`."""
        self._zero._partition_all_parameters()
        for number, flat in enumerate(self.masters):
            kept, flat.data = flat.data, weights[number]
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
            flat.data = kept
        for name, p in self.frozen:
            place = self.places[name]
            p.ds_tensor.data[: place.numel].copy_(weights[-1][place.start : place.start + place.numel])
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def hold(self, gather: bool) -> None:
        """Keep the small parameters gathered until `release`, whatever their modules do; `gather`: keep all of them.

        Between the forward pass that records it and the backward pass DeepSpeed otherwise releases them as well.
        Collective over `mesh.zero`.
        """
        held: list[Any] = list(self.module.parameters()) if gather else self._zero.persistent_parameters
        for p in held:
            p.ds_active_sub_modules.add(HELD)
        bucket: list[Any] = []
        for p in [p for p in held if gather and p.ds_status.name == "NOT_AVAILABLE"]:
            if bucket and sum(b.ds_numel for b in bucket) + p.ds_numel > GATHER_ELEMENTS:
                bucket[0].all_gather_coalesced(bucket).wait()
                bucket = []
            bucket.append(p)
        if bucket:
            bucket[0].all_gather_coalesced(bucket).wait()

    def release(self) -> None:
        """Only the shards remain."""
        self._zero._partition_all_parameters()

    def fill_missing(self) -> None:
        """A gradient of zeros where none arrived: DeepSpeed would use that of the step before."""
        for p in [p for named in self.trained for _, p in named if p.grad is None]:
            kept, p.data = p.data, torch.zeros(p.ds_shape, dtype=self.dtype, device=self.mesh.device)
            p.grad = p.data
            p.data = kept


class GroupShards(Shards):
    """Stages 1 and 2: a group's parameters lie end to end, padded, and the whole is cut into `mesh.zero.size` parts."""

    needed = (
        "single_partition_of_fp32_groups",
        "parallel_partitioned_bit16_groups",
        "bit16_groups_flat",
        "partition_size",
        "averaged_gradients",
        "overflow",
        "cpu_offload",
    )

    def prepare(self, deepspeed: Any, settings: dict[str, Any], groups: Groups, initial: Initial | None) -> None:
        """Give the parameters their values; DeepSpeed splits them. Frozen ones become views of one flat tensor."""
        rank, size = self.mesh.zero.rank, self.mesh.zero.size
        self._shapes = {name: tuple(p.shape) for name, p in self.module.named_parameters()}
        self._sizes = []
        for group, named in enumerate([*self.trained, self.frozen]):
            total = sum(p.numel() for _, p in named)
            part = math.ceil(total / (2 * size)) * 2  # DeepSpeed aligns the parts to two elements
            self._sizes.append(part)
            low, start = rank * part, 0
            for name, p in named:
                first = min(max(low - start, 0), p.numel())
                last = min(max(low + part - start, 0), p.numel())
                where = max(start - low, 0) if last > first else 0
                self.places[name] = Place(group, where, first, last - first)
                self._exact[name] = materialise(name, p, initial, self.mesh, self.dtype)[first:last].clone()
                start += p.numel()
        self.frozen_master = torch.zeros(self._sizes[-1], device=self.mesh.device)
        self._frozen_flat = torch.zeros(self._sizes[-1] * size, dtype=self.dtype, device=self.mesh.device)
        start = 0
        for _, p in self.frozen:
            p.data = self._frozen_flat[start : start + p.numel()].copy_(p.data.reshape(-1)).view(p.shape)
            start += p.numel()

    def attach(self, deepspeed: Any, zero: Any) -> None:
        """Find everything in DeepSpeed's optimizer. Collective over `mesh.zero`."""
        missing = [name for name in self.needed if not hasattr(zero, name)]
        if missing or [int(size) for size in zero.partition_size] != self._sizes[:-1]:
            raise other_version(deepspeed, missing or ["partition_size as expected"])
        self._zero, self.masters = zero, list(zero.single_partition_of_fp32_groups)
        self._finish(self._shapes)
        self.load(self.weights())

    def gradients(self) -> Buffers:
        """Views of what DeepSpeed will apply; its lists of pieces are joined first and given back joined."""
        if self._zero.cpu_offload:
            found = [flat.grad for flat in self.masters]
        else:
            found = [self._joined(number) for number in range(len(self.trained))]
        return [*found, self.frozen_master.new_empty(0)]

    def _joined(self, number: int) -> Tensor:
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        pieces = self._zero.averaged_gradients[number]
        if not isinstance(pieces, GradPartitionBufferGroup):
            flat = torch.cat([piece.reshape(-1) for piece in pieces]).float()
            flat = nn.functional.pad(flat, (0, self._sizes[number] - flat.numel()))
            self._zero.averaged_gradients[number] = pieces = GradPartitionBufferGroup([flat], flat)
        joined: Tensor = pieces.flat_partition
        return joined

    def load(self, weights: Buffers) -> None:
        """Low-precision weights from `weights`, gathered. Collective over `mesh.zero`."""
        rank, group = self.mesh.zero.rank, self.mesh.zero.group
        flats = [*self._zero.bit16_groups_flat, self._frozen_flat]
        for flat, weight, part in zip(flats, weights, self._sizes, strict=True):
            if part:
                own = flat[rank * part : (rank + 1) * part].copy_(weight)
                dist.all_gather_into_tensor(flat, own.clone(), group=group)

    def fill_missing(self) -> None:
        """A gradient of zeros where none arrived, so that every rank reduces the same."""
        for p in [p for named in self.trained for _, p in named if p.grad is None]:
            p.grad = torch.zeros_like(p)
