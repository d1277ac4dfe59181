"""The small Llama decoder: trained on text alone, it stands in for Vicuna.

Its text is the drawn world told in words: a description, then questions about it, in the same Vicuna prompt that stage 2 will use. It
learns to speak, to follow the prompt, and to look things up in what stands before; it never sees a picture. Every conversation is
drawn afresh, so no text is read twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llavakit.config import parse, save
from llavakit.images import Preprocess
from llavakit.miniature.tower import note
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES
from llavakit.scenes.questions import pick
from llavakit.scenes.statements import article, captions, where
from llavakit.scenes.world import Scene, scenes
from llavakit.tiling import Tiling
from llavakit.train.attention import use_training_attention
from llavakit.train.optim import Kind, Optimizer, factor
from llavakit.types import Conversation, Message, assistant, user


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """How the decoder is built and trained."""

    out: Path = Path("build/tiny/decoder")
    """folder for the decoder, its tokenizer and its metrics"""
    tokenizer: Path = Path("build/tiny/tokenizer")
    """folder of the tokenizer"""
    width: int = 192
    """hidden size"""
    layers: int = 6
    """decoder layers"""
    heads: int = 6
    """attention heads"""
    feed_forward: int = 512
    """width of the gated feed-forward layers"""
    positions: int = 1024
    """longest sequence in tokens"""
    steps: int = 600
    """optimizer steps"""
    batch: int = 32
    """conversations a step"""
    turns: int = 7
    """questions in a conversation"""
    rate: float = 2e-3
    """peak learning rate (cosine)"""
    optimizer: Kind = "muon"
    """adamw or muon"""
    weight_decay: float = 0.05
    """weight decay"""
    warmup: int = 60
    """steps of linear warm-up"""
    prose_weight: float = 0.3
    """weight of the text that is not an answer"""
    seed: int = 0
    """seed of weights and scenes"""


def told(scene: Scene, rng: random.Random) -> str:
    """The whole scene in words, small print and order included."""
    sentences = [captions(scene, rng)[0]]
    for back, front in scene.overlaps:
        sentences.append(f"{article(scene.things[front].name)} in front of {article(scene.things[back].name)}.")
    sentences += [f"small print {where(s.place)} that says {s.text}." for s in scene.signs if s.type == "small"]
    rng.shuffle(sentences)
    return " ".join(sentences)


def conversation(scene: Scene, rng: random.Random, *, turns: int) -> Conversation:
    """A description followed by questions; one in five only asks for the description in other words."""
    pairs = [(q.question, q.answer) for q in pick(scene, rng, turns)]
    if rng.random() < 0.2:
        pairs.insert(0, ("Describe the picture.", captions(scene, rng)[3]))
    messages: list[Message] = []
    for number, (question, answer) in enumerate(pairs):
        asked = f"{told(scene, rng)}\n{question}" if number == 0 else question
        messages += [user(asked), assistant(answer)]
    return Conversation(tuple(messages))


def texts(config: DecoderConfig, rng: random.Random) -> Iterator[Conversation]:
    """Fresh conversations without end, about scenes of the train split."""
    for scene in scenes("train", start=200_000_000 + 50_000_000 * config.seed):
        yield conversation(scene, rng, turns=config.turns)


def batches(config: DecoderConfig, processor: Any, rng: random.Random) -> Iterator[Any]:
    """Batches of encoded conversations, right padded."""
    stream = texts(config, rng)
    while True:
        rows = [processor.encode(next(stream), learn=True) for _ in range(config.batch)]
        yield processor.collate(rows, side="right")


def text_loss(logits: Tensor, ids: Tensor, labels: Tensor, mask: Tensor, *, prose_weight: float) -> Tensor:
    """Mean cross-entropy of the answers plus a share of that of all other text (ids, labels, mask B.T; logits B.T.V)."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    answer = (labels[:, 1:] != -100).flatten().float()
    prose = mask[:, 1:].flatten().float() - answer
    return (loss * answer).sum() / answer.sum() + prose_weight * (loss * prose).sum() / prose.sum()


def train_decoder(config: DecoderConfig, processor: Any, *, log: Path | None = None, bf16: bool = True) -> Any:
    """A LlamaForCausalLM trained on the told world."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    tokenizer = processor.tokenizer
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=config.width, intermediate_size=config.feed_forward,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=config.positions,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            rms_norm_eps=1e-5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    use_training_attention(model)
    rates = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    optimizer = Optimizer(
        model, rates, lr=config.rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), clip=1.0, kind=config.optimizer
    )
    started, total = time.monotonic(), 0.0
    for step, batch in zip(range(config.steps), batches(config, processor, rng), strict=False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=batch.input_ids, use_cache=False).logits  # padded on the right, where causal attention never looks
        loss = text_loss(logits, batch.input_ids, batch.labels, batch.mask, prose_weight=config.prose_weight)
        loss.backward()
        optimizer.clip_gradients()
        optimizer.step(factor(step, steps=config.steps, warmup=config.warmup / config.steps))
        optimizer.forget_gradients()
        total += loss.item()
        if (step + 1) % 50 == 0:
            right = answer_accuracy(logits, batch.labels)
            note({"step": step + 1, "loss": total / 50, "answers": right, "seconds": round(time.monotonic() - started, 1)}, log)
            total = 0.0
    return model


def answer_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of answer tokens predicted rightly (teacher forced)."""
    wanted = labels[:, 1:]
    learned = wanted != -100
    return float((logits[:, :-1].argmax(-1) == wanted)[learned].float().mean())


def run(words: Sequence[str] = ()) -> Path:
    """Train the decoder from ``key=value`` words and save it with its tokenizer; returns the folder."""
    from transformers import AutoTokenizer

    config = parse(DecoderConfig(), words)
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    sight = Preprocess(size=112, aspect="pad")  # no picture will come; a processor is told one all the same
    template = TEMPLATES["vicuna_v1"]
    processor = Processor(tokenizer=tokenizer, template=template, preprocess=sight, tiling=Tiling(side=112), max_length=config.positions)
    config.out.mkdir(parents=True, exist_ok=True)
    log = config.out / "metrics.jsonl"
    log.unlink(missing_ok=True)
    model = train_decoder(config, processor, log=log)
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    save(config, config.out / "decoder.yaml")
    return config.out
