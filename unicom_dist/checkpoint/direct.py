"""A new file written past the page cache, pieces of it while the next is put together.

Through the cache every byte is copied once more, and takes a page from the data that training reads: with little memory
left, writing waits until others have given theirs up. Direct writes need memory, place and length in whole blocks, so
what comes is gathered in buffers of such; a file system that has no direct writes gets the same through the cache.
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096  # bytes: of disks and pages
PIECE = 1 << 21  # bytes at a time
AT_ONCE = 4  # pieces: a disk that waits for the next is slower, and more than four do not help


class DirectFile:
    """A context manager: when it is left without an error, all bytes are on disk. OSError when there is no space.

    They are appended from byte `position` of the file on, a multiple of BLOCK.
    """

    def __init__(self, path: Path, position: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        with suppress(OSError):
            fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_DIRECT)
        self._pieces = deque(np.frombuffer(mmap.mmap(-1, PIECE), np.uint8) for _ in range(AT_ONCE + 1))
        self._position, self._filled, self._end = position, 0, 0
        self._disk = ThreadPoolExecutor(AT_ONCE, "disk")
        self._under_way: deque[Future[None]] = deque()

    def append(self, data: NDArray[np.uint8]) -> None:
        """Copy `data` [n]; what of it is not yet on its way to the disk goes there with what follows."""
        while data.size:
            room = self._pieces[0][self._filled :]
            part, data = data[: room.size], data[room.size :]
            room[: part.size] = part
            self._filled += part.size
            if self._filled == PIECE:
                self._send()

    def seek(self, position: int) -> None:
        """Append from `position` on, a multiple of BLOCK. What is overwritten must be so in whole blocks."""
        self._send()
        self._wait(0)
        self._position = position

    def _send(self) -> None:
        """Begin to write the piece that was filled, and go on with the one that was sent first, once it is written."""
        whole = self._filled + -self._filled % BLOCK  # what is too much is cut off in the end
        self._under_way.append(self._disk.submit(_write, self._file, self._pieces[0][:whole].data, self._position))
        self._pieces.rotate(-1)
        self._wait(AT_ONCE)
        self._position, self._filled = self._position + self._filled, 0
        self._end = max(self._end, self._position)

    def _wait(self, left: int) -> None:
        while len(self._under_way) > left:
            self._under_way.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._send()
                self._wait(0)
                os.ftruncate(self._file, self._end)
                os.fsync(self._file)
        finally:
            self._disk.shutdown()
            os.close(self._file)


def _write(file: int, data: memoryview, position: int) -> None:
    while data:
        direct = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT  # before: the other writer may change it
        try:
            count = os.pwrite(file, data, position)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, 0)  # no direct writes, or of larger blocks
            continue
        data, position = data[count:], position + count
