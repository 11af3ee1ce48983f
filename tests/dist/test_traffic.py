"""A training step of the prior sends what its layout needs and no more: calls and bytes, on every rank, by purpose.

One start of four processes. Half a minute.
"""

import pytest

from unicom_dist.config.layout import Layout
from unicom_dist.testing.distributed import run_ranks
from unicom_dist.testing.traffic import Sent, traffic

pytestmark = pytest.mark.dist
MICROS = 2
CASES = {
    "tp 4, sp, copied kv heads": Layout(tp=4, sequence_parallel=True),
    "pp 2, tp 2, sp": Layout(pp=2, tp=2, sequence_parallel=True),
    "pp 2, ZeRO 3": Layout(dp=2, pp=2, zero_stage=3),
    "pp 2, ZeRO 3, gather once": Layout(dp=2, pp=2, zero_stage=3, gather_once=True),
}


def work(rank: int, world: int) -> dict[str, list[Sent]]:
    return {name: traffic(layout, MICROS) for name, layout in CASES.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[Sent]]]:
    return run_ranks(work, 4, timeout_s=240)


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_the_least(ranks: list[dict[str, list[Sent]]], name: str) -> None:
    for rank in ranks:
        for sent in rank[name]:
            assert (sent.calls, sent.bytes) == (sent.least_calls, sent.least_bytes), sent.purpose
