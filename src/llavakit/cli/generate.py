"""``llava generate``: captions and boxes -> a teacher -> conversations to train on."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llavakit.cli import asking, options
from llavakit.cli.asking import Asking
from llavakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from llavakit.datagen.checks import Rules
    from llavakit.datagen.generate import Job
    from llavakit.datagen.kinds import Prompts
    from llavakit.datagen.parse import Kind
    from llavakit.datagen.plan import Plan, Task
    from llavakit.datagen.views import Counts
    from llavakit.responder import Ledger, Limits, Outcome, Spent

EXAMPLES = """Examples:

  llava generate --out try                                  (draws scenes, whose truth the built-in teacher knows)
  llava generate captions_train2017.json --instances instances_train2017.json --images train2017 --out data
      --teacher openai --model gpt-5-mini --price-in 0.25 --price-out 2 --dry-run
  llava generate contexts.jsonl --out data --teacher http://localhost:8000/v1 --model qwen --sample 20
  llava generate questions.jsonl --images pictures --out data --teacher http://localhost:8000/v1 --model qwen-vl --review
"""
LEDGER = "ledger.sqlite"
DRAWN = 40  # scenes, where no contexts are given

Contexts = Annotated[
    Path | None,
    Argument(metavar="CONTEXTS", show_default=False, help="COCO captions, our JSONL, or a folder of scenes (default: scenes are drawn)."),
]
Out = Annotated[Path, Option("--out", "-o", metavar="FOLDER", help="Where the rows go; the same folder again goes on where it stopped.")]
Instances = Annotated[Path | None, Option("--instances", metavar="FILE", help="COCO instances: the boxes of these pictures.")]
Images = Annotated[Path | None, Option("--images", metavar="FOLDER", help="Where the pictures lie, for a teacher who sees them.")]
See = Annotated[bool, Option("--see", help="Show the teacher the picture too.")]
Review = Annotated[bool, Option("--review", help="Ask the teacher about every row whether it may be used (private, harmful).")]
Kinds = Annotated[
    str | None,
    Option("--kinds", metavar="NAMES", help="conversation,detail,reasoning, or with numbers: detail=500 (with --count: shares)."),
]
Count = Annotated[int | None, Option("--count", "-n", min=1, help="How many rows (default: as many as the pictures allow in the mix).")]
PromptFolder = Annotated[Path | None, Option("--prompts", metavar="FOLDER", help="Text files that replace ours of the same name.")]
Sample = Annotated[int | None, Option("--sample", min=1, help="Only the first so many, shown on report.html with all that is not used.")]
Temperature = Annotated[float, Option("--temperature", "-t", help="How freely the teacher draws its words.")]
MaxTokens = Annotated[int, Option("--max-tokens", help="The longest reply, in tokens.")]
Seed = Annotated[int, Option("--seed", min=0, help="Decides which pictures, where <image> stands, and what the teacher draws.")]
DryRun = Annotated[bool, Option("--dry-run", help="Say what would be asked and about what it would cost, and leave.")]
Allow = Annotated[str | None, Option("--allow", metavar="CODES", help="Checks that are not made, by the code in rejects.jsonl.")]
Unknown = Annotated[
    float | None, Option("--unknown-objects", min=0, max=1, help="Greatest share of objects that neither captions nor boxes know (0.5).")
]


@options.spread
def generate(
    contexts: Contexts = None,
    out: Out = Path("generated"),
    kinds: Kinds = None,
    count: Count = None,
    instances: Instances = None,
    images: Images = None,
    see: See = False,
    review: Review = False,
    prompts: PromptFolder = None,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 1024,
    seed: Seed = 0,
    sample: Sample = None,
    allow: Allow = None,
    unknown_objects: Unknown = None,
    dry_run: DryRun = False,
    *,
    whom: Asking,
    loading: options.Loading,
) -> None:
    """Make instruction data from captions and boxes, or from pictures and questions."""
    from llavakit.datagen.generate import Job
    from llavakit.datagen.kinds import Prompts
    from llavakit.types import Sampling

    texts = Prompts.load(prompts)
    source = contexts if contexts is not None else _drawn(out, seed)
    tasks, drawn, asked = _tasks(source, instances, kinds, count, seed, texts)
    who = whom.teacher or (asking.SCENES if drawn else "")
    if not who:
        remedy = f"add --teacher: {asking.OWN}, {asking.OPENAI} or a server's address"
        raise ConfigError("nobody is named to answer", code="bad_value", where="--teacher", remedy=remedy)
    if who == asking.SCENES and not drawn:
        remedy = "name another, or give a folder of llava scenes export"
        raise ConfigError("that teacher knows drawn scenes only", code="bad_value", where="--teacher", remedy=remedy)
    place = images or (source / "images" if (source / "images").is_dir() else source if source.is_dir() else source.parent)
    sees = see or review or asked or who == asking.SCENES
    job = Job(
        tasks=tasks if sample is None else list(islice(tasks, sample)),
        prompts=texts,
        sampling=Sampling(temperature=temperature, max_new_tokens=max_tokens, seed=seed),
        rules=_rules(allow, unknown_objects),
        images=place if sees else None,
        review=review,
        again=0 if who == asking.SCENES else 2,
    )
    if sees:
        _look_for(job.tasks, place)
    total = len(tasks) if sample is None else min(sample, len(tasks))
    _run(job, total, who, whom, loading, out=out, dry_run=dry_run, page=sample is not None, images=place)


def _run(
    job: Job, total: int, who: str, whom: Asking, loading: options.Loading, *, out: Path, dry_run: bool, page: bool, images: Path
) -> None:
    """Preview, ask, write; the ledger is held by this process as long as any of it takes."""
    from llavakit.datagen.generate import run
    from llavakit.responder import Ledger

    if dry_run and not (out / LEDGER).exists():
        _preview(job, who, whom, None, "", dry_run=True)
        return
    teacher = whom.completer(who, loading, job.prompts)
    limits = whom.limits(again=job.again)
    out.mkdir(parents=True, exist_ok=True)
    with Ledger(out / LEDGER) as ledger:
        _preview(job, who, whom, ledger, teacher.name, dry_run=dry_run)
        if dry_run:
            return
        try:
            with asking.progress("asking", total) as tell:
                outcome = run(job, teacher, ledger, limits=limits, on_progress=tell, total=total)
        finally:  # whatever ended it, what was paid for is shown
            counts = _write(job, ledger, teacher.name, out)
        spent = ledger.spent(teacher.name)
        _told(job, counts, spent, outcome, limits, out, images, page=total if page else None)
        asking.ended(outcome, ledger, made=counts.rows.total(), failed=counts.failed)


def _told(job: Job, counts: Counts, spent: Spent, outcome: Outcome, limits: Limits, out: Path, images: Path, *, page: int | None) -> None:
    """What came of it, in words and as a page; the files' names to stdout."""
    for line in counts.lines():
        print(line, file=sys.stderr)
    if images.is_dir():
        print(f"its pictures: {images} (--images of llava data check, images= of llava train)", file=sys.stderr)
    if spent.tokens:
        cost = limits.budget.cost(spent)
        told = f", cost {cost:,.2f}" if cost is not None else ""
        print(f"spent: {spent.prompt_tokens:,} tokens read, {spent.reply_tokens:,} written{told}", file=sys.stderr)
    if outcome.spent_up:
        print("the budget is spent: a greater one goes on from here", file=sys.stderr)
    took = {"tokens read": spent.prompt_tokens, "tokens written": spent.reply_tokens, "cost": limits.budget.cost(spent)}
    print(_report(job, out, images, {name: value for name, value in took.items() if value is not None}, samples=page))
    print(out / "finetune.json")


