"""LoRA and QLoRA through PEFT: small matrices learn beside the language model's frozen layers, and every save is a whole adapter.

    x --+--> W (as stored, or packed to 8 or 4 bits by bitsandbytes; frozen) --> + --> y
        +--> dropout --> A --> B --> alpha / r ------------------------------->

The layers are chosen by their whole names: by the names' ends alone the tower's attention, whose layers are called q_proj too, would
learn as well (spec trap 25). A checkpoint is what PEFT loads onto transformers' model of the base, and what ``llava`` reads with --base:

    adapter_config.json  adapter_model.safetensors    the matrices, and what learned whole: projector, row-end vector
    config.json  tokenizer  processor                 as in a whole model, and the base's mark (checkpoint/adapters.py)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llavakit.checkpoint import adapters, files, names, store, weights
from llavakit.checkpoint.folders import of_run
from llavakit.checkpoint.layouts import ADAPTER_CONFIG, ADAPTER_FILES
from llavakit.checkpoint.shards import write_json
from llavakit.checkpoint.weights import IDENTITY
from llavakit.config import Lora, TrainConfig
from llavakit.errors import CheckpointError, ConfigError, MissingExtraError, TrainingError
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.train import start
from llavakit.train.ranks import Ranks, gathered, is_cut, whole, whole_model
from llavakit.train.saving import SaveModel, Whole
from llavakit.train.stages import LORA, STAGES, Stage

_MATRIX = re.compile(r".*\.lora_[AB]\.default\.weight")  # PEFT's names in memory; .default is the adapter's
_PEFT, _A = "base_model.model.", ".lora_A.weight"
_WHOLE = (names.PROJECTOR, names.NEWLINE)  # in every save, whether they learn or not


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A model ready to be placed: what of it learns at which rate, and what writes its part of a checkpoint."""

    model: Llava
    processor: Processor
    rates: dict[str, float]
    save_model: SaveModel
    whole: Whole = whole_model


def settled(config: TrainConfig) -> TrainConfig:
    """The same run. Raises ConfigError where a base is missing or is an adapter itself, MissingExtraError without PEFT or bitsandbytes."""
    lora = config.lora
    if config.start is not None and (of_run(config.start) / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"{config.start} is an adapter, not a whole model", code="bad_value", where="start",
            remedy=f"merge it first: llava convert {config.start} MERGED --base BASE",
        )  # fmt: skip
    if lora is None:
        return config
    wrong = {
        "stage": (config.stage != "finetune", "an adapter of a projector's stage", "use stage=finetune"),
        "start": (config.start is None, "an adapter without a base", "give start=<checkpoint>"),
        "tower": (config.tower is not None, "a base whose tower is changed", "make it a checkpoint first"),
        "shard": (
            config.shard != "none" and lora.bits < 16,
            "a base in few bits that is cut (bitsandbytes packs whole layers)",
            "use shard=none, where each device holds the packed base, or lora.bits=16",
        ),
        "lora.bits": (lora.bits < 16 and config.device == "mps", "bitsandbytes with mps", "use lora.bits=16, or device=cpu"),
    }
    for where, (is_wrong, what, remedy) in wrong.items():
        if is_wrong:
            raise ConfigError(f"{what} cannot be trained", code="bad_value", where=where, remedy=remedy)
    needed = {"peft": "lora"} | ({"bitsandbytes": "qlora"} if lora.bits < 16 else {})
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise MissingExtraError(
                f"{package} is not installed", code="missing_extra", where="lora", remedy=f"pip install 'llavakit[{extra}]'"
            )
    return config


