"""Layouts: coordinates and groups, the table, every rule of legality, and that the documentation says the same."""

import itertools
import re
from pathlib import Path

import pytest

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.layout import AXES, RULES, Layout, refusals
from unicom_dist.config.schema import ParallelConfig, PriorConfig
from unicom_dist.parallel.pipeline.schedule import build
from unicom_dist.parallel.pipeline.simulate import timeline
from unicom_dist.testing.tiny import tiny_config
from unicom_dist.tracking.env import read_env, write_env
from unicom_dist.train.pipeline import who_is_where

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"
SEVEN_B = PriorConfig(hidden=3584, layers=28, heads=28, kv_heads=4, ffn=18944)
LAYOUT = Layout(dp=3, tp=2, pp=2, ulysses=2)
PICTURES = {"gpipe": (3, 4, 1), "1f1b": (3, 4, 1), "interleaved": (2, 4, 2), "zero-bubble": (3, 4, 1)}


def test_rank_is_the_formula_of_its_coordinates():
    for rank in range(LAYOUT.world):
        at = LAYOUT.coordinates(rank)
        assert ((at["pp"] * 3 + at["dp"]) * 2 + at["ulysses"]) * 2 + at["tp"] == rank


@pytest.mark.parametrize("axes", [("tp",), ("dp", "ulysses"), ("pp", "ulysses", "tp"), AXES], ids="-".join)
def test_groups_part_the_ranks_and_differ_in_their_axes_alone(axes):
    groups = LAYOUT.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(LAYOUT.world))
    for group in groups:
        fixed = [{axis: LAYOUT.coordinates(rank)[axis] for axis in AXES if axis not in axes} for rank in group]
        assert all(other == fixed[0] for other in fixed)
        assert group == sorted(group)


def test_dp_is_what_the_other_axes_leave():
    layout = Layout.of(ParallelConfig(tp=2, pp=2), 16)
    assert (layout.dp, layout.world, layout.sequence_parallel, layout.sequence_cut) == (4, 16, True, 2)
    assert not Layout.of(ParallelConfig(), 4).sequence_parallel
    assert layout.data_parallel() == Layout(dp=16, zero_stage=3)


# What breaks each rule, in their order: the configuration, the ranks, and what the remedy names.
BROKEN = [
    ({"tp": 2, "pp": 2}, 6, "start 4 or 8 ranks"),
    ({"tp": 3}, 3, "one of 1, 2, 4"),
    ({"tp": 7}, 7, "one of 1, 2, 4"),
    ({"tp": 28}, 28, "one of 1, 2, 4"),
    ({"tp": 4, "ulysses": 2}, 8, "one of 1, 7"),
    ({"pp": 29}, 29, "pp x pp_stages_per_rank <= 28"),
    ({"pp": 2, "pp_stages_per_rank": 2}, 2, "schedule: interleaved"),
    ({"pp": 2, "schedule": "zero-bubble"}, 2, "zero_stage: 2, 1 or 0"),
    ({"gather_once": True, "zero_stage": 2}, 2, "zero_stage: 3"),
    ({"offload": "cpu", "zero_stage": 0}, 2, "zero_stage: 3"),
    ({"offload": "nvme"}, 2, "nvme_path"),
]


@pytest.mark.parametrize(("number", "broken"), list(enumerate(BROKEN)), ids=[str(item[0]) for item in BROKEN])
def test_each_rule_refuses_what_breaks_it_and_says_what_works(number, broken):
    values, world, remedy = broken
    prior = SEVEN_B.model_copy(update={"ffn": 18940}) if values == {"tp": 28} else SEVEN_B
    parallel = ParallelConfig(**values)
    found = refusals(parallel, prior, world)
    mine = RULES[number].check(type("Request", (), {"parallel": parallel, "prior": prior, "world": world})())
    assert mine is not None
    assert mine in found
    assert remedy in mine.remedy
    assert mine.what
    assert mine.why


@pytest.mark.parametrize("prior", [SEVEN_B, SEVEN_B.model_copy(update={"heads": 12, "kv_heads": 2, "ffn": 8960})])
def test_whatever_a_refusal_lists_is_not_refused(prior):
    listed = 0
    for tp, ulysses in itertools.product(range(1, 31), range(1, 31)):
        values = {"tp": tp, "ulysses": ulysses}
        for refusal in refusals(ParallelConfig(**values), prior, tp * ulysses):
            name, _, choice = refusal.remedy.removeprefix("parallel.").partition(" = one of ")
            for value in map(int, choice.split(", ")):
                tried = values | {name: value}
                left = refusals(ParallelConfig(**tried), prior, tried["tp"] * tried["ulysses"])
                assert not [other for other in left if other.what.startswith(f"parallel.{name} ")], (refusal, value)
                listed += 1
    assert listed > 1000


def test_there_is_an_example_for_every_rule():
    assert len(BROKEN) == len(RULES)


def test_what_is_legal_is_not_refused():
    for values, world in [
        ({"tp": 2, "pp": 2}, 8),
        ({"tp": 4, "pp": 2, "gather_once": True}, 16),
        ({"tp": 2, "ulysses": 14}, 28),
        ({"tp": 28}, 28),
        ({"pp": 4, "schedule": "interleaved", "pp_stages_per_rank": 7}, 4),
        ({"pp": 4, "schedule": "zero-bubble", "zero_stage": 1}, 8),
        ({"offload": "nvme", "nvme_path": "/fast"}, 2),
    ]:
        assert refusals(ParallelConfig(**values), SEVEN_B.model_copy(update={"ffn": 18816}), world) == []


def test_a_recipe_with_an_illegal_layout_is_refused_in_four_parts(tmp_path):
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, parallel={"nproc": 3, "tp": 3})
    error = caught.value
    assert "parallel.tp = 3" in error.what
    assert "4 attention heads" in error.why
    assert "1, 2, 4" in error.remedy
    assert error.docs


def test_the_page_lists_the_rules():
    listed = re.findall(r"^- (.*)$", PAGE.read_text(encoding="utf-8").partition("## What is legal")[2], re.MULTILINE)
    assert listed == [rule.text for rule in RULES]


@pytest.mark.parametrize("schedule", PICTURES)
def test_the_page_shows_the_schedules_as_they_are(schedule):
    text = PAGE.read_text(encoding="utf-8").partition(f"`schedule: {schedule}`")[2]
    assert re.findall(r"```\n(.*?)\n```", text, re.DOTALL)[0] == timeline(build(schedule, *PICTURES[schedule]))


def test_the_table_goes_to_env_json_and_is_that_of_the_page(tmp_path):
    shared = {"nproc": 8, "pp": 2, "tp": 2, "zero_stage": 3}
    table = who_is_where(tiny_config(tmp_path, parallel=shared))
    assert f"```\n{table}\n```" in PAGE.read_text(encoding="utf-8")
    write_env(tmp_path, ["unicom"], table)
    assert read_env(tmp_path)["layout"] == table.splitlines()
    assert who_is_where(tiny_config(tmp_path)) == ""
