"""A checkpoint as two GGUF files, for llama.cpp and all that is built on it. Written only; the ``gguf`` package is an extra.

    language_model.*                                 -> model.gguf     architecture "llama": Llama and Mistral decoders, and the tokenizer
    vision_tower.*, multi_modal_projector.*, image_newline -> mmproj.gguf   architecture "clip", projector "mlp"

llama.cpp turns neighbouring pairs of a head's rows by one angle, transformers row i with row i + half. So the rows of q and k move:

    transformers  a0 a1 a2 b0 b1 b2    ->    llama.cpp  a0 b0 a1 b1 a2 b2

What LLaVA stores and never runs (the tower's layers above the selected one and its last norm) is not written: llama.cpp would run it.
What llama.cpp's readers do with a picture is theirs: they add no row ends, trim nothing, and their GELU is the tanh form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llavakit.checkpoint import gguf_tokenizer
from llavakit.checkpoint.folders import replace_folder
from llavakit.errors import CheckpointError, MissingExtraError
from llavakit.model.llava import Llava
from llavakit.processor import Processor

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
GgufDtype = Literal["float32", "float16", "bfloat16"]
DECODERS = ("llama", "mistral")

_TEXT: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_VISION: Mapping[str, str] = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_PROJECTOR: Mapping[str, str] = {"linear_1": "mm.0", "linear_2": "mm.2"}
_LAYER = re.compile(r"(?:model|encoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXACT = ("v.patch_embd.weight", "v.position_embd.weight")  # small, and no backend convolves in bfloat16


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One weight and its place in a file; ``name`` is None for a weight that is never run."""

    source: str
    name: str | None
    value: Tensor


def write_gguf(model: Llava, processor: Processor, folder: Path, *, dtype: GgufDtype = "float16") -> tuple[Path, Path]:
    """Write ``model.gguf`` and ``mmproj.gguf`` into a folder, whole or not at all; returns the two paths.

    dtype: the type of all matrices; norms, biases and the tower's embeddings are float32.
    Raises MissingExtraError without the ``gguf`` package, CheckpointError ``unsupported_model`` and ``unsupported_tokenizer`` for what
    llama.cpp cannot run as we do, ``not_a_checkpoint`` for a folder holding something else, ``cannot_write``.
    """
    _library()
    folder = Path(folder)
    _check(model)
    words = gguf_tokenizer.read(processor, rows=model.config.rows)
    if folder.exists() and not (folder.is_dir() and ((folder / MODEL).is_file() or not any(folder.iterdir()))):
        raise CheckpointError("it exists and holds no GGUF", code="not_a_checkpoint", where=str(folder), remedy="give a new folder")

    def write(draft: Path) -> None:
        _write(draft / MODEL, "llama", _text_fields(model) | words.fields(), text_entries(model), dtype)
        _write(draft / MMPROJ, "clip", _vision_fields(model, processor), vision_entries(model), dtype)

    try:
        replace_folder(folder, write)
    except OSError as error:
        raise CheckpointError(
            f"it cannot be written ({error.strerror})", code="cannot_write", where=str(folder), remedy="check space and permissions"
        ) from error
    return folder / MODEL, folder / MMPROJ


def pair_rows(value: Tensor, heads: int) -> Tensor:
    """The rows of q or k, weight or bias, in llama.cpp's order (see the drawing above)."""
    paired: Tensor = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return paired


def text_entries(model: Llava) -> Iterator[Entry]:
    """The language model's weights; a tied head is its embedding table and is not stored twice."""
    config = model.language_model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for source, value in model.language_model.state_dict().items():
        if source == "lm_head.weight" and model.config.tied:
            yield Entry(source=f"language_model.{source}", name=None, value=value)
        elif found := _LAYER.fullmatch(source):
            number, part, kind = found.groups()
            place = _TEXT[part]
            moved = pair_rows(value, heads[place]) if place in heads else value
            yield Entry(source=f"language_model.{source}", name=f"blk.{number}.{place}.{kind}", value=moved)
        else:
            part, _, kind = source.rpartition(".")
            yield Entry(source=f"language_model.{source}", name=f"{_TEXT[part]}.{kind}", value=value)


def vision_entries(model: Llava) -> Iterator[Entry]:
    """The tower's weights up to the selected layer, the projector's, and the row end."""
    for source, value in model.vision_tower.vision_model.state_dict().items():
        full = f"vision_tower.vision_model.{source}"
        if found := _LAYER.fullmatch(source):
            number, part, kind = found.groups()
            name = f"v.blk.{number}.{_VISION[part]}.{kind}" if int(number) < model.vision_tower.run_layers else None
            yield Entry(source=full, name=name, value=value)
        elif source.startswith("post_layernorm.") or source.endswith("position_ids"):
            yield Entry(source=full, name=None, value=value)
        else:
            yield Entry(source=full, name=_VISION[source], value=value)
    for source, value in model.multi_modal_projector.state_dict().items():
        part, kind = source.split(".")
        yield Entry(source=f"multi_modal_projector.{source}", name=f"{_PROJECTOR[part]}.{kind}", value=value)
    if model.image_newline is not None:
        yield Entry(source="image_newline", name="v.image_newline", value=model.image_newline.detach())


