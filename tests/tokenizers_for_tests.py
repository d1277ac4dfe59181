"""Four families of tokenizers, trained here on a few lines: what differs is where they put a blank and what they cut.

legacy     LLaMA and Vicuna: a blank before every run of text, also after a special token; bytes for unknown characters
metaspace  newer LLaMA classes: a blank only at the very beginning
bytes      GPT-2, Qwen2: bytes, words cut by a pattern, no blank in front, no beginning token
unigram    T5-like: special tokens are ordinary pieces of the model
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llavakit.prompts import CURIOUS_USER

FAMILIES = ("legacy", "metaspace", "bytes", "unigram")
LINES = [CURIOUS_USER, "USER: what is in the picture? ASSISTANT: a red circle and two blue squares.", "Hello there\n\n  friend.\nOK"] * 20
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def family(name: str) -> PreTrainedTokenizerFast:
    backend = {"legacy": _llama, "metaspace": _llama, "bytes": _bytes, "unigram": _unigram}[name]()
    if name == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if name == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names: dict[str, Any] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if name != "bytes":
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", normalized=False, special=True)]})
    return tokenizer


def _llama() -> Tokenizer:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    learner.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=420, special_tokens=reserved, show_progress=False))
    state = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    made = Tokenizer(models.BPE(vocab=state["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def _bytes() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(LINES, trainer)
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    made.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(LINES, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made
