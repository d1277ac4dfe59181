"""Where a run begins: a new folder, or the newest good checkpoint of the same run; and what may not have changed since.

The rule is the one of hardening T1, T10 and D12: a killed run goes on, another run is refused, and a change is told before it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llavakit import config as options
from llavakit.config import TrainConfig
from llavakit.data.mixture import Mixture
from llavakit.data.sources import Source
from llavakit.errors import TrainingError
from llavakit.train import state

NOT_COMPARED = frozenset({"out", "resume", "force", "log_every", "track"})


def make_folder(out: Path) -> None:
    """Make the run folder. Raises TrainingError ``cannot_write``."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        reason = error.strerror or "not possible"
        raise TrainingError(f"cannot write there ({reason})", code="cannot_write", where=str(out), remedy="choose another out") from error


def resume_point(config: TrainConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, or None for a new run. Clears what a killed run left behind."""
    state.sweep(config.out)
    if config.resume == "auto":
        return state.newest(config.out, say)
    used = state.checkpoints(config.out)
    if config.resume == "never":
        if used:
            raise TrainingError(
                "the folder holds a run", code="run_exists", where=str(config.out), remedy="choose another out, or resume=auto"
            )
        return None
    chosen = Path(config.resume)
    state.verify(chosen)
    newer = [
        folder for folder in used if folder != chosen and chosen.parent == config.out and state.step_of(folder) > state.step_of(chosen)
    ]
    if newer:
        raise TrainingError(
            f"{newer[0].name} is newer than {chosen.name}",
            code="newer_checkpoints",
            where=str(config.out),
            remedy="move the newer ones away, or choose another out",
        )
    return chosen


def check_unchanged(config: TrainConfig, position: state.Position, source: Source | Mixture, say: Callable[[str], None]) -> None:
    """Print what differs from the checkpoint's run; refuse what changes the model, the samples or their order (T10, D12)."""
    now = options.to_dict(config)
    changed = [d for d in options.differences(position.config, now) if d.name not in NOT_COMPARED]
    for difference in changed:
        say(f"changed since the checkpoint: {difference}")
    refused = [difference.name for difference in changed if difference.name in options.FIXED]
    if position.config["batch_size"] * position.config["accumulation"] != config.batch_size * config.accumulation:
        refused.append("batch_size x accumulation")
    if position.fingerprint != source.fingerprint:
        refused.append(f"the content of {config.data}")
    if refused and not config.force:
        raise TrainingError(
            f"not the run of the checkpoint: {', '.join(refused)} changed",
            code="run_changed",
            where=str(config.out),
            remedy="undo the change, choose another out, or force=true",
        )
