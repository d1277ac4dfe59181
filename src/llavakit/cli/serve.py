"""``llava serve``: models for many at once, by OpenAI's HTTP, with a chat page."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llavakit.cli import launch, options
from llavakit.errors import ConfigError

if TYPE_CHECKING:
    from starlette.routing import Route

    from llavakit.serve.limits import Limits
    from llavakit.serve.protocol import Engine
    from llavakit.serve.service import Service, Settings
    from llavakit.serve.web import Shown

EXAMPLES = """Examples:

  llava serve                                       (the built-in model, at http://127.0.0.1:8000)
  llava serve llava-hf/llava-1.5-7b-hf --quantize 8bit
  LLAVA_API_KEY=secret llava serve my-llava --host 0.0.0.0 --served-name team
  llava serve tiny tiny-next --allow-host "*.wikimedia.org"
  llava serve my-llava --engine vllm --gpu A100-80 --print
"""
MIB = 1 << 20

Models = Annotated[
    list[str] | None, Argument(metavar="[MODEL]...", show_default=False, help="Folders, built-in models or Hub ids (default: tiny).")
]
Host = Annotated[str, Option("--host", metavar="ADDRESS", help="Where to listen; 0.0.0.0 is every network of this machine.")]
Port = Annotated[int, Option("--port", "-p", min=0, max=65535, help="And at which port (0: any that is free).")]
Key = Annotated[
    str | None,
    Option("--api-key", metavar="KEY", envvar="LLAVA_API_KEY", help="Who asks must know it. Better in the environment: others see words."),
]
Names = Annotated[list[str] | None, Option("--served-name", metavar="NAME", help="What clients call the model (may be repeated).")]
AllowHost = Annotated[
    list[str] | None, Option("--allow-host", metavar="HOST", help="Fetch pictures from this host (*.example.org, or * for any public one).")
]
RemoteImages = Annotated[bool, Option("--remote-images", help="Fetch pictures from any public host: short for --allow-host '*'.")]
HostName = Annotated[
    list[str] | None, Option("--host-name", metavar="NAME", help="A name by which browsers may call a server on 127.0.0.1.")
]
Votes = Annotated[Path | None, Option("--votes", metavar="FILE", help="Let the page's users vote, and append their votes here.")]
Worker = Annotated[bool, Option("--worker", help="Answer clients of the original demo's workers too (/worker_generate_stream).")]
Grace = Annotated[float, Option("--grace", min=0, help="Seconds that replies under way have to end, once told to stop.")]
Other = Annotated[
    str | None,
    Option("--engine", metavar="NAME", help="sglang or vllm: write or run its line in place of our engine, as llava launch does."),
]
Quiet = Annotated[bool, Option("--quiet", help="No line for each request.")]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a request may cost: ``serve.limits.Limits`` as options."""

    max_body: Annotated[float, Option("--max-body", min=0.001, metavar="MIB", help="The largest request.")] = 32
    max_images: Annotated[int, Option("--max-images", min=0, help="Pictures of a request, at most.")] = 16
    max_megapixels: Annotated[float, Option("--max-megapixels", min=0.001, help="Of all pictures of a request together.")] = 100

    def limits(self) -> Limits:
        from llavakit.serve.limits import Limits

        body = int(self.max_body * MIB)
        return Limits(
            body=body, bodies=max(8 * body, Limits.bodies), images=self.max_images, bytes=body, pixels=int(self.max_megapixels * 1e6)
        )


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much is done at once: ``serve.room.Limits`` as options; what is left out fits the machine."""

    running: Annotated[int | None, Option("--running", min=1, help="Replies written at once (default: 16; 64 on a GPU).")] = None
    waiting: Annotated[int | None, Option("--waiting", min=0, help="Requests that may wait; more are told to come back.")] = None
    kv_gib: Annotated[float | None, Option("--kv-gib", min=0.001, help="Memory for keys and values (default: of what is free).")] = None

    def chosen(self) -> dict[str, int]:
        kv_bytes = None if self.kv_gib is None else int(self.kv_gib * 2**30)
        given = {"running": self.running, "waiting": self.waiting, "kv_bytes": kv_bytes}
        return {name: value for name, value in given.items() if value is not None}


@options.spread
def serve(
    models: Models = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    served_name: Names = None,
    allow_host: AllowHost = None,
    remote_images: RemoteImages = False,
    host_name: HostName = None,
    votes: Votes = None,
    worker: Worker = False,
    grace: Grace = 30.0,
    quiet: Quiet = False,
    other: Other = None,
    *,
    bounds: Bounds,
    room: Room,
    loading: options.Loading,
    how: launch.Engine,
) -> None:
    """Serve models by OpenAI's HTTP, with a chat page; or hand one over to SGLang or vLLM."""
    if other is not None:
        if len(models or ()) > 1:
            raise ConfigError(f"{other} serves one model", code="bad_value", where="MODEL", remedy="start one process for each")
        if api_key:
            os.environ["LLAVA_API_KEY"] = api_key
        name = next(iter(models or ()), None)
        how = how if how.name or not served_name else replace(how, name=served_name[0])
        packed = loading.quantize.value if loading.quantize else None
        launch.engine_command(other, name, how, host=host, port=port, revision=loading.revision, packed=packed)
        return
    wanted = named(models, served_name, loading)
    hosts = ("*",) if remote_images else tuple(allow_host or ())
    settings = _settings(bounds.limits(), api_key, host, hosts, tuple(host_name or ()))

    from llavakit.serve.server import Server, bind, leave
    from llavakit.serve.service import Service
    from llavakit.serve.web import PageSettings, routes

    listening = bind(host, port)
    _log(quiet)
    address = f"http://{_bracketed(host)}:{listening.getsockname()[1]}"
    warn(host, settings)
    service, shown, begun = Service(settings=settings), dict[str, "Shown"](), time.perf_counter()

    def load() -> Mapping[str, Engine]:
        return {name: engine(one, name, room, shown) for name, one in wanted.items()}

    def ready() -> None:
        _say(f"serving {', '.join(wanted)} at {address} after {time.perf_counter() - begun:.1f} s (API: {address}/v1; Ctrl-C ends it)")

    more = [*routes(service, shown, PageSettings(votes=votes)), *(_worker_routes(service, shown) if worker else ())]
    leave(Server(service, listening, load, grace=grace, routes=more, ready=ready).serve_until_told())


def named(models: Sequence[str] | None, served: Sequence[str] | None, loading: options.Loading) -> dict[str, options.Loading]:
    """What to load, by the names that clients use: those given, or what the model itself is called."""
    if models and loading.model is not None:
        raise ConfigError("models as words and --model", code="bad_value", where="--model", remedy="leave --model out")
    given: list[str | None] = [*models] if models else [loading.model]
    names = list(served or (_own_name(model) for model in given))
    if len(names) != len(given):
        what = f"{len(names)} names for {len(given)} models"
        raise ConfigError(what, code="bad_value", where="--served-name", remedy="give one name for each")
    if len(set(names)) < len(names):
        raise ConfigError("two models of one name", code="bad_value", where="--served-name", remedy="name each, in their order")
    return {name: replace(loading, model=model) for name, model in zip(names, given, strict=True)}


def engine(loading: options.Loading, name: str, room: Room, shown: dict[str, Shown] | None = None) -> Engine:
    """A model, loaded and ready to be asked."""
    from llavakit.serve.engine import AssistantEngine
    from llavakit.serve.web import Shown

    assistant = loading.assistant()
    made = AssistantEngine.start(assistant, model_id=loading.model or "tiny", chosen=room.chosen())
    if shown is not None:
        shown[name] = Shown(processor=assistant.processor, model=assistant.model)
    return made


def _worker_routes(service: Service, shown: Mapping[str, Shown]) -> list[Route]:
    from llavakit.serve import worker

    return worker.routes(service, lambda name: shown[name].processor.template)


def _own_name(model: str | None) -> str:
    """A folder's last word, a Hub id as it is."""
    if model is None:
        return "tiny"
    return Path(model).resolve().name if Path(model).exists() else model


def _settings(limits: Limits, key: str | None, host: str, allowed: tuple[str, ...], names: tuple[str, ...]) -> Settings:
    from llavakit.serve.fetch import Remote
    from llavakit.serve.service import Settings

    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise ConfigError("the key is empty or has characters that no header can carry", code="bad_value", where="--api-key")
    if is_loopback(host):
        names = (*names, "127.0.0.1", "localhost", "[::1]", _bracketed(host))
    return Settings(key=key, limits=limits, remote=Remote(hosts=allowed) if allowed else None, hosts=tuple(map(str.lower, names)))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warn(host: str, settings: Settings) -> None:
    if not is_loopback(host) and settings.key is None:
        _say(f"WARNING: everybody who reaches {host} can use this server. Set LLAVA_API_KEY, or listen on 127.0.0.1")
    if settings.remote is not None and "*" in settings.remote.hosts:
        _say("WARNING: who may ask may make this server fetch from any public host. Name the hosts instead: --allow-host")


def _log(quiet: bool) -> None:
    log = logging.getLogger("llavakit")
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers, log.propagate = [lines], False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
