"""The official client, unchanged, against a server on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted_engine import ScriptedEngine
from served import data_url, picture, png, run, service
from sockets import Running, serving, until

from llavakit.errors import LlavaError
from llavakit.types import Image, Text

WORDS = [{"role": "user", "content": "Hello"}]
LOOK = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, picture(detail="low")]}]


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def running(engine: ScriptedEngine) -> Iterator[Running]:
    with serving(service(engine, key="k")) as found:
        yield found


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=running.url + "/v1", api_key="k", max_retries=0) as made:
        yield made


def test_whole_replies(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    done: Any = client.chat.completions.create(model="m", messages=LOOK, max_tokens=9, temperature=0, user="me", metadata={"a": "b"})
    assert done.choices[0].message.content == "I see 1 pictures."
    assert done.choices[0].finish_reason == "stop"
    assert (done.usage.prompt_tokens_details.image_tokens, done.usage.completion_tokens) == (10, 4)
    assert done._request_id
    assert engine.asked[-1].detail == "low"
    assert engine.asked[-1].conversation.messages[0].parts == (Text("What is this?"), Image(png()))


def test_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="m", messages=LOOK, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "I see 1 pictures."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    with client.chat.completions.stream(model="m", messages=WORDS) as helped:
        helped.until_done()
        assert helped.get_final_completion().choices[0].message.content == "I see 0 pictures."


def test_async(running: Running) -> None:
    async def asked() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="k") as client:
            many = [client.chat.completions.create(model="m", messages=WORDS) for _ in range(8)]
            words = [done.choices[0].message.content for done in await asyncio.gather(*many)]
            stream = await client.chat.completions.create(model="m", messages=WORDS, stream=True)
            return [*words, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])]

    assert run(asked()) == ["I see 0 pictures."] * 9


def test_a_stream_that_is_left_ends_its_reply(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda ask: ["word ", 0.01] * 3000
    try:
        with client.chat.completions.create(model="m", messages=WORDS, stream=True) as stream:
            next(stream)
        until(lambda: engine.running == 0)
    finally:
        engine.script = ScriptedEngine().script
    assert engine.ended[-1] == "cancelled"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").id == "m"


def test_errors_have_their_classes(client: openai.OpenAI, running: Running) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="x", messages=WORDS)
    assert (unknown.value.code, unknown.value.param, unknown.value.type) == ("model_not_found", "model", "invalid_request_error")
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as unsupported:
        create(model="m", messages=WORDS, n=2)
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "n")
    with pytest.raises(openai.BadRequestError, match="picture"):
        create(model="m", messages=[{"role": "user", "content": [picture(data_url(b"x"))]}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=running.url + "/v1", api_key="wrong").models.list()


def test_a_stream_that_fails_raises(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.script = lambda ask: ["half ", LlavaError("x", code="x")]
    try:
        with pytest.raises(openai.APIError) as caught:
            list(client.chat.completions.create(model="m", messages=WORDS, stream=True))
    finally:
        engine.script = ScriptedEngine().script
    assert caught.value.code == "internal_error"


def test_overload_is_retried_by_the_client() -> None:
    engine = ScriptedEngine(room=0)
    with serving(service(engine)) as running, openai.OpenAI(base_url=running.url + "/v1", api_key="k", max_retries=1) as client:
        with pytest.raises(openai.InternalServerError, match="full"):
            client.chat.completions.create(model="m", messages=WORDS)
        assert engine.refused == 2
        engine.room = 1
        assert client.chat.completions.create(model="m", messages=WORDS).choices[0].message.content
