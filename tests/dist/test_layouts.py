"""Every layout trains the same model as one process written by hand: the heart of the trainer.

Losses, every gradient of the first step, clipped global norms, moments, weights and averages after five steps and the
held-out loss, to 1e-5 relative in float32. The cases differ in layout, ZeRO stage, schedule, tied embeddings, frozen
backbone, recomputation and cut into micro-batches; the samples include a piece without images, one without text and one
without labels. One start of four processes and one of eight go through all cases: minutes on two cores.
UNICOM_CASES=pp2,z3 keeps the cases whose names contain one of these.
"""

import os
import traceback
from dataclasses import replace

import pytest
import torch

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import ParallelConfig
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.testing.distributed import run_ranks
from unicom_dist.testing.layouts import Case, Outcome, by_hand, differences, train, worst

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1600)]
RELATIVE, LOOSE = 1e-5, 0.15  # in float32; in bfloat16, which keeps 8 bits


def case(world: int, *, trainable: str = "all", merge: int = 1, joint: bool = False, options: bool = False, **axes):
    """A case on `world` ranks; dp takes what the axes leave."""
    tied, precision = axes.pop("tied", False), axes.pop("precision", "float32")
    layout = Layout(**axes)
    return Case(replace(layout, dp=world // layout.world), tied, precision, trainable, merge, joint, options)


SP = {"sequence_parallel": True}
INTERLEAVED = {"schedule": "interleaved", "pp_stages_per_rank": 2}
FOUR = {
    "dp4 z0": case(4, tied=True),
    "dp4 z1 connector alone": case(4, zero_stage=1, trainable="connector"),
    "dp4 z2 micro-batches of two pieces": case(4, zero_stage=2, merge=2),
    "dp4 z3 tied": case(4, zero_stage=3, tied=True),
    "tp4 z0, more ranks than key-value heads": case(4, tp=4),
    "tp4 sp z0 tied recompute full": case(4, tp=4, **SP, tied=True, recompute="full"),
    "tp2 dp2 sp z3": case(4, tp=2, **SP, zero_stage=3),
    "tp2 dp2 z2 connector alone": case(4, tp=2, zero_stage=2, trainable="connector"),
    "pp2 tp2 sp z3 connector alone": case(4, pp=2, tp=2, **SP, zero_stage=3, trainable="connector"),
    "tp4 sp z3 gather_once": case(4, tp=4, **SP, zero_stage=3, gather_once=True),
    "pp2 dp2 1f1b z3 tied": case(4, pp=2, zero_stage=3, tied=True),
    "pp2 dp2 gpipe z1 tied": case(4, pp=2, schedule="gpipe", zero_stage=1, tied=True),
    "pp4 1f1b z0": case(4, pp=4),
    "pp4 zero-bubble z0 tied": case(4, pp=4, schedule="zero-bubble", tied=True),
    "pp2 dp2 zero-bubble z2": case(4, pp=2, schedule="zero-bubble", zero_stage=2),
    "pp2 tp2 sp zero-bubble z1 recompute full": case(
        4, pp=2, tp=2, **SP, schedule="zero-bubble", zero_stage=1, recompute="full"
    ),
    "pp2 dp2 interleaved z3 gather_once": case(4, pp=2, **INTERLEAVED, zero_stage=3, gather_once=True),
    "pp2 dp2 interleaved z2 tied": case(4, pp=2, **INTERLEAVED, zero_stage=2, tied=True),
    "pp2 dp2 z3 connector alone": case(4, pp=2, zero_stage=3, trainable="connector"),
    "ulysses2 dp2 z3": case(4, ulysses=2, zero_stage=3),
    "ulysses4 z0, more ranks than key-value heads": case(4, ulysses=4, tied=True),
    "ulysses2 tp2 sp z2": case(4, ulysses=2, tp=2, **SP, zero_stage=2),
    "pp2 ulysses2 z1": case(4, pp=2, ulysses=2, zero_stage=1),
    "pp2 tp2 sp z0 tied recompute selective": case(4, pp=2, tp=2, **SP, tied=True, recompute="selective"),
    "pp2 tp2 sp z3 gather_once recompute full": case(
        4, pp=2, tp=2, **SP, zero_stage=3, gather_once=True, recompute="full"
    ),
    "joint ulysses2 tp2 sp z2": case(4, ulysses=2, tp=2, **SP, zero_stage=2, joint=True),
    "joint pp2 tp2 sp z3": case(4, pp=2, tp=2, **SP, zero_stage=3, joint=True),
    "options pp2 tp2 sp z3": case(4, pp=2, tp=2, **SP, zero_stage=3, options=True),
    "options tp4 z0, more ranks than key-value heads": case(4, tp=4, options=True),
    "options ulysses2 tp2 sp z2 recompute selective": case(
        4, ulysses=2, tp=2, **SP, zero_stage=2, recompute="selective", options=True
    ),
    "options joint ulysses2 dp2 z0": case(4, ulysses=2, joint=True, options=True),
    "joint pp2 dp2 interleaved z1": case(4, pp=2, **INTERLEAVED, zero_stage=1, joint=True),
    "bf16 dp4 z0": case(4, precision="bfloat16"),
    "bf16 pp2 tp2 sp z3": case(4, pp=2, tp=2, **SP, zero_stage=3, precision="bfloat16"),
}
EIGHT = {
    "pp2 dp2 tp2 sp z3 gather_once tied": case(8, pp=2, tp=2, **SP, zero_stage=3, gather_once=True, tied=True),
    "pp2 dp2 tp2 z1": case(8, pp=2, tp=2, zero_stage=1),
    "pp2 dp2 tp2 sp z0 interleaved": case(8, pp=2, tp=2, **SP, **INTERLEAVED),
    "pp2 ulysses2 tp2 sp z3": case(8, pp=2, ulysses=2, tp=2, **SP, zero_stage=3),
    "pp2 ulysses2 dp2 z3 interleaved recompute full": case(
        8, pp=2, ulysses=2, **INTERLEAVED, zero_stage=3, recompute="full"
    ),
    "dp2 ulysses2 tp2 sp z2 tied": case(8, ulysses=2, tp=2, **SP, zero_stage=2, tied=True),
    "pp4 tp2 sp z1 tied": case(8, pp=4, tp=2, **SP, zero_stage=1, tied=True),
    "pp2 tp4 sp z0 tied": case(8, pp=2, tp=4, **SP, tied=True),
}
CHOSEN = os.environ.get("UNICOM_CASES", "")


def chosen(cases: dict[str, Case]) -> dict[str, Case]:
    """Those that UNICOM_CASES names; all without it."""
    parts = CHOSEN.split(",")
    return {name: found for name, found in cases.items() if any(part in name for part in parts)}


def work(rank: int, world: int, cases: dict[str, Case]) -> dict[str, Outcome | str]:
    """All cases, one after the other, in one process group; groups of equal axes are formed once."""
    meshes: dict[tuple[int, ...], Mesh] = {}
    outcomes: dict[str, Outcome | str] = {}
    for name, given in cases.items():
        sizes = tuple(given.layout.sizes().values())
        if sizes not in meshes:
            meshes[sizes] = init_mesh(given.layout, 300)
        mesh = replace(meshes[sizes], layout=given.layout)
        print(f"rank {rank}: {name}", flush=True)
        try:
            outcomes[name] = train(given, mesh, parallel_of(given.layout))
        except Exception:
            outcomes[name] = traceback.format_exc()
            break  # the ranks no longer agree on what comes next
    return outcomes


def parallel_of(layout: Layout) -> ParallelConfig:
    """The configuration that asks for this layout."""
    values = {name: getattr(layout, name) for name in ParallelConfig.model_fields if hasattr(layout, name)}
    return ParallelConfig(**values)


@pytest.fixture(scope="module")
def four():
    return run_ranks(work, 4, chosen(FOUR), timeout_s=1500)


@pytest.fixture(scope="module")
def eight():
    return run_ranks(work, 8, chosen(EIGHT), timeout_s=1500)


@pytest.fixture(scope="module")
def alone():
    """By hand, in this process, by (tied, trainable, joint, options)."""
    torch.set_num_threads(1)
    return {
        (tied, trainable, joint, options): by_hand(Case(tied=tied, trainable=trainable, joint=joint, options=options))
        for tied, trainable, joint, options in [
            (False, "all", False, False),
            (True, "all", False, False),
            (False, "connector", False, False),
            (False, "all", True, False),
            (False, "all", False, True),
            (False, "all", True, True),
        ]
    }


def check(
    name: str, given: Case, ranks: list[dict[str, Outcome | str]], alone: dict[tuple[bool, str, bool, bool], Outcome]
) -> None:
    for number, rank in enumerate(ranks):
        trouble = rank.get(name, "a case before this one failed")
        if isinstance(trouble, str):
            pytest.fail(f"rank {number}: {trouble}")
    expected, got = alone[given.tied, given.trainable, given.joint, given.options], ranks[0][name]
    assert isinstance(got, Outcome)
    limit = RELATIVE if given.precision == "float32" else LOOSE
    found = differences(got, expected)
    wrong = {kind: value for kind, value in found.items() if not value <= limit}
    assert not wrong, f"{wrong}; of the gradients {worst(got.gradient, expected.gradient)[:6]}"
    for rank in ranks[1:]:  # every rank sees the same figures
        same = rank[name]
        assert isinstance(same, Outcome)
        assert (same.norms, same.losses) == (got.norms, got.losses)


@pytest.mark.parametrize("name", chosen(FOUR))
def test_four_ranks_train_as_one_process(name, four, alone):
    check(name, FOUR[name], four, alone)


@pytest.mark.parametrize("name", chosen(EIGHT))
def test_eight_ranks_train_as_one_process(name, eight, alone):
    check(name, EIGHT[name], eight, alone)


@pytest.mark.parametrize(
    ("merge", "joint", "options"),
    [(1, False, False), (2, False, False), (8, False, False), (1, True, False), (2, False, True), (1, True, True)],
)
def test_one_process_with_the_trainers_step_is_the_one_written_by_hand(merge, joint, options, alone):
    """Also: how a step is cut into micro-batches changes nothing."""
    got = train(Case(merge=merge, joint=joint, options=options), Mesh(0, 1, torch.device("cpu")))
    found = differences(got, alone[False, "all", joint, options])
    assert all(value <= RELATIVE for value in found.values()), found
