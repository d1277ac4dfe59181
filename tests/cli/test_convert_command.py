"""``llava convert`` on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llava = Callable[..., Any]


def test_there_and_back(llava: Llava, tiny_model_dir: Path) -> None:
    done = llava("convert", tiny_model_dir, "original")
    assert (done.code, done.err) == (0, "")
    assert "hf -> original" in done.out
    done = llava("convert", "original", "hf", "--dtype", "bfloat16")
    assert (done.code, done.err) == (0, "")
    assert "original -> hf, logits differ by 0.0e+00" in done.out
    assert llava("ask", "--model", "hf", "--max-tokens", 2, "photo.png", "What is this?").code == 0


def test_for_llama_cpp(llava: Llava, tiny_model_dir: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package is an extra")
    done = llava("convert", tiny_model_dir, "out", "--to", "gguf", "--dtype", "float16")
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in Path("out").iterdir()) == ["mmproj-model-f16.gguf", "model-f16.gguf"]
    assert all(f"{path}: {path.stat().st_size:,} bytes" in done.out for path in Path("out").iterdir())


def test_wrong_words(llava: Llava, tiny_model_dir: Path) -> None:
    llava("convert", tiny_model_dir, "new", "--to", "onnx").failed(2, "--to", "projector")
    llava("convert", tiny_model_dir, "new", "--dtype", "int4").failed(2, "--dtype", "float16")
    llava("convert", "nowhere", "new").failed(1, "no such folder")
    llava("convert", tiny_model_dir, "new", "--to", "delta").failed(1, "--base")
    assert not Path("new").exists()
