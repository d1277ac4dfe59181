"""In which type a model computes: what was asked for, what the files hold, what the device is fast in."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping

import torch

from llavakit.checkpoint.files import Stored
from llavakit.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_log = logging.getLogger(__name__)


def choose_dtype(stored: torch.dtype, device: str | torch.device) -> torch.dtype:
    """The type to compute in: the stored one, unless the device is slow in it.

    A CPU is slow in fp16 (6.5 times to the first token) and, without bf16 instructions, in bf16 too; then fp32. fp16 becomes bf16 where
    that is fast: it keeps the range, and Vicuna was trained in it (spec trap 23). A GPU without bf16 takes fp32 for bf16.
    """
    device = torch.device(device)
    if stored not in (torch.float16, torch.bfloat16):
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    if device.type == "cuda" and stored == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return stored


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices natively."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return True
    capability = torch.backends.cpu.get_cpu_capability()
    return capability.startswith("SVE") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def dtypes(plan: Mapping[str, Stored], dtype: str | torch.dtype, device: torch.device) -> dict[str, torch.dtype]:
    """The type each weight will have. A mixture on disk is reported (hardening C8)."""
    stored = {name: tensor.dtype for name, tensor in plan.items() if tensor.dtype is not None}
    if dtype == "stored":
        return stored
    numbers: Counter[torch.dtype] = Counter()
    for name, kind in stored.items():
        numbers[kind] += math.prod(plan[name].shape)
    if isinstance(dtype, str) and dtype != "auto" and dtype not in DTYPES:
        raise CheckpointError(f"no type '{dtype}'", code="bad_dtype", where="dtype", remedy=f"use auto, stored, {', '.join(DTYPES)}")
    common = numbers.most_common(1)[0][0]
    chosen = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype) or choose_dtype(common, device)
    if len(numbers) > 1:
        parts = ", ".join(f"{count} numbers in {name_of(kind)}" for kind, count in numbers.most_common())
        _log.warning("the checkpoint mixes types (%s); all are loaded as %s", parts, name_of(chosen))
    return dict.fromkeys(stored, chosen)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
