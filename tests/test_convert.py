"""Writing the original layouts, and ``llava convert``: from original to llava-hf and back every tensor has the same bytes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llavakit.checkpoint import convert as module
from llavakit.checkpoint import original_save, store
from llavakit.checkpoint.computed import grown
from llavakit.checkpoint.convert import convert
from llavakit.checkpoint.files import FileTensor, value_of
from llavakit.checkpoint.layouts import describe
from llavakit.errors import CheckpointError
from llavakit.tiling import RELEASED, tiles_of
from originals import NEXT, make, write, write_text, write_tower
from test_adapters import lora, write_lora
from test_original import TALK, equal
from tiny import tiny_config, tiny_processor


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "1.5": ({}, False),
    "1.6": (NEXT, True),
    "1.6 spatial": (NEXT | {"mm_patch_merge_type": "spatial"}, True),
    "v1": ({"projector": "linear", "image_aspect_ratio": None, "mm_use_im_patch_token": None}, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float16), ("mistral", torch.float32), ("llama", torch.bfloat16)], ids=str)
def test_there_and_back_every_byte_is_the_same(tmp_path: Path, kind: str, case: str, dtype: torch.dtype) -> None:
    fields, inside = CASES[case]
    made = make(kind, **fields)
    expected = {name: value.to(dtype) for name, value in made.weights(tower=inside).items()}
    folder, tower = write(tmp_path / "original", made.fields, expected, shards=2), write_tower(tmp_path / "clip", made)
    there = convert(folder, tmp_path / "hf", tower=tower)
    assert (there.source, there.target, there.error, there.same_ids) == ("original", "hf", 0, True)
    back = convert(tmp_path / "hf", tmp_path / "back", tower=tower)
    assert (back.source, back.target, back.error, back.same_ids) == ("hf", "original", 0, True)
    same_bytes(stored(tmp_path / "back"), expected)
    before, after = made.fields, json.loads((tmp_path / "back" / "config.json").read_text())
    told = {name: value for name, value in before.items() if name not in ("torch_dtype", "transformers_version")}
    assert {name: after[name] for name in told} == told
    assert after["unfreeze_mm_vision_tower"] is inside
    assert "<image>" not in (tmp_path / "back" / "tokenizer.json").read_text()
    if dtype == torch.float32:
        equal(made, *store.load(tmp_path / "back", tower=tower, dtype="fp32"))


def test_a_tower_that_differs_goes_inside(tmp_path: Path) -> None:
    made, stock = make(), write_tower(tmp_path / "stock", make(seed=1))
    folder = write(tmp_path / "original", made.fields, made.weights(tower=False))
    convert(folder, tmp_path / "hf", tower=write_tower(tmp_path / "clip", made))
    convert(tmp_path / "hf", tmp_path / "back", tower=stock)
    same_bytes(stored(tmp_path / "back"), made.weights(tower=True))
    equal(made, *store.load(tmp_path / "back", tower=stock, dtype="fp32"))  # what is inside wins


@pytest.mark.parametrize("tiles", [False, True])
def test_our_own_model_brings_its_tower(tmp_path: Path, tokenizer: Any, tiles: bool) -> None:
    from dataclasses import replace

    from llavakit.model.llava import Llava
    from llavakit.processor import Processor

    config = tiny_config(tokenizer)
    old = tiny_processor(tokenizer)
    if tiles:
        config = replace(config, canvases=tiles_of(RELEASED, config.image_size), merge="spatial_unpad")
    reader = Processor(
        tokenizer=tokenizer, template=old.template, preprocess=replace(old.preprocess, aspect="squash" if tiles else "pad"),
        tiling=config.tiling, max_length=1024,
    )  # fmt: skip
    store.save(Llava(config), reader, tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "original")
    assert (done.target, done.error) == ("original", 0)
    found = stored(tmp_path / "original")
    assert not [name for name in found if "vision" in name]
    assert len(found["lm_head.weight"]) == config.image_token_id  # <image> and <pad> are not the original's
    assert convert(tmp_path / "original", tmp_path / "again").error == 0
    moved = (tmp_path / "original").rename(tmp_path / "elsewhere")
    before, after = store.load(tmp_path / "hf")[0], store.load(moved)[0]
    assert torch.equal(
        before.vision_tower.vision_model.embeddings.class_embedding, after.vision_tower.vision_model.embeddings.class_embedding
    )
    if tiles:
        hd = Processor(
            tokenizer=tokenizer, template=old.template, preprocess=old.preprocess, tiling=config.tiling, max_length=1024
        )  # fmt: skip
        with pytest.raises(CheckpointError, match="base view"):
            original_save.save(Llava(config), hd, tmp_path / "hd")


def test_a_projector_is_extracted(tmp_path: Path) -> None:
    made = make(**NEXT)
    folder = write(tmp_path / "original", made.fields, made.weights(tower=True))
    tower, text = write_tower(tmp_path / "clip", made), write_text(tmp_path / "text", made)
    done = convert(folder, tmp_path / "projector", to="projector", tower=tower)
    assert (done.target, done.error) == ("projector", 0)
    assert sorted(file.name for file in (tmp_path / "projector").iterdir()) == ["config.json", "mm_projector.bin"]
    written = torch.load(tmp_path / "projector" / "mm_projector.bin", weights_only=True)
    expected = {name: value for name, value in made.weights(tower=False).items() if "mm_projector" in name or "newline" in name}
    same_bytes(written, expected)
    equal(made, *store.load(tmp_path / "projector", base=text, tower=tower, dtype="fp32", allow_pickle=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_delta_is_made_and_applied(tmp_path: Path, dtype: torch.dtype) -> None:
    made, base = make(), make(seed=1)
    with torch.no_grad():
        for name, value in made.text.state_dict().items():
            value.copy_(base.text.state_dict()[name] + 0.01 * value)
    base.text.to(dtype)
    expected = {name: value.to(dtype) for name, value in made.weights(tower=False).items()}
    folder, where = write(tmp_path / "original", made.fields, expected), write_text(tmp_path / "base", base)
    tower = write_tower(tmp_path / "clip", made)
    done = convert(folder, tmp_path / "delta", to="delta", base=where, tower=tower)
    assert done.error <= (0 if dtype == torch.float16 else 1e-5)
    assert describe(tmp_path / "delta").kind == "delta"
    convert(tmp_path / "delta", tmp_path / "hf", base=where, tower=tower)
    convert(tmp_path / "hf", tmp_path / "back", tower=tower)
    if dtype == torch.float16:
        same_bytes(stored(tmp_path / "back"), expected)
    other = write_text(tmp_path / "other", make(seed=2))
    with pytest.raises(CheckpointError, match="other weights") as caught:  # of the same shape, told by its fingerprint
        store.load(tmp_path / "delta", base=other, tower=tower)
    assert caught.value.code == "wrong_base"


def test_a_difference_in_fp32_gives_every_fp16_up_to_a_half_back() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    values = every[every.abs() <= 0.5]
    for seed in range(5):
        base = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))].float()
        assert torch.equal((values.float() - base + base).half(), values)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    made = make()
    folder = write_lora(tmp_path / "adapter", made, lora(made))
    base, tower = write_text(tmp_path / "base", made), write_tower(tmp_path / "clip", made)
    done = convert(folder, tmp_path / "hf", base=base, tower=tower, allow_pickle=True)
    assert (done.source, done.target, done.error) == ("lora", "hf", 0)
    merged, _ = store.load(tmp_path / "hf")
    direct, _ = store.load(folder, base=base, tower=tower, allow_pickle=True)
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in direct.state_dict().items())


def test_an_adapter_is_kept(tmp_path: Path) -> None:
    made = make()
    folder = write_lora(tmp_path / "lora", made, lora(made), alpha_pattern={"model.layers.0.mlp.down_proj": 2})
    base, tower = write_text(tmp_path / "base", made), write_tower(tmp_path / "clip", made)
    done = convert(folder, tmp_path / "hf", base=base, tower=tower, keep_adapter=True, allow_pickle=True)
    assert (done.source, done.target, done.error) == ("lora", "hf", 0)
    equal(made, *store.load(tmp_path / "hf", dtype="fp32"))  # the base's text, the projector trained beside the adapter
    merged, _ = store.load(folder, base=base, tower=tower, allow_pickle=True)
    again, _ = store.load(tmp_path / "hf" / "adapter", base=tmp_path / "hf")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in merged.state_dict().items())
    fields = json.loads((tmp_path / "hf" / "adapter" / "adapter_config.json").read_text())
    transformers_names = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    for name in load_file(tmp_path / "hf" / "adapter" / "adapter_model.safetensors"):
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        assert f"{module}.weight" in transformers_names
        assert re.fullmatch(fields["target_modules"], module)
    assert not [name for name in transformers_names if "vision" in name and re.fullmatch(fields["target_modules"], name)]  # trap 25
    with pytest.raises(CheckpointError, match="leave out --keep-adapter"):
        convert(tmp_path / "hf", tmp_path / "no", keep_adapter=True)


@pytest.mark.parametrize("more", [1, 70])
def test_rows_grow_as_in_llava_hf(tmp_path: Path, more: int) -> None:
    table = torch.randn(40, 6) @ torch.randn(6, 6) + 3
    stored = FileTensor(name="t", shape=(40, 6), dtype=torch.float32, file=tmp_path / "t", start=0)
    (tmp_path / "t").write_bytes(table.numpy().tobytes())
    one, two = (value_of(grown(stored, 40 + more)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(one[:40], table)
    many = value_of(grown(stored, 40_000))[40:]
    assert torch.allclose(many.mean(0), table.mean(0), atol=1e-3)
    assert torch.allclose(many.T.cov() / 1e-5, table.T.cov(correction=0), rtol=0.1, atol=0.1 * float(table.T.cov().abs().max()))


def test_the_vocabulary_grows_by_two_to_a_multiple_of_64(tmp_path: Path) -> None:
    made = make()
    before = len(made.text.get_input_embeddings().weight)
    folder, tower = write(tmp_path / "original", made.fields, made.weights(tower=False)), write_tower(tmp_path / "clip", made)
    model, processor = store.load(folder, tower=tower)
    assert model.config.rows % 64 == 0
    assert before + 2 <= model.config.rows < before + 2 + 64
    assert processor.image_token_id == before
    assert model.config.file_rows == before


@pytest.mark.parametrize(("pieces", "kind"), [(False, "PreTrainedTokenizerFast"), (True, "LlamaTokenizer")])
def test_old_programs_know_the_tokenizer(tmp_path: Path, pieces: bool, kind: str) -> None:
    made = make()
    folder, tower = write(tmp_path / "original", made.fields, made.weights(tower=False)), write_tower(tmp_path / "clip", made)
    if pieces:
        (folder / "tokenizer.model").write_bytes(b"SentencePiece")
    model, processor = store.load(folder, tower=tower)
    original_save.save(model, processor, tmp_path / "back", tower=tower)
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["tokenizer_class"] == kind
    assert (tmp_path / "back" / "tokenizer.model").exists() is pieces
    assert (
        store.load_processor(tmp_path / "back", tower=tower).encode(TALK, learn=False).input_ids
        == processor.encode(TALK, learn=False).input_ids
    ).all()


def test_transformers_runs_what_was_converted(tmp_path: Path) -> None:
    made = make()
    folder, tower = write(tmp_path / "original", made.fields, made.weights(tower=False)), write_tower(tmp_path / "clip", made)
    convert(folder, tmp_path / "hf", tower=tower)
    _, processor = store.load(tmp_path / "hf")
    inputs = processor.encode(TALK, learn=False)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.inference_mode():
        found = theirs(input_ids=inputs.input_ids[None], pixel_values=inputs.views).logits[0]
    expected = made.logits(inputs, processor.image_token_id)
    assert torch.allclose(found[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)
    assert AutoProcessor.from_pretrained(tmp_path / "hf").image_token == "<image>"


def test_a_conversion_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    made = make()
    folder, tower = write(tmp_path / "original", made.fields, made.weights(tower=False)), write_tower(tmp_path / "clip", made)
    kept = convert(folder, tmp_path / "hf", tower=tower)
    assert kept.error == 0
    before = stored(tmp_path / "hf")
    save = store.save

    def spoiled(model: Any, *rest: Any, **options: Any) -> None:
        with torch.no_grad():
            model.multi_modal_projector.linear_2.bias[0] += 1
        save(model, *rest, **options)
        with torch.no_grad():
            model.multi_modal_projector.linear_2.bias[0] -= 1

    monkeypatch.setattr(module.store, "save", spoiled)
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "hf", tower=tower)
    assert caught.value.code == "conversion_differs"
    same_bytes(stored(tmp_path / "hf"), before)
    assert sorted(os.listdir(tmp_path)) == ["clip", "hf", "original"]


def test_what_cannot_be_asked(tmp_path: Path, tiny_model_dir: Path) -> None:
    for code, options in (
        ("base_missing", {"to": "delta"}),
        ("base_not_needed", {"base": tiny_model_dir, "to": "hf"}),
        ("not_a_checkpoint", {"folder": tiny_model_dir}),
    ):
        with pytest.raises(CheckpointError) as caught:
            convert(tiny_model_dir, **{"folder": tmp_path / "new"} | options)  # type: ignore[arg-type]
        assert caught.value.code == code
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        convert(tiny_model_dir, tmp_path / "full")
