"""``load_pretrained_model``: a checkpoint as the four things old scripts unpack.

What a checkpoint is follows from its files, not from ``model_name``: that only serves old code that passes it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llavakit.assistant import Assistant
from llavakit.checkpoint.folders import of_run
from llavakit.checkpoint.places import find
from llavakit.errors import CheckpointError

_log = logging.getLogger(__name__)
_OLD_KEYS = ("mm_", "image_", "tokenizer_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "max_sequence_length")
_KNOWN = frozenset({"attn_implementation", "dtype", "torch_dtype", "use_flash_attention_2", "low_cpu_mem_usage", "multimodal"})


def load_pretrained_model(
    model_path: str | Path | None,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> tuple[Any, LlavaLlamaForCausalLM, Any, int]:
    """(tokenizer, model, image_processor, context_len). Without a path, the built-in model.

    The model lies on one device: the one named, otherwise CUDA if there is one. Its type is the stored one or, on a processor that is
    slow in it, another (``torch_dtype`` decides). ``context_len`` is the config's ``max_sequence_length``, or 2048 as it always was.
    Raises CheckpointError.
    """
    _check_supported(model_base, kwargs)
    folder = of_run(find(model_path))
    loaded = Assistant.load(
        folder,
        dtype=kwargs.get("torch_dtype") or kwargs.get("dtype") or "auto",
        device=_device(device_map, device),
        quantization="4bit" if load_4bit else "8bit" if load_8bit else None,
    )
    text = loaded.model.language_model.config
    kind = LlavaMistralForCausalLM if text.model_type == "mistral" else LlavaLlamaForCausalLM
    model = kind(loaded.model, loaded.processor, _old_fields(folder)).eval()
    attention = "flash_attention_2" if use_flash_attn or kwargs.get("use_flash_attention_2") else kwargs.get("attn_implementation")
    if attention not in (None, "sdpa"):  # sdpa is what it has, by llavakit's own kernels where they are faster
        model.language_model.set_attn_implementation(attention)
    image_processor = model.get_vision_tower().image_processor
    return loaded.processor.tokenizer, model, image_processor, int(getattr(model.config, "max_sequence_length", 2048))


def _check_supported(base: str | None, more: Mapping[str, Any]) -> None:
    if base is not None:
        raise CheckpointError(
            "weights that belong on a base model",
            code="base_not_supported",
            where="model_base",
            remedy="merge them into a checkpoint first",
        )
    unknown = sorted(set(more) - _KNOWN)
    if unknown:
        _log.warning("load_pretrained_model does not know %s", ", ".join(unknown))


def _device(device_map: Any, device: str | torch.device) -> str | None:
    """One device from the two old ways of saying it; None where neither says more than "where there is one"."""
    if str(device) != "cuda":
        return str(device)
    if isinstance(device_map, Mapping):
        device_map = device_map.get("")
    return None if device_map in (None, "", "auto", "cuda") else str(device_map)


def _old_fields(folder: Path) -> dict[str, Any]:
    """What the config.json of the original layout says about pictures and lengths; nothing for other layouts."""
    file = folder / "config.json"
    fields = json.loads(file.read_text("utf-8")) if file.exists() else {}
    original = "mm_vision_tower" in fields or "mm_projector_type" in fields
    return {name: value for name, value in fields.items() if name.startswith(_OLD_KEYS)} if original else {}
