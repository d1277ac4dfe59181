"""Files that have their name only when they are whole and on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4


def replaced(path: Path, content: str | bytes, *, sync: bool = True) -> Path:
    """Write beside the name and take it at the end; what was there before stays when something goes wrong. Makes the folder.

    A character that UTF-8 does not have (half a surrogate pair, which a model may have said) becomes a question mark.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def json_file(path: Path, value: Any, *, indent: int | None = None) -> Path:
    """One value as JSON."""
    return replaced(path, json.dumps(value, indent=indent))


def json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One object a line."""
    return replaced(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
