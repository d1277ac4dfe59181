"""What the tower saw: rows of pictures by content, kept as long as there is room; and the tower at work, a few layers a step.

    picture --known?--> rows N.H                                      Features: least recently used out first, bounded in bytes
       '--no--> queue --> group of views --> layer, layer, ... | layer, layer, ... --> projector, merge --> rows
                                             one step            the next

A tower over one view costs as much as reading some hundred tokens; between its layers the replies under way get their next tokens.
Two who ask about one picture wait for the same work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llavakit.model.heap import own_pages
from llavakit.model.llava import Llava
from llavakit.model.merge import merge
from llavakit.tiling import Grid


@dataclass(kw_only=True)
class Picture:
    """A picture in a prompt: ``tokens`` positions from ``start`` on. ``key`` says pixels and grid; ``views`` until its rows are known."""

    key: bytes
    start: int
    grid: Grid
    views: Tensor | None
    rows: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + self.grid.tokens


class Features:
    """Rows by picture."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = self.hits = self.misses = 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        found = self._rows.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self._rows.move_to_end(key)
        return found

    def put(self, key: bytes, rows: Tensor) -> None:
        if key in self._rows or rows.nbytes > self.max_bytes:
            return
        self._rows[key] = rows
        self.held += rows.nbytes
        while self.held > self.max_bytes:
            self.held -= self._rows.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._rows.clear()
        self.held = 0


@dataclass(kw_only=True)
class _Sight:
    """A picture to be seen, and who waits for it."""

    grid: Grid
    views: Tensor
    askers: list[Any] = field(default_factory=list)


class Tower:
    """The pictures to be seen, first come first served."""

    def __init__(self, model: Llava, features: Features, *, at_once: int) -> None:
        """at_once: views that are seen together."""
        self._model = model
        self._features = features
        self._at_once = at_once
        self._queue: OrderedDict[bytes, _Sight] = OrderedDict()
        self._work: Generator[None, None, dict[bytes, Tensor]] | None = None
        self._group: list[bytes] = []
        self.view_cost = _view_cost(model)
        self._layer_cost = self.view_cost

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    def ask(self, picture: Picture, asker: Any) -> None:
        assert picture.views is not None, "its rows are known"
        sight = self._queue.setdefault(picture.key, _Sight(grid=picture.grid, views=picture.views))
        if asker not in sight.askers:
            sight.askers.append(asker)

    def leave(self, asker: Any) -> None:
        """Nobody waits for what only he asked for."""
        for key, sight in list(self._queue.items()):
            if asker in sight.askers:
                sight.askers.remove(asker)
            if not sight.askers:
                del self._queue[key]
        if self._work is not None and not any(key in self._queue for key in self._group):
            self._drop_work()

    def run(self, budget: float) -> float:
        """One layer at least, then as many as ``budget`` (in tokens of the decoder) pays for. Returns what was spent.

        What a failing picture raises goes through, after everything that was seen together with it has left the queue (``take_failed``).
        """
        spent = 0.0
        while self._queue:
            if self._work is None:
                self._group = self._next_group()
                self._work = self._seen([(key, self._queue[key]) for key in self._group])
            try:
                next(self._work)
            except StopIteration as done:
                for key, rows in done.value.items():
                    self._features.put(key, rows)
                    self._give(key, rows)
                self._drop_work()
                continue
            spent += self._layer_cost
            if spent >= budget:
                break
        return spent

    def take_failed(self) -> list[Any]:
        """After ``run`` has raised: everyone who waited for what was being seen."""
        askers = [asker for key in self._group if key in self._queue for asker in self._queue.pop(key).askers]
        self._drop_work()
        return askers

    def _give(self, key: bytes, rows: Tensor) -> None:
        sight = self._queue.pop(key, None)  # None: who had asked has left
        for asker in sight.askers if sight is not None else ():
            asker.sees(key, rows)

    def _drop_work(self) -> None:
        if self._work is not None:
            self._work.close()
        self._work, self._group = None, []

    def _next_group(self) -> list[bytes]:
        views, group = 0, list[bytes]()
        for key, sight in self._queue.items():
            if group and views + sight.grid.views > self._at_once:
                break
            group.append(key)
            views += sight.grid.views
        return group

    def _seen(self, sights: list[tuple[bytes, _Sight]]) -> Generator[None, None, dict[bytes, Tensor]]:
        """Stops after every layer."""
        model = self._model
        projected = []
        for views in torch.cat([sight.views for _, sight in sights]).split(self._at_once):
            self._layer_cost = self.view_cost * len(views)
            features = yield from model.vision_tower.in_slices(views)
            projected.append(model.project(features))
        each = torch.cat(projected).split([sight.grid.views for _, sight in sights])
        rows = (merge(part, [sight.grid], model.image_newline) for part, (_, sight) in zip(each, sights, strict=True))
        return {key: self._apart(part) for part, (key, _) in zip(rows, sights, strict=True)}

    def _apart(self, rows: Tensor) -> Tensor:
        """Nothing of the group's other pictures stays alive with these."""
        return own_pages(rows.shape, self._model.dtype, self._model.device).copy_(rows)


def pictures_of(keys: list[int | bytes], views: Tensor, grids: tuple[Grid, ...]) -> Iterator[Picture]:
    """The pictures of a prompt, from what stands at each position."""
    at = 0
    for grid, its in zip(grids, views.split([grid.views for grid in grids]) if grids else (), strict=True):
        while isinstance(keys[at], int):
            at += 1
        key = keys[at]
        assert isinstance(key, bytes)
        yield Picture(key=key, start=at, grid=grid, views=its)
        at += grid.tokens


def _view_cost(model: Llava) -> float:
    """Multiplications of one layer of the tower over one view, in tokens of the decoder."""
    tower, config = model.vision_tower, model.config.vision
    weights = sum(parameter.numel() for parameter in tower.vision_model.encoder.layers[0].parameters())
    rows = (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1
    decoder = sum(p.numel() for name, p in model.language_model.named_parameters() if p.ndim == 2 and "embed" not in name)
    return float(rows * weights / max(1, decoder))
