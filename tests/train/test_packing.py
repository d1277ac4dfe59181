"""Packed rows: the same loss and the same gradients as samples apart; every sample once, dealt fairly, whatever the number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from llavakit.config import TrainConfig
from llavakit.data.loader import Loader, deal
from llavakit.data.sources import Source, read_llava
from llavakit.errors import ConfigError
from llavakit.model.llava import Llava
from llavakit.processor import Batch
from llavakit.train.attention import use_training_attention
from llavakit.train.loop import train
from llavakit.types import Conversation, assistant
from test_families import LANGUAGE_MODELS, asked, made


def taught() -> list[Conversation]:
    """The questions of the families with replies of several lengths, the longest far beyond the window of the sliding Mistral."""
    replies = ["A dog.", "Nothing at all.", "word " * 40, "It is red and round.", "No.", "A few more words than that."]
    return [talk.then(assistant(reply)) for talk, reply in zip(asked(), replies, strict=True)]


def gradients(model: Llava, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the mean loss over all learned tokens of the batches."""
    model.zero_grad()
    outputs = [model(batch) for batch in batches]
    learned = sum(int(output.learned) for output in outputs)
    loss = sum(output.loss_sum for output in outputs) / learned
    loss.backward()
    return float(loss.detach()), {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def same(one: tuple[float, dict[str, torch.Tensor]], other: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        scale = float(other[1][name].abs().max())
        assert float((value - other[1][name]).abs().max()) <= 1e-5 * max(scale, 1e-3), name


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("member", ["1.5", "next"])
def test_packed_is_unpacked(tokenizer: Any, member: str, language_model: str) -> None:
    """Loss and every gradient, in fp32: alone, padded, packed, and packed by transformers' own mask."""
    model, processor = made(tokenizer, member, language_model)
    model.train()
    inputs = [processor.encode(talk, learn=True) for talk in taught()]
    alone = gradients(model, [processor.collate([one], side="right") for one in inputs])
    masked = gradients(model, [processor.pack(inputs)])  # sdpa finds the borders in the positions and builds the whole mask
    use_training_attention(model.language_model)
    padded = gradients(model, [processor.collate(inputs, side="right")])
    packed = gradients(model, [processor.pack(inputs)])
    two = gradients(model, [processor.pack(inputs[:2]), processor.pack(inputs[2:])])
    for found in (masked, padded, packed, two):
        same(found, alone)


def test_packed_is_unpacked_in_bfloat16_with_the_cpus_own_attention(tokenizer: Any) -> None:
    model, processor = made(tokenizer, "1.5", "llama")
    model.train()
    use_training_attention(model.language_model)
    inputs = [processor.encode(talk, learn=True) for talk in taught()]
    with torch.autocast("cpu", torch.bfloat16):
        alone = gradients(model, [processor.pack([one]) for one in inputs])
        packed = gradients(model, [processor.pack(inputs)])
    assert packed[0] == pytest.approx(alone[0], rel=1e-2)
    for name, value in packed[1].items():
        assert torch.nn.functional.cosine_similarity(value.flatten(), alone[1][name].flatten(), 0) > 0.99, name


def test_no_example_sees_another(tokenizer: Any) -> None:
    """What stands before an example in the row changes nothing of it, not even the last bit."""
    model, processor = made(tokenizer, "1.5", "llama")
    use_training_attention(model.language_model)
    inputs = [processor.encode(talk, learn=True) for talk in taught()]
    last = len(inputs[-1].input_ids)
    rows = [model(processor.pack(part), full_logits=True).logits[0, -last:] for part in ([inputs[0], inputs[-1]], [inputs[2], inputs[-1]])]
    assert torch.equal(rows[0], rows[1])


def test_a_packed_row_is_as_long_as_its_examples(tokenizer: Any) -> None:
    _, processor = made(tokenizer, "next", "llama")
    inputs = [processor.encode(talk, learn=True) for talk in taught()]
    row = processor.pack(inputs)
    assert row.input_ids.shape == (1, sum(row.segments))
    assert row.positions[0].tolist() == [place for length in row.segments for place in range(length)]
    assert len(row.grids) == sum(len(one.grids) for one in inputs)
    assert int(row.mask.sum()) == sum(row.segments)


costs = st.lists(st.integers(1, 4000), min_size=1, max_size=200)


@given(costs, st.integers(1, 24), st.booleans())
def test_dealing_loses_nothing_and_is_fair(costs: list[int], parts: int, alike: bool) -> None:
    order = list(range(len(costs)))
    dealt = deal(order, dict(enumerate(costs)), parts, alike=alike)
    assert len(dealt) == parts
    assert sorted(index for part in dealt for index in part) == order
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
    if alike:
        ranked = [costs[index] for part in dealt for index in part]
        assert ranked == sorted(ranked, reverse=True)
    elif len(costs) % parts == 0:
        sums = [sum(costs[index] for index in part) for part in dealt]
        assert max(sums) - min(sums) <= max(costs), "no batch is heavier than another by more than one sample"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Twenty-three samples of very different lengths."""
    import json

    folder = tmp_path_factory.mktemp("lengths")
    turns = [[{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "so " * (1 + number**2 % 60)}] for number in range(23)]
    (folder / "data.json").write_text(json.dumps([{"id": f"s{n}", "conversations": turn} for n, turn in enumerate(turns)]))
    return read_llava(folder / "data.json")


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_an_epoch_on_any_number_of_ranks(source: Source, tokenizer: Any, workers: int, pack: bool) -> None:
    """World sizes 1, 2 and 3: the windows hold the same samples, the ranks share them, and all make as many batches."""
    _, processor = made(tokenizer, "1.5", "llama")
    told = []
    for world in (1, 2, 3):
        loaders = [
            Loader(
                source, processor, batch_size=2, accumulation=3, seed=4, lengths=source.lengths(), pack=pack, rank=rank, world=world,
                workers=workers,
            )
            for rank in range(world)
        ]  # fmt: skip
        ranks = [[window for window, _ in zip(loader, range(loader.steps_per_epoch), strict=False)] for loader in loaders]
        assert len({tuple(len(window.batches) for window in rank) for rank in ranks}) == 1
        told.append([frozenset(name for window in windows for ids in window.ids for name in ids) for windows in zip(*ranks, strict=True)])
        names = Counter(name for rank in ranks for window in rank for ids in window.ids for name in ids)
        assert set(names.values()) == {1}
        assert len(names) == len(source)
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (3, 2)])
def test_every_sample_once_when_another_world_goes_on(source: Source, tokenizer: Any, worlds: tuple[int, int]) -> None:
    """Half of the windows in one world, the rest of the epoch in the other, from the number that a checkpoint holds."""
    _, processor = made(tokenizer, "1.5", "llama")
    names: Counter[str] = Counter()
    given = {"batch_size": 2, "accumulation": 3, "seed": 4, "lengths": source.lengths(), "pack": True}
    for world, start, stop in ((worlds[0], 0, 2), (worlds[1], 2, 4)):
        for rank in range(world):
            loader = Loader(source, processor, rank=rank, world=world, **given)  # type: ignore[arg-type]
            loader.restore({"window": start})
            windows = [window for _, window in zip(range(stop - start), loader, strict=False)]
            assert loader.state() == {"window": stop}
            names += Counter(name for window in windows for ids in window.ids for name in ids)
    assert set(names.values()) == {1}
    assert len(names) == len(source)


def test_a_rank_without_samples_keeps_in_step(source: Source, tokenizer: Any) -> None:
    """The last window has seven samples for eight batches: one is empty, and the model makes a loss of zero of them."""
    model, processor = made(tokenizer, "1.5", "llama")
    given = {"batch_size": 1, "accumulation": 8, "seed": 4, "lengths": source.lengths(), "pack": True, "world": 8}
    loaders = [Loader(source, processor, rank=rank, **given) for rank in range(8)]  # type: ignore[arg-type]
    windows = [next(window for window in loader if window.step == 2) for loader in loaders]
    assert sorted(window.samples for window in windows) == [0] + [1] * 7
    (empty,) = next(window for window in windows if window.samples == 0).batches
    model.train()
    output = model(empty)
    output.loss_sum.backward()
    assert (float(output.loss_sum.detach()), int(output.learned)) == (0.0, 0)
    assert all(value.grad is not None for value in model.multi_modal_projector.parameters())


def test_a_language_model_that_would_mix_the_samples_is_refused(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPT and Bloom, for example, ignore the borders; padded they train."""
    monkeypatch.setattr(LlamaForCausalLM, "_supports_attention_backend", False)
    with pytest.raises(ConfigError, match="pack=false"):
        train(finetune)
    assert train(replace(finetune, pack=False, steps=1)).step == 1
