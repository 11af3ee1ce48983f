"""Image decoding: orientation, transparency, shape, damage, size; arrays without pickle. 1 process, 1 s."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from unicom_dist.config.errors import DataError
from unicom_dist.data import decode
from unicom_dist.data.decode import TargetCache, decode_image, flatten, header_size, to_square
from unicom_dist.data.npy import gather, read_npy, to_tensor, write_npy
from unicom_dist.testing.awkward import awkward_pictures, encoded, near


def test_lossless_images_come_back_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        target = to_square(decode_image(encoded(Image.fromarray(pixels), kind, **options), "k"), 8)
        assert np.array_equal(target, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("name", awkward_pictures())
def test_every_kind_of_picture_is_read_as_it_looks_or_refused_by_name(name: str) -> None:
    picture = awkward_pictures()[name]
    if picture.refusal:
        with pytest.raises(DataError) as caught:
            decode_image(picture.content, f"train/{name}")
        assert caught.value.what.startswith(f"train/{name}: ")
        assert picture.refusal in str(caught.value)
        assert " at 0x" not in str(caught.value)  # manifests hold the reasons: equal runs, equal bytes
        return
    image = decode_image(picture.content, name)
    assert (image.mode, image.size) == ("RGB", picture.size)
    assert near(image.getpixel((0, 0)), picture.colour)
    assert header_size(io.BytesIO(picture.content)) == picture.size


def test_a_turned_picture_is_turned_back() -> None:
    image = Image.new("RGB", (6, 4), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    upright = decode_image(encoded(image, exif=exif), "k")
    assert upright.size == (4, 6)
    assert upright.getpixel((3, 0)) == (255, 0, 0)


def test_sixteen_bits_keep_their_order_and_ends() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    image = decode_image(encoded(Image.fromarray(values)), "k")
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pictures_in_memory_are_flattened_alike() -> None:
    assert flatten(Image.fromarray(np.full((2, 2), 0x8080, np.uint16))).getpixel((0, 0)) == (128, 128, 128)
    assert flatten(Image.new("RGBA", (2, 2), (255, 0, 0, 127))).getpixel((0, 0)) == (255, 128, 128)


def test_an_unreadable_header_has_no_size() -> None:
    assert header_size(io.BytesIO(b"not an image")) == (0, 0)


def test_another_shape_is_fitted_whole_and_centred() -> None:
    target = to_square(Image.new("RGB", (16, 8), "red"), 8)
    assert target.shape == (3, 8, 8)
    assert (target[:, :2] == 255).all()
    assert (target[:, 6:] == 255).all()
    assert (target[0, 2:6] == 255).all()
    assert (target[1, 2:6] == 0).all()


def test_a_huge_image_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 99)
    with pytest.raises(DataError, match="10 x 10 pixels"):
        decode_image(encoded(Image.new("RGB", (10, 10))), "k")


def test_the_cache_stays_within_its_bytes() -> None:
    cache = TargetCache(limit_bytes=2 * 3 * 4 * 4)
    first = [cache.get(number, lambda: np.zeros((3, 4, 4), np.uint8)) for number in range(3)]
    assert cache.get(0, lambda: pytest.fail("it is held")) is first[0]
    assert cache.get(2, lambda: np.ones((3, 4, 4), np.uint8)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64])
def test_arrays_come_back_as_views(dtype: type) -> None:
    array = np.arange(12).reshape(4, 3).astype(dtype)
    content = memoryview(write_npy(array))
    again = read_npy(content, "k")
    assert again.dtype == array.dtype
    assert np.array_equal(again, array)
    assert not again.flags.owndata
    assert np.array_equal(np.load(io.BytesIO(content)), array)


def test_bfloat16_survives() -> None:
    values = torch.randn(3, 2).bfloat16()
    stored = write_npy(values.view(torch.int16).numpy().view("V2"))
    assert torch.equal(to_tensor(read_npy(memoryview(stored), "k")), values)


def test_damaged_arrays_and_objects_are_refused() -> None:
    whole = write_npy(np.zeros((4, 3)))
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for content in (b"", b"x" * 200, whole[:60], whole[:-1], buffer.getvalue(), write_npy_fortran()):
        with pytest.raises(DataError, match="k: the array cannot be read"):
            read_npy(memoryview(content), "k")


def write_npy_fortran() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(np.arange(6).reshape(2, 3)))
    return buffer.getvalue()


def test_arrays_are_gathered_end_to_end() -> None:
    arrays = [np.random.default_rng(n).standard_normal((n + 1, 3)).astype(np.float16) for n in range(4)]
    contents = [memoryview(write_npy(array)) for array in arrays]
    gathered = gather(contents, str)
    assert gathered.dtype == torch.float16
    assert np.array_equal(gathered.numpy(), np.concatenate(arrays))
    assert gather([], str).shape[0] == 0
    halves = torch.randn(3, 2).bfloat16()
    stored = memoryview(write_npy(halves.view(torch.int16).numpy().view("V2")))
    assert torch.equal(gather([stored, stored], str), torch.cat([halves, halves]))


@pytest.mark.parametrize(
    "other",
    [write_npy(np.zeros((2, 4))), write_npy(np.zeros((2, 3), np.float32)), write_npy(np.zeros((2, 3)))[:-1], b"", b"x"],
)
def test_an_array_that_does_not_go_with_the_others_is_named(other: bytes) -> None:
    good = memoryview(write_npy(np.zeros((2, 3))))
    with pytest.raises(DataError, match="sample 1: the array cannot be read"):
        gather([good, memoryview(other), good], lambda n: f"sample {n}")
