"""From token ids to text, piece by piece, without ever taking a character back.

A piece is let out only when nothing that may still come can change it:

    ids -> decoded text -> no half characters -> no stop strings, nor halves of them -> no outer white space -> pieces

The pieces joined equal ``finished_text(decode(ids), stop)`` for any ids, which is how a reply that is not streamed is made too
(hardening P7, P8). No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

_BROKEN = "\ufffd"  # what decoders write for bytes that make no character (yet)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def stop_at(text: str, stop: Iterable[str]) -> int | None:
    """Where to cut ``text``: the beginning of the stop string that ends first, the longest of several ending together. None if none."""
    found = [(at + len(word), at) for word in stop if (at := text.find(word)) >= 0]
    return min(found)[1] if found else None


def finished_text(text: str, stop: Iterable[str] = (), *, begun: bool = False) -> str:
    """A whole decoded reply as it is shown: cut at the first stop string, no white space around it.

    ``begun``: it goes on a text, so white space in front of it stays.
    """
    text = text[: stop_at(text, stop)]
    return text.rstrip() if begun else text.strip()


def text_behind(said: Sequence[int], ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """What ``ids`` add to a reply of which ``said`` are the ids so far: many decoders drop the blank in front of what they get first."""
    return decode([*said, *ids])[len(decode(said)) :]


def held_ids(vocabulary: Mapping[str, int], special: Iterable[int]) -> frozenset[int]:
    """The ids after which text is not final: single-byte tokens, whose neighbours decide what they mean, and unseen special ones."""
    return frozenset(special) | {number for token, number in vocabulary.items() if _BYTE_TOKEN.fullmatch(token)}


class TextStream:
    """One reply being written.

    decode: token ids to text, special tokens left out.
    held: ids that are never the last of a piece (``held_ids``).
    stop: strings that end the reply and are not part of it.
    said: the ids of a reply that is begun already, on which these go on; then a blank in front is shown too.

    Decoding starts at a recent token instead of the first, so the work for a reply grows with its length, not with its square.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        held: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        said: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._held = held
        self._stop = tuple(stop)
        self._ids = list(said)  # the window: some ids already let out, for the decoder to lean on, then those that are not
        self._settled = len(said)  # how many ids of the window are let out
        self._before = decode(said) if said else ""  # their text
        self._half = ""  # decoded, but perhaps the beginning of a stop string
        self._space = ""  # white space that is shown only if something follows
        self._begun = bool(said)
        self.stopped = False  # a stop string was met; later tokens are ignored

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain, often empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        if token in self._held:
            return ""
        text = self._decode(self._ids)
        if text.endswith(_BROKEN):
            return ""
        fresh = text[len(self._before) :]
        tail = self._decode(self._ids[self._settled :])
        if tail:  # a visible start: decoders that drop a leading space drop it from both texts alike
            self._ids, self._before = self._ids[self._settled :], tail
        else:
            self._before = text
        self._settled = len(self._ids)
        return self._let_out(fresh, last=False)

    def finish(self) -> str:
        """No more tokens come: return what was held back."""
        if self.stopped:
            return ""
        fresh = self._decode(self._ids)[len(self._before) :]
        self._ids, self._settled, self._before = [], 0, ""
        return self._let_out(fresh, last=True)

    def _let_out(self, fresh: str, *, last: bool) -> str:
        text = self._half + fresh
        cut = stop_at(text, self._stop)
        self.stopped = cut is not None
        keep = 0 if last or self.stopped else _half_stop(text, self._stop)
        certain = text[:cut] if self.stopped else text[: len(text) - keep]
        self._half = text[len(text) - keep :]
        return self._trim(certain)

    def _trim(self, text: str) -> str:
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        self._begun = self._begun or bool(body)
        return body


def _half_stop(text: str, stop: Iterable[str]) -> int:
    """How many last characters of ``text`` may be the beginning of a stop string."""
    return max((size for word in stop for size in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:size])), default=0)
