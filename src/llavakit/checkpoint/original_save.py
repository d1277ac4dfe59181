"""A model written in the original LLaVA layout, for the original code and for what reads its files (SGLang).

    original     config.json, tokenizer, shards     rows and token that only ``<image>`` needed are left out again
    projector    config.json, mm_projector.bin      for any language model of the same shape
    delta        as original, in fp32               the difference to a base, whose fingerprint is kept in config.json

The tower goes into the shards unless it is, bit for bit, the CLIP that mm_vision_tower names (spec 1.7: 1.5 without, 1.6 with). A tower
that no release uses is written as a CLIP of its own, ``clip`` in the folder, and that is its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from llavakit.checkpoint import files, names, original_config, shards, store, weights
from llavakit.checkpoint.dtypes import name_of
from llavakit.checkpoint.layouts import PROJECTOR_FILE, describe
from llavakit.checkpoint.original import BASE_MARK, fingerprint, named
from llavakit.checkpoint.shards import MAX_SHARD_BYTES, write_json
from llavakit.checkpoint.tower import Tower, find
from llavakit.model.llava import Llava
from llavakit.processor import Processor

OWN_TOWER = "clip"
Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is written of the tower and the tables."""

    tower: str  # mm_vision_tower
    inside: bool  # whether the shards hold the tower
    rows: int  # of the embedding table
    dropped: frozenset[str]  # tokens that the original does not have


def save(
    model: Llava,
    processor: Processor,
    folder: Path,
    *,
    tower: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
) -> None:
    """Write a whole checkpoint. ``tower``: the CLIP to compare with; without it, the one that the name means on this machine.

    dtype: the type of all weights on disk; None keeps each one's own. Raises CheckpointError, also for what the original cannot be told.
    """
    plan = _plan(model, processor, tower, allow_pickle=allow_pickle)
    content = _whole(model, plan)
    fields = _fields(model, processor, plan, dtype)
    _write(folder, fields, content, model, processor, plan, dtype=dtype, limit=max_shard_bytes)


def save_delta(
    model: Llava,
    processor: Processor,
    folder: Path,
    *,
    base: Path,
    tower: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
) -> None:
    """Write the differences to ``base``, a language model or a LLaVA, in fp32, and the rest as it is. As ``save``.

    Added again and rounded to fp16 it gives every bit back, as long as no number is above one (those are all multiples of 2^-24).
    """
    plan = _plan(model, processor, tower, allow_pickle=allow_pickle)
    old = named(describe(base, allow_pickle=allow_pickle))
    content = {}
    for name, value in _whole(model, plan).items():
        before = old.get(names.ours(name, names.ORIGINAL) or "")
        content[name] = value if before is None else _difference(value, before)
    fields = _fields(model, processor, plan, None) | {BASE_MARK: fingerprint(old)}
    _write(folder, fields, content, model, processor, plan, dtype=None, limit=max_shard_bytes)


