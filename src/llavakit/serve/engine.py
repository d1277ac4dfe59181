"""An assistant that replies to many at once: one thread owns the model, everybody asks it.

    submit --Door: is there room?--> encode (a few threads) --> inbox --> engine's thread: Scheduler.step, again and again
      |                                                                        |
      '--> Reply <---- pieces, through the reader's event loop ----------------'

What is refused is refused before a picture is decoded. A step is short (``scheduler``), so who cancels is rid of his reply a step later.
A greedy reply is the one that ``Assistant.reply`` gives, up to the rounding of the dtype: in float32 the same tokens; in bfloat16 they
differ where two tokens score within that rounding, for products of one row and of many round in another order.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from llavakit.assistant import Assistant
from llavakit.errors import ContextError, LlavaError, SamplingError
from llavakit.model.cpu import accelerate_cpu
from llavakit.model.generation import check_context, context_length
from llavakit.model.heap import keep_memory
from llavakit.model.teams import compute_alone, disband
from llavakit.processor import Processor
from llavakit.serve.job import Job, Prompt
from llavakit.serve.protocol import Ask, Detail, Stats
from llavakit.serve.reading import reader_for
from llavakit.serve.room import Door, Limits, busy, free_bytes
from llavakit.serve.scheduler import Scheduler
from llavakit.types import Pixels, Sampling

log = logging.getLogger(__name__)
_ENCODERS = 2  # threads that decode pictures and make views
_GLANCE = 0.02  # seconds between looks while draining


class AssistantEngine:
    """A ``protocol.Engine``. ``start`` makes one; ``drain`` ends it."""

    def __init__(
        self, assistant: Assistant, *, model_id: str, limits: Limits | None = None, chosen: Mapping[str, int] | None = None
    ) -> None:
        model = assistant.model
        if model.device.type == "cpu":
            keep_memory()
            _pack(assistant)
        reader = reader_for(model)
        fits = min(context_length(model), assistant.processor.max_length)
        self.limits = limits or Limits.fitting(reader.shape, context=fits, **chosen or {})
        self.model_id = model_id
        self.context = min(fits, reader.shape.positions_in(self.limits.kv_bytes))
        self.together = reader.packed
        self._assistant = assistant
        self._processors = _processors(assistant.processor)
        self._scheduler = Scheduler(model, reader, stop_ids=assistant.stop_ids, limits=self.limits)
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="llava-encode", initializer=compute_alone)
        self._lock = threading.Condition()
        self._door = Door(self.limits)
        self._inbox: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="llava-engine", daemon=True)

    @staticmethod
    def start(
        assistant: Assistant, *, model_id: str = "llava", limits: Limits | None = None, chosen: Mapping[str, int] | None = None
    ) -> AssistantEngine:
        """The assistant's model belongs to the engine from now on: nobody else may run it while replies are under way.

        Without ``limits`` they are what fits this machine, but for the ``chosen`` fields.
        """
        engine = AssistantEngine(assistant, model_id=model_id, limits=limits, chosen=chosen)
        disband()  # the engine's thread gathers its own
        engine._thread.start()
        return engine

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def check_room(self, coming: int = 0) -> None:
        """See ``protocol.Engine``."""
        with self._lock:
            self._door.check(coming)

    async def submit(self, ask: Ask) -> Job:
        """See ``protocol.Engine``."""
        if self._draining or not self.alive:
            raise busy("the server is about to stop", code="shutting_down", after=5)
        if ask.sampling.num_beams > 1:
            what = "beam search is not served"
            raise SamplingError(what, code="bad_parameter", where="num_beams", remedy="leave it out, or use `llava ask`")
        nbytes = self._weight(ask)
        with self._lock:
            self._door.enter(nbytes)
        try:
            prompt, sampling = await asyncio.get_running_loop().run_in_executor(self._encoders, self._encode, ask)
            job = self._job(prompt, sampling, nbytes)
            with self._lock:
                if self._stopping or not self.alive:
                    raise busy("the server is about to stop", code="shutting_down", after=5)
                self._jobs[job.id] = job
                self._inbox.append(job)
                self._lock.notify()
        except BaseException:
            with self._lock:
                self._door.leave(nbytes, served=False)
            raise
        return job

    def stats(self) -> Stats:
        scheduler, limits = self._scheduler, self.limits
        running, counts = len(scheduler.reading) + len(scheduler.writing), scheduler.counts
        return Stats(
            running=running,
            waiting=max(0, self._door.inside - running),
            kv_bytes=scheduler.kv_bytes,
            kv_limit=limits.kv_bytes,
            feature_bytes=scheduler.features.held,
            feature_limit=limits.feature_bytes,
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["cached"],
            reply_tokens=counts["reply"],
            finished=counts["stop"],
            cancelled=counts["cancelled"],
            failed=counts["error"],
            refused=self._door.refused,
            feature_hits=scheduler.features.hits,
            feature_misses=scheduler.features.misses,
            steps=counts["steps"],
        )

    async def drain(self, grace: float) -> None:
        """See ``protocol.Engine``."""
        self._draining = True
        end = time.monotonic() + grace
        while self._door.inside and self.alive and time.monotonic() < end:
            await asyncio.sleep(_GLANCE)
        with self._lock:
            self._stopping = True
            for job in self._jobs.values():
                job.cancelled = True
            self._lock.notify()
        while self.alive:
            await asyncio.sleep(_GLANCE)
        self._encoders.shutdown(wait=False, cancel_futures=True)

    # before the queue

    def _weight(self, ask: Ask) -> int:
        """Bytes that a request may hold: its pictures as they came and as views."""
        processor = self._processors[ask.detail]
        tiling = processor.tiling
        views = 1 + max((width * height // tiling.side**2 for width, height in tiling.canvases), default=0)
        total = 0
        for image in ask.conversation.images:
            source = image.source
            total += len(source.rgb) if isinstance(source, Pixels) else len(source) if isinstance(source, bytes) else 0
            total += views * 3 * tiling.side**2 * 4
        return total

    def _encode(self, ask: Ask) -> tuple[Prompt, Sampling]:
        processor = self._processors[ask.detail]
        new = 1 if ask.fitted else ask.sampling.max_new_tokens
        inputs = processor.encode(ask.conversation, learn=False, room=new)
        check_context(self._assistant.model, prompt=len(inputs.input_ids), new=new)
        if len(inputs.input_ids) + new > self.context:
            what = f"{len(inputs.input_ids)} prompt tokens and {new} new ones where the server has memory for {self.context}"
            raise ContextError(what, code="context_length_exceeded", where="max_tokens", remedy="shorten the conversation or the reply")
        fitting = min(ask.sampling.max_new_tokens, self.context - len(inputs.input_ids))
        return Prompt(inputs, processor.image_token_id), ask.sampling.but(max_new_tokens=fitting)

    def _job(self, prompt: Prompt, sampling: Sampling, nbytes: int) -> Job:
        writer = self._assistant.writer(sampling)
        return Job(prompt, sampling, writer, wake=self._wake, done=lambda job: self._left(job, nbytes))

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    def _left(self, job: Job, nbytes: int) -> None:
        with self._lock:
            self._jobs.pop(job.id, None)
            self._door.leave(nbytes, served=True)

    # the thread

    def _run(self) -> None:
        try:
            while self._take_in():
                self._scheduler.step()
        except BaseException:
            log.exception("the engine's thread has died")
        finally:
            self._end_all()

    def _take_in(self) -> bool:
        """Wait for something to do; False when there will be nothing more."""
        with self._lock:
            while not self._inbox and not self._scheduler.jobs:
                if self._stopping:
                    return False
                self._lock.wait()
            arrived, self._inbox = self._inbox, []
        for job in arrived:
            self._scheduler.add(job)
        return True

    def _end_all(self) -> None:
        with self._lock:
            self._stopping = True
            left = list(self._jobs.values())
        for job in left:
            job.end("error", LlavaError("the engine has stopped", code="engine_stopped", remedy="ask again when the server is back"))


def _processors(processor: Processor) -> dict[Detail, Processor]:
    """low: the base view alone. Where there is one view anyway it is the same processor, with the same views kept."""
    tiling = processor.tiling
    base = processor.using(tiling=replace(tiling, canvases=())) if tiling.canvases else processor
    return {"auto": processor, "high": processor, "low": base}


def _pack(assistant: Assistant) -> None:
    """Steps see many rows, which are faster with weights in oneDNN's layout: a copy, so only where a quarter of what is free is enough."""
    model = assistant.model
    language_model = model.language_model
    nbytes = sum(parameter.nbytes for parameter in language_model.parameters())
    if model.dtype == torch.bfloat16 and 4 * nbytes < free_bytes(model.device):
        accelerate_cpu(language_model, packed=(language_model,))
