"""From a conversation to what the model takes. The only place where a picture becomes image tokens.

    Conversation --Template--> segments --+--> ids     1 319 13563 ... 29901 | 32000 x 576 | 29871 13 ... 29901 | 450 ... 2
                                          +--> labels   .   .  .   ...   .   |  .      .   |  .    .  ...   .   | 450 ... 2
                 pictures --Preprocess----+--> views   (V, 3, S, S)          |<- Grid.tokens ->|                (. = IGNORED)

Ids are exactly those transformers gives for the same text, with one difference: special tokens are read only where the template wrote
them. A ``</s>`` or ``<image>`` typed by a person is spelled out in ordinary pieces. The words before a reply are also encoded on their
own; should the tokenizer join them with the reply's first characters, the reply is encoded apart, so that the ids of a prompt for
inference are always the beginning of the ids that were trained on.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from llavakit import processor_files
from llavakit.errors import CheckpointError, ContextError, ImageError, PromptError
from llavakit.images import LIMITS, Limits, image_size, open_image, read_bytes
from llavakit.pieces import Pieces
from llavakit.preprocess import Floats, Preprocess
from llavakit.prompts import Segment, Template
from llavakit.tiling import Grid, Tiling
from llavakit.types import Conversation, Image, Pixels

T = TypeVar("T")
Known = Callable[[str], Tensor | None]
IGNORED = -100
CACHE_BYTES = 1 << 26


@dataclass(frozen=True)
class Kept:
    """A picture whose features a store keeps: its name there, and whether they are in ``features``; if not, its views are in ``views``."""

    name: str
    known: bool


@dataclass(frozen=True)
class Inputs:
    """One example: input_ids (T), unshifted labels (T, IGNORED where nothing is learned), views (V, 3, S, S), a grid for each picture.

    With a store of features (V, P, D) those that it knows stand in the place of views.
    """

    input_ids: Tensor
    labels: Tensor
    views: Tensor
    grids: tuple[Grid, ...]
    kept: tuple[Kept, ...] = ()
    features: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Examples padded to one length: ids, labels, mask, positions (B, T); the views of all (sum V, 3, S, S) and their grids, in order.

    Or examples packed into one row, B = 1: ``segments`` are their lengths, positions begin anew in each, and none sees another.
    Of pictures that a store keeps (``kept``), the known ones' ``features`` (sum V, P, D) stand in the place of their views.
    """

    input_ids: Tensor
    labels: Tensor
    mask: Tensor
    positions: Tensor
    views: Tensor
    grids: tuple[Grid, ...]
    segments: tuple[int, ...] = ()
    kept: tuple[Kept, ...] = ()
    features: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The same on a device; ``dtype`` is that of the views."""
        ids, labels, mask, positions = (t.to(device) for t in (self.input_ids, self.labels, self.mask, self.positions))
        features = None if self.features is None else self.features.to(device)
        return Batch(ids, labels, mask, positions, self.views.to(device, dtype), self.grids, self.segments, self.kept, features)


class Processor:
    """Tokenizer, template and preprocessing as one. ``max_length`` bounds the ids of a conversation, image tokens included.

    ``image_pieces`` "hf": a picture interrupts the text as in transformers. "original": the text after a picture is tokenised as if it
    stood alone, with the tokenizer's blank in front (spec 3.3). Tokenizers that put the blank before every piece (Vicuna's) give the same.
    ``draft``: large JPEG photographs are decoded at a half, quarter or eighth of their size where no view needs more.
    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        template: Template,
        preprocess: Preprocess,
        tiling: Tiling,
        image_token: str = "<image>",
        max_length: int,
        image_pieces: Literal["hf", "original"] = "hf",
        limits: Limits = LIMITS,
        draft: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.tiling = tiling
        self.image_token = image_token
        self.max_length = max_length
        self.image_pieces = image_pieces
        self.limits = limits
        self.draft = draft
        assert preprocess.size == tiling.side, f"views of {preprocess.size} pixels for tiles of {tiling.side}"
        self._pieces = Pieces(tokenizer, image_token)
        self.template = self._pieces.known_end(template)
        self.cache = ViewCache(cache_bytes)
        if image_token not in self._pieces.controls:
            raise CheckpointError(
                f"the tokenizer has no special token {image_token}",
                code="image_token_missing",
                remedy="add it to the tokenizer and a row to the embeddings",
            )
        self.image_token_id: int = self._pieces.controls[image_token]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end a reply."""
        end = self._pieces.controls.get(self.template.end)
        return frozenset(token for token in (end, self.tokenizer.eos_token_id) if token is not None)

    def encode(self, conversation: Conversation, *, learn: bool, begun: bool = False, room: int = 0, known: Known | None = None) -> Inputs:
        """One example. ``learn``: a closed conversation with the labels of its replies; otherwise an open one, to be answered.

        ``begun``: the last reply goes on: the ids that would be learned from it, up to its last character; labels as if they were.
        ``room``: tokens that must remain free for the reply. ``known``: features by a picture's digest; where it has some, no view is
        made. Raises PromptError, ImageError, and ContextError (code context_length_exceeded) before any picture is decoded; nothing is
        ever cut.
        """
        replied = learn or begun
        if conversation.open is replied and conversation.turns:
            raise _wrong_end(conversation, replied)
        ids: list[int] = []
        labels: list[int] = []
        grids = self._grids(conversation.images)
        for new, learned in self._encoded(self.template.render(conversation, begun=begun), grids):
            ids += new
            labels += new if learned and replied else [IGNORED] * len(new)
        self._check_length(len(ids), sum(grid.tokens for grid in grids), room)
        kept, features = ((), ()) if known is None else self._kept(conversation.images, known)
        unknown = [place for place in range(len(grids)) if not kept or not kept[place].known]
        views = self._views(conversation.images, grids, unknown, keep=not learn)
        return Inputs(
            torch.tensor(ids, dtype=torch.long), torch.tensor(labels, dtype=torch.long), views, grids, kept,
            torch.cat(features) if features else None,
        )  # fmt: skip

    def count(self, conversation: Conversation) -> tuple[int, int]:
        """How many tokens a closed conversation takes and how many of them are learned. Of pictures the size is read; no limit holds."""
        grids = self._grids(conversation.images)
        runs = [(len(new), learned) for new, learned in self._encoded(self.template.render(conversation), grids)]
        return sum(length for length, _ in runs), sum(length for length, learned in runs if learned)

    def _grids(self, images: Sequence[Image]) -> tuple[Grid, ...]:
        """How each picture will be cut. Without canvases its size does not matter, and nothing is read."""
        if not self.tiling.canvases:
            return (self.tiling.grid(1, 1),) * len(images)
        return tuple(self.tiling.grid(*_told(index, image, partial(image_size, image, self.limits))) for index, image in enumerate(images))

    def _encoded(self, segments: Iterable[Segment], grids: Sequence[Grid]) -> Iterator[tuple[list[int], bool]]:
        """(ids, learned) in order. Words are gathered up to the next special token and encoded together."""
        yield self._pieces.head, False
        words: list[tuple[str, bool]] = []
        first = True
        pictured = iter(grids)
        for segment in segments:
            for text, tokens in self._atoms(segment, pictured):
                if tokens:
                    yield from self._pieces.encode(words, first=first)
                    yield tokens, segment.learned
                    words, first = [], segment.kind == "image" and self.image_pieces == "original"
                elif words and words[-1][1] is segment.learned:
                    words[-1] = (words[-1][0] + text, segment.learned)
                else:
                    words.append((text, segment.learned))
        yield from self._pieces.encode(words, first=first)

    def _atoms(self, segment: Segment, grids: Iterator[Grid]) -> Iterator[tuple[str, list[int]]]:
        """A segment as words (no ids yet) and special tokens (their ids)."""
        if segment.kind == "image":
            yield segment.text, [self.image_token_id] * next(grids).tokens
        elif segment.kind == "text":
            yield segment.text, []
        else:
            for text in self._pieces.split(segment.text):
                known = self._pieces.controls.get(text)
                yield text, [] if known is None else [known]

    def _check_length(self, count: int, pictured: int, room: int) -> None:
        if count + room > self.max_length:
            asked = f" and {room} for the reply" if room else ""
            raise ContextError(
                f"{count} tokens ({pictured} of them for pictures){asked} where {self.max_length} fit",
                code="context_length_exceeded",
                where="conversation",
                remedy="shorten it, send fewer pictures, or ask for a shorter reply",
            )

    def _kept(self, images: Sequence[Image], known: Known) -> tuple[tuple[Kept, ...], list[Tensor]]:
        """Each picture's name in a store of features, and the features that it has of them."""
        names = [_told(index, image, partial(digest, image, self.limits)) for index, image in enumerate(images)]
        found = [known(name) for name in names]
        kept = tuple(Kept(name, features is not None) for name, features in zip(names, found, strict=True))
        return kept, [features for features in found if features is not None]

    def _views(self, images: Sequence[Image], grids: Sequence[Grid], wanted: Sequence[int], *, keep: bool) -> Tensor:
        """Of the wanted pictures, (sum V, 3, S, S). What is asked about is likely to be asked about again, so views are kept; training
        goes on to others."""
        made: list[Floats] = []
        for index in wanted:
            image, grid = images[index], grids[index]
            make = partial(self._make_views, image)
            made.append(_told(index, image, partial(self.cache.get, digest(image, self.limits), make) if keep else make))
            assert len(made[-1]) == grid.views, f"{len(made[-1])} views for {grid}"
        size = self.preprocess.size
        return torch.from_numpy(np.concatenate(made)) if made else torch.zeros(0, 3, size, size)

    def _make_views(self, image: Image) -> Floats:
        if not self.draft:
            opened = open_image(image, self.limits)
            return self.preprocess.views(opened, self.tiling.canvas(*opened.size))
        size = image_size(image, self.limits)
        canvas = self.tiling.canvas(*size)
        opened = open_image(image, self.limits, least=self.preprocess.least(size, canvas))
        return self.preprocess.views(opened, canvas, true_size=size)

    def collate(self, inputs: Sequence[Inputs], *, side: Literal["left", "right"]) -> Batch:
        """Pad to the longest: "right" for training, "left" for generation, where all rows must end together."""
        length = max(len(one.input_ids) for one in inputs)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(inputs), length), 0 if pad is None else pad)
        labels = torch.full_like(ids, IGNORED)
        positions = torch.zeros_like(ids)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, one in enumerate(inputs):
            count = len(one.input_ids)
            place = slice(0, count) if side == "right" else slice(length - count, length)
            ids[row, place], labels[row, place] = one.input_ids, one.labels
            positions[row, place], mask[row, place] = torch.arange(count), True
        return Batch(ids, labels, mask, positions, **_pictures(inputs))

    def pack(self, inputs: Sequence[Inputs]) -> Batch:
        """Examples behind one another in one row, nothing padded. What stands first in an example is predicted from nothing: no label."""
        ids = torch.cat([one.input_ids for one in inputs])[None]
        labels = torch.cat([one.labels for one in inputs])[None].clone()
        segments = tuple(len(one.input_ids) for one in inputs)
        labels[0, [0, *accumulate(segments[:-1])]] = IGNORED
        positions = torch.cat([torch.arange(length) for length in segments])[None]
        return Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), positions, segments=segments, **_pictures(inputs))

    def decode(self, ids: Sequence[int] | Tensor, *, special: bool = False) -> str:
        """The text of some ids; special tokens are left out unless asked for."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def save(self, folder: Path) -> None:
        """Write the files transformers' AutoProcessor loads: tokenizer, chat_template.jinja, processor and preprocessor config."""
        processor_files.write(
            folder,
            tokenizer=self.tokenizer,
            template=self.template,
            preprocess=self.preprocess,
            max_length=self.max_length,
            values={
                "image_token": self.image_token,
                "patch_size": self.tiling.patch,
                "vision_feature_select_strategy": "full" if self.tiling.class_token else "default",
                "num_additional_image_tokens": 1,
                **({} if self.image_pieces == "hf" else {"image_pieces": self.image_pieces}),
            },
            canvases=self.tiling.canvases,
        )

    def using(self, template: Template | None = None, *, tiling: Tiling | None = None) -> Processor:
        """The same with another prompt format or another rule of cutting pictures."""
        return Processor(
            tokenizer=self.tokenizer,
            template=template or self.template,
            preprocess=self.preprocess,
            tiling=tiling or self.tiling,
            image_token=self.image_token,
            max_length=self.max_length,
            image_pieces=self.image_pieces,
            limits=self.limits,
            draft=self.draft,
        )

    @staticmethod
    def load(folder: Path, *, template: Template | None = None, max_length: int | None = None) -> Processor:
        """From a llava-hf folder, ours or published. The template is the one whose text the folder's chat template renders.

        Without a chat template it is llava_hf, the prompt documented for such checkpoints. Raises CheckpointError.
        """
        tokenizer = processor_files.tokenizer(folder)
        files = processor_files.Files.read(folder)
        return Processor(
            tokenizer=tokenizer,
            template=template or files.template(tokenizer),
            preprocess=Preprocess.from_hf(files.preprocessor),
            tiling=files.tiling,
            image_token=files.image_token,
            max_length=max_length or files.max_length(tokenizer),
            image_pieces=files.image_pieces,
        )


