"""LLaVA and a language model that sees no picture, together on ScienceQA (spec 6.4).

    two examples + question, words alone --> GPT-4 --> its answer, or none where the picture decides

    complement    GPT-4's answer; LLaVA's where GPT-4 gives none
    judge         LLaVA's where both agree; else GPT-4 is asked again, with both answers before it, and what it says then counts;
                  LLaVA's where it says nothing that can be read

Answers come from files (``scienceqa_files.read_predictions``) or from whoever replies (``asked``). The prompts are built as the paper's
were, in words of our own: numbers made with them are not the paper's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavakit.data.scienceqa import Problem, turns
from llavakit.eval.benchmark import Score
from llavakit.eval.intervals import mean
from llavakit.eval.scienceqa import FAILED, Gold, extract, gold, index, sentence, tally
from llavakit.responder import Completer, Ledger, Outcome, Query, Settled, ask_all
from llavakit.types import Conversation, Message, Sampling, assistant, system, user

SHOTS = 2
SAMPLING = Sampling(max_new_tokens=1024, seed=0)
LONE = (
    "You answer multiple-choice questions from science lessons at school. Some of them come with a picture that is not shown to you. "
    "Reason first, then end with one sentence in exactly this form: The answer is X. Here X is the letter of your choice. "
    "Where the words alone do not tell which choice is right, say what is missing and name no letter."
)
JUDGE = (
    "You answer multiple-choice questions from science lessons at school, after two others have answered them. Either may be mistaken. "
    "Weigh what they say against what you know, then end with one sentence in exactly this form: The answer is X. "
    "Here X is the letter of the choice that you hold to be right."
)
Texts = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Combined:
    """What an ensemble answers: which choice of each problem (-1: none), and how it came about."""

    results: Mapping[str, int]
    scores: Sequence[Score]
    "The columns of the paper's table."
    either: Score
    "Questions that at least one of those who were combined answers rightly: no combining can do better."
    asked: int
    "Complement: questions to which GPT-4 gives no answer. Judge: those on which both differ."
    fell_back: int
    "Of these, how many LLaVA's answer decides."


# ---- combining


def complement(problems: Sequence[Problem], ours: Texts, theirs: Texts, *, dice: random.Random | None = None) -> Combined:
    """GPT-4's answers, LLaVA's where GPT-4 gives none. ``dice``: an answer that names no choice counts as any one, as upstream."""
    votes = [_Vote.of(problem, ours, theirs, dice) for problem in problems]
    results = [vote.mine if vote.their_letter == FAILED else vote.their for vote in votes]
    silent = sum(vote.their_letter == FAILED for vote in votes)
    return _combined(problems, results, either=[(vote.mine, vote.their) for vote in votes], asked=silent, fell_back=silent)


def differing(problems: Sequence[Problem], ours: Texts, theirs: Texts) -> list[Problem]:
    """The problems on which both give different letters, or one of them none."""
    return [problem for problem in problems if _letters(problem, ours, theirs)[0] != _letters(problem, ours, theirs)[1]]


def judge(problems: Sequence[Problem], ours: Texts, theirs: Texts, final: Texts, *, dice: random.Random | None = None) -> Combined:
    """What both agree on, else the final answer, else LLaVA's. Final answers to questions on which both agree are not looked at."""
    votes = [_Vote.of(problem, ours, theirs, dice) for problem in problems]
    results, asked, fell_back = [], 0, 0
    for problem, vote in zip(problems, votes, strict=True):
        last = sentence(final.get(problem.id, FAILED))
        differ = vote.my_letter != vote.their_letter
        asked += differ
        fell_back += differ and last == FAILED
        results.append(index(last, len(problem.choices), dice) if differ and last != FAILED else vote.mine)
    either = [(vote.mine, vote.their, result) for vote, result in zip(votes, results, strict=True)]
    return _combined(problems, results, either=either, asked=asked, fell_back=fell_back)


