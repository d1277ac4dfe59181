"""The house rules, read from docs/design.md and held against the source: layers, cycles, sizes, and what an import may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "llavakit"
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
CODE = sorted(chain.from_iterable((ROOT / folder).rglob("*.py") for folder in ("src", "tests", "benchmarks", "ablations")))
HEAVY = ("torch", "transformers", "tokenizers", "numpy", "PIL", "safetensors", "huggingface_hub", "pydantic", "yaml")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """``llavakit.model.vision`` -> ``model``; the package itself and ``__main__`` are the front door."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "llavakit"


def layers() -> dict[str, int]:
    """room -> layer, from the table of design.md: a number, the rooms, two blanks or more, words."""
    block = re.search(r"## Layers.*?```\n(.*?)```", DESIGN, re.DOTALL)
    assert block, "design.md has no table of layers"
    table = {}
    for line in block[1].splitlines():
        number, names = re.match(r"(\d)  (.*?)(?:   .*)?$", line).groups()  # type: ignore[union-attr]
        table |= {name.rstrip("/"): int(number) for name in names.split()}
    return table


def sideways() -> set[tuple[str, str]]:
    line = re.search(r"^Sideways: (.*)$", DESIGN, re.MULTILINE)
    assert line
    return set(re.findall(r"`(\w+) -> (\w+)`", line[1]))


def imported(path: Path, *, only_on_import: bool = False) -> Iterator[str]:
    """The modules of this package that a file imports; ``only_on_import`` leaves out functions and TYPE_CHECKING."""
    tree = parsed(path)
    for node in _on_import(tree) if only_on_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "llavakit")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llavakit":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def _on_import(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not guarded and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _on_import(node)


DROP_IN = sorted((ROOT / "src" / "llava").rglob("*.py"))


def packages_of(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere."""
    nodes = list(ast.walk(parsed(path)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}}


def test_the_drop_in_stands_on_the_package_and_never_the_reverse() -> None:
    assert DROP_IN
    assert not [path for path in MODULES.values() if "llava" in packages_of(path)]
    allowed = {"llava", "llavakit", "torch", "transformers", "PIL", *sys.stdlib_module_names}
    strange = {str(path.relative_to(ROOT)): names for path in DROP_IN if (names := packages_of(path) - allowed)}
    assert not strange


@pytest.mark.parametrize("path", DROP_IN, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_every_module_of_the_drop_in_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parsed(path))


def test_every_room_stands_in_the_table() -> None:
    rooms = {room(module) for module in MODULES} - {"llavakit", "__main__"}
    assert rooms == set(layers())


def test_every_room_has_its_line() -> None:
    described = set(re.findall(r"^\| `(\w+)/?` \|", DESIGN, re.MULTILINE))
    assert described == set(layers())


def test_imports_point_down() -> None:
    table, allowed = layers(), sideways()
    wrong = []
    for module, path in MODULES.items():
        here = room(module)
        if here in ("llavakit", "__main__"):
            continue
        for target in imported(path):
            there = room(target)
            if there not in ("llavakit", here) and table[there] >= table[here] and (here, there) not in allowed:
                wrong.append(f"{module} (layer {table[here]}) imports {target} (layer {table[there]})")
    assert not wrong, "\n".join(wrong)


def test_sideways_pairs_are_used() -> None:
    used = {(room(module), room(target)) for module, path in MODULES.items() for target in imported(path)}
    assert sideways() <= used


def test_there_is_no_circle() -> None:
    graph = {module: set(imported(path, only_on_import=True)) - {module} for module, path in MODULES.items()}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_a_screen_or_few(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400
    functions = (node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {node.name: length for node in functions if (length := (node.end_lineno or 0) - node.lineno + 1) > 60}
    assert not long


@pytest.mark.parametrize("path", MODULES.values(), ids=list(MODULES))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parsed(path))


def loaded_by(statement: str) -> set[str]:
    """The top-level packages in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_loads_the_standard_library_only() -> None:
    added = loaded_by("import llavakit") - loaded_by("pass") - {"llavakit"}
    assert added <= set(sys.stdlib_module_names), added - set(sys.stdlib_module_names)


def test_the_command_line_loads_nothing_heavy() -> None:
    assert not loaded_by("import llavakit.cli, llavakit.cli.app") & set(HEAVY)


def test_the_drop_in_asks_for_torch_only_where_it_computes() -> None:
    assert not loaded_by("import llava, llava.constants, llava.utils") & set(HEAVY)
    assert not loaded_by("import llava.conversation") & {"torch", "transformers", "tokenizers"}


def test_rooms_without_torch() -> None:
    line = re.search(r"^Without torch: (.*?)\. ", DESIGN, re.MULTILINE | re.DOTALL)
    assert line
    rooms = re.findall(r"`(\w+)`", line[1])
    assert rooms
    modules = [module for module in MODULES if room(module) in rooms]
    loaded = loaded_by("import " + ", ".join(modules))
    assert not loaded & {"torch", "transformers", "tokenizers"}
