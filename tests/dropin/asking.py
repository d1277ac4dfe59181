"""Asking as old scripts do, and asking llavakit the same."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from torch import Tensor

from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaLlamaForCausalLM
from llavakit.model import generation
from llavakit.types import Conversation, Sampling

QUESTIONS = ["What is in the picture?", "How many things are there?", "Is there a star?"]


def ids_of(model: LlavaLlamaForCausalLM, *said: str | None, mode: str = "vicuna_v1") -> Tensor:
    conversation = conv_templates[mode].copy()
    for index, text in enumerate(said):
        conversation.append_message(conversation.roles[index % 2], text)
    return torch.as_tensor(tokenizer_image_token(conversation.get_prompt(), model.processor.tokenizer, return_tensors="pt"))


def pixels_of(model: LlavaLlamaForCausalLM, *images: PIL.Image.Image) -> Any:
    return process_images(images, model.get_vision_tower().image_processor, model.config)


def ours(model: LlavaLlamaForCausalLM, question: str, *images: PIL.Image.Image, sampling: Sampling) -> list[int]:
    """llavakit's tokens for the same prompt."""
    inputs = model.processor.encode(Conversation.ask(question, *images), learn=False)
    batch = model.processor.collate([inputs], side="left")
    (row,) = generation.generate(model.llava, batch, sampling=sampling, stop_ids=model.processor.stop_ids)
    return row if len(row) == sampling.max_new_tokens else [*row, 2]


def asked(model: LlavaLlamaForCausalLM, question: str, *images: PIL.Image.Image, **more: Any) -> list[int]:
    ids = ids_of(model, "<image>\n" * len(images) + question, None)[None]
    sizes = [image.size for image in images]
    pixels = pixels_of(model, *images) if images else None
    return model.generate(ids, images=pixels, image_sizes=sizes, **more)[0].tolist()  # type: ignore[no-any-return]
