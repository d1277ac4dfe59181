"""Two GGUF files read back: every weight is there once or named as never run, rows in llama.cpp's order, keys as the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llavakit.checkpoint.gguf import MMPROJ, MODEL, pair_rows, text_entries, vision_entries, write_gguf
from llavakit.errors import CheckpointError
from llavakit.model.llava import Llava
from llavakit.tiling import Tiling
from tiny import llama_tokenizer, tiny_config, tiny_processor

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
NEXT: dict[str, Any] = {"canvases": ((56, 112), (112, 56), (112, 112)), "merge": "spatial_unpad"}
TYPES = {"float32": (torch.float32, 0), "float16": (torch.float16, 1), "bfloat16": (torch.bfloat16, 30)}


def made(**changes: Any) -> tuple[Llava, Any]:
    tokenizer = llama_tokenizer()
    processor = tiny_processor(tokenizer)
    config = tiny_config(tokenizer, **changes)
    if config.canvases:
        processor = type(processor)(
            tokenizer=tokenizer, template=processor.template, preprocess=processor.preprocess,
            tiling=Tiling(side=56, canvases=config.canvases, merge=config.merge), max_length=1024,
        )  # fmt: skip
    return Llava(config).eval(), processor


def stored(tensor: Any) -> torch.Tensor:
    raw = np.array(tensor.data)
    if tensor.tensor_type.name == "BF16":
        raw = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(raw.astype(np.float32)).reshape([int(size) for size in reversed(tensor.shape)])


def unpaired(value: torch.Tensor, heads: int) -> torch.Tensor:
    """By hand: row 2i and 2i + 1 of a head came from i and i + half."""
    half = value.shape[0] // heads // 2
    order = [head * 2 * half + (row % half) * 2 + row // half for head in range(heads) for row in range(2 * half)]
    return value[order]


@pytest.mark.parametrize("changes", [{}, NEXT], ids=["1.5", "next"])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_every_weight_is_written_once_or_is_never_run(tmp_path: Path, changes: dict[str, Any], dtype: Any) -> None:
    model, processor = made(**changes)
    text, vision = write_gguf(model, processor, tmp_path / "out", dtype=dtype)
    weights, seen = dict(model.state_dict()), []
    for path, entries in ((text, text_entries(model)), (vision, vision_entries(model))):
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for entry in entries:
            seen.append(entry.source)
            if entry.name is None:
                assert ".layers.2." in entry.source or "post_layernorm" in entry.source
                continue
            tensor, expected = found.pop(entry.name), weights[entry.source].float()
            back = stored(tensor)
            heads = {"attn_q": 4, "attn_k": 2}.get(entry.name.split(".")[2] if path.name == MODEL and "blk" in entry.name else "")
            kind = torch.float32 if tensor.tensor_type == 0 else TYPES[dtype][0]
            assert torch.equal(unpaired(back, heads) if heads else back, expected.to(kind).float()), entry.name
            plain = expected.dim() < 2 or "v.patch" in entry.name or "v.position" in entry.name
            assert tensor.tensor_type == (0 if plain else TYPES[dtype][1])
        assert not found
    assert sorted(seen) == sorted(weights)


@given(heads=st.integers(1, 5), half=st.integers(1, 6))
def test_paired_rows_give_the_same_attention(heads: int, half: int) -> None:
    rows = torch.arange(heads * 2 * half)
    moved = pair_rows(rows, heads)
    assert torch.equal(unpaired(moved, heads), rows)
    pairs = moved.view(-1, 2)
    assert torch.equal(pairs[:, 1] - pairs[:, 0], torch.full((heads * half,), half))


def test_keys_say_what_the_config_says(tmp_path: Path) -> None:
    model, processor = made(**NEXT)
    write_gguf(model, processor, tmp_path / "out", dtype="float32")
    text, vision = (gguf.GGUFReader(tmp_path / "out" / name).fields for name in (MODEL, MMPROJ))
    expected = {
        "llama.block_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.model": "llama",
    }
    assert {name: text[name].contents() for name in expected} == expected
    expected_vision = {
        "clip.projector_type": "mlp", "clip.vision.block_count": 2, "clip.vision.feature_layer": [2], "clip.vision.image_size": 56,
        "clip.vision.image_grid_pinpoints": [56, 112, 112, 56, 112, 112], "clip.vision.mm_patch_merge_type": "spatial_unpad",
    }  # fmt: skip
    assert {name: vision[name].contents() for name in expected_vision} == expected_vision
    pieces = text["tokenizer.ggml.tokens"].contents()
    assert pieces == processor.tokenizer.convert_ids_to_tokens(list(range(len(processor.tokenizer))))
    assert len(pieces) == len(text["tokenizer.ggml.scores"].contents()) == len(text["tokenizer.ggml.token_type"].contents())


QWEN2 = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 600, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{"text": QWEN2}, {"projector": "linear"}], ids=["qwen2", "linear"])
def test_what_llama_cpp_cannot_run_is_refused_before_a_file_is_made(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, processor = made(**changes)
    with pytest.raises(CheckpointError) as raised:
        write_gguf(model, processor, tmp_path / "out")
    assert raised.value.code == "unsupported_model"
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    model, processor = made()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError) as raised:
        write_gguf(model, processor, tmp_path)
    assert raised.value.code == "not_a_checkpoint"
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("changes", [{}, NEXT], ids=["1.5", "next"])
def test_a_reader_that_knows_only_the_files_gets_our_numbers(tmp_path: Path, changes: dict[str, Any]) -> None:
    from gguf_run import embeddings, logits

    model, processor = made(**changes)
    text, vision = write_gguf(model, processor, tmp_path / "out", dtype="float32")
    ids = [1, *range(300, 340)]
    views = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(logits(text, ids), model.language_model(input_ids=torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(embeddings(vision, views, gelu="none"), model.encode_views(views), rtol=1e-4, atol=1e-5)
