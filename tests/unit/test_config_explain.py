"""Configurations written out, explained and compared. One process, under a second."""

import pytest
import yaml
from pydantic import BaseModel

from unicom_dist.config.errors import ConfigError, PreflightError
from unicom_dist.config.explain import diff, explain, flatten, to_yaml, write_config
from unicom_dist.config.load import load_recipe
from unicom_dist.config.problems import known_keys
from unicom_dist.config.schema import Config, Section


def test_written_configuration_reads_back_equal_with_its_origins(tmp_path):
    loaded = load_recipe("tiny", ["stages.sft.lr=3e-4"])
    path = write_config(tmp_path / "run", loaded.config, loaded.origins)
    again = load_recipe(path)
    assert again.config == loaded.config
    assert again.origins["stages.sft.lr"] == "command line"
    assert again.origins["seed"] == loaded.origins["seed"]
    assert again.origins["keep_checkpoints"] == "default"
    assert load_recipe(tmp_path / "run").config == loaded.config


def test_shown_configuration_is_a_recipe(tmp_path):
    loaded = load_recipe("quickstart")
    path = tmp_path / "shown.yaml"
    path.write_text(to_yaml(loaded.config, loaded.origins), encoding="utf-8")
    assert load_recipe(path).config == loaded.config


def test_shown_configuration_says_where_each_value_comes_from():
    loaded = load_recipe("tiny", ["seed=5"])
    lines = to_yaml(loaded.config, loaded.origins).splitlines()
    seed = next(line for line in lines if line.startswith("seed:"))
    keep = next(line for line in lines if line.startswith("keep_checkpoints:"))
    assert seed.endswith("# command line")
    assert keep.endswith("# default")
    commented = [line for line in lines if "  # " in line]
    assert len(commented) == len(flatten(loaded.config))


def test_strings_that_look_like_other_things_survive_writing(tmp_path):
    loaded = load_recipe("tiny", ["sample.prompts=['yes', '1e-3', 'a: b # c', ' é ']", "name='2024-01-01'"])
    again = load_recipe(write_config(tmp_path, loaded.config, loaded.origins))
    assert again.config.sample.prompts == ["yes", "1e-3", "a: b # c", " é "]
    assert again.config.name == "2024-01-01"


def test_configuration_into_a_file_in_the_way_is_a_preflight_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    loaded = load_recipe("tiny")
    with pytest.raises(PreflightError, match="cannot be written"):
        write_config(tmp_path / "run", loaded.config, loaded.origins)


def test_explained_key_has_type_default_meaning_value_and_origin():
    (row,) = explain("stages.sft.steps", load_recipe("tiny", ["stages.sft.steps=9"]))
    assert (row.value, row.origin, row.default) == (9, "command line", "0")
    assert "whole number" in row.type
    assert "optimizer steps" in row.meaning


def test_explaining_a_section_lists_its_keys():
    keys = [row.key for row in explain("codec.decoder")]
    assert "codec.decoder.patch_px" in keys
    assert all(key.startswith("codec.decoder.") for key in keys)


def test_choices_and_limits_are_part_of_the_type():
    (kind,) = explain("encoder.kind")
    (share,) = explain("data.held_out")
    assert kind.type.startswith("one of siglip2")
    assert ">= 0" in share.type
    assert "<= 1" in share.type


def test_types_of_sections_with_free_keys_say_what_belongs_to_a_key():
    assert explain("deepspeed.extra")[0].type == "{text: any value}"
    assert explain("data.sets")[0].type.startswith("{text: one of pairs, ")
    assert explain("stages.sft.mixture_changes")[0].type == "{whole number: mixture}"
    assert explain("stages.sft.mixture.text")[0].type == "number or {text: number}"


def test_a_value_with_free_keys_comes_from_where_they_do():
    loaded = load_recipe("tiny", ["data.sets.photos=pairs", "stages.sft.mixture.text_to_image={photos: 2}"])
    assert [row.origin for row in explain("data.sets", loaded)] == ["command line"]
    (row,) = explain("stages.sft.mixture.text_to_image", loaded)
    assert (row.value, row.origin) == ({"photos": 2.0}, "command line")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("codec.decodr.patch_px", "codec.decoder.patch_px"),
        ("patch_px", "codec.decoder.patch_px"),
        ("stages.sft.stepz", "stages.<name>.steps"),
        ("stages.<name>.stepz", "stages.<name>.steps"),
    ],
)
def test_explaining_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError) as caught:
        explain(key)
    assert nearest in caught.value.remedy


def test_difference_lists_exactly_the_changed_keys():
    left = load_recipe("tiny").config
    right = load_recipe("tiny", ["seed=1", "stages.sft.steps=9", "stages.sft.name=last"]).config
    found = {item.key: item for item in diff(left, right)}
    assert found["seed"].right == 1
    assert found["stages.sft.steps"].missing == "right"
    assert found["stages.last.steps"].right == 9
    assert all(key.split(".")[1] in ("sft", "last") for key in found if key.startswith("stages."))
    assert diff(left, left) == []


def test_every_key_has_a_description_and_a_meaningful_type():
    nameless = [key for key, field in known_keys() if not field.description]
    assert nameless == []


def test_every_section_refuses_unknown_keys_and_is_immutable():
    todo: list[type[BaseModel]] = [Section]
    while todo:
        section = todo.pop()
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"]
        todo += section.__subclasses__()


def test_flat_keys_are_those_of_the_schema():
    config = load_recipe("tiny").config
    general = {key.replace("<name>", "sft") for key, _ in known_keys()}
    assert {key for key in flatten(config) if not key.startswith("stages.") or ".sft." in key} == general
    assert yaml.safe_load(to_yaml(config, {}))["stages"][0]["name"] == "codec"
    assert isinstance(config, Config)
