"""From one layout to another, and the proof that nothing was lost: the logits of what was written against those of what was read.

SRC --load--> model --save--> draft of DST --load--> model     one picture and question through both, in fp32
                |                                |
                +------------ logits ------------+--> more than 1e-5 apart: the draft is removed, DST stays as it was
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llavakit.checkpoint import names, original_save, store
from llavakit.checkpoint.layouts import PROJECTOR_FILE, Kind, describe
from llavakit.errors import CheckpointError
from llavakit.model.llava import Llava
from llavakit.processor import Inputs, Processor
from llavakit.types import Conversation, Image, Pixels

Target = Literal["hf", "original", "projector", "delta"]
TARGETS: tuple[Target, ...] = ("hf", "original", "projector", "delta")
TOLERANCE = 1e-5
_VOCABULARY = "tokenizer.model"  # SentencePiece's file, which old programs read and transformers 5 does not write


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
    dtype: str | torch.dtype = "stored",
    allow_pickle: bool = False,
) -> Converted:
    """Write the checkpoint ``source`` as ``folder`` in another layout: llava-hf from all others, the original's from llava-hf.

    base: what ``source`` belongs to, or for a delta, what the difference is taken to. Raises CheckpointError; ``conversion_differs``
    when the logits do, and then nothing is left behind.
    """
    if (Path(folder) / "config.json").exists() and Path(folder).resolve() == Path(source).resolve():
        raise CheckpointError("source and target are one", code="not_a_checkpoint", where=str(folder), remedy="give a new folder")
    layout = describe(source, allow_pickle=allow_pickle)
    target = to or ("original" if layout.kind == "hf" else "hf")
    below = base if layout.needs_base else None
    if target == "delta" and base is None:
        raise CheckpointError("a delta needs a base", code="base_missing", where=str(source), remedy="give the model to take it to: --base")
    if target != "delta" and base is not None and below is None:
        raise CheckpointError("no base belongs to it", code="base_not_needed", where=str(source), remedy="leave out --base")
    model, processor = store.load(source, dtype=dtype, base=below, tower=None if layout.kind == "hf" else tower, allow_pickle=allow_pickle)
    found: list[Converted] = []

    def write(draft: Path) -> None:
        _save(model, processor, draft, to=target, base=base, tower=tower, allow_pickle=allow_pickle)
        error, same_ids = _check(model, processor, draft, to=target, base=base, tower=tower, allow_pickle=allow_pickle)
        if not error <= TOLERANCE:
            raise CheckpointError(
                f"what was written computes something else: logits differ by {error:.1e} of the largest, {TOLERANCE:.0e} is allowed",
                code="conversion_differs",
                where=str(folder),
                remedy="nothing was kept; leave out --dtype, and report it if that does not help",
            )
        found.append(Converted(source=layout.kind, target=target, error=error, same_ids=same_ids))

    store.place(Path(folder), write, needed=0)
    return found[0]


def _save(
    model: Llava, processor: Processor, draft: Path, *, to: Target, base: Path | None, tower: Path | None, allow_pickle: bool
) -> None:
    if to == "hf":
        store.save(model, processor, draft)
    elif to == "projector":
        original_save.save_projector(model, processor, draft)
    elif to == "delta":
        assert base is not None, "convert() saw to it"
        original_save.save_delta(model, processor, draft, base=base, tower=tower, allow_pickle=allow_pickle)
    else:
        original_save.save(model, processor, draft, tower=tower, allow_pickle=allow_pickle)
    home = processor.tokenizer.name_or_path
    if to != "projector" and home and (Path(home) / _VOCABULARY).is_file():
        shutil.copyfile(Path(home) / _VOCABULARY, draft / _VOCABULARY)


def _check(
    model: Llava, processor: Processor, draft: Path, *, to: Target, base: Path | None, tower: Path | None, allow_pickle: bool
) -> tuple[float, bool]:
    """The difference of logits, relative to the largest, and whether the ids are the same."""
    inputs = processor.encode(_TALK, learn=False)
    before = logits(model, processor, inputs)
    same_ids = True
    if to == "projector":
        written: Any = torch.load(draft / PROJECTOR_FILE, weights_only=True)
        ours = {names.ours(name, names.ORIGINAL) or name: value for name, value in written.items()}
        model.load_state_dict(ours, strict=False)
        again, reader = model, processor
    else:
        again, reader = store.load(
            draft,
            dtype="stored",
            base=base if to == "delta" else None,
            tower=None if to == "hf" or (draft / original_save.OWN_TOWER).exists() else tower,
            allow_pickle=allow_pickle,
        )
        also = reader.encode(_TALK, learn=False)
        same_ids = torch.equal(_plain(inputs, processor), _plain(also, reader))
    after = logits(again, reader, _with_id(inputs, processor, reader))
    count = min(model.config.file_rows, again.config.file_rows)  # rows that stand in no file are made when they are missed
    error = float((before[:, :count] - after[:, :count]).abs().max() / before[:, :count].abs().max())
    return error, same_ids


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
