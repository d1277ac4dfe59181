"""What a prompt looks like and which of its characters are learned. Nothing here knows a tokenizer; no torch.

    Conversation --Template.render--> Segments --processor--> token ids and labels

    vicuna_v1   {system} USER: <image>\\n{question} ASSISTANT: {reply}</s>USER: {question} ASSISTANT: {reply}</s>
                                                             ~~~~~~~~~~~~                               ~~~~~~~~~~~~   learned

An open conversation ends right before the learned part, so the prompt for inference is the training text cut short: the same function
writes both. A template is a value; to use another format, pass another ``Template``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from llavakit.errors import PromptError
from llavakit.types import IMAGE_MARKER, Conversation, Image, Message, Part, Text

CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CURIOUS_HUMAN = CURIOUS_USER.replace("user", "human")


@dataclass(frozen=True)
class Segment:
    """A run of characters of one origin.

    ``control`` was written by the template and may hold special tokens; ``text`` came from a person or a model and never does;
    ``image`` stands for the tokens of one picture. ``learned`` characters carry the loss.
    """

    text: str
    kind: Literal["control", "text", "image"]
    learned: bool


_PICTURE = Segment(IMAGE_MARKER, "image", False)


def spelled(segments: Iterable[Segment]) -> str:
    """The whole prompt as one string, each picture as ``<image>``."""
    return "".join(segment.text for segment in segments)


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat format as the strings around its parts (spec 3.1, 3.2).

    ``images`` "inline": pictures stay where they are, except that a single one which does not come first is moved to the front, as in
    training since v1.0 (spec 3.4); each stands on a line of its own. "first": all pictures, a line each, then the texts (llava-hf).
    ``image_start``, ``image_end``: control text around every picture (the first checkpoints' ``<im_start>``, ``<im_end>``).
    ``system_start`` and ``system_end`` stand around the system text. It comes before the first turn, or with ``system_inside`` within it,
    after ``user_start`` (LLaMA-2). ``reply_end`` closes the words of a reply before ``end``. ``plain_end``: ``end`` is ordinary text.
    ``closing`` "each": every reply is followed by ``end``. "last": only the last one is, and ``glue`` follows the others (llava-hf).
    """

    name: str
    system: str = ""
    system_start: str = ""
    system_end: str = " "
    system_inside: bool = False
    user_start: str = "USER: "
    user_end: str = " "
    reply_start: str = "ASSISTANT:"
    reply_space: str = " "
    reply_end: str = ""
    end: str = "</s>"
    plain_end: bool = False
    glue: str = ""
    images: Literal["inline", "first"] = "inline"
    closing: Literal["each", "last"] = "each"
    image_start: str = ""
    image_end: str = ""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a reply."""
        return (self.end,)

    def ending(self, end: str) -> Template:
        """The same format with another end token: for tokenizers that do not know this one."""
        return replace(self, end=end)

    def around_images(self, start: str, end: str) -> Template:
        """The same format with control text around every picture."""
        return replace(self, image_start=start, image_end=end)

    def render(self, conversation: Conversation, *, begun: bool = False) -> tuple[Segment, ...]:
        """The prompt, segment by segment; after an open conversation it stops where the reply begins. Raises PromptError.

        ``begun``: the last reply goes on, so the prompt stops behind its last character (where it begins if it says nothing yet).
        """
        if begun and not conversation.messages[-1].text:
            return self.render(Conversation(conversation.messages[:-1]))
        check_not_empty(conversation)
        segments = tuple(segment for segment in self._segments(conversation) if segment.text)
        said = [place for place, segment in enumerate(segments, 1) if segment.kind == "text" and segment.learned] if begun else []
        return segments[: said[-1]] if said else segments

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        opening = tuple(self._opening(conversation.system))
        if not self.system_inside:
            yield from opening
        for index, message in enumerate(conversation.turns):
            if message.role == "user":
                yield Segment(self.user_start, "control", False)
                if self.system_inside and index == 0:
                    yield from opening
                yield from self._question(message)
                yield Segment(self.user_end + self.reply_start, "control", False)
                continue
            yield Segment(self.reply_space, "control", True)
            yield Segment(message.text, "text", True)
            last = index == len(conversation.turns) - 1
            if last or self.closing == "each":
                yield Segment(self.reply_end + self.end, "control", True)
            if not last:
                yield Segment(self.glue, "control", False)

    def _opening(self, given: str | None) -> Iterator[Segment]:
        """The system text, the conversation's own or the format's."""
        system = self.system if given is None else given
        if system:
            yield Segment(self.system_start, "control", False)
            yield Segment(system, "control" if given is None else "text", False)
            yield Segment(self.system_end, "control", False)

    def _question(self, message: Message) -> Iterator[Segment]:
        parts = _images_first(message) if self.images == "first" else _image_placed(message)
        for part, following in zip(parts, (*parts[1:], None), strict=True):
            if isinstance(part, Text):
                yield Segment(part.text, "text", False)
                continue
            yield from (Segment(self.image_start, "control", False), _PICTURE, Segment(self.image_end, "control", False))
            if isinstance(following, Image) or (isinstance(following, Text) and not following.text.startswith("\n")):
                yield Segment("\n", "control", False)

    def jinja(self) -> str:
        """This format as a chat template for transformers: it renders ``spelled(self.render(conversation))``."""
        opening = _quoted(self.system_start + self.system + self.system_end if self.system else "")
        given = f"{_quoted(self.system_start)} + words + {_quoted(self.system_end)} if words else ''"
        place = (_JINJA_FIRST if self.images == "first" else _JINJA_INLINE).replace(
            IMAGE_MARKER, self.image_start + IMAGE_MARKER + self.image_end
        )
        always = "true" if self.closing == "each" else "false"
        end = f"{{%- if loop.last or {always} -%}}{{{{ {_quoted(self.reply_end + self.end)} }}}}{{%- endif -%}}"
        reply = f"{{{{ {_quoted(self.reply_space)} + words }}}}{end}{{%- if not loop.last -%}}{{{{ {_quoted(self.glue)} }}}}{{%- endif -%}}"
        if self.system_inside:  # held back until the first question has begun
            before = f"{{%- set held = namespace(text={opening}) -%}}"
            first, system = "", f"{{%- set held.text = {given} -%}}"
            inside = "{{ held.text }}{%- set held.text = '' -%}"
        else:
            before, inside, system = "", "", f"{{{{ {given} }}}}"
            first = f"{{%- if loop.first and message.role != 'system' -%}}{{{{ {opening} }}}}{{%- endif -%}}"
        return (
            before
            + "{%- for message in messages -%}"
            + _JINJA_WORDS
            + first
            + f"{{%- if message.role == 'system' -%}}{system}"
            + f"{{%- elif message.role == 'user' -%}}{{{{ {_quoted(self.user_start)} }}}}{inside}{place}"
            + f"{{{{ {_quoted(self.user_end)} }}}}"
            + f"{{%- else -%}}{{{{ {_quoted(self.reply_start)} }}}}{{%- generation -%}}{reply}{{%- endgeneration -%}}{{%- endif -%}}"
            + "{%- endfor -%}"
            + f"{{%- if add_generation_prompt -%}}{{{{ {_quoted(self.reply_start)} }}}}{{%- endif -%}}"
        )


@dataclass(frozen=True, kw_only=True)
class PlainTemplate(Template):
    """Stage 1: the picture, then its caption and ``end`` (spec 3.1, 3.5). What the user says is dropped."""

    def _segments(self, conversation: Conversation) -> Iterator[Segment]:
        turns = conversation.turns
        if len(turns) > 2 or len(turns[0].images) != 1:
            raise PromptError(
                f"{len(turns)} turns with {len(conversation.images)} pictures",
                code="plain_needs_one_image",
                remedy=f"template '{self.name}' takes one picture and its caption",
            )
        yield _PICTURE
        if len(turns) == 2:
            yield Segment(turns[1].text, "text", True)
            yield Segment(self.end, "control", True)

    def jinja(self) -> str:
        return (
            "{%- for message in messages -%}"
            + _JINJA_WORDS
            + f"{{%- if message.role == 'user' -%}}{{{{ {_quoted(IMAGE_MARKER)} }}}}"
            + f"{{%- elif message.role == 'assistant' -%}}{{%- generation -%}}{{{{ words + {_quoted(self.end)} }}}}{{%- endgeneration -%}}"
            + "{%- endif -%}{%- endfor -%}"
        )


_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_BRACKETS = Template(
    name="mistral_instruct", system_start="<<SYS>>\n", system_end="\n<</SYS>>\n\n", system_inside=True, user_start="[INST] ",
    user_end=" [/INST]", reply_start="", reply_end=" ",
)  # fmt: skip
_CHATML = Template(
    name="chatml_direct", system="Answer the questions.", system_start="<|im_start|>system\n", system_end="<|im_end|>",
    user_start="<|im_start|>user\n", user_end="<|im_end|>", reply_start="<|im_start|>assistant\n", reply_space="", end="<|im_end|>",
)  # fmt: skip  # no line break after <|im_end|>, unlike the base model's own (spec trap 31)
_HUMAN = Template(
    name="llava_v0", system=CURIOUS_HUMAN, system_end="###", user_start="Human: ", user_end="###", reply_start="Assistant:", end="###",
    plain_end=True,
)  # fmt: skip

# Spec 3.2. Not here: the text-only formats of language models under LLaVA (default, v0, llama_2) and the experimental mmtag pair.
TEMPLATES: Mapping[str, Template] = {
    template.name: template
    for template in (
        Template(name="vicuna_v1", system=CURIOUS_USER),
        Template(name="llava_v1", system=CURIOUS_HUMAN),
        _BRACKETS,
        _CHATML,
        replace(_CHATML, name="mpt", system=_MPT),
        replace(_BRACKETS, name="llava_llama_2", system=_VISION, glue="<s>"),
        _HUMAN,
        Template(name="llava_hf", user_end="", glue=" ", images="first", closing="last"),
        PlainTemplate(name="plain", end="\n"),
    )
}


def check_not_empty(conversation: Conversation) -> None:
    """Every question must say or show something (hardening P5). Raises PromptError empty_prompt."""
    if not conversation.turns:
        raise PromptError("the conversation is empty", code="empty_prompt", remedy="ask something")
    offset = len(conversation.messages) - len(conversation.turns)
    for index, message in enumerate(conversation.turns):
        if message.role == "user" and not message.images and not message.text.strip():
            raise PromptError("the question is empty", code="empty_prompt", where=f"messages[{index + offset}]", remedy="ask something")


def _image_placed(message: Message) -> tuple[Part, ...]:
    """A single picture comes first and the words lose their outer blanks; several stay where they are (spec 3.4, successor rule)."""
    if len(message.images) != 1 or isinstance(message.parts[0], Image):
        return message.parts
    words = message.text.strip()
    return (*message.images, *((Text(words),) if words else ()))


def _images_first(message: Message) -> tuple[Part, ...]:
    """All pictures, then the texts with a blank after each, as llava-hf's chat template writes them."""
    words = "".join(f"{part.text} " for part in message.parts if isinstance(part, Text))
    if message.images:
        return (*message.images, Text("\n" + words.removeprefix("\n")))
    return (Text(words),)


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


# Content may be a string or a list of parts; ``words`` gathers its texts, ``images`` counts its pictures.
_JINJA_WORDS = (
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}"
    "{%- set images = parts | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- set words = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
)
_JINJA_FIRST = (
    "{%- for part in parts if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- set said = namespace(text='') -%}"
    "{%- for part in parts if part.type == 'text' -%}{%- set said.text = said.text + part.text + ' ' -%}{%- endfor -%}"
    "{{ said.text[1:] if images and said.text.startswith('\\n') else said.text }}"
)
_JINJA_INLINE = (
    "{%- if images == 1 and parts[0].type != 'image' -%}"
    "{{ '<image>' + ('\\n' + words.strip() if words.strip() else '') }}"
    "{%- else -%}{%- for part in parts -%}{%- if part.type == 'image' -%}{{ '<image>' }}"
    "{%- if not loop.last and (loop.nextitem.type == 'image' or not loop.nextitem.text.startswith('\\n')) -%}{{ '\\n' }}{%- endif -%}"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
)
