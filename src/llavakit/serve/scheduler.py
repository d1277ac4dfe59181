"""Who is read and written in a step, and what may be remembered. One thread's affair: nothing here waits or locks.

    waiting --first come, first served; a place, and room for prompt and reply--> reading --prompt read--> writing --> over
                                                                                                              memory to Prefixes

A step gives every reply its next token and spends a bounded amount of work, counted in tokens (``room.Pace``), on those who are not
written to yet: first on the tower, what is left on prompts. Half of that goes to the oldest, the rest to whoever has least left: nobody
starves, and a short question passes a long one. Who would read what an older one is just reading waits for it and takes it from there.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from llavakit.assistant import common_prefix
from llavakit.errors import LlavaError
from llavakit.model import generation
from llavakit.model.llava import Llava
from llavakit.serve.features import Features, Tower
from llavakit.serve.job import Job
from llavakit.serve.memory import Memory
from llavakit.serve.prefix import Prefixes
from llavakit.serve.protocol import Finish
from llavakit.serve.reading import Part, Reader
from llavakit.serve.room import Limits, Pace

log = logging.getLogger(__name__)


class Scheduler:
    """All replies under way."""

    def __init__(self, model: Llava, reader: Reader, *, stop_ids: frozenset[int], limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Job] = deque()
        self.reading: list[Job] = []  # the oldest first
        self.writing: list[Job] = []
        self.reserved = 0  # bytes of memories, as they may become
        self.features = Features(limits.feature_bytes)
        self.prefixes = Prefixes()
        self.tower = Tower(model, self.features, at_once=limits.views)
        self.counts = dict.fromkeys(("prompt", "cached", "reply", "stop", "cancelled", "error", "steps"), 0)
        self._pace = Pace(limits)
        self._reader = reader
        self._model = model
        self._stop_ids = stop_ids

    @property
    def jobs(self) -> list[Job]:
        return [*self.writing, *self.reading, *self.waiting]

    @property
    def kv_bytes(self) -> int:
        """What memories hold and may come to hold."""
        return self.reserved + self.prefixes.held

    def add(self, job: Job) -> None:
        self.waiting.append(job)

    @torch.inference_mode()
    def step(self) -> None:
        """One step for everyone. What goes wrong is told to those it concerns."""
        self.counts["steps"] += 1
        for job in [job for job in self.jobs if job.cancelled]:
            self._over(job, "cancelled")
        self._admit()
        self._prepare_all()
        start = time.monotonic()
        budget = self._pace.budget(alone=not self.writing)
        seen = self._look(budget)
        read = self._read(max(budget - seen, budget / 4))
        self._pace.took(seen + read, time.monotonic() - start)

    def fail(self, jobs: list[Job], error: BaseException) -> None:
        """End these with an error; what they had read is forgotten, for it may be half written."""
        memory_full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)
        if memory_full:
            self.prefixes.shrink(0)
            self.features.clear()
        told = error if isinstance(error, LlavaError) else _told(error, memory_full)
        if told is not error:
            log.error("%d replies failed", len(jobs), exc_info=error)
        for job in jobs:
            self._over(job, "error", told)

    # who comes in

    def _admit(self) -> None:
        limits = self.limits
        while self.waiting and len(self.reading) + len(self.writing) < limits.running:
            need = self._reader.shape.bytes_for(self.waiting[0].most)
            if self.reserved + need > limits.kv_bytes:
                return
            job = self.waiting.popleft()
            self.reserved += need
            self.reading.append(job)
            soon = self.prefixes.spare(self.prefixes.find(job.keys))  # what it continues is counted twice until it is taken over
            self.prefixes.shrink(limits.kv_bytes - self.reserved + soon)

    def _prepare_all(self) -> None:
        for job in list(self.reading):
            try:
                self._prepare(job)
            except Exception as error:
                self.fail([job], error)

    def _prepare(self, job: Job) -> None:
        """Give a job its memory, as soon as the pictures that it must read are seen and nobody older is just reading the same."""
        if job.memory is not None or self._waits(job):
            return
        found = self.prefixes.find(job.keys, self._live())
        job.follows = self._ahead(job, found.length)
        if job.follows is not None:
            return
        job.asked_from = found.length
        for picture in job.unseen(found.length):
            if (rows := self.features.get(picture.key)) is not None:
                job.sees(picture.key, rows)
            else:
                self.tower.ask(picture, job)
        if job.unseen(found.length):
            return
        if found.memory is None:
            job.memory = self._reader.new_memory(most=job.most, now=job.prompt_tokens)
        else:
            job.memory = self.prefixes.begin(found, prompt=job.prompt_tokens, most=job.most)
        self.prefixes.shrink(self.limits.kv_bytes - self.reserved)
        job.cached = found.length
        self.counts["prompt"] += job.prompt_tokens
        self.counts["cached"] += job.cached

    @staticmethod
    def _waits(job: Job) -> bool:
        """For the tower, or for an older one."""
        if job.follows is not None:
            older, length = job.follows
            return not older.over and older.read < length
        return job.asked_from is not None and bool(job.unseen(job.asked_from))

    def _live(self) -> Iterator[tuple[list[int | bytes], Memory]]:
        if self._reader.packed:
            yield from ((job.all_keys, job.memory) for job in (*self.reading, *self.writing) if job.memory is not None)

    def _ahead(self, job: Job, known: int) -> tuple[Job, int] | None:
        """The older one, and how many positions, if he will soon have read much more of this prompt than is known now."""
        best: tuple[Job, int] | None = None
        least = known + self.limits.chunk // 2
        for older in self.reading if self._reader.packed else ():
            if older is job:
                break
            if (length := common_prefix(older.keys, job.keys)) > least:
                best, least = (older, length), length
        return best

    # the tower

    def _look(self, budget: float) -> float:
        """Let the tower work: half of the step if there are prompts to read. Returns what it spent."""
        if not self.tower.busy:
            return 0
        try:
            spent = self.tower.run(budget / 2 if any(job.memory is not None for job in self.reading) else budget)
        except Exception as error:
            self.fail(self.tower.take_failed(), error)
            return 0
        self._prepare_all()
        return spent

    # the language model

    def _read(self, budget: float) -> int:
        """A token for everyone who is being written to, a chunk of prompts. Returns how many positions of prompts."""
        shares = self._shares(int(budget))
        jobs = [*self.writing, *(job for job, _ in shares)]
        if not jobs:
            return 0
        try:
            scores = self._reader.read(self._parts(shares))
        except Exception as error:
            self.fail(jobs, error)
            return 0
        ends = [place for place, job in enumerate(jobs) if job.left <= 0]
        for job, _ in shares:
            if job.left == 0:
                self.reading.remove(job)
                self.writing.append(job)
                job.pictures = []  # their rows may be forgotten now
        if ends:
            self._choose([jobs[place] for place in ends], scores[ends])
        return sum(count for _, count in shares)

    def _shares(self, budget: int) -> list[tuple[Job, int]]:
        """How many positions of whose prompts are read now."""
        ready = [job for job in self.reading if job.memory is not None]
        shares: dict[int, int] = {}
        for job in ready[:1]:
            shares[0] = min(job.left, max(1, budget // 2))
            budget -= shares[0]
        for place in sorted(range(len(ready)), key=lambda place: (ready[place].left - shares.get(place, 0), place)):
            more = min(ready[place].left - shares.get(place, 0), budget)
            if more > 0:
                shares[place] = shares.get(place, 0) + more
                budget -= more
        return [(ready[place], count) for place, count in shares.items()]

    def _parts(self, shares: list[tuple[Job, int]]) -> list[Part]:
        table = self._model.language_model.get_input_embeddings()
        tokens = torch.tensor([job.taken[-1] for job in self.writing], dtype=torch.long, device=self._model.device)
        rows = table(tokens)
        written = [Part(job.memory, rows[place : place + 1]) for place, job in enumerate(self.writing)]
        return [*written, *(Part(job.memory, job.embeddings(table, count)) for job, count in shares)]

    def _choose(self, jobs: list[Job], scores: Tensor) -> None:
        highest, at = scores.max(-1)  # NaN if one of them is
        best, sound = at.tolist(), highest.isfinite().tolist()
        for place, job in enumerate(jobs):
            try:
                if not sound[place]:
                    raise ArithmeticError("the scores are not finite")
                self.counts["reply"] += 1
                token = best[place] if job.sampling.temperature == 0 else self._drawn(job, scores[place])
                finish = "stop" if token in self._stop_ids else job.take(token)
            except Exception as error:
                self.fail([job], error)
                continue
            if finish is not None:
                self._over(job, finish)  # type: ignore[arg-type]

    def _drawn(self, job: Job, scores: Tensor) -> int:
        return int(generation.sample(scores[None], job.sampling, [job.generator]))

    # who leaves

    def _over(self, job: Job, finish: Finish, error: LlavaError | None = None) -> None:
        """Free its place; keep what it has read."""
        if job.over:
            return
        for where in (self.waiting, self.reading, self.writing):
            if job in where:
                where.remove(job)
                if where is not self.waiting:
                    self.reserved -= self._reader.shape.bytes_for(job.most)
        self.tower.leave(job)
        memory, job.memory = job.memory, None
        if memory is not None and error is None and self._reader.packed:
            self.prefixes.put(job.all_keys, memory)
            self.prefixes.shrink(self.limits.kv_bytes - self.reserved)
        self.counts[finish if finish in ("cancelled", "error") else "stop"] += 1
        job.end(finish, error)


def _told(error: BaseException, memory_full: bool) -> LlavaError:
    if memory_full:
        return LlavaError("the server ran out of memory", code="out_of_memory", remedy="ask again, for less at a time")
    return LlavaError(f"the model failed ({type(error).__name__})", code="engine_error", remedy="ask again; the server's log says more")
