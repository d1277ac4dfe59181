"""Yes or no: what POPE (is such a thing in the picture?) and MME (two questions a picture) make of answers. ``pope`` and ``mme`` ask.

    POPE   says(text) x label -> counts -> accuracy, precision, recall, F1, share of yes; papers quote F1, and the mean of three splits
    MME    100 * (right answers / questions + pictures with both right / pictures), summed over ten subtasks and over four

The parsers are those of the references, oddities included: to POPE a "No" behind a line break is a yes, to MME "know" is a no. Unlike
there, a question that was not answered is wrong, and what is divided by nothing is 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llavakit.eval import intervals
from llavakit.eval.benchmark import SHORT, Answered, Score, Verdict

SPLITS = ("random", "popular", "adversarial")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PLEASE = "Please answer yes or no."


def pope_says(text: str) -> str:
    """Before the first full stop, without commas, between single blanks: ``No``, ``not`` or ``no`` is a no, all else a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was said of one split. Yes is the positive class; all numbers are percent; 0 / 0 is 0, where the reference stops."""

    tp: int
    fp: int
    tn: int
    fn: int
    yes: int
    "Answers that say yes ..."
    said: int
    "... of so many that say anything."

    @property
    def total(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    @property
    def parts(self) -> Mapping[str, tuple[int, int]]:
        """Shares, as so many of so many."""
        return {
            "accuracy": (self.tp + self.tn, self.total),
            "precision": (self.tp, self.tp + self.fp),
            "recall": (self.tp, self.tp + self.fn),
            "yes ratio": (self.yes, self.said),
        }

    @property
    def accuracy(self) -> float:
        return intervals.percent(*self.parts["accuracy"])

    @property
    def precision(self) -> float:
        return intervals.percent(*self.parts["precision"])

    @property
    def recall(self) -> float:
        return intervals.percent(*self.parts["recall"])

    @property
    def yes_ratio(self) -> float:
        return intervals.percent(*self.parts["yes ratio"])

    @property
    def f1(self) -> float:
        return intervals.percent(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def f1_half_width(self) -> float | None:
        """F1 is 2p / (1 + p) of the share p = tp / (tp + fp + fn), which rises with p: so do the ends of p's Wilson interval."""
        trials = self.tp + self.fp + self.fn
        if not trials:
            return None
        low, high = intervals.wilson(self.tp, trials)
        return 50 * (2 * high / (1 + high) - 2 * low / (1 + low))


def pope_score(texts: Sequence[str | None], labels: Sequence[str]) -> Counts:
    """Answers against labels, one by one in their order. A label that is not ``no`` is a yes.

    As the reference: what is longer is cut, but all answers count for the share of yes. None, an answer that is missing (the reference
    lets all later ones move up), is wrong: it misses what is there, and affirms what is not.
    """
    said = [None if text is None else pope_says(text) for text in texts]
    tp = fp = tn = fn = 0
    for word, label in zip(said, labels, strict=False):
        if label != "no":
            tp, fn = (tp + 1, fn) if word == "yes" else (tp, fn + 1)
        else:
            tn, fp = (tn + 1, fp) if word == "no" else (tn, fp + 1)
    return Counts(tp=tp, fp=fp, tn=tn, fn=fn, yes=said.count("yes"), said=len(said) - said.count(None))


def pope_scores(answered: Sequence[Answered]) -> list[Score]:
    """F1 of each split under its name, then what else there is to know; ``f1`` is the mean of the three."""
    by_split = _by_category(answered)
    counts = {split: pope_score([a.text for a in rows], [a.question.truth for a in rows]) for split, rows in by_split.items()}
    if not counts:
        return []
    whole = set(counts) == set(SPLITS)
    total = sum(c.total for c in counts.values())
    halves = intervals.of_sum([c.f1_half_width for c in counts.values()])
    name = "f1" if whole else f"f1 of {', '.join(counts)}"
    mean = sum(c.f1 for c in counts.values()) / len(counts)
    scores = [
        Score(metric=name, value=mean, count=total, half_width=None if halves is None else halves / len(counts), headline=whole),
        *(Score(metric=split, value=c.f1, count=c.total, half_width=c.f1_half_width) for split, c in counts.items()),
    ]
    for part in ("accuracy", "precision", "recall", "yes ratio"):
        split_scores = [intervals.share(f"{split} {part}", *c.parts[part]) for split, c in counts.items()]
        scores += [Score(metric=part, value=sum(s.value for s in split_scores) / len(counts), count=total), *split_scores]
    return scores


