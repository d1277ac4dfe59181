"""The published runs as values for ``train.plan``, with the wall times their authors gave (spec 4.2, 4.4, 4.5).

Nobody published how long the samples are, so their lengths are derived here and can be argued with:

    tokens of a sample = 31 of the system text + suffix + rounds x (9 of the frame + question + reply)

31 and 9 are what Vicuna's format takes in LLaMA's tokenizer. Rounds: all questions of an image are merged into one conversation, so
VQAv2 has 443,757 / 82,783, GQA 943,000 / 72,140, OCR-VQA 1,002,146 / 207,572, RefCOCO 321,327 / 48,447 of them, Visual Genome 10; the
conversations of LLaVA-Instruct have 4.5. Questions and replies: counted on LLaVA-Bench's GPT-4 answers for LLaVA-Instruct (22, 104 and
151 tokens a reply), on sentences typical of it for each other source; a box takes 24. ShareGPT, cut at 2048, is the one free guess.

The original fills each row up to the longest of its batch, and its sampler mixes all lengths of a modality in a batch (spec 4.3). With
every sample taken at its source's mean, the longest of b samples is a sum over the table; a spread inside the sources would add to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llavakit.errors import ConfigError
from llavakit.model.released import SYSTEMS
from llavakit.recipes import RECIPES
from llavakit.train.plan import Part, Run

SYSTEM, FRAME = 31, 9
CAPTION = 16  # bos, 14 of a COCO-like caption, eos


@dataclass(frozen=True)
class Source:
    """Samples of one kind, and the tokens of their text."""

    name: str
    samples: int
    rounds: float
    question: float
    reply: float
    suffix: float = 0
    pictured: bool = True

    @property
    def text(self) -> float:
        return SYSTEM + self.suffix + self.rounds * (FRAME + self.question + self.reply)

    @property
    def learned(self) -> float:
        return self.rounds * (self.reply + 1)


MIX_665K = (
    Source("LLaVA-Instruct, conversation", 58_000, 4.5, 12, 22),
    Source("LLaVA-Instruct, detail", 23_000, 1, 10, 104),
    Source("LLaVA-Instruct, reasoning", 76_712, 1, 16, 151),
    Source("ShareGPT", 40_688, 4, 60, 250, pictured=False),
    Source("VQAv2", 82_783, 443_757 / 82_783, 9, 2, suffix=10),
    Source("GQA", 72_140, 943_000 / 72_140, 12, 1, suffix=10),
    Source("OKVQA", 8_998, 1, 10, 2, suffix=10),
    Source("OCR-VQA", 80_000, 1_002_146 / 207_572, 9, 6, suffix=10),
    Source("A-OKVQA", 66_160, 1, 26, 1, suffix=13),
    Source("TextCaps", 21_953, 1, 43, 19),
    Source("RefCOCO", 48_447, 321_327 / 48_447, 27, 16),
    Source("Visual Genome", 86_417, 10, 27, 15),
)
INSTRUCT_158K = MIX_665K[:3]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run, and where its authors ran it and how long; ``hours`` None: not said."""

    run: Run
    card: str = "A100-80"
    devices: int = 8
    hours: float | None = None


def mean(sources: Iterable[Source], value: str) -> float:
    """Of ``text`` or ``learned`` over all samples."""
    rows = list(sources)
    return sum(row.samples * float(getattr(row, value)) for row in rows) / sum(row.samples for row in rows)


def longest(sources: Iterable[Source], count: int) -> float:
    """The expected longest text of ``count`` samples drawn from the sources, each as long as its source's mean.

    P(longest <= x) = (share of the samples that are no longer than x) ** count
    """
    rows = sorted(sources, key=lambda row: row.text)
    total, seen, before, expected = sum(row.samples for row in rows), 0, 0.0, 0.0
    for row in rows:
        seen += row.samples
        now = (seen / total) ** count
        expected, before = expected + row.text * (now - before), now
    return expected


def padding(sources: Iterable[Source], image_tokens: float, count: int) -> float:
    """Positions computed for each token when batches of ``count`` samples of one modality are filled up to their longest."""
    rows = list(sources)
    computed = tokens = 0.0
    for pictured in (True, False):
        kind = [row for row in rows if row.pictured == pictured]
        samples, image = sum(row.samples for row in kind), image_tokens * pictured
        if kind:
            computed += samples * (image + longest(kind, count))
            tokens += samples * (image + mean(kind, "text"))
    return computed / tokens


