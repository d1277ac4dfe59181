"""The original demo's worker contract: prompts read back, chunks between NUL bytes."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine
from served import get, png, run, service, wrong

from llavakit.prompts import TEMPLATES, PlainTemplate, spelled
from llavakit.serve.api import build
from llavakit.serve.service import Service
from llavakit.serve.worker import conversation, routes
from llavakit.types import Conversation, Image, Text, assistant, system, user

OWN = TEMPLATES["vicuna_v1"]
PICTURE = Image(png())
TALKS = {
    "words": Conversation((user("What is a cat?"),)),
    "picture": Conversation((user(PICTURE, "\nWhat is this?"),)),
    "two pictures": Conversation((user(PICTURE, "\n", PICTURE, "\nWhat has changed?"),)),
    "turns": Conversation((user(PICTURE, "\nWhat is this?"), assistant("A cat."), user("Why?"), assistant("It meows."), user("Sure?"))),
    "system": Conversation((system("Be brief."), user(PICTURE, "\nWhat is this?"), assistant("A cat."), user("Why?"))),
}
FORMATS = [template for template in TEMPLATES.values() if template.images == "inline" and not isinstance(template, PlainTemplate)]


@pytest.mark.parametrize("template", FORMATS, ids=lambda template: template.name)
@pytest.mark.parametrize("name", TALKS)
def test_a_written_prompt_is_read_back(name: str, template: Any) -> None:
    prompt = spelled(template.render(TALKS[name]))
    found = conversation(prompt, TALKS[name].images, (template,))
    assert spelled(template.render(found)).strip() == prompt.strip()
    assert found.images == TALKS[name].images
    assert [message.role for message in found.turns] == [message.role for message in TALKS[name].turns]
    assert found.system == TALKS[name].system


async def said(served: Service, **fields: Any) -> tuple[httpx.Response, list[dict[str, Any]]]:
    app = build(served, routes(served, lambda name: OWN))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        answer = await http.post("/worker_generate_stream", json={"model": "m"} | fields)
        chunks = [json.loads(chunk) for chunk in answer.content.split(b"\0") if chunk] if answer.status_code == 200 else []
        return answer, chunks


def test_a_reply_grows_chunk_by_chunk_behind_its_prompt() -> None:
    engine = ScriptedEngine()
    prompt = spelled(OWN.render(TALKS["picture"]))
    fields = {"images": [base64.b64encode(png()).decode()], "temperature": 0.0005, "max_new_tokens": 5000, "stop": "</s>"}
    answer, chunks = run(said(service(engine), prompt=prompt, **fields))
    assert answer.content.endswith(b"\0")
    assert chunks[-1] == {"text": prompt + "I see 1 pictures.", "error_code": 0}
    assert all(later["text"].startswith(earlier["text"]) for earlier, later in pairwise(chunks))
    (got,) = engine.asked
    assert got.conversation.messages[0].parts == (PICTURE, Text("\nWhat is this?"))
    assert (got.sampling.temperature, got.sampling.max_new_tokens, got.sampling.stop, got.fitted) == (0, 1024, ("</s>",), True)


def test_a_prompt_of_another_format_becomes_the_same_conversation() -> None:
    engine = ScriptedEngine()
    prompt = spelled(TEMPLATES["mistral_instruct"].render(TALKS["turns"]))
    run(said(service(engine), prompt=prompt, images=[base64.b64encode(png()).decode()]))
    assert [message.text for message in engine.asked[0].conversation.messages] == [message.text for message in TALKS["turns"].messages]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "USER: <image>\nWhat? ASSISTANT:"}, "1 <image> in the prompt but 0 images"),
        ({"prompt": "USER: What? ASSISTANT:", "images": ["@"]}, "base64"),
        ({"prompt": "USER: What? ASSISTANT:", "temperature": -1}, "-1"),
        ({"prompt": "no format at all"}, "none of the formats"),
    ],
)
def test_what_is_wrong_is_told_in_the_contracts_way(fields: dict[str, Any], words: str) -> None:
    answer, chunks = run(said(service(), **fields))
    assert answer.status_code == 200
    assert chunks[-1]["error_code"] == 1
    assert words in chunks[-1]["text"]


def test_a_prompt_that_is_too_long_says_so_with_code_0() -> None:
    prompt = "USER: " + "word " * 100 + "ASSISTANT:"
    _, chunks = run(said(service(ScriptedEngine(context=50)), prompt=prompt))
    assert chunks[-1]["error_code"] == 0
    assert "50 tokens" in chunks[-1]["text"]


def test_the_status_is_told_and_nothing_is_there_unless_asked_for() -> None:
    served = service()
    app = build(served, routes(served, lambda name: OWN))

    async def asked() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            return await http.post("/worker_get_status")

    assert run(asked()).json() == {"model_names": ["m"], "speed": 1, "queue_length": 0}
    wrong(run(get(service(), "/worker_get_status")), 404, "not_found")


def test_wrong_types_are_refused_as_everywhere() -> None:
    answer, _ = run(said(service(), prompt=3))
    assert wrong(answer, 400, "invalid_type")["param"] == "prompt"
