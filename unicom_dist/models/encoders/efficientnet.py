"""EfficientNet-lite2 up to its last feature map: the stand-in encoder for machines that reach no model hub.

Trained with labels on ImageNet: its tokens carry real semantics, but are not aligned with text as SigLIP2's are.
Batch normalisation is folded into the convolutions and memory is channels-last: that makes it fast on a CPU.
Shapes: images [B, 3, H, W], features [B, n, 1280] with n = (H/32) x (W/32).
The last map was trained to forget where things are and what colour they have: a linear read-out of 8 x 8 pixels per
token reaches 11.9 dB on held-out emoji. `levels: pyramid` puts four depths side by side, each normalised, in as many
channels: 21.9 dB, with the deepest semantic map among them.
Ref: Tan & Le 2019 (arXiv:1905.11946); lite variants: no squeeze-and-excitation, ReLU6, stem and head not scaled.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import EncoderConfig
from unicom_dist.models.encoders.base import (
    DOCS,
    EncodedImage,
    Prepared,
    fingerprint,
    square_view,
    weights_digest,
    weights_file,
    wrong_weights,
)
from unicom_dist.models.encoders.folding import fold_batch_norm

CHANNELS = 1280
STRIDE = 32
# Blocks whose outputs form the pyramid, and the cells per token side to which each is pooled: 352 + 120 x 4 + 88 x 4 +
# 24 x 4 = 1280 channels.
PYRAMID = ((20, 1), (14, 2), (10, 2), (3, 2))
NORM_EPS = 1e-3
# (blocks, kernel, stride, expansion, channels): B0's stages at width 1.1 and depth 1.2.
STAGES = (
    (1, 3, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (3, 5, 2, 6, 48),
    (4, 3, 2, 6, 88),
    (4, 5, 1, 6, 120),
    (5, 5, 2, 6, 208),
    (1, 3, 1, 6, 352),
)


class _Conv(nn.Module):
    """Convolution with folded normalisation and optional ReLU6.

    `size` is the height of its input when the picture has 260 pixels, as in training: TensorFlow's "same" padding
    depends on it when the stride is 2. Kept at every size, it keeps the sampling positions the weights know.
    """

    def __init__(
        self, width: int, out: int, kernel: int, stride: int = 1, *, size: int, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.out_size = -(-size // stride)
        total = max((self.out_size - 1) * stride + kernel - size, 0)
        low, high = total // 2, total - total // 2
        self.pad = None if low == high else (low, high, low, high)
        self.conv = nn.Conv2d(width, out, kernel, stride, padding=0 if self.pad else low, groups=groups)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            x = nn.functional.pad(x, self.pad)
        y: Tensor = self.conv(x)
        return nn.functional.relu6(y, inplace=True) if self.relu else y


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int, size: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.expand = _Conv(width, hidden, 1, size=size) if expansion != 1 else None
        self.depthwise = _Conv(hidden, hidden, kernel, stride, size=size, groups=hidden)
        self.project = _Conv(hidden, out, 1, size=self.depthwise.out_size, relu=False)
        self.residual = stride == 1 and width == out

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else self.expand(x)
        y: Tensor = self.project(self.depthwise(wide))
        return y.add_(x) if self.residual else y


class EfficientNetLite2(nn.Module):
    """Images [B, 3, H, W] normalised as (value - 127) / 128, H and W multiples of 32 -> [B, 1280, H/32, W/32]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 3, 2, size=260)
        self.blocks = nn.ModuleList()
        width, size = 32, self.stem.out_size
        for repeats, kernel, stride, expansion, out in STAGES:
            for number in range(repeats):
                block = _Block(width, out, kernel, stride if number == 0 else 1, expansion, size)
                self.blocks.append(block)
                width, size = out, block.depthwise.out_size
        self.head = _Conv(width, CHANNELS, 1, size=size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.head(x)
        return features

    def pyramid(self, images: Tensor) -> Tensor:
        """[B, 1280, H/32, W/32] like `forward`, from four depths (`PYRAMID`), each layer-normalised."""
        rows, columns = images.shape[-2] // STRIDE, images.shape[-1] // STRIDE
        cells = dict(PYRAMID)
        maps = {}
        x = self.stem(images)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in cells:
                side = cells[number]
                level = nn.functional.adaptive_avg_pool2d(x, (rows * side, columns * side))
                tokens = nn.functional.pixel_unshuffle(level, side).permute(0, 2, 3, 1)
                maps[number] = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        return torch.cat([maps[number] for number, _ in PYRAMID], -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def load_published(self, weights: dict[str, Tensor]) -> None:
        """Take the published tensors (`_blocks.3._bn1.running_mean`, ...). KeyError, ValueError: another network's."""
        for conv, kernel, norm in self._published_names():
            weight = weights[f"{kernel}.weight"]
            if weight.shape != conv.weight.shape:
                raise ValueError(f"{kernel} has shape {tuple(weight.shape)}, expected {tuple(conv.weight.shape)}")
            moments = [weights[f"{norm}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")]
            folded, bias = fold_batch_norm(weight, None, moments, NORM_EPS)
            conv.weight.copy_(folded)
            assert conv.bias is not None
            conv.bias.copy_(bias)

    def published(self) -> dict[str, Tensor]:
        """The weights under their published names, for `load_published`; the normalisation does nothing but shift."""
        tensors: dict[str, Tensor] = {}
        for conv, kernel, norm in self._published_names():
            assert conv.bias is not None
            ones = torch.ones_like(conv.bias)
            moments = {"weight": ones, "bias": conv.bias, "running_mean": 0 * ones, "running_var": ones - NORM_EPS}
            tensors[f"{kernel}.weight"] = conv.weight.detach().clone(memory_format=torch.contiguous_format)
            tensors |= {f"{norm}.{name}": moment.detach().clone() for name, moment in moments.items()}
        return tensors

    def _published_names(self) -> list[tuple[nn.Conv2d, str, str]]:
        """Each convolution with the published names of its kernel and of the normalisation after it."""
        parts: list[tuple[nn.Conv2d, str, str]] = [(self.stem.conv, "_conv_stem", "_bn0")]
        for number, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            prefix = f"_blocks.{number}."
            if block.expand is not None:
                parts.append((block.expand.conv, prefix + "_expand_conv", prefix + "_bn0"))
            parts.append((block.depthwise.conv, prefix + "_depthwise_conv", prefix + "_bn1"))
            parts.append((block.project.conv, prefix + "_project_conv", prefix + "_bn2"))
        return [*parts, (self.head.conv, "_conv_head", "_bn1")]


class EfficientNetEncoder:
    """The `efficientnet-lite2` encoder. ConfigError: no or foreign weights, image_px not a multiple of 32."""

    channels = CHANNELS

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        self.side = _side(config)
        self.max_tokens = (self.side // STRIDE) ** 2
        self._pyramid = config.levels == "pyramid"
        self.fingerprint = efficientnet_fingerprint(config)
        self._device = device
        model = EfficientNetLite2()
        path = weights_file(config.path, config.kind)
        try:
            model.load_published(load_file(path))
        except KeyError as error:
            raise wrong_weights(config.path, config.kind, f"tensor {error} is missing") from error
        except ValueError as error:
            raise wrong_weights(config.path, config.kind, str(error)) from error
        model = model.eval().requires_grad_(False).to(device, getattr(torch, config.dtype))
        self.network: EfficientNetLite2 = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def describe(self) -> str:
        rows = self.side // STRIDE
        return (
            f"EfficientNet-lite2, {rows}x{rows} tokens of {CHANNELS} channels from "
            f"{'four depths' if self._pyramid else 'the last map'} "
            "(supervised ImageNet, a stand-in for SigLIP2)"
        )

    def preprocess(self, image: Image.Image) -> Prepared:
        return {"pixels": efficientnet_view(image, self.side)}

    @torch.inference_mode()
    def encode(self, batch: Sequence[Prepared]) -> list[EncodedImage]:
        pixels = torch.from_numpy(np.stack([item["pixels"] for item in batch])).to(self._device)
        side = self.side // STRIDE
        return [EncodedImage(features, (side, side)) for features in self.tokens(pixels).float().cpu().numpy()]

    def tokens(self, pixels: Tensor, mask: Tensor | None = None, extent: Tensor | None = None) -> Tensor:
        """[B, n, D] of pixels [B, H, W, 3] uint8; every picture has all tokens, so `mask` and `extent` say nothing."""
        # [B, H, W, 3] seen as [B, 3, H, W] is channels-last already.
        images = ((pixels.float() - 127) / 128).permute(0, 3, 1, 2).to(self.network.stem.conv.weight.dtype)
        maps = self.network.pyramid(images) if self._pyramid else self.network(images)
        return maps.permute(0, 2, 3, 1).flatten(1, 2)


def efficientnet_view(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """What the encoder sees, [side, side, 3]."""
    return np.asarray(square_view(image, side))


def _side(config: EncoderConfig) -> int:
    if config.image_px % STRIDE:
        raise ConfigError(
            f"encoder.image_px = {config.image_px}",
            f"{config.kind} makes one token of {STRIDE} x {STRIDE} pixels",
            f"a multiple of {STRIDE}, such as {max(round(config.image_px / STRIDE), 1) * STRIDE}",
            DOCS,
        )
    return config.image_px


def efficientnet_fingerprint(config: EncoderConfig) -> str:
    """Identity of the features without building the network; reads the weight file once."""
    path: Path = weights_file(config.path, config.kind)
    return fingerprint(
        {
            "kind": config.kind,
            "weights": weights_digest([path]),
            "view": f"white-padded square, bicubic, {_side(config)} px",
            "dtype": config.dtype,
            "levels": config.levels,
        }
    )


def efficientnet_shape(config: EncoderConfig) -> tuple[int, int]:
    """Tokens and channels."""
    return (_side(config) // STRIDE) ** 2, CHANNELS
