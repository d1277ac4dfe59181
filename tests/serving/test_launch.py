"""Launch lines: exact for what the checkpoint is, whole numbers of cards, no key in sight; what an engine cannot serve is refused."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from llavakit.checkpoint import places
from llavakit.errors import ConfigError
from llavakit.model.cards import CARDS, card
from llavakit.model.released import SYSTEMS
from llavakit.model.sizes import ROOM, empty, sizes
from llavakit.processor_files import to_hf_messages
from llavakit.prompts import TEMPLATES, PlainTemplate, spelled
from llavakit.serve import launch as room
from llavakit.serve.launch import ENGINES, Engine, Facts, launch
from llavakit.types import Conversation, Image, Pixels, Text, assistant, system, user
from originals import make, write
from tiny import tiny_processor

OPTIONS = {  # as the engines' own pages name them (vLLM 0.33, SGLang 0.5)
    "vllm": {
        "--served-model-name", "--host", "--port", "--dtype", "--chat-template", "--chat-template-content-format", "--generation-config",
        "--max-model-len", "--limit-mm-per-prompt", "--tensor-parallel-size", "--data-parallel-size", "--allowed-media-domains",
    },
    "sglang": {
        "--model-path", "--model-impl", "--enable-multimodal", "--served-model-name", "--host", "--port", "--dtype", "--chat-template",
        "--context-length", "--limit-mm-data-per-request", "--tp-size", "--dp-size",
    },
}  # fmt: skip
SERVED = [name for name, one in SYSTEMS.items() if one.config.projector != "linear" and "hd" not in name]


def told(name: str) -> Facts:
    """The facts of a published system, without its files."""
    one = SYSTEMS[name]
    return Facts(
        folder=Path(name), config=one.config, sizes=sizes(empty(one.config)), aspect=one.aspect,
        context=int(one.config.text["max_position_embeddings"]), template="", stops=(), original_pieces=False,
    )  # fmt: skip


FACTS = {name: told(name) for name in SYSTEMS}


def value(words: tuple[str, ...], *names: str) -> str:
    return next(following for word, following in pairwise(words) if word in names)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SERVED)
def test_a_line_is_whole(name: str, engine: Engine) -> None:
    found = FACTS[name]
    made = launch(engine, found, card("H200"), devices=8, key="A_KEY", name="mine", port=9)
    assert {word for word in made.words if word.startswith("--")} <= OPTIONS[engine]
    assert shlex.split(made.line().replace("\\\n", ""))[-1]
    pictures = json.loads(value(made.words, "--limit-mm-per-prompt", "--limit-mm-data-per-request"))["image"]
    assert pictures == made.pictures >= 1
    assert pictures * found.picture + ROOM <= found.context
    assert value(made.words, "--max-model-len", "--context-length") == str(found.context)
    assert (value(made.words, "--served-model-name"), value(made.words, "--port"), made.address) == ("mine", "9", "http://127.0.0.1:9")
    assert value(made.words, "--chat-template") == str(made.template_file)
    assert made.tensor_parallel * made.copies <= 8
    assert made.tensor_parallel == 1  # all of them fit on one such card


@given(
    name=st.sampled_from(SERVED), kind=st.sampled_from([*CARDS]), devices=st.integers(1, 8), engine=st.sampled_from(ENGINES),
)  # fmt: skip
def test_a_copy_fits_its_cards_and_divides_the_heads(name: str, kind: str, devices: int, engine: Engine) -> None:
    found = FACTS[name]
    text = found.config.text
    try:
        made = launch(engine, found, card(kind), devices=devices)
    except ConfigError as error:
        assert error.code == "no_room"  # noqa: PT017  # either may happen
        return
    cards = made.tensor_parallel
    assert text["num_attention_heads"] % cards == 0
    assert found.config.vision["num_attention_heads"] % cards == 0
    assert text["num_key_value_heads"] % cards == 0 or cards % text["num_key_value_heads"] == 0
    assert cards * made.copies <= devices < cards * (made.copies + 1)
    assert found.sizes.weights("bf16") / cards < card(kind).memory * 2**30
    for fewer in range(1, cards):
        with pytest.raises(ConfigError):
            room.tensor_parallel(found, card(kind), fewer, found.context)


def test_the_arithmetic_is_the_cards() -> None:
    found = FACTS["llava-v1.5-7b"]
    assert value(launch("vllm", found, card("L4")).words, "--dtype") == "bfloat16"
    assert value(launch("vllm", found, card("V100-32")).words, "--dtype") == "float16"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_key_is_named_and_never_written(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "the secret itself")
    made = launch(engine, FACTS["llava-v1.5-7b"], card("L4"), key="A_KEY")
    assert '"$A_KEY"' in made.line()
    assert "secret" not in made.line()
    assert not any("KEY" in word for word in made.words)
    assert "KEY" not in launch(engine, FACTS["llava-v1.5-7b"], card("L4")).line()


def test_safe_unless_told_otherwise() -> None:
    found = FACTS["llava-v1.5-7b"]
    made = launch("vllm", found, card("L4"))
    assert value(made.words, "--host") == "127.0.0.1"
    assert made.words[-2:] == ("--allowed-media-domains", room.NOWHERE)
    assert "VLLM_MEDIA_URL_ALLOW_REDIRECTS=0" in made.line()
    assert launch("vllm", found, card("L4"), domains=("a.org", "b.org")).words[-2:] == ("a.org", "b.org")
    assert any("no key" in note for note in launch("vllm", found, card("L4"), host="0.0.0.0").notes)
    assert any("fetches" in note for note in launch("sglang", found, card("L4")).notes)


def test_what_cannot_be_served_is_refused_with_a_way_out() -> None:
    seven, tiled = FACTS["llava-v1.5-7b"], FACTS["llava-v1.6-vicuna-7b"]
    cases: list[tuple[Engine, Facts, str | None, str]] = [
        ("vllm", FACTS["llava-v1.5-hd-7b"], None, "pad"),
        ("sglang", FACTS["llava-v1.5-hd-7b"], None, "pad"),
        ("sglang", replace(tiled, config=replace(tiled.config, merge="flat")), None, "flat"),
        ("vllm", FACTS["llava-v1-7b"], None, "linear"),
        ("vllm", seven, "4bit", "4bit"),
    ]
    for engine, found, packed, word in cases:
        with pytest.raises(ConfigError, match=word) as error:
            launch(engine, found, card("H200"), packed=packed)
        assert error.value.code == "cannot_serve"
        assert "llava serve" in error.value.remedy
    launch("sglang", FACTS["llava-v1-7b"], card("H200"))  # transformers' model takes it
    for wrong in ({"pictures": 99}, {"context": 99999}, {"context": 100}):
        with pytest.raises(ConfigError) as error:
            launch("vllm", seven, card("H200"), **wrong)  # type: ignore[arg-type]
        assert error.value.code == "bad_value"


def test_an_original_checkpoint_is_converted_first(tmp_path: Path) -> None:
    made = make()
    folder = write(tmp_path / "old", made.fields, made.weights(tower=True))
    with pytest.raises(ConfigError, match="llava convert"):
        room.facts(folder)


# --- the chat template ----------------------------------------------------------------------------------------------------------------

PIXEL = Image(Pixels(width=1, height=1, rgb=bytes(3)))
TALKS = {
    "text": Conversation((user("Why?"),)),
    "picture": Conversation((user(PIXEL, Text("What?")),)),
    "two": Conversation((user(PIXEL, PIXEL, Text("Which?")),)),
    "system": Conversation((system("Be brief."), user(PIXEL, Text("What?")))),
    "turns": Conversation((user(PIXEL, Text("What?")), assistant("A cat."), user("Why?"))),
}


@pytest.mark.parametrize("name", [name for name, one in TEMPLATES.items() if not isinstance(one, PlainTemplate)])
def test_the_template_gives_an_engine_our_very_ids(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """An engine renders it, adds no special token, and puts image tokens where the marker stands."""
    processor = tiny_processor(tokenizer).using(TEMPLATES[name])
    source = room.chat_template(processor)
    assert "generation" not in source.replace("add_generation_prompt", "")
    for talk in TALKS.values():
        (text,), _ = render_jinja_template(
            conversations=[to_hf_messages(talk)], chat_template=source, add_generation_prompt=True, **tokenizer.special_tokens_map
        )
        assert text == "<s>" + spelled(processor.template.render(talk))
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        image, tokens = processor.image_token_id, processor.tiling.grid(1, 1).tokens
        filled = [one for number in ids for one in ([image] * tokens if number == image else [number])]
        assert filled == processor.encode(talk, learn=False).input_ids.tolist()


def test_an_end_that_is_no_token_is_said(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = room.facts(places.built_in("tiny"))
    assert found.stops == ()
    assert (found.context, found.picture, found.aspect) == (1024, 64, "pad")
    assert any("stop" in note for note in room.notes("vllm", replace(found, stops=("###",)), "127.0.0.1", None))


# --- the command ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    from llavakit.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAVA_API_KEY", raising=False)
    return lambda *words: main([str(word) for word in words])


def test_the_command_prints_the_line(llava: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert llava("launch", "--gpu", "L4", "--print", "--router", "http://a:1", "--router", "http://b:1") == 0
    said = capsys.readouterr()
    assert "vllm serve" in said.out
    assert "vllm-router --worker-urls http://a:1 http://b:1" in said.out
    assert (tmp_path / "tiny.vllm.jinja").read_text() == room.facts(places.built_in("tiny")).template
    assert "tiny.vllm.jinja" in said.err


def test_the_engine_has_an_environment_of_its_own(llava: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, said in (((), "uv venv"), (("--python", sys.prefix), "our own"), (("--python", tmp_path), "no interpreter")):
        assert llava("launch", "--gpu", "L4", *words) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert llava("launch", "--gpu", "L4", "--python", tmp_path) == 2
    assert "vllm cannot be started" in capsys.readouterr().err
    assert llava("launch", "--gpu", "L4", "--engine", "tgi", "--print") == 2
    assert llava("launch", "tiny-hd", "--gpu", "L4", "--print") == 2
    assert "llava serve" in capsys.readouterr().err


FAKE = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
assert "PYTHONPATH" not in os.environ and os.environ["VLLM_API_KEY"] == "secret" and "secret" not in sys.argv
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self): self.reply({{"data": [{{"id": "tiny"}}]}})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        last = "How many things are there?" in json.dumps(body["messages"][-1])
        self.reply({{"choices": [{{"message": {{"content": "A zebra."}}}}]}})
        if last and not body.get("logprobs") is None: self.server.shutdown_soon = True
    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.shutdown_soon = False
while not server.shutdown_soon: server.handle_request()
"""


def test_it_runs_waits_and_compares(
    llava: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    home = tmp_path / "env" / "bin"
    home.mkdir(parents=True)
    (home / "python").symlink_to(sys.executable)
    (home / "vllm").write_text(FAKE.format(python=sys.executable))
    (home / "vllm").chmod(0o755)
    monkeypatch.setenv("LLAVA_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "src"))
    assert llava("launch", "--gpu", "L4", "--python", tmp_path / "env", "--port", free_port, "--wait", 20) == 0
    said = capsys.readouterr()
    assert "ready: http://127.0.0.1" in said.err
    assert "does NOT answer" in said.out
    assert "secret" not in said.out + said.err


def test_an_engine_that_ends_is_told(llava: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, free_port: int) -> None:
    home = tmp_path / "env" / "bin"
    home.mkdir(parents=True)
    (home / "python").symlink_to(sys.executable)
    (home / "vllm").write_text("#!/bin/sh\nexit 3\n")
    (home / "vllm").chmod(0o755)
    assert llava("launch", "--gpu", "L4", "--python", tmp_path / "env", "--port", free_port, "--wait", 20) == 1
    assert "ended before it was ready" in capsys.readouterr().err


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
