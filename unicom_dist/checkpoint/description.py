"""What a checkpoint's state.json and an export's config.json say about the model that their tensors are of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.schema import PriorConfig


class DescribedPrior(NamedTuple):
    """The prior's section of the recipe, and the channels of its latents and of the encoder's features."""

    config: PriorConfig
    latent_channels: int
    feature_channels: int


def described_prior(content: Mapping[str, Any], source: Path) -> DescribedPrior:
    """What `content`, found in `source`, says. CheckpointError when it does not describe a prior."""
    try:
        config = PriorConfig.model_validate(content["prior"])
        return DescribedPrior(config, int(content["latent_channels"]), int(content["feature_channels"]))
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{source} does not say which model its weights are of",
            " ".join(f"{type(error).__name__}: {error}".splitlines()[:3]),
            "name a checkpoint or run that this version of `unicom train` wrote",
            "docs/checkpoints.md",
        ) from None
