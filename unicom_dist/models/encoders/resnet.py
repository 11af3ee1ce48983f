"""ResNet50 (ImageNet) up to its pooled features: the judge of generated pictures.

It is neither the encoder nor the network of the perceptual loss, so what it sees was not optimised against.
The weights come from Keras: convolutions have a bias, the stride sits on the first 1x1, channels are B, G, R.
Shapes: images [B, 3, H, W] RGB in [-1, 1], features [B, 2048]. Ref: He et al. 2015 (arXiv:1512.03385).
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unicom_dist.config.errors import ConfigError
from unicom_dist.models.encoders.folding import fold_batch_norm

NORM_EPS = 1e-3
MEAN_BGR = (103.939, 116.779, 123.68)
STAGES = ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512))  # number in the layer names, blocks, width


class _Bottleneck(nn.Module):
    def __init__(self, width: int, hidden: int, stride: int, project: bool) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, hidden, 1, stride)
        self.b = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.c = nn.Conv2d(hidden, 4 * hidden, 1)
        self.shortcut = nn.Conv2d(width, 4 * hidden, 1, stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x).relu_()).relu_())
        y += x if self.shortcut is None else self.shortcut(x)
        out: Tensor = y.relu_()
        return out


class ResNet50(nn.Module):
    """Images [B, 3, H, W] RGB in [-1, 1], at best 224 px (at least 64) -> pooled features [B, 2048] float32."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN_BGR)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3)
        self.blocks = nn.ModuleDict()
        width = 64
        for number, repeats, hidden in STAGES:
            for block in range(repeats):
                stride = 2 if block == 0 and number > 2 else 1
                self.blocks[f"{number}{'abcdef'[block]}"] = _Bottleneck(width, hidden, stride, block == 0)
                width = 4 * hidden

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.flip(1) + 1) * 127.5 - self.mean
        x = self.conv1(pixels.contiguous(memory_format=torch.channels_last)).relu_()
        # Zeros are below nothing after ReLU, so padding inside the pool equals Keras' zero padding before it.
        x = nn.functional.max_pool2d(x, 3, 2, padding=1)
        for block in self.blocks.values():
            x = block(x)
        pooled: Tensor = x.mean((2, 3)).float()
        return pooled


@torch.no_grad()
def load_resnet50(folder: str | Path, device: torch.device | str = "cpu") -> ResNet50:
    """The network with the weights of `folder`, frozen. ConfigError if they are missing or another network's."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"eval.judge_path = {str(folder)!r}: no model.safetensors there",
            "weights are read from a local folder and never downloaded on the way",
            "run `unicom data fetch`, or name the folder that holds ResNet50",
            "docs/data.md",
        )
    weights = load_file(path)
    model = ResNet50()
    parts = [(model.conv1, "conv1", "bn_conv1")]
    for name, block in model.blocks.items():
        for branch in ("a", "b", "c"):
            parts.append((getattr(block, branch), f"res{name}_branch2{branch}", f"bn{name}_branch2{branch}"))
        if isinstance(block.shortcut, nn.Conv2d):
            parts.append((block.shortcut, f"res{name}_branch1", f"bn{name}_branch1"))
    try:
        for conv, kernel, norm in parts:
            moments = [weights[f"{norm}.{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")]
            weight, bias = fold_batch_norm(weights[f"{kernel}.weight"], weights[f"{kernel}.bias"], moments, NORM_EPS)
            if weight.shape != conv.weight.shape or conv.bias is None:
                raise ValueError(f"{kernel} has shape {tuple(weight.shape)}, expected {tuple(conv.weight.shape)}")
            conv.weight.copy_(weight)
            conv.bias.copy_(bias)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"eval.judge_path = {str(folder)!r} does not hold ResNet50 weights",
            f"{error}",
            "run `unicom data fetch` into an empty folder",
            "docs/data.md",
        ) from error
    model = model.eval().requires_grad_(False).to(device)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
