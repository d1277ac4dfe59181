"""A folder that appears whole or not at all, whenever the power goes.

write  name.tmp-<random>/...   -> every file and folder fsynced -> takes the place of name/   -> parent fsynced
replacing: the two names are exchanged in one step where the system can (Linux), so ``name`` is the old or the new one at any
moment; elsewhere the old one is put aside as name.old for the instant between two renames, and ``heal`` brings it back.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

LATEST = "latest"  # a file of a training run's folder: the name of its newest checkpoint
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder and put it in the place of ``folder``. If it raises, nothing has changed."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    draft.mkdir()
    try:
        write(draft)
        _sync_tree(draft)
        _put(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def heal(folder: Path) -> None:
    """Bring back a folder that a kill left put aside."""
    aside = folder.with_name(folder.name + ".old")
    if not folder.exists() and aside.is_dir():
        os.rename(aside, folder)


def of_run(folder: Path) -> Path:
    """The newest checkpoint of a training run's folder; any other folder as it is."""
    pointer = folder / LATEST
    if not (folder / "config.json").exists() and pointer.is_file():
        name = pointer.read_text(encoding="utf-8").strip()
        if name and Path(name).name == name and (folder / name).is_dir():
            return folder / name
    return folder


def _put(draft: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(draft, folder)
    elif _exchange(draft, folder):
        shutil.rmtree(draft)  # the old content, under the draft's name
    else:
        aside = folder.with_name(folder.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        os.rename(draft, folder)
        shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return int(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Where folders cannot be opened (Windows) names are written through."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
