"""What a benchmark is: official files -> questions -> answers -> scores, under a protocol that says exactly how it is asked.

    official files --questions(folder, protocol)--> Question --harness--> answers.jsonl --> Answered --score--> Score
                                                                                            '--submit--> the official upload

A ``Protocol`` is everything that moves a number without changing the model: prompt format, suffix, OCR hints, aspect, allowance, judge.
It carries the numbers published under it, so that a score stands beside what was to be expected (users.md 7, 41). Each family of
benchmarks is one file that ends with its ``Benchmark`` values; ``benchmarks.py`` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llavakit.types import Conversation, Image, Sampling, system

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True)
class Published:
    """A number somebody printed. ``value`` is on the scale of the ``Score`` of that ``metric``; ``source`` says where it stands."""

    model: str
    metric: str
    value: float
    tolerance: float = 0.5
    "Within this a run counts as reproduced: rounding, and what kernels and library versions do."
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a benchmark is asked. ``None`` leaves a choice to the checkpoint."""

    name: str
    "As after ``--protocol``: llava-1.5, llava-1.6, no-ocr, ..."
    template: str | None = None
    "Prompt format (``prompts``)."
    aspect: str | None = None
    "image_aspect_ratio: pad, anyres, ...; the value a checkpoint's own processor must have."
    suffix: str = ""
    "What follows the question, on a line of its own."
    hints: bool = False
    "OCR tokens or captions that the official file brings are shown."
    max_new_tokens: int = 128
    temperature: float = 0.0
    passes: int = 1
    "2: the model is asked for its reasons, then goes on with its answer (``two_pass``)."
    judge: str | None = None
    "The judge of the published numbers."
    note: str = ""
    "What else a reader must know."
    published: tuple[Published, ...] = field(default=(), repr=False)

    def but(self, **changes: Any) -> Protocol:
        """The same with some fields changed."""
        return replace(self, **changes)

    def asked(self, question: str) -> str:
        """The question, the suffix on lines of its own behind it; LLaVA's own files have it already."""
        ending = f"\n{self.suffix}" if self.suffix else ""
        return question if question.endswith(ending) else question + ending

    @property
    def sampling(self) -> Sampling:
        """Greedy unless the protocol draws, as every published 1.5 and 1.6 number (spec 6.1)."""
        return Sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature)


LLAVA_15 = Protocol(name="llava-1.5", template="vicuna_v1", aspect="pad")
LLAVA_16 = Protocol(name="llava-1.6", aspect="anyres")  # each checkpoint in its own prompt format


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question as it is asked. ``id`` is unique in the benchmark, which official ids often are not (TextVQA, POPE, MME)."""

    id: str
    given: str | int
    "question_id of the official file, kept as number or text."
    prompt: str
    "All that is asked: hints and suffix too, without prompt format and picture."
    image: Image | None = None
    category: str = ""
    truth: Any = None
    "What the scorer compares with; None where it is not public."
    row: tuple[tuple[str, Any], ...] = field(default=(), repr=False)
    "Of the official row, what scorer or upload need besides (MMBench: columns that the upload repeats); not written with the answer."
    extra: tuple[tuple[str, Any], ...] = ()
    "Fields that the official answer file wants beside the text (MMBench: round_id, options, option_char)."
    system: str | None = None
    origin: Path | None = None
    "The official file that it stands in, for messages and for uploads that list more than was asked (VQAv2)."

    def conversation(self) -> Conversation:
        """The open conversation: picture first, then the prompt on its own line (spec 6.1)."""
        asked = Conversation.ask(self.prompt, *([self.image] if self.image is not None else []))
        return asked if self.system is None else Conversation((system(self.system), *asked.messages))


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question with what was replied; None where the answers file has no line for it."""

    question: Question
    text: str | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a report. ``half_width``: half of the 95 % interval, None where none is known."""

    metric: str
    value: float
    count: int
    "Questions it rests on."
    half_width: float | None = None
    headline: bool = False
    "The number that papers quote."


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the scorer makes of one answer, for the page of questions. ``points`` is 0 to 1."""

    parsed: str
    points: float
    expected: str = ""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark as a value. ``score``, ``verdict`` or ``submit`` is None where answers are not public or are scored here only."""

    name: str
    title: str
    needs: str
    "The official files and how they lie in the folder."
    reference: str
    "The scorer that is followed, and where we depart from it."
    protocols: tuple[Protocol, ...]
    "The first one is the default."
    questions: Callable[[Path, Protocol], list[Question]]
    "Raises DataError naming file and line."
    score: Callable[[Sequence[Answered]], list[Score]] | None = None
    verdict: Callable[[Answered], Verdict] | None = None
    submit: Callable[[Sequence[Answered], Path], Path] | None = None
    "Write the official upload into this folder; returns the file."
    make: Callable[[Path, int | None], None] | None = None
    "Make the files themselves, pictures of the first so many questions; None where they must be brought."