class ViewCache:
    """Recently made views, bounded in bytes, least recently used out first. Safe between threads.

    Keys are digests of the picture's own bytes, so that no client can name another's picture (hardening I18).
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0
        self._views: OrderedDict[str, Floats] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], Floats]) -> Floats:
        """The views under ``key``, made by ``make`` if they are not held. The array is read-only."""
        with self._lock:
            if key in self._views:
                self._views.move_to_end(key)
                return self._views[key]
        views = make()
        views.flags.writeable = False
        with self._lock:
            if key not in self._views and views.nbytes <= self.max_bytes:
                self._views[key] = views
                self.held += views.nbytes
            while self.held > self.max_bytes:
                self.held -= self._views.popitem(last=False)[1].nbytes
        return views

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy sent to another process begins empty."""
        return ViewCache, (self.max_bytes,)


def digest(image: Image, limits: Limits = LIMITS) -> str:
    """A digest of the picture's content: its encoded bytes, or its pixels with their shape."""
    shape = f"{image.source.width}x{image.source.height}" if isinstance(image.source, Pixels) else "file"
    return hashlib.blake2b(read_bytes(image, limits), digest_size=20, person=b"views", salt=shape.encode()[:16]).hexdigest()


def _pictures(inputs: Sequence[Inputs]) -> dict[str, Any]:
    """What the examples hold of pictures, in order."""
    features = [one.features for one in inputs if one.features is not None]
    return {
        "views": torch.cat([one.views for one in inputs]),
        "grids": tuple(grid for one in inputs for grid in one.grids),
        "kept": tuple(kept for one in inputs for kept in one.kept),
        "features": torch.cat(features) if features else None,
    }


def _told(index: int, image: Image, read: Callable[[], T]) -> T:
    """``read()``; an error about a picture that has no name of its own says which of the conversation it is."""
    try:
        return read()
    except ImageError as error:
        where = error.where if isinstance(image.source, Path) else f"images[{index}]"
        raise ImageError(error.what, code=error.code, where=where, remedy=error.remedy) from error


def _wrong_end(conversation: Conversation, replied: bool) -> PromptError:
    where = f"messages[{len(conversation.messages) - 1}]"
    if replied:
        what = "there is no reply to learn or to go on with"
        return PromptError(what, code="no_reply", where=where, remedy="end with an assistant message")
    return PromptError("there is nothing to answer", code="no_question", where=where, remedy="end with a user message")
