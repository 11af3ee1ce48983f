"""The wish to stop: SIGTERM, SIGUSR1 and Ctrl-C set a flag that the loop looks at once a step.

The ranks learn of each other's flags in the all-reduce of the step's counts, so all of them finish the same step, write
the same checkpoint and exit with 75.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import BinaryIO

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A context manager that catches the signals while it is open (main thread only)."""

    def __init__(self) -> None:
        self.requested = False
        self.hung = threading.Event()  # set when the launcher says that another rank no longer gets on
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def watch(self, parent: BinaryIO) -> None:
        """Listen to `parent`, a pipe from the launcher: a line means `hung`; its end, that the launcher died: stop."""

        def wait() -> None:
            for _ in parent:
                self.hung.set()
            self.requested = True

        threading.Thread(target=wait, name="parent", daemon=True).start()
