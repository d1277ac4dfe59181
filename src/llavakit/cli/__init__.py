"""The command ``llava``: one small module a command, each of which parses, builds values and calls one function.

    __init__     main: words -> exit code            ask  chat  show  demo      look at pictures
    app          the table command -> function       train  data  scenes  miniature   make models and data
    border       errors, warnings and exit codes     environment                a report for bug threads
    options      options that commands share         terminal                   consoles and small pictures
    serve  batch               models for many at once: by HTTP, from a file
    info  verify  convert      checkpoints: what they are, whether they agree with transformers, from layout to layout
    generate  caption  asking  instruction data and captions by a teacher; whom to ask, and how far it has come
    concepts                   a balanced part of many captions
    eval                       benchmarks: questions, answers, scores
    plan  preflight            what a training run takes; what is looked at before its first step

Results go to stdout, all else to stderr. Only typer is imported before a command runs, so that ``llava --help`` is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llavakit.cli import border


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return the exit code (``border`` lists them)."""
    given = list(sys.argv[1:] if words is None else words)
    debug, given = _take_debug(given)
    with border.streams():
        return border.guard(lambda: _run(given), debug=debug)


def _run(words: list[str]) -> int:
    from llavakit.cli.app import app
    from llavakit.model.teams import wait_briefly

    wait_briefly()
    try:
        code = app(words, prog_name="llava", standalone_mode=False)
    except SystemExit as stop:  # how typer and rich leave when the reader of stdout is gone
        if stop.code == 1:
            raise BrokenPipeError from stop
        return border.OK
    if code == border.INTERRUPTED:  # typer has turned Ctrl-C into its code
        raise KeyboardInterrupt
    return code if isinstance(code, int) else border.OK


def _take_debug(words: list[str]) -> tuple[bool, list[str]]:
    """``--debug`` may stand anywhere before ``--``: it is a matter of this border, not of one command."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return len(kept) < end, kept + words[end:]
