r"""Every published recipe, end to end on its own settings: the papers' files and batches, a tiny model of the right family.

    pretrain --> finetune --> task, task-lora         v1-pretrain --> v1-finetune, v1-scienceqa
       |  \-> lora, qlora                             next-pretrain --> next (Vicuna), next-mistral, next-34b
       +----> hd (a tower at 224 pixels)

Of each: its steps and rates; exactly the declared parameters change; what is learned are the file's replies; what is saved answers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llavakit.assistant import Assistant
from llavakit.checkpoint.folders import of_run
from llavakit.cli import main
from llavakit.config import TrainConfig
from llavakit.data.loader import Loader
from llavakit.data.manifest import shipped
from llavakit.model.released import SYSTEMS, System
from llavakit.processor import IGNORED, Processor
from llavakit.recipes import RECIPES
from llavakit.tiling import tiles_of
from llavakit.train import loop, lora, start
from llavakit.train.progress import read_metrics
from llavakit.train.start import shapes
from llavakit.types import Conversation, Sampling
from published_files import SIDES, Files, decoder, tower

FROM = {  # what a recipe goes on from, as the scripts of runs/ have it
    "finetune": "pretrain", "lora": "pretrain", "qlora": "pretrain", "hd": "pretrain", "task": "finetune", "task-lora": "finetune",
    "few": "finetune",
    "v1-finetune": "v1-pretrain", "v1-scienceqa": "v1-pretrain", "next": "next-pretrain", "next-mistral": "next-pretrain",
    "next-34b": "next-pretrain",
}  # fmt: skip
STAGE_1, STAGE_2 = {"multi_modal_projector"}, {"multi_modal_projector", "language_model"}
LEARNS = {  # spec 4.1; with adapters the language model's matrices alone
    **dict.fromkeys(("pretrain", "v1-pretrain", "next-pretrain"), STAGE_1), "hd": STAGE_2 | {"image_newline"},
    **dict.fromkeys(("finetune", "lora", "qlora", "task", "task-lora", "few", "v1-finetune", "v1-scienceqa"), STAGE_2),
    **dict.fromkeys(("next", "next-mistral", "next-34b"), STAGE_2 | {"vision_tower", "image_newline"}),
}  # fmt: skip
RATE = {"lora": 2e-4, "qlora": 2e-4, "task-lora": 2e-4, "pretrain": 1e-3, "next-pretrain": 1e-3, "v1-pretrain": 2e-3}


@dataclass(frozen=True)
class Kind:
    """A recipe on one kind of parts: the tower's views, and which language model."""

    recipe: str
    views: int
    language: str

    def __str__(self) -> str:
        return f"{self.recipe}-{self.views}-{self.language}"


def kinds() -> dict[Kind, System]:
    """Every recipe with every kind of parts that the systems it makes have; 7B and 13B are one."""
    found: dict[Kind, System] = {}
    for recipe in RECIPES.values():
        for name in recipe.makes:
            text = SYSTEMS[name].config.text
            language = "mistral" if text["model_type"] == "mistral" else "yi" if text["eos_token_id"] == 7 else "vicuna"
            language += "-v1" * (text["rms_norm_eps"] == 1e-6)
            found.setdefault(Kind(recipe.name, SYSTEMS[name].config.vision["image_size"], language), SYSTEMS[name])
    return found


KINDS = kinds()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    made = Files(tmp_path_factory.mktemp("published"))
    assert main(["data", "scienceqa", str(made.root / "ScienceQA"), str(made.root / "train.json")]) == 0
    made.records["train.json"] = json.loads((made.root / "train.json").read_text())
    return made


