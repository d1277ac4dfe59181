"""Reading in parts: the attention is sdpa's, memories are exact, and every kind of language model says what it says alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engines import SMALL, Steps, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.assistant import Assistant
from llavakit.model.cpu import accelerate_cpu
from llavakit.model.llava import Llava
from llavakit.serve import reading
from llavakit.serve.engine import _processors
from llavakit.serve.memory import Memory, Shape
from llavakit.serve.reading import attend, reader_for
from llavakit.types import Conversation, Sampling
from test_families import made
from tiny import tiny_config, tiny_processor

SHAPE = Shape(layers=2, heads=2, width=4, dtype=torch.float32, device=torch.device("cpu"))
TOGETHER: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3"},
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
}
ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "attn_logit_softcapping": 1.0, "sliding_window": 24},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, "max_position_embeddings": 1024},
}


@settings(max_examples=80, deadline=None)
@given(
    groups=st.sampled_from([1, 3]), rows=st.integers(1, 11), past=st.integers(0, 9), spare=st.integers(0, 5),
    window=st.sampled_from([None, 1, 3, 7]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_is_sdpa(groups: int, rows: int, past: int, spare: int, window: int | None, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    length = past + rows
    query = torch.randn(2 * groups, rows, 8).to(dtype)
    keys, values = torch.randn(2, 2, length + spare, 8).to(dtype)
    wide = [states[:, :length].repeat_interleave(groups, 0).float() for states in (keys, values)]
    at, key = torch.arange(past, length)[:, None], torch.arange(length)
    seen = (key <= at) & (key > at - (window or length))
    wanted = F.scaled_dot_product_attention(query.float(), *wide, attn_mask=seen, scale=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BLOCK", 4)
        found = attend(query * 0.3, keys, values, past=past, window=window)
        by_sdpa = reading._by_sdpa(query * 0.3, keys, values, past=past, window=window)
    tolerance = 8e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(by_sdpa.float(), wanted, rtol=0, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 90), min_size=1, max_size=6), crop=st.integers(0, 500), seed=st.integers(0, 9))
def test_a_memory_holds_what_was_written(counts: list[int], crop: int, seed: int) -> None:
    torch.manual_seed(seed)
    memory = Memory(SHAPE, most=sum(counts))
    written = torch.randn(2, 2, 2, sum(counts), 4)  # layers, keys or values, heads
    for count in counts:
        start = memory.length
        memory.make_room(start + count)
        for layer in range(2):
            memory.write(layer, *written[layer, :, :, start : start + count])
        memory.grow(count)
    assert memory.length == sum(counts)
    assert memory.nbytes <= SHAPE.bytes_for(memory.length)
    part = memory.copy(min(crop, memory.length), most=1000, now=600)
    memory.crop(min(crop, memory.length))
    for layer in range(2):
        for place in range(2):
            for one in (memory, part):
                kept = one.layer(layer)[place][:, : one.length]
                assert torch.equal(kept, written[layer, place, :, : min(crop, sum(counts))])
    assert SHAPE.positions_in(SHAPE.bytes_for(100)) >= 100


def served(tokenizer: Any, fields: dict[str, Any]) -> Assistant:
    text = dict(tiny_config(tokenizer).text) | {"initializer_range": 0.2} | fields
    torch.manual_seed(5)
    model = Llava(tiny_config(tokenizer, text=text)).eval()
    accelerate_cpu(model)
    return Assistant(model, tiny_processor(tokenizer))


@pytest.mark.parametrize("name", [*TOGETHER, *ONE_BY_ONE])
def test_every_language_model_says_together_what_it_says_alone(tokenizer: Any, name: str) -> None:
    helper = served(tokenizer, TOGETHER.get(name) or ONE_BY_ONE.get(name) or {})
    sampling = Sampling(max_new_tokens=10)
    talks = [Conversation.ask("Which one? " * number, *([picture(number)] if number % 2 else ())) for number in range(1, 6)]
    alone = ["".join(helper.reply(talk, sampling)) for talk in talks]
    steps = Steps(helper, SMALL.but(running=3, chunk=20, chunk_alone=30))
    assert steps.reader.packed is (name in TOGETHER)
    jobs = [steps.job(talk, sampling) for talk in talks]
    steps.finish()
    assert [steps.said(job).text for job in jobs] == alone
    assert len(set(alone)) > 1
    assert ["".join(helper.reply(talk, sampling)) for talk in talks] == alone, "and alone still"


def test_in_bfloat16_scores_are_within_rounding(tokenizer: Any) -> None:
    """16 prompts in one row and each alone: the largest difference, of the largest score."""
    helper = served(tokenizer, {})
    helper.model.to(torch.bfloat16)
    reader = reader_for(helper.model)
    assert reader.packed
    table = helper.model.language_model.get_input_embeddings()
    with torch.inference_mode():
        rows = [table(torch.randint(3, 500, (number + 3,))) for number in range(16)]
        parts = [reading.Part(reader.new_memory(most=40, now=20), one) for one in rows]
        together = reader.read(parts)
        alone = torch.cat([reader.read([reading.Part(reader.new_memory(most=40, now=20), one)]) for one in rows])
    assert (together - alone).abs().max() <= 0.02 * alone.abs().max()


def test_low_detail_is_the_base_view_alone(tokenizer: Any) -> None:
    model, processor = made(tokenizer, "next", "llama")
    low = _processors(processor)["low"]
    talk = Conversation.ask("What is this?", picture(3, 90, 60))
    both = [one.encode(talk, learn=False) for one in (processor, low)]
    assert [len(inputs.views) for inputs in both] == [5, 1]
    assert torch.equal(both[0].views[:1], both[1].views)
    assert both[1].grids[0].tokens == 17, "sixteen features and the end of a row"
    assert len(both[1].input_ids) == len(both[0].input_ids) - both[0].grids[0].tokens + 17
    steps = Steps(Assistant(model, low))
    job = steps.job(talk, Sampling(max_new_tokens=8))
    steps.finish()
    assert steps.said(job).text == "".join(Assistant(model, low).reply(talk, Sampling(max_new_tokens=8)))
