"""How much memory loading takes: ``python loading.py ours|theirs FOLDER DTYPE`` prints seconds and bytes as one JSON line.

Run by ``speed.py`` in a fresh process, because a peak cannot be taken back. The peak is the growth of resident memory above what it was
when the libraries had been imported, with every weight touched once, so that mapped files count too; anonymous memory apart.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch


def main(side: str, folder: str, dtype: str) -> None:
    load = _ours(folder, dtype) if side == "ours" else _theirs(folder, dtype)
    before, watch = _resident(), Watch()
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    for weight in model.parameters():  # type: ignore[attr-defined]
        weight.detach().view(-1)[:: 2048 // weight.element_size()].float().sum()  # a number of every page
    peak, anonymous = watch.stop()
    print(json.dumps({"seconds": seconds, "peak": peak - before[0], "anonymous": anonymous - before[1]}))


def _ours(folder: str, dtype: str):  # type: ignore[no-untyped-def]
    from llavakit.checkpoint import store

    return lambda: store.load(Path(folder), dtype=dtype)[0]


def _theirs(folder: str, dtype: str):  # type: ignore[no-untyped-def]
    from transformers import LlavaForConditionalGeneration

    return lambda: LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto" if dtype == "auto" else getattr(torch, dtype))


def _resident() -> tuple[int, int]:
    """(resident, anonymous) bytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    total, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return total, anonymous


class Watch:
    """Looks at memory every two milliseconds."""

    def __init__(self) -> None:
        self._peaks = list(_resident())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self._peaks = [max(pair) for pair in zip(self._peaks, _resident(), strict=True)]

    def stop(self) -> tuple[int, int]:
        self._done.set()
        self._thread.join()
        now = _resident()
        return max(self._peaks[0], now[0]), max(self._peaks[1], now[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
