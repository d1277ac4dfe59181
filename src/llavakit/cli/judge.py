"""``llava eval judge`` and ``llava eval reviews``: answers to open questions -> a judge -> review files -> relative scores.

--judge NAME                a model on a server: --base-url (default: OpenAI's)
--judge model               our own model: --model NAME, a folder or a Hub id
--judge scenes              the built-in one, which judges scenes-bench from the truth of its scenes
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llavakit.cli import asking, options
from llavakit.cli.asking import Paying
from llavakit.errors import ConfigError, ResponderError

if TYPE_CHECKING:
    from llavakit.eval import mm_vet
    from llavakit.eval.benchmark import Score
    from llavakit.eval.judge import Case, Job, Judged, Rules
    from llavakit.eval.resample import Pair
    from llavakit.eval.reviews import Relative, Review
    from llavakit.responder import Completer, Ledger

JUDGE_EXAMPLES = """Examples:

  llava eval judge scenes-bench answers.jsonl                  (drawn scenes: the built-in judge, offline)
  llava eval judge llava-bench answers.jsonl llava-bench-in-the-wild --judge gpt-4-0613
  llava eval judge llava-bench-coco answers.jsonl coco --judge qwen3 --base-url http://localhost:8000/v1 --swap --runs 3
  llava eval judge mm-vet answers.jsonl mm-vet --judge gpt-4-0613 --runs 5
"""
REVIEWS_EXAMPLES = """Examples:

  llava eval reviews answers.reviews/reviews_gpt-4-0613.jsonl
  llava eval reviews first.jsonl second.jsonl third.jsonl      (several decodings: mean and standard deviation)
