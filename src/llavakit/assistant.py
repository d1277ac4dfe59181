"""Our own model as a responder: one question, a batch of them, or a session that remembers what it has read.

    Conversation -> Processor.encode -> Inputs -> Batch -> model.generation -> token ids -> TextStream -> pieces of text

A session keeps the keys and values of everything read. A new turn encodes the whole conversation again (cheap), compares it with what
was read, and reads only what differs: a longer conversation re-reads nothing, an edited one keeps the part before the edit. Pictures
count as equal when their pixels are, so an exchanged picture is never mistaken for the old one although its token ids are the same.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from llavakit.checkpoint import places, store
from llavakit.checkpoint.spread import DeviceMap, spread
from llavakit.model.cpu import accelerate_cpu
from llavakit.model.generation import Past, check_context, generate, stream
from llavakit.model.llava import Llava
from llavakit.model.quantize import Quantization
from llavakit.model.teams import disband
from llavakit.processor import IGNORED, Batch, Inputs, Processor
from llavakit.prompts import Template
from llavakit.text_stream import TextStream, finished_text, held_ids, text_behind
from llavakit.types import Conversation, Sampling, assistant

GREEDY = Sampling()


class Assistant:
    """A model and its processor, ready to reply. A ``responder.Responder``."""

    def __init__(self, model: Llava, processor: Processor, *, commit: str | None = None) -> None:
        """commit: what the Hub's files were, so that an answer can be repeated; None for a folder."""
        self.model = model.eval()
        self.commit = commit
        self.processor = processor
        self.stop_ids = frozenset(processor.stop_ids)
        added = processor.tokenizer.added_tokens_decoder
        self._held = held_ids(processor.tokenizer.get_vocab(), [number for number, token in added.items() if token.special])

    @staticmethod
    def load(
        path: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        allow_pickle: bool = False,
        revision: str | None = None,
        draft: bool = False,
        quantization: Quantization | None = None,
        base: str | Path | None = None,
        tower: str | Path | None = None,
        template: Template | None = None,
        device_map: DeviceMap | None = None,
    ) -> Assistant:
        """From a checkpoint folder, the name of a built-in model or a Hub id (``places.find``); without a path, the built-in miniature.

        dtype: "auto" takes the stored one, or one the processor is fast in (``store.choose_dtype``). device: CUDA if there is one.
        draft: see ``Processor``. quantization, base, tower: see ``store.load``; the last two may be names like ``path``.
        template: another prompt format than the checkpoint's. device_map: several devices (``checkpoint.spread``), in place of ``device``.
        On a CPU the fast paths of ``model/cpu.py`` are switched on. Raises CheckpointError.
        """
        if device_map is not None:
            device = "cpu"  # where it is read; what follows moves it
        device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
        folder = places.find(path, revision=revision, allow_pickle=allow_pickle)
        below, seen = (None if name is None else places.find(name, allow_pickle=allow_pickle) for name in (base, tower))
        model, processor = store.load(
            folder,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            quantization=quantization,
            base=below,
            tower=seen,
            template=template,
        )
        processor.draft = draft
        if device_map is not None:
            spread(model, device_map)
        elif device.type == "cpu":
            accelerate_cpu(model, packed=(model.vision_tower, model.multi_modal_projector))
        disband()  # whoever computes next, in whatever thread, is alone with his team
        return Assistant(model, processor, commit=places.commit_of(folder))

    def reply(self, conversation: Conversation, sampling: Sampling = GREEDY, *, begun: bool = False) -> Iterator[str]:
        """The reply, piece by piece; beam search has one piece. What is wrong with the question is raised before the first piece.

        ``begun``: the conversation ends with a reply that goes on; what comes is the rest of it, the blank in front included.
        Raises PromptError (``no_question``, ``no_reply``, ``empty_prompt``), ContextError (``context_length_exceeded``), ImageError.
        """
        inputs = self.encode(conversation, sampling, begun=begun)
        return self._pieces(self._batch([inputs]), sampling, None, said=_said(inputs))

    def reply_batch(self, conversations: Sequence[Conversation], sampling: Sampling = GREEDY, *, begun: bool = False) -> list[str]:
        """The replies to all, computed together: the same as ``"".join(reply(...))`` of each, up to the rounding of the dtype."""
        return self.reply_encoded([self.encode(conversation, sampling, begun=begun) for conversation in conversations], sampling)

    def encode(self, conversation: Conversation, sampling: Sampling = GREEDY, *, begun: bool = False) -> Inputs:
        """A question made ready, on the CPU; safe in a thread beside the model. Raises what ``reply`` raises."""
        inputs = self.processor.encode(conversation, learn=False, begun=begun, room=sampling.max_new_tokens)
        check_context(self.model, prompt=len(inputs.input_ids), new=sampling.max_new_tokens)
        return inputs

    def reply_encoded(self, encoded: Sequence[Inputs], sampling: Sampling = GREEDY) -> list[str]:
        """``reply_batch`` of questions that ``encode`` made ready."""
        if not encoded:
            return []
        batch = self._batch(encoded)
        stop = self._stop(sampling)
        said = [_said(one) for one in encoded]
        writers = [self._writer(stop, before) for before in said]

        def ends(row: int, token: int) -> bool:
            writers[row].push(token)
            return writers[row].stopped

        rows = generate(self.model, batch, sampling=sampling, stop_ids=self.stop_ids, ends=ends if stop else None)
        return [self._finished(row, stop, before) for row, before in zip(rows, said, strict=True)]

    def session(self, conversation: Conversation | None = None) -> Session:
        """A conversation to go on with, empty or begun (a system message, earlier turns)."""
        return Session(self, Conversation(()) if conversation is None else conversation)

    def _batch(self, inputs: Sequence[Inputs]) -> Batch:
        return self.processor.collate(inputs, side="left").to(self.model.device, self.model.dtype)

    def _stop(self, sampling: Sampling) -> tuple[str, ...]:
        return (*self.processor.template.stop, *sampling.stop)

    def writer(self, sampling: Sampling) -> TextStream:
        """Of one reply."""
        return self._writer(self._stop(sampling), ())

    def _writer(self, stop: Sequence[str], said: Sequence[int]) -> TextStream:
        return TextStream(self.processor.decode, held=self._held, stop=stop, said=said)

    def _finished(self, ids: Sequence[int], stop: Sequence[str], said: Sequence[int]) -> str:
        return finished_text(text_behind(said, ids, self.processor.decode), stop, begun=bool(said))

    def _pieces(
        self, batch: Batch, sampling: Sampling, past: Past | None, taken: list[int] | None = None, *, said: Sequence[int] = ()
    ) -> Generator[str]:
        """``past`` is continued and filled; ``taken`` collects the tokens chosen; ``said`` are the ids of a reply that goes on."""
        stop = self._stop(sampling)
        if sampling.num_beams > 1:
            assert past is None, "beam search keeps no memory"
            (tokens,) = generate(self.model, batch, sampling=sampling, stop_ids=self.stop_ids)
            yield self._finished(tokens, stop, said)
            return
        writer = self._writer(stop, said)
        with closing(stream(self.model, batch, sampling=sampling, stop_ids=self.stop_ids, past=past)) as chosen:
            for token in chosen:
                if taken is not None:
                    taken.append(token)
                if piece := writer.push(token):
                    yield piece
                if writer.stopped:
                    return
        if piece := writer.finish():
            yield piece


