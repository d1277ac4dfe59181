"""Every shipped recipe is the published one: batch and rate, the parts that learn in each system it makes, and a script that runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from llavakit import config as options
from llavakit.data.manifest import SHIPPED
from llavakit.miniature.decoder import DecoderConfig
from llavakit.miniature.tokenizer import TokenizerConfig
from llavakit.miniature.tower import TowerConfig
from llavakit.model.llava import Llava
from llavakit.model.released import SYSTEMS
from llavakit.model.sizes import empty
from llavakit.recipes import RECIPES, Recipe
from llavakit.tiling import HD, RELEASED, tiles_of
from llavakit.train import lora
from llavakit.train.stages import LORA, STAGES
from llavakit.train.start import shapes
from test_readme import parse as command_parses

ROOT = Path(__file__).parent.parent
PUBLISHED = {  # spec 4.2, and our own "few": global batch, rate, epochs
    "pretrain": (256, 1e-3, 1), "finetune": (128, 2e-5, 1), "lora": (128, 2e-4, 1), "qlora": (128, 2e-4, 1), "task": (128, 2e-5, 1),
    "task-lora": (128, 2e-4, 1), "few": (8, 2e-5, 5), "hd": (128, 2e-5, 1), "v1-pretrain": (128, 2e-3, 1), "v1-finetune": (32, 2e-5, 3),
    "v1-scienceqa": (32, 2e-5, 12), "next-pretrain": (256, 1e-3, 1), "next": (128, 1e-5, 1), "next-mistral": (128, 1e-5, 1),
    "next-34b": (128, 1e-5, 1),
}  # fmt: skip
PAIRS = [(recipe, system) for recipe in RECIPES.values() for system in recipe.makes]


def learned(recipe: Recipe, model: Llava) -> dict[str, float]:
    config = recipe.config
    if config.lora is not None:
        lora.attach(model, config.lora, lora.targets(model, config.lora))
        return LORA.with_rows(config.rates).apply(model)
    return STAGES[config.stage].with_rows(config.rates).apply(model)


def test_the_numbers_are_the_papers() -> None:
    found = {name: (r.config.batch_size * r.config.accumulation, r.config.lr, r.config.epochs) for name, r in RECIPES.items()}
    assert found == PUBLISHED
    assert all(r.config.weight_decay == 0 and r.config.warmup == 0.03 and r.config.betas == (0.9, 0.999) for r in RECIPES.values())
    assert all(r.data is None or r.data in SHIPPED for r in RECIPES.values())
    assert {system for r in RECIPES.values() for system in r.makes} == set(SYSTEMS)


@pytest.mark.parametrize(("recipe", "system"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_a_recipe_fits_the_systems_it_makes(recipe: Recipe, system: str) -> None:
    """On the meta device, in full size: what learns, at which rate; the template, projector and tiles are the system's."""
    made, config = SYSTEMS[system], recipe.config
    model = empty(made.config)
    rates = learned(recipe, model)
    parts = {part: {rate for name, rate in rates.items() if name.startswith(part)} for part in ("vision_tower", "multi_modal", "language")}
    tiled = bool(made.config.canvases)
    if config.stage == "pretrain":
        assert parts == {"vision_tower": set(), "multi_modal": {1.0}, "language": set()}
        return
    tower = {0.2} if tiled and "hd" not in recipe.name else set()
    projector = {0.1} if config.lora is not None else {1.0}
    assert parts == {"vision_tower": tower, "multi_modal": projector, "language": {1.0}}
    assert ("image_newline" in rates) == tiled
    if config.lora is not None:
        assert all("lora_" in name for name in rates if name.startswith("language"))
    else:
        whole = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("language"))
        assert sum(model.get_parameter(name).numel() for name in rates if name.startswith("language")) == whole
    assert (config.template, config.projector) == (made.template, made.config.projector)
    assert config.aspect == ("anyres" if tiled else made.aspect)
    if tiled:
        assert tiles_of(shapes(config.tiles), made.config.image_size) == made.config.canvases
        assert tiles_of({"hd": HD, "released": RELEASED}[config.tiles], made.config.image_size) == made.config.canvases
        assert (config.base, config.max_length) == (made.aspect, 4096)


def test_a_recipe_is_its_echo() -> None:
    """The saved config alone gives the run again, from any other recipe."""
    for recipe in RECIPES.values():
        echo = options.to_dict(recipe.config)
        assert options.from_dict(RECIPES["hd"].config, echo) == recipe.config


