"""The line that serves a checkpoint with SGLang or vLLM: written from what the checkpoint says of itself and from the cards at hand.

    folder --facts--> Facts --+
    card, how many -----------+--> launch --> Launch: words, environment, chat template, what to know       (nothing is run here)

tensor parallel   the fewest cards that hold the weights and some whole conversations, and that divide every head count
copies            what is left of the cards: data parallel
chat template     ours as Jinja, beginning with the first token: for a chat these engines write none themselves
pictures          as many as the context holds beside ROOM tokens of text

Refused is what an engine would compute otherwise than we do (a merge or a base view of ours that transformers does not know, packed
weights) and what it cannot read (the original layout, adapters).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llavakit.checkpoint import store
from llavakit.checkpoint.layouts import describe
from llavakit.errors import ConfigError
from llavakit.model.cards import Card
from llavakit.model.presets import ModelConfig
from llavakit.model.sizes import ROOM, Sizes, empty, sizes
from llavakit.preprocess import Aspect
from llavakit.processor import Processor

Engine = Literal["sglang", "vllm"]
ENGINES: tuple[Engine, ...] = ("sglang", "vllm")
KEY = "LLAVA_API_KEY"
FILLED = 0.9  # of a card's memory: what both engines take by default
CONVERSATIONS = 4  # of full length that must fit beside the weights
PICTURES = 16  # in a request at most, however long the context
NOWHERE = "nowhere.invalid"  # a domain that never resolves (RFC 2606): no remote pictures
_GENERATION = ("{%- generation -%}", "{%- endgeneration -%}")  # for training only
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a checkpoint says of itself. ``template`` is Jinja; ``stops``: text that ends a reply and is no token."""

    folder: Path
    config: ModelConfig
    sizes: Sizes
    aspect: Aspect
    context: int
    template: str
    stops: tuple[str, ...]
    original_pieces: bool

    @property
    def picture(self) -> int:
        """Tokens of the largest picture."""
        tiling = self.config.tiling
        return max(tiling.grid(*shape).tokens for shape in (self.config.canvases or ((1, 1),)))


def facts(folder: Path, *, allow_pickle: bool = False) -> Facts:
    """From the small files of a folder. Raises ConfigError ``cannot_serve`` for one that engines cannot read, CheckpointError."""
    layout = describe(folder, allow_pickle=allow_pickle)
    if layout.kind not in ("hf", "other"):
        what = f"no engine reads a checkpoint of the kind '{layout.kind}'"
        raise _refused(what, folder, f"convert it first: llava convert {folder} NEW")
    config, processor = store.outline(folder, allow_pickle=allow_pickle)
    end = processor.template.end
    return Facts(
        folder=layout.folder, config=config, sizes=sizes(empty(config)), aspect=processor.preprocess.aspect,
        context=min(processor.max_length, int(config.text["max_position_embeddings"])), template=chat_template(processor),
        stops=() if _is_token(processor, end) else (end,), original_pieces=processor.image_pieces == "original",
    )  # fmt: skip