def alone(problems: Sequence[Problem], texts: Texts, *, dice: random.Random | None = None) -> list[Score]:
    """The columns of one of them."""
    return tally((gold(one), index(extract(texts.get(one.id, FAILED)), len(one.choices), dice) == one.answer) for one in problems)


@dataclass(frozen=True)
class _Vote:
    my_letter: str
    their_letter: str
    mine: int
    their: int

    @staticmethod
    def of(problem: Problem, ours: Texts, theirs: Texts, dice: random.Random | None) -> _Vote:
        (mine, their), count = _letters(problem, ours, theirs), len(problem.choices)
        return _Vote(mine, their, index(mine, count, dice), index(their, count, dice))


def _letters(problem: Problem, ours: Texts, theirs: Texts) -> tuple[str, str]:
    """LLaVA's letter in any form that it answers in; GPT-4's only in the sentence that it was asked for, as upstream."""
    return extract(ours.get(problem.id, FAILED)), sentence(theirs.get(problem.id, FAILED))


def _combined(
    problems: Sequence[Problem], results: Sequence[int], *, either: Sequence[tuple[int, ...]], asked: int, fell_back: int
) -> Combined:
    golds: list[Gold] = [gold(problem) for problem in problems]
    any_right = [known.answer in votes for known, votes in zip(golds, either, strict=True)]
    return Combined(
        results={problem.id: result for problem, result in zip(problems, results, strict=True)},
        scores=tally((known, result == known.answer) for known, result in zip(golds, results, strict=True)),
        either=mean("either", any_right),
        asked=asked,
        fell_back=fell_back,
    )


# ---- asking


def shots(problems: Iterable[Problem], *, count: int = SHOTS, seed: int = 0) -> list[Problem]:
    """Examples for the prompt: drawn from the training split among those that need no picture and say why."""
    fit = [one for one in problems if not one.image and one.lecture.strip() and one.solution.strip()]
    return random.Random(seed).sample(fit, min(count, len(fit)))


def first_query(problem: Problem, examples: Sequence[Problem], *, sampling: Sampling = SAMPLING) -> Query:
    """A question in words alone, behind examples that were answered as it is to be: reasons, then the sentence (QCM-LEA)."""
    messages: list[Message] = [system(LONE)]
    for example in examples:
        asked, answered = turns(example, "QCM-LEA")
        messages += [user(asked), assistant(answered.strip())]
    return Query(id=problem.id, conversation=Conversation((*messages, user(turns(problem, "QCM-A")[0]))), sampling=sampling)


def judge_query(problem: Problem, ours: str, theirs: str, *, sampling: Sampling = SAMPLING) -> Query:
    """The same question with both answers. Who gave which is not said; LLaVA's stands first."""
    said = "\n\n".join(f"[{name} answer]\n{text.strip() or '(none)'}" for name, text in (("First", ours), ("Second", theirs)))
    words = f"{turns(problem, 'QCM-A')[0]}\n\n{said}\n\nWhich choice is right?"
    return Query(id=problem.id, conversation=Conversation((system(JUDGE), user(words))), sampling=sampling)


def judge_queries(problems: Sequence[Problem], ours: Texts, theirs: Texts, *, sampling: Sampling = SAMPLING) -> Iterator[Query]:
    """About the problems on which both differ."""
    differ = differing(problems, ours, theirs)
    return (judge_query(one, ours.get(one.id, ""), theirs.get(one.id, ""), sampling=sampling) for one in differ)


def asked(queries: Iterable[Query], completer: Completer, ledger: Ledger, **options: Any) -> tuple[dict[str, str], Outcome]:
    """What is replied to each query, from the ledger where it was paid for before; those that got no reply are absent.

    ``options`` are those of ``responder.ask_all``. Raises ResponderError, DataError.
    """
    texts: dict[str, str] = {}

    def keep(result: Settled) -> None:
        if result.accepted is not None:
            texts[result.query.id] = result.accepted.text

    outcome = ask_all(queries, completer, ledger, on_settled=keep, **options)
    return texts, outcome