class Session:
    """One conversation that goes on. Its memory holds what the model has read: a turn costs only what is new.

    ``conversation`` is the history: it grows by question and reply when a reply ends, or by what was shown if the caller stops early.
    A reply that is still going on is given up when the next question is asked. A greedy reply equals that of reading everything anew,
    up to the rounding of the dtype. Beam search reads everything anew.
    """

    def __init__(self, assistant: Assistant, conversation: Conversation) -> None:
        self.conversation = conversation
        self._assistant = assistant
        self._past = Past.empty(assistant.model)
        self._keys: list[int | bytes] = []  # what stands at each position in memory
        self._speaking: Generator[str] | None = None

    def ask(self, question: str, *images: Any, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Ask about the pictures given now and everything before; the reply comes piece by piece."""
        self._hush()
        (message,) = Conversation.ask(question, *images).messages
        return self.reply(self.conversation.then(message), sampling)

    def reply(self, conversation: Conversation, sampling: Sampling = GREEDY) -> Iterator[str]:
        """Reply to this conversation and take it as the history: it may continue the old one or change any part of it."""
        self._hush()
        inputs = self._assistant.encode(conversation, sampling)
        self._speaking = self._recorded(conversation, self._pieces(inputs, sampling))
        return self._speaking

    def _hush(self) -> None:
        """End a reply that the caller left in the middle, before another begins: they share one memory."""
        if self._speaking is not None:
            self._speaking.close()
            self._speaking = None

    @property
    def tokens_read(self) -> int:
        """Positions in memory."""
        return self._past.length

    def _recorded(self, conversation: Conversation, pieces: Generator[str]) -> Generator[str]:
        shown: list[str] = []
        try:
            for piece in pieces:
                shown.append(piece)
                yield piece
        finally:
            pieces.close()  # first, so that memory and history change together
            if shown:
                self.conversation = conversation.then(assistant("".join(shown)))

    def _pieces(self, inputs: Inputs, sampling: Sampling) -> Generator[str]:
        if sampling.num_beams > 1:
            yield from self._assistant._pieces(self._assistant._batch([inputs]), sampling, None)
            return
        keys = position_keys(inputs, self._assistant.processor.image_token_id)
        self._past.keep(common_prefix(self._keys, keys))
        batch = self._rest(inputs, keys, self._past.length)
        taken: list[int] = []
        try:
            yield from self._assistant._pieces(batch, sampling, self._past, taken)
        except GeneratorExit:
            raise  # the caller has read enough; memory and keys agree
        except BaseException:
            self._past = Past.empty(self._assistant.model)  # interrupted between two layers, perhaps
            raise
        finally:
            self._keys = [*keys, *taken][: self._past.length]

    def _rest(self, inputs: Inputs, keys: Sequence[int | bytes], read: int) -> Batch:
        """What stands behind the first ``read`` positions, with the pictures that begin there."""
        in_memory = sum(isinstance(key, bytes) for key in keys[:read])
        first = 0
        while in_memory > 0:
            in_memory -= inputs.grids[first].tokens
            first += 1
        assert in_memory == 0, "memory ends inside a picture"
        views = sum(grid.views for grid in inputs.grids[:first])
        rest = Inputs(
            input_ids=inputs.input_ids[read:], labels=inputs.labels[read:], views=inputs.views[views:], grids=inputs.grids[first:]
        )
        batch = self._assistant._batch([rest])
        return replace(batch, positions=batch.positions + read)


def _said(inputs: Inputs) -> list[int]:
    """The ids of all that the assistant has said so far in a conversation whose last reply goes on; of an open one, none."""
    return inputs.input_ids[inputs.labels != IGNORED].tolist()  # type: ignore[no-any-return]


def position_keys(inputs: Inputs, image_token_id: int) -> list[int | bytes]:
    """What stands at each position: a token id, or a digest of the picture whose token it is."""
    pictures = inputs.views.split([grid.views for grid in inputs.grids]) if inputs.grids else ()
    marks: list[bytes] = []
    for grid, views in zip(inputs.grids, pictures, strict=True):
        mark = blake2b(repr(grid).encode(), digest_size=16)  # pictures of one colour have the same pixels in several shapes
        mark.update(views.contiguous().numpy().data)
        marks += [mark.digest()] * grid.tokens
    remaining = iter(marks)
    return [next(remaining) if number == image_token_id else number for number in inputs.input_ids.tolist()]


def common_prefix(old: Sequence[int | bytes], new: Sequence[int | bytes]) -> int:
    """How many first positions agree: whole pictures only, and at least one short of ``new``, whose last must be read to go on."""
    same, stop = 0, min(len(old), len(new) - 1)
    while same < stop:  # by halves: lists compare their parts faster than we do their elements
        middle = (same + stop + 1) // 2
        if old[same:middle] == new[same:middle]:
            same = middle
        else:
            stop = middle - 1
    while same > 0 and isinstance(new[same], bytes) and new[same - 1] == new[same]:
        same -= 1
    return same
