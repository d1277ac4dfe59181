"""Generation: greedy and beam search give transformers' ids; batch == one by one; cache == no cache; sampling keeps its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llavakit.errors import ContextError
from llavakit.model import generation
from llavakit.model.cpu import accelerate_cpu
from llavakit.model.generation import Past, check_context, decode_one, generate, new_generator, prefill, sample, stream
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig, clip
from llavakit.processor import Batch
from llavakit.tiling import Grid
from llavakit.types import Sampling

IMAGE, ENDS, ROWS, CONTEXT = 5, frozenset({2, 7}), 61, 96
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": 9}, "qwen2": {}}


def _model(kind: str = "llama", seed: int = 0) -> Llava:
    """A small random model whose scores are far apart, so that rounding decides nothing."""
    text = {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": ROWS, "max_position_embeddings": CONTEXT, "initializer_range": 0.4,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": sorted(ENDS), "pad_token_id": 0, **KINDS[kind],
    }  # fmt: skip
    torch.manual_seed(seed)
    vision = clip(size=28, width=32, layers=2, heads=2, patch=14, projection=16)
    model = Llava(ModelConfig(vision=vision, text=text, image_token_id=IMAGE))
    return model.eval()


def _batch(lengths: list[int], seed: int = 0, images: tuple[int, ...] = ()) -> Batch:
    """Random prompts padded on the left; the rows named in ``images`` begin with a picture of four tokens."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(8, ROWS, (length,), generator=random)
        mask[row, -length:] = True
        if row in images:
            ids[row, -length : -length + 4 or None] = IMAGE
    grid = Grid.single(28, 14)
    views = torch.randn(len(images), 3, 28, 28, generator=random)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(ids, torch.full_like(ids, -100), mask, positions, views, (grid,) * len(images))


def _row(batch: Batch, row: int, images: tuple[int, ...] = ()) -> Batch:
    """One row alone, without its padding."""
    real = batch.mask[row]
    at = images.index(row) if row in images else 0
    picture = slice(at, at + (row in images))
    ids, labels, positions = (t[row : row + 1, real] for t in (batch.input_ids, batch.labels, batch.positions))
    return Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), positions, batch.views[picture], batch.grids[picture])


def _theirs(model: Llava, batch: Batch, *, beams: int, new: int) -> list[list[int]]:
    """transformers' generate on the same embeddings, cut at the end token."""
    rows = model.language_model.generate(
        inputs_embeds=model.embed(batch), attention_mask=batch.mask.long(), num_beams=beams, max_new_tokens=new, do_sample=False,
        eos_token_id=sorted(ENDS), pad_token_id=0, length_penalty=1.0, early_stopping=False,
    )  # fmt: skip
    return [_cut(row) for row in rows.tolist()]


def _cut(row: list[int]) -> list[int]:
    ends = [at for at, token in enumerate(row) if token in ENDS]
    return row[: ends[0]] if ends else row


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_greedy_and_beams_give_the_ids_of_transformers(kind: str) -> None:
    lengths = set()
    for seed in range(2):
        model, batch = _model(kind, seed), _batch([9, 5, 14], seed, images=(1, 2))
        expected = {beams: _theirs(model, batch, beams=beams, new=18) for beams in (1, 2, 4)}
        for fast in (False, True):
            if fast:
                accelerate_cpu(model, packed=(model.vision_tower,))
            for beams, rows in expected.items():
                found = generate(model, batch, sampling=Sampling(num_beams=beams, max_new_tokens=18), stop_ids=ENDS)
                assert found == rows, (seed, fast, beams)
                lengths |= {len(row) for row in rows}
    assert len(lengths) > 2, "some replies end early, some do not"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=3), Sampling(num_beams=3)])
def test_a_batch_equals_its_rows_one_by_one(sampling: Sampling) -> None:
    sampling = sampling.but(max_new_tokens=20)
    images = (0, 3)
    model, batch = _model(), _batch([12, 3, 1, 7], 4, images)
    together = generate(model, batch, sampling=sampling, stop_ids=ENDS)
    for row, expected in enumerate(together):
        assert generate(model, _row(batch, row, images), sampling=sampling, stop_ids=ENDS) == [expected]
        if sampling.num_beams == 1:
            assert list(stream(model, _row(batch, row, images), sampling=sampling, stop_ids=ENDS)) == expected


