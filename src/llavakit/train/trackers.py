"""A run's numbers in other programs' pages: TensorBoard, Weights & Biases, trackio. metrics.jsonl is written whatever happens to them.

An adapter is made once, gets the step's numbers, and is closed. One that fails is told once and left alone: no page is worth a run (T9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from llavakit.errors import MissingExtraError

Track = Literal["none", "tensorboard", "wandb", "trackio"]


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(out / "tensorboard")
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Page:
    """wandb and trackio, which has wandb's words."""

    def __init__(self, module: Any, out: Path, config: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project="llavakit", name=out.name, config=dict(config))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


class Tracked:
    """A tracker that cannot hurt."""

    def __init__(self, make: Callable[[], Tracker] | None, say: Callable[[str], None]) -> None:
        self._say = say
        self._tracker: Tracker | None = None
        if make is not None:
            self._guard(lambda: setattr(self, "_tracker", make()))

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """The numbers among them; names of groups become ``held out/GROUP``."""
        tracker = self._tracker
        if tracker is not None:
            kept = {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
            self._guard(lambda: tracker.log(step, kept))

    def close(self) -> None:
        if self._tracker is not None:
            self._guard(self._tracker.close)

    def _guard(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever another program's library raises
            self._tracker = None
            self._say(f"tracking ends here ({type(error).__name__}: {error}); the run and metrics.jsonl go on")


def tracker(kind: Track, out: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> Tracked:
    """Raises MissingExtraError where the program is not installed: that is known before the first step."""
    if kind == "none":
        return Tracked(None, say)
    try:
        if kind == "tensorboard":
            import torch.utils.tensorboard  # noqa: F401

            return Tracked(lambda: _TensorBoard(out, config), say)
        module = __import__(kind)
    except ImportError as error:
        remedy = f"pip install 'llavakit[{kind}]'"
        raise MissingExtraError(f"{kind} is not installed", code="missing_extra", where="track", remedy=remedy) from error
    return Tracked(lambda: _Page(module, out, config), say)
