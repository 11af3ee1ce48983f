"""Shapes of targets, the cut that encoder and decoder share, the order of groups. 1 process, a few seconds."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import DecoderConfig, EncoderConfig
from unicom_dist.data.buckets import BucketOrder, Buckets, Shape, group_size
from unicom_dist.data.decode import decode_image, to_square
from unicom_dist.data.order import Order
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.sizes import set_sizes, shard_sizes
from unicom_dist.models.encoders.crop import LEAST_KEPT, RATIOS, crop_to_ratio, nearest_ratio
from unicom_dist.models.encoders.random import GRID, SUBPIXELS, RandomEncoder
from unicom_dist.models.encoders.siglip2 import Siglip2Encoder
from unicom_dist.testing.awkward import awkward_pictures
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config


def decoder(base: int = 1024, patch: int = 16, buckets: str = "aspect") -> DecoderConfig:
    return DecoderConfig.model_validate({"image_px": base, "patch_px": patch, "buckets": buckets})


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, both from 0 to 255 over the whole picture."""
    red = np.broadcast_to((np.arange(width) + 0.5) / width * 255, (height, width))
    green = np.broadcast_to(((np.arange(height) + 0.5) / height * 255)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).round().astype(np.uint8))


def test_there_are_33_shapes_of_one_area_from_1_4_to_4_1() -> None:
    shapes = Buckets(decoder()).shapes
    assert len(RATIOS) == len(shapes) == 33
    assert {Shape(2048, 512), Shape(1024, 1024), Shape(512, 2048)} <= set(shapes)
    for height, width in shapes:
        assert height % 16 == width % 16 == 0
        assert abs(height * width / 1024**2 - 1) < 0.03
    assert [shape[::-1] for shape in shapes[::-1]] == [tuple(shape) for shape in shapes]


def test_the_sides_are_multiples_of_what_a_patch_covers() -> None:
    over_vae = DecoderConfig(space="vae", vae_path="x", vae_scale=8, patch_px=2, image_px=256, buckets="aspect")
    assert all(side % 16 == 0 for shape in Buckets(over_vae).shapes for side in shape)
    small = Buckets(decoder(16, 4))
    assert len(small.shapes) < 33  # neighbouring ratios round to one shape
    assert len(set(small.shapes)) == len(small.shapes)


def test_square_has_one_shape_and_todays_targets() -> None:
    buckets = Buckets(decoder(32, 4, "square"))
    assert buckets.shapes == [Shape(32, 32)]
    for size in ((40, 10), (32, 32), (3, 500), (20_000, 10)):
        assert buckets.of(*size) == 0
        image = ramp(*size)
        assert np.array_equal(buckets.target(image), to_square(image, 32))


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_the_nearest_ratio_keeps_most_of_the_picture(width: int, height: int) -> None:
    ratio = RATIOS[nearest_ratio(width, height)]
    kept = min(ratio / (width / height), (width / height) / ratio)
    if 1 / 4 <= width / height <= 4:
        assert kept > 0.957
        assert kept == max(min(r / (width / height), (width / height) / r) for r in RATIOS)
        cut = crop_to_ratio(Image.new("L", (width, height)))
        assert abs(cut.width * cut.height / (width * height) - kept) < 1 / min(width, height)


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_many_sizes_at_once_are_as_one_by_one(sizes: list[tuple[int, int]]) -> None:
    for kind in ("aspect", "square"):
        buckets = Buckets(decoder(buckets=kind))
        expected = [buckets.of(*size) if min(size) else buckets.of(1, 1) for size in sizes]
        assert buckets.of_all(np.array(sizes, np.int32)).tolist() == expected


