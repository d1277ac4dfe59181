"""Which of many files are there (D1), asked folder by folder: one listing instead of a question for each of 665K names.

A listing is believed when it holds a name; what it does not hold is asked for once more by name, so the answer is that of ``isfile``
also where names are spelled differently on disk (case, Unicode forms), and through links.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

FEW = 16  # names of one folder that are cheaper asked for one by one than by a listing of who knows how many


def missing(names: Iterable[str], root: Path) -> set[str]:
    """The names under ``root`` that are no files."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(os.path.dirname(name), []).append(name)
    absent: set[str] = set()
    for folder, wanted in folders.items():
        place = os.path.join(root, folder)
        if not os.path.isdir(place):
            absent.update(wanted)
            continue
        listed = _files(place, {os.path.basename(name) for name in wanted}) if len(wanted) > FEW else set()
        absent.update(name for name in wanted if os.path.basename(name) not in listed and not os.path.isfile(os.path.join(root, name)))
    return absent


def elsewhere(name: str, root: Path) -> Path | None:
    """A folder near ``root`` under which ``name`` lies: one above it, or one in it. The usual slip in naming the pictures' folder."""
    near = [*root.absolute().parents[:2], *sorted(path for path in root.glob("*") if path.is_dir())]
    return next((folder for folder in near if (folder / name).is_file()), None)


def _files(folder: str, wanted: set[str]) -> set[str]:
    """Those of the wanted names that a listing of the folder shows as files."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.name in wanted and entry.is_file()}
    except OSError:  # it may be entered and not listed
        return set()
