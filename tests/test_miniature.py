"""The base models of the miniature: the tokenizer loses nothing, the truth table is exact, and both trainers learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.miniature import decoder, tokenizer, tower
from llavakit.miniature.pictures import gallery
from llavakit.scenes.statements import statements
from llavakit.scenes.world import make_scene


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


def test_the_tower_learns_and_transformers_loads_it(words: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    small = ["size=56", "width=32", "heads=2", "layers=2", "text_width=32", "dimension=32", "scenes=64", "steps=200", "batch=16"]
    folder = tower.run([f"out={tmp_path}", f"tokenizer={words}", "warmup=20", *small])
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