class Runs:
    """Each run once, with what it goes on from."""

    def __init__(self, files: Files, folder: Path) -> None:
        self._files, self._folder, self._done = files, folder, dict[Kind, TrainConfig]()

    def of(self, kind: Kind) -> TrainConfig:
        """The settled config of a finished run."""
        if kind not in self._done:
            self._done[kind] = self._run(kind)
        return self._done[kind]

    def _run(self, kind: Kind) -> TrainConfig:
        recipe, root = RECIPES[kind.recipe], self._files.root
        data: Any = {
            "task": root / "mine.json",
            "task-lora": root / "mine.json",
            "few": root / "mine.json",
            "v1-scienceqa": root / "train.json",
        }
        begun: dict[str, Any] = {"start": self._saved(kind)} if kind.recipe in FROM else self._parts(kind)
        config = replace(
            recipe.config, data=Path(recipe.data) if recipe.data else data[kind.recipe], images=root, out=self._folder / str(kind),
            preflight=False, device="cpu", **begun,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:  # drawing takes longer than such a run
            patch.setattr(loop, "plot", lambda folder: None)
            patch.setattr(loop, "write_report", lambda folder: None)
            loop.train(config)
        return start.settled(config)

    def _saved(self, kind: Kind) -> Path:
        return self.of(replace(kind, recipe=FROM[kind.recipe])).out

    def _parts(self, kind: Kind) -> dict[str, Any]:
        system = next(system for other, system in KINDS.items() if other.language == kind.language)
        see, speak = self._folder / f"tower-{kind.views}", self._folder / kind.language
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return {
                "tower": see if see.exists() else tower(see, kind.views),
                "decoder": speak if speak.exists() else decoder(speak, dict(system.config.text)),
            }


@pytest.fixture(scope="module")
def runs(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(files, tmp_path_factory.mktemp("runs"))


def begun(config: TrainConfig, resumed: Path | None) -> lora.Begun:
    """As the run begins, or goes on from a checkpoint; nothing is placed."""
    torch.manual_seed(config.seed)
    dtype = start.forward_dtype(config, torch.device("cpu"))
    return lora.begin(config, resumed, device=torch.device("cpu"), forward=dtype, save_model=lambda *a, **k: None)


def test_nothing_is_left_out() -> None:
    assert {kind.recipe for kind in KINDS} == set(RECIPES) == set(LEARNS)
    assert set(FROM) == {name for name, recipe in RECIPES.items() if recipe.config.stage == "finetune"}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_published_run(kind: Kind, runs: Runs, files: Files) -> None:
    config, system = runs.of(kind), KINDS[kind]
    checkpoint = of_run(config.out)
    before, after = begun(config, None), begun(config, checkpoint)
    check_what_changed(kind, before, after)
    records = files.records[name_of(config, kind)]
    check_steps(config, kind, len(records))
    check_masks(config, after.processor, records)
    check_model(kind, system, after)
    assistant = Assistant.load(checkpoint, base=config.start if config.lora else None, device="cpu")
    picture = next(sample for sample in start.samples(config, print) if sample.conversation.images).conversation.images[0]
    words = "".join(assistant.reply(Conversation.ask("What is this?", picture), Sampling(max_new_tokens=3)))
    assert isinstance(words, str)


def name_of(config: TrainConfig, kind: Kind) -> str:
    """The file that the run read."""
    assert config.data is not None
    return str(shipped(str(config.data)).sources[0].file) if RECIPES[kind.recipe].data else config.data.name


def check_what_changed(kind: Kind, before: lora.Begun, after: lora.Begun) -> None:
    """Of the weights that are ever computed with, exactly those of the declared parts; with adapters, matrices stand for their layers."""
    then, now = (dict(one.model.named_parameters()) for one in (before, after))
    adapted = any("lora_" in name for name in then)
    unread = set(before.model.vision_tower.never_run())
    declared = {
        name
        for name in then
        if name.split(".")[0] in LEARNS[kind.recipe] and name not in unread
        and (not adapted or not name.startswith("language_model") or ".lora_" in name)
    }  # fmt: skip
    changed = {name for name in then if not same(then[name], now[name])}
    assert changed == declared
    assert then.keys() == now.keys()


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; a learned weight is kept in more bits than it came with."""
    return torch.equal(one.float(), other.float()) if one.is_floating_point() else torch.equal(one, other)


def check_steps(config: TrainConfig, kind: Kind, samples: int) -> None:
    """Each sample once an epoch, in the papers' batches; the rate climbs to the published one."""
    lines = read_metrics(config.out)
    batch = config.batch_size * config.accumulation
    assert len(lines) == config.epochs * math.ceil(samples / batch) > 1
    assert sum(line["samples"] for line in lines) == config.epochs * samples
    assert max(line["samples"] for line in lines) == batch
    peak = RATE.get(kind.recipe, 1e-5 if kind.recipe.startswith("next") else 2e-5)
    assert max(line["lr"] for line in lines) == pytest.approx(peak, rel=0.02)
    assert all(line["loss"] is not None and line["grad_norm"] > 0 for line in lines)


def check_masks(config: TrainConfig, processor: Processor, records: list[dict[str, Any]]) -> None:
    """The run's batches, made again: as many learned tokens in each step, and in each sample the replies of its record and their ends."""
    end, space = processor.template.reply_end + processor.template.end, processor.template.reply_space
    told: dict[str, list[str]] = defaultdict(list)
    for record in records:
        replies = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        told[str(record["id"])].append("".join(space + reply + end for reply in replies))
    source = start.samples(config, print)
    loader = Loader(
        source, processor, batch_size=config.batch_size, accumulation=config.accumulation, seed=config.seed, pack=config.pack,
        placement=config.placement, lengths=source.lengths(),
    )  # fmt: skip
    seen = cut = 0
    for line, window in zip(read_metrics(config.out)[: loader.steps_per_epoch], loader, strict=False):
        assert window.learned == line["learned"]
        cut += window.cut
        for batch, ids in zip(window.batches, window.ids, strict=True):
            segments = zip(*(row[0].split(batch.segments) for row in (batch.input_ids, batch.labels)), strict=True)
            for name, (tokens, labels) in zip(ids, segments, strict=bool(ids)):  # a batch without samples holds a single token
                learned = labels != IGNORED
                assert torch.equal(tokens[learned], labels[learned])
                words = squeezed(processor.decode(labels[learned], special=True))
                whole = [squeezed(reply) for reply in told[name]]
                assert any(reply == words or (len(tokens) == config.max_length and reply.startswith(words)) for reply in whole), name
                seen += 1
    assert seen == len(records)
    assert cut == sum(len(reply) > 10_000 for replies in told.values() for reply in replies)


def squeezed(text: str) -> str:
    """Without blanks: tokenizers put some of their own."""
    return "".join(text.split())


def check_model(kind: Kind, system: System, after: lora.Begun) -> None:
    """What was saved is the published system but for its size: projector, tiles, prompt, language model."""
    made, published, config = after.model.config, system.config, RECIPES[kind.recipe].config
    side = SIDES[kind.views]
    assert (made.image_size, made.projector, made.text["model_type"]) == (side, published.projector, published.text["model_type"])
    if config.stage == "pretrain":
        assert (after.processor.template.name, after.processor.preprocess.aspect) == ("plain", "square")
        assert not made.canvases
        return
    assert made.canvases == after.processor.tiling.canvases == (tiles_of(shapes(config.tiles), side) if published.canvases else ())
    assert len(made.canvases) == len(published.canvases)
    assert made.merge == published.merge
    assert (after.processor.template.name, after.processor.preprocess.aspect) == (system.template, system.aspect)
