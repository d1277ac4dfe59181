"""Other programs' pages: they get the numbers, and nothing of theirs can stop a run."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from llavakit.config import TrainConfig
from llavakit.errors import MissingExtraError
from llavakit.train.loop import train
from llavakit.train.progress import read_metrics


class Page(ModuleType):
    """A stand-in with wandb's words; breaks at a given step."""

    def __init__(self, name: str, breaks: int) -> None:
        super().__init__(name)
        self.told: list[tuple[int, dict[str, float]]] = []
        self.config: dict[str, Any] = {}
        self.breaks, self.finished = breaks, False

    def init(self, *, project: str, name: str, config: dict[str, Any]) -> None:
        self.config = config

    def log(self, numbers: dict[str, float], *, step: int) -> None:
        if step == self.breaks:
            raise ConnectionError("the page is gone")
        self.told.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_page_gets_every_step_and_the_held_out_loss(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    page = Page(kind, breaks=0)
    monkeypatch.setitem(sys.modules, kind, page)
    train(replace(finetune, track=kind, holdout=4, eval_every=2, steps=4))  # type: ignore[arg-type]
    losses = {step: numbers["loss"] for step, numbers in page.told if "loss" in numbers}
    assert losses == {line["step"]: line["loss"] for line in read_metrics(finetune.out)}
    assert [step for step, numbers in page.told if any(name.startswith("held out/") for name in numbers)] == [2, 4]
    assert page.config["steps"] == 4
    assert page.finished


def test_a_page_that_breaks_costs_itself_alone(
    finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page("wandb", breaks=2)
    monkeypatch.setitem(sys.modules, "wandb", page)
    assert train(replace(finetune, track="wandb", steps=4)).step == 4
    assert len(page.told) == 1
    assert capsys.readouterr().err.count("tracking ends here (ConnectionError") == 1
    assert len(read_metrics(finetune.out)) == 4


def test_a_page_that_is_not_installed_is_told_before_the_first_step(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'llavakit\[wandb\]'"):
        train(replace(finetune, track="wandb"))
    assert not read_metrics(finetune.out)
