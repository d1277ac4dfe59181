"""What a checkpoint folder really holds, found out before anything is allocated (hardening C1, C2, C4, C5, C9).

    config.json                       and every other JSON file: no auto_map, so no foreign code
    model.safetensors                 or
    model.safetensors.index.json  ->  model-00001-of-00003.safetensors ...
    pytorch_model.bin (.index.json)   only with allow_pickle, and then torch's restricted reader

Each tensor found is a ``Stored``: name, shape, type and a way to read it piece by piece into memory that already exists, so that
loading needs the weights once and one piece more, and never maps the file into memory.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llavakit.errors import CheckpointError

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED_SINGLE, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_LISTS = (INDEX, _PICKLED_INDEX, "tokenizer.json", "vocab.json", "added_tokens.json")  # long, and nobody looks for code there
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LFS = b"version https://git-lfs"
_PIECE = 1 << 22  # numbers read at a time: 8 MiB of a 16-bit type stay in the processor's cache for conversion and check
_TYPES: Mapping[str, torch.dtype] = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "download the file again"


class Stored(Protocol):
    """One tensor in a file."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype | None: ...  # None for a type that is no weight's (integers, 8-bit floats)
    @property
    def file(self) -> Path: ...
    def pieces(self, target: Tensor) -> Iterator[Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor in a safetensors file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    start: int  # bytes from the beginning of the file

    def pieces(self, target: Tensor) -> Iterator[Tensor]:
        """Write the tensor into ``target`` (same shape, any type and device); each part of it, flat, as soon as it is filled."""
        assert self.dtype is not None, f"{self.name} holds no weights"
        flat = target.view(-1)
        direct = flat.dtype == self.dtype and flat.device.type == "cpu"
        buffer = flat if direct else torch.empty(min(_PIECE, flat.numel()), dtype=self.dtype)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for at in range(0, flat.numel(), _PIECE):
                part = flat[at : at + _PIECE]
                read = part if direct else buffer[: part.numel()]
                _read_exactly(file, memoryview(read.view(torch.uint8).numpy().data), self.file)
                if not direct:
                    part.copy_(read)
                yield part


@dataclass(frozen=True, kw_only=True)
class PickledTensor:
    """A tensor in a file of torch's own format, mapped into memory."""

    name: str
    tensor: Tensor
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        return self.tensor.dtype if self.tensor.dtype in _TYPES.values() else None

    def pieces(self, target: Tensor) -> Iterator[Tensor]:
        """As ``FileTensor.pieces``."""
        source, flat = self.tensor.reshape(-1), target.view(-1)
        for at in range(0, flat.numel(), _PIECE):
            part = flat[at : at + _PIECE]
            part.copy_(source[at : at + _PIECE])
            yield part


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file. Raises CheckpointError."""
    _check_file(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, brackets without end
        raise CheckpointError(f"no valid JSON ({error})", code="damaged_file", where=str(path), remedy=_AGAIN) from error
    if not isinstance(fields, dict):
        raise CheckpointError("JSON, but no object", code="damaged_file", where=str(path), remedy=_AGAIN)
    return fields


def check_folder(folder: Path, *, config: str = CONFIG) -> None:
    """Refuse a folder that is none, has no ``config``, links to files elsewhere, or asks for its own code to be run."""
    if not folder.is_dir():
        raise CheckpointError("no such folder", code="no_checkpoint", where=str(folder), remedy="give the folder of a checkpoint")
    if not (folder / config).exists():
        raise CheckpointError(f"no {config}", code="no_checkpoint", where=str(folder), remedy="give the folder of a checkpoint")
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            _check_inside(path, folder)
        if path.suffix == ".json":
            _check_file(path)
        if path.suffix == ".json" and path.name not in _LISTS and _names_code(read_json(path)):
            raise CheckpointError(
                "it asks for Python code from the checkpoint (auto_map), which is never run here",
                code="remote_code",
                where=str(path),
                remedy="remove auto_map if transformers itself knows the model",
            )


def _names_code(value: Any) -> bool:
    """Whether ``auto_map`` stands anywhere in a JSON value."""
    rest = [value]
    while rest:
        inner = rest.pop()
        if isinstance(inner, dict):
            if "auto_map" in inner:
                return True
            rest.extend(inner.values())
        elif isinstance(inner, list):
            rest.extend(inner)
    return False


def tensors(folder: Path, *, allow_pickle: bool) -> dict[str, Stored]:
    """Every tensor of the checkpoint by its name in the files, all files checked. Raises CheckpointError."""
    paths, promised = _shards(folder)
    for path in paths:
        _check_pickle(path, allow_pickle)
        _check_file(path)
    found: dict[str, Stored] = {}
    for path in paths:
        for name, tensor in in_file(path, allow_pickle=allow_pickle).items():
            if name in found:
                raise CheckpointError(f"{name} is in two files", code="damaged_index", where=str(path), remedy=_AGAIN)
            found[name] = tensor
    absent = sorted(name for name, shard in promised.items() if name not in found or found[name].file.name != shard)
    if absent:
        raise CheckpointError(
            f"the index promises {len(absent)} tensors that its files do not hold: {', '.join(absent)}",
            code="damaged_index",
            where=str(folder),
            remedy="download the checkpoint again",
        )
    return found


def in_file(path: Path, *, allow_pickle: bool) -> dict[str, Stored]:
    """Every tensor of one file by its name there. Raises CheckpointError."""
    _check_pickle(path, allow_pickle)
    _check_file(path)
    return {tensor.name: tensor for tensor in (_pickled(path) if path.suffix in _PICKLED else _safetensors(path))}


def value_of(stored: Stored, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole tensor, in memory."""
    value = torch.empty(stored.shape, dtype=dtype)
    for _ in stored.pieces(value):
        pass
    return value


def _check_pickle(path: Path, allowed: bool) -> None:
    if path.suffix in _PICKLED and not allowed:
        raise CheckpointError(
            "weights as a pickle, a format that can run code when it is read",
            code="pickle_refused",
            where=str(path),
            remedy="use the safetensors files of the model, or allow pickle if you trust the source",
        )


def has_weights(folder: Path) -> bool:
    """Whether there is a file, or an index, of a whole model's weights."""
    return any((folder / name).exists() for name in (SINGLE, INDEX, _PICKLED_SINGLE, _PICKLED_INDEX))


def _shards(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The weight files, and which tensor the index (if there is one) puts into which."""
    for single, index in ((SINGLE, INDEX), (_PICKLED_SINGLE, _PICKLED_INDEX)):
        if (folder / index).exists():
            placed = read_json(folder / index).get("weight_map")
            if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
                raise CheckpointError("no weight_map", code="damaged_index", where=str(folder / index), remedy=_AGAIN)
            names = sorted(set(placed.values()))
            for name in names:
                _check_name(name, folder / index)
            absent = [name for name in names if not (folder / name).exists()]
            if absent:
                raise _missing(folder, absent)
            return [folder / name for name in names], placed
        if (folder / single).exists():
            return [folder / single], {}
    raise _missing(folder, [SINGLE])


def _missing(folder: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"missing weight files: {', '.join(names)}", code="missing_file", where=str(folder), remedy="download the missing files"
    )


def _check_name(name: str, index: Path) -> None:
    """A shard is a file of the folder: no path, no way out of it."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or ":" in name:
        raise CheckpointError(
            f"the index names {name!r}, which is no plain file name",
            code="unsafe_path",
            where=str(index),
            remedy="do not use this checkpoint",
        )
    _check_inside(index.with_name(name), index.parent)


def _check_inside(path: Path, folder: Path) -> None:
    """A link may point within its folder, or within the Hub's cache from a snapshot to that model's blobs; nowhere else."""
    home = folder.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(root) for root in allowed):
        raise CheckpointError(
            "a link to a file outside the checkpoint", code="unsafe_path", where=str(path), remedy="copy the file into the folder"
        )


def _check_file(path: Path) -> None:
    """Refuse what is plainly no content: nothing at all, or git's note of where the content is."""
    if not path.is_file():
        raise _missing(path.parent, [path.name])
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if not start:
        raise CheckpointError("the file is empty", code="damaged_file", where=str(path), remedy=_AGAIN)
    if start == _LFS:
        raise CheckpointError(
            "a git-lfs pointer, not the file itself", code="lfs_pointer", where=str(path), remedy="run 'git lfs pull' or " + _AGAIN
        )


def _safetensors(path: Path) -> Iterator[FileTensor]:
    """The tensors of one file; safetensors' own reader checks the header, every offset and the length of the file."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"damaged ({error})", code="damaged_file", where=str(path), remedy=_AGAIN) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            shape = tuple(entry["shape"])
            start = 8 + length + entry["data_offsets"][0]
            yield FileTensor(name=name, shape=shape, dtype=_TYPES.get(entry["dtype"]), file=path, start=start)


def _pickled(path: Path) -> Iterator[PickledTensor]:
    """The tensors of one file of torch's format, read with weights_only: containers and tensors, no other objects."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"not plain weights ({str(error).strip().splitlines()[0]})", code="damaged_file", where=str(path), remedy=_AGAIN
        ) from error
    for name, tensor in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            yield PickledTensor(name=name, tensor=tensor, file=path)


def _read_exactly(file: Any, into: memoryview, path: Path) -> None:
    at = 0
    while at < len(into):
        count = file.readinto(into[at:])
        if not count:
            raise CheckpointError("the file ends too early", code="damaged_file", where=str(path), remedy=_AGAIN)
        at += count


def size_in(dtype: torch.dtype | None, stored: Stored) -> int:
    """Bytes of a stored tensor when held as ``dtype`` (None: as stored)."""
    held = dtype or stored.dtype
    return math.prod(stored.shape) * (held.itemsize if held else 0)
