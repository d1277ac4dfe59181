"""Engines over the tiny model, and readers of replies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from llavakit.assistant import Assistant
from llavakit.serve.engine import AssistantEngine
from llavakit.serve.job import Job, Prompt
from llavakit.serve.protocol import Ask, Detail, End, Piece
from llavakit.serve.reading import Part, reader_for
from llavakit.serve.room import Limits
from llavakit.serve.scheduler import Scheduler
from llavakit.types import Conversation, Image, Sampling

SMALL = Limits(running=4, waiting=64, kv_bytes=1 << 26, feature_bytes=1 << 22, request_bytes=1 << 28, chunk=24, chunk_alone=40, views=2)


def decided(folder: Path) -> Assistant:
    """A random model with scores far apart, so that rounding decides nothing."""
    made = Assistant.load(folder, device="cpu", dtype="fp32")
    with torch.no_grad():
        for weight in made.model.language_model.parameters():
            if weight.ndim == 2:
                weight.mul_(12)
    return made


def picture(seed: int, width: int = 40, height: int = 60) -> Image:
    return Image.of(PIL.Image.effect_mandelbrot((width, height), (-2 + seed / 9, -1.5, 1, 1.5), 30).convert("RGB"))


@dataclass
class Said:
    """A reply that has been read to its end."""

    text: str
    pieces: list[Piece]
    end: End


async def read(reply: Any) -> Said:
    pieces: list[Piece] = []
    async for item in reply:
        if isinstance(item, End):
            return Said("".join(piece.text for piece in pieces), pieces, item)
        pieces.append(item)
    raise AssertionError("a reply without an end")


async def said(engine: AssistantEngine, talk: Conversation, sampling: Sampling, detail: Detail = "auto") -> Said:
    return await read(await engine.submit(Ask(conversation=talk, sampling=sampling, detail=detail)))


@asynccontextmanager
async def engine_of(assistant: Assistant, limits: Limits = SMALL) -> AsyncIterator[AssistantEngine]:
    engine = AssistantEngine.start(assistant, model_id="tiny", limits=limits)
    try:
        yield engine
    finally:
        await asyncio.wait_for(engine.drain(0), 60)


class Steps:
    """A scheduler driven by hand, and what its reader was given."""

    def __init__(self, assistant: Assistant, limits: Limits = SMALL) -> None:
        self.assistant = assistant
        self.reader = reader_for(assistant.model)
        self.scheduler = Scheduler(assistant.model, self.reader, stop_ids=assistant.stop_ids, limits=limits)
        self.parts: list[list[int]] = []  # positions of every part, step by step
        read = self.reader.read

        def watched(parts: Sequence[Part]) -> Tensor:
            self.parts.append([part.count for part in parts])
            return read(parts)

        self.reader.read = watched  # type: ignore[method-assign]

    def job(self, talk: Conversation, sampling: Sampling) -> Job:
        """Asked, not yet begun."""
        inputs = self.assistant.processor.encode(talk, learn=False)
        prompt = Prompt(inputs, self.assistant.processor.image_token_id)
        job = Job(prompt, sampling, self.assistant.writer(sampling), wake=lambda: None, done=lambda job: None)
        self.scheduler.add(job)
        return job

    def finish(self) -> None:
        while self.scheduler.jobs:
            self.scheduler.step()

    def said(self, job: Job) -> Said:
        items = [job._mail.get_nowait() for _ in range(job._mail.qsize())]
        *pieces, end = items
        assert isinstance(end, End)
        return Said("".join(piece.text for piece in pieces if isinstance(piece, Piece)), pieces, end)  # type: ignore[arg-type]
