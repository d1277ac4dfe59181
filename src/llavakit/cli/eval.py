"""``llava eval``: a benchmark -> answers -> a score that says how it was asked and what was to be expected."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, Typer
from typer.core import TyperGroup

from llavakit.cli import asking, ensemble, judge, options, results
from llavakit.cli.border import one_line
from llavakit.cli.evaluating import Asking, say, warn
from llavakit.cli.terminal import many
from llavakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from llavakit.eval.answers import Line
    from llavakit.eval.benchmark import Answered, Benchmark, Protocol, Question, Score, Verdict
    from llavakit.eval.report import Line as Told
    from llavakit.responder import Limits, ServerCompleter

EXAMPLES = """Examples:

  llava eval scenes                                       (the built-in model on drawn scenes, at once)
  llava eval list
  llava eval show textvqa
  llava eval textvqa data/textvqa --model llava-hf/llava-1.5-7b-hf --out runs/textvqa
"""
RUN_EXAMPLES = """Examples:

  llava eval scenes --limit 100 --batch 32
  llava eval run scenes                                   (the same; "run" may be left out)
  llava eval textvqa data/textvqa --protocol llava-1.5 --model llava-hf/llava-1.5-7b-hf --out runs/textvqa
  llava eval textvqa data/textvqa --api http://localhost:8000/v1 --model llava
  torchrun --nproc-per-node 8 -m llavakit eval vqav2 data/vqav2 --model my-model --out runs/vqav2
"""
LIST_EXAMPLES = "Examples:\n\n  llava eval list\n"
SHOW_EXAMPLES = "Examples:\n\n  llava eval show scenes\n"
SCORE_EXAMPLES = """Examples:

  llava eval score scenes evaluation/scenes/plain/tiny/answers.jsonl
  llava eval score pope answers/llava-v1.5-7b.jsonl data/pope --json
"""

Name = Annotated[str, Argument(metavar="NAME", show_default=False, help="A benchmark; llava eval list names them.")]
Folder = Annotated[
    Path | None, Argument(metavar="FOLDER", show_default=False, help="Where its official files lie; llava eval show NAME says which.")
]
ProtocolName = Annotated[str | None, Option("--protocol", metavar="NAME", help="How it is asked (default: the benchmark's first).")]
Out = Annotated[
    Path | None, Option("--out", "-o", metavar="FOLDER", help="Where answers go; the same again goes on (default: under evaluation/).")
]
Limit = Annotated[int | None, Option("--limit", min=1, help="Only the first so many questions.")]
Batch = Annotated[int, Option("--batch", min=1, help="Questions that our own model answers at once.")]
Page = Annotated[bool, Option("--page/--no-page", help="Write page.html: every question with picture, answer and verdict.")]


class Named(TyperGroup):
    """``llava eval scenes`` is ``llava eval run scenes``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


