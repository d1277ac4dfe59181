"""Requests to an application in memory, and what the serving tests share."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx
from PIL import Image
from scripted_engine import ScriptedEngine, hello

from llavakit.serve.api import build
from llavakit.serve.service import Service, Settings

T = TypeVar("T")
CHAT = "/v1/chat/completions"


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 20))


def service(engine: ScriptedEngine | None = None, **settings: Any) -> Service:
    return Service({"m": engine or ScriptedEngine(hello)}, Settings(**settings))


def client(served: Service, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(build(served), **options), base_url="http://server")


def ask(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}]} | fields


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    held = io.BytesIO()
    Image.new(mode, (width, height)).save(held, "PNG")
    return held.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def picture(url: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url or data_url(png())} | fields}


def look(*urls: str, text: str = "What is this?", **fields: Any) -> dict[str, Any]:
    parts = [picture(url) for url in urls] + [{"type": "text", "text": text}]
    return {"model": "m", "messages": [{"role": "user", "content": parts}]} | fields


async def post(served: Service, body: Any, path: str = CHAT, **options: Any) -> httpx.Response:
    async with client(served) as http:
        if isinstance(body, bytes):
            headers = {"content-type": "application/json"} | options.pop("headers", {})
            return await http.post(path, content=body, headers=headers, **options)
        return await http.post(path, json=body, **options)


async def get(served: Service, path: str, **options: Any) -> httpx.Response:
    async with client(served) as http:
        return await http.get(path, **options)


def wrong(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of an answer, of which the shape is held."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code, body
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def events(text: str) -> list[Any]:
    """The data of server-sent events, JSON where it is."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
