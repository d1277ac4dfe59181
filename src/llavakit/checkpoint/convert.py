"""From one layout to another, and the proof that nothing was lost: the logits of what was written against those of what was read.

SRC --load--> model --save--> draft of DST --load--> model     one picture and question through both, in fp32
                |                                |
                +------------ logits ------------+--> more than 1e-5 apart: the draft is removed, DST stays as it was
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llavakit.checkpoint import adapters, files, names, original_save, store
from llavakit.checkpoint.layouts import PROJECTOR_FILE, Kind, Layout, describe, is_original
from llavakit.checkpoint.shards import MAX_SHARD_BYTES
from llavakit.errors import CheckpointError
from llavakit.model.llava import Llava
from llavakit.processor import Inputs, Processor
from llavakit.types import Conversation, Image, Pixels

Target = Literal["hf", "original", "projector", "delta"]
TOLERANCE = 1e-5
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was done. ``error``: the largest difference of logits relative to the largest logit; ``same_ids``: whether both read alike."""

    source: Kind
    target: Target
    error: float
    same_ids: bool


def convert(
    source: Path,
    folder: Path,
    *,
    to: Target | None = None,
    base: Path | None = None,
    tower: Path | None = None,
    keep_adapter: bool = False,
    dtype: str | torch.dtype = "stored",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_pickle: bool = False,
) -> Converted:
    """Write the checkpoint ``source`` as ``folder`` in another layout: llava-hf from all others, the original's from llava-hf.

    base: what ``source`` belongs to, or for a delta, what the difference is taken to. keep_adapter: a LoRA's base and what was trained
    beside it become ``folder``, and its matrices an adapter of that, ``folder/adapter``. Raises CheckpointError; ``conversion_differs``
    when the logits do, and then nothing is left behind.
    """
    layout = describe(source, allow_pickle=allow_pickle)
    target = to or ("original" if layout.kind == "hf" else "hf")
    _check(layout, target, Path(folder), base=base, keep_adapter=keep_adapter)
    load = partial(store.load, dtype=dtype, allow_pickle=allow_pickle)
    below = base if layout.needs_base or target != "delta" else None  # where none belongs, load says so
    load_source = partial(load, source, base=below, tower=None if layout.kind == "hf" else tower)
    write_original = partial(original_save.save, tower=tower, max_shard_bytes=max_shard_bytes, allow_pickle=allow_pickle)
    found: list[Converted] = []

    def write(draft: Path) -> None:
        without = _without_matrices(load_source) if layout.kind == "lora" else None
        model, processor = load_source(merge=not keep_adapter)
        if target == "hf":
            store.save(model, processor, draft, max_shard_bytes=max_shard_bytes)
        elif target == "projector":
            original_save.save_projector(model, processor, draft)
        else:
            write_original(model, processor, draft, minus=base if target == "delta" else None)
        if keep_adapter:
            adapters.write(layout, draft / ADAPTER)
            del model
            model, _ = load_source()
        inputs, rows = processor.encode(_TALK, learn=False), model.config.file_rows
        before = logits(model, processor, inputs)
        if without is not None and torch.equal(before, without):
            raise adapters.changes_nothing("merged, the model gives the logits of its base", layout)
        if target == "projector":
            again, reader = _with_projector(model, draft), processor
        else:
            del model  # one is in memory at a time
            again, reader = load(
                draft / ADAPTER if keep_adapter else draft,
                base=draft if keep_adapter else base if target == "delta" else None,
                tower=None if target == "hf" or (draft / original_save.OWN_TOWER).exists() else tower,
            )
        after = logits(again, reader, _with_id(inputs, processor, reader))
        same_ids = torch.equal(_plain(inputs, processor), _plain(reader.encode(_TALK, learn=False), reader))
        error = _difference(before, after, rows=min(rows, again.config.file_rows), where=str(folder))
        found.append(Converted(source=layout.kind, target=target, error=error, same_ids=same_ids))

    store.place(Path(folder), write, needed=0)
    return found[0]


