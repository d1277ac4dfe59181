"""The old model object gives the same logits, losses and replies as llavakit's own, and has its old names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import QUESTIONS, asked, ids_of, ours, pixels_of
from torch import Tensor
from transformers import TextIteratorStreamer

from llava.constants import IGNORE_INDEX
from llava.mm_utils import KeywordsStoppingCriteria
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from llava.model.builder import load_pretrained_model
from llavakit.assistant import Assistant
from llavakit.errors import CheckpointError, ContextError, SamplingError
from llavakit.model import generation
from llavakit.model.quantize import is_packed
from llavakit.types import Conversation, Sampling, assistant
from twins import apart, picture

# ---- generate ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_our_own_tokens(tiny: LlavaLlamaForCausalLM, beams: int) -> None:
    for seed, question in enumerate(QUESTIONS):
        expected = ours(tiny, question, picture(seed), sampling=Sampling(max_new_tokens=12, num_beams=beams))
        assert asked(tiny, question, picture(seed), max_new_tokens=12, num_beams=beams, do_sample=False, use_cache=True) == expected


def test_generate_with_tiles_gives_our_own_tokens(tiny_next: LlavaLlamaForCausalLM) -> None:
    model = tiny_next
    image = picture(1, 700, 300)
    inputs = model.processor.encode(Conversation.ask("What?", image), learn=False)
    batch = model.processor.collate([inputs], side="left")
    (row,) = generation.generate(model.llava, batch, sampling=Sampling(max_new_tokens=6), stop_ids=frozenset())
    ids = ids_of(model, "<image>\nWhat?", None, mode="llava_v1")[None]
    found = model.generate(ids, images=pixels_of(model, image), image_sizes=[image.size], max_new_tokens=6, eos_token_id=[])
    assert found[0].tolist() == row


def test_generate_without_pictures(tiny: LlavaLlamaForCausalLM) -> None:
    assert asked(tiny, QUESTIONS[0], max_new_tokens=8) == ours(tiny, QUESTIONS[0], sampling=Sampling(max_new_tokens=8))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_batch_gives_what_its_rows_give_alone(tiny: LlavaLlamaForCausalLM, side: str, listed: bool) -> None:
    images = [picture(seed) for seed in range(3)]
    rows = [ids_of(tiny, f"<image>\n{question}", None) for question in QUESTIONS]
    width, pad = max(map(len, rows)), tiny.processor.tokenizer.pad_token_id
    ids = torch.full((3, width), pad)
    for into, row in zip(ids, rows, strict=True):
        into[slice(None, len(row)) if side == "right" else slice(width - len(row), None)] = row
    pixels = pixels_of(tiny, *images)
    given = list(pixels[:, None]) if listed else pixels
    found = tiny.generate(ids, images=given, attention_mask=ids.ne(pad), pad_token_id=pad, max_new_tokens=10)
    for row, question, image in zip(found.tolist(), QUESTIONS, images, strict=True):
        alone = asked(tiny, question, image, max_new_tokens=10)
        assert row == alone + [pad] * (found.shape[1] - len(alone))


def test_a_batch_of_pictures_with_different_tiles_gives_what_its_rows_give_alone(tiny_next: LlavaLlamaForCausalLM) -> None:
    images = [picture(seed, *size) for seed, size in enumerate([(336, 336), (700, 300), (300, 500)])]
    rows = [ids_of(tiny_next, f"<image>\n{question}", None) for question in QUESTIONS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    pixels, sizes = pixels_of(tiny_next, *images), [image.size for image in images]
    assert isinstance(pixels, list)
    found = tiny_next.generate(ids, images=pixels, image_sizes=sizes, attention_mask=mask, max_new_tokens=5, eos_token_id=[])
    for row, question, image in zip(found.tolist(), QUESTIONS, images, strict=True):
        assert row == asked(tiny_next, question, image, max_new_tokens=5, eos_token_id=[])


def test_the_end_token_is_part_of_the_answer_and_ends_it(tiny: LlavaLlamaForCausalLM) -> None:
    free = asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=8, eos_token_id=[])
    ended = asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=8, eos_token_id=free[3])
    assert ended == free[: free.index(free[3]) + 1]


def test_a_criterion_ends_an_answer(tiny: LlavaLlamaForCausalLM) -> None:
    free = asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=10, eos_token_id=[])

    def third(tokens: Tensor, scores: Any) -> bool:
        return tokens.shape[1] == 3

    for beams in (1, 2):
        assert (
            len(asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=10, eos_token_id=[], num_beams=beams, stopping_criteria=[third])) == 3
        )
    assert asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=10, eos_token_id=[], stopping_criteria=third) == free[:3]
    tokenizer = tiny.processor.tokenizer
    word = tokenizer.decode(free[4:5])
    criterion = KeywordsStoppingCriteria([word], tokenizer, ids_of(tiny, f"<image>\n{QUESTIONS[0]}", None)[None])
    ended = asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=10, eos_token_id=[], stopping_criteria=[criterion])
    assert ended == free[: len(ended)]
    assert len(ended) <= 5
    assert word in tokenizer.decode(ended)


def test_a_streamer_sees_every_token(tiny: LlavaLlamaForCausalLM) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.seen.append([-1])

    streamer = Streamer()
    tokens = asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=5, streamer=streamer)
    assert streamer.seen == [[], *([token] for token in tokens), [-1]]
    text = TextIteratorStreamer(tiny.processor.tokenizer, skip_prompt=True)
    asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=5, streamer=text)
    assert "".join(text) == tiny.processor.tokenizer.decode(tokens)


def test_sampling_follows_the_global_seed(tiny: LlavaLlamaForCausalLM) -> None:
    def drawn(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return asked(tiny, QUESTIONS[0], picture(0), max_new_tokens=12, do_sample=True, temperature=2.0, top_p=0.9)

    with torch.random.fork_rng():
        assert drawn(1) == drawn(1)
        assert len({tuple(drawn(seed)) for seed in range(4)}) > 1


def test_equal_rows_of_a_batch_are_drawn_apart(tiny: LlavaLlamaForCausalLM) -> None:
    ids = ids_of(tiny, QUESTIONS[1], None)[None].repeat(4, 1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        rows = tiny.generate(ids, do_sample=True, temperature=2.0, max_new_tokens=8, eos_token_id=[])
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_more_than_the_context_holds_is_not_made(tiny: LlavaLlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    limit = generation.context_length(tiny.llava)
    ids = torch.full((1, limit - 3), 300)
    assert tiny.generate(ids, max_new_tokens=50, eos_token_id=[]).shape == (1, 3)
    assert "room for 3 of 50" in caplog.text
    with pytest.raises(ContextError):
        tiny.generate(torch.full((1, limit), 300), max_new_tokens=1)


def test_a_model_in_training_answers_and_goes_on_training(tiny_model_dir: Path) -> None:
    _, model, _, _ = load_pretrained_model(tiny_model_dir, None, "", torch_dtype=torch.float32)
    expected = asked(model, QUESTIONS[0], picture(0), max_new_tokens=4)
    assert asked(model.train(), QUESTIONS[0], picture(0), max_new_tokens=4) == expected
    assert model.llava.training


def test_what_is_not_supported_is_said(tiny: LlavaLlamaForCausalLM) -> None:
    ids = ids_of(tiny, QUESTIONS[0], None)[None]
    for wrong in ({"repetition_penalty": 1.3}, {"num_return_sequences": 2}, {"output_scores": True}, {"no_such_word": 1}):
        with pytest.raises(SamplingError, match=next(iter(wrong))):
            tiny.generate(ids, **wrong)
    tiny.generate(ids, max_new_tokens=1, repetition_penalty=1.0, num_return_sequences=1, output_scores=False, top_k=None)
    with pytest.raises(SamplingError, match="streamer"):
        tiny.generate(ids.repeat(2, 1), max_new_tokens=1, streamer=object())


# ---- training ---------------------------------------------------------------------------------------------------------------------------


def test_loss_and_logits_are_ours(tiny: LlavaLlamaForCausalLM) -> None:
    talk = Conversation.ask("What is in the picture?", picture(0)).then(assistant("A red circle."))
    inputs = tiny.processor.encode(talk, learn=True)
    batch = tiny.processor.collate([inputs], side="right")
    ids = ids_of(tiny, "<image>\nWhat is in the picture?", "A red circle.")
    labels = ids.clone()
    labels[: len(ids_of(tiny, "<image>\nWhat is in the picture?", None))] = IGNORE_INDEX
    with torch.no_grad():
        expected = tiny.llava(batch, full_logits=True)
        found = tiny(ids[None], labels=labels[None], images=pixels_of(tiny, picture(0)), image_sizes=[(90, 60)], use_cache=True)
    assert found.logits.shape == expected.logits.shape
    assert apart(found.logits, expected.logits) < 1e-5
    assert found["loss"].item() == pytest.approx((expected.loss_sum / expected.learned).item(), rel=1e-5)


def test_a_row_without_a_picture_still_reaches_the_projector(tiny_model_dir: Path) -> None:
    _, model, _, _ = load_pretrained_model(tiny_model_dir, None, "", torch_dtype=torch.float32)
    model.train()
    ids = torch.tensor([[9, 10, 11, 12]])
    model(ids, labels=ids, images=torch.zeros(1, 3, 56, 56)).loss.backward()
    gradients = [parameter.grad for parameter in model.get_model().mm_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert model.get_input_embeddings().weight.grad is not None
    assert all(parameter.grad is None for parameter in model.get_vision_tower().parameters()), "the tower is frozen"


# ---- the object -------------------------------------------------------------------------------------------------------------------------


def test_the_parts_have_their_old_names(tiny: LlavaLlamaForCausalLM) -> None:
    inner, tower = tiny.get_model(), tiny.get_vision_tower()
    assert tiny.model is inner
    assert inner.get_vision_tower() is tower
    assert inner.embed_tokens is tiny.get_input_embeddings()
    assert tiny.lm_head is tiny.get_output_embeddings()
    assert len(inner.layers) == 2
    assert [*dict(inner.mm_projector.named_parameters())] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.select_layer) == (32, 16, 4, -2)
    assert tower.dummy_feature.shape == (1, 32)
    assert (tower.is_loaded, tower.device, tower.dtype) == (True, tiny.device, tiny.dtype)
    tower.load_model()
    tiny.tie_weights()
    shared = {parameter.data_ptr() for parameter in tiny.llava.parameters()}
    assert {parameter.data_ptr() for parameter in (*tower.parameters(), *inner.mm_projector.parameters())} <= shared


def test_a_copy_and_a_saved_checkpoint_answer_alike(tiny_model_dir: Path, tmp_path: Path) -> None:
    _, model, _, _ = load_pretrained_model(tiny_model_dir, None, "", torch_dtype=torch.float32)
    expected = asked(model, QUESTIONS[0], picture(0), max_new_tokens=6)
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    for same in (copy.deepcopy(model), LlavaLlamaForCausalLM.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)):
        assert same.get_model() is not model.get_model()
        assert asked(same, QUESTIONS[0], picture(0), max_new_tokens=6) == expected


def test_the_model_moves_and_changes_type(tiny_model_dir: Path) -> None:
    model = LlavaLlamaForCausalLM.from_pretrained(tiny_model_dir, low_cpu_mem_usage=True, dtype="float32")
    expected = asked(model, QUESTIONS[0], picture(0), max_new_tokens=4)
    assert model.to(dtype=torch.bfloat16).dtype == model.get_vision_tower().dtype == torch.bfloat16
    pixels = pixels_of(model, picture(0)).half()  # old scripts send half precision, whatever the model is
    found = model.generate(ids_of(model, f"<image>\n{QUESTIONS[0]}", None)[None], images=pixels, max_new_tokens=4)
    assert found.shape == (1, len(expected))
    assert model.to("cpu").eval().float().dtype == torch.float32


def test_the_config_has_the_old_keys_and_may_be_written(tiny: LlavaLlamaForCausalLM, tiny_next: LlavaLlamaForCausalLM) -> None:
    one, tiled = tiny.config, tiny_next.config
    assert (one.image_aspect_ratio, one.mm_patch_merge_type, one.mm_use_im_start_end) == ("pad", "flat", False)
    assert not hasattr(one, "image_grid_pinpoints")
    assert (tiled.image_aspect_ratio, tiled.mm_patch_merge_type) == ("anyres", "spatial_unpad")
    assert tiled.image_grid_pinpoints == [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert "image_aspect_ratio" in one.__dict__
    assert one.hidden_size == tiny.llava.language_model.config.hidden_size
    assert not hasattr(tiny.llava.language_model.config, "mm_hidden_size"), "a copy is written to"


def test_what_the_loader_gives(tiny_model_dir: Path) -> None:
    tokenizer, model, image_processor, context = load_pretrained_model(str(tiny_model_dir), None, "llava", device="cpu")
    assert tokenizer is model.processor.tokenizer
    assert (context, image_processor.crop_size["height"], model.training) == (2048, 56, False)
    assert not isinstance(model, LlavaMistralForCausalLM)
    with pytest.raises(CheckpointError, match="base"):
        load_pretrained_model(tiny_model_dir, "vicuna", "llava-lora")
    _, small, _, _ = load_pretrained_model(tiny_model_dir, None, "llava", load_8bit=True, device="cpu")
    assert is_packed(small)
    assert not is_packed(model)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}, "auto", "", None])
def test_one_device_said_in_many_ways(tiny_model_dir: Path, device_map: Any) -> None:
    _, model, _, _ = load_pretrained_model(tiny_model_dir, None, "llava", device_map=device_map)
    assert model.device.type == ("cuda" if torch.cuda.is_available() and device_map in ("auto", "", None) else "cpu")


def test_answers_are_the_assistants(tiny: LlavaLlamaForCausalLM) -> None:
    tokens = asked(tiny, QUESTIONS[1], picture(2), max_new_tokens=16)
    reply = "".join(Assistant(tiny.llava, tiny.processor).reply(Conversation.ask(QUESTIONS[1], picture(2)), Sampling(max_new_tokens=16)))
    assert tiny.processor.tokenizer.batch_decode([tokens], skip_special_tokens=True)[0].strip() == reply.strip()
