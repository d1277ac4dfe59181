"""Run the command line in this process, in a folder of its own with a small picture in it."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from llavakit.cli import main

PHOTO = "photo.png"


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def failed(self, code: int, *words: str) -> None:
        """One line on stderr that says what and how to fix it, nothing on stdout, no trace."""
        assert self.code == code, self
        assert self.out == ""
        assert re.fullmatch(r"error: [^\n]+\n", self.err), self.err
        for word in words:
            assert word in self.err


Llava = Callable[..., Done]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test stands in its own folder with a small picture in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    Image.new("RGB", (40, 30), "red").save(PHOTO)
    return tmp_path


@pytest.fixture
def llava(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Llava:
    def run(*words: object, stdin: bytes = b"") -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def asked(llava: Llava, tiny_model_dir: Path) -> Llava:
    """``llava ask`` on a tiny model with random weights: what it says is noise, that it says it is the point."""

    def run(*words: object, stdin: bytes = b"") -> Done:
        return llava("ask", "--model", tiny_model_dir, "--max-tokens", 4, *words, stdin=stdin)

    return run
