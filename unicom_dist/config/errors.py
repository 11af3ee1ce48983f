"""Errors a user can act on, and the exit codes of the command.

Every error has four parts: what was found, why it cannot work, what would, and where it is documented.
`unicom` prints them without a traceback and exits with the class's code.
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class UnicomError(Exception):
    """Base of all errors shown to the user. `exit_code` is the exit status of the command."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, why: str = "", remedy: str = "", docs: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.remedy, self.docs = what, why, remedy, docs

    def __reduce__(self) -> tuple[type["UnicomError"], tuple[str, str, str, str]]:
        return type(self), (self.what, self.why, self.remedy, self.docs)

    def record(self) -> dict[str, str]:
        """As JSON values, for another process; see `from_record`."""
        parts = {"what": self.what, "why": self.why, "remedy": self.remedy, "docs": self.docs}
        return {"type": type(self).__name__, **parts}

    def __str__(self) -> str:
        parts = [self.what]
        if self.why:
            parts.append(f"  why:  {self.why}")
        if self.remedy:
            parts.append(f"  fix:  {self.remedy}")
        if self.docs:
            parts.append(f"  docs: {self.docs}")
        return "\n".join(parts)


class ConfigError(UnicomError):
    """A value, key or combination in the configuration cannot work."""

    exit_code = 2


class PreflightError(UnicomError):
    """The machine lacks something the job needs: space, write permission, a package, a process group."""

    exit_code = 3


class DataError(UnicomError):
    """Shards, features or samples are missing, damaged or do not belong together."""

    exit_code = 4


class CheckpointError(UnicomError):
    """A checkpoint is incomplete, foreign, does not fit the model or could not be written."""

    exit_code = 5


class NonFiniteError(UnicomError):
    """Loss or gradients are not finite."""

    exit_code = 6


class CollapseError(UnicomError):
    """The latents of joint training have lost what they had to tell."""

    exit_code = 6


class HangError(UnicomError):
    """A rank stopped making progress or died."""

    exit_code = 7


class Preempted(UnicomError):
    """The run was asked to stop, wrote a checkpoint and may be started again."""

    exit_code = 75


def from_record(record: Mapping[str, Any]) -> UnicomError:
    """The error that another process described by `UnicomError.record`."""
    kinds = {kind.__name__: kind for kind in UnicomError.__subclasses__()}
    kind = kinds.get(record["type"], UnicomError)
    return kind(record["what"], record["why"], record["remedy"], record["docs"])
