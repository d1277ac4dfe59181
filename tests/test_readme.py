"""README is true: its commands parse, its map of files is the tree's, its Python runs, its make targets exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from llavakit.assistant import Assistant
from llavakit.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(program: str, text: str = README) -> list[list[str]]:
    """The words of every call of a program in the bash blocks; of a pipe, its last part."""
    lines = [line.split("#")[0].rsplit("|", 1)[-1].strip() for block in blocks("bash", text) for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.split(" ")[0] == program]


def parse(words: list[str]) -> None:
    """Parse as the command line would, without running anything. Raises what a user would be told."""
    group, names = get_command(app), words[1:]
    context = group.make_context("llava", list(names), resilient_parsing=False)
    while hasattr(group, "commands"):
        name, group, names = group.resolve_command(context, list(names))
        context = group.make_context(name, list(names), parent=context)


LLAVA = [words for page in PAGES.values() for words in commands("llava", page)]


def test_there_are_commands() -> None:
    assert {words[1] for words in LLAVA} >= {"ask", "chat", "train", "show", "scenes"}


@pytest.mark.parametrize("words", LLAVA, ids=" ".join)
def test_llava_commands_parse(words: list[str]) -> None:
    parse(words)


def test_a_wrong_command_would_be_noticed() -> None:
    for wrong in (["llava", "ask", "--no-such-option", "x"], ["llava", "fly"], ["llava", "train", "stage3"]):
        with pytest.raises(Exception, match="No such"):
            parse(wrong)


@pytest.mark.parametrize("words", [words for words in LLAVA if words[1] == "train" and words[2] != "report"], ids=" ".join)
def test_training_options_exist(words: list[str]) -> None:
    from llavakit.config import parse
    from llavakit.recipes import RECIPES

    parse(RECIPES[words[2]].config, [word for word in words[3:] if "=" in word])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    asked = {words[1] for text in PAGES.values() for words in commands("make", text)}
    assert asked
    assert asked <= targets
    row = re.search(r"\| `Makefile` \| (.*?) \|", README)
    assert row
    assert set(re.findall(r"`(\w+)`", row[1])) <= targets


def mapped() -> list[str]:
    table = README.split("## Where things are")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def test_the_map_has_every_place_and_no_other() -> None:
    paths = mapped()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    package = ROOT / "src" / "llavakit"
    hidden = {"__pycache__", "__init__.py", "py.typed"}
    inside = {f"src/llavakit/{path.name}{'/' * path.is_dir()}" for path in package.iterdir() if path.name not in hidden}
    assert inside - set(paths) == set()


def test_links_lead_somewhere() -> None:
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from llavakit.cli.demo import picture_bytes, shipped_questions

    (tmp_path / "photo.jpg").write_bytes(picture_bytes(shipped_questions()[0].image))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    space: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert isinstance(space["assistant"], Assistant)
    assert capsys.readouterr().out.strip()


def test_no_machine_paths() -> None:
    for name, text in PAGES.items():
        assert not re.search(r"/(?:home|root|work|tmp)/", text), name
