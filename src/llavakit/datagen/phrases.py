"""Noun phrases of captions: spaCy's where it and an English model are installed, else those of a small chunker of our own.

    the  two   brown  dogs   are  sleeping  on  a  wooden  bench
    det  num   adj    noun   -    -ing      -   det adj    noun
         [two brown dogs]                          [wooden bench]

The chunker knows the closed classes of English and some words of captions (``words/english.txt``); every other word is decided by its
ending and its neighbours, and else it is a noun. A phrase is the longest run of modifiers and nouns that ends in a noun.

Both engines speak alike: lower case, single blanks, no determiner or possessive at the front, no phrase that is a pronoun alone.
A phrase of the chunker always is a piece of the caption, in lower case and with single blanks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol

from llavakit.errors import ConfigError, MissingExtraError

Choice = Literal["auto", "spacy", "builtin"]
MODELS = ("en_core_web_sm", "en_core_web_md", "en_core_web_lg", "en_core_web_trf")  # looked for in this order: the first is the fastest
_BEFORE_MODIFIER = ("", "of", "with", "in")  # "a portrait of smiling girls", but "reading, smiling"
_SUBJECTS = ("i", "you", "he", "she", "it", "we", "they", "who", "that", "which", "to")  # after these a verb is a verb
_TOKEN = re.compile(r"\d+(?:[/.,:]\d+)+|[\w\u0300-\u036f]+(?:[-'’&][\w\u0300-\u036f]+)*|\S")


class Engine(Protocol):
    """What finds phrases; ``name`` says which it is, with its version."""

    @property
    def choice(self) -> Literal["spacy", "builtin"]: ...

    @property
    def name(self) -> str: ...

    def phrases(self, captions: Sequence[str]) -> Iterator[list[str]]:
        """The phrases of each caption in their order, each as often as it stands there."""


def engine(choice: Choice = "auto") -> Engine:
    """The engine asked for; ``auto`` takes spaCy if it and a model are here. Raises MissingExtraError and ConfigError if not."""
    model = None if choice == "builtin" else _model(asked=choice == "spacy")
    return Builtin() if model is None else Spacy(model)


def normal(phrase: str) -> str:
    """Lower case, single blanks, without determiners at the front; empty for what is no phrase (a pronoun, a lone number)."""
    words = phrase.lower().split()
    start = next((at for at, word in enumerate(words) if word not in _words("determiner")), len(words))
    rest = words[start:]
    return "" if all(word in _words("break") or word in _words("number") for word in rest) else " ".join(rest)


# --- spaCy ----------------------------------------------------------------------------------------------------------------------------


def _model(*, asked: bool) -> str | None:
    """The first English model that is installed; None if there is none and spaCy was not asked for by name."""
    if find_spec("spacy") is None:
        if asked:
            what = "spaCy is not installed"
            raise MissingExtraError(what, code="missing_extra", remedy="pip install 'llavakit[filter]', or use the engine builtin")
        return None
    model = next((name for name in MODELS if find_spec(name) is not None), None)
    if model is None and asked:
        remedy = f"python -m spacy download {MODELS[0]}, or use the engine builtin"
        raise ConfigError("spaCy has no English model here", code="no_model", where="spacy", remedy=remedy)
    return model


class Spacy:
    """spaCy's noun chunks, which the paper used."""

    choice: Literal["spacy"] = "spacy"

    def __init__(self, model: str) -> None:
        import spacy

        self._pipe: Any = spacy.load(model, exclude=["ner"])
        self.name = f"spaCy {metadata.version('spacy')} with {model} {metadata.version(model)}"

    def phrases(self, captions: Sequence[str]) -> Iterator[list[str]]:
        for document in self._pipe.pipe(captions, batch_size=256):
            found = (normal(chunk.text) for chunk in document.noun_chunks)
            yield [phrase for phrase in found if phrase]


