"""The twin law: a random tiny LlavaForConditionalGeneration of transformers, through our loader, is the same model; and back.

Same token ids for the real chat text, same pixels, same logits, same greedy replies; and what we save, trained or not, transformers
loads as it is. transformers' processor and generate are the reference throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from llavakit.checkpoint import store
from llavakit.model.generation import generate
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES
from llavakit.types import Conversation, Image, Sampling, assistant, user
from tiny import tiny_config, tiny_processor
from twins import FAMILIES, NEW, Twin, apart, picture, their_inputs


def make_twin(folder: Path, tokenizer: Any, family: str) -> Twin:
    processor = Processor(
        tokenizer=tokenizer,
        template=TEMPLATES["llava_hf"],
        preprocess=tiny_processor(tokenizer).preprocess,
        tiling=tiny_config(tokenizer).tiling,
        max_length=1024,
    )
    processor.save(folder)
    text = dict(tiny_config(tokenizer).text) | FAMILIES[family] | {"initializer_range": 0.2}
    config = LlavaConfig(**tiny_config(tokenizer, text=text).to_hf())
    torch.manual_seed(3)
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.save_pretrained(folder)
    theirs.generation_config.eos_token_id = None  # a random model must not stop by chance
    ours, read = store.load(folder, dtype="fp32")
    return Twin(folder=folder, theirs=theirs, reader=AutoProcessor.from_pretrained(folder), ours=ours, processor=read)


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return make_twin(tmp_path_factory.mktemp("twin") / request.param, tokenizer, request.param)


PICTURES = (picture(0), picture(1, 50, 130))
TALKS = {
    "one picture": Conversation.ask("What is this?", PICTURES[0]),
    "two pictures": Conversation.ask("How many things are there in both?", *PICTURES),
    "only words": Conversation.ask("Is there a star?"),
    "second turn": Conversation(
        (
            user(Image.of(PICTURES[1]), "Describe the image concisely."),
            assistant("A red circle left of a blue square."),
            user("What is left?"),
        )
    ),
}


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_ids_pixels_logits_and_greedy_replies_are_the_same(twin: Twin, talk: Conversation) -> None:
    theirs = their_inputs(twin, [talk])
    batch = twin.processor.collate([twin.processor.encode(talk, learn=False)], side="left")
    assert batch.input_ids.tolist() == theirs["input_ids"].tolist()
    if talk.images:
        deviation = torch.tensor(twin.processor.preprocess.std)[:, None, None]
        assert ((batch.views - theirs["pixel_values"]) * deviation).abs().max() <= 1 / 255
        theirs["pixel_values"] = batch.views  # from here on the model alone is compared
    with torch.inference_mode():
        expected = twin.theirs(**theirs).logits
        assert apart(twin.ours(batch, full_logits=True).logits, expected) <= 1e-5
    written = twin.theirs.generate(**theirs, max_new_tokens=NEW, do_sample=False)[0, batch.input_ids.shape[1] :]
    assert generate(twin.ours, batch, sampling=Sampling(max_new_tokens=NEW), stop_ids=frozenset()) == [written.tolist()]


def test_a_padded_batch_is_the_same(twin: Twin) -> None:
    theirs = their_inputs(twin, list(TALKS.values()))
    batch = twin.processor.collate([twin.processor.encode(talk, learn=False) for talk in TALKS.values()], side="left")
    assert batch.input_ids.tolist() == theirs["input_ids"].tolist()
    assert batch.mask.tolist() == theirs["attention_mask"].bool().tolist()
    with torch.inference_mode():
        expected = twin.theirs(**theirs | {"pixel_values": batch.views, "position_ids": batch.positions}).logits[batch.mask]
        assert apart(twin.ours(batch, full_logits=True).logits[batch.mask], expected) <= 1e-5


def test_computed_buffers_are_the_same(twin: Twin) -> None:
    ours, theirs = ({name.split(".")[-1]: value for name, value in model.named_buffers()} for model in (twin.ours, twin.theirs))
    assert ours.keys() == theirs.keys() == {"position_ids", "inv_freq", "original_inv_freq"}
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert torch.equal(ours[name], expected), name


A_TO_B = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi", "model.multi"),
)
A_TO_C = (("vision_tower.vision_model.", "model.vision_tower."), *A_TO_B)
Renames = tuple[tuple[str, str], ...]


@pytest.mark.parametrize("renames", [(), A_TO_B, A_TO_C], ids=["A", "B", "C"])
def test_every_published_spelling_loads(twin: Twin, tmp_path: Path, renames: Renames) -> None:
    """Spec 1.7; old files also hold buffers that are computed today."""

    def renamed(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name)

    store.save(twin.ours, twin.processor, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    assert all(name.startswith(("language_model.", "vision_tower.vision_model.", "multi_modal_projector.")) for name in weights)
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.zeros(1, 17, dtype=torch.int64)
    save_file({renamed(name): value for name, value in weights.items()}, file)
    again, _ = store.load(tmp_path / "model", dtype="fp32")
    expected = twin.ours.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(again.buffers(), twin.ours.buffers(), strict=True))


def loads_in_transformers(folder: Path) -> Any:
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    return model.eval()


def same_in_transformers(ours: Llava, processor: Processor, folder: Path) -> None:
    """What we saved gives the same ids, logits and greedy tokens in transformers."""
    twin = Twin(
        folder=folder, theirs=loads_in_transformers(folder), reader=AutoProcessor.from_pretrained(folder), ours=ours, processor=processor
    )
    twin.theirs.generation_config.eos_token_id = None
    test_ids_pixels_logits_and_greedy_replies_are_the_same(twin, TALKS["one picture"])


@pytest.mark.parametrize("limit", [store.MAX_SHARD_BYTES, 20_000], ids=["one file", "shards"])
def test_what_we_save_loads_there_and_is_the_same(twin: Twin, tmp_path: Path, limit: int) -> None:
    store.save(twin.ours, twin.processor, tmp_path / "back", max_shard_bytes=limit)
    shards = list((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) == 1 if limit == store.MAX_SHARD_BYTES else len(shards) > 3
    same_in_transformers(twin.ours, twin.processor, tmp_path / "back")
    expected = twin.theirs.state_dict()
    found = loads_in_transformers(tmp_path / "back").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "changes", [{}, {"projector": "linear"}, {"select_feature": "cls_patch", "select_layer": -1}], ids=["mlp", "linear", "cls"]
)
def test_what_was_trained_here_loads_there(tokenizer: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    text = dict(tiny_config(tokenizer).text) | {"initializer_range": 0.2}
    model = Llava(tiny_config(tokenizer, text=text, **changes)).train()
    processor = Processor(
        tokenizer=tokenizer,
        template=TEMPLATES["llava_hf"],
        preprocess=tiny_processor(tokenizer).preprocess,
        tiling=model.config.tiling,
        max_length=1024,
    )
    step_on(model, processor)
    store.save(model, processor, tmp_path / "trained")
    again, read = store.load(tmp_path / "trained", dtype="stored")
    assert again.config == type(again.config).from_hf(model.config.to_hf())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    same_in_transformers(again, read, tmp_path / "trained")


def step_on(model: Llava, processor: Processor) -> None:
    batch = processor.collate(
        [processor.encode(talk.then(assistant("A blue square.")), learn=True) for talk in TALKS.values()], side="right"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    output = model(batch)
    (output.loss_sum / output.learned).backward()
    optimizer.step()


CONTROLS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(
    lambda text: text.strip() == text and not any(control in text for control in CONTROLS)
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=words, reply=words, images=st.integers(0, 2))
def test_ids_are_the_same_for_any_words_that_spell_no_control(twin: Twin, question: str, reply: str, images: int) -> None:
    talk = Conversation((*Conversation.ask(question, *PICTURES[:images]).messages, assistant(reply), user("Why?")))
    assert twin.processor.encode(talk, learn=False).input_ids.tolist() == their_inputs(twin, [talk])["input_ids"][0].tolist()
