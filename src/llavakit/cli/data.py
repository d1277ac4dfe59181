"""``llava data``: what is wrong with training files, what is in them, other formats, and one sample as a person reads it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, Typer

from llavakit.cli import options, published, terminal
from llavakit.cli.border import harmless, one_line
from llavakit.cli.terminal import many
from llavakit.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

    from llavakit.data.check import Stats
    from llavakit.data.reading import Progress
    from llavakit.data.sources import Sample, Source
    from llavakit.prompts import Segment
    from llavakit.types import Conversation

CHECK_EXAMPLES = """Examples:

  llava data check finetune.json --images pictures
  llava data check train.jsonl val.jsonl.gz --open --json
"""
STATS_EXAMPLES = """Examples:

  llava data stats finetune.json
  llava data stats finetune.json --images pictures --model tiny --max-length 2048 --json
"""
CONVERT_EXAMPLES = """Examples:

  llava data convert finetune.json finetune.jsonl            (messages, one a line)
  llava data convert finetune.json finetune.parquet --images pictures
  llava data convert rows.parquet finetune.json              (pictures become files beside it)
"""
SHOW_EXAMPLES = """Examples:

  llava data show finetune.json                              (the first sample; what is learned is marked)
  llava data show finetune.json 3 --images pictures
  llava data show finetune.json --id 000000123 --template vicuna_v1
