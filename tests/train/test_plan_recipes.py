"""Every recipe can be planned, in the trainer's own words; the published wall times come out (spec 4.4); counts have one owner."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.cli import main
from llavakit.cli.plan import plan as command
from llavakit.config import Lora, parse
from llavakit.data.manifest import shipped
from llavakit.errors import ConfigError
from llavakit.model.cards import CARDS, card
from llavakit.model.released import SYSTEMS
from llavakit.recipes import RECIPES, Recipe
from llavakit.train.described import planned
from llavakit.train.plan import UTILISATION, Run, hours, memory, plan, remedies
from llavakit.train.published import INSTRUCT, MIX, TIMES, as_published, instruct, longest, mean, mix, padding, samples

V15 = [key for key, time in TIMES.items() if key[1].startswith("llava-v1.5") and time.hours]
V1 = [("v1-pretrain", "llava-v1-7b"), ("v1-pretrain", "llava-v1-13b")]


@cache
def run_as_published(recipe: str, system: str) -> Run:
    config, shape = as_published(recipe), SYSTEMS[system].config
    return planned(config, shape, samples(RECIPES[recipe], config, shape))


def hours_of(key: tuple[str, str]) -> float:
    time = TIMES[key]
    return plan(run_as_published(*key), card(time.card), devices=time.devices).hours


@pytest.mark.parametrize("key", [*V15, *V1], ids=" ".join)
def test_published_wall_times_are_met_within_a_quarter(key: tuple[str, str]) -> None:
    assert hours_of(key) == pytest.approx(TIMES[key].hours, rel=0.25)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_both_stages_of_llava_1_5_together_are_met_within_a_tenth(size: str) -> None:
    keys = [(recipe, f"llava-v1.5-{size}") for recipe in ("pretrain", "finetune")]
    assert sum(map(hours_of, keys)) == pytest.approx(sum(TIMES[key].hours or 0 for key in keys), rel=0.1)


def test_one_utilisation_stands_amid_the_published_runs() -> None:
    reached = [hours(run_as_published(*key), rate=8 * CARDS["A100-80"].peak) / (TIMES[key].hours or 1) for key in V15]
    assert len(reached) == 4
    assert 0.39 < min(reached) < UTILISATION < max(reached) < 0.5


@pytest.mark.parametrize(
    "key", [key for key in TIMES if key[1].startswith(("llava-v1-", "llava-v1.5")) and RECIPES[key[0]].data], ids=" ".join
)
def test_what_was_said_to_fit_fits(key: tuple[str, str]) -> None:
    time = TIMES[key]
    assert plan(run_as_published(*key), card(time.card), devices=time.devices).fits


# ---- lengths


def test_the_mixture_has_the_published_counts() -> None:
    """Counts have one owner, the manifests; words are said of every part and of nothing else."""
    assert sum(row.samples for row in mix()) == pytest.approx(665_298)
    assert sum(row.samples for row in instruct()) == pytest.approx(157_712)
    assert [row.name for row in mix() if not row.pictured] == ["sharegpt"]
    (file,) = shipped("llava-1.5-665k").sources
    assert {part.name for part in file.parts} == {*MIX, "llava-instruct"}
    assert {part.name for part in shipped("llava-instruct-158k").sources[0].parts} == set(INSTRUCT)


@settings(deadline=None)
@given(count=st.integers(1, 64))
def test_the_longest_of_more_is_longer(count: int) -> None:
    assert longest(mix(), 1) == pytest.approx(mean(mix(), "text"))
    assert longest(mix(), count) <= longest(mix(), count + 1) <= max(row.words.text for row in mix())
    assert padding(mix(), 576, count) >= 1 - 1e-12
    assert padding(mix(), 576, count) >= padding(mix(), 2880, count) - 1e-12


# ---- recipes


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_recipe_can_be_planned_for_all_it_makes(recipe: Recipe) -> None:
    """What is planned is what the trainer would do: the parts that learn, the batch, the epochs, and the numbers that learn, counted."""
    for system in recipe.makes:
        shape = SYSTEMS[system].config
        data = replace(samples(recipe, recipe.config, shape), samples=1000)
        run = planned(recipe.config, shape, data)
        tower, lora = "tower" in run.learns, recipe.config.lora
        assert (run.batch, run.epochs) == (recipe.config.batch_size * recipe.config.accumulation, recipe.config.epochs)
        assert tower == bool(recipe.config.rates)
        assert ("language_model" in run.learns) == (recipe.config.stage == "finetune" and lora is None)
        assert run.learned == pytest.approx(replace(run, numbers=None, matrices=None).learned, abs=run.sizes.width)  # the row-end vector
        assert run.rank == (lora.r if lora is not None else 0)
        assert run.weights == ("4bit" if lora is not None and lora.bits == 4 else "bf16")
        assert run.views == pytest.approx(run.image_tokens / run.config.view_tokens, rel=0.3)
    assert {key[0] for key in TIMES} <= set(RECIPES)


def test_steps_end_a_run_and_samples_must_be_known() -> None:
    recipe, shape = RECIPES["task"], SYSTEMS["llava-v1.5-7b"].config
    unknown = samples(recipe, recipe.config, shape)
    with pytest.raises(ConfigError, match="samples=N"):
        planned(recipe.config, shape, unknown)
    assert planned(replace(recipe.config, steps=7, epochs=3), shape, unknown).steps == 7
    assert samples(RECIPES["finetune"], replace(RECIPES["finetune"].config, share=0.01), shape).samples == 6653


def test_what_rows_of_rates_hold_back_is_not_counted() -> None:
    recipe, shape = RECIPES["finetune"], SYSTEMS["llava-v1.5-7b"].config
    data = samples(recipe, recipe.config, shape)
    whole = planned(recipe.config, shape, data)
    frozen = replace(recipe.config, rates=((r"language_model\.model\.layers\.(?!31).*", None),))
    last = planned(frozen, shape, data)
    layers = whole.sizes.packable * 31 // 32
    assert whole.learned - last.learned == pytest.approx(layers, rel=1e-3)
    held, all_held = memory(last, rows=1), memory(whole, rows=1)
    assert all_held.weights - held.weights == 2 * (whole.learned - last.learned)
    assert (held.gradients, held.moments) == (4 * last.learned, 8 * last.learned)
    few = replace(RECIPES["lora"].config, lora=Lora(r=8, targets=r"language_model\..*q_proj"))
    assert planned(few, shape, data).adapters == 32 * 8 * 2 * 4096


# ---- plans


def test_the_batch_is_reached_on_any_number_of_devices() -> None:
    for devices in (1, 2, 8, 64, 512):
        made = plan(run_as_published("lora", "llava-v1.5-7b"), card("A100-80"), devices=devices)
        assert made.fits
        assert made.rows * made.devices * made.accumulation >= made.run.batch
        assert made.rows * made.devices * (made.accumulation - 1) < made.run.batch


def test_what_does_not_fit_gets_a_remedy_that_does() -> None:
    made = plan(run_as_published("finetune", "llava-v1.5-7b"), card("RTX4090"), devices=1)
    assert not made.fits
    found = list(remedies(made, card("RTX4090")))
    assert found
    assert all(other.fits for _, other in found)
    assert any("lora.r=128" in words for words, _ in found)


def test_rows_and_cost() -> None:
    small, large = (plan(run_as_published("pretrain", "llava-v1.5-13b"), card(name), devices=4) for name in ("A100-40", "A100-80"))
    assert small.rows < large.rows
    assert small.hours == large.hours
    assert large.cost(2.0) == pytest.approx(8 * large.hours)


def test_unknown_names_are_told_the_known_ones() -> None:
    for ask in (lambda: card("nothing"), lambda: command("nothing")):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert "use one of" in caught.value.remedy


# ---- the command


def test_the_command_speaks_the_trainers_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Options of llava train and of the samples; remedies and the batch are given as such options, which the trainer takes."""
    assert main(["plan", "finetune", "--model", "llava-v1.5-13b", "--price", "2", "samples=1000", "gradient_checkpointing=true"]) == 0
    said = capsys.readouterr().out
    assert "finetune of llava-v1.5-13b on 8 x A100-80" in said
    assert "published         20 h on 8 x A100-80" in said
    options_line = next(line for line in said.splitlines() if "as options:" in line)
    given = parse(RECIPES["finetune"].config, options_line.partition(":")[2].split())
    assert (given.batch_size * given.accumulation, given.shard) == (128, "full")
    assert main(["plan", "task", "samples=500", "--gpu", "RTX4090", "--devices", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["fits"], record["run"]["samples"], record["model"]) == (False, 500, "llava-v1.5-7b")
    assert record["remedies"]
    for words in record["remedies"]:
        parse(RECIPES["task"].config, [word for word in words.split() if "=" in word])
    assert main(["plan", "finetune", "--model", "tiny", "samples=100", "--devices", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["numbers"] < 10**8
    assert main(["plan"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", listed, re.MULTILINE) for name in RECIPES)


def test_an_option_that_is_none_is_told_the_nearest() -> None:
    assert main(["plan", "finetune", "gradient_checkpoint=true"]) == 2