def _drawn(out: Path, seed: int) -> Path:
    """Scenes of our own, drawn once; the benchmark is the last of their files."""
    from llavakit.scenes.export import choose, write

    folder = out / "scenes"
    if not (folder / "benchmark.jsonl").exists():
        write(folder, choose(DRAWN, seed=seed), workers=1)
    return folder


def _tasks(
    source: Path, instances: Path | None, kinds: str | None, count: int | None, seed: int, texts: Prompts
) -> tuple[Plan | list[Task], bool, bool]:
    """What is to be asked; whether the pictures are drawn scenes; whether the questions are people's own."""
    from llavakit.datagen.kinds import SHARES
    from llavakit.datagen.plan import Plan, counts, task
    from llavakit.datagen.reading import has_prompts, read_asked, read_contexts

    if has_prompts(source):
        if kinds is not None or instances is not None:
            raise ConfigError("the file holds people's questions", code="bad_value", where="--kinds, --instances", remedy="leave them out")
        return [task("answer", context, seed=seed, instruction=prompt) for context, prompt in read_asked(source)][:count], False, True
    known = read_contexts(source, instances=instances)
    for line in known.lines():
        print(line, file=sys.stderr)
    shares, exact = _wanted(kinds)
    wanted = {kind: int(share) for kind, share in shares.items()} if exact and count is None else None
    if wanted is None:
        wanted = counts(len(known.contexts), shares or SHARES, count)
    return Plan(known.contexts, wanted, seed=seed, detailed=texts.detailed), known.drawn, False


