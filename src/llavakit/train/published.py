"""The published runs: how long their samples are, and how long their authors trained (spec 4.2, 4.4, 4.5).

What the runs are is said in ``recipes``, of how many samples their data in ``data/manifests``. Nobody published how long the samples are,
so their lengths are derived here and can be argued with:

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
from functools import cache

from llavakit.config import TrainConfig
from llavakit.data.manifest import part_of, shipped
from llavakit.model.presets import ModelConfig
from llavakit.recipes import RECIPES, Recipe
from llavakit.train.described import Samples

SYSTEM, FRAME = 31, 9
CAPTION = 16  # bos, 14 of a COCO-like caption, eos
PICTURE = (640, 480)  # what COCO's pictures mostly are


@dataclass(frozen=True)
class Words:
    """Tokens of the text of one kind of samples, suffix those of the format words."""

    rounds: float
    question: float
    reply: float
    suffix: float = 0

    @property
    def text(self) -> float:
        return SYSTEM + self.suffix + self.rounds * (FRAME + self.question + self.reply)

    @property
    def learned(self) -> float:
        return self.rounds * (self.reply + 1)


INSTRUCT: Mapping[str, Words] = {  # parts of llava-instruct-158k
    "conversation": Words(4.5, 12, 22),
    "detail": Words(1, 10, 104),
    "complex-reasoning": Words(1, 16, 151),
}
MIX: Mapping[str, Words] = {  # parts of llava-1.5-665k, llava-instruct apart
    "sharegpt": Words(4, 60, 250),
    "vqav2": Words(443_757 / 82_783, 9, 2, suffix=10),
    "gqa": Words(943_000 / 72_140, 12, 1, suffix=10),
    "okvqa": Words(1, 10, 2, suffix=10),
    "ocr-vqa": Words(1_002_146 / 207_572, 9, 6, suffix=10),
    "a-okvqa": Words(1, 26, 1, suffix=13),
    "textcaps": Words(1, 43, 19),
    "refcoco": Words(321_327 / 48_447, 27, 16),
    "visual-genome": Words(10, 27, 15),
}


@dataclass(frozen=True)
class Source:
    """So many samples of one kind."""

    name: str
    samples: float
    words: Words
    pictured: bool = True


@cache
def instruct() -> tuple[Source, ...]:
    """The parts of LLaVA-Instruct, whose rounded numbers share the exact count of all."""
    (file,) = shipped("llava-instruct-158k").sources
    each = (file.count or 0) / sum(part.about or 0 for part in file.parts)
    return tuple(Source(part.name, each * (part.about or 0), INSTRUCT[part.name]) for part in file.parts)


@cache
def mix() -> tuple[Source, ...]:
    """The parts of LLaVA-1.5's mixture, LLaVA-Instruct in its own."""
    (file,) = shipped("llava-1.5-665k").sources
    rest = (Source(part.name, part.count or 0, MIX[part.name], bool(part.roots)) for part in file.parts if part.name in MIX)
    return (*instruct(), *rest)


def mean(sources: Iterable[Source], value: str) -> float:
    """Of ``text`` or ``learned`` over all samples."""
    rows = list(sources)
    return sum(row.samples * float(getattr(row.words, value)) for row in rows) / sum(row.samples for row in rows)


def longest(sources: Iterable[Source], count: int) -> float:
    """The expected longest text of ``count`` samples drawn from the sources, each as long as its source's mean.

    P(longest <= x) = (share of the samples that are no longer than x) ** count
    """
    rows = sorted(sources, key=lambda row: row.words.text)
    total, seen, before, expected = sum(row.samples for row in rows), 0.0, 0.0, 0.0
    for row in rows:
        seen += row.samples
        now = (seen / total) ** count
        expected, before = expected + row.words.text * (now - before), now
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


def samples(recipe: Recipe, config: TrainConfig, shape: ModelConfig) -> Samples:
    """Of the recipe's data, as ``config`` has them read by a model of this shape; a recipe without data is given LLaVA-1.5's lengths."""
    shape = shape if config.aspect == "anyres" else replace(shape, canvases=(), merge="flat")
    grid = shape.tiling.grid(*PICTURE)
    known = shipped(recipe.data).count if recipe.data is not None else None
    count = None if known is None else part_of(known, config.share)
    if config.template == "plain":
        return Samples(samples=count, views=grid.views, image_tokens=grid.tokens, text_tokens=CAPTION, learned_tokens=CAPTION - 1)
    sources = instruct() if recipe.data == "llava-instruct-158k" else mix()
    pictured = sum(row.samples for row in sources if row.pictured) / sum(row.samples for row in sources)
    return Samples(
        samples=count, views=pictured * grid.views, image_tokens=pictured * grid.tokens, text_tokens=mean(sources, "text"),
        learned_tokens=mean(sources, "learned"), padding=1.0 if config.pack else padding(sources, grid.tokens, config.batch_size),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Time:
    """Where the authors ran it and how long; ``hours`` None: not said."""

    card: str = "A100-80"
    devices: int = 8
    hours: float | None = None


TIMES: Mapping[tuple[str, str], Time] = {  # recipe, and the system it makes
    ("v1-pretrain", "llava-v1-7b"): Time(hours=2),
    ("v1-pretrain", "llava-v1-13b"): Time(hours=4),
    ("v1-finetune", "llava-v1-13b"): Time(hours=10),
    ("v1-scienceqa", "llava-v1-13b-scienceqa"): Time(hours=4),
    ("pretrain", "llava-v1.5-7b"): Time(hours=3.5),
    ("pretrain", "llava-v1.5-13b"): Time(hours=5.5),
    ("finetune", "llava-v1.5-7b"): Time(card="A100-40", hours=10),
    ("finetune", "llava-v1.5-13b"): Time(hours=20),
    ("lora", "llava-v1.5-7b"): Time(card="RTX3090"),
    ("lora", "llava-v1.5-13b"): Time(card="A100-40"),
    ("qlora", "llava-v1.5-7b"): Time(card="RTX4090", devices=1),
    ("qlora", "llava-v1.5-13b"): Time(card="A6000", devices=1),
    ("next", "llava-v1.6-vicuna-7b"): Time(hours=20),
    ("next", "llava-v1.6-vicuna-13b"): Time(devices=16, hours=24),
    ("next-34b", "llava-v1.6-34b"): Time(devices=32, hours=30),
}


def as_published(recipe: str) -> TrainConfig:
    """The recipe as its authors' code ran it: rows filled up, activations computed again."""
    return replace(RECIPES[recipe].config, pack=False, gradient_checkpointing=True)
