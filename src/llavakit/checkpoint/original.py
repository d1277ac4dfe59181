"""Checkpoints in the original LLaVA layout, and the pieces that make one only with a base: read into our config, processor and weights.

    original               its own weights                   + the tower's, unless they are inside (then those inside win: spec trap 6)
    delta      + base      base's weights + the differences
    projector  + base      a language model's weights        + mm_projector.bin
    lora       + base      a language model's or a LLaVA's   + matrices, + what was trained beside them

The original has no token for a picture (it cuts the text there), so ``<image>`` is added to the tokenizer, after the legacy tokens where
the config asks for them. Where the tables lack a row for it they grow as in llava-hf: by two rows, up to a multiple of 64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit import processor_files
from llavakit.checkpoint import adapters, names, original_config
from llavakit.checkpoint.computed import grown, replaced, summed
from llavakit.checkpoint.dtypes import DTYPES
from llavakit.checkpoint.files import Stored, value_of
from llavakit.checkpoint.layouts import Layout, describe, is_original
from llavakit.checkpoint.tower import Tower, find
from llavakit.errors import CheckpointError
from llavakit.model.presets import ModelConfig
from llavakit.preprocess import Preprocess
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES, Template

IMAGE, PATCH, START, END = "<image>", "<im_patch>", "<im_start>", "<im_end>"
BASE_MARK = "delta_base"  # in config.json of a delta that this package made: its base's fingerprint
_NEW_ROWS, _ROWS_ROUNDED_TO = 2, 64  # spec 1.6
_ARCHITECTURE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_USUAL_LENGTH = 4096  # Vicuna v1.5


def read(layout: Layout, *, base: Path | None, tower: Path | None, merge: bool = True) -> tuple[ModelConfig, Processor, dict[str, Stored]]:
    """Config, processor and weights (by our names, still in their files) of any layout but llava-hf's.

    base: the folder of the other weights; tower: that of the CLIP; merge: as in ``adapters.apply``.
    Raises CheckpointError, naming the argument that is missing.
    """
    below = _base(layout, base)
    if below is not None and below.kind == "hf" and layout.kind == "lora" and not is_original(layout.config):
        if tower is not None:
            raise not_needed("tower", below)
        own = layout if adapters.MARK in layout.config else below  # what this package trains has its own
        config = ModelConfig.from_hf(own.config)
        return config, Processor.load(own.folder), adapters.apply(layout, named(below), names.HF, merge=merge)
    fields = _fields(layout, below)
    if below is not None:
        _check_same(fields, below)
    inside = layout.has_tower or (below is not None and below.has_tower)
    seen = _tower(layout, below, tower, shape_only=inside)
    weights = ({} if inside else seen.tensors(allow_pickle=layout.allow_pickle)) | _weights(layout, below, merge=merge)
    tokenizer = processor_files.tokenizer(below.folder if below is not None and layout.kind != "delta" else layout.folder)
    _add_tokens(tokenizer, fields)
    weights, file_rows, rows = _rows(layout, fields, weights, tokenizer)
    config = original_config.to_model(
        {name: value for name, value in fields.items() if name != BASE_MARK},
        vision=seen.fields,
        tower_inside=inside,
        file_rows=file_rows,
        rows=rows,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
    )
    if not config.has_newline:
        weights.pop(names.NEWLINE, None)  # without tiles the original never reads it
    return config, _processor(config, fields, seen, tokenizer), weights


def _base(layout: Layout, base: Path | None) -> Layout | None:
    if layout.needs_base and base is None:
        wanted = {"lora": "the model it was trained on", "delta": "the model it is a difference to", "projector": "its language model"}
        told = f", {layout.base}" if layout.base else ""
        raise CheckpointError(
            f"a {layout.kind} is no whole model", code="base_missing", where=str(layout.folder),
            remedy=f"give the folder of {wanted[layout.kind]}{told}: base=FOLDER (--base FOLDER)",
        )  # fmt: skip
    if not layout.needs_base and base is not None:
        raise not_needed("base", layout)
    if base is None:
        return None
    below = describe(base, allow_pickle=layout.allow_pickle)
    if below.needs_base:
        remedy = "convert it first: llava convert"
        raise CheckpointError(f"a {below.kind} cannot be a base", code="bad_base", where=str(below.folder), remedy=remedy)
    return below


def not_needed(name: str, layout: Layout) -> CheckpointError:
    """The error for an argument that a complete checkpoint must not be given by mistake."""
    what = f"a complete checkpoint, to which no {name} belongs"
    return CheckpointError(what, code=f"{name}_not_needed", where=str(layout.folder), remedy=f"leave out {name} (--{name})")


def _fields(layout: Layout, below: Layout | None) -> Mapping[str, Any]:
    """The original config.json that counts: its own, or that of the LLaVA an adapter belongs to."""
    for one in (layout, below):
        if one is not None and is_original(one.config):
            return one.config
    raise CheckpointError(
        "no config.json with LLaVA's mm_ fields, here or in the base", code="bad_config", where=str(layout.folder),
        remedy="give the whole folder that training left, or the LLaVA that an adapter belongs to",
    )  # fmt: skip


def _check_same(fields: Mapping[str, Any], below: Layout) -> None:
    """A base of another shape is told by its config, before its weights are looked at (hardening C7)."""
    theirs = below.config.get("text_config", below.config)
    both = [name for name in _ARCHITECTURE if name in fields and name in theirs]
    unlike = [f"{name} {theirs[name]}, not {fields[name]}" for name in both if fields[name] != theirs[name]]
    if original_config.text_kind(fields) != original_config.text_kind(theirs):
        unlike.append(f"model_type {theirs.get('model_type')}, not {fields['model_type']}")
    if unlike:
        raise CheckpointError(
            f"it is not the base: {'; '.join(unlike)}", code="wrong_base", where=str(below.folder), remedy="give the base it was trained on"
        )


def _weights(layout: Layout, below: Layout | None, *, merge: bool) -> dict[str, Stored]:
    """All but a tower from elsewhere, by our names."""
    if below is None:
        return named(layout)
    old = named(below)
    if layout.kind == "lora":
        return adapters.apply(layout, old, names.ORIGINAL, merge=merge)
    if layout.kind == "delta":
        return _sum(layout, old)
    return old | dict(_projector(layout))


def _sum(layout: Layout, old: Mapping[str, Stored]) -> dict[str, Stored]:
    """Base and difference. Only what makes a language model a LLaVA may be new."""
    new = named(layout)
    mark = layout.config.get(BASE_MARK)
    known = (names.PROJECTOR, names.TOWER, names.NEWLINE)
    tables = (names.EMBEDDING, names.HEAD)
    wrong = [name for name in new if name not in old and not name.startswith(known)]
    wrong += [name for name, part in old.items() if name in new and part.shape != new[name].shape and name not in tables]
    wrong += [name for name in tables if name in old and name in new and old[name].shape[1:] != new[name].shape[1:]]
    if wrong or mark not in (None, fingerprint(old)):
        told = f"{len(wrong)} differences to weights that the base does not have: {', '.join(wrong)}"
        raise CheckpointError(
            told if wrong else "the difference was taken to other weights than these",
            code="wrong_base", where=str(layout.folder), remedy="give the base that the difference was taken to",
        )  # fmt: skip
    dtype = DTYPES.get(str(layout.config.get("torch_dtype"))) if mark else None  # without our mark it may be the difference's
    return {name: summed(old[name], stored, dtype=dtype) if name in old else stored for name, stored in new.items()}


def _projector(layout: Layout) -> Iterator[tuple[str, Stored]]:
    """What stage 1 left, whatever its trainer put around the names; trained tokens' rows are handled by ``_rows``."""
    mark = "mm_projector."
    for name, stored in layout.tensors.items():
        if mark in name:
            plain = f"model.{mark}{name.partition(mark)[2]}"
        elif name.endswith("image_newline"):
            plain = "model.image_newline"
        else:
            continue
        mapped = names.ours(plain, names.ORIGINAL)
        assert mapped is not None
        yield mapped, stored


