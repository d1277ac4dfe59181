"""Laws of ``config``: three spellings of one value, and errors that name the way out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit import config as options
from llavakit.config import FINETUNE, FIXED, PRETRAIN, TrainConfig
from llavakit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0
    "How fast."
    names: tuple[str, ...] = ()
    "Which."


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    folder: Path | None = None
    pair: tuple[float, float] = (0.5, 0.5)
    on: bool = False
    title: str = "none yet"


finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
outers = st.builds(
    Outer,
    inner=st.builds(Inner, rate=finite, names=st.lists(words).map(tuple)),
    mode=st.sampled_from(["fast", "slow"]),
    limit=st.none() | st.integers(),
    folder=st.none() | words.filter(str.strip).map(Path),
    pair=st.tuples(finite, finite),
    on=st.booleans(),
    title=words,
)


@settings(deadline=None)
@given(value=outers)
def test_yaml_gives_every_value_back(value: Outer, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    options.save(value, path)
    assert options.load(Outer(), path) == value


@settings(deadline=None)
@given(
    rate=finite, limit=st.none() | st.integers(), pair=st.tuples(finite, finite), on=st.booleans(), mode=st.sampled_from(["fast", "slow"])
)
def test_words_spell_the_same_values(rate: float, limit: int | None, pair: tuple[float, float], on: bool, mode: Any) -> None:
    spelled = {"inner.rate": rate, "limit": "none" if limit is None else limit, "pair": list(pair), "on": str(on).lower(), "mode": mode}
    assert options.parse(Outer(), [f"{name}={value}" for name, value in spelled.items()]) == Outer(
        inner=Inner(rate=rate), limit=limit, pair=pair, on=on, mode=mode
    )


def test_text_is_taken_as_it_stands() -> None:
    value = options.parse(Outer(), ["title=true: [1", "folder=12", "inner.names=[a, b]"])
    assert (value.title, value.folder, value.inner.names) == ("true: [1", Path("12"), ("a", "b"))


@pytest.mark.parametrize(
    ("word", "code", "hint"),
    [
        ("mdoe=fast", "unknown_option", "did you mean 'mode'"),
        ("inner.rat=1", "unknown_option", "did you mean 'rate'"),
        ("mode.x=1", "unknown_option", "mode=value"),
        ("mode=quick", "bad_value", "fast|slow"),
        ("limit=1.5", "bad_value", "whole number or none"),
        ("on=1", "bad_value", "true|false"),
        ("inner.rate=nan", "bad_value", "a number"),
        ("inner.rate=true", "bad_value", "a number"),
        ("pair=[1]", "bad_value", "[a number, a number]"),
        ("pair=[1", "bad_value", "[a number, a number]"),
        ("mode", "bad_word", "'='"),
    ],
)
def test_a_wrong_word_names_the_way_out(word: str, code: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(Outer(), [word])
    assert caught.value.code == code
    assert hint in str(caught.value)


def test_small_numbers_need_no_decimal_point() -> None:
    assert options.parse(Outer(), ["inner.rate=1e-3"]).inner.rate == 1e-3


@pytest.mark.parametrize(
    ("content", "where"), [("- a\n", ""), ("mode: [", ""), ("modes: fast\n", "modes"), ("inner: {rate: x}\n", "inner: rate")]
)
def test_a_wrong_file_is_named(content: str, where: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        options.load(Outer(), path)
    assert str(path) in str(caught.value)
    assert where in str(caught.value)


def test_words_win_over_the_file_and_the_file_over_the_base(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mode: slow\nlimit: 3\n")
    assert options.parse(Outer(on=True), ["limit=4"], file=path) == Outer(on=True, mode="slow", limit=4)


def test_differences_name_what_changed() -> None:
    before, after = options.to_dict(PRETRAIN), options.to_dict(replace(PRETRAIN, lr=5e-4, data=Path("a.json")))
    assert [(d.name, d.before, d.after) for d in options.differences(before, after)] == [("data", None, "a.json"), ("lr", 1e-3, 5e-4)]


def test_every_training_option_has_its_help_below_it() -> None:
    described = options.describe(FINETUNE)
    assert [option.name for option in described if "." not in option.name] == [f.name for f in fields(TrainConfig)]
    assert all(option.help.endswith(".") or option.name == "start" for option in described), [o.name for o in described if not o.help]
    assert next(option for option in described if option.name == "steps").kind == "a whole number or none"


def test_the_recipes_are_the_papers() -> None:
    """Spec 4.2: global batch 256 at 1e-3 on square crops, then 128 at 2e-5 on padded pictures; warm-up 0.03, no decay."""
    assert (PRETRAIN.batch_size * PRETRAIN.accumulation, PRETRAIN.lr, PRETRAIN.template, PRETRAIN.aspect) == (256, 1e-3, "plain", "square")
    assert (FINETUNE.batch_size * FINETUNE.accumulation, FINETUNE.lr) == (128, 2e-5)
    assert (FINETUNE.template, FINETUNE.aspect) == ("vicuna_v1", "pad")
    for recipe in (PRETRAIN, FINETUNE):
        assert (recipe.epochs, recipe.warmup, recipe.weight_decay, recipe.betas, recipe.max_length) == (1, 0.03, 0.0, (0.9, 0.999), 2048)


def test_what_may_not_change_is_spelled_as_the_fields_are() -> None:
    assert {f.name for f in fields(TrainConfig)} >= FIXED


@pytest.mark.parametrize("word", ["batch_size=0", "warmup=1.5", "steps=0", "lr=-1", "betas=[0.9, 1.5]", "keep=-1"])
def test_numbers_out_of_range_are_refused(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options.parse(FINETUNE, [word])
    assert caught.value.code == "bad_value"
    assert word.split("=")[0] in caught.value.where


def test_own_rates_are_read() -> None:
    value = options.parse(FINETUNE, ['rates=[["vision_tower\\\\..*", 0.1], [".*bias", null]]'])
    assert value.rates == (("vision_tower\\..*", 0.1), (".*bias", None))
    assert yaml.safe_load(yaml.safe_dump(options.to_dict(value)))["rates"] == [["vision_tower\\..*", 0.1], [".*bias", None]]


def test_options_are_known_without_torch() -> None:
    """``llava train --help`` is instant: nothing heavy is imported to describe a run."""
    code = "import sys, llavakit.config as c; c.describe(c.PRETRAIN); sys.exit(bool({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
