"""MMBench, in English and in Chinese: tables with pictures inside, options until the first that is absent, CircularEval.

    index  question  hint  A  B  C  D  answer  category  image  source  l2-category  comment  split
    241    ...       ...   .  .           B    ...       /9j/4A...
 1000241   ...             the same question with its options moved up by one: it counts if all its rows are right

The server matches answers with options by a judge where rules do not suffice; offline such an answer is wrong. Under ``all-rounds`` the
options are moved here, as LLaVA's runner does, and rows that are already moved are not asked.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llavakit.errors import MissingExtraError
from llavakit.eval import intervals
from llavakit.eval.benchmark import LETTER, LLAVA_15, LLAVA_16, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.checks import unique
from llavakit.eval.choices import LETTERS, SHIFT, absent, circular, infer, lettered, rotated, until_absent
from llavakit.eval.official import Row, bad, decoded, number, read_table, there
from llavakit.eval.published import with_numbers
from llavakit.types import Image

LETTER_CN = "请直接回答选项字母。"
ALL_ROUNDS = "all-rounds"
LEFT_OUT = ("hint", "category", "source", "image", "comment", "l2-category")  # of the upload
PREDICTION_AT = 6  # the column of the upload that is ours
_CELL = 32_767  # characters that a cell of a spreadsheet holds
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # spreadsheets are XML
_OPTIONS = "ABCD"
_SHORTEST_PICTURE = 64  # a cell with fewer characters names the row that has the picture
_ABSENT = {  # what pandas reads as no value
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
_EN = ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv")
_CN = ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv")

Infer = Callable[[str, Mapping[str, str]], str | None]


def questions(folder: Path, protocol: Protocol, *, names: Sequence[str] = _EN) -> list[Question]:
    """One question a row, or under ``all-rounds`` as many as it has options. ``folder`` may be the table itself."""
    path = _table(folder, names)
    columns, rows = read_table(path)
    lacking = [column for column in ("index", "question", "image", "A") if column not in columns]
    if lacking:
        raise bad(f"no column {', '.join(lacking)}", f"{path}:1", "give a table of MMBench", code="bad_record")
    pictures = _Pictures(rows)
    found: list[Question] = []
    for row in rows:
        cells = {column: None if cell in _ABSENT else cell for column, cell in row.items()}
        if protocol.name != ALL_ROUNDS or row.whole("index") < SHIFT:
            found += _rounds(row, cells, protocol, pictures.of(row))
    return unique(found, path)


def _rounds(row: Row, cells: Mapping[str, Any], protocol: Protocol, picture: Image) -> list[Question]:
    index, options = row.whole("index"), until_absent(cells.get(letter) for letter in _OPTIONS)
    letters, answer = LETTERS[: len(options)], cells.get("answer")
    if not options or absent(cells["question"]):
        raise row.fail("no question, or no option A")
    if answer is not None and answer not in letters:
        raise row.fail(f"the answer is {answer!r}, the options are {', '.join(letters)}")
    question = cells["question"] if absent(cells.get("hint")) else f"{cells['hint']}\n{cells['question']}"
    upload = tuple((column, number(cell) if column == "index" else cell) for column, cell in cells.items() if column not in LEFT_OUT)
    found = []
    for turn in range(len(options) if protocol.name == ALL_ROUNDS else 1):
        shown, letter_of = rotated(options, turn), rotated(letters, turn)
        found.append(
            Question(
                id=f"{index}-{turn}" if protocol.name == ALL_ROUNDS else str(index),
                given=index,
                prompt=protocol.asked(lettered(question, shown)),
                image=picture,
                category=f"{cells.get('l2-category', cells.get('L2-category')) or ''}/{cells.get('category') or ''}",
                truth=None if answer is None else LETTERS[letter_of.index(answer)],
                extra=(("round_id", turn), ("options", shown), ("option_char", letter_of)),
                row=upload,
            )
        )
    return found


class _Pictures:
    """The pictures of a table's rows; rows of one picture share its bytes."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {row["index"]: row for row in rows}
        self._held: dict[bytes, Image] = {}

    def of(self, row: Row) -> Image:
        cell = row.text("image")
        if len(cell) < _SHORTEST_PICTURE and cell in self._rows and cell != row["index"]:
            cell = self._rows[cell].text("image")
        key = hashlib.sha256(cell.encode()).digest()
        if key not in self._held:
            self._held[key] = Image(decoded(row, cell))
        return self._held[key]


def _table(folder: Path, names: Sequence[str]) -> Path:
    if folder.is_file():
        return folder
    tables = sorted(folder.glob("*.tsv"))
    path = there(folder, *names) or (tables[0] if len(tables) == 1 else None)
    if path is None:
        raise bad(f"no {names[0]}", folder, "put it there, or one table of another name", code="missing_file")
    return path


