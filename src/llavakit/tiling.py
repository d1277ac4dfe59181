"""The geometry of one image: which views it is cut into and how many tokens of the language model it takes. Integers, but for two scales.

    image --(preprocess)--> views, S x S pixels each --(tower)--> (S // patch)^2 features a view --(merge)--> tokens

LLaVA v1 and 1.5 see one view. LLaVA-1.5-HD and NeXT see it first, as the base, and after it the tiles of the canvas that suits the shape:

    base view       canvas of 2 x 2 tiles          map of features, the padding's trimmed       tokens
    +-------+       +=======+=======+              . . . . . . . . . . . . . . . .   trim_y
    |       |       |///////|///////| padding      +-----------------------------+ +            base, then the kept map row
    | image |       |       |       |              |           kept              | row          by row, each closed by one
    |       |       |     image     |              |  kept_rows x kept_columns   | ends         row-end token
    +-------+       |///////|///////|              +-----------------------------+ +
                    +=======+=======+              . . . . . . . . . . . . . . . .   trim_y

Whoever needs the number of an image's tokens asks its ``Grid``: the processor that writes the placeholders, the model that fills them,
packing, budgets and the server. Sizes are (width, height) everywhere in this package.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llavakit.errors import CheckpointError

Merge = Literal["flat", "spatial", "spatial_unpad"]
Arithmetic = Literal["original", "transformers"]
Size = tuple[int, int]  # width, height in pixels

MERGES: tuple[Merge, ...] = ("flat", "spatial", "spatial_unpad")
LARGEST_CANVAS = 1 << 24  # pixels; 64 tiles of 512


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The views of one image and what is kept of them (spec 2.5).

    ``view``: patches along a side of a view. ``columns`` x ``rows`` tiles follow the base view, 0 x 0: there are none. ``trim_x`` and
    ``trim_y``: features of padding cut from the left and right, and from the top and bottom, of the joined map.
    """

    view: int
    columns: int = 0
    rows: int = 0
    merge: Merge = "flat"
    trim_x: int = 0
    trim_y: int = 0
    class_token: bool = False

    def __post_init__(self) -> None:
        assert self.view > 0, f"a view of {self.view} patches"
        assert (self.columns > 0) == (self.rows > 0), f"{self.columns} x {self.rows} tiles"
        assert self.merge == "flat" or not self.class_token, "a map has no place for class features"
        assert self.merge == "spatial_unpad" or not (self.trim_x or self.trim_y), f"merge {self.merge} trims nothing"
        assert min(self.trim_x, self.trim_y, self.kept_columns, self.kept_rows) >= 0, self

    @staticmethod
    def single(size: int = 336, patch: int = 14, *, class_token: bool = False) -> Grid:
        """One view of ``size`` x ``size`` pixels, whatever the image's shape (LLaVA v1 and 1.5). A remainder below a patch is not seen."""
        return Grid(view=size // patch, class_token=class_token)

    @property
    def views(self) -> int:
        """How many pictures the tower sees."""
        return 1 + self.columns * self.rows

    @property
    def view_tokens(self) -> int:
        """Features of one view."""
        return self.view * self.view + int(self.class_token)

    @property
    def kept_columns(self) -> int:
        """Features in a row of the map that are kept."""
        return self.columns * self.view - 2 * self.trim_x

    @property
    def kept_rows(self) -> int:
        """Rows of the map that are kept."""
        return self.rows * self.view - 2 * self.trim_y

    @property
    def row_ends(self) -> int:
        """How many row-end tokens there are; a base view that stands alone is closed by one."""
        if self.merge != "spatial_unpad":
            return 0
        return self.kept_rows if self.rows else 1

    @property
    def tokens(self) -> int:
        """How many positions of the language model the image takes."""
        if self.merge == "flat":
            return self.views * self.view_tokens
        return self.view_tokens + self.kept_rows * self.kept_columns + self.row_ends


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """The rule of a checkpoint: image size -> canvas -> ``Grid``.

    ``side``: pixels of a view. ``canvases``: the sizes to choose from, in the order that breaks ties; none: the base view alone.
    ``arithmetic``: how the original and transformers round the features of the padding; 36 of all sizes up to 1399 differ (spec 2.5).
    """

    side: int
    patch: int = 14
    canvases: tuple[Size, ...] = ()
    merge: Merge = "flat"
    arithmetic: Arithmetic = "transformers"
    class_token: bool = False

    def __post_init__(self) -> None:
        for width, height in self.canvases:
            if min(width, height) < self.side or width % self.side or height % self.side or width * height > LARGEST_CANVAS:
                raise _wrong(f"{width} x {height} is no canvas of tiles of {self.side}")
        if self.class_token and self.merge != "flat":
            raise _wrong(f"merge {self.merge} has no place for class features", where="mm_vision_select_feature")

    def canvas(self, width: int, height: int) -> Size | None:
        """The canvas that shows most of the image's own pixels; of equals the one wasting least, of these the first (spec 2.3)."""
        best: tuple[tuple[int, int], Size] | None = None
        for across, down in self.canvases:
            scale = min(across / width, down / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            merit = shown, shown - across * down
            if best is None or merit > best[0]:
                best = merit, (across, down)
        return None if best is None else best[1]

    def grid(self, width: int, height: int) -> Grid:
        """The grid of an image of ``width`` x ``height`` pixels."""
        view, canvas = self.side // self.patch, self.canvas(width, height)
        if canvas is None:
            return Grid(view=view, merge=self.merge, class_token=self.class_token)
        columns, rows = canvas[0] // self.side, canvas[1] // self.side
        trim_x, trim_y = self._trims(width, height, columns * view, rows * view) if self.merge == "spatial_unpad" else (0, 0)
        return Grid(view=view, columns=columns, rows=rows, merge=self.merge, trim_x=trim_x, trim_y=trim_y, class_token=self.class_token)

    def _trims(self, width: int, height: int, across: int, down: int) -> tuple[int, int]:
        """Features of padding on each side of a map of ``across`` x ``down`` features."""
        if width / height > across / down:
            return 0, (down - self._whole(height * (across / width))) // 2
        return (across - self._whole(width * (down / height))) // 2, 0

    def _whole(self, value: float) -> int:
        return int(value) if self.arithmetic == "original" else int(round(value, 7))


def placed(width: int, height: int, canvas: Size) -> tuple[int, int, int, int]:
    """Where an image lies on its canvas: left, top, width, height in pixels (spec 2.3, resize_and_pad)."""
    across, down = canvas
    if across / width < down / height:
        new_width, new_height = across, min(math.ceil(height * (across / width)), down)
    else:
        new_width, new_height = min(math.ceil(width * (down / height)), across), down
    return (across - new_width) // 2, (down - new_height) // 2, new_width, new_height


def tiles_of(shapes: Iterable[Size], side: int) -> tuple[Size, ...]:
    """Canvases in pixels from (columns, rows)."""
    return tuple((columns * side, rows * side) for columns, rows in shapes)


RELEASED: tuple[Size, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # columns x rows, in the order of the four released configs
BLOG: tuple[Size, ...] = ((2, 2), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1))  # announced, never released (spec 2.4)
HD: tuple[Size, ...] = tuple(  # LLaVA-1.5-HD: up to six tiles (spec 2.9), the smallest first
    sorted(((c, r) for c in range(1, 7) for r in range(1, 7) if c * r <= 6 and (min(c, r) < 2 or max(c, r) < 4)), key=lambda s: s[0] * s[1])
)
SHAPES: Mapping[str, tuple[Size, ...]] = {"released": RELEASED, "blog": BLOG, "hd": HD}

_RANGE = re.compile(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)\s*,\s*\.\.\.\s*,\s*\(\s*(\d+)\s*x\s*(\d+)\s*\)")


def pinpoints(value: object, *, side: int, height_first: bool) -> tuple[Size, ...]:
    """``image_grid_pinpoints`` of a config: a list of pairs, the same as a string, or a range "(1x1),...,(6x6)" of tiles.

    ``height_first``: llava-hf files write (height, width), the original's (width, height). Raises CheckpointError ``bad_pinpoints``.
    """
    if isinstance(value, str):
        spans = _RANGE.fullmatch(value.strip())
        if spans:
            first, second, last, end = map(int, spans.groups())
            pairs: object = [(a * side, b * side) for a in range(first, last + 1) for b in range(second, end + 1)]
        else:
            pairs = _literal(value)
    else:
        pairs = value
    if not isinstance(pairs, Sequence) or not pairs or len(pairs) > 1000:
        raise _wrong(f"{value!r:.80} is no list of canvases")
    found = []
    for pair in pairs:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(type(number) is int for number in pair)):
            raise _wrong(f"{pair!r:.80} is no canvas")
        found.append((pair[1], pair[0]) if height_first else (pair[0], pair[1]))
    return tuple(found)


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise _wrong(f"{text!r:.80} is no list of canvases") from None


def _wrong(what: str, *, where: str = "image_grid_pinpoints") -> CheckpointError:
    return CheckpointError(what, code="bad_pinpoints", where=where, remedy="write pairs of multiples of the tower's image size")
