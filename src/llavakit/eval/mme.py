"""MME: two questions about each picture, one to be affirmed, one to be denied. The official files, as LLaVA asked them; ``yes_no`` scores.

    <subtask>/0001.png + 0001.txt                                  flat: most subtasks
    <subtask>/images/1.jpg + questions_answers_YN/1.txt            in folders: posters, celebrity, scene, landmark, artwork
              question, tab, Yes or No; each question ends with "Please answer yes or no.", which LLaVA's own suffix replaces

``llava_mme.jsonl``, how LLaVA asked, holds no answers; it is used where it lies beside the folders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavakit.eval.benchmark import LLAVA_15, LLAVA_16, SHORT, Answered, Benchmark, Protocol, Question
from llavakit.eval.files import replaced
from llavakit.eval.official import bad, find, read_rows, read_text, there
from llavakit.eval.published import with_numbers
from llavakit.eval.yes_no import COGNITION, PERCEPTION, PLEASE, mme_key, mme_scores, mme_verdict
from llavakit.types import Image

RELEASE = "MME_Benchmark_release_version"
_PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """``question`` as it is asked, without suffix; ``official`` as the official file spells it."""

    subtask: str
    picture: str
    question: str
    official: str
    truth: str


_Texts = Mapping[str, Mapping[str, str]]  # picture's name without its ending -> official question -> yes or no


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """As upstream's file asks them, where it lies there, else subtask by subtask from the official folders."""
    home = folder / RELEASE if (folder / RELEASE).is_dir() else folder
    texts = {name: _texts(home / name) for name in (*PERCEPTION, *COGNITION) if (home / name).is_dir()}
    if not texts:
        remedy = f"give the folder that holds {PERCEPTION[0]}, {PERCEPTION[1]}, ..."
        raise bad("no subtask of MME", folder, remedy, code="missing_file")
    upstream = there(folder, "llava_mme.jsonl")
    asking = _official(home, texts) if upstream is None else _upstream(upstream, texts)
    found: list[Question] = []
    count: dict[str, int] = defaultdict(int)
    for one in asking:
        count[one.picture] += 1
        found.append(
            Question(
                id=f"{one.picture}-{count[one.picture]}",
                given=one.picture,
                prompt=protocol.asked(one.question),
                image=Image(home / one.picture),
                category=one.subtask,
                truth=one.truth,
                row=(("question", one.official),),
            )
        )
    odd = next((picture for picture, number in count.items() if number != 2), None)
    if odd is not None:
        what = f"{odd} has {count[odd]} different questions"
        raise bad(what, folder, "MME asks two about each picture: take its files anew")
    return found


def _upstream(path: Path, texts: Mapping[str, _Texts]) -> Iterator[_Asked]:
    """Upstream's questions with the official answers, found as its converter finds them."""
    for row in read_rows(path):
        picture = row.text("question_id")
        subtask, stem = picture.split("/")[0], picture.split("/")[-1].split(".")[0]
        known = texts.get(subtask, {}).get(stem, {})
        key = mme_key(row.text("text"), known)
        if key not in known:
            raise row.fail(f"{key!r} is no question of {subtask}/.../{stem}.txt", "both files must be of one release of MME")
        question = row.text("text").removesuffix(f"\n{SHORT}")
        yield _Asked(subtask=subtask, picture=picture, question=question, official=key, truth=known[key])


def _official(home: Path, texts: Mapping[str, _Texts]) -> Iterator[_Asked]:
    for subtask, stems in texts.items():
        pictures = f"{subtask}/images" if (home / subtask / "images").is_dir() else subtask
        for stem, known in stems.items():
            picture = f"{pictures}/{find(home / pictures, *(f'{stem}{ending}' for ending in _PICTURES)).name}"
            for key, truth in known.items():
                question = key.replace(PLEASE, "").strip()
                yield _Asked(subtask=subtask, picture=picture, question=question, official=key, truth=truth)


def _texts(folder: Path) -> _Texts:
    """The text files of one subtask: a question, a tab, Yes or No."""
    found: dict[str, dict[str, str]] = {}
    apart = folder / "questions_answers_YN"
    for path in sorted((apart if apart.is_dir() else folder).glob("*.txt")):
        known = found.setdefault(path.stem, {})
        for number, line in enumerate(read_text(path).split("\n"), 1):
            question, _, answer = line.strip().partition("\t")
            if answer.lower() in ("yes", "no"):
                known[question] = answer.lower()
            elif line.strip():
                raise bad(f"{line!r} is no question, tab and Yes or No", f"{path}:{number}", code="bad_record")
    return found


def submit(answered: Sequence[Answered], folder: Path) -> Path:
    """What MME's calculation.py reads: a file a subtask, each line the text file's name, question, truth and answer between tabs."""
    lines: dict[str, list[str]] = defaultdict(list)
    for one in answered:
        name = f"{str(one.question.given).split('/')[-1].split('.')[0]}.txt"
        said = " ".join((one.text or "").split())  # tabs part the columns, line breaks the rows
        lines[one.question.category].append("\t".join((name, dict(one.question.row)["question"], one.question.truth.capitalize(), said)))
    for category, written in lines.items():
        replaced(folder / f"{category}.txt", "".join(f"{line}\n" for line in written))
    return folder


MME = Benchmark(
    name="mme",
    title="MME: perception and cognition, yes or no",
    needs="MME_Benchmark_release_version with its fourteen folders, or these folders themselves;"
    " LLaVA's llava_mme.jsonl is used if it is there",
    reference="calculation.py of MME's eval_tool, fed as convert_answer_to_mme.py of LLaVA's eval.zip feeds it. Departures: a missing"
    " answer is wrong where there the subtask cannot be read; the two questions of a picture are found by its name, not by their order",
    protocols=with_numbers(
        "mme",
        "perception",
        LLAVA_15.but(suffix=SHORT),
        LLAVA_16.but(suffix=SHORT, note="the prompt format is the checkpoint's own"),
        Protocol(name="official", aspect="pad", suffix=PLEASE, note="asked as MME's own files do"),
    ),
    questions=questions,
    score=mme_scores,
    verdict=mme_verdict,
    submit=submit,
)
