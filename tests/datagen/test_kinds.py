"""Prompts are files: ours are complete, a user's replace them by name, and a wrong one is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavakit.datagen.kinds import KINDS, OWN, Prompts
from llavakit.errors import ConfigError


def test_ours_are_complete() -> None:
    ours = Prompts.load()
    assert [len(ours.of(kind).examples) for kind in KINDS] == [2, 3, 3]
    assert (len(set(ours.brief)), len(set(ours.detailed))) == (11, 16)
    for text, _ in ours.of("conversation").examples:
        assert "[0." not in text, "a conversation is written from captions alone"
    for kind in ("detail", "reasoning"):
        assert all("\n\n" in text and "[0." in text for text, _ in ours.of(kind).examples)
    assert len({ours.digest(kind) for kind in KINDS}) == 3


def test_a_folder_replaces_by_name(tmp_path: Path) -> None:
    (tmp_path / "detail.txt").write_text("[system]\nSay it.\n")
    (tmp_path / "detailed.txt").write_text("Tell all.\n\n")
    ours, theirs = Prompts.load(), Prompts.load(tmp_path)
    assert (theirs.of("detail").system, theirs.of("detail").examples, theirs.detailed) == ("Say it.", (), ("Tell all.",))
    assert theirs.of("reasoning") == ours.of("reasoning")
    assert theirs.digest("detail") != ours.digest("detail")
    assert theirs.digest("reasoning") == ours.digest("reasoning")


def test_every_word_of_a_prompt_is_in_its_digest(tmp_path: Path) -> None:
    text = (OWN / "reasoning.txt").read_text()
    for old, new in (("thoughtful", "clever"), ("long ladder on his", "short ladder on his"), ("hazard lights", "warning lights")):
        (tmp_path / "reasoning.txt").write_text(text.replace(old, new))
        assert Prompts.load(tmp_path).digest("reasoning") != Prompts.load().digest("reasoning")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("detial.txt", "[system]\nx", "detial.txt"),
        ("detail.txt", "x", ":1: text before"),
        ("detail.txt", "", r"no \[system\]"),
        ("detail.txt", "[system]\n\n", ":1.*no text"),
        ("detail.txt", "[system]\nx\n[user]\ny", "without a reply"),
        ("detail.txt", "[system]\nx\n[assistant]\ny", r":3.*\[user\] is due"),
        ("detail.txt", "[system]\nx\n[user]\n<image>\n[assistant]\ny", ":3.*<image>"),
        ("reasoning.txt", "[system]\nx\n[user]\ny\n[assistant]\nz", ":5.*rejected"),
        ("conversation.txt", "[system]\nx\n[user]\ny\n[assistant]\nQuestion:\nz", ":5.*rejected"),
        ("brief.txt", "\n", "no line"),
        ("brief.txt", "See <image>", "<image>"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        Prompts.load(tmp_path)


def test_an_empty_or_absent_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="folder"):
            Prompts.load(folder)
