"""Every error a user can meet, as one tree.

    LlavaError
    +-- ImageError           one picture cannot be used            (hardening I rows)
    +-- PromptError          the conversation cannot be asked      (P rows)
    +-- SamplingError        a decoding parameter is out of range  (P10)
    +-- CheckpointError      files do not make a model             (C rows)
    +-- DataError            a training file or sample is wrong    (D rows)
    +-- ConfigError          an option or override is wrong
    +-- TrainingError        a run cannot start or go on           (T rows)
    +-- ContextError         more tokens than the model's context  (P4)
    +-- ResponderError       a teacher or judge does not reply     (G rows)
    |   +-- ThrottledError   ... asks us to wait
    |   +-- UnavailableError ... fails for now: trying again may help
    |   +-- RefusedError     ... will not take this one question
    +-- BusyError            our own server has no room now        (S2, S4)
    +-- RequestError         a request over HTTP is not served     (A rows)
    +-- MissingExtraError    an optional dependency is not installed

Each carries a stable ``code`` (programs match on it), ``what`` happened, ``where`` (the offending file, field or value) and
the ``remedy``. ``str(error)`` is the one line a person sees. A wrong *call* by our own code is an ``assert``, never one of these.
"""

from __future__ import annotations


class LlavaError(Exception):
    """Base of all errors raised on purpose: one line of what, where and how to fix."""

    def __init__(self, what: str, *, code: str, where: str = "", remedy: str = "") -> None:
        self.code = code
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}. {self.remedy}" if self.remedy else line

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross process borders (loader workers) without losing their fields."""
        return _rebuild, (type(self), self.what, self.code, self.where, self.remedy)


def _rebuild(kind: type[LlavaError], what: str, code: str, where: str, remedy: str) -> LlavaError:
    return kind(what, code=code, where=where, remedy=remedy)


class ImageError(LlavaError):
    """A picture that cannot be decoded, is not allowed, or is too large."""


class PromptError(LlavaError):
    """A conversation that no template can render: wrong order, unknown role, bad characters, image counts that differ."""


class SamplingError(LlavaError):
    """A decoding parameter outside its range; ``where`` names the parameter."""


class CheckpointError(LlavaError):
    """A folder that does not hold a complete, consistent model."""


class DataError(LlavaError):
    """A training file or sample that cannot be used; ``where`` is file, line and id."""


class ConfigError(LlavaError):
    """An unknown option or a value of the wrong type."""


class TrainingError(LlavaError):
    """A run that cannot start, or must stop."""


class ContextError(LlavaError):
    """The prompt, its image tokens and the reply asked for do not fit the model's context."""


class ResponderError(LlavaError):
    """A teacher or judge that cannot be asked at all (no key, no credit, no such model): the whole run stops."""


class ThrottledError(ResponderError):
    """Too many questions (429). ``retry_after`` is how many seconds the server asked us to wait, if it said."""

    retry_after: float | None = None


class UnavailableError(ResponderError):
    """A fault on the way or in the server (5xx, timeouts, broken connections): the same question may succeed later."""

    retry_after: float | None = None


class RefusedError(ResponderError):
    """This question is refused (400, 413, 422): asking it again is of no use, the others are not concerned."""


class BusyError(LlavaError):
    """Our own server has no room now, or is about to stop. ``retry_after`` is how many seconds to wait."""

    retry_after: float = 1.0


class RequestError(LlavaError):
    """A request over HTTP that is not understood, not allowed or not possible; ``where`` names the field. ``status`` is HTTP's."""

    status: int = 400


class MissingExtraError(LlavaError):
    """An optional dependency is not installed; the remedy is the pip line."""
