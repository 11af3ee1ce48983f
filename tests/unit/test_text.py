"""Vocabularies: exact round trips, the trimmed one agrees with the full one where it can. 1 process, 2 s."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unicom_dist.config.errors import DataError
from unicom_dist.data.text import CONTROL_TOKENS, Vocabulary
from unicom_dist.testing.tiny import write_tokenizer

CAPTIONS = ["a red circle", "a blue square", "a green triangle", "naïve café", "日本 🦓"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, CAPTIONS * 3)
    return folder


@pytest.fixture(scope="module")
def full(folder: Path) -> Vocabulary:
    return Vocabulary.full(folder)


@pytest.fixture(scope="module")
def trimmed(folder: Path) -> Vocabulary:
    return Vocabulary.trimmed(folder, [CAPTIONS[:2]])


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_survives_both_vocabularies(full: Vocabulary, trimmed: Vocabulary, text: str) -> None:
    for vocabulary in (full, trimmed):
        rows = vocabulary.encode(text)
        assert vocabulary.decode(rows) == unicodedata.normalize("NFC", text)
        assert all(0 <= row < vocabulary.size for row in rows)


def test_trimmed_gives_training_captions_the_tokens_of_the_full_one(full: Vocabulary, trimmed: Vocabulary) -> None:
    assert trimmed.size < full.size
    for caption in CAPTIONS[:2]:
        assert [trimmed.source_ids[row] for row in trimmed.encode(caption)] == full.encode(caption)


def test_words_outside_the_trimmed_vocabulary_fall_back_to_smaller_tokens(
    full: Vocabulary, trimmed: Vocabulary
) -> None:
    assert len(trimmed.encode("triangle")) > len(full.encode("triangle"))
    assert len(trimmed.encode("🦓")) == 4  # its UTF-8 bytes


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_text_that_spells_a_control_token_stays_text(full: Vocabulary, trimmed: Vocabulary, token: str) -> None:
    for vocabulary in (full, trimmed):
        rows = vocabulary.encode(f"x{token}y")
        assert vocabulary.control[token] not in rows
        assert vocabulary.decode(rows) == f"x{token}y"
        assert vocabulary.decode([*rows, vocabulary.control[token]]) == f"x{token}y"


def test_saved_vocabularies_load_equal(folder: Path, full: Vocabulary, trimmed: Vocabulary, tmp_path: Path) -> None:
    for vocabulary, where in ((full, folder), (trimmed, "")):
        vocabulary.save(tmp_path / "vocabulary.json")
        again = Vocabulary.load(tmp_path / "vocabulary.json", where)
        assert (again.kind, again.size, again.control) == (vocabulary.kind, vocabulary.size, vocabulary.control)
        for text in [*CAPTIONS, "zebra <|im_end|>"]:
            assert again.encode(text) == vocabulary.encode(text)


def test_another_tokenizer_is_refused(full: Vocabulary, tmp_path: Path) -> None:
    full.save(tmp_path / "vocabulary.json")
    write_tokenizer(tmp_path / "other", ["something else entirely"])
    with pytest.raises(DataError, match="not the one the model was trained with"):
        Vocabulary.load(tmp_path / "vocabulary.json", tmp_path / "other")


def test_spare_rows_are_counted_and_stand_for_nothing(folder: Path, full: Vocabulary) -> None:
    spare = Vocabulary.full(folder, rows=full.size + 7)
    assert spare.size == full.size + 7
    assert spare.decode([full.size + 3]) == ""


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Vocabulary.full(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match="cannot be read"):
        Vocabulary.full(tmp_path)
    (tmp_path / "vocabulary.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read the vocabulary"):
        Vocabulary.load(tmp_path / "vocabulary.json")


def test_a_tokenizer_without_the_control_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"not a Qwen2\.5 tokenizer"):
        Vocabulary.full(tmp_path)
