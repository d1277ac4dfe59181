"""The base models of the miniature: the tokenizer loses nothing, the truth table is exact, and both trainers learn."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.miniature import decoder, tokenizer, tower
from llavakit.miniature.close_ups import close_ups
from llavakit.miniature.pictures import gallery
from llavakit.scenes.close_up import close_up
from llavakit.scenes.statements import near_misses, statements
from llavakit.scenes.world import Sign, make_scene


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer.run([f"out={tmp_path_factory.mktemp('tokenizer')}", "scenes=300", "vocab=768"])


@pytest.fixture(scope="module")
def learned(words: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(words)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
def test_any_text_comes_back(learned: Any, text: str) -> None:
    if any(name in text for name in ("<s>", "</s>", "<unk>", "<image>", "<pad>")):
        return
    assert learned.decode(learned(text, add_special_tokens=False).input_ids) == text


def test_the_tokenizer_is_shaped_like_llama(learned: Any) -> None:
    assert len(learned) == 768
    assert learned.convert_ids_to_tokens([0, 1, 2, 766, 767]) == ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    assert learned("a red star").input_ids[0] == learned.bos_token_id
    assert learned.convert_ids_to_tokens(learned("47", add_special_tokens=False).input_ids) == ["▁", "4", "7"]


def test_pictures_are_prepared_as_photographs_are() -> None:
    """Pixels in memory are those that the processor would give, to the last of 256 steps."""
    from llavakit.images import Preprocess
    from llavakit.scenes.draw import draw

    held = gallery("train", 6, size=112, workers=1)
    for row, scene in enumerate(held.scenes):
        want = Preprocess(size=112, aspect="pad").views(draw(scene))
        assert np.abs(held.views([row]) - want).max() < 1e-5


def test_the_truth_table_is_exact(learned: Any) -> None:
    draw = tower.Statements(learned, tower.TowerConfig(true_statements=3, false_statements=3))
    scenes = [make_scene(seed) for seed in range(12)]
    said, truth, own = draw.statements(scenes, random.Random(0))
    for row, scene in enumerate(scenes):
        assert [words in statements(scene) for words in said] == truth[row].bool().tolist()
        assert own[row].sum() >= 3
        assert (own[row] * truth[row]).sum() >= 1
        assert (own[row] * (1 - truth[row])).sum() >= 1


@pytest.mark.parametrize("close", ["0", "0.5"])
def test_the_tower_learns_and_transformers_loads_it(words: Path, tmp_path: Path, close: str) -> None:
    from transformers import CLIPVisionModel

    small = ["size=56", "width=32", "heads=2", "layers=2", "text_width=32", "dimension=32", "scenes=64", "steps=200", "batch=16"]
    folder = tower.run([f"out={tmp_path}", f"tokenizer={words}", "warmup=20", f"close_ups={close}", *small])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    model = CLIPVisionModel.from_pretrained(folder)
    assert model(pixel_values=torch.zeros(1, 3, 56, 56)).last_hidden_state.shape == (1, 17, 32)


def test_the_decoder_learns_text_and_transformers_loads_it(words: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    small = ["width=32", "heads=2", "layers=2", "feed_forward=64", "steps=100", "batch=4", "turns=3", "warmup=10", "rate=5e-3"]
    folder = decoder.run([f"out={tmp_path}", f"tokenizer={words}", *small])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(input_ids=torch.tensor([[1, 5]])).logits.shape == (1, 2, 768)


def test_the_told_scene_holds_every_answer() -> None:
    for seed in range(200):
        scene = make_scene(seed)
        text = decoder.told(scene, random.Random(seed))
        assert all(f"{t.size} {t.name}" in text for t in scene.things)
        assert all(s.text in text for s in scene.signs)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_a_close_up_shows_its_signs_where_it_says(seed: int) -> None:
    scene = make_scene(seed)
    shown, picture = close_up(scene, 112, signs=6)
    assert picture.size == (112, 112)
    assert (shown.things, shown.seed) == ((), seed)
    assert close_up(scene, 112, signs=6) == (shown, picture)
    for sign in shown.signs:
        half_w, half_h = (2 * half for half in sign_in_a_whole_picture(sign).half_extent())
        assert half_w <= sign.x <= 1 - half_w
        assert half_h <= sign.y <= 1 - half_h
        left, right = round(112 * (sign.x - 0.8 * half_w)), round(112 * (sign.x + 0.8 * half_w))
        row = picture.crop((left, round(112 * sign.y) - 2, right, round(112 * sign.y) + 2)).convert("L").getextrema()
        assert row[1] - row[0] > 80, "ink on a plate"


def sign_in_a_whole_picture(sign: Sign) -> Sign:
    return replace(sign, type="small")


def test_close_ups_are_told_by_their_signs_alone() -> None:
    windows = close_ups("train", 30, size=112, start=500, workers=1)
    assert windows.pixels.shape == (30, 3, 112, 112)
    rng = random.Random(0)
    for scene in windows.scenes:
        truth = statements(scene)
        assert bool(truth) == bool(scene.signs)
        if truth:
            assert all("print" not in words for words in truth), "print in a window can be read"
            assert not set(near_misses(scene, rng, 8, truth)) & truth
