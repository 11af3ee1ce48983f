"""What a stage trains and by which losses, said before the first step: a typo in a recipe must not do so in silence."""

import math
from collections.abc import Iterable

from torch import nn

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import LEARNED_BY, StageConfig

DEPTH = 2  # parts of a name that make a row


def trained_table(module: nn.Module, stage: StageConfig) -> str:
    """Rows of part, trained and frozen parameters of this rank's slice of the model. ConfigError: none is trained."""
    rows: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        shape: Iterable[int] = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 may have split it already
        part = ".".join(name.split(".")[:DEPTH])
        rows.setdefault(part, [0, 0])[not parameter.requires_grad] += math.prod(shape)
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    if not total[0]:
        raise ConfigError(
            f"stage {stage.name!r} trains no weight",
            f"all {total[1]:,} parameters are frozen",
            f"set stages.{stage.name}.trainable or codec.decoder.trainable to more",
            "docs/training.md",
        )
    lines = [f"{'part':<32}{'trained':>16}{'frozen':>16}"]
    lines += [f"{part:<32}{trained:>16,}{frozen:>16,}" for part, (trained, frozen) in [*rows.items(), ("all", total)]]
    return "\n".join(lines)


def loss_table(stage: StageConfig) -> str:
    """Rows of a prior stage's losses: weight, and the tasks of the mixture whose samples they are for."""
    lines = [f"{'loss':<32}{'weight':>16}  tasks"]
    for weight in ("lambda_text", "lambda_flow"):
        tasks = ", ".join(task for task in stage.tasks if weight in LEARNED_BY[task])
        lines.append(f"{weight:<32}{getattr(stage, weight):>16g}  {tasks or 'none of the mixture'}")
    return "\n".join(lines)
