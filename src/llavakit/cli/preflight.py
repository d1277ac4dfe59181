"""What ``llava train`` says before the first step of a run or before it goes on, and all that it says with ``--dry-run``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavakit.cli import terminal
from llavakit.cli.show import tokens_as_text

if TYPE_CHECKING:
    from llavakit.config import TrainConfig


def before(config: TrainConfig, *, only: bool, price: float | None = None) -> bool:
    """Inspect a run and print what was found; ``only`` again, so that the caller knows to stop."""
    from llavakit.train import preflight

    console = terminal.out() if only else terminal.err()
    if only or config.preflight:
        first = preflight.first_rank()
        report = preflight.inspect(config, say=terminal.err().print if first else lambda text: None, price=price)
        if not first:
            return only
        if report is None:
            console.print(f"{config.out} holds the complete run: no step is left")
            return only
        colors = terminal.has_color(console)
        for mask in report.masks:
            console.print(f"{mask.where} (id {mask.id})")
            console.print(tokens_as_text(list(mask.runs), colors=colors))
        for line in report.lines():
            console.print(line)
    return only