"""
LEDGER = "ledger.sqlite"
SCENES, MM_VET, COCO, WILD = "scenes-bench", "mm-vet", "llava-bench-coco", "llava-bench"
NAMES = (WILD, COCO, MM_VET, SCENES)

Name = Annotated[str, Argument(metavar="NAME", show_default=False, help=f"{', '.join(NAMES)}.")]
Answers = Annotated[
    Path, Argument(metavar="ANSWERS", show_default=False, help="The candidate's answers: JSON lines of question_id and text.")
]
Folder = Annotated[Path | None, Argument(metavar="FOLDER", show_default=False, help="The benchmark's own files; scenes-bench needs none.")]
Judge = Annotated[str | None, Option("--judge", metavar="WHO", help="A model on a server, model (our own: --model), or scenes.")]
BaseUrl = Annotated[str | None, Option("--base-url", metavar="ADDRESS", help="The server, such as http://localhost:8000/v1.")]
Out = Annotated[Path | None, Option("--out", "-o", metavar="FOLDER", help="Where reviews go (default: ANSWERS.reviews); it goes on there.")]
Swap = Annotated[bool, Option("--swap", help="Ask every question in both orders of the answers, and average.")]
Runs = Annotated[int, Option("--runs", min=1, help="Judge everything so many times, each with another seed.")]
Upstream = Annotated[bool, Option("--upstream", help="As upstream: the first reply counts, one without scores as -1 : -1 (MM-Vet: 0).")]
Again = Annotated[int, Option("--again", min=0, help="How often a reply without two scores from 1 to 10 is asked for anew.")]
RuleFile = Annotated[Path | None, Option("--rules", metavar="FILE", help="The judge's prompts: upstream's rule.json (MM-Vet: a text).")]
System = Annotated[str | None, Option("--system", metavar="TEXT", help="What the judge is told that it is, with --rules.")]
Temperature = Annotated[float, Option("--temperature", "-t", help="How freely the judge draws its words (MM-Vet has its own).")]
MaxTokens = Annotated[int | None, Option("--max-tokens", min=1, help="The longest reply, in tokens (1024; MM-Vet: 3).")]
Ignore = Annotated[str | None, Option("--ignore", metavar="IDS", help="Questions that are left out: 3,17,20.")]
Files = Annotated[list[Path], Argument(metavar="FILE...", show_default=False, help="Review files, upstream's or ours; several are runs.")]


@options.spread
def judge(
    name: Name,
    answers: Answers,
    folder: Folder = None,
    judge: Judge = None,
    base_url: BaseUrl = None,
    out: Out = None,
    swap: Swap = False,
    runs: Runs = 1,
    upstream: Upstream = False,
    again: Again = 4,
    rules: RuleFile = None,
    system: System = None,
    temperature: Temperature = 0.2,
    max_tokens: MaxTokens = None,
    ignore: Ignore = None,
    *,
    whom: Paying,
    loading: options.Loading,
) -> None:
    """Let a judge compare answers with the reference, and tell the relative scores."""
    from llavakit.responder import Ledger

    _check(name, folder)
    who = judge or ("scenes" if name == SCENES else None)
    left_out = {word.strip() for word in (ignore or "").split(",") if word.strip()}
    place = out or answers.with_name(answers.name.removesuffix(".jsonl").removesuffix(".json") + ".reviews")
    if name == MM_VET:
        assert folder is not None
        graded = _grading(folder, answers, left_out, rules, runs=runs, upstream=upstream, max_tokens=max_tokens or 3)
        grader = _completer(name, who, base_url, whom, loading)
        place.mkdir(parents=True, exist_ok=True)
        with Ledger(place / LEDGER) as ledger:
            _grade(graded, grader, ledger, whom, place, answers)
        return
    jobs = _jobs(_cases(name, folder, answers, left_out), _rules(rules, system), temperature, max_tokens or 1024, runs)
    jobs = [replace(job, swap=swap, upstream=upstream, again=again) for job in jobs]
    reviewer = _completer(name, who, base_url, whom, loading)
    place.mkdir(parents=True, exist_ok=True)
    with Ledger(place / LEDGER) as ledger:
        _review(jobs, reviewer, ledger, whom, place, name, answers)


def reviews(files: Files, ignore: Ignore = None) -> None:
    """Relative scores of review files: each one's, and their mean and deviation."""
    from llavakit.eval.reviews import by_category, read_reviews, relative_scores, spreads, table, unparsable

    left_out = {word.strip() for word in (ignore or "").split(",") if word.strip()}
    told: list[dict[str, Relative]] = []
    for path in files:
        found = read_reviews(path, ignore=left_out)
        pairs = by_category(found)
        told.append(relative_scores(pairs))
        print(f"{path}\n\n{table(pairs)}\n")
        if bad := unparsable(found):
            print(f"{path}: {bad} of {len(found)} reviews were not understood and are averaged as -1 : -1", file=sys.stderr)
        _drift(found)
    if len(files) > 1:
        print(spreads(told))


def _check(name: str, folder: Path | None) -> None:
    if name not in NAMES:
        raise ConfigError(
            f"nothing is judged that is called {name!r}", code="bad_value", where="NAME", remedy=f"use one of {', '.join(NAMES)}"
        )
    if folder is None and name != SCENES:
        remedy = "add the folder that holds the benchmark's own files"
        raise ConfigError("the benchmark's files are not named", code="bad_value", where="FOLDER", remedy=remedy)


def _completer(name: str, who: str | None, base_url: str | None, whom: Paying, loading: options.Loading) -> Completer:
    """The one who judges. Raises ConfigError where nobody is named, ResponderError without a key."""
    from llavakit.responder import InTurn, ServerCompleter

    if who is None or "://" in who:
        remedy = "add --judge NAME, and --base-url ADDRESS where the server is not OpenAI's"
        raise ConfigError("no judge is named", code="bad_value", where="--judge", remedy=remedy)
    if who == asking.SCENES:
        from llavakit.eval.scenes_bench import JUDGE, ScenesJudge, items

        if name != SCENES:
            raise ConfigError(f"that judge knows {SCENES} only", code="bad_value", where="--judge", remedy="name another")
        return InTurn(ScenesJudge(items()), JUDGE)
    if who == asking.OWN:
        return InTurn(loading.assistant(), asking.weights_name(loading))
    if base_url is None:
        return ServerCompleter(who, key_variable=whom.key)
    return ServerCompleter(who, base_url=base_url, key_variable=whom.key)


