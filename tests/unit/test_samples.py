"""How samples are laid out: tokens, positions, labels, and several of them on one axis. 1 process, 2 s."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unicom_dist.data.samples import INSTRUCTION, Arrays, Content, Layout, Layouts, collate
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.segments import PackedBatch
from unicom_dist.testing.tiny import write_tokenizer

D, F = 3, 5  # latent and feature channels
GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, ["a red circle", "a blue square"])
    return Layouts(Vocabulary.full(folder))


def spelled(layouts: Layouts, layout: Layout) -> str:
    """The sample as text, with control tokens written out and one `#` per image position."""
    names = {row: token for token, row in layouts.vocabulary.control.items()}
    parts = dict.fromkeys(image_index(layout).tolist(), "#")
    for at, row in zip(layout.token_index.tolist(), layout.tokens.tolist(), strict=True):
        parts[at] = names.get(row) or layouts.vocabulary.decode([row])
    return "".join(parts[at] for at in range(layout.length))


def labels(layouts: Layouts, layout: Layout) -> str:
    names = {row: token for token, row in layouts.vocabulary.control.items()}
    return "".join(names.get(row) or layouts.vocabulary.decode([row]) for row in layout.label_ids.tolist())


def test_text_to_image_asks_then_draws(layouts: Layouts) -> None:
    layout = layouts.text_to_image("a red circle", (1, 3))
    expected = "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n<|vision_start|>###<|vision_end|>"
    assert spelled(layouts, layout) == expected
    assert labels(layouts, layout) == "<|vision_start|>"
    assert [mode for mode, _ in layout.segments] == ["causal", "noise", "causal"]


def test_a_dropped_caption_leaves_the_roles(layouts: Layouts) -> None:
    layout = layouts.text_to_image("", (1, 1))
    expected = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|vision_start|>#<|vision_end|>"
    assert spelled(layouts, layout) == expected


def test_image_to_text_shows_then_describes(layouts: Layouts) -> None:
    layout = layouts.image_to_text("a red circle", (2, 1))
    expected = (
        f"<|im_start|>user\n<|vision_start|>##<|vision_end|>{INSTRUCTION}<|im_end|>\n"
        "<|im_start|>assistant\na red circle<|im_end|>"
    )
    assert spelled(layouts, layout) == expected
    assert labels(layouts, layout) == "a red circle<|im_end|>"
    assert [mode for mode, _ in layout.segments] == ["causal", "full", "causal"]
    question = layouts.image_to_text("", (2, 1))
    assert expected.startswith(spelled(layouts, question))
    assert not len(question.label_ids)


def test_text_is_learned_from_its_second_token_and_cut_to_the_row(layouts: Layouts) -> None:
    layout = layouts.text("a red circle", 100)
    assert spelled(layouts, layout) == "a red circle<|endoftext|>"
    assert layout.label_ids.tolist() == layout.tokens[1:].tolist()
    cut = layouts.text("a red circle", 2)
    assert cut.tokens.tolist() == layout.tokens[:2].tolist()


@given(GRIDS, st.text(max_size=12), st.sampled_from(["text", "text_to_image", "image_to_text"]))
@settings(max_examples=60, deadline=None)
def test_a_label_is_the_token_after_its_position(layouts: Layouts, grid: tuple[int, int], text: str, task: str) -> None:
    layout = layouts.text(text, 50) if task == "text" else getattr(layouts, task)(text, grid)
    at = dict(zip(layout.token_index.tolist(), layout.tokens.tolist(), strict=True))
    for index, label in zip(layout.label_index.tolist(), layout.label_ids.tolist(), strict=True):
        assert index in at  # text predicts text, images predict nothing
        assert at[index + 1] == label
    assert sum(length for _, length in layout.segments) == layout.length
    assert sorted([*layout.token_index, *image_index(layout)]) == list(range(layout.length))


@given(GRIDS)
@settings(max_examples=20, deadline=None)
def test_an_image_takes_one_rotary_position(layouts: Layouts, grid: tuple[int, int]) -> None:
    for layout in (layouts.text_to_image("a red", grid), layouts.image_to_text("a red", grid)):
        assert len(set(layout.rope[image_index(layout)])) == 1
        steps = np.diff(layout.rope)
        assert layout.rope[0] == 0
        assert set(steps) <= {0, 1}
        assert int((steps == 0).sum()) == grid[0] * grid[1] - 1


def image_index(layout: Layout) -> np.ndarray:
    return np.concatenate([np.arange(0), *(np.arange(p.start, p.start + p.size) for p in layout.images)])


def contents(layouts: Layouts, chosen: list[tuple[str, tuple[int, int]]]) -> list[Content]:
    made = []
    for number, (task, grid) in enumerate(chosen):
        size = grid[0] * grid[1]
        if task == "text":
            made.append(Content(f"k{number}", layouts.text("a red circle", 50)))
        elif task == "text_to_image":
            layout, image = layouts.text_to_image("a red", grid), torch.full((size, D), float(number))
            made.append(Content(f"k{number}", layout, [Arrays(image, -image, number / 100)]))
        else:
            made.append(
                Content(
                    f"k{number}", layouts.image_to_text("a red", grid), [Arrays(torch.full((size, F), float(number)))]
                )
            )
    return made


@given(st.lists(st.tuples(st.sampled_from(["text", "text_to_image", "image_to_text"]), GRIDS), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_samples_laid_end_to_end_keep_what_belongs_to_them(
    layouts: Layouts, chosen: list[tuple[str, tuple[int, int]]]
) -> None:
    batch = collate(contents(layouts, chosen), D, F)
    assert sum(segment.length for segment in batch.segments) == batch.num_positions
    places = torch.cat([batch.token_index, batch.latent_index, batch.feature_index])
    assert places.sort().values.tolist() == list(range(batch.num_positions))
    sample_of = torch.cat([torch.full((segment.length,), segment.sample) for segment in batch.segments])
    assert torch.equal(sample_of[batch.latent_index], batch.latent_sample)
    assert torch.equal(sample_of[batch.label_index], batch.label_sample)
    assert torch.equal(batch.latents[:, 0].long(), batch.latent_sample)
    assert torch.equal(batch.noise, -batch.latents)
    assert torch.allclose(batch.t, batch.latent_sample / 100)
    assert torch.equal(batch.features[:, 0].long(), sample_of[batch.feature_index])
    assert batch.tasks == [task for task, _ in chosen]
    token_at = dict(zip(batch.token_index.tolist(), batch.token_ids.tolist(), strict=True))
    pairs = zip(batch.label_index.tolist(), batch.label_ids.tolist(), strict=True)
    assert all(token_at[index + 1] == label for index, label in pairs)


def test_grids_run_in_raster_order(layouts: Layouts) -> None:
    batch = collate(contents(layouts, [("text_to_image", (2, 3)), ("image_to_text", (1, 2))]), D, F)
    assert batch.latent_grid.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert batch.feature_grid.tolist() == [[0, 0], [0, 1]]


def test_absent_modalities_keep_their_channels(layouts: Layouts) -> None:
    batch: PackedBatch = collate(contents(layouts, [("text", (1, 1))]), D, F)
    assert batch.latents.shape == batch.noise.shape == (0, D)
    assert batch.features.shape == (0, F)
    assert batch.latent_grid.shape == (0, 2)
    assert batch.t.shape == batch.latent_index.shape == (0,)


def test_the_vocabulary_file_is_enough_to_rebuild_layouts(layouts: Layouts, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    folder = tmp_path / "tokenizer"
    write_tokenizer(folder, ["a red circle"])
    Vocabulary.trimmed(folder, [["a red circle", "user", "assistant", "\n", INSTRUCTION]]).save(path)
    rebuilt = Layouts(Vocabulary.load(path))
    expected = spelled(layouts, layouts.image_to_text("a red circle", (1, 1)))
    assert spelled(rebuilt, rebuilt.image_to_text("a red circle", (1, 1))) == expected
