"""What a model is made of, as one value.

``ModelConfig`` holds the tower's and the language model's own transformers fields, and the facts that join them. It reads and
writes ``config.json`` of the llava-hf layout, so transformers builds the same model from the same file.

    config.json                                   ModelConfig
    vision_config {clip_vision_model, ...}        vision
    text_config {llama | mistral | qwen2 | ...}   text
    image_token_index                             image_token_id
    vision_feature_layer                          select_layer
    vision_feature_select_strategy                select_feature    "default" drops the CLS row, "full" keeps it
    projector_type (ours; absent: mlp2x_gelu)     projector         see ``to_hf`` for the linear one
    image_grid_pinpoints (height, width)          canvases          model_type llava_next only, whose merge is spatial_unpad
    merge, arithmetic (ours; absent: see above)   merge, arithmetic
    original (ours)                               original
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from llavakit.errors import CheckpointError
from llavakit.tiling import MERGES, Arithmetic, Merge, Size, Tiling, pinpoints

ProjectorKind = Literal["linear", "mlp2x_gelu"]
SelectFeature = Literal["patch", "cls_patch"]

ONE_VIEW, TILED = "llava", "llava_next"  # model types
ARCHITECTURES = {ONE_VIEW: "LlavaForConditionalGeneration", TILED: "LlavaNextForConditionalGeneration"}
_STRATEGY: Mapping[SelectFeature, str] = {"patch": "default", "cls_patch": "full"}
_FEATURE: Mapping[str, SelectFeature] = {strategy: feature for feature, strategy in _STRATEGY.items()}
_MERGE: Mapping[str, Merge] = {ONE_VIEW: "flat", TILED: "spatial_unpad"}  # what transformers does, unless the file says more
_ACTIVATION: Mapping[ProjectorKind, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
_NOT_ARCHITECTURE = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_attn_implementation")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A LLaVA without its weights. Raises CheckpointError ``bad_config`` when the parts do not fit.

    ``canvases``, ``merge`` and ``arithmetic`` are those of ``tiling.Tiling``; LLaVA v1 and 1.5 have no canvases and merge "flat".
    ``original``: fields of a checkpoint in the original layout that have no place here, kept to be written back.
    """

    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    projector: ProjectorKind = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: SelectFeature = "patch"
    canvases: tuple[Size, ...] = ()
    merge: Merge = "flat"
    arithmetic: Arithmetic = "transformers"
    image_token_id: int
    original: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hidden_states = int(self.vision["num_hidden_layers"]) + 1  # the embeddings count as the first (spec 1.4, trap 33)
        if not -hidden_states <= self.select_layer < hidden_states:
            raise _wrong("vision_feature_layer", f"layer {self.select_layer} of {hidden_states} hidden states")
        if self.projector not in _ACTIVATION:
            raise _wrong("projector", f"'{self.projector}' is no projector", remedy=f"use one of {', '.join(_ACTIVATION)}")
        if self.select_feature not in _STRATEGY:
            raise _wrong("select_feature", f"'{self.select_feature}' is no selection", remedy=f"use one of {', '.join(_STRATEGY)}")
        if self.merge not in MERGES:
            raise _wrong("merge", f"'{self.merge}' is no way to merge", remedy=f"use one of {', '.join(MERGES)}")
        assert self.tiling.side == self.image_size  # made here, so that canvases that do not fit are told here
        if not 0 <= self.image_token_id < self.rows:
            raise _wrong("image_token_index", f"the image token is {self.image_token_id} but the vocabulary has {self.rows} rows")

    @property
    def image_size(self) -> int:
        """Side of a view in pixels."""
        return int(self.vision["image_size"])

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.vision["patch_size"])

    @cached_property
    def tiling(self) -> Tiling:
        """The rule from an image's size to its views and tokens."""
        return Tiling(
            side=self.image_size, patch=self.patch_size, canvases=self.canvases, merge=self.merge, arithmetic=self.arithmetic,
            class_token=self.select_feature == "cls_patch",
        )  # fmt: skip

    @property
    def view_tokens(self) -> int:
        """Tokens that one view takes: its patches, and the CLS row where it is kept."""
        return (self.image_size // self.patch_size) ** 2 + (self.select_feature == "cls_patch")

    @property
    def has_newline(self) -> bool:
        """Whether there is a row-end vector, ``image_newline``."""
        return self.merge == "spatial_unpad"

    @property
    def rows(self) -> int:
        """Rows of the embedding table; at least the tokenizer's size."""
        return int(self.text["vocab_size"])

    @property
    def file_rows(self) -> int:
        """Rows of that table in the files of the original layout that the model came from, else all."""
        return min(self.rows, int(self.original.get("vocab_size", self.rows)))

    @property
    def tied(self) -> bool:
        """Whether the language model's head is its embedding table."""
        return bool(self.text["tie_word_embeddings"])

    def to_hf(self) -> dict[str, Any]:
        """The fields of config.json.

        transformers knows no linear projector, so one is written as its two-layer projector without a non-linearity, whose
        second layer is the identity (``checkpoint.store`` writes those weights): the same function, exactly.
        """
        kind = TILED if self.canvases else ONE_VIEW
        usual: dict[str, Any] = {"projector_type": "mlp2x_gelu", "merge": _MERGE[kind], "arithmetic": "transformers"}
        marked = {"projector_type": self.projector, "merge": self.merge, "arithmetic": self.arithmetic}
        tiled = {"image_grid_pinpoints": [[height, width] for width, height in self.canvases]} if self.canvases else {}
        return {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": kind,
            **tiled,
            "image_token_index": self.image_token_id,
            "image_seq_length": self.view_tokens,
            "projector_hidden_act": _ACTIVATION[self.projector],
            **{name: value for name, value in marked.items() if value != usual[name]},
            "multimodal_projector_bias": True,
            "vision_feature_layer": self.select_layer,
            "vision_feature_select_strategy": _STRATEGY[self.select_feature],
            "tie_word_embeddings": self.tied,
            "vision_config": dict(self.vision),
            "text_config": dict(self.text),
            **({"original": dict(self.original)} if self.original else {}),
        }

    @staticmethod
    def from_hf(fields: Mapping[str, Any]) -> ModelConfig:
        """From the fields of a llava-hf config.json; what is absent there has transformers' defaults.

        Raises CheckpointError: ``original_layout`` for the original's files, ``unsupported_model`` for relatives of LLaVA-1.5,
        ``bad_config`` for fields that transformers refuses.
        """
        _check_kind(fields)
        from transformers import LlavaConfig, LlavaNextConfig

        make = LlavaNextConfig if fields["model_type"] == TILED else LlavaConfig
        try:
            whole = make(**{name: value for name, value in fields.items() if name not in _NOT_ARCHITECTURE})
            vision, text = whole.vision_config.to_dict(), whole.text_config.to_dict()
        except Exception as error:  # transformers raises as many kinds as there are fields
            raise _wrong("config.json", f"transformers refuses it: {str(error).strip().splitlines()[-1]}") from error
        projector = fields.get("projector_type", "mlp2x_gelu")
        for side in ("image_size", "patch_size"):
            if not isinstance(vision.get(side), int):  # transformers accepts null here
                raise _wrong("config.json", f"vision_config.{side} is {vision.get(side)!r}, not a number of pixels")
        _check_supported(whole, vision, projector)
        text["tie_word_embeddings"] = bool(whole.tie_word_embeddings)  # the outer field decides, and may come from the inner one
        return ModelConfig(
            vision=_architecture(vision),
            text=_architecture(text),
            projector=projector,
            select_layer=whole.vision_feature_layer,
            select_feature=_FEATURE[whole.vision_feature_select_strategy],
            canvases=_canvases(whole, vision["image_size"]),
            merge=fields.get("merge", _MERGE[whole.model_type]),
            arithmetic=fields.get("arithmetic", "transformers"),
            image_token_id=whole.image_token_index,
            original=fields.get("original", {}),
        )


def _canvases(whole: Any, side: int) -> tuple[Size, ...]:
    return pinpoints(whole.image_grid_pinpoints, side=side, height_first=True) if whole.model_type == TILED else ()


def _check_kind(fields: Mapping[str, Any]) -> None:
    """Only the llava-hf layout passes; the original's config may say model_type 'llava' too (spec trap 22)."""
    if "mm_vision_tower" in fields or "mm_projector_type" in fields:
        raise CheckpointError(
            "a checkpoint in the original LLaVA layout", code="original_layout", where="config.json", remedy="convert it: llava convert"
        )
    if fields.get("model_type") not in list(ARCHITECTURES):  # a list compares, so that a value of any kind may stand there
        raise CheckpointError(
            f"a model of type {fields.get('model_type')!r}",
            code="unsupported_model",
            where="config.json",
            remedy=f"give a model of type {' or '.join(ARCHITECTURES)}",
        )


def _check_supported(whole: Any, vision: Mapping[str, Any], projector: str) -> None:
    """Refuse what transformers would run and this package would run differently."""
    found = {
        "vision_config.model_type": (vision["model_type"], "clip_vision_model"),
        "multimodal_projector_bias": (whole.multimodal_projector_bias, True),
        "projector_hidden_act": (whole.projector_hidden_act, _ACTIVATION.get(str(projector))),  # type: ignore[call-overload]
        "vision_feature_layer": (type(whole.vision_feature_layer).__name__, "int"),
    }
    for name, (value, needed) in found.items():
        if value != needed:
            raise CheckpointError(
                f"{name} is {value!r}, only {needed!r} is known here",
                code="unsupported_model",
                where="config.json",
                remedy="use transformers",
            )


def _architecture(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _NOT_ARCHITECTURE}


def _wrong(where: str, what: str, *, remedy: str = "repair the file or fetch it again") -> CheckpointError:
    return CheckpointError(what, code="bad_config", where=where, remedy=remedy)


def clip(*, size: int, width: int, layers: int, heads: int, patch: int = 14, projection: int = 768) -> dict[str, Any]:
    """A CLIP tower for views of ``size`` pixels (spec 1.4)."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": size,
        "patch_size": patch,
        "projection_dim": projection,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def llama(*, width: int, layers: int, heads: int, feed_forward: int, rows: int, positions: int, pad: int) -> dict[str, Any]:
    """A Llama decoder as Vicuna v1.5 is one (spec 1.3)."""
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": rows,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": pad,
    }


CLIP_L_336 = clip(size=336, width=1024, layers=24, heads=16)
PRESETS: Mapping[str, ModelConfig] = {
    "tiny": ModelConfig(
        vision=clip(size=112, width=192, layers=6, heads=6, projection=128),
        text=llama(width=192, layers=6, heads=6, feed_forward=512, rows=1024, positions=1024, pad=1023),
        image_token_id=1022,
    ),
    "llava-1.5-7b": ModelConfig(
        vision=CLIP_L_336,
        text=llama(width=4096, layers=32, heads=32, feed_forward=11008, rows=32064, positions=4096, pad=32001),
        image_token_id=32000,
    ),
    "llava-1.5-13b": ModelConfig(
        vision=CLIP_L_336,
        text=llama(width=5120, layers=40, heads=40, feed_forward=13824, rows=32064, positions=4096, pad=32001),
        image_token_id=32000,
    ),
}
