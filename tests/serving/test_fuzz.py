"""Whatever is sent, nothing is our fault, and everything has the one shape (A13)."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine
from served import CHAT, data_url, events, look, png, service

from llavakit.serve.api import build
from llavakit.serve.schema import _NOTHING, ChatRequest

NAMES = [*ChatRequest.model_fields, *_NOTHING, "user", "role", "content", "type", "text", "image_url", "url", "detail", ""]
ODD = [
    None, True, False, 0, 1, -1, 2**70, 1e308, 0.5, "", "m", "user", "assistant", "system", "tool", "text", "image_url", "a\0b", "\ud800",
    "é", "data:", "data:;base64,", "http://127.0.0.1/", "file:///etc/passwd", data_url(png()), data_url(b"GIF89a"), [], {}, [[]], [{}],
]  # fmt: skip
VALUES = st.recursive(
    st.sampled_from(ODD) | st.text(max_size=20) | st.floats(allow_nan=False) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


def changed(value: Any, path: list[int], new: Any) -> Any:
    """The value with one place replaced: each step picks an entry, the last is where ``new`` goes."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    if isinstance(value, list):
        at = path[0] % len(value)
        return [changed(one, path[1:], new) if index == at else one for index, one in enumerate(value)]
    name = list(value)[path[0] % len(value)]
    return value | {name: changed(value[name], path[1:], new)}


@cache
def transport() -> httpx.ASGITransport:
    return httpx.ASGITransport(build(service(ScriptedEngine())))


async def posted(body: bytes) -> httpx.Response:
    async with httpx.AsyncClient(transport=transport(), base_url="http://server") as http:
        return await http.post(CHAT, content=body, headers={"content-type": "application/json"})


def sent(body: bytes) -> None:
    answer = asyncio.run(posted(body))
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert events(answer.text)[-1] == "[DONE]"
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@settings(max_examples=150, deadline=None)
@given(path=st.lists(st.integers(0, 9), max_size=6), new=VALUES, extra=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_a13_a_request_with_something_else_in_some_place(path: list[int], new: Any, extra: dict[str, Any]) -> None:
    body = look(data_url(png()), stop=["x"], temperature=0.5, max_tokens=9, stream=False, stream_options={"include_usage": True})
    sent(json.dumps(changed(body, path, new)).encode() if path else json.dumps(extra | body | extra).encode())


@settings(max_examples=50, deadline=None)
@given(value=VALUES)
def test_a13_any_json(value: Any) -> None:
    sent(json.dumps(value).encode())


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=9))
def test_a13_bytes_with_noise(cut: int, noise: bytes) -> None:
    body = json.dumps(look(data_url(png()))).encode()
    sent(body[:cut] + noise + body[cut:])
