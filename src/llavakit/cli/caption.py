"""``llava caption``: a line of text or JSON for every picture of a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llavakit.cli import asking, options
from llavakit.cli.asking import Asking
from llavakit.errors import ConfigError

EXAMPLES = """Examples:

  llava caption photos                                       (our own model; captions.jsonl)
  llava caption photos --question "Is anybody in the picture?" --model runs/finetune
  llava caption photos --teacher http://localhost:8000/v1 --model qwen-vl --schema album.json --out album.jsonl
"""

Folder = Annotated[Path, Argument(metavar="FOLDER", show_default=False, help="Pictures, also in folders below it.")]
Out = Annotated[Path, Option("--out", "-o", metavar="FILE", help="Where the lines go; the same file again goes on where it stopped.")]
Questions = Annotated[list[str] | None, Option("--question", "-q", metavar="TEXT", help="What is asked (may be repeated).")]
Schema = Annotated[Path | None, Option("--schema", metavar="FILE", help="A JSON schema that every reply must fit.")]


@options.spread
def caption(
    folder: Folder,
    out: Out = Path("captions.jsonl"),
    question: Questions = None,
    schema: Schema = None,
    *,
    whom: Asking,
    drawing: options.Drawing,
    loading: options.Loading,
) -> None:
    """Describe every picture of a folder, ask about it, or fill in a form."""
    from llavakit.datagen import library
    from llavakit.datagen import schema as schemas
    from llavakit.datagen.kinds import Prompts
    from llavakit.responder import Ledger, ask_all

    who = whom.teacher or asking.OWN
    if who == asking.SCENES:
        raise ConfigError("that teacher answers llava generate only", code="bad_value", where="--teacher", remedy="name another")
    job = library.Library(
        folder=folder,
        names=library.pictures(folder),
        questions=tuple(dict.fromkeys(question or (library.QUESTION,))),
        sampling=drawing.sampling(),
        schema=schemas.load(schema) if schema is not None else None,
        again=0 if who == asking.OWN and not drawing.temperature else 2,  # a greedy model says the same again
    )
    teacher = whom.completer(who, loading, Prompts.load())
    limits = whom.limits(again=job.again)
    with Ledger(out.with_name(out.name + ".ledger")) as ledger:
        try:
            with asking.progress("captioning", len(job)) as tell:
                outcome = ask_all(job.queries(), teacher, ledger, limits=limits, judge=job.judge, on_progress=tell, total=len(job))
        finally:
            counts = library.write(job, teacher.name, ledger, out)
        told = ", ".join(f"{counts[name]:,} {name}" for name in ("answered", "rejected", "failed") if counts[name])
        print(f"{len(job.names):,} picture{'s' * (len(job.names) != 1)}: {told or 'nothing'}", file=sys.stderr)
        print(out)
        asking.ended(outcome, ledger, made=counts["answered"], failed=counts["failed"])