def _cases(name: str, folder: Path | None, answers: Path, left_out: set[str]) -> list[Case]:
    from llavakit.eval import llava_bench, scenes_bench

    if name == SCENES:
        found = scenes_bench.cases(scenes_bench.items(), llava_bench.read_answers(answers))
    else:
        assert folder is not None
        found = llava_bench.cases(folder, answers, wild=name == WILD)
    return [case for case in found if case.id not in left_out]


def _rules(path: Path | None, system: str | None) -> Rules:
    from llavakit.eval.judge import SYSTEM, Rules

    return Rules(system=system or SYSTEM) if path is None else Rules.load(path, system=system or SYSTEM)


def _jobs(cases: Sequence[Case], rules: Rules, temperature: float, max_tokens: int, runs: int) -> list[Job]:
    """One job a run: the same questions with another seed."""
    from llavakit.eval.judge import SAMPLING, Job

    sampling = SAMPLING.but(temperature=temperature, max_new_tokens=max_tokens)
    return [Job(cases=cases, rules=rules, sampling=sampling.but(seed=run)) for run in range(runs)]


def _review(jobs: Sequence[Job], judge: Completer, ledger: Ledger, whom: Paying, out: Path, name: str, answers: Path) -> None:
    """Ask, write what the ledger holds whatever ended it, tell the numbers."""
    from llavakit.eval.judge import judged, run
    from llavakit.eval.review_page import write_page
    from llavakit.eval.reviews import by_category, relative_scores, scores, spreads, table, write_reviews

    found: list[list[Judged]] = []
    kept: list[Mapping[str, list[Pair]]] = []
    for number, job in enumerate(jobs, 1):
        file = out / f"reviews_{_spelt(judge.name)}{f'_{number}' if len(jobs) > 1 else ''}.jsonl"
        try:
            with asking.progress("judging", len(job)) as tell:
                outcome = run(job, judge, ledger, limits=whom.limits(again=job.tries), on_progress=tell)
        finally:
            found.append(judged(job, judge.name, ledger))
            written = write_reviews(file, job, found[-1], judge=judge.name)
        if written:
            kept.append(by_category(written))
            print(f"{table(kept[-1])}\n")
        _drift(written)
        _bias(found[-1])
        print(file)
        failed = sum(not one.asked for one in found[-1])
        asking.ended(outcome, ledger, made=len(written), failed=failed)
    if len(kept) > 1:
        print(f"\n{spreads([relative_scores(pairs) for pairs in kept])}")
    if kept:
        _keep(answers, scores(kept[0]), judge.name)
    notes = [f"judge: {judge.name}", *map(table, kept)]
    print(write_page(out / f"reviews_{_spelt(judge.name)}.html", found[0], title=f"{name}, {out.stem}", notes=notes))
    _expected(name, judge.name)
    _all_reviewed(found)


def _all_reviewed(found: Sequence[Sequence[Judged]]) -> None:
    """Raises ResponderError where a question has no review: what was told is over the others only."""
    refused = sum(len(one.refused) for run in found for one in run)
    if refused:
        print(f"{refused} replies were no review; the page shows them", file=sys.stderr)
    absent = [one.case.given for run in found for one in run if one.scores is None]
    if absent:
        names = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
        what = f"{len(absent)} of {sum(map(len, found))} reviews are missing (question {names}); the numbers leave them out"
        raise ResponderError(what, code="no_review", remedy="run again, or with --again 8; --upstream counts them as -1 : -1")


