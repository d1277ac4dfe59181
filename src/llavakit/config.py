"""Options as values: a frozen dataclass, a YAML file and ``key=value`` words are three spellings of one thing.

    base value  <-  file.yaml  <-  key=value ...   ->   one frozen value   ->   config.yaml, the echo that reruns it

The type of a field says how its text is read, the string under a field is its help, and a wrong name is answered with the nearest
right one. ``TrainConfig`` and its two recipes (spec 4.2) stand at the end. No torch here: ``--help`` must be instant.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from llavakit.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One line of help: the name to type, what it takes, what it is when left out, and the string under the field."""

    name: str
    kind: str
    default: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field that has another value than before."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} -> {self.after!r}"


def parse(base: T, words: Sequence[str] = (), *, file: Path | None = None) -> T:
    """``base`` with the fields of ``file`` and then of ``key=value`` words changed; nested fields are spelled ``outer.inner``.

    Raises ConfigError: ``bad_word`` (no '='), ``unknown_option`` (with the nearest name), ``bad_value`` (with what is wanted).
    """
    value = load(base, file) if file is not None else base
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not key=value", code="bad_word", remedy="write the name, '=', and the value without spaces")
        value = _assign(value, name.strip().lstrip("-").split("."), text, name)
    return value


def load(base: T, path: Path) -> T:
    """``base`` with the fields of a YAML file changed. Raises ConfigError naming the file and the field."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(error.strerror or "cannot be read", code="bad_file", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"not YAML: {line}", code="bad_file", where=str(path), remedy="compare it with a config.yaml of a run") from error
    if content is None:
        return base
    if not isinstance(content, dict):
        raise ConfigError("no mapping of names to values", code="bad_file", where=str(path), remedy="write one 'name: value' a line")
    return from_dict(base, content, where=str(path))


def save(value: Any, path: Path) -> None:
    """Write every field as YAML; ``load`` on any base gives the value back. The file is replaced in one move."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(draft, path)


def to_dict(value: Any) -> dict[str, Any]:
    """The fields as plain YAML values: paths become text, tuples lists, nested dataclasses mappings."""
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}


def from_dict(base: T, content: Mapping[str, Any], *, where: str = "") -> T:
    """``base`` with the given fields changed; the inverse of ``to_dict``."""
    hints = get_type_hints(type(base))
    prefix = f"{where}: " if where else ""
    changes: dict[str, Any] = {}
    for name, entry in content.items():
        _known(base, str(name), f"{prefix}{name}")
        changes[name] = _convert(entry, hints[name], f"{prefix}{name}", getattr(base, name))
    return _changed(base, changes)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The fields of two ``to_dict`` results that differ, in the order of the second."""
    names = list(after) + [name for name in before if name not in after]
    return tuple(
        Difference(name=name, before=before.get(name), after=after.get(name)) for name in names if before.get(name) != after.get(name)
    )


def describe(base: Any) -> tuple[Option, ...]:
    """The options of a config value with their defaults; the string written under each field is its help."""
    help_of = _strings_under_fields(type(base))
    hints = get_type_hints(type(base))
    return tuple(
        Option(name=field.name, kind=_spell(hints[field.name]), default=_show(getattr(base, field.name)), help=help_of.get(field.name, ""))
        for field in fields(base)
    )


def _assign(value: T, path: Sequence[str], text: str, where: str) -> T:
    name = path[0]
    _known(value, name, where)
    hint, old = get_type_hints(type(value))[name], getattr(value, name)
    if len(path) > 1:
        if not is_dataclass(old):
            raise ConfigError(f"'{name}' has no inner options", code="unknown_option", where=where, remedy=f"write {name}=value")
        return _changed(value, {name: _assign(old, path[1:], text, where)})
    return _changed(value, {name: _convert(_read(text, hint, where), hint, where, old)})


def _changed(value: T, changes: Mapping[str, Any]) -> T:
    result: T = replace(value, **changes)  # type: ignore[type-var]  # a dataclass by contract
    return result


def _known(value: Any, name: str, where: str) -> None:
    names = [field.name for field in fields(value)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else f"the options are {', '.join(names)}"
        raise ConfigError(f"no option '{name}'", code="unknown_option", where=where, remedy=remedy)


def _read(text: str, hint: Any, where: str) -> Any:
    """Words of text types are taken as they stand; all else is read as YAML."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if NoneType in members and text in ("", "none", "null", "None"):
        return None
    if any(member in (str, Path) or get_origin(member) is Literal for member in members):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} cannot be read", code="bad_value", where=where, remedy=f"give {_spell(hint)}") from error


