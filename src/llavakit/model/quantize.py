"""Language models in 8 or 4 bits a weight, made while a checkpoint is read, so that the full weights are never in memory together.

    weight N.K  --8bit-->  int8 N.K and a scale a row                        half the bytes of bf16
                --4bit-->  two numbers a byte, scale and zero for 64 inputs  28 % of the bytes

Only the linear layers inside the language model are packed. The tower and the projector are small, and what they lose no later layer
repairs; the embedding is read a row at a time; the head decides between near ties. torch's own kernels multiply packed weights on a
CPU (torchao 0.18 has none for 4 bits there). Elsewhere 8 bits are unpacked a layer at a time; 4 bits need a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llavakit.errors import CheckpointError

Quantization = Literal["8bit", "4bit"]
QUANTIZATIONS: tuple[Quantization, ...] = ("8bit", "4bit")
GROUP = 64  # inputs that share a scale in 4 bits
_ROWS = 512  # of a weight packed at a time
_FEW = 8  # rows up to which the int8 kernel beats unpacking and a bf16 product


class Linear8(nn.Module):
    """y = (x q^T) s + b with q int8 N.K and a scale s for each of the N outputs."""

    weight: Tensor
    scale: Tensor
    rows: ClassVar[Mapping[str, int]] = {"weight": 0, "scale": 0}  # the dimension of the outputs

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("weight", torch.empty(linear.out_features, linear.in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("scale", torch.empty(linear.out_features, device="meta"))

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        """Its parts for some rows of a weight."""
        scale = (weight.abs().amax(1).float() / 127).clamp(min=1e-12)
        return {"weight": (weight.float() / scale[:, None]).round_().to(torch.int8), "scale": scale.to(weight.dtype)}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= _FEW and x.is_cpu and not torch.is_grad_enabled():
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Linear4(nn.Module):
    """y = x w^T + b with w = (q - 8) s + z: q in 0..15, s and z for every GROUP inputs of an output."""

    weight: Tensor
    scale: Tensor
    rows: ClassVar[Mapping[str, int]] = {"weight": 0, "scale": 1}

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("weight", torch.empty(linear.out_features, linear.in_features // 2, dtype=torch.uint8, device="meta"))
        self.register_buffer("scale", torch.empty(linear.in_features // GROUP, linear.out_features, 2, device="meta"))

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        return linear.in_features % GROUP == 0 and linear.out_features % 16 == 0

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        """Its parts for some rows of a weight; the kernel's layout has blocks of at most 64 rows."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        low, high = torch.aminmax(groups, dim=2, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-12)
        numbers = ((groups - low) / scale).round_().clamp_(0, 15).to(torch.int32).flatten(1)
        table = torch.cat((scale, low + 8 * scale), dim=2).transpose(0, 1).contiguous()
        return {"weight": torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1), "scale": table.to(weight.dtype)}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scale)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


Packed = Linear8 | Linear4
Pack = Callable[[str, Tensor], Mapping[str, Tensor]]


def prepare(language_model: Any, quantization: Quantization, *, prefix: str, device: torch.device) -> Pack:
    """Put packed layers, still without memory, in the place of the linear ones inside ``language_model``.

    Returns what turns a weight that has been read, by its full name (``prefix`` and the name inside the language model), into what the
    new layer stores. Raises CheckpointError ``quantization_not_possible`` when no layer can be packed.
    """
    if quantization not in QUANTIZATIONS:
        what = f"no quantization {quantization!r}"
        raise CheckpointError(what, code="bad_quantization", where="quantization", remedy=f"use {' or '.join(QUANTIZATIONS)}")
    if quantization == "4bit" and device.type != "cpu":
        what = f"4 bits are packed for a CPU, not for {device.type}"
        raise CheckpointError(what, code="quantization_not_possible", where="quantization", remedy="use 8bit, or the CPU")
    kind: type[Packed] = Linear8 if quantization == "8bit" else Linear4
    head = language_model.get_output_embeddings()
    linears = {name: module for name, module in language_model.named_modules() if type(module) is nn.Linear and module is not head}
    chosen = {name: module for name, module in linears.items() if kind is Linear8 or Linear4.fits(module)}
    if not chosen:
        what = f"no layer of it can be packed to {quantization} (widths must be multiples of {GROUP})"
        raise CheckpointError(what, code="quantization_not_possible", where=type(language_model).__name__, remedy="load it in bf16")
    for name, module in chosen.items():
        language_model.set_submodule(name, kind(module))
    owners = {f"{prefix}{name}.weight": f"{prefix}{name}." for name in chosen}

    def pack(name: str, value: Tensor) -> Mapping[str, Tensor]:
        if name not in owners:
            return {name: value}
        pieces = [kind.pack(rows) for rows in value.split(_ROWS)]  # in pieces, for numbers in fp32 take twice a weight's memory
        return {owners[name] + leaf: torch.cat([piece[leaf] for piece in pieces], dim=kind.rows[leaf]) for leaf in kind.rows}

    return pack


def is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, Linear8 | Linear4) for module in model.modules())
