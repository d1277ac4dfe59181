"""The commands of ``llava`` as one literal table. Their modules import only typer; what a command needs it imports when it runs."""

from __future__ import annotations

from typing import Annotated

from typer import Exit, Option, Typer

from llavakit import __version__
from llavakit.cli import (
    ask,
    batch,
    capacity,
    caption,
    chat,
    concepts,
    convert,
    data,
    demo,
    environment,
    generate,
    info,
    launch,
    miniature,
    plan,
    scenes,
    serve,
    show,
    train,
    verify,
)
from llavakit.cli import eval as evaluation

COMMANDS = (
    ("ask", ask.ask, ask.EXAMPLES),
    ("chat", chat.chat, chat.EXAMPLES),
    ("serve", serve.serve, serve.EXAMPLES),
    ("batch", batch.batch, batch.EXAMPLES),
    ("show", show.show, show.EXAMPLES),
    ("info", info.info, info.EXAMPLES),
    ("plan", plan.plan, plan.EXAMPLES),
    ("verify", verify.verify, verify.EXAMPLES),
    ("launch", launch.launch, launch.EXAMPLES),
    ("capacity", capacity.capacity, capacity.EXAMPLES),
    ("concepts", concepts.concepts, concepts.EXAMPLES),
    ("convert", convert.convert, convert.EXAMPLES),
    ("generate", generate.generate, generate.EXAMPLES),
    ("caption", caption.caption, caption.EXAMPLES),
    ("demo", demo.demo, demo.EXAMPLES),
    ("env", environment.environment, environment.EXAMPLES),
)
GROUPS = (("train", train.app), ("data", data.app), ("eval", evaluation.app), ("scenes", scenes.app), ("miniature", miniature.app))
EPILOG = """Try it:  llava demo   and   llava ask photo.jpg "What is this?"

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong words, 130 interrupted.
"""
HELP = {"help_option_names": ["-h", "--help"]}


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llava {__version__}")
        raise Exit


def _root(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the trace of an error (may stand anywhere).")] = False,
) -> None:
    """LLaVA: ask pictures questions, and train your own model to do it."""


def build() -> Typer:
    """The whole command line."""
    app = Typer(no_args_is_help=True, rich_markup_mode="rich", context_settings=HELP, pretty_exceptions_enable=False)
    app.callback(epilog=EPILOG)(_root)
    for name, function, examples in COMMANDS:
        app.command(name, epilog=examples, no_args_is_help=name == "ask")(function)
    for name, group in GROUPS:
        app.add_typer(group, name=name)
    return app


app = build()
