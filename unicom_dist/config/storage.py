"""What the file system refuses (a disk that is full, a folder that may not be written), as errors for the user."""

import errno
import tempfile
from pathlib import Path

from unicom_dist.config.errors import PreflightError

DOCS = "docs/errors-and-exit-codes.md"
_WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of this account is used up",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this account has no permission",
    errno.EPERM: "this account has no permission",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "there is a file where a folder should be",
    errno.EISDIR: "there is a folder where a file should be",
}


def storage_error(error: BaseException) -> PreflightError | None:
    """What it means for the user if `error` is a refusal of the file system, else None."""
    if not isinstance(error, OSError) or error.errno not in _WHY:
        return None
    return PreflightError(
        f"the file system refuses {error.filename or 'the output'}",
        _WHY[error.errno],
        "free space, give the permission, or name another folder; then run again",
        DOCS,
    )


def reason(error: Exception) -> str:
    """Why it failed, in one line and without the `[Errno 2]` of an OSError."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return _WHY.get(error.errno or 0, error.strerror)
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_failed(path: Path, error: OSError) -> PreflightError:
    """The message for a write of `path` that failed."""
    return PreflightError(f"cannot write {path}", reason(error), "free space or choose another output folder", DOCS)


def check_writable(folder: Path) -> None:
    """PreflightError unless `folder`, or the nearest one above it that is there, takes a file. Nothing stays behind."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.NamedTemporaryFile(dir=there, prefix=".writable-") as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise write_failed(folder, error) from None


def make_folder(folder: Path) -> None:
    """Make `folder` if it is not there. PreflightError unless it then takes a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failed(folder, error) from error
    check_writable(folder)
