"""The process group as the launcher's ranks join it. Two ranks, a few seconds."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from unicom_dist.parallel.mesh import RENDEZVOUS, init_mesh
from unicom_dist.testing.distributed import run_ranks


def listen(rank: int, world: int, meeting: str) -> set[str]:
    """The addresses this rank listens on once it has met the other one. Module level: ranks import it."""
    os.environ.pop("GLOO_SOCKET_IFNAME")  # set for all tests; the launcher sets no more than the meeting place
    os.environ[RENDEZVOUS] = meeting
    mesh = init_mesh(timeout_s=60)
    assert mesh.everyone.sum(torch.ones(1)).item() == world
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"  # not by chance, as where the host's name means 127.0.0.1
    addresses = {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    mesh.barrier()
    return addresses


@pytest.mark.dist
def test_ranks_of_one_machine_listen_on_the_loopback_address_only(tmp_path: Path) -> None:
    for addresses in run_ranks(listen, 2, str(tmp_path / "meeting"), init_group=False):
        assert addresses, "gloo's own server should be found"
        assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
