"""LPIPS equals the published package on the same weights. One process, seconds."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fetched import published
from safetensors.torch import save_file
from torch import nn

from unicom_dist.config.errors import DataError
from unicom_dist.objective.perceptual import Kind, Lpips


def trunk_of_torchvision(kind: Kind) -> nn.Sequential:
    """The `features` of torchvision's AlexNet or VGG16, layer by layer."""
    layers: list[nn.Module] = []
    if kind == "alex":
        for place, (inputs, outputs, kernel, stride, padding) in enumerate(
            [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
        ):
            layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]
            layers += [nn.MaxPool2d(3, 2)] if place in (0, 1, 4) else []
    else:
        inputs = 3
        for outputs in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if not outputs:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*layers)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The published package's class, over stand-in trunks: torchvision itself is not needed for architectures."""
    models = ModuleType("torchvision.models")
    for kind, name in (("alex", "alexnet"), ("vgg", "vgg16")):
        setattr(models, name, lambda pretrained, kind=kind: SimpleNamespace(features=trunk_of_torchvision(kind)))
    torchvision = ModuleType("torchvision")
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    for name in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        monkeypatch.delitem(sys.modules, name)
    yield published("lpips", "lpips").LPIPS
    for name in [name for name in sys.modules if name.split(".")[0] == "lpips"]:
        del sys.modules[name]


def transplanted(theirs: Any, kind: Kind) -> dict[str, torch.Tensor]:
    """The reference's weights under the names of our files."""
    convolutions = [module for module in theirs.net.modules() if isinstance(module, nn.Conv2d)]
    weights = {f"linear.{k}.weight": theirs.lins[k].model[-1].weight for k in range(5)}
    for number, convolution in enumerate(convolutions):
        weights |= {f"trunk.{number}.weight": convolution.weight, f"trunk.{number}.bias": convolution.bias}
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_distance_equals_the_published_package(kind: Kind, reference: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = reference(pretrained=False, pnet_rand=True, net=kind, verbose=False)
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    for convolution in theirs.net.modules():
        if isinstance(convolution, nn.Conv2d):  # keep activations alive through the depth
            nn.init.kaiming_normal_(convolution.weight)
    for linear in theirs.lins:
        linear.model[-1].weight.uniform_(0, 1)
    save_file(transplanted(theirs, kind), tmp_path / f"{kind}.safetensors")
    ours = Lpips.load(kind, tmp_path)
    images, references = (torch.rand(2, 2, 3, 64, 48) * 2 - 1).unbind(0)
    images.requires_grad_()
    expected = theirs(images, references).flatten()
    distance = ours(images, references)
    assert expected.min() > 0.1
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(distance.sum(), images)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


def test_distance_of_a_picture_to_itself_is_zero_and_its_gradient_finite() -> None:
    network = Lpips("alex")
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance = network(image, image.detach())
    assert distance.item() == 0
    distance.sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_gradient_is_finite_where_a_feature_map_is_dead() -> None:
    network = Lpips("alex")
    with torch.no_grad():
        network.trunk[2].bias.fill_(-1e3)
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    network(image, torch.rand(1, 3, 64, 64)).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_weights_stay_as_they_are() -> None:
    assert not any(parameter.requires_grad for parameter in Lpips("alex").parameters())


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no perceptual network at .*alex\.safetensors"):
        Lpips.load("alex", tmp_path)
    save_file({"trunk.0.weight": torch.zeros(1)}, tmp_path / "alex.safetensors")
    with pytest.raises(DataError, match="is not an LPIPS alex network"):
        Lpips.load("alex", tmp_path)
    (tmp_path / "alex.safetensors").write_bytes(b"torn")
    with pytest.raises(DataError, match="is not an LPIPS alex network"):
        Lpips.load("alex", tmp_path)
