"""Checkpoints of a run: complete or absent, verified before use, never the last good one deleted.

    out/config.yaml  metrics.jsonl  latest -> "step-200"
    out/step-200/    the native model (config.json, *.safetensors, tokenizer, processor)
                     trainer/state.json  trainer/state.safetensors      position, optimizer, random states, config
                     trainer/optimizer/                                 the optimizer in parts, where the run was cut (saving.py)
                     manifest.json                                      every file's size and SHA-256

    written to step-200.tmp -> every file fsynced -> manifest.json last -> rename -> parent fsynced -> latest replaced

Whatever the moment of a ``kill -9``, a folder without ``.tmp`` is whole, and one that was damaged later fails its manifest and is
passed over for the one before. ``latest`` is for people and scripts; the program trusts manifests only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavakit.checkpoint.folders import LATEST
from llavakit.errors import CheckpointError

MANIFEST = "manifest.json"
TRAINER = "trainer"
FORMAT = 1
_STEP = re.compile(r"step-(\d+)")
_BLOCK = 1 << 22

Warn = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands, all but its tensors. ``step`` counts the windows consumed, which is the loader's and the schedule's state."""

    step: int
    loader: Mapping[str, int]
    non_finite: int  # steps in a row without a finite loss and gradient
    counts: Mapping[str, int]  # of samples met: all, without a learned token, cut, replaced
    fingerprint: str  # of the data
    config: Mapping[str, Any]


def write_trainer(folder: Path, position: Position, optimizer: Mapping[str, Tensor], random: Mapping[str, Tensor]) -> None:
    """Add the trainer's part to a checkpoint folder that is being written."""
    inner = folder / TRAINER
    inner.mkdir()
    tensors = {f"optimizer/{name}": value.detach().cpu().contiguous() for name, value in optimizer.items()}
    tensors |= {f"random/{name}": value for name, value in random.items()}
    save_file(tensors, inner / "state.safetensors")
    (inner / "state.json").write_text(json.dumps({"format": FORMAT} | asdict(position), indent=1), encoding="utf-8")


def read_trainer(folder: Path) -> tuple[Position, dict[str, Tensor], dict[str, Tensor]]:
    """The position, the optimizer's tensors and the random states. Raises CheckpointError ``no_trainer`` for a mere model."""
    inner = folder / TRAINER
    try:
        fields = json.loads((inner / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(inner / "state.safetensors")
    except FileNotFoundError as error:
        raise CheckpointError(
            "a model without a trainer's state", code="no_trainer", where=str(folder), remedy="start a new run with start=<folder>"
        ) from error
    if fields.pop("format") != FORMAT:
        raise CheckpointError(
            "another trainer format", code="trainer_format", where=str(folder), remedy="resume with the version that wrote it"
        )
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "random": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = value
    return Position(**fields), parts["optimizer"], parts["random"]


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The generators that a training step may draw from (dropout); the order of samples has its own, see ``data.loader``."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def commit(out: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a new folder, then make it the checkpoint of ``step``: all of it or, after any failure, nothing.

    ``write`` gets the path of a folder that does not exist yet. Whatever it raises is passed on, its leavings removed.
    """
    final, draft = out / f"step-{step}", out / f"step-{step}.tmp"
    _discard(draft)
    try:
        write(draft)
        _write_manifest(draft)
    except BaseException:
        _discard(draft)
        raise
    if final.exists():  # a damaged one of the same step, or this step run again
        _discard(final)
    os.rename(draft, final)
    _sync_folder(out)
    _point(out, final.name)
    return final


def verify(folder: Path, *, hashes: bool = True) -> None:
    """Raise CheckpointError unless the manifest is there and every file has its size and (with ``hashes``) its SHA-256."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            "no manifest.json", code="no_manifest", where=str(folder), remedy="it is not a finished checkpoint"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("manifest.json cannot be read", code="bad_manifest", where=str(folder), remedy="use an older one") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or (hashes and _digest(path) != digest):
            state = "damaged" if path.is_file() else "missing"
            raise CheckpointError(f"the file {name} is {state}", code="damaged_checkpoint", where=str(folder), remedy="use an older one")


def checkpoints(out: Path) -> list[Path]:
    """The folders step-N of a run, newest first, verified or not."""
    found = [(int(match[1]), path) for path in out.glob("step-*") if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def newest(out: Path, warn: Warn) -> Path | None:
    """The newest checkpoint that verifies; each newer one that does not is named in a warning."""
    for folder in checkpoints(out):
        try:
            verify(folder)
        except CheckpointError as error:
            warn(f"passed over: {error}")
            continue
        return folder
    return None


def step_of(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    assert match, f"{folder.name} is no checkpoint's name"
    return int(match[1])


def sweep(out: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for path in out.glob("step-*.tmp*"):
        _discard(path)


def prune(out: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest good checkpoints (0 keeps all). The newest is read back before anything older goes."""
    if not keep:
        return
    good = 0
    for folder in checkpoints(out):
        if good >= keep:
            _discard(folder)
            continue
        try:
            verify(folder, hashes=good == 0)
        except CheckpointError:
            continue  # never counted as one that may be relied on
        good += 1


def _discard(path: Path) -> None:
    """Remove a folder; renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint."""
    if not path.exists():
        return
    trash = path if ".tmp" in path.name else path.with_name(path.name + ".tmp-old")
    if trash != path:
        os.rename(path, trash)
    shutil.rmtree(trash)


def _write_manifest(folder: Path) -> None:
    """Sync every file, then list them with sizes and hashes in manifest.json, then sync that."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path, sync=True)} for path in paths}
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        _sync_folder(inner)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _digest(path: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make names durable. Systems that cannot open a folder (Windows) write them through on their own."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(out: Path, name: str) -> None:
    draft = out / (LATEST + ".tmp")
    draft.write_text(name + "\n", encoding="utf-8")
    os.replace(draft, out / LATEST)