def _check(model: Llava) -> None:
    """Refuse what llama.cpp would not run, or would run as another model."""
    text, config = model.language_model.config, model.config
    rope = dict(text.rope_parameters)
    found = {
        "text_config.model_type": (text.model_type, DECODERS),
        "text_config.hidden_act": (getattr(text, "hidden_act", None), ("silu",)),
        "text_config.rope_parameters": (rope.get("rope_type", "default"), ("default", "linear")),
        "vision_config.hidden_act": (config.vision.get("hidden_act", "quick_gelu"), ("quick_gelu", "gelu")),
        "projector_type": (config.projector, ("mlp2x_gelu",)),
        "vision_feature_select_strategy": (config.select_feature, ("patch",)),
    }
    for where, (value, known) in found.items():
        if value not in known:
            raise CheckpointError(
                f"{where} is {value!r}, as GGUF only {' or '.join(known)} can be written",
                code="unsupported_model", where="config.json", remedy="serve the llava-hf layout with vLLM or transformers",
            )  # fmt: skip


def _text_fields(model: Llava) -> dict[str, Any]:
    """The keys of the language model. A sliding window bounds the context: up to its length both are the same model."""
    text = model.language_model.config
    rope, window = dict(text.rope_parameters), getattr(text, "sliding_window", None)
    head = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(rope["factor"])} if "factor" in rope else {}
    return {
        "general.name": "LLaVA",
        "llama.vocab_size": model.config.rows,
        "llama.context_length": min(int(text.max_position_embeddings), int(window or text.max_position_embeddings)),
        "llama.embedding_length": int(text.hidden_size),
        "llama.block_count": int(text.num_hidden_layers),
        "llama.feed_forward_length": int(text.intermediate_size),
        "llama.attention.head_count": int(text.num_attention_heads),
        "llama.attention.head_count_kv": int(text.num_key_value_heads),
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": float(rope["rope_theta"]),
        **scaling,
    }


def _vision_fields(model: Llava, processor: Processor) -> dict[str, Any]:
    """The keys of tower and projector. ``feature_layer`` says after which layer to stop; without it readers drop one more."""
    vision, config = model.vision_tower.vision_model.config, model.config
    tiled = {
        "clip.vision.mm_patch_merge_type": config.merge,
        "clip.vision.image_grid_pinpoints": [edge for canvas in config.canvases for edge in canvas],  # width, height, width, ...
    }
    return {
        "general.name": "LLaVA",
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": vision.hidden_act == "gelu",
        "clip.vision.image_size": config.image_size,
        "clip.vision.patch_size": config.patch_size,
        "clip.vision.embedding_length": int(vision.hidden_size),
        "clip.vision.feed_forward_length": int(vision.intermediate_size),
        "clip.vision.projection_dim": int(model.language_model.config.hidden_size),
        "clip.vision.block_count": model.vision_tower.run_layers,
        "clip.vision.feature_layer": [model.vision_tower.run_layers],
        "clip.vision.attention.head_count": int(vision.num_attention_heads),
        "clip.vision.attention.layer_norm_epsilon": float(vision.layer_norm_eps),
        "clip.vision.image_mean": [float(value) for value in processor.preprocess.mean],
        "clip.vision.image_std": [float(value) for value in processor.preprocess.std],
        **(tiled if config.canvases else {}),
    }


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            "GGUF files need the package gguf", code="missing_extra", where="gguf", remedy="pip install 'llavakit[gguf]'"
        ) from error
    return gguf


def _write(path: Path, architecture: str, fields: Mapping[str, Any], entries: Iterator[Entry], dtype: GgufDtype) -> None:
    """One file: keys, the table of tensors, then tensor by tensor, so that one at a time is copied."""
    library = _library()
    writer = library.GGUFWriter(path, architecture)
    writer.add_file_type({"float32": 0, "float16": 1, "bfloat16": 32}[dtype])
    for name, value in fields.items():
        _add(writer, name, value)
    kept = [(entry.name, entry.value, _stored(entry, dtype)) for entry in entries if entry.name is not None]
    raw = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, value, kind in kept:
        shape, size = tuple(value.shape), value.numel() * kind.itemsize
        writer.add_tensor_info(name, shape, _numpy(value.flatten()[:1], kind).dtype, size, library.GGMLQuantizationType[raw[kind]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, value, kind in kept:
        writer.write_tensor_data(_numpy(value, kind))
    writer.close()


def _stored(entry: Entry, dtype: GgufDtype) -> torch.dtype:
    """llama.cpp adds vectors in float32 and multiplies matrices in any type."""
    return torch.float32 if entry.value.dim() < 2 or entry.name in _EXACT else getattr(torch, dtype)  # type: ignore[no-any-return]


def _numpy(value: Tensor, kind: torch.dtype) -> Any:
    """As numpy; bfloat16, which it has not, as its bits."""
    ready = value.detach().to("cpu", kind).contiguous()
    return (ready.view(torch.int16) if kind == torch.bfloat16 else ready).numpy()


def _add(writer: Any, name: str, value: Any) -> None:
    """A key by the type of its value: whole numbers are uint32, but for the elements of lists (int32), as llama.cpp reads them."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
