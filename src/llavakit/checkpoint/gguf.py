"""A loaded model as the two files llama.cpp reads.

    language_model ------------------------> model-f16.gguf           architecture "llama"; rows of q and k in another order
    vision_tower, up to the layer read --+
    multi_modal_projector ---------------+-> mmproj-model-f16.gguf    architecture "clip", projector "mlp"
    image_newline -----------------------+

llama.cpp turns neighbouring numbers of a head (a0 b0), (a1 b1) in its rotary embedding, transformers numbers half a head apart:

    rows of a head in transformers   a0 a1 a2 a3 | b0 b1 b2 b3
    rows of a head in llama.cpp      a0 b0 a1 b1 a2 b2 a3 b3

What LLaVA never runs (the tower's layers after the one it reads, its last norm) is not written: ``Plan.dead`` names it. Matrices are
written in the type asked for; vectors, the position table and, but for fp16, the patch kernel in fp32, as llama.cpp wants them.

What llama.cpp itself does differently with these files is told in docs/gguf.md.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavakit.checkpoint import gguf_tokenizer, weights
from llavakit.checkpoint.folders import replace_folder
from llavakit.errors import CheckpointError, MissingExtraError
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from llavakit.processor import Processor

DECODERS = ("llama", "mistral")
TYPES: Mapping[torch.dtype, tuple[str, str]] = {  # ours -> in a file's name, in the gguf package
    torch.float32: ("f32", "ALL_F32"),
    torch.float16: ("f16", "MOSTLY_F16"),
    torch.bfloat16: ("bf16", "MOSTLY_BF16"),
}
LANGUAGE: tuple[tuple[str, str], ...] = (  # pattern of our name -> theirs; the first that matches the whole name applies
    (r"language_model\.model\.embed_tokens\.(weight)", r"token_embd.\1"),
    (r"language_model\.model\.norm\.(weight)", r"output_norm.\1"),
    (r"language_model\.lm_head\.(weight)", r"output.\1"),
    (r"language_model\.model\.layers\.(\d+)\.input_layernorm\.(weight)", r"blk.\1.attn_norm.\2"),
    (r"language_model\.model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"blk.\1.attn_\2.\3"),
    (r"language_model\.model\.layers\.(\d+)\.self_attn\.o_proj\.(weight|bias)", r"blk.\1.attn_output.\2"),
    (r"language_model\.model\.layers\.(\d+)\.post_attention_layernorm\.(weight)", r"blk.\1.ffn_norm.\2"),
    (r"language_model\.model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)", r"blk.\1.ffn_\2.\3"),
)
VISION: tuple[tuple[str, str], ...] = (
    (r"vision_tower\.vision_model\.embeddings\.class_embedding", "v.class_embd"),
    (r"vision_tower\.vision_model\.embeddings\.(patch|position)_embedding\.(weight)", r"v.\1_embd.\2"),
    (r"vision_tower\.vision_model\.pre_layrnorm\.(weight|bias)", r"v.pre_ln.\1"),
    (r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", r"v.blk.\1.attn_\2.\3"),
    (r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"v.blk.\1.attn_out.\2"),
    (r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(weight|bias)", r"v.blk.\1.ln\2.\3"),
    (r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)", r"v.blk.\1.ffn_up.\2"),
    (r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)", r"v.blk.\1.ffn_down.\2"),
    (r"multi_modal_projector\.linear_1\.(weight|bias)", r"mm.0.\1"),
    (r"multi_modal_projector\.linear_2\.(weight|bias)", r"mm.2.\1"),
    (r"image_newline", "v.image_newline"),
)
_PATCHES, _POSITIONS = "v.patch_embd.weight", "v.position_embd.weight"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every weight goes: llama.cpp's names and ours for each file, and the names of ours that are written nowhere."""

    language: Mapping[str, str]
    vision: Mapping[str, str]
    dead: tuple[str, ...]


