"""Tiny random checkpoints in every layout of the original LLaVA, and what they compute, both put together here from transformers' parts.

Nothing of the package's own reading or writing is used: names, files and the forward pass are spelled out as the original has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from llavakit.model.merge import merge
from llavakit.processor import Inputs
from tiny import llama_tokenizer

WIDTH, VISION, SIDE = 32, 24, 56
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
TEXTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None},
}
KINDS = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
NEXT: dict[str, Any] = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}


@dataclass(frozen=True, kw_only=True, repr=False)
class Original:
    """The parts of one LLaVA."""

    fields: dict[str, Any]
    text: Any
    tower: Any
    projector: dict[str, Tensor]
    newline: Tensor | None

    def weights(self, *, tower: bool) -> dict[str, Tensor]:
        """The whole state dict by the original's names."""
        found = {name: value.detach() for name, value in self.text.state_dict().items()}
        found |= {f"model.mm_projector.{name}": value for name, value in self.projector.items()}
        if self.newline is not None:
            found["model.image_newline"] = self.newline
        if tower:
            inside = "model.vision_tower.vision_tower.vision_model."
            found |= {inside + name: value.detach() for name, value in self.tower.state_dict().items()}
        return {name: value.clone() for name, value in found.items()}

    def logits(self, inputs: Inputs, image_id: int) -> Tensor:
        """Of every position: text embedded, features in the pictures' places, the language model run on the whole."""
        with torch.inference_mode():
            hidden = self.tower(inputs.views, output_hidden_states=True).hidden_states[self.fields["mm_vision_select_layer"]][:, 1:]
            p = self.projector
            if "weight" in p:
                features = F.linear(hidden, p["weight"], p["bias"])
            else:
                features = F.linear(F.gelu(F.linear(hidden, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])
            ids = inputs.input_ids
            rows = self.text.get_input_embeddings()(ids.clamp(max=self.text.config.vocab_size - 1))
            rows[ids == image_id] = merge(features, inputs.grids, self.newline)
            return self.text(inputs_embeds=rows[None]).logits[0]


def make(kind: str = "llama", *, projector: str = "mlp2x_gelu", seed: int = 0, rows: int | None = None, **fields: Any) -> Original:
    """Random parts; ``fields`` change or (None) remove keys of config.json."""
    tokens = llama_tokenizer(bare=True)
    torch.manual_seed(seed)
    text = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": rows or len(tokens), "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "tie_word_embeddings": False, "initializer_range": 0.2, **TEXTS[kind],
    }  # fmt: skip
    model_type, architecture = KINDS[kind]
    whole = {
        **text, "model_type": model_type, "architectures": [architecture], "torch_dtype": "float16", "transformers_version": "4.37.2",
        "mm_vision_tower": "somebody/clip", "mm_hidden_size": VISION, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True, "image_aspect_ratio": "pad",
        "mm_projector_type": projector, "tokenizer_model_max_length": 1000,
    } | fields  # fmt: skip
    shape = {"hidden_size": VISION, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 16}
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=SIDE, patch_size=14, initializer_factor=5.0, **shape)).eval()
    linear = {"weight": torch.randn(WIDTH, VISION), "bias": torch.randn(WIDTH)}
    two = {f"0.{name}": value for name, value in linear.items()}
    two |= {"2.weight": torch.randn(WIDTH, WIDTH) / 5, "2.bias": torch.randn(WIDTH)}
    return Original(
        fields={name: value for name, value in whole.items() if value is not None},
        text=AutoModelForCausalLM.from_config(AutoConfig.for_model(**text)).eval(),
        tower=tower,
        projector=linear if projector == "linear" else two,
        newline=torch.randn(WIDTH) if "unpad" in whole.get("mm_patch_merge_type", "") else None,
    )


def write(folder: Path, fields: dict[str, Any], weights: dict[str, Tensor] | None, *, pickled: bool = False, shards: int = 1) -> Path:
    """config.json, tokenizer and, if given, weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    llama_tokenizer(bare=True).save_pretrained(folder)
    if weights is None:
        return folder
    parts = [dict(list(weights.items())[number::shards]) for number in range(shards)]
    stem, ending, put = ("pytorch_model", "bin", torch.save) if pickled else ("model", "safetensors", save_file)
    files = [f"{stem}-{n:05d}-of-{shards:05d}.{ending}" if shards > 1 else f"{stem}.{ending}" for n in range(1, shards + 1)]
    for part, file in zip(parts, files, strict=True):
        put(part, folder / file)
    if shards > 1:
        placed = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def write_tower(folder: Path, made: Original) -> Path:
    made.tower.save_pretrained(folder)
    return folder


def write_text(folder: Path, made: Original) -> Path:
    """The language model alone."""
    made.text.save_pretrained(folder)
    llama_tokenizer(bare=True).save_pretrained(folder)
    return folder
