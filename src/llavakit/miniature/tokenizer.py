"""The miniature's tokenizer: byte-pair encoding as LLaMA does it, trained on the drawn world's own text.

Normaliser, byte fallback and decoder are LLaMA's (a leading '▁', unknown characters as bytes), so prompts, masks and streaming take
exactly the paths that they take for Vicuna. Ids: 0 <unk>, 1 <s>, 2 </s>, then 256 bytes, pieces, and last <image>, <pad>.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.config import parse
from llavakit.scenes.questions import questions
from llavakit.scenes.statements import captions, statements
from llavakit.scenes.world import WORDS, scenes

VOCAB = 1024
SPECIAL = ("<unk>", "<s>", "</s>")
IMAGE, PAD = "<image>", "<pad>"
PROSE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the human's questions.",
    "USER: ASSISTANT: USER: ASSISTANT:",
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "What is this? Describe the picture. What do you see? Hello! Please tell me about it, thank you.",
)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How the tokenizer is trained."""

    out: Path = Path("build/tiny/tokenizer")
    """folder for the tokenizer"""
    vocab: int = VOCAB
    """ids in all"""
    scenes: int = 6000
    """training scenes whose words are read"""


def corpus(count: int = 6000) -> Iterator[str]:
    """Text of the drawn world (train split) and of the prompts."""
    yield from PROSE * 40
    for number, scene in zip(range(count), scenes("train"), strict=False):
        rng = random.Random(number)
        yield from captions(scene, rng)[:3]
        yield from sorted(statements(scene))[:12]
        for question in questions(scene, rng):
            yield f"{question.question} {question.answer}"
    for words in WORDS:
        yield from [f"the word {words}", words] * 5


def train_tokenizer(*, vocab: int = VOCAB, count: int = 6000) -> Any:
    """The trained tokenizer as transformers' PreTrainedTokenizerFast with ``vocab`` ids in all."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    reserved = [*SPECIAL, *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab - 2, special_tokens=reserved, show_progress=False, min_frequency=2)
    learner.train_from_iterator(corpus(count), trainer)
    learned = _model_state(learner)
    pieces = dict(learned["vocab"])
    for filler in range(len(pieces), vocab - 2):  # a tiny corpus may not fill the table; rows stay unused
        pieces[f"<unused{filler}>"] = filler
    pieces |= {IMAGE: vocab - 2, PAD: vocab - 1}
    merges = [tuple(merge) for merge in learned["merges"]]
    whole = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=PAD, padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": [IMAGE]})
    assert len(fast) == vocab, len(fast)
    return fast


def _model_state(tokenizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return state


def run(words: Sequence[str] = ()) -> Path:
    """Train the tokenizer from ``key=value`` words and save it; returns the folder."""
    config = parse(TokenizerConfig(), words)
    train_tokenizer(vocab=config.vocab, count=config.scenes).save_pretrained(config.out)
    return config.out
