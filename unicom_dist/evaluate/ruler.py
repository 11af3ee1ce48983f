"""What is measured of a pair of pictures: figures of the pair, and the features that FID and KID compare as sets.

All start from the same 8-bit pictures. A figure that a picture is too small for is NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from unicom_dist.config.schema import EncoderConfig, EvalConfig
from unicom_dist.evaluate.fid_features import FidFeatures
from unicom_dist.evaluate.image_metrics import psnr, ssim
from unicom_dist.evaluate.picture_pairs import PicturePair
from unicom_dist.evaluate.rows import Better
from unicom_dist.models.encoders import Encoder, build_encoder
from unicom_dist.models.encoders.inception import load_fid_inception
from unicom_dist.objective.perceptual import Lpips

Distance = Callable[[Tensor, Tensor], Tensor]  # [B, 3, H, W] in [-1, 1], twice -> [B]
SSIM_PX, LPIPS_PX = 11, 16  # least side: SSIM's window, four halvings of VGG16
ENCODED = 32  # pictures the encoder sees at a time


@dataclass(frozen=True)
class Metric:
    """A figure of a pair: its name in tables, which way is better, and its definition in a line."""

    title: str
    better: Better
    note: str = ""


METRICS = {
    "psnr": Metric("PSNR (dB)", "higher"),
    "ssim": Metric("SSIM", "higher", "SSIM: Gaussian window of 11 px, sigma 1.5."),
    "lpips": Metric("LPIPS (VGG)", "lower", "LPIPS: VGG16 trunk, version 0.1."),
    "cosine": Metric("feature cosine", "higher", "Feature cosine: mean over tokens, in the frozen encoder."),
}


@dataclass(frozen=True)
class Measured:
    """Of n pairs: `scores` by metric [n] float64; features [n, C] float32 of both sides, None without a network."""

    scores: dict[str, NDArray[np.float64]]
    originals: NDArray[np.float32] | None
    rebuilt: NDArray[np.float32] | None


@dataclass(frozen=True)
class Ruler:
    """The networks of a measurement; what is None is not measured."""

    lpips: Distance | None
    fid: FidFeatures | None
    encoder: Encoder | None
    device: torch.device

    @classmethod
    def load(cls, config: EvalConfig, encoder: EncoderConfig | None) -> "Ruler":
        """On the first GPU, else the CPU. ConfigError or DataError if a network is missing."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fid = FidFeatures(load_fid_inception(config.fid_path, device), config.fid_protocol) if config.fid_path else None
        network = Lpips.load("vgg", config.lpips_path).eval().to(device)
        return cls(network, fid, build_encoder(encoder, device) if encoder else None, device)

    @torch.no_grad()
    def measure(self, pairs: Sequence[PicturePair]) -> Measured:
        """Pairs of any sizes, at least one; those of one size are looked at together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, pair in enumerate(pairs):
            by_size.setdefault(pair.original.size, []).append(number)
        scores = {name: np.full(len(pairs), np.nan) for name in METRICS if name != "cosine" or self.encoder}
        features: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        for numbers in by_size.values():
            originals = to_bytes([pairs[number].original for number in numbers]).to(self.device)
            rebuilt = to_bytes([pairs[number].rebuilt for number in numbers]).to(self.device)
            for name, values in self._of_one_size(originals, rebuilt).items():
                scores[name][numbers] = values.cpu().numpy()
            if self.fid is not None:
                sides = self.fid(originals).numpy(), self.fid(rebuilt).numpy()
                shape = (len(pairs), sides[0].shape[1])
                features = features or (np.zeros(shape, np.float32), np.zeros(shape, np.float32))
                features[0][numbers], features[1][numbers] = sides
        if self.encoder is not None:
            scores["cosine"] = cosines(self.encoder, pairs)
        return Measured(scores, *(features if features is not None else (None, None)))

    def _of_one_size(self, originals: Tensor, rebuilt: Tensor) -> dict[str, Tensor]:
        truth, images, side = originals.float() / 255, rebuilt.float() / 255, min(originals.shape[-2:])
        found = {"psnr": psnr(images, truth)}
        if side >= SSIM_PX:
            found["ssim"] = ssim(images, truth)
        if self.lpips is not None and side >= LPIPS_PX:
            found["lpips"] = self.lpips(images * 2 - 1, truth * 2 - 1).double()
        return found


def to_bytes(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as [B, 3, H, W] uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def cosines(encoder: Encoder, pairs: Sequence[PicturePair]) -> NDArray[np.float64]:
    """Cosine of the features of original and reconstruction, token by token, mean over a picture's tokens."""
    found = []
    for start in range(0, len(pairs), ENCODED):
        chosen = pairs[start : start + ENCODED]
        shown = [picture for pair in chosen for picture in (pair.original, pair.rebuilt)]
        encoded = encoder.encode([encoder.preprocess(picture) for picture in shown])
        for a, b in zip(encoded[::2], encoded[1::2], strict=True):
            x, y = torch.from_numpy(a.features).double(), torch.from_numpy(b.features).double()
            found.append(float(F.cosine_similarity(x, y, dim=1).mean()))
    return np.array(found)
