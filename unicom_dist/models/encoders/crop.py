"""The 33 aspect ratios between 1:4 and 4:1 that pictures are cut to before anything looks at them.

The ratios are even in their logarithm: no picture between 1:4 and 4:1 loses more than 4.3 % of one side. Encoder view
and decoder target are two resizes of the same cut: what the tokens describe and what is drawn from them are the same
part of the picture. Ref: UniCom, appendix A.1 (33 buckets from 1:4 to 4:1, the same for codec and prior).
"""

from bisect import bisect_right

from PIL import Image

from unicom_dist.config.errors import DataError

STEPS = 16  # ratios on either side of the square
RATIOS = tuple(4.0 ** (step / STEPS) for step in range(-STEPS, STEPS + 1))  # width / height
BETWEEN = tuple(4.0 ** ((step + 0.5) / STEPS) for step in range(-STEPS, STEPS))  # where a picture changes its ratio
LEAST_KEPT = 0.5  # share of a picture that a cut must keep: pictures up to 1:8 and 8:1


def nearest_ratio(width: int, height: int) -> int:
    """Number of the ratio next to width / height, in the logarithm."""
    return bisect_right(BETWEEN, width / height)


def crop_to_ratio(image: Image.Image) -> Image.Image:
    """The largest centred part of `image` with the nearest of the ratios.

    DataError: longer than 8:1, where it would be less than half of the picture.
    """
    width, height = image.size
    ratio = RATIOS[nearest_ratio(width, height)]
    cut = (round(height * ratio), height) if width > height * ratio else (width, round(width / ratio))
    cut = (min(max(cut[0], 1), width), min(max(cut[1], 1), height))
    if cut[0] * cut[1] < LEAST_KEPT * width * height:
        kept = cut[0] * cut[1] / (width * height)
        raise DataError(
            f"{width} x {height} pixels",
            f"cut to {'4:1' if width > height else '1:4'}, the longest shape there is, {kept:.1%} of it would be left",
            "cut the picture into pieces up to 8:1",
            "docs/codec.md",
        )
    if cut == image.size:
        return image
    left, top = (width - cut[0]) // 2, (height - cut[1]) // 2
    return image.crop((left, top, left + cut[0], top + cut[1]))
