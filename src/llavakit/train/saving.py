"""A run's checkpoint written and read by all its ranks.

              main                                      the others
    gather    whole weights, everyone's random state    give their parts
    write     model, state.json, random states          wait for the word
              its part of the optimizer                 their parts         (torch.distributed.checkpoint, only where the model is cut)
    commit    manifest, rename                          wait for the outcome: all succeed, or all know why not

A checkpoint of a cut run has ``trainer/optimizer/``, which any number of ranks reads; else the optimizer lies in state.safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.tensor import DTensor, zeros

from llavakit.errors import CheckpointError, LlavaError
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.train import state
from llavakit.train.optim import Optimizer
from llavakit.train.ranks import Ranks, whole_model

PARTS = "optimizer"
SaveModel = Callable[[Llava, Processor, Path], None]
Whole = Callable[[Llava, Ranks], Llava | None]  # what of a cut model is written, whole, on the main process


def save(
    out: Path,
    position: state.Position,
    *,
    model: Llava,
    processor: Processor,
    optimizer: Optimizer,
    ranks: Ranks,
    device: torch.device,
    save_model: SaveModel,
    whole: Whole = whole_model,
    card: str = "",
) -> Path:
    """Write and commit ``step-N``; ``card`` is its README.md.

    Raises CheckpointError ``not_written`` on every rank when the main one or a part failed.
    """
    random = {
        name if rank == 0 else f"{name}.{rank}": value
        for rank, states in enumerate(ranks.all(state.random_states(device)))
        for name, value in states.items()
    }
    moments = optimizer.state()
    cut = any(isinstance(value, DTensor) for value in moments.values())
    full = whole(model, ranks)
    if not ranks.main:
        if cut and (draft := ranks.of_main(None)) is not None:
            _write_parts(Path(draft), moments)
        return _agreed(ranks, None)
    told = False

    def write(folder: Path) -> None:
        nonlocal told
        assert full is not None
        save_model(full, processor, folder)
        state.write_trainer(folder, position, {} if cut else moments, random)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if cut:
            told = True
            _write_parts(Path(ranks.of_main(str(folder))), moments)

    done: Path | BaseException
    try:
        done = state.commit(out, position.step, write)
    except (OSError, SafetensorError, LlavaError, CheckpointException) as error:
        if cut and not told:
            ranks.of_main(None)
        done = error
    return _agreed(ranks, done)


def _agreed(ranks: Ranks, done: Path | BaseException | None) -> Path:
    """The path, or the main process's error, on every rank."""
    if ranks.world == 1 and isinstance(done, BaseException):
        raise done
    path, problem = ranks.of_main((str(done), None) if isinstance(done, Path) else (None, str(done)))
    if path is None:
        raise CheckpointError(problem or "unknown", code="not_written", remedy="see the message of the main process")
    return Path(path)


def _write_parts(folder: Path, moments: Mapping[str, Tensor]) -> None:
    save_parts(dict(moments), storage_writer=FileSystemWriter(folder / state.TRAINER / PARTS))


def restore(folder: Path, optimizer: Optimizer, stored: Mapping[str, Tensor]) -> None:
    """The optimizer's memory on this rank, from one file or from parts written by any number of ranks."""
    parts = folder / state.TRAINER / PARTS
    if not parts.is_dir():
        optimizer.restore(stored)
        return
    reader = FileSystemReader(parts)
    wanted: dict[str, Any] = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        parameter = optimizer.parameter(key.partition("/")[2])
        wanted[key] = _room(entry, parameter)
    load(wanted, storage_reader=reader)
    optimizer.restore(wanted)


def _room(entry: Any, parameter: Tensor | None) -> Tensor:
    """Where a stored tensor is read to: cut as its parameter is, or whole."""
    dtype = entry.properties.dtype
    if isinstance(parameter, DTensor) and entry.size == parameter.shape:
        return zeros(*entry.size, dtype=dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)
    return torch.zeros(entry.size, dtype=dtype)


def restore_random(states: Mapping[str, Tensor], *, ranks: Ranks, seed: int, device: torch.device) -> None:
    """This rank's random state; a rank that had none yet begins one that no other has."""
    own = {name: states[key] for name in ("cpu", "cuda", "mps") if (key := name if ranks.main else f"{name}.{ranks.rank}") in states}
    if "cpu" in own:
        state.restore_random(own, device)
    else:
        apart(seed, ranks)


def apart(seed: int, ranks: Ranks) -> None:
    """Ranks draw differently (dropout); the main one goes on as a run alone would."""
    if not ranks.main:
        torch.manual_seed(seed + 1_000_003 * ranks.rank)
