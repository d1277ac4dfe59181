"""The command line from outside: words in, stdout, stderr and exit code out. Bad input is one typed line with a remedy (rows I, P)."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.ImageFile import ImageFile

PHOTO, QUESTION = "photo.png", "What is this?"  # the picture lies in every test's folder
Llava = Callable[..., Any]


def noise(length: int) -> bytes:
    return bytes(range(256)) * (length // 256 + 1)


# --- ask ------------------------------------------------------------------------------------------------------------------------------


def test_a_reply_is_the_only_thing_on_stdout(asked: Llava) -> None:
    done = asked(PHOTO, QUESTION)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("\n")


def test_greedy_replies_repeat_and_json_says_the_same(asked: Llava) -> None:
    plain, record = asked(PHOTO, PHOTO, QUESTION), json.loads(asked("--json", PHOTO, PHOTO, QUESTION).out)
    assert record["reply"] == plain.out.removesuffix("\n")
    assert (record["question"], record["images"]) == (QUESTION, [PHOTO, PHOTO])


def test_a_draft_is_never_decoded_whole_not_even_to_check_it(asked: Llava, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (1600, 1200), "red").save(folder / "large.jpg")
    decoded, load = [], ImageFile.load
    monkeypatch.setattr(ImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    assert asked("--draft", "large.jpg", QUESTION).code == 0
    assert decoded
    assert max(decoded) < (800, 600)


def test_stdin_is_a_picture_or_a_question(asked: Llava, folder: Path) -> None:
    usual = asked(PHOTO, QUESTION)
    assert asked("-", QUESTION, stdin=(folder / PHOTO).read_bytes()) == usual
    assert asked(PHOTO, "-", stdin=QUESTION.encode()) == usual
    assert asked("--question", QUESTION, PHOTO) == usual
    asked("-", "-").failed(2, "stdin")


def test_text_alone_and_a_picture_alone_work(asked: Llava) -> None:
    assert asked("Hello.").code == 0
    assert asked(PHOTO, "").code == 0  # P2


@pytest.mark.parametrize("question", ["", "  ", "\n\n\t"])
def test_nothing_asked(asked: Llava, question: str) -> None:
    asked(question).failed(1, "empty")  # P5


@pytest.mark.parametrize("question", ["a </s> b", "<image>", "USER: x ASSISTANT: y", "<s><unk>", "🦙🏽 \u200f\u200b", "x" * 300])
def test_any_text_is_text(asked: Llava, question: str) -> None:
    done = asked(PHOTO, question)  # P3, P6
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("question", ["a\0b", "\ud800", "a\udcffb"])
def test_what_is_no_character_is_refused(asked: Llava, question: str) -> None:
    asked(question).failed(1, "U+")  # P6


def test_bytes_that_are_no_text_are_refused(asked: Llava) -> None:
    asked("-", stdin=b"caf\xe9").failed(1, "U+DCE9")


def test_the_context_is_a_limit_with_numbers(asked: Llava) -> None:
    for words in (["x y " * 20_000], ["--max-tokens", "999999", "hi"]):
        done = asked(PHOTO, *words)  # P4
        done.failed(1)
        assert len(re.findall(r"\d+", done.err)) >= 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "nan"), ("--temperature", "-1"), ("--temperature", "1e9"), ("--top-p", "0"), ("--top-p", "1.1"),
        ("--max-tokens", "0"), ("--max-tokens", "-1"), ("--max-tokens", "1000000000"), ("--seed", "-1"), ("--seed", str(2**64)),
        ("--beams", "0"), ("--stop", ""), ("--temperature", "warm"), ("--no-such-option", "1"), ("--dtype", "int3"), ("--device", "abacus"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_a_usage_error_that_names_it(asked: Llava, option: str, value: str) -> None:
    done = asked(option, value, "hi")  # P7, P10
    done.failed(2)
    names = {"--max-tokens": "max_new_tokens", "--top-p": "top_p", "--beams": "num_beams"}
    assert names.get(option, option.strip("-")) in done.err


def test_beams_do_not_go_with_a_temperature(asked: Llava) -> None:
    asked("--beams", "2", "--temperature", "1", "hi").failed(2, "beam")
    asked(*(["--stop", "x"] * 17), "hi").failed(2, "stop")


def test_drawn_replies_repeat_with_a_seed(asked: Llava) -> None:
    first, second = (asked("-t", "1.5", "--top-p", "0.9", "--seed", "3", "--stop", "\n", PHOTO, QUESTION) for _ in range(2))
    assert first == second
    assert first.code == 0
    assert asked("--beams", "2", PHOTO, QUESTION).code == 0


@pytest.mark.parametrize("words", [[PHOTO], [QUESTION, PHOTO], ["https://example.org/a.jpg", QUESTION]])
def test_words_in_the_wrong_place_are_explained(asked: Llava, words: list[str]) -> None:
    asked(*words).failed(2, words[-1] if words[0] != "https://example.org/a.jpg" else "fetch")


# --- pictures at the border (I rows; tests/test_images.py has them all) ---------------------------------------------------------------


def bad_pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    whole = (folder / PHOTO).read_bytes()
    huge = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(huge, "PNG")
    icns = io.BytesIO()
    Image.new("RGB", (16, 16)).save(icns, "PPM")
    yield from [("truncated", whole[: len(whole) // 2]), ("empty", b""), ("noise", noise(5000)), ("page", b"<html>no</html>")]
    yield from [("drawing", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), ("paper", b"%PDF-1.7\n"), ("bomb", huge.getvalue())]
    yield "ppm", icns.getvalue()


def test_bad_pictures_are_one_line_before_a_model_is_loaded(llava: Llava, folder: Path) -> None:
    for name, data in bad_pictures(folder):
        (folder / f"{name}.png").write_bytes(data)
        done = llava("ask", "--model", "no-such-model", f"{name}.png", QUESTION)
        done.failed(1, f"{name}.png")
        assert not re.search(r"\b0x[0-9a-f]{4}", done.err)  # no buffer's address


def test_a_missing_picture_and_a_folder(llava: Llava) -> None:
    llava("ask", "nowhere.jpg", QUESTION).failed(1, "nowhere.jpg")
    llava("ask", ".", QUESTION).failed(1)


def test_a_name_cannot_write_on_the_terminal(llava: Llava) -> None:
    done = llava("ask", "a\x1b[2Jb\nc.jpg", QUESTION)
    done.failed(1)
    assert "\x1b" not in done.err


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_every_format_is_seen_whatever_its_name_says(asked: Llava, folder: Path, suffix: str, mode: str) -> None:
    if (mode, suffix) == ("P", "jpg"):
        mode = "CMYK"
    Image.new(mode, (33, 21), 7 if mode != "CMYK" else (0, 9, 9, 0)).save(folder / f"picture.{suffix}")
    os.rename(folder / f"picture.{suffix}", folder / "picture.dat")  # I3
    done = asked("picture.dat", QUESTION)
    assert (done.code, done.err) == (0, "")


def test_an_animation_is_one_warning_and_a_reply(asked: Llava, folder: Path) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(folder / "two.gif", save_all=True, append_images=frames[1:])
    done = asked("two.gif", QUESTION)  # I12
    assert done.code == 0
    assert re.fullmatch(r"warning: [^\n]+\n", done.err)


# --- models ---------------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model(llava: Llava, folder: Path) -> None:
    for name in (".", "nowhere"):
        llava("ask", "--model", name, QUESTION).failed(1)
        llava("show", "--model", name, QUESTION).failed(1)
        llava("chat", "--model", name).failed(1)


def test_debug_shows_the_trace(llava: Llava) -> None:
    done = llava("ask", "--debug", "nowhere.jpg", QUESTION)
    assert done.code == 1
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: nowhere.jpg")


# --- chat -----------------------------------------------------------------------------------------------------------------------------


def test_a_chat_from_a_pipe(llava: Llava, tiny_model_dir: Path) -> None:
    lines = f"{QUESTION}\n\n/help\n/image {PHOTO}\nAnd this?\n/reset\nHello.\n/quit\nnever read\n"
    done = llava("chat", "--model", tiny_model_dir, "--max-tokens", 3, PHOTO, stdin=lines.encode())
    assert done.code == 0
    assert "/reset" in done.err
    assert "a new conversation" in done.err


def test_the_first_turn_of_a_chat_is_what_ask_says(llava: Llava, asked: Llava, tiny_model_dir: Path) -> None:
    done = llava("chat", "--model", tiny_model_dir, "--max-tokens", 4, PHOTO, stdin=QUESTION.encode())
    assert done.out == asked(PHOTO, QUESTION).out


def test_an_error_in_a_turn_does_not_end_the_chat(llava: Llava, tiny_model_dir: Path) -> None:
    lines = b"/image nowhere.jpg\n/fly\na\0b\n/image a\0b\ncaf\xe9\n" + b"x y " * 20_000 + b"\nHello.\n"
    done = llava("chat", "--model", tiny_model_dir, "--max-tokens", 3, stdin=lines)
    assert done.code == 1  # a script learns that turns failed
    assert [line.split(" ")[0] for line in done.err.splitlines()] == ["error:", "no", *["error:"] * 4]
    assert done.out == llava("ask", "--model", tiny_model_dir, "--max-tokens", 3, "Hello.").out