def _batch(recipe: str) -> int:
    """The global batch, from its owner."""
    config = RECIPES[recipe].config
    return config.batch_size * config.accumulation


def _pretrain(system: str, recipe: str, *, samples: int) -> Run:
    config = SYSTEMS[system].config
    return Run(
        config=config, samples=samples, batch=_batch(recipe), views=1, image_tokens=config.view_tokens, text_tokens=CAPTION,
        learned_tokens=CAPTION - 1,
    )  # fmt: skip


def _finetune(system: str, recipe: str, sources: tuple[Source, ...]) -> Run:
    config, run = SYSTEMS[system].config, RECIPES[recipe].config
    samples = sum(row.samples for row in sources)
    pictured = sum(row.samples for row in sources if row.pictured) / samples
    learns: tuple[Part, ...] = ("projector", "language_model")
    return Run(
        config=config, samples=samples, epochs=run.epochs, batch=_batch(recipe), views=pictured, image_tokens=pictured * config.view_tokens,
        text_tokens=mean(sources, "text"), learned_tokens=mean(sources, "learned"), learns=learns,
        padding=padding(sources, config.view_tokens, run.batch_size),
    )  # fmt: skip


def _next(system: str, recipe: str = "next") -> Run:
    """LLaVA-1.6 stage 2: all learns. 779,289 rows; a 4:3 picture, which takes a canvas of 2 x 2 tiles; texts as long as in the 665K."""
    made = _finetune(system, recipe, MIX_665K)
    grid = made.config.tiling.grid(640, 480)
    return replace(
        made, samples=779_289, views=made.views * grid.views, image_tokens=made.views * grid.tokens,
        padding=padding(MIX_665K, grid.tokens, 4), learns=("tower", "projector", "language_model"),
    )  # fmt: skip


def _adapted(run: Run, recipe: str) -> Run:
    lora = RECIPES[recipe].config.lora
    assert lora is not None, recipe
    return replace(run, learns=("projector",), rank=lora.r)


_V15 = {size: _finetune(f"llava-v1.5-{size}", "finetune", MIX_665K) for size in ("7b", "13b")}
RUNS: Mapping[str, Published] = {
    "v1-7b-pretrain": Published(run=_pretrain("llava-v1-7b", "v1-pretrain", samples=595_375), hours=2),
    "v1-13b-pretrain": Published(run=_pretrain("llava-v1-13b", "v1-pretrain", samples=595_375), hours=4),
    "v1-13b-finetune": Published(run=_finetune("llava-v1-13b", "v1-finetune", INSTRUCT_158K), hours=10),
    "v1.5-7b-pretrain": Published(run=_pretrain("llava-v1.5-7b", "pretrain", samples=558_128), hours=3.5),
    "v1.5-13b-pretrain": Published(run=_pretrain("llava-v1.5-13b", "pretrain", samples=558_128), hours=5.5),
    "v1.5-7b-finetune": Published(run=_V15["7b"], card="A100-40", hours=10),
    "v1.5-13b-finetune": Published(run=_V15["13b"], hours=20),
    "v1.5-7b-lora": Published(run=_adapted(_V15["7b"], "lora"), card="RTX3090"),
    "v1.5-13b-lora": Published(run=_adapted(_V15["13b"], "lora"), card="A100-40"),
    "v1.5-7b-qlora": Published(run=replace(_adapted(_V15["7b"], "qlora"), weights="4bit"), card="RTX4090", devices=1),
    "v1.5-13b-qlora": Published(run=replace(_adapted(_V15["13b"], "qlora"), weights="4bit"), card="A6000", devices=1),
    "v1.6-vicuna-7b": Published(run=_next("llava-v1.6-vicuna-7b"), hours=20),
    "v1.6-vicuna-13b": Published(run=_next("llava-v1.6-vicuna-13b"), devices=16, hours=24),
    "v1.6-mistral-7b": Published(run=_next("llava-v1.6-mistral-7b", "next-mistral")),
    "v1.6-34b": Published(run=_next("llava-v1.6-34b", "next-34b"), devices=32, hours=30),
}


def published(name: str) -> Published:
    """The run of a name. Raises ConfigError ``unknown_recipe``."""
    if name not in RUNS:
        raise ConfigError(f"no recipe '{name}'", code="unknown_recipe", where="RECIPE", remedy=f"use one of {', '.join(RUNS)}")
    return RUNS[name]
