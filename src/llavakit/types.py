"""The values that travel: a conversation about images, and how to sample a reply.

Everything here is frozen and imports nothing but the standard library. A ``Conversation`` goes unchanged through training,
inference, data generation, evaluation and serving. Text is *text*: an ``<image>`` typed by a user stays seven characters. The two
file formats in which ``<image>`` means a picture are read and written here and nowhere else (``from_llava``, ``from_openai``).

    Conversation -- messages --> Message(role, parts) -- parts --> Text | Image
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llavakit.errors import ImageError, PromptError, SamplingError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
IMAGE_MARKER = "<image>"  # LLaVA's files only; inside the program a picture is an Image part
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
_MAGIC = ((b"\x89PNG", 0, "image/png"), (b"\xff\xd8", 0, "image/jpeg"), (b"GIF8", 0, "image/gif"), (b"WEBP", 8, "image/webp"))
MAX_DATA_URL = 64 * 1024 * 1024  # characters (hardening I16)


@dataclass(frozen=True)
class Text:
    """A run of text inside a message."""

    text: str


@dataclass(frozen=True)
class Pixels:
    """A decoded picture: RGB bytes, row by row (``len(rgb) == 3 * width * height``)."""

    width: int
    height: int
    rgb: bytes

    def __post_init__(self) -> None:
        if len(self.rgb) != 3 * self.width * self.height or self.width < 1 or self.height < 1:
            raise ImageError(
                f"{len(self.rgb)} bytes do not make {self.width}x{self.height} RGB pixels",
                code="image_unreadable",
                remedy="pass 3 * width * height bytes",
            )


@dataclass(frozen=True)
class Image:
    """A picture as the user gave it: a file, the bytes of a file, or decoded pixels. ``images.open_image`` decodes it."""

    source: Path | bytes | Pixels

    @staticmethod
    def of(source: Any) -> Image:
        """From a path, encoded bytes, or a PIL image.

        Only plain RGB and grey are taken as they are; other modes keep their alpha, palette or 16 bits by being encoded without loss, so
        that the one rule for them (``images.open_image``) applies.
        """
        if isinstance(source, Image):
            return source
        if isinstance(source, bytes | Pixels | Path):
            return Image(source)
        if isinstance(source, str):
            return Image(Path(source))
        if source.mode not in ("RGB", "L", "1") or "transparency" in source.info:
            held = io.BytesIO()
            source.save(held, "TIFF" if source.mode in ("F", "I", "CMYK", "YCbCr", "LAB") else "PNG")
            return Image(held.getvalue())
        rgb = source.convert("RGB")
        return Image(Pixels(width=rgb.size[0], height=rgb.size[1], rgb=rgb.tobytes()))


Part = Text | Image


@dataclass(frozen=True)
class Message:
    """One turn. ``parts`` keep the order of words and pictures."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The words alone, pictures left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))


def user(*parts: Part | str) -> Message:
    """A user's turn from strings, Text and Image parts."""
    return Message("user", _parts(parts))


def assistant(text: str) -> Message:
    return Message("assistant", (Text(text),))


def system(text: str) -> Message:
    return Message("system", (Text(text),))


def _parts(parts: Iterable[Part | str]) -> tuple[Part, ...]:
    return tuple(Text(part) if isinstance(part, str) else part for part in parts)


