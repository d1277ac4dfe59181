"""Checkpoints in the original layout: recognised by content, read with the original's defaults, and computing what its parts compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llavakit.checkpoint import store
from llavakit.checkpoint.layouts import describe
from llavakit.errors import CheckpointError
from llavakit.processor import Processor
from llavakit.types import Conversation
from originals import NEXT, Original, make, write, write_text, write_tower
from twins import apart, picture

TALK = Conversation.ask("What is in the picture?", picture(0))


def refused(code: str, *words: str, **options: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        store.load(**options)
    line = str(caught.value)
    assert caught.value.code == code, line
    assert caught.value.remedy
    for word in words:
        assert word in line


def equal(made: Original, model: Any, processor: Processor, talk: Conversation = TALK) -> None:
    """Our logits are those of the parts, and the rows that were added never win."""
    inputs = processor.encode(talk, learn=False)
    assert (inputs.input_ids == processor.image_token_id).sum() == sum(grid.tokens for grid in inputs.grids)
    expected = made.logits(inputs, processor.image_token_id)
    with torch.inference_mode():
        found = model(processor.collate([inputs], side="right"), full_logits=True).logits[0]
    assert apart(found[:, : expected.shape[1]], expected) <= 1e-5
    assert found.argmax(-1).max() < expected.shape[1]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("pickled", [False, True])
def test_15_with_its_tower_elsewhere(tmp_path: Path, kind: str, pickled: bool) -> None:
    made = make(kind)
    folder = write(tmp_path / "anything", made.fields, made.weights(tower=False), pickled=pickled, shards=3)
    tower = write_tower(tmp_path / "clip", made)
    refused("tower_missing", "somebody/clip", "--tower", folder=folder, allow_pickle=pickled)
    if pickled:
        refused("pickle_refused", folder=folder, tower=tower)
    model, processor = store.load(folder, tower=tower, dtype="fp32", allow_pickle=pickled)
    equal(made, model, processor)
    assert model.config.text["model_type"] == kind
    assert (model.config.arithmetic, processor.image_pieces, processor.preprocess.aspect) == ("original", "original", "pad")
    assert processor.max_length == 1000


def test_a_named_tower_is_found(tmp_path: Path) -> None:
    made = make(mm_vision_tower="clip")
    folder = write(tmp_path / "model", made.fields, made.weights(tower=False))
    write_tower(tmp_path / "clip", made)
    equal(made, *store.load(folder, dtype="fp32"))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("size", [(90, 60), (40, 200), (50, 50)])
def test_16_its_own_tower_wins(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    made, stock = make(kind, **NEXT), make(kind, seed=1)
    folder = write(tmp_path / "model", made.fields, made.weights(tower=True))
    tower = write_tower(tmp_path / "stock", stock)
    model, processor = store.load(folder, tower=tower, dtype="fp32")
    equal(made, model, processor, Conversation.ask("What is this?", picture(1, *size)))
    assert model.config.canvases[0] == (56, 112)  # the original writes width first
    refused("tower_missing", "--tower", folder=folder)
    part = {name: value for name, value in made.weights(tower=True).items() if "layers.1.mlp" not in name or "vision" not in name}
    broken = write(tmp_path / "part", made.fields, part)
    refused("weights_mismatch", "encoder.layers.1.mlp", folder=broken, tower=tower)  # not filled up from the stock one


def test_v1_with_all_keys_missing(tmp_path: Path) -> None:
    absent = dict.fromkeys(
        ("mm_projector_type", "image_aspect_ratio", "mm_use_im_start_end", "mm_use_im_patch_token", "mm_vision_select_feature")
    )
    made = make(projector="linear", model_type="llava", tokenizer_model_max_length=None, **absent)
    folder = write(tmp_path / "model", made.fields, made.weights(tower=False))
    model, processor = store.load(folder, tower=write_tower(tmp_path / "clip", made), dtype="fp32")
    equal(made, model, processor)
    assert (model.config.projector, model.config.merge, processor.preprocess.aspect) == ("linear", "flat", "square")
    assert processor.tokenizer.convert_tokens_to_ids("<im_patch>") + 1 == processor.image_token_id  # spec trap 27
    assert processor.max_length == 1024


def test_legacy_tokens_stand_around_the_picture_and_survive_saving(tmp_path: Path) -> None:
    tokens = len(make().text.get_input_embeddings().weight)
    made = make(mm_use_im_start_end=True, rows=tokens + 2)
    folder = write(tmp_path / "model", made.fields, made.weights(tower=False))
    model, processor = store.load(folder, tower=write_tower(tmp_path / "clip", made), dtype="fp32")
    equal(made, model, processor)
    store.save(model, processor, tmp_path / "hf")
    for one in (processor, store.load(tmp_path / "hf")[1]):
        ids = one.encode(TALK, learn=False).input_ids.tolist()
        first = ids.index(one.image_token_id)
        around = [ids[first - 1], ids[first + 16]]
        assert one.tokenizer.convert_ids_to_tokens(around) == ["<im_start>", "<im_end>"]
        assert around == [tokens, tokens + 1]


def test_projector_and_language_model(tmp_path: Path) -> None:
    made = make()
    folder = write(tmp_path / "stage1", made.fields, None)
    text, tower = write_text(tmp_path / "vicuna", made), write_tower(tmp_path / "clip", made)
    for prefix in ("model.", "base_model.model.model.", ""):
        torch.save({f"{prefix}mm_projector.{name}": value for name, value in made.projector.items()}, folder / "mm_projector.bin")
        equal(made, *store.load(folder, base=text, tower=tower, dtype="fp32", allow_pickle=True))
    refused("pickle_refused", "mm_projector.bin", folder=folder, base=text, tower=tower)
    save_file({f"model.mm_projector.{name}": value for name, value in made.projector.items()}, folder / "mm_projector.safetensors")
    equal(made, *store.load(folder, base=text, tower=tower, dtype="fp32"))
    refused("base_missing", "--base", folder=folder, tower=tower)
    other = write_text(tmp_path / "other", make("mistral"))
    refused("wrong_base", "mistral", folder=folder, base=other, tower=tower)


def test_a_projector_for_another_tower(tmp_path: Path) -> None:
    made = make()
    folder = write(tmp_path / "stage1", made.fields, None)
    torch.save({f"model.mm_projector.{name}": value[..., :-1] for name, value in made.projector.items()}, folder / "mm_projector.bin")
    text, tower = write_text(tmp_path / "vicuna", made), write_tower(tmp_path / "clip", made)
    refused("weights_mismatch", "multi_modal_projector.linear_1.weight", folder=folder, base=text, tower=tower, allow_pickle=True)


@pytest.mark.parametrize("whole_table", [False, True])
def test_a_projector_with_trained_tokens(tmp_path: Path, whole_table: bool) -> None:
    made = make(mm_use_im_start_end=True)
    folder = write(tmp_path / "stage1", made.fields, None)
    before = made.text.get_input_embeddings().weight.detach()
    trained = torch.randn(2, before.shape[1])
    table = torch.cat([before, trained]) if whole_table else trained
    saved = {f"model.mm_projector.{name}": value for name, value in made.projector.items()} | {"model.embed_tokens.weight": table}
    torch.save(saved, folder / "mm_projector.bin")
    text, tower = write_text(tmp_path / "vicuna", made), write_tower(tmp_path / "clip", made)
    model, _ = store.load(folder, base=text, tower=tower, dtype="fp32", allow_pickle=True)
    found = model.language_model.get_input_embeddings().weight
    assert torch.equal(found[: len(before)], before)
    assert torch.equal(found[len(before) : len(before) + 2], trained)
    assert torch.allclose(found[len(before) + 2], before.mean(0), atol=0.05)


@pytest.mark.parametrize("code", ["missing_file", "damaged_file", "lfs_pointer", "unsafe_path", "remote_code", "non_finite"])
@pytest.mark.parametrize("pickled", [False, True])
def test_damaged_files_are_told_as_in_every_layout(tmp_path: Path, code: str, pickled: bool) -> None:
    """Hardening C1, C2, C5, C8, C9 for the original's files; C3 and C6 are below, C4 above, C7 among the bases and adapters."""
    made = make()
    weights = made.weights(tower=False)
    if code == "non_finite":
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    folder = write(tmp_path / "model", made.fields, weights, pickled=pickled, shards=2)
    tower = write_tower(tmp_path / "clip", made)
    shard = sorted(folder.glob("*-of-00002.*"))[1]
    index = next(folder.glob("*.index.json"))
    if code == "missing_file":
        shard.unlink()
    elif code == "damaged_file":
        shard.write_bytes(shard.read_bytes()[:-200])
    elif code == "lfs_pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif code == "unsafe_path":
        index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
    elif code == "remote_code":
        (folder / "config.json").write_text(json.dumps(made.fields | {"auto_map": {"AutoModel": "evil.Model"}}))
    word = {"unsafe_path": index.name, "remote_code": "auto_map", "non_finite": "layers.0.mlp.up_proj"}.get(code, shard.name)
    refused(code, word, folder=folder, tower=tower, allow_pickle=pickled)


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, "unsupported_model", "mm_projector_type"),
        ({"mm_projector_type": "identity"}, "unsupported_model", "identity"),
        ({"image_aspect_ratio": "keep"}, "unsupported_model", "keep"),
        ({"model_type": "llava_mpt"}, "unsupported_model", "llava_mpt"),
        ({"mm_resampler_type": "perceiver"}, "unsupported_model", "perceiver"),
        ({"mm_vision_select_feature": "all"}, "unsupported_model", "mm_vision_select_feature"),
        ({"mm_vision_select_layer": None}, "bad_config", "mm_vision_select_layer"),
        ({"vocab_size": 7}, "weights_mismatch", "vocab_size"),
        ({"hidden_size": 64}, "weights_mismatch", "embed_tokens"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, fields: dict[str, Any], code: str, word: str) -> None:
    made = make()
    whole = {name: value for name, value in (made.fields | fields).items() if value is not None}
    folder = write(tmp_path / "model", whole, made.weights(tower=False))
    refused(code, word, folder=folder, tower=write_tower(tmp_path / "clip", made))