"""


class Form(StrEnum):
    llava = "llava"
    messages = "messages"


Files = Annotated[list[Path], Argument(metavar="FILE...", help="Training files: JSON, JSONL, packed or not, or parquet.")]
File = Annotated[Path, Argument(metavar="FILE", show_default=False, help="A training file.")]
Images = Annotated[Path | None, Option("--images", metavar="FOLDER", help="Where its pictures lie (default: beside it).")]
AllowOutside = Annotated[bool, Option("--allow-outside", help="Pictures may lie outside that folder.")]

app = Typer(help="Check, count, convert and read training data.", no_args_is_help=True, rich_markup_mode="rich")


@app.command(epilog=CHECK_EXAMPLES)
def check(
    files: Files,
    images: Images = None,
    open_images: Annotated[bool, Option("--open", help="Also open every picture's header.")] = False,
    allow_outside: AllowOutside = False,
    as_json: options.Json = False,
) -> None:
    """List everything that is wrong, with file, line and id. Exit code 1 if a sample cannot be used."""
    from llavakit.data.check import check as examine

    rows: list[dict[str, Any]] = []
    for path in files:
        with terminal.progress(f"checking {path.name}") as tell:
            found = examine(path, image_root=images, allow_outside=allow_outside, open_images=open_images, progress=tell)
        if not as_json:
            for finding in found.findings:
                remedy = f". {finding.remedy}" if finding.remedy else ""
                print(one_line(f"{_kind(finding.fault)} {finding.code} {finding.where}: {finding.what}{remedy}"))
        findings = [{"kind": _kind(f.fault)} | {k: v for k, v in vars(f).items() if k != "fault"} for f in found.findings]
        remarks = len(found.findings) - found.faults
        rows.append({"file": str(path), "records": found.records, "faults": found.faults, "remarks": remarks, "findings": findings})
    faults, remarks, records = (sum(row[name] for row in rows) for name in ("faults", "remarks", "records"))
    if as_json:
        print(json.dumps({"records": records, "faults": faults, "remarks": remarks, "files": rows}))
    else:
        print(f"{many(records, 'record')}: {many(faults, 'fault')}, {many(remarks, 'remark')}")
    if faults:
        raise Exit(1)


@app.command(epilog=STATS_EXAMPLES)
def stats(
    files: Files,
    images: Images = None,
    model: Annotated[str | None, Option("--model", "-m", metavar="NAME", help="Count tokens with this model's processor.")] = None,
    template: Annotated[str | None, Option("--template", metavar="NAME", help="Another prompt format than the model's.")] = None,
    max_length: Annotated[int | None, Option("--max-length", min=1, help="Count samples with more tokens (needs --model).")] = None,
    allow_outside: AllowOutside = False,
    as_json: options.Json = False,
) -> None:
    """Count samples, turns, words and pictures; with a model also tokens, and what a length would cut."""
    if model is None and (max_length is not None or template is not None):
        what = "tokens are counted by a model"
        raise ConfigError(what, code="bad_value", where="--max-length, --template", remedy="add --model NAME")
    from llavakit.data.check import stats as count_all

    count = _counter(model, template) if model is not None else None
    rows = []
    for path in files:
        # a picture's size decides its tokens only for models that cut it into tiles; without a model no picture is looked for
        source = _source(path, images, allow_outside=allow_outside, check_images=count is not None)
        with terminal.progress(f"counting {path.name}") as tell:
            found = count_all(_told(source, tell), count=count, max_length=max_length)
        rows.append((path, source, found))
    if as_json:
        told = [
            {"file": str(p), "records": s.report.records, "left_out": s.report.faults.total()} | dataclasses.asdict(f) for p, s, f in rows
        ]
        print(json.dumps(told))
        return
    for path, source, found in rows:
        terminal.out().print(_table(path, source, found))


@app.command(epilog=CONVERT_EXAMPLES)
def convert(
    source: Annotated[Path, Argument(metavar="FROM", show_default=False, help="A training file in any format.")],
    out: Annotated[Path, Argument(metavar="TO", show_default=False, help="NAME.json, NAME.jsonl (both also .gz) or NAME.parquet.")],
    written: Annotated[Form | None, Option("--as", help="How to write it (default: LLaVA's in .json, else messages).")] = None,
    images: Images = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave out samples that cannot be used, and count them.")] = False,
) -> None:
    """Write the same samples in another format; nothing that the file says is lost."""
    from llavakit.data.convert import convert as rewrite

    with terminal.progress(f"converting {source.name}") as tell:
        report = rewrite(source, out, written=written.value if written else None, image_root=images, skip=skip_bad, progress=tell)
    for line in report.lines():
        print(line, file=sys.stderr)
    print(f"{out}: {many(report.records - report.faults.total(), 'sample')}")


@app.command(epilog=SHOW_EXAMPLES)
def show(
    file: File,
    number: Annotated[int, Argument(metavar="NUMBER", min=0, help="Which sample, counted from 0.")] = 0,
    sample_id: Annotated[str | None, Option("--id", metavar="ID", help="Which sample, by its id.")] = None,
    images: Images = None,
    template: Annotated[str, Option("--template", metavar="NAME", help="The prompt format.")] = "vicuna_v1",
    allow_outside: AllowOutside = False,
    as_json: options.Json = False,
) -> None:
    """Show one sample as the text that is learned from: what carries loss is green, or between [[ and ]]. For tokens: llava show --data."""
    source = _source(file, images, allow_outside=allow_outside, check_images=False)
    sample = _by_id(source, sample_id, file) if sample_id is not None else _by_number(source, number, file)
    segments = list(options.prompt_format(template).render(sample.conversation))
    if as_json:
        told = [{"kind": segment.kind, "text": segment.text, "learned": segment.learned} for segment in segments]
        pictures = [_name(image.source) for image in sample.conversation.images]
        print(json.dumps({"id": sample.id, "where": sample.where, "images": pictures, "segments": told}))
        return
    console = terminal.out()
    console.print(f"{sample.where}  id {sample.id}")
    for image in sample.conversation.images:
        absent = isinstance(image.source, Path) and not image.source.is_file()
        console.print(f"  {_name(image.source)}{'  (not there)' if absent else ''}")
    console.print(_marked(segments, colors=terminal.has_color(console)))


app.command(epilog=published.MIXTURE_EXAMPLES)(published.mixture)
app.command(epilog=published.SCIENCEQA_EXAMPLES)(published.scienceqa)


def _source(path: Path, images: Path | None, *, allow_outside: bool, check_images: bool) -> Source:
    """The usable samples of a file; what was left out goes to stderr."""
    from llavakit.data.sources import read_llava

    with terminal.progress(f"reading {path.name}") as tell:
        source = read_llava(path, image_root=images, on_bad="skip", allow_outside=allow_outside, check_images=check_images, progress=tell)
    if left_out := source.report.faults.total():
        print(f"{path.name}: {many(left_out, 'sample')} cannot be used (llava data check lists them)", file=sys.stderr)
    return source


def _by_number(source: Source, number: int, file: Path) -> Sample:
    if number >= len(source):
        remedy = f"it has {len(source)}, counted from 0"
        raise ConfigError(f"no sample {number}", code="bad_value", where=str(file), remedy=remedy)
    return source[number]


def _by_id(source: Source, sample_id: str, file: Path) -> Sample:
    found = next((sample for sample in source if sample.id == sample_id), None)
    if found is None:
        remedy = f"the first is {source[0].id}"
        raise ConfigError(f"no sample with the id {sample_id!r}", code="bad_value", where=str(file), remedy=remedy)
    return found


def _counter(model: str, template: str | None) -> Callable[[Conversation], tuple[int, int]]:
    from llavakit.cli.show import load_processor

    return load_processor(model, template).count


def _told(source: Source, tell: Progress) -> Iterator[Conversation]:
    for number, sample in enumerate(source):
        if not number % 100:
            tell(number, len(source))
        yield sample.conversation


def _table(path: Path, source: Source, found: Stats) -> str:
    """The figures of one file, in columns."""
    lines = [f"{path}: {many(source.report.records, 'record')}, {many(found.samples, 'usable sample')}", ""]
    lines.append(f"{'':>16}{'least':>10}{'median':>10}{'mean':>10}{'95 %':>10}{'most':>10}{'total':>14}")
    for name, spread in found.spreads.items():
        values = "".join(f"{value:>10,.6g}" for value in dataclasses.astuple(spread)[:-1])
        lines.append(f"{name.replace('_', ' '):>16}{values}{spread.total:>14,}")
    pictures = ", ".join(f"{count:,} with {number}" for number, count in found.images.items())
    lines += ["", f"{'pictures':>16}  samples: {pictures}"]
    if found.cut is not None:
        lines.append(f"{'truncated':>16}  {found.cut:,} of {found.samples:,} have more than {found.max_length:,} tokens")
    lines += [f"{'remark':>16}  {code}: {count:,}" for code, count in source.report.remarks.most_common()]
    return "\n".join(lines) + "\n"


def _marked(segments: list[Segment], *, colors: bool) -> Text:
    """The prompt with its learned text in green, or between ``[[`` and ``]]`` where colours are not seen."""
    from rich.text import Text

    text = Text()
    for learned, group in groupby(segments, key=lambda segment: segment.learned):
        if learned:
            words = harmless("".join(segment.text for segment in group))
            text.append(words if colors else f"[[{words}]]", "bold green")
            continue
        for segment in group:
            text.append(harmless(segment.text), {"image": "cyan", "control": "dim"}.get(segment.kind, "default"))
    return text


def _name(source: object) -> str:
    return str(source) if isinstance(source, Path) else f"{len(source):,} bytes in the file" if isinstance(source, bytes) else "pixels"


def _kind(fault: bool) -> str:
    return "fault" if fault else "remark"
