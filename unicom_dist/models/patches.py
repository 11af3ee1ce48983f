"""Patches of a picture or of a VAE's latents, as FLUX packs them, and where the semantic tokens lie beneath them."""

from torch import Tensor, arange


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, c, H, W] -> [B, H/p W/p, c p p], channel-major inside a patch as FLUX packs its latents."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify`."""
    cut = patches.view(patches.shape[0], height // patch, width // patch, -1, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, height, width)


def token_under_patch(grid: Tensor, rows: int, columns: int) -> Tensor:
    """Index [B, rows columns] of the token that covers each patch; grid [B, n, 2] in row-major order, padding zero."""
    extent = grid.amax(1) + 1  # [B, 2] token rows and columns
    row = (arange(rows, device=grid.device) + 0.5) / rows * extent[:, :1]
    column = (arange(columns, device=grid.device) + 0.5) / columns * extent[:, 1:]
    return (row.long()[:, :, None] * extent[:, 1, None, None] + column.long()[:, None, :]).flatten(1)