def pope_verdict(answered: Answered) -> Verdict:
    said = "" if answered.text is None else pope_says(answered.text)
    return Verdict(parsed=said, points=float(said == answered.question.truth), expected=answered.question.truth)


def mme_says(text: str) -> str:
    """``yes``, ``no`` or ``other``: the whole answer in small letters, else yes, then no, anywhere in its first four characters."""
    word = text.lower()
    if word in ("yes", "no"):
        return word
    return next((label for label in ("yes", "no") if label in word[:4]), "other")


def mme_key(prompt: str, known: Container[str]) -> str:
    """The official question behind a prompt: without our suffix, with theirs behind one blank, or two where the file has two."""
    if SHORT in prompt:
        prompt = prompt.replace(SHORT, "").strip()
    if PLEASE in prompt:
        return prompt
    return f"{prompt} {PLEASE}" if f"{prompt} {PLEASE}" in known else f"{prompt}  {PLEASE}"


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """``accuracy`` over questions and ``accuracy_plus`` over pictures are shares; ``score`` is MME's, 200 at best."""

    accuracy: float
    accuracy_plus: float
    questions: int
    pictures: int
    other: int
    "Answers that say neither."
    missing: int
    half_width: float | None

    @property
    def score(self) -> float:
        return 100 * self.accuracy + 100 * self.accuracy_plus


def mme_score(rows: Iterable[tuple[str, str, str | None]]) -> Subtask:
    """One subtask from (picture, truth, answer). What is missing or says neither is wrong; a picture counts if all about it is right."""
    hits: dict[str, list[bool]] = defaultdict(list)
    said: list[str] = []
    for picture, truth, text in rows:
        said.append("missing" if text is None else mme_says(text))
        hits[picture].append(said[-1] == truth.lower())
    questions, pictures = len(said), len(hits)
    return Subtask(
        accuracy=sum(map(sum, hits.values())) / questions,
        accuracy_plus=sum(map(all, hits.values())) / pictures,
        questions=questions,
        pictures=pictures,
        other=said.count("other"),
        missing=said.count("missing"),
        half_width=intervals.of_mean([100 * sum(of) / len(of) + 100 * all(of) for of in hits.values()]),
    )


def mme_scores(answered: Sequence[Answered]) -> list[Score]:
    """Perception, cognition, and each subtask: its points, then accuracy and accuracy+ in percent."""
    tasks = {
        name: mme_score((str(a.question.given), a.question.truth, a.text) for a in rows) for name, rows in _by_category(answered).items()
    }
    scores = []
    for total, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        found = [tasks[name] for name in names if name in tasks]
        if found:
            whole = len(found) == len(names)
            metric = total if whole else f"{total} ({len(found)} of {len(names)} subtasks)"
            half, count = intervals.of_sum([task.half_width for task in found]), sum(task.questions for task in found)
            value = sum(task.score for task in found)
            scores.append(Score(metric=metric, value=value, count=count, half_width=half, headline=whole and total == "perception"))
    for name, task in tasks.items():
        scores.append(Score(metric=name, value=task.score, count=task.questions, half_width=task.half_width))
        scores.append(Score(metric=f"{name} acc", value=100 * task.accuracy, count=task.questions))
        scores.append(Score(metric=f"{name} acc+", value=100 * task.accuracy_plus, count=task.pictures))
    return scores


def mme_verdict(answered: Answered) -> Verdict:
    said = "" if answered.text is None else mme_says(answered.text)
    return Verdict(parsed=said, points=float(said == answered.question.truth), expected=answered.question.truth)


def _by_category(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    found: dict[str, list[Answered]] = defaultdict(list)
    for one in answered:
        found[one.question.category].append(one)
    return dict(found)