def begin(config: TrainConfig, resumed: Path | None, *, device: torch.device, forward: torch.dtype, save_model: SaveModel) -> Begun:
    """The model of a run, its frozen part still where it was loaded. With LoRA the base comes from ``start`` whatever is resumed."""
    if config.lora is None:
        model, processor = start.model_and_processor(config, resumed)
        rates = STAGES[config.stage].with_rows(config.rates).apply(model)
        return Begun(model=model, processor=processor, rates=rates, save_model=save_model)
    model, processor = start.model_and_processor(config, None)
    layers = targets(model, config.lora)
    mark = adapters.mark({f"{name}.weight": model.get_parameter(f"{name}.weight") for name in (layers[0], layers[-1])})
    if config.lora.bits < 16:
        pack(model, config.lora.bits, device=device, forward=forward)
    attach(model, config.lora, layers)
    stage = LORA.with_rows(config.rates)
    _check_rows(stage, model)
    rates = stage.apply(model)
    if resumed is not None:
        check_base(resumed, mark)
        read(model, resumed)
    return Begun(
        model=model, processor=processor, rates=rates, save_model=partial(save, lora=config.lora, base=config.start, mark=mark),
        whole=partial(whole_adapter, lora=config.lora, layers=layers),
    )  # fmt: skip


def is_matrix(name: str) -> bool:
    """Whether a parameter is one of an adapter's matrices."""
    return _MATRIX.fullmatch(name) is not None


def targets(model: Llava, lora: Lora) -> tuple[str, ...]:
    """The layers that get matrices: linear ones of the language model but its head, or those whose whole names match.

    Raises ConfigError ``no_target``.
    """
    pattern = lora.targets
    if pattern is None:
        return tuple(f"language_model.{name}" for name in _inner(model))
    try:
        found = tuple(name for name, part in model.named_modules() if isinstance(part, nn.Linear) and re.fullmatch(pattern, name))
    except re.error as error:
        what = f"{pattern!r}: {error}"
        raise ConfigError(what, code="bad_value", where="lora.targets", remedy="write a regular expression") from error
    if not found:
        example = f"language_model.{next(iter(_inner(model)))}"
        raise ConfigError(
            f"no linear layer is called {pattern!r}", code="no_target", where="lora.targets",
            remedy=f"match whole names, as {example}; 'language_model\\..*' matches all of the language model",
        )  # fmt: skip
    return found


def _inner(model: Llava) -> dict[str, nn.Linear]:
    """The language model's linear layers, its head left out, by their names in it."""
    head = model.language_model.get_output_embeddings()
    return {name: part for name, part in model.language_model.named_modules() if isinstance(part, nn.Linear) and part is not head}


def attach(model: Llava, lora: Lora, layers: tuple[str, ...]) -> None:
    """Put matrices beside ``layers``, B zero and A random: the model computes what it did before."""
    import peft

    adapter = peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(layers))
    peft.inject_adapter_in_model(adapter, model)
    assert sum(1 for name, _ in model.named_parameters() if _MATRIX.fullmatch(name)) == 2 * len(layers), "PEFT took other layers"


def pack(model: Llava, bits: int, *, device: torch.device, forward: torch.dtype) -> None:
    """Hold the language model's linear layers in 4 bits (NF4, scales quantised too) or 8 on ``device``; the head stays as it is."""
    import bitsandbytes as bnb

    for name, old in _inner(model).items():
        shape: dict[str, Any] = {"input_features": old.in_features, "output_features": old.out_features, "bias": False, "device": "meta"}
        if bits == 4:
            kind = {"compress_statistics": True, "quant_type": "nf4"}
            new = bnb.nn.Linear4bit(**shape, **kind, compute_dtype=forward)
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, module=new, **kind)
            new.support_avx512bf16_for_cpu = False  # a look in eval mode would repack it for a kernel that has no gradient
        else:
            new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=6.0)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        model.language_model.set_submodule(name, new.to(device))
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT asks for it


def _check_rows(stage: Stage, model: Llava) -> None:
    """A run that learns no matrix is no LoRA; weights under matrices that learn too are no adapter."""
    rates = {name: stage.rate(name) for name, _ in model.named_parameters()}
    under = [name for name, rate in rates.items() if rate is not None and ".base_layer." in name]
    if under or all(rates[name] is None for name in rates if _MATRIX.fullmatch(name)):
        what = f"{under[0]} learns beside its matrices" if under else "no matrix learns"
        raise ConfigError(what, code="bad_value", where="rates", remedy="leave out that row, or train without lora")


