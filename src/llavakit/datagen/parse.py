"""A teacher's reply -> the turns of a conversation, or a typed reason to reject it (spec 5.3, hardening G4).

    Question:            the form asked for. Read all the same, because there is only one way to read them:
    what was asked         **Question:** or Q1:     the text on the marker's own line     a fence around the whole
    ===                    no line of ===           one more of them at the end           words before the first question
    Answer:
    what was answered    Everything else is rejected: two answers in a row, a part without text, words after a closing ===.

A detailed description and an answer to a person's own question are bare text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llavakit.responder import Finish

Kind = Literal["conversation", "detail", "reasoning", "answer"]
Turns = tuple[tuple[str, str], ...]
"""Questions with their answers. Of bare text the question is empty: the plan knows what the person says there."""


@dataclass(frozen=True)
class Reject:
    """Why a reply is not used. ``code`` is for counting, ``detail`` for a person."""

    code: str
    detail: str


_FINISH = {
    "length": Reject("too_long", "the reply ended at its allowance of tokens"),
    "filter": Reject("filtered", "the server's filter withheld the reply"),
    "cut": Reject("cut_off", "the connection ended before the reply did"),
}
_SEPARATOR = re.compile(r"\s*={3,}\s*")
_MARKER = re.compile(r"[\s*_#>]*(question|answer|q|a)[ ]?\d{0,2}[*_]*\s*:[*_]*(?:\s+|$)(.*)", re.IGNORECASE | re.DOTALL)
_FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
_VERDICT = re.compile(r"[\s*_`\"]*(keep|drop)\b[*_`\"]*[\s:,.–—-]*(.*)", re.IGNORECASE | re.DOTALL)
_BAD = re.compile("[\0\ufffd\ud800-\udfff]")
_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]?m|i am|we are|we're)\s+(?:very\s+|so\s+|really\s+)?(?:sorry|afraid|unable|not able)\b"
    r"|(?:i\s+)?apologi[sz]e|my apologies|sorry[,.!]"
    r"|i\s+(?:can(?:no|['’])t|cannot|could not|couldn['’]t|won['’]t|will not|do not|don['’]t)\s+"
    r"(?:\w+\s+)?(?:(?:help|assist|comply|create|generate|provide|answer|describe|discuss|have access|fulfil+)\b"
    r"|(?:see|view|access|open)\s+(?:\w+\s+)?(?:images?|pictures?|photo(?:graph)?s?)\b)"
    r"|as an? (?:ai|artificial|language model|text-based|large language)\b"
    r"|unfortunately,? i\b)",
    re.IGNORECASE,
)


def read(kind: Kind, text: str, finish: Finish = "stop") -> Turns | Reject:
    """The turns of a reply, or why there are none."""
    if finish != "stop":
        return _FINISH[finish]
    text = _unfenced(text.replace("\r\n", "\n").strip())
    if not text:
        return Reject("empty", "the reply holds no text")
    if bad := _BAD.search(text):
        return Reject("bad_characters", f"the reply holds U+{ord(bad[0]):04X}")
    if refuses(text):
        return Reject("refusal", text.split("\n")[0][:120])
    if kind in ("conversation", "reasoning"):
        return _dialogue(text, only=1 if kind == "reasoning" else None)
    return _bare(text)


def refuses(text: str) -> bool:
    """Does a text begin as refusals do?"""
    return _REFUSAL.match(text) is not None


def verdict(text: str) -> str | Reject | None:
    """A review's reply: None to keep the sample, the reason to drop it, or a Reject where it is neither."""
    found = _VERDICT.fullmatch(text.strip())
    if found is None:
        return Reject("no_verdict", text.strip()[:120])
    return None if found[1].lower() == "keep" else (found[2].strip() or "no reason given")


def write(turns: Turns) -> str:
    """Turns in the form that is asked of teachers: what ``read`` reads back."""
    parts = (part for question, answer in turns for part in (f"Question:\n{question}", f"Answer:\n{answer}"))
    return "\n===\n".join(parts)


def _dialogue(text: str, *, only: int | None) -> Turns | Reject:
    parts = list(_parts(text.split("\n")))
    first = next((number for number, (role, _) in enumerate(parts) if role), None)
    if first is None:
        return Reject("no_turns", "no line begins with Question: or Answer:")
    if first > 1:
        return Reject("stray_text", f"{first} parts stand before the first question")
    parts = parts[first:]
    for number, (role, words) in enumerate(parts):
        due = "answer" if number % 2 else "question"
        if not role:
            return Reject("stray_text", f"words that belong to no turn: {words[:80]!r}")
        if role != due:
            return Reject("unbalanced", f"part {number + 1} is another {role}, not the {due} that is due")
        if not words:
            return Reject("empty_turn", f"{role} {number // 2 + 1} holds no text")
    if len(parts) % 2:
        return Reject("unbalanced", "the last question has no answer")
    texts = [words for _, words in parts]
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    if only is not None and len(turns) != only:
        return Reject("turn_count", f"{len(turns)} questions where {only} was asked for")
    return turns


def _parts(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(role, text) of every part that holds anything; words without a marker have no role. Markers are long or short, never both."""
    long = any((found := _MARKER.fullmatch(line)) and len(found[1]) > 1 for line in lines)
    role, words, opened = "", list[str](), False
    for line in lines:
        found = _MARKER.fullmatch(line)
        marker = found if found and (len(found[1]) > 1) == long else None
        if marker is None and not _SEPARATOR.fullmatch(line):
            words.append(line)
            continue
        if opened or "".join(words).strip():
            yield role, "\n".join(words).strip()
        role, words, opened = "", [], marker is not None
        if marker is not None:
            role, words = "question" if marker[1][0] in "Qq" else "answer", [marker[2]]
    if opened or "".join(words).strip():
        yield role, "\n".join(words).strip()


def _bare(text: str) -> Turns | Reject:
    lines = text.split("\n")
    if any(_SEPARATOR.fullmatch(line) for line in lines) or any((m := _MARKER.fullmatch(line)) and len(m[1]) > 1 for line in lines):
        return Reject("wrong_form", "questions and answers where a description alone was asked for")
    return (("", text),)


def _unfenced(text: str) -> str:
    fenced = _FENCE.fullmatch(text)
    return fenced[1].strip() if fenced else text
