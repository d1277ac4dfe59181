"""What kind of checkpoint a folder holds, told by the content of its files and never by its name.

config.json with vision_config, text_config           hf          complete: what this package writes
config.json with mm_... and a whole model's weights   original    1.5: without the tower's weights; 1.6: with them
    the same, but its final norm is about zero        delta       to be added to a base
config.json with mm_... and mm_projector.bin alone    projector   what stage 1 of the original leaves; needs a language model
adapter_config.json                                   lora        matrices to be added to a base, non_lora_trainables.bin beside
anything else                                         other
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llavakit.checkpoint import files
from llavakit.checkpoint.files import Stored
from llavakit.checkpoint.folders import heal, of_run
from llavakit.errors import CheckpointError
from llavakit.model.presets import ARCHITECTURES

Kind = Literal["hf", "original", "delta", "projector", "lora", "other"]

MARKS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size", "mm_vision_select_layer")
PROJECTOR_FILE, EXTRAS_FILE = "mm_projector.bin", "non_lora_trainables.bin"
PROJECTOR_FILES = ("mm_projector.safetensors", PROJECTOR_FILE)
ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_FINAL_NORM = "model.norm.weight"
_NOTHING = 0.1  # mean of a final norm: one or more in trained models; a thousandth in the difference of two


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A folder, its kind, and its config.json (empty where there is none)."""

    folder: Path
    kind: Kind
    config: Mapping[str, Any]
    allow_pickle: bool = False

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """What its files hold, by the names there; of an adapter, its matrices. Raises CheckpointError."""
        if self.kind == "projector":
            return files.in_file(_first(self.folder, PROJECTOR_FILES), allow_pickle=self.allow_pickle)
        if self.kind == "lora":
            return files.in_file(_first(self.folder, ADAPTER_FILES), allow_pickle=self.allow_pickle)
        return files.tensors(self.folder, allow_pickle=self.allow_pickle)

    @cached_property
    def extras(self) -> Mapping[str, Stored]:
        """What was trained as a whole beside an adapter's matrices."""
        path = self.folder / EXTRAS_FILE
        return files.in_file(path, allow_pickle=self.allow_pickle) if path.exists() else {}

    @cached_property
    def adapter(self) -> Mapping[str, Any]:
        """The fields of adapter_config.json; empty for other kinds."""
        return files.read_json(self.folder / ADAPTER_CONFIG) if self.kind == "lora" else {}

    @property
    def has_tower(self) -> bool:
        """Whether the tower's weights are here, all or some."""
        return any("vision_tower." in name for held in (self.tensors, self.extras) for name in held)

    @property
    def tower(self) -> str | None:
        """The tower that the checkpoint names: a model of the Hub or a path on the machine it was trained on."""
        name = self.config.get("mm_vision_tower")
        return name if isinstance(name, str) and name else None

    @property
    def base(self) -> str | None:
        """The base that an adapter names, likewise."""
        name = self.adapter.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def needs_base(self) -> bool:
        """Whether it is no model without another folder's weights."""
        return self.kind in ("delta", "projector", "lora")


def describe(folder: Path, *, allow_pickle: bool = False) -> Layout:
    """The kind of a checkpoint's folder (of a training run's folder: of its newest checkpoint). Raises CheckpointError."""
    folder = of_run(Path(folder))
    heal(folder)
    files.check_folder(folder, config=ADAPTER_CONFIG if (folder / ADAPTER_CONFIG).exists() else files.CONFIG)
    config = files.read_json(folder / files.CONFIG) if (folder / files.CONFIG).exists() else {}
    layout = Layout(folder=folder, kind=_kind(folder, config), config=config, allow_pickle=allow_pickle)
    if layout.kind == "original" and _is_delta(layout):
        return Layout(folder=folder, kind="delta", config=config, allow_pickle=allow_pickle)
    return layout


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of the original layout; its model_type may say 'llava' as llava-hf's does (spec trap 22)."""
    return any(mark in config for mark in MARKS)


def _kind(folder: Path, config: Mapping[str, Any]) -> Kind:
    if (folder / ADAPTER_CONFIG).exists():
        return "lora"
    if is_original(config):
        alone = any((folder / name).exists() for name in PROJECTOR_FILES) and not files.has_weights(folder)
        return "projector" if alone else "original"
    return "hf" if config.get("model_type") in ARCHITECTURES else "other"


def _is_delta(layout: Layout) -> bool:
    """A difference of two models has their layout; but what a final norm of zeros leads to can be no model."""
    norm = layout.tensors.get(_FINAL_NORM)
    return norm is not None and norm.dtype is not None and float(files.value_of(norm).abs().mean()) < _NOTHING


def _first(folder: Path, names: Sequence[str]) -> Path:
    """The first of some files that is there."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"no {' or '.join(names)}", code="missing_file", where=str(folder), remedy="download the missing file")
