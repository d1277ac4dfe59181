"""The twin law for tiles: a random tiny LlavaNextForConditionalGeneration of transformers, through our loader, is the same model; and back.

Pictures of many sizes, batches that mix sizes and rows without a picture; transformers' processor and generate are the reference.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaNextConfig, LlavaNextForConditionalGeneration

from llavakit.checkpoint import store
from llavakit.model.generation import generate
from llavakit.model.presets import ModelConfig
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES
from llavakit.tiling import RELEASED, tiles_of
from llavakit.types import Conversation, Sampling
from tiny import tiny_config, tiny_processor
from twins import FAMILIES, NEW, Twin, apart, picture, their_inputs

SIZES = (
    (56, 56), (40, 40), (112, 56), (56, 112), (112, 112), (100, 67), (67, 100), (160, 50), (50, 160), (168, 56), (56, 168), (300, 20),
    (20, 300), (57, 55), (55, 57), (31, 200), (200, 31), (90, 89), (89, 90), (400, 300), (300, 400), (13, 17), (17, 13), (150, 149),
    (333, 111), (111, 333), (84, 56), (56, 84), (224, 224), (99, 33),
)  # fmt: skip


def tiled(config: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(config, canvases=tiles_of(RELEASED, config.image_size), merge="spatial_unpad", **changes)


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    folder = tmp_path_factory.mktemp("next") / request.param
    text = dict(tiny_config(tokenizer).text) | FAMILIES[request.param] | {"initializer_range": 0.2}
    config = tiled(tiny_config(tokenizer, text=text))
    Processor(
        tokenizer=tokenizer,
        template=TEMPLATES["llava_hf"],
        preprocess=replace(tiny_processor(tokenizer).preprocess, aspect="squash"),
        tiling=config.tiling,
        max_length=1024,
    ).save(folder)
    torch.manual_seed(3)
    theirs = LlavaNextForConditionalGeneration(LlavaNextConfig(**config.to_hf())).eval()
    theirs.save_pretrained(folder)
    theirs.generation_config.eos_token_id = None  # a random model must not stop by chance
    ours, read = store.load(folder, dtype="fp32")
    return Twin(folder=folder, theirs=theirs, reader=AutoProcessor.from_pretrained(folder), ours=ours, processor=read)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ids_pixels_and_logits_are_the_same_at_every_size(twin: Twin, size: tuple[int, int]) -> None:
    talk = Conversation.ask("What is this?", picture(0, *size))
    theirs = their_inputs(twin, [talk])
    batch = twin.processor.collate([twin.processor.encode(talk, learn=False)], side="left")
    assert batch.input_ids.tolist() == theirs["input_ids"].tolist()
    deviation = torch.tensor(twin.processor.preprocess.std)[:, None, None]
    assert ((batch.views - theirs["pixel_values"][0]) * deviation).abs().max() <= 1 / 255
    with torch.inference_mode():
        expected = twin.theirs(**theirs | {"pixel_values": batch.views[None]}).logits
        assert apart(twin.ours(batch, full_logits=True).logits, expected) <= 1e-5


@pytest.mark.parametrize("size", [(100, 67), (20, 300), (333, 111)], ids=str)
def test_greedy_replies_are_the_same(twin: Twin, size: tuple[int, int]) -> None:
    talk = Conversation.ask("What is this?", picture(1, *size))
    theirs = their_inputs(twin, [talk])
    batch = twin.processor.collate([twin.processor.encode(talk, learn=False)], side="left")
    theirs["pixel_values"] = batch.views[None]
    written = twin.theirs.generate(**theirs, max_new_tokens=NEW, do_sample=False)[0, batch.input_ids.shape[1] :]
    assert generate(twin.ours, batch, sampling=Sampling(max_new_tokens=NEW), stop_ids=frozenset()) == [written.tolist()]


def test_a_batch_of_mixed_sizes_and_words_is_the_same(twin: Twin) -> None:
    pictures = [picture(number, *size) for number, size in enumerate(SIZES[5:9])]
    talks = [
        Conversation.ask("What is this?", pictures[0]),
        Conversation.ask("Is there a star?"),
        Conversation.ask("How many things are there in both?", *pictures[1:3]),
        Conversation.ask("What is left?", pictures[3]),
    ]
    theirs = their_inputs(twin, talks)
    batch = twin.processor.collate([twin.processor.encode(talk, learn=False) for talk in talks], side="left")
    assert batch.input_ids.tolist() == theirs["input_ids"].tolist()
    views = batch.views.split([grid.views for grid in batch.grids])
    most = max(len(view) for view in views)
    stacked = torch.stack([torch.cat([view, view.new_zeros(most - len(view), *view.shape[1:])]) for view in views])
    assert stacked.shape == theirs["pixel_values"].shape
    with torch.inference_mode():
        expected = twin.theirs(**theirs | {"pixel_values": stacked, "position_ids": batch.positions}).logits[batch.mask]
        assert apart(twin.ours(batch, full_logits=True).logits[batch.mask], expected) <= 1e-5


def test_batched_replies_are_the_single_ones(twin: Twin) -> None:
    talks = [Conversation.ask("What is this?", picture(number, *size)) for number, size in enumerate(SIZES[8:12])]
    inputs = [twin.processor.encode(talk, learn=False) for talk in (*talks, Conversation.ask("Is there a star?"))]
    sampling = Sampling(max_new_tokens=NEW)
    together = generate(twin.ours, twin.processor.collate(inputs, side="left"), sampling=sampling, stop_ids=frozenset())
    alone = [generate(twin.ours, twin.processor.collate([one], side="left"), sampling=sampling, stop_ids=frozenset())[0] for one in inputs]
    assert together == alone


def test_what_we_save_loads_there_and_is_the_same(twin: Twin, tmp_path: Path) -> None:
    store.save(twin.ours, twin.processor, tmp_path / "back")
    model, report = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    expected, found = twin.theirs.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    again = Twin(
        folder=tmp_path,
        theirs=model.eval(),
        reader=AutoProcessor.from_pretrained(tmp_path / "back"),
        ours=twin.ours,
        processor=twin.processor,
    )
    test_ids_pixels_and_logits_are_the_same_at_every_size(again, (100, 67))
