"""``llava env``: what a bug report needs to know, and nothing private (home folders become ``~``, no variable but cache folders)."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from llavakit import __version__
from llavakit.cli import options

EXAMPLES = """Examples:

  llava env
  llava env --json > report.json
"""
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "pillow",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "pyyaml",
)
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16")  # what decides a CPU's speed
CACHES = (("HF_HOME", "~/.cache/huggingface"), ("HF_HUB_CACHE", "~/.cache/huggingface/hub"), ("TORCH_HOME", "~/.cache/torch"))

Report = dict[str, dict[str, str]]


def environment(as_json: options.Json = False) -> None:
    """Describe this installation and machine, for a bug report."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for title, rows in found.items():
        print(f"{title}:")
        for name, value in rows.items():
            print(f"  {name}: {value}")


def report() -> Report:
    """All sections; importing torch takes the second that this needs."""
    return {"llavakit": _program(), "packages": _packages(), "processor": _processor(), "torch": _torch(), "caches": _caches()}


def tidy(path: str) -> str:
    """A path with the home folder written as ``~``; one that lies elsewhere keeps its last name only."""
    whole, home = Path(path).expanduser(), Path.home()
    return f"~/{whole.relative_to(home)}" if whole.is_relative_to(home) else f".../{whole.name}"


def _program() -> dict[str, str]:
    return {"version": __version__, "python": platform.python_version(), "implementation": sys.implementation.name, "system": _system()}


def _system() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _packages() -> dict[str, str]:
    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    return {name: version(name) for name in PACKAGES}


def _processor() -> dict[str, str]:
    lines = _cpuinfo()
    flags = set(lines.get("flags", lines.get("Features", "")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": lines.get("model name", platform.processor() or "unknown"),
        "cores": f"{usable} usable of {os.cpu_count()}",
        "flags": " ".join(flag for flag in FLAGS if flag in flags) or "unknown",
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's rows of /proc/cpuinfo; empty where there is none (macOS, Windows)."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return {}
    rows = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in rows}


def _torch() -> dict[str, str]:
    import torch

    from llavakit.checkpoint.store import cpu_has_bf16

    rows = {
        "threads": str(torch.get_num_threads()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "bf16 on the cpu": "in hardware" if cpu_has_bf16() else "emulated",
        "cuda": torch.version.cuda or "not built in",
        "mps": "available" if torch.backends.mps.is_available() else "none",
    }
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return rows | {f"cuda:{number}": f"{d.name}, {d.total_memory / 2**30:.0f} GiB" for number, d in enumerate(devices)}


def _caches() -> dict[str, str]:
    return {name: tidy(os.environ.get(name, usual)) for name, usual in CACHES}
