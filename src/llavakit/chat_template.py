"""A checkpoint's own chat template, where it is none of ours: Jinja, run in transformers' sandbox.

    conversation --texts held out as marks--> Jinja --> "<s>[INST] <image> \\ue0001\\ue001 [/INST]" --> control | image | text | control

What people and models say never passes through the template itself: it sees a mark in private characters, and the words are put back as
text, so that no special token is read out of them (hardening P3). A template that changes words (trims, upper case) therefore does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llavakit.errors import CheckpointError, PromptError
from llavakit.prompts import Segment, Template
from llavakit.types import IMAGE_MARKER, Conversation, Image

_PART = re.compile(f"(\ue000\\d+\ue001|{re.escape(IMAGE_MARKER)})")


@dataclass(frozen=True, kw_only=True)
class JinjaTemplate(Template):
    """A chat template as it was published. ``source``: the Jinja text; ``tokens``: the special tokens it may name (bos_token ...)."""

    source: str
    tokens: tuple[tuple[str, str], ...] = ()

    def ending(self, end: str) -> Template:
        return self  # where replies end is written in the source

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        words: list[tuple[str, bool]] = []
        messages: list[dict[str, object]] = []
        for message in conversation.messages:
            content: list[dict[str, str]] = []
            for part in message.parts:
                if isinstance(part, Image):
                    content.append({"type": "image"})
                    continue
                content.append({"type": "text", "text": f"\ue000{len(words)}\ue001"})
                words.append((part.text, message.role == "assistant"))
            messages.append({"role": message.role, "content": content})
        written = self._rendered(messages, open_=conversation.open)
        begin = dict(self.tokens).get("bos_token")
        if begin and written.startswith(begin):
            written = written[len(begin) :]  # the tokenizer writes it (Pieces.head)
        after_reply = False
        for piece in _PART.split(written):
            if piece == IMAGE_MARKER:
                yield Segment(IMAGE_MARKER, "image", False)
            elif piece.startswith("\ue000"):
                text, after_reply = words[int(piece[1:-1])]
                yield Segment(text, "text", after_reply)
                continue
            elif after_reply and piece.lstrip().startswith(self.end):  # the end of a reply is learned with it
                cut = piece.index(self.end) + len(self.end)
                yield Segment(piece[:cut], "control", True)
                yield Segment(piece[cut:], "control", False)
            else:
                yield Segment(piece, "control", False)
            after_reply = False

    def _rendered(self, messages: list[dict[str, object]], *, open_: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _ = render_jinja_template(
                conversations=[messages], chat_template=self.source, add_generation_prompt=open_, **dict(self.tokens)
            )
        except Exception as error:  # a template may refuse by raising anything
            what = f"the checkpoint's chat template refuses it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            raise PromptError(what, code="chat_template_refuses", remedy="ask in another form, or name a format with --template") from error
        return str(text)

    def jinja(self) -> str:
        return self.source


def foreign(source: str, *, tokens: dict[str, str], where: str) -> JinjaTemplate:
    """A published chat template, tried on a question about a picture.

    Raises CheckpointError ``unknown_chat_template`` for one that fails on it, loses its words or its picture, or writes them twice.
    """
    from llavakit.types import Pixels, Text, assistant, user

    end = tokens.get("eos_token", "</s>")
    template = JinjaTemplate(name="own", source=source, tokens=tuple(sorted(tokens.items())), end=end)
    pixel = Image(Pixels(width=1, height=1, rgb=bytes(3)))
    first = user(pixel, Text("What?"))
    for probe in (Conversation((first,)), Conversation((first, assistant("A cat."), user("Why?")))):
        try:
            segments = template.render(probe)
        except PromptError as error:
            raise _unusable(error.what, where) from error
        said = [segment.text for segment in segments if segment.kind == "text"]
        if said != [part.text for message in probe.messages for part in message.parts if isinstance(part, Text)]:
            raise _unusable("it does not write every message once", where)
        if sum(segment.kind == "image" for segment in segments) != 1:
            raise _unusable(f"it writes no {IMAGE_MARKER} for a picture", where)
    return template


def _unusable(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"the chat template cannot be used: {what}",
        code="unknown_chat_template",
        where=where,
        remedy="name a prompt format (--template), or pass a Template to Processor.load",
    )
