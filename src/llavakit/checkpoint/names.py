"""The names of weights: literal tables between every published spelling and ours (spec 1.7).

Ours are the published llava-hf ones (A): ``language_model.model.layers...``, ``language_model.lm_head...``,
``vision_tower.vision_model...``, ``multi_modal_projector...``. The in-memory names of transformers 4.52 (B) and 5 (C), the mixture that
transformers 5 writes, and the original LLaVA's differ by prefixes only. The first row whose left side begins a name applies.
"""

from __future__ import annotations

import re
from collections.abc import Collection

Table = tuple[tuple[str, str], ...]

HF: Table = (
    ("model.language_model.", "language_model.model."),  # B, C
    ("lm_head.", "language_model.lm_head."),  # B, C
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),  # B
    ("model.vision_tower.", "vision_tower.vision_model."),  # C
    ("model.multi_modal_projector.", "multi_modal_projector."),  # B, C
    ("model.image_newline", "image_newline"),  # B, C
    ("vision_tower.vision_model.", "vision_tower.vision_model."),  # A
    ("vision_tower.", "vision_tower.vision_model."),  # written by transformers 5
)
ORIGINAL: Table = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.mm_projector.", "multi_modal_projector.linear_1."),  # LLaVA v1: one linear layer
    ("model.image_newline", "image_newline"),
    ("model.", "language_model.model."),  # a plain language model's names, too
    ("lm_head.", "language_model.lm_head."),
)
IN_MEMORY: Table = (*HF[:2], *HF[3:6])  # C, one row for each part
CLIP: Table = (
    ("vision_model.", "vision_tower.vision_model."),  # openai's files
    ("", "vision_tower.vision_model."),  # written by transformers 5
)
TOWER, PROJECTOR, NEWLINE = "vision_tower.", "multi_modal_projector.", "image_newline"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")  # computed, not learned; old files hold them


def native(name: str, expected: Collection[str]) -> str | None:
    """Our name of a tensor stored in the llava-hf layout; None for one to pass over. A name that is already ours stays."""
    return name if name in expected else ours(name, HF)


def ours(name: str, table: Table) -> str | None:
    """Our name of a stored tensor; None for one to pass over; a name that no row knows stays."""
    if IGNORED.fullmatch(name):
        return None
    for theirs, our in table:
        if name.startswith(theirs):
            return our + name.removeprefix(theirs)
    return name


def in_memory(name: str) -> str:
    """The name in transformers 5 (C) of a module or tensor of ours; adapters are named so."""
    for theirs, our in IN_MEMORY:
        if name.startswith(our):
            return theirs + name.removeprefix(our)
    raise AssertionError(f"{name} is no part of a LLaVA")


def original(name: str, *, linear: bool) -> str:
    """The original LLaVA's name of a tensor of ours; ``linear``: the projector is one layer."""
    for theirs, our in ORIGINAL:
        one_layer = theirs == "model.mm_projector."
        if name.startswith(our) and (linear is one_layer or our != "multi_modal_projector.linear_1."):
            return theirs + name.removeprefix(our)
    raise AssertionError(f"{name} has no original name")
