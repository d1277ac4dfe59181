"""The kinds of training conversation and what a teacher is told for each: text files that anybody can replace.

    conversation.txt  detail.txt  reasoning.txt     [system] text, then examples: [user] context, [assistant] the reply wished for
    answer.txt  filter.txt                          for teachers who see: answer a person's question; keep or drop the result
    brief.txt  detailed.txt                         one instruction a line: what a person says when asking for a short or long description

The package's own are in ``prompts/`` beside this file. A folder of the user's may hold any of these names; the others stay ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from llavakit.datagen.parse import Kind, Reject, read
from llavakit.errors import ConfigError
from llavakit.types import IMAGE_MARKER, Conversation, Image, Message, Text, assistant, system, user

KINDS: tuple[Kind, ...] = ("conversation", "detail", "reasoning")
SHARES: Mapping[Kind, float] = {"conversation": 58, "detail": 23, "reasoning": 77}  # thousands in LLaVA-Instruct-158K
OWN = Path(__file__).parent / "prompts"
PROMPTS = ("conversation", "detail", "reasoning", "answer", "filter")
LISTS = ("brief", "detailed")
_ROLE = re.compile(r"\[(\w+)\]\s*")


@dataclass(frozen=True)
class Prompt:
    """What stands before a question: the system message and example turns (spec 5.2)."""

    system: str
    examples: tuple[tuple[str, str], ...]

    @cached_property
    def before(self) -> tuple[Message, ...]:
        turns = (message for context, reply in self.examples for message in (user(context), assistant(reply)))
        return (system(self.system), *turns)

    def ask(self, text: str, image: Image | None = None) -> Conversation:
        """The open conversation about one context; for a teacher who sees, the picture stands before the text."""
        parts = (Text(text),) if image is None else (image, Text("\n" + text))
        return Conversation((*self.before, Message("user", parts)))


@dataclass(frozen=True)
class Prompts:
    """Every text that this room says to teachers, or puts into a person's mouth."""

    texts: Mapping[str, Prompt]
    brief: tuple[str, ...]
    detailed: tuple[str, ...]

    @staticmethod
    def load(folder: Path | None = None) -> Prompts:
        """The package's files, each replaced by the one of the same name in ``folder``. Raises ConfigError with file and line."""
        files = {name: OWN / f"{name}.txt" for name in (*PROMPTS, *LISTS)}
        if folder is not None:
            files |= _replaced(folder)
        return Prompts(
            {name: _prompt(files[name], name) for name in PROMPTS}, brief=_lines(files["brief"]), detailed=_lines(files["detailed"])
        )

    def of(self, kind: Kind | Literal["filter"]) -> Prompt:
        return self.texts[kind]

    def digest(self, kind: Kind) -> str:
        """16 hexadecimal digits for all that decides a row of this kind beside its context: they stand in the row's provenance."""
        prompt = self.of(kind)
        said = [prompt.system, *(text for pair in prompt.examples for text in pair), *(self.detailed if kind == "detail" else ())]
        return hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]


def _replaced(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise _bad("no such folder", str(folder), "give a folder with text files")
    found = {path.stem: path for path in sorted(folder.glob("*.txt"))}
    unknown = sorted(set(found) - {*PROMPTS, *LISTS})
    if unknown or not found:
        what = f"no prompt is called {unknown[0]}.txt" if unknown else "no prompt in this folder"
        raise _bad(what, str(folder), f"the names are {', '.join(f'{name}.txt' for name in (*PROMPTS, *LISTS))}")
    return found


def _prompt(path: Path, name: str) -> Prompt:
    """A file's roles in their order: one system, then pairs of user and assistant; examples must be what the parser takes."""
    parts: list[tuple[str, list[str], int]] = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        marker = _ROLE.fullmatch(line)
        if marker:
            parts.append((marker[1], [], number))
        elif parts:
            parts[-1][1].append(line)
        elif line.strip():
            raise _bad("text before the first [system]", f"{path}:{number}", "begin the file with a line [system]")
    texts = []
    for place, (role, lines, number) in enumerate(parts):
        due = "system" if not place else "user" if place % 2 else "assistant"
        where, text = f"{path}:{number}", "\n".join(lines).strip()
        if role != due:
            raise _bad(f"[{role}] stands where [{due}] is due", where, "write [system], then [user] and [assistant] in turn")
        if not text or IMAGE_MARKER in text:
            raise _bad(f"[{role}] {f'spells {IMAGE_MARKER}' if text else 'holds no text'}", where, "reword it" if text else "write it")
        kind = next((kind for kind in KINDS if kind == name), None)
        if role == "assistant" and kind and isinstance(found := read(kind, text), Reject):
            raise _bad(f"an example that would be rejected ({found.code}): {found.detail}", where, "write it in the form asked for")
        texts.append(text)
    if len(texts) % 2 == 0:
        raise _bad("an example without a reply" if texts else "no [system]", str(path), "end the file with a part [assistant]")
    return Prompt(texts[0], tuple(zip(texts[1::2], texts[2::2], strict=True)))


def _lines(path: Path) -> tuple[str, ...]:
    lines = tuple(line.strip() for line in _text(path).split("\n") if line.strip())
    if not lines or any(IMAGE_MARKER in line for line in lines):
        raise _bad(f"a line spells {IMAGE_MARKER}" if lines else "no line", str(path), "write one instruction a line")
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad("not UTF-8", str(path), "save the file as UTF-8") from error


def _bad(what: str, where: str, remedy: str) -> ConfigError:
    return ConfigError(what, code="bad_prompt", where=where, remedy=remedy)
