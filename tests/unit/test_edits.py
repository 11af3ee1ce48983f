"""Edits: what each kind makes of a picture, and what gives none. 1 process, 1 s."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from pipelines.edits import HUES, KINDS, PARTS, Edit, Subject, make_edit


def subject(key: str, colour: tuple[int, int, int] = (220, 40, 40), size: tuple[int, int] = (40, 40)) -> Subject:
    """A filled circle in the upper left part of a white picture."""
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse((2, 2, 27, 27), fill=colour)
    return Subject(key, f"circle {key}", picture)


RED, GREY = subject("a"), subject("b", (90, 90, 90))


def edits(kind: str, one: Subject = RED, other: Subject = GREY, count: int = 24) -> list[Edit]:
    """Those of copies of `one` under other keys, which decide on what is drawn by chance."""
    found = [make_edit(kind, one._replace(key=f"{one.key}{n}"), other) for n in range(count)]
    return [edit for edit in found if edit is not None]


def colour(picture: Image.Image) -> tuple[int, ...]:
    return picture.getpixel((14, 14))


def hue_deg(picture: Image.Image) -> float:
    return picture.convert("HSV").getpixel((14, 14))[0] / 255 * 360


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_follows_from_kind_and_keys_and_keeps_the_size(kind: str) -> None:
    one, again = make_edit(kind, RED, GREY), make_edit(kind, RED, GREY)
    assert one is not None
    assert again is not None
    assert (one.references, one.instruction, one.caption) == (again.references, again.instruction, again.caption)
    assert one.target.tobytes() == again.target.tobytes()
    assert (one.target.size, one.target.mode) == ((40, 40), "RGB")
    assert len({edit.instruction for edit in edits(kind)}) > 2


def test_recolouring_moves_the_hue_and_leaves_white_and_grey_alone() -> None:
    found = edits("recolour", count=60)
    named = {name: edit for edit in found for name in HUES if name in edit.instruction}
    assert set(named) == {"yellow", "green", "blue", "purple"}  # orange and pink are too near to red
    for name, edit in named.items():
        assert abs(hue_deg(edit.target) - HUES[name]) < 4
        assert edit.target.getpixel((38, 38)) == (255, 255, 255)
        assert max(colour(edit.target)) == max(colour(RED.picture))
    grey = [edit for edit in found if not any(name in edit.instruction for name in HUES)]
    assert grey
    assert all(len(set(colour(edit.target))) == 1 for edit in grey)
    assert edits("recolour", GREY) == []


def test_a_mirrored_picture_is_mirrored_unless_it_is_symmetric() -> None:
    for edit in edits("mirror", count=3):
        assert edit.target.tobytes() == ImageOps.mirror(RED.picture).tobytes()
    assert edits("mirror", RED._replace(picture=Image.new("RGB", (40, 40), (1, 2, 3)))) == []


def test_a_crop_is_the_part_that_is_named_and_never_an_empty_one() -> None:
    corner = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(corner).ellipse((2, 2, 20, 20), fill=(220, 40, 40))
    found = edits("crop", RED._replace(picture=corner))
    named = {name: edit for edit in found for name in PARTS if name in edit.instruction}
    assert set(named) == {"top", "left side", "centre"}  # the others are mostly white
    top = np.asarray(named["top"].target.resize((22, 22), Image.Resampling.BOX)).astype(float)
    assert np.abs(top - np.asarray(corner.crop((9, 0, 31, 22))).astype(float)).mean() < 8
    assert edits("crop", RED._replace(picture=Image.new("RGB", (40, 40), "white"))) == []


@pytest.mark.parametrize(
    ("where", "of_red"),
    [("left of", (0, 0, 20, 40)), ("right of", (20, 0, 40, 40)), ("above", (0, 0, 40, 20)), ("below", (0, 20, 40, 40))],
)
def test_two_pictures_stand_as_they_are_asked_to(where: str, of_red: tuple[int, int, int, int]) -> None:
    edit = next(edit for edit in edits("compose", count=60) if where in edit.instruction)
    assert edit.references[1] == "b"
    assert edit.instruction.index("circle a") < edit.instruction.index(where) < edit.instruction.index("circle b")
    red = np.argwhere((np.asarray(edit.target)[..., 0] > 180) & (np.asarray(edit.target)[..., 1] < 80))
    assert len(red) > 20
    left, top, right, bottom = of_red
    assert ((red >= (top, left)) & (red < (bottom, right))).all()
    grey = np.argwhere(np.abs(np.asarray(edit.target).astype(int) - 90).max(-1) < 20)
    assert len(grey) > 20
    assert not ((grey >= (top, left)) & (grey < (bottom, right))).all(-1).any()
    assert make_edit("compose", RED, RED) is None


def test_pictures_of_other_shapes_are_composed_in_a_square() -> None:
    wide = subject("w", size=(60, 30))
    edit = make_edit("compose", wide, GREY)
    assert edit is not None
    assert edit.target.size == (60, 60)
    cropped = edits("crop", wide)
    assert {edit.target.size for edit in cropped} == {(60, 30)}
