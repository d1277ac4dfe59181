"""The two sides, with the same questions put to both.

``Theirs`` is transformers used well: loaded in the wanted dtype, sdpa attention, inference mode, the PIL processor (the one that equals the
original's pixels), its own ``generate`` and, for the second turn, both what its documentation shows (everything read again) and what a
careful user writes (the cache passed on). ``Ours`` is ``llavakit.Assistant``. Seconds are measured inside, from the JPEG's bytes on.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from fixture import QUESTION
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

from llavakit.assistant import Assistant
from llavakit.images import image_size, open_image
from llavakit.model.cpu import CpuLinear
from llavakit.model.generation import Past, decode_one, stream
from llavakit.types import Conversation, Image, Sampling, assistant, user

NO_END: frozenset[int] = frozenset()  # random weights end a reply at random; both sides are made to go on


def question(number: int) -> str:
    """Questions of equal length that differ from the first word on."""
    return f"w{number} {QUESTION}"


class Ours:
    """llavakit's side."""

    def __init__(self, folder: Path, dtype: str = "auto") -> None:
        self.assistant = Assistant.load(folder, dtype=dtype, device="cpu")
        self.assistant.stop_ids = NO_END
        self.tokens: list[int] = []

    def preprocess(self, jpeg: bytes) -> np.ndarray[Any, Any]:
        processor, image = self.assistant.processor, open_image(Image(jpeg))
        return processor.preprocess.views(image, processor.tiling.canvas(*image.size))

    def draft(self, jpeg: bytes) -> np.ndarray[Any, Any]:
        """The same with ``--draft``."""
        processor, image = self.assistant.processor, Image(jpeg)
        size = image_size(image)
        canvas = processor.tiling.canvas(*size)
        opened = open_image(image, least=processor.preprocess.least(size, canvas))
        return processor.preprocess.views(opened, canvas, true_size=size)

    def first_token(self, jpeg: bytes, number: int) -> float:
        start = time.perf_counter()
        batch = self._batch(Conversation.ask(question(number), Image(jpeg)))
        self.tokens = [next(stream(self.assistant.model, batch, sampling=Sampling(max_new_tokens=1), stop_ids=NO_END))]
        return time.perf_counter() - start

    def decode(self, jpeg: bytes, number: int, count: int) -> float:
        """Seconds a token, the first left out."""
        batch = self._batch(Conversation.ask(question(number), Image(jpeg)))
        tokens = stream(self.assistant.model, batch, sampling=Sampling(max_new_tokens=count + 1), stop_ids=NO_END)
        self.tokens = [next(tokens)]
        start = time.perf_counter()
        self.tokens += tokens
        return (time.perf_counter() - start) / count

    def begin(self, jpeg: bytes, reply: list[int]) -> None:
        """A first turn, whose reply is given so that both sides have the same history."""
        self.session = self.assistant.session()
        words = self.assistant.processor.decode(reply)
        self.history = Conversation.ask(question(0), Image(jpeg)).then(assistant(words))
        for _ in self.session.reply(self.history.then(user("w1")), Sampling(max_new_tokens=1)):
            pass

    def second_turn(self, number: int) -> float:
        """Seconds to the first token of another question about the picture."""
        start = time.perf_counter()
        for _ in self.session.reply(self.history.then(user(question(1000 + number))), Sampling(max_new_tokens=1)):
            pass
        return time.perf_counter() - start

    def second_turn_ids(self, number: int) -> Tensor:
        return self.assistant.processor.encode(self.history.then(user(question(1000 + number))), learn=False).input_ids

    def batch_step(self, prompt: Tensor, rows: int, count: int) -> float:
        """Seconds a step for ``rows`` copies of a prompt of embeddings (1, T, H) that was read before."""
        model = self.assistant.model
        past = Past.empty(model)
        with torch.inference_mode():
            model.language_model(inputs_embeds=prompt, past_key_values=past.cache, logits_to_keep=1)
            past.mask = torch.ones(1, prompt.shape[1], dtype=torch.bool)
            past.repeat(rows)
            tokens = torch.arange(rows) + 100
            decode_one(model, tokens, past)
            start = time.perf_counter()
            for _ in range(count):
                tokens = decode_one(model, tokens, past).argmax(-1)
        return (time.perf_counter() - start) / count

    def packed_bytes(self) -> int:
        """Memory of the second copies that ``accelerate_cpu`` keeps."""
        linears = (module for module in self.assistant.model.modules() if isinstance(module, CpuLinear))
        return sum(module.weight.nbytes for module in linears if module.keep_packed)

    def ids(self, jpeg: bytes, number: int) -> Tensor:
        """The prompt's tokens."""
        return self.assistant.processor.encode(Conversation.ask(question(number), Image(jpeg)), learn=False).input_ids

    def _batch(self, conversation: Conversation) -> Any:
        inputs = self.assistant.processor.encode(conversation, learn=False)
        return self.assistant.processor.collate([inputs], side="left").to("cpu", self.assistant.model.dtype)


