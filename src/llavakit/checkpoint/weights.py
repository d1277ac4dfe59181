"""A model without memory, and its weights read into place.

build    the modules on torch's meta device; computed buffers (rotary frequencies, position ids) for real
match    names and shapes in the files against the model's: every difference, before memory is taken
read     tensor by tensor, piece by piece, each piece converted and looked through for NaN while it is in the processor's cache
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llavakit.checkpoint import files
from llavakit.checkpoint.names import native
from llavakit.errors import CheckpointError
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from llavakit.model.quantize import Pack

IDENTITY = "multi_modal_projector.linear_2."  # stored for a linear projector, see ModelConfig.to_hf


def build(config: ModelConfig) -> Llava:
    """The model without memory for its weights; what is computed and not learned (rotary frequencies, position ids) is in place."""
    try:
        with torch.device("meta"):
            model = Llava(config)
    except Exception as error:  # each model of transformers has its own way to refuse a config
        raise CheckpointError(
            f"transformers cannot build it: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            code="bad_config",
            where=files.CONFIG,
            remedy="repair the file or fetch it again",
        ) from error
    for part in (model.vision_tower.vision_model, model.language_model):
        learned = set(part.state_dict())
        for prefix, module in part.named_modules():
            computed = [name for name, _ in module.named_buffers(recurse=False) if f"{prefix}.{name}".lstrip(".") not in learned]
            if computed:
                _compute(part, module, computed)
    return model


def _compute(part: Any, module: nn.Module, names: list[str]) -> None:
    """Let transformers fill a module's computed buffers, and see that it did. Its weights, still without memory, stay untouched."""
    for name in names:
        empty = torch.empty_like(module.get_buffer(name), device="cpu")
        module.register_buffer(name, empty.fill_(torch.nan if empty.is_floating_point() else -1), persistent=False)
    part._init_weights(module)
    for name in names:
        value = module.get_buffer(name)
        if bool((value.isnan() if value.is_floating_point() else value == -1).any()):
            raise CheckpointError(
                f"{type(module).__name__}.{name} cannot be computed",
                code="unsupported_model",
                where=type(part).__name__,
                remedy="use a language model whose transformers code restores its buffers",
            )


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Tied weights: each further name of a parameter, and its first name."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }


def match(found: Mapping[str, files.Stored], model: Llava, *, where: str) -> dict[str, files.Stored]:
    """Stored tensors by our names. Raises CheckpointError with every name that is missing, unexpected, double, misshapen or no weight.

    ``found`` has them by the llava-hf layout's names, in any spelling. A tied weight may be stored under either of its names, or both.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    plan: dict[str, files.Stored] = {}
    unexpected, double = [], []
    for given, stored in found.items():
        name = native(given, expected)
        if name is None or (model.config.projector == "linear" and name.startswith(IDENTITY)):
            continue
        if name in plan:
            double.append(given)
        elif name not in expected:
            unexpected.append(given)
        else:
            plan[name] = stored
    aliases = aliases_of(model)
    for alias, first in aliases.items():
        if first not in plan and alias in plan:
            plan[first] = plan.pop(alias)
    lists = {
        "missing": sorted(set(expected) - set(aliases) - set(plan)),
        "unexpected": unexpected,
        "twice": double,
        "of the wrong shape": [f"{n} is {_by(s.shape)}, not {_by(expected[n])}" for n, s in plan.items() if s.shape != expected[n]],
        "of no weight's type": [name for name, stored in plan.items() if stored.dtype is None],
    }
    if any(lists.values()):
        raise CheckpointError(
            "; ".join(f"{len(names)} weights {kind}: {', '.join(names)}" for kind, names in lists.items() if names),
            code="weights_mismatch",
            where=where,
            remedy="take weights and config of one model",
        )
    return plan


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def read(
    model: Llava, plan: Mapping[str, files.Stored], dtypes: Mapping[str, torch.dtype], device: torch.device, *, pack: Pack | None = None
) -> None:
    """Read every weight to its place, through ``pack`` if there is one (``model/quantize.py``).

    Raises CheckpointError ``non_finite`` with the names of those that hold NaN or infinity.
    """
    weights: dict[str, Tensor] = {}
    wrong = []
    for name, stored in sorted(plan.items(), key=lambda item: str(item[1].file)):
        value = torch.empty(stored.shape, dtype=dtypes[name], device=device)
        finite = [_finite(piece) for piece in stored.pieces(value)]
        if not all(finite):
            wrong.append(name)
        weights.update(pack(name, value) if pack else {name: value})
    if wrong:
        raise CheckpointError(
            f"NaN or infinity in {len(wrong)} weights: {', '.join(wrong)}",
            code="non_finite",
            where=str(next(iter(plan.values())).file.parent),
            remedy="use an earlier checkpoint; if it is stored in fp32, do not load it as fp16",
        )
    aliases = aliases_of(model)
    for alias, first in aliases.items():
        if not torch.equal(weights.setdefault(alias, weights[first]), weights[first]):
            raise CheckpointError(
                f"{alias} and {first} are one weight in {files.CONFIG} but differ in the files",
                code="tied_weights_differ",
                where=str(plan[alias].file),
                remedy='set "tie_word_embeddings": false if the model was trained so',
            )
    model.load_state_dict(weights, assign=True)
    for alias, first in aliases.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(first))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _finite(piece: Tensor) -> bool:
    """The extremes tell: NaN passes through them. Twenty times faster than looking at each number."""
    low, high = torch.aminmax(piece)
    return math.isfinite(low) and math.isfinite(high)
