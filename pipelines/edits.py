"""Edits made from real pictures: what is shown, what is asked for, and what it has to look like.

recolour  the hue of every coloured pixel becomes a named one's, or all colour goes: white and grey stay what they are
mirror    left and right change places
crop      a part of the picture, enlarged to its size
compose   two pictures side by side, or one above the other, on white
All randomness (colour, part, wording) follows from the kind and the keys. A picture that a kind would not change to be
seen, such as a mirrored one that is symmetric, gives none of that kind. Pictures are RGB, as they are stored: what was
transparent is white.
"""

import random
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Kind = Literal["compose", "crop", "mirror", "recolour"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Degrees on the circle of hues.
HUES = {"red": 0, "orange": 28, "yellow": 52, "green": 125, "blue": 222, "purple": 280, "pink": 328}
FAR_DEG = 50  # between what a picture mostly is and what it becomes
GREYING = 0.15  # share of the recolourings that take the colour away
COLOURED = 0.03  # least share of coloured pixels in a picture that is recoloured
SEEN = 12.0  # least mean change of a mirrored picture, of 255 levels
ZOOM = 0.55  # side of a cropped part over the side of the picture
FILLED = 0.25  # least share of a cropped part that is not white
PARTS = {
    "centre": (0.5, 0.5), "top": (0.5, 0.0), "bottom": (0.5, 1.0), "left side": (0.0, 0.5), "right side": (1.0, 0.5),
}  # fmt: skip
PLACES = {"left of": (False, False), "right of": (False, True), "above": (True, False), "below": (True, True)}
WORDINGS: dict[str, tuple[str, ...]] = {
    "recolour": ("Make it {0}.", "Turn it {0}.", "Change the colour to {0}.", "Paint it {0}."),
    "grey": ("Make it black and white.", "Take the colour away.", "Turn it into a black and white picture."),
    "mirror": ("Mirror it.", "Flip it horizontally.", "Swap left and right."),
    "crop": ("Zoom in on the {0}.", "Show only the {0}.", "Crop it to the {0}."),
    "compose": ("Put {0} {1} {2}.", "Draw {0} {1} {2}.", "Show {0} {1} {2} in one picture."),
}


class Subject(NamedTuple):
    """A stored picture."""

    key: str
    caption: str
    picture: Image.Image


class Edit(NamedTuple):
    """`references`: keys of the pictures that are shown; `caption`: of the target."""

    references: tuple[str, ...]
    instruction: str
    caption: str
    target: Image.Image


def make_edit(kind: Kind, subject: Subject, other: Subject) -> Edit | None:
    """The edit of a kind that a picture gives, with `other` beside it where it takes two; None where it gives none."""
    draw = random.Random(f"edit/{kind}/{subject.key}/{other.key if kind == 'compose' else ''}")
    if kind == "compose":
        return _compose(subject, other, draw)
    return {"recolour": _recolour, "mirror": _mirror, "crop": _crop}[kind](subject, draw)


def _recolour(subject: Subject, draw: random.Random) -> Edit | None:
    bands = subject.picture.convert("HSV").split()
    hue, saturation, value = (np.asarray(band).astype(np.float64) for band in bands)
    coloured = (saturation > 64) & (value > 40)
    if coloured.mean() < COLOURED:
        return None
    if draw.random() < GREYING:
        grey = subject.picture.convert("L").convert("RGB")
        caption = f"{subject.caption}, black and white"
        return Edit((subject.key,), _wording("grey", draw), caption, grey)
    turns = np.exp(2j * np.pi * hue[coloured] / 255) * saturation[coloured]
    main_deg = float(np.degrees(np.angle(turns.sum()))) % 360
    names = [name for name, degrees in HUES.items() if abs((degrees - main_deg + 180) % 360 - 180) >= FAR_DEG]
    name = draw.choice(names)
    same = Image.new("L", subject.picture.size, round(HUES[name] / 360 * 255))
    target = Image.merge("HSV", (same, *bands[1:])).convert("RGB")
    return Edit((subject.key,), _wording("recolour", draw, name), f"{subject.caption}, {name}", target)


def _mirror(subject: Subject, draw: random.Random) -> Edit | None:
    target = ImageOps.mirror(subject.picture)
    if np.abs(_levels(target) - _levels(subject.picture)).mean() < SEEN:
        return None
    return Edit((subject.key,), _wording("mirror", draw), f"{subject.caption}, mirrored", target)


def _crop(subject: Subject, draw: random.Random) -> Edit | None:
    width, height = subject.picture.size
    part_px = (max(round(ZOOM * width), 1), max(round(ZOOM * height), 1))
    names = list(PARTS)
    draw.shuffle(names)
    for name in names:
        across, down = PARTS[name]
        left, top = round(across * (width - part_px[0])), round(down * (height - part_px[1]))
        part = subject.picture.crop((left, top, left + part_px[0], top + part_px[1]))
        if (_levels(part).min(-1) < 240).mean() >= FILLED:
            target = part.resize((width, height), Image.Resampling.LANCZOS)
            return Edit((subject.key,), _wording("crop", draw, name), f"{subject.caption}, {name}", target)
    return None


def _compose(subject: Subject, other: Subject, draw: random.Random) -> Edit | None:
    if other.key == subject.key:
        return None
    where = draw.choice(list(PLACES))
    stacked, swapped = PLACES[where]
    side = max(*subject.picture.size, *other.picture.size)
    half = (side, side // 2) if stacked else (side // 2, side)
    pictures = [ImageOps.contain(s.picture, half, Image.Resampling.LANCZOS) for s in (subject, other)]
    target = Image.new("RGB", (side, side), "white")
    for number, picture in enumerate(reversed(pictures) if swapped else pictures):
        corner = (0, number * half[1]) if stacked else (number * half[0], 0)
        target.paste(picture, (corner[0] + (half[0] - picture.width) // 2, corner[1] + (half[1] - picture.height) // 2))
    words = (subject.caption, where, other.caption)
    return Edit((subject.key, other.key), _wording("compose", draw, *words), " ".join(words), target)


def _wording(kind: str, draw: random.Random, *words: str) -> str:
    return draw.choice(WORDINGS[kind]).format(*words)


def _levels(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture).astype(np.float64)
