"""One reply from its prompt to its end, as the engine's thread sees it and as the one who asked does.

    waiting -> admitted: its pictures are seen -> its prompt is read, chunk by chunk -> it is written, token by token -> over

The engine's thread writes, whoever asked reads: pieces cross over through the event loop of the reader, who may be slow; at most a reply's
worth of pieces waits for him. ``cancel`` only leaves a mark, which the thread heeds at its next step.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import torch
from torch import Tensor

from llavakit.assistant import position_keys
from llavakit.errors import LlavaError
from llavakit.model.generation import new_generator
from llavakit.processor import Inputs
from llavakit.serve.features import Picture, pictures_of
from llavakit.serve.protocol import End, Finish, Piece
from llavakit.text_stream import TextStream
from llavakit.types import Sampling


class Prompt:
    """An encoded conversation: ids, what stands at each position, and pictures."""

    def __init__(self, inputs: Inputs, image_token_id: int) -> None:
        self.ids = inputs.input_ids
        self.keys = position_keys(inputs, image_token_id)
        self.pictures = list(pictures_of(self.keys, inputs.views, inputs.grids))
        self.image_tokens = sum(picture.grid.tokens for picture in self.pictures)


class Job:
    """A ``protocol.Reply``. What has no underscore and is not of the protocol belongs to the engine's thread."""

    def __init__(
        self, prompt: Prompt, sampling: Sampling, writer: TextStream, *, wake: Callable[[], None], done: Callable[[Job], None]
    ) -> None:
        """Made in the event loop of whoever reads it, if there is one. done: called once, in the engine's thread."""
        self.id = uuid.uuid4().hex
        self.prompt_tokens, self.image_tokens = len(prompt.ids), prompt.image_tokens
        self.keys, self.pictures = prompt.keys, prompt.pictures
        self.sampling = sampling
        self.generator = new_generator(sampling.seed)
        self.memory: Any = None
        self.cached = 0
        self.asked_from: int | None = None  # the tower was asked for the pictures from this position on
        self.follows: tuple[Job, int] | None = None  # an older one who is about to read as many of these positions
        self.taken: list[int] = []
        self.cancelled = False
        self.over = False
        self._ids = prompt.ids
        self._writer = writer
        self._unsaid = 0  # tokens read since the last piece
        self._wake, self._done = wake, done
        self._mail: asyncio.Queue[Piece | End] = asyncio.Queue()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None

    # whoever asked

    async def __aiter__(self) -> AsyncIterator[Piece | End]:
        while True:
            item = await self._mail.get()
            yield item
            if isinstance(item, End):
                return

    def cancel(self) -> None:
        self.cancelled = True
        self._wake()

    # the engine's thread

    @property
    def most(self) -> int:
        """Positions it may take at most; its last token is never read."""
        return self.prompt_tokens + self.sampling.max_new_tokens

    @property
    def read(self) -> int:
        """Positions read."""
        return 0 if self.memory is None else int(self.memory.length)

    @property
    def left(self) -> int:
        """Positions of the prompt that are not read yet."""
        return self.prompt_tokens - self.read

    @property
    def all_keys(self) -> list[int | bytes]:
        return [*self.keys, *self.taken]

    def sees(self, key: bytes, rows: Tensor) -> None:
        """The tower has seen a picture."""
        for picture in self.pictures:
            if picture.key == key:
                picture.rows, picture.views = rows, None

    def unseen(self, start: int) -> list[Picture]:
        """The pictures from position ``start`` on whose rows are not known."""
        return [picture for picture in self.pictures if picture.start >= start and picture.rows is None]

    def embeddings(self, table: torch.nn.Embedding, count: int) -> Tensor:
        """Of the next ``count`` positions of the prompt (count, H), pictures in their places."""
        start = self.read
        ids = self._ids[start : start + count].to(table.weight.device)
        rows: Tensor = table(ids)
        for picture in self.pictures:
            first, last = max(picture.start, start), min(picture.end, start + count)
            if first < last:
                assert picture.rows is not None, "a picture that nobody has seen"
                rows[first - start : last - start] = picture.rows[first - picture.start : last - picture.start].to(rows.dtype)
        return rows

    def take(self, token: int) -> Finish | None:
        """Write a chosen token; how the reply ends if it does."""
        self.taken.append(token)
        self._unsaid += 1
        self._say(self._writer.push(token))
        if self._writer.stopped:
            return "stop"
        return "length" if len(self.taken) == self.sampling.max_new_tokens else None

    def end(self, finish: Finish, error: LlavaError | None = None) -> None:
        """Nothing comes after this."""
        if self.over:
            return
        self.over = True
        if error is None:
            self._say(self._writer.finish())
            if finish == "length" and self._writer.stopped:  # the last characters made a stop string
                finish = "stop"
        self.pictures = []
        counts = {"prompt_tokens": self.prompt_tokens, "reply_tokens": len(self.taken), "cached_tokens": self.cached}
        self._done(self)  # first: who has read the end finds the place free
        self._post(End(finish=finish, error=error, **counts))

    def _say(self, text: str) -> None:
        if text:
            self._post(Piece(text=text, tokens=self._unsaid))
            self._unsaid = 0

    def _post(self, item: Piece | End) -> None:
        if self._loop is None:
            self._mail.put_nowait(item)
            return
        try:
            self._loop.call_soon_threadsafe(self._mail.put_nowait, item)
        except RuntimeError:  # its loop is closed: nobody will read
            self.cancelled = True
