"""Which rank this process is, and the few collectives the trainer needs besides the engine's.

Started by `unicom train` (file rendezvous on one machine), by torchrun (RANK, WORLD_SIZE, MASTER_ADDR) or by srun
(SLURM_PROCID, SLURM_NTASKS). Rank is global; the coordinate `dp_rank` is the position among the data-parallel replicas.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_dist.config.errors import PreflightError

RENDEZVOUS = "UNICOM_RENDEZVOUS"  # path of the rendezvous file, set by the launcher on one machine


@dataclass(frozen=True)
class Mesh:
    """Coordinates of this process. Every dp replica sees other samples; with one process nothing communicates."""

    rank: int
    world: int
    dp_rank: int
    dp_size: int
    device: torch.device

    def sum_dp(self, tensor: Tensor) -> Tensor:
        """`tensor` summed in place over the data-parallel replicas. Collective over dp."""
        if self.dp_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_dp(self, tensor: Tensor) -> Tensor:
        """[dp, *shape]: the `tensor`s of all replicas, equal shapes. Collective over dp."""
        if self.dp_size == 1:
            return tensor.unsqueeze(0)
        out = [torch.empty_like(tensor) for _ in range(self.dp_size)]
        dist.all_gather(out, tensor.contiguous())
        return torch.stack(out)

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


def init_mesh(timeout_s: int = 600) -> Mesh:
    """Join the process group (NCCL where there are GPUs, gloo elsewhere). Collective over the world.

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
    return Mesh(rank, world, rank, world, device)


def close_mesh() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
