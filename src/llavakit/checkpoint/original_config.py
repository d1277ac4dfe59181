"""config.json of the original layout <-> ModelConfig and the rule for pictures (spec 1.6).

mm_projector_type        absent: linear                      image_grid_pinpoints     (width, height), only with anyres
mm_patch_merge_type      absent: flat, as without anyres     mm_vision_select_layer   required
image_aspect_ratio       absent: square                      mm_use_im_start_end      absent: no; mm_use_im_patch_token: yes
mm_vision_tower          a name; the tower's own config.json says what it is
all that transformers' config of the language model knows is that model's; the rest is kept in ModelConfig.original
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from llavakit.errors import CheckpointError
from llavakit.model.presets import CLIP_L_336, ModelConfig, ProjectorKind, clip
from llavakit.preprocess import Aspect
from llavakit.tiling import pinpoints

_TEXT: Mapping[str, str] = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_CLASSES: Mapping[str, tuple[str, str]] = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
_ASPECTS: Mapping[Any, Aspect] = {None: "square", "square": "square", "pad": "pad", "anyres": "squash"}
_NAMES: Mapping[Aspect, str] = {"square": "square", "pad": "pad", "squash": "anyres"}
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_FOREIGN = ("mm_resampler_type", "s2")  # parts that no release of the family has
_ABOUT_FILES = ("torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map", "quantization_config")
TOWER_INSIDE = "unfreeze_mm_vision_tower"  # what makes the original look for the tower's weights in the checkpoint
TOWERS: Mapping[str, Mapping[str, Any]] = {  # what the released checkpoints name; every other tower needs its folder
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
    "openai/clip-vit-large-patch14": clip(size=224, width=1024, layers=24, heads=16),
}


def text_kind(fields: Mapping[str, Any]) -> str:
    """The language model's type in transformers. Raises CheckpointError ``unsupported_model``."""
    kind = fields.get("model_type")
    found = _TEXT.get(str(kind), kind)
    if found not in _CLASSES:
        raise CheckpointError(
            f"a model of type {kind!r}", code="unsupported_model", where="config.json", remedy=f"give one of type {', '.join(_TEXT)}"
        )
    return str(found)


def text_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What of an original config.json is the language model's."""
    from transformers import AutoConfig

    kind = text_kind(fields)
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_theta", "rope_scaling"} - {*_ABOUT_FILES, "architectures", "model_type"}
    return {name: value for name, value in fields.items() if name in known and (name, value) != ("rope_scaling", None)} | {
        "model_type": kind
    }


def aspect(fields: Mapping[str, Any]) -> Aspect:
    """How the base view becomes square. Raises CheckpointError for modes that no release has."""
    name = fields.get("image_aspect_ratio")
    if name not in _ASPECTS:
        raise _unsupported(f"image_aspect_ratio {name!r}")
    return _ASPECTS[name]


def to_model(
    fields: Mapping[str, Any], *, vision: Mapping[str, Any], tower_inside: bool, file_rows: int, rows: int, image_token_id: int
) -> ModelConfig:
    """The model of an original config.json and its tower's fields.

    ``file_rows``: rows of the embedding table in the files, ``rows``: in the model. Raises CheckpointError.
    """
    projector, feature = fields.get("mm_projector_type", "linear"), fields.get("mm_vision_select_feature", "patch")
    foreign = [name for name in _FOREIGN if fields.get(name)]
    foreign += ["mm_projector_type"] if projector not in get_args(ProjectorKind) else []
    foreign += ["mm_vision_select_feature"] if feature not in _STRATEGIES else []
    for name in foreign:
        raise _unsupported(f"{name} {fields[name]!r}")
    if "mm_vision_select_layer" not in fields:
        what = "no mm_vision_select_layer"
        raise CheckpointError(what, code="bad_config", where="config.json", remedy="add it; all releases say -2")
    side = int(vision["image_size"])
    tiled = aspect(fields) == "squash"
    canvases = pinpoints(fields.get("image_grid_pinpoints"), side=side, height_first=False) if tiled else ()
    text = text_fields(fields)
    kept = {name: value for name, value in fields.items() if name not in text and name not in _ABOUT_FILES}
    return ModelConfig.from_hf(
        {
            "model_type": "llava_next" if tiled else "llava",
            "vision_config": dict(vision),
            "text_config": text | {"vocab_size": rows},
            "tie_word_embeddings": bool(fields.get("tie_word_embeddings", False)),
            "image_token_index": image_token_id,
            "image_grid_pinpoints": [[height, width] for width, height in canvases] or None,
            "projector_type": projector,
            "projector_hidden_act": "linear" if projector == "linear" else "gelu",
            "vision_feature_layer": fields["mm_vision_select_layer"],
            "vision_feature_select_strategy": _STRATEGIES[feature],
            "merge": fields.get("mm_patch_merge_type", "flat") if tiled else "flat",
            "arithmetic": "original",
            "original": kept | {TOWER_INSIDE: tower_inside, "model_type": fields["model_type"], "vocab_size": file_rows},
        }
    )


def from_model(config: ModelConfig, *, base_aspect: Aspect, max_length: int, tower: str, has_tower: bool, rows: int) -> dict[str, Any]:
    """An original config.json. Raises CheckpointError for what the original cannot be told."""
    if bool(config.canvases) is not (base_aspect == "squash"):
        raise _unsupported(f"a base view by '{base_aspect}' {'with' if config.canvases else 'without'} tiles", remedy="write llava-hf")
    kind = str(config.text["model_type"])
    if kind not in _CLASSES:
        raise _unsupported(f"a language model of type '{kind}'", remedy="write llava-hf")
    model_type, architecture = _CLASSES[kind]
    merge = {"mm_patch_merge_type": config.merge} if config.canvases or "mm_patch_merge_type" in config.original else {}
    points = {"image_grid_pinpoints": [list(canvas) for canvas in config.canvases]} if config.canvases else {}
    return {
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "model_type": model_type,
        "architectures": [architecture],
        "tokenizer_model_max_length": max_length,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        **config.original,
        **_old_rope(config.text),
        "vocab_size": rows,
        "mm_vision_tower": tower,
        TOWER_INSIDE: has_tower,
        "mm_hidden_size": config.vision["hidden_size"],
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": config.select_feature,
        "image_aspect_ratio": _NAMES[base_aspect],
        **merge,
        **points,
    }


def _old_rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields as transformers 4 spells them, the original's own."""
    rope = dict(text.get("rope_parameters") or {})
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    rest = {name: value for name, value in text.items() if name not in ("rope_parameters", "model_type", "vocab_size")}
    return rest | ({"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling} if "rope_theta" in rope else {})


def _unsupported(what: str, *, remedy: str = "use the code that it was made with") -> CheckpointError:
    return CheckpointError(f"{what} is not known here", code="unsupported_model", where="config.json", remedy=remedy)
