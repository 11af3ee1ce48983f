"""Files written past the page cache hold what was appended, also where a file system has no direct writes."""

import errno
import fcntl
import os
import time
from pathlib import Path

import numpy as np
import pytest

from unicom_dist.checkpoint import direct
from unicom_dist.checkpoint.direct import BLOCK, DirectFile

SIZES = (1, BLOCK - 1, 3 * BLOCK + 7, 0, 5, 2 * BLOCK)


def numbers(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def write(path: Path) -> bytes:
    """A file of pieces of all sizes with a block before them that comes last; what should be in it."""
    parts, head = [numbers(size, seed) for seed, size in enumerate(SIZES)], numbers(BLOCK, 99)
    with DirectFile(path, BLOCK) as file:
        for part in parts:
            file.append(part)
            part[:] = 0  # what is appended is taken at once
        file.seek(0)
        file.append(head)
    return head.tobytes() + b"".join(numbers(size, seed).tobytes() for seed, size in enumerate(SIZES))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several pieces a file."""
    monkeypatch.setattr(direct, "PIECE", 2 * BLOCK)


def test_a_file_holds_what_was_appended_and_replaces_what_was_there(tmp_path):
    (tmp_path / "f").write_bytes(bytes(100 * BLOCK))
    expected = write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == expected


def test_bytes_do_not_stay_in_the_page_cache(tmp_path, monkeypatch):
    asked, real = [], os.pwrite

    def noted(file: int, data: memoryview, position: int) -> int:
        asked.append(bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT))
        return real(file, data, position)

    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct writes")
    monkeypatch.setattr("os.pwrite", noted)
    write(tmp_path / "f")
    assert len(asked) > 3
    assert all(asked)


@pytest.mark.parametrize("at", ["open", "write"])
def test_where_there_are_no_direct_writes_the_file_is_the_same(tmp_path, monkeypatch, at):
    name, function = ("fcntl.fcntl", fcntl.fcntl) if at == "open" else ("os.pwrite", os.pwrite)

    def refused(file, *args):
        direct_wanted = args == (fcntl.F_SETFL, os.O_DIRECT)
        if direct_wanted if at == "open" else fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return function(file, *args)

    monkeypatch.setattr(name, refused)
    expected = write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == expected


def test_a_disk_that_is_slow_and_takes_parts_gets_it_all(tmp_path, monkeypatch):
    real = os.pwrite

    def slow(file: int, data: memoryview, position: int) -> int:
        time.sleep(0.02)  # meanwhile the next pieces are put together
        return real(file, data[:BLOCK], position)

    monkeypatch.setattr("os.pwrite", slow)
    expected = write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == expected


def test_a_disk_that_fills_up_is_an_error_of_whoever_writes(tmp_path, monkeypatch):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f")


def test_bytes_are_on_disk_when_it_is_left(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.fstat(file).st_size))
    expected = write(tmp_path / "f")
    assert synced == [len(expected)]
