"""Where errors end: each becomes one line on stderr and an exit code, never a traceback (``--debug`` shows it).

0    done                                     1    it failed: ``error: what. remedy``
2    the command line is wrong                130  interrupted (Ctrl-C)
141  the reader of our output went away (``| head``): not a word
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from typer import Abort, Exit, TyperException

from llavakit.errors import ConfigError, LlavaError, SamplingError

OK, FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
WRONG_WORDS = (ConfigError, SamplingError)  # an option or its value is wrong: as if the parser had found it


def guard(action: Callable[[], int], *, debug: bool = False) -> int:
    """Run ``action``; whatever it raises becomes a line and a code. A broken pipe is noticed at the flush at the latest."""
    try:
        code = action()
        sys.stdout.flush()
        return code
    except Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, Abort):
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except Exception as error:  # the last border: nothing may leave as a traceback
        if debug:
            traceback.print_exc()
        if not isinstance(error, TyperException) or error.format_message():  # "no words given" has printed the help and says nothing
            _say(line(error))
        _settle_stdout()
        return code_of(error)


def code_of(error: Exception) -> int:
    """The exit code that an error means."""
    if isinstance(error, WRONG_WORDS):
        return USAGE
    return error.exit_code if isinstance(error, TyperException) else FAILED


def line(error: Exception) -> str:
    """``error: what. remedy`` on one line, without control characters (a file name may hold any)."""
    return "error: " + one_line(_words(error))


def one_line(text: str) -> str:
    """Blanks and line breaks become one blank, other unprintable characters ``?``."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def harmless(text: str) -> str:
    """Text that cannot steer a terminal: control characters but tab and line end become ``?``. A model may write anything."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "?" for c in text)


def _words(error: Exception) -> str:
    if isinstance(error, LlavaError):
        return str(error)
    if isinstance(error, TyperException):
        what = error.format_message().rstrip(".")
        return f"{what[:1].lower()}{what[1:]}. llava --help lists the commands, llava COMMAND --help the options"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror.lower()}. check the path, the permissions and the free space"
    if isinstance(error, MemoryError):
        return "out of memory. use a smaller model, a shorter prompt or fewer pictures"
    return f"{type(error).__name__}: {error} (a fault of llavakit's own). run again with --debug and report it with the output of llava env"


@contextmanager
def streams() -> Iterator[None]:
    """Warnings as lines on stderr, only ours; text streams that take any character."""
    _reconfigure(sys.stdout, errors="replace")  # a terminal of few letters shows "?" rather than an error in the middle of a reply
    _reconfigure(sys.stderr, errors="replace")
    _reconfigure(sys.stdin, errors="surrogateescape")  # bytes that are no text go on to the prompt's own check
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"llavakit\b")
        warnings.showwarning = _warn
        yield


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    _say(f"warning: {one_line(str(message))}")


def _reconfigure(stream: TextIO | None, *, errors: str) -> None:
    """Set what happens to characters that cannot be; a replaced stream (a test's, a notebook's) may not know how, and stays."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _settle_stdout() -> None:
    """Write what is left; where that fails too (a full disk), once is enough to say so."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()


def _drop_stdout() -> None:
    """What is still buffered goes nowhere, so that the interpreter's last flush says nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
