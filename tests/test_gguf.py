"""The files for llama.cpp: read back they hold the model, every weight once or named as dead, and the keys it runs by."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llavakit.checkpoint import gguf, gguf_tokenizer, weights
from llavakit.errors import CheckpointError, MissingExtraError
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from llavakit.processor import Processor
from llavakit.prompts import CURIOUS_USER
from llavakit.tiling import Tiling
from tiny import llama_tokenizer, tiny_config, tiny_processor
from twins import FAMILIES

CANVASES = ((56, 112), (112, 56), (112, 112))


@pytest.fixture(scope="module")
def package() -> ModuleType:
    return pytest.importorskip("gguf", reason="the optional gguf package is not installed (pip install 'llavakit[gguf]')")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return llama_tokenizer()


def model_of(config: ModelConfig) -> Llava:
    torch.manual_seed(0)
    return Llava(config).eval()


def processor_of(tokenizer: Any, config: ModelConfig) -> Processor:
    processor = tiny_processor(tokenizer)
    processor.tiling = Tiling(side=56, canvases=config.canvases, merge=config.merge)
    return processor


def varied(tokenizer: Any, kind: str) -> ModelConfig:
    config = tiny_config(tokenizer)
    if kind == "next":
        return replace(config, canvases=CANVASES, merge="spatial_unpad")
    changes: dict[str, dict[str, Any]] = {
        "mistral": {**FAMILIES["mistral"]},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
        "wide heads, more rows": {"head_dim": 16, "vocab_size": len(tokenizer) + 7},
        "stretched": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        "1.5": {},
    }
    return replace(config, text={**config.text, **changes[kind]})


def values(tensor: Any) -> Tensor:
    """A tensor of a file in our shape, bf16 as bf16."""
    data = torch.from_numpy(tensor.data.copy())
    if tensor.tensor_type.name == "BF16":
        data = data.view(torch.bfloat16)
    return data.reshape([int(side) for side in reversed(tensor.shape)])


def unpaired(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of rows back to transformers': what its documentation says of both, written the other way round."""
    size = weight.shape[0] // heads
    order = [head * size + half + 2 * row for head in range(heads) for half in (0, 1) for row in range(size // 2)]
    return weight[torch.tensor(order)]


KINDS = ("1.5", "next", "mistral", "biased", "tied", "wide heads, more rows", "stretched")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_files_hold_the_model(package: Any, tokenizer: Any, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    config = varied(tokenizer, kind)
    model = model_of(config)
    paths = gguf.write_gguf(model, processor_of(tokenizer, config), tmp_path / "out", dtype=dtype)
    places, state = gguf.plan(model), model.state_dict()
    for path, names in zip(paths, (places.language, places.vision), strict=True):
        found = {tensor.name: tensor for tensor in package.GGUFReader(path).tensors}
        assert list(found) == list(names)
        for theirs, ours in names.items():
            value, heads = values(found[theirs]), {"attn_q": 4, "attn_k": 2}.get(theirs.split(".")[-2])
            back = unpaired(value, heads) if heads and path == paths[0] else value
            assert torch.equal(back, state[ours].to(back.dtype)), theirs
            assert value.dtype == torch.float32 or (value.dtype == dtype and value.dim() > 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in paths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-2, -1, -3, 1])
def test_every_weight_has_one_place_or_is_dead(tokenizer: Any, kind: str, layer: int) -> None:
    model = model_of(replace(varied(tokenizer, kind), select_layer=layer))
    places = gguf.plan(model)
    placed = [*places.language.values(), *places.vision.values(), *places.dead, *weights.aliases_of(model)]
    assert sorted(placed) == sorted(model.state_dict())


def test_dead_weights_change_nothing(tokenizer: Any) -> None:
    model = model_of(tiny_config(tokenizer))
    views = torch.randn(1, 3, 56, 56)
    before, state, dead = model.encode_views(views), model.state_dict(), gguf.plan(model).dead
    for name in dead:
        state[name].fill_(torch.nan)
    assert dead
    assert torch.equal(model.encode_views(views), before)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), seed=st.integers(0, 99))
