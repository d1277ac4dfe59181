"""``llava data mixture`` and ``llava data scienceqa``: the data sets of the papers, and other mixtures written down like them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from llavakit.cli import options, terminal

if TYPE_CHECKING:
    from llavakit.data.manifest import Manifest
    from llavakit.data.mixture import Ingredient, Mixture
    from llavakit.data.parts import PartCounts
    from llavakit.data.sources import Sample

MIXTURE_EXAMPLES = """Examples:

  llava data mixture llava-1.5-665k                          (what it is made of, what to download)
  llava data mixture llava-1.5-665k --images data            (what is missing, and every count against the published one)
  llava data mixture mine.yaml --images data --share 0.1
"""
SCIENCEQA_EXAMPLES = """Examples:

  llava data scienceqa ScienceQA scienceqa/train.json                     (as the v1-scienceqa recipe takes it)
  llava data scienceqa ScienceQA scienceqa/test.json --split test --code bare
"""


def mixture(
    name: Annotated[str, Argument(metavar="NAME", show_default=False, help="A shipped mixture, or a manifest of your own (.yaml, .json).")],
    images: Annotated[
        Path | None, Option("--images", metavar="FOLDER", help="Where its files and pictures lie; without it the mixture is only listed.")
    ] = None,
    share: Annotated[float, Option("--share", help="The part of every source that is taken.")] = 1.0,
    as_json: options.Json = False,
) -> None:
    """Say what a mixture is made of and, with its folder, what is missing and whether it is as published. Exit code 1 if it is not."""
    from llavakit.data.manifest import SHIPPED, read_manifest, shipped
    from llavakit.data.mixture import missing, open_mixture
    from llavakit.data.reading import now_and_then

    manifest = shipped(name) if name in SHIPPED or not Path(name).is_file() else read_manifest(Path(name))
    if images is None:
        print(json.dumps(dataclasses.asdict(manifest), default=str) if as_json else "\n".join(_listed(manifest)))
        return
    absent = missing(manifest, images, images_needed=True)
    if missing(manifest, images, images_needed=False):  # without a file nothing can be counted
        print(json.dumps({"missing": absent}) if as_json else "\n".join(_lost(absent)))
        raise Exit(1)
    opened = open_mixture(manifest, images, share=share, on_bad="skip", progress=lambda file: now_and_then(f"reading {file}, once", _say))
    counted = [_counted(part, images) for part in opened.ingredients]
    print(json.dumps(_as_json(opened, counted, absent)) if as_json else "\n".join([*_lost(absent), *_told(opened, counted)]))
    if absent or opened.report.faults or any(found.differences for found in counted):
        raise Exit(1)


def scienceqa(
    folder: Annotated[Path, Argument(metavar="FOLDER", show_default=False, help="Holds problems.json and pid_splits.json.")],
    out: Annotated[Path, Argument(metavar="TO", show_default=False, help="NAME.json or NAME.jsonl, plain or .gz.")],
    split: Annotated[str, Option("--split", metavar="NAME", help="train, val, test, minitrain, minival or minitest.")] = "train",
    code: Annotated[
        str, Option("--code", help="What is asked and what is answered, as QCM-LEA (v1.3), QCM-LEPA (v0); or bare.")
    ] = "QCM-LEA",
    captions: Annotated[
        Path | None, Option("--captions", metavar="FILE", help="Captions of the pictures, to stand behind the hint.")
    ] = None,
    original_names: Annotated[bool, Option("--original-names", help="ID/image.png, relative to the split's own folder.")] = False,
) -> None:
    """Convert ScienceQA to LLaVA's format, word for word as the original did. Pictures are named SPLIT/ID/image.png."""
    from llavakit.data.convert import write_records
    from llavakit.data.scienceqa import convert_scienceqa

    records = convert_scienceqa(folder, split=split, code=code, captions=captions, split_in_name=not original_names)
    write_records(records, out)
    pictured = sum("image" in record for record in records)
    print(f"{out}: {terminal.many(len(records), 'sample')}, {pictured:,} with a picture")


def _listed(manifest: Manifest) -> Iterator[str]:
    """A manifest for a person."""
    yield f"{manifest.name}: {manifest.about}" if manifest.about else manifest.name
    for spec in manifest.sources:
        yield ""
        yield f"{spec.name}  {_number(spec.count)} records  {spec.title}"
        yield f"  file      {spec.file}"
        yield f"  pictures  {spec.images}/{f'  ({spec.pictures})' if spec.pictures else ''}"
        yield f"  licence   {spec.licence}"
        if spec.note:
            yield f"  note      {spec.note}"
        wide = max((len(part.name) for part in spec.parts), default=0)
        for part in spec.parts:
            where = ", ".join(part.roots) if part.roots else "no pictures" if part.count else "?"
            words = f"  ({part.note})" if part.note else ""
            about = f"about {part.about:,}" if part.about is not None else _number(part.count)
            yield f"  part      {part.name:<{wide}}  {about:>12}  {where}{words}"


def _lost(absent: list[str]) -> list[str]:
    return [f"missing {path}" for path in absent]


def _told(opened: Mixture, counted: list[PartCounts]) -> Iterator[str]:
    """The table of sources, what was found while reading, and the parts of each."""
    yield from opened.lines()
    yield from opened.report.lines()
    for part, found in zip(opened.ingredients, counted, strict=True):
        for count in found.by_part or (found.whole,):
            yield f"{part.spec.name}: {count}"
        yield from (f"{part.spec.name}: stray {place}" for place in found.strays)


def _as_json(opened: Mixture, counted: list[PartCounts], absent: list[str]) -> dict[str, Any]:
    rows = zip(opened.table(), counted, strict=True)
    sources = [dataclasses.asdict(row) | {"parts": [dataclasses.asdict(count) for count in found.by_part]} for row, found in rows]
    return {"missing": absent, "faults": dict(opened.report.faults), "remarks": dict(opened.report.remarks), "sources": sources}


def _counted(part: Ingredient, root: Path) -> PartCounts:
    from llavakit.data.parts import count_parts

    with terminal.progress(f"counting {part.spec.name}") as tell:

        def samples() -> Iterator[Sample]:
            for number, sample in enumerate(part.source):
                if not number % 1000:
                    tell(number, len(part.source))
                yield sample

        return count_parts(samples(), part.spec, root)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"