def test_a_name_says_nothing(tmp_path: Path, tiny_model_dir: Path) -> None:
    made = make()
    folder = write(tmp_path / "llava-lora-delta-hf", made.fields, made.weights(tower=False))
    assert describe(folder).kind == "original"
    assert describe(tiny_model_dir).kind == "hf"
    assert describe(write_text(tmp_path / "llava-v1.5-7b-lora", made)).kind == "other"
    refused("unsupported_model", "'llama'", folder=tmp_path / "llava-v1.5-7b-lora")
    refused("base_not_needed", "--base", folder=folder, base=tiny_model_dir)
    refused("tower_not_needed", "--tower", folder=tiny_model_dir, tower=tmp_path)
    refused("bad_tower", "llava_llama", folder=folder, tower=folder)


def test_a_token_number_in_the_config_is_only_kept(tmp_path: Path) -> None:
    """Spec trap 21: the 34B's config says 64002, its tokenizer decides."""
    made = make(image_token_index=9999)
    folder, tower = write(tmp_path / "model", made.fields, made.weights(tower=False)), write_tower(tmp_path / "clip", made)
    model, processor = store.load(folder, tower=tower)
    assert model.config.image_token_id == processor.image_token_id == len(made.text.get_input_embeddings().weight)
    assert model.config.original["image_token_index"] == 9999


def test_the_processor_alone(tmp_path: Path) -> None:
    made = make()
    folder, tower = write(tmp_path / "model", made.fields, made.weights(tower=False)), write_tower(tmp_path / "clip", made)
    alone, whole = store.load_processor(folder, tower=tower), store.load(folder, tower=tower)[1]
    assert torch.equal(alone.encode(TALK, learn=False).input_ids, whole.encode(TALK, learn=False).input_ids)
