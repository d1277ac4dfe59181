"""Whatever goes wrong, as the one shape that clients know: {"error": {"message", "type", "param", "code"}} and a status.

    RequestError          its own status        PromptError, ImageError, SamplingError, ContextError    400
    BusyError             503, Retry-After      anything else                                           500, and not a word of it

A client is told what it can mend. What happened inside goes to the log, under the request's id.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from llavakit.errors import BusyError, ContextError, ImageError, LlavaError, PromptError, RequestError, SamplingError

MENDABLE = (PromptError, ImageError, SamplingError, ContextError)
_PARAM = re.compile(r"[a-z_]+(\[\d+\]|\.[a-z_]+)*")
_NAMES = {"conversation": "messages", "max_new_tokens": "max_tokens"}  # ours -> the API's
_TYPES = {401: "authentication_error", 403: "permission_error"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An error as it is sent."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refuse(what: str, *, code: str, where: str = "", remedy: str = "", status: int = 400) -> RequestError:
    """A RequestError with its status."""
    error = RequestError(what, code=code, where=where, remedy=remedy)
    error.status = status
    return error


def busy(what: str, *, code: str, retry_after: float = 1.0) -> BusyError:
    error = BusyError(what, code=code, remedy="try again later")
    error.retry_after = retry_after
    return error


def fault(error: BaseException) -> Fault:
    """What a client is told of an error."""
    if isinstance(error, BusyError):
        return Fault(status=503, message=_said(error), code=error.code, headers={"retry-after": str(max(1, math.ceil(error.retry_after)))})
    if isinstance(error, RequestError):
        return Fault(status=error.status, message=_said(error), code=error.code, param=_param(error.where))
    if isinstance(error, MENDABLE):
        return Fault(status=400, message=_said(error), code=error.code, param=_param(error.where))
    return Fault(status=500, message="the server failed at this request; its log says more under the request's id", code="internal_error")


def _said(error: LlavaError) -> str:
    return f"{error.what}. {error.remedy}" if error.remedy else error.what


def _param(where: str) -> str | None:
    """The field of the request that ``where`` names, or None where it names something of ours."""
    where = _NAMES.get(where, where)
    return where if where != "image" and _PARAM.fullmatch(where) else None
