"""Labelled picture grids. One process, milliseconds."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from unicom_dist.sample.grid import picture_grid, wrap

FONT = ImageFont.load_default(size=14)


def test_wrapped_lines_fit_and_keep_every_word():
    text = "a rather long caption about a shallow pan of food and anextraordinarilylongwordwithoutanyspace"
    lines = wrap(text, FONT, 120, max_lines=20)
    assert all(FONT.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_what_does_not_fit_ends_in_an_ellipsis():
    lines = wrap("one two three four five six seven eight nine ten", FONT, 60, max_lines=2)
    assert len(lines) == 2
    assert lines[-1].endswith("…")
    assert all(FONT.getlength(line) <= 60 for line in lines)


def test_every_picture_stands_under_its_label_in_reading_order():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [Image.new("RGB", (8, 8), colour) for colour in colours]
    grid = np.asarray(picture_grid(pictures, ["red", "green", "blue"], columns=2, cell_px=40))
    centres = []
    for colour in colours:
        rows, columns = np.where((grid == colour).all(-1))
        assert len(rows) >= 38 * 38
        centres.append((rows.mean(), columns.mean()))
        above = grid[: rows.min() - 2, columns.min() : columns.max()]
        assert (above[-18:] < 128).any(), "no ink above the picture"
    assert centres[0][0] == centres[1][0] < centres[2][0]
    assert centres[0][1] == centres[2][1] < centres[1][1]


def test_pictures_keep_their_aspect_ratio():
    grid = np.asarray(picture_grid([Image.new("RGB", (20, 10), (255, 0, 0))], ["wide"], cell_px=60))
    rows, columns = np.where((grid == (255, 0, 0)).all(-1))
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (60, 30)


@pytest.mark.parametrize("count", [0, 2])
def test_labels_must_match_pictures(count):
    with pytest.raises(ValueError, match="as many labels"):
        picture_grid([Image.new("RGB", (4, 4))] * count, ["one"])


def test_title_takes_its_own_space():
    picture = [Image.new("RGB", (8, 8))]
    assert picture_grid(picture, ["a"], title="step 200").height > picture_grid(picture, ["a"]).height
