"""Recipes: base, overrides, origins, and what a wrong one is told. One process, under a second."""

from pathlib import Path

import pytest

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.load import Loaded, installed_recipes, load_recipe, load_values

MINIMAL = """\
name: small
run_dir: runs/small
stages:
  - {name: codec, kind: codec, steps: 10, batch: 8, lr: 1e-3}
  - {name: sft, kind: prior, steps: 20}
"""
JOINT = "stages.sft.joint.enabled = true with codec.compressor."


def write(folder: Path, text: str, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path | str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    error = caught.value
    assert error.what
    assert error.remedy, f"no remedy: {error}"
    assert error.docs.startswith("docs/")
    return error


@pytest.mark.parametrize("recipe", installed_recipes())
def test_installed_recipes_are_valid_and_found_from_anywhere(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spelling in (recipe, f"recipes/{recipe}", recipe.removesuffix(".yaml")):
        assert load_recipe(spelling).config.stages


def test_yaml_floats_without_a_dot_are_numbers(tmp_path):
    assert load_recipe(write(tmp_path, MINIMAL)).config.stage("codec").lr == 1e-3


def test_overrides_address_stages_by_name_and_by_number(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_recipe(path, ["stages.codec.steps=7", "stages.1.lr=3e-4", "data.languages=[en, de]"]).config
    assert config.stage("codec").steps == 7
    assert config.stage("sft").lr == 3e-4
    assert config.data.languages == ["en", "de"]


def test_later_overrides_win_and_keep_the_rest(tmp_path):
    config = load_recipe(write(tmp_path, MINIMAL), ["seed=1", "stages.codec={steps: 3}", "seed=2"]).config
    assert (config.seed, config.stage("codec").steps, config.stage("codec").batch) == (2, 3, 8)


def test_base_is_read_first_and_stages_are_patched_by_name(tmp_path):
    write(tmp_path, MINIMAL)
    folder = tmp_path / "sub"
    folder.mkdir()
    child = write(folder, "base: ../small.yaml\nname: child\nstages: {sft: {steps: 5}}\n", "child.yaml")
    loaded = load_recipe(child)
    assert loaded.config.name == "child"
    assert [stage.steps for stage in loaded.config.stages] == [10, 5]
    assert loaded.origins["stages.sft.steps"] == f"{child}:3"
    assert loaded.origins["stages.codec.steps"].endswith("small.yaml:4")


def test_origins_name_file_line_and_command_line(tmp_path):
    path = write(tmp_path, MINIMAL)
    loaded = load_recipe(path, ["seed=3"])
    assert loaded.origins["run_dir"] == f"{path}:2"
    assert loaded.origins["stages.sft.steps"] == f"{path}:5"
    assert loaded.origins["seed"] == "command line"
    assert "data.image_px" not in loaded.origins


def test_values_without_a_recipe_are_checked_alike():
    values = {"name": "x", "run_dir": "out", "data": {"source": "pictures"}}
    loaded = load_values(values, ["data.image_px=64"])
    assert isinstance(loaded, Loaded)
    assert (loaded.config.data.source, loaded.config.data.image_px) == ("pictures", 64)
    with pytest.raises(ConfigError, match=r"data\.imge_px"):
        load_values(values, ["data.imge_px=64"])


def test_unknown_key_names_the_nearest_and_its_line(tmp_path):
    path = write(tmp_path, MINIMAL + "data:\n  imge_px: 64\n")
    error = refused(path)
    assert f"{path}:7" in error.what
    assert "data.imge_px" in error.what
    assert error.remedy == "did you mean data.image_px?"


def test_key_of_another_section_is_pointed_there(tmp_path):
    assert "stages.<name>.steps" in refused(write(tmp_path, MINIMAL), "codec.steps=10").remedy


@pytest.mark.parametrize(
    ("override", "what", "why"),
    [
        ("stages.codec.steps=fast", "stages.codec.steps = 'fast'", "whole number"),
        ("stages.codec.steps='10'", "stages.codec.steps = '10'", "whole number"),
        ("stages.codec.lr=high", "stages.codec.lr = 'high'", "number"),
        ("stages.codec.lr=.nan", "stages.codec.lr", "finite"),
        ("parallel.nproc=true", "parallel.nproc = True", "whole number"),
        ("data.languages=en", "data.languages = 'en'", "list"),
        ("data.held_out=2", "data.held_out = 2", "less than or equal to 1"),
        ("prior.tie_embeddings=1", "prior.tie_embeddings = 1", "true or false"),
    ],
)
def test_wrong_types_and_ranges_name_key_value_and_need(tmp_path, override, what, why):
    error = refused(write(tmp_path, MINIMAL), override)
    assert error.what.startswith(what)
    assert "command line" in error.what
    assert why in error.why


def test_unknown_choice_names_the_nearest(tmp_path):
    error = refused(write(tmp_path, MINIMAL), "prior.vocabulary=trimed")
    assert "did you mean trimmed" in error.remedy


def test_missing_key_says_what_it_is_for(tmp_path):
    error = refused(write(tmp_path, MINIMAL.replace("run_dir: runs/small\n", "")))
    assert error.what == "run_dir is missing"
    assert "everything the run writes" in error.why


def test_several_problems_are_all_named(tmp_path):
    text = str(refused(write(tmp_path, MINIMAL), "data.imge_px=64", "seed=x"))
    assert "data.imge_px" in text
    assert "seed = 'x'" in text


@pytest.mark.parametrize(
    ("overrides", "what", "remedy"),
    [
        (["parallel.nproc=3"], "stages.codec.batch = 8", "6 or 9"),
        (["prior.heads=5", "prior.hidden=64"], "prior: hidden = 64", "60 or 70"),
        (["prior.kv_heads=3"], "prior: kv_heads = 3", "1, 2, 7, 14"),
        (["codec.decoder.image_px=30"], "codec.decoder: image_px = 30", "28 or 32"),
        (["codec.decoder.rope_axes=[1, 2, 3]"], "codec.decoder: rope_axes", "64"),
        (["stages.sft.warmup=30"], "stages.sft: warmup = 30", "warmup <= 20"),
        (["stages.sft.mixture={text_to_image: 0}"], "stages.sft.mixture: all weights are 0", "positive"),
        (["stages.sft.name=codec"], "stages = ['codec', 'codec']", "own name"),
        (["stages.sft.kind=latents"], "stages.sft: steps = 20", "remove"),
        (["codec.compressor.spatial=pool", "stages.sft.joint={enabled: true}"], JOINT + "spatial", "spatial: none"),
        (
            ["codec.latent_scale=shared", "stages.sft.joint={enabled: true}"],
            "stages.sft.joint.enabled = true with codec.latent_scale = shared",
            "latent_scale: channel",
        ),
        (
            ["codec.compressor.bottleneck=kl", "stages.sft.joint={enabled: true}"],
            JOINT + "bottleneck",
            "bottleneck: none",
        ),
        (
            ["codec.compressor.kind=identity", "codec.compressor.bottleneck=tanh"],
            "codec.compressor: bottleneck",
            "none",
        ),
    ],
)
def test_combinations_that_cannot_work_say_what_would(tmp_path, overrides, what, remedy):
    error = refused(write(tmp_path, MINIMAL), *overrides)
    assert error.what.startswith(what)
    assert error.why
    assert remedy in error.remedy


@pytest.mark.parametrize("uri", ["http://user:s3cret@host:5000", "postgresql://s3cret@host/runs"])
def test_credentials_are_refused_where_they_would_be_written_down(tmp_path, uri):
    error = refused(write(tmp_path, MINIMAL), f"tracking.mlflow_uri={uri}")
    assert error.what == "tracking: mlflow_uri with a user name or password"
    assert "MLFLOW_TRACKING_PASSWORD" in error.remedy
    assert "s3cret" not in str(error)


@pytest.mark.parametrize("override", ["seed", "=3", "stages..steps=3", "seed=[1", "name.x=3", "stages.cdoec.steps=3"])
def test_bad_override_syntax_is_explained(tmp_path, override):
    assert override.split("=")[0] in refused(write(tmp_path, MINIMAL), override).what


def test_override_of_a_missing_stage_names_the_nearest(tmp_path):
    assert refused(write(tmp_path, MINIMAL), "stages.cdoec.steps=3").remedy == "did you mean codec?"


@pytest.mark.parametrize(
    ("name", "remedy"), [("quikstart", "recipes/quickstart.yaml"), ("recipes/tinny.yaml", "recipes/tiny.yaml")]
)
def test_missing_recipe_names_the_nearest(name, remedy):
    assert remedy in refused(name).remedy


def test_missing_recipe_names_the_nearest_of_its_folder(tmp_path):
    path = write(tmp_path, MINIMAL)
    assert refused(tmp_path / "smal.yaml").remedy == f"did you mean {path}?"


def test_folder_without_configuration_is_no_recipe(tmp_path):
    assert "config.yaml" in refused(tmp_path).why


def test_cyclic_base_shows_the_circle(tmp_path):
    first = write(tmp_path, "base: b.yaml\n" + MINIMAL, "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in refused(first).why


def test_missing_base_names_the_file_beside_it(tmp_path):
    write(tmp_path, MINIMAL)
    error = refused(write(tmp_path, "base: smal.yaml\nname: x\n", "child.yaml"))
    assert error.remedy == "did you mean small.yaml?"
    error = refused(write(tmp_path, "base: quikstart.yaml\nname: x\n", "child.yaml"))
    assert error.remedy == "did you mean quickstart.yaml?"


def test_a_base_that_is_not_beside_the_recipe_is_an_installed_one(tmp_path):
    path = write(tmp_path, "base: unicom_7b/codec.yaml\nname: mine\n", "child.yaml")
    loaded = load_recipe(path)
    assert loaded.config.name == "mine"
    assert loaded.origins["codec.decoder.space"].startswith("recipes/unicom_7b/")
    write(tmp_path, MINIMAL, "quickstart.yaml")  # what is beside it comes first
    assert load_recipe(write(tmp_path, "base: quickstart.yaml\n", "child.yaml")).config.name == "small"


@pytest.mark.parametrize("base", ["[a.yaml]", "3", "''", "{a: 1}"])
def test_base_that_is_no_path_is_refused(tmp_path, base):
    refused(write(tmp_path, f"base: {base}\n" + MINIMAL))


def test_unknown_stage_in_a_patch_names_those_there_are(tmp_path):
    write(tmp_path, MINIMAL)
    error = refused(write(tmp_path, "base: small.yaml\nstages: {stf: {steps: 5}}\n", "child.yaml"))
    assert "codec, sft" in error.why


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("name: [1\n", "is not YAML"),
        ("name: a\n\tb: 3\n", "is not YAML"),
        ("just words\n", "is not a recipe"),
        ("- a\n- b\n", "is not a recipe"),
        (MINIMAL + "name: twice\n", "repeats the key name"),
    ],
)
def test_files_that_are_no_recipe_are_named_with_their_line(tmp_path, text, what):
    assert what in refused(write(tmp_path, text)).what


def test_recipe_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert "UTF-8" in refused(path).why


def test_python_tags_are_not_executed(tmp_path):
    marker = tmp_path / "made"
    refused(write(tmp_path, f"name: !!python/object/apply:os.mkdir ['{marker}']\nrun_dir: x\n"))
    assert not marker.exists()
