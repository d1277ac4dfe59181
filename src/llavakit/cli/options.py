"""Options that several commands share, each written once."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Option

from llavakit.errors import ConfigError
from llavakit.types import Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavakit.assistant import Assistant
    from llavakit.prompts import Template


T = TypeVar("T")


class Bits(StrEnum):
    eight = "8bit"
    four = "4bit"


DTYPES = ("auto", "float32", "bfloat16", "float16")

Model = Annotated[
    str | None,
    Option("--model", "-m", metavar="NAME", help="A model folder, tiny, tiny-next, tiny-hd, or a Hub id (default: tiny)."),
]
Revision = Annotated[str | None, Option("--revision", metavar="NAME", help="Of a model on the Hub: its branch, tag or commit.")]
Quantize = Annotated[
    Bits | None, Option("--quantize", help="Pack the language model while it is read: half the memory of bf16, or less than a third.")
]
Base = Annotated[Path | None, Option("--base", metavar="FOLDER", help="What an adapter, a delta or a projector belongs to.")]
Tower = Annotated[Path | None, Option("--tower", metavar="FOLDER", help="The CLIP, where an original checkpoint keeps it elsewhere.")]
PromptFormat = Annotated[str | None, Option("--template", metavar="NAME", help="The prompt format (default: what the checkpoint says).")]
Draft = Annotated[
    bool, Option("--draft", help="Decode large JPEG photographs at a fraction of their size: several times faster, pixels differ a little.")
]
Dtype = Annotated[str, Option("--dtype", help="Arithmetic: auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, Option("--device", help="cpu, cuda, cuda:1, mps (default: the best there is).")]
AllowPickle = Annotated[bool, Option("--allow-pickle", help="Read .bin weights, which can run code: only from people you trust.")]
Temperature = Annotated[float, Option("--temperature", "-t", help="0 always takes the likeliest token; 1 draws from the model's own odds.")]
TopP = Annotated[float, Option("--top-p", help="Draw only from the likeliest tokens that together hold this share.")]
Beams = Annotated[int, Option("--beams", help="Search with so many beams (needs temperature 0).")]
MaxTokens = Annotated[int, Option("--max-tokens", help="The longest reply, in tokens.")]
Stop = Annotated[list[str] | None, Option("--stop", metavar="TEXT", help="End the reply before this text (may be repeated).")]
Seed = Annotated[int | None, Option("--seed", help="Makes drawn replies repeatable.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How replies are made: ``Sampling`` as options."""

    max_tokens: MaxTokens = 512
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    stop: Stop = None
    seed: Seed = None

    def sampling(self, beams: int = 1) -> Sampling:
        """The options as one value; a value out of range is a usage error that names the parameter."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            num_beams=beams,
            max_new_tokens=self.max_tokens,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which model, and how it is read: ``Assistant.load`` as options."""

    model: Model = None
    revision: Revision = None
    base: Base = None
    tower: Tower = None
    template: PromptFormat = None
    dtype: Dtype = "auto"
    device: Device = None
    quantize: Quantize = None
    draft: Draft = False
    allow_pickle: AllowPickle = False

    def assistant(self) -> Assistant:
        """The model as a responder; the libraries below are told to be quiet first."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"no arithmetic {self.dtype!r}", code="bad_value", where="--dtype", remedy=f"use one of {', '.join(DTYPES)}")
        quiet()
        import torch

        from llavakit.assistant import Assistant

        arithmetic: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return Assistant.load(
            self.model,
            dtype=arithmetic.get(self.dtype, "auto"),
            device=_device(self.device),
            allow_pickle=self.allow_pickle,
            revision=self.revision,
            draft=self.draft,
            quantization=self.quantize.value if self.quantize else None,
            base=self.base,
            tower=self.tower,
            template=None if self.template is None else prompt_format(self.template),
        )


def spread(command: Callable[..., T]) -> Callable[..., T]:
    """A command that takes ``Loading``, ``Drawing`` or their like as a parameter: typer sees the fields as options."""
    values: dict[str, tuple[type, tuple[str, ...]]] = {}
    seen: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if is_dataclass(kind):
            assert isinstance(kind, type)
            inner = inspect.signature(kind, eval_str=True).parameters
            values[parameter.name] = kind, tuple(inner)
            seen += inner.values()
        else:
            seen.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**words: Any) -> T:
        made = {name: kind(**{field: words.pop(field) for field in inner}) for name, (kind, inner) in values.items()}
        return command(**words, **made)

    run.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    return run


def prompt_format(name: str) -> Template:
    """A prompt format by its name."""
    from llavakit.prompts import TEMPLATES

    if name not in TEMPLATES:
        remedy = f"the formats are {', '.join(sorted(TEMPLATES))}"
        raise ConfigError(f"no prompt format {name!r}", code="bad_value", where="--template", remedy=remedy)
    return TEMPLATES[name]


def _device(name: str | None) -> str | None:
    """The device if it is there; torch's own words about an absent one are long and late."""
    import torch

    if name is None:
        return None
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = f"there is no device {name!r} here"
        raise ConfigError(what, code="bad_value", where="--device", remedy="llava env lists the devices") from error
    return name


def quiet() -> None:
    """transformers and bitsandbytes talk on stderr about things that are settled here."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    getLogger("bitsandbytes").setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def save_picture(image: Image, path: Path) -> None:
    """Write a picture in the format of the name's ending; an unknown ending is a usage error."""
    from PIL.Image import registered_extensions

    if path.suffix.lower() not in registered_extensions():
        raise ConfigError("the name does not end like a picture's", code="bad_value", where=str(path), remedy="use .png or .jpg")
    image.save(path)


def read_stdin() -> bytes:
    """The bytes of stdin, and no more of them than a picture may have: one beyond is enough to be refused."""
    from llavakit.images import LIMITS

    return sys.stdin.buffer.read(LIMITS.max_bytes + 1)