def _convert(entry: Any, hint: Any, where: str, old: Any) -> Any:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _convert_union(entry, hint, where, old)
    if origin is Literal and entry in get_args(hint):
        return entry
    if origin is tuple and isinstance(entry, list | tuple):
        kinds = get_args(hint)
        kinds = kinds[:1] * len(entry) if kinds[1:] == (...,) else kinds
        if len(kinds) == len(entry):
            return tuple(_convert(item, kind, f"{where}[{i}]", None) for i, (item, kind) in enumerate(zip(entry, kinds, strict=True)))
    if is_dataclass(hint) and isinstance(entry, Mapping):
        return from_dict(old, entry, where=where)
    if hint in _SCALARS:
        converted = _SCALARS[hint](entry)
        if converted is not None:
            return converted
    raise ConfigError(f"{entry!r} does not fit", code="bad_value", where=where, remedy=f"give {_spell(hint)}")


def _convert_union(entry: Any, hint: Any, where: str, old: Any) -> Any:
    members = get_args(hint)
    if entry is None and NoneType in members:
        return None
    for member in members:
        if member is not NoneType:
            try:
                return _convert(entry, member, where, old)
            except ConfigError:
                continue
    raise ConfigError(f"{entry!r} does not fit", code="bad_value", where=where, remedy=f"give {_spell(hint)}")


