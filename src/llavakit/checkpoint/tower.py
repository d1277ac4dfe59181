"""The CLIP that a checkpoint of the original layout looks through: found, described, and read where its weights are not inside.

given             --tower FOLDER
else              the folder that mm_vision_tower names: as it stands, beside config.json, or beside the checkpoint
else              that name in the Hub's cache on this machine; nothing is fetched
shape only        the two towers of the released models, when the weights are inside
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.checkpoint import files, names
from llavakit.checkpoint.files import Stored
from llavakit.errors import CheckpointError
from llavakit.preprocess import CLIP_MEAN, CLIP_STD

_TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
_PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A CLIP's fields, how it wants its pictures, and the folder of its weights where there is one."""

    fields: Mapping[str, Any]
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    folder: Path | None = None

    @staticmethod
    def read(folder: Path) -> Tower:
        """A folder of a CLIP, whole or its tower alone. Raises CheckpointError."""
        files.check_folder(folder)
        config = files.read_json(folder / files.CONFIG)
        fields = config.get("vision_config", config)
        if config.get("model_type") not in ("clip", "clip_vision_model") or not isinstance(fields, dict):
            what = f"a model of type {config.get('model_type')!r}, no CLIP"
            raise CheckpointError(what, code="bad_tower", where=str(folder), remedy="give the folder of a CLIP vision model")
        about = files.read_json(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).exists() else {}
        mean, std = tuple(about.get("image_mean", CLIP_MEAN)), tuple(about.get("image_std", CLIP_STD))
        return Tower(fields=fields | {"model_type": "clip_vision_model"}, mean=mean, std=std, folder=folder)

    def tensors(self, *, allow_pickle: bool) -> dict[str, Stored]:
        """Its weights by our names; the text side of a whole CLIP is left aside."""
        assert self.folder is not None, "only its shape is known"
        found = files.tensors(self.folder, allow_pickle=allow_pickle)
        pairs = {names.ours(name, names.CLIP): stored for name, stored in found.items() if not name.startswith(_TEXT_SIDE)}
        return {name: stored for name, stored in pairs.items() if name is not None}


def find(name: str | None, *, beside: Path) -> Path | None:
    """The folder that a checkpoint's mm_vision_tower means on this machine, if it is here."""
    if not name or "\0" in name:
        return None
    return next((folder for folder in _candidates(name, beside) if (folder / files.CONFIG).is_file()), None)


def _candidates(name: str, beside: Path) -> Iterator[Path]:
    yield from (beside / name, Path(name), beside.parent / name)
    cached = _cached(name)
    if cached is not None:
        yield cached


def _cached(name: str) -> Path | None:
    """The newest snapshot of a Hub model in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name that a model of the Hub can have
        return None
