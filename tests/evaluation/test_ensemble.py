"""Complement and judge by hand, the prompts that are asked, and asking that pays once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from llavakit.cli import ensemble as command
from llavakit.data.scienceqa import Problem
from llavakit.eval import ensemble
from llavakit.responder import InTurn, Ledger, Query
from llavakit.types import Conversation, Sampling


def problem(name: str, answer: int, *, choices: int = 3, **changes: Any) -> Problem:
    fields: dict[str, Any] = {"question": f"Q{name}?", "choices": tuple("xyzuv"[:choices]), "answer": answer}
    return Problem(id=name, **fields | {"subject": "natural science", "grade": "grade2", "lecture": "L.", "solution": "S."} | changes)


def says(letter: str) -> str:
    return f"Because. The answer is {letter}."


#            right  LLaVA                 GPT-4               asked again
CASES: dict[str, tuple[str, str | None, str | None, str | None]] = {
    "agree": ("A", says("A"), says("A"), says("C")),  # nobody is asked again, so what is said then is not looked at
    "agree wrongly": ("A", says("B"), says("B"), says("A")),
    "silent": ("B", says("B"), "There is no picture.", says("C")),
    "silent, asked in vain": ("B", says("B"), "There is no picture.", "Hard to say."),
    "differ": ("C", says("A"), says("C"), says("C")),
    "differ, a third": ("B", says("A"), says("C"), says("B")),
    "differ, in vain": ("A", says("A"), says("C"), "A"),  # only the sentence counts
    "never asked": ("A", says("A"), says("C"), None),
    "a letter alone": ("B", "B", says("B"), None),  # as LLaVA-1.5 answers
    "GPT-4, a letter alone": ("B", says("A"), "B", None),  # which is not what it was asked for
    "too far": ("A", says("A"), says("E"), says("D")),
    "neither": ("A", None, None, says("A")),
}
EXPECTED = {  # complement, judge: indices
    "agree": (0, 0),
    "agree wrongly": (1, 1),
    "silent": (1, 2),
    "silent, asked in vain": (1, 1),
    "differ": (2, 2),
    "differ, a third": (2, 1),
    "differ, in vain": (2, 0),
    "never asked": (2, 0),
    "a letter alone": (1, 1),
    "GPT-4, a letter alone": (0, 0),
    "too far": (-1, -1),
    "neither": (-1, -1),
}
PROBLEMS = [problem(name, "ABC".index(right)) for name, (right, *_) in CASES.items()]
OURS, THEIRS, FINAL = ({name: case[at] for name, case in CASES.items() if case[at] is not None} for at in (1, 2, 3))


def test_complement_by_hand() -> None:
    made = ensemble.complement(PROBLEMS, OURS, THEIRS)  # type: ignore[arg-type]
    assert made.results == {name: expected for name, (expected, _) in EXPECTED.items()}
    assert (made.asked, made.fell_back) == (4, 4)
    right = [name for name, (expected, _) in EXPECTED.items() if expected == "ABC".index(CASES[name][0])]
    assert right == ["agree", "silent", "silent, asked in vain", "differ", "a letter alone"]
    (average,) = [score for score in made.scores if score.metric == "Avg"]
    assert (average.value, average.count) == (pytest.approx(100 * 5 / 12), 12)
    assert made.either.value == pytest.approx(100 * 8 / 12)


def test_judge_by_hand() -> None:
    made = ensemble.judge(PROBLEMS, OURS, THEIRS, FINAL)  # type: ignore[arg-type]
    assert made.results == {name: expected for name, (_, expected) in EXPECTED.items()}
    alike = ("agree", "agree wrongly", "a letter alone", "neither")
    assert [one.id for one in ensemble.differing(PROBLEMS, OURS, THEIRS)] == [name for name in CASES if name not in alike]  # type: ignore[arg-type]
    assert (made.asked, made.fell_back) == (8, 4)
    assert made.either.value == pytest.approx(100 * 9 / 12)


def test_with_dice_what_names_no_choice_counts_as_any() -> None:
    """The order of the draws is upstream's: LLaVA's answer, then GPT-4's, question by question."""
    named = [problem("too far", 0), problem("neither", 0)]
    ours, theirs = {"too far": says("A")}, {"too far": says("E")}
    dice = random.Random(5)
    first = dice.choice(range(3))
    second = dice.choice(range(3))
    made = ensemble.complement(named, ours, theirs, dice=random.Random(5))
    assert made.results == {"too far": first, "neither": second}
    assert ensemble.complement(named, ours, theirs, dice=random.Random(5)) == made


def test_shots_need_no_picture_and_say_why() -> None:
    train = [problem(str(n), 0, image="image.png" if n % 3 == 0 else None, lecture="" if n % 3 == 1 else "L.") for n in range(60)]
    drawn = ensemble.shots(train)
    assert len(drawn) == 2
    assert all(not one.image and one.lecture for one in drawn)
    assert drawn == ensemble.shots(train, seed=0) != ensemble.shots(train, seed=1)
    assert ensemble.shots(train[:2]) == []


