"""Every published run of the family as a value (spec 4.1, 4.2). ``llava train RECIPE key=value ...`` changes what is named.

              projector alone (stage 1)     projector and language model (stage 2)            from a finished LLaVA
    v1        v1-pretrain                   v1-finetune  v1-scienceqa
    1.5       pretrain                      finetune  lora  qlora                             task  task-lora  few
    1.5-HD                                  hd (from a stage 1 at 224 pixels)
    NeXT      next-pretrain                 next  next-mistral  next-34b (the tower too)

Batches are the papers': batch_size on one device times accumulation, whatever the number of devices. What was never published is said in
``note`` and not made up silently. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llavakit.config import FINETUNE, LORA, PRETRAIN, QLORA, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run of the papers. ``makes``: the published systems it is a stage of (``model.released``); ``data``: the shipped manifest."""

    name: str
    help: str
    config: TrainConfig
    makes: tuple[str, ...]
    data: str | None = None
    note: str = ""


def _named(name: str, config: TrainConfig) -> TrainConfig:
    return replace(config, out=Path("runs") / name)


_V15 = ("llava-v1.5-7b", "llava-v1.5-13b")
_V1 = ("llava-v1-7b", "llava-v1-13b")
_VICUNA_NEXT = ("llava-v1.6-vicuna-7b", "llava-v1.6-vicuna-13b")
_TOWER = r"vision_tower\..*"

_V1_PRETRAIN = replace(PRETRAIN, projector="linear", batch_size=16, accumulation=8, lr=2e-3)
_V1_FINETUNE = replace(FINETUNE, template="llava_v0", aspect="square", placement="as_data", projector="linear", batch_size=4, epochs=3)
_NEXT = replace(
    FINETUNE, aspect="anyres", tiles="released", base="squash", lr=1e-5, rates=((_TOWER, 0.2),), max_length=4096, batch_size=4,
    accumulation=32,
)  # fmt: skip

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="pretrain", help="1.5, stage 1: the projector alone, on captions", config=PRETRAIN, makes=_V15, data="lcs-558k"),
        Recipe(
            name="finetune", help="1.5, stage 2: projector and language model, on conversations", config=FINETUNE, makes=_V15,
            data="llava-1.5-665k",
        ),
        Recipe(name="lora", help="1.5, stage 2 with LoRA", config=LORA, makes=_V15, data="llava-1.5-665k"),
        Recipe(
            name="qlora", help="1.5, stage 2 with LoRA over four bits", config=QLORA, makes=_V15, data="llava-1.5-665k",
            note="the original's script gives rank and alpha no values: its defaults 64 and 16 stand here",
        ),
        Recipe(name="task", help="1.5, go on with a finished model on your own task", config=_named("task", FINETUNE), makes=_V15),
        Recipe(name="task-lora", help="1.5, your own task with LoRA", config=_named("task-lora", LORA), makes=_V15),
        Recipe(
            name="few", help="1.5, your own task from some dozens or hundreds of samples", makes=_V15,
            config=_named("few", replace(FINETUNE, batch_size=8, accumulation=1, epochs=5)),
            note="not the papers': of fewer than a thousand samples their batch of 128 makes too few steps",
        ),
        Recipe(
            name="hd", help="1.5-HD, stage 2: up to six tiles of 224 pixels, a padded base", data="llava-1.5-665k",
            config=_named("hd", replace(FINETUNE, aspect="anyres", tiles="hd", base="pad", max_length=4096)),
            makes=("llava-v1.5-hd-7b", "llava-v1.5-hd-13b"), note="the longest sequence was not published",
        ),
        Recipe(
            name="v1-pretrain", help="v1, stage 1: a linear projector", config=_named("v1-pretrain", _V1_PRETRAIN), makes=_V1,
            data="cc3m-595k",
        ),
        Recipe(
            name="v1-finetune", help="v1, stage 2: three epochs of 158K conversations", makes=_V1,
            config=_named("v1-finetune", _V1_FINETUNE), data="llava-instruct-158k",
        ),
        Recipe(
            name="v1-scienceqa", help="v1 on ScienceQA: twelve epochs, the reasoning first", makes=("llava-v1-13b-scienceqa",),
            config=_named("v1-scienceqa", replace(_V1_FINETUNE, epochs=12)), note="convert the questions with llava data scienceqa",
        ),
        Recipe(
            name="next-pretrain", help="NeXT, stage 1: the projector alone", config=_named("next-pretrain", PRETRAIN), data="lcs-558k",
            makes=(*_VICUNA_NEXT, "llava-v1.6-mistral-7b", "llava-v1.6-34b"), note="Vicuna's versions took the projector of 1.5",
        ),
        Recipe(
            name="next", help="NeXT, stage 2: tiles, the tower learns too at its own rate", makes=_VICUNA_NEXT,
            config=_named("next", _NEXT), data="next-760k",
            note="batch and rates were not published: the successor's rate, and the released config's 2e-6 for the tower",
        ),
        Recipe(
            name="next-mistral", help="NeXT on Mistral-7B-Instruct", makes=("llava-v1.6-mistral-7b",), data="next-760k",
            config=_named("next-mistral", replace(_NEXT, template="mistral_instruct")), note="as next",
        ),
        Recipe(
            name="next-34b", help="NeXT on Nous-Hermes-2-Yi-34B", makes=("llava-v1.6-34b",), data="next-760k",
            config=_named("next-34b", replace(_NEXT, template="chatml_direct", batch_size=2, accumulation=64, shard="full")),
            note="as next",
        ),
    )
}  # fmt: skip
