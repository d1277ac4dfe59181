"""SIGINT and SIGTERM as a wish that the run looks at between steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Signals:
    """SIGINT and SIGTERM ask the run to end after the step; the second one ends the process at once (T2).

    A launcher signals the ranks one after another, so a rank may hear of it from another rank first: its own signal is no second one then.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._own = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._own:
            os._exit(128 + number)
        self._own = True
        self.received = number
