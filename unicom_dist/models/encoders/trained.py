"""An encoder that learns with the codec and is held to what it was by the features it once left on disk.

The stored features are the output of the frozen encoder, so the teacher of the self-distillation needs no second pass.
Where it is not held, pixels drive semantics out of the tokens. Ref: UniLIP (self-distillation while a CLIP encoder
learns to reconstruct); batch normalisation stays folded, as in the frozen encoder.
Shapes: B pictures, n tokens of D channels (padded; mask [B, n], True = real), grid [B, n, 2] of their places.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unicom_dist.config.schema import EncoderConfig
from unicom_dist.models.encoders.efficientnet import EfficientNetEncoder, EfficientNetLite2
from unicom_dist.models.encoders.siglip2 import Siglip2Encoder, resolve

NETWORK = "encoder.network."


class TrainedEncoder(nn.Module):
    """The configured encoder's network with gradients. Errors as `build_encoder`; not for `random`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        encoder = (Siglip2Encoder if config.kind == "siglip2" else EfficientNetEncoder)(config, torch.device("cpu"))
        self.network: nn.Module = encoder.network.float().requires_grad_(True)
        self._tokens = encoder.tokens

    def forward(self, views: Tensor, mask: Tensor, grid: Tensor) -> Tensor:
        """Tokens [B, n, D], padding zero, of views as `encoder_view` makes them, padded to the longest."""
        extent = torch.where(mask[..., None], grid, 0).amax(1) + 1
        tokens: Tensor = self._tokens(views, mask, extent)
        return tokens * mask[..., None]


def export_encoder(config: EncoderConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the trained network (names within a `Codec`) into `folder` as `encoder.path` may name it, float32."""
    own = {name.removeprefix(NETWORK): tensor.float().contiguous() for name, tensor in weights.items()}
    if config.kind == "siglip2":
        shutil.copyfile(resolve(config, download=False) / "config.json", folder / "config.json")
    else:
        network = EfficientNetLite2()
        network.load_state_dict(own)
        own = network.published()
    save_file(own, folder / "model.safetensors", {"format": "pt"})
