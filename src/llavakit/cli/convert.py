"""``llava convert``: a checkpoint from one layout to another, proved by its logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llavakit.cli import options, terminal
from llavakit.errors import ConfigError

EXAMPLES = """Examples:

  llava convert llava-v1.5-7b my-llava --tower clip-vit-large-patch14-336
  llava convert my-lora my-llava --base vicuna-7b-v1.5 --allow-pickle
  llava convert my-llava for-sglang --to original
  llava convert my-llava for-llama.cpp --to gguf --dtype float16
  llava convert my-llava stage1 --to projector
  llava convert my-llava difference --to delta --base vicuna-7b-v1.5
"""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
TARGETS = ("hf", "original", "projector", "delta", "gguf")
DTYPES = ("stored", "float32", "bfloat16", "float16")

Source = Annotated[Path, Argument(metavar="SRC", show_default=False, help="A checkpoint in any layout; what it is follows from its files.")]
Folder = Annotated[Path, Argument(metavar="DST", show_default=False, help="The folder to write.")]
To = Annotated[
    str | None,
    Option("--to", help="hf, original, projector, delta or gguf (default: original from hf, hf from the others).", show_default=False),
]
Base = Annotated[
    Path | None,
    Option("--base", metavar="FOLDER", help="The model that an adapter, a projector or a delta belongs to.", show_default=False),
]
Tower = Annotated[
    Path | None, Option("--tower", metavar="FOLDER", help="The CLIP, where the original layout keeps it elsewhere.", show_default=False)
]
Keep = Annotated[bool, Option("--keep-adapter", help="Do not merge a LoRA: write its base, and in DST/adapter the adapter, for PEFT.")]
Shard = Annotated[str, Option("--shard-size", metavar="SIZE", help="The largest weight file, as in 5GB or 900MB.")]
Dtype = Annotated[str, Option("--dtype", help="Weights on disk: stored (as they are), float32, bfloat16 or float16.")]


def convert(
    source: Source,
    folder: Folder,
    to: To = None,
    base: Base = None,
    tower: Tower = None,
    keep_adapter: Keep = False,
    shard_size: Shard = "5GB",
    dtype: Dtype = "stored",
    allow_pickle: options.AllowPickle = False,
) -> None:
    """Convert a checkpoint between llava-hf and the original layouts, or for llama.cpp.

    Adapters and deltas are merged. What was written is read again and must give the same logits, or nothing is left of it.
    """
    for name, value, known in (("--to", to, TARGETS), ("--dtype", dtype, DTYPES)):
        if value is not None and value not in known:
            raise ConfigError(f"no {name[2:]} {value!r}", code="bad_value", where=name, remedy=f"use one of {', '.join(known)}")
    limit = _bytes(shard_size)
    options.quiet()
    if to == "gguf":
        _gguf(source, folder, base=base, tower=tower, dtype=dtype, allow_pickle=allow_pickle)
        return
    from llavakit.checkpoint.convert import convert as run

    done = run(
        source, folder, to=to, base=base, tower=tower, keep_adapter=keep_adapter, dtype=dtype,  # type: ignore[arg-type]
        max_shard_bytes=limit, allow_pickle=allow_pickle,
    )  # fmt: skip
    print(f"{folder}: {done.source} -> {done.target}, logits differ by {done.error:.1e} (relative, fp32)")
    if not done.same_ids:
        terminal.err().print("note: the two layouts tokenise the text after a picture in different ways here")


def _gguf(source: Path, folder: Path, *, base: Path | None, tower: Path | None, dtype: str, allow_pickle: bool) -> None:
    """llama.cpp's two files. They are no checkpoint of ours, so there is nothing to read back (docs/gguf.md)."""
    import torch

    from llavakit.checkpoint import store
    from llavakit.checkpoint.gguf import write_gguf

    model, processor = store.load(source, dtype="stored", base=base, tower=tower, allow_pickle=allow_pickle)
    wanted: torch.dtype | None = None if dtype == "stored" else getattr(torch, dtype)
    for path in write_gguf(model, processor, folder, dtype=wanted):
        print(f"{path}: {path.stat().st_size:,} bytes")


def _bytes(size: str) -> int:
    """A size in bytes from words like 5GB."""
    found = re.fullmatch(r"(\d+)\s*([KMG]B|)", size.upper())
    if not found or not int(found[1]):
        raise ConfigError(f"no size {size!r}", code="bad_value", where="--shard-size", remedy="give one like 5GB or 900MB")
    return int(found[1]) * UNITS[found[2]]