def test_a_picture_that_would_lose_more_than_half_is_refused() -> None:
    assert crop_to_ratio(Image.new("L", (800, 100))).size == (400, 100)
    for size in ((820, 100), (100, 820), (20_000, 10)):
        with pytest.raises(DataError, match=f"{size[0]} x {size[1]} pixels") as caught:
            crop_to_ratio(Image.new("L", size))
        assert "4:1" in caught.value.why or "1:4" in caught.value.why
        with pytest.raises(DataError):
            Buckets(decoder()).target(Image.new("RGB", size))
    assert LEAST_KEPT == 0.5


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (1000, 260), (90, 100), (1, 1), (3, 2)])
def test_targets_cover_their_shape_and_stretch_nothing(size: tuple[int, int]) -> None:
    buckets = Buckets(decoder(64, 4))
    target = buckets.target(ramp(*size)).astype(float)
    assert target.shape == (3, *buckets.shape_of(*size))
    if min(size) < 64:
        return
    # Pixels of the picture per pixel of the target, along and across: equal, or something is stretched.
    across = (target[0, :, -5].mean() - target[0, :, 4].mean()) / 255 * size[0] / (target.shape[2] - 9)
    down = (target[1, -5].mean() - target[1, 4].mean()) / 255 * size[1] / (target.shape[1] - 9)
    assert abs(across / down - 1) < 0.03
    assert abs(target[0].mean() + target[1].mean() - 255) < 3  # the middle stays in the middle


def encoder_pixels(which: str, image: Image.Image) -> np.ndarray:
    """[rows, columns, 3]: mean colour of what each token sees."""
    if which == "random":
        encoder = RandomEncoder(EncoderConfig(kind="random", crop="bucket"))
        pixels = encoder.preprocess(image)["pixels"].astype(float)
        rows, columns = pixels.shape[0] // SUBPIXELS, pixels.shape[1] // SUBPIXELS
        return pixels.reshape(rows, SUBPIXELS, columns, SUBPIXELS, 3).mean((1, 3))
    siglip = object.__new__(Siglip2Encoder)  # preparing a picture needs no network
    siglip.patch_px, siglip.max_tokens, siglip._crop = 16, 256, True
    prepared = siglip.preprocess(image)
    rows, columns = prepared["grid"]
    return prepared["patches"].reshape(rows, columns, 16 * 16, 3).astype(float).mean(2)


@pytest.mark.parametrize("which", ["random", "siglip2"])
@pytest.mark.parametrize("size", [(640, 480), (300, 500), (1000, 260), (1500, 260), (260, 2000), (400, 409)])
def test_every_token_stands_where_the_target_shows_what_it_saw(which: str, size: tuple[int, int]) -> None:
    image = ramp(*size)
    seen = encoder_pixels(which, image)
    target = Buckets(decoder(256, 8)).target(image).transpose(1, 2, 0).astype(float)
    rows, columns = seen.shape[:2]
    for row in range(rows):
        for column in range(columns):
            place = (
                slice(*(round(n / rows * target.shape[0]) for n in (row, row + 1))),
                slice(*(round(n / columns * target.shape[1]) for n in (column, column + 1))),
            )
            shown = target[place].mean((0, 1))
            # In units of the picture's sides: within a quarter of a token, and a few levels for the resizing.
            assert np.abs(shown - seen[row, column]).max() / 255 < 0.25 / max(rows, columns) + 0.012


