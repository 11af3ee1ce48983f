"""Nearest-prototype judge. One process, milliseconds."""

import numpy as np
import pytest
import torch
from PIL import Image

from unicom_dist.evaluate.generation import Gallery, kinds_of
from unicom_dist.evaluate.heldout import Pair
from unicom_dist.evaluate.judge import build_prototypes, correct_within


def pair(caption: str, colour: tuple[int, int, int], *further: str) -> Pair:
    return Pair(caption, caption, further, Image.new("RGB", (8, 8), colour), (1, 1), lambda: np.zeros((1, 1)))


def colours(pictures):
    return torch.tensor([picture.resize((1, 1)).getpixel((0, 0)) for picture in pictures]).float()


PAIRS = [
    pair("cherry", (255, 0, 0), "fruit", "red"),
    pair("brick", (200, 20, 0), "red"),
    pair("sky", (0, 0, 255), "blue"),
    pair("jeans", (20, 0, 200), "clothing", "blue"),
    pair("fog", (128, 128, 128)),
]


def test_every_real_picture_is_nearest_to_its_own_prototype():
    features = torch.randn(20, 8) + 5
    captions = [f"thing {i}" for i in range(20)]
    assert build_prototypes(features, captions).ranks(features, captions).tolist() == [0] * 20


def test_centring_removes_what_all_pictures_share():
    # Without centring a huge common direction makes all cosines about 1 and drowns the differences in brightness.
    different = torch.eye(4)
    common = torch.full((4, 4), 1000.0)
    captions = ["a", "b", "c", "d"]
    prototypes = build_prototypes(different + common, captions)
    assert prototypes.ranks(0.2 * different + common, captions).tolist() == [0] * 4


def test_rank_counts_the_nearer_prototypes():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    prototypes = build_prototypes(features, ["a", "b", "c"])
    probe = torch.tensor([[0.9, 0.3]])
    assert [prototypes.ranks(probe, [caption]).item() for caption in "abc"] == [0, 1, 2]


def test_pictures_of_one_caption_are_averaged():
    features = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-3.0, -3.0]])
    prototypes = build_prototypes(features, ["a", "a", "b"])
    assert prototypes.captions == ["a", "b"]
    torch.testing.assert_close(prototypes.centre, torch.tensor([-1.0, -1.0]))
    assert prototypes.chance == 0.5


def test_a_constant_feature_is_never_right_by_a_tie():
    # A collapsed model whose feature equals the centre is equally far from everything.
    prototypes = build_prototypes(torch.eye(5), list("abcde"))
    ranks = prototypes.ranks(prototypes.centre.repeat(5, 1), list("abcde"))
    assert correct_within(ranks, 1).sum() == 0


def test_top_k_grows_with_k():
    ranks = torch.tensor([0, 3, 7])
    assert correct_within(ranks, 1).tolist() == [1, 0, 0]
    assert correct_within(ranks, 5).tolist() == [1, 1, 0]


def test_retrieval_is_the_share_of_the_others_that_are_farther():
    prototypes = build_prototypes(torch.eye(5), list("abcde"))
    assert prototypes.farther(torch.tensor([0, 1, 4])).tolist() == [1, 0.75, 0]


def test_unknown_and_single_captions_are_refused():
    with pytest.raises(ValueError, match="two different captions"):
        build_prototypes(torch.eye(2), ["a", "a"])
    with pytest.raises(KeyError):
        build_prototypes(torch.eye(2), ["a", "b"]).ranks(torch.eye(2)[:1], ["c"])


def test_the_kind_of_a_picture_is_the_text_that_most_pictures_share():
    assert kinds_of(PAIRS) == {0: "red", 1: "red", 2: "blue", 3: "blue"}
    alike = [*PAIRS, *(pair(f"cloud {n}", (9, 9, 9)) for n in range(200))]
    assert kinds_of(alike) == {}  # two of two hundred are no kind


def test_a_drawn_picture_may_be_of_the_right_kind_though_not_the_right_one():
    gallery = Gallery(colours, PAIRS)
    assert gallery.kinds is not None
    assert gallery.kinds.captions == ["blue", "red"]
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ((230, 0, 10), (0, 10, 230)))
    drawn = gallery.judge([red, red, blue, red], ["cherry", "brick", "jeans", "fog"])
    assert drawn.kind_ranks.tolist() == [0, 0, 0]  # fog has none
    assert gallery.judge([blue, red], ["cherry", "sky"]).kind_ranks.tolist() == [1, 1]


def test_without_further_texts_there_are_no_kinds():
    gallery = Gallery(colours, [pair("a", (255, 0, 0)), pair("b", (0, 0, 255))])
    assert gallery.kinds is None
    assert gallery.judge([PAIRS[0].picture], ["a"]).kind_ranks.tolist() == []