FROM_PARTS = ["DATA", "TOWER", "DECODER"]
RUNS = [  # a script, its words and its variables, and the recipes it runs
    ("v1.5.sh", FROM_PARTS, {}, ["pretrain", "finetune"]), ("v1.5-lora.sh", ["DATA", "START"], {}, ["lora"]),
    ("v1.5-lora.sh", ["DATA", "START"], {"RECIPE": "qlora"}, ["qlora"]), ("v1.5-hd.sh", FROM_PARTS, {}, ["pretrain", "hd"]),
    ("v1.sh", FROM_PARTS, {}, ["v1-pretrain", "v1-finetune"]), ("scienceqa.sh", ["DATA", "START"], {}, ["v1-scienceqa"]),
    ("next.sh", ["next-34b", *FROM_PARTS], {}, ["next-pretrain", "next-34b"]),
    ("next.sh", ["next-mistral", *FROM_PARTS], {"SHARD": "none"}, ["next-pretrain", "next-mistral"]),
    ("next.sh", ["next", *FROM_PARTS], {"START": "runs/v1.5/pretrain"}, ["next"]),
]  # fmt: skip
BUILT_IN = ("tiny.sh", "tiny-next.sh")
OF_CLAIMS = "ablations.sh"  # tests/evaluation/test_ablations.py
MINIATURE = {"tokenizer": TokenizerConfig(), "tower": TowerConfig(), "decoder": DecoderConfig()}


def called(script: str, words: list[str], program: str, folder: Path, **variables: str) -> list[list[str]]:
    """What a script gives to a program that only writes down its words, call by call."""
    stub = folder / program
    stub.write_text('#!/bin/sh\nprintf "%s\\037" "$@" >> "$CALLS"; echo >> "$CALLS"\n')
    stub.chmod(0o755)
    given = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "CALLS": str(folder / "calls")} | variables
    subprocess.run(["bash", ROOT / "runs" / script, *words], env=given, check=True, capture_output=True)
    return [line.strip("\x1f").split("\x1f") for line in (folder / "calls").read_text().splitlines()]


def test_no_script_is_left_out() -> None:
    assert {path.name for path in (ROOT / "runs").iterdir()} == {script for script, *_ in RUNS} | {*BUILT_IN, OF_CLAIMS}


@pytest.mark.parametrize(("script", "words", "variables", "names"), RUNS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_script_runs_its_recipes(script: str, words: list[str], variables: dict[str, str], names: list[str], tmp_path: Path) -> None:
    """Each call names a recipe, options that exist, shipped data, the published batch; a stage begins where the one before it ended."""
    calls = called(script, words, "torchrun", tmp_path, GPUS="3", **variables)
    assert [call[:5] for call in calls] == [["--nproc-per-node", "3", "-m", "llavakit", "train"]] * len(names)
    assert [call[5] for call in calls] == names
    configs = [options.parse(RECIPES[call[5]].config, call[6:]) for call in calls]
    for name, config in zip(names, configs, strict=True):
        assert str(config.data) in SHIPPED or script == "scienceqa.sh"
        assert config.batch_size * config.accumulation == PUBLISHED[name][0]
    assert [config.start for config in configs[1:]] == [config.out for config in configs[:-1]]
    assert configs[0].start == (None if "TOWER" in words and "START" not in variables else Path(variables.get("START", "START")))


def test_the_scripts_of_the_built_in_models_fit_together(tmp_path: Path) -> None:
    """Every call parses, and takes its parts from what an earlier call, of the first script for the second, has made."""
    made: set[Path] = set()
    for script in BUILT_IN:
        (tmp_path / "calls").unlink(missing_ok=True)
        for call in called(script, [str(tmp_path / "out")], "llava", tmp_path):
            command_parses(["llava", *call])
            if call[0] == "scenes":
                made |= {tmp_path / "out" / Path(call[2]).name} if call[1] == "export" else set()
                continue
            base = RECIPES[call[1]].config if call[0] == "train" else MINIATURE[call[1]]
            config = options.parse(base, call[2:])  # type: ignore[type-var]
            for name in ("start", "tower", "decoder", "tokenizer", "data", "images"):
                part = getattr(config, name, None)
                assert part is None or part in made or part.parent in made, (script, call)
            made.add(config.out)
        assert call[:2] == ["scenes", "score"]
        assert Path(call[3]) in made


def test_nothing_was_allocated() -> None:
    assert empty(SYSTEMS["llava-v1.6-34b"].config).device == torch.device("meta")
