"""A small training run: fourteen coloured pictures and dialogues, the tiny checkpoint, a few steps in fp32 on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image as Pillow

from llavakit.config import FINETUNE, TrainConfig


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples: pictures of one colour with its name, and two without a picture."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number, name in enumerate(["red", "green", "blue", "white", "black"] * 2):
        Pillow.new("RGB", (30 + number, 24), name).save(folder / f"{number}.png")
        conversation = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": f"It is {name}."}]
        records.append({"id": f"c{number}", "image": f"{number}.png", "conversations": conversation})
    for number in range(2):
        conversation = [{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": f"{number} it is."}]
        records.append({"id": f"t{number}", "conversations": conversation})
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="session")
def captions(data: Path) -> Path:
    """The samples with a picture: what the plain template takes."""
    path = data.with_name("captions.json")
    path.write_text(json.dumps([record for record in json.loads(data.read_text()) if "image" in record]))
    return path


@pytest.fixture
def pretrain(finetune: TrainConfig, captions: Path) -> TrainConfig:
    return replace(finetune, stage="pretrain", template="plain", data=captions)


@pytest.fixture
def finetune(data: Path, tiny_model_dir: Path, tmp_path: Path) -> TrainConfig:
    return replace(
        FINETUNE, start=tiny_model_dir, data=data, out=tmp_path / "run", batch_size=2, accumulation=2, steps=3, lr=1e-3, dtype="fp32",
        device="cpu", max_length=512, preflight=False,
    )  # fmt: skip