def named(layout: Layout) -> dict[str, Stored]:
    """A checkpoint's weights by our names. Raises CheckpointError where two become one."""
    table = names.HF if layout.kind == "hf" else names.ORIGINAL
    found: dict[str, Stored] = {}
    for given, stored in layout.tensors.items():
        name = names.ours(given, table)
        if name in found:
            what = f"two weights {name}"
            raise CheckpointError(what, code="weights_mismatch", where=str(stored.file), remedy="take weights and config of one model")
        if name is not None:
            found[name] = stored
    return found


def fingerprint(weights: Mapping[str, Stored]) -> str:
    """What tells one base from another without reading all of it: its language model's vectors and smallest matrix, by value."""
    text = {name: stored for name, stored in weights.items() if name.startswith("language_model.")}
    matrices = sorted((math.prod(stored.shape), name) for name, stored in text.items() if len(stored.shape) == 2)
    read = sorted([name for name, stored in text.items() if len(stored.shape) == 1] + [name for _, name in matrices[:1]])
    digest = hashlib.blake2b(digest_size=16)
    for name in read:
        digest.update(name.encode() + value_of(text[name]).numpy().tobytes())
    return digest.hexdigest()


def _tower(layout: Layout, below: Layout | None, given: Path | None, *, shape_only: bool) -> Tower:
    """The CLIP given or found. Where the weights are inside its shape is enough, and may come from a llava-hf base or our table."""
    if given is not None:
        return Tower.read(given)
    origins = [one for one in (layout, below) if one is not None]
    for one in origins:
        folder = find(one.tower, beside=one.folder)
        if folder is not None:
            return Tower.read(folder)
    if shape_only:
        fields = [one.config["vision_config"] for one in origins if one.kind == "hf"]
        fields += [original_config.TOWERS[one.tower] for one in origins if one.tower is not None and one.tower in original_config.TOWERS]
        if fields:
            return Tower(fields=fields[0])
    named = next((f"{one.tower!r}" for one in origins if one.tower), "a CLIP")
    lacks = "the shape of its tower is unknown" if shape_only else "it has no weights of the tower"
    raise CheckpointError(
        f"{lacks}, and {named} is not on this machine", code="tower_missing", where=str(layout.folder),
        remedy="give the folder of that CLIP: tower=FOLDER (--tower FOLDER)",
    )  # fmt: skip


