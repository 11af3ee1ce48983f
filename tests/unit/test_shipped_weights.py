"""The weights that come with the repository: whole, small, of the recipe as it is, and with their story beside them."""

from pathlib import Path

from unicom_dist.checkpoint.weights import read_weights_config
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import CodecConfig, PriorConfig
from unicom_dist.sample.model_folder import problems_of, read_manifest

SHIPPED = Path(__file__).parents[2] / "weights" / "laptop"


def test_the_shipped_folder_is_as_it_was_exported_and_small() -> None:
    assert problems_of(SHIPPED) == []
    assert "prior/model.safetensors" in read_manifest(SHIPPED)["files"]
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*.safetensors")) <= 25e6


def test_it_is_what_the_laptop_recipe_trains() -> None:
    config = load_recipe("laptop").config
    codec, prior = (read_weights_config(SHIPPED / part) for part in ("codec", "prior"))
    assert CodecConfig.model_validate(codec["codec"]) == config.codec
    assert PriorConfig.model_validate(prior["prior"]) == config.prior


def test_commit_command_and_curves_stand_beside_it() -> None:
    text = (SHIPPED / "README.md").read_text()
    assert "recipes/laptop.yaml" in text
    page = SHIPPED / text.split("](")[1].split(")")[0]
    assert page.is_file()
