"""The other commands: help, show, scenes, train, env, demo."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command

from llavakit.cli import terminal
from llavakit.cli.app import app
from llavakit.errors import CheckpointError

PHOTO, QUESTION = "photo.png", "What is this?"
Llava = Callable[..., Any]


def commands() -> list[tuple[str, ...]]:
    """Every command, in full."""

    def below(group: Any, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        inner = getattr(group, "commands", {})
        return [path, *(found for name, command in inner.items() for found in below(command, (*path, name)))]

    return below(get_command(app), ())


# --- help -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_explains_itself_with_examples(llava: Llava, path: tuple[str, ...]) -> None:
    long, short = llava(*path, "--help"), llava(*path, "-h")
    assert long == short
    assert (long.code, long.err) == (0, "")
    assert "Usage: llava" in long.out
    if path not in (("train",), ("data",), ("scenes",), ("miniature",)):  # these only lead on
        assert " ".join(("llava", *path)) in long.out.split("─╯")[-1], "no example"


def test_no_words_and_wrong_words(llava: Llava) -> None:
    for words in ([], ["train"], ["data"], ["scenes"], ["miniature"], ["ask"]):
        done = llava(*words)
        assert (done.code, done.err) == (2, "")
        assert "Usage" in done.out
    llava("fly").failed(2, "fly")
    llava("train", "stage3").failed(2, "stage3")


def test_the_version(llava: Llava) -> None:
    from llavakit import __version__

    assert llava("--version").out == f"llava {__version__}\n"


# --- show -----------------------------------------------------------------------------------------------------------------------------


def numbers(out: str) -> dict[str, int]:
    return {name.strip(): int(value) for name, value in re.findall(r"^ *([a-z ]+?)  +(\d+)$", out, re.MULTILINE)}


def test_show_marks_what_is_learned(llava: Llava, tiny_model_dir: Path) -> None:
    done = llava("show", "--model", tiny_model_dir, PHOTO, QUESTION, "--reply", "a red thing", "--views", "views.png")
    found = numbers(done.out)
    assert found["tokens"] == found["learned"] + found["ignored"] + found["image tokens"]
    (learned,) = re.findall(r"\[\[(.*?)\]\]", done.out, re.DOTALL)
    assert learned.replace("|", "").replace("▁", " ").strip().startswith("a red thing")
    assert "\x1b" not in done.out
    with Image.open("views.png") as saved:
        view = saved.convert("RGB")
    red, green, blue = view.getpixel((view.width // 2, view.height // 2))
    assert (red > 240, green < 15, blue < 15) == (True, True, True)  # the colours have come back from the tower's numbers


def test_show_as_json_counts_alike(llava: Llava, tiny_model_dir: Path) -> None:
    record = json.loads(llava("show", "--model", tiny_model_dir, "--json", PHOTO, PHOTO, QUESTION).out)
    assert record["images"] == record["views"] == 2
    assert record["learned"] == sum(label != -100 for label in record["labels"]) == 0
    assert record["tokens"] == len(record["ids"])


def test_show_reads_a_training_file(llava: Llava, tiny_model_dir: Path, folder: Path) -> None:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    (folder / "data.json").write_text(json.dumps([{"id": "1", "image": PHOTO, "conversations": turns}]))
    words = ("show", "--model", tiny_model_dir, "--data", "data.json", "--images", ".")
    typed = llava("show", "--model", tiny_model_dir, "--json", PHOTO, QUESTION, "--reply", "red")
    assert llava(*words, "--json") == typed
    plain = llava(*words, "--template", "plain")
    assert "[[" in plain.out
    llava(*words, "--index", "1").failed(2, "counted from 0")
    llava(*words, "--template", "nope").failed(2, "vicuna_v1")


def test_show_wants_one_thing(llava: Llava, tiny_model_dir: Path) -> None:
    llava("show").failed(2, "--data")
    llava("show", QUESTION, "--data", "x.json").failed(2)
    llava("show", "--model", tiny_model_dir, QUESTION, "--views", "v.png").failed(2, "--views")
    llava("show", "--model", tiny_model_dir, "--data", "nowhere.json").failed(1, "nowhere.json")


@pytest.mark.parametrize(("env", "colored"), [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)])
def test_colours_only_where_they_are_wanted(
    llava: Llava, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], colored: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    done = llava("show", "--model", tiny_model_dir, PHOTO, "Hello.", "--reply", "yes")
    assert done.code == 0
    assert ("\x1b[1;32m" in done.out) is colored
    assert ("▀" in done.out) is colored
    assert ("[[" in done.out) is not colored


# --- scenes and miniature -------------------------------------------------------------------------------------------------------------


def test_scenes_draw_tells_the_truth(llava: Llava) -> None:
    first = llava("scenes", "draw", "scene.png", "--seed", 5)
    record = json.loads(first.out)
    assert (record["seed"], first.err) == (5, "")
    assert record["captions"]
    assert {"type", "question", "answer"} == set(record["questions"][0])
    assert llava("scenes", "draw", "again.jpg", "--seed", 5, "--side", 64).out == first.out
    with Image.open("again.jpg") as small:
        assert max(small.size) == 64
    llava("scenes", "draw", "scene.xyz").failed(2, ".png")
    llava("scenes", "draw", "nowhere/scene.png").failed(1, "nowhere")


def test_scenes_export_writes_what_training_reads(llava: Llava, tiny_model_dir: Path, folder: Path) -> None:
    done = llava("scenes", "export", "scenes", "--count", 3, "--workers", 1)
    assert (done.out, done.err, done.code) == ("scenes\n", "", 0)
    for name in ("pretrain.json", "finetune.json"):
        shown = llava("show", "--model", tiny_model_dir, "--data", f"scenes/{name}", "--images", "scenes/images", "--index", 2, "--json")
        assert json.loads(shown.out)["learned"] > 0
    llava("scenes", "export", "scenes", "--split", "secret").failed(2, "split")


def test_scenes_score_counts_every_question(llava: Llava, tiny_model_dir: Path) -> None:
    done = llava("scenes", "score", "--model", tiny_model_dir, "--per-type", 1, "--json")
    record = json.loads(done.out)
    assert all(row["total"] == 1 and 0 <= row["right"] <= 1 for row in record["types"].values())
    assert len(record["types"]) > 5
    assert "| all but small |" in llava("scenes", "score", "--model", tiny_model_dir, "--per-type", 1).out


@pytest.mark.parametrize("name", ["tokenizer", "tower", "decoder"])
def test_miniature_lists_its_options(llava: Llava, name: str) -> None:
    done = llava("miniature", name, "--options")
    assert done.code == 0
    assert "out=" in done.out
    llava("miniature", name, "no_such_thing=1").failed(2, "no_such_thing")


# --- train ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_train_lists_its_options_as_they_stand(llava: Llava, stage: str) -> None:
    done = llava("train", stage, "lr=0.125", "--options")
    assert "lr=0.125" in done.out
    assert f"stage={stage}" in done.out


@pytest.mark.parametrize(
    ("words", "said"), [(["lrr=1"], "'lr'"), (["lr"], "key=value"), (["lr=fast"], "number"), (["--config", "nowhere.yaml"], "nowhere.yaml")]
)
def test_wrong_training_options(llava: Llava, words: list[str], said: str) -> None:
    llava("train", "pretrain", *words).failed(2, said)


def test_training_without_data_is_one_line(llava: Llava, tiny_model_dir: Path) -> None:
    done = llava("train", "finetune", f"start={tiny_model_dir}", "data=nowhere.json", "out=run")
    assert done.code in (1, 2)
    assert re.search(r"^error: [^\n]+\n\Z", done.err, re.MULTILINE)
    assert "Traceback" not in done.err


def test_a_stage_from_scenes_to_a_reply(llava: Llava, tiny_model_dir: Path) -> None:
    assert llava("scenes", "export", "scenes", "--count", 8, "--workers", 1).code == 0
    words = [f"start={tiny_model_dir}", "data=scenes/finetune.json", "images=scenes/images", "out=run", "batch_size=2", "accumulation=1"]
    done = llava("train", "finetune", *words, "steps=2", "max_length=8192", "dtype=fp32")
    assert done.code == 0, done.err
    checkpoint = Path(done.out.strip())
    assert checkpoint.is_dir()
    assert checkpoint.parent.name == "run"
    assert len((checkpoint.parent / "metrics.jsonl").read_text().splitlines()) == 2
    assert llava("ask", "--model", checkpoint, "--max-tokens", 3, PHOTO, QUESTION).code == 0


# --- env and demo ---------------------------------------------------------------------------------------------------------------------


def test_env_says_what_matters_and_nothing_private(llava: Llava, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    monkeypatch.setenv("TORCH_HOME", "/somewhere/secret-team/torch")
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_print_me")
    done = llava("env")
    assert (done.code, done.err) == (0, "")
    for word in ("llavakit", "torch", "transformers", "threads", "flags", "~/cache"):
        assert word in done.out
    for word in (str(folder), "hf_do_not_print_me", "secret-team"):
        assert word not in done.out
    assert json.loads(llava("env", "--json").out)["caches"]["TORCH_HOME"] == ".../torch"


def test_demo_shows_question_answer_and_truth(llava: Llava, tiny_model_dir: Path) -> None:
    done = llava("demo", "--model", tiny_model_dir, "--count", 2)
    assert (done.code, done.err) == (0, "")
    assert len(re.findall(r"^question  \S", done.out, re.MULTILINE)) == len(re.findall(r"^truth     \S", done.out, re.MULTILINE)) == 2
    assert re.search(r"^\d of 2 right, ", done.out, re.MULTILINE)
    assert "\x1b" not in done.out


def test_the_built_in_model_answers_the_demo(llava: Llava) -> None:
    done = llava("demo")
    right, asked = map(int, re.search(r"^(\d+) of (\d+) right", done.out, re.MULTILINE).groups())  # type: ignore[union-attr]
    assert asked >= 5
    assert right >= 0.8 * asked


def test_the_demo_s_page_names_its_extra(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    llava("demo", "--gradio").failed(1, "gradio", "pip install 'llavakit[gradio]'")


def test_a_picture_in_half_blocks_has_its_colours() -> None:
    rng = random.Random(0)
    for width, height in [(1, 1), (40, 3), (3, 40), *((rng.randint(1, 300), rng.randint(1, 300)) for _ in range(20))]:
        rows = str(terminal.picture(Image.new("RGB", (width, height), "blue"), columns=16)).splitlines()
        assert 1 <= len(rows) <= 8
        assert {len(row) for row in rows} <= set(range(1, 17))
    (top,) = {span.style for span in terminal.picture(Image.new("RGB", (8, 8), (1, 2, 250)), columns=8).spans}
    assert top.color.get_truecolor() == top.bgcolor.get_truecolor() == (1, 2, 250)


@pytest.mark.parametrize(
    "words", [("ask", "photo.png", "What?"), ("chat", "photo.png"), ("demo",), ("scenes", "score")], ids=lambda words: words[0]
)
def test_how_a_model_is_loaded_reaches_the_loader(llava: Llava, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    """No option is taken and dropped."""
    from llavakit.assistant import Assistant

    asked: dict[str, Any] = {}

    def load(path: str | None, **options: Any) -> Assistant:
        asked.update(options, path=path)
        raise CheckpointError("enough seen", code="seen")

    monkeypatch.setattr(Assistant, "load", load)
    given = ("--model", "owner/name", "--revision", "v1", "--quantize", "8bit", "--dtype", "bfloat16", "--device", "cpu")
    llava(*words, *given).failed(1, "enough seen")
    assert {name: asked[name] for name in ("path", "revision", "quantization", "device")} == {
        "path": "owner/name",
        "revision": "v1",
        "quantization": "8bit",
        "device": "cpu",
    }
    assert str(asked["dtype"]) == "torch.bfloat16"
