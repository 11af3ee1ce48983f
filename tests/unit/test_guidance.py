"""Guidance by text and image: which branches are computed, what comes out, what the renormalisation keeps."""

import pytest
import torch

from unicom_dist.config.errors import ConfigError
from unicom_dist.sample.guidance import Guidance

ALL, TEXT, IMAGE = (torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
VELOCITIES = {"all": ALL, "no text": TEXT, "no image": IMAGE}


def test_both_scales_in_bagels_order() -> None:
    got = Guidance(4.0, 1.5).combine(VELOCITIES, with_images=True)
    first = TEXT + 4.0 * (ALL - TEXT)
    torch.testing.assert_close(got, IMAGE + 1.5 * (first - IMAGE))


def test_image_guidance_acts_where_text_guidance_is_off() -> None:
    guidance = Guidance(1.0, 2.0)
    assert guidance.branches(True) == ["all", "no image"]
    torch.testing.assert_close(guidance.combine(VELOCITIES, True), IMAGE + 2.0 * (ALL - IMAGE))


def test_scales_of_one_are_the_condition_to_the_bit_and_cost_one_branch() -> None:
    assert Guidance(1.0, 1.0).branches(True) == ["all"]
    assert Guidance(1.0, 3.0).branches(False) == ["all"]  # nothing is shown
    assert torch.equal(Guidance(1.0, 1.0).combine(VELOCITIES, True), ALL)


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [
        (Guidance(0.0), ["no text"]),
        (Guidance(0.0, interval=(0.0, 0.5)), ["all", "no text"]),
        (Guidance(3.0, 1.0), ["all", "no text"]),
        (Guidance(3.0, 2.0), ["all", "no text", "no image"]),
    ],
)
def test_only_branches_that_count_are_read(guidance: Guidance, branches: list[str]) -> None:
    assert guidance.branches(True) == branches


@pytest.mark.parametrize(("renorm", "axes"), [("global", (1, 2)), ("channel", (2,))])
def test_renormalised_velocities_are_not_longer_and_each_picture_stands_alone(renorm: str, axes: tuple[int]) -> None:
    guidance = Guidance(4.0, 1.5, renorm=renorm)  # type: ignore[arg-type]
    got = guidance.combine(VELOCITIES, True)
    assert (got.norm(dim=axes) <= ALL.norm(dim=axes) * 1.0001).all()
    assert not torch.allclose(got, ALL)
    alone = guidance.combine({name: v[1:2] for name, v in VELOCITIES.items()}, True)
    assert torch.equal(alone[0], got[1])
    lengthened = Guidance(4.0, 1.5, renorm=renorm, renorm_min=1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(lengthened.combine(VELOCITIES, True), Guidance(4.0, 1.5).combine(VELOCITIES, True))


def test_the_interval_is_half_open() -> None:
    guidance = Guidance(interval=(0.2, 0.6))
    assert [guidance.acts(t) for t in (0.0, 0.2, 0.5, 0.6, 0.9)] == [False, True, True, False, False]


@pytest.mark.parametrize(
    "values", [{"text": -1}, {"interval": (0.6, 0.2)}, {"interval": (0, 1.2)}, {"renorm": "all"}, {"renorm_min": 2}]
)
def test_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Guidance(**values)  # type: ignore[arg-type]
