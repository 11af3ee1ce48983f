"""Stages that would train nothing, or learn nothing of some samples, are refused; the others say what they do."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import PriorConfig, StageConfig
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.train.trained import loss_table, trained_table


def stage_of(**values: Any) -> StageConfig:
    return StageConfig.model_validate({"name": "sft", "kind": "prior", "steps": 1, **values})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"lambda_flow": 0.0}, "text_to_image in the mixture with lambda_flow = 0"),
        ({"lambda_text": 0.0, "mixture": {"text": 1.0}}, "text in the mixture with lambda_text = 0"),
        (
            {"lambda_text": 0.0, "lambda_flow": 0.0, "mixture": {"interleaved": 2.0}},
            "interleaved in the mixture with lambda_text = 0 and lambda_flow = 0",
        ),
        ({"joint": {"enabled": True}, "mixture": {"image_to_text": 1.0}}, "without a task that draws"),
        ({"trainable": "connector", "mixture": {"text": 1.0}}, "trainable = connector with text alone"),
    ],
)
def test_samples_of_which_nothing_is_learned_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        stage_of(**values)


def test_the_tables_of_a_prior() -> None:
    prior = PriorConfig(hidden=32, layers=1, heads=4, kv_heads=2, ffn=48)
    with torch.device("meta"):
        model = Transfusion(prior, 50, 6, 10)
    stage = stage_of(trainable="connector", mixture={"text": 0.2, "image_to_text": 0.8})
    model.train_only("connector")
    rows = {line.split()[0]: line.split()[1:] for line in trained_table(model, stage).splitlines()}
    assert rows["backbone.model"][0] == "0"
    assert rows["connector.lift"] == ["352", "0"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rows["all"][0] == f"{trained:,}"
    assert [line.split()[1:] for line in loss_table(stage).splitlines()[1:]] == [
        ["1", "text,", "image_to_text"],
        ["5", "none", "of", "the", "mixture"],
    ]
    with pytest.raises(ConfigError, match="trains no weight"):
        trained_table(model.requires_grad_(False), stage)
