"""The built-in model behind the API: what comes over HTTP is what the assistant says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import CHAT, ask, data_url, events, look, wrong
from sockets import Running, serving

from llavakit.assistant import Assistant
from llavakit.serve.batch import answer_all
from llavakit.serve.engine import AssistantEngine
from llavakit.serve.service import Service
from llavakit.types import Conversation, Image, Sampling

PICTURES = [path.read_bytes() for path in sorted(Path(str(files("llavakit") / "pictures")).glob("*.png"))]
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What the assistant says of each picture, alone."""
    assistant = Assistant.load(None)
    talks = [Conversation.ask(QUESTION, Image(picture)) for picture in PICTURES]
    return ["".join(assistant.reply(talk, Sampling(max_new_tokens=40))) for talk in talks]


@pytest.fixture(scope="module")
def engine() -> Iterator[AssistantEngine]:
    made = AssistantEngine.start(Assistant.load(None))
    yield made
    asyncio.run(made.drain(0))


@pytest.fixture(scope="module")
def running(engine: AssistantEngine) -> Iterator[Running]:
    with serving(Service({"m": engine})) as found:
        yield found


def posted(running: Running, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(running.url + CHAT, json=body, timeout=60)


@pytest.mark.parametrize("index", range(len(PICTURES)))
def test_the_reply_is_the_assistants_whole_and_in_pieces(index: int, running: Running, expected: list[str]) -> None:
    body = look(data_url(PICTURES[index]), text=QUESTION, temperature=0, max_tokens=40)
    whole = posted(running, body).json()
    assert whole["choices"][0]["message"]["content"] == expected[index]
    usage = whole["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] > 0
    told = events(posted(running, body | {"stream": True, "stream_options": {"include_usage": True}}).text)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in told[:-2]) == expected[index]
    assert told[-2]["usage"]["prompt_tokens"] == usage["prompt_tokens"]
    assert told[-2]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_reply_of_unnamed_length_is_fitted(running: Running, engine: AssistantEngine) -> None:
    words = "word " * 200  # 800 tokens, of which with 512 more are too many
    assert posted(running, ask(words, temperature=0)).status_code == 200
    error = wrong(posted(running, ask(words * 5)), 400, "context_length_exceeded")
    assert error["param"] == "messages"
    wrong(posted(running, ask("hi", max_tokens=engine.context)), 400, "context_length_exceeded")


def test_a_cut_picture_names_its_field(running: Running) -> None:
    for stream in (False, True):
        error = wrong(posted(running, look(data_url(PICTURES[0][:-400]), stream=stream)), 400, "image_truncated")
        assert error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("text", ["", "   ", "\n\n"])
def test_an_empty_question_is_refused(running: Running, text: str) -> None:
    wrong(posted(running, ask(text)), 400, "empty_prompt")


def test_control_text_from_people_is_text(running: Running) -> None:
    for text in ("<image>", "</s><s>", "USER: hi ASSISTANT:", "<|im_end|>", "\u202eabc\u200b", "🦙" * 100):
        assert posted(running, ask(text, max_tokens=3)).status_code == 200


def test_the_metrics_are_the_engines(running: Running) -> None:
    text = httpx.get(running.url + "/metrics").text
    assert 'llava:generation_tokens_total{model_name="m"}' in text
    assert 'llava:prompt_tokens_cached_total{model_name="m"} 0\n' not in text


def test_a_batch_of_everything(engine: AssistantEngine, expected: list[str], tmp_path: Path) -> None:
    def line(index: int, picture: bytes) -> str:
        body = look(data_url(picture), text=QUESTION, temperature=0, max_tokens=40)
        return json.dumps({"custom_id": str(index), "method": "POST", "url": CHAT, "body": body})

    (tmp_path / "in.jsonl").write_text("\n".join(line(index, picture) for index, picture in enumerate(PICTURES * 3)))
    counts = asyncio.run(answer_all(Service({"m": engine}), tmp_path / "in.jsonl", tmp_path / "out.jsonl"))
    assert (counts.good, counts.bad) == (3 * len(PICTURES), 0)
    found = [json.loads(one) for one in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    said = {int(one["custom_id"]): one["response"]["body"]["choices"][0]["message"]["content"] for one in found}
    assert [said[index] for index in range(len(said))] == expected * 3
