"""A model over several devices: which module lies where, and the hooks (accelerate's) that carry activations between them.

"auto"                                            as much as fits on the first GPU, then the next, then the CPU
{"vision_tower": "cuda:0", "language_model": "cuda:1", "": "cuda:0"}      modules by name; the longest name that fits decides
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llavakit.errors import CheckpointError, MissingExtraError
from llavakit.model.llava import Llava

DeviceMap = Literal["auto"] | Mapping[str, str | int]


def spread(model: Llava, device_map: DeviceMap) -> None:
    """Move the parts of a loaded model to their devices. Raises MissingExtraError, and CheckpointError ``bad_device_map``."""
    try:
        import accelerate
    except ImportError as error:
        raise MissingExtraError("a device map needs accelerate", code="missing_extra", remedy="pip install 'llavakit[spread]'") from error
    whole = _blocks(model)
    try:
        places: Mapping[str, Any] = (
            accelerate.infer_auto_device_map(model, no_split_module_classes=whole) if device_map == "auto" else _filled(model, device_map)
        )
        accelerate.dispatch_model(model, device_map=dict(places))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        what = f"the model cannot be laid so: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        raise CheckpointError(what, code="bad_device_map", where="device_map", remedy='name modules and devices, or say "auto"') from error


def _blocks(model: Llava) -> list[str]:
    """The classes whose modules stay on one device: a layer of the tower, a layer of the language model."""
    layers = (*model.vision_tower.vision_model.encoder.layers, *getattr(model.language_model.model, "layers", ()))
    return sorted({type(layer).__name__ for layer in layers})


def _filled(model: Llava, device_map: Mapping[str, str | int]) -> dict[str, str | int]:
    """The map with a place for everything that stands at the top, so that none is forgotten; "" is the place of what is not named."""
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    unknown = [name for name in device_map if name and not any(one == name or one.startswith(name + ".") for one, _ in _all(model))]
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)} in it")
    given = {name: place for name, place in device_map.items() if name}
    left = {name for name in names if not any(one.split(".")[0] == name for one in given)}
    if left and "" not in device_map:
        raise ValueError(f"no place for {', '.join(sorted(left))}")
    return {**given, **dict.fromkeys(sorted(left), device_map[""] if left else "")}


def _all(model: Llava) -> list[tuple[str, Any]]:
    return [*model.named_modules(), *model.named_parameters()]
