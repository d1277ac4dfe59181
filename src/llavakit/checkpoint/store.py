"""The native checkpoint: the llava-hf layout, read and written. transformers, vLLM and SGLang read the same folder.

    load   look (files.py) -> build without memory -> compare names and shapes -> read each tensor to its place, piece by piece
    save   a folder next to the target -> config, shards, tokenizer, processor -> fsync -> takes the target's name (folders.py)

Peak memory of loading is the model in its new type and one piece of 8 to 16 MiB more, whatever the type on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llavakit.checkpoint import files, original, shards, weights
from llavakit.checkpoint.dtypes import choose_dtype, cpu_has_bf16, dtypes, name_of
from llavakit.checkpoint.folders import replace_folder
from llavakit.checkpoint.layouts import Layout, describe
from llavakit.checkpoint.shards import MAX_SHARD_BYTES, write_json
from llavakit.errors import CheckpointError
from llavakit.model import quantize
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from llavakit.model.quantize import Quantization
from llavakit.processor import Processor
from llavakit.prompts import Template

__all__ = ["MAX_SHARD_BYTES", "choose_dtype", "cpu_has_bf16", "load", "load_processor", "outline", "save"]


def load(
    folder: Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    quantization: Quantization | None = None,
    base: Path | None = None,
    tower: Path | None = None,
    merge: bool = True,
    template: Template | None = None,
) -> tuple[Llava, Processor]:
    """The model (in eval mode) and the processor of a checkpoint in any layout, or of the newest checkpoint of a training run's folder.

    dtype: "auto" is ``choose_dtype`` of what most weights are stored in; "stored" keeps each weight's own; or a type by name.
    allow_pickle: also read .bin files, with torch's restricted reader.
    quantization: pack the language model's layers to 8 or 4 bits while they are read (``model/quantize.py``).
    base: what an adapter, a delta or a projector belongs to. tower: the CLIP, where the original layout keeps it elsewhere.
    merge: False leaves an adapter's matrices out and takes only what was trained beside them.
    template: another prompt format than the files', which then need not be one we can use.
    Raises CheckpointError; for missing, unexpected and misshapen weights with all their names, before memory is taken.
    """
    layout = describe(folder, allow_pickle=allow_pickle)
    config, processor, found = _parts(layout, base=base, tower=tower, merge=merge, template=template)
    check_pair(config, processor, where=str(layout.folder))
    model = weights.build(config)
    plan = weights.match(found, model, where=str(layout.folder))
    target = torch.device(device)
    pack = quantize.prepare(model.language_model, quantization, prefix="language_model.", device=target) if quantization else None
    weights.read(model, plan, dtypes(plan, dtype, target), target, pack=pack)
    return model.eval(), processor


def outline(
    folder: Path, *, base: Path | None = None, tower: Path | None = None, allow_pickle: bool = False
) -> tuple[ModelConfig, Processor]:
    """Config and processor of a checkpoint in any layout; no weight is read. Raises CheckpointError."""
    config, processor, _ = _parts(describe(folder, allow_pickle=allow_pickle), base=base, tower=tower, merge=False)
    return config, processor


def load_processor(folder: Path, *, base: Path | None = None, tower: Path | None = None, allow_pickle: bool = False) -> Processor:
    """The processor of a checkpoint in any layout, without its weights. Raises CheckpointError."""
    layout = describe(folder, allow_pickle=allow_pickle)
    if layout.kind in ("hf", "other"):
        return Processor.load(layout.folder)
    return original.read(layout, base=base, tower=tower)[1]


def _parts(
    layout: Layout, *, base: Path | None, tower: Path | None, merge: bool, template: Template | None = None
) -> tuple[ModelConfig, Processor, Mapping[str, files.Stored]]:
    """Config, processor and stored weights. A complete checkpoint needs no other folder, and is not given one by mistake."""
    if layout.kind not in ("hf", "other"):
        config, processor, found = original.read(layout, base=base, tower=tower, merge=merge)
        return config, processor if template is None else processor.using(template), found
    config = ModelConfig.from_hf(layout.config)
    for name, given in (("base", base), ("tower", tower)):
        if given is not None:
            raise original.not_needed(name, layout)
    return config, Processor.load(layout.folder, template=template), layout.tensors


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
            processor.tiling.grid(1, 1).view_tokens != config.view_tokens,
            f"the processor counts {processor.tiling.grid(1, 1).view_tokens} tokens a view but the tower gives {config.view_tokens}",
        ),
        (
            processor.preprocess.size != config.image_size,
            f"the processor makes views of {processor.preprocess.size} pixels but the tower takes {config.image_size}",
        ),
    ]
    if not any(is_wrong for is_wrong, _ in wrong) and processor.tiling != config.tiling:
        wrong.append((True, f"the processor cuts pictures by {processor.tiling}, the model joins them by {config.tiling}"))
    found = "; ".join(text for is_wrong, text in wrong if is_wrong)
    if found:
        raise CheckpointError(found, code="processor_mismatch", where=where, remedy="take tokenizer, processor and config of one model")


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
    if quantize.is_packed(model):
        what, remedy = "the model's weights are packed to few bits", "load it without quantization and save that"
        raise CheckpointError(what, code="packed_weights", where=str(folder), remedy=remedy)
    check_pair(model.config, processor, where=str(folder))

    def write(draft: Path) -> None:
        write_json(draft / files.CONFIG, model.config.to_hf() | _versions(dtype or model.dtype))
        write_json(draft / "generation_config.json", _generation(processor))
        shards.write(draft, shards.split(on_disk(model), dtype, max_shard_bytes), dtype)
        processor.save(draft)

    place(Path(folder), write, needed=sum(value.numel() * (dtype or value.dtype).itemsize for _, value in on_disk(model)))


def place(folder: Path, write: Callable[[Path], None], *, needed: int) -> None:
    """Let ``write`` fill a folder that takes the place of ``folder``, as ``save`` promises. ``needed``: bytes it will take."""
    _check_target(folder, needed)
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


def on_disk(model: Llava) -> Iterator[tuple[str, Tensor]]:
    """What goes to disk: every weight once, and the identity that makes a linear projector one of transformers' kind."""
    aliases = weights.aliases_of(model)
    for name, value in model.state_dict().items():
        if name not in aliases:
            yield name, value
    if model.config.projector == "linear":
        bias = model.multi_modal_projector.linear_1.bias.detach()
        yield weights.IDENTITY + "weight", torch.eye(bias.numel(), dtype=bias.dtype)
        yield weights.IDENTITY + "bias", torch.zeros_like(bias)


def _versions(dtype: torch.dtype) -> dict[str, str]:
    return {"dtype": name_of(dtype), "transformers_version": transformers.__version__}


def _generation(processor: Processor) -> dict[str, Any]:
    """generation_config.json: where a reply begins and ends, for programs that generate on their own."""
    tokenizer, ends = processor.tokenizer, sorted(processor.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
        "transformers_version": transformers.__version__,
    }
