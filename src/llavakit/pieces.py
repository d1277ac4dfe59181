"""Text to token ids, exactly as transformers does it, except that special tokens are never read from what a person wrote.

text the template wrote   "</s>USER: "   --split-->  "</s>" (by id)   "USER: " (as text)
text a person wrote       "say </s>"     ----------------------------> as text, every character of it
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from llavakit.errors import PromptError
from llavakit.prompts import Template


class Pieces:
    """The tokenizer in two manners: special tokens never read from text, and the blank in front only where transformers puts it.

    ``first``: at the very beginning of the text. ``later``: after a special token. (Vicuna's puts the blank in both, Metaspace "first"
    only in the one, byte-level ones in neither.) ``bare``: no blank at all, to go on in the middle of a text.
    """

    def __init__(self, tokenizer: Any, image_token: str) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state |= {"truncation": None, "padding": None, "post_processor": None}
        for token in state["added_tokens"]:
            token["special"] |= token["content"] == image_token
        self.controls: dict[str, int] = {token["content"]: token["id"] for token in state["added_tokens"] if token["special"]}
        self._forbidden = frozenset(self.controls.values()) - {tokenizer.unk_token_id}
        self._first = _text_only(state)
        later = _without_blank(state, only_first=True)
        self._later = self._first if later == state else _text_only(later)
        self._without_any_blank = _without_blank(state, only_first=False)
        longest_first = sorted(self.controls, key=len, reverse=True)
        self._any_control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else re.compile("(?!)")
        self._eos: str | None = tokenizer.eos_token
        begin = tokenizer("").input_ids
        self.head: list[int] = [token for token in begin if token == tokenizer.bos_token_id]

    @cached_property
    def _bare(self) -> Tokenizer:
        return _text_only(self._without_any_blank)  # seldom needed, and a large vocabulary takes a while to read

    def known_end(self, template: Template) -> Template:
        """The template with the tokenizer's own end token where it does not know the template's."""
        if template.plain_end or template.end in self.controls or not template.end.strip() or self._eos is None:
            return template
        return template.ending(self._eos)

    def split(self, text: str) -> list[str]:
        """Words and special tokens of a text the template wrote."""
        return [part for part in self._any_control.split(text) if part]

    def encode(self, words: Sequence[tuple[str, bool]], *, first: bool) -> Iterator[tuple[list[int], bool]]:
        """(ids, learned) of consecutive texts as if they were one, except where a token would span two of them (see the module)."""
        encoder, text = (self._first if first else self._later), ""
        done: list[int] = []
        for more, learned in words:
            whole = self._ids(encoder, text + more)
            if whole[: len(done)] == done:
                yield whole[len(done) :], learned
                text, done = text + more, whole
            else:
                encoder, text, done = self._bare, more, self._ids(self._bare, more)
                yield done, learned

    def _ids(self, encoder: Tokenizer, text: str) -> list[int]:
        """The ids of plain text. A Unigram model may hold special tokens as ordinary pieces; such a spelling is encoded in two halves."""
        ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        spelling = self._any_control.search(text)
        if spelling is None:
            raise PromptError("the text turns into a special token", code="bad_characters", remedy="reword it")
        cut = spelling.start() + 1
        return self._ids(encoder, text[:cut]) + self._ids(self._bare, text[cut:])


def _text_only(state: dict[str, Any]) -> Tokenizer:
    made = Tokenizer.from_str(json.dumps(state))
    made.encode_special_tokens = True
    return made


def _without_blank(state: Any, *, only_first: bool) -> Any:
    """A tokenizer's state with the blank in front taken away: only Metaspace's "first", or every kind there is."""
    if isinstance(state, list):
        return [_without_blank(part, only_first=only_first) for part in state if only_first or not _prepends(part)]
    if not isinstance(state, dict):
        return state
    changed = {key: part if key in ("model", "decoder") else _without_blank(part, only_first=only_first) for key, part in state.items()}
    if changed.get("prepend_scheme") == "first" or (not only_first and "prepend_scheme" in changed):
        changed["prepend_scheme"] = "never"
    if not only_first:
        changed = {key: None if key == "normalizer" and _prepends(part) else part for key, part in changed.items()}
        if changed.get("add_prefix_space"):
            changed["add_prefix_space"] = False
    return changed


def _prepends(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"