def write_gguf(model: Llava, processor: Processor, folder: Path, *, dtype: torch.dtype | None = None) -> tuple[Path, Path]:
    """Write the folder anew and return the paths of the language model and of the ``mmproj`` file.

    dtype: the type of the matrices, one of TYPES; None for the model's own. One weight at a time is converted.
    Raises CheckpointError ``unsupported_gguf`` for a model that llama.cpp cannot run, ``unsupported_tokenizer``, ``non_finite`` where
    fp16 cannot hold a weight, ``not_a_folder_of_gguf`` and ``cannot_write``; MissingExtraError without the ``gguf`` package.
    """
    gguf = _package()
    folder, dtype = Path(folder), dtype or model.dtype
    check_supported(model.config)
    if dtype not in TYPES:
        raise _unsupported(f"weights in {dtype}", "dtype", remedy="use fp32, fp16 or bf16")
    kind, file_type = TYPES[dtype][0], gguf.LlamaFileType[TYPES[dtype][1]]
    vocabulary = gguf_tokenizer.Vocabulary.of(processor.tokenizer, rows=model.config.rows)
    places, state = plan(model), model.state_dict()
    if folder.exists() and not (folder.is_dir() and all(path.suffix == ".gguf" for path in folder.iterdir())):
        raise CheckpointError(
            "it exists and holds other things", code="not_a_folder_of_gguf", where=str(folder), remedy="give a new folder"
        )

    def write(draft: Path) -> None:
        writer = gguf.GGUFWriter(draft / f"model-{kind}.gguf", "llama")
        _tell_language(writer, gguf, model.config, processor)
        vocabulary.tell(writer)
        _tell_and_fill(writer, gguf, file_type, places.language, state, dtype, _heads(model.config))
        writer = gguf.GGUFWriter(draft / f"mmproj-model-{kind}.gguf", "clip")
        _tell_vision(writer, gguf, model, processor)
        _tell_and_fill(writer, gguf, file_type, places.vision, state, dtype, {})

    try:
        replace_folder(folder, write)
    except OSError as error:
        raise CheckpointError(
            f"it cannot be written ({error.strerror})", code="cannot_write", where=str(folder), remedy="check space and permissions"
        ) from error
    return folder / f"model-{kind}.gguf", folder / f"mmproj-model-{kind}.gguf"


def check_supported(config: ModelConfig) -> None:
    """Raise CheckpointError ``unsupported_gguf`` for what llama.cpp does not run as LLaVA is."""
    text, vision = config.text, config.vision
    rope = _rope(text)
    wrong = [
        ("text_config.model_type", text["model_type"], text["model_type"] in DECODERS, " or ".join(DECODERS)),
        ("text_config.hidden_act", text.get("hidden_act", "silu"), text.get("hidden_act", "silu") == "silu", "silu"),
        ("text_config.rope_parameters", rope["rope_type"], rope["rope_type"] in ("default", "linear"), "default or linear"),
        ("vision_config.hidden_act", vision["hidden_act"], vision["hidden_act"] in ("quick_gelu", "gelu"), "quick_gelu or gelu"),
        ("projector", config.projector, config.projector == "mlp2x_gelu", "mlp2x_gelu"),
        ("vision_feature_select_strategy", config.select_feature, config.select_feature == "patch", "patch"),
    ]
    for where, found, fine, known in wrong:
        if not fine:
            raise _unsupported(f"{found!r}, and only {known} can be written for llama.cpp", where)


