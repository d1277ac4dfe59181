"""The geometry of one image: which views it is cut into and how many tokens of the language model it takes. Integers only.

    image --(images.Preprocess)--> view, S x S pixels --(tower)--> (S // patch) x (S // patch) features --> one token each

               S = 336                        one patch = 14 x 14 pixels
        +-------------------+
        | . . . . . . . . . |                 24 x 24 = 576 tokens      (LLaVA-1.5, spec 2.7)
        | . . . . . . . . . |   24 patches    16 x 16 = 256 tokens      (LLaVA v1: S = 224)
        | . . . . . . . . . |
        +-------------------+                 the tower's class feature is dropped unless ``class_token`` keeps it (577)

Whoever needs the number of an image's tokens asks its ``Grid``: the processor that writes the placeholders, the model that fills them,
packing, budgets and the server.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The views of one image: ``view`` patches along a side of the square view, and whether the class feature is kept."""

    view: int
    class_token: bool = False

    def __post_init__(self) -> None:
        assert self.view > 0, f"a view of {self.view} patches"

    @staticmethod
    def single(size: int = 336, patch: int = 14, *, class_token: bool = False) -> Grid:
        """One view of ``size`` x ``size`` pixels, whatever the image's shape (LLaVA v1 and 1.5). A remainder below a patch is not seen."""
        return Grid(view=size // patch, class_token=class_token)

    @property
    def views(self) -> int:
        """How many pictures the tower sees."""
        return 1

    @property
    def tokens(self) -> int:
        """How many positions of the language model the image takes."""
        return self.view * self.view + int(self.class_token)
