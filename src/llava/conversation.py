"""Conversations as the old scripts write them: mutable, with the picture spelled ``<image>`` inside the words (spec 3.1, 3.2).

conv = conv_templates["vicuna_v1"].copy()
conv.append_message(conv.roles[0], "<image>\\nWhat is this?")
conv.append_message(conv.roles[1], None)                         None: the reply that is due
conv.get_prompt()

SINGLE   system SEP   role: text SEP   role: text SEP    role:
TWO      system SEP   role: text SEP   role: text SEP2   role:
MPT      system SEP   role text SEP    role text SEP     role
LLAMA_2  SEP [INST] <<SYS>> system <</SYS>> text [/INST]  text SEP2
PLAIN    system text SEP text SEP2
"""

from __future__ import annotations

import base64
import builtins
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import PIL.Image

from llavakit.errors import PromptError
from llavakit.preprocess import Preprocess
from llavakit.prompts import CURIOUS_HUMAN, CURIOUS_USER

_IMAGE = "<image>"
_LONG, _SHORT = 1344, 672  # a picture on a page is at most so long and, when it is shrunk, so wide
_ON_A_PAGE = '<img src="data:image/jpeg;base64,{}" alt="user upload image" />'
Turns = list[tuple[str, str | None]]


class SeparatorStyle(Enum):
    """How turns are joined; see the drawing above."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclass
class Conversation:
    """A template when new, a conversation when copied. ``messages`` hold [role, text], [role, None] or [role, (text, image, mode)].

    The first ``offset`` messages belong to the template and are not shown.
    """

    system: str
    roles: Sequence[str]
    messages: Any  # a list of lists; templates hold (), so that nobody writes into one
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """The whole text. A message that is None or empty writes its role alone: the reply begins there."""
        turns, ends = self._turns(), (self.sep, self.sep2 or "")
        match self.sep_style:
            case SeparatorStyle.SINGLE:
                return self.system + self.sep + _joined(turns, (self.sep, self.sep), ": ", ":")
            case SeparatorStyle.TWO:
                return self.system + self.sep + _joined(turns, ends, ": ", ":")
            case SeparatorStyle.MPT:
                return self.system + self.sep + _joined(turns, (self.sep, self.sep), "", "")
            case SeparatorStyle.LLAMA_2:
                return self._bracketed(turns).lstrip(self.sep)  # the characters of sep; the tokenizer writes the first BOS itself
            case SeparatorStyle.PLAIN:
                return self.system + "".join(text + ends[index % 2] for index, (_, text) in enumerate(turns) if text)
        raise ValueError(f"Invalid style: {self.sep_style}")

    def _turns(self) -> Turns:
        """(role, text). A picture held by the first message is written before its words, one held by a later message where it stands."""
        turns: Turns = [(role, said[0] if isinstance(said, tuple) else said) for role, said in self.messages]
        if not (turns and isinstance(self.messages[0][1], tuple)):
            return turns
        role, words = turns[0][0], str(turns[0][1]).replace(_IMAGE, "").strip()
        if "mmtag" in self.version:
            return [(self.roles[0], f"<Image>{_IMAGE}</Image>"), (self.roles[1], "Received."), (role, words), *turns[1:]]
        return [(role, f"{_IMAGE}\n{words}"), *turns[1:]]

    def _bracketed(self, turns: Turns) -> str:
        if turns and not (turns[0][1] and turns[0][0] == self.roles[0]):
            raise PromptError("the first message is not a question", code="no_question", where="messages[0]", remedy="let the user begin")
        opening = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""
        text = ""
        for index, (_, said) in enumerate(turns):
            if said and index % 2:
                text += f" {said} {self.sep2 or ''}"
            elif said:
                text += f"{self.sep}[INST] {'' if index else opening}{said} [/INST]"
        return text

    def append_message(self, role: str, message: Any) -> None:
        """One more turn at the end."""
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """The same with messages of its own."""
        messages = [[role, said] for role, said in self.messages]
        return Conversation(self.system, self.roles, messages, self.offset, self.sep_style, self.sep, self.sep2, self.version)

    def _pictured(self) -> Iterator[tuple[PIL.Image.Image, str]]:
        """(picture, how it is to be squared) of the user's turns."""
        for _, said in self.messages[self.offset :: 2]:
            if isinstance(said, tuple):
                for image in said[1] if isinstance(said[1], list) else [said[1]]:
                    yield image, said[2]

    def get_images(self, return_pil: bool = False) -> list[Any]:
        """The pictures of the conversation, as PIL images or as base64 PNG."""
        return [self.process_image(image, mode, return_pil=return_pil) for image, mode in self._pictured()]

    def process_image(
        self,
        image: PIL.Image.Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = _LONG,
        min_len: int = _SHORT,
    ) -> Any:
        """A picture as the demo sends it: squared by "Pad" or "Resize", left alone by "Default" or "Crop", and never too large."""
        if image_process_mode == "Pad":
            image = _padded(image)
        elif image_process_mode == "Resize":
            image = image.resize((336, 336))
        elif image_process_mode not in ("Default", "Crop"):
            raise ValueError(f"Invalid image_process_mode: {image_process_mode}")
        long, short = max(image.size), min(image.size)
        if long > max_len:
            edge = int(min(max_len / (long / short), min_len, short))
            edges = edge, int(edge * (long / short))
            image = image.resize(edges if image.height > image.width else edges[::-1])
        return image if return_pil else _encoded(image, image_format)

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """[question, answer] pairs; a picture is written as an HTML image before the words."""
        pairs: list[list[str | None]] = []
        for index, (_, said) in enumerate(self.messages[self.offset :]):
            if index % 2:
                pairs[-1][1] = said
            elif isinstance(said, tuple):
                images = said[1] if isinstance(said[1], list) else [said[1]]
                shown = "".join(_ON_A_PAGE.format(self.process_image(image, "Default", image_format="JPEG")) for image in images)
                pairs.append([shown + said[0].replace(_IMAGE, "").strip(), None])
            else:
                pairs.append([said, None])
        return pairs

    def dict(self) -> builtins.dict[str, Any]:
        """What a log keeps: everything but the pictures."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, said[0] if isinstance(said, tuple) else said] for role, said in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _joined(turns: Turns, ends: tuple[str, str], said: str, silent: str) -> str:
    return "".join(f"{role}{said}{text}{ends[i % 2]}" if text else role + silent for i, (role, text) in enumerate(turns))


def _padded(image: PIL.Image.Image) -> PIL.Image.Image:
    from llava.mm_utils import expand2square  # needs torch, which a prompt does not

    return expand2square(image, Preprocess().colour)


def _encoded(image: PIL.Image.Image, kind: str) -> str:
    held = io.BytesIO()
    image.convert("RGB").save(held, kind) if kind == "JPEG" else image.save(held, kind)
    return base64.b64encode(held.getvalue()).decode("ascii")


_VICUNA: dict[str, Any] = {"roles": ("USER", "ASSISTANT"), "sep_style": SeparatorStyle.TWO, "sep": " ", "sep2": "</s>", "version": "v1"}
_LLAMA: dict[str, Any] = {
    "roles": ("USER", "ASSISTANT"),
    "sep_style": SeparatorStyle.LLAMA_2,
    "sep": "<s>",
    "sep2": "</s>",
    "version": "llama_v2",
}
_CHATML: dict[str, Any] = {
    "roles": ("<|im_start|>user\n", "<|im_start|>assistant\n"), "sep_style": SeparatorStyle.MPT, "sep": "<|im_end|>", "version": "mpt",
}  # fmt: skip
_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."


def _template(system: str, **fields: Any) -> Conversation:
    return Conversation(system=system, messages=(), offset=0, **fields)


conv_vicuna_v1 = _template(CURIOUS_USER, **_VICUNA)
conv_llava_v1 = _template(CURIOUS_HUMAN, **_VICUNA)
conv_llava_llama_2 = _template(_VISION, **_LLAMA)
conv_mistral_instruct = _template("", **_LLAMA | {"sep": ""})
conv_chatml_direct = _template("<|im_start|>system\nAnswer the questions.", **_CHATML)
conv_mpt = _template(f"<|im_start|>system\n{_MPT}", **_CHATML)
conv_llava_plain = _template("", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
conv_llava_v0 = _template(CURIOUS_HUMAN, roles=("Human", "Assistant"), sep_style=SeparatorStyle.SINGLE, sep="###")

default_conversation = conv_vicuna_v1
conv_templates = {
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "llava_v1": conv_llava_v1,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
}
