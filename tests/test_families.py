"""Any causal language model under any member of the family: loaded from its files, cached, batched, saved, it is one and the same model.

Members: LLaVA v1 (linear, cropped), 1.5 (padded), 1.5-HD (padded base, tiles), NeXT (squashed base, tiles). Language models: Llama,
Mistral, Qwen2, Phi-3 and Gemma shapes of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llavakit.assistant import Assistant
from llavakit.checkpoint import store
from llavakit.model.generation import generate, stream
from llavakit.model.llava import Llava
from llavakit.preprocess import Preprocess
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES
from llavakit.tiling import HD, RELEASED, tiles_of
from llavakit.types import Conversation, Sampling
from tiny import tiny_config
from twins import picture

SIDE = 56
MEMBERS: dict[str, tuple[dict[str, Any], Any]] = {
    "v1": ({"projector": "linear"}, "square"),
    "1.5": ({}, "pad"),
    "1.5-hd": ({"canvases": tiles_of(HD, SIDE), "merge": "spatial_unpad"}, "pad"),
    "next": ({"canvases": tiles_of(RELEASED, SIDE), "merge": "spatial_unpad"}, "squash"),
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 64},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3"},
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
}
NEW, SIZES = 8, ((90, 60), (60, 90), (300, 40), (30, 30))
ENDLESS: frozenset[int] = frozenset()


def made(tokenizer: Any, member: str, language_model: str) -> tuple[Llava, Processor]:
    fields, aspect = MEMBERS[member]
    text = dict(tiny_config(tokenizer).text) | LANGUAGE_MODELS[language_model] | {"initializer_range": 0.2}
    torch.manual_seed(5)
    model = Llava(tiny_config(tokenizer, text=text, **fields)).eval()
    processor = Processor(
        tokenizer=tokenizer,
        template=TEMPLATES["vicuna_v1"],
        preprocess=Preprocess(size=SIDE, aspect=aspect),
        tiling=model.config.tiling,
        max_length=1024,
    )
    return model, processor


def asked() -> list[Conversation]:
    """Pictures of several sizes, two pictures, and words alone."""
    talks = [Conversation.ask("What is this?", picture(number, *size)) for number, size in enumerate(SIZES)]
    return [*talks, Conversation.ask("Which one?", picture(8, 90, 60), picture(9, 40, 120)), Conversation.ask("Is there a star?")]


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("member", MEMBERS)
def test_batched_replies_are_the_single_ones(tokenizer: Any, member: str, language_model: str) -> None:
    """Greedy, left padding, different numbers of tiles in one batch."""
    model, processor = made(tokenizer, member, language_model)
    inputs = [processor.encode(talk, learn=False) for talk in asked()]
    sampling = Sampling(max_new_tokens=NEW)
    together = generate(model, processor.collate(inputs, side="left"), sampling=sampling, stop_ids=ENDLESS)
    alone = [generate(model, processor.collate([one], side="left"), sampling=sampling, stop_ids=ENDLESS)[0] for one in inputs]
    assert together == alone
    assert len({tuple(reply) for reply in alone}) > 1, "the replies depend on the question"


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_the_cache_changes_no_token(tokenizer: Any, language_model: str) -> None:
    model, processor = made(tokenizer, "next", language_model)
    batch = processor.collate([processor.encode(asked()[0], learn=False)], side="left")
    found = list(stream(model, batch, sampling=Sampling(max_new_tokens=NEW), stop_ids=ENDLESS))
    with torch.inference_mode():
        embeddings = model.embed(batch)
        for token in found:
            best = model.language_model(inputs_embeds=embeddings, use_cache=False).logits[0, -1].argmax()
            assert int(best) == token
            embeddings = torch.cat([embeddings, model.language_model.get_input_embeddings()(best[None, None])], 1)


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("member", MEMBERS)
def test_what_was_saved_is_what_is_loaded(tokenizer: Any, member: str, language_model: str, tmp_path: Path) -> None:
    model, processor = made(tokenizer, member, language_model)
    store.save(model, processor, tmp_path / "model")
    again, reader = store.load(tmp_path / "model", dtype="fp32")
    assert reader.preprocess == processor.preprocess
    inputs = processor.encode(asked()[0], learn=False)
    read = reader.encode(asked()[0], learn=False)
    assert read.input_ids.tolist() == inputs.input_ids.tolist()
    assert torch.equal(read.views, inputs.views)
    with torch.inference_mode():
        ours, theirs = (one(processor.collate([inputs], side="left"), full_logits=True).logits for one in (model, again))
    assert torch.equal(ours, theirs)


def test_the_fast_paths_of_a_cpu_change_no_greedy_token(tokenizer: Any, tmp_path: Path) -> None:
    for member in MEMBERS:
        model, processor = made(tokenizer, member, "llama")
        batch = processor.collate([processor.encode(talk, learn=False) for talk in asked()], side="left")
        plain = generate(model, batch, sampling=Sampling(max_new_tokens=NEW), stop_ids=ENDLESS)
        store.save(model, processor, tmp_path / member)
        quick = Assistant.load(tmp_path / member, dtype="fp32", device="cpu")
        assert generate(quick.model, batch, sampling=Sampling(max_new_tokens=NEW), stop_ids=ENDLESS) == plain, member
