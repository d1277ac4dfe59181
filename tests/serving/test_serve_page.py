"""docs/serve.md and docs/compose.yaml are true: lines, numbers and options are those that the code gives."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from test_launch import FACTS, OPTIONS

from llavakit.model.cards import card
from llavakit.serve.launch import launch, router

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "serve.md").read_text("utf-8")
TEXT = (DOCS / "compose.yaml").read_text("utf-8")
SERVICES = yaml.safe_load(TEXT)["services"]


def test_the_lines_are_those_of_the_command() -> None:
    key = "LLAVA_API_KEY"
    assert launch("vllm", FACTS["llava-v1.5-7b"], card("A100-80"), key=key).line() in PAGE
    assert launch("vllm", FACTS["llava-v1.6-34b"], card("A100-40"), devices=4, key=key).line() in PAGE
    assert launch("sglang", FACTS["llava-v1.6-mistral-7b"], card("L4"), devices=2, context=8192, key=key).line() in PAGE
    for engine in ("vllm", "sglang"):
        assert router(engine, ["http://10.0.0.1:8000", "http://10.0.0.2:8000"]) in PAGE  # type: ignore[arg-type]


def test_the_worked_example_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from llavakit.cli import main

    assert main(["capacity", "llava-v1.5-7b", "--gpu", "A100-80", "--load", "5"]) == 0
    assert capsys.readouterr().out in PAGE


@pytest.mark.parametrize("name", list(SERVICES))
def test_a_container_is_watched_guarded_and_local(name: str) -> None:
    service = SERVICES[name]
    assert "/health" in str(service["healthcheck"]["test"]) or "health" in str(service["healthcheck"]["test"])
    assert service["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    for value in service.get("environment", {}).values():
        assert "KEY" not in value or value.startswith("${LLAVA_API_KEY:?")


def test_its_engines_are_told_what_the_command_tells_them() -> None:
    for engine, known in OPTIONS.items():
        words = {word for word in shlex.split(SERVICES[engine]["command"]) if word.startswith("--")}
        assert words <= known
        made = launch(engine, FACTS["llava-v1.5-7b"], card("A100-80"))  # type: ignore[arg-type]
        assert words >= {word for word in made.words if word.startswith("--")} - {"--model-path"}
    assert "ready" in str(SERVICES["llava"]["healthcheck"])
