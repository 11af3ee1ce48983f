"""Latents after conversations: prefixes read once, all branches of the guidance in one call of the model per look.

Shapes: P pictures of n latents with d channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import SampleConfig
from unicom_dist.data.samples import Layouts, collate, grid_positions
from unicom_dist.models.flow import shift_factor
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.sample.dialogue import DOCS, Dialogue
from unicom_dist.sample.guidance import Guidance
from unicom_dist.sample.solver import Solver, checked_times, integrate, noise_from_seeds, time_grid


@dataclass(frozen=True, slots=True)
class Drawing:
    """How pictures are drawn. times: of the prior, instead of `steps` by the shift of the training.

    ConfigError: fewer than one step, times that do not rise from 0 to 1.
    """

    steps: int = 25
    guidance: Guidance = field(default_factory=Guidance)
    solver: Solver = "euler"
    times: Sequence[float] = ()
    decoder_steps: int = 8
    decoder_guidance: float = 1.0

    def __post_init__(self) -> None:
        if min(self.steps, self.decoder_steps) < 1:
            what = f"{self.steps} steps, {self.decoder_steps} of the decoder"
            raise ConfigError(what, "a picture takes at least one", "25 and 8 are the defaults", DOCS)
        if self.times:
            checked_times(self.times)

    @classmethod
    def of(cls, config: SampleConfig) -> "Drawing":
        """As the recipe's `sample` section says."""
        return cls(
            config.steps,
            Guidance(
                config.guidance, config.image_guidance, config.guidance_interval, config.renorm, config.renorm_min
            ),
            config.solver,
            (),
            config.decoder_steps,
            config.decoder_guidance,
        )


@torch.no_grad()
def draw(
    model: Transfusion,
    layouts: Layouts,
    dialogues: Sequence[Dialogue],
    seeds: Sequence[int],
    grid: tuple[int, int],
    how: Drawing,
) -> Tensor:
    """Normalised latents [P, n, d] float32 of an image that begins after each dialogue.

    Either all dialogues show images or none does.
    """
    guidance, shown, count = how.guidance, dialogues[0].shows, len(dialogues)
    branches = guidance.branches(shown)
    contents = [
        dialogue.branch(branch).content(layouts, model.config.understanding, draws=True)
        for branch in branches
        for dialogue in dialogues
    ]
    device = next(model.parameters()).device
    prefix = model.encode_prefix(collate(contents, model.latent_channels, model.read_channels).to(device))
    prefix.reserve(grid[0] * grid[1] + 1)  # a model may put the time before the latents
    alone = prefix.first(count)
    places = grid_positions(*grid).to(device)

    def velocity(z: Tensor, t: float) -> Tensor:
        if branches[0] == "all" and (len(branches) == 1 or not guidance.acts(t)):
            return model.velocity_from_prefix(alone, z, z.new_full((count,), t), places)
        z = z.repeat(len(branches), 1, 1)
        v = model.velocity_from_prefix(prefix, z, z.new_full((len(z),), t), places)
        return guidance.combine(dict(zip(branches, v.chunk(len(branches)), strict=True)), shown)

    size = (len(places), model.latent_channels)
    times = how.times or time_grid(how.steps, shift_factor(model.config, size[0] * size[1]))
    return integrate(velocity, noise_from_seeds(seeds, size, "prior").to(device), times, how.solver)