def says(answered: Answered, *, how: Infer = infer) -> str | None:
    """The letter that an answer means, as the options were shown; None where there is no answer or no letter."""
    options = dict(answered.question.extra)["options"]
    return None if answered.text is None else how(answered.text, dict(zip(LETTERS, options, strict=False)))


def scores(answered: Sequence[Answered], *, how: Infer = infer) -> list[Score]:
    """CircularEval over all, by ability and by category; and what the first row of each question gives alone. ``how``: infer_llava, ..."""
    known = [one for one in answered if one.question.truth is not None]
    rights = [(one.question, says(one, how=how) == one.question.truth) for one in known]
    right = circular((int(question.given), hit) for question, hit in rights)
    if not right:
        return []
    firsts = [(question, hit) for question, hit in rights if int(question.given) < SHIFT and dict(question.extra)["round_id"] == 0]
    by_name: dict[str, list[bool]] = defaultdict(list)
    for question, _ in firsts:
        ability, _, category = question.category.partition("/")
        for name in filter(None, (ability, category)):
            by_name[name].append(right[int(question.given)])
    return [
        intervals.mean("circular", list(right.values()), headline=True),
        intervals.mean("single", [hit for _, hit in firsts]),
        *(intervals.mean(name, hits) for name, hits in by_name.items()),
    ]


def verdict(answered: Answered) -> Verdict:
    said, truth = says(answered), answered.question.truth
    return Verdict(parsed=said or "", points=float(truth is not None and said == truth), expected=truth or "")


def submit(answered: Sequence[Answered], folder: Path) -> Path:
    """The spreadsheet for the server: the table without some columns, with ``prediction``. Of several rounds the first one is handed in.

    Every cell but the index is text and stays text: no formula is made of ``=A``, no error of ``#N/A``, no number of ``12``.
    """
    try:
        from openpyxl import Workbook
    except ImportError as error:
        raise MissingExtraError("spreadsheets need openpyxl", code="missing_extra", remedy="pip install 'llavakit[eval]'") from error
    book = Workbook()
    sheet = book.active
    sheet.title = "Sheet1"
    firsts = [one for one in answered if dict(one.question.extra)["round_id"] == 0]
    columns = [column for column, _ in firsts[0].question.row] if firsts else []
    columns.insert(PREDICTION_AT, "prediction")
    for place, values in enumerate([dict(zip(columns, columns, strict=True)), *(_cells(one) for one in firsts)], 1):
        for column, name in enumerate(columns, 1):
            value = values[name]
            cell = sheet.cell(place, column)
            if isinstance(value, str):
                cell.value = _NO_XML.sub("", value)[:_CELL]
                cell.data_type = "s"
            else:
                cell.value = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "submission.xlsx"
    book.save(path)
    return path


def _cells(answered: Answered) -> dict[str, Any]:
    return {**dict(answered.question.row), "prediction": answered.text}


def _protocols(name: str, suffix: str) -> tuple[Protocol, ...]:
    note = "published by MMBench's server, whose judge reads what rules cannot; the moved rows are in the file"
    moved = "the options are moved round by round, as LLaVA's runner does with --all-rounds"
    asked = {"suffix": suffix, "max_new_tokens": 1024}
    ways = (LLAVA_15.but(note=note, **asked), LLAVA_16.but(note=note, **asked), LLAVA_15.but(name=ALL_ROUNDS, note=moved, **asked))
    return with_numbers(name, "circular", *ways)


_REFERENCE = (
    "circular evaluation of MMBench (VLMEvalKit, exact matching); prompts and upload as model_vqa_mmbench.py and"
    " convert_mmbench_for_submission.py of haotian-liu/LLaVA. Departures: the list of refusals is not looked up; a missing answer is wrong;"
    " of several rounds the first one is handed in, not the last"
)
MMBENCH = Benchmark(
    name="mmbench",
    title="MMBench (English): choices in every order",
    needs=f"{_EN[0]}, or one table of MMBench under any name that ends with .tsv",
    reference=_REFERENCE,
    protocols=_protocols("mmbench", LETTER),
    questions=questions,
    score=scores,
    verdict=verdict,
    submit=submit,
)
MMBENCH_CN = Benchmark(
    name="mmbench-cn",
    title="MMBench (Chinese): choices in every order",
    needs=f"{_CN[0]}, or one table of MMBench under any name that ends with .tsv",
    reference=_REFERENCE,
    protocols=_protocols("mmbench-cn", LETTER_CN),
    questions=partial(questions, names=_CN),
    score=scores,
    verdict=verdict,
    submit=submit,
)