def _wanted(words: str | None) -> tuple[dict[Kind, float], bool]:
    """``--kinds``: the kinds with their shares of the usual mix, or with the numbers given (then True)."""
    from llavakit.datagen.kinds import SHARES

    wanted: dict[Kind, float] = {}
    given = 0
    for word in (words or ",".join(SHARES)).split(","):
        name, equals, number = word.strip().partition("=")
        kind = next((kind for kind in SHARES if kind == name), None)
        if kind is None or (equals and not number.isdecimal()):
            remedy = f"use {', '.join(SHARES)}, with or without =NUMBER"
            raise ConfigError(f"no kind {word.strip()!r}", code="bad_value", where="--kinds", remedy=remedy)
        wanted[kind] = float(number) if equals else SHARES[kind]
        given += bool(equals)
    if given not in (0, len(wanted)):
        raise ConfigError("some kinds have a number and some have none", code="bad_value", where="--kinds", remedy="give all or none")
    return wanted, bool(given)


def _rules(allow: str | None, unknown_objects: float | None) -> Rules:
    from llavakit.datagen.checks import CODES, Rules

    off = frozenset(word.strip() for word in (allow or "").split(",") if word.strip())
    if wrong := sorted(off - set(CODES)):
        raise ConfigError(f"no check {wrong[0]!r}", code="bad_value", where="--allow", remedy=f"the checks are {', '.join(CODES)}")
    if unknown_objects is None:
        return Rules(off=off)
    return Rules(off=off, unknown_objects={"conversation": unknown_objects, "detail": unknown_objects})


def _look_for(tasks: Iterable[Task], images: Path) -> None:
    """Raises DataError where a picture that must be shown is not there: before anything is paid."""
    names = dict.fromkeys(task.context.image for task in tasks)
    absent = [name for name in names if not (images / name).is_file()]
    if absent:
        what = f"{len(absent):,} of {len(names):,} pictures are not there, the first is {absent[0]}"
        raise DataError(what, code="image_missing", where=str(images), remedy="say where they lie with --images")


def _preview(job: Job, who: str, whom: Asking, ledger: Ledger | None, teacher: str, *, dry_run: bool) -> None:
    """What is about to be asked; for a dry run the first question too, on stdout."""
    from llavakit.datagen.preview import preview
    from llavakit.responder import settled

    known = None
    if ledger is not None and next(ledger.replies(), None) is not None:

        def known(task: Task) -> bool:
            return settled(job.query(task), teacher, ledger, judge=job.judge(task), again=job.again) is not None

    told = preview(job, price=whom.purse().price, concurrency=whom.concurrency, known=known)
    for line in told.lines(paid=who not in (asking.SCENES, asking.OWN)):
        print(line, file=sys.stdout if dry_run else sys.stderr)
    if dry_run:
        print(f"\n{told.first}")


def _report(job: Job, out: Path, images: Path, cost: dict[str, float], *, samples: int | None) -> Path:
    """The page that tells what came of it; of a sample it shows every row and every reply that is not used."""
    from llavakit.datagen.facts import json_lines
    from llavakit.datagen.objects import naming
    from llavakit.datagen.report import write_report
    from llavakit.datagen.views import REJECTS, ROWS

    page = out / "report.html"
    told = ({"image": one.image, "instances": [{"category": box.category} for box in one.boxes]} for one in (t.context for t in job.tasks))
    rows, rejects = json_lines(out / ROWS), json_lines(out / REJECTS)
    shown = images if images.is_dir() else None
    write_report(page, rows, rejects=rejects, contexts=told, images=shown, cost=cost, named=naming, title=out.name, samples=samples)
    return page


def _write(job: Job, ledger: Ledger, teacher: str, out: Path) -> Counts:
    from llavakit.datagen.generate import made
    from llavakit.datagen.views import write_views

    failures = {failure.id.removesuffix("-review"): failure.what for failure in ledger.failures()}
    return write_views(out, made(job, teacher, ledger), teacher=teacher, prompts=job.prompts, rules=job.rules, failures=failures)