def _as_float(entry: Any) -> float | None:
    """YAML 1.1 reads 1e-3 as text, so text that spells a number is one."""
    try:
        number = float(entry) if isinstance(entry, int | float | str) and not isinstance(entry, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_SCALARS: Mapping[Any, Any] = {
    bool: lambda entry: entry if isinstance(entry, bool) else None,
    int: lambda entry: entry if isinstance(entry, int) and not isinstance(entry, bool) else None,
    float: _as_float,
    str: lambda entry: entry if isinstance(entry, str) else None,
    Path: lambda entry: Path(entry) if isinstance(entry, str | Path) and str(entry) else None,
}


def _spell(hint: Any) -> str:
    """A type in words a person can act on."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_spell(member) for member in get_args(hint))
    if origin is Literal:
        return "|".join(str(value) for value in get_args(hint))
    if origin is tuple:
        return "[" + ", ".join("..." if kind is ... else _spell(kind) for kind in get_args(hint)) + "]"
    words = {bool: "true|false", int: "a whole number", float: "a number", str: "text", Path: "a path", NoneType: "none"}
    return words.get(hint, "options")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _show(value: Any) -> str:
    plain = _plain(value)
    return "none" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)


def _strings_under_fields(kind: type) -> dict[str, str]:
    """Each field's name with the string literal that follows it in the class body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            constant = below.value
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                found[field.target.id] = " ".join(constant.value.split())
    return found


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{value} is out of range", code="bad_value", where=name, remedy=f"give a number {limit}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training run depends on. Two runs of one value on one machine give the same weights, bit for bit."""

    stage: Literal["pretrain", "finetune"]
    "The recipe: pretrain learns the projector alone, finetune the projector and the language model (spec 4.1)."
    rates: tuple[tuple[str, float | None], ...] = ()
    "Own rows [pattern, rate] put before the stage's table; rate multiplies lr, null freezes; the first match wins."
    start: Path | None = None
    "A native checkpoint to start from."
    tower: Path | None = None
    "A folder holding a CLIP vision model; with start, it takes the place of the checkpoint's own."
    decoder: Path | None = None
    "Without start: a folder holding a causal language model and its tokenizer."
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    "Without start: the shape of the new, untrained projector."
    data: Path | None = None
    "The samples: LLaVA JSON or JSONL, plain or gzipped; or a mixture, as a manifest (.yaml) or the name of a shipped one."
    images: Path | None = None
    "The folder that the samples' image names are relative to (default: the folder of data); of a mixture, where its files lie."
    share: float = 1.0
    "Of a mixture: the part of every source that is taken; 0.01 and 0.1 are the usual trials."
    placement: Literal["as_data", "random", "first"] = "as_data"
    "Where the picture stands in a turn: as written, before or after the first question at random (papers), or first (the code)."
    template: str = "vicuna_v1"
    "The prompt format (a name of prompts.TEMPLATES)."
    aspect: Literal["square", "pad", "anyres"] = "pad"
    "How a picture meets the tower: 'square' crops the middle, 'pad' fills with the mean colour, 'anyres' adds tiles (LLaVA-NeXT)."
    tiles: str = "released"
    "With anyres: the canvases as columns x rows, '1x2,2x1,2x2'; or released, blog (NeXT), hd (LLaVA-1.5-HD) (spec 2.3, 2.4, 2.9)."
    base: Literal["squash", "pad"] = "squash"
    "With anyres: how the view of the whole becomes square: scaled without its aspect ratio (NeXT), or padded (LLaVA-1.5-HD)."
    max_length: int = 2048
    "The longest sequence, image tokens included."
    batch_size: int = 16
    "Samples in one forward pass."
    accumulation: int = 8
    "Forward passes in one optimizer step, on all devices together: the global batch is batch_size x accumulation anywhere."
    epochs: int = 1
    "Times through the samples."
    steps: int | None = None
    "Optimizer steps in all; when given, epochs is not used."
    lr: float = 2e-5
    "Peak learning rate of rows with rate 1."
    warmup: float = 0.03
    "Share of the steps in which the rate climbs from 0; after it the rate falls to 0 along a cosine."
    optimizer: Literal["adamw", "muon"] = "adamw"
    "adamw as in the papers; muon takes orthogonal steps in the hidden matrices: new models learn in fewer steps (dev/LOG.md)."
    weight_decay: float = 0.0
    "Decay of the weights; norms and biases never decay."
    betas: tuple[float, float] = (0.9, 0.999)
    "AdamW's two averages."
    clip: float = 1.0
    "Largest gradient norm; 0 is off, as in the original ZeRO-2/3 recipes (spec trap 38)."
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    "Arithmetic of the forward pass; learned weights are kept in fp32 always. auto: bf16 where the hardware computes it."
    frozen_dtype: Literal["keep", "bf16"] = "keep"
    "How frozen weights are held: as stored, or halved to bf16 (only when the forward pass is bf16)."
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    "Where to compute; auto takes cuda, then mps, then cpu."
    shard: Literal["none", "full"] = "none"
    "Under torchrun: each rank holds the model (DDP), or a part of every layer, gradient and moment (FSDP2)."
    timeout: int = 1800
    "Under torchrun: seconds without a step after which a rank writes its stacks to stacks-RANK.txt and ends."
    gradient_checkpointing: bool = False
    "Compute the decoder's activations twice and keep fewer of them: about a third slower, far less memory."
    seed: int = 0
    "Fixes the order of samples, the new projector and every random draw."
    workers: int = 0
    "Processes that prepare batches; 0 prepares them in the training process."
    cache_mb: int = 0
    "Memory for prepared samples, so that later epochs skip decoding; each worker has its own share."
    pack: bool = True
    "Put the samples of a forward pass behind one another in one row, each apart, instead of padding them to the longest."
    group: int = 0
    "Sort samples by modality and length inside runs of so many optimizer steps, to pad less; 0 is off."
    on_bad_sample: Literal["stop", "skip"] = "stop"
    "A sample that cannot be used stops the run, or is left out and counted."
    allow_outside: bool = False
    "Let image names leave the images folder (absolute or ../)."
    out: Path = Path("runs/out")
    "The run folder: config.yaml, metrics.jsonl, loss.png and the checkpoints step-N."
    save_every: int = 1000
    "Steps between checkpoints; the last step is always saved."
    keep: int = 2
    "Checkpoints kept; 0 keeps all."
    log_every: int = 10
    "Steps between printed lines when the output is no terminal; metrics.jsonl has every step."
    resume: str = "auto"
    "auto goes on from the newest good checkpoint in out; never refuses a used folder; else a checkpoint folder."
    force: bool = False
    "Go on although the model, the data or the order of samples has changed since the checkpoint."
    non_finite_limit: int = 3
    "Stop after so many steps in a row whose loss or gradient is not a number; such steps change nothing."

    def __post_init__(self) -> None:
        counts = ("batch_size", "accumulation", "epochs", "max_length", "save_every", "log_every", "non_finite_limit", "timeout")
        least = dict.fromkeys(counts, 1)
        least |= {"lr": 0, "weight_decay": 0, "clip": 0, "seed": 0, "workers": 0, "cache_mb": 0, "group": 0, "keep": 0}
        for name, low in least.items():
            _in_range(name, getattr(self, name), low, math.inf)
        _in_range("warmup", self.warmup, 0, 1)
        _in_range("share", self.share, 0, 1)
        for beta in self.betas:
            _in_range("betas", beta, 0, 1)
        if self.steps is not None:
            _in_range("steps", self.steps, 1, math.inf)


# What may not change between a checkpoint and its resumption without force: they decide what the weights and the samples are.
FIXED = frozenset({
    "stage", "rates", "start", "tower", "decoder", "projector", "data", "images", "share", "placement", "template", "aspect",
    "tiles", "base",
    "max_length", "optimizer", "seed", "group", "on_bad_sample", "allow_outside",
})  # fmt: skip

PRETRAIN = TrainConfig(stage="pretrain", template="plain", aspect="square", lr=1e-3, batch_size=32, out=Path("runs/pretrain"))
FINETUNE = TrainConfig(stage="finetune", template="vicuna_v1", aspect="pad", lr=2e-5, batch_size=16, out=Path("runs/finetune"))