def _add_tokens(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """The legacy tokens in the original's order, then ours. Those that are there already stay where they are."""
    from tokenizers import AddedToken

    wanted = [PATCH] if fields.get("mm_use_im_patch_token", True) else []
    wanted += [START, END] if fields.get("mm_use_im_start_end", False) else []
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in (*wanted, IMAGE)], special_tokens=True)
    if tokenizer.pad_token is None and tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token  # as in the original's training


def _rows(layout: Layout, fields: Mapping[str, Any], weights: dict[str, Stored], tokenizer: Any) -> tuple[dict[str, Stored], int, int]:
    """The weights with room for every token; rows of the embedding table before and after."""
    if names.EMBEDDING not in weights:
        what = f"no {names.original(names.EMBEDDING, linear=False)}"
        raise CheckpointError(what, code="weights_mismatch", where=str(layout.folder), remedy="take weights and config of one model")
    before = weights[names.EMBEDDING].shape[0]
    if layout.kind in ("original", "delta") and fields.get("vocab_size", before) != before:
        raise CheckpointError(
            f"vocab_size is {fields['vocab_size']} but the embedding table has {before} rows", code="weights_mismatch",
            where=str(layout.folder), remedy="take weights and config of one model",
        )  # fmt: skip
    least = max(before + _NEW_ROWS, len(tokenizer))
    after = before if before >= len(tokenizer) else -(-least // _ROWS_ROUNDED_TO) * _ROWS_ROUNDED_TO
    tables = {name: weights[name] for name in (names.EMBEDDING, names.HEAD) if name in weights}
    if after > before:
        tables = {name: grown(table, after) for name, table in tables.items()}
    trained = next((stored for name, stored in layout.tensors.items() if name.endswith("embed_tokens.weight")), None)
    if layout.kind == "projector" and trained is not None and fields.get("mm_use_im_start_end"):
        tables[names.EMBEDDING] = replaced(tables[names.EMBEDDING], trained, tokenizer.convert_tokens_to_ids([START, END]))
    return weights | tables, before, after


def _processor(config: ModelConfig, fields: Mapping[str, Any], seen: Tower, tokenizer: Any) -> Processor:
    """How the original prepares pictures and words. The text after a picture is tokenised as if it stood alone (spec 3.3)."""
    length = fields.get("tokenizer_model_max_length") or fields.get("max_position_embeddings") or _USUAL_LENGTH
    return Processor(
        tokenizer=tokenizer,
        template=_template(config, fields, tokenizer),
        preprocess=Preprocess(size=config.image_size, aspect=original_config.aspect(fields), mean=seen.mean, std=seen.std),
        tiling=config.tiling,
        image_token=IMAGE,
        max_length=int(length),
        image_pieces="original",
    )


def _template(config: ModelConfig, fields: Mapping[str, Any], tokenizer: Any) -> Template:
    """The prompt that the model was trained with, as far as the files tell: the language model's family and how its replies end."""
    name = {"mistral": "mistral_instruct"}.get(str(config.text["model_type"]), "vicuna_v1")
    template = TEMPLATES["chatml_direct" if tokenizer.eos_token == "<|im_end|>" else name]
    return template.around_images(START, END) if fields.get("mm_use_im_start_end") else template
