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

from llavakit import processor_files
from llavakit.checkpoint import files, names, original_config, shards, store, weights
from llavakit.checkpoint.dtypes import name_of
from llavakit.checkpoint.layouts import PROJECTOR_FILE, describe
from llavakit.checkpoint.original import BASE_MARK, fingerprint, named
from llavakit.checkpoint.shards import MAX_SHARD_BYTES, write_json
from llavakit.checkpoint.tower import Tower, find
from llavakit.model.llava import Llava
from llavakit.processor import Processor

OWN_TOWER = "clip"
_TOKENIZER = "tokenizer_config.json"


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
    minus: Path | None = None,
    tower: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
) -> None:
    """Write a checkpoint, whole or ``minus`` a base: a language model or a LLaVA. Each weight keeps its type, differences are in fp32.

    Such a difference, added and rounded to fp16, gives every bit back where no number is above a half (all are multiples of 2^-24).
    tower: the CLIP to compare with; without it, the one that the name means on this machine.
    Raises CheckpointError, also for what the original cannot be told.
    """
    plan = _plan(model, processor, tower, allow_pickle=allow_pickle)
    content, fields = dict(_renamed(model, plan)), _fields(model, processor, plan)
    if minus is not None:
        old = named(describe(minus, allow_pickle=allow_pickle))
        content = {name: _difference(value, old.get(names.ours(name, names.ORIGINAL) or "")) for name, value in content.items()}
        fields |= {BASE_MARK: fingerprint(old)}

    def write(draft: Path) -> None:
        write_json(draft / files.CONFIG, fields)
        shards.write(draft, shards.split(content.items(), None, max_shard_bytes), None)
        _write_tokenizer(draft, processor, plan.dropped)
        if plan.tower == OWN_TOWER:
            _write_tower(draft / OWN_TOWER, model, processor)

    own = model.vision_tower.parameters() if plan.tower == OWN_TOWER else ()
    store.place(Path(folder), write, needed=sum(value.nbytes for value in (*content.values(), *own)))


def save_projector(model: Llava, processor: Processor, folder: Path) -> None:
    """Write what stage 1 of the original leaves: the projector (and the row-end vector), and the config. As ``save``."""
    plan = _plan(model, processor, None, allow_pickle=False)
    kept = (names.PROJECTOR, names.NEWLINE)
    content = {name: value for name, value in _renamed(model, plan) if (names.ours(name, names.ORIGINAL) or "").startswith(kept)}

    def write(draft: Path) -> None:
        write_json(draft / files.CONFIG, _fields(model, processor, plan))
        torch.save({name: value.cpu().clone() for name, value in content.items()}, draft / PROJECTOR_FILE)

    store.place(Path(folder), write, needed=sum(value.nbytes for value in content.values()))


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


def _renamed(model: Llava, plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, by the original's names, tables cut to their rows. Nothing is copied."""
    aliases = weights.aliases_of(model)
    for name, value in model.state_dict().items():
        if name in aliases or (name.startswith(names.TOWER) and not plan.inside):
            continue
        cut = value[: plan.rows] if name in (names.EMBEDDING, names.HEAD) else value
        yield names.original(name, linear=model.config.projector == "linear"), cut.detach()


def _difference(value: Tensor, before: files.Stored | None) -> Tensor:
    """Over the rows that both have; the others, and what the base lacks, stay as they are."""
    if before is None:
        return value
    whole, old = value.to("cpu", torch.float32, copy=True), files.value_of(before)
    shared = min(len(whole), len(old))
    whole[:shared] -= old[:shared]
    return whole


def _fields(model: Llava, processor: Processor, plan: _Plan) -> dict[str, Any]:
    fields = original_config.from_model(
        model.config,
        base_aspect=processor.preprocess.aspect,
        max_length=processor.max_length,
        tower=plan.tower,
        has_tower=plan.inside,
        rows=plan.rows,
    )
    pad = fields.get("pad_token_id")
    padding = {"pad_token_id": processor.tokenizer.unk_token_id} if isinstance(pad, int) and pad >= plan.rows else {}
    return fields | padding | {"torch_dtype": name_of(model.dtype), "mm_use_im_start_end": bool(processor.template.image_start)}


def _write_tower(folder: Path, model: Llava, processor: Processor) -> None:
    """The tower as a CLIP vision model, with its preprocessing."""
    folder.mkdir()
    held = model.vision_tower.vision_model.state_dict().items()
    write_json(folder / files.CONFIG, dict(model.config.vision) | {"architectures": ["CLIPVisionModel"]})
    shards.write(folder, shards.split(((f"vision_model.{name}", value) for name, value in held), None), None)
    plain = processor.preprocess.to_hf() | {"image_processor_type": "CLIPImageProcessor"}
    write_json(folder / "preprocessor_config.json", {name: value for name, value in plain.items() if name != "do_pad"})


def _write_tokenizer(folder: Path, processor: Processor, dropped: frozenset[str]) -> None:
    """The tokenizer without some of its last tokens; padding falls back to the unknown token, as in the original's training.

    Its class is named as transformers 4 knows it: LLaMA's where SentencePiece's file is there too, which that class reads, else the
    class of no model. (transformers 5 calls all of them by a name that 4 does not know.)
    """
    old = processor.tokenizer
    state = json.loads(old.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in dropped]
    if isinstance(state["model"].get("vocab"), dict):
        state["model"]["vocab"] = {token: number for token, number in state["model"]["vocab"].items() if token not in dropped}
    pad = old.unk_token if old.pad_token in dropped else old.pad_token
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        unk_token=old.unk_token,
        pad_token=pad,
        padding_side="right",
        model_max_length=processor.max_length,
    ).save_pretrained(folder)
    has_pieces = processor_files.copy_pieces(old, folder)
    about = files.read_json(folder / _TOKENIZER)
    write_json(folder / _TOKENIZER, about | {"tokenizer_class": "LlamaTokenizer" if has_pieces else "PreTrainedTokenizerFast"})