def save_projector(model: Llava, processor: Processor, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write what stage 1 of the original leaves: the projector (and the row-end vector), and the config. As ``save``."""
    plan = _plan(model, processor, None, allow_pickle=False)
    kept = (names.PROJECTOR, names.NEWLINE)
    content = {name: value for name, value in _renamed(model, plan) if (names.ours(name, names.ORIGINAL) or "").startswith(kept)}
    ready = {name: value.detach().to("cpu", dtype or value.dtype).clone() for name, value in content.items()}

    def write(draft: Path) -> None:
        write_json(draft / files.CONFIG, _fields(model, processor, plan, dtype))
        torch.save(ready, draft / PROJECTOR_FILE)

    store.place(Path(folder), write, needed=sum(value.nbytes for value in ready.values()))


def _plan(model: Llava, processor: Processor, tower: Path | None, *, allow_pickle: bool) -> _Plan:
    rows, dropped = _tables(model, processor)
    recorded = model.config.original.get("mm_vision_tower")
    released = (name for name, fields in original_config.TOWERS.items() if all(model.config.vision.get(k) == v for k, v in fields.items()))
    name = recorded or next(released, OWN_TOWER)
    folder = tower or (find(name, beside=Path()) if name != OWN_TOWER else None)
    same = folder is not None and _is(model, Tower.read(folder).tensors(allow_pickle=allow_pickle))
    inside = name != OWN_TOWER and (not same or bool(model.config.original.get(original_config.TOWER_INSIDE)))
    return _Plan(tower=name, inside=inside, rows=rows, dropped=dropped)


def _is(model: Llava, stock: Mapping[str, files.Stored]) -> bool:
    """Whether the model's tower is this CLIP, in the model's own types."""
    held = {name: value for name, value in model.state_dict().items() if name.startswith(names.TOWER)}
    if held.keys() != stock.keys() or any(stock[name].shape != value.shape for name, value in held.items()):
        return False
    return all(torch.equal(files.value_of(stock[name], value.dtype), value.cpu()) for name, value in held.items())


def _tables(model: Llava, processor: Processor) -> tuple[int, frozenset[str]]:
    """Rows to write and tokens to leave out: those at the end that only ``<image>`` and padding need."""
    config, tokenizer = model.config, processor.tokenizer
    last = {token for token, number in tokenizer.get_vocab().items() if number >= config.image_token_id}
    ours = {processor.image_token, "<pad>"}
    if not last <= ours:
        return config.rows, frozenset()
    return min(int(config.original.get("vocab_size", config.image_token_id)), config.rows), frozenset(last)


def _whole(model: Llava, plan: _Plan) -> Named:
    return dict(_renamed(model, plan))


def _renamed(model: Llava, plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, by the original's names, tables cut to their rows. Nothing is copied."""
    aliases = weights.aliases_of(model)
    for name, value in model.state_dict().items():
        if name in aliases or (name.startswith(names.TOWER) and not plan.inside):
            continue
        cut = value[: plan.rows] if name in (names.EMBEDDING, names.HEAD) else value
        yield names.original(name, linear=model.config.projector == "linear"), cut.detach()


def _difference(value: Tensor, before: files.Stored) -> Tensor:
    """In fp32, and over the rows that both have; the others stay as they are."""
    whole, old = value.to("cpu", torch.float32, copy=True), files.value_of(before)
    shared = min(len(whole), len(old))
    whole[:shared] -= old[:shared]
    return whole


def _fields(model: Llava, processor: Processor, plan: _Plan, dtype: torch.dtype | None) -> dict[str, Any]:
    fields = original_config.from_model(
        model.config,
        base_aspect=processor.preprocess.aspect,
        max_length=processor.max_length,
        tower=plan.tower,
        has_tower=plan.inside,
        rows=plan.rows,
    )
    return fields | {"torch_dtype": name_of(dtype or model.dtype), "mm_use_im_start_end": bool(processor.template.image_start)}


def _write(
    folder: Path,
    fields: Mapping[str, Any],
    content: Named,
    model: Llava,
    processor: Processor,
    plan: _Plan,
    *,
    dtype: torch.dtype | None,
    limit: int,
) -> None:
    def write(draft: Path) -> None:
        write_json(draft / files.CONFIG, fields)
        shards.write(draft, shards.split(content.items(), dtype, limit), dtype)
        _tokenizer(processor, plan.dropped).save_pretrained(draft)
        if plan.tower == OWN_TOWER:
            _write_tower(draft / OWN_TOWER, model, processor, dtype)

    tower = model.vision_tower.parameters() if plan.tower == OWN_TOWER else ()
    parts = [*content.values(), *tower]
    store.place(Path(folder), write, needed=sum(value.numel() * (dtype or value.dtype).itemsize for value in parts))


def _write_tower(folder: Path, model: Llava, processor: Processor, dtype: torch.dtype | None) -> None:
    """The tower as a CLIP vision model, with its preprocessing."""
    folder.mkdir()
    held = model.vision_tower.vision_model.state_dict().items()
    write_json(folder / files.CONFIG, dict(model.config.vision) | {"architectures": ["CLIPVisionModel"]})
    shards.write(folder, shards.split(((f"vision_model.{name}", value) for name, value in held), dtype), dtype)
    plain = processor.preprocess.to_hf() | {"image_processor_type": "CLIPImageProcessor"}
    write_json(folder / "preprocessor_config.json", {name: value for name, value in plain.items() if name != "do_pad"})


def _tokenizer(processor: Processor, dropped: frozenset[str]) -> Any:
    """The tokenizer without some of its last tokens; padding falls back to the unknown token, as in the original's training."""
    old = processor.tokenizer
    state = json.loads(old.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in dropped]
    if isinstance(state["model"].get("vocab"), dict):
        state["model"]["vocab"] = {token: number for token, number in state["model"]["vocab"].items() if token not in dropped}
    pad = old.unk_token if old.pad_token in dropped else old.pad_token
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        unk_token=old.unk_token,
        pad_token=pad,
        padding_side="right",
        model_max_length=processor.max_length,
    )
