"""The native checkpoint: the llava-hf layout, read and written. transformers, vLLM and SGLang read the same folder.

    load   look (files.py) -> build without memory -> compare names and shapes -> read each tensor to its place, piece by piece
    save   a folder next to the target -> config, shards, tokenizer, processor -> fsync -> takes the target's name (folders.py)

Peak memory of loading is the model in its new type and one piece of 8 to 16 MiB more, whatever the type on disk.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from llavakit.checkpoint import files
from llavakit.checkpoint.folders import heal, replace_folder
from llavakit.checkpoint.names import native
from llavakit.errors import CheckpointError
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from llavakit.processor import Processor

MAX_SHARD_BYTES = 5_000_000_000
DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_IDENTITY = "multi_modal_projector.linear_2."  # written for a linear projector, see ModelConfig.to_hf
_log = logging.getLogger(__name__)


def load(
    folder: Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu", allow_pickle: bool = False
) -> tuple[Llava, Processor]:
    """The model (in eval mode) and the processor of a checkpoint.

    dtype: "auto" is ``choose_dtype`` of what most weights are stored in; "stored" keeps each weight's own; or a type by name.
    allow_pickle: also read pytorch_model*.bin, with torch's restricted reader.
    Raises CheckpointError; for missing, unexpected and misshapen weights with all their names, before memory is taken.
    """
    folder = Path(folder)
    heal(folder)
    files.check_folder(folder)
    config = ModelConfig.from_hf(files.read_json(folder / files.CONFIG))
    found = files.tensors(folder, allow_pickle=allow_pickle)
    processor = Processor.load(folder)
    check_pair(config, processor, where=str(folder))
    model = _skeleton(config)
    plan = _match(found, model, where=str(folder))
    _read(model, plan, _dtypes(plan, dtype, torch.device(device)), torch.device(device))
    return model.eval(), processor


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


def check_pair(config: ModelConfig, processor: Processor, *, where: str) -> None:
    """Raise CheckpointError unless tokenizer, preprocessing and model agree (hardening C6, spec trap 21)."""
    size, ids = len(processor.tokenizer), processor.image_token_id
    wrong = [
        (size > config.rows, f"the tokenizer has {size} tokens but the embedding {config.rows} rows"),
        (
            ids != config.image_token_id,
            f"{processor.image_token} is token {ids} of the tokenizer but {config.image_token_id} in {files.CONFIG}",
        ),
        (
            processor.grid.tokens != config.view_tokens,
            f"the processor counts {processor.grid.tokens} tokens a view but the tower gives {config.view_tokens}",
        ),
        (
            processor.preprocess.size != config.image_size,
            f"the processor makes views of {processor.preprocess.size} pixels but the tower takes {config.image_size}",
        ),
    ]
    found = "; ".join(text for is_wrong, text in wrong if is_wrong)
    if found:
        raise CheckpointError(found, code="processor_mismatch", where=where, remedy="take tokenizer, processor and config of one model")


def _skeleton(config: ModelConfig) -> Llava:
    """The model without memory for its weights; what is computed and not learned (rotary frequencies, position ids) is in place."""
    try:
        with torch.device("meta"):
            model = Llava(config)
    except Exception as error:  # each model of transformers has its own way to refuse a config
        raise CheckpointError(
            f"transformers cannot build it: {str(error) or type(error).__name__}",
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


def _aliases(model: nn.Module) -> dict[str, str]:
    """Tied weights: each further name of a parameter, and its first name."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }


def _match(found: Mapping[str, files.Stored], model: Llava, *, where: str) -> dict[str, files.Stored]:
    """Stored tensors by our names. Raises CheckpointError with every name that is missing, unexpected, double, misshapen or no weight."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    aliases = _aliases(model)
    plan: dict[str, files.Stored] = {}
    unexpected, double = [], []
    for stored in found.values():
        name = native(stored.name, expected)
        if name is None or name in aliases or (model.config.projector == "linear" and stored.name.startswith(_IDENTITY)):
            continue
        if name in plan:
            double.append(stored.name)
        elif name not in expected:
            unexpected.append(stored.name)
        else:
            plan[name] = stored
    missing = sorted(set(expected) - set(aliases) - set(plan))
    shapes = [f"{n} is {_by(s.shape)}, not {_by(expected[n])}" for n, s in plan.items() if s.shape != expected[n]]
    kinds = [f"{name} in {stored.file.name}" for name, stored in plan.items() if stored.dtype is None]
    lists = {"missing": missing, "unexpected": unexpected, "twice": double, "of the wrong shape": shapes, "of no weight's type": kinds}
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


def _dtypes(plan: Mapping[str, files.Stored], dtype: str | torch.dtype, device: torch.device) -> dict[str, torch.dtype]:
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
        parts = ", ".join(f"{count} numbers in {_name(kind)}" for kind, count in numbers.most_common())
        _log.warning("the checkpoint mixes types (%s); all are loaded as %s", parts, _name(chosen))
    return dict.fromkeys(stored, chosen)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(model: Llava, plan: Mapping[str, files.Stored], dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Read every weight to its place. Raises CheckpointError ``non_finite`` with the names of those that hold NaN or infinity."""
    aliases, weights, wrong = _aliases(model), {}, []
    for name, stored in sorted(plan.items(), key=lambda item: str(item[1].file)):
        weights[name] = torch.empty(stored.shape, dtype=dtypes[name], device=device)
        finite = [_finite(piece) for piece in stored.pieces(weights[name])]
        if not all(finite):
            wrong.append(name)
    if wrong:
        raise CheckpointError(
            f"NaN or infinity in {len(wrong)} weights: {', '.join(wrong)}",
            code="non_finite",
            where=str(next(iter(plan.values())).file.parent),
            remedy="use an earlier checkpoint; if it is stored in fp32, do not load it as fp16",
        )
    for alias, first in aliases.items():
        weights[alias] = weights[first]
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


