"""LoRA adapters and deltas: what is merged is the sum of its parts, and everything else is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llavakit.checkpoint import store
from llavakit.checkpoint.layouts import describe
from originals import Original, make, write, write_text, write_tower
from test_original import equal, refused

RANK = 4
TARGETS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def lora(made: Original, rank: int = RANK) -> dict[str, Tensor]:
    """Random matrices for some layers, named as PEFT names them."""
    found = {}
    for name, value in made.text.state_dict().items():
        if name.removesuffix(".weight").endswith(TARGETS):
            path = "base_model.model." + name.removesuffix(".weight")
            found[f"{path}.lora_A.weight"] = torch.randn(rank, value.shape[1])
            found[f"{path}.lora_B.weight"] = torch.randn(value.shape[0], rank)
    return found


def write_lora(folder: Path, made: Original, matrices: dict[str, Tensor], *, pickled: bool = True, **fields: Any) -> Path:
    """What the original's training leaves: adapter, config.json, and the projector in non_lora_trainables.bin."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": "somebody/vicuna", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(made.fields))
    if pickled:
        torch.save(matrices, folder / "adapter_model.bin")
    else:
        save_file(matrices, folder / "adapter_model.safetensors")
    extras = {f"base_model.model.model.mm_projector.{name}": value for name, value in made.projector.items()}
    torch.save(extras, folder / "non_lora_trainables.bin")
    return folder


def merge(made: Original, matrices: dict[str, Tensor], scale: float) -> None:
    """The reference: add the products to the reference's own weights."""
    with torch.no_grad():
        for name, value in made.text.named_parameters():
            path = "base_model.model." + name.removesuffix(".weight")
            if f"{path}.lora_A.weight" in matrices:
                value += scale * (matrices[f"{path}.lora_B.weight"] @ matrices[f"{path}.lora_A.weight"])


@pytest.mark.parametrize(
    ("pickled", "fields", "scale"),
    [(True, {}, 8 / RANK), (False, {"use_rslora": True}, 8 / math.sqrt(RANK)), (False, {"alpha_pattern": {".*_proj": 2}}, 2 / RANK)],
)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_an_adapter_is_merged(tmp_path: Path, kind: str, pickled: bool, fields: dict[str, Any], scale: float) -> None:
    made = make(kind)
    base, tower = write_text(tmp_path / "base", made), write_tower(tmp_path / "clip", made)
    matrices = lora(made)
    folder = write_lora(tmp_path / "adapter", made, matrices, pickled=pickled, **fields)
    merge(made, matrices, scale)
    assert describe(folder).kind == "lora"
    equal(made, *store.load(folder, base=base, tower=tower, dtype="fp32", allow_pickle=True))
    refused("base_missing", "somebody/vicuna", "--base", folder=folder, tower=tower, allow_pickle=True)
    refused("pickle_refused", ".bin", folder=folder, base=base, tower=tower)


