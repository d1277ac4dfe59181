"""``llava info`` and ``llava verify`` on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llavakit.checkpoint import store
from originals import make, write, write_tower

Llava = Callable[..., Any]
NAMES = ["pixels", "token ids", "features", "logits", "greedy reply"]


def test_the_command_tells_the_stages(llava: Llava, tiny_model_dir: Path) -> None:
    done = llava("verify", tiny_model_dir)
    assert (done.code, done.out.count("same")) == (0, 5)
    told = json.loads(llava("verify", tiny_model_dir, "--json").out)
    assert (told["same"], [stage["stage"] for stage in told["stages"]]) == (True, NAMES)


def test_the_command_fails_when_something_differs(llava: Llava, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavakit.preprocess import Preprocess

    levels = Preprocess._levels
    monkeypatch.setattr(Preprocess, "_levels", lambda self: levels(self) + 0.1)
    done = llava("verify", tiny_model_dir)
    assert done.code == 1
    assert "the first difference is in: pixels" in done.out


def test_info_says_what_the_files_say(llava: Llava, tiny_model_dir: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, "copy"))
    weights = folder / "model.safetensors"
    count = sum(value.numel() for value in load_file(weights).values())
    save_file({}, weights)  # no weight is read
    told = json.loads(llava("info", folder, "--size", "90x61", "--card", "8", "--json").out)
    assert told["parameters"]["total"] == count
    assert told["picture"]["tokens"] == 16
    assert told["batch"]["conversations"]["bf16"] > 1000
    plain = llava("info", folder, "--tree")
    assert plain.code == 0
    assert f"{count:,}" in plain.out
    assert "multi_modal_projector" in plain.out


def test_info_knows_the_published_systems(llava: Llava) -> None:
    done = llava("info", "llava-v1.6-34b", "--size", "1000x667", "--card", "80")
    assert done.code == 0
    assert "= 2144 tokens" in done.out
    assert "34,752,083,968" in done.out
    llava("info", "tiny", "--size", "10").failed(2, "--size", "1000x667")


def test_an_original_checkpoint_is_told_where_its_tower_is(llava: Llava, tmp_path: Path) -> None:
    made = make()
    folder, tower = write(tmp_path / "fine-tuned", made.fields, made.weights(tower=False)), write_tower(tmp_path / "clip", made)
    for command in ("info", "verify"):
        llava(command, folder).failed(1, "--tower")
    done = llava("verify", folder, "--tower", tower)
    assert (done.code, done.out.count("same")) == (0, 5)
    model, _ = store.load(folder, tower=tower)
    assert f"{sum(value.numel() for value in model.parameters()):,}" in llava("info", folder, "--tower", tower).out
