"""Soft accuracy beside ten people, questions as upstream asks them, uploads as the servers take them; small made-up official files."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from families import ask, by_name, replied
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval import vqa
from llavakit.eval.benchmark import SHORT, Answered, Benchmark, Question, Score

UNANSWERABLE = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
said = st.sampled_from(["yes", "no", "Yes.", "the yes", "two", "2", "a", "", "men's", "ice-cream", "ice cream"])
peoples = st.lists(said, min_size=10, max_size=10)


def ten(*groups: tuple[str, int]) -> list[str]:
    made = [word for word, count in groups for _ in range(count)]
    return made + [f"other{number}" for number in range(10 - len(made))]


def write(path: Path, value: Any) -> Path:
    text = "\n".join(json.dumps(line) for line in value) + "\n" if path.suffix == ".jsonl" else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return path


def notes(*words: str) -> list[dict[str, Any]]:
    """Answers as VQAv2 and VizWiz list them."""
    return [{"answer": word, "answer_confidence": "yes", "answer_id": number} for number, word in enumerate(words, 1)]


def questions(benchmark: Benchmark, folder: Path, protocol: str = "llava-1.5") -> list[Question]:
    return ask(benchmark, folder, protocol)


def scores(benchmark: Benchmark, folder: Path, *texts: str | None) -> dict[str, Score]:
    assert benchmark.score is not None
    asked = questions(benchmark, folder)
    return by_name(benchmark.score(replied(asked, *texts)))


# --- the three accuracies ---


@pytest.mark.parametrize(("agree", "points"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_how_many_must_agree(agree: int, points: float) -> None:
    for scorer in (vqa.soft_accuracy, vqa.vizwiz_accuracy, vqa.m4c_accuracy):
        assert scorer("red", ten(("red", agree))) == pytest.approx(points)


@pytest.mark.parametrize(
    ("reply", "people", "server", "vizwiz", "m4c"),
    [
        ("yes", ten(("Yes", 10)), 0, 0, 1),  # people's capitals are lowered by M4C alone
        ("Yes.", ten(("yes", 10)), 1, 1, 1),
        ("ice cream", ten(("ice cream.", 10)), 0, 0, 1),  # all agree: the server's script leaves their full stop
        ("ice cream", ten(("ice cream.", 9)), 1, 0, 1),  # they do not: it takes it
        ("ice-cream", ten(("ice-cream", 9)), 1, 0, 1),
        ("two", ten(("two", 9)), 0, 0, 1),  # number words of people stay
        ("two", ten(("2", 9)), 1, 1, 1),
        ("the dog", ten(("dog", 9)), 1, 1, 1),
        ("dog", ten(("the dog", 9)), 0, 0, 1),
        ("the", ten(("a", 9)), 0, 0, 1),  # nothing is left of either
        ("men's", ten(("men's", 9)), 1, 1, 1),
        ("dont", ten(("don't", 9)), 1, 1, 1),
        ("don't", ten(("dont", 9)), 0, 0, 1),
        ("1,000", ten(("1000", 9)), 1, 1, 1),
        ("1000", ten(("1,000", 9)), 1, 0, 1),
        ("", ten(("", 9)), 1, 1, 1),
        ("unanswerable", ten(("unanswerable", 5), ("unsuitable", 5)), 1, 1, 1),
    ],
)
def test_whose_spelling_counts(reply: str, people: list[str], server: float, vizwiz: float, m4c: float) -> None:
    assert vqa.soft_accuracy(reply, people) == pytest.approx(server)
    assert vqa.vizwiz_accuracy(reply, people) == pytest.approx(vizwiz)
    assert vqa.m4c_accuracy(reply, people) == pytest.approx(m4c)


def test_an_upload_has_been_through_the_processor() -> None:
    """``men's`` is uploaded as ``men 's``, which nobody wrote."""
    assert vqa.soft_accuracy("men's", ten(("men's", 9))) == pytest.approx(1)
    assert vqa.uploaded_vqav2("men's", ten(("men's", 9))) == vqa.uploaded_vizwiz("men's", ten(("men's", 9))) == 0


@given(said, peoples)
def test_leave_one_out_is_a_function_of_how_many_agree(answer: str, people: list[str]) -> None:
    count = people.count(answer)
    exact = (count * min(Fraction(1), Fraction(max(count - 1, 0), 3)) + (10 - count) * min(Fraction(1), Fraction(count, 3))) / 10
    assert vqa.leave_one_out(answer, people) == pytest.approx(float(exact))


@given(said, peoples, st.randoms(use_true_random=False))
def test_the_order_of_people_does_not_count(answer: str, people: list[str], random: Any) -> None:
    mixed = random.sample(people, len(people))
    for scorer in (vqa.soft_accuracy, vqa.vizwiz_accuracy, vqa.m4c_accuracy):
        assert scorer(answer, mixed) == pytest.approx(scorer(answer, people))
        assert 0 <= scorer(answer, people) <= 1 + 1e-9


# --- VQAv2 ---


def vqav2_official(folder: Path) -> None:
    listed = [{"question_id": 1000 * number, "image_id": number, "question": f"What is {number}?"} for number in (1, 2, 3)]
    write(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": listed[1:]})
    write(folder / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": listed})


def vqav2_upstream(folder: Path) -> None:
    lines = [
        {"question_id": 1000 * n, "image": f"COCO_test2015_{n:012d}.jpg", "text": f"What is {n}?\n{SHORT}", "category": "default"}
        for n in (1, 2, 3)
    ]
    write(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", lines[1:])
    write(folder / "llava_vqav2_mscoco_test2015.jsonl", lines)


@pytest.mark.parametrize("files", [vqav2_official, vqav2_upstream])
def test_vqav2_asks_test_dev_and_uploads_all_of_test(files: Any, tmp_path: Path) -> None:
    files(tmp_path)
    asked = questions(vqa.VQAV2, tmp_path)
    assert [(one.id, one.given, one.prompt) for one in asked] == [
        ("2000", 2000, f"What is 2?\n{SHORT}"),
        ("3000", 3000, f"What is 3?\n{SHORT}"),
    ]
    assert asked[0].image is not None
    assert asked[0].image.source == tmp_path / "test2015" / "COCO_test2015_000000000002.jpg"
    assert vqa.VQAV2.submit is not None
    made = vqa.VQAV2.submit([Answered(question=asked[0], text="The Two."), Answered(question=asked[1], text=None)], tmp_path / "upload")
    assert json.loads(made.read_text()) == [
        {"question_id": 1000, "answer": ""},
        {"question_id": 2000, "answer": "2"},
        {"question_id": 3000, "answer": ""},
    ]


def test_vqav2_says_at_once_that_the_list_for_the_upload_is_missing(tmp_path: Path) -> None:
    vqav2_upstream(tmp_path)
    (tmp_path / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    with pytest.raises(DataError, match="test2015"):
        questions(vqa.VQAV2, tmp_path)


def vqav2_val(folder: Path) -> None:
    asked = [{"question_id": n, "image_id": n, "question": f"Q{n}?"} for n in (1, 2, 3)]
    words = [ten(("yes", 8)), ten(("2", 3)), ten(("red", 1))]
    kinds = ["yes/no", "number", "other"]
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    answers = [{"question_id": n, "answer_type": kinds[n - 1], "question_type": "x", "answers": notes(*words[n - 1])} for n in (1, 2, 3)]
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": answers})


def test_vqav2_val_is_scored_here_by_type_of_answer(tmp_path: Path) -> None:
    vqav2_val(tmp_path)
    found = scores(vqa.VQAV2_VAL, tmp_path, "Yes", "two", None)
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {"accuracy": 100 * (1 + 0.9 + 0) / 3, "accuracy/yes/no": 100, "accuracy/number": 90, "accuracy/other": 0}
    )
    assert [one.metric for one in found.values() if one.headline] == ["accuracy"]
    assert found["accuracy"].count == 3
    assert found["accuracy"].half_width
    assert vqa.VQAV2_VAL.verdict is not None
    one = vqa.VQAV2_VAL.verdict(Answered(question=questions(vqa.VQAV2_VAL, tmp_path)[1], text="two"))
    assert (one.parsed, one.points) == ("2", pytest.approx(0.9))
    assert one.expected.startswith("2 (3), other0")


def test_vqav2_val_wants_an_annotation_of_every_question(tmp_path: Path) -> None:
    vqav2_val(tmp_path)
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 1, "answers": notes(*ten())}]})
    with pytest.raises(DataError, match="no annotation of question 2"):
        questions(vqa.VQAV2_VAL, tmp_path)


# --- VizWiz ---


def test_vizwiz_is_asked_as_upstream_does_and_uploaded_by_picture(tmp_path: Path) -> None:
    write(
        tmp_path / "test.json",
        [{"image": "VizWiz_test_0.jpg", "question": "What's THIS? And is it Hot? "}, {"image": "b.jpg", "question": "x"}],
    )
    official = questions(vqa.VIZWIZ, tmp_path)
    assert official[0].prompt == f"What's this? and is it hot? \n{UNANSWERABLE}"
    assert [(one.id, one.given) for one in official] == [("VizWiz_test_0.jpg", 0), ("b.jpg", 1)]
    lines = [{"question_id": one.given, "image": one.id, "text": one.prompt, "category": "default"} for one in official]
    write(tmp_path / "llava_test.jsonl", lines)
    (tmp_path / "test").mkdir()
    again = questions(vqa.VIZWIZ, tmp_path)
    assert [(one.id, one.given, one.prompt, one.image) for one in again] == [(one.id, one.given, one.prompt, one.image) for one in official]
    assert vqa.VIZWIZ.submit is not None
    made = vqa.VIZWIZ.submit([Answered(question=again[0], text="Unanswerable"), Answered(question=again[1], text="A mug, red.")], tmp_path)
    assert json.loads(made.read_text()) == [
        {"image": "VizWiz_test_0.jpg", "answer": "unanswerable"},
        {"image": "b.jpg", "answer": "mug red"},
    ]
    with pytest.raises(DataError, match=r"1 of 2 questions have no answer, the first is b\.jpg"):
        vqa.VIZWIZ.submit([Answered(question=again[0], text="x"), Answered(question=again[1], text=None)], tmp_path)


def test_vizwiz_val_is_scored_here(tmp_path: Path) -> None:
    row = {"question": "what", "answer_type": "unanswerable", "answerable": 0}
    write(tmp_path / "val.json", [
        row | {"image": "a.jpg", "answers": notes(*ten(("unanswerable", 9)))},
        row | {"image": "b.jpg", "answers": notes(*ten(("mug.", 9))), "answer_type": "other"},
    ])  # fmt: skip
    found = scores(vqa.VIZWIZ_VAL, tmp_path, "Unanswerable", "mug")
    assert {name: one.value for name, one in found.items()} == {"accuracy": 50, "accuracy/other": 0, "accuracy/unanswerable": 100}


# --- TextVQA ---


def textvqa(folder: Path, *, ocr: str = "upstream") -> None:
    data = [
        {"question_id": 34602, "image_id": "p1", "question": "what is the BRAND?", "answers": ten(("dakota", 9)), "set_name": "val"},
        {"question_id": 34603, "image_id": "p1", "question": "what year?", "answers": ten(("2012", 9)), "set_name": "val"},
        {"question_id": 34604, "image_id": "p2", "question": "is this it?", "answers": ten(("yes", 9)), "set_name": "val"},
    ]
    write(folder / "TextVQA_0.5.1_val.json", {"data": data, "dataset_type": "val"})
    tokens = {"p1": ["DAKOTA", "S,"], "p2": []}
    if ocr == "upstream":
        texts = [
            (
                row["image_id"],
                f"{str(row['question']).capitalize()}\nReference OCR token: {', '.join(tokens[str(row['image_id'])])}\n{SHORT}",
            )
            for row in data
        ]
        write(
            folder / "llava_textvqa_val_v051_ocr.jsonl",
            [{"question_id": p, "image": f"{p}.jpg", "text": t, "category": "default"} for p, t in texts],
        )
    if ocr == "rosetta":
        write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": p, "ocr_tokens": t} for p, t in tokens.items()]})


@pytest.mark.parametrize("ocr", ["upstream", "rosetta"])
def test_textvqa_prompts_with_and_without_ocr(ocr: str, tmp_path: Path) -> None:
    textvqa(tmp_path, ocr=ocr)
    with_hints = questions(vqa.TEXTVQA, tmp_path)
    assert [one.prompt for one in with_hints] == [
        f"What is the brand?\nReference OCR token: DAKOTA, S,\n{SHORT}",
        f"What year?\nReference OCR token: DAKOTA, S,\n{SHORT}",
        f"Is this it?\nReference OCR token: \n{SHORT}",
    ]
    assert [(one.id, one.given) for one in with_hints] == [("34602", "p1"), ("34603", "p1"), ("34604", "p2")]
    for protocol in ("no-ocr", "llava-1.6"):
        assert questions(vqa.TEXTVQA, tmp_path, protocol)[0].prompt == f"What is the brand?\n{SHORT}"
    assert {vqa.recovered_question(one.prompt) for one in with_hints} == {"what is the brand?", "what year?", "is this it?"}


def test_textvqa_without_its_ocr_file_is_asked_only_without_hints(tmp_path: Path) -> None:
    textvqa(tmp_path, ocr="none")
    assert questions(vqa.TEXTVQA, tmp_path, "no-ocr")
    with pytest.raises(DataError, match="Rosetta"):
        questions(vqa.TEXTVQA, tmp_path)


def test_textvqa_score(tmp_path: Path) -> None:
    textvqa(tmp_path)
    found = scores(vqa.TEXTVQA, tmp_path, "Dakota.", "in 2012", None)
    assert found["accuracy"].value == pytest.approx(100 / 3)


def test_upstreams_textvqa_answers_are_matched_by_picture_and_question(tmp_path: Path) -> None:
    textvqa(tmp_path)
    asked = questions(vqa.TEXTVQA, tmp_path, "no-ocr")  # answers made with hints, questions without: the same question still
    lines = [
        {"question_id": "p2", "prompt": f"Is this it?\nReference OCR token: \n{SHORT}", "text": "yes"},
        {"question_id": "p1", "prompt": f"What year?\nReference OCR token: x\n{SHORT}", "text": "2012"},
    ]
    assert [one.text for one in vqa.match_textvqa(asked, lines)] == [None, "2012", "yes"]
    with pytest.raises(DataError, match="what year"):
        vqa.match_textvqa(asked, [*lines, lines[1]])
    with pytest.raises(DataError, match="p3"):
        vqa.match_textvqa(asked, [{"question_id": "p3", "prompt": f"What year?\n{SHORT}", "text": "1"}])


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (f"Who?\n{SHORT}", "who?"),
        (f"Who Is It?\nReference OCR token: a, b\n{SHORT}", "who is it?"),
        (f"Reference OCR token: a, b\nWho Is It?\n{SHORT}", "who is it?"),
        (f"Reference OCR token: a\n{SHORT}", "reference ocr token: a"),
        ("OCR tokens: a, b. Question: Who\nis it? Short answer:", "who\nis it?"),
    ],
)
def test_the_question_of_a_prompt(prompt: str, question: str) -> None:
    assert vqa.recovered_question(prompt) == question


@pytest.mark.parametrize("prompt", ["", "Who?", "a\nb\nc", "a\nReference OCR token: x\ny\nz", "OCR tokens: a\nb"])
def test_a_prompt_of_another_structure_is_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="no question"):
        vqa.recovered_question(prompt)


def test_of_two_equal_questions_the_last_ones_people_count_as_upstream(tmp_path: Path) -> None:
    rows = [
        {"question_id": n, "image_id": "p", "question": q, "answers": ten((a, 9))} for n, q, a in ((1, "Who?", "ann"), (2, "who?", "bob"))
    ]
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    assert [one.truth[0] for one in questions(vqa.TEXTVQA, tmp_path, "no-ocr")] == ["bob", "bob"]


# --- files that are not right ---


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", r"test\.json:1: not JSON"),
        ('[\n{"image": "a.jpg"}, {"image": 3}]', r"test\.json \[0\]: no question"),
        ('[{"image": 3, "question": "x"}]', r"\[0\]: image is not text"),
        ('{"a": 1}', "not a list"),
        ("[7]", r"\[0\]: not an object"),
        ("[]", "no question"),
        ('[{"image": "a.jpg", "question": "x"}, {"image": "a.jpg", "question": "y"}]', "two questions have the id a.jpg"),
        ('[{"image": "a.jpg", "question": "x", "answers": [{"answer": "y"}]}]', "1 answers, not 10"),
    ],
)
def test_bad_files_are_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        questions(vqa.VIZWIZ, tmp_path)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "llava_test.jsonl").write_text('{"question_id": 0, "image": "a.jpg", "text": "x"}\n\n{"question_id": 1\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"llava_test\.jsonl:3: not JSON"):
        questions(vqa.VIZWIZ, tmp_path)


def test_no_file_and_no_truth(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no TextVQA_0\.5\.1_val\.json"):
        questions(vqa.TEXTVQA, tmp_path)
    write(tmp_path / "val.json", [{"image": "a.jpg", "question": "x"}])
    with pytest.raises(DataError, match=r"no right answer is known for question a\.jpg"):
        scores(vqa.VIZWIZ_VAL, tmp_path, "x")


# --- what was published ---


@pytest.mark.parametrize(
    ("benchmark", "first", "last"),
    [(vqa.VQAV2, 78.5, 83.7), (vqa.VIZWIZ, 50.0, 63.8), (vqa.TEXTVQA, 58.2, 69.5)],
)
def test_published_numbers_stand_beside_their_protocol(benchmark: Benchmark, first: float, last: float) -> None:
    old, new = benchmark.protocols[:2]
    assert (old.name, old.template, old.aspect, old.published[0].value) == ("llava-1.5", "vicuna_v1", "pad", first)
    assert (new.name, new.aspect, new.published[-1].value) == ("llava-1.6", "anyres", last)
    assert old.suffix == new.suffix
    assert not new.hints
    assert all(one.max_new_tokens == 128 for one in (old, new))
