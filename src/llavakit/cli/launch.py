"""``llava launch``: the line that serves a checkpoint with SGLang or vLLM, printed, or run in that engine's own environment and checked."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from llavakit.cli import options, terminal
from llavakit.errors import ConfigError, LlavaError

if TYPE_CHECKING:
    from llavakit.model.cards import Card
    from llavakit.serve.launch import Launch

EXAMPLES = """Examples:

  llava launch my-llava --engine vllm --gpu A100-80 --print
  llava launch my-llava --engine sglang --gpu L4 --devices 4 --print
  llava launch my-llava --engine vllm --python envs/vllm       (runs it, waits for it, compares it with this package)
  llava launch my-llava --engine vllm --gpu L4 --router http://10.0.0.1:8000 --router http://10.0.0.2:8000 --print
"""
HERE = "here"
OUTSIDE = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # of our environment: nothing for another one


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How another engine is started, as options; ``llava serve --engine`` has the same."""

    gpu: Annotated[str, Option("--gpu", metavar="CARD", help="The card it will run on, or here: this machine's.")] = HERE
    devices: Annotated[int, Option("--devices", min=1, help="How many cards on one machine.")] = 1
    images: Annotated[int | None, Option("--images", min=1, help="Pictures in a request (default: as many as fit).")] = None
    context: Annotated[int | None, Option("--context", min=1, help="Tokens of prompt and reply (default: the model's).")] = None
    name: Annotated[str | None, Option("--name", help="The model's name in the API (default: the folder's).")] = None
    media_domain: Annotated[
        list[str] | None, Option("--media-domain", metavar="HOST", help="vLLM: whence remote pictures may come (default: none).")
    ] = None
    python: Annotated[
        Path | None, Option("--python", metavar="ENV", help="The engine's own environment: its folder or its interpreter.")
    ] = None
    print_only: Annotated[bool, Option("--print", help="Print the line instead of running it.")] = False
    check: Annotated[bool, Option("--check/--no-check", help="Compare its answers with this package's once it is ready.")] = True
    wait: Annotated[float, Option("--wait", metavar="SECONDS", help="How long it may take to be ready.")] = 1800.0
    router: Annotated[
        list[str] | None, Option("--router", metavar="URL", help="Print the router's line for engines at these addresses too.")
    ] = None


@options.spread
def launch(
    model: Annotated[str | None, Argument(metavar="MODEL", show_default=False, help="A folder, a built-in model or a Hub id.")] = None,
    engine: Annotated[str, Option("--engine", help="vllm or sglang.")] = "vllm",
    host: Annotated[str, Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option("--port", min=1, max=65535, help="The port to listen on.")] = 8000,
    key: Annotated[
        str, Option("--api-key-env", metavar="VARIABLE", help="The variable that holds the API key; none is asked for where it is unset.")
    ] = "LLAVA_API_KEY",
    revision: options.Revision = None,
    *,
    how: Engine,
) -> None:
    """Serve a checkpoint with SGLang or vLLM: the exact line for its format, prompt, pictures and your cards."""
    engine_command(engine, model, how, host=host, port=port, key=key, revision=revision)


def engine_command(
    engine: str, model: str | None, how: Engine, *, host: str = "127.0.0.1", port: int = 8000, key: str = "LLAVA_API_KEY",
    revision: str | None = None, packed: str | None = None,
) -> None:  # fmt: skip
    """Print the line, or run it until it ends. ``packed``: what ``--quantize`` said, which no engine reads.

    Raises LlavaError for what the engine cannot serve; Exit with the engine's failure.
    """
    from typing import get_args

    from llavakit.checkpoint import places
    from llavakit.serve import launch as room

    if engine not in get_args(room.Engine):
        raise ConfigError(f"no engine {engine!r}", code="bad_value", where="--engine", remedy=f"use one of {', '.join(room.ENGINES)}")
    options.quiet()
    python = None if how.python is None else _interpreter(how.python)
    if python is None and not how.print_only:
        what = f"{engine} needs an environment of its own: it pins other releases than this package"
        made = f"uv venv ENV && uv pip install --python ENV {engine}"
        raise ConfigError(what, code="no_environment", where="--python", remedy=f"make one ({made}) and give --python ENV, or --print")
    folder = places.find(model, revision=revision)
    made_line = room.launch(
        engine,  # type: ignore[arg-type]  # looked up above
        room.facts(folder), _card(how.gpu), devices=how.devices, pictures=how.images, context=how.context, name=how.name, host=host,
        port=port, key=key if os.environ.get(key) else None, domains=how.media_domain or (), packed=packed,
        python=python,
    )  # fmt: skip
    made_line.template_file.write_text(made_line.template, "utf-8")
    for note in (f"wrote {made_line.template_file}: the prompt format", *made_line.notes):
        terminal.err().print(f"note: {note}", markup=False, soft_wrap=True)
    if how.print_only:
        print(made_line.line())
        if how.router:
            print(room.router(made_line.engine, how.router, host=host, port=port))
        return
    run(made_line, folder, check=how.check, wait=how.wait)


