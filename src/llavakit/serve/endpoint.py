"""An OpenAI-compatible endpoint as ``serve.same`` asks it: plain calls with the standard library, and waiting until it is there."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from llavakit.errors import ConfigError, RefusedError, ResponderError, UnavailableError
from llavakit.responder import faults
from llavakit.types import Conversation

_MOST = 16 * 2**20  # bytes of a reply


@dataclass(frozen=True, kw_only=True)
class Answer:
    """``prompt_tokens`` and ``tokens`` (the reply's, from its log-probabilities) are None where the endpoint does not tell."""

    text: str
    prompt_tokens: int | None = None
    tokens: tuple[str, ...] | None = None


class Endpoint:
    """``url`` with or without /v1. ``key`` goes into the header and nowhere else; no redirect is followed with it.

    Raises ConfigError for an address that is none; ``ask`` raises RefusedError for a question it will not take, other ResponderErrors
    where it cannot be asked.
    """

    def __init__(self, url: str, *, model: str | None = None, key: str | None = None, timeout: float = 300.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            what, remedy = f"{url!r} is no address of a server", "write it as http://127.0.0.1:8000"
            raise ConfigError(what, code="bad_url", where="--api", remedy=remedy)
        self.root = url.rstrip("/").removesuffix("/v1")
        self.key, self.timeout = key, timeout
        near = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        proxies = [urllib.request.ProxyHandler({})] if near else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)
        self._logprobs = True
        self._model = model

    @property
    def model(self) -> str:
        """The name that was given, or the first that the endpoint lists."""
        if self._model is None:
            listed = self._call("/v1/models")
            try:
                self._model = str(listed["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise faults.unavailable("it lists no model", "malformed", self.root) from None
        return self._model

    def ask(self, asked: Conversation, new: int) -> Answer:
        """The greedy reply, of at most ``new`` tokens."""
        body: dict[str, Any] = {"model": self.model, "messages": asked.to_openai(), "temperature": 0, "max_tokens": new}
        if self._logprobs:
            try:
                return _answer(self._call("/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 1}), self.root)
            except RefusedError:
                self._logprobs = False  # many servers have none: ask again without, once and for all
        return _answer(self._call("/v1/chat/completions", body), self.root)

    def ready(self) -> bool:
        """Whether it says that it can be asked."""
        try:
            with self._opener.open(self._request("/health"), timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def wait(self, seconds: float, *, alive: Callable[[], bool] = lambda: True, pause: float = 1.0) -> None:
        """Until it is ready. Raises UnavailableError ``not_ready`` when it is not in time, or ``alive`` says that it never will be."""
        end = time.monotonic() + seconds
        while not self.ready():
            if not alive() or time.monotonic() > end:
                what = f"it was not ready within {seconds:g} s" if alive() else "it ended before it was ready"
                raise UnavailableError(what, code="not_ready", where=self.root, remedy="read what it printed")
            time.sleep(pause)

    def _request(self, path: str, body: object = None) -> urllib.request.Request:
        data, headers = None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "llavakit"}
        request = urllib.request.Request(self.root + path, data=data, headers=headers)
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        return request

    def _call(self, path: str, body: object = None) -> Any:
        failed: ResponderError
        try:
            with self._opener.open(self._request(path, body), timeout=self.timeout) as reply:
                return json.loads(reply.read(_MOST))
        except urllib.error.HTTPError as error:
            headers = {name.lower(): value for name, value in error.headers.items()}
            failed = faults.fault(error.code, self._said(error.read(_MOST)), headers, where=self.root, key_variable="its variable")
        except OSError as error:
            failed = faults.unavailable(self._scrubbed(str(getattr(error, "reason", error))), "no_connection", self.root)
        except ValueError:
            failed = faults.unavailable("its reply is no JSON", "malformed", self.root)
        raise failed

    def _said(self, words: bytes) -> object:
        text = self._scrubbed(words.decode(errors="replace"))
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _scrubbed(self, text: str) -> str:
        return text.replace(self.key, "(the key)") if self.key else text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _answer(reply: Any, where: str) -> Answer:
    try:
        choice = reply["choices"][0]
        text, usage = choice["message"].get("content") or "", reply.get("usage") or {}
        counted = usage.get("prompt_tokens")
        return Answer(text=str(text), prompt_tokens=counted if isinstance(counted, int) else None, tokens=_tokens(choice.get("logprobs")))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise faults.unavailable("its reply holds no choices as they should be", "malformed", where) from None


def _tokens(told: object) -> tuple[str, ...] | None:
    """The chosen tokens, where log-probabilities came with them."""
    content = told.get("content") if isinstance(told, Mapping) else None
    if not content:
        return None
    return tuple(str(one["token"]) for one in content if math.isfinite(float(one["logprob"])))
