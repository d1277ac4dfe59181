"""The names of weights: one literal table from every llava-hf spelling to ours (spec 1.7).

Ours are the published ones (A): ``language_model.model.layers...``, ``language_model.lm_head...``, ``vision_tower.vision_model...``,
``multi_modal_projector...``. The in-memory names of transformers 4.52 (B) and 5 (C), and the mixture that transformers 5 writes, differ
by prefixes only. The first row whose left side begins a name applies.
"""

from __future__ import annotations

import re
from collections.abc import Collection

PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.language_model.", "language_model.model."),  # B, C
    ("lm_head.", "language_model.lm_head."),  # B, C
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),  # B
    ("model.vision_tower.", "vision_tower.vision_model."),  # C
    ("model.multi_modal_projector.", "multi_modal_projector."),  # B, C
    ("model.image_newline", "image_newline"),  # B, C
    ("vision_tower.vision_model.", "vision_tower.vision_model."),  # A
    ("vision_tower.", "vision_tower.vision_model."),  # written by transformers 5
)
IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")  # computed, not learned; old files hold them


def native(name: str, expected: Collection[str]) -> str | None:
    """Our name of a stored tensor; None for one to pass over. A name that is already ours stays."""
    if name in expected:
        return name
    if IGNORED.fullmatch(name):
        return None
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
