"""The tower's features kept between epochs and runs: of which tower and preparation they are, what disk they take, who makes them.

    worker   picture --digest--> does the store have it?  yes: features    no: views --+
    rank     the tower reads those views, a picture at a time, and they are kept ------+--> projector --> ...

The tower reads a picture at a time, so that its features do not depend on the pictures it stood beside, nor on the epoch, the rank or the
run that met it first. On a CPU a batch gives the same bits as its pictures alone; on CUDA other kernels may be taken, and the last bits
differ. Features are kept in the arithmetic of the forward pass: to what the projector's first layer would round them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.config import TrainConfig
from llavakit.data.features import MARK, FeatureStore
from llavakit.errors import ConfigError, TrainingError
from llavakit.model.llava import Llava
from llavakit.model.vision import VisionTower
from llavakit.processor import Batch, Kept, Processor
from llavakit.tiling import Tiling

FORMAT = 1  # of the files, and of what they are named after
ABOUT = "about.json"


def opened(
    config: TrainConfig,
    model: Llava,
    processor: Processor,
    *,
    rates: Mapping[str, float],
    device: torch.device,
    forward: torch.dtype,
    pictures: int,
    reserve: int,
    say: Callable[[str], object],
) -> FeatureStore | None:
    """The store that a run asks for, when there is room for all of its ``pictures`` and ``reserve`` bytes more.

    Raises ConfigError ``bad_value`` where the tower learns or is cut, TrainingError ``disk_full`` and ``cannot_write``.
    """
    if config.cache_features is None:
        return None
    _check(config, rates)
    made_from = about(model, processor, device, forward)
    key = hashlib.blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=10).hexdigest()
    tokens, width = processor.tiling.grid(1, 1).view_tokens, int(model.config.vision["hidden_size"])
    store = FeatureStore(folder=config.cache_features / key, tokens=tokens, width=width, dtype=forward, reserve=reserve)
    say(_check_room(store, pictures, most_views(processor.tiling)))
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        draft = store.folder / f"{ABOUT}.{os.getpid()}"
        draft.write_text(json.dumps(made_from, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(draft, store.folder / ABOUT)
    except OSError as error:
        what = f"it cannot be written ({error.strerror or error})"
        raise TrainingError(what, code="cannot_write", where=str(store.folder), remedy="give another folder") from error
    store.sweep()
    return store


def _check(config: TrainConfig, rates: Mapping[str, float]) -> None:
    learns = next((name for name in rates if name.startswith("vision_tower.")), None)
    if learns is not None:
        what = f"{learns} learns, and with it all features change at every step"
        raise ConfigError(what, code="bad_value", where="cache_features", remedy="leave it out, or freeze the tower")
    if config.shard != "none":
        what = "no rank holds the whole tower"
        raise ConfigError(what, code="bad_value", where="cache_features", remedy="leave it out, or use shard=none")


def _check_room(store: FeatureStore, pictures: int, views: int) -> str:
    """What will be taken at most, in words; before anything is written."""
    each, there = views * store.bytes_of_a_view + MARK, store.count()
    needed, free = max(0, pictures - there) * each, shutil.disk_usage(_existing(store.folder)).free
    told = f"{pictures:,} pictures, {there:,} of them kept already, {each:,} bytes a picture at most: {needed:,} more of {free:,} free"
    if free < needed + store.reserve:
        raise TrainingError(
            f"no room for the tower's features: {told}, of which {store.reserve:,} stay for a checkpoint", code="disk_full",
            where=str(store.folder), remedy="give a folder on a larger disk, or leave out cache_features",
        )  # fmt: skip
    return f"features in {store.folder}: {told}"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def most_views(tiling: Tiling) -> int:
    """Of any picture."""
    return 1 + max((width * height // tiling.side**2 for width, height in tiling.canvases), default=0)


def about(model: Llava, processor: Processor, device: torch.device, forward: torch.dtype) -> dict[str, Any]:
    """All that a picture's features depend on but the picture; what is behind the layer that is read does not count."""
    tower = model.vision_tower
    unread = {name.removeprefix("vision_tower.") for name in tower.never_run()}
    digest = hashlib.blake2b(digest_size=20)
    for name, value in tower.named_parameters():
        if name not in unread:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return {
        "format": FORMAT,
        "tower": digest.hexdigest(),
        "vision": {name: repr(value) for name, value in model.config.vision.items()},
        "layer": tower.run_layers,
        "select": model.config.select_feature,
        "preprocess": {name: repr(value) for name, value in asdict(processor.preprocess).items()},
        "tiling": {name: repr(value) for name, value in asdict(processor.tiling).items()},
        "draft": processor.draft,
        "arithmetic": f"{device.type} {forward}",
    }


@dataclass(kw_only=True)
class Keeper:
    """What makes the features that a store does not have yet; says once when it can keep no more."""

    store: FeatureStore | None
    tower: VisionTower
    say: Callable[[str], object]
    full: bool = False

    def completed(self, batch: Batch) -> Batch:
        """The batch, on its device, with the features of all its pictures."""
        if self.store is None or not batch.kept:
            return batch
        views = iter(batch.views.split([grid.views for grid, picture in zip(batch.grids, batch.kept, strict=True) if not picture.known]))
        known = [grid.views for grid, picture in zip(batch.grids, batch.kept, strict=True) if picture.known]
        features = iter(() if batch.features is None else batch.features.split(known))
        found = [next(features) if picture.known else self._made(picture.name, next(views)) for picture in batch.kept]
        kept = tuple(Kept(picture.name, True) for picture in batch.kept)
        return replace(batch, views=batch.views[:0], features=torch.cat(found), kept=kept)

    def _made(self, name: str, views_v3ss: Tensor) -> Tensor:
        assert self.store is not None
        found = self.store.get(name)  # since the loader asked, another batch may have met it
        if found is not None:
            return found.to(views_v3ss.device)
        with torch.no_grad():
            made: Tensor = self.tower(views_v3ss).to(self.store.dtype)
        if not self.full and not self.store.put(name, made):
            self.full = True
            self.say(f"no more features can be kept in {self.store.folder}; the tower goes on reading")
        return made
