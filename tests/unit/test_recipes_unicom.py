"""The recipes of the paper's pipeline and of Qwen2.5's other sizes: sizes, stages, memory. One process, no weights."""

import json
from pathlib import Path

import pytest
import torch

from unicom_dist.cli.main import run
from unicom_dist.config.errors import ConfigError
from unicom_dist.config.load import load_recipe
from unicom_dist.models.backbone import Qwen2

# Rows of the published tables and parameters, as the model cards of Qwen2.5 have them; ranks and card of the recipe.
PUBLISHED = {
    "unicom_0.5b": (151_936, 494_032_768, 8, "h100"),
    "unicom_1.5b": (151_936, 1_543_714_304, 8, "h100"),
    "unicom_3b": (151_936, 3_085_938_688, 8, "h100"),
    "unicom_7b/sft": (152_064, 7_615_616_512, 8, "h200"),
    "unicom_14b": (152_064, 14_770_033_664, 8, "h200"),
    "unicom_32b": (152_064, 32_763_876_352, 32, "h200"),
    "unicom_72b": (152_064, 72_706_203_648, 64, "h200"),
}
STAGES = ["codec", "latents", "alignment", "pretrain", "continue", "sft"]
# Learning rate, schedule, decay, warm-up, steps, shares of text, drawing, describing, editing: table 6 of the paper.
PAPER = {
    "alignment": (2e-5, "cosine", 0.0, 600, 20_000, 0.20, 0.0, 0.80, 0.0),
    "pretrain": (1e-4, "constant", 0.01, 5000, 115_000, 0.25, 0.45, 0.15, 0.15),
    "continue": (1e-4, "constant", 0.01, 5000, 60_000, 0.20, 0.40, 0.20, 0.20),
    "sft": (1e-5, "constant", 0.01, 100, 7000, 0.10, 0.20, 0.40, 0.30),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_backbone_has_the_published_size_and_fits_its_layout(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows, parameters, gpus, card = PUBLISHED[name]
    config = load_recipe(name).config
    assert [stage.name for stage in config.stages] == STAGES
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen2(config.prior, rows).parameters()) == parameters
    for stage in config.stages:
        if stage.kind != "latents":
            assert stage.batch % (config.layout(stage, gpus).dp * stage.micro_batches) == 0
    assert run(["plan", name, "--gpus", str(gpus), "--hardware", card, "--vocabulary", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_the_stages_are_those_of_the_paper() -> None:
    config = load_recipe("unicom_7b/sft").config
    for name, expected in PAPER.items():
        stage, mixture = config.stage(name), config.stage(name).mixture
        shares = (mixture.text, mixture.text_to_image, mixture.image_to_text, mixture.image_text_to_image)
        numbers = (stage.lr, stage.schedule, stage.weight_decay, stage.warmup, stage.steps, *shares)
        assert numbers == expected
        assert sum(shares) == pytest.approx(1)
        assert (stage.betas, stage.eps, stage.clip, stage.trainable) == ((0.9, 0.95), 1e-6, 1.0, "all")
        assert (stage.lambda_text, stage.lambda_flow) == (1.0, 5.0)
    assert config.prior.timestep == "uniform"
    assert config.encoder.max_patches == 1024
    assert config.codec.compressor.channels == 64


def test_each_file_is_the_one_before_and_a_stage_more() -> None:
    whole = load_recipe("unicom_7b/sft").config
    for number, name in enumerate(("base", *PAPER), 2):
        part = load_recipe(f"unicom_7b/{name}").config
        assert part.stages == whole.stages[:number]
        assert part.prior == whole.prior


def test_a_new_item_needs_a_kind(tmp_path: Path) -> None:
    recipe = tmp_path / "more.yaml"
    (tmp_path / "tiny.yaml").write_text("name: a\nrun_dir: b\nstages: [{name: latents, kind: latents}]\n")
    recipe.write_text("base: tiny.yaml\nstages: {codec: {kind: codec, steps: 3}}\n")
    stages = load_recipe(recipe).config.stages
    assert [(stage.name, stage.steps) for stage in stages] == [("latents", 0), ("codec", 3)]
    recipe.write_text("base: tiny.yaml\nstages: {codex: {steps: 3}}\n")
    with pytest.raises(ConfigError, match="no item 'codex'"):
        load_recipe(recipe)
