"""InceptionV3 as FID knows it: the network of 2015-12-05, up to its pooled features.

It differs from the InceptionV3 of model libraries: average pools leave the padding out of the average, the last block
has a max pool in its place, and the pictures come at 299 x 299 px. FID is defined by these weights; another network's
figures are not comparable. It is a judge only: no encoder or loss may look through it.
Layers have the names of the archive. Shapes: images [B, 3, 299, 299], features [B, 2048].
Ref: Szegedy et al., arXiv 1512.00567; Heusel et al., arXiv 1706.08500.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from unicom_dist.config.errors import ConfigError
from unicom_dist.models.encoders.folding import fold_batch_norm

SIDE = 299
FEATURES = 2048
NORM_EPS = 1e-3
Size = int | tuple[int, int]


class _Conv(nn.Conv2d):
    """Convolution with its batch norm folded in, and ReLU. Odd kernels of stride 1 keep the size unless padding = 0."""

    def __init__(self, inputs: int, outputs: int, kernel: Size = 1, stride: int = 1, padding: Size = 0) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


def _tower(inputs: int, *convolutions: tuple[int, Size, int, Size]) -> nn.Sequential:
    """Convolutions in a row, each (outputs, kernel, stride, padding), called conv, conv_1, conv_2, ..."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (outputs, kernel, stride, padding) in enumerate(convolutions):
        layers[f"conv_{number}" if number else "conv"] = _Conv(inputs, outputs, kernel, stride, padding)
        inputs = outputs
    return nn.Sequential(layers)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, two 3x3, pool."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.conv = _Conv(inputs, 64)
        self.tower = _tower(inputs, (48, 1, 1, 0), (64, 5, 1, 2))
        self.tower_1 = _tower(inputs, (64, 1, 1, 0), (96, 3, 1, 1), (96, 3, 1, 1))
        self.tower_2 = _tower(inputs, (pooled, 1, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(_average(x))], 1)


class _BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = _Conv(inputs, 384, 3, 2)
        self.tower = _tower(inputs, (64, 1, 1, 0), (96, 3, 1, 1), (96, 3, 2, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), F.max_pool2d(x, 3, 2)], 1)


ROW: tuple[Size, int, Size] = ((1, 7), 1, (0, 3))
COLUMN: tuple[Size, int, Size] = ((7, 1), 1, (3, 0))


class _BlockC(nn.Module):
    """17 x 17: 1x1, one and two 7x7 taken apart into rows and columns, pool."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = _Conv(inputs, 192)
        self.tower = _tower(inputs, (width, 1, 1, 0), (width, *ROW), (192, *COLUMN))
        self.tower_1 = _tower(inputs, (width, 1, 1, 0), (width, *COLUMN), (width, *ROW), (width, *COLUMN), (192, *ROW))
        self.tower_2 = _tower(inputs, (192, 1, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(_average(x))], 1)


class _BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.tower = _tower(inputs, (192, 1, 1, 0), (320, 3, 2, 0))
        self.tower_1 = _tower(inputs, (192, 1, 1, 0), (192, *ROW), (192, *COLUMN), (192, 3, 2, 0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower(x), self.tower_1(x), F.max_pool2d(x, 3, 2)], 1)


class _BlockE(nn.Module):
    """8 x 8: 1x1, two 3x3 that end in a row beside a column, pool."""

    def __init__(self, inputs: int, max_pool: bool) -> None:
        super().__init__()
        self._max_pool = max_pool
        self.conv = _Conv(inputs, 320)
        self.tower_conv = _Conv(inputs, 384)
        self.tower_mixed_conv = _Conv(384, 384, (1, 3), 1, (0, 1))
        self.tower_mixed_conv_1 = _Conv(384, 384, (3, 1), 1, (1, 0))
        self.tower_1_conv = _Conv(inputs, 448)
        self.tower_1_conv_1 = _Conv(448, 384, 3, 1, 1)
        self.tower_1_mixed_conv = _Conv(384, 384, (1, 3), 1, (0, 1))
        self.tower_1_mixed_conv_1 = _Conv(384, 384, (3, 1), 1, (1, 0))
        self.tower_2_conv = _Conv(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self._max_pool else _average(x)
        ends = [self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)]
        ends += [self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b)]
        return torch.cat([self.conv(x), *ends, self.tower_2_conv(pooled)], 1)


class FidInception(nn.Module):
    """Images [B, 3, 299, 299] about [-1, 1] -> features [B, 2048] float32. ValueError for another size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _Conv(3, 32, 3, 2)
        self.conv_1 = _Conv(32, 32, 3)
        self.conv_2 = _Conv(32, 64, 3, 1, 1)
        self.conv_3 = _Conv(64, 80)
        self.conv_4 = _Conv(80, 192, 3)
        self.mixed, self.mixed_1, self.mixed_2 = _BlockA(192, 32), _BlockA(256, 64), _BlockA(288, 64)
        self.mixed_3 = _BlockB(288)
        self.mixed_4, self.mixed_5 = _BlockC(768, 128), _BlockC(768, 160)
        self.mixed_6, self.mixed_7 = _BlockC(768, 160), _BlockC(768, 192)
        self.mixed_8 = _BlockD(768)
        self.mixed_9, self.mixed_10 = _BlockE(1280, max_pool=False), _BlockE(2048, max_pool=True)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"pictures of [3, {SIDE}, {SIDE}] are needed, got {list(images.shape[1:])}")
        x = self.conv(images.contiguous(memory_format=torch.channels_last))
        x = F.max_pool2d(self.conv_2(self.conv_1(x)), 3, 2)
        x = F.max_pool2d(self.conv_4(self.conv_3(x)), 3, 2)
        x = self.mixed_3(self.mixed_2(self.mixed_1(self.mixed(x))))
        x = self.mixed_8(self.mixed_7(self.mixed_6(self.mixed_5(self.mixed_4(x)))))
        x = self.mixed_10(self.mixed_9(x))
        features: Tensor = x.mean((2, 3))
        return features


@torch.no_grad()
def load_fid_inception(folder: str | Path, device: torch.device | str = "cpu") -> FidInception:
    """The network with the weights of `folder`, frozen. ConfigError if they are missing or another network's."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"eval.fid_path = {str(folder)!r}: no model.safetensors there",
            "rFID and KID are measured in the features of this network, which the quick start does not fetch",
            "`unicom data fetch RECIPE --suite reconstruction` (81 MB), or `eval.fid_path: ''` for the other figures",
            "docs/evaluation.md",
        )
    model = FidInception()
    try:
        weights = load_file(path)
        for name, module in model.named_modules():
            if not isinstance(module, nn.Conv2d) or module.bias is None:
                continue
            beta, mean, var = (weights.pop(f"{name}.{part}") for part in ("beta", "mean", "var"))
            moments = [torch.ones_like(beta), beta, mean, var]
            weight, bias = fold_batch_norm(weights.pop(f"{name}.weight"), None, moments, NORM_EPS)
            if weight.shape != module.weight.shape:
                raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected {tuple(module.weight.shape)}")
            module.weight.copy_(weight)
            module.bias.copy_(bias)
        if weights:
            raise ValueError(f"unknown {next(iter(weights))}")
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise ConfigError(
            f"eval.fid_path = {str(folder)!r} does not hold the Inception network of FID",
            str(error),
            "delete the folder and run `unicom data fetch RECIPE --suite reconstruction`",
            "docs/evaluation.md",
        ) from error
    model = model.eval().requires_grad_(False).to(device)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
