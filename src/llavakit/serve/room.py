"""How much an engine may take on: counts and bytes, fixed when it starts; and when to come back for those whom it turns away.

free memory --a quarter--> kv_bytes        replies under way, as long as they may become; what is left: memories of those that ended
            --a 32th-----> feature_bytes   rows of pictures
            --a 16th-----> request_bytes   pictures on their way in
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llavakit.errors import BusyError, ConfigError
from llavakit.serve.memory import Shape

_GIB = 1 << 30
_FIRST, _LEAST = 64, 16  # positions of the first step, whose pace is not known, and of any
_ENDS = 32  # ended replies that tell the pace


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds an engine. Raises ConfigError."""

    running: int = 16
    "Replies read and written at once."
    waiting: int = 32
    "Requests beside those: being decoded, or waiting for a place."
    kv_bytes: int = 2 * _GIB
    feature_bytes: int = _GIB // 4
    request_bytes: int = _GIB // 4
    "Pictures of all requests, as files and as views."
    chunk: int = 256
    "Prompt positions (or as much work in the tower) a step while somebody is being written to."
    chunk_alone: int = 512
    "The same while nobody is."
    pause: float = 0.5
    "Seconds of a step while somebody is being written to: a slow machine takes smaller chunks. Four times that while nobody is."
    views: int = 1
    "Views that the tower sees together."

    def __post_init__(self) -> None:
        for name in ("running", "kv_bytes", "chunk", "chunk_alone", "views"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)!r} is too little", code="bad_value", where=name, remedy="give 1 or more")
        if not self.pause > 0:
            raise ConfigError(f"{self.pause!r} is no time", code="bad_value", where="pause", remedy="give a part of a second")
        for name in ("waiting", "feature_bytes", "request_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{getattr(self, name)!r} is less than nothing", code="bad_value", where=name, remedy="give 0 or more")

    @staticmethod
    def fitting(shape: Shape, *, context: int, **chosen: Any) -> Limits:
        """For a model on this machine as it is now; ``chosen`` fields are taken as they are."""
        free = free_bytes(shape.device)
        on_gpu = shape.device.type == "cuda"
        running = 64 if on_gpu else 16
        fields: dict[str, Any] = {
            "running": running,
            "waiting": 2 * running,
            "kv_bytes": max(
                shape.bytes_for(min(context, 512)), min(free // 2 if on_gpu else free // 4, 2 * running * shape.bytes_for(context))
            ),
            "feature_bytes": max(1 << 24, min(_GIB, free // 32)),
            "request_bytes": max(1 << 26, min(_GIB, free_bytes(torch.device("cpu")) // 16)),
            "chunk": 2048 if on_gpu else 256,
            "chunk_alone": 8192 if on_gpu else 512,
            "views": 32 if on_gpu else 1,
        }
        return Limits(**fields | chosen)

    def but(self, **changes: Any) -> Limits:
        return replace(self, **changes)


def free_bytes(device: torch.device) -> int:
    """Memory that may be taken now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 8 * _GIB  # not Linux: a machine of today, half full


class Pace:
    """How much work, in prompt positions, is done a second; and so how much fits into a step."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._rate: float | None = None

    def budget(self, *, alone: bool) -> float:
        limits = self._limits
        most, pause = (limits.chunk_alone, 4 * limits.pause) if alone else (limits.chunk, limits.pause)
        return min(most, _FIRST if self._rate is None else max(_LEAST, self._rate * pause))

    def took(self, work: float, seconds: float) -> None:
        if work >= _LEAST and seconds > 0:
            rate = work / seconds
            self._rate = rate if self._rate is None else (self._rate + rate) / 2


class Door:
    """Counts what is inside and turns away what is too much, before any work is done for it."""

    def __init__(self, limits: Limits) -> None:
        self.inside = self.refused = self.ended = 0
        self._limits = limits
        self._bytes = 0
        self._ends: deque[float] = deque(maxlen=_ENDS)

    def enter(self, nbytes: int) -> None:
        """Raises BusyError ``overloaded``. One who is alone always enters."""
        limits = self._limits
        full = self.inside >= limits.running + limits.waiting
        heavy = self.inside > 0 and self._bytes + nbytes > limits.request_bytes
        if full or heavy:
            self.refused += 1
            what = f"{self.inside} requests" + (" with as many pictures as fit" if heavy and not full else "") + " are being served"
            raise busy(what, code="overloaded", after=self.retry_after())
        self.inside += 1
        self._bytes += nbytes

    def check(self, coming: int) -> None:
        """Raises BusyError ``overloaded`` where ``coming`` others fill what is left."""
        if self.inside + coming >= self._limits.running + self._limits.waiting:
            self.refused += 1
            raise busy(f"{self.inside} requests are being served", code="overloaded", after=self.retry_after())

    def leave(self, nbytes: int, *, served: bool) -> None:
        self.inside -= 1
        self._bytes -= nbytes
        if served:
            self._ends.append(time.monotonic())

    def retry_after(self) -> float:
        """Seconds until somebody who comes now would begin to be served, by the pace of those who left."""
        if len(self._ends) < 2:
            return 5.0
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return float(min(120, max(1, math.ceil(each * max(1, self.inside - self._limits.running + 1)))))


def busy(what: str, *, code: str, after: float) -> BusyError:
    error = BusyError(what, code=code, remedy=f"ask again in {after:.0f} s")
    error.retry_after = after
    return error