def test_an_adapter_on_a_whole_llava(tmp_path: Path) -> None:
    made, older = make(), make(seed=1)
    older.text.load_state_dict(made.text.state_dict())  # the base has another projector, and the adapter's own must win
    base = write(tmp_path / "base", older.fields, older.weights(tower=False))
    matrices = lora(made)
    folder = write_lora(tmp_path / "adapter", made, matrices)
    merge(made, matrices, 2)
    tower = write_tower(tmp_path / "clip", made)
    equal(made, *store.load(folder, base=base, tower=tower, dtype="fp32", allow_pickle=True))
    native, processor = store.load(base, tower=tower, dtype="fp32")
    store.save(native, processor, tmp_path / "hf")
    equal(made, *store.load(folder, base=tmp_path / "hf", dtype="fp32", allow_pickle=True))


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    made = make()
    base, tower = write_text(tmp_path / "base", made), write_tower(tmp_path / "clip", made)
    options = {"base": base, "tower": tower, "allow_pickle": True}
    for number, fields in enumerate(({"use_dora": True}, {"peft_type": "IA3"}, {"fan_in_fan_out": True}, {"init_lora_weights": "pissa"})):
        folder = write_lora(tmp_path / f"a{number}", made, lora(made), **fields)
        refused("unsupported_adapter", folder=folder, **options)
    folder = write_lora(tmp_path / "magnitude", made, lora(made) | {"base_model.model.x.lora_magnitude_vector": torch.ones(3)})
    refused("unsupported_adapter", "lora_magnitude_vector", folder=folder, **options)
    folder = write_lora(tmp_path / "pattern", made, lora(made), alpha_pattern={"(": 3})
    refused("bad_config", "alpha_pattern", folder=folder, **options)


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    made = make()
    base, tower = write_text(tmp_path / "base", made), write_tower(tmp_path / "clip", made)
    options = {"tower": tower, "allow_pickle": True}
    wide = {name: value.repeat(*(2 if n == value.dim() - 1 else 1 for n in range(value.dim()))) for name, value in lora(made).items()}
    refused("adapter_mismatch", "q_proj", folder=write_lora(tmp_path / "wide", made, wide), base=base, **options)
    lost = {name.replace("layers.1", "layers.9"): value for name, value in lora(made).items()}
    refused("adapter_mismatch", "layers.9", folder=write_lora(tmp_path / "deep", made, lost), base=base, **options)
    folder = write_lora(tmp_path / "adapter", made, lora(made))
    refused("wrong_base", "mistral", folder=folder, base=write_text(tmp_path / "other", make("mistral")), **options)
    refused("bad_base", "lora", folder=folder, base=folder, **options)
    (folder / "non_lora_trainables.bin").unlink()
    refused("no_projector", "non_lora_trainables.bin", folder=folder, base=base, **options)  # spec trap 26


def delta_of(made: Original, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the original's make_delta: equal shapes subtracted, tables over their common rows, the rest as it is."""
    found = made.weights(tower=False)
    for name, value in base.items():
        found[name][: len(value)] -= value
    return found


@pytest.mark.parametrize("more", [0, 3])
def test_a_delta_is_added(tmp_path: Path, more: int) -> None:
    base = make(seed=1)
    made = make(rows=len(base.text.get_input_embeddings().weight) + more)
    with torch.no_grad():  # a fine-tuned model is near its base
        for name, value in made.text.state_dict().items():
            old = base.text.state_dict()[name]
            value[: len(old)] = old + 0.01 * value[: len(old)]
    old = base.text.state_dict()
    folder = write(tmp_path / "anything", made.fields, delta_of(made, old))
    where, tower = write_text(tmp_path / "base", base), write_tower(tmp_path / "clip", made)
    assert describe(folder).kind == "delta"
    equal(made, *store.load(folder, base=where, tower=tower, dtype="fp32"))
    refused("base_missing", "delta", "--base", folder=folder, tower=tower)
    refused("wrong_base", "mistral", folder=folder, base=write_text(tmp_path / "other", make("mistral")), tower=tower)


def test_a_delta_in_16_bits_is_added_as_in_16_bits(tmp_path: Path) -> None:
    base, made = make(seed=1), make()
    halves = {name: value.half() for name, value in made.weights(tower=False).items()}
    old = {name: value.half() for name, value in base.text.state_dict().items()}
    sums = {name: value + old[name] if name in old else value for name, value in halves.items()}
    sums["model.norm.weight"] = old["model.norm.weight"]
    folder = write(tmp_path / "delta", made.fields, halves | {"model.norm.weight": torch.zeros_like(old["model.norm.weight"])})
    base.text.half()
    where, tower = write_text(tmp_path / "base", base), write_tower(tmp_path / "clip", made)
    model, _ = store.load(folder, base=where, tower=tower, dtype="fp16")
    found = model.state_dict()
    assert torch.equal(found["language_model.model.layers.0.mlp.up_proj.weight"], sums["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(found["language_model.lm_head.weight"][: len(sums["lm_head.weight"])], sums["lm_head.weight"])


def test_a_delta_to_what_the_base_lacks(tmp_path: Path) -> None:
    base, made = make(seed=1), make()
    content = made.weights(tower=False) | {"model.norm.weight": torch.zeros(32), "model.more.weight": torch.zeros(2)}
    folder = write(tmp_path / "delta", made.fields, content)
    tower = write_tower(tmp_path / "clip", made)
    refused("wrong_base", "model.more.weight", folder=folder, base=write_text(tmp_path / "base", base), tower=tower)
