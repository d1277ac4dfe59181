"""What went wrong with a call, as one of our errors: HTTP statuses and broken connections -> wait, try again, skip this one, or stop.

429                                    ThrottledError    wait, as long as told            429 for want of credit, 401, 402, 403, 404
5xx, timeouts, broken connections      UnavailableError  try again                        ResponderError: nobody will be answered, stop
400, 413, 422 and other 4xx            RefusedError      skip this question
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import mktime_tz, parsedate_tz

from llavakit.errors import RefusedError, ResponderError, ThrottledError, UnavailableError

NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
LATER = (408, 409, 425)
STOPS = {  # status -> code, remedy
    401: ("bad_key", "put the right key into {key}"),
    402: ("no_credit", "add credit and run again: every reply that was paid for is kept"),
    403: ("forbidden", "this key may not use the model, or not from here"),
    404: ("no_such_model", "check the model's name and the address"),
    405: ("wrong_address", "the address ends in /v1 as a rule"),
}
_LONGEST = 300  # characters of a server's own words
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def fault(status: int, body: object, headers: Mapping[str, str], *, where: str, key_variable: str = "") -> ResponderError:
    """The error for a reply whose status is not 200. ``where`` is the address; no secret may be in it."""
    code, said = _read(body)
    what = f"the server answers {status}" + (f": {said}" if said else "")
    if status == 429 and code not in NO_CREDIT:
        throttled = ThrottledError(what, code="throttled", where=where, remedy="ask for less at once")
        throttled.retry_after = wait_asked(headers)
        return throttled
    if status == 429 or status in STOPS:
        name, remedy = STOPS[402 if status == 429 else status]
        return ResponderError(what, code=name, where=where, remedy=remedy.format(key=key_variable or "the environment"))
    if status >= 500 or status in LATER:
        failed = unavailable(what, "server_error", where)
        failed.retry_after = wait_asked(headers)
        return failed
    if status >= 400:
        return RefusedError(what, code="refused", where=where, remedy="look at this one question")
    return ResponderError(what, code="wrong_address", where=where, remedy=STOPS[405][1])


def unavailable(what: str, code: str, where: str) -> UnavailableError:
    """A call without an answer."""
    return UnavailableError(what, code=code, where=where, remedy="try again later")


def wait_asked(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds to wait by ``Retry-After`` (a number or an HTTP date) or ``retry-after-ms``; None where nothing sensible is said."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        said = headers.get(name)
        try:
            seconds = float(said or "") / unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    date = parsedate_tz(headers.get("retry-after", ""))
    try:
        return None if date is None else max(0.0, mktime_tz(date) - (time.time() if now is None else now))
    except (ValueError, OverflowError):
        return None


def one_line(text: str) -> str:
    """A server's words as they may stand in a message: no control characters, not too long."""
    text = _UNSEEN.sub(" ", text).strip().rstrip(".")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _read(body: object) -> tuple[str, str]:
    """An error's code and words from what servers send: {"error": {"code", "type", "message"}}, {"error": text}, {"detail": text}, text."""
    held = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(held, Mapping):
        return "", one_line(held) if isinstance(held, str) else ""
    said = held.get("message", held.get("detail", ""))
    codes = [held.get("code"), held.get("type")]
    return next((code for code in codes if code in NO_CREDIT), str(codes[0] or "")), one_line(str(said))
