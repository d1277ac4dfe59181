"""``llava eval ensemble``: LLaVA and a language model together on ScienceQA, from files of answers or asking the language model now."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llavakit.cli import asking, options, terminal
from llavakit.cli.asking import Asking
from llavakit.errors import ConfigError

if TYPE_CHECKING:
    from llavakit.data.scienceqa import Problem
    from llavakit.eval.benchmark import Score
    from llavakit.responder import Query

EXAMPLES = """Examples:

  llava eval ensemble ScienceQA --llava answers.jsonl --gpt4 gpt4.json                       (complement)
  llava eval ensemble ScienceQA --llava answers.jsonl --gpt4 gpt4.json --judge again.jsonl   (and judge)
  llava eval ensemble ScienceQA --llava answers.jsonl --teacher openai --model gpt-4-0613    (asks, and keeps every reply)
"""

Folder = Annotated[Path, Argument(metavar="FOLDER", show_default=False, help="Holds problems.json and pid_splits.json.")]
Ours = Annotated[Path, Option("--llava", metavar="FILE", show_default=False, help="LLaVA's answers: answers.jsonl, or a result file.")]
Theirs = Annotated[Path | None, Option("--gpt4", metavar="FILE", help="The language model's answers; without them --teacher is asked.")]
Final = Annotated[Path | None, Option("--judge", metavar="FILE", help="What it said when it was asked again.")]
Chance = Annotated[int | None, Option("--chance", metavar="SEED", help="Answers that name no choice count as any one, as upstream.")]
Kept = Annotated[Path, Option("--ledger", metavar="FILE", help="Where the replies of --teacher are kept: what was paid for is asked once.")]


@options.spread
def ensemble(
    folder: Folder,
    llava: Ours,
    gpt4: Theirs = None,
    judge: Final = None,
    chance: Chance = None,
    ledger: Kept = Path("ensemble.ledger"),
    max_tokens: options.MaxTokens = 1024,
    as_json: options.Json = False,
    *,
    whom: Asking,
    loading: options.Loading,
) -> None:
    """Combine LLaVA's answers to ScienceQA with those of a language model that sees no picture: complement and judge."""
    from llavakit.eval import ensemble as ensembles
    from llavakit.eval import scienceqa_files as files

    if gpt4 is None and whom.teacher is None:
        remedy = "give --gpt4 FILE, or --teacher and --model to ask it now"
        raise ConfigError("there are no answers of a language model", code="bad_value", where="--gpt4", remedy=remedy)
    problems, ours = files.load(folder), files.read_predictions(llava).texts
    ask, sampling = _Asks(whom, loading, ledger), ensembles.SAMPLING.but(max_new_tokens=max_tokens)
    if gpt4 is None:
        examples = ensembles.shots(files.load(folder, split="train"))
        theirs: Mapping[str, str] = ask("answering", [ensembles.first_query(one, examples, sampling=sampling) for one in problems])
    else:
        theirs = files.read_predictions(gpt4).texts
    final = files.read_predictions(judge).texts if judge is not None else None
    if final is None and whom.teacher is not None:
        final = ask("judging", list(ensembles.judge_queries(problems, ours, theirs, sampling=sampling)))

    def dice() -> random.Random | None:
        return None if chance is None else random.Random(chance)

    rows = {"LLaVA": ensembles.alone(problems, ours, dice=dice()), "GPT-4": ensembles.alone(problems, theirs, dice=dice())}
    both = {"complement": ensembles.complement(problems, ours, theirs, dice=dice())}
    if final is not None:
        both["judge"] = ensembles.judge(problems, ours, theirs, final, dice=dice())
    rows |= {name: list(one.scores) for name, one in both.items()}
    for name, texts in (("LLaVA", ours), ("GPT-4", theirs)):
        _missing(name, problems, texts)
    if as_json:
        told = {name: asdict(one) for name, one in both.items()}
        print(json.dumps({"scores": {name: [asdict(one) for one in scores] for name, scores in rows.items()}} | told))
        return
    print(table(rows))
    for name, one in both.items():
        print(f"\n{name}: {one.asked:,} questions {_WHICH[name]}; LLaVA's answer decides {one.fell_back:,}. One of them is right: ", end="")
        print(f"{one.either.value:.2f} %")


_WHICH = {"complement": "without an answer of GPT-4", "judge": "on which both differ"}


def table(rows: Mapping[str, Sequence[Score]]) -> str:
    """Markdown: a row a model, a column a group of questions, percent right; below, how many questions and half of the 95 % interval."""
    names = [score.metric for score in next(iter(rows.values()))]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {who} | " + " | ".join(f"{score.value:.2f}" for score in scores) + " |" for who, scores in rows.items()]
    *_, last = rows.values()
    lines.append("| 95 % ± | " + " | ".join(f"{score.half_width or 0:.2f}" for score in last) + " |")
    lines.append("| questions | " + " | ".join(f"{score.count:,}" for score in last) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Asks:
    """Asks the teacher; a run that is stopped ends the command, and the same command goes on from there."""

    whom: Asking
    loading: options.Loading
    ledger: Path

    def __call__(self, what: str, queries: Sequence[Query]) -> Mapping[str, str]:
        from llavakit.datagen.kinds import Prompts
        from llavakit.eval import ensemble as ensembles
        from llavakit.responder import Ledger

        assert self.whom.teacher is not None
        if self.whom.teacher == asking.SCENES:
            raise ConfigError("that teacher answers llava generate only", code="bad_value", where="--teacher", remedy="name another")
        completer = self.whom.completer(self.whom.teacher, self.loading, Prompts.load())
        with Ledger(self.ledger) as ledger, asking.progress(what, len(queries)) as tell:
            limits = self.whom.limits(again=0)  # a reply that was cut is kept as none; greedy, it would come again
            texts, outcome = ensembles.asked(queries, completer, ledger, limits=limits, on_progress=tell, total=len(queries))
            asking.ended(outcome, ledger, made=len(texts), failed=outcome.progress.failed)
        return texts


def _missing(name: str, problems: Iterable[Problem], texts: Mapping[str, str]) -> None:
    absent = [problem.id for problem in problems if problem.id not in texts]
    if absent:
        some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        print(f"{name}: no answer to {terminal.many(len(absent), 'question')}: {some}", file=sys.stderr)