def save(
    model: Llava,
    processor: Processor,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint. A checkpoint that is there is replaced as a whole: at any moment the old or the new one is complete.

    dtype: the type of all weights on disk; None keeps each one's own.
    Raises CheckpointError ``not_a_checkpoint`` for a folder holding something else, ``no_space`` and ``cannot_write``.
    """
    folder = Path(folder)
    check_pair(model.config, processor, where=str(folder))
    _check_target(folder, sum(value.numel() * (dtype or value.dtype).itemsize for value in model.state_dict().values()))

    def write(draft: Path) -> None:
        _write_json(draft / files.CONFIG, model.config.to_hf() | _versions(dtype or model.dtype))
        _write_json(draft / "generation_config.json", _generation(processor))
        _write_shards(draft, _shards(model, dtype, max_shard_bytes), dtype)
        processor.save(draft)

    try:
        replace_folder(folder, write)
    except OSError as error:
        raise CheckpointError(
            f"it cannot be written ({error.strerror})", code="cannot_write", where=str(folder), remedy="check space and permissions"
        ) from error


def _check_target(folder: Path, needed: int) -> None:
    """Refuse to replace what is no checkpoint, and to begin what cannot end."""
    if folder.exists() and not (folder.is_dir() and ((folder / files.CONFIG).is_file() or not any(folder.iterdir()))):
        raise CheckpointError(
            "it exists and is no checkpoint", code="not_a_checkpoint", where=str(folder), remedy="give a new folder or that of a checkpoint"
        )
    parent = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"the weights need {needed} bytes and {free} are free", code="no_space", where=str(folder), remedy="free some space"
        )


def _weights(model: Llava) -> Iterator[tuple[str, Tensor]]:
    """What goes to disk: every weight once, and the identity that makes a linear projector one of transformers' kind."""
    aliases = _aliases(model)
    for name, value in model.state_dict().items():
        if name not in aliases:
            yield name, value
    if model.config.projector == "linear":
        bias = model.multi_modal_projector.linear_1.bias.detach()
        yield _IDENTITY + "weight", torch.eye(bias.numel(), dtype=bias.dtype)
        yield _IDENTITY + "bias", torch.zeros_like(bias)


def _shards(model: Llava, dtype: torch.dtype | None, limit: int) -> list[dict[str, Tensor]]:
    """The weights in order, as many in a file as ``limit`` bytes allow; none is cut. Nothing is copied yet."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in _weights(model):
        more = value.numel() * (dtype or value.dtype).itemsize
        if shards[-1] and size + more > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += more
    return shards


def _write_shards(folder: Path, shards: list[dict[str, Tensor]], dtype: torch.dtype | None) -> None:
    """One file for each shard, and an index where there are several."""
    placed: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = files.SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        ready = {name: value.detach().to("cpu", dtype or value.dtype).contiguous() for name, value in shard.items()}
        save_file(ready, folder / file, metadata={"format": "pt"})
        (folder / file).chmod((folder / files.CONFIG).stat().st_mode)  # safetensors makes it private
        placed |= dict.fromkeys(ready, file)
        total += sum(value.nbytes for value in ready.values())
    if len(shards) > 1:
        _write_json(folder / files.INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _versions(dtype: torch.dtype) -> dict[str, str]:
    return {"dtype": _name(dtype), "transformers_version": transformers.__version__}


def _generation(processor: Processor) -> dict[str, Any]:
    """generation_config.json: where a reply begins and ends, for programs that generate on their own."""
    tokenizer, ends = processor.tokenizer, sorted(processor.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": tokenizer.pad_token_id,
        "transformers_version": transformers.__version__,
    }


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
