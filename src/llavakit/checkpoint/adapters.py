"""LoRA adapters as PEFT writes them, merged into the base's weights or kept beside them; PEFT itself is not needed.

adapter_config.json            r, lora_alpha, use_rslora, alpha_pattern ...     scale = alpha / r, or alpha / sqrt(r)
base_model.model.NAME.lora_A.weight  A                                          W of NAME becomes W + scale * B A
base_model.model.NAME.lora_B.weight  B
base_model.model.NAME  (and non_lora_trainables.bin)                            takes the place of NAME: projector, tower, embeddings

NAME is the original's, or for a llava-hf base the one that the model has in transformers. What this package trains has a config.json
with ``lora_base``, the base's mark: some numbers of two of its weights, which tell it from others in any type it may be held in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llavakit.checkpoint.computed import merged
from llavakit.checkpoint.files import Stored, value_of
from llavakit.checkpoint.layouts import ADAPTER_CONFIG, ADAPTER_FILES, EXTRAS_FILE, Layout
from llavakit.checkpoint.names import ORIGINAL, PROJECTOR, Table, in_memory, ours
from llavakit.checkpoint.shards import write_json
from llavakit.errors import CheckpointError

MARK = "lora_base"
Mark = dict[str, list[float]]

_NUMBERS = 32  # of each weight in a mark
_ROUNDED = 2.0**-7  # twice what rounding to bf16 may change; a fine-tuned model is farther from its base somewhere
_MATRIX = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # other ways to begin change the base too


def apply(layout: Layout, found: Mapping[str, Stored], table: Table, *, merge: bool = True) -> dict[str, Stored]:
    """The base's weights (by our names) with an adapter merged into them. ``table`` names the adapter's side.

    ``merge`` False leaves its matrices out, though they must fit: only what was trained as a whole takes its place.

    Raises CheckpointError ``unsupported_adapter`` for what is not plain LoRA, ``wrong_base`` and ``adapter_mismatch`` for what belongs
    to another base, ``adapter_changes_nothing`` where every B is zero, ``no_projector`` where neither side has one.
    """
    fields = layout.adapter
    _check_kind(fields, str(layout.folder / ADAPTER_CONFIG))
    weights = dict(found)
    _check_mark(layout, found)
    pairs: dict[str, dict[str, Stored]] = {}
    for name, stored in layout.tensors.items():
        matrix = _MATRIX.fullmatch(name)
        if matrix:
            pairs.setdefault(_plain(matrix[1]), {})[matrix[2]] = stored
        elif "lora_" in name:
            raise _unsupported(name, str(stored.file))
        else:
            _put(weights, _plain(name), stored, table)
    wrong = []
    for module, pair in pairs.items():
        name_of_base = ours(f"{module}.weight", table)
        base = weights.get(name_of_base or "")
        if name_of_base is None or base is None or not _fits(base, pair):
            wrong.append(module)
        elif merge:
            scale = _scale(fields, module, rank=pair["A"].shape[0])
            weights[name_of_base] = merged(base, down=pair["A"], up=pair["B"], scale=scale)
    if wrong or not pairs:
        raise CheckpointError(
            f"the base has no place for {len(wrong)} of {len(pairs)} matrices: {', '.join(wrong)}",
            code="adapter_mismatch",
            where=str(layout.folder),
            remedy=f"give the base it was trained on{f' ({layout.base})' if layout.base else ''}",
        )
    if merge and not any(bool(value_of(pair["B"]).any()) for pair in pairs.values()):
        raise changes_nothing("every B is zero", layout)
    for name, stored in layout.extras.items():
        _put(weights, _plain(name), stored, table)
    if not any(name.startswith(PROJECTOR) for name in weights):
        raise CheckpointError(
            f"no projector: neither {EXTRAS_FILE} beside it nor the base has one",
            code="no_projector",
            where=str(layout.folder),
            remedy=f"download {EXTRAS_FILE} too",
        )
    return weights


def mark(weights: Mapping[str, Tensor]) -> Mark:
    """What tells a base from others of its shape: evenly spaced numbers of some of its weights."""
    return {name: _spaced(value.detach().float().cpu()).tolist() for name, value in weights.items()}


def _spaced(value: Tensor) -> Tensor:
    flat = value.flatten()
    return flat[[at * (flat.numel() - 1) // (_NUMBERS - 1) for at in range(_NUMBERS)]]


def _check_mark(layout: Layout, found: Mapping[str, Stored]) -> None:
    """Refuse a base that is not the one an adapter was trained over (hardening C7)."""
    marked = layout.config.get(MARK)
    for name, numbers in marked.items() if isinstance(marked, dict) else ():
        if not isinstance(numbers, list) or len(numbers) != _NUMBERS or not all(isinstance(number, float) for number in numbers):
            what = f"{MARK} is damaged"
            raise CheckpointError(what, code="bad_config", where=str(layout.folder), remedy="repair the file or fetch it again")
        if name not in found or not torch.allclose(_spaced(value_of(found[name])), torch.tensor(numbers), rtol=_ROUNDED, atol=1e-6):
            raise CheckpointError(
                f"the base is not the one it was trained on: {name} has other numbers",
                code="wrong_base",
                where=str(layout.folder),
                remedy=f"give {layout.base or 'the base it was trained on'}",
            )


def changes_nothing(why: str, layout: Layout) -> CheckpointError:
    """The error for an adapter whose merged model would be its base."""
    return CheckpointError(
        f"the adapter changes nothing: {why}", code="adapter_changes_nothing", where=str(layout.folder),
        remedy="use the base itself, or another checkpoint of the run",
    )  # fmt: skip


def write(layout: Layout, folder: Path) -> None:
    """The matrices of an adapter of the original layout, as an adapter of the same model in the llava-hf layout.

    PEFT takes a list of modules by their names' ends, which the tower's have too (spec trap 25): the pattern names the language model.
    """
    fields = dict(layout.adapter)
    found = {}
    for name, stored in layout.tensors.items():
        matrix = _MATRIX.fullmatch(name)
        if matrix:
            mapped = ours(_plain(matrix[1]), ORIGINAL) or ""
            found[f"base_model.model.{in_memory(mapped)}.lora_{matrix[2]}.weight"] = value_of(stored, stored.dtype or torch.float32)
    ends = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in found})
    patterns = {
        part: {pattern.removeprefix("model."): value for pattern, value in (fields.get(part) or {}).items()}
        for part in ("rank_pattern", "alpha_pattern")
    }
    gone = {"base_model_name_or_path": None, "modules_to_save": None, "auto_mapping": None, "layers_to_transform": None}
    folder.mkdir()
    write_json(folder / ADAPTER_CONFIG, fields | gone | patterns | {"target_modules": rf".*language_model.*\.({'|'.join(ends)})"})
    save_file(found, folder / ADAPTER_FILES[0], metadata={"format": "pt"})


def _plain(name: str) -> str:
    """The name without what PEFT and trainers put around the model."""
    plain = name.removeprefix("base_model.model.")
    return plain.removeprefix("model.") if plain.startswith("model.model.") else plain


def _put(weights: dict[str, Stored], name: str, stored: Stored, table: Table) -> None:
    mapped = ours(name, table)
    if mapped is not None:
        weights[mapped] = stored


def _fits(base: Stored, pair: Mapping[str, Stored]) -> bool:
    if set(pair) != {"A", "B"} or len(base.shape) != 2:
        return False
    (rank, inner), (outer, also) = pair["A"].shape, pair["B"].shape
    return rank == also and (outer, inner) == base.shape


def _scale(fields: Mapping[str, Any], module: str, *, rank: int) -> float:
    """alpha / r of this module; alpha may be given for some modules by patterns of their names' ends."""
    alpha = fields.get("lora_alpha", 8)  # PEFT's default
    for pattern, special in (fields.get("alpha_pattern") or {}).items():
        if _matches(pattern, module):
            alpha = special
            break
    return float(alpha) / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None
    except re.error as error:
        what = f"alpha_pattern {pattern!r} is no pattern"
        raise CheckpointError(what, code="bad_config", where=ADAPTER_CONFIG, remedy="repair the file or fetch it again") from error


def _check_kind(fields: Mapping[str, Any], where: str) -> None:
    """Refuse relatives of LoRA, which a sum of two matrices does not describe."""
    kind, start = fields.get("peft_type", "LORA"), fields.get("init_lora_weights")
    features = ("use_dora", "fan_in_fan_out", "use_qalora", "lora_bias", "layer_replication", "alora_invocation_tokens")
    found = [feature for feature in features if fields.get(feature)]
    if kind != "LORA":
        raise _unsupported(f"peft_type {kind}", where)
    if found or start not in _STARTS:
        raise _unsupported(", ".join(found) or f"init_lora_weights {start!r}", where)


def _unsupported(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{what} is not plain LoRA", code="unsupported_adapter", where=where, remedy="merge it with PEFT and give the merged model"
    )