def test_paired_rows_turn_as_rows_half_a_head_apart(heads: int, half: int, seed: int) -> None:
    """The rotary embedding, written in both manners, gives the same products of queries and keys."""
    rng = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(heads * 2 * half, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    x, angles = torch.randn(3, generator=rng, dtype=torch.float64), torch.rand(half, generator=rng, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)

    def apart(weight: Tensor) -> Tensor:
        first, second = (weight @ x).view(heads, 2, half).unbind(1)
        return torch.complex(first, second)

    def together(weight: Tensor) -> Tensor:
        return torch.view_as_complex((gguf.pair_rows(weight, heads) @ x).view(heads, half, 2))

    scores = [((rows(query) * turn) * rows(key).conj()).real.sum(1) for rows in (apart, together)]
    assert torch.allclose(*scores)


def fields(package: Any, path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in package.GGUFReader(path).fields.items()}


def test_the_decoder_is_told(package: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = varied(tokenizer, "stretched")
    processor = processor_of(tokenizer, config)
    told = fields(package, gguf.write_gguf(model_of(config), processor, tmp_path / "out", dtype=torch.float16)[0])
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 1,
        "llama.context_length": 1024,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 5e5,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "llama.vocab_size": config.rows,
        "tokenizer.chat_template": processor.template.jinja(),
    }
    assert {name: told[name] for name in expected} == expected
    assert told["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_a_window_bounds_the_context(package: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = varied(tokenizer, "mistral")
    told = fields(package, gguf.write_gguf(model_of(config), processor_of(tokenizer, config), tmp_path / "out")[0])
    assert told["llama.context_length"] == FAMILIES["mistral"]["sliding_window"]


@pytest.mark.parametrize("kind", ["1.5", "next"])
def test_the_tower_is_told(package: Any, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    config = varied(tokenizer, kind)
    told = fields(package, gguf.write_gguf(model_of(config), processor_of(tokenizer, config), tmp_path / "out")[1])
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": False,
        "clip.vision.image_size": 56,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 128,
        "clip.vision.attention.head_count": 2,
        "clip.vision.block_count": 2,
        "clip.vision.feature_layer": [2],
        "clip.vision.projection_dim": 32,
        "clip.vision.mm_patch_merge_type": config.merge,
    }
    assert {name: told[name] for name in expected} == expected
    assert told["clip.vision.image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    pinpoints = [side for canvas in config.canvases for side in canvas]
    assert told.get("clip.vision.image_grid_pinpoints", []) == pinpoints


def merged(vocabulary: gguf_tokenizer.Vocabulary, text: str) -> list[int]:
    """The ids of a text as llama.cpp finds them: the neighbours whose joint piece scores highest are joined, the leftmost first."""
    ids = {piece: number for number, piece in enumerate(vocabulary.pieces)}
    parts = list(("▁" if vocabulary.blank_in_front else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(vocabulary.scores[ids[one + two]], -place) for place, (one, two) in enumerate(pairwise(parts)) if one + two in ids]
        if not pairs:
            break
        place = -max(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    spelled = [[part] if part in ids else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [ids[piece] for group in spelled for piece in group]


def test_the_vocabulary_reads_text_as_ours(tokenizer: Any) -> None:
    vocabulary = gguf_tokenizer.Vocabulary.of(tokenizer, rows=len(tokenizer) + 3)
    texts = (CURIOUS_USER, "USER: What is left of it?\nNaïve ☃ 雪 ASSISTANT:", "Is there a star? Yes.  Two  blanks")
    for text in texts:
        assert merged(vocabulary, text) == tokenizer(text, add_special_tokens=False).input_ids
    kinds = vocabulary.kinds
    assert [kind.name for kind in kinds[:4]] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert kinds[tokenizer.convert_tokens_to_ids("<image>")] == gguf_tokenizer.Kind.CONTROL
    assert {kind.name for kind in kinds[len(tokenizer) :]} == {"UNUSED"}
    assert len(set(vocabulary.pieces)) == len(vocabulary.pieces) == len(tokenizer) + 3
    assert vocabulary.special["bos"] == 1
    assert vocabulary.begins
    assert vocabulary.blank_in_front


def test_the_vocabulary_is_told(package: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = tiny_config(tokenizer)
    told = fields(package, gguf.write_gguf(model_of(config), processor_of(tokenizer, config), tmp_path / "out")[0])
    vocabulary = gguf_tokenizer.Vocabulary.of(tokenizer, rows=config.rows)
    assert told["tokenizer.ggml.model"] == "llama"
    assert told["tokenizer.ggml.tokens"] == list(vocabulary.pieces)
    assert told["tokenizer.ggml.token_type"] == list(vocabulary.kinds)
    assert told["tokenizer.ggml.scores"] == pytest.approx(vocabulary.scores)
    assert [told[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")] == [1, 2]
    assert [told["tokenizer.ggml.unknown_token_id"], told["tokenizer.ggml.padding_token_id"]] == [0, tokenizer.pad_token_id]
    assert [told[f"tokenizer.ggml.add_{name}"] for name in ("bos_token", "eos_token", "space_prefix")] == [True, False, True]


UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "text_config.model_type": ("text", {"model_type": "qwen2"}),
    "text_config.hidden_act": ("text", {"hidden_act": "gelu"}),
    "text_config.rope_parameters": ("text", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    "vision_config.hidden_act": ("vision", {"hidden_act": "relu"}),
    "projector": ("", {"projector": "linear"}),
    "vision_feature_select_strategy": ("", {"select_feature": "cls_patch"}),
}


@pytest.mark.parametrize("where", UNSUPPORTED)
def test_what_llama_cpp_cannot_run_is_refused(tokenizer: Any, where: str) -> None:
    part, changes = UNSUPPORTED[where]
    config = tiny_config(tokenizer)
    changed = replace(config, **({part: {**getattr(config, part), **changes}} if part else changes))
    with pytest.raises(CheckpointError, match=r"llama\.cpp") as caught:
        gguf.check_supported(changed)
    assert (caught.value.code, caught.value.where) == ("unsupported_gguf", where)


def test_other_tokenizers_are_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    spaced = Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))
    byte_level = Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel()
    for tokenizer in (words, spaced, byte_level):
        with pytest.raises(CheckpointError) as caught:
            gguf_tokenizer.Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), rows=2)
        assert caught.value.code == "unsupported_tokenizer"


def test_fp16_that_overflows_is_told_and_nothing_is_written(package: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = tiny_config(tokenizer)
    model = model_of(config)
    with torch.no_grad():
        model.language_model.lm_head.weight[3, 3] = 1e5
    with pytest.raises(CheckpointError) as caught:
        gguf.write_gguf(model, processor_of(tokenizer, config), tmp_path / "out", dtype=torch.float16)
    assert (caught.value.code, caught.value.where) == ("non_finite", "output.weight")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_things_is_kept(package: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    config = tiny_config(tokenizer)
    with pytest.raises(CheckpointError) as caught:
        gguf.write_gguf(model_of(config), processor_of(tokenizer, config), tmp_path)
    assert caught.value.code == "not_a_folder_of_gguf"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_the_package_the_remedy_is_told(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    config = tiny_config(tokenizer)
    with pytest.raises(MissingExtraError, match=r"llavakit\[gguf\]"):
        gguf.write_gguf(model_of(config), processor_of(tokenizer, config), tmp_path / "out")
