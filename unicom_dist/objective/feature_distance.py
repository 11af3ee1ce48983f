"""Distance of pictures in the features of a classification network, without weights learnt from human judgements.

1 - cosine of the two features at each place, averaged over the places of a stage and over the stages: LPIPS with equal
weights. For a codec whose encoder is neither network; every colour and place that moves a stage's features counts.
Shapes: B images [B, 3, H, W] in [-1, 1]; a stage's features [B, C, h, w].
"""

from collections.abc import Callable, Iterator
from typing import Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.models.encoders.base import weights_file
from unicom_dist.models.encoders.efficientnet import PYRAMID, EfficientNetLite2
from unicom_dist.models.encoders.resnet import ResNet50, load_resnet50

Kind = Literal["efficientnet-lite2", "resnet50"]
Stages = Callable[[nn.Module, Tensor], Iterator[Tensor]]


def _efficientnet_stages(network: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """The four depths of the encoder's pyramid, at 1/4, 1/8, 1/16 and 1/32 of the side."""
    network = cast(EfficientNetLite2, network)
    taken = {number for number, _ in PYRAMID}
    x = network.stem((images * 127.5 + 0.5) / 128)
    for number, block in enumerate(network.blocks):
        x = block(x)
        if number in taken:
            yield x


def _resnet_stages(network: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """The ends of the four stages, at 1/4 to 1/32 of the side."""
    network = cast(ResNet50, network)
    pixels = (images.flip(1) + 1) * 127.5 - network.mean
    x = F.max_pool2d(network.conv1(pixels).relu(), 3, 2, padding=1)
    stage = ""
    for name, block in network.blocks.items():
        if stage and not name.startswith(stage):
            yield x
        stage, x = name[0], block(x)
    yield x


class FeatureDistance(nn.Module):
    """A frozen network and which of its activations are compared. Convolutions run in the dtype of the weights."""

    def __init__(self, network: nn.Module, stages: Stages) -> None:
        super().__init__()
        self.network, self._stages = network.requires_grad_(False), stages

    @classmethod
    def load(cls, kind: Kind, folder: str) -> "FeatureDistance":
        """The network with the published weights in `folder`. ConfigError: none there; ValueError, KeyError: others."""
        if kind == "resnet50":
            return cls(load_resnet50(folder), _resnet_stages)
        network = EfficientNetLite2()
        network.load_published(load_file(weights_file(folder, kind)))
        return cls(network.to(memory_format=torch.channels_last), _efficientnet_stages)  # type: ignore[call-overload]

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance [B] float32 of images to references, both [B, 3, H, W] in [-1, 1]. No gradient to the references."""
        dtype = next(self.network.parameters()).dtype
        with torch.no_grad():
            expected = list(self._stages(self.network, references.to(dtype)))
        got = self._stages(self.network, images.to(dtype))
        distances = [
            1 - F.cosine_similarity(a.float(), b.float(), dim=1).mean((1, 2))
            for a, b in zip(got, expected, strict=True)
        ]
        return torch.stack(distances).mean(0)
