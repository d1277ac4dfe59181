"""What a model sees of a conversation, in numbers and places: for the chat page, which draws them over the pictures. No tensors.

Places are fractions of the picture's width and height; what lies outside of 0..1 is padding:

    pad, wide picture          square (crop)            canvas, tall picture
    +---------------+          +---+-------+---+        +------+-----------+------+
    |    padding    | < 0      |   |       |   |        | pad  |  tile 0   | pad  |  the tiles of the canvas, and within
    +===============+ 0        |   | seen  |   |        |------|  tile 1   |------|  it the patches that are kept
    |    picture    |          |   |       |   |        |      |           |      |
    +===============+ 1        +---+-------+---+        +------+-----------+------+
    |    padding    |          0  left         1        left < 0              > 1
    +---------------+

The patches of one ``Patches`` are tokens of the language model in reading order; those of a picture's, one after the other, are all
of ``Grid.tokens``, but for the row end that closes a base view standing alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from llavakit.images import image_size
from llavakit.preprocess import Preprocess
from llavakit.processor import Processor
from llavakit.tiling import Grid, Size, placed
from llavakit.types import Conversation


@dataclass(frozen=True, kw_only=True)
class Box:
    """A place on a picture, in fractions of its width and height."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Neighbouring patches that are tokens: row by row, behind the class token if there is one, each row closed by an end if they are."""

    box: Box
    columns: int
    rows: int
    class_token: bool = False
    row_ends: bool = False

    @property
    def tokens(self) -> int:
        return int(self.class_token) + self.rows * (self.columns + int(self.row_ends))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture: its size, the base view, the tiles of its canvas (none: it has no canvas), and the patches that are tokens."""

    width: int
    height: int
    tokens: int
    views: int
    row_ends: int
    base: Box
    tiles: tuple[Box, ...]
    patches: tuple[Patches, ...]
    canvas: Size | None
    columns: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A conversation as the model reads it. ``text_tokens`` are the template's too."""

    tokens: int
    text_tokens: int
    image_tokens: int
    context: int
    side: int
    patch: int
    aspect: str
    merge: str
    pictures: tuple[Picture, ...]


def see(conversation: Conversation, processor: Processor, *, context: int) -> Seen:
    """The numbers of a conversation, open or closed, whether it fits or not. Of pictures the header is read. Raises ImageError."""
    tokens, _ = processor.count(conversation)
    sizes = [image_size(image, processor.limits) for image in conversation.images]
    pictures = tuple(picture(size, processor) for size in sizes)
    pictured = sum(one.tokens for one in pictures)
    return Seen(
        tokens=tokens, text_tokens=tokens - pictured, image_tokens=pictured, context=context, side=processor.tiling.side,
        patch=processor.tiling.patch, aspect=processor.preprocess.aspect, merge=processor.tiling.merge, pictures=pictures,
    )  # fmt: skip


def picture(size: Size, processor: Processor) -> Picture:
    """How a picture of this size is cut, and what is kept of it."""
    tiling, grid, canvas = processor.tiling, processor.tiling.grid(*size), processor.tiling.canvas(*size)
    base = base_box(size, processor.preprocess)
    return Picture(
        width=size[0], height=size[1], tokens=grid.tokens, views=grid.views, row_ends=grid.row_ends, base=base,
        tiles=() if canvas is None else tile_boxes(size, canvas, tiling.side),
        patches=patches(size, grid, canvas, base, tiling.side, tiling.patch),
        canvas=canvas, columns=grid.columns, rows=grid.rows,
    )  # fmt: skip


def base_box(size: Size, preprocess: Preprocess) -> Box:
    """Where the base view lies: around the picture, within it, or exactly on it."""
    width, height = size
    if preprocess.aspect == "pad":
        side = max(size)
        return Box(left=-((side - width) // 2) / width, top=-((side - height) // 2) / height, width=side / width, height=side / height)
    if preprocess.aspect == "square":
        long = int(preprocess.size * max(size) / min(size))
        start, share = (long - preprocess.size) // 2 / long, preprocess.size / long
        return Box(left=start, top=0, width=share, height=1) if width > height else Box(left=0, top=start, width=1, height=share)
    return Box(left=0, top=0, width=1, height=1)


def tile_boxes(size: Size, canvas: Size, side: int) -> tuple[Box, ...]:
    """The tiles, row by row."""
    place = partial(on_canvas, size, canvas)
    return tuple(place(x, y, side, side) for y in range(0, canvas[1], side) for x in range(0, canvas[0], side))


def on_canvas(size: Size, canvas: Size, x: int, y: int, width: int, height: int) -> Box:
    """A place on the canvas, in pixels, as a place on the picture that lies scaled on it."""
    left, top, across, down = placed(*size, canvas)
    return Box(left=(x - left) / across, top=(y - top) / down, width=width / across, height=height / down)


def patches(size: Size, grid: Grid, canvas: Size | None, base: Box, side: int, patch: int) -> tuple[Patches, ...]:
    """All patches of a picture that are tokens, in the order of ``model.merge``."""

    def view(box: Box) -> Patches:
        share = grid.view * patch / side  # a remainder below a patch is not seen
        seen = Box(left=box.left, top=box.top, width=box.width * share, height=box.height * share)
        return Patches(box=seen, columns=grid.view, rows=grid.view, class_token=grid.class_token)

    if canvas is None:
        return (view(base),)
    if grid.merge == "flat":
        return (view(base), *map(view, tile_boxes(size, canvas, side)))
    cell = side // grid.view
    x, y, columns, rows = grid.trim_x, grid.trim_y, grid.kept_columns, grid.kept_rows
    kept = on_canvas(size, canvas, x * cell, y * cell, columns * cell, rows * cell)
    return view(base), Patches(box=kept, columns=columns, rows=rows, row_ends=grid.merge == "spatial_unpad")
