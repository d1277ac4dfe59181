"""A throwaway Llama-style tokenizer and tiny random models, made where they are needed; nothing is fetched."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llavakit.images import Preprocess
from llavakit.model.presets import ModelConfig, clip, llama
from llavakit.processor import Processor
from llavakit.prompts import CURIOUS_HUMAN, CURIOUS_USER, TEMPLATES
from llavakit.tiling import Tiling

CORPUS = (
    CURIOUS_USER,
    CURIOUS_HUMAN,
    "USER: ASSISTANT: USER: What is in the picture? ASSISTANT: A red circle left of a blue square.",
    "How many things are there? There are three things, two of them green. Is there a star? Yes. No.",
    "Answer the question using a single word or phrase. Describe the image concisely. The word is hello, the number is 42.",
)


def llama_tokenizer(*, bare: bool = False) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with LLaMA's normaliser, byte fallback and decoder; ids 0 <unk>, 1 <s>, 2 </s>, bytes, pieces, <image>, <pad>.

    ``bare``: without the last two, as a language model has it.
    """
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=510, special_tokens=reserved, show_progress=False, min_frequency=2)
    learner.train_from_iterator([line for line in CORPUS for _ in range(9)], trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = learned["vocab"]
    if not bare:
        pieces |= {"<image>": len(pieces), "<pad>": len(pieces) + 1}
    merges = [tuple(merge) for merge in learned["merges"]]
    whole = Tokenizer(models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"}
    if bare:
        return PreTrainedTokenizerFast(tokenizer_object=whole, **named)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", **named)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def tiny_config(tokenizer: Any, **changes: Any) -> ModelConfig:
    """A model of the family that a test can afford: views of 56 pixels, 16 tokens each."""
    text = llama(width=32, layers=2, heads=4, feed_forward=64, rows=len(tokenizer), positions=1024, pad=tokenizer.pad_token_id)
    fields: dict[str, Any] = {
        "vision": clip(size=56, width=32, layers=3, heads=2, projection=16),
        "text": text | {"num_key_value_heads": 2},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    return ModelConfig(**fields | changes)


def tiny_processor(tokenizer: Any) -> Processor:
    return Processor(
        tokenizer=tokenizer,
        template=TEMPLATES["vicuna_v1"],
        preprocess=Preprocess(size=56, aspect="pad"),
        tiling=Tiling(side=56),
        max_length=1024,
    )
