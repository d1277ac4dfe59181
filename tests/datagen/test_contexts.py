"""What a teacher is told: boxes lie in the picture, files are read in all three forms, a bad record is named with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.datagen.context import Box, Context, from_record
from llavakit.datagen.drawn import export
from llavakit.datagen.reading import has_prompts, read_asked, read_coco, read_contexts, read_jsonl
from llavakit.datagen.scenes_teacher import by_seed
from llavakit.errors import DataError

numbers = st.floats(-2, 3) | st.floats(allow_infinity=True, allow_nan=True)
RECORD: dict[str, Any] = {
    "id": "7",
    "image": "7.jpg",
    "captions": ["A dog\nsleeps.", " "],
    "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.5, 0.9]}],
}
COCO_CAPTIONS = {
    "images": [
        {"id": 1, "file_name": "a/one.jpg", "width": 200, "height": 100},
        {"id": 2, "file_name": "two.jpg", "width": 10, "height": 10},
    ],
    "annotations": [{"id": 5, "image_id": 1, "caption": "A dog."}, {"id": 6, "image_id": 1, "caption": "Dogs."}],
}
COCO_INSTANCES = {
    "images": COCO_CAPTIONS["images"],
    "categories": [{"id": 3, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [20, 10, 40, 50], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [150, -10, 100, 60], "iscrowd": 1},
        {"id": 3, "image_id": 1, "category_id": 3, "bbox": [20, 10, 0.01, 50], "iscrowd": 0},
        {"id": 4, "image_id": 9, "category_id": 3, "bbox": [1, 1, 5, 5], "iscrowd": 0},
    ],
}


@given(st.tuples(numbers, numbers, numbers, numbers))
def test_a_box_lies_in_the_picture_or_is_none(corners: tuple[float, ...]) -> None:
    box = Box.of("dog", corners)
    if box is None:
        return
    assert 0 <= box.x1 < box.x2 <= 1
    assert 0 <= box.y1 < box.y2 <= 1
    found = re.fullmatch(r"dog: \[(\d\.\d{3}), (\d\.\d{3}), (\d\.\d{3}), (\d\.\d{3})\]", box.line)
    assert found
    assert [float(value) for value in found.groups()] == [box.x1, box.y1, box.x2, box.y2]


def test_the_text_of_a_context() -> None:
    context, lost = from_record(RECORD, where="f:1")
    assert lost == 0
    assert context.text(boxes=False) == "A dog sleeps."
    assert context.text(boxes=True) == "A dog sleeps.\n\ndog: [0.100, 0.200, 0.500, 0.900]"
    assert Context("1", "1.jpg", (), (Box("dog", 0, 0, 1, 1),)).text(boxes=True) == "dog: [0.000, 0.000, 1.000, 1.000]"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": ""}, "no id"),
        ({"id": None}, "no id"),
        ({"image": 3}, "no image"),
        ({"image": "../secret.jpg"}, "outside"),
        ({"image": "/etc/passwd"}, "outside"),
        ({"captions": "one"}, "captions"),
        ({"captions": [], "instances": []}, "neither"),
        ({"captions": ["an <image>"]}, "<image>"),
        ({"instances": {}}, "instances"),
        ({"instances": [{"bbox": [0, 0, 1, 1]}]}, "category"),
        ({"instances": [{"category": "dog", "bbox": [0, 0, 1]}]}, "four numbers"),
        ({"instances": [{"category": "dog", "bbox": [0, 0, 1, "x"]}]}, "four numbers"),
        ({"instances": [{"category": "dog", "bbox": [10, 20, 300, 400]}]}, "pixels"),
    ],
)
def test_a_bad_record_is_named_with_its_place(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "contexts.jsonl"
    path.write_text(json.dumps(RECORD) + "\n\n" + json.dumps(RECORD | {"id": "8"} | change) + "\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:3")) as told:
        read_jsonl(path)
    assert words in str(told.value)
    assert ("id 8" in str(told.value)) == ("id" not in change)


def test_an_id_stands_once_and_json_is_json(tmp_path: Path) -> None:
    path = tmp_path / "contexts.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD))
    with pytest.raises(DataError, match="line 1 has this id too"):
        read_contexts(path)
    for text in ("{", '{"id": 1}{', "[]"):
        path.write_text(text)
        with pytest.raises(DataError, match=":1"):
            read_contexts(path)
    path.write_text("")
    with pytest.raises(DataError, match="no picture"):
        read_contexts(path)
    with pytest.raises(DataError, match="no such file"):
        read_contexts(tmp_path / "none.jsonl")


def written(folder: Path, captions: Any = COCO_CAPTIONS, instances: Any = COCO_INSTANCES) -> tuple[Path, Path]:
    paths = folder / "c.json", folder / "i.json"
    for path, value in zip(paths, (captions, instances), strict=True):
        path.write_text(json.dumps(value, indent=1))
    return paths


def test_coco_boxes_become_clipped_fractions(tmp_path: Path) -> None:
    captions, instances = written(tmp_path)
    for known in (read_coco(captions, instances), read_contexts(captions, instances=instances)):
        (context,) = known.contexts
        assert (context.id, context.image, context.captions) == ("one", "a/one.jpg", ("A dog.", "Dogs."))
        assert [box.line for box in context.boxes] == ["dog: [0.100, 0.100, 0.300, 0.600]", "group of dog: [0.750, 0.000, 1.000, 0.500]"]
        assert sum(known.left_out.values()) == 3  # an empty box, a box of an unknown picture, a picture without a caption
        assert len(known.lines()) == 3
    assert read_contexts(captions).contexts[0].boxes == ()


@pytest.mark.parametrize(
    ("captions", "instances", "words"),
    [
        ({"annotations": []}, COCO_INSTANCES, "no list of images"),
        ({"images": [{"id": 1}], "annotations": []}, COCO_INSTANCES, "images[0]"),
        (COCO_CAPTIONS | {"images": COCO_CAPTIONS["images"] * 2}, COCO_INSTANCES, "earlier image"),
        (COCO_CAPTIONS | {"annotations": [{"id": 5, "image_id": 77, "caption": "A dog."}]}, COCO_INSTANCES, "picture 77"),
        (COCO_CAPTIONS | {"annotations": [{"id": 5, "image_id": 1}]}, COCO_INSTANCES, "without a caption"),
        (COCO_CAPTIONS, COCO_INSTANCES | {"categories": []}, "category"),
        (COCO_CAPTIONS, COCO_INSTANCES | {"annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1]}]}, "four numbers"),
        ({**COCO_CAPTIONS, "images": [{"id": 1, "file_name": "one.jpg"}]}, {**COCO_INSTANCES, "images": []}, "width and height"),
    ],
)
def test_a_bad_coco_file_is_named_with_its_place(tmp_path: Path, captions: Any, instances: Any, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)) as told:
        read_coco(*written(tmp_path, captions, instances))
    assert ".json" in told.value.where


def test_drawn_scenes_are_read_as_their_teacher_knows_them(tmp_path: Path) -> None:
    known = read_contexts(export(tmp_path, 12, workers=1))
    assert known.drawn
    assert len(known.contexts) == 12
    assert all(context == by_seed(context.image).context for context in known.contexts)


def test_questions_of_people(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"id": 1, "image": "a.jpg", "prompt": " Why? "}\n{"id": 2, "image": "a.jpg", "prompt": "How?"}\n')
    assert has_prompts(path)
    assert [(c.id, c.image, c.captions, prompt) for c, prompt in read_asked(path)] == [
        ("1", "a.jpg", (), "Why?"),
        ("2", "a.jpg", (), "How?"),
    ]
    for bad in ('{"id": 1, "image": "a.jpg", "prompt": "<image>"}', '{"id": 1, "image": "a.jpg"}', '{"image": "a.jpg", "prompt": "Why?"}'):
        path.write_text(bad)
        with pytest.raises(DataError, match=":1"):
            read_asked(path)