class Theirs:
    """transformers' side, used well."""

    def __init__(self, folder: Path, dtype: Any = torch.bfloat16) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.tokens: list[int] = []

    def preprocess(self, jpeg: bytes) -> np.ndarray[Any, Any]:
        picture = PIL.Image.open(io.BytesIO(jpeg)).convert("RGB")
        pixels: np.ndarray[Any, Any] = self.processor.image_processor(picture, return_tensors="np")["pixel_values"]
        return pixels[0] if pixels.ndim == 5 else pixels

    def first_token(self, jpeg: bytes, number: int) -> float:
        start = time.perf_counter()
        inputs = self._inputs(jpeg, number)
        self.tokens = self._generate(inputs, 1)
        return time.perf_counter() - start

    def decode(self, jpeg: bytes, number: int, count: int) -> float:
        """Seconds a token, the first left out, by a clock inside ``generate``."""
        ticks: list[float] = []

        def clock(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            ticks.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        self.tokens = self._generate(self._inputs(jpeg, number), count + 1, stopping_criteria=[clock])
        return (ticks[-1] - ticks[0]) / count

    def begin(self, jpeg: bytes, ids: Tensor) -> None:
        """Read the history: everything in ``ids`` that all second questions share."""
        self.jpeg = jpeg
        self.cache = DynamicCache(config=self.model.config.text_config)
        pixels = torch.from_numpy(self.preprocess(jpeg)).to(self.model.dtype)
        with torch.inference_mode():
            self.model(input_ids=ids[None], pixel_values=pixels, past_key_values=self.cache, logits_to_keep=1)

    def second_turn(self, ids: Tensor) -> float:
        """As documented: picture and conversation are read again."""
        start = time.perf_counter()
        pixels = torch.from_numpy(self.preprocess(self.jpeg)).to(self.model.dtype)
        self.tokens = self._generate({"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), "pixel_values": pixels}, 1)
        return time.perf_counter() - start

    def second_turn_cached(self, ids: Tensor) -> float:
        """The careful user: the cache of the first turn is passed on, the picture is not."""
        read = self.cache.get_seq_length()
        start = time.perf_counter()
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
        self.tokens = self._generate(inputs, 1, past_key_values=self.cache)
        spent = time.perf_counter() - start
        self.cache.crop(read - self.cache.get_seq_length())
        return spent

    def batch_step(self, prompt: Tensor, rows: int, count: int) -> float:
        """Seconds a step of a bare loop over the model, without what ``generate`` adds."""
        cache = DynamicCache(config=self.model.config.text_config)
        with torch.inference_mode():
            self.model(inputs_embeds=prompt, past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(rows)
            tokens = torch.arange(rows)[:, None] + 100
            self.model(input_ids=tokens, past_key_values=cache)
            start = time.perf_counter()
            for _ in range(count):
                tokens = self.model(input_ids=tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
        return (time.perf_counter() - start) / count

    def _inputs(self, jpeg: bytes, number: int) -> Any:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n" + question(number)}]}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        picture = PIL.Image.open(io.BytesIO(jpeg)).convert("RGB")
        # the template wrote the begin token's text nowhere, so the tokenizer adds it
        return self.processor(images=picture, text=prompt, return_tensors="pt").to(self.model.dtype)

    def _generate(self, inputs: Any, count: int, **more: Any) -> list[int]:
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **more)
        new: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return new
