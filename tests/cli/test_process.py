"""What only a real process has: start-up time, signals, pipes, encodings; and the border itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llavakit.cli import border
from llavakit.errors import ConfigError, ImageError, SamplingError

LLAVA = [sys.executable, "-m", "llavakit"]


def run(*words: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run([*LLAVA, *map(str, words)], capture_output=True, timeout=300, env=kept | (env or {}), **options)


def test_help_is_instant() -> None:
    def seconds() -> float:
        before = os.times()
        assert run("--help").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) <= 0.4  # of processor time: the wall clock of a busy machine says nothing


def test_a_reader_that_goes_away_is_no_error(tiny_model_dir: Path) -> None:
    ask = ["ask", "--model", tiny_model_dir, "--max-tokens", 9, "hi"]
    for words in (ask, ["scenes", "draw", tiny_model_dir.parent / "a.png"], ["train", "pretrain", "--options"], ["--help"]):
        process = subprocess.Popen([*LLAVA, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (border.PIPE_CLOSED, b"")


def test_ctrl_c_is_130_without_a_trace() -> None:
    process = subprocess.Popen([*LLAVA, "ask", "-", "What is this?"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(bytes(1 << 20))  # more than a pipe holds: when this returns, the picture is being read
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


def test_a_full_disk_is_said_once() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*LLAVA, "train", "pretrain", "--options"], stdout=full, stderr=subprocess.PIPE, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: no space left")
    assert done.stderr.count(b"\n") == 1


def test_a_terminal_of_few_letters_shows_question_marks(tiny_model_dir: Path) -> None:
    done = run("show", "--model", tiny_model_dir, "a 🦙", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert b"?" in done.stdout


def test_a_reply_cannot_steer_the_terminal() -> None:
    assert border.harmless("a\x1b[2Jb\x07\x9bc\n\td 🦙é") == "a?[2Jb??c\n\td 🦙é"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("what", code="c", where="w", remedy="fix"), 2, "error: w: what. fix"),
        (SamplingError("what", code="c"), 2, "error: what"),
        (ImageError("a\x1b[2J\nb", code="c"), 1, "error: a?[2J b"),
        (FileNotFoundError(2, "No such file or directory", "x.jpg"), 1, "error: x.jpg: no such file or directory"),
        (MemoryError(), 1, "error: out of memory"),
        (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero"),
    ],
)
def test_every_error_becomes_a_line_and_a_code(error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert border.guard(fail) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(said)
    assert captured.err.count("\n") == 1
    assert captured.out == ""
