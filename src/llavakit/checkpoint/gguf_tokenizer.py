"""A tokenizer of LLaMA's kind as llama.cpp's "llama" vocabulary: pieces, their kinds and their scores.

Such a tokenizer is byte-pair encoding over '▁' for blanks with bytes for unknown characters: SentencePiece's files as transformers
converts them, and the miniature's. It merges the pair that stands first in a list; llama.cpp merges the pair whose joint piece has the
highest score. With minus the place in the list as the score the two agree wherever a piece may be made from any two that join to it.
That holds for SentencePiece's lists by construction, and for others nearly (docs/gguf.md has the count for the miniature).

    merges   ▁ t    h e    ▁t he           score of ▁t = 0, he = -1, ▁the = -2
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from llavakit.errors import CheckpointError

BLANK = "▁"
NEVER = -1e9  # the score of a piece that no merge makes
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Kind(IntEnum):
    """The kinds of a token in GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """One entry for each row of the embedding table; ``special`` are the ids of bos, eos, unk and pad that exist."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[Kind, ...]
    special: Mapping[str, int]
    begins: bool
    blank_in_front: bool

    @staticmethod
    def of(tokenizer: Any, *, rows: int) -> Vocabulary:
        """The vocabulary of a tokenizer of transformers. Raises CheckpointError ``unsupported_tokenizer``."""
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        blank_in_front = _check(state)
        model, added = state["model"], {token["id"]: token for token in state["added_tokens"]}
        score: dict[str, float] = {}
        for place, merge in enumerate(model["merges"]):
            left, right = merge if isinstance(merge, list) else merge.split(" ")
            score.setdefault(left + right, -float(place))
        named = {number: piece for piece, number in model["vocab"].items()} | {number: token["content"] for number, token in added.items()}
        pieces = tuple(named.get(number, f"[PAD{number}]") for number in range(rows))

        def kind(number: int, piece: str) -> Kind:
            if number not in named:
                return Kind.UNUSED
            if piece == model["unk_token"]:
                return Kind.UNKNOWN
            if number in added:
                return Kind.CONTROL if added[number]["special"] else Kind.USER_DEFINED
            if _BYTE.fullmatch(piece):
                return Kind.BYTE
            return Kind.NORMAL if piece in score or len(piece) == 1 else Kind.UNUSED

        ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
        return Vocabulary(
            pieces=pieces,
            scores=tuple(score.get(piece, NEVER) for piece in pieces),
            kinds=tuple(kind(number, piece) for number, piece in enumerate(pieces)),
            special={name: number for name, number in ids.items() if number is not None},
            begins=tokenizer("").input_ids[:1] == [tokenizer.bos_token_id],
            blank_in_front=blank_in_front,
        )

    def tell(self, writer: Any) -> None:
        """Give a GGUFWriter the vocabulary's keys."""
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.pieces)
        writer.add_token_scores(self.scores)
        writer.add_token_types([int(kind) for kind in self.kinds])
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.blank_in_front)


def _check(state: Mapping[str, Any]) -> bool:
    """Whether a blank is put in front of a text. Raises CheckpointError unless the tokenizer is one of LLaMA's kind."""
    model = state["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise _unsupported(f"it is {model.get('type')} {'with' if model.get('byte_fallback') else 'without'} byte fallback")
    replaces, front = False, False
    for step in [*_steps(state.get("normalizer"), "normalizers"), *_steps(state.get("pre_tokenizer"), "pretokenizers")]:
        if step["type"] == "Prepend" and step["prepend"] == BLANK:
            front = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == BLANK:
            replaces = True
        elif step["type"] == "Metaspace" and step["replacement"] == BLANK:
            replaces, front = True, step.get("prepend_scheme", "always") != "never"
        else:
            raise _unsupported(f"it prepares text with {step['type']}")
    if not replaces:
        raise _unsupported(f"it does not write blanks as {BLANK}")
    return front


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    return [] if part is None else list(part[inner]) if part["type"] == "Sequence" else [part]


def _unsupported(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}; only byte-pair encoding as LLaMA does it can be written for llama.cpp",
        code="unsupported_tokenizer",
        where="tokenizer.json",
        remedy="use the llava-hf checkpoint with transformers or vLLM",
    )