def _drift(written: Sequence[Review]) -> None:
    """Who judged, as the server says it: a name stands for several versions, and they score differently."""
    versions = sorted({str(review.judge["model"]) for review in written if review.judge.get("model")})
    if versions:
        print(f"judged by {', '.join(versions)}{' (several versions: not one judge)' if len(versions) > 1 else ''}", file=sys.stderr)


def _bias(found: Sequence[Judged]) -> None:
    from llavakit.eval.judge import first_bias

    bias = first_bias(found)
    if bias is not None:
        print(f"standing first is worth {bias:+.2f} points to this judge", file=sys.stderr)


def _expected(name: str, judge: str) -> None:
    """A word on published numbers, which are another judge's."""
    from llavakit.eval.benchmarks import find

    protocols = find(name).protocols
    judges = list(dict.fromkeys(protocol.judge for protocol in protocols if protocol.judge and protocol.published))
    if judges and judge not in judges:
        print(f"published numbers were judged by {', '.join(judges)}: this judge's are not comparable with them", file=sys.stderr)


def _grading(
    folder: Path, answers: Path, left_out: set[str], rules: Path | None, *, runs: int, upstream: bool, max_tokens: int
) -> mm_vet.Job:
    from llavakit.eval import mm_vet
    from llavakit.eval.official import read_text

    cases = [case for case in mm_vet.cases(folder, answers) if case.id not in left_out]
    prompt = mm_vet.PROMPT if rules is None else read_text(rules)
    return mm_vet.Job(cases=cases, runs=runs, prompt=prompt, max_tokens=max_tokens, upstream=upstream)


def _grade(job: mm_vet.Job, judge: Completer, ledger: Ledger, whom: Paying, out: Path, answers: Path) -> None:
    """The same for MM-Vet."""
    from llavakit.eval import mm_vet
    from llavakit.eval.grade_page import write_page

    try:
        with asking.progress("grading", len(job.cases) * job.runs) as tell:
            outcome = mm_vet.run(job, judge, ledger, limits=whom.limits(again=0), on_progress=tell)
    finally:
        grades = mm_vet.grades(job, judge.name, ledger)
        file = mm_vet.write_grades(out / f"{_spelt(judge.name)}-grade-{job.runs}runs.json", grades)
    known, capabilities, notes = mm_vet.values(grades), {case.id: case.truth.capabilities for case in job.cases}, [f"judge: {judge.name}"]
    if known:
        _keep(answers, mm_vet.scores(known, capabilities), judge.name)
        notes.append(mm_vet.table(known, capabilities))
        print(f"{notes[-1]}\n")
    print(file)
    print(write_page(file.with_suffix(".html"), job.cases, grades, title=f"{MM_VET}, {out.stem}", notes=notes))
    print(f"prompt {job.digest}, judged by {', '.join(sorted({one.model for told in grades.values() for one in told}))}", file=sys.stderr)
    absent = [name for name, told in grades.items() if name not in known]
    asking.ended(outcome, ledger, made=len(known), failed=sum(not one.asked for told in grades.values() for one in told))
    _expected(MM_VET, judge.name)
    if absent:
        what = f"{len(absent)} of {len(grades)} answers have no grade (the first: {absent[0]}); the numbers leave them out"
        raise ResponderError(what, code="no_review", remedy="name another judge; --upstream counts them as 0")


def _keep(answers: Path, scores: Sequence[Score], judge: str) -> None:
    """Beside answers of ``llava eval``, so that ``llava eval report`` can tell them; of several runs of the judge, the first."""
    from llavakit.eval.report import write_scores
    from llavakit.eval.run_folder import RUN

    if (answers.parent / RUN).is_file():
        print(write_scores(answers.parent, scores, judge=judge), file=sys.stderr)


def _spelt(name: str) -> str:
    """A judge's name as a file's."""
    return re.sub(r"[^\w.-]+", "-", name)
