"""LPIPS: a distance of pictures in the features of a classification network, weighted by human judgements.

Per stage of the trunk: features after the rectifier, unit length per place, squared difference, weighted over channels,
mean over places; summed over stages. Ref: Zhang et al., arXiv 1801.03924, version 0.1.
Files: `{alex,vgg}.safetensors` with `trunk.<i>.weight|bias` (i-th convolution, OIHW) and `linear.<k>.weight`,
[1, C, 1, 1].
"""

from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.config.errors import DataError

Kind = Literal["alex", "vgg"]

# Stages of convolutions; a convolution is (inputs, outputs, kernel, stride, padding). A max pool stands before a stage.
TRUNKS: dict[str, list[list[tuple[int, int, int, int, int]]]] = {
    "alex": [
        [(3, 64, 11, 4, 2)],
        [(64, 192, 5, 1, 2)],
        [(192, 384, 3, 1, 1)],
        [(384, 256, 3, 1, 1)],
        [(256, 256, 3, 1, 1)],
    ],
    "vgg": [
        [(3, 64, 3, 1, 1), (64, 64, 3, 1, 1)],
        [(64, 128, 3, 1, 1), (128, 128, 3, 1, 1)],
        [(128, 256, 3, 1, 1), *[(256, 256, 3, 1, 1)] * 2],
        [(256, 512, 3, 1, 1), *[(512, 512, 3, 1, 1)] * 2],
        [(512, 512, 3, 1, 1)] * 3,
    ],
}
POOLS: dict[str, list[tuple[int, int]]] = {  # (kernel, stride) before each stage, (1, 1) = none
    "alex": [(1, 1), (3, 2), (3, 2), (1, 1), (1, 1)],
    "vgg": [(1, 1), (2, 2), (2, 2), (2, 2), (2, 2)],
}
CENTRE, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
TINY = 1e-10


class Lpips(nn.Module):
    """A frozen LPIPS network; weights are random until `load`ed. Convolutions run in the dtype of the weights."""

    centre: Tensor
    scale: Tensor

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        stages = TRUNKS[kind]
        self.trunk = nn.ModuleList(nn.Conv2d(*shape) for stage in stages for shape in stage)
        self.linear = nn.ModuleList(nn.Conv2d(stage[-1][1], 1, 1, bias=False) for stage in stages)
        self.register_buffer("centre", torch.tensor(CENTRE)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, kind: Kind, folder: str | Path) -> "Lpips":
        """The network of `folder/<kind>.safetensors`. DataError if the file is missing or not of this network."""
        path = Path(folder) / f"{kind}.safetensors"
        if not path.is_file():
            raise DataError(f"no perceptual network at {path}", "the codec's loss needs it", "unicom data fetch")
        network = cls(kind)
        try:
            network.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{path} is not an LPIPS {kind} network", reason, "delete it and run unicom data fetch"
            ) from error
        return network

    @property
    def dtype(self) -> torch.dtype:
        """In which the convolutions run."""
        return next(self.trunk.parameters()).dtype

    def features(self, images: Tensor) -> list[Tensor]:
        """Activations [B, C, h, w] at the end of each stage, of images [B, 3, H, W] in [-1, 1]."""
        x = ((images.float() - self.centre) / self.scale).to(self.dtype)
        convolutions = iter(self.trunk)
        taps = []
        for stage, (kernel, stride) in zip(TRUNKS[self.kind], POOLS[self.kind], strict=True):
            if kernel > 1:
                x = F.max_pool2d(x, kernel, stride)
            for _ in stage:
                x = F.relu(next(convolutions)(x))
            taps.append(x)
        return taps

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance [B] float32 of images to references, both [B, 3, H, W] in [-1, 1]. No gradient to the references."""
        with torch.no_grad():
            expected = self.features(references)
        total = torch.zeros(images.shape[0], device=images.device)
        for got, wanted, weight in zip(self.features(images), expected, self.linear.parameters(), strict=True):
            difference = (unit_length(got.float()) - unit_length(wanted.float())).square()
            total = total + (difference * weight.float()).sum(1).mean((1, 2))
        return total


def unit_length(x: Tensor) -> Tensor:
    """x over its length along channels, [B, C, h, w]."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + TINY)