def plan(model: Llava) -> Plan:
    """The place of every weight of the model; a head tied to the table is llama.cpp's own default and has none."""
    aliases, layers = weights.aliases_of(model), model.vision_tower.run_layers
    language, vision, dead = {}, {}, []
    for name in model.state_dict():
        layer = re.match(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.", name)
        if name in aliases:
            continue
        if name.startswith("vision_tower.vision_model.post_layernorm.") or (layer and int(layer[1]) >= layers):
            dead.append(name)
        elif name.startswith("language_model."):
            language[_theirs(name, LANGUAGE)] = name
        else:
            vision[_theirs(name, VISION)] = name
    return Plan(language=language, vision=vision, dead=tuple(dead))


def _theirs(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, theirs in table:
        if found := re.fullmatch(pattern, name):
            return found.expand(theirs)
    raise _unsupported(f"the weight {name} has no place in it", "the llama architecture of llama.cpp")


def pair_rows(weight: Tensor, heads: int) -> Tensor:
    """The rows of q or k in llama.cpp's order (see the module)."""
    paired: Tensor = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return paired


def _heads(config: ModelConfig) -> dict[str, int]:
    """How many heads' rows are to be paired, by the end of a name without weight or bias."""
    return {"attn_q": int(config.text["num_attention_heads"]), "attn_k": _kv_heads(config.text)}


def _tell_language(writer: Any, gguf: Any, config: ModelConfig, processor: Processor) -> None:
    """The keys of the decoder. Within its window a Mistral is a Llama, so the window bounds the context."""
    text, rope = config.text, _rope(config.text)
    head = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("LLaVA")
    writer.add_context_length(min(int(text["max_position_embeddings"]), int(text.get("sliding_window") or 1 << 31)))
    writer.add_embedding_length(int(text["hidden_size"]))
    writer.add_block_count(int(text["num_hidden_layers"]))
    writer.add_feed_forward_length(int(text["intermediate_size"]))
    writer.add_head_count(int(text["num_attention_heads"]))
    writer.add_head_count_kv(_kv_heads(text))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(float(text["rms_norm_eps"]))
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(config.rows)
    writer.add_chat_template(processor.template.jinja())


def _tell_vision(writer: Any, gguf: Any, model: Llava, processor: Processor) -> None:
    """The keys of tower and projector. ``feature_layer`` says which hidden state is read; without it llama.cpp stops one earlier."""
    config, vision, layers = model.config, model.config.vision, model.vision_tower.run_layers
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name("LLaVA")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(vision["hidden_act"] == "gelu")
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(int(vision["hidden_size"]))
    writer.add_vision_feed_forward_length(int(vision["intermediate_size"]))
    writer.add_vision_head_count(int(vision["num_attention_heads"]))
    writer.add_vision_attention_layernorm_eps(float(vision["layer_norm_eps"]))
    writer.add_vision_block_count(layers)
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_projection_dim(int(config.text["hidden_size"]))
    writer.add_vision_image_mean(processor.preprocess.mean)
    writer.add_vision_image_std(processor.preprocess.std)
    writer.add_string("clip.vision.mm_patch_merge_type", config.merge)
    if config.canvases:
        writer.add_array("clip.vision.image_grid_pinpoints", [side for canvas in config.canvases for side in canvas])


def _tell_and_fill(
    writer: Any,
    gguf: Any,
    file_type: Any,
    places: Mapping[str, str],
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    heads: Mapping[str, int],
) -> None:
    """Names and shapes of all weights, then the weights one by one."""
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    raw = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for theirs, ours in places.items():
        kind, value = _kind(theirs, state[ours], dtype), state[ours]
        bytes_ = value.numel() * kind.itemsize
        writer.add_tensor_info(theirs, tuple(value.shape), _float32(), bytes_, raw_dtype=gguf.GGMLQuantizationType[raw[kind]])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for theirs, ours in places.items():
            writer.write_tensor_data(_bytes(theirs, state[ours], dtype, heads))
    finally:
        writer.close()


def _kind(theirs: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type a weight has on disk."""
    narrow = value.dim() > 1 and theirs != _POSITIONS and (theirs != _PATCHES or dtype == torch.float16)
    return dtype if narrow else torch.float32


def _bytes(theirs: str, value: Tensor, dtype: torch.dtype, heads: Mapping[str, int]) -> Any:
    """A weight's bytes as they stand in the file. Raises CheckpointError ``non_finite`` where a number does not fit the type."""
    owner = theirs.split(".")[-2]
    paired = pair_rows(value, heads[owner]) if owner in heads else value
    ready = paired.detach().to("cpu", _kind(theirs, value, dtype)).contiguous()
    if not bool(ready.isfinite().all()):
        raise CheckpointError(f"{theirs} holds a number too large for {dtype}", code="non_finite", where=theirs, remedy="use bf16 or fp32")
    return ready.flatten().view(torch.uint8).numpy()


def _float32() -> Any:
    import numpy as np

    return np.dtype(np.float32)  # only tells the gguf package that shapes are in numbers, not bytes


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's fields, from transformers 5's place for them or the older one."""
    old = text.get("rope_scaling") or {}
    given = {"rope_theta": text.get("rope_theta", 10000.0), **old, **(text.get("rope_parameters") or {})}
    return {**given, "rope_type": given.get("rope_type") or given.get("type") or "default"}


def _kv_heads(text: Mapping[str, Any]) -> int:
    return int(text.get("num_key_value_heads") or text["num_attention_heads"])


def _unsupported(what: str, where: str, *, remedy: str = "use the llava-hf checkpoint with transformers or vLLM") -> CheckpointError:
    return CheckpointError(what, code="unsupported_gguf", where=where, remedy=remedy)


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingExtraError(
            "the gguf package is not installed", code="missing_extra", where="gguf", remedy="pip install 'llavakit[gguf]'"
        ) from error
