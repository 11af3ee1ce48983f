"""Which rank this process is, the groups it belongs to, and the few collectives the trainer needs besides the engine's.

Started by `unicom train` (file rendezvous on one machine), by torchrun (RANK, WORLD_SIZE, MASTER_ADDR) or by srun
(SLURM_PROCID, SLURM_NTASKS). Rank is global; a coordinate is the position along one axis of the layout.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_dist.config.errors import ConfigError, PreflightError
from unicom_dist.config.layout import AXES, DOCS, Layout

RENDEZVOUS = "UNICOM_RENDEZVOUS"  # path of the rendezvous file, set by the launcher on one machine


@dataclass(frozen=True)
class Axis:
    """The ranks that differ from this one in one coordinate (or in several, flattened), in order."""

    name: str
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None: no process group was joined
    ranks: tuple[int, ...] = (0,)  # global

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed in place. Collective over the axis."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Element-wise maximum of the `tensor`s of its ranks, in place. Collective over the axis."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """[size, *shape]: the `tensor`s of all its ranks, equal shapes. Collective over the axis."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        out = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(out, tensor.contiguous(), group=self.group)
        return torch.stack(out)


@dataclass(frozen=True)
class Mesh:
    """Coordinates of this process and its groups. Every dp coordinate sees other samples, all other axes the same."""

    rank: int
    world: int
    device: torch.device
    layout: Layout = field(default_factory=Layout)
    limit: timedelta = timedelta(seconds=600)  # of a collective
    pp: Axis = Axis("pp")
    dp: Axis = Axis("dp")
    ulysses: Axis = Axis("ulysses")
    tp: Axis = Axis("tp")
    zero: Axis = Axis("zero")  # dp x ulysses: ranks with the same slice of the model; gradients are averaged over it
    model: Axis = Axis("model")  # pp x ulysses x tp: the ranks that together work on one batch
    everyone: Axis = Axis("everyone")
    formed: dict[tuple[int, ...], Any] = field(default_factory=dict, compare=False, repr=False)  # groups by their ranks

    def among(self, name: str, ranks: tuple[int, ...]) -> Axis:
        """The axis of `ranks` (global, this one among them); its group is formed on first use. Collective over them."""
        if len(ranks) > 1 and ranks not in self.formed:
            self.formed[ranks] = dist.new_group(list(ranks), self.limit, use_local_synchronization=True)
        return Axis(name, ranks.index(self.rank), len(ranks), self.formed.get(ranks), ranks)

    @property
    def last_pp_stage(self) -> bool:
        """Whether the losses are computed here."""
        return self.pp.rank == self.pp.size - 1

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank. Collective over the world."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank. Collective over the world."""
        if self.world > 1:
            dist.barrier()


def environment() -> tuple[int, int, int]:
    """(rank, world, local rank) from the launcher, torchrun or Slurm; (0, 1, 0) without any of them.

    PreflightError when Slurm started several tasks and nobody said where rank 0 listens.
    """
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0"))
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        if "MASTER_ADDR" not in env:
            raise PreflightError(
                f"SLURM_NTASKS = {env['SLURM_NTASKS']} and MASTER_ADDR is not set",
                "the ranks have no address at which to meet",
                'in the batch script: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_NODELIST" | head -1) '
                "MASTER_PORT=29500",
            )
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    return 0, 1, 0


def join(timeout_s: int = 600) -> tuple[int, int, torch.device]:
    """Join the process group (NCCL where there are GPUs, gloo elsewhere); (rank, world, device). Collective.

    A collective that takes longer than `timeout_s` raises on every rank that waits for it.
    """
    rank, world, local_rank = environment()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized() and (world > 1 or RENDEZVOUS in os.environ):
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "64")  # torch remembers so many collectives, for a hang's log
        path = os.environ.get(RENDEZVOUS)
        if path:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: listen on loopback only
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{path}" if path else "env://",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    return rank, world, device


def init_mesh(layout: Layout | None = None, timeout_s: int = 600) -> Mesh:
    """Join the process group, if that is not done, and form the groups of `layout` (default: all ranks replicas).

    ConfigError when the layout is for another number of ranks. Collective over the world.
    """
    rank, world, device = join(timeout_s)
    layout = layout or Layout(dp=world)
    if layout.world != world:
        raise ConfigError(
            f"{world} ranks were started for a layout of {layout.world}",
            " x ".join(f"{axis} {size}" for axis, size in layout.sizes().items()),
            f"start {layout.world} ranks, or change parallel.tp, pp or ulysses",
            DOCS,
        )
    if not dist.is_initialized():
        return Mesh(rank, world, device, layout)
    made: dict[tuple[int, ...], Any] = {}
    axes = {}
    limit = timedelta(seconds=timeout_s)
    members: dict[str, tuple[str, ...]] = {axis: (axis,) for axis in AXES}
    members |= {"zero": ("dp", "ulysses"), "model": ("pp", "ulysses", "tp"), "everyone": AXES}
    for name, flattened in members.items():
        for ranks in layout.groups(flattened):  # every rank takes part in forming every group, in the same order
            if tuple(ranks) not in made:
                made[tuple(ranks)] = dist.group.WORLD if len(ranks) == world else dist.new_group(ranks, limit)
            if rank in ranks:
                axes[name] = Axis(name, ranks.index(rank), len(ranks), made[tuple(ranks)], tuple(ranks))
    return Mesh(rank, world, device, layout, limit, **axes, formed=made)


def close_mesh() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
