"""Published folders load into the backbone, whole or trimmed, or are refused with a reason. One process, seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import PriorConfig
from unicom_dist.data.loader import build_vocabulary
from unicom_dist.data.samples import Content, Layouts, collate
from unicom_dist.data.text import Tokenizer, Vocabulary
from unicom_dist.models.backbone import Qwen2
from unicom_dist.models.init import fill
from unicom_dist.models.published import architecture, prior_section, published_source
from unicom_dist.models.segments import Segment
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets

ROWS = 40


def config(folder: Path, tied: bool = True) -> PriorConfig:
    shape = PriorConfig(hidden=16, layers=2, heads=4, kv_heads=2, ffn=24, tie_embeddings=tied)
    return shape.model_copy(update={"init_from": str(folder)})


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Qwen2, bool]:
    """A folder as the hub has it, in two files, bfloat16, with spare rows in the tables."""
    network = Qwen2(config(tmp_path, request.param), ROWS, seed=7)
    names = list(dict(network.named_parameters()))
    weights = {name: network.get_parameter(name).detach().bfloat16() for name in names}
    save_file({name: weights[name] for name in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in names[5:]}, tmp_path / "model-00002-of-00002.safetensors")
    content = {
        "model_type": "qwen2",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": request.param,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path, network.bfloat16(), request.param


def test_every_weight_arrives(published: tuple[Path, Qwen2, bool]) -> None:
    folder, original, tied = published
    loaded = Qwen2(config(folder, tied), ROWS - 3, seed=1)
    fill(loaded, published_source(config(folder, tied), range(ROWS - 3)))
    for name, parameter in loaded.named_parameters():
        expected = original.get_parameter(name).float()
        assert torch.equal(parameter, expected[: len(parameter)]), name


def test_a_trimmed_vocabulary_takes_its_own_rows(published: tuple[Path, Qwen2, bool]) -> None:
    folder, original, tied = published
    loaded = Qwen2(config(folder, tied), 3, seed=1)
    fill(loaded, published_source(config(folder, tied), [30, 2, 11]))
    assert torch.equal(loaded.lm_head.weight, original.lm_head.weight.float()[[30, 2, 11]])
    assert torch.equal(loaded.model.embed_tokens.weight, original.model.embed_tokens.weight.float()[[30, 2, 11]])


def test_another_architecture_is_named_with_what_would_fit(published: tuple[Path, Qwen2, bool]) -> None:
    folder, _, tied = published
    other = config(folder, tied).model_copy(update={"layers": 3, "ffn": 32})
    with pytest.raises(ConfigError, match=r"layers = 3, ffn = 32") as raised:
        fill(Qwen2(other, ROWS), published_source(other, range(ROWS)))
    assert raised.value.remedy == "prior.layers=2 prior.ffn=24"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 9])
def test_first_loss_of_a_full_vocabulary_is_transformers(tmp_path: Path, tied: bool, spare: int) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(write_tiny_assets(tmp_path).tokenizer)
    rows = tokenizer.fast.get_vocab_size() + spare
    torch.manual_seed(3)
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=rows,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=1e6,
            tie_word_embeddings=tied,
            initializer_range=0.3,  # far from uniform, so that every row counts
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "qwen")
    shape = {"hidden": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 24, "tie_embeddings": tied}
    recipe = tiny_config(tmp_path, prior={**shape, "vocabulary": "full", "init_from": str(tmp_path / "qwen")})
    vocabulary = build_vocabulary(recipe)
    assert vocabulary.size == rows
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json", recipe.prior.tokenizer).size == rows
    ours = Transfusion(recipe.prior, vocabulary.size, latent_channels=4, feature_channels=6, seed=1)
    fill(ours.backbone, published_source(recipe.prior, vocabulary.source_ids))
    batch = collate([Content("", Layouts(vocabulary).text("a red circle: red, circle", 64))], 4, 6)
    with torch.no_grad():
        logits = theirs(batch.token_ids[None]).logits[0, batch.label_index]
        expected = torch.nn.functional.cross_entropy(logits, batch.label_ids, reduction="none")
        without_spare = torch.nn.functional.cross_entropy(logits[:, : rows - spare], batch.label_ids)
        losses, _ = ours(batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (abs(float(losses.mean() - without_spare)) > 1e-3) == bool(spare)


LANGUAGE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def vision_language(form: str, tied: bool) -> Any:
    """A model around a Qwen2, as transformers has it: the language model's place and configuration differ by form."""
    import transformers

    if form == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 0]}
        tower = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 16}
        return transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(
                text_config={**LANGUAGE, "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 0},
                vision_config=tower,
                tie_word_embeddings=tied,
            )
        )
    config, model = {
        "llava": (transformers.LlavaConfig, transformers.LlavaForConditionalGeneration),
        "llava_onevision": (transformers.LlavaOnevisionConfig, transformers.LlavaOnevisionForConditionalGeneration),
    }[form]
    text = {**LANGUAGE, "model_type": "qwen2", "rope_theta": 1e6}
    return model(config(text_config=text, vision_config=SIGLIP, image_token_index=39, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", ["llava", "llava_onevision", "qwen2_5_vl", "qwen2_5_vl published flat"])
def test_the_language_model_of_a_vision_language_model_is_taken(tmp_path: Path, form: str, tied: bool) -> None:
    torch.manual_seed(3)
    theirs = vision_language(form.split()[0], tied).eval()
    theirs.save_pretrained(tmp_path)
    if form.endswith("flat"):  # Qwen's own folders have the language model's fields beside the others
        content = json.loads((tmp_path / "config.json").read_text())
        language = content.pop("text_config")
        rope = language.pop("rope_parameters")
        flat = {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        }
        (tmp_path / "config.json").write_text(json.dumps({**language, **content, **flat}))
    section = prior_section(tmp_path)
    assert section["tie_embeddings"] == tied
    assert architecture(tmp_path).rows == ROWS
    prior = PriorConfig.model_validate(section)
    ours = Qwen2(prior, ROWS, seed=1)
    fill(ours, published_source(prior, range(ROWS)))
    tokens = torch.randint(0, ROWS - 1, (12,))  # the last means an image
    with torch.no_grad():
        logits = ours(tokens, torch.arange(12), [Segment(0, "causal", 12)])
        torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSON file"),
        ("{}", "model_type"),
        ('{"model_type": "llama"}', "its language model is llama, the backbone is qwen2"),
        ('{"model_type": "llava"}', "its language model is llama, the backbone is qwen2"),
        ('{"model_type": "siglip"}', "its language model is siglip_text_model, the backbone is qwen2"),
        ('{"model_type": "llava_qwen"}', "llava_qwen"),
        ('{"model_type": "qwen2", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}}', "scaled"),
    ],
)
def test_a_folder_of_another_model_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot start from") as caught:
        architecture(tmp_path)
    assert reason in caught.value.why


def test_incomplete_damaged_or_foreign_folders_are_refused(published: tuple[Path, Qwen2, bool]) -> None:
    folder, _, tied = published
    network, shape = Qwen2(config(folder, tied), ROWS), config(folder, tied)
    with pytest.raises(CheckpointError, match="needs row 40"):
        fill(network, published_source(shape, [40]))
    last = folder / "model-00002-of-00002.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot read"):
        fill(network, published_source(shape, range(ROWS)))
    last.unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        fill(network, published_source(shape, range(ROWS)))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot start from"):
        fill(network, published_source(shape, range(ROWS)))