def test_the_first_question_stands_behind_two_examples() -> None:
    shown = [problem("1", 2), problem("2", 0, hint="H.")]
    query = ensemble.first_query(problem("7", 1, hint="Hm.", image="image.png"), shown)
    system, *turns = query.conversation.messages
    assert system.role == "system"
    assert "The answer is X." in system.text
    assert [(turn.role, turn.text) for turn in turns] == [
        ("user", "Q1?\nContext: N/A\nOptions: (A) x (B) y (C) z"),
        ("assistant", "L. S. The answer is C."),
        ("user", "Q2?\nContext: H.\nOptions: (A) x (B) y (C) z"),
        ("assistant", "L. S. The answer is A."),
        ("user", "Q7?\nContext: Hm.\nOptions: (A) x (B) y (C) z"),
    ]
    assert (query.id, query.conversation.images, query.sampling.temperature) == ("7", (), 0)


def test_the_judge_sees_the_question_and_both_answers() -> None:
    (query,) = ensemble.judge_queries([problem("7", 1), problem("8", 1)], {"7": says("A"), "8": says("A")}, {"8": says("A")})
    system, asked = query.conversation.messages
    assert system.role == "system"
    question, _, rest = asked.text.partition("\n\n")
    assert question == "Q7?\nContext: N/A\nOptions: (A) x (B) y (C) z"
    assert rest.index(says("A")) < rest.index("(none)")
    for letter in "ABC":
        assert f"answer is {letter}" not in rest.replace(says("A"), "")


class Solver:
    """Answers C, but leaves out what shows a picture; counts what it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def reply(self, conversation: Conversation, sampling: Sampling = ensemble.SAMPLING) -> Any:
        self.asked += 1
        return iter(["" if "Q5?" in conversation.messages[-1].text else says("C")])


def test_replies_are_asked_for_once_and_kept(tmp_path: Path) -> None:
    problems = [problem(str(number), 2) for number in range(4, 9)]
    solver = Solver()

    def queries() -> list[Query]:
        return [ensemble.first_query(one, []) for one in problems]

    for _ in range(2):
        with Ledger(tmp_path / "ledger") as ledger:
            texts, outcome = ensemble.asked(queries(), InTurn(solver, "solver"), ledger)
        assert texts == {name: says("C") for name in ("4", "6", "7", "8")}
        assert outcome.exit_code == 0
        asked, solver.asked = solver.asked, 0
    assert asked == 0  # an empty reply, too, is known: asked for three times in the first run
    made = ensemble.complement(problems, {"5": says("A")}, texts)
    assert made.results == {"4": 2, "5": 0, "6": 2, "7": 2, "8": 2}


# ---- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    problems = {
        one.id: {
            "question": one.question, "choices": list(one.choices), "answer": one.answer, "hint": "", "image": None, "lecture": "L.",
            "solution": "S.", "split": "test", "subject": one.subject, "grade": one.grade,
        }
        for one in PROBLEMS
    }  # fmt: skip
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list(problems), "train": []}))
    (tmp_path / "ours.jsonl").write_text("".join(json.dumps({"question_id": n, "text": t}) + "\n" for n, t in OURS.items()))
    (tmp_path / "theirs.json").write_text(json.dumps({"outputs": THEIRS}))
    (tmp_path / "final.jsonl").write_text("".join(json.dumps({"question_id": n, "text": t}) + "\n" for n, t in FINAL.items()))
    return tmp_path


def run(*words: object) -> Any:
    app = Typer()
    app.command()(command.ensemble)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_prints_a_row_each(folder: Path) -> None:
    files = ("--llava", folder / "ours.jsonl", "--gpt4", folder / "theirs.json")
    done = run(folder, *files, "--judge", folder / "final.jsonl")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "| | NAT | NO | G1-6 | Avg |"
    rows = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines[2:] if line.startswith("|")}
    assert rows["complement"] == "41.67"
    assert rows["questions"] == "12"
    assert set(rows) == {"LLaVA", "GPT-4", "complement", "judge", "95 % ±", "questions"}
    assert "judge: 8 questions on which both differ; LLaVA's answer decides 4" in done.stdout
    assert "LLaVA: no answer to 1 question: neither" in done.stderr
    told = json.loads(run(folder, *files, "--json").stdout)
    assert set(told) == {"scores", "complement"}
    assert told["complement"]["results"]["differ"] == 2


def test_the_command_needs_somebody_to_combine_with(folder: Path) -> None:
    done = run(folder, "--llava", folder / "ours.jsonl")
    assert done.exit_code != 0
    assert "--gpt4" in str(done.exception)
