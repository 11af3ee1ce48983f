"""How close two pictures are: PSNR and SSIM, one value per picture.

Pictures are [B, 3, H, W] in [0, 1]. Averages are taken outside: the mean of the PSNRs, not the PSNR of the mean error.
LPIPS is `unicom_dist.objective.perceptual.Lpips`; evaluation uses the VGG trunk where training used the AlexNet one, so
that a model is not judged by the network that trained it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_CAP_DB = 100.0


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(1 / MSE) in dB, at most 100 (equal pictures). Returns: [B] float64."""
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return (-10 * error.clamp_min(1e-30).log10()).clamp_max(PSNR_CAP_DB)


def ssim(images: Tensor, references: Tensor, sigma: float = 1.5) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 px, K1 .01, K2 .03, population covariance.

    Equal to skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1), which is not its default (a uniform 7 x 7 window with sample covariance).
    Averaged over channels and the pixels whose window lies inside the picture. ValueError below 11 px a side.
    Returns: [B] float64.
    """
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 px a side, got {tuple(images.shape[-2:])}")
    offset = torch.arange(-5, 6, dtype=torch.float64, device=images.device)
    window = torch.exp(-offset.square() / (2 * sigma**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        channels = x.flatten(0, 1)[:, None]
        channels = F.conv2d(F.conv2d(channels, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
        return channels.view(*x.shape[:2], *channels.shape[-2:])

    x, y = images.double(), references.double()
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)
