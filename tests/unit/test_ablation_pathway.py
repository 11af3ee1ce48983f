"""The pathway ablation without a training: the grid, claims and page from made-up figures."""

import numpy as np
import pytest
from PIL import Image

from unicom_dist.config.explain import write_config
from unicom_dist.testing.tiny import tiny_config
from unicom_dist.train.ablation import pathway_page
from unicom_dist.train.ablation.drawing import METRICS
from unicom_dist.train.ablation.pathway_claims import claims_of, steps_to
from unicom_dist.train.ablation.pathway_grid import Arm, arms_of

STEPS = (100, 200)
RETRIEVAL = {  # of made-up arms at these steps: Pathway II is as good, all channels are slower
    "transfusion-64": (0.6, 0.7),
    "query-guided-64": (0.6, 0.7),
    "transfusion-1280": (0.52, 0.6),
}


def made_up(seeds: int = 3, pictures: int = 40):
    """(arms, tables, flow) as `pathway.summary` has them."""
    arms = [Arm("transfusion", 64, False), Arm("query_guided", 64, False), Arm("transfusion", 1280, True)]
    random = np.random.default_rng(0)
    hard = random.normal(0, 0.2, pictures)
    hard -= hard.mean()
    tables, flow = {}, {}
    for arm in arms:
        of_steps = {
            step: level + hard + random.normal(0, 0.01, (seeds, pictures))
            for step, level in zip(STEPS, RETRIEVAL[arm.name], strict=True)
        }
        tables[arm.name] = {metric.name: of_steps for metric in METRICS}
        base = 0.8 if arm.pathway == "transfusion" else 0.9
        flow[arm.name] = [[(step, base + 0.001 * seed) for step in STEPS] for seed in range(seeds)]
    return arms, tables, flow


def test_every_pathway_draws_every_width_and_one_draws_all_channels(tmp_path):
    config = tiny_config(tmp_path, ablation={"widths": [4, 16]}, prior={"timestep_shift": 3.0})
    arms = arms_of(config, 64)
    names = ["transfusion-4", "query-guided-4", "transfusion-16", "query-guided-16", "transfusion-64"]
    assert [arm.name for arm in arms] == names
    assert [arm.label for arm in arms][-2:] == ["Pathway II, 16 channels", "Pathway I, all 64 channels"]
    assert [arm.codec for arm in arms] == ["codec-4", "codec-4", "codec-16", "codec-16", "codec-64"]
    overrides = [arm.overrides(config, "pretrain") for arm in arms]
    assert [o["prior.timestep_shift"] for o in overrides] == [3.0, 3.0, 6.0, 6.0, 12.0]  # with the root of the width
    assert [o.get("stages.pretrain.query.enabled", False) for o in overrides] == [False, True, False, True, False]
    assert overrides[-1]["codec.compressor.kind"] == "identity"


def test_claims_follow_from_the_figures():
    pathways, widths = claims_of(*made_up())
    by_flow = [finding.verdict for finding in pathways.findings if "flow" in finding.metric]
    assert by_flow == ["agrees", "agrees"]
    assert {finding.verdict for finding in pathways.findings if "flow" not in finding.metric} == {"not decided"}
    assert "step 200" in pathways.findings[0].metric  # the end first
    assert widths.verdict == "agrees"
    saved = widths.findings[0]
    assert saved.difference.mean == pytest.approx(100 - 200, abs=8)  # at step 100 as good as all channels at 200
    assert saved.sentence.startswith("Agrees: steps until training captions are drawn as well as at step 200 of ")
    assert f"is {saved.difference.mean:+.0f} steps (95 % interval" in saved.sentence


def test_nothing_is_said_of_the_steps_to_a_level_that_was_never_left():
    arms, tables, flow = made_up()
    for table in tables["transfusion-1280"].values():
        table[200] = np.full_like(table[200], 0.49)
    assert "steps until" not in str(claims_of(arms, tables, flow)[1].findings)


@pytest.mark.parametrize(("level", "step"), [(0.5, 0), (0.55, 50), (0.6, 100), (0.7, 150), (0.8, 200)])
def test_the_step_at_which_a_curve_reaches_a_level(level, step):
    assert steps_to([(100, 0.6), (200, 0.8)], level) == pytest.approx(step)


def test_a_level_that_is_never_reached_has_no_step():
    assert steps_to([(100, 0.6), (200, 0.8)], 0.9) is None
    arms, tables, flow = made_up()
    for table in tables["transfusion-64"].values():
        table[200] = table[200] - 0.15
    assert "steps until" not in str(claims_of(arms, tables, flow)[1].findings)


def test_the_page_shows_verdicts_and_figures(tmp_path):
    arms, tables, flow = made_up()
    folder = tmp_path / "run"
    write_config(folder, tiny_config(tmp_path), {})
    estimate = {"mean": 0.7123, "low": 0.6, "high": 0.8}
    result = {
        "encoder": "random", "hidden": 32, "layers": 2, "stages": {"alignment": 10, "pretrain": 200}, "batch": 2,
        "row_positions": 128, "seeds": [0, 1, 2], "steps": list(STEPS), "prompts": {"heldout": 40, "train": 40},
        "captions": ["a <red> heart", "a star"], "training_s": 60,
        "variants": [
            {
                "name": arm.name, "label": arm.label, "channels": arm.channels, "parameters": 1_500_000, "step_s": 0.5,
                "figures": {metric.name: {str(step): estimate for step in STEPS} for metric in METRICS},
                "flow": [(step, 0.9) for step in STEPS],
            }
            for arm in arms
        ],
        "claims": [claim.as_dict() for claim in claims_of(arms, tables, flow)],
    }  # fmt: skip
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    path = folder / "sheet.png"
    pathway_page.sheet(result, [picture] * 2, {arm.name: [picture] * 2 for arm in arms}).save(path)
    page = pathway_page.render(result, path, folder)
    for claim in result["claims"]:
        assert claim["claim"] in page
        assert claim["findings"][0]["sentence"] in page
    for text in ("0.712", "1.50 M", "a &lt;red&gt; heart", "held-out flow loss", 'src="data:image/'):
        assert text in page
    assert "http://" not in page
    assert str(tmp_path) not in page.partition('id="configuration"')[0]
