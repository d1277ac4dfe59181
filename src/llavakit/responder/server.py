"""Any OpenAI-compatible server as the one who replies: OpenAI, vLLM, SGLang, Ollama, gateways.

    complete(query)   one whole reply; no retries here, the pool knows when and what to ask again
                      https, or a proxy: the official AsyncOpenAI, one for every 32 calls      plain http: our own ``wire``
    reply(talk)       pieces of text as they come, for one who reads along: the official client and its own two retries

The key comes from the environment or the system's keyring and goes into the header of requests, nowhere else: every word of a server is
scrubbed of it. ``OPENAI_API_KEY``, which many have set, is not sent to other machines over plain http.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from llavakit.errors import ConfigError, LlavaError, MissingExtraError, ResponderError, SamplingError
from llavakit.responder import faults
from llavakit.responder.protocol import Completion, Finish, Query, Usage
from llavakit.responder.wire import Wire
from llavakit.types import Conversation, Sampling

OPENAI = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
LANE = 32  # calls on one client: its pool of connections is searched at every call, and it keeps 100 at most
_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "content_filter": "filter"}
_NO_KEY = "none"  # the client insists on one


class ServerCompleter:
    """A model on a server: a ``Completer`` and a ``Responder``.

    ``timeout`` is seconds for a whole reply; ``extra`` are further fields of the request, such as ``reasoning_effort``, and part of the
    name, so of every key in a ledger; ``direct=False`` takes the official client for plain http too. Raises ConfigError for an address
    it cannot use, ResponderError where a key is needed and none is set, MissingExtraError where ``openai`` is needed and not installed.
    """

    at_once = 4096

    def __init__(
        self,
        model: str,
        *,
        base_url: str = OPENAI,
        key_variable: str = OPENAI_KEY,
        timeout: float = 300.0,
        connect_timeout: float = 10.0,
        extra: Mapping[str, Any] | None = None,
        direct: bool = True,
    ) -> None:
        self.model, self.base_url, self.key_variable = model, base_url.rstrip("/"), key_variable
        self.timeout, self.connect_timeout, self.extra = timeout, connect_timeout, dict(extra or {})
        self.name = model + (f"+{_digest(self.extra)}" if self.extra else "")
        self._parts = _address(self.base_url)
        self._key = _key(self._parts.scheme, self._parts.hostname or "", key_variable, self.base_url)
        self._direct = direct and self._parts.scheme == "http" and not _has_proxy(self._parts.hostname or "")
        self._openai: Any = None if self._direct else _client_package()
        self._wire: Wire | None = None
        self._lanes: list[_Lane] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"ServerCompleter({self.model!r}, base_url={self.base_url!r})"

    async def complete(self, query: Query) -> Completion:
        body = self._body(query.conversation, query.sampling)
        headers = {"Idempotency-Key": query.key(self.name)}
        self._enter_loop()
        errors = (OSError, ValueError, RecursionError, *([] if self._direct else [self._openai.OpenAIError]))
        try:
            async with asyncio.timeout(self.timeout):
                return self._read(await (self._by_wire(body, headers) if self._direct else self._by_client(body, headers)))
        except errors as error:
            failed = self._fault(error)
        raise failed  # outside, so that no request with its key hangs on the error

    async def _by_wire(self, body: dict[str, Any], headers: dict[str, str]) -> object:
        self._wire = self._wire or Wire(self._parts.hostname, self._parts.port or 80, connect_timeout=self.connect_timeout)
        headers |= {"Host": self._parts.netloc, "User-Agent": "llavakit", "Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        status, told, reply = await self._wire.post(self._parts.path + "/chat/completions", headers, json.dumps(body).encode())
        if not 200 <= status < 300:
            raise self._refusal(status, _json(reply), told)
        return json.loads(reply)

    async def _by_client(self, body: dict[str, Any], headers: dict[str, str]) -> object:
        lane = self._lane()
        lane.under_way += 1
        try:
            return await lane.client.post("/chat/completions", cast_to=object, body=body, options={"headers": headers})
        finally:
            lane.under_way -= 1

    def reply(self, conversation: Conversation, sampling: Sampling = Sampling()) -> Iterator[str]:  # noqa: B008  # frozen
        """Pieces of text as the server sends them. Raises UnavailableError when the stream breaks off before its end."""
        failed: LlavaError = faults.unavailable("the reply broke off", "cut", self.base_url)
        body, begun = self._body(conversation, sampling) | {"stream": True}, False
        openai = self._openai = self._openai or _client_package()
        client = openai.OpenAI(base_url=self.base_url, api_key=self._key or _NO_KEY, timeout=self._timeouts())
        try:
            with client, client.chat.completions.create(**_known(body)) as stream:
                begun, finish = True, None
                for chunk in stream:
                    for choice in chunk.choices[:1]:
                        finish = choice.finish_reason or finish
                        if choice.delta.content:
                            yield choice.delta.content
            if finish:
                return
        except (openai.OpenAIError, ValueError) as error:
            said = f"the reply broke off ({self._clean(str(error))})"
            failed = faults.unavailable(said, "cut", self.base_url) if begun else self._fault(error)
        except Exception as error:  # where a stream breaks off, older clients show their transport's own errors
            if not type(error).__module__.startswith("http"):
                raise
        raise failed

    async def close(self) -> None:
        lanes, wire = self._lanes, self._wire
        self._lanes, self._wire = [], None
        for lane in lanes:
            await lane.client.close()
        if wire:
            await wire.close()

    def _enter_loop(self) -> None:
        """Connections belong to the event loop that made them."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._lanes, self._wire = loop, [], None

    def _body(self, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
        if sampling.num_beams > 1:
            raise SamplingError("servers do not search", code="bad_parameter", where="num_beams", remedy="use num_beams 1")
        # OpenAI's newer models know only the first name, other servers surely know the second
        allowance = "max_completion_tokens" if self._parts.hostname == urlsplit(OPENAI).hostname else "max_tokens"
        body = {
            "model": self.model,
            "messages": conversation.to_openai(),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            allowance: sampling.max_new_tokens,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        return body | self.extra

    def _read(self, reply: object) -> Completion:
        """A reply as it should be, or ValueError."""
        if not isinstance(reply, Mapping):
            raise ValueError("no JSON object")
        if "error" in reply and not reply.get("choices"):  # gateways say 200 and then that the server behind them failed
            status = reply["error"].get("code") if isinstance(reply["error"], Mapping) else None
            raise self._refusal(status if isinstance(status, int) and 400 <= status < 600 else 502, reply, {})
        try:
            choice = reply["choices"][0]
            text, ended = choice["message"].get("content") or choice["message"].get("refusal"), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"no choices as they should be ({type(error).__name__})") from None
        finish = _FINISH.get(ended, "stop") if isinstance(ended, str) else "cut"
        return Completion(text=_words(text), finish=finish, model=_words(reply.get("model")), usage=_usage(reply.get("usage")))

    def _fault(self, error: BaseException) -> LlavaError:
        """The client's or the wire's error as ours, without the key."""
        openai, where = self._openai, self.base_url
        if openai and isinstance(error, openai.APIStatusError):
            return self._refusal(error.status_code, error.body, error.response.headers)
        if isinstance(error, TimeoutError) or (openai and isinstance(error, openai.APITimeoutError)):
            return faults.unavailable(f"no reply within {self.timeout:g} s", "timeout", where)
        if isinstance(error, OSError) or (openai and isinstance(error, openai.APIConnectionError)):
            said = error if isinstance(error, OSError) else error.__cause__
            return faults.unavailable(self._clean(str(said or "")) or "the connection broke off", "no_connection", where)
        if isinstance(error, ValueError | RecursionError):
            return faults.unavailable(f"the reply is malformed: {self._clean(str(error))}", "malformed", where)
        return ResponderError(self._clean(str(error)), code="client", where=where)

    def _refusal(self, status: int, body: object, headers: Mapping[str, str]) -> ResponderError:
        scrubbed = json.loads(self._scrub(json.dumps(body)))
        return faults.fault(status, scrubbed, headers, where=self.base_url, key_variable=self.key_variable)

    def _clean(self, text: str) -> str:
        return faults.one_line(self._scrub(text))

    def _scrub(self, text: str) -> str:
        return text.replace(self._key, "(the key)").replace(json.dumps(self._key)[1:-1], "(the key)") if self._key else text

    def _lane(self) -> _Lane:
        """The client with the fewest calls under way, or a new one."""
        lane = min(self._lanes, key=lambda lane: lane.under_way, default=None)
        if lane is None or lane.under_way >= LANE:
            key = self._key or _NO_KEY
            lane = _Lane(self._openai.AsyncOpenAI(base_url=self.base_url, api_key=key, timeout=self._timeouts(), max_retries=0))
            self._lanes.append(lane)
        return lane

    def _timeouts(self) -> Any:
        return self._openai.Timeout(self.timeout, connect=self.connect_timeout)


class _Lane:
    def __init__(self, client: Any) -> None:
        self.client, self.under_way = client, 0


def _known(body: dict[str, Any]) -> dict[str, Any]:
    """Fields as the client's method takes them: those it may not know go around it."""
    named = ("model", "messages", "temperature", "top_p", "max_completion_tokens", "max_tokens", "stop", "seed", "stream")
    return {name: body[name] for name in named if name in body} | {"extra_body": {n: v for n, v in body.items() if n not in named}}


def _json(said: bytes) -> object:
    """A server's words about an error, which may be JSON."""
    try:
        return json.loads(said)
    except (ValueError, RecursionError):
        return said.decode(errors="replace")


def _words(text: object) -> str:
    """Text that can be written: JSON may spell halves of characters."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def _usage(counted: object) -> Usage | None:
    """Tokens as the server counts them, where it does."""
    counts = [counted.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(counted, Mapping) else []
    if len(counts) == 2 and all(isinstance(count, int) and 0 <= count < 2**40 for count in counts):
        return Usage(prompt_tokens=counts[0], reply_tokens=counts[1])
    return None


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def _address(base_url: str) -> Any:
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        parts, usable = urlsplit(""), False
    if "@" in parts.netloc or parts.query:
        remedy = "put the key into the environment"
        raise ConfigError("the server's address holds a user, a password or a query", code="secret_in_url", where="base_url", remedy=remedy)
    if not usable:
        remedy = "write it as http://localhost:8000/v1"
        raise ConfigError(f"{base_url!r} is no address of a server", code="bad_url", where="base_url", remedy=remedy)
    return parts


def _has_proxy(host: str) -> bool:
    return not urllib.request.proxy_bypass(host) and bool({"http", "all"} & set(urllib.request.getproxies()))


def _key(scheme: str, host: str, variable: str, where: str) -> str | None:
    """The key to send, or None where none is needed. Raises ResponderError where one is and none is found."""
    local = host in ("localhost", "::1") or host.startswith("127.")
    if scheme == "http" and not local and variable == OPENAI_KEY:
        return None
    if found := (os.environ.get(variable) or _from_keyring(variable) or "").strip():
        if not found.isascii() or not found.isprintable():
            raise ResponderError(f"{variable} holds characters that no key has", code="bad_key", where=where, remedy="set it anew")
        return found
    if scheme == "http" and variable == OPENAI_KEY:
        return None
    raise ResponderError("this server needs a key", code="no_key", where=where, remedy=f"set {variable} in the environment")


def _from_keyring(variable: str) -> str | None:
    """From the system's keyring, service ``llavakit``, where the ``keyring`` package is installed and has an answer."""
    try:
        keyring = importlib.import_module("keyring")
    except ImportError:
        return None
    try:
        found = keyring.get_password("llavakit", variable)
    except Exception:  # no backend, locked, no session: many kinds, all mean that there is no key here
        return None
    return found if isinstance(found, str) else None


def _client_package() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        remedy = "pip install 'llavakit[generate]'"
        raise MissingExtraError("asking a server needs the openai package", code="missing_extra", remedy=remedy) from error
