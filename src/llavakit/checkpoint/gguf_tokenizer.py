"""A fast tokenizer as the keys of a GGUF file.

    byte-pair encoding with byte fallback (Llama 2, Vicuna, Mistral, the miniature)  -> "llama": pieces and scores, SentencePiece's way
    byte-level byte-pair encoding of Llama 3 and GPT-2                              -> "gpt2": pieces and merges
    anything else                                                                   -> CheckpointError unsupported_tokenizer

SentencePiece joins the neighbours whose union has the best score; ours joins by the rank of the merge. A piece's score is therefore the
rank of its first merge, negative. The two agree when every split of a piece into two pieces is a merge too, as it is in tokenizers
that came from SentencePiece; ``Words.loose`` counts the splits that are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llavakit.errors import CheckpointError
from llavakit.processor import Processor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the token types of the format
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True, repr=False)
class Words:
    """A vocabulary as llama.cpp reads it."""

    model: Literal["llama", "gpt2"]
    split: str  # how the text is cut before merging
    pieces: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    loose: int
    settings: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """The keys ``tokenizer.*``."""
        scored = {"tokenizer.ggml.scores": list(self.scores)} if self.model == "llama" else {"tokenizer.ggml.merges": list(self.merges)}
        return {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.split,
            "tokenizer.ggml.tokens": list(self.pieces),
            "tokenizer.ggml.token_type": list(self.kinds),
            **scored,
            **self.settings,
        }


def read(processor: Processor, *, rows: int) -> Words:
    """The processor's tokenizer, filled up with unused pieces to the rows of the embedding table."""
    tokenizer = processor.tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"a {model['type']} tokenizer")
    spoken = bool(model.get("byte_fallback"))
    pieces: dict[int, str] = {number: piece for piece, number in model["vocab"].items()}
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    pieces |= {number: entry["content"] for number, entry in added.items()}
    merges = [(left, right) for left, right in (_pair(merge) for merge in model["merges"])]
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
    filled = [pieces.get(number, f"[PAD{number}]") for number in range(rows)]
    return Words(
        model="llama" if spoken else "gpt2",
        split="default" if spoken else _byte_level(state["pre_tokenizer"]),
        pieces=filled,
        kinds=[_kind(number, pieces, added, tokenizer.unk_token_id) for number in range(rows)],
        scores=[-float(ranks.get(piece, len(merges))) for piece in filled],
        merges=[f"{left} {right}" for left, right in merges],
        loose=_loose(ranks, set(merges), set(pieces.values())),
        settings=_settings(processor, state, spoken),
    )


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _loose(ranks: Mapping[str, int], merges: set[tuple[str, str]], known: set[str]) -> int:
    splits = ((piece[:cut], piece[cut:]) for piece in ranks for cut in range(1, len(piece)))
    return sum(left in known and right in known and (left, right) not in merges for left, right in splits)


def _kind(number: int, pieces: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], unknown: int | None) -> int:
    if number not in pieces:
        return UNUSED
    if number == unknown:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    piece = pieces[number]
    return BYTE if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else NORMAL


def _settings(processor: Processor, state: Mapping[str, Any], spoken: bool) -> dict[str, Any]:
    """Special ids, what is put in front, and the chat template without the marks that only training reads."""
    tokenizer = processor.tokenizer
    ids = {
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
    }
    chat = processor.template.jinja().replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    spaced = {"tokenizer.ggml.add_space_prefix": _leads_with_space(state)} if spoken else {}
    begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return {
        **{name: int(value) for name, value in ids.items() if value is not None},
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": False,
        **spaced,
        "tokenizer.chat_template": chat,
    }


def _leads_with_space(state: Mapping[str, Any]) -> bool:
    """Whether a text gets a '▁' in front: by the normaliser (Llama's first way) or by Metaspace (the later one)."""
    normalizer, splitter = state.get("normalizer") or {}, state.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or splitter.get("prepend_scheme", "never") != "never"


def _byte_level(splitter: Mapping[str, Any] | None) -> str:
    """llama.cpp's name for the pattern that cuts the text; unknown patterns would give other ids, so they are refused."""
    steps = (splitter or {}).get("pretokenizers", [splitter or {}])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if levels and patterns == [_LLAMA3]:
        return "llama-bpe"
    if levels and not patterns and levels[0].get("use_regex", True):
        return "gpt-2"
    raise _unsupported("byte-pair encoding with a pattern not known here")


def _unsupported(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} cannot be written as GGUF",
        code="unsupported_tokenizer",
        where="tokenizer.json",
        remedy="serve the llava-hf layout with vLLM",
    )
