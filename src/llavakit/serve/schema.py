"""A chat request, from bytes to an ``Ask``: strict where meaning could be lost, deaf to what has none.

    bytes --parse--> JSON without duplicate keys, NaN, depth --ChatRequest--> typed --refuse_unsupported--> --ask--> Ask

What we do not do is refused when a client asks for it (A11) and let through when it says the default; unknown fields are ignored and
named in the log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from llavakit.errors import RequestError
from llavakit.serve.faults import refuse
from llavakit.serve.protocol import Ask, Detail
from llavakit.types import Conversation, Image, Message, Part, Sampling, Text

DEFAULT_TOKENS = 512  # of a reply whose length nobody named
MAX_DEPTH = 64
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


class Body(BaseModel):
    """Strict types, further fields kept for the log, no infinities."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 1.0 is whole."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


def _within(**said: float) -> Any:
    """Optional, with a range that is told in /openapi.json; whoever checks it (``Sampling``) owns it."""
    return Field(default=None, json_schema_extra=dict(said))


class ImageURL(Body):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = "auto"


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageURL


class OtherPart(Body):
    """Audio, files, video: known to be something, not to us."""

    type: str


def _kind_of_part(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return {"text": "as text", "image_url": "as picture"}.get(kind if isinstance(kind, str) else "", "as other")


def _kind_of_content(value: Any) -> str:
    return "as string" if isinstance(value, str) else "as parts"


SomePart = Annotated[
    Annotated[TextPart, Tag("as text")] | Annotated[ImagePart, Tag("as picture")] | Annotated[OtherPart, Tag("as other")],
    Discriminator(_kind_of_part),
]
Content = Annotated[Annotated[str, Tag("as string")] | Annotated[list[SomePart], Tag("as parts")], Discriminator(_kind_of_content)]


class ChatMessage(Body):
    role: str = Field(json_schema_extra={"enum": ["system", "developer", "user", "assistant"]})
    content: Content


class StreamOptions(Body):
    include_usage: bool | None = None


class ChatRequest(Body):
    """``POST /v1/chat/completions``."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Whole | None = _within(minimum=1, maximum=1_000_000)
    max_completion_tokens: Whole | None = _within(minimum=1, maximum=1_000_000)
    temperature: float | None = _within(minimum=0, maximum=100)
    top_p: float | None = _within(exclusiveMinimum=0, maximum=1)
    stop: str | list[str] | None = _within(minLength=1, maxItems=16)
    seed: Whole | None = _within(minimum=0, maximum=2**64 - 1)
    n: Whole | None = _within(minimum=1, maximum=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def pictures(self) -> Iterator[tuple[str, ImageURL]]:
        """Every picture with the path of its field, in reading order."""
        for index, message in enumerate(self.messages):
            for number, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if isinstance(part, ImagePart):
                    yield f"messages[{index}].content[{number}].image_url.url", part.image_url


# Fields that change the reply, which we do not have -> the values that ask for nothing. Both OpenAI's and those of vLLM and SGLang.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"), "audio": (),
    "modalities": (["text"], []), "response_format": ({"type": "text"},), "logprobs": (False,), "top_logprobs": (0,), "prompt_logprobs": (),
    "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "prediction": (), "web_search_options": (), "reasoning_effort": ("none",), "verbosity": ("medium",), "best_of": (1,),
    "top_k": (0, -1), "min_p": (0,), "min_tokens": (0,), "use_beam_search": (False,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "bad_words": ([],), "echo": (False,), "continue_final_message": (False,), "add_generation_prompt": (True,), "chat_template": (),
    "chat_template_kwargs": ({},), "structured_outputs": (), "guided_json": (), "guided_regex": (), "guided_choice": (),
    "guided_grammar": (), "regex": (), "ebnf": (), "json_schema": (), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
}  # fmt: skip
# Fields that change nothing in a reply: not worth a line in the log.
_SILENT = frozenset(("user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key", "parallel_tool_calls", "name"))


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object, or RequestError ``invalid_json``."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise _invalid("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # twins, constants, and numbers of thousands of digits
        raise _invalid(str(error).partition(":")[0]) from None
    if not isinstance(value, dict):
        raise _invalid("it is no object")
    if _deep(value):
        raise _invalid("it is nested too deeply")
    return value


def read(value: Mapping[str, Any]) -> ChatRequest:
    """A request of which every field has its type and asks for what we have. Raises RequestError naming the field."""
    try:
        request = ChatRequest.model_validate(value)
    except ValidationError as error:
        raise mistyped(error) from None
    _refuse_unsupported(request)
    return request


def ask(request: ChatRequest, pictures: Sequence[bytes]) -> Ask:
    """The request as a value of ours; ``pictures`` are the bytes of ``request.pictures``. Raises PromptError, SamplingError."""
    queue = iter(pictures)
    messages = tuple(_message(index, message, queue) for index, message in enumerate(request.messages))
    allowed = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if any(_NO_CHARACTER.search(text) for text in stop):
        raise refuse("it holds what is no character", code="bad_characters", where="stop", remedy="send valid Unicode without NUL")
    sampling = Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        max_new_tokens=DEFAULT_TOKENS if allowed is None else allowed,
        stop=stop,
        seed=request.seed,
    )
    return Ask(conversation=Conversation(messages), sampling=sampling, detail=_detail(request), fitted=allowed is None)


def unknown(request: ChatRequest) -> list[str]:
    """Fields that were ignored, for the log."""
    bodies: list[tuple[str, Body]] = [("", request), *((f"messages[{n}].", message) for n, message in enumerate(request.messages))]
    return [where + name for where, body in bodies for name in body.model_extra or () if name not in _SILENT and name not in _NOTHING]


def _message(index: int, message: ChatMessage, pictures: Iterator[bytes]) -> Message:
    role = "system" if message.role == "developer" else message.role
    if role in ("tool", "function"):
        raise _unsupported(f"messages[{index}].role", "tools are not supported")
    if isinstance(message.content, str):
        return Message(role, (Text(message.content),))  # type: ignore[arg-type]  # checked by Conversation
    parts: list[Part] = []
    for number, part in enumerate(message.content):
        if isinstance(part, TextPart):
            parts.append(Text(part.text))
        elif isinstance(part, ImagePart):
            parts.append(Image(next(pictures)))
        else:
            raise _unsupported(f"messages[{index}].content[{number}].type", "parts are 'text' or 'image_url'")
    return Message(role, tuple(parts))  # type: ignore[arg-type]


def _detail(request: ChatRequest) -> Detail:
    """One for all pictures of a request: the engine prepares them alike."""
    wanted = {"high" if picture.detail == "original" else picture.detail or "auto" for _, picture in request.pictures} - {"auto"}
    if len(wanted) > 1:
        raise _unsupported("messages", "pictures of one request have one detail")
    return "auto" if not wanted else "low" if "low" in wanted else "high"


def _refuse_unsupported(request: ChatRequest) -> None:
    if request.n not in (None, 1):
        if request.n is not None and request.n < 1:
            raise refuse("it is not 1 or more", code="bad_parameter", where="n", remedy="leave it out")
        raise _unsupported("n", "one reply a request")
    for name, value in (request.model_extra or {}).items():
        nothing = _NOTHING.get(name)
        if nothing is not None and value is not None and not any(_same(value, none) for none in nothing):
            raise _unsupported(name, "this server does not do that")
    for index, message in enumerate(request.messages):
        for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
            if (message.model_extra or {}).get(name):
                raise _unsupported(f"messages[{index}].{name}", "this server does not do that")


def _same(value: Any, none: Any) -> bool:
    """Equal, where True is not 1."""
    return isinstance(value, bool) == isinstance(none, bool) and bool(value == none)


def _unsupported(where: str, why: str) -> RequestError:
    return refuse(f"{where}: {why}", code="unsupported_parameter", where=where, remedy="leave it out")


def mistyped(error: ValidationError) -> RequestError:
    """What pydantic found, with the path of the field."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    field = found[0]["loc"][0]
    first = max((one for one in found if one["loc"][0] == field), key=lambda one: len(_path(one["loc"])))  # of a union, the nearest branch
    where = _path(first["loc"])
    code = "missing_parameter" if first["type"] == "missing" else "invalid_type"
    said = first["msg"][:1].lower() + first["msg"][1:]
    return refuse(f"{where}: {said}", code=code, where=where)


def _path(loc: Sequence[int | str]) -> str:
    """``messages[0].content[1].type``: pydantic also names the branch of a union that it tried, which is no field."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step != "str":
            path += f".{step}" if path else step
    return path


def _invalid(why: str) -> RequestError:
    return refuse(f"the body is not the JSON we read: {why}", code="invalid_json", remedy="send one JSON object in UTF-8")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _deep(value: Any) -> bool:
    """Whether anything lies deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer) if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
