"""Files of requests, answered into files of responses, in the format of OpenAI's batches and ``vllm run-batch``.

    {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}                               a line of the requests
    {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null | {...}}        a line of the responses

Responses are written as they come, each whole or not at all: after a crash the same command goes on where it was. A line that cannot be
answered gets an error line and the others go on; where it has no ``custom_id`` of its own, ``error.line`` says which one it is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from llavakit.errors import BusyError, DataError, LlavaError
from llavakit.serve import schema
from llavakit.serve.api import begin, placed
from llavakit.serve.faults import fault, refuse
from llavakit.serve.guard import Record
from llavakit.serve.service import Service
from llavakit.serve.stream import whole

URL = "/v1/chat/completions"
_BOM = b"\xef\xbb\xbf"


@dataclass
class Counts:
    """How far a batch has come. ``known``: answered by an earlier run."""

    known: int = 0
    good: int = 0
    bad: int = 0


@dataclass
class Answered:
    """What the responses hold already: the ids, and the numbers of lines without one."""

    ids: set[str] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)

    def add(self, response: Mapping[str, Any]) -> None:
        error = response.get("error")
        if isinstance(error, dict) and isinstance(error.get("line"), int):
            self.lines.add(error["line"])
        elif isinstance(response.get("custom_id"), str):
            self.ids.add(response["custom_id"])


async def answer_all(
    service: Service, requests: Path, responses: Path, *, at_once: int = 32, tell: Callable[[Counts], None] = lambda counts: None
) -> Counts:
    """Answer every line that has no response yet. Raises DataError for files that cannot be used, BusyError when the engine dies."""
    counts = Counts()
    with _opened(requests, "rb") as source, _opened(responses, "a+b") as target, _held(target, responses):
        answered = _heal(target, responses)
        seen: set[str] = set()

        async def settle(number: int, line: bytes) -> None:
            response = await _response(service, number, line, seen, answered)
            if response is None:
                counts.known += 1
            else:
                target.write(json.dumps(response, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                target.flush()
                counts.good += response["error"] is None
                counts.bad += response["error"] is not None
            tell(counts)

        await _all(settle, _lines(source, service.settings.limits.body), at_once)
    return counts


async def _all(settle: Callable[[int, bytes], Any], lines: Iterator[tuple[int, bytes]], at_once: int) -> None:
    """So many at once; the lines are read as they are wanted. The first failure ends all."""

    async def work() -> None:
        for number, line in lines:
            await settle(number, line)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except ExceptionGroup as several:
        raise several.exceptions[0] from None


def _lines(source: BinaryIO, longest: int) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1, blank ones left out. Of one that is too long comes just enough to be refused."""
    number = 0
    while line := source.readline(longest + 2):
        number += 1
        while not line.endswith(b"\n") and (more := source.readline(longest + 2)):
            if more.endswith(b"\n"):
                break
        line = line.removeprefix(_BOM) if number == 1 else line
        if line.strip():
            yield number, line


async def _response(service: Service, number: int, line: bytes, seen: set[str], answered: Answered) -> dict[str, Any] | None:
    """The response to one line, or None where there is one already."""
    name: str | None = None
    try:
        name, body = _request(line, service.settings.limits.body)
        if name in seen:
            name = None
            raise refuse("this custom_id stood in a line before", code="duplicate_custom_id", where="custom_id", remedy="number them")
        seen.add(name)
        if name in answered.ids:
            return None
        return _line(name, number, 200, await _completion(service, body))
    except BusyError:
        raise
    except LlavaError as error:
        if name is None and number in answered.lines:
            return None
        found = fault(error)
        return _line(name, number, found.status, found.body)


def _line(name: str | None, number: int, status: int, body: dict[str, Any]) -> dict[str, Any]:
    error = None
    if status != 200:
        error = {"code": body["error"]["code"], "message": body["error"]["message"]} | ({} if name is not None else {"line": number})
    response = {"status_code": status, "request_id": f"req-{uuid4().hex}", "body": body}
    return {"id": f"batch_req_{uuid4().hex}", "custom_id": name, "response": response, "error": error}


def _request(line: bytes, longest: int) -> tuple[str, Mapping[str, Any]]:
    """custom_id and body of a line. Raises RequestError."""
    if len(line) > longest:
        raise refuse(f"a line of more than {longest:,} bytes", code="request_too_large", status=413, remedy="send smaller pictures")
    value = schema.parse(line)
    name, body = value.get("custom_id"), value.get("body")
    if not isinstance(name, str) or not name:
        raise refuse("there is no custom_id", code="missing_parameter", where="custom_id", remedy="name every line")
    if value.get("method") != "POST" or value.get("url") != URL:
        raise refuse(f"only POST {URL} is answered", code="unsupported_parameter", where="url", remedy=f"ask {URL}")
    if not isinstance(body, dict):
        raise refuse("there is no body", code="missing_parameter", where="body", remedy="put the request there")
    return name, body


async def _completion(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    request = schema.read(body)
    if request.stream:
        raise refuse("files hold whole replies", code="unsupported_parameter", where="stream", remedy="leave it out")
    while True:
        try:
            with service.asking(), placed(request):
                return await whole(await begin(service, request, Record("batch")))
        except BusyError as error:
            if error.code != "overloaded":
                raise
            await asyncio.sleep(min(1.0, error.retry_after))


def _heal(target: BinaryIO, path: Path) -> Answered:
    """What has been answered. A last line that was cut is taken off; any other that is no response is an error: this is another file."""
    answered, whole_until = Answered(), 0
    target.seek(0)
    for number, line in enumerate(target, 1):
        value: Any = None
        with suppress(ValueError, RecursionError):
            value = json.loads(line) if line.endswith(b"\n") else None
        if line.endswith(b"\n") and not (isinstance(value, dict) and "response" in value):
            remedy = "give a new name for the responses"
            raise DataError("this is no response of a batch", code="not_responses", where=f"{path}:{number}", remedy=remedy)
        if value is None:
            break
        answered.add(value)
        whole_until += len(line)
    target.truncate(whole_until)
    return answered


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[BinaryIO]:
    try:
        file = path.open(mode)
    except OSError as error:
        what = f"it cannot be opened ({error.strerror})"
        raise DataError(what, code="bad_file", where=str(path), remedy="check the path and its permissions") from error
    with file:
        yield file  # type: ignore[misc]  # of bytes, by its mode


@contextmanager
def _held(target: BinaryIO, path: Path) -> Iterator[None]:
    """One process writes a file of responses."""
    try:
        import fcntl

        fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            "another process writes it", code="file_in_use", where=str(path), remedy="wait for it, or give another file"
        ) from None
    except (ImportError, OSError):
        pass  # a file system without locks
    yield