def run(made: Launch, folder: Path, *, check: bool, wait: float) -> None:
    """Start it, wait until it is ready, compare, and stay until it ends. Raises UnavailableError where it never becomes ready."""
    from llavakit.serve.endpoint import Endpoint

    secret = os.environ.get(made.key) if made.key else None
    inherited = {name: value for name, value in os.environ.items() if name not in OUTSIDE}
    given = dict(made.environment) | ({"VLLM_API_KEY": secret} if secret and made.engine == "vllm" else {})
    words = [*made.words, *(["--api-key", secret] if secret and made.engine == "sglang" else [])]
    try:
        process = subprocess.Popen(words, env=inherited | given)
    except OSError as error:
        what, remedy = f"{made.engine} cannot be started ({error.strerror})", f"install it there: uv pip install --python ENV {made.engine}"
        raise ConfigError(what, code="no_environment", where=words[0], remedy=remedy) from error
    try:
        endpoint = Endpoint(made.address, key=secret)
        endpoint.wait(wait, alive=lambda: process.poll() is None)
        terminal.err().print(f"ready: {made.address}/v1", markup=False)
        if check:
            _check(endpoint, folder)
        code = process.wait()
    finally:
        _end(process)
    if code:
        raise Exit(1)


def _check(endpoint: object, folder: Path) -> None:
    """What it answers beside what we answer. It goes on serving either way: the reader decides."""
    from llavakit.assistant import Assistant
    from llavakit.cli.verify import show
    from llavakit.serve.endpoint import Endpoint
    from llavakit.serve.same import compare

    assert isinstance(endpoint, Endpoint)
    try:
        found = compare(endpoint.ask, Assistant.load(folder, device="cpu"))  # the cards are taken
    except LlavaError as error:
        terminal.err().print(f"warning: it could not be compared: {error}", markup=False, soft_wrap=True)
        return
    show(found, endpoint.root, as_json=False)
    sys.stdout.flush()
    if not found.agrees:
        terminal.err().print("warning: it does not answer as the checkpoint does here; see above", markup=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _interpreter(given: Path) -> Path:
    """The interpreter of an environment that is not ours. Raises ConfigError."""
    python = given / "bin" / "python" if given.is_dir() else given
    if not python.exists():
        what, remedy = "there is no interpreter", "give an environment's folder, or its bin/python"
        raise ConfigError(what, code="no_environment", where=str(python), remedy=remedy)
    if python.absolute().parent.parent == Path(sys.prefix).absolute():
        what, remedy = "this is our own environment", "make another: engines pin other releases of torch and transformers"
        raise ConfigError(what, code="no_environment", where="--python", remedy=remedy)
    return python.absolute()


def _card(name: str) -> Card:
    """A card of the table, or this machine's."""
    from llavakit.model.cards import Card, card

    if name != HERE:
        return card(name)
    import torch

    if not torch.cuda.is_available():
        what, remedy = "there is no GPU here", "name the card it will run on, as --gpu A100-80"
        raise ConfigError(what, code="unknown_card", where="--gpu", remedy=remedy)
    size = torch.cuda.get_device_properties(0).total_memory
    return replace(Card(memory=size / 2**30, peak=0.0), bf16=torch.cuda.is_bf16_supported(including_emulation=False))
