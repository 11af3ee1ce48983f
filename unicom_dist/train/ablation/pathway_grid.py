"""The variants of the prior's ablation: who draws, and how many latent channels there are to draw.

Pathway I: one transformer reads the words and draws the latents (Transfusion). Pathway II: learnable queries ask the
frozen transformer what a flow decoder of its own is to draw. Both draw the latents of the same codec at every width of
the grid; Pathway I also draws all channels of the encoder, uncompressed.
"""

from dataclasses import dataclass
from typing import Any

from unicom_dist.config.schema import Config
from unicom_dist.train.ablation.codec_grid import Point

PATHWAYS = {"transfusion": "I", "query_guided": "II"}


@dataclass(frozen=True)
class Arm:
    """A pathway, and the latents it draws: so many channels, all of the encoder's if `whole`."""

    pathway: str
    channels: int
    whole: bool

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"{self.pathway.replace('_', '-')}-{self.channels}"

    @property
    def label(self) -> str:
        """ "Pathway I, 64 channels"."""
        return f"Pathway {PATHWAYS[self.pathway]}, {'all ' if self.whole else ''}{self.channels} channels"

    @property
    def codec(self) -> str:
        """Folder of the codec whose latents it draws."""
        return f"codec-{self.channels}"

    def codec_overrides(self) -> dict[str, Any]:
        """The dotted keys of a recipe that make this codec."""
        if self.whole:
            return Point("identity", "none", self.channels).overrides()
        return {"codec.compressor.channels": self.channels}

    def overrides(self, config: Config, stage: str) -> dict[str, Any]:
        """The dotted keys in which it differs from the recipe `config`, whose `stage` is compared.

        More latent channels say more about a picture at the same noise. So that the times are as hard at every width,
        the shift grows with the root of the width (facts: sqrt(n d / 4096)) from the recipe's at the recipe's width.
        """
        scale = (self.channels / config.codec.compressor.channels) ** 0.5
        found = self.codec_overrides() | {"prior.timestep_shift": round(config.prior.timestep_shift * scale, 4)}
        if self.pathway == "query_guided":  # its transformer is frozen: text teaches it nothing
            found |= {f"stages.{stage}.query.enabled": True, f"stages.{stage}.lambda_text": 0.0}
        return found


def arms_of(config: Config, channels: int) -> list[Arm]:
    """The grid for an encoder of so many channels."""
    ablation = config.ablation
    arms = [Arm(pathway, width, whole=False) for width in ablation.widths for pathway in ablation.pathways]
    return [*arms, Arm("transfusion", channels, whole=True)]
