"""What the sections are made of: limits, errors, helpers for their texts."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Switch = Literal["auto", "on", "off"]


class Unworkable(ValueError):
    """Values that are fine one by one but cannot work together: what, why, and what would."""

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(f"{what}: {why}; {remedy}")
        self.parts = (what, why, remedy)


class Section(BaseModel):
    """A strict, immutable part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)


def multiples(value: int, unit: int) -> str:
    """The multiples of `unit` next to `value`, for error texts."""
    below = value // unit * unit
    return " or ".join(str(number) for number in (below, below + unit) if number > 0)


def divisors(value: int) -> str:
    return ", ".join(str(number) for number in range(1, value + 1) if value % number == 0)
