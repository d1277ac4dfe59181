"""A small OpenAI-compatible server that answers through our own model, rightly or wrong in one typical way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from llavakit.assistant import Assistant
from llavakit.model.generation import Past, decode_one, prefill
from llavakit.processor import Inputs
from llavakit.types import Conversation

Encode = Callable[[Conversation], Inputs]
KEY = "a-key-for-tests"


@contextmanager
def served(
    ours: Assistant,
    *,
    encode: Encode | None = None,
    counted: int = 0,
    most_pictures: int = 9,
    logprobs: bool = True,
    key: str | None = None,
    said: Callable[[str], str] = str,
) -> Iterator[str]:
    """Its address while it runs. ``encode``: how it reads a conversation; ``counted``: tokens more a picture in usage."""
    read: Encode = encode or (lambda asked: ours.processor.encode(asked, learn=False))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                return self._send(401, {"error": {"message": f"wrong key, not {key}"}})
            asked = Conversation.from_openai(body["messages"])
            if body.get("logprobs") and not logprobs:
                return self._send(400, {"error": {"message": "no logprobs here"}})
            if len(asked.images) > most_pictures:
                return self._send(400, {"error": {"message": f"at most {most_pictures} image(s)"}})
            inputs = read(asked)
            ids = tokens(ours, inputs, body["max_tokens"])
            reply = said(ours.processor.decode(ids))
            named = [ours.processor.tokenizer.convert_ids_to_tokens(number) for number in ids]
            told = {"content": [{"token": name.replace("▁", " "), "logprob": -0.5} for name in named]} if body.get("logprobs") else None
            usage = {"prompt_tokens": len(inputs.input_ids) + counted * len(asked.images), "completion_tokens": len(ids)}
            message = {"role": "assistant", "content": reply}
            return self._send(200, {"choices": [{"message": message, "logprobs": told, "finish_reason": "stop"}], "usage": usage})

        def _send(self, status: int, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tokens(ours: Assistant, inputs: Inputs, new: int) -> list[int]:
    """Greedy tokens, one after the other: written apart from what is tested."""
    past, said = Past.empty(ours.model), list[int]()
    scores = prefill(ours.model, ours.processor.collate([inputs], side="left").to(ours.model.device, ours.model.dtype), past)
    while len(said) < new and int(scores.argmax()) not in ours.stop_ids:
        said.append(int(scores.argmax()))
        scores = decode_one(ours.model, torch.tensor([said[-1]]), past)
    return said
