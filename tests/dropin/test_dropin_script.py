"""The script of specification 7.1, word for word, on checkpoints that are there."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from llava.conversation import conv_templates
from llava.eval.run_llava import conv_mode, eval_model, load_image, parser, prompt_of
from llava.mm_utils import get_model_name_from_path
from llava.model import LlavaLlamaForCausalLM
from llavakit.assistant import Assistant
from llavakit.checkpoint import store
from llavakit.checkpoint.places import built_in
from llavakit.errors import ImageError
from llavakit.types import Conversation, Sampling
from twins import picture

SCRIPT = """
from llava.mm_utils import get_model_name_from_path
from llava.eval.run_llava import eval_model

prompt = "How many things are there?"

args = type('Args', (), {
    "model_path": model_path,
    "model_base": None,
    "model_name": get_model_name_from_path(model_path),
    "query": prompt,
    "conv_mode": None,
    "image_file": image_file,
    "sep": ",",
    "temperature": 0,
    "top_p": None,
    "num_beams": 1,
    "max_new_tokens": 64
})()

eval_model(args)
"""


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    picture(3, 120, 80).save(tmp_path / "shown.png")
    return tmp_path / "shown.png"


@pytest.mark.parametrize("built", [True, False])
def test_the_script_prints_our_answer(built: bool, tiny_model_dir: Path, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = built_in() if built else tiny_model_dir
    exec(SCRIPT, {"model_path": str(folder), "image_file": str(shown)})
    asked = Conversation.ask("How many things are there?", shown)
    reply = "".join(Assistant.load(folder, device="cpu").reply(asked, Sampling(max_new_tokens=64)))
    assert capsys.readouterr().out == reply.strip() + "\n"
    assert reply.strip()


def test_pictures_with_different_tiles_are_asked_about_together(
    tiny_next: LlavaLlamaForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.save(tiny_next.llava, tiny_next.processor, tmp_path / "llava-v1.6")
    images = [picture(seed, *size) for seed, size in enumerate([(336, 336), (700, 300)])]
    for seed, image in enumerate(images):
        image.save(tmp_path / f"{seed}.png")
    query = "<image-placeholder>\n<image-placeholder>\nWhat is different?"
    words = ["--model-path", str(tmp_path / "llava-v1.6"), "--image-file", f"{tmp_path}/0.png,{tmp_path}/1.png", "--query", query]
    args = parser().parse_args([*words, "--temperature", "0", "--max_new_tokens", "6"])
    answer = eval_model(args)
    assert args.conv_mode == "llava_v1"
    asked = Conversation.ask("\nWhat is different?", *images)
    expected = "".join(Assistant(tiny_next.llava, tiny_next.processor).reply(asked, Sampling(max_new_tokens=6)))
    assert capsys.readouterr().out == answer + "\n" == expected.strip() + "\n"


def test_the_command_line_takes_several_pictures(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = "<image-placeholder> and <image-placeholder>: how many things are there?"
    words = ["--image-file", f"{shown};{shown}", "--sep", ";", "--query", query, "--temperature", "0", "--max_new_tokens", "8"]
    args = parser().parse_args(words)
    answer = eval_model(args)
    assert capsys.readouterr().out == answer + "\n"
    assert args.conv_mode == "vicuna_v1", "the built-in model says how it was taught"
    args.conv_mode = "llava_v0"
    eval_model(args)
    assert "[WARNING]" in capsys.readouterr().out


def test_without_marks_the_first_picture_is_asked_about(shown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(4).save(tmp_path / "more.png")
    words = ["--query", "How many things are there?", "--temperature", "0", "--max_new_tokens", "8", "--image-file"]
    one, two = (eval_model(parser().parse_args([*words, files])) for files in (str(shown), f"{shown},{tmp_path}/more.png"))
    assert one == two
    assert capsys.readouterr().out == f"{one}\n{two}\n"


def test_pictures_stand_where_they_are_marked_and_between_the_first_models_marks() -> None:
    system = conv_templates["llava_v1"].system
    assert prompt_of("Q", "llava_v1", wrapped=False) == f"{system} USER: <image>\nQ ASSISTANT:"
    assert prompt_of("Q", "llava_v1", wrapped=True) == f"{system} USER: <im_start><image><im_end>\nQ ASSISTANT:"
    marked = "<image-placeholder> or <image-placeholder>?"
    assert prompt_of(marked, "mistral_instruct", wrapped=False) == "[INST] <image> or <image>? [/INST]"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-llama-2-13b-chat", "llava_llama_2"),
        ("LLaVA-v1.6-Mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-v1.5-7b", "llava_v1"),
        ("LLaVA-Lightning-MPT-7B-preview", "mpt"),
        ("LLaVA-13b-delta-v0", "llava_v0"),
    ],
)
def test_the_name_chooses_the_conversation(name: str, mode: str) -> None:
    assert conv_mode(get_model_name_from_path(name), "none of these") == mode
    assert mode in conv_templates


@pytest.mark.parametrize(("held", "mode"), [("llava_hf", "llava_v1"), ("vicuna_v1", "vicuna_v1"), ("mistral_instruct", "mistral_instruct")])
def test_the_checkpoint_chooses_where_its_name_says_nothing(held: str, mode: str) -> None:
    assert conv_mode("llava-1.5-7b-hf", held) == mode


def test_pictures_are_opened_in_rgb(shown: Path, tmp_path: Path) -> None:
    PIL.Image.new("L", (3, 2)).save(tmp_path / "grey.png")
    assert load_image(str(tmp_path / "grey.png")).mode == load_image(shown.read_bytes()).mode == "RGB"
    with pytest.raises(ImageError):
        load_image(str(tmp_path / "none.png"))
    with pytest.raises(ImageError, match="cannot be fetched"):
        load_image("http://127.0.0.1:9/none.png")