@dataclass(frozen=True)
class Conversation:
    """Messages in order: an optional system message, then user and assistant in turn, beginning with the user.

    An open conversation (last message from the user) can be asked; a closed one can be trained on.
    Raises PromptError with the index of the first message out of order.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        for index, message in enumerate(self.messages):
            _check_message(index, message)
        turns = [m.role for m in self.turns]
        offset = len(self.messages) - len(turns)
        for index, role in enumerate(turns):
            expected = "user" if index % 2 == 0 else "assistant"
            if role != expected:
                raise PromptError(
                    f"a message of role '{role}' stands where '{expected}' is due",
                    code="bad_turn_order",
                    where=f"messages[{index + offset}]",
                    remedy="user and assistant alternate, the user begins, one system message may stand first",
                )

    @property
    def system(self) -> str | None:
        """The system text, or None when the template's own applies."""
        first = self.messages[:1]
        return first[0].text if first and first[0].role == "system" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """The messages without the system message."""
        return self.messages[1:] if self.system is not None else self.messages

    @property
    def images(self) -> tuple[Image, ...]:
        """Every picture, in reading order."""
        return tuple(image for message in self.messages for image in message.images)

    @property
    def open(self) -> bool:
        """True when a reply is due."""
        return bool(self.turns) and self.turns[-1].role == "user"

    def then(self, message: Message) -> Conversation:
        """The same conversation with one more message."""
        return Conversation((*self.messages, message))

    @staticmethod
    def ask(question: str, *images: Any) -> Conversation:
        """One open turn: the pictures, then the question on its own line (spec 3.4: the image stands first)."""
        pictures = tuple(Image.of(image) for image in images)
        words = ("\n" + question) if pictures and question else question
        return Conversation((user(*pictures, *((words,) if words else ())),))

    @staticmethod
    def from_llava(record: Mapping[str, Any], *, image_root: Path | None = None) -> Conversation:
        """From one LLaVA JSON sample: {"image": path or list, "conversations": [{"from", "value"}]} (spec 4.5).

        Each ``<image>`` in a human value becomes the next picture; the counts must agree.
        """
        names = record.get("image", record.get("images", ()))
        names = [names] if isinstance(names, str | Path) else list(names or ())
        queue = [Image(image_root / name) if image_root else Image.of(name) for name in names]
        wanted = sum(str(t.get("value", "")).count(IMAGE_MARKER) for t in record["conversations"] if t["from"] == "human")
        if wanted != len(queue):
            raise PromptError(
                f"{wanted} {IMAGE_MARKER} markers but {len(queue)} images",
                code="image_count",
                remedy=f"write one {IMAGE_MARKER} for each image",
            )
        pictures = iter(queue)
        messages = []
        for index, turn in enumerate(record["conversations"]):
            role = _LLAVA_ROLES.get(turn["from"])
            if role is None:
                raise PromptError(
                    f"unknown 'from': {turn['from']!r}",
                    code="unknown_role",
                    where=f"conversations[{index}]",
                    remedy=f"use one of {sorted(_LLAVA_ROLES)}",
                )
            value = str(turn["value"])
            parts = _split_markers(value, pictures) if role == "user" else (Text(value),)
            messages.append(Message(role, parts))
        return Conversation(tuple(messages))

    def to_llava(self, *, image_names: Sequence[str] = ()) -> dict[str, Any]:
        """To a LLaVA JSON sample. ``image_names`` stand for the pictures in order; text that spells the marker is refused."""
        if len(image_names) != len(self.images):
            raise PromptError(f"{len(image_names)} names for {len(self.images)} images", code="image_count")
        turns = []
        for index, message in enumerate(self.messages):
            if message.role == "user" and IMAGE_MARKER in message.text:
                raise PromptError(
                    f"text that spells {IMAGE_MARKER} cannot be written in LLaVA's format",
                    code="marker_in_text",
                    where=f"messages[{index}]",
                    remedy="reword it",
                )
            value = "".join(p.text if isinstance(p, Text) else IMAGE_MARKER for p in message.parts)
            turns.append({"from": _LLAVA_NAMES[message.role], "value": value})
        record: dict[str, Any] = {"conversations": turns}
        if image_names:
            record["image"] = image_names[0] if len(image_names) == 1 else list(image_names)
        return record

    @staticmethod
    def from_openai(messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """From OpenAI chat messages; content is a string or parts of type text / image_url (data URLs only)."""
        return Conversation(tuple(_openai_message(index, message) for index, message in enumerate(messages)))

    def to_openai(self) -> list[dict[str, Any]]:
        """To OpenAI chat messages; pictures given as encoded bytes or files become data URLs."""
        return [{"role": m.role, "content": _openai_content(m)} for m in self.messages]


_LLAVA_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_LLAVA_NAMES: dict[Role, str] = {role: name for name, role in _LLAVA_ROLES.items()}


def _check_message(index: int, message: Message) -> None:
    where = f"messages[{index}]"
    if message.role not in ROLES:
        raise PromptError(f"unknown role {message.role!r}", code="unknown_role", where=where, remedy=f"use one of {', '.join(ROLES)}")
    if message.role != "user" and message.images:
        raise PromptError(
            f"a picture in a message of role '{message.role}'",
            code="image_not_from_user",
            where=where,
            remedy="pictures stand in user messages",
        )
    if message.role == "system" and index:
        raise PromptError("a system message after the first", code="bad_turn_order", where=where, remedy="put it first")
    if found := _NO_CHARACTER.search(message.text):
        raise PromptError(
            f"the text holds U+{ord(found[0]):04X}, which is no character",
            code="bad_characters",
            where=where,
            remedy="send valid Unicode without NUL",
        )


def _split_markers(value: str, pictures: Iterable[Image]) -> tuple[Part, ...]:
    parts: list[Part] = []
    for index, words in enumerate(value.split(IMAGE_MARKER)):
        if index:
            parts.append(next(iter(pictures)))
        if words:
            parts.append(Text(words))
    return tuple(parts)


def _openai_message(index: int, message: Mapping[str, Any]) -> Message:
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    if isinstance(content, str):
        return Message(role, (Text(content),))  # type: ignore[arg-type]  # checked by Conversation
    if not isinstance(content, Sequence):
        raise PromptError("content is neither text nor a list of parts", code="bad_content", where=f"messages[{index}].content")
    parts: list[Part] = []
    for number, part in enumerate(content):
        where = f"messages[{index}].content[{number}]"
        kind = part.get("type")
        if kind == "text":
            parts.append(Text(str(part.get("text", ""))))
        elif kind == "image_url":
            parts.append(Image(decode_data_url(part["image_url"]["url"], where=where)))
        else:
            raise PromptError(f"unknown part type {kind!r}", code="bad_content", where=where, remedy="use text or image_url")
    return Message(role, tuple(parts))  # type: ignore[arg-type]


def _openai_content(message: Message) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.text
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        else:
            content.append({"type": "image_url", "image_url": {"url": encode_data_url(part)}})
    return content


def encode_data_url(image: Image) -> str:
    """A picture as a data URL of the type that its first bytes show; pixels are written as PNG."""
    source = image.source
    data = _png(source) if isinstance(source, Pixels) else source if isinstance(source, bytes) else source.read_bytes()
    kind = next((kind for magic, at, kind in _MAGIC if data[at : at + len(magic)] == magic), "application/octet-stream")
    return f"data:{kind};base64," + base64.b64encode(data).decode("ascii")


def _png(pixels: Pixels) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    row = 3 * pixels.width
    rows = b"".join(b"\0" + pixels.rgb[at : at + row] for at in range(0, len(pixels.rgb), row))  # each row says that it is not filtered
    head = struct.pack(">2I5B", pixels.width, pixels.height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def decode_data_url(url: str, *, where: str = "image_url") -> bytes:
    """The bytes of a ``data:...;base64,...`` URL; strict alphabet and padding, the stated type is ignored (I3, I15, I16)."""
    if len(url) > MAX_DATA_URL:
        raise ImageError(f"a data URL of {len(url)} characters", code="image_too_large", where=where, remedy=f"stay under {MAX_DATA_URL}")
    head, comma, body = url.partition(",")
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        raise ImageError("not a base64 data URL", code="image_bad_data_url", where=where, remedy="send data:image/png;base64,<data>")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            "the data is not valid base64", code="image_bad_base64", where=where, remedy="use the standard alphabet with padding"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a reply is chosen. ``temperature`` 0 is greedy; ``num_beams`` > 1 searches; ``stop`` strings end the reply and are not shown.

    Raises SamplingError naming the parameter (hardening P7, P10).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    max_new_tokens: int = 512
    stop: tuple[str, ...] = field(default=())
    seed: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("num_beams", self.num_beams, 1, 64)
        _number("max_new_tokens", self.max_new_tokens, 1, 1_000_000)
        if self.seed is not None:
            _number("seed", self.seed, 0, 2**64 - 1)
        if len(self.stop) > 16 or any(not s for s in self.stop):
            raise SamplingError(
                f"{len(self.stop)} stop strings" if len(self.stop) > 16 else "an empty stop string",
                code="bad_parameter",
                where="stop",
                remedy="give at most 16 non-empty strings",
            )
        if self.num_beams > 1 and self.temperature > 0:
            raise SamplingError("beam search with a temperature", code="bad_parameter", where="num_beams", remedy="use temperature 0")

    def but(self, **changes: Any) -> Sampling:
        """The same, with some fields changed."""
        return replace(self, **changes)


def _number(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < low or value > high or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise SamplingError(
            f"{value!r} is not in {bracket}{low}, {high}]", code="bad_parameter", where=name, remedy="choose a value in that range"
        )