app = Typer(
    cls=Named,
    help="Ask a model the questions of a benchmark, and score it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=EXAMPLES,
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A model elsewhere, as options."""

    api: Annotated[
        str | None,
        Option("--api", metavar="URL", help="Ask an OpenAI-compatible server whose model --model is (http://host/v1, or openai)."),
    ] = None
    key: asking.KeyVariable = "OPENAI_API_KEY"
    concurrency: asking.Concurrency = 16

    def completer(self, model: str | None) -> ServerCompleter | None:
        """The server, where one is to be asked. Raises ConfigError where its model is not named."""
        from llavakit.responder import ServerCompleter

        if self.api is None:
            return None
        if model is None:
            raise ConfigError("the server's model is not named", code="bad_value", where="--model", remedy="add --model NAME")
        if self.api == asking.OPENAI:
            return ServerCompleter(model, key_variable=self.key)
        return ServerCompleter(model, base_url=self.api, key_variable=self.key)

    def limits(self) -> Limits:
        from llavakit.responder import Limits

        return Limits(concurrency=self.concurrency)


@app.command(epilog=RUN_EXAMPLES)
@options.spread
def run(
    name: Name,
    folder: Folder = None,
    protocol: ProtocolName = None,
    out: Out = None,
    limit: Limit = None,
    batch: Batch = 16,
    page: Page = True,
    as_json: options.Json = False,
    *,
    server: Server,
    loading: options.Loading,
) -> None:
    """Ask the questions of a benchmark, and score the answers."""
    from llavakit.eval import benchmarks
    from llavakit.eval.answers import read
    from llavakit.eval.run_folder import RUN, read_run

    benchmark = benchmarks.find(name)
    way = benchmarks.protocol(benchmark, protocol)
    completer = server.completer(loading.model)
    place = out or Path("evaluation") / benchmark.name / way.name / (Path(loading.model or "tiny").name or "model")
    questions = benchmark.questions(_files(benchmark, folder, place, limit), way)
    about = Asking(benchmark=benchmark, protocol=way, questions=questions, out=place, limit=limit)
    job, outcome = about.of_server(completer, server.limits()) if completer else about.of_model(loading, batch=batch)
    if outcome.failures:
        say(f"{many(len(outcome.failures), 'question')} failed; {place / 'failures.jsonl'} says why, the same command asks again")
    if outcome.exit_code:
        raise Exit(outcome.exit_code)
    if not outcome.whole:
        say(f"rank {job.share.rank}: {many(outcome.fresh, 'answer')}; whoever ends last puts all of them together")
        return
    tell(
        benchmark, way, _answered(read(place / "answers.jsonl"), questions, limit), place, read_run(place / RUN), page=page, as_json=as_json
    )


@app.command("list", epilog=LIST_EXAMPLES)
def list_all(as_json: options.Json = False) -> None:
    """Name the benchmarks and their protocols."""
    from llavakit.eval.benchmarks import ALL

    if as_json:
        print(json.dumps([{"name": b.name, "title": b.title, "protocols": [p.name for p in b.protocols]} for b in ALL]))
        return
    width = max(len(benchmark.name) for benchmark in ALL)
    for benchmark in ALL:
        print(f"{benchmark.name:{width}}  {benchmark.title}  [{', '.join(protocol.name for protocol in benchmark.protocols)}]")


@app.command(epilog=SHOW_EXAMPLES)
def show(name: Name, as_json: options.Json = False) -> None:
    """Tell a benchmark's files, reference, protocols and published numbers."""
    from llavakit.eval import benchmarks

    benchmark = benchmarks.find(name)
    if as_json:
        told = {key: getattr(benchmark, key) for key in ("name", "title", "needs", "reference")}
        print(json.dumps(told | {"protocols": [asdict(protocol) for protocol in benchmark.protocols]}))
        return
    print(f"{benchmark.name}: {benchmark.title}\n\nfiles      {benchmark.needs}\nscored by  {benchmark.reference}")
    for protocol in benchmark.protocols:
        print(f"\n--protocol {protocol.name}{'' if protocol is not benchmark.protocols[0] else '   (the default)'}")
        for key, value in _how(protocol):
            print(f"  {key:15}{value}")
        for number in protocol.published:
            print(f"  {'published':15}{number.model}: {number.metric} {number.value:g} ± {number.tolerance:g}  ({number.source})")


@app.command(epilog=SCORE_EXAMPLES)
def score(
    name: Name,
    answers: Annotated[Path, Argument(metavar="ANSWERS", help="An answers file: ours, or one of LLaVA's own runners.")],
    folder: Folder = None,
    protocol: ProtocolName = None,
    out: Annotated[Path | None, Option("--out", "-o", metavar="FOLDER", help="Write scores.json, page.html and the upload there.")] = None,
    limit: Limit = None,
    as_json: options.Json = False,
) -> None:
    """Score answers that are there. No model is loaded."""
    from llavakit.eval import benchmarks
    from llavakit.eval.answers import read
    from llavakit.eval.run_folder import RUN, read_run

    benchmark = benchmarks.find(name)
    facts = read_run(answers.parent / RUN) if (answers.parent / RUN).exists() else {}
    way = benchmarks.protocol(benchmark, protocol or (facts.get("protocol") if facts.get("benchmark") == benchmark.name else None))
    if facts and (facts.get("benchmark"), facts.get("protocol")) != (benchmark.name, way.name):
        warn(f"these answers were asked as {facts.get('benchmark')}, protocol {facts.get('protocol')}")
    facts = facts or {"benchmark": benchmark.name, "protocol": way.name, "model": answers.stem}
    found = read(answers)
    with TemporaryDirectory() as scratch:
        beside = answers.parent if (answers.parent / benchmark.name).is_dir() else Path(scratch)
        questions = benchmark.questions(_files(benchmark, folder, beside, None if out else 0), way)
        answered = _answered(found, questions, limit or facts.get("asked"))
        tell(benchmark, way, answered, out, facts, page=out is not None, as_json=as_json)


app.command("report", epilog=results.EXAMPLES)(results.results)
app.command("judge", epilog=judge.JUDGE_EXAMPLES)(judge.judge)
app.command("reviews", epilog=judge.REVIEWS_EXAMPLES)(judge.reviews)
app.command("ensemble", epilog=ensemble.EXAMPLES)(ensemble.ensemble)


def _files(benchmark: Benchmark, folder: Path | None, place: Path, limit: int | None) -> Path:
    """The folder of the benchmark's files; those that can be made are made beside the answers. ``limit`` 0: pictures are not needed."""
    if folder is not None:
        return folder
    if benchmark.make is None:
        remedy = f"give the folder that has them: {benchmark.needs}"
        raise ConfigError("the benchmark's files are needed", code="bad_value", where="FOLDER", remedy=remedy)
    made = place / benchmark.name
    if limit != 0 and not made.exists():
        say(f"making {made}")
    benchmark.make(made, limit)
    return made


# --- telling --------------------------------------------------------------------------------------------------------------------------


def _answered(found: Sequence[Line], questions: Sequence[Question], limit: int | None) -> list[Answered]:
    """The questions with their answers; misfits are told."""
    from llavakit.eval.answers import match

    matched = match(questions, found, limit=limit)
    for remark in matched.remarks():
        warn(remark)
    return matched.answered


def tell(
    benchmark: Benchmark,
    way: Protocol,
    answered: Sequence[Answered],
    place: Path | None,
    facts: dict[str, Any],
    *,
    page: bool,
    as_json: bool,
) -> None:
    """The scores to stdout, beside what was published; scores.json, the page and the official upload into ``place``."""
    from llavakit.eval.report import Result, compare, record

    upload = _upload(benchmark, answered, place)
    try:
        scores = benchmark.score(answered) if benchmark.score is not None else []
    except DataError as error:  # right answers that are not public: the upload is what there is
        if upload is None:
            raise
        scores = []
        say(f"not scored here: {error}")
    if place is not None:
        _write(benchmark, way, answered, scores, place, facts, page=page)
    result = Result(benchmark=benchmark.name, protocol=way.name, model=str(facts.get("model", "")), scores=tuple(scores), facts=facts)
    lines = compare(result, way)
    if as_json:
        print(json.dumps(record(result, lines)))
        return
    print(f"{result.benchmark} --protocol {result.protocol}   {result.model}")
    for key, value in _how(way):
        print(f"  {key:15}{value}")
    if facts.get("asked", 0) < facts.get("questions", 0):
        print(f"  {'only':15}{facts['asked']:,} of {facts['questions']:,} questions: published numbers do not compare")
    for line in table(lines):
        print(line)
    if benchmark.score is None:
        print(f"  {'scored by':15}{one_line(benchmark.reference)}")
        if benchmark.name in judge.NAMES:
            files = "" if benchmark.make is not None else " FOLDER"
            print(f"  {'next':15}llava eval judge {benchmark.name} {(place or Path()) / 'answers.jsonl'}{files} --judge MODEL")


def _upload(benchmark: Benchmark, answered: Sequence[Answered], place: Path | None) -> Path | None:
    """The file for the official server, where there is one and every question has its answer."""
    if benchmark.submit is None or place is None or any(one.text is None for one in answered):
        return None
    place.mkdir(parents=True, exist_ok=True)
    upload = benchmark.submit(answered, place)
    say(f"upload: {upload}")
    return upload


def table(lines: Iterable[Told]) -> list[str]:
    """Every score on a line, with its interval, and below it what was published under this protocol, or why that does not compare."""
    shown, last = [], None
    for line in lines:
        score, number = line.score, line.published
        if score is not last:
            interval = "" if score.half_width is None else f" ± {score.half_width:.1f}"
            star = "*" if score.headline else " "
            shown.append(f"{star} {score.metric:24}{score.value:8.1f}{interval:8}{many(score.count, 'question'):>18}")
            last = score
        if number is not None:
            why = f" ({'; '.join(line.reasons)})" if line.reasons else ""
            said = f"{line.difference:+.1f}, {line.verdict}{why}"
            shown.append(f"    published{number.value:23.1f} ± {number.tolerance:<5.1f} {number.model}: {said}")
    return shown


def _how(way: Protocol) -> list[tuple[str, str]]:
    """A protocol, field by field; what it leaves to the checkpoint is left out."""
    fields = (
        ("prompt format", way.template),
        ("pictures", way.aspect),
        ("suffix", way.suffix and one_line(way.suffix)),
        ("hints", "shown" if way.hints else None),
        ("longest reply", f"{way.max_new_tokens} tokens, {f'temperature {way.temperature:g}' if way.temperature else 'greedy'}"),
        ("passes", "two: the reasons, then the answer" if way.passes == 2 else None),
        ("judge", way.judge),
        ("note", way.note),
    )
    return [(name, value) for name, value in fields if value]


def _write(
    benchmark: Benchmark,
    way: Protocol,
    answered: Sequence[Answered],
    scores: Sequence[Score],
    place: Path,
    facts: dict[str, Any],
    *,
    page: bool,
) -> None:
    from llavakit.eval.page import write_page
    from llavakit.eval.report import write_scores

    place.mkdir(parents=True, exist_ok=True)
    if scores:
        write_scores(place, scores)
    if page:
        rows = [(one, _verdict(benchmark, one)) for one in answered]
        told = [f"{key}: {value}" for key, value in [("model", str(facts.get("model", ""))), *_how(way)]]
        write_page(place / "page.html", rows, title=f"{benchmark.name}, protocol {way.name}", facts=told, scores=scores)
        say(str(place / "page.html"))


def _verdict(benchmark: Benchmark, one: Answered) -> Verdict | None:
    return benchmark.verdict(one) if benchmark.verdict is not None and one.text is not None else None