def _check(layout: Layout, target: Target, folder: Path, *, base: Path | None, keep_adapter: bool) -> None:
    """Refuse what cannot be asked, before anything is read."""
    where = str(layout.folder)
    if folder.resolve() == layout.folder.resolve():
        raise CheckpointError("source and target are one", code="not_a_checkpoint", where=where, remedy="give a new folder")
    if target == "delta" and layout.needs_base:
        raise CheckpointError(
            f"a {layout.kind} and its delta have two bases", code="bad_base", where=where, remedy="convert it to a whole model first"
        )
    if target == "delta" and base is None:
        raise CheckpointError("a delta needs a base", code="base_missing", where=where, remedy="give the model to take it to: --base")
    if keep_adapter and (layout.kind != "lora" or target != "hf" or not is_original(layout.config)):
        raise CheckpointError(
            "only an adapter of the original layout, converted to hf, can be kept", code="no_adapter", where=where,
            remedy="leave out --keep-adapter",
        )  # fmt: skip


def _without_matrices(load_source: Callable[..., tuple[Llava, Processor]]) -> Tensor:
    """The logits of an adapter's base with what was trained beside the matrices."""
    model, processor = load_source(merge=False)
    return logits(model, processor, processor.encode(_TALK, learn=False))


def _with_projector(model: Llava, draft: Path) -> Llava:
    """The model itself, with the projector that was written in place of its own."""
    written = files.in_file(draft / PROJECTOR_FILE, allow_pickle=True)
    named = {names.ours(name, names.ORIGINAL) or name: files.value_of(stored) for name, stored in written.items()}
    missing, unknown = model.load_state_dict(named, strict=False)
    assert not unknown, "only a projector was written"
    assert not any(name.startswith((names.PROJECTOR, names.NEWLINE)) for name in missing), "and all of it"
    return model


def _difference(before: Tensor, after: Tensor, *, rows: int, where: str) -> float:
    """The largest, relative to the largest logit, over the rows that stand in both files; others are made when they are missed.

    Raises CheckpointError ``conversion_differs``.
    """
    one, other = before[:, :rows], after[:, :rows]
    error = float((one - other).abs().max() / one.abs().max())
    if not error <= TOLERANCE:
        raise CheckpointError(
            f"what was written computes something else: logits differ by {error:.1e} of the largest, {TOLERANCE:.0e} is allowed",
            code="conversion_differs",
            where=where,
            remedy="nothing was kept; please report it",
        )
    return error


def logits(model: Llava, processor: Processor, inputs: Inputs) -> Tensor:
    """The logits T.W of one example, in fp32 whatever the weights are held in."""
    for part in (model.vision_tower, model.multi_modal_projector):
        part.float()
    with torch.no_grad(), _fp32_one_by_one(model.language_model):
        found = model(processor.collate([inputs], side="right"), full_logits=True).logits
    return found[0].float()  # type: ignore[no-any-return]


@contextmanager
def _fp32_one_by_one(part: nn.Module) -> Iterator[None]:
    """Within this context each module computes in fp32, and only for the time of its call are its weights held so."""
    held: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for parameter in module.parameters(recurse=False):
            held[parameter] = parameter.data
            parameter.data = parameter.data.float()
        return tuple(map(_float, args)), {name: _float(value) for name, value in kwargs.items()}

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = held.pop(parameter)

    hooks = []
    for module in part.modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(widen, with_kwargs=True), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _plain(inputs: Inputs, processor: Processor) -> Tensor:
    """Ids with the original's mark for a picture, which every vocabulary has."""
    return inputs.input_ids.masked_fill(inputs.input_ids == processor.image_token_id, -200)


def _with_id(inputs: Inputs, old: Processor, new: Processor) -> Inputs:
    ids = inputs.input_ids
    return Inputs(ids.masked_fill(ids == old.image_token_id, new.image_token_id), inputs.labels, inputs.views, inputs.grids)


def _picture() -> Image:
    """Neither square nor plain: noise, so that every view and every patch differs."""
    width, height = 90, 61
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image(Pixels(width=width, height=height, rgb=noise.numpy().tobytes()))


_TALK = Conversation.ask("What is in the picture?", _picture())
