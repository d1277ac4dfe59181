"""What ``llava train`` says before the first step of a new run, and all that it says with ``--dry-run``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavakit.cli import terminal
from llavakit.cli.show import tokens_as_text

if TYPE_CHECKING:
    from llavakit.config import TrainConfig


def before(config: TrainConfig, *, only: bool) -> bool:
    """Inspect a new run, or any run with ``only``, and print what was found; ``only`` again, so that the caller knows to stop."""
    from llavakit.train import preflight

    console = terminal.out() if only else terminal.err()
    if only or (config.preflight and not preflight.begun(config)):
        first = preflight.first_rank()
        report = preflight.inspect(config, say=terminal.err().print if first else lambda text: None)
        if not first:
            return only
        colors = terminal.has_color(console)
        for mask in report.masks:
            console.print(f"{mask.where} (id {mask.id})")
            console.print(tokens_as_text(list(mask.runs), colors=colors))
        for line in report.lines():
            console.print(line)
    return only
