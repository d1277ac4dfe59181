"""Hold our reading of a published ScienceQA prediction file against its own: ``python dev/check_scienceqa.py FILE [--problems FOLDER]``.

FILE is one of
    {problems: {id: problem}, predictions: {id: {output, parsed}}}      a file that brings its questions
    {acc, correct, count, results: {id: index}, outputs: {id: text}}    the result file of LLaVA's script; --problems has the questions
    lines of {question_id, text}                                        answers; --problems has the questions

Printed: how many answers are read as the file says, how many are right, and the columns of the paper's table. Exit code 1 where an
answer is read otherwise than the file says, or the number of right ones is another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llavakit.data.scienceqa import Problem, read_problem
from llavakit.eval import scienceqa, scienceqa_files


def problems_of(file: scienceqa_files.Predictions, folder: Path | None) -> list[Problem]:
    if folder is not None:
        return scienceqa_files.load(folder)
    return [read_problem(name, {"lecture": "", "solution": ""} | entry) for name, entry in file.problems.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--problems", type=Path, metavar="FOLDER", help="holds problems.json and pid_splits.json")
    words = parser.parse_args()
    file = scienceqa_files.read_predictions(words.file)
    problems = problems_of(file, words.problems)
    if not problems:
        parser.error("the file brings no questions: give --problems")
    read = {p.id: scienceqa.index(scienceqa.extract(file.texts.get(p.id, scienceqa.FAILED)), len(p.choices)) for p in problems}
    known = [p.id for p in problems if p.id in file.parsed]
    other = [name for name in known if read[name] != file.parsed[name]]
    right = sum(read[p.id] == p.answer for p in problems)
    print(f"{len(problems):,} questions, {sum(p.id in file.texts for p in problems):,} of them answered")
    print(f"{len(known) - len(other):,} of {len(known):,} read as the file says" + (f"; not so: {', '.join(other[:9])}" if other else ""))
    for name in other[:9]:
        print(f"  {name}: the file says {file.parsed[name]}, we {read[name]}: ...{file.texts.get(name, '')[-80:]!r}")
    print(f"{right:,}/{len(problems):,} = {100 * right / len(problems):.2f} % right")
    if file.correct is not None:
        print(f"the file says {file.correct:,}/{file.count or 0:,}")
    for score in scienceqa.tally((scienceqa.gold(p), read[p.id] == p.answer) for p in problems):
        print(f"  {score.metric:<5} {score.value:6.2f} ± {score.half_width:.2f}  ({score.count:,})")
    return int(bool(other) or file.correct not in (None, right))


if __name__ == "__main__":
    raise SystemExit(main())