def stored(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint of a run with matrices holds of the model, by PEFT's names in transformers' model; empty without matrices."""
    return {
        _PEFT + names.in_memory(name.replace(".default.weight", ".weight") if _MATRIX.fullmatch(name) else name): value
        for name, value in _kept(model).items()
    }


def _kept(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same, by the names in memory."""
    parameters = dict(model.named_parameters())
    if not any(map(_MATRIX.fullmatch, parameters)):
        return {}
    return {name: value for name, value in parameters.items() if value.requires_grad or _MATRIX.fullmatch(name) or name.startswith(_WHOLE)}


def whole_adapter(model: Llava, ranks: Ranks, *, lora: Lora, layers: tuple[str, ...]) -> Llava | None:
    """What ``whole_model`` gives, but for the base of a cut model: it is not written and so not gathered, and has no memory."""
    if not is_cut(model):
        return model if ranks.main else None
    kept = _kept(model)
    found = gathered(kept.items(), ranks)
    if found is None:
        return None
    made = weights.build(model.config)
    with torch.device("meta"):
        attach(made, lora, layers)
    made.load_state_dict(found, strict=False, assign=True)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in kept and kept[name].requires_grad)
    return made


def bytes_saved(model: nn.Module, learned: int) -> int:
    """The size of a checkpoint: the weights in it, those that learn in fp32, and two fp32 moments of each of these."""
    return sum(value.nbytes for value in stored(model).values() or model.parameters()) + 8 * learned


def save(model: Llava, processor: Processor, folder: Path, *, lora: Lora, base: Path | None, mark: adapters.Mark) -> None:
    """Write everything but the base into a new folder."""
    store.check_pair(model.config, processor, where=str(folder))
    found = {name: value.detach() for name, value in stored(model).items()}
    identity = {_PEFT + names.in_memory(name): value for name, value in store.on_disk(model) if name.startswith(IDENTITY)}
    ready = {name: value.cpu().contiguous() for name, value in (identity | found).items()}  # a linear projector's is transformers' need
    modules = [name.removeprefix(_PEFT).removesuffix(_A) for name in found if name.endswith(_A)]
    fields = {
        "peft_type": "LORA", "r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": "none",
        "target_modules": sorted(modules), "modules_to_save": [names.PROJECTOR.rstrip(".")],
        "base_model_name_or_path": str(base), "inference_mode": True,
    }  # fmt: skip
    folder.mkdir()
    write_json(folder / files.CONFIG, model.config.to_hf() | {adapters.MARK: mark})
    processor.save(folder)
    write_json(folder / ADAPTER_CONFIG, fields)
    save_file(ready, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    (folder / ADAPTER_FILES[0]).chmod((folder / files.CONFIG).stat().st_mode)  # safetensors makes it private


def read(model: Llava, folder: Path) -> None:
    """Give a model with fresh matrices those of a checkpoint of its run, bit for bit. Raises CheckpointError ``adapter_mismatch``."""
    found, wanted = load_file(folder / ADAPTER_FILES[0]), stored(model)
    wrong = [name for name, value in wanted.items() if name not in found or found[name].shape != value.shape]
    if wrong:
        raise CheckpointError(
            f"no fitting {', '.join(wrong)}", code="adapter_mismatch", where=str(folder), remedy="resume with the options of the run"
        )
    for name, parameter in wanted.items():
        parameter.data = found[name]


def check_base(folder: Path, mark: adapters.Mark) -> None:
    """Refuse to go on over another base than the checkpoint's. Raises CheckpointError ``wrong_base``."""
    if files.read_json(folder / files.CONFIG).get(adapters.MARK) != mark:
        raise CheckpointError(
            "its adapter was trained over other weights than those of start", code="wrong_base", where=str(folder),
            remedy="give the start of that run, or begin another",
        )  # fmt: skip


def check_learned(model: nn.Module, out: Path) -> None:
    """Raise TrainingError ``adapter_changes_nothing`` where every B is still zero, as it was made."""
    ups = [value for name, value in stored(model).items() if name.endswith(".lora_B.weight")]
    if ups and not any(bool(whole(value).any()) for value in ups):
        raise TrainingError(
            "the adapter changes nothing: every B is zero after training", code="adapter_changes_nothing", where=str(out),
            remedy="look at grad_norm and lr in metrics.jsonl: raise lr, or train more steps",
        )  # fmt: skip