def chat_template(processor: Processor) -> str:
    """The prompt format for an engine: whole, for it adds no first token to what a chat template writes."""
    source = processor.template.jinja()
    for mark in _GENERATION:
        source = source.replace(mark, "")
    begins = processor.tokenizer("").input_ids
    return "{{- bos_token -}}" + source if begins and "bos_token" not in source else source


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A line to run. ``words`` hold no key: it is ``environment``'s or the shell's to give (``key``: the variable's name, or None)."""

    engine: Engine
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    key: str | None
    template: str
    template_file: Path
    tensor_parallel: int
    copies: int
    pictures: int
    address: str
    notes: tuple[str, ...]

    def line(self, *, width: int = 100) -> str:
        """As one would type it, broken before options."""
        words = [*(f"{name}={value}" for name, value in self.environment), *map(shlex.quote, self.words)]
        if self.key is not None:
            words = [*words, "--api-key", f'"${self.key}"'] if self.engine == "sglang" else [f'VLLM_API_KEY="${self.key}"', *words]
        lines = [""]
        for word, following in zip(words, [*words[1:], "--"], strict=True):
            pair = len(word) + (len(following) + 1 if word.startswith("--") and not following.startswith("--") else 0)
            if lines[-1] and word.startswith("--") and len(lines[-1]) + pair + 3 > width:
                lines.append("")
            lines[-1] += (" " if lines[-1] else "") + word
        return " \\\n    ".join(lines)


def launch(
    engine: Engine,
    found: Facts,
    card: Card,
    *,
    devices: int = 1,
    pictures: int | None = None,
    context: int | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    domains: Sequence[str] = (),
    packed: str | None = None,
    python: Path | None = None,
    template_file: Path | None = None,
) -> Launch:
    """The line. ``key``: the variable that holds the API key. ``domains``: whence remote pictures may come (vLLM). ``packed``: 8bit, 4bit.

    ``python``: the interpreter of the engine's environment. Raises ConfigError ``cannot_serve``, ``no_room``, ``bad_value``.
    """
    check(engine, found, packed=packed)
    context = _context(found, context)
    most = max(0, min(PICTURES, (context - min(ROOM, context // 4)) // found.picture))
    if not most or (pictures or 1) > most:
        what = f"{context} tokens hold {most} pictures of {found.picture} beside the text, not {pictures or 1}"
        raise ConfigError(what, code="bad_value", where="--images", remedy=f"ask for at most {most}, or a longer --context")
    tensor = tensor_parallel(found, card, devices, context)
    called = name or found.folder.resolve().name
    path = template_file or Path(f"{called.replace('/', '-')}.{engine}.jinja")
    make = _vllm if engine == "vllm" else _sglang
    made = Launch(
        engine=engine, words=(), environment=(("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0"),) if engine == "vllm" else (), key=key,
        template=found.template, template_file=path, tensor_parallel=tensor, copies=devices // tensor, pictures=pictures or most,
        address=f"http://{host}:{port}", notes=notes(engine, found, host, key),
    )  # fmt: skip
    common = [
        "--served-model-name", called, "--host", host, "--port", str(port),
        "--dtype", "bfloat16" if card.bf16 else "float16", "--chat-template", str(path),
    ]  # fmt: skip
    words = make(made, found, python, common, context, domains)
    return replace(made, words=tuple(words))


def _vllm(made: Launch, found: Facts, python: Path | None, common: list[str], context: int, domains: Sequence[str]) -> list[str]:
    program = [str(python.parent / "vllm")] if python else ["vllm"]
    copies = ["--data-parallel-size", str(made.copies)] if made.copies > 1 else []
    return [
        *program, "serve", str(found.folder), *common, "--chat-template-content-format", "openai", "--generation-config", "vllm",
        "--max-model-len", str(context), "--limit-mm-per-prompt", json.dumps({"image": made.pictures}),
        "--tensor-parallel-size", str(made.tensor_parallel), *copies, "--allowed-media-domains", *(domains or (NOWHERE,)),
    ]  # fmt: skip


def _sglang(made: Launch, found: Facts, python: Path | None, common: list[str], context: int, domains: Sequence[str]) -> list[str]:
    program = [str(python) if python else "python", "-m", "sglang.launch_server"]
    copies = ["--dp-size", str(made.copies)] if made.copies > 1 else []
    return [
        *program, "--model-path", str(found.folder), "--model-impl", "transformers", "--enable-multimodal", *common,
        "--context-length", str(context), "--limit-mm-data-per-request", json.dumps({"image": made.pictures}),
        "--tp-size", str(made.tensor_parallel), *copies,
    ]  # fmt: skip


def router(engine: Engine, workers: Sequence[str], *, host: str = "127.0.0.1", port: int = 8000) -> str:
    """The line of the router before engines on several machines; it sends a conversation to where its beginning is remembered."""
    program = ["vllm-router"] if engine == "vllm" else ["python", "-m", "sglang_router.launch_router"]
    return shlex.join([*program, "--worker-urls", *workers, "--policy", "cache_aware", "--host", host, "--port", str(port)])


def check(engine: Engine, found: Facts, *, packed: str | None = None) -> None:
    """Raise ConfigError ``cannot_serve`` for what the engine would compute otherwise than we do, or not at all."""
    config = found.config
    tiled, ours = bool(config.canvases), "serve it with this package: llava serve"
    if packed is not None:
        raise _refused(f"{packed} is this package's own way of packing weights", found.folder, "leave --quantize away, or " + ours)
    if config.merge != ("spatial_unpad" if tiled else "flat"):
        raise _refused(f"{engine} has no LLaVA that merges {'tiles' if tiled else 'views'} by '{config.merge}'", found.folder, ours)
    if tiled and found.aspect != "squash":
        raise _refused(f"{engine} squashes the base view of tiled pictures; this one was trained with '{found.aspect}'", found.folder, ours)
    if config.projector == "linear" and engine == "vllm":
        raise _refused("vllm has no linear projector", found.folder, "take --engine sglang, or " + ours)


def tensor_parallel(found: Facts, card: Card, devices: int, context: int) -> int:
    """Over how many cards a copy is spread: the fewest that hold it. Raises ConfigError ``no_room``."""
    text, size = found.config.text, found.sizes
    heads = int(text["num_attention_heads"])
    keys = int(text.get("num_key_value_heads") or heads)
    eyes = int(found.config.vision["num_attention_heads"])
    for cards in range(1, devices + 1):
        whole = not (heads % cards or eyes % cards or size.feed_forward % cards or (keys % cards and cards % keys))
        if whole and needed(found, cards, context) <= card.memory * _GIB * FILLED:
            return cards
    least = needed(found, devices, context) / _GIB / FILLED
    what = f"{devices} x {card.memory:g} GiB do not hold the weights and {CONVERSATIONS} conversations ({least:.0f} GiB each)"
    raise ConfigError(
        what, code="no_room", where="--devices", remedy=f"take more or larger cards (a number that divides {heads} and {eyes} heads)"
    )


def needed(found: Facts, cards: int, context: int) -> float:
    """Bytes on each of so many cards that share a copy."""
    size = found.sizes
    return (size.weights("bf16") + CONVERSATIONS * size.cache(context)) / cards + size.working(context)


def notes(engine: Engine, found: Facts, host: str, key: str | None) -> tuple[str, ...]:
    """What to know before relying on it."""
    said = {
        f"replies end before {' and '.join(map(repr, found.stops))}, which is no token: clients must send it as stop": bool(found.stops),
        "some sizes of pictures give a row of tokens more or less than in training (arithmetic of transformers)": (
            bool(found.config.canvases) and found.config.arithmetic == "original"
        ),
        "the text after a picture is tokenised as transformers does, not as in training": found.original_pieces,
        "sglang fetches any picture a client names: let it reach no inner network": engine == "sglang",
        "sglang shows the key in the list of processes": engine == "sglang" and key is not None,
        f"it listens on {host} and asks for no key": key is None and host not in ("127.0.0.1", "localhost", "::1"),
        "sglang runs this family through transformers' model": engine == "sglang",
    }
    return tuple(text for text, holds in said.items() if holds)


def _context(found: Facts, asked: int | None) -> int:
    if asked is not None and not 1 <= asked <= found.context:
        what = f"the model was made for {found.context} tokens, not {asked}"
        raise ConfigError(what, code="bad_value", where="--context", remedy=f"give at most {found.context}")
    return asked or found.context


def _is_token(processor: Processor, text: str) -> bool:
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    return len(ids) == 1 and ids[0] in processor.stop_ids


def _refused(what: str, folder: Path, remedy: str) -> ConfigError:
    return ConfigError(what, code="cannot_serve", where=str(folder), remedy=remedy)
