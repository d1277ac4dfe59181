"""Files that have their name only when they are complete and on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """Write beside the name, take it at the end; when something goes wrong the file of before stays."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def line(file: TextIO, value: Mapping[str, Any]) -> None:
    """One value as a line of JSON."""
    file.write(json.dumps(value, ensure_ascii=False) + "\n")