# --- our own --------------------------------------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """A word and its place in the caption. Kinds: ``d`` determiner, ``n`` number, ``a`` adjective, ``o`` noun, ``g`` in -ing,
    ``p`` participle, ``b`` adverb before an adjective, ``j`` the comma or "and" of two adjectives, ``x`` anything that ends a phrase.
    """

    word: str
    kind: str
    start: int
    end: int


class Builtin:
    """The chunker: the same caption always gives the same phrases, on every machine."""

    choice: Literal["builtin"] = "builtin"
    name = "built-in chunker 1"

    def phrases(self, captions: Sequence[str]) -> Iterator[list[str]]:
        return map(chunks, captions)


@dataclass(slots=True)
class Run:
    """The words of a phrase so far, whether a noun is among them, and whether a determiner stands before them."""

    words: list[Token]
    noun: bool = False
    determined: bool = False


def chunks(caption: str) -> list[str]:
    """The noun phrases of one caption by our own rules."""
    text = " ".join(caption.lower().split())
    tokens = [Token(found[0], _kind(found[0]), *found.span()) for found in _TOKEN.finditer(text)]
    spans, run, before, last = list[tuple[int, int]](), Run([]), "", len(tokens) - 1
    for at, token in enumerate(tokens):
        kind = _in_place(token, run, before, tokens[at + 1].kind if at < last else "x")
        before = token.word
        if kind in "dx" or (kind == "n" and run.noun):
            if run.noun:
                spans.append(_noun_phrase(run.words, before=kind))
            run = Run([], determined=kind == "d")
        if kind not in "dx":
            run.words.append(token if kind == token.kind else token._replace(kind=kind))
            run.noun = run.noun or kind == "o"
    if run.noun:
        spans.append(_noun_phrase(run.words, before="x"))
    return [text[start:end] for start, end in spans]


def _in_place(token: Token, run: Run, before: str, after: str) -> str:
    """The kind of a word where it stands: in ``run``, after the word ``before``, before a word of the kind ``after``."""
    word, kind, last = token.word, token.kind, run.words[-1].kind if run.words else ""
    if kind == "x":
        return "j" if word in (",", "and") and last in ("a", "p") and not run.noun and after in "ap" else "x"
    if kind == "o":
        follows = last == "o" if last else before in _SUBJECTS
        return "x" if follows and _is_verb(word, before) else "o"
    if kind == "b":
        return "b" if not run.noun and after in "apgb" else "a" if word in _words("adjective") else "x"
    if kind == "g":
        return _ing(word, run, before, content=after in "naogp")
    if kind == "p":
        joined = not run.noun or (last == "o" and word in _words("joined"))
        return "p" if joined and after in "naogp" else "x"
    return kind


def _ing(word: str, run: Run, before: str, *, content: bool) -> str:
    """A word in -ing: noun (the wedding, a parking meter), modifier (a sleeping dog), or the verb that ends a phrase (a dog sleeping)."""
    if run.noun:
        return "o" if content and word in _words("gerund") else "x"
    if not content:
        return "o" if run.determined else "x"
    if run.determined or run.words or word in _words("gerund"):
        return "a"
    return "a" if before in _BEFORE_MODIFIER and word not in _words("holding") else "x"


def _is_verb(word: str, before: str) -> bool:
    """Whether a word after a subject is its verb: a man "stands"; people, they and to "stand"."""
    return word in _third_persons() or (word in _words("verb") and (before in _SUBJECTS or _is_plural(before)))


def _noun_phrase(words: list[Token], *, before: str) -> tuple[int, int]:
    """From the first word to the last noun. A determiner right after a run means that its last word was a verb: a dog [chases] the ball."""
    end = len(words)
    if before == "d" and end > 1 and words[-1].kind == words[-2].kind == "o" and _is_plural(words[-2].word) != _is_plural(words[-1].word):
        end -= 1
    while words[end - 1].kind != "o":
        end -= 1
    return words[0].start, words[end - 1].end


def _is_plural(word: str) -> bool:
    ending = len(word) > 3 and word[-1] == "s" and word[-2:] not in ("ss", "us", "is", "'s", "’s")
    return word in _words("plural") or (ending and word not in _words("singular"))


@lru_cache(maxsize=1 << 16)
def _kind(word: str) -> str:
    """The kind of a word by the lists, else by its ending."""
    for kind, name in (("d", "determiner"), ("b", "adverb"), ("n", "number"), ("a", "adjective"), ("x", "break")):
        if word in _words(name):
            return kind
    if not any(map(str.isalnum, word)):
        return "x"
    if word in _words("participle"):
        return "p"
    if len(word) > 4 and word.endswith("ing") and word not in _words("noun-in-ing"):
        return "g"
    if len(word) > 3 and word.endswith("ed") and word not in _words("noun-in-ed"):
        return "p"
    if len(word) > 3 and word.endswith("ly") and word not in _words("noun-in-ly"):
        return "b"
    return "a" if len(word) > 4 and word.endswith(("ful", "ous", "able", "less", "ish")) and word not in _words("noun") else "o"


@cache
def _words(name: str) -> frozenset[str]:
    return _lists()[name]


@cache
def _third_persons() -> frozenset[str]:
    """stand -> stands, watch -> watches, carry -> carries."""

    def third(verb: str) -> str:
        if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
            return verb + "es"
        return verb[:-1] + "ies" if verb.endswith("y") and verb[-2] not in "aeiou" else verb + "s"

    return frozenset(map(third, _words("verb")))


@cache
def _lists() -> dict[str, frozenset[str]]:
    """The sections of the list of words."""
    text = (files("llavakit.datagen") / "words" / "english.txt").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    parts = re.split(r"^\[([\w-]+)\]$", lines, flags=re.MULTILINE)[1:]
    return {name: frozenset(words.split()) for name, words in zip(parts[::2], parts[1::2], strict=True)}