def test_the_cache_changes_no_token() -> None:
    model, batch = _model("qwen2"), _batch([6], 1)
    found = list(stream(model, batch, sampling=Sampling(max_new_tokens=15), stop_ids=frozenset()))
    ids = batch.input_ids
    for token in found:
        with torch.inference_mode():
            best = model.language_model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        assert int(best) == token
        ids = torch.cat([ids, best[None, None]], 1)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_memory_cut_back_and_continued_equals_reading_anew(kind: str) -> None:
    model, batch = _model(kind), _batch([10], 2)
    past = Past.empty(model)
    prefill(model, batch, past)
    decode_one(model, torch.tensor([9]), past)
    past.keep(7)
    rest = Batch(*(t[:, 7:] for t in (batch.input_ids, batch.labels, batch.mask, batch.positions)), batch.views, batch.grids)
    torch.testing.assert_close(prefill(model, rest, past), prefill(model, batch, Past.empty(model)), rtol=1e-4, atol=1e-4)
    assert past.length == 10
    past.keep(0)
    assert past.length == past.cache.get_seq_length() == 0


def test_rows_that_have_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(model: Llava, tokens: Tensor, past: Past) -> Tensor:
        sizes.append(len(tokens))
        return decode_one(model, tokens, past)

    monkeypatch.setattr(generation, "decode_one", counted)
    model, batch = _model(), _batch([5, 5, 5], 5)
    seen = [0, 0, 0]

    def ends(row: int, token: int) -> bool:
        seen[row] += 1
        return seen[row] == (4, 2, 6)[row]

    rows = generate(model, batch, sampling=Sampling(max_new_tokens=9), stop_ids=frozenset(), ends=ends)
    assert [len(row) for row in rows] == [4, 2, 6]
    assert sizes == [3, 2, 2, 1, 1]
    full = generate(model, batch, sampling=Sampling(max_new_tokens=6), stop_ids=frozenset())
    assert rows == [row[: len(short)] for row, short in zip(full, rows, strict=True)]


def test_a_stream_reads_a_token_only_when_the_next_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(model: Llava, tokens: Tensor, past: Past) -> Tensor:
        calls.append(int(tokens))
        return decode_one(model, tokens, past)

    monkeypatch.setattr(generation, "decode_one", counted)
    model, batch, past = _model(), _batch([5], 6), Past.empty(_model())
    tokens = stream(model, batch, sampling=Sampling(max_new_tokens=4), stop_ids=frozenset(), past=past)
    first = next(tokens)
    assert calls == []
    second = next(tokens)
    assert calls == [first]
    tokens.close()
    assert past.length == 6
    assert len([first, second, *stream(model, batch, sampling=Sampling(max_new_tokens=1), stop_ids=frozenset())]) == 3
    assert calls == [first], "the last token of a reply is never read"


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    model, batch = _model(), _batch([CONTEXT - 10], 0)
    assert len(generate(model, batch, sampling=Sampling(max_new_tokens=10), stop_ids=frozenset())[0]) == 10
    for call in (generate, lambda *a, **k: next(stream(*a, **k))):
        with pytest.raises(ContextError) as caught:
            call(model, batch, sampling=Sampling(max_new_tokens=11), stop_ids=frozenset())
        assert caught.value.code == "context_length_exceeded"
        assert all(number in str(caught.value) for number in ("86 prompt", "11 new", "context of 96", "at most 10"))
    with pytest.raises(ContextError, match="shorten"):
        check_context(model, prompt=CONTEXT, new=1)


SCORES = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30)


@settings(max_examples=150, deadline=None)
@given(scores=SCORES, temperature=st.floats(0.01, 5), top_p=st.floats(0.01, 1), seed=st.integers(0, 2**64 - 1))
def test_a_drawn_token_lies_in_the_smallest_set_that_holds_top_p(scores: list[float], temperature: float, top_p: float, seed: int) -> None:
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    row = torch.tensor([scores])
    token = int(sample(row, sampling, [new_generator(seed)]))
    assert token == int(sample(row, sampling, [new_generator(seed)])), "the seed decides"
    probabilities = torch.softmax(row.double()[0] / temperature, -1)
    better = probabilities[probabilities > probabilities[token] * (1 + 1e-9)].sum().item()
    assert better < top_p + 1e-9


@settings(max_examples=60, deadline=None)
@given(scores=SCORES, seed=st.integers(0, 99))
def test_the_limits_of_sampling_are_greedy(scores: list[float], seed: int) -> None:
    row = torch.tensor([scores])
    best = row.max()
    for sampling in (Sampling(), Sampling(temperature=1e-6), Sampling(temperature=1e-30), Sampling(temperature=0.5, top_p=1e-9)):
        token = int(sample(row, sampling, [new_generator(seed)]))
        assert row[0, token] >= best - 1e-4


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = new_generator(11)
    for top_p, expected in ((1.0, probabilities), (0.9, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95)):
        sampling = Sampling(temperature=1.0, top_p=top_p)
        drawn = sample(probabilities.log().expand(4000, 4), sampling, [generator] * 4000)
        found = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


def test_without_a_seed_draws_differ() -> None:
    row, sampling = torch.zeros(1, 100_000), Sampling(temperature=1.0)
    assert len({int(sample(row, sampling, [new_generator(None)])) for _ in range(4)}) > 1