def test_without_the_cut_the_same_tokens_would_stand_elsewhere() -> None:
    # The test above can fail: a picture of 6:1 seen whole, drawn as 4:1.
    image = ramp(1500, 250)
    whole = RandomEncoder(EncoderConfig(kind="random")).preprocess(image)["pixels"][GRID * SUBPIXELS // 2, 0]
    target = Buckets(decoder(256, 8)).target(image)
    assert abs(int(whole[0]) - int(target[0, 128 // 2, 0])) / 255 > 0.1


def test_the_cut_is_part_of_the_features_identity() -> None:
    plain, cut = (RandomEncoder(EncoderConfig(kind="random", crop=crop)) for crop in ("none", "bucket"))
    assert plain.fingerprint != cut.fingerprint
    assert plain.encode([plain.preprocess(ramp(64, 32))])[0].grid == (GRID, GRID)
    assert cut.encode([cut.preprocess(ramp(64, 32))])[0].grid == (3, 5)


def test_the_encoder_must_see_what_the_decoder_draws(tmp_path: Path) -> None:
    tiny_config(tmp_path, encoder={"crop": "bucket"}, codec={"decoder": {"buckets": "aspect"}})
    for wrong in ({"encoder": {"crop": "bucket"}}, {"codec": {"decoder": {"buckets": "aspect"}}}):
        with pytest.raises(ConfigError, match=r"codec\.decoder\.buckets") as caught:
            tiny_config(tmp_path, **wrong)
        assert "encoder.crop" in str(caught.value)
    with pytest.raises(ConfigError, match="efficientnet-lite2"):
        tiny_config(tmp_path, encoder={"crop": "bucket", "kind": "efficientnet-lite2"})


@given(
    buckets=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    group=st.sampled_from([1, 2, 4, 8]),
    resume=st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_groups_hold_one_bucket_and_an_epoch_every_sample_once(buckets: list[int], group: int, resume: int) -> None:
    table = np.array(buckets, np.int8)
    whole = BucketOrder(Order(len(buckets), "seed"), table, group)
    drawn = [whole.take(group) for _ in range(40)]
    for one in drawn:
        assert len({buckets[number] for number, _ in one}) == 1
        assert len(one) == group
    flat = [draw for one in drawn for draw in one]
    assert len(set(flat)) == len(flat)  # (sample, visit): nothing twice in an epoch
    waiting = {place for places in whole.waiting.values() for place in places}
    order = Order(len(buckets), "seed")
    assert set(flat) | {order[place] for place in waiting} == {order[n] for n in range(whole.taken)}  # nothing lost
    assert all(len(places) < group for places in whole.waiting.values())
    first = BucketOrder(order, table, group)
    for _ in range(resume):
        first.take(group)
    again = BucketOrder(order, table, group)
    position = first.snapshot()
    again.restore(position["taken"], position["waiting"])
    assert [again.take(group) for _ in range(5)] == drawn[resume : resume + 5]


@pytest.mark.parametrize(("batch", "group"), [(256, 8), (32, 8), (12, 6), (10, 5), (7, 7), (22, 2), (11, 1), (1, 1)])
def test_groups_divide_the_batch(batch: int, group: int) -> None:
    assert group_size(batch) == group


def test_sizes_are_read_from_headers_once_and_again_for_other_contents(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    kinds = [(32, 32), (64, 16), (5, 40)]
    write_tiny_sets(config, 23, sizes=kinds)
    pairs = ShardSet(Path(config.data.path) / "train")
    expected = [kinds[n % 3] for n in range(23)]
    assert set_sizes(pairs).tolist() == [list(size) for size in expected]
    entry = pairs.manifest.shards[0]
    cache = pairs.folder / f"{entry.name}.sizes"
    cache.write_text(cache.read_text().replace("[64,16]", "[1,2]"))
    assert (set_sizes(pairs)[1] == (1, 2)).all()  # the file is what is read
    other = entry._replace(sha256="0" * 64)
    assert (shard_sizes(pairs.folder, other)[1] == (64, 16)).all()
    for damaged in ("", "{", "[]", '{"format": 1}'):
        cache.write_text(damaged)
        assert (set_sizes(pairs)[1] == (64, 16)).all()


def test_awkward_pictures_have_targets_or_are_refused() -> None:
    buckets = Buckets(decoder(16, 4))
    for name, picture in awkward_pictures().items():
        if picture.refusal or name == "very-wide":
            with pytest.raises(DataError):
                buckets.target(decode_image(picture.content, name))
        else:
            assert buckets.target(decode_image(picture.content, name)).shape == (3, *buckets.shape_of(*picture.size))
